"""What the processes of a distributed run tell each other, so that all quantize alike.

In training processes are in step, and what an observer takes in is exchanged at once: a collective call a quantizer and
step, of two numbers a range for extremes. Where a network's own code decides what runs, a quantizer may run in some
processes only; then they take turns (`Turns`). Outside a distributed run nothing here does anything.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

_alone = False
_turns: "Turns | None" = None


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


class Turns:
    """What processes exchange in a forward that may lead each of them to other places.

    Before an exchange all tell at which place they are. Those at the first one make it; the others, who did not come
    there, or will not, take part in it with nothing. So nobody waits for a process that has gone elsewhere, and all end
    with the same state. It takes a collective call of one number, whose answer is waited for, an exchange and one in
    the end.

    Args:
        absent: place, in the order in which a process comes to them -> how it takes part with nothing.
        device: of the tensors that processes exchange.
    """

    def __init__(self, absent: Mapping[Hashable, Callable[[], None]], device: torch.device) -> None:
        self.order, self.absent = {place: i for i, place in enumerate(absent)}, list(absent.values())
        self.device, self.passing, self.depth = device, False, 1

    def take(self, place: Hashable) -> None:
        """Return when all processes make the exchange of this place."""
        self._reach(self.order[place])

    def end(self) -> None:
        """Take part in what the others still exchange, until none does."""
        self._reach(len(self.absent))

    def _reach(self, index: int) -> None:
        if self.passing:
            return
        while (first := self._first(index)) != index:
            self.passing = True
            try:
                self.absent[first]()
            finally:
                self.passing = False

    def _first(self, index: int) -> int:
        """The smallest of all processes' numbers."""
        first = torch.tensor(index, device=self.device)
        distributed.all_reduce(first, distributed.ReduceOp.MIN)
        return int(first)


def take_turn(place: Hashable) -> None:
    """Before an exchange: wait for one's turn, where processes take turns."""
    if _turns is not None and several():
        _turns.take(place)


def begin_turns(turns: Callable[[], Turns | None]) -> None:
    """Take turns from here to `end_turns`; within another beginning and end it is all one."""
    global _turns
    if not several():
        return
    if _turns is None:
        _turns = turns()
    else:
        _turns.depth += 1


def settle_turns() -> None:
    """Where every process comes, as in front of a backward pass: nobody is left behind, waiting for an exchange."""
    if _turns is not None and several():
        _turns.end()


def end_turns() -> None:
    """The end of what `begin_turns` began."""
    global _turns
    if _turns is None or not several():
        return
    _turns.depth -= 1
    if _turns.depth == 0:
        turns, _turns = _turns, None
        turns.end()
