"""Linear."""

import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return F.linear(self.read(input), self.quantized_weight(), self.bias)
