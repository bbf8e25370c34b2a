"""Convolutions: stride, padding (every mode), dilation and groups as in the float layer."""

from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.numerics.codes import kept_as_integers


class QuantConv1d(QuantizedLayer, nn.Conv1d):  # type: ignore[misc]
    """`nn.Conv1d` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        x, weight = self.read(input), self.quantized_weight()
        with kept_as_integers(x, weight):
            return self._conv_forward(x, weight, self.bias)


class QuantConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc]
    """`nn.Conv2d` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        x, weight = self.read(input), self.quantized_weight()
        with kept_as_integers(x, weight):
            return self._conv_forward(x, weight, self.bias)


class QuantConv3d(QuantizedLayer, nn.Conv3d):  # type: ignore[misc]
    """`nn.Conv3d` with a fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        x, weight = self.read(input), self.quantized_weight()
        with kept_as_integers(x, weight):
            return self._conv_forward(x, weight, self.bias)
