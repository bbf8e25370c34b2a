"""Quantizers into a recorded network: layers swapped, a FakeQuantize on every edge that a quantized operation reads."""

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from qat.attention import matmul
from qat.calls import CALLS
from qat.choices import Choice, Quantizable
from qat.decompose import decompose_attention, decompose_extremes
from qat.fake_quant import FakeQuantize
from qat.function_inputs import function_inputs
from qat.functional import insert_functional
from qat.graph import Graph
from qat.in_place import drop_in_place
from qat.inside import INSIDE
from qat.kinds import Kind
from qat.layers import SWAPS, Functional, type_name
from qat.layers.tied import share_weight_quantizers
from qat.prepared import bind_functional
from qat.record import Call
from qat.scheme import Granularity, QuantConfig, TensorScheme
from qat.scheme.config import BOUNDS
from qat.targets import TARGETS, Target
from qat.trial import Trial, check_same, float_output

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
    if decompose_attention(traced, trial.shapes) | decompose_extremes(traced) | insert_functional(traced):
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
    shapes: dict[fx.Node, torch.Size],
    at: str,
) -> dict[str, str]:
    """Swap layers for quantized ones and insert quantizers, in place.

    Args:
        traced: from `normalize`.
        config: for the schemes of inputs and of what no layer reads.
        choices: path within `traced` -> schemes of a layer.
        shapes: from `normalize`.
        at: the path of `traced` in the whole network, for messages: "" or with a dot at its end.

    Returns:
        Path within `traced` -> what is to say about a layer beside its choice.
    """
    traced.meta["ranks"] = {str(node.target): len(shape) for node, shape in shapes.items() if node.op == "call_module"}
    for name, choice in choices.items():
        if choice.weight.quantized:
            module = traced.get_submodule(name)
            traced.set_submodule(
                name, SWAPS[type(module)].from_float(module, choice.weight, at + name, choice.activation)
            )
    bind_functional(traced)
    ties = share_weight_quantizers((str(node.target), layer) for node, layer in Graph(traced).layers())
    _insert(traced, config, choices, shapes, at)
    _tell_recurrent_layers(Graph(traced))
    _tell_what_is_kept(Graph(traced))
    return ties


def _insert(
    prepared: fx.GraphModule,
    config: QuantConfig,
    choices: Mapping[str, Choice],
    shapes: dict[fx.Node, torch.Size],
    at: str,
) -> None:
    """Insert activation quantizers."""
    graph = Graph(prepared)
    requests = _requests(graph, config, choices, shapes)
    while passing := _relus_behind_quantizers(graph, requests):
        graph.passing_relus |= passing
        requests = _requests(graph, config, choices, shapes)
    taken: set[str] = set()
    placed: list[tuple[fx.Node, bool, int, str, FakeQuantize]] = []
    for edges, scheme in requests:
        relu = all(graph.kind(edge) is Kind.relu for edge in edges)
        nonnegative = all(graph.nonnegative(edge) for edge in edges)
        _check_axis(graph, edges, scheme, shapes)
        ends = {graph.bounds(edge, known_ends(config, scheme)) for edge in edges}
        quantizer = FakeQuantize(
            scheme, nonnegative=nonnegative, relu=relu, sites=len(edges), activation=shapes[edges[0]],
            bounds=ends.pop() if len(ends) == 1 else None,
        )  # fmt: skip
        quantizer.name = at + graph.name(edges[0])
        base = graph.name(edges[0]).replace(".", "_")
        names = (f"{QUANTIZERS}.{base}" if i == 1 else f"{QUANTIZERS}.{base}_{i}" for i in itertools.count(1))
        name = next(name for name in names if name not in taken)
        taken.add(name)
        placed += [(edge, relu, site, name, quantizer) for site, edge in enumerate(edges)]
    for edge, relu, site, name, quantizer in placed:
        prepared.add_submodule(name, quantizer)
        with prepared.graph.inserting_after(edge):
            args = (edge, site) if quantizer.sites > 1 else (edge,)
            node = prepared.graph.call_module(name, args)
            node.meta = dict(edge.meta)
        for reader in [user for user in edge.users if user is not node]:
            reader.replace_input_with(edge, node)
        if relu:
            node.replace_input_with(edge, edge.all_input_nodes[0])
            prepared.graph.erase_node(edge)
    prepared.graph.lint()
    prepared.recompile()


def _tell_recurrent_layers(graph: Graph) -> None:
    """Let recurrent layers know the grids of their inputs, one a call, so that their sums are exact in evaluation."""
    for node, layer in graph.recurrent():
        quantizer = graph.quantizer_of(graph.operands(node)[0])
        if quantizer is not None and quantizer not in layer.sources:
            layer.sources = (*layer.sources, quantizer)


def _tell_what_is_kept(graph: Graph) -> None:
    """Let quantizers know whether a layer or a product reads them, and keeps for backward what it has read."""
    read = set()
    for node in graph.nodes:
        if graph.kind(node) is Kind.layer or node.target is matmul:
            read |= {graph.quantizer_of(arg) for arg in graph.operands(node)}
    for node in graph.nodes:
        quantizer = graph.submodule(node)
        if isinstance(quantizer, FakeQuantize):
            quantizer.kept = quantizer in read


def _requests(
    graph: Graph, config: QuantConfig, choices: Mapping[str, Choice], shapes: dict[fx.Node, torch.Size]
) -> list[tuple[list[fx.Node], TensorScheme]]:
    """Which edges need a quantizer, edges that share one together, each with its scheme (the widest one asked for)."""
    wanted: dict[fx.Node, TensorScheme] = {}
    shared: dict[fx.Node, list[fx.Node]] = {}
    weights = graph.held_for_layers()
    for node in graph.nodes:
        scheme = choices[str(node.target)].activation if graph.kind(node) is Kind.layer else config.activation
        if not scheme.quantized or node in weights:
            continue
        for arg in _reads(graph, node, TARGETS[config.target]):
            # numbers and masks have no grid; what a recurrent layer makes is on one already
            sources = [s for s in graph.sources(arg) if s in shapes and graph.given_grid(s) is None]
            group = list(dict.fromkeys(member for s in sources for member in shared.get(s, [s])))
            shared |= dict.fromkeys(group, group)
            for source in sources:
                asked = config.input if graph.kind(source) is Kind.input else scheme
                if asked.quantized and (source not in wanted or (asked.bits or 0) > (wanted[source].bits or 0)):
                    wanted[source] = asked
    result = []
    for node in graph.nodes:
        members = [member for member in shared.get(node, []) if member in wanted]
        if members and members[0] is node:
            result.append((members, max((wanted[m] for m in members), key=lambda s: s.bits or 0)))
    return result


def _reads(graph: Graph, node: fx.Node, target: Target) -> list[fx.Node]:
    """What an operation reads from a grid: a layer, and whatever else the target computes with integers."""
    kind, operation = graph.kind(node), CALLS.get(graph.key(node))
    if kind in (Kind.add, Kind.arithmetic, Kind.average):
        name = operation.name if operation is not None and kind is Kind.arithmetic else kind.name
        return graph.operands(node) if name in target.operations else []
    if kind is Kind.layer:
        return graph.operands(node)
    wanted = operation is not None and operation.name in target.function_inputs
    return function_inputs(graph, node) if wanted or target.functions == "integer" else []


def known_ends(config: QuantConfig, scheme: TensorScheme) -> dict[str, tuple[float, float]]:
    """Function -> the ends of its results, as configured; at 8 bits as the target has them."""
    ends = {name: BOUNDS[name] for name in config.bounded}
    return {**ends, **TARGETS[config.target].bounds} if scheme.bits == 8 else ends


def _relus_behind_quantizers(graph: Graph, requests: list[tuple[list[fx.Node], TensorScheme]]) -> set[fx.Node]:
    """ReLUs whose input is quantized already (something else reads it too): they clamp integers and keep the scale."""
    edges = {edge for members, _ in requests for edge in members}
    return {
        edge
        for edge in edges
        if graph.kind(edge) is Kind.relu
        and all(s in edges or graph.given_grid(s) is not None for s in graph.sources(edge.all_input_nodes[0]))
    }


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
