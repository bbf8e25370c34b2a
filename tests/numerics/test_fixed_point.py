"""Fixed-point arithmetic against Python's integers, which have no limits, and against exact fractions."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.numerics.fixed_point import LARGEST, integer_sqrt, multiplier_and_shift, multiply, requantize

REALS = st.floats(min_value=2.0**-30, max_value=2.0**10)


@given(st.lists(REALS, min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_a_real_number_is_kept_to_31_bits(reals: list[float]) -> None:
    multiplier, shift = multiplier_and_shift(torch.tensor(reals, dtype=torch.float64))
    for real, m, s in zip(reals, multiplier.tolist(), shift.tolist(), strict=True):
        assert 2**30 <= m < 2**31
        kept = Fraction(m) * Fraction(2) ** (s - 31)
        assert abs(kept / Fraction(real) - 1) <= Fraction(1, 2**31)


@given(
    st.lists(st.tuples(st.integers(-(2**31), 2**31 - 1), REALS), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(-(2**49), 2**49), REALS), min_size=1, max_size=20),
)
@settings(max_examples=300, deadline=None)
def test_products_are_those_of_python_integers(narrow: list[tuple[int, float]], wide: list[tuple[int, float]]) -> None:
    for pairs, dtype in ((narrow, torch.int32), (narrow, torch.int64), (wide, torch.int64)):
        x = torch.tensor([value for value, _ in pairs], dtype=dtype)
        multiplier, shift = multiplier_and_shift(torch.tensor([real for _, real in pairs], dtype=torch.float64))
        made = multiply(x, multiplier, shift).tolist()
        for (value, _), m, s, result in zip(pairs, multiplier.tolist(), shift.tolist(), made, strict=True):
            assert result == (value * m + (1 << (30 - s))) >> (31 - s)
            assert result == math.floor(Fraction(value * m) / 2 ** (31 - s) + Fraction(1, 2))


@given(st.integers(-(2**22), 2**22), st.floats(min_value=1e-5, max_value=2.0))
@settings(max_examples=500, deadline=None)
def test_the_result_is_the_nearest_integer_but_next_to_ties(total: int, real: float) -> None:
    exact = Fraction(total) * Fraction(real)
    made = multiply(torch.tensor([total]), *multiplier_and_shift(torch.tensor([real], dtype=torch.float64))).item()
    assert abs(made - exact) <= Fraction(1, 2) + abs(exact) / 2**31
    if abs(exact - math.floor(exact) - Fraction(1, 2)) > abs(exact) / 2**31:
        assert made == round(exact)


def test_halves_go_up() -> None:
    multiplier, shift = multiplier_and_shift(torch.tensor(0.5))
    x = torch.arange(-5, 6, dtype=torch.int32)
    assert multiply(x, multiplier, shift).tolist() == [-2, -2, -1, -1, 0, 0, 1, 1, 2, 2, 3]


def test_numbers_at_the_ends() -> None:
    tiny, large = torch.tensor([0.0, 2.0**-33, 2.0**-32]), torch.tensor(2.0**29)
    multiplier, shift = multiplier_and_shift(tiny)
    assert multiplier.tolist() == [0, 0, 2**30]
    x = torch.full((3,), 2**31 - 1, dtype=torch.int32)
    assert multiply(x, multiplier, shift).tolist() == [0, 0, 0]
    assert multiply(torch.tensor([-3]), *multiplier_and_shift(large)).item() == -3 * 2**29
    nearly_one = torch.tensor(1 - 2.0**-40, dtype=torch.float64)
    assert [t.item() for t in multiplier_and_shift(nearly_one)] == [2**30, 1]
    for bad in (-1.0, math.nan, math.inf, 2.0**30):
        with pytest.raises(ValueError, match="fixed-point multiplier"):
            multiplier_and_shift(torch.tensor(bad))


def test_requantize_clamps_to_the_grid() -> None:
    arguments = multiplier_and_shift(torch.tensor([0.01, 0.1], dtype=torch.float64))
    x = torch.tensor([[-(2**31), 1000], [499, 2**31 - 1]], dtype=torch.int32)
    assert requantize(x, *arguments, -3, -128, 127).tolist() == [[-128, 97], [2, 127]]


@given(st.lists(st.integers(0, LARGEST - 1), min_size=1, max_size=50))
@settings(max_examples=300, deadline=None)
def test_roots_are_those_of_python_integers(values: list[int]) -> None:
    squares = [min(math.isqrt(v) ** 2 + d, LARGEST - 1) for v in values for d in (-1, 0, 1) if v > 0]
    assert integer_sqrt(torch.tensor(values + squares)).tolist() == [math.isqrt(v) for v in values + squares]
