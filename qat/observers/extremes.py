"""Observers of the extremes: minmax, absmax, and their moving average."""

import torch
from torch import Tensor

from qat import processes
from qat.observers.base import Observer, ObserverOptions, row_range


class Extremes(Observer):
    """Base of observers that need no more of a batch than its range."""

    def update(  # noqa: D102
        self, x: Tensor, site: int = 0, relu: bool = False, together: bool = False, real: Tensor | None = None
    ) -> None:
        together = together and processes.several()
        if together:
            processes.take_turn((self, site))
        if x.numel():
            low, high = Extremes.measure(self, x, real)
        elif together:  # the other processes wait
            low, high = (x.new_full(x.shape[:1], end, dtype=torch.float32) for end in (torch.inf, -torch.inf))
        else:
            return
        if together:
            sound = low.isfinite() & high.isfinite()
            ends = torch.where(sound, torch.stack([-low, high]), -torch.inf)
            low, high = processes.largest(ends)
            low = -low
        if relu:  # the range of relu(x) is relu of the range
            low, high = low.clamp(min=0), high.clamp(min=0)
        self._take(low, high, site)

    def _take(self, low: Tensor, high: Tensor, site: int) -> None:
        raise NotImplementedError

    def measure(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: D102
        low, high = row_range(x, real)
        return low.float(), high.float()


class MinMax(Extremes):
    """Smallest and largest value ever seen.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.1 (`a = min w`, `b = max w`).
    """

    reduce = {"low": "min", "high": "max"}  # noqa: RUF012

    low: Tensor
    high: Tensor

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.register_buffer("low", torch.empty(options.rows, dtype=torch.float32))
        self.register_buffer("high", torch.empty(options.rows, dtype=torch.float32))
        self.reset()

    def reset(self) -> None:  # noqa: D102
        super().reset()
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)

    def _take(self, low: Tensor, high: Tensor, site: int) -> None:
        torch.minimum(self.low, torch.where(low.isfinite(), low, torch.inf), out=self.low)
        torch.maximum(self.high, torch.where(high.isfinite(), high, -torch.inf), out=self.high)

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require(lambda: (self.low <= self.high).all())
        return self.low.clone(), self.high.clone()


class AbsMax(Extremes):
    """`[-a, a]`, `a` the largest magnitude ever seen.

    On a symmetric grid it is `minmax`; on an affine one it puts zero in the middle.

    Source: Wu et al. 2020, "Integer Quantization for Deep Learning Inference", section 3.1.2 and 5 (max calibration).
    """

    reduce = {"largest": "max"}  # noqa: RUF012

    largest: Tensor

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.register_buffer("largest", torch.empty(options.rows, dtype=torch.float32))
        self.reset()

    def reset(self) -> None:  # noqa: D102
        super().reset()
        self.largest.fill_(-torch.inf)

    def _take(self, low: Tensor, high: Tensor, site: int) -> None:
        largest = torch.maximum(-low, high)
        torch.maximum(self.largest, torch.where(largest.isfinite(), largest, -torch.inf), out=self.largest)

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require(lambda: (self.largest >= 0).all())
        return -self.largest, self.largest.clone()

    def measure(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: D102
        low, high = super().measure(x, real)
        largest = torch.maximum(-low, high)
        return -largest, largest


class Ema(Extremes):
    """Exponential moving average of each batch's minimum and maximum; the first batch sets it.

    `low += momentum * (min(x) - low)`, and so for `high`. Edges that share a range are averaged apart (by `site`) and
    joined by `range()`: averaging them together would clip the larger one.

    A moving average depends on the order of the batches, so several observers cannot be merged into the one that saw
    everything; `merge` takes the mean of both averages, as is usual for running statistics of several processes. In a
    distributed run each batch's extremes are exchanged before they are averaged, as if one process saw all of it.

    Source: Jacob et al. 2018, section 3.1.
    """

    reduce = {"low": "mean", "high": "mean"}  # noqa: RUF012
    ordered = True

    low: Tensor
    high: Tensor

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.register_buffer("low", torch.empty(options.sites, options.rows, dtype=torch.float32))
        self.register_buffer("high", torch.empty(options.sites, options.rows, dtype=torch.float32))
        self.reset()

    def reset(self) -> None:  # noqa: D102
        super().reset()
        self.low.fill_(torch.nan)
        self.high.fill_(torch.nan)

    @property
    def simple(self) -> bool:
        """Whether there is one range of one edge, and something was seen."""
        return self._checked and self.low.numel() == 1

    def _take(self, low: Tensor, high: Tensor, site: int) -> None:
        for averages, value in ((self.low, low), (self.high, high)):
            average = averages[site]
            old = torch.where(average.isnan(), value, average)
            moved = old + self.options.momentum * (value - old)  # as `params_followed` in C++ has it; lerp rounds once
            average.copy_(torch.where(value.isfinite(), moved, average))

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        low, high = self.low, self.high
        self._require(lambda: ~low.isnan().all())
        return (
            torch.where(low.isnan(), torch.inf, low).amin(dim=0),
            torch.where(high.isnan(), -torch.inf, high).amax(dim=0),
        )
