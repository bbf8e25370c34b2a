"""`hydra/launcher=ray`: jobs as tasks of a Ray cluster, which may be this machine."""

import logging
import os
from collections.abc import Iterator, Mapping

from hydra.core.utils import JobReturn

from hydra_plugins.qat_sweeps.jobs import Job, ParallelLauncher


class RayLauncher(ParallelLauncher):
    """One task a job.

    Settings: `init`, what `ray.init` takes (`address`: a cluster's, null for one on this machine that ends with the
    sweep); `remote`, what a task asks for (`num_cpus`, also its threads; `num_gpus`). What is null is not passed on.
    """

    def name(self) -> str:
        """Where the jobs run."""
        return f"Ray: {self.settings['init'].get('address') or 'this machine'}"

    def run(self, jobs: Mapping[int, Job]) -> Iterator[tuple[int, JobReturn | Exception]]:
        """Start or join the cluster, and wait for the tasks."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without GPUs keeps the environment
        try:
            import ray
        except ImportError:
            raise ImportError("hydra/launcher=ray needs Ray: pip install 'qat[sweep]'") from None

        given = ray.is_initialized()
        if not given:
            settings = {key: value for key, value in self.settings["init"].items() if value is not None}
            ray.init(logging_level=logging.WARNING, **settings)
        try:
            wanted = {key: value for key, value in self.settings["remote"].items() if value is not None}
            task = ray.remote(**wanted)(run_job)
            pending = {task.remote(job): number for number, job in jobs.items()}
            while pending:
                [done], _ = ray.wait(list(pending), num_returns=1)
                number = pending.pop(done)
                try:
                    yield number, ray.get(done)
                except ray.exceptions.RayError as error:
                    yield number, error
        finally:
            if not given:
                ray.shutdown()


def run_job(job: Job) -> JobReturn:
    """The task."""
    return job()
