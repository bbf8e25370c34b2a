"""Running exported ONNX files with ONNX Runtime."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
        self.session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """float32 in, float32 out (the first output)."""
        feeds = {name: x.numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        return torch.from_numpy(self.session.run(self.outputs[:1], feeds)[0])

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name."""
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))


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
