"""What parity counts of one tensor: of integers in steps, of outputs in what float32 rounding may make of them."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat.export.given import Levels

SHOWN = 5
"""How many differing values of a tensor are shown."""

RATHER_NOISE = 0.1
"""Steps from which on a message says that rounding may have made a difference."""


@dataclass(kw_only=True)
class ParityLimits:
    """What is allowed.

    Attributes:
        agreement: smallest share of equal top-1 decisions, those at ties apart; None for all, and 0.999 where
            ties are not known (ranges of the tensor at hand, floats of few bits, an engine that shows no layers).
        max_steps: largest difference of an integer, given equal inputs.
        equal_share: smallest share of integers that are equal, given equal inputs, ties apart; asked of grids of up to
            8 bits (a step of a 16-bit grid is as small as the rounding of a float32 convolution).
        rounding: largest difference of an output, given equal integers, in what float32 rounding may make of it
            (`qat.export.rounding`: 2^-20 of the magnitude of the terms that are added up); None for any.
        max_abs: largest difference of an output (logit), end to end; None for any: an activation that a tie rounds the
            other way moves outputs by as much as its weights say.
        metric: largest difference of a metric of the task; None for any.
    """

    agreement: float | None = None
    max_steps: int = 1
    equal_share: float = 0.999
    rounding: float | None = 1.0
    max_abs: float | None = None
    metric: float | None = None

    def least_agreement(self, ties_known: bool) -> float:
        """The share of top-1 decisions that have to be equal."""
        return self.agreement if self.agreement is not None else 1.0 if ties_known else 0.999


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
        levels: scale and zero point in both; None where that is not known.
        reads: what the layer was given, in words.
        rounding: steps by which float32's rounding alone may move it (`qat.export.rounding`); None where that was not
            asked, as of a layer that agrees.
    """

    name: str
    max_steps: int
    equal_share: float
    bits: int
    mean_steps: float = 0.0
    ties: int = 0
    differences: list[tuple[list[int], int, int]] = field(default_factory=list)
    levels: tuple[Levels | None, Levels | None] = (None, None)
    reads: str = ""
    rounding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `summary.json`."""
        kept = ("name", "max_steps", "mean_steps", "equal_share", "bits", "ties")
        return {key: getattr(self, key) for key in kept}

    def departs(self, limits: ParityLimits) -> bool:
        """Whether a limit is broken, or the two do not mean the same by an integer."""
        return self.steps_depart(limits) or (None not in self.levels and self.levels[0] != self.levels[1])

    def steps_depart(self, limits: ParityLimits) -> bool:
        """Whether integers differ by more than a limit allows."""
        return self.max_steps > limits.max_steps or (self.bits <= 8 and self.equal_share < limits.equal_share)

    def shown(self, names: tuple[str, str]) -> str:
        """What it read, and its first differing values: integers, and the real numbers that they mean to each."""
        lines = [f"it was given {self.reads}"] if self.reads else []
        known = [levels for levels in self.levels if levels is not None]
        if len(set(known)) == 2:
            lines += [f"its grid in {name}: {_words(said)}" for name, said in zip(names, known, strict=True)]
        elif known:
            lines.append(f"its grid: {_words(known[0])}")
        if self.rounding is not None and self.rounding >= RATHER_NOISE:
            lines.append(
                f"float32's rounding alone may move it by {self.rounding:.2g} steps: on the way to it nearly equal "
                f"numbers are subtracted, or it is divided by what is nearly nought (the mean of normalized values, "
                f"the norm of equal ones), and each engine leaves other digits of that. Leave out what makes it, or "
                f"keep what reads it float by a rule"
            )
        for index, *pair in self.differences:
            real = ""
            if known:  # one that does not say its own is taken to have the other's
                (s, z), (t, y) = (said or known[0] for said in self.levels)
                real = f" ({(pair[0] - z) * s:.6g} against {(pair[1] - y) * t:.6g})"
            lines.append(f"at {index}: {names[0]} {pair[0]} against {names[1]} {pair[1]}{real}")
        return "".join(f"\n  {line}" for line in lines)


def _words(levels: Levels) -> str:
    return f"scale {levels[0]:.9g}, zero point {levels[1]}"


@dataclass(kw_only=True)
class OutputParity:
    """One output of the network.

    Attributes:
        name: where it stands in what the network returns.
        max_abs: worst difference, end to end.
        rounding: worst difference given equal integers, in what float32 rounding may make of the value; None where that
            was not compared.
        layers: what makes it of integers, in words.
        differences: the first values beyond 1: (index, both values, what rounding may make of it).
        why: it was not compared given equal integers.
    """

    name: str
    max_abs: float
    rounding: float | None = None
    layers: str = ""
    differences: list[tuple[list[int], float, float, float]] = field(default_factory=list)
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `summary.json`."""
        return {"name": self.name, "max_abs": self.max_abs, "rounding": self.rounding}

    def departs(self, limits: ParityLimits) -> bool:
        """Whether a limit is broken."""
        return limits.rounding is not None and self.rounding is not None and not self.rounding <= limits.rounding

    def shown(self, names: tuple[str, str]) -> str:
        """Its first differing values."""
        return "".join(
            f"\n  at {index}: {names[0]} {a:.9g} against {names[1]} {b:.9g}; rounding explains {most:.2g}"
            for index, a, b, most in self.differences
        )


class LayerCount:
    """What is counted of the integers of one tensor, batch by batch."""

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
                kept.append((_sample(index, where, len(a)), int(a[tuple(index)]), int(b[tuple(index)])))
        self.worst = max(self.worst, int(steps.max()) if steps.numel() else 0)
        self.steps += int(steps.sum())
        self.unequal += len(differs)
        self.ties += int(excused.sum())
        self.total += steps.numel()
        return excused

    @property
    def tied_share(self) -> float:
        """The share of integers that differ by a step at a tie."""
        return self.ties / max(self.total, 1)

    def layer(self, name: str, levels: tuple[Levels | None, Levels | None], reads: str) -> LayerParity:
        """All of it."""
        total = max(self.total, 1)
        row = LayerParity(name=name, max_steps=self.worst, equal_share=1 - self.unequal / total, bits=self.bits)
        row.mean_steps, row.ties, row.reads, row.levels = self.steps / total, self.ties, reads, levels
        row.differences = self.differences or self.at_ties
        return row


class OutputCount:
    """What is counted of one output given equal integers, batch by batch."""

    def __init__(self, name: str) -> None:
        self.name, self.why = name, ""
        self.worst: float | None = None
        self.differences: list[tuple[list[int], float, float, float]] = []

    def add(self, a: Tensor, b: Tensor, rounding: Tensor | str, where: Tensor | None) -> None:
        """Count a batch, `where` are its samples."""
        if isinstance(rounding, str):
            self.why = rounding
            return
        a, b = a.float(), b.float()
        difference = torch.where(a == b, 0.0, (a - b).abs())  # infinities may be equal
        share = difference / rounding.clamp(min=torch.finfo(torch.float32).tiny)
        if share.numel():
            self.worst = max(self.worst or 0.0, float(share.nan_to_num(nan=torch.inf).max()))
        for index in torch.nonzero(~(share <= 1))[: SHOWN - len(self.differences)].tolist():
            values = (float(x[tuple(index)]) for x in (a, b, rounding))
            self.differences.append((_sample(index, where, len(a)), *values))  # type: ignore[arg-type]

    def output(self, a: Tensor, b: Tensor, layers: str) -> OutputParity:
        """All of it; `a` and `b` are the whole outputs from end to end."""
        difference = torch.where(a == b, 0.0, (a.float() - b.float()).abs())
        row = OutputParity(name=self.name, max_abs=float(difference.max()) if difference.numel() else 0.0)
        row.rounding, row.differences, row.layers, row.why = self.worst, self.differences, layers, self.why
        return row


def _sample(index: list[int], where: Tensor | None, length: int) -> list[int]:
    """An index into a batch, with the number that the sample has among all."""
    return [int(where[index[0]]), *index[1:]] if where is not None and index and len(where) == length else index
