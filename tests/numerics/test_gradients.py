"""Every entry of GRADIENTS, and every learned range's gradient, against its paper's formula in float64.

The formulas are written out here from the papers, value by value, not by the code under test.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from qat.numerics.fake_quantize import Staircase, fake_quantize, fake_quantize_by
from qat.numerics.formats import FORMATS
from qat.numerics.gradients import GRADIENTS
from qat.ranges import RANGES, RangeOptions

SCALE = 0.137
GRIDS = [(-8, 7, 0), (0, 15, 5), (-127, 127, 0)]


def values(grid: tuple[int, int, int], n: int = 4000, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs on and beyond the grid, away from ties and clip points; gradients of both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high, zero = grid
    v = (torch.rand(n, generator=generator) * 1.6 - 0.3) * (high - low) + low - zero
    v = torch.where((v - v.floor() - 0.5).abs() < 1e-2, v + 0.05, v)
    v = torch.where((v - v.round()).abs() < 1e-2, v + 0.03, v)
    return v * SCALE, torch.randn(n, generator=generator)


def slopes(name: str, x: Tensor, g: Tensor, grid: tuple[int, int, int], strength: float) -> np.ndarray:
    """dL/dx by the published formula, float64."""
    low, high, zero = grid
    result = []
    for value, grad in zip(x.double().tolist(), g.double().tolist(), strict=True):
        v = value / SCALE
        integer = round(v) + zero
        inside = low <= integer <= high
        if name == "ste":  # Bengio et al. 2013
            result.append(grad)
        elif not inside:
            result.append(0.0)
        elif name == "ewgs":  # Lee et al. 2021, equation 4
            result.append(grad * (1 + strength * np.sign(grad) * (v - round(v))))
        elif name == "dsq":  # Gong et al. 2019, equations 3 and 4: phi(x) = s tanh(k (x - m)), s = 1 / tanh(k / 2)
            v = min(max(v, low - zero), high - zero)  # beyond the last level a cell ends with it
            u, h = v - math.floor(v) - 0.5, 1e-6
            phi = [math.tanh(strength * (u + d)) / math.tanh(strength / 2) for d in (h, -h)]
            result.append(grad * (phi[0] - phi[1]) / (2 * h) / 2)  # equation 6: (phi + 1) / 2 in each cell
        else:  # clipped_ste: Krishnamoorthi 2018, equation 12; lsq: Esser et al. 2020, equation 5
            result.append(grad)
    return np.array(result)


def backward(x: Tensor, g: Tensor, grid: tuple[int, int, int], scale: Tensor | None = None, **options: object):  # type: ignore[no-untyped-def]
    leaf = x.clone().requires_grad_()
    scale = torch.tensor(SCALE) if scale is None else scale
    staircase = Staircase(quant_min=grid[0], quant_max=grid[1], **options)  # type: ignore[arg-type]
    y = fake_quantize_by(leaf, scale, torch.tensor(float(grid[2])), staircase)
    y.backward(g)
    return y.detach(), leaf.grad


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("strength", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("name", [name for name in GRADIENTS if name != "noise"])
def test_gradient_is_the_published_formula(name: str, strength: float, grid: tuple[int, int, int]) -> None:
    x, g = values(grid)
    _, got = backward(x, g, grid, gradient=name, strength=strength)
    expected = slopes(name, x, g, grid, strength)
    assert np.abs(expected).max() > 0
    if name != "ste":
        assert (expected == 0).mean() > 0.05
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", list(GRADIENTS))
def test_forward_is_the_same_staircase(name: str, grid: tuple[int, int, int]) -> None:
    x, g = values(grid)
    y, _ = backward(x, g, grid, gradient=name)
    reference = fake_quantize(x, torch.tensor(SCALE), torch.tensor(float(grid[2])), *grid[:2])
    assert torch.allclose(y, reference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["clipped_ste", "lsq"])
@pytest.mark.parametrize("grid", GRIDS)
def test_clipped_ste_and_lsq_equal_aten(name: str, grid: tuple[int, int, int]) -> None:
    x, g = values(grid)
    scale = torch.tensor(SCALE, requires_grad=True)
    _, got = backward(x, g, grid, scale=scale, gradient=name)
    leaf, aten_scale = x.clone().requires_grad_(), torch.tensor([SCALE], requires_grad=True)
    zero = torch.tensor([float(grid[2])])
    torch._fake_quantize_learnable_per_tensor_affine(leaf, aten_scale, zero, *grid[:2], 1.0).backward(g)
    assert torch.equal(got, leaf.grad)
    assert scale.grad.item() == pytest.approx(aten_scale.grad.item(), rel=1e-4)


def test_dsq_tends_to_ste_and_to_the_staircase() -> None:
    """A low temperature is the identity; a high one has its slope at the steps; the mean slope of a cell is 1."""
    x = (torch.arange(0, 1, 1e-4) + 3e-5) * SCALE
    for k in (0.01, 1.0, 10.0, 50.0):
        _, slope = backward(x, torch.ones_like(x), (-8, 7, 0), gradient="dsq", strength=k)
        assert slope.mean().item() == pytest.approx(1.0, rel=1e-3)
    assert slope[4900:5100].min() > 10  # k = 50: steep where rounding steps,
    assert slope[:2000].max() < 1e-3  # flat on the levels
    _, slope = backward(x, torch.ones_like(x), (-8, 7, 0), gradient="dsq", strength=0.01)
    assert torch.allclose(slope, torch.ones_like(slope), atol=1e-3)


def test_strength_moves_geometrically() -> None:
    gradient = GRADIENTS["dsq"]
    strengths = [float(gradient.strength_at(torch.tensor(p), (1.0, 16.0))) for p in (-1.0, 0.0, 0.25, 0.5, 1.0, 2.0)]
    assert strengths == pytest.approx([1, 1, 2, 4, 16, 16])
    assert gradient.strength_at(torch.tensor(0.0)) == gradient.strengths[0]
    assert gradient.strength_at(torch.tensor(1.0)) == gradient.strengths[1]
    assert GRADIENTS["ewgs"].strength_at(torch.tensor(0.3)) == pytest.approx(0.02)


def test_noise_is_uniform_over_a_step_and_clipped() -> None:
    x = torch.full((100_000,), 0.3 * SCALE)
    torch.manual_seed(0)
    y, grad = backward(x, torch.ones_like(x), (-8, 7, 0), gradient="noise", noise=True)
    error = (y - x) / SCALE
    assert error.min() >= -0.5001
    assert error.max() <= 0.5001
    assert error.mean().item() == pytest.approx(0, abs=0.005)
    assert error.var().item() == pytest.approx(1 / 12, rel=0.02)  # Widrow 1956: the variance of rounding
    assert (grad == 1).all()
    far = torch.full((100,), 100.0)
    y, grad = backward(far, torch.ones_like(far), (-8, 7, 0), gradient="noise", noise=True)
    assert (y == 7 * SCALE).all()
    assert (grad == 0).all()


@pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.grid and not f.fitted and name != "int"])
def test_on_every_grid_clipped_ste_passes_inside_and_the_scale_learns_by_the_quotient_rule(name: str) -> None:
    """d(s q(x / s))/ds = q - v where v passes, q where it is clipped: checked value by value in float64."""
    grid = FORMATS[name].grid(4 if 4 in FORMATS[name].bits else FORMATS[name].bits[0], True, False)
    generator = torch.Generator().manual_seed(1)
    v = (torch.rand(2000, generator=generator) * 3 - 1.5) * min(grid.high, 1e6)
    g = torch.rand(2000, generator=generator)
    x, scale = (v * SCALE).requires_grad_(), torch.tensor(SCALE, requires_grad=True)
    staircase = Staircase(quant_min=grid.low, quant_max=grid.high, snap=grid.snap)
    fake_quantize_by(x, scale, torch.zeros(()), staircase).backward(g)
    quotient = x.detach() / SCALE
    q = grid.snap(quotient, torch.round).double()
    inside = (quotient >= grid.low) & (quotient <= grid.high)
    assert torch.equal(x.grad, torch.where(inside, g, 0.0))
    of_scale = torch.where(inside, q - quotient.double(), q)
    assert scale.grad.item() == pytest.approx(float((g.double() * of_scale).sum()), rel=1e-4)
    if name not in ("bf16", "tf32", "mxfp8_e5m2"):
        assert 0.05 < inside.float().mean() < 0.95


# ------------------------------------------------------------------------------------------------- learned ranges


def learned(name: str, low: int, high: int, start: float = SCALE, zero: float = 0.0):  # type: ignore[no-untyped-def]
    rule = RANGES[name](RangeOptions(shape=(), quant_min=low, quant_max=high))
    with torch.no_grad():
        rule.set(torch.tensor(start), torch.tensor(zero))
    return rule


def train(rule, x: Tensor, g: Tensor, low: int, high: int) -> Tensor:  # type: ignore[no-untyped-def]
    scale, zero_point = rule.qparams()
    staircase = Staircase(quant_min=low, quant_max=high, residual=rule.residual)
    y = fake_quantize_by(x, scale, zero_point, staircase)
    y.backward(g)
    return y.detach()


def reference(f: Callable[[float, float], float], x: Tensor, g: Tensor) -> float:
    return float(sum(f(v, grad) for v, grad in zip(x.double().tolist(), g.double().tolist(), strict=True)))


def test_lsq_plus_gradients() -> None:
    """Bhalgat et al. 2020, equations 6 and 8: ds = round - v inside, n or p outside; dbeta = 0 inside, 1 outside."""
    low, high, zero = 0, 15, 5
    x, g = values((low, high, zero))
    rule = learned("lsq_plus", low, high, SCALE, zero)
    y = train(rule, x, g, low, high)
    assert torch.allclose(y, fake_quantize(x, torch.tensor(SCALE), torch.tensor(float(zero)), low, high), atol=1e-6)
    beta = -zero * SCALE

    def of_scale(value: float, grad: float) -> float:
        v = (value - beta) / SCALE
        return grad * (low if v < low - 0.5 else high if v > high + 0.5 else round(v) - v)

    def of_beta(value: float, grad: float) -> float:
        v = (value - beta) / SCALE
        return grad * float(v < low - 0.5 or v > high + 0.5)

    assert rule.offset.item() == pytest.approx(beta)
    assert rule.offset.grad.item() == pytest.approx(reference(of_beta, x, g), rel=1e-4)
    assert rule.scale.grad.item() == pytest.approx(reference(of_scale, x, g), rel=1e-3)


def test_lsq_plus_keeps_zero_exact_and_in_range() -> None:
    rule = learned("lsq_plus", 0, 15, 0.1, 5.0)
    for offset, zero in ((-0.54, 5), (-0.56, 6), (3.0, 0), (-99.0, 15)):
        rule.offset.data.fill_(offset)
        assert rule.qparams()[1].item() == zero
    (rule.qparams()[1].sum()).backward()
    assert rule.offset.grad.abs() > 0  # it can come back from outside


def test_pact_gradient() -> None:
    """Choi et al. 2018, equation 3: dy/dalpha = 1 for x >= alpha, else 0."""
    low, high = 0, 15
    x, g = values((low, high, 0))
    rule = learned("pact", low, high)
    train(rule, x, g, low, high)
    alpha = high * SCALE
    assert rule.alpha.item() == pytest.approx(alpha)
    expected = reference(lambda v, grad: grad * (v / SCALE > high + 0.5), x, g)
    assert rule.alpha.grad.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("low", "high", "divisor"), [(-8, 7, 8), (0, 15, 16), (-128, 127, 128)])
def test_tqt_gradient(low: int, high: int, divisor: int) -> None:
    """Jain et al. 2020, equation 7: ds/dlog2 t = s ln 2, times round(v) - v inside, n or p outside."""
    x, g = values((low, high, 0))
    rule = learned("tqt", low, high)
    threshold = rule.log2_threshold.item()
    assert 2**threshold == pytest.approx(SCALE * high, rel=1e-5)
    scale = 2.0 ** math.ceil(threshold) / divisor
    assert rule.qparams()[0].item() == scale  # a power of two
    train(rule, x, g, low, high)

    def of_threshold(value: float, grad: float) -> float:
        v = value / scale
        return grad * scale * math.log(2) * (low if round(v) < low else high if round(v) > high else round(v) - v)

    assert rule.log2_threshold.grad.item() == pytest.approx(reference(of_threshold, x, g), rel=1e-3, abs=1e-4)


def test_dorefa_weights_and_activations() -> None:
    """Zhou et al. 2016, equations 5, 9 and 11."""
    bits, n = 3, 7
    w = torch.randn(4, 50)
    squashed = np.tanh(w.double().numpy())
    r = squashed / (2 * np.abs(squashed).max(axis=1, keepdims=True)) + 0.5
    expected = 2 * np.round(n * r) / n - 1
    grid = RANGES["dorefa"].weight_grid(bits)
    rule = RANGES["dorefa"](RangeOptions(shape=(4,), quant_min=grid.low, quant_max=grid.high))
    scale, _ = rule.qparams()
    got = grid.snap(rule.transform(w) / scale.unsqueeze(1), torch.round) * scale.unsqueeze(1)
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-6)
    assert len(np.unique(expected)) == 2**bits == len(grid.values())
    assert not (expected == 0).any()
    activation = RANGES["dorefa"](RangeOptions(shape=(), quant_min=0, quant_max=n))
    x = torch.tensor([-0.3, 0.0, 0.49, 0.51, 1.0, 7.0])
    y = fake_quantize(x, *activation.qparams(), 0, n)
    np.testing.assert_allclose(y.numpy(), np.round(np.clip(x.numpy(), 0, 1) * n) / n, atol=1e-6)


@pytest.mark.parametrize("name", [name for name, rule in RANGES.items() if rule.learned])
def test_scales_stay_positive_whatever_the_optimizer_does(name: str) -> None:
    rule = learned(name, 0, 15, 0.1, 3.0 if name == "lsq_plus" else 0.0)
    for value in (0.0, -0.5, 1e-45, -1e30, 1e30):
        for parameter in rule.parameters():
            parameter.data.fill_(value)
        scale, zero_point = rule.qparams()
        assert scale > 0, (name, value)
        assert torch.isfinite(scale)
        assert 0 <= zero_point <= 15


@pytest.mark.parametrize("name", list(RANGES))
def test_a_range_starts_where_it_is_set(name: str) -> None:
    rule = learned(name, 0, 15, 0.25, 3.0 if name == "lsq_plus" else 0.0)
    assert rule.calibrated
    if name in ("dynamic", "dorefa"):
        return
    assert not RANGES[name](RangeOptions(shape=(), quant_min=0, quant_max=15)).calibrated
    scale = rule.qparams()[0].item()
    assert scale == 0.25  # a power of two, so that TQT's is itself: 0.25 * 15 = 3.75, up to 4, over 16
