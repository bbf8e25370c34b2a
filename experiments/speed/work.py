"""The work that speed is measured on: a step of training of a ResNet-20 and of a transformer language model.

Plain PyTorch, so that it can be built in any environment that has torch: qat's zoo needs nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.zoo.gpt import CharGPT
from qat.zoo.models import ResNet


@dataclass(frozen=True, kw_only=True)
class Work:
    """A network with a batch of random data.

    Attributes:
        net: float, in training mode.
        x, y: inputs and targets.
        learning_rate: of AdamW for language models, of SGD with momentum else.
    """

    net: nn.Module
    x: Tensor
    y: Tensor
    learning_rate: float

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """As networks of this kind are trained."""
        parameters = [p for p in net.parameters() if p.requires_grad]
        if self.x.dtype == torch.int64:
            return torch.optim.AdamW(parameters, self.learning_rate)
        return torch.optim.SGD(parameters, self.learning_rate, momentum=0.9, weight_decay=1e-4)

    def step_of(self, net: nn.Module) -> Callable[[], Tensor]:
        """One step as a function: forward, backward, optimizer. It returns the loss."""
        optimizer = self.optimizer(net)

        def step() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(net(self.x).flatten(0, -2), self.y.flatten())
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step


def resnet20(batch: int = 128, depth: int = 20, width: int = 16, device: str = "cpu") -> Work:
    """ResNet-20 on images of 32 x 32."""
    torch.manual_seed(0)
    net = ResNet(depth, shortcut="B", width=width)
    x = F.avg_pool2d(torch.randn(batch, 3, 34, 34), 3, 1)  # neighbouring pixels are alike, as in pictures
    y = torch.randint(0, 10, (batch,))
    return _on(device, net, x, y, 0.01)


def lm(batch: int = 16, length: int = 128, n_layer: int = 4, width: int = 256, device: str = "cpu") -> Work:
    """A GPT with a vocabulary of 1024, 4 layers of 256 channels."""
    torch.manual_seed(0)
    net = CharGPT(1024, context=length, n_layer=n_layer, n_head=4, width=width)
    ids = torch.randint(0, 1024, (batch, length + 1))
    return _on(device, net, ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), 1e-4)


def _on(device: str, net: nn.Module, x: Tensor, y: Tensor, learning_rate: float) -> Work:
    return Work(net=net.train().to(device), x=x.to(device), y=y.to(device), learning_rate=learning_rate)


WORK: dict[str, Callable[..., Work]] = {"resnet20": resnet20, "lm": lm}
