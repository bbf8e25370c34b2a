"""An observer of mean and standard deviation."""

import torch
from torch import Tensor

from qat.observers.base import Observer, ObserverOptions


class Sigma(Observer):
    """`mean +- sigmas * std` of all values seen (the population's standard deviation), whatever their extremes.

    Batches and observers are combined by count, mean and sum of squared deviations, in float64: no large sums of
    squares are subtracted, so the result is that of one pass over all samples to float64's rounding.

    Source: Chan, Golub, LeVeque 1983, "Algorithms for Computing the Sample Variance", equations 2.1; the rule is that
    of Choi et al. 2018, "Bridging the Accuracy Gap for 2-bit Quantized Neural Networks" (SAWB), with a fixed factor.
    """

    reduce = {"count": "sum", "mean": "joint", "m2": "joint"}  # noqa: RUF012

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        for name in self.reduce:
            self.register_buffer(name, torch.zeros(options.rows, dtype=torch.float64))

    def reset(self) -> None:  # noqa: D102
        super().reset()
        for state in (self.count, self.mean, self.m2):
            state.zero_()

    def _update(self, x: Tensor, site: int, real: Tensor | None) -> None:
        count, mean, m2 = self._moments(x, real)
        sound = m2.isfinite()  # a row with NaN or infinity is passed over
        self._add(torch.where(sound, count, 0), torch.where(sound, mean, 0), torch.where(sound, m2, 0))

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require(lambda: (self.count > 0).all())
        return self._around(self.mean, self.m2 / self.count)

    def measure(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: D102
        count, mean, m2 = self._moments(x, real)
        return self._around(mean, m2 / count)

    def merge(self, other: Observer) -> None:  # noqa: D102
        theirs = self._same(other)
        self._add(theirs.count, theirs.mean, theirs.m2)

    def _add(self, count: Tensor, mean: Tensor, m2: Tensor) -> None:
        total = (self.count + count).clamp(min=1)
        delta = mean - self.mean
        self.m2 += m2 + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count += count

    def _around(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        reach = variance.sqrt() * self.options.sigmas
        return (mean - reach).float(), (mean + reach).float()

    @staticmethod
    def _moments(x: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and sum of squared deviations of each row, float64."""
        x = x.double()
        count = torch.full_like(x[:, 0], x.shape[1]) if real is None else real.sum(dim=1).double()
        mean = x.sum(dim=1) / count  # what fills a row is zeros
        deviation = x - mean.unsqueeze(1)
        return count, mean, (deviation if real is None else deviation * real).square().sum(dim=1)
