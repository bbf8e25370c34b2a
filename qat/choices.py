"""Which schemes a layer gets, and what else reads tensors from a grid; and why: the configuration's, or a rule's."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from qat.scheme import LayerRule, QuantConfig, TensorScheme, override
from qat.targets import TARGETS


class Ask(NamedTuple):
    """How something wants to read a tensor.

    Attributes:
        scheme: of the tensor.
        reason: what chose it.
        by_rule: whether a rule for this reader did.
    """

    scheme: TensorScheme
    reason: str
    by_rule: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which schemes a layer got, and why.

    Attributes:
        weight: of its weights.
        reads: of its inputs, with what chose that.
        reason: what chose the layer's schemes.
    """

    weight: TensorScheme
    reads: Ask
    reason: str

    @property
    def activation(self) -> TensorScheme:
        """The scheme of the layer's inputs."""
        return self.reads.scheme


class Quantizable(NamedTuple):
    """A layer that could be quantized.

    Attributes:
        kind: name of the float type.
        path: what rules match: a layer's module path, or the path of the parameter that a function is called with.
    """

    kind: str
    path: str


def choose(
    layers: Mapping[str, Quantizable], reads: Iterable[str], config: QuantConfig
) -> tuple[dict[str, Choice], dict[str, Ask]]:
    """Decide the schemes of every quantizable layer, and of what other operations read.

    Args:
        layers: module path -> layer, in order of execution.
        reads: names of what other operations read, from `qat.reads`.
        config: schemes and rules.

    Returns:
        Module path -> what a layer got; name -> what an operation reads.

    Raises:
        ValueError: a rule that matches nothing, with the nearest names; one for weights that matches no layer.
    """
    order, reads, rules = list(layers), list(dict.fromkeys(reads)), config.rules
    of_layers: set[int] = set()
    of_reads: set[int] = set()
    choices, asks = {}, {}
    for name, layer in layers.items():
        ends = name == order[0], name == order[-1]
        found = [i for i, rule in enumerate(rules) if matches(rule.match, layer, ends)]
        of_layers.update(found)
        weight, ask, reason = config.weight, Ask(config.activation, "default"), "default"
        if not found and any(matches(match, layer, ends) for match in TARGETS[config.target].float_layers):
            reason = f"float: target={config.target} leaves it so, and no rule says otherwise"
            weight, ask = TensorScheme(), Ask(TensorScheme(), reason)
        if found:
            weight = override(weight, rules[found[0]].weight, f"quant.rules[{found[0]}].weight")
            ask, reason = _by_rule(config, found[0]), f"rule '{rules[found[0]].match}'"
        choices[name] = Choice(weight=weight, reads=ask, reason=reason)
    for name in reads:
        found = [i for i, rule in enumerate(rules) if _matches_read(rule, name)]
        of_reads.update(found)
        asks[name] = _by_rule(config, found[0]) if found else Ask(config.activation, "default")
    for i, rule in enumerate(rules):
        if i not in of_layers | of_reads:
            raise ValueError(_no_match(i, rule, layers, reads))
        if rule.weight and i not in of_layers:
            raise ValueError(
                f"quant.rules[{i}].weight={rule.weight}: '{rule.match}' matches no layer, only operations, which have "
                f"no weight; give quant.rules[{i}].activation"
            )
    return choices, asks


def _by_rule(config: QuantConfig, i: int) -> Ask:
    rule = config.rules[i]
    if not rule.activation:
        return Ask(config.activation, "default")
    scheme = override(config.activation, rule.activation, f"quant.rules[{i}].activation")
    return Ask(scheme, f"rule '{rule.match}'", by_rule=True)


def _matches_read(rule: LayerRule, name: str) -> bool:
    """Whether a rule is of a read. Scores are float unless they are asked for, so a rule has to name them."""
    named = not name.endswith(".scores") or rule.match.endswith("scores")
    return named and fnmatch.fnmatchcase(name, rule.match)


def _no_match(i: int, rule: LayerRule, layers: Mapping[str, Quantizable], reads: list[str]) -> str:
    paths = [layer.path for layer in layers.values()]
    close = difflib.get_close_matches(rule.match, [*paths, *reads], n=3, cutoff=0.3)
    types = sorted({layer.kind for layer in layers.values()})
    return (
        f"quant.rules[{i}].match='{rule.match}' matches no layer. Nearest module paths: "
        f"{', '.join(close) or ', '.join(paths[:5]) or 'none, the network has no quantizable layer'}; "
        f"types: {', '.join('type:' + t for t in types)}; 'first' and 'last' are valid too"
    )


def matches(match: str, layer: Quantizable, ends: tuple[bool, bool]) -> bool:
    """Whether a rule's `match` is of a layer that is the first, or the last, to run."""
    if match in ("first", "last"):
        return ends[match == "last"]
    if match.startswith("type:"):
        return fnmatch.fnmatchcase(layer.kind, match.removeprefix("type:"))
    return fnmatch.fnmatchcase(layer.path, match)
