"""Measured signal to quantization noise against theory: closed forms, published tables, and exact integrals.

The noise of a standard Gaussian on given levels is integrated cell by cell in closed form, in numpy, from the levels
alone: no rounding code of qat takes part. The integrals are themselves held to the published tables.
"""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qat.analysis.curves import measure, sqnr_db
from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.numerics.affine import int_range
from qat.numerics.fake_quantize import fake_quantize
from qat.numerics.formats import FORMATS
from qat.scheme import Granularity, TensorScheme

Floats = NDArray[np.float64]
erf = np.vectorize(math.erf)

MAX_UNIFORM = {
    3: (1.224, 0.1902), 4: (0.9957, 0.1188), 7: (0.6508, 0.04686), 8: (0.5860, 0.03744), 15: (0.3534, 0.01289),
    16: (0.3352, 0.01154), 31: (0.1932, 0.003688), 32: (0.1881, 0.003490),
}  # fmt: skip
"""Levels -> best step and its noise, evenly spaced. Max 1960, "Quantizing for Minimum Distortion", table 2."""
JAYANT_NOLL = {1: 4.40, 2: 9.25, 3: 14.27, 4: 19.38, 5: 24.57, 6: 29.83}
"""Bits -> dB of 2^b evenly spaced levels at their best step. Jayant, Noll 1984, "Digital Coding of Waveforms"."""
LLOYD_MAX = {2: 0.3634, 4: 0.1175, 8: 0.03454, 16: 0.009497}
"""Levels -> least noise of any levels. Max 1960, table 1."""
ACIQ_CLIPS = {2: 1.71, 3: 2.15, 4: 2.55, 5: 2.93, 6: 3.28, 7: 3.61, 8: 3.92}
"""Bits -> best clip, in standard deviations. Banner et al. 2019, "Post training 4-bit quantization", section 3."""


def gaussian_noise(levels: Floats) -> float:
    """Mean squared distance of N(0, 1) to the nearest of the ascending levels, from 0th to 2nd moments of each cell."""
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    below = (1 + erf(edges / math.sqrt(2))) / 2
    weighted = np.where(np.isfinite(edges), edges, 0.0) * density
    mass, first = np.diff(below), -np.diff(density)
    second = mass - np.diff(weighted)
    return float((second - 2 * levels * first + levels**2 * mass).sum())


def best_scale(levels: Floats) -> tuple[float, float]:
    """(scale, noise) of the best multiple of the levels: a dense search, then a finer one around the best."""
    low, high = 0.05 / np.abs(levels).max(), 12 / np.abs(levels).max()
    for _ in range(4):
        scales = np.linspace(low, high, 200)
        noise = [gaussian_noise(levels * s) for s in scales]
        i = int(np.argmin(noise))
        low, high = scales[max(i - 1, 0)], scales[min(i + 1, 199)]
    return float(scales[i]), float(noise[i])


def lloyd_max(entries: int) -> Floats:
    """The best levels of all, by Lloyd's iteration on the density: each level is the mean of its cell."""
    start = NormalDist(0, math.sqrt(3))  # where many levels end up (Panter & Dite 1951)
    levels = np.array([start.inv_cdf((i + 0.5) / entries) for i in range(entries)])
    for _ in range(1000):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        density = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
        levels = -np.diff(density) / np.diff((1 + erf(edges / math.sqrt(2))) / 2)
    return levels


def db(noise: float) -> float:
    return -10 * math.log10(noise)


def quantized(scheme: TensorScheme, x: torch.Tensor) -> FakeQuantize:
    """A quantizer of an activation, calibrated on `x` in 16 batches."""
    quantizer = FakeQuantize(scheme)
    for batch in x.chunk(16):
        quantizer.observe(batch)
    quantizer.set_range_from_observer()
    quantizer.mode = Mode.frozen
    return quantizer


@pytest.fixture(scope="module")
def gaussian() -> torch.Tensor:
    return torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))


# ---- the integrals are right -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "published"), MAX_UNIFORM.items())
def test_the_integral_gives_the_table_of_uniform_quantizers(count: int, published: tuple[float, float]) -> None:
    step, noise = best_scale(np.arange(count) - (count - 1) / 2)
    assert noise == pytest.approx(published[1], rel=2e-3)  # of 32 levels the table is 0.14 % too low
    assert step == pytest.approx(published[0], rel=2e-3)


@pytest.mark.parametrize(("bits", "published"), JAYANT_NOLL.items())
def test_the_integral_gives_the_decibels_of_uniform_quantizers(bits: int, published: float) -> None:
    _, noise = best_scale(np.arange(2**bits) - (2**bits - 1) / 2)
    assert db(noise) == pytest.approx(published, abs=0.011)


@pytest.mark.parametrize(("count", "published"), LLOYD_MAX.items())
def test_the_integral_gives_the_table_of_all_quantizers(count: int, published: float) -> None:
    assert gaussian_noise(lloyd_max(count)) == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(("bits", "published"), ACIQ_CLIPS.items())
def test_aciqs_own_formula_gives_its_clips(bits: int, published: float) -> None:
    """Noise of rounding alpha^2 / (3 * 4^bits), as if the density were flat in a cell, and of clipping to alpha."""
    alpha = np.linspace(1, 5, 40_001)
    tail = (1 + alpha**2) * (1 - erf(alpha / math.sqrt(2))) - math.sqrt(2 / math.pi) * alpha * np.exp(-(alpha**2) / 2)
    best = alpha[np.argmin(tail + alpha**2 / (3 * 4**bits))]
    assert best == pytest.approx(published, abs=0.011)


# ---- integers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_uniform_signal_has_six_decibels_a_bit(bits: int) -> None:
    """6.02 b dB (Bennett 1948): a uniform signal that fills the cells of all 2^b levels, its power about its mean."""
    low, high = int_range(bits, signed=False)
    x = torch.linspace(low - 0.5, high + 0.5, 2**18 + 1)[:-1] + (high - low + 1) / 2**19
    x_dq = fake_quantize(x * 0.125, torch.tensor(0.125), torch.tensor(0.0), low, high) * 8
    assert sqnr_db(x - x.mean(), x_dq - x.mean()) == pytest.approx(20 * math.log10(2) * bits, abs=0.01)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_uniform_signal_on_an_affine_grid_from_its_extremes(bits: int) -> None:
    """The outer levels lie on the ends of the signal, so 2^b - 1 steps divide it: 20 log10(2^b - 1) dB.

    Zero, which is a level, lies below the middle; a signal that begins there needs no rounded zero point.
    """
    x = torch.rand(400_000, generator=torch.Generator().manual_seed(1))
    quantizer = quantized(TensorScheme(bits=bits, symmetric=False, observer="minmax"), x)
    centred = x - x.mean()
    assert sqnr_db(centred, quantizer(x) - x.mean()) == pytest.approx(20 * math.log10(2**bits - 1), abs=0.1)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_gaussian_at_its_best_clip(gaussian: torch.Tensor, bits: int, narrow: bool) -> None:
    """`mse` reaches the optimum of the grid that it has.

    A narrow grid has Max's quantizer of 2^b - 1 levels. Of 2^b integers one has no partner: they lie between his of
    2^b - 1 levels and of 2^b, which straddle zero.
    """
    low, high = int_range(bits, signed=True, narrow=narrow)
    _, noise = best_scale(np.arange(low, high + 1).astype(float))
    quantizer = quantized(TensorScheme(bits=bits, observer="mse", narrow_range=narrow), gaussian)
    assert sqnr_db(gaussian, quantizer(gaussian)) == pytest.approx(db(noise), abs=0.1)
    assert db(gaussian_noise(np.arange(low, high + 1) * float(quantizer.scale))) == pytest.approx(db(noise), abs=0.02)
    if 2**bits in MAX_UNIFORM:
        fewer, all_ = (db(MAX_UNIFORM[count][1]) for count in (2**bits - 1, 2**bits))
        got = sqnr_db(gaussian, quantizer(gaussian))
        assert got == pytest.approx(fewer, abs=0.1) if narrow else fewer - 0.05 < got < all_


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_gaussian_on_levels_that_straddle_zero(gaussian: torch.Tensor, bits: int) -> None:
    """Half a step beside the integers, 2^b levels are the published quantizers', at their published steps."""
    count = 2**bits
    step = MAX_UNIFORM[count][0] if count in MAX_UNIFORM else best_scale(np.arange(count) - (count - 1) / 2)[0]
    low, high = int_range(bits, signed=True)
    half = step / 2
    got = fake_quantize(gaussian - half, torch.tensor(step), torch.tensor(0.0), low, high) + half
    assert len(got.unique()) == count
    for published in (JAYANT_NOLL.get(bits), db(MAX_UNIFORM[count][1]) if count in MAX_UNIFORM else None):
        assert published is None or sqnr_db(gaussian, got) == pytest.approx(published, abs=0.1)
    assert sqnr_db(gaussian, got) == pytest.approx(db(best_scale(np.arange(count) - (count - 1) / 2)[1]), abs=0.1)


@pytest.mark.parametrize(("bits", "published"), ACIQ_CLIPS.items())
def test_the_clip_is_near_aciqs(gaussian: torch.Tensor, bits: int, published: float) -> None:
    """From 4 bits on the density is nearly flat in a cell, as ACIQ assumes. Its outer levels lie half a step inside."""
    quantizer = quantized(TensorScheme(bits=bits, observer="mse", narrow_range=True), gaussian)
    clip = float(quantizer.scale) * (quantizer.quant_max + 0.5)
    if bits >= 4:
        assert clip == pytest.approx(published, rel=0.05)
    step = published / (quantizer.quant_max + 0.5)
    levels = np.arange(quantizer.quant_min, quantizer.quant_max + 1)
    loss = db(gaussian_noise(levels * float(quantizer.scale))) - db(gaussian_noise(levels * step))
    assert -0.02 < loss < {2: 0.4, 3: 0.1}.get(bits, 0.05)


# ---- other formats ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_codebook_reaches_lloyd_max(bits: int) -> None:
    scheme = TensorScheme(bits=bits, format="codebook", range="learned")
    assert measure(scheme, "weight").sqnr_db == pytest.approx(db(LLOYD_MAX[2**bits]), abs=0.1)


def test_binary_and_ternary_reach_the_best_two_and_three_levels() -> None:
    """Signs times the mean magnitude are Max's two levels; ternary weights' threshold, 0.7 mean |w|, costs little."""
    binary = TensorScheme(bits=1, format="binary", granularity=Granularity.channel, range="dynamic")
    ternary = TensorScheme(bits=2, format="ternary", granularity=Granularity.channel, range="dynamic")
    assert measure(binary, "weight").sqnr_db == pytest.approx(db(LLOYD_MAX[2]), abs=0.05)
    assert measure(ternary, "weight").sqnr_db == pytest.approx(db(gaussian_noise(lloyd_max(3))), abs=0.05)


FLOATS = [("e2m1", 4), ("e2m3", 6), ("e3m2", 6), ("e4m3fn", 8), ("e5m2", 8)]
GRIDS = [*FLOATS, *((name, bits) for name in ("pow2", "apot") for bits in (3, 4, 5))]


@pytest.mark.parametrize(("name", "bits"), GRIDS)
def test_every_format_reaches_the_optimum_of_its_levels(gaussian: torch.Tensor, name: str, bits: int) -> None:
    levels = FORMATS[name].grid(bits, True, False).values().double().numpy()  # type: ignore[misc]
    quantizer = quantized(TensorScheme(bits=bits, format=name, observer="mse"), gaussian)
    got = sqnr_db(gaussian, quantizer(gaussian))
    # the noise on its own levels, exactly; and the optimum over all scales, as near as a clip within the extremes gets
    assert got == pytest.approx(db(gaussian_noise(levels * float(quantizer.scale))), abs=0.02)
    assert got == pytest.approx(db(best_scale(levels)[1]), abs=0.1)


def test_the_order_of_the_formats_of_four_bits(gaussian: torch.Tensor) -> None:
    """At their best clips, by the integral and as measured: any levels, integers, sums of powers, float, powers of two.

    One scale a tensor, and no outliers: the fewer values share a scale, the better for floats (nvfp4 and mxfp4).
    """
    best = {
        name: db(best_scale(FORMATS[name].grid(4, True, False).values().double().numpy())[1])  # type: ignore[misc]
        for name in ("apot", "e2m1", "int", "pow2")
    }
    measured = {}
    for name in best:
        quantizer = quantized(TensorScheme(bits=4, format=name, observer="mse"), gaussian)
        measured[name] = sqnr_db(gaussian, quantizer(gaussian))
    for found in (best, measured):
        assert sorted(found, key=found.__getitem__, reverse=True) == ["int", "apot", "e2m1", "pow2"]
    assert best["int"] < db(LLOYD_MAX[16])
