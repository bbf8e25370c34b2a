"""A histogram of bounded memory, and the percentiles that it gives."""

import copy

import torch
from torch import Tensor

from qat.numerics import native
from qat.observers.base import Observer, ObserverOptions, row_range

BINS = 4096


class Histogram(Observer):
    """Base of observers that need the distribution: a histogram of bounded memory that never loses a count.

    The bins span [-limit, limit], `limit` a power of two. When a value falls outside, the limit doubles and bins merge
    in pairs: no count moves to a wrong bin. The grid depends only on the largest magnitude ever seen, so the result
    is the same however the samples are split into batches or over processes.
    """

    reduce = {"limit": "max", "counts": "sum"}  # noqa: RUF012  (counts of equal limits: see `merge`)

    counts: Tensor
    limit: Tensor

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__(options)
        self.register_buffer("counts", torch.zeros(options.rows, BINS, dtype=torch.float64))
        self.register_buffer("limit", torch.zeros(options.rows, dtype=torch.float32))

    def reset(self) -> None:  # noqa: D102
        super().reset()
        self.counts.zero_()
        self.limit.zero_()

    def _update(self, x: Tensor, site: int, real: Tensor | None) -> None:
        low, high = row_range(x)
        largest = torch.maximum(-low, high).float()
        sound = torch.isfinite(largest).all()  # else nothing counts: whoever trains is told by the loss
        needed = torch.exp2(torch.floor(torch.log2(largest)) + 1).clamp(max=2.0**127)
        needed = torch.where((largest > 0) & sound, needed, 0.0)
        self._grow(torch.maximum(self.limit, needed))
        span = torch.where(self.limit > 0, self.limit, 1.0)
        if real is None and _in_cpp(x):
            if sound:
                native.count(x, self.counts, span)
            return
        # floor before the shift: x / span + 1 would round small values into a neighbour's bin
        index = (torch.floor(x.float() / span.unsqueeze(1) * (BINS // 2)).long() + BINS // 2).clamp_(0, BINS - 1)
        counted = sound if real is None else real & sound
        self.counts.scatter_add_(1, index, counted.to(self.counts.dtype).expand(x.shape))

    def merge(self, other: Observer) -> None:  # noqa: D102
        theirs = copy.deepcopy(self._same(other))
        limit = torch.maximum(self.limit, theirs.limit)
        self._grow(limit)
        theirs._grow(limit)
        super().merge(theirs)

    def _grow(self, limit: Tensor) -> None:
        """Widen to a limit that is no smaller, a power of two: so many neighbours become one bin."""
        ratio = torch.where(self.limit > 0, limit / self.limit, 1.0)  # only zeros so far: in the middle, whatever it is
        bins = torch.arange(-(BINS // 2), BINS // 2, dtype=torch.float32, device=limit.device)
        index = torch.floor(bins / ratio.unsqueeze(1)).long() + BINS // 2
        self.counts.copy_(torch.zeros_like(self.counts).scatter_add_(1, index, self.counts))
        self.limit.copy_(limit)

    def _bounds(self, row: int) -> tuple[Tensor, Tensor]:
        """Left edges and right edges of the bins, float64, shape [BINS] each."""
        edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64, device=self.limit.device) * self.limit[row]
        return edges[:-1], edges[1:]

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require(lambda: (self.counts.sum(dim=1) > 0).all())
        pairs = [self._row_range(row) for row in range(self.options.rows)]
        return torch.stack([low for low, _ in pairs]).float(), torch.stack([high for _, high in pairs]).float()

    def _row_range(self, row: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def _in_cpp(x: Tensor) -> bool:
    """Whether C++ takes these rows: as many passes in ATen take four times as long."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type != "cpu" or not x.is_contiguous():
        return False
    return x.dtype in (torch.float32, torch.bfloat16, torch.float16) and native.module() is not None


class Percentile(Histogram):
    """The range between two percentiles (`percentiles`, in percent), interpolated linearly inside a bin.

    Source: McKinstry et al. 2019, "Discovering Low-Precision Networks Close to Full-Precision Networks for Efficient
    Inference"; Wu et al. 2020, "Integer Quantization for Deep Learning Inference", sections 3.4 and 5.
    """

    def range(self) -> tuple[Tensor, Tensor]:  # noqa: D102
        self._require(lambda: (self.counts.sum(dim=1) > 0).all())
        low, high = self.options.percentiles
        return self._at(low), self._at(high)

    def _at(self, percent: float) -> Tensor:
        """The percentile of each row, shape [rows]."""
        total = torch.cumsum(self.counts, 1)
        target = total[:, -1:] * (percent / 100)
        i = torch.searchsorted(total, target.clamp(min=1e-9)).clamp(max=BINS - 1)
        held = self.counts.gather(1, i)
        inside = ((target - (total.gather(1, i) - held)) / held.clamp(min=1)).clamp(0, 1)
        return ((i - BINS // 2 + inside) / (BINS // 2) * self.limit.unsqueeze(1)).squeeze(1).float()

    def measure(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: D102
        x = x.float()
        ordered = (x if real is None else x.masked_fill(~real, torch.inf)).sort(dim=1).values
        count = torch.full_like(x[:, :1], x.shape[1]) if real is None else real.sum(dim=1, keepdim=True)
        position = torch.tensor(self.options.percentiles, dtype=torch.float32, device=x.device) / 100 * (count - 1)
        below = position.floor().long()
        above = position.ceil().long()
        low, high = torch.lerp(ordered.gather(1, below), ordered.gather(1, above), position - below).unbind(dim=1)
        return low, high
