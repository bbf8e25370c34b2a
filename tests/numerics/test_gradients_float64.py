"""Every entry of GRADIENTS, of values and of scales, against float64 autograd with the published slope put in.

The oracle knows nothing of the rule under test, `dL/dscale = sum g (q - slope v)`: it differentiates
`y = s (q + slope (v - v.detach()))`, `v = x / s`, on levels that are written down here.
"""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.numerics import gradients
from qat.numerics.fake_quantize import Staircase, fake_quantize_by
from qat.numerics.formats import FORMATS
from qat.numerics.gradients import GRADIENTS
from qat.scheme import Granularity, TensorScheme

SCALE = 0.137
E4M3FN = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
APOT = [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]  # Li et al. 2020, figure 1: 3 bits of magnitude
LEVELS = {  # in units of the scale, zero point taken away
    "int4": np.arange(-8, 8),
    "affine int4": np.arange(0, 16) - 5,
    "apot": np.array([*(-m for m in APOT[:0:-1]), *APOT]),
    "e4m3fn": np.unique(E4M3FN[np.isfinite(E4M3FN)]),
}


def inputs(levels: np.ndarray, n: int = 600) -> tuple[Tensor, Tensor]:
    """Values in cells, away from levels and ties, and beyond both ends; gradients of both signs."""
    rng = np.random.default_rng(0)
    cell = rng.integers(0, len(levels) - 1, n)
    position = rng.choice([0.05, 0.55], n) + 0.4 * rng.random(n)
    v = levels[cell] + position * np.diff(levels)[cell]
    reach = levels[-1] - levels[0]
    v = np.concatenate([v, levels[0] - reach * (0.1 + rng.random(60)), levels[-1] + reach * (0.1 + rng.random(60))])
    return torch.from_numpy(v * SCALE).float(), torch.from_numpy(rng.standard_normal(len(v))).float()


def slope(name: str, v: Tensor, q: Tensor, low: Tensor, high: Tensor, g: Tensor, strength: float) -> Tensor:
    """dq/dv by the published formula, of values inside the range."""
    if name == "ewgs":  # Lee et al. 2021, equation 4, in steps
        return 1 + strength * g.sign() * (v - q) / (high - low)
    if name == "dsq":  # Gong et al. 2019, equations 3, 4 and 6
        u = ((v - low) / (high - low) - 0.5).requires_grad_()
        piece = (torch.tanh(strength * u) / math.tanh(strength / 2) + 1) / 2
        return torch.autograd.grad(piece.sum(), u)[0]
    return torch.ones_like(v)


def oracle(
    name: str, x: Tensor, g: Tensor, levels: np.ndarray, strength: float, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Result, gradients of values and scale, and what the latter sums in magnitude, float64."""
    x, g, table = x.double().requires_grad_(), g.double(), torch.from_numpy(levels).double()
    scale = torch.tensor(SCALE).double().requires_grad_()
    v = x / scale
    fixed = v.detach()
    after = torch.searchsorted(table, fixed).clamp(1, len(table) - 1)
    low, high = table[after - 1], table[after]
    inside = (fixed >= table[0]) & (fixed <= table[-1])
    q = torch.where(high - fixed < fixed - low, high, low)
    if name == "noise":
        q = torch.where(inside, fixed + (noise.double() - 0.5) * (high - low), q).clamp(table[0], table[-1])
    of_v = torch.where(inside | (name == "ste"), slope(name, fixed, q, low, high, g, strength), 0.0)
    y = scale * (q + of_v * (v - fixed))
    y.backward(g)
    return y.detach(), x.grad, scale.grad, (g * (q.abs() + (of_v * fixed).abs())).abs().sum()


@pytest.mark.parametrize("grid", LEVELS)
@pytest.mark.parametrize(
    ("name", "strength"),
    [(name, 1.0) for name in GRADIENTS if name not in ("ewgs", "dsq")]
    + [("ewgs", 0.3), ("dsq", 0.5), ("dsq", 6.0)],
)  # fmt: skip
def test_values_and_scale(name: str, strength: float, grid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    levels, zero_point = LEVELS[grid], 5.0 if grid == "affine int4" else 0.0
    x, g = inputs(levels)
    noise = torch.rand(x.shape)
    monkeypatch.setattr(gradients, "uniform", lambda v: noise)
    staircase = Staircase(
        quant_min=levels[0] + zero_point,
        quant_max=levels[-1] + zero_point,
        snap=FORMATS[grid].grid(8 if grid == "e4m3fn" else 4, True, False).snap if grid in FORMATS else None,
        gradient=name,
        strength=strength,
        noise=name == "noise",
    )
    leaf, scale = x.clone().requires_grad_(), torch.tensor(SCALE, requires_grad=True)
    y = fake_quantize_by(leaf, scale, torch.tensor(zero_point), staircase)
    y.backward(g)
    expected, grad_x, grad_scale, terms = oracle(name, x, g, levels, strength, noise)
    torch.testing.assert_close(y.detach().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaf.grad.double(), grad_x, rtol=1e-4, atol=1e-4)
    assert abs(float(scale.grad) - float(grad_scale)) <= 1e-5 * float(terms)
    assert abs(float(grad_scale)) > 1e-3 * float(terms)  # it is not all cancelled


# ------------------------------------------------------------------------------------------------- learned ranges


def trained(x: Tensor, g: Tensor, start: float, **fields: object) -> FakeQuantize:
    """A quantizer with gradients in what it learns, on part of the range of `x`, so that some is clipped."""
    scheme = TensorScheme(bits=4, **fields)  # type: ignore[arg-type]
    shape = x.shape if fields["range"] != "pact" else None
    node = FakeQuantize(scheme, shape, activation=x.shape)
    scale = torch.full(node.scale_shape, start)
    if node.scale_shape:
        scale = scale * torch.linspace(1, 2, len(scale))
    with torch.no_grad():
        node.range.set(scale, torch.full_like(scale, 0.0 if scheme.symmetric else 6.0))
    node.mode = Mode.quantize
    node(x).backward(g)
    return node


@pytest.mark.parametrize("name", ["lsq", "lsq_plus", "pact", "tqt"])
def test_each_channel_learns_as_a_tensor_of_its_own(name: str) -> None:
    x, g = torch.randn(3, 50), torch.randn(3, 50)
    fields = {"range": name, "symmetric": name != "lsq_plus"}
    node = trained(x, g, 0.15, granularity=Granularity.channel, axis=0, **fields)
    starts = [0.15 * factor for factor in (1.0, 1.5, 2.0)]
    apart = [trained(x[c : c + 1], g[c : c + 1], starts[c], **fields) for c in range(3)]
    for parameter, values in node.range.named_parameters():
        assert values.shape == (3,)
        expected = torch.stack([dict(part.range.named_parameters())[parameter].grad for part in apart])
        torch.testing.assert_close(values.grad, expected, rtol=1e-5, atol=1e-6)
        assert (expected != 0).all()


def test_lsq_plus_scales_both_gradients() -> None:
    """Bhalgat et al. 2020, equations 6 and 8, times Esser et al. 2020, section 2.2: 1 / sqrt(N Q_P)."""
    x, g = torch.randn(4, 90), torch.randn(4, 90)
    node = trained(x, g, 0.15, range="lsq_plus", symmetric=False)
    v = x.double() / 0.15 + 6
    low, high = v.round() < 0, v.round() > 15
    of_scale = torch.where(low, 0, torch.where(high, 15, v.round() - v))
    assert 10 < (low | high).sum() < 300
    factor = 1 / math.sqrt(360 * 15)
    assert float(node.range.offset.grad) == pytest.approx(factor * float((g * (low | high)).sum()), rel=1e-4)
    assert float(node.range.scale.grad) == pytest.approx(factor * float((g * of_scale).sum()), rel=1e-4)


def test_pact_is_pulled_down_by_its_l2_term() -> None:
    """Choi et al. 2018, section 3.2: the loss has `decay alpha ** 2`, whose gradient is `2 decay alpha`."""
    x, g = torch.randn(4, 90), torch.randn(4, 90)
    without, pulled = (trained(x, g, 0.15, range="pact", range_decay=decay) for decay in (0.0, 0.03))
    alpha = float(without.range.alpha)
    assert alpha == pytest.approx(0.15 * 7)
    difference = float(pulled.range.alpha.grad - without.range.alpha.grad)
    assert difference == pytest.approx(2 * 0.03 * alpha, rel=1e-4)
    assert float(without.range.alpha.grad) != 0
