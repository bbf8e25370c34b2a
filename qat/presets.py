"""Named configurations: `qat.preset("w4a4_lsq")` in Python, `quant=w4a4_lsq` on the command line.

Each is what differs from the defaults of `QuantConfig`. What a preset does not name is left to the target.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Any

from qat.scheme import QuantConfig, choice, override
from qat.targets import TARGETS, Target, nearest

_EMA = {"range": "running", "observer": "ema"}
_LSQ = {"range": "learned", "observer": "mse"}
_ENDS_AT_8_BITS = [
    {"match": end, "weight": {"bits": 8}, "activation": {"bits": 8}} for end in ("first", "last")
]  # customary since Choi et al. 2018 (PACT): both ends are small, and sensitive
_INT8_ENDS = [{"match": end, "weight": {"format": "int", "bits": 8}} for end in ("first", "last")]
_WEIGHT = {"narrow_range": True, "granularity": "channel", "range": "dynamic"}
_TOKEN = {"bits": 8, "granularity": "token", "range": "dynamic"}


def _groups(bits: int, size: int) -> dict[str, Any]:
    """Weights in groups of `size` inputs that share a scale; the last group of a channel may be smaller."""
    return {**_WEIGHT, "bits": bits, "granularity": "group", "group_size": size, "allow_padding": True}


def _blocks(format: str, bits: int, size: int) -> dict[str, Any]:
    """Weights and activations in blocks of `size` inputs that share a scale."""
    blocks = {"format": format, "bits": bits, "granularity": "group", "group_size": size, "allow_padding": True}
    scheme = {**blocks, "range": "dynamic"}
    return {name: dict(scheme) for name in ("weight", "activation", "input")}


PRESETS: dict[str, dict[str, Any]] = {
    "off": {},
    "int8": {
        "weight": {**_WEIGHT, "bits": 8},
        "activation": {"bits": 8, **_EMA},
        "input": {"bits": 8, **_EMA},
    },
    "w8a8_asymmetric": {
        "weight": {**_WEIGHT, "bits": 8, "symmetric": False, "narrow_range": False},
        "activation": {"bits": 8, "symmetric": False, **_EMA},
        "input": {"bits": 8, "symmetric": False, **_EMA},
    },
    "w4a8": {
        "weight": {**_WEIGHT, "bits": 4},
        "activation": {"bits": 8, **_EMA},
        "input": {"bits": 8, **_EMA},
    },
    "w4a4": {
        "weight": {**_WEIGHT, "bits": 4},
        "activation": {"bits": 4, **_EMA},
        "input": {"bits": 8, **_EMA},
        "rules": _ENDS_AT_8_BITS,
    },
    "w4a4_lsq": {
        "weight": {**_WEIGHT, "bits": 4, "narrow_range": False, **_LSQ},
        "activation": {"bits": 4, **_LSQ},
        "input": {"bits": 8, **_EMA},
        "rules": _ENDS_AT_8_BITS,
    },
    "w2a2_lsq": {
        "weight": {**_WEIGHT, "bits": 2, "narrow_range": False, **_LSQ},
        "activation": {"bits": 2, **_LSQ},
        "input": {"bits": 8, **_EMA},
        "rules": _ENDS_AT_8_BITS,
    },
    "w4g32": {"weight": _groups(4, 32)},
    "w4g128": {"weight": _groups(4, 128)},
    "w2g32": {"weight": _groups(2, 32)},
    "w4g32a8_dynamic": {"weight": _groups(4, 32), "activation": _TOKEN, "input": _TOKEN},
    "w4g128a8_dynamic": {"weight": _groups(4, 128), "activation": _TOKEN, "input": _TOKEN},
    "w8a8_dynamic": {
        "weight": {**_WEIGHT, "bits": 8},
        "activation": _TOKEN,
        "input": _TOKEN,
    },
    "fp8": {
        "weight": {**_WEIGHT, "bits": 8, "format": "e4m3fn"},
        "activation": {"bits": 8, "format": "e4m3fn", **_EMA},
        "input": {"bits": 8, "format": "e4m3fn", **_EMA},
    },
    "mxfp8": _blocks("mxfp8_e4m3", 8, 32),
    "mxfp6": _blocks("mxfp6_e2m3", 6, 32),
    "mxfp4": _blocks("mxfp4", 4, 32),
    "mxint8": _blocks("mxint8", 8, 32),
    "nvfp4": _blocks("nvfp4", 4, 16),
    "apot4": {
        "weight": {**_WEIGHT, "bits": 4, "format": "apot", **_LSQ},
        "activation": {"bits": 4, "format": "apot", **_LSQ},
        "input": {"bits": 8, **_EMA},
        "rules": [{"match": "first", "weight": {"format": "int", "bits": 8}}],
    },
    "binary": {
        "weight": {**_WEIGHT, "bits": 1, "format": "binary"},
        "activation": {"bits": 8, **_EMA},
        "input": {"bits": 8, **_EMA},
        "rules": _INT8_ENDS,
    },
    "ternary": {
        "weight": {**_WEIGHT, "bits": 2, "format": "ternary"},
        "activation": {"bits": 8, **_EMA},
        "input": {"bits": 8, **_EMA},
        "rules": _INT8_ENDS,
    },
    "codebook4": {
        "weight": {"bits": 4, "format": "codebook", "granularity": "tensor", "range": "learned"},
    },
}
"""Name -> fields of QuantConfig."""

DESCRIPTIONS: dict[str, str] = {
    "off": "nothing is quantized",
    "int8": "8-bit weights (symmetric, per channel) and activations (symmetric, EMA ranges)",
    "w8a8_asymmetric": "8-bit affine weights and activations",
    "w4a8": "4-bit weights, 8-bit activations",
    "w4a4": "4-bit weights and activations, EMA ranges, first and last layer at 8 bits",
    "w4a4_lsq": "4-bit weights and activations with learned scales (LSQ), first and last layer at 8 bits",
    "w2a2_lsq": "2-bit weights and activations with learned scales (LSQ), first and last layer at 8 bits",
    "w4g32": "4-bit weights in groups of 32, float activations",
    "w4g128": "4-bit weights in groups of 128, float activations",
    "w2g32": "2-bit weights in groups of 32, float activations",
    "w4g32a8_dynamic": "4-bit weights in groups of 32; 8-bit activations with a range a token, computed as they come",
    "w4g128a8_dynamic": "4-bit weights in groups of 128; 8-bit activations with a range a token, computed as they come",
    "w8a8_dynamic": "8-bit weights; 8-bit activations with a range a token, computed as they come",
    "fp8": "float8 (e4m3fn) weights, per channel, and activations",
    "mxfp8": "OCP MXFP8 (e4m3fn, blocks of 32) weights and activations",
    "mxfp6": "OCP MXFP6 (e2m3, blocks of 32) weights and activations",
    "mxfp4": "OCP MXFP4 (e2m1, blocks of 32) weights and activations",
    "mxint8": "OCP MXINT8 (blocks of 32) weights and activations",
    "nvfp4": "NVFP4 (e2m1, blocks of 16 with float8 scales) weights and activations",
    "apot4": "4-bit additive powers of two with learned scales, input at 8 bits",
    "binary": "1-bit weights (XNOR-Net), 8-bit activations, first and last layer at 8 bits",
    "ternary": "ternary weights (TWN), 8-bit activations, first and last layer at 8 bits",
    "codebook4": "16 shared weights a layer (k-means, trained on), float activations",
}


def preset(name: str, target: str = "generic", **changes: Any) -> QuantConfig:
    """A named configuration.

    Args:
        name: key of `PRESETS`.
        target: key of `TARGETS`: what the preset leaves open is as this engine needs it (see `fields`).
        changes: fields of `QuantConfig` to replace, as plain data: `rules=[...]`; the fields of a scheme are merged:
            `weight={"bits": 6}`.

    Raises:
        ValueError: an unknown name, or an invalid change.

    >>> preset("int8").weight.bits, preset("int8", target="onnxruntime_x86").weight.bits
    (8, 7)
    >>> preset("int8").activation.signed, preset("int8", target="tensorrt").activation.signed
    (None, True)
    """
    data = fields(name, target)
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, Mapping) else value
    return QuantConfig.from_dict({**data, "target": target})


def fields(name: str, target: str) -> dict[str, Any]:
    """A preset's plain data for a target: what the preset leaves open is as the target prefers, or needs it.

    Open is every field that the preset does not name, and the width of 8-bit integer weights: it may become narrower. A
    preset that would still not run is left as it is: `qat.targets.check_target` says why.

    Args:
        name: key of `PRESETS`.
        target: key of `TARGETS`.
    """
    choice("preset", name, PRESETS)
    choice("target", target, TARGETS)
    data = copy.deepcopy(_fields(name, target))
    if data and TARGETS[target].graph != QuantConfig.graph:
        data["graph"] = TARGETS[target].graph
    others = [_fields(name, other).get("rules", []) for other in TARGETS]
    config = QuantConfig.from_dict(data)
    for i, rule in enumerate(data.get("rules", [])):  # the same fields for every target: Hydra asks for them by name
        for role in ("weight", "activation"):
            usual = getattr(config, role)
            named = dict.fromkeys(field for rules in others for field in rules[i].get(role, {}))
            rule |= {role: {field: getattr(usual, field) for field in named} | rule.get(role, {})} if named else {}
    return data


@functools.cache
def _fields(name: str, target: str) -> dict[str, Any]:
    data, engine = PRESETS[name], TARGETS[target]
    fitted = _preferred(data, engine)
    config = QuantConfig.from_dict(fitted)
    for part in [fitted, *fitted.get("rules", [])] if config.enabled else []:
        own = {} if part is fitted else part
        weight = override(config.weight, own.get("weight", {}), "weight")
        activation = override(config.activation, own.get("activation", {}), "activation")
        best = nearest(engine.usual, weight, activation)
        if best is None or not (_open(part, "weight", best.weight) and _open(part, "activation", best.activation)):
            return data
        inputs = ("input",) if part is fitted and "input" in part else ()
        for role, needed in (("weight", best.weight), *((role, best.activation) for role in ("activation", *inputs))):
            if needed:
                part[role] = {**part.get(role, {}), **{k: getattr(v, "name", v) for k, v in needed.items()}}
    return fitted


def _preferred(data: dict[str, Any], target: Target) -> dict[str, Any]:
    """A preset with what it leaves open of its integers as a target prefers them."""
    fitted = copy.deepcopy(data)
    for i, part in enumerate([fitted, *fitted.get("rules", [])]):
        for role in [role for role in ("weight", "activation", "input") if role in part]:
            scheme, wanted = part[role], target.prefers.get("activation" if role == "input" else role, {})
            if scheme.get("format", "int") == "int" and scheme.get("bits") is not None:
                taken = {k: v for k, v in wanted.items() if _open(part, role, {k: v}) and (i == 0 or k in scheme)}
                part[role] = {**scheme, **taken}
    return fitted


def _open(part: Mapping[str, Any], role: str, changes: Mapping[str, Any]) -> bool:
    """Whether changes touch only what a part of a preset leaves open. Of widths, only 8-bit integer weights' are."""
    given = part.get(role, {})
    is_int8 = role == "weight" and given.get("bits") == 8 and given.get("format", "int") == "int"
    return all(v is not None and v < 8 and is_int8 if k == "bits" else k not in given for k, v in changes.items())
