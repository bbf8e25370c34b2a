"""Combinations of what a scheme is made of: all of its names, and numbers, signs and observers drawn for each."""

import functools
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

from qat.numerics.formats import FORMATS
from qat.numerics.gradients import GRADIENTS
from qat.numerics.rounding import ROUNDING
from qat.observers import OBSERVERS
from qat.ranges import RANGES
from qat.scheme import Granularity, TensorScheme
from qat.scheme.checks import refusals

Data = dict[str, Any]

ROLES = ("weight", "activation")
NAMES: dict[str, list[str]] = {
    "format": list(FORMATS),
    "granularity": [g.value for g in Granularity],
    "range": list(RANGES),
    "rounding": list(ROUNDING),
    "gradient": list(GRADIENTS),
}
"""All of these are combined with each other."""

DRAWN: dict[str, Sequence[Any]] = {
    "bits": (1, 2, "least", "most"),
    "symmetric": (True, False),
    "signed": (None, True, False),
    "narrow_range": (True, False),
    "observer": list(OBSERVERS),
}
"""Some of these are drawn for each valid combination of names."""

DRAWS = {"weight": 8, "activation": 40}
"""How often: activations have fewer combinations."""


def usual(names: dict[str, str]) -> Data:
    """A scheme of these names with numbers that suit them."""
    kind = FORMATS[names["format"]]
    widths = [b for b in (4, 8, 16) if b in kind.bits] or [kind.bits[0]]
    data: Data = {
        **names,
        "bits": widths[0],
        "symmetric": names["range"] != "lsq_plus",
        "signed": None,
        "narrow_range": False,
        "allow_padding": kind.fitted not in ("binary", "ternary"),
        "observer": "minmax" if kind.unit_scale or kind.fitted else "mse" if names["range"] == "lsq_plus" else "absmax",
    }
    if names["granularity"] == "group":
        data["group_size"] = kind.block or (7 if data["allow_padding"] else 8)
    if names["granularity"] == "block":
        data["block_size"] = [3, 7]
    return data


def is_valid(data: Data, role: str) -> bool:
    """Whether the checks take it: what `check_scheme` asks, without the message."""
    scheme = TensorScheme(**{**data, "granularity": Granularity[data["granularity"]]})
    return next(refusals(scheme, role), None) is None


def split(candidates: Iterable[Data], role: str) -> tuple[list[Data], list[Data]]:
    """Valid ones, and those that are refused."""
    result: tuple[list[Data], list[Data]] = [], []
    for data in candidates:
        result[not is_valid(data, role)].append(data)
    return result


@functools.cache
def combined(role: str) -> tuple[list[Data], list[Data]]:
    """Every combination of NAMES with usual numbers: valid, refused."""
    combinations = itertools.product(*NAMES.values())
    return split((usual(dict(zip(NAMES, names, strict=True))) for names in combinations), role)


@functools.cache
def varied(role: str) -> tuple[list[Data], list[Data]]:
    """Valid combinations of NAMES with numbers, signs and observers as they come: valid, refused."""
    rng = random.Random(role)

    def candidates() -> Iterable[Data]:
        for data, _ in itertools.product(combined(role)[0], range(DRAWS[role])):
            drawn = {name: rng.choice(values) for name, values in DRAWN.items()}
            bits = FORMATS[data["format"]].bits
            yield data | drawn | {"bits": {"least": bits[0], "most": bits[-1]}.get(drawn["bits"], drawn["bits"])}

    return split(candidates(), role)


def covering(schemes: Sequence[Data], fields: Iterable[str]) -> list[Data]:
    """Few of the schemes, in which every pair of values occurs that occurs in all of them."""
    pool = [(data, frozenset(itertools.combinations([(f, data[f]) for f in fields], 2))) for data in schemes]
    missing = set().union(*(pairs for _, pairs in pool))
    chosen = []
    for least in (30, 20, 12, 8, 5, 3, 2, 1):  # the telling ones first
        for data, pairs in pool:
            if len(pairs & missing) >= least:
                chosen.append(data)
                missing -= pairs
    assert not missing
    return chosen
