"""Float network + QuantConfig -> prepared network: structure only, once, before the optimizer exists."""

import copy
import dataclasses
import logging
from typing import Any

import torch
from torch import nn

from qat.choices import Ask, Choice, choose
from qat.layers import QuantizedLayer
from qat.layers.tied import share_weight_quantizers
from qat.macs import count
from qat.modes import quantizers
from qat.place import place, swapped
from qat.record import Call, arguments, record
from qat.scheme import QuantConfig
from qat.split import Part, Parts, join, split
from qat.structures import map_tensors, tensors
from qat.subclass import is_lightning, prepared_class, with_graph
from qat.targets import Asked, check_layers, check_target, with_ties_of_target
from qat.tracing import has
from qat.turns import keep_in_turn, noting_order

log = logging.getLogger(__name__)


def prepare(net: nn.Module, config: QuantConfig, example_inputs: Any = None) -> nn.Module:
    """Put quantizers into a network. They pass values through until `calibrate` and `set_mode`.

    What torch.fx can record gets a quantizer on every tensor edge that a quantized operation reads. Where it cannot
    follow the code, layers are quantized at their own weights and inputs; the log and `qat.report` say where, and why.

    Args:
        net: any network, or a LightningModule. It is not changed; the result shares its parameters and buffers under
            the same names, so a float checkpoint loads into either and training one trains the other.
        config: what to quantize and how.
        example_inputs: an input, a tuple of positional arguments or a dict of keyword arguments, tensors with a batch
            dimension (or lists, dicts and dataclasses of them); the network is run on them. A LightningModule may have
            `example_input_array` instead.

    Returns:
        A `torch.fx.GraphModule` of the network if it can be recorded as a whole, else a network of its own class; of a
        LightningModule always one of a class derived from its own. It has `net`'s parameters plus quantizers:
        `LAYER.weight_quantizer` for weights, `quantizers.EDGE` (or `LAYER.input_quantizer`) for activations.
        `prepared.meta["qat"]` holds the configuration and the reasons (`qat.report` prints them).

    Raises:
        ValueError: the configuration does not fit the network or the target (a rule that matches nothing, a group
            size that does not divide), or `config.graph` is `required` and the network cannot be recorded.
    """
    config.validate()
    check_target(config)
    config = with_ties_of_target(config)
    if is_lightning(net):
        net.configure_model()  # type: ignore[operator]  # of some, makes the layers; Lightning asks that it may repeat
    args, kwargs = arguments(net, example_inputs)
    calls = record(net, args, kwargs)
    parts = split(net, calls, config.graph)
    if parts.untraced:
        path, reason = next(iter(parts.untraced.items()))
        log.warning(
            "%s is quantized in parts, as the code of %d of its modules cannot be recorded; layers that it calls are "
            "quantized at their own inputs. The first is %s: %s (qat.report lists all)",
            type(net).__name__, len(parts.untraced), f"'{path}'" if path else "its own", reason,
        )  # fmt: skip
    layers = {k: v for at, part in parts.found.items() for k, v in part.layers(at).items()}
    choices, reads = choose(layers, [name for at, part in parts.found.items() for name in part.reads(at)], config)
    if config.enabled:
        check_layers(
            config, {layers[k].path: Asked(layers[k].kind, v.weight, v.activation) for k, v in choices.items()}
        )
    build = _Build(net, config, parts, choices, reads)
    prepared = build.module("")
    build.tie(prepared)
    if config.enabled and not any(True for _ in quantizers(prepared)):
        reasons = [*parts.untraced.values(), *(f"{k}: {v}" for k, v in parts.left_out.items())]
        if reasons or not choices:
            why = "; ".join(dict.fromkeys(reasons)) or "it has no quantizable layer"
            raise ValueError(f"nothing in {type(net).__name__} can be quantized: {why}")
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    for _, quantizer in quantizers(prepared):
        quantizer.to(device)
    own = set(net.modules())
    for module in prepared.modules():
        if module not in own:  # what is shared with the float network keeps its mode
            module.training = net.training
    with noting_order(prepared) as order:
        macs = count(prepared, *map_tensors(torch.clone, (args, kwargs)))
    about = {
        "config": config,
        "network": type(net).__name__,
        "reasons": {k: ", ".join(filter(None, [v.reason, build.notes.get(k)])) for k, v in choices.items()},
        "inputs": _described(parts.found[""].call if "" in parts.found else calls[""], net),
        "untraced": parts.untraced,
        "left_out": parts.left_out,
        "order": order,
        "macs": macs,
    }
    vars(prepared).setdefault("meta", {})["qat"] = about
    if parts.untraced or len(parts.found) > 1:
        keep_in_turn(prepared)
    return prepared


def _described(call: Call, net: nn.Module) -> dict[str, Any]:
    """Parameter -> what the example gave it, tensors without their values."""
    described: dict[str, Any] = map_tensors(lambda t: torch.empty_like(t, device="meta"), call.bound(net))
    return described


@dataclasses.dataclass
class _Build:
    """Puts the parts together again."""

    net: nn.Module
    config: QuantConfig
    parts: Parts
    choices: dict[str, Choice]
    reads: dict[str, Ask]
    made: dict[nn.Module, nn.Module] = dataclasses.field(default_factory=dict)  # float module -> prepared one
    notes: dict[str, str] = dataclasses.field(default_factory=dict)  # path of a layer -> more about its scheme

    def module(self, path: str) -> nn.Module:
        """The prepared form of the module at `path`; the module itself where nothing in it is quantized."""
        net = self.net.get_submodule(path)
        if net not in self.made:
            part = self.parts.found.get(path)
            if part is None:
                self.made[net] = self.shell(net, path)
            else:
                self.made[net] = self.layer(part, path) if part.traced is None else self.recorded(part, path)
        return self.made[net]

    def layer(self, part: Part, path: str) -> nn.Module:
        """A single layer, with a quantizer for its input."""
        choice = self.choices[path]
        if not choice.weight.quantized:
            return part.net
        layer, ask = swapped(part.net, choice, path), choice.reads
        scheme = self.config.input if part.call.from_outside and choice.reason == "default" else ask.scheme
        layer.called_with = _described(part.call, part.net)
        inputs = [t for t in tensors(part.call.bound(part.net)) if t.is_floating_point()]
        inputs = inputs if isinstance(part.net, nn.Bilinear) else inputs[:1]  # not states, nor factors of a bag
        if scheme.quantized and inputs:
            layer.quantize_input(scheme, inputs[0], path, len(inputs))
            layer.input_quantizer.reason = ask.reason
        return layer

    def recorded(self, part: Part, path: str) -> nn.Module:
        """A recorded network with quantizers on its edges."""
        traced, config = part.traced, self.config
        assert traced is not None
        if not part.call.from_outside:  # what it reads was made by the network
            config = dataclasses.replace(config, input=config.activation)
        inside = {name: self.choices[join(path, name)] for name in part.layers("")}
        traced.meta["qat"] = {
            "config": config,
            "reasons": {name: choice.reason for name, choice in inside.items()},
            "inputs": _described(part.call, part.net),
        }
        traced.meta["opaque"] = part.opaque
        reads = {name: self.reads[join(path, name)] for name in part.reads("")}
        notes = place(traced, config, inside, reads, part.shapes, f"{path}." if path else "")
        self.notes |= {join(path, name): note for name, note in notes.items()}
        for name in part.opaque:
            traced.set_submodule(name, self.module(join(path, name)))
        if is_lightning(part.net):
            shell = self.copied(part.net, {child: traced.get_submodule(n) for n, child in part.net.named_children()})
            return with_graph(shell, traced, prepare)
        return traced

    def tie(self, prepared: nn.Module) -> None:
        """Let layers in different parts that hold one weight share its quantizer."""
        if list(self.parts.found) != [""]:
            layers = ((k, m) for k, m in prepared.named_modules() if isinstance(m, QuantizedLayer))
            self.notes |= share_weight_quantizers(layers)

    def shell(self, net: nn.Module, path: str) -> nn.Module:
        """A module whose own code runs as it is, with prepared children."""
        children = {child: self.module(join(path, name)) for name, child in net.named_children()}
        if all(child is made for child, made in children.items()) and path:
            return net
        shell = self.copied(net, children)
        if is_lightning(shell):
            shell.__class__ = prepared_class(type(shell), prepare)
        return shell

    def copied(self, net: nn.Module, children: dict[nn.Module, nn.Module]) -> nn.Module:
        """A copy that shares parameters, buffers and what `children` does not replace."""
        memo: dict[int, Any] = {id(child): made for child, made in children.items()}
        memo |= {id(t): t for t in (*net.parameters(), *net.buffers())}  # those of children, too: lists may hold them
        for name, child in net.named_modules():
            if name and child not in children:  # an attribute may hold it, too
                head, _, rest = name.partition(".")
                made = children.get(net.get_submodule(head), child)
                memo.setdefault(id(child), made.get_submodule(rest) if rest and has(made, rest) else child)
        return copy.deepcopy(net, memo)
