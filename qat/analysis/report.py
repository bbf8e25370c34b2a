"""One HTML file that shows a whole run: opens offline, in light and dark, and prints."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qat.analysis import chart_data
from qat.analysis.chart_data import count_text, shown_name
from qat.analysis.console import number_text, p_text, verdict
from qat.analysis.page import Cell, Column, Table, number_cell, render, words_cell
from qat.analysis.summary import (
    FILES,
    MISSING,
    PAIRS,
    STAGES,
    Summary,
    amount_text,
    bytes_text,
    difference_text,
    is_share,
    kernel_lines,
    lower_is_better,
    metric_names,
    metric_text,
    parity_notes,
    percent_text,
    share_text,
    stages,
    time_text,
)

PARITY_HELP = {
    "Largest difference": "the largest absolute difference between two output values, in the output's unit.",
    "In steps": "the same, counted in steps of the quantizer: 0 is identical, 1 is a tie rounded the other way.",
    "Mean, in steps": "the mean over all compared integers.",
    "Same prediction": "share of the predictions (of samples, or of their positions) that are the same class.",
    "Outside ties": "the same, without those where two classes are equal or a value at a tie was rounded otherwise.",
    "Equal values": "share of the compared integers that are equal, those at ties apart.",
}
"""Column of the parity table -> what it says."""

TESTS = {
    "McNemar": "McNemar's exact test on the samples where the two networks differ",
    "permutation": "a permutation test that flips the sign of each sample's difference in loss",
}


def write_report(
    path: Path | str, summary: Summary, evidence: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] = (), config_yaml: str = "",
) -> Path:  # fmt: skip
    """Write the report of a run: one file that needs nothing beside it.

    Args:
        path: the HTML file.
        summary: the content of `summary.json`.
        evidence: the content of `report.json`, what `qat.training.evidence` measures; all of it is optional. `layers`
            are rows of `qat.analysis.layers.layer_table` with what was measured of each.
        history: training curves, as from `qat.analysis.plots.read_history`.
        config_yaml: the run's composed configuration.

    Returns:
        The path.
    """
    from markupsafe import Markup

    evidence = evidence or {}
    rows = evidence.get("layers") or []
    keys = {i: f"row-{i}" for i in range(len(rows))}
    sensitive = any(row.get("sensitivity") for row in rows)
    return render(
        "report.html",
        path,
        name=summary.get("name") or "Run",
        verdict=verdict(summary),
        stages=_stages_table(summary),
        paired=_paired_table(summary),
        paired_note=_paired_note(summary),
        curves=bool(chart_data.training_curves(history)[0]),
        sensitive={
            "text": chart_data.sensitivity_text(summary, evidence),
            "metrics": chart_data.sensitivity_metrics(summary, evidence["sensitivity"]),
        }
        if sensitive
        else None,
        layers=_layers_table(summary, evidence, keys),
        layers_note=_layers_note(summary, evidence),
        edges=_edges_table(evidence, keys),
        predictions=_predictions(evidence.get("predictions")),
        parity=_parity_table(summary),
        parity_help=PARITY_HELP,
        parity_layers=_parity_layers_table(summary),
        failed={FILES.get(key, key): text for key, text in (summary.get("failed") or {}).items()},
        kernels=[*parity_notes(summary), *kernel_lines(summary)],
        config_yaml=config_yaml,
        files=_files_table(summary),
        seconds=_seconds_table(summary),
        data=Markup(chart_data.page_data(summary, evidence, history, keys)),
    )


def _stages_table(summary: Summary) -> Table:
    names = metric_names(summary)
    lower = [name for name in names if lower_is_better(name)]
    caption = "Metrics, file size and latency of each stage"
    if lower:
        caption += f"; of {' and '.join(lower)} lower is better"
    table = Table(caption, [Column("Stage")], sortable=False)
    for name in names:
        table.columns += [Column(name, True), Column("points to float" if is_share(name) else "to float", True)]
    table.columns += [Column("Size", True), Column("of float", True)]
    table.columns += [Column("ms at batch 1", True), Column("ms at batch 64", True)]
    largest = max((stage.size or 0 for stage in stages(summary)), default=0)
    for stage in stages(summary):
        row = [Cell(stage.label)]
        for name in names:
            value, gain = stage.metrics.get(name), stage.gains.get(name)
            row += [Cell(metric_text(name, value), value), Cell(difference_text(name, gain), gain)]
        row += [number_cell(stage.size, bytes_text, largest), number_cell(stage.ratio, percent_text)]
        row += [number_cell(stage.latency.get(batch), time_text) for batch in ("1", "64")]
        table.rows.append(row)
    return table


def _paired_table(summary: Summary) -> Table:
    """What each step changed, sample by sample, and whether that is more than luck."""
    paired = summary.get("paired") or {}
    loss = any(test["by"] == "loss" for test in paired.values())
    words = ("better", "worse") if loss else ("gained", "lost")
    metric = "loss" if loss else (metric_names(summary) or ["accuracy"])[0]
    columns = [Column("From, to"), Column(f"{metric}, points" if is_share(metric) else metric, True)]
    columns += [Column("95 % interval", True), *(Column(word, True) for word in words), Column("p", True)]
    table = Table("What each step changed, on the same test samples", columns, sortable=False)
    for key, test in paired.items():
        a, b = next((a, b) for a in STAGES for b in STAGES if f"{a}_{b}" == key)
        span = f"{difference_text(metric, test['low'])} to {difference_text(metric, test['high'])}"
        table.rows.append([
            Cell(f"{STAGES[a]} \N{RIGHTWARDS ARROW} {STAGES[b]}"),
            Cell(difference_text(metric, test["difference"]), test["difference"]),
            Cell(span, test["difference"]), Cell(str(test["gained"])), Cell(str(test["lost"])),
            Cell(p_text(test["p"]).removeprefix("p = ").removeprefix("p "), test["p"]),
        ])  # fmt: skip
    return table


def _paired_note(summary: Summary) -> str:
    paired = summary.get("paired") or {}
    if not paired:
        return ""
    test = next(iter(paired.values()))
    return (
        f"p: {TESTS[test['test']]}, {test['samples']} in all; how likely so uneven a difference would be between "
        f"equally good networks. It speaks of these two networks, not of other seeds."
    )


def _parity_table(summary: Summary) -> Table:
    columns = [Column("Pair"), *(Column(name, True, text) for name, text in PARITY_HELP.items())]
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


def _decibels(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1f}"


def _layers_table(summary: Summary, evidence: Mapping[str, Any], keys: Mapping[int, str]) -> Table:
    """One row a weight: what it is, what it costs, and what its quantization costs."""
    rows = [(i, row) for i, row in enumerate(evidence.get("layers") or []) if row.get("kind") != "edge"]
    measured = (evidence.get("latency") or {}).get("measured")
    costs = (evidence.get("sensitivity") or {}).get("float") or {}
    metric = next((name for name in metric_names(summary) if name in costs), "")
    columns = [
        Column("Layer"), Column("Weights"), Column("Reads"), Column("Size", True, "in the int8 checkpoint"),
        Column("Bit-operations", True, "multiply-accumulates a sample, times the bits of weight and input"),
        Column("Time" if measured or not rows else "Share of MACs", True, "share of the whole"),
        Column("SQNR (dB)", True, "of the weights: signal to quantization noise"),
        Column("of inputs", True, "the lowest of the tensors that it reads"),
    ]  # fmt: skip
    if metric:
        columns.append(Column("only it", True, f"{metric} when only this layer is quantized"))
        columns.append(Column("all but it", True, f"{metric} when everything but this layer is quantized"))
    table = Table(f"{len(rows)} weights" if rows else "", columns)
    seen = {row.get("quantizer"): row.get("seen") or {} for row in evidence.get("layers") or []}
    most = {key: max((row.get(key) or 0 for _, row in rows), default=0) for key in ("bytes", "bit_operations")}
    for i, row in rows:
        get = row.get
        inputs = [db for q in get("reads") or () if (db := seen.get(q, {}).get("sqnr_db")) is not None]
        cells = [
            words_cell(shown_name(row)), words_cell(get("scheme")), words_cell(get("input")),
            number_cell(get("bytes"), bytes_text, most["bytes"]),
            number_cell(get("bit_operations"), count_text, most["bit_operations"]),
            number_cell(get("latency_share"), percent_text, 1.0), number_cell(get("sqnr_db"), _decibels),
            number_cell(min(inputs, default=None), _decibels),
        ]  # fmt: skip
        if metric:
            for part in ("only", "all_but"):
                value = ((get("sensitivity") or {}).get(part) or {}).get(metric)
                cells.append(Cell(metric_text(metric, value), value))
        table.rows.append(cells)
        table.opens.append(keys[i])
    return table


def _layers_note(summary: Summary, evidence: Mapping[str, Any]) -> str:
    """Where the numbers of the table come from."""
    latency = evidence.get("latency") or {}
    note = "Open a layer for histograms on its grid, and clipping against rounding."
    if evidence.get("samples"):
        note += f" Activations are those of {evidence['samples']} test samples."
    if latency.get("measured"):
        note += (
            f" Time is each step's share of the integer network's own runtime, {time_text(latency['total_ms'])} ms at "
            f"batch {latency['batch']}; {percent_text(latency['other_share'])} goes into what has no weights."
        )
    elif latency:
        note += " Times were not measured, as the network runs by its own code: the share is of multiplications."
    return note


def _edges_table(evidence: Mapping[str, Any], keys: Mapping[int, str]) -> Table:
    """One row a quantized activation."""
    rows = [(i, row) for i, row in enumerate(evidence.get("layers") or []) if row.get("kind") == "edge"]
    columns = [
        Column("Activation"), Column("Scheme"), Column("Read by"), Column("Scale", True), Column("SQNR (dB)", True),
        Column("Clipped", True, "share of values beyond the grid"), Column("Levels used", True),
    ]  # fmt: skip
    table = Table(f"{len(rows)} quantized activations", columns)
    for i, row in rows:
        seen = row.get("seen") or {}
        used = seen.get("levels_used")
        table.rows.append([
            words_cell(shown_name(row)), words_cell(row.get("scheme")), words_cell(", ".join(row.get("readers") or [])),
            Cell(chart_data.scale_text(row.get("scale_min"), row.get("scale_max")) or MISSING, row.get("scale_max")),
            number_cell(seen.get("sqnr_db"), _decibels),
            number_cell(seen.get("clipped"), lambda x: MISSING if x is None else f"{amount_text('accuracy', x)} %"),
            Cell(MISSING if used is None else f"{used} of {seen['levels_total']}", used),
        ])  # fmt: skip
        table.opens.append(keys[i])
    return table


def _predictions(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Changed predictions in words, for the template."""
    if not found:
        return None
    of = "positions" if any(len(entry["index"]) > 1 for entry in found["worst"]) else "test samples"
    text = (
        f"Of {found['positions']:,} {of}, {found['introduced']:,} were right in the float network and are wrong in the "
        f"quantized one; {found['repaired']:,} the other way round."
    )
    if found["introduced"] > len(found["worst"]):
        text += f" Shown are the {len(found['worst'])} whose true class lost most of its probability."
    worst = []
    for entry in found["worst"]:
        words = {f"{key}_text": _visible(entry[key]) for key in ("label", "before", "after")}
        worst.append({**entry, **words, "passage": _visible(entry.get("text", "")[-60:])})
    return {**found, "text": text, "worst": worst}


def _visible(text: str) -> str:
    """White space that would not be seen, as signs."""
    signs = text.replace("\n", "\N{RETURN SYMBOL}").replace("\t", "\N{RIGHTWARDS ARROW}")
    return "\N{OPEN BOX}" if text == " " else signs


def _files_table(summary: Summary) -> Table:
    columns = [Column("Stage"), Column("File"), Column("Size", True)]
    table = Table("Files, relative to the run's directory", columns, sortable=False)
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
