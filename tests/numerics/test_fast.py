"""The fast path, in C++, compiled by Inductor and in blocks, against the formulas written out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor
from torch._dynamo.utils import counters

from qat.numerics import blocks, fast, kernels, native
from qat.numerics.affine import choose_qparams, dequantize, quantize
from qat.numerics.fake_quantize import fake_quantize
from qat.numerics.order import layout_of
from qat.observers import Ema, ObserverOptions

GRIDS = [(-8, 7, 0), (0, 15, 0), (0, 255, 113), (-127, 127, 0), (-2, 1, 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = {"native": "on", "compiled": "inductor", "blocked": "off"}
"""Form -> what QAT_KERNELS says."""
SOME = [pytest.param(form, marks=pytest.mark.slow) if form == "compiled" else form for form in FORMS]
"""Inductor takes seconds a kernel; by default `test_kernels.py` has a sample of them."""


def need(form: str) -> None:
    """Skip where there is no compiler for a form."""
    if (form == "native" and native.module() is None) or (form == "compiled" and not kernels.available(False, "rows")):
        pytest.skip("no compiler at hand")


class Result(NamedTuple):
    y: Tensor
    grad_x: Tensor
    grad_scale: Tensor
    terms: Tensor
    """What the gradient of the scale sums, in magnitude."""


def definition(
    x: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, relu: bool, grad: Tensor, lsq: bool
) -> Result:
    """`affine`'s forward; equations 1 to 3 of Esser et al., the residual rounded to 1/252, as it is kept in a byte."""
    v = x.float() / scale
    q = torch.round(v) + zero
    y = quantize(x, scale, zero, low, high)
    y = dequantize(torch.maximum(y, zero) if relu else y, scale, zero).to(x.dtype)
    inside = (q >= low) & (q <= high) & ((x > 0) | (not relu))
    residual = torch.round((torch.round(v) - v) * 252) / 252
    under = torch.maximum(zero, torch.tensor(float(low))) if relu else torch.tensor(float(low))
    slope = torch.where(inside, residual, torch.where((q > high) & ((x > 0) | (not relu)), high - zero, under - zero))
    terms = (grad.float() * slope).double()
    total = terms.sum_to_size(scale.shape).float() if lsq else torch.zeros(())
    return Result(y, torch.where(inside, grad, 0), total, terms.abs().sum_to_size(scale.shape))


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random values, among them ties, zeros, values that overflow, infinities and NaN."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    special = [0.0, -0.0, 0.05, -0.05, 0.15, 1e30, -1e30, 1e-40, 0.25, -0.25, torch.inf, -torch.inf, torch.nan]
    x.view(-1)[: len(special)] = torch.tensor(special)[: x.numel()]
    return x.to(dtype)


def check(
    x: Tensor,
    scale: Tensor,
    grid: tuple[int, int, int] = (-8, 7, 0),
    relu: bool = False,
    grad_scale: float | None = None,
    form: str | None = None,
    grad: Tensor | None = None,
) -> None:
    low, high, zero = grid
    if relu:
        zero = max(zero, low)
    zero_point = torch.full_like(scale, zero)
    if grad is None:
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
        grad = torch.empty_like(x).copy_(grad)
    leaf, learned = x.detach().requires_grad_(), scale.clone().requires_grad_()
    chosen = fast.plan(leaf, learned.shape, grad_scale is not None)
    assert chosen is not None
    if form is not None:
        assert chosen.form == form
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = fast.fake_quantize(leaf, learned, zero_point, low, high, relu=relu, grad_scale=grad_scale)
    # the scale, as it is and as it is used, and both ends of the grid
    ranges = 8 * scale.numel() + 8 * (scale if chosen.form == "native" else chosen.layout.spread(scale)).numel()
    small = x.numel() < fast.SMALLEST_LEARNED  # which the composed form takes
    assert ranges <= 16 * scale.numel() or ranges <= x.numel() // 4 or small
    bits = chosen.form == "native" and grad_scale is None  # where the gradient passes; a byte where channels end within
    least = -(-x.numel() // 8) if bits else x.numel()
    assert least <= sum(kept) <= x.numel() + ranges
    if bits and scale.numel() == 1:
        assert sum(kept) == least
    y.backward(grad)
    expected = definition(x.detach(), scale, zero_point, low, high, relu, grad, grad_scale is not None)
    assert y.dtype == x.dtype == leaf.grad.dtype
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, expected.y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(y.signbit() & ~y.isnan(), expected.y.signbit() & ~expected.y.isnan())  # zeros too
    torch.testing.assert_close(leaf.grad, expected.grad_x, rtol=0, atol=0, equal_nan=True)
    if grad_scale is None:
        assert learned.grad is None
        return
    assert learned.grad.shape == scale.shape
    error = (learned.grad - expected.grad_scale * grad_scale).abs().double()
    assert bool((error <= 1e-6 * expected.terms * grad_scale).all()), (learned.grad, expected.grad_scale)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_range_of_the_values_themselves_clips_nothing(dtype: torch.dtype) -> None:
    """Such weights keep no byte and hand the gradient on: what the definition gives to the bit."""
    for shape, scale_shape in (((64, 600), (64, 1)), ((40000,), ()), ((600, 70), (70,))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[0] *= 50
        axes = [i for i, n in enumerate((1,) * (x.dim() - len(scale_shape)) + scale_shape) if n == 1]
        largest = x.float().abs().amax(axes, keepdim=True).reshape(scale_shape)
        scale, zero = choose_qparams(-largest, largest, -127, 127, symmetric=True)
        taken = fast.plan(x, scale.shape, False)
        assert taken is not None
        leaf, grad = x.requires_grad_(), torch.randn(shape).to(dtype)
        y = fast.take(leaf, taken, scale, -127 - zero, 127 - zero, False, whole=True)
        y.backward(grad)
        expected = definition(x.detach(), scale, zero, -127, 127, False, grad, False)
        assert torch.equal(y, expected.y)
        assert torch.equal(leaf.grad, expected.grad_x)


@pytest.mark.parametrize("symmetric", [True, False])
def test_ranges_are_chosen_and_followed_as_written(symmetric: bool) -> None:
    """In one kernel to the bit what `choose_qparams` and the observer `ema` give in many operations."""
    generator = torch.Generator().manual_seed(0)
    low, high = -torch.rand(50, generator=generator), torch.rand(50, generator=generator) * 3
    low[:4], high[:4] = torch.tensor([0.0, 0.2, 0.0, -1e38]), torch.tensor([0.0, 0.5, 1e-45, 1e38])
    for floor in (0.0, -torch.inf):
        constants = fast.constants(-8, 7, floor, 0.05, torch.device("cpu"))
        scale, zero, bottom, top = fast.choose(low, high, constants, symmetric)
        expected = choose_qparams(low, high, -8, 7, symmetric)
        assert torch.equal(scale, expected[0])
        assert torch.equal(zero, expected[1])
        assert torch.equal(bottom, (-8 - zero).clamp(min=floor))
        assert torch.equal(top, 7 - zero)
    observer = Ema(ObserverOptions(rows=1, momentum=0.05))
    averages = torch.full((1,), torch.nan), torch.full((1,), torch.nan)
    for step in range(20):
        x = torch.randn(100, generator=generator) * (torch.nan if step in (0, 7) else 1 + step)
        observer.update(x.reshape(1, -1))
        ends = [end.reshape(1) for end in torch.aminmax(x)]
        *averages, scale, zero, bottom, top = fast.follow(*ends, *averages, constants, symmetric)
        torch.testing.assert_close(averages[0], observer.low[0], rtol=2e-7, atol=0, equal_nan=True)
        torch.testing.assert_close(averages[1], observer.high[0], rtol=2e-7, atol=0, equal_nan=True)
        if step:
            expected = choose_qparams(averages[0], averages[1], -8, 7, symmetric)
            assert torch.equal(torch.cat([scale, zero]), torch.cat(expected))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """A dense tensor in some order of memory, and its scale: one, or one for each index along an axis."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=0, max_size=4)))
    x = values(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    x = x.permute(draw(st.permutations(range(len(shape)))))
    axis = draw(st.sampled_from([None, *range(x.dim())]))
    if axis is None:
        return x, torch.full([1] * draw(st.integers(0, x.dim())), 0.1)
    trailing = x.dim() - axis - 1
    leading = draw(st.integers(0, axis))
    return x, torch.linspace(0.05, 0.5, x.shape[axis]).reshape([1] * leading + [-1] + [1] * trailing)


@pytest.mark.parametrize("form", SOME)
@given(
    case=cases(),
    grid=st.sampled_from(GRIDS),
    relu=st.booleans(),
    grad_scale=st.sampled_from([None, 0.5]),
    block=st.sampled_from([1, 3, 64]),
)
@settings(max_examples=75, deadline=None)
@example(case=(torch.tensor(0.3), torch.tensor(0.1)), grid=GRIDS[0], relu=True, grad_scale=0.5, block=1)
def test_every_shape_and_order_of_memory(
    form: str, case: tuple[Tensor, Tensor], grid: tuple[int, int, int], relu: bool, grad_scale: float | None,
    block: int,
) -> None:  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_KERNELS", FORMS[form])
        need(form)
        patch.setattr(blocks, "BLOCK", block)
        check(*case, grid, relu, grad_scale)


N = fast.SMALLEST
LARGE = [
    ("flat", (2, 16, 64, 65), ()),
    ("flat", (2, 16, 64, 65), (1, 1, 1, 1)),
    ("flat", (131101,), ()),  # a prime: no equal pieces
    ("rows", (2, 16, 64, 65), (16, 1, 1)),
    ("rows", (2, 16, 64, 65), (2, 1, 1, 1)),
    ("rows", (4096, 33), (4096, 1)),
    ("cols", (64, 64, 7, 7), (64, 1, 1)),  # runs of 49
    ("cols", (64, 2080), (2080,)),
    ("rows", (3, 65537), (3, 1)),  # long runs without divisors
]


@pytest.fixture(params=SOME)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which form takes large tensors."""
    monkeypatch.setenv("QAT_KERNELS", FORMS[request.param])
    need(request.param)
    return request.param


def scales(shape: tuple[int, ...]) -> Tensor:
    count = max(int(torch.Size(shape).numel()), 1)
    return torch.linspace(0.05, 0.2, count).reshape(shape)


@pytest.mark.parametrize(("layout", "shape", "scale"), LARGE)
@pytest.mark.parametrize("grad_scale", [None, 0.5])
def test_large_tensors(
    form: str, layout: str, shape: tuple[int, ...], scale: tuple[int, ...], grad_scale: float | None
) -> None:
    x = values(shape, torch.float32)
    assert layout_of(x.shape, x.stride(), torch.Size(scale)).form == layout
    check(x, scales(scale), GRIDS[2], relu=True, grad_scale=grad_scale, form=form)
    check(x, scales(scale), GRIDS[0], grad_scale=grad_scale, form=form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [(), (16, 1, 1)])
@pytest.mark.parametrize("grad_scale", [None, 1.0])
def test_channels_last_and_half_floats(
    form: str, dtype: torch.dtype, scale: tuple[int, ...], grad_scale: float | None
) -> None:
    x = values((2, 16, 64, 65), dtype).contiguous(memory_format=torch.channels_last)
    check(x, scales(scale), grad_scale=grad_scale, form=form)


@pytest.mark.parametrize("grad_scale", [None, 1.0])
def test_a_gradient_in_another_memory_order(form: str, grad_scale: float | None) -> None:
    x = values((2, 16, 64, 65), torch.float32)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )
    check(x, scales((16, 1, 1)), grad_scale=grad_scale, form=form, grad=grad)
    check(x, scales(()), grad_scale=grad_scale, form=form, grad=torch.ones(()).expand(x.shape))


def test_special_values(form: str) -> None:
    x = torch.zeros(N)
    x[:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.3])
    for relu, low in ((False, -8.0), (True, 0.0)):
        for grad_scale in (None, 1.0):
            scale = torch.tensor(0.5)
            y = fast.fake_quantize(x, scale, torch.tensor(0.0), -8, 7, relu=relu, grad_scale=grad_scale)
            assert y[0].isnan()
            assert y[1:4].tolist() == [3.5, 0.5 * low, 0.0 if relu else -0.5]


def test_sums_of_one_sign_stay_accurate(form: str) -> None:
    """A plain float32 sum over so many equal terms would be off by 1e-4."""
    for shape, scale in (((2**22,), ()), ((4, 2**20), (4, 1)), ((2**16, 64), (64,))):
        check(torch.full(shape, 3.0), scales(scale), grad_scale=1.0, form=form, grad=torch.full(shape, 1 / 3))


def test_the_second_derivative(form: str) -> None:
    x = values((N,), torch.float32)[13:].repeat(2).requires_grad_()
    for grad_scale in (None, 1.0):
        scale = torch.tensor(0.1, requires_grad=True)
        weight = torch.ones_like(x, requires_grad=True)
        y = fast.fake_quantize(x, scale, torch.tensor(0.0), -8, 7, grad_scale=grad_scale)
        (grad_x,) = torch.autograd.grad((y * weight).sum(), x, create_graph=True)
        (inside,) = torch.autograd.grad(grad_x.sum(), weight)
        q = torch.round(x.detach() / 0.1)
        assert torch.equal(inside, ((q >= -8) & (q <= 7)).float())


def train(shape: tuple[int, ...], scale: tuple[int, ...]) -> None:
    for grad_scale in (None, 1.0):
        x, s = values(shape, torch.float32).requires_grad_(), scales(scale).requires_grad_()
        fast.fake_quantize(x, s, torch.zeros(scale), -8, 7, grad_scale=grad_scale).sum().backward()


@pytest.mark.slow
def test_one_compilation_serves_every_extent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by the compiler: one of each kernel, and none for other extents."""
    monkeypatch.setenv("QAT_KERNELS", "inductor")
    need("compiled")
    kernels.compiled.cache_clear()
    before = counters["aot_autograd"]["total"]
    for shape, scale in (((N,), ()), ((131101,), ()), ((N // 16, 16), (N // 16, 1)), ((N // 16, 16), (16,))):
        train(shape, scale)
    first = counters["aot_autograd"]["total"] - before
    assert 0 < first <= len(kernels.KERNELS)
    others = [((n,), ()) for n in (2 * N + 64, 131111, 131113)]
    others += [((2, 3, 200, 200), (3, 1, 1)), ((256, 256, 3, 3), (256, 1, 1, 1)), ((512, 257), (257,))]
    for shape, scale in [(shape, scale) for _, shape, scale in LARGE] + others:
        train(shape, scale)
    assert counters["aot_autograd"]["total"] - before == first


PROCESS = """
import json, torch
from torch._dynamo.utils import counters
from qat.numerics import fast
torch.set_num_threads(1)
x = torch.linspace(-1, 1, fast.SMALLEST).requires_grad_()
fast.fake_quantize(x, torch.tensor(0.1), None, -8, 7).sum().backward()
print(json.dumps({name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("miss", "hit")}))
"""


@pytest.mark.slow
def test_another_process_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QAT_KERNELS", "inductor")
    need("compiled")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    counted, files = [], []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", PROCESS], env=environment, check=True, capture_output=True, text=True
        )
        counted.append(json.loads(run.stdout.splitlines()[-1]))
        files.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.so")})
    assert counted == [{"miss": 2, "hit": 0}, {"miss": 0, "hit": 2}]  # forward and backward
    assert files[0]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("x", "scale"),
    [
        (torch.zeros(0), torch.ones(())),
        (torch.zeros(N, dtype=torch.float64), torch.ones(())),
        (torch.zeros(2 * N)[::2], torch.ones(())),  # gaps
        (torch.zeros(1, N).expand(2, N), torch.ones(())),
        (torch.zeros(N), torch.ones(1, 1)),  # the result would have two dimensions
        (torch.zeros(512, 512), torch.ones(512, 512)),
        (torch.zeros(512, 512, 2), torch.ones(512, 512, 1)),
        (torch.zeros(N, 1), torch.ones(4)),
    ],
)
def test_what_only_the_composed_form_takes(x: Tensor, scale: Tensor) -> None:
    assert fast.plan(x, scale.shape, False) is None
    with pytest.raises(ValueError, match="no form takes"):
        fast.fake_quantize(x, scale, torch.zeros_like(scale), -8, 7)


def test_what_pays(form: str) -> None:
    def pays(elements: int, lsq: bool) -> bool:
        x = torch.zeros(elements)
        return fast.pays(x, fast.plan(x, (), lsq))

    if form == "native":
        assert pays(1, False)
        assert pays(fast.SMALLEST_EXACT, True)
        assert not pays(fast.SMALLEST_EXACT - 1, True)
        return
    compiled = form == "compiled"
    assert pays(fast.SMALLEST, False) is compiled
    assert not pays(fast.SMALLEST - 1, False)
    assert pays(fast.SMALLEST_LEARNED, True) is compiled
    assert not pays(fast.SMALLEST_LEARNED - 1, True)
    assert pays(fast.SMALLEST_BLOCKED, False)


def test_transforms_of_functions_are_refused_by_torch() -> None:
    """Not by a kernel that looks for memory where there is none."""
    x, scale = torch.randn(300, 40), torch.tensor(0.05)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: fake_quantize(x, scale, torch.tensor(0.0), -128, 127).square().sum())(x)
