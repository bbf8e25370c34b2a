"""The integers that training simulated, and where a rounding of them is a matter of taste."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.export.formats import Inputs, Integers, integers_given
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork

TIE = 1e-4
"""A value this close to the middle between two integers, in steps, is a tie: engines sum in other orders, and with
other offsets. With grids of few bits the same pair of integers makes the same tie again and again."""


class _Recorder(fx.Interpreter):
    """Runs a prepared network and keeps what its quantizers make."""

    def __init__(self, prepared: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(prepared)
        self.wanted, self.kept = wanted, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name] = result
        return result


@torch.no_grad()
def training_integers(prepared: fx.GraphModule, network: IntegerNetwork, *inputs: Tensor) -> Integers:
    """The integers behind every fake-quantized activation of `prepared`, by name of `network`'s tensor.

    Args:
        prepared: the network that `network` was lowered from, in eval mode.
        network: from `qat.lower`.
        inputs: the network's arguments, batch dimension first.
    """
    recorder = _Recorder(prepared, set(network.edges.values()))
    recorder.run(*inputs)
    integers = {}
    for name, node in network.edges.items():
        grid = network.grid(name)
        assert grid is not None
        if not isinstance(recorder.kept[node], Tensor):  # a packed sequence, which is compared once padded
            continue
        integers[name] = (torch.round(recorder.kept[node] / grid.scale) + grid.zero_point).to(grid.dtype)
    return integers


@torch.no_grad()
def own_integers(network: IntegerNetwork, inputs: Inputs) -> Integers:
    """The integers of every tensor of `network` that lies on a grid, by name, as it runs by itself."""
    grids, tensors = network.grids(), network.run(*inputs)
    return {name: tensors[name] for name in grids if not tensors[name].is_floating_point()}


@torch.no_grad()
def ties_given(network: IntegerNetwork, inputs: Tensor | Inputs, given: Integers) -> dict[str, Tensor]:
    """Where a layer of `network`, given equal inputs, rounds a value next to a tie (TIE), by name of tensor."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(grid: nn.Module, values: tuple[Tensor, ...]) -> None:
            assert isinstance(grid, Quantize)
            v = grid.steps(values[0])
            found[name] = (v - torch.floor(v) - 0.5).abs() < TIE

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
