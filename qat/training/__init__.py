"""Lightning: the module, the schedule, callbacks, and the stages of a run."""

from qat.training.callbacks import NonFiniteError, ResumeHint, StopOnNonFinite
from qat.training.lightning_modules import load_from_checkpoint
from qat.training.module import QATModule, parameter_groups
from qat.training.progress import Progress
from qat.training.quantizer_log import LogQuantizers
from qat.training.schedule import QATSchedule

__all__ = [
    "LogQuantizers",
    "NonFiniteError",
    "Progress",
    "QATModule",
    "QATSchedule",
    "ResumeHint",
    "StopOnNonFinite",
    "load_from_checkpoint",
    "parameter_groups",
]
