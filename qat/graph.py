"""torch.fx: what each operation of a network means for quantization, and where quantizers stand.

One FakeQuantize stands on a tensor edge and serves all its consumers. It stands where a quantized operation reads the
tensor, as late as possible: after BatchNorm and ReLU, never between, and a ReLU before it is absorbed. Operations that
only move or select values (max pooling, flatten, slices, zero padding) pass their input's scale through; the inputs of
a concatenation share one. Average pooling makes new values and so gets a scale of its own.
"""

import copy
import operator
from collections.abc import Iterator
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Target

from qat.fake_quant import FakeQuantize
from qat.layers import SWAPS, QuantizedLayer


class Kind(Enum):
    """What an operation means for quantization."""

    input = auto()
    layer = auto()  # a quantized layer
    float_layer = auto()  # a layer that stays float
    batch_norm = auto()
    relu = auto()
    add = auto()
    concat = auto()
    average = auto()  # average pooling, mean
    passes = auto()  # moves or selects values: the scale passes through
    quantizer = auto()
    output = auto()
    other = auto()  # computed in float


KINDS: dict[Any, Kind] = {
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), Kind.batch_norm),
    **dict.fromkeys(SWAPS, Kind.float_layer),
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), Kind.relu),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), Kind.add),
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), Kind.concat),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), Kind.average),
    **dict.fromkeys((F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d), Kind.average),
    **dict.fromkeys((torch.mean, "mean"), Kind.average),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), Kind.passes),
    **dict.fromkeys((F.max_pool1d, F.max_pool2d), Kind.passes),
    **dict.fromkeys((nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d), Kind.passes),
    **dict.fromkeys((torch.flatten, torch.reshape, torch.permute, torch.transpose, operator.getitem), Kind.passes),
    **dict.fromkeys(("flatten", "reshape", "view", "permute", "transpose", "contiguous"), Kind.passes),
    **dict.fromkeys((torch.squeeze, torch.unsqueeze, "squeeze", "unsqueeze", F.pad), Kind.passes),
}

NONNEGATIVE = {nn.ReLU6, F.relu6, nn.Sigmoid, torch.sigmoid, "sigmoid", nn.Softmax, torch.softmax, F.softmax}
"""Float operations whose result cannot be negative."""


class _Tracer(fx.Tracer):
    """Records, and takes quantized layers and quantizers as single operations."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantizedLayer | FakeQuantize) or super().is_leaf_module(m, module_qualified_name)


class PreparedNetwork(fx.GraphModule):
    """A GraphModule whose copies keep what a GraphModule's lose: `meta`, and modules that `forward` does not call."""

    def __reduce__(self) -> Any:
        return _unpickle, (super().__reduce__(), self.meta, self._modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PreparedNetwork":
        result: Any = super().__deepcopy__(memo)
        result._modules = copy.deepcopy(self._modules, memo)
        return result


def _unpickle(reduced: tuple[Any, ...], meta: dict[str, Any], modules: dict[str, nn.Module | None]) -> PreparedNetwork:
    module = reduced[0](*reduced[1])
    prepared = PreparedNetwork(module, module.graph)
    prepared.meta.update(meta)
    prepared._modules = modules
    return prepared


def trace(net: nn.Module) -> fx.GraphModule:
    """Record `net` as a graph. Parameters and submodules are shared with `net`, which is not changed.

    Raises:
        ValueError: the network cannot be traced; says why and at which line of its code.
    """
    try:
        graph = _Tracer().trace(net)
    except Exception as error:  # whatever the network's own code raises when it meets a symbolic tensor
        where = _last_user_line(error)
        raise ValueError(
            f"qat cannot trace {type(net).__name__}{where}: {error}. Control flow that depends on the values of "
            f"tensors cannot be recorded; move it out of forward, or prepare the traceable submodules one by one."
        ) from error
    traced = PreparedNetwork(net, graph, type(net).__name__)
    for node in graph.nodes:
        if node.target in (F.dropout, torch.dropout):
            raise ValueError(
                f"{type(net).__name__} calls dropout as a function ('{node.name}'), which a trace records with the "
                f"mode of the moment; use nn.Dropout, which knows whether it is training"
            )
    for name, module in net.named_modules():  # what forward does not call belongs to a float checkpoint, too
        if name and not _has(traced, name):
            traced.add_submodule(name, module)
    return traced


def _has(net: nn.Module, name: str) -> bool:
    try:
        net.get_submodule(name)
    except AttributeError:
        return False
    return True


def _last_user_line(error: BaseException) -> str:
    frames = []
    tb = error.__traceback__
    while tb is not None:
        filename = tb.tb_frame.f_code.co_filename
        if "/torch/" not in filename and not filename.endswith("qat/graph.py"):
            frames.append(f" at {filename}:{tb.tb_lineno}")
        tb = tb.tb_next
    return frames[-1] if frames else ""


class Graph:
    """Questions about the graph of a GraphModule. Reads; never changes it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.modules = dict(module.named_modules())
        self.passing_relus: set[fx.Node] = set()

    @property
    def nodes(self) -> list[fx.Node]:
        """Operations in order of execution."""
        return list(self.module.graph.nodes)

    def submodule(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def key(self, node: fx.Node) -> Target | type[nn.Module]:
        """What identifies the operation: module type, function, or name of a method."""
        module = self.submodule(node)
        return type(module) if module is not None else node.target

    def kind(self, node: fx.Node) -> Kind:
        """What the operation means for quantization."""
        if node.op == "placeholder":
            return Kind.input
        if node.op == "output":
            return Kind.output
        module = self.submodule(node)
        if isinstance(module, QuantizedLayer):
            return Kind.layer
        if isinstance(module, FakeQuantize):
            return Kind.quantizer
        kind = KINDS.get(self.key(node), Kind.other)
        if kind is Kind.add and not (len(tensor_arguments(node)) == 2 and node.kwargs.get("alpha", 1) == 1):
            return Kind.other
        if node.target is F.pad and not _pads_within(node):
            return Kind.other
        if kind is Kind.relu and node in self.passing_relus:
            return Kind.passes
        return kind

    def name(self, node: fx.Node) -> str:
        """A readable name for the tensor that `node` makes: that of the layer whose BatchNorm and ReLU it ends with."""
        kind = self.kind(node)
        if kind in (Kind.batch_norm, Kind.relu):
            return self.name(node.all_input_nodes[0])
        if node.op == "call_module":
            return str(node.target)
        if node.op == "placeholder":
            return str(node.target)
        scope = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
        label = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
        return ".".join([*scope[-1:], str(label).strip("_")])

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The operations that made the values in `node`'s tensor, behind everything that passes scales through."""
        kind = self.kind(node)
        if kind is Kind.passes:
            return self.sources(node.all_input_nodes[0])
        if kind is Kind.concat:
            return list(dict.fromkeys(s for arg in tensor_list(node) for s in self.sources(arg)))
        return [node]

    def quantizer_of(self, node: fx.Node) -> FakeQuantize | None:
        """The quantizer whose grid the tensor of `node` lies on; None for a float tensor."""
        found = [self.submodule(source) for source in self.sources(node)]
        if found and all(isinstance(module, FakeQuantize) and module is found[0] for module in found):
            assert isinstance(found[0], FakeQuantize)
            return found[0]
        return None

    def nonnegative(self, node: fx.Node) -> bool:
        """Whether the operations show that no value can be negative."""
        kind = self.kind(node)
        if kind is Kind.relu or self.key(node) in NONNEGATIVE:
            return True
        if node.target is operator.getitem and kind is Kind.passes:
            return self.nonnegative(node.all_input_nodes[0])
        if kind in (Kind.passes, Kind.average, Kind.add, Kind.concat):
            return node in self.passing_relus or all(self.nonnegative(arg) for arg in node.all_input_nodes)
        return False

    def batch_norm_after(self, node: fx.Node) -> fx.Node | None:
        """The BatchNorm that is the only reader of a layer's call and normalises its output channels, if there is one.

        Behind a linear layer on sequences, BatchNorm1d normalises the steps of the sequence, not the layer's outputs.
        """
        users = list(node.users)
        ranks = self.module.meta.get("qat", {}).get("ranks", {})
        if isinstance(self.submodule(node), nn.Linear) and ranks.get(str(node.target), 2) != 2:
            return None
        return users[0] if len(users) == 1 and self.kind(users[0]) is Kind.batch_norm else None

    def layers(self) -> Iterator[tuple[fx.Node, QuantizedLayer]]:
        """Calls of quantized layers in order of execution."""
        for node in self.nodes:
            module = self.submodule(node)
            if isinstance(module, QuantizedLayer):
                yield node, module


def tensor_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation reads, one that it reads twice twice."""
    return [arg for arg in [*node.args, *node.kwargs.values()] if isinstance(arg, fx.Node)]


def tensor_list(node: fx.Node) -> list[fx.Node]:
    """The tensors that a concatenation joins."""
    tensors = node.args[0] if node.args else node.kwargs["tensors"]
    assert isinstance(tensors, list | tuple)
    return [t for t in tensors if isinstance(t, fx.Node)]


def _pads_within(node: fx.Node) -> bool:
    """Whether a padding lies on any grid that the tensor has: zeros, or values repeated."""
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return mode != "constant" or value in (None, 0)
