"""What Lightning's own quantization-aware-training callback was removed for (Lightning-AI/pytorch-lightning 16750)."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune

import qat
from qat.fake_quant import Mode
from qat.modes import get_mode, quantizers, set_mode
from qat.ptq import PTQConfig, finalize
from qat.runtime.network import IntegerNetwork
from qat.training import QATSchedule, load_from_checkpoint
from tests.training.test_lightning_modules import call, config, fitted, module_of, trainer_of
from tests.training.users_modules import CLASSES, FEATURES, Automatic, batches, features


def integer_weights(network: IntegerNetwork) -> dict[str, Tensor]:
    """Layer -> its integers, [out, in], less their zero points."""
    found = {}
    for name, layer in network.layers.items():
        state = layer.state_dict()
        if "weight" in state:
            zero_point = state["weight_zero_point"].int().reshape(-1, *[1] * (state["weight"].dim() - 1))
            found[name] = state["weight"].int() - zero_point
    return found


def test_16609_the_defaults_work() -> None:
    """`QuantizationAwareTraining()` raised: its default asked torch for a configuration version that torch refused."""
    prepared = qat.prepare(Automatic(), qat.preset("int8"), features())
    qat.calibrate(prepared, [features(64)])
    trainer_of(QATSchedule()).fit(prepared, batches())
    assert get_mode(prepared) is Mode.frozen


class Keywords(Automatic):
    """Called as Hugging Face's networks are: `self(**batch)`, with what is optional left out or given."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask
        y = self.net(x)
        return y if scale is None else y * scale

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        outputs = self(x=x, mask=torch.ones_like(x))
        return F.cross_entropy(outputs, y), outputs, y


@pytest.mark.parametrize(
    "given", [{"x": 1.0}, {"x": 1.0, "mask": 0.5}, {"x": 1.0, "scale": 2.0}], ids=["x", "mask", "scale"]
)
def test_15862_forward_takes_keyword_arguments(given: dict[str, float]) -> None:
    """The callback replaced `forward` by a wrapper of one positional argument: `self(**batch)` was a TypeError."""
    module = Keywords()
    prepared = qat.prepare(module, config(16), {"x": features()})
    qat.calibrate(prepared, [{"x": 2 * features(64)}])
    prepared.eval()
    inputs = {key: value * (torch.ones(4, 1) if key == "scale" else features()) for key, value in given.items()}
    expected = module.eval()(**inputs)
    assert (prepared(**inputs) - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert torch.equal(prepared(inputs["x"]), prepared(x=inputs["x"]))
    fitted(prepared)


class Several(Automatic):
    """Forward takes two tensors and anything else, as `*args, **kwargs`, which it hands on."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs)

    def inner(self, x: Tensor, y: Tensor, swap: bool = False) -> Tensor:
        return self.net(y if swap else x) + self.net(x)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        outputs = self(x, x, swap=True)
        return F.cross_entropy(outputs, y), outputs, y


def test_7926_forward_takes_any_arguments() -> None:
    """The wrapper of `forward` had one argument, `data`: modules whose forward takes more could not be trained."""
    module = Several()
    x, y = features(), features().flip(0)
    prepared = qat.prepare(module, config(16), (x, y))
    qat.calibrate(prepared, [(x, y)])
    prepared.eval()
    module.eval()
    for swap in (False, True):
        expected = module(x, y, swap=swap)
        assert (prepared(x, y, swap=swap) - expected).abs().max() <= 1e-3 * expected.abs().max()
    fitted(prepared)


def test_12896_test_after_fit_from_a_checkpoint(tmp_path: Path) -> None:
    """The callback converted the network when fit ended, so `trainer.test(ckpt_path=...)` found no keys that fit."""
    _, prepared = module_of("automatic")
    checkpoint = ModelCheckpoint(tmp_path, monitor="evaluated", save_last=True)
    trainer = trainer_of(QATSchedule(quantize_at=6), checkpoint, enable_checkpointing=True)
    trainer.fit(prepared, batches(), batches())
    [after_fit] = trainer.test(prepared, batches(), verbose=False)
    for path in ("last", checkpoint.last_model_path):
        [result] = trainer.test(prepared, batches(), ckpt_path=path, verbose=False)
        assert result == after_fit
    assert trainer.test(prepared, batches(), ckpt_path="best", verbose=False)
    finalize(prepared, [features(64)], PTQConfig(), trained=True)
    qat.lower(prepared)
    [again] = trainer.test(prepared, batches(), ckpt_path="last", verbose=False)  # lowering has changed nothing
    assert again == after_fit
    [fresh] = trainer_of().test(load_from_checkpoint(Automatic, checkpoint.last_model_path), batches(), verbose=False)
    assert fresh == after_fit


def halves(module: nn.Module) -> dict[str, Tensor]:
    """Prune half of the weights of every linear layer; returns the masks."""
    masks = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            prune.l1_unstructured(layer, "weight", amount=0.5)
            masks[name.removeprefix("net.")] = layer.get_buffer("weight_mask")
    assert masks
    return masks


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("first", ["prune", "prepare"])
def test_11047_pruning_in_the_same_run(first: str, symmetric: bool) -> None:
    """Pruning and the callback could not be used together: neither knew of the weight that the other had replaced."""
    L.seed_everything(0, verbose=False)
    module = Automatic()
    masks = halves(module) if first == "prune" else {}
    weight = {"bits": 8, "symmetric": symmetric, "range": "dynamic" if symmetric else "fixed"}
    prepared = qat.prepare(module, qat.QuantConfig.from_dict({"weight": weight}), features())
    masks = masks or halves(prepared)
    if first == "prune":
        assert torch.equal(call(prepared), call(module))
    before = prepared.net[0].weight_orig.clone()
    trainer_of(QATSchedule(quantize_at=6)).fit(prepared, batches())  # no forward follows the last step
    assert not torch.equal(prepared.net[0].weight_orig, before)
    for layer in (prepared.net[0], prepared.net[2]):  # the masks of the last step, on the weights of the last step
        stored = layer.outputs_first()
        assert torch.equal(stored, layer.weight_orig * layer.weight_mask)
    finalize(prepared, [features(64)], PTQConfig(), trained=True)
    lowered = qat.lower(prepared)
    integers = integer_weights(lowered.net)
    assert len(integers) == len(masks) == 2
    for name, mask in masks.items():
        kept = mask.bool()
        assert int(kept.sum()) == kept.numel() // 2
        assert not integers[f"net.{name}" if f"net.{name}" in integers else name][~kept].any()
        assert (integers[f"net.{name}" if f"net.{name}" in integers else name][kept] != 0).float().mean() > 0.9
    expected = call(prepared)
    assert (call(lowered) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_11047_lightnings_pruning_callback(tmp_path: Path) -> None:
    """Its own callback prunes prepared layers at every epoch; checkpoints hold weights with the masks applied."""
    _, prepared = module_of("automatic")
    pruning = ModelPruning("l1_unstructured", amount=0.5, use_global_unstructured=False, parameter_names=["weight"],
                           parameters_to_prune=[(prepared.net[0], "weight")])  # fmt: skip
    trainer = fitted(prepared, pruning)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_from_checkpoint(Automatic, tmp_path / "last.ckpt")
    assert torch.equal(call(loaded), call(prepared))
    zeros = loaded.net[0].weight == 0
    assert float(zeros.float().mean()) == pytest.approx(1 - 0.5**3, abs=0.02)  # half of the rest, three times
    finalize(prepared, [features(64)], PTQConfig(), trained=True)
    integers = integer_weights(qat.lower(prepared).net)
    assert next(v for v in integers.values() if v.shape[1] == FEATURES)[zeros].count_nonzero() == 0


class Backbone(nn.Module):
    """What cannot be quantized (its own forward branches on values) beside what can."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.first = nn.Linear(FEATURES, 16)
        self.second = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if bool((x.abs() > 100).any()):
            x = x.clamp(-100, 100)
        return self.second(F.gelu(self.first(x)))


def test_7552_not_all_of_a_network_has_to_be_quantizable() -> None:
    """A request beside the bugs; its neighbours (7551, 8068): any layer without a quantized form stopped the run."""
    L.seed_everything(0, verbose=False)
    module = Automatic()
    module.net = Backbone()  # type: ignore[assignment]
    prepared: Any = qat.prepare(
        module, config(8, rules=[{"match": "net.second", "weight": {"bits": None}}]), features()
    )
    assert isinstance(prepared.net, Backbone)
    assert type(prepared.net.second) is nn.Linear
    assert "net" in prepared.meta["qat"]["untraced"]
    trainer = fitted(prepared)
    fitted(prepared)  # and once more (7427): nothing is converted behind the user's back
    assert get_mode(prepared) is Mode.frozen
    assert {name for name, _ in quantizers(prepared)} == {"net.first.weight_quantizer", "net.first.input_quantizer"}
    [result] = trainer.test(prepared, batches(), verbose=False)
    set_mode(prepared, "float")
    [float_result] = trainer.test(prepared, batches(), verbose=False)
    assert result["f1"] == pytest.approx(float_result["f1"], abs=0.05)
