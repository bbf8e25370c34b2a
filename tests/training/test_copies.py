"""Copies, pickles, state dicts, recomputed activations, memory formats, and networks without memory."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qat
from qat.modes import quantizers, set_mode, set_progress
from qat.scheme import Granularity, QuantConfig, TensorScheme

CHANNEL = Granularity.channel
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "running": ({}, {"range": "running", "observer": "ema"}),
    "percentile": ({}, {"observer": "percentile"}),
    "learned": ({"range": "learned", "granularity": CHANNEL}, {"range": "lsq_plus", "symmetric": False}),
    "per channel": ({"granularity": CHANNEL}, {"granularity": CHANNEL}),
    "dorefa": ({"range": "dorefa"}, {"range": "dorefa"}),
    "adaptive, dsq": ({"rounding": "adaptive", "range": "fixed"}, {"gradient": "dsq"}),
    "codebook": ({"format": "codebook", "granularity": CHANNEL, "range": "learned"}, {}),
}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def config(name: str) -> QuantConfig:
    weight, activation = SCHEMES[name]
    return QuantConfig(
        weight=TensorScheme(**{"bits": 4, "range": "dynamic", **weight}),
        activation=TensorScheme(**{"bits": 8, "range": "fixed", **activation}),
    )


def images() -> Tensor:
    return torch.randn(4, 3, 8, 8)


def calibrated(name: str) -> nn.Module:
    prepared = qat.prepare(net(), config(name), images())
    qat.calibrate(prepared, [images()])
    return prepared.train()


def step(network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of training: the loss, and everything that the network holds afterwards."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    loss = network(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach(), network.state_dict()


def check_same(
    got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], **near: float
) -> None:
    near = near or {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(got[0], expected[0], **near)
    assert got[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        assert torch.allclose(got[1][name].double(), value.double(), equal_nan=True, **near), name


def through_torch_save(network: nn.Module) -> nn.Module:
    memory = io.BytesIO()
    torch.save(network.state_dict(), memory)
    memory.seek(0)
    fresh = qat.prepare(net(), next(iter([network.meta["qat"]["config"]])), images())
    fresh.load_state_dict(torch.load(memory, weights_only=True))
    set_mode(fresh, "quantize")
    return fresh.train()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "state dict": through_torch_save,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_copy_trains_as_the_original_and_apart_from_it(name: str, way: str) -> None:
    network, x = calibrated(name), images()
    twin = COPIES[way](network)
    for n in (network, twin):
        set_progress(n, 0.5)
    before = copy.deepcopy(network.state_dict())
    got = step(twin, x)
    assert all(torch.equal(t.nan_to_num(), before[key].nan_to_num()) for key, t in network.state_dict().items())
    check_same(got, step(network, x))
    assert [q.mode for _, q in quantizers(twin)] == [q.mode for _, q in quantizers(network)]
    assert twin.meta.keys() == network.meta.keys() if way != "state dict" else True


@pytest.mark.parametrize("mode", ["observe", "quantize"])
@pytest.mark.parametrize("name", ["running", "percentile", "learned", "codebook"])
def test_a_recomputed_forward_observes_once(name: str, mode: str) -> None:
    """Activation checkpointing runs a forward again in the backward pass; ranges and tables must not move again."""
    network, x = calibrated(name), images()
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eval()  # it counts a recomputed batch twice, as it does in float networks
    set_mode(network, mode)
    twin = copy.deepcopy(network)

    class Recomputed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = twin

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    first = Recomputed()
    for _ in range(3):
        got, expected = step(first, x), step(network, x)
        check_same((got[0], twin.state_dict()), expected)


@pytest.mark.parametrize("name", SCHEMES)
def test_channels_last_is_kept_and_computes_the_same(name: str) -> None:
    network, x = calibrated(name), images()
    twin = copy.deepcopy(network).to(memory_format=torch.channels_last)
    formats: list[bool] = []
    for _, quantizer in quantizers(twin):
        quantizer.register_forward_hook(
            lambda _, args, y: formats.append(
                y.dim() != 4 or not args[0].is_contiguous(memory_format=torch.channels_last)
                or y.is_contiguous(memory_format=torch.channels_last)
            )
        )  # fmt: skip
    got = step(twin, x.to(memory_format=torch.channels_last))
    assert all(formats)
    assert len(formats) == len(list(quantizers(twin)))
    check_same(got, step(network, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_network_is_prepared_without_memory_and_filled_later(name: str) -> None:
    network, x = calibrated(name), images()
    with torch.device("meta"):
        empty = qat.prepare(net(), config(name), images())
    assert {t.device.type for t in (*empty.parameters(), *empty.buffers())} == {"meta"}
    empty.to_empty(device="cpu")
    empty.load_state_dict(network.state_dict())
    set_mode(empty, "quantize")
    check_same(step(empty.train(), x), step(network, x))


def note(module: nn.Module, args: object, output: Tensor) -> None:
    """A user's hook, which a pickle finds by its name."""
    module.get_submodule("8").seen = output.shape


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_keeps_the_hooks_of_the_network(way: str) -> None:
    network = calibrated("running")
    network.register_forward_hook(note)
    twin = COPIES[way](network)
    twin(images())
    assert twin.get_submodule("8").seen == (4, 3)
    assert not hasattr(network.get_submodule("8"), "seen")
