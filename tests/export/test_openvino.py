"""Graphs that OpenVINO computes in another way than they say, unless they are written as the exporter writes them.

Each was found by random networks (`test_fuzz_graphs.py`). All run on the same file in ONNX Runtime, too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.export.onnxruntime import kernels
from qat.export.openvino import OpenVinoNetwork
from qat.export.parity import ParityLimits, measure
from qat.ptq import PTQConfig, finalize

NO_ROUNDING = PTQConfig(adaptive_rounding_steps=0, bias_correction=False)
"""So layers without bias stay such."""


class Net(nn.Module):
    """A layer, a function of what it makes, and a layer."""

    def __init__(self, first: nn.Module, function: Callable[[Tensor], Tensor], last: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.function, self.last = first, function, last

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.first(x))
        return y if self.last is None else self.last(y)


def signal(function: Callable[[Tensor], Tensor], features: int = 6) -> Net:
    return Net(nn.Conv1d(3, 6, 3), function, nn.Linear(features, 4))


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def image(function: Callable[[Tensor], Tensor]) -> Net:
    return Net(nn.Conv2d(3, 6, 3), function, nn.Sequential(Mean(), nn.Linear(6, 4)))


def lived(channels: int, kind: Any) -> nn.Module:
    norm = kind(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
    return norm


SIGNAL, IMAGE, WIDTH = (3, 9), (3, 9, 9), 4
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    # means of bytes along the last of three dimensions
    "mean of a signal": (lambda: signal(lambda y: y.mean(2)), SIGNAL),
    "mean of a signal, kept": (lambda: signal(lambda y: y.mean(2, keepdim=True).flatten(1)), SIGNAL),
    "mean over channels and signal": (lambda: Net(nn.Conv1d(3, 6, 3), lambda y: y.mean((1, 2))), SIGNAL),
    "mean of channels": (lambda: signal(lambda y: y.mean(1), 7), SIGNAL),
    "mean of a sequence": (lambda: Net(nn.Linear(8, 8), lambda y: y.mean(1), nn.Linear(8, 3)), (5, 8)),
    "mean of channels, kept": (lambda: signal(lambda y: y.mean(1, keepdim=True).flatten(1), 7), SIGNAL),
    "mean of a volume": (
        lambda: Net(nn.Conv3d(2, 4, 3), lambda y: y.mean((2, 3, 4)), nn.Linear(4, 3)), (2, 5, 5, 5),
    ),
    "adaptive average to one": (lambda: signal(lambda y: F.adaptive_avg_pool1d(y, 1).flatten(1)), SIGNAL),
    "lp pooling of a signal": (lambda: signal(lambda y: F.lp_pool1d(y, 2, 3).mean(2)), SIGNAL),
    # averages of bytes that are padded with 0, whatever their zero point
    "padded average of a signal": (lambda: signal(lambda y: F.avg_pool1d(y, 3, 1, 1).amax(2)), SIGNAL),
    "padded average of an image": (lambda: image(lambda y: F.avg_pool2d(y, 3, 2, 1)), IMAGE),
    "padded average, padding not counted": (
        lambda: image(lambda y: F.avg_pool2d(y, 3, 2, 1, count_include_pad=False)), IMAGE,
    ),
    "padded average, rounded up": (lambda: image(lambda y: F.avg_pool2d(y, 3, 2, 1, ceil_mode=True)), IMAGE),
    # averages that are no integers yet, as something is computed of them before they are quantized
    "average, then BatchNorm": (lambda: image(nn.Sequential(nn.AvgPool2d(2), lived(6, nn.BatchNorm2d))), IMAGE),
    "padded average, then BatchNorm": (
        lambda: image(nn.Sequential(nn.AvgPool2d(3, 1, 1), lived(6, nn.BatchNorm2d))), IMAGE,
    ),
    "adaptive average, then BatchNorm": (
        lambda: signal(nn.Sequential(nn.AdaptiveAvgPool1d(1), lived(6, nn.BatchNorm1d), nn.Flatten())), SIGNAL,
    ),
    "mean, then BatchNorm": (
        lambda: Net(nn.Conv2d(3, 6, 3), lambda y: y.mean((2, 3), keepdim=True),
                    nn.Sequential(lived(6, nn.BatchNorm2d), nn.Flatten(), nn.Linear(6, 4))), IMAGE,
    ),
    # linear layers without bias, of as many steps as channels, and of others
    "sequence, no bias": (
        lambda: Net(nn.Linear(WIDTH, WIDTH, bias=False), torch.sigmoid, nn.Linear(WIDTH, 3, bias=False)),
        (WIDTH, WIDTH),
    ),
    "sequence, other length, no bias": (
        lambda: Net(nn.Linear(WIDTH, WIDTH, bias=False), torch.tanh, nn.Linear(WIDTH, 5, bias=False)), (6, WIDTH),
    ),
    "sequence, no bias at its end": (
        lambda: Net(nn.Linear(WIDTH, WIDTH), torch.sigmoid, nn.Linear(WIDTH, WIDTH, bias=False)), (WIDTH, WIDTH),
    ),
    # real results of layers without bias, of which something is computed before it is quantized
    "square, no bias": (
        lambda: Net(nn.Conv1d(3, 6, 3, bias=False), torch.square,
                    nn.Sequential(nn.Flatten(), nn.Linear(42, 3))), SIGNAL,
    ),
    "sum, no bias": (lambda: Net(nn.Conv1d(3, 6, 3, bias=False), lambda y: y.sum(2), nn.Linear(6, 3)), SIGNAL),
    "norm, no bias": (
        lambda: Net(nn.Conv1d(3, 6, 1, groups=3, bias=False), F.instance_norm,
                    nn.Sequential(nn.Flatten(), nn.Linear(54, 3))), SIGNAL,
    ),
    "sequence, biases": (lambda: Net(nn.Linear(WIDTH, WIDTH), torch.relu, nn.Linear(WIDTH, 3)), (WIDTH, WIDTH)),
}  # fmt: skip


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("name", CASES)
def test_both_engines_compute_what_training_did(name: str, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    torch.manual_seed(0)
    make, shape = CASES[name]
    net, x = make().eval(), torch.randn(64, *shape)
    assert_agrees(net, x, symmetric, tmp_path)


def assert_agrees(net: nn.Module, x: Tensor, symmetric: bool, folder: Path) -> None:
    """One file, layer by layer and from end to end, in both engines."""
    config = qat.preset("int8", target="openvino", activation={"symmetric": symmetric}, input={"symmetric": symmetric})
    prepared = qat.prepare(net, config, x[:2])
    finalize(prepared, [x], NO_ROUNDING, trained=False)
    network = qat.lower(prepared)
    path = qat.export(network, folder, x[:2], formats=["onnx"])["onnx"]
    for target in ("openvino", "onnxruntime_x86_vnni"):
        parity = measure(prepared, network, {"onnx": path}, x, target=target)["qat_onnx"]
        parity.check(f"training / {target}", ParityLimits())
        assert parity.layers
    with torch.no_grad():
        expected, made = network(x), OpenVinoNetwork(path)(x)
    assert (made - expected).abs().mean() <= 0.02 * expected.std()


class Beside(nn.Module):
    """A function of a tensor that a layer reads, too: both get its integers."""

    def __init__(self, function: Callable[[Tensor], Tensor], dims: int) -> None:
        super().__init__()
        conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.stem, self.conv, self.function, self.dims = conv(4, 4, 3, padding=1), conv(4, 4, 1), function, dims
        self.one, self.other = nn.Linear(4, 4), nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.stem(x)) - 0.4
        pooled = self.conv(y).mean(tuple(range(2, 2 + self.dims)))
        return self.one(pooled) + self.other(self.function(y).flatten(1))


def functions(dims: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Everything that can read an activation of so many dimensions beside batch and channels."""

    def pool(kind: str) -> Any:
        return getattr(F, f"{kind}{dims}d")

    every = tuple(range(2, 2 + dims))
    return {
        **{kind: getattr(torch, kind) for kind in ("relu", "neg", "abs", "square", "exp", "tanh", "sigmoid")},
        **{kind: getattr(F, kind) for kind in ("gelu", "silu", "mish", "elu", "softplus", "hardswish", "relu6")},
        "leaky_relu": lambda y: F.leaky_relu(y, 0.2), "prelu": lambda y: F.prelu(y, torch.tensor([0.2])),
        "hardtanh": lambda y: F.hardtanh(y, -0.2, 0.3), "clamp": lambda y: y.clamp(-0.1, 0.2),
        "softmax": lambda y: torch.softmax(y, 1), "softmax of the last": lambda y: torch.softmax(y, -1),
        "log_softmax": lambda y: torch.log_softmax(y, 1),
        "sum of the last": lambda y: y.sum(-1), "sum of all": lambda y: y.sum(every),
        "sum of channels": lambda y: y.sum(1), "sum, kept": lambda y: y.abs().sum(1, keepdim=True) * y,
        "mean of channels": lambda y: y.mean(1), "mean of all": lambda y: y.mean(every),
        "mean of a part": lambda y: y.unflatten(1, (2, 2)).mean(1),
        "amax": lambda y: y.amax(-1), "amin": lambda y: y.amin(1),
        "avg_pool": lambda y: pool("avg_pool")(y, 2),
        "avg_pool, padded": lambda y: pool("avg_pool")(y, 3, 1, 1),
        "avg_pool, rounded up": lambda y: pool("avg_pool")(y, 2, 2, 0, True),
        "max_pool": lambda y: pool("max_pool")(y, 3, 1, 1),
        "adaptive_avg_pool": lambda y: pool("adaptive_avg_pool")(y, 2),
        "adaptive_avg_pool, unequal": lambda y: pool("adaptive_avg_pool")(y, 4),
        "adaptive_max_pool": lambda y: pool("adaptive_max_pool")(y, 2),
        **{kind: getattr(F, kind) for kind in ("selu", "celu", "logsigmoid", "softsign")},
        "sin": torch.sin, "cos": torch.cos, "glu": lambda y: F.glu(y, 1),
        "maximum": lambda y: torch.maximum(y, 0.5 * y), "minimum": lambda y: torch.minimum(y, 0.5 * y),
        "y * y": lambda y: y * y, "y + y": lambda y: y + y, "1 - y": lambda y: 1 - y, "y / 3": lambda y: y / 3,
        "1 / y": lambda y: 1 / (y + 2), "2.5 y": lambda y: y * 2.5, "pow": lambda y: (y + 1) ** 2,
        "sqrt": lambda y: torch.sqrt(y + 1), "rsqrt": lambda y: torch.rsqrt(y + 1), "log": lambda y: torch.log(y + 1),
        "normalize": lambda y: F.normalize(y, dim=1), "instance_norm": F.instance_norm,
        "layer_norm": lambda y: F.layer_norm(y, y.shape[1:]), "group_norm": lambda y: F.group_norm(y, 2),
        "nearest": lambda y: F.interpolate(y, scale_factor=2, mode="nearest"),
        "linear": lambda y: F.interpolate(y, scale_factor=2, mode=("linear", "bilinear", "trilinear")[dims - 1]),
        "cat": lambda y: torch.cat([y, y], 1), "pad": lambda y: F.pad(y, (1, 1)), "flip": lambda y: y.flip(1),
        "pad with a value": lambda y: F.pad(y, (1, 1), value=0.3), "slice": lambda y: y[..., 1:],
        "where": lambda y: torch.where(y > 0, y, y * 0.1), "masked_fill": lambda y: y.masked_fill(y > 0, 0.0),
        "matmul": lambda y: y @ y.transpose(-1, -2),
    }  # fmt: skip


@pytest.mark.parametrize("name", functions(1))
@pytest.mark.parametrize(
    ("dims", "symmetric"),
    [
        pytest.param(dims, symmetric, marks=[] if (dims, symmetric) == (1, True) else pytest.mark.slow)
        for dims in (1, 2, 3)
        for symmetric in (True, False)
    ],
)
def test_functions_of_integers(name: str, dims: int, symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    torch.manual_seed(0)
    net, x = Beside(functions(dims)[name], dims), torch.randn(48, 4, *[6] * dims)
    net(x[:2])
    assert_agrees(net.eval(), x, symmetric, tmp_path)


def test_layers_without_bias_stay_integers_in_onnx_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net(nn.Linear(8, 8, bias=False), torch.relu, nn.Linear(8, 5, bias=False)).eval()
    x = torch.randn(64, 6, 8)
    prepared = qat.prepare(net, qat.preset("int8"), x[:2])
    finalize(prepared, [x], NO_ROUNDING, trained=False)
    path = qat.export(qat.lower(prepared), tmp_path, x[:2], formats=["onnx"])["onnx"]
    assert kernels(path).counts == {"QuantizeLinear": 1, "QLinearMatMul": 1, "MatMulIntegerToFloat": 1}


def test_a_padded_average_stays_one_of_integers_in_onnx_runtime(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = CASES["padded average of an image"][0]().eval(), torch.randn(64, *IMAGE)
    prepared = qat.prepare(net, qat.preset("int8"), x[:2])
    finalize(prepared, [x], NO_ROUNDING, trained=False)
    path = qat.export(qat.lower(prepared), tmp_path, x[:2], formats=["onnx"])["onnx"]
    counts = kernels(path).counts
    assert counts["QLinearAveragePool"] == 1
    assert counts["QLinearGlobalAveragePool"] == 1
