"""Adaptive rounding: against the paper's equations in float64, random and exhaustive search, and accuracy."""

import copy
import itertools
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.encoding import encode
from qat.fake_quant import FakeQuantize
from qat.layers import QuantizedLayer
from qat.mode import Mode
from qat.modes import quantizers
from qat.numerics.rounding import adaptive, penalized, rectified_logits, rectified_sigmoid, rounding_penalty
from qat.ptq import PTQConfig, finalize, learn_rounding
from qat.training import QATModule, QATSchedule, parameter_groups
from qat.zoo.data import Digits
from qat.zoo.models import SmallCNN

# ---- the formulas ----------------------------------------------------------------------------------------------------


def paper_h(v: np.ndarray) -> np.ndarray:
    """Equation 23, with zeta 1.1 and gamma -0.1."""
    return np.clip(1 / (1 + np.exp(-v)) * (1.1 + 0.1) - 0.1, 0, 1)


def paper_regularizer(v: np.ndarray, beta: float) -> float:
    """Equation 24."""
    return float(np.sum(1 - np.abs(2 * paper_h(v) - 1) ** beta))


LOGITS = np.linspace(-4, 4, 81)  # both ends are clipped


def test_equations_23_and_24() -> None:
    logits = torch.from_numpy(LOGITS)
    np.testing.assert_allclose(rectified_sigmoid(logits).numpy(), paper_h(LOGITS), atol=1e-12)
    for beta in (20.0, 7.5, 2.0):
        assert float(rounding_penalty(logits, beta)) == pytest.approx(paper_regularizer(LOGITS, beta), abs=1e-9)
    fractions = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(rectified_sigmoid(rectified_logits(fractions)), fractions, atol=1e-12)


def test_equation_22() -> None:
    torch.manual_seed(0)
    v, logits = 5 * torch.randn(81, dtype=torch.float64), torch.from_numpy(LOGITS)
    soft = adaptive(v, logits, soft=True)
    np.testing.assert_allclose(soft.numpy(), np.floor(v.numpy()) + paper_h(LOGITS), atol=1e-12)
    hard = adaptive(v, logits, soft=False)
    np.testing.assert_array_equal(hard.numpy(), np.floor(v.numpy()) + (paper_h(LOGITS) >= 0.5))


@pytest.mark.parametrize(("progress", "beta"), [(0.1, None), (0.2, 20.0), (0.6, 11.0), (1.0, 2.0)])
def test_equation_25_has_the_gradient_of_error_and_penalty(progress: float, beta: float | None) -> None:
    """The gradient that `penalized` injects, against central differences of the transcription."""
    inside = LOGITS[np.abs(LOGITS) < 2.3]  # where h is not clipped
    logits = torch.from_numpy(inside).requires_grad_()
    target = torch.rand(len(inside), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = (rectified_sigmoid(penalized(logits, progress, 0.03)) - target).square().sum()
    assert float(loss.detach()) == pytest.approx(float(np.sum((paper_h(inside) - target.numpy()) ** 2)))
    loss.backward()

    def whole(v: np.ndarray) -> float:
        error = np.sum((paper_h(v) - target.numpy()) ** 2)
        return float(error) + (0.03 * paper_regularizer(v, beta) if beta else 0.0)

    steps = 1e-6 * np.eye(len(inside))
    expected = [(whole(inside + step) - whole(inside - step)) / 2e-6 for step in steps]
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), expected, atol=1e-7)


# ---- one layer -------------------------------------------------------------------------------------------------------


def prepare(
    net: nn.Module, x: Tensor | list[Tensor], bits: int = 4, activation: int | None = None, **weight: Any
) -> Any:
    """Prepared and calibrated, with adaptive rounding of fixed ranges."""
    batches = x if isinstance(x, list) else [x]
    config: dict[str, Any] = {"weight": {"bits": bits, "rounding": "adaptive", "range": "fixed", **weight}}
    if activation:
        config |= {"activation": {"bits": activation}, "input": {"bits": activation}}
    prepared = qat.prepare(net.eval(), qat.QuantConfig.from_dict(config), batches[0])
    qat.calibrate(prepared, batches)
    return prepared


def correlated(samples: int, inputs: int) -> Tensor:
    """Inputs whose errors add up or cancel: what nearest rounding does not see."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(3, inputs, generator=generator)
    noise = torch.randn(samples, inputs, generator=generator)
    return torch.randn(samples, 3, generator=generator) @ mixing + 0.3 * noise + 0.5


def units(layer: Any) -> Tensor:
    """Weights in units of their scale, float64."""
    return layer.weight.detach().double() / layer.weight_quantizer.qparams(layer.weight)[0].double().reshape(-1, 1)


def squared_error(x: Tensor, v: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Mean over samples and outputs of `((v - q) scale x)^2`, float64; q may have leading dimensions."""
    return (((v - q) * scale.double().reshape(-1, 1)) @ x.double().T).square().mean(dim=(-2, -1))


def test_error_of_a_linear_layer_is_far_below_nearest_and_random_search() -> None:
    torch.manual_seed(0)
    x = correlated(512, 24)
    prepared = prepare(nn.Sequential(nn.Linear(24, 6)), x, granularity="channel")
    layer = prepared.get_submodule("0")
    (result,) = learn_rounding(prepared, [x], steps=800, progress=False)
    v, scale = units(layer), layer.weight_quantizer.scale
    learned = encode(layer.weight_quantizer, layer.weight).codes.double()
    assert torch.isin(learned - v.floor(), torch.tensor([0.0, 1.0]).double()).all()
    nearest = squared_error(x, v, v.round(), scale)
    assert result.nearest == pytest.approx(float(nearest), rel=1e-4)
    assert result.learned == pytest.approx(float(squared_error(x, v, learned, scale)), rel=1e-4)
    assert result.changed == pytest.approx(float((learned != v.round()).double().mean()))
    assert result.kept
    assert 0.05 < result.changed < 0.6
    assert result.learned < 0.35 * result.nearest  # three directions hold nearly all of the inputs
    drawn = torch.floor(v + torch.rand(200, *v.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    assert result.learned < 0.5 * float(squared_error(x, v, drawn, scale).min())


def test_the_best_of_all_roundings_is_found_or_nearly() -> None:
    torch.manual_seed(3)
    x = correlated(256, 8)
    ratios, above_nearest = [], []
    for _ in range(6):
        prepared = prepare(nn.Sequential(nn.Linear(8, 1)), x, bits=3)
        layer = prepared.get_submodule("0")
        (result,) = learn_rounding(prepared, [x], steps=500, progress=False)
        v, scale = units(layer), layer.weight_quantizer.scale
        every = torch.tensor(list(itertools.product([0.0, 1.0], repeat=8)), dtype=torch.float64).reshape(256, 1, 8)
        inside = (v.floor() + every).clamp(layer.weight_quantizer.quant_min, layer.weight_quantizer.quant_max)
        errors = squared_error(x, v, inside, scale)
        best, in_use = float(errors.min()), min(result.learned, result.nearest)
        assert int((errors < in_use * (1 - 1e-4)).sum()) < 16  # of 256; a relaxation finds a local optimum
        ratios.append(in_use / best)
        above_nearest.append(result.nearest / best)
    assert min(ratios) < 1.001
    assert np.mean(ratios) < 2
    assert np.mean(above_nearest) > 5


def test_where_nothing_can_be_gained_nearest_is_kept() -> None:
    torch.manual_seed(0)
    x = torch.eye(12)  # every weight on its own: nearest is the optimum
    prepared = prepare(nn.Sequential(nn.Linear(12, 5)), x)
    layer = prepared.get_submodule("0")
    nearest = encode(layer.weight_quantizer, layer.weight).codes
    (result,) = learn_rounding(prepared, [x], steps=60, lr=0.5, penalty=10.0, progress=False)
    assert result.learned >= result.nearest
    assert not result.kept
    assert result.changed == 0
    assert torch.equal(encode(layer.weight_quantizer, layer.weight).codes, nearest)


# ---- networks --------------------------------------------------------------------------------------------------------


class Sites(nn.Module):
    """Grouped and one-dimensional convolutions, a layer called twice on different sizes, a linear on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.norm = nn.Conv2d(4, 8, 3, groups=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shared, self.pool = nn.Conv2d(8, 8, 1), nn.MaxPool2d(2)
        self.conv1d, self.sequence = nn.Conv1d(8, 6, 3), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.grouped(x)))
        y = self.shared(self.pool(torch.relu(self.shared(y))))
        return self.sequence(self.conv1d(y.flatten(2)))


def images(count: int = 96) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 4, 6, 6, generator=generator)
    return list((x + x.mean(dim=(1, 2, 3), keepdim=True) * 8).split(32))


SCHEMES = {
    "tensor": {"granularity": "tensor"},
    "channel": {"granularity": "channel"},
    "group": {"granularity": "group", "group_size": 5, "allow_padding": True},
    "affine": {"granularity": "channel", "symmetric": False},
    "dynamic": {"granularity": "channel", "range": "dynamic"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_of_layer_and_scale(scheme: str) -> None:
    torch.manual_seed(0)
    prepared = prepare(Sites(), images(), bits=3, activation=8, **SCHEMES[scheme])
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in prepared.modules())
    prepared.train()
    torch.manual_seed(5)
    results = learn_rounding(prepared, images(), steps=120, lr=0.03, progress=False)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # the run's random numbers go on as if nothing had been learned
    assert [r.layer for r in results] == ["grouped", "shared", "conv1d", "sequence"]
    assert sum(r.kept for r in results) >= 3
    assert np.mean([min(r.learned / r.nearest, 1.0) for r in results]) < 0.9
    changed = {k for k, v in prepared.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{r.layer}.weight_quantizer.logits" for r in results}
    assert all(p.grad is None for p in prepared.parameters())
    assert {q.mode for _, q in quantizers(prepared)} == {Mode.quantize}
    assert all(m.training for m in prepared.modules())
    assert sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in prepared.modules()) == hooks
    for _, layer in layers(prepared):  # decided: soft in training is hard in evaluation
        soft = layer.quantized_weight().detach()
        layer.eval()
        assert torch.allclose(soft, layer.quantized_weight().detach(), atol=1e-5)
        layer.train()


def layers(prepared: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in prepared.named_modules() if isinstance(m, QuantizedLayer)]


def test_error_is_measured_behind_batch_norm_and_relu_against_the_float_networks_input() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    x = correlated(128, 6)
    net.train()(x)
    prepared = prepare(net, [x], bits=3, activation=4)
    first, *_ = learn_rounding(prepared, [x], steps=40, progress=False)
    reference = copy.deepcopy(prepared)  # its first layer is decided
    layer, quantizer = prepared.get_submodule("2"), prepared.get_submodule("2").weight_quantizer
    assert isinstance(quantizer, FakeQuantize)
    _, second, _ = learn_rounding(prepared, [x], steps=40, progress=False)
    net.double().eval()
    with torch.no_grad():
        target = net[:5](x.double())
        inputs = reference.get_submodule("quantizers.0").eval()(
            reference.get_submodule("0").eval()(reference.get_submodule("quantizers.input").eval()(x))
        )
        weight = layer.eval().quantized_weight().double()
        got = net[4](net[3](F.linear(inputs.double(), weight, layer.bias.detach().double())))
    error = float((got - target).square().mean())
    assert first.layer == "0"
    assert (second.learned if second.kept else second.nearest) == pytest.approx(error, rel=1e-3)


def test_there_is_nothing_to_do_or_too_little_to_do_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    assert learn_rounding(prepare(nn.Sequential(nn.Linear(6, 2)), x, rounding="nearest"), [x]) == []
    with pytest.raises(ValueError, match="got none"):
        learn_rounding(prepare(nn.Sequential(nn.Linear(6, 2)), x), [])
    config = qat.QuantConfig.from_dict({"weight": {"bits": 4, "rounding": "adaptive"}})
    with pytest.raises(RuntimeError, match="no range yet"):
        learn_rounding(qat.prepare(nn.Sequential(nn.Linear(6, 2)).eval(), config, x), [x])


# ---- finalize --------------------------------------------------------------------------------------------------------


def test_finalize_learns_on_float_weights_and_keeps_what_training_learned() -> None:
    torch.manual_seed(0)
    x = correlated(128, 6)

    def changed(config: PTQConfig, trained: bool) -> float:
        """Share of weights that `finalize` leaves on another integer than the nearest one, half of them before."""
        prepared = prepare(nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)), x, activation=8)
        both = [layer for _, layer in layers(prepared)]
        for layer in both:
            layer.weight_quantizer.logits.data[:, ::2] *= -1
        finalize(prepared, [x], config, trained=trained)
        codes = [encode(layer.weight_quantizer, layer.weight).codes for layer in both]
        for layer in both:
            layer.weight_quantizer.start_rounding(layer.weight)
        nearest = [encode(layer.weight_quantizer, layer.weight).codes for layer in both]
        return float(torch.cat([(a != b).flatten() for a, b in zip(codes, nearest, strict=True)]).float().mean())

    assert changed(PTQConfig(), trained=True) == pytest.approx(0.5, abs=0.05)
    assert 0.01 < changed(PTQConfig(relearn_rounding=True, adaptive_rounding_steps=200), trained=True) < 0.3
    assert changed(PTQConfig(adaptive_rounding_steps=0), trained=False) == 0
    assert 0.01 < changed(PTQConfig(adaptive_rounding_steps=200), trained=False) < 0.3


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, list[Tensor], Tensor, Tensor]:
    """A briefly trained network, calibration inputs, the test set."""
    torch.manual_seed(0)
    data = Digits(name="digits", channels=1, image_size=8, num_classes=10, mean=[0.3], std=[0.4], batch_size=64)
    net = SmallCNN(in_channels=1, num_classes=10)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(5):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net.eval(), data.calibration_batches(8), *data.test_tensors()


def ptq(digits: Any, steps: int, bits: int, activation: int | None) -> tuple[fx.GraphModule, float]:
    net, batches, x, y = digits
    weight = {"bits": bits, "rounding": "adaptive", "range": "fixed", "observer": "mse", "granularity": "tensor"}
    config: dict[str, Any] = {"weight": weight}
    if activation:
        config |= {"activation": {"bits": activation}, "input": {"bits": activation}}
    prepared = qat.prepare(copy.deepcopy(net), qat.QuantConfig.from_dict(config), batches[0])
    finalize(prepared, batches, PTQConfig(adaptive_rounding_steps=steps), trained=False)
    with torch.no_grad():
        return prepared, float((prepared(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize(
    ("bits", "activation", "gain"), [pytest.param(3, None, 0.0, marks=pytest.mark.slow), (2, 8, 0.15)]
)
def test_accuracy_of_ptq_and_its_integers(digits: Any, bits: int, activation: int | None, gain: float) -> None:
    _, nearest = ptq(digits, 0, bits, activation)
    prepared, learned = ptq(digits, 250, bits, activation)
    assert learned >= nearest + gain
    assert learned > 0.9
    integer = qat.lower(prepared)
    x = digits[2]
    with torch.no_grad():
        assert (integer(x).argmax(1) == prepared(x).argmax(1)).float().mean() > 0.995
    moved = 0
    for name, layer in layers(prepared):
        quantizer = layer.weight_quantizer
        scale, _ = quantizer.qparams(layer.weight)
        v = (layer.weight / scale).detach().clamp(quantizer.quant_min, quantizer.quant_max)
        q = torch.round(layer.quantized_weight().detach() / scale)
        assert torch.isin(q - v.floor(), torch.tensor([0.0, 1.0])).all()
        moved += int((q != v.round()).sum())
        if activation is not None:  # a channel is mirrored on the grid where BatchNorm's gain is negative
            low, high = quantizer.quant_min, quantizer.quant_max
            mirrored, stored = low + high - q, integer.layer(name).weight.float()
            same = [(stored == expected).flatten(1).all(1) for expected in (q, mirrored)]
            assert (same[0] | same[1]).all()
    assert moved > 0


# ---- training --------------------------------------------------------------------------------------------------------


def module_for(net: nn.Module, batches: list[Tensor], bits: int = 4, **weight: Any) -> QATModule:
    weight = {"bits": bits, "rounding": "adaptive", "range": "fixed", "observer": "mse", **weight}
    config = qat.QuantConfig.from_dict({"weight": weight, "activation": {"bits": 8}, "input": {"bits": 8}})
    model = {"_target_": "qat.zoo.models.SmallCNN", "in_channels": 1, "num_classes": 10}
    task = {"_target_": "qat.zoo.tasks.Classification", "num_classes": 10}
    module = QATModule(model, task, {"_target_": "torch.optim.AdamW", "lr": 5e-4}, config.to_dict(), [1, 8, 8])
    module.net.load_state_dict({**module.net.state_dict(), **net.state_dict()})
    qat.calibrate(module.net, batches)
    return module


def fit(module: QATModule, path: Any, *callbacks: L.Callback, ckpt_path: Any = None, epochs: int = 8,
        schedule: QATSchedule | None = None, **options: Any) -> L.Trainer:  # fmt: skip
    L.seed_everything(0, verbose=False)
    data = Digits(name="digits", channels=1, image_size=8, num_classes=10, mean=[0.3], std=[0.4], batch_size=64)
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path,
                        limit_val_batches=0, callbacks=[schedule or QATSchedule(), *callbacks], **options)  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


def decided(net: nn.Module) -> float:
    """Share of roundings that are within 0.05 of up or down."""
    h = [rectified_sigmoid(q.logits.detach()).flatten() for _, q in quantizers(net) if q.adapts]
    return float(((2 * torch.cat(h) - 1).abs() > 0.9).float().mean())


def test_training_decides_and_exports_what_it_decided(digits: Any, tmp_path: Any) -> None:
    net, batches, x, y = digits
    accuracy = {}
    for rounding in ("nearest", "adaptive"):
        module = module_for(net, batches, rounding=rounding)
        fit(module, tmp_path)
        accuracy[rounding] = float((module.eval()(x).argmax(1) == y).float().mean())
    assert accuracy["adaptive"] > accuracy["nearest"] - 0.01
    assert decided(module.net) > 0.95
    finalize(module.prepared, batches, PTQConfig(), trained=True)
    integer = qat.lower(module.prepared)
    for name, layer in layers(module.prepared):
        quantizer = layer.weight_quantizer
        v = layer.weight.detach() / quantizer.scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
        q = torch.floor(v) + (quantizer.logits >= 0)
        q = q.clamp(quantizer.quant_min, quantizer.quant_max)
        mirrored, stored = quantizer.quant_min + quantizer.quant_max - q, integer.layer(name).weight.float()
        assert ((stored == q).flatten(1).all(1) | (stored == mirrored).flatten(1).all(1)).all()


def test_all_that_trains_gets_a_gradient_and_logits_a_rate_that_stays(digits: Any) -> None:
    net, batches, x, y = digits
    module = module_for(net, batches).train()
    F.cross_entropy(module(x[:32]), y[:32]).backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    groups = parameter_groups(module.net, weight_decay=0.1, scale_lr=1e-5, rounding_lr=0.02)
    assert groups[-1] == {"params": [q.logits for _, q in quantizers(module.net) if q.adapts], "weight_decay": 0.0,
                          "lr": 0.02, "kept_lr": 0.02}  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(list(module.net.parameters()))


def test_a_resumed_run_goes_on_with_what_was_learned(digits: Any, tmp_path: Any) -> None:
    net, batches, *_ = digits
    whole = module_for(net, batches)
    trainer = fit(whole, tmp_path, max_steps=30, epochs=-1)
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates[-1] == pytest.approx(20 / 30)
    assert max(rates[:-1]) < 1e-6

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "part.ckpt")

    part = module_for(net, batches)
    fit(part, tmp_path, Save(), max_steps=30, epochs=-1)
    saved = torch.load(tmp_path / "part.ckpt", weights_only=False)["state_dict"]
    resumed = module_for(net, batches)

    class Start(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 20:
                first.update({name: t.clone() for name, t in module.state_dict().items() if name.endswith("logits")})

    first: dict[str, Tensor] = {}
    trainer = fit(resumed, tmp_path, Start(), ckpt_path=tmp_path / "part.ckpt", max_steps=30, epochs=-1)
    assert len(first) == 6
    assert all(torch.equal(saved[name], logits) for name, logits in first.items())
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx(rates, abs=1e-9)
    assert all(not torch.equal(resumed.state_dict()[name], logits) for name, logits in first.items())


def test_roundings_start_from_the_weights_when_quantization_does(digits: Any, tmp_path: Any) -> None:
    net, batches, *_ = digits
    for calibrated in (True, False):
        module = module_for(net, batches)
        if not calibrated:
            module = QATModule(**module.hparams)
        started: list[float] = []

        class Compare(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
                if trainer.global_step == 2:  # training in float takes the weights elsewhere
                    for _, layer in layers(module):
                        layer.weight.data.add_(0.3 * layer.weight.std() * torch.randn_like(layer.weight))
                if trainer.global_step == 6:
                    for _, layer in layers(module):
                        scale = layer.weight_quantizer.scale.reshape(-1, *[1] * (layer.weight.dim() - 1))
                        v = layer.weight.detach() / scale
                        h = rectified_sigmoid(layer.weight_quantizer.logits.detach())
                        started.append(float((v.floor() + h - v).abs().median()))  # noqa: B023
                    trainer.should_stop = True

        schedule = QATSchedule(quantize_at=5)
        fit(module, tmp_path, Compare(), schedule=schedule, max_steps=400, epochs=-1)
        assert len(started) == 6
        assert max(started) < 0.15  # one step of the optimizer; stale fractions are a third off


def test_progress_of_quantizers_ends_when_ranges_freeze() -> None:
    schedule = QATSchedule(quantize_at=0.2, freeze_ranges_at=0.6)
    assert [schedule.progress_at(step, 100) for step in (0, 20, 40, 60, 99)] == [0, 0, 0.5, 1, 1]
    assert QATSchedule(freeze_ranges_at=None).progress_at(50, 100) == 0.5
    assert QATSchedule(quantize_at=10, freeze_ranges_at=10).progress_at(10, 100) == 0
