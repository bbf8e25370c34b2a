"""The main job in two processes (gloo), by `trainer=ddp` and `trainer=fsdp`: it exports what one process exports."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qat

TRAIN = Path(__file__).parents[1] / "train.py"
SETTINGS = (
    "model=mlp", "model.hidden=[16]", "quant.activation.range=fixed", "quant.activation.observer=minmax",
    "export=int8", "export.fresh_process=false", "callbacks=quiet",
    "trainer.max_epochs=2", "trainer.limit_train_batches=6", "trainer.limit_val_batches=2", "report.write=false",
    "trainer.log_every_n_steps=1", "qat.schedule.freeze_ranges_at=0.5",
)  # fmt: skip
"""Ranges are fixed: running ones see other batches, and LSQ divides gradients by the root of a process's values."""
HALVES = ("trainer.accelerator=cpu", "data.batch_size=32", "ptq.calibration_batches=16")
"""Two processes with half the batch each, and the samples of as many batches to calibrate."""
STRATEGIES = ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)]
"""test_shard.py shards a training, by default; here the whole job."""


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, str(TRAIN), *SETTINGS, f"hydra.run.dir={folder}", *overrides], cwd=folder.parent, text=True,
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def said(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """A function: `one`, `ddp` or `fsdp` -> run directory and console, of one process or of two; each is run once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name: str) -> tuple[Path, str]:
        return folder / name, said(start(folder / name, *(() if name == "one" else (f"trainer={name}", *HALVES))))

    return run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(qat.load(folder / "export" / "model.safetensors").state_dict())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_export_what_one_does_to_a_step(runs: Callable[[str], tuple[Path, str]], strategy: str) -> None:
    alone, both = weights_of(runs("one")[0]), weights_of(runs(strategy)[0])
    assert alone.keys() == both.keys()
    for name, value in alone.items():
        if value.is_floating_point():  # scales
            assert torch.allclose(both[name], value, rtol=1e-4), name
        elif value.dtype == torch.int32 and value.dim():  # biases, on the grid of sums
            assert (both[name] - value).abs().max() <= max(1, 1e-3 * float(value.abs().max())), name
        else:
            assert (both[name].int() - value.int()).abs().max() <= 1, name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_first_process_reports(runs: Callable[[str], tuple[Path, str]], strategy: str) -> None:
    folder, console = runs(strategy)
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in console
    assert console.count("Run directory:") == 1
    assert console.count("calibrated:") == runs("one")[1].count("calibrated:")
    summary = json.loads((folder / "summary.json").read_text())
    assert tuple(summary["stages"]) == ("float", "ptq", "qat", "int8")
    parity = summary["parity"]["qat_int8"]
    assert parity["max_steps"] <= 1
    assert parity["agreement_outside_ties"] == 1
    for phase in ("float", "qat"):
        assert torch.load(folder / "checkpoints" / phase / "last.ckpt")["global_step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_sigterm_to_both_and_on_to_the_end(tmp_path: Path, strategy: str) -> None:
    """Learned scales are frozen half-way, when they get no gradient: neither process may wait for one."""
    folder = tmp_path / "run"
    settings = (f"trainer={strategy}", *HALVES, "quant.weight.range=lsq", "callbacks.resumable.every_steps=2")
    running = start(folder, *settings)
    deadline = time.monotonic() + 200
    while not list(folder.glob("checkpoints/qat/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(running.pid, signal.SIGTERM)
    assert f"ckpt_path={folder}" in said(running, 128 + signal.SIGTERM)
    assert "trained: float" in said(start(folder, *settings, f"ckpt_path={folder}"))
    assert torch.load(folder / "checkpoints" / "qat" / "last.ckpt")["global_step"] == 12
    assert json.loads((folder / "summary.json").read_text())["parity"]["qat_int8"]["max_steps"] <= 1


@pytest.mark.slow
def test_recipes_in_two_processes_end_as_in_one(tmp_path: Path) -> None:
    """Those that change gradients or weights, together."""
    recipes = "recipe=[distillation,gradual_bits,delayed_activations,oscillation_damping,ema]"
    said(start(tmp_path / "one", recipes))
    said(start(tmp_path / "two", recipes, "trainer=ddp", *HALVES))
    alone, both = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert alone.keys() == both.keys()
    integers = [name for name, value in alone.items() if value.dtype == torch.int8]
    assert len(integers) == 2
    for name in integers:
        assert (both[name].int() - alone[name].int()).abs().max() <= 1, name
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["parity"]["qat_int8"]["max_steps"] <= 1
