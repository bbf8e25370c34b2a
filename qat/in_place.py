"""Operations that write into a tensor, as operations that return a new one.

Quantizers stand on edges, so a tensor must keep the value that the edge stands for. What reads an overwritten tensor
later reads the new one, by whatever name it knows that memory: an identity, a view, a part. Where memory is shared in a
way that a new tensor cannot stand for, the code stays as it is, unrecorded.
"""

import copy
import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.graph import inplace_methods

from qat.advice import line_of
from qat.graph import Graph
from qat.record import Call
from qat.tracing import DROPOUTS, UntraceableError, is_constant
from qat.trial import Trial

_METHODS = {"__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div"}
_OPERATORS: dict[Any, Any] = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul,
    operator.itruediv: operator.truediv, operator.imatmul: operator.matmul, operator.ipow: operator.pow,
    operator.ifloordiv: operator.floordiv, operator.imod: operator.mod, operator.iand: operator.and_,
    operator.ior: operator.or_, operator.ixor: operator.xor,
}  # fmt: skip


def drop_in_place(traced: fx.GraphModule, trial: Trial, call: Call) -> bool:
    """Make operations that write into a tensor return a new one, and let later readers of that memory read this.

    Args:
        traced: a recording; it is changed.
        trial: its run.
        call: the example.

    Returns:
        Whether there was one.

    Raises:
        UntraceableError: something else reads the memory later in a way that cannot be followed, or a tensor of the
            network itself is overwritten; names the line.
    """
    graph, found = Graph(traced), False
    given = {node: _without_argument(node) for node in graph.nodes}
    flagged = any(getattr(module, "inplace", False) is True for module in traced.modules())
    if not trial.written and not flagged and not any(node.target in _OPERATORS for node in graph.nodes):
        return False
    trial = Trial(traced, call, keep=True)
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        module, asked = graph.submodule(node), given[node]
        if module is not None and getattr(module, "inplace", False) is True:
            asked = True
            module = copy.copy(module)  # the original keeps its setting
            setattr(module, "inplace", False)  # noqa: B010 (nn.Module types attributes as tensors)
            traced.set_submodule(str(node.target), module)
        written = trial.written.get(node, node.all_input_nodes[:1] if asked else [])
        if written or node.target in _OPERATORS:
            name = getattr(node.target, "__name__", str(node.target))
            label = inplace_methods.get(name, name).format("y", "x", "value")  # of `imul`: y *= x
            _Overwriting(graph, trial, node, label, converted=asked or _converted(node)).follow(written)
            found = True
    traced.graph.lint()
    traced.recompile()
    return found


def _converted(node: fx.Node) -> bool:
    """Give a call the form that returns a new tensor; whether there is one."""
    target = node.target
    name = str(target) if node.op == "call_method" else getattr(target, "__name__", "")
    new: Any = None
    if node.kwargs.get("out") is not None:
        return False
    if node.op == "call_method":
        plain = name.removesuffix("_")
        new = _METHODS.get(name, plain if callable(getattr(Tensor, plain, None)) and plain != name else None)
    elif node.op == "call_function":
        homes = [home for home in (torch, F) if getattr(home, name, None) is target and name.endswith("_")]
        new = _OPERATORS.get(target, getattr(homes[0], name[:-1], None) if homes else None)
    node.target = new or target
    return new is not None


def _without_argument(node: fx.Node) -> bool:
    """Take `inplace` out of a call; whether it was set."""
    if node.op != "call_function":
        return False
    assert callable(node.target)
    asked, names = bool(node.kwargs.get("inplace")), _parameters(node.target)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "inplace"}
    if "inplace" in names and len(node.args) > names.index("inplace"):
        asked = asked or bool(node.args[names.index("inplace")])
        node.args = node.args[: names.index("inplace")]
    return asked


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters of a Python function of torch.nn.functional; none of others."""
    known = inspect.isfunction(function) and getattr(F, function.__name__, None) is function
    return tuple(inspect.signature(function).parameters) if known else ()


class _Overwriting:
    """One operation that writes into tensors, and who reads their memory later.

    Args:
        graph: of the recording.
        trial: its run; it learns of the nodes that are added.
        node: the operation.
        label: its name as the user wrote it.
        converted: whether it returns a new tensor now, in place of writing into its first input.
    """

    def __init__(self, graph: Graph, trial: Trial, node: fx.Node, label: str, converted: bool) -> None:
        self.graph, self.values = graph, trial.values
        self.node, self.label, self.converted = node, label, converted
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.last = node

    def follow(self, written: list[fx.Node]) -> None:
        """Let every later reader of the memory of `written` read the new tensor.

        Raises:
            UntraceableError: one cannot.
        """
        for target in written:
            held = self._chain(target)[-1]
            own = held.op == "get_attr" and not (is_constant(held.target) and self.converted)
            if own:
                raise self._refused(f"writes into the network's own tensor '{held.target}', which would be lost")
            for name in self._later_names(target):
                new = self._rebuilt(name, target)
                for reader in self._readers(name):
                    reader.replace_input_with(name, new)

    def _readers(self, name: fx.Node) -> list[fx.Node]:
        now = self.position[self.node]
        return [user for user in name.users if self.position.get(user, -1) > now]

    def _later_names(self, target: fx.Node) -> list[fx.Node]:
        """The nodes made before the operation, and read after it, whose memory it writes into."""
        memory = self.values[target]
        return [
            name
            for name in self.graph.nodes
            if name in self.position
            and self.position[name] < self.position[self.node]
            and any(_overlap(a, b) for a in self.values.get(name, ()) for b in memory)
            and self._readers(name)
        ]

    def _rebuilt(self, name: fx.Node, target: fx.Node) -> fx.Node:
        """What a name of the overwritten memory stands for now: the result, or a view of it like the view it was."""
        chain, other = self._chain(name), self._chain(target)
        if not self.converted:
            raise self._refused("writes into a tensor that is read again, and has no form that returns a new one")
        apart = [why for n in chain + other if (n in chain) != (n in other) and (why := self._apart(n))]
        same = next((i for i, n in enumerate(chain) if self._same(n, target)), None)
        if apart or same is None:
            why = apart[0] if apart else "in part, or in another order"
            raise self._refused(f"writes into memory that '{name.name}', which is read later, shares {why}")
        made = self.node
        for step in reversed(chain[:same]):
            if step not in self.copies:
                self.copies[step] = self._copy(step, made)
            made = self.copies[step]
        return made

    def _copy(self, view: fx.Node, of: fx.Node) -> fx.Node:
        """The same view of another tensor, behind all that was added so far."""
        parent, graph = self._parent(view), self.graph.module.graph
        with graph.inserting_after(self.last):
            self.last = graph.node_copy(view, lambda n: of if n is parent else n)
        self.values[self.last] = self.values[view]
        return self.last

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """A node, what it is a view of, what that is a view of, and so on."""
        chain = [node]
        while (parent := self._parent(chain[-1])) is not None:
            chain.append(parent)
        return chain

    def _parent(self, node: fx.Node) -> fx.Node | None:
        memory = {_storage(t) for t in self.values.get(node, ())}
        inputs = node.all_input_nodes
        return next((n for n in inputs if memory & {_storage(t) for t in self.values.get(n, ())}), None)

    def _same(self, name: fx.Node, target: fx.Node) -> bool:
        """Whether two nodes are one tensor."""
        a, b = self.values[name], self.values[target]
        return len(a) == len(b) == 1 and _place(a[0]) == _place(b[0])

    def _apart(self, node: fx.Node) -> str | None:
        """How far a node shares what it reads; None where it does in all."""
        identity = str(node.target) in self.graph.module.meta.get("identity_in_eval", ())
        if identity or type(self.graph.submodule(node)) in set(DROPOUTS.values()):
            return "in evaluation only"
        data = node.target is getattr and node.args[1] == "data"
        return "without its gradient" if data or node.target in ("detach", torch.detach) else None

    def _refused(self, why: str) -> UntraceableError:
        stack = [str(path) for path, _ in self.node.meta.get("nn_module_stack", {}).values()]
        within = [path for path in stack if self.node.op != "call_module" or path != self.node.target]
        return UntraceableError(
            f"'{self.label}'{line_of(self.node)} {why}. A recording holds no shared memory: write it so that it makes "
            f"a new tensor (y = y.relu() for y.relu_(); torch.where, torch.cat or y.masked_fill(mask, value) for "
            f"y[part] = value)",
            within[-1] if within else "",
        )


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _place(t: Tensor) -> tuple[Any, ...]:
    return _storage(t), t.storage_offset(), t.shape, t.stride(), t.dtype


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common."""
    if _storage(a) != _storage(b) or 0 in (a.numel(), b.numel()):
        return False
    if a.dtype != b.dtype or _place(a) == _place(b):
        return True
    cells = torch.arange(a.untyped_storage().nbytes() // a.element_size())
    one, two = (torch.as_strided(cells, t.shape, t.stride(), t.storage_offset()).flatten() for t in (a, b))
    return bool(torch.isin(one, two).any())
