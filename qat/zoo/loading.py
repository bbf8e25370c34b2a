"""Data held whole in memory, as Lightning data modules: batching, order, and going on after an interruption.

A data set makes whole batches; no code runs once a sample. Order and augmentation are pure functions of (seed, epoch),
so a run resumed at an epoch sees what an unbroken run sees.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

SPLIT_SEED = 0  # splits and calibration batches stay the same whatever the seed of a run


def generator(*seeds: int) -> torch.Generator:
    """A generator whose stream depends on all seeds; (1, 0) and (0, 1) give unrelated streams."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


class Batches(Protocol):
    """A data set that makes whole batches: torch's fetcher calls `__getitems__` with all indices of a batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]: ...

    def start_epoch(self, epoch: int, done: int = 0, batch_size: int = 1) -> None:
        """Draw the augmentation from here on as epoch `epoch` does after `done` batches."""


class EpochShuffle(DistributedSampler[int]):
    """A random order that depends on (seed, epoch) only; it also starts the epoch of the data set's augmentation.

    Of a distributed run every process takes each n-th sample of the one order, so that together their batches hold what
    one process's would; where samples do not divide, the first are taken twice. Lightning calls `set_epoch`; in any
    other loop the epoch counts the passes.

    Args:
        dataset: what is shuffled.
        seed: with the epoch it determines the order.
        batch_size: samples of one batch, of one process.
        done: batches of the first pass to leave out, because an interrupted run has seen them.
        rank: of this process.
        processes: of a distributed run.
    """

    def __init__(
        self, dataset: Batches, seed: int, batch_size: int = 1, done: int = 0, rank: int = 0, processes: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.batches, self.batch_size, self.done = dataset, batch_size, done

    def __iter__(self) -> Iterator[int]:
        self.batches.start_epoch(self.epoch, self.done, self.batch_size)
        order = torch.randperm(len(self.batches), generator=generator(self.seed, self.epoch))
        order = torch.cat([order, order[: self.total_size - len(order)]])[self.rank :: self.num_replicas]
        seen = self.done * self.batch_size
        self.epoch, self.done = self.epoch + 1, 0
        return iter(order[seen:].tolist())


def _same(batch: Any) -> Any:
    """Collate nothing: `__getitems__` returned a whole batch."""
    return batch


def require(valid: bool, field: str, value: object, wanted: str) -> None:
    """Raise ValueError, naming the field, its value and what is wanted, unless `valid`."""
    if not valid:
        raise ValueError(f"data.{field}={value!r} is not valid: {wanted}")


def require_integer(field: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is an integer of at least `least`."""
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
    require(valid, field, value, f"give an integer of at least {least}")


class InMemoryData(LightningDataModule):
    """Training, validation and test samples in memory; a subclass says in `batches` what a batch is.

    Args:
        name: what reports call the data set.
        batch_size: samples a batch (and a process), in training and in evaluation.
        seed: determines order and augmentation, never the splits.

    Raises:
        ValueError: an argument is not valid.
    """

    def __init__(self, *, name: str, batch_size: int, seed: int) -> None:
        super().__init__()
        require_integer("batch_size", batch_size, least=1)
        require_integer("seed", seed, least=0)
        self.name, self.batch_size, self.seed = name, batch_size, seed
        self._done = 0

    def batches(self, key: str, rank: int | None = None) -> Batches:
        """The data set of "train", "val" or "test".

        Args:
            key: name of the split.
            rank: of the process that trains on it, for augmentation; None for none.
        """
        raise NotImplementedError

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return shuffled, augmented training batches; each pass is another epoch."""
        # Processes of a distributed run share the order but must not share the augmentation.
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = self.batches("train", rank)
        done, self._done = self._done, 0
        return self._loader(batches, EpochShuffle(batches, self.seed, self.batch_size, done, rank, processes))

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch has come; Lightning keeps it in its checkpoints."""
        if self.trainer is None:
            return {"batches_done": 0}
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        current: Any = progress.current
        over = progress.is_last_batch and current.started == current.ready  # else the last is still to come
        return {"batches_done": 0 if over else current.completed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next epoch go on where the interrupted one stopped."""
        self._done = int(state_dict["batches_done"])

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return validation batches, in order."""
        return self._loader(self.batches("val"))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return test batches, in order."""
        return self._loader(self.batches("test"))

    def _loader(self, batches: Batches, sampler: EpochShuffle | None = None) -> DataLoader[Any]:
        dataset: Any = batches
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=_same,
            num_workers=0,  # a batch takes about a millisecond; a worker process would cost more than it saves
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each pass draws from, and so changes, torch's global generator
        )
