"""Floating-point grids against ml_dtypes, torch's casts, bit arithmetic, and tables of neighbours."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.numerics.formats import FORMATS, Grid
from qat.numerics.rounding import ROUNDING

ML_DTYPES = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
}
TORCH = {
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
LARGEST = {"e4m3fn": 448, "e5m2": 57344, "e3m2": 28, "e2m3": 7.5, "e2m1": 6, "fp16": 65504}
SMALLEST = {"e4m3fn": -9, "e5m2": -16, "e3m2": -4, "e2m3": -3, "e2m1": -1, "bf16": -133, "fp16": -24, "tf32": -136}


def grid_of(name: str, signed: bool = True) -> Grid:
    form = FORMATS[name]
    assert form.grid is not None
    return form.grid(form.bits[0], signed, False)


def codes(name: str) -> np.ndarray:
    """All finite values of a format, decoded by ml_dtypes from every code; ascending, float64."""
    dtype = ML_DTYPES[name]
    bits = grid_of(name).bits
    with np.errstate(invalid="ignore"):
        values = np.arange(2**bits, dtype=np.uint16 if bits > 8 else np.uint8).view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)])  # unique: -0 and 0 are one


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    """Every bfloat16, float32 of every exponent, and what is just beside every tie of the small formats."""
    rng = np.random.default_rng(0)
    bfloat16 = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    random = rng.integers(0, 2**32, 1_000_000, dtype=np.uint32).view(np.float32)
    ties = []
    for name in ("e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1"):
        levels = codes(name)
        middle = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
        ties += [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    return np.concatenate([bfloat16, random, *ties])


def assert_bits_equal(got: torch.Tensor, want: np.ndarray, inputs: np.ndarray) -> None:
    nan = np.isnan(inputs)
    assert np.array_equal(np.isnan(got.numpy()), nan)
    differ = (got.numpy().view(np.uint32) != want.astype(np.float32).view(np.uint32)) & ~nan
    assert not differ.any(), (inputs[differ][:5], got.numpy()[differ][:5], want[differ][:5])


@pytest.mark.parametrize("name", ML_DTYPES)
def test_nearest_is_the_cast_of_ml_dtypes(name: str, inputs: np.ndarray) -> None:
    grid = grid_of(name)
    with np.errstate(invalid="ignore", over="ignore"):
        want = np.clip(inputs, grid.low, grid.high).astype(np.float32).astype(ML_DTYPES[name]).astype(np.float32)
    assert_bits_equal(grid.snap(torch.from_numpy(inputs), ROUNDING["nearest"]), want, inputs)


@pytest.mark.parametrize("name", TORCH)
def test_nearest_is_the_cast_of_torch(name: str, inputs: np.ndarray) -> None:
    grid = grid_of(name)
    x = torch.from_numpy(inputs)
    want = x.clamp(grid.low, grid.high).to(TORCH[name]).float()
    assert_bits_equal(grid.snap(x, ROUNDING["nearest"]), want.numpy(), inputs)


def test_nearest_tf32_drops_13_bits(inputs: np.ndarray) -> None:
    bits = inputs.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~np.uint64(0x1FFF)).astype(np.uint32).view(np.float32)
    largest = np.array([0x7F7FE000], np.uint32).view(np.float32)[0]
    assert grid_of("tf32").high == largest
    want = np.where(np.isnan(inputs), inputs, np.clip(rounded, -largest, largest))
    assert_bits_equal(grid_of("tf32").snap(torch.from_numpy(inputs), ROUNDING["nearest"]), want, inputs)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_values_are_the_decoded_codes(name: str) -> None:
    values = grid_of(name).values()
    assert values.dtype == torch.float32
    assert np.array_equal(values.numpy().astype(np.float64), codes(name))
    half = grid_of(name, signed=False).values().numpy()
    assert np.array_equal(half, codes(name)[codes(name) >= 0].astype(np.float32))


@pytest.mark.parametrize("name", LARGEST)
def test_largest(name: str) -> None:
    assert (grid_of(name).low, grid_of(name).high) == (-LARGEST[name], LARGEST[name])


@pytest.mark.parametrize("name", SMALLEST)
def test_subnormals(name: str) -> None:
    grid, smallest = grid_of(name), 2.0 ** SMALLEST[name]
    multiples = torch.tensor([0.5, 0.75, 1.25, 1.5, 2.5, -0.75, -0.25], dtype=torch.float64)
    got = grid.snap((multiples * smallest).float(), ROUNDING["nearest"]).double() / smallest
    assert got.tolist() == [0, 1, 1, 2, 2, -1, 0]
    assert torch.signbit(got[-1])


# ---- other roundings, against the table of neighbours ----------------------------------------------------------------


def neighbours(x: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x saturated, the values below and above it (the same where it is one), the index of the lower; float64."""
    levels = codes(name)
    x = np.clip(x.astype(np.float64), levels[0], levels[-1])
    lower = np.searchsorted(levels, x, side="right") - 1
    upper = np.searchsorted(levels, x, side="left")
    return x, levels[lower], levels[upper], lower - len(levels) // 2


def power_of_two(x: float) -> Fraction:
    """The nearest power of two in the log domain, exactly: `x**2` is compared with `2 ** (2 k + 1)`."""
    size = abs(Fraction(x))
    k = 0
    while Fraction(2) ** (2 * k + 1) <= size * size:
        k += 1
    while Fraction(2) ** (2 * k - 1) > size * size:
        k -= 1
    return Fraction(2) ** k if x > 0 else -(Fraction(2) ** k)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_directed_roundings(name: str, inputs: np.ndarray) -> None:
    sample = inputs[np.isfinite(inputs)][::7]
    _, below, above, _ = neighbours(sample, name)
    want = {"floor": below, "ceil": above, "truncate": np.where(sample < 0, above, below)}
    for mode, values in want.items():
        got = grid_of(name).snap(torch.from_numpy(sample), ROUNDING[mode])
        assert np.array_equal(got.numpy().astype(np.float64), values), mode


@pytest.mark.parametrize("name", ML_DTYPES)
def test_nearest_by_distance(name: str, inputs: np.ndarray) -> None:
    sample = inputs[np.isfinite(inputs)][::7]
    x, below, above, index = neighbours(sample, name)
    up = (x - below > above - x) | ((x - below == above - x) & (index % 2 != 0))  # float64 is exact: 24 + 8 bits
    got = grid_of(name).snap(torch.from_numpy(sample), ROUNDING["nearest"])
    assert np.array_equal(got.numpy().astype(np.float64), np.where(up, above, below))


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "fp16"])
def test_logarithmic_gives_powers_of_two(name: str) -> None:
    grid = grid_of(name)
    rng = np.random.default_rng(1)
    sizes = 2.0 ** rng.uniform(SMALLEST[name] - 2, np.log2(grid.high) + 2, 2000)
    x = (sizes * rng.choice([-1, 1], 2000)).astype(np.float32)
    got = grid.snap(torch.from_numpy(x), ROUNDING["logarithmic"]).tolist()
    for value, result in zip(x.tolist(), got, strict=True):
        power = power_of_two(value)
        power = Fraction(0) if abs(power) < Fraction(2) ** SMALLEST[name] else power
        assert result == max(Fraction(grid.low), min(Fraction(grid.high), power)), value


@pytest.mark.parametrize(
    ("name", "value", "low", "high"),
    [("e4m3fn", 1.03, 1.0, 1.125), ("e4m3fn", -300.0, -320.0, -288.0), ("e2m1", 0.2, 0.0, 0.5), ("bf16", 1e-40, 0, 1)],
)
def test_stochastic_is_unbiased(name: str, value: float, low: float, high: float) -> None:
    n = 200_000
    rounded = grid_of(name).snap(torch.full((n,), value), ROUNDING["stochastic"]).double()
    value = float(torch.tensor(value))
    if name == "bf16":  # a subnormal number: neighbours are multiples of 2**-133
        low, high = 1e-40 // 2.0**-133 * 2.0**-133, (1e-40 // 2.0**-133 + 1) * 2.0**-133
    assert set(rounded.tolist()) == {low, high}
    share = (value - low) / (high - low)
    assert float((rounded == high).double().mean()) == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)


def test_stochastic_is_reproducible() -> None:
    v = torch.randn(1000)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(grid_of("e2m1").snap(v, ROUNDING["stochastic"]))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@given(st.floats(width=32, allow_nan=False), st.sampled_from(sorted(ML_DTYPES)))
def test_stochastic_gives_a_neighbour(value: float, name: str) -> None:
    _, below, above, _ = neighbours(np.array([value]), name)
    assert grid_of(name).snap(torch.tensor(value), ROUNDING["stochastic"]).item() in (below[0], above[0])


def test_tf32_has_too_many_values_to_list() -> None:
    with pytest.raises(ValueError, match="19 bits"):
        grid_of("tf32").values()


def test_other_widths_are_refused() -> None:
    for name in [*ML_DTYPES, "tf32"]:
        grid = FORMATS[name].grid
        assert grid is not None
        with pytest.raises(ValueError, match=f"{FORMATS[name].bits[0]} bits, not 7"):
            grid(7, True, False)
