"""What a run's `summary.json` says: its stages and metrics, and how their numbers are written.

Everything that shows a summary (terminal, HTML, plots, sweeps) reads it through this file, so that the same number
looks the same everywhere.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qat.export.formats import EXPORTERS
from qat.export.parity import pairs_of

Summary = dict[str, Any]

FILES = {name: exporter.label for name, exporter in EXPORTERS.items()}
STAGES = {"float": "Float", "ptq": "PTQ", "qat": "QAT", **FILES}
"""Key in `summary["stages"]` -> what people read, in the order of a run."""

PAIRS = {f"{a}_{b}": f"{STAGES[a]} / {STAGES[b]}" for a, b in pairs_of(FILES)}
"""Key in `summary["parity"]` -> what people read."""

MISSING = "\N{EN DASH}"
"""Stands where there is no number."""

_LOWER = re.compile(
    r"loss|error|perplexity|bits_?per|divergence|distance|hamming|(^|[^a-z])(wer|cer|mae|mse|rmse|mape|nll|fid|lpips)([^a-z]|$)"
)
_SHARE = re.compile(
    r"accuracy|precision|recall|f1|f_?beta|auroc|auc|specificity|jaccard|iou|dice|exact_?match|top_?\d"
    r"|(^|[^a-z])(acc|map)([^a-z]|$)"
)


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name improves downwards.

    >>> [lower_is_better(name) for name in ("accuracy", "val_loss", "bits_per_character", "wer", "power")]
    [False, True, True, True, False]
    """
    return bool(_LOWER.search(metric.lower()))


def is_share(metric: str) -> bool:
    """Whether a metric of this name is a share between 0 and 1, shown in percent.

    >>> [is_share(name) for name in ("accuracy", "BinaryF1Score", "loss", "psnr")]
    [True, True, False, False]
    """
    return bool(_SHARE.search(metric.lower())) and not lower_is_better(metric)


def pick_metric(names: Iterable[str]) -> str | None:
    """The metric to judge by: an accuracy if there is one, else the first that is not a loss, else the first.

    >>> pick_metric(["loss", "f1", "accuracy"]), pick_metric(["loss", "psnr"]), pick_metric(["loss"]), pick_metric([])
    ('accuracy', 'psnr', 'loss', None)
    """
    names = list(names)
    ranked = sorted(names, key=lambda name: ("accuracy" not in name.lower(), "loss" in name.lower()))
    return ranked[0] if ranked else None


@dataclass(frozen=True)
class Stage:
    """One stage of a run, in numbers; None or a missing key where nothing was measured.

    Attributes:
        key: key of STAGES.
        label: what people read.
        metrics: metric name -> value.
        gains: metric name -> value minus float's (its sign is that of the numbers, not of better or worse).
        size: bytes of the file.
        ratio: size / float's size.
        latency: batch size as a string -> milliseconds.
    """

    key: str
    label: str
    metrics: dict[str, float]
    gains: dict[str, float]
    size: int | None
    ratio: float | None
    latency: dict[str, float]


def stages(summary: Summary) -> list[Stage]:
    """The stages that the run has, in the order of STAGES."""
    found = summary.get("stages") or {}
    base = found.get("float") or {}
    base_metrics, base_size = _numbers(base.get("metrics")), base.get("bytes")
    rows = []
    for key, label in STAGES.items():
        if not (stage := found.get(key)):
            continue
        metrics, size = _numbers(stage.get("metrics")), stage.get("bytes")
        rows.append(
            Stage(
                key=key,
                label=label,
                metrics=metrics,
                gains={n: v - base_metrics[n] for n, v in metrics.items() if n in base_metrics and key != "float"},
                size=size,
                ratio=size / base_size if size is not None and base_size else None,
                latency=_numbers(stage.get("latency_ms")),
            )
        )
    return rows


def stage_of(column: str) -> tuple[str, str] | None:
    """`<stage>_<metric>`, a column of a sweep's results, in two; None for another column.

    >>> stage_of("int8_val_loss"), stage_of("weight_bits")
    (('int8', 'val_loss'), None)
    """
    fits = [key for key in STAGES if column.startswith(f"{key}_")]
    return (max(fits, key=len), column[len(max(fits, key=len)) + 1 :]) if fits else None


def metric_names(summary: Summary) -> list[str]:
    """Every metric of the run; the one to judge by (`pick_metric`) comes first."""
    names = list(dict.fromkeys(name for stage in stages(summary) for name in stage.metrics))
    main = pick_metric(names)
    return sorted(names, key=lambda name: name != main)


def _numbers(values: dict[str, Any] | None) -> dict[str, float]:
    return {str(k): float(v) for k, v in (values or {}).items() if v is not None}


def metric_text(metric: str, value: float | None) -> str:
    """A metric's value: shares in percent with two decimals, others with four significant digits.

    >>> metric_text("accuracy", 0.97777), metric_text("loss", 0.081234), metric_text("loss", None) == MISSING
    ('97.78 %', '0.08123', True)
    """
    if value is None:
        return MISSING
    return f"{100 * value:.2f} %" if is_share(metric) else f"{value:.4g}"


def amount_text(metric: str, difference: float) -> str:
    """The size of a difference without its sign: shares in points, others as they are.

    >>> amount_text("accuracy", -0.0167), amount_text("loss", 0.0123)
    ('1.67', '0.0123')
    """
    return f"{abs(100 * difference):.2f}" if is_share(metric) else f"{abs(difference):.3g}"


def difference_text(metric: str, difference: float | None) -> str:
    """A difference with its sign; none where it shows as nought.

    >>> difference_text("accuracy", 0.0022), difference_text("accuracy", -1e-9)
    ('+0.22', '0.00')
    """
    if difference is None:
        return MISSING
    text = amount_text(metric, difference)
    if math.isnan(difference) or float(text) == 0:
        return text
    return ("+" if difference > 0 else "\N{MINUS SIGN}") + text


def bytes_text(size: float | None) -> str:
    """A file size with decimal units.

    >>> bytes_text(812), bytes_text(41234), bytes_text(2_500_000)
    ('812 B', '41.2 KB', '2.50 MB')
    """
    if size is None:
        return MISSING
    if size < 1000:
        return f"{size:.0f} B"
    if size < 999_950:
        return f"{size / 1e3:.1f} KB"
    return f"{size / 1e6:.2f} MB" if size < 999_995_000 else f"{size / 1e9:.2f} GB"


def percent_text(ratio: float | None) -> str:
    """A ratio in whole percent, or with a decimal below ten."""
    if ratio is None:
        return MISSING
    return f"{100 * ratio:.1f} %" if ratio < 0.0995 else f"{100 * ratio:.0f} %"


def time_text(value: float | None) -> str:
    """A time to about three digits, never in exponents.

    >>> time_text(0.4), time_text(3.14159), time_text(31.4159), time_text(314.159)
    ('0.40', '3.14', '31.4', '314')
    """
    if value is None:
        return MISSING
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def share_text(share: float | None) -> str:
    """A share in percent, rounded down, so that only a full agreement reads 100 %.

    >>> share_text(1.0), share_text(0.99998), share_text(0.99999999), share_text(0.5)
    ('100 %', '99.998 %', '99.9999 %', '50 %')
    """
    if share is None:
        return MISSING
    if share >= 1:
        return "100 %"
    return f"{min(math.floor(round(share * 1e6, 3)) / 1e4, 99.9999):.7g} %"


def number(text: str) -> int | float | str:
    """The number that a text is, else the text.

    >>> number("4"), number("1e-3"), number("w4a4")
    (4, 0.001, 'w4a4')
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def parity_notes(summary: Summary) -> list[str]:
    """What was not compared, and why, a sentence each."""
    pairs = (summary.get("parity") or {}).values()
    return list(dict.fromkeys(note for pair in pairs for note in pair.get("notes") or ()))


def kernel_lines(summary: Summary) -> list[str]:
    """What engines run of each exported file, a sentence a file: how often which kernel, and what stayed float."""
    lines = []
    for key, ran in (summary.get("kernels") or {}).items():
        counts = ", ".join(f"{count} {name}" for name, count in ran["counts"].items())
        floating = ran["floating"]
        rest = f"in float: {', '.join(floating)}" if floating else "nothing is computed in float"
        lines.append(f"{STAGES.get(key, key)} in {ran['engine']}: {counts}; {rest}.")
    return lines
