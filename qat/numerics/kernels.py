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
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

log = logging.getLogger(__name__)

RESIDUAL_STEPS = 252
"""The rounding residual in [-0.5, 0.5] is kept as one of this many steps; see `forward_lsq`."""

BELOW, ABOVE = -128, 127
"""What is kept instead of a residual where the value is clipped."""


def forward_ste(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Fake-quantize; also where the gradient passes, one byte an element.

    Integers are counted from the smallest one, so that both clamps are a ReLU: that is one instruction, while
    `torch.clamp` takes four for each end. The result is that of `qat.numerics.affine` to the bit.

    Args:
        x: floating point, of a form above.
        scale: float32, as the form says, and so are the next two.
        bottom, top: the smallest and the largest integer, less the zero point.
        floor: float32, shape [1]: what `x` must exceed (0 behind an absorbed ReLU, else -inf).
    """
    x_ = x.float()
    q, last = torch.round(x_ / scale) - bottom, top - bottom
    below_top = torch.relu(last - torch.relu(q))
    inside = (q == last - below_top) & (x_ > floor)
    return ((top - below_top) * scale).to(x.dtype), _byte(inside)


def _byte(code: Tensor) -> Tensor:
    """As int8. By way of int32: the compiler vectorises no bools, and makes the most of just this conversion."""
    return code.to(torch.int32).to(torch.int8)


def backward_ste(grad: Tensor, inside: Tensor) -> tuple[Tensor]:
    """The gradient where it passes."""
    return ((grad.float() * inside.float()).to(grad.dtype),)


def forward_lsq(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """As `forward_ste`, with one byte an element for both gradients.

    The byte is BELOW or ABOVE where the value is clipped, else 252 (round(v) - v) with `v = x / scale`.
    """
    x_ = x.float()
    v = x_ / scale
    rounded = torch.round(v)
    q = rounded - bottom
    below_top = (top - bottom) - torch.relu(q)
    code = torch.round((rounded - v) * RESIDUAL_STEPS)  # in -126..126, as the residual is at most a half
    code = torch.where(q >= 0.0, code, float(BELOW))
    code = torch.where(x_ > floor, code, float(BELOW))
    code = torch.where(below_top < 0.0, float(ABOVE), code)
    return ((top - torch.relu(below_top)) * scale).to(x.dtype), _byte(code)


def _lsq_terms(grad: Tensor, code: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    g, c = grad.float(), code.float()
    under, over = c == float(BELOW), c == float(ABOVE)
    slope = torch.where(under, below, torch.where(over, above, c * (1 / RESIDUAL_STEPS)))
    # the zero of each row, not a constant: else the compiler sees a pointwise pass of its own in the first result
    zero = below - below
    return torch.where(under, zero, torch.where(over, zero, g)).to(grad.dtype), g * slope


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
    """Arguments of ordinary extents, no two alike, each a tensor of its own (else the graph has one input for both).

    What the first compilation sees decides how loops are parallelised, and extents that are equal there must be equal
    ever after.
    """
    values, scale = _VALUES[form], torch.ones(_SCALE[form], dtype=torch.float32, device=device)
    x, code = torch.zeros(values, dtype=dtype, device=device), torch.zeros(values, dtype=torch.int8, device=device)
    if name.startswith("forward"):
        return [x, scale, -scale, 2 * scale, torch.ones(1, dtype=torch.float32, device=device)]
    if name == "backward_ste":
        return [x, code]
    if form == "cols":
        x, code = x.view(8, 24, 320), code.view(8, 24, 320)
    return [x, code, -scale, scale]


@functools.cache
def compiled(name: str, form: str, dtype: torch.dtype, device: str, threads: int) -> _Kernel | None:
    """A kernel compiled once for all extents; None, and a warning, where that fails.

    Inductor is given the graph itself: by way of `torch.compile` a call costs three times as much, as what it would
    check is known here. (For that reason all that a kernel depends on is an argument.)

    Args:
        name, form: key of KERNELS.
        dtype: of the values.
        device: its type.
        threads: on a CPU, how many share the work.
    """
    arguments: list[Any] = [*_example(name, form, dtype, device)]
    options = {"config_patches": {"cpp.threads": threads}}
    try:
        with torch.inference_mode(False), torch.no_grad():
            graph = make_fx(KERNELS[name, form], tracing_mode="symbolic")(*arguments)
            kernel: _Kernel = torch._inductor.standalone_compile(
                graph, arguments, dynamic_shapes="from_graph", options=options
            )
            kernel(*arguments)
    except Exception as error:  # no compiler, no write access to the cache, ...: the other forms serve
        log.warning("Compiled kernels are not available (%s); training is slower without them.", error)
        return None
    return kernel


_broken: set[str] = set()
"""Types of device on which a compilation failed: it is not tried again."""


def available(lsq: bool, form: str, x: Tensor) -> bool:
    """Whether the kernels of a form can run on such values; compiles them at the first call."""
    if x.device.type in _broken or os.environ.get("QAT_KERNELS", "on") == "off":
        return False
    both = (("forward_lsq", form), ("backward_lsq", form)) if lsq else (("forward_ste", form), ("backward_ste", "flat"))
    if all(_compiled(*key, x) for key in both):
        return True
    _broken.add(x.device.type)
    return False


def _compiled(name: str, form: str, x: Tensor) -> _Kernel | None:
    return compiled(name, form, x.dtype, x.device.type, torch.get_num_threads())


def run(name: str, form: str, *args: Tensor) -> tuple[Tensor, ...]:
    """Call a kernel: compiled, or as it is written where a second derivative is wanted."""
    kernel = None if torch.is_grad_enabled() else _compiled(name, form, args[0])
    return (kernel or KERNELS[name, form])(*args)
