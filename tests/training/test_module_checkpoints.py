"""A checkpoint is enough: in any phase it loads without arguments, computes the same, and training goes on from it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import qat
from qat import stopping
from qat.mode import Mode
from qat.modes import get_mode, quantizers
from qat.scheme import QuantConfig
from qat.training import AtomicCheckpointIO, CSVLogger, QATModule, QATSchedule, Resumable
from qat.training.checkpoints import newest
from qat.training.module import build
from qat.zoo.data import Digits

MODEL = {"_target_": "qat.zoo.models.SmallCNN", "in_channels": 1, "num_classes": 10, "width": 4}
TASK = {"_target_": "qat.zoo.tasks.Classification", "num_classes": 10}
ADAMW = {"_target_": "torch.optim.AdamW", "lr": 3e-3, "weight_decay": 0.01}


def digits() -> Digits:
    """320 training images: 5 steps an epoch."""
    data = Digits(name="digits", channels=1, image_size=8, num_classes=10, mean=[0.3], std=[0.37], batch_size=64)
    for key, count in {"train": 320, "val": 64, "test": 128}.items():
        split = data.split(key)
        data._splits[key] = type(split)(split.images[:count], split.labels[:count])
    return data


def _with(**schemes: dict[str, Any]) -> Callable[[], QuantConfig]:
    return lambda: qat.preset("int8", **schemes)


METHODS: dict[str, Callable[[], QuantConfig]] = {
    "lsq_plus": _with(activation={"range": "lsq_plus", "symmetric": False, "observer": "mse"},
                      weight={"range": "lsq_plus", "symmetric": False, "bits": 4, "narrow_range": False}),
    "pact": _with(activation={"range": "pact", "bits": 4}),
    "tqt": _with(activation={"range": "tqt"}, weight={"range": "tqt"}),
    "dorefa": _with(activation={"range": "dorefa", "bits": 4}, weight={"range": "dorefa", "bits": 3}),
    "adaptive": _with(weight={"rounding": "adaptive", "range": "fixed", "bits": 3}),
    "codebook": _with(weight={"format": "codebook", "bits": 3, "range": "learned", "refresh": 4}),
    "product": _with(weight={"format": "product", "bits": 4, "range": "learned", "granularity": "group",
                             "group_size": 3, "allow_padding": True, "refresh": 4}),
    "dsq": _with(weight={"gradient": "dsq", "bits": 4}, activation={"gradient": "dsq"}),
    "noise": _with(weight={"gradient": "noise", "bits": 4}),
}  # fmt: skip
"""Methods that learn, count or anneal something of their own."""


def module_of(preset: str | None, calibrated: bool = True, seed: int = 0) -> QATModule:
    L.seed_everything(seed, verbose=False)
    module = QATModule(MODEL, TASK, ADAMW)
    if preset is not None:
        config = METHODS[preset]() if preset in METHODS else qat.preset(preset)
        module = module.quantized(config, [1, 8, 8])
        if calibrated:
            qat.calibrate(module.prepared, digits().calibration_batches(1))
    return module


def trainer_of(*callbacks: L.Callback, epochs: int = 1, **options: Any) -> L.Trainer:
    defaults = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False, "devices": 1}
    shown = {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    return L.Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**defaults, **shown, **options})


PHASES: dict[str, tuple[str | None, dict[str, Any], Mode]] = {
    "float": (None, {}, Mode.float),
    "float of a prepared network": ("int8", {"observe_at": 100, "quantize_at": 100}, Mode.float),
    "observe": ("w4a4_lsq", {"quantize_at": 100}, Mode.observe),
    "quantize": ("int8", {"freeze_ranges_at": None}, Mode.quantize),
    "quantize, learned": ("w4a4_lsq", {"freeze_ranges_at": None}, Mode.quantize),
    "quantize, groups": ("w4g32", {"freeze_ranges_at": None}, Mode.quantize),
    "quantize, affine": ("w8a8_asymmetric", {"freeze_ranges_at": None}, Mode.quantize),
    "frozen": ("w4a4", {"freeze_ranges_at": 3}, Mode.frozen),
    **{name: (name, {"freeze_ranges_at": None}, Mode.quantize) for name in METHODS},
    "observe, then a codebook": ("codebook", {"quantize_at": 2, "freeze_ranges_at": None}, Mode.quantize),
    "observe, then adaptive": ("adaptive", {"quantize_at": 2, "freeze_ranges_at": None}, Mode.quantize),
}


@pytest.fixture(scope="module", params=PHASES, ids=list(PHASES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[QATModule, Path, Mode]:
    """A module trained for an epoch, its checkpoint, and the mode of its phase."""
    preset, schedule, mode = PHASES[request.param]
    module = module_of(preset, calibrated="quantize_at" not in schedule)
    trainer = trainer_of(*([QATSchedule(**schedule)] if preset else []))
    trainer.fit(module, datamodule=digits())
    path = tmp_path_factory.mktemp("phase") / "saved.ckpt"
    trainer.save_checkpoint(path)
    return module.eval(), path, mode


@pytest.mark.sampled(3)
def test_a_checkpoint_of_any_phase_loads_without_arguments(saved: tuple[QATModule, Path, Mode]) -> None:
    module, path, mode = saved
    torch.manual_seed(99)  # a network left at its initial values would differ
    loaded = QATModule.load_from_checkpoint(path).eval()
    inputs, _ = digits().test_tensors()
    with torch.no_grad():
        expected = module(inputs)
        assert torch.equal(loaded(inputs), expected)
    assert bool(torch.isfinite(expected).all())
    assert get_mode(loaded.net) is get_mode(module.net) is mode
    assert {q.mode for _, q in quantizers(loaded)} <= {mode}
    assert dict(loaded.hparams) == dict(module.hparams)
    ours, theirs = module.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in ours)


@pytest.mark.sampled(3)
def test_quantized_phases_do_quantize(saved: tuple[QATModule, Path, Mode]) -> None:
    _, path, mode = saved
    loaded = QATModule.load_from_checkpoint(path).eval()
    inputs, _ = digits().test_tensors()
    before = loaded(inputs)
    for _, quantizer in quantizers(loaded):
        quantizer.mode = Mode.float
    assert torch.equal(loaded(inputs), before) == (mode in (Mode.float, Mode.observe))


@pytest.mark.sampled(3)
def test_checkpoints_hold_nothing_but_tensors_and_plain_data(saved: tuple[QATModule, Path, Mode]) -> None:
    module, path, mode = saved
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["qat"]["mode"] == mode.value
    assert checkpoint["qat"]["quant"] == module.hparams["quant"]
    loaded = QATModule.load_from_checkpoint(path, weights_only=True)
    assert get_mode(loaded.net) is mode


@pytest.mark.sampled(3)
def test_a_trainer_tests_from_a_checkpoint_path(saved: tuple[QATModule, Path, Mode]) -> None:
    module, path, mode = saved
    inputs, targets = digits().test_tensors()
    with torch.no_grad():
        accuracy = float((module.eval()(inputs).argmax(1) == targets).float().mean())
    fresh = QATModule(**dict(torch.load(path)["hyper_parameters"]))
    [results] = trainer_of().test(fresh, datamodule=digits(), ckpt_path=str(path), verbose=False)
    assert results["test_accuracy"] == pytest.approx(accuracy)
    assert results["test_loss"] > 0
    assert get_mode(fresh.net) is mode


def test_a_checkpoint_of_a_model_checkpoint_is_plain_too(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, monitor="val_loss", save_last=True)
    trainer = trainer_of(keep, QATSchedule(), enable_checkpointing=True)
    module = module_of("w4a4_lsq")
    trainer.fit(module, datamodule=digits())
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    [best] = trainer.test(module, datamodule=digits(), ckpt_path="best", verbose=False, weights_only=True)
    assert 0 <= best["test_accuracy"] <= 1


# ----------------------------------------------------------------------------- from float to quantized, by copies


def test_quantized_starts_from_copies_of_the_weights() -> None:
    module = module_of(None)
    quantized = module.quantized(qat.preset("w4a4_lsq"), [1, 8, 8], optimizer={**ADAMW, "lr": 1e-5}, scale_lr=1e-6)
    ours, theirs = dict(module.net.named_parameters()), dict(quantized.net.named_parameters())
    assert ours.keys() < theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name])
        assert parameter.data_ptr() != theirs[name].data_ptr()
    assert quantized.hparams["optimizer"]["lr"] == 1e-5
    assert quantized.hparams["scale_lr"] == 1e-6
    assert quantized.hparams["quant"] == qat.preset("w4a4_lsq").to_dict()
    assert module.hparams["quant"] is None
    inputs, _ = digits().test_tensors()
    assert torch.allclose(module.eval()(inputs), quantized.eval()(inputs), atol=1e-5)  # mode float


def test_prepared_says_what_to_do_with_a_float_module() -> None:
    with pytest.raises(TypeError, match=r"QATModule\.quantized\(config"):
        _ = module_of(None).prepared


def test_quant_needs_an_input_shape() -> None:
    with pytest.raises(ValueError, match="input_shape"):
        QATModule(MODEL, TASK, ADAMW, quant=qat.preset("int8").to_dict())


def test_build_calls_the_target_with_the_rest() -> None:
    layer = build({"_target_": "torch.nn.Linear", "out_features": 3, "bias": False}, 2)
    assert isinstance(layer, nn.Linear)
    assert layer.weight.shape == (3, 2)
    assert layer.bias is None


@pytest.mark.parametrize(
    ("description", "said"),
    [
        ({"hidden": 3}, r"needs _target_.*\{'hidden': 3\}"),
        ({"_target_": "qat.zoo.models.NoSuch"}, r"_target_=qat\.zoo\.models\.NoSuch names nothing"),
        ({"_target_": "no_such_package.Net"}, r"_target_=no_such_package\.Net names nothing"),
    ],
)
def test_build_refuses_what_it_cannot_find(description: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(description)


# ---------------------------------------------------------------------------------- interrupted, and going on


class Interrupt(L.Callback):
    """SIGTERM at a step."""

    def __init__(self, step: int, hook: str) -> None:
        self.step = step
        setattr(self, hook, self._maybe)

    def _maybe(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    folder: Path, preset: str | None, *first: L.Callback, ckpt_path: Path | None = None, **options: Any
) -> tuple[dict[str, Tensor], str]:
    """Everything that the network holds after three epochs, and the curves."""
    module = module_of(preset, calibrated=ckpt_path is None, seed=0 if ckpt_path is None else 1)
    schedule = [QATSchedule(freeze_ranges_at=0.8, freeze_batch_norm_at=0.8)] if preset else []
    logger = CSVLogger(str(folder), version="of")
    trainer = trainer_of(
        *first, Resumable(str(folder / "kept")), *schedule, epochs=3, logger=logger, log_every_n_steps=1,
        plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip
    with stopping.listening():
        trainer.fit(module, datamodule=digits(), ckpt_path=ckpt_path)
    assert trainer.global_step == (9 if options else 15)
    return module.state_dict(), logger.path.read_text()


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


MOMENTS = {
    "first batch": (5, "on_train_batch_start"),
    "within an epoch": (7, "on_train_batch_start"),
    "last batch": (8, "on_train_batch_end"),
    "end of an epoch": (9, "on_train_batch_end"),
    "validation": (10, "on_validation_batch_start"),
    "end of validation": (5, "on_validation_end"),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("preset", "moment"),
    [*((preset, moment) for preset in (None, "w4a4_lsq") for moment in MOMENTS),
     *((preset, "within an epoch") for preset in ("int8", *METHODS))],
)  # fmt: skip
def test_an_interrupted_run_goes_on_to_the_same_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, preset: str | None, moment: str
) -> None:
    """Weights, BatchNorm statistics, ranges and curves are those of the run that was never interrupted."""
    expected, curves = fit(tmp_path / "whole", preset)
    with caplog.at_level("INFO", logger="qat"), pytest.raises(stopping.Stopped, match="SIGTERM") as stopped:
        fit(tmp_path / "run", preset, Interrupt(*MOMENTS[moment]))
    path = newest(tmp_path / "run" / "kept")
    assert path is not None
    assert (stopped.value.exit_code, stopped.value.told) == (143, True)
    assert f"Go on with: ckpt_path={path}" in caplog.text
    resumed, resumed_curves = fit(tmp_path / "run", preset, ckpt_path=path)
    assert difference(expected, resumed) == 0.0
    assert curves == resumed_curves


def test_gradients_that_add_up_are_waited_for(tmp_path: Path) -> None:
    expected, curves = fit(tmp_path / "whole", None, accumulate_grad_batches=2)
    with pytest.raises(stopping.Stopped):
        fit(tmp_path / "run", None, Interrupt(4, "on_train_batch_end"), accumulate_grad_batches=2)
    path = tmp_path / "run" / "kept" / "step.ckpt"
    resumed, resumed_curves = fit(tmp_path / "run", None, ckpt_path=path, accumulate_grad_batches=2)
    assert difference(expected, resumed) == 0.0
    assert curves == resumed_curves
