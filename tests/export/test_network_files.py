"""Files of networks with attention and recurrence, held to the parity rule. Networks of images: `test_networks`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.export.parity import ParityLimits, measure
from qat.ptq import PTQConfig, finalize
from qat.zoo.gpt import CharGPT
from tests.networks.recurrent import Forecaster, KeywordGRU
from tests.networks.vit import ViT

SAMPLES = 48


def sequences(*shape: int) -> Tensor:
    """Sums of waves, so that hidden states move."""
    steps = torch.arange(shape[0], dtype=torch.float32)[None, :, None]
    return torch.sin(steps * torch.rand(SAMPLES, 1, shape[1]) + 6 * torch.rand(SAMPLES, 1, shape[1]))


class Case(NamedTuple):
    """A network, its inputs, the formats that hold it, and the dimension of its classes (None: it has none)."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    formats: tuple[str, ...] = ("int8", "onnx")
    class_dim: int | None = 1


CASES = {
    "ViT": Case(ViT, lambda: (torch.randn(SAMPLES, 3, 16, 16),)),
    "char GPT": Case(
        lambda: CharGPT(num_classes=11, context=12, n_layer=2, n_head=2, width=16),
        lambda: (torch.randint(11, (SAMPLES, 12)),), class_dim=-1,
    ),
    "GRU": Case(
        lambda: KeywordGRU(6, 8, 4), lambda: (sequences(9, 6), torch.randint(3, 10, (SAMPLES,))), ("int8",)
    ),
    "LSTM": Case(lambda: Forecaster(3, 8, 4), lambda: (sequences(12, 3),), ("int8",), None),
}  # fmt: skip


def held() -> list[tuple[str, str]]:
    """Every network with its targets: ONNX Runtime's cannot hold recurrent layers."""
    return [(name, t) for name, case in CASES.items() for t in ("generic", "onnxruntime_x86")[: len(case.formats)]]


@pytest.mark.parametrize(("name", "target"), held())
@torch.no_grad()
def test_what_trains_is_what_runs(name: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    net, inputs = case.make().eval(), case.inputs()
    example = tuple(x[:4] for x in inputs)
    prepared: Any = qat.prepare(net, qat.preset("int8", target=target), example)
    finalize(prepared, [inputs], PTQConfig(), trained=False)
    network = qat.lower(prepared)
    paths = qat.export(network, tmp_path, example, case.formats)
    pairs = measure(prepared, network, paths, inputs, target=target, class_dim=case.class_dim or 1)
    assert len(pairs) == 2 * len(paths) - 1
    for pair, parity in pairs.items():
        assert parity.layers
        parity.check(pair, ParityLimits(agreement=1.0 if case.class_dim else 0.0))
