"""Product codes against brute force in numpy, scikit-learn, autograd and the product that they approximate."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from qat.numerics import product
from qat.numerics.product import (
    ProductCodebook,
    aggregate,
    build_tables,
    decode,
    encode,
    fit_product,
    product_ste,
    storage_bits,
)

TINY = ProductCodebook(torch.tensor([[[0.0, 0.0], [2.0, 2.0]], [[1.0, -1.0], [4.0, 0.0]]]))


def nearest(x: torch.Tensor, prototypes: torch.Tensor) -> np.ndarray:
    """By all distances in extended precision; argmin takes the lowest index."""
    subspaces, _, width = prototypes.shape
    parts = x.numpy().astype(np.longdouble).reshape(-1, subspaces, 1, width)
    return ((parts - prototypes.numpy().astype(np.longdouble)) ** 2).sum(axis=3).argmin(axis=2)


def error(x: torch.Tensor, codebook: ProductCodebook) -> float:
    return float((decode(encode(x, codebook), codebook).double() - x.double()).square().sum())


# ---- fit -------------------------------------------------------------------------------------------------------------


def test_no_worse_than_scikit_learn_and_a_fixed_point() -> None:
    x = torch.randn(600, 6)
    codebook = fit_product(x, 2, 8)
    codes = encode(x, codebook)
    for s, part in enumerate(x.reshape(-1, 2, 3).double().unbind(1)):
        means = torch.stack([part[codes[:, s] == i].mean(dim=0) for i in range(8)])
        torch.testing.assert_close(codebook.prototypes[s].double(), means, rtol=1e-4, atol=1e-5)
        reference = KMeans(8, n_init=1, tol=0, random_state=0).fit(part.numpy())
        own = float((codebook.prototypes[s][codes[:, s].long()] - part).square().sum())
        assert own < 1.05 * reference.inertia_
        again = KMeans(8, init=codebook.prototypes[s].double().numpy(), n_init=1, tol=0).fit(part.numpy())
        assert own == pytest.approx(again.inertia_, rel=1e-4)
        assert np.array_equal(again.labels_, codes[:, s].numpy())


def test_mini_batches_come_close(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(20000, 2)
    full = error(x, fit_product(x, 1, 16))
    monkeypatch.setattr(product, "MINI_BATCH_WORK", 1)
    assert error(x, fit_product(x, 1, 16)) < 1.1 * full


def test_a_sample_is_drawn_at_random_and_by_seed() -> None:
    x = torch.cat([torch.zeros(500, 2), torch.ones(500, 2)])  # the first rows alone would show one value
    state = torch.get_rng_state()
    first = fit_product(x + torch.randn(1000, 2, generator=torch.Generator().manual_seed(1)) * 0.1, 1, 2, sample=50)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(
        first.prototypes[0].sort(dim=0).values, torch.tensor([[0.0, 0], [1, 1]]), atol=0.1, rtol=0
    )
    x = torch.randn(300, 4)
    assert torch.equal(
        fit_product(x, 2, 4, seed=1, sample=99).prototypes, fit_product(x, 2, 4, seed=1, sample=99).prototypes
    )
    assert not torch.equal(
        fit_product(x, 2, 4, seed=1, sample=99).prototypes, fit_product(x, 2, 4, seed=2, sample=99).prototypes
    )


@given(st.integers(1, 6), st.integers(0, 3), st.randoms())
@settings(deadline=None, max_examples=30)
def test_no_more_distinct_parts_than_entries_are_exact(distinct: int, spare: int, random) -> None:  # type: ignore[no-untyped-def]
    parts = torch.randn(2, distinct, 3)
    chosen = [[random.randrange(distinct) for _ in range(2)] for _ in range(20)]
    x = torch.stack([torch.cat([parts[0, i], parts[1, j]]) for i, j in chosen])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codebook = fit_product(x, 2, distinct + spare)
    assert torch.equal(decode(encode(x, codebook), codebook), x)


@given(st.permutations(range(30)))
@settings(deadline=None, max_examples=20)
def test_the_order_of_the_vectors_does_not_matter(order: list[int]) -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(fit_product(x[order], 2, 4).prototypes, fit_product(x, 2, 4).prototypes)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30, 1e-44])
def test_the_ends_of_float32(scale: float) -> None:
    x = torch.tensor([[-3.0, 1.0], [-3.0, 1.0], [2.0, 0.0], [0.0, 0.0], [5.0, 5.0], [2.0, 1.0]]) * scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codebook = fit_product(x, 1, 3)
    assert bool(torch.isfinite(codebook.prototypes).all())
    assert np.array_equal(encode(x, codebook).numpy(), nearest(x, codebook.prototypes))


def test_one_vector() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert fit_product(x, 2, 2).prototypes.tolist() == [[[1, 2], [1, 2]], [[3, 4], [3, 4]]]


@pytest.mark.parametrize(("inputs", "subspaces", "nearest_"), [(12, 5, "4, 6"), (7, 3, "1, 7"), (64, 15, "8, 16")])
def test_inputs_that_do_not_divide_are_refused(inputs: int, subspaces: int, nearest_: str) -> None:
    message = f"{inputs} inputs do not divide into {subspaces} subspaces; .*: {nearest_}$"
    with pytest.raises(ValueError, match=message):
        fit_product(torch.zeros(3, inputs), subspaces, 2)


def test_other_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="no vectors"):
        fit_product(torch.zeros(0, 4), 2, 2)
    with pytest.raises(ValueError, match="not finite"):
        fit_product(torch.full((2, 4), torch.nan), 2, 2)
    with pytest.raises(ValueError, match="entries=300 is out of range"):
        fit_product(torch.zeros(3, 4), 2, 300)
    with pytest.raises(ValueError, match="6 values do not fit a codebook of 2 x 2"):
        encode(torch.zeros(3, 6), TINY)
    with pytest.raises(ValueError, match="6 inputs does not fit a codebook of 2 x 2"):
        build_tables(torch.zeros(3, 6), TINY)


# ---- encode, decode, tables ------------------------------------------------------------------------------------------

VALUES = st.floats(-(2.0**60), 2.0**60, width=32) | st.integers(-3, 3).map(float)


@given(st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=5), st.integers(1, 6), st.data())
def test_every_code_is_that_of_the_nearest_prototype(
    rows: list[list[float]], entries: int, data: st.DataObject
) -> None:
    x = torch.tensor(rows)
    flat = data.draw(st.lists(VALUES, min_size=entries * 4, max_size=entries * 4))
    codebook = ProductCodebook(torch.tensor(flat).reshape(2, entries, 2))
    codes, best = encode(x, codebook), nearest(x, codebook.prototypes)

    def distances(codes: torch.Tensor) -> np.ndarray:
        error = x.numpy().astype(np.longdouble) - decode(codes, codebook).numpy()
        return (error.reshape(-1, 2, 2) ** 2).sum(axis=2)

    assert np.allclose(distances(codes), distances(torch.from_numpy(best)), rtol=1e-14, atol=0)


@given(st.lists(st.integers(-2, 2), min_size=12, max_size=12), st.lists(st.integers(-2, 2), min_size=8, max_size=8))
def test_ties_go_to_the_lowest_index(values: list[int], prototypes: list[int]) -> None:
    x, p = torch.tensor(values).float().reshape(3, 4), torch.tensor(prototypes).float().reshape(2, 2, 2)
    assert np.array_equal(encode(x, ProductCodebook(p)).numpy(), nearest(x, p))


def test_chunks_and_256_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = torch.randn(101, 6), ProductCodebook(torch.randn(3, 256, 2))
    whole = encode(x, codebook)
    assert whole.dtype == torch.uint8
    assert np.array_equal(whole.numpy(), nearest(x, codebook.prototypes))
    for size in (1, 3 * 256 * 10):
        monkeypatch.setattr(product, "CHUNK_DISTANCES", size)
        assert torch.equal(encode(x, codebook), whole)


def test_no_vectors_and_no_outputs() -> None:
    codes = encode(torch.zeros(0, 4), TINY)
    assert codes.shape == (0, 2)
    assert decode(codes, TINY).shape == (0, 4)
    assert aggregate(codes, build_tables(torch.zeros(3, 4), TINY)).shape == (0, 3)


def test_by_hand() -> None:
    x = torch.tensor([[0.4, 0.2, 3.0, 3.0], [1.9, 9.0, 0.0, 0.0]])
    codes = encode(x, TINY)
    assert codes.tolist() == [[0, 1], [1, 0]]
    assert decode(codes, TINY).tolist() == [[0, 0, 4, 0], [2, 2, 1, -1]]
    tables = build_tables(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), TINY)
    assert tables.tolist() == [[[0], [6]], [[-1], [12]]]
    assert aggregate(codes, tables).tolist() == [[12], [5]]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(1, 7), st.integers(1, 6))
def test_aggregate_is_the_product_of_decoded_vectors(
    subspaces: int, entries: int, width: int, outputs: int, rows: int
) -> None:
    codebook = ProductCodebook(torch.randn(subspaces, entries, width))
    codes = torch.randint(0, entries, (rows, subspaces)).to(torch.uint8)
    weight = torch.randn(outputs, subspaces * width)
    expected = decode(codes, codebook).double() @ weight.double().T
    got = aggregate(codes, build_tables(weight, codebook))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-5)
    double = ProductCodebook(codebook.prototypes.double())
    torch.testing.assert_close(aggregate(codes, build_tables(weight, double)), expected, rtol=1e-12, atol=1e-12)


# ---- gradients, storage ----------------------------------------------------------------------------------------------


def test_gradients_are_those_of_indexing_and_of_the_identity() -> None:
    rows = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    prototypes = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    codes, weight = torch.randint(0, 4, (20, 3)).to(torch.uint8), torch.randn(20, 6, dtype=torch.float64)
    y = product_ste(rows, prototypes, codes)
    (y.sin() * weight).sum().backward()
    leaf = prototypes.detach().clone().requires_grad_()
    indexed = torch.cat([leaf[s][codes[:, s].long()] for s in range(3)], dim=1)
    (expected,) = torch.autograd.grad((indexed.sin() * weight).sum(), leaf)
    assert torch.equal(y, indexed)
    torch.testing.assert_close(prototypes.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.grad, indexed.detach().cos() * weight)


def test_only_uint8_is_kept_and_dtypes_are_kept_apart() -> None:
    kept: list[torch.Tensor] = []
    rows, prototypes = torch.randn(7, 4).half().requires_grad_(), TINY.prototypes.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = product_ste(rows, prototypes, encode(rows, TINY))
    assert [(t.dtype, t.shape) for t in kept] == [(torch.uint8, (7, 2))]
    y.sum().backward()
    assert y.dtype == torch.half
    assert prototypes.grad is not None
    assert prototypes.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "subspaces", "entries", "bits"),
    [((256, 64), 16, 16, 1 + 2), ((2**20, 8), 1, 256, 1 + 2**-7), ((1024, 6), 2, 5, 1 + 5 / 32)],
)
def test_storage(shape: tuple[int, int], subspaces: int, entries: int, bits: float) -> None:
    assert storage_bits(shape, subspaces, entries) == pytest.approx(bits)
