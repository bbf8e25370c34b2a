import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qat.numerics import draws
from qat.numerics.draws import seeded, splitmix, use_generator
from qat.numerics.rounding import ROUNDING, logarithmic, round_ste, settled, stochastic

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
        monkeypatch.setattr(draws, "_rank", lambda: rank)
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


def test_splitmix_is_the_published_generator() -> None:
    """The first numbers of seed 1234567, as many implementations of it have them, and a plain one for other seeds."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [t % 2**64 for t in splitmix(torch.tensor(1234567), 5).tolist()] == known

    def plain(seed: int, n: int) -> list[int]:
        result = []
        for _ in range(n):
            seed = (seed + 0x9E3779B97F4A7C15) % 2**64
            z = seed
            z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
            result.append(z ^ z >> 31)
        return result

    for seed in (0, -1, 2**63 - 1, 42 << 32):
        assert [t % 2**64 for t in splitmix(torch.tensor(seed), 20).tolist()] == plain(seed % 2**64, 20)


def test_seeded_draws_are_uniform_and_independent_from_draw_to_draw() -> None:
    x = torch.empty(100, 1000)
    drawn = []
    for seed, count in ((1, 1), (1, 2), (2, 1)):
        with seeded(seed << 32, torch.tensor(count)):
            drawn.append(draws.uniform(x).flatten())
            assert torch.equal(draws.uniform(x).flatten(), drawn[-1])
    for u in drawn:
        assert 0 <= u.min() < 1e-3
        assert 1 - 1e-3 < u.max() < 1
        counts = torch.histc(u, 64, 0, 1)
        assert float(((counts - len(u) / 64) ** 2 / (len(u) / 64)).sum()) < 104  # chi-square, 63 degrees: p = 0.001
        assert abs(float(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1])) < 0.012
    assert torch.corrcoef(torch.stack(drawn)).triu(1).abs().max() < 0.012  # four standard deviations
    torch.manual_seed(0)
    assert draws._seeded is None


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
