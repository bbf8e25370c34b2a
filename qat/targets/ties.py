"""Exact ties: which way a target rounds them, and that training does the same."""

import dataclasses

from qat.numerics.rounding import ROUNDING
from qat.ranges import RANGES
from qat.scheme import QuantConfig, TensorScheme, override
from qat.targets.limits import Target
from qat.targets.table import TARGETS


def check_ties(config: QuantConfig, target: Target) -> None:
    """Refuse activations whose ties a target rounds the other way.

    `nearest` (to even) is taken by all: where scales have no simple ratios, exact ties are too rare to matter.

    Raises:
        ValueError: names the field, and what the target does.
    """
    found = [("quant.activation", config.activation, target.ties)]
    found += [("quant.input", config.input, "even")]  # what comes from outside is put on its grid in float
    for i, rule in enumerate(config.rules):
        where = f"quant.rules[{i}].activation"
        found.append((where, override(config.activation, rule.activation, where), target.ties))
    for where, scheme, ties in found:
        if scheme.quantized and ROUNDING[scheme.rounding].ties not in ("even", ties):
            whose = "inputs are put on their grid with" if where == "quant.input" else f"target={config.target} rounds"
            raise ValueError(
                f"{where}.rounding={scheme.rounding}: {whose} halves to {ties}; use {where}.rounding=nearest"
            )


def with_ties_of_target(config: QuantConfig) -> QuantConfig:
    """The configuration whose activations round exact ties as its target does, where these are common.

    They are where scales stand in simple ratios (`Range.ratios`): every other sum of two tensors on scales of powers of
    two is a tie. Elsewhere a float32 sum hardly ever lies on one, and `nearest` has the faster kernels.
    """
    ties = TARGETS[config.target].ties
    rounding = next(name for name, entry in ROUNDING.items() if entry.ties == ties)

    def common(scheme: TensorScheme) -> bool:
        return scheme.quantized and RANGES[scheme.range].ratios and scheme.rounding != rounding

    rules = []
    for rule in config.rules:
        changed = common(override(config.activation, rule.activation, "activation"))
        extra = {"rounding": rounding} if changed else {}
        rules.append(dataclasses.replace(rule, activation={**rule.activation, **extra}))
    activation = config.activation
    if common(activation):
        activation = dataclasses.replace(activation, rounding=rounding)
    return dataclasses.replace(config, activation=activation, rules=rules)
