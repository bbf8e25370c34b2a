"""Print and write the leaderboard of any set of runs: single ones, sweeps, folders of both.

  python -m qat report multirun/DATE/TIME
  python -m qat report outputs multirun --out leaderboard

A table on the console; in the folder `leaderboard.html` (one file, opens offline), `leaderboard.csv` (a line a
configuration: mean and deviation over seeds) and `runs.csv` (a line a run). Runs of other data or another metric have a
table of their own.
"""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from qat.analysis import plots
from qat.analysis.console import new_table
from qat.analysis.leaderboard import (
    COSTS,
    Board,
    Entry,
    Group,
    boards,
    read_runs,
    short,
    text,
    write_csv,
    write_groups_csv,
)
from qat.analysis.page import Cell, Column, Table, number_cell, render, words_cell
from qat.analysis.search import study_figures
from qat.analysis.summary import (
    MISSING,
    STAGES,
    amount_text,
    bytes_text,
    is_share,
    lower_is_better,
    metric_text,
    time_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_LABELS = 9
"""So many points of a front have their names beside them."""
MOST_WORDS = 60
"""A longer name of a configuration is cut; beside a point, the third of it."""
MOST_COLUMNS = 3
"""So many settings fit on the console."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `report` takes on the command line."""
    parser.add_argument("folders", nargs="+", metavar="DIR", type=Path, help="run directories, or folders with runs")
    parser.add_argument("--out", metavar="DIR", type=Path, default=None,
                        help="where the files go (default: DIR where there is one, else ./leaderboard)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Print the tables and write the files.

    Raises:
        FileNotFoundError: no such folder, or no run in it.
    """
    entries = read_runs(args.folders)
    out = args.out or (args.folders[0] if len(args.folders) == 1 else Path("leaderboard"))
    figures, notes = zip(*(study_figures(folder) for folder in args.folders), strict=True)
    show(entries)
    written = write(entries, out, [one for some in figures for one in some], " ".join(filter(None, notes)))
    print("\n".join(map(str, written)))


def write(
    entries: Sequence[Entry], folder: Path, figures: Sequence[tuple[str, str, bool]] = (), note: str = ""
) -> list[Path]:
    """Write `leaderboard.html`, `leaderboard.csv` and `runs.csv`.

    Args:
        entries: runs.
        folder: where.
        figures: more for the page, as from `qat.analysis.search.study_figures`.
        note: a sentence above them.
    """
    found = boards(entries)
    broken = [entry for entry in entries if entry.status != "finished"]
    page = render(
        "leaderboard.html",
        folder / "leaderboard.html",
        name=_title(found, entries),
        headlines=[headline(board) for board in found],
        boards=[(f"{board.data}: {board.metric}" if len(found) > 1 else "Configurations", _groups_table(board),
                 plots.inline(front_figure(board), f"front{i}"), _runs_table(board, folder))
                for i, board in enumerate(found)],
        broken=_broken_table(broken, folder),
        figures=figures,
        note=note,
    )  # fmt: skip
    return [page, write_groups_csv(folder / "leaderboard.csv", found), write_csv(folder / "runs.csv", entries)]


def show(entries: Sequence[Entry]) -> None:
    """Print a table for each board, and the runs that did not finish."""
    console = Console()
    for board in boards(entries):
        console.print(board_table(board))
        console.print(Text(headline(board)))
        console.print()
    broken = [entry for entry in entries if entry.status != "finished"]
    for entry in broken:
        console.print(Text(f"{entry.status}: {entry.folder}: {entry.why}", style="red"), soft_wrap=True)


def _title(found: Sequence[Board], entries: Sequence[Entry]) -> str:
    data = " and ".join(dict.fromkeys(board.data for board in found if board.data))
    return f"{len(entries)} {'run' if len(entries) == 1 else 'runs'}{f' on {data}' if data else ''}"


def headline(board: Board) -> str:
    """The best configuration, and the smallest that no other beats, in a sentence each."""
    best = board.groups[0]
    sentence = f"Best {board.metric}: {_named(board, best)} with {spread_text(board, best)}"
    if (size := best.mean("bytes")) is not None:
        sentence += f" in {bytes_text(size)}"
    sized = [group for group in board.groups if "bytes" in group.best]
    small = min(sized, key=lambda group: group.mean("bytes") or math.inf, default=best)
    if small is best:
        return f"{sentence}{', which is also the smallest' if sized and len(board.groups) > 1 else ''}."
    gap = abs((small.mean() or 0) - (best.mean() or 0))
    worse = f"{amount_text(board.metric, gap)}{' points' if is_share(board.metric) else ''} worse"
    return (f"{sentence}. Smallest: {_named(board, small)} with {spread_text(board, small)} in "
            f"{bytes_text(small.mean('bytes'))}, {worse}.")  # fmt: skip


def _named(board: Board, group: Group) -> str:
    """What tells a configuration from the others; its place in the table where that is long."""
    words = ", ".join(f"{short(key)} {text(value)}" for key, value in group.config.items())
    if len(words) <= MOST_WORDS:
        return words or "the only one"
    return f"#{board.groups.index(group) + 1} ({words[:MOST_WORDS]}\N{HORIZONTAL ELLIPSIS})"


def spread_text(board: Board, group: Group) -> str:
    """Mean and deviation over seeds: "97.21 % ± 0.34 (3 seeds)"."""
    shown, deviation = metric_text(board.metric, group.mean()), group.deviation()
    if deviation is None:
        return shown
    return f"{shown} \N{PLUS-MINUS SIGN} {amount_text(board.metric, deviation)} ({len(group.entries)} runs)"


def operations_text(count: float | None) -> str:
    """A count of bit operations.

    >>> operations_text(7_100_000), operations_text(None) == MISSING
    ('7.10 M', True)
    """
    if count is None:
        return MISSING
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.2f} {unit}"
    return f"{count:.0f}"


TEXTS = {"bytes": bytes_text, "latency_ms": time_text, "bit_operations": operations_text}


def _headings(board: Board) -> dict[str, str]:
    """Key of COSTS -> heading, of those that were measured."""
    names = {"bytes": "Size", "latency_ms": f"ms ({STAGES.get(board.engine or '', '')})", "bit_operations": "Bit ops"}
    return {key: name for key, name in names.items() if any(group.mean(key) is not None for group in board.groups)}


def _stages(board: Board) -> list[str]:
    names = [
        key for key in ("float", "ptq", "qat") if any(group.mean(f"stage:{key}") is not None for group in board.groups)
    ]
    return names if len(names) > 1 else []


def board_table(board: Board) -> RichTable:
    """A board on the console: one row a configuration, best first; a star where no other is as good and as cheap."""
    share = is_share(board.metric)
    title = f"{board.data}: {board.metric}" if board.data else board.metric
    table = new_table(
        title + (" in %" if share else "") + (", lower is better" if lower_is_better(board.metric) else "")
    )
    shown = board.changed[:MOST_COLUMNS]
    table.caption = "* no other configuration is as good and as cheap" if len(board.groups) > 1 else None
    table.caption_justify = "left"
    table.add_column("#", justify="right")
    for key in shown:
        table.add_column(short(key).replace(".", "\n").replace(" ", "\n"), overflow="fold", min_width=4)
    table.add_column("Runs", justify="right", no_wrap=True)
    for name in ("Mean", "\N{PLUS-MINUS SIGN}", *(STAGES[key] for key in _stages(board)), *_headings(board).values()):
        table.add_column(name.replace(" (", "\n("), justify="right", no_wrap=True)
    if len(shown) < len(board.changed):
        table.caption = f"{table.caption}; {len(board.changed) - len(shown)} more settings differ, see the files"
    for i, group in enumerate(board.groups, 1):
        cells = [str(i), *(text(group.config[key]) for key in shown)]
        deviation = group.deviation()
        cells += [str(len(group.entries)), metric_text(board.metric, group.mean()).removesuffix(" %")]
        cells.append(MISSING if deviation is None else amount_text(board.metric, deviation))
        cells += [metric_text(board.metric, group.mean(f"stage:{key}")).removesuffix(" %") for key in _stages(board)]
        for key in _headings(board):
            cells.append(TEXTS[key](group.mean(key)) + ("*" if key in group.best and len(board.groups) > 1 else " "))
        table.add_row(*map(Text, cells))
    return table


def _groups_table(board: Board) -> Table:
    caption = f"{len(board.groups)} configurations, best {board.metric} first; only settings that differ are shown"
    columns = [Column("#", True), *(Column(short(key), help=key) for key in board.changed)]
    columns += [Column("Runs", True, "how many seeds"), Column(board.metric, True, "mean over seeds"),
                Column("\N{PLUS-MINUS SIGN}", True, "standard deviation over seeds")]  # fmt: skip
    columns += [Column(STAGES[key], True) for key in _stages(board)]
    columns += [Column(name, True) for name in _headings(board).values()]
    columns.append(Column("Not beaten by", help="costs at which no other configuration is as good and as cheap"))
    table = Table(caption, columns)
    largest = {key: max((group.mean(key) or 0 for group in board.groups), default=0) for key in COSTS}
    for i, group in enumerate(board.groups, 1):
        row = [Cell(str(i), i), *(words_cell(text(group.config[key])) for key in board.changed)]
        deviation = group.deviation()
        row += [Cell(str(len(group.entries)), len(group.entries)), _metric_cell(board, group.mean()),
                Cell(MISSING if deviation is None else amount_text(board.metric, deviation), deviation)]  # fmt: skip
        row += [_metric_cell(board, group.mean(f"stage:{key}")) for key in _stages(board)]
        row += [number_cell(group.mean(key), TEXTS[key], largest[key]) for key in _headings(board)]
        row.append(words_cell(", ".join(COSTS[key] for key in COSTS if key in group.best)))
        table.rows.append(row)
    return table


def _metric_cell(board: Board, value: float | None) -> Cell:
    return Cell(metric_text(board.metric, value), value)


def _runs_table(board: Board, out: Path) -> Table:
    seeds = sorted({key for group in board.groups for entry in group.entries for key in entry.config if key == "seed"})
    columns = [Column("Run"), *(Column(short(key), help=key) for key in board.changed), *(Column(key) for key in seeds)]
    columns += [Column(board.metric, True), *(Column(name, True) for name in _headings(board).values())]
    table = Table("Every run", columns)
    for group in board.groups:
        for entry in group.entries:
            row = [_link(entry, out), *(words_cell(text(entry.config.get(key))) for key in board.changed)]
            row += [words_cell(entry.config.get(key)) for key in seeds]
            row += [_metric_cell(board, entry.value)]
            row += [number_cell(entry.costs.get(key), TEXTS[key]) for key in _headings(board)]
            table.rows.append(row)
    return table


def _link(entry: Entry, out: Path) -> Cell:
    """A run's directory; a link to its report, relative to the page."""
    from markupsafe import Markup

    place = os.path.relpath(entry.folder, out)
    if not (entry.folder / "report.html").is_file():
        return Cell(place, place)
    return Cell(Markup('<a href="{}">{}</a>').format(Path(place, "report.html").as_posix(), place), place)


def _broken_table(broken: Sequence[Entry], out: Path) -> Table:
    table = Table("Runs without a result", [Column("Run"), Column("Status"), Column("What it said last")])
    table.rows = [[_link(entry, out), words_cell(entry.status), words_cell(entry.why)] for entry in broken]
    return table


def front_figure(board: Board) -> Any:
    """The metric against size, latency and bit operations: a panel each, with deviations and the Pareto front."""
    shown = list(_headings(board)) or ["bytes"]
    scale = 100 if is_share(board.metric) else 1
    with plots.style():
        fig = plots.new_figure(4.2 * len(shown), 3.6)
        panels = fig.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, key in zip(panels, shown, strict=True):
            _front(axes, board, key, scale)
        panels[0].set_ylabel(f"{board.metric} (%)" if scale == 100 else board.metric)
    return fig


def _front(axes: "Axes", board: Board, key: str, scale: float) -> None:
    """One panel."""
    unit = {"bytes": 1e-3, "latency_ms": 1.0, "bit_operations": 1e-6}[key]
    engine = STAGES.get(board.engine or "", "")
    names = {"bytes": "size of the file (KB)", "latency_ms": f"milliseconds a sample, {engine}",
             "bit_operations": "bit operations a sample (millions)"}  # fmt: skip
    for front in (False, True):
        groups = [group for group in board.groups if (key in group.best) == front]
        points = [(unit * c, scale * v, scale * (group.deviation() or 0), group) for group in groups
                  if (c := group.mean(key)) is not None and (v := group.mean()) is not None]  # fmt: skip
        if not points:
            continue
        points.sort(key=lambda point: point[:2])
        x, y, spread, _ = zip(*points, strict=True)
        color = plots.COLORS[0] if front else plots.INK
        axes.errorbar(x, y, yerr=spread if any(spread) else None, linestyle="", marker="o", color=color,
                      markersize=5 if front else 4, alpha=1.0 if front else 0.6, elinewidth=1, capsize=2)  # fmt: skip
        if not front:
            continue
        axes.plot(x, y, drawstyle="steps-post", color=color, linewidth=1.2, label="Pareto front")
        for x_i, y_i, _, group in points[-MOST_LABELS:] if len(board.groups) > 1 else ():
            below = lower_is_better(board.metric)
            axes.annotate(_words(board, group), (x_i, y_i), xytext=(-4, -5 if below else 5), textcoords="offset points",
                          fontsize=7, ha="right", va="top" if below else "bottom")  # fmt: skip
    axes.set_xlabel(names[key])
    axes.grid(axis="y")
    axes.margins(y=0.15)
    _room_for_labels(axes, [unit * c for group in board.groups if (c := group.mean(key)) is not None])


def _room_for_labels(axes: "Axes", places: Sequence[float]) -> None:
    """Stretch an axis to the left, where names stand; costs that span more than a decade are logarithmic."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(places), max(places)
    if low > 0 and high > 10 * low:
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.4, high * (high / low) ** 0.1)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 3.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    else:
        width = (high - low) or high or 1.0
        axes.set_xlim(low - 0.4 * width, high + 0.1 * width)


def _words(board: Board, group: Group) -> str:
    """A short label for a point."""
    words = ", ".join(
        f"{key.rpartition('.')[2]} {text(value)}" if isinstance(value, bool | int | float) else text(value)
        for key, value in group.config.items()
    )
    return words if len(words) <= MOST_WORDS / 3 else f"#{board.groups.index(group) + 1}"
