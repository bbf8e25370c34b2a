"""TensorScheme: how one tensor is quantized, as data."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from qat.numerics.affine import int_range
from qat.numerics.formats import FORMATS


class Granularity(Enum):
    """How many scales a tensor has."""

    tensor = "tensor"
    """One."""
    channel = "channel"
    """One per channel: per output channel of a weight, unless `axis` says otherwise."""
    group = "group"
    """One per `group_size` consecutive inputs of each output channel (of an activation: consecutive channels)."""
    block = "block"
    """One per tile of `block_size` rows by columns of a weight's matrix [out, inputs]."""
    token = "token"
    """One per token of an activation: per vector along the last dimension, or per image."""


@dataclass(kw_only=True)
class TensorScheme:
    """How one tensor is quantized.

    Attributes:
        bits: how many bits a value takes (which are valid depends on the format); None leaves the tensor float.
        format: key of FORMATS.
        symmetric: zero point 0 (true) or affine (false).
        signed: None chooses: signed for symmetric schemes (unsigned where the graph shows that values cannot be
            negative, as after ReLU), unsigned for affine ones.
        narrow_range: leave out the lowest integer of a signed grid (-128), so that it is symmetric about zero.
        granularity: one scale a tensor, channel, group, block or token.
        axis: the channel axis; None is 0 for weights, and for activations -1 where a linear layer or a product of
            matrices reads them (that is what it sums), else 1.
        group_size: how many inputs share a scale, with granularity `group`; the width of a vector of `product`.
        block_size: [rows, columns] that share a scale, with granularity `block`; -1 takes all.
        allow_padding: let the last group of a row be shorter.
        rounding: key of ROUNDING.
        rounding_seed: what `stochastic` rounding and `noise` draw is a function of this number, the tensor's name and
            the count of its draws, equal in all processes of a distributed run. None: they draw from torch's generator,
            in each process differently.
        rounding_penalty: weight of the term that drives `adaptive` rounding to a decision.
        observer: key of OBSERVERS.
        percentiles: low and high percentile, in percent, of the `percentile` observer.
        momentum: share of the newest batch in the `ema` observer.
        norm: exponent of the error that the `lp` observer minimises.
        sigmas: standard deviations to either side of the mean, in the `sigma` observer.
        range: key of RANGES: where the range comes from. An activation in nvfp4 has two: `fixed` and `running` keep the
            float32 scale of the tensor, and the float8 of a block is computed as its values come; with `dynamic` both
            are.
        range_decay: weight of the L2 term that pulls the clip of `pact` down.
        gradient: key of GRADIENTS: how the gradient passes the rounding.
        gradient_strength: [first, last] step's delta of `ewgs` or temperature of `dsq`; None takes the usual ones.
        refresh: training steps between assignments of weights to codebook entries. More than 1 saves time, but in
            between weights move without an answer from the loss, and may end worse than they began.
        subspaces: into how many parts `product` divides the inputs of a layer, each with prototypes of its own.
    """

    bits: int | None = None
    format: str = "int"
    symmetric: bool = True
    signed: bool | None = None
    narrow_range: bool = False
    granularity: Granularity = Granularity.tensor
    axis: int | None = None
    group_size: int | None = None
    block_size: list[int] | None = None
    allow_padding: bool = False
    rounding: str = "nearest"
    rounding_seed: int | None = None
    rounding_penalty: float = 0.01
    observer: str = "minmax"
    percentiles: list[float] = field(default_factory=lambda: [0.01, 99.99])
    momentum: float = 0.05
    norm: float = 2.4
    sigmas: float = 3.0
    range: str = "fixed"
    range_decay: float = 2e-4
    gradient: str = "clipped_ste"
    gradient_strength: list[float] | None = None
    refresh: int = 1
    subspaces: int = 1

    @property
    def quantized(self) -> bool:
        """Whether anything is done at all."""
        return self.bits is not None

    def takes_sign(self, nonnegative: bool = False) -> bool:
        """Whether the grid has negative values; `nonnegative` says that the tensor has none."""
        if self.signed is not None:
            return self.signed
        return self.symmetric and not (nonnegative and FORMATS[self.format].unsigned)

    def bounds(self, nonnegative: bool = False) -> tuple[int, int]:
        """(quant_min, quant_max) of an integer grid; `nonnegative` says that values cannot be below zero."""
        if self.bits is None:
            raise ValueError("a scheme with bits=None has no integer range")
        return int_range(self.bits, self.takes_sign(nonnegative), self.narrow_range)

    def describe(self) -> str:
        """One phrase for tables: `int4 symmetric channel, learned (mse)`."""
        if self.bits is None:
            return "float"
        kind = FORMATS[self.format]
        name = self.format if len(kind.bits) == 1 else f"{self.bits}-bit {self.format}"
        name = f"int{self.bits}" if self.format == "int" else name
        if kind.unit_scale:
            return name
        size = {Granularity.group: f" {self.group_size}", Granularity.block: f" {self.block_size}"}
        symmetry = "" if self.format != "int" else " symmetric" if self.symmetric else " affine"
        where = f"{name}{symmetry} {self.granularity.value}{size.get(self.granularity, '')}"
        if kind.fitted:
            return f"{where}, {self.range}"
        return f"{where}, {self.range} ({self.observer})"


def override(scheme: TensorScheme, changes: Mapping[str, Any], where: str) -> TensorScheme:
    """A copy of `scheme` with some fields changed; enum fields may be given by name.

    Raises:
        ValueError: an unknown field, or an unknown name of an enum.
    """
    check_names(changes, TensorScheme, where)
    values = dict(changes)
    if isinstance(values.get("granularity"), str):
        names = {member.name: member for member in Granularity}
        values["granularity"] = choice(f"{where}.granularity", values["granularity"], names)
    for name in ("percentiles", "block_size", "gradient_strength"):
        if values.get(name) is not None:
            values[name] = list(values[name])
    return dataclasses.replace(scheme, **values)


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


def check_names(data: Mapping[str, Any], kind: type, where: str) -> None:
    """Refuse keys that are no fields of the dataclass `kind`, and what has no keys at all."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}={data!r} names no fields; give some, as {{bits: 8}}; {{bits: null}} leaves it float")
    for name in data:
        choice(f"{where}: field", name, [f.name for f in dataclasses.fields(kind)])
