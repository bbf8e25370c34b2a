"""The preparation report: what was quantized, how and why; what stays float and why; what it costs, by bit width."""

import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from qat.adapters import adapters, merged_text, without_adapters
from qat.analysis.islands import float_islands
from qat.analysis.layers import attention_table, layer_table, operation_table
from qat.analysis.stored import rest
from qat.analysis.summary import bytes_text, percent_text
from qat.modes import quantizers

FLOAT_BITS = 32
WIDTH = 150
"""Of lines of prose."""
REASON = 30
"""A reason longer than this is cut in the table of layers; the whole stands below."""


@dataclass
class Totals:
    """A prepared network in numbers; multiply-accumulates are those of one sample.

    Attributes:
        layers, quantized: quantizable layers, and those with quantized weights.
        edges: activation quantizers.
        weights: bits -> weights of quantizable layers (32 for float).
        macs: what is multiplied (`w8a8`: 8-bit weights by 8-bit activations, `a8a8`: two activations) -> how many.
        bit_operations: sum of multiply-accumulates times the bits of both factors.
        bit_operations_float: the same if nothing were quantized.
        bytes: of the int8 checkpoint without its header: `codes`, `tables` (scales, zero points, levels), `biases`,
            `float` (what stays as it is).
        float_bytes: of all parameters as float32.
        kept: class name -> bytes of the parameters that are not a layer's weights or biases.
    """

    layers: int = 0
    quantized: int = 0
    edges: int = 0
    weights: Counter[int] = field(default_factory=Counter)
    macs: Counter[str] = field(default_factory=Counter)
    bit_operations: float = 0
    bit_operations_float: float = 0
    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("codes", "tables", "biases", "float"), 0))
    float_bytes: int = 0
    kept: dict[str, int] = field(default_factory=dict)


def totals(prepared: nn.Module) -> Totals:
    """Add up what `layer_table` and `operation_table` say.

    Args:
        prepared: from `qat.prepare`.
    """
    rows, operations = layer_table(prepared), operation_table(prepared)
    return _totals(prepared, rows, operations)


def _totals(prepared: nn.Module, rows: list[dict[str, Any]], operations: list[dict[str, Any]]) -> Totals:
    weights = [row for row in rows if "layer" in row]
    sums = Totals(
        layers=len({row["layer"] for row in weights}),
        quantized=len({row["layer"] for row in weights if row["scheme"] != "float"}),
        edges=len(rows) - len(weights),
        float_bytes=4 * sum(p.numel() for p in _float_parameters(prepared)),
    )
    for row in weights:
        sums.weights[row["bits"]] += row["parameters"]
        quantized = row["scheme"] != "float"
        read = row["input_bits"] if quantized else FLOAT_BITS
        _multiply(sums, row["macs"] or 0, row["bits"], read, "w")
        sums.bytes["codes" if quantized else "float"] += row["calls"] * row["codes"]
        sums.bytes["tables"] += row["calls"] * (row["bytes"] - row["codes"])
        sums.bytes["biases"] += row["calls"] * row["bias_bytes"]
    for row in operations:
        _multiply(sums, row["macs"], row["input_bits"], row["input_bits"], "a")
    own = {prepared.get_submodule(row["layer"]) for row in weights}
    sums.kept = rest(prepared, own)
    sums.bytes["float"] += sum(sums.kept.values())
    return sums


def _float_parameters(prepared: nn.Module) -> Iterable[nn.Parameter]:
    added = {id(p) for _, quantizer in quantizers(prepared) for p in quantizer.parameters()}
    return (p for p in prepared.parameters() if id(p) not in added)


def _multiply(sums: Totals, macs: float, left: int, right: int, letter: str) -> None:
    label = "float" if left == right == FLOAT_BITS else f"{letter}{left}a{right}"
    if macs:
        sums.macs[label] += macs  # type: ignore[assignment]  # a sample's share of a batch may be a fraction
    sums.bit_operations += macs * left * right
    sums.bit_operations_float += macs * FLOAT_BITS**2


def report(prepared: nn.Module) -> str:
    r"""What `qat.prepare` made of a network, as text: totals, layers, edges, and what stays float.

    Args:
        prepared: from `qat.prepare`; calibrated or not.

    >>> import qat, torch
    >>> net = qat.prepare(torch.nn.Sequential(torch.nn.Linear(4, 2)), qat.preset("int8"), torch.zeros(1, 4))
    >>> print("\n".join(report(net).splitlines()[:3]))
    Sequential: 1 of 1 layers have quantized weights, 1 edge is quantized
    weights               8 in 8 bits (100 %)
    multiply-accumulates  8 a sample: 8 w8a8 (100 %)
    """
    adapted, prepared = len(adapters(prepared)), without_adapters(prepared, merge=False)
    rows, operations = layer_table(prepared), operation_table(prepared)
    text = _summary(prepared, _totals(prepared, rows, operations))
    merged = vars(prepared)["meta"]["qat"].get("merged")
    if merged:
        text += ["", *textwrap.wrap(merged_text(**merged), WIDTH)]
    elif adapted:
        text += ["", f"{adapted} layers have adapters in float; qat.ptq.finalize and qat.lower merge them"]
    weights, edges = [row for row in rows if "layer" in row], [row for row in rows if "layer" not in row]
    if weights:
        text += ["", "Layers", *_layers(weights)]
    if operations:
        text += ["", "Other products", *_operations(operations)]
    attention = attention_table(prepared)
    if attention:
        text += ["", "Attention: what it reads, by the names of rules (NAME.query)", *_attention(attention)]
    if edges:
        text += ["", "Edges", *_edges(edges)]
    text += _float(prepared, weights)
    return "\n".join(line.rstrip() for line in text) + "\n"


def count_text(number: float) -> str:
    """A count in at most five characters and a unit.

    >>> [count_text(n) for n in (0, 640, 1152, 41_234, 2_500_000, 1_230_000_000)]
    ['0', '640', '1152', '41.2 k', '2.50 M', '1.23 G']
    """
    if number < 9_999.5:
        return f"{number:.0f}"
    for unit, size in (("k", 1e3), ("M", 1e6)):
        if number < 999.95 * size:
            return f"{number / size:.2f} {unit}" if number < 9.995 * size else f"{number / size:.1f} {unit}"
    return f"{number / 1e9:.2f} G"


def _share(part: float, whole: float) -> str:
    return percent_text(part / whole) if whole else "0 %"


def _summary(prepared: nn.Module, sums: Totals) -> list[str]:
    about: dict[str, Any] = vars(prepared)["meta"]["qat"]
    config, edges = about["config"], "1 edge is" if sums.edges == 1 else f"{sums.edges} edges are"
    lines = [f"{about['network']}: {sums.quantized} of {sums.layers} layers have quantized weights, {edges} quantized"]
    entries = []
    if sums.weights:
        everything = sum(sums.weights.values())
        widths = [
            f"{count_text(n)} in {f'{bits} bits' if bits < FLOAT_BITS else 'float32'} ({_share(n, everything)})"
            for bits, n in sorted(sums.weights.items())
        ]
        entries.append(("weights", ", ".join(widths)))
    products = sum(sums.macs.values())
    if products:
        kinds = [f"{count_text(n)} {kind} ({_share(n, products)})" for kind, n in sums.macs.most_common()]
        entries.append(("multiply-accumulates", f"{count_text(products)} a sample: {', '.join(kinds)}"))
        ratio = _share(sums.bit_operations, sums.bit_operations_float)
        entries.append(("bit operations", f"{count_text(sums.bit_operations)} a sample, {ratio} of float32's"))
    size = sum(sums.bytes.values())
    kept = {"codes": "codes", "tables": "scales and tables", "biases": "biases", "float": "float32"}
    holders = f" ({', '.join(sums.kept)})" if sums.kept else ""
    parts = ", ".join(f"{bytes_text(sums.bytes[key])} {label}" for key, label in kept.items() if sums.bytes[key])
    whole = f"{bytes_text(size)} without a header, {_share(size, sums.float_bytes)} of {bytes_text(sums.float_bytes)}"
    entries.append(("estimated size", f"{whole}: {parts}{holders}"))
    if config.target != "generic" or config.graph != "auto":
        entries.append(("settings", f"target={config.target}, graph={config.graph}"))
    width = max(len(label) for label, _ in entries)
    return lines + [f"{label.ljust(width)}  {text}" for label, text in entries]


def _layers(weights: list[dict[str, Any]]) -> list[str]:
    header = ["name", "type", "weight", "input", "why", "shape", "params", "MACs", "bytes"]
    lines = [
        [row["name"], row["kind"], row["scheme"], row["input"], row["reason"],
         "x".join(map(str, row["shape"])), f"{row['parameters']:,}",
         "-" if row["macs"] is None else count_text(row["macs"]), f"{row['bytes']:,}"]
        for row in weights
    ]  # fmt: skip
    below = []
    for line, row in zip(lines, weights, strict=True):
        if len(line[4]) > REASON:
            line[4] = f"{line[4][: REASON - 3]}..."
            below += [f"{row['name']}: {row['reason']}"] * (row["scheme"] != "float")  # floats have a list of their own
    return table(header, lines, right=("params", "MACs", "bytes")) + below


def _operations(operations: list[dict[str, Any]]) -> list[str]:
    lines = [[row["name"], row["kind"], row["input"], count_text(row["macs"])] for row in operations]
    return table(["name", "operation", "of", "MACs"], lines, right=("MACs",))


def _attention(rows: list[dict[str, Any]]) -> list[str]:
    return table(list(rows[0]), [list(row.values()) for row in rows])


def _edges(edges: list[dict[str, Any]]) -> list[str]:
    taken = Counter[str]()
    lines = []
    for row in edges:
        name = row["name"] if row["inside"] else row["tensor"]
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        notes = ["absorbs ReLU"] * row["relu"] + [f"shared by {row['sites']} tensors"] * (row["sites"] > 1)
        lines.append([name, row["scheme"], row["reason"], row["levels"], _list(row["readers"]), ", ".join(notes)])
    return table(["tensor", "scheme", "why", "levels", "read by", ""], lines)


def _list(names: Sequence[str], most: int = 3) -> str:
    more = f", {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _float(prepared: nn.Module, weights: list[dict[str, Any]]) -> list[str]:
    """What stays float and why; a reason that several have is said once."""
    left_out = vars(prepared)["meta"]["qat"]["left_out"]
    kept = [row for row in weights if row["scheme"] == "float" and row["layer"] not in left_out]
    said: dict[str, list[str]] = {}
    for row in [*float_islands(prepared), *kept]:
        said.setdefault(row["reason"], []).append(row["name"])
    lines: list[str] = []
    for why, names in said.items():
        said_once = f"float: {', '.join(names)}: {why}"
        lines += textwrap.wrap(said_once, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return ["", "What stays float, and why", *lines] if lines else []


def table(header: list[str], lines: list[list[str]], right: Sequence[str] = ()) -> list[str]:
    """Lines of text in columns; columns in `right` are aligned to the right."""
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    text = [
        "  ".join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(header, line, widths, strict=True)
        )
        for line in [header, ["-" * width for width in widths], *lines]
    ]
    return [line.rstrip() for line in text]
