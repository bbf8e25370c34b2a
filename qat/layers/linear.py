"""Linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.numerics.codes import kept_as_integers


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        x, weight = self.read(input), self.quantized_weight()
        with kept_as_integers(x, weight):
            return F.linear(x, weight, self.bias)
