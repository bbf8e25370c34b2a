"""What a deployment target can run. TARGETS is the table that configurations choose from."""

from qat.targets.checks import Asked, check_layers, check_target
from qat.targets.limits import FAMILIES, Kernel, Limits, Target
from qat.targets.nearest import Way, nearest
from qat.targets.table import TARGETS
from qat.targets.ties import with_ties_of_target

__all__ = [
    "FAMILIES",
    "TARGETS",
    "Asked",
    "Kernel",
    "Limits",
    "Target",
    "Way",
    "check_layers",
    "check_target",
    "nearest",
    "with_ties_of_target",
]
