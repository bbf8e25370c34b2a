"""How far two implementations of one network are apart, what is allowed, and the message where it is more."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat.export.given import Levels, Made, tensors_of
from qat.export.linear import LinearParity
from qat.export.rows import LayerCount, LayerParity, OutputCount, OutputParity, ParityLimits
from qat.runtime.grid import Quantize

__all__ = ["LayerParity", "OutputParity", "Parity", "ParityError", "ParityLimits", "compare", "decisions"]


TIES_TOLD = 0.01
"""The share of a layer's integers on ties, rounded differently, from which on a report says so."""


class ParityError(RuntimeError):
    """Two implementations of one network disagree by more than is allowed."""


@dataclass(kw_only=True)
class Parity:
    """One pair of implementations.

    Attributes:
        max_abs: worst difference of an output (logit), end to end.
        max_steps, mean_steps: worst and mean difference of an integer activation, given equal inputs.
        agreement: share of equal top-1 decisions (of equal signs for a single output) of the first output, end to end.
        agreement_outside_ties: the same, where decisions count as equal if a tie is behind the difference: two outputs
            are equal, or, given equal inputs, a layer rounds a value at a tie the other way for that sample.
        equal_share: share of equal integers over all layers, those at ties apart.
        metrics: metric -> what the second has more than the first.
        layers: the same, layer by layer, in order of execution.
        outputs: every output: from end to end, and given equal integers.
        linear: linear layers of a file that holds a network's own code, each given what it reads in training.
        missing: tensors that one of the two does not hand out although it should.
        notes: what was not compared, and why, in sentences.
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
    outputs: list[OutputParity] = field(default_factory=list)
    linear: list[LinearParity] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    names: tuple[str, str] = ("first", "second")

    def to_dict(self, layers: bool = False) -> dict[str, Any]:
        """Plain data."""
        rows = ("layers", "outputs", "linear", "names")
        data = {key: value for key, value in asdict(self).items() if key not in rows}
        data["outputs"] = [row.to_dict() for row in self.outputs]
        if layers:
            data["layers"] = [layer.to_dict() for layer in self.layers]
            data |= {"linear": [layer.to_dict() for layer in self.linear]} if self.linear else {}
        return data

    def check(self, pair: str, limits: ParityLimits) -> None:
        """Raise ParityError, naming the first layer that departs, if a limit is broken."""
        if self.missing:
            raise ParityError(
                f"{pair}: {', '.join(repr(name) for name in self.missing)}: one of the two does not hand out "
                f"{'this tensor' if len(self.missing) == 1 else 'these tensors'}, which cannot be compared"
            )
        for i, layer in enumerate(self.layers):
            if layer.departs(limits):
                steps = (
                    f" departs given equal inputs: worst {layer.max_steps} steps (allowed {limits.max_steps}), equal "
                    f"{layer.equal_share:.4%} (at least {limits.equal_share:.2%})"
                )
                raise ParityError(
                    f"{pair}: layer '{layer.name}'{steps if layer.steps_depart(limits) else ' is on another grid'}. In "
                    f"order of execution it is number {i + 1} of {len(self.layers)}, and the first of "
                    f"{sum(row.departs(limits) for row in self.layers)} that depart:{layer.shown(self.names)}"
                )
        for linear in self.linear:
            if breach := linear.breach(limits):
                raise ParityError(
                    f"{pair}: layer '{linear.name}' departs given equal inputs: {breach}:{linear.shown(self.names)}"
                )
        for row in self.outputs:
            if row.departs(limits):
                raise ParityError(
                    f"{pair}: layer {row.layers} departs given equal inputs: output '{row.name}' differs by "
                    f"{row.rounding:.3g} times what float32 rounding may make of it (allowed {limits.rounding:g}), "
                    f"although the integers before it agree:{row.shown(self.names)}"
                )
        if not math.isfinite(self.max_abs):
            raise ParityError(f"{pair}: an output is not finite in one of the two (worst difference {self.max_abs})")
        agreement = self.agreement if self.agreement_outside_ties is None else self.agreement_outside_ties
        least = limits.least_agreement(all(row.rounding is not None for row in self.outputs[:1]))
        if agreement < least:
            worst = min(self.layers, key=lambda layer: layer.equal_share, default=None)
            hint = (
                f", although every layer agrees given equal inputs; least equal layer: '{worst.name}' "
                f"({worst.equal_share:.4%})"
                if worst
                else f" (worst difference of an output {self.max_abs:.3g}); layers were not compared"
            )
            raise ParityError(f"{pair}: top-1 agreement {agreement:.4%} is below {least:.2%}{hint}")
        if limits.max_abs is not None and self.max_abs > limits.max_abs:
            raise ParityError(f"{pair}: an output differs by {self.max_abs:.6g}, allowed {limits.max_abs:g}")
        for name, difference in self.metrics.items():
            if limits.metric is not None and not abs(difference) <= limits.metric:
                raise ParityError(f"{pair}: {name} differs by {difference:+.6g}, allowed {limits.metric:g}")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What both were asked layer by layer, batch by batch.

    Attributes:
        ties: where a difference of one step means nothing (`ties_given`).
        rounding: of each output, how far rounding may move each value, or why that is not known (`output_rounding`).
        samples: which of the outputs' samples the batches are, one after the other; None: not known.
        grids: of the tensors, as they should be, in order of execution.
        reads: name of a tensor -> what its layer was given, for messages.
        last: of each output, the layers that make it, for messages.
    """

    ties: Sequence[Mapping[str, Tensor]] = ()
    rounding: Sequence[Sequence[Tensor | str]] = ()
    samples: Tensor | None = None
    grids: Mapping[str, Quantize] | None = None
    reads: Mapping[str, str] = field(default_factory=dict)
    last: Sequence[str] = ()


def compare(
    outputs: tuple[Any, Any],
    made: Sequence[tuple[Made, Made]],
    class_dim: int = 1,
    asked: Asked | None = None,
    *,
    names: tuple[str, str] = ("first", "second"),
    metrics: tuple[Mapping[str, float], Mapping[str, float]] = ({}, {}),
    notes: Sequence[str] = (),
) -> Parity:
    """Compare two implementations.

    Args:
        outputs: end-to-end results of both: a tensor [samples, ...], or several as the network returns them.
        made: per batch, what both make of equal integers; nothing where one of the two cannot be asked.
        class_dim: the dimension of the first output along which the classes lie.
        asked: with what.
        names: of the two.
        metrics: of both.
        notes: what was not compared, and why.

    Raises:
        ValueError: outputs that differ in number or shape.
    """
    asked = asked or Asked()
    first, second = (list(tensors_of(result).values()) for result in outputs)
    shapes = [list(y.shape) for y in first], [list(y.shape) for y in second]
    if shapes[0] != shapes[1]:
        shown = [", ".join(map(str, side)) for side in shapes]
        raise ValueError(
            f"{names[0]} returns {shown[0]} and {names[1]} {shown[1]}: these are not two forms of one network"
        )
    counts: dict[str, LayerCount] = {}
    missing: dict[str, None] = {}
    levels: tuple[dict[str, Levels], dict[str, Levels]] = ({}, {})
    rows = [OutputCount(name) for name in tensors_of(outputs[0])]
    tied = torch.zeros(len(first[0]), dtype=torch.bool)  # samples for which a layer rounds a tie the other way
    start = 0
    for i, (a, b) in enumerate(made):
        missing |= dict.fromkeys(a.integers.keys() ^ b.integers.keys())
        where = None if asked.samples is None else asked.samples[start : start + len(a.outputs[0])]
        start += 0 if where is None else len(where)
        for said, found in zip(levels, (a, b), strict=True):
            said |= found.levels
        for name in a.integers.keys() & b.integers.keys():
            tie = asked.ties[i].get(name) if asked.ties else None
            excused = counts.setdefault(name, LayerCount()).add(a.integers[name], b.integers[name], tie, where)
            if where is not None and len(where) == len(excused):
                tied[where] |= excused.reshape(len(excused), -1).any(1)
        for j, row in enumerate(rows):
            row.add(a.outputs[j], b.outputs[j], asked.rounding[i][j] if asked.rounding else "", where)
    order = list(asked.grids or {}) if asked.grids is not None else [n for a, _ in made[:1] for n in a.integers]
    layers = [
        counts[name].layer(name, (levels[0].get(name), levels[1].get(name)), asked.reads.get(name, ""))
        for name in order if name in counts
    ]  # fmt: skip
    total = max(sum(count.total for count in counts.values()), 1)
    found_outputs = [
        row.output(x, y, asked.last[j] if asked.last else f"'{row.name}'")
        for j, (row, x, y) in enumerate(zip(rows, first, second, strict=True))
    ]
    equal = decisions(first[0], class_dim) == decisions(second[0], class_dim)
    excused = _undecided(first[0], class_dim) | _undecided(second[0], class_dim)
    if equal.dim():
        excused |= tied.reshape(-1, *[1] * (equal.dim() - 1))
    unknown = [
        f"Output '{row.name}' is not compared given equal integers: {row.why}." for row in found_outputs if row.why
    ]
    tied_layers = [
        f"Layer '{row.name}': {counts[row.name].tied_share:.2%} of its integers lie on ties that the two round in "
        f"different ways."
        for row in layers if counts[row.name].tied_share > TIES_TOLD
    ]  # fmt: skip
    return Parity(
        max_abs=max((row.max_abs for row in found_outputs), key=lambda worst: (worst != worst, worst)),
        max_steps=max((row.max_steps for row in layers), default=0),
        mean_steps=sum(count.steps for count in counts.values()) / total,
        agreement=float(equal.float().mean()),
        agreement_outside_ties=float((equal | excused).float().mean()),
        equal_share=1 - sum(count.unequal for count in counts.values()) / total,
        metrics={name: metrics[1][name] - value for name, value in metrics[0].items() if name in metrics[1]},
        layers=layers,
        outputs=found_outputs,
        missing=[name for name in order if name in missing],
        notes=[*notes, *unknown, *tied_layers],
        names=names,
    )


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
