"""The PTQ step: what it may move, measured independently in float64 and with numpy."""

import importlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.fake_quant import FakeQuantize
from qat.layers import QuantizedLayer
from qat.mode import Mode
from qat.ptq import PTQConfig, correct_bias, finalize, reestimate_batch_norm, round_biases

COARSE = {"weight": {"bits": 3}, "activation": {"bits": 4}, "input": {"bits": 8}}


def make_net(affine: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6, affine=affine), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(80, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4), nn.Linear(4, 4, bias=False),
    )  # fmt: skip
    for norm in [m for m in net if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.affine]:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    for _ in range(20):
        net(data())
    return net.eval()


def data(samples: int = 64) -> Tensor:
    return torch.randn(samples, 3, 8, 8) + 0.3


def prepare(net: nn.Module, config: dict | None = None, calibrated: bool = True) -> fx.GraphModule:
    prepared = qat.prepare(net, qat.QuantConfig.from_dict(config or COARSE), data(2))
    if calibrated:
        qat.calibrate(prepared, [data() for _ in range(3)])
    return prepared


def record(prepared: fx.GraphModule, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every quantized layer, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: (i[0], o)}))
        for name, module in prepared.named_modules()
        if isinstance(module, QuantizedLayer)
    ]
    with torch.no_grad():
        prepared(x)
    for handle in handles:
        handle.remove()
    return seen


# ---- round_biases ----------------------------------------------------------------------------------------------------

# layer -> (BatchNorm that is folded into it, quantizer of its input)
FOLDS = {"0": ("1", "input"), "3": (None, "0"), "6": ("7", "3"), "9": (None, "6"), "10": (None, "9")}


def unit_and_bias(prepared: fx.GraphModule, layer_name: str) -> tuple[Tensor, Tensor]:
    """`input_scale * weight_scale` after folding, and the folded bias, by the formulas of the papers in float64."""
    norm_name, quantizer_name = FOLDS[layer_name]
    layer = prepared.get_submodule(layer_name)
    input_scale = prepared.get_submodule(f"quantizers.{quantizer_name}").qparams()[0].double()
    weight_scale = layer.weight_quantizer.qparams(layer.weight)[0].double().detach()
    bias = torch.zeros_like(weight_scale) if layer.bias is None else layer.bias.detach().double()
    if norm_name is None:
        return input_scale * weight_scale, bias
    norm = prepared.get_submodule(norm_name)
    deviation = (norm.running_var.double() + norm.eps).sqrt()
    gamma, beta = (1.0, 0.0) if norm.weight is None else (norm.weight.detach().double(), norm.bias.detach().double())
    gain = gamma / deviation
    return input_scale * weight_scale * abs(gain), beta + (bias - norm.running_mean.double()) * gain


@pytest.mark.parametrize("affine", [True, False])
def test_biases_become_integers(affine: bool) -> None:
    prepared = prepare(make_net(affine))
    before = {name: unit_and_bias(prepared, name) for name in FOLDS}
    whole = [float(((b / u) - (b / u).round()).abs().max()) for name, (u, b) in before.items() if name != "10"]
    assert min(whole) > 0.05  # there is something to round
    round_biases(prepared)
    for name, (old_unit, old_bias) in before.items():
        unit, bias = unit_and_bias(prepared, name)
        assert torch.equal(unit, old_unit)
        steps = bias / unit
        assert (steps - steps.round()).abs().max() < 1e-3  # the parameters are float32
        assert ((bias - old_bias).abs() <= 0.5 * unit * (1 + 1e-3)).all()
    assert prepared.get_submodule("10").bias is None


def test_no_layer_output_moves_by_more_than_half_a_unit() -> None:
    prepared, x = prepare(make_net()), data()
    qat.set_mode(prepared, "frozen")

    def folded_output(name: str, x: Tensor) -> Tensor:
        norm = FOLDS[name][0]
        y = prepared.get_submodule(name)(x)
        return (prepared.get_submodule(norm)(y) if norm else y).detach().double()

    given = {name: i for name, (i, _) in record(prepared, x).items()}
    before = {name: folded_output(name, i) for name, i in given.items()}
    round_biases(prepared)
    for name, i in given.items():
        unit = unit_and_bias(prepared, name)[0]
        moved = (folded_output(name, i) - before[name]).abs()
        unit = unit.reshape(-1, *[1] * (moved.dim() - 2))
        assert (moved <= 0.5 * unit + 1e-5).all()
        assert name == "10" or moved.max() > 0.05 * unit.min()


def test_rounding_twice_is_rounding_once() -> None:
    prepared = prepare(make_net())
    round_biases(prepared)
    before = {name: unit_and_bias(prepared, name) for name in FOLDS}
    round_biases(prepared)
    for name, (unit, bias) in before.items():
        assert torch.allclose(unit_and_bias(prepared, name)[1], bias, rtol=0, atol=1e-3 * float(unit.min()))


def test_biases_that_are_added_in_float_stay() -> None:
    weight_only = {"weight": {"bits": 4, "granularity": "group", "group_size": 4, "allow_padding": True}}
    for config in (weight_only, {**weight_only, **{k: COARSE[k] for k in ("activation", "input")}}):
        prepared = prepare(make_net(), config)
        before = {k: v.clone() for k, v in prepared.state_dict().items()}
        round_biases(prepared)
        assert all(torch.equal(v, before[k]) for k, v in prepared.state_dict().items())


def test_bias_of_a_layer_behind_a_relu_on_integers() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(torch.relu(y)) + self.c(y)  # y is quantized, then relu clamps its integers

    torch.manual_seed(0)
    x = torch.randn(50, 5)
    prepared = qat.prepare(Branch().eval(), qat.QuantConfig.from_dict(COARSE), x)
    qat.calibrate(prepared, [x])
    round_biases(prepared)
    layer, quantizer = prepared.get_submodule("b"), prepared.get_submodule("quantizers.a")
    assert isinstance(quantizer, FakeQuantize)
    unit = quantizer.scale.double() * layer.weight_quantizer.qparams(layer.weight)[0].double()
    steps = layer.bias.double() / unit
    assert (steps - steps.round()).abs().max() < 1e-3
    assert steps.abs().max() > 0.5


# ---- correct_bias ----------------------------------------------------------------------------------------------------


def weight_error(layer: nn.Module, x: Tensor, float_weight: Tensor) -> Tensor:
    """Mean over samples and positions of what the float weight gives less what the quantized weight gives, float64."""
    difference = float_weight.double() - layer.quantized_weight().detach().double()
    y = F.conv2d(x.double(), difference) if difference.dim() == 4 else F.linear(x.double(), difference)
    return y.mean(dim=[d for d in range(y.dim()) if d != 1])


def test_channel_mean_error_is_cancelled() -> None:
    net, batches = make_net(), [data() for _ in range(3)]
    prepared = prepare(net)
    x = torch.cat(batches)
    seen = record(prepared, x)
    errors = {name: weight_error(prepared.get_submodule(name), i, prepared.get_submodule(name).weight)
              for name, (i, _) in seen.items()}  # fmt: skip
    assert all(error.abs().max() > 1e-3 for error in errors.values())
    parameters = {k: v.clone() for k, v in prepared.state_dict().items()}
    prepared.train()
    correct_bias(prepared, batches)
    assert prepared.training
    after = prepared.state_dict()
    for name, error in errors.items():
        norm = FOLDS[name][0]
        moved = parameters[f"{norm}.running_mean"] - after[f"{norm}.running_mean"] if norm else (
            after[f"{name}.bias"] - parameters.get(f"{name}.bias", torch.zeros_like(error).float())
        )  # fmt: skip
        assert torch.allclose(moved.double(), error, rtol=1e-4, atol=1e-5), name
    changed = {k for k, v in parameters.items() if not torch.equal(after[k], v)}
    assert changed == {"1.running_mean", "3.bias", "7.running_mean", "9.bias"}
    assert set(after) - set(parameters) == {"10.bias"}  # the layer without bias got one


def test_corrected_layer_has_the_mean_of_the_exact_one() -> None:
    batches = [data() for _ in range(3)]
    prepared = prepare(nn.Sequential(nn.Conv2d(3, 6, 3)).eval())
    layer, x = prepared.get_submodule("0"), torch.cat(batches)
    before, bias = record(prepared, x)["0"], layer.bias.detach().double().clone()
    exact = F.conv2d(before[0].double(), layer.weight.detach().double(), bias)
    correct_bias(prepared, batches)
    after = record(prepared, x)["0"][1].double()
    error_before = (before[1].double() - exact).mean((0, 2, 3)).abs().max()
    error_after = (after - exact).mean((0, 2, 3)).abs().max()
    assert error_before > 5e-3
    assert error_after < 1e-3 * error_before


def test_correct_bias_on_sequences_counts_the_last_dimension_as_channels() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(20, 6, 5) + 1 for _ in range(2)]
    prepared = qat.prepare(nn.Sequential(nn.Linear(5, 4)).eval(), qat.QuantConfig.from_dict(COARSE), batches[0])
    qat.calibrate(prepared, batches)
    layer = prepared.get_submodule("0")
    x, bias = record(prepared, torch.cat(batches))["0"][0].double(), layer.bias.detach().clone()
    error = (layer.weight - layer.quantized_weight()).detach().double()
    correct_bias(prepared, batches)
    moved = (layer.bias.detach() - bias).double()
    assert torch.allclose(moved, (x @ error.T).mean((0, 1)), atol=1e-6)


def test_correct_bias_keeps_quantizer_modes() -> None:
    prepared = prepare(make_net())
    correct_bias(prepared, [data()])
    assert {m.mode for m in prepared.modules() if isinstance(m, FakeQuantize)} == {Mode.quantize}
    assert not any(m._forward_hooks for m in prepared.modules())


# ---- reestimate_batch_norm -------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_batches() -> None:
    net, batches = make_net(), [data() for _ in range(4)]
    prepared = prepare(net)
    norms = {"1": prepared.get_submodule("1"), "7": prepared.get_submodule("7")}
    norms["1"].momentum, norms["7"].momentum = 0.03, None
    prepared.train()
    prepared.get_submodule("6").eval()
    modes = [m.training for m in prepared.modules()]
    inputs: dict[str, list[np.ndarray]] = {"1": [], "7": []}
    handles = [
        norm.register_forward_pre_hook(lambda m, i, name=name: inputs[name].append(i[0].detach().double().numpy()))
        for name, norm in norms.items()
    ]
    others = {k: v.clone() for k, v in prepared.state_dict().items() if "running" not in k and "num_batches" not in k}
    reestimate_batch_norm(prepared, batches)
    for handle in handles:
        handle.remove()
    assert [m.training for m in prepared.modules()] == modes
    assert [norms["1"].momentum, norms["7"].momentum] == [0.03, None]
    for name, norm in norms.items():
        axes = (0, 2, 3) if name == "1" else (0,)
        assert len(inputs[name]) == 4
        mean = np.mean([x.mean(axis=axes) for x in inputs[name]], axis=0)
        variance = np.mean([x.var(axis=axes, ddof=1) for x in inputs[name]], axis=0)
        np.testing.assert_allclose(norm.running_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.running_var.numpy(), variance, rtol=1e-4)
    assert all(torch.equal(v, others[k]) for k, v in prepared.state_dict().items() if k in others)


def test_modes_and_momenta_survive_an_error() -> None:
    prepared = prepare(make_net())
    prepared.train()
    modes = [m.training for m in prepared.modules()]
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(prepared, [data(), torch.randn(2, 5, 8, 8)])
    assert [m.training for m in prepared.modules()] == modes
    assert prepared.get_submodule("1").momentum == 0.1


# ---- finalize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_finalize_leaves_a_frozen_network_that_lowers(trained: bool) -> None:
    prepared = prepare(make_net(), calibrated=trained)
    prepared.train()
    batches = [data() for _ in range(2)]
    finalize(prepared, batches, PTQConfig(), trained=trained)
    assert not any(m.training for m in prepared.modules())
    assert {m.mode for m in prepared.modules() if isinstance(m, FakeQuantize)} == {Mode.frozen}
    x = data()
    with torch.no_grad():
        assert (qat.lower(prepared)(x) - prepared(x)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("trained", "config", "expected"),
    [
        (False, PTQConfig(), ["calibrate", "correct_bias", "round_biases"]),
        (False, PTQConfig(bias_correction=False), ["calibrate", "round_biases"]),
        (False, PTQConfig(reestimate_batch_norm=True), ["calibrate", "correct_bias", "round_biases"]),
        (True, PTQConfig(), ["round_biases"]),
        (True, PTQConfig(reestimate_batch_norm=True), ["reestimate_batch_norm", "round_biases"]),
        (True, PTQConfig(reestimate_ranges=True), ["calibrate", "round_biases"]),
    ],
)
def test_steps_of_finalize(
    trained: bool, config: PTQConfig, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("qat.ptq.finalize")
    called: list[str] = []

    def spy(name: str) -> Callable[..., None]:
        real = getattr(module, name)
        return lambda *args: (called.append(name), real(*args))[1]

    for name in ("calibrate", "correct_bias", "reestimate_batch_norm", "round_biases"):
        monkeypatch.setattr(module, name, spy(name))
    finalize(prepare(make_net()), [data()], config, trained=trained)
    assert called == expected


def test_finalize_on_trained_weights_moves_no_range() -> None:
    prepared = prepare(make_net(), COARSE | {"activation": {"bits": 4, "range": "running", "observer": "ema"}})
    before = {k: v.clone() for k, v in prepared.state_dict().items() if k.endswith(("scale", "zero_point"))}
    assert before
    finalize(prepared, [10 * data()], PTQConfig(), trained=True)
    after = prepared.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    finalize(prepared, [10 * data()], PTQConfig(reestimate_ranges=True), trained=True)
    after = prepared.state_dict()
    assert after["quantizers.input.range.scale"] > 5 * before["quantizers.input.range.scale"]


@torch.no_grad()
def test_the_bias_of_a_layer_called_twice_is_corrected_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), self.fc(x)

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(64, 8) + 1
    expected = net(x)[0].mean(0)
    prepared = qat.prepare(net, qat.QuantConfig.from_dict({"weight": {"bits": 3}}), x)
    qat.calibrate(prepared, [x])
    assert (prepared(x)[0].mean(0) - expected).abs().max() > 0.01
    correct_bias(prepared, [x])
    assert (prepared(x)[0].mean(0) - expected).abs().max() < 1e-5
