"""Figures of a run. Made without pyplot, so nothing global changes and no window opens.

Backgrounds are transparent and text is mid-grey: legible on light and on dark pages. The same input gives the same
bytes of SVG. matplotlib is imported where it is used.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.analysis.summary import (
    Summary,
    bytes_text,
    difference_text,
    is_share,
    lower_is_better,
    metric_names,
    metric_text,
    stages,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#7b7b7b"
"""Text and axes: a contrast of at least 4.2 on white and on near-black."""
COLORS = ("#2f7fc1", "#d9822b", "#2f9e77", "#9a6bb8", "#c9515b", "#8a8f3c", "#4aa5b5", "#8c8c8c")
STAGE_COLORS = {"float": "#8c8c8c", "ptq": "#d9822b", "qat": "#2f7fc1", "int8": "#2f9e77", "onnx": "#9a6bb8"}
FILE_COLOR = "#4aa5b5"
PHASES = {"float": "float training", "qat": "quantized training"}

_RC: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.formatter.useoffset": False,
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "qat",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def style() -> Iterator[None]:
    """The look of all figures, for the time of a `with` block."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of this size in inches, laid out when it is saved. Call inside `style()`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def stages_figure(summary: Summary) -> "Figure":
    """Bars of the first metric a stage, beside bars of the file size where there is one.

    Bars begin at nought, so that lengths compare honestly; the text beside them has the value and the difference to
    float.
    """
    metric = (metric_names(summary) or ["metric"])[0]
    rows = [stage for stage in stages(summary) if metric in stage.metrics or stage.size is not None]
    sized = any(stage.size is not None for stage in rows)
    colors = [STAGE_COLORS.get(stage.key, FILE_COLOR) for stage in rows]
    with style():
        fig = new_figure(7.5, 0.6 + 0.36 * max(len(rows), 1))
        panels = fig.subplots(1, 2 if sized else 1, squeeze=False, width_ratios=[3, 2] if sized else [1])[0]
        texts = []
        for stage in rows:
            text = metric_text(metric, stage.metrics.get(metric))
            gain = stage.gains.get(metric)
            texts.append(text if gain is None else f"{text}  ({difference_text(metric, gain)})")
        title = f"{metric} (difference to float{' in points' if is_share(metric) else ''})"
        title += ", lower is better" if lower_is_better(metric) else ""
        _bars(panels[0], [stage.metrics.get(metric) for stage in rows], texts, colors, title, room=1.45)
        panels[0].set_yticks(range(len(rows)), [stage.label for stage in rows])
        if sized:
            _bars(
                panels[1],
                [stage.size for stage in rows],
                [bytes_text(stage.size) for stage in rows],
                colors,
                "file size",
            )
            panels[1].set_yticks([])
    return fig


def _bars(
    axes: "Axes", values: Sequence[float | None], texts: Sequence[str], colors: Sequence[str], title: str,
    room: float = 1.35,
) -> None:  # fmt: skip
    """Horizontal bars, first on top, each with its text beside it instead of an axis."""
    lengths = [0.0 if value is None or value != value else value for value in values]
    bars = axes.barh(range(len(values)), lengths, color=colors, height=0.62)
    axes.bar_label(bars, labels=texts, padding=4, fontsize=8)
    axes.set_xlim(min(0.0, *lengths, 0.0) * room, (max(0.0, *lengths, 0.0) or 1.0) * room)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title)


def read_history(run_dir: Path | str) -> list[dict[str, Any]]:
    """Training curves of a run, from the files that Lightning's CSVLogger wrote.

    Args:
        run_dir: directory with `csv/float/metrics.csv` and `csv/qat/metrics.csv`; either may be missing.

    Returns:
        One dict a row of the files, in order: "phase", and the columns that the row has as numbers ("step" and
        "epoch" as integers). Steps are those of the phase.
    """
    rows: list[dict[str, Any]] = []
    for phase in PHASES:
        path = Path(run_dir, "csv", phase, "metrics.csv")
        if not path.is_file():
            continue
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                row: dict[str, Any] = {"phase": phase}
                for key, text in line.items():
                    if key and text:
                        row[key] = int(float(text)) if key in ("step", "epoch") else float(text)
                rows.append(row)
    return rows


def svg(fig: "Figure") -> str:
    """The figure as SVG text; equal figures give equal text."""
    buffer = StringIO()
    with style():
        fig.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return buffer.getvalue()


def inline(fig: "Figure", prefix: str) -> str:
    """A figure as an SVG element for HTML: text in the page's colour, ids of its own, no fixed size."""
    from markupsafe import Markup

    text = svg(fig)
    text = text[text.index("<svg") :]
    start, rest = text[: text.index(">")], text[text.index(">") :]
    start = re.sub(r'\s(width|height|xmlns(:\w+)?|version)="[^"]*"', "", start)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", rest)
    return Markup(start + ' aria-hidden="true"' + rest.replace(INK, "currentColor"))


def save(fig: "Figure", path: Path | str) -> Path:
    """Write a figure as .svg or .png (160 dots per inch, transparent).

    Returns:
        The path.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"cannot save a figure as '{path.name}'; the suffix must be .svg or .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(svg(fig), encoding="utf-8")
    else:
        with style():
            fig.savefig(path, dpi=160, metadata={"Software": None})
    return path
