"""What launchers share: a job that travels to another process, and how their results come in."""

import logging
import math
import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger(__name__)


@dataclass
class Job:
    """One job of a sweep. Calling it runs it, in whichever process.

    Attributes:
        number: `hydra.job.num`.
        overrides: of this job, as on the command line.
        config: the sweep's.
        context, task: Hydra's, and train.py's main.
        state: of Hydra's singletons.
        folder: the current directory of the sweep.
    """

    number: int
    overrides: list[str]
    config: DictConfig
    context: HydraContext
    task: TaskFunction
    state: Any
    folder: str

    def __call__(self) -> JobReturn:
        """Compose this job's configuration and run it in its directory."""
        if Path(self.folder).is_dir():  # another machine may not have it; the sweep's directory is an absolute path
            os.chdir(self.folder)
        setup_globals()
        Singleton.set_state(self.state)
        config = self.context.config_loader.load_sweep_config(self.config, list(self.overrides))
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{self.number}"
            config.hydra.job.num = self.number
        HydraConfig.instance().set_config(config)
        return run_job(
            hydra_context=self.context, task_function=self.task, config=config, job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )  # fmt: skip

    def checkpoint(self) -> Any:
        """What submitit queues again when a job is preempted: the same job, which goes on in its directory."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class ParallelLauncher(Launcher):
    """Runs jobs elsewhere. A process that dies is a failed job; the others go on.

    Args:
        settings: the content of `hydra.launcher`, without `_target_`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            for key, value in settings.items()
        }
        self.config: DictConfig | None = None
        self.context: HydraContext | None = None
        self.task: TaskFunction | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what jobs need."""
        self.config, self.context, self.task = config, hydra_context, task_function

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run jobs, tell of each when it ends, and return their results in order."""
        assert self.config is not None
        assert self.context is not None
        assert self.task is not None
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        jobs = {}
        log.info(f"Launching {len(job_overrides)} jobs, {self.name()}")
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
            jobs[number] = Job(number, list(overrides), self.config, self.context, self.task, Singleton.get_state(),
                               os.getcwd())  # fmt: skip
        results: dict[int, JobReturn] = {}
        for number, result in self.run(jobs):
            if isinstance(result, Exception):
                log.error(f"Job #{number} died: {result}")
                outcome = "died"  # its value is that of a job that failed
                result = JobReturn(overrides=jobs[number].overrides, status=JobStatus.COMPLETED, _return_value=math.nan)
            else:
                outcome = _outcome(result)
            results[number] = result
            log.info(f"{len(results)} of {len(jobs)} jobs have ended: #{number} {outcome}")
        return [results[number] for number in jobs]

    @abstractmethod
    def name(self) -> str:
        """Where the jobs run, for people."""

    @abstractmethod
    def run(self, jobs: Mapping[int, Job]) -> Iterator[tuple[int, JobReturn | Exception]]:
        """Run jobs; yield the number and the result of each as it ends, or the exception that says how it died."""


def _outcome(result: JobReturn) -> str:
    """A job's result and directory, for people."""
    where = result.hydra_cfg.hydra.runtime.output_dir if result.hydra_cfg else ""
    if result.status is JobStatus.FAILED:
        return f"failed in {where}"
    value = result.return_value
    failed = isinstance(value, float) and math.isnan(value)
    return f"{'failed' if failed else f'returned {value}'} in {where}"
