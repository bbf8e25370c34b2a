"""What holds for every format; integers and tables by hand."""

import copy
import math
import pickle
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.numerics.formats import FORMATS, Grid
from qat.numerics.rounding import ROUNDING

NAMES = [
    *("int", "e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "bf16", "fp16", "tf32", "mxfp8_e4m3", "mxfp8_e5m2"),
    *("mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8", "nvfp4", "pow2", "apot", "binary", "ternary", "codebook"),
    "product",
]
CASES = [
    (name, bits, signed, narrow)
    for name, form in FORMATS.items()
    if form.grid is not None
    for bits in form.bits
    for signed in (True, False)
    for narrow in (False, True)
    if (name, bits, signed, narrow) != ("int", 1, True, True)
]
LISTED = [case for case in CASES if case[1] <= 8]
ROUNDS_TO_VALUES = sorted(set(ROUNDING) - {"logarithmic"})
"""Roundings that leave every value of a grid where it is; `logarithmic` leaves powers of two."""


def grid_of(name: str, bits: int, signed: bool = True, narrow: bool = False) -> Grid:
    grid = FORMATS[name].grid
    assert grid is not None
    return grid(bits, signed, narrow)


def magnitudes(name: str, bits: int) -> list[float]:
    """Values of the unsigned grid."""
    return grid_of(name, bits, signed=False).values().tolist()


def test_the_table() -> None:
    assert list(FORMATS) == NAMES
    assert {name for name, form in FORMATS.items() if form.unsigned} == {"int", "pow2", "apot"}
    assert {name for name, form in FORMATS.items() if form.unit_scale} == {"bf16", "fp16", "tf32"}
    assert {name: form.fitted for name, form in FORMATS.items() if form.fitted} == {
        name: name for name in ("binary", "ternary", "codebook", "product")
    }
    assert {name for name, form in FORMATS.items() if form.grid is None} == {"codebook", "product"}
    for name, form in FORMATS.items():
        assert form.block == (32 if name.startswith("mx") else 16 if name == "nvfp4" else None)
        assert (form.scales is None) == (form.block is None)
        assert form.description
    widths = {name: form.bits for name, form in FORMATS.items()}
    assert widths["int"] == tuple(range(1, 17))
    assert widths["pow2"] == widths["apot"] == tuple(range(2, 9))
    assert widths["codebook"] == widths["product"] == tuple(range(1, 9))
    single = {name: bits[0] for name, bits in widths.items() if len(bits) == 1}
    elements = {"e4m3fn": 8, "e5m2": 8, "e3m2": 6, "e2m3": 6, "e2m1": 4, "bf16": 16, "fp16": 16, "tf32": 19}
    blocks = {"mxfp8_e4m3": 8, "mxfp8_e5m2": 8, "mxfp6_e3m2": 6, "mxfp6_e2m3": 6, "mxfp4": 4, "mxint8": 8, "nvfp4": 4}
    assert single == elements | blocks | {"binary": 1, "ternary": 2}


# ---- every grid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits", "signed", "narrow"), CASES)
def test_every_value_is_a_fixed_point(name: str, bits: int, signed: bool, narrow: bool) -> None:
    grid = grid_of(name, bits, signed, narrow)
    assert grid.bits == bits
    if bits > 16:
        return
    values = grid.values()
    assert values.dtype == torch.float32
    assert 2 <= len(values) <= 2**bits
    assert bool((values.diff() > 0).all())
    assert (float(values[0]), float(values[-1])) == (grid.low, grid.high)
    for mode in ROUNDS_TO_VALUES:
        assert torch.equal(grid.snap(values, ROUNDING[mode]), values), mode


@pytest.mark.parametrize(("name", "bits", "signed", "narrow"), CASES)
def test_edges(name: str, bits: int, signed: bool, narrow: bool) -> None:
    grid = grid_of(name, bits, signed, narrow)
    inf = float("inf")
    for mode, rounding in ROUNDING.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch.bucketize warns of layouts that it copies
            got = grid.snap(torch.tensor([inf, 3.4e38, -inf, -3.4e38, math.nan]), rounding)
            assert float(got[0]) == grid.high
            assert float(got[2]) == grid.low
            if not FORMATS[name].unit_scale:  # 3.4e38 is no value of tf32, but inside
                assert (float(got[1]), float(got[3])) == (grid.high, grid.low)
            assert torch.isnan(got).tolist() == [False] * 4 + [True]
            tiny = grid.snap(torch.tensor([0.0, -0.0, 1e-45]), rounding)
            if name != "binary":
                assert tiny[:2].tolist() == [0.0, 0.0], mode
            smallest = 1.0 if name == "binary" else float(grid_of_positive(grid))
            assert float(tiny[2]) == (1.0 if name == "binary" else smallest if mode == "ceil" and grid.high else 0.0)
            v = torch.linspace(-3, 3, 12).reshape(3, 4)
            if mode != "stochastic":
                assert torch.equal(grid.snap(v.t(), rounding), grid.snap(v, rounding).t())
                assert torch.equal(grid.snap(v[:, ::2], rounding), grid.snap(v, rounding)[:, ::2])
            assert torch.equal(grid.snap(v[0, 0], ROUNDING["nearest"]), grid.snap(v, ROUNDING["nearest"])[0, 0])
            assert grid.snap(torch.empty(0, 3), rounding).shape == (0, 3)
            assert got.dtype == grid.snap(v, rounding).dtype == torch.float32


def grid_of_positive(grid: Grid) -> float:
    """The smallest positive value, found by rounding up."""
    if grid.high == 0:
        return 0.0
    if grid.bits > 16:
        return 2.0**-136
    values = grid.values()
    return float(values[values > 0][0])


@pytest.mark.parametrize(("name", "bits", "signed", "narrow"), CASES)
def test_snap_does_not_write_to_its_input(name: str, bits: int, signed: bool, narrow: bool) -> None:
    v = torch.tensor([-1e9, -0.3, 0.7, 1e9])
    kept = v.clone()
    for rounding in [*ROUNDING.values(), lambda x: x]:
        grid_of(name, bits, signed, narrow).snap(v, rounding)
        assert torch.equal(v, kept)


def test_grids_are_copied_and_pickled() -> None:
    v = torch.linspace(-2, 2, 101)
    for case in CASES:
        grid = grid_of(*case)
        for other in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))):
            assert torch.equal(other.snap(v, torch.floor), grid.snap(v, torch.floor))


@given(st.sampled_from(CASES), st.sampled_from(sorted(ROUNDING)), st.data())
def test_snap_is_idempotent_and_monotone(case: tuple, mode: str, data: st.DataObject) -> None:
    grid = grid_of(*case)
    numbers = st.floats(-2, 2, width=32) | st.floats(-1024, 1024, width=32) | st.floats(width=32, allow_nan=False)
    v = torch.tensor(sorted(data.draw(st.lists(numbers, min_size=2))))
    snapped = grid.snap(v, ROUNDING[mode])
    assert torch.equal(grid.snap(snapped, ROUNDING[mode]), snapped) or mode == "logarithmic"
    assert bool((snapped.diff() >= 0).all()) or mode == "stochastic"
    assert bool(((snapped >= grid.low) & (snapped <= grid.high)).all())
    if grid.bits <= 8:
        assert set(snapped.tolist()) <= set(grid.values().tolist())


SYMMETRIC = [case for case in CASES if grid_of(*case).low == -grid_of(*case).high]


@given(st.sampled_from(SYMMETRIC), st.lists(st.floats(width=32, allow_nan=False).filter(bool), min_size=1))
def test_symmetric_under_negation(case: tuple, values: list[float]) -> None:
    grid, v = grid_of(*case), torch.tensor(values)
    for mode, opposite in [("nearest", "nearest"), ("floor", "ceil"), ("truncate", "truncate"), ("logarithmic",) * 2]:
        assert torch.equal(grid.snap(-v, ROUNDING[mode]), -grid.snap(v, ROUNDING[opposite]))


def test_what_is_symmetric() -> None:
    signed = {case for case in CASES if case[2] or case[0] in ("binary", "ternary")}
    wider_below = {("int", bits, True, False) for bits in range(1, 17)} | {("mxint8", 8, True, False)}
    assert set(SYMMETRIC) == signed - wider_below


@pytest.mark.parametrize(("name", "bits", "signed", "narrow"), LISTED)
def test_directed_and_nearest_by_exact_distance(name: str, bits: int, signed: bool, narrow: bool) -> None:
    """Random values and all middles against the list of values, in exact arithmetic; ties may go either way here."""
    grid = grid_of(name, bits, signed, narrow)
    if name == "binary":
        return
    levels = grid.values()
    middles = levels[:-1] + levels.diff() / 2
    inside = torch.rand(64) * (grid.high - grid.low) + grid.low
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-math.inf, math.inf)]
    v = torch.cat([middles, *beside, inside]).clamp(grid.low, grid.high)
    above = torch.searchsorted(levels, v)
    below = torch.searchsorted(levels, v, right=True) - 1
    assert torch.equal(grid.snap(v, torch.floor), levels[below])
    assert torch.equal(grid.snap(v, torch.ceil), levels[above])
    nearest = grid.snap(v, torch.round)
    for value, got, lo, hi in zip(
        v.tolist(), nearest.tolist(), levels[below].tolist(), levels[above].tolist(), strict=True
    ):
        distance = abs(Fraction(value) - Fraction(got))
        assert distance == min(abs(Fraction(value) - Fraction(lo)), abs(Fraction(value) - Fraction(hi))), value


# ---- integers --------------------------------------------------------------------------------------------------------


def test_integers() -> None:
    assert grid_of("int", 1, signed=False).values().tolist() == [0, 1]
    assert grid_of("int", 1).values().tolist() == [-1, 0]
    assert grid_of("int", 2, narrow=True).values().tolist() == [-1, 0, 1]
    assert grid_of("int", 3).values().tolist() == [-4, -3, -2, -1, 0, 1, 2, 3]
    assert (grid_of("int", 16).low, grid_of("int", 16).high) == (-32768, 32767)
    assert len(grid_of("int", 16, signed=False).values()) == 65536
    assert grid_of("int", 3).snap(torch.tensor([-9.0, -0.5, 0.5, 1.5, 2.6]), torch.round).tolist() == [-4, 0, 0, 2, 3]


def test_integers_that_do_not_exist() -> None:
    with pytest.raises(ValueError, match="narrow_range leaves"):
        grid_of("int", 1, signed=True, narrow=True)
    for bits in (0, 17):
        with pytest.raises(ValueError, match=f"1 to 16 bits, not {bits}"):
            grid_of("int", bits)


@pytest.mark.parametrize("name", ["pow2", "apot", "binary", "ternary", "mxint8", "mxfp4", "nvfp4"])
def test_other_widths_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not 9"):
        grid_of(name, 9)


# ---- powers of two ---------------------------------------------------------------------------------------------------


def test_pow2_values() -> None:
    assert grid_of("pow2", 2).values().tolist() == [-1, 0, 1]
    assert grid_of("pow2", 4).values().tolist()[7:] == [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    assert magnitudes("pow2", 2) == [0, 0.25, 0.5, 1]
    assert magnitudes("pow2", 3) == [0, *(2.0**-k for k in range(6, -1, -1))]
    assert grid_of("pow2", 8).values()[128:].tolist() == [2.0**-k for k in range(126, -1, -1)]
    assert magnitudes("pow2", 8) == magnitudes("pow2", 7) == [0, *(2.0**-k for k in range(126, -1, -1))]


def test_pow2_rounds_in_the_linear_domain_unless_logarithmic() -> None:
    grid = grid_of("pow2", 3)  # 0, 0.25, 0.5, 1
    v = torch.tensor([0.7, 0.72, 0.75, 0.76, -0.36, 0.3, 0.125, 0.13, 0.17, 0.18])
    assert grid.snap(v, ROUNDING["nearest"]).tolist() == [0.5, 0.5, 1, 1, -0.25, 0.25, 0, 0.25, 0.25, 0.25]
    assert grid.snap(v, ROUNDING["logarithmic"]).tolist() == [0.5, 1, 1, 1, -0.5, 0.25, 0, 0, 0, 0.25]


def test_stochastic_is_unbiased_between_uneven_neighbours() -> None:
    n = 200_000
    for name, value, low, high in [("pow2", -0.6, -1.0, -0.5), ("apot", 0.65, 0.6, 0.8)]:
        grid = grid_of(name, 4)
        rounded = grid.snap(torch.full((n,), value), ROUNDING["stochastic"])
        assert sorted(set(rounded.tolist())) == pytest.approx([low, high])
        assert float(rounded.double().mean()) == pytest.approx(value, abs=5 * (high - low) / 2 / math.sqrt(n))


# ---- additive powers of two ------------------------------------------------------------------------------------------


def test_apot_magnitudes_by_hand() -> None:
    assert magnitudes("apot", 2) == [0, 0.25, 0.5, 1]
    assert magnitudes("apot", 3) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1])
    over48 = [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48]
    assert magnitudes("apot", 4) == pytest.approx([level / 48 for level in over48])
    # the terms of 5 bits in the published code, times 2: (1, 1/4, 1/32), (1/2, 1/8, 1/64), (1/16); in 64ths:
    sums = sorted(a + b + c for a in (0, 64, 16, 2) for b in (0, 32, 8, 1) for c in (0, 4))
    assert magnitudes("apot", 5) == pytest.approx([s / 100 for s in sums])
    # of 6 bits: (1, 1/8, 1/64), (1/2, 1/16, 1/128), (1/4, 1/32, 1/256); in 256ths:
    sums = sorted(a + b + c for a in (0, 256, 32, 4) for b in (0, 128, 16, 2) for c in (0, 64, 8, 1))
    assert magnitudes("apot", 6) == pytest.approx([s / 448 for s in sums])
    assert [len(magnitudes("apot", bits)) for bits in (7, 8)] == [128, 256]


def test_apot_has_a_bit_less_of_magnitude_with_a_sign() -> None:
    for bits in range(3, 9):
        levels = magnitudes("apot", bits - 1)
        assert grid_of("apot", bits).values().tolist() == [*(-m for m in reversed(levels[1:])), *levels]
    assert grid_of("apot", 2).values().tolist() == [-1, 0, 1]


def test_apot_roundings() -> None:
    grid = grid_of("apot", 3, signed=False)  # 0, .1, .2, .3, .4, .6, .8, 1
    v = torch.tensor([0.5, 0.69, 0.71, 0.04, 0.06, -0.3])
    assert grid.snap(v, ROUNDING["nearest"]).tolist() == pytest.approx([0.4, 0.6, 0.8, 0, 0.1, 0])
    # the middle of 0.4 and 0.6 is 0.4899 in the log domain, of 0.6 and 0.8 it is 0.6928; 0.1 ends at 0.0707
    v = torch.tensor([0.489, 0.491, 0.692, 0.694, 0.07, 0.072])
    assert grid.snap(v, ROUNDING["logarithmic"]).tolist() == pytest.approx([0.4, 0.6, 0.6, 0.8, 0, 0.1])
