"""Recipes: what is done beyond plain fine-tuning, each a callback, in any combination (`recipe=[...]`)."""

from collections.abc import Iterable

import lightning as L
from torch import nn

from qat.training.recipes.distillation import Distillation
from qat.training.recipes.early_stopping import QuantizedEarlyStopping
from qat.training.recipes.gradual_bits import GradualBits
from qat.training.recipes.oscillation import OscillationDamping, OscillationFreezing


def teach(callbacks: Iterable[L.Callback], teacher: nn.Module) -> list[L.Callback]:
    """Give the float network to the callbacks that learn from it; returns all of them."""
    callbacks = list(callbacks)
    for callback in callbacks:
        if isinstance(callback, Distillation):
            callback.teacher = teacher
    return callbacks


__all__ = [
    "Distillation",
    "GradualBits",
    "OscillationDamping",
    "OscillationFreezing",
    "QuantizedEarlyStopping",
    "teach",
]
