"""The study of training's speed: what it measures, and what it shows."""

import gc
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from experiments.speed import growth, profile, training, turns, variants, work
from qat.fake_quant import FakeQuantize


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(work.WORK, "resnet20", lambda device="cpu": work.resnet20(4, device=device))
    monkeypatch.setitem(work.WORK, "lm", lambda device="cpu": work.lm(2, 16, 1, 32, device=device))


SMALL = {"resnet20": {"batch": 4}, "lm": {"batch": 2, "length": 16, "n_layer": 1, "width": 32}}


def test_a_variant_is_measured_beside_float() -> None:
    requests = {name: turns.request_of(name, "lm", threads=1, size=SMALL["lm"]) for name in ("float", "frozen")}
    measured = turns.compare(dict.fromkeys(requests, sys.executable), requests, 3)
    assert measured["ratio_min"] <= measured["ratio"] <= measured["ratio_max"]
    assert measured["ms"] > 0 < measured["float_ms"]
    assert measured["preparation_steps"] > 0


@pytest.mark.parametrize("name", ["resnet20", "lm"])
def test_turns_are_steps_of_the_variant(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    turns.serve(turns.request_of("lsq", name, threads=1, size=SMALL[name]), ["step", "step"])
    built, *steps = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert built["loss"] > 0 < built["preparation_s"]
    assert [*steps[0]] == [*steps[1]] == ["seconds"]
    gc.enable()


@pytest.mark.parametrize("name", ["resnet20", "lm"])
@pytest.mark.usefixtures("small")
def test_memory_of_a_step(name: str) -> None:
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


@pytest.mark.slow
def test_a_variant_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = training.in_a_process(sys.executable, ["--measure", "frozen", "nowhere"])
    assert "nowhere" in found["failed"]
    requests = {name: turns.request_of(name, "nowhere") for name in ("float", "frozen")}
    assert "nowhere" in turns.compare(dict.fromkeys(requests, sys.executable), requests, 3)["failed"]


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
    for words in ("1.20", "1.10", "1.30", "1.07", "1.05", "1.15", "failed: Unsupported", "NNCF, W8A8"):
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


@pytest.mark.parametrize("name", ["resnet20", "lm"])
@pytest.mark.usefixtures("small")
def test_the_profile_finds_a_cause_of_everything(name: str) -> None:
    found = profile.measure(name, "lsq", 2)
    assert found["float_ms"] > 0 < found["ms"]
    assert sum(found["causes_ms"].values()) == pytest.approx(found["profiled_ms"] - found["profiled_float_ms"], abs=5)
    assert found["causes_ms"]["quantizers: Python around the kernels"] > 0
    console = Console(width=160, record=True)
    console.print(profile.show(found))
    assert "of what differs, up or down, has a cause" in console.export_text()


def test_what_the_kernels_move_is_counted() -> None:
    task = work.resnet20(16)
    net = variants.built("frozen", task.net, task.x, "resnet20")
    moved = profile.moved_bytes(task.step_of(net))
    stem = 16 * 16 * 32 * 32  # the values of a tensor of the first stage: 7 are quantized, and 4 of them twice over
    assert moved["forward"] > 7 * stem * 9
    assert moved["backward"] > 7 * stem * 9
    assert moved["decode"] > 6 * stem * 5
    forward = FakeQuantize.forward
    with profile.marked():
        assert FakeQuantize.forward is not forward
    assert FakeQuantize.forward is forward


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["depth", "group"])
def test_growth_measures_the_first_point_of_an_axis(axis: str) -> None:
    values, names = growth.AXES[axis].values, growth.AXES[axis].variants
    found = growth.measure(axis, values[0], names[0], 1, 1)
    assert found["ratio"] > 0
    assert (found["axis"], found["value"], found["variant"]) == (axis, values[0], names[0])


def test_growth_doubles_four_times() -> None:
    for axis in growth.AXES.values():
        assert [b / a for a, b in itertools.pairwise(axis.values)] == [2] * 4


def test_the_plot_of_growth(tmp_path: Path) -> None:
    rows = [
        {"axis": "batch", "value": n, "variant": name, "ratio": 1.1, "ratio_min": 1.0, "ratio_max": 1.2}
        for n in growth.AXES["batch"].values
        for name in growth.OURS[:2]
    ] + [{"axis": "group", "value": 16, "variant": growth.GROUPED, "failed": "no memory"}]
    growth.plot(rows, tmp_path / "growth.svg", "a processor")
    assert (tmp_path / "growth.svg").stat().st_size > 5000
