"""Quantizers that have other bits than their configuration for a while, and what checkpoints say of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat.fake_quant import FakeQuantize
from qat.layers import weights_of
from qat.mode import Mode
from qat.modes import get_mode, quantizers
from qat.scheme import TensorScheme

CONFIGURED = "_configured"
"""The attribute of a quantizer that holds its scheme as it was configured, once it has had other bits."""


def configured(quantizer: FakeQuantize) -> TensorScheme:
    """A quantizer's scheme as it was configured, whatever bits it has now."""
    scheme: TensorScheme = vars(quantizer).get(CONFIGURED, quantizer.scheme)
    return scheme


def can_widen(quantizer: FakeQuantize) -> bool:
    """Whether the number of bits can change while training: integers, whose grid is all that depends on it."""
    return quantizer.scheme.format == "int" and quantizer.fitted is None


@torch.no_grad()
def set_bits(quantizer: FakeQuantize, bits: int, weight: Tensor | None = None) -> None:
    """Give an integer quantizer other bits, and the range that suits them.

    Ranges that are not learned become those that calibration would have given: of the weight as it is now, of the
    activations that were observed. Learned ones keep what they have learned: the scale is multiplied by the ratio of
    what the observer would choose at either width, so that more is clipped at fewer bits if the observer says so.

    Args:
        quantizer: of integers (`can_widen`).
        bits: how many.
        weight: as the quantizer sees it; None for an activation.
    """
    if bits == quantizer.scheme.bits:
        return
    known = quantizer.calibrated and not quantizer.dynamic
    before = _observed_scale(quantizer, weight) if known else None
    low, steps = quantizer.quant_min, quantizer.quant_max - quantizer.quant_min
    scale, zero_point = quantizer.qparams() if known else (None, None)
    _regrid(quantizer, bits)
    if not known:
        return
    assert scale is not None
    assert zero_point is not None
    after = _observed_scale(quantizer, weight)
    finer = (quantizer.quant_max - quantizer.quant_min) / steps
    if quantizer.range.learned or before is None or after is None:
        ratio: Tensor | float = 1 / finer if before is None or after is None else after / before
        moved = torch.round(quantizer.quant_min + (zero_point - low) * finer)
        moved = zero_point if quantizer.scheme.symmetric else moved.clamp(quantizer.quant_min, quantizer.quant_max)
        quantizer.range.set(scale * ratio, moved)
        if weight is not None:
            quantizer.start_rounding(weight)
    elif weight is not None:
        quantizer.set_range_from(weight)
    else:
        quantizer.set_range_from_observer()


def _regrid(quantizer: FakeQuantize, bits: int) -> None:
    """Another grid; the range is not touched."""
    vars(quantizer).setdefault(CONFIGURED, quantizer.scheme)
    quantizer.scheme = dataclasses.replace(configured(quantizer), bits=bits)
    quantizer.grid = quantizer._grid()
    low, high = quantizer.quant_min, quantizer.quant_max = quantizer._ends()
    quantizer.observer.options = dataclasses.replace(quantizer.observer.options, quant_min=low, quant_max=high)
    quantizer.range.fit(dataclasses.replace(quantizer.range.options, quant_min=low, quant_max=high))


def _observed_scale(quantizer: FakeQuantize, weight: Tensor | None) -> Tensor | None:
    """The scale that calibration would give now; None for an activation that was never observed."""
    if weight is not None:
        ends = quantizer.measure(weight)
    else:
        try:
            ends = quantizer.observer.range()
        except RuntimeError:  # its way of saying that it has seen nothing
            return None
    return quantizer._choose(*ends, quantizer.scale_shape)[0]


def quantizer_state(net: nn.Module) -> dict[str, Any]:
    """What a checkpoint keeps of quantizers beside their tensors: modes and bits.

    Returns:
        `mode` of the network; `quantizers`: of each that differs from it, or from its configuration, mode and bits.
    """
    mode = get_mode(net)
    own = {
        name: {"mode": quantizer.mode.value, "bits": quantizer.scheme.bits}
        for name, quantizer in quantizers(net)
        if quantizer.mode is not mode or quantizer.scheme.bits != configured(quantizer).bits
    }
    return {"mode": mode.value, "quantizers": own}


def restore_quantizer_state(net: nn.Module, state: Mapping[str, Any]) -> None:
    """Put quantizers into modes, and to bits, as `quantizer_state` has them; ranges come with the tensors."""
    mode = Mode(state.get("mode", "float"))
    own = state.get("quantizers", {})
    for name, quantizer in quantizers(net):
        quantizer.mode = Mode(own[name]["mode"]) if name in own else mode
        bits = own[name]["bits"] if name in own else configured(quantizer).bits
        if bits is not None and bits != quantizer.scheme.bits:
            _regrid(quantizer, bits)


def match_bits(net: nn.Module, other: nn.Module) -> None:
    """Give quantizers of a copy the bits that those of the original have; ranges are not touched."""
    for (_, copied), (_, quantizer) in zip(quantizers(net), quantizers(other), strict=True):
        if copied.scheme.bits != quantizer.scheme.bits:
            assert quantizer.scheme.bits is not None
            _regrid(copied, quantizer.scheme.bits)


def widen(net: nn.Module, bits: int | None) -> list[str]:
    """Give every integer quantizer of a network at least so many bits, or with None those of its configuration.

    Returns:
        Names of the quantizers that changed.
    """
    weights: dict[FakeQuantize, Tensor] | None = None
    changed = []
    for name, quantizer in quantizers(net):
        own = configured(quantizer).bits
        wanted = own if own is None or bits is None else max(bits, own)
        if wanted is not None and wanted != quantizer.scheme.bits and can_widen(quantizer):
            weights = weights_of(net) if weights is None else weights
            set_bits(quantizer, wanted, weights.get(quantizer))
            changed.append(name)
    return changed
