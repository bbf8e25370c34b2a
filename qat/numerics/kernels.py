"""The fast path of per-tensor fake quantization: one pass over the values each way, compiled by Inductor.

Composed operations read and write a tensor five to ten times; these functions do once. They see every tensor as flat,
so one dynamic-shape compilation serves all layers; Inductor keeps it on disk for later processes. Small tensors, and
machines without a compiler, take the composed form in `qat.numerics.affine`, which is the reference: the forward is
equal to the bit, the backward too but for the order in which a scale's gradient is summed.

`QAT_KERNELS=off` in the environment turns them off.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SMALLEST = 2**17
"""Elements from which the compiled form pays for its call."""

RESIDUAL_STEPS = 252
"""The rounding residual in [-0.5, 0.5] is kept as one of this many steps; see `forward_lsq`."""


def forward_ste(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Fake-quantize; also where the gradient passes, one byte an element.

    Args:
        x: float32, shape [n].
        scale, zero_point: float32, shape [].
        bounds: float32, shape [3]: lowest and highest integer, and the number that `x` must exceed (0 behind an
            absorbed ReLU, else -inf).
    """
    q = torch.round(x / scale) + zero_point
    inside = (q >= bounds[0]) & (q <= bounds[1]) & (x > bounds[2])
    # a byte, not a bool: Inductor's loads and stores of bool are not vectorised
    return (torch.clamp(q, bounds[0], bounds[1]) - zero_point) * scale, torch.where(inside, 1.0, 0.0).to(torch.uint8)


def backward_ste(grad: Tensor, inside: Tensor) -> Tensor:
    """The gradient where it passes."""
    return torch.where(inside.float() > 0.5, grad, 0.0)


def forward_lsq(x: Tensor, scale: Tensor, zero_point: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Fake-quantize; also one byte an element for both gradients.

    The byte is 0 for "clipped below", 255 for "clipped above", else 127 + 252 (round(v) - v), `v = x / scale`.
    """
    v = x / scale
    rounded = torch.round(v)
    q = rounded + zero_point
    code = torch.clamp(torch.round((rounded - v) * RESIDUAL_STEPS + 127.0), 1.0, 253.0)
    code = torch.where(q > bounds[1], 255.0, code)
    code = torch.where((q < bounds[0]) | (x <= bounds[2]), 0.0, code)
    return (torch.clamp(q, bounds[0], bounds[1]) - zero_point) * scale, code.to(torch.uint8)


def backward_lsq(grad: Tensor, code: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of the scale, the latter summed in the same pass.

    Args:
        grad: float32, shape [n].
        code: from `forward_lsq`.
        ends: float32, shape [2]: slope of the result in the scale where clipped below and above.
    """
    c = code.float()
    inside = (c > 0.5) & (c < 254.5)
    slope = torch.where(inside, (c - 127.0) / RESIDUAL_STEPS, torch.where(c < 0.5, ends[0], ends[1]))
    return torch.where(inside, grad, 0.0), (grad * slope).sum()


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled once for every length."""
    return torch.compile(function, dynamic=True, fullgraph=True)


_works: bool | None = None


def usable(x: Tensor, scale: Tensor, rounding: str) -> bool:
    """Whether the compiled form can take these arguments: a large, dense float32 tensor with one scale."""
    if _works is False or torch.compiler.is_compiling():
        return False
    return (
        scale.dim() == 0
        and x.dtype == torch.float32
        and x.numel() >= SMALLEST
        and rounding == "nearest"
        and _dense(x)
        and _check()
    )


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _check() -> bool:
    """Compile once; where that fails, say so and leave it."""
    global _works
    if _works is None:
        _works = os.environ.get("QAT_KERNELS", "on") != "off"
        if _works:
            try:
                x = torch.zeros(SMALLEST)
                compiled(forward_ste)(x, torch.ones(()), torch.zeros(()), torch.tensor([-1.0, 1.0, -torch.inf]))
            except Exception as error:  # no compiler, no write access to the cache, ...: the composed form serves
                log.warning("Compiled kernels are not available (%s); training is slower without them.", error)
                _works = False
    return _works


def flat(x: Tensor) -> Tensor:
    """A dense tensor's values in the order of memory, shape [n], without a copy."""
    return x.as_strided((x.numel(),), (1,))


def like(y: Tensor, x: Tensor) -> Tensor:
    """Inverse of `flat`: the values `y` with the shape and strides of `x`."""
    return y.as_strided(x.shape, x.stride())
