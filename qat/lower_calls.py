"""Calls of operations of CALLS -> layers of the runtime, with the tensors that they read."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from qat.calls import CALLS
from qat.graph import Graph
from qat.results import is_padded
from qat.runtime import operations as ops
from qat.runtime.functions import encode
from qat.sizes import Sizes
from qat.translate import passing_layer, unsupported

PARTS = ("chunk", "split", "unbind")
"""Operations that return several tensors, each of which is read by an index."""

UNUSED = ("_stacklevel", "momentum", "return_indices")
"""Arguments that change nothing about the result of an evaluated network."""


def function(graph: Graph, sizes: Sizes, node: fx.Node) -> tuple[ops.Function, list[fx.Node]]:
    """The layer of a function of real numbers, and the tensors that it reads.

    Raises:
        ValueError: a form of the function that the runtime does not have.
    """
    key = graph.key(node)
    if why := graph.why_float(node):
        raise unsupported(graph, node, why)
    if key not in CALLS:
        names = ", ".join(sorted({operation.name for operation in CALLS.values()}))
        raise unsupported(graph, node, f"no such operation in the runtime; it has {names}")
    operation = CALLS[key]
    try:
        bound = operation.bind(node, graph.submodule(node))
    except ValueError as error:
        raise unsupported(graph, node, str(error)) from None
    name = operation.name
    if name == "matmul":
        bound = {"input": bound["input"], "other": bound.get("other", bound.get("mat2"))}
    if name == "div" and bound.pop("rounding_mode") is not None:
        raise unsupported(graph, node, "a division that rounds; it is computed in numbers, not in steps")
    if name == "instance_norm" and graph.submodule(node) is not None:
        bound["use_input_stats"] = bound["running_mean"] is None
    if name == "einsum":
        operands = bound.pop("operands")
        operands = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
        bound |= {f"operand{i}": tensor for i, tensor in enumerate(operands)}
    inputs: dict[str, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for parameter, value in bound.items():
        if parameter in UNUSED or value is None:
            continue
        value = plain(graph, sizes, node, value)
        if isinstance(value, fx.Node):
            inputs[parameter] = value
        elif isinstance(value, Tensor):
            constants[parameter] = value.detach()
        elif value is not torch.float32:
            settings[parameter] = value
    if name == "batch_norm" and settings.pop("training", False):
        raise unsupported(graph, node, "it takes the statistics of its batch in evaluation, too")
    if "softmax" in name and "dim" not in settings:
        raise unsupported(graph, node, "a softmax without dim=")
    layer = ops.Function(name, list(inputs), {k: list(v.shape) for k, v in constants.items()}, **settings)
    for parameter, tensor in constants.items():
        layer.constant(parameter).copy_(tensor)
    return layer, list(inputs.values())


def move(graph: Graph, sizes: Sizes, node: fx.Node, zero_point: int) -> tuple[Any, list[fx.Node]]:
    """The layer of an operation that moves or selects values, and the tensors that it reads.

    Raises:
        ValueError: a form of it that the runtime does not have.
    """
    key, source = graph.key(node), node.all_input_nodes[0]
    if is_padded(node):
        return _padded(node, zero_point), [source]
    if key is operator.getitem:
        return _index(graph, sizes, node, source)
    if key in (torch.reshape, "reshape", "view"):
        return _reshape(graph, sizes, node, zero_point), [source]
    if key is pack_padded_sequence:
        return _pack(graph, sizes, node)
    if key not in CALLS:
        return passing_layer(graph, node, zero_point), [source]
    bound = dict(graph.arguments(node))
    bound.pop(CALLS[key].parameters[0])
    name = CALLS[key].name
    if name == "flatten" and bound["end_dim"] == -1 and bound["start_dim"] >= 1:
        return ops.Reshape(shape=[0] * bound["start_dim"] + [-1]), [source]
    if name in ("expand", "repeat", "expand_as"):
        entries = sizes.shape(node) if name == "expand_as" else _entries(sizes, bound.popitem()[1])
        like = [next(n for n in graph.nodes if n.op == "placeholder")] if None in entries else []
        return ops.Move(name=name.removesuffix("_as"), sizes=entries), [source, *like]
    if name == "masked_fill":
        return ops.Move(name=name, value=zero_point), [source, bound["mask"]]
    if name == "pad":
        around = pads(plain(graph, sizes, node, bound["pad"]))
        return ops.Pad(pads=around, value=zero_point, mode=bound["mode"]), [source]
    if name == "max_unpool":
        dims = int(key.__name__[-2])
        return ops.Move(name=name, size=sizes.shape(node)[-dims:], value=zero_point), [source, bound["indices"]]
    settings = {k: plain(graph, sizes, node, v) for k, v in bound.items() if k not in UNUSED}
    if name == "adaptive_max_pool":
        settings["output_size"] = spatial_sizes(key, settings["output_size"])
    if name == "interpolate":
        settings = {k: v for k, v in settings.items() if v is not None and v is not False}
    if name == "unflatten":
        settings["sizes"] = settings.pop("unflattened_size", settings.get("sizes"))
    return ops.Move(name=name, **settings), [source]


def pads(flat: Sequence[int]) -> list[list[int]]:
    """(before, after) for the last dimensions in order, of the list that F.pad takes: the last dimension first."""
    return [[flat[i], flat[i + 1]] for i in range(0, len(flat), 2)][::-1]


def output_padding(graph: Graph, sizes: Sizes, node: fx.Node, geometry: dict[str, Any]) -> dict[str, Any]:
    """`output_padding` of a transposed convolution that is called with `output_size`; nothing for other calls.

    Raises:
        ValueError: the size depends on the batch.
    """
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
    if given is None:
        return {}
    wanted, layer, found = plain(graph, sizes, node, given), graph.submodule(node), sizes.shape(node.all_input_nodes[0])
    assert layer is not None
    kernel: Any = layer.kernel_size
    inputs = found[-len(kernel) :]
    if None in inputs:
        raise unsupported(graph, node, f"output_size= for an input whose size depends on the batch ({found})")
    columns = zip(wanted[-len(kernel) :], inputs, kernel, geometry["stride"], geometry["padding"],
                  geometry["dilation"], strict=True)  # fmt: skip
    least = [(size, (n - 1) * stride - sum(pads) + dilation * (k - 1) + 1)
             for size, n, k, stride, pads, dilation in columns if n is not None]  # fmt: skip
    return {"output_padding": [size - smallest for size, smallest in least]}


def spatial_sizes(key: Any, value: Any) -> list[int | None]:
    """The output sizes of an adaptive pooling, one a dimension; None keeps the input's."""
    dims = int(key.__name__[-2])
    return list(value) if isinstance(value, list | tuple) else [value] * dims


def plain(graph: Graph, sizes: Sizes, node: fx.Node, value: Any) -> Any:
    """An argument with sizes as numbers and tuples as lists; tensors stay nodes.

    Raises:
        ValueError: it depends on the batch size.
    """
    if isinstance(value, list | tuple):
        return [plain(graph, sizes, node, part) for part in value]
    if isinstance(value, slice):
        return slice(*(plain(graph, sizes, node, part) for part in (value.start, value.stop, value.step)))
    if not isinstance(value, fx.Node) or not graph.is_size(value):
        return value
    known = sizes.value(value)
    if known is None:
        raise unsupported(graph, node, f"an argument that depends on the batch size ({value})")
    return known


def _entries(sizes: Sizes, given: Any) -> list[int | None]:
    """Sizes of an expansion, None for the batch size."""
    if isinstance(given, fx.Node):
        first, second = (run[given] for run in sizes.runs)
        return [a if a == b else None for a, b in zip(first, second, strict=True)]
    return [sizes.value(size) if isinstance(size, fx.Node) else size for size in given]


def _index(graph: Graph, sizes: Sizes, node: fx.Node, source: fx.Node) -> tuple[Any, list[fx.Node]]:
    operation = CALLS.get(graph.key(source))
    if operation is not None and operation.name in PARTS:
        bound = list(graph.arguments(source).items())
        size = None if operation.name == "unbind" else plain(graph, sizes, node, bound[1][1])
        index = node.args[1]
        if not isinstance(index, int):
            raise unsupported(graph, node, f"several parts at once, {index}; read them one by one")
        return ops.Move(name="part", of=operation.name, size=size, dim=bound[-1][1], index=index), [source]
    index = node.args[1]
    index = tuple(plain(graph, sizes, node, p) for p in index) if isinstance(index, tuple) else (
        plain(graph, sizes, node, index),
    )  # fmt: skip
    stored = encode(index)
    if stored is None:
        raise unsupported(graph, node, f"index {index!r}; numbers, slices, None and an ellipsis can be lowered")
    if all(isinstance(part, list) for part in stored) or (stored[0] == "..." and isinstance(stored[-1], list)):
        offset = 0 if isinstance(stored[0], list) else -len(stored)
        slices = [[i + offset, part[0] or 0, part[1], part[2] or 1] for i, part in enumerate(stored)
                  if part != [None, None, None] and isinstance(part, list)]  # fmt: skip
        if all(isinstance(part, list) for part in stored[1:]):
            return ops.Slice(slices=slices), [source]
    return ops.Move(name="index", index=stored), [source]


def _reshape(graph: Graph, sizes: Sizes, node: fx.Node, zero_point: int) -> Any:
    """Sizes that are computed are read off the result's shape."""
    try:
        return passing_layer(graph, node, zero_point)
    except (ValueError, TypeError):
        shape = sizes.shape(node)
    if shape.count(None) > 1:
        raise unsupported(graph, node, f"more than one size depends on the batch ({shape})")
    keeps = shape[:1] == [None] and all(run[node][0] == run[node.all_input_nodes[0]][0] for run in sizes.runs)
    return ops.Reshape(shape=[(0 if keeps and i == 0 else -1) if n is None else n for i, n in enumerate(shape)])


def _pack(graph: Graph, sizes: Sizes, node: fx.Node) -> tuple[Any, list[fx.Node]]:
    names = ("input", "lengths", "batch_first", "enforce_sorted")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    settings: dict[str, Any] = {
        "batch_first": given.get("batch_first", False), "enforce_sorted": given.get("enforce_sorted", True),
    }  # fmt: skip
    lengths: Any = given["lengths"]
    if isinstance(lengths, fx.Node) and not graph.is_size(lengths):
        return ops.Move(name="pack", **settings), [given["input"], lengths]
    known = plain(graph, sizes, node, lengths)
    settings["given"] = known.tolist() if isinstance(known, Tensor) else known
    return ops.Move(name="pack", **settings), [given["input"]]


def _padded(node: fx.Node, zero_point: int) -> Any:
    """A part of `pad_packed_sequence`: the tensor, or the lengths."""
    call = node.args[0]
    assert isinstance(call, fx.Node)
    if node.args[1] == 1:
        return ops.Move(name="packed_lengths")
    names = ("sequence", "batch_first", "padding_value", "total_length")
    given: dict[str, Any] = dict(zip(names, call.args, strict=False)) | call.kwargs
    value = zero_point or given.get("padding_value", 0.0)
    settings = {"batch_first": given.get("batch_first", False), "total_length": given.get("total_length")}
    return ops.Move(name="pad_packed", padding_value=value, **settings)


def is_parts(graph: Graph, node: fx.Node) -> bool:
    """Whether a node is a tuple of tensors."""
    operation = CALLS.get(graph.key(node))
    return node.target is pad_packed_sequence or (operation is not None and operation.name in PARTS)
