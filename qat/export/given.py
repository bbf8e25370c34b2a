"""What a network makes of given integers: each layer is asked apart, so that an error shows where it is made."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from qat.runtime.grid import Quantize
from qat.runtime.layers import IntegerConv
from qat.runtime.network import IntegerNetwork
from qat.runtime.operations import Dequantize

Inputs = tuple[Tensor, ...]
Integers = dict[str, Tensor]
"""Name of a tensor -> its integers, as the runtime's grids number them."""

Levels = tuple[float, int]
"""What a grid's integers stand for: scale and zero point."""


class Made(NamedTuple):
    """What a network makes of given integers.

    Attributes:
        integers: name of a tensor -> what its layer makes of the integers that it is given.
        outputs: what the network returns, made of the integers that its last layers are given; in order.
        levels: name of a tensor -> scale and zero point, where a file says them; of those that contradict each other,
            the one that is not as it should be.
    """

    integers: Integers
    outputs: tuple[Tensor, ...]
    levels: dict[str, Levels]


Given = Callable[[Path, str, Mapping[str, Quantize], Inputs, Integers], Made]
"""(path, key of TARGETS, grids, inputs, integers) -> what the file makes of them."""


def network_given(network: IntegerNetwork, grids: Mapping[str, Quantize], inputs: Inputs, given: Integers) -> Made:
    """What `network`, layer by layer, makes of `given` integers. `grids` are those that its tensors should have."""
    made: Integers = {}

    def watch(name: str, tensor: Tensor) -> Tensor:
        if name in given:
            made[name] = tensor
        return given.get(name, tensor)

    tensors = network.run(*inputs, watch=watch)
    return Made(made, tuple(tensors[name] for name in network.outputs), network_levels(network, grids))


def integers_given(network: IntegerNetwork, inputs: Inputs, given: Integers) -> Integers:
    """The same, integers alone."""
    return network_given(network, {}, inputs, given).integers


def network_levels(network: IntegerNetwork, grids: Mapping[str, Quantize]) -> dict[str, Levels]:
    """Scale and zero point of tensors of `network`, as the layers that make and read them have them."""
    own = network.grids()
    said: list[tuple[str, Levels]] = [(name, levels_of(own[name])) for name in grids if name in own]
    for node in network.nodes:
        layer = network.layer(node.name)
        if isinstance(layer, IntegerConv) and len(node.inputs) == 1:
            said.append((node.inputs[0], (float(layer.input_scale), int(layer.input_zero_point))))
        elif isinstance(layer, Dequantize):
            said.append((node.inputs[0], levels_of(layer.grid)))
    return contradicted(said, grids)


def contradicted(said: Iterable[tuple[str, Levels]], grids: Mapping[str, Quantize]) -> dict[str, Levels]:
    """Of what several places say of a tensor of `grids`, the first; or the first that is not what its grid says."""
    found: dict[str, Levels] = {}
    for name, levels in said:
        if name in grids and (name not in found or found[name] == levels_of(grids[name])):
            found[name] = levels
    return found


def levels_of(grid: Quantize) -> Levels:
    """A grid's scale and zero point."""
    return float(grid.scale), int(grid.zero_point)


def tensors_of(result: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor that a network returns, in order, by where it stands.

    >>> list(tensors_of({"logits": Tensor(), "aux": [Tensor(), None]})), list(tensors_of(Tensor()))
    (['logits', 'aux.0'], ['output'])
    """
    if isinstance(result, PackedSequence):
        result = result.data
    if isinstance(result, Tensor):
        return {name or "output": result}
    if isinstance(result, Mapping):
        parts = list(result.items())
    elif is_dataclass(result):
        parts = [(field.name, getattr(result, field.name)) for field in fields(result)]
    else:
        parts = list(enumerate(result)) if isinstance(result, list | tuple) else []
    found: dict[str, Tensor] = {}
    for key, part in parts:
        found |= tensors_of(part, f"{name}.{key}" if name else str(key))
    return found
