"""Quantizers into a recorded network: layers swapped, a FakeQuantize on every edge that a quantized operation reads."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from qat import lean
from qat.attention import matmul
from qat.choices import Ask, Choice, Quantizable
from qat.decompose import decompose_attention, decompose_extremes, unpool_by_function
from qat.einsum import decompose_einsum
from qat.fake_quant import FakeQuantize
from qat.functional import insert_functional
from qat.graph import Graph
from qat.in_place import drop_in_place
from qat.inside import INSIDE
from qat.kinds import Kind
from qat.layers import (
    SWAPS,
    Functional,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    Quantized,
    QuantLinear,
    float_type,
    type_name,
)  # fmt: skip
from qat.layers.base import with_state_of
from qat.layers.tied import share_weight_quantizers
from qat.prepared import bind_functional
from qat.record import Call
from qat.requests import Request, known_ends, relus_behind_quantizers, requests
from qat.scheme import Granularity, QuantConfig, TensorScheme
from qat.trial import Trial, check_same, float_output

NORMS = (lean.LayerNorm, lean.layer_norm)
"""What keeps integers of its input beside layers and products."""

QUANTIZERS = "quantizers"
"""Where activation quantizers live in a prepared network."""


def normalize(
    traced: fx.GraphModule, net: nn.Module, call: Call, fixed: Mapping[str, Any]
) -> dict[fx.Node, torch.Size]:
    """Check a recording and bring it into the form that quantizers are placed in: attention in steps, nothing in place.

    Args:
        traced: from `qat.tracing.trace`; changed in place.
        net: what it was recorded from.
        call: example inputs.
        fixed: other parameters of the network's forward, as the recording has them built in.

    Returns:
        The shape of every tensor of real numbers.

    Raises:
        ValueError: the two compute different results, before or after that.
        UntraceableError: an operation in place whose effect cannot be followed.
    """
    trial, expected = Trial(traced, call), float_output(net, call, fixed)
    tolerance = 1e-4 if any(type(module) in INSIDE for module in net.modules()) else 0.0  # sums in another order
    check_same(net, trial, expected, tolerance)
    if drop_in_place(traced, trial, call):
        trial = Trial(traced, call)
        check_same(net, trial, expected, tolerance)
    decomposed = decompose_einsum(traced, trial.shapes) | decompose_attention(traced, trial.shapes)
    decomposed |= decompose_extremes(traced) | unpool_by_function(traced)
    if insert_functional(traced) or decomposed:
        bind_functional(traced)
        trial = Trial(traced, call)
        check_same(net, trial, expected, 1e-4)
    return trial.shapes


def quantizable(traced: fx.GraphModule) -> dict[str, Quantizable]:
    """Every quantizable layer by path, in order of execution."""
    graph = Graph(traced)
    found = {}
    for node in graph.nodes:
        name, module = str(node.target), graph.submodule(node)
        if module is not None and type(module) in SWAPS:
            found[name] = Quantizable(type_name(module), module.path if isinstance(module, Functional) else name)
    return found


def place(
    traced: fx.GraphModule,
    config: QuantConfig,
    choices: Mapping[str, Choice],
    reads: Mapping[str, Ask],
    shapes: dict[fx.Node, torch.Size],
    at: str,
) -> dict[str, str]:
    """Swap layers for quantized ones and insert quantizers, in place.

    Args:
        traced: from `normalize`.
        config: for the schemes of inputs and of what no layer reads.
        choices: path within `traced` -> schemes of a layer.
        reads: name within `traced` (of `qat.reads`) -> how an operation wants to read a tensor.
        shapes: from `normalize`.
        at: the path of `traced` in the whole network, for messages: "" or with a dot at its end.

    Returns:
        Path within `traced` -> what is to say about a layer beside its choice.
    """
    traced.meta["ranks"] = {str(node.target): len(shape) for node, shape in shapes.items() if node.op == "call_module"}
    for name, choice in choices.items():
        if choice.weight.quantized:
            traced.set_submodule(name, swapped(traced.get_submodule(name), choice, at + name))
    bind_functional(traced)
    ties = share_weight_quantizers((str(node.target), layer) for node, layer in Graph(traced).layers())
    graph = Graph(traced)
    wanted = requests(graph, config, choices, reads, shapes)
    while passing := relus_behind_quantizers(graph, wanted):
        graph.passing_relus |= passing
        wanted = requests(graph, config, choices, reads, shapes)
    _insert(graph, wanted, config, shapes, at)
    _tell_recurrent_layers(Graph(traced))
    _tell_layers_that_functions_read(Graph(traced))
    _make_lean(Graph(traced))
    _tell_what_is_kept(Graph(traced))
    return ties


def swapped(module: nn.Module, choice: Choice, path: str) -> Quantized:
    """The quantized form of a float layer."""
    layer: Quantized = SWAPS[type(module)].from_float(module, choice.weight, path, choice.activation)
    for quantizer in layer.children():
        if isinstance(quantizer, FakeQuantize) and quantizer.shape is None:  # of what it computes inside
            quantizer.reason = choice.reads.reason
    return layer


def _insert(
    graph: Graph, wanted: list[Request], config: QuantConfig, shapes: dict[fx.Node, torch.Size], at: str
) -> None:
    """Insert activation quantizers; those for all readers leave out whoever has one alone."""
    prepared, taken = graph.module, set[str]()
    placed: list[tuple[Request, int, bool, str, FakeQuantize]] = []
    alone = {(request.edges[0], request.reader) for request in wanted if request.reader is not None}
    spared = {(e, u) for request in wanted for e in request.edges for u in e.users if _leads_to(graph, e, u, alone)}
    for request in wanted:
        if not request.ask.scheme.quantized:
            continue
        edges, scheme = request.edges, _along_channels(graph, request)
        relu = request.reader is None and all(graph.kind(edge) is Kind.relu for edge in edges)
        nonnegative = all(graph.nonnegative(edge) for edge in edges)
        _check_axis(graph, edges, scheme, shapes)
        bounds, why = known_ends(graph, request, config)
        quantizer = FakeQuantize(
            scheme, nonnegative=nonnegative, relu=relu, sites=len(edges), activation=shapes[edges[0]], bounds=bounds
        )
        quantizer.name, quantizer.reason = at + request.name, ", ".join(filter(None, [request.ask.reason, why]))
        base = request.name.replace(".", "_")
        names = (f"{QUANTIZERS}.{base}" if i == 1 else f"{QUANTIZERS}.{base}_{i}" for i in itertools.count(1))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        placed += [(request, site, relu, name, quantizer) for site in range(len(edges))]
    for request, site, relu, name, quantizer in placed:
        edge = request.edges[site]
        prepared.add_submodule(name, quantizer)
        with prepared.graph.inserting_after(edge):
            args = (edge, site) if quantizer.sites > 1 else (edge,)
            node = prepared.graph.call_module(name, args)
            node.meta = dict(edge.meta)
        readers = [user for user in edge.users if user is not node and (edge, user) not in spared]
        for reader in readers if request.reader is None else [request.reader]:
            reader.replace_input_with(edge, node)
        if request.reader is not None:
            spared.add((edge, node))
        if relu:
            node.replace_input_with(edge, edge.all_input_nodes[0])
            if not edge.users:
                prepared.graph.erase_node(edge)
    prepared.graph.lint()
    prepared.recompile()


def _leads_to(graph: Graph, edge: fx.Node, reader: fx.Node, alone: set[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether a reader of an edge does nothing but move it to those that read it alone."""
    if (edge, reader) in alone:
        return True
    moves = bool(alone) and graph.kind(reader) is Kind.passes and bool(reader.users)
    return moves and all(_leads_to(graph, reader, user, alone) for user in reader.users)


def _tell_recurrent_layers(graph: Graph) -> None:
    """Let recurrent layers know the grids of their inputs, one a call, so that their sums are exact in evaluation."""
    for node, layer in graph.recurrent():
        quantizer = graph.quantizer_of(graph.operands(node)[0])
        if quantizer is not None and quantizer not in layer.sources:
            layer.sources = (*layer.sources, quantizer)


def _tell_layers_that_functions_read(graph: Graph) -> None:
    """Let layers whose real output is read know the grid of their input, so that sums are exact in evaluation."""
    for node in graph.nodes:
        layer, readers = graph.submodule(node), [graph.submodule(user) for user in node.users]
        if not isinstance(layer, QuantLinear | QuantConv1d | QuantConv2d | QuantConv3d):
            continue
        if all(isinstance(reader, FakeQuantize | nn.modules.batchnorm._BatchNorm) for reader in readers):
            continue
        quantizer = graph.quantizer_of(graph.operands(node)[0])
        if quantizer is not None and quantizer not in layer.sources:
            layer.sources = (*layer.sources, quantizer)


def _tell_what_is_kept(graph: Graph) -> None:
    """Let quantizers know whether a layer, a product or a norm reads them, and keeps for backward what it has read."""
    read = set()
    for node in graph.nodes:
        if graph.kind(node) is Kind.layer or node.target is matmul or graph.key(node) in NORMS:
            read |= {graph.quantizer_of(arg) for arg in graph.operands(node)}
    for node in graph.nodes:
        quantizer = graph.submodule(node)
        if isinstance(quantizer, FakeQuantize):
            quantizer.kept = quantizer in read


def _make_lean(graph: Graph) -> None:
    """Put functions that need less memory in place of torch's."""
    for node in graph.nodes:
        module = graph.submodule(node)
        if module is None:
            node.target = lean.FUNCTIONS.get(node.target, node.target)
        elif type(module) in lean.MODULES:
            graph.module.set_submodule(str(node.target), with_state_of(module, lean.MODULES[type(module)]))
    graph.module.recompile()


def _along_channels(graph: Graph, request: Request) -> TensorScheme:
    """The scheme with the last axis for its channels, where none is given and a product of matrices sums along it."""
    scheme = request.ask.scheme
    if scheme.axis is not None or scheme.granularity not in (Granularity.channel, Granularity.group):
        return scheme
    multiplied = any(_is_multiplied(graph, user) for edge in request.edges for user in edge.users)
    return dataclasses.replace(scheme, axis=-1) if multiplied else scheme


def _is_multiplied(graph: Graph, reader: fx.Node) -> bool:
    """Whether a reader, or what it moves its tensor to, is a linear layer or a product of two tensors."""
    layer = graph.submodule(reader)
    if reader.target is matmul or (layer is not None and issubclass(float_type(layer), nn.Linear)):
        return True
    return graph.kind(reader) is Kind.passes and any(_is_multiplied(graph, user) for user in reader.users)


def _check_axis(graph: Graph, edges: list[fx.Node], scheme: TensorScheme, shapes: dict[fx.Node, torch.Size]) -> None:
    """Refuse channels and groups that an activation does not have, or that its edges do not share."""
    if scheme.granularity not in (Granularity.channel, Granularity.group):
        return
    axis, sizes = 1 if scheme.axis is None else scheme.axis, set()
    for edge in edges:
        shape, name = shapes[edge], graph.name(edge)
        if not -len(shape) <= axis < len(shape):
            raise ValueError(
                f"quant.activation.axis={axis}: the tensor '{name}' has {len(shape)} dimensions {list(shape)}"
            )
        size = shape[axis]
        sizes.add(size)
        if scheme.group_size and size % scheme.group_size and not scheme.allow_padding:
            raise ValueError(
                f"quant.activation.group_size={scheme.group_size} does not divide the {size} channels of the tensor "
                f"'{name}' (shape {list(shape)}, axis {axis}); give a divisor of {size}, exempt the layer "
                f"by a rule, or set quant.activation.allow_padding=true"
            )
    if scheme.granularity is Granularity.channel and len(sizes) > 1:
        names = ", ".join(f"'{graph.name(edge)}'" for edge in edges)
        raise ValueError(
            f"quant.activation.granularity=channel: {names} share a scale, because they are concatenated, and have "
            f"{sorted(sizes)} channels; use granularity=tensor there, by a rule"
        )
