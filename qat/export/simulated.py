"""The integers that training simulated, and where a rounding of them is a matter of taste."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.export.given import Inputs, Integers, Made, integers_given, levels_of, tensors_of
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork

TIE = 1e-4
"""A value this close to the middle between two integers, in steps, is a tie: engines sum in other orders, and with
other offsets. With grids of few bits the same pair of integers makes the same tie again and again."""


class _Recorder(fx.Interpreter):
    """Runs a prepared network and keeps what its quantizers make; `given` is what their readers get in its place."""

    def __init__(self, prepared: fx.GraphModule, wanted: set[str], given: Mapping[str, Tensor]) -> None:
        super().__init__(prepared)
        self.wanted, self.given, self.kept = wanted, given, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name] = result
        return self.given.get(n.name, result)


def training_integers(prepared: fx.GraphModule, network: IntegerNetwork, *inputs: Tensor) -> Integers:
    """The integers alone of `training_made`."""
    return training_made(prepared, network, *inputs).integers


@torch.no_grad()
def training_made(
    prepared: fx.GraphModule, network: IntegerNetwork, *inputs: Tensor,
    given: Mapping[str, Tensor] = MappingProxyType({}),
) -> Made:  # fmt: skip
    """The integers behind every fake-quantized activation of `prepared`, by name of `network`'s tensor; its outputs.

    Args:
        prepared: the network that `network` was lowered from, in eval mode.
        network: from `qat.lower`.
        inputs: the network's arguments, batch dimension first.
        given: name of a tensor -> integers that its readers get.
    """
    grids = network.grids()
    real = {network.edges[name]: grids[name].dequantize(q) for name, q in given.items() if name in network.edges}
    recorder = _Recorder(prepared, set(network.edges.values()), real)
    outputs = tuple(tensors_of(recorder.run(*inputs)).values())
    integers, levels = {}, {}
    for name, node in network.edges.items():
        grid = grids[name]
        if not isinstance(recorder.kept[node], Tensor):  # a packed sequence, which is compared once padded
            continue
        integers[name] = (torch.round(recorder.kept[node] / grid.scale) + grid.zero_point).to(grid.dtype)
        levels[name] = levels_of(grid)
    return Made(integers, outputs, levels)


@torch.no_grad()
def own_made(network: IntegerNetwork, inputs: Inputs) -> Made:
    """The integers of every tensor of `network` that lies on a grid, by name, as it runs by itself; its outputs."""
    grids, tensors = network.grids(), network.run(*inputs)
    rounded = [name for name in grids if network.layer(name).output is not None]  # the others move integers
    integers = {name: tensors[name] for name in rounded}
    levels = {name: levels_of(grids[name]) for name in integers}
    return Made(integers, tuple(tensors[name] for name in network.outputs), levels)


@torch.no_grad()
def ties_given(
    network: IntegerNetwork, inputs: Tensor | Inputs, given: Integers,
    widths: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Tensor]:  # fmt: skip
    """Where a layer of `network`, given equal inputs, rounds a value next to a tie, by name of tensor.

    Args:
        network: its own layers are asked.
        inputs: of the network.
        given: name of a tensor -> integers, which its readers get.
        widths: name of a tensor -> how close to the middle a value is at a tie, in steps, where that is more than TIE.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(grid: nn.Module, values: tuple[Tensor, ...]) -> None:
            assert isinstance(grid, Quantize)
            v = grid.steps(values[0])
            found[name] = (v - torch.floor(v) - 0.5).abs() < max(TIE, widths.get(name, 0.0))

        return note

    layers = ((node.name, network.layer(node.name)) for node in network.nodes if node.name in given)
    handles = [layer.output.register_forward_pre_hook(hook(name)) for name, layer in layers if layer.output is not None]
    try:
        integers_given(network, inputs if isinstance(inputs, tuple) else (inputs,), given)
    finally:
        for handle in handles:
            handle.remove()
    return found


def sources(network: IntegerNetwork, name: str, known: set[str]) -> list[str]:
    """What the layer `name` reads: the nearest tensors before it that are among `known`, or inputs of the network."""
    reads = {node.name: node.inputs for node in network.nodes}
    found: dict[str, None] = {}
    waiting = list(reads[name])
    while waiting:
        tensor = waiting.pop(0)
        if tensor in known or tensor not in reads:
            found[tensor] = None
        else:
            waiting += reads[tensor]
    return list(found)
