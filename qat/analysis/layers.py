"""What was quantized, how, and what was not and why, as data: one row a layer, edge and operation."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.analysis.stored import of_weight
from qat.fake_quant import FakeQuantize
from qat.graph import Graph
from qat.kinds import Kind
from qat.layers import Quantized, QuantizedRecurrent, Weight, type_name
from qat.macs import Macs, calls, is_layer, weight_names, weight_path
from qat.modes import quantizers
from qat.parts import graphs
from qat.reads import attention, names, operations
from qat.requests import target_reads
from qat.scheme.config import ATTENTION
from qat.split import join
from qat.targets import TARGETS, Target

Grids = list[FakeQuantize | None]
"""Of the tensors that something reads; None for real numbers."""


@torch.no_grad()
def layer_table(prepared: nn.Module) -> list[dict[str, Any]]:
    """One row for every weight of a quantizable layer and every quantized edge.

    Args:
        prepared: from `qat.prepare`.

    Returns:
        Rows with `name`, `kind`, `scheme`, `reason`, `bits`; of weights `layer`, `shape`, `parameters`, `macs`
        (multiply-accumulates a sample), `input` (formats of what it multiplies) and `input_bits` (32 for float),
        `reads` (paths of the quantizers of that), `quantizer` (path of the weight's, or the edge's own),
        `bytes` (in the int8 checkpoint, scales included) and `codes` (without), `bias_bytes`, `calls`; of edges
        `tensor`, `levels`, `relu`, `sites`, `inside` (of a recurrent layer) and `readers`; once known `scale_min`,
        `scale_max`, `sqnr_db` (signal to quantization noise of the weight). What does not apply is missing or None.
    """
    about: dict[str, Any] = vars(prepared)["meta"]["qat"]
    reasons, macs, reads = about["reasons"], about["macs"], Reads(prepared)
    rows: list[dict[str, Any]] = []
    paths = {quantizer: name for name, quantizer in quantizers(prepared)}
    for name, module in prepared.named_modules():
        if not is_layer(module) or (name not in reasons and name not in about["left_out"]):
            continue
        reason = reasons.get(name, "")
        made = (
            [
                {"quantizer": paths[weight.weight_quantizer]}
                | _weight_row(weight, module, reason, about["config"].target)
                for weight in module.weights()
            ]
            if isinstance(module, Quantized)
            else [_float_row(module, key, reason or about["left_out"][name]) for key in weight_names(module)]
        )
        for row in made:
            path = weight_path(name, row.pop("weight"))
            grids = reads.inside(module, path) or reads.layers.get(name, [None])
            row["reads"] = [paths[grid] for grid in grids if grid is not None]
            rows.append(
                {"name": path, "kind": type_name(module), "layer": name} | row
                | {"macs": _a_sample(macs, macs.layers.get(path)), "calls": max(1, reads.calls[name])}
                | _inputs([] if "Embedding" in type_name(module) else grids)
            )  # fmt: skip
    readers = reads.readers()
    for name, quantizer in quantizers(prepared):
        if quantizer.shape is None:
            owner = prepared.get_submodule(name.rpartition(".")[0])
            inside = isinstance(owner, Quantized) and not name.endswith("input_quantizer")
            read = readers.get(quantizer, []) + [f"inside {name.rpartition('.')[0]}"] * inside
            rows.append({"name": name, "quantizer": name, "readers": read, "inside": inside} | _edge_row(quantizer))
    return rows


def operation_table(prepared: nn.Module) -> list[dict[str, Any]]:
    """One row for everything else that multiplies matrices: attention, functions of torch, code that is not recorded.

    Returns:
        Rows with `name`, `kind`, `macs` (a sample), `input` and `input_bits` (the fewest of its tensors' bits).
    """
    macs: Macs = vars(prepared)["meta"]["qat"]["macs"]
    rows = []
    for path, recorded in graphs(prepared).items():
        graph, nodes = Graph(recorded), calls(recorded)
        known = _names(graph)
        for key, number in macs.calls.get(path, {}).items():
            node, name, grids = nodes.get(key), key.partition(":")[0], Grids([None])
            if node is not None:
                name = known[node]
                if graph.kind(node) in (Kind.arithmetic, Kind.add):
                    grids = [graph.quantizer_of(x) for x in graph.operands(node)]
            row = {"name": join(path, name), "kind": key.partition(":")[0], "macs": _a_sample(macs, number)}
            rows.append(row | _inputs(grids))
    for path, number in macs.code.items():
        row = {"name": path or type(prepared).__name__, "kind": "code", "macs": _a_sample(macs, number)}
        rows.append(row | _inputs([None]))
    return rows


def attention_table(prepared: nn.Module) -> list[dict[str, Any]]:
    """One row for each call of attention that was recorded.

    Returns:
        Rows with `name`, and the format of each tensor that it reads (`query` and the others of
        `qat.scheme.config.ATTENTION`): what rules call `NAME.query`.
    """
    rows = []
    for path, recorded in graphs(prepared).items():
        graph = Graph(recorded)
        for call in attention(graph):
            grids = [graph.quantizer_of(arg) for _, arg in call.reads(graph).values()]
            formats = ["float" if grid is None else format_text(grid) for grid in grids]
            rows.append({"name": join(path, call.name), **dict(zip(ATTENTION, formats, strict=True))})
    return rows


class Reads:
    """Who reads which quantized edge.

    Attributes:
        layers: path of a layer -> the quantizers of its inputs, of all its calls.
        calls: path of a layer -> how often it is called.
    """

    def __init__(self, prepared: nn.Module) -> None:
        self.layers: dict[str, Grids] = {}
        self.calls: Counter[str] = Counter()
        self._readers: dict[FakeQuantize, list[str]] = {}
        target = TARGETS[vars(prepared)["meta"]["qat"]["config"].target]
        for path, recorded in graphs(prepared).items():
            single = isinstance(prepared.get_submodule(path), Quantized)
            for node, name, grids in _readings(recorded, target):
                at = path if single else join(path, name)
                if node.op == "call_module":
                    self.calls[at] += 1
                    known = self.layers.setdefault(at, [])
                    known += [grid for grid in grids if grid not in known]
                for grid in grids:
                    if grid is not None and at not in self._readers.setdefault(grid, []):
                        self._readers[grid].append(at)

    def inside(self, layer: nn.Module, path: str) -> Grids:
        """What a recurrent layer's weight multiplies, if the layer itself makes it."""
        if not isinstance(layer, QuantizedRecurrent):
            return []
        name = path.rpartition(".")[2]
        for cell in range(layer.form.layers * layer.form.directions):
            for key, sources in zip(layer.weight_names(cell), layer.inputs_of_cell(cell), strict=False):
                if key == name:
                    return list(sources)
        return []

    def readers(self) -> Mapping[FakeQuantize, list[str]]:
        """Quantizer -> names of the layers and operations that read what it makes."""
        return self._readers


def _readings(recorded: fx.GraphModule, target: Target) -> Iterator[tuple[fx.Node, str, Grids]]:
    """Who reads what, by the names that rules have for them."""
    graph = Graph(recorded)
    held, named = graph.held_for_layers(), names(graph)
    for node in graph.nodes:
        if node in held:
            continue
        of_layer = graph.kind(node) in (Kind.layer, Kind.float_layer)
        operands = graph.operands(node) if of_layer else target_reads(graph, node, target)
        operands = [*operands, *(arg for reader, arg in named if reader is node)]
        by_name: dict[str, Grids] = {}
        for operand in dict.fromkeys(operands):
            sources = [graph.given_grid(s) or graph.submodule(s) for s in graph.sources(operand)]
            grids = by_name.setdefault(named.get((node, operand), _name(graph, node)), [])
            grids += [s if isinstance(s, FakeQuantize) else None for s in sources]
        for name, grids in by_name.items():
            yield node, name, list(dict.fromkeys(grids))


def _name(graph: Graph, node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else graph.name(node)


def _names(graph: Graph) -> dict[fx.Node, str]:
    """A name for every node: that of rules, the path of the module that it calls, or a readable one with a number."""
    found, taken = operations(graph), Counter[str]()
    for node in graph.nodes:
        if node not in found:
            name = _name(graph, node)
            taken[name] += node.op in ("call_function", "call_method")
            found[node] = name if taken[name] <= 1 else f"{name}_{taken[name]}"
    return found


def _inputs(grids: Grids) -> dict[str, Any]:
    names = dict.fromkeys("float" if grid is None else format_text(grid) for grid in grids)
    bits = min((32 if grid is None else grid.scheme.bits or 32 for grid in grids), default=32)
    return {"input": " x ".join(names), "input_bits": 32 if None in grids else bits}


def format_text(quantizer: FakeQuantize) -> str:
    """The format of a tensor without its range: `int8`, `uint8`, `e4m3fn`."""
    if quantizer.scheme.format == "int":
        return f"{'' if quantizer.signed else 'u'}int{quantizer.scheme.bits}"
    return quantizer.scheme.describe().partition(" ")[0]


def _a_sample(macs: Macs, number: int | None) -> float | None:
    return None if number is None else number / macs.samples


def _float_row(layer: nn.Module, key: str, reason: str) -> dict[str, Any]:
    weight: Tensor = getattr(layer, key)
    size, bias = 4 * weight.numel(), getattr(layer, key.replace("weight", "bias"), None)
    return {
        "weight": key, "scheme": "float", "reason": f"stays float: {reason}", "shape": list(weight.shape),
        "parameters": weight.numel(), "bits": 32, "bytes": size, "codes": size,
        "bias_bytes": 0 if bias is None else 4 * weight.shape[0],
    }  # fmt: skip


def _weight_row(stored: Weight, layer: Quantized, reason: str, target: str) -> dict[str, Any]:
    quantizer, kept = stored.weight_quantizer, getattr(layer, stored.name)
    scheme, limit = quantizer.scheme, TARGETS[target].weight_bits
    if scheme.bits == limit < 8:
        reason = f"{reason} ({target} takes {limit} bits)"
    size = of_weight(quantizer, stored.tensor)
    row = {
        "weight": stored.name, "scheme": scheme.describe(), "reason": reason, "shape": list(kept.shape),
        "parameters": kept.numel(), "bits": scheme.bits or 32, "bytes": size.codes + size.tables, "codes": size.codes,
        "bias_bytes": 4 * stored.tensor.shape[0] if layer.multiplies or layer.biased else 0,
    }  # fmt: skip
    return row | (_measured(stored) if quantizer.calibrated else {})


def _measured(stored: Weight) -> dict[str, Any]:
    """Scales, and what quantization does to the weight."""
    quantizer, weight = stored.weight_quantizer, stored.tensor
    scale = quantizer.scales(weight)
    mode, quantizer.mode = quantizer.mode, type(quantizer.mode).frozen
    meant = quantizer.range.transform(quantizer.rows(weight))  # DoReFa squashes first
    noise = quantizer.rows(quantizer(weight)) - meant
    quantizer.mode = mode
    signal, power = float(meant.square().sum()), float(noise.square().sum())
    return {
        "scale_min": float(scale.min()),
        "scale_max": float(scale.max()),
        "sqnr_db": 10 * float(torch.log10(torch.tensor(signal / power))) if power > 0 and signal > 0 else None,
    }


def _edge_row(quantizer: FakeQuantize) -> dict[str, Any]:
    row: dict[str, Any] = {
        "kind": "edge", "scheme": quantizer.scheme.describe(), "bits": quantizer.scheme.bits,
        "tensor": quantizer.name, "relu": quantizer.relu, "sites": quantizer.sites,
        "levels": f"[{quantizer.quant_min:g}, {quantizer.quant_max:g}]", "reason": quantizer.reason,
    }  # fmt: skip
    if quantizer.calibrated and not quantizer.dynamic:
        scale, _ = quantizer.qparams()
        row |= {"scale_min": float(scale.min()), "scale_max": float(scale.max())}
    return row
