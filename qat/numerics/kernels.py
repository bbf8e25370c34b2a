"""The kernels of the fast path: one pass over the values each way, compiled by Inductor.

Composed operations read and write a tensor five to ten times; these functions do once. They see a dense tensor in the
order of memory, in one of three forms:

| form | values    | scale, zero point | for                                                         |
|------|-----------|-------------------|-------------------------------------------------------------|
| flat | [n]       | []                | one scale                                                   |
| rows | [rows, n] | [rows, 1]         | a scale for each run of n neighbours: weights, [N, C, H, W] |
| cols | [rows, n] | [n]               | a scale for each place in a row: channels last              |

Every form takes one dynamic-shape compilation a kernel and dtype, which Inductor keeps on disk for later processes.
Extents of 0 and 1, which the compiler would specialise on, do not get here (`qat.numerics.fast`).

`QAT_KERNELS=off` in the environment turns compilation off.
"""

import functools
import logging
import os
from collections.abc import Callable
from types import FunctionType

import torch
from torch import Tensor

log = logging.getLogger(__name__)

RESIDUAL_STEPS = 252
"""The rounding residual in [-0.5, 0.5] is kept as one of this many steps; see `forward_lsq`."""


def forward_ste(
    x: Tensor, scale: Tensor, zero: Tensor, last: Tensor, top: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor]:
    """Fake-quantize; also where the gradient passes, one byte an element.

    Integers are counted from the smallest one, so that both clamps are a ReLU: that is one instruction, while
    `torch.clamp` takes four for each end. The result is that of `qat.numerics.affine` to the bit.

    Args:
        x: floating point, of a form above.
        scale: float32, as the form says, and so are the next three.
        zero: the zero point, counted from the smallest integer.
        last: the largest integer, counted from the smallest.
        top: the largest integer less the zero point.
        floor: float32, shape [1]: what `x` must exceed (0 behind an absorbed ReLU, else -inf).
    """
    x_ = x.float()
    q = torch.round(x_ / scale) + zero
    below_top = torch.relu(last - torch.relu(q))
    inside = (q == last - below_top) & (x_ > floor)
    return ((top - below_top) * scale).to(x.dtype), _byte(inside)


def _byte(code: Tensor) -> Tensor:
    """As uint8. By way of int32: the compiler saturates floats on their way to uint8, and vectorises no bools."""
    return code.to(torch.int32).to(torch.uint8)


def backward_ste(grad: Tensor, inside: Tensor) -> tuple[Tensor]:
    """The gradient where it passes."""
    return ((grad.float() * inside.float()).to(grad.dtype),)


def forward_lsq(
    x: Tensor, scale: Tensor, zero: Tensor, last: Tensor, top: Tensor, floor: Tensor
) -> tuple[Tensor, Tensor]:
    """As `forward_ste`, with one byte an element for both gradients.

    The byte is 0 for "clipped below", 255 for "clipped above", else 127 + 252 (round(v) - v), `v = x / scale`.
    """
    x_ = x.float()
    v = x_ / scale
    rounded = torch.round(v)
    q = rounded + zero
    below_top = last - torch.relu(q)
    code = torch.round((rounded - v) * RESIDUAL_STEPS + 127.0)  # in 1..253, as the residual is at most a half
    code = torch.where((q >= 0.0) & (x_ > floor), code.to(torch.int32), 0)
    code = torch.where(below_top < 0.0, 255, code)
    return ((top - torch.relu(below_top)) * scale).to(x.dtype), _byte(code)


def _lsq_terms(grad: Tensor, code: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    g, c = grad.float(), code.float()
    under, over = c == 0.0, c == 255.0
    slope = torch.where(under, below, torch.where(over, above, (c - 127.0) * (1 / RESIDUAL_STEPS)))
    # the zero of each row, not a constant: else the compiler sees a pointwise pass of its own in the first result
    return torch.where(under | over, below - below, g).to(grad.dtype), g * slope


def backward_lsq_flat(grad: Tensor, code: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of the scale, the latter summed in the same pass.

    Args:
        grad: of the result.
        code: from `forward_lsq`.
        below, above: float32, as the form says: slope of the result in the scale where it is clipped.
    """
    grad_x, terms = _lsq_terms(grad, code, below, above)
    return grad_x, terms.sum()


def backward_lsq_rows(grad: Tensor, code: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """As `backward_lsq_flat`; the gradient of the scale is of shape [rows]."""
    grad_x, terms = _lsq_terms(grad, code, below, above)
    return grad_x, terms.sum(1)


def backward_lsq_cols(grad: Tensor, code: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """As `backward_lsq_flat`, of values in blocks of rows, [blocks, rows, n]: sums of each block, shape [blocks, n]."""
    grad_x, terms = _lsq_terms(grad, code, below, above)
    return grad_x, terms.sum(1)


_Kernel = Callable[..., tuple[Tensor, ...]]

KERNELS: dict[tuple[str, str], _Kernel] = {
    **{("forward_ste", form): forward_ste for form in ("flat", "rows", "cols")},
    **{("forward_lsq", form): forward_lsq for form in ("flat", "rows", "cols")},
    ("backward_ste", "flat"): backward_ste,
    ("backward_lsq", "flat"): backward_lsq_flat,
    ("backward_lsq", "rows"): backward_lsq_rows,
    ("backward_lsq", "cols"): backward_lsq_cols,
}
"""(name, form) -> function."""

_VALUES = {"flat": (2**16,), "rows": (192, 320), "cols": (192, 320)}
_SCALE = {"flat": (), "rows": (192, 1), "cols": (320,)}


def _example(name: str, form: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Arguments of ordinary extents, no two alike.

    What the first compilation sees decides how loops are parallelised, and extents that are equal there must be equal
    ever after.
    """
    values, scale = _VALUES[form], torch.ones(_SCALE[form], device=device)
    x, code = torch.zeros(values, dtype=dtype, device=device), torch.zeros(values, dtype=torch.uint8, device=device)
    if name.startswith("forward"):
        return [x, scale, torch.zeros_like(scale), scale, scale, torch.ones(1, device=device)]
    if name == "backward_ste":
        return [x, code]
    if form == "cols":
        x, code = x.view(8, 24, 320), code.view(8, 24, 320)
    return [x, code, -scale, scale]


@functools.cache
def compiled(name: str, form: str, dtype: torch.dtype, device: str) -> _Kernel | None:
    """A kernel compiled once for all extents; None, and a warning, where that fails.

    Args:
        name, form: key of KERNELS.
        dtype: of the values.
        device: its type.
    """
    function = KERNELS[name, form]
    # code of its own, since the compiler counts compilations by code object
    own = FunctionType(function.__code__.replace(co_name=f"{name}_{form}"), function.__globals__)
    kernel: _Kernel = torch.compile(own, dynamic=True, fullgraph=True)
    try:
        with torch.inference_mode(False), torch.no_grad():
            kernel(*(t.detach() for t in _example(name, form, dtype, device)))
    except Exception as error:  # no compiler, no write access to the cache, ...: the other forms serve
        log.warning("Compiled kernels are not available (%s); training is slower without them.", error)
        return None
    return kernel


_broken: set[str] = set()
"""Types of device on which a compilation failed: it is not tried again."""


def available(lsq: bool, form: str, dtype: torch.dtype, device: str) -> bool:
    """Whether the kernels of a form can run; compiles them at the first call."""
    if device in _broken or os.environ.get("QAT_KERNELS", "on") == "off":
        return False
    both = (("forward_lsq", form), ("backward_lsq", form)) if lsq else (("forward_ste", form), ("backward_ste", "flat"))
    if all(compiled(*key, dtype, device) for key in both):
        return True
    _broken.add(device)
    return False


def run(name: str, form: str, *args: Tensor) -> tuple[Tensor, ...]:
    """Call a kernel: compiled, or as it is written where the compiler gave up or a second derivative is wanted."""
    kernel = None if torch.is_grad_enabled() else compiled(name, form, args[0].dtype, args[0].device.type)
    if kernel is None:
        return KERNELS[name, form](*args)
    try:
        return kernel(*(t.detach() for t in args))  # views would be compiled anew, with their bases' extents
    except torch._dynamo.exc.FailOnRecompileLimitHit:  # too many global states: threads, autocast, determinism
        return KERNELS[name, form](*args)
