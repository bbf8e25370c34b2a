"""Progress: what a run is doing, how well, and how long it will take; on a terminal and in a log."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from qat.analysis.summary import metric_text
from qat.mode import Mode
from qat.modes import get_mode, quantizers

log = logging.getLogger(__name__)

DOING = {
    Mode.float: "QAT float",
    Mode.observe: "QAT observing",
    Mode.quantize: "QAT quantized",
    Mode.frozen: "QAT frozen",
}


class Progress(ProgressBar):
    """One bar a phase on a terminal; elsewhere a line now and then.

    Both name the phase (float, or QAT with what quantizers do), the metric of the last validation beside that of the
    float network, and the time left: of the phase and, with `epochs`, of the run. Messages of the log stand above the
    bar.

    Args:
        phase: key of `epochs`: the phase that is trained.
        epochs: phase -> its epochs, in order; what is behind `phase` is still to come, at about the same speed.
        every_seconds: where there is no terminal, at least this much time lies between two lines, the last apart.
    """

    def __init__(
        self, phase: str | None = None, epochs: Mapping[str, int] | None = None, every_seconds: float = 10.0
    ) -> None:
        super().__init__()
        self.phase, self.epochs, self.every_seconds = phase, dict(epochs or {}), every_seconds
        self.console = Console()
        self._shown = True
        self._bar: Bar | None = None
        self._handlers: list[Any] = []
        self._start, self._first, self._said = 0.0, 0, 0.0

    def disable(self) -> None:
        """Say nothing (of processes other than the first)."""
        self._shown = False

    def enable(self) -> None:
        """Speak again."""
        self._shown = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar."""
        self._start, self._first = time.monotonic(), trainer.global_step
        self._said = self._start
        if not (self._shown and self.console.is_terminal):
            return
        self._bar = Bar(TextColumn("{task.description:<13}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                        TextColumn("{task.fields[text]}"), console=self.console, refresh_per_second=4)  # fmt: skip
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total(trainer), text="", completed=trainer.global_step)
        self._handlers = [  # what they write would go through the bar
            (handler, handler.setStream(sys.stdout))
            for handler in logging.getLogger().handlers
            if isinstance(handler, logging.StreamHandler) and handler.stream in (sys.__stdout__, sys.__stderr__)
        ]
        self._show(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without a bar, say how far it is."""
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs > 0
        late = time.monotonic() - self._said >= self.every_seconds
        if self._shown and self._bar is None and (last or late or trainer.should_stop):
            self._said = time.monotonic()
            log.info("%s: %s", self._doing(pl_module), self._text(trainer, pl_module, epoch=True))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close the bar; it stays as it was."""
        if self._bar is not None:
            self._show(trainer, pl_module)
            self._bar.stop()
            self._bar = None
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close the bar before others say what went wrong."""
        self.teardown(trainer, pl_module, "fit")

    def _show(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert self._bar is not None
        self._bar.update(self._task, description=self._doing(module), completed=trainer.global_step,
                         text=self._text(trainer, module))  # fmt: skip

    def _doing(self, module: L.LightningModule) -> str:
        if next(quantizers(module), None) is None:
            return self.phase or "float"
        return DOING[get_mode(module)]

    def _total(self, trainer: L.Trainer) -> int | None:
        total = trainer.estimated_stepping_batches
        return None if total == float("inf") else int(total)

    def _text(self, trainer: L.Trainer, module: Any, epoch: bool = False) -> str:
        """Epoch, time left, loss and metric, in words."""
        parts = []
        if epoch or trainer.max_epochs:
            parts.append(
                f"epoch {trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if trainer.max_epochs else "")
            )
        left, run = self._left(trainer)
        if left is not None:
            parts.append(f"{clock(left)} left" + (f" (run {clock(run)})" if run is not None and run > left + 1 else ""))
        now: dict[str, float] = getattr(module, "val_metrics", {})
        reference: dict[str, float] = getattr(module, "float_metrics", {})
        for name in list(now or reference)[:1]:
            then = f"float {metric_text(name, reference[name])}" if name in reference else ""
            parts.append(f"{name} {metric_text(name, now.get(name))}" + (f" ({then})" if then else ""))
        if "train_loss" in trainer.callback_metrics:
            parts.append(f"loss {float(trainer.callback_metrics['train_loss']):.3g}")
        return ", ".join(parts)

    def _left(self, trainer: L.Trainer) -> tuple[float | None, float | None]:
        """Seconds that are left of the phase, and of the run, if it can be told."""
        total, done = self._total(trainer), trainer.global_step - self._first
        if total is None or not done:
            return None, None
        step = (time.monotonic() - self._start) / done
        left = (total - trainer.global_step) * step
        names = list(self.epochs)
        if self.phase not in names or not trainer.max_epochs or trainer.max_epochs < 0:
            return left, None
        to_come = sum(self.epochs[name] for name in names[names.index(self.phase) + 1 :])
        return left, left + to_come * total / trainer.max_epochs * step


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours too.

    >>> clock(7.2), clock(75), clock(3723)
    ('0:07', '1:15', '1:02:03')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
