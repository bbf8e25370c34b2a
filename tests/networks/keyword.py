"""Keyword spotting on microcontrollers."""

from torch import Tensor, nn

from tests.networks.blocks import conv_norm


class DSCNN(nn.Module):
    """Depthwise separable convolutions on 49 frames of 10 MFCCs; 38.6 KB with 8-bit weights and activations ("S").

    Source: Zhang et al. 2017, "Hello Edge: Keyword Spotting on Microcontrollers", section 3.4, tables 1 and 2 of the
    appendix (DS-CNN small: 10x4 kernel with stride 2, then four separable layers of 64 channels).

    Args:
        width: channels.
        depth: separable layers.
    """

    def __init__(self, classes: int = 12, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        # 49x10 -> 25x5, what TensorFlow's padding "SAME" makes of it
        conv = nn.Conv2d(1, width, (10, 4), 2, bias=False)
        layers: list[nn.Module] = [nn.ZeroPad2d((1, 1, 4, 5)), conv, nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(depth):
            layers += [conv_norm(width, width, 3, groups=width, activation=nn.ReLU),
                       conv_norm(width, width, 1, activation=nn.ReLU)]  # fmt: skip
        self.features, self.dropout = nn.Sequential(*layers), nn.Dropout(0.2)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.fc(self.dropout(x.mean(dim=(2, 3))))
