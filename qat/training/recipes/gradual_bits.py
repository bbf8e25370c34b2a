"""Bits that are lowered in the course of training."""

import itertools
import logging
from collections.abc import Sequence

import lightning as L

from qat.training.averaging import restart_averages_of
from qat.training.schedule import QATSchedule
from qat.training.steps import check_moment, step_of, total_steps
from qat.widths import widen

log = logging.getLogger(__name__)


class GradualBits(L.Callback):
    """Lower the bits of integers step by step, `8 -> 6 -> configured`, as a pure function of `trainer.global_step`.

    Weights and activations have at least `bits[0]` bits first, then `bits[1]`, and what the configuration says from
    `end` on, which has to be before ranges freeze. What is configured with more bits keeps them. At each change ranges
    follow (`qat.widths.set_bits`): learned scales keep what they have learned relative to what calibration gives.
    The bits are part of a checkpoint, with the ranges that belong to them.

    Args:
        bits: the widths before the configured one, falling.
        start, end: when the first one is left, and when the configured one is reached: a step (int) or a share of
            training (float). The others lie evenly between.

    Source: Zhuang et al. 2018, "Towards Effective Low-bitwidth Convolutional Neural Networks", section 3.2 (progressive
    quantization).

    Raises:
        ValueError: bits that do not fall; at the start of `fit`: `end` is not before ranges freeze.
    """

    def __init__(self, bits: Sequence[int] = (8, 6), start: float | int = 0.2, end: float | int = 0.5) -> None:
        self.bits, self.start, self.end = list(bits), start, end
        check_moment("gradual_bits.start", start)
        check_moment("gradual_bits.end", end)
        falling = all(a > b for a, b in itertools.pairwise(self.bits))
        if not self.bits or not falling or not all(1 < b <= 16 for b in self.bits):
            raise ValueError(f"gradual_bits.bits={self.bits}: give falling numbers of bits in 2 to 16, as [8, 6]")

    def bits_at(self, step: int, total: int) -> int | None:
        """The least number of bits at a step of `total`; None for those of the configuration."""
        start, end = step_of(self.start, total), step_of(self.end, total)
        if step >= end:
            return None
        if step < start:
            return self.bits[0]
        share = (step - start) / (end - start)  # of the way from where the first width ends
        return self.bits[min(1 + int(share * (len(self.bits) - 1)), len(self.bits) - 1)]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the moments."""
        total = total_steps(trainer)
        if step_of(self.start, total) > step_of(self.end, total):
            raise ValueError(f"gradual_bits.start={self.start} is behind end={self.end}, of {total} steps")
        for schedule in trainer.callbacks:  # type: ignore[attr-defined]
            frozen = schedule.freeze_ranges_at if isinstance(schedule, QATSchedule) else None
            if frozen is not None and step_of(self.end, total) > step_of(frozen, total):
                raise ValueError(
                    f"gradual_bits.end={self.end} is behind qat.schedule.freeze_ranges_at={frozen}, of {total} steps: "
                    f"the configured bits need some training before ranges freeze; give an earlier end"
                )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Before every step: bits may change."""
        total = total_steps(trainer)
        bits = self.bits_at(trainer.global_step, total)
        changed = widen(pl_module, bits)
        if changed:
            restart_averages_of(trainer, changed)
        if changed and trainer.is_global_zero:
            what = "the configured bits" if bits is None else f"at least {bits} bits"
            log.info(f"step {trainer.global_step} of {total}: {len(changed)} quantizers have {what}")
