"""Checkpoints to go on from: written between two steps, whole or not at all, by themselves and on request."""

import logging
import time
import zipfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from qat import stopping
from qat.export.files import atomic_file
from qat.training.callbacks import say
from qat.training.rows import CSVLogger

log = logging.getLogger(__name__)

LATEST, BEFORE = "step.ckpt", "step.before.ckpt"
"""Names of the newest checkpoint, and of the one before it."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoints, written to a temporary file in the same folder, synced and renamed."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the file, or leave what was there."""
        if storage_options is not None:
            raise TypeError(f"AtomicCheckpointIO writes to a local disk and takes no storage_options={storage_options}")
        with atomic_file(Path(path)) as file:
            torch.save(checkpoint, file)


class Resumable(L.Callback):
    """Keep checkpoints from which training goes on to the same end, to the bit, as if it had not been interrupted.

    They are written between two steps, when everything of the steps before was logged: at the start of each epoch,
    every few minutes, and when SIGINT or SIGTERM asks to stop (which then raises `Stopped`). The newest two are kept.
    Put it first among callbacks: what those behind it do in `on_train_batch_start` is done again after a restart.

    Args:
        dirpath: folder of the checkpoints.
        every_minutes: how much of a long epoch may be lost; None for any.
        every_steps: the same in optimizer steps.
        run: what to name as `ckpt_path=` to go on; None for the checkpoint.
    """

    def __init__(
        self, dirpath: str, every_minutes: float | None = 5.0, every_steps: int | None = None, run: str | None = None
    ) -> None:
        for name, value in {"every_minutes": every_minutes, "every_steps": every_steps}.items():
            if value is not None and value <= 0:
                raise ValueError(f"Resumable.{name}={value}: give a number above 0, or null for none")
        self.folder, self.run = Path(dirpath), run
        self.every_minutes, self.every_steps = every_minutes, every_steps
        self._training = False
        self._kept: Path | None = None
        self._saved_at, self._saved_step = 0.0, 0
        self._row_step: int | None = None
        self._waiting = ExitStack()
        self._group: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on a signal waits for the end of a step; what fails earlier leaves the checkpoints alone."""
        self._training = True
        self._kept = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")  # to agree on a step without waiting for a device
        self._waiting.enter_context(stopping.between_steps())
        stopping.listen()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps."""
        loop = trainer.fit_loop.epoch_loop
        if self._row_step is not None:  # Lightning counts one too many for a checkpoint that was written here
            loop._batches_that_stepped, self._row_step = self._row_step, None
        if batch_idx % trainer.accumulate_grad_batches:
            return  # a checkpoint holds no gradients
        due, signum = self._agreed(trainer, self._due(trainer, batch_idx))
        if due or signum:
            self._row_step = loop._batches_that_stepped
            self._save(trainer)
            self._row_step = None
        if signum:
            raise stopping.Stopped(signum)

    def on_validation_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """A long validation is not waited for: it is repeated from the last checkpoint."""
        if self._training and (signum := self._agreed(trainer, False)[1]):
            raise stopping.Stopped(signum)

    def _due(self, trainer: L.Trainer, batch_idx: int) -> bool:
        steps = trainer.global_step - self._saved_step
        if steps == 0:
            return False
        minutes = (time.monotonic() - self._saved_at) / 60
        return (
            batch_idx == 0
            or (self.every_steps is not None and steps >= self.every_steps)
            or (self.every_minutes is not None and minutes >= self.every_minutes)
        )

    def _agreed(self, trainer: L.Trainer, due: bool) -> tuple[bool, int]:
        """Whether to save, and the signal that asks to stop (0 for none), as the processes of a run agree."""
        signum = stopping.asked() or 0
        if self._group is None:
            return due, signum
        both = torch.tensor([int(due and trainer.is_global_zero), signum])
        distributed.all_reduce(both, distributed.ReduceOp.MAX, group=self._group)
        return bool(both[0]), int(both[1])

    def _save(self, trainer: L.Trainer) -> None:
        path = self.folder / LATEST
        if trainer.is_global_zero and path.is_file():
            path.replace(self.folder / BEFORE)
        for logger in trainer.loggers:
            logger.save()  # so that no row that the checkpoint counts is lost with the process
        trainer.save_checkpoint(path)
        self._kept, self._saved_at, self._saved_step = path, time.monotonic(), trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """What has been logged so far."""
        rows = [logger.rows for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        checkpoint["resumable"] = {"rows": rows, "row_step": self._row_step}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take back what was logged after the checkpoint: it will be logged again."""
        found = checkpoint.get("resumable")
        if found is None:
            return
        loggers = [logger for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        for logger, rows in zip(loggers, found["rows"], strict=False):
            logger.keep(rows)
        self._row_step = found["row_step"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing to keep any more."""
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Say how to go on: after a NonFiniteError too, since what was kept is of before."""
        if not self._training:
            return
        self._end()
        if self._kept is None:
            say(f"Training stopped at step {trainer.global_step}, before the first checkpoint.")
        else:
            say(f"Training stopped at step {trainer.global_step}. Go on with: ckpt_path={self.run or self._kept}")
        if isinstance(exception, stopping.Stopped):
            exception.told = True

    def _end(self) -> None:
        self._training = False
        self._waiting.close()
        self._group = None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a phase that was interrupted; None for none.

    One that cannot be read is left out with a warning.
    """
    for name in (LATEST, BEFORE):
        path = folder / name
        if not path.is_file():
            continue
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch itself reads past a wrong checksum
        except (zipfile.BadZipFile, EOFError) as error:
            damaged = str(error)
        if damaged is None:
            return path
        log.warning("%s is damaged (%s) and is left out", path, damaged)
        _set_aside(path)
    return None


@rank_zero_only
def _set_aside(path: Path) -> None:
    path.replace(path.with_name(f"{path.name}.damaged"))  # else it would take the place of the good one before it
