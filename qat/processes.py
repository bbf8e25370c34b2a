"""What the processes of a distributed run tell each other, so that all quantize alike.

In training processes are in step, and what an observer takes in is exchanged at once: a collective call a quantizer and
step, of two numbers a range for extremes. As with SyncBatchNorm, a quantizer has to run in all processes or in none.
Outside a distributed run nothing here does anything.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

_alone = False


def several() -> bool:
    """Whether there are other processes to tell."""
    return (
        not _alone and distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    )


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process exchanges nothing: for what one of several processes does by itself."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def largest(x: Tensor) -> Tensor:
    """The largest of all processes' values, entry by entry, shape of `x`."""
    if not several():
        return x
    x = x.clone()
    distributed.all_reduce(x, distributed.ReduceOp.MAX)
    return x


def gather(x: Tensor) -> list[Tensor]:
    """Every process's tensor, in their order; all have one shape and dtype."""
    if not several():
        return [x]
    results = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(results, x.contiguous())
    return results


def agree(value: bool, device: torch.device) -> tuple[bool, bool]:
    """(whether it is true in all processes, whether it is in any)."""
    if not several():
        return value, value
    none, some = (bool(t) for t in largest(torch.tensor([float(not value), float(value)], device=device)))
    return not none, some
