"""Quantized layers. SWAPS says which float type becomes which quantized type."""

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qat.layers.base import Quantized, QuantizedLayer, Weight, weights_of
from qat.layers.bilinear import QuantBilinear
from qat.layers.conv import QuantConv1d, QuantConv2d, QuantConv3d
from qat.layers.conv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from qat.layers.functional import Functional, QuantFunctional
from qat.layers.linear import QuantLinear
from qat.layers.lookup import QuantEmbedding, QuantEmbeddingBag
from qat.layers.recurrent import (
    QuantGRU,
    QuantGRUCell,
    QuantizedRecurrent,
    QuantLSTM,
    QuantLSTMCell,
    QuantRNN,
    QuantRNNCell,
)

SWAPS: dict[type[nn.Module], type[Quantized]] = {
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
    NonDynamicallyQuantizableLinear: QuantLinear,  # the output projection of nn.MultiheadAttention
    Functional: QuantFunctional,
    nn.LSTM: QuantLSTM,
    nn.GRU: QuantGRU,
    nn.RNN: QuantRNN,
    nn.LSTMCell: QuantLSTMCell,
    nn.GRUCell: QuantGRUCell,
    nn.RNNCell: QuantRNNCell,
}


def float_type(module: nn.Module) -> type[nn.Module]:
    """The type of float layer that a layer is, or that computes the same."""
    if isinstance(module, Functional):
        return module.form.layer
    return nn.Linear if isinstance(module, nn.Linear) and type(module) in SWAPS else type(module)


def type_name(module: nn.Module) -> str:
    """What reports and rules call the type of a layer: that of a call of F.linear is Linear."""
    name = float_type(module).__name__
    return f"Quant{name}" if isinstance(module, QuantFunctional) else name


__all__ = [
    "SWAPS",
    "Functional",
    "QuantBilinear",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantEmbeddingBag",
    "QuantFunctional",
    "QuantGRU",
    "QuantGRUCell",
    "QuantLSTM",
    "QuantLSTMCell",
    "QuantLinear",
    "QuantRNN",
    "QuantRNNCell",
    "Quantized",
    "QuantizedLayer",
    "QuantizedRecurrent",
    "Weight",
    "float_type",
    "type_name",
    "weights_of",
]
