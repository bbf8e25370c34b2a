"""Lightning: the module, the schedule, callbacks, and the stages of a run."""

from qat.training.callbacks import NonFiniteError, StopOnNonFinite
from qat.training.checkpoints import AtomicCheckpointIO, Resumable
from qat.training.lightning_modules import load_from_checkpoint
from qat.training.module import QATModule, parameter_groups
from qat.training.progress import Progress
from qat.training.quantizer_log import LogQuantizers
from qat.training.rows import CSVLogger
from qat.training.schedule import QATSchedule

__all__ = [
    "AtomicCheckpointIO",
    "CSVLogger",
    "LogQuantizers",
    "NonFiniteError",
    "Progress",
    "QATModule",
    "QATSchedule",
    "Resumable",
    "StopOnNonFinite",
    "load_from_checkpoint",
    "parameter_groups",
]
