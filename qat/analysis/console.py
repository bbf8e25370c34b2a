"""A run in the terminal: two tables and a closing sentence. Tables fit 80 columns."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qat.analysis.predictions import LEVEL
from qat.analysis.summary import (
    MISSING,
    PAIRS,
    STAGES,
    Stage,
    Summary,
    amount_text,
    bytes_text,
    difference_text,
    is_share,
    lower_is_better,
    metric_names,
    metric_text,
    percent_text,
    pick_metric,
    share_text,
    stages,
    time_text,
)


def new_table(title: str | None = None) -> Table:
    """An empty table in the style of all tables here. It has no blank lines around it."""
    return Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


def heading(name: str) -> Text:
    """A column's name on one line a word, so that a long name does not make a wide column.

    >>> heading("MulticlassF1Score").plain.split()
    ['Multiclass', 'F1', 'Score']
    """
    return Text(re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[_/\s]+", "\n", name))


def summary_table(summary: Summary) -> Table:
    """One row a stage: metrics, difference to float, file size and latency.

    The difference is that of the first metric: in points (hundredths) for shares, else as it is. A second metric has
    a column of its own; more than two share one column, a line each.

    Args:
        summary: the content of a run's `summary.json`.
    """
    main, *others = metric_names(summary) or ["metric"]
    table = new_table(summary.get("name"))
    table.add_column("Stage", min_width=10)
    columns = [heading(main), Text("to\nfloat,\npoints" if is_share(main) else "to\nfloat")]
    if others:
        columns.append(heading(others[0]) if len(others) == 1 else Text("other\nmetrics"))
    columns += [Text("size"), Text("of\nfloat"), Text("ms,\nbatch\n1"), Text("ms,\nbatch\n64")]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for stage in stages(summary):
        cells: list[RenderableType] = [
            Text(stage.label, style="bold" if stage.key == "qat" else ""),
            metric_text(main, stage.metrics.get(main)),
            difference_text(main, stage.gains.get(main)),
        ]
        if len(others) == 1:
            cells.append(metric_text(others[0], stage.metrics.get(others[0])))
        elif others:
            names = [f"{name} " if len(name) < 8 else f"{heading(name)}\n" for name in others]
            values = [metric_text(name, stage.metrics.get(name)) for name in others]
            cells.append(Text("\n".join(name + value for name, value in zip(names, values, strict=True))))
        cells += [bytes_text(stage.size), percent_text(stage.ratio)]
        cells += [time_text(stage.latency.get(batch)) for batch in ("1", "64")]
        table.add_row(*cells)
    return table


def layer_parity_table(layers: Sequence[dict[str, Any]]) -> Table:
    """One row a layer, of `Parity.to_dict(layers=True)`: how far two forms of it are apart, given equal inputs."""
    table = new_table("Layer by layer, given equal inputs")
    table.add_column("Layer", overflow="fold")
    for name in ("largest,\nin steps", "mean,\nin steps", "equal\nvalues", "at\nties"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in layers:
        numbers = [number_text(row["max_steps"]), number_text(row["mean_steps"]), share_text(row["equal_share"])]
        table.add_row(Text(row["name"]), *numbers, str(row["ties"]))
    return table


def parity_table(summary: Summary, pairs: Mapping[str, str] = PAIRS) -> Table:
    """One row a pair of stages: how far their outputs are from each other.

    Red are the pairs of a file that does not hold the limits. The last column is the difference of the first metric.
    """
    table = new_table("Parity")
    table.add_column("Pair", overflow="fold")
    for name in ("largest\ndifference", "largest,\nin steps", "same\nprediction", "equal\nvalues"):
        table.add_column(name, justify="right", no_wrap=True)
    parity, failed = summary.get("parity") or {}, summary.get("failed") or {}
    metric = pick_metric(name for pair in parity.values() for name in pair.get("metrics") or ())
    if metric is not None:
        table.add_column(
            Text(f"{heading(metric)},\npoints") if is_share(metric) else heading(metric), justify="right", no_wrap=True
        )
    for key, label in pairs.items():
        if pair := parity.get(key):
            cells = [number_text(pair.get("max_abs")), number_text(pair.get("max_steps"))]
            cells += [share_text(pair.get("agreement")), share_text(pair.get("equal_share"))]
            if metric is not None:
                cells.append(difference_text(metric, (pair.get("metrics") or {}).get(metric)))
            table.add_row(label, *cells, style="red" if any(key.endswith(f"_{name}") for name in failed) else None)
    return table


def number_text(value: float | None) -> str:
    """A number to two or three significant digits."""
    return MISSING if value is None else f"{value:.3g}"


def verdict(summary: Summary) -> str:
    """One sentence: whether QAT was worth it over PTQ in this run, in numbers.

    A difference that shows as nought is not called better or worse, nor is one that a paired test on the same samples
    (`summary["paired"]`, from `qat.analysis.predictions.compare`) gives a probability of 5 % or more. Without such a
    test it is one that is one test sample (of `summary["test_samples"]`, where present) or less.

    Args:
        summary: the content of a run's `summary.json`.
    """
    names = metric_names(summary)
    found = {stage.key: stage for stage in stages(summary) if names and names[0] in stage.metrics}
    if not found:
        return "This run measured no stage."
    metric = names[0]

    def value(key: str) -> str:
        return metric_text(metric, found[key].metrics[metric])

    qat, ptq = found.get("qat"), found.get("ptq")
    if qat is None and ptq is None:
        first = next(iter(found))
        measured = f"{metric} {value(first)}"
        return (
            f"Float only: {measured}; nothing was quantized." if first == "float" else f"{STAGES[first]}: {measured}."
        )
    if qat is None and ptq is not None:
        return f"PTQ alone: {metric} {value('ptq')}{_beside_float(metric, ptq)}; QAT was not run to compare with."
    assert qat is not None
    if ptq is None:
        return f"QAT: {metric} {value('qat')}{_beside_float(metric, qat)}; PTQ was not run to compare with."

    difference = qat.metrics[metric] - ptq.metrics[metric]
    amount, nought = amount_text(metric, difference), difference_text(metric, difference)[0] not in "+\N{MINUS SIGN}"
    if nought:
        tail = _beside_float(metric, qat)
        return f"QAT was not needed here: {metric} {value('qat')}, the same as PTQ{tail}."
    both = f"{metric} {value('qat')} against {value('ptq')} for PTQ"
    counted, test = "", (summary.get("paired") or {}).get("ptq_qat")
    if test is not None:
        counted = f" ({paired_text(test)})"
        if test["p"] >= LEVEL:
            return f"QAT and PTQ cannot be told apart here: {both}{counted}{_beside_float(metric, qat)}."
    elif (total := summary.get("test_samples")) and "accuracy" in metric.lower():
        samples = abs(difference) * total
        if samples <= 1 + 1e-6:
            return f"QAT and PTQ cannot be told apart here: {both}, within one of {total} test samples."
        counted = f" ({samples:.0f} of {total} test samples)"
    better = (difference > 0) != lower_is_better(metric)
    opening, word = ("QAT was worth it here", "better") if better else ("QAT was not worth it here", "worse")
    unit = " points" if is_share(metric) else ""
    tail = _beside_float(metric, qat)
    beyond = (summary.get("paired") or {}).get("float_qat")
    if better and beyond is not None and beyond["p"] < LEVEL and " better than float" in tail:
        tail += ", so a part of it is the longer training"
    return f"{opening}: {both}, {amount}{unit} {word}{counted}{tail}."


def paired_text(test: Mapping[str, Any]) -> str:
    """A paired test in words.

    >>> paired_text({"by": "correct", "gained": 8, "lost": 2, "samples": 359, "p": 0.10938, "test": "McNemar"})
    'of 359 test samples 8 gained and 2 lost, McNemar p = 0.11'
    """
    words = ("gained", "lost") if test["by"] == "correct" else ("better", "worse")
    counts = f"of {test['samples']} test samples {test['gained']} {words[0]} and {test['lost']} {words[1]}"
    return f"{counts}, {test['test']} {p_text(test['p'])}"


def p_text(p: float) -> str:
    """A probability as it is written: `p = 0.03`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _beside_float(metric: str, stage: Stage) -> str:
    """`, 0.22 points worse than float`; empty where float was not measured."""
    gain = stage.gains.get(metric)
    if gain is None:
        return ""
    if difference_text(metric, gain)[0] not in "+\N{MINUS SIGN}":
        return ", level with float"
    word = "better" if (gain > 0) != lower_is_better(metric) else "worse"
    return f", {amount_text(metric, gain)}{' points' if is_share(metric) else ''} {word} than float"
