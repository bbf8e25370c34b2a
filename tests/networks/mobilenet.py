"""Networks of inverted residuals: MobileNetV2, MobileNetV3-small, EfficientNet-B0."""

from functools import partial

from torch import Tensor, nn

from tests.networks.blocks import SqueezeExcite, StochasticDepth, conv_norm, rounded


class InvertedResidual(nn.Module):
    """1x1 convolution to more channels, depthwise convolution, squeeze-excite (if any), 1x1 without activation.

    Source: Sandler et al. 2018, figure 4 and table 1; with squeeze-excite: Howard et al. 2019, figure 4.
    """

    def __init__(
        self, inputs: int, expanded: int, outputs: int, kernel: int, stride: int, activation: type[nn.Module],
        squeeze: nn.Module | None = None, drop: float = 0.0, eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        act = partial(activation, inplace=True)
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(conv_norm(inputs, expanded, 1, activation=act, eps=eps))
        layers.append(conv_norm(expanded, expanded, kernel, stride, groups=expanded, activation=act, eps=eps))
        layers += [] if squeeze is None else [squeeze]
        self.layers = nn.Sequential(*layers, conv_norm(expanded, outputs, 1, eps=eps))
        self.residual = stride == 1 and inputs == outputs
        self.depth = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + self.depth(y) if self.residual else y


class MobileNetV2(nn.Module):
    """3,504,872 parameters for 1000 classes.

    Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.

    Args:
        width: multiplier of the channels.
        depth: multiplier of the blocks a stage.
    """

    STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int = 1000, width: float = 1.0, depth: float = 1.0) -> None:
        super().__init__()
        channels = rounded(32 * width)
        layers: list[nn.Module] = [conv_norm(3, channels, 3, 2, activation=partial(nn.ReLU6, inplace=True))]
        for expansion, outputs, blocks, stride in self.STAGES:
            for i in range(max(1, round(blocks * depth))):
                size = rounded(outputs * width)
                layers.append(
                    InvertedResidual(channels, channels * expansion, size, 3, stride if i == 0 else 1, nn.ReLU6)
                )
                channels = size
        last = rounded(1280 * width)
        layers.append(conv_norm(channels, last, 1, activation=partial(nn.ReLU6, inplace=True)))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class MobileNetV3Small(nn.Module):
    """2,542,856 parameters for 1000 classes: hardswish, and squeeze-excite gated by hardsigmoid.

    Source: Howard et al. 2019, "Searching for MobileNetV3", table 2 and sections 5.2 (hardswish), 5.3 (squeeze-excite).

    Args:
        width: multiplier of the channels.
        depth: how many of the eleven blocks there are.
    """

    # kernel, expanded, outputs, squeeze-excite, activation, stride
    BLOCKS = (
        (3, 16, 16, True, nn.ReLU, 2), (3, 72, 24, False, nn.ReLU, 2), (3, 88, 24, False, nn.ReLU, 1),
        (5, 96, 40, True, nn.Hardswish, 2), (5, 240, 40, True, nn.Hardswish, 1), (5, 240, 40, True, nn.Hardswish, 1),
        (5, 120, 48, True, nn.Hardswish, 1), (5, 144, 48, True, nn.Hardswish, 1), (5, 288, 96, True, nn.Hardswish, 2),
        (5, 576, 96, True, nn.Hardswish, 1), (5, 576, 96, True, nn.Hardswish, 1),
    )  # fmt: skip

    def __init__(self, classes: int = 1000, width: float = 1.0, depth: int = 11) -> None:
        super().__init__()
        channels, eps = rounded(16 * width), 1e-3
        layers: list[nn.Module] = [conv_norm(3, channels, 3, 2, activation=nn.Hardswish, eps=eps)]
        for kernel, expansion, outputs, squeezes, activation, stride in self.BLOCKS[:depth]:
            expanded, size = rounded(expansion * width), rounded(outputs * width)
            squeeze = SqueezeExcite(expanded, rounded(expanded / 4), nn.ReLU, nn.Hardsigmoid) if squeezes else None
            layers.append(
                InvertedResidual(channels, expanded, size, kernel, stride, activation, squeeze, eps=eps)
            )  # fmt: skip
            channels = size
        layers.append(conv_norm(channels, 6 * channels, 1, activation=nn.Hardswish, eps=eps))
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)
        hidden = rounded(1024 * width)
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, hidden), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True),
            nn.Linear(hidden, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class EfficientNetB0(nn.Module):
    """5,288,548 parameters for 1000 classes: SiLU, squeeze-excite, stochastic depth.

    Source: Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", table 1;
    squeeze-excite squeezes to a quarter of a block's input; survival falls linearly to 0.8 (section 5.2).

    Args:
        width: multiplier of the channels.
        depth: multiplier of the blocks a stage.
    """

    STAGES = ((1, 3, 16, 1, 1), (6, 3, 24, 2, 2), (6, 5, 40, 2, 2), (6, 3, 80, 3, 2), (6, 5, 112, 3, 1),
              (6, 5, 192, 4, 2), (6, 3, 320, 1, 1))  # fmt: skip

    def __init__(self, classes: int = 1000, width: float = 1.0, depth: float = 1.0) -> None:
        super().__init__()
        act = partial(nn.SiLU, inplace=True)
        channels = rounded(32 * width)
        layers: list[nn.Module] = [conv_norm(3, channels, 3, 2, activation=act)]
        counts = [max(1, round(blocks * depth)) for _, _, _, blocks, _ in self.STAGES]
        for (expansion, kernel, outputs, _, stride), blocks in zip(self.STAGES, counts, strict=True):
            for i in range(blocks):
                expanded, size = channels * expansion, rounded(outputs * width)
                squeeze = SqueezeExcite(expanded, max(1, channels // 4), act, nn.Sigmoid)
                drop = 0.2 * (len(layers) - 1) / sum(counts)
                layers.append(
                    InvertedResidual(channels, expanded, size, kernel, stride if i == 0 else 1, nn.SiLU, squeeze, drop)
                )
                channels = size
        last = 4 * channels
        layers.append(conv_norm(channels, last, 1, activation=act))
        self.features, self.avgpool = nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
