"""Lightning: the module, the schedule, callbacks, and the stages of a run."""

from qat.training.callbacks import LogQuantizers, NonFiniteError, Progress, ResumeHint, StopOnNonFinite
from qat.training.lightning_modules import load_from_checkpoint
from qat.training.module import QATModule, parameter_groups
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
