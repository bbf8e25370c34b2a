"""Quantizers compute in float32 whatever the network's dtype, and give back the dtype of what they got."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.modes import quantizers, set_mode
from qat.observers import OBSERVERS
from qat.scheme import Granularity, QuantConfig, TensorScheme

HALVES = (torch.bfloat16, torch.float16)
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "running": ({}, {"range": "running", "observer": "ema"}),
    "learned": ({"range": "learned", "granularity": Granularity.channel}, {"range": "learned"}),
    "dynamic": ({}, {"range": "dynamic", "granularity": Granularity.token}),
    "dorefa": ({"range": "dorefa"}, {"range": "dorefa"}),
    "adaptive": ({"rounding": "adaptive", "range": "fixed"}, {}),
    "apot": ({"format": "apot"}, {"format": "apot"}),
    "codebook": ({"format": "codebook", "granularity": Granularity.channel, "range": "learned"}, {}),
}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def prepared(name: str) -> nn.Module:
    weight, activation = SCHEMES[name]
    config = QuantConfig(
        weight=TensorScheme(**{"bits": 4, "range": "dynamic", **weight}),
        activation=TensorScheme(**{"bits": 8, "range": "fixed", **activation}),
    )
    return qat.prepare(Small(), config, torch.randn(2, 2, 6, 6))


def kept(net: nn.Module) -> dict[str, Tensor]:
    """What quantizers hold."""
    return {f"{path}.{name}": t for path, q in quantizers(net) for name, t in q.state_dict(keep_vars=True).items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_cast_leaves_quantizers_as_they_are(name: str, dtype: torch.dtype) -> None:
    net = prepared(name)
    qat.calibrate(net, [torch.randn(4, 2, 6, 6)])
    before = {key: t.detach().clone() for key, t in kept(net).items()}
    net.to(dtype)
    assert {t.dtype for key, t in net.named_parameters() if "quantizer" not in key} == {dtype}
    for key, t in kept(net).items():
        assert t.dtype == before[key].dtype
        assert torch.equal(t.nan_to_num(), before[key].nan_to_num())
    net.train()
    loss = net(torch.randn(4, 2, 6, 6, dtype=dtype)).square().mean()
    assert loss.dtype == dtype
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in net.parameters())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SCHEMES)
def test_the_output_is_the_float32_result_rounded_once(name: str, dtype: torch.dtype) -> None:
    net = prepared(name)
    qat.calibrate(net, [torch.randn(4, 2, 6, 6)])
    net.eval()
    quantizer = net.get_submodule("conv").weight_quantizer
    weight = net.get_submodule("conv").weight.detach().to(dtype)
    assert torch.equal(quantizer(weight), quantizer(weight.float()).to(dtype))


@pytest.mark.parametrize("name", SCHEMES)
def test_quantizers_are_born_in_float32(name: str) -> None:
    """Lightning's bf16-true builds and runs networks with bfloat16 as the default dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        net = prepared(name)
        qat.calibrate(net, [torch.randn(4, 2, 6, 6)])
        net(torch.randn(4, 2, 6, 6)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {t.dtype for t in kept(net).values()} <= {torch.float32, torch.float64, torch.uint8, torch.int64}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_observers_see_float32(observer: str) -> None:
    config = QuantConfig(
        weight=TensorScheme(bits=8, range="dynamic"), activation=TensorScheme(bits=8, observer=observer)
    )
    net = qat.prepare(Small(), config, torch.randn(2, 2, 6, 6))
    x = torch.randn(8, 2, 6, 6).bfloat16()
    ranges = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            quantizer = next(q for name, q in quantizers(net) if name.startswith("quantizers."))
            quantizer.observer.reset()
            quantizer.observe(x.to(dtype))
            ranges.append(quantizer.observer.range())
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(*ranges, strict=True))
    assert all(t.dtype == torch.float32 for t in ranges[1])


class Fit(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.losses = net, []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.dtypes = {self.net(batch[0]).dtype}
        loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def fit(name: str, precision: Any, accelerator: str = "cpu") -> tuple[nn.Module, Fit]:
    torch.manual_seed(0)
    net = prepared(name)
    x = torch.randn(32, 2, 6, 6)
    qat.calibrate(net, [x])
    set_mode(net, "quantize")
    module = Fit(net.train())
    loader = DataLoader(TensorDataset(x, x.mean((1, 2, 3)).gt(0).long()), batch_size=8)
    trainer = L.Trainer(
        accelerator=accelerator, devices=1, precision=precision, max_epochs=3, logger=False, barebones=True
    )
    trainer.fit(module, loader)
    return net, module


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["running", "learned"])
def test_lightning_trains_in(precision: Any, name: str) -> None:
    net, module = fit(name, precision)
    assert module.dtypes == {torch.bfloat16}
    assert {t.dtype for t in kept(net).values()} <= {torch.float32, torch.float64}
    _, reference = fit(name, "32-true")
    assert module.losses == pytest.approx(reference.losses, rel=0.05)
    assert module.losses[-1] < module.losses[0]
    weights = {t.dtype for key, t in net.named_parameters() if "quantizer" not in key}
    assert weights == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


def test_half_precision_with_loss_scaling_on_a_cpu() -> None:
    """Lightning's 16-mixed is for GPUs; its parts, autocast and GradScaler, run here."""
    losses = {}
    for half in (False, True):
        torch.manual_seed(0)
        net = prepared("learned")
        x = torch.randn(32, 2, 6, 6)
        qat.calibrate(net, [x])
        net.train()
        optimizer, losses[half] = torch.optim.SGD(net.parameters(), lr=0.05), []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=half)
        for _ in range(6):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16, enabled=half):
                out = net(x)
                loss = nn.functional.cross_entropy(out.float(), x.mean((1, 2, 3)).gt(0).long())
            assert out.dtype == (torch.float16 if half else torch.float32)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses[half].append(float(loss.detach()))
        assert scaler.get_scale() == (1024.0 if half else 1.0)
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["running", "learned"])
def test_lightning_trains_in_half_precision(name: str) -> None:
    _, module = fit(name, "16-mixed", "gpu")
    _, reference = fit(name, "32-true", "gpu")
    assert module.dtypes == {torch.float16}
    assert module.losses == pytest.approx(reference.losses, rel=0.05)
