"""What a run's report shows beside the metrics: what quantizers see, sensitivity, time, and what changed its mind."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.analysis import seen
from qat.analysis.latency import step_times
from qat.analysis.layers import layer_table
from qat.analysis.predictions import ScoreBook, changed, compare, show
from qat.analysis.sensitivity import sensitivity
from qat.analysis.summary import FILES, Summary, is_share, metric_names
from qat.training.stages import BATCH, task_metrics

PAIRED = (("float", "ptq"), ("float", "qat"), ("ptq", "qat"), *(("qat", name) for name in FILES))
"""Stages that are compared sample by sample."""
LATENCY_BATCH = 64


def paired_tests(scores: ScoreBook, summary: Summary) -> dict[str, dict[str, Any]]:
    """A paired test of every two stages that are compared, by "stage_stage"; none where outputs are no classes."""
    by = "correct" if is_share(next(iter(metric_names(summary)), "")) else "loss"
    return {f"{a}_{b}": compare(scores[a], scores[b], by) for a, b in PAIRED if a in scores and b in scores}


def look_inside(
    net: nn.Module, lowered: nn.Module, task: Any, inputs: Tensor, targets: Tensor, settings: Mapping[str, Any],
    progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Measure a trained network's layers, as plain data.

    Args:
        net: prepared, with its final weights, simulating.
        lowered: from it, for times; `net` itself where its own code runs.
        task: has `loss` and `metrics()`.
        inputs, targets: the test set.
        settings: `samples` (for histograms), `sensitivity` (`samples`, `max_seconds`).
        progress: show a bar while sensitivity is measured.

    Returns:
        `layers` (rows of `layer_table`, with `seen` (`qat.analysis.seen.describe`), `sensitivity`, `bit_operations`,
        `latency_ms` and `latency_share`), `sensitivity` (without its units), `latency` (`measured`, `batch`, `total_ms`,
        `other_share`), `samples` (that were looked at for histograms).
    """  # noqa: E501
    chosen = inputs[_spread(len(inputs), settings["samples"])]
    found = {name: seen.describe(s) for name, s in seen.see(net, chosen.split(BATCH)).items()}
    rows = layer_table(net)
    costs = sensitivity(
        net, _measure(task, inputs, targets), min(settings["sensitivity"]["samples"], len(inputs)),
        settings["sensitivity"]["max_seconds"], _bar if progress and sys.stdout.isatty() else iter,
    )  # fmt: skip
    by_unit = {unit["name"]: {key: unit[key] for key in ("only", "all_but")} for unit in costs.pop("units")}
    for row in rows:
        row["seen"] = found.get(row.get("quantizer", ""))
        row["sensitivity"] = by_unit.get(row.get("layer", row["name"]))
        if row.get("macs"):
            row["bit_operations"] = row["macs"] * row["bits"] * row["input_bits"]
    return {
        "layers": rows, "sensitivity": costs, "latency": _add_latency(rows, lowered, inputs[:LATENCY_BATCH]),
        "samples": len(chosen),
    }  # fmt: skip


def _add_latency(rows: Sequence[dict[str, Any]], lowered: nn.Module, batch: Tensor) -> dict[str, Any]:
    """Give each layer its share of the time of the integer network, or of the multiplications where there is none."""
    times = step_times(lowered, batch)
    total, taken = sum(times.values()), set[str]()
    if total:
        for row in rows:
            layer = row.get("layer")
            if layer in times and layer not in taken:
                taken.add(layer)
                row["latency_ms"], row["latency_share"] = times[layer], times[layer] / total
        other = sum(ms for name, ms in times.items() if name not in taken)
        return {"measured": True, "batch": len(batch), "total_ms": total, "other_share": other / total}
    macs = sum(row.get("macs") or 0 for row in rows)
    for row in rows:
        if macs and row.get("macs"):
            row["latency_share"] = row["macs"] / macs
    return {"measured": False, "batch": len(batch), "total_ms": None, "other_share": None}


def changed_predictions(scores: ScoreBook, inputs: Tensor, targets: Tensor, data: Any) -> dict[str, Any] | None:
    """The predictions that quantization spoilt, with what a reader can judge by; None where outputs are no classes."""
    if "float" not in scores or "qat" not in scores:
        return None
    return show(changed(scores["float"], scores["qat"], targets), inputs, data.describe())


def _spread(length: int, most: int) -> Tensor:
    """Indices of at most so many samples, from all over the test set."""
    return torch.linspace(0, length - 1, min(length, most)).round().long()


def _measure(task: Any, inputs: Tensor, targets: Tensor) -> Callable[[nn.Module, int], dict[str, float]]:
    """Metrics and loss of a network on samples from all over the test set."""

    @torch.no_grad()
    def measure(net: nn.Module, samples: int) -> dict[str, float]:
        picked = _spread(len(inputs), samples)
        losses: list[float] = []

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in zip(inputs[picked].split(BATCH), targets[picked].split(BATCH), strict=True):
                outputs = net(x)
                losses.append(float(task.loss(outputs, y)) * len(x))
                yield outputs, y

        metrics = task_metrics(task, batches())
        return {"loss": sum(losses) / samples} | metrics

    return measure


def _bar(units: Sequence[Any]) -> Any:
    from rich.progress import track

    return track(units, description="Sensitivity of each layer", transient=True)
