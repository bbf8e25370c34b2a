"""Networks of the literature (`tests/networks`): prepared, trained, lowered, saved, and run by ONNX Runtime."""

import copy
import functools
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.export.onnxruntime import OnnxNetwork
from qat.export.parity import ParityLimits, measure
from qat.layers import SWAPS
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerConv, IntegerNetwork
from qat.runtime import operations as ops
from tests.networks.densenet import DenseNet
from tests.networks.keyword import DSCNN
from tests.networks.mobilenet import EfficientNetB0, MobileNetV2, MobileNetV3Small
from tests.networks.resnet import ResNet18, ResNet20
from tests.networks.unet import UNet
from tests.whole_way import assert_files_agree, trained

SHARED = Path(os.environ.get("QAT_SHARED", Path(__file__).parents[2] / "shared"))
IMAGE = (3, 48, 48)
SIXTEEN = {"weight": {"bits": 16, "granularity": "channel"}, "activation": {"bits": 16}, "input": {"bits": 16}}
ON_FLOATS = {
    "silu": "a function of one tensor: of the exact sums of the layer before it, rounded once behind it",
    "hardswish": "the same",
    "sigmoid": "the same, the gate of a squeeze-excite",
    "hardsigmoid": "the same",
    "mul": "a gate's product: reads two integer tensors, is rounded to a third grid",
    "interpolate": "averages of integers, rounded to a grid of their own",
    "Affine": "a BatchNorm in front of its layer, behind a concatenation: no layer to fold it into",
    "Relu": "nothing quantized reads it: a BatchNorm in front of its layer does",
    "MaxPool": "the same",
    "Concat": "the same",
    "Average": "the same, and a mean makes new values",
}
"""What may be computed on real numbers in the integer network, and why."""


class Case(NamedTuple):
    """A small network, its inputs' shape, and how often each entry of ON_FLOATS stands in it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    islands: dict[str, int] = {}  # noqa: RUF012 (never changed)


CASES: dict[str, Case] = {
    "resnet18": Case(lambda: ResNet18(10, width=8, depth=2)),
    "mobilenet_v2": Case(lambda: MobileNetV2(10, width=0.25, depth=0.34)),
    "mobilenet_v3_small": Case(
        lambda: MobileNetV3Small(10, width=0.25, depth=5), islands={"hardswish": 7, "hardsigmoid": 3, "mul": 3}
    ),
    "efficientnet_b0": Case(
        lambda: EfficientNetB0(10, width=0.25, depth=0.34), islands={"silu": 22, "sigmoid": 7, "mul": 7}
    ),
    "densenet": Case(
        lambda: DenseNet(10, width=4, depth=(2, 2)),
        islands={"Affine": 6, "Concat": 6, "Relu": 1, "MaxPool": 1, "Average": 1},
    ),
    "unet": Case(lambda: UNet(2, width=4, depth=2), (1, 44, 44)),
    "unet_bilinear": Case(lambda: UNet(2, 4, 2, padding=1, up="bilinear"), (1, 16, 16), {"interpolate": 2}),
    "unet_nearest": Case(lambda: UNet(2, 4, 2, padding=1, up="nearest"), (1, 16, 16)),
    "ds_cnn": Case(lambda: DSCNN(12, width=8, depth=2), (1, 49, 10)),
}


@functools.cache
def lived_in(name: str) -> tuple[nn.Module, Tensor]:
    """(a network whose BatchNorms have statistics, and gains of both signs; inputs).

    A deep untrained network with BatchNorm and ReLU makes any error grow, by up to 1.5 a layer (Yang et al. 2019, "A
    Mean Field Theory of Batch Normalization"): 22 layers of MobileNetV2 turned 4e-5, the rounding of 16 bits, into
    2e-3. With orthogonal weights and biases above zero it stays an error of rounding.
    """
    torch.manual_seed(0)
    net, x = CASES[name].make(), torch.randn(64, *CASES[name].shape)
    for layer in [m for m in net.modules() if isinstance(m, nn.Conv2d)]:
        nn.init.orthogonal_(layer.weight)
        if layer.groups > 1:
            nn.init.dirac_(layer.weight, layer.groups)
            layer.weight.data += 0.2 * torch.randn_like(layer.weight)
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 1.0, 0.3)
        norm.weight.data[::3] *= -1
        norm.momentum = None  # the mean of all batches
    with torch.no_grad():
        for _ in range(3):
            net(x)
    return net.eval(), x


@functools.cache
def exported(name: str, target: str = "generic") -> tuple[fx.GraphModule, IntegerNetwork]:
    """(8-bit network from the float weights, with the weights' bits that its target computes; the same in integers)."""
    net, x = lived_in(name)
    prepared = qat.prepare(copy.deepcopy(net), qat.preset("int8", target=target), x[:2])
    finalize(prepared, x.split(32), PTQConfig(), trained=False)
    return prepared, qat.lower(prepared)


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("make", "count"),
    [(ResNet18, 11_689_512), (ResNet20, 269_722), (MobileNetV2, 3_504_872), (MobileNetV3Small, 2_542_856),
     (EfficientNetB0, 5_288_548), (DenseNet, 7_978_856)],
)  # fmt: skip
def test_size_as_published(make: type[nn.Module], count: int) -> None:
    with torch.device("meta"):
        assert parameters(make()) == count


def test_layout_of_unet_as_published() -> None:
    with torch.device("meta"):
        net = UNet()
        assert net(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(layers) == 23
    assert max(layer.out_channels for layer in layers) == 1024
    assert sum(parameters(layer) for layer in layers) == 31_030_658


def test_memory_of_ds_cnn_as_published() -> None:
    """38.6 KB: a byte a weight, BatchNorm folded into biases, and the largest input and output of a layer."""
    with torch.device("meta"):
        net = DSCNN()
        maps = net.features(torch.empty(1, 1, 49, 10))
    layers = [m for m in net.modules() if type(m) in SWAPS]
    weights = sum(m.weight.numel() + m.weight.shape[0] for m in layers)
    assert maps.shape == (1, 64, 25, 5)
    assert round((weights + 2 * maps.numel()) / 1000, 1) == 38.6


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_sixteen_bits_are_float(name: str) -> None:
    net, x = lived_in(name)
    prepared = qat.prepare(copy.deepcopy(net), qat.QuantConfig.from_dict(SIXTEEN), x[:2])
    finalize(prepared, [x], PTQConfig(), trained=False)
    expected = net(x)
    for got in (prepared(x), qat.lower(prepared)(x)):
        assert 0 < (got - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_trains_and_reloads(name: str) -> None:
    net, x = lived_in(name)
    net = copy.deepcopy(net)
    prepared = qat.prepare(net, qat.preset("int8"), x[:2])
    missing, unexpected = prepared.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected
    assert all("quantizer" in key for key in missing)
    torch.manual_seed(1)
    expected = net.train()(x)
    torch.manual_seed(1)
    assert torch.equal(prepared.train()(x), expected)  # dropout and stochastic depth, too
    qat.calibrate(prepared, x.split(32))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-2)
    prepared.train()(x).square().mean().backward()
    before = {key: p.detach().clone() for key, p in prepared.named_parameters()}
    optimizer.step()
    for key, p in prepared.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert p.dim() < 2 or not torch.equal(p, before[key]), key
    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    again = qat.prepare(CASES[name].make(), qat.preset("int8"), x[:2])
    again.load_state_dict(torch.load(file, weights_only=True))
    qat.set_mode(again, "quantize")
    assert torch.equal(again.eval()(x), prepared.eval()(x))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", CASES)
def test_trained_then_lowered(name: str, tmp_path: Path) -> None:
    """Without training they are lowered below, by target."""
    net, x = lived_in(name)
    assert_files_agree(trained(copy.deepcopy(net), (x,), qat.preset("int8")), (x,), tmp_path, onnx=False)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_integers_wherever_they_can_be(name: str) -> None:
    net, x = lived_in(name)
    _, network = exported(name)
    layers = {node.name: network.layer(node.name) for node in network.nodes}
    assert sum(type(m) in SWAPS for m in net.modules()) == sum(isinstance(m, IntegerConv) for m in layers.values())
    tensors = network.run(x[:2])
    real = {node.name for node in network.nodes if tensors[node.name].is_floating_point()} - set(network.outputs)
    islands: Counter[str] = Counter()
    for node in network.nodes:
        layer = layers[node.name]
        on_floats = node.name in real and not isinstance(layer, IntegerConv | ops.Dequantize)
        if isinstance(layer, ops.Function):
            islands[layer.name] += 1
            assert node.name not in real
        elif isinstance(layer, ops.Affine) or on_floats:
            islands[type(layer).__name__] += 1
        if isinstance(layer, ops.Add | ops.Mean) or (isinstance(layer, ops.Function) and layer.name == "mul"):
            assert node.name not in real
            assert all(isinstance(layers[source], ops.Dequantize) for source in node.inputs)  # fused by engines
        if isinstance(layer, IntegerConv) and node.name in real:  # only a function keeps a layer from rounding
            readers = [layers[n.name] for n in network.nodes if node.name in n.inputs]
            assert all(type(r).__name__ in ON_FLOATS or getattr(r, "name", "") in ON_FLOATS for r in readers)
    assert dict(islands) == CASES[name].islands
    assert set(islands) <= set(ON_FLOATS)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("target", ["generic", "onnxruntime_x86"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_trains_is_what_runs(name: str, target: str, tmp_path: Path) -> None:
    """On `onnxruntime_x86` without its exact mode: weights of 7 bits do not saturate its int16 sums."""
    net, x = lived_in(name)
    prepared, network = exported(name, target)
    expected = prepared(x)
    error = expected - net(x)
    assert 0 < error.square().mean() < 0.2 * net(x).var()
    assert (network(x) - expected).square().mean() <= 5e-2 * error.square().mean()  # steps near a tie
    paths = qat.export(network, tmp_path, x[:2])
    checkpoint = qat.load(paths["int8"])
    assert torch.equal(checkpoint(x), network(x))
    for pair, parity in measure(prepared, network, paths, x, target=target, layer_samples=16).items():
        assert parity.layers
        parity.check(pair, ParityLimits(agreement=1.0))
    assert OnnxNetwork(paths["onnx"], target)(x[:1]).shape == expected[:1].shape


# ---- real images -----------------------------------------------------------------------------------------------------


def cifar(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first images of CIFAR-10, normalised as the published weights ask, and their classes."""
    pyarrow = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    file = SHARED / "data" / "cifar10" / f"{split}.parquet"
    if not file.is_file():
        pytest.skip(f"{file} is not here; set QAT_SHARED to the folder that holds data/cifar10")
    table = pyarrow.read_table(file).slice(0, count)
    encoded, label = (next(c for c in names if c in table.column_names) for names in (("img", "image"), ("label",)))
    pixels = [numpy.array(image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table[encoded].to_pylist()]
    x = torch.from_numpy(numpy.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1), torch.tensor(table[label].to_pylist())


def published() -> nn.Module:
    file = SHARED / "weights" / "resnet20_cifar10.safetensors"
    if not file.is_file():
        pytest.skip(f"{file} is not here; set QAT_SHARED to the folder that holds weights")
    safetensors = pytest.importorskip("safetensors.torch")
    net = ResNet20()
    net.load_state_dict(safetensors.load_file(file), strict=False)
    return net


def trained_briefly() -> nn.Module:
    """A narrow ResNet-18 on 2,000 images: there are no published weights of this network for small images."""
    x, y = cifar("train_first4000_lossless", 2000)
    torch.manual_seed(0)
    net = ResNet18(10, width=12, depth=1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(6):
        for rows in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net


@pytest.mark.parametrize(("make", "least"), [(published, 0.75), (trained_briefly, 0.35)])
@torch.no_grad()
def test_accuracy_on_images(make: Callable[[], nn.Module], least: float, tmp_path: Path) -> None:
    """8 bits without training lose less than a point."""
    with torch.enable_grad():
        net = make()
    net.eval()
    train, _ = cifar("train_first4000_lossless", 256)
    x, y = cifar("test", 600)
    prepared = qat.prepare(net, qat.preset("int8"), x[:2])
    finalize(prepared, train.split(64), PTQConfig(), trained=False)
    network = qat.lower(prepared)
    onnx = OnnxNetwork(qat.export(network, tmp_path, x[:2], ["onnx"])["onnx"])
    right = {key: float((f(x).argmax(1) == y).float().mean()) for key, f in
             {"float": net, "integers": network, "onnx": onnx}.items()}  # fmt: skip
    assert right["float"] >= least
    assert right["integers"] >= right["float"] - 0.01, right
    assert abs(right["onnx"] - right["integers"]) <= 0.002, right
