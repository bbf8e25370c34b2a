"""Where functions need a quantizer in front of them: for targets that compute them in integers, from what is on a grid.

Elsewhere a function of one tensor is computed in float from what is before it, and the quantizer stands where its
result is read.
"""

from typing import Any

from torch import fx

from qat.calls import CALLS
from qat.graph import Graph
from qat.kinds import POINTWISE, ROW_WISE, Kind

MASKS = ("causal", "add_mask", "mask_out", "masked_fill")


def function_inputs(graph: Graph, node: fx.Node) -> list[fx.Node]:
    """The tensors that a function reads and that need a grid for it; none for what is no function.

    Limits to a range are part of the grid that follows them, factors part of its scale, a BatchNorm behind a layer of
    that layer, and of functions in a row the first one reads a grid.
    """
    if graph.kind(node) is Kind.batch_norm:
        source = node.all_input_nodes[0]
        return [] if graph.batch_norm_after(source) is node else [source]
    name = _name(graph, node)
    if graph.kind(node) is not Kind.other or name is None or _scales(graph, node) or limits(graph, node):
        return []
    source = before_masks(graph, node) if name == "softmax" else node.all_input_nodes[0]
    if name in POINTWISE:
        return [] if all(_chained(graph, s) for s in graph.sources(source)) else [source]
    return [source] if name in ROW_WISE else []


def before_masks(graph: Graph, softmax: fx.Node) -> fx.Node:
    """What a softmax reads, before masks: minus infinity lies on no grid."""
    source = softmax.all_input_nodes[0]
    while _name(graph, source) in MASKS:
        source = source.all_input_nodes[0]
    return source


def limits(graph: Graph, node: fx.Node) -> tuple[float, float] | None:
    """Lowest and highest value of an operation that does nothing but limit values to a range with 0 in it."""
    if graph.kind(node) is Kind.relu:
        return 0.0, float("inf")
    operation = CALLS.get(graph.key(node))
    if operation is None or operation.name not in ("relu6", "hardtanh", "clamp"):
        return None
    bound = graph.arguments(node)
    if operation.name == "relu6":
        return 0.0, 6.0
    low, high = (bound["min_val"], bound["max_val"]) if operation.name == "hardtanh" else (bound["min"], bound["max"])
    low, high = -float("inf") if low is None else low, float("inf") if high is None else high
    fits = isinstance(low, int | float) and isinstance(high, int | float) and low <= 0 <= high
    return (low, high) if fits else None


def _name(graph: Graph, node: fx.Node) -> str | None:
    operation = CALLS.get(graph.key(node))
    return None if operation is None else operation.name


def _scales(graph: Graph, node: fx.Node) -> bool:
    """Whether an operation multiplies a tensor by a positive number."""
    name = _name(graph, node)
    if name not in ("mul", "div") or graph.kind(node) is not Kind.other:
        return False
    bound = graph.arguments(node)
    factors: list[Any] = [v for v in (bound["input"], bound["other"]) if isinstance(v, int | float)]
    by_tensor = name == "div" and not isinstance(bound["input"], fx.Node)
    return len(factors) == 1 and factors[0] > 0 and not by_tensor


def _chained(graph: Graph, node: fx.Node) -> bool:
    """Whether a tensor is a function, value by value, of one that is on a grid already."""
    if _scales(graph, node) or limits(graph, node):
        return all(_chained(graph, s) for s in graph.sources(node.all_input_nodes[0]))
    return graph.kind(node) is Kind.other and _name(graph, node) in POINTWISE
