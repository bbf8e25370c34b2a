"""What a number format is: the values it has (Grid), and how a tensor gets its scales (Format)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Round = Callable[[Tensor], Tensor]
"""An entry of `qat.numerics.rounding.ROUNDING`: real numbers -> integers."""

LISTED_BITS = 16
"""The widest grid whose values `Grid.values` lists."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The values that one tensor may take, in units of its scale.

    Attributes:
        low: smallest value; 0.0 without a sign.
        high: largest value.
        snap: `snap(v, round)` -> a value of the grid for every `v`, float32 of any shape. NaN stays NaN; what lies
            outside [low, high], infinities included, becomes the nearer end. `round` sees `v` in units of the local
            step, so every rounding works on every grid, and `stochastic` stays unbiased:

            * floats and powers of two: `v / ulp(v)`; nearest is the IEEE round-half-to-even;
            * tables: the index of the neighbour towards zero, plus the fraction of the way to the next, with the sign
              of `v`.
        levels: all values, ascending, float32. Ask `values` instead, which refuses grids too large to list.
        bits: bits that a value takes in storage.
    """

    low: float
    high: float
    snap: Callable[[Tensor, Round], Tensor]
    levels: Callable[[], Tensor]
    bits: int

    def values(self) -> Tensor:
        """All distinct values, ascending, float32; -0 and 0 are one.

        Raises:
            ValueError: for grids wider than 16 bits.
        """
        if self.bits > LISTED_BITS:
            raise ValueError(f"values of {self.bits} bits are too many to list: grids up to {LISTED_BITS} bits can be")
        return self.levels()


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format.

    Attributes:
        description: a phrase for help texts, with its source.
        bits: widths it has.
        grid: (bits, signed, narrow) -> Grid. Without the sign the grid ends at 0. `narrow` leaves out the smallest
            value where that has no positive counterpart, and means nothing elsewhere. None where the levels are fitted
            to the tensor.
        unsigned: whether the unsigned grid uses the sign's bit for more values. Elsewhere it is the half of the signed
            one from 0 up.
        powers: every power of two up to the largest level is a level, as `logarithmic` rounding needs.
        unit_scale: values stand for themselves, the scale is 1.
        block: elements that share a scale; None for what granularity says.
        scales: (largest magnitudes, float32, shape [rows, blocks]; grid) -> scales, float32, > 0, same shape. None for
            `amax / grid.high`.
        tensor_scale: (largest magnitude of a tensor, float32; grid) -> a scale of the tensor above those of its blocks,
            for a format that has one; float32, > 0, same shape. An activation's may be kept, while its blocks' are
            computed.
        block_scales: (largest magnitudes of blocks, in the tensor's dtype; the tensor's scale; grid) -> the blocks'
            scales with it, multiplied out: float32, > 0, the first one's shape.
        fitted: key of `qat.fitted.FITTED`: the rule by which scale and levels come from the tensor, instead of from an
            observed range. With a `grid` the rule chooses a scale (binary, ternary), without one a table of levels.
        vectors: the entries of that table are vectors of `group_size` values.
    """

    description: str
    bits: tuple[int, ...]
    grid: Callable[[int, bool, bool], Grid] | None
    unsigned: bool = False
    powers: bool = False
    unit_scale: bool = False
    block: int | None = None
    scales: Callable[[Tensor, Grid], Tensor] | None = None
    tensor_scale: Callable[[Tensor, Grid], Tensor] | None = None
    block_scales: Callable[[Tensor, Tensor, Grid], Tensor] | None = None
    fitted: str | None = None
    vectors: bool = False


def binade(x: Tensor) -> Tensor:
    """The power of two at or below each magnitude, `2 ** floor(log2 |x|)`, exactly: the exponent field of the float.

    Args:
        x: float32, any shape.

    Returns:
        float32, a new tensor. 0 for zero and subnormal numbers, inf for inf and NaN.

    >>> binade(torch.tensor([1.0, -1.99, 2.0, 0.3]))
    tensor([1.0000, 1.0000, 2.0000, 0.2500])
    """
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)
