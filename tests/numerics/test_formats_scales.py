"""Scales of blocks and of fitted formats, by hand and by numpy."""

import numpy as np
import pytest
import torch

from qat.numerics.formats import FORMATS, Grid, binary, ternary
from qat.numerics.rounding import ROUNDING

MX = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8"]
EMAX = {"mxfp8_e4m3": 8, "mxfp8_e5m2": 15, "mxfp6_e3m2": 4, "mxfp6_e2m3": 2, "mxfp4": 2, "mxint8": 0}
"""Table 2 and section 5.3 of MX v1.0: the exponent of each element's largest value."""


def grid_of(name: str, narrow: bool = False) -> Grid:
    form = FORMATS[name]
    assert form.grid is not None
    return form.grid(form.bits[0], True, narrow)


def scales(name: str, amax: list[list[float]]) -> list[list[float]]:
    rule = FORMATS[name].scales
    assert rule is not None
    result = rule(torch.tensor(amax), grid_of(name))
    assert result.dtype == torch.float32
    assert result.shape == (len(amax), len(amax[0]))
    return result.tolist()


# ---- MX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MX)
def test_mx_scale(name: str) -> None:
    emax = EMAX[name]
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    got = scales(name, [[1.0, below_one, 1.99, 2.0, 6.9, 1000.0], [0.3, 2.0**-100, 2.0**127, 3.4e38, 2.0**-126, 5e-3]])
    exponents = [[0, -1, 0, 1, 2, 9], [-2, -100, 127, 127, -126, -8]]
    assert got == [[2.0 ** max(e - emax, -127) for e in row] for row in exponents]


@pytest.mark.parametrize("name", MX)
def test_mx_scale_at_the_ends(name: str) -> None:
    assert scales(name, [[0.0, 1e-45, 1e-39, float("inf"), float("nan")]]) == [
        [1.0, 2.0**-127, 2.0**-127, 2.0 ** (127 - EMAX[name]), 1.0]
    ]


@pytest.mark.parametrize("name", MX)
def test_mx_scale_leaves_at_most_the_topmost_binade_to_saturate(name: str) -> None:
    amax = torch.exp(torch.linspace(-60, 60, 5000))
    ratio = amax / torch.tensor(scales(name, [amax.tolist()])[0])
    assert bool((ratio >= 2.0 ** EMAX[name]).all())
    assert bool((ratio < 2.0 ** (EMAX[name] + 1)).all())


def test_mxfp4_block_by_hand() -> None:
    block = [0.0, 0.1, -0.3, 0.9, 1.3, -1.7, 2.6, -3.4] + [0.0] * 24
    # amax 3.4 = 1.7 * 2**1 -> scale 2 ** (1 - 2) = 0.5; block / 0.5 = 0, .2, -.6, 1.8, 2.6, -3.4, 5.2, -6.8
    ((scale,),) = scales("mxfp4", [[3.4]])
    assert scale == 0.5
    elements = grid_of("mxfp4").snap(torch.tensor(block) / scale, ROUNDING["nearest"])
    assert elements[:8].tolist() == [0, 0, -0.5, 2, 3, -3, 6, -6]  # 5.2 is nearer to 6 than to 4; -6.8 saturates
    assert (elements * scale)[:8].tolist() == [0, 0, -0.25, 1, 1.5, -1.5, 3, -3]


def test_mxint8_is_an_integer_over_64() -> None:
    grid = grid_of("mxint8")
    assert grid.values().tolist() == [q / 64 for q in range(-128, 128)]
    assert grid_of("mxint8", narrow=True).values().tolist() == [q / 64 for q in range(-127, 128)]
    v = torch.tensor([1.999, -1.999, 0.5 / 64, 1.5 / 64, -0.3 / 64, 1.0])
    assert grid.snap(v, ROUNDING["nearest"]).tolist() == [127 / 64, -2, 0, 2 / 64, 0, 1]
    assert grid.snap(v, ROUNDING["ceil"]).tolist() == [127 / 64, -127 / 64, 1 / 64, 2 / 64, 0, 1]
    assert grid_of("mxint8", narrow=True).snap(v, ROUNDING["nearest"])[1] == -127 / 64


# ---- NVFP4 -----------------------------------------------------------------------------------------------------------


def test_nvfp4_scales_by_hand() -> None:
    # the largest magnitude is 2688 = 6 * 448: tensor scale 1, so block scales are e4m3(amax / 6)
    got = scales("nvfp4", [[2688.0, 6.0, 100.0], [0.75, 0.01, 0.0]])
    # 100 / 6 = 16.67 -> 16 (step 2: 16, 18); 0.75 / 6 = 0.125; 0.01 / 6 = 0.00167 -> 2**-9; 0 -> 2**-9
    assert got == [[448, 1, 16], [0.125, 2**-9, 2**-9]]
    # a quarter of everything: tensor scale 0.25
    assert scales("nvfp4", [[672.0, 1.5, 25.0]]) == [[112, 0.25, 4]]


def test_nvfp4_block_by_hand() -> None:
    block = torch.tensor([0.0, 1.0, -1.4, 2.4, 4.9, -5.1, 6.0, 3.5])
    ((first, scale),) = scales("nvfp4", [[2688.0, 6.0]])
    assert (first, scale) == (448.0, 1.0)
    assert grid_of("nvfp4").snap(block / scale, ROUNDING["nearest"]).tolist() == [0, 1, -1.5, 2, 4, -6, 6, 4]


def test_nvfp4_scales_are_finite_and_positive() -> None:
    assert scales("nvfp4", [[0.0, 0.0]]) == [[2**-9, 2**-9]]
    for largest in (1e-45, 1e-38, 1e-30, 1.0, 3.4e38, float("inf")):
        ((top, *rest),) = scales("nvfp4", [[largest, 0.0, float("nan"), largest * 1e-7]])
        for scale in (top, *rest):
            assert torch.finfo(torch.float32).tiny <= scale < float("inf")
        if 1e-30 <= largest < float("inf"):
            assert top * 6 == pytest.approx(largest, rel=1e-6)
    rule = FORMATS["nvfp4"].scales
    assert rule is not None
    assert rule(torch.empty(0, 4), grid_of("nvfp4")).shape == (0, 4)


def test_nvfp4_against_float8_of_torch() -> None:
    amax = torch.rand(8, 16) ** 4 * 37
    tensor_scale = amax.max() / 2688
    want = (amax / 6 / tensor_scale).to(torch.float8_e4m3fn).float().clamp(min=2**-9) * tensor_scale
    assert scales("nvfp4", amax.tolist()) == want.tolist()


# ---- fitted ----------------------------------------------------------------------------------------------------------


def test_binary_is_xnor_net() -> None:
    rows = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    q, scale = binary(torch.from_numpy(rows))
    assert np.array_equal(q.numpy(), np.where(rows >= 0, 1, -1))
    assert scale.numpy() == pytest.approx(np.abs(rows).mean(axis=1), rel=1e-6)
    # no other scale is closer
    for other in (0.98, 1.02):
        worse = ((rows - other * scale.numpy()[:, None] * q.numpy()) ** 2).sum(axis=1)
        assert (worse > ((rows - scale.numpy()[:, None] * q.numpy()) ** 2).sum(axis=1)).all()


def test_binary_of_zeros() -> None:
    q, scale = binary(torch.tensor([[0.0, -0.0, 0.0], [0.0, -3.0, 0.0]]))
    assert q.tolist() == [[1, 1, 1], [1, -1, 1]]
    assert scale.tolist() == [0, 1]


def test_ternary_is_twn() -> None:
    rows = np.random.default_rng(1).normal(size=(5, 40)).astype(np.float32)
    q, scale = ternary(torch.from_numpy(rows))
    for row, got, a in zip(rows, q.numpy(), scale.tolist(), strict=True):
        kept = np.abs(row) > 0.7 * np.abs(row).mean()
        assert 0 < kept.sum() < 40
        assert np.array_equal(got, np.sign(row) * kept)
        assert a == pytest.approx(np.abs(row[kept]).mean(), rel=1e-6)


def test_ternary_of_zeros_and_of_one_size() -> None:
    q, scale = ternary(torch.tensor([[0.0, 0.0], [2.0, -2.0]]))
    assert q.tolist() == [[0, 0], [1, -1]]
    assert scale.tolist() == [1, 2]


@pytest.mark.parametrize("fit", [binary, ternary])
def test_fitted_shapes(fit) -> None:
    for shape in [(3, 0), (0, 3)]:
        q, scale = fit(torch.empty(shape))
        assert q.shape == shape
        assert scale.shape == shape[:1]
        assert bool(scale.isfinite().all())
    q, scale = fit(torch.randn(2, 4, dtype=torch.bfloat16))
    assert q.dtype == scale.dtype == torch.float32


def test_fitted_values_lie_on_their_grids() -> None:
    rows = torch.randn(4, 50)
    for name, fit in [("binary", binary), ("ternary", ternary)]:
        q, _ = fit(rows)
        assert set(q.flatten().tolist()) == set(grid_of(name).values().tolist())


def test_signs_do_not_depend_on_the_rounding() -> None:
    v = torch.tensor([-2.0, -0.1, -0.0, 0.0, 0.1, 5.0])
    for rounding in ROUNDING.values():
        assert grid_of("binary").snap(v, rounding).tolist() == [-1, -1, 1, 1, 1, 1]
