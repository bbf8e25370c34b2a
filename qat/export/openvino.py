"""Running exported ONNX files with OpenVINO, and OpenVINO's own files (IR) made of them.

What makes it compute what training simulated:

- Real numbers in float32: by default it takes bfloat16 for them where the processor has it.
- What it would compute with integers in another way than the file says stands behind a Max (`onnx_model.Model.held`).
- A dynamic batch, as in the files. OpenVINO runs a convolution and the addition behind it as one kernel that does not
  round in between; the Expand that keeps it from that (`onnx.py`) is taken out where the batch is a number.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.export.files import replaced_folder
from qat.export.given import Integers, Levels, Made, contradicted
from qat.export.onnx import save_onnx
from qat.export.onnx_model import storage
from qat.export.onnxruntime import Kernels
from qat.export.sums import verify
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork

OWN_ROUNDING = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
"""The option by which OpenVINO rounds real numbers in front of 8-bit weights to 8 bits of its own; 0 for none."""
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", OWN_ROUNDING: "0"}

COMPUTES = {
    "Convolution",
    "Deconvolution",
    "FullyConnected",
    "MatMul",
    "Eltwise",
    "Pooling",
    "Reduce",
    "Softmax",
    "MVN",
}
"""Layer types of its runtime that compute numbers; others move or convert them."""


def _require_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ImportError("running OpenVINO needs its package: pip install 'qat[openvino]'") from error
    return openvino


def _read(openvino: Any, path: Path | str) -> Any:
    file = Path(path) / "model.xml" if Path(path).is_dir() else Path(path)
    verify(file.parent if file.suffix == ".xml" else file)  # IR's numbers are in model.bin
    try:
        return openvino.Core().read_model(str(file))
    except RuntimeError as error:
        raise ValueError(f"OpenVINO {openvino.__version__} cannot open '{file}': {error}") from error


class OpenVinoNetwork:
    """An ONNX file, or OpenVINO's own (a folder with model.xml), as a callable on torch tensors.

    Args:
        model: path of the file or folder, or an `openvino.Model`.
        threads: threads inside an operation; 0 lets OpenVINO choose.

    Raises:
        ImportError: the package is missing.
        ValueError: the file is none, or has operations that OpenVINO lacks; says which.
    """

    def __init__(self, model: Any, threads: int = 0) -> None:
        openvino = _require_openvino()
        read = _read(openvino, model) if isinstance(model, Path | str) else model
        try:
            self.compiled = openvino.Core().compile_model(read, "CPU", {**OPTIONS, "INFERENCE_NUM_THREADS": threads})
        except RuntimeError as error:
            raise ValueError(f"OpenVINO {openvino.__version__} cannot run the model: {error}") from error
        self.inputs = [value.get_any_name() for value in self.compiled.inputs]

    def __call__(self, *inputs: Tensor) -> Any:
        """float32 in, float32 out; a tuple where there are several outputs."""
        if len(inputs) != len(self.inputs):
            raise ValueError(
                f"the network takes {len(self.inputs)} inputs ({', '.join(self.inputs)}), not {len(inputs)}"
            )
        results = self.compiled([x.numpy() for x in inputs])
        made = tuple(torch.from_numpy(results[i].copy()) for i in range(len(self.compiled.outputs)))
        return made[0] if len(made) == 1 else made


def openvino_kernels(path: Path | str) -> Kernels:
    """What OpenVINO runs of a file on this machine, by type and precision."""
    openvino = _require_openvino()
    counts: Counter[str] = Counter()
    computed = []
    for node in OpenVinoNetwork(path).compiled.get_runtime_model().get_ordered_ops():
        info = {key: node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")}
        kind, precision = info["layerType"], info["runtimePrecision"]
        if kind not in ("Const", "Input", "Output"):
            counts[f"{kind} ({precision})"] += 1
        if kind in COMPUTES and precision.startswith(("f", "bf")):
            computed.append(f"{node.get_friendly_name().removesuffix('.float')} ({kind})")
    return Kernels(f"OpenVINO {openvino.__version__.split('-')[0]}", dict(counts.most_common()), computed)


def openvino_given(
    path: Path, target: str, grids: Mapping[str, Quantize], inputs: tuple[Tensor, ...], given: Integers
) -> Made:
    """What each layer of a file, read back from disk and run by OpenVINO, makes of `given` integers.

    The graph is cut at every integer activation: its readers get a new input, and the tensor is an output.
    """
    openvino = _require_openvino()
    model = _read(openvino, path)
    made = {
        name: output for op in model.get_ops() for output in op.outputs() for name in output.get_names() & set(given)
    }
    levels = contradicted(((name, said) for name, y in made.items() for said in _said(y, grids[name])), grids)
    feeds = {value.get_any_name(): x.numpy() for value, x in zip(model.inputs, inputs, strict=True)}
    outputs = len(model.outputs)
    for name, output in made.items():
        parameter = openvino.opset15.parameter(output.get_partial_shape(), output.get_element_type(), f"{name}/given")
        parameter.output(0).set_names({f"{name}/given"})
        readers = [reader for reader in output.get_target_inputs() if reader.get_node().get_type_name() != "Result"]
        for reader in readers:
            reader.replace_source_output(parameter.output(0))
        model.add_parameters([parameter])
        dtype, offset = storage(grids[name])
        feeds[f"{name}/given"] = (given[name].int() + offset).numpy().astype(dtype)
    if made:
        model.add_outputs(list(made.values()))
    results = [result.copy() for result in OpenVinoNetwork(model).compiled(feeds).values()]
    integers = {
        name: torch.from_numpy(result.astype(np.int32)) - storage(grids[name])[1]
        for name, result in zip(made, results[outputs:], strict=True)
    }
    return Made(integers, tuple(map(torch.from_numpy, results[:outputs])), levels)


def _said(tensor: Any, grid: Quantize) -> Iterator[Levels]:
    """What the operations that make and read an integer tensor say its integers stand for."""
    offset = storage(grid)[1]
    maker = tensor.get_node().input_value(0).get_node() if tensor.get_node().get_input_size() else tensor.get_node()
    if maker.get_type_name() == "FakeQuantize":  # holds the ends of the range: the scale is theirs but for a rounding
        ends = [n for i in range(1, 5) if (n := _number(maker.input_value(i).get_node())) is not None]
        if len(ends) == 4:
            low, high, least, most = ends
            scale = (high - low) / (most - least)
            same = abs(scale - float(grid.scale)) <= 1e-6 * scale
            yield float(grid.scale) if same else scale, round(least - low / scale) - offset
    for reader in tensor.get_target_inputs():
        convert = reader.get_node()
        if convert.get_type_name() != "Convert":
            continue
        for behind in convert.output(0).get_target_inputs():
            zero, scaling = None, behind.get_node()
            if scaling.get_type_name() == "Subtract":
                zero = _number(scaling.input_value(1).get_node())
                readers = scaling.output(0).get_target_inputs()
                scaling = next(iter(readers)).get_node() if len(readers) == 1 else None
            number = _number(scaling.input_value(1).get_node()) if _is_product(scaling) else None
            if number is not None:
                yield number, int(zero or 0) - offset


def _is_product(node: Any) -> bool:
    return node is not None and node.get_type_name() == "Multiply"


def _number(node: Any) -> float | None:
    """The number that a constant holds, also behind a Convert; None where it holds several, or is none."""
    node = node.input_value(0).get_node() if node.get_type_name() == "Convert" else node
    values = node.data if node.get_type_name() == "Constant" else np.zeros(0)
    return float(values.flatten()[0]) if values.size == 1 else None


@torch.no_grad()
def save_openvino(network: IntegerNetwork, path: Path, example_inputs: tuple[Tensor, ...]) -> None:
    """Write `network` as OpenVINO's own files (IR), model.xml and model.bin, into the folder `path`.

    Args:
        network: from `qat.lower` or `qat.load`.
        path: of the folder; an earlier one survives if writing fails.
        example_inputs: as for `save_onnx`, of whose file they are made.

    Raises:
        ImportError: the `openvino` or `onnx` package is missing.
        OSError: a file cannot be written.
        ValueError: a layer has no form in ONNX; names it.
    """
    openvino = _require_openvino()
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(network, Path(folder) / "model.onnx", example_inputs)
        model = _read(openvino, Path(folder) / "model.onnx")
        model.set_rt_info(OPTIONS[OWN_ROUNDING], ["runtime_options", OWN_ROUNDING])  # unless its user asks for it
        with replaced_folder(path, lambda earlier: (earlier / "model.xml").is_file()) as new:
            try:
                openvino.save_model(model, str(new / "model.xml"), compress_to_fp16=False)
            except RuntimeError as error:  # of C++'s streams, when a disk is full
                raise OSError(f"OpenVINO cannot write '{path}': {error}") from error
