"""What every observer is, and what it may be told."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qat import processes
from qat.numerics.formats import Grid
from qat.numerics.formats.base import LISTED_BITS

REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "sum": torch.add,
    "mean": lambda a, b: torch.where(a.isnan(), b, torch.where(b.isnan(), a, (a + b) / 2)),  # NaN: nothing seen
}
"""How two observers' values of a state become one."""


@dataclass(frozen=True, kw_only=True)
class ObserverOptions:
    """What an observer may be told.

    Attributes:
        rows: how many ranges are kept (1 for a per-tensor scheme); 0 for none, where `measure` alone is asked.
        sites: how many edges share the range.
        symmetric, quant_min, quant_max: the grid, for observers that weigh rounding against clipping.
        percentiles: low and high, in percent.
        momentum: weight of the newest batch in a moving average.
        norm: exponent of the error that `lp` minimises.
        sigmas: how many standard deviations `sigma` reaches to either side of the mean.
        grid: the levels of a format without a zero point, for observers that weigh rounding against clipping; None for
            the integers from `quant_min` to `quant_max`.
        scales: (largest magnitudes, grid) -> scales, for a format that has a rule of its own (`Format.scales`).
    """

    rows: int = 1
    sites: int = 1
    symmetric: bool = True
    quant_min: float = -128
    quant_max: float = 127
    percentiles: tuple[float, float] = (0.01, 99.99)
    momentum: float = 0.05
    norm: float = 2.4
    sigmas: float = 3.0
    grid: Grid | None = field(default=None, compare=False)
    scales: Callable[[Tensor, Grid], Tensor] | None = None

    def same(self, other: "ObserverOptions") -> bool:
        """Whether all of it is equal; grids are where their levels are, since their functions cannot be compared."""
        a, b = self.grid, other.grid
        if a is None or b is None:
            return self == other and a is b
        ends = (a.low, a.high, a.bits) == (b.low, b.high, b.bits)
        return self == other and ends and (a is b or a.bits > LISTED_BITS or torch.equal(a.values(), b.values()))


def row_range(x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each row, shape [rows] each; of those that are `real`."""
    if real is not None:
        return x.masked_fill(~real, torch.inf).amin(dim=1), x.masked_fill(~real, -torch.inf).amax(dim=1)
    if x.shape[0] == 1:  # ATen's reduction of a whole tensor is forty times as fast as that of its one row
        low, high = torch.aminmax(x)
        return low.reshape(1), high.reshape(1)
    return x.amin(dim=1), x.amax(dim=1)  # five times as fast as aminmax(dim=1)


class Observer(nn.Module):
    """Base: state is buffers (it is saved, moved and loaded with the network).

    Moving extremes pass over a batch with NaN: one bad batch must not spoil a range that later batches extend.

    Attributes:
        reduce: state -> how the states of several observers become one: a key of REDUCE, element by element and in this
            order, or `joint`: the class's own `merge` needs several states together.
        ordered: the range depends on the order of the batches, so that processes have to take in each batch together.
        integers: it counts the levels of integers, and knows no other format.
        weighs: it weighs what values become on the levels of the format, with a range of their own.
    """

    reduce: ClassVar[dict[str, str]] = {}
    ordered: ClassVar[bool] = False
    integers: ClassVar[bool] = False
    weighs: ClassVar[bool] = False

    def __init__(self, options: ObserverOptions) -> None:
        super().__init__()
        self.options = options
        self._checked = False

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """A state; saved where there are ranges to keep."""
        super().register_buffer(name, tensor, persistent and self.options.rows > 0)

    def reset(self) -> None:
        """Forget everything seen."""
        self._checked = False

    def update(
        self, x: Tensor, site: int = 0, relu: bool = False, together: bool = False, real: Tensor | None = None
    ) -> None:
        """Take in one batch: `x` has shape [rows, values].

        Args:
            x: the values.
            site: tells apart several edges that share one range.
            relu: take in `relu(x)`. Observers of extremes do so without a copy of the values.
            together: take in what all processes of a distributed run have here, each its part of the batch. All of them
                must call this, or take turns (`processes.Turns`).
            real: which values count, bool, shape of `x`; the others fill a short row (`Layout.real`). None for all.
        """
        x = x.clamp(min=0) if relu else x
        if not (together and processes.several()):
            if x.numel():
                self._update(x, site, real)
            return
        processes.take_turn((self, site))
        batch = copy.deepcopy(self)
        batch.reset()
        if x.numel():
            batch._update(x, site, real)
        batch.synchronize()
        self.merge(batch)

    def _update(self, x: Tensor, site: int, real: Tensor | None) -> None:
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        """(low, high), shape [rows] each. Raises RuntimeError when nothing was seen."""
        raise NotImplementedError

    def measure(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The range of this one tensor alone, shape [rows] each; state is not touched. `real` as of `update`."""
        raise NotImplementedError

    def merge(self, other: "Observer") -> None:
        """Take in what `other` saw (another process's observer, say), as `reduce` declares; `other` stays as it is.

        The result has the range of one pass over all samples, however they were divided; only `ema` depends on their
        order, so it has no such result.

        Raises:
            ValueError: `other` observes something else: another class, or other options.
        """
        theirs = self._same(other)
        for name, how in self.reduce.items():
            state = getattr(self, name)
            state.copy_(REDUCE[how](state, getattr(theirs, name)))

    def synchronize(self) -> None:
        """Merge what every process of a distributed run has seen; afterwards all have the same state."""
        if not processes.several():
            return
        states = {name: processes.gather(getattr(self, name)) for name in self.reduce}
        everyone = [copy.deepcopy(self) for _ in next(iter(states.values()))]
        for rank, observer in enumerate(everyone):
            for name in self.reduce:
                getattr(observer, name).copy_(states[name][rank])
        for observer in everyone[1:]:
            everyone[0].merge(observer)
        for name in self.reduce:
            getattr(self, name).copy_(getattr(everyone[0], name))

    def _same(self, other: "Observer") -> Self:
        if type(other) is not type(self) or not other.options.same(self.options):
            raise ValueError(
                f"{type(self).__name__} with {self.options} cannot merge {type(other).__name__} with {other.options}: "
                f"give an observer of the same class and options, for the same grid"
            )
        return other

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._checked = False
        if not self.options.rows:  # files of before have zeros of weights that were never observed
            for name in self._buffers:
                state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _require(self, seen: Callable[[], Tensor]) -> None:
        """Raise unless `seen()`. What was seen stays seen, so a GPU is waited for once, not at every step.

        A compiled step, which cannot ask, is left unchecked: `set_mode` has asked before.
        """
        if self._checked or torch.compiler.is_compiling():
            return
        self._checked = bool(seen())
        if not self._checked:
            raise RuntimeError(f"{type(self).__name__} has seen no data; run qat.calibrate(net, batches)")
