"""The description of a network in a file, judged before anything is built from it.

A file may have been made by anyone. What it describes is checked here, and the memory that it asks for is counted
before it is allocated, so that an absurd file is refused and costs nothing.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
