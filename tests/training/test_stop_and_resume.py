"""What happens when a number is no longer finite, or training fails."""

import gc
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qat
from qat.modes import quantizers
from qat.training import AtomicCheckpointIO, NonFiniteError, QATModule, QATSchedule, Resumable, StopOnNonFinite
from qat.training.callbacks import first_non_finite
from qat.training.checkpoints import newest
from qat.training.state import RunState

TASK = {"_target_": "qat.zoo.tasks.Classification", "num_classes": 3}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.01}


class Exploding(nn.Module):
    """Finite until `calls` training calls have passed, then the second layer makes infinities."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(self.norm(self.first(x)))))


def exploding() -> nn.Module:
    return Exploding()


MODEL = {"_target_": f"{__name__}:exploding"}


def loader(batches: int = 4, broken: int | None = None) -> DataLoader[Any]:
    """Batches of 8; of batch `broken` two values are NaN."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * batches, 4, generator=generator)
    y = torch.randint(3, (8 * batches,), generator=generator)
    if broken is not None:
        x[8 * broken, 0] = x[8 * broken + 3, 2] = torch.nan
    return DataLoader(TensorDataset(x, y), batch_size=8)


def module_of(quantized: bool = False) -> QATModule:
    L.seed_everything(0, verbose=False)
    module = QATModule(MODEL, TASK, SGD, scheduler=None)
    if quantized:
        module = module.quantized(qat.preset("int8"), [4])
        qat.calibrate(module.prepared, [batch for batch, _ in loader()])
    return module


class AtStep(L.Callback):
    """Do something to the module before the batch of a step, and remember the weights of that moment."""

    weights: dict[str, Tensor]

    def __init__(self, step: int, action: Any = None) -> None:
        self.step, self.action = step, action

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            if self.action is not None:
                self.action(pl_module)
            self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def fit(module: QATModule, folder: Path, *callbacks: L.Callback, data: Any = None, epochs: int = 3) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        plugins=[AtomicCheckpointIO()],
        callbacks=[
            Resumable(str(folder)),
            StopOnNonFinite(),
            *callbacks,
        ],
    )
    trainer.fit(module, data or loader())
    return trainer


def unchanged(module: L.LightningModule, weights: dict[str, Tensor]) -> bool:
    return all(torch.equal(p, weights[name]) for name, p in module.named_parameters())


def overflow(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    return torch.where(output > output.median(), torch.inf, output)


def overflow_twice(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A quantizer takes an infinity to the end of its range; inf - inf gets through it."""
    return overflow(layer, args, output) - overflow(layer, args, output)


@pytest.mark.parametrize("quantized", [False, True])
def test_nan_in_a_batch_is_blamed_on_the_input(tmp_path: Path, quantized: bool) -> None:
    module, at = module_of(quantized), AtStep(2)
    schedule = [QATSchedule(freeze_ranges_at=None)] if quantized else []
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 2; the input batch itself holds 2 non-finite"):
        fit(module, tmp_path, *schedule, at, data=loader(broken=2))
    assert unchanged(module, at.weights)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_layer_that_overflows_is_named_and_the_last_checkpoint_is_good(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, quantized: bool
) -> None:
    def explode(module: Any) -> None:
        module.net.second.register_forward_hook(overflow_twice if quantized else overflow)

    module, at = module_of(quantized), AtStep(6, explode)
    schedule = [QATSchedule(freeze_ranges_at=None)] if quantized else []
    layer = r"layer 'net\.second' \(%s\)" % ("QuantLinear" if quantized else "Linear")
    with (
        caplog.at_level("INFO", logger="qat"),
        pytest.raises(NonFiniteError, match=rf"the loss is \S+ at step 6; .* {layer}") as stopped,
    ):
        fit(module, tmp_path, *schedule, at)
    tensor = r"; tensor 'second' has \d+ NaN and 0 infinite of 64 values \(shape \[8, 8\], the first at \["
    assert bool(re.search(tensor, str(stopped.value))) == quantized  # a quantizer knows what it reads
    assert unchanged(module, at.weights)
    kept = tmp_path / "step.ckpt"  # of before: BatchNorm has seen the infinities
    assert f"Training stopped at step 6. Go on with: ckpt_path={kept}" in caplog.text
    checkpoint = torch.load(kept)
    assert checkpoint["global_step"] == 4  # the end of the last whole epoch
    learned = {name: t for name, t in checkpoint["state_dict"].items() if ".observer." not in name}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in learned.values())
    again = QATModule.load_from_checkpoint(kept)
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(again, loader(), ckpt_path=kept)
    assert trainer.global_step == 12


def test_a_nan_gradient_of_a_finite_loss_stops_before_the_weights_change(tmp_path: Path) -> None:
    def spoil(module: Any) -> None:
        module.net.first.bias.register_hook(lambda grad: grad * torch.nan)

    module, at = module_of(), AtStep(5, spoil)
    with pytest.raises(NonFiniteError, match=r"the gradient of 'net\.first\.bias' is not finite at step 5"):
        fit(module, tmp_path, at)
    assert unchanged(module, at.weights)
    assert bool(torch.isfinite(torch.cat([p.detach().reshape(-1) for p in module.parameters()])).all())
    assert torch.load(tmp_path / "step.ckpt")["global_step"] == 4


def test_before_the_first_checkpoint_it_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="qat"), pytest.raises(NonFiniteError):
        fit(module_of(), tmp_path, data=loader(broken=1))
    assert "Training stopped at step 1, before the first checkpoint." in caplog.text
    assert "ckpt_path" not in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_finite_training_is_not_disturbed(tmp_path: Path) -> None:
    module, plain = module_of(), module_of()
    trainer = fit(module, tmp_path)
    assert trainer.global_step == 12
    L.Trainer(accelerator="cpu", devices=1, max_epochs=3, logger=False, enable_checkpointing=False,
              enable_progress_bar=False, enable_model_summary=False).fit(plain, loader())  # fmt: skip
    assert unchanged(module, dict(plain.named_parameters()))


def test_a_loss_that_is_infinite_by_itself_is_blamed_on_the_loss() -> None:
    batch = next(iter(loader()))
    assert first_non_finite(module_of(), batch) == "every layer's output is finite, so it arises in the loss"


def test_the_diagnosis_leaves_no_hooks() -> None:
    module = module_of()
    module.net.second.register_forward_hook(overflow)
    assert "net.second" in first_non_finite(module, next(iter(loader())))
    assert sum(len(m._forward_hooks) for m in module.modules()) == 1
    module = module_of(quantized=True)
    module.net.second.register_forward_hook(overflow)
    assert "has 0 NaN and 32 infinite of 64 values" in first_non_finite(module, next(iter(loader())))
    assert not any(quantizer.watched for _, quantizer in quantizers(module))


def test_any_other_failure_names_the_last_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(module: Any) -> None:
        raise OSError("disk on fire")

    module = module_of()
    with caplog.at_level("INFO", logger="qat"), pytest.raises(OSError, match="disk on fire"):
        fit(module, tmp_path, AtStep(6, fail))
    path = tmp_path / "step.ckpt"
    assert torch.load(path)["global_step"] == 4
    assert f"step 6. Go on with: ckpt_path={path}" in caplog.text


def test_a_run_that_cannot_start_leaves_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Such a checkpoint would hold untrained weights, and could take the place of a good one."""
    good = tmp_path / "step.ckpt"
    good.write_bytes(b"of an earlier run")
    other = tmp_path / "other.ckpt"
    trainer = fit(module_of(), tmp_path / "other")
    trainer.save_checkpoint(other)
    module = QATModule({"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 3}, TASK, SGD)
    hint = Resumable(str(tmp_path))
    trainer = L.Trainer(accelerator="cpu", devices=1, max_epochs=5, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, callbacks=[hint])  # fmt: skip
    with caplog.at_level("INFO", logger="qat"), pytest.raises(RuntimeError, match="net"):
        trainer.fit(module, loader(), ckpt_path=other)
    assert good.read_bytes() == b"of an earlier run"
    assert "ckpt_path" not in caplog.text


# ------------------------------------------------------------------------------------------ checkpoints on disk


def test_two_checkpoints_are_kept_and_a_damaged_one_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(module: Any) -> None:
        raise OSError("power cut")

    with pytest.raises(OSError, match="power cut"):
        fit(module_of(), tmp_path, AtStep(9, fail))
    steps = {name: torch.load(tmp_path / name)["global_step"] for name in ("step.ckpt", "step.before.ckpt")}
    assert steps == {"step.ckpt": 8, "step.before.ckpt": 4}
    assert newest(tmp_path) == tmp_path / "step.ckpt"
    whole = (tmp_path / "step.ckpt").read_bytes()
    middle = len(whole) // 2
    for broken in (whole[:-100], whole[:middle], b"", whole[:middle] + bytes(1024) + whole[middle + 1024 :]):
        (tmp_path / "step.ckpt").write_bytes(broken)
        with caplog.at_level("WARNING", logger="qat"):
            assert newest(tmp_path) == tmp_path / "step.before.ckpt"
        assert f"{tmp_path / 'step.ckpt'} is damaged" in caplog.text
        assert not (tmp_path / "step.ckpt").exists()  # else it would push the good one out
        caplog.clear()
    (tmp_path / "step.before.ckpt").write_bytes(whole[:middle])
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("left", [{"step.ckpt", "step.before.ckpt"}, {"step.before.ckpt"}])
def test_a_run_killed_while_it_ended_a_phase_is_tidied_by_the_next(tmp_path: Path, left: set[str]) -> None:
    RunState(tmp_path, {}, {}, None).begin()
    of_phase = {phase: tmp_path / "checkpoints" / phase for phase in ("float", "qat")}
    for folder in of_phase.values():
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).touch()
    (of_phase["float"] / "last.ckpt").touch()
    gc.collect()  # the lock of a killed process is nobody's
    RunState(tmp_path, {}, {}, "auto").begin()
    assert {path.name for path in of_phase["float"].iterdir()} == {"last.ckpt"}
    assert {path.name for path in of_phase["qat"].iterdir()} == left  # to go on from


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plugin = tmp_path / "a.ckpt", AtomicCheckpointIO()
    plugin.save_checkpoint({"a": 1}, path)

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        plugin.save_checkpoint({"a": 2}, path)
    assert torch.load(path) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]


@pytest.mark.parametrize("name", ["every_minutes", "every_steps"])
def test_a_cadence_of_nothing_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"Resumable\.{name}=0: give a number above 0"):
        Resumable(str(tmp_path), **{name: 0})
