"""Calls in a traced network -> layers of the runtime: arguments read, whatever form the call has."""

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from qat.graph import Graph
from qat.layers import float_type
from qat.runtime import operations as ops
from qat.runtime.layers import RuntimeLayer
from qat.sizes import Sizes

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
LOOK_UPS = nn.Embedding | nn.EmbeddingBag
TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
MAX_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d,
    torch.max_pool1d, torch.max_pool2d, torch.max_pool3d,
)  # fmt: skip


def geometry(layer: nn.Module) -> dict[str, Any]:
    """Stride, padding, dilation and groups of a convolution as the runtime's arguments; nothing for other layers."""
    if not isinstance(layer, CONVOLUTIONS | TRANSPOSED):
        return {}
    padding = [[0, 0]] * (layer.weight.dim() - 2) if moved_padding(layer) else _padding(layer)
    common = {"stride": list(layer.stride), "padding": padding, "dilation": list(layer.dilation),
              "groups": layer.groups}  # fmt: skip
    return common if isinstance(layer, CONVOLUTIONS) else common | {"output_padding": list(layer.output_padding)}


def look_up(layer: LOOK_UPS, node: fx.Node) -> tuple[list[fx.Node], dict[str, Any] | None]:
    """What a look-up reads, and how it makes one row of a bag's (`qat.runtime.lookup`); None for an embedding.

    Raises:
        ValueError: `max_norm`, which changes the table as it is read.
    """
    if layer.max_norm is not None:
        raise ValueError(f"layer '{node.target}' cannot be lowered: max_norm={layer.max_norm} changes its table")
    args = _Arguments(node)
    indices = args.get(0, "input")
    if isinstance(layer, nn.Embedding):
        return [indices], None
    others = [args.get(1, "offsets", None), args.get(2, "per_sample_weights", None)]
    pooling = {
        "mode": layer.mode, "include_last_offset": bool(layer.include_last_offset), "padding_idx": layer.padding_idx,
        "offsets": others[0] is not None, "weighted": others[1] is not None,
    }  # fmt: skip
    return [indices, *(other for other in others if other is not None)], pooling


def factors(layer: nn.Module, node: fx.Node) -> list[fx.Node]:
    """What a layer multiplies its weight by: of a bilinear one the products of its two inputs."""
    if not issubclass(float_type(layer), nn.Bilinear):
        return node.all_input_nodes[:1]
    args = _Arguments(node)
    return [args.get(0, "input1"), args.get(1, "input2")]


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


def average_layer(graph: Graph, node: fx.Node, known: Sizes) -> RuntimeLayer:
    """The runtime layer of an average pooling, a global average pooling or a mean.

    Raises:
        ValueError: a form of it that the runtime does not have.
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
    dims = int(key.__name__[-2])  # AvgPool2d, adaptive_avg_pool1d
    if "daptive" in key.__name__:
        size = getattr(module, "output_size", None) if module is not None else args.get(1, "output_size")
        sizes = list(size) if isinstance(size, list | tuple) else [size] * dims
        if sizes != [1] * dims:
            return ops.Function("adaptive_avg_pool", output_size=sizes)
        return ops.Mean(dims=list(range(-dims, 0)), keepdim=True)
    kernel, stride, padding, ceil_mode, include = (
        (module.kernel_size, module.stride, module.padding, module.ceil_mode, module.count_include_pad)
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d)
        else (args.get(1, "kernel_size"), args.get(2, "stride", None), args.get(3, "padding", 0),
              args.get(4, "ceil_mode", False), args.get(5, "count_include_pad", True))
    )  # fmt: skip
    if getattr(module, "divisor_override", None) or args.get(6, "divisor_override", None):
        raise unsupported(graph, node, "divisor_override")
    kernel, stride = (fx.map_arg(value, known.value) for value in (kernel, stride))  # F.avg_pool2d(x, x.shape[2:])
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
    if key in MAX_POOLS:
        dims = int(key.__name__[-2])
        kernel, stride, padding, dilation, ceil_mode = (
            (module.kernel_size, module.stride, module.padding, module.dilation, module.ceil_mode)
            if isinstance(module, nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d)
            else (args.get(1, "kernel_size"), args.get(2, "stride", None), args.get(3, "padding", 0),
                  args.get(4, "dilation", 1), args.get(5, "ceil_mode", False))
        )  # fmt: skip
        kernel = _tuple(kernel, dims)
        return ops.MaxPool(
            kernel=kernel, stride=_tuple(stride or kernel, dims), padding=_tuple(padding, dims),
            dilation=_tuple(dilation, dims), ceil_mode=bool(ceil_mode),
        )  # fmt: skip
    if key in (torch.reshape, "reshape", "view"):
        return ops.Reshape(shape=_shape(graph, node, args.sizes("shape")))
    if key in (torch.permute, "permute"):
        return ops.Permute(dims=list(args.sizes("dims")))
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
