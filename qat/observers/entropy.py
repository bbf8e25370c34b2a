"""The observer of TensorRT's calibration: the clip that loses least information."""

from dataclasses import replace

import torch
from torch import Tensor

from qat.numerics.affine import choose_qparams
from qat.observers.histogram import BINS, Histogram


class Entropy(Histogram):
    """The clip whose quantized distribution is nearest to the observed one in Kullback-Leibler divergence.

    For each candidate clip `t`, of the histogram of magnitudes:

    * P is the counts up to `t`, those beyond folded into the last bin;
    * Q is the counts up to `t` without the outliers: bins that the grid rounds to the same level share their count
      evenly, empty bins taking no part;
    * the candidate's cost is `sum P log(P / Q)`, both normalised.

    Candidates end at a bin that holds something (elsewhere Q is zero where P is not, and the divergence infinite) and
    hold at least as many such bins as the grid has levels (fewer are matched trivially). As in NVIDIA's
    pytorch-quantization, the bin at zero counts as its neighbour does, so that the zeros of a ReLU do not decide.

    One clip serves both signs, as on a symmetric grid; where the data reach less far on one side, the range does too
    (`max(min(x), -t), min(max(x), t)`), so that non-negative data get [0, t] and all levels of the grid. The levels are
    the grid's own: cells about each integer, where the source merges equal runs of bins.

    A histogram with hardly more counts than bins (a small weight) is matched best by the full range: this observer is
    for activations.

    Source: Migacz 2017, "8-bit Inference with TensorRT", GTC (pages 36 to 39: entropy calibration).
    """

    integers = True
    CANDIDATES = 256
    SLACK = 1e-9  # among equals the widest clip wins

    def _row_range(self, row: int) -> tuple[Tensor, Tensor]:
        left, right = self._bounds(row)
        filled = torch.nonzero(self.counts[row]).flatten()
        low, high = left[filled[0]], right[filled[-1]]
        negative, positive = self.counts[row, : BINS // 2].flip(0), self.counts[row, BINS // 2 :]
        magnitudes = negative + positive
        magnitudes[0] = magnitudes[1]
        bins = torch.nonzero(magnitudes).flatten()
        if len(bins) < 2:  # nothing to choose from
            return low, high
        last = self._candidates(len(bins), low.device)
        edges = right[BINS // 2 :][bins[last]]
        clip_low, clip_high = torch.maximum(low, -edges), torch.minimum(high, edges)
        level = self._levels((left + right)[BINS // 2 :][bins] / 2, clip_low, clip_high)
        cost = _divergence(magnitudes[bins], last, level)
        held = torch.gather(level, 1, last.unsqueeze(1)).squeeze(1) + 1
        cost = torch.where((held <= last + 1) | (last == len(bins) - 1), cost, torch.inf)
        best = torch.nonzero(cost <= cost.min() + self.SLACK).flatten()[-1]
        return clip_low[best], clip_high[best]

    def measure(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: D102
        histogram = type(self)(replace(self.options, rows=len(x), sites=1)).to(x.device)
        histogram.update(x, real=real)
        return histogram.range()

    def _candidates(self, bins: int, device: torch.device) -> Tensor:
        """Index of the last bin of each candidate, ascending; the last is the full range."""
        count = min(bins, self.CANDIDATES)
        return torch.linspace(0, bins - 1, count, dtype=torch.float64, device=device).round().long()

    def _levels(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Distance from zero, in steps, of each magnitude in each candidate's grid, shape [candidates, bins]."""
        grid = self.options
        scale, _ = choose_qparams(low, high, int(grid.quant_min), int(grid.quant_max), grid.symmetric)
        return torch.round(x.float() / scale.unsqueeze(1)).long()


def _divergence(counts: Tensor, last: Tensor, level: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each candidate.

    Args:
        counts: of the filled bins, shape [bins], all positive.
        last: last bin of each candidate, shape [candidates].
        level: of each bin in each candidate's grid, not descending along the bins, shape [candidates, bins].
    """
    inside = torch.arange(len(counts), device=counts.device) <= last.unsqueeze(1)
    kept = counts * inside
    # number the levels that occur: at most as many as bins, however fine the grid
    changes = torch.nn.functional.pad((level[:, 1:] != level[:, :-1]).long(), (1, 0))
    index = changes.cumsum(dim=1)
    mass = torch.zeros_like(kept).scatter_add_(1, index, kept)
    size = torch.zeros_like(kept).scatter_add_(1, index, inside.to(kept.dtype))
    q = torch.gather(mass / size.clamp(min=1), 1, index) * inside
    q = q / q.sum(dim=1, keepdim=True)
    p = kept.scatter_add(1, last.unsqueeze(1), counts.sum() - kept.sum(dim=1, keepdim=True)) / counts.sum()
    return torch.where(inside, p * torch.log(p / q), 0.0).sum(dim=1)
