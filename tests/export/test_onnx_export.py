"""ONNX files: valid, run in integers, and equal to the integer network, in ONNX Runtime and ONNX's own evaluator."""

import builtins
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

import qat
from qat.export.onnx import save_onnx
from qat.export.onnxruntime import OnnxNetwork, kernels
from qat.ptq import round_biases
from qat.runtime import IntegerConv, IntegerNetwork
from qat.zoo.models import ResNet, SmallCNN


def _networks() -> ModuleType:
    """tests/test_lower.py: one network for each operation."""
    spec = importlib.util.spec_from_file_location("networks_of_test_lower", Path(__file__).parents[1] / "test_lower.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


networks = _networks()


def by_onnxruntime(path: Path, *inputs: Tensor, target: str = "generic") -> Tensor:
    return OnnxNetwork(path, target)(*inputs)


def assert_same(got: Tensor, expected: Tensor, share: float = 0.999) -> None:
    """Equal but for float32's order of operations, and rare values on the other side of a tie."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    spread = expected.std().clamp(min=1e-6)
    close = (got - expected).abs() <= 2e-5 * spread + 1e-5 * expected.abs()
    assert close.double().mean() >= share, f"{float(close.double().mean()):.4f} equal"
    assert (got - expected).abs().max() <= 0.2 * spread  # a step


def is_wide(scheme: str) -> bool:
    return scheme.startswith("a16")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "scheme"), networks.SETTINGS, ids=lambda value: value)
def test_onnxruntime_equals_the_integer_network(name: str, scheme: str, tmp_path: Path) -> None:
    _, prepared, x = networks.build(networks.CASES[name], scheme)
    network, path = qat.lower(prepared), tmp_path / "model.onnx"
    save_onnx(network, path, (x[:2],))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    expected = network(x)
    if is_wide(scheme):  # runs in float32 there, so that 16-bit integers are off by a step here and there
        got = by_onnxruntime(path, x)
        assert (got - expected).abs().max() <= 1e-3 * expected.std()
    else:
        assert_same(by_onnxruntime(path, x), expected, 0.99)
    assert by_onnxruntime(path, x[:1]).shape == expected[:1].shape  # any batch size


REFERENCE = [(name, scheme) for name, scheme in networks.SETTINGS if name in (
    "linear", "linear_sequence", "conv1d", "conv2d", "relu_behind_quantizer", "batch_norm_alone", "add", "cat", "mean",
    "max_pool", "average_pool", "adaptive_pool", "view_batch_size", "permute", "slice", "slice_ellipsis", "pad",
    "function_sigmoid", "function_silu", "function_gelu", "function_hardsigmoid", "float_by_rule",
)]  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "scheme"), REFERENCE, ids=lambda value: value)
def test_reference_evaluator_equals_the_integer_network(name: str, scheme: str, tmp_path: Path) -> None:
    _, prepared, x = networks.build(networks.CASES[name], scheme)
    network, path, x = qat.lower(prepared), tmp_path / "model.onnx", x[:4]
    save_onnx(network, path, (x[:2],))
    (got,) = ReferenceEvaluator(onnx.load(path)).run(None, {network.inputs[0]: x.numpy()})
    expected = network(x)
    if is_wide(scheme):
        assert (torch.from_numpy(got) - expected).abs().max() <= 1e-3 * expected.std()
    else:
        assert_same(torch.from_numpy(got), expected, 0.99)


# ---- whole networks --------------------------------------------------------------------------------------------------


def ready(net: nn.Module, config: qat.QuantConfig, x: Tensor) -> fx.GraphModule:
    """Prepared, calibrated and with rounded biases; BatchNorm has lived in, negative gains among it."""
    torch.manual_seed(0)
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, -0.3, 1.5), nn.init.normal_(norm.bias, std=0.3)
    for _ in range(10):
        net(x)
    prepared = qat.prepare(net.eval(), config, x[:2])
    qat.calibrate(prepared, [x])
    qat.set_mode(prepared, "frozen")
    round_biases(prepared)
    return prepared


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) + 0.3


# layers: convolutions, linear layers, adds
MODELS = {
    "small_cnn": (lambda: SmallCNN(1, 10, width=8), (64, 1, 8, 8), (5, 1, 1)),
    "resnet20_a": (lambda: ResNet(20, "A"), (8, 3, 16, 16), (19, 1, 9)),
    "resnet20_b": (lambda: ResNet(20, "B"), (8, 3, 16, 16), (21, 1, 9)),
}
INTEGER_PRESETS = ["int8", "w8a8_asymmetric", "w4a8", "w4a4", "w4a4_lsq", "w2a2_lsq", "binary", "ternary"]
FLOAT_KERNELS = {
    "Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "Add", "Relu", "AveragePool",
    "GlobalAveragePool", "ReduceMean",
}  # fmt: skip


@pytest.mark.parametrize("preset", INTEGER_PRESETS)
@pytest.mark.parametrize("model", MODELS)
def test_everything_runs_in_integers(model: str, preset: str, tmp_path: Path) -> None:
    make, shape, (convolutions, linears, adds) = MODELS[model]
    if model != "small_cnn" and preset not in ("int8", "w2a2_lsq"):
        pytest.skip("the small network stands for the other presets")
    x = images(*shape)
    torch.manual_seed(0)
    network, path = qat.lower(ready(make(), qat.preset(preset), x)), tmp_path / "model.onnx"
    save_onnx(network, path, (x[:1],))
    ran = kernels(path).counts
    assert ran["QLinearConv"] == convolutions
    assert ran["QGemm"] == linears
    assert ran["QLinearAdd"] == adds
    assert ran["QLinearGlobalAveragePool"] == 1
    assert not FLOAT_KERNELS & set(ran)
    got, expected = by_onnxruntime(path, x), network(x)
    if model == "small_cnn":
        assert_same(got, expected, 0.98)
    else:  # a value at a tie goes through many layers
        assert (got - expected).square().mean() <= 1e-3 * expected.var()


def test_small_cnn_in_the_reference_evaluator(tmp_path: Path) -> None:
    make, shape, _ = MODELS["small_cnn"]
    x = images(*shape)[:8]
    torch.manual_seed(0)
    network, path = qat.lower(ready(make(), qat.preset("w4a4"), images(*shape))), tmp_path / "model.onnx"
    save_onnx(network, path, (x,))
    (got,) = ReferenceEvaluator(onnx.load(path)).run(None, {"x": x.numpy()})
    assert_same(torch.from_numpy(got), network(x))


@pytest.mark.parametrize("scheme", ["int8", "weight_only", "weight_only_group"])
def test_linear_layers_on_sequences(scheme: str, tmp_path: Path) -> None:
    """Integer kernels for integer activations; float activations are not quantized behind one's back."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)), images(16, 5, 64)
    config = networks.SCHEMES[scheme]
    if scheme == "weight_only_group":
        config = {"weight": config["weight"] | {"group_size": 32, "symmetric": True}}
    network, path = qat.lower(ready(net, qat.QuantConfig.from_dict(config), x)), tmp_path / "model.onnx"
    save_onnx(network, path, (x[:2],))
    ran = kernels(path).counts
    if scheme == "int8":
        assert ran["QGemm"] == 2
        assert not FLOAT_KERNELS & set(ran)
    else:
        assert not {"MatMulNBits", "DynamicQuantizeMatMul", "QGemm"} & set(ran)
    assert_same(by_onnxruntime(path, x), network(x), 0.99)


def test_weights_of_skewed_channels(tmp_path: Path) -> None:
    """Affine zero points near both ends: `q - z` does not fit int8, so that the file has weight zero points."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    for layer in (net[0], net[2], net[5]):
        layer.weight.data[0].abs_()
        layer.weight.data[1].abs_().neg_()
        layer.weight.data[2].abs_().sub_(0.02)
    x = images(64, 3, 6, 6)
    prepared = ready(net, qat.preset("w8a8_asymmetric"), x)
    network, path = qat.lower(prepared), tmp_path / "model.onnx"
    for name in ("0", "2", "5"):
        layer = network.layer(name)
        assert isinstance(layer, IntegerConv)
        zero = layer.weight_zero_point
        assert zero[0] < 30
        assert zero[1] > 225
        centred = layer.weight.int() - zero.reshape(-1, *[1] * (layer.weight.dim() - 1))
        assert centred.max() > 127
        assert centred.min() < -128
    save_onnx(network, path, (x,))
    assert_same(by_onnxruntime(path, x), network(x), 0.99)
    (got,) = ReferenceEvaluator(onnx.load(path)).run(None, {network.inputs[0]: x[:4].numpy()})
    assert_same(torch.from_numpy(got), network(x[:4]), 0.99)


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_activations_are_clamped_to_their_grid(bits: int, narrow: bool, tmp_path: Path) -> None:
    """Inputs far beyond the range reach exactly the ends of the grid in both."""
    torch.manual_seed(0)
    grid = {"bits": bits, "narrow_range": narrow}
    config = qat.QuantConfig.from_dict({"weight": {"bits": 8}, "activation": grid, "input": grid})
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].weight.data.copy_(torch.eye(3)), net[0].bias.data.zero_()
    prepared = qat.prepare(net.eval(), config, torch.ones(2, 3))
    qat.calibrate(prepared, [torch.tensor([[-1.0, 0.5, 1.0]])])
    network, path = qat.lower(prepared), tmp_path / "model.onnx"
    x = torch.tensor([[-100.0, 0.1, 100.0], [-1.0, 0.0, 1.0]])
    save_onnx(network, path, (x,))
    lowest = -(2 ** (bits - 1)) + int(narrow)
    assert network(x)[0, 0].item() == pytest.approx(lowest / (2 ** (bits - 1) - 1), rel=1e-6)
    assert torch.allclose(by_onnxruntime(path, x), network(x), rtol=1e-7, atol=0)


@pytest.mark.parametrize("scheme", ["affine", "a16_affine"])
def test_absorbed_relu_above_the_lowest_integer(scheme: str, tmp_path: Path) -> None:
    _, prepared, x = networks.build(networks.CASES["mlp_batch_norm"], scheme)
    quantizer = next(m for m in prepared.modules() if isinstance(m, qat.fake_quant.FakeQuantize) and m.relu)
    quantizer.zero_point.fill_(40)
    network, path = qat.lower(prepared), tmp_path / "model.onnx"
    assert network.layer("0").output.relu
    save_onnx(network, path, (x,))
    assert (by_onnxruntime(path, x) - network(x)).abs().max() <= 1e-3 * network(x).std()


def test_two_inputs_and_two_outputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(3, 5), nn.Linear(5, 2)

        def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.relu(self.a(left) + self.b(right))
            return self.c(total), total

    torch.manual_seed(0)
    x = torch.randn(64, 4), torch.randn(64, 3)
    prepared = qat.prepare(Two().eval(), qat.preset("int8"), x)
    qat.calibrate(prepared, [x])
    network, path = qat.lower(prepared), tmp_path / "model.onnx"
    save_onnx(network, path, (x[0][:2], x[1][:2]))
    session = OnnxNetwork(path)
    assert session.inputs == ["left", "right"]
    made = session.run({"left": x[0].numpy(), "right": x[1].numpy()})
    for name, expected in zip(session.outputs, network(*x), strict=True):
        assert_same(torch.from_numpy(made[name]), expected)


def test_batch_dimension_is_dynamic_and_others_are_fixed(tmp_path: Path) -> None:
    x = images(4, 1, 8, 8)
    save_onnx(qat.lower(ready(SmallCNN(1, 10, 4), qat.preset("int8"), x)), tmp_path / "m.onnx", (x,))
    graph = onnx.load(tmp_path / "m.onnx").graph
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)]
    assert shapes == [["batch", 1, 8, 8], ["batch", 10]]
    for batch in (1, 3, 17):
        assert by_onnxruntime(tmp_path / "m.onnx", images(batch, 1, 8, 8)).shape == (batch, 10)


def test_two_exports_give_the_same_bytes(tmp_path: Path) -> None:
    x = images(8, 1, 8, 8)
    network = qat.lower(ready(SmallCNN(1, 10, 4), qat.preset("w4a4"), x))
    qat.export(network, tmp_path / "a", x)
    paths = qat.export(network, tmp_path / "b", x)
    save_onnx(qat.load(paths["int8"]), tmp_path / "c.onnx", (x[:1],))
    first = (tmp_path / "a" / "model.onnx").read_bytes()
    assert first == paths["onnx"].read_bytes()
    assert first == (tmp_path / "c.onnx").read_bytes()  # from the reloaded checkpoint, with another batch size


def test_configuration_travels_in_the_file(tmp_path: Path) -> None:
    x = images(4, 1, 8, 8)
    save_onnx(qat.lower(ready(SmallCNN(1, 10, 4), qat.preset("w4a8"), x)), tmp_path / "m.onnx", (x,))
    properties = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(properties["quant"]) == qat.preset("w4a8").to_dict()


def test_four_bit_weights_of_a_weight_only_file_stay_integers(tmp_path: Path) -> None:
    x = images(8, 1, 8, 8)
    network: IntegerNetwork = qat.lower(ready(SmallCNN(1, 10, 8), qat.preset("w4g32"), x))
    save_onnx(network, tmp_path / "m.onnx", (x,))
    weights = [t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.name.endswith(".weight")]
    assert len(weights) == 6
    for tensor in weights:
        assert tensor.data_type == onnx.TensorProto.INT4
        array = onnx.numpy_helper.to_array(tensor).astype(np.int8)
        assert abs(array).max() <= 7
        assert len(tensor.raw_data) == -(-array.size // 2)
    assert_same(by_onnxruntime(tmp_path / "m.onnx", x), network(x))


# ---- targets ---------------------------------------------------------------------------------------------------------


def saturating(config: qat.QuantConfig) -> tuple[IntegerNetwork, Tensor]:
    """All weights and inputs at the top of their grids: sums of pairs are largest."""
    net = nn.Sequential(nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(), nn.Conv2d(16, 8, 1, bias=False), nn.Flatten())
    torch.manual_seed(0)
    for layer in (net[0], net[2]):
        nn.init.uniform_(layer.weight, 0.9, 1.0)
    x = torch.rand(16, 16, 5, 5) * 0.1 + 0.9
    prepared = qat.prepare(net.eval(), config, x)
    qat.calibrate(prepared, [x])
    return qat.lower(prepared), x


def affine_activations(target: str) -> qat.QuantConfig:
    grid = {"symmetric": False}
    return qat.preset("int8", target=target, activation=grid, input=grid)


def test_seven_bit_weights_are_exact_at_full_speed(tmp_path: Path) -> None:
    config = affine_activations("onnxruntime_x86")
    assert config.weight.bits == 7
    network, x = saturating(config)
    save_onnx(network, tmp_path / "m.onnx", (x,))
    assert_same(by_onnxruntime(tmp_path / "m.onnx", x, target="onnxruntime_x86"), network(x), 1.0)


def test_eight_bit_weights_are_exact_in_exact_mode(tmp_path: Path) -> None:
    network, x = saturating(affine_activations("generic"))
    save_onnx(network, tmp_path / "m.onnx", (x,))
    assert_same(by_onnxruntime(tmp_path / "m.onnx", x), network(x), 1.0)


@pytest.mark.parametrize(
    ("target", "vnni", "entry"),
    [("generic", True, "1"), ("onnxruntime_x86", False, None), ("onnxruntime_x86_vnni", True, None),
     ("onnxruntime_x86_vnni", False, "1")],
)  # fmt: skip
def test_session_options_of_the_target_are_used(
    target: str, vnni: bool, entry: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    x = images(4, 1, 8, 8)
    save_onnx(qat.lower(ready(SmallCNN(1, 10, 4), qat.preset("int8"), x)), tmp_path / "m.onnx", (x,))
    seen: list[str | None] = []
    real = onnxruntime.InferenceSession

    def spy(model: str, options: onnxruntime.SessionOptions, **kwargs: Any) -> onnxruntime.InferenceSession:
        try:
            seen.append(options.get_session_config_entry("session.x64quantprecision"))
        except RuntimeError:  # not set
            seen.append(None)
        return real(model, options, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    OnnxNetwork(tmp_path / "m.onnx", target)
    kernels(tmp_path / "m.onnx", target)
    assert seen == [entry] * 2


def _saturates() -> bool:
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.exists() else set()
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni"} & flags


@pytest.mark.skipif(not _saturates(), reason="this processor's int8 products do not saturate")
def test_eight_bit_weights_saturate_at_full_speed(tmp_path: Path) -> None:
    network, x = saturating(affine_activations("generic"))
    save_onnx(network, tmp_path / "m.onnx", (x,))
    got, expected = by_onnxruntime(tmp_path / "m.onnx", x, target="onnxruntime_x86"), network(x)
    assert (got - expected).abs().max() > 0.05 * expected.abs().max()


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_missing_packages_say_how_to_install(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(4, 1, 8, 8)
    network = qat.lower(ready(SmallCNN(1, 10, 4), qat.preset("int8"), x))
    save_onnx(network, tmp_path / "there.onnx", (x,))
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        if name == missing:
            raise ImportError(f"No module named '{missing}'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    use = {
        "onnx": lambda: qat.export(network, tmp_path, x, formats=["onnx"]),
        "onnxruntime": lambda: OnnxNetwork(tmp_path / "there.onnx"),
    }[missing]
    with pytest.raises(ImportError, match=r"pip install 'qat\[export\]'"):
        use()
    assert {p.name for p in tmp_path.iterdir()} == {"there.onnx", "SHA256SUMS"}


def test_unknown_format_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    x = images(4, 1, 8, 8)
    network = qat.lower(ready(SmallCNN(1, 10, 4), qat.preset("int8"), x))
    with pytest.raises(ValueError, match=r"'onxx'.*did you mean 'onnx'"):
        qat.export(network, tmp_path / "folder", x, formats=["int8", "onxx"])
    assert not (tmp_path / "folder").exists()


def test_wrong_number_of_inputs(tmp_path: Path) -> None:
    x = images(4, 1, 8, 8)
    save_onnx(qat.lower(ready(SmallCNN(1, 10, 4), qat.preset("int8"), x)), tmp_path / "m.onnx", (x,))
    with pytest.raises(ValueError, match="zip"):
        OnnxNetwork(tmp_path / "m.onnx")(x, x)
