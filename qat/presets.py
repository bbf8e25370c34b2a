"""Named configurations: `qat.preset("w4a4_lsq")` in Python, `quant=w4a4_lsq` on the command line.

Each is what differs from the defaults of `QuantConfig`. 8-bit weights become narrower where the target asks for it.
"""

import copy
from collections.abc import Mapping
from typing import Any

from qat.scheme import QuantConfig, choice
from qat.targets import TARGETS

_EMA = {"range": "running", "observer": "ema"}
_LSQ = {"range": "learned", "observer": "mse"}
_ENDS_AT_8_BITS = [
    {"match": end, "weight": {"bits": 8}, "activation": {"bits": 8}} for end in ("first", "last")
]  # customary since Choi et al. 2018 (PACT): both ends are small, and sensitive
_INT8_ENDS = [{"match": end, "weight": {"format": "int", "bits": 8}} for end in ("first", "last")]
_WEIGHT = {"narrow_range": True, "granularity": "channel", "range": "dynamic"}


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
    "w4g32": {
        "weight": {**_WEIGHT, "bits": 4, "granularity": "group", "group_size": 32, "allow_padding": True},
    },
    "w8a8_dynamic": {
        "weight": {**_WEIGHT, "bits": 8},
        "activation": {"bits": 8, "granularity": "token", "range": "dynamic"},
        "input": {"bits": 8, "granularity": "token", "range": "dynamic"},
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
        target: key of `TARGETS`; 8-bit weights become as wide as it runs exactly.
        changes: fields of `QuantConfig` to replace, as plain data: `rules=[...]`; the fields of a scheme are merged:
            `weight={"bits": 6}`.

    Raises:
        ValueError: an unknown name, or an invalid change.

    >>> preset("int8").weight.bits, preset("int8", target="onnxruntime_x86").weight.bits
    (8, 7)
    """
    data = fields(name, target)
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value} if isinstance(value, Mapping) else value
    return QuantConfig.from_dict({**data, "target": target})


def fields(name: str, target: str | None) -> dict[str, Any]:
    """A preset's plain data. For `target=None`, widths that depend on the target are left to Hydra as `${widest:8}`."""
    data = copy.deepcopy(choice("preset", name, PRESETS))
    for part in [data, *data.get("rules", [])]:
        weight = part.get("weight", {})
        if weight.get("bits") == 8 and weight.get("format", "int") == "int":
            weight["bits"] = "${widest:8}" if target is None else min(8, choice("target", target, TARGETS).weight_bits)
    return dict(data)
