"""Where an exported network comes from, as plain data that it carries along: nothing of it depends on the time."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

from qat.export.files import write_atomically

PACKAGES = ("qat", "torch", "lightning", "hydra-core", "safetensors", "numpy")
ELSEWHERE = ("ckpt_path", "phase", "logger", "rehearse")
"""Settings that the weights do not depend on."""


def provenance(config: Mapping[str, Any], data_sha256: str, code: Path, folder: Path) -> dict[str, Any]:
    """Commit, configuration, data and packages.

    Args:
        config: the composed configuration, plain data. Where it puts files and logs, and whether the run was
            interrupted, is no part of what the result depends on.
        data_sha256: of the data set.
        code: a folder of the code that trains.
        folder: the run directory.

    Returns:
        `git` ({commit, dirty}; None where the code is in no repository), `config_sha256`, `data_sha256`, `python`,
        `packages` (name -> version, of those that are installed).
    """
    told = {key: value for key, value in config.items() if key not in ELSEWHERE}
    text = json.dumps(told, sort_keys=True, default=str).replace(json.dumps(str(folder))[1:-1], ".")
    return {
        "git": git_state(code),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "data_sha256": data_sha256,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def record(folder: Path | None, code: Path, data_sha256: str) -> dict[str, Any]:
    """Write `provenance.json` into a run directory, and `git.patch` where files differ from the commit.

    Args:
        folder: the run directory; None writes nothing.
        code: a folder of the code that trains.
        data_sha256: of the data set.

    Returns:
        `git` ({commit, dirty, untracked}), `data_sha256`, `python`, `platform`, `packages` (all that are installed).
    """
    git = git_state(code)
    if git is not None:
        names = _git(code, "ls-files", "--others", "--exclude-standard", "--full-name", ":/") or ""
        git["untracked"] = names.splitlines()
        if git["dirty"] and folder is not None:
            patch = subprocess.run(
                ["git", "-C", str(code), "diff", "--binary", "HEAD"], capture_output=True, timeout=60, check=True
            )
            write_atomically(folder / "git.patch", patch.stdout)
    packages = {found.metadata["Name"]: found.version for found in distributions()}
    told = {
        "git": git,
        "data_sha256": data_sha256,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(sorted(packages.items(), key=lambda item: str(item[0]).lower())),
    }
    if folder is not None:
        write_atomically(folder / "provenance.json", (json.dumps(told, indent=2) + "\n").encode())
    return told


def git_state(folder: Path) -> dict[str, Any] | None:
    """The commit that is checked out, and whether files that git knows differ from it."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where there is no git, or no repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
