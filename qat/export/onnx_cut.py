"""An ONNX file whose graph is cut at every integer activation, so that each layer can be given its inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qat.export.given import Levels, Made, contradicted
from qat.export.onnx_model import require_onnx, storage
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
    own = [value.name for value in model.graph.input]
    outputs, levels = [value.name for value in model.graph.output], contradicted(_said(model.graph, grids), grids)
    cut(model, grids, given)
    network = engine(model.SerializeToString())
    feeds = {name: x.numpy() for name, x in zip(own, inputs, strict=True)}
    for name, x in given.items():
        dtype, offset = storage(grids[name])
        feeds[f"{name}/given"] = (x.int() + offset).numpy().astype(dtype)
    made = network.run({name: feeds[name] for name in network.inputs})
    integers = {
        name: torch.from_numpy(made[name].astype(np.int32)) - storage(grids[name])[1] for name in given if name in made
    }
    return Made(integers, tuple(torch.from_numpy(made[name]) for name in outputs), levels)


def _said(graph: Any, grids: Mapping[str, Quantize]) -> Iterator[tuple[str, Levels]]:
    """What QuantizeLinear and DequantizeLinear say of each tensor, those that make one first."""
    numpy_helper = require_onnx().numpy_helper
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    named = {node.output[0]: node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    named |= {node.input[0]: node.output[0] for node in graph.node if node.op_type == "Clip"}
    for kind, side in (("QuantizeLinear", "output"), ("DequantizeLinear", "input")):
        for node in (node for node in graph.node if node.op_type == kind):
            name = getattr(node, side)[0]
            name = name if name in grids else named.get(name, name)
            if name not in grids or any(key not in numbers for key in node.input[1:]):
                continue
            scale, *zero = (numpy_helper.to_array(numbers[key]) for key in node.input[1:])
            if scale.size == 1:
                yield name, (float(scale), int(zero[0]) - storage(grids[name])[1] if zero else 0)


def cut(model: Any, grids: Mapping[str, Quantize], given: Mapping[str, Tensor]) -> None:
    """Make each tensor of `given` that the graph computes an output, and `NAME/given` an input that is read instead."""
    helper, graph = require_onnx().helper, model.graph
    made = {name for node in graph.node for name in node.output}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in given:
                node.input[i] = f"{name}/given"
    present = {output.name for output in graph.output}
    for name, x in given.items():
        if name not in made:
            continue
        kind = helper.np_dtype_to_tensor_dtype(storage(grids[name])[0])
        graph.input.append(helper.make_tensor_value_info(f"{name}/given", kind, list(x.shape)))
        if name not in present:
            graph.output.append(helper.make_tensor_value_info(name, kind, list(x.shape)))
