"""Print what each target can run: formats and granularities by kind of layer, what stays float, and its files.

python -m qat targets                  one line a target
python -m qat targets tensorrt vllm    all about some of them
"""

import argparse
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qat.analysis.console import new_table
from qat.scheme import choice
from qat.targets import FAMILIES, TARGETS, Kernel, Target


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `targets` takes on the command line."""
    parser.add_argument("names", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)} (default: a line each)")


def run(args: argparse.Namespace) -> None:
    """Print the tables.

    Raises:
        ValueError: an unknown target.
    """
    chosen = {name: choice("TARGET", name, TARGETS) for name in args.names}
    console = Console()
    console.print(*([summary()] if not chosen else []))
    for name, target in chosen.items():
        console.print(Text(f"target={name}: {target.description}", "bold"))
        console.print(kernels(target))
        for label, text in facts(target):
            console.print(Text(f"{label:<12} {text}"))


def summary() -> Table:
    """One row a target: the usual kernel's weights and inputs, and what requantizes."""
    table = new_table()
    table.add_column("target", no_wrap=True)
    for column in ("weights", "inputs", "scaling"):
        table.add_column(column)
    for name, target in TARGETS.items():
        usual = target.layers["default"][0]
        scaling = {"float": "float", "fixed_point": "multiplier, shift"}[target.requantize]
        weight = "any" if name == "generic" else usual.weight.describe()
        table.add_row(name, weight, _inputs(usual), scaling)
    return table


def kernels(target: Target) -> Table:
    """Rows of kind of layer, kernel, weights, inputs, and what multiplies."""
    table = new_table()
    for column in ("layers", "kernel", "weights", "inputs", "multiplies"):
        table.add_column(column, overflow="fold")
    named = [name for name in FAMILIES if name in target.layers]
    for family in [*named, "default"]:
        label = family if family != "default" or not named else "others"
        for kernel in target.layers[family]:
            multiplies = "integers" if kernel.integers else "floats"
            table.add_row(label, kernel.name, kernel.weight.describe(), _inputs(kernel), multiplies)
            label = ""
        if not target.layers[family]:
            table.add_row(label, "none: refused", "", "", "")
    return table


def facts(target: Target) -> Iterator[tuple[str, str]]:
    """Label -> what is to say beside the kernels."""
    yield "integers", f"of layers{''.join(f', {name}' for name in sorted(target.operations))}"
    yield "float", "nothing" if target.requantize == "fixed_point" else _list(target.keeps_float)
    if target.function_inputs:
        yield "quantizers", f"also in front of {_list(sorted(target.function_inputs))}"
    for name, (low, high) in target.bounds.items():
        yield "8-bit ends", f"{name}: {low:g} to {high:g}"
    scaling = {"float": "in float32", "fixed_point": "by an int32 multiplier and a shift"}
    yield "requantizes", f"{scaling[target.requantize]}, {target.rounding}"
    yield "files", ", ".join(target.formats) + (", of int8 pairs with zero point 0" if target.pairs else "")
    yield "presets", "; ".join(f"{role}: {_settings(fields)}" for role, fields in target.prefers.items()) or "as named"
    yield "source", target.source


def _inputs(kernel: Kernel) -> str:
    return "any" if kernel.activation is None else kernel.activation.describe()


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _settings(fields: object) -> str:
    assert isinstance(fields, dict)
    return ", ".join(f"{name}={str(value).lower()}" for name, value in fields.items())
