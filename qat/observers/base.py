"""What every observer is, and what it may be told."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn


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


def row_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, shape [rows] each."""
    if x.shape[0] == 1:  # ATen's reduction of a whole tensor is forty times as fast as that of its one row
        low, high = torch.aminmax(x)
        return low.reshape(1), high.reshape(1)
    return torch.aminmax(x, dim=1)


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
