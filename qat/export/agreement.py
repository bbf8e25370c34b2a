"""How far two implementations of one network are apart, what is allowed, and the message where it is more."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat.export.formats import Integers
from qat.runtime.grid import Quantize

SHOWN = 5
"""How many differing values of a layer are shown."""


class ParityError(RuntimeError):
    """Two implementations of one network disagree by more than is allowed."""


@dataclass(kw_only=True)
class ParityLimits:
    """What is allowed.

    Attributes:
        agreement: smallest share of equal top-1 decisions, those at ties apart.
        max_steps: largest difference of an integer, given equal inputs.
        equal_share: smallest share of integers that are equal, given equal inputs, ties apart; asked of grids of up to
            8 bits (a step of a 16-bit grid is as small as the rounding of a float32 convolution).
        max_abs: largest difference of an output (logit), end to end; None for any: an activation that a tie rounds the
            other way moves outputs by as much as its weights say.
        metric: largest difference of a metric of the task; None for any.
    """

    agreement: float = 0.999
    max_steps: int = 1
    equal_share: float = 0.999
    max_abs: float | None = None
    metric: float | None = None


@dataclass(kw_only=True)
class LayerParity:
    """One tensor, given equal inputs.

    Attributes:
        name: of the tensor.
        max_steps, mean_steps: worst and mean difference.
        equal_share: share of equal integers, those at ties apart.
        bits: of the grid's integers.
        ties: integers that differ by a step at a tie.
        differences: the first others, or where there are none, the first of those: (index, both integers).
        scale, zero_point: of the grid, where known.
        reads: what the layer was given, in words.
    """

    name: str
    max_steps: int
    equal_share: float
    bits: int
    mean_steps: float = 0.0
    ties: int = 0
    differences: list[tuple[list[int], int, int]] = field(default_factory=list)
    scale: float | None = None
    zero_point: int = 0
    reads: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `summary.json`."""
        kept = ("name", "max_steps", "mean_steps", "equal_share", "bits", "ties")
        return {key: getattr(self, key) for key in kept}

    def departs(self, limits: ParityLimits) -> bool:
        """Whether a limit is broken."""
        return self.max_steps > limits.max_steps or (self.bits <= 8 and self.equal_share < limits.equal_share)

    def shown(self, names: tuple[str, str]) -> str:
        """What it read, and its first differing values: integers, and the real numbers that they mean."""
        lines = [f"it was given {self.reads}"] if self.reads else []
        if self.scale is not None:
            lines.append(f"its grid: scale {self.scale:.9g}, zero point {self.zero_point}")
        for index, a, b in self.differences:
            real = ""
            if self.scale is not None:
                real = f" ({(a - self.zero_point) * self.scale:.6g} against {(b - self.zero_point) * self.scale:.6g})"
            lines.append(f"at {index}: {names[0]} {a} against {names[1]} {b}{real}")
        return "".join(f"\n  {line}" for line in lines)


@dataclass(kw_only=True)
class Parity:
    """One pair of implementations.

    Attributes:
        max_abs: worst difference of an output (logit), end to end.
        max_steps, mean_steps: worst and mean difference of an integer activation, given equal inputs.
        agreement: share of equal top-1 decisions (of equal signs for a single output), end to end.
        agreement_outside_ties: the same, where decisions count as equal if a tie is behind the difference: two outputs
            are equal, or, given equal inputs, a layer rounds a value at a tie the other way for that sample.
        equal_share: share of equal integers over all layers, those at ties apart.
        metrics: metric -> what the second has more than the first.
        layers: the same, layer by layer, in order of execution.
        names: of the two.
    """

    max_abs: float
    max_steps: int
    agreement: float
    equal_share: float
    mean_steps: float = 0.0
    agreement_outside_ties: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    layers: list[LayerParity] = field(default_factory=list)
    names: tuple[str, str] = ("first", "second")

    def to_dict(self, layers: bool = False) -> dict[str, Any]:
        """Plain data."""
        data = {key: value for key, value in asdict(self).items() if key not in ("layers", "names")}
        return data | {"layers": [layer.to_dict() for layer in self.layers]} if layers else data

    def check(self, pair: str, limits: ParityLimits) -> None:
        """Raise ParityError, naming the first layer that departs, if a limit is broken."""
        for i, layer in enumerate(self.layers):
            if layer.departs(limits):
                raise ParityError(
                    f"{pair}: layer '{layer.name}' departs given equal inputs: worst {layer.max_steps} steps (allowed "
                    f"{limits.max_steps}), equal {layer.equal_share:.4%} (at least {limits.equal_share:.2%}). In "
                    f"order of execution it is number {i + 1} of {len(self.layers)}, and the first of "
                    f"{sum(row.departs(limits) for row in self.layers)} that depart:{layer.shown(self.names)}"
                )
        if not math.isfinite(self.max_abs):
            raise ParityError(f"{pair}: an output is not finite in one of the two (worst difference {self.max_abs})")
        agreement = self.agreement if self.agreement_outside_ties is None else self.agreement_outside_ties
        if agreement < limits.agreement:
            worst = min(self.layers, key=lambda layer: layer.equal_share, default=None)
            hint = (
                f", although every layer agrees given equal inputs; least equal layer: '{worst.name}' "
                f"({worst.equal_share:.4%})"
                if worst
                else f" (worst difference of an output {self.max_abs:.3g}); layers were not compared"
            )
            raise ParityError(f"{pair}: top-1 agreement {agreement:.4%} is below {limits.agreement:.2%}{hint}")
        if limits.max_abs is not None and self.max_abs > limits.max_abs:
            raise ParityError(f"{pair}: an output differs by {self.max_abs:.6g}, allowed {limits.max_abs:g}")
        for name, difference in self.metrics.items():
            if limits.metric is not None and not abs(difference) <= limits.metric:
                raise ParityError(f"{pair}: {name} differs by {difference:+.6g}, allowed {limits.metric:g}")


def compare(
    outputs: tuple[Tensor, Tensor],
    integers: Sequence[tuple[Integers, Integers]],
    class_dim: int = 1,
    ties: Sequence[Mapping[str, Tensor]] = (),
    *,
    samples: Tensor | None = None,
    names: tuple[str, str] = ("first", "second"),
    grids: Mapping[str, Quantize] | None = None,
    reads: Mapping[str, str] | None = None,
    metrics: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
) -> Parity:
    """Compare two implementations.

    Args:
        outputs: end-to-end results of both, shape [samples, ...].
        integers: per batch, the integers of both given equal inputs.
        class_dim: the dimension of the outputs along which the classes lie.
        ties: per batch, where a difference of one step means nothing (`ties_given`).
        samples: which of the outputs' samples the batches are, one after the other; None: not known.
        names: of the two.
        grids: of the tensors, for messages.
        reads: name of a tensor -> what its layer was given, for messages.
        metrics: of both.
    """
    a, b = outputs
    if a.shape != b.shape:
        raise ValueError(
            f"{names[0]} returns {list(a.shape)} and {names[1]} {list(b.shape)}: these are not two forms of one network"
        )
    counts: dict[str, _Count] = {}
    tied = torch.zeros(len(a), dtype=torch.bool)  # samples for which a layer rounds a tie the other way
    start = 0
    for i, (first, second) in enumerate(integers):
        common = [name for name in first if name in second]
        where = None if samples is None else samples[start : start + len(next(iter(first.values()), ()))]
        start += 0 if where is None else len(where)
        for name in common:
            excused = counts.setdefault(name, _Count()).add(
                first[name], second[name], ties[i].get(name) if ties else None, where
            )
            if where is not None and len(where) == len(excused):
                tied[where] |= excused.reshape(len(excused), -1).any(1)
    order = [name for name in grids if name in counts] if grids is not None else list(counts)
    layers = [counts[name].layer(name, (grids or {}).get(name), (reads or {}).get(name, "")) for name in order]
    total = max(sum(count.total for count in counts.values()), 1)
    equal = decisions(a, class_dim) == decisions(b, class_dim)
    excused = _undecided(a, class_dim) | _undecided(b, class_dim)
    if equal.dim():
        excused |= tied.reshape(-1, *[1] * (equal.dim() - 1))
    return Parity(
        max_abs=float((a - b).abs().max()),
        max_steps=max((row.max_steps for row in layers), default=0),
        mean_steps=sum(count.steps for count in counts.values()) / total,
        agreement=float(equal.float().mean()),
        agreement_outside_ties=float((equal | excused).float().mean()),
        equal_share=1 - sum(count.unequal for count in counts.values()) / total,
        metrics={name: metrics[1][name] - value for name, value in metrics[0].items() if name in metrics[1]},
        layers=layers,
        names=names,
    )


class _Count:
    """What is counted of one tensor, batch by batch."""

    def __init__(self) -> None:
        self.worst = self.steps = self.unequal = self.ties = self.total = self.bits = 0
        self.differences: list[tuple[list[int], int, int]] = []
        self.at_ties: list[tuple[list[int], int, int]] = []

    def add(self, a: Tensor, b: Tensor, tie: Tensor | None, where: Tensor | None) -> Tensor:
        """Count a batch, `where` are its samples; returns which integers differ by a step at a tie."""
        self.bits = 8 * min(a.element_size(), b.element_size(), self.bits // 8 or 8)
        steps = (a.int() - b.int()).abs()
        excused = (steps == 1) & tie if tie is not None else torch.zeros_like(steps, dtype=torch.bool)
        differs = torch.nonzero((steps > 0) & ~excused)
        for kept, found in ((self.differences, differs), (self.at_ties, torch.nonzero(excused))):
            for index in found[: SHOWN - len(kept)].tolist():
                place = tuple(index)
                if where is not None and index and len(where) == len(a):
                    index[0] = int(where[index[0]])
                kept.append((index, int(a[place]), int(b[place])))
        self.worst = max(self.worst, int(steps.max()) if steps.numel() else 0)
        self.steps += int(steps.sum())
        self.unequal += len(differs)
        self.ties += int(excused.sum())
        self.total += steps.numel()
        return excused

    def layer(self, name: str, grid: Quantize | None, reads: str) -> LayerParity:
        """All of it."""
        total = max(self.total, 1)
        row = LayerParity(name=name, max_steps=self.worst, equal_share=1 - self.unequal / total, bits=self.bits)
        row.mean_steps, row.ties, row.reads = self.steps / total, self.ties, reads
        row.differences = self.differences or self.at_ties
        if grid is not None:
            row.scale, row.zero_point = float(grid.scale), int(grid.zero_point)
        return row


def _undecided(outputs: Tensor, class_dim: int) -> Tensor:
    """Where two classes share the first place; where a single output is nought."""
    if outputs.dim() < 2 or outputs.shape[class_dim] == 1:
        return outputs == 0
    best = outputs.topk(2, dim=class_dim).values
    return best.select(class_dim, 0) == best.select(class_dim, 1)


def decisions(outputs: Tensor, class_dim: int = 1) -> Tensor:
    """Top-1 class along a dimension; the sign where there is only one output."""
    if outputs.dim() < 2 or outputs.shape[class_dim] == 1:
        return outputs > 0
    return outputs.argmax(dim=class_dim)
