"""QATSchedule: which mode at which step."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.fake_quant import FakeQuantize
from qat.layers import weights_of
from qat.mode import Mode
from qat.modes import get_mode, quantizers, set_mode, set_progress, watch
from qat.processes import settle_turns
from qat.training.averaging import average_weights_only, measures_batch_norm
from qat.training.steps import check_moment, reached, step_of, total_steps

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
        quantize_activations_at: that of activations, which pass as floats before; None for the same as weights.
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
        quantize_activations_at: float | int | None = None,
    ) -> None:
        self.observe_at, self.quantize_at = observe_at, quantize_at
        self.freeze_ranges_at, self.freeze_batch_norm_at = freeze_ranges_at, freeze_batch_norm_at
        self.quantize_activations_at = quantize_activations_at
        for name, at in vars(self).items():
            check_moment(f"QATSchedule.{name}", at)
        self._paused = False
        self._first: list[FakeQuantize] = []  # of weights, of activations: their modes are those of all

    def mode_at(self, step: int, total: int) -> Mode:
        """The mode at a step of `total`."""
        if reached(self.freeze_ranges_at, step, total) and reached(self.quantize_at, step, total):
            return Mode.frozen
        if reached(self.quantize_at, step, total):
            return Mode.quantize
        return Mode.observe if reached(self.observe_at, step, total) else Mode.float

    def activations_at(self, step: int, total: int) -> bool:
        """Whether activations are quantized where weights are."""
        return self.quantize_activations_at is None or reached(self.quantize_activations_at, step, total)

    def batch_norm_frozen_at(self, step: int, total: int) -> bool:
        """Whether BatchNorm statistics are frozen at a step of `total`."""
        return reached(self.freeze_batch_norm_at, step, total)

    def progress_at(self, step: int, total: int) -> float:
        """How much of the training of quantizers has passed at a step of `total`: from quantization to frozen ranges.

        What is annealed has to be done when ranges freeze: roundings that are still open then would be cut off.
        """
        start = step_of(self.quantize_at, total)
        end = total if self.freeze_ranges_at is None else step_of(self.freeze_ranges_at, total)
        return min(max((step - start) / max(end - start, 1), 0.0), 1.0)

    def phases(self, trainer: L.Trainer) -> list[dict[str, Any]]:
        """What the steps that `trainer` has done were: dicts with `mode`, `start`, `end` (steps, from 0).

        The mode is a Mode's name; `weights` where activations are not quantized yet.
        """
        total, done = total_steps(trainer), trainer.global_step
        given = (self.observe_at, self.quantize_at, self.quantize_activations_at, self.freeze_ranges_at)
        turns = {math.ceil(step_of(at, total)) for at in given if at is not None}
        starts = sorted({0} | {step for step in turns if step < done})
        found: list[dict[str, Any]] = []
        for start, end in zip(starts, [*starts[1:], done], strict=True):
            mode = self.mode_at(start, total).value
            if mode == "quantize" and not self.activations_at(start, total):
                mode = "weights"
            if found and found[-1]["mode"] == mode:
                found[-1]["end"] = end
            else:
                found.append({"mode": mode, "start": start, "end": end})
        return found

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the sanity check."""
        average_weights_only(trainer)
        self._check(total_steps(trainer))
        weight = next((q for _, q in quantizers(pl_module) if q.shape is not None), None)
        self._first = [q for q in (weight, next(_of_activations(pl_module), None)) if q is not None]
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
        set_progress(pl_module, self.progress_at(trainer.global_step, total_steps(trainer)))
        if batch_idx == 0:
            watch(pl_module)
        if self.batch_norm_frozen_at(trainer.global_step, total_steps(trainer)):
            for norm in _batch_norms(pl_module):
                norm.eval()

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """In manual optimization, inside a training step: other processes may have quantizers that did not run here."""
        settle_turns()

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

    def _check(self, total: int) -> None:
        end = total if self.freeze_ranges_at is None else step_of(self.freeze_ranges_at, total)
        if self.quantize_activations_at is not None and step_of(self.quantize_activations_at, total) >= max(end, 1):
            raise ValueError(
                f"QATSchedule.quantize_activations_at={self.quantize_activations_at} is not before ranges freeze "
                f"(freeze_ranges_at={self.freeze_ranges_at}, {total} steps): give an earlier step or share"
            )

    def _apply(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, total = trainer.global_step, total_steps(trainer)
        mode, before = self.mode_at(step, total), get_mode(pl_module)
        waiting = mode in (Mode.quantize, Mode.frozen) and not self.activations_at(step, total)
        if all(q.mode is (Mode.float if waiting and q.shape is None else mode) for q in self._first):
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
        if waiting:
            for quantizer in _of_activations(pl_module):
                quantizer.mode = Mode.float
        if trainer.is_global_zero:
            log.info(f"step {step} of {total}: {in_words(mode, waiting, self.batch_norm_frozen_at(step, total))}")


def in_words(mode: Mode, waiting: bool = False, norms_frozen: bool = False) -> str:
    """What happens from a step on, for the console.

    Args:
        mode: of the quantizers.
        waiting: activations are not quantized yet.
        norms_frozen: BatchNorm's statistics are frozen, too.

    >>> in_words(Mode.quantize, waiting=True), in_words(Mode.frozen, norms_frozen=True)
    ('weights are quantized, activations pass as floats', 'ranges and BatchNorm statistics frozen')
    """
    if waiting:
        return "weights are quantized, activations pass as floats"
    frozen = "ranges and BatchNorm statistics frozen" if norms_frozen else "ranges frozen"
    return {Mode.float: "float", Mode.observe: "observing ranges", Mode.quantize: "quantized"}.get(mode, frozen)


def _of_activations(module: nn.Module) -> Iterator[FakeQuantize]:
    return (quantizer for _, quantizer in quantizers(module) if quantizer.shape is None)


def _batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    return (m for m in module.modules() if isinstance(m, _BatchNorm))
