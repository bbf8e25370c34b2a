"""Files of pairs, for TensorRT: weights and float8 activations.

TensorRT's explicit quantization takes QuantizeLinear and DequantizeLinear of int8 and float8 (e4m3fn), of weights in
groups int4, with zero point 0 ("Explicit Quantization" and "Quantization Schemes" in its documentation;
`QuantDequantLinearHelper` in onnx-tensorrt refuses the rest). Initializers are dequantized where they are read, and
biases are float32.
"""

import torch
from torch import Tensor

from qat.export.onnx_model import Model
from qat.fake_quant import FakeQuantize
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv
from qat.runtime.stored import TableConv

FLOAT8 = "FLOAT8E4M3FN"


def centred(name: str, codes: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    """Integers of a weight as they are with zero point 0.

    Args:
        name: of the layer.
        codes, zero_point: broadcast against one another.
        bits: of the file's type.

    Raises:
        ValueError: they do not fit.
    """
    moved = codes.int() - zero_point.int()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = int(moved.min()), int(moved.max())
    if least < low or most > high:
        raise ValueError(
            f"layer '{name}': with zero point 0 its weights are integers from {least} to {most}, and the target takes "
            f"int{bits}, {low} to {high}; give it weight.symmetric=true weight.narrow_range=true, or leave onnx out of "
            f"export.formats"
        )
    return moved


def held_constant(model: Model, name: str, value: Tensor, grid: Quantize) -> str:
    """A parameter of the network on its grid."""
    held = model.typed(f"{name}.value", centred(name, value, grid.zero_point), "INT8")
    zero = model.typed(f"{name}.zero_point", torch.zeros((), dtype=torch.int8), "INT8")
    constants = [model.constant(f"{name}.scale", grid.scale), zero]
    return model.op("DequantizeLinear", [held, *constants], name)


def grouped_weight(model: Model, name: str, layer: FloatConv) -> str:
    """An int4 weight with a scale for each group of inputs, [out, inputs].

    Raises:
        ValueError: the last group is not whole; or what is not a matrix has groups.
    """
    size, shape = layer.group_size, layer.weight.shape
    assert size is not None
    if len(shape) > 2 or shape[1] % size:
        raise ValueError(
            f"layer '{name}': its weight, {list(shape)}, is no matrix of whole groups of {size} inputs, which the "
            f"target takes; use weight.bits=8 weight.granularity=channel with 8-bit inputs, or leave it float"
        )
    zeros = layer.weight_zero_point.repeat_interleave(size, 1)
    constants = [
        model.typed(f"{name}.weight", centred(name, layer.weight, zeros, 4), "INT4"),
        model.constant(f"{name}.weight_scale", layer.weight_scale),
        model.typed(f"{name}.weight_zero_point", layer.weight_zero_point * 0, "INT4"),
    ]
    return model.op("DequantizeLinear", constants, f"{name}.weight_real", axis=1, block_size=size)


def float8_weight(model: Model, name: str, layer: TableConv, values: Tensor) -> str:
    """A float8 weight with a scale an output channel, into which the gain of a BatchNorm goes, too.

    Args:
        values: float8, as the layer has its codes: [rows, values].
    """
    out = layer.weight_shape[0]
    signs = layer.gain.sign().reshape(-1, *[1] * (len(layer.weight_shape) - 1))
    turned = (values.float().reshape(layer.weight_shape) * signs).to(values.dtype)
    scale = layer.scale * torch.where(layer.gain == 0, 1.0, layer.gain.abs())  # which an engine wants to be positive
    constants = [
        model.typed(f"{name}.weight", turned, FLOAT8),
        model.constant(f"{name}.weight_scale", scale),
        model.typed(f"{name}.weight_zero_point", torch.zeros(out).to(torch.float8_e4m3fn), FLOAT8),
    ]
    return model.op("DequantizeLinear", constants, f"{name}.weight_real", axis=0)


def float8_pair(model: Model, quantizer: FakeQuantize, x: str, output: str) -> str:
    """An activation on the levels of float8; QuantizeLinear saturates, as the levels do."""
    scale = quantizer.qparams()[0].reshape(())
    zero = model.typed(f"{output}.zero_point", torch.zeros(()).to(torch.float8_e4m3fn), FLOAT8)
    constants = [model.constant(f"{output}.scale", scale), zero]
    quantized = model.op("QuantizeLinear", [x, *constants], f"{output}.q")
    return model.op("DequantizeLinear", [quantized, *constants], output)
