"""What a scheme may say: every refusal names the field, its value, the reason, and what to write instead."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qat.numerics.formats import FORMATS
from qat.numerics.gradients import GRADIENTS
from qat.numerics.rounding import ROUNDING
from qat.observers import OBSERVERS
from qat.ranges import RANGES
from qat.scheme.tensor import Granularity, TensorScheme, choice


class Refusal(NamedTuple):
    """Why a field's value does not go with the others, and what would."""

    field: str
    why: str


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
    for check in CHECKS:
        for refusal in check(scheme, role, where):
            raise ValueError(f"{where}.{refusal.field}={shown(getattr(scheme, refusal.field))}: {refusal.why}")


def shown(value: object) -> object:
    """A field's value as one writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return value.value if isinstance(value, Granularity) else value


TABLES = {"format": FORMATS, "rounding": ROUNDING, "observer": OBSERVERS, "range": RANGES, "gradient": GRADIENTS}
"""Field -> the table that it is a key of."""


def _numbers(scheme: TensorScheme, role: str, where: str) -> Iterator[Refusal]:
    low, high = scheme.percentiles if len(scheme.percentiles) == 2 else (1.0, 0.0)
    if not 0 <= low < high <= 100:
        yield Refusal("percentiles", "give [low, high] with 0 <= low < high <= 100")
    if not 0 < scheme.momentum <= 1:
        yield Refusal("momentum", "give a number in (0, 1]")
    for name, usual in (("norm", 2.4), ("sigmas", 3), ("rounding_penalty", 0.01)):
        if not 0 < getattr(scheme, name) < math.inf:
            yield Refusal(name, f"give a positive number, for example {usual}")
    if scheme.refresh < 1:
        yield Refusal("refresh", "give a number of steps, for example 100")
    if scheme.subspaces < 1 or (scheme.subspaces > 1 and scheme.format != "product"):
        yield Refusal("subspaces", "it divides the inputs of format=product; give a positive number there, 1 elsewhere")
    strength = scheme.gradient_strength
    if strength is not None and (len(strength) != 2 or not all(0 < s < math.inf for s in strength)):
        yield Refusal("gradient_strength", "give [first, last], two positive numbers, for example [1.0, 10.0], or null")


def _bits(scheme: TensorScheme, role: str, where: str) -> Iterator[Refusal]:
    bits, valid = scheme.bits, FORMATS[scheme.format].bits
    if bits is None:
        return
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in valid:
        words = str(valid[0]) if len(valid) == 1 else f"{valid[0]} to {valid[-1]}"
        near = min(valid, key=lambda b: abs(b - bits)) if isinstance(bits, int) else valid[-1]
        yield Refusal("bits", f"an {scheme.format} {role} has {words} bits; use {where}.bits={near}, or null to leave it "
                              f"float")  # fmt: skip
    if scheme.format == "int" and bits == 1:
        if role == "weight" and scheme.symmetric:
            yield Refusal("bits", f"a symmetric integer of 1 bit has no positive level; use {where}.format=binary, or "
                                  f"{where}.bits=2")  # fmt: skip
        if role == "activation" and scheme.symmetric and scheme.signed is not False:
            yield Refusal("bits", f"a symmetric signed integer of 1 bit has no positive level; use {where}.signed=false "
                                  f"(levels 0 and 1), or {where}.bits=2")  # fmt: skip


def _sign(scheme: TensorScheme, role: str, where: str) -> Iterator[Refusal]:
    kind = FORMATS[scheme.format]
    if scheme.format != "int":
        if not scheme.symmetric:
            yield Refusal("symmetric", f"the format {scheme.format} has no zero point; use {where}.symmetric=true, or "
                                       f"{where}.format=int")  # fmt: skip
        if scheme.signed is not None and not (kind.unsigned and role == "activation"):
            yield Refusal("signed", f"the format {scheme.format} has values of both signs; use {where}.signed=null")
    if scheme.signed is False and scheme.symmetric and role == "weight":
        yield Refusal("signed", f"an unsigned symmetric grid cannot hold negative weights; use {where}.symmetric=false")


def _granularity(scheme: TensorScheme, role: str, where: str) -> Iterator[Refusal]:
    kind, granularity = FORMATS[scheme.format], scheme.granularity
    if granularity is Granularity.group:
        if scheme.group_size is None or scheme.group_size < 1:
            yield Refusal("group_size", f"granularity=group needs a positive group_size, for example "
                                        f"{where}.group_size={kind.block or 32}")  # fmt: skip
    elif scheme.group_size is not None and kind.block is None and kind.fitted != "product":
        yield Refusal("group_size", f"it has no effect with granularity={granularity.value}; use granularity=group, or "
                                    f"group_size=null")  # fmt: skip
    if granularity is Granularity.block:
        size = scheme.block_size
        if size is None or len(size) != 2 or not all(n == -1 or n >= 1 for n in size):
            yield Refusal("block_size", f"granularity=block needs [rows, columns], -1 for all, for example "
                                        f"'{where}.block_size=[16,16]'")  # fmt: skip
        if role == "activation":
            yield Refusal("granularity", f"blocks are tiles of a weight's matrix; for activations use {where}."
                                         f"granularity=group")  # fmt: skip
    elif scheme.block_size is not None:
        yield Refusal("block_size", f"it has no effect with granularity={granularity.value}; use granularity=block, or "
                                    f"block_size=null")  # fmt: skip
    if granularity is Granularity.token and role == "weight":
        yield Refusal("granularity", f"weights have no tokens; use {where}.granularity=channel")
    if role == "activation" and granularity in (Granularity.token, Granularity.group) and scheme.range != "dynamic":
        yield Refusal("granularity", f"the number of {granularity.value}s differs from batch to batch, so their ranges "
                                     f"cannot be kept; use {where}.range=dynamic, or {where}.granularity=tensor")  # fmt: skip
    if scheme.axis is not None and granularity not in (Granularity.channel, Granularity.group):
        yield Refusal("axis", f"it has no effect with granularity={granularity.value}; use granularity=channel, or "
                              f"axis=null")  # fmt: skip
    if scheme.axis is not None and granularity is Granularity.group and role == "weight":
        yield Refusal("axis", "groups of a weight lie along its inputs; use axis=null")
    if kind.unit_scale and granularity not in (Granularity.tensor, Granularity.channel):
        yield Refusal("granularity", f"{scheme.format} has no scale; use {where}.granularity=tensor")


def _ranges(scheme: TensorScheme, role: str, where: str) -> Iterator[Refusal]:
    kind, name, rule = FORMATS[scheme.format], scheme.range, RANGES[scheme.range]
    if role not in rule.roles:
        yield Refusal("range", f"{name} is made for {' and '.join(rule.roles)}s; use {where}.range=lsq")
    if rule.formats == "int" and scheme.format != "int":
        yield Refusal("range", f"{name} is defined for integers; use {where}.format=int, or {where}.range=lsq")
    if rule.affine is True and scheme.symmetric:
        yield Refusal("range", f"{name} learns a zero point; use {where}.symmetric=false, or {where}.range=lsq")
    if rule.affine is False and not scheme.symmetric:
        yield Refusal("range", f"{name} has no zero point; use {where}.symmetric=true, or {where}.range=lsq_plus")
    if name == "dorefa":
        if role == "weight" and scheme.bits == 1:
            yield Refusal("range", f"DoReFa's 1-bit weights are sign(w) mean|w|; use {where}.format=binary with "
                                   f"{where}.range=dynamic")  # fmt: skip
        if role == "weight" and scheme.bits is not None and scheme.bits > 7:
            yield Refusal("bits", f"its levels are odd numbers of one bit more, which has to fit 8; use {where}.bits=7, or "
                                  f"{where}.range=dynamic")  # fmt: skip
        if role == "weight" and scheme.granularity not in (Granularity.tensor, Granularity.channel):
            yield Refusal("granularity", f"range=dorefa squashes a whole layer or channel; use {where}.granularity=tensor")
    if kind.unit_scale and name not in ("fixed", "dynamic"):
        yield Refusal("range", f"{scheme.format} has no scale to choose; use {where}.range=fixed")
    if kind.block is not None and (
        name != "dynamic" or scheme.granularity is not Granularity.group or scheme.group_size != kind.block
    ):
        yield Refusal("format", f"blocks of {kind.block} values have scales of their own, computed from them; give {where}."
                                f"granularity=group {where}.group_size={kind.block} {where}.range=dynamic")  # fmt: skip
    if scheme.observer == "entropy" and scheme.format != "int":
        yield Refusal("observer", f"entropy counts the levels of integers; use {where}.observer=mse")
    if scheme.observer != "minmax" and (kind.unit_scale or kind.fitted):
        yield Refusal("observer", f"the format {scheme.format} does not observe a range; use {where}.observer=minmax")


def _fitted(scheme: TensorScheme, role: str, where: str) -> Iterator[Refusal]:
    kind = FORMATS[scheme.format].fitted
    if kind is None:
        return
    if role == "activation":
        yield Refusal("format", f"{scheme.format} is a format of weights: its levels are fitted to values that are all "
                                f"known; use {where}.format=int")  # fmt: skip
    if kind in ("binary", "ternary"):
        if scheme.range != "dynamic":
            yield Refusal("range", f"the scale of {scheme.format} weights is a mean of theirs; use {where}.range=dynamic")
        if scheme.granularity is Granularity.block:
            yield Refusal("granularity", f"{scheme.format} weights have a scale a tensor, channel or group; use {where}."
                                         f"granularity=channel")  # fmt: skip
        if scheme.granularity is Granularity.group and scheme.allow_padding:
            yield Refusal("allow_padding", f"a mean over a short group would count what fills it; use {where}."
                                           f"granularity=channel")  # fmt: skip
    elif scheme.range not in ("fixed", "learned", "lsq"):
        yield Refusal("range", f"a table of entries is learned from the data (learned) or stays as calibrated (fixed); use "
                               f"{where}.range=learned")  # fmt: skip
    if kind == "codebook" and scheme.granularity is Granularity.group:
        yield Refusal("granularity", f"a table for {scheme.group_size} weights would be larger than they are; use {where}."
                                     f"granularity=tensor, channel, or block with '{where}.block_size=[16,-1]' (16 "
                                     f"channels a table)")  # fmt: skip
    if kind == "product" and scheme.granularity is not Granularity.group:
        yield Refusal("granularity", f"product quantization encodes vectors of group_size weights; use {where}.granularity="
                                     f"group {where}.group_size=4")  # fmt: skip
    if scheme.gradient not in ("ste", "clipped_ste"):
        yield Refusal("gradient", f"levels that are fitted to the values pass gradients straight through; use {where}."
                                  f"gradient=ste")  # fmt: skip


def _rounding(scheme: TensorScheme, role: str, where: str) -> Iterator[Refusal]:
    kind, rounding = FORMATS[scheme.format], scheme.rounding
    if role == "activation" and rounding != "nearest":
        yield Refusal("rounding", "activations are rounded by the runtime, and runtimes (ONNX QuantizeLinear) round to "
                                  "'nearest'; did you mean quant.weight.rounding?")  # fmt: skip
    if kind.fitted and rounding != "nearest":
        yield Refusal("rounding", f"{scheme.format} takes the nearest entry; use {where}.rounding=nearest")
    if rounding == "logarithmic":
        if RANGES[scheme.range].learned:
            yield Refusal("rounding", f"the gradient of a learned scale holds only for rounding to a neighbouring level; "
                                      f"use {where}.range=dynamic, or {where}.rounding=nearest")  # fmt: skip
        if scheme.format not in ("int", "pow2") or scheme.range == "dorefa":
            yield Refusal("rounding", f"powers of two are not levels of this scheme; use {where}.format=pow2, or "
                                      f"{where}.rounding=nearest")  # fmt: skip
    if rounding == "adaptive" and (scheme.format != "int" or scheme.range not in ("fixed", "dynamic")):
        yield Refusal("rounding", f"it is learned on integers of a range that stays; use {where}.format=int with {where}."
                                  f"range=fixed, or {where}.rounding=nearest")  # fmt: skip
    if rounding == "adaptive" and scheme.gradient != "clipped_ste":
        yield Refusal("rounding", f"it has a gradient of its own; use {where}.gradient=clipped_ste")


def _gradient(scheme: TensorScheme, role: str, where: str) -> Iterator[Refusal]:
    gradient, rule = scheme.gradient, RANGES[scheme.range]
    if gradient == "lsq" and scheme.range not in ("learned", "lsq", "lsq_plus"):
        yield Refusal("gradient", f"it is that of a scale learned by LSQ, and range={scheme.range}; use {where}.gradient="
                                  f"clipped_ste, or {where}.range=lsq")  # fmt: skip
    if GRADIENTS[gradient].noisy and scheme.rounding != "nearest":
        yield Refusal("gradient", f"noise takes the place of rounding; use {where}.rounding=nearest, or {where}."
                                  f"gradient=clipped_ste")  # fmt: skip
    if gradient == "dsq" and scheme.rounding == "logarithmic":
        yield Refusal("gradient", f"a soft staircase needs steps between neighbouring levels; use {where}."
                                  f"gradient=clipped_ste")  # fmt: skip
    if gradient == "ste" and rule.learned and not rule.residual:
        yield Refusal("gradient", f"range={scheme.range} learns from clipped values; use {where}.gradient=clipped_ste")
    if scheme.gradient_strength is not None and gradient not in ("ewgs", "dsq"):
        yield Refusal("gradient_strength", f"gradient={gradient} has none; use null, or {where}.gradient=dsq")


CHECKS: tuple[Callable[[TensorScheme, str, str], Iterator[Refusal]], ...] = (
    _numbers, _bits, _sign, _fitted, _granularity, _ranges, _rounding, _gradient,
)  # fmt: skip
