"""`hydra/launcher=submitit_slurm` and `submitit_local`: jobs of a SLURM array, or processes of this machine.

Their settings are those of hydra-submitit-launcher, whose own class gives up the whole sweep when one job dies.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.utils import JobReturn

from hydra_plugins.qat_sweeps.jobs import Job, ParallelLauncher

COMMON = ("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name",
          "stderr_to_stdout")  # fmt: skip
"""Settings that every cluster of submitit has; the others take its name in front."""


class LocalLauncher(ParallelLauncher):
    """One job of submitit a job of the sweep: a process of this machine, all at once."""

    cluster = "local"

    def name(self) -> str:
        """Where the jobs run."""
        return f"submitit: {self.cluster}"

    def run(self, jobs: Mapping[int, Job]) -> Iterator[tuple[int, JobReturn | Exception]]:
        """Submit all, then wait for each in turn."""
        import submitit
        from submitit.core.utils import FailedJobError, UncompletedJobError

        settings: dict[str, Any] = {key: value for key, value in self.settings.items() if value is not None}
        folder = settings.pop("submitit_folder")
        retries = {f"{self.cluster}_{key}": settings.pop(key) for key in ("max_num_timeout",) if key in settings}
        executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster, **retries)
        executor.update_parameters(
            **{key if key in COMMON else f"{self.cluster}_{key}": value for key, value in settings.items()}
        )
        with executor.batch():
            submitted = {number: executor.submit(job) for number, job in jobs.items()}
        for number, job in submitted.items():
            try:
                yield number, job.results()[0]
            except (FailedJobError, UncompletedJobError) as error:
                yield number, error


class SlurmLauncher(LocalLauncher):
    """One job of a SLURM array a job of the sweep.

    A preempted one is queued again (`max_num_timeout` times where it ran out of time) and goes on in its directory.
    """

    cluster = "slurm"
