"""CSV logs that go on where a checkpoint was written."""

import csv
import os
from argparse import Namespace
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from qat.export.files import write_atomically


class CSVLogger(Logger):
    """One `metrics.csv`, a row a call, columns in alphabetical order.

    Lightning's own starts the file anew whenever it is opened. This one, told by `keep` how many rows a checkpoint
    counted, drops what was logged after it, so that an interrupted run has each row once.

    Args:
        save_dir, name, version: the file is `save_dir/name/version/metrics.csv`.
        flush_every: rows that are held in memory.
    """

    def __init__(self, save_dir: str, name: str = "csv", version: str = "", flush_every: int = 100) -> None:
        super().__init__()
        self._dir, self._name, self._version = save_dir, name, version
        self.path = Path(save_dir) / name / version / "metrics.csv"
        self.flush_every = flush_every
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self._written: int | None = None  # rows in the file; None before it is ours

    @property
    def name(self) -> str:  # noqa: D102
        return self._name

    @property
    def version(self) -> str:  # noqa: D102
        return self._version

    @property
    def save_dir(self) -> str:  # noqa: D102
        return self._dir

    @property
    def log_dir(self) -> str:
        """Folder of the file."""
        return str(self.path.parent)

    @property
    def rows(self) -> int:
        """Rows so far."""
        return (self._written or 0) + len(self._waiting)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory has the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row."""
        self._waiting.append({**metrics, "step": self.rows if step is None else step})
        if len(self._waiting) >= self.flush_every:
            self.save()

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Go on with the file that is there, behind its first `rows` rows."""
        found: list[dict[str, Any]] = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                found = [row for row, _ in zip(reader, range(rows), strict=False)]
                self._columns = list(reader.fieldnames or [])
        self._rewrite(found)

    @rank_zero_only
    def save(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        columns = sorted({*self._columns, *(key for row in self._waiting for key in row)})
        if self._written is None or columns != self._columns:
            old: list[dict[str, Any]] = []
            if self._written:
                with self.path.open(newline="", encoding="utf-8") as file:
                    old = list(csv.DictReader(file))
            self._columns = columns
            self._rewrite(old)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerows(self._waiting)
            file.flush()
            os.fsync(file.fileno())
        self._written, self._waiting = self.rows, []

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        text = StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue().encode())
        self._written = len(rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """At the end of a phase."""
        self.save()
