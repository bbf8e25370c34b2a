"""Rows of a study: results.csv, tables of means and deviations, and where a README shows them."""

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.speed.machine import machine
from qat.analysis import plots
from qat.analysis.summary import MISSING, is_share

if TYPE_CHECKING:
    from experiments.study import Study

Row = dict[str, Any]
START, END = "<!-- written by the command: -->", "<!-- up to here -->"
NAMES = {
    "digits": "digits, small CNN",
    "fashion": "Fashion-MNIST, MLP",
    "text": "Tiny Shakespeare, character GPT",
    "digits_full": "digits, small CNN",
    "fashion_full": "Fashion-MNIST, ResNet-20",
    "text_full": "Tiny Shakespeare, character GPT",
}


def values(rows: Iterable[Row], column: str) -> list[float]:
    """A column as people read it: shares in percent, sizes in KB."""
    found = [row for row in rows if row.get(column) not in (None, "")]
    if column.endswith("_bytes"):
        return [float(row[column]) / 1000 for row in found]
    return [float(row[column]) * (100 if is_share(row["metric"]) else 1) for row in found]


def mean(rows: Iterable[Row], column: str) -> float:
    """The mean over seeds."""
    return statistics.fmean(values(rows, column))


def deviation(rows: Iterable[Row], column: str) -> float:
    """The standard deviation over seeds (of a sample); nought for one seed."""
    found = values(rows, column)
    return statistics.stdev(found) if len(found) > 1 else 0.0


def text(rows: Sequence[Row], column: str) -> str:
    """`97.5 ± 0.3`; a size, or what one seed gave, without a deviation."""
    if not (found := values(rows, column)):
        return MISSING
    if column.endswith("_bytes"):
        return f"{mean(rows, column):.1f}"
    digits = 1 if is_share(rows[0]["metric"]) else 3
    spread = f" ± {deviation(rows, column):.{digits}f}" if len(found) > 1 else ""
    return f"{mean(rows, column):.{digits}f}{spread}"


def where(rows: Iterable[Row], **equal: object) -> list[Row]:
    """The rows whose columns have these values (compared as text: rows may come from a CSV file)."""
    return [row for row in rows if all(str(row[key]) == str(value) for key, value in equal.items())]


def distinct(rows: Iterable[Row], column: str) -> list[Any]:
    """The values of a column, in order of appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *lines))


def by_case(rows: Sequence[Row], columns: dict[str, str], measured: dict[str, str]) -> str:
    """A table with a line for each different set of `columns`.

    Args:
        rows: of one set of data.
        columns: column -> heading: what tells cases apart.
        measured: column -> heading: means and deviations over seeds.
    """
    keys = list(dict.fromkeys(tuple(row[name] for name in columns) for row in rows))
    lines = []
    for key in keys:
        same = where(rows, **dict(zip(columns, key, strict=True)))
        lines.append([*map(str, key), *(text(same, name) for name in measured)])
    return markdown([*columns.values(), *measured.values()], lines)


def each_data(rows: Sequence[Row], table: Callable[[list[Row]], str]) -> str:
    """A table a set of data, under its name, the accuracy in float and what the numbers are."""
    parts = []
    for data in distinct(rows, "data"):
        own = where(rows, data=data)
        metric = own[0]["metric"].replace("_", " ")
        unit = " in %" if is_share(own[0]["metric"]) else ""
        parts.append(f"**{NAMES[data]}**: {metric}{unit}; float {text(_one_a_seed(own), 'float')}.\n\n{table(own)}")
    return "\n\n".join(parts)


def _one_a_seed(rows: Sequence[Row]) -> list[Row]:
    """One row for each different float network: for each seed, or one where all seeds start from the same."""
    found = {row["seed"]: row for row in rows}
    return list(found.values()) if len({row["float"] for row in rows}) > 1 else list(found.values())[:1]


def publish(study: "Study", rows: Sequence[Row], folder: Path, size: str, float_seconds: float) -> None:
    """Write results.csv and plot.svg into a study's folder, and its README's table."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plots.save(study.plot(rows), folder / "plot.svg")
    seconds = float_seconds + sum(row["cpu_seconds"] for row in rows)
    facts = machine()
    seeds = len(distinct(rows, "seed"))
    spread = f"{seeds} seeds, mean ± standard deviation over them" if seeds > 1 else "one seed"
    ran = (
        f"Size `{size}`: {len(rows)} runs, {spread}; {seconds / 60:.0f} minutes of one core in all "
        f"({facts['processor']}, torch {facts['torch']})."
    )
    block = f"{ran}\n\n{study.tables(rows)}"
    readme = folder / "README.md"
    if readme.is_file():
        readme.write_text(with_block(readme.read_text(encoding="utf-8"), block), encoding="utf-8")


def with_block(page: str, block: str) -> str:
    """A page with what stands between START and END replaced.

    Raises:
        ValueError: the page does not have each of them once, in this order.
    """
    before, found, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (found and end) or START in after or END in after:
        raise ValueError(f"the README needs one line {START!r} and behind it one line {END!r}")
    return f"{before}{START}\n\n{block}\n\n{END}{after}"
