"""torch.fx: what each operation of a network means for quantization, and where quantizers stand.

One FakeQuantize stands on a tensor edge and serves all its consumers. It stands where a quantized operation reads the
tensor, as late as possible: after BatchNorm and ReLU, never between, and a ReLU before it is absorbed. Operations that
only move or select values (max pooling, flatten, slices, zero padding) pass their input's scale through; the inputs of
a concatenation share one. Average pooling makes new values and so gets a scale of its own.
"""

import dataclasses
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import pad_packed_sequence

from qat.calls import CALLS, SIZE_ATTRIBUTES, values_of
from qat.fake_quant import FakeQuantize
from qat.kinds import AVERAGED, KEEPS_SIGN, KINDS, NEAREST, NONNEGATIVE, SIZE_METHODS, WITH_PLACES, Kind
from qat.layers import Functional, Quantized, QuantizedLayer, QuantizedRecurrent, float_type
from qat.prepared import is_fixed
from qat.results import RECURRENT, Result, given_grid, is_padded, result_of, takes_result


class Graph:
    """Questions about the graph of a GraphModule. Reads; never changes it."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.modules = dict(module.named_modules())
        self.passing_relus: set[fx.Node] = set()
        self._sizes: dict[fx.Node, bool] = {}

    @property
    def nodes(self) -> list[fx.Node]:
        """Operations in order of execution."""
        return list(self.module.graph.nodes)

    def submodule(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def key(self, node: fx.Node) -> Any:
        """What identifies the operation: module type, function, name of a method, or (getattr, attribute)."""
        module = self.submodule(node)
        if node.target is getattr:
            return getattr, node.args[1]
        return type(module) if module is not None else node.target

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Parameter -> value of a call of an operation of CALLS."""
        return CALLS[self.key(node)].bind(node, self.submodule(node))

    def is_size(self, node: fx.Node) -> bool:
        """Whether a node stands for a size, or for something computed of nothing but sizes and modes."""
        if node not in self._sizes:
            key = self.key(node)
            if node.target is getattr:
                known = node.args[1] in SIZE_ATTRIBUTES
            elif node.op == "call_module":
                known = not node.all_input_nodes
            else:
                known = (node.op == "call_method" and key in SIZE_METHODS) or key in (torch.zeros_like, torch.ones_like)
                known = known or (
                    node.op in ("call_function", "call_method")
                    and bool(node.all_input_nodes)
                    and all(self.is_size(arg) for arg in node.all_input_nodes)
                )
            self._sizes[node] = known
        return self._sizes[node]

    def from_outside(self, node: fx.Node) -> Any:
        """What the example gave for a node that is an argument of the network, or a part of one; None for others."""
        if node.op == "placeholder":
            return self.module.meta.get("qat", {}).get("inputs", {}).get(str(node.target))
        if node.target not in (operator.getitem, getattr) or not isinstance(node.args[1], int | str):
            return None
        whole = self.from_outside(node.args[0])  # type: ignore[arg-type]
        if whole is None or isinstance(whole, Tensor):
            return None
        return getattr(whole, str(node.args[1]), None) if node.target is getattr else whole[node.args[1]]

    def path_from_outside(self, node: fx.Node) -> tuple[Any, ...]:
        """The argument that an input is, or is in, and the keys and attributes that lead to it."""
        if node.op == "placeholder":
            return (str(node.target),)
        return (*self.path_from_outside(node.args[0]), node.args[1])  # type: ignore[arg-type]

    def tensors(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that an operation of CALLS reads, one that it reads twice twice; masks and sizes are none."""
        operation = CALLS[self.key(node)]
        try:
            bound = self.arguments(node)
        except ValueError:  # a form that only torch knows: computed in float
            return []
        if operation.name == "where":
            bound["condition"] = None
        return [value for value in values_of(operation, bound) if not self.is_size(value)]

    def kind(self, node: fx.Node) -> Kind:
        """What the operation means for quantization."""
        if node.op == "output":
            return Kind.output
        given = self.from_outside(node)
        if given is not None or node.op == "placeholder":
            return Kind.input if given is None or isinstance(given, Tensor) else Kind.structure
        if is_structure(node):
            return Kind.structure
        if node.op == "get_attr":
            return Kind.constant
        if self.is_size(node):
            return Kind.size
        module = self.submodule(node)
        if takes_result(self.modules, node):
            return Kind.result
        if isinstance(module, Quantized):
            return Kind.layer
        if isinstance(module, FakeQuantize):
            return Kind.quantizer
        if self.has_places(node) or self.takes_part(node):
            return Kind.other
        kind = KINDS.get(self.key(node), Kind.other)
        if str(node.target) in self.module.meta.get("identity_in_eval", ()):
            return Kind.passes
        if self.key(node) in CALLS and not self._is_plain(node, kind):
            return Kind.other
        if CALLS.get(self.key(node)) is CALLS[F.interpolate]:
            return self._interpolation(node)
        if node.target is pad_packed_sequence and (len(node.args) > 2 or node.kwargs.get("padding_value")):
            return Kind.other  # filled with something that may lie on no grid
        if is_padded(node):
            on_grid = node.args[1] == 0 and self.quantizer_of(node.all_input_nodes[0]) is not None
            return Kind.passes if on_grid else Kind.other
        if node.target is operator.getitem and not all(self.is_size(n) for n in _nodes_in(node.args[1])):
            return Kind.other
        if kind is Kind.relu and node in self.passing_relus:
            return Kind.passes
        return kind

    def takes_part(self, node: fx.Node) -> bool:
        """Whether a node takes one of several results of an operation that only torch, or only Python, knows."""
        if node.target is not operator.getitem or not isinstance(node.args[1], int):
            return False
        source = node.args[0]
        assert isinstance(source, fx.Node)
        known = source.target is pad_packed_sequence or self.key(source) in CALLS
        return self.has_places(source) or (not known and self.kind(source) is Kind.other)

    def why_float(self, node: fx.Node) -> str | None:
        """Why a pooling has no integer form; None for others."""
        if "ractional" in getattr(self.key(node), "__name__", ""):
            return "its regions are drawn at random with every call"
        return "the places of its maxima are read" if self.has_places(node) else None

    def has_places(self, node: Any) -> bool:
        """Whether a node is a pooling that returns the places of its maxima, too."""
        if not isinstance(node, fx.Node):
            return False
        return self.key(node) in WITH_PLACES or getattr(self.submodule(node), "return_indices", False) is True

    def _is_plain(self, node: fx.Node, kind: Kind) -> bool:
        """Whether an operation has the form that its kind stands for: two tensors, no factor; the filling is zero."""
        if kind in (Kind.add, Kind.arithmetic, Kind.select):
            bound = self.arguments(node) if self.tensors(node) else {}
            usual = bound.get("alpha", 1) == 1 and bound.get("rounding_mode") is None
            return usual and len(self.tensors(node)) >= 2
        if CALLS[self.key(node)].name == "masked_fill":
            value = self.arguments(node)["value"]
            return isinstance(value, int | float) and value == 0
        if CALLS[self.key(node)].name == "pad":  # with zeros, or values that are repeated
            bound = self.arguments(node)
            return bound["mode"] != "constant" or bound["value"] in (None, 0)
        return True

    def _interpolation(self, node: fx.Node) -> Kind:
        mode = self.arguments(node)["mode"]
        return Kind.passes if mode in NEAREST else Kind.average if mode in AVERAGED else Kind.other

    def name(self, node: fx.Node) -> str:
        """A readable name for the tensor that `node` makes: that of the layer whose BatchNorm and ReLU it ends with."""
        kind = self.kind(node)
        if kind is Kind.result:
            return self.name(self.result(node)[0])  # type: ignore[index]
        if kind in (Kind.batch_norm, Kind.relu) or self.takes_part(node):
            return self.name(node.all_input_nodes[0])
        if node.op == "call_module":
            return str(node.target)
        if kind is Kind.input:
            return ".".join(map(str, self.path_from_outside(node)))
        scope = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
        label = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.name)
        label = str(node.args[1]) if node.target is getattr else label
        return ".".join([*scope[-1:], str(label).strip("_")])

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """The operations that made the values in `node`'s tensor, behind everything that passes scales through."""
        kind = self.kind(node)
        if kind is Kind.passes:
            return self.sources(node.all_input_nodes[0])
        if kind in (Kind.concat, Kind.select):
            joined = tensor_list(node) if kind is Kind.concat else self.tensors(node)
            found = list(dict.fromkeys(s for arg in joined for s in self.sources(arg)))
            given = {self.given_grid(source) for source in found}
            return found if len(given) <= 1 else [node]  # a grid that is given is not to be shared with others
        return [node]

    def result(self, node: fx.Node) -> Result | None:
        """Of which call of a recurrent layer a node is (a part of) the result."""
        return result_of(self.modules, node)

    def given_grid(self, node: fx.Node) -> FakeQuantize | None:
        """The grid on which a recurrent layer has put a part of its result; None for anything else."""
        return given_grid(self.modules, node)

    def quantizer_of(self, node: fx.Node) -> FakeQuantize | None:
        """The quantizer whose grid the tensor of `node` lies on; None for a float tensor."""
        found = [self.given_grid(source) or self.submodule(source) for source in self.sources(node)]
        if found and all(isinstance(module, FakeQuantize) and module is found[0] for module in found):
            assert isinstance(found[0], FakeQuantize)
            return found[0]
        return None

    def nonnegative(self, node: fx.Node) -> bool:
        """Whether the operations show that no value can be negative."""
        kind = self.kind(node)
        operation = CALLS.get(self.key(node))
        if kind is Kind.relu or (operation is not None and operation.name in NONNEGATIVE):
            return True
        if kind in (Kind.passes, Kind.average):
            return node in self.passing_relus or self.nonnegative(node.all_input_nodes[0])
        if kind is Kind.other and operation is not None and operation.name == "pad":
            return bool(self.arguments(node)["value"] > 0) and self.nonnegative(node.all_input_nodes[0])
        if kind is Kind.select or (kind is Kind.arithmetic and operation is not None and operation.name in KEEPS_SIGN):
            return all(self.nonnegative(arg) for arg in self.tensors(node))
        if kind in (Kind.add, Kind.concat):
            return all(self.nonnegative(arg) for arg in node.all_input_nodes)
        return False

    def bounds(self, node: fx.Node, ends: Mapping[str, tuple[float, float]]) -> tuple[float, float] | None:
        """The ends of a function's results, if they are among those known."""
        operation = CALLS.get(self.key(node))
        return ends.get(operation.name) if operation is not None else None

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a quantized operation reads; a layer's weight and bias are none."""
        module = self.submodule(node)
        if isinstance(module, Functional):
            return [arg for arg in node.args[: len(module.form.inputs)] if isinstance(arg, fx.Node)]
        if self.kind(node) in (Kind.add, Kind.arithmetic):
            return self.tensors(node)
        if isinstance(self.submodule(node), RECURRENT):  # states are quantized inside
            return [node.args[0] if node.args else node.kwargs["input"]]  # type: ignore[list-item]
        return node.all_input_nodes if self.kind(node) is Kind.layer else node.all_input_nodes[:1]

    def batch_norm_after(self, node: fx.Node) -> fx.Node | None:
        """The BatchNorm that is the only reader of a layer's call and normalises its output channels, if there is one.

        Behind a linear layer on sequences, BatchNorm1d normalises the steps of the sequence, not the layer's outputs.
        """
        users = list(node.users)
        ranks = self.module.meta.get("ranks", {})
        layer = self.submodule(node)
        if not isinstance(layer, QuantizedLayer) or not layer.biased:
            return None
        if issubclass(float_type(layer), nn.Linear | nn.Bilinear) and ranks.get(str(node.target), 2) != 2:
            return None
        return users[0] if len(users) == 1 and self.kind(users[0]) is Kind.batch_norm else None

    def held_for_layers(self) -> set[fx.Node]:
        """Tensors of the network, and what is computed of them, that nothing reads but layers, as weight or bias."""
        found: set[fx.Node] = set()
        for node in reversed(self.nodes):
            if is_fixed(node) and node.users and all(user in found or self._holds(user, node) for user in node.users):
                found.add(node)
        return found

    def _holds(self, call: fx.Node, tensor: fx.Node) -> bool:
        return isinstance(self.submodule(call), Functional) and tensor not in self.operands(call)

    def recurrent(self) -> Iterator[tuple[fx.Node, QuantizedRecurrent]]:
        """Calls of quantized recurrent layers in order of execution."""
        for node in self.nodes:
            module = self.submodule(node)
            if isinstance(module, QuantizedRecurrent):
                yield node, module

    def layers(self) -> Iterator[tuple[fx.Node, QuantizedLayer]]:
        """Calls of quantized layers with one weight in order of execution."""
        for node in self.nodes:
            module = self.submodule(node)
            if isinstance(module, QuantizedLayer):
                yield node, module


def is_structure(node: fx.Node) -> bool:
    """Whether a node makes a dataclass, as networks return them."""
    return node.op == "call_function" and isinstance(node.target, type) and dataclasses.is_dataclass(node.target)


def tensors_returned(value: Any) -> list[fx.Node]:
    """The tensors in what a network returns, in order."""
    if isinstance(value, fx.Node):
        return tensors_returned({**_fields(value)}) if is_structure(value) else [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [node for part in parts for node in tensors_returned(part)]


def output_form(value: Any, numbers: Iterator[int]) -> Any:
    """What a network returns, as `qat.runtime.signature.Signature` keeps it; tensors are counted by `numbers`."""
    if isinstance(value, fx.Node):
        return output_form(_fields(value), numbers) if is_structure(value) else next(numbers)
    if isinstance(value, dict):
        return {"dict": [[key, output_form(part, numbers)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [output_form(part, numbers) for part in value]}
    if value is None:
        return None
    raise ValueError(f"a network that returns {value!r:.60} cannot be lowered: it is no tensor")


def _fields(node: fx.Node) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(node.target)]  # type: ignore[arg-type]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def tensor_list(node: fx.Node) -> list[fx.Node]:
    """The tensors that a concatenation joins."""
    tensors = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(tensors, list | tuple)
    return [t for t in tensors if isinstance(t, fx.Node)]


def _nodes_in(index: Any) -> list[fx.Node]:
    """The tensors and sizes in an index."""
    found: list[fx.Node] = []
    fx.map_arg(index, found.append)
    return found
