import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.numerics import rounding
from qat.numerics.rounding import ROUNDING, logarithmic, round_ste, settled, stochastic, use_generator

# The truth table of IEEE 754's roundings, by hand.
VALUES = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4, -2.6]
TABLE = {
    "nearest": [-2, -2, 0, 0, 2, 2, 2, -3],
    "floor": [-3, -2, -1, 0, 1, 2, 2, -3],
    "ceil": [-2, -1, 0, 1, 2, 3, 3, -2],
    "truncate": [-2, -1, 0, 0, 1, 2, 2, -2],
}
PYTHON = {"nearest": round, "floor": math.floor, "ceil": math.ceil, "truncate": math.trunc}


@pytest.mark.parametrize("mode", TABLE)
def test_truth_table(mode: str) -> None:
    assert ROUNDING[mode](torch.tensor(VALUES)).tolist() == TABLE[mode]


@given(st.lists(st.floats(-(2**23), 2**23, width=32), min_size=1), st.sampled_from(sorted(PYTHON)))
def test_equals_python(values: list[float], mode: str) -> None:
    assert ROUNDING[mode](torch.tensor(values)).tolist() == [PYTHON[mode](value) for value in values]


@pytest.mark.parametrize("mode", TABLE)
def test_ste_rounds_forward_and_is_the_identity_backward(mode: str) -> None:
    x = torch.tensor(VALUES, requires_grad=True)
    y = round_ste(x, mode)
    assert y.tolist() == TABLE[mode]
    grad = torch.randn(len(VALUES))
    y.backward(grad)
    assert torch.equal(x.grad, grad)


def test_ste_keeps_nothing_for_backward() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        round_ste(torch.randn(8, requires_grad=True))
    assert kept == []


# ---- stochastic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.25, -0.25, 2.9, -7.5, 0.001])
def test_stochastic_gives_a_neighbour_and_is_unbiased(value: float) -> None:
    torch.manual_seed(0)
    n = 200_000
    rounded = stochastic(torch.full((n,), value))
    assert set(rounded.tolist()) <= {math.floor(value), math.ceil(value)}
    share = value - math.floor(value)
    assert float(rounded.mean()) == pytest.approx(value, abs=5 * math.sqrt(share * (1 - share) / n))


def test_stochastic_keeps_integers() -> None:
    x = torch.arange(-2000.0, 2000).repeat(50)
    assert torch.equal(stochastic(x), x)


def test_stochastic_is_reproducible_from_the_seed_and_from_a_generator() -> None:
    x = torch.randn(1000)
    torch.manual_seed(3)
    first = stochastic(x)
    assert not torch.equal(stochastic(x), first)
    torch.manual_seed(3)
    assert torch.equal(stochastic(x), first)
    try:
        use_generator(torch.Generator().manual_seed(7))
        own = stochastic(x)
        torch.manual_seed(3)  # of no consequence now
        use_generator(torch.Generator().manual_seed(7))
        assert torch.equal(stochastic(x), own)
    finally:
        use_generator(None)


def test_processes_round_differently_unless_given_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank(rank: int, generator: torch.Generator | None) -> torch.Tensor:
        monkeypatch.setattr(rounding, "_rank", lambda: rank)
        use_generator(generator)
        torch.manual_seed(0)
        try:
            return stochastic(torch.full((100_000,), 0.3))
        finally:
            use_generator(None)

    ranks = [of_rank(rank, None) for rank in range(3)]
    assert not torch.equal(ranks[0], ranks[1])
    assert not torch.equal(ranks[1], ranks[2])
    assert all(float(drawn.mean()) == pytest.approx(0.3, abs=0.01) for drawn in ranks)
    equal = [of_rank(rank, torch.Generator().manual_seed(1)) for rank in range(2)]
    assert torch.equal(*equal)


def test_what_stands_in_for_training_only_roundings() -> None:
    assert {name: settled(name) for name in ROUNDING if settled(name) != name} == {"stochastic": "nearest"}


# ---- logarithmic -----------------------------------------------------------------------------------------------------


def test_logarithmic_truth_table() -> None:
    """Powers of two; between 2^k and 2^(k+1) the border is 2^(k + 1/2), by hand."""
    x = [0.0, 0.7, 0.71, 1.0, 1.41, 1.42, 2.82, 2.83, 5.65, 5.66, -3.0, -0.5, 100.0, 1e30]
    expected = [0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 8.0, -4.0, 0.0, 128.0, 2.0**100]
    assert logarithmic(torch.tensor(x)).tolist() == expected


@given(st.floats(1, 2**30, width=32))
def test_logarithmic_is_the_rounded_logarithm(value: float) -> None:
    exponent = math.log2(value)
    if abs(exponent % 1 - 0.5) > 1e-6:  # where float64's logarithm decides
        assert logarithmic(torch.tensor([value])).item() == 2.0 ** round(exponent)
        assert logarithmic(torch.tensor([-value])).item() == -(2.0 ** round(exponent))
