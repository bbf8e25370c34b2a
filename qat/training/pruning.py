"""A trial of Optuna tells how it goes after every epoch of quantized training, and ends where it is hopeless."""

from typing import Any

import lightning as L


class PrunedError(RuntimeError):
    """The study ended this trial early: others were better at this point."""


class PruneTrial(L.Callback):
    """Report a validation metric by epoch; end the run where the study's pruner says so.

    Args:
        storage: of the study, a URL.
        study: its name.
        number: of the trial.
        pruner: of Optuna, which a storage does not keep.
        monitor: the metric, as it is logged.
    """

    def __init__(self, storage: str, study: str, number: int, monitor: str, pruner: Any) -> None:
        self.storage, self.study, self.number, self.monitor, self.pruner = storage, study, number, monitor, pruner

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report, then ask.

        Raises:
            PrunedError: the pruner has had enough.
            ValueError: nothing is logged under the monitor's name.
        """
        if trainer.sanity_checking or pl_module.hparams.get("quant") is None:
            return

        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val_")))
            raise ValueError(f"hydra.sweeper.prune: '{self.monitor}' is not validated (there is {known})")
        value, epoch = float(trainer.callback_metrics[self.monitor]), trainer.current_epoch
        if trainer.strategy.broadcast(trainer.is_global_zero and self._hopeless(value, epoch)):
            raise PrunedError(f"{self.monitor} {value:.4g} after epoch {epoch + 1}: other trials were better")

    def _hopeless(self, value: float, epoch: int) -> bool:
        import optuna

        study = optuna.load_study(study_name=self.study, storage=self.storage, pruner=self.pruner)
        trial = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[self.number]._trial_id)
        trial.report(value, epoch)
        return trial.should_prune()
