from collections.abc import Iterator
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.mode import Mode
from qat.modes import get_mode, quantizers, set_mode
from qat.training import QATModule, QATSchedule, parameter_groups
from qat.zoo.data import Digits

MODEL = {"_target_": "qat.zoo.models.SmallCNN", "in_channels": 1, "num_classes": 10, "width": 4}
TASK = {"_target_": "qat.zoo.tasks.Classification", "num_classes": 10}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 3e-3, "weight_decay": 0.01}
F, B, Q, Z = Mode.float, Mode.observe, Mode.quantize, Mode.frozen


@pytest.fixture(scope="module")
def digits() -> Digits:
    """320 training images: 5 steps an epoch."""
    data = Digits(name="digits", channels=1, image_size=8, num_classes=10, mean=[0.3], std=[0.37], batch_size=64)
    train = data.split("train")
    data._splits["train"] = type(train)(train.images[:320], train.labels[:320])
    return data


def module_of(preset: str | None, data: Digits | None = None, **changes: Any) -> QATModule:
    """A module, prepared and (with data) calibrated."""
    L.seed_everything(0, verbose=False)
    module = QATModule(MODEL, TASK, ADAMW)
    if preset is not None:
        module = module.quantized(qat.preset(preset), [1, 8, 8], **changes)
        if data is not None:
            qat.calibrate(module.prepared, data.calibration_batches(1))
    return module


def fit(module: QATModule, data: Digits, *callbacks: L.Callback, epochs: int = 2, **options: Any) -> L.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer


class Record(L.Callback):
    """What a step sees, by global step. Stands after QATSchedule, so it sees what the batch sees."""

    def __init__(self) -> None:
        self.modes: dict[int, Mode] = {}
        self.means: dict[int, Tensor] = {}
        self.scales: dict[int, Tensor] = {}
        self.weights: dict[int, Tensor] = {}
        self.norms_train: dict[int, set[bool]] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        norms = [m for m in pl_module.modules() if isinstance(m, nn.BatchNorm2d)]
        self.modes[step] = get_mode(pl_module)
        assert {q.mode for _, q in quantizers(pl_module)} in ({self.modes[step]}, set())
        self.means[step] = torch.cat([m.running_mean for m in norms]).clone()
        self.norms_train[step] = {m.training for m in norms}
        scales = [q.scale.detach().reshape(-1) for _, q in quantizers(pl_module) if hasattr(q, "scale")]
        self.scales[step] = torch.cat(scales).clone() if scales else torch.zeros(0)
        self.weights[step] = torch.cat([p.detach().reshape(-1) for p in pl_module.parameters() if p.dim() > 1])


# ----------------------------------------------------------------------------------------------- a pure function


@pytest.mark.parametrize(
    ("arguments", "total", "expected"),
    [
        # the default: quantized at once, frozen for the last tenth
        ({}, 10, [Q, Q, Q, Q, Q, Q, Q, Q, Q, Z]),
        # shares: a boundary is inclusive
        ({"observe_at": 0.2, "quantize_at": 0.5, "freeze_ranges_at": 0.8}, 10, [F, F, B, B, B, Q, Q, Q, Z, Z]),
        # steps
        ({"observe_at": 1, "quantize_at": 3, "freeze_ranges_at": 4}, 6, [F, B, B, Q, Z, Z]),
        # steps and shares together; 0.5 of 7 is 3.5, so step 4 is the first
        ({"observe_at": 1, "quantize_at": 0.5, "freeze_ranges_at": 6}, 7, [F, B, B, B, Q, Q, Z]),
        # None never freezes
        ({"freeze_ranges_at": None}, 4, [Q, Q, Q, Q]),
        # frozen cannot come before quantized
        ({"quantize_at": 2, "freeze_ranges_at": 0}, 4, [B, B, Z, Z]),
        # observed only when quantized: quantization wins
        ({"observe_at": 3, "quantize_at": 1, "freeze_ranges_at": None}, 4, [F, Q, Q, Q]),
        # the int 1 is a step, the float 1.0 the end of training
        ({"quantize_at": 1, "freeze_ranges_at": None}, 3, [B, Q, Q]),
        ({"quantize_at": 1.0, "freeze_ranges_at": None}, 3, [B, B, B, Q]),
        # a step beyond the end
        ({"quantize_at": 100}, 3, [B, B, B]),
    ],
)
def test_mode_at(arguments: dict[str, Any], total: int, expected: list[Mode]) -> None:
    schedule = QATSchedule(**arguments)
    assert [schedule.mode_at(step, total) for step in range(len(expected))] == expected
    backwards = [schedule.mode_at(step, total) for step in reversed(range(len(expected)))]
    assert backwards[::-1] == expected  # it remembers nothing


@pytest.mark.parametrize(
    ("at", "expected"),
    [(0.5, [False, False, True, True]), (1, [False, True, True, True]), (None, [False] * 4), (0, [True] * 4)],
)
def test_batch_norm_frozen_at(at: float | None, expected: list[bool]) -> None:
    schedule = QATSchedule(freeze_batch_norm_at=at)
    assert [schedule.batch_norm_frozen_at(step, 4) for step in range(4)] == expected


@pytest.mark.parametrize(
    ("name", "at"),
    [("observe_at", -1), ("quantize_at", 1.5), ("freeze_ranges_at", -0.1), ("freeze_batch_norm_at", 2.0)],
)
def test_a_moment_outside_of_training_is_refused(name: str, at: float) -> None:
    with pytest.raises(ValueError, match=rf"QATSchedule\.{name}={at}: give a step \(int\) or a share"):
        QATSchedule(**{name: at})


def test_it_needs_the_length_of_training(digits: Digits) -> None:
    with pytest.raises(ValueError, match=r"trainer\.max_epochs or trainer\.max_steps"):
        fit(module_of("int8", digits, scheduler=None), digits, QATSchedule(), epochs=-1)


# ------------------------------------------------------------------------------------------------- in a fit


def test_modes_follow_the_global_step(digits: Digits) -> None:
    schedule, record = QATSchedule(quantize_at=3, freeze_ranges_at=7, freeze_batch_norm_at=6), Record()
    module = module_of("int8", digits)
    fit(module, digits, schedule, record)
    assert record.modes == {step: schedule.mode_at(step, 10) for step in range(10)}
    assert set(record.modes.values()) == {B, Q, Z}
    assert get_mode(module.net) is Z  # and stays, for export


def test_ranges_need_no_calibration_when_they_are_observed_first(digits: Digits) -> None:
    record = Record()
    fit(module_of("int8"), digits, QATSchedule(quantize_at=4), record, epochs=1)
    assert bool(record.scales[3].isnan().all())
    assert not bool(record.scales[4].isnan().any())
    assert record.modes == {0: B, 1: B, 2: B, 3: B, 4: Q}


def test_quantizing_what_was_never_calibrated_is_an_error(digits: Digits) -> None:
    with pytest.raises(RuntimeError, match=r"have no range yet, the first is 'net\..*qat\.calibrate"):
        fit(module_of("int8"), digits, QATSchedule(), epochs=1)


@pytest.mark.parametrize("preset", ["int8", "w4a4_lsq"])
def test_ranges_move_until_they_are_frozen(digits: Digits, preset: str) -> None:
    record = Record()
    module = module_of(preset, digits)
    fit(module, digits, QATSchedule(freeze_ranges_at=5, freeze_batch_norm_at=None), record)
    scales = record.scales
    for step in range(5):
        assert not torch.equal(scales[step], scales[step + 1])
    for step in range(5, 9):
        assert torch.equal(scales[step], scales[step + 1])
        assert not torch.equal(record.weights[step], record.weights[step + 1])  # training itself goes on
    end = torch.cat([q.scale.detach().reshape(-1) for _, q in quantizers(module) if hasattr(q, "scale")])
    assert torch.equal(end, scales[9])


def test_running_statistics_of_batch_norm_stop_at_the_step(digits: Digits) -> None:
    record = Record()
    fit(module_of("int8", digits), digits, QATSchedule(freeze_batch_norm_at=4, freeze_ranges_at=None), record)
    for step in range(4):
        assert not torch.equal(record.means[step], record.means[step + 1])
        assert record.norms_train[step] == {True}
    for step in range(4, 9):  # past the end of an epoch, where Lightning puts the module back into training mode
        assert torch.equal(record.means[4], record.means[step + 1])
        assert record.norms_train[step] == {False}


class Stop(L.Callback):
    """Save and end at a step."""

    def __init__(self, step: int, path: Any) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_a_resumed_run_is_in_the_right_mode_from_its_first_batch(digits: Digits, tmp_path: Any, stop: int) -> None:
    """Mid-phase, mid-epoch (2, 8) and between epochs; the callback itself has nothing in the checkpoint."""

    def schedule() -> QATSchedule:
        return QATSchedule(quantize_at=4, freeze_ranges_at=7, freeze_batch_norm_at=7)

    path = tmp_path / "stopped.ckpt"
    fit(module_of("int8"), digits, schedule(), Stop(stop, path), epochs=3)
    assert "QATSchedule" not in torch.load(path)["callbacks"]
    record = Record()
    fit(module_of("int8"), digits, schedule(), record, epochs=3, ckpt_path=path)
    assert min(record.modes) == stop
    assert record.modes == {step: schedule().mode_at(step, 15) for step in range(stop, 15)}
    assert record.norms_train == {step: {step < 7} for step in range(stop, 15)}
    frozen = [record.scales[step] for step in range(max(stop, 7), 15)]
    assert all(torch.equal(frozen[0], scale) for scale in frozen)
    assert not bool(frozen[0].isnan().any())


def test_another_schedule_applies_after_resuming(digits: Digits, tmp_path: Any) -> None:
    path = tmp_path / "stopped.ckpt"
    fit(module_of("int8", digits), digits, QATSchedule(), Stop(5, path), epochs=3)
    record = Record()
    fit(module_of("int8"), digits, QATSchedule(freeze_ranges_at=0), record, epochs=3, ckpt_path=path)
    assert set(record.modes.values()) == {Z}


def test_steps_are_optimizer_steps_when_gradients_are_accumulated(digits: Digits) -> None:
    record = Record()
    fit(module_of("int8", digits), digits, QATSchedule(freeze_ranges_at=0.5), record, accumulate_grad_batches=2)
    assert record.modes == {0: Q, 1: Q, 2: Q, 3: Z, 4: Z, 5: Z}  # 5 batches are 3 steps


def test_a_float_module_is_left_alone(digits: Digits) -> None:
    record = Record()
    fit(module_of(None), digits, QATSchedule(freeze_batch_norm_at=None), record, epochs=1)
    assert set(record.modes.values()) == {F}


# ------------------------------------------------------------------------------------------- parameter groups


def names(net: nn.Module, group: dict[str, Any]) -> set[str]:
    by_id = {id(p): name for name, p in net.named_parameters()}
    return {by_id[id(p)] for p in group["params"]}


def test_scales_biases_and_norms_are_not_decayed() -> None:
    net = module_of("w4a4_lsq").prepared
    weights, vectors, scales = parameter_groups(net, weight_decay=0.1, scale_lr=1e-5)
    assert weights["weight_decay"] == 0.1
    assert vectors["weight_decay"] == scales["weight_decay"] == 0.0
    assert names(net, weights) == {n for n, p in net.named_parameters() if p.dim() > 1 and not n.endswith(".scale")}
    assert names(net, scales) == {n for n, _ in net.named_parameters() if n.endswith(".scale")}
    assert {q.scale.dim() for _, q in quantizers(net) if isinstance(q.scale, nn.Parameter)} == {0, 1}
    assert any(name.endswith("bias") for name in names(net, vectors))
    assert names(net, weights) | names(net, vectors) | names(net, scales) == dict(net.named_parameters()).keys()
    assert scales["lr"] == 1e-5
    assert "lr" not in weights
    assert "lr" not in vectors


def test_scales_of_groups_are_two_dimensional_and_not_decayed() -> None:
    config = qat.preset("w4g32", weight={"range": "learned"})
    net = QATModule(MODEL, TASK, ADAMW).quantized(config, [1, 8, 8]).prepared
    groups = parameter_groups(net, weight_decay=0.1)
    decayed = names(net, groups[0])
    assert any(q.scale.dim() == 2 for _, q in quantizers(net))
    assert not any(name.endswith(".scale") for name in decayed)
    assert "lr" not in groups[2]


def test_without_learned_scales_there_are_two_groups() -> None:
    assert len(parameter_groups(module_of("int8").prepared, weight_decay=0.1)) == 2
    assert len(parameter_groups(module_of(None).net, weight_decay=0.1)) == 2


def test_frozen_parameters_are_left_out() -> None:
    module = module_of(None)
    next(module.net.parameters()).requires_grad_(False)
    held = [p for group in parameter_groups(module.net) for p in group["params"]]
    assert len(held) == len(list(module.net.parameters())) - 1


class KeepOptimizer(L.Callback):
    optimizer: Any = None
    rates: list[list[float]]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.rates = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.optimizer = trainer.optimizers[0]
        self.rates.append([group["lr"] for group in self.optimizer.param_groups])


def test_the_optimizer_sees_scales_at_their_own_rate_and_a_cosine(digits: Digits) -> None:
    keep = KeepOptimizer()
    module = module_of("w4a4_lsq", digits, scale_lr=1e-4)
    fit(module, digits, QATSchedule(), keep)
    assert type(keep.optimizer) is torch.optim.AdamW
    assert [group["weight_decay"] for group in keep.optimizer.param_groups] == [0.01, 0.0, 0.0]
    for step, (weight, vector, scale) in enumerate(keep.rates):
        fall = (1 + torch.cos(torch.tensor(step / 10 * torch.pi)).item()) / 2
        assert weight == vector == pytest.approx(3e-3 * fall, rel=1e-4)
        assert scale == pytest.approx(1e-4 * fall, rel=1e-4)


def test_a_constant_rate_without_cosine(digits: Digits) -> None:
    keep = KeepOptimizer()
    fit(module_of("int8", digits, scheduler=None), digits, QATSchedule(), keep, epochs=1)
    assert keep.rates == [[3e-3, 3e-3]] * 5


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    recwarn.clear()


def test_set_mode_refuses_uncalibrated_ranges_by_name() -> None:
    with pytest.raises(RuntimeError, match="quantizers"):
        set_mode(module_of("int8").prepared, "frozen")
