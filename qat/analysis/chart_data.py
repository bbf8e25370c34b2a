"""What the charts of a report draw, as plain data that stands in the page; and the words beside them."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qat.analysis.seen import MULTIPLES
from qat.analysis.summary import (
    Summary,
    bytes_text,
    is_share,
    metric_names,
    metric_text,
    percent_text,
    time_text,
)

MOST_POINTS = 1000
"""Of a training curve; longer ones are thinned."""
TONES = {"train": "var(--float)", "val": "var(--qat)", "": "var(--other)"}

Curves = dict[str, dict[str, list[tuple[int, float]]]]
Row = Mapping[str, Any]


def page_data(
    summary: Summary, evidence: Mapping[str, Any], history: Sequence[Row], keys: Mapping[int, str],
) -> str:  # fmt: skip
    """The data of all charts as JSON that may stand inside a script element.

    Args:
        summary: the content of `summary.json`.
        evidence: the content of `report.json`.
        history: from `qat.analysis.plots.read_history`.
        keys: position in `evidence["layers"]` -> key of the row that opens it.
    """
    rows = evidence.get("layers") or []
    wanted = {quantizer for i in keys for quantizer in _quantizers(rows[i])}
    data = {
        "training": training(history, evidence.get("phases") or []),
        "multiples": list(MULTIPLES),
        "layers": {key: {"facts": facts(rows[i]), "tensors": tensors(rows[i], rows)} for i, key in keys.items()},
        "seen": {r["quantizer"]: _compact(r["seen"]) for r in rows if r.get("seen") and r.get("quantizer") in wanted},
        "sensitivity": sensitivity(summary, evidence, keys),
    }
    data = short(data) | {"sensitivity": short(data["sensitivity"], 9)}  # of these, small differences are shown
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def short(value: Any, digits: int = 4) -> Any:
    """Plain data with floats of so many significant digits; what is not finite becomes None.

    >>> short({"a": [1 / 3, 5, float("nan")]})
    {'a': [0.3333, 5, None]}
    """
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: short(v, digits) for key, v in value.items()}
    return [short(v, digits) for v in value] if isinstance(value, list | tuple) else value


def _compact(seen: Row) -> dict[str, Any]:
    curve = seen["error_curve"] and {key: v for key, v in seen["error_curve"].items() if key != "multiples"}
    return {**seen, "error_curve": curve}


def training(history: Sequence[Row], phases: Sequence[Row]) -> dict[str, Any]:
    """Panels of curves, and the modes of quantizers as stretches of steps, one behind the other over all phases."""
    curves, regions = training_curves(history)
    stretches = []
    for name, start, end in regions:
        if name == "qat" and phases:
            stretches += [{"mode": p["mode"], "start": start + p["start"], "end": start + p["end"]} for p in phases]
        else:
            stretches.append({"mode": "float" if name == "float" else "quantize", "start": start, "end": end})
    panels = [
        {
            "title": name, "share": is_share(name), "small": name == "learning rate",
            "lines": [
                {"label": part or name, "tone": TONES[part.partition(" ")[0] if part[:3] in ("tra", "val") else ""],
                 "kind": "thin" if part.endswith("step") else "line", **_thinned(points)}
                for part, points in lines.items()
            ],
        }
        for name, lines in curves.items()
    ]  # fmt: skip
    last = max([end for _, _, end in regions] + [p["end"] for p in stretches], default=0)
    return {"panels": panels, "phases": stretches, "steps": [regions[0][1] if regions else 0, last]}


def _thinned(points: Sequence[tuple[int, float]]) -> dict[str, list[Any]]:
    stride = -(-len(points) // MOST_POINTS)
    kept = [*points[::stride], *([points[-1]] if len(points) % stride != 1 and stride > 1 else [])]
    return {"x": [x for x, _ in kept], "y": [y for _, y in kept]}


def training_curves(history: Sequence[Row]) -> tuple[Curves, list[tuple[str, int, int]]]:
    """Metric -> part ("train", "val step", ...) -> points, loss first; and (phase, first step, last step).

    Steps that restart with a phase continue the last one. Columns named test_* are left out, and so is what is logged a
    layer (a name with a path in it).
    """
    curves: Curves = {}
    regions: list[tuple[str, int, int]] = []
    for row in history:
        phase = str(row.get("phase", ""))
        if not regions or regions[-1][0] != phase:
            start = regions[-1][2] if regions else 0
            regions.append((phase, start, start))
            for lines in curves.values():  # the lines of the phase before end
                for points in lines.values():
                    points.append((start, math.nan))
        _, start, end = regions[-1]
        x = start + int(row.get("step", 0)) + 1  # Lightning's first step is 0
        regions[-1] = (phase, start, max(end, x))
        for key, value in row.items():
            if key in ("phase", "step", "epoch") or key.startswith("test") or not isinstance(value, int | float):
                continue
            name, part = _split(key)
            if "/" not in name:
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


def sensitivity(summary: Summary, evidence: Mapping[str, Any], keys: Mapping[int, str]) -> dict[str, Any] | None:
    """Metrics a layer; None where nothing was measured."""
    costs, rows = evidence.get("sensitivity") or {}, evidence.get("layers") or []
    measured = [(i, row) for i, row in enumerate(rows) if row.get("sensitivity") and i in keys]
    units = list({_unit_name(row): (i, row) for i, row in reversed(measured)}.values())[::-1]  # of all its weights one
    if not units:
        return None
    metrics = sensitivity_metrics(summary, costs)
    found: dict[str, Any] = {
        "metrics": metrics, "shares": [m for m in metrics if is_share(m)], "names": [_unit_name(r) for _, r in units],
        "keys": [keys[i] for i, _ in units], "float": costs["float"], "quantized": costs["quantized"],
    }  # fmt: skip
    for part in ("only", "all_but"):
        found[part] = {m: [row["sensitivity"][part][m] for _, row in units] for m in metrics}
    return found


def sensitivity_metrics(summary: Summary, costs: Mapping[str, Any]) -> list[str]:
    """Those measured, the finest first: a loss changes where an accuracy of few samples stands still."""
    known = [name for name in metric_names(summary) if name in (costs.get("float") or {})]
    return list(dict.fromkeys([*(["loss"] if "loss" in (costs.get("float") or {}) else []), *known]))


def sensitivity_text(summary: Summary, evidence: Mapping[str, Any]) -> str:
    """What was measured on how much, and what was left out."""
    costs = evidence["sensitivity"]
    main = next((name for name in metric_names(summary) if name in costs["float"]), "loss")
    of = f"the whole test set, {costs['samples']} samples" if costs["samples"] == summary.get("test_samples") else (
        f"{costs['samples']} of {summary.get('test_samples', 'all')} test samples"
    )  # fmt: skip
    text = (
        f"Measured on {of}: {main} is {metric_text(main, costs['float'][main])} with the trained weights in float and "
        f"{metric_text(main, costs['quantized'][main])} with everything quantized. A layer is its weights and the "
        f"tensors that it reads; a tensor that no layer reads stands by itself."
    )
    if costs["left_out"]:
        known = {row.get("layer", row["name"]): _unit_name(row) for row in evidence["layers"]}
        names = [known.get(name, name) for name in costs["left_out"]]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        text += f" {len(names)} were left out for lack of time (report.sensitivity.max_seconds): {listed}."
    return text


def shown_name(row: Row) -> str:
    """A layer's path, or what a tensor is called."""
    return str(row.get("tensor") or row.get("name") or "")


def _unit_name(row: Row) -> str:
    """What sensitivity was measured of: a layer by its path, a tensor that no layer reads said to be one."""
    return f"{shown_name(row)} (activation)" if row.get("kind") == "edge" else str(row.get("layer") or shown_name(row))


def facts(row: Row) -> list[list[str]]:
    """What an opened row says in words: [term, text]."""
    get = row.get
    time = f"{time_text(row['latency_ms'])} ms, {percent_text(row['latency_share'])}" if get("latency_ms") else None
    found = {
        "Kind": get("kind") if get("kind") != "edge" else None,
        "Scheme": get("scheme"),
        "Reads": get("input"),
        "Read by": ", ".join(get("readers") or []),
        "Why": get("reason"),
        "Shape": " \N{MULTIPLICATION SIGN} ".join(map(str, get("shape") or [])),
        "Parameters": f"{row['parameters']:,}" if get("parameters") else None,
        "Size": bytes_text(row["bytes"]) + " in the int8 checkpoint, scales included" if get("bytes") else None,
        "Multiplications": f"{row['macs']:,.0f} a sample" if get("macs") else None,
        "Bit-operations": f"{count_text(row['bit_operations'])} a sample" if get("bit_operations") else None,
        "Time": time,
        "Scale": scale_text(get("scale_min"), get("scale_max")),
    }
    return [[term, str(text)] for term, text in found.items() if text]


def scale_text(low: float | None, high: float | None) -> str:
    """`0.001 to 0.02`; one number where both are the same."""
    return " to ".join(dict.fromkeys(f"{v:.3g}" for v in (low, high) if v is not None))


def count_text(number: float | None) -> str:
    """A large count in thousands, millions, ...

    >>> count_text(1234), count_text(5_600_000.0), count_text(12)
    ('1.23 k', '5.6 M', '12')
    """
    if number is None:
        return "\N{EN DASH}"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g}"


def tensors(row: Row, rows: Sequence[Row]) -> list[dict[str, str]]:
    """The tensors that an opened row shows: a layer's weight and what it reads, or an activation."""
    names = {r.get("quantizer"): shown_name(r) for r in rows if r.get("kind") == "edge"}
    if row.get("kind") == "edge":
        return [{"title": f"Activation {shown_name(row)}", "quantizer": row["quantizer"]}]
    shown = [{"title": "Weights", "quantizer": row["quantizer"]}] if row.get("quantizer") else []
    return shown + [{"title": f"Reads {names.get(q, q)}", "quantizer": q} for q in row.get("reads") or ()]


def _quantizers(row: Row) -> list[str]:
    return [q for q in (row.get("quantizer"), *(row.get("reads") or ())) if q]
