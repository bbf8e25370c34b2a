"""What an exported ONNX file holds, as text: where it comes from, its weights, the kernels that run of it."""

import json
import math
from pathlib import Path
from typing import Any

from qat.analysis.preparation import count_text, table
from qat.analysis.summary import bytes_text, kernel_lines
from qat.export.onnx_model import require_onnx
from qat.export.onnxruntime import kernels
from qat.targets import TARGETS


def describe_onnx(path: str | Path) -> str:
    """Weights, metadata and kernels of an ONNX file.

    Args:
        path: of the file.

    Raises:
        ImportError: the packages of qat[export] are missing.
        FileNotFoundError: there is no such file.
        ValueError: it is none, or ONNX Runtime cannot load it; says why.
    """
    onnx = require_onnx()
    content = Path(path).read_bytes()
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's own type, which has moved between its versions
        if type(error).__name__ != "DecodeError":
            raise
        raise ValueError(f"'{path}' is no ONNX file, or is damaged: {error}") from error
    numbers = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    opset = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    info = {entry.key: entry.value for entry in model.metadata_props}
    target = _target(info)
    text = [
        f"{path}: ONNX, {bytes_text(len(content))} (numbers {bytes_text(numbers)}, graph and metadata "
        f"{bytes_text(len(content) - numbers)}), opset {', '.join(f'{k} {v}' for k, v in opset.items())}",
        *(f"{kind}: {', '.join(map(_value, values))}"
          for kind, values in (("inputs", model.graph.input), ("outputs", model.graph.output))),
        *(f"{key}: {value if len(value) < 400 else f'{value[:400]} ...'}" for key, value in sorted(info.items())),
        *kernel_lines({"kernels": {"onnx": kernels(path, target).to_dict()}}),
    ]  # fmt: skip
    rows = [
        [tensor.name, onnx.TensorProto.DataType.Name(tensor.data_type).lower(), "x".join(map(str, tensor.dims)),
         count_text(math.prod(tensor.dims)), f"{len(tensor.raw_data):,}"]
        for tensor in model.graph.initializer if len(tensor.dims) > 1
    ]  # fmt: skip
    header = ["weight", "type", "shape", "numbers", "bytes"]
    return "\n".join([*text, "", *table(header, rows, right=("numbers", "bytes"))]) + "\n"


def _target(info: dict[str, str]) -> str:
    """The target that the file was made for, as far as it says so."""
    try:
        target = json.loads(info.get("quant", "{}")).get("target")
    except (ValueError, AttributeError):
        target = None
    return target if target in TARGETS else "generic"


def _value(value: Any) -> str:
    shape = ", ".join(dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim)
    return f"{value.name} [{shape}]"
