"""The state of a lowering, and the ways to append a step to the integer network."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from qat import lower_calls, translate
from qat.fake_quant import FakeQuantize
from qat.function_inputs import limits
from qat.graph import Graph
from qat.kinds import Kind
from qat.lower_layers import grid_of
from qat.runtime import operations as ops
from qat.runtime.grid import Quantize
from qat.runtime.layers import RuntimeLayer
from qat.runtime.network import Node
from qat.runtime.outer import Outer
from qat.sizes import Sizes


@dataclass
class Lowering:
    """The state of a lowering: what has been made of which node, and on which grid it lies.

    Args:
        prepared: a recorded network.
        opaque: what no recording shows, lowered: by path.
    """

    prepared: fx.GraphModule
    opaque: dict[str, nn.Module] = field(default_factory=dict)
    graph: Graph = field(init=False)
    sizes: Sizes = field(init=False)
    nodes: list[Node] = field(default_factory=list)
    layers: dict[str, RuntimeLayer] = field(default_factory=dict)
    made: dict[fx.Node, str] = field(default_factory=dict)  # graph node -> name of its tensor
    grids: dict[str, Quantize | None] = field(default_factory=dict)
    real: dict[str, str] = field(default_factory=dict)  # integer tensor -> its dequantized twin
    results: dict[fx.Node, str] = field(default_factory=dict)  # call of a recurrent layer -> name of what it returns
    taken: dict[tuple[fx.Node, int, int | None], str] = field(default_factory=dict)  # part of it -> its name

    biases: Counter[int] = field(init=False)  # by identity: calls that add it
    calls: Counter[int] = field(init=False)  # of a layer, by identity

    def __post_init__(self) -> None:
        self.graph = Graph(self.prepared)
        self.sizes = Sizes(self.prepared)
        layers = [layer for _, layer in self.graph.layers()]  # modules of the network: they outlive their identities
        self.biases = Counter(id(layer.bias) for layer in layers if layer.bias is not None)
        self.calls = Counter(map(id, layers))

    def is_simulated(self, node: fx.Node) -> bool:
        """Whether a node of the prepared network puts a tensor on its grid."""
        kind = self.graph.kind(node)
        return kind is Kind.quantizer or (kind is Kind.result and node in self.made)

    def add(
        self, name: str, layer: RuntimeLayer, inputs: list[str], *made: fx.Node, grid: Quantize | None = None
    ) -> str:
        """Append a step; every graph node in `made` is the tensor that it makes."""
        unique, i = name, 2
        while unique in self.layers or unique in self.grids:
            unique, i = f"{name}_{i}", i + 1
        self.nodes.append(Node(unique, tuple(inputs)))
        self.layers[unique] = layer
        self.grids[unique] = grid if grid is not None else layer.output
        self.made.update(dict.fromkeys(made, unique))
        return unique

    def to_real(self, node: fx.Node) -> str:
        """Name of the tensor of real numbers of `node`, dequantized once if it is integer."""
        if self.graph.kind(node) is Kind.size and node not in self.made:
            self.constant(node, self.sizes.value(node))
        return self.dequantized(self.made[node])

    def dequantized(self, name: str) -> str:
        """Name of the tensor of real numbers of a tensor, made once if that is integer."""
        grid = self.grids[name]
        if grid is None:
            return name
        if name not in self.real:
            self.real[name] = self.add(f"{name}.real", ops.Dequantize(copy_grid(grid, relu=False)), [name])
        return self.real[name]

    def fused_quantizer(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What is made in the same step as `node`: the integer quantizer that alone reads it, or clamps and that."""
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        module = None if reader is None else self.graph.submodule(reader)
        if reader is not None and isinstance(module, FakeQuantize) and module.integer:
            return (reader,)
        if reader is not None and limits(self.graph, reader):
            behind = self.fused_quantizer(reader)
            return (reader, *behind) if behind else ()
        return ()

    def output_grid(self, node: fx.Node) -> Quantize | None:
        """The grid of the step that makes `node`; clamps of real numbers are clamps of integers."""
        *clamps, quantizer = self.fused_quantizer(node) or (None,)
        if quantizer is None:
            return None
        grid = grid_of_quantizer(self.graph.submodule(quantizer))
        for clamp in clamps:
            bounds = limits(self.graph, clamp)
            assert bounds is not None
            grid = grid.clamped(*bounds)
        return grid

    def constant(self, node: fx.Node, value: Any) -> None:
        """Append a tensor that the network holds, with the quantizer that follows it."""
        if not isinstance(value, torch.Tensor):
            raise translate.unsupported(self.graph, node, "it depends on the batch size, or is no tensor")
        step = ops.Constant.of(value, self.output_grid(node))
        self.add(self.graph.name(node), step, [], node, *self.fused_quantizer(node))

    def real_operation(self, node: fx.Node, layer: RuntimeLayer, args: list[fx.Node]) -> None:
        """Append an operation on real numbers, with the quantizer that follows it."""
        layer.output = self.output_grid(node)
        inputs = [self.to_real(arg) for arg in args]
        self.add(self.graph.name(node), layer, inputs, node, *self.fused_quantizer(node))

    def real_input(self, layer: nn.Module, node: fx.Node) -> str:
        """Name of the real numbers that a layer multiplies its weight by: of a bilinear one, products of its inputs."""
        inputs = [self.to_real(arg) for arg in translate.factors(layer, node)]
        return inputs[0] if len(inputs) == 1 else self.add(f"{node.target}.outer", Outer(), inputs)

    def geometry(self, layer: nn.Module, node: fx.Node) -> dict[str, Any]:
        """Stride, padding and so on of a convolution; nothing for other layers."""
        settings = translate.geometry(layer)
        if isinstance(self.graph.submodule(node), translate.TRANSPOSED):
            settings |= lower_calls.output_padding(self.graph, self.sizes, node, settings)
        return settings

    def padded(self, layer: nn.Module, node: fx.Node, x: str) -> str:
        """`x` as a convolution with a padding mode pads it: it only moves values, so integers stay integers."""
        pads = translate.moved_padding(layer)
        if pads is None:
            return x
        step = ops.Pad(pads=pads, value=0, mode=str(layer.padding_mode))
        return self.add(f"{node.target}.padded", step, [x], grid=self.grids[x])

    def integer_operation(
        self, node: fx.Node, layer: RuntimeLayer, args: list[fx.Node], others: Sequence[fx.Node] = ()
    ) -> None:
        """Append an operation that keeps the grid of `args`, integer or real; `others` are masks and the like."""
        names = [self.made[arg] for arg in args]
        grids = [self.grids[name] for name in names]
        if any(g is None or not _same(g, grids[0]) for g in grids):
            names, grids = [self.to_real(arg) for arg in args], [None]
        names += [self.to_real(other) for other in others]
        self.add(self.graph.name(node), layer, names, node, grid=grids[0])


def grid_of_quantizer(module: nn.Module | None) -> Quantize:
    """The grid of an integer quantizer."""
    assert isinstance(module, FakeQuantize)
    return grid_of(module)


def copy_grid(grid: Quantize, relu: bool) -> Quantize:
    """A grid of its own with the same integers."""
    return Quantize(grid.quant_min, grid.quant_max, relu, float(grid.scale), int(grid.zero_point), grid.rounding)


def _same(a: Quantize, b: Quantize | None) -> bool:
    return b is not None and (a.quant_min, a.quant_max, float(a.scale), int(a.zero_point)) == (
        b.quant_min, b.quant_max, float(b.scale), int(b.zero_point)
    )  # fmt: skip
