"""How a gradient passes the rounding, which has none. GRADIENTS is the table that configurations choose from.

A quantizer computes `y = scale * q(v)`, `v = x / scale`, where `q` is a staircase. Each entry replaces its slope
`dq/dv` by another one; the gradients follow by the chain rule:

    dL/dx     = g * slope                     g: the gradient of y
    dL/dscale = sum g * (q - slope * v)       with the slope of `clipped_ste`: LSQ's equation 3
    dL/dz     = sum g * scale * (slope - 1)   z: the zero point

| entry       | slope inside the range                              | outside |
|-------------|-----------------------------------------------------|---------|
| ste         | 1                                                   | 1       |
| clipped_ste | 1                                                   | 0       |
| lsq         | 1                                                   | 0       |
| ewgs        | 1 + delta * sign(g) * (v - q) / step                | 0       |
| dsq         | k (1 - tanh(k u)^2) / (2 tanh(k / 2)), u in [-.5, .5] | 0     |
| noise       | 1 (forward: v + uniform noise of half a step)       | 0       |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.numerics.draws import uniform


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where values stand on the staircase, and what a slope may depend on. All tensors have the shape of `v`.

    Attributes:
        v: values in units of the scale.
        q: the level that each got.
        inside: where nothing was clipped.
        cell: gives the levels at or below and at or above `v`.
        grad: the gradient of the output.
        strength: the entry's setting: delta of `ewgs`, temperature k of `dsq`.
    """

    v: Tensor
    q: Tensor
    inside: Tensor
    cell: Callable[[], tuple[Tensor, Tensor]]
    grad: Tensor
    strength: Tensor | float

    def width(self) -> tuple[Tensor, Tensor]:
        """Position in the cell, in [0, 1], and the cell's width (0 and 1 where `v` is a level, or beyond the last)."""
        low, high = self.cell()
        proper = high > low
        width = torch.where(proper, high - low, torch.ones_like(low))
        return torch.where(proper, (self.v - low) / width, torch.zeros_like(low)), width


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """One entry.

    Attributes:
        slope: dq/dv.
        noisy: whether training adds noise in place of rounding; evaluation rounds.
        clipped: values outside the range get no gradient.
        soft: the slope is that of a soft staircase, whose steps lie between neighbouring levels.
        of_scale: made for a scale that is learned by LSQ.
        by_sign: the slope depends on the sign of the gradient.
        strengths: settings at the first and the last step of training, between which the strength moves geometrically;
            None for an entry that has no setting.
        symbol: what the setting is called in plots.
    """

    slope: Callable[[Step], Tensor]
    noisy: bool = False
    clipped: bool = True
    soft: bool = False
    of_scale: bool = False
    by_sign: bool = False
    strengths: tuple[float, float] | None = None
    symbol: str = ""

    @property
    def plain(self) -> bool:
        """Whether it is the clipped straight-through gradient, which kernels have."""
        return self.slope is clipped_ste and not self.noisy

    @property
    def straight(self) -> bool:
        """Whether it passes straight through whatever the levels are."""
        return self.slope in (ste, clipped_ste) and not self.noisy and not self.of_scale

    def strength_at(self, progress: Tensor, strengths: tuple[float, float] | None = None) -> Tensor | float:
        """The strength at a share of training in [0, 1].

        >>> GRADIENTS["dsq"].strength_at(torch.tensor(0.5), (1.0, 16.0))
        tensor(4.)
        """
        first, last = strengths or self.strengths or (1.0, 1.0)
        return first if first == last else first * (last / first) ** progress.clamp(0.0, 1.0)


def ste(step: Step) -> Tensor:
    """Straight through, clipped values too. Source: Bengio, Leonard, Courville 2013, section 4 (arXiv 1308.3432)."""
    return torch.ones_like(step.v)


def clipped_ste(step: Step) -> Tensor:
    """Straight through inside the range. Source: Krishnamoorthi 2018, section 3 (equation 12)."""
    return step.inside.to(step.v.dtype)


def ewgs(step: Step) -> Tensor:
    """Gradients grow where they push a value on towards the next level: `1 + delta sign(g) (v - q)`, in steps.

    Source: Lee, Kim, Ham 2021, "Network Quantization with Element-wise Gradient Scaling", equation 4.
    """
    _, width = step.width()
    return clipped_ste(step) * (1 + step.strength * torch.sign(step.grad) * (step.v - step.q) / width)


def dsq(step: Step) -> Tensor:
    """The slope of a soft staircase of tanh pieces, which hardens as the temperature `k` rises; its mean is 1.

    With `u` the distance from the middle of the cell in steps, the piece is `tanh(k u) / (2 tanh(k / 2))`.

    Source: Gong et al. 2019, "Differentiable Soft Quantization", equations 3 to 6 (the forward is the hard one, 7).
    """
    position, _ = step.width()
    k = torch.as_tensor(step.strength, dtype=torch.float32, device=step.v.device)
    return clipped_ste(step) * (1 - torch.tanh(k * (position - 0.5)).square()) * (k / (2 * torch.tanh(k / 2)))


GRADIENTS: dict[str, Gradient] = {
    "clipped_ste": Gradient(slope=clipped_ste),
    "ste": Gradient(slope=ste, clipped=False),
    "lsq": Gradient(slope=clipped_ste, of_scale=True),  # Esser et al. 2020, equations 3 and 5: value and learned scale
    "ewgs": Gradient(slope=ewgs, by_sign=True, strengths=(0.02, 0.02), symbol="delta"),
    "dsq": Gradient(slope=dsq, soft=True, strengths=(1.0, 10.0), symbol="k"),
    "noise": Gradient(slope=clipped_ste, noisy=True),
}


def add_noise(v: Tensor, step: Tensor | float = 1.0) -> Tensor:
    """`v` plus noise uniform over one step: what rounding does to values on average, and differentiable.

    Source: Defossez et al. 2021, "Differentiable Model Compression via Pseudo Quantization Noise", equation 5 (uniform
    form); Widrow 1956 for the model of rounding as noise.
    """
    return v + (uniform(v) - 0.5) * step
