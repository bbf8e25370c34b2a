"""`qat.prepare` on LightningModules that know nothing of `qat`: training, evaluation, callbacks, checkpoints."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

import qat
from qat.fake_quant import Mode
from qat.modes import get_mode, quantizers, set_mode
from qat.ptq import PTQConfig, finalize
from qat.runtime.network import IntegerNetwork
from qat.training import QATSchedule, load_from_checkpoint
from tests.training.users_modules import (
    GAN,
    Automatic,
    CallsNet,
    Configured,
    Dicts,
    Manual,
    OwnLayers,
    batches,
    features,
)

MODULES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "automatic": lambda: (Automatic(), features()),
    "manual": lambda: (Manual(), features()),
    "calls net": lambda: (CallsNet(), features()),
    "own layers": lambda: (OwnLayers(), None),
    "configure_model": lambda: (Configured(), features()),
    "dicts": lambda: (Dicts(), {"x": features()}),
    "gan": lambda: (GAN(), torch.randn(4, 4)),
}
LAYERS = {
    "own layers": ["first", "second", "last"],
    "gan": ["generator.0", "generator.2"],
}


def config(bits: int = 8, **others: Any) -> qat.QuantConfig:
    activation = {"bits": bits, "symmetric": False}
    weight = {"bits": bits, "granularity": "channel"}
    return qat.QuantConfig.from_dict({"weight": weight, "activation": activation, "input": activation} | others)


def module_of(name: str, settings: qat.QuantConfig | None = None) -> tuple[Any, Any]:
    """The user's module, and the prepared one."""
    L.seed_everything(0, verbose=False)
    module, example = MODULES[name]()
    return module, qat.prepare(module, settings or config(), example)


def trainer_of(*callbacks: L.Callback, epochs: int = 3, **options: Any) -> L.Trainer:
    settings = {
        "accelerator": "cpu", "devices": 1, "max_epochs": epochs, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return L.Trainer(callbacks=list(callbacks), **settings | options)  # type: ignore[arg-type]


def data_of(module: Any) -> Any:
    return batches(as_dict=isinstance(module, Dicts))


def call(module: Any) -> Tensor:
    """What forward gives, in evaluation."""
    module.eval()
    with torch.no_grad():
        if isinstance(module, Dicts):
            return module(x=features())["logits"]
        return module(torch.linspace(-1, 1, 16).view(4, 4) if isinstance(module, GAN) else features())


def fitted(prepared: Any, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """Trained for 3 epochs of 6 steps: ranges are observed in the first."""
    trainer = trainer_of(QATSchedule(quantize_at=6), *callbacks, **options)
    trainer.fit(prepared, data_of(prepared), data_of(prepared) if hasattr(prepared, "evaluation") else None)
    return trainer


# ------------------------------------------------------------------------------------------- structure


@pytest.mark.parametrize("name", MODULES)
def test_it_is_of_the_users_class_with_the_users_parameters(name: str) -> None:
    module, prepared = module_of(name)
    assert isinstance(prepared, type(module))
    assert type(prepared).__name__ == f"Prepared{type(module).__name__}"
    own = dict(module.named_parameters())
    assert own
    assert all(dict(prepared.named_parameters())[key] is value for key, value in own.items())
    assert not list(quantizers(module))
    layers = LAYERS.get(name, ["net.0", "net.2"])
    assert [key for key, m in prepared.named_modules() if hasattr(m, "weight_quantizer")] == layers
    assert list(quantizers(prepared))
    assert torch.equal(call(prepared), call(module))  # in mode float nothing is changed


@pytest.mark.parametrize("name", MODULES)
def test_sixteen_bits_are_float(name: str) -> None:
    module, prepared = module_of(name, config(16))
    expected = call(module)
    example = MODULES[name]()[1]
    qat.calibrate(prepared, [features() if example is None else example])
    if name == "gan":
        qat.calibrate(prepared, [torch.linspace(-1, 1, 16).view(4, 4)])
    assert (call(prepared) - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert not torch.equal(call(prepared), expected)


def test_example_input_array_is_used_and_something_is_needed() -> None:
    assert list(quantizers(qat.prepare(OwnLayers(), config())))
    with pytest.raises(ValueError, match=r"needs example_inputs to run Automatic once.*example_input_array"):
        qat.prepare(Automatic(), config())


def test_what_training_alone_runs_stays_float_and_is_reported() -> None:
    _, prepared = module_of("gan")
    assert set(prepared.meta["qat"]["left_out"]) == {"discriminator.0", "discriminator.2"}
    assert type(prepared.discriminator[0]) is nn.Linear
    text = qat.report(prepared)
    assert "discriminator.0" in text
    assert "the example inputs do not run it" in text


def test_parameters_and_layers_in_plain_lists_are_those_that_train() -> None:
    module, prepared = module_of("manual")
    assert prepared.both == [prepared.net[0], prepared.net[2]]
    assert all(hasattr(layer, "weight_quantizer") for layer in prepared.both)
    assert all(a is b for a, b in zip(prepared.biases, module.biases, strict=True))


# -------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", MODULES)
def test_it_trains_from_float_to_frozen_without_knowledge_of_batches(name: str) -> None:
    module, prepared = module_of(name)
    before = copy.deepcopy(module.state_dict())
    fitted(prepared)
    assert get_mode(prepared) is Mode.frozen
    assert all(quantizer.calibrated for _, quantizer in quantizers(prepared))
    for key, parameter in module.named_parameters():  # the discriminator's, too
        assert not torch.equal(parameter, before[key]), key
    output = call(prepared)
    assert output.isfinite().all()
    set_mode(prepared, "float")
    assert not torch.equal(call(prepared), output)


def test_a_quantizer_that_training_did_not_reach_is_named() -> None:
    class Idle(Automatic):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net[0].weight.square().sum()

    prepared = qat.prepare(Idle(), config(), features())
    with pytest.raises(RuntimeError, match=r"quantizer 'net\.quantizers\.\w+', observed in training up to step 6: "):
        trainer_of(QATSchedule(quantize_at=6)).fit(prepared, batches())


def test_layers_of_a_recorded_list_are_looked_up_but_not_run() -> None:
    _, prepared = module_of("automatic")
    assert [type(layer).__name__ for layer in prepared.net] == ["QuantLinear", "ReLU", "QuantLinear"]
    assert list(prepared.net[:-1]) == [prepared.net[0], prepared.net[1]]
    assert list(copy.deepcopy(prepared).net[0].state_dict()) == list(prepared.net[0].state_dict())
    with pytest.raises(NotImplementedError, match="quantizers stand between its layers"):
        prepared.net[:-1](features())
    with pytest.raises(TypeError, match=r"only where it was an nn\.Sequential"):
        qat.prepare(nn.Sequential(), qat.QuantConfig(), features())[0]  # type: ignore[index]


def test_quantized_training_learns_what_float_training_learns() -> None:
    losses = {}
    for kind in ("float", "qat"):
        module, prepared = module_of("automatic")
        trainer = trainer_of(*([QATSchedule(quantize_at=6)] if kind == "qat" else []), epochs=8)
        trainer.fit(prepared if kind == "qat" else module, batches())
        losses[kind] = float(trainer.callback_metrics["loss"])
        assert float(trainer.callback_metrics["accuracy"]) > 0.95
    assert losses["qat"] == pytest.approx(losses["float"], rel=0.1)


def test_a_module_that_was_trained_in_float_leaves_its_trainer_behind() -> None:
    module, _ = module_of("automatic")
    trainer_of(epochs=1).fit(module, batches())
    prepared = qat.prepare(module, config(), features())
    assert prepared._trainer is None  # type: ignore[union-attr]
    fitted(prepared)
    assert prepared._trainer is not None  # type: ignore[union-attr]
    assert copy.deepcopy(prepared)._trainer is None  # type: ignore[union-attr]
    assert torch.equal(call(pickle.loads(pickle.dumps(prepared))), call(prepared))


def test_metrics_and_hyperparameters_are_the_users() -> None:
    _, prepared = module_of("automatic")
    trainer = fitted(prepared)
    assert dict(prepared.hparams) == {"lr": 0.05, "norm": False}
    assert {"accuracy", "loss", "f1", "evaluated"} <= set(trainer.callback_metrics)
    with torch.no_grad():
        x, y = zip(*batches(), strict=True)
        right = (prepared.eval()(torch.cat(x)).argmax(1) == torch.cat(y)).float().mean()
    [result] = trainer.validate(prepared, batches(), verbose=False)
    assert result["f1"] == pytest.approx(float(right))  # micro-averaged, so equal to the accuracy


@pytest.mark.parametrize("clipping", ["norm", "value"])
def test_accumulated_and_clipped_gradients_make_one_step(clipping: str) -> None:
    steps: list[int] = []
    largest: list[float] = []

    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]
            if grads:
                flat = torch.cat(grads)
                largest.append(float(flat.norm() if clipping == "norm" else flat.abs().max()))
            steps.append(trainer.global_step)

    _, prepared = module_of("automatic", qat.preset("w4a4_lsq"))
    qat.calibrate(prepared, [features(64)])
    trainer = trainer_of(
        QATSchedule(), Watch(), accumulate_grad_batches=3, gradient_clip_val=1e-3, gradient_clip_algorithm=clipping
    )
    trainer.fit(prepared, batches())
    assert trainer.global_step == 6  # 18 batches
    assert largest
    assert max(largest) <= 1e-3 * 1.001
    assert max(largest) > 1e-3 * 0.9


def test_the_learning_rate_finder_runs_and_restores() -> None:
    _, prepared = module_of("automatic")
    qat.calibrate(prepared, [features(64)])
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    finder = Tuner(trainer_of(QATSchedule())).lr_find(prepared, batches(), num_training=40, min_lr=1e-4)
    assert finder is not None
    assert len(finder.results["lr"]) >= 10
    assert prepared.lr == finder.suggestion() != 0.05
    after = prepared.state_dict()
    for key in before:
        torch.testing.assert_close(after[key], before[key], rtol=0, atol=0, equal_nan=True)
    assert get_mode(prepared) is Mode.quantize
    fitted(prepared)


# ------------------------------------------------------------------------------- evaluation, checkpoints


@pytest.mark.parametrize("mode", ["float", "observe", "quantize", "frozen"])
def test_validate_test_and_predict_in_every_mode(mode: str) -> None:
    module, prepared = module_of("automatic", config(4))
    qat.calibrate(prepared, [features(64)])
    set_mode(prepared, mode)
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    trainer = trainer_of()
    [validated] = trainer.validate(prepared, batches(), verbose=False)
    [tested] = trainer.test(prepared, batches(), verbose=False)
    predicted = torch.cat(trainer.predict(prepared, batches()))  # type: ignore[arg-type]
    assert get_mode(prepared) is Mode(mode)
    expected = trainer.validate(module, batches(), verbose=False)[0]["evaluated"]
    assert validated["evaluated"] == tested["evaluated"]
    assert (validated["evaluated"] == expected) == (mode in ("float", "observe"))
    assert validated["evaluated"] == pytest.approx(expected, rel=0.2)
    with torch.no_grad():
        own = torch.cat([prepared.eval()(x).argmax(1) for x, _ in batches()])
    assert torch.equal(predicted, own)
    same = {k for k, v in prepared.state_dict().items() if torch.equal(v.nan_to_num(), before[k].nan_to_num())}
    moved = set(before) - same
    assert all("observer" in key for key in moved)
    assert bool(moved) == (mode == "observe")


@pytest.mark.parametrize("name", MODULES)
def test_load_from_checkpoint_rebuilds_structure_ranges_and_mode(name: str, tmp_path: Path) -> None:
    _, prepared = module_of(name)
    trainer = fitted(prepared)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = call(prepared)
    for loaded in (
        type(prepared).load_from_checkpoint(tmp_path / "last.ckpt"),
        load_from_checkpoint(type(prepared).__mro__[2], tmp_path / "last.ckpt"),
    ):
        assert type(loaded) is type(prepared)
        assert get_mode(loaded) is Mode.frozen
        assert torch.equal(call(loaded), expected)
        assert loaded.meta["qat"]["reasons"] == prepared.meta["qat"]["reasons"]
        assert qat.report(loaded) == qat.report(prepared)
    set_mode(loaded, "observe")
    fitted(loaded)


@pytest.mark.parametrize("name", MODULES)
def test_it_lowers_to_integers(name: str) -> None:
    _, prepared = module_of(name)
    fitted(prepared)
    example = MODULES[name]()[1]
    finalize(prepared, [features() if example is None else example], PTQConfig(), trained=True)
    lowered = qat.lower(prepared)
    assert any(isinstance(part, IntegerNetwork) for part in lowered.modules())
    assert not list(quantizers(lowered))
    expected = call(prepared)
    output = lowered(features()) if isinstance(lowered, IntegerNetwork) else call(lowered)
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max()


@dataclass
class Inputs:
    x: Tensor


class TakesDataclass(Automatic):
    def forward(self, inputs: Inputs) -> Tensor:  # type: ignore[override]
        return self.net(inputs.x)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        outputs = self(Inputs(x))
        return F.cross_entropy(outputs, y), outputs, y


def test_example_inputs_of_the_users_types_need_a_trusted_checkpoint(tmp_path: Path) -> None:
    prepared = qat.prepare(TakesDataclass(), config(), Inputs(features()))
    fitted(prepared).save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(TakesDataclass, tmp_path / "last.ckpt", weights_only=False).eval()
    prepared.eval()
    assert torch.equal(loaded(Inputs(features())), prepared(Inputs(features())))


def test_load_from_checkpoint_in_a_fresh_process(tmp_path: Path) -> None:
    _, prepared = module_of("own layers")
    fitted(prepared).save_checkpoint(tmp_path / "last.ckpt")
    torch.save(call(prepared), tmp_path / "expected.pt")
    code = f"""
import torch
from qat.training import load_from_checkpoint
from tests.training.users_modules import OwnLayers, features
module = load_from_checkpoint(OwnLayers, r"{tmp_path / "last.ckpt"}").eval()
assert torch.equal(module(features()), torch.load(r"{tmp_path / "expected.pt"}"))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_float_checkpoint_is_refused_with_what_to_do(tmp_path: Path) -> None:
    module, _ = module_of("automatic")
    trainer = trainer_of(epochs=1)
    trainer.fit(module, batches())
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(ValueError, match=r"not saved by a prepared .*Automatic: it has no entry 'qat'"):
        load_from_checkpoint(Automatic, tmp_path / "float.ckpt")


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    _, whole = module_of("automatic")
    fitted(whole)
    _, first = module_of("automatic")
    schedule = QATSchedule(quantize_at=6, freeze_ranges_at=16, freeze_batch_norm_at=None)
    trainer = trainer_of(schedule, epochs=2)
    trainer.fit(first, batches())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, second = module_of("automatic")
    trainer_of(QATSchedule(quantize_at=6)).fit(second, batches(), ckpt_path=tmp_path / "half.ckpt")
    expected = whole.state_dict()
    for key, value in second.state_dict().items():
        if "observer" not in key:
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0, equal_nan=True)
