"""Callbacks that average weights, on prepared modules: EMA, equal averages, stochastic weight averaging."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

import qat
from qat.fake_quant import Mode
from qat.modes import get_mode, quantizers
from qat.training import QATSchedule, load_from_checkpoint
from tests.training.test_lightning_modules import call, config, fitted, module_of, trainer_of
from tests.training.users_modules import Automatic, batches, features


@pytest.mark.parametrize("preset", ["running", "w4a4_lsq", "codebook"])
def test_an_average_of_weights_keeps_ranges(preset: str) -> None:
    """Averaged from the first step, when no range is known: neither NaN nor broken zero points come out of it."""

    class Reference(L.Callback):
        """The average of one weight, in plain arithmetic; and whether buffers of validation are finite."""

        def __init__(self) -> None:
            self.mean: Tensor | None = None

        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            weight = pl_module.net.get_submodule("0").weight.detach()
            self.mean = weight.clone() if self.mean is None else 0.8 * self.mean + 0.2 * weight

        def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            if get_mode(pl_module) in (Mode.quantize, Mode.frozen):
                assert all(quantizer.calibrated for _, quantizer in quantizers(pl_module))

    running = {"bits": 8, "symmetric": False, "range": "running", "observer": "ema"}
    codebook = {"format": "codebook", "bits": 3, "granularity": "channel", "range": "learned"}
    schemes = {
        "running": config(activation=running, input=running),
        "w4a4_lsq": qat.preset("w4a4_lsq"),
        "codebook": config(weight=codebook),
    }
    _, prepared = module_of("automatic", schemes[preset])
    assert len(list(quantizers(prepared))) == 4
    reference = Reference()
    fitted(prepared, reference, EMAWeightAveraging(decay=0.8))
    assert reference.mean is not None
    torch.testing.assert_close(prepared.net.get_submodule("0").weight.detach(), reference.mean)
    for name, quantizer in quantizers(prepared):
        assert quantizer.calibrated, name
        if quantizer.shape is None:
            zero_point = quantizer.qparams()[1]
            assert torch.equal(zero_point, zero_point.round()), name
    assert call(prepared).isfinite().all()
    assert qat.lower(prepared.eval()) is not None


def test_a_checkpoint_holds_the_average(tmp_path: Path) -> None:
    _, prepared = module_of("automatic")
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    fitted(prepared, EMAWeightAveraging(decay=0.8), checkpoint, enable_checkpointing=True)
    loaded = load_from_checkpoint(Automatic, checkpoint.last_model_path)
    assert get_mode(loaded) is Mode.frozen
    assert torch.equal(call(loaded), call(prepared))  # which holds the average when fit is over


def test_equal_averaging_by_its_base_class() -> None:
    _, prepared = module_of("automatic")
    fitted(prepared, WeightAveraging())
    assert call(prepared).isfinite().all()


def test_stochastic_weight_averaging_measures_batch_norm_anew() -> None:
    L.seed_everything(0, verbose=False)
    prepared = qat.prepare(Automatic(norm=True), config(), features())
    norm = next(m for m in prepared.modules() if isinstance(m, nn.BatchNorm1d))
    modes: dict[int, Mode] = {}
    means: list[Tensor] = []  # of what it read in the epoch that is added
    norm.register_forward_pre_hook(
        lambda _, given: means.append(given[0].detach().mean(0)) if trainer.current_epoch == 4 else None
    )

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
            modes.setdefault(trainer.global_step - 1, get_mode(pl_module))

    schedule = QATSchedule(quantize_at=6, freeze_ranges_at=0.75)
    trainer = trainer_of(schedule, Watch(), StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2), epochs=4)
    trainer.fit(prepared, batches())
    assert [modes[step] for step in range(24)] == [schedule.mode_at(step, 24) for step in range(24)]
    assert get_mode(prepared) is Mode.frozen
    assert len(means) == 6
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
