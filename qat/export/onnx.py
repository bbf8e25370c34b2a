"""Integer network -> ONNX, with QuantizeLinear and DequantizeLinear around integer initializers.

Every layer is written by one function of EMIT. BatchNorm is folded already, so engines find `DequantizeLinear ->
Conv -> QuantizeLinear` and run it in integers. A grid narrower than its type (4 bits in uint8) is a Clip on the
integers after
QuantizeLinear, which leaves that pattern whole. Signed 8-bit activations are stored 128 higher in uint8, zero point and
all: the same real numbers, but engines have integer kernels only where a layer's input and output share a type.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.export.files import write_atomically
from qat.runtime import operations as ops
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv, IntegerConv, RuntimeLayer
from qat.runtime.network import IntegerNetwork, Node

OPSET = 21


def _require_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError("exporting ONNX needs the packages of qat[export]: pip install 'qat[export]'") from error
    return onnx


class _Model:
    """A model under construction."""

    def __init__(self, network: IntegerNetwork, shapes: dict[str, torch.Size]) -> None:
        self.onnx = _require_onnx()
        self.network, self.shapes = network, shapes
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}

    def op(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Append an operation; returns the name of its result."""
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [output], name=f"{output}:{kind}", **attributes))
        return output

    def constant(self, name: str, value: Any, dtype: Any = None) -> str:
        """Add an initializer; returns its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = array if dtype is None else array.astype(dtype)
        self.initializers[name] = self.onnx.numpy_helper.from_array(array.copy(order="C"), name)
        return name

    def quantize(self, x: str, grid: Quantize, output: str) -> str:
        """Real numbers to integers of `grid`."""
        dtype, offset = storage(grid)
        low, high = grid.quant_min + offset, grid.quant_max + offset
        info = np.iinfo(dtype)
        if info.bits > 8:  # engines have no Clip on 16-bit integers: real numbers are clipped instead
            ends = (int(grid.zero_point) if grid.relu else grid.quant_min, grid.quant_max)
            if ends != (info.min, info.max):
                limits = [grid.scale * (end - grid.zero_point) for end in ends]
                bounds = [self.constant(f"{output}.real_{k}", v) for k, v in zip(("min", "max"), limits, strict=True)]
                x = self.op("Clip", [x, *bounds], f"{output}.clipped")
        elif grid.relu:
            low = int(grid.zero_point) + offset
        inputs = [x, *self.grid_constants(grid, output)]
        if (low, high) == (info.min, info.max) or info.bits > 8:
            return self.op("QuantizeLinear", inputs, output)
        wide = self.op("QuantizeLinear", inputs, f"{output}.wide")
        bounds = [self.constant(f"{output}.{k}", v, dtype) for k, v in (("min", low), ("max", high))]
        return self.op("Clip", [wide, *bounds], output)

    def grid_constants(self, grid: Quantize, name: str) -> list[str]:
        """Scale and zero point of the tensor `name` as initializers."""
        dtype, offset = storage(grid)
        return [
            self.constant(f"{name}.scale", grid.scale),
            self.constant(f"{name}.zero_point", grid.zero_point + offset, dtype),
        ]

    def real(self, name: str, output: str) -> str:
        """Real numbers of the integer tensor `name`."""
        grid = self.network.grid(name)
        assert grid is not None
        return self.op("DequantizeLinear", [name, *self.grid_constants(grid, output)], output)

    def as_float(self, node: Node, emit: Callable[[str, str], str]) -> None:
        """Write `emit(input, output)`, which keeps integers as they are, in float32.

        For 16-bit integers, which no engine takes there and float32 holds exactly.
        """
        grid = self.network.grid(node.inputs[0])
        assert grid is not None
        x = self.op("Cast", [node.inputs[0]], f"{node.name}.in", to=self.onnx.TensorProto.FLOAT)
        y = emit(x, f"{node.name}.out")
        self.op("Cast", [y], node.name, to=self.onnx.helper.np_dtype_to_tensor_dtype(storage(grid)[0]))

    def finish(self, layer: RuntimeLayer, name: str, emit: Callable[[str], str]) -> None:
        """Let `emit(output name)` write the operation, then put it on the layer's output grid."""
        if layer.output is None:
            emit(name)
        else:
            self.quantize(emit(f"{name}.float"), layer.output, name)


def storage(grid: Quantize) -> tuple[np.dtype[Any], int]:
    """The integer type of a grid in ONNX, and what is added to its integers there."""
    if grid.dtype == torch.int8:
        return np.dtype(np.uint8), 128
    if grid.dtype == torch.int32:
        return np.dtype(np.uint16), 0
    return torch.zeros(0, dtype=grid.dtype).numpy().dtype, 0


def _integer_conv(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, IntegerConv)
    name = node.name
    x = model.real(node.inputs[0], f"{name}.input")
    weight, zero = layer.weight.int(), layer.weight_zero_point
    centred = weight - zero.reshape(-1, *[1] * (weight.dim() - 1))
    if int(centred.min()) >= -128 and int(centred.max()) <= 127:  # engines are fastest without weight zero points
        weight, zero, dtype = centred, torch.zeros_like(zero), "int8"
    else:
        dtype = "uint8" if layer.weight_bounds[0] >= 0 else "int8"
    w = model.op(
        "DequantizeLinear",
        [model.constant(f"{name}.weight", weight, dtype), model.constant(f"{name}.weight_scale", layer.weight_scale),
         model.constant(f"{name}.weight_zero_point", zero, dtype)],
        f"{name}.weight_real", axis=0,
    )  # fmt: skip
    scale = layer.input_scale * layer.weight_scale
    if layer.bias.dtype == torch.int32:
        constants = [model.constant(f"{name}.bias", layer.bias), model.constant(f"{name}.bias_scale", scale)]
        b = model.op("DequantizeLinear", constants, f"{name}.bias_real", axis=0)
    else:  # 16-bit inputs: no engine has an integer kernel, and the bias is wider than int32
        b = model.constant(f"{name}.bias_real", layer.bias.double() * scale, np.float32)
    _convolution(model, node, layer, x, w, b)


def _float_conv(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, FloatConv)
    name, x = node.name, node.inputs[0]
    b = model.constant(f"{name}.bias", layer.bias)
    if layer.weight_bounds is None:
        w = model.constant(f"{name}.weight", layer.weight)
    else:
        w = _dequantized_weight(model, name, layer)
    _convolution(model, node, layer, x, w, b)


def _dequantized_weight(model: _Model, name: str, layer: FloatConv) -> str:
    dtype = np.uint8 if layer.weight.dtype == torch.uint8 else np.int8
    scale = model.constant(f"{name}.weight_scale", layer.weight_scale)
    zero = model.constant(f"{name}.weight_zero_point", layer.weight_zero_point, dtype)
    if layer.group_size is None:
        weight = model.constant(f"{name}.weight", layer.weight)
        return model.op("DequantizeLinear", [weight, scale, zero], f"{name}.weight_real", axis=0)
    out, inputs = layer.weight.shape[0], layer.weight[0].numel()
    padded = torch.nn.functional.pad(layer.weight.reshape(out, -1), (0, -inputs % layer.group_size))
    weight = model.constant(f"{name}.weight", padded)
    real = model.op(
        "DequantizeLinear", [weight, scale, zero], f"{name}.weight_groups", axis=1, block_size=layer.group_size
    )
    if padded.shape[1] != inputs:
        bounds = [model.constant(f"{name}.{k}", [v], np.int64) for k, v in (("from", 0), ("to", inputs), ("axis", 1))]
        real = model.op("Slice", [real, *bounds], f"{name}.weight_flat")
    shape = model.constant(f"{name}.weight_shape", list(layer.weight.shape), np.int64)
    return model.op("Reshape", [real, shape], f"{name}.weight_real")


def _convolution(model: _Model, node: Node, layer: IntegerConv | FloatConv, x: str, w: str, b: str) -> None:
    if layer.weight.dim() > 2:
        pads = [before for before, _ in layer.padding] + [after for _, after in layer.padding]
        attributes = {"strides": layer.stride, "pads": pads, "dilations": layer.dilation, "group": layer.groups,
                      "kernel_shape": list(layer.weight.shape[2:])}  # fmt: skip
        model.finish(layer, node.name, lambda out: model.op("Conv", [x, w, b], out, **attributes))
    elif len(model.shapes[node.inputs[0]]) == 2:
        model.finish(layer, node.name, lambda out: model.op("Gemm", [x, w, b], out, transB=1))
    else:
        # as rows of a matrix: Gemm has integer kernels with a bias; and around a MatMul with dequantized weights ONNX
        # Runtime quantizes float activations to 8 bits (MatMulNBits), which training did not see
        name, (out_features, in_features) = node.name, layer.weight.shape
        middle = model.shapes[node.inputs[0]][1:-1]
        rows_shape = model.constant(f"{name}.rows_shape", [-1, in_features], np.int64)
        shape = model.constant(f"{name}.shape", [-1, *middle, out_features], np.int64)
        rows = model.op("Reshape", [x, rows_shape], f"{name}.rows")
        product = model.op("Gemm", [rows, w, b], f"{name}.product", transB=1)
        model.finish(layer, name, lambda out: model.op("Reshape", [product, shape], out))


def _quantize_input(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert layer.output is not None
    model.quantize(node.inputs[0], layer.output, node.name)


def _dequantize(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    model.real(node.inputs[0], node.name)


def _simple(kind: str) -> Callable[[_Model, Node, RuntimeLayer], None]:
    def emit(model: _Model, node: Node, layer: RuntimeLayer) -> None:
        model.finish(layer, node.name, lambda out: model.op(kind, list(node.inputs), out))

    return emit


def _affine(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Affine)
    shape = [1, -1, *[1] * (len(model.shapes[node.inputs[0]]) - 2)]
    factor = model.constant(f"{node.name}.factor", layer.factor.reshape(shape))
    offset = model.constant(f"{node.name}.offset", layer.offset.reshape(shape))
    product = model.op("Mul", [node.inputs[0], factor], f"{node.name}.product")
    model.finish(layer, node.name, lambda out: model.op("Add", [product, offset], out))


def _relu(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Relu)
    grid = model.network.grid(node.inputs[0])
    if grid is None:
        _simple("Relu")(model, node, layer)
        return
    dtype, offset = storage(grid)
    if dtype.itemsize > 1:
        zero = model.constant(f"{node.name}.zero", layer.settings["zero"], np.float32)
        model.as_float(node, lambda x, out: model.op("Max", [x, zero], out))
    else:
        zero = model.constant(f"{node.name}.zero", layer.settings["zero"] + offset, dtype)
        model.op("Clip", [node.inputs[0], zero], node.name)


def _mean(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Mean)
    rank, dims, keepdim = len(model.shapes[node.inputs[0]]), layer.settings["dims"], layer.settings["keepdim"]
    if keepdim and {d % rank for d in dims} == set(range(2, rank)):
        _simple("GlobalAveragePool")(model, node, layer)  # which engines have in integers
        return
    axes = model.constant(f"{node.name}.axes", dims, np.int64)
    inputs = [node.inputs[0], axes]
    model.finish(layer, node.name, lambda out: model.op("ReduceMean", inputs, out, keepdims=int(keepdim)))


def _pool(kind: str) -> Callable[[_Model, Node, RuntimeLayer], None]:
    def emit(model: _Model, node: Node, layer: RuntimeLayer) -> None:
        assert isinstance(layer, ops.Average | ops.MaxPool)
        s, x = layer.settings, node.inputs[0]
        attributes = {"kernel_shape": s["kernel"], "strides": s["stride"], "pads": s["padding"] * 2,
                      "ceil_mode": int(s["ceil_mode"])}  # fmt: skip
        if kind == "AveragePool":
            attributes["count_include_pad"] = int(s["count_include_pad"])
        else:
            attributes["dilations"] = s["dilation"]
        grid = model.network.grid(x)
        if grid is not None and storage(grid)[0].itemsize > 1:
            model.as_float(node, lambda x, out: model.op(kind, [x], out, **attributes))
        else:
            model.finish(layer, node.name, lambda out: model.op(kind, [x], out, **attributes))

    return emit


def _reshape(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Reshape)
    shape = model.constant(f"{node.name}.shape", layer.settings["shape"], np.int64)
    model.op("Reshape", [node.inputs[0], shape], node.name)


def _permute(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Permute)
    rank = len(layer.settings["dims"])
    model.op("Transpose", [node.inputs[0]], node.name, perm=[d % rank for d in layer.settings["dims"]])


def _slice(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Slice)
    slices = layer.settings["slices"]
    largest = np.iinfo(np.int64).max
    columns = {
        "starts": [start for _, start, _, _ in slices],
        "ends": [largest if stop is None else stop for _, _, stop, _ in slices],
        "axes": [dim for dim, _, _, _ in slices],
        "steps": [step for _, _, _, step in slices],
    }
    bounds = [model.constant(f"{node.name}.{k}", v, np.int64) for k, v in columns.items()]
    model.op("Slice", [node.inputs[0], *bounds], node.name)


def _pad(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Pad)
    rank, pads = len(model.shapes[node.inputs[0]]), layer.settings["pads"]
    pads = [[0, 0]] * (rank - len(pads)) + pads
    flat = [before for before, _ in pads] + [after for _, after in pads]
    grid = model.network.grid(node.inputs[0])
    dtype, offset = (np.dtype(np.float32), 0) if grid is None else storage(grid)
    wide = grid is not None and dtype.itemsize > 1
    shape = model.constant(f"{node.name}.pads", flat, np.int64)
    value = model.constant(f"{node.name}.value", layer.settings["value"] + offset, np.float32 if wide else dtype)
    if wide:
        model.as_float(node, lambda x, out: model.op("Pad", [x, shape, value], out))
    else:
        model.op("Pad", [node.inputs[0], shape, value], node.name)


def _concat(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Concat)
    model.op("Concat", list(node.inputs), node.name, axis=layer.settings["dim"])


def _function(model: _Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Function)
    x, name = node.inputs[0], layer.settings["name"]
    if name == "relu6":
        bounds = [model.constant(f"{node.name}.{k}", v, np.float32) for k, v in (("min", 0), ("max", 6))]
        model.finish(layer, node.name, lambda out: model.op("Clip", [x, *bounds], out))
    elif name == "silu":
        gate = model.op("Sigmoid", [x], f"{node.name}.gate")
        model.finish(layer, node.name, lambda out: model.op("Mul", [x, gate], out))
    elif name == "hardsigmoid":
        model.finish(layer, node.name, lambda out: model.op("HardSigmoid", [x], out, alpha=1 / 6, beta=0.5))
    else:
        kinds = {"sigmoid": "Sigmoid", "tanh": "Tanh", "gelu": "Gelu", "hardswish": "HardSwish"}
        model.finish(layer, node.name, lambda out: model.op(kinds[name], [x], out))


EMIT: dict[type[RuntimeLayer], Callable[[_Model, Node, Any], None]] = {
    IntegerConv: _integer_conv,
    FloatConv: _float_conv,
    ops.QuantizeInput: _quantize_input,
    ops.Dequantize: _dequantize,
    ops.Add: _simple("Add"),
    ops.Affine: _affine,
    ops.Relu: _relu,
    ops.Average: _pool("AveragePool"),
    ops.Mean: _mean,
    ops.MaxPool: _pool("MaxPool"),
    ops.Reshape: _reshape,
    ops.Permute: _permute,
    ops.Slice: _slice,
    ops.Pad: _pad,
    ops.Concat: _concat,
    ops.Function: _function,
}


@torch.no_grad()
def save_onnx(network: IntegerNetwork, path: Path, example_inputs: tuple[Tensor, ...]) -> None:
    """Write `network` to `path` as an ONNX model with a dynamic batch dimension.

    Args:
        network: from `qat.lower` or `qat.load`.
        path: where; an earlier file there survives if writing fails.
        example_inputs: float32, with a batch dimension first; other dimensions are fixed to theirs.

    Raises:
        ImportError: the `onnx` package is missing.
        OSError: the file cannot be written.
    """
    tensors = network.run(*example_inputs)
    model = _Model(network, {name: tensor.shape for name, tensor in tensors.items()})
    onnx = model.onnx
    for node in network.nodes:
        EMIT[type(network.layer(node.name))](model, node, network.layer(node.name))

    def value(name: str, batch: str = "batch") -> Any:
        grid = network.grid(name)
        dtype = np.dtype(np.float32) if grid is None else storage(grid)[0]
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return onnx.helper.make_tensor_value_info(name, kind, [batch, *tensors[name].shape[1:]])

    graph = onnx.helper.make_graph(
        model.nodes,
        "qat",
        [value(name) for name in network.inputs],
        [value(name) for name in network.outputs],
        list(model.initializers.values()),
        value_info=[value(node.name) for node in network.nodes if node.name not in network.outputs],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], producer_name="qat")
    proto.ir_version = 10
    onnx.helper.set_model_props(proto, {"qat": json.dumps(network.info, sort_keys=True)})
    onnx.checker.check_model(proto, full_check=True)
    write_atomically(path, proto.SerializeToString(deterministic=True))
