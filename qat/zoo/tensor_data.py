"""Image data held whole in memory, as Lightning data modules: batching, augmentation, normalisation, calibration.

A batch is cut out of one tensor, augmented and normalised by a few tensor operations; no code runs once an image.
Order and augmentation are pure functions of (seed, epoch), so a run resumed at an epoch sees what an unbroken run sees.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

SPLIT_SEED = 0  # splits and calibration batches stay the same whatever the seed of a run


class Split(NamedTuple):
    """Images (N, C, H, W), uint8 or float in [0, 1], and their labels (N,), int64."""

    images: Tensor
    labels: Tensor


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, padding: int) -> Tensor:
    """Pad with zeros, cut a window of the original size out of each image, then mirror some of them.

    Args:
        images: (N, C, H, W), any dtype.
        top: (N,) int64, first row of each window in the padded image, 0 to 2 * padding.
        left: (N,) int64, first column of each window.
        flip: (N,) bool, which windows to mirror left to right.
        padding: pixels added on each side.

    Source: He et al. 2015, "Deep Residual Learning for Image Recognition", section 4.2.

    >>> image = torch.tensor([[[[1, 2], [3, 4]]]])
    >>> crop_and_flip(image, torch.tensor([0]), torch.tensor([1]), torch.tensor([True]), padding=1)
    tensor([[[[0, 0],
              [2, 1]]]])
    """
    count, channels, height, width = images.shape
    columns = torch.arange(width).expand(count, width)
    columns = left[:, None] + torch.where(flip[:, None], columns.flip(1), columns)
    rows = top[:, None] + torch.arange(height)
    # Positions in a flattened padded image: one gather is three times as fast as indexing with rows and columns.
    positions = (rows[:, :, None] * (width + 2 * padding) + columns[:, None, :]).reshape(count, 1, -1)
    padded = F.pad(images, (padding,) * 4).flatten(2)
    return padded.gather(2, positions.expand(-1, channels, -1)).reshape(images.shape)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (x - mean) / std as float32, with x in [0, 1]: uint8 images are divided by 255 first.

    Args:
        images: (N, C, H, W), uint8 in 0..255 or float in [0, 1].
        mean: (C,).
        std: (C,).
    """
    x = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    return (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def _generator(*seeds: int) -> torch.Generator:
    """A generator whose stream depends on all seeds; (1, 0) and (0, 1) give unrelated streams."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))


class TensorBatches(Dataset[tuple[Tensor, Tensor]]):
    """A data set that makes whole batches: torch's fetcher calls `__getitems__` with all indices of a batch.

    Args:
        split: images and labels.
        mean: (C,), in [0, 1] scale.
        std: (C,), in [0, 1] scale.
        crop_padding: pixels of zero padding before a random crop; 0 for none.
        flip: mirror half of the images.
        seed: one or more numbers that, with the epoch, determine the augmentation.
    """

    def __init__(
        self,
        split: Split,
        mean: Tensor,
        std: Tensor,
        crop_padding: int = 0,
        flip: bool = False,
        seed: Sequence[int] = (0,),
    ) -> None:
        self.split, self.mean, self.std = split, mean, std
        self.crop_padding, self.flip, self.seed = crop_padding, flip, tuple(seed)
        self.start_epoch(0)

    def start_epoch(self, epoch: int, done: int = 0, batch_size: int = 1) -> None:
        """Draw the augmentation from here on as epoch `epoch` does after `done` batches."""
        self.generator = _generator(*self.seed, epoch)
        for _ in range(done):
            self._draw(batch_size)

    def _draw(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Row and column of each window, and whether it is mirrored."""
        top, left = torch.randint(2 * self.crop_padding + 1, (2, count), generator=self.generator)
        coin = torch.rand(count, generator=self.generator) < 0.5
        return top, left, coin & self.flip

    def __len__(self) -> int:
        return len(self.split.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.__getitems__([index])
        return inputs[0], labels[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return inputs (len(indices), C, H, W) float32, augmented and normalised, and labels int64."""
        index = torch.tensor(indices)
        images = self.split.images[index]
        if self.crop_padding or self.flip:
            images = crop_and_flip(images, *self._draw(len(index)), self.crop_padding)
        return normalise(images, self.mean, self.std), self.split.labels[index]


class EpochShuffle(Sampler[int]):
    """A random order that depends on (seed, epoch) only; it also starts the epoch of the data set's augmentation.

    Lightning calls `set_epoch`, in a distributed run through the sampler it wraps around this one; in any other loop
    the epoch counts the passes.

    Args:
        dataset: what is shuffled.
        seed: with the epoch it determines the order.
        batch_size: samples of one batch, of one process.
        done: batches of the first pass to leave out, because an interrupted run has seen them.
        processes: of a distributed run.
    """

    def __init__(
        self, dataset: TensorBatches, seed: int, batch_size: int = 1, done: int = 0, processes: int = 1
    ) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, 0
        self.batch_size, self.done, self.processes = batch_size, done, processes

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of epoch `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        self.dataset.start_epoch(self.epoch, self.done, self.batch_size)
        order = torch.randperm(len(self), generator=_generator(self.seed, self.epoch))
        seen = self.done * self.batch_size * self.processes
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


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """Raise ValueError unless every label is in [0, num_classes)."""
    low, high = int(labels.min()), int(labels.max())
    wanted = f"{where} holds labels {low} to {high}, and labels must lie in 0 to num_classes - 1"
    require(low >= 0 and high < num_classes, "num_classes", num_classes, wanted)


def stratified(labels: Tensor, size: int, field: str) -> tuple[Tensor, Tensor]:
    """Cut (rest, part) out of 0..N-1, each in ascending order; part has `size` rows, classes in proportion."""
    from sklearn.model_selection import train_test_split

    try:
        rest, part = train_test_split(
            np.arange(len(labels)), test_size=size, stratify=labels.numpy(), random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(
            f"data.{field}={size!r} is not valid for {len(labels)} training images: every class needs an image on "
            f"either side of the split ({error})"
        ) from error
    return torch.from_numpy(np.sort(rest)), torch.from_numpy(np.sort(part))


class TensorDataModule(LightningDataModule):
    """Train, validation and test images in memory; a subclass says in `load` where they come from.

    Attributes `channels`, `image_size`, `num_classes`, `class_names` and `name` describe the data.

    Args:
        name: what reports call the data set.
        channels: channels of an image.
        image_size: height and width of an image, in pixels.
        num_classes: labels are 0 to num_classes - 1.
        mean: one a channel, with pixels in [0, 1].
        std: one a channel, with pixels in [0, 1].
        batch_size: images a batch (and a process), in training and in evaluation.
        crop_padding: pixels of zero padding before a random crop of training images; 0 for none.
        flip: mirror half of the training images left to right.
        seed: determines order and augmentation, never the splits.

    Raises:
        ValueError: an argument is not valid, or (from `setup`) the data are not what the arguments say.
    """

    def __init__(
        self,
        *,
        name: str,
        channels: int,
        image_size: int,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int = 128,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for field, number in {"channels": channels, "image_size": image_size, "num_classes": num_classes}.items():
            require_integer(field, number, least=1)
        for field, values in {"mean": mean, "std": std}.items():
            wanted = f"give one number a channel, and data.channels={channels}"
            require(isinstance(values, Sequence) and len(values) == channels, field, values, wanted)
        require(min(std) > 0, "std", std, "every number must be greater than 0")
        require_integer("batch_size", batch_size, least=1)
        require_integer("crop_padding", crop_padding, least=0)
        require_integer("seed", seed, least=0)
        self.name, self.channels, self.image_size, self.num_classes = name, channels, image_size, num_classes
        self.class_names = [str(label) for label in range(num_classes)]
        self.mean, self.std = (torch.tensor(list(values), dtype=torch.float32) for values in (mean, std))
        self.batch_size, self.crop_padding, self.flip, self.seed = batch_size, crop_padding, flip, seed
        self._splits: dict[str, Split] = {}
        self._done = 0

    def load(self) -> dict[str, Split]:
        """Return the splits "train", "val" and "test"; may set `class_names`. Called once."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load all splits, whatever the stage; free of cost when called again."""
        if self._splits:
            return
        splits = self.load()
        shape = (self.channels, self.image_size, self.image_size)
        for key, split in splits.items():
            if (found := tuple(split.images.shape[1:])) != shape:
                raise ValueError(f"{key} images have shape {found}, data.channels and data.image_size say {shape}")
            check_labels(split.labels, self.num_classes, key)
        self._splits = splits

    def split(self, key: str) -> Split:
        """Return the raw images and labels of "train", "val" or "test", loading them where needed."""
        self.setup()
        return self._splits[key]

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return shuffled, augmented training batches; each pass is another epoch."""
        # Processes of a distributed run share the order but must not share the augmentation.
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        batches = TensorBatches(
            self.split("train"), self.mean, self.std, self.crop_padding, self.flip, seed=(self.seed, rank)
        )
        done, self._done = self._done, 0
        return self._loader(batches, EpochShuffle(batches, self.seed, self.batch_size, done, processes))

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch has come; Lightning keeps it in its checkpoints."""
        progress = self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer else None
        return {"batches_done": 0 if progress is None or progress.is_last_batch else progress.current.completed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next epoch go on where the interrupted one stopped."""
        self._done = int(state_dict["batches_done"])

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return validation batches, in order."""
        return self._loader(TensorBatches(self.split("val"), self.mean, self.std))

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return test batches, in order."""
        return self._loader(TensorBatches(self.split("test"), self.mean, self.std))

    def _loader(self, batches: TensorBatches, sampler: EpochShuffle | None = None) -> DataLoader[Any]:
        return DataLoader(
            batches,
            batch_size=self.batch_size,
            sampler=sampler,
            collate_fn=_same,
            num_workers=0,  # a batch takes about a millisecond; a worker process would cost more than it saves
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each pass draws from, and so changes, torch's global generator
        )

    def example_input(self, n: int = 2) -> Tensor:
        """Return the first n training images, normalised, not augmented: (n, C, H, W) float32."""
        return normalise(self.split("train").images[:n], self.mean, self.std)

    def calibration_batches(self, count: int, batch_size: int | None = None) -> list[Tensor]:
        """Return the first `count` batches of the training images in a fixed random order, not augmented.

        Args:
            count: number of batches; where the training images end first, there are fewer and the last is smaller.
            batch_size: images a batch; `self.batch_size` by default.

        Returns:
            Tensors (batch_size, C, H, W), float32. They depend on neither the seed nor the epoch.
        """
        require_integer("calibration_batches.count", count, least=1)
        size = self.batch_size if batch_size is None else batch_size
        require_integer("calibration_batches.batch_size", size, least=1)
        images = self.split("train").images
        order = torch.randperm(len(images), generator=_generator(SPLIT_SEED))[: count * size]
        return [normalise(images[index], self.mean, self.std) for index in order.split(size)]

    def test_tensors(self) -> tuple[Tensor, Tensor]:
        """Return the whole test set: inputs (N, C, H, W) float32, normalised, and labels (N,) int64."""
        images, labels = self.split("test")
        return normalise(images, self.mean, self.std), labels

    def describe(self) -> dict[str, Any]:
        """What a deployed network must know of its inputs, as plain data: shape, normalisation, class names."""
        return {
            "name": self.name,
            "input_shape": [self.channels, self.image_size, self.image_size],
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "classes": list(self.class_names),
        }

    def checksum(self) -> str:
        """Return the SHA-256 (hexadecimal) of the raw pixels and labels of the train, val and test splits."""
        digest = hashlib.sha256()
        for key in ("train", "val", "test"):
            for tensor in self.split(key):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()
