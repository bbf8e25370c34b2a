"""Residual networks, with images of any size (ResNet-18) and of 32x32 pixels (ResNet-20)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; one ReLU module called twice, as most implementations have it."""

    def __init__(self, inputs: int, outputs: int, stride: int, project: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs
        self.downsample = None
        if project and (stride != 1 or self.extra):
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        y += x
        return self.relu(y)


def stage(inputs: int, outputs: int, blocks: int, stride: int, project: bool) -> nn.Sequential:
    """Blocks of one size of feature map; the first may halve it."""
    first = Block(inputs, outputs, stride, project)
    return nn.Sequential(first, *(Block(outputs, outputs, 1, project) for _ in range(blocks - 1)))


class ResNet18(nn.Module):
    """The 18-layer network for ImageNet: 11,689,512 parameters for 1000 classes.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", table 1 (18-layer) and section 4.1, with
    projections where shapes differ (option B).

    Args:
        width: channels of the first stage.
        depth: blocks a stage.
    """

    def __init__(self, classes: int = 1000, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        for i in range(1, 5):
            setattr(self, f"layer{i}", stage(sizes[i - 1], sizes[i], depth, 1 if i == 1 else 2, project=True))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(sizes[4], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class ResNet20(nn.Module):
    """The network of 6n + 2 layers for CIFAR-10, n = 3: 269,722 parameters.

    Source: He et al. 2016, section 4.2: three stages, shortcuts without parameters (option A). Parameters have the
    names of the published weights in `shared/weights`.
    """

    def __init__(self, classes: int = 10, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(width, width, depth, 1, project=False)
        self.layer2 = stage(width, 2 * width, depth, 2, project=False)
        self.layer3 = stage(2 * width, 4 * width, depth, 2, project=False)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.size(3)).view(x.size(0), -1))
