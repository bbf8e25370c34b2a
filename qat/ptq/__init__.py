"""The post-training step: on float weights it is the baseline, on trained weights the last touch before export."""

from qat.ptq.adaptive import RoundingResult, learn_rounding
from qat.ptq.batch_norm import reestimate_batch_norm
from qat.ptq.bias import correct_bias, round_biases
from qat.ptq.finalize import PTQConfig, finalize
from qat.ptq.smooth import Smoothing, smooth
from qat.ptq.tables import TableError, tabulate

__all__ = [
    "PTQConfig",
    "RoundingResult",
    "Smoothing",
    "TableError",
    "correct_bias",
    "finalize",
    "learn_rounding",
    "reestimate_batch_norm",
    "round_biases",
    "smooth",
    "tabulate",
]
