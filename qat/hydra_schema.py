"""Hydra: the structured schema of `quant`, one option a preset, and what turns a composed config into ours.

Import it before `hydra.main` composes (train.py does). Only it and `hydra_resume.py` import hydra.
"""

import json
import logging
import math
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from functools import reduce
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from qat import stopping
from qat.analysis import leaderboard_page
from qat.analysis.layers import layer_table
from qat.analysis.leaderboard import COSTS, read_runs
from qat.analysis.runs import same_command, status_of, summary_of
from qat.analysis.search import study_figures
from qat.analysis.summary import pick_metric
from qat.analysis.sweep import collect, results_table, write_results
from qat.export import EXPORTERS
from qat.export.files import write_atomically
from qat.prepare import prepare
from qat.presets import DESCRIPTIONS, PRESETS, fields
from qat.scheme import Granularity, QuantConfig, choice
from qat.scheme.checks import TABLES
from qat.targets import TARGETS, check_target
from qat.training.module import build
from qat.training.once import warnings_once
from qat.training.provenance import git_state
from qat.training.pruning import PrunedError
from qat.training.run import is_main_process

log = logging.getLogger(__name__)


def register() -> None:
    """Store the schema of `quant`, one option a preset (`quant=int8`, ...) and a target. May be called again."""
    store = ConfigStore.instance()
    store.store(name="quant_schema", node=QuantConfig, provider="qat")
    for name in PRESETS:
        data = _by_target(name, [fields(name, target) for target in TARGETS])
        node = {"defaults": ["/quant_schema@_here_", "_self_"], **data, "target": "${target.name}"}
        store.store(group="quant", name=name, node=node, provider="qat")
    for name in TARGETS:
        node = {"name": name, "formats": list(TARGETS[name].formats)}
        store.store(group="target", name=name, node=node, provider="qat")
    OmegaConf.register_new_resolver("preset", _of_preset, replace=True)
    OmegaConf.register_new_resolver("quant_options", lambda: _options(DESCRIPTIONS), replace=True)
    OmegaConf.register_new_resolver("target_options", lambda: _options(
        {name: target.description for name, target in TARGETS.items()}), replace=True)  # fmt: skip
    OmegaConf.register_new_resolver("quant_fields", _quant_fields, replace=True)
    OmegaConf.register_new_resolver("sweep_folder", _sweep_folder, replace=True, use_cache=True)


def _by_target(name: str, variants: Sequence[Any], *path: str | int) -> Any:
    """A preset's data; what differs between targets becomes `${preset:NAME,PATH}`, which asks for the chosen one's."""
    if all(variant == variants[0] for variant in variants):
        return variants[0]
    if all(isinstance(variant, dict) for variant in variants):
        keys = dict.fromkeys(key for variant in variants for key in variant)
        return {key: _by_target(name, [v.get(key) for v in variants], *path, key) for key in keys}
    if all(isinstance(variant, list) for variant in variants):
        return [_by_target(name, parts, *path, i) for i, parts in enumerate(zip(*variants, strict=True))]
    return f"${{preset:{name},{'.'.join(map(str, path))}}}"


def _of_preset(name: str, path: str, *, _root_: DictConfig) -> Any:
    """A field of a preset for the chosen target; the usual value where the preset does not name it there."""
    target = str(_root_.target.name)
    data = QuantConfig.from_dict(fields(name, target if target in TARGETS else "generic")).to_dict()
    return reduce(lambda part, key: part[int(key) if isinstance(part, list) else key], path.split("."), data)


def _options(descriptions: Mapping[str, str]) -> str:
    """Names with descriptions, for `--help`."""
    return "\n".join(f"  {name:<21} {text}" for name, text in descriptions.items())


def _quant_fields() -> str:
    """The names that fields of a scheme take, for `--help`."""
    names = {name: list(table) for name, table in TABLES.items()}
    names["granularity"] = [member.value for member in Granularity]
    return "\n".join(
        textwrap.fill(", ".join(values), 118, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15)
        for name, values in names.items()
    )


def _sweep_folder(name: str | None) -> str:
    """`sweep=NAME` -> NAME; DATE/TIME of now for null and `new`."""
    return datetime.now().strftime("%Y-%m-%d/%H-%M-%S") if name in (None, "new") else str(name)


def quant_config(cfg: DictConfig) -> QuantConfig:
    """The `quant` part of a composed config, validated and checked against its target; `export.formats` too.

    A file format that cannot hold the scheme is taken out of `export.formats` with a warning, if
    `export.skip_impossible` says so; of the target's own formats also one whose packages are missing.

    Raises:
        ValueError: names the field, its value and what would be valid.
    """
    try:
        data = OmegaConf.to_container(cfg.quant, resolve=True, throw_on_missing=True, enum_to_str=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"quant: {error}") from None
    assert isinstance(data, dict)
    config = QuantConfig.from_dict({str(k): v for k, v in data.items()})
    check_target(config)
    asked = not OmegaConf.is_interpolation(cfg.export, "formats")  # else they are the target's
    formats = [name for name in cfg.export.formats if _can_hold(name, config, cfg.export.skip_impossible, asked)]
    cfg.export.formats = formats
    return config


def _can_hold(name: str, config: QuantConfig, skip: bool, asked: bool) -> bool:
    """Whether a file format can hold a scheme; refuses an unknown one, and one whose packages are missing if asked."""
    exporter = choice("export.formats", name, EXPORTERS)
    try:
        exporter.require()
        if exporter.check is not None:
            exporter.check(config)
    except (ValueError, ImportError) as error:
        if asked if isinstance(error, ImportError) else not skip:
            raise
        log.warning("No %s file will be written. %s", exporter.label, error)
        return False
    return True


def plain(cfg: Any) -> dict[str, Any]:
    """A part of a composed config as plain data, interpolations resolved.

    Raises:
        ValueError: an interpolation that finds nothing: a model or task reads what the chosen data do not have.
    """
    try:
        data = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    except InterpolationKeyError as error:
        reason = str(error.msg).partition("\n")[0]
        raise ValueError(f"{error.full_key}: {reason}. Choose data, model and task that go together") from None
    assert isinstance(data, dict)
    return {str(k): v for k, v in data.items()}


def composed(settings: list[str], folder: Path) -> DictConfig:
    """The configuration that train.py would run with.

    Args:
        settings: overrides, as on its command line.
        folder: with config.yaml.

    Raises:
        ValueError: a setting that is not valid; says what Hydra says.
        FileNotFoundError: no config.yaml.
    """
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"no config.yaml in '{folder}'; name the folder of the configuration with --config-dir")
    try:
        with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
            return compose("config", overrides=settings)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(str(error).partition("\nConfig search path")[0]) from error


def example_input(cfg: DictConfig) -> Any:
    """Two inputs from the training data of a composed config.

    Raises:
        ValueError, OSError: what the data module says about its settings and files.
    """
    return _of_data(cfg, "example_input")


def test_tensors(cfg: DictConfig) -> tuple[Any, Any]:
    """Inputs and targets of the test set of a composed config.

    Raises:
        ValueError, OSError: what the data module says about its settings and files.
    """
    return _of_data(cfg, "test_tensors")


def _of_data(cfg: DictConfig, what: str) -> Any:
    try:
        return getattr(instantiate(cfg.data), what)()
    except InstantiationException as error:  # Hydra wraps what a constructor says
        raise error.__cause__ if isinstance(error.__cause__, USER_ERRORS) else ValueError(str(error)) from error


def task_metrics(cfg: DictConfig) -> dict[str, bool | None]:
    """Names of a task's metrics -> whether higher is better, where a metric says it."""
    return {str(name): metric.higher_is_better for name, metric in instantiate(cfg.task).metrics().items()}


def searched_layers(cfg: DictConfig, match: str = "*") -> list[str]:
    """Names of the quantized layers that no rule of a composed config names, in order.

    Args:
        match: a glob on them.

    Raises:
        ValueError: there is none.
    """
    config, net = quant_config(cfg), build(plain(cfg.model))
    rows = layer_table(prepare(net.eval(), config, example_input(cfg)))
    names = [str(row["layer"]) for row in rows if row.get("layer") and row["scheme"] != "float"
             and not row["reason"].startswith("rule")]  # fmt: skip
    found = list(dict.fromkeys(name for name in names if fnmatchcase(name, match)))
    if not found:
        raise ValueError(f"hydra.sweeper.layers.match={match}: no quantized layer without a rule has such a name "
                         f"(there are {', '.join(dict.fromkeys(names)) or 'none'})")  # fmt: skip
    return found


USER_ERRORS = (ValueError, OSError, ImportError, RuntimeError, InstantiationException)
"""What a run raises with a message written for its user: bad input, a missing file or package, no parity, NaN."""


QUIET = (".*LeafSpec.* is deprecated", ".*your dataloader is not resumable", ".*Checkpoint directory .* is not empty")
"""Warnings that are none: the data of qat.zoo go on where they stopped, and so do runs."""


def guard(job: Callable[[DictConfig], float], cfg: DictConfig) -> float:
    """Run a job; say what went wrong in one message, keep the traceback in the run directory.

    Alone, a failed job ends the process with exit code 1. In a sweep it is recorded and the other jobs go on; and a
    job that was interrupted in this directory goes on. SIGINT and SIGTERM end the process with 130 and 143, a sweep
    too; what is done by then is kept.
    """
    config = HydraConfig.get()
    if not is_main_process():
        logging.getLogger("qat").setLevel(logging.WARNING)  # what the first one says, too
    if config.mode is RunMode.MULTIRUN:
        _go_on(cfg, Path(config.runtime.output_dir))
        if config.runtime.choices.get("hydra/launcher") not in (None, "basic") and "progress" in cfg.callbacks:
            cfg.callbacks.progress = None  # bars of several jobs would write over each other
        _prunable(cfg, config.sweeper, Path(config.runtime.output_dir))
    try:
        with warnings_once(), stopping.listening():
            for message in QUIET:
                warnings.filterwarnings("ignore", message=message)
            return job(cfg)
    except PrunedError as error:
        (Path(config.runtime.output_dir) / "pruned.txt").write_text(f"{error}\n")
        log.info("This trial ends here: %s", error)
        return math.nan
    except stopping.Stopped as stopped:
        if not stopped.told:
            log.info("Stopped. Go on with: ckpt_path=%s", config.runtime.output_dir)
        sys.exit(stopped.exit_code if is_main_process() else 0)  # else Lightning would kill the first process
    except Exception as error:
        if not isinstance(error, USER_ERRORS) and config.mode is not RunMode.MULTIRUN:
            raise  # a defect, not a mistake of the user: the traceback is the message
        if isinstance(error, InstantiationException) and isinstance(error.__cause__, USER_ERRORS):
            error = error.__cause__  # Hydra wraps what a constructor says
        path = Path(config.runtime.output_dir) / "error.txt"
        try:
            path.write_text(traceback.format_exc())
            where = f"traceback: {path}"
        except OSError as full:  # a full disk may be what went wrong
            where = f"the traceback could not be kept: {full}"
        log.error("%s: %s\n(%s)", type(error).__name__, error, where)
        if config.mode is not RunMode.MULTIRUN:
            sys.exit(1)
        return math.nan


def _go_on(cfg: DictConfig, folder: Path) -> None:
    """Let an interrupted job of a sweep go on where it was; one that failed begins again."""
    failed = status_of(folder, summary_of(folder)) == "failed"
    for name in ("error.txt", "pruned.txt", "summary.json"):
        (folder / name).unlink(missing_ok=True)
    if not failed and cfg.ckpt_path is None:
        cfg.ckpt_path = "auto"


def _prunable(cfg: DictConfig, sweeper: DictConfig, folder: Path) -> None:
    """Add what ends a hopeless trial, in a search with one objective that is validated while training."""
    optimize = sweeper.get("optimize", None)
    names = [optimize] if isinstance(optimize, str) else list(optimize or [pick_metric(task_metrics(cfg))])
    if "storage" in sweeper and sweeper.prune and len(names) == 1 and names[0] not in COSTS and folder.name.isdecimal():
        with open_dict(cfg):
            cfg.callbacks.prune = {
                "_target_": "qat.training.pruning.PruneTrial", "storage": sweeper.storage, "study": "qat",
                "number": int(folder.name), "monitor": f"val_{names[0]}", "pruner": sweeper.pruner,
            }  # fmt: skip


class SweepResults(Callback):
    """What a sweep begins and ends with: its directory; `results.csv`, `sweep.png` and a table on the console."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Choose the directory: without `sweep=` or `hydra.sweep.dir=`, the one where the same command ran last."""
        hydra, folder = config.hydra, Path(config.hydra.sweep.dir).absolute()
        command = {
            "settings": [setting for setting in hydra.overrides.task if not setting.startswith("sweep=")],
            "sweeper": hydra.runtime.choices["hydra/sweeper"],
        }
        raw = OmegaConf.to_container(hydra.sweep, resolve=False)
        assert isinstance(raw, dict)
        git = git_state(Path(__file__).parent)
        if config.sweep is None and "sweep_folder" in raw["dir"]:
            earlier = same_command(folder.parents[1], command)
            if earlier is not None:
                folder = earlier
                log.info("This command ran in %s before; it goes on there. To begin anew: sweep=new", folder)
        path = folder / "sweep.json"
        if path.is_file() and (before := json.loads(path.read_text())["git"]) != git:
            log.warning("The code has changed since this sweep began (git %s, now %s)", before, git)
        if not path.is_file():
            write_atomically(path, (json.dumps({**command, "git": git}, indent=2) + "\n").encode())
        hydra.sweep.dir = str(folder)
        quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")  # of every job, in whichever process

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Collect what the jobs wrote."""
        from rich.console import Console

        folder = Path(config.hydra.sweep.dir)
        rows = collect(folder)
        if not rows:
            return
        figures, note = study_figures(folder)
        written = [*write_results(folder), *leaderboard_page.write(read_runs([folder]), folder, figures, note)[:2]]
        Console().print(results_table(rows))
        log.info("Sweep results: %s", ", ".join(str(path) for path in written))
        said = {"failed": "failed; see error.txt in their directories",
                "unfinished": "did not come to their end; the same command goes on with them"}  # fmt: skip
        counts = {status: sum(row["status"] == status for row in rows) for status in said}
        for status, what in said.items():
            if counts[status]:
                log.error("%d of %d jobs %s", counts[status], len(rows), what)
        if any(counts.values()):
            sys.exit(1)


register()
