"""torch's integer kernels for x86: which layers they compute exactly, and those layers as calls of them.

Two families, both with int32 sums: those on quantized tensors (`torch.ops.quantized`, FBGEMM and oneDNN), which take
the least time a call, and those on plain uint8 tensors (`torch.ops.onednn`), which torch.compile can have in its graph.
Kernels take uint8 inputs and int8 weights. Integers of a signed grid are stored from 0 on, so of few bits with little
added: kernels scale, and so round, what that adds to a sum apart from it.

**Exactness.** Without VNNI instructions x86 adds pairs of products in 16 bits, which 255 * 127 * 2 overflows. FBGEMM's
depthwise kernels do so with VNNI, too (measured: 63 steps off where inputs saturate). So a layer is given to a kernel
if its weights have at most 7 bits, or if the machine was seen to add such products exactly (`exact_products`).
Depthwise layers go to oneDNN, and with VNNI all do (`fast_onednn`): a convolution of ResNet-20 at batch 64 took 0.23 ms
instead of 0.82. What the kernels do differently is the last step: they multiply by `s_x s_w / s_y` where
the reference multiplies by `s_x s_w` and divides by `s_y`, and so does their addition; a value next to a tie may be
rounded to the other neighbour, one step away.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from types import NoneType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.runtime.accumulate import EXACT_FLOAT32
from qat.runtime.grid import Quantize
from qat.runtime.layers import IntegerConv

FORMATS = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
"""Memory formats of images, by number of dimensions: what kernels read and return without a copy."""

CONV = {1: ("conv1d_prepack", "conv1d", "default"), 2: ("conv2d_prepack", "conv2d", "new"),
        3: ("conv3d_prepack", "conv3d", "new")}  # fmt: skip
"""Spatial dimensions -> torch's function that packs weights, and its convolution."""


def offset(grid: Quantize) -> int:
    """What is added to integers of a grid to store them as uint8."""
    return -grid.quant_min if grid.dtype is torch.int8 else 0


def is_8_bit(grid: Quantize | None) -> bool:
    """Whether a tensor on this grid is stored in one byte."""
    return grid is not None and grid.dtype in (torch.uint8, torch.int8)


def unsigned(x_q: Tensor, offset: int) -> Tensor:
    """int8 -> uint8, the offset of its grid added; uint8 as it is."""
    return x_q.view(torch.uint8) + offset if x_q.dtype is torch.int8 else x_q


def signed(x: Tensor, grid: Quantize) -> Tensor:
    """The inverse of `unsigned`, for a grid."""
    return (x - offset(grid)).view(torch.int8) if grid.dtype is torch.int8 else x


def available(engine: str) -> bool:
    """Whether this build of torch has the engine's kernels, on x86."""
    return engine in torch.backends.quantized.supported_engines and torch.cpu.get_capabilities().get("avx2", False)


@contextlib.contextmanager
def using(engine: str) -> Iterator[None]:
    """Weights are packed for `engine`; torch's notice that quantized tensors will go one day is kept from users."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor, .* are deprecated")
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


@functools.cache
def exact_products(engine: str) -> bool:
    """Whether this machine's kernels add products of 8-bit integers exactly: two of 255 * 127 exceed 16 bits."""
    if not available(engine):
        return False
    with using(engine):
        x = torch._make_per_tensor_quantized_tensor(torch.full((1, 64), 255, dtype=torch.uint8), 1.0, 0)
        weight = torch.full((16, 64), 127, dtype=torch.int8)
        packed = torch.ops.quantized.linear_prepack(per_channel(weight, torch.ones(16)), None)
        total = torch.ops.quantized.linear(x, packed, 255.0 * 127 * 64 / 200, 0).int_repr()
        image = torch._make_per_tensor_quantized_tensor(torch.full((1, 16, 4, 4), 255, dtype=torch.uint8), 1.0, 0)
        kernel = per_channel(torch.full((16, 16, 1, 1), 127, dtype=torch.int8), torch.ones(16))
        packed = torch.ops.quantized.conv2d_prepack(kernel, None, [1, 1], [0, 0], [1, 1], 1)
        sums = torch.ops.quantized.conv2d.new(image, packed, 255.0 * 127 * 16 / 200, 0).int_repr()
    return bool((total == 200).all() and (sums == 200).all())


@functools.cache
def fast_onednn() -> bool:
    """Whether oneDNN's kernels are the faster ones: where VNNI instructions multiply bytes, by three times."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_vnni", "avx_vnni")) and available("onednn")


def per_channel(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 weights with a scale for each of the first dimension, as a quantized tensor."""
    zeros = torch.zeros(len(scale), dtype=torch.long)
    return torch._make_per_channel_quantized_tensor(weight.contiguous(), scale.double(), zeros, 0)


def engine_of(layer: IntegerConv, plain: bool = False) -> str | None:
    """Which kernels compute the layer's sums exactly, `plain` for those on plain tensors; None if none do.

    None has weights with zero points, transposed convolutions, unequal padding or inputs beyond 8 bits, nor sums that
    could leave an int32.
    """
    low, high = layer.input_bounds
    if type(layer) is not IntegerConv or type(layer.output) not in (Quantize, NoneType):  # fixed point rounds otherwise
        return None
    if layer.remainder is not None or layer.output_padding is not None or layer.weight.dtype is not torch.int8:
        return None
    if low < -128 or high > 255 or (low < 0 and high >= 128) or bool(layer.weight_zero_point.any()):
        return None
    if layer.weight.dim() > 5 or any(before != after for before, after in layer.padding):
        return None
    magnitudes = layer.weight.flatten(1).long().abs()
    if int((magnitudes.sum(1) * 255 + layer.bias.long().abs()).max()) >= 2**31:
        return None
    depthwise = layer.groups > 1 and layer.weight.shape[1] == 1
    engine = "onednn" if depthwise or plain or fast_onednn() else "fbgemm"
    return engine if exact_products(engine) or (available(engine) and int(magnitudes.max()) <= 64) else None


def real_bias(layer: IntegerConv) -> Tensor:
    """The bias as real numbers, float32."""
    return (layer.bias.double() * layer.weight_scale.double() * layer.input_scale.double()).float()


def narrowed(grid: Quantize) -> tuple[int, int] | None:
    """Bounds of a grid in uint8, with its ReLU; None if they are those of uint8."""
    add = offset(grid)
    low = max(grid.quant_min, int(grid.zero_point)) if grid.relu else grid.quant_min
    return None if (low + add, grid.quant_max + add) == (0, 255) else (low + add, grid.quant_max + add)


def wrap(x_q: Tensor, grid: Quantize) -> Tensor:
    """Integers of a grid -> quantized tensor."""
    x, scale, zero_point = unsigned(x_q, offset(grid)), float(grid.scale), int(grid.zero_point) + offset(grid)
    x = x.contiguous(memory_format=FORMATS.get(x.dim(), torch.contiguous_format))
    return torch._make_per_tensor_quantized_tensor(x, scale, zero_point)


def clamped(kernel: Callable[..., Tensor], grid: Quantize) -> Callable[..., Tensor]:
    """`kernel`, whose results are clamped to a grid that is narrower than its bytes."""
    bounds = narrowed(grid)
    if bounds is None:
        return kernel
    scale, zero = float(grid.scale), int(grid.zero_point) + offset(grid)
    low, high = ((bound - zero) * scale for bound in bounds)
    return lambda *x: torch.clamp(kernel(*x), low, high)


def convolution(layer: IntegerConv, engine: str) -> Callable[[Tensor], Tensor]:
    """Quantized tensor -> quantized tensor on the layer's grid, by weights packed once."""
    grid = layer.output
    assert grid is not None
    scale, zero = float(grid.scale), int(grid.zero_point) + offset(grid)
    dims = layer.weight.dim() - 2
    with using(engine):
        weight = per_channel(layer.weight, layer.weight_scale)
        if dims == 0:
            packed, op = (
                torch.ops.quantized.linear_prepack(weight, real_bias(layer)),
                torch.ops.quantized.linear.default,
            )
        else:
            prepack, name, overload = CONV[dims]
            geometry = (layer.stride, [before for before, _ in layer.padding], layer.dilation, layer.groups)
            packed = getattr(torch.ops.quantized, prepack)(weight, real_bias(layer), *geometry)
            op = getattr(getattr(torch.ops.quantized, name), overload)
    return clamped(lambda x: op(x, packed, scale, zero), grid)


class Kernel:
    """A convolution or linear layer by oneDNN on plain uint8 tensors: sums in int32, the result scaled in float32.

    Zero points go into the bias, so that the kernel has none to make up for at each call; padding is then by hand.
    A linear layer is the convolution of an image of one column (Inductor knows `qlinear_pointwise` with frozen weights
    only).
    """

    def __init__(self, layer: IntegerConv) -> None:
        self.output, self.dims = layer.output, layer.weight.dim() - 2
        self.offset = max(-layer.input_bounds[0], 0)
        zero = int(layer.input_zero_point) + self.offset
        # sums beyond 2^24 are no float32: where zero points make such sums, the kernel takes them off in int32
        reach = layer.weight.flatten(1).double().abs().sum(1) * 255
        within = bool(reach.max() < EXACT_FLOAT32)
        self.zero, self.kernel_zero = (zero, 0) if within else (0, zero)
        weight = layer.weight if self.dims else layer.weight[:, :, None, None]
        padding = [before for before, _ in layer.padding] if self.dims else [0, 0]
        self.around = [p for before in reversed(padding) for p in (before, before)] if self.zero else []
        stride, dilation = (layer.stride, layer.dilation) if self.dims else ([1, 1], [1, 1])
        self.geometry = (stride, [0] * len(padding) if self.zero else padding, dilation, layer.groups)
        self.input_scale, self.scale = float(layer.input_scale), layer.weight_scale.clone()
        self.zeros = torch.zeros(len(self.scale), dtype=torch.int32)
        bias = layer.bias.double() - self.zero * layer.weight.flatten(1).long().sum(1).double()
        # real results, which no grid rounds, are of whole sums: a scaled bias is rounded, zero points and all
        on_bytes = is_8_bit(layer.output)
        self.unit = None
        if not on_bytes and bool((reach + bias.abs()).max() < EXACT_FLOAT32):
            self.unit = (self.scale.double() * self.input_scale).float().reshape(-1, *[1] * self.dims)
            self.input_scale, self.scale = 1.0, torch.ones_like(self.scale)
        self.bias = (bias * self.scale.double() * self.input_scale).float()
        self.weight = torch.ops.onednn.qconv_prepack(
            weight, self.scale, self.input_scale, self.kernel_zero, *self.geometry, None
        )
        self.form: tuple[float, int, torch.dtype] = (1.0, 0, torch.float32)
        self.bounds, grid = None, self.output
        if on_bytes:
            assert grid is not None
            self.bounds = narrowed(grid)
            self.form = (float(grid.scale), int(grid.zero_point) + offset(grid), torch.uint8)

    def __call__(self, x_q: Tensor) -> Tensor:
        """Integers of the input's grid -> integers of the output's grid, or float32."""
        x = unsigned(x_q, self.offset)
        if self.dims == 0:
            x = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)
        elif any(self.around):
            x = F.pad(x, self.around, value=self.zero)
        y = torch.ops.onednn.qconv_pointwise.default(
            x.contiguous(memory_format=FORMATS[x.dim()]), self.input_scale, self.kernel_zero,
            self.weight, self.scale, self.zeros, self.bias, *self.geometry, *self.form, "none", [], "",
        )  # fmt: skip
        if self.dims == 0:
            y = y.permute(0, 2, 3, 1).reshape(*x_q.shape[:-1], y.shape[1])
        if y.dtype is torch.float32:
            y = y if self.unit is None else y * self.unit
            return y if self.output is None else self.output(y)
        assert self.output is not None
        return signed(y if self.bounds is None else y.clamp(*self.bounds), self.output)


def addition(grid: Quantize) -> Callable[[Tensor, Tensor], Tensor]:
    """Two quantized tensors, broadcast -> their sum on the grid."""
    scale, zero = float(grid.scale), int(grid.zero_point) + offset(grid)

    def add(a: Tensor, b: Tensor) -> Tensor:
        a, b = (a, b) if a.shape == b.shape else torch.broadcast_tensors(a, b)
        return torch.ops.quantized.add.default(a, b, scale, zero)

    return clamped(add, grid)


def kernel_of(layer: nn.Module) -> Kernel | None:
    """The layer by oneDNN on plain integers; None where that is not exact."""
    if not isinstance(layer, IntegerConv) or engine_of(layer, plain=True) is None:
        return None
    return Kernel(layer)
