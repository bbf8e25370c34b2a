"""Convolutions and linear layers of integers, of dequantized integers, and of floats, in ONNX."""

from typing import Any

import numpy as np
import torch

from qat.export.onnx_model import Model, fits_four_bits
from qat.export.onnx_pairs import centred as in_pairs
from qat.export.onnx_pairs import grouped_weight
from qat.numerics.granularity import rows_of
from qat.runtime.layers import FloatConv, IntegerConv, RuntimeLayer
from qat.runtime.network import Node
from qat.runtime.stored import StoredConv


def integer_conv(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """DequantizeLinear of input, weight and bias, then the layer: what engines run in integers."""
    assert isinstance(layer, IntegerConv)
    on_real(model, node, layer, model.real(node.inputs[0], f"{node.name}.input"))


def on_real(model: Model, node: Node, layer: IntegerConv, x: str) -> None:
    """The layer of `x`, the real numbers that its inputs' integers stand for, and of its dequantized weight."""
    name = node.name
    direct = layer.output_padding is not None and layer.groups == 1  # [in, out, *kernel]: channels lie along axis 1
    w, zeros = _weight(model, name, layer, direct)
    scales = model.constant(f"{name}.weight_scale", layer.weight_scale)
    w = model.op("DequantizeLinear", [w, scales, zeros], f"{name}.weight_real", axis=int(direct))
    w = w if direct else weight_as_kept(model, name, layer, w)
    scale = layer.input_scale * layer.weight_scale
    if layer.bias.dtype == torch.int32 and not model.pairs:
        constants = [model.constant(f"{name}.bias", layer.bias), model.constant(f"{name}.bias_scale", scale)]
        b = model.op("DequantizeLinear", constants, f"{name}.bias_real", axis=0)
    else:  # of pairs; of 16-bit inputs, for which no engine has an integer kernel, and the bias is wider than int32
        b = model.constant(f"{name}.bias_real", layer.bias.double() * scale, np.float32)
    if layer.output is None and not model.pairs and not bool(layer.bias.any()) and name not in model.network.outputs:
        # what a bias keeps OpenVINO from: to move scales and zero points behind what reads the sums, and get it wrong
        model.held(_sum(model, node, layer, [x, w, b], f"{name}.product"), name)
        return
    model.finish(layer, name, lambda out: _sum(model, node, layer, [x, w, b], out))


def _weight(model: Model, name: str, layer: IntegerConv, direct: bool) -> list[str]:
    """The weight's integers and zero points: all 0 if that is possible at all, since engines are fastest so.

    Left out they cannot be: ONNX Runtime makes a single one for all channels then, which its own kernel refuses.
    """
    codes, zero, (low, high) = layer.weight.int(), layer.weight_zero_point, layer.weight_bounds
    column = zero.reshape(-1, *[1] * (codes.dim() - 1))
    centred, swap = codes - column, (lambda t: t.transpose(0, 1)) if direct else (lambda t: t)
    least, most = min(int(centred.min()), -1), int(centred.max())
    sign = "UINT" if low >= 0 else "INT"
    if model.pairs:
        w = model.typed(f"{name}.weight", swap(in_pairs(name, codes, column)), "INT8")
        return [w, model.typed(f"{name}.weight_zero_point", zero * 0, "INT8")]
    if least < -128 or most > 127:
        parts = {"weight": swap(codes), "weight_zero_point": zero}
        return [model.typed(f"{name}.{part}", value, f"{sign}8") for part, value in parts.items()]
    if fits_four_bits(low, high) and not fits_four_bits(least, most):
        wide = model.cast(model.typed(f"{name}.weight", swap(codes), f"{sign}4"), "INT32", f"{name}.weight_codes")
        zeros = model.constant(f"{name}.weight_centre", swap(column), np.int32)
        wide = model.op("Sub", [wide, zeros], f"{name}.weight_centred")
        w = model.cast(wide, "INT8", f"{name}.weight_bytes")
    else:
        w = model.integers(f"{name}.weight", swap(centred), least, most)
    return [w, model.typed(f"{name}.weight_zero_point", zero * 0, "INT8")]


def _sum(model: Model, node: Node, layer: IntegerConv, inputs: list[str], output: str) -> str:
    """The product, and what the bias has between the integers: an operation of its own, or engines round it away."""
    if layer.remainder is None:
        return product(model, node, layer, inputs, output)
    y = product(model, node, layer, inputs, f"{output}.integers")
    shape = [-1, *[1] * (layer.weight.dim() - 2)] if layer.weight.dim() > 2 else [-1]
    return model.op("Add", [y, model.constant(f"{output}.remainder", layer.remainder.reshape(shape))], output)


def float_conv(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """The layer in float, its weight dequantized."""
    assert isinstance(layer, FloatConv)
    name = node.name
    b = model.constant(f"{name}.bias", layer.bias)
    if layer.weight_bounds is None:
        w = model.constant(f"{name}.weight", layer.weight)
    else:
        w = _dequantized_weight(model, name, layer)
    w = weight_as_kept(model, name, layer, w)
    model.finish(layer, name, lambda out: product(model, node, layer, [node.inputs[0], w, b], out))


def _dequantized_weight(model: Model, name: str, layer: FloatConv) -> str:
    assert layer.weight_bounds is not None
    if model.pairs and layer.group_size is not None:
        return grouped_weight(model, name, layer)
    codes = rows_of(layer.weight, layer.group_size).reshape(layer.weight.shape[0], -1)  # groups filled up
    if layer.group_size is None:
        codes = layer.weight
    low, high = layer.weight_bounds
    kind = "UINT" if low >= 0 else "INT"
    kind += "4" if fits_four_bits(low, high) else "8" if high - low < 256 else "16"
    zero = layer.weight_zero_point
    if model.pairs:
        column = zero.reshape(-1, *[1] * (codes.dim() - 1))
        kind, codes, zero = "INT8", in_pairs(name, codes, column), zero * 0
    constants = [
        model.typed(f"{name}.weight", codes, kind),
        model.constant(f"{name}.weight_scale", layer.weight_scale),
        model.typed(f"{name}.weight_zero_point", zero, kind),
    ]
    if layer.group_size is None:
        return model.op("DequantizeLinear", constants, f"{name}.weight_real", axis=0)
    real = model.op("DequantizeLinear", constants, f"{name}.weight_groups", axis=1, block_size=layer.group_size)
    inputs = layer.weight[0].numel()
    if codes.shape[1] != inputs:
        real = model.head(real, [inputs], [1], f"{name}.weight_flat")
    return model.reshape(real, list(layer.weight.shape), f"{name}.weight_real")


def weight_as_kept(model: Model, name: str, layer: IntegerConv | FloatConv | StoredConv, w: str) -> str:
    """The weight `w`, output channels first, in the order that the operation takes: of ConvTranspose inputs first."""
    if layer.output_padding is None:
        return w
    out, inputs, *kernel = layer.weight_shape if isinstance(layer, StoredConv) else layer.weight.shape
    groups, spatial = layer.groups, range(len(kernel))
    w = model.reshape(w, [groups, out // groups, inputs, *kernel], f"{name}.weight_grouped")
    w = model.op("Transpose", [w], f"{name}.weight_swapped", perm=[0, 2, 1, *(3 + i for i in spatial)])
    return model.reshape(w, [groups * inputs, out // groups, *kernel], f"{name}.weight_kept")


def product(
    model: Model, node: Node, layer: IntegerConv | FloatConv | StoredConv, inputs: list[str], output: str
) -> str:
    """Convolution or linear layer.

    Args:
        inputs: names of input, weight (`weight_as_kept`) and, if there is one, bias: real numbers.
        output: name of the result.
    """
    shape = layer.weight_shape if isinstance(layer, StoredConv) else list(layer.weight.shape)
    if len(shape) > 2:
        pads = [before for before, _ in layer.padding] + [after for _, after in layer.padding]
        kind = "Conv" if layer.output_padding is None else "ConvTranspose"
        given = {"strides": (layer.stride, 1), "pads": (pads, 0), "dilations": (layer.dilation, 1),
                 "output_padding": (layer.output_padding or [], 0)}  # fmt: skip
        others: dict[str, Any] = {k: v for k, (v, default) in given.items() if any(n != default for n in v)}
        if layer.groups != 1:
            others["group"] = layer.groups
        return model.op(kind, inputs, output, kernel_shape=shape[2:], **others)
    if len(model.shapes[node.inputs[0]]) == 2:
        return model.op("Gemm", inputs, output, transB=1)
    if isinstance(layer, IntegerConv) and not model.pairs and not bool(layer.bias.any()):
        # OpenVINO drops a bias of zeros, moves what zero points add to the sums behind the Reshape, and takes the
        # second dimension for the channels there
        turned = model.op("Transpose", [inputs[1]], f"{node.name}.weight_turned", perm=[1, 0])
        return model.op("MatMul", [inputs[0], turned], output)
    # as rows of a matrix: Gemm has integer kernels with a bias; and around a MatMul with dequantized weights ONNX
    # Runtime quantizes float activations to 8 bits (MatMulNBits), which training did not see
    middle = model.shapes[node.inputs[0]][1:-1]
    rows = model.reshape(inputs[0], [-1, shape[1]], f"{node.name}.input_rows")
    flat = model.op("Gemm", [rows, *inputs[1:]], f"{output}.rows", transB=1)
    return model.reshape(flat, [-1, *middle, shape[0]], output)
