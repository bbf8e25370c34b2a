"""The product of two integer tensors."""

from typing import Any

import torch
from torch import Tensor

from qat.runtime.grid import Quantize
from qat.runtime.layers import RuntimeLayer


class IntegerMatmul(RuntimeLayer):
    """Matrix product of two tensors on grids, batches broadcast as in `torch.matmul`.

        y = left_scale * right_scale * sum (a_q - a_zero)(b_q - b_zero)

    The sum is exact: in float32 where a bound shows that no partial sum leaves its exact integers, else in float64.

    Args:
        left, right: smallest and largest integer of each operand.
        output: grid of the result.
    """

    left_scale: Tensor
    left_zero_point: Tensor
    right_scale: Tensor
    right_zero_point: Tensor

    def __init__(self, left: list[int], right: list[int], output: Quantize | None = None) -> None:
        super().__init__(output)
        self.left, self.right = left, right
        for name in ("left", "right"):
            self.register_buffer(f"{name}_scale", torch.tensor(1.0))
            self.register_buffer(f"{name}_zero_point", torch.tensor(0, dtype=torch.int32))

    @classmethod
    def of(cls, left: Quantize, right: Quantize, output: Quantize | None) -> "IntegerMatmul":
        """The product of tensors on two grids."""
        layer = cls([left.quant_min, left.quant_max], [right.quant_min, right.quant_max], output)
        for name, grid in (("left", left), ("right", right)):
            layer.get_buffer(f"{name}_scale").copy_(grid.scale)
            layer.get_buffer(f"{name}_zero_point").copy_(grid.zero_point)
        return layer

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"left": self.left, "right": self.right}

    def accumulate(self, a_q: Tensor, b_q: Tensor) -> Tensor:
        """The sums, exact, in float32 or float64."""
        # an operand's distance from its zero point is at most the width of its grid
        widths = [high - low for low, high in (self.left, self.right)]
        dtype = torch.float32 if a_q.shape[-1] * widths[0] * widths[1] <= 2**24 else torch.float64
        return (a_q.to(dtype) - self.left_zero_point) @ (b_q.to(dtype) - self.right_zero_point)

    def forward(self, a_q: Tensor, b_q: Tensor) -> Tensor:
        """Integers of both grids -> integers of the output's grid, or float32."""
        return self.emit(self.accumulate(a_q, b_q).float() * (self.left_scale * self.right_scale))
