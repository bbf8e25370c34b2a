"""Recipes: each against a plain computation, together, and interrupted."""

import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn

import qat
from qat import stopping
from qat.mode import Mode
from qat.modes import quantizers
from qat.presets import PRESETS
from qat.ptq import PTQConfig, finalize
from qat.training import QATModule, QATSchedule, Resumable
from qat.training.recipes import (
    Distillation,
    GradualBits,
    OscillationDamping,
    OscillationFreezing,
    QuantizedEarlyStopping,
)
from qat.training.recipes.distillation import soft_cross_entropy
from qat.training.recipes.oscillation import new_state, track
from qat.widths import set_bits
from tests.training.test_module_checkpoints import (
    ADAMW,
    METHODS,
    MODEL,
    TASK,
    Interrupt,
    difference,
    digits,
    module_of,
    trainer_of,
)

SGD = {"_target_": "torch.optim.SGD", "lr": 0.1}


def float_net() -> nn.Module:
    return module_of(None, seed=7).net


def run(module: QATModule, *callbacks: L.Callback, epochs: int = 2, **options: Any) -> L.Trainer:
    ckpt_path = options.pop("ckpt_path", None)
    trainer = trainer_of(*callbacks, epochs=epochs, **options)
    trainer.fit(module, datamodule=digits(), ckpt_path=ckpt_path)
    return trainer


class Each(L.Callback):
    """What `look` says of the module after each step; stands behind the recipes."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.seen[trainer.global_step] = self.look(pl_module.net)


# ------------------------------------------------------------------------------------------------- distillation


@pytest.mark.parametrize(("shape", "class_dim"), [((6, 5), 1), ((3, 4, 5), -1)])
def test_soft_cross_entropy_is_hintons(shape: tuple[int, ...], class_dim: int) -> None:
    a, b = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    total = 0.0
    for student, teacher in zip(a.reshape(-1, 5).tolist(), b.reshape(-1, 5).tolist(), strict=True):
        p, q = ([math.exp(v / 3.0) for v in logits] for logits in (teacher, student))
        p, q = ([v / sum(values) for v in values] for values in (p, q))
        total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)) * 9.0
    expected = total / (a.numel() // 5)
    assert float(soft_cross_entropy(a, b, 3.0, class_dim)) == pytest.approx(expected, rel=1e-5)


def test_a_step_of_distillation_is_that_of_the_sum_of_its_losses() -> None:
    """Logits and two features: one step of SGD, against autograd on the formula."""
    teacher = float_net()
    module = QATModule(MODEL, TASK, SGD, scheduler=None).quantized(qat.preset("w4a4_lsq"), [1, 8, 8])
    qat.calibrate(module.prepared, digits().calibration_batches(1))
    names = ["stem.0", "block.conv2"]
    oracle = copy.deepcopy(module.net).train()
    kept: dict[str, Tensor] = {}
    for role, net in (("s", oracle), ("t", teacher.eval())):
        for name in names:
            net.get_submodule(name).register_forward_hook(lambda _, args, y, key=role + name: kept.__setitem__(key, y))
    batches: list[tuple[Tensor, Tensor]] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batches.append(batch)

    recipe = Distillation(copy.deepcopy(teacher), temperature=2.0, weight=0.3, features=names, feature_weight=0.7)
    run(module, QATSchedule(freeze_ranges_at=None, freeze_batch_norm_at=None), recipe, Keep(), epochs=1,
        limit_train_batches=1)  # fmt: skip
    [(x, y)] = batches
    outputs, taught = oracle(x), teacher(x).detach()
    soft = nn.KLDivLoss(reduction="batchmean")((outputs / 2).log_softmax(1), (taught / 2).softmax(1)) * 4
    errors = [((kept[f"s{n}"] - kept[f"t{n}"].detach()) ** 2).mean() / (kept[f"t{n}"].detach() ** 2).mean()
              for n in names]  # fmt: skip
    loss = 0.7 * nn.functional.cross_entropy(outputs, y) + 0.3 * soft + 0.7 * sum(errors) / 2
    loss.backward()
    for name, parameter in oracle.named_parameters():
        expected = parameter.detach() - 0.1 * (0 if parameter.grad is None else parameter.grad)
        torch.testing.assert_close(module.net.get_parameter(name).detach(), expected, rtol=1e-4, atol=1e-6)
    assert module.loss_terms == []


def test_the_teacher_is_in_no_checkpoint(tmp_path: Path) -> None:
    module, plain = module_of("int8"), module_of("int8")
    for net, recipes in ((module, [Distillation(float_net())]), (plain, [])):
        trainer = trainer_of(QATSchedule(), *recipes)
        trainer.fit(net, datamodule=digits())
        trainer.save_checkpoint(tmp_path / f"{len(recipes)}.ckpt")
    with_teacher, without = (torch.load(tmp_path / f"{n}.ckpt") for n in (1, 0))
    assert with_teacher["state_dict"].keys() == without["state_dict"].keys()
    assert (tmp_path / "1.ckpt").stat().st_size == pytest.approx((tmp_path / "0.ckpt").stat().st_size, rel=0.01)
    assert difference(with_teacher["state_dict"], without["state_dict"]) > 0  # and it did teach


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (lambda: Distillation(), r"teacher=None: give the float network"),
        (lambda: Distillation(float_net(), features=["stem.2"]), r"'stem\.2' is no layer .* \(valid: stem\.0, stem\.1"),
        (lambda: Distillation(float_net(), temperature=0), "temperature=0: give a number above 0"),
        (lambda: GradualBits([4, 8]), "falling numbers of bits"),
        (lambda: GradualBits(end=0.95), r"end=0\.95 is behind qat\.schedule\.freeze_ranges_at=0\.9"),
        (lambda: OscillationFreezing(momentum=0), r"momentum=0: give a number in \(0, 1\]"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(recipe: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run(module_of("w4a4_lsq"), QATSchedule(), recipe())


# ------------------------------------------------------------------------------------------------- gradual bits


def test_bits_are_a_function_of_the_step() -> None:
    recipe = GradualBits([8, 6, 5], start=10, end=30)
    assert [recipe.bits_at(step, 100) for step in (0, 9, 10, 19, 20, 29, 30, 99)] == [8, 8, 6, 6, 5, 5, None, None]
    shares = GradualBits([8], start=0.1, end=0.5)
    assert [shares.bits_at(step, 20) for step in (0, 9, 10)] == [8, 8, None]


def test_bits_go_down_while_training_and_end_as_configured() -> None:
    module = module_of("w4a4_lsq")

    def levels(net: nn.Module) -> dict[str, int]:
        layer = net.get_submodule("block.conv1")
        weight, quantizer = layer.quantized_weight(), layer.weight_quantizer
        integers = (weight / quantizer.qparams()[0].reshape(-1, 1, 1, 1)).detach().round()
        return {"bits": quantizer.scheme.bits, "levels": len(integers.unique()), "first": net.get_submodule(
            "stem.0").weight_quantizer.scheme.bits}  # fmt: skip

    each = Each(levels)
    run(module, QATSchedule(), GradualBits([8, 6], start=3, end=6), each)
    assert [each.seen[step]["bits"] for step in range(10)] == [8, 8, 8, 6, 6, 6, 4, 4, 4, 4]
    assert all(seen["first"] == 8 for seen in each.seen.values())  # configured with more
    for step, seen in each.seen.items():
        least, most = {8: (32, 255), 6: (20, 63), 4: (8, 15)}[seen["bits"]]
        assert least < seen["levels"] <= most, step
    finalize(module.prepared, digits().calibration_batches(1), PTQConfig(), trained=True)
    x = digits().example_input(64)
    torch.testing.assert_close(qat.lower(module.prepared)(x), module.prepared(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["w4a4_lsq", "lsq_plus", "pact", "tqt", "int8", "dorefa"])
def test_ranges_follow_the_bits(preset: str) -> None:
    """Down and up again is where it was; what is not learned is what calibration with those bits gives."""
    net = module_of(preset).prepared
    before = {name: [t.clone() for t in q.qparams()] for name, q in quantizers(net) if not q.dynamic}
    error: dict[str, float] = {}
    for name, quantizer in quantizers(net):
        weight = next((m.outputs_first() for m in net.modules() if vars(m).get("_modules", {}).get("weight_quantizer")
                       is quantizer), None)  # fmt: skip
        own = quantizer.scheme.bits
        for bits in (6, own):
            set_bits(quantizer, bits, weight)
        if weight is not None:
            quantizer.mode = Mode.quantize
            error[name] = float((quantizer(weight) - weight).detach().norm() / weight.detach().norm())
    for name, quantizer in quantizers(net):
        for now, was in zip(quantizer.qparams() if not quantizer.dynamic else (), before.get(name, ()), strict=False):
            tolerance = 1.0 if preset == "tqt" else 0.1 if preset == "lsq_plus" else 1e-5
            torch.testing.assert_close(now, was, rtol=tolerance, atol=1.0 if preset == "lsq_plus" else 1e-6)
    assert preset == "dorefa" or all(value < 0.25 for value in error.values())  # which squashes weights into [-1, 1]


def test_a_learned_scale_keeps_what_it_has_learned_relative_to_calibration() -> None:
    net = module_of("w4a4_lsq").prepared
    layer = net.get_submodule("block.conv1")
    quantizer = layer.weight_quantizer
    with torch.no_grad():
        quantizer.range.scale.mul_(0.8)
    set_bits(quantizer, 6, layer.weight)
    wide = qat.prepare(float_net(), qat.preset("w4a4_lsq", weight={"bits": 6}), digits().example_input())
    wide.load_state_dict({k: v for k, v in net.state_dict().items() if k in wide.state_dict()})
    fresh = wide.get_submodule("block.conv1").weight_quantizer
    fresh.set_range_from(layer.weight)  # calibration with 6 bits
    torch.testing.assert_close(quantizer.scale, 0.8 * fresh.scale)


# ----------------------------------------------------------------------------------------- delayed activations


def test_activations_join_later() -> None:
    def modes(net: nn.Module) -> tuple[set[Mode], set[Mode]]:
        own = [q for _, q in quantizers(net)]
        return {q.mode for q in own if q.shape is not None}, {q.mode for q in own if q.shape is None}

    each, module = Each(modes), module_of("int8")
    run(module, QATSchedule(quantize_activations_at=0.4), each)
    q, f, z = {Mode.quantize}, {Mode.float}, {Mode.frozen}
    assert [each.seen[step] for step in range(10)] == [(q, f)] * 4 + [(q, q)] * 5 + [(z, z)]
    weights_only = module_of("int8")
    for _, quantizer in quantizers(weights_only.net):
        quantizer.mode = Mode.quantize if quantizer.shape is not None else Mode.float
    plain, x = float_net(), digits().example_input(8)
    state = weights_only.net.state_dict()
    plain.load_state_dict({k: state[k] for k in plain.state_dict()})
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            with torch.no_grad():  # symmetric, per channel, 127 steps
                scale = layer.weight.flatten(1).abs().amax(1).reshape(-1, *[1] * (layer.weight.dim() - 1)) / 127
                layer.weight.copy_((layer.weight / scale).round() * scale)
    torch.testing.assert_close(weights_only.net.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"quantize_activations_at=0\.9 is not before ranges freeze"):
        run(module_of("int8"), QATSchedule(quantize_activations_at=0.9))


# -------------------------------------------------------------------------------------------------- oscillation


def test_damping_adds_the_gradient_of_its_term() -> None:
    """The difference that it makes to one step of SGD, against the formula on every weight."""
    ends: list[dict[str, Tensor]] = []
    for recipes in ([], [OscillationDamping(strength=3.0)]):
        L.seed_everything(0, verbose=False)
        module = QATModule(MODEL, TASK, SGD, scheduler=None).quantized(qat.preset("w4a4_lsq"), [1, 8, 8])
        qat.calibrate(module.prepared, digits().calibration_batches(1))
        each = Each(lambda net: copy.deepcopy(net.state_dict()))
        run(module, QATSchedule(freeze_ranges_at=None), *recipes, each, epochs=1, limit_train_batches=2)
        ends.append(module.net.state_dict())
    before = each.seen[1]  # the strength at step 1 of 2 is half of its end's
    for name, low in (("block.conv1", -7), ("stem.0", -127)):
        w, s = before[f"{name}.weight"], before[f"{name}.weight_quantizer.range.scale"].reshape(-1, 1, 1, 1)
        q = (w / s).round().clamp(low, -low)
        pull = 2 * 1.5 * (w - q * s) * ((w / s).abs() <= -low)
        made = ends[0][f"{name}.weight"] - ends[1][f"{name}.weight"]
        torch.testing.assert_close(made, 0.1 * pull, rtol=1e-3, atol=1e-4)
        assert float(pull.abs().max()) > 5e-3


def by_hand(path: Sequence[int], momentum: float, threshold: float) -> tuple[list[int], float, bool]:
    """Algorithm 1 of Nagel et al., for one weight."""
    last, average, frequency, direction, frozen, used = path[0], float(path[0]), 0.0, 0, False, [path[0]]
    for integer in path[1:]:
        if frozen:
            used.append(last)
            continue
        jump = (integer > last) - (integer < last)
        oscillates = jump != 0 and direction != 0 and jump != direction
        frequency = momentum * oscillates + (1 - momentum) * frequency
        average = momentum * integer + (1 - momentum) * average
        direction, last = jump or direction, integer
        if frequency > threshold:
            frozen, last = True, round(average)
        used.append(last)
    return used, frequency, frozen


def test_tracking_is_the_papers_algorithm() -> None:
    torch.manual_seed(1)
    paths = torch.randint(-2, 3, (30, 12)).float()
    paths[:, 0], paths[:, 1] = 1.0, torch.arange(30).float()  # never moves; always the same way
    state = new_state(paths[0].reshape(1, -1))
    seen = [state["integers"].clone()]
    for integers in paths[1:]:
        track(state, integers.reshape(1, -1), 0.1, 0.3)
        seen.append(state["integers"].clone())
    for i in range(12):
        used, frequency, frozen = by_hand([int(v) for v in paths[:, i]], 0.1, 0.3)
        assert [int(t[0, i]) for t in seen] == used, i
        if not frozen:
            assert float(state["frequency"][0, i]) == pytest.approx(frequency, abs=1e-6)
        assert bool(state["frozen"][0, i]) == frozen
    assert state["frozen"].any()
    assert not state["frozen"].all()


def test_frozen_weights_stay_on_their_integer() -> None:
    """At a high rate weights jump; what is fixed is on the same integer in each later step, whatever the scale does."""
    L.seed_everything(0, verbose=False)
    module = QATModule(MODEL, TASK, {**ADAMW, "lr": 0.02}, scheduler=None).quantized(
        qat.preset("w4a4_lsq"), [1, 8, 8])  # fmt: skip
    qat.calibrate(module.prepared, digits().calibration_batches(1))
    recipe = OscillationFreezing(momentum=0.2, first_threshold=0.3, last_threshold=0.3)
    name = "net.block.conv1.weight_quantizer"

    def look(net: nn.Module) -> tuple[Tensor, Tensor]:
        layer = net.get_submodule("block.conv1")
        v = layer.weight.detach() / layer.weight_quantizer.qparams()[0].reshape(-1, 1, 1, 1)
        return v, recipe.tracked[name]["frozen"].clone().reshape(v.shape) if recipe.tracked else v < -1e9

    each = Each(look)
    run(module, QATSchedule(freeze_ranges_at=None), recipe, each, epochs=6)
    steps = [each.seen[step] for step in range(30)]
    assert bool(steps[-1][1].any())
    for (v, frozen), (later, still) in itertools.pairwise(steps):
        assert bool(still[frozen].all())
        torch.testing.assert_close(later[frozen], v[frozen].round(), atol=1e-3, rtol=0)
    assert 0 < recipe.frozen_share < 0.9


# ----------------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("name", ["cosine", "cosine_warmup", "linear", "constant"])
def test_schedulers_by_step(name: str) -> None:
    from omegaconf import OmegaConf

    path = Path(__file__).parents[2] / "conf" / "scheduler" / f"{name}.yaml"
    description: Any = OmegaConf.to_container(OmegaConf.load(path))
    if name == "cosine_warmup":
        description["warmup"] = 4
    rates: list[float] = []

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"] / 0.1)

    L.seed_everything(0, verbose=False)
    run(QATModule(MODEL, TASK, SGD, scheduler=description), Keep())
    fall = [(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)]
    after = [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    expected = {
        "cosine": fall,
        "cosine_warmup": [0.01 + 0.99 * step / 4 for step in range(4)] + after,
        "linear": [1 - step / 10 for step in range(10)],
        "constant": [1.0] * 10,
    }
    assert rates == pytest.approx(expected[name], abs=1e-6)


# ----------------------------------------------------------------------------------------------- early stopping


def test_early_stopping_counts_the_quantized_network_alone() -> None:
    """A metric that is best in float and gets no better: it stops `patience` validations after quantization."""

    class Metric(L.Callback):
        def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            pl_module.log("score", float(trainer.current_epoch))  # lower is better: it only gets worse

    stop = QuantizedEarlyStopping("score", patience=2)
    trainer = run(module_of("w4a4_lsq"), QATSchedule(quantize_at=10, quantize_activations_at=15), stop,
                  GradualBits([8], start=15, end=20), Metric(), epochs=12)  # fmt: skip
    assert float(stop.best_score) == 4.0  # the first epoch that is quantized to its end, to 4 bits: steps 20 to 24
    assert stop.stopped_epoch == 6
    assert trainer.global_step == 35


# ------------------------------------------------------------------------------------------- together, interrupted


def everything() -> list[L.Callback]:
    return [
        QATSchedule(quantize_activations_at=3, freeze_ranges_at=12, freeze_batch_norm_at=12),
        Distillation(float_net(), features=["stem.0"]),
        GradualBits([8, 6], start=3, end=8),
        OscillationDamping(0.1),
        OscillationFreezing(momentum=0.2, first_threshold=0.3, last_threshold=0.15),
        EMAWeightAveraging(decay=0.8),
        QuantizedEarlyStopping(patience=1, min_delta=-10.0),
    ]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("preset", "step"), [("w4a4_lsq", 6), ("w4a4_lsq", 8), ("running", 5)])
def test_all_recipes_interrupted_go_on_to_the_same_end(
    tmp_path: Path, preset: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within an epoch, right before the last change of bits, and at the start of an epoch."""
    running = {"bits": 4, "symmetric": False, "range": "running", "observer": "ema"}
    monkeypatch.setitem(METHODS, "running", lambda: qat.preset("int8", weight={"bits": 4}, activation=running))
    whole = module_of(preset)
    assert run(whole, *everything(), epochs=3).global_step == 15
    stop = Interrupt(step, "on_train_batch_start")
    with pytest.raises(stopping.Stopped), stopping.listening():
        run(module_of(preset), stop, Resumable(str(tmp_path)), *everything(), epochs=3)
    resumed = module_of(preset, calibrated=False, seed=1)
    assert run(resumed, *everything(), epochs=3, ckpt_path=tmp_path / "step.ckpt").global_step == 15
    assert difference(whole.state_dict(), resumed.state_dict()) == 0.0
    loaded = QATModule.load_from_checkpoint(tmp_path / "step.ckpt")  # the bits of that moment
    assert loaded.net.get_submodule("block.conv1").weight_quantizer.scheme.bits == 6


@pytest.mark.sampled(4)
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "off"])
def test_all_recipes_with_every_preset(preset: str) -> None:
    module = module_of(preset)
    run(module, *everything(), epochs=3, limit_train_batches=5)
    finalize(module.prepared, digits().calibration_batches(1), PTQConfig(reestimate_batch_norm=True), trained=True)
    outputs = module(digits().example_input(8))
    assert bool(outputs.isfinite().all())
    torch.testing.assert_close(qat.lower(module.prepared)(digits().example_input(8)), outputs, atol=0.3, rtol=0.1)
