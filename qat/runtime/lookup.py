"""Rows of a stored table by their index: embeddings, and bags of them.

Codes are looked up and only what was found is dequantized, so that a large table stays small in memory.
"""

from typing import Any

import torch
from torch import Tensor

from qat.numerics.granularity import from_rows, rows_of
from qat.runtime.grid import Quantize, storage_dtype
from qat.runtime.layers import RuntimeLayer
from qat.runtime.stored import ProductConv, TableConv


class LooksUp(RuntimeLayer):
    """Base.

    Attributes:
        pooling: how the rows of a bag become one: `mode`, `include_last_offset` and `padding_idx` of `nn.EmbeddingBag`,
            and whether the layer is given `offsets`, and weights of the samples (`weighted`). None keeps rows apart.
    """

    pooling: dict[str, Any] | None

    @property
    def ragged(self) -> bool:
        """Whether bags differ in size, so that there are not as many samples as results."""
        return self.pooling is not None and bool(self.pooling["offsets"])

    def rows(self, indices: Tensor) -> Tensor:
        """Indices of any shape -> real numbers [*shape, values]."""
        raise NotImplementedError

    def forward(self, indices: Tensor, *others: Tensor) -> Tensor:
        """Indices, then offsets and weights if `pooling` has them -> float32, or integers of the output's grid."""
        rows = self.rows(indices)
        return self.emit(rows if self.pooling is None else pool(rows, indices, others, self.pooling))


class LookUp(LooksUp):
    """A table of floats, or of integers with a scale for each row or group of a row.

    Args:
        weight_shape: [rows, values].
        weight_bounds, group_size, weight_step: as in `FloatConv`.
        pooling: as in the base.
        output: grid of the result.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self, weight_shape: list[int], weight_bounds: list[int] | None = None, group_size: int | None = None,
        weight_step: int = 1, pooling: dict[str, Any] | None = None, output: Quantize | None = None,
    ) -> None:  # fmt: skip
        super().__init__(output)
        self.weight_bounds, self.group_size, self.weight_step = weight_bounds, group_size, weight_step
        self.pooling = pooling
        dtype = torch.float32 if weight_bounds is None else storage_dtype(weight_bounds[0], weight_bounds[1])
        self.register_buffer("weight", torch.zeros(weight_shape, dtype=dtype))
        if weight_bounds is not None:
            rows, values = weight_shape
            shape = (rows,) if group_size is None else (rows, -(-values // group_size))
            self.register_buffer("weight_scale", torch.ones(shape))
            self.register_buffer("weight_zero_point", torch.zeros(shape, dtype=torch.int32))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {
            "weight_shape": list(self.weight.shape), "weight_bounds": self.weight_bounds,
            "group_size": self.group_size, "weight_step": self.weight_step, "pooling": self.pooling,
        }  # fmt: skip

    def rows(self, indices: Tensor) -> Tensor:  # noqa: D102
        found = self.weight[indices]
        if self.weight_bounds is None:
            return found
        values = found.shape[-1]
        codes = rows_of(found.reshape(-1, values), self.group_size).float()
        scale, zero = (t[indices].reshape(-1, 1) for t in (self.weight_scale, self.weight_zero_point))
        return from_rows((codes - zero) * scale, (indices.numel(), values)).reshape(found.shape)


class TableLookUp(LooksUp, TableConv):
    """A table whose values are codes for levels (`TableConv`)."""

    def __init__(self, *args: Any, pooling: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.pooling = pooling
        del self.gain, self.bias  # nothing is added to what is looked up

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"pooling": self.pooling}

    def rows(self, indices: Tensor) -> Tensor:  # noqa: D102
        return self.float_rows(indices.reshape(-1)).reshape(*indices.shape, self.weight_shape[1])


class ProductLookUp(LooksUp, ProductConv):
    """A table whose rows are made of prototypes (`ProductConv`)."""

    def __init__(self, *args: Any, pooling: dict[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.pooling = pooling
        del self.gain, self.bias

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"pooling": self.pooling}

    def rows(self, indices: Tensor) -> Tensor:  # noqa: D102
        return self.float_rows(indices.reshape(-1)).reshape(*indices.shape, self.weight_shape[1])


def pool(rows: Tensor, indices: Tensor, others: tuple[Tensor, ...], pooling: dict[str, Any]) -> Tensor:
    """One row a bag, as `torch.nn.functional.embedding_bag` makes it; an empty bag is zeros.

    Args:
        rows: shape [bags, size, values], or [samples, values] with offsets.
        indices: shape [bags, size] or [samples]; where they are `padding_idx` the row does not count.
        others: offsets (of each bag's first sample) and weights (of `indices`' shape), if `pooling` has them.
        pooling: see `LooksUp`.

    Returns:
        shape [bags, values].
    """
    given = dict(zip([name for name in ("offsets", "weighted") if pooling[name]], others, strict=True))
    flat = rows.reshape(-1, rows.shape[-1])
    if "offsets" in given:
        starts = given["offsets"][:-1] if pooling["include_last_offset"] else given["offsets"]
        places = torch.arange(len(indices), device=indices.device, dtype=starts.dtype)
        bags, bag = len(starts), torch.searchsorted(starts, places, right=True) - 1
    else:
        bags, size = indices.shape
        bag = torch.arange(bags, device=indices.device).repeat_interleave(size)
    if "weighted" in given:
        flat = flat * given["weighted"].reshape(-1, 1)
    padding = pooling["padding_idx"]
    counts = torch.ones(len(flat), 1, device=flat.device)
    if padding is not None:
        counts = (indices.reshape(-1, 1) != padding).float()
    total = torch.zeros(bags, 1, device=flat.device).index_add_(0, bag, counts)
    zeros = torch.zeros(bags, flat.shape[1], device=flat.device)
    if pooling["mode"] == "max":
        least = torch.full_like(flat, -torch.inf)
        counting = torch.where(counts > 0, flat, least)
        largest = zeros.scatter_reduce(0, bag.unsqueeze(1).expand_as(flat), counting, "amax", include_self=False)
        return torch.where(total > 0, largest, zeros)
    summed = zeros.index_add(0, bag, flat * counts)
    return summed / total.clamp(min=1) if pooling["mode"] == "mean" else summed
