"""Scalar codebooks against brute force in numpy, scikit-learn, autograd and the known quantizers of a Gaussian."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from qat.numerics import codebook as module
from qat.numerics.codebook import assign, codebook_ste, fit_codebook, look_up, storage_bits

LARGE = 2.0**100
VALUES = st.floats(-LARGE, LARGE, width=32)
FEW = st.integers(-20, 20).map(lambda i: i / 4)  # with ties and repeated values
MANY_ROWS = st.lists(st.lists(VALUES | FEW, min_size=4, max_size=4), min_size=1, max_size=3)


def nearest(rows: torch.Tensor, codebook: torch.Tensor) -> np.ndarray:
    """By all distances in extended precision; argmin takes the lowest index."""
    x, c = rows.numpy().astype(np.longdouble), codebook.numpy().astype(np.longdouble)
    return np.abs(x[:, :, None] - c[:, None, :]).argmin(axis=2)


def error(rows: torch.Tensor, codebook: torch.Tensor) -> float:
    return float((look_up(assign(rows, codebook), codebook).double() - rows.double()).square().sum())


def gaussian(values: int) -> torch.Tensor:
    """Values evenly spaced in probability."""
    return torch.special.ndtri((torch.arange(values, dtype=torch.float64) + 0.5) / values).float().unsqueeze(0)


# ---- fit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [2**15, 2**18])  # on all values, and on their histogram
@pytest.mark.parametrize(
    ("entries", "positive"), [(2, [0.7979]), (4, [0.4528, 1.510]), (8, [0.2451, 0.7560, 1.3439, 2.1520])]
)
def test_gaussian_values_give_the_lloyd_max_quantizer(values: int, entries: int, positive: list[float]) -> None:
    # Max 1960, "Quantizing for Minimum Distortion", table I.
    expected = torch.tensor([[-p for p in reversed(positive)] + positive])
    torch.testing.assert_close(fit_codebook(gaussian(values), entries), expected, rtol=0.01, atol=0)


def test_hand_computed_clusters() -> None:
    rows = torch.tensor([[1.0, 9.0, 2.0, 10.0, 20.0, 3.0], [0.0, 0.0, 0.0, 5.0, 7.0, -1.0]])
    assert fit_codebook(rows, 3).tolist() == [[2.0, 9.5, 20.0], [-0.25, 5.0, 7.0]]


@pytest.mark.parametrize("entries", [2, 5, 16])
def test_equals_scikit_learn_from_the_same_start(entries: int) -> None:
    rows = torch.randn(3, 500)
    fitted = fit_codebook(rows, entries)
    for row, codebook in zip(rows, fitted, strict=True):
        points = row.double().numpy()[:, None]
        start = np.linspace(points.min(), points.max(), entries)[:, None]
        reference = KMeans(entries, init=start, n_init=1, tol=0).fit(points)
        assert error(row[None], codebook[None]) == pytest.approx(reference.inertia_, rel=1e-4)
        order = np.argsort(reference.cluster_centers_[:, 0])
        labels = np.argsort(order)[reference.labels_]
        assert np.array_equal(assign(row[None], codebook[None])[0].numpy(), labels)


@pytest.mark.parametrize("start", ["linear", "k-means++"])
def test_is_a_fixed_point_of_lloyds_iteration(start: str) -> None:
    rows = torch.randn(1, 3000) ** 3
    codebook = fit_codebook(rows, 8, start=start)  # type: ignore[arg-type]
    indices = assign(rows, codebook)
    means = torch.stack([rows[indices == i].double().mean() for i in range(8)])
    torch.testing.assert_close(codebook[0].double(), means, rtol=1e-5, atol=1e-6)


def test_many_entries_are_better_spent_from_a_random_start() -> None:
    rows = gaussian(2**17)
    assert error(rows, fit_codebook(rows, 256, start="k-means++")) < 0.7 * error(rows, fit_codebook(rows, 256))


def test_histogram_costs_next_to_nothing_in_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(1, 2**17) ** 3
    on_histogram = error(rows, fit_codebook(rows, 16))
    monkeypatch.setattr(module, "EXACT_VALUES", 2**20)
    assert on_histogram == pytest.approx(error(rows, fit_codebook(rows, 16)), rel=0.01)


@pytest.mark.parametrize("outlier", [100.0, 1e5])
def test_histogram_keeps_an_outlier_and_the_bulk(outlier: float) -> None:
    rows = torch.cat([gaussian(2**17), torch.tensor([[outlier]])], dim=1)
    codebook = fit_codebook(rows, 16, start="k-means++")
    assert codebook[0, -1] == outlier
    bulk = rows[:, :-1]
    assert error(bulk, codebook) < 1.2 * error(bulk, fit_codebook(bulk, 15, start="k-means++"))


@given(st.lists(VALUES | FEW, min_size=1, max_size=16), st.integers(0, 4), st.randoms())
@settings(deadline=None)
def test_no_more_distinct_values_than_entries_are_exact(values: list[float], spare: int, random) -> None:  # type: ignore[no-untyped-def]
    repeated = values + random.choices(values, k=5)
    random.shuffle(repeated)
    rows = torch.tensor([repeated])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codebook = fit_codebook(rows, len(values) + spare)
    assert torch.equal(look_up(assign(rows, codebook), codebook), rows)
    assert bool((codebook.diff(dim=1) >= 0).all())


@given(st.permutations(range(40)))
@settings(deadline=None, max_examples=20)
def test_the_order_of_the_values_does_not_matter(order: list[int]) -> None:
    rows = torch.randn(1, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fit_codebook(rows[:, order], 4), fit_codebook(rows, 4))


@given(st.lists(VALUES, min_size=20, max_size=20))
@settings(deadline=None, max_examples=50)
def test_any_range_of_values_fits_without_warning(values: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codebook = fit_codebook(torch.tensor([values]), 4)
    assert bool(torch.isfinite(codebook).all())
    assert bool((codebook.diff(dim=1) >= 0).all())
    assert min(values) <= float(codebook[0, 0])
    assert float(codebook[0, -1]) <= max(values)


@pytest.mark.parametrize("scale", [1e30, 3e38, 1e-44])
def test_the_ends_of_float32(scale: float) -> None:
    rows = torch.tensor([[-1.0, -0.9, 0.0, 0.1, 1.0]]) * scale
    codebook = fit_codebook(rows, 3)
    assert assign(rows, codebook).tolist() == [[0, 0, 1, 1, 2]]


def test_degenerate_rows() -> None:
    assert fit_codebook(torch.zeros(2, 5), 4).tolist() == [[0.0] * 4] * 2
    assert fit_codebook(torch.full((1, 5), -2.5), 2).tolist() == [[-2.5, -2.5]]
    assert fit_codebook(torch.tensor([[3.0]]), 2).tolist() == [[3.0, 3.0]]
    assert fit_codebook(torch.zeros(2, 0), 3).tolist() == [[0.0] * 3] * 2
    assert fit_codebook(torch.zeros(0, 5), 3).shape == (0, 3)
    assert fit_codebook(torch.tensor([[1.0, 3.0]]), 1).tolist() == [[2.0]]
    assert assign(torch.zeros(2, 0), torch.zeros(2, 3)).shape == (2, 0)
    assert assign(torch.randn(1, 7), torch.zeros(1, 1)).tolist() == [[0] * 7]


def test_same_seed_same_codebook_and_nothing_else_moves() -> None:
    rows = torch.randn(2, 2000, dtype=torch.float64, requires_grad=True)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = fit_codebook(rows, 16, seed=5, start="k-means++")
    assert torch.equal(first, fit_codebook(rows, 16, seed=5, start="k-means++"))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert first.dtype == torch.float32
    assert not first.requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_values_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of 4 values are not finite"):
        fit_codebook(torch.tensor([[0.0, bad], [1.0, 2.0]]), 2)


@pytest.mark.parametrize("entries", [0, 257])
def test_entries_out_of_range_are_refused(entries: int) -> None:
    with pytest.raises(ValueError, match=f"entries={entries} is out of range"):
        fit_codebook(torch.zeros(1, 4), entries)


# ---- assign, look_up -------------------------------------------------------------------------------------------------


@given(MANY_ROWS, st.lists(VALUES | FEW, min_size=1, max_size=9), st.integers(0, 3))
def test_every_index_is_that_of_the_nearest_entry(rows: list[list[float]], codebook: list[float], roll: int) -> None:
    x = torch.tensor(rows)
    c = torch.stack([torch.tensor(codebook).roll(roll * i) for i in range(len(rows))])
    chosen, best = look_up(assign(x, c), c), look_up(torch.from_numpy(nearest(x, c)), c)
    distance = (x.numpy().astype(np.longdouble) - chosen.numpy()), (x.numpy().astype(np.longdouble) - best.numpy())
    # Where exponents lie 30 apart, float64 sees a tie that extended precision does not.
    assert np.allclose(np.abs(distance[0]), np.abs(distance[1]), rtol=1e-15, atol=0)


@given(st.lists(FEW, min_size=1, max_size=30), st.lists(FEW, min_size=1, max_size=9))
def test_ties_and_equal_entries_go_to_the_lowest_index(values: list[float], codebook: list[float]) -> None:
    x, c = torch.tensor([values]), torch.tensor([codebook])
    indices = assign(x, c)
    assert indices.dtype == torch.uint8
    assert np.array_equal(indices.numpy(), nearest(x, c))


def test_a_value_next_to_a_midpoint_that_float32_does_not_hold() -> None:
    one = np.float32(1)
    after = [np.nextafter(one, np.float32(2)), np.nextafter(np.nextafter(one, np.float32(2)), np.float32(2))]
    codebook = torch.tensor([[1.0, float(after[0])]])  # the midpoint lies between two neighbouring floats
    assert assign(torch.tensor([[1.0, float(after[0]), float(after[1])]]), codebook).tolist() == [[0, 1, 1]]


def test_assign_takes_256_entries_any_layout_and_half_precision() -> None:
    codebook = torch.randn(3, 256)
    rows = torch.randn(70, 3).half().T
    assert np.array_equal(assign(rows, codebook).numpy(), nearest(rows.float(), codebook))


def test_look_up_by_hand() -> None:
    codebook = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert look_up(torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.uint8), codebook).tolist() == [[2, 1, 2], [3, 3, 4]]


# ---- gradients, storage ----------------------------------------------------------------------------------------------


def test_gradients_are_those_of_gather_and_of_the_identity() -> None:
    rows = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    indices, weight = torch.randint(0, 6, (3, 50)).to(torch.uint8), torch.randn(3, 50, dtype=torch.float64)
    y = codebook_ste(rows, codebook, indices)
    (y.sin() * weight).sum().backward()
    leaf = codebook.detach().clone().requires_grad_()
    gathered = leaf.gather(1, indices.long())
    (expected,) = torch.autograd.grad((gathered.sin() * weight).sum(), leaf)
    assert torch.equal(y, gathered)
    torch.testing.assert_close(codebook.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, gathered.detach().cos() * weight)
    assert codebook.grad is not None
    assert codebook.grad[:, 6].tolist() == [0.0] * 3  # no value is assigned to it


def test_gradients_by_hand_and_only_where_asked() -> None:
    codebook = torch.tensor([[1.0, 2.0]], requires_grad=True)
    indices = torch.tensor([[0, 1, 0]], dtype=torch.uint8)
    codebook_ste(torch.zeros(1, 3), codebook, indices).backward(torch.tensor([[1.0, 10.0, 100.0]]))
    assert codebook.grad is not None
    assert codebook.grad.tolist() == [[101.0, 10.0]]
    rows = torch.zeros(1, 3, requires_grad=True)
    codebook_ste(rows, codebook.detach(), indices).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1.0] * 3]


def test_only_uint8_is_kept_for_the_backward_pass() -> None:
    kept: list[torch.Tensor] = []
    rows, codebook = torch.randn(2, 9, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        codebook_ste(rows, codebook, assign(rows, codebook))
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, (2, 9))]


def test_the_result_has_the_dtype_of_the_rows() -> None:
    rows, codebook = torch.randn(1, 4).half().requires_grad_(), torch.tensor([[0.5, 1.0]], requires_grad=True)
    y = codebook_ste(rows, codebook, assign(rows, codebook))
    y.sum().backward()
    assert y.dtype == torch.half
    assert codebook.grad is not None
    assert codebook.grad.dtype == torch.float32


def test_gradient_descent_on_the_entries_reaches_what_k_means_finds() -> None:
    rows = torch.randn(1, 400)
    codebook = torch.tensor([[1.0, -2.0, 0.3, 4.0]], requires_grad=True)  # unsorted, as training may leave it
    for _ in range(200):
        loss = (codebook_ste(rows, codebook, assign(rows, codebook)) - rows).square().mean()
        (grad,) = torch.autograd.grad(loss, codebook)
        codebook = (codebook - 0.5 * grad).detach().requires_grad_()
    assert error(rows, codebook.detach()) < 1.1 * error(rows, fit_codebook(rows, 4))


@pytest.mark.parametrize(
    ("shape", "entries", "bits"),
    [((1, 16), 4, 10.0), ((8, 1024), 16, 4.5), ((1, 2**20), 256, 8 + 2**-7), ((2, 0), 4, 2)],
)
def test_storage(shape: tuple[int, int], entries: int, bits: float) -> None:
    assert storage_bits(shape, entries) == pytest.approx(bits)
