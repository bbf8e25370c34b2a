"""Lightning: the module, the schedule, callbacks, and the stages of a run."""

from qat.training.callbacks import LogQuantizers, NonFiniteError, Progress, ResumeHint, StopOnNonFinite
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
    "parameter_groups",
]
