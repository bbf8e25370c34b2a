"""Running exported ONNX files with ONNX Runtime, and what it makes of them."""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.export.given import Integers, Made
from qat.export.onnx_cut import cut_given
from qat.export.onnx_model import require_onnx
from qat.export.sums import verify
from qat.runtime.grid import Quantize
from qat.targets import TARGETS

INTEGER_KERNELS = {"QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "QAttention", "NhwcMaxPool"}
"""Kernels of integers whose name does not begin with QLinear."""

MOVES = {
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Pad", "Concat", "Gather", "Expand",
    "Identity", "Tile", "MaxPool", "ReorderInput", "ReorderOutput", "Shape", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
"""Operations that move or select numbers and compute none."""


@dataclass(frozen=True)
class Kernels:
    """What an engine runs of a file.

    Attributes:
        engine: its name and version.
        counts: kernel -> how often it stands in the optimised graph, the most frequent first.
        floating: what is computed with real numbers: name of the layer and kernel.
    """

    engine: str
    counts: dict[str, int]
    floating: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def _require_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("running ONNX needs the packages of qat[export]: pip install 'qat[export]'") from error
    return onnxruntime


def _options(onnxruntime: Any, target: str, threads: int = 0) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    described = TARGETS[target]
    if not (described.exact_with_vnni and torch.cpu._is_vnni_supported()):
        for key, value in described.onnxruntime_options.items():
            options.add_session_config_entry(key, value)
    return options


def _wrong_for(target: str) -> set[str]:
    """ONNX Runtime's optimizers that get a target's files wrong: these take a float8 zero point for an integer."""
    return {"ClipQuantRewrite", "ReluQuantRewrite"} if TARGETS[target].pairs else set()


def _session(onnxruntime: Any, model: str | bytes, options: Any, target: str) -> Any:
    if isinstance(model, str):
        verify(model)
    try:
        return onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=_wrong_for(target)
        )
    except Exception as error:  # ONNX Runtime has a class of its own for every fault
        if not isinstance(model, bytes) and not Path(model).is_file():
            raise FileNotFoundError(f"no ONNX file at '{model}'") from error
        name = "the model" if isinstance(model, bytes) else f"'{model}'"
        raise ValueError(
            f"ONNX Runtime {onnxruntime.__version__} cannot open {name}: it is damaged, or holds operations that "
            f"this version lacks ({error})"
        ) from error


class OnnxNetwork:
    """An ONNX file as a callable on float32 torch tensors, run as its target runs it.

    Args:
        model: path of the file, or its bytes.
        target: key of `TARGETS`; its session options are used.
        threads: threads inside an operation; 0 lets ONNX Runtime choose.

    Raises:
        ImportError: the package is missing.
        ValueError: the file is none, is damaged, or has operations that ONNX Runtime lacks; says which.
    """

    def __init__(self, model: Path | str | bytes, target: str = "generic", threads: int = 0) -> None:
        onnxruntime = _require_onnxruntime()
        options = _options(onnxruntime, target, threads)
        self.session = _session(onnxruntime, model if isinstance(model, bytes) else str(model), options, target)
        self.inputs = [value.name for value in self.session.get_inputs()]
        self.outputs = [value.name for value in self.session.get_outputs()]

    def __call__(self, *inputs: Tensor) -> Any:
        """float32 in, float32 out; a tuple where there are several outputs."""
        feeds = {name: x.numpy() for name, x in zip(self.inputs, inputs, strict=True)}
        made = tuple(map(torch.from_numpy, self.session.run(self.outputs, feeds)))
        return made[0] if len(made) == 1 else made

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name."""
        return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))


def onnx_given(
    path: Path, target: str, grids: Mapping[str, Quantize], inputs: tuple[Tensor, ...], given: Integers
) -> Made:
    """What each layer of an ONNX file, run by ONNX Runtime, makes of `given` integers (see `onnx_cut`)."""
    return cut_given(lambda model: OnnxNetwork(model, target), path, grids, inputs, given)


def kernels(path: Path | str, target: str = "generic") -> Kernels:
    """What ONNX Runtime really runs of a file, after its own fusions, on this machine.

    Args:
        path: the file.
        target: key of `TARGETS`; its session options are used.

    Raises:
        ImportError: a package is missing.
        ValueError: the file is none, is damaged, or has operations that ONNX Runtime lacks; says which.
    """
    onnxruntime, onnx = _require_onnxruntime(), require_onnx()
    with tempfile.TemporaryDirectory() as folder:
        options = _options(onnxruntime, target)
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        _session(onnxruntime, str(path), options, target)
        graph = onnx.load(options.optimized_model_filepath).graph
    counts = Counter(node.op_type for node in graph.node)
    engine = f"ONNX Runtime {onnxruntime.__version__}"
    if TARGETS[target].pairs:
        engine += f" (in the place of {target}, which fuses the pairs; here they are run as written)"
    return Kernels(engine, dict(counts.most_common()), _floating(graph, onnx.TensorProto))


def _floating(graph: Any, types: Any) -> list[str]:
    """What computes with real numbers: which tensors are such is followed from the inputs on."""
    real = {v.name for v in graph.input if v.type.tensor_type.elem_type in (types.FLOAT, types.FLOAT16)}
    real |= {t.name for t in graph.initializer if t.data_type in (types.FLOAT, types.FLOAT16)}
    computed = []
    for node in graph.node:
        kind, reads_real = node.op_type, any(name in real for name in node.input[:1])
        integer = kind.startswith("QLinear") or kind in INTEGER_KERNELS
        if kind == "DequantizeLinear" or (kind == "QGemm" and len(node.input) < 8):
            real |= set(node.output)
        elif kind == "Cast":
            to = next(a.i for a in node.attribute if a.name == "to")
            real |= set(node.output) if to in (types.FLOAT, types.FLOAT16) else set()
        elif reads_real and not integer and kind != "QuantizeLinear":
            real |= set(node.output)
            if kind not in MOVES:
                computed.append(f"{_layer_name(node)} ({kind})")
    return computed


def _layer_name(node: Any) -> str:
    """The layer that a node of the optimised graph belongs to: ONNX Runtime appends to its name."""
    return (
        re.sub(r"(_token_\d+|_nchwc)+$", "", node.name or node.output[0]).removesuffix(".rows").removesuffix(".float")
    )
