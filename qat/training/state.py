"""`state.json`: what a run directory says of its run, so that another process can go on with it."""

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from qat.export.files import write_atomically
from qat.training.checkpoints import BEFORE, LATEST, newest
from qat.training.weights import differing

log = logging.getLogger(__name__)

FILE, LOCK = "state.json", ".lock"
PHASES = ("float", "qat")
STALE = (
    FILE, "summary.json", "git.patch", "error.txt",
    *(f"checkpoints/{phase}/{name}" for phase in PHASES for name in ("last.ckpt", LATEST, BEFORE)),
)  # fmt: skip
"""What of an earlier run in the same directory would be taken for a new run's."""
VOLATILE = ("ckpt_path", "phase", "sweep", "rehearse")
"""Settings that may differ when a run goes on."""
SHOWN = ("progress", "prune")
"""And callbacks, which depend on what starts the run."""


def read_state(folder: Path) -> dict[str, Any] | None:
    """What a run directory says; None where there was no run, or it was killed before it said anything.

    Raises:
        ValueError: the file is none of ours.
    """
    try:
        state = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / FILE} cannot be read: {error}") from error
    if not isinstance(state, dict) or "summary" not in state:
        raise ValueError(f"{folder / FILE} is not the state of a run of train.py")
    return state


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the file as a whole."""
    write_atomically(folder / FILE, (json.dumps(state, indent=1) + "\n").encode())


def runs(folder: Path, depth: int) -> list[Path]:
    """Run directories `depth` levels below a folder that are not finished, the newest first."""
    found = [(state, path.parent) for path in folder.glob("*/" * depth + FILE) if (state := read_state(path.parent))]
    unfinished = [(state["started"], str(path)) for state, path in found if not state["finished"]]
    return [Path(path) for _, path in sorted(unfinished, reverse=True)]


def refuse_other(folder: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on with a run by another configuration.

    Raises:
        ValueError: names each field with both values.
    """
    ours = [{key: value for key, value in config.items() if key not in VOLATILE} for config in (was, now)]
    for config in ours:
        config["callbacks"] = {
            key: value for key, value in dict(config.get("callbacks") or {}).items() if key not in SHOWN
        }
    if differ := differing(*ours):
        raise ValueError(
            f"ckpt_path={folder}: the run is of another configuration: {'; '.join(differ)}. It goes on with its own: "
            f"leave out what contradicts it, or start a new run"
        )


def running(folder: Path) -> int | None:
    """The process that runs in a directory, on this machine; None for none."""
    import fcntl

    try:
        with (folder / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return int((folder / LOCK).read_text() or 0)


def lock(folder: Path) -> Any:
    """Take a run directory until the process ends, however it does. Keep what is returned.

    Raises:
        ValueError: another process has it.
    """
    import fcntl

    file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"process {running(folder)} is running in {folder}; stop it first") from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


class RunState:
    """How far a run has come, in its run directory.

    A phase is over once `checkpoints/PHASE/last.ckpt` is there; stages that were measured are in `summary`.

    Args:
        folder: the run directory.
        config: the composed configuration, resolved, plain data.
        origin: what Hydra composes it of.
        ckpt_path: the run directory itself, or `auto`, to go on where an earlier process stopped; the checkpoint of
            another run to start from; None to start.

    Attributes:
        given: the checkpoint of another run, if the run started from one.
        summary: of the processes before this one; empty for none.
        finished: whether there is nothing left to do.

    Raises:
        ValueError: the run is of another configuration, or goes on in another process.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], origin: Mapping[str, Any], ckpt_path: str | None
    ) -> None:
        config = json.loads(json.dumps(config, default=str).replace(json.dumps(str(folder))[1:-1], "."))
        self.folder = folder
        given = None if ckpt_path in (None, "auto") else Path(str(ckpt_path)).resolve()
        itself = ckpt_path == "auto" or given == folder.resolve()
        before = read_state(folder) if itself else None
        if before is not None:
            refuse_other(folder, before["config"], config)
        elif given and not itself and given.is_relative_to(folder.resolve()):
            raise ValueError(
                f"ckpt_path={ckpt_path} lies in the run directory, which a new run would clear: to go on with that "
                f"run give ckpt_path={folder}, else another hydra.run.dir="
            )
        self.going_on = before is not None
        self._state: dict[str, Any] = before or {
            "started": time.time(), "finished": False, "given": None if itself else ckpt_path, "config": config,
            "hydra": dict(origin), "summary": {}, "phases": [],
        }  # fmt: skip
        self.given: str | None = self._state["given"]
        self.summary: dict[str, Any] = self._state["summary"]
        self.finished: bool = self._state["finished"] and (folder / "summary.json").is_file()

    @rank_zero_only
    def begin(self) -> None:
        """Take the directory: no other process may go on with it; what an earlier run left in it is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.folder)
        clear(self.folder, ("error.txt",) if self.going_on else STALE)
        if not self.going_on:
            write_state(self.folder, self._state)
        else:
            done = [phase for phase in PHASES if self.trained(phase).is_file()]
            for phase in done:  # a process that was killed at the end of a phase has left them
                self._remove_steps(phase)
            log.info("Going on with %s%s", self.folder, f"; trained: {', '.join(done)}" if done else "")

    @rank_zero_only
    def save(self, summary: Mapping[str, Any], finished: bool = False) -> None:
        """Note what is done."""
        self._state |= {"summary": dict(summary), "finished": finished}
        write_state(self.folder, self._state)
        if finished:
            self._lock.close()
            (self.folder / LOCK).unlink(missing_ok=True)

    def trained(self, phase: str) -> Path:
        """The checkpoint at the end of a phase; once it is there, the phase is over."""
        return self.folder / "checkpoints" / phase / "last.ckpt"

    def interrupted(self, phase: str) -> Path | None:
        """The checkpoint from which a phase goes on; None for none."""
        return newest(self.folder / "checkpoints" / phase)

    @property
    def phases(self) -> list[dict[str, Any]]:
        """What the steps of training were (`QATSchedule.phases`)."""
        return list(self._state["phases"])

    def keep(self, trainer: L.Trainer, phase: str, phases: list[dict[str, Any]]) -> None:
        """End a phase: its last checkpoint takes the place of those to go on from.

        Args:
            trainer: after `fit`.
            phase: `float` or `qat`.
            phases: what its steps were.
        """
        self._state["phases"] = phases
        self.save(self._state["summary"])
        trainer.save_checkpoint(self.trained(phase))
        if trainer.is_global_zero:
            self._remove_steps(phase)

    def _remove_steps(self, phase: str) -> None:
        for name in (LATEST, BEFORE):
            (self.trained(phase).parent / name).unlink(missing_ok=True)


def clear(folder: Path, names: Iterable[str]) -> None:
    """Remove files of an earlier run, and what a killed process has left half-written."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for pattern in (".export-*", ".*.????????", "export/.*.????????", "checkpoints/*/.*.????????"):
        for path in folder.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
