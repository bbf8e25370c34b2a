"""Which schemes a layer gets, and why: the configuration's, or a rule's."""

import difflib
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qat.scheme import QuantConfig, TensorScheme, override
from qat.targets import TARGETS


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which schemes a layer got, and why."""

    weight: TensorScheme
    activation: TensorScheme
    reason: str


class Quantizable(NamedTuple):
    """A layer that could be quantized.

    Attributes:
        kind: name of the float type.
        path: what rules match: a layer's module path, or the path of the parameter that a function is called with.
    """

    kind: str
    path: str


def choose(layers: Mapping[str, Quantizable], config: QuantConfig) -> dict[str, Choice]:
    """Decide the schemes of every quantizable layer.

    Args:
        layers: module path -> layer, in order of execution.
        config: schemes and rules.

    Raises:
        ValueError: a rule that matches no layer; names it and the nearest module paths.
    """
    order, paths = list(layers), [layer.path for layer in layers.values()]
    used: set[int] = set()
    choices = {}
    for name, layer in layers.items():
        ends = name == order[0], name == order[-1]
        matched = [i for i, rule in enumerate(config.rules) if matches(rule.match, layer, ends)]
        used.update(matched)
        weight, activation, reason = config.weight, config.activation, "default"
        if not matched and any(matches(match, layer, ends) for match in TARGETS[config.target].float_layers):
            weight, activation = TensorScheme(), TensorScheme()
            reason = f"float: target={config.target} leaves it so, and no rule says otherwise"
        if matched:
            rule = config.rules[matched[0]]
            weight = override(weight, rule.weight, f"quant.rules[{matched[0]}].weight")
            activation = override(activation, rule.activation, f"quant.rules[{matched[0]}].activation")
            reason = f"rule '{rule.match}'"
        choices[name] = Choice(weight=weight, activation=activation, reason=reason)
    for i, rule in enumerate(config.rules):
        if i not in used:
            close = difflib.get_close_matches(rule.match, paths, n=3, cutoff=0.3)
            types = sorted({layer.kind for layer in layers.values()})
            raise ValueError(
                f"quant.rules[{i}].match='{rule.match}' matches no layer. Nearest module paths: "
                f"{', '.join(close) or ', '.join(paths[:5]) or 'none, the network has no quantizable layer'}; "
                f"types: {', '.join('type:' + t for t in types)}; 'first' and 'last' are valid too"
            )
    return choices


def matches(match: str, layer: Quantizable, ends: tuple[bool, bool]) -> bool:
    """Whether a rule's `match` is of a layer that is the first, or the last, to run."""
    if match in ("first", "last"):
        return ends[match == "last"]
    if match.startswith("type:"):
        return fnmatch.fnmatchcase(layer.kind, match.removeprefix("type:"))
    return fnmatch.fnmatchcase(layer.path, match)
