"""What a run of the main job keeps and says: times, stages, files, tables, `summary.json`, `report.html`."""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed, nn

from qat.analysis.predictions import ScoreBook
from qat.analysis.preparation import totals
from qat.export import export
from qat.export.agreement import Parity, ParityError, ParityLimits
from qat.export.files import atomic_file, replace, write_atomically
from qat.export.formats import EXPORTERS
from qat.export.parity import measure, pairs_of, split
from qat.export.reloaded import Outputs, Reloaded
from qat.lower import lower
from qat.runtime.network import IntegerNetwork
from qat.training.evidence import changed_predictions, look_inside, paired_tests
from qat.training.provenance import provenance, record
from qat.training.stages import (
    BATCH,
    LATENCY_BATCHES,
    Network,
    measure_stage,
    save_weights,
    size_of,
    task_metrics,
    write_json,
)
from qat.training.state import RunState
from qat.training.weights import differing, flatten

log = logging.getLogger(__name__)


class Run:
    """Collects results of one run and writes them into its folder.

    Args:
        state: of the run directory; what it says is done is not done again.
        name: for titles.
        config: the composed configuration as plain data.
        data: the data module; its test set is what every stage is measured on.
        task: has `metrics()`, and `class_dim` where classes do not lie along dimension 1.
        code: a folder of the code that trains.

    Raises:
        ValueError: the run to go on with had other data.
    """

    def __init__(self, state: RunState, name: str, config: Mapping[str, Any], data: Any, task: Any, code: Path) -> None:
        self.folder, self.config, self.task = state.folder, config, task
        self.state, self.code = state, code
        self.errors: dict[str, Exception] = {}
        self.inputs, self.targets = data.test_tensors()
        self.scores = ScoreBook(getattr(task, "class_dim", 1))
        self.summary: dict[str, Any] = {
            "name": name,
            "config": dict(flatten(config)),
            "test_samples": len(self.inputs),
            "data_sha256": data.checksum(),
            "stages": {},
            "parity": {},
            "failed": {},
            "seconds": {},
            "files": {},
        }
        if state.summary:
            if state.summary["data_sha256"] != self.summary["data_sha256"]:
                raise ValueError(
                    f"the data of {state.folder} have changed since the run began (SHA-256 "
                    f"{state.summary['data_sha256'][:12]} then, {self.summary['data_sha256'][:12]} now)"
                )
            self.summary |= {key: state.summary[key] for key in ("stages", "seconds", "files")}
            for path in self.folder.glob(".scores/*.pt"):
                if self.done(path.stem):
                    self.scores.take(path.stem, torch.load(path))
        state.begin()
        self._record()

    @rank_zero_only
    def _record(self) -> None:
        """Note where the run comes from; say so where an earlier process ran other code or packages."""
        path = self.folder / "provenance.json"
        before = json.loads(path.read_text()) if self.state.going_on and path.is_file() else None
        now = record(self.folder if before is None else None, self.code, self.summary["data_sha256"])
        if before is not None and (changed := differing(before, now)):
            log.warning("The run began with other code or packages: %s", "; ".join(changed))

    def done(self, stage: str) -> bool:
        """Whether an earlier process has measured a stage."""
        return stage in self.state.summary.get("stages", {})

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time spent inside to `seconds`, together with that of earlier processes that were not killed."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.summary["seconds"]
            seconds[what] = round(seconds.get(what, 0.0) + time.perf_counter() - start, 2)
            self.state.save(self.summary)

    def stage(self, name: str, network: Network, file: Path | None = None) -> None:
        """Measure one stage on the whole test set; of a distributed run, the first process does."""
        if not is_main_process() or self.done(name):
            return
        look = partial(self.scores.add, name)
        self.summary["stages"][name] = measure_stage(network, self.task, self.inputs, self.targets, file, look)
        if file is not None:
            self.summary["files"][name] = str(file.relative_to(self.folder))
        if name in self.scores:
            with atomic_file(self.folder / ".scores" / f"{name}.pt") as opened:
                torch.save(vars(self.scores[name]), opened)
        self.state.save(self.summary)

    def float_stage(self, net: nn.Module) -> None:
        """Measure the float network; its weights' file is what exports are compared with in size."""
        if is_main_process() and not self.done("float"):
            self.stage("float", net, save_weights(net, self.folder / "float.safetensors"))

    def lowered(self, net: nn.Module, model: Mapping[str, Any], data: Any) -> nn.Module:
        """Measure the trained network; what exporters write: its integer form, or itself where its own code runs.

        Args:
            net: prepared, with its final weights, simulating.
            model: `_target_` and arguments of the float network.
            data: the data module.
        """
        self.stage("qat", net)
        self.summary["bit_operations"] = totals(net).bit_operations
        if any(EXPORTERS[name].of_prepared for name in self.config["export"]["formats"]):
            return net
        integer = lower(net)
        if not isinstance(integer, IntegerNetwork):  # in parts: nothing was asked for that could hold it
            return integer
        integer.info |= {
            "architecture": dict(model),
            "data": data.describe(),
            "metrics": self.summary["stages"]["qat"]["metrics"],
            "provenance": provenance(self.config, self.summary["data_sha256"], self.code, self.folder),
        }
        return integer

    def exports(
        self, net: nn.Module, network: nn.Module, example: Tensor, formats: Sequence[str],
        limits: ParityLimits | None = None,
    ) -> dict[str, Path]:  # fmt: skip
        """Write files, measure each as reloaded from disk, and compare them with the trained network and one another.

        They are written elsewhere first. One that holds the limits replaces an earlier file in `export`; one that does
        not is kept beside it, with `.failed` behind its name, and `check` raises. The log and
        `unread` name one that cannot be opened here.

        Args:
            net: what training simulated.
            network: lowered from it, or itself (`lowered`).
            example: two inputs.
            formats: keys of EXPORTERS.
            limits: what is allowed.

        Returns:
            Format -> path of the files that hold the limits.
        """
        settings, class_dim = self.config["export"], getattr(self.task, "class_dim", 1)
        self.summary["kernels"] = {}
        with tempfile.TemporaryDirectory(prefix=".export-", dir=self.folder) as new:
            written = self._written(network, Path(new), example, formats)
            self.summary["unread"] = {name: why for name in written if (why := EXPORTERS[name].why_unread())}
            for name, why in self.summary["unread"].items():
                log.warning("%s is written, but its parity is not measured: %s", EXPORTERS[name].label, why)
            read = {name: path for name, path in written.items() if name not in self.summary["unread"]}
            with Reloaded(read, vars(net)["meta"]["qat"]["config"].target, settings["fresh_process"]) as reloaded:
                outputs: dict[str, Outputs] = {}
                for name in read:
                    try:
                        outputs[name] = reloaded.outputs(name, split((self.inputs,), BATCH))
                        sizes = [n for n in LATENCY_BATCHES if len(self.inputs) >= n]
                        latency = {str(n): reloaded.latency_ms(name, (self.inputs[:n],)) for n in sizes}
                    except RuntimeError as error:
                        self._fail(name, error)
                        del reloaded.files[name]
                        continue
                    scores = next(iter(outputs[name].values()))  # the first output, which the task knows
                    metrics, size = self._metrics(scores), size_of(written[name])
                    self.scores.add(name, scores, self.targets)
                    self.summary["stages"][name] = {"metrics": metrics, "bytes": size, "latency_ms": latency}
                    if (ran := EXPORTERS[name].kernels) is not None:
                        self.summary["kernels"][name] = ran(written[name], reloaded.target).to_dict()
                pairs = measure(
                    net, network, reloaded, self.inputs, layer_samples=settings["layer_samples"], class_dim=class_dim,
                    outputs=outputs, metrics=self._metrics, batch_size=BATCH,
                )  # fmt: skip
            self.summary["parity"] = {pair: measured.to_dict(layers=True) for pair, measured in pairs.items()}
            return self._publish(written, pairs, limits or ParityLimits())

    def _written(self, network: nn.Module, folder: Path, example: Tensor, formats: Sequence[str]) -> dict[str, Path]:
        """Every file that can hold the network. What one cannot does not cost the others."""
        written: dict[str, Path] = {}
        for name in formats:
            try:
                written |= export(network, folder, example, [name])
            except ValueError as error:
                if self.config["export"]["skip_impossible"]:
                    log.warning("No %s file is written. %s", EXPORTERS[name].label, error)
                else:
                    self._fail(name, error)
        return written

    def _fail(self, name: str, error: Exception) -> None:
        self.errors.setdefault(name, error)
        self.summary["failed"][name] = str(self.errors[name])

    def _publish(
        self, written: Mapping[str, Path], pairs: Mapping[str, Parity], limits: ParityLimits
    ) -> dict[str, Path]:
        """Move files that agree to where people look for them; say of the others what is wrong."""
        for a, b in pairs_of(written):
            try:
                if a not in self.errors and f"{a}_{b}" in pairs:  # a file is not to blame for what it is compared with
                    pairs[f"{a}_{b}"].check(f"{a}_{b}", limits)
            except ParityError as error:
                self._fail(b, error)
        passed = {}
        for name, path in written.items():
            final = self.folder / "export" / (f"{path.name}.failed" if name in self.errors else path.name)
            replace(path, final)
            self.summary["files"][name] = str(final.relative_to(self.folder))
            if name not in self.errors:
                passed[name] = final
        return passed

    def check(self) -> None:
        """Raise what is wrong with the first file that is not for use.

        Raises:
            ParityError: it does not compute what training simulated.
            ValueError: its format cannot hold the network.
            RuntimeError: it cannot be run.
        """
        if self.errors:
            error = next(iter(self.errors.values()))
            kept = [self.summary["files"][name] for name in self.errors if name in self.summary["files"]]
            more = f"\nNot for use, kept to be looked at: {', '.join(kept)}" if kept else ""
            raise type(error)(f"{error}{more}") from error

    def _metrics(self, outputs: Tensor) -> dict[str, float]:
        return task_metrics(self.task, zip(outputs.split(BATCH), self.targets.split(BATCH), strict=True))

    def evidence(
        self, net: nn.Module, lowered: nn.Module, data: Any, phases: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """What the report shows beside the summary: `look_inside`, changed predictions, phases of training.

        Args:
            net: with its final weights, simulating.
            lowered: from `lowered`.
            data: the data module.
            phases: from `QATSchedule.phases`.

        Returns:
            The parts of `report.json`; nothing where `report.write` is false.
        """
        if not self.config["report"]["write"]:
            return {}
        with self.timed("report"):
            found = look_inside(
                net, lowered, self.task, self.inputs, self.targets, self.config["report"],
                progress=bool(self.config["callbacks"].get("progress")),
            )  # fmt: skip
            found["predictions"] = changed_predictions(self.scores, self.inputs, self.targets, data)
        return found | {"phases": list(phases)}

    def write(self, evidence: Mapping[str, Any], config_yaml: str) -> float:
        """Write `summary.json` and, if `report.write` says so, `report.json` and `report.html`; print the tables.

        Args:
            evidence: from the method of that name; empty for a float network.
            config_yaml: the composed configuration.

        Returns:
            The last stage's first metric.
        """
        from rich.console import Console

        from qat.analysis.console import parity_table, summary_table, verdict
        from qat.analysis.plots import read_history, save, stages_figure
        from qat.analysis.report import write_report
        from qat.analysis.summary import kernel_lines, parity_notes

        self.summary["paired"] = paired_tests(self.scores, self.summary)
        write_json(self.summary, self.folder / "summary.json")
        if evidence:
            write_json(evidence, self.folder / "report.json", indent=None)
        if self.config["report"]["write"]:
            write_report(self.folder / "report.html", self.summary, evidence, read_history(self.folder), config_yaml)
            if len(self.summary["stages"]) > 1:
                save(stages_figure(self.summary), self.folder / "stages.svg")
        self.state.save(self.summary, finished=True)
        console = Console()
        console.print()
        console.print(summary_table(self.summary))
        if self.summary["parity"]:
            console.print()
            console.print(parity_table(self.summary))
        for line in (*parity_notes(self.summary), *kernel_lines(self.summary)):
            console.print()
            console.print(line)
        console.print()
        console.print(verdict(self.summary))
        console.print(f"Run directory: {self.folder}", soft_wrap=True)
        return self.metric()

    def write_text(self, name: str, text: str) -> None:
        """Write a text file into the run directory."""
        if is_main_process():
            write_atomically(self.folder / name, text.encode())

    def metric(self) -> float:
        """The first metric of the last stage, for sweepers."""
        stages: dict[str, Any] = self.summary["stages"]
        if self.state.finished:
            log.info("%s is finished: there is nothing left to do", self.folder)
        return float(next(iter(list(stages.values())[-1]["metrics"].values())))


def float_weights_of(ckpt_path: str | Path) -> Path:
    """The float weights of the run that wrote a checkpoint of its `qat` phase.

    Raises:
        FileNotFoundError: the run directory is not whole; says what to do.
    """
    path = Path(ckpt_path).resolve().parents[2] / "float.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"ckpt_path={ckpt_path} is of the qat phase, which is compared with the run's float weights, but {path} is "
            f"not there; give them with float_checkpoint="
        )
    return path


def shows_progress(callbacks: Iterable[L.Callback]) -> bool:
    """Whether a progress bar is among the callbacks; without one Lightning would add its own."""
    return any(isinstance(callback, ProgressBar) for callback in callbacks)


def is_main_process() -> bool:
    """Whether this is the only process, or the first of a distributed run."""
    return int(getattr(rank_zero_only, "rank", 0) or 0) == 0


def main_process_only() -> None:
    """After the last fit, end every process but the first: the others were there to train."""
    main = is_main_process()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()  # else the first would wait for the others when it calibrates
    if not main:
        sys.exit(0)


def close_loggers(loggers: Iterable[Logger], artifacts: Mapping[str, Path] | None = None) -> None:
    """End wandb runs, so that the next phase starts its own; with `artifacts`, exported files are logged first."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            if artifacts:
                import wandb

                artifact = wandb.Artifact(f"exported-{logger.experiment.id}", type="model")
                for path in artifacts.values():
                    (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
                logger.experiment.log_artifact(artifact)
            logger.experiment.finish()
