"""Prepared network -> integer network, on a copy: what exporters read.

No weight is quantized a second time: BatchNorm is folded into scales and biases (`qat.fold`). A quantizer that is the
only reader of an operation is made in the same step, so that a layer takes integers and returns integers.
"""

import copy
import itertools
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

from qat import lower_calls, lower_recurrent, translate
from qat.adapters import without_adapters
from qat.calls import CALLS
from qat.fake_quant import FakeQuantize
from qat.fold import BatchNorm, batch_norm_affine
from qat.graph import Graph, is_structure, output_form, tensor_list, tensors_returned
from qat.kinds import IDENTITIES, Kind
from qat.layers import Functional, QuantizedLayer
from qat.lower_fixed import fixed_point
from qat.lower_layers import float_layer, integer_grids, integer_layer, look_up, real_layer
from qat.lowering import Lowering, grid_of_quantizer
from qat.modes import check_simulates
from qat.parts import graphs
from qat.prepared import PreparedPart
from qat.results import RECURRENT, is_padded
from qat.runtime import operations as ops
from qat.runtime.foreign import Foreign, Slot
from qat.runtime.foreign import Part as ForeignPart
from qat.runtime.layers import RuntimeLayer
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.network import IntegerNetwork
from qat.runtime.signature import Signature
from qat.runtime.stored import Simulate
from qat.scheme import QuantConfig
from qat.split import join
from qat.targets import TARGETS


@overload
def lower(prepared: fx.GraphModule) -> IntegerNetwork: ...


@overload
def lower(prepared: nn.Module) -> nn.Module: ...


def lower(prepared: nn.Module) -> nn.Module:
    """Build the integer network that computes what `prepared` simulates in eval mode.

    Args:
        prepared: a calibrated network from `qat.prepare`. It is not changed. Adapters (LoRA) are merged in a copy.

    Returns:
        An `IntegerNetwork`, sharing nothing with `prepared`. Of a network that was not recorded as a whole: a copy of
        it, of its own class, with an `IntegerNetwork` in place of each part.

    Raises:
        RuntimeError: a quantizer has no range yet, or is in a mode that simulates nothing.
        ValueError: an operation that the integer runtime does not have; names it and where it stands.
    """
    check_simulates(prepared)
    prepared = without_adapters(prepared)
    return _lowered(prepared, "", graphs(prepared))


def _lowered(module: nn.Module, path: str, parts: dict[str, fx.GraphModule]) -> nn.Module:
    if path in parts:
        graph = parts[path]
        if any(isinstance(given, PackedSequence) for given in graph.meta["qat"]["inputs"].values()):
            raise ValueError(
                f"layer '{path}' is given a packed sequence by code that was not recorded, and no integer network "
                f"takes one as its input; let that code be recorded (qat.report says what stopped it), or pad instead"
            )
        opaque = graph.meta.get("opaque", ())
        return _run(Lowering(graph, {n: _lowered(graph.get_submodule(n), join(path, n), parts) for n in opaque}))
    children = {id(child): _lowered(child, join(path, name), parts) for name, child in module.named_children()}
    return copy.deepcopy(module, dict(children)).eval()


def _run(lowering: Lowering) -> IntegerNetwork:
    """Lower every node in order."""
    graph, inputs = lowering.graph, dict[str, fx.Node]()
    weights, returned = graph.held_for_layers(), None
    for node in graph.nodes:
        if node in lowering.made or node in weights:  # fused into an earlier step, or read by its layer
            continue
        kind = graph.kind(node)
        if kind is Kind.input:
            name = ".".join(map(str, graph.path_from_outside(node)))
            inputs[name] = node
            lowering.made[node], lowering.grids[name] = name, None
        elif kind is Kind.output:
            returned = node
        elif kind is not Kind.structure:
            _LOWER[kind](lowering, node)
    assert returned is not None
    outputs = [lowering.to_real(node) for node in tensors_returned(returned.args[0])]
    config: QuantConfig = lowering.prepared.meta["qat"]["config"]
    info = {"quant": config.to_dict()}
    network = IntegerNetwork(
        list(inputs), lowering.nodes, lowering.layers, outputs, info, _signature(graph, inputs, returned)
    )
    network.edges = {
        lowering.made[node]: node.name
        for node in graph.nodes
        if lowering.is_simulated(node) and lowering.grids[lowering.made[node]] is not None
    }
    if TARGETS[config.target].requantize == "fixed_point":
        network = fixed_point(network, lowering.sizes.example(), config.target)
    return network.eval()


def _signature(graph: Graph, inputs: dict[str, fx.Node], returned: fx.Node) -> Signature | None:
    """What the network takes and returns; None where that is tensors only."""
    paths = [graph.path_from_outside(node) for node in inputs.values()]
    output = output_form(returned.args[0], itertools.count())
    flat = isinstance(returned.args[0], fx.Node) and not is_structure(returned.args[0])
    fixed = graph.module.meta["fixed"] if isinstance(graph.module, PreparedPart) else {}
    flat = flat or (isinstance(returned.args[0], tuple) and all(isinstance(a, fx.Node) for a in returned.args[0]))
    if flat and all(len(path) == 1 for path in paths) and not fixed:
        return None
    parameters = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    parameters = graph.module.meta["parameters"] if fixed else parameters
    return Signature(parameters, [list(path) for path in paths], output, fixed)


def _quantizer(lowering: Lowering, node: fx.Node) -> None:
    quantizer, source = lowering.graph.submodule(node), node.all_input_nodes[0]
    assert isinstance(quantizer, FakeQuantize)
    layer = ops.QuantizeInput(grid_of_quantizer(quantizer)) if quantizer.integer else Simulate.of(quantizer)
    name = lowering.graph.name(source)
    name = f"{name}.quantized" if lowering.graph.kind(source) is Kind.input else name
    lowering.add(name, layer, [lowering.to_real(source)], node)


def _layer(lowering: Lowering, node: fx.Node) -> None:
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
    made = [node, tail, *lowering.fused_quantizer(tail)]
    geometry = lowering.geometry(layer, node) | {"output": lowering.output_grid(tail)}
    inputs = [lowering.made[source] for source in translate.factors(layer, node)]
    grids = integer_grids(layer, [lowering.grids[name] for name in inputs])
    step: RuntimeLayer
    if grids is not None:
        called = id(lowering.graph.submodule(node))
        # whose bias, or whose BatchNorm's, no rounding of parameters puts on the grid (`ptq.bias.round_biases`)
        shared = lowering.biases[id(layer.bias)] > 1 or (norm is not None and lowering.calls[called] > 1)
        step = integer_layer(layer, norm, grids, geometry, remainder=shared)
    else:
        step, inputs = real_layer(layer, norm, geometry), [lowering.real_input(layer, node)]
    lowering.add(str(node.target), step, [lowering.padded(layer, node, x) for x in inputs], *made)


def _ordinary(layer: nn.Module | None) -> nn.Module | None:
    """A layer that holds its weight, whatever form the call has."""
    return layer.ordinary() if isinstance(layer, Functional) else layer


def _float_layer(lowering: Lowering, node: fx.Node) -> None:
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


def _look_up(lowering: Lowering, node: fx.Node, layer: translate.LOOK_UPS) -> None:
    arguments, pooling = translate.look_up(layer, node)
    step = look_up(layer, pooling, lowering.output_grid(node))
    inputs = [lowering.to_real(arg) for arg in arguments]
    lowering.add(str(node.target), step, inputs, node, *lowering.fused_quantizer(node))


def _batch_norm(lowering: Lowering, node: fx.Node) -> None:
    module = lowering.graph.submodule(node)
    assert isinstance(module, BatchNorm)
    gain, shift = batch_norm_affine(module, module.num_features)
    step = ops.Affine(module.num_features)
    step.factor.copy_(gain)
    step.offset.copy_(shift)
    lowering.real_operation(node, step, node.all_input_nodes)


def _relu(lowering: Lowering, node: fx.Node) -> None:
    source = node.all_input_nodes[0]
    grid = lowering.grids[lowering.made[source]]
    if grid is None:
        lowering.real_operation(node, ops.Relu(zero=0), [source])
    else:
        lowering.integer_operation(node, ops.Relu(zero=int(grid.zero_point)), [source])


def _average(lowering: Lowering, node: fx.Node) -> None:
    if lowering.graph.key(node) in CALLS:  # interpolation
        _other(lowering, node)
        return
    step = translate.average_layer(lowering.graph, node, lowering.sizes)
    lowering.real_operation(node, step, node.all_input_nodes[:1])


def _passes(lowering: Lowering, node: fx.Node) -> None:
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


def _arithmetic(lowering: Lowering, node: fx.Node) -> None:
    layer, args = lower_calls.function(lowering.graph, lowering.sizes, node)
    grids = [lowering.grids[lowering.made[arg]] for arg in args if arg in lowering.made]
    if layer.name == "matmul" and len(grids) == 2 and grids[0] is not None and grids[1] is not None:
        step = IntegerMatmul.of(grids[0], grids[1], lowering.output_grid(node))
        names = [lowering.made[arg] for arg in args]
        lowering.add(lowering.graph.name(node), step, names, node, *lowering.fused_quantizer(node))
        return
    lowering.real_operation(node, layer, args)


def _select(lowering: Lowering, node: fx.Node) -> None:
    chosen = lowering.graph.tensors(node)
    mask = lowering.graph.arguments(node)["condition"]
    lowering.integer_operation(node, ops.Move(name="where"), chosen, [mask])


def _constant(lowering: Lowering, node: fx.Node) -> None:
    value: Any = lowering.prepared
    for part in str(node.target).split("."):
        value = getattr(value, part)
    lowering.constant(node, value)


def _concat(lowering: Lowering, node: fx.Node) -> None:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    stacks = node.target is torch.stack
    step = ops.Move(name="stack", dim=dim) if stacks else ops.Concat(dim=dim)
    if node.target is pack_sequence:
        enforce = node.args[1] if len(node.args) > 1 else node.kwargs.get("enforce_sorted", True)
        step = ops.Move(name="pack_sequence", enforce_sorted=enforce)
    lowering.integer_operation(node, step, tensor_list(node))


def _filled(lowering: Lowering, node: fx.Node) -> None:
    """Padding with a number; where the result is put on a grid, its integers are padded with that of the number."""
    grid = lowering.output_grid(node)
    layer, args = lower_calls.function(lowering.graph, lowering.sizes, node)
    if grid is None:
        lowering.real_operation(node, layer, args)
        return
    name, inside = lowering.graph.name(node), ops.QuantizeInput(copy.deepcopy(grid))
    source = lowering.add(f"{name}.inside", inside, [lowering.to_real(args[0])])
    number = int(grid(torch.tensor(float(layer.settings["value"]))))
    step = ops.Pad(pads=lower_calls.pads(layer.settings["pad"]), value=number, mode="constant")
    lowering.add(name, step, [source], node, *lowering.fused_quantizer(node), grid=grid)


def _other(lowering: Lowering, node: fx.Node) -> None:
    if lowering.graph.key(node) is F.pad:
        _filled(lowering, node)
        return
    if node.target is pad_packed_sequence or is_padded(node):
        lower_recurrent.padded(lowering, node)
        return
    if node.op == "call_module" and node.target in lowering.opaque:
        inputs = node.all_input_nodes
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: Slot(inputs.index(n)))  # type: ignore[arg-type, return-value]
        lowering.real_operation(node, Foreign(lowering.opaque[str(node.target)], args, kwargs), inputs)
        return
    if lowering.graph.takes_part(node) and str(node.all_input_nodes[0].target) in lowering.opaque:
        lowering.real_operation(node, ForeignPart(node.args[1]), node.all_input_nodes)  # type: ignore[arg-type]
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
