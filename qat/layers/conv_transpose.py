"""Transposed convolutions.

The parameter is [in, out / groups, *kernel]; its quantizer sees [out, in / groups, *kernel], the weight of the
convolution (of the input with zeros in between) that computes the same. So a scale per channel is one per output
channel of the layer, also where groups share the second axis of the parameter, and BatchNorm folds into it.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.base import QuantizedLayer
from qat.numerics.granularity import swap_channels

CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
"""Number of spatial dimensions -> torch's function."""


class _Transposed(QuantizedLayer):
    def arranged(self, weight: Tensor) -> Tensor:
        return swap_channels(weight, self._groups)

    @property
    def arrangement(self) -> Hashable:
        return "transposed", self._groups

    def as_kept(self, weight: Tensor) -> Tensor:
        return swap_channels(weight, self._groups)

    @property
    def _groups(self) -> int:
        return self.groups  # type: ignore[return-value]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        dims = self.weight.dim() - 2
        output_padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
        )
        return CONVOLVE[dims](
            self.read(input), self.quantized_weight(), self.bias, layer.stride, layer.padding, output_padding,
            layer.groups, layer.dilation,
        )  # fmt: skip


class QuantConvTranspose1d(_Transposed, nn.ConvTranspose1d):  # type: ignore[misc]
    """`nn.ConvTranspose1d` with a fake-quantized weight."""


class QuantConvTranspose2d(_Transposed, nn.ConvTranspose2d):  # type: ignore[misc]
    """`nn.ConvTranspose2d` with a fake-quantized weight."""


class QuantConvTranspose3d(_Transposed, nn.ConvTranspose3d):  # type: ignore[misc]
    """`nn.ConvTranspose3d` with a fake-quantized weight."""
