"""Which edges of a recording need a quantizer, with which scheme, and what asked for it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from qat.calls import CALLS
from qat.choices import Ask, Choice
from qat.function_inputs import function_inputs
from qat.graph import Graph
from qat.kinds import Kind
from qat.reads import Read, inside_attention, names
from qat.scheme import QuantConfig
from qat.scheme.config import BOUNDS
from qat.targets import TARGETS, Target


@dataclass
class Request:
    """Edges that need one quantizer.

    Attributes:
        edges: one tensor, or those that share a scale because they are concatenated.
        ask: the scheme, and what chose it.
        name: what the tensor is called.
        reader: who alone reads what the quantizer makes; None for all who read the tensor.
    """

    edges: list[fx.Node]
    ask: Ask
    name: str
    reader: fx.Node | None = None


def requests(
    graph: Graph,
    config: QuantConfig,
    choices: Mapping[str, Choice],
    reads: Mapping[str, Ask],
    shapes: Mapping[fx.Node, torch.Size],
) -> list[Request]:
    """Which edges need a quantizer, each with its scheme: the widest one that its readers ask for.

    Where a rule gives a tensor of attention another scheme than what else is read of the same source (queries, keys and
    values of one projection), each of those tensors gets a request of its own, which may be for float.

    Args:
        graph: of a recording in which layers are quantized.
        config: for the schemes of inputs, and the target.
        choices: path of a layer -> its schemes.
        reads: name (of `qat.reads`) -> how an operation wants to read a tensor.
        shapes: of the recording's tensors.
    """
    asked: dict[fx.Node, list[tuple[Read, Ask]]] = defaultdict(list)
    shared: dict[fx.Node, list[fx.Node]] = {}
    every = list(_asks(graph, config, choices, reads))
    inside = inside_attention(graph)
    for read, ask in every:
        for source in _sources(graph, read[1], shapes):
            asked[source].append((read, _at(graph, source, read in inside, ask, config)))
    apart = {
        read: ask
        for found in asked.values()
        if any(read in inside and ask.by_rule for read, ask in found)
        and any(ask.scheme != found[0][1].scheme for _, ask in found)
        for read, ask in found
        if read in inside
    }
    result = [_apart(graph, read, ask, inside[read], shapes) for read, ask in apart.items()]
    wanted: dict[fx.Node, Ask] = {}
    for read, ask in every:
        if read in apart or not ask.scheme.quantized:
            continue
        sources = _sources(graph, read[1], shapes)
        group = list(dict.fromkeys(member for s in sources for member in shared.get(s, [s])))
        shared |= dict.fromkeys(group, group)
        for source in sources:
            here = _at(graph, source, read in inside, ask, config)
            if here.scheme.quantized and (source not in wanted or _bits(here) > _bits(wanted[source])):
                wanted[source] = here
    for node in graph.nodes:
        members = [member for member in shared.get(node, []) if member in wanted]
        if members and members[0] is node:
            result.append(Request(members, max((wanted[m] for m in members), key=_bits), graph.name(node)))
    position = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(result, key=lambda request: position[request.edges[0]])


def known_ends(graph: Graph, request: Request, config: QuantConfig) -> tuple[tuple[float, float] | None, str]:
    """The ends of a function's results, if the edges are such, and what chose them: the target at 8 bits."""
    configured = {name: BOUNDS[name] for name in config.bounded}
    of_target = TARGETS[config.target].bounds if request.ask.scheme.bits == 8 else {}
    ends = {graph.bounds(edge, {**configured, **of_target}) for edge in request.edges}
    if len(ends) > 1 or ends == {None}:
        return None, ""
    by_target = graph.bounds(request.edges[0], of_target) is not None
    return ends.pop(), f"range of target={config.target}" if by_target else "range of the function"


def relus_behind_quantizers(graph: Graph, found: list[Request]) -> set[fx.Node]:
    """ReLUs whose input is quantized already (something else reads it too): they clamp integers and keep the scale."""
    edges = {edge for request in found if request.reader is None for edge in request.edges}
    return {
        edge
        for edge in edges
        if graph.kind(edge) is Kind.relu
        and all(s in edges or graph.given_grid(s) is not None for s in graph.sources(edge.all_input_nodes[0]))
    }


def _asks(
    graph: Graph, config: QuantConfig, choices: Mapping[str, Choice], reads: Mapping[str, Ask]
) -> Iterator[tuple[Read, Ask]]:
    """Every read of a tensor from a grid, in order of execution, with what it asks for."""
    named, weights, target = names(graph), graph.held_for_layers(), TARGETS[config.target]
    for node in graph.nodes:
        if node in weights:
            continue
        if graph.kind(node) is Kind.layer:
            for arg in graph.operands(node):
                yield (node, arg), choices[str(node.target)].reads
            continue
        own = {arg: reads[name] for (reader, arg), name in named.items() if reader is node}
        by_target = target_reads(graph, node, target)
        for arg in dict.fromkeys((*by_target, *own)):
            ask = own.get(arg)
            if arg in by_target and (ask is None or (graph.kind(node) is Kind.other and not ask.by_rule)):
                ask = Ask(config.activation, f"target={config.target}: {_name(graph, node)} reads integers")
            if ask is not None and (arg in by_target or ask.by_rule):
                yield (node, arg), ask


def _name(graph: Graph, node: fx.Node) -> str:
    operation = CALLS.get(graph.key(node))
    return graph.kind(node).name if operation is None else operation.name


def target_reads(graph: Graph, node: fx.Node, target: Target) -> list[fx.Node]:
    """What an operation that is no layer reads from a grid: whatever the target computes with integers."""
    kind, name = graph.kind(node), _name(graph, node)
    if kind in (Kind.add, Kind.arithmetic, Kind.average):
        return graph.operands(node) if (name if kind is Kind.arithmetic else kind.name) in target.operations else []
    wanted = name in target.function_inputs or target.functions == "integer"
    return function_inputs(graph, node) if wanted else []


def _sources(graph: Graph, arg: fx.Node, shapes: Mapping[fx.Node, torch.Size]) -> list[fx.Node]:
    """Where a tensor's values come from; numbers and masks have no grid, what a recurrent layer makes is on one."""
    return [s for s in graph.sources(arg) if s in shapes and graph.given_grid(s) is None]


def _at(graph: Graph, source: fx.Node, in_attention: bool, ask: Ask, config: QuantConfig) -> Ask:
    """What is asked of a source: the network's inputs have a scheme of their own."""
    if graph.kind(source) is not Kind.input or (in_attention and ask.by_rule):
        return ask
    return Ask(config.input, "default")


def _bits(ask: Ask) -> int:
    return ask.scheme.bits or 0


def _apart(graph: Graph, read: Read, ask: Ask, name: str, shapes: Mapping[fx.Node, torch.Size]) -> Request:
    """A request for one read alone: at the first place behind the source that nothing else reads."""
    reader, edge = read
    while graph.kind(edge) is Kind.passes and len(edge.users) == 1 and edge.all_input_nodes[0] in shapes:
        reader, edge = edge, edge.all_input_nodes[0]
    return Request([edge], ask, name, reader)
