"""What reads tensors from a grid beside layers, and what rules and reports call it.

A rule's `activation` is the scheme of what it matches *reads*. A layer reads its input; an addition or a product of two
tensors, an average, is called after its code (`block.add`, numbered where it repeats); attention reads five tensors,
each of which has a name: `self_attn.sdpa.query`, `.key`, `.value`, `.scores` (what softmax reads, before masks) and
`.probabilities`. Attention is known by what it computes (product, softmax, product), so also where it is written out.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torch import fx

from qat.calls import CALLS
from qat.function_inputs import before_masks
from qat.graph import Graph
from qat.kinds import Kind
from qat.scheme.config import ATTENTION

Read = tuple[fx.Node, fx.Node]
"""An operation, and a tensor that it reads."""


class Attention(NamedTuple):
    """One call of attention in a recording.

    Attributes:
        name: `self_attn.sdpa`.
        first, softmax, second: its product of queries and keys, its softmax, its product with values.
    """

    name: str
    first: fx.Node
    softmax: fx.Node
    second: fx.Node

    def reads(self, graph: Graph) -> dict[str, Read]:
        """Name of each of the five tensors -> what reads it, and the tensor as it is read."""
        query, key = graph.tensors(self.first)
        probabilities, value = graph.tensors(self.second)
        found = {
            "query": (self.first, query), "key": (self.first, key), "value": (self.second, value),
            "scores": (self.softmax, before_masks(graph, self.softmax)),
            "probabilities": (self.second, probabilities),
        }  # fmt: skip
        return {f"{self.name}.{part}": found[part] for part in ATTENTION}


def attention(graph: Graph) -> list[Attention]:
    """Every call of attention, in order of execution."""
    found: list[Attention] = []
    taken: Counter[str] = Counter()
    for node in graph.nodes:
        softmax = _softmax_before(graph, node)
        first = None if softmax is None else _product_before(graph, softmax)
        if softmax is None or first is None:
            continue
        scope = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
        base = ".".join([*scope[-1:], "sdpa"])
        while True:
            taken[base] += 1
            name = base if taken[base] == 1 else f"{base}_{taken[base]}"
            if name not in graph.modules:  # a module of the user's has that name
                break
        found.append(Attention(name, first, softmax, node))
    return found


def operations(graph: Graph) -> dict[fx.Node, str]:
    """Arithmetic of two tensors and averages, with what rules call them."""
    found, taken = {}, Counter[str]()
    for node in graph.nodes:
        if graph.kind(node) in (Kind.add, Kind.arithmetic, Kind.average):
            name = graph.name(node)
            taken[name] += 1
            found[node] = name if taken[name] == 1 else f"{name}_{taken[name]}"
    return found


def names(graph: Graph) -> dict[Read, str]:
    """What rules call each read of a tensor by an operation that is no layer."""
    found = {(node, arg): name for node, name in operations(graph).items() for arg in graph.operands(node)}
    return found | inside_attention(graph)


def inside_attention(graph: Graph) -> dict[Read, str]:
    """Those of attention."""
    return {read: name for call in attention(graph) for name, read in call.reads(graph).items()}


def _operation(graph: Graph, node: fx.Node) -> str:
    operation = CALLS.get(graph.key(node))
    return "" if operation is None else operation.name


def _softmax_before(graph: Graph, node: fx.Node) -> fx.Node | None:
    """The softmax whose result is the left factor of a product."""
    if graph.kind(node) is not Kind.arithmetic or _operation(graph, node) != "matmul":
        return None
    return next((n for n in _back(graph, graph.tensors(node)[0], ()) if _operation(graph, n) == "softmax"), None)


def _product_before(graph: Graph, softmax: fx.Node) -> fx.Node | None:
    """The product whose result, scaled and masked, a softmax reads."""
    source = before_masks(graph, softmax)
    found = next((n for n in _back(graph, source, ("mul", "div")) if _operation(graph, n) == "matmul"), None)
    return found if found is not None and graph.kind(found) is Kind.arithmetic else None


def _back(graph: Graph, node: fx.Node, through: tuple[str, ...]) -> Iterator[fx.Node]:
    """A tensor and what it was made of, behind moves, quantizers and operations of one tensor that `through` names."""
    yield node
    while True:
        kind = graph.kind(node)
        scaled = kind is Kind.other and _operation(graph, node) in through and len(graph.tensors(node)) == 1
        if kind not in (Kind.passes, Kind.quantizer) and not scaled:
            return
        node = graph.tensors(node)[0] if scaled else node.all_input_nodes[0]
        yield node
