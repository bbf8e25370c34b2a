"""The leaderboard of run directories: what it reads, averages, leaves out, and writes."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from qat.__main__ import main
from qat.analysis.leaderboard import boards, changed, read_run, read_runs
from qat.analysis.leaderboard_page import board_table, front_figure, headline


def write_run(
    folder: Path, settings: dict[str, Any], choices: dict[str, str] | None = None, accuracy: float | None = None,
    size: int = 1000, ms: float = 1.0, metric: str = "accuracy", data: str = "digits", operations: float = 1e6,
) -> Path:  # fmt: skip
    """A run directory as Hydra and train.py leave it; without an accuracy it did not come to its end."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(json.dumps(settings))
    (folder / ".hydra" / "hydra.yaml").write_text(json.dumps({"hydra": {"runtime": {"choices": choices or {}}}}))
    if accuracy is not None:
        stages = {
            "float": {"metrics": {metric: 0.98}, "bytes": 40000, "latency_ms": {"1": 0.5}},
            "ptq": {"metrics": {metric: accuracy / 2}, "bytes": None, "latency_ms": {}},
            "int8": {"metrics": {metric: accuracy}, "bytes": size, "latency_ms": {"1": 9.0}},
            "onnx": {"metrics": {metric: accuracy}, "bytes": 5 * size, "latency_ms": {"1": ms}},
        }
        summary = {"config": {"data.name": data}, "stages": stages, "bit_operations": operations}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "report.html").write_text("")
    return folder


def quant(bits: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {"seed": seed, "quant": {"weight": {"bits": bits, "range": "learned"}}, "path": "${hydra:x}", **more}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two configurations of two seeds in a sweep, a single run, one that failed, one cut off, one of other data."""
    write_run(tmp_path / "sweep" / "0", quant(4, 1), accuracy=0.90, size=1000, ms=1.0, operations=1e6)
    write_run(tmp_path / "sweep" / "1", quant(4, 2), accuracy=0.94, size=1000, ms=1.2, operations=1e6)
    write_run(tmp_path / "sweep" / "2", quant(8, 1), accuracy=0.96, size=2000, ms=0.8, operations=4e6)
    write_run(tmp_path / "sweep" / "3", quant(8, 2), accuracy=0.96, size=2000, ms=0.8, operations=4e6)
    write_run(tmp_path / "single", quant(6), accuracy=0.80, size=1500, ms=2.0, operations=2e6)
    write_run(tmp_path / "sweep" / "4", quant(33))
    (tmp_path / "sweep" / "4" / "error.txt").write_text("Traceback\n  File\nValueError: 33 <bits>\n")
    write_run(tmp_path / "sweep" / "5", quant(2))
    write_run(tmp_path / "text", quant(4), accuracy=2.5, metric="bits_per_character", data="shakespeare")
    return tmp_path


def test_seeds_are_averaged_and_fronts_are_of_the_means(folder: Path) -> None:
    digits, text = sorted(boards(read_runs([folder])), key=lambda board: board.data)
    assert (digits.data, digits.metric, digits.changed, digits.engine) == (
        "digits", "accuracy", ["quant.weight.bits"], "onnx"
    )  # fmt: skip
    found = [(g.config["quant.weight.bits"], len(g.entries), g.mean(), g.deviation(), g.best) for g in digits.groups]
    assert found == [
        (8, 2, pytest.approx(0.96), 0.0, {"bytes", "latency_ms", "bit_operations"}),
        (4, 2, pytest.approx(0.92), pytest.approx(0.0282842712), {"bytes", "bit_operations"}),
        (6, 1, pytest.approx(0.80), None, set()),
    ]
    assert digits.groups[1].mean("latency_ms") == pytest.approx(1.1)
    assert text.groups[0].mean() == 2.5
    assert headline(digits) == (
        "Best accuracy: weight.bits 8 with 96.00 % ± 0.00 (2 runs) in 2.0 KB. "
        "Smallest: weight.bits 4 with 92.00 % ± 2.83 (2 runs) in 1.0 KB, 4.00 points worse."
    )
    assert board_table(digits).row_count == 3
    assert len(front_figure(digits).axes) == 3


def test_a_run_that_was_repeated_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, quant(4, 1), accuracy=0.9)
    [board] = boards(read_runs([tmp_path]))
    assert [len(group.entries) for group in board.groups] == [1]


def test_what_did_not_finish_says_why(folder: Path) -> None:
    failed, cut = (read_run(folder / "sweep" / name) for name in ("4", "5"))
    assert (failed.status, failed.why) == ("failed", "ValueError: 33 <bits>")
    assert (cut.status, cut.why) == ("unfinished", "it did not come to its end")
    (folder / "sweep" / "5" / "summary.json").write_text('{"stages": {"float"')
    assert read_run(folder / "sweep" / "5").why == "summary.json is not readable"
    (folder / "sweep" / "5" / "summary.json").write_text('{"stages": {}}')
    assert read_run(folder / "sweep" / "5").why == "summary.json has no stage with a metric"
    summary = json.loads((folder / "single" / "summary.json").read_text()) | {"failed": {"onnx": "departs"}}
    (folder / "single" / "summary.json").write_text(json.dumps(summary))
    assert (read_run(folder / "single").status, read_run(folder / "single").why) == ("failed", "onnx is not for use")


def test_only_settings_that_differ_and_do_not_follow_from_a_choice() -> None:
    configs = [
        {"quant": "int8", "quant.weight.bits": 8, "quant.range": "fixed", "seed": 0, "lr": 1e-3, "model": "cnn"},
        {"quant": "w4a4", "quant.weight.bits": 4, "quant.range": "learned", "seed": 1, "lr": 1e-3, "model": "cnn"},
        {"quant": "w4a4", "quant.weight.bits": 3, "quant.range": "learned", "seed": 1, "lr": 1e-3, "model": "cnn"},
    ]
    assert changed(configs) == ["quant", "quant.weight.bits"]
    assert changed(configs[:2]) == ["quant"]
    assert changed(configs[1:]) == ["quant.weight.bits"]


def test_rules_of_layers_are_settings_of_their_own(tmp_path: Path) -> None:
    for bits in (2, 4):
        rules = [{"match": "conv1", "weight": {"bits": bits}}, {"match": "last", "weight": {"bits": 8}}]
        write_run(tmp_path / str(bits), {"quant": {"rules": rules}}, accuracy=bits / 10)
    [board] = boards(read_runs([tmp_path]))
    assert board.changed == ["quant.rules[conv1].weight.bits"]


def test_report_prints_and_writes_tables_and_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder / "sweep"), str(folder / "single"), "--out", str(folder / "out")]) == 0
    console = capsys.readouterr().out
    assert "Best accuracy: weight.bits 8" in console
    assert f"failed: {folder / 'sweep' / '4'}: ValueError: 33 <bits>" in console
    assert f"unfinished: {folder / 'sweep' / '5'}" in console
    with (folder / "out" / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["quant.weight.bits"], row["runs"]) for row in rows] == [("8", "2"), ("4", "2"), ("6", "1")]
    assert float(rows[1]["value_deviation"]) == pytest.approx(0.0282842712)
    with (folder / "out" / "runs.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)].count("finished") == 5
    page = (folder / "out" / "leaderboard.html").read_text()
    assert '<a href="../sweep/0/report.html">../sweep/0</a>' in page
    assert "ValueError: 33 &lt;bits&gt;" in page
    assert page.count("<svg") == 1
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    assert "there is no run in" in capsys.readouterr().err
