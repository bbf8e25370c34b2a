import csv
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qat.analysis.sweep import collect, results_table, write_results
from qat.analysis.sweep_plot import choose_axis, pareto_front, sweep_figure

Make = Callable[..., Any]


def test_a_row_has_overrides_metrics_bits_and_sizes(sweep: Make, job: Make) -> None:
    folder = sweep((["quant=w4a8", "+model.lr=1e-3", "trainer=fast"], job(4, 8, qat=0.95, ptq=0.91, size=9120)))
    assert collect(folder) == [
        {
            "job": 0,
            "overrides": ["quant", "model.lr", "trainer"],
            "quant": "w4a8",
            "model.lr": 0.001,
            "trainer": "fast",
            "weight_bits": 4,
            "activation_bits": 8,
            "float_accuracy": 0.98,
            "ptq_accuracy": 0.91,
            "qat_accuracy": 0.95,
            "int8_accuracy": 0.95,
            "float_bytes": 41000,
            "int8_bytes": 9120,
            "status": "finished",
        }
    ]


def test_failed_jobs_are_kept_and_jobs_are_in_order(sweep: Make, job: Make) -> None:
    folder = sweep(*[([f"quant.weight.bits={bits}"], job(bits, 8) if bits != 3 else None) for bits in range(2, 13)])
    (folder / "7" / "summary.json").write_text('{"name": "cut off he')
    (folder / "optimization_results").mkdir()
    rows = collect(folder)
    assert [row["job"] for row in rows] == list(range(11))
    assert [row["job"] for row in rows if row["status"] == "unfinished"] == [1, 7]
    assert rows[1] == {
        "job": 1,
        "overrides": ["quant.weight.bits"],
        "quant.weight.bits": 3,
        "weight_bits": 3,
        "status": "unfinished",
    }


def test_no_jobs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no job directories"):
        collect(tmp_path)


def test_results_csv_has_one_line_a_job(sweep: Make, job: Make) -> None:
    folder = sweep((["seed=1", "quant=a,b"], job(4, 4)), (["seed=2"], None))
    paths = write_results(folder)
    assert [path.name for path in paths] == ["results.csv", "sweep.png", "sweep.svg"]
    with paths[0].open(newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first)[:3] == ["job", "seed", "quant"]
    assert first["quant"] == "a,b"
    assert (first["float_accuracy"], first["int8_bytes"], first["status"]) == ("0.98", "9000", "finished")
    assert (second["job"], second["seed"], second["qat_accuracy"], second["status"]) == ("1", "2", "", "unfinished")


def test_same_sweep_same_bytes(sweep: Make, job: Make) -> None:
    folder = sweep((["seed=1"], job(4, 4)), (["seed=2"], job(8, 8)))
    first = [path.read_bytes() for path in write_results(folder)]
    assert [path.read_bytes() for path in write_results(folder)] == first


def test_pareto_front_by_hand() -> None:
    #          small and bad, better, beaten by 1, best, same size as 3 but worse, equal to 1
    points = [(2.0, 0.80), (4.0, 0.95), (6.0, 0.94), (8.0, 0.97), (8.0, 0.96), (4.0, 0.95)]
    assert pareto_front(points) == [0, 1, 5, 3]
    assert pareto_front([(size, 1 - value) for size, value in points], lower=True) == [0, 1, 5, 3]
    assert pareto_front([]) == []


def test_pareto_front_has_exactly_the_points_that_none_beats() -> None:
    rng = random.Random(0)
    points = [(float(rng.randrange(12)), float(rng.randrange(12))) for _ in range(60)]
    front = {points[i] for i in pareto_front(points)}
    for a, b in itertools.permutations(front, 2):
        assert (a[0] < b[0]) == (a[1] < b[1])
        assert a[0] != b[0]
    for size, value in set(points) - front:
        assert any(s <= size and v >= value for s, v in front)


def curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Label -> points of the first panel."""
    lines = sweep_figure(rows).axes[0].lines
    return {
        line.get_label(): [(x, round(y, 6)) for x, y in zip(*line.get_data(), strict=True)]
        for line in lines
        if not line.get_label().startswith("_")
    }


def test_a_line_for_each_activation_width(sweep: Make, job: Make) -> None:
    jobs = [(w, a, 0.9 + w / 100 + a / 1000) for w in (2, 4) for a in (4, 8)]
    folder = sweep(*[([f"quant.weight.bits={w}"], job(w, a, qat=v, ptq=v - 0.1)) for w, a, v in jobs])
    found = curves(collect(folder))
    assert found["QAT, 4 activation bits"] == [(2, 92.4), (4, 94.4)]
    assert found["PTQ, 8 activation bits"] == [(2, 82.8), (4, 84.8)]
    styles = {line.get_label(): line.get_linestyle() for line in sweep_figure(collect(folder)).axes[0].lines}
    assert styles["QAT, 4 activation bits"] == "-"
    assert styles["PTQ, 4 activation bits"] == "--"


def test_seeds_are_averaged(sweep: Make, job: Make) -> None:
    jobs = [(w, seed, 0.9 + w / 100 + seed / 100) for w in (2, 4) for seed in (0, 1)]
    folder = sweep(*[([f"quant.weight.bits={w}", f"seed={s}"], job(w, 8, qat=v)) for w, s, v in jobs])
    assert curves(collect(folder))["QAT"] == [(2, 92.5), (4, 94.5)]


@pytest.mark.parametrize(
    ("overrides", "bits", "label", "places"),
    [
        (
            [["quant=w2a2"], ["quant=w8a8"]],
            [(2, 2), (8, 8)],
            "bits of weights (W) and activations (A)",
            ["W2A2", "W8A8"],
        ),
        ([["a=1"], ["a=2"]], [(8, 2), (8, 4)], "activation bits", [2, 4]),
        ([["lr=0.1", "seed=1"], ["lr=0.2", "seed=2"]], [(4, 4), (4, 4)], "lr", [0.1, 0.2]),
        ([["quant=lsq"], ["quant=pact"]], [(4, 4), (4, 4)], "quant", ["lsq", "pact"]),
        ([["seed=3"], ["seed=4"]], [(4, 4), (4, 4)], "seed", [3, 4]),
        ([["seed=3"], ["seed=3"]], [(4, 4), (4, 4)], "job", [0, 1]),
    ],
)
def test_the_axis_is_what_varies(
    sweep: Make, job: Make, overrides: list[list[str]], bits: list[tuple[int, int]], label: str, places: list[Any]
) -> None:
    rows = collect(sweep(*[(line, job(*pair)) for line, pair in zip(overrides, bits, strict=True)]))
    axis = choose_axis(rows)
    assert axis.label == label
    assert [axis.of(row) for row in rows] == places
    assert sweep_figure(rows).axes[0].get_xlabel() == label


def test_the_plot_draws_the_front_and_says_what_failed(sweep: Make, job: Make) -> None:
    folder = sweep(
        (["quant.weight.bits=2"], job(2, 8, qat=0.90, size=5000)),
        (["quant.weight.bits=3"], job(3, 8, qat=0.89, size=6000)),
        (["quant.weight.bits=4"], job(4, 8, qat=0.95, size=7000)),
        (["quant.weight.bits=8"], None),
    )
    (front,) = [line for line in sweep_figure(collect(folder)).axes[1].lines if line.get_label() == "Pareto front"]
    assert list(front.get_xdata()) == [5, 7]
    assert [round(y, 6) for y in front.get_ydata()] == [90, 95]
    assert "1 of 4 jobs has no result: job 3" in write_results(folder)[2].read_text()


def test_a_sweep_in_which_all_failed(sweep: Make) -> None:
    folder = sweep((["seed=1"], None), (["seed=2"], None))
    svg = write_results(folder)[2].read_text()
    assert "no job finished" in svg
    assert "2 of 2 jobs have no result: jobs 0, 1" in svg


def test_runs_without_exports_or_quantization(sweep: Make, job: Make) -> None:
    plain = {"config": {}, "stages": {"float": {"metrics": {"loss": 0.5}}}}
    svg = write_results(sweep((["lr=1"], plain), (["lr=2"], plain)))[2].read_text()
    assert "no job exported a file" in svg


def test_an_override_named_like_a_stage_is_an_override(sweep: Make, job: Make) -> None:
    rows = collect(sweep(*[([f"qat_epochs={n}"], job(4, 4, qat=v)) for n, v in ((1, 0.9), (2, 0.95))]))
    assert choose_axis(rows).label == "qat_epochs"
    assert curves(rows)["QAT"] == [(1, 90), (2, 95)]


def test_a_float_job_in_a_sweep_over_bits(sweep: Make, job: Make) -> None:
    plain = {"config": {}, "stages": {"float": {"metrics": {"accuracy": 0.98}}}}
    rows = collect(sweep((["quant=off"], plain), (["quant=w4a8"], job(4, 8)), (["quant=w8a8"], job(8, 8, qat=0.97))))
    assert curves(rows)["QAT, 8 activation bits"] == [(4, 90), (8, 97)]
    assert list(sweep_figure(rows).axes[0].lines[-1].get_ydata()) == pytest.approx([98, 98])


def test_results_table(sweep: Make, job: Make) -> None:
    folder = sweep(
        (["quant.weight.bits=2", "model=resnet20"], job(2, 8, qat=0.9123, size=5120)),
        (["quant.weight.bits=4", "model=resnet20"], None),
        (["quant.weight.bits=8", "model=resnet20"], job(8, 8)),
    )
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(results_table(collect(folder)))
    lines = [line.split() for line in captured.get().splitlines()]
    assert ["0", "2", "98.00", "80.00", "91.23", "91.23", "5.1", "KB"] in lines
    assert ["1", "4", *["\N{EN DASH}"] * 5, "unfinished"] in lines
    assert "resnet20" not in captured.get()  # does not vary
