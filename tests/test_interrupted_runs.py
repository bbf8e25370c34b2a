"""Runs of the main job that are killed, stopped and resumed end like one that was left alone (`forks.py`)."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

KILLED = -signal.SIGKILL
SAME = ("float.safetensors", "export/model.safetensors", "csv/float/metrics.csv", "csv/qat/metrics.csv", "report.txt")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of all runs, and how each of their processes ended."""
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "forks.py"), str(folder)], capture_output=True,
                          text=True, timeout=500, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder, json.loads(done.stdout)


def check_same(whole: Path, other: Path) -> None:
    """Weights, ranges, optimizer, curves and exported bytes."""
    for name in SAME:
        assert (whole / name).read_bytes() == (other / name).read_bytes(), f"{other}: {name}"
    for phase in ("float", "qat"):
        kept = [torch.load(folder / "checkpoints" / phase / "last.ckpt") for folder in (whole, other)]
        ours, theirs = (checkpoint["state_dict"] for checkpoint in kept)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num()) for name in ours)
        assert kept[0]["global_step"] == kept[1]["global_step"] == 15
        assert {path.name for path in (other / "checkpoints" / phase).iterdir()} == {"best.ckpt", "last.ckpt"}
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (whole, other))
    assert first["stages"].keys() == second["stages"].keys()
    for stage, measured in first["stages"].items():
        assert measured["metrics"] == second["stages"][stage]["metrics"], stage
    assert json.loads((other / "state.json").read_text())["finished"]
    assert not list(other.glob("**/.export-*"))


def test_the_same_configuration_and_seed_give_the_same_bytes(ended: tuple[Path, dict[str, Any]]) -> None:
    folder, codes = ended
    assert codes["whole"] == codes["again"] == 0
    check_same(folder / "whole", folder / "again")


def test_a_run_killed_at_twenty_moments_ends_as_if_it_had_not_been(ended: tuple[Path, dict[str, Any]]) -> None:
    folder, codes = ended
    chain = codes["chain"]
    logs = "\n".join(path.read_text() for path in folder.glob("killed*.log"))
    assert {entry["code"] for entry in chain} == {0, KILLED}, logs[-5000:]
    assert sum(entry["code"] == KILLED for entry in chain) >= 20
    assert {entry["reached"] for entry in chain if entry["code"] == KILLED} >= {"float", "qat", "export"}
    assert {isinstance(entry["at"], str) for entry in chain if entry["code"] == KILLED} == {True, False}
    for name in {entry["folder"] for entry in chain}:
        check_same(folder / "whole", folder / name)
    assert "Going on with" in logs
    assert "Traceback" not in logs


@pytest.mark.parametrize(("name", "code"), [("term", 143), ("int", 130)])
def test_a_signal_ends_a_run_with_its_code_and_last_finds_it(
    ended: tuple[Path, dict[str, Any]], name: str, code: int
) -> None:
    folder, codes = ended
    assert codes[name] == [code, 0]
    log = (folder / f"{name}.log").read_text()
    assert f"Go on with: ckpt_path={folder / name}" in log
    assert f"Going on with {folder / name}" in log
    assert "Traceback" not in log
    check_same(folder / "whole", folder / name)


def test_what_the_run_directory_says_of_where_the_run_comes_from(ended: tuple[Path, dict[str, Any]]) -> None:
    folder = ended[0] / "term"
    told = json.loads((folder / "provenance.json").read_text())
    assert told["data_sha256"] == json.loads((folder / "summary.json").read_text())["data_sha256"]
    assert {"torch", "lightning", "hydra-core"} <= set(told["packages"])
    assert (folder / "git.patch").is_file() == bool(told["git"] and told["git"]["dirty"])
    assert "model=mlp" in (folder / ".hydra" / "overrides.yaml").read_text()
    assert "ckpt_path" not in (folder / ".hydra" / "overrides.yaml").read_text()
