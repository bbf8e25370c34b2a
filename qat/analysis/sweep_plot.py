"""The plot of a sweep: a metric against what varies, and against the size of the exported file."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from qat.analysis import plots
from qat.analysis.leaderboard import pareto_front
from qat.analysis.summary import FILES, is_share, lower_is_better
from qat.analysis.sweep import Row, sweep_metric, told_apart_by, varying

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BITS = {"weight_bits": "weight bits", "activation_bits": "activation bits"}
MOST_LINES = 8
"""A panel has at most so many lines; what would need more is averaged over."""


@dataclass(frozen=True)
class Axis:
    """What varies in a sweep: `label` along x, each row at `of(row)`, one line a value of `line`.

    Attributes:
        label: name of the x axis.
        of: row -> where it stands; a number, or text for a category.
        lines: columns whose values make the lines.
    """

    label: str
    of: Callable[[Row], Any]
    lines: tuple[str, ...] = ()

    def name(self, row: Row) -> str:
        """What tells a row from the others: its bit widths where they vary, else where it stands; and its line."""
        if self.label in BITS.values() or self.of is bits_label:
            place, lines = bits_label(row), tuple(name for name in self.lines if name not in BITS)
        else:
            place, lines = f"job {row['job']}" if self.label == "job" else str(self.of(row)), self.lines
        return ", ".join([place, *(str(row.get(name, "default")) for name in lines)])

    def line(self, row: Row) -> str:
        """The name of the line that a row is on; empty where there is only one."""
        words = {"activation_bits": "activation bits"}
        parts = []
        for name in self.lines:
            value = row.get(name, "float" if name in BITS else "default")
            parts.append(f"{value} {words[name]}" if name in words else f"{name.rpartition('.')[2]} {value}")
        return ", ".join(parts)


def choose_axis(rows: Sequence[Row]) -> Axis:
    """What a sweep is about: bits where they vary, else the overrides that vary, else the job number.

    Args:
        rows: the jobs that finished.
    """
    overrides = told_apart_by(rows)
    free = [name for name in overrides if "seed" not in name.rpartition(".")[2]]
    if bits := varying(rows, list(BITS)):
        rest = [name for name in free if not _follows(rows, name, bits)]
        if len(bits) == 1:
            return _lines(rows, BITS[bits[0]], lambda row: bits_of(row, bits[0]), rest)
        pairs = {(row.get("weight_bits"), row.get("activation_bits")) for row in rows}
        on_line = Counter(activation for _, activation in pairs)
        if 2 * sum(points > 1 for points in on_line.values()) < len(on_line):  # most lines would be a single point
            return _lines(rows, "bits of weights (W) and activations (A)", bits_label, rest)
        return _lines(rows, BITS["weight_bits"], lambda row: bits_of(row, "weight_bits"), ["activation_bits", *rest])
    if not (free := free or overrides):
        return Axis("job", lambda row: row["job"])
    numeric = [name for name in free if all(isinstance(row.get(name), int | float) for row in rows)]
    x = (numeric or free)[0]
    rest = [name for name in free if name != x and not _follows(rows, name, [x])]
    return _lines(rows, x, lambda row: row.get(x, "default"), rest)


def _lines(rows: Sequence[Row], label: str, of: Callable[[Row], Any], names: Sequence[str]) -> Axis:
    """An axis with as many of `names` making lines as there is room for."""
    chosen: tuple[str, ...] = ()
    for name in names:
        wider = (*chosen, name)
        if len({tuple(str(row.get(n)) for n in wider) for row in rows}) <= MOST_LINES:
            chosen = wider
    return Axis(label, of, chosen)


def _follows(rows: Sequence[Row], name: str, given: Sequence[str]) -> bool:
    """Whether the values of `given` determine that of `name`."""
    seen: dict[tuple[str, ...], str] = {}
    return all(
        seen.setdefault(tuple(str(row.get(n)) for n in given), str(row.get(name))) == str(row.get(name)) for row in rows
    )


def bits_of(row: Row, name: str) -> int | None:
    """A job's bit width; 32 for the float half of a job that quantizes the other, None where nothing is quantized."""
    quantized = any(key in row for key in BITS)
    return row.get(name, 32 if quantized else None)


def bits_label(row: Row) -> str:
    """A job's bit widths: "W4A4"; "float" where nothing is quantized."""
    weight, activation = (bits_of(row, name) for name in BITS)
    return "float" if weight is None else f"W{weight}A{activation}"


def sweep_figure(rows: Sequence[Row]) -> "Figure":
    """Two panels: the metric against what varies (QAT solid, PTQ dashed), and against file size with the Pareto front.

    Several jobs at one place (seeds) are points, with the line through their mean. Below: jobs without a result.

    Args:
        rows: from `qat.analysis.sweep.collect`.
    """
    finished = [row for row in rows if row["status"] == "finished"]
    missing = [row["job"] for row in rows if row["status"] in ("failed", "unfinished")]
    metric = sweep_metric(finished) or "metric"
    with plots.style():
        fig = plots.new_figure(9.5, 3.9)
        left, right = fig.subplots(1, 2, width_ratios=[1, 1])
        if finished:
            axis = choose_axis(finished)
            _against_axis(left, finished, metric, axis)
            _against_size(right, finished, metric, axis)
        for axes in (left, right) if finished else ():
            axes.set_ylabel(f"{metric} (%)" if is_share(metric) else metric)
            axes.grid(axis="y")
            if is_share(metric):
                bottom, top = axes.get_ylim()
                axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= min(top, 100 + 1e-9)])
                axes.set_ylim(bottom, top)
        if not finished:
            left.set_axis_off()
            right.set_axis_off()
            fig.text(0.5, 0.5, "no job finished", ha="center")
        if missing:
            numbers = ", ".join(map(str, missing[:12])) + (", ..." if len(missing) > 12 else "")
            note = f"{len(missing)} of {len(rows)} jobs {'has' if len(missing) == 1 else 'have'} no result: job"
            fig.supxlabel(f"{note}{'' if len(missing) == 1 else 's'} {numbers}", fontsize=8, color=plots.COLORS[4])
    return fig


def _against_axis(axes: "Axes", rows: Sequence[Row], metric: str, axis: Axis) -> None:
    scale = 100 if is_share(metric) else 1
    quantized = [row for row in rows if axis.of(row) is not None]
    places = [axis.of(row) for row in quantized]
    numeric = all(isinstance(place, int | float) for place in places)
    texts = list(dict.fromkeys(map(str, places)))
    order: list[Any] = (
        sorted(set(places)) if numeric else sorted(texts, key=_natural) if axis.of is bits_label else texts
    )
    x_of = {place: place if numeric else i for i, place in enumerate(order)}
    names = sorted({axis.line(row) for row in quantized}, key=_natural)
    for name, color in zip(names, _cycle(len(names)), strict=True):
        for stage, dashes in (("qat", "-"), ("ptq", (0, (4, 2)))):
            found: dict[Any, list[float]] = {}
            for row in quantized:
                if axis.line(row) == name and (value := row.get(f"{stage}_{metric}")) is not None:
                    place = axis.of(row)
                    found.setdefault(x_of[place if numeric else str(place)], []).append(scale * value)
            if not found:
                continue
            spread = [(x, y) for x, values in found.items() for y in values]
            fill = color if stage == "qat" else "none"
            axes.plot(*zip(*spread, strict=True), linestyle="", marker="o", markersize=4, color=color, mfc=fill)
            means = sorted((x, fmean(values)) for x, values in found.items())
            label = ", ".join(word for word in (stage.upper(), name) if word)
            axes.plot(*zip(*means, strict=True), linestyle=dashes, color=color, linewidth=1.5, label=label)
    floats = [scale * row[f"float_{metric}"] for row in rows if f"float_{metric}" in row]
    if floats:
        axes.axhline(fmean(floats), color=plots.INK, linestyle=":", linewidth=1, label="float")
    if numeric and order[0] > 0 and order[-1] >= 50 * order[0]:
        axes.set_xscale("log")
    if numeric and len(order) <= 12:
        axes.set_xticks(order, [f"{place:g}" for place in order])
        axes.set_xticks([], minor=True)
    elif not numeric:
        crowded = sum(map(len, order)) > 48
        axes.set_xticks(range(len(order)), order, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    axes.set_xlabel(axis.label)
    axes.set_title(f"{metric} against {axis.label if len(axis.label) < 30 else 'bits'}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")


def _against_size(axes: "Axes", rows: Sequence[Row], metric: str, axis: Axis) -> None:
    stage = next((key for key in FILES if any(f"{key}_bytes" in row for row in rows)), "int8")
    points, labels = [], []
    for row in rows:
        value = row.get(f"{stage}_{metric}", row.get(f"qat_{metric}", row.get(f"ptq_{metric}")))
        if value is not None and f"{stage}_bytes" in row:
            points.append((row[f"{stage}_bytes"] / 1e3, value * (100 if is_share(metric) else 1)))
            labels.append(axis.name(row))
    axes.set_title(f"{metric} against file size")
    axes.set_xlabel(f"size of the {FILES[stage]} file (KB)" if stage != "int8" else "size of the int8 checkpoint (KB)")
    if not points:
        axes.set_xticks([])
        axes.text(0.5, 0.5, "no job exported a file", transform=axes.transAxes, ha="center")
        return
    lower = lower_is_better(metric)
    front = pareto_front(points, lower)
    axes.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=4, color=plots.COLORS[0], alpha=0.5)
    axes.plot(
        *zip(*(points[i] for i in front), strict=True), drawstyle="steps-post", marker="o", markersize=5,
        color=plots.COLORS[0], linewidth=1.2, label="Pareto front",
    )  # fmt: skip
    for i in front:
        axes.annotate(  # beyond the front, where no point can be
            labels[i], points[i], xytext=(-4, -4 if lower else 4), textcoords="offset points", fontsize=8,
            ha="right", va="top" if lower else "bottom",
        )  # fmt: skip
    axes.margins(x=0.12, y=0.15)
    axes.legend(loc="best")


def _cycle(count: int) -> list[str]:
    return [plots.COLORS[i % len(plots.COLORS)] for i in range(count)]


def _natural(text: str) -> list[tuple[int, float, str]]:
    """Sorts "W4A8" before "W16A4"."""
    return [(0, float(p), "") if p.isdecimal() else (1, 0.0, p) for p in re.split(r"(\d+)", text)]
