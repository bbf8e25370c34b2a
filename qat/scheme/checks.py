"""What a scheme may say: every refusal names the field, its value, the reason, and what to write instead."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from qat.numerics.formats import FORMATS
from qat.numerics.gradients import GRADIENTS
from qat.numerics.rounding import ROUNDING
from qat.observers import OBSERVERS
from qat.ranges import RANGES
from qat.scheme.tensor import Granularity, TensorScheme, choice

TABLES: dict[str, Mapping[str, Any]] = {
    "format": FORMATS, "rounding": ROUNDING, "observer": OBSERVERS, "range": RANGES, "gradient": GRADIENTS
}  # fmt: skip
"""Field -> the table that it is a key of."""


class Refusal:
    """A field whose value does not go with the others.

    Args:
        field: the field.
        why: the reason.
        use: what would be valid, `field=value` with spaces between several; the alternatives, best first.
        advice: words in place of `use`.
    """

    def __init__(self, field: str, why: str, *use: str, advice: str = "") -> None:
        self.field, self.why, self.use, self.advice = field, why, use, advice

    def message(self, scheme: TensorScheme, where: str) -> str:
        """As an error says it; `where` is the path of the scheme."""
        ways = [" ".join(f"{where}.{change}" for change in way.split(" ")) for way in self.use]
        advice = self.advice or f"use {', or '.join(ways)}"
        return f"{where}.{self.field}={shown(getattr(scheme, self.field))}: {self.why}; {advice}"


def check_scheme(scheme: TensorScheme, where: str, role: str) -> None:
    """Check one scheme.

    Args:
        scheme: the scheme.
        where: its path in the configuration, for the message.
        role: `weight` or `activation`.

    Raises:
        ValueError: names the field, its value and what would be valid.
    """
    for name, table in TABLES.items():
        choice(f"{where}.{name}", getattr(scheme, name), table)
    for refusal in refusals(scheme, role):
        raise ValueError(refusal.message(scheme, where))


def refusals(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    """Everything in a scheme that does not go together, the most telling first."""
    for check in CHECKS:
        yield from check(scheme, role)


def keeps_tensor_scale(scheme: TensorScheme, role: str) -> bool:
    """Whether a scale of the tensor is kept, and those of its blocks are computed with it (`Format.block_scales`)."""
    rule, grouped = RANGES[scheme.range], scheme.granularity is Granularity.group
    two_levels = FORMATS[scheme.format].block_scales is not None
    return role == "activation" and two_levels and grouped and not (rule.dynamic or rule.learned)


def shown(value: object) -> object:
    """A field's value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.value if isinstance(value, Granularity) else value


def _numbers(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    low, high = scheme.percentiles if len(scheme.percentiles) == 2 else (1.0, 0.0)
    if not 0 <= low < high <= 100:
        yield Refusal("percentiles", "not a range", advice="give [low, high] with 0 <= low < high <= 100")
    if not 0 < scheme.momentum <= 1:
        yield Refusal("momentum", "not a share", advice="give a number in (0, 1]")
    for name, usual in (("norm", 2.4), ("sigmas", 3), ("rounding_penalty", 0.01)):
        if not 0 < getattr(scheme, name) < math.inf:
            yield Refusal(name, "not positive", advice=f"give a positive number, for example {usual}")
    if not 0 <= scheme.range_decay < math.inf:
        yield Refusal("range_decay", "negative", advice="give a number from 0 up, for example 0.0002")
    if scheme.refresh < 1:
        yield Refusal("refresh", "not positive", advice="give a number of steps, for example 10")
    if scheme.subspaces < 1 or (scheme.subspaces > 1 and not FORMATS[scheme.format].vectors):
        yield Refusal("subspaces", "it divides the inputs of format=product", "subspaces=1")
    strength = scheme.gradient_strength
    if strength is not None and (len(strength) != 2 or not all(0 < s < math.inf for s in strength)):
        yield Refusal("gradient_strength", "not a pair", advice="give [first, last], two positive numbers, or null")


def _bits(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    bits, valid = scheme.bits, FORMATS[scheme.format].bits
    if bits is None:
        return
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in valid:
        words = str(valid[0]) if len(valid) == 1 else f"{valid[0]} to {valid[-1]}"
        near = min(valid, key=lambda b: abs(b - bits)) if isinstance(bits, int) else valid[-1]
        yield Refusal("bits", f"{scheme.format} {role}s have {words} bits, null leaves them float", f"bits={near}")
    if scheme.format == "int" and bits == 1 and scheme.takes_sign():
        binary = "format=binary range=dynamic granularity=channel"
        instead = binary if role == "weight" and scheme.symmetric else "signed=false"
        yield Refusal("bits", "a signed integer of 1 bit has no positive level", instead, "bits=2")


def _sign(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    kind = FORMATS[scheme.format]
    if scheme.format != "int":
        if not scheme.symmetric:
            yield Refusal("symmetric", f"the format {scheme.format} has no zero point", "symmetric=true", "format=int")
        if scheme.signed is not None and not (kind.unsigned and role == "activation"):
            yield Refusal("signed", f"the format {scheme.format} has values of both signs", "signed=null")
    if scheme.signed is False and scheme.symmetric and role == "weight":
        yield Refusal("signed", "an unsigned symmetric grid cannot hold negative weights", "symmetric=false")


def _fitted(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    kind, granularity, rule = FORMATS[scheme.format], scheme.granularity, RANGES[scheme.range]
    if kind.fitted is None:
        return
    if role == "activation":
        yield Refusal("format", "a format of weights: its levels are fitted to values that are all known", "format=int")
    if kind.grid is not None:
        if not rule.dynamic:
            yield Refusal("range", f"the scale of {scheme.format} weights is a mean of theirs", "range=dynamic")
        if granularity is Granularity.block:
            yield Refusal("granularity", f"{scheme.format} weights have a scale a tensor, channel or group",
                          "granularity=channel block_size=null")  # fmt: skip
        if granularity is Granularity.group and scheme.allow_padding:
            yield Refusal("allow_padding", "a mean over a short group would count what fills it", "allow_padding=false")
    elif not rule.tables:
        yield Refusal("range", "a table of entries is learned, or stays as calibrated", "range=learned", "range=fixed")
    if kind.grid is None and not kind.vectors and granularity is Granularity.group:
        yield Refusal("granularity", "a table a group would be larger than its weights",
                      "granularity=block block_size=[16,-1] group_size=null", "granularity=channel")  # fmt: skip
    if kind.vectors and granularity is not Granularity.group:
        yield Refusal("granularity", "product quantization encodes vectors of group_size weights",
                      "granularity=group group_size=4 block_size=null")  # fmt: skip
    if not GRADIENTS[scheme.gradient].straight:
        yield Refusal("gradient", "levels that are fitted to the values pass gradients straight through",
                      "gradient=ste")  # fmt: skip


def _granularity(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    kind, granularity, dynamic = FORMATS[scheme.format], scheme.granularity, RANGES[scheme.range].dynamic
    no_effect = f"it has no effect with granularity={granularity.value}"
    if granularity is Granularity.block and role == "activation":
        yield Refusal("granularity", "blocks are tiles of a weight's matrix",
                      "granularity=group group_size=32 block_size=null range=dynamic")  # fmt: skip
    if granularity is Granularity.token and role == "weight":
        yield Refusal("granularity", "weights have no tokens", "granularity=channel")
    if granularity is Granularity.group:
        if scheme.group_size is None or scheme.group_size < 1:
            size = kind.block or 32
            yield Refusal("group_size", "granularity=group needs a positive group_size", f"group_size={size}")
    elif scheme.group_size is not None and kind.block is None:
        yield Refusal("group_size", no_effect, "group_size=null", "granularity=group")
    if granularity is Granularity.block:
        size_2d = scheme.block_size
        if size_2d is None or len(size_2d) != 2 or not all(n == -1 or n >= 1 for n in size_2d):
            yield Refusal("block_size", "granularity=block needs [rows, columns], -1 for all", "block_size=[16,16]")
    elif scheme.block_size is not None:
        yield Refusal("block_size", no_effect, "block_size=null", "granularity=block")
    if scheme.axis is not None and granularity not in (Granularity.channel, Granularity.group):
        yield Refusal("axis", no_effect, "axis=null", "granularity=channel")
    if scheme.axis is not None and granularity is Granularity.group and role == "weight":
        yield Refusal("axis", "groups of a weight lie along its inputs", "axis=null")
    if kind.unit_scale and granularity not in (Granularity.tensor, Granularity.channel):
        yield Refusal("granularity", f"{scheme.format} has no scale",
                      "granularity=tensor group_size=null block_size=null")  # fmt: skip
    differ = granularity in (Granularity.token, Granularity.group) and not keeps_tensor_scale(scheme, role)
    if role == "activation" and differ and not dynamic:
        yield Refusal("granularity", f"{granularity.value}s differ from batch to batch, so their ranges are not kept",
                      "range=dynamic", "granularity=tensor")  # fmt: skip


def _ranges(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    kind, name, rule = FORMATS[scheme.format], scheme.range, RANGES[scheme.range]
    if role not in rule.roles:
        yield Refusal("range", f"{name} is made for {' and '.join(rule.roles)}s", "range=lsq")
    if rule.formats == "int" and scheme.format != "int":
        yield Refusal("range", f"{name} is defined for integers", "range=lsq symmetric=true", "format=int")
    if rule.affine is True and scheme.symmetric:
        yield Refusal("range", f"{name} learns a zero point", "symmetric=false", "range=lsq")
    if rule.affine is False and not scheme.symmetric:
        unsigned = role == "weight" and scheme.signed is False  # only affine weights are
        instead = "symmetric=true signed=null" if unsigned else "symmetric=true"
        yield Refusal("range", f"{name} has no zero point", instead, "range=lsq_plus")
    if rule.odd and role == "weight":
        if scheme.bits == 1:
            yield Refusal("range", "DoReFa's weights of 1 bit are sign(w) mean|w|", "format=binary range=dynamic")
        if scheme.bits is not None and scheme.bits > 7:
            yield Refusal("bits", "DoReFa's levels are odd integers of one bit more, which have to fit in 8",
                          "bits=7", "range=dynamic")  # fmt: skip
        if scheme.granularity not in (Granularity.tensor, Granularity.channel):
            yield Refusal("granularity", f"range={name} squashes a whole layer or channel",
                          "granularity=tensor group_size=null block_size=null")  # fmt: skip
    if kind.unit_scale and (rule.learned or rule.follows):
        yield Refusal("range", f"{scheme.format} has no scale to choose", "range=fixed")
    grouped = scheme.granularity is Granularity.group and scheme.group_size == kind.block
    computed = rule.dynamic or keeps_tensor_scale(scheme, role)
    if kind.block is not None and not (computed and grouped):
        yield Refusal("format", f"blocks of {kind.block} values have scales of their own, computed from them",
                      f"granularity=group group_size={kind.block} block_size=null range=dynamic")  # fmt: skip
    if OBSERVERS[scheme.observer].integers and scheme.format != "int":
        instead = "observer=minmax" if keeps_tensor_scale(scheme, role) else "observer=mse"
        yield Refusal("observer", f"{scheme.observer} counts the levels of integers", instead)
    elif OBSERVERS[scheme.observer].weighs and keeps_tensor_scale(scheme, role):
        yield Refusal("observer", "levels are those of blocks, and a range of the whole tensor is kept",
                      "observer=minmax")  # fmt: skip
    if scheme.observer != "minmax" and (kind.unit_scale or kind.fitted):
        yield Refusal("observer", f"the format {scheme.format} observes no range", "observer=minmax")


def _rounding(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    kind, rounding, rule = FORMATS[scheme.format], scheme.rounding, RANGES[scheme.range]
    if role == "activation" and ROUNDING[rounding].ties is None:
        yield Refusal("rounding", "activations are rounded by the runtime, and runtimes (ONNX QuantizeLinear) round to "
                      "'nearest' (did you mean quant.weight.rounding?)", "rounding=nearest")  # fmt: skip
    plain = scheme.format == "int" and scheme.granularity is Granularity.tensor and not rule.dynamic
    if role == "activation" and ROUNDING[rounding].ties == "up" and not plain:
        yield Refusal("rounding", "runtimes in fixed point round so, and take integers with one known scale",
                      "rounding=nearest")  # fmt: skip
    if kind.fitted and rounding != "nearest":
        yield Refusal("rounding", f"{scheme.format} takes the nearest entry", "rounding=nearest")
    if ROUNDING[rounding].powers:
        if rule.learned:
            yield Refusal("rounding", "the gradient of a learned scale holds only for rounding to a neighbouring level",
                          "range=dynamic symmetric=true", "rounding=nearest")  # fmt: skip
        if not kind.powers or rule.odd:
            yield Refusal("rounding", "powers of two are not levels of this scheme", "rounding=nearest", "format=pow2")
    seed, random = scheme.rounding_seed, ROUNDING[rounding].settled or GRADIENTS[scheme.gradient].noisy
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31):
        yield Refusal("rounding_seed", "not a seed", advice="give an integer from 0 to 2147483647, or null")
    if seed is not None and not random:
        yield Refusal("rounding_seed", f"rounding={rounding} draws nothing", "rounding_seed=null")
    if ROUNDING[rounding].learned:
        if scheme.format != "int" or rule.learned or rule.follows or rule.odd:
            yield Refusal("rounding", "it is learned on integers of a range that stays", "rounding=nearest",
                          "format=int range=fixed")  # fmt: skip
        if scheme.gradient != "clipped_ste":
            yield Refusal("rounding", "it has a gradient of its own", "gradient=clipped_ste")


def _gradient(scheme: TensorScheme, role: str) -> Iterator[Refusal]:
    gradient, rule, kind = scheme.gradient, RANGES[scheme.range], GRADIENTS[scheme.gradient]
    if kind.of_scale and not rule.scaled:
        yield Refusal("gradient", f"it is that of a scale learned by LSQ, and range={scheme.range}",
                      "gradient=clipped_ste", "range=lsq")  # fmt: skip
    if kind.noisy and ROUNDING[scheme.rounding].ties is None:
        yield Refusal("gradient", "noise takes the place of rounding", "rounding=nearest", "gradient=clipped_ste")
    if kind.soft and ROUNDING[scheme.rounding].powers:
        yield Refusal("gradient", "a soft staircase needs steps between neighbouring levels", "gradient=clipped_ste")
    if not kind.clipped and not rule.residual:
        yield Refusal("gradient", f"range={scheme.range} learns from clipped values", "gradient=clipped_ste")
    if scheme.gradient_strength is not None and kind.strengths is None:
        yield Refusal("gradient_strength", f"gradient={gradient} has none", "gradient_strength=null", "gradient=dsq")


CHECKS: tuple[Callable[[TensorScheme, str], Iterable[Refusal]], ...] = (
    _numbers, _bits, _sign, _fitted, _granularity, _ranges, _rounding, _gradient
)  # fmt: skip
"""Each gives the refusals of one concern; the first of all is raised."""
