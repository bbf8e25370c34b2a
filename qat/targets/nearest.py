"""The scheme nearest to a given one that a kernel takes."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from qat.ranges import RANGES
from qat.scheme import Granularity, TensorScheme
from qat.scheme.checks import Refusal, refusals
from qat.scheme.tensor import override
from qat.targets.limits import Kernel, Limits

COST = {"format": 12.0, "bits": 3.0, "granularity": 4.0, "symmetric": 2.0, "range": 2.0}
"""How far a change of a field leads; 1 for the others."""
FLOAT = 12.0
"""How far it is from float to integers; back, twice as far, and ten times for weights: the layer would be float."""


class Change(NamedTuple):
    """A field of a scheme that a kernel does not take.

    Attributes:
        field: its name.
        value: what it takes.
        words: what the target does, for messages: `takes at most 7 bits for weights`.
    """

    field: str
    value: Any
    words: str


class Way(NamedTuple):
    """How a layer can run.

    Attributes:
        kernel: what runs it.
        weight, activation: what has to change for that, field -> value; empty: nothing.
        first: the role and the change that a message names; None if nothing has to change.
    """

    kernel: Kernel
    weight: dict[str, Any]
    activation: dict[str, Any]
    first: tuple[str, Change] | None


def nearest(kernels: Sequence[Kernel], weight: TensorScheme, activation: TensorScheme) -> Way | None:
    """The way to run a layer with the fewest changes; None if no kernel takes anything like it."""
    best: tuple[float, Way] | None = None
    for kernel in kernels:
        limits = kernel.activation
        new_weight = adapted(kernel.weight, weight, "weight")
        new_activation = activation if limits is None else adapted(limits, activation, "activation")
        if new_weight is None or new_activation is None:
            continue
        cost = _cost(weight, new_weight, 10 * FLOAT) + _cost(activation, new_activation, 2 * FLOAT)
        if best is None or cost < best[0]:
            found = [("weight", change) for change in breaches(kernel.weight, weight, "weight")]
            if limits is not None:
                found += [("activation", change) for change in breaches(limits, activation, "activation")]
            changed = changes(weight, new_weight), changes(activation, new_activation)
            best = cost, Way(kernel, *changed, found[0] if found else None)
    return None if best is None else best[1]


def adapted(limits: Limits, scheme: TensorScheme, role: str) -> TensorScheme | None:
    """The scheme, changed as little as `limits` ask for, and valid in itself; None if there is none."""
    for _ in range(12):
        breach = next(breaches(limits, scheme, role), None)
        if breach is not None:
            scheme = _with(scheme, breach.field, breach.value)
            continue
        refusal = next(refusals(scheme, role), None)
        if refusal is None:
            return scheme
        scheme = _mended(scheme, refusal, limits, role)
    return None


def breaches(limits: Limits, scheme: TensorScheme, role: str) -> Iterator[Change]:
    """The fields of a scheme that `limits` do not take."""
    if not limits.quantized:
        if scheme.quantized:
            yield Change("bits", None, f"takes {role}s in float")
        return
    names = ", ".join(limits.formats)
    if scheme.format not in limits.formats:
        usual = "int" if "int" in limits.formats else next(iter(limits.formats))
        yield Change("format", usual, f"takes {role}s as {names}")
        return
    yield from _bits(limits, scheme, role)
    if scheme.format == "int":
        for name, wanted in (("symmetric", limits.symmetric), ("signed", limits.signed)):
            is_so = scheme.takes_sign(nonnegative=True) if name == "signed" else scheme.symmetric
            if wanted is not None and is_so != wanted:
                yield Change(name, wanted, f"takes {'' if wanted else 'no '}{name} {role}s")
        if limits.narrow and scheme.bits == 8 and not scheme.narrow_range:
            yield Change("narrow_range", True, f"takes {role}s from -127 to 127")
        if limits.narrow is False and scheme.narrow_range:
            yield Change("narrow_range", False, f"takes {role}s of all {2 ** (scheme.bits or 0)} integers")
    if scheme.granularity.value not in limits.granularities:
        usual = limits.granularities[0]
        yield Change("granularity", Granularity(usual), f"takes {role}s with a scale a {usual}")
    elif scheme.granularity is Granularity.group and limits.group_sizes and scheme.group_size not in limits.group_sizes:
        sizes = limits.group_sizes
        close = min(sizes, key=lambda size: abs(size - (scheme.group_size or sizes[0])))
        yield Change("group_size", close, f"takes groups of {', '.join(map(str, sizes))} {role}s")
    elif role == "weight" and (scheme.axis or 0) != 0 and "token" not in limits.granularities:
        yield Change("axis", None, "takes a scale an output channel")
    elif role == "activation" and scheme.granularity is Granularity.group and scheme.axis not in (None, -1):
        yield Change("axis", None, "takes groups along the last axis, which a linear layer sums")
    if limits.ranges != "any" and role == "activation" and RANGES[scheme.range].dynamic != (limits.ranges == "dynamic"):
        kind = "computed as they come" if limits.ranges == "dynamic" else "known beforehand"
        yield Change("range", "dynamic" if limits.ranges == "dynamic" else "running", f"takes ranges that are {kind}")


def _bits(limits: Limits, scheme: TensorScheme, role: str) -> Iterator[Change]:
    valid = limits.formats[scheme.format]
    if role == "weight" and RANGES[scheme.range].odd:
        valid = tuple(bits - 1 for bits in valid if bits > 1)  # its levels are odd integers of one bit more
    if scheme.bits is None:
        yield Change("bits", valid[-1], f"does not take {role}s in float")
    elif scheme.bits not in valid:
        close = max((bits for bits in valid if bits < scheme.bits), default=valid[0])
        words = f"at most {close}" if scheme.bits > valid[-1] else ", ".join(map(str, valid))
        yield Change("bits", close, f"takes {words} bits for {role}s")


def _with(scheme: TensorScheme, name: str, value: Any) -> TensorScheme:
    """A change, and what has no meaning with it."""
    new = dataclasses.replace(scheme, **{name: value})
    if name == "granularity":
        new = dataclasses.replace(new, group_size=None, block_size=None, axis=None, allow_padding=False)
    if name == "format" and value == "int" and not new.quantized:
        new = dataclasses.replace(new, bits=None)
    if name == "bits" and value is None:
        new = dataclasses.replace(new, format="int")
    return new


def _mended(scheme: TensorScheme, refusal: Refusal, limits: Limits, role: str) -> TensorScheme:
    """The first advice of a refusal that stays within the limits, or else the first."""
    options = [override(scheme, _parsed(use), "scheme") for use in refusal.use]
    return next((new for new in options if not any(breaches(limits, new, role))), options[0] if options else scheme)


def _parsed(use: str) -> dict[str, Any]:
    """`bits=4 range=dynamic` as data."""
    words: dict[str, Any] = {"null": None, "true": True, "false": False}
    found: dict[str, Any] = {}
    for change in use.split(" "):
        name, _, text = change.partition("=")
        if text.startswith("["):
            found[name] = [int(number) for number in text.strip("[]").split(",")]
        else:
            found[name] = words[text] if text in words else int(text) if text.lstrip("-").isdigit() else text
    return found


def changes(old: TensorScheme, new: TensorScheme) -> dict[str, Any]:
    """The fields in which `new` differs."""
    names = (field.name for field in dataclasses.fields(TensorScheme))
    return {name: getattr(new, name) for name in names if getattr(new, name) != getattr(old, name)}


def _cost(old: TensorScheme, new: TensorScheme, to_float: float) -> float:
    if old.quantized != new.quantized:
        return FLOAT if new.quantized else to_float
    cost = sum(COST.get(name, 1.0) for name in changes(old, new))
    return cost + abs((old.bits or 0) - (new.bits or 0)) / 4
