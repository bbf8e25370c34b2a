"""What all tests share: few threads, fixed seeds, and no trace of the developer's machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
for variable in ("WANDB_MODE", "WANDB_API_KEY", "HYDRA_FULL_ERROR"):
    os.environ.pop(variable, None)

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
