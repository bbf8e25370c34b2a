"""Every logged number against a computation of its own."""

import csv
import itertools
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn

import qat
from qat.modes import quantizers
from qat.training import LogQuantizers, QATModule, QATSchedule, quantizer_log
from qat.training.quantizer_log import append, measure, oscillating, thin
from tests.training.test_module_checkpoints import ADAMW, MODEL, TASK, digits, trainer_of

EVERY = 5


class Kept(Logger):
    """A logger that keeps metrics."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[int, dict[str, float]] = {}

    name, version = "kept", "0"

    def log_hyperparams(self, *args: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.setdefault(step or 0, {}).update(metrics)


class Watch(L.Callback):
    """What the quantizers are given and return in steps that are logged, and weights before each step."""

    def __init__(self) -> None:
        self.given: dict[tuple[int, str], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.grads: dict[tuple[int, str], float] = {}
        self.integers: dict[tuple[int, str], Tensor] = {}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        for name, layer in pl_module.net.named_modules():
            if isinstance(layer, nn.Conv2d):
                quantizer = layer.weight_quantizer
                scale = quantizer.qparams()[0].detach().reshape(-1, 1, 1, 1)
                low, high = quantizer.quant_min, quantizer.quant_max
                self.integers[step, f"{name}.weight"] = (layer.weight.detach() / scale).round().clamp(low, high)
        if step % EVERY:
            return

        def hook(quantizer: Any, args: Any, y: Tensor) -> None:
            x = args[0].detach().clone()
            scale, zero = (t.detach().clone() for t in quantizer.qparams(x))
            self.given.setdefault((step, quantizer.name), (x, y.detach().clone(), scale, zero))

        self.handles = [q.register_forward_hook(hook) for _, q in quantizers(pl_module)]

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        for _, q in quantizers(pl_module):
            grads = [p.grad for p in q.range.parameters() if p.grad is not None]
            if grads:
                self.grads[trainer.global_step, q.name] = math.sqrt(sum(float((g**2).sum()) for g in grads))

    def on_train_batch_end(self, *args: Any) -> None:
        for handle in self.__dict__.pop("handles", []):
            handle.remove()


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of 15 steps at a high rate: rows of quantizers.csv by (step, name), metrics, and what was watched."""
    folder = tmp_path_factory.mktemp("log")
    L.seed_everything(0, verbose=False)
    changes = {"activation": {"symmetric": False, "range": "lsq_plus", "observer": "minmax"}}
    module = QATModule(MODEL, TASK, {**ADAMW, "lr": 0.02}, scheduler=None).quantized(
        qat.preset("w4a4_lsq", **changes), [1, 8, 8])  # fmt: skip
    qat.calibrate(module.prepared, digits().calibration_batches(1))
    watch, kept, table = Watch(), Kept(), CSVLogger(folder, name="csv", version="qat")
    trainer = trainer_of(QATSchedule(freeze_ranges_at=None), LogQuantizers(EVERY, window=4), watch, epochs=3,
                         logger=[table, kept], log_every_n_steps=1)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizer_log, "SAMPLE", 10**9)  # all values: a sample has a test of its own
        trainer.fit(module, datamodule=digits())
    with (folder / "csv" / "qat" / "quantizers.csv").open() as file:
        rows = {(int(row["step"]), row["name"]): row for row in csv.DictReader(file)}
    return rows, kept.metrics, watch, module


def test_the_table_has_a_row_a_quantizer_and_step(logged: Any) -> None:
    rows, metrics, _, module = logged
    names = {q.name: "activation" if q.shape is None else "weight" for _, q in quantizers(module)}
    assert {(step, name): row["kind"] for (step, name), row in rows.items()} == {
        (step, name): kind for step in (0, 5, 10) for name, kind in names.items()}  # fmt: skip
    assert "block.conv1.weight" in names
    for (step, name), row in rows.items():
        for key, value in row.items():
            if key not in ("step", "name", "kind"):
                found = metrics[step].get(f"{key}/{name}")
                assert (value == "") == (found is None)
                assert found is None or float(value) == pytest.approx(found, rel=1e-5)


def test_every_number_is_what_it_says(logged: Any) -> None:
    rows, _, watch, module = logged
    by_name = {q.name: q for _, q in quantizers(module)}
    some_clipped = False
    for (step, name), row in rows.items():
        x, y, scale, zero = watch.given[step, name]
        q = by_name[name]
        low, high = int(q.quant_min), int(q.quant_max)
        per_channel = [-1, *[1] * (x.dim() - 1)] if scale.dim() and scale.numel() > 1 else [1] * x.dim()
        s, z = scale.reshape(per_channel).double(), zero.reshape(per_channel).double()
        for key, value in (("mean", scale.mean()), ("min", scale.min()), ("max", scale.max())):
            assert float(row[f"scale_{key}"]) == pytest.approx(float(value), rel=1e-5)
        assert float(row["zero_point"]) == pytest.approx(float(zero.mean()))
        x = x.clamp(min=0) if q.relu else x
        levels = torch.round(x.double() / s) + z
        outside = [not low <= v <= high for v in levels.flatten().tolist()]
        assert float(row["clipped"]) == pytest.approx(sum(outside) / len(outside), abs=2e-3)
        some_clipped |= any(outside)
        used = {int(v) for v in (torch.round(y.double() / s) + z).flatten().tolist()}
        assert float(row["levels_used"]) == pytest.approx(len(used) / (high - low + 1), rel=1e-5)
        power, noise = float((x.double() ** 2).sum()), float(((x.double() - y.double()) ** 2).sum())
        assert float(row["sqnr_db"]) == pytest.approx(10 * math.log10(power / noise), abs=1e-2)
        learned = (step, name) in watch.grads
        assert learned == (name != "x") == (row["scale_grad_norm"] != "")
        assert not learned or float(row["scale_grad_norm"]) == pytest.approx(watch.grads[step, name], rel=1e-4)
    assert some_clipped


def test_the_oscillating_share_counts_integers_that_turned(logged: Any) -> None:
    rows, _, watch, _ = logged
    shares = []
    for name in ("stem.0.weight", "block.conv1.weight", "block.conv2.weight"):
        assert rows[0, name]["oscillating"] == ""  # nothing was watched before
        for step in (5, 10):
            paths = torch.stack([watch.integers[s, name] for s in range(step - 3, step + 1)]).flatten(1).T.tolist()
            jumps = [[b - a for a, b in itertools.pairwise(path)] for path in paths]
            turned = sum(min(path) < 0 < max(path) for path in jumps) / len(paths)
            assert float(rows[step, name]["oscillating"]) == pytest.approx(turned, abs=1e-6)
            shares.append(turned)
    assert max(shares) > 0


def test_a_sample_of_a_large_tensor_says_what_all_of_it_does() -> None:
    """A million values, in one row and in a scale a channel: shares within 2 %, decibels within 0.2."""
    for preset in ("int8", "w4a4"):
        config = qat.preset(preset)
        net = qat.prepare(nn.Sequential(nn.Linear(1024, 1024)), config, torch.randn(2, 1024))
        qat.calibrate(net, [torch.randn(64, 1024)])
        activation = next(q for _, q in quantizers(net) if q.shape is None)
        for quantizer, x in ((net[0].weight_quantizer, net[0].weight.detach()), (activation, torch.randn(1024, 1024))):
            y = quantizer(x)
            numbers, _ = measure(quantizer, x, y.detach())
            whole = 10 * torch.log10(x.square().sum() / (x - y.detach()).square().sum())
            assert float(numbers["sqnr_db"]) == pytest.approx(float(whole), abs=0.2)
            end = torch.as_tensor(quantizer.quant_max + 0.5) * quantizer.qparams(x)[0].reshape(-1, 1)
            assert float(numbers["clipped"]) == pytest.approx(float((x.abs() > end).float().mean()), abs=0.02)
    rows, scale = thin([torch.randn(70000, 32)], [torch.randn(70000, 1)])
    assert rows.numel() <= 20000
    assert len(rows) == len(scale)


def test_oscillating_needs_a_turn() -> None:
    path = torch.tensor([[0.0, 0, 0, 1], [1, 0, 1, 1], [2, 1, 1, 0], [3, 0, 1, 1]])  # time by weight
    share = oscillating([{"w": integers} for integers in path])["w"]
    assert float(share) == 0.5  # the second and the fourth
    assert oscillating([{"w": path[0]}] * 2) == {}


def test_a_resumed_run_repeats_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "csv" / "quantizers.csv"
    row = {"name": "a", "kind": "weight", "clipped": 0.25}
    append(path, [{**row, "step": 0}], begin=True)
    append(path, [{**row, "step": 50}], begin=False)
    with path.open("a") as file:
        file.write("100,a")  # killed as it wrote
    append(path, [{**row, "step": 50, "clipped": 0.5}], begin=True)
    append(path, [{**row, "step": 100}], begin=False)
    with path.open() as file:
        assert [(r["step"], r["clipped"]) for r in csv.DictReader(file)] == [
            ("0", "0.25"),
            ("50", "0.5"),
            ("100", "0.25"),
        ]
    append(path, [{**row, "step": 0}], begin=True)  # a new run
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("preset", ["codebook4", "mxfp4", "w8a8_dynamic", "w4g32", "ternary"])
def test_other_schemes_log_what_applies(preset: str, tmp_path: Path) -> None:
    L.seed_everything(0, verbose=False)
    module = QATModule(MODEL, TASK, ADAMW).quantized(qat.preset(preset, **({"weight": {"allow_padding": True}} if preset
                                                     == "w4g32" else {})), [1, 8, 8])  # fmt: skip
    qat.calibrate(module.prepared, digits().calibration_batches(1))
    kept = Kept()
    trainer_of(QATSchedule(), LogQuantizers(1), epochs=1, logger=kept, limit_train_batches=4).fit(
        module, datamodule=digits())  # fmt: skip
    for metrics in (kept.metrics[step] for step in range(4)):
        assert {f"sqnr_db/{q.name}" for _, q in quantizers(module)} <= set(metrics)
        assert all(5 < value < 60 for key, value in metrics.items() if key.startswith("sqnr_db/block.conv1"))
    assert ("oscillating/block.conv1.weight" in metrics) == (preset in ("w8a8_dynamic", "w4g32"))
