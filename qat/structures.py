"""Tensors within lists, tuples, dicts and dataclasses: what networks take and return."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value, in order; other values are passed over."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same structure with every tensor replaced by what `function` makes of it.

    >>> import torch
    >>> map_tensors(lambda t: t.shape[0], {"a": torch.zeros(3), "b": [torch.zeros(1), "text"]})
    {'a': 3, 'b': [1, 'text']}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        made: Any = type(value)
        return made._make(map_tensors(function, item) for item in value)  # of a PackedSequence, without its checks
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: map_tensors(function, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def only_tensors(value: Any) -> bool:
    """Whether a value is a tensor, or a structure of nothing else."""
    if isinstance(value, Mapping):
        return all(only_tensors(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(only_tensors(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(only_tensors(getattr(value, field.name)) for field in dataclasses.fields(value))
    return isinstance(value, Tensor)
