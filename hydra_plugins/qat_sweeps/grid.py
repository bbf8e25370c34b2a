"""Hydra's basic sweeper, which finds what ran before in the sweep's directory: finished jobs are skipped."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import filter_overrides
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)

OURS = {
    f"hydra_plugins.hydra_submitit_launcher.submitit_launcher.{name}":
        f"hydra_plugins.qat_sweeps.submitit_launcher.{name}" for name in ("LocalLauncher", "SlurmLauncher")
}  # fmt: skip
"""Launchers of others -> ours, which take the same settings, and survive a job that dies."""


def prepare_launcher(config: DictConfig) -> None:
    """Change what `hydra.launcher` says to what a sweep of train.py needs."""
    launcher = config.hydra.launcher
    launcher._target_ = OURS.get(launcher._target_, launcher._target_)
    if "joblib" in launcher._target_ and not launcher.verbose:
        launcher.verbose = 10  # a line when a job ends


class GridSweeper(BasicSweeper):
    """Every combination of the values on the command line (`a=1,2,3`, `a=range(1,4)`, `hydra.sweeper.params`).

    A job is known by its configuration (`qat.analysis.runs.config_key`), whatever its number. One that has finished in
    this directory is not launched again; one that has begun gets its directory back, and train.py goes on from its
    last checkpoint.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what jobs need, and make the launcher."""
        prepare_launcher(config)
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Launch what has not finished."""
        from qat.analysis.runs import is_finished, runs_by_config

        assert self.config is not None
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        settings = parser.parse_overrides([*self._parse_config(), *arguments])
        [jobs] = self.split_arguments(settings, None)

        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        found = runs_by_config(folder)
        places = [found.get(self._key(job)) for job in jobs]  # composes every job: a mistake is told before any begins
        begun = [place for place in places if place is not None]
        finished = {place for place in begun if is_finished(place)}
        if begun:
            log.info(f"Of {len(jobs)} jobs {len(finished)} have finished and are skipped, {len(begun) - len(finished)} "
                     f"have begun before, {len(jobs) - len(begun)} are new")  # fmt: skip
        numbers = iter(_free_numbers(folder))
        todo: list[tuple[list[str], Path | None]] = []
        for job, place in zip(jobs, places, strict=True):
            if place in finished:
                log.info(f"\tskipped {place} : {' '.join(filter_overrides(job))}")
                continue
            if place is None and self._numbered():
                place = folder / str(next(numbers))
            where = [] if place is None else [f"hydra.sweep.subdir='{place.relative_to(folder)}'"]
            todo.append(([*job, *where], place))
        size = self.max_batch_size or len(todo)
        return [self._launch(todo[i : i + size], i) for i in range(0, len(todo), size or 1)]

    def _key(self, job: Sequence[str]) -> str:
        """The `config_key` of a job's composed configuration."""
        from qat.analysis.runs import config_key

        assert self.hydra_context is not None
        assert self.config is not None
        config: DictConfig = self.hydra_context.config_loader.load_sweep_config(self.config, list(job))
        with open_dict(config):
            del config["hydra"]
        return config_key(OmegaConf.to_yaml(config))

    def _numbered(self) -> bool:
        """Whether directories of jobs are named by their numbers, as conf/config.yaml has it."""
        assert self.config is not None
        raw = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        assert isinstance(raw, dict)
        return raw["subdir"] == "${hydra:job.num}"

    def _launch(self, jobs: Sequence[tuple[list[str], Path | None]], first: int) -> list[Any]:
        """Launch jobs. Where one takes the launcher down (a killed worker of joblib), the others get their turn.

        Those that had not begun are launched again together; then each of those that were running, alone: what ends
        its launcher alone has failed.
        """
        assert self.launcher is not None
        try:
            returned = list(self.launcher.launch([job for job, _ in jobs], initial_job_idx=first))
        except ImportError:
            raise
        except Exception as error:
            waiting = [one for one in jobs if one[1] is not None and not (one[1] / ".hydra").is_dir()]
            if len(waiting) == len(jobs):
                raise  # it launched nothing
            log.error(f"The launcher stopped: {type(error).__name__}: {error}")
            running = [one for one in jobs if one[1] is not None and one not in waiting and _is_open(one[1])]
            groups = [*([waiting] if waiting else []), *([one] for one in running if len(jobs) > 1)]
            return [result for group in groups for result in self._launch(group, first)]
        for result in returned:
            _ = result.return_value  # raises what a job raised
        return returned


def _free_numbers(folder: Path) -> range:
    """Numbers of jobs that no directory has."""
    taken = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    return range(max(taken, default=-1) + 1, 10**9)


def _is_open(place: Path) -> bool:
    """Whether a job neither finished nor failed."""
    from qat.analysis.runs import status_of, summary_of

    return status_of(place, summary_of(place)) == "unfinished"
