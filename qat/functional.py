"""Layers called as functions in a traced network, made modules; what no module can stand for, made a product."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from qat.graph import Graph
from qat.layers import Functional
from qat.layers.functional import FORMS
from qat.prepared import fixed_value, is_fixed

FUNCTIONAL = "functional"
"""Where modules that stand for such calls live in a prepared network."""

FUNCTIONS: dict[Any, str] = {getattr(F, name): name for name in FORMS} | {torch.embedding: "embedding"}
"""Function -> key of FORMS."""


def insert_functional(prepared: fx.GraphModule) -> bool:
    """Replace calls of FUNCTIONS whose weight is a tensor of the network, or computed of such alone, by modules.

    The bias must be a tensor of the network or a part of one. A linear function of a weight that is computed from
    activations becomes a product of two tensors; other functions of such a weight stay.

    Args:
        prepared: a traced network; it is changed.

    Returns:
        Whether there was one.
    """
    calls = [node for node in prepared.graph.nodes if node.target in FUNCTIONS]
    for node in calls:
        _replace(prepared, node)
    prepared.graph.lint()
    prepared.recompile()
    return bool(calls)


def computed_weight(node: fx.Node) -> str | None:
    """Why a call of FUNCTIONS that is still in a prepared network stays float; None for other nodes."""
    if node.target not in FUNCTIONS:
        return None
    return (
        f"the weight of this {FUNCTIONS[node.target]} is computed from activations, or its bias is computed: it stays "
        f"float, and cannot be lowered"
    )


def _replace(prepared: fx.GraphModule, node: fx.Node) -> None:
    graph, function = Graph(prepared), FUNCTIONS[node.target]
    inputs, weight, bias, settings = _bound(node, function)
    numbers = not any(isinstance(value, fx.Node) for value in _flat(settings.values()))
    fixed = isinstance(weight, fx.Node) and is_fixed(weight) and numbers
    fixed = fixed and (function != "linear" or fixed_value(prepared, weight).dim() == 2)
    added = None if bias is None or _is_part(prepared, bias) else bias
    if fixed and (added is None or function == "linear"):
        held = [n for n in _expression(weight) if n.op == "get_attr"]
        path = max(held, key=lambda n: fixed_value(prepared, n).numel()).target
        name = next(n for n in _names(f"{FUNCTIONAL}.{path}") if n not in graph.modules)
        prepared.add_submodule(name, Functional(function, settings, str(path)))
        with prepared.graph.inserting_before(node):
            # each call gets an expression of its own, so that quantizers for other readers do not come into it
            given = (weight, None if added is not None else bias)
            copies = [_copy(prepared.graph, n) if isinstance(n, fx.Node) else None for n in given]
            result = prepared.graph.call_module(name, (*inputs, *copies))
    elif function == "linear":
        with prepared.graph.inserting_before(node):
            turned = prepared.graph.call_method("t", (weight,))
            result = prepared.graph.call_function(torch.matmul, (inputs[0], turned))
            turned.meta = dict(node.meta)
            added = bias
    else:
        return
    result.meta = dict(node.meta)
    if added is not None:
        with prepared.graph.inserting_after(result):
            result = prepared.graph.call_function(torch.add, (result, added))
        result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    prepared.graph.erase_node(node)
    for argument in (weight, bias):
        if isinstance(argument, fx.Node):
            _erase_unread(graph, argument)


def _bound(node: fx.Node, function: str) -> tuple[list[Any], Any, Any, dict[str, Any]]:
    """Activations, weight, bias and settings of a call."""
    form = FORMS[function]
    tensors = [*form.inputs, "weight"] + (["bias"] if "embedding" not in function else [])
    names = [*tensors, *form.settings]
    if function == "embedding_bag":
        names = list(inspect.signature(F.embedding_bag).parameters)
    if node.target is torch.embedding:
        names = ["weight", "input", "padding_idx", "scale_grad_by_freq", "sparse"]
    given = form.settings | dict(zip(names, node.args, strict=False)) | node.kwargs
    given["input"] = given.pop("indices", given.get("input"))
    if node.target is torch.embedding and given["padding_idx"] == -1:  # its default, that no row is padding
        given["padding_idx"] = None
    return [given.get(k) for k in form.inputs], given["weight"], given.get("bias"), {k: given[k] for k in form.settings}


def _is_part(net: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a tensor that the network holds, or a part of one: what is added to it is added to that."""
    if not is_fixed(node):
        return False
    value = fixed_value(net, node)
    sources = [fixed_value(net, n) for n in _expression(node) if n.op == "get_attr"]
    storage = value.untyped_storage()._cdata
    return 0 not in value.stride() and any(source.untyped_storage()._cdata == storage for source in sources)


def _expression(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all that it is computed of."""
    yield node
    for source in node.all_input_nodes:
        yield from _expression(source)


def _copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    return graph.node_copy(node, lambda n: _copy(graph, n))


def _erase_unread(graph: Graph, node: fx.Node) -> None:
    if node.users or not is_fixed(node):
        return
    sources = node.all_input_nodes
    graph.module.graph.erase_node(node)
    for source in sources:
        _erase_unread(graph, source)


def _names(name: str) -> Iterator[str]:
    yield name
    i = 2
    while True:
        yield f"{name}_{i}"
        i += 1


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value
