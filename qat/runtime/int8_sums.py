"""Sums of integer layers as one product of int8 matrices (`torch._int_mm`), which a GPU has tensor cores for.

What CUDA asks of the operands (more than 16 rows, columns in multiples of 8, the second matrix stored by columns) is
met by zeros around them, which add nothing. It runs on a CPU, too, where tests compare it with the reference.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.runtime.accumulate import windows

OFFSET = 128
"""What is taken off integers from 0 to 255, so that they are int8."""

ROWS = 32
"""Fewer rows are filled up to this many: CUDA asks for more than 16."""


class Int8Sums:
    """`sum (x_q - x_zero) w_q` of a convolution without groups, or of a linear layer.

    Args:
        weight: int8, shape [out, in, *kernel], zero points 0.
        zero: the input's zero point.
        stride, dilation: per spatial dimension, padding as (before, after) pairs; none for a linear layer.
    """

    def __init__(
        self, weight: Tensor, zero: int, stride: Sequence[int], padding: Sequence[Sequence[int]],
        dilation: Sequence[int],
    ) -> None:  # fmt: skip
        self.kernel, self.zero = weight.shape[2:], zero
        self.stride, self.dilation = stride, dilation
        self.padding = [p for pair in reversed(padding) for p in pair]
        rows = weight.flatten(1)
        self.outputs, self.inputs = rows.shape
        self.weight = F.pad(rows, (0, -self.inputs % 8, 0, -self.outputs % 8)).t()  # by columns
        self.totals = rows.sum(1, dtype=torch.int32)

    def __call__(self, x_q: Tensor) -> Tensor:
        """uint8 or int8, [n, in, *spatial] or [..., in] -> int32, [n, out, *spatial] or [..., out]."""
        x, zero = x_q, self.zero
        if x.dtype is torch.uint8:
            x, zero = (x ^ OFFSET).view(torch.int8), zero - OFFSET
        if self.kernel:
            x = windows(F.pad(x, self.padding, value=zero), self.kernel, self.stride, self.dilation)
            x = x.movedim(1, len(self.kernel) + 1)  # [n, *out, in, *kernel]
        around = x.shape[: len(self.kernel) + 1] if self.kernel else x.shape[:-1]
        rows = x.reshape(-1, self.inputs)
        count = rows.shape[0]
        rows = F.pad(rows, (0, -self.inputs % 8, 0, max(ROWS - count, 0)))
        total = torch._int_mm(rows, self.weight)[:count, : self.outputs]
        total = (total - zero * self.totals).reshape(*around, self.outputs)
        return total.movedim(-1, 1) if self.kernel else total


@functools.cache
def multiplies_int8(device: torch.device) -> bool:
    """Whether `torch._int_mm` works on a device, and is exact at the ends of int8."""
    x = torch.full((ROWS, 64), -OFFSET, dtype=torch.int8, device=device)
    try:
        return bool((torch._int_mm(x, x[:8].t()) == 64 * OFFSET**2).all())
    except (RuntimeError, NotImplementedError):  # an older GPU, or a build of torch without it
        return False
