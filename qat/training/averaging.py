"""Callbacks that average weights, and what of a quantizer cannot be averaged."""

from collections.abc import Callable, Container
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from qat.modes import quantizers
from qat.widths import match_bits


def average_weights_only(trainer: L.Trainer) -> None:
    """Let `WeightAveraging` callbacks (EMA) average the network, and keep the buffers of its quantizers as they are.

    By default they average all buffers. Of zero points, codes and counts an average is none, and of a range that is not
    known yet it is NaN for good. Scales that are learned are averaged, as weights are, from when they are known, and
    anew from where their quantizer gets other bits.

    Args:
        trainer: at the start of `fit`, when its callbacks are set up.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average: Any = callback._average_model
            match_bits(average, trainer.lightning_module)
            average.update_parameters = _keeping_ranges(average, average.update_parameters)


def _keeping_ranges(average: nn.Module, update: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
    @torch.no_grad()
    def update_parameters(current: nn.Module) -> None:
        update(current)
        for (_, averaged), (_, quantizer) in zip(quantizers(average), quantizers(current), strict=True):
            known = averaged.calibrated
            own: list[tuple[Tensor, Tensor]] = [*zip(averaged.buffers(), quantizer.buffers(), strict=True)]
            if not known:
                own += zip(averaged.parameters(), quantizer.parameters(), strict=True)
            for mean, tensor in own:
                mean.copy_(tensor)

    return update_parameters


@torch.no_grad()
def restart_averages_of(trainer: L.Trainer, changed: Container[str]) -> None:
    """Let averages follow quantizers that have got other bits: what they learn is averaged anew from here on.

    Args:
        trainer: with its callbacks.
        changed: module paths of the quantizers.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            average = callback._average_model.module
            match_bits(average, trainer.lightning_module)
            pairs = zip(quantizers(average), quantizers(trainer.lightning_module), strict=True)
            for (_, averaged), (name, quantizer) in pairs:
                if name in changed:
                    averaged.load_state_dict(quantizer.state_dict())


def measures_batch_norm(trainer: L.Trainer) -> bool:
    """Whether this is the epoch that `StochasticWeightAveraging` adds: no training, only BatchNorm's statistics."""
    return trainer.fit_loop._skip_backward


def training_share(trainer: L.Trainer) -> float:
    """The share of epochs that train: all, but for the one that `StochasticWeightAveraging` adds."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StochasticWeightAveraging) and trainer.max_epochs and trainer.max_epochs > 0:
            return getattr(callback, "_max_epochs", trainer.max_epochs) / trainer.max_epochs
    return 1.0
