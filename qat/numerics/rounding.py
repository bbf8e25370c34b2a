"""How a real number becomes an integer. ROUNDING is the table that configurations choose from.

| x           | -2.5 | -1.5 | -0.5 | 0.5 | 1.5 | 2.5 | 2.9 | 5.7 |
|-------------|------|------|------|-----|-----|-----|-----|-----|
| nearest     | -2   | -2   | 0    | 0   | 2   | 2   | 3   | 6   |
| floor       | -3   | -2   | -1   | 0   | 1   | 2   | 2   | 5   |
| ceil        | -2   | -1   | 0    | 1   | 2   | 3   | 3   | 6   |
| truncate    | -2   | -1   | 0    | 0   | 1   | 2   | 2   | 5   |
| logarithmic | -2   | -2   | 0    | 0   | 2   | 2   | 4   | 8   |

`stochastic` gives one of both neighbours, at random: 0.25 becomes 1 once in four times.
"""

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, distributed

_GOLDEN = 0.6180339887498949
_generator: torch.Generator | None = None


def use_generator(generator: torch.Generator | None) -> None:
    """Set what `stochastic` draws from.

    Args:
        generator: on the device of the tensors; every process that gives an equal one rounds equally. None, the
            default, for torch's own generator of each device, which `torch.manual_seed` and Lightning's
            `seed_everything` seed and checkpoints can restore. Processes then round differently, also where all
            were given the same seed.
    """
    global _generator
    _generator = generator


def stochastic(x: Tensor) -> Tensor:
    """Round up with the probability of the fractional part: `floor(x + u)`, `u` uniform in [0, 1). Unbiased.

    Computed as `floor(x) + (u < x - floor(x))`, so that integers stay what they are: in float32, `100 + u` may round
    to 101.

    Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.
    """
    u = torch.rand(x.shape, generator=_generator, device=x.device, dtype=torch.float32)
    rank = _rank() if _generator is None else 0
    if rank:  # equal seeds on all ranks: shifted copies of one uniform variable are uniform, and differ
        u = torch.frac(u + rank * _GOLDEN % 1)
    low = torch.floor(x)
    return low + (u < x - low).to(x.dtype)


def _rank() -> int:
    with suppress(ValueError, RuntimeError):
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank()
    return 0


def logarithmic(x: Tensor) -> Tensor:
    """The nearest power of two in the log domain, with the sign of `x`: `sign(x) 2 ** round(log2 |x|)`.

    Powers below 1 are no integers and become 0, so magnitudes under `2 ** -0.5` do; zero stays zero. A grid of `b` bits
    ends at `2 ** (b - 1) - 1`, where larger powers are clipped.

    Source: Miyashita, Lee, Murmann 2016, "Convolutional Neural Networks using Logarithmic Data Representation",
    equation 3 (LogQuant).
    """
    mantissa, exponent = torch.frexp(x)  # |x| = |mantissa| * 2 ** exponent, 0.5 <= |mantissa| < 1: exact, unlike log2
    exponent = exponent - (mantissa.abs() < 0.5**0.5).int()
    power = torch.ldexp(torch.ones_like(x), exponent.clamp(min=0))
    rounded = torch.where((exponent < 0) | (x == 0), torch.zeros_like(x), torch.copysign(power, x))
    return torch.where(x.isfinite(), rounded, x)


ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "nearest": torch.round,  # ties to even, as ONNX's QuantizeLinear and IEEE 754 do
    "floor": torch.floor,
    "ceil": torch.ceil,
    "truncate": torch.trunc,
    "stochastic": stochastic,
    "logarithmic": logarithmic,
}

SETTLED = {"stochastic": "nearest"}
"""Roundings that are for training only -> what stands in for them in evaluation and export."""


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, mode: str) -> Tensor:
        return ROUNDING[mode](x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        """Nothing is kept: the gradient does not depend on the input."""

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad, None


def round_ste(x: Tensor, mode: str = "nearest") -> Tensor:
    """Round with the straight-through gradient: forward rounds, backward is the identity.

    Args:
        x: any shape, floating point.
        mode: key of `ROUNDING`.

    Source: Bengio, Leonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".

    >>> round_ste(torch.tensor([0.5, 1.5, -2.5]))
    tensor([ 0.,  2., -2.])
    """
    return _RoundSTE.apply(x, mode)
