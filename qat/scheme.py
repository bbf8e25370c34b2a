"""Validated data: what is quantized, and how. Nothing here computes."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from qat.numerics.affine import int_range
from qat.numerics.rounding import ROUNDING
from qat.observers import OBSERVERS

FORMATS = ("int",)
"""Value formats."""


class Granularity(Enum):
    """How many scales a tensor has."""

    tensor = "tensor"
    """One."""
    channel = "channel"
    """One per output channel."""
    group = "group"
    """One per `group_size` consecutive inputs of each output channel."""


class RangeMode(Enum):
    """Where the range comes from."""

    fixed = "fixed"
    """Calibration sets it; it stays."""
    running = "running"
    """Calibration sets it; training batches keep updating it until ranges are frozen."""
    learned = "learned"
    """Calibration sets it; the optimizer learns the scale (LSQ)."""
    dynamic = "dynamic"
    """Computed from the tensor at hand at every use. The natural choice for weights, whose values are all known."""


@dataclass(kw_only=True)
class TensorScheme:
    """How one tensor is quantized.

    Attributes:
        bits: 2 to 8, or 16 for activations; None leaves the tensor float.
        format: key of FORMATS.
        symmetric: zero point 0 (true) or affine (false).
        signed: None chooses: signed for symmetric schemes (unsigned where the graph shows that values cannot be
            negative, as after ReLU), unsigned for affine ones.
        narrow_range: leave out the lowest integer of a signed grid (-128), so that it is symmetric about zero.
        granularity: one scale a tensor, an output channel or a group.
        group_size: how many inputs share a scale, with granularity `group`.
        allow_padding: let the last group of a row be shorter.
        rounding: key of ROUNDING.
        observer: key of OBSERVERS.
        percentiles: low and high percentile, in percent, of the `percentile` observer.
        momentum: share of the newest batch in the `ema` observer.
        norm: exponent of the error that the `lp` observer minimises.
        sigmas: standard deviations to either side of the mean, in the `sigma` observer.
        range: where the range comes from.
    """

    bits: int | None = None
    format: str = "int"
    symmetric: bool = True
    signed: bool | None = None
    narrow_range: bool = False
    granularity: Granularity = Granularity.tensor
    group_size: int | None = None
    allow_padding: bool = False
    rounding: str = "nearest"
    observer: str = "minmax"
    percentiles: list[float] = field(default_factory=lambda: [0.01, 99.99])
    momentum: float = 0.05
    norm: float = 2.4
    sigmas: float = 3.0
    range: RangeMode = RangeMode.fixed

    @property
    def quantized(self) -> bool:
        """Whether anything is done at all."""
        return self.bits is not None

    def bounds(self, nonnegative: bool = False) -> tuple[int, int]:
        """(quant_min, quant_max) of the grid; `nonnegative` says that values cannot be below zero."""
        if self.bits is None:
            raise ValueError("a scheme with bits=None has no integer range")
        signed = self.signed if self.signed is not None else self.symmetric and not nonnegative
        return int_range(self.bits, signed, self.narrow_range)

    def describe(self) -> str:
        """One phrase for tables: `int4 symmetric channel, learned (mse)`."""
        if self.bits is None:
            return "float"
        size = f" {self.group_size}" if self.granularity is Granularity.group else ""
        kind = "symmetric" if self.symmetric else "affine"
        return f"{self.format}{self.bits} {kind} {self.granularity.value}{size}, {self.range.value} ({self.observer})"


def _weight_default() -> TensorScheme:
    return TensorScheme(narrow_range=True, granularity=Granularity.channel, range=RangeMode.dynamic)


@dataclass(kw_only=True)
class LayerRule:
    """An exception to the configuration's schemes. Rules are read in order; the first that matches a layer wins.

    Attributes:
        match: a glob on the module path (`layer1.*`, `*.conv2`), `type:NAME` (a glob on the class name, `type:Conv*`),
            or `first` / `last` for the first and last quantizable layer in order of execution.
        weight: fields to change in the configuration's weight scheme, `{bits: 8}`; `{bits: null}` leaves it float.
        activation: fields to change in the scheme of the layer's input activations.
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
    """

    weight: TensorScheme = field(default_factory=_weight_default)
    activation: TensorScheme = field(default_factory=TensorScheme)
    input: TensorScheme = field(default_factory=TensorScheme)
    rules: list[LayerRule] = field(default_factory=list)
    target: str = "generic"

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check every field.

        Raises:
            ValueError: names the field, its value and what would be valid.
        """
        check_scheme(self.weight, "quant.weight", "weight")
        check_scheme(self.activation, "quant.activation", "activation")
        check_scheme(self.input, "quant.input", "activation")
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
        _check_names(data, cls, "quant")
        schemes = {
            name: override(getattr(cls(), name), data.get(name, {}), f"quant.{name}")
            for name in ("weight", "activation", "input")
        }
        rules = []
        for i, rule in enumerate(data.get("rules", [])):
            _check_names(rule, LayerRule, f"quant.rules[{i}]")
            rules.append(LayerRule(**rule))
        return cls(**schemes, rules=rules, target=data.get("target", "generic"))


def override(scheme: TensorScheme, changes: Mapping[str, Any], where: str) -> TensorScheme:
    """A copy of `scheme` with some fields changed; enum fields may be given by name.

    Raises:
        ValueError: an unknown field, or an unknown name of an enum.
    """
    _check_names(changes, TensorScheme, where)
    values = dict(changes)
    enums: dict[str, type[Enum]] = {"granularity": Granularity, "range": RangeMode}
    for name, enum in enums.items():
        if isinstance(values.get(name), str):
            values[name] = choice(f"{where}.{name}", values[name], {member.name: member for member in enum})
    if "percentiles" in values:
        values["percentiles"] = list(values["percentiles"])
    return dataclasses.replace(scheme, **values)


def check_scheme(scheme: TensorScheme, where: str, role: str) -> None:
    """Check one scheme.

    Args:
        scheme: the scheme.
        where: its path in the configuration, for the message.
        role: `weight` or `activation`.

    Raises:
        ValueError: names the field, its value and what would be valid.
    """
    valid_bits = "2 to 8" if role == "weight" else "2 to 8, or 16"
    bits = scheme.bits
    if bits is not None and (
        isinstance(bits, bool)
        or not isinstance(bits, int)
        or not (2 <= bits <= 8 or (bits == 16 and role == "activation"))
    ):
        raise ValueError(f"{where}.bits={bits}: an int {role} has {valid_bits} bits; null leaves it float")
    choice(f"{where}.format", scheme.format, FORMATS)
    choice(f"{where}.rounding", scheme.rounding, ROUNDING)
    choice(f"{where}.observer", scheme.observer, OBSERVERS)
    if role == "activation" and scheme.granularity is not Granularity.tensor:
        raise ValueError(
            f"{where}.granularity={scheme.granularity.value}: activations take 'tensor' (one scale an edge), because "
            f"an integer convolution cannot rescale its inputs one by one; did you mean quant.weight.granularity?"
        )
    if role == "activation" and scheme.rounding != "nearest":
        raise ValueError(
            f"{where}.rounding={scheme.rounding}: activations are rounded by the runtime, and runtimes (ONNX "
            f"QuantizeLinear) round to 'nearest'; did you mean quant.weight.rounding?"
        )
    if role == "activation" and scheme.range is RangeMode.dynamic:
        raise ValueError(f"{where}.range=dynamic: activations take fixed, running or learned")
    if scheme.signed is False and scheme.symmetric and role == "weight":
        raise ValueError(f"{where}.signed=false with symmetric=true cannot hold negative weights; use symmetric=false")
    if scheme.granularity is Granularity.group:
        if scheme.group_size is None or scheme.group_size < 1:
            raise ValueError(f"{where}.group_size={scheme.group_size}: granularity=group needs a positive group_size, "
                             f"for example {where}.group_size=32")  # fmt: skip
    elif scheme.group_size is not None:
        raise ValueError(f"{where}.group_size={scheme.group_size} has no effect with granularity="
                         f"{scheme.granularity.value}; use granularity=group, or group_size=null")  # fmt: skip
    if len(scheme.percentiles) != 2 or not 0 <= scheme.percentiles[0] < scheme.percentiles[1] <= 100:
        raise ValueError(
            f"{where}.percentiles={list(scheme.percentiles)}: give [low, high] with 0 <= low < high <= 100"
        )
    if not 0 < scheme.momentum <= 1:
        raise ValueError(f"{where}.momentum={scheme.momentum}: give a number in (0, 1]")
    for name, usual in (("norm", 2.4), ("sigmas", 3)):
        if not 0 < getattr(scheme, name) < math.inf:
            raise ValueError(f"{where}.{name}={getattr(scheme, name)}: give a positive number, for example {usual}")
    if scheme.rounding == "logarithmic" and scheme.range is RangeMode.learned:
        raise ValueError(
            f"{where}.rounding=logarithmic with range=learned: the gradient of a learned scale holds only for rounding "
            f"to a neighbouring integer; use {where}.range=dynamic, or another rounding"
        )


def choice(where: str, value: Any, valid: Iterable[str]) -> Any:
    """Check `value` against the valid names (of a table: return its entry).

    Raises:
        ValueError: names the field, the value, the closest valid name and all of them.
    """
    names = list(valid)
    if value not in names:
        close = difflib.get_close_matches(str(value), names, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
        raise ValueError(f"{where}={value!r} is not known{hint} (valid: {', '.join(names)})")
    return valid[value] if isinstance(valid, Mapping) else value


def _check_names(data: Mapping[str, Any], kind: type, where: str) -> None:
    for name in data:
        choice(f"{where}: field", name, [f.name for f in dataclasses.fields(kind)])


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
