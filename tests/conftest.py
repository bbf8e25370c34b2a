"""What all tests share: one thread, fixed seeds, and no trace of the developer's machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several threads spin where cores are shared
for variable in ("WANDB_MODE", "WANDB_API_KEY", "HYDRA_FULL_ERROR"):
    os.environ.pop(variable, None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
