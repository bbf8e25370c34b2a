"""One HTML file that shows a whole run: opens offline, in light and dark, and prints."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.analysis import plots
from qat.analysis.console import number_text, verdict
from qat.analysis.page import Cell, Column, Table, number_cell, render, shape_cell, words_cell
from qat.analysis.summary import (
    FILES,
    MISSING,
    PAIRS,
    STAGES,
    Summary,
    bytes_text,
    difference_text,
    is_share,
    kernel_lines,
    metric_names,
    metric_text,
    percent_text,
    share_text,
    stages,
    time_text,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARITY_HELP = {
    "Largest difference": "the largest absolute difference between two output values, in the output's unit.",
    "In steps": "the same, counted in steps of the quantizer: 0 is identical, 1 is a tie rounded the other way.",
    "Mean, in steps": "the mean over all compared integers.",
    "Same prediction": "share of the predictions (of samples, or of their positions) that are the same class.",
    "Outside ties": "the same, without those where two classes are equal or a value at a tie was rounded otherwise.",
    "Equal values": "share of the compared integers that are equal, those at ties apart.",
}
"""Column of the parity table -> what it says."""


def write_report(
    path: Path | str, summary: Summary, layers: Sequence[dict[str, Any]] = (),
    history: Sequence[dict[str, Any]] = (), config_yaml: str = "",
) -> Path:  # fmt: skip
    """Write the report of a run: one file that needs nothing beside it.

    Args:
        path: the HTML file.
        summary: the content of `summary.json`.
        layers: one dict a quantized layer or edge. Keys, all optional: name, kind, scheme, reason, shape, parameters,
            bits, bytes, scale_min, scale_max, sqnr_db.
        history: training curves, as from `qat.analysis.plots.read_history`.
        config_yaml: the run's composed configuration.

    Returns:
        The path.
    """
    measured = [row for row in layers if row.get("sqnr_db") is not None or row.get("bytes") is not None]
    return render(
        "report.html",
        path,
        name=summary.get("name") or "Run",
        verdict=verdict(summary),
        stages=_stages_table(summary),
        stages_plot=_inline(plots.stages_figure(summary), "stages") if metric_names(summary) else "",
        training_plot=_inline(plots.training_figure(history), "training") if history else "",
        parity=_parity_table(summary),
        parity_help=PARITY_HELP,
        parity_layers=_parity_layers_table(summary),
        failed={FILES.get(key, key): text for key, text in (summary.get("failed") or {}).items()},
        kernels=kernel_lines(summary),
        layers=_layers_table(layers),
        layers_plot=_inline(plots.layers_figure(measured), "layers") if measured else "",
        config_yaml=config_yaml,
        files=_files_table(summary),
        seconds=_seconds_table(summary),
    )


def _inline(fig: "Figure", prefix: str) -> str:
    """A figure as an SVG element for HTML: text in the page's colour, ids of its own, no fixed size."""
    from markupsafe import Markup

    text = plots.svg(fig)
    text = text[text.index("<svg") :]
    start, rest = text[: text.index(">")], text[text.index(">") :]
    start = re.sub(r'\s(width|height|xmlns(:\w+)?|version)="[^"]*"', "", start)
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", rest)
    return Markup(start + ' aria-hidden="true"' + rest.replace(plots.INK, "currentColor"))


def _stages_table(summary: Summary) -> Table:
    names = metric_names(summary)
    table = Table("Metrics, file size and latency of each stage", [Column("Stage")], sortable=False)
    for name in names:
        table.columns += [Column(name, True), Column("points to float" if is_share(name) else "to float", True)]
    table.columns += [
        Column("Size", True),
        Column("of float", True),
        Column("ms at batch 1", True),
        Column("ms at batch 64", True),
    ]
    for stage in stages(summary):
        row: list[Cell] = [Cell(stage.label)]
        for name in names:
            value, gain = stage.metrics.get(name), stage.gains.get(name)
            row += [Cell(metric_text(name, value), value), Cell(difference_text(name, gain), gain)]
        row += [number_cell(stage.size, bytes_text), number_cell(stage.ratio, percent_text)]
        row += [number_cell(stage.latency.get(batch), time_text) for batch in ("1", "64")]
        table.rows.append(row)
    return table


def _parity_table(summary: Summary) -> Table:
    columns = [Column("Pair"), *(Column(name, True) for name in PARITY_HELP)]
    metrics = metric_names(summary)
    columns += [Column(f"{name}, points" if is_share(name) else name, True) for name in metrics]
    table = Table("How far the outputs of two stages are apart", columns, sortable=False)
    parity = summary.get("parity") or {}
    for key, label in PAIRS.items():
        if pair := parity.get(key):
            table.rows.append(
                [
                    Cell(label),
                    number_cell(pair.get("max_abs"), number_text),
                    number_cell(pair.get("max_steps"), number_text),
                    number_cell(pair.get("mean_steps"), number_text),
                    number_cell(pair.get("agreement"), share_text),
                    number_cell(pair.get("agreement_outside_ties"), share_text),
                    number_cell(pair.get("equal_share"), share_text),
                    *(Cell(difference_text(n, d), d) for n in metrics for d in [(pair.get("metrics") or {}).get(n)]),
                ]
            )
    return table


def _parity_layers_table(summary: Summary) -> Table:
    """Every layer, as each file computes it from the integers of training: columns of three for each file."""
    parity = summary.get("parity") or {}
    files = {key: label for key, label in FILES.items() if (parity.get(f"qat_{key}") or {}).get("layers")}
    table = Table("Difference to training, in steps, given equal inputs", [Column("Layer")])
    rows: dict[str, list[Cell]] = {}
    for i, (key, label) in enumerate(files.items()):
        table.columns += [Column(f"{label}: worst", True), Column("mean", True), Column("equal", True)]
        for layer in parity[f"qat_{key}"]["layers"]:
            cells = rows.setdefault(layer["name"], [Cell(layer["name"], layer["name"])])
            cells += [Cell(MISSING)] * (1 + 3 * i - len(cells))
            cells += [
                number_cell(layer["max_steps"], number_text),
                number_cell(layer["mean_steps"], number_text),
                number_cell(layer["equal_share"], share_text),
            ]
    table.rows = [[*cells, *[Cell(MISSING)] * (len(table.columns) - len(cells))] for cells in rows.values()]
    return table


def _layers_table(layers: Sequence[dict[str, Any]]) -> Table:
    columns = ["Name", "Kind", "Scheme", "Bits", "Shape", "Parameters", "Size", "Scale", "SQNR (dB)", "Reason"]
    numeric = {"Bits", "Parameters", "Size", "Scale", "SQNR (dB)"}
    table = Table(f"{len(layers)} layers and edges", [Column(name, name in numeric) for name in columns])
    for layer in layers:
        get = layer.get
        table.rows.append(
            [
                words_cell(get("name")),
                words_cell(get("kind")),
                words_cell(get("scheme")),
                number_cell(get("bits"), number_text),
                shape_cell(get("shape")),
                number_cell(get("parameters"), lambda n: MISSING if n is None else f"{n:,}"),
                number_cell(get("bytes"), bytes_text),
                _scale(get("scale_min"), get("scale_max")),
                number_cell(get("sqnr_db"), lambda db: MISSING if db is None else f"{db:.1f}"),
                words_cell(get("reason")),
            ]
        )
    return table


def _scale(low: float | None, high: float | None) -> Cell:
    known = list(dict.fromkeys(number_text(v) for v in (low, high) if v is not None))
    return Cell(" to ".join(known) or MISSING, high if high is not None else low)


def _files_table(summary: Summary) -> Table:
    table = Table("Files, relative to the run's directory", [Column("Stage"), Column("File"), Column("Size", True)])
    table.sortable = False
    sizes = {stage.key: stage.size for stage in stages(summary)}
    for key, name in (summary.get("files") or {}).items():
        table.rows.append([Cell(STAGES.get(key, key)), words_cell(name), number_cell(sizes.get(key), bytes_text)])
    return table


def _seconds_table(summary: Summary) -> Table:
    table = Table("Where the time went", [Column("Part"), Column("Seconds", True)], sortable=False)
    seconds = summary.get("seconds") or {}
    table.rows = [[Cell(STAGES.get(key, key)), number_cell(value, time_text)] for key, value in seconds.items()]
    if len(seconds) > 1:
        total = sum(value for value in seconds.values() if value is not None)
        table.rows.append([Cell("Together"), number_cell(total, time_text)])
    return table
