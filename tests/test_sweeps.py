"""Sweeps in other processes, and commands that are repeated: what finished is skipped, what began goes on."""

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.plugins import Plugins

from qat.analysis.runs import config_key, find_runs, runs_by_config, same_command
from qat.numerics import native

ROOT = Path(__file__).parents[1]
QUICK = ("trainer.max_epochs=1", "trainer.limit_train_batches=1", "callbacks=quiet", "export=int8",
         "export.fresh_process=false", "model.width=4", "report.sensitivity.max_seconds=0")  # fmt: skip


def grid_sweeper(launcher: Any) -> Any:
    """A sweeper with this launcher. Looking for plugins, Hydra imports their modules anew, so that happens first."""
    Plugins.instance()
    made = importlib.import_module("hydra_plugins.qat_sweeps.grid").GridSweeper(max_batch_size=None)
    made.launcher = launcher
    return made


def sweep(folder: Path, *overrides: str) -> str:
    """Run a sweep in `folder` with two threads' worth of workers and return its console."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HYDRA"))}
    own.pop("OMP_NUM_THREADS", None)  # the launchers are to choose it
    command = [sys.executable, str(ROOT / "train.py"), "-m", *overrides, *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=folder,
                          env={**own, "HOME": str(folder), "TORCH_EXTENSIONS_DIR": str(native.folder())})  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(folder: Path, key: str = "quant.weight.bits") -> list[tuple[str, str, str]]:
    with (folder / "results.csv").open() as file:
        return [(row["job"], row[key], row["status"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def swept(home: Path) -> tuple[Path, str]:
    """Three jobs, one after another; one of them fails."""
    console = sweep(home, "quant.weight.bits=4,33,8")
    [folder] = (home / "multirun").glob("*/*")
    return folder, console


def test_one_of_three_jobs_fails(swept: tuple[Path, str]) -> None:
    check_that_one_failed(*swept)


@pytest.mark.slow
def test_jobs_on_ray_and_one_that_fails_there(tmp_path: Path) -> None:
    """On two workers of a local cluster."""
    pytest.importorskip("ray", reason="pip install 'qat[sweep]'")
    console = sweep(tmp_path, "hydra/launcher=ray", "hydra.launcher.init.num_cpus=2", "quant.weight.bits=4,33,8")
    assert "3 of 3 jobs have ended" in console
    [folder] = (tmp_path / "multirun").glob("*/*")
    check_that_one_failed(folder, console)


def check_that_one_failed(folder: Path, console: str) -> None:
    assert results(folder) == [("0", "4", "finished"), ("1", "33", "failed"), ("2", "8", "finished")]
    assert "1 of 3 jobs failed" in console
    assert "quant.weight.bits=33" in (folder / "1" / "error.txt").read_text()


def test_a_repeated_command_on_joblib_skips_and_goes_on(swept: tuple[Path, str], home: Path) -> None:
    """Of four jobs one has finished, one was interrupted while training, one failed, one is new."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="pip install 'qat[sweep]'")
    folder = home / "multirun" / "named"
    shutil.copytree(swept[0], folder)
    kept = (folder / "0" / "summary.json").read_bytes()
    (folder / "2" / "summary.json").unlink()
    console = sweep(home, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "sweep=named",
                    "quant.weight.bits=4,33,8,2")  # fmt: skip
    assert "Of 4 jobs 1 have finished and are skipped, 2 have begun before, 1 are new" in console
    assert f"Going on with {folder}/2; trained: float, qat" in (folder / "2" / "train.log").read_text()
    assert "n_jobs=2" in console
    assert results(folder) == [
        ("0", "4", "finished"), ("1", "33", "failed"), ("2", "8", "finished"), ("3", "2", "finished")
    ]  # fmt: skip
    assert (folder / "0" / "summary.json").read_bytes() == kept
    before, after = (json.loads((place / "2" / "summary.json").read_text()) for place in (swept[0], folder))
    assert before["stages"]["qat"]["metrics"] == after["stages"]["qat"]["metrics"]
    assert after["stages"]["ptq"] == before["stages"]["ptq"]  # not measured again


def test_the_same_command_finds_its_sweep_and_submitit_runs_the_rest(swept: tuple[Path, str], home: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'qat[sweep]'")
    folder, _ = swept
    (folder / "sweep.json").write_text(
        json.dumps({**json.loads((folder / "sweep.json").read_text()), "git": {"commit": "0", "dirty": False}})
    )
    console = sweep(home, "hydra/launcher=submitit_local", "quant.weight.bits=4,33,8")
    assert f"This command ran in {folder} before" in console
    assert "The code has changed since this sweep began" in console
    assert "Of 3 jobs 2 have finished and are skipped, 1 have begun before, 0 are new" in console
    assert "1 of 1 jobs have ended: #0 failed" in console
    assert results(folder) == [("0", "4", "finished"), ("1", "33", "failed"), ("2", "8", "finished")]
    assert list((folder / ".submitit").iterdir())


PLUGIN = """
import os, signal
from qat.zoo.data import Digits

class Deadly(Digits):
    def __init__(self, **settings):
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", "ray"])
def test_a_process_that_dies_is_one_job(home: Path, launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit", reason="pip install 'qat[sweep]'")
    (home / "plugin.py").write_text(PLUGIN)
    monkeypatch.setenv("PYTHONPATH", str(home))
    console = sweep(home, f"hydra/launcher={launcher}", f"sweep=dies_{launcher}",
                    "data._target_=plugin.Deadly,qat.zoo.data.Digits")  # fmt: skip
    assert "#0 died" in console
    assert "2 of 2 jobs have ended" in console
    assert "1 of 2 jobs did not come to their end; the same command goes on with them" in console
    assert [status for *_, status in results(home / "multirun" / f"dies_{launcher}", "data._target_")] == [
        "unfinished", "finished"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------ a launcher that dies


class Loky:
    """A launcher of two workers that dies with the job "kills", and loses what runs beside it, as joblib's does."""

    def __init__(self, ran: list[str]) -> None:
        self.ran = ran

    def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> list[Any]:
        for i in range(0, len(jobs), 2):
            pair = jobs[i : i + 2]
            for _, place in pair:
                (Path(place) / ".hydra").mkdir(parents=True, exist_ok=True)
            if any(name == "kills" for name, _ in pair):
                raise RuntimeError("a worker was killed")
            for name, place in pair:
                (Path(place) / "summary.json").write_text('{"stages": {}}')
                self.ran.append(name)
        return [SimpleNamespace(return_value=0.5) for _ in jobs]


@pytest.mark.parametrize("names", [["a", "b", "c", "kills", "d", "e"], ["kills", "a"], ["a", "kills", "b"], ["kills"]])
def test_a_killed_worker_does_not_lose_the_other_jobs(tmp_path: Path, names: list[str]) -> None:
    ran: list[str] = []
    sweeper = grid_sweeper(Loky(ran))
    sweeper._launch([([name, str(tmp_path / name)], tmp_path / name) for name in names], 0)
    assert sorted(ran) == sorted(set(names) - {"kills"})


def test_a_launcher_that_launches_nothing_is_an_error(tmp_path: Path) -> None:
    class Broken:
        def launch(self, jobs: Any, initial_job_idx: int) -> Any:
            raise RuntimeError("no cluster there")

    sweeper = grid_sweeper(Broken())
    with pytest.raises(RuntimeError, match="no cluster there"):
        sweeper._launch([(["a"], tmp_path / "a"), (["b"], tmp_path / "b")], 0)


# --------------------------------------------------------------------------------------------- run directories


def make(folder: Path, config: str = "seed: 1", summary: str | None = None, error: str | None = None) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(config)
    for name, text in (("summary.json", summary), ("error.txt", error)):
        if text is not None:
            (folder / name).write_text(text)
    return folder


def test_runs_are_found_at_any_depth_and_in_order(tmp_path: Path) -> None:
    runs = [make(tmp_path / "multirun" / "x" / str(i)) for i in (0, 2, 10)]
    single = make(tmp_path / "outputs" / "y")
    (single / "csv" / ".hydra").mkdir(parents=True)
    assert find_runs([tmp_path / "multirun", single, tmp_path]) == [*runs, single]
    with pytest.raises(FileNotFoundError, match="there is no run in"):
        find_runs([tmp_path / "multirun" / "x" / "0" / ".hydra"])
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        find_runs([tmp_path / "nowhere"])


def test_of_equal_configurations_the_finished_one_counts(tmp_path: Path) -> None:
    make(tmp_path / "0", error="x")
    finished = make(tmp_path / "1", "ckpt_path: somewhere\nseed: 1", '{"stages": {}}')
    make(tmp_path / "2", summary='{"stages": {}}')
    other = make(tmp_path / "3", "seed: 2", '{"stages": {}, "failed": {"onnx": "breaks the limits"}}')
    found = runs_by_config(tmp_path)
    assert found == {config_key("seed: 1"): finished, config_key("seed: 2"): other}
    assert runs_by_config(tmp_path / "nowhere") == {}


def test_the_newest_sweep_of_a_command(tmp_path: Path) -> None:
    for time, settings in (("01", ["seed=1,2"]), ("02", ["seed=1,2"]), ("03", ["seed=1"])):
        folder = tmp_path / "2026-01-01" / time
        folder.mkdir(parents=True)
        (folder / "sweep.json").write_text(json.dumps({"settings": settings, "sweeper": "grid", "git": None}))
    assert same_command(tmp_path, {"settings": ["seed=1,2"], "sweeper": "grid"}) == tmp_path / "2026-01-01" / "02"
    assert same_command(tmp_path, {"settings": ["seed=1,2"], "sweeper": "optuna"}) is None
