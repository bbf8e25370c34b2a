"""Where an exported network comes from, as plain data that it carries along: nothing of it depends on the time."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("qat", "torch", "lightning", "hydra-core", "safetensors", "numpy")


def provenance(config: Mapping[str, Any], data_sha256: str, code: Path) -> dict[str, Any]:
    """Commit, configuration, data and packages.

    Args:
        config: the composed configuration, plain data.
        data_sha256: of the data set.
        code: a folder of the code that trains.

    Returns:
        `git` ({commit, dirty}; None where the code is in no repository), `config_sha256`, `data_sha256`, `python`,
        `packages` (name -> version, of those that are installed).
    """
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "git": git_state(code),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "data_sha256": data_sha256,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


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
