"""U-Net: an encoder, a decoder, and what the encoder saw joined to the decoder at every size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def double(inputs: int, outputs: int, padding: int) -> nn.Sequential:
    """Two 3x3 convolutions with ReLU; with BatchNorm, as the later networks of this shape have it."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=padding), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def cropped(skip: Tensor, x: Tensor) -> Tensor:
    """The middle of `skip`, of the size of `x`."""
    height, width = x.shape[2:]
    top, left = (skip.size(2) - height) // 2, (skip.size(3) - width) // 2
    return skip[:, :, top : top + height, left : left + width]


class UNet(nn.Module):
    """23 convolutional layers; without padding, 572x572 pixels become 388x388.

    Source: Ronneberger et al. 2015, "U-Net: Convolutional Networks for Biomedical Image Segmentation", figure 1.

    Args:
        width: channels of the first level.
        depth: levels above the lowest.
        padding: 0 as published (the encoder's maps are cropped), or 1, which keeps sizes.
        up: "transposed" as published, or a mode of `F.interpolate` followed by a 1x1 convolution.
    """

    def __init__(
        self, classes: int = 2, width: int = 64, depth: int = 4, padding: int = 0, up: str = "transposed"
    ) -> None:
        super().__init__()
        sizes = [width * 2**i for i in range(depth + 1)]
        self.down = nn.ModuleList(double(a, b, padding) for a, b in zip([1, *sizes[:-2]], sizes[:-1], strict=True))
        self.middle = double(sizes[-2], sizes[-1], padding)
        self.mode = up
        pairs = list(zip(sizes[:0:-1], sizes[-2::-1], strict=True))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(a, b, 2, stride=2) if up == "transposed" else nn.Conv2d(a, b, 1) for a, b in pairs
        )
        self.join = nn.ModuleList(double(2 * b, b, padding) for _, b in pairs)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for up, join, skip in zip(self.up, self.join, reversed(skips), strict=True):
            x = up(x if self.mode == "transposed" else F.interpolate(x, scale_factor=2, mode=self.mode))
            x = join(torch.cat([cropped(skip, x), x], dim=1))
        return self.head(x)
