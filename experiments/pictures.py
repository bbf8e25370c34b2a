"""Plots that studies share: what each case comes to over its seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from experiments.results import Row, deviation, mean, values, where
from qat.analysis import plots
from qat.analysis.summary import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PTQ, QAT = plots.STAGE_COLORS["ptq"], plots.STAGE_COLORS["qat"]
STAGES = {"ptq": (PTQ, "PTQ"), "qat": (QAT, "QAT")}


def unit(rows: Sequence[Row]) -> str:
    """How an axis calls the metric."""
    metric = str(rows[0]["metric"])
    return f"{metric.replace('_', ' ')}{' (%)' if is_share(metric) else ''}"


def dots(axes: "Axes", rows: Sequence[Row], column: str, names: Mapping[str, str], shift: float = 0.0,
         stages: Mapping[str, tuple[str, str]] = STAGES, marker: str = "o") -> None:  # fmt: skip
    """One line a case: each seed a small dot, the mean a large one, PTQ and QAT joined; float as a line.

    Args:
        axes: where to draw.
        rows: of one panel.
        column: what tells cases apart.
        names: value of the column -> label, from top to bottom.
        shift: how far below its line a series is drawn.
        stages: column -> colour and label.
        marker: of the means.
    """
    order = [name for name in names if where(rows, **{column: name})]
    for i, name in enumerate(order):
        same = where(rows, **{column: name})
        y = i + shift
        ends = [_place(same, mean(same, stage)) for stage in stages]
        axes.plot(ends, [y] * len(ends), color=plots.INK, alpha=0.35, linewidth=1, zorder=1)
        for stage, (color, label) in stages.items():
            found = [_place(same, value) for value in values(same, stage)]
            axes.scatter(found, [y] * len(found), s=9, color=color, alpha=0.45, linewidth=0, zorder=2)
            axes.scatter(ends[list(stages).index(stage)], y, s=34, color=color, marker=marker, linewidth=0, zorder=3,
                         label=label if i == 0 else None)  # fmt: skip
    axes.axvline(_place(rows, mean(rows, "float")), color=plots.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(order)), [names[name] for name in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")
    axes.set_xlabel(unit(rows))
    if is_share(rows[0]["metric"]):
        _log_of_errors(axes, "x")


def _place(rows: Sequence[Row], value: float) -> float:
    """Where a value stands on the axis: a share by its errors, of which there is at least a thousandth."""
    return max(100 - value, 0.1) if is_share(rows[0]["metric"]) else value


def _log_of_errors(axes: "Axes", name: str) -> None:
    """Label the axis `x` or `y`, of errors in %, with what is right; the better end is to the right, or above."""
    axis = {"x": axes.xaxis, "y": axes.yaxis}[name]
    limits = getattr(axes, f"get_{name}lim")
    getattr(axes, f"set_{name}scale")("log")
    low, high = sorted(limits())
    coarse, fine = (90, 50, 30, 20, 10, 5, 3, 2, 1, 0.5, 0.2), (26, 24, 22, *range(20, 10, -1), 8, 7, 6, 4, 2.5, 1.5)
    ticks = [error for error in coarse if low < error < high]
    if len(ticks) < 5:
        for error in fine:
            near = min((abs(math.log(error / tick)) for tick in ticks), default=math.inf)
            if low < error < high and near > 0.07 * math.log(high / low):
                ticks.append(error)
    axis.set_ticks(ticks, [f"{100 - error:g}" for error in ticks])
    axis.set_ticks([], minor=True)
    getattr(axes, f"set_{name}lim")(high, low)


def sizes(axes: "Axes", rows: Sequence[Row], column: str, families: Mapping[str, tuple[str, Sequence[str]]],
          short: Mapping[str, str]) -> None:  # fmt: skip
    """File size against the metric after training; a line a family, deviations over seeds as bars; PTQ hollow.

    Args:
        axes: where to draw.
        rows: of one panel.
        column: what tells cases apart.
        families: name -> colour, values of the column by size.
        short: value of the column -> label beside its point.
    """
    for i, (family, (color, of_family)) in enumerate(families.items()):
        members = [member for member in of_family if where(rows, **{column: member})]
        cases = [where(rows, **{column: member}) for member in members]
        x = [mean(case, "int8_bytes") for case in cases]
        y = [_place(case, mean(case, "qat")) for case in cases]
        low, high = (
            [_place(case, mean(case, "qat") + side * deviation(case, "qat")) for case in cases] for side in (-1, 1)
        )
        axes.plot(x, y, color=color, marker="o", markersize=5, linewidth=1.2, label=family)
        axes.vlines(x, low, high, color=color, linewidth=1.2)
        axes.scatter(x, [_place(case, mean(case, "ptq")) for case in cases], s=26, facecolor="none", edgecolor=color)
        for at, height, member in zip(x, y, members, strict=True):
            offset = ((5, 5), (-9, 6), (5, -11))[i % 3] if len(members) > 1 else (5, 5)
            axes.annotate(short[member], (at, height), offset, textcoords="offset points", fontsize=7.5, color=color)
    axes.axhline(_place(rows, mean(rows, "float")), color=plots.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlabel("int8 checkpoint's file (KB)")
    axes.set_ylabel(unit(rows))
    axes.grid()
    if is_share(rows[0]["metric"]):
        _log_of_errors(axes, "y")
