"""Calls that do several steps in one, as the steps, so that what stands between them can be quantized."""

import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat.attention import add_mask, causal, matmul
from qat.graph import Graph
from qat.kinds import WITH_PLACES
from qat.places import max_places
from qat.tracing import MODES, ByMode

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def decompose_attention(prepared: fx.GraphModule, shapes: dict[fx.Node, torch.Size]) -> bool:
    """Replace F.scaled_dot_product_attention by matmul, mask, softmax, dropout and matmul.

    Args:
        prepared: a traced network; it is changed.
        shapes: of its tensors, for the default scale `1 / sqrt(size of a head)`.

    Returns:
        Whether there was one.

    Raises:
        ValueError: dropout that is applied in evaluation, too.
    """
    calls = [node for node in prepared.graph.nodes if node.target is F.scaled_dot_product_attention]
    for node in calls:
        given: dict[str, Any] = dict(zip(_PARAMETERS, node.args, strict=False)) | node.kwargs
        dropout = _dropout(prepared, node, given.get("dropout_p", 0.0))
        scale = given.get("scale")
        scale = 1 / math.sqrt(shapes[given["query"]][-1]) if scale is None else scale
        with prepared.graph.inserting_before(node):
            call, method = prepared.graph.call_function, prepared.graph.call_method
            steps: list[fx.Node] = []
            keys, values = given["key"], given["value"]
            if given.get("enable_gqa"):
                steps += [*_repeated(prepared, keys, shapes, given["query"])]
                keys = steps[-1]
                steps += [*_repeated(prepared, values, shapes, given["query"])]
                values = steps[-1]
            steps.append(method("transpose", (keys, -2, -1)))
            steps.append(call(matmul, (given["query"], steps[-1])))
            steps.append(call(torch.mul, (steps[-1], scale)))
            if given.get("is_causal"):
                steps.append(call(causal, (steps[-1],)))
            if given.get("attn_mask") is not None:
                steps.append(call(add_mask, (steps[-1], given["attn_mask"])))
            steps.append(call(torch.softmax, (steps[-1], -1)))
            if dropout is not None:
                steps.append(prepared.graph.call_module(dropout, (steps[-1],)))
            steps.append(call(matmul, (steps[-1], values)))
        for step in steps:
            step.meta = dict(node.meta)
        node.replace_all_uses_with(steps[-1])
        prepared.graph.erase_node(node)
        if isinstance(given.get("dropout_p"), fx.Node) and not given["dropout_p"].users:
            prepared.graph.erase_node(given["dropout_p"])
    prepared.recompile()
    return bool(calls)


def _dropout(prepared: fx.GraphModule, node: fx.Node, share: Any) -> str | None:
    """The path of a new nn.Dropout; None where nothing is ever dropped."""
    train = evaluation = share
    if isinstance(share, fx.Node):
        module = prepared.get_submodule(str(share.target)) if share.op == "call_module" else None
        if not isinstance(module, ByMode):
            raise ValueError(f"'{node.name}': dropout_p={share} is computed; give a number")
        train, evaluation = module.train_value, module.eval_value
    if evaluation:
        raise ValueError(
            f"'{node.name}': dropout_p={evaluation} drops values in evaluation, too; pass "
            f"dropout_p=p if self.training else 0.0"
        )
    if not train:
        return None
    prepared.add_submodule(f"{MODES}.{node.name}", nn.Dropout(float(train)))
    return f"{MODES}.{node.name}"


def _repeated(
    prepared: fx.GraphModule, heads: fx.Node, shapes: dict[fx.Node, torch.Size], queries: fx.Node
) -> list[fx.Node]:
    """Steps that repeat each of the heads [..., heads, steps, size] for the group of queries that shares it."""
    shape, method = shapes[heads], prepared.graph.call_method
    group = shapes[queries][-3] // shape[-3]
    column = method("unsqueeze", (heads, -3))
    wide = method("expand", (column, *[-1] * (len(shape) - 2), group, -1, -1))
    return [column, wide, method("flatten", (wide, -4, -3))]


def decompose_extremes(prepared: fx.GraphModule) -> bool:
    """Replace maxima and minima that come with their places by what is read of them.

    The values are moved, the places are computed. Of an adaptive pooling only the values, if nothing else is read.

    Returns:
        Whether there was one.
    """
    graph, found = Graph(prepared), False
    for node in graph.nodes:
        for reader in [user for user in node.users if _part(user) is not None and not user.users]:
            if node.target in _EXTREMES or graph.has_places(node):
                prepared.graph.erase_node(reader)
        parts = [_part(user) for user in node.users]
        known = (_along_dimension(node) or _pooling(graph, node)) if None not in parts else None
        if known is None or any((part or 0) >= len(known[0]) for part in parts):
            continue
        functions, args, kwargs = known
        for reader in list(node.users):
            with prepared.graph.inserting_before(reader):
                result = prepared.graph.call_function(functions[_part(reader) or 0], args, kwargs)
            result.meta = dict(node.meta)
            reader.replace_all_uses_with(result)
            prepared.graph.erase_node(reader)
        prepared.graph.erase_node(node)
        found = True
    prepared.recompile()
    return found


_Known = tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]
_EXTREMES: dict[Any, tuple[Any, Any]] = {
    **dict.fromkeys((torch.max, "max"), (torch.amax, torch.argmax)),
    **dict.fromkeys((torch.min, "min"), (torch.amin, torch.argmin)),
}


def _along_dimension(node: fx.Node) -> _Known | None:
    """The functions of values and places, and their arguments, of a maximum or minimum along a dimension."""
    functions = _EXTREMES.get(node.target) if node.op in ("call_function", "call_method") else None
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    if functions is None or not isinstance(given.get("dim"), int):
        return None
    return functions, (given["input"], given["dim"], given.get("keepdim", False)), {}


def _pooling(graph: Graph, node: fx.Node) -> _Known | None:
    """The functions of values and, but for adaptive poolings, of places, and their arguments; None for no pooling."""
    module, key = graph.submodule(node), graph.key(node)
    if not graph.has_places(node):
        return None
    adaptive = "adaptive" in key.__name__.lower()
    names = ("output_size",) if adaptive else ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    given: dict[str, Any]
    if isinstance(module, _POOLS):
        function = getattr(F, f"{'adaptive_' * adaptive}max_pool{key.__name__[-2:]}")
        given = {name: getattr(module, name) for name in names}
    else:
        function = WITH_PLACES.get(key)
        given = dict(zip(("input", *names), node.args, strict=False)) | node.kwargs
        given = {name: value for name, value in given.items() if name in names}
    if function is None:
        return None
    if adaptive:
        return (function,), (node.all_input_nodes[0],), given
    dims, kernel = int(function.__name__[-2]), given["kernel_size"]
    given["kernel_size"] = tuple(kernel) if isinstance(kernel, list | tuple) else (kernel,) * dims
    return (function, max_places), (node.all_input_nodes[0],), given


_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)


def unpool_by_function(prepared: fx.GraphModule) -> bool:
    """Replace calls of nn.MaxUnpool1d and its kind by the functions that they call.

    Returns:
        Whether there was one.
    """
    graph = Graph(prepared)
    calls = [n for n in graph.nodes if isinstance(graph.submodule(n), nn.MaxUnpool1d | nn.MaxUnpool2d | nn.MaxUnpool3d)]
    for node in calls:
        module: Any = graph.submodule(node)
        given = dict(zip(("input", "indices", "output_size"), node.args, strict=False)) | node.kwargs
        given |= {name: getattr(module, name) for name in ("kernel_size", "stride", "padding")}
        function = getattr(F, f"max_unpool{type(module).__name__[-2:]}")
        with prepared.graph.inserting_before(node):
            result = prepared.graph.call_function(function, (given.pop("input"), given.pop("indices")), given)
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        prepared.graph.erase_node(node)
    prepared.recompile()
    return bool(calls)


def _part(reader: fx.Node) -> int | None:
    """Which part of the pair (values, indices) a node takes; None for another use of it."""
    if reader.target is operator.getitem and reader.args[1] in (0, 1):
        return int(reader.args[1])  # type: ignore[arg-type]
    names = {"values": 0, "indices": 1}
    return names.get(str(reader.args[1])) if reader.target is getattr else None
