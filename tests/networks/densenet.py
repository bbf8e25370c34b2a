"""Densely connected networks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution, BatchNorm, ReLU, 3x3 convolution, on everything before it joined."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        y = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(y), inplace=True))


class DenseBlock(nn.Module):
    def __init__(self, inputs: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseLayer(inputs + i * growth, growth) for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    """DenseNet-121 (DenseNet-BC): 7,978,856 parameters for 1000 classes.

    Source: Huang et al. 2017, "Densely Connected Convolutional Networks", table 1 and section 3.

    Args:
        width: growth rate k.
        depth: layers a block.
    """

    def __init__(self, classes: int = 1000, width: int = 32, depth: tuple[int, ...] = (6, 12, 24, 16)) -> None:
        super().__init__()
        channels = 2 * width
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]  # fmt: skip
        for i, count in enumerate(depth):
            layers.append(DenseBlock(channels, width, count))
            channels += count * width
            layers.append(nn.BatchNorm2d(channels))
            if i < len(depth) - 1:
                layers += [nn.ReLU(inplace=True), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(y, (1, 1)), 1))
