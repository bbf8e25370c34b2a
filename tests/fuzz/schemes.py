"""Random schemes: fields are drawn one by one, and what the project's own checks refuse is drawn anew."""

import random
from typing import Any

import qat
from qat.numerics.formats import FORMATS
from qat.numerics.gradients import GRADIENTS
from qat.numerics.rounding import ROUNDING
from qat.observers import OBSERVERS
from qat.presets import PRESETS
from qat.ranges import RANGES
from qat.scheme import TensorScheme
from qat.scheme.checks import check_scheme
from qat.scheme.tensor import override
from qat.targets import TARGETS, check_target

INTEGER_PRESETS = [name for name in PRESETS if qat.preset(name).activation.format == "int" and name != "off"]
OTHER_PRESETS = [name for name in PRESETS if name not in (*INTEGER_PRESETS, "off")]


def random_config(seed: int, channels: bool = True) -> qat.QuantConfig:
    """A preset, or schemes that go together on one target.

    Args:
        seed: everything is drawn from it.
        channels: whether activations may have a scale a channel, which what is concatenated may not.
    """
    rng = random.Random(f"scheme {seed}")
    target = rng.choice(list(TARGETS))
    while True:
        try:
            if rng.random() < 0.25:
                config = qat.preset(rng.choice(INTEGER_PRESETS * 2 + OTHER_PRESETS), target)
            else:
                activation = _valid(rng, "activation")
                given = activation if rng.random() < 0.5 else _valid(rng, "activation")
                schemes = {"weight": _valid(rng, "weight"), "activation": activation, "input": given}
                config = qat.QuantConfig.from_dict({**schemes, "rules": _rules(rng)})
            config.target, config.graph = target, "required"
            check_target(config)
        except ValueError:
            continue
        if channels or config.activation.granularity is not qat.Granularity.channel:
            return config


def _valid(rng: random.Random, role: str) -> dict[str, Any]:
    while True:
        scheme = _scheme(rng, role)
        try:
            check_scheme(override(TensorScheme(), scheme, role), role, role)
        except ValueError:
            continue
        return scheme


def _scheme(rng: random.Random, role: str) -> dict[str, Any]:
    usual = rng.random() < (0.75 if role == "weight" else 0.9)  # integers, of which most networks are made
    name = "int" if usual else rng.choice(list(FORMATS))
    bits = [b for b in FORMATS[name].bits if 2 <= b <= 8] or list(FORMATS[name].bits)
    granularities = (
        ["tensor", "channel", "group", "block"] if role == "weight" else ["tensor"] * 20 + ["channel", "token", "group"]
    )
    granularity = "group" if FORMATS[name].block else rng.choice(granularities)
    computed = granularity in ("token", "group") or (role == "weight" and rng.random() < 0.4) or rng.random() < 0.05
    scheme: dict[str, Any] = {
        "format": name,
        "bits": rng.choice(bits),
        "symmetric": name != "int" or rng.choice((True, False)),
        "narrow_range": role == "weight" and rng.choice((True, False)),
        "granularity": granularity,
        "range": "dynamic" if computed else rng.choice([name for name in RANGES if name != "dynamic"]),
        "observer": rng.choice(list(OBSERVERS)),
        "gradient": rng.choice(list(GRADIENTS)),
        "rounding": rng.choice(list(ROUNDING)) if role == "weight" and rng.random() < 0.4 else "nearest",
    }
    if FORMATS[name].block:
        kept = name == "nvfp4" and role == "activation" and rng.random() < 0.5
        block = {"group_size": FORMATS[name].block, "allow_padding": True}
        scheme |= {"range": "running" if kept else "dynamic", **block}
    elif granularity == "group":
        scheme |= {"group_size": rng.choice((2, 4, 32)), "allow_padding": FORMATS[name].fitted is None}
    elif granularity == "block":
        scheme |= {"block_size": rng.choice(([2, 2], [4, 4], [-1, 2])), "allow_padding": True}
    return scheme


def _rules(rng: random.Random) -> list[dict[str, Any]]:
    if rng.random() < 0.7:
        return []
    return [{"match": rng.choice(("first", "last")), "weight": {"bits": rng.choice((4, 6, 7))}}]
