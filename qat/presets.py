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
_WEIGHT = {"narrow_range": True, "granularity": "channel", "range": "dynamic"}

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
        if weight.get("bits") == 8:
            weight["bits"] = "${widest:8}" if target is None else min(8, choice("target", target, TARGETS).weight_bits)
    return dict(data)
