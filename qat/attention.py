"""Attention in steps, for a call that does it all in one: the inputs of its two products can then be quantized."""

import torch
from torch import Tensor


def causal(scores: Tensor) -> Tensor:
    """Scores [..., queries, keys] with minus infinity where a key comes after the query."""
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -torch.inf)


def add_mask(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [..., queries, keys] plus a float mask, or minus infinity where a boolean one is false."""
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def mask_out(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores [..., heads, queries, keys] plus a float mask, or minus infinity where a boolean one is true.

    Args:
        scores: of one sequence, or of a batch.
        mask: broadcasts against the scores; [batch * heads, queries, keys] is one for each head of a batch.
    """
    if mask.dim() == 3 and scores.dim() == 4:
        mask = mask.reshape(scores.shape)
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
