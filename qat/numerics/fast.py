"""The fast path of fake quantization: integers, rounded to nearest, with the clipped straight-through gradient.

The definition is `qat.numerics.affine`'s and the results are equal to the bit; only a scale's gradient is summed in
another order. One byte an element is kept for backward. Two forms do it: kernels compiled by Inductor
(`qat.numerics.kernels`), and cache-sized blocks of ordinary operations (`qat.numerics.blocks`) where no compiler is at
hand. What neither takes (small tensors, tensors with gaps in memory, scales that vary along two dimensions) is the
composed form's.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.numerics import blocks, kernels

SMALLEST = 2**15
"""Elements from which the compiled form pays for its call."""

SMALLEST_LEARNED = 2**14
"""The same where the scale is learned: there the composed form has more to do."""

SMALLEST_BLOCKED = 2**23
"""Elements from which blocks pay: where the composed form's intermediate results are fresh memory each time."""

NARROW = 64
"""Runs of fewer elements with one scale are taken together with their neighbours: short loops are slow."""

LONGEST = 4096
"""Longer runs with one scale are cut, so that their sums are of few terms, and threads can share them."""

MOST_ROWS = 16
"""Rows summed at a time where the scale varies along the row: as many as stay in the first cache."""


@dataclass(frozen=True)
class Layout:
    """A dense tensor in the order of memory, seen as [outer, channels, pieces, inner] with a scale for each channel.

    Attributes:
        form: of the kernels: `flat`, `rows` of `inner` values, or `cols` of `channels * inner`.
        outer, channels, pieces, inner: extents; `pieces` are the parts that long runs are cut into.
    """

    form: str
    outer: int
    channels: int
    pieces: int
    inner: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        if self.form == "flat":
            return (self.inner,)
        if self.form == "cols":
            return (self.outer, self.channels * self.inner)
        return (self.outer * self.channels * self.pieces, self.inner)

    @functools.cached_property
    def block(self) -> int:
        """The most rows, up to MOST_ROWS, that divide all; 1 where that leaves nothing to divide."""
        rows = min(MOST_ROWS, self.outer // 2)
        return next(n for n in range(max(rows, 1), 0, -1) if self.outer % n == 0)

    def spread(self, p: Tensor) -> Tensor:
        """One entry a scale, any shape -> what broadcasts against the values."""
        if self.form == "flat":
            return p.reshape(())
        if self.form == "cols":
            return p.reshape(-1, 1).expand(self.channels, self.inner).reshape(-1).contiguous()
        p = p.reshape(1, -1, 1).expand(self.outer, self.channels, self.pieces).reshape(-1).contiguous()
        return p.unsqueeze(1)

    def gather(self, p: Tensor) -> Tensor:
        """Sums of parts -> one entry a scale."""
        if self.form == "flat":
            return p.sum()
        if self.form == "cols":
            return p.sum(0).reshape(self.channels, self.inner).sum(1)
        return p.reshape(self.outer, self.channels, self.pieces).sum((0, 2))

    def view(self, x: Tensor) -> Tensor:
        """The values of a dense tensor, without a copy."""
        shape = self.shape
        return x.as_strided(shape, (shape[-1], 1)[-len(shape) :])


@functools.lru_cache(maxsize=4096)
def _layout(shape: torch.Size, stride: tuple[int, ...], scale: torch.Size) -> Layout | None:
    """None where `x` has gaps, or the scale varies along several dimensions or along one that `x` has not."""
    numel, channels = math.prod(shape), math.prod(scale)
    if numel == 0 or channels == 0 or not _dense(shape, stride):
        return None
    if channels == 1:
        if len(scale) > len(shape):
            return None
        pieces = _pieces(numel)
        return Layout("flat" if pieces == 1 else "rows", 1, 1, pieces, numel // pieces)
    axes = [axis - len(scale) for axis, extent in enumerate(scale) if extent > 1]
    if len(axes) > 1 or len(scale) > len(shape) or shape[axes[0]] != channels:
        return None
    inner = stride[axes[0]]
    outer = numel // (channels * inner)
    if inner == 1 or (inner < NARROW and outer >= 8):
        return Layout("cols", outer, channels, 1, inner)
    pieces = _pieces(inner)
    return Layout("rows", outer, channels, pieces, inner // pieces)


def _pieces(run: int) -> int:
    """How many equal parts a run is cut into; 1 where it is short, or has no divisor that gives fair ones."""
    return next((n for n in range(-(-run // LONGEST), run // 256 + 1) if run % n == 0), 1)


def _dense(shape: torch.Size, stride: tuple[int, ...]) -> bool:
    """Whether the elements fill a stretch of memory, each place once, in whatever order of dimensions."""
    expected = 1
    for step, extent in sorted((step, extent) for step, extent in zip(stride, shape, strict=True) if extent > 1):
        if step != expected:
            return False
        expected *= extent
    return True


def _form(x: Tensor, scale: Tensor, lsq: bool) -> tuple[str, Layout] | None:
    """("compiled" or "blocked", layout); None where neither can."""
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return None
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    layout = _layout(x.shape, x.stride(), scale.shape)
    if layout is None or x.numel() >= 2**31:  # the compiler may count in 32 bits
        return None
    one = layout.form != "flat" and 1 in (*layout.shape, layout.block if layout.form == "cols" else 2)
    if not one and kernels.available(lsq, layout.form, x):
        return "compiled", layout
    return ("blocked", layout) if x.device.type == "cpu" else None


def usable(x: Tensor, scale: Tensor, rounding: str) -> bool:
    """Whether `fake_quantize` takes these arguments, and pays.

    It takes dense tensors with one scale or with scales along one dimension, and pays for large ones.
    """
    if rounding != "nearest" or x.numel() < (SMALLEST_LEARNED if scale.requires_grad else SMALLEST):
        return False
    form = _form(x, scale, scale.requires_grad)
    return form is not None and (form[0] == "compiled" or x.numel() >= SMALLEST_BLOCKED)


@functools.cache
def _floor(relu: bool, device: torch.device) -> Tensor:
    """What a value must exceed for its gradient to pass; made once, as a copy to a GPU would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor([0.0 if relu else -torch.inf], dtype=torch.float32, device=device)


def _forward(
    ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, relu: bool, lsq: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, the byte an element, and the smallest and largest integer less the zero point."""
    chosen = _form(x, scale, lsq)
    if chosen is None:
        raise ValueError("no form takes these arguments: ask `usable` first")
    ctx.form, ctx.layout = form, layout = chosen
    ctx.x_like = (x.shape, x.stride())
    bottom, top = quant_min - zero_point, quant_max - zero_point
    if relu:
        bottom = bottom.clamp(min=0)
    values = layout.view(x)
    arguments = [layout.spread(p) for p in (scale, bottom, top)]
    if form == "compiled":
        name = "forward_lsq" if lsq else "forward_ste"
        y, code = kernels.run(name, layout.form, values, *arguments, _floor(relu, x.device))
    else:
        y, code = blocks.forward(_two(values), *(_two(p) for p in arguments), relu=relu, lsq=lsq)
    return y.as_strided(x.shape, x.stride()), code, bottom, top


def _two(t: Tensor) -> Tensor:
    """With two dimensions at least."""
    return t if t.dim() == 2 else t.reshape(1, -1)


def _in_order(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient in the memory order of the forward's input."""
    shape, stride = ctx.x_like
    if grad.stride() == stride:
        return grad
    return torch.empty_strided(shape, stride, dtype=grad.dtype, device=grad.device).copy_(grad)


class _FakeQuantize(torch.autograd.Function):
    """Keeps one byte an element: whether the gradient passes."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, relu):  # type: ignore[no-untyped-def]
        y, inside, *_ = _forward(ctx, x, scale, zero_point, quant_min, quant_max, relu, lsq=False)
        ctx.save_for_backward(inside)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        grad = _in_order(ctx, grad)
        values = grad.as_strided((grad.numel(),), (1,))
        if ctx.form == "compiled" or torch.is_grad_enabled():  # a second derivative: of the kernel as it is written
            (grad_x,) = kernels.run("backward_ste", "flat", values, inside.view(-1))
        else:
            grad_x = blocks.backward_ste(values, inside.view(-1))
        return grad_x.as_strided(*ctx.x_like), None, None, None, None, None


class _FakeQuantizeLSQ(torch.autograd.Function):
    """Keeps one byte an element, which is enough for both gradients: see `kernels.forward_lsq`."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, relu, grad_scale):  # type: ignore[no-untyped-def]
        y, code, *ends = _forward(ctx, x, scale, zero_point, quant_min, quant_max, relu, lsq=True)
        ctx.save_for_backward(code, *ends)
        ctx.scale_shape, ctx.grad_scale = scale.shape, grad_scale
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        code, *ends = ctx.saved_tensors
        layout = ctx.layout
        values = layout.view(_in_order(ctx, grad))
        below, above = (layout.spread(end) for end in ends)
        if ctx.form == "compiled" or torch.is_grad_enabled():  # a second derivative: of the kernel as it is written
            if layout.form == "cols":
                blocks_of = (-1, layout.block, values.shape[1])
                values, code = values.view(blocks_of), code.view(blocks_of)
            grad_x, total = kernels.run("backward_lsq", layout.form, values, code, below, above)
        else:
            grad_x, total = blocks.backward_lsq(_two(values), code, _two(below), _two(above))
        total = layout.gather(total).reshape(ctx.scale_shape)
        return grad_x.as_strided(*ctx.x_like), total * ctx.grad_scale, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    relu: bool = False,
    grad_scale: float | None = None,
) -> Tensor:
    """As `qat.numerics.fake_quantize.fake_quantize` with rounding to nearest, of tensors of any size.

    Raises:
        ValueError: `x` has gaps in memory or is empty, or the scale varies along several dimensions.
    """
    scale_ = scale if grad_scale is not None else scale.detach()
    if zero_point.shape != scale.shape:
        zero_point = zero_point.expand(scale.shape)
    if grad_scale is None:
        return _FakeQuantize.apply(x, scale_, zero_point, quant_min, quant_max, relu)
    return _FakeQuantizeLSQ.apply(x, scale_, zero_point, quant_min, quant_max, relu, grad_scale)
