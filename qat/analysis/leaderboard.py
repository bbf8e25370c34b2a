"""Any set of runs side by side: what they measured, what differs between them, mean and deviation over seeds."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from qat.analysis.runs import NOT_OF_THE_JOB, find_runs, status_of, summary_of
from qat.analysis.summary import FILES, lower_is_better, metric_names, stages

Config = dict[str, Any]

COSTS = {"bytes": "size", "latency_ms": "latency", "bit_operations": "bit operations"}
"""What is paid for a metric -> what people read."""
ENGINES = ("onnx", "openvino", "int8", "qat", "ptq", "float")
"""Stages by whose latency runs are compared: the first that any run measured."""


@dataclass
class Entry:
    """A run.

    Attributes:
        folder: its directory.
        status: finished, failed, pruned or unfinished.
        config: what tells it from others: choices of groups (`quant`), and settings (`quant.weight.bits`).
        data, metric: the data set, and the name of the metric that it is judged by.
        values: stage -> that metric.
        value: that of the last stage, of the file that is shipped.
        costs: key of COSTS -> number.
        latencies: stage -> milliseconds of one sample.
        why: of a run that did not finish, the last line of what went wrong.
    """

    folder: Path
    status: str
    config: Config = field(default_factory=dict)
    data: str = ""
    metric: str = ""
    values: dict[str, float] = field(default_factory=dict)
    value: float = math.nan
    costs: dict[str, float] = field(default_factory=dict)
    latencies: dict[str, float] = field(default_factory=dict)
    why: str = ""


@dataclass
class Group:
    """Runs that differ in their seeds only.

    Attributes:
        config: the settings that differ from other groups.
        entries: the runs.
        best: no other group is as good and as cheap, by each cost: keys of COSTS for which that holds.
    """

    config: Config
    entries: list[Entry]
    best: set[str] = field(default_factory=set)

    def mean(self, key: str = "value") -> float | None:
        """The mean over seeds of the metric (`value`), of a stage's metric (`stage:qat`) or of a cost."""
        found = self._all(key)
        return fmean(found) if found else None

    def deviation(self, key: str = "value") -> float | None:
        """The sample's standard deviation; None of fewer than two runs."""
        found = self._all(key)
        return stdev(found) if len(found) > 1 else None

    def _all(self, key: str) -> list[float]:
        if key == "value":
            return [entry.value for entry in self.entries if not math.isnan(entry.value)]
        stage = key.removeprefix("stage:")
        tables = [entry.values if key.startswith("stage:") else entry.costs for entry in self.entries]
        return [table[stage] for table in tables if stage in table]


@dataclass
class Board:
    """Runs that can be compared: the same data and metric.

    Attributes:
        data, metric: of all of them.
        groups: best first.
        changed: settings that differ between groups.
        engine: the stage whose latency is shown; None where none was measured.
    """

    data: str
    metric: str
    groups: list[Group]
    changed: list[str]
    engine: str | None


def read_run(folder: Path) -> Entry:
    """What a run directory says."""
    summary = summary_of(folder)
    entry = Entry(folder, status_of(folder, summary), _config(folder, summary))
    if entry.status != "finished":
        entry.why = _why(folder, summary)
    if summary is None:
        return entry
    found, names = stages(summary), metric_names(summary)
    if not found or not names:
        return Entry(folder, "failed", entry.config, why="summary.json has no stage with a metric")
    entry.data = str((summary.get("config") or {}).get("data.name", ""))
    entry.metric = names[0]
    entry.values = {stage.key: stage.metrics[names[0]] for stage in found if names[0] in stage.metrics}
    entry.value = list(entry.values.values())[-1]
    files = [stage for stage in found if stage.key in FILES and stage.size is not None]
    sized = files or [stage for stage in found if stage.key == "float" and stage.size is not None and len(found) == 1]
    if sized:
        entry.costs["bytes"] = float(sized[0].size or 0)
        entry.value = entry.values.get(sized[0].key, entry.value)
    if (operations := summary.get("bit_operations")) is not None:
        entry.costs["bit_operations"] = float(operations)
    entry.latencies = {stage.key: stage.latency["1"] for stage in found if "1" in stage.latency}
    return entry


def _config(folder: Path, summary: dict[str, Any] | None) -> Config:
    """Settings as they were composed, interpolations left as they are, and choices of groups; no nested values."""
    hydra = folder / ".hydra"
    if not (hydra / "config.yaml").is_file():
        found = dict((summary or {}).get("config") or {})
    else:
        found = dict(_flat(_yaml(hydra / "config.yaml")))
        if (hydra / "hydra.yaml").is_file():
            choices = _yaml(hydra / "hydra.yaml").get("hydra", {}).get("runtime", {}).get("choices", {})
            found = {key: value for key, value in choices.items() if not key.startswith("hydra/")} | found
    return {key: value for key, value in found.items() if key not in NOT_OF_THE_JOB and key != "name"}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    return yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif key == "rules" and isinstance(value, list) and all(isinstance(rule, dict) for rule in value):
            for rule in value:  # quant.rules[block.conv1].weight.bits
                rest = {name: part for name, part in rule.items() if name != "match"}
                yield from _flat(rest, f"{prefix}{key}[{rule.get('match')}].")
        else:
            yield f"{prefix}{key}", value


def _why(folder: Path, summary: dict[str, Any] | None) -> str:
    path = folder / ("pruned.txt" if (folder / "pruned.txt").is_file() else "error.txt")
    lines = path.read_text(encoding="utf-8").strip().splitlines() if path.is_file() else []
    if lines:
        return next((line for line in reversed(lines) if line and not line.startswith(" ")), lines[-1])
    if failed := (summary or {}).get("failed"):
        return "; ".join(f"{name} is not for use" for name in failed)
    return "summary.json is not readable" if (folder / "summary.json").is_file() else "it did not come to its end"


def is_seed(key: str) -> bool:
    """Whether a setting is a seed.

    >>> [is_seed(key) for key in ("seed", "data.seed", "seeds.count")]
    [True, True, False]
    """
    return key.rpartition(".")[2] == "seed"


def changed(configs: Sequence[Config]) -> list[str]:
    """The settings that differ, seeds apart. What follows from a group's choice (`quant=int8`) is left out.

    >>> changed([{"quant": "a", "quant.bits": 8, "lr": 1}, {"quant": "b", "quant.bits": 4, "lr": 2}])
    ['quant', 'lr']
    """
    keys = dict.fromkeys(key for config in configs for key in config if not is_seed(key))
    varied = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    groups = [key for key in varied if any(other.startswith(f"{key}.") for other in keys)]
    return [key for key in varied if not any(_follows(configs, key, group) for group in groups if key != group)]


def _follows(configs: Sequence[Config], key: str, group: str) -> bool:
    """Whether a setting below a group is the same wherever the choice is the same."""
    if not key.startswith(f"{group}."):
        return False
    seen: dict[str, str] = {}
    return all(seen.setdefault(str(c.get(group)), str(c.get(key))) == str(c.get(key)) for c in configs)


def boards(entries: Sequence[Entry]) -> list[Board]:
    """Finished runs, a board for each data set and metric.

    Seeds are averaged; of runs that are the same, seed included, the last counts. Pareto fronts are those of the means.
    """
    found: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        if entry.status == "finished":
            found.setdefault((entry.data, entry.metric), []).append(entry)
    return [_board(data, metric, members) for (data, metric), members in found.items()]


def _board(data: str, metric: str, entries: list[Entry]) -> Board:
    entries = list({str(sorted(e.config.items(), key=str)) if e.config else str(e.folder): e for e in entries}.values())
    engine = next((key for key in ENGINES if any(key in entry.latencies for entry in entries)), None)
    for entry in entries:
        if engine in entry.latencies:
            entry.costs["latency_ms"] = entry.latencies[engine]
    keys = changed([entry.config for entry in entries])
    together: dict[tuple[str, ...], Group] = {}
    for entry in entries:
        config = {key: entry.config.get(key) for key in keys}
        place = tuple(str(entry.config.get(key)) for key in keys)
        together.setdefault(place, Group(config, [])).entries.append(entry)
    sign = 1 if lower_is_better(metric) else -1
    groups = sorted(together.values(), key=lambda group: _sortable(group.mean(), sign))
    for cost in COSTS:
        priced = [(c, v, group) for group in groups if (c := group.mean(cost)) is not None
                  and (v := group.mean()) is not None]  # fmt: skip
        for i in pareto_front([(c, v) for c, v, _ in priced], lower=sign > 0):
            priced[i][2].best.add(cost)
    return Board(data, metric, groups, keys, engine)


def _sortable(value: float | None, sign: int) -> float:
    return math.inf if value is None else sign * value


def pareto_front(points: Sequence[tuple[float, float]], lower: bool = False) -> list[int]:
    """The points that no other point beats: none is as small and as good, and smaller or better.

    Args:
        points: (size, value) pairs.
        lower: whether lower values are better.

    Returns:
        Indices into `points`, by size. Equal points are all on the front, or none is.

    >>> pareto_front([(8, 0.98), (4, 0.97), (6, 0.96), (2, 0.90), (8, 0.97)])
    [3, 1, 0]
    """
    signed = [(size, value if lower else -value) for size, value in points]

    def beaten(p: tuple[float, float]) -> bool:
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in signed)

    return sorted((i for i, p in enumerate(signed) if not beaten(p)), key=lambda i: signed[i])


def short(key: str) -> str:
    """A setting's name without its groups, where it still says something.

    >>> short("quant.weight.bits"), short("optimizer.lr"), short("seed")
    ('weight.bits', 'lr', 'seed')
    >>> short("quant.rules[block.conv1].weight.bits")
    'block.conv1 weight.bits'
    """
    if "[" in key:
        return key.partition("[")[2].replace("].", " ")
    parts = key.split(".")
    return ".".join(parts[-2:] if parts[-1] in ("bits", "range", "format", "rounding", "observer") else parts[-1:])


def text(value: Any) -> str:
    """A setting's value as on the command line, numbers to four digits.

    >>> text(0.0012520653814999472), text(None), text(True)
    ('0.001252', 'null', 'true')
    """
    if isinstance(value, float):
        return f"{value:.4g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read_runs(folders: Iterable[Path | str]) -> list[Entry]:
    """Every run in some folders.

    Raises:
        FileNotFoundError: there is none.
    """
    return [read_run(folder) for folder in find_runs(folders)]


def write_csv(path: Path, entries: Sequence[Entry]) -> Path:
    """A line a run: directory, status, what differs, seeds, metrics of each stage, costs."""
    keys = [*changed([entry.config for entry in entries if entry.config]),
            *dict.fromkeys(key for entry in entries for key in entry.config if is_seed(key))]  # fmt: skip
    stage_names = dict.fromkeys(name for entry in entries for name in entry.values)
    rows = [
        {"run": str(entry.folder), "status": entry.status, "data": entry.data, "metric": entry.metric}
        | {key: entry.config[key] for key in keys if key in entry.config}
        | {"value": "" if math.isnan(entry.value) else entry.value}
        | {f"{name}_value": entry.values[name] for name in stage_names if name in entry.values}
        | {key: entry.costs[key] for key in COSTS if key in entry.costs}
        for entry in entries
    ]
    columns = ["run", "status", "data", "metric", *keys, "value", *(f"{name}_value" for name in stage_names), *COSTS]
    return _write(path, columns, rows)


def write_groups_csv(path: Path, found: Sequence[Board]) -> Path:
    """A line a configuration: runs, mean and deviation of the metric and of each cost, best first."""
    keys = list(dict.fromkeys(key for board in found for key in board.changed))
    rows = []
    for board in found:
        for group in board.groups:
            row: dict[str, Any] = {"data": board.data, "metric": board.metric, "runs": len(group.entries)}
            row |= group.config
            for key in ("value", *COSTS):
                row |= {f"{key}_mean": group.mean(key), f"{key}_deviation": group.deviation(key)}
            rows.append(row | {"best": " ".join(key for key in COSTS if key in group.best)})
    measured = [f"{key}_{what}" for key in ("value", *COSTS) for what in ("mean", "deviation")]
    return _write(path, ["data", "metric", *keys, "runs", *measured, "best"], rows)


def _write(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(columns)), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path
