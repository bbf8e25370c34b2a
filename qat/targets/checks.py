"""What a target cannot run is refused: of a configuration at once, of a network when it is prepared."""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qat.scheme import QuantConfig, TensorScheme, choice, override
from qat.scheme.checks import shown
from qat.scheme.config import ATTENTION
from qat.targets.limits import FAMILIES, Kernel, Target
from qat.targets.nearest import Way, breaches, changes, nearest
from qat.targets.table import TARGETS
from qat.targets.ties import check_ties

OF_ATTENTION = tuple(f".{name}" for name in ATTENTION)
"""What rules that name tensors of attention end with."""


class Asked(NamedTuple):
    """What a layer is asked to run with.

    Attributes:
        type: of the layer, as rules name it.
        weight, activation: its schemes.
    """

    type: str
    weight: TensorScheme
    activation: TensorScheme


def check_target(config: QuantConfig) -> None:
    """Refuse a configuration that its target cannot run, whatever the network.

    The configuration's schemes, and rules that match by path, have to fit the target's usual layers; a rule that
    matches by type (`type:Embedding`) one of those types.

    Raises:
        ValueError: names the field, the target's limit and its reason, and the nearest scheme that the target runs.
    """
    target = choice("quant.target", config.target, TARGETS)
    check_kernels(config, Engine(f"target={config.target}", target, "target=generic"))
    check_ties(config, target)


class Engine(NamedTuple):
    """What a configuration is held to.

    Attributes:
        name: what messages call it.
        target: its kernels.
        instead: what else one may choose.
    """

    name: str
    target: Target
    instead: str


def check_kernels(config: QuantConfig, engine: Engine) -> None:
    """Refuse a configuration that an engine's usual layers cannot run; see `check_target`.

    Raises:
        ValueError: names the field, the limit and its reason, and the nearest scheme.
    """
    if not config.enabled:
        return
    target, kernels = engine.target, engine.target.usual
    check_pair(engine, kernels, config.weight, config.activation, "quant")
    takes = [kernel for kernel in kernels if not any(breaches(kernel.weight, config.weight, "weight"))]
    check_pair(engine, takes, config.weight, config.input, "quant", activation="input")
    for i, rule in enumerate(config.rules):
        where = f"quant.rules[{i}]"
        weight = override(config.weight, rule.weight, f"{where}.weight")
        activation = override(config.activation, rule.activation, f"{where}.activation")
        if rule.match.endswith(OF_ATTENTION):  # no layer's inputs: no kernel multiplies them by weights
            if activation.quantized:
                check_pair(engine, takes, config.weight, activation, where)
            continue
        families = _families(rule.match, target)
        if not any(_runs(kernels, weight, activation) for kernels in families.values()):
            of, kernels = next(iter(families.items()))
            check_pair(engine, kernels, weight, activation, where, of=of)


def check_layers(config: QuantConfig, layers: Mapping[str, Asked]) -> None:
    """Refuse the layers of a network that its target cannot run as they are configured.

    Args:
        config: with the target.
        layers: what rules match -> what a layer is asked to run with.

    Raises:
        ValueError: names the layers, the reason, and the rules to write.
    """
    target = TARGETS[config.target]
    refused: dict[str, Way | None] = {}
    for path, asked in layers.items():
        kernels = target.kernels(asked.type)
        if not _runs(kernels, asked.weight, asked.activation):
            refused[path] = nearest(kernels, asked.weight, asked.activation)
    if not refused:
        return
    none = [path for path, way in refused.items() if way is None]
    if none:
        raise ValueError(
            f"target={config.target} has no kernel for {_named(none, layers)}; use other layers, or target=generic"
        )
    rules: dict[str, dict[str, Any]] = {}
    reasons: dict[str, list[str]] = {}
    for path, way in refused.items():
        assert way is not None
        asked = layers[path]
        whole = all(refused.get(p) == way for p, other in layers.items() if other.type == asked.type)
        rule: dict[str, Any] = {"match": f"type:{asked.type}" if whole else path}
        for role, changed in (("weight", way.weight), ("activation", way.activation)):
            own = changes(getattr(config, role), override(getattr(asked, role), changed, role))
            rule |= {role: own} if own else {}
        rules[rule["match"]] = rule
        reasons.setdefault(_reason(way, asked, config), []).append(path)
    said = "; ".join(f"{_named(paths, layers)}: {why}" for why, paths in reasons.items())
    kept = [{k: v for k, v in vars(rule).items() if v} for rule in config.rules]
    text = _text([*rules.values(), *kept])
    raise ValueError(
        f"target={config.target} cannot run what is configured. {said}. Use 'quant.rules={text}', or target=generic"
    )


def check_pair(
    engine: Engine, kernels: Sequence[Kernel], weight: TensorScheme, scheme: TensorScheme, where: str,
    activation: str = "activation", of: str = "",
) -> None:  # fmt: skip
    """Refuse a pair of schemes that no kernel takes.

    Args:
        engine: whose kernels.
        kernels: for the layers in question.
        weight: their weights' scheme.
        scheme: their inputs'.
        where: the path of both.
        activation: the field that holds the second.
        of: kind of layer, where the kernels are for one.

    Raises:
        ValueError: names the field, the limit and its reason, and the nearest scheme.
    """
    if _runs(kernels, weight, scheme):
        return
    way = nearest(kernels, weight, scheme)
    layers = f" in {of} layers" if of else ""
    if way is None or way.first is None:
        raise ValueError(f"{where}: {engine.name} has no kernel for {of or 'such'} layers; use {engine.instead}")
    role, change = way.first
    roles = {"weight": "weight", "activation": activation}
    given: TensorScheme = weight if role == "weight" else scheme
    path = where.rpartition(" ")[2].replace("[", ".").replace("]", "")  # as Hydra's command line takes it
    use = " ".join(
        f"{path}.{roles[of_role]}.{name}={_value(value)}"
        for of_role, changed in (("weight", way.weight), ("activation", way.activation))
        for name, value in changed.items()
    )
    raise ValueError(
        f"{where}.{roles[role]}.{change.field}={shown(getattr(given, change.field))}: {engine.name} "
        f"{change.words}{layers}{_why(way)}; use {use}, or {engine.instead}"
    )


def _runs(kernels: Sequence[Kernel], weight: TensorScheme, activation: TensorScheme) -> bool:
    best = nearest(kernels, weight, activation)
    return best is not None and not best.weight and not best.activation


def _why(way: Way) -> str:
    assert way.first is not None
    limits = way.kernel.weight if way.first[0] == "weight" else way.kernel.activation
    why = limits.why if limits is not None else ""
    return f" ({why})" if why else f" ({way.kernel.name})"


def _reason(way: Way, asked: Asked, config: QuantConfig) -> str:
    assert way.first is not None
    role, change = way.first
    return f"{role}.{change.field}={shown(getattr(getattr(asked, role), change.field))}, it {change.words}{_why(way)}"


def _families(match: str, target: Target) -> dict[str, tuple[Kernel, ...]]:
    """Kind of layer -> kernels, of what a rule can match; "" for the usual layers, where its types are not known."""
    pattern = match.removeprefix("type:") if match.startswith("type:") else ""
    found = {
        family: target.layers.get(family, target.layers["default"])
        for family, names in FAMILIES.items()
        if any(fnmatch.fnmatchcase(name, pattern) for name in names)
    }
    return found or {"": target.usual}


def _named(paths: Sequence[str], layers: Mapping[str, Asked], most: int = 4) -> str:
    names = ", ".join(f"'{path}' ({layers[path].type})" for path in paths[:most])
    return names + (f" and {len(paths) - most} more" if len(paths) > most else "")


def _value(value: object) -> object:
    value = shown(value)
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else value


def _text(value: Any) -> str:
    """Plain data as Hydra's command line takes it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_text(v)}' for k, v in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    return f'"{value}"' if isinstance(value, str) else str(_value(value))
