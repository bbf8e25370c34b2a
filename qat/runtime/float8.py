"""Linear layers of e4m3fn weights and inputs as products of float8 matrices (`torch._scaled_mm`).

Products of two such numbers are exact in float32. Their sums come in another order than the layer's own, on numbers
that are not yet multiplied by the scales; so the result differs by float32's rounding, and a quantizer behind it may
land a step away next to a tie. What CUDA asks of the operands (columns in multiples of 16, the second matrix stored by
columns) is met by zeros around them. It runs on a CPU, too, where tests compare it with the layer.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.runtime.layers import RuntimeLayer
from qat.runtime.stored import Simulate, TableConv

FLOAT8 = torch.float8_e4m3fn


class Float8Product:
    """A linear layer of float8 weights, of inputs that are on a float8 grid with one scale.

    Args:
        layer: with e4m3fn levels, a scale a tensor or output channel.
        scale: of its input.
    """

    def __init__(self, layer: TableConv, scale: Tensor) -> None:
        codes = layer.codes.reshape(layer.weight_shape).long()
        weight = layer.levels.reshape(-1)[codes]
        self.outputs, self.inputs = weight.shape
        self.weight = F.pad(weight, (0, -self.inputs % 16, 0, -self.outputs % 16)).to(FLOAT8).t()
        self.scale, self.one = scale.reshape(()), torch.ones((), device=weight.device)
        self.gain, self.bias, self.emit = self.scale * layer.scale * layer.gain, layer.bias, layer.emit

    def __call__(self, x: Tensor) -> Tensor:
        """float32 on the grid, [..., in] -> as the layer, [..., out]."""
        rows = F.pad((x / self.scale).reshape(-1, self.inputs), (0, -self.inputs % 16)).to(FLOAT8)
        y = torch._scaled_mm(rows, self.weight, self.one, self.one, out_dtype=torch.float32)
        return self.emit((y[:, : self.outputs] * self.gain + self.bias).reshape(*x.shape[:-1], self.outputs))


def product_of(layer: RuntimeLayer, source: RuntimeLayer | None) -> Callable[[Tensor], Tensor] | None:
    """The layer as a product of float8 matrices; None where it, or what makes its input, is none.

    Args:
        layer: of a network.
        source: what makes its input; None for the network's own.
    """
    if not isinstance(layer, TableConv) or not isinstance(source, Simulate) or len(layer.weight_shape) != 2:
        return None
    reads, levels = source.quantizer, layer.levels
    if reads.scheme.format != "e4m3fn" or reads.dynamic or reads.scale_shape != () or levels is None:
        return None
    whole = len(levels) == 1 and layer.layout.kind in ("tensor", "channel") and layer.layout.axis == 0
    if not whole or not torch.equal(levels.to(FLOAT8).float(), levels) or bool(layer.zero_point.any()):
        return None
    return Float8Product(layer, reads.qparams()[0]) if multiplies_float8(levels.device) else None


@functools.cache
def multiplies_float8(device: torch.device) -> bool:
    """Whether `torch._scaled_mm` works on a device, and adds what float32 adds exactly."""
    x = torch.full((32, 64), 15.0, device=device).to(FLOAT8)
    one = torch.ones((), device=device)
    try:
        y = torch._scaled_mm(x, x[:16].t(), one, one, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError, ValueError):  # an older GPU, or a build of torch without it
        return False
    return bool((y == 64 * 225).all())
