"""One run of a network on example inputs: which modules it calls, with what, in which order."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qat.modes import eval_mode
from qat.structures import map_tensors, only_tensors, tensors


@dataclass
class Call:
    """The first call of a module.

    Attributes:
        args, kwargs: copies of what it was given.
        output: what it returned.
        from_outside: whether every tensor that it was given is an input of the network.
        alike: whether later calls gave it arguments of the same names.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    from_outside: bool
    output: Any = None
    alike: bool = field(default=True)

    def bound(self, module: nn.Module) -> dict[str, Any]:
        """Parameter of `forward` -> value, for those that were given."""
        return dict(inspect.signature(module.forward).bind(*self.args, **self.kwargs).arguments)


def arguments(net: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a network with: a tuple holds positional arguments, a dict keyword arguments.

    Raises:
        ValueError: nothing is given, and the network has no `example_input_array` (a LightningModule's).
    """
    if example_inputs is None:
        example_inputs = getattr(net, "example_input_array", None)
    if example_inputs is None:
        raise ValueError(
            f"qat.prepare needs example_inputs to run {type(net).__name__} once: a tensor, a tuple of positional "
            f"arguments or a dict of keyword arguments (a LightningModule may have `example_input_array` instead)"
        )
    if isinstance(example_inputs, dict):
        return (), example_inputs
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def run(net: nn.Module, inputs: Any) -> Any:
    """Call a network: a tuple holds positional arguments, a dict keyword arguments, all else is one argument."""
    args, kwargs = arguments(net, inputs)
    return net(*args, **kwargs)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Torch's attention modules compute as they are written; their fast path makes zeros of what is padding."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@torch.no_grad()
def record(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Call]:
    """Run `net` in eval mode and note the calls of its modules.

    Returns:
        Module path ("" for `net` itself) -> its first call, in order of execution. What was not called is missing.
    """
    outside = {id(t) for t in tensors((args, kwargs))}
    calls: dict[str, Call] = {}

    def before(path: str) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if path in calls:
                call = calls[path]
                call.alike &= len(call.args) == len(given) and call.kwargs.keys() == named.keys()
                return
            own = all(id(t) in outside for t in tensors((given, named)))
            args, kwargs = map_tensors(torch.clone, (tuple(given), dict(named)))
            calls[path] = Call(args, kwargs, own)

        return hook

    def after(path: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            if calls[path].output is None and only_tensors(output):
                calls[path].output = map_tensors(torch.clone, output)

        return hook

    handles = []
    for path, module in net.named_modules():
        handles += [
            module.register_forward_pre_hook(before(path), with_kwargs=True, prepend=True),
            module.register_forward_hook(after(path)),
        ]
    try:
        with eval_mode(net), without_fast_path():
            net(*args, **kwargs)
    except NotImplementedError as error:
        raise ValueError(
            f"{type(net).__name__} has no forward to run on the example inputs; prepare its networks one by one "
            f"(module.net = qat.prepare(module.net, config, example_inputs))"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return calls
