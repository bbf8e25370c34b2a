"""Products of all pairs: what turns a bilinear layer into a linear one."""

from typing import Any

import torch
from torch import Tensor

from qat.runtime.grid import Quantize
from qat.runtime.int8_sums import Int8Sums
from qat.runtime.layers import IntegerConv, RuntimeLayer

EXACT = 2**53
"""Every integer up to here is a float64."""


def pairs(a: Tensor, b: Tensor) -> Tensor:
    """`a[..., i] * b[..., j]` at position `i * len(b) + j`: [..., in1] and [..., in2] -> [..., in1 * in2]."""
    return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)


class Outer(RuntimeLayer):
    """Products of all pairs of real numbers."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[..., in1] and [..., in2] -> [..., in1 * in2]."""
        return self.emit(pairs(a, b))


class IntegerBilinear(IntegerConv):
    """Bilinear layer on integers: a linear layer on the products of all pairs of two inputs.

        y = input_scale * weight_scale * (sum (a_q - a_zero)(b_q - b_zero)(w_q - w_zero) + bias)

    `input_scale` is the product of the inputs' scales. Three factors of 8 bits reach 2^24, so that 128 pairs may leave
    an int32: the sum and the bias are int64, and the fast form takes float64, which holds every partial sum as long as
    `fits` says so.

    Args:
        weight_shape: [out, in1 * in2].
        weight_bounds: smallest and largest weight integer.
        input_bounds: smallest and largest product.
        settings: of an `IntegerConv`.
    """

    left_zero_point: Tensor
    right_zero_point: Tensor

    def __init__(
        self, weight_shape: list[int], weight_bounds: list[int], input_bounds: list[int], **settings: Any
    ) -> None:
        super().__init__(weight_shape, weight_bounds, input_bounds, **settings)
        self.bias, self._sums = self.bias.long(), torch.int64
        for side in ("left", "right"):
            self.register_buffer(f"{side}_zero_point", torch.zeros((), dtype=torch.int32))

    @staticmethod
    def products(a: Quantize, b: Quantize) -> Quantize:
        """The grid that products of two grids' integers lie on, each counted from its zero point."""
        ends = [
            (left - int(a.zero_point)) * (right - int(b.zero_point))
            for left in (a.quant_min, a.quant_max)
            for right in (b.quant_min, b.quant_max)
        ]
        return Quantize(min(ends), max(ends), scale=float(a.scale * b.scale))

    @staticmethod
    def fits(products: Quantize, count: int) -> bool:
        """Whether float64 holds every sum of `count` products, each times a weight of 8 bits."""
        return count * max(abs(products.quant_min), abs(products.quant_max)) * 255 < EXACT

    def int8_sums(self) -> Int8Sums | None:
        """None: products are no 8-bit integers."""
        return None

    def multiplied(self, a_q: Tensor, b_q: Tensor) -> Tensor:
        """What the weight is multiplied by: int32, or int64 where inputs are so wide; shape [..., in1 * in2]."""
        wide = torch.int32 if max(map(abs, self.input_bounds)) < 2**31 else torch.int64
        return pairs(a_q.to(wide) - self.left_zero_point, b_q.to(wide) - self.right_zero_point)

    def forward(self, a_q: Tensor, b_q: Tensor) -> Tensor:  # type: ignore[override]
        """Integers of both inputs' grids -> integers of the output's grid, or float32."""
        return super().forward(self.multiplied(a_q, b_q))
