"""Prepared network -> integer network, on a copy: what exporters read.

No weight is quantized a second time: BatchNorm is folded into scales and biases (`qat.fold`). A quantizer that is the
only reader of an operation is made in the same step, so that a layer takes integers and returns integers.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from qat import lower_calls, lower_recurrent, translate
from qat.calls import CALLS
from qat.fake_quant import FakeQuantize, Mode
from qat.fold import BatchNorm, batch_norm_affine
from qat.graph import IDENTITIES, Graph, Kind, tensor_list
from qat.layers import Functional, QuantizedLayer
from qat.lower_layers import float_layer, grid_of, integer_layer, look_up, real_layer
from qat.modes import quantizers
from qat.parts import graphs
from qat.results import RECURRENT, is_padded
from qat.runtime import operations as ops
from qat.runtime.foreign import Foreign
from qat.runtime.grid import Quantize
from qat.runtime.layers import RuntimeLayer
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.network import IntegerNetwork, Node
from qat.runtime.outer import Outer
from qat.runtime.stored import Simulate
from qat.scheme import QuantConfig
from qat.sizes import Sizes
from qat.split import join


@overload
def lower(prepared: fx.GraphModule) -> IntegerNetwork: ...


@overload
def lower(prepared: nn.Module) -> nn.Module: ...


def lower(prepared: nn.Module) -> nn.Module:
    """Build the integer network that computes what `prepared` simulates in eval mode.

    Args:
        prepared: a calibrated network from `qat.prepare`. It is not changed.

    Returns:
        An `IntegerNetwork`, sharing nothing with `prepared`. Of a network that was not recorded as a whole: a copy of
        it, of its own class, with an `IntegerNetwork` in place of each part.

    Raises:
        RuntimeError: a quantizer has no range yet, or is in a mode that simulates nothing.
        ValueError: an operation that the integer runtime does not have; names it and where it stands.
    """
    for name, quantizer in quantizers(prepared):
        if not quantizer.calibrated:
            raise RuntimeError(f"quantizer '{name}' has no range yet; run qat.calibrate(net, batches) before lowering")
    for name, quantizer in quantizers(prepared):
        if quantizer.mode in (Mode.float, Mode.observe):
            raise RuntimeError(
                f"quantizer '{name}': a network in mode 'float' or 'observe' cannot be lowered; "
                f"qat.set_mode(net, 'quantize') first"
            )
    return _lowered(prepared, "", graphs(prepared))


def _lowered(module: nn.Module, path: str, parts: dict[str, fx.GraphModule]) -> nn.Module:
    if path in parts:
        graph = parts[path]
        opaque = graph.meta.get("opaque", ())
        return _Lowering(graph, {n: _lowered(graph.get_submodule(n), join(path, n), parts) for n in opaque}).run()
    children = {id(child): _lowered(child, join(path, name), parts) for name, child in module.named_children()}
    return copy.deepcopy(module, dict(children)).eval()


@dataclass
class _Lowering:
    prepared: fx.GraphModule
    opaque: dict[str, nn.Module] = field(default_factory=dict)  # what no recording shows, lowered: by path
    graph: Graph = field(init=False)
    sizes: Sizes = field(init=False)
    nodes: list[Node] = field(default_factory=list)
    layers: dict[str, RuntimeLayer] = field(default_factory=dict)
    made: dict[fx.Node, str] = field(default_factory=dict)  # graph node -> name of its tensor
    grids: dict[str, Quantize | None] = field(default_factory=dict)
    real: dict[str, str] = field(default_factory=dict)  # integer tensor -> its dequantized twin
    results: dict[fx.Node, str] = field(default_factory=dict)  # call of a recurrent layer -> name of what it returns
    taken: dict[tuple[fx.Node, int, int | None], str] = field(default_factory=dict)  # part of it -> its name

    def __post_init__(self) -> None:
        self.graph = Graph(self.prepared)
        self.sizes = Sizes(self.prepared)

    def run(self) -> IntegerNetwork:
        inputs: list[str] = []
        outputs: list[str] = []
        weights = self.graph.held_for_layers()
        for node in self.graph.nodes:
            if node in self.made or node in weights:  # fused into an earlier step, or read by its layer
                continue
            kind = self.graph.kind(node)
            if kind is Kind.input:
                inputs.append(node.name)
                self.made[node], self.grids[node.name] = node.name, None
            elif kind is Kind.output:
                outputs = [self.to_real(arg) for arg in node.all_input_nodes]
            else:
                _LOWER[kind](self, node)
        config: QuantConfig = self.prepared.meta["qat"]["config"]
        network = IntegerNetwork(inputs, self.nodes, self.layers, outputs, {"quant": config.to_dict()})
        network.edges = {
            self.made[node]: node.name
            for node in self.graph.nodes
            if self._is_simulated(node) and self.grids[self.made[node]] is not None
        }
        return network.eval()

    def _is_simulated(self, node: fx.Node) -> bool:
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
            self.real[name] = self.add(f"{name}.real", ops.Dequantize(_copy_grid(grid, relu=False)), [name])
        return self.real[name]

    def fused_quantizer(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """What is made in the same step as `node`: the integer quantizer that alone reads it, or clamps and that."""
        reader = next(iter(node.users)) if len(node.users) == 1 else None
        module = None if reader is None else self.graph.submodule(reader)
        if reader is not None and isinstance(module, FakeQuantize) and module.integer:
            return (reader,)
        if reader is not None and lower_calls.clamp_bounds(self.graph, reader):
            behind = self.fused_quantizer(reader)
            return (reader, *behind) if behind else ()
        return ()

    def output_grid(self, node: fx.Node) -> Quantize | None:
        """The grid of the step that makes `node`; clamps of real numbers are clamps of integers."""
        *clamps, quantizer = self.fused_quantizer(node) or (None,)
        if quantizer is None:
            return None
        grid = _grid(self.graph.submodule(quantizer))
        for clamp in clamps:
            bounds = lower_calls.clamp_bounds(self.graph, clamp)
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
        if not isinstance(layer, nn.Bilinear):
            return self.to_real(node.all_input_nodes[0])
        return self.add(f"{node.target}.outer", Outer(), [self.to_real(arg) for arg in translate.bilinear_inputs(node)])

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


def _quantizer(lowering: _Lowering, node: fx.Node) -> None:
    quantizer, source = lowering.graph.submodule(node), node.all_input_nodes[0]
    assert isinstance(quantizer, FakeQuantize)
    layer = ops.QuantizeInput(_grid(quantizer)) if quantizer.integer else Simulate.of(quantizer)
    name = lowering.graph.name(source)
    name = f"{name}.quantized" if lowering.graph.kind(source) is Kind.input else name
    lowering.add(name, layer, [lowering.to_real(source)], node)


def _layer(lowering: _Lowering, node: fx.Node) -> None:
    layer = _ordinary(lowering.graph.submodule(node))
    if isinstance(layer, RECURRENT):
        lower_recurrent.call(lowering, node)
        return
    assert isinstance(layer, QuantizedLayer)
    if isinstance(layer, translate.LOOK_UPS):
        _look_up(lowering, node, layer)
        return
    norm_node = lowering.graph.batch_norm_after(node)
    norm = lowering.graph.submodule(norm_node) if norm_node else None
    tail = norm_node or node
    source = node.all_input_nodes[0]
    grid = lowering.grids[lowering.made[source]]
    made = [node, tail, *lowering.fused_quantizer(tail)]
    geometry = lowering.geometry(layer, node) | {"output": lowering.output_grid(tail)}
    step: RuntimeLayer
    if grid is not None and layer.weight_quantizer.integer and layer.multiplies:
        step, x = integer_layer(layer, norm, grid, geometry), lowering.made[source]
    else:
        step, x = real_layer(layer, norm, geometry), lowering.real_input(layer, node)
    lowering.add(str(node.target), step, [lowering.padded(layer, node, x)], *made)


def _ordinary(layer: nn.Module | None) -> nn.Module | None:
    """A layer that holds its weight, whatever form the call has."""
    return layer.ordinary() if isinstance(layer, Functional) else layer


def _float_layer(lowering: _Lowering, node: fx.Node) -> None:
    layer = _ordinary(lowering.graph.submodule(node))
    assert layer is not None
    if isinstance(layer, RECURRENT):
        lower_recurrent.call(lowering, node)
        return
    if isinstance(layer, translate.LOOK_UPS):
        _look_up(lowering, node, layer)
        return
    step = float_layer(layer, lowering.geometry(layer, node) | {"output": lowering.output_grid(node)})
    x = lowering.padded(layer, node, lowering.real_input(layer, node))
    lowering.add(lowering.graph.name(node), step, [x], node, *lowering.fused_quantizer(node))


def _look_up(lowering: _Lowering, node: fx.Node, layer: translate.LOOK_UPS) -> None:
    arguments, pooling = translate.look_up(layer, node)
    step = look_up(layer, pooling, lowering.output_grid(node))
    inputs = [lowering.to_real(arg) for arg in arguments]
    lowering.add(str(node.target), step, inputs, node, *lowering.fused_quantizer(node))


def _batch_norm(lowering: _Lowering, node: fx.Node) -> None:
    module = lowering.graph.submodule(node)
    assert isinstance(module, BatchNorm)
    gain, shift = batch_norm_affine(module, module.num_features)
    step = ops.Affine(module.num_features)
    step.factor.copy_(gain)
    step.offset.copy_(shift)
    lowering.real_operation(node, step, node.all_input_nodes)


def _relu(lowering: _Lowering, node: fx.Node) -> None:
    source = node.all_input_nodes[0]
    grid = lowering.grids[lowering.made[source]]
    if grid is None:
        lowering.real_operation(node, ops.Relu(zero=0), [source])
    else:
        lowering.integer_operation(node, ops.Relu(zero=int(grid.zero_point)), [source])


def _average(lowering: _Lowering, node: fx.Node) -> None:
    if lowering.graph.key(node) in CALLS:  # interpolation
        _other(lowering, node)
        return
    step = translate.average_layer(lowering.graph, node, lowering.sizes)
    lowering.real_operation(node, step, node.all_input_nodes[:1])


def _passes(lowering: _Lowering, node: fx.Node) -> None:
    graph, key, source = lowering.graph, lowering.graph.key(node), node.all_input_nodes[0]
    identity = str(node.target) in lowering.prepared.meta.get("identity_in_eval", ())
    if key in IDENTITIES or identity or lower_calls.is_parts(graph, node):  # a part is moved where it is read
        lowering.made[node] = lowering.made[source]
        return
    if node in graph.passing_relus or key in _RELU_KEYS:
        _relu(lowering, node)
        return
    grid = lowering.grids[lowering.made[source]]
    step, args = lower_calls.move(graph, lowering.sizes, node, 0 if grid is None else int(grid.zero_point))
    lowering.integer_operation(node, step, args[:1], args[1:])


def _arithmetic(lowering: _Lowering, node: fx.Node) -> None:
    layer, args = lower_calls.function(lowering.graph, lowering.sizes, node)
    grids = [lowering.grids[lowering.made[arg]] for arg in args if arg in lowering.made]
    if layer.name == "matmul" and len(grids) == 2 and grids[0] is not None and grids[1] is not None:
        step = IntegerMatmul.of(grids[0], grids[1], lowering.output_grid(node))
        names = [lowering.made[arg] for arg in args]
        lowering.add(lowering.graph.name(node), step, names, node, *lowering.fused_quantizer(node))
        return
    lowering.real_operation(node, layer, args)


def _select(lowering: _Lowering, node: fx.Node) -> None:
    chosen = lowering.graph.tensors(node)
    mask = lowering.graph.arguments(node)["condition"]
    lowering.integer_operation(node, ops.Move(name="where"), chosen, [mask])


def _constant(lowering: _Lowering, node: fx.Node) -> None:
    value: Any = lowering.prepared
    for part in str(node.target).split("."):
        value = getattr(value, part)
    lowering.constant(node, value)


def _concat(lowering: _Lowering, node: fx.Node) -> None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    stacks = node.target is torch.stack
    step = ops.Move(name="stack", dim=dim) if stacks else ops.Concat(dim=dim)
    if node.target is pack_sequence:
        enforce = node.args[1] if len(node.args) > 1 else node.kwargs.get("enforce_sorted", True)
        step = ops.Move(name="pack_sequence", enforce_sorted=enforce)
    lowering.integer_operation(node, step, tensor_list(node))


def _other(lowering: _Lowering, node: fx.Node) -> None:
    if node.target is pad_packed_sequence or is_padded(node):
        lower_recurrent.padded(lowering, node)
        return
    if node.op == "call_module" and node.target in lowering.opaque:
        lowering.real_operation(node, Foreign(lowering.opaque[str(node.target)]), node.all_input_nodes)
        return
    lowering.real_operation(node, *lower_calls.function(lowering.graph, lowering.sizes, node))


_RELU_KEYS = (nn.ReLU, F.relu, torch.relu, "relu")
_LOWER = {
    Kind.quantizer: _quantizer,
    Kind.layer: _layer,
    Kind.float_layer: _float_layer,
    Kind.batch_norm: _batch_norm,
    Kind.relu: _relu,
    Kind.add: lambda lowering, node: lowering.real_operation(node, ops.Add(), lowering.graph.tensors(node)),
    Kind.arithmetic: _arithmetic,
    Kind.select: _select,
    Kind.result: lower_recurrent.result,
    Kind.constant: _constant,
    Kind.size: lambda lowering, node: None,  # read by what takes sizes
    Kind.concat: _concat,
    Kind.average: _average,
    Kind.passes: _passes,
    Kind.other: _other,
}


def _grid(module: nn.Module | None) -> Quantize:
    assert isinstance(module, FakeQuantize)
    return grid_of(module)


def _copy_grid(grid: Quantize, relu: bool) -> Quantize:
    return Quantize(grid.quant_min, grid.quant_max, relu, float(grid.scale), int(grid.zero_point))


def _same(a: Quantize, b: Quantize | None) -> bool:
    return b is not None and (a.quant_min, a.quant_max, float(a.scale), int(a.zero_point)) == (
        b.quant_min, b.quant_max, float(b.scale), int(b.zero_point)
    )  # fmt: skip
