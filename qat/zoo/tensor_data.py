"""Image data held whole in memory, as Lightning data modules: augmentation, normalisation, calibration.

A batch is cut out of one tensor, augmented and normalised by a few tensor operations; no code runs once an image.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from qat.zoo.loading import SPLIT_SEED, InMemoryData, generator, require, require_integer


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
        self.generator = generator(*self.seed, epoch)
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


class TensorDataModule(InMemoryData):
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
        super().__init__(name=name, batch_size=batch_size, seed=seed)
        for field, number in {"channels": channels, "image_size": image_size, "num_classes": num_classes}.items():
            require_integer(field, number, least=1)
        for field, values in {"mean": mean, "std": std}.items():
            wanted = f"give one number a channel, and data.channels={channels}"
            require(isinstance(values, Sequence) and len(values) == channels, field, values, wanted)
        require(min(std) > 0, "std", std, "every number must be greater than 0")
        require_integer("crop_padding", crop_padding, least=0)
        self.channels, self.image_size, self.num_classes = channels, image_size, num_classes
        self.class_names = [str(label) for label in range(num_classes)]
        self.mean, self.std = (torch.tensor(list(values), dtype=torch.float32) for values in (mean, std))
        self.crop_padding, self.flip = crop_padding, flip
        self._splits: dict[str, Split] = {}

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

    def batches(self, key: str, rank: int | None = None) -> TensorBatches:
        """Batches of a split; with the rank of a training process, augmented as no other process does."""
        if rank is None:
            return TensorBatches(self.split(key), self.mean, self.std)
        seed = (self.seed, rank)
        return TensorBatches(self.split(key), self.mean, self.std, self.crop_padding, self.flip, seed=seed)

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
        order = torch.randperm(len(images), generator=generator(SPLIT_SEED))[: count * size]
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
