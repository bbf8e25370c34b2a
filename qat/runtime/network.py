"""IntegerNetwork: a list of layers, each reading named tensors. What `lower` makes and `load` reads back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from qat.runtime import fast, fixed, layers, lookup, matmul, operations, outer, recurrent, stored
from qat.runtime.grid import Quantize
from qat.runtime.layers import IntegerConv, RuntimeLayer
from qat.runtime.signature import Signature

LAYERS: dict[str, type[RuntimeLayer]] = {
    "integer_conv": layers.IntegerConv,
    "float_conv": layers.FloatConv,
    "table_conv": stored.TableConv,
    "product_conv": stored.ProductConv,
    "simulate": stored.Simulate,
    "look_up": lookup.LookUp,
    "table_look_up": lookup.TableLookUp,
    "product_look_up": lookup.ProductLookUp,
    "outer": outer.Outer,
    "integer_bilinear": outer.IntegerBilinear,
    "recurrent": recurrent.Recurrent,
    "take": recurrent.Take,
    "quantize": operations.QuantizeInput,
    "dequantize": operations.Dequantize,
    "add": operations.Add,
    "affine": operations.Affine,
    "relu": operations.Relu,
    "average": operations.Average,
    "mean": operations.Mean,
    "max_pool": operations.MaxPool,
    "reshape": operations.Reshape,
    "permute": operations.Permute,
    "slice": operations.Slice,
    "pad": operations.Pad,
    "concat": operations.Concat,
    "function": operations.Function,
    "move": operations.Move,
    "constant": operations.Constant,
    "integer_matmul": matmul.IntegerMatmul,
    "fixed_conv": fixed.FixedConv,
    "fixed_matmul": fixed.FixedMatmul,
    "fixed_sum": fixed.FixedSum,
    "fixed_product": fixed.FixedProduct,
    "fixed_affine": fixed.FixedAffine,
    "fixed_average": fixed.FixedAverage,
    "fixed_mean": fixed.FixedMean,
    "fixed_softmax": fixed.FixedSoftmax,
    "fixed_norm": fixed.FixedNorm,
    "table": fixed.Table,
}
"""Every layer that an exported checkpoint can name."""

NAMES = {kind: name for name, kind in LAYERS.items()}


@dataclass(frozen=True)
class Node:
    """One step: the tensor `name` is made by `layers[name]` from the tensors `inputs`."""

    name: str
    inputs: tuple[str, ...]


class IntegerNetwork(nn.Module):
    """Runs its nodes in order. Takes float32 (indices are integers) and returns it; in between all is integer.

    Args:
        inputs: names of the arguments of `forward`.
        nodes: steps in order of execution.
        layers: the layer of each step, by node name.
        outputs: names of the tensors returned.
        info: plain data about the network (configuration, class names, ...), exported with it.
        signature: what it takes and returns; None where that is tensors, one after the other.

    Attributes:
        edges: for a freshly lowered network, integer tensor -> node of the prepared graph that simulated it.
        trial: what the first call is tried out with, for a network from a file that anyone may have made.
    """

    trial: Callable[["IntegerNetwork", tuple[Any, ...]], None] | None

    def __init__(
        self,
        inputs: list[str],
        nodes: list[Node],
        layers: dict[str, RuntimeLayer],
        outputs: list[str],
        info: dict[str, Any] | None = None,
        signature: Signature | None = None,
    ) -> None:
        super().__init__()
        self.signature = signature
        self.inputs, self.nodes, self.outputs, self.info = inputs, nodes, outputs, info or {}
        self.edges: dict[str, str] = {}
        self.trial = None
        self._fast: fast.FastPath | None = None
        self.layers = nn.ModuleDict({_key(node.name): layers[node.name] for node in nodes})

    def layer(self, name: str) -> RuntimeLayer:
        """The layer that makes the tensor `name`."""
        layer = self.layers[_key(name)]
        assert isinstance(layer, RuntimeLayer)
        return layer

    def grid(self, name: str) -> Quantize | None:
        """The grid of the tensor `name`; None for a float tensor."""
        if name in self.inputs:
            return None
        layer = self.layer(name)
        if layer.output is not None:
            return layer.output
        node = next(node for node in self.nodes if node.name == name)
        keeps = isinstance(
            layer,
            operations.Relu | operations.MaxPool | operations.Reshape | operations.Permute | operations.Slice
            | operations.Pad | operations.Concat | operations.Move,
        )  # fmt: skip
        return self.grid(node.inputs[0]) if keeps else None

    def grids(self) -> dict[str, Quantize]:
        """The grid of every integer tensor, by name, in order of execution."""
        return {node.name: grid for node in self.nodes if (grid := self.grid(node.name)) is not None}

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Inputs (float32; indices are integers), by position or name -> float32 output, or a tuple of them.

        With a `signature`, what that says.
        """
        tensors = self.flat(inputs, named)
        if self.trial is not None and not torch.compiler.is_compiling():
            self.trial(self, tensors)
            self.trial = None
        outputs = self._results(tensors)
        if self.signature is not None:
            return self.signature.build(outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _results(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs, by the fast path where there is one."""
        if torch.compiler.is_compiling():
            found = not torch.compiler.is_exporting() and make_kernels(self)
            tensors = self.run(*inputs, kernels=self._fast.layers if found and self._fast is not None else {})
        elif len(inputs) == len(self.inputs) and fast.is_ordinary_call(inputs):
            path = self.fast_path()
            if path.plan is not None and path.is_asked_for():
                with torch.autocast("cpu", enabled=False):  # half precision does not hold the sums
                    return path.plan(*inputs)
            on_gpu = inputs[0].device.type == "cuda" and path.is_asked_for()
            tensors = self.run(*inputs, kernels=path.products if on_gpu else {})
        else:
            tensors = self.run(*inputs)
        return tuple(tensors[name] for name in self.outputs)

    def fast_path(self) -> fast.FastPath:
        """The kernels of the network as it is now."""
        if self._fast is None or not self._fast.is_current():
            self._fast = fast.FastPath(self)
        return self._fast

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fast = None  # what torch.compile made asks for it, and compiles again

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._fast = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fast": None}  # packed weights are neither copied nor stored

    def flat(self, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The tensors of a call's arguments, in the order of `inputs`."""
        if self.signature is not None:
            return self.signature.flatten(args, named)
        rest = dict(named)
        found = (*args, *(rest.pop(name) for name in self.inputs[len(args) :] if name in rest))
        if rest:
            raise ValueError(f"the network takes {', '.join(self.inputs)}; got {', '.join(rest)} beside these")
        return found

    def run(
        self, *inputs: Tensor, watch: Callable[[str, Tensor], Tensor] | None = None,
        kernels: Mapping[str, Callable[..., Tensor]] = MappingProxyType({}),
    ) -> dict[str, Tensor]:  # fmt: skip
        """Every tensor by name, made by the layers themselves.

        Args:
            inputs: as the network takes them.
            watch: `watch(name, tensor)` sees each tensor as it is made and returns what later steps read.
            kernels: node -> what is called in place of its layer.
        """
        if len(inputs) != len(self.inputs):
            raise ValueError(
                f"the network takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), got {len(inputs)}"
            )
        tensors = dict(zip(self.inputs, inputs, strict=True))
        with torch.autocast(inputs[0].device.type, enabled=False):  # half precision does not hold the sums
            for node in self.nodes:
                layer = kernels[node.name] if node.name in kernels else self.layers[_key(node.name)]
                y = layer(*(tensors[name] for name in node.inputs))
                tensors[node.name] = y if watch is None else watch(node.name, y)
        return tensors

    def set_reference(self, reference: bool = True) -> None:
        """Choose the readable int32 computation (slow) or the fast one; both give the same integers."""
        for layer in self.modules():
            if isinstance(layer, IntegerConv | fixed.FixedMatmul):
                layer.reference = reference

    def spec(self) -> dict[str, Any]:
        """Plain data from which `from_spec` builds an equal network, numbers apart."""
        return {
            "inputs": self.inputs,
            "outputs": self.outputs,
            "nodes": [
                {"settings": self.layer(n.name).spec(), "name": n.name, "inputs": list(n.inputs),
                 "layer": NAMES[type(self.layer(n.name))]}
                for n in self.nodes
            ],
            "info": self.info,
            **({} if self.signature is None else {"signature": self.signature.spec()}),
        }  # fmt: skip

    @classmethod
    def from_spec(cls, spec: dict[str, Any]) -> "IntegerNetwork":
        """Build a network with empty buffers; `load_state_dict` fills them.

        Raises:
            ValueError: a layer of an unknown kind.
        """
        for node in spec["nodes"]:
            if node["layer"] not in LAYERS:
                raise ValueError(f"node '{node['name']}' is of the unknown kind '{node['layer']}'")
        return cls(
            list(spec["inputs"]),
            [Node(node["name"], tuple(node["inputs"])) for node in spec["nodes"]],
            {node["name"]: LAYERS[node["layer"]].from_spec(node["settings"]) for node in spec["nodes"]},
            list(spec["outputs"]),
            dict(spec["info"]),
            Signature(**spec["signature"]) if "signature" in spec else None,
        )


@torch.compiler.assume_constant_result
def make_kernels(network: IntegerNetwork) -> bool:
    """Make the kernels while torch.compile traces: it runs this as it is, and finds the packed weights there."""
    return bool(network.fast_path().layers)


def _key(name: str) -> str:
    key = name.replace(".", "/")  # ModuleDict keys hold no dots,
    return key + "_" if hasattr(nn.ModuleDict, key) else key  # and none of its own names, such as "keys" or "values"
