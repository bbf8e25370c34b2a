"""The fast path of fake quantization: integers, rounded to nearest, with the clipped straight-through gradient.

The definition is `qat.numerics.affine`'s and the results are equal to the bit; only a scale's gradient is summed in
another order. One byte an element is kept for backward, or a bit in C++ with a range that is not learned. Three forms
do it: C++ on CPUs (`qat.numerics.native`), kernels compiled by Inductor on other devices (`qat.numerics.kernels`), and
cache-sized blocks of ordinary operations (`qat.numerics.blocks`) on CPUs where no compiler is at hand. What none takes
(tensors with gaps in memory, scales that vary along two dimensions, and for the latter two forms small tensors) is the
composed form's.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.numerics import blocks, kernels, native
from qat.numerics.affine import SMALLEST_SCALE
from qat.numerics.codes import Codes, attach
from qat.numerics.order import Layout, layout_of

SMALLEST_EXACT = 2**12
"""Elements from which C++ takes tensors with a learned scale: of fewer, no rounding residual has to fit in a byte."""

SMALLEST = 2**15
"""Elements from which what Inductor compiles pays for its call."""

SMALLEST_LEARNED = 2**14
"""The same where the scale is learned: there the composed form has more to do."""

SMALLEST_BLOCKED = 2**23
"""Elements from which blocks pay: where the composed form's intermediate results are fresh memory each time."""


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels take."""


@dataclass(frozen=True)
class Plan:
    """How tensors of one shape and order of memory are taken.

    Attributes:
        form: "native", "compiled" or "blocked".
        layout: of the values.
        shape, stride: of the tensors.
        lsq: whether there is a gradient for the scale.
    """

    form: str
    layout: Layout
    shape: torch.Size
    stride: tuple[int, ...]
    lsq: bool

    @property
    def inner(self) -> int:
        """How many neighbours in memory have one scale."""
        return self.layout.pieces * self.layout.inner

    def restore(self, values: Tensor) -> Tensor:
        """Inverse of `layout.view`."""
        return values.as_strided(self.shape, self.stride)

    def in_order(self, grad: Tensor) -> Tensor:
        """The gradient in the memory order of the forward's input."""
        if grad.stride() == self.stride:
            return grad
        return torch.empty_strided(self.shape, self.stride, dtype=grad.dtype, device=grad.device).copy_(grad)


def transformed() -> bool:
    """Whether `torch.func` transforms what runs now: its tensors have no memory that a kernel could read."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def plan(x: Tensor, scale: torch.Size | tuple[int, ...], lsq: bool) -> Plan | None:
    """How `x` is taken, with a scale of a shape that broadcasts against it; None where neither form can."""
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or transformed():
        return None
    return _plan(x.shape, x.stride(), x.dtype, x.device.type, scale, lsq, torch.get_num_threads(), kernels.switch())


@functools.lru_cache(maxsize=4096)
def _plan(
    shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: str, scale: tuple[int, ...], lsq: bool,
    threads: int, switch: str,
) -> Plan | None:  # fmt: skip
    if dtype not in DTYPES:
        return None
    layout = layout_of(shape, stride, scale)
    if layout is None or math.prod(shape) >= 2**31:  # the compiler may count in 32 bits
        return None
    if device == "cpu" and switch == "on" and native.module() is not None:
        return Plan("native", layout, shape, stride, lsq)
    one = layout.form != "flat" and 1 in (*layout.shape, layout.block if layout.form == "cols" else 2)
    if not one and kernels.available(lsq, layout.form, dtype, device):
        return Plan("compiled", layout, shape, stride, lsq)
    return Plan("blocked", layout, shape, stride, lsq) if device == "cpu" else None


def pays(x: Tensor, taken: Plan | None) -> bool:
    """Whether a plan is worth its call: for large tensors."""
    if taken is None:
        return False
    if taken.form == "native":
        return not taken.lsq or x.numel() >= SMALLEST_EXACT
    if taken.form == "blocked":
        return x.numel() >= SMALLEST_BLOCKED
    return x.numel() >= (SMALLEST_LEARNED if taken.lsq else SMALLEST)


@functools.cache
def _floor(relu: bool, device: torch.device) -> Tensor:
    """What a value must exceed for its gradient to pass; made once, as a copy to a GPU would wait for it."""
    with torch.inference_mode(False):
        return torch.tensor([0.0 if relu else -torch.inf], dtype=torch.float32, device=device)


def _forward(
    ctx: Any, x: Tensor, taken: Plan, scale: Tensor, bottom: Tensor, top: Tensor, relu: bool, held: list[Codes] | None
) -> tuple[Tensor, Tensor]:
    """The result and the byte an element. Scale and ends are spread. `held` is given the integers."""
    ctx.plan = taken
    values = taken.layout.view(x)
    if taken.form == "compiled":
        name = "forward_lsq" if taken.lsq else "forward_ste"
        name = name if held is None else name + "_codes"
        y, code, *more = kernels.run(name, taken.layout.form, values, scale, bottom, top, _floor(relu, x.device))
        if held is not None:
            held.append(Codes(more[0], (scale, bottom), taken.layout.form, x.dtype))
    else:
        y, code = blocks.forward(_two(values), *(_two(p) for p in (scale, bottom, top)), relu=relu, lsq=taken.lsq)
    return taken.restore(y), code


def _two(t: Tensor) -> Tensor:
    """With two dimensions at least."""
    return t if t.dim() == 2 else t.reshape(1, -1)


class _FakeQuantize(torch.autograd.Function):
    """Keeps one byte an element: whether the gradient passes."""

    @staticmethod
    def forward(ctx, x, taken, scale, bottom, top, relu, held):  # type: ignore[no-untyped-def]
        y, inside = _forward(ctx, x, taken, scale, bottom, top, relu, held)
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
        return taken.restore(grad_x), None, None, None, None, None, None


class _FakeQuantizeWhole(torch.autograd.Function):
    """Where nothing is clipped: keeps nothing, and passes the gradient on as it comes."""

    @staticmethod
    def forward(ctx, x, taken, scale, bottom, top, held):  # type: ignore[no-untyped-def]
        name, form = "forward_whole" if held is None else "forward_whole_codes", taken.layout.form
        y, *more = kernels.run(name, form, taken.layout.view(x), scale, bottom, top)
        if held is not None:
            held.append(Codes(more[0], (scale, bottom), form, x.dtype))
        return taken.restore(y)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None, None, None, None, None


class _FakeQuantizeLSQ(torch.autograd.Function):
    """Keeps one byte an element, which is enough for both gradients: see `kernels.forward_lsq`."""

    @staticmethod
    def forward(ctx, x, taken, scale, bottom, top, relu, grad_scale, held):  # type: ignore[no-untyped-def]
        layout = taken.layout
        bottom, top = layout.spread(bottom), layout.spread(top)
        used = layout.spread(scale.abs().clamp(min=SMALLEST_SCALE))
        y, code = _forward(ctx, x, taken, used, bottom, top, relu, held)
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
            zero = kernels.zeros(values.shape, values.device)
            grad_x, total = kernels.run("backward_lsq", form, values, code, below, above, zero)
        else:
            grad_x, total = blocks.backward_lsq(_two(values), code, _two(below), _two(above))
        total = layout.gather(total).reshape(scale.shape)
        grad_scale = total * (torch.sign(scale) * ctx.grad_scale)
        return taken.restore(grad_x), None, grad_scale, None, None, None, None, None


class _Traced(torch.autograd.Function):
    """The kernels as they are written, for a compiler that sees the whole step: it saves bytes, not slow bools."""

    @staticmethod
    def forward(ctx, x, scale, bottom, top, floor):  # type: ignore[no-untyped-def]
        y, inside = kernels.forward_ste(x, scale, bottom, top, floor)
        ctx.save_for_backward(inside)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        return *kernels.backward_ste(grad, inside), None, None, None, None


class _TracedLSQ(torch.autograd.Function):
    """As `_Traced`, with a gradient for the scale."""

    @staticmethod
    def forward(ctx, x, scale, bottom, top, floor, grad_scale):  # type: ignore[no-untyped-def]
        y, code = kernels.forward_lsq(x, scale, bottom, top, floor)
        ctx.save_for_backward(code, bottom, top)
        ctx.grad_scale = grad_scale
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        code, bottom, top = ctx.saved_tensors
        grad_x, terms = kernels.lsq_terms(grad, code, bottom, top, torch.zeros_like(top))
        return grad_x, terms.sum_to_size(top.shape) * ctx.grad_scale, None, None, None, None


def traced(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, relu: bool, grad_scale: float | None
) -> Tensor:
    """`qat.numerics.fake_quantize.fake_quantize` rounding to nearest, for `torch.compile` to trace."""
    bottom = quant_min - zero_point
    bottom, top = bottom.clamp(min=0) if relu else bottom, quant_max - zero_point
    floor = 0.0 if relu else -math.inf
    if grad_scale is None:
        return _Traced.apply(x, scale, bottom, top, floor)
    return _TracedLSQ.apply(x, scale, bottom, top, floor, grad_scale)


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


def take(
    x: Tensor,
    taken: Plan,
    scale: Tensor,
    bottom: Tensor,
    top: Tensor,
    relu: bool,
    *,
    whole: bool = False,
    codes: bool = False,
) -> Tensor:
    """Fake-quantize, given what the definition makes of the range.

    Args:
        x: the tensor that the plan was made for.
        taken: from `plan`.
        scale: > 0, of any shape with one entry a scale, and so are the next two.
        bottom, top: the smallest and largest integer, less the zero point; `bottom` is 0 or more behind a ReLU.
        relu: apply ReLU first.
        whole: nothing is clipped, as the range is that of `x`.
        codes: let the result know its integers (`qat.numerics.codes`), of which there are at most `codes.LEVELS`.
    """
    if taken.form == "native":
        params = torch.stack([p.reshape(-1) for p in (scale, bottom, top)])
        return known(native.given(x, params, taken.inner, relu, codes, whole), taken.inner)
    spread = taken.layout.spread
    held = _held(taken, codes)
    if whole and kernels.usable((("forward_whole", taken.layout.form),), x.dtype, x.device.type):
        return _told(_FakeQuantizeWhole.apply(x, taken, spread(scale), spread(bottom), spread(top), held), held)
    return _told(_FakeQuantize.apply(x, taken, spread(scale), spread(bottom), spread(top), relu, held), held)


def known(result: tuple[Tensor, Tensor | None, Tensor], inner: int) -> Tensor:
    """Of what C++ returns (`native`) the tensor, which knows its integers if there are any."""
    y, integers, params = result
    if integers is not None:
        attach(y, Codes(integers, (params,), "native", y.dtype, inner))
    return y


def _held(taken: Plan, codes: bool) -> list[Codes] | None:
    """What a kernel puts the integers in, where it writes some."""
    return [] if codes and taken.form == "compiled" and torch.is_grad_enabled() else None


def _told(y: Tensor, held: list[Codes] | None) -> Tensor:
    if held:
        attach(y, held[0])
    return y


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
    codes: bool = False,
) -> Tensor:
    """As `qat.numerics.fake_quantize.fake_quantize` with rounding to nearest, of tensors of any size.

    Args:
        x, scale, quant_min, quant_max, relu, grad_scale: as there. Of a learned scale the magnitude counts.
        zero_point: None for 0.
        taken: the plan, where it is known; scale and zero point are of any shape then.
        codes: as of `take`.

    Raises:
        ValueError: `x` has gaps in memory or is empty, or the scale varies along several dimensions.
    """
    taken = taken or plan(x, scale.shape, grad_scale is not None)
    if taken is None:
        raise ValueError("no form takes these arguments: ask `plan` first")
    if taken.form == "native":
        grid = native.options(quant_min, quant_max, zero_point is None, relu, codes)
        return known(native.kept(x, scale, zero_point, grid, taken.inner, grad_scale), taken.inner)
    if zero_point is None:
        bottom, top = ends(quant_min, quant_max, relu, scale.shape, scale.device)
    else:
        bottom, top = quant_min - zero_point, quant_max - zero_point
        bottom = bottom.clamp(min=0) if relu else bottom
        if zero_point.shape != scale.shape:
            bottom, top = bottom.expand(scale.shape), top.expand(scale.shape)
    if not taken.lsq:
        return take(x, taken, scale.detach(), bottom, top, relu, codes=codes)
    held = _held(taken, codes)
    return _told(_FakeQuantizeLSQ.apply(x, taken, scale, bottom, top, relu, grad_scale, held), held)
