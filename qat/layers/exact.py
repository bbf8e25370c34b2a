"""Sums of integers, in evaluation: what the integer network computes, where float32's last bits would be magnified.

The sum of real numbers on two grids comes with float32's rounding, so where integers cancel something of 1e-8 is left
of it. A quantizer does not see that. A function does that divides by the size of what it reads (normalize, LayerNorm of
rows that hardly vary): of integers it reads zeros, of real numbers a vector of noise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.numerics.rounding import straight_through

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]

EXACT_FLOAT32 = 2**24
"""Sums of integers below this are exact in float32, in any order."""

ON_GRID = 2.0**-20
"""What may be left of a bias on the grid, as a share of it."""


def simulates(quantizer: FakeQuantize) -> bool:
    """Whether it puts values on its grid now."""
    return quantizer.mode in (Mode.quantize, Mode.frozen)


def product(layer: Any, x: Tensor, multiply: Multiply) -> Tensor:
    """What a layer with one weight makes of its input: of its quantized weight, or in evaluation of integers.

    Args:
        layer: a QuantizedLayer; `sources` say on which grid its input may lie, where its sums are to be exact.
        x: the input, as it is computed with.
        multiply: (input, weight, bias) -> output; what it keeps for backward is its own concern.
    """
    exact = _exact(layer, x, multiply) if layer.sources and not layer.training else None
    if exact is not None and not torch.is_grad_enabled():
        return exact
    weight = layer.quantized_weight()
    y = multiply(x, weight, layer.bias)
    return y if exact is None else straight_through(y, exact)


@torch.no_grad()
def _exact(layer: Any, x: Tensor, multiply: Multiply) -> Tensor | None:
    """`input_scale weight_scale (sum (x_q - x_zero) (w_q - w_zero) + bias)`, as the integer network computes it.

    None where the layer multiplies no integers, or where float32 does not hold all of their sums: those of so many
    inputs hardly ever cancel.
    """
    quantizer = layer.weight_quantizer
    if x.dtype != torch.float32 or torch.compiler.is_compiling() or not (quantizer.integer and simulates(quantizer)):
        return None
    view = layer.outputs_first()
    scale = quantizer.scales(view).float().reshape(-1).expand(len(view))
    weight = torch.round(quantizer(view) / scale.reshape(-1, *[1] * (view.dim() - 1)))
    for source in layer.sources:
        if not (source.integer and simulates(source)):
            continue
        step = source.qparams()[0]
        integers = torch.round(x / step)
        largest = float(weight.abs().flatten(1).sum(1).max()) * (source.quant_max - source.quant_min)
        if largest < EXACT_FLOAT32 and torch.equal(integers * step, x):
            sums = multiply(integers, layer.as_kept(weight), None)
            return _scaled(sums, step, scale, layer.bias, view.dim() - 2)
    return None


def _scaled(sums: Tensor, step: Tensor, scale: Tensor, bias: Tensor | None, dims: int) -> Tensor:
    """Sums and the bias, which is rounded to their integers but for what lies in between."""
    channels = (-1, *[1] * dims)
    unit = (step * scale).reshape(channels)
    if bias is None:
        return sums * unit
    exact = step.double() * scale.double()
    integers = torch.round(bias.double() / exact)
    rest = bias.double() - integers * exact
    rest = torch.where(rest.abs() <= ON_GRID * bias.abs(), 0.0, rest).float()
    return (sums.double() + integers.reshape(channels)).float() * unit + rest.reshape(channels)
