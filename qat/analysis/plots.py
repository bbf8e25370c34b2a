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
    MISSING,
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
MOST_LAYERS = 40
"""A figure of layers shows at most so many."""

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


def training_figure(history: Sequence[dict[str, Any]]) -> "Figure":
    """Curves over the optimizer steps of all phases: a panel for the loss, one a metric, one for the learning rate.

    Args:
        history: rows as from `read_history`. Steps that restart with a phase continue the last one here; columns
            named test_* are left out.
    """
    curves, regions = _curves(history)
    with style():
        fig = new_figure(7.5, 0.5 + 1.75 * max(len(curves), 1))
        panels = fig.subplots(max(len(curves), 1), 1, sharex=True, squeeze=False)[:, 0]
        for i, (phase, start, end) in enumerate(regions):
            for axes in panels:
                axes.axvspan(start, end, color=COLORS[0] if phase == "qat" else INK, alpha=0.10, linewidth=0)
            panels[0].annotate(
                PHASES.get(phase, phase), ((start + end) / 2, 1), xycoords=("data", "axes fraction"),
                xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
            if i:
                for axes in panels:
                    axes.axvline(start, color=INK, linewidth=0.8, linestyle=":")
        for axes, (name, lines) in zip(panels, curves.items(), strict=False):
            scale = 100 if is_share(name) else 1
            for part, points in lines.items():
                x, y = zip(*points, strict=True)
                color = COLORS[1] if part.startswith("val") else COLORS[0]
                light = part.endswith("step")
                axes.plot(
                    x, [scale * v for v in y], color=color, label=part or None, linewidth=0.8 if light else 1.5,
                    alpha=0.5 if light else 1.0, marker="o" if part == "val" and len(x) <= 40 else None, markersize=2.5,
                )  # fmt: skip
            axes.set_ylabel(f"{name} (%)" if is_share(name) else name)
            axes.grid(axis="y")
            if any(lines):
                axes.legend(loc="best")
        fig.align_ylabels(panels)
        panels[-1].set_xlabel("step")
        if regions:
            panels[-1].set_xlim(regions[0][1], regions[-1][2])
    return fig


Curves = dict[str, dict[str, list[tuple[int, float]]]]


def _curves(history: Sequence[dict[str, Any]]) -> tuple[Curves, list[tuple[str, int, int]]]:
    """Metric -> part ("train", "val step", ...) -> points, loss first; and (phase, first step, last step)."""
    curves: Curves = {}
    regions: list[tuple[str, int, int]] = []
    for row in history:
        phase = str(row.get("phase", ""))
        if not regions or regions[-1][0] != phase:
            start = regions[-1][2] if regions else 0
            regions.append((phase, start, start))
        _, start, end = regions[-1]
        x = start + int(row.get("step", 0)) + 1  # Lightning's first step is 0
        if end == start and regions[:-1]:  # a phase begins: the lines of the last one end
            for name in curves:
                for points in curves[name].values():
                    points.append((start, float("nan")))
        regions[-1] = (phase, start, max(end, x))
        for key, value in row.items():
            if key in ("phase", "step", "epoch") or key.startswith("test") or not isinstance(value, int | float):
                continue
            name, part = _split(key)
            curves.setdefault(name, {}).setdefault(part, []).append((x, float(value)))
    order = sorted(curves, key=lambda name: (name == "learning rate", name != "loss"))
    return {name: curves[name] for name in order}, regions


def _split(key: str) -> tuple[str, str]:
    """A logged name -> (metric, part): "val_accuracy" -> ("accuracy", "val"), "lr-Adam" -> ("learning rate", "")."""
    if re.match(r"(lr|learning_rate)([^a-z]|$)", key):
        return "learning rate", key.partition("/")[2]
    match = re.fullmatch(r"(?:(train|val)[_/])?(.+?)(?:_(step|epoch))?", key)
    assert match is not None
    split, name, every = match.groups()
    return name, " ".join(word for word in (split, "step" if every == "step" else None) if word)


def layers_figure(layers: Sequence[dict[str, Any]]) -> "Figure":
    """Bars a layer: signal to quantization noise in dB, and bytes, coloured by bit width.

    Args:
        layers: one dict a layer or edge, as `qat.analysis.report.write_report` takes. Those with neither "sqnr_db"
            nor "bytes" are left out. Of more than 40, those with the lowest ratio are shown.
    """
    from matplotlib.patches import Patch

    rows = [row for row in layers if row.get("sqnr_db") is not None or row.get("bytes") is not None]
    found, title = len(rows), ""
    if found > MOST_LAYERS:
        ratios = [row.get("sqnr_db") for row in rows]
        worst = sorted(range(found), key=lambda i: (ratios[i] is None, ratios[i] or 0.0))[:MOST_LAYERS]
        rows, title = [rows[i] for i in sorted(worst)], f", the {MOST_LAYERS} lowest of {found}"
    widths = sorted({row["bits"] for row in rows if row.get("bits") is not None})
    color_of = {bits: COLORS[i % len(COLORS)] for i, bits in enumerate(widths)}
    colors = [color_of.get(row.get("bits"), INK) for row in rows]
    panels_of = [key for key in ("sqnr_db", "bytes") if any(row.get(key) is not None for row in rows)] or ["sqnr_db"]
    with style():
        fig = new_figure(7.5, 0.9 + 0.2 * max(len(rows), 1))
        panels = fig.subplots(1, len(panels_of), squeeze=False)[0]
        for axes, key in zip(panels, panels_of, strict=True):
            values = [row.get(key) for row in rows]
            if key == "bytes":
                _bars(axes, values, [bytes_text(v) for v in values], colors, "size")
            else:
                texts = [MISSING if v is None else f"{v:.1f}" for v in values]
                _bars(axes, values, texts, colors, f"signal to quantization noise (dB){title}")
            axes.set_yticks([])
        panels[0].set_yticks(range(len(rows)), [str(row.get("name", MISSING)) for row in rows], fontsize=8)
        if len(widths) > 1:
            handles = [Patch(color=color_of[bits], label=f"{bits} bits") for bits in widths]
            fig.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return fig


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
