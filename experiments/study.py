"""A study: runs of train.py that differ in a few settings, and what they come to.

`python -m experiments.NAME` runs a study small, `size=full` in full. It trains each float network once, hands it on to
the jobs (`float_checkpoint=`), runs those in a few processes, and writes `results.csv`, `plot.svg` and the table in the
study's README. A repeated command runs only what is not finished.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.results import Row

ROOT = Path(__file__).parents[1]
SIZES = {"small": "", "full": "_full", "dev": ""}
"""What `size` may be -> the end of the experiment's name. `dev`: the last case, two steps of training, for tests."""
DEV = (
    "float.max_epochs=1", "qat.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=1",
    "ptq.calibration_batches=1", "ptq.adaptive_rounding_steps=2", "data.batch_size=16",
)  # fmt: skip
OWN = ("size", "jobs", "out", "seeds")
"""Arguments that are not overrides of train.py."""


@dataclass(frozen=True)
class Case:
    """One point of a study.

    Attributes:
        columns: what tells it from the others; columns of results.csv.
        overrides: what train.py is told.
    """

    columns: Mapping[str, object]
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """What is run, and how it is shown.

    Attributes:
        name: of its folder.
        cases: run on every set of data with every seed.
        data: experiment configurations `study/NAME`: data, network and length of training.
        tables: rows -> Markdown.
        plot: rows -> figure.
        common: overrides of all cases.
        seeds: of both phases of training; in full there are two more.
        one_float: whether all seeds start from the float network of the first.
    """

    name: str
    cases: Sequence[Case]
    data: tuple[str, ...]
    tables: "Callable[[Sequence[Row]], str]"
    plot: "Callable[[Sequence[Row]], Figure]"
    common: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    one_float: bool = False


@dataclass(frozen=True)
class Job:
    """One run of train.py: its folder, what it is told, its columns, the contents of its experiment's files."""

    folder: Path
    overrides: tuple[str, ...]
    columns: Mapping[str, object]
    settings: str

    def finished(self) -> bool:
        """Whether it was run to its end as it would be now."""
        done = _read(self.folder / "job.json")
        return (done.get("overrides"), done.get("settings")) == ([*self.overrides], self.settings)

    def row(self) -> "Row":
        """What it measured, as a row of results.csv."""
        summary = _read(self.folder / "summary.json")
        stages = summary["stages"]
        [metric] = stages["float"]["metrics"]
        measured = {name: stages[name]["metrics"][metric] for name in ("float", "ptq", "qat", "int8") if name in stages}
        size = {f"{name}_bytes": stages[name]["bytes"] for name in ("float", "int8") if name in stages}
        seconds = {"cpu_seconds": _read(self.folder / "job.json")["cpu_seconds"]}
        return {**self.columns, "metric": metric, **measured, **size, **seconds}


def jobs_of(
    study: Study, size: str, out: Path, more: Sequence[str], seeds: Sequence[int] | None = None
) -> tuple[list[Job], list[Job]]:
    """The runs that train float networks, and the runs that start from them.

    Args:
        study: the study.
        size: key of SIZES.
        out: folder of all studies' runs; float networks are shared between studies.
        more: overrides for all runs; those of `data.` are left out for digits, which are read from nowhere.
        seeds: in place of the study's own.
    """
    usual = {"full": (*study.seeds, *(study.seeds[-1] + i for i in (1, 2))), "dev": study.seeds[:1]}
    seeds = seeds or usual.get(size, study.seeds)
    cases = study.cases[-1:] if size == "dev" else study.cases
    floats: list[Job] = []
    quantized: list[Job] = []
    for data in study.data:
        settings = hashlib.sha256(b"".join(file.read_bytes() for file in _experiment_files(data))).hexdigest()
        common = [f"experiment=study/{data}{SIZES[size]}", *(DEV if size == "dev" else ())]
        common += [text for text in more if data != "digits" or not text.startswith("data.")]
        for seed in seeds:
            first = study.seeds[0] if study.one_float else seed
            start = out / "float" / data / f"seed{first}"
            if all(job.folder != start for job in floats):
                floats.append(
                    Job(start, (*common, "quant=off", f"seed={first}"), {"data": data, "seed": first}, settings)
                )
            for case in cases:
                label = "-".join(re.sub(r"[^\w.]", "_", str(value)) for value in case.columns.values())
                overrides = (*common, *study.common, *case.overrides, f"seed={seed}")
                quantized.append(
                    Job(
                        out / study.name / f"{data}-{label}-seed{seed}",
                        (*overrides, f"float_checkpoint={start / 'float.safetensors'}"),
                        {"data": data, **case.columns, "seed": seed},
                        settings,
                    )
                )
    return floats, quantized


def run_job(job: Job) -> str | None:
    """Run train.py's job in this process, as its command would; what it prints goes to console.txt of its folder.

    Returns:
        What went wrong, in one line; None if nothing did. The traceback is in error.txt.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    import train

    job.folder.mkdir(parents=True, exist_ok=True)
    for name in ("error.txt", "job.json"):
        (job.folder / name).unlink(missing_ok=True)
    start = time.process_time()
    with contextlib.ExitStack() as stack:
        console = stack.enter_context((job.folder / "console.txt").open("w"))
        stack.enter_context(contextlib.redirect_stdout(console))
        stack.enter_context(contextlib.redirect_stderr(console))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            with initialize_config_dir(str(ROOT / "conf"), job_name="train", version_base="1.3"):
                overrides = [*job.overrides, f"hydra.run.dir={job.folder}"]
                hydra = GlobalHydra.instance().hydra
                assert hydra is not None
                hydra.run("config", train.run, overrides)
        except Exception as error:
            (job.folder / "error.txt").write_text(traceback.format_exc())
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    done = {"overrides": job.overrides, "settings": job.settings, "cpu_seconds": round(time.process_time() - start, 2)}
    (job.folder / "job.json").write_text(json.dumps(done) + "\n")
    return None


def run_all(jobs: Iterable[Job], what: str, processes: int) -> list[Job]:
    """Run what is not finished, in `processes` processes of one thread (0: in this one), and show how far it is.

    Returns:
        The jobs that failed.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    jobs = list(jobs)
    todo = [job for job in jobs if not job.finished()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    failed = []
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        shown = progress.add_task(what, total=len(jobs), completed=len(jobs) - len(todo))

        def ended(job: Job, why: str | None) -> None:
            progress.advance(shown)
            if why is not None:
                failed.append(job)
                progress.console.print(f"[red]failed[/]: {job.folder.name}: {why}", soft_wrap=True)

        if processes == 0 or not todo:
            for job in todo:
                ended(job, run_job(job))
            return failed
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # read by the processes as they start
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(todo)), mp_context=context) as pool:
            waiting = {pool.submit(run_job, job): job for job in todo}
            try:
                for future in as_completed(waiting):
                    ended(waiting[future], future.result())
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
    return failed


def main(study: Study, arguments: Sequence[str] | None = None) -> None:
    """The command of a study: `[size=small|full] [seeds=0,1] [jobs=2] [out=DIR] [overrides of train.py]`.

    Ends with exit code 1 if a run failed; what the others measured is written all the same.

    Raises:
        SystemExit: an argument that is not KEY=VALUE, an unknown size, or runs that failed.
    """
    from experiments.results import publish

    given = list(sys.argv[1:] if arguments is None else arguments)
    if wrong := [text for text in given if "=" not in text]:
        raise SystemExit(f"{wrong[0]!r}: give KEY=VALUE: size=small or full, jobs=2, out=DIR, or overrides of train.py")
    options = {key: value for key, _, value in (text.partition("=") for text in given) if key in OWN}
    size = options.get("size", "small")
    if size not in SIZES:
        raise SystemExit(f"size={size} is not known (valid: {', '.join(SIZES)})")
    processes = int(options.get("jobs", 2))
    out = Path(options.get("out", ROOT / "outputs" / "studies")).absolute() / size
    more = [_absolute(text) for text in given if text.partition("=")[0] not in OWN]
    seeds = [int(text) for text in options["seeds"].split(",")] if "seeds" in options else None
    floats, quantized = jobs_of(study, size, out, more, seeds)
    failed = run_all(floats, "float networks", processes)
    failed += run_all([job for job in quantized if not failed], study.name, processes)
    rows = [job.row() for job in quantized if job.finished()]
    floats_seconds = sum(_read(job.folder / "job.json").get("cpu_seconds", 0.0) for job in floats)
    if rows:
        folder = ROOT / "experiments" / study.name if size != "dev" else out / "shown" / study.name
        publish(study, rows, folder, size, floats_seconds)
    if failed:
        raise SystemExit(
            f"{len(failed)} runs failed; see error.txt in {', '.join(str(job.folder) for job in failed[:5])}"
        )


def _experiment_files(data: str) -> list[Path]:
    folder = ROOT / "conf" / "experiment" / "study"
    return [folder / f"{name}.yaml" for name in ("base", data, f"{data}_full")]


def _absolute(text: str) -> str:
    """A path relative to here, absolute: the overrides are what a repeated command compares."""
    key, _, value = text.partition("=")
    return f"{key}={Path(value).expanduser().absolute()}" if key == "data.path" else text


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
