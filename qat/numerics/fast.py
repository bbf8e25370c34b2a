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
from qat.numerics.affine import SMALLEST_SCALE

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
        outer, channels, pieces, inner: extents; `pieces` are the parts that long runs are cut into (of `flat`, only
            to be summed: `strips`).
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
            return (self.pieces * self.inner,)
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
        if self.outer == self.pieces == 1:
            return p.reshape(-1, 1)
        return p.reshape(1, -1, 1).expand(self.outer, self.channels, self.pieces).reshape(-1).contiguous().unsqueeze(1)

    def gather(self, p: Tensor) -> Tensor:
        """Sums of parts -> one entry a scale."""
        if self.form == "flat":
            return p.sum()
        if self.form == "cols":
            return p.sum(0).reshape(self.channels, self.inner).sum(1)
        if self.outer == self.pieces == 1:
            return p
        return p.reshape(self.outer, self.channels, self.pieces).sum((0, 2))

    def view(self, x: Tensor) -> Tensor:
        """The values of a dense tensor, without a copy."""
        shape = self.shape
        return x.as_strided(shape, (shape[-1], 1)[-len(shape) :])

    def summed(self, *tensors: Tensor) -> tuple[str, tuple[Tensor, ...]]:
        """The form that sums the gradient of the scale, and values as it sees them."""
        if self.form == "flat" and self.pieces > 1:
            return "strips", tuple(t.view(self.pieces, self.inner) for t in tensors)
        if self.form == "cols":
            return "cols", tuple(t.view(-1, self.block, t.shape[1]) for t in tensors)
        return self.form, tensors


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
        return Layout("flat", 1, 1, pieces, numel // pieces)
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


@dataclass(frozen=True)
class Plan:
    """How tensors of one shape and order of memory are taken.

    Attributes:
        form: "compiled" or "blocked".
        layout: of the values.
        shape, stride: of the tensors.
        lsq: whether there is a gradient for the scale.
    """

    form: str
    layout: Layout
    shape: torch.Size
    stride: tuple[int, ...]
    lsq: bool

    def restore(self, values: Tensor) -> Tensor:
        """Inverse of `layout.view`."""
        return values.as_strided(self.shape, self.stride)

    def in_order(self, grad: Tensor) -> Tensor:
        """The gradient in the memory order of the forward's input."""
        if grad.stride() == self.stride:
            return grad
        return torch.empty_strided(self.shape, self.stride, dtype=grad.dtype, device=grad.device).copy_(grad)


def plan(x: Tensor, scale: torch.Size | tuple[int, ...], lsq: bool) -> Plan | None:
    """How `x` is taken, with a scale of a shape that broadcasts against it; None where neither form can."""
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling():
        return None
    return _plan(x.shape, x.stride(), x.dtype, x.device.type, scale, lsq, torch.get_num_threads(), kernels.switch())


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: str, scale: tuple[int, ...], lsq: bool,
    threads: int, switch: str,
) -> Plan | None:  # fmt: skip
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    layout = _layout(shape, stride, scale)
    if layout is None or math.prod(shape) >= 2**31:  # the compiler may count in 32 bits
        return None
    one = layout.form != "flat" and 1 in (*layout.shape, layout.block if layout.form == "cols" else 2)
    if not one and kernels.available(lsq, layout.form, dtype, device):
        return Plan("compiled", layout, shape, stride, lsq)
    return Plan("blocked", layout, shape, stride, lsq) if device == "cpu" else None


def pays(x: Tensor, taken: Plan | None) -> bool:
    """Whether a plan is worth its call: for large tensors."""
    if taken is None:
        return False
    if taken.form == "blocked":
        return x.numel() >= SMALLEST_BLOCKED
    return x.numel() >= (SMALLEST_LEARNED if taken.lsq else SMALLEST)


@functools.cache
def _floor(relu: bool, device: torch.device) -> Tensor:
    """What a value must exceed for its gradient to pass; made once, as a copy to a GPU would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor([0.0 if relu else -torch.inf], dtype=torch.float32, device=device)


def _forward(
    ctx: Any, x: Tensor, taken: Plan, scale: Tensor, bottom: Tensor, top: Tensor, relu: bool
) -> tuple[Tensor, Tensor]:
    """The result and the byte an element. Scale and ends are spread."""
    ctx.plan = taken
    values = taken.layout.view(x)
    if taken.form == "compiled":
        name = "forward_lsq" if taken.lsq else "forward_ste"
        y, code = kernels.run(name, taken.layout.form, values, scale, bottom, top, _floor(relu, x.device))
    else:
        y, code = blocks.forward(_two(values), *(_two(p) for p in (scale, bottom, top)), relu=relu, lsq=taken.lsq)
    return taken.restore(y), code


def _two(t: Tensor) -> Tensor:
    """With two dimensions at least."""
    return t if t.dim() == 2 else t.reshape(1, -1)


class _FakeQuantize(torch.autograd.Function):
    """Keeps one byte an element: whether the gradient passes."""

    @staticmethod
    def forward(ctx, x, taken, scale, bottom, top, relu):  # type: ignore[no-untyped-def]
        y, inside = _forward(ctx, x, taken, scale, bottom, top, relu)
        ctx.save_for_backward(inside)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        taken: Plan = ctx.plan
        values = taken.in_order(grad).as_strided((grad.numel(),), (1,))
        if taken.form == "compiled" or torch.is_grad_enabled():  # a second derivative: of the kernel as it is written
            (grad_x,) = kernels.run("backward_ste", "flat", values, inside.view(-1))
        else:
            grad_x = blocks.backward_ste(values, inside.view(-1))
        return taken.restore(grad_x), None, None, None, None, None


class _FakeQuantizeWhole(torch.autograd.Function):
    """Where nothing is clipped: keeps nothing, and passes the gradient on as it comes."""

    @staticmethod
    def forward(ctx, x, taken, scale, bottom, top):  # type: ignore[no-untyped-def]
        (y,) = kernels.run("forward_whole", taken.layout.form, taken.layout.view(x), scale, bottom, top)
        return taken.restore(y)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None, None, None, None


class _FakeQuantizeLSQ(torch.autograd.Function):
    """Keeps one byte an element, which is enough for both gradients: see `kernels.forward_lsq`."""

    @staticmethod
    def forward(ctx, x, taken, scale, bottom, top, relu, grad_scale):  # type: ignore[no-untyped-def]
        layout = taken.layout
        bottom, top = layout.spread(bottom), layout.spread(top)
        used = layout.spread(scale.abs().clamp(min=SMALLEST_SCALE))
        y, code = _forward(ctx, x, taken, used, bottom, top, relu)
        ctx.save_for_backward(code, scale, bottom, top)
        ctx.grad_scale = grad_scale
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        code, scale, below, above = ctx.saved_tensors
        taken: Plan = ctx.plan
        layout = taken.layout
        values = layout.view(taken.in_order(grad))
        if taken.form == "compiled" or torch.is_grad_enabled():  # a second derivative: of the kernel as it is written
            form, (values, code) = layout.summed(values, code)
            grad_x, total = kernels.run("backward_lsq", form, values, code, below, above)
        else:
            grad_x, total = blocks.backward_lsq(_two(values), code, _two(below), _two(above))
        total = layout.gather(total).reshape(scale.shape)
        grad_scale = total * (torch.sign(scale) * ctx.grad_scale)
        return taken.restore(grad_x), None, grad_scale, None, None, None, None


@functools.lru_cache(maxsize=1024)
def ends(quant_min: int, quant_max: int, relu: bool, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """The smallest and the largest integer less the zero point, where that is 0; made once."""
    with torch.inference_mode(False):
        bottom, top = (torch.full(shape, end, dtype=torch.float32, device=device) for end in (quant_min, quant_max))
        return bottom.clamp(min=0) if relu else bottom, top


@functools.cache
def constants(quant_min: int, quant_max: int, floor: float, momentum: float, device: torch.device) -> Tensor:
    """What `choose` and `follow` are told, made once (see `kernels.choose_symmetric`)."""
    with torch.inference_mode(False):
        return torch.tensor([quant_min, quant_max, floor, momentum], dtype=torch.float32, device=device)


@torch.no_grad()
def choose(low: Tensor, high: Tensor, constants: Tensor, symmetric: bool) -> tuple[Tensor, ...]:
    """Scale, zero point and ends for ranges [n]: `kernels.choose_symmetric`, or `choose_affine`."""
    return _call("choose_symmetric" if symmetric else "choose_affine", "ranges", low, high, constants)


@torch.no_grad()
def follow(
    low: Tensor, high: Tensor, average_low: Tensor, average_high: Tensor, constants: Tensor, symmetric: bool
) -> tuple[Tensor, ...]:
    """Averages, scale, zero point and ends, [1] each: `kernels.follow_symmetric`, or `follow_affine`."""
    name = "follow_symmetric" if symmetric else "follow_affine"
    return _call(name, "range", low, high, average_low, average_high, constants)


def _call(name: str, form: str, *args: Tensor) -> tuple[Tensor, ...]:
    """A kernel of ranges, as it is written where no compiler is at hand."""
    if args[0].dtype == torch.float32 and kernels.usable(((name, form),), device=args[0].device.type):
        return kernels.run(name, form, *args)
    return kernels.KERNELS[name, form](*args)


def take(x: Tensor, taken: Plan, scale: Tensor, bottom: Tensor, top: Tensor, relu: bool, whole: bool = False) -> Tensor:
    """Fake-quantize, given what the definition makes of the range.

    Args:
        x: the tensor that the plan was made for.
        taken: from `plan`.
        scale: > 0, of any shape with one entry a scale, and so are the next two.
        bottom, top: the smallest and largest integer, less the zero point; `bottom` is 0 or more behind a ReLU.
        relu: apply ReLU first.
        whole: nothing is clipped, as the range is that of `x`.
    """
    spread = taken.layout.spread
    if whole and kernels.usable((("forward_whole", taken.layout.form),), x.dtype, x.device.type):
        passed: Tensor = _FakeQuantizeWhole.apply(x, taken, spread(scale), spread(bottom), spread(top))
        return passed
    result: Tensor = _FakeQuantize.apply(x, taken, spread(scale), spread(bottom), spread(top), relu)
    return result


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    *,
    relu: bool = False,
    grad_scale: float | None = None,
    taken: Plan | None = None,
) -> Tensor:
    """As `qat.numerics.fake_quantize.fake_quantize` with rounding to nearest, of tensors of any size.

    Args:
        x, scale, quant_min, quant_max, relu, grad_scale: as there. Of a learned scale the magnitude counts.
        zero_point: None for 0.
        taken: the plan, where it is known; scale and zero point are of any shape then.

    Raises:
        ValueError: `x` has gaps in memory or is empty, or the scale varies along several dimensions.
    """
    taken = taken or plan(x, scale.shape, grad_scale is not None)
    if taken is None:
        raise ValueError("no form takes these arguments: ask `plan` first")
    if zero_point is None:
        bottom, top = ends(quant_min, quant_max, relu, scale.shape, scale.device)
    else:
        bottom, top = quant_min - zero_point, quant_max - zero_point
        bottom = bottom.clamp(min=0) if relu else bottom
        if zero_point.shape != scale.shape:
            bottom, top = bottom.expand(scale.shape), top.expand(scale.shape)
    if not taken.lsq:
        return take(x, taken, scale.detach(), bottom, top, relu)
    result: Tensor = _FakeQuantizeLSQ.apply(x, taken, scale, bottom, top, relu, grad_scale)
    return result
