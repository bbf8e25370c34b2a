"""Layers without any float: integers in, integer sums, and the next grid by a multiplier and a shift.

What a network is made of whose target has no floats (`qat.lower_fixed`). Each makes a `total`, which counts units that
lowering knows; the output grid (`Requantize`) turns it into the integers of the next layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.numerics.fixed_point import integer_sqrt, multiply
from qat.runtime.accumulate import windows
from qat.runtime.grid import Quantize
from qat.runtime.layers import IntegerConv, RuntimeLayer
from qat.runtime.matmul import IntegerMatmul

FRACTION = 16
"""Bits behind the point of a bias that lies between the integers of a sum: with 8 one value in 500 is at a tie."""


class FixedConv(IntegerConv):
    """`IntegerConv`, whose sum goes to the output grid without a float; the grid has a multiplier an output channel.

    `remainder` counts 2^-fraction of the sum's unit, and the sum then, too.

    Args:
        fraction: bits of the remainder behind the point; in files that do not say it, 8.
        settings: of `IntegerConv`.

    Raises:
        ValueError: a fraction that no sum has room for.
    """

    def __init__(self, fraction: int = 8, **settings: Any) -> None:
        if not 0 <= fraction < 32:
            raise ValueError(f"fraction={fraction} is not valid: give bits from 0 to 31")
        super().__init__(**settings)
        self.fraction = fraction
        if self.remainder is not None:
            self.remainder = torch.zeros(self.weight.shape[0], dtype=torch.int64)

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | ({} if self.remainder is None else {"fraction": self.fraction})

    def total(self, x_q: Tensor) -> Tensor:
        """The sum, bias included."""
        total = self.accumulate(x_q)
        if self.remainder is None:
            return total
        channels = (-1, *[1] * (self.weight.dim() - 2)) if self.weight.dim() > 2 else (-1,)
        return (total.long() << self.fraction) + self.remainder.reshape(channels)

    def forward(self, x_q: Tensor) -> Tensor:  # noqa: D102
        return self.emit(self.total(x_q))


class FixedMatmul(IntegerMatmul):
    """`IntegerMatmul`, whose sum goes to the output grid without a float."""

    reference = False

    def forward(self, a_q: Tensor, b_q: Tensor) -> Tensor:  # noqa: D102
        if not self.reference:
            return self.emit(self.accumulate(a_q, b_q).long())
        return self.emit((a_q.long() - self.left_zero_point) @ (b_q.long() - self.right_zero_point))


class FixedSum(RuntimeLayer):
    """Sum or difference of tensors on grids of their own.

        total = sum_i sign_i round((x_i - zero_i) 2^left multiplier_i 2^(shift_i - 31))

    Args:
        signs: 1 or -1 for each tensor.
        left: bits behind the point; 20 for 8-bit integers leaves room for the sum in an int32.
        output: grid of the result.

    Source: CMSIS-NN, `arm_elementwise_add_s8` (left shift 20), `arm_elementwise_add_s16` (15).
    """

    multiplier: Tensor
    shift: Tensor
    zero_point: Tensor

    def __init__(self, signs: list[int], left: int, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.signs, self.left = signs, left
        for name in ("multiplier", "shift", "zero_point"):
            self.register_buffer(name, torch.zeros(len(signs), dtype=torch.int32))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"signs": self.signs, "left": self.left}

    def forward(self, *tensors: Tensor) -> Tensor:  # noqa: D102
        total: Tensor | None = None
        for i, (x, sign) in enumerate(zip(tensors, self.signs, strict=True)):
            term = sign * multiply((x.long() - self.zero_point[i]) << self.left, self.multiplier[i], self.shift[i])
            total = term if total is None else total + term
        assert total is not None
        return self.emit(total)


class FixedProduct(RuntimeLayer):
    """Product of two tensors, value by value: `(a - a_zero)(b - b_zero)`."""

    zero_point: Tensor

    def __init__(self, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.register_buffer("zero_point", torch.zeros(2, dtype=torch.int32))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return self.emit((a.long() - self.zero_point[0]) * (b.long() - self.zero_point[1]))


class FixedAffine(RuntimeLayer):
    """`(x - zero) factor + offset` per channel (dimension 1), factor and offset integers."""

    factor: Tensor
    offset: Tensor
    zero_point: Tensor

    def __init__(self, channels: int, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.register_buffer("factor", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("offset", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"channels": self.factor.numel()}

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        shape = (-1, *[1] * (x.dim() - 2))
        return self.emit((x.long() - self.zero_point) * self.factor.reshape(shape) + self.offset.reshape(shape))

    def magnitude(self, x: Tensor) -> Tensor:
        """The sum of the magnitudes of both terms, on the output grid."""
        shape = (-1, *[1] * (x.dim() - 2))
        product = (x.long() - self.zero_point) * self.factor.reshape(shape)
        return self.emit(product.abs() + self.offset.reshape(shape).abs())


class FixedAverage(RuntimeLayer):
    """Average pooling: the sums of windows. Where windows differ in size, each sum counts for `common / size`.

    Args:
        kernel, stride, padding, ceil_mode, count_include_pad: as in `Average`.
        common: a multiple of the size of every window; None where all have the same.
        output: grid of the result.
    """

    zero_point: Tensor

    def __init__(
        self, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool, count_include_pad: bool,
        common: int | None = None, output: Quantize | None = None,
    ) -> None:  # fmt: skip
        super().__init__(output)
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.ceil_mode, self.count_include_pad, self.common = ceil_mode, count_include_pad, common
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {
            "kernel": self.kernel, "stride": self.stride, "padding": self.padding, "ceil_mode": self.ceil_mode,
            "count_include_pad": self.count_include_pad, "common": self.common,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        total = self._sums(x.long() - self.zero_point, 0)
        if self.common is None:
            return self.emit(total)
        ones = torch.ones(1, 1, *x.shape[2:], dtype=torch.int64, device=x.device)
        return self.emit(total * (self.common // self._sums(ones, int(self.count_include_pad))))

    def _sums(self, x: Tensor, padding_value: int) -> Tensor:
        """Sums of windows; padding counts as `padding_value`, what `ceil_mode` reaches beyond it as nothing."""
        around, beyond = list[int](), list[int]()
        for size, k, step, pad in zip(x.shape[2:], self.kernel, self.stride, self.padding, strict=True):
            positions = (size + 2 * pad - k + (step - 1 if self.ceil_mode else 0)) // step + 1
            if self.ceil_mode and (positions - 1) * step >= size + pad:  # a window starts inside input or left padding
                positions -= 1
            around = [pad, pad, *around]
            beyond = [0, max((positions - 1) * step + k - size - 2 * pad, 0), *beyond]
        x = F.pad(F.pad(x, around, value=padding_value), beyond)
        return windows(x, self.kernel, self.stride, [1] * len(self.kernel)).sum(dim=list(range(-len(self.kernel), 0)))


class FixedMean(RuntimeLayer):
    """Mean, or sum, over the dimensions `dims` of as many values as lowering saw.

    Args:
        dims, keepdim: as in `Mean`.
        count: values that are summed; the multiplier of the output grid divides by it. None for a sum.
        output: grid of the result.
    """

    zero_point: Tensor

    def __init__(self, dims: list[int], keepdim: bool, count: int | None, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.dims, self.keepdim, self.count = dims, keepdim, count
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"dims": self.dims, "keepdim": self.keepdim, "count": self.count}

    def forward(self, x: Tensor) -> Tensor:
        """Raises a ValueError for another number of values than `count`, by which the multiplier divides."""
        summed = 1
        for dim in self.dims:
            summed *= x.shape[dim]
        if self.count is not None and summed != self.count:
            raise ValueError(
                f"a mean of {summed} values: the multiplier divides by {self.count}, the number in the example inputs "
                f"that the network was prepared with; give inputs of that size, or prepare it with others"
            )
        return self.emit((x.long() - self.zero_point).sum(dim=self.dims, keepdim=self.keepdim))


class Table(RuntimeLayer):
    """Any function of one tensor, or what is looked up by an index: `table[x - low]`.

    Args:
        shape: of the table; entries of several values are rows.
        dtype: name of torch's type of its values.
        low: what stands for the first entry.
        output: grid of the values; None for a mask.
    """

    table: Tensor

    def __init__(self, shape: list[int], dtype: str, low: int, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.low = low
        self.register_buffer("table", torch.zeros(shape, dtype=getattr(torch, dtype)))

    @classmethod
    def of(cls, table: Tensor, low: int, output: Quantize | None) -> "Table":
        """A layer that holds `table`."""
        layer = cls(list(table.shape), str(table.dtype).removeprefix("torch."), low, output)
        layer.table.copy_(table)
        return layer

    def spec(self) -> dict[str, Any]:  # noqa: D102
        dtype = str(self.table.dtype).removeprefix("torch.")
        return super().spec() | {"shape": list(self.table.shape), "dtype": dtype, "low": self.low}

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.table[x.long() - self.low]


class FixedSoftmax(RuntimeLayer):
    """Softmax: exponentials from a table by the distance to the largest value, divided by their sum.

        e_i = powers[max(x) - x_i]          total_i = round(2^BITS e_i / sum e)

    Args:
        dim: the dimension.
        entries: of the table: one for each distance.
        masked: what does not count: `causal` (keys behind their query), or where a mask, the second input, is
            `false` or `true`; None where all counts. A row of which nothing counts becomes zeros.
        output: grid of the result.
    """

    BITS = 31
    powers: Tensor

    def __init__(self, dim: int, entries: int, masked: str | None = None, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.dim, self.masked = dim, masked
        self.register_buffer("powers", torch.zeros(entries, dtype=torch.int32))  # in units of 2^-30

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"dim": self.dim, "entries": self.powers.numel(), "masked": self.masked}

    def forward(self, x: Tensor, *mask: Tensor) -> Tensor:  # noqa: D102
        x = x.long()
        hidden = self._hidden(x, *mask)
        if hidden is None:
            e = self.powers[x.amax(self.dim, keepdim=True) - x].long()
        else:
            largest = x.masked_fill(hidden, torch.iinfo(torch.int32).min).amax(self.dim, keepdim=True)
            places = (largest - x).clamp(0, self.powers.numel() - 1)
            e = self.powers[places].long().masked_fill(hidden, 0)
        summed = e.sum(self.dim, keepdim=True).clamp(min=1)
        return self.emit(((e << self.BITS) + (summed >> 1)).div(summed, rounding_mode="floor"))

    def _hidden(self, x: Tensor, *mask: Tensor) -> Tensor | None:
        """Where values do not count."""
        if self.masked is None:
            return None
        if self.masked == "causal":
            return torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        given = mask[0].reshape(x.shape) if mask[0].dim() == 3 and x.dim() == 4 else mask[0]
        return given.bool() if self.masked == "true" else ~given.bool()


class FixedNorm(RuntimeLayer):
    """LayerNorm, RMSNorm, GroupNorm: deviations divided by an integer square root, then factor and offset.

        d_i = n x_i - sum x  (RMSNorm: n (x_i - zero))          root = isqrt(4^left (sum d^2 // n) + epsilon)
        v_i = round(2^(left + BITS) d_i / root)          total_i = (v_i factor_i + offset_i) / 2^BITS

    Args:
        groups: of channels (dimension 1) that share statistics; None for statistics over the last dimensions.
        shape: of factor and offset: the last dimensions, or the channels.
        centred: whether the mean is taken away.
        left: bits of the root behind the point.
        output: grid of the result.

    Source: Kim et al. 2021, "I-BERT", section 3.6 (the integer square root).
    """

    BITS = 16
    factor: Tensor
    offset: Tensor
    epsilon: Tensor
    zero_point: Tensor

    def __init__(
        self, groups: int | None, shape: list[int], centred: bool, left: int, output: Quantize | None = None
    ) -> None:  # fmt: skip
        super().__init__(output)
        self.groups, self.shape, self.centred, self.left = groups, shape, centred, left
        self.register_buffer("factor", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("offset", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("epsilon", torch.zeros((), dtype=torch.int64))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {
            "groups": self.groups, "shape": self.shape, "centred": self.centred, "left": self.left
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        c = x.long() - self.zero_point
        rows = c.reshape(x.shape[0], self.groups, -1) if self.groups else c.flatten(x.dim() - len(self.shape))
        n = rows.shape[-1]
        d = n * rows - (rows.sum(-1, keepdim=True) if self.centred else 0)
        variance = (d * d).sum(-1, keepdim=True).div(n, rounding_mode="floor")
        root = integer_sqrt((variance << 2 * self.left) + self.epsilon).clamp(min=1)
        v = ((d << self.left + self.BITS) + (root >> 1)).div(root, rounding_mode="floor").reshape(x.shape)
        columns = (-1, *[1] * (x.dim() - 2)) if self.groups else self.shape
        total = v * self.factor.reshape(columns) + self.offset.reshape(columns)
        return self.emit((total + 2 ** (self.BITS - 1)) >> self.BITS)
