"""What range a tensor takes. Observers know nothing of layers; they see rows, one per scale: shape [rows, values].

An observer answers two questions: `measure(x)`, the range of this one tensor (weights, whose values are all there), and
`update(x)` then `range()`, the range of a stream of batches (activations, calibrated). OBSERVERS is the table that
configurations choose from; a new one is a class here and a line there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.numerics.affine import choose_qparams, dequantize, quantize

BINS = 4096


@dataclass(frozen=True, kw_only=True)
class ObserverOptions:
    """What an observer may be told.

    Attributes:
        rows: how many ranges are kept (1 for a per-tensor scheme).
        sites: how many edges share the range.
        symmetric, quant_min, quant_max: the grid, for observers that weigh rounding against clipping.
        percentiles: low and high, in percent.
        momentum: weight of the newest batch in a moving average.
    """

    rows: int = 1
    sites: int = 1
    symmetric: bool = True
    quant_min: int = -128
    quant_max: int = 127
    percentiles: tuple[float, float] = (0.01, 99.99)
    momentum: float = 0.05


class Observer(nn.Module):
    """Base: state is buffers (it is saved, moved and loaded with the network).

    Moving extremes pass over a batch with NaN: one bad batch must not spoil a range that later batches extend.
    """

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__()
        self.options = options

    def reset(self) -> None:
        """Forget everything seen."""
        raise NotImplementedError

    def update(self, x: Tensor, site: int = 0) -> None:
        """Take in one batch: `x` has shape [rows, values]; `site` tells apart several edges that share one range."""
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), shape [rows] each. Raises RuntimeError when nothing was seen."""
        raise NotImplementedError

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range of this one tensor alone, shape [rows] each; state is not touched."""
        raise NotImplementedError

    def _require(self, seen: bool) -> None:
        if not seen:
            raise RuntimeError(f"{type(self).__name__} has seen no data; run qat.calibrate(net, batches)")


class MinMax(Observer):
    """Smallest and largest value ever seen."""

    low: Tensor
    high: Tensor

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.register_buffer("low", torch.empty(options.rows))
        self.register_buffer("high", torch.empty(options.rows))
        self.reset()

    def reset(self) -> None:  # noqa: D102
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)

    def update(self, x: Tensor, site: int = 0) -> None:  # noqa: D102
        low, high = self.measure(x)
        torch.minimum(self.low, torch.where(low.isfinite(), low, torch.inf), out=self.low)
        torch.maximum(self.high, torch.where(high.isfinite(), high, -torch.inf), out=self.high)

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require(bool((self.low <= self.high).all()))
        return self.low.clone(), self.high.clone()

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        low, high = torch.aminmax(x, dim=1)
        return low.float(), high.float()


class Ema(Observer):
    """Exponential moving average of each batch's minimum and maximum; the first batch sets it.

    `low += momentum * (min(x) - low)`, and so for `high`. Edges that share a range are averaged apart (by `site`) and
    joined by `range()`: averaging them together would clip the larger one.

    Source: Jacob et al. 2018, section 3.1.
    """

    low: Tensor
    high: Tensor

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.register_buffer("low", torch.empty(options.sites, options.rows))
        self.register_buffer("high", torch.empty(options.sites, options.rows))
        self.reset()

    def reset(self) -> None:  # noqa: D102
        self.low.fill_(torch.nan)
        self.high.fill_(torch.nan)

    def update(self, x: Tensor, site: int = 0) -> None:  # noqa: D102
        for average, value in zip((self.low, self.high), self.measure(x), strict=True):
            old = torch.where(average[site].isnan(), value, average[site])
            average[site] = torch.where(value.isfinite(), torch.lerp(old, value, self.options.momentum), average[site])

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        low, high = self.low, self.high
        self._require(not bool(low.isnan().all()))
        return (
            torch.where(low.isnan(), torch.inf, low).amin(dim=0),
            torch.where(high.isnan(), -torch.inf, high).amax(dim=0),
        )

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        low, high = torch.aminmax(x, dim=1)
        return low.float(), high.float()


class Histogram(Observer):
    """Base of observers that need the distribution: a histogram of bounded memory that never loses a count.

    The bins span [-limit, limit], `limit` a power of two. When a value falls outside, the limit doubles and bins merge
    in pairs: no count moves to a wrong bin. The grid depends only on the largest magnitude ever seen, so the result
    is the same however the samples are split into batches or over processes.
    """

    counts: Tensor
    limit: Tensor

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.register_buffer("counts", torch.zeros(options.rows, BINS, dtype=torch.float64))
        self.register_buffer("limit", torch.zeros(options.rows))

    def reset(self) -> None:  # noqa: D102
        self.counts.zero_()
        self.limit.zero_()

    def update(self, x: Tensor, site: int = 0) -> None:  # noqa: D102
        x = x.float()
        largest = x.abs().amax(dim=1)
        if not bool(torch.isfinite(largest).all()):  # whoever trains is told by the loss; ranges stay sound
            return
        needed = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest)) + 1).clamp(max=2.0**127), 0.0)
        self._grow(torch.maximum(self.limit, needed))
        span = torch.where(self.limit > 0, self.limit, 1.0).unsqueeze(1)
        # floor before the shift: x / span + 1 would round small values into a neighbour's bin
        index = (torch.floor(x / span * (BINS // 2)).long() + BINS // 2).clamp_(0, BINS - 1)
        self.counts.scatter_add_(1, index, torch.ones_like(x, dtype=self.counts.dtype))

    def _grow(self, limit: Tensor) -> None:
        for row in torch.nonzero(limit > self.limit).flatten().tolist():
            counts = self.counts[row]
            if self.limit[row] == 0:  # only zeros so far: they sit in the middle bin, whatever the limit
                self.limit[row] = limit[row]
            while self.limit[row] < limit[row] and self.limit[row] > 0:
                merged = counts.reshape(BINS // 2, 2).sum(dim=1)
                counts.zero_()
                counts[BINS // 4 : BINS // 4 + BINS // 2] = merged
                self.limit[row] *= 2

    def _bounds(self, row: int) -> tuple[Tensor, Tensor]:
        """Left edges and right edges of the bins, float64, shape [BINS] each."""
        edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64, device=self.limit.device) * self.limit[row]
        return edges[:-1], edges[1:]

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require(bool((self.counts.sum(dim=1) > 0).all()))
        pairs = [self._row_range(row) for row in range(self.options.rows)]
        return torch.stack([low for low, _ in pairs]).float(), torch.stack([high for _, high in pairs]).float()

    def _row_range(self, row: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class Percentile(Histogram):
    """The range between two percentiles (`percentiles`, in percent), interpolated linearly inside a bin.

    Source: Wu et al. 2020, "Integer Quantization for Deep Learning Inference", section 5.
    """

    def _row_range(self, row: int) -> tuple[Tensor, Tensor]:
        left, right = self._bounds(row)
        total = torch.cumsum(self.counts[row], 0)
        low_percent, high_percent = self.options.percentiles
        width = right[0] - left[0]

        def at(percent: float) -> Tensor:
            target = total[-1] * (percent / 100)
            i = int(torch.searchsorted(total, target.clamp(min=1e-9)).clamp(max=BINS - 1))
            before = total[i] - self.counts[row, i]
            return left[i] + width * ((target - before) / self.counts[row, i].clamp(min=1)).clamp(0, 1)

        return at(low_percent), at(high_percent)

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        ordered = x.float().sort(dim=1).values
        position = torch.tensor(self.options.percentiles, device=x.device) / 100 * (x.shape[1] - 1)
        below = position.floor().long()
        above = position.ceil().long()
        low, high = torch.lerp(ordered[:, below], ordered[:, above], (position - below).float()).unbind(dim=1)
        return low, high


class Mse(Histogram):
    """The clip that minimises the squared error of quantize-dequantize, over 100 shrunken copies of the full range.

    Source: Banner et al. 2019, "Post training 4-bit quantization", section 3; the search is over candidates, as in
    Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.1.
    """

    CANDIDATES = 100

    def _row_range(self, row: int) -> tuple[Tensor, Tensor]:
        left, right = self._bounds(row)
        filled = self.counts[row] > 0
        centres = ((left + right) / 2)[filled].float().unsqueeze(0)
        low, high = self._search(centres, self.counts[row][filled].float().unsqueeze(0), left[filled][:1].float(),
                                 right[filled][-1:].float())  # fmt: skip
        return low[0], high[0]

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        x = x.float()
        low, high = torch.aminmax(x, dim=1)
        return self._search(x, torch.ones(1, 1, device=x.device), low, high)

    def _search(self, x: Tensor, weight: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        grid = self.options
        best = (low, high)
        best_error = torch.full_like(low, torch.inf)
        for i in range(self.CANDIDATES, 0, -1):
            shrink = i / self.CANDIDATES
            scale, zero_point = choose_qparams(
                low * shrink, high * shrink, grid.quant_min, grid.quant_max, grid.symmetric
            )
            scale, zero_point = scale.unsqueeze(1), zero_point.unsqueeze(1)
            x_dq = dequantize(quantize(x, scale, zero_point, grid.quant_min, grid.quant_max), scale, zero_point)
            error = ((x_dq - x).square() * weight).sum(dim=1)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = (torch.where(better, low * shrink, best[0]), torch.where(better, high * shrink, best[1]))
        return best


OBSERVERS: dict[str, Callable[[ObserverOptions], Observer]] = {
    "minmax": MinMax,
    "ema": Ema,
    "percentile": Percentile,
    "mse": Mse,
}
