"""The fast path: torch's integer kernels against the readable int32 reference, and when they are used."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.ptq.finalize import PTQConfig, finalize
from qat.runtime import IntegerConv, IntegerNetwork, Node, Quantize, kernels
from qat.runtime import operations as ops
from qat.zoo.models import ResNet, SmallCNN

pytestmark = pytest.mark.skipif(not kernels.available("fbgemm"), reason="torch has its integer kernels on x86")


def layer_of(
    shape: list[int], low: int, high: int, zero: int, output: Quantize | None, extreme: bool, **geometry: Any
) -> IntegerConv:
    """A layer with random weights, or those that make the largest sums."""
    layer = IntegerConv(shape, [-127, 127], [low, high], output=output, **geometry)
    layer.weight.copy_(torch.randint(-127, 128, shape))
    if extreme:
        layer.weight.copy_(torch.tensor([127, -127]).repeat(shape[0])[: shape[0]].reshape(-1, *[1] * (len(shape) - 1)))
    layer.weight_scale.copy_(0.001 + 0.01 * torch.rand(shape[0]))
    layer.bias.copy_(torch.randint(-2000, 2000, (shape[0],)))
    layer.input_scale.fill_(0.02)
    layer.input_zero_point.fill_(zero)
    return layer


def network_of(layer: IntegerConv, low: int, high: int, zero: int) -> IntegerNetwork:
    """Quantizes its input and calls the layer; the output's scale fits the layer's largest result on random input."""
    nodes = [Node("x_q", ("x",)), Node("y", ("x_q",))]
    layers: dict[str, Any] = {"x_q": ops.QuantizeInput(Quantize(low, high, scale=0.02, zero_point=zero)), "y": layer}
    return IntegerNetwork(["x"], nodes, layers, ["y"]).eval()


GEOMETRIES: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "conv2d": ([16, 8, 3, 3], [2, 8, 9, 9], {"padding": [[1, 1], [1, 1]]}),
    "strided": ([8, 5, 3, 5], [3, 5, 12, 11], {"padding": [[1, 1], [2, 2]], "stride": [2, 3]}),
    "dilated": ([8, 4, 3, 3], [2, 4, 9, 9], {"padding": [[2, 2], [2, 2]], "dilation": [2, 2]}),
    "depthwise": ([32, 1, 3, 3], [2, 32, 8, 8], {"padding": [[1, 1], [1, 1]], "groups": 32}),
    "depthwise twice": ([64, 1, 5, 5], [2, 32, 8, 8], {"padding": [[2, 2], [2, 2]], "groups": 32}),
    "grouped": ([16, 4, 3, 3], [2, 16, 8, 8], {"padding": [[1, 1], [1, 1]], "groups": 4}),
    "pointwise": ([24, 16, 1, 1], [2, 16, 6, 6], {}),
    "conv1d": ([8, 4, 3], [2, 4, 16], {"padding": [[1, 1]]}),
    "conv3d": ([8, 4, 3, 3, 3], [2, 4, 6, 6, 6], {"padding": [[1, 1]] * 3}),
    "linear": ([10, 64], [5, 64], {}),
    "linear of sequences": ([12, 48], [3, 7, 48], {}),
}


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("grid", [(0, 255, 0), (0, 255, 77), (-128, 127, 0), (-127, 127, 0), (0, 15, 3), (-2, 1, 0)])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_kernels_equal_the_reference(name: str, grid: tuple[int, int, int], extreme: bool) -> None:
    shape, size, geometry = GEOMETRIES[name]
    low, high, zero = grid
    x_q = torch.randint(low, high + 1, size)
    if extreme:
        x_q = torch.full(size, high)
        x_q[0] = low
    real = layer_of(shape, low, high, zero, None, extreme, **geometry)
    network = network_of(real, low, high, zero)
    x = (x_q - zero) * 0.02
    network.set_reference()
    exact = network(x)
    network.set_reference(False)
    torch.testing.assert_close(network(x), exact, rtol=5e-7, atol=0)  # float32's rounding of each result alone
    if (kernel := kernels.kernel_of(real)) is not None:  # whose sums hold zero points, too
        torch.testing.assert_close(kernel(network.run(x)["x_q"]), exact, rtol=5e-7, atol=0)

    for output in ((0, 255, 100, False), (-128, 127, 0, False), (0, 255, 9, True), (0, 7, 0, False), (-7, 7, 0, False)):
        least, most, middle, relu = output
        out = Quantize(least, most, relu, float(exact.abs().max()) / (most - middle), middle)
        layer = copy.deepcopy(real)
        layer.output = out
        network = network_of(layer, low, high, zero)
        given = network.run(x)["x_q"]
        assert torch.equal(given.int(), x_q.int())
        layer.reference = True
        expected = layer(given)
        layer.reference = False
        path = network.fast_path()
        assert path.plan is not None
        for made in (path.plan.integers({"y": expected}, x)["y"], path.layers["y"](given)):
            assert made.dtype == expected.dtype
            steps = (made.int() - expected.int()).abs()
            v = exact / out.scale
            tie = (v - v.floor() - 0.5).abs() < 1e-4
            assert steps.max() <= 1
            assert not (steps.bool() & ~tie).any()
        assert torch.equal(network(x), path.plan.integers({}, x).get("y", network(x)))


@pytest.mark.parametrize(("vnni", "engine"), [(True, "onednn"), (False, "fbgemm")])
def test_sums_that_leave_the_kernels_exactness_are_computed_by_the_layer(
    vnni: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "fast_onednn", lambda: vnni)
    for change in ("zero point", "int32", "16 bits", "uneven padding"):
        layer = layer_of([4, 3, 3, 3], 0, 255, 0, Quantize(0, 255), False)
        if change == "zero point":
            layer.weight_zero_point.fill_(3)
        elif change == "int32":
            layer.bias.fill_(2**31 - 2**10)
        elif change == "16 bits":
            layer.input_bounds = [0, 65535]
        else:
            layer.padding = [[0, 1], [0, 1]]
        assert kernels.engine_of(layer) is None, change
        assert kernels.kernel_of(layer) is None, change
    assert kernels.engine_of(layer_of([4, 3, 3, 3], 0, 255, 0, None, True)) == engine
    depthwise = layer_of([4, 1, 3, 3], 0, 255, 0, None, True, groups=4)
    assert kernels.engine_of(depthwise) == "onednn"  # FBGEMM's depthwise kernels saturate


def test_without_exact_products_weights_of_seven_bits_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "exact_products", lambda engine: False)
    monkeypatch.setattr(kernels, "fast_onednn", lambda: False)
    layer = layer_of([4, 3, 3, 3], 0, 255, 0, None, False)
    layer.weight[0, 0, 0, 0] = 65
    assert kernels.engine_of(layer) is None
    layer.weight.clamp_(-64, 64)
    assert kernels.engine_of(layer) == "fbgemm"


@pytest.mark.parametrize(("in_features", "dtype"), [(30_000, torch.int64), (500, torch.int32)])
def test_saturated_inputs_do_not_overflow(in_features: int, dtype: torch.dtype) -> None:
    layer = IntegerConv([2, in_features], [-128, 127], [0, 65535 if dtype is torch.int64 else 255])
    layer.weight.copy_(torch.tensor([[127], [-128]]).expand(2, in_features))
    high = layer.input_bounds[1]
    x = torch.full((1, in_features), high, dtype=torch.int32 if high > 255 else torch.uint8)
    for reference in (True, False):
        layer.reference = reference
        assert layer.accumulate(x).tolist() == [[127 * high * in_features, -128 * high * in_features]]
        assert layer.accumulate(x).dtype is dtype


def test_a_wide_layer_of_8_bits_does_not_overflow() -> None:
    layer = IntegerConv([1, 70_000], [-128, 127], [0, 255])
    layer.weight.fill_(127)
    x = torch.full((1, 70_000), 255, dtype=torch.uint8)
    for reference in (True, False):
        layer.reference = reference
        assert layer.accumulate(x).item() == 70_000 * 255 * 127 > 2**31
    assert kernels.engine_of(layer) is None


class Inverted(nn.Module):
    """MobileNetV2's block: expand, depthwise, project, add; ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.block = nn.Sequential(
            nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
            nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6(),
            nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class Encoder(nn.Module):
    """A transformer's layer, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


NETWORKS: dict[str, tuple[Any, list[int]]] = {
    "resnet20": (lambda: ResNet(20), [8, 3, 16, 16]),
    "small_cnn": (lambda: SmallCNN(1, 10), [8, 1, 28, 28]),
    "mobilenet_v2": (Inverted, [8, 3, 16, 16]),
    "transformer": (Encoder, [4, 6, 16]),
    "lstm": (Recurrent, [4, 5, 6]),
}


def lowered(name: str, preset: str = "int8") -> tuple[IntegerNetwork, Tensor]:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    x = torch.randn(shape)
    prepared = qat.prepare(build().eval(), qat.preset(preset), x[:2])
    finalize(prepared, [x], PTQConfig(bias_correction=False), trained=False)
    return qat.lower(prepared), x


# convolutions, linear layers, additions and pools: all of ResNet-20 but the last layer, whose result is no integer
KERNELS = {"resnet20": 19 + 9, "small_cnn": 7, "mobilenet_v2": 5, "transformer": 4, "lstm": 0}


@pytest.mark.parametrize("preset", ["int8", "w4a4"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_networks_layer_by_layer_and_end_to_end(name: str, preset: str) -> None:
    network, x = lowered(name, preset)
    network.set_reference()
    tensors = network.run(x)
    network.set_reference(False)
    given = {k: v for k, v in tensors.items() if isinstance(v, Tensor) and network.grid(k) is not None}
    path = network.fast_path()
    assert (len(path.plan.kernels) if path.plan else 0) == KERNELS[name]
    made = path.plan.integers(given, x) if path.plan else {}
    for key, integers in made.items():
        steps = (integers.int() - given[key].int()).abs()
        assert steps.max() <= 1, key
        assert (steps == 0).float().mean() >= 0.999, key
    assert path.plan is None or made.keys() == given.keys()
    expected = tensors[network.outputs[0]]
    assert (network(x) - expected).abs().max() <= 0.05 * expected.abs().max()
    assert torch.equal(network(x), network(x))
    assert (network(x[:1]) - network(x)[:1]).abs().max() <= 1e-5 * expected.abs().max()


def test_it_is_used_unless_something_else_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = lowered("small_cnn")
    plan = network.fast_path().plan
    assert plan is not None
    calls: list[int] = []
    monkeypatch.setattr(type(plan), "__call__", lambda self, *x: calls.append(1) or _by_steps(self, *x))
    expected = network(x)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(x), expected)
    with torch.inference_mode():
        assert torch.equal(network(x), expected)
    assert len(calls) == 3
    assert network(x[:0]).shape == (0, *expected.shape[1:])  # no kernel takes an empty batch
    network(x.clone().requires_grad_())
    network.set_reference()
    network(x)
    network.set_reference(False)
    seen: list[Any] = []
    handle = network.layer(network.nodes[1].name).register_forward_hook(lambda *a: seen.append(a))
    network(x)
    handle.remove()
    assert (len(seen), len(calls)) == (1, 3)
    network(x)
    assert len(calls) == 4


def _by_steps(plan: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    tensors = {(n, False): x for n, x in zip(plan.network.inputs, inputs, strict=True)}
    for step in plan.steps:
        tensors[step.made] = step.run(*[tensors[key] for key in step.inputs])
    return tuple(tensors[key] for key in plan.outputs)


def test_changed_numbers_are_seen() -> None:
    network, x = lowered("small_cnn")
    before = network(x)
    name = next(node.name for node in network.nodes if isinstance(network.layer(node.name), IntegerConv))
    layer = network.layer(name)
    state = copy.deepcopy(network.state_dict())

    def reference() -> Tensor:
        network.set_reference()
        result = network(x)
        network.set_reference(False)
        return result

    assert isinstance(layer, IntegerConv)
    assert layer.output is not None
    layer.weight.mul_(-1)  # in place
    assert not torch.equal(network(x), before)
    torch.testing.assert_close(network(x), reference(), rtol=0, atol=float(0.02 * before.abs().max()))
    layer.weight = -layer.weight  # another tensor
    assert torch.equal(network(x), before)
    layer.output.scale.mul_(2)
    assert not torch.equal(network(x), before)
    network.load_state_dict(state)
    assert torch.equal(network(x), before)
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(x), before)
    network.double().float()
    assert torch.equal(network(x), before)


class Graphs:
    """A compiler that keeps the graphs that it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_compile_has_one_graph_with_the_kernels_in_it(name: str) -> None:
    network, x = lowered(name)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(copy.deepcopy(network), backend=graphs, fullgraph=True)
    expected = network(x)
    assert (compiled(x) - expected).abs().max() <= 0.05 * expected.abs().max()
    for size in (3, 2, 4):
        compiled(x[:size])
    assert len(graphs.graphs) <= 2  # the second has a dynamic batch
    called = [n.target for n in graphs.graphs[0].graph.nodes if n.target is torch.ops.onednn.qconv_pointwise.default]
    convolutions = [node for node in network.nodes if isinstance(network.layer(node.name), IntegerConv)]
    assert len(called) == len(convolutions)


@torch.no_grad()
def test_loading_weights_compiles_again() -> None:
    network, x = lowered("small_cnn")
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(network, backend=graphs, fullgraph=True)
    compiled(x)
    other = {
        k: v.neg() if k.endswith("weight") and v.dtype is torch.int8 else v for k, v in network.state_dict().items()
    }
    network.load_state_dict(other)
    assert (compiled(x) - network(x)).abs().max() <= 1e-4 * network(x).abs().max()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_exports_with_a_dynamic_batch(name: str) -> None:
    network, x = lowered(name)
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    program = torch.export.export(network, (x,), dynamic_shapes={"inputs": (batch,)})
    for size in (1, 3):
        expected = network(x[:size])
        assert (program.module()(x[:size]) - expected).abs().max() <= 0.05 * expected.abs().max()
