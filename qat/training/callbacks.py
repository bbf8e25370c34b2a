"""Callbacks: stop at the first non-finite number."""

import logging
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from qat.modes import watch
from qat.processes import alone

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A number became NaN or infinite while training."""


class StopOnNonFinite(L.Callback):
    """Stop before a NaN or an infinity reaches the weights, and say where it first arose.

    The loss is checked before backward and the gradients before the optimizer steps, so the weights, and the checkpoint
    that the exception leaves behind, are those of the last good step.
    """

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch for the diagnosis."""
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """Check the loss."""
        if not bool(torch.isfinite(loss)):
            where = first_non_finite(pl_module, self._batch)
            raise NonFiniteError(f"the loss is {float(loss.detach())} at step {trainer.global_step}; {where}")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradients."""
        if trainer.precision == "16-mixed":  # its gradient scaler expects, and skips, steps that overflow
            return
        named = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm([grad for _, grad in named])) if named else torch.zeros(0)
        if not bool(torch.isfinite(norms).all()):
            name = named[int(torch.nonzero(~torch.isfinite(norms))[0])][0]
            raise NonFiniteError(f"the gradient of '{name}' is not finite at step {trainer.global_step}")


@torch.no_grad()
def first_non_finite(module: L.LightningModule, batch: Any) -> str:
    """Run the batch once more and say in words where the first non-finite number arises: layer and quantized tensor."""
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(inputs, Tensor) and not bool(torch.isfinite(inputs).all()):
        return f"the input batch itself holds {int((~torch.isfinite(inputs)).sum())} non-finite values"
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"parameter '{name}' holds non-finite values"
    found: list[str] = []

    def seen(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"the first non-finite value arises in layer '{name}' ({type(layer).__name__})")

        return hook

    # Quantized layers have children too; an inner layer's hook runs before the hook of what contains it.
    handles = [layer.register_forward_hook(seen(name)) for name, layer in module.named_modules() if name]
    watch(module)
    try:
        with alone():  # the other processes may have found nothing
            module(inputs)
    except ValueError as error:  # of a quantizer: its tensor's name, and how many values
        found.append(str(error))
    finally:
        watch(module, False)
        for handle in handles:
            handle.remove()
    return "; ".join(found) if found else "every layer's output is finite, so it arises in the loss"


@rank_zero_only
def say(message: str) -> None:
    """Log a message, once in a distributed run."""
    log.info(message)
