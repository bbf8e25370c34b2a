"""Networks as people bring them, small: transformers, recurrent ones, tied weights, modules called several times."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.record import run
from qat.scheme import Granularity, QuantConfig, TensorScheme
from qat.structures import tensors
from qat.zoo.gpt import Block, CharGPT
from tests.networks.recurrent import Forecaster, KeywordGRU
from tests.networks.resnet import ResNet20

SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "running": ({"bits": 8, "range": "dynamic"}, {"range": "running", "observer": "ema"}),
    "learned": ({"bits": 4, "range": "learned"}, {"range": "learned"}),
}
"""Name -> the weights' scheme, a scale a channel, and the activations', 8 bits."""


class CalledAgain(nn.Module):
    """One block, called three times, and one linear layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU())
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.block(x)
        return self.head(self.mix(torch.tanh(self.mix(x))))


class Saving(nn.Module):
    """A transformer that computes its blocks again in the backward pass, by its own code."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.reentrant = nn.Embedding(20, 16), nn.Linear(16, 20), reentrant
        self.blocks = nn.ModuleList(Block(16, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x)
        for block in self.blocks:
            y = checkpoint(block, y, use_reentrant=self.reentrant) if self.training else block(y)
        return self.head(y)


class Separable(nn.Module):
    """Depthwise and transposed convolutions, a residual, and a squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.up, self.last = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        y = F.hardswish(self.point(F.relu(self.depth(x))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.last(F.relu(self.up(x + y)))


def llama(**changes: Any) -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, use_cache=False, **changes,
        )
    )  # fmt: skip


def bert() -> nn.Module:
    import transformers

    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(20, (4, 8))


def named_tokens() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


@dataclass(frozen=True)
class Case:
    """How a network is made, and a batch of its inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]


NETWORKS: dict[str, Case] = {
    "gpt": Case(lambda: CharGPT(20, 8, 1, 2, 16), tokens),
    "gpt, tied": Case(lambda: CharGPT(20, 8, 1, 2, 16, tied_head=True), tokens),
    "gpt that recomputes": Case(lambda: Saving(False), tokens),
    "gpt that recomputes, reentrant": Case(lambda: Saving(True), tokens),
    "lstm": Case(lambda: Forecaster(3, 8, 4), lambda: torch.randn(4, 6, 3)),
    "gru, packed": Case(lambda: KeywordGRU(5, 8, 3), lambda: (torch.randn(4, 6, 5), torch.tensor([6, 3, 5, 1]))),
    "called again": Case(CalledAgain, lambda: torch.randn(4, 8)),
    "resnet": Case(lambda: ResNet20(4, 4, 1), lambda: torch.randn(16, 3, 32, 32)),
    "separable": Case(Separable, images),
}
if importlib.util.find_spec("transformers"):
    NETWORKS |= {
        "llama": Case(llama, named_tokens),
        "llama, tied": Case(lambda: llama(tie_word_embeddings=True), named_tokens),
        "bert": Case(bert, named_tokens),
    }


def config(scheme: str) -> QuantConfig:
    weight, activation = SCHEMES[scheme]
    return QuantConfig(
        weight=TensorScheme(granularity=Granularity.channel, **weight), activation=TensorScheme(bits=8, **activation)
    )


def prepared(network: str, scheme: str) -> nn.Module:
    """Calibrated, in training mode."""
    case = NETWORKS[network]
    net = qat.prepare(case.make(), config(scheme), case.inputs())
    qat.calibrate(net, [case.inputs(), case.inputs()])
    return net.train()


def loss_of(net: nn.Module, inputs: Any) -> Tensor:
    """Mean square of everything that a network returns; what is dropped at random is the same for each seed."""
    torch.manual_seed(1)
    results = [t.float().square().mean() for t in tensors(run(net, inputs)) if t.is_floating_point()]
    return torch.stack(results).sum()
