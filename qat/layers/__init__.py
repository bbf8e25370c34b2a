"""Quantized layers. SWAPS says which float type becomes which quantized type."""

from torch import nn

from qat.layers.base import QuantizedLayer
from qat.layers.bilinear import QuantBilinear
from qat.layers.conv import QuantConv1d, QuantConv2d, QuantConv3d
from qat.layers.conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from qat.layers.linear import QuantLinear
from qat.layers.lookup import QuantEmbedding, QuantEmbeddingBag

SWAPS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Embedding: QuantEmbedding,
    nn.EmbeddingBag: QuantEmbeddingBag,
    nn.Bilinear: QuantBilinear,
}

__all__ = [
    "SWAPS",
    "QuantBilinear",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantEmbeddingBag",
    "QuantLinear",
    "QuantizedLayer",
]
