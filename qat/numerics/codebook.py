"""Scalar codebooks: every weight is one of a few shared values, which lie where the weights are (non-uniform).

    index = nearest entry of the row's codebook        value = codebook[row, index]

Indices are stored in few bits, the entries beside them in float32.

Source: Han et al. 2016, "Deep Compression", section 3 (weight sharing by k-means, centroids trained further).
"""

import warnings
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 256
"""Most entries that a codebook may have: indices are uint8."""
EXACT_VALUES = 2**16
"""k-means runs on all distinct values of a row up to this many, and on a histogram of them above."""
BINS = 2**13
"""Bins of equal width, and of equal count, of which that histogram is the common refinement."""

Floats = NDArray[np.float64]


def fit_codebook(
    rows: Tensor, entries: int, *, seed: int = 0, start: Literal["linear", "k-means++"] = "linear",
    real: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """k-means of the values of each row, starting from entries evenly spaced between the row's ends.

    It minimises the sum of `|w - c|^2` over all clusters (Han et al. 2016, "Deep Compression", equation 2). The linear
    start keeps entries for the few large weights, which matter most (section 3.2 there). With many entries it ends in a
    poor optimum where there are far more small weights than large ones: on a million Gaussian values, with 4, 16, 64
    and 256 entries, its squared error is 1.0, 1.0, 1.4 and 2.4 times that of `k-means++`.

    A row with more than `EXACT_VALUES` distinct values is replaced by a weighted histogram, so that the cost a row is
    bounded. Its bins are narrow in width and in count (at most 1 / `BINS` of the range, and of the distinct values), so
    neither a bulk of small values nor a far outlier is blurred; each bin is represented by the mean of its values.

    Args:
        rows: float, shape [rows, values].
        entries: values a row may take, 1 to 256.
        seed: of the random start; the result is the same for the same seed, on any number of threads.
        start: first entries, `linear` or at random among the values (Arthur & Vassilvitskii 2007).
        real: which values count, bool, shape of `rows`; the others fill a short row. None for all.

    Returns:
        float32, shape [rows, entries], ascending. A row of at most `entries` distinct values gets exactly these, the
        largest repeated; a row without values gets zeros.

    Raises:
        ValueError: entries out of range, or NaN or infinity among the rows.

    >>> fit_codebook(torch.tensor([[-1.0, -0.8, 0.1, 0.3, 0.2, 2.0]]), 3)
    tensor([[-0.9000,  0.2000,  2.0000]])
    """
    check_entries(entries)
    check_finite(rows, "fit_codebook")
    codebook = torch.zeros(rows.shape[0], entries, dtype=torch.float32)
    if rows.shape[1] == 0:
        return codebook.to(rows.device)
    with one_thread():
        for i, row in enumerate(rows.detach().float().cpu().numpy().astype(np.float64)):
            row = row if real is None else row[real[i].cpu().numpy()]
            values, counts = _histogram(*np.unique(row, return_counts=True))
            linear = np.linspace(values[0], values[-1], entries)[:, None]
            centres = k_means(values[:, None], counts, entries, linear if start == "linear" else start, seed)
            codebook[i] = torch.from_numpy(_means(values, counts, np.sort(centres[:, 0])))
    return codebook.to(rows.device)


def assign(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the entry nearest to each value; of two that are equally near, the lower index.

    Binary search among the midpoints of neighbouring entries: no [values, entries] distances are made.

    Args:
        rows: float, shape [rows, values]; read as float32.
        codebook: shape [rows, entries], in any order (training moves entries past each other).

    Returns:
        uint8, shape [rows, values].

    >>> assign(torch.tensor([[-3.0, 0.5, 0.6, 9.0]]), torch.tensor([[1.0, 0.0, 2.0]])).tolist()
    [[1, 0, 0, 2]]
    """
    ordered, order = codebook.detach().float().sort(dim=1, stable=True)
    first = torch.searchsorted(ordered, ordered)  # equal entries: all go to the one of lowest index
    owner = order.gather(1, first)
    doubled = ordered.double()  # float64 holds the midpoint of two float32 numbers, which float32 may not
    middle = doubled[:, :-1] / 2 + doubled[:, 1:] / 2
    limit = _largest_float32(middle, below=owner[:, :-1] > owner[:, 1:])
    position = torch.searchsorted(limit, rows.detach().float().contiguous())
    return owner.to(torch.uint8).gather(1, position)


def look_up(indices: Tensor, codebook: Tensor) -> Tensor:
    """`codebook[row, index]`, shape and rows of `indices`, dtype of `codebook`.

    >>> look_up(torch.tensor([[2, 0, 2]], dtype=torch.uint8), torch.tensor([[0.5, 1.0, 4.0]])).tolist()
    [[4.0, 0.5, 4.0]]
    """
    return codebook.gather(1, indices.long())


def codebook_ste(rows: Tensor, codebook: Tensor, indices: Tensor) -> Tensor:
    """`look_up(indices, codebook)` in the dtype of `rows`, with gradients to both.

    To `rows` straight through, d y / d rows = 1; to an entry, the sum of the gradients of all values assigned to it
    (Han et al. 2016, eq. 3). Only the uint8 indices are kept for the backward pass.

    Args:
        rows: the float values that `indices` stand for, shape [rows, values].
        codebook: shape [rows, entries].
        indices: uint8 of `assign`, shape [rows, values].
    """
    return _LookUp.apply(rows, codebook, indices)


def storage_bits(shape: tuple[int, int], entries: int, entry_bits: int = 32) -> float:
    """Bits a weight, table included: Han et al. 2016, section 3, with whole bits an index.

    Args:
        shape: rows and values a row.
        entries: of each row's codebook.
        entry_bits: of each entry.

    >>> storage_bits((1, 16), 4)  # the paper's example: 16 weights of 2 bits and 4 floats for 16 floats, 3.2 x less
    10.0
    """
    values = shape[1]
    return (entries - 1).bit_length() + (entries * entry_bits / values if values else 0.0)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, codebook, indices):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(indices)
        ctx.entries, ctx.dtype = codebook.shape[1], codebook.dtype
        return look_up(indices, codebook).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (indices,) = ctx.saved_tensors
        grad_codebook = None
        if ctx.needs_input_grad[1]:
            grad_codebook = grad.new_zeros(grad.shape[0], ctx.entries, dtype=ctx.dtype)
            grad_codebook.scatter_add_(1, indices.long(), grad.to(ctx.dtype))
        return grad, grad_codebook, None


def _largest_float32(x: Tensor, below: Tensor) -> Tensor:
    """Largest float32 number <= x (< x where `below`), so that comparing float32 values with it is exact."""
    y = x.float()
    over = torch.where(below, y.double() >= x, y.double() > x)
    return torch.where(over, torch.nextafter(y, torch.full_like(y, -torch.inf)), y)


def _histogram(values: Floats, counts: NDArray[np.int64]) -> tuple[Floats, NDArray[np.int64]]:
    """Ascending distinct values and their counts, condensed where there are many."""
    if len(values) <= EXACT_VALUES:
        return values, counts
    width = np.floor((values - values[0]) / (values[-1] - values[0]) * BINS)
    rank = np.arange(len(values)) * BINS // len(values)
    starts = np.flatnonzero(np.r_[True, (np.diff(width) > 0) | (np.diff(rank) > 0)])
    condensed = np.add.reduceat(counts, starts)
    return np.add.reduceat(values * counts, starts) / condensed, condensed


def _means(values: Floats, counts: NDArray[np.int64], centres: Floats) -> Floats:
    """Means of the values nearest to each of the ascending centres, which stay in order; a centre of none stays.

    scikit-learn adds up distances from the mean of all values: next to an outlier, small centres come out rounded.
    """
    nearest = np.searchsorted(centres[:-1] / 2 + centres[1:] / 2, values)
    total = np.bincount(nearest, counts, len(centres))
    means = np.bincount(nearest, values * counts, len(centres)) / np.maximum(total, 1)
    return np.where(total > 0, means, centres.clip(values[0], values[-1]))


# ---- k-means, for codebooks and product codes -----------------------------------------------------------------------


def k_means(
    points: Floats, counts: NDArray[np.int64], entries: int, start: Floats | Literal["k-means++"], seed: int,
    mini_batch: bool = False,
) -> Floats:  # fmt: skip
    """Centres of weighted points; no more distinct points than entries are their own centres, the last repeated.

    Args:
        points: distinct, shape [points, width].
        counts: weight of each, shape [points].
        entries: how many centres.
        start: first centres, shape [entries, width], or the name of scikit-learn's way to choose them.
        seed: of that choice.
        mini_batch: approximate, for many points.

    Returns:
        shape [entries, width].
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(points) <= entries:
        return points[np.minimum(np.arange(entries), len(points) - 1)]
    settings: dict[str, Any] = {"n_clusters": entries, "init": start, "n_init": 1, "random_state": seed}
    fit = MiniBatchKMeans(**settings, batch_size=4096) if mini_batch else KMeans(**settings, tol=0.0)
    with warnings.catch_warnings():
        # Points can be distinct and yet too close to tell apart next to a far outlier: fewer centres then do as well.
        warnings.simplefilter("ignore", ConvergenceWarning)
        centres: Floats = fit.fit(points, sample_weight=counts).cluster_centers_
    return centres


def one_thread() -> Any:
    """Context in which k-means adds up in one order: threads would add in the order in which they finish."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


def check_entries(entries: int) -> None:
    """Raise ValueError unless `entries` indices fit a uint8."""
    if not 1 <= entries <= LARGEST:
        raise ValueError(f"entries={entries} is out of range (1 to {LARGEST}: indices are stored in 8 bits)")


def check_finite(x: Tensor, where: str) -> None:
    """Raise ValueError where values are NaN or infinite."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{where}: {bad} of {x.numel()} values are not finite")
