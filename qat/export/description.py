"""The description of a network in a file, judged before anything is built from it.

A file may have been made by anyone. What it describes is checked here, and the memory that it asks for is counted
before it is allocated, so that an absurd file is refused and costs nothing. What its settings make of inputs (padding,
repeating, interpolating) is known only with these: so is the first call (`try_out`).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from qat.runtime.functions import FUNCTIONS, MOVES
from qat.runtime.network import LAYERS, IntegerNetwork
from qat.runtime.recurrent import PARTS

DEEPEST = 24
"""How deep settings may lie in one another; a recurrent layer's grids are 7 deep."""

LARGEST = 2**31
AT_LEAST = {
    **dict.fromkeys(("stride", "dilation", "groups", "kernel", "group_size", "weight_step", "bits", "layers"), 1),
    **dict.fromkeys(("padding", "output_padding", "weight_shape", "codes", "levels", "prototypes", "channels"), 0),
}
"""Settings that are sizes -> the smallest that makes sense."""

_BUILDERS = {torch.zeros, torch.ones, torch.empty, torch.full, torch.rand, torch.randn}


class Memory(TorchFunctionMode):
    """Inside, tensors are made up to `limit` bytes in all; one that goes beyond is refused before it is allocated."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.used = limit, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _BUILDERS:
            self._count(_shape(args, kwargs), kwargs.get("dtype") or torch.float32)
        elif func is torch.arange:
            self._count([max(abs(a) for a in args if isinstance(a, int | float))], torch.int64)
        return func(*args, **kwargs)

    def _count(self, shape: Sequence[Any], dtype: Any) -> None:
        if any(size < 0 for size in shape):
            raise ValueError(f"a tensor of the shape {list(shape)}: sizes are 0 or more")
        self.used += math.prod(shape) * (dtype.itemsize if isinstance(dtype, torch.dtype) else 1)
        if self.used > self.limit:
            raise ValueError(f"a tensor of the shape {list(shape)} is larger than anything in a file of this size")


SMALL = 2**24
"""An operation that makes no more numbers than this is counted when it is done, which costs nothing."""


class Growth(TorchFunctionMode):
    """Inside, results may take up to `limit` bytes in all; one that goes beyond is refused before it is allocated."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.used = limit, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        small = _most((args, kwargs.values())) <= SMALL
        for result in () if small else self._shapes(func, args, kwargs):
            self._count(result)
        made = func(*args, **kwargs)
        if small and isinstance(made, Tensor):
            self._count(made)
        return made

    def _count(self, result: Tensor) -> None:
        self.used += result.nbytes
        if self.used > self.limit:
            raise ValueError(f"makes a tensor of the shape {list(result.shape)}")

    @staticmethod
    def _shapes(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
        """Tensors without memory that are what a call would return; none where that depends on numbers."""
        shapes = tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
        try:
            made = func(*shapes[0], **shapes[1])
        except Exception:  # what it is, the call itself will say
            return []
        return [x for x in tree_leaves(made) if isinstance(x, Tensor)]


@torch.no_grad()
def try_out(network: IntegerNetwork, inputs: tuple[Tensor, ...]) -> None:
    """Run a network, whose file anyone may have made, on the inputs of its first call.

    Raises:
        ValueError: a node makes more of the inputs than a network of this size does; says which.
    """
    given = sum(x.nbytes for x in (*inputs, *network.state_dict().values()) if isinstance(x, Tensor))
    limit = 2**30 + 1024 * given
    done = list[str]()

    def watch(name: str, tensor: Tensor) -> Tensor:
        done.append(name)
        return tensor

    growth = Growth(limit)
    try:
        with growth:
            network.run(*inputs, watch=watch)
    except ValueError as error:
        if growth.used <= limit:
            raise
        raise ValueError(
            f"node '{network.nodes[len(done)].name}' {error}: with what was made before it more than {limit} bytes, of "
            f"inputs and weights of {given}; its settings are absurd"
        ) from error


def _most(values: Iterable[Any]) -> float:
    """About the most numbers that an operation makes of these: every tensor's with every other's, times every size."""
    most = 1.0
    for value in values:
        if isinstance(value, Tensor):
            most *= max(value.numel(), 1)
        elif isinstance(value, int | float):
            most *= max(abs(value), 1) ** 3  # one factor for up to three dimensions
        elif isinstance(value, Iterable) and not isinstance(value, str):
            most *= _most(value)
    return most


def _shape(args: Any, kwargs: Any) -> Sequence[Any]:
    shape = kwargs.get("size", args[0] if args else ())
    return shape if isinstance(shape, list | tuple) else [a for a in args if isinstance(a, int)]


def build(spec: Any, limit: int) -> IntegerNetwork:
    """The network that `spec` (`IntegerNetwork.spec`) describes, with the numbers of an empty one.

    Args:
        spec: plain data from a file.
        limit: bytes that its tensors may take in all.

    Raises:
        ValueError: says which node and which setting.
    """
    check(spec)
    try:
        with Memory(limit):
            return IntegerNetwork.from_spec(spec)
    except (TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise ValueError(f"no network can be built from its settings ({type(error).__name__}: {error})") from error


def check(spec: Any) -> None:
    """Refuse what is no description of a network.

    Raises:
        ValueError: says which node and which setting.
    """
    _need(isinstance(spec, dict), "the network", spec, "a table")
    for key in ("inputs", "outputs", "nodes"):
        _need(isinstance(spec.get(key), list), key, spec.get(key), "a list")
    _need(isinstance(spec.get("info"), dict), "info", spec.get("info"), "a table")
    known = {name for name in spec["inputs"] if isinstance(name, str)}
    _need(len(known) == len(spec["inputs"]), "inputs", spec["inputs"], "different names")
    for node in spec["nodes"]:
        _need(isinstance(node, dict) and isinstance(node.get("name"), str), "a node", node, "a table with a name")
        where = f"node '{node['name']}'"
        _need(node["name"] not in known, where, node["name"], "a name of its own")
        layer = node.get("layer")
        _need(isinstance(layer, str) and layer in LAYERS, f"{where}: layer", layer, f"one of {', '.join(LAYERS)}")
        reads = node.get("inputs")
        _need(isinstance(reads, list) and all(isinstance(name, str) and name in known for name in reads),
              f"{where}: inputs", reads, "names of what comes before it")  # fmt: skip
        _need(isinstance(node.get("settings"), dict), f"{where}: settings", node.get("settings"), "a table")
        _check_settings(node["settings"], where)
        for kind, names in (("function", FUNCTIONS), ("move", MOVES)):
            if layer == kind:
                name = node["settings"].get("name")
                _need(isinstance(name, str) and name in names, f"{where}: name", name, f"one of {', '.join(names)}")
        known.add(node["name"])
    missing = [name for name in spec["outputs"] if not isinstance(name, str) or name not in known]
    _need(not missing and spec["outputs"], "outputs", missing, "names of nodes or inputs")


def _check_settings(settings: dict[str, Any], where: str) -> None:
    for path, value in _leaves(settings, where, 0):
        keys = [key for key in path if isinstance(key, str)]
        if keys[-1] == "layer" and len(path) > 1:  # a part of a recurrent layer
            _need(value in PARTS, f"{where}: {_dotted(path)}", value, f"one of {', '.join(PARTS)}")
        least = AT_LEAST.get(keys[-1])
        if least is not None and isinstance(value, int):
            _need(least <= value <= LARGEST, f"{where}: {_dotted(path)}", value, f"{least} to {LARGEST}")
        elif isinstance(value, int):
            _need(abs(value) <= 2**63, f"{where}: {_dotted(path)}", value, "an integer of 64 bits")


def _leaves(value: Any, where: str, depth: int, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, Any]]:
    if depth > DEEPEST:
        raise ValueError(f"{where}: settings lie deeper than {DEEPEST} in one another")
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, where, depth + 1, (*path, key))
    else:
        yield path, value


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _need(fits: Any, what: str, value: Any, valid: str) -> None:
    if not fits:
        shown = repr(value)
        raise ValueError(f"{what} is {shown if len(shown) <= 80 else shown[:77] + '...'}, not {valid}")
