import io
import itertools
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from qat.zoo.data import Digits, ImageParquet
from qat.zoo.tensor_data import Split, TensorBatches, TensorDataModule, crop_and_flip, normalise

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the data sets are in {SHARED.name}/, not here")

COMMON = {"name": "tiny", "channels": 1, "image_size": 8, "num_classes": 2, "mean": [0.5], "std": [0.25]}


def from_config(name: str, **overrides: Any) -> TensorDataModule:
    config = yaml.safe_load((REPOSITORY / "conf" / "data" / f"{name}.yaml").read_text()) | {"seed": 0} | overrides
    return pkgutil.resolve_name(config.pop("_target_"))(**config)


class Counting(TensorDataModule):
    """Image i has the constant value i (uint8) and label i % 2: a batch tells which images are in it."""

    loads = 0

    def load(self) -> dict[str, Split]:
        self.loads += 1
        images = torch.arange(60, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
        labels = torch.arange(60) % 2
        parts = {"train": slice(0, 40), "val": slice(40, 50), "test": slice(50, 60)}
        return {key: Split(images[part], labels[part]) for key, part in parts.items()}


def counting(**overrides: Any) -> Counting:
    return Counting(**(COMMON | {"mean": [0.0], "std": [1.0], "batch_size": 16} | overrides))


def numbers(inputs: Tensor) -> list[int]:
    """Which images of `Counting` a batch holds."""
    return (inputs.amax((1, 2, 3)) * 255).round().int().tolist()


def order(loader: Any) -> list[int]:
    return [i for inputs, _ in loader for i in numbers(inputs)]


# ----------------------------------------------------------------------------------------------- pure functions


def test_crop_and_flip_equals_a_loop_over_images() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 6, 5), generator=generator, dtype=torch.uint8)
    top, left = torch.randint(7, (2, 32), generator=generator)
    flip = torch.rand(32, generator=generator) < 0.5
    result = crop_and_flip(images, top, left, flip, padding=3)
    for i in range(32):
        padded = np.pad(images[i].numpy(), ((0, 0), (3, 3), (3, 3)))
        window = padded[:, top[i] : top[i] + 6, left[i] : left[i] + 5]
        assert np.array_equal(result[i].numpy(), window[:, :, ::-1] if flip[i] else window)
    assert result.dtype == torch.uint8


def test_normalise_uint8_and_float_agree() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    mean, std = torch.tensor([0.5, 0.1, 0.5]), torch.tensor([0.25, 0.1, 0.5])
    expected = torch.tensor([-2.0, 1.0, 1.0])
    assert torch.allclose(normalise(images, mean, std).flatten(), expected)
    assert torch.allclose(normalise(images / 255, mean, std).flatten(), expected)
    assert normalise(images.double() / 255, mean, std).dtype == torch.float32


def test_batches_apply_the_numbers_they_draw() -> None:
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    batches = TensorBatches(Split(images, torch.arange(50)), torch.zeros(3), torch.ones(3), 2, True, seed=(5,))
    inputs, labels = batches.__getitems__([7, 3, 3, 49])
    assert labels.tolist() == [7, 3, 3, 49]
    batches.start_epoch(0)
    top, left = torch.randint(5, (2, 4), generator=batches.generator)
    flip = torch.rand(4, generator=batches.generator) < 0.5
    expected = crop_and_flip(images[[7, 3, 3, 49]], top, left, flip, 2)
    assert torch.equal(inputs, expected / 255)


def test_crop_reaches_every_window_and_flips_half() -> None:
    # One lit pixel in the middle: where it lands tells the shift, two lit pixels side by side tell the mirror.
    images = torch.zeros(4000, 1, 9, 9, dtype=torch.uint8)
    images[:, :, 4, 4], images[:, :, 4, 5] = 255, 100
    split = Split(images, torch.zeros(4000, dtype=torch.long))
    batch, _ = TensorBatches(split, torch.zeros(1), torch.ones(1), 2, True).__getitems__(list(range(4000)))
    where = (batch == 1).nonzero()
    assert sorted(set(where[:, 2].tolist())) == [2, 3, 4, 5, 6]
    right_is_dim = torch.tensor([batch[i, 0, y, x + 1] > 0 for i, _, y, x in where.tolist()])
    assert 0.45 < right_is_dim.float().mean() < 0.55
    unflipped, _ = TensorBatches(split, torch.zeros(1), torch.ones(1), 2, False).__getitems__(list(range(100)))
    assert all(unflipped[i, 0, y, x + 1] > 0 for i, _, y, x in (unflipped == 1).nonzero().tolist())


# --------------------------------------------------------------------------------------------------- data module


def test_batches_are_ready_and_cover_the_split_once() -> None:
    data = counting()
    batches = list(data.train_dataloader())
    assert [len(inputs) for inputs, _ in batches] == [16, 16, 8]
    inputs, labels = batches[0]
    assert (inputs.dtype, inputs.shape[1:], labels.dtype) == (torch.float32, (1, 8, 8), torch.int64)
    assert labels.tolist() == [i % 2 for i in numbers(inputs)]
    assert sorted(order(batches)) == list(range(40))
    assert order(batches) != list(range(40))
    assert order(data.val_dataloader()) == list(range(40, 50))
    assert order(data.test_dataloader()) == list(range(50, 60))


def test_order_is_fixed_by_seed_and_differs_between_epochs_and_seeds() -> None:
    loader, again, other = (counting(seed=seed).train_dataloader() for seed in (1, 1, 2))
    first, second = order(loader), order(loader)
    assert [order(again), order(again)] == [first, second]
    assert first != second
    assert order(other) not in (first, second)


def test_augmentation_is_fixed_by_seed_and_differs_between_epochs_and_seeds() -> None:
    def epochs(seed: int) -> list[Tensor]:
        loader = counting(seed=seed, crop_padding=3, flip=True).train_dataloader()
        # In the order of the images, so that only the augmentation can differ.
        passes = [torch.cat([inputs for inputs, _ in loader]) for _ in range(2)]
        return [x[torch.tensor(numbers(x)).argsort()] for x in passes]

    first, second = epochs(0)
    assert all(torch.equal(a, b) for a, b in zip(epochs(0), (first, second), strict=True))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(1)[0])
    assert first.eq(0).any(dim=1).any()  # image i > 0 is constant: zeros are padding


def test_evaluation_is_not_augmented() -> None:
    data = counting(crop_padding=3, flip=True)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert all(inputs.amin() > 0 for inputs, _ in loader)


def test_iterating_leaves_the_global_generator_alone() -> None:
    data = counting(crop_padding=1, flip=True)
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    data.calibration_batches(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_setup_loads_once() -> None:
    data = counting()
    for stage in ("fit", "validate", "test"):
        data.prepare_data()
        data.setup(stage)
    assert data.loads == 1


def test_example_and_test_tensors_are_normalised_and_not_augmented() -> None:
    data = counting(mean=[0.1], std=[0.5], crop_padding=3, flip=True)
    assert torch.allclose(data.example_input(3)[:, 0, 0, 0], (torch.arange(3) / 255 - 0.1) / 0.5)
    assert data.example_input().shape == (2, 1, 8, 8)
    inputs, labels = data.test_tensors()
    assert torch.allclose(inputs[:, 0, 7, 7], (torch.arange(50, 60) / 255 - 0.1) / 0.5)
    assert labels.tolist() == [0, 1] * 5


def test_calibration_batches_are_fixed_training_images() -> None:
    batches = counting(seed=1, crop_padding=3, flip=True).calibration_batches(2, batch_size=6)
    again = counting(seed=2).calibration_batches(2, batch_size=6)
    assert [tuple(b.shape) for b in batches] == [(6, 1, 8, 8)] * 2
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))
    chosen = [i for b in batches for i in numbers(b)]
    assert len(set(chosen)) == 12
    assert max(chosen) < 40  # training images
    assert chosen != sorted(chosen)
    assert [len(b) for b in counting().calibration_batches(99)] == [16, 16, 8]


def test_checksum_depends_on_pixels_labels_and_nothing_else() -> None:
    data, same = counting(), counting(seed=3, batch_size=5, mean=[0.3])
    assert data.checksum() == same.checksum()
    assert len(data.checksum()) == 64
    same.split("val").images[0, 0, 0, 0] += 1
    assert data.checksum() != same.checksum()
    relabelled = counting()
    relabelled.split("test").labels[0] = 1
    assert data.checksum() != relabelled.checksum()


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen.append(batch[0].clone())
        return self.weight * batch[0].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path: Path, max_epochs: int, ckpt_path: Path | None = None) -> tuple[Trainer, list[Tensor]]:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=max_epochs, accelerator="cpu", default_root_dir=tmp_path, enable_checkpointing=False, **quiet
    )
    module = Recorder()
    trainer.fit(module, datamodule=counting(crop_padding=2, flip=True), ckpt_path=ckpt_path)
    return trainer, module.seen


def test_a_resumed_run_sees_what_an_unbroken_run_sees(tmp_path: Path) -> None:
    _, unbroken = fit(tmp_path, max_epochs=3)
    trainer, first = fit(tmp_path, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    _, rest = fit(tmp_path, max_epochs=3, ckpt_path=tmp_path / "one.ckpt")
    assert len(unbroken) == 9
    assert all(torch.equal(a, b) for a, b in zip(unbroken, first + rest, strict=True))
    assert sorted(order([(x, None) for x in unbroken[3:6]])) == list(range(40))


def test_a_distributed_run_splits_each_epoch_among_its_processes() -> None:
    samplers = []
    for rank in range(2):
        sampler = counting(seed=4).train_dataloader().sampler
        samplers.append(DistributedSamplerWrapper(sampler, num_replicas=2, rank=rank, shuffle=True))
    for epoch in range(2):
        for sampler in samplers:
            sampler.set_epoch(epoch)
        halves = [list(sampler) for sampler in samplers]
        assert [len(half) for half in halves] == [20, 20]
        assert sorted(halves[0] + halves[1]) == list(range(40))


def test_processes_of_a_distributed_run_augment_differently() -> None:
    class Rank:
        def __init__(self, rank: int) -> None:
            self.global_rank, self.world_size = rank, 2

    batches = []
    for rank in (0, 1):
        data = counting(crop_padding=3)
        data.trainer = Rank(rank)  # type: ignore[assignment]
        batches.append(data.train_dataloader().dataset.__getitems__(list(range(40)))[0])
    assert not torch.equal(*batches)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0 .* at least 1"),
        ({"batch_size": 2.5}, r"data\.batch_size=2\.5 .* integer"),
        ({"crop_padding": -1}, r"data\.crop_padding=-1 .* at least 0"),
        ({"seed": None}, r"data\.seed=None .* at least 0"),
        ({"image_size": 0}, r"data\.image_size=0 .* at least 1"),
        ({"mean": [0.5, 0.5, 0.5]}, r"data\.mean=\[0\.5, 0\.5, 0\.5\] .* data\.channels=1"),
        ({"mean": 0.5}, r"data\.mean=0\.5 .* one number a channel"),
        ({"std": []}, r"data\.std=\[\] .* data\.channels=1"),
        ({"std": [0.0]}, r"data\.std=\[0\.0\] .* greater than 0"),
    ],
)
def test_bad_arguments_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counting(**overrides)


def test_data_that_contradict_the_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train images have shape \(1, 8, 8\).* \(1, 9, 9\)"):
        counting(image_size=9).setup()
    with pytest.raises(ValueError, match=r"data\.num_classes=1 .* labels 0 to 1"):
        counting(num_classes=1).setup()


# -------------------------------------------------------------------------------------------------------- digits


def test_digits_split_is_disjoint_complete_stratified_and_fixed() -> None:
    from sklearn.datasets import load_digits

    data, other = from_config("digits", seed=0), from_config("digits", seed=9)
    parts = {key: data.split(key) for key in ("train", "val", "test")}
    assert {key: len(part.labels) for key, part in parts.items()} == {"train": 1259, "val": 179, "test": 359}
    # No two of the 1,797 images are equal, so equal sets of images mean disjoint and complete.
    together = {image.numpy().tobytes() for part in parts.values() for image in part.images}
    original = {image.tobytes() for image in (load_digits().images / 16).astype(np.float32)}
    assert len(original) == 1797
    assert together == original
    whole = np.bincount(load_digits().target) / 1797
    for part in parts.values():
        assert np.abs(part.labels.bincount().numpy() / len(part.labels) - whole).max() < 0.005
    assert data.checksum() == other.checksum()


def test_digits_are_normalised() -> None:
    data = from_config("digits")
    assert isinstance(data, Digits)
    inputs = torch.cat(data.calibration_batches(100))
    assert len(inputs) == 1259
    assert abs(inputs.mean().item()) < 0.01
    assert inputs.std().item() == pytest.approx(1, abs=0.01)
    assert data.class_names == list("0123456789")


# ------------------------------------------------------------------------------------------------------- parquet


def encoded(pixels: np.ndarray) -> dict[str, Any]:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def picture(number: int, size: int = 8, channels: int = 1) -> np.ndarray:
    """Its first pixels spell the number, the others count up."""
    pixels = np.arange(size * size * channels).reshape(size, size, channels).astype(np.uint8)
    pixels[0, 0], pixels[0, 1] = number % 256, number // 256
    return pixels.squeeze()


def write(
    folder: Path,
    name: str,
    count: int,
    first: int = 0,
    names: list[str] | None = None,
    channels: int = 1,
    **change: Any,
) -> Path:
    """Write `count` images with alternating labels; `change` maps row to image, or names columns."""
    import datasets

    images = [change.get(f"row{i}", encoded(picture(first + i, channels=channels))) for i in range(count)]
    labels = change.get("labels", [(first + i) % 2 for i in range(count)])
    columns = {change.get("image_column", "image"): images, "label": labels}
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({next(iter(columns)): datasets.Image(decode=False), "label": label})
    folder.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / name)
    return folder


def tiny(folder: Path | str | None, **overrides: Any) -> ImageParquet:
    path = None if folder is None else str(folder)
    return ImageParquet(**(COMMON | {"path": path, "val_size": 6, "batch_size": 4} | overrides))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "tiny", "train.parquet", 20)
    return write(tmp_path / "tiny", "test.parquet", 5, first=100)


def ids(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0].int() + 256 * images[:, 0, 0, 1].int()).tolist()


def test_parquet_images_labels_and_split(folder: Path) -> None:
    data = tiny(folder)
    train, val, test = (data.split(key) for key in ("train", "val", "test"))
    assert train.images.dtype == torch.uint8
    assert ids(test.images) == [100, 101, 102, 103, 104]
    assert np.array_equal(test.images[3, 0].numpy(), picture(103))
    assert sorted(ids(train.images) + ids(val.images)) == list(range(20))
    assert val.labels.bincount().tolist() == [3, 3]
    for split in (train, val, test):
        assert split.labels.tolist() == [i % 2 for i in ids(split.images)]
    assert data.class_names == ["0", "1"]
    assert tiny(folder, seed=7).checksum() == data.checksum()


def test_parquet_colour_images_keep_their_channels(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", 8, channels=3)
    write(tmp_path, "test.parquet", 2, channels=3)
    data = tiny(tmp_path, channels=3, mean=[0.5] * 3, std=[0.5] * 3, val_size=2)
    assert np.array_equal(data.split("test").images[1].numpy(), picture(1, channels=3).transpose(2, 0, 1))


def test_parquet_shards_in_order_and_other_files_ignored(tmp_path: Path) -> None:
    write(tmp_path, "train-00001-of-00002.parquet", 6, first=300)
    write(tmp_path, "train-00000-of-00002.parquet", 6, first=290)
    write(tmp_path, "train_first4000_lossless.parquet", 4, first=900)
    write(tmp_path, "test-00001-of-00002.parquet", 3, first=30)
    write(tmp_path, "test-00000-of-00002.parquet", 3, first=20)
    data = tiny(tmp_path, val_size=2)
    both = sorted(ids(data.split("train").images) + ids(data.split("val").images))
    assert both == [*range(290, 296), *range(300, 306)]
    assert ids(data.split("test").images) == [20, 21, 22, 30, 31, 32]


def test_parquet_class_names_come_from_the_files(tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", 12, names=["cat", "dog"])
    write(tmp_path, "test.parquet", 2, names=["cat", "dog"])
    data = tiny(tmp_path)
    data.setup()
    assert data.class_names == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"data\.num_classes=3 .* names 2 classes: cat, dog"):
        tiny(tmp_path, num_classes=3).setup()


def test_parquet_limit_shortens_training_only(folder: Path) -> None:
    whole, short = tiny(folder), tiny(folder, limit=4)
    assert torch.equal(short.split("train").images, whole.split("train").images[:4])
    for key in ("val", "test"):
        assert torch.equal(short.split(key).images, whole.split(key).images)
    assert len(tiny(folder, limit=1000).split("train").labels) == 14


def test_parquet_relative_path_and_second_setup(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    data = tiny("tiny")
    data.setup("fit")
    (folder / "train.parquet").unlink()
    data.prepare_data()
    data.setup("test")  # nothing is read again
    assert len(data.split("train").labels) == 14


def hub(folder: Path) -> Callable[[str], Any]:
    import datasets

    def load_dataset(name: str) -> Any:
        assert name == "someone/tiny"
        files = {key: str(folder / f"{key}.parquet") for key in ("train", "test")}
        parts = {key: datasets.Dataset.from_parquet(file, cache_dir=str(folder)) for key, file in files.items()}
        return datasets.DatasetDict(parts)

    return load_dataset


def test_the_hub_gives_the_same_tensors_as_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "train.parquet", 20, names=["cat", "dog"])
    write(tmp_path, "test.parquet", 5, names=["cat", "dog"])
    monkeypatch.setattr("datasets.load_dataset", hub(tmp_path))
    data = tiny(None, hub_name="someone/tiny")
    data.prepare_data()
    assert data.checksum() == tiny(tmp_path).checksum()
    assert data.class_names == ["cat", "dog"]


def test_no_path_and_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data\.path=None and data\.hub_name=None"):
        tiny(None)

    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match=r"data\.hub_name='someone/tiny' .* reach .* data\.path=DIR"):
        tiny(None, hub_name="someone/tiny").prepare_data()


def test_hub_data_set_without_a_test_split(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = hub(folder)
    monkeypatch.setattr("datasets.load_dataset", lambda name: {"train": load(name)["train"]})
    with pytest.raises(ValueError, match=r"data\.hub_name='someone/tiny' .* splits train, and train and test"):
        tiny(None, hub_name="someone/tiny").setup()


@pytest.mark.parametrize("package", ["datasets", "PIL"])
def test_missing_packages(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'qat\[data\]'"):
        tiny(folder).setup()


def test_path_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data\.path='.*nowhere' is not a directory"):
        tiny(tmp_path / "nowhere").setup()


def test_directory_without_parquet_files_lists_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither train\.parquet nor train-\*\.parquet; it holds: nothing"):
        tiny(tmp_path).setup()
    write(tmp_path, "train.parquet", 4)
    (tmp_path / "notes.txt").touch()
    message = r"neither test\.parquet nor test-\*\.parquet; it holds: notes\.txt, train\.parquet"
    with pytest.raises(FileNotFoundError, match=message):
        tiny(tmp_path).setup()


def test_wrong_columns(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"data\.image_column='img' .* columns image, label; .*data\.image_column=NAME"
    ):
        tiny(folder, image_column="img").setup()
    with pytest.raises(ValueError, match=r"data\.label_column='digit' .* image, label; .*data\.label_column=NAME"):
        tiny(folder, label_column="digit").setup()
    with pytest.raises(ValueError, match=r"data\.image_column='label' .* type int64 .* struct"):
        tiny(folder, image_column="label").setup()
    with pytest.raises(ValueError, match=r"data\.label_column='image' .* integers"):
        tiny(folder, label_column="image").setup()


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (encoded(picture(0, size=9)), r"mode L and size \(9, 9\)"),
        (encoded(picture(0, channels=3)), r"mode RGB and size \(8, 8\)"),
    ],
)
def test_image_of_another_size_or_mode(image: dict[str, Any], found: str, tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", 20)
    write(tmp_path, "test.parquet", 5, row3=image)
    with pytest.raises(ValueError, match=rf"row 3 of test .*{found}; data\.channels=1 and data\.image_size=8"):
        tiny(tmp_path).setup()


@pytest.mark.parametrize("data", [b"not an image", encoded(picture(0))["bytes"][:60], b""])
def test_bytes_that_do_not_decode(data: bytes, tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", 20, row13={"bytes": data, "path": None})
    write(tmp_path, "test.parquet", 5)
    with pytest.raises(ValueError, match=r"row 13 of train, column data\.image_column='image'"):
        tiny(tmp_path).setup()


@pytest.mark.parametrize("bad", [2, -1])
def test_label_outside_the_classes(bad: int, tmp_path: Path) -> None:
    write(tmp_path, "train.parquet", 20)
    write(tmp_path, "test.parquet", 5, labels=[0, 1, bad, 0, 1])
    with pytest.raises(ValueError, match=rf"data\.num_classes=2 .* test holds labels .*{bad}"):
        tiny(tmp_path).setup()


@pytest.mark.parametrize("size", [1, 19, 20, 5000])
def test_validation_split_that_cannot_be_made(size: int, folder: Path) -> None:
    with pytest.raises(ValueError, match=rf"data\.val_size={size} .* 20 training images"):
        tiny(folder, val_size=size).setup()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"channels": 2, "mean": [0, 0], "std": [1, 1]}, r"data\.channels=2 .* 1 \(grey\) or 3"),
        ({"val_size": 0}, r"data\.val_size=0 .* at least 1"),
        ({"limit": 0}, r"data\.limit=0 .* at least 1"),
    ],
)
def test_bad_parquet_arguments_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("anywhere", **overrides)


# ------------------------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("data", "model"),
    list(itertools.product(["digits", "mnist", "fashion_mnist", "cifar10"], ["small_cnn", "resnet20", "mlp"])),
)
def test_every_data_config_composes_with_every_model_config(data: str, model: str) -> None:
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    groups = {
        kind: OmegaConf.load(REPOSITORY / "conf" / kind / f"{name}.yaml")
        for kind, name in {"data": data, "model": model}.items()
    }
    config = OmegaConf.create({"seed": 3, **groups})
    module, net = instantiate(config.data), instantiate(config.model)
    assert (module.name, module.seed) == (data, 3)
    assert net(torch.zeros(2, module.channels, module.image_size, module.image_size)).shape == (2, 10)


@needs_shared
@pytest.mark.parametrize(("name", "limit", "first"), [("fashion_mnist", 300, "T - shirt / top"), ("mnist", 300, "0")])
def test_the_configs_read_the_hub_files(name: str, limit: int, first: str) -> None:
    data = from_config(name, path=str(SHARED / "data" / name), limit=limit)
    inputs, labels = data.test_tensors()
    assert inputs.shape == (10_000, 1, 28, 28)
    assert abs(inputs.mean().item()) < 0.02
    assert inputs.std().item() == pytest.approx(1, abs=0.02)
    assert (len(data.split("train").labels), len(data.split("val").labels)) == (limit, 5000)
    assert data.class_names[0] == first
    assert labels.bincount().min() > 800


@needs_shared
def test_cifar10_config_reads_the_hub_files() -> None:
    data = from_config("cifar10", path=str(SHARED / "data" / "cifar10"), limit=300)
    inputs, labels = data.test_tensors()
    assert inputs.shape == (10_000, 3, 32, 32)
    assert inputs.mean((0, 2, 3)).abs().max() < 0.03
    assert labels.bincount().tolist() == [1000] * 10
    assert data.split("val").labels.bincount().tolist() == [500] * 10
    assert data.class_names[:2] == ["airplane", "automobile"]
