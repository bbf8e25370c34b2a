"""How a real number becomes an integer. ROUNDING is the table that configurations choose from.

| x           | -2.5 | -1.5 | -0.5 | 0.5 | 1.5 | 2.5 | 2.9 | 5.7 |
|-------------|------|------|------|-----|-----|-----|-----|-----|
| nearest     | -2   | -2   | 0    | 0   | 2   | 2   | 3   | 6   |
| floor       | -3   | -2   | -1   | 0   | 1   | 2   | 2   | 5   |
| ceil        | -2   | -1   | 0    | 1   | 2   | 3   | 3   | 6   |
| truncate    | -2   | -1   | 0    | 0   | 1   | 2   | 2   | 5   |
| half_up     | -2   | -1   | 0    | 1   | 2   | 3   | 3   | 6   |
| logarithmic | -2   | -2   | 0    | 0   | 2   | 2   | 4   | 8   |

The first four are IEEE 754-2019's (section 4.3): roundTiesToEven, roundTowardNegative, roundTowardPositive and
roundTowardZero. `stochastic` gives one of both neighbours, at random: 0.25 becomes 1 once in four times. `adaptive`
learns for each weight whether it goes up or down.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qat.numerics.draws import uniform


def stochastic(x: Tensor) -> Tensor:
    """Round up with the probability of the fractional part: `floor(x + u)`, `u` uniform in [0, 1). Unbiased.

    Computed as `floor(x) + (u < x - floor(x))`, so that integers stay what they are: in float32, `100 + u` may round
    to 101.

    Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", section 3.
    """
    u = uniform(x)
    low = torch.floor(x)
    return low + (u < x - low).to(x.dtype)


def half_up(x: Tensor) -> Tensor:
    """To the nearest integer, halves towards +infinity: what an integer product shifted right after half a unit does.

    Not `floor(x + 0.5)`, which takes the largest float32 below 0.5 to 1.

    Source: CMSIS-NN, `arm_nn_requantize` (single rounding).
    """
    low = torch.floor(x)
    return torch.where(x - low >= 0.5, low + 1, low)


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


STRETCH = (-0.1, 1.1)
"""A sigmoid is stretched to this interval and clipped to [0, 1], so that it reaches both ends (gamma and zeta)."""


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """How far up each value is rounded, in [0, 1]: `clip(sigmoid(logits) * 1.2 - 0.1, 0, 1)`.

    Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equation 23.
    """
    low, high = STRETCH
    return (torch.sigmoid(logits) * (high - low) + low).clamp(0.0, 1.0)


def rectified_logits(fraction: Tensor) -> Tensor:
    """Inverse of `rectified_sigmoid` for fractions in [0, 1]."""
    low, high = STRETCH
    return torch.logit((fraction - low) / (high - low))


def rounding_penalty(logits: Tensor, beta: float) -> Tensor:
    """What pushes each value to one side: `sum 1 - |2 h - 1| ** beta`, `h = rectified_sigmoid(logits)`.

    A large beta leaves values in the middle free; a small one pulls them to 0 or 1.

    Source: Nagel et al. 2020, equation 24.
    """
    return (1 - (2 * rectified_sigmoid(logits) - 1).abs().pow(beta)).sum()


def _penalty_slope(logits: Tensor, beta: Tensor) -> Tensor:
    """The derivative of `rounding_penalty` in each logit."""
    low, high = STRETCH
    share = torch.sigmoid(logits)
    stretched = share * (high - low) + low
    inside = (stretched >= 0) & (stretched <= 1)
    side = 2 * stretched.clamp(0.0, 1.0) - 1
    slope = -2 * beta * torch.sign(side) * side.abs().pow(beta - 1) * (high - low) * share * (1 - share)
    return torch.where(inside, slope, 0.0)


def penalized(logits: Tensor, progress: Tensor | float, weight: float) -> Tensor:
    """`logits`, whose gradient also has that of `weight * rounding_penalty(logits, beta)`, as if the loss had the term.

    The loss stays the user's own. `beta` falls from 20 to 2 after the first fifth of training, which is free of it.

    Args:
        logits: any shape.
        progress: share of training that has passed, in [0, 1].
        weight: of the penalty.

    Source: Nagel et al. 2020, equation 25, with the annealing of section 3.2 (20 to 2 and a fifth: their code).
    """
    share = (torch.as_tensor(progress, dtype=torch.float32, device=logits.device) - 0.2) / 0.8
    slope = _penalty_slope(logits.detach(), 20.0 + (2.0 - 20.0) * share.clamp(0.0, 1.0))
    return with_gradient(logits, torch.where(share < 0, 0.0, weight * slope))


def adaptive(v: Tensor, logits: Tensor, soft: bool) -> Tensor:
    """Round down or up as learned: `floor(v) + h(logits)`, with gradients for `v` (straight through) and `logits`.

    Args:
        v: values in units of the scale.
        logits: of the shape of `v`.
        soft: use the fraction itself, as while it is learned; else up where it is at least a half.

    Source: Nagel et al. 2020, equation 22.
    """
    up = rectified_sigmoid(logits) if soft else (logits >= 0).to(v.dtype)
    return round_ste(v, "floor") + up


@dataclass(frozen=True)
class Rounding:
    """One entry; called, it rounds.

    Attributes:
        function: real numbers -> integers, float32 of any shape.
        settled: key of what stands in for it in evaluation and export, for a rounding that is for training only.
        powers: it gives powers of two, not one of the two neighbouring integers.
        learned: a parameter a value decides, which FakeQuantize holds (`adaptive`); `function` is where that starts.
        ties: a runtime rounds activations so, halves to `even` integers or `up`; None for what is for weights.
    """

    function: Callable[[Tensor], Tensor]
    settled: str | None = None
    powers: bool = False
    learned: bool = False
    ties: Literal["even", "up"] | None = None

    def __call__(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.function(x)


ROUNDING: dict[str, Rounding] = {
    "nearest": Rounding(torch.round, ties="even"),  # as ONNX's QuantizeLinear does
    "half_up": Rounding(half_up, ties="up"),  # as fixed-point runtimes do
    "floor": Rounding(torch.floor),
    "ceil": Rounding(torch.ceil),
    "truncate": Rounding(torch.trunc),
    "stochastic": Rounding(stochastic, settled="nearest"),
    "logarithmic": Rounding(logarithmic, powers=True),
    "adaptive": Rounding(torch.round, learned=True),
}


def settled(name: str) -> str:
    """Key of ROUNDING: what `name` is in evaluation and export.

    >>> settled("stochastic"), settled("floor")
    ('nearest', 'floor')
    """
    return ROUNDING[name].settled or name


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

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
    return straight_through(x, ROUNDING[mode](x.detach()))


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, extra):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(extra)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad + ctx.saved_tensors[0], None


def with_gradient(x: Tensor, extra: Tensor) -> Tensor:
    """`x`, whose gradient also has `extra`: that of a term which is in no loss, so that the loss stays the user's."""
    return _WithGradient.apply(x, extra)


def straight_through(x: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `x`."""
    return _StraightThrough.apply(x, value)
