"""The places of a pooling's maxima: what `return_indices=True` returns beside them."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from qat.attention import one_operation


@one_operation
def max_places(
    input: Tensor, kernel_size: Sequence[int], stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, ceil_mode: bool = False,
) -> Tensor:  # fmt: skip
    """Where each maximum of a max pooling stands, counted along all pooled dimensions of the input: int64.

    Args:
        input: real numbers; of equal ones the first is the maximum.
        kernel_size: one a dimension, which says how many are pooled.
        stride, padding, dilation, ceil_mode: as in `torch.nn.functional.max_pool2d`.
    """
    pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel_size) - 1]
    places: Tensor = pool(input, tuple(kernel_size), stride, padding, dilation, ceil_mode, return_indices=True)[1]
    return places
