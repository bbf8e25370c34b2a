"""What an export says of where it comes from."""

import json
import subprocess
from pathlib import Path
from typing import Any

import torch

from qat.training.provenance import git_state, provenance, record


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True,
                          text=True).stdout.strip()  # fmt: skip


def test_the_commit_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert git_state(tmp_path / "none") is None
    git(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    git(tmp_path, "add", "a.py")
    git(tmp_path, "commit", "-qm", "a")
    assert git_state(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "notes.txt").write_text("git does not know it")
    assert git_state(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert git_state(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": True}


def test_a_run_directory_records_what_differs_from_the_commit(tmp_path: Path) -> None:
    code, run = tmp_path / "code", tmp_path / "run"
    code.mkdir()
    git(code, "init", "-q")
    (code / "a.py").write_text("1\n")
    git(code, "add", "a.py")
    git(code, "commit", "-qm", "a")
    told = record(run, code, "d" * 64)
    assert told == json.loads((run / "provenance.json").read_text())
    assert told["git"] == {"commit": git(code, "rev-parse", "HEAD"), "dirty": False, "untracked": []}
    assert not (run / "git.patch").exists()
    (code / "a.py").write_text("2\n")
    (code / "new.py").write_text("3\n")
    assert record(run, code, "d" * 64)["git"]["untracked"] == ["new.py"]
    git(code, "stash", "-q")
    git(code, "apply", str(run / "git.patch"))
    assert (code / "a.py").read_text() == "2\n"


def test_it_depends_on_what_it_names_alone(tmp_path: Path) -> None:
    def of(config: dict[str, Any], folder: str = "run") -> dict[str, Any]:
        return provenance(config, "d" * 64, tmp_path, tmp_path / folder)

    first = of({"a": 1, "b": [2]})
    assert first == of({"b": [2], "a": 1})
    assert first == of({"b": [2], "a": 1, "ckpt_path": "there", "phase": "qat"})
    assert first["config_sha256"] != of({"a": 2, "b": [2]})["config_sha256"]
    assert of({"dir": f"{tmp_path / 'run'}/checkpoints"}) == of({"dir": f"{tmp_path / 'other'}/checkpoints"}, "other")
    assert first["data_sha256"] == "d" * 64
    assert (
        first["packages"]["torch"] == torch.__version__.split("+")[0] or first["packages"]["torch"] in torch.__version__
    )
