"""A network in parts: what torch.fx can record, and single layers where it cannot follow the code around them."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from qat.choices import Quantizable
from qat.graph import Graph
from qat.layers import SWAPS, type_name
from qat.place import normalize, quantizable
from qat.prepared import PreparedNetwork, PreparedPart
from qat.reads import names
from qat.record import Call
from qat.structures import only_tensors
from qat.subclass import is_lightning
from qat.tracing import UntraceableError, has, trace

PLAIN = (bool, int, float, str, type(None))
"""Values that a recording can have built in."""


@dataclass
class Part:
    """What is quantized as one: a recorded network, or a single layer.

    Attributes:
        net: the float module.
        call: what it was called with.
        traced: the recording; None for a single layer.
        shapes: of the recording's tensors.
        opaque: paths of submodules that the recording takes as single operations.
    """

    net: nn.Module
    call: Call
    traced: fx.GraphModule | None = None
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict)
    opaque: list[str] = field(default_factory=list)

    def layers(self, at: str) -> dict[str, Quantizable]:
        """Each quantizable layer by its path in the whole network."""
        if self.traced is None:
            return {at: Quantizable(type_name(self.net), at)}
        inside = quantizable(self.traced)
        return {join(at, name): Quantizable(layer.kind, join(at, layer.path)) for name, layer in inside.items()}

    def reads(self, at: str) -> list[str]:
        """What rules call the tensors that other operations read, by its path in the whole network."""
        return [] if self.traced is None else [join(at, name) for name in names(Graph(self.traced)).values()]


@dataclass
class Parts:
    """A network's parts, and what is in none of them.

    Attributes:
        found: path -> part, in order of execution.
        untraced: path of a module whose own code was not recorded -> why.
        left_out: path of a quantizable layer that stays float -> why.
    """

    found: dict[str, Part] = field(default_factory=dict)
    untraced: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def join(at: str, name: str) -> str:
    """A path within a path; either may be empty."""
    return f"{at}.{name}" if at and name else at or name


def split(net: nn.Module, calls: Mapping[str, Call], graph: str) -> Parts:
    """Decide what is recorded and what is not.

    Args:
        net: the float network.
        calls: of its modules, from `qat.record.record`.
        graph: key of `qat.scheme.GRAPHS`.

    Raises:
        UntraceableError: `graph` is `required` and the network cannot be recorded as a whole.
    """
    parts = Parts()
    _visit(net, "", calls, graph, parts, set())
    order = {path: i for i, path in enumerate(calls)}
    parts.found = dict(sorted(parts.found.items(), key=lambda item: order[item[0]]))
    covered = {path for at, part in parts.found.items() for path in part.layers(at)}
    known = {net.get_submodule(path) for path in covered if has(net, path)}
    for path, module in net.named_modules():
        if type(module) in SWAPS and module not in known:
            around = path.rpartition(".")[0]
            used = path in calls or (around in parts.untraced and _is_torchs(net.get_submodule(around)))
            called = "its forward is not what uses its weight" if used else "the example inputs do not run it"
            parts.left_out[path] = called
    return parts


def _visit(
    net: nn.Module, path: str, calls: Mapping[str, Call], graph: str, parts: Parts, seen: set[nn.Module]
) -> None:
    module = net.get_submodule(path)
    if module in seen:
        return
    seen.add(module)
    if type(module) in SWAPS and (path or isinstance(module, nn.RNNBase | nn.RNNCellBase)):
        if path in calls:
            parts.found[path] = Part(module, calls[path])
        return
    holds_layers = any(type(m) in SWAPS for m in module.modules())
    if path and not holds_layers and (_is_torchs(module) or not any(True for _ in module.parameters())):
        return
    own = is_lightning(module) and not any(type(child) in SWAPS for child in module.children())
    if path in calls and not own:  # of a LightningModule, its networks: it may call them elsewhere, too
        try:
            part = _recorded(module, calls[path], graph, root=not path)
        except ValueError as error:
            if graph == "required":
                raise
            if not path or holds_layers or any(p.dim() > 1 for p in module.parameters(recurse=False)):
                parts.untraced[path] = str(error)
        else:
            if path and not part.layers(path) and not part.opaque:
                return
            parts.found[path] = part
            for name in part.opaque:
                _visit(net, join(path, name), calls, graph, parts, seen)
            return
    for name, _ in module.named_children():
        _visit(net, join(path, name), calls, graph, parts, seen)


def _recorded(module: nn.Module, call: Call, graph: str, root: bool) -> Part:
    """The part that is a whole module.

    Raises:
        ValueError: it cannot be recorded, or not so that every call is right; says why.
    """
    if graph == "layers":
        raise ValueError("quant.graph=layers records nothing")
    torchs = _is_torchs(module)
    fixed = _fixed(module, call, every=graph == "required" or torchs, given=root or torchs)
    called_with_fixed = not root and bool(fixed.keys() & call.bound(module).keys())
    call = Call((), {k: v for k, v in call.bound(module).items() if k not in fixed}, call.from_outside, call.output)
    opaque: list[str] = []
    while True:
        try:
            traced = trace(module, opaque, fixed, PreparedPart if called_with_fixed else PreparedNetwork)
            shapes = normalize(traced, module, call, fixed)
            break
        except UntraceableError as error:
            if graph == "required" or not error.culprit or error.culprit in opaque:
                raise
            opaque.append(error.culprit)
    return Part(module, call, traced, shapes, opaque)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _fixed(module: nn.Module, call: Call, every: bool, given: bool) -> dict[str, Any]:
    """Parameters of `forward` that a recording has built in, with their values.

    Args:
        module: to be recorded.
        call: its call in the example.
        every: build in what is left out, whatever it may be.
        given: build in what is given and is no tensor.

    Raises:
        ValueError: a parameter may be a tensor in another call, and what happens then would not be recorded.
    """
    if not call.alike:
        raise ValueError(f"{type(module).__name__} is called in several ways")
    bound, fixed = call.bound(module), dict[str, Any]()
    for name, parameter in inspect.signature(module.forward).parameters.items():
        if name in bound:
            value = bound[name]
            if only_tensors(value):
                continue
            if not (given and isinstance(value, PLAIN)):
                raise ValueError(f"{type(module).__name__}.forward is given {name}={value!r:.60}, which is no tensor")
        else:
            value = parameter.default
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise ValueError(f"{type(module).__name__}.forward takes any arguments (*{name})")
            if not every and (value is None or not isinstance(value, PLAIN)):
                raise ValueError(
                    f"{type(module).__name__}.forward takes '{name}', which the example inputs leave out: what it "
                    f"changes would not be recorded. Give it in example_inputs, or set quant.graph=required to fix "
                    f"it at {value!r}"
                )
        fixed[name] = value
    return fixed
