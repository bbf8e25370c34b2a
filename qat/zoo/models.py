"""Small float networks, free of quantization code: what the shipped `conf/model` files build.

All are traceable by `torch.fx` with its default tracer and use one module an activation (never one ReLU called
twice), so that each tensor edge can get a fake-quantize node of its own.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

SHORTCUTS = ("A", "B")
RESNET_DEPTHS = (20, 32, 44, 56)


def _require_positive(**sizes: int) -> None:
    """Raise a ValueError for the first size that is not an integer of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} is not valid: give an integer of at least 1")


def kaiming_init(net: nn.Module) -> None:
    """Draw the weights of every convolution and linear layer for ReLU networks; set linear biases to zero.

    Source: He et al. 2015, "Delving Deep into Rectifiers", section 2.2 (normal, fan-in, gain sqrt(2)).
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PadShortcut(nn.Module):
    """Option A: every second pixel, then zero channels, half of them before and half after. No parameters.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, at least `in_channels`.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", sections 3.3 and 4.2.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / 2), ceil(W / 2))."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the shortcut, then ReLU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1, or 2 to halve the image.
        shortcut: "A" (pad with zeros) or "B" (1x1 convolution and BatchNorm); the identity where shapes agree.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", figure 2 and section 4.2.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, shortcut: str = "A") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        # An empty Sequential, unlike nn.Identity, leaves no node in a traced graph.
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            if shortcut == "A":
                self.shortcut = PadShortcut(in_channels, out_channels)
            else:
                conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, ceil(H / stride), ceil(W / stride))."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.shortcut(x))


class ResNet(nn.Module):
    """The CIFAR ResNet: a 3x3 convolution, three stages of w, 2w and 4w channels, average pool, linear.

    Parameter names are those of github.com/akamaster/pytorch_resnet_cifar10, so its weights load with strict=True.

    Args:
        depth: 20, 32, 44 or 56, which is 6n + 2 for n blocks a stage.
        shortcut: "A" (zero padding, as the paper's CIFAR networks) or "B" (1x1 convolution and BatchNorm).
        in_channels: channels of the images.
        num_classes: number of logits.
        width: channels of the first stage, 16 in the paper.

    Raises:
        ValueError: an argument is not among those named above.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2.

    >>> sum(p.numel() for p in ResNet(depth=20).parameters())
    269722
    """

    def __init__(
        self, depth: int = 20, shortcut: str = "A", in_channels: int = 3, num_classes: int = 10, width: int = 16
    ) -> None:
        super().__init__()
        if depth not in RESNET_DEPTHS:
            raise ValueError(f"depth={depth!r} is not valid: choose one of {', '.join(map(str, RESNET_DEPTHS))}")
        if shortcut not in SHORTCUTS:
            raise ValueError(f"shortcut={shortcut!r} is not valid: choose one of {', '.join(SHORTCUTS)}")
        _require_positive(in_channels=in_channels, num_classes=num_classes, width=width)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.layer1 = self._stage(width, width, blocks, stride=1, shortcut=shortcut)
        self.layer2 = self._stage(width, 2 * width, blocks, stride=2, shortcut=shortcut)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, stride=2, shortcut=shortcut)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(4 * width, num_classes)
        kaiming_init(self)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int, stride: int, shortcut: str) -> nn.Sequential:
        first = BasicBlock(in_channels, out_channels, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W) to logits (N, num_classes)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(self.flatten(self.pool(x)))


def _conv_bn_relu(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """3x3 convolution without bias (BatchNorm has one), BatchNorm, ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class SmallCNN(nn.Module):
    """Every edge that quantization must handle, in about 19,000 parameters: BatchNorm, a residual add, two pools.

    Args:
        in_channels: channels of the images.
        num_classes: number of logits.
        width: channels of the first half; the second half has twice as many.

    Raises:
        ValueError: an argument is not a positive integer.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int = 16) -> None:
        super().__init__()
        _require_positive(in_channels=in_channels, num_classes=num_classes, width=width)
        self.stem = _conv_bn_relu(in_channels, width)
        self.block = BasicBlock(width, width)
        self.downsample = nn.MaxPool2d(2)
        self.conv1 = _conv_bn_relu(width, 2 * width)
        self.conv2 = _conv_bn_relu(2 * width, 2 * width, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(2 * width, num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, H, W), H and W at least 8, to logits (N, num_classes)."""
        x = self.downsample(self.block(self.stem(x)))
        x = self.conv2(self.conv1(x))
        return self.linear(self.flatten(self.pool(x)))


class MLP(nn.Module):
    """Flatten, then linear layers with ReLU between them.

    Args:
        in_channels: channels of the images.
        image_size: height and width of the images, in pixels.
        num_classes: number of logits.
        hidden: width of each hidden layer; may be empty.

    Raises:
        ValueError: a size is not a positive integer.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, hidden: Sequence[int] = (128, 64)) -> None:
        super().__init__()
        _require_positive(in_channels=in_channels, image_size=image_size, num_classes=num_classes)
        _require_positive(**{f"hidden[{i}]": width for i, width in enumerate(hidden)})
        widths = [in_channels * image_size**2, *hidden]
        self.flatten = nn.Flatten()
        self.hidden = nn.Sequential()
        for fan_in, fan_out in pairwise(widths):
            self.hidden.append(nn.Linear(fan_in, fan_out)).append(nn.ReLU())
        self.linear = nn.Linear(widths[-1], num_classes)
        kaiming_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, in_channels, image_size, image_size) to logits (N, num_classes)."""
        return self.linear(self.hidden(self.flatten(x)))
