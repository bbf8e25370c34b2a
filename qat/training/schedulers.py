"""Learning rates over the steps of training, made of torch's own schedulers."""

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

TOTAL = "total"
"""What stands for the number of training steps in a description of a scheduler."""


def with_total(description: Mapping[str, Any], total: int) -> dict[str, Any]:
    """A description of a scheduler with the number of training steps where it says `total`.

    >>> with_total({"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "total"}, 300)["T_max"]
    300
    """
    return {name: total if value == TOTAL else value for name, value in description.items()}


def cosine_warmup(optimizer: Optimizer, total: int, warmup: float | int = 0.05, start: float = 0.01) -> LRScheduler:
    """Rise linearly, then fall along a half cosine to the end of training.

    Args:
        optimizer: whose rates are scheduled.
        total: training steps.
        warmup: how long the rise takes, in steps (int) or as a share of training (float).
        start: share of the rate at the first step; above 0.

    Source: Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 2.2 (warm-up); Loshchilov and Hutter 2017,
    "SGDR", equation 5 (cosine).

    Raises:
        ValueError: a warm-up that is no step or share, or that leaves nothing of training.
    """
    steps = round(warmup * total) if isinstance(warmup, float) else warmup
    if not 0 <= steps < total:
        raise ValueError(
            f"scheduler.warmup={warmup} is {steps} of {total} training steps: give a step (int) or a share of training "
            f"(float in [0.0, 1.0)) before its end"
        )
    cosine = CosineAnnealingLR(optimizer, total - steps)
    if not steps:
        return cosine
    return SequentialLR(optimizer, [LinearLR(optimizer, start, total_iters=steps), cosine], milestones=[steps])
