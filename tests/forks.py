"""A process that has imported everything and runs the main job in forks of itself, which it kills: `forks.py FOLDER`.

It prints, as JSON, what `test_interrupted_runs.py` asks: when each process ended, and how.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import lightning.pytorch.loggers  # noqa: E402, F401
import matplotlib.pyplot  # noqa: E402, F401
import rich.console  # noqa: E402, F401
import sklearn.datasets  # noqa: E402
import sklearn.model_selection  # noqa: E402, F401
import torch  # noqa: E402

import train  # noqa: E402

train.main.__wrapped__.__module__ = "__main__"  # type: ignore[attr-defined]  # so that Hydra looks for conf beside it

SETTINGS = (
    "model=mlp", "model.hidden=[16]", "quant.weight.rounding=stochastic", "quant.weight.bits=4", "export=int8",
    "export.fresh_process=false", "callbacks=quiet", "callbacks.resumable.every_steps=2", "trainer.max_epochs=3",
    "trainer.limit_train_batches=5", "trainer.limit_val_batches=2", "trainer.log_every_n_steps=1",
    "qat.schedule.freeze_ranges_at=0.6", "qat.schedule.freeze_batch_norm_at=0.6", "ptq.calibration_batches=2",
)  # fmt: skip
KILLS = 20


def fork(work: Path, folder: Path, *overrides: str, before: Callable[[], None] | None = None) -> int:
    """Run the main job in a child; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(work / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if before is not None:
            before()
        code = run(folder, *overrides)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def run(folder: Path, *overrides: str) -> int:
    """The main job, here; returns the exit code."""
    sys.argv = [str(ROOT / "train.py"), *SETTINGS, f"hydra.run.dir={folder}", *overrides]
    try:
        train.main()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    return 0


def ended(pid: int) -> int:
    """Exit code; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def on_event(folder: Path, do: Callable[[int], None]) -> Callable[[], None]:
    """Call `do(n)` before the n-th time that a file in `folder` is opened to write, synced, renamed or removed."""

    def install() -> None:
        count = 0

        def event(*args: Any) -> None:
            nonlocal count
            count += 1
            do(count)

        def hook(name: str, args: tuple[Any, ...]) -> None:
            written = name in ("os.rename", "os.remove", "os.mkdir") or (name == "open" and args[1] in ("w", "wb", "a"))
            if written and str(args[0]).startswith(str(folder)):
                event()

        sync = os.fsync
        os.fsync = lambda fd: (event(), sync(fd))[1]  # type: ignore[assignment, func-returns-value]
        sys.addaudithook(hook)

    return install


def reached(folder: Path) -> str:
    """The phase in which a run was when its process ended."""
    if not (folder / "state.json").is_file():
        return "start"
    stages = json.loads((folder / "state.json").read_text())["summary"].get("stages", {})
    if "ptq" not in stages:
        return "float" if not (folder / "checkpoints/float/last.ckpt").is_file() else "ptq"
    return "qat" if not (folder / "checkpoints/qat/last.ckpt").is_file() else "export"


def die(at: int) -> Callable[[int], None]:
    return lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == at else None


def enough(found: list[dict[str, Any]]) -> bool:
    """Whether there were KILLS kills, some in each phase: where time runs slowly, those by time come early."""
    killed = [entry["reached"] for entry in found if entry["code"] == -signal.SIGKILL]
    return len(killed) >= KILLS and ({"float", "qat", "export"} <= set(killed) or len(killed) >= 3 * KILLS)


def chain(work: Path, seconds: float, events: int) -> list[dict[str, Any]]:
    """Runs killed and resumed until there were enough kills and the last one is finished: `killed0`, `killed1`, ..."""
    draw, found, number = random.Random(7), [], 0
    while True:
        folder = work / f"killed{number}"
        by_time = draw.random() < 0.4
        at = draw.randint(1, max(events // 3, 2))
        last = enough(found)
        wait = draw.uniform(0.05, 0.6) * seconds
        pid = fork(work, folder, "ckpt_path=auto",
                   before=None if by_time or last else on_event(folder, die(at)))  # fmt: skip
        if by_time and not last:
            time.sleep(wait)
            os.kill(pid, signal.SIGKILL)
        code = ended(pid)
        found.append({"folder": folder.name, "code": code, "reached": reached(folder),
                      "at": f"{wait:.2f} s" if by_time else at})  # fmt: skip
        if code not in (0, -signal.SIGKILL):
            return found
        if code == 0:
            if last:
                return found
            number += 1


def main(work: Path) -> None:
    torch.set_num_threads(1)
    os.chdir(work)
    with contextlib.redirect_stdout(sys.stderr):  # forks inherit what this one has loaded and compiled
        codes: dict[str, Any] = {"whole": run(work / "whole")}
    counted, start = work / "events", time.monotonic()
    codes["again"] = ended(
        fork(work, work / "again", before=on_event(work / "again", lambda n: counted.write_text(str(n))))
    )
    seconds = time.monotonic() - start
    codes["chain"] = chain(work, seconds, int(counted.read_text()))
    for name, signum in {"term": signal.SIGTERM, "int": signal.SIGINT}.items():
        folder = work / name

        def send(n: int, signum: int = signum) -> None:
            if n == 40:
                os.kill(os.getpid(), signum)

        codes[name] = [ended(fork(work, folder, before=on_event(folder, send)))]
        codes[f"{name} reached"] = reached(folder)
        codes[name].append(ended(fork(work, folder, "ckpt_path=last")))
    print(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
