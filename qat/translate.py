"""Calls in a traced network -> layers of the runtime: arguments read, whatever form the call has."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat.graph import Graph
from qat.runtime import operations as ops
from qat.runtime.layers import RuntimeLayer

FUNCTION_NAMES: dict[Any, str] = {
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), "sigmoid"),
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh, "tanh"), "tanh"),
    **dict.fromkeys((nn.GELU, F.gelu), "gelu"),
    **dict.fromkeys((nn.SiLU, F.silu), "silu"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "hardswish"),
    **dict.fromkeys((nn.Hardsigmoid, F.hardsigmoid), "hardsigmoid"),
}


CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def geometry(layer: nn.Module, node: fx.Node) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution as the runtime's arguments; nothing for other layers.

    Raises:
        ValueError: a transposed convolution is called with `output_size`, and so depends on the size of its input.
    """
    if not isinstance(layer, CONVOLUTIONS | TRANSPOSED):
        return {}
    padding = [[0, 0]] * (layer.weight.dim() - 2) if moved_padding(layer) else _padding(layer)
    common = {"stride": list(layer.stride), "padding": padding, "dilation": list(layer.dilation),
              "groups": layer.groups}  # fmt: skip
    if isinstance(layer, CONVOLUTIONS):
        return common
    if len(node.args) > 1 or node.kwargs.get("output_size") is not None:
        raise ValueError(
            f"layer '{node.target}' cannot be lowered: it is called with output_size, which depends on the size of "
            f"its input; give the layer output_padding= instead"
        )
    return common | {"output_padding": list(layer.output_padding)}


def moved_padding(layer: nn.Module) -> list[list[int]] | None:
    """(before, after) per dimension of a padding that repeats values; None for zeros, which the layer itself adds."""
    if not isinstance(layer, CONVOLUTIONS) or layer.padding_mode == "zeros":
        return None
    return _padding(layer)


def _padding(layer: CONVOLUTIONS | TRANSPOSED) -> list[list[int]]:
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return [[total // 2, total - total // 2] for total in totals]
    return [[0, 0]] * (layer.weight.dim() - 2) if layer.padding == "valid" else [[int(p)] * 2 for p in layer.padding]


def average_layer(graph: Graph, node: fx.Node) -> RuntimeLayer:
    """The runtime layer of an average pooling, a global average pooling or a mean.

    Raises:
        ValueError: adaptive pooling to another size than 1, whose windows depend on the input's size.
    """
    module, args = graph.submodule(node), _Arguments(node)
    key = graph.key(node)
    if key in (torch.mean, "mean"):
        dims = args.get(1, "dim", None)
        if dims is None:
            raise unsupported(graph, node, "a mean over every dimension mixes the batch; give dim=")
        return ops.Mean(
            dims=[dims] if isinstance(dims, int) else list(dims), keepdim=bool(args.get(2, "keepdim", False))
        )
    adaptive = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2}
    if key in adaptive:
        size = getattr(module, "output_size", None) if module is not None else args.get(1, "output_size")
        if size not in (1, (1,), [1], (1, 1), [1, 1]):
            raise unsupported(graph, node, f"adaptive average pooling to size {size}; size 1 can be lowered")
        return ops.Mean(dims=list(range(-adaptive[key], 0)), keepdim=True)
    dims = 1 if key in (nn.AvgPool1d, F.avg_pool1d) else 2
    kernel, stride, padding, ceil_mode, include = (
        (module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad)
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d)
        else (args.get(1, "kernel_size"), args.get(2, "stride", None), args.get(3, "padding", 0),
              args.get(4, "ceil_mode", False), args.get(5, "count_include_pad", True))
    )  # fmt: skip
    if getattr(module, "divisor_override", None) or args.get(6, "divisor_override", None):
        raise unsupported(graph, node, "divisor_override")
    kernel = _tuple(kernel, dims)
    return ops.Average(
        kernel=kernel, stride=_tuple(stride or kernel, dims), padding=_tuple(padding, dims),
        ceil_mode=bool(ceil_mode), count_include_pad=bool(include),
    )  # fmt: skip


def passing_layer(graph: Graph, node: fx.Node, zero_point: int) -> RuntimeLayer:
    """The runtime layer of an operation that moves or selects values.

    Raises:
        ValueError: a form of it that the runtime does not have.
    """
    module, args, key = graph.submodule(node), _Arguments(node), graph.key(node)
    if key in (nn.MaxPool1d, nn.MaxPool2d, F.max_pool1d, F.max_pool2d):
        dims = 1 if key in (nn.MaxPool1d, F.max_pool1d) else 2
        kernel, stride, padding, dilation, ceil_mode = (
            (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            if isinstance(module, nn.MaxPool1d | nn.MaxPool2d)
            else (args.get(1, "kernel_size"), args.get(2, "stride", None), args.get(3, "padding", 0),
                  args.get(4, "dilation", 1), args.get(5, "ceil_mode", False))
        )  # fmt: skip
        kernel = _tuple(kernel, dims)
        return ops.MaxPool(
            kernel=kernel, stride=_tuple(stride or kernel, dims), padding=_tuple(padding, dims),
            dilation=_tuple(dilation, dims), ceil_mode=bool(ceil_mode),
        )  # fmt: skip
    if isinstance(module, nn.Flatten) or key in (torch.flatten, "flatten"):
        start = module.start_dim if isinstance(module, nn.Flatten) else args.get(1, "start_dim", 0)
        end = module.end_dim if isinstance(module, nn.Flatten) else args.get(2, "end_dim", -1)
        if end != -1 or start < 1:
            raise unsupported(graph, node, f"flatten from {start} to {end}; flatten(k, -1) with k >= 1 can be lowered")
        return ops.Reshape(shape=[0] * start + [-1])
    if key in (torch.reshape, "reshape", "view"):
        return ops.Reshape(shape=_shape(graph, node, args.sizes("shape")))
    if key in (torch.permute, "permute"):
        return ops.Permute(dims=list(args.sizes("dims")))
    if key is operator.getitem:
        return ops.Slice(slices=_slices(graph, node, node.args[1]))
    if key is F.pad:
        flat = args.get(1, "pad")
        pairs = [[flat[i], flat[i + 1]] for i in range(0, len(flat), 2)]
        return ops.Pad(pads=pairs[::-1], value=zero_point, mode=args.get(2, "mode", "constant"))
    raise unsupported(graph, node, "no integer form yet")


@dataclass(frozen=True)
class _Arguments:
    """Positional or keyword arguments of a call."""

    node: fx.Node

    def get(self, position: int, name: str, default: Any = ...) -> Any:
        if len(self.node.args) > position:
            return self.node.args[position]
        return self.node.kwargs[name] if default is ... else self.node.kwargs.get(name, default)

    def sizes(self, name: str) -> tuple[Any, ...]:
        """A list of numbers, given as one list or as arguments of their own."""
        first = self.get(1, name)
        return tuple(first) if isinstance(first, list | tuple) else tuple(self.node.args[1:])


def unsupported(graph: Graph, node: fx.Node, why: str) -> ValueError:
    """The error for an operation that the runtime does not have."""
    return ValueError(f"'{graph.name(node)}' ({graph.key(node)}) cannot be lowered: {why}")


def _tuple(value: Any, dims: int) -> list[int]:
    return [int(v) for v in value] if isinstance(value, list | tuple) else [int(value)] * dims


def _shape(graph: Graph, node: fx.Node, sizes: Any) -> list[int]:
    """Reshape sizes as in ONNX; the batch size, read from a tensor (`x.size(0)`, `x.shape[0]`), becomes 0."""
    shape = []
    for i, size in enumerate(sizes):
        if isinstance(size, int):
            shape.append(size)
        elif i == 0 and _is_batch_size(size):
            shape.append(0)
        else:
            raise unsupported(graph, node, f"size {i} is computed ({size}); give a number, -1 or x.size(0)")
    return shape


def _is_batch_size(node: fx.Node) -> bool:
    if node.target == "size":
        return tuple(node.args[1:]) == (0,)
    return node.target is operator.getitem and bool(node.args[1] == 0)


def _slices(graph: Graph, node: fx.Node, index: Any) -> list[list[int | None]]:
    parts = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in parts:
        if parts.index(Ellipsis) != 0:
            raise unsupported(graph, node, "an ellipsis in the middle of an index")
        parts, offset = parts[1:], -len(parts[1:])
    else:
        offset = 0
    slices: list[list[int | None]] = []
    for i, part in enumerate(parts):
        numbers = [part.start, part.stop, part.step] if isinstance(part, slice) else None
        if numbers is None or not all(isinstance(v, int | None) for v in numbers):
            raise unsupported(graph, node, f"index {part!r}; slices with constant bounds can be lowered")
        if numbers != [None, None, None]:
            slices.append([offset + i, numbers[0] or 0, numbers[1], numbers[2] or 1])
    return slices
