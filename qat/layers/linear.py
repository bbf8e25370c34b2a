"""Linear."""

import dataclasses

from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.exact import product
from qat.numerics.codes import linear
from qat.scheme import Granularity, TensorScheme


class QuantLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc]
    """`nn.Linear` with a fake-quantized weight."""

    def quantize_input(self, scheme: TensorScheme, example: Tensor, name: str, sites: int = 1) -> None:
        """As every layer's; channels and groups of what a linear layer reads lie along the last axis, which it sums."""
        channels = scheme.granularity in (Granularity.channel, Granularity.group)
        scheme = dataclasses.replace(scheme, axis=-1) if channels and scheme.axis is None else scheme
        super().quantize_input(scheme, example, name, sites)

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return product(self, self.read(input), linear)
