"""A layer whose input channels are divided by factors that its weight was multiplied by."""

from torch import Tensor, fx, nn


def scale_channels(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply the last dimension of `x` [..., channels] by `factors` [channels].

    It is one operation of a traced network, computed in float: what is quantized is its result.
    """
    return x * factors


fx.wrap("scale_channels")


class Smoothed(nn.Module):
    """A linear layer behind a multiplication of its input channels.

    Args:
        layer: receives the multiplied input.
        factors: one an input channel.
    """

    factors: Tensor

    def __init__(self, layer: nn.Linear, factors: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("factors", factors)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self.layer(scale_channels(x, self.factors))
