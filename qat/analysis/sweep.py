"""A Hydra multirun as one table and one plot."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qat.analysis import plots
from qat.analysis.console import heading, new_table
from qat.analysis.runs import status_of, summary_of
from qat.analysis.summary import (
    FILES,
    MISSING,
    STAGES,
    bytes_text,
    is_share,
    metric_text,
    number,
    pick_metric,
    stage_of,
    stages,
)

Row = dict[str, Any]

LONGEST = 60
"""Characters of a value that tables and plots show."""


def collect(sweep_dir: Path | str) -> list[Row]:
    """Read the jobs of a sweep.

    Args:
        sweep_dir: Hydra's sweep directory, with a numbered directory a job; each has `.hydra/overrides.yaml` and,
            when the job finished, `summary.json`.

    Returns:
        One dict a job, by number: "job", "overrides" (their keys), each override under its key, "weight_bits" and
        "activation_bits", `<stage>_<metric>` (float_accuracy, qat_accuracy, ...), `<stage>_bytes`, and "status",
        "finished", "failed", "pruned" or, without a readable summary, "unfinished". Keys without a value are missing.

    Raises:
        FileNotFoundError: there is no such directory, or it has no numbered directories.
    """
    folders = sorted((path for path in Path(sweep_dir).glob("*/") if path.name.isdecimal()), key=lambda p: int(p.name))
    if not folders:
        raise FileNotFoundError(f"'{sweep_dir}' has no job directories (0, 1, ...); give the directory of a multirun")
    return [_row(folder) for folder in folders]


def _row(folder: Path) -> Row:
    overrides = _overrides(folder / ".hydra" / "overrides.yaml")
    row: Row = {**overrides, "job": int(folder.name), "overrides": list(overrides)}
    summary = summary_of(folder) or {}
    config = {**overrides, **(summary.get("config") or {})}
    for name in ("weight", "activation"):
        if isinstance(bits := config.get(f"quant.{name}.bits"), int):
            row[f"{name}_bits"] = bits
    status = status_of(folder, summary or None)
    if not summary:
        return {**row, "status": status}
    found = stages(summary)
    row |= {f"{stage.key}_{metric}": value for stage in found for metric, value in stage.metrics.items()}
    row |= {f"{stage.key}_bytes": stage.size for stage in found if stage.size is not None}
    return {**row, "status": status}


def _overrides(path: Path) -> Row:
    """`["quant=w4a4", "+seed=1"]` -> {"quant": "w4a4", "seed": 1}."""
    import yaml

    if not path.is_file():
        return {}
    found: Row = {}
    for line in yaml.safe_load(path.read_text(encoding="utf-8")) or []:
        key, given, text = str(line).partition("=")
        found[key.lstrip("+~")] = number(text) if given else "removed"
    return found


def told_apart_by(rows: Sequence[Row]) -> list[str]:
    """Overrides that vary, without bit widths and without what is too long to read (rules, paths)."""
    names = varying(rows, override_names(rows))
    return [name for name in names if not is_bits(name) and max(len(str(row.get(name))) for row in rows) <= LONGEST]


def override_names(rows: Sequence[Row]) -> list[str]:
    """Columns that are overrides, in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row["overrides"]))


def measured_names(rows: Sequence[Row]) -> list[str]:
    """Columns that a summary gave: `<stage>_<metric>` and `<stage>_bytes`."""
    names = dict.fromkeys(key for row in rows for key in row if key not in row["overrides"])
    return [key for key in names if stage_of(key)]


def is_bits(name: str) -> bool:
    """Whether an override sets the bit width that "weight_bits" or "activation_bits" has."""
    return name in ("quant.weight.bits", "quant.activation.bits")


def varying(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The columns that differ between rows."""
    return [name for name in names if len({str(row.get(name)) for row in rows}) > 1]


def sweep_metric(rows: Sequence[Row]) -> str | None:
    """The metric to judge a sweep by (see `qat.analysis.summary.pick_metric`)."""
    names = dict.fromkeys(column[1] for key in measured_names(rows) if (column := stage_of(key)))
    return pick_metric(name for name in names if name != "bytes")


def results_table(rows: Sequence[Row]) -> Table:
    """A sweep in the terminal: one row a job, with the overrides that vary, the first metric of each stage, and size.

    Args:
        rows: from `collect`.
    """
    metric = sweep_metric(rows) or "metric"
    overrides = told_apart_by(rows)
    exported = next((key for key in FILES if any(f"{key}_bytes" in row for row in rows)), "int8")
    numbers = {"weight_bits": "weight\nbits", "activation_bits": "act.\nbits"}
    numbers |= {f"{key}_{metric}": STAGES[key] for key in ("float", "ptq", "qat")}
    numbers |= {f"{exported}_{metric}": exported, f"{exported}_bytes": f"{exported}\nsize"}
    finished = [row for row in rows if row["status"] == "finished"]
    shown = {key for key in numbers if any(key in row for row in rows)} - {"weight_bits", "activation_bits"}
    shown |= set(varying(finished, ["weight_bits", "activation_bits"]))
    numbers = {key: label for key, label in numbers.items() if key in shown}
    table = new_table(f"{len(rows)} jobs, {metric}{' in %' if is_share(metric) else ''}")
    table.add_column("Job", justify="right", no_wrap=True)
    for name in overrides:
        table.add_column(heading(name.rpartition(".")[2]), overflow="fold", min_width=6)
    for label in numbers.values():
        table.add_column(label, justify="right", no_wrap=True)
    if len(finished) < len(rows):
        table.add_column("Status", no_wrap=True)
    for row in rows:
        cells: list[RenderableType] = [str(row["job"]), *(Text(str(row.get(name, MISSING))) for name in overrides)]
        for key in numbers:
            value = row.get(key)
            if key.endswith("_bits"):
                cells.append(MISSING if value is None else str(value))
            elif key.endswith("_bytes"):
                cells.append(bytes_text(value))
            else:
                cells.append(metric_text(metric, value).removesuffix(" %"))
        if len(finished) < len(rows):
            cells.append(Text("" if row["status"] == "finished" else row["status"], style="bold red"))
        table.add_row(*cells)
    return table


def write_results(sweep_dir: Path | str) -> list[Path]:
    """Write `results.csv`, `sweep.png` and `sweep.svg` into a sweep's directory.

    Args:
        sweep_dir: as for `collect`.

    Returns:
        The paths of the three files.
    """
    from qat.analysis.sweep_plot import sweep_figure

    folder, rows = Path(sweep_dir), collect(sweep_dir)
    columns = ["job", *override_names(rows), "weight_bits", "activation_bits", *measured_names(rows), "status"]
    table = folder / "results.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(columns)), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    fig = sweep_figure(rows)
    return [table, plots.save(fig, folder / "sweep.png"), plots.save(fig, folder / "sweep.svg")]
