"""What all tests share: one thread, fixed seeds, and no trace of the developer's machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several threads spin where cores are shared
for variable in ("WANDB_MODE", "WANDB_API_KEY", "HYDRA_FULL_ERROR"):
    os.environ.pop(variable, None)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("untimed", deadline=None)  # the first example may load or compile something
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as there are cores: many tests wait for a process that they have started."""
    return max(2, (os.cpu_count() or 1) * 3 // 2)


LONG = (
    "test_main_job.py", "test_interrupted_runs.py", "test_language_model.py", "test_distributed.py", "test_shard.py",
    "test_config.py", "test_sweeps.py", "test_search.py", "test_distributed_runs.py", "test_studies.py",
    "test_language_models.py",
)  # fmt: skip
"""Files whose tests start whole runs. They go first, so that no worker is left alone with one in the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put LONG files first, the rest in order; of tests `sampled(n)` leave one in n, and mark the others `slow`."""
    seen: dict[str, int] = {}
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None:
            family = item.nodeid.partition("[")[0]
            if seen.setdefault(family, 0) % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[family] += 1
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))
