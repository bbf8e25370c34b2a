import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from qat.zoo.models import MLP, PadShortcut, ResNet, SmallCNN, kaiming_init

SHARED = Path(__file__).parents[2].parent / "shared"

BUILDERS: dict[str, Callable[[int, int], nn.Module]] = {
    "small_cnn": lambda channels, size: SmallCNN(channels, 7),
    "resnet_a": lambda channels, size: ResNet(20, "A", channels, 7),
    "resnet_b": lambda channels, size: ResNet(20, "B", channels, 7),
    "mlp": lambda channels, size: MLP(channels, size, 7),
}


def parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32)])
@pytest.mark.parametrize("name", BUILDERS)
def test_shapes_and_gradients(name: str, channels: int, size: int) -> None:
    net = BUILDERS[name](channels, size)
    logits = net(torch.randn(4, channels, size, size))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", BUILDERS)
def test_traces_with_the_default_tracer_and_each_activation_is_its_own_module(name: str) -> None:
    net = BUILDERS[name](3, 8).eval()
    graph = fx.symbolic_trace(net)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(graph(x), net(x))
    called = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    adds = [node for node in graph.graph.nodes if node.op == "call_function" and node.target.__name__ == "add"]
    assert len(adds) == {"small_cnn": 1, "resnet_a": 9, "resnet_b": 9, "mlp": 0}[name]


# He et al. 2015, table 6, gives 0.27 M, 0.46 M, 0.66 M and 0.85 M; exact for three depths in the published checkpoints.
@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)])
def test_resnet_option_a_has_the_published_size(depth: int, count: int) -> None:
    assert parameters(ResNet(depth)) == count


def test_resnet_option_b_adds_two_projections() -> None:
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)  # 1x1 convolution, BatchNorm weight and bias
    assert parameters(ResNet(20, "B")) - parameters(ResNet(20, "A")) == projections


def test_small_cnn_size() -> None:
    assert 15_000 <= parameters(SmallCNN(3, 10)) <= 40_000


def test_mlp_size_follows_its_arguments() -> None:
    assert parameters(MLP(3, 8, 5, hidden=[16, 12])) == (192 * 16 + 16) + (16 * 12 + 12) + (12 * 5 + 5)
    assert parameters(MLP(1, 8, 5, hidden=[])) == 64 * 5 + 5


def test_no_convolution_before_batch_norm_has_a_bias() -> None:
    for net in (SmallCNN(1, 10), ResNet(20, "A"), ResNet(20, "B")):
        assert all(conv.bias is None for conv in net.modules() if isinstance(conv, nn.Conv2d))


def test_pad_shortcut_by_hand() -> None:
    x = torch.arange(1.0, 19.0).reshape(1, 2, 3, 3)
    y = PadShortcut(2, 4)(x)
    assert y.shape == (1, 4, 2, 2)
    assert y[0, 0].eq(0).all()
    assert y[0, 3].eq(0).all()
    assert y[0, 1].tolist() == [[1, 3], [7, 9]]
    assert y[0, 2].tolist() == [[10, 12], [16, 18]]


def test_kaiming_init_has_the_standard_deviation_of_the_paper() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Linear(400, 300))
    kaiming_init(net)
    assert net[0].weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert net[1].weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert net[0].bias.abs().sum() == 0


def test_networks_use_kaiming_init() -> None:
    torch.manual_seed(0)
    assert ResNet(20).layer3[1].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / 576), rel=0.02)
    assert SmallCNN(3, 10).conv2[0].weight.std().item() == pytest.approx(math.sqrt(2 / 288), rel=0.05)
    assert MLP(3, 32, 10).hidden[0].weight.std().item() == pytest.approx(math.sqrt(2 / 3072), rel=0.02)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNet(depth=18), r"depth=18 .* 20, 32, 44, 56"),
        (lambda: ResNet(shortcut="C"), r"shortcut='C' .* A, B"),
        (lambda: ResNet(in_channels=0), r"in_channels=0 .* at least 1"),
        (lambda: SmallCNN(3, -1), r"num_classes=-1 .* at least 1"),
        (lambda: SmallCNN(3, 10, width=1.5), r"width=1\.5 .* integer"),
        (lambda: MLP(1, 0, 10), r"image_size=0 .* at least 1"),
        (lambda: MLP(1, 8, 10, hidden=[32, 0]), r"hidden\[1\]=0 .* at least 1"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def lossless_images(count: int) -> tuple[Tensor, Tensor]:
    """The first training images of CIFAR-10, original pixels, normalised as the pretrained weights expect."""
    import io

    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(SHARED / "data" / "cifar10" / "train_first4000_lossless.parquet").slice(0, count).to_pylist()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))) for row in rows])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.tensor([row["label"] for row in rows])


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"pretrained weights and images are in {SHARED.name}/, not here")
def test_pretrained_weights_load_strictly_and_classify() -> None:
    from safetensors.torch import load_file

    net = ResNet(depth=20, shortcut="A").eval()
    net.load_state_dict(load_file(SHARED / "weights" / "resnet20_cifar10.safetensors"), strict=True)
    x, labels = lossless_images(512)
    with torch.no_grad():
        accuracy = (net(x).argmax(1) == labels).float().mean().item()
    assert accuracy >= 0.99  # 99.80 % of all 4,000
