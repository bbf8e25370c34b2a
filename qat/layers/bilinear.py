"""Bilinear."""

import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer


class QuantBilinear(QuantizedLayer, nn.Bilinear):  # type: ignore[misc]
    """`nn.Bilinear` with a fake-quantized weight: a linear layer on the products of all pairs of inputs.

    Its quantizer sees the weight of that linear layer, [out, in1 * in2].
    """

    def arranged(self, weight: Tensor) -> Tensor:  # noqa: D102
        return weight.flatten(1)

    def as_kept(self, weight: Tensor) -> Tensor:  # noqa: D102
        return weight.reshape(self.weight.shape)

    def forward(self, input1: Tensor, input2: Tensor) -> Tensor:  # noqa: D102
        return F.bilinear(self.read(input1), self.read(input2, 1), self.quantized_weight(), self.bias)
