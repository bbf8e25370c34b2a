"""Views of a tensor in which every row has one scale."""

import torch
from torch import Tensor


def rows_of(x: Tensor, group_size: int | None) -> Tensor:
    """View a weight as rows that share a scale: output channels, or groups of inputs of an output channel.

    Args:
        x: shape [out, ...].
        group_size: None for one row an output channel; else the number of consecutive inputs (of the flattened rest)
            in a row. A last group that is shorter is filled with zeros, which every grid holds exactly.

    Returns:
        shape [out, inputs], or [out * groups, group_size].

    >>> rows_of(torch.ones(2, 5), 4).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    """
    flat = x.reshape(x.shape[0], -1)
    if group_size is None:
        return flat
    return torch.nn.functional.pad(flat, (0, -flat.shape[1] % group_size)).reshape(-1, group_size)


def from_rows(rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Inverse of `rows_of`: back to a weight of shape `shape`, padding dropped."""
    flat = rows.reshape(shape[0], -1)
    inputs = 1
    for size in shape[1:]:
        inputs *= size
    return flat[:, :inputs].reshape(shape)


def group_count(shape: torch.Size | tuple[int, ...], group_size: int) -> int:
    """Groups in each output channel of a weight of shape `shape`."""
    inputs = 1
    for size in shape[1:]:
        inputs *= size
    return -(-inputs // group_size)
