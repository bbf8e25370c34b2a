"""What an export says of where it comes from."""

import subprocess
from pathlib import Path

import torch

from qat.training.provenance import git_state, provenance


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


def test_it_depends_on_what_it_names_alone(tmp_path: Path) -> None:
    first = provenance({"a": 1, "b": [2]}, "d" * 64, tmp_path)
    assert first == provenance({"b": [2], "a": 1}, "d" * 64, tmp_path)
    assert first["config_sha256"] != provenance({"a": 2, "b": [2]}, "d" * 64, tmp_path)["config_sha256"]
    assert first["data_sha256"] == "d" * 64
    assert (
        first["packages"]["torch"] == torch.__version__.split("+")[0] or first["packages"]["torch"] in torch.__version__
    )
