"""What each quantizer of a network sees and makes of it: histograms on its grid, noise, clipping against rounding.

Weights are read as they are, activations in one pass over a few batches. Of large tensors a random sample is kept for
the pictures; the noise is that of all values.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat.fake_quant import FakeQuantize
from qat.fitted import Mean, Table
from qat.layers import weights_of
from qat.modes import eval_mode, quantizers
from qat.numerics.formats.base import LISTED_BITS
from qat.numerics.rounding import ROUNDING

KEPT = 32_768
"""Values of a quantizer that are kept for histograms."""
CURVE_VALUES = 8192
"""Of these, how many the error curves are computed from."""
BINS = 96
MULTIPLES = tuple(2.0 ** (i / 8) for i in range(-32, 17))
"""Clip ranges of the error curves, in units of the chosen one."""
MOST_LEVELS = 64
"""Levels of a grid are listed up to so many."""


@dataclass
class Seen:
    """A sample of what a quantizer was given, and sums over all of it.

    Attributes:
        quantizer: the quantizer.
        values: after an absorbed ReLU, and what a method squashes weights into; shape [n].
        scale, zero_point: of each value's row, shape [n].
        stored: the values on their levels, shape [n].
        scales: how many scales there are (in a batch).
        signal, noise: sums of squares of the values and of the error, over everything.
        count: how many values there were.
    """

    quantizer: FakeQuantize
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    scale: Tensor = field(default_factory=lambda: torch.empty(0))
    zero_point: Tensor = field(default_factory=lambda: torch.empty(0))
    stored: Tensor = field(default_factory=lambda: torch.empty(0))
    scales: int = 1
    signal: float = 0.0
    noise: float = 0.0
    count: int = 0

    def add(self, x: Tensor, x_dq: Tensor, keep: int, generator: torch.Generator) -> None:
        """Take in one tensor and what the quantizer made of it; `keep` of its values stay."""
        quantizer = self.quantizer
        x = torch.relu(x) if quantizer.relu else x
        rows = quantizer.rows(x)
        meant = quantizer.layout.restore(quantizer.range.transform(rows), x.shape)
        if quantizer.fitted is None:
            scale, zero_point = (t.detach().float().reshape(-1, 1) for t in quantizer.qparams(x))
        else:
            scale, zero_point = rows.new_ones(1, 1), rows.new_zeros(1, 1)
        self.scales = max(self.scales, len(scale))
        each = (quantizer.layout.restore(t.expand(rows.shape), x.shape) for t in (scale, zero_point))
        flat = [t.detach().float().reshape(-1).cpu() for t in (meant, *each, x_dq)]
        self.signal += float(flat[0].double().square().sum())
        self.noise += float((flat[3] - flat[0]).double().square().sum())
        self.count += len(flat[0])
        if len(flat[0]) > keep:
            picked = torch.randint(len(flat[0]), (keep,), generator=generator)
            flat = [t[picked] for t in flat]
        held = (self.values, self.scale, self.zero_point, self.stored)
        self.values, self.scale, self.zero_point, self.stored = map(torch.cat, zip(held, flat, strict=True))

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise; None where there is no noise or no signal."""
        return 10 * math.log10(self.signal / self.noise) if self.noise > 0 and self.signal > 0 else None

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that each value could be stored as."""
        quantizer = self.quantizer
        low, high = quantizer.quant_min - self.zero_point, quantizer.quant_max - self.zero_point
        return low * self.scale, high * self.scale


@torch.no_grad()
def see(net: nn.Module, batches: Iterable[Tensor], seed: int = 0) -> dict[str, Seen]:
    """What every calibrated quantizer of a network sees, by its module path.

    Args:
        net: a prepared network that simulates (`quantize` or `frozen`).
        batches: inputs, one tensor each.
        seed: of the sample.

    Returns:
        Without the quantizers of activations that the batches do not reach.
    """
    generator = torch.Generator().manual_seed(seed)
    names = {quantizer: name for name, quantizer in quantizers(net) if quantizer.calibrated}
    found: dict[str, Seen] = {}
    inputs = list(batches)

    def look(quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(quantizer, FakeQuantize)
        if args[0].numel():
            calls = max(quantizer.sites, 1) * len(inputs)
            seen = found.setdefault(names[quantizer], Seen(quantizer))
            seen.add(args[0], output, max(KEPT // calls, 1), generator)

    weights = weights_of(net)
    with eval_mode(net):
        for quantizer, weight in weights.items():
            if quantizer in names and weight.numel():
                found[names[quantizer]] = Seen(quantizer)
                found[names[quantizer]].add(weight, quantizer(weight), KEPT, generator)
        watched = [quantizer for quantizer in names if quantizer.shape is None]
        handles = [quantizer.register_forward_hook(look) for quantizer in watched]
        try:
            for batch in inputs:
                net(batch)
        finally:
            for handle in handles:
                handle.remove()
    return found


def histogram(seen: Seen, bins: int = BINS) -> dict[str, Any]:
    """The values on the axis of their grid, as plain data.

    A tensor with one scale is shown in its own unit; one with several in levels, each value by its own scale: there the
    grid is the same for all.

    Returns:
        `unit` ("value" or "level"), `low` and `high` (ends of the bins), `counts`, `below` and `above` (values beyond the
        bins), `clip` (ends of the grid; None where there is none), `levels` (of at most 64), `values` (how many were counted).
    """  # noqa: E501
    quantizer, fitted = seen.quantizer, seen.quantizer.fitted is not None
    by_level = seen.scales > 1 and not fitted
    values = seen.values / seen.scale + seen.zero_point if by_level else seen.values
    clip = None if fitted else (float(quantizer.quant_min), float(quantizer.quant_max))
    levels = _levels(seen, fitted)
    if clip is not None and not by_level:
        low, high = seen.ends
        clip = (float(low[0]), float(high[0]))
        scale, zero_point = seen.scale[0], seen.zero_point[0]
        levels = None if levels is None else (levels - zero_point) * scale
    low_end, high_end = _window(values, clip)
    counts = torch.histc(values, bins, low_end, high_end)
    return {
        "unit": "level" if by_level else "value", "low": low_end, "high": high_end,
        "counts": [int(n) for n in counts], "below": int((values < low_end).sum()),
        "above": int((values > high_end).sum()), "clip": None if clip is None else list(clip),
        "levels": None if levels is None else [float(x) for x in levels], "values": len(values),
    }  # fmt: skip


def _levels(seen: Seen, fitted: bool) -> Tensor | None:
    """The levels of the grid, in units of the scale (fitted ones as they are)."""
    quantizer = seen.quantizer
    if fitted:
        found = seen.stored.unique()
    elif quantizer.grid is None:
        found = torch.arange(quantizer.quant_min, quantizer.quant_max + 1)
    elif quantizer.grid.bits > LISTED_BITS:
        return None
    else:
        found = quantizer.grid.values()
    return found if len(found) <= MOST_LEVELS else None


def _window(values: Tensor, clip: tuple[float, float] | None) -> tuple[float, float]:
    """Ends of a picture: all values and the grid, but single values far away do not make the rest a line."""
    low, high = float(values.min()), float(values.max())
    if clip is not None:
        room = clip[1] - clip[0]
        low, high = max(low, clip[0] - room), min(high, clip[1] + room)
        low, high = min(low, clip[0]), max(high, clip[1])
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def clipped_share(seen: Seen) -> float | None:
    """The share of values beyond the grid by more than half a step; None where levels are fitted."""
    if seen.quantizer.fitted is not None:
        return None
    low, high = seen.ends
    half = seen.scale / 2 if seen.quantizer.grid is None else 0.0
    return float(((seen.values < low - half) | (seen.values > high + half)).float().mean())


def levels_used(seen: Seen) -> tuple[int, int] | None:
    """How many levels the values take, and how many there are; None for more than 8 bits, and for fitted tables."""
    quantizer = seen.quantizer
    if isinstance(quantizer.fitted, Table):
        return None
    if isinstance(quantizer.fitted, Mean):
        return len(torch.sign(seen.stored).unique()), len(quantizer.fitted.levels)
    if (quantizer.scheme.bits or 32) > 8:
        return None
    codes = seen.stored / seen.scale + seen.zero_point
    if quantizer.grid is None:
        total, codes = int(quantizer.quant_max - quantizer.quant_min) + 1, codes.round()
    else:
        grid = quantizer.grid.values()
        total, codes = len(grid), (codes.reshape(-1, 1) - grid).abs().argmin(dim=1)
    return len(codes.unique()), total


def error_curve(seen: Seen) -> dict[str, Any] | None:
    """Clipping against rounding: the error of each, were the range a multiple of what it is, as shares of the signal.

    Values beyond the ends of the grid are clipped, those within are rounded; both are mean squares, so that they add up.

    Returns:
        `clip` (the largest magnitude that can be stored now; None with several scales), `multiples`, `clipping` and
        `rounding` (for each multiple), `chosen` and `best` (their sums at 1, and where the sum is smallest) with
        `best_multiple`. None where there is no range to choose: fitted levels, formats without a scale.
    """  # noqa: E501
    quantizer = seen.quantizer
    if quantizer.fitted is not None or quantizer.format.unit_scale or not len(seen.values):
        return None
    count = min(CURVE_VALUES, len(seen.values))
    picked = torch.linspace(0, len(seen.values) - 1, count).long()  # every batch has its share
    x, scale, zero_point = (t[picked].double() for t in (seen.values, seen.scale, seen.zero_point))
    power = float(x.square().sum())
    if power == 0:
        return None
    clipping, rounding = [], []
    for multiple in MULTIPLES:
        step = scale * multiple
        low, high = (quantizer.quant_min - zero_point) * step, (quantizer.quant_max - zero_point) * step
        outside = (x < low) | (x > high)
        error = (_nearest(quantizer, x / step, zero_point) * step - x).square() / power
        clipping.append(float(error[outside].sum()))
        rounding.append(float(error[~outside].sum()))
    total = [a + b for a, b in zip(clipping, rounding, strict=True)]
    best = min(range(len(total)), key=total.__getitem__)
    low, high = seen.ends
    return {
        "clip": None if seen.scales > 1 else float(max(-low[0], high[0])),
        "multiples": list(MULTIPLES), "clipping": clipping, "rounding": rounding,
        "chosen": total[MULTIPLES.index(1.0)], "best": total[best], "best_multiple": MULTIPLES[best],
    }  # fmt: skip


def _nearest(quantizer: FakeQuantize, v: Tensor, zero_point: Tensor) -> Tensor:
    """Values in units of the scale on the levels, rounded as in evaluation (adaptive rounding to nearest)."""
    rounding = ROUNDING["nearest" if quantizer.adapts else quantizer.rounding_in_use]
    if quantizer.grid is not None:
        return quantizer.grid.snap(v.float(), rounding).double()
    return (rounding(v) + zero_point).clamp(quantizer.quant_min, quantizer.quant_max) - zero_point


def describe(seen: Seen) -> dict[str, Any]:
    """All of it as plain data: `sqnr_db`, `clipped`, `levels_used`, `levels_total`, `histogram`, `error_curve`."""
    used = levels_used(seen)
    return {
        "sqnr_db": seen.sqnr_db, "clipped": clipped_share(seen), "levels_used": used and used[0],
        "levels_total": used and used[1], "scales": seen.scales, "histogram": histogram(seen),
        "error_curve": error_curve(seen),
    }  # fmt: skip
