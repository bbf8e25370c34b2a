"""QATSchedule: which mode at which step."""

import logging
from collections.abc import Iterator

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.layers import weights_of
from qat.mode import Mode
from qat.modes import get_mode, quantizers, set_mode, set_progress, watch
from qat.training.averaging import average_weights_only, measures_batch_norm, training_share

log = logging.getLogger(__name__)


class QATSchedule(L.Callback):
    """float -> observe -> quantize -> frozen, as a pure function of `trainer.global_step`.

    It keeps no state, so a resumed run is in the right mode from its first batch. It changes modes only, never
    structure. It needs to know nothing of batches: ranges are those of a calibration before `fit` (`qat.calibrate`), or
    of what the module's own training steps show the observers between `observe_at` and `quantize_at`. So it works with
    any LightningModule. Each argument is a step (int) or a share of all training steps (float in [0, 1]).

    Args:
        observe_at: observers start to record (training goes on in float); only when ranges are not calibrated yet.
        quantize_at: quantization starts.
        freeze_ranges_at: ranges and learned scales stay as they are from here on; None never freezes them.
        freeze_batch_norm_at: BatchNorm uses, and no longer updates, its running statistics; None never.

    Source: Krishnamoorthi 2018, section 3.2.1 (freezing BatchNorm); Jacob et al. 2018, section 3.1 (delay).
    """

    def __init__(
        self,
        observe_at: float | int = 0,
        quantize_at: float | int = 0,
        freeze_ranges_at: float | int | None = 0.9,
        freeze_batch_norm_at: float | int | None = 0.9,
    ) -> None:
        self.observe_at, self.quantize_at = observe_at, quantize_at
        self.freeze_ranges_at, self.freeze_batch_norm_at = freeze_ranges_at, freeze_batch_norm_at
        for name, at in vars(self).items():
            if at is not None and (at < 0 or (isinstance(at, float) and at > 1)):
                raise ValueError(f"QATSchedule.{name}={at}: give a step (int) or a share of training in [0.0, 1.0]")
        self._paused = False

    def mode_at(self, step: int, total: int) -> Mode:
        """The mode at a step of `total`."""
        if _reached(self.freeze_ranges_at, step, total) and _reached(self.quantize_at, step, total):
            return Mode.frozen
        if _reached(self.quantize_at, step, total):
            return Mode.quantize
        return Mode.observe if _reached(self.observe_at, step, total) else Mode.float

    def batch_norm_frozen_at(self, step: int, total: int) -> bool:
        """Whether BatchNorm statistics are frozen at a step of `total`."""
        return _reached(self.freeze_batch_norm_at, step, total)

    def progress_at(self, step: int, total: int) -> float:
        """How much of the training of quantizers has passed at a step of `total`: from quantization to frozen ranges.

        What is annealed has to be done when ranges freeze: roundings that are still open then would be cut off.
        """
        start = _step(self.quantize_at, total)
        end = total if self.freeze_ranges_at is None else _step(self.freeze_ranges_at, total)
        return min(max((step - start) / max(end - start, 1), 0.0), 1.0)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the sanity check."""
        average_weights_only(trainer)
        self._apply(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Before every step: modes may change, and Lightning has put BatchNorm back into training mode."""
        if measures_batch_norm(trainer):
            for norm in _batch_norms(pl_module):
                norm.train()
            return
        self._apply(trainer, pl_module)
        set_progress(pl_module, self.progress_at(trainer.global_step, _total(trainer)))
        if batch_idx == 0:
            watch(pl_module)
        if self.batch_norm_frozen_at(trainer.global_step, _total(trainer)):
            for norm in _batch_norms(pl_module):
                norm.eval()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ranges come from training data: what is validated on is not observed."""
        self._paused = get_mode(pl_module) is Mode.observe and trainer.state.fn == TrainerFn.FITTING
        if self._paused:
            set_mode(pl_module, Mode.float)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Observe again."""
        if self._paused:
            set_mode(pl_module, Mode.observe)
        self._paused = False

    def _apply(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, total = trainer.global_step, _total(trainer)
        mode, before = self.mode_at(step, total), get_mode(pl_module)
        if mode is before:
            return
        if before is Mode.observe and mode in (Mode.quantize, Mode.frozen):
            weights = weights_of(pl_module)
            for name, quantizer in quantizers(pl_module):
                try:
                    if quantizer in weights and not quantizer.calibrated:  # tables and roundings need the weight itself
                        quantizer.set_range_from(weights[quantizer])
                    elif not quantizer.calibrated:
                        quantizer.set_range_from_observer()
                except RuntimeError as error:
                    raise RuntimeError(
                        f"quantizer '{name}', observed in training up to step {step}: {error}. Let quantize_at be "
                        f"later, or run qat.calibrate on inputs that reach it before fit"
                    ) from None
        set_mode(pl_module, mode)
        if trainer.is_global_zero:
            log.info(f"step {step} of {total}: quantizers are in mode '{mode.value}'")


def _reached(at: float | int | None, step: int, total: int) -> bool:
    return at is not None and step >= _step(at, total)


def _step(at: float | int, total: int) -> float:
    return at * total if isinstance(at, float) else at


def _total(trainer: L.Trainer) -> int:
    total = trainer.estimated_stepping_batches
    if total == float("inf"):
        raise ValueError("QATSchedule needs to know how long training is: set trainer.max_epochs or trainer.max_steps")
    return max(round(total * training_share(trainer)), 1)


def _batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if isinstance(m, _BatchNorm))
