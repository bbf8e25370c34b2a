"""Lowering: every supported operation in a small network, against the fake-quantized network and against float.

The fake-quantized network runs in torch's float kernels; its integers, given equal inputs, are what the integer
network must make layer by layer.
"""

import copy
import io
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.fake_quant import FakeQuantize
from qat.ptq import round_biases
from qat.runtime import FloatConv, IntegerConv, IntegerNetwork
from qat.runtime import operations as ops

SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {
        "weight": {"bits": 8},
        "activation": {"bits": 8},
        "input": {"bits": 8},
    },
    "affine": {
        "weight": {"bits": 8, "symmetric": False, "narrow_range": False},
        "activation": {"bits": 8, "symmetric": False},
        "input": {"bits": 8, "symmetric": False},
    },
    "w4a4": {
        "weight": {"bits": 4, "narrow_range": False},
        "activation": {"bits": 4, "symmetric": False},
        "input": {"bits": 8, "symmetric": False},
    },
    "w2a8_tensor": {
        "weight": {"bits": 2, "narrow_range": False, "granularity": "tensor"},
        "activation": {"bits": 8},
        "input": {"bits": 8, "narrow_range": True},
    },
    "a16": {
        "weight": {"bits": 8},
        "activation": {"bits": 16},
        "input": {"bits": 16},
    },
    "a16_affine": {
        "weight": {"bits": 8, "symmetric": False, "narrow_range": False},
        "activation": {"bits": 16, "symmetric": False},
        "input": {"bits": 16, "symmetric": False},
    },
    "group": {
        "weight": {"bits": 4, "granularity": "group", "group_size": 4, "allow_padding": True},
        "activation": {"bits": 8},
        "input": {"bits": 8},
    },
    "weight_only_group": {
        "weight": {"bits": 4, "granularity": "group", "group_size": 4, "allow_padding": True, "symmetric": False},
    },
    "weight_only": {"weight": {"bits": 4, "symmetric": False, "narrow_range": False}},
}  # fmt: skip


class Net(nn.Module):
    """Submodules by name and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.compute = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class Case(NamedTuple):
    """One network: how it is made, the shape of a sample, and which runtime layers must be there (name -> type)."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    layers: dict[str, type] = {}  # noqa: RUF012
    config: dict[str, Any] = {}  # noqa: RUF012


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs)


def behind(function: Callable[[Tensor], Tensor], features: int = 8, **modules: nn.Module) -> Callable[[], Net]:
    """conv -> function -> linear over the channels' means: `function` stands between two quantized layers."""

    def make() -> Net:
        return Net(
            lambda s, x: s.fc(function(s.conv(x)).flatten(1)),
            conv=conv(3, 4, 3, padding=1), fc=nn.LazyLinear(features), **modules,
        )  # fmt: skip

    return make


IMAGE = (3, 6, 6)
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu,
    "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
}  # fmt: skip
MODULES: dict[str, type[nn.Module]] = {
    "relu6": nn.ReLU6, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU,
    "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid,
}  # fmt: skip
CASES: dict[str, Case] = {
    "linear": Case(lambda: nn.Linear(12, 7), (12,), {"": IntegerConv}),
    "linear_sequence": Case(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 5, bias=False)), (7, 6),
        {"0": IntegerConv, "2": IntegerConv},
    ),
    "mlp_batch_norm": Case(
        lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5)), (6,),
        {"0": IntegerConv, "3": IntegerConv},
    ),
    "conv1d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(3, 6, 5, stride=2, padding=3, dilation=2), nn.BatchNorm1d(6), nn.ReLU(),
            nn.Conv1d(6, 4, 4, padding="same", groups=2, bias=False), nn.MaxPool1d(2), nn.Flatten(), nn.LazyLinear(5),
        ), (3, 19), {"0": IntegerConv, "3": IntegerConv, "4": ops.MaxPool, "6": IntegerConv},
    ),
    "conv2d": Case(
        lambda: nn.Sequential(
            conv(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, bias=False),
            nn.BatchNorm2d(8), nn.ReLU(), conv(8, 8, 4, padding="same", groups=8), conv(8, 4, 3, padding="valid"),
        ), (4, 8, 7), {"0": IntegerConv, "3": IntegerConv, "4": IntegerConv},
    ),
    "relu_behind_quantizer": Case(
        lambda: Net(
            lambda s, x: s.b(torch.relu(y := s.a(x))) + s.c(y), a=conv(3, 4, 3), b=conv(4, 4, 1), c=conv(4, 4, 1)
        ), IMAGE, {"quantizers.a": ops.Relu},
    ),
    "batch_norm_alone": Case(
        lambda: Net(lambda s, x: s.b(s.n(s.p(s.a(x)))), a=conv(3, 4, 3), p=nn.MaxPool2d(2), n=nn.BatchNorm2d(4),
                    b=conv(4, 2, 1)), IMAGE, {"p_2": ops.Affine},
    ),
    "add": Case(
        lambda: Net(lambda s, x: s.c((s.a(x) + s.b(x)).relu()), a=conv(3, 4, 3), b=conv(3, 4, 3), c=conv(4, 2, 1)),
        IMAGE, {"add": ops.Add},
    ),
    "add_twice_the_same": Case(
        lambda: Net(lambda s, x: s.c((y := s.a(x)) + y), a=conv(3, 4, 3), c=conv(4, 2, 1)), IMAGE, {"add": ops.Add}
    ),
    "add_in_place": Case(
        lambda: Net(lambda s, x: s.c(s.a(x).relu().add_(s.b(x))), a=conv(3, 4, 3), b=conv(3, 4, 3), c=conv(4, 2, 1)),
        IMAGE, {"add": ops.Add},
    ),
    "cat": Case(
        lambda: Net(lambda s, x: s.c(torch.cat([s.a(x), s.b(x).relu()], dim=1)), a=conv(3, 4, 3), b=conv(3, 2, 3),
                    c=conv(6, 2, 1)), IMAGE, {"cat": ops.Concat, "c": IntegerConv},
    ),
    "cat_of_integers_and_floats": Case(
        lambda: Net(
            lambda s, x: s.d(torch.sigmoid(torch.cat([y := s.a(x), s.b(x)], 1))) + s.c(y),
            a=conv(3, 4, 3), b=conv(3, 2, 3), c=conv(4, 2, 1), d=conv(6, 2, 1),
        ), IMAGE, {"cat": ops.Concat, "sigmoid": ops.Function},
    ),
    "max_pool": Case(
        behind(lambda x: F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)), IMAGE,
        {"max_pool2d": ops.MaxPool},
    ),
    "max_pool_dilated": Case(behind(lambda x: F.max_pool2d(x, 2, stride=1, dilation=2)), IMAGE),
    "max_pool_module": Case(
        lambda: nn.Sequential(conv(3, 4, 3), nn.MaxPool2d((3, 2), (1, 2), (1, 0)), conv(4, 2, 1)), IMAGE,
        {"1": ops.MaxPool},
    ),
    "average_pool": Case(
        behind(lambda x: F.avg_pool2d(x, 2, stride=1, padding=1)), IMAGE, {"avg_pool2d": ops.Average}
    ),
    "average_pool_exclude_pad": Case(
        behind(lambda x: F.avg_pool2d(x, 3, 2, padding=1, count_include_pad=False, ceil_mode=True)), IMAGE
    ),
    "average_pool_1d": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.AvgPool1d(3, 2), nn.Conv1d(4, 2, 1)), (3, 12), {"1": ops.Average}
    ),
    "adaptive_pool": Case(
        behind(lambda x: F.adaptive_avg_pool2d(x, 1)), IMAGE, {"adaptive_avg_pool2d": ops.Mean}
    ),
    "adaptive_pool_1d": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3)), (3, 12),
        {"1": ops.Mean},
    ),
    "mean": Case(behind(lambda x: x.mean((2, 3))), IMAGE, {"mean": ops.Mean}),
    "mean_one_dim": Case(behind(lambda x: torch.mean(x, dim=-1, keepdim=True)), IMAGE, {"mean": ops.Mean}),
    "flatten": Case(behind(lambda x: torch.flatten(x, start_dim=2)), IMAGE, {"flatten": ops.Reshape}),
    "reshape": Case(behind(lambda x: x.reshape(-1, 4, 36)), IMAGE, {"reshape": ops.Reshape}),
    "reshape_keyword": Case(behind(lambda x: torch.reshape(x, shape=(-1, 4, 36))), IMAGE, {"reshape": ops.Reshape}),
    "view_batch_size": Case(behind(lambda x: x.view(x.size(0), 36, -1)), IMAGE, {"view": ops.Reshape}),
    "view_shape": Case(behind(lambda x: x.contiguous().view((x.shape[0], -1))), IMAGE, {"view": ops.Reshape}),
    "permute": Case(behind(lambda x: x.permute(0, 2, 3, 1).contiguous()), IMAGE, {"permute": ops.Permute}),
    "permute_keyword": Case(behind(lambda x: torch.permute(x, dims=(0, 3, 1, -2))), IMAGE, {"permute": ops.Permute}),
    "slice": Case(behind(lambda x: x[:, 1:, ::2, :-1]), IMAGE, {"getitem": ops.Slice}),
    "slice_ellipsis": Case(behind(lambda x: x[..., -3:]), IMAGE, {"getitem": ops.Slice}),
    "pad": Case(behind(lambda x: F.pad(x, (1, 0, 2, 1))), IMAGE, {"pad": ops.Pad}),
    "pad_channels": Case(behind(lambda x: F.pad(x, (0, 0, 0, 0, 1, 2))), IMAGE, {"pad": ops.Pad}),
    "dropout_identity": Case(
        lambda: nn.Sequential(conv(3, 4, 3), nn.Identity(), nn.ReLU(), nn.Dropout2d(0.5), conv(4, 4, 1), nn.Flatten(),
                              nn.Dropout(0.5), nn.LazyLinear(4)), IMAGE, {"0": IntegerConv, "4": IntegerConv},
    ),
    **{f"function_{name}": Case(behind(f), IMAGE, {name: ops.Function} if name != "relu6" else {})
       for name, f in FUNCTIONS.items()},
    **{f"module_{name}": Case(lambda m=m: nn.Sequential(conv(3, 4, 3), m(), conv(4, 2, 1)), IMAGE,
                              {"1": ops.Function} if name != "relu6" else {}) for name, m in MODULES.items()},
    "float_by_rule": Case(
        lambda: nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4, 3, padding=1), nn.ReLU(),
                              conv(4, 2, 1)), IMAGE, {"0": FloatConv, "3": IntegerConv},
        {"rules": [{"match": "first", "weight": {"bits": None}}]},
    ),
    "float_in_the_middle": Case(
        lambda: nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(),
                              conv(4, 2, 1)), IMAGE, {"0": IntegerConv, "2": FloatConv, "5": IntegerConv},
        {"rules": [{"match": "2", "weight": {"bits": None}}]},
    ),
    "layer_called_twice": Case(
        lambda: Net(lambda s, x: s.a(torch.relu(s.a(x))), a=conv(3, 3, 3, padding=1)), IMAGE,
        {"a": IntegerConv, "a_2": IntegerConv},
    ),
}  # fmt: skip
WIDE = ("linear", "linear_sequence", "conv1d", "conv2d", "relu_behind_quantizer", "cat", "max_pool", "pad", "slice",
        "average_pool", "add", "mean", "adaptive_pool")  # fmt: skip
SETTINGS = [
    *[(name, scheme) for name in CASES for scheme in ("int8", "affine")],
    *[(name, scheme) for name in WIDE for scheme in ("w4a4", "w2a8_tensor", "a16", "a16_affine")],
    *[(name, scheme) for name in ("linear_sequence", "conv1d", "conv2d", "add", "mlp_batch_norm", "float_by_rule")
      for scheme in ("group", "weight_only_group", "weight_only")],
]  # fmt: skip


def build(case: Case, scheme: str, samples: int = 128) -> tuple[nn.Module, fx.GraphModule, Tensor]:
    """(float network with lived-in BatchNorm, the same prepared and calibrated, inputs)."""
    torch.manual_seed(1)
    net = case.make()
    x = torch.randn(samples, *case.shape) + 0.2
    net(x[:2])  # lazy layers
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    for _ in range(20):
        net(x)
    config = qat.QuantConfig.from_dict(SCHEMES[scheme] | case.config)
    if isinstance(net, nn.Linear):
        net = nn.Sequential(net)
    prepared = qat.prepare(net.eval(), config, x[:2])
    qat.calibrate(prepared, x.split(64))
    qat.set_mode(prepared, "frozen")
    return net, prepared, x


class Watcher(fx.Interpreter):
    """Keeps the output of every quantizer of a prepared network, by graph node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, tuple[FakeQuantize, Tensor]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_module" and isinstance(module := self.module.get_submodule(n.target), FakeQuantize):
            self.seen[n.name] = module, result
        return result


@torch.no_grad()
def assert_layers_agree(prepared: fx.GraphModule, network: IntegerNetwork, x: Tensor) -> None:
    """Each layer, given training's integers, makes training's integers: at most a step off, hardly ever."""
    watcher = Watcher(prepared)
    watcher.run(x)
    assert sorted(network.edges.values()) == sorted(watcher.seen)
    integers = {}
    for name, node in network.edges.items():
        quantizer, real = watcher.seen[node]
        scale, zero = (t.double() for t in quantizer.qparams())
        q = (real.double() / scale).round() + zero
        assert quantizer.quant_min <= q.min()
        assert q.max() <= quantizer.quant_max
        integers[name] = q
    made: dict[str, Tensor] = {}

    def watch(name: str, tensor: Tensor) -> Tensor:
        if name not in integers:
            return tensor
        assert not tensor.is_floating_point()
        made[name] = tensor.double()
        return integers[name].to(tensor.dtype)

    network.run(x, watch=watch)
    for name, expected in integers.items():
        steps = (made[name] - expected).abs()
        assert made[name].shape == expected.shape
        assert steps.max() <= 1, name
        if network.grid(name).quant_max <= 255:  # a 16-bit step is as small as float32's rounding
            assert (steps == 0).double().mean() >= 0.999, name


@torch.no_grad()
def assert_outputs_close(net: nn.Module, prepared: fx.GraphModule, network: IntegerNetwork, x: Tensor) -> None:
    expected, got, exact = prepared(x), network(x), net.eval()(x)
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    error, quantization = (got - expected).double(), (exact - expected).double()
    # an activation one step off near a tie is allowed, so a fraction of the quantization error is
    assert error.square().mean() <= 1e-2 * quantization.square().mean() + 1e-12
    assert expected.std() > 1e-3


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("name", "scheme"), SETTINGS, ids=lambda value: value)
def test_integer_network_is_what_training_simulated(name: str, scheme: str) -> None:
    case = CASES[name]
    net, prepared, x = build(case, scheme)
    round_biases(prepared)
    network = qat.lower(prepared)
    assert_layers_agree(prepared, network, x)
    assert_outputs_close(net, prepared, network, x)
    if scheme in ("int8", "affine"):
        for layer, kind in case.layers.items():
            assert type(network.layer(layer or "0")) is kind


def test_integers_stay_integers_between_layers() -> None:
    _, prepared, x = build(CASES["conv2d"], "int8")
    tensors = qat.lower(prepared).run(x)
    kinds = [tensor.dtype for tensor in tensors.values()]
    assert kinds == [torch.float32, torch.int8, torch.uint8, torch.int8, torch.float32]


def test_weight_only_groups_keep_their_scales() -> None:
    _, prepared, _ = build(CASES["conv2d"], "weight_only_group")
    layer = qat.lower(prepared).layer("0")
    assert isinstance(layer, FloatConv)
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.max() <= 15
    assert layer.weight_scale.shape == (8, 3)  # 2 * 3 * 2 = 12 inputs in groups of 4


def test_affine_output_is_not_clamped_by_an_absorbed_relu_it_does_not_have() -> None:
    # a ReLU read by a quantizer of 8 affine bits: zero point 0 by calibration; learned ones can be elsewhere
    _, prepared, x = build(CASES["mlp_batch_norm"], "affine")
    quantizer = next(m for m in prepared.modules() if isinstance(m, FakeQuantize) and m.relu)
    quantizer.zero_point.fill_(40)
    round_biases(prepared)
    network = qat.lower(prepared)
    assert network.layer("0").output.relu
    assert network.run(x)["0"].min() == 40
    assert_layers_agree(prepared, network, x)


def test_lowering_changes_nothing() -> None:
    _, prepared, x = build(CASES["conv2d"], "int8")
    prepared.train()
    qat.set_mode(prepared, "quantize")

    def content() -> bytes:
        file = io.BytesIO()
        torch.save(prepared.state_dict(), file)
        return file.getvalue()

    before, code = content(), prepared.code
    modes = [(m.training, getattr(m, "mode", None)) for m in prepared.modules()]
    network = qat.lower(prepared)
    for buffer in network.buffers():
        buffer.zero_()
    assert content() == before
    assert prepared.code == code
    assert [(m.training, getattr(m, "mode", None)) for m in prepared.modules()] == modes
    prepared(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prepared.parameters() if p.dim() > 1)


def test_training_after_lowering_does_not_reach_the_integer_network() -> None:
    _, prepared, x = build(CASES["conv2d"], "int8")
    network = qat.lower(prepared)
    before = network(x)
    with torch.no_grad():
        for parameter in [*prepared.parameters(), *prepared.buffers()]:
            parameter.mul_(0)
    assert torch.equal(network(x), before)


def test_two_inputs_and_two_outputs() -> None:
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
    network = qat.lower(prepared)
    assert network.inputs == ["left", "right"]
    for got, expected in zip(network(*x), prepared(*x), strict=True):
        assert (got - expected).abs().max() < 0.01
        assert got.std() > 0.1


def test_off_lowers_to_the_float_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(conv(3, 4, 3, padding="same"), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))
    x = torch.randn(8, 3, 5, 5)
    net(x)
    prepared = qat.prepare(net.eval(), qat.preset("off"), x)
    assert torch.allclose(qat.lower(prepared)(x), net(x), atol=1e-6)


# ---- errors ----------------------------------------------------------------------------------------------------------


def prepare_only(net: nn.Module, x: Tensor, scheme: str = "int8", calibrated: bool = True) -> fx.GraphModule:
    prepared = qat.prepare(net.eval(), qat.QuantConfig.from_dict(SCHEMES[scheme]), x)
    if calibrated:
        qat.calibrate(prepared, [x])
    return prepared


def test_uncalibrated_is_refused() -> None:
    prepared = prepare_only(nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4), calibrated=False)
    with pytest.raises(RuntimeError, match=r"quantizers\.input.*qat\.calibrate"):
        qat.lower(prepared)


@pytest.mark.parametrize("mode", ["float", "observe"])
@pytest.mark.parametrize("scheme", ["int8", "weight_only"])
def test_networks_that_do_not_simulate_are_refused(mode: str, scheme: str) -> None:
    prepared = prepare_only(nn.Sequential(nn.Linear(4, 4)), torch.randn(8, 4), scheme)
    qat.set_mode(prepared, mode)
    with pytest.raises(RuntimeError, match=r"mode 'float' or 'observe'.*qat\.set_mode"):
        qat.lower(prepared)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.cumsum(x, 1), "no such operation"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounds"),
        (lambda x: x * x.size(0), "depends on the batch size"),
        (lambda x: x[:, torch.tensor([0, 2])], "getitem"),
        (lambda x: torch.sum(x), "needs dim"),
        (lambda x: x.mean(), "mean over every dimension"),
        (lambda x: F.avg_pool2d(x, 2, divisor_override=3), "divisor_override"),
    ],
)
def test_unsupported_operations_are_named(function: Callable[[Tensor], Tensor], named: str) -> None:
    if isinstance(function, nn.Module):
        net: nn.Module = nn.Sequential(conv(3, 4, 1), function)
    else:
        net = Net(lambda s, x: function(s.conv(x)), conv=conv(3, 4, 1))
    prepared = prepare_only(net, torch.randn(8, *IMAGE))
    with pytest.raises(ValueError, match="cannot be lowered") as error:
        qat.lower(prepared)
    assert named in str(error.value)


@pytest.mark.parametrize("alone", [True, False])
def test_batch_norm_without_running_statistics(alone: bool) -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    between = [nn.MaxPool2d(2)] if alone else []
    prepared = prepare_only(nn.Sequential(conv(3, 4, 3), *between, norm), torch.randn(8, *IMAGE))
    with pytest.raises(ValueError, match="track_running_stats=False"):
        qat.lower(prepared)


def test_a_prepared_network_can_be_copied_and_lowered() -> None:
    _, prepared, x = build(CASES["add"], "int8")
    assert torch.equal(qat.lower(copy.deepcopy(prepared))(x), qat.lower(prepared)(x))


def test_a_batch_norm_over_the_steps_of_a_sequence_is_not_folded() -> None:
    """Behind a linear layer on [n, steps, features], BatchNorm1d normalises steps, even with as many of both."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.norm(self.linear(x))))

    torch.manual_seed(0)
    net = Sequence()
    with torch.no_grad():
        net.norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 1.0, 0.1]))
        net.norm.bias.normal_()
    x = torch.randn(64, 5, 6)
    prepared = qat.prepare(net.eval(), qat.preset("int8"), x)
    qat.calibrate(prepared, [x])
    with torch.no_grad():
        torch.testing.assert_close(qat.lower(prepared)(x), prepared(x), atol=0.05, rtol=0)
        torch.testing.assert_close(prepared(x), net(x), atol=0.1, rtol=0)
