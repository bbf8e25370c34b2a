"""QuantConfig: the schemes of a network, with exceptions."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from qat.numerics.formats import FORMATS
from qat.scheme.checks import check_scheme
from qat.scheme.tensor import Granularity, TensorScheme, check_names, override

GRAPHS = ("auto", "required", "layers")
"""What QuantConfig.graph may be."""

BOUNDS = {"sigmoid": (0.0, 1.0), "hardsigmoid": (0.0, 1.0), "softmax": (0.0, 1.0), "tanh": (-1.0, 1.0)}
"""Functions whose results lie within known ends."""

ATTENTION = ("query", "key", "value", "scores", "probabilities")
"""Tensors of attention, by which rules name them (`self_attn.sdpa.query`)."""


def _weight_default() -> TensorScheme:
    return TensorScheme(narrow_range=True, granularity=Granularity.channel, range="dynamic")


@dataclass(kw_only=True)
class LayerRule:
    """An exception to the configuration's schemes. Rules are read in order; the first that matches a layer wins.

    Attributes:
        match: a glob on the module path (`layer1.*`, `*.conv2`), `type:NAME` (a glob on the class name, `type:Conv*`),
            or `first` / `last` for the first and last quantizable layer in order of execution. A glob matches other
            operations too, by the names that `qat.report` has for them: `block.add`, and of attention each tensor that
            it reads (ATTENTION): `*.sdpa.query`. Scores stay float where no rule ends with their name
            (`*.sdpa.scores`), unless the target computes softmax in integers.
        weight: fields to change in the configuration's weight scheme, `{bits: 8}`; `{bits: null}` leaves it float.
        activation: fields to change in the scheme of what the layer or operation reads. Readers that ask for different
            schemes of one tensor share the widest; in attention, each then gets its own.
    """

    match: str = "?"
    weight: dict[str, Any] = field(default_factory=dict)
    activation: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class QuantConfig:
    """What `prepare` reads.

    Attributes:
        weight: scheme of every weight.
        activation: scheme of every activation edge that a quantized operation reads.
        input: scheme of the network's own inputs.
        rules: exceptions, first match wins.
        target: key of TARGETS, what will run the result.
        graph: `auto` traces what torch.fx can trace and quantizes other layers at their own inputs; `required` refuses
            a network that cannot be traced as a whole; `layers` traces nothing.
        bounded: functions (of BOUNDS) whose results get the range of the function, not an observed one. A softmax over
            many keys comes nowhere near 1, so it is observed unless it is named here.
    """

    weight: TensorScheme = field(default_factory=_weight_default)
    activation: TensorScheme = field(default_factory=TensorScheme)
    input: TensorScheme = field(default_factory=TensorScheme)
    rules: list[LayerRule] = field(default_factory=list)
    target: str = "generic"
    graph: str = "auto"
    bounded: list[str] = field(default_factory=lambda: ["sigmoid", "hardsigmoid", "tanh"])

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: names the field, its value and what would be valid.
        """
        for name, role in (("weight", "weight"), ("activation", "activation"), ("input", "activation")):
            scheme: TensorScheme = getattr(self, name)
            check_scheme(scheme, f"quant.{name}", role)
            if not scheme.quantized and scheme.format != "int":
                bits = FORMATS[scheme.format].bits
                raise ValueError(
                    f"quant.{name}.format={scheme.format}: with bits=null the tensor stays float; give "
                    f"quant.{name}.bits={bits[len(bits) // 2]}"
                )
        if self.graph not in GRAPHS:
            raise ValueError(f"quant.graph={self.graph!r} is not known (valid: {', '.join(GRAPHS)})")
        for name in self.bounded:
            if name not in BOUNDS:
                raise ValueError(f"quant.bounded: {name!r} is not known (valid: {', '.join(BOUNDS)})")
        for i, rule in enumerate(self.rules):
            where = f"quant.rules[{i}]"
            if rule.match in ("", "?"):
                raise ValueError(
                    f"{where}.match is missing; give a module path, a glob, 'type:Conv2d', 'first' or 'last'"
                )
            check_scheme(override(self.weight, rule.weight, f"{where}.weight"), f"{where}.weight", "weight")
            check_scheme(
                override(self.activation, rule.activation, f"{where}.activation"), f"{where}.activation", "activation"
            )

    @property
    def enabled(self) -> bool:
        """Whether anything at all is quantized."""
        return self.weight.quantized or self.activation.quantized or bool(self.rules)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (numbers, strings, lists, dicts), for JSON and checkpoints; `from_dict` is the inverse."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantConfig":
        """Build from plain data such as `to_dict`'s, or a part of it (what is missing takes its default).

        Raises:
            ValueError: an unknown field or an invalid value.
        """
        check_names(data, cls, "quant")
        schemes: dict[str, Any] = {
            name: override(getattr(cls(), name), data.get(name, {}), f"quant.{name}")
            for name in ("weight", "activation", "input")
        }
        rules = []
        for i, rule in enumerate(data.get("rules", [])):
            check_names(rule, LayerRule, f"quant.rules[{i}]")
            rules.append(LayerRule(**rule))
        rest: dict[str, Any] = {name: data[name] for name in ("target", "graph", "bounded") if name in data}
        return cls(rules=rules, **schemes, **rest)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
