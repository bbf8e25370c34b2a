"""The study of training's speed: what it measures, and what it shows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from experiments.speed import training, variants, work
from qat.fake_quant import FakeQuantize


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(work.WORK, "resnet20", lambda device="cpu": work.resnet20(4, device=device))
    monkeypatch.setitem(work.WORK, "lm", lambda device="cpu": work.lm(2, 16, 1, 32, device=device))


@pytest.mark.parametrize("name", ["resnet20", "lm"])
@pytest.mark.usefixtures("small")
def test_a_variant_is_measured_beside_float(name: str) -> None:
    measured = training.measure_time("frozen", name, 3, "cpu", False)
    assert measured["ratio_min"] <= measured["ratio"] <= measured["ratio_max"]
    assert measured["ms"] > 0 < measured["float_ms"]
    assert training.measure_memory("lsq", name, "cpu")["growth_mb"] >= 0


@pytest.mark.parametrize("name", [*variants.OURS, "torch_ao_fx", "torch_ao_lsq"])
def test_variants_simulate_quantization_and_train(name: str) -> None:
    task = work.resnet20(4)
    net = variants.built(name, task.net, task.x, "resnet20")
    nodes = (FakeQuantize, torch.ao.quantization.FakeQuantizeBase)
    assert sum(isinstance(module, nodes) for module in net.modules()) > 20
    before = [p.detach().clone() for p in net.parameters()]
    task.step_of(net)()
    assert sum(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)) > 40
    assert not any(isinstance(module, nodes) for module in task.net.modules())  # a copy was prepared


def test_a_variant_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = training.in_a_process(training.sys.executable, ["--measure", "time", "frozen", "nowhere"])
    assert "nowhere" in found["failed"]


def test_the_table_and_the_plot(tmp_path: Path) -> None:
    row: dict[str, Any] = {"work": "lm", "ratio": 1.2, "ratio_min": 1.1, "ratio_max": 1.3, "memory_ratio": 1.07}
    rows = [
        {**row, "variant": "frozen", "way": "eager"},
        {**row, "variant": "frozen", "way": "compiled"},
        {"work": "lm", "variant": "nncf_int8", "way": "compiled", "failed": "Unsupported"},
    ]
    console = Console(width=160, record=True)
    console.print(training.show(rows, [{"work": "lm", "variant": "frozen", "way": "eager", "ratio": "1.15"}]))
    text = console.export_text()
    for words in ("1.20 (1.10 to 1.30)", "1.07", "1.05", "1.15", "failed: Unsupported", "NNCF, W8A8"):
        assert words in text
    training.plot(rows, tmp_path / "plot.svg", "a processor, today")
    assert "a processor, today" in (tmp_path / "plot.svg").read_text() or (tmp_path / "plot.svg").stat().st_size > 5000


def test_a_part_that_is_measured_again_replaces_itself() -> None:
    earlier = [
        {"work": "lm", "variant": "lsq", "way": "eager", "ratio": "1.3", "failed": ""},
        {"work": "resnet20", "variant": "ema", "way": "eager", "ratio": "1.2", "failed": ""},
    ]
    again = {"work": "lm", "variant": "lsq", "way": "eager", "ratio": 1.1}
    assert training.merged(earlier, [again]) == [
        {"work": "resnet20", "variant": "ema", "way": "eager", "ratio": 1.2}, again
    ]  # fmt: skip


def test_work_is_plain_torch() -> None:
    for make in work.WORK.values():
        assert not any(isinstance(module, FakeQuantize) for module in make().net.modules())
        assert isinstance(make().net, nn.Module)
