"""The way from a prepared network to its files, once before anything is trained: who refuses at the end refuses now."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from qat.export import export
from qat.export.formats import EXPORTERS
from qat.lower import lower
from qat.processes import alone
from qat.ptq import PTQConfig, finalize
from qat.refusals import Refusals

log = logging.getLogger(__name__)

STEPS = PTQConfig(bias_correction=False, adaptive_rounding_steps=0)
"""Of the PTQ step, what gives every tensor a grid."""


def rehearse(prepared: nn.Module, example: Tensor, formats: Sequence[str], *, skip_impossible: bool) -> None:
    """Calibrate on the example, lower, and write every file into a folder that is thrown away.

    It leaves no trace but what it says: random state is as before. In a distributed run, where nothing connects the
    processes yet, each does it by itself: all come to the same end, and none waits for another.

    Args:
        prepared: the network with any weights; a copy, as its ranges and biases change.
        example: two inputs.
        formats: keys of EXPORTERS.
        skip_impossible: say of a file that cannot hold the network that it will not be written, and go on.

    Raises:
        ValueError: what the target or the files cannot hold: every layer, with the format, the reason and what to do.
    """
    formats = [name for name in formats if not EXPORTERS[name].of_prepared]
    if not formats:  # the network's own code runs: `check_network` has said what there is to say
        return
    with _without_trace(), tempfile.TemporaryDirectory(prefix="qat-rehearsal-") as folder:
        finalize(prepared, [example], STEPS, trained=False)
        network, refusals = lower(prepared), Refusals()
        for name in formats:
            exporter, here = EXPORTERS[name], Refusals()
            with here.noted(), torch.no_grad():
                if exporter.refuse is not None:
                    exporter.refuse(network, (example,))
                else:
                    export(network, folder, example, [name])
            for message in here.messages:
                if skip_impossible:
                    log.warning("No %s file will be written. %s", exporter.label, message)
                else:
                    refusals.messages.append(f"export.formats={name}: {message}")
        refusals.raise_any()


@contextmanager
def _without_trace() -> Iterator[None]:
    """Inside, nothing that is told only in passing; afterwards the random state of before."""
    logger = logging.getLogger("qat")
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        with alone(), isolate_rng(include_cuda=torch.cuda.is_initialized()):
            yield
    finally:
        logger.setLevel(level)
