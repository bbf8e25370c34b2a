"""An ONNX file whose graph is cut at every integer activation, so that each layer can be given its inputs."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qat.export.given import Levels, Made, contradicted
from qat.export.onnx_model import require_onnx, storage, written_in_pairs
from qat.export.sums import verify
from qat.runtime.grid import Quantize


class Engine(Protocol):
    """What runs an ONNX model."""

    inputs: list[str]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name."""
        ...


def cut_given(
    engine: Callable[[bytes], Engine], path: Path, grids: Mapping[str, Quantize], inputs: Sequence[Tensor],
    given: Mapping[str, Tensor],
) -> Made:  # fmt: skip
    """What each layer of a file makes of `given` integers.

    Args:
        engine: loads the bytes of a model.
        path: the file, which is read back from disk.
        grids: of the tensors in `given`.
        inputs: of the network, batch dimension first.
        given: name of tensor -> its integers, which its readers get instead of what the file makes.
    """
    verify(path)
    model = require_onnx().load(path)
    pairs = written_in_pairs({prop.key: json.loads(prop.value) for prop in model.metadata_props})
    own = [value.name for value in model.graph.input]
    outputs = [value.name for value in model.graph.output]
    levels = contradicted(_said_in_pairs(model.graph) if pairs else _said(model.graph, grids), grids)
    cut(model, grids, given, pairs)
    network = engine(model.SerializeToString())
    feeds = {name: x.numpy() for name, x in zip(own, inputs, strict=True)}
    feeds |= {f"{name}/given": _stored(x, grids[name], pairs) for name, x in given.items()}
    made = network.run({name: feeds[name] for name in network.inputs})
    integers = {name: _integers(made[name], grids[name], pairs) for name in given if name in made}
    return Made(integers, tuple(torch.from_numpy(made[name]) for name in outputs), levels)


def _stored(x: Tensor, grid: Quantize, pairs: bool) -> np.ndarray:
    """Integers as a file has them at a cut: of its own type, or, in one of pairs, as real numbers."""
    if pairs:
        return grid.dequantize(x).numpy()
    dtype, offset = storage(grid)
    return (x.int() + offset).numpy().astype(dtype)


def _integers(made: np.ndarray, grid: Quantize, pairs: bool) -> Tensor:
    """Inverse of `_stored`."""
    if pairs:
        return (torch.from_numpy(made) / grid.scale).round().int() + grid.zero_point
    return torch.from_numpy(made.astype(np.int32)) - storage(grid)[1]


def _said(graph: Any, grids: Mapping[str, Quantize]) -> Iterator[tuple[str, Levels]]:
    """What QuantizeLinear and DequantizeLinear say of each tensor, those that make one first."""
    named = {node.output[0]: node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    named |= {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Clip"}
    for kind, side in (("QuantizeLinear", "output"), ("DequantizeLinear", "input")):
        for node, scale, zero_point in _scaled(graph, kind):
            name = getattr(node, side)[0]
            name = name if name in grids else named.get(name, name)
            if name in grids:
                yield name, (scale, 0 if zero_point is None else zero_point - storage(grids[name])[1])


def _said_in_pairs(graph: Any) -> Iterator[tuple[str, Levels]]:
    """The same where a tensor is the result of a pair."""
    behind = {node.input[0]: node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    for kind in ("QuantizeLinear", "DequantizeLinear"):
        for node, scale, zero_point in _scaled(graph, kind):
            yield behind.get(node.output[0], node.output[0]), (scale, zero_point or 0)


def _scaled(graph: Any, kind: str) -> Iterator[tuple[Any, float, int | None]]:
    """Nodes of a kind with one scale, and scale and zero point."""
    numpy_helper = require_onnx().numpy_helper
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == kind and all(key in numbers for key in node.input[1:]):
            scale, *zero = (numpy_helper.to_array(numbers[key]) for key in node.input[1:])
            if scale.size == 1:
                yield node, scale.item(), int(zero[0].item()) if zero else None


def cut(model: Any, grids: Mapping[str, Quantize], given: Mapping[str, Tensor], pairs: bool = False) -> None:
    """Make each tensor of `given` that the graph computes an output, and `NAME/given` an input that is read instead.

    In a file of `pairs`, these are real numbers.
    """
    onnx, graph = require_onnx(), model.graph
    made = {name for node in graph.node for name in node.output}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in given:
                node.input[i] = f"{name}/given"
    present = {output.name for output in graph.output}
    for name, x in given.items():
        if name not in made:
            continue
        stored = onnx.helper.np_dtype_to_tensor_dtype(storage(grids[name])[0])
        kind = onnx.TensorProto.FLOAT if pairs else stored
        graph.input.append(onnx.helper.make_tensor_value_info(f"{name}/given", kind, list(x.shape)))
        if name not in present:
            graph.output.append(onnx.helper.make_tensor_value_info(name, kind, list(x.shape)))
