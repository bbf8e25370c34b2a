"""A recorded network, which quantizers are put into: copies and pickles keep all of it."""

import copy
import functools
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from qat.layers import Functional

HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)
"""Attributes in which a module keeps what its user has registered; copies of a GraphModule lose most of them."""


class RecordedSequential(nn.Sequential):
    """Layers of a recording: listed and indexed, as they were; but what stands between them is the recording's."""

    def forward(self, *args: Any) -> Any:  # noqa: D102
        raise NotImplementedError(
            "this nn.Sequential was recorded with the network that calls it, and quantizers stand between its layers: "
            "call that network, or prepare this part on its own"
        )


class PreparedNetwork(fx.GraphModule):
    """A GraphModule whose copies keep what a GraphModule's lose: modules that `forward` does not call, hooks, data.

    Of an `nn.Sequential`, its layers are indexed as they were: `prepared[0]`, `prepared[:-1]`.
    """

    def __getitem__(self, index: int | slice) -> nn.Module:
        layers = [layer for name, layer in self._modules.items() if name.isdigit() and layer is not None]
        if not layers:
            raise TypeError("a prepared network has indices only where it was an nn.Sequential")
        return RecordedSequential(*layers[index]) if isinstance(index, slice) else layers[index]

    def adopt(self, attributes: dict[str, Any]) -> None:
        """Take over public data that other code may read (`block.out_channels`)."""
        data = {k: v for k, v in attributes.items() if not k.startswith("_") and not callable(v)}
        vars(self).update({k: v for k, v in data.items() if not hasattr(self, k)})

    def __reduce__(self) -> Any:
        attributes = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in ("training", "graph")}
        attributes |= {name: vars(self)[name] for name in HOOKS}
        kind = PreparedPart if isinstance(self, PreparedPart) else PreparedNetwork  # each has a class of its own
        return _unpickle, (kind, super().__reduce__(), attributes, self._modules)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PreparedNetwork":
        result: Any = super().__deepcopy__(memo)
        result._modules = copy.deepcopy(self._modules, memo)
        vars(result).update({name: copy.deepcopy(vars(self)[name], memo) for name in HOOKS})
        bind_functional(result)
        result.adopt(copy.deepcopy({k: v for k, v in vars(self).items() if not k.startswith("_")}, memo))
        return result


class PreparedPart(PreparedNetwork):
    """A recording that is called with arguments that it has built in, too: `attention(x, x, x, need_weights=False)`.

    `meta["parameters"]` names the parameters of the module that was recorded, `meta["fixed"]` holds what is built in.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take a call as the module did.

        Raises:
            ValueError: an argument differs from what is built in.
        """
        named = dict(zip(self.meta["parameters"], args, strict=False)) | kwargs
        return super().__call__(**without_fixed(named, self.meta["fixed"]))


def without_fixed(named: dict[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call but for those that are built in.

    Raises:
        ValueError: one of these differs from what is built in.
    """
    for name, value in fixed.items():
        if name in named and named[name] is not value and named[name] != value:
            raise ValueError(f"{name}={named[name]!r:.60}: the recording has {name}={value!r} built in")
    return {name: value for name, value in named.items() if name not in fixed}


def _unpickle(
    kind: type[PreparedNetwork],
    reduced: tuple[Any, ...],
    attributes: dict[str, Any],
    modules: dict[str, nn.Module | None],
) -> PreparedNetwork:
    module = reduced[0](*reduced[1])
    prepared = kind(module, module.graph)
    prepared.meta.update(attributes.pop("meta"))
    prepared._modules = modules
    vars(prepared).update({name: attributes.pop(name) for name in HOOKS})
    bind_functional(prepared)
    prepared.adopt(attributes)
    return prepared


def bind_functional(net: fx.GraphModule) -> None:
    """Let every Functional look up the weight and the bias that the network gives it."""
    for node in net.graph.nodes:
        module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Functional):
            module.bind(functools.partial(_weight_and_bias, net, node))


def _weight_and_bias(net: fx.GraphModule, node: fx.Node) -> Any:
    return tuple(fixed_value(net, arg) if isinstance(arg, fx.Node) else None for arg in node.args[-2:])


def is_fixed(node: fx.Node) -> bool:
    """Whether a node is a tensor that the network holds, or computed of nothing but such."""
    if node.op in ("call_function", "call_method"):
        in_place = isinstance(node.target, str) and node.target.endswith("_")
        return not in_place and bool(node.all_input_nodes) and all(is_fixed(n) for n in node.all_input_nodes)
    return node.op == "get_attr"


def fixed_value(net: fx.GraphModule, node: fx.Node) -> Any:
    """The tensor that such a node is now."""
    if node.op == "get_attr":
        value: Any = net
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: fixed_value(net, n))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)
