"""Layers of an integer network. Each takes and returns tensors of its grid's integer dtype (or float32 at the edges).

A layer's numbers are buffers; what else it needs is `spec()`, plain data from which an equal layer is built. Together
they are the exported checkpoint.
"""

import math
import operator
from collections.abc import Callable
from typing import Any, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.numerics.granularity import from_rows, rows_of, swap_channels
from qat.runtime.accumulate import centred, exact_dtype, folded_bias, reference_conv, reference_conv_transpose
from qat.runtime.grid import Quantize, storage_dtype
from qat.runtime.int8_sums import Int8Sums, multiplies_int8

T = TypeVar("T")


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[list[int]], dilation: list[int],
    groups: int, output_padding: list[int] | None = None,
) -> Tensor:  # fmt: skip
    """Convolution or, for a weight of two dimensions, linear layer, in the dtype of its arguments; pads with zeros.

    With `output_padding` a transposed convolution, by a weight that has its output channels first all the same.
    """
    dims = weight.dim() - 2
    if dims == 0:
        return F.linear(x, weight, bias)
    before = [pair[0] for pair in padding]
    if output_padding is not None:
        transposed = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
        return transposed(x, swap_channels(weight, groups), bias, stride, before, output_padding, groups, dilation)
    if before != [pair[1] for pair in padding]:
        x, before = F.pad(x, [p for pair in reversed(padding) for p in pair]), [0] * dims
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    return conv(x, weight, bias, stride, before, dilation, groups)


class RuntimeLayer(nn.Module):
    """Base. `output` is the grid of the result; None leaves it float."""

    output: Quantize | None

    def __init__(self, output: Quantize | None = None) -> None:
        super().__init__()
        self.output = output

    def emit(self, y: Tensor) -> Tensor:
        """The result on the output grid."""
        return y if self.output is None else self.output(y)

    def spec(self) -> dict[str, Any]:
        """Plain data from which `from_spec` builds an equal layer (numbers apart)."""
        return {"output": None if self.output is None else self.output.spec()}

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> Self:
        """Build a layer with empty buffers; `load_state_dict` fills them."""
        grids: dict[str, Any] = {
            k: None if spec[k] is None else Quantize.from_spec(spec[k]) for k in ("output", "grid") if k in spec
        }
        return cls(**{**spec, **grids})


class IntegerConv(RuntimeLayer):
    """Convolution or linear layer on integers, BatchNorm folded in.

        y = input_scale * weight_scale * (sum (x_q - x_zero)(w_q - w_zero) + bias)

    The sum and the bias are int32 (int64 for 16-bit inputs); `reference` selects the readable int32 computation instead
    of the fast one; both give the same integers.

    Args:
        weight_shape: [out, in / groups, *kernel]; a linear layer has no kernel and takes inputs [..., in].
        weight_bounds: smallest and largest weight integer.
        input_bounds: smallest and largest input integer.
        stride, padding, dilation: per spatial dimension, padding as (before, after) pairs.
        groups: as in `nn.Conv2d`.
        output_padding: of a transposed convolution, per spatial dimension; None for a convolution.
        weight_step: distance of neighbouring weight integers (2 for binary weights).
        output: grid of the result.
        remainder: whether a part of the bias is added in float, as it lies between the integers: of a layer that is
            called with inputs of several scales.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor
    remainder: Tensor | None
    input_scale: Tensor
    input_zero_point: Tensor
    reference = False

    def __init__(
        self, weight_shape: list[int], weight_bounds: list[int], input_bounds: list[int],
        stride: list[int] | None = None, padding: list[list[int]] | None = None, dilation: list[int] | None = None,
        groups: int = 1, weight_step: int = 1, output: Quantize | None = None, output_padding: list[int] | None = None,
        remainder: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(output)
        dims = len(weight_shape) - 2
        self.register_buffer("remainder", torch.zeros(weight_shape[0]) if remainder else None)
        self.weight_bounds, self.input_bounds, self.groups = weight_bounds, input_bounds, groups
        self.weight_step = weight_step
        self.stride, self.dilation = stride or [1] * dims, dilation or [1] * dims
        self.padding, self.output_padding = padding or [[0, 0]] * dims, output_padding
        out = weight_shape[0]
        dtype = torch.uint8 if weight_bounds[0] >= 0 else torch.int8
        self.register_buffer("weight", torch.zeros(weight_shape, dtype=dtype))
        self.register_buffer("weight_scale", torch.ones(out))
        self.register_buffer("weight_zero_point", torch.zeros(out, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out, dtype=torch.int64 if input_bounds[1] > 255 else torch.int32))
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero_point", torch.zeros((), dtype=torch.int32))
        # int32 unless so many inputs, all at the end of their grid, could leave it
        span = (input_bounds[1] - input_bounds[0]) * (weight_bounds[1] - weight_bounds[0])
        self._sums = torch.int64 if math.prod(weight_shape[1:]) * span >= 2**30 else self.bias.dtype
        self._made: dict[str, tuple[list[Tensor], list[int], Any]] = {}  # tensors, versions, what they made

    def _once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` returns, computed again only if a number of the layer has changed since."""
        tensors = [self.weight, self.weight_zero_point, self.input_zero_point, self.bias]
        versions = [0 if x.is_inference() else x._version for x in tensors]  # those cannot be edited
        if name in self._made:
            before, then, result = self._made[name]
            if then == versions and all(map(operator.is_, before, tensors)):
                return cast(T, result)
        result = make()
        self._made[name] = (tensors, versions, result)
        return result

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": {}}

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {
            "weight_shape": list(self.weight.shape), "weight_bounds": self.weight_bounds,
            "input_bounds": self.input_bounds, "stride": self.stride, "padding": self.padding,
            "dilation": self.dilation, "groups": self.groups, "weight_step": self.weight_step,
            "output_padding": self.output_padding, **({} if self.remainder is None else {"remainder": True}),
        }  # fmt: skip

    def accumulate(self, x_q: Tensor) -> Tensor:
        """The integers before scaling, bias included: int32 or int64, channels second (last for a linear layer)."""
        dims = self.weight.dim() - 2
        if self.reference:
            zero = int(self.input_zero_point)
            weight = self.weight if dims else self.weight.unsqueeze(2)
            x = x_q if dims else x_q.reshape(-1, x_q.shape[-1], 1)
            geometry = (self.stride, self.padding, self.dilation) if dims else ([1], [[0, 0]], [1])
            bias = self._once("bias", lambda: folded_bias(self._bias(), weight, zero, self.weight_zero_point))
            arguments = (x, weight, zero, self.weight_zero_point, *geometry, self.groups)
            if self.output_padding is not None:
                return reference_conv_transpose(*arguments, self.output_padding, bias)
            total = reference_conv(*arguments, bias)
            return total if dims else total.reshape(*x_q.shape[:-1], -1)
        if self.weight.is_cuda and not torch.compiler.is_compiling():
            sums = self._once("int8", self.int8_sums)
            if sums is not None:
                return self._bias().reshape(-1, *[1] * dims) + sums(x_q)
        weight, x_zero = self._fast_form()
        total = convolve(
            centred(x_q, x_zero, weight.dtype), weight, None, self.stride, self.padding, self.dilation, self.groups,
            self.output_padding,
        )  # fmt: skip
        return self._bias().reshape(-1, *[1] * dims) + total.to(self._sums)

    def int8_sums(self) -> Int8Sums | None:
        """The layer as a product of int8 matrices; None where that is not exact, or where floats are better.

        A convolution becomes a matrix with a row a position, several times its input: that is worth it where its sums
        would need float64, or where a position has one input.
        """
        low, high = self.input_bounds
        fits = self.weight.dtype is torch.int8 and low >= -128 and high <= 255 and (low >= 0 or high <= 127)
        if not fits or self.groups > 1 or self.output_padding is not None or self._sums is not torch.int32:
            return None
        if bool(self.weight_zero_point.any()) or not multiplies_int8(self.weight.device):
            return None
        if math.prod(self.weight.shape[2:]) > 1 and self._fast_form()[0].dtype is torch.float32:
            return None
        return Int8Sums(self.weight, int(self.input_zero_point), self.stride, self.padding, self.dilation)

    def _bias(self) -> Tensor:
        return self.bias.to(self._sums)

    def _fast_form(self) -> tuple[Tensor, int | Tensor]:
        """`w_q - w_zero` in the float dtype that holds every sum exactly, and the input's zero point.

        Made once per set of numbers. While torch.export or torch.compile traces, numbers cannot be read: what the last
        call has made is used, and float64, which holds the sums of any weights, for a layer that has not run yet.
        """
        if torch.compiler.is_compiling():
            if "fast" in self._made and self._made["fast"][2][0].device == self.weight.device:
                made: tuple[Tensor, int] = self._made["fast"][2]
                return made
            return self._centred_weight(torch.float64), self.input_zero_point.double()
        return self._once("fast", self._exact_form)

    def _exact_form(self) -> tuple[Tensor, int]:
        zero = int(self.input_zero_point)
        largest = max(self.input_bounds[1] - zero, zero - self.input_bounds[0])
        return self._centred_weight(exact_dtype(self.weight, self.weight_zero_point, largest)), zero

    def _centred_weight(self, dtype: torch.dtype) -> Tensor:
        w_zero = self.weight_zero_point.to(dtype).reshape(-1, *[1] * (self.weight.dim() - 1))
        return self.weight.to(dtype) - w_zero

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._made = {}

    def forward(self, x_q: Tensor) -> Tensor:
        """Integers of the input's grid -> integers of the output's grid, or float32."""
        channels = (-1, *[1] * (self.weight.dim() - 2)) if self.weight.dim() > 2 else (-1,)
        y = self.accumulate(x_q).float() * (self.input_scale * self.weight_scale).reshape(channels)
        return self.emit(y if self.remainder is None else y + self.remainder.reshape(channels))


class FloatConv(RuntimeLayer):
    """Convolution or linear layer computed in float: float weights, or integer weights that are dequantized once.

    Holds weight-only schemes (4-bit groups with float activations, say) and layers that stay float.

    Args:
        weight_shape, stride, padding, dilation, groups, output_padding: as in `IntegerConv`.
        weight_bounds: smallest and largest weight integer; None for float weights.
        group_size: inputs that share a scale; None for one scale an output channel.
        output: grid of the result.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor

    def __init__(
        self, weight_shape: list[int], weight_bounds: list[int] | None = None, group_size: int | None = None,
        stride: list[int] | None = None, padding: list[list[int]] | None = None, dilation: list[int] | None = None,
        groups: int = 1, weight_step: int = 1, output: Quantize | None = None, output_padding: list[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(output)
        dims = len(weight_shape) - 2
        self.weight_bounds, self.group_size, self.groups = weight_bounds, group_size, groups
        self.weight_step = weight_step
        self.stride, self.dilation = stride or [1] * dims, dilation or [1] * dims
        self.padding, self.output_padding = padding or [[0, 0]] * dims, output_padding
        out = weight_shape[0]
        if weight_bounds is None:
            self.register_buffer("weight", torch.zeros(weight_shape))
        else:
            weight = torch.zeros(weight_shape, dtype=storage_dtype(*weight_bounds))
            groups_a_row = 1 if group_size is None else -(-math.prod(weight_shape[1:]) // group_size)
            shape = (out,) if group_size is None else (out, groups_a_row)
            self.register_buffer("weight", weight)
            self.register_buffer("weight_scale", torch.ones(shape))
            self.register_buffer("weight_zero_point", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {
            "weight_shape": list(self.weight.shape), "weight_bounds": self.weight_bounds,
            "group_size": self.group_size, "stride": self.stride, "padding": self.padding,
            "dilation": self.dilation, "groups": self.groups, "weight_step": self.weight_step,
            "output_padding": self.output_padding,
        }  # fmt: skip

    def float_weight(self) -> Tensor:
        """The weight as float32."""
        if self.weight_bounds is None:
            return self.weight
        rows = rows_of(self.weight, self.group_size).float()
        rows = (rows - self.weight_zero_point.reshape(-1, 1)) * self.weight_scale.reshape(-1, 1)
        return from_rows(rows, self.weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        """float32 -> float32, or integers of the output's grid."""
        weight = self.float_weight()
        geometry = (self.stride, self.padding, self.dilation, self.groups, self.output_padding)
        return self.emit(convolve(x, weight, self.bias, *geometry))
