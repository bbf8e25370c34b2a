"""Convolutions: stride, padding (every mode), dilation and groups as in the float layer."""

from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.layers.exact import product
from qat.numerics.codes import keeping


class QuantConv1d(QuantizedLayer, nn.Conv1d):  # type: ignore[misc]
    """`nn.Conv1d` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return product(self, self.read(input), keeping(self._conv_forward))


class QuantConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return product(self, self.read(input), keeping(self._conv_forward))


class QuantConv3d(QuantizedLayer, nn.Conv3d):  # type: ignore[misc]
    """`nn.Conv3d` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return product(self, self.read(input), keeping(self._conv_forward))
