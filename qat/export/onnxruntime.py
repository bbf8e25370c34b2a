"""Running exported ONNX files with ONNX Runtime."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.export.onnx_model import storage
from qat.runtime.grid import Quantize
from qat.targets import TARGETS


def _require_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("running ONNX needs the packages of qat[export]: pip install 'qat[export]'") from error
    return onnxruntime


class OnnxNetwork:
    """An ONNX file as a callable on float32 torch tensors, run as its target runs it.

    Args:
        model: path of the file, or its bytes.
        target: key of `TARGETS`; its session options are used.
        threads: threads inside an operation; 0 lets ONNX Runtime choose.
    """

    def __init__(self, model: Path | str | bytes, target: str = "generic", threads: int = 0) -> None:
        onnxruntime = _require_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        for key, value in TARGETS[target].onnxruntime_options.items():
            options.add_session_config_entry(key, value)
        source = model if isinstance(model, bytes) else str(model)
        try:
            self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class of its own for every fault
            if not isinstance(model, bytes) and not Path(model).is_file():
                raise FileNotFoundError(f"no ONNX file at '{model}'") from error
            name = "the model" if isinstance(model, bytes) else f"'{model}'"
            raise ValueError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {name}: it is damaged, or holds operations that "
                f"this version lacks ({error})"
            ) from error
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """float32 in, float32 out (the first output)."""
        feeds = {name: x.numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        return torch.from_numpy(self.session.run(self.outputs[:1], feeds)[0])

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name."""
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))


def onnx_integers_given(
    path: Path, target: str, grids: Mapping[str, Quantize], inputs: tuple[Tensor, ...], given: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What each layer of an ONNX file, read back from disk and run by ONNX Runtime, makes of `given` integers.

    The file's graph is cut at every integer activation: readers get a new input instead, and the tensor is an output.

    Args:
        path: the file.
        target: key of `TARGETS`.
        grids: of the tensors in `given`.
        inputs: of the network, batch dimension first.
        given: name of tensor -> its integers.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    kinds = {value.name: value for value in [*graph.value_info, *graph.output]}
    own = [value.name for value in graph.input]
    present = [name for name in given if name in kinds]
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name in given:
                node.input[i] = f"{name}/given"
    for name in present:
        value = onnx.ValueInfoProto()
        value.CopyFrom(kinds[name])
        value.name = f"{name}/given"
        graph.input.append(value)
        if name not in {output.name for output in graph.output}:
            graph.output.append(kinds[name])
    session = OnnxNetwork(model.SerializeToString(), target)
    feeds = {name: x.numpy() for name, x in zip(own, inputs, strict=True)}
    for name in present:
        dtype, offset = storage(grids[name])
        feeds[f"{name}/given"] = (given[name].int() + offset).numpy().astype(dtype)
    made = session.run({name: feeds[name] for name in session.inputs})
    return {name: torch.from_numpy(made[name].astype(np.int32)) - storage(grids[name])[1] for name in present}


def count_kernels(path: Path, target: str = "generic") -> dict[str, int]:
    """How often each operation stands in the graph that ONNX Runtime really runs, after its own fusions."""
    import tempfile

    import onnx

    onnxruntime = _require_onnxruntime()
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        for key, value in TARGETS[target].onnxruntime_options.items():
            options.add_session_config_entry(key, value)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return dict(Counter(node.op_type for node in graph.node).most_common())
