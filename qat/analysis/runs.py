"""Run directories: where they are, what ran in them, and how far it came."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NOT_OF_THE_JOB = ("ckpt_path", "phase", "sweep")
"""Settings that say where a job goes on and where it writes, not what it computes."""


def find_runs(folders: Iterable[Path | str]) -> list[Path]:
    """The run directories in some folders, at any depth; a run directory itself is one.

    A run directory has `summary.json`, or `.hydra/config.yaml` from its first moment on.

    Raises:
        FileNotFoundError: no such folder, or there is no run in it.
    """
    found: dict[Path, None] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder '{folder}'")
        runs = []
        for place, names, files in os.walk(folder):
            names.sort(key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
            if "summary.json" in files or Path(place, ".hydra", "config.yaml").is_file():
                runs.append(Path(place))
                names.clear()
            else:
                names[:] = [name for name in names if not name.startswith(".")]
        if not runs:
            raise FileNotFoundError(f"there is no run in '{folder}': no summary.json, no .hydra/config.yaml")
        found |= dict.fromkeys(runs)
    return list(found)


def summary_of(folder: Path) -> dict[str, Any] | None:
    """The content of a run's `summary.json`; None where there is none, or it is cut off."""
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return found if isinstance(found, dict) and isinstance(found.get("stages"), dict) else None


def status_of(folder: Path, summary: dict[str, Any] | None) -> str:
    """`finished`; `failed`, if it said why or a file is not for use; `pruned` by a search; else `unfinished`."""
    if (folder / "pruned.txt").is_file():
        return "pruned"
    if (folder / "error.txt").is_file() or (summary or {}).get("failed"):
        return "failed"
    return "unfinished" if summary is None else "finished"


def config_key(text: str) -> str:
    r"""What tells a job's configuration from others: the same for equal settings.

    Args:
        text: the composed configuration as YAML, as Hydra keeps it in `.hydra/config.yaml`.

    >>> config_key("seed: 1\nckpt_path: null") == config_key("ckpt_path: last.ckpt\nseed: 1")
    True
    >>> config_key("seed: 1") == config_key("seed: 2")
    False
    """
    import yaml

    settings = {key: value for key, value in (yaml.safe_load(text) or {}).items() if key not in NOT_OF_THE_JOB}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def runs_by_config(folder: Path) -> dict[str, Path]:
    """`config_key` -> run directory, of the runs in a folder; of equal ones the first that finished, else the first."""
    found: dict[str, Path] = {}
    try:
        runs = find_runs([folder])
    except FileNotFoundError:
        return {}
    for run in runs:
        path = run / ".hydra" / "config.yaml"
        if not path.is_file():
            continue
        key = config_key(path.read_text(encoding="utf-8"))
        if key not in found or (is_finished(run) and not is_finished(found[key])):
            found[key] = run
    return found


def is_finished(folder: Path) -> bool:
    """Whether a run came to its end and all of its files are for use."""
    return status_of(folder, summary_of(folder)) == "finished"


def same_command(root: Path, command: dict[str, Any]) -> Path | None:
    """The newest folder DATE/TIME in `root` whose sweep was started by a command (its `sweep.json`)."""
    for path in sorted(root.glob("*/*/sweep.json"), reverse=True):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            continue
        if all(found.get(key) == value for key, value in command.items()):
            return path.parent
    return None
