"""Plots that studies share: what each case comes to over its seeds."""

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
        ends = [mean(same, stage) for stage in stages if values(same, stage)]
        axes.plot(ends, [y] * len(ends), color=plots.INK, alpha=0.35, linewidth=1, zorder=1)
        for stage, (color, label) in stages.items():
            found = values(same, stage)
            axes.scatter(found, [y] * len(found), s=9, color=color, alpha=0.45, linewidth=0, zorder=2)
            axes.scatter(ends[list(stages).index(stage)], y, s=34, color=color, marker=marker, linewidth=0, zorder=3,
                         label=label if i == 0 else None)  # fmt: skip
    axes.axvline(mean(rows, "float"), color=plots.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_yticks(range(len(order)), [names[name] for name in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel(unit(rows))


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
    for family, (color, of_family) in families.items():
        members = [member for member in of_family if where(rows, **{column: member})]
        cases = [where(rows, **{column: member}) for member in members]
        x = [mean(case, "int8_bytes") for case in cases]
        axes.errorbar(x, [mean(case, "qat") for case in cases], [deviation(case, "qat") for case in cases],
                      color=color, marker="o", markersize=5, linewidth=1.2, capsize=2, label=family)  # fmt: skip
        axes.scatter(x, [mean(case, "ptq") for case in cases], s=26, facecolor="none", edgecolor=color)
        for at, case, member in zip(x, cases, members, strict=True):
            axes.annotate(short[member], (at, mean(case, "qat")), (4, 5), textcoords="offset points", fontsize=7.5)
    axes.axhline(mean(rows, "float"), color=plots.INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlabel("int8 checkpoint's file (KB)")
    axes.set_ylabel(unit(rows))
    axes.grid()
