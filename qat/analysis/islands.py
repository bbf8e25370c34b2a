"""Operations that the integer network computes in float, and why."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from qat.analysis.stored import is_folded
from qat.calls import CALLS
from qat.fake_quant import FakeQuantize
from qat.functional import computed_weight
from qat.graph import Graph
from qat.kinds import Kind
from qat.layers import type_name
from qat.parts import graphs
from qat.split import join
from qat.targets import TARGETS

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
    name = about["config"].target
    for path, recorded in graphs(prepared).items():
        graph = Graph(recorded)
        inside = _of_target(graph, name)
        if TARGETS[name].requantize == "float":  # others compute every operation in integers, or refuse it
            inside += _islands(graph, recorded.meta.get("opaque", ()))
        rows += [row | {"name": join(path, row["name"])} for row in inside]
    return rows


def _of_target(graph: Graph, name: str) -> list[dict[str, str]]:
    """What has an integer form, but not in the target's engine."""
    rows, target = [], TARGETS[name]
    for node, layer in graph.layers():
        layer_type = type_name(layer).removeprefix("Quant")
        kernels = [kernel for kernel in target.kernels(layer_type) if kernel.weight.quantized]
        if kernels and not any(kernel.integers for kernel in kernels):
            how = ", ".join(dict.fromkeys(kernel.name for kernel in kernels))
            reason = f"target={name} multiplies {layer_type} in float ({how})"
            rows.append({"name": str(node.target), "operation": layer_type, "reason": reason})
    for node in graph.nodes:
        kind, known = graph.kind(node), CALLS.get(graph.key(node))
        if kind in (Kind.add, Kind.arithmetic, Kind.average):
            operation = known.name if known is not None and kind is Kind.arithmetic else kind.name
            if operation not in target.operations:
                reason = f"target={name} computes {operation} in float"
                rows.append({"name": graph.name(node), "operation": operation, "reason": reason})
    return rows


def _islands(graph: Graph, opaque: Sequence[str]) -> list[dict[str, str]]:
    rows, weights = [], graph.held_for_layers()
    for node in graph.nodes:
        if node in weights or _pads_integers(graph, node):
            continue
        kind, key = graph.kind(node), graph.key(node)
        if node.target in opaque:  # its own parts are listed
            continue
        known = CALLS.get(key)
        operation = getattr(key, "__name__", str(key)) if known is None else known.name
        reason = f"no integer form: {operation} is computed in float"
        if why := graph.why_float(node):
            reason = f"{why}: it stays float, and cannot be lowered"
        elif graph.takes_part(node):  # of what is listed
            continue
        elif kind is Kind.other:
            unknown = computed_weight(node) or f"the runtime has no {operation}: it cannot be lowered"
            reason = reason if known is not None else unknown
        elif kind is Kind.batch_norm:
            if is_folded(graph, node):
                continue
            reason = "no layer in front of it takes it in: computed in float"
        elif kind is Kind.arithmetic:
            if operation in INTEGER_ARITHMETIC:
                continue
            if operation == "einsum":
                reason = f"'{node.args[0]}' is no product of two matrices: computed in float"
        elif not (kind is Kind.average and known is not None):
            continue
        rows.append({"name": graph.name(node), "operation": operation, "reason": reason})
    return rows


def _pads_integers(graph: Graph, node: fx.Node) -> bool:
    """Whether a padding with a number is done on the integers of the grid behind it."""
    readers = [graph.submodule(user) for user in node.users]
    return node.target is F.pad and all(isinstance(q, FakeQuantize) and q.integer for q in readers)
