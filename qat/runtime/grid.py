"""The integer grid of a tensor, and the step to it: from real numbers, or from integer sums (fixed point)."""

from typing import Any

import torch
from torch import Tensor, nn

from qat.numerics import affine
from qat.numerics.fixed_point import multiplier_and_shift, requantize
from qat.numerics.rounding import ROUNDING


def storage_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    """The smallest integer dtype that holds a grid (torch has few operations on uint16, so int32 holds that)."""
    for dtype in (torch.uint8, torch.int8, torch.int16):
        info = torch.iinfo(dtype)
        if info.min <= quant_min and quant_max <= info.max:
            return dtype
    return torch.int32


class Quantize(nn.Module):
    """Real numbers to integers: `clamp(round(x / scale) + zero_point, quant_min, quant_max)`.

    Args:
        quant_min, quant_max: the grid.
        relu: absorb a ReLU: the lower clamp is the zero point (only needed where that is not `quant_min` anyway).
        scale: > 0.
        zero_point: an integer of the grid.
        rounding: key of ROUNDING: what is done with ties.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, quant_min: int, quant_max: int, relu: bool = False, scale: float = 1.0, zero_point: int = 0,
        rounding: str = "nearest",
    ) -> None:  # fmt: skip
        super().__init__()
        self.quant_min, self.quant_max, self.relu, self.rounding = quant_min, quant_max, relu, rounding
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))

    @property
    def dtype(self) -> torch.dtype:
        """Integer dtype of the result."""
        return storage_dtype(self.quant_min, self.quant_max)

    def forward(self, x: Tensor) -> Tensor:
        """float, any shape -> integers of `dtype`, same shape."""
        q = affine.quantize(x, self.scale, self.zero_point.float(), self.quant_min, self.quant_max, self.rounding)
        if self.relu:
            q = torch.maximum(q, self.zero_point.float())
        return q.to(self.dtype)

    def clamped(self, low: float, high: float) -> "Quantize":
        """The same grid for values that are clamped to [low, high], which holds 0, before they are rounded."""
        wide = (torch.tensor([low, high], dtype=torch.float32) / self.scale).clamp(-(2.0**30), 2.0**30)
        ends = (ROUNDING[self.rounding](wide) + self.zero_point).long().tolist()
        relu = self.relu or (low == 0 and int(self.zero_point) != self.quant_min)
        least = self.quant_min if low == 0 else max(self.quant_min, ends[0])
        return Quantize(
            least, min(self.quant_max, ends[1]), relu, float(self.scale), int(self.zero_point), self.rounding
        )  # fmt: skip

    def dequantize(self, x_q: Tensor) -> Tensor:
        """Integers of this grid -> float32."""
        return affine.dequantize(x_q, self.scale, self.zero_point.float())

    def steps(self, x: Tensor) -> Tensor:
        """Where between the integers (counted from the zero point) the values lie that `forward` rounds."""
        return x.float() / self.scale

    def spec(self) -> dict[str, Any]:
        """Constructor arguments that are not tensors."""
        rounding = {} if self.rounding == "nearest" else {"rounding": self.rounding}
        return {"quant_min": self.quant_min, "quant_max": self.quant_max, "relu": self.relu} | rounding

    @staticmethod
    def from_spec(spec: dict[str, Any]) -> "Quantize":
        """A grid with empty buffers: reached from real numbers, or from sums."""
        return Requantize(**spec) if "multipliers" in spec else Quantize(**spec)


class Requantize(Quantize):
    """Integer sums to integers: `clamp(round(sum * multiplier * 2^(shift - 31)) + zero_point, quant_min, quant_max)`.

    In integers alone (`qat.numerics.fixed_point`); the scale says what the integers stand for, and enters nothing.

    Args:
        quant_min, quant_max, relu, scale, zero_point: as in `Quantize`.
        multipliers: shape of the multipliers and shifts, which are broadcast against the sum.
    """

    multiplier: Tensor
    shift: Tensor

    def __init__(
        self, quant_min: int, quant_max: int, relu: bool = False, scale: float = 1.0, zero_point: int = 0,
        multipliers: list[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(quant_min, quant_max, relu, scale, zero_point)
        self.register_buffer("multiplier", torch.zeros(multipliers or [], dtype=torch.int32))
        self.register_buffer("shift", torch.zeros(multipliers or [], dtype=torch.int32))

    @classmethod
    def of(cls, grid: Quantize, unit: Tensor) -> "Requantize":
        """The step to the integers of `grid` from sums that count `unit`s (float64, broadcast against the sum)."""
        step = cls(
            grid.quant_min, grid.quant_max, grid.relu, float(grid.scale), int(grid.zero_point), list(unit.shape)
        )  # fmt: skip
        multiplier, shift = multiplier_and_shift(unit / grid.scale.double())
        step.multiplier.copy_(multiplier)
        step.shift.copy_(shift)
        return step

    def forward(self, x: Tensor) -> Tensor:
        """Sums, int32 or int64 -> integers of `dtype`, same shape."""
        q = requantize(x, self.multiplier, self.shift, self.zero_point, self.quant_min, self.quant_max)
        return (torch.maximum(q, self.zero_point) if self.relu else q).to(self.dtype)

    def steps(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.double() * self.multiplier.double() * 2.0 ** (self.shift.double() - 31)

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"multipliers": list(self.multiplier.shape)}
