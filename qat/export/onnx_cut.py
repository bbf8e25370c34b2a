"""An ONNX file whose graph is cut at every integer activation, so that each layer can be given its inputs."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from qat.export.onnx_model import require_onnx, storage
from qat.export.sums import verify
from qat.runtime.grid import Quantize


class Engine(Protocol):
    """What runs an ONNX model."""

    inputs: list[str]

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name."""
        ...


def integers_given(
    engine: Callable[[bytes], Engine], path: Path, grids: Mapping[str, Quantize], inputs: Sequence[Tensor],
    given: Mapping[str, Tensor],
) -> dict[str, Tensor]:  # fmt: skip
    """What each layer of a file makes of `given` integers, by name of tensor.

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
    cut(model, grids, given)
    network = engine(model.SerializeToString())
    feeds = {name: x.numpy() for name, x in zip(own, inputs, strict=True)}
    for name, x in given.items():
        dtype, offset = storage(grids[name])
        feeds[f"{name}/given"] = (x.int() + offset).numpy().astype(dtype)
    made = network.run({name: feeds[name] for name in network.inputs})
    return {
        name: torch.from_numpy(made[name].astype(np.int32)) - storage(grids[name])[1] for name in given if name in made
    }


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
