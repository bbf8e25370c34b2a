"""Text as characters, held whole in memory, as a Lightning data module."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from qat.zoo.loading import SPLIT_SEED, InMemoryData, generator, require, require_integer

SOURCE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
"""Where the text that data=tiny_shakespeare is named after can be downloaded (1.1 MB, public domain)."""


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text, side by side, each with the characters that follow: position t's target is character t + 1.

    Args:
        text: indices of characters (L,).
        context: characters of a window.
        seed: of a shift of all windows that is drawn once an epoch, so that each epoch cuts at other places; None
            always cuts at the multiples of `context`.
    """

    def __init__(self, text: Tensor, context: int, seed: int | None = None) -> None:
        self.text, self.context, self.seed = text, context, seed
        self.start_epoch(0)

    def start_epoch(self, epoch: int, done: int = 0, batch_size: int = 1) -> None:
        """Draw the shift of epoch `epoch`; it is the same for all its batches."""
        drawn = None if self.seed is None else torch.randint(self.context, (), generator=generator(self.seed, epoch))
        self.shift = 0 if drawn is None else int(drawn)

    def __len__(self) -> int:
        room = len(self.text) - 1 if self.seed is None else len(self.text) - self.context
        return room // self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, both (len(indices), context) int64."""
        starts = torch.tensor(indices) * self.context + self.shift
        positions = starts[:, None] + torch.arange(self.context)
        return self.text[positions].long(), self.text[positions + 1].long()


class Characters(InMemoryData):
    """A text file, cut by position into training, validation and test text; a class is a character.

    Attributes `num_classes`, `class_names` (the characters, in order of their code points) and `name` describe the
    data.

    Args:
        name: what reports call the data set.
        path: a text file (UTF-8), or a folder with `input.txt`; relative to the current directory.
        num_classes: different characters in the file.
        context: characters of a window.
        val_share: share of the text, behind the training text, for validation.
        test_share: share of the text, at its end, for the test.
        batch_size: windows a batch (and a process), in training and in evaluation.
        seed: determines order and where windows begin, never the splits.

    Raises:
        FileNotFoundError: (from `setup`) no path, or nothing there; says where to get the file.
        ValueError: an argument is not valid, or (from `setup`) the text is not what the arguments say.
    """

    def __init__(
        self,
        *,
        name: str,
        path: str | None,
        num_classes: int,
        context: int = 64,
        val_share: float = 0.05,
        test_share: float = 0.05,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__(name=name, batch_size=batch_size, seed=seed)
        require_integer("num_classes", num_classes, least=2)
        require_integer("context", context, least=1)
        for field, share in {"val_share": val_share, "test_share": test_share}.items():
            require(0 < share < 0.5, field, share, "give a number above 0 and below 0.5")
        self.path, self.num_classes, self.context = path, num_classes, context
        self.val_share, self.test_share = val_share, test_share
        self.class_names = [str(index) for index in range(num_classes)]
        self._texts: dict[str, Tensor] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read the file, whatever the stage; free of cost when called again."""
        if self._texts:
            return
        file = self._file()
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"data.path={self.path!r} ({file}) is not text in UTF-8: {error}") from error
        characters = sorted(set(text))
        wanted = f"{file} holds {len(characters)} different characters; give data.num_classes={len(characters)}"
        require(len(characters) == self.num_classes, "num_classes", self.num_classes, wanted)
        index = {character: i for i, character in enumerate(characters)}
        indices = torch.tensor([index[character] for character in text], dtype=torch.int32)
        val, test = (int(len(text) * share) for share in (self.val_share, self.test_share))
        train = len(text) - val - test
        for key, length in {"training": train - self.context, "validation": val - 1, "test": test - 1}.items():
            wanted = f"{file} has {len(text):,} characters, and the {key} text is shorter than one window"
            require(length >= self.context, "context", self.context, wanted)
        self.class_names = characters
        self._texts = dict(zip(("train", "val", "test"), indices.split([train, val, test]), strict=True))

    def _file(self) -> Path:
        get = f"download {SOURCE} and give data.path=FILE, or a folder that holds it as input.txt"
        if self.path is None:
            raise FileNotFoundError(f"data.path=None: {self.name} is read from a file; {get}")
        path = Path(self.path).expanduser()
        file = path / "input.txt" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"data.path={self.path!r}: there is no file {file.absolute()}; {get}")
        return file

    def text(self, key: str) -> Tensor:
        """Return the text of "train", "val" or "test" as indices of characters, reading it where needed."""
        self.setup()
        return self._texts[key]

    def decode(self, indices: Tensor) -> str:
        """The characters behind indices (any shape, read in order)."""
        self.setup()
        return "".join(self.class_names[i] for i in indices.flatten().tolist())

    def batches(self, key: str, rank: int | None = None) -> Windows:
        """Windows of a split; those of all training processes are shifted together, so that none overlap."""
        return Windows(self.text(key), self.context, None if rank is None else self.seed)

    def example_input(self, n: int = 2) -> Tensor:
        """Return the first n training windows: (n, context) int64."""
        return self.batches("train").__getitems__(list(range(n)))[0]

    def calibration_batches(self, count: int, batch_size: int | None = None) -> list[Tensor]:
        """Return `count` batches of training windows, a fixed random choice.

        Args:
            count: number of batches; where the training text ends first, there are fewer and the last is smaller.
            batch_size: windows a batch; `self.batch_size` by default.

        Returns:
            Tensors (batch_size, context), int64. They depend on neither the seed nor the epoch.
        """
        require_integer("calibration_batches.count", count, least=1)
        size = self.batch_size if batch_size is None else batch_size
        require_integer("calibration_batches.batch_size", size, least=1)
        windows = self.batches("train")
        order = torch.randperm(len(windows), generator=generator(SPLIT_SEED))[: count * size]
        return [windows.__getitems__(part.tolist())[0] for part in order.split(size)]

    def test_tensors(self) -> tuple[Tensor, Tensor]:
        """Return the whole test text as windows: inputs and targets, both (N, context) int64."""
        windows = self.batches("test")
        return windows.__getitems__(list(range(len(windows))))

    def describe(self) -> dict[str, Any]:
        """What a deployed network must know of its inputs, as plain data: shape, and the character of each index."""
        self.setup()
        return {"name": self.name, "input_shape": [self.context], "classes": list(self.class_names)}

    def checksum(self) -> str:
        """Return the SHA-256 (hexadecimal) of the indices of the train, val and test texts."""
        digest = hashlib.sha256()
        for key in ("train", "val", "test"):
            text = self.text(key)
            digest.update(f"{key} {text.dtype} {tuple(text.shape)}".encode())
            digest.update(text.contiguous().numpy().tobytes())
        return digest.hexdigest()
