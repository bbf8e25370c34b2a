"""Bilinear layers in ONNX: the products of all pairs of two inputs, then a linear layer.

No engine has a kernel for them, so they multiply real numbers: those that the integers stand for.
"""

import numpy as np

from qat.export.onnx_conv import on_real
from qat.export.onnx_model import Model
from qat.runtime.layers import RuntimeLayer
from qat.runtime.network import Node
from qat.runtime.outer import IntegerBilinear, Outer


def outer(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """Products of all pairs of real numbers."""
    assert isinstance(layer, Outer)
    model.finish(layer, node.name, lambda out: _pairs(model, node, list(node.inputs), out))


def integer_bilinear(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """DequantizeLinear of both inputs, their products, and the layer with its weight dequantized."""
    assert isinstance(layer, IntegerBilinear)
    sides = zip(("left", "right"), node.inputs, strict=True)
    inputs = [model.real(x, f"{node.name}.{side}") for side, x in sides]
    on_real(model, node, layer, _pairs(model, node, inputs, f"{node.name}.outer"))


def _pairs(model: Model, node: Node, inputs: list[str], output: str) -> str:
    rank = len(model.shapes[node.inputs[0]])
    wide = [
        model.op("Unsqueeze", [x, model.constant(f"{output}.{label}.axis", [axis], np.int64)], f"{output}.{label}")
        for label, x, axis in zip(("column", "row"), inputs, (rank, rank - 1), strict=True)
    ]
    products = model.op("Mul", wide, f"{output}.products")
    return model.reshape(products, [0] * (rank - 1) + [-1], output)
