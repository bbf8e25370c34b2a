"""Quantized layers. SWAPS says which float type becomes which quantized type."""

from torch import nn

from qat.layers.base import QuantizedLayer
from qat.layers.conv import QuantConv1d, QuantConv2d
from qat.layers.linear import QuantLinear

SWAPS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
}

__all__ = ["SWAPS", "QuantConv1d", "QuantConv2d", "QuantLinear", "QuantizedLayer"]
