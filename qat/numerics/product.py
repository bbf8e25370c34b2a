"""Product codes: a vector is cut into short parts, each of which is one of a few prototypes of its place.

    code[n, s] = nearest prototype of part s of x[n]
    x[n] ~ prototypes[0, code[n, 0]], then prototypes[1, code[n, 1]], ...

As a format of weights that is log2(entries) bits a part. As a format of activations it turns a product with a fixed
matrix into sums of table look-ups: the product of every prototype with every column is known beforehand.

Sources: Jegou et al. 2011, "Product Quantization for Nearest Neighbor Search"; for products Blalock & Guttag 2017,
"Bolt", and 2021, "Multiplying Matrices Without Multiplying" (MADDNESS). Codes here are exact nearest prototypes, as in
Bolt: to find one takes `entries * width` multiply-adds, which MADDNESS replaces by a tree of comparisons.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.numerics.codebook import check_entries, check_finite, k_means, one_thread

SAMPLE = 2**16
"""Vectors that prototypes are learned from, unless told."""
MINI_BATCH_WORK = 2**21
"""Distances in a step of k-means above which it works on mini-batches."""
CHUNK_DISTANCES = 2**21
"""Distances held at once while encoding, 8 bytes each."""


@dataclass(frozen=True, eq=False)
class ProductCodebook:
    """Prototypes of each part of a vector.

    Attributes:
        prototypes: float32, shape [subspaces, entries, width].
    """

    prototypes: Tensor

    @property
    def inputs(self) -> int:
        """Length of the vectors, subspaces * width."""
        return self.prototypes.shape[0] * self.prototypes.shape[2]


def fit_product(
    x: Tensor, subspaces: int, entries: int, *, seed: int = 0, sample: int | None = SAMPLE
) -> ProductCodebook:
    """k-means (k-means++ start) of each part of the vectors; on mini-batches where points and entries are many.

    Args:
        x: float, shape [vectors, inputs].
        subspaces: parts of equal width to cut a vector into.
        entries: prototypes of each part, 1 to 256. Where a part has fewer distinct values, these are its prototypes,
            the last repeated.
        seed: of the sample and of k-means; the result is the same for the same seed.
        sample: most vectors to learn from, drawn at random; None for all.

    Raises:
        ValueError: inputs that do not divide into the subspaces, no vectors, NaN or infinity, entries out of range.
    """
    check_entries(entries)
    _check_divides(x.shape[1], subspaces)
    if x.shape[0] == 0:
        raise ValueError("fit_product: no vectors to learn prototypes from")
    check_finite(x, "fit_product")
    x = x.detach().float()
    if sample is not None and x.shape[0] > sample:
        chosen = torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(seed))[:sample]
        x = x[chosen.to(x.device)]
    parts = x.reshape(x.shape[0], subspaces, -1).cpu().numpy().astype(np.float64)
    prototypes = torch.zeros(subspaces, entries, parts.shape[2], dtype=torch.float32)
    with one_thread():
        for s in range(subspaces):
            points, counts = np.unique(parts[:, s], axis=0, return_counts=True)
            many = len(points) * entries > MINI_BATCH_WORK
            centres = k_means(points, counts, entries, "k-means++", seed, mini_batch=many)
            prototypes[s] = torch.from_numpy(centres)
    return ProductCodebook(prototypes.to(x.device))


@torch.no_grad()
def encode(x: Tensor, codebook: ProductCodebook) -> Tensor:
    """Index of the nearest prototype of each part; of several that are equally near, the lowest.

    Distances are float64 and not expanded into squares and a product, so that no close decision is lost to rounding.
    Memory is bounded: `CHUNK_DISTANCES` at a time.

    Args:
        x: float, shape [vectors, inputs].
        codebook: of these inputs.

    Returns:
        uint8, shape [vectors, subspaces].

    >>> codebook = ProductCodebook(torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[5.0, 0.0], [0.0, 5.0]]]))
    >>> encode(torch.tensor([[0.9, 0.8, 1.0, 3.0]]), codebook).tolist()
    [[1, 1]]
    """
    prototypes = codebook.prototypes.double()
    subspaces, entries, width = prototypes.shape
    if x.shape[-1] != codebook.inputs:
        raise ValueError(f"vectors of {x.shape[-1]} values do not fit a codebook of {subspaces} x {width} inputs")
    codes = torch.empty(x.shape[0], subspaces, dtype=torch.uint8, device=x.device)
    rows = max(1, CHUNK_DISTANCES // (subspaces * entries))
    for chunk, result in zip(x.split(rows), codes.split(rows), strict=True):
        parts = chunk.double().reshape(-1, subspaces, width).transpose(0, 1)
        distances = torch.cdist(parts, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
        result.copy_(distances.argmin(dim=2).T)
    return codes


def decode(codes: Tensor, codebook: ProductCodebook) -> Tensor:
    """The vectors that codes stand for, shape [vectors, inputs], dtype of the prototypes.

    >>> codebook = ProductCodebook(torch.tensor([[[0.0, 0.0], [1.0, 1.0]], [[5.0, 0.0], [0.0, 5.0]]]))
    >>> decode(torch.tensor([[1, 0]], dtype=torch.uint8), codebook)
    tensor([[1., 1., 5., 0.]])
    """
    prototypes = codebook.prototypes
    return F.embedding(_flat(codes, prototypes.shape[1]), prototypes.flatten(0, 1)).flatten(1)


def part_means(x: Tensor, real: Tensor, codes: Tensor, codebook: ProductCodebook) -> ProductCodebook:
    """A step of k-means: each prototype becomes the mean of what it stands for, number by number, of what is `real`.

    Args:
        x: float, shape [vectors, inputs]; 0 where it is not `real`.
        real: which numbers count, bool, shape of `x`: the others fill short vectors.
        codes: uint8 of `encode`, shape [vectors, subspaces].
        codebook: keeps what stands for nothing.

    >>> x, real = torch.tensor([[1.0, 4.0], [2.0, 0.0]]), torch.tensor([[True, True], [True, False]])
    >>> one = ProductCodebook(torch.zeros(1, 1, 2))
    >>> part_means(x, real, torch.zeros(2, 1, dtype=torch.uint8), one).prototypes.tolist()
    [[[1.5, 4.0]]]
    """
    subspaces, entries, width = codebook.prototypes.shape
    index = _flat(codes, entries).flatten()
    empty = torch.zeros(subspaces * entries, width, dtype=torch.float64, device=x.device)
    total, count = (empty.index_add(0, index, t.double().reshape(-1, width)) for t in (x, real))
    means = (total / count.clamp(min=1)).float().reshape(codebook.prototypes.shape)
    return ProductCodebook(torch.where(count.reshape(means.shape) > 0, means, codebook.prototypes))


def build_tables(weight: Tensor, codebook: ProductCodebook) -> Tensor:
    """Dot product of every prototype with the part of every output's weights that it stands in front of.

    Args:
        weight: shape [out, inputs].
        codebook: of these inputs.

    Returns:
        shape [subspaces, entries, out].
    """
    prototypes = codebook.prototypes
    subspaces, _, width = prototypes.shape
    if weight.shape[1] != codebook.inputs:
        raise ValueError(f"a weight of {weight.shape[1]} inputs does not fit a codebook of {subspaces} x {width}")
    parts = weight.detach().to(prototypes.dtype).reshape(-1, subspaces, width)
    return torch.einsum("sew,osw->seo", prototypes, parts)


def aggregate(codes: Tensor, tables: Tensor) -> Tensor:
    """`decode(codes) @ weight.T` as a sum of one table row a subspace, shape [vectors, out].

    Args:
        codes: uint8, shape [vectors, subspaces].
        tables: of `build_tables`, shape [subspaces, entries, out].
    """
    return F.embedding_bag(_flat(codes, tables.shape[1]), tables.flatten(0, 1), mode="sum")


def product_ste(rows: Tensor, prototypes: Tensor, codes: Tensor) -> Tensor:
    """`decode(codes)` in the dtype of `rows`, with gradients to both: a weight in product codes that trains.

    To `rows` straight through; to a prototype, the sum of the gradients of all parts that it stands for. Only the uint8
    codes are kept for the backward pass.

    Args:
        rows: the float vectors that `codes` stand for, shape [vectors, inputs].
        prototypes: shape [subspaces, entries, width].
        codes: uint8 of `encode`, shape [vectors, subspaces].
    """
    return _Decode.apply(rows, prototypes, codes)


def storage_bits(shape: tuple[int, int], subspaces: int, entries: int, entry_bits: int = 32) -> float:
    """Bits a value: log2(entries), rounded up, a code, and the prototypes shared out among all vectors.

    Args:
        shape: vectors and inputs.
        subspaces: codes a vector.
        entries: prototypes of each subspace.
        entry_bits: of each number in a prototype.

    >>> storage_bits((256, 64), subspaces=16, entries=16)  # 4 bits for 4 values, and 16 float vectors for 256
    3.0
    """
    vectors, inputs = shape
    codes = (entries - 1).bit_length() * subspaces / inputs if inputs else 0.0
    return codes + (entries * entry_bits / vectors if vectors else 0.0)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, prototypes, codes):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(codes)
        ctx.shape, ctx.dtype = prototypes.shape, prototypes.dtype
        return decode(codes, ProductCodebook(prototypes)).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (codes,) = ctx.saved_tensors
        grad_prototypes = None
        if ctx.needs_input_grad[1]:
            subspaces, entries, width = ctx.shape
            flat = grad.new_zeros(subspaces * entries, width, dtype=ctx.dtype)
            flat.index_add_(0, _flat(codes, entries).flatten(), grad.reshape(-1, width).to(ctx.dtype))
            grad_prototypes = flat.reshape(ctx.shape)
        return grad, grad_prototypes, None


def _flat(codes: Tensor, entries: int) -> Tensor:
    """Codes as int32 row numbers of the tables of all subspaces, one below the other."""
    return codes.int() + torch.arange(codes.shape[1], dtype=torch.int32, device=codes.device) * entries


def _check_divides(inputs: int, subspaces: int) -> None:
    """Raise ValueError, naming both and the nearest divisors, unless `inputs` divide into `subspaces` equal parts."""
    if subspaces < 1 or inputs < 1 or inputs % subspaces:
        divisors = [d for d in range(1, inputs + 1) if inputs % d == 0]
        nearest = sorted(sorted(divisors, key=lambda d: abs(d - subspaces))[:2])
        raise ValueError(
            f"{inputs} inputs do not divide into {subspaces} subspaces; the nearest numbers that divide them: "
            f"{', '.join(map(str, nearest)) or 'none'}"
        )
