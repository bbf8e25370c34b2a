"""What was quantized, how, and what was not and why: one row a layer and edge."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.calls import CALLS
from qat.fake_quant import FakeQuantize
from qat.fitted import Product
from qat.functional import computed_weight
from qat.graph import Graph
from qat.kinds import Kind
from qat.layers import SWAPS, Quantized, Weight, type_name
from qat.modes import quantizers
from qat.parts import graphs
from qat.split import join


@torch.no_grad()
def layer_table(prepared: nn.Module) -> list[dict[str, Any]]:
    """One row for every quantizable layer and every quantized edge.

    Args:
        prepared: from `qat.prepare`.

    Returns:
        Rows with `name`, `kind`, `scheme`, `reason`, `shape`, `parameters`, `bits`, `bytes`, `scale_min`, `scale_max`,
        `sqnr_db` (signal to quantization noise of the weight); what does not apply is None.
    """
    about: dict[str, Any] = vars(prepared)["meta"]["qat"]
    reasons: dict[str, str] = about["reasons"]
    rows: list[dict[str, Any]] = []
    for name, module in prepared.named_modules():
        kind, reason = type_name(module), reasons.get(name, "")
        if isinstance(module, Quantized):
            rows += [_weight_row(_path(name, w.name), kind, w, module, reason) for w in module.weights()]
        elif type(module) in SWAPS and name in reasons:
            kept = [(key, getattr(module, key)) for key in _weight_names(module)]
            rows += [_row(_path(name, key), kind, "float", f"stays float: {reason}", p, 32) for key, p in kept]
    rows += [_edge_row(name, quantizer) for name, quantizer in quantizers(prepared) if quantizer.shape is None]
    return rows


def _path(layer: str, weight: str) -> str:
    """What a weight is called: its layer, unless that has several."""
    return layer if weight == "weight" else f"{layer}.{weight}"


def _weight_names(module: nn.Module) -> list[str]:
    """Names of a float layer's weights: a recurrent one has several."""
    several = [key for key, _ in module.named_parameters(recurse=False) if key.startswith("weight_")]
    return several or ["weight"]


def _row(name: str, kind: str, scheme: str, reason: str, weight: Tensor, bits: int) -> dict[str, Any]:
    return {
        "name": name, "kind": kind, "scheme": scheme, "reason": reason, "shape": list(weight.shape),
        "parameters": weight.numel(), "bits": bits, "bytes": -(-weight.numel() * bits // 8),
    }  # fmt: skip


def _weight_row(name: str, kind: str, stored: Weight, layer: Quantized, reason: str) -> dict[str, Any]:
    quantizer, kept = stored.weight_quantizer, getattr(layer, stored.name)
    row = _row(name, kind, quantizer.scheme.describe(), reason, kept, quantizer.scheme.bits or 32)
    if isinstance(quantizer.fitted, Product):  # a code is for a vector
        row["bytes"] = -(-quantizer.fitted.indices.numel() * row["bits"] // 8)
    if quantizer.calibrated:
        weight = stored.tensor
        scale = quantizer.scales(weight)
        mode, quantizer.mode = quantizer.mode, type(quantizer.mode).frozen
        meant = quantizer.range.transform(quantizer.rows(weight))  # DoReFa squashes first
        noise = quantizer.rows(quantizer(weight)) - meant
        quantizer.mode = mode
        signal = float(meant.square().sum())
        power = float(noise.square().sum())
        row |= {
            "scale_min": float(scale.min()),
            "scale_max": float(scale.max()),
            "sqnr_db": 10 * float(torch.log10(torch.tensor(signal / power))) if power > 0 and signal > 0 else None,
        }
    return row


def _edge_row(name: str, quantizer: FakeQuantize) -> dict[str, Any]:
    row: dict[str, Any] = {
        "name": name, "kind": "edge", "scheme": quantizer.scheme.describe(), "bits": quantizer.scheme.bits,
        "reason": f"[{quantizer.quant_min:g}, {quantizer.quant_max:g}]" + (", absorbs ReLU" if quantizer.relu else ""),
    }  # fmt: skip
    if quantizer.calibrated and not quantizer.dynamic:
        scale, _ = quantizer.qparams()
        row |= {"scale_min": float(scale.min()), "scale_max": float(scale.max())}
    return row


INTEGER_ARITHMETIC = ("matmul", "mul")
"""Arithmetic of two tensors that has an integer form: the runtime's, or an engine's from the exported pattern."""


def float_islands(prepared: nn.Module) -> list[dict[str, str]]:
    """Operations that the integer network computes in float: from dequantized values, requantized where they are read.

    Returns:
        Rows with `name` (of the tensor, layer or module), `operation` and `reason`.
    """
    about: dict[str, Any] = vars(prepared)["meta"]["qat"]
    rows = [
        {"name": path or type(prepared).__name__, "operation": "forward", "reason": f"its code is not recorded: {why}"}
        for path, why in about["untraced"].items()
    ]
    rows += [
        {"name": path, "operation": type(prepared.get_submodule(path)).__name__, "reason": why}
        for path, why in about["left_out"].items()
    ]
    for path, recorded in graphs(prepared).items():
        rows += [
            row | {"name": join(path, row["name"])}
            for row in _islands(Graph(recorded), recorded.meta.get("opaque", ()))
        ]
    return rows


def _islands(graph: Graph, opaque: Sequence[str]) -> list[dict[str, str]]:
    rows, weights = [], graph.held_for_layers()
    for node in graph.nodes:
        if node in weights:
            continue
        kind, key = graph.kind(node), graph.key(node)
        if node.target in opaque:  # its own parts are listed
            continue
        known = CALLS.get(key)
        operation = getattr(key, "__name__", str(key)) if known is None else known.name
        reason = f"no integer form: {operation} is computed in float"
        if kind is Kind.other:
            unknown = computed_weight(node) or f"the runtime has no {operation}: it cannot be lowered"
            reason = reason if known is not None else unknown
        elif kind is Kind.batch_norm:
            layer = node.all_input_nodes[0]
            if graph.kind(layer) is Kind.layer and graph.batch_norm_after(layer) is node:
                continue
            reason = "no layer in front of it takes it in: computed in float"
        elif kind is Kind.arithmetic:
            if operation in INTEGER_ARITHMETIC:
                continue
        elif not (kind is Kind.average and known is not None):
            continue
        rows.append({"name": graph.name(node), "operation": operation, "reason": reason})
    return rows


def report(prepared: nn.Module) -> str:
    """A table of every layer and edge as text: scheme, why, shape, parameters, size; then what is computed in float.

    >>> import qat
    >>> net = qat.prepare(torch.nn.Sequential(torch.nn.Linear(4, 2)), qat.preset("int8"), torch.zeros(1, 4))
    >>> print(report(net).splitlines()[2].split()[:4])
    ['0', 'QuantLinear', 'int8', 'symmetric']
    """
    rows = layer_table(prepared)
    header = ["layer or edge", "kind", "scheme", "why", "shape", "bytes"]
    lines = [
        [row["name"], row["kind"], row["scheme"], row["reason"], "x".join(map(str, row.get("shape", []))),
         str(row.get("bytes", ""))]
        for row in rows
    ]  # fmt: skip
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [header, ["-" * width for width in widths], *lines]]  # fmt: skip
    parameters = sum(row.get("parameters", 0) for row in rows)
    size = sum(row.get("bytes", 0) for row in rows)
    text.append(f"{parameters:,} weights in {size:,} bytes ({size / max(4 * parameters, 1):.1%} of float32)")
    text += [f"float: {row['name']}: {row['reason']}" for row in float_islands(prepared)]
    return "\n".join(text) + "\n"
