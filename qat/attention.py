"""Attention in steps, for a call that does it all in one: the inputs of its two products can then be quantized."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qat.numerics import codes


def one_operation(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a trace record a call as it is: what traces a network anew, as unpickling does, must find the same graph."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        given = (*args, *kwargs.values())
        if torch.overrides.has_torch_function(given):
            result: Tensor = torch.overrides.handle_torch_function(call, given, *args, **kwargs)
            return result
        return function(*args, **kwargs)

    return call


@one_operation
def causal(scores: Tensor) -> Tensor:
    """Scores [..., queries, keys] with minus infinity where a key comes after the query."""
    later = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    return scores + later  # not masked_fill: its backward would pass over them again


@one_operation
def add_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [..., queries, keys] plus a float mask, or minus infinity where a boolean one is false."""
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


@one_operation
def mask_out(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [..., heads, queries, keys] plus a float mask, or minus infinity where a boolean one is true.

    Args:
        scores: of one sequence, or of a batch.
        mask: broadcasts against the scores; [batch * heads, queries, keys] is one for each head of a batch.
    """
    if mask.dim() == 3 and scores.dim() == 4:
        mask = mask.reshape(scores.shape)
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


@one_operation
def matmul(input: Tensor, other: Tensor) -> Tensor:
    """`torch.matmul` of tensors of one dtype; for backward, of those on a grid their integers are kept."""
    return codes.matmul(input, other)
