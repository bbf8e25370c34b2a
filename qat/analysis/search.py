"""A search of Optuna: what it optimizes, and its plots, drawn as all others here."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qat.analysis import plots
from qat.analysis.leaderboard import COSTS, pareto_front, read_run
from qat.analysis.runs import is_finished, summary_of
from qat.analysis.summary import FILES, is_share, lower_is_better, stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {"bytes": 1e-3, "bit_operations": 1e-6}
NAMES = {"bytes": "size (KB)", "latency_ms": "latency (ms)", "bit_operations": "bit operations (millions)"}
WIDTH = 6.5
"""Inches of a figure that takes half of a page."""
MOST_PARAMETERS = 12
"""Plots with a panel a setting show so many, the most important ones."""


@dataclass(frozen=True)
class Trial:
    """One trial: `state` is complete, pruned or failed; `values` are those of the objectives, empty unless complete."""

    number: int
    state: str
    params: dict[str, Any]
    values: tuple[float, ...]


def is_down(name: str, higher_is_better: Mapping[str, bool | None]) -> bool:
    """Whether an objective is minimized.

    Args:
        name: a metric, or a key of COSTS.
        higher_is_better: of the task's metrics; None where a metric does not say.

    Raises:
        ValueError: no such objective.
    """
    if name in COSTS:
        return True
    if name not in higher_is_better:
        raise ValueError(
            f"hydra.sweeper.optimize: {name!r} is not known (valid: {', '.join([*higher_is_better, *COSTS])})"
        )
    higher = higher_is_better[name]
    return lower_is_better(name) if higher is None else not higher


def objective_values(folder: Path, names: Sequence[str]) -> list[float] | None:
    """What a run reached of each objective, of the file that it ships; None where it did not finish or measure it.

    Latencies are those of ONNX Runtime where the run exported ONNX.
    """
    if not is_finished(folder):
        return None
    summary = summary_of(folder)
    assert summary is not None
    found = stages(summary)
    shipped = next((stage for stage in found if stage.key in FILES and stage.metrics), found[-1])
    costs = dict(read_run(folder).costs)
    latencies = {stage.key: stage.latency["1"] for stage in found if "1" in stage.latency}
    measured = [latencies[key] for key in ("onnx", shipped.key) if key in latencies]
    costs |= {"latency_ms": measured[0]} if measured else {}
    values = [costs.get(name) if name in COSTS else shipped.metrics.get(name) for name in names]
    return [float(v) for v in values if v is not None and math.isfinite(v)] if None not in values else None


def read_study(folder: Path) -> tuple[list[str], list[bool], list[Trial], dict[str, float]] | None:
    """The study of a sweep: names of its objectives, whether each is minimized, its trials, importance of settings.

    The importance is for the first objective; empty where there are too few trials to tell. None without a study.
    """
    path = folder / "study.db"
    if not path.is_file():
        return None
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{path.absolute()}")
    names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    trials = [Trial(trial.number, names[trial.state.name], dict(trial.params), tuple(trial.values or ()))
              for trial in study.get_trials(deepcopy=False) if trial.state.name in names]  # fmt: skip
    down = [direction.name == "MINIMIZE" for direction in study.directions]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")  # for low values, it says: so is the target
            importance = optuna.importance.get_param_importances(
                study, target=lambda trial: trial.values[0] * (1 if down[0] else -1)
            )
    except (ValueError, RuntimeError, ZeroDivisionError):
        importance = {}  # fewer than two results, or all alike
    objectives = list(study.user_attrs.get("objectives") or [f"objective {i}" for i in range(len(down))])
    return objectives, down, trials, dict(importance)


def study_figures(folder: Path) -> tuple[list[tuple[str, str, bool]], str]:
    """(title, picture, whether it is wide) for the page of a sweep, and a sentence; empty without a study."""
    read = read_study(folder)
    if read is None:
        return [], ""
    objectives, down, trials, importance = read
    done = [trial for trial in trials if trial.state == "complete"]
    counts = {state: sum(trial.state == state for trial in trials) for state in ("complete", "pruned", "failed")}
    note = f"{len(trials)} trials of Optuna: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n) + "."
    if not done:
        return [], note
    ranked = sorted(done[0].params, key=lambda name: -importance.get(name, 0.0))[:MOST_PARAMETERS]
    figures = {"Optimization history": history_figure(objectives, down, done)}
    if importance:
        figures[f"Importance of settings for {objectives[0]}"] = importance_figure(importance)
    if len(objectives) > 1:
        figures["Pareto front"] = front_figure(objectives, down, done)
    figures["Parallel coordinates"] = parallel_figure(objectives, down, done, ranked)
    figures["Slices"] = slice_figure(objectives, done, ranked)
    return [(title, plots.inline(fig, f"search{i}"), fig.get_figwidth() > WIDTH)
            for i, (title, fig) in enumerate(figures.items())], note  # fmt: skip


def _scaled(name: str, value: float) -> float:
    return value * (100 if is_share(name) else UNITS.get(name, 1.0))


def _axis(name: str) -> str:
    return NAMES.get(name) or (f"{name} (%)" if is_share(name) else name)


def history_figure(objectives: Sequence[str], down: Sequence[bool], done: Sequence[Trial]) -> "Figure":
    """Every trial's value, and the best so far: a panel an objective."""
    with plots.style():
        fig = plots.new_figure(WIDTH, 2.4 * len(objectives))
        panels = fig.subplots(len(objectives), 1, sharex=True, squeeze=False)[:, 0]
        for i, (axes, name) in enumerate(zip(panels, objectives, strict=True)):
            x, y = [trial.number for trial in done], [_scaled(name, trial.values[i]) for trial in done]
            axes.plot(x, y, linestyle="", marker="o", markersize=4, color=plots.COLORS[0], alpha=0.7)
            best = [(min if down[i] else max)(y[: k + 1]) for k in range(len(y))]
            axes.plot(x, best, drawstyle="steps-post", color=plots.COLORS[1], linewidth=1.4, label="best so far")
            axes.set_ylabel(_axis(name))
            axes.grid(axis="y")
        panels[0].legend(loc="best")
        panels[-1].set_xlabel("trial")
        panels[-1].xaxis.get_major_locator().set_params(integer=True)
    return fig


def importance_figure(importance: Mapping[str, float]) -> "Figure":
    """Bars, the most important setting on top."""
    rows = sorted(importance.items(), key=lambda item: item[1])[-MOST_PARAMETERS:]
    with plots.style():
        fig = plots.new_figure(WIDTH, 0.7 + 0.3 * len(rows))
        axes = fig.subplots()
        bars = axes.barh([name for name, _ in rows], [value for _, value in rows], color=plots.COLORS[0], height=0.6)
        axes.bar_label(bars, labels=[f"{100 * value:.0f} %" for _, value in rows], padding=4, fontsize=8)
        axes.set_xlim(0, 1.15 * max(value for _, value in rows) or 1)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    return fig


def front_figure(objectives: Sequence[str], down: Sequence[bool], done: Sequence[Trial]) -> "Figure":
    """The first objective against each other one, with the Pareto front of the two; numbers are those of trials."""
    others = range(1, len(objectives))
    with plots.style():
        fig = plots.new_figure(max(4.2 * len(others), WIDTH), 3.4)
        for axes, k in zip(fig.subplots(1, len(others), squeeze=False, sharey=True)[0], others, strict=True):
            sign = 1 if down[k] else -1
            points = [(_scaled(objectives[k], t.values[k]), _scaled(objectives[0], t.values[0])) for t in done]
            front = pareto_front([(sign * x, y) for x, y in points], lower=down[0])
            axes.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=4, color=plots.INK, alpha=0.6)
            style = "steps-post" if sign > 0 else "steps-pre"
            axes.plot(*zip(*(points[i] for i in front), strict=True), marker="o", markersize=5, color=plots.COLORS[0],
                      linewidth=1.2, drawstyle=style)  # fmt: skip
            for i in front:
                axes.annotate(str(done[i].number), points[i], xytext=(-4, 4), textcoords="offset points", fontsize=7,
                              ha="right")  # fmt: skip
            axes.set_xlabel(_axis(objectives[k]))
            axes.grid(axis="y")
            axes.margins(0.12, 0.12)
        fig.axes[0].set_ylabel(_axis(objectives[0]))
    return fig


def _places(done: Sequence[Trial], name: str) -> tuple[list[float], list[tuple[float, str]], bool]:
    """Where the values of a setting stand on an axis; its ticks for choices; whether it is logarithmic."""
    values = [trial.params[name] for trial in done]
    distinct = sorted(set(values), key=lambda v: (isinstance(v, str), v if not isinstance(v, str) else 0, str(v)))
    if all(isinstance(v, int | float) for v in values) and len(distinct) > 8:
        logarithmic = min(values) > 0 and max(values) > 20 * min(values)
        return [float(v) for v in values], [], logarithmic
    return [float(distinct.index(v)) for v in values], [(float(i), _short(v)) for i, v in enumerate(distinct)], False


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parallel_figure(
    objectives: Sequence[str], down: Sequence[bool], done: Sequence[Trial], names: Sequence[str]
) -> "Figure":
    """A line a trial through its settings and objectives; the better the first objective, the stronger its colour."""
    columns: list[tuple[str, list[float], list[tuple[float, str]]]] = []
    for name in names:
        places, ticks, logarithmic = _places(done, name)
        columns.append((name, *_spread([math.log(v) for v in places] if logarithmic else places, ticks,
                                       [trial.params[name] for trial in done])))  # fmt: skip
    for i, name in enumerate(objectives):
        values = [_scaled(name, trial.values[i]) for trial in done]
        columns.append((_axis(name), *_spread(values, [], values)))
    order = sorted(range(len(done)), key=lambda k: done[k].values[0] * (-1 if down[0] else 1))
    with plots.style():
        fig = plots.new_figure(max(WIDTH, 1.25 * len(columns)), 3.2)
        axes = fig.subplots()
        for rank, k in enumerate(order):
            share = rank / max(len(order) - 1, 1)
            axes.plot(range(len(columns)), [column[1][k] for column in columns], linewidth=0.8 + share,
                      color=plots.COLORS[0] if share > 0.75 else plots.INK, alpha=0.15 + 0.75 * share**2)  # fmt: skip
        for x, (_, _, ticks) in enumerate(columns):
            axes.axvline(x, color=plots.INK, linewidth=0.8)
            for y, label in ticks:
                axes.annotate(label, (x, y), xytext=(3, 0), textcoords="offset points", fontsize=7, va="center")
        axes.set_xticks(range(len(columns)), [name.replace(".", ".\n").replace(" ", "\n") for name, _, _ in columns],
                        fontsize=7)  # fmt: skip
        axes.set_yticks([])
        axes.margins(0.06, 0.06)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=0)
    return fig


def _spread(
    places: Sequence[float], ticks: Sequence[tuple[float, str]], values: Sequence[Any]
) -> tuple[list[float], list[tuple[float, str]]]:
    """Places from 0 to 1; ticks there, at the ends where there are none."""
    low, high = min(places), max(places)
    width = (high - low) or 1.0
    ends = ticks or [(low, _short(float(min(values)))), (high, _short(float(max(values))))]
    return [(p - low) / width for p in places], [((y - low) / width, label) for y, label in dict(ends).items()]


def slice_figure(objectives: Sequence[str], done: Sequence[Trial], names: Sequence[str]) -> "Figure":
    """The first objective against each setting: a panel a setting, later trials darker."""
    across = min(4, len(names))
    down = -(-len(names) // across)
    with plots.style():
        fig = plots.new_figure(max(WIDTH, 2.2 * across), 2.3 * down)
        panels = fig.subplots(down, across, squeeze=False, sharey=True).flatten()
        for axes, name in zip(panels, names, strict=False):
            _slice(axes, objectives[0], done, name)
        for axes in panels[len(names) :]:
            axes.set_axis_off()
        for axes in panels[::across]:
            axes.set_ylabel(_axis(objectives[0]))
    return fig


def _slice(axes: "Axes", objective: str, done: Sequence[Trial], name: str) -> None:
    places, ticks, logarithmic = _places(done, name)
    for k, (x, trial) in enumerate(zip(places, done, strict=True)):
        axes.plot(x, _scaled(objective, trial.values[0]), linestyle="", marker="o", markersize=4, color=plots.COLORS[0],
                  alpha=0.3 + 0.7 * k / max(len(done) - 1, 1))  # fmt: skip
    if ticks:
        axes.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
        axes.set_xlim(-0.5, len(ticks) - 0.5)
    elif logarithmic:
        axes.set_xscale("log")
    axes.set_xlabel(name, fontsize=8)
    axes.grid(axis="y")
