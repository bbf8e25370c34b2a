"""The integer runtime against plain loops and float64 convolutions, the fast path against the reference."""

import copy
import itertools
import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qat
from qat.runtime import IntegerConv, IntegerNetwork, Node, Quantize
from qat.runtime import operations as ops
from qat.runtime.accumulate import exact_dtype, reference_conv
from qat.runtime.functions import MOVES, nearest_places
from qat.runtime.grid import storage_dtype
from qat.zoo.models import SmallCNN

# grid of the input -> the dtype that stores it
INPUTS = {
    (0, 255): torch.uint8,
    (-128, 127): torch.int8,
    (0, 15): torch.uint8,
    (-32768, 32767): torch.int16,
    (0, 65535): torch.int32,
}
WEIGHTS = {(-128, 127): torch.int8, (-127, 127): torch.int8, (0, 255): torch.uint8, (-8, 7): torch.int8}


def integers(shape: tuple[int, ...], low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int64)


def loops(x: np.ndarray, w: np.ndarray, stride: list, padding: list, dilation: list, groups: int) -> np.ndarray:
    """The definition of a convolution, in Python integers; `x` and `w` are centred."""
    x = np.pad(x, [(0, 0), (0, 0), *padding])
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, w.shape[2:], strict=True)]
    out = [(size - r) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    y = np.zeros((x.shape[0], w.shape[0], *out), dtype=object)
    per_in, per_out = w.shape[1], w.shape[0] // groups
    for n, o in itertools.product(range(x.shape[0]), range(w.shape[0])):
        first = o // per_out * per_in
        for place in itertools.product(*map(range, out)):
            y[n, o, *place] = sum(
                int(x[n, first + c, *(p * s + t * d for p, s, t, d in zip(place, stride, tap, dilation, strict=True))])
                * int(w[o, c, *tap])
                for c in range(per_in)
                for tap in itertools.product(*map(range, w.shape[2:]))
            )
    return y


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """A convolution of one or two dimensions that has at least one output, or a linear layer (no dimensions)."""
    dims = draw(st.integers(0, 2))
    groups = draw(st.integers(1, 3)) if dims else 1
    shape = [groups * draw(st.integers(1, 3)), draw(st.integers(1, 4))]
    kernel = [draw(st.integers(1, 3)) for _ in range(dims)]
    dilation = [draw(st.integers(1, 2)) for _ in range(dims)]
    padding = [[draw(st.integers(0, 2)), draw(st.integers(0, 2))] for _ in range(dims)]
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = [max(1, r - sum(p)) + draw(st.integers(0, 3)) for r, p in zip(reach, padding, strict=True)]
    input_bounds = draw(st.sampled_from(sorted(INPUTS)))
    weight_bounds = draw(st.sampled_from(sorted(WEIGHTS)))
    lead = [draw(st.integers(1, 2)) for _ in range(1 if dims else draw(st.integers(1, 2)))]
    extreme = draw(st.booleans())  # both ends of the grids only, where sums are largest
    seed = draw(st.integers(0, 2**20))
    w_shape, x_shape = (*shape, *kernel), (*lead, shape[1] * groups, *sizes)
    x, w = integers(x_shape, *input_bounds, seed), integers(w_shape, *weight_bounds, seed + 1)
    if extreme:
        x, w = (torch.where(t > sum(b) / 2, b[1], b[0]) for t, b in ((x, input_bounds), (w, weight_bounds)))
    return {
        "x": x.to(INPUTS[input_bounds]),
        "w": w.to(WEIGHTS[weight_bounds]),
        "x_zero": draw(st.integers(*input_bounds) | st.just(0)) if input_bounds[0] <= 0 else input_bounds[0],
        "w_zero": integers((shape[0],), *weight_bounds, seed + 2).int() * draw(st.integers(0, 1)),
        "stride": [draw(st.integers(1, 3)) for _ in range(dims)],
        "padding": padding, "dilation": dilation, "groups": groups,
        "input_bounds": input_bounds, "weight_bounds": weight_bounds,
    }  # fmt: skip


def centred_float64(case: dict[str, Any]) -> tuple[Tensor, Tensor]:
    w = case["w"].double() - case["w_zero"].double().reshape(-1, *[1] * (case["w"].dim() - 1))
    return case["x"].double() - case["x_zero"], w


def expected_float64(case: dict[str, Any]) -> Tensor:
    """torch's float64 convolution of the centred integers: every sum here is far below 2^53."""
    x, w = centred_float64(case)
    if w.dim() == 2:
        return x @ w.T
    conv = {1: F.conv1d, 2: F.conv2d}[w.dim() - 2]
    x = F.pad(x, [p for pair in reversed(case["padding"]) for p in pair])
    return conv(x, w, None, case["stride"], 0, case["dilation"], case["groups"])


def layer_of(case: dict[str, Any], bias: Tensor | None = None) -> IntegerConv:
    geometry = {k: case[k] for k in ("stride", "padding", "dilation", "groups")}
    layer = IntegerConv(list(case["w"].shape), list(case["weight_bounds"]), list(case["input_bounds"]), **geometry)
    layer.weight.copy_(case["w"])
    layer.weight_zero_point.copy_(case["w_zero"])
    layer.input_zero_point.fill_(case["x_zero"])
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def reference(case: dict[str, Any]) -> Tensor:
    geometry = (case["stride"], case["padding"], case["dilation"], case["groups"])
    return reference_conv(case["x"], case["w"], case["x_zero"], case["w_zero"], *geometry)


@settings(max_examples=60, deadline=None)
@given(convolutions().filter(lambda case: case["w"].dim() > 2))
def test_reference_equals_the_definition(case: dict[str, Any]) -> None:
    got = reference(case)
    w_zero = case["w_zero"].numpy().astype(np.int64).reshape(-1, *[1] * (case["w"].dim() - 1))
    x, w = case["x"].numpy().astype(np.int64) - case["x_zero"], case["w"].numpy().astype(np.int64) - w_zero
    expected = loops(x, w, case["stride"], case["padding"], case["dilation"], case["groups"])
    assert got.dtype == (torch.int64 if case["input_bounds"][1] > 255 else torch.int32)
    assert np.array_equal(got.numpy(), expected.astype(np.int64))


@settings(max_examples=200, deadline=None)
@given(convolutions())
def test_both_paths_equal_a_float64_convolution(case: dict[str, Any]) -> None:
    bias = integers((case["w"].shape[0],), -(2**20), 2**20, 7)
    layer = layer_of(case, bias)
    expected = expected_float64(case) + bias.double().reshape(-1, *[1] * (case["w"].dim() - 2))
    wide = torch.int64 if case["input_bounds"][1] > 255 else torch.int32
    for layer.reference in (False, True):
        got = layer.accumulate(case["x"])
        assert got.dtype == wide
        assert got.shape == expected.shape
        assert torch.equal(got.double(), expected)


def large_case(fan_in: int, input_bounds: tuple[int, int], dims: int) -> dict[str, Any]:
    """Values at the ends of the grids and one odd product, so that sums are large and odd."""
    kernel = (3,) * dims
    channels = fan_in // 3**dims
    x = torch.full((2, channels, *(5,) * dims), input_bounds[1])
    x[0].flatten()[::7] -= 1
    w = integers((3, channels, *kernel), -127, 127, 1)
    w[0], w[1] = 127, -127
    w[0].flatten()[::5] -= 1
    return {
        "x": x.to(INPUTS[input_bounds]), "w": w.to(torch.int8), "x_zero": input_bounds[0],
        "w_zero": torch.zeros(3, dtype=torch.int32), "stride": [1] * dims, "padding": [[1, 0]] * dims,
        "dilation": [1] * dims, "groups": 1, "input_bounds": input_bounds, "weight_bounds": (-127, 127),
    }  # fmt: skip


@pytest.mark.parametrize("dims", [0, 1, 2])
@pytest.mark.parametrize("input_bounds", [(0, 255), (-128, 127), (0, 65535), (-32768, 32767)])
def test_fast_path_is_exact_where_float32_is_not(dims: int, input_bounds: tuple[int, int]) -> None:
    case = large_case(2304, input_bounds, dims)
    expected = expected_float64(case)
    assert expected.abs().max() > 2**24
    x, w = (t.float() for t in centred_float64(case))
    if dims == 0:
        assert not torch.equal((x @ w.T).double(), expected)  # float32 rounds here
    layer = layer_of(case)
    assert torch.equal(layer.accumulate(case["x"]).double(), expected)
    layer.reference = True
    assert torch.equal(layer.accumulate(case["x"]).double(), expected)


def test_sixteen_bit_sums_outgrow_int32() -> None:
    case = large_case(1152, (0, 65535), 2)
    expected = expected_float64(case)
    assert expected.abs().max() > 2**32
    layer = layer_of(case)
    assert layer.bias.dtype == torch.int64
    for layer.reference in (False, True):
        assert layer.accumulate(case["x"]).dtype == torch.int64
        assert torch.equal(layer.accumulate(case["x"]).double(), expected)


@pytest.mark.parametrize(("inputs", "expected"), [(258, torch.float32), (259, torch.float64)])
def test_exact_dtype(inputs: int, expected: torch.dtype) -> None:
    # 255 * 255 * 258 = 16,776,450 < 2^24 = 16,777,216 < 255 * 255 * 259
    zero = torch.zeros(2, dtype=torch.int32)
    w = torch.zeros(2, inputs, dtype=torch.uint8)
    w[1] = 255
    assert exact_dtype(w, zero, 255) is expected
    assert exact_dtype(255 - w, zero + 255, 255) is expected  # w - zero = -255: the magnitude counts


def test_fast_path_follows_new_weights() -> None:
    case = large_case(36, (0, 255), 2)
    layer = layer_of(case)
    layer.accumulate(case["x"])  # makes the cached form
    state = layer.state_dict() | {"weight": -layer.weight, "input_zero_point": torch.tensor(3, dtype=torch.int32)}
    layer.load_state_dict(state)
    case |= {"w": -case["w"], "x_zero": 3}
    assert torch.equal(layer.accumulate(case["x"]).double(), expected_float64(case))


def test_forward_scales_and_requantizes() -> None:
    layer = IntegerConv([2, 3], [-8, 7], [0, 255], output=Quantize(0, 15, False, 0.25, 3))
    layer.weight.copy_(torch.tensor([[1, -2, 3], [7, 0, -8]]))
    layer.weight_scale.copy_(torch.tensor([0.5, 0.125]))
    layer.bias.copy_(torch.tensor([4, -20]))
    layer.input_scale.fill_(0.25)
    layer.input_zero_point.fill_(10)
    x = torch.tensor([[12, 9, 10], [10, 10, 11]], dtype=torch.uint8)  # centred: 2 -1 0 and 0 0 1
    # sums 4 and 14, 3 and -8; with bias 8 and -6, 7 and -28; real 1, -0.1875, 0.875, -0.875; over 0.25, plus 3
    assert layer(x).tolist() == [[7, 2], [3 + 4, 0]]  # 3.5 and -3.5 are ties, to even 4 and -4 (then clamped)
    layer.output = None
    assert layer(x).tolist() == [[1.0, -0.1875], [0.875, -0.875]]
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        ((0, 3), torch.uint8),
        ((0, 255), torch.uint8),
        ((-2, 1), torch.int8),
        ((-128, 127), torch.int8),
        ((-32767, 32767), torch.int16),
        ((0, 65535), torch.int32),
    ],
)
def test_storage_dtype(grid: tuple[int, int], dtype: torch.dtype) -> None:
    assert storage_dtype(*grid) is dtype
    ends = Quantize(*grid)(torch.tensor([-1e9, 1e9]))
    assert ends.dtype is dtype
    assert ends.tolist() == list(grid)


def test_quantize_absorbs_relu() -> None:
    x = torch.tensor([-1.0, -0.1, 0.0, 0.6, 9.0])
    assert Quantize(0, 15, True, 0.5, 4)(x).tolist() == [4, 4, 4, 5, 15]
    assert Quantize(0, 15, False, 0.5, 4)(x).tolist() == [2, 4, 4, 5, 15]


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lowered() -> tuple[IntegerNetwork, Tensor, Tensor]:
    """A small integer network, an input, and its result by the reference path."""
    torch.manual_seed(0)
    net = SmallCNN(1, 10, width=4)
    x = torch.randn(16, 1, 8, 8)
    prepared = qat.prepare(net.eval(), qat.preset("w8a8_asymmetric"), x)
    qat.calibrate(prepared, [x])
    network = qat.lower(prepared)
    network.set_reference()
    expected = network(x)
    network.set_reference(False)
    assert expected.std() > 0.1
    return network, x, expected


def cold(network: IntegerNetwork) -> IntegerNetwork:
    """A copy that has never run."""
    twin = IntegerNetwork.from_spec(network.spec())
    twin.load_state_dict(network.state_dict())
    return twin.eval()


def test_set_reference_reaches_every_layer(lowered: tuple[IntegerNetwork, Tensor, Tensor]) -> None:
    network = copy.deepcopy(lowered[0])
    layers = [m for m in network.modules() if isinstance(m, IntegerConv)]
    assert len(layers) == 6
    network.set_reference()
    assert all(layer.reference for layer in layers)
    assert not any(m.reference for m in lowered[0].modules() if isinstance(m, IntegerConv))
    network.set_reference(False)
    assert not any(layer.reference for layer in layers)


def test_reference_and_fast_agree_to_the_bit(lowered: tuple[IntegerNetwork, Tensor, Tensor]) -> None:
    network, x, expected = lowered
    assert torch.equal(network(x), expected)
    every = network.run(x)
    network.set_reference()
    for name, tensor in network.run(x).items():
        assert torch.equal(tensor, every[name])
    network.set_reference(False)


def test_deepcopy_shares_nothing(lowered: tuple[IntegerNetwork, Tensor, Tensor]) -> None:
    network, x, expected = lowered
    twin = copy.deepcopy(network)
    assert torch.equal(twin(x), expected)
    for buffer in twin.buffers():
        buffer.zero_()
    assert torch.equal(network(x), expected)


def test_spec_round_trip_through_json(lowered: tuple[IntegerNetwork, Tensor, Tensor]) -> None:
    network, x, expected = lowered
    twin = IntegerNetwork.from_spec(json.loads(json.dumps(network.spec())))
    assert twin.spec() == network.spec()
    assert {k: (v.dtype, v.shape) for k, v in twin.state_dict().items()} == {
        k: (v.dtype, v.shape) for k, v in network.state_dict().items()
    }
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(x), expected)
    assert twin.info["quant"] == qat.preset("w8a8_asymmetric").to_dict()


@pytest.mark.parametrize("warm", [True, False])
def test_compiles_without_a_break(lowered: tuple[IntegerNetwork, Tensor, Tensor], warm: bool) -> None:
    network, x, expected = lowered
    network = cold(network)
    if warm:
        network(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(network, backend="eager", fullgraph=True)(x), expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_compiles_with_inductor() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 1, 4, 4)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).eval()
    prepared = qat.prepare(net, qat.preset("int8"), x)
    qat.calibrate(prepared, [x])
    network = qat.lower(prepared)
    torch._dynamo.reset()
    expected = network(x)
    assert (torch.compile(network)(x) - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_torch_export(lowered: tuple[IntegerNetwork, Tensor, Tensor], warm: bool, strict: bool) -> None:
    network, x, expected = lowered
    network = cold(network)
    if warm:
        network(x)
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    program = torch.export.export(network, (x,), dynamic_shapes={"inputs": (batch,)}, strict=strict)
    assert torch.equal(program.module()(x), expected)
    assert torch.equal(program.module()(x[:3]), expected[:3])
    assert torch.equal(network(x), expected)  # nothing of the tracing stays behind


def test_autocast_leaves_it_alone(lowered: tuple[IntegerNetwork, Tensor, Tensor]) -> None:
    network, x, expected = lowered
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = network(x)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)


def test_runs_under_inference_mode_and_on_empty_batches(lowered: tuple[IntegerNetwork, Tensor, Tensor]) -> None:
    network, x, expected = lowered
    with torch.inference_mode():
        assert torch.equal(cold(network)(x), expected)
    assert network(x[:0]).shape == (0, 10)


def test_unknown_layer_is_refused(lowered: tuple[IntegerNetwork, Tensor, Tensor]) -> None:
    spec = copy.deepcopy(lowered[0].spec())
    spec["nodes"][3]["layer"] = "integer_lstm"
    with pytest.raises(ValueError, match=rf"'{spec['nodes'][3]['name']}'.*'integer_lstm'"):
        IntegerNetwork.from_spec(spec)


@pytest.mark.parametrize("count", [0, 2])
def test_wrong_number_of_inputs(lowered: tuple[IntegerNetwork, Tensor, Tensor], count: int) -> None:
    network, x, _ = lowered
    with pytest.raises(ValueError, match=rf"takes 1 inputs \(x\), got {count}"):
        network(*[x] * count)


def test_names_of_module_dict_attributes() -> None:
    names = ["keys", "values", "items", "pop", "forward", "train", "a.b", "training_1"]
    layers = {name: ops.Pad(pads=[[i, 0]], value=i) for i, name in enumerate(names)}
    chain = [Node(name, (before,)) for before, name in zip(["x", *names], names, strict=False)]
    network = IntegerNetwork(["x"], chain, dict(layers), ["training_1"])
    expected = [7.0] * 7 + [6.0] * 6 + [5.0] * 5 + [4.0] * 4 + [3.0] * 3 + [2.0] * 2 + [1.0, 9.0]
    assert network(torch.tensor([9.0])).tolist() == expected
    assert network.layer("keys") is layers["keys"]
    assert network.layer("a.b") is layers["a.b"]
    twin = IntegerNetwork.from_spec(json.loads(json.dumps(network.spec())))
    twin.load_state_dict(network.state_dict())
    assert twin(torch.tensor([9.0])).tolist() == expected


def test_layers_named_after_module_dict_attributes_lower() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keys, self.values, self.items = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, update: Tensor) -> Tensor:
            return self.items(self.keys(update) + self.values(update))

    torch.manual_seed(0)
    x = torch.randn(32, 4)
    prepared = qat.prepare(Net().eval(), qat.preset("int8"), x)
    qat.calibrate(prepared, [x])
    network = qat.lower(prepared)
    assert {"keys", "values", "items"} <= {node.name for node in network.nodes}
    assert (network(x) - prepared(x)).abs().max() < 0.02


def test_several_outputs_come_as_a_tuple() -> None:
    double = ops.Affine(2)
    double.factor.fill_(2)
    network = IntegerNetwork(["x"], [Node("y", ("x",)), Node("z", ("y",))], {"y": double, "z": double}, ["z", "y"])
    z, y = network(torch.ones(1, 2))
    assert (z.tolist(), y.tolist()) == ([[4, 4]], [[2, 2]])


def test_grid_follows_operations_that_keep_it() -> None:
    grid = Quantize(0, 255, False, 0.5, 7)
    layers = {"q": ops.QuantizeInput(grid), "p": ops.MaxPool(kernel=[2]), "r": ops.Dequantize(grid)}
    nodes = [Node("q", ("x",)), Node("p", ("q",)), Node("r", ("p",))]
    network = IntegerNetwork(["x"], nodes, layers, ["r"])
    assert network.grid("q") is network.grid("p") is grid
    assert network.grid("x") is None
    assert network.grid("r") is None


def test_watch_replaces_tensors(lowered: tuple[IntegerNetwork, Tensor, Tensor]) -> None:
    network, x, _ = lowered
    seen: list[str] = []

    def watch(name: str, tensor: Tensor) -> Tensor:
        seen.append(name)
        return torch.zeros_like(tensor) if name == "stem.0" else tensor

    tensors = network.run(x, watch=watch)
    assert seen == [node.name for node in network.nodes]
    assert not tensors["stem.0"].any()
    assert not torch.equal(tensors[network.outputs[0]], network(x))


# ---- operations on integers, by hand ---------------------------------------------------------------------------------


def test_integer_operations_by_hand() -> None:
    x = torch.tensor([[[-128, 5, 127, -3]]], dtype=torch.int8)
    assert ops.Relu(zero=-3)(x).tolist() == [[[-3, 5, 127, -3]]]
    pooled = ops.MaxPool(kernel=[3], stride=[2], padding=[1], dilation=[1], ceil_mode=False)(x)
    assert pooled.dtype == torch.int8
    assert pooled.tolist() == [[[5, 127]]]
    assert ops.Pad(pads=[[1, 2]], value=-7)(x).tolist() == [[[-7, -128, 5, 127, -3, -7, -7]]]
    assert ops.Slice(slices=[[2, 1, None, 2]])(x).tolist() == [[[5, -3]]]
    assert ops.Slice(slices=[[-1, 0, -1, 1]])(x).tolist() == [[[-128, 5, 127]]]
    assert ops.Permute(dims=[0, 2, 1])(x).shape == (1, 4, 1)
    assert ops.Reshape(shape=[0, 2, -1])(x).tolist() == [[[-128, 5], [127, -3]]]
    assert ops.Concat(dim=1)(x, x).shape == (1, 2, 4)
    wide = torch.tensor([[[65535, 65534, 3]]], dtype=torch.int32)
    wide = ops.MaxPool(kernel=[2], stride=[1], padding=[0], dilation=[1], ceil_mode=False)(wide)
    assert wide.tolist() == [[[65535, 65534]]]
    assert wide.dtype == torch.int32


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_interpolation_takes_values_from_the_places_that_torch_takes(mode: str) -> None:
    for size in range(1, 24):
        x = torch.randint(-128, 128, (2, 3, size, 7), dtype=torch.int8)
        ways: list[dict[str, Any]] = [{"size": (n, 5)} for n in range(1, 40, 3)]
        ways += [{"scale_factor": f} for f in (0.3, 0.5, 1.1, 1.7, 2, 3) if int(size * f)]
        ways += [{"scale_factor": (1.3, 2.1), "recompute_scale_factor": True}]
        for way in ways:
            made = MOVES["take"](x, places=nearest_places(x.shape[2:], mode=mode, **way))
            assert made.dtype == torch.int8
            assert torch.equal(made.float(), F.interpolate(x.float(), mode=mode, **way)), (size, way)


@pytest.mark.parametrize("size", [(3, 5), (None, 2), (4, 4), (1, 11)])
def test_integers_are_pooled_in_torchs_windows(size: tuple[int | None, int]) -> None:
    x = torch.randint(-(2**30), 2**30, (2, 3, 8, 9), dtype=torch.int32)
    made = MOVES["adaptive_max_pool"](x, output_size=list(size))
    assert torch.equal(made.double(), F.adaptive_max_pool2d(x.double(), size))
