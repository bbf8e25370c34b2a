"""In a distributed run, processes take turns in networks whose own code decides what runs (`qat.processes.Turns`).

In a recording every quantizer runs whenever it is called, in all processes alike. Code that was left to Python may lead
the part of the batch that one process has past a quantizer that another's part reaches.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.modes import quantizers
from qat.processes import Turns, begin_turns, end_turns
from qat.recompute import recomputing


def keep_in_turn(net: nn.Module) -> None:
    """Let every forward of a prepared network, whose `meta` is known, begin and end the turns of its quantizers."""
    net.register_forward_pre_hook(_begin)
    net.register_forward_hook(_end, always_call=True)


def _begin(net: nn.Module, args: Any) -> None:
    if not recomputing():
        begin_turns(lambda: _turns(net))


def _end(net: nn.Module, args: Any, output: Any) -> None:
    if not recomputing():
        end_turns()


@contextmanager
def noting_order(net: nn.Module) -> Iterator[dict[str, int]]:
    """Note in which order quantizers run: name -> number, complete when what is inside has run the network."""
    order: dict[str, int] = {}

    def note(name: str, *_: Any) -> None:
        order.setdefault(name, len(order))

    handles = [quantizer.register_forward_hook(partial(note, name)) for name, quantizer in quantizers(net)]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _turns(net: Any) -> Turns | None:
    """The turns of what is exchanged in a forward: None where nothing is, so that processes need not be in step."""
    order = net.meta["qat"]["order"]
    in_order = sorted(quantizers(net), key=lambda pair: order.get(pair[0], len(order)))
    moving = [quantizer for _, quantizer in in_order if _exchanges(quantizer)]
    if not moving:
        return None
    absent: dict[Hashable, Callable[[], None]] = {
        (q.observer, site): _Absent(q, site) for q in moving for site in range(q.sites)
    }
    return Turns(absent, moving[0].progress.device)


def _exchanges(quantizer: FakeQuantize) -> bool:
    """Whether its observer, if it runs now, takes in what all processes have."""
    if not quantizer.observes:
        return False
    observes = quantizer.mode is Mode.observe and (quantizer.training or quantizer.observer.ordered)
    return observes or quantizer.follows


class _Absent:
    """A process takes part in an exchange of a quantizer that did not run in it."""

    def __init__(self, quantizer: FakeQuantize, site: int) -> None:
        self.quantizer, self.site = quantizer, site

    @torch.no_grad()
    def __call__(self) -> None:
        quantizer, observer = self.quantizer, self.quantizer.observer
        rows, device = observer.options.rows, quantizer.progress.device
        nothing = torch.empty(rows, 0, dtype=torch.float32, device=device)
        observer.update(nothing, self.site, relu=quantizer.relu, together=True)
        if quantizer.follows:
            quantizer.set_range_from_observer()
