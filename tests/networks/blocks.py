"""Parts that several of the networks share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """Submodules by name, parameters and buffers too, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.compute = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            elif isinstance(part, nn.Parameter):
                self.register_parameter(name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def rounded(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, at least `divisor`, and no more than a tenth below `channels`.

    Source: the convention of the MobileNet papers for scaled channels.
    """
    nearest = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * channels else nearest


def conv_norm(
    inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int | tuple[int, int] = 1, *, groups: int = 1,
    activation: Callable[[], nn.Module] | None = None, eps: float = 1e-5,
) -> nn.Sequential:  # fmt: skip
    """Convolution without bias, keeping the size at stride 1, then BatchNorm and, if given, an activation."""
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (size[0] // 2, size[1] // 2)
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(outputs, eps=eps)
    ]  # fmt: skip
    return nn.Sequential(*layers, *([activation()] if activation is not None else []))


class SqueezeExcite(nn.Module):
    """Channels scaled by a gate that is computed from their means.

    Source: Hu et al. 2018, "Squeeze-and-Excitation Networks", section 3.
    """

    def __init__(
        self, channels: int, squeezed: int, activation: Callable[[], nn.Module], gate: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = activation(), gate()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.activation(self.reduce(self.pool(x)))))


class StochasticDepth(nn.Module):
    """Drops whole samples of a residual branch while training, and scales up those that stay.

    Source: Huang et al. 2016, "Deep Networks with Stochastic Depth", section 3 (with the scaling of inverted dropout).
    """

    def __init__(self, drop: float) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= self.drop
        return x * kept / (1 - self.drop)
