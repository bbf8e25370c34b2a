"""The kernels of the fast path: one pass over the values each way, as they are defined, and compiled by Inductor.

CPUs have the same in C++ (`qat.numerics.native`).

Composed operations read and write a tensor five to ten times; these functions do once. They see a dense tensor in the
order of memory, in one of three forms:

| form | values    | scale, zero point | for                                                         |
|------|-----------|-------------------|-------------------------------------------------------------|
| flat | [n]       | []                | one scale                                                   |
| rows | [rows, n] | [rows, 1]         | a scale for each run of n neighbours: weights, [N, C, H, W] |
| cols | [rows, n] | [n]               | a scale for each place in a row: channels last              |

A long tensor with one scale is cut into `strips`, [strips, n], where the gradient of the scale is summed.

Every form takes one dynamic-shape compilation a kernel and dtype, which Inductor keeps on disk for later processes.
Extents of 0 and 1, which the compiler would specialise on, do not get here (`qat.numerics.fast`).

`QAT_KERNELS=off` in the environment turns compilation off; `inductor` takes Inductor's kernels on CPUs, too.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qat.numerics.affine import choose_qparams

log = logging.getLogger(__name__)

RESIDUAL_STEPS = 252
"""The rounding residual in [-0.5, 0.5] is kept as one of this many steps; see `forward_lsq`."""

BELOW, ABOVE = -128, 127
"""What is kept instead of a residual where the value is clipped."""


def forward_ste(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, floor: Tensor | float) -> tuple[Tensor, Tensor]:
    """Fake-quantize; also where the gradient passes, one byte an element.

    Integers are counted from the smallest one, so that both clamps are a ReLU: that is one instruction, while
    `torch.clamp` takes four for each end. The result is that of `qat.numerics.affine` to the bit.

    Args:
        x: floating point, of a form above.
        scale: float32, as the form says, and so are the next two.
        bottom, top: the smallest and the largest integer, less the zero point.
        floor: float32, shape [1]: what `x` must exceed (0 behind an absorbed ReLU, else -inf).
    """
    y, inside, _ = _ste(x, scale, bottom, top, floor)
    return y, inside


def forward_ste_codes(
    x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, floor: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward_ste`, and the integers, one byte each, for `decode`: at most 256 of them."""
    y, inside, count = _ste(x, scale, bottom, top, floor)
    return y, inside, _byte(count - 128.0)


def _ste(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, floor: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Result, where the gradient passes, and the integers counted from the smallest one."""
    x_ = x.float()
    q, last = torch.round(x_ / scale) - bottom, top - bottom
    below_top = torch.relu(last - torch.relu(q))
    count = last - below_top
    inside = (q == count) & (x_ > floor)
    return ((top - below_top) * scale).to(x.dtype), _byte(inside), count


def forward_whole(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor) -> tuple[Tensor]:
    """As `forward_ste` where nothing is clipped, as the range is that of the values: every gradient passes."""
    return (_whole(x, scale, bottom, top)[0],)


def forward_whole_codes(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """As `forward_whole`, and the integers (`forward_ste_codes`)."""
    y, q = _whole(x, scale, bottom, top)
    return y, _byte(q - bottom - 128.0)


def _whole(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    q, last = torch.round(x.float() / scale) - bottom, top - bottom
    q = top - torch.relu(last - torch.relu(q))
    return (q * scale).to(x.dtype), q


def decode(codes: Tensor, scale: Tensor, bottom: Tensor) -> tuple[Tensor]:
    """The result of a kernel once more, in float32, from its integers.

    Args:
        codes: int8, counted from the smallest integer, less 128.
        scale, bottom: as the kernel was given them.
    """
    return ((codes.float() + 128.0 + bottom) * scale,)


def _byte(code: Tensor) -> Tensor:
    """As int8. By way of int32: the compiler vectorises no bools, and makes the most of just this conversion."""
    return code.to(torch.int32).to(torch.int8)


def backward_ste(grad: Tensor, inside: Tensor) -> tuple[Tensor]:
    """The gradient where it passes."""
    return ((grad.float() * inside.float()).to(grad.dtype),)


def forward_lsq(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, floor: Tensor | float) -> tuple[Tensor, Tensor]:
    """As `forward_ste`, with one byte an element for both gradients.

    The byte is BELOW or ABOVE where the value is clipped, else 252 (round(v) - v) with `v = x / scale`.
    """
    y, code, _ = _lsq(x, scale, bottom, top, floor)
    return y, code


def forward_lsq_codes(
    x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, floor: Tensor | float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward_lsq`, and the integers (`forward_ste_codes`)."""
    y, code, q = _lsq(x, scale, bottom, top, floor)
    return y, code, _byte(q - bottom - 128.0)


def _lsq(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, floor: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Result, the byte for both gradients, and the integers less the zero point."""
    x_ = x.float()
    v = x_ / scale
    rounded = torch.round(v)
    q = rounded - bottom
    below_top = (top - bottom) - torch.relu(q)
    code = torch.round((rounded - v) * RESIDUAL_STEPS)  # in -126..126, as the residual is at most a half
    code = torch.where(q >= 0.0, code, float(BELOW))
    code = torch.where(x_ > floor, code, float(BELOW))
    code = torch.where(below_top < 0.0, float(ABOVE), code)
    q = top - torch.relu(below_top)
    return (q * scale).to(x.dtype), _byte(code), q


def lsq_terms(grad: Tensor, code: Tensor, below: Tensor, above: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `x`, and of the scale from each value; the arguments are those of `backward_lsq_flat`."""
    g, c = grad.float(), code.float()
    under, over = c == float(BELOW), c == float(ABOVE)
    slope = torch.where(under, below, torch.where(over, above, c * (1 / RESIDUAL_STEPS)))
    return torch.where(under, zero, torch.where(over, zero, g)).to(grad.dtype), g * slope


def backward_lsq_flat(grad: Tensor, code: Tensor, below: Tensor, above: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `x` and of the scale, the latter summed in the same pass.

    Args:
        grad: of the result.
        code: from `forward_lsq`.
        below, above: float32, as the form says: slope of the result in the scale where it is clipped.
        zero: from `zeros`: one for each row. With a constant, the compiler sees that the first result does not depend
            on rows, and makes a pass of its own of it.
    """
    grad_x, terms = lsq_terms(grad, code, below, above, zero)
    return grad_x, terms.sum()


def backward_lsq_rows(grad: Tensor, code: Tensor, below: Tensor, above: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """As `backward_lsq_flat`; the gradient of the scale is of shape [rows]."""
    grad_x, terms = lsq_terms(grad, code, below, above, zero)
    return grad_x, terms.sum(1)


def backward_lsq_cols(grad: Tensor, code: Tensor, below: Tensor, above: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """As `backward_lsq_flat`, of values in blocks of rows, [blocks, rows, n]: sums of each block, shape [blocks, n]."""
    grad_x, terms = lsq_terms(grad, code, below, above, zero)
    return grad_x, terms.sum(1)


@functools.lru_cache(maxsize=256)
def zeros(shape: torch.Size, device: torch.device) -> Tensor:
    """A zero for each row of values of a shape, as the kernels of `backward_lsq` take it; made once."""
    with torch.inference_mode(False):
        return torch.zeros(shape[:1] + (1,) * len(shape[1:]) if len(shape) > 1 else (), device=device)


def choose_symmetric(low: Tensor, high: Tensor, constants: Tensor) -> tuple[Tensor, ...]:
    """`affine.choose_qparams`, and the ends that `forward_ste` takes.

    Args:
        low, high: observed bounds, float32, any shape.
        constants: float32: quant_min, quant_max, and what values are clamped to from below (0 behind a ReLU, else
            -inf).

    Returns:
        scale, zero point, and the smallest and the largest integer less the zero point, of the shape of `low`.
    """
    return _ends(*choose_qparams(low, high, constants[0], constants[1], symmetric=True), constants)


def choose_affine(low: Tensor, high: Tensor, constants: Tensor) -> tuple[Tensor, ...]:
    """As `choose_symmetric`, with a zero point."""
    return _ends(*choose_qparams(low, high, constants[0], constants[1], symmetric=False), constants)


def _ends(scale: Tensor, zero_point: Tensor, constants: Tensor) -> tuple[Tensor, ...]:
    bottom = torch.maximum(constants[0] - zero_point, constants[2])
    return scale, zero_point, bottom, constants[1] - zero_point


def follow(low: Tensor, high: Tensor, averages: tuple[Tensor, Tensor], momentum: Tensor, least: Tensor) -> (
    tuple[Tensor, Tensor]
):  # fmt: skip
    """Moving averages of a batch's extremes; an extreme that is not finite leaves its average as it is."""
    moved = []
    for value, average in zip((low, high), averages, strict=True):
        value = torch.maximum(value.float(), least)
        old = torch.where(average.isnan(), value, average)
        moved.append(torch.where(value.isfinite(), old + momentum * (value - old), average))
    return moved[0], moved[1]


def follow_symmetric(
    low: Tensor, high: Tensor, average_low: Tensor, average_high: Tensor, constants: Tensor
) -> tuple[Tensor, ...]:
    """Moving averages of the extremes (`observers.Ema`), and what `choose_symmetric` makes of them.

    Args:
        low, high: extremes of a batch.
        average_low, average_high: averages of those before, float32; NaN where there are none.
        constants: as `choose_symmetric`, then the momentum.

    Returns:
        both averages, then what `choose_symmetric` returns.
    """
    averages = follow(low, high, (average_low, average_high), constants[3], constants[2])
    return *averages, *choose_symmetric(*averages, constants)


def follow_affine(
    low: Tensor, high: Tensor, average_low: Tensor, average_high: Tensor, constants: Tensor
) -> tuple[Tensor, ...]:
    """As `follow_symmetric`, with a zero point."""
    averages = follow(low, high, (average_low, average_high), constants[3], constants[2])
    return *averages, *choose_affine(*averages, constants)


_Kernel = Callable[..., tuple[Tensor, ...]]

KERNELS: dict[tuple[str, str], _Kernel] = {
    **{
        (function.__name__, form): function
        for form in ("flat", "rows", "cols")
        for function in (
            forward_ste,
            forward_lsq,
            forward_whole,
            forward_ste_codes,
            forward_lsq_codes,
            forward_whole_codes,
            decode,
        )
    },
    ("backward_ste", "flat"): backward_ste,
    ("backward_lsq", "flat"): backward_lsq_flat,
    ("backward_lsq", "strips"): backward_lsq_rows,
    ("backward_lsq", "rows"): backward_lsq_rows,
    ("backward_lsq", "cols"): backward_lsq_cols,
    ("choose_symmetric", "ranges"): choose_symmetric,
    ("choose_affine", "ranges"): choose_affine,
    ("follow_symmetric", "range"): follow_symmetric,
    ("follow_affine", "range"): follow_affine,
}
"""(name, form) -> function. What is chosen for many ranges is of the form `ranges`, [n]; for one, `range`, [1]."""

_VALUES = {"flat": (2**16,), "strips": (192, 320), "rows": (192, 320), "cols": (192, 320)}
_SCALE = {"flat": (), "strips": (), "rows": (192, 1), "cols": (320,)}


def _example(name: str, form: str, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Arguments of ordinary extents, no two alike, each a tensor of its own (else the graph has one input for both).

    What the first compilation sees decides how loops are parallelised, and extents that are equal there must be equal
    ever after.
    """
    if form in ("ranges", "range"):
        ends = [
            torch.full((24 if form == "ranges" else 1,), end, dtype=torch.float32, device=device) for end in (-1, 1)
        ]
        averages = [end.clone() for end in ends] if name.startswith("follow") else []
        return [*ends, *averages, torch.tensor([-8.0, 7.0, -torch.inf, 0.05], dtype=torch.float32, device=device)]
    values, scale = _VALUES[form], torch.ones(_SCALE[form], dtype=torch.float32, device=device)
    x, code = torch.zeros(values, dtype=dtype, device=device), torch.zeros(values, dtype=torch.int8, device=device)
    if name == "decode":
        return [x, scale, -scale]
    if name.startswith("forward_whole"):
        return [x, scale, -scale, 2 * scale]
    if name.startswith("forward"):
        return [x, scale, -scale, 2 * scale, torch.ones(1, dtype=torch.float32, device=device)]
    if name == "backward_ste":
        return [x, code]
    if form == "cols":
        x, code = x.view(8, 24, 320), code.view(8, 24, 320)
    return [x, code, -scale, scale, zeros(x.shape, x.device).clone()]


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
    try:
        with torch.inference_mode(False), torch.no_grad():
            graph = make_fx(KERNELS[name, form], tracing_mode="symbolic")(*arguments)
            artifact: _Kernel = torch._inductor.standalone_compile(
                graph, arguments, dynamic_shapes="from_graph", options={"config_patches": {"cpp.threads": threads}}
            )
            artifact(*arguments)
    except Exception as error:  # no compiler, no write access to the cache, ...: the other forms serve
        log.warning("Compiled kernels are not available (%s); training is slower without them.", error)
        return None
    return artifact


_broken: set[str] = set()
"""Types of device on which a compilation failed: it is not tried again."""


def switch() -> str:
    """What the environment says of compilation."""
    return os.environ.get("QAT_KERNELS", "on")


def available(lsq: bool, form: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> bool:
    """Whether the kernels of a form can run on such values; compiles them at the first call."""
    if not lsq:
        return usable((("forward_ste", form), ("backward_ste", "flat")), dtype, device)
    sums = ("flat", "strips") if form == "flat" else (form,)
    return usable((("forward_lsq", form), *(("backward_lsq", form) for form in sums)), dtype, device)


def usable(keys: Iterable[tuple[str, str]], dtype: torch.dtype = torch.float32, device: str = "cpu") -> bool:
    """Whether kernels, keys of KERNELS, are to run; compiles them at the first call."""
    if device in _broken or switch() == "off" or (device == "cpu" and switch() != "inductor"):
        return False
    if all(compiled(*key, dtype, device, torch.get_num_threads()) for key in keys):
        return True
    _broken.add(device)
    return False


def run(name: str, form: str, *args: Tensor) -> tuple[Tensor, ...]:
    """Call a kernel: compiled, or as it is written where a second derivative is wanted."""
    if torch.is_grad_enabled():
        return KERNELS[name, form](*args)
    x = args[0]
    kernel = compiled(name, form, x.dtype, x.device.type, torch.get_num_threads())
    if kernel is None:
        return KERNELS[name, form](*args)
    return kernel(*args)
