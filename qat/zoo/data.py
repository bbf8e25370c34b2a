"""Image data sets as Lightning data modules: what the shipped `conf/data` files build."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from qat.zoo.loading import require, require_integer
from qat.zoo.tensor_data import Split, TensorDataModule, check_labels, stratified

if TYPE_CHECKING:
    import pyarrow as pa

PIL_MODES = {1: "L", 3: "RGB"}
_DECODED: dict[tuple[Any, ...], dict[str, Tensor]] = {}
"""The images that were decoded last: jobs of a sweep that run in one process decode them once."""


class Digits(TensorDataModule):
    """scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, 17 levels, no download.

    A fixed stratified split: 20 % test, 10 % validation, the rest for training. Arguments are `TensorDataModule`'s.
    """

    def load(self) -> dict[str, Split]:
        """Return the three splits; pixels are float32, k/16."""
        from sklearn.datasets import load_digits

        data = load_digits()
        images = torch.from_numpy(data.images).float()[:, None] / 16
        labels = torch.from_numpy(data.target).long()
        rest, test = stratified(labels, len(labels) * 20 // 100, "test_size")
        train, val = stratified(labels[rest], len(labels) * 10 // 100, "val_size")
        rows = {"train": rest[train], "val": rest[val], "test": test}
        return {key: Split(images[index], labels[index]) for key, index in rows.items()}


class ImageParquet(TensorDataModule):
    """Encoded images and labels in parquet files, as the Hugging Face hub has them; decoded once, into uint8.

    Args:
        path: a directory with `train.parquet` and `test.parquet`, or shards `train-*.parquet` and `test-*.parquet`;
            relative to the current directory. None loads `hub_name`.
        hub_name: a data set of the Hugging Face hub with the splits train and test.
        image_column: column of encoded images (a struct with a field `bytes`).
        label_column: column of integer labels.
        val_size: training images set apart for validation, a fixed stratified choice.
        limit: only the first this many of the remaining training images; None for all.
        **common: `TensorDataModule`'s arguments.

    Raises:
        FileNotFoundError: (from `setup`) no such directory, files missing in it, or the hub cannot be reached.
        ImportError: (from `setup`) the packages `datasets` or PIL are missing.
        ValueError: an argument is not valid, or (from `setup`) the data are not what the arguments say.
    """

    def __init__(
        self,
        *,
        path: str | None = None,
        hub_name: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        val_size: int = 5000,
        limit: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if path is None and hub_name is None:
            raise ValueError("data.path=None and data.hub_name=None: give data.path=DIR or data.hub_name=OWNER/NAME")
        require(self.channels in PIL_MODES, "channels", self.channels, "give 1 (grey) or 3 (RGB)")
        require_integer("val_size", val_size, least=1)
        if limit is not None:
            require_integer("limit", limit, least=1)
        self.path, self.hub_name = path, hub_name
        self.image_column, self.label_column = image_column, label_column
        self.val_size, self.limit = val_size, limit

    def prepare_data(self) -> None:
        """Without a path, download `hub_name` into the cache of `datasets`. Lightning asks one process."""
        if self.path is None and not self._splits:
            self._hub_tables()

    def load(self) -> dict[str, Split]:
        """Return the three splits; decodes only the images that are kept."""
        tables = self._hub_tables() if self.path is None else self._local_tables(Path(self.path).expanduser())
        labels = {key: self._labels(key, table) for key, table in tables.items()}
        self._name_classes(tables["train"])
        rest, val = stratified(labels["train"], self.val_size, "val_size")
        rows = {"train": rest[: self.limit], "val": val, "test": torch.arange(len(labels["test"]))}
        sources = {"train": "train", "val": "train", "test": "test"}
        known = self._fingerprint()
        if known not in _DECODED:
            images = {key: self._decode(tables[sources[key]], sources[key], index) for key, index in rows.items()}
            _DECODED.clear()
            _DECODED[known] = images
        images = _DECODED.pop(known) if self.path is None else _DECODED[known]
        return {key: Split(images[key], labels[sources[key]][index]) for key, index in rows.items()}

    def _fingerprint(self) -> tuple[Any, ...]:
        """What the decoded images depend on: the files as they are now, and the settings that choose among them."""
        files = sorted(Path(self.path).expanduser().glob("*.parquet")) if self.path is not None else []
        stats = [(str(file.resolve()), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
        chosen = (self.image_column, self.label_column, self.channels, self.image_size, self.val_size, self.limit)
        return (*stats, *chosen)

    def _local_tables(self, folder: Path) -> dict[str, "pa.Table"]:
        _import_datasets()
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not folder.is_dir():
            raise FileNotFoundError(
                f"data.path={self.path!r} is not a directory ({folder.absolute()}): "
                "give one with train.parquet and test.parquet, or null to load data.hub_name"
            )
        found = sorted(file.name for file in folder.iterdir())
        tables = {}
        for key in ("train", "test"):
            names = [f"{key}.parquet"] if f"{key}.parquet" in found else []
            names = names or [name for name in found if re.fullmatch(rf"{key}-.*\.parquet", name)]
            if not names:
                raise FileNotFoundError(
                    f"data.path={self.path!r} holds neither {key}.parquet nor {key}-*.parquet; "
                    f"it holds: {', '.join(found) or 'nothing'}"
                )
            tables[key] = pa.concat_tables([pq.read_table(folder / name) for name in names])
        return tables

    def _hub_tables(self) -> dict[str, "pa.Table"]:
        datasets = _import_datasets()
        try:
            loaded = datasets.load_dataset(self.hub_name)
        except (OSError, ValueError) as error:  # a ConnectionError is an OSError
            raise FileNotFoundError(
                f"data.hub_name={self.hub_name!r} cannot be loaded ({error}); give data.path=DIR, "
                "a directory with train.parquet and test.parquet"
            ) from error
        missing = {"train", "test"} - set(loaded)
        wanted = f"it has the splits {', '.join(loaded)}, and train and test are needed"
        require(not missing, "hub_name", self.hub_name, wanted)
        # The metadata keep the class names, as in a parquet file of the hub.
        return {
            key: loaded[key].with_format("arrow")[:].cast(loaded[key].features.arrow_schema)
            for key in ("train", "test")
        }

    def _labels(self, key: str, table: "pa.Table") -> Tensor:
        """Check both columns and return the labels (N,), int64."""
        import pyarrow as pa

        for field, column in {"image_column": self.image_column, "label_column": self.label_column}.items():
            wanted = f"{key} has the columns {', '.join(table.column_names)}; give data.{field}=NAME with one of them"
            require(column in table.column_names, field, column, wanted)
        images, labels = table.column(self.image_column), table.column(self.label_column)
        encoded = pa.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0
        wanted = f"{key} has type {images.type} there, a struct with a field bytes is needed"
        require(encoded, "image_column", self.image_column, wanted)
        integral = pa.types.is_integer(labels.type) and labels.null_count == 0
        wanted = f"{key} has type {labels.type} and {labels.null_count} nulls there, integers without nulls are needed"
        require(integral, "label_column", self.label_column, wanted)
        tensor = torch.from_numpy(labels.to_numpy().astype(np.int64))
        require(len(tensor) > 0, "path" if self.path else "hub_name", self.path or self.hub_name, f"{key} has no rows")
        check_labels(tensor, self.num_classes, key)
        return tensor

    def _name_classes(self, table: "pa.Table") -> None:
        """Take the class names from the metadata that the hub's parquet files carry, where there are any."""
        names = getattr(_import_datasets().Features.from_arrow_schema(table.schema)[self.label_column], "names", None)
        if names is not None:
            wanted = f"the data set names {len(names)} classes: {', '.join(names)}"
            require(len(names) == self.num_classes, "num_classes", self.num_classes, wanted)
            self.class_names = list(names)

    def _decode(self, table: "pa.Table", key: str, rows: Tensor) -> Tensor:
        """Decode the images of `rows` into one uint8 tensor (len(rows), C, H, W)."""
        import pyarrow.compute as pc
        from PIL import Image
        from rich.progress import track

        mode, size = PIL_MODES[self.channels], (self.image_size, self.image_size)
        images = torch.empty(len(rows), *size, self.channels, dtype=torch.uint8)
        encoded = pc.struct_field(table.column(self.image_column), "bytes").take(rows.numpy())
        bars = track(
            zip(rows.tolist(), encoded, images.numpy(), strict=True),
            f"Decoding {self.name} {key}",
            total=len(rows),
            transient=True,
            disable=getattr(rank_zero_only, "rank", 0) != 0,
        )
        for row, scalar, pixels in bars:
            try:
                image = Image.open(io.BytesIO(scalar.as_py()))
                image.load()
            except Exception as error:  # Pillow raises many types for broken bytes
                raise ValueError(
                    f"row {row} of {key}, column data.image_column={self.image_column!r}, is not an image that Pillow "
                    f"can decode: {error}"
                ) from error
            if (image.mode, image.size) != (mode, size):
                raise ValueError(
                    f"row {row} of {key} is an image of mode {image.mode} and size {image.size}; data.channels="
                    f"{self.channels} and data.image_size={self.image_size} need mode {mode} and size {size}"
                )
            pixels[:] = np.asarray(image).reshape(pixels.shape)
        return images.permute(0, 3, 1, 2).contiguous()


def _import_datasets() -> Any:
    try:
        import datasets
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error}: image data sets need more packages, pip install 'qat[data]'") from error
    return datasets
