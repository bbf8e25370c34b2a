"""The PTQ step: what is done to weights, ranges and statistics once training is over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from qat.adapters import merge_adapters
from qat.calibrate import calibrate
from qat.mode import Mode
from qat.modes import get_mode, set_mode
from qat.ptq.adaptive import learn_rounding
from qat.ptq.batch_norm import reestimate_batch_norm
from qat.ptq.bias import correct_bias, round_biases


@dataclass(kw_only=True)
class PTQConfig:
    """What the PTQ step does.

    Attributes:
        calibration_batches: how many training batches it sees.
        smooth: alpha of SmoothQuant (`qat.ptq.smooth`) of the float weights, from which the baseline and QAT both
            start; None for none. Divisions go into norms and layers, nothing is multiplied.
        bias_correction: cancel the mean error of quantized weights; on float weights only (the PTQ baseline).
        reestimate_batch_norm: measure BatchNorm statistics anew after QAT.
        reestimate_ranges: calibrate anew after QAT (this replaces learned scales and roundings too).
        adaptive_rounding_steps: steps a layer in which the PTQ baseline learns `weight.rounding=adaptive`; with 0 it
            rounds to nearest.
        relearn_rounding: learn it anew after QAT, which leaves its own rounding otherwise.
    """

    calibration_batches: int = 8
    smooth: float | None = None
    bias_correction: bool = True
    reestimate_batch_norm: bool = False
    reestimate_ranges: bool = False
    adaptive_rounding_steps: int = 1000
    relearn_rounding: bool = False


def finalize(prepared: nn.Module, batches: Sequence[Any], config: PTQConfig, *, trained: bool) -> None:
    """Turn a network into what will be exported: its fake-quantized forward is from here on the integer network's.

    Adapters (LoRA) are merged into the weights that they adapt first (`qat.adapters.merge_adapters`).

    Args:
        prepared: a prepared network: freshly prepared from float weights, or trained.
        batches: calibration inputs, each as `qat.calibrate` takes it.
        config: the steps.
        trained: whether quantization-aware training has run. Without it ranges are calibrated and biases corrected.
    """
    merge_adapters(prepared, batches[:1] if get_mode(prepared) is not Mode.float else ())
    if not trained or config.reestimate_ranges:
        calibrate(prepared, batches)
    if config.adaptive_rounding_steps and (not trained or config.reestimate_ranges or config.relearn_rounding):
        learn_rounding(prepared, batches, steps=config.adaptive_rounding_steps)
    if trained and config.reestimate_batch_norm:
        reestimate_batch_norm(prepared, batches)
    if not trained and config.bias_correction:
        correct_bias(prepared, batches)
    set_mode(prepared, Mode.frozen)
    prepared.eval()
    round_biases(prepared)
