"""Run batches with observers on, then take ranges from what they saw."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat import processes
from qat.layers import weights_of
from qat.mode import Mode
from qat.modes import eval_mode, quantizers, set_mode, watch
from qat.record import run
from qat.structures import tensors

log = logging.getLogger(__name__)


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Any]) -> None:
    """Set every range from data and leave the network in mode `quantize`.

    In a distributed run every process calls it with its share of the batches, and all get the ranges of one process
    that sees everything; the shares may differ in number, unless a moving average (observer `ema`) is among the
    observers. Inside `qat.processes.alone()` a process calibrates by itself.

    Args:
        net: a prepared network. It runs in eval mode (BatchNorm statistics do not move).
        batches: inputs, each a tensor, a tuple of the network's arguments or a dict of its keyword arguments. Training
            data without augmentation; a few hundred samples do.

    Raises:
        ValueError: no batches, or NaN or infinity in a batch (names the batch), a weight or an activation (names the
            tensor).
        RuntimeError: a quantizer saw no data (its branch never ran), or calibration failed in another process.
    """
    weights = weights_of(net)
    modes = {quantizer: quantizer.mode for _, quantizer in quantizers(net)}
    for _, quantizer in quantizers(net):
        quantizer.observer.reset()
        quantizer.mode = Mode.float if quantizer in weights else Mode.observe
    ordered = any(q.observer.ordered and q not in weights for _, q in quantizers(net))
    device = next((t.device for t in (*net.parameters(), *net.buffers())), torch.device("cpu"))
    try:
        with eval_mode(net), _told(device):
            count = 0
            for batch in _in_step(batches, device) if ordered else batches:
                _check_finite(batch, count)
                watch(net)
                run(net, batch)
                count += 1
        if not processes.agree(count > 0, device)[1]:
            raise ValueError("calibration needs at least one batch of inputs, got none")
        for _, quantizer in quantizers(net):
            if quantizer not in weights and not quantizer.observer.ordered:
                quantizer.observer.synchronize()
        for name, quantizer in quantizers(net):
            try:
                if quantizer in weights:
                    quantizer.set_range_from(weights[quantizer])
                else:
                    quantizer.set_range_from_observer()
            except RuntimeError as error:
                raise RuntimeError(f"quantizer '{name}': {error}") from None
    except BaseException:
        for quantizer, mode in modes.items():
            quantizer.mode = mode
        raise
    set_mode(net, Mode.quantize)
    log.info("calibrated: ranges of %d quantizers from %d batches", len(modes), count)


@contextmanager
def _told(device: torch.device) -> Iterator[None]:
    """Let no process wait for one in which an exception was raised: at the end all know, and all raise."""
    try:
        yield
    except Exception:
        processes.agree(True, device)
        raise
    if processes.agree(False, device)[1]:
        raise RuntimeError("calibration failed in another process; see its message")


def _in_step(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches, as long as every process has one."""
    iterator, end = iter(batches), object()
    while True:
        batch: Any = next(iterator, end)
        everyone, anyone = processes.agree(batch is not end, device)
        if not anyone:
            return
        if not everyone:
            raise ValueError(
                "observer=ema averages batch by batch, and the processes of this run have different numbers of "
                "calibration batches; give each the same number, or use observer=minmax"
            )
        yield batch


def _check_finite(batch: Any, count: int) -> None:
    for x in tensors(batch):
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"calibration batch {count} holds {bad} non-finite values")
