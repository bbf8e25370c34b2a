"""Callbacks: stop at the first non-finite number, tell how to go on after an interruption."""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

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
    """Run the batch once more and say in words where the first non-finite number arises."""
    inputs = batch[0] if isinstance(batch, list | tuple) else batch
    if isinstance(inputs, Tensor) and not bool(torch.isfinite(inputs).all()):
        return f"the input batch itself holds {int((~torch.isfinite(inputs)).sum())} non-finite values"
    for name, parameter in module.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"parameter '{name}' holds non-finite values"
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(f"the first non-finite value arises in layer '{name}' ({type(layer).__name__})")

        return hook

    # Quantized layers have children too; an inner layer's hook runs before the hook of what contains it.
    handles = [layer.register_forward_hook(watch(name)) for name, layer in module.named_modules() if name]
    try:
        with alone():  # the other processes may have found nothing
            module(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "every layer's output is finite, so it arises in the loss"


class ResumeHint(L.Callback):
    """Keep a checkpoint when training is interrupted (Ctrl-C too) or fails, and say how to go on from it.

    After a NonFiniteError nothing is saved: the forward pass has already spoilt BatchNorm's statistics. The checkpoint
    of the last whole epoch is named instead. (Lightning's OnExceptionCheckpoint would make every later `fit` without a
    checkpoint look for one.)

    Args:
        dirpath: folder of the checkpoint.
        filename: its name without `.ckpt`.
    """

    def __init__(self, dirpath: str, filename: str = "interrupted") -> None:
        self.path = Path(dirpath) / f"{filename}.ckpt"
        self._training = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on there is something to keep; what fails earlier (a ckpt_path that does not fit) has nothing."""
        self._training = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing to keep any more."""
        self._training = False

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save, then tell."""
        if not self._training:
            return
        self._training = False
        if isinstance(exception, NonFiniteError):
            names = ("best_model_path", "last_model_path")
            saved = [Path(getattr(callback, name, "")) for callback in trainer.checkpoint_callbacks for name in names]
            kept = max((path for path in saved if path.is_file()), key=lambda path: path.stat().st_mtime, default=None)
        else:
            trainer.save_checkpoint(self.path)
            kept = self.path
        if kept is not None:
            _say(f"Training stopped at step {trainer.global_step}. Go on with: ckpt_path={kept}")
        else:
            _say(f"Training stopped at step {trainer.global_step}, before the first checkpoint.")


@rank_zero_only
def _say(message: str) -> None:
    log.info(message)
