"""Fake quantization: quantize and dequantize in one step, with straight-through gradients.

`fake_quantize`, for integers and the clipped straight-through gradient, chooses between the composed form here, which
is the reference, and the fast one (`qat.numerics.fast`). `fake_quantize_by` takes every format and gradient.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.numerics import fast
from qat.numerics.affine import dequantize, quantize
from qat.numerics.gradients import GRADIENTS, Step, add_noise
from qat.numerics.rounding import ROUNDING


class _FakeQuantize(torch.autograd.Function):
    """Forward: quantize then dequantize. Backward: pass through where not clipped (one byte an element is kept)."""

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, relu, rounding):  # type: ignore[no-untyped-def]
        q = ROUNDING[rounding](x.float() / scale) + zero_point
        inside = (q >= quant_min) & (q <= quant_max)
        if relu:
            inside &= x > 0
            q = torch.maximum(q, zero_point)
        ctx.save_for_backward(inside)
        return dequantize(q.clamp_(quant_min, quant_max), scale, zero_point).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None, None, None


class _FakeQuantizeLSQ(torch.autograd.Function):
    """As `_FakeQuantize`, with the gradient of the scale.

    One byte an element is kept: 0 is "clipped below", 255 "clipped above", and 1..253 code the rounding residual
    `round(v) - v`, the slope of the result in the scale; 127 is a residual of exactly zero.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, quant_min, quant_max, relu, rounding, grad_scale):  # type: ignore[no-untyped-def]
        v = x.float() / scale
        rounded = ROUNDING[rounding](v)
        q = rounded + zero_point
        low = zero_point.clamp(min=quant_min) if relu else torch.full_like(zero_point, quant_min)
        below = (x <= 0) if relu else (q < quant_min)
        per_unit = 126 / (0.5 if rounding == "nearest" else 1.0)
        code = (rounded - v).mul_(per_unit).add_(127).round_().clamp_(1, 253)
        code = code.masked_fill_(below, 0).masked_fill_(q > quant_max, 255).to(torch.uint8)
        ctx.save_for_backward(code, scale, zero_point, low)
        ctx.quant_max, ctx.per_unit, ctx.grad_scale = quant_max, per_unit, grad_scale
        return dequantize(torch.maximum(q, low).clamp_(max=quant_max), scale, zero_point).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        code, scale, zero_point, low = ctx.saved_tensors
        high = ctx.quant_max
        below, above = code == 0, code == 255
        slope = (code.float() - 127) / ctx.per_unit
        slope = torch.where(below, low - zero_point, torch.where(above, high - zero_point, slope))
        grad_v = (grad.float() * slope).sum_to_size(scale.shape) * ctx.grad_scale
        return grad.masked_fill(below | above, 0), grad_v, None, None, None, None, None, None


class _FakeQuantizeAny(torch.autograd.Function):
    """Every other gradient, format and learned range, in tensor operations: the formulas as they are written.

    Keeps the input and the levels.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, strength, staircase, grad_scale):  # type: ignore[no-untyped-def]
        v = x.float() / scale
        if staircase.relu:
            v = v.clamp(min=0)
        q, inside = staircase.levels(v, zero_point)
        if staircase.relu:
            inside = inside & (x > 0)
            q = q.clamp(min=0)
        ctx.save_for_backward(v, q, inside, scale, zero_point, strength)
        ctx.staircase, ctx.grad_scale = staircase, grad_scale
        return (q * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        v, q, inside, scale, zero_point, strength = ctx.saved_tensors
        staircase = ctx.staircase
        g = grad.float()
        gradient = GRADIENTS[staircase.gradient]
        step = Step(
            v=v,
            q=q,
            inside=inside,
            cell=lambda: (staircase.round(v, zero_point, torch.floor), staircase.round(v, zero_point, torch.ceil)),
            grad=g,
            strength=strength,
        )
        slope = gradient.slope(step)
        grad_scale = grad_zero = None
        if ctx.needs_input_grad[1]:
            of_scale = q - slope * v
            if not staircase.residual:
                of_scale = torch.where(inside, 0.0, of_scale)
            grad_scale = (g * of_scale).sum_to_size(scale.shape) * ctx.grad_scale
        if ctx.needs_input_grad[2]:
            grad_zero = (g * (slope - 1) * scale).sum_to_size(zero_point.shape) * ctx.grad_scale
        passes = slope if not staircase.relu else torch.where(v > 0, slope, 0.0)
        return (g * passes).to(grad.dtype), grad_scale, grad_zero, None, None, None


@dataclass(frozen=True, kw_only=True)
class Staircase:
    """What a quantizer rounds to, and how its gradient passes.

    Attributes:
        quant_min, quant_max: the smallest and largest level.
        snap: puts values (in units of the scale) on the levels of a format, as `Grid.snap`; None for integers, which
            have a zero point.
        rounding: key of `ROUNDING`.
        gradient: key of `GRADIENTS`.
        strength: the gradient's setting.
        noise: add noise in place of rounding.
        relu: absorb a preceding ReLU: negative values become zero, and the gradient is zero for x <= 0.
        residual: whether the scale's gradient has the rounding residual of what is not clipped (LSQ) or not (PACT).
    """

    quant_min: float
    quant_max: float
    snap: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor] | None = None
    rounding: str = "nearest"
    gradient: str = "clipped_ste"
    strength: Tensor | float = 1.0
    noise: bool = False
    relu: bool = False
    residual: bool = True

    def round(self, v: Tensor, zero_point: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        """Levels less the zero point."""
        if self.snap is not None:
            return self.snap(v, rounding)
        return (rounding(v) + zero_point).clamp(self.quant_min, self.quant_max) - zero_point

    def levels(self, v: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Levels less the zero point, and where nothing was clipped."""
        low, high = self.quant_min - zero_point, self.quant_max - zero_point
        if self.noise:
            cell = self.round(v, zero_point, torch.floor), self.round(v, zero_point, torch.ceil)
            q = torch.clamp(add_noise(v, cell[1] - cell[0]), low, high)
        else:
            q = self.round(v, zero_point, ROUNDING[self.rounding])
        if self.snap is None:  # as ATen: clipped is what rounds to an integer outside
            ends = (v if self.noise else ROUNDING[self.rounding](v)) + zero_point
            return q, (ends >= self.quant_min) & (ends <= self.quant_max)
        return q, (v >= low) & (v <= high)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    *,
    relu: bool = False,
    rounding: str = "nearest",
    grad_scale: float | None = None,
) -> Tensor:
    """Quantize to integers and dequantize in one step, with straight-through gradients.

    Args:
        x: any shape; float32, bfloat16 or float16 (the arithmetic is float32; the result has the dtype of `x`).
        scale, zero_point: float32, broadcast against `x`.
        quant_min, quant_max: the integer range.
        relu: absorb a preceding ReLU: values are clamped to `[zero_point, quant_max]`, the gradient is zero for x <= 0.
        rounding: key of `ROUNDING`.
        grad_scale: None leaves the scale without gradient; a number makes it learned (LSQ) and multiplies its gradient.

    Gradients: with respect to `x`, `grad` inside the range and 0 where clipped; with respect to `scale`
    (with `v = x / scale`), `round(v) - v` inside, `quant_min - zero_point` below, `quant_max - zero_point` above.
    A value is clipped when it rounds to an integer outside the range, as in ATen's kernels (the paper clips half a step
    earlier).

    Source: Esser et al. 2020, "Learned Step Size Quantization", equations 1 to 3; Krishnamoorthi 2018, section 3.
    """
    if rounding == "nearest" and (taken := fast.plan(x, scale.shape, grad_scale is not None)) and fast.pays(x, taken):
        return fast.fake_quantize(
            x, scale, zero_point, quant_min, quant_max, relu=relu, grad_scale=grad_scale, taken=taken
        )  # fmt: skip
    if not torch.is_grad_enabled():
        q = quantize(x, scale, zero_point, quant_min, quant_max, rounding)
        return dequantize(torch.maximum(q, zero_point) if relu else q, scale, zero_point).to(x.dtype)
    if rounding == "nearest" and torch.compiler.is_compiling():
        return fast.traced(x, scale, zero_point, quant_min, quant_max, relu, grad_scale)
    if grad_scale is None:
        return _FakeQuantize.apply(x, scale, zero_point, quant_min, quant_max, relu, rounding)
    return _FakeQuantizeLSQ.apply(x, scale, zero_point, quant_min, quant_max, relu, rounding, grad_scale)


def fake_quantize_by(
    x: Tensor, scale: Tensor, zero_point: Tensor, staircase: Staircase, grad_scale: float = 1.0
) -> Tensor:
    """Put `x` on the levels of any format and back, with any gradient of GRADIENTS.

    Args:
        x: any shape; float32, bfloat16 or float16.
        scale, zero_point: float32, broadcast against `x`; each gets its gradient where it requires one.
        staircase: the levels, the rounding and the gradient.
        grad_scale: multiplies the gradients of scale and zero point.
    """
    strength = torch.as_tensor(staircase.strength, dtype=torch.float32, device=x.device)
    plain = dataclasses.replace(staircase, strength=1.0)  # a tensor is an argument, so that a compiled step takes any
    if torch.is_grad_enabled():  # a range that follows its batches is written in place when it is called once more
        scale, zero_point = (t if t.requires_grad else t.clone() for t in (scale, zero_point))
    return _FakeQuantizeAny.apply(x, scale, zero_point, strength, plain, grad_scale)
