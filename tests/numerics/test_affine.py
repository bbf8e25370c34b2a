"""Forward: against ONNX's reference evaluator (bit for bit), ATen (up to ties), and the properties of a grid."""

import functools

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from qat.numerics.affine import SMALLEST_SCALE, choose_qparams, dequantize, int_range, quantize
from qat.numerics.fake_quantize import fake_quantize

SEED = [1.6, -0.7, -3.4, 1.7, -2.9, 0.5, 2.3, 6.2]
ZERO = torch.tensor(0.0)
GRIDS = [int_range(bits, signed) for bits in (2, 3, 4, 8, 16) for signed in (True, False)]


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_absmax_seed() -> None:
    x = torch.tensor(SEED)
    scale, zero_point = choose_qparams(x.amin(), x.amax(), -127, 127, symmetric=True)
    assert 1 / scale.item() == pytest.approx(127 / 6.2, rel=1e-6)
    assert round(1 / scale.item(), 1) == 20.5
    assert zero_point.item() == 0
    assert quantize(x, scale, zero_point, -127, 127).tolist() == [33, -14, -70, 35, -59, 10, 47, 127]


def test_affine_seed() -> None:
    # S = (6.2 + 3.4) / 255 = 0.0376471, Z = round(3.4 / S) = round(90.31) = 90, x_q = round(x / S) + Z
    x = torch.tensor(SEED)
    scale, zero_point = choose_qparams(x.amin(), x.amax(), 0, 255, symmetric=False)
    assert scale.item() == pytest.approx(9.6 / 255, rel=1e-6)
    assert zero_point.item() == 90
    x_q = quantize(x, scale, zero_point, 0, 255)
    # x / S = 42.5, -18.59, -90.31, 45.16, -77.03, 13.28, 61.09, 164.69; the first is a tie on paper, not in float32
    assert x_q.tolist() == [42 + 90 + int(np.float32(1.6) / np.float32(scale) > 42.5), 71, 0, 135, 13, 103, 151, 255]
    assert np.allclose(dequantize(x_q, scale, zero_point), scale.item() * (x_q.numpy() - 90))
    assert (dequantize(x_q, scale, zero_point) - x).abs().max() <= scale.item() * 0.5 * (1 + 1e-5)


def test_symmetric_seed() -> None:
    # -a = b = max(|min|, |max|), Z = 0
    low, high = torch.tensor([-4.0, -0.5, 0.0]), torch.tensor([1.0, 2.0, 3.0])
    scale, zero_point = choose_qparams(low, high, -127, 127, symmetric=True)
    assert torch.allclose(scale * 127, torch.tensor([4.0, 2.0, 3.0]))
    assert zero_point.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("bits", "signed", "narrow", "expected"),
    [
        (8, True, False, (-128, 127)),
        (8, True, True, (-127, 127)),
        (8, False, False, (0, 255)),
        (8, False, True, (0, 255)),
        (2, True, False, (-2, 1)),
        (2, True, True, (-1, 1)),
        (4, False, False, (0, 15)),
        (16, True, False, (-32768, 32767)),
    ],
)
def test_int_range(bits: int, signed: bool, narrow: bool, expected: tuple[int, int]) -> None:
    assert int_range(bits, signed, narrow) == expected


def test_rounding_mode_is_used() -> None:
    x = torch.tensor([-1.5, 0.5, 1.5])
    one = torch.tensor(1.0)
    assert quantize(x, one, ZERO, -8, 7, "floor").tolist() == [-2, 0, 1]
    assert quantize(x, one, ZERO, -8, 7, "ceil").tolist() == [-1, 1, 2]
    assert fake_quantize(x, one, ZERO, -8, 7, rounding="truncate").tolist() == [-1, 0, 1]
    assert fake_quantize(x, one, ZERO, -8, 7, rounding="ceil", grad_scale=1.0).tolist() == [-1, 1, 2]


# ---- ranges ----------------------------------------------------------------------------------------------------------

FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(FLOATS, FLOATS, st.sampled_from(GRIDS), st.booleans())
def test_choose_qparams(a: float, b: float, grid: tuple[int, int], symmetric: bool) -> None:
    low, high = sorted((a, b))
    scale, zero_point = choose_qparams(torch.tensor(low), torch.tensor(high), *grid, symmetric)
    assert scale.dtype == zero_point.dtype == torch.float32
    assert scale.item() >= SMALLEST_SCALE
    assert zero_point.item() == int(zero_point.item())
    assert grid[0] <= zero_point.item() <= grid[1]
    low, high = min(low, 0.0), max(high, 0.0)  # zero is always inside
    if symmetric:
        assert zero_point == 0
        expected = np.float64(max(-low, high)) / grid[1]
    else:
        expected = (np.float64(high) - np.float64(low)) / (grid[1] - grid[0])
    if expected > SMALLEST_SCALE * (1 + 1e-6):
        assert scale.item() == pytest.approx(expected, rel=1e-6)
        if not symmetric:
            assert zero_point.item() == pytest.approx(grid[0] - low / expected, abs=0.5 + 0.01)
    elif expected < SMALLEST_SCALE * (1 - 1e-6):
        assert scale.item() == 1


def test_full_float_range_does_not_overflow() -> None:
    largest = torch.tensor(torch.finfo(torch.float32).max)
    for symmetric in (True, False):
        scale, zero_point = choose_qparams(-largest, largest, -128, 127, symmetric)
        assert torch.isfinite(scale)
        x = torch.tensor([-3e38, 0.0, 3e38])
        assert torch.allclose(fake_quantize(x, scale, zero_point, -128, 127), x, rtol=0, atol=scale.item() * 0.51)


# ---- ONNX ------------------------------------------------------------------------------------------------------------

ONNX_TYPES = {
    (-2, 1): TensorProto.INT2,
    (0, 3): TensorProto.UINT2,
    (-8, 7): TensorProto.INT4,
    (0, 15): TensorProto.UINT4,
    (-128, 127): TensorProto.INT8,
    (0, 255): TensorProto.UINT8,
    (-32768, 32767): TensorProto.INT16,
    (0, 65535): TensorProto.UINT16,
}


@functools.cache
def onnx_pair(dtype: int) -> ReferenceEvaluator:
    def info(name: str, kind: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, None)

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=0),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=0),
    ]
    inputs = [info("x", TensorProto.FLOAT), info("s", TensorProto.FLOAT), info("z", dtype)]
    graph = helper.make_graph(nodes, "pair", inputs, [info("q", dtype), info("y", TensorProto.FLOAT)])
    return ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)]))


def by_onnx(x: Tensor, scale: Tensor, zero_point: Tensor, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    dtype = ONNX_TYPES[grid]
    zero = zero_point.numpy().astype(helper.tensor_dtype_to_np_dtype(dtype))
    return tuple(onnx_pair(dtype).run(None, {"x": x.numpy(), "s": scale.numpy(), "z": zero}))


def assert_same_bits(got: Tensor, expected: np.ndarray) -> None:
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy().view(np.int32), np.ascontiguousarray(expected).view(np.int32))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Values around and beyond a grid, ties among them."""
    grid = draw(st.sampled_from(sorted(ONNX_TYPES)))
    scale = torch.tensor(draw(st.floats(2**-20, 2**10, width=32) | st.sampled_from([0.5, 1.0, 0.0625])))
    zero_point = torch.tensor(float(draw(st.integers(*grid))))
    reach = 2 * (grid[1] - grid[0])
    steps = st.floats(-reach, reach, width=32) | st.integers(-reach, reach).map(lambda k: k + 0.5)
    values = draw(st.lists(steps, min_size=1, max_size=30))
    return torch.tensor(values) * scale, scale, zero_point, grid


@settings(max_examples=300)
@given(cases())
def test_forward_equals_onnx_bit_for_bit(case: tuple[Tensor, Tensor, Tensor, tuple[int, int]]) -> None:
    x, scale, zero_point, grid = case
    x_q, x_dq = by_onnx(x, scale, zero_point, grid)
    assert np.array_equal(quantize(x, scale, zero_point, *grid).numpy(), x_q.astype(np.float32))
    assert_same_bits(dequantize(torch.from_numpy(x_q.astype(np.float32)), scale, zero_point), x_dq)
    assert_same_bits(fake_quantize(x, scale, zero_point, *grid), x_dq)
    assert_same_bits(fake_quantize(x, scale, zero_point, *grid, grad_scale=1.0), x_dq)


@pytest.mark.parametrize("grid", sorted(ONNX_TYPES))
@pytest.mark.parametrize("grad_scale", [None, 1.0])
def test_forward_equals_onnx_per_channel(grid: tuple[int, int], grad_scale: float | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 500) * torch.logspace(-2, 2, 6).unsqueeze(1)
    scale, zero_point = choose_qparams(x.amin(1) * 0.8, x.amax(1) * 0.8, *grid, symmetric=False)
    _, expected = by_onnx(x, scale, zero_point, grid)
    got = fake_quantize(x, scale.unsqueeze(1), zero_point.unsqueeze(1), *grid, grad_scale=grad_scale)
    assert_same_bits(got, expected)


# ---- ATen ------------------------------------------------------------------------------------------------------------


def assert_equal_up_to_ties(got: Tensor, aten: Tensor, x: Tensor, scale: Tensor) -> int:
    """Equal, except by one step where `x / scale` is a tie up to float32's rounding. Returns how many differ."""
    differ = got != aten
    assert ((got - aten).abs() <= scale * (1 + 1e-3))[differ].all()
    v = x.double() / scale.double()
    assert (((v - v.floor()) - 0.5).abs() <= 1e-4)[differ].all()
    return int(differ.sum())


@pytest.mark.parametrize("grid", [g for g in GRIDS if g[1] < 256])
def test_equals_aten_per_tensor_up_to_ties(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(100_000)
    scale, zero_point = choose_qparams(torch.tensor(-2.0), torch.tensor(3.0), *grid, symmetric=False)
    aten = torch.fake_quantize_per_tensor_affine(x, scale.item(), int(zero_point), *grid)
    differ = assert_equal_up_to_ties(fake_quantize(x, scale, zero_point, *grid), aten, x, scale)
    assert differ < 100  # one in a thousand


def test_ties_where_aten_departs_are_rounded_to_even() -> None:
    k = torch.arange(-100, 100)  # (k + 0.5) * 61 / 61 is a tie exactly; times float32(1 / 61) it often is not
    x, scale = (k + 0.5) * 61, torch.tensor(61.0)
    got = fake_quantize(x, scale, ZERO, -128, 127)
    assert torch.equal(got, torch.where(k % 2 == 0, k, k + 1) * scale)
    aten = torch.fake_quantize_per_tensor_affine(x, 61.0, 0, -128, 127)
    assert assert_equal_up_to_ties(got, aten, x, scale) > 10


@pytest.mark.parametrize("grid", [(-8, 7), (-127, 127), (0, 255)])
def test_equals_aten_per_channel_up_to_ties(grid: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4000) * torch.tensor([0.01, 0.1, 1, 10, 100]).unsqueeze(1)
    scale, zero_point = choose_qparams(x.amin(1) * 0.9, x.amax(1) * 0.9, *grid, symmetric=False)
    aten = torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), 0, *grid)
    column = scale.unsqueeze(1)
    got = fake_quantize(x, column, zero_point.unsqueeze(1), *grid)
    assert assert_equal_up_to_ties(got, aten, x, column.expand_as(x)) < 20


# ---- properties ------------------------------------------------------------------------------------------------------


@given(cases())
def test_grid_properties(case: tuple[Tensor, Tensor, Tensor, tuple[int, int]]) -> None:
    x, scale, zero_point, grid = case
    y = fake_quantize(x, scale, zero_point, *grid)
    assert torch.equal(fake_quantize(y, scale, zero_point, *grid), y)  # idempotent
    order = x.argsort()
    assert (y[order].diff() >= 0).all()  # monotone
    assert fake_quantize(torch.zeros(1), scale, zero_point, *grid).item() == 0  # zero is exact
    low, high = (scale * (bound - zero_point) for bound in grid)
    inside = (x >= low) & (x <= high)
    error = (y.double() - x.double()).abs()
    assert (error <= scale.double() * (0.5 + 1e-2))[inside].all()  # half a step, and float32's rounding at 2^17 steps
    assert torch.equal(y[x > high], high.expand_as(x)[x > high])
    assert torch.equal(y[x < low], low.expand_as(x)[x < low])
    x_q = quantize(x, scale, zero_point, *grid)
    assert torch.equal(x_q, x_q.round())
    assert x_q.min() >= grid[0]
    assert x_q.max() <= grid[1]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_has_every_level_and_no_other(bits: int) -> None:
    x = torch.linspace(-1.5, 1.5, 5000)
    for signed, narrow, levels in ((True, False, 2**bits), (False, False, 2**bits), (True, True, 2**bits - 1)):
        grid = int_range(bits, signed, narrow)
        scale, zero_point = choose_qparams(torch.tensor(-1.0), torch.tensor(1.0), *grid, symmetric=False)
        assert len(fake_quantize(x, scale, zero_point, *grid).unique()) == levels


@given(st.lists(st.floats(-8, 8, width=16), min_size=1), st.integers(2, 8), st.sampled_from([0.25, 1.0, 0.3]))
def test_odd_for_symmetric_narrow_grids(values: list[float], bits: int, scale: float) -> None:
    grid = int_range(bits, signed=True, narrow=True)
    x = torch.tensor(values)
    y = fake_quantize(x, torch.tensor(scale), ZERO, *grid)
    assert torch.equal(fake_quantize(-x, torch.tensor(scale), ZERO, *grid), -y)


# ---- dtypes, layouts, odd values -------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_scale", [None, 1.0])
def test_half_precision_is_computed_in_float32_and_keeps_its_dtype(dtype: torch.dtype, grad_scale: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, dtype=dtype, requires_grad=True)
    scale = torch.tensor(0.037, requires_grad=True)
    y = fake_quantize(x, scale, ZERO, -128, 127, grad_scale=grad_scale)
    assert y.dtype == dtype
    expected = torch.round(x.detach().double() / 0.037).clamp(-128, 127) * 0.037
    assert torch.allclose(y.double(), expected, atol=0, rtol=torch.finfo(dtype).eps)
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert scale.grad is None if grad_scale is None else scale.grad.dtype == torch.float32


@pytest.mark.parametrize("grad_scale", [None, 1.0])
@pytest.mark.parametrize("channels", [False, True])
def test_layouts(grad_scale: float | None, channels: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 6)
    shape = (4, 1, 1, 1) if channels else ()
    scale, zero_point = torch.full(shape, 0.1), torch.full(shape, 3.0)

    def run(t: Tensor) -> Tensor:
        return fake_quantize(t, scale, zero_point, 0, 15, grad_scale=grad_scale)

    expected = run(x)
    last = run(x.to(memory_format=torch.channels_last))
    assert torch.equal(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert expected.is_contiguous()
    assert torch.equal(run(x.transpose(2, 3)), expected.transpose(2, 3))
    assert torch.equal(run(x[:, :, ::2]), expected[:, :, ::2])
    before = x.clone()
    run(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("grad_scale", [None, 1.0])
def test_empty_and_single_element(grad_scale: float | None) -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    empty = torch.empty(0, 3, requires_grad=True)
    y = fake_quantize(empty, scale, ZERO, -8, 7, grad_scale=grad_scale)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert fake_quantize(torch.tensor(0.7), scale, ZERO, -8, 7, grad_scale=grad_scale).item() == 0.5


@pytest.mark.parametrize(
    "values",
    [[0.0, 0.0], [3.0, 3.0], [-3.0], [1e-45, -1e-45], [1e-38, 1e-40], [1e30, -1e30], [1e30, 1e-30], [1e38, -1e38]],
)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("grad_scale", [None, 1.0])
def test_odd_values_make_no_nan(values: list[float], symmetric: bool, grad_scale: float | None) -> None:
    x = torch.tensor(values, requires_grad=True)
    low, high = torch.aminmax(x.detach())
    scale, zero_point = choose_qparams(low, high, -128, 127, symmetric)
    scale.requires_grad_()
    y = fake_quantize(x, scale, zero_point, -128, 127, grad_scale=grad_scale)
    assert torch.isfinite(y).all()
    assert ((y - x).abs() <= scale * 0.51).all()
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert grad_scale is None or torch.isfinite(scale.grad)


def test_quotients_beyond_float32_are_clipped() -> None:
    x = torch.tensor([1e30, -1e30], requires_grad=True)
    scale = torch.tensor(1e-30, requires_grad=True)
    y = fake_quantize(x, scale, ZERO, -128, 127, grad_scale=1.0)
    assert torch.allclose(y, torch.tensor([127e-30, -128e-30]), atol=0)
    y.sum().backward()
    assert x.grad.tolist() == [0, 0]
    assert scale.grad.item() == -1
