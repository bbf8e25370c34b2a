"""Targets without floats: each network and operation in integers alone, held to what training simulates."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import qat
from qat.export.formats import integers_given
from qat.export.parity import ties_given, training_integers
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerNetwork, fixed
from qat.runtime import operations as ops
from qat.zoo.gpt import CharGPT
from qat.zoo.models import ResNet, SmallCNN
from tests.networks.blocks import Net
from tests.networks.keyword import DSCNN
from tests.networks.mobilenet import MobileNetV2, MobileNetV3Small
from tests.networks.unet import UNet
from tests.networks.vit import ViT


class NoFloats(TorchDispatchMode):
    """Refuses every operation that makes a float, but in the layers that take real numbers in and hand them out."""

    def __init__(self, network: IntegerNetwork) -> None:
        super().__init__()
        self.outside = False
        for layer in network.modules():
            if isinstance(layer, ops.QuantizeInput | ops.Dequantize):
                layer.register_forward_pre_hook(lambda *_: setattr(self, "outside", True))
                layer.register_forward_hook(lambda *_: setattr(self, "outside", False))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            floats = isinstance(tensor, Tensor) and tensor.is_floating_point()
            assert self.outside or not floats, f"{func} makes a float between input and output"
        return made


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    holds: type | None = None


def between(function: Callable[..., Tensor], holds: type | None = None, dims: int = 2, **parts: Any) -> Case:
    """A function between a convolution and a linear layer."""
    conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    shape = (3, *{1: (12,), 2: (7, 8), 3: (4, 6, 5)}[dims])

    def make() -> nn.Module:
        net = Net(
            lambda s, x: s.head(function(s, s.first(x)).flatten(1)),
            first=conv(3, 4, 3, padding=1), head=nn.LazyLinear(5), **copy.deepcopy(parts),
        )  # fmt: skip
        net(torch.zeros(2, *shape))
        return net

    return Case(make, shape, holds)


def both(pooled: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Maxima and their places."""
    values, places = pooled
    return values, places


def tokens(function: Callable[..., Tensor], holds: type | None = None, **parts: Any) -> Case:
    """A function between two linear layers, on sequences."""
    layers = dict(first=nn.Linear(8, 8), head=nn.Linear(8, 5), **parts)
    return Case(lambda: Net(lambda s, x: s.head(function(s, s.first(x))), **copy.deepcopy(layers)), (6, 8), holds)


def lived(norm: nn.Module) -> nn.Module:
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1)
    return norm


def attend(s: Any, y: Tensor) -> Tensor:
    scores = s.q(y) @ s.k(y).transpose(-2, -1) * 8**-0.5
    return torch.softmax(s.hide(scores) if hasattr(s, "hide") else scores, dim=-1) @ s.v(y)


def dot_product(s: Any, y: Tensor, **settings: Any) -> Tensor:
    return F.scaled_dot_product_attention(s.q(y), s.k(y), s.v(y), **settings)


torch.manual_seed(3)
QKV = {name: nn.Linear(8, 8) for name in ("q", "k", "v")}
LOWER = torch.ones(6, 6, dtype=torch.bool).tril()
OTHER = {"b": nn.Conv2d(4, 4, 1)}

NETWORKS: dict[str, Case] = {
    "ds_cnn": Case(lambda: DSCNN(width=8, depth=2), (1, 49, 10)),
    "small_cnn": Case(lambda: SmallCNN(1, 10, 4), (1, 12, 12)),
    "resnet20": Case(lambda: ResNet(20, in_channels=1), (1, 8, 8)),
    "mobilenet_v2": Case(lambda: MobileNetV2(10, width=0.25, depth=0.34), (3, 32, 32)),
    "mobilenet_v3": Case(lambda: MobileNetV3Small(10, width=0.25, depth=3), (3, 32, 32), fixed.Table),
    "unet": Case(lambda: UNet(2, width=4, depth=2), (1, 44, 44)),
    "vit": Case(lambda: ViT(depth=1), (3, 16, 16), fixed.FixedNorm),
}
OPERATIONS: dict[str, Case] = {
    "average": between(lambda s, y: F.avg_pool2d(y, 2), fixed.FixedAverage),
    "average_uneven": between(lambda s, y: F.avg_pool2d(y, 3, 2, 1, True, False), fixed.FixedAverage),
    "average_ceil": between(lambda s, y: F.avg_pool2d(y, (3, 2), 2, (1, 0), True, True), fixed.FixedAverage),
    "average_1d": between(lambda s, y: F.avg_pool1d(y, 3, 2), fixed.FixedAverage, dims=1),
    "average_3d": between(lambda s, y: F.avg_pool3d(y, 2), fixed.FixedAverage, dims=3),
    "adaptive": between(lambda s, y: F.adaptive_avg_pool2d(y, (7, 2)), fixed.FixedAverage),
    "mean": between(lambda s, y: y.mean(dim=(2, 3)), fixed.FixedMean),
    "sum": between(lambda s, y: y.sum(dim=1), fixed.FixedMean),
    "max": between(lambda s, y: F.max_pool2d(y, 3, 2, 1, ceil_mode=True)),
    "max_1d": between(lambda s, y: F.max_pool1d(y, 3, 2, 1), dims=1),
    "adaptive_max": between(lambda s, y: F.adaptive_max_pool2d(y, (3, 5)), ops.Move),
    "adaptive_max_1d": between(lambda s, y: s.op(y), ops.Move, dims=1, op=nn.AdaptiveMaxPool1d(5)),
    "adaptive_max_even": between(lambda s, y: F.adaptive_max_pool2d(y, (None, 4)), ops.MaxPool),
    "nearest": between(lambda s, y: F.interpolate(y, scale_factor=(1.7, 2)), ops.Move),
    "nearest_exact": between(lambda s, y: F.interpolate(y, size=(5, 11), mode="nearest-exact"), ops.Move),
    "nearest_smaller": between(lambda s, y: F.interpolate(y, size=(7, 4)), ops.Move),
    "nearest_3d": between(lambda s, y: s.op(y), ops.Move, dims=3, op=nn.Upsample(scale_factor=2)),
    "sub": between(lambda s, y: s.b(y) - y, fixed.FixedSum, **OTHER),
    "mul": between(lambda s, y: s.b(y) * y, fixed.FixedProduct, **OTHER),
    "gate": between(lambda s, y: y * torch.sigmoid(s.b(y).mean((2, 3), keepdim=True)), fixed.FixedProduct, **OTHER),
    "parameter": between(lambda s, y: y + s.w, fixed.FixedSum, w=nn.Parameter(torch.randn(4, 1, 1))),
    "norm": between(lambda s, y: F.relu(s.n(F.relu(y))), fixed.FixedAffine, n=nn.BatchNorm2d(4)),
    "concat": between(lambda s, y: torch.cat([F.relu(y), torch.tanh(s.b(y))], 1), **OTHER),
    "hardswish_by_hand": between(lambda s, y: y * F.relu6(y + 3) / 6, fixed.FixedProduct),
    "clamp": between(lambda s, y: y.clamp(-0.3, 0.5)),
    "shifted_clamp": between(lambda s, y: y.clamp(0.1, 0.5), fixed.Table),
    "reflect": between(lambda s, y: F.pad(y, (2, 1, 1, 3), mode="reflect")),
    "replicate": between(lambda s, y: F.pad(y, (2, 1, 1, 3), mode="replicate")),
    "circular": between(lambda s, y: F.pad(y, (2, 1), mode="circular"), dims=1),
    "pad": between(lambda s, y: F.pad(y, (2, 1, 1, 3))),
    "pad_with_a_number": between(lambda s, y: F.pad(y, (2, 1, 1, 3), value=0.4), ops.Pad),
    "transposed": between(lambda s, y: s.t(y), t=nn.ConvTranspose2d(4, 4, 3, 2, 1, 1, groups=2)),
    "two_readers": between(lambda s, y: s.b(F.relu(y)) + s.c(y), c=nn.Conv2d(4, 4, 3, padding=1, groups=4), **OTHER),
    "group_norm": between(lambda s, y: s.n(y), fixed.FixedNorm, n=lived(nn.GroupNorm(2, 4))),
    "instance_norm": between(lambda s, y: s.n(y), fixed.FixedNorm, n=lived(nn.InstanceNorm2d(4, affine=True))),
    "layer_norm": tokens(lambda s, y: s.n(y), fixed.FixedNorm, n=lived(nn.LayerNorm(8))),
    "rms_norm": tokens(lambda s, y: s.n(y), fixed.FixedNorm, n=lived(nn.RMSNorm(8))),
    "attention": tokens(attend, fixed.FixedSoftmax, **QKV),
    "causal": tokens(lambda s, y: dot_product(s, y, is_causal=True), fixed.FixedSoftmax, **QKV),
    "boolean_mask": tokens(lambda s, y: dot_product(s, y, attn_mask=s.m), fixed.FixedSoftmax, m=LOWER, **QKV),
    "float_mask": tokens(
        lambda s, y: dot_product(s, y, attn_mask=s.m), fixed.FixedSoftmax,
        m=torch.zeros(6, 6).masked_fill(~LOWER, -torch.inf), **QKV,
    ),
    "filled_mask": tokens(
        lambda s, y: torch.softmax((s.q(y) @ s.k(y).mT).masked_fill(s.m == 0, -torch.inf), -1) @ s.v(y),
        fixed.FixedSoftmax, m=LOWER.float(), **QKV,
    ),
    "softmax_at_the_end": Case(lambda: nn.Sequential(nn.Linear(8, 6), nn.Softmax(dim=1)), (8,), fixed.FixedSoftmax),
    "function_at_the_end": Case(lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh()), (8,), fixed.Table),
    "joined_at_the_end": Case(
        lambda: Net(lambda s, x: torch.cat([torch.tanh(s.a(x)), s.b(x)], 1), a=nn.Linear(8, 3), b=nn.Linear(8, 4)), (8,)
    ),
    "sum_at_the_end": between(lambda s, y: (y + s.b(y)).mean((2, 3)), **OTHER),
}  # fmt: skip
OPERATIONS |= {
    name: between(lambda s, y, f=function: f(y), fixed.Table)  # type: ignore[misc]
    for name, function in {
        "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardswish": F.hardswish,
        "hardsigmoid": F.hardsigmoid, "elu": F.elu, "leaky_relu": F.leaky_relu, "softplus": F.softplus, "abs": abs,
        "exp": torch.exp, "square": torch.square, "a_chain": lambda y: torch.tanh(F.gelu(y * 0.5) + 1) / 3,
    }.items()
}  # fmt: skip


def config(target: str = "integer_only", bits: int = 8, **others: Any) -> qat.QuantConfig:
    activation = {"bits": bits, "symmetric": False}
    weight = {"bits": bits, "granularity": "channel"}
    data = {"weight": weight, "activation": activation, "input": activation, "target": target}
    return qat.QuantConfig.from_dict(data | others)


def finalized(net: nn.Module, x: Tensor, settings: qat.QuantConfig) -> fx.GraphModule:
    prepared = qat.prepare(net, settings, x[:4])
    qat.calibrate(prepared, [x])
    finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=0), trained=True)
    return prepared


def build(case: Case, samples: int = 24) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net, x = case.make(), torch.randn(samples, *case.shape) + 0.2
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.weight.data[::3] *= -1
    with torch.no_grad():
        for _ in range(3):
            net(x)
    return net.eval(), x


@torch.no_grad()
def assert_runs_what_trains(prepared: fx.GraphModule, x: Tensor, edges: int) -> IntegerNetwork:
    """The parity rule, the readable form equal to the fast one, and no float inside."""
    network = qat.lower(prepared)
    given = training_integers(prepared, network, x)
    assert len(given) == edges
    made, ties = integers_given(network, (x,), given), ties_given(network, (x,), given)
    assert made.keys() == given.keys()
    for name, wanted in given.items():
        steps = (made[name].int() - wanted.int()).abs()
        assert steps.max() <= 1, name
        tied = ties.get(name, torch.zeros(steps.shape, dtype=torch.bool))
        assert ((steps != 0) & ~tied).sum() <= max(1, 1e-3 * steps.numel()), name
        assert made[name].dtype == torch.int8
    fast = network(x)
    network.set_reference()
    assert torch.equal(network(x), fast)
    with NoFloats(network):
        network(x)
    return network


def quantizers(prepared: fx.GraphModule) -> int:
    """Tensors that training puts on a grid."""
    return sum("quantizers." in str(node.target) for node in prepared.graph.nodes)


@pytest.mark.parametrize("target", ["integer_only", "cmsis_nn"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_the_literature(name: str, target: str, tmp_path: Path) -> None:
    case = NETWORKS[name]
    net, x = build(case, 8)
    prepared = finalized(net, x, config(target, bits=8 if target == "integer_only" else 4))
    network = assert_runs_what_trains(prepared, x, quantizers(prepared))
    assert case.holds is None or any(isinstance(layer, case.holds) for layer in network.modules())
    with torch.no_grad():
        simulated, made = prepared(x), network(x)
    assert (made - simulated).abs().mean() <= 0.03 * simulated.std()
    qat.export(network, tmp_path, x[:2], formats=["int8"])
    again = qat.load(tmp_path / "model.safetensors")
    assert torch.equal(again(x), made)
    assert torch.equal(copy.deepcopy(network)(x), made)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    case = OPERATIONS[name]
    net, x = build(case)
    prepared = finalized(net, x, config())
    network = assert_runs_what_trains(prepared, x, quantizers(prepared))
    assert case.holds is None or any(isinstance(layer, case.holds) for layer in network.modules())
    with torch.no_grad():
        expected, made = net(x), network(x)
    assert (made - expected).abs().max() <= 0.1 * expected.abs().max()


def test_a_language_model_without_floats() -> None:
    torch.manual_seed(0)
    net = CharGPT(17, context=12, n_layer=1, n_head=2, width=16).eval()
    for parameter in net.parameters():
        parameter.data.mul_(3)
    x = torch.randint(17, (8, 12))
    prepared = finalized(net, x, config())
    network = assert_runs_what_trains(prepared, x, quantizers(prepared))
    with torch.no_grad():
        made, simulated = network(x), prepared(x)
        assert (made - simulated).abs().mean() <= 0.02 * simulated.std()
        later = x.clone()
        later[:, 6:] = 0
        assert torch.equal(network(later)[:, :6], made[:, :6])  # no look at what comes after


def test_weights_of_any_sign_and_a_bias_between_the_integers() -> None:
    """Unsigned asymmetric weights become int8; a layer called on two scales adds a fraction of the sum's unit."""
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    net = Net(lambda s, x: s.head(s.shared(F.relu(s.shared(x)) * 3)), shared=shared, head=nn.Linear(8, 4))
    x = torch.randn(64, 8)
    weight = {"bits": 8, "symmetric": False, "granularity": "tensor"}
    prepared = finalized(net, x, config(weight=weight))
    network = assert_runs_what_trains(prepared, x, quantizers(prepared))
    convs = [layer for layer in network.modules() if isinstance(layer, fixed.FixedConv)]
    assert all(layer.weight.dtype == torch.int8 for layer in convs)
    assert sum(layer.remainder is not None for layer in convs) == 2
    with torch.no_grad():
        assert (network(x) - prepared(x)).abs().max() <= 0.02 * prepared(x).abs().max()


def test_the_result_of_the_network_is_one_grid_of_integers() -> None:
    """Logits are comparable as integers: one scale for all classes, and no precision lost against float."""
    net, x = build(NETWORKS["small_cnn"])
    prepared = finalized(net, x, config())
    network = qat.lower(prepared)
    last = network.layer(network.outputs[0])
    assert isinstance(last, ops.Dequantize)
    with torch.no_grad():
        integers = network.run(x)[network.nodes[-1].inputs[0]]
        assert integers.dtype == torch.int32
        assert torch.equal(integers.argmax(1), prepared(x).argmax(1))
        torch.testing.assert_close(network(x), prepared(x), rtol=1e-5, atol=1e-5)


def test_sums_are_moved_and_selected_without_loss() -> None:
    """What the network returns is 31 bits wide: more than float32, in which torch pools and interpolates, holds."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=1.7), nn.AdaptiveMaxPool2d((4, 7)))
    network = qat.lower(finalized(net, torch.randn(16, 3, 8, 8), config()))
    tensors = network.run(torch.randn(4, 3, 8, 8))
    sums = tensors[network.nodes[-3].inputs[0]]
    assert sums.dtype == torch.int32
    assert int(sums.abs().max()) > 2**24
    expected = F.adaptive_max_pool2d(F.interpolate(sums.double(), scale_factor=1.7), (4, 7))
    assert torch.equal(tensors[network.nodes[-1].inputs[0]].double(), expected)


@pytest.mark.parametrize("function", [torch.tanh, torch.sigmoid, F.gelu])
def test_a_function_is_returned_moved(function: Callable[[Tensor], Tensor]) -> None:
    """What is moved before it is looked up in a table has not been looked up."""
    torch.manual_seed(0)
    x = torch.randn(32, 3, 6)
    prepared = finalized(Net(lambda s, x: function(s.conv(x)).flatten(1), conv=nn.Conv1d(3, 4, 3)), x, config())
    with torch.no_grad():
        made, expected = qat.lower(prepared)(x), prepared(x)
    assert (made - expected).abs().max() <= 0.02 * expected.abs().max()


class OnTwoScales(nn.Module):
    """A layer that is called with inputs of two scales: its bias lies between the integers of a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.sigmoid(self.shared(2.5 * torch.tanh(self.shared(x)))))


def test_a_bias_between_the_integers_of_a_sum_is_that_of_training() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 6)
    prepared = finalized(OnTwoScales(), x, config())
    network = assert_runs_what_trains(prepared, x, quantizers(prepared))
    layers = [m for m in network.modules() if isinstance(m, fixed.FixedConv) and m.remainder is not None]
    assert layers
    bias = prepared.get_submodule("shared").bias.double()
    for layer in layers:
        unit = layer.input_scale.double() * layer.weight_scale.double()
        stored = (layer.bias.double() + layer.remainder.double() / 2**layer.fraction) * unit
        assert ((stored - bias).abs() <= unit * 2.0**-16).all()
        assert layer.fraction == layer.spec()["fraction"] == fixed.FRACTION
    settings = layers[0].spec()
    del settings["fraction"], settings["output"]
    assert fixed.FixedConv(**settings).fraction == 8  # of files that do not say it
    for wrong in (-1, 32):
        with pytest.raises(ValueError, match=f"fraction={wrong} is not valid: give bits from 0 to 31"):
            fixed.FixedConv(wrong, **settings)


UNPOOLED: dict[str, Case] = {
    "function": between(lambda s, y: F.max_unpool2d(*both(F.max_pool2d(y, (1, 2), return_indices=True)), (1, 2))),
    "modules": between(lambda s, y: s.up(*both(s.op(y))), dims=1, op=nn.MaxPool1d(3, return_indices=True),
                       up=nn.MaxUnpool1d(3)),
}  # fmt: skip


@pytest.mark.parametrize("name", UNPOOLED)
def test_maxima_back_at_their_places(name: str) -> None:
    """As training has it: on a grid two values may be the same, and the first of them the maximum, unlike in float."""
    net, x = build(UNPOOLED[name])
    prepared = finalized(net, x, config())
    network = assert_runs_what_trains(prepared, x, quantizers(prepared))
    assert any(isinstance(layer, ops.Move) for layer in network.modules())


@pytest.mark.parametrize(
    ("make", "shape", "changes", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.LogSoftmax(1), nn.Linear(8, 2)), (8,), {}, "log_softmax"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 2, 1)),
         (3, 8, 8), {}, "interpolate"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(4), nn.Conv2d(4, 2, 1)), (3, 8, 8), {},
         "adaptive_avg_pool"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4), nn.Conv2d(4, 2, 1)), (3, 8, 8), {}, "prelu"),
    ],
)  # fmt: skip
def test_what_needs_floats_is_refused_by_name(
    make: Callable[[], nn.Module], shape: tuple[int, ...], changes: dict[str, Any], message: str
) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    prepared = finalized(make(), x, config(**changes))
    with pytest.raises(ValueError, match=rf"\({message}\) cannot be computed without floats.*target=integer_only"):
        qat.lower(prepared)


def test_a_layer_that_is_left_float_is_refused_before_it_is_prepared() -> None:
    rules = [{"match": "0", "weight": {"bits": None}, "activation": {"bits": None}}]
    with pytest.raises(ValueError, match=r"quant\.rules\[0\]\.weight\.bits=null: target=integer_only does not take"):
        finalized(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), torch.randn(8, 8), config(rules=rules))


def test_a_mean_of_another_number_of_values_is_refused() -> None:
    net, x = build(NETWORKS["ds_cnn"])
    network = qat.lower(finalized(net, x, config()))
    with pytest.raises(ValueError, match=r"a mean of .* prepare it with others"):
        network(torch.randn(2, 1, 60, 10))
