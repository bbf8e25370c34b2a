"""Recording a network: once as it trains and once as it is evaluated, so that neither mode is frozen into the graph.

`self.training` is a plain attribute: a trace cannot see it read, only what came of it. So both modes are recorded and
compared. A number that differs (`F.dropout(x, p, training=self.training)`) becomes a module that knows its mode; a
module that branches in training and hands its input on in evaluation (stochastic depth) is kept whole; any other
branch is refused.
"""

import inspect
import operator
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, partialmethod
from itertools import zip_longest
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import Attribute, TracerBase
from torch.nn.modules import padding
from torch.overrides import _get_current_function_mode_stack

from qat.advice import advice, last_user_line, line_of
from qat.fake_quant import FakeQuantize
from qat.inside import INSIDE, erase_unread
from qat.layers import Quantized
from qat.prepared import PreparedNetwork, RecordedSequential
from qat.results import PACKING

MODES = "modes"
"""Where modules that stand for what depends on the mode live in a traced network."""

DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout, torch.dropout: nn.Dropout, torch.dropout_: nn.Dropout, F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d, F.dropout3d: nn.Dropout3d, F.alpha_dropout: nn.AlphaDropout,
    F.feature_alpha_dropout: nn.FeatureAlphaDropout,
}  # fmt: skip

PADDINGS = padding._ConstantPadNd | padding._ReflectionPadNd | padding._ReplicationPadNd
"""Modules that are recorded as the F.pad that they call."""


class ByMode(nn.Module):
    """A constant that differs between training and evaluation.

    Args:
        train, evaluation: its two values.
    """

    def __init__(self, train: Any, evaluation: Any) -> None:
        super().__init__()
        self.train_value, self.eval_value = train, evaluation

    def forward(self) -> Any:
        """The value of the mode that the module is in."""
        return self.train_value if self.training else self.eval_value


class UntraceableError(ValueError):
    """A network that cannot be recorded.

    Attributes:
        culprit: path of the innermost module whose own code stopped the recording, "" for the network's.
    """

    def __init__(self, message: str, culprit: str = "") -> None:
        super().__init__(message)
        self.culprit = culprit


class _InPlace:
    """Symbols that record `y += x` and `y[part] = x` as such: another name of `y` sees them, too."""

    tracer: TracerBase

    def _call(self, function: Any, *args: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, *args), {})

    def __setitem__(self, index: Any, value: Any) -> None:
        self._call(operator.setitem, index, value)


for _name in ("iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "ifloordiv", "imod", "iand", "ior", "ixor"):
    setattr(_InPlace, f"__{_name}__", partialmethod(_InPlace._call, getattr(operator, _name)))


class Symbol(_InPlace, fx.Proxy):
    """What stands for a tensor, or a size, while a network is recorded."""

    def __getattr__(self, k: str) -> Any:
        return SymbolAttribute(self, k)


class SymbolAttribute(_InPlace, Attribute):
    """An attribute of a symbol, or a method that is about to be called."""


class _Tracer(fx.Tracer):
    """Records, and takes quantized layers, quantizers and the modules in `whole` as single operations."""

    record_stack_traces = True

    def __init__(self, whole: set[str] | None = None) -> None:
        super().__init__(autowrap_functions=PACKING)
        self._autowrap_search.append(torch.nn.utils.rnn)  # where `nn.utils.rnn.pack_padded_sequence(...)` finds them
        self.whole = whole or set()
        self.culprit: str | None = None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """A graph whose generated code asks for no wrapping, which later traces trip over; to unpickle is to trace."""
        self.added = [getattr(mode, "device", None) for mode in _get_current_function_mode_stack()]
        graph = super().trace(root, concrete_args)
        for node in graph.nodes:
            node.meta.pop("is_wrapped", None)
        return graph

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *others: Any, **named: Any) -> fx.Node:
        """A node without the device that a context, as `with torch.device(...)`, adds to calls that make tensors."""
        kept = {k: v for k, v in kwargs.items() if k != "device" or not any(v is device for device in self.added)}
        return super().create_node(kind, target, args, kept, *others, **named)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The symbol that stands for the result of a node."""
        return Symbol(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        single = isinstance(m, Quantized | FakeQuantize) or module_qualified_name in self.whole
        inside = type(m) in INSIDE or isinstance(m, PADDINGS)
        return single or (not inside and super().is_leaf_module(m, module_qualified_name))

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call of a module, or what is inside it."""
        inside = INSIDE.get(type(m))
        try:
            return super().call_module(m, forward if inside is None else partial(inside, m), args, kwargs)
        except Exception:
            if self.culprit is None:
                self.culprit = self.path_of_module(m)
            raise

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """What computes the network itself, and its inputs."""
        return super().create_args_for_root(INSIDE.get(type(self.root), root_fn), is_module, concrete_args)


LISTS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Sequential: RecordedSequential,
    nn.ModuleList: nn.ModuleList,
    nn.ModuleDict: nn.ModuleDict,
}
"""Containers whose layers others may look up."""


def trace(
    net: nn.Module,
    opaque: Iterable[str] = (),
    fixed: Mapping[str, Any] = MappingProxyType({}),
    kind: type[PreparedNetwork] = PreparedNetwork,
) -> fx.GraphModule:
    """Record `net` as a graph. Parameters and submodules are shared with `net`, which is not changed.

    Args:
        net: the network.
        opaque: paths of submodules to take as single operations.
        fixed: parameters of `forward` that are no tensors, and their values: the graph has them built in.
        kind: class of the result.

    Raises:
        UntraceableError: the network cannot be traced, or takes another path in training than in evaluation; says why
            and at which line of its code.
    """
    whole = {  # often they cannot be traced while they train
        name
        for name, module in net.named_modules()
        if name and not any(module.children()) and not any(module.state_dict()) and _is_identity_in_eval(module)
    }
    taken = set(opaque)
    before = set(vars(net))
    while True:
        train, evaluation = (_record(net, training, whole | taken, fixed) for training in (True, False))
        branch = _branch(train, evaluation)
        if branch is None:
            break
        whole.add(_passing_scope(net, *branch))
    traced = kind(net, evaluation, type(net).__name__)
    traced.meta |= {"parameters": list(inspect.signature(net.forward).parameters), "fixed": dict(fixed)}
    traced.adopt(vars(net))
    traced.meta["identity_in_eval"] = sorted(whole)
    for name in set(vars(net)) - before:  # tensors made in forward, which the trace left behind
        delattr(net, name)
        traced._non_persistent_buffers_set.add(name)
    _insert_modes(traced, train)
    erase_unread(traced.graph)
    traced.recompile()
    for name, module in net.named_modules():  # what forward does not call belongs to a float checkpoint, too
        if name and not has(traced, name):
            traced.add_submodule(name, module)
    _add_unread_tensors(net, traced)
    _restore_lists(net, traced)
    return traced


def _add_unread_tensors(net: nn.Module, traced: fx.GraphModule) -> None:
    """Parameters and buffers that forward does not read, of modules that it goes through."""
    for path, module in net.named_modules():
        target = traced.get_submodule(path)
        for name, parameter in module._parameters.items():
            if target is not module and name not in target._parameters:
                target.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            if target is not module and name not in target._buffers:
                target.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)


def _restore_lists(net: nn.Module, traced: fx.GraphModule) -> None:
    """Let lists and dicts of modules be such: code beside `forward` (optimizers) reads `net.blocks[0]`."""
    for path, module in net.named_modules():
        kind, target = LISTS.get(type(module)), traced.get_submodule(path)
        if kind is not None and type(target) in (nn.Module, type(traced)):
            target._modules = {name: target._modules[name] for name in module._modules} | target._modules
            if target is not traced:
                target.__class__ = kind


def _record(net: nn.Module, training: bool, whole: set[str], fixed: Mapping[str, Any]) -> fx.Graph:
    tracer, before = _Tracer(whole), _versions(net)
    try:
        with _mode(net, training):
            graph = tracer.trace(net, dict(fixed) or None)
    except Exception as error:  # whatever the network's own code raises when it meets a symbolic tensor
        where = last_user_line(error)
        raise UntraceableError(
            f"qat cannot trace {type(net).__name__}{where}: {str(error).rstrip('.')}. {advice(error)}".rstrip(),
            tracer.culprit or "",
        ) from error
    for name, version in _versions(net).items():
        if version != before.get(name, version):
            path, _, own = name.rpartition(".")
            raise UntraceableError(
                f"{type(net).__name__} writes into its own tensor '{name}' in forward; a recording would not. Write "
                f"into it outside of forward, or in a submodule of its own",
                path if own else "",
            )
    for node in graph.nodes:  # fx leaves of a fixed parameter an input that only assertions read
        if node.op == "placeholder" and str(node.target).rpartition("_")[0] in fixed:
            _erase_with_readers(graph, node)
    return graph


def _versions(net: nn.Module) -> dict[str, int]:
    """How often each tensor of a network was written into, but for BatchNorm's counts, which little depends on."""
    held = (*net.named_parameters(), *net.named_buffers())
    return {name: t._version for name, t in held if not t.is_inference() and "num_batches_tracked" not in name}


def _erase_with_readers(graph: fx.Graph, node: fx.Node) -> None:
    for reader in list(node.users):
        _erase_with_readers(graph, reader)
    graph.erase_node(node)


@contextmanager
def _mode(net: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in net.modules()}
    try:
        for module in before:
            module.training = training
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _branch(train: fx.Graph, evaluation: fx.Graph) -> tuple[fx.Node | None, fx.Node | None] | None:
    """The first operations in which two recordings differ, numbers apart; None when the operations are the same."""
    same: dict[Any, Any] = {}
    for a, b in zip_longest(train.nodes, evaluation.nodes):
        constants = all(n is not None and n.op == "get_attr" and is_constant(n.target) for n in (a, b))
        if a is None or b is None or a.op != b.op or (a.target != b.target and not constants):
            return a, b
        if not _same_form((a.args, a.kwargs), (b.args, b.kwargs), same):
            return a, b
        same[a] = b
    return None


def is_constant(name: Any) -> bool:
    """Whether an attribute of a recording is a tensor that forward makes anew each time."""
    return str(name).startswith("_tensor_constant")


def _same_form(a: Any, b: Any, same: dict[Any, Any]) -> bool:
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return isinstance(a, fx.Node) and same.get(a) is b
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same_form(x, y, same) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_form(a[k], b[k], same) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _same_form((a.start, a.stop, a.step), (b.start, b.stop, b.step), same)
    return not isinstance(a, list | tuple | dict | slice) and not isinstance(b, list | tuple | dict | slice)


def _passing_scope(net: nn.Module, a: fx.Node | None, b: fx.Node | None) -> str:
    """The innermost module around a branch that hands its input on when it is evaluated.

    Raises:
        ValueError: there is none; names the line.
    """
    for node in (a, b):
        stack = node.meta.get("nn_module_stack", {}).values() if node is not None else ()
        for path, _ in reversed(list(stack)):
            if path and _is_identity_in_eval(net.get_submodule(path)):
                return str(path)
    where = next((line for line in map(line_of, (a, b)) if line), "")
    raise UntraceableError(
        f"{type(net).__name__} takes another path in training than in evaluation{where}. A trace holds one path: put "
        f"the branch into an nn.Module of its own that returns its input when it is not training (as nn.Dropout does), "
        f"or pass self.training as an argument (F.dropout(x, p, training=self.training))"
    )


def _is_identity_in_eval(module: nn.Module) -> bool:
    if type(module).__module__.startswith("torch.nn."):
        return False  # known, or traced as one operation anyway
    try:
        with _mode(module, False):
            nodes = list(_Tracer(set()).trace(module).nodes)
    except Exception:  # not traceable on its own: no identity that could be seen
        return False
    first = next((node for node in nodes if node.op == "placeholder"), None)
    return first is not None and nodes[-1].op == "output" and nodes[-1].args[0] is first


def _insert_modes(traced: fx.GraphModule, train: fx.Graph) -> None:
    """Let modules that know their mode stand where the two recordings differ, and for dropout called as a function."""
    graph = traced.graph
    pairs = list(zip(graph.nodes, train.nodes, strict=True))
    for node, other in pairs:
        if node.target in DROPOUTS:
            train_p, eval_p = (_dropout_share(n) for n in (other, node))
            if eval_p:
                raise ValueError(
                    f"{traced._get_name()} drops values in evaluation, too ('{node.name}'{line_of(node)}); pass "
                    f"training=self.training"
                )
            in_place = node.target is torch.dropout_ or bool(node.kwargs.get("inplace") or node.args[3:])
            _dropout_module(traced, node, DROPOUTS[node.target](train_p, in_place))
            continue
        node.args = _merged(traced, node, other.args, node.args)
        node.kwargs = {k: _merged(traced, node, other.kwargs[k], v) for k, v in node.kwargs.items()}
    graph.lint()
    traced.recompile()


def _dropout_module(traced: fx.GraphModule, node: fx.Node, module: nn.Module) -> None:
    name = f"{MODES}.{node.name}"
    traced.add_submodule(name, module)
    with traced.graph.inserting_before(node):
        source = node.args[0] if node.args else node.kwargs["input"]
        call = traced.graph.call_module(name, (source,))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    traced.graph.erase_node(node)


def _dropout_share(node: fx.Node) -> float:
    """The share of values that a call of dropout drops."""
    names = ("input", "p", "train" if node.target in (torch.dropout, torch.dropout_) else "training")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    training = given.get(names[2], node.target not in (F.alpha_dropout, F.feature_alpha_dropout))
    return float(given.get("p", 0.5)) if training else 0.0


def _merged(traced: fx.GraphModule, node: fx.Node, train: Any, evaluation: Any) -> Any:
    """An argument of both modes: as it is where they agree, else the node of a ByMode."""
    if isinstance(evaluation, fx.Node):
        return evaluation
    if isinstance(evaluation, list | tuple):
        parts = [_merged(traced, node, t, e) for t, e in zip(train, evaluation, strict=True)]
        return type(evaluation)(parts)
    if isinstance(evaluation, dict):
        return {k: _merged(traced, node, train[k], e) for k, e in evaluation.items()}
    if isinstance(evaluation, slice) or (type(train) is type(evaluation) and train == evaluation):
        return evaluation
    name = next(n for i in range(len(traced.graph.nodes)) if not has(traced, n := f"{MODES}.{node.name}_{i}"))
    traced.add_submodule(name, ByMode(train, evaluation))
    with traced.graph.inserting_before(node):
        return traced.graph.call_module(name, ())


def has(net: nn.Module, name: str) -> bool:
    """Whether there is a submodule of that path."""
    try:
        net.get_submodule(name)
    except AttributeError:
        return False
    return True
