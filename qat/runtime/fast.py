"""The fast path: an integer network's steps as calls of torch's integer kernels.

Two forms of one network, both held to the reference by tests and by parity:

* `Plan`, for calls in eager mode on a CPU: tensors stay quantized tensors from layer to layer, one kernel a step.
* `Kernel`, for what torch.compile traces: single layers on plain uint8 tensors; Inductor fuses what is in between.

A step without such a kernel is computed by its own layer, on plain integers.
"""

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.runtime import float8, kernels
from qat.runtime import operations as ops
from qat.runtime.grid import Quantize
from qat.runtime.layers import IntegerConv

if TYPE_CHECKING:
    from qat.runtime.network import IntegerNetwork

Key = tuple[str, bool]
"""A tensor's name, and whether it is a quantized tensor."""


@dataclass
class Step:
    """One call: `made` is what `run` makes of `inputs`; `done` are tensors that no later step reads."""

    run: Callable[..., Tensor]
    inputs: tuple[Key, ...]
    made: Key
    done: list[Key] = field(default_factory=list)


class Plan:
    """The steps of a network in eager mode, quantized tensors where kernels take them.

    Args:
        network: on a CPU.

    Attributes:
        kernels: the tensors that a kernel makes.
    """

    def __init__(self, network: "IntegerNetwork") -> None:
        self.network, self.steps = network, list[Step]()
        self.made: set[Key] = {(name, False) for name in network.inputs}
        self.sources = {node.name: node.inputs for node in network.nodes}
        self.kernels: list[str] = []
        for node in network.nodes:
            if isinstance(network.layer(node.name), ops.Dequantize):
                continue  # made where real numbers are read
            made = self._kernel(node.name)
            if made is None:
                self._plain_layer(node.name)
            else:
                run, inputs = made
                self.kernels.append(node.name)
                self._add(run, [self._quantized(name) for name in inputs], (node.name, True))
        self.outputs = [self._plain(name) for name in network.outputs]
        self._free()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The network's inputs -> its outputs."""
        tensors: dict[Key, Tensor] = {(n, False): x for n, x in zip(self.network.inputs, inputs, strict=True)}
        for step in self.steps:
            tensors[step.made] = step.run(*[tensors[key] for key in step.inputs])
            for key in step.done:
                del tensors[key]
        return tuple(tensors[key] for key in self.outputs)

    def convolves(self) -> bool:
        """Whether a kernel computes a layer with weights: for anything less, quantized tensors are not worth making."""
        return any(isinstance(self.network.layer(name), IntegerConv) for name in self.kernels)

    def integers(self, given: Mapping[str, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
        """What each step makes of `given` integers, by name: as `IntegerNetwork.run` does with a `watch`."""
        return self.given(given, *inputs)[0]

    def given(self, given: Mapping[str, Tensor], *inputs: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """The same, and the network's outputs, made of what their layers are given."""
        tensors: dict[Key, Tensor] = {(n, False): x for n, x in zip(self.network.inputs, inputs, strict=True)}
        found: dict[str, Tensor] = {}
        for step in self.steps:
            y = step.run(*[tensors[key] for key in step.inputs])
            name, quantized = step.made
            if name in given and name not in found:
                grid = self._grid(name)
                found[name] = kernels.signed(y.int_repr(), grid) if quantized else y
                y = self._wrapping(name)(given[name]) if quantized else given[name]
            tensors[step.made] = y
        return found, tuple(tensors[key] for key in self.outputs)

    def _add(self, run: Callable[..., Tensor], inputs: list[Key], made: Key) -> Key:
        self.steps.append(Step(run, tuple(inputs), made))
        self.made.add(made)
        return made

    def _plain_layer(self, name: str) -> Key:
        layer = self.network.layer(name)
        return self._add(
            kernels.kernel_of(layer) or layer, [self._plain(source) for source in self.sources[name]], (name, False)
        )

    def _plain(self, name: str) -> Key:
        """The tensor as integers or real numbers, made if it is not there yet."""
        if (name, False) in self.made:
            return (name, False)
        if (name, True) not in self.made:
            return self._plain_layer(name)
        grid = self._grid(name)
        return self._add(lambda q: kernels.signed(q.int_repr(), grid), [(name, True)], (name, False))

    def _quantized(self, name: str) -> Key:
        """The tensor as a quantized tensor, made if it is not there yet."""
        if (name, True) in self.made:
            return (name, True)
        return self._add(self._wrapping(name), [self._plain(name)], (name, True))

    def _wrapping(self, name: str) -> Callable[[Tensor], Tensor]:
        return functools.partial(kernels.wrap, grid=self._grid(name))

    def _grid(self, name: str) -> Quantize:
        grid = self.network.grid(name)
        assert grid is not None
        return grid

    def _kernel(self, name: str) -> tuple[Callable[..., Tensor], list[str]] | None:
        """What makes a tensor as a quantized one, and the names of those that it reads; None if there is no kernel."""
        layer, sources = self.network.layer(name), self.sources[name]
        if isinstance(layer, ops.Add):
            sources = tuple(self.sources[source][0] for source in sources if self._is_real(source))
            if len(sources) < 2:
                return None
        grids = [self.network.grid(source) for source in sources]
        if not kernels.is_8_bit(self.network.grid(name)) or not all(map(kernels.is_8_bit, grids)):
            return None
        if isinstance(layer, IntegerConv):
            return self._convolution(layer, sources[0])
        if isinstance(layer, ops.Add) and type(layer.output) is Quantize:
            return kernels.addition(layer.output), list(sources)
        if isinstance(layer, ops.MaxPool) and layer.output is None and len(layer.settings["kernel"]) == 2:
            settings = [layer.settings[key] for key in ("kernel", "stride", "padding", "dilation", "ceil_mode")]
            return lambda x: F.max_pool2d(x, *settings), list(sources)
        return None

    def _convolution(self, layer: IntegerConv, source: str) -> tuple[Callable[..., Tensor], list[str]] | None:
        grid, engine = self._grid(source), kernels.engine_of(layer)
        same = grid.scale.equal(layer.input_scale) and int(grid.zero_point) == int(layer.input_zero_point)
        if engine is None or not same:
            return None
        return kernels.convolution(layer, engine), [source]

    def _is_real(self, name: str) -> bool:
        """Whether a tensor is only another tensor's integers as real numbers."""
        return name in self.sources and isinstance(self.network.layer(name), ops.Dequantize)

    def _free(self) -> None:
        seen = set(self.outputs)
        for step in reversed(self.steps):
            for key in dict.fromkeys((*step.inputs, step.made)):
                if key not in seen:
                    seen.add(key)
                    step.done.append(key)


class FastPath:
    """A network's kernels, made at the first call and made again once its numbers have changed. Never copied or stored.

    Attributes:
        plan: for calls in eager mode; None where no step has a kernel.
    """

    def __init__(self, network: "IntegerNetwork") -> None:
        modules = list(network.modules())
        owners = [(m._buffers, key, x) for m in modules for key, x in m._buffers.items() if x is not None]
        self.owners, self.keys, self.tensors = map(list, zip(*owners, strict=True)) if owners else ([], [], [])
        self.tracked = [x for x in self.tensors if not x.is_inference()]  # the others cannot be edited in place
        self.versions = [x._version for x in self.tracked]
        self.hooks = [hooks for m in modules[1:] for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.convolutions = [m for m in modules if isinstance(m, IntegerConv)]
        self.network = network
        self.on_cpu = all(x.device.type == "cpu" for x in self.tensors) and kernels.available("fbgemm")
        plan = Plan(network) if self.on_cpu else None
        self.plan = plan if plan is not None and plan.convolves() else None

    @functools.cached_property
    def layers(self) -> dict[str, kernels.Kernel]:
        """Node -> kernel, for torch.compile."""
        if not self.on_cpu:
            return {}
        found = {node.name: kernels.kernel_of(self.network.layer(node.name)) for node in self.network.nodes}
        return {name: kernel for name, kernel in found.items() if kernel is not None}

    @functools.cached_property
    def products(self) -> dict[str, Callable[..., Tensor]]:
        """Node -> product of float8 matrices, for calls in eager mode on a GPU."""
        made: dict[str, Any] = {}  # tensor -> the layer that chose its values
        found = {}
        for node in self.network.nodes:
            layer = self.network.layer(node.name)
            source = made.get(node.inputs[0]) if node.inputs else None
            made[node.name] = source if isinstance(layer, ops.Reshape | ops.Permute | ops.Slice) else layer
            product = float8.product_of(layer, source)
            if product is not None:
                found[node.name] = product
        return found

    def is_current(self) -> bool:
        """Whether the network's buffers are those that the kernels were made of."""
        held = map(dict.get, self.owners, self.keys)
        return all(map(operator.is_, held, self.tensors)) and [x._version for x in self.tracked] == self.versions

    def is_asked_for(self) -> bool:
        """Whether nothing asks for the layers themselves: neither the reference, nor a hook that watches one."""
        return not any(layer.reference for layer in self.convolutions) and not any(self.hooks)


def is_ordinary_call(inputs: Sequence[Any]) -> bool:
    """Whether a call computes numbers, without gradients: nobody is tracing it, or transforming it."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    for x in inputs:
        if type(x) is not Tensor or x.device.type not in ("cpu", "cuda") or x.numel() == 0:
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
    return True
