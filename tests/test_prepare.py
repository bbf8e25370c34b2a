"""Where quantizers stand, what stays shared with the float network, and what is refused."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.fake_quant import FakeQuantize
from qat.layers import QuantConv2d, QuantizedLayer, QuantLinear
from qat.mode import Mode
from qat.modes import quantizers
from qat.zoo.models import MLP, ResNet, SmallCNN

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
W8A8: dict[str, Any] = {
    "weight": {"bits": 8},
    "activation": {"bits": 8},
    "input": {"bits": 8},
}


class Net(nn.Module):
    """Layers under names given as keywords; `run(net, x)` is the forward."""

    def __init__(self, run: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(in_channels: int = 3, out_channels: int = 4) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def prepared(net: nn.Module, x: Tensor = X, **changes: Any) -> fx.GraphModule:
    return qat.prepare(net, qat.QuantConfig.from_dict({**W8A8, **changes}), x)


def label(node: fx.Node) -> str:
    return str(node.target) if node.op in ("placeholder", "call_module", "output") else node.name


def reads(net: fx.GraphModule) -> dict[str, list[str]]:
    """Operation -> the operations whose tensors it reads; modules and inputs by path, functions by node name."""
    return {
        label(node): [label(arg).replace("quantizers.", "q:") for arg in node.all_input_nodes]
        for node in net.graph.nodes
    }


def grids(net: nn.Module) -> dict[str, tuple[int, int]]:
    return {
        name.removeprefix("quantizers."): (quantizer.quant_min, quantizer.quant_max)
        for name, quantizer in quantizers(net)
        if name.startswith("quantizers.")
    }


SIGNED, UNSIGNED = (-128, 127), (0, 255)


# ---- where quantizers stand ------------------------------------------------------------------------------------------


def relu_forms() -> dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module]]]:
    return {
        "module": (lambda s, x: s.b(s.relu(s.bn(s.a(x)))), {"relu": nn.ReLU()}),
        "module in place": (lambda s, x: s.b(s.relu(s.bn(s.a(x)))), {"relu": nn.ReLU(inplace=True)}),
        "F.relu": (lambda s, x: s.b(F.relu(s.bn(s.a(x)))), {}),
        "F.relu in place": (lambda s, x: s.b(F.relu(s.bn(s.a(x)), inplace=True)), {}),
        "F.relu positional in place": (lambda s, x: s.b(F.relu(s.bn(s.a(x)), True)), {}),
        "F.relu_": (lambda s, x: s.b(F.relu_(s.bn(s.a(x)))), {}),
        "torch.relu": (lambda s, x: s.b(torch.relu(s.bn(s.a(x)))), {}),
        "torch.relu_": (lambda s, x: s.b(torch.relu_(s.bn(s.a(x)))), {}),
        "method": (lambda s, x: s.b(s.bn(s.a(x)).relu()), {}),
        "method in place": (lambda s, x: s.b(s.bn(s.a(x)).relu_()), {}),
    }


@pytest.mark.parametrize("form", relu_forms())
def test_conv_batch_norm_relu_conv(form: str) -> None:
    run, extra = relu_forms()[form]
    net = Net(run, a=conv(), bn=nn.BatchNorm2d(4), b=conv(4), **extra).eval()
    p = prepared(net)
    assert reads(p) == {
        "x": [],
        "quantizers.x": ["x"],
        "a": ["q:x"],
        "bn": ["a"],  # never between the layer and its BatchNorm
        "quantizers.a": ["bn"],  # the ReLU is in it
        "b": ["q:a"],
        "output": ["b"],
    }
    assert p.quantizers.a.relu
    assert grids(p) == {"x": SIGNED, "a": UNSIGNED}
    assert torch.equal(p(X), net(X))


def test_in_place_relu_that_is_read_through_its_overwritten_input() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        F.relu(y, inplace=True)
        return s.b(y)

    net = Net(run, a=conv(), b=conv(4))
    p = prepared(net)
    assert reads(p)["b"] == ["q:a"]
    assert p.quantizers.a.relu
    assert torch.equal(p(X), net(X))


ADDS: dict[str, Callable[..., Tensor]] = {
    "+": lambda a, b: a + b,
    "torch.add": torch.add,
    "method": lambda a, b: a.add(b),
    "method in place": lambda a, b: a.add_(b),
    "iadd": lambda a, b: a.__iadd__(b) if isinstance(a, Tensor) else a + b,
}


@pytest.mark.parametrize("take", [lambda pair: pair[0], lambda pair: pair.values], ids=["index", "name"])
def test_one_of_several_results_of_a_float_operation_is_quantized_where_it_is_read(take: Callable[..., Tensor]) -> None:
    net = Net(lambda s, x: s.b(take(torch.topk(s.a(x), 4, 1))), a=conv(), b=conv(4))
    p = prepared(net)
    assert reads(p)["b"][0].startswith("q:")
    assert "float: topk: the runtime has no topk: it cannot be lowered" in qat.report(p)
    assert torch.equal(p(X), net(X))


@pytest.mark.parametrize("form", ADDS)
def test_residual_add(form: str) -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = F.relu(s.bn1(s.a(x)))
        z = s.bn2(s.b(y))
        return s.c(F.relu(ADDS[form](z, y)))

    net = Net(run, a=conv(), bn1=nn.BatchNorm2d(4), b=conv(4), bn2=nn.BatchNorm2d(4), c=conv(4)).eval()
    p = prepared(net)
    edges = reads(p)
    add = next(name for name in edges if name.startswith("add"))
    assert set(edges[add]) == {"q:b", "q:a"}  # both inputs of the add are quantized
    assert edges["b"] == ["q:a"]  # one node an edge, shared by its readers
    assert edges["quantizers.b"] == ["bn2"]
    sum_quantizer = edges["c"][0].removeprefix("q:")
    assert sum_quantizer.startswith("add")
    assert grids(p) == {"x": SIGNED, "a": UNSIGNED, "b": SIGNED, sum_quantizer: UNSIGNED}
    assert p.get_submodule(f"quantizers.{sum_quantizer}").relu
    assert torch.equal(p(X), net(X))


def test_float_additions_are_left_alone() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x) + 1
        return torch.add(y, s.b(x), alpha=2)

    p = prepared(Net(run, a=conv(), b=conv()))
    assert grids(p) == {"x": SIGNED}


def test_concatenation_shares_one_quantizer() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.d(torch.cat([F.relu(s.a(x)), s.b(x), s.pool(F.relu(s.c(x)))], dim=1))

    net = Net(run, a=conv(), b=conv(), c=conv(), pool=nn.MaxPool2d(3, 1, 1), d=conv(12))
    p = prepared(net)
    edges = reads(p)
    assert edges["d"] == ["cat"]
    shared = [node for node in p.graph.nodes if node.op == "call_module" and node.target == "quantizers.a"]
    assert [node.args[1] for node in shared] == [0, 1, 2]
    assert p.quantizers.a.sites == 3
    assert not p.quantizers.a.relu  # one of the three is no ReLU
    assert grids(p) == {"x": SIGNED, "a": SIGNED}
    assert torch.equal(p(X), net(X))


def test_concatenation_of_relus_absorbs_them_all_and_takes_the_widest_bits() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y, z = F.relu(s.a(x)), F.relu(s.b(x))
        return s.d(torch.cat((y, z), 1)) + s.c(y)

    p = prepared(Net(run, a=conv(), b=conv(), c=conv(4), d=conv(8)), rules=[{"match": "d", "activation": {"bits": 4}}])
    assert p.quantizers.a.relu
    assert p.quantizers.a.sites == 2
    assert grids(p)["a"] == UNSIGNED  # c asks for 8 bits, d for 4
    assert not any(node.name.startswith("relu") for node in p.graph.nodes)


def test_concatenation_range_covers_all_its_inputs() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        return s.d(torch.cat([s.a(x), s.b(x) * 100], 1))

    net = Net(run, a=conv(), b=conv(), d=conv(8))
    for observer in ("minmax", "ema", "percentile"):
        p = prepared(net, activation={"bits": 8, "observer": observer, "percentiles": [0, 100]})
        qat.calibrate(p, [X])
        with torch.no_grad():
            largest = max(net.a(X).abs().max(), (net.b(X) * 100).abs().max()).item()
        assert p.quantizers.a.scale.item() == pytest.approx(largest / 127, rel=1e-2)


PASSING: dict[str, tuple[Callable[..., Tensor], dict[str, nn.Module]]] = {
    "max pool": (lambda s, y: s.op(y), {"op": nn.MaxPool2d(3, 1, 1)}),
    "F.max_pool2d": (lambda s, y: F.max_pool2d(y, 3, 1, 1), {}),
    "dropout": (lambda s, y: s.op(y), {"op": nn.Dropout()}),
    "identity": (lambda s, y: s.op(y), {"op": nn.Identity()}),
    "slice": (lambda s, y: y[:, :, ::2, ::2], {}),
    "pad": (lambda s, y: F.pad(y, (1, 1, 1, 1)), {}),
    "reflect": (lambda s, y: F.pad(y, (1, 1, 1, 1), mode="reflect"), {}),
    "reshape": (lambda s, y: y.reshape(4, 4, 4, 16), {}),
    "view": (lambda s, y: y.view(4, 4, 4, 16), {}),
    "permute": (lambda s, y: y.permute(0, 1, 3, 2).contiguous(), {}),
    "torch.transpose": (lambda s, y: torch.transpose(y, 2, 3), {}),
    "chain": (lambda s, y: F.pad(F.max_pool2d(y, 2), (1, 1, 1, 1))[:, :, 1:], {}),
}


@pytest.mark.parametrize("name", PASSING)
def test_operations_that_move_values_pass_the_scale_through(name: str) -> None:
    operation, extra = PASSING[name]
    net = Net(lambda s, x: s.b(operation(s, F.relu(s.a(x)))), a=conv(), b=conv(4), **extra).eval()
    p = prepared(net)
    assert grids(p) == {"x": SIGNED, "a": UNSIGNED}
    assert reads(p)["quantizers.a"] == ["a"]
    assert p.quantizers.a.relu
    assert not reads(p)["b"][0].startswith("q:")  # b reads the passing operation itself
    assert torch.equal(p(X), net(X))


NOT_PASSING: dict[str, Callable[..., Tensor]] = {
    "pad with ones": lambda y: F.pad(y, (1, 1, 1, 1), value=1.0),
    "tanh": torch.tanh,
    "times": lambda y: y * 3,
}


@pytest.mark.parametrize("name", NOT_PASSING)
def test_operations_that_make_values_do_not(name: str) -> None:
    p = prepared(Net(lambda s, x: s.b(NOT_PASSING[name](s.a(x))), a=conv(), b=conv(4)))
    edges = reads(p)
    (source,) = edges["b"]
    assert source.startswith("q:")
    assert source != "q:a"
    assert "quantizers.a" not in edges  # computed in float: its input needs no grid


AVERAGES: dict[str, Callable[..., Tensor]] = {
    "F.avg_pool2d": lambda y: F.avg_pool2d(y, 2),
    "F.adaptive_avg_pool2d": lambda y: F.adaptive_avg_pool2d(y, 1),
    "mean": lambda y: y.mean((2, 3), keepdim=True),
    "torch.mean": lambda y: torch.mean(y, (2, 3), keepdim=True),
    "AvgPool2d": nn.AvgPool2d(2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_average_pooling_has_a_scale_of_its_own(name: str) -> None:
    net = Net(lambda s, x: s.b(s.pool(F.relu(s.a(x)))), a=conv(), b=conv(4), pool=Wrap(AVERAGES[name]))
    p = prepared(net)
    assert len(grids(p)) == 3
    assert set(grids(p).values()) == {SIGNED, UNSIGNED}  # an average of what is not negative is not negative
    (own,) = reads(p)["b"]
    assert own.startswith("q:")
    assert own != "q:a"
    (average,) = reads(p)[own.replace("q:", "quantizers.")]
    assert reads(p)[average] == ["q:a"]


class Wrap(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def test_relu_behind_a_tensor_that_is_quantized_already_keeps_its_scale() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.a(x)
        return s.b(F.relu(y)) + y

    p = prepared(Net(run, a=conv(), b=conv(4, 4)))
    assert reads(p)["relu"] == ["q:a"]
    assert reads(p)["b"] == ["relu"]  # it clamps what is on the grid already
    assert grids(p) == {"x": SIGNED, "a": SIGNED, "b": SIGNED}


def test_network_input_follows_its_own_scheme() -> None:
    net = Net(lambda s, x: s.b(s.a(x)), a=conv(), b=conv(4))
    assert grids(prepared(net, input={"bits": 4})) == {"x": (-8, 7), "a": SIGNED}
    assert grids(prepared(net, input={"bits": None})) == {"a": SIGNED}
    assert grids(prepared(net, activation={"bits": None})) == {}


def test_an_input_that_only_float_operations_read_is_not_quantized() -> None:
    assert grids(prepared(Net(lambda s, x: s.a(torch.tanh(x)), a=conv()))) == {"tanh": SIGNED}


def test_two_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = conv(), conv()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.a(left) + self.b(right)

    p = qat.prepare(Two(), qat.QuantConfig.from_dict(W8A8), (X, X))
    assert grids(p) == dict.fromkeys(("left", "right", "a", "b"), SIGNED)
    qat.calibrate(p, [(X, X), (X, 2 * X)])
    assert p.quantizers.right.scale.item() == pytest.approx(2 * X.abs().max().item() / 127, rel=1e-5)


def test_affine_activations_and_sigmoid() -> None:
    net = Net(lambda s, x: s.b(torch.sigmoid(s.a(x))), a=conv(), b=conv(4))
    assert grids(prepared(net)) == {"x": SIGNED, "sigmoid": UNSIGNED}
    affine = {"bits": 8, "symmetric": False}
    assert grids(prepared(net, activation=affine, input=affine)) == {"x": UNSIGNED, "sigmoid": UNSIGNED}


def test_names_of_a_nested_network() -> None:
    p = prepared(SmallCNN(3, 10))
    assert sorted(grids(p)) == sorted(
        ["x", "stem_0", "block_conv1", "block_conv2", "block_add", "conv1_0", "conv2_0", "pool"]
    )
    assert sorted(name for name, m in p.named_modules() if isinstance(m, QuantizedLayer)) == sorted(
        ["stem.0", "block.conv1", "block.conv2", "conv1.0", "conv2.0", "linear"]
    )


def test_resnet_quantizes_every_layer_and_add() -> None:
    p = prepared(ResNet(20, "A"))
    assert sum(isinstance(m, QuantizedLayer) for m in p.modules()) == 20
    edges = reads(p)
    adds = [inputs for name, inputs in edges.items() if name.startswith("add")]
    assert len(adds) == 9
    # what an add reads is a quantizer's tensor, or (option A's shortcut) a padded slice of one
    assert all(name.startswith(("q:", "pad")) for inputs in adds for name in inputs)
    assert edges["pad"] == ["getitem"]
    assert edges["getitem"][0].startswith("q:")
    assert sum(grid == UNSIGNED for grid in grids(p).values()) == 1 + 9 + 9 + 1  # stem, inner ReLUs, adds, pool
    assert sum(grid == SIGNED for grid in grids(p).values()) == 1 + 9  # input, second convolutions


def test_quantizers_whose_names_would_clash_stay_apart() -> None:
    def run(s: Any, x: Tensor) -> Tensor:
        y = s.conv(x)
        return s.c(s.b(y)) + s.d(s.conv_2(s.bn(y)))

    layers = {name: conv(4) for name in ("b", "c", "d", "conv_2")}
    net = Net(run, conv=conv(), bn=nn.BatchNorm2d(4), **layers)
    p = prepared(net)
    nodes = [n for n in p.graph.nodes if n.op == "call_module" and str(n.target).startswith("quantizers.")]
    assert len({str(n.target) for n in nodes}) == len(nodes) == 7
    assert {"conv", "conv_2", "conv_2_2"} < set(grids(p))


def test_a_layer_called_twice_is_swapped_once_and_has_two_activation_quantizers() -> None:
    net = Net(lambda s, x: s.a(s.relu(s.a(s.relu(x)))), a=conv(3, 3), relu=nn.ReLU())
    p = prepared(net)
    assert [name for name, m in p.named_modules() if isinstance(m, QuantizedLayer)] == ["a"]
    assert grids(p) == {"x": UNSIGNED, "a": UNSIGNED}
    assert torch.equal(p(X), net(X))


# ---- what stays as it was --------------------------------------------------------------------------------------------

NETS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": lambda: SmallCNN(3, 10),
    "resnet_a": lambda: ResNet(20, "A"),
    "resnet_b": lambda: ResNet(20, "B"),
    "mlp": lambda: MLP(3, 8, 10),
    "conv1d": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 3)
    ),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("preset", ["int8", "w4a4_lsq", "w4g32", "off"])
def test_float_mode_computes_the_float_network_bit_for_bit(name: str, preset: str) -> None:
    net = NETS[name]()
    p = qat.prepare(net, qat.preset(preset), X)
    assert p.training
    for training in (True, False):
        p.train(training)
        net.train(training)
        state = copy.deepcopy(net.state_dict())
        expected = net(X)
        net.load_state_dict(state)  # BatchNorm's statistics, which both share, moved
        assert torch.equal(p(X), expected)


@pytest.mark.parametrize("name", NETS)
def test_parameters_are_the_same_objects_and_a_float_checkpoint_loads(name: str) -> None:
    net = NETS[name]()
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    types = {path: type(module) for path, module in net.named_modules()}
    net.eval()
    output = net(X)
    p = qat.prepare(net, qat.preset("w4a4_lsq"), X)

    # the float network is untouched
    assert {path: type(module) for path, module in net.named_modules()} == types
    assert list(net.state_dict()) == list(before)
    assert not net.training
    assert torch.equal(net(X), output)

    # shared, under the same names
    parameters = dict(p.named_parameters())
    for key, parameter in net.named_parameters():
        assert parameters[key] is parameter
    buffers = dict(p.named_buffers())
    for key, buffer in net.named_buffers():
        assert buffers[key] is buffer
    extra = set(p.state_dict()) - set(before)
    assert extra
    assert all(key.startswith("quantizers.") or ".weight_quantizer." in key for key in extra)

    # a float checkpoint of other values loads, and nothing but quantizers is missing
    checkpoint = {key: tensor + 1 for key, tensor in before.items()}
    result = p.load_state_dict(checkpoint, strict=False)
    assert set(result.missing_keys) == extra
    assert result.unexpected_keys == []
    assert all(torch.equal(net.state_dict()[key], checkpoint[key]) for key in before)


def test_in_place_settings_of_the_float_network_are_kept() -> None:
    net = nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Dropout(inplace=True), conv(4), nn.ReLU6(inplace=True))
    prepared(net)
    assert net[1].inplace
    assert net[2].inplace
    assert net[4].inplace


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_is_kept(training: bool) -> None:
    net = SmallCNN(3, 10).train(training)
    p = prepared(net)
    assert p.training is training
    assert {module.training for module in [*net.modules(), *p.modules()]} == {training}


def test_prepare_leaves_batch_norm_statistics_alone() -> None:
    net = SmallCNN(3, 10)
    before = copy.deepcopy(net.state_dict())
    prepared(net)
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def test_copies() -> None:
    net = SmallCNN(3, 10)
    p = qat.prepare(net, qat.preset("w4a4_lsq"), X).eval()
    qat.calibrate(p, [X])
    expected = p(X)
    assert not torch.equal(expected, net.eval()(X))
    for other in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert torch.equal(other.eval()(X), expected)
        assert list(other.state_dict()) == list(p.state_dict())
        assert [(n, q.mode) for n, q in quantizers(other)] == [(n, q.mode) for n, q in quantizers(p)]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(p(X), expected)


def test_a_deep_copy_still_lowers() -> None:
    p = prepared(SmallCNN(3, 10)).eval()
    qat.calibrate(p, [X])
    assert torch.equal(qat.lower(copy.deepcopy(p))(X), qat.lower(p)(X))


def test_sixteen_bit_activations_and_eight_bit_weights_are_close_to_float() -> None:
    torch.manual_seed(0)
    net = SmallCNN(3, 10).eval()
    expected = net(X)
    errors = {}
    for bits in (4, 8, 16):
        p = prepared(net, activation={"bits": bits}, input={"bits": bits}).eval()
        qat.calibrate(p, [X])
        errors[bits] = ((p(X) - expected).norm() / expected.norm()).item()
    assert 0 < errors[16] < errors[8] < errors[4]
    assert errors[16] < 0.02
    p = prepared(net, activation={"bits": 16}, input={"bits": 16}, weight={"bits": None})
    qat.calibrate(p, [X])
    assert (p.eval()(X) - expected).abs().max() < 1e-3 * expected.abs().max()


# ---- rules -----------------------------------------------------------------------------------------------------------


def bits(net: nn.Module) -> dict[str, int | None]:
    return {
        name: module.weight_quantizer.scheme.bits if isinstance(module, QuantizedLayer) else None
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


DEFAULT = dict.fromkeys(["stem.0", "block.conv1", "block.conv2", "conv1.0", "conv2.0", "linear"], 8)


@pytest.mark.parametrize(
    ("rules", "changed"),
    [
        ([{"match": "first", "weight": {"bits": 4}}], {"stem.0": 4}),
        ([{"match": "last", "weight": {"bits": 4}}], {"linear": 4}),
        ([{"match": "type:Linear", "weight": {"bits": None}}], {"linear": None}),
        ([{"match": "type:Conv*", "weight": {"bits": 2}}], {name: 2 for name in DEFAULT if name != "linear"}),
        ([{"match": "block.*", "weight": {"bits": 3}}], {"block.conv1": 3, "block.conv2": 3}),
        ([{"match": "*.0", "weight": {"bits": 3}}], {"stem.0": 3, "conv1.0": 3, "conv2.0": 3}),
        ([{"match": "block.conv2", "weight": {"bits": 5}}], {"block.conv2": 5}),
        (
            [{"match": "last", "weight": {"bits": 4}}, {"match": "*", "weight": {"bits": 2}}],
            {**dict.fromkeys(DEFAULT, 2), "linear": 4},  # the first that matches wins
        ),
    ],
)
def test_rules(rules: list[dict[str, Any]], changed: dict[str, int | None]) -> None:
    p = prepared(SmallCNN(3, 10), rules=rules)
    assert bits(p) == {**DEFAULT, **changed}
    reasons = p.meta["qat"]["reasons"]
    assert reasons["linear"] == next(
        (f"rule '{r['match']}'" for r in rules if r["match"] in ("last", "type:Linear", "*")), "default"
    )


def test_a_rule_changes_a_layers_input_activation() -> None:
    p = prepared(SmallCNN(3, 10), rules=[{"match": "linear", "activation": {"bits": 4}}])
    assert grids(p)["pool"] == (0, 15)
    assert grids(p)["conv2_0"] == UNSIGNED


def test_a_rule_with_null_bits_leaves_the_layer_and_its_input_float() -> None:
    net = SmallCNN(3, 10)
    p = prepared(net, rules=[{"match": "linear", "weight": {"bits": None}, "activation": {"bits": None}}])
    assert p.linear is net.linear
    assert "pool" not in grids(p)


@pytest.mark.parametrize(
    ("match", "nearest"), [("blok.conv1", "block.conv1"), ("layer9.*", "linear"), ("type:Conv3d", "type:Conv2d")]
)
def test_a_rule_that_matches_nothing(match: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="matches no layer") as error:
        prepared(SmallCNN(3, 10), rules=[{"match": "first"}, {"match": match, "weight": {"bits": 4}}])
    message = str(error.value)
    assert message.startswith(f"quant.rules[1].match='{match}' matches no layer. Nearest module paths: ")
    assert nearest in message
    assert "type:Conv2d, type:Linear" in message


def test_a_rule_shadowed_by_an_earlier_one_is_no_error() -> None:
    prepared(SmallCNN(3, 10), rules=[{"match": "*"}, {"match": "linear"}])


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(
        ValueError, match=r"group_size=32 does not divide the 27 inputs of layer 'stem\.0' .*\[16, 3, 3, 3\]"
    ):
        prepared(SmallCNN(3, 10), weight={"bits": 4, "granularity": "group", "group_size": 32})


def test_target_is_checked() -> None:
    with pytest.raises(ValueError, match=r"quant\.weight\.bits=8: target=onnxruntime_x86 takes at most 7"):
        prepared(SmallCNN(3, 10), target="onnxruntime_x86")


def test_a_changed_configuration_is_validated_again() -> None:
    config = qat.QuantConfig.from_dict(W8A8)
    config.weight.bits = 33
    with pytest.raises(ValueError, match=r"quant\.weight\.bits=33"):
        qat.prepare(SmallCNN(3, 10), config, X)


def test_untraceable_network_names_the_class_and_the_line() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"cannot trace Branches at .*test_prepare\.py:\d+: .*move it out of forward"):
        prepared(Branches())


def test_a_network_whose_trace_computes_something_else_is_refused() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = conv()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x) * self.calls

    with pytest.raises(ValueError, match="traced Counts does not compute what the network computes"):
        prepared(Counts(), graph="required")
    layerwise = prepared(Counts())  # its layers are quantized one by one
    assert isinstance(layerwise, Counts)
    assert isinstance(layerwise.a, QuantConv2d)


@pytest.mark.parametrize(
    ("function", "bounded", "ends"),
    [
        (nn.Sigmoid(), ["sigmoid"], (0.0, 1.0)),
        (nn.Hardsigmoid(), ["hardsigmoid"], (0.0, 1.0)),
        (nn.Tanh(), ["tanh"], (-1.0, 1.0)),
        (nn.Softmax(1), ["softmax"], (0.0, 1.0)),
        (nn.Softmax(1), ["sigmoid", "tanh"], None),
    ],
)
def test_a_bounded_function_gives_the_range(
    function: nn.Module, bounded: list[str], ends: tuple[float, float] | None
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), function, nn.MaxPool2d(2), nn.Conv2d(4, 4, 1))
    p = prepared(net, bounded=bounded)
    qat.calibrate(p, [0.01 * X])
    p.train()
    p(X)  # a running range stays where it is, too
    quantizer = p.get_submodule("quantizers.1")
    scale, zero_point = quantizer.qparams()
    low, high = (float(scale * (end - zero_point)) for end in (quantizer.quant_min, quantizer.quant_max))
    if ends is None:
        assert high < 0.9
    else:
        assert (low, high) == pytest.approx(ends, abs=0.01)


def test_unknown_bounded_functions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quant\.bounded: 'cosine' is not known \(valid: sigmoid, hardsigmoid"):
        prepared(SmallCNN(3, 10), bounded=["cosine"])


def test_layers_are_the_quantized_ones() -> None:
    p = prepared(SmallCNN(3, 10))
    assert type(p.linear) is QuantLinear
    assert type(p.get_submodule("stem.0")) is QuantConv2d
    assert all(q.mode is Mode.float for _, q in quantizers(p))
    assert all(isinstance(q, FakeQuantize) for q in p.quantizers.children())
