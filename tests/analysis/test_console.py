from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from qat.analysis.console import parity_table, summary_table, verdict
from qat.analysis.summary import pick_metric, stages

Summary = dict[str, Any]


def lines_of(table: Table, width: int = 80) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get().splitlines()


def row_of(table: Table, label: str) -> list[str]:
    (line,) = [line for line in lines_of(table) if line.startswith(label)]
    return line.removeprefix(label).split()


def test_every_stage_is_a_row_with_its_numbers(summary: Summary) -> None:
    table = summary_table(summary)
    minus, dash = "\N{MINUS SIGN}", "\N{EN DASH}"
    assert row_of(table, "Float") == f"98.00 % {dash} 0.0812 41.2 KB 100 % 0.40 3.10".split()
    # 96.11 - 98.00 and 97.78 - 98.00 points; 9120 / 41234 = 22.1 %, 14321 / 41234 = 34.7 %
    assert row_of(table, "PTQ") == ["96.11", "%", f"{minus}1.89", "0.1912", dash, dash, dash, dash]
    assert row_of(table, "QAT") == ["97.78", "%", f"{minus}0.22", "0.0901", dash, dash, "0.52", "4.10"]
    assert row_of(table, "int8 checkpoint") == f"97.77 % {minus}0.23 0.0901 9.1 KB 22 % 1.20 12.4".split()
    assert row_of(table, "ONNX") == f"97.76 % {minus}0.24 0.0902 14.3 KB 35 % 0.10 1.30".split()


def test_many_metrics_fit_80_columns_with_no_number_cut(summary: Summary) -> None:
    for stage in summary["stages"].values():
        stage["metrics"] |= {"f1": 0.97123, "MulticlassCalibrationError": 0.01231, "perplexity": 1234.5}
        stage["bytes"] = 123_456_789
    lines = lines_of(summary_table(summary))
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert "\u2026" not in text
    assert text.count("123.46 MB") == 5
    assert text.count("0.01231") == text.count("f1 97.12 %") == 5
    assert "97.78 %" in text


def test_parity_rounds_down(summary: Summary) -> None:
    table = parity_table(summary)
    assert row_of(table, "QAT / int8 checkpoint") == ["0.0001", "1", "99.75", "%", "99.998", "%", "\N{MINUS SIGN}0.12"]
    assert row_of(table, "QAT / ONNX") == ["0.0013", "2", "99.99", "%", "99.98", "%", "\N{EN DASH}"]
    assert row_of(table, "int8 checkpoint / ONNX") == ["0", "0", "100", "%", "100", "%", "\N{EN DASH}"]
    summary["parity"]["qat_onnx"]["equal_share"] = 0.12345678
    assert row_of(parity_table(summary), "QAT / ONNX")[-3] == "12.3456"
    summary["parity"] = {"qat_int8": {"max_abs": 0.5, "agreement": 1 - 1e-12}}
    assert row_of(parity_table(summary), "QAT / int8 checkpoint") == ["0.5", "\u2013", "99.9999", "%", "\u2013"]


def test_markup_in_a_name_is_shown_as_it_is(summary: Summary) -> None:
    summary["name"] = "[red]x[/red] [/]"
    assert "[red]x[/red] [/]" in lines_of(summary_table(summary))[0]


@pytest.mark.parametrize("empty", [{}, {"stages": {}}, {"stages": {"float": {}}, "parity": None}])
def test_missing_parts_are_no_error(empty: Summary) -> None:
    assert "Stage" in "\n".join(lines_of(summary_table(empty)))
    assert "Pair" in "\n".join(lines_of(parity_table(empty)))
    assert verdict(empty) == "This run measured no stage."


def set_accuracy(summary: Summary, ptq: float, qat: float, samples: int | None = None) -> Summary:
    summary["stages"]["ptq"]["metrics"]["accuracy"] = ptq
    summary["stages"]["qat"]["metrics"]["accuracy"] = qat
    return summary | ({"test_samples": samples} if samples else {})


def test_verdict_better(summary: Summary) -> None:
    assert verdict(set_accuracy(summary, 346 / 360, 352 / 360, 360)) == (
        "QAT was worth it here: accuracy 97.78 % against 96.11 % for PTQ, 1.67 points better (6 of 360 test samples), "
        "0.22 points worse than float."
    )


def test_verdict_worse(summary: Summary) -> None:
    assert verdict(set_accuracy(summary, 0.97, 0.95)) == (
        "QAT was not worth it here: accuracy 95.00 % against 97.00 % for PTQ, 2.00 points worse, "
        "3.00 points worse than float."
    )


def test_verdict_equal(summary: Summary) -> None:
    assert verdict(set_accuracy(summary, 0.98, 0.98 - 1e-9, 360)) == (
        "QAT was not needed here: accuracy 98.00 %, the same as PTQ, level with float."
    )


@pytest.mark.parametrize("direction", [1, -1])
def test_verdict_within_one_sample(summary: Summary, direction: int) -> None:
    text = verdict(set_accuracy(summary, 350 / 360, (350 + direction) / 360, 360))
    assert text.startswith("QAT and PTQ cannot be told apart here: accuracy 9")
    assert text.endswith("within one of 360 test samples.")
    assert "worth" in verdict(set_accuracy(summary, 350 / 360, (350 + 2 * direction) / 360, 360))
    assert "cannot be told apart" in verdict(set_accuracy(summary, 0.75, 0.75 + 0.25 * direction, 4))  # exact in binary


def test_verdict_where_lower_is_better(summary: Summary) -> None:
    for stage in summary["stages"].values():
        del stage["metrics"]["accuracy"]
    assert verdict(summary | {"test_samples": 2}) == (
        "QAT was worth it here: loss 0.0901 against 0.1912 for PTQ, 0.101 better, 0.0089 worse than float."
    )


def test_verdict_of_a_run_without_some_stages(summary: Summary) -> None:
    found = summary["stages"]
    assert verdict({"stages": {"float": found["float"]}}) == "Float only: accuracy 98.00 %; nothing was quantized."
    assert verdict({"stages": {"float": found["float"], "ptq": found["ptq"]}}) == (
        "PTQ alone: accuracy 96.11 %, 1.89 points worse than float; QAT was not run to compare with."
    )
    assert verdict({"stages": {"qat": found["qat"]}}) == ("QAT: accuracy 97.78 %; PTQ was not run to compare with.")


def test_metric_is_picked_by_name() -> None:
    assert pick_metric(["loss", "f1"]) == "f1"
    assert pick_metric(["loss", "f1", "MulticlassAccuracy"]) == "MulticlassAccuracy"


def test_float_has_no_difference_to_itself(summary: Summary) -> None:
    first = stages(summary)[0]
    assert (first.key, first.gains, first.ratio) == ("float", {}, 1.0)


def test_verdict_by_a_paired_test(summary: Summary, paired: dict[str, Any]) -> None:
    summary["paired"] = {"ptq_qat": paired}
    tests = "of 400 test samples 9 gained and 1 lost, McNemar p = 0.021"
    assert verdict(summary) == (
        f"QAT was worth it here: accuracy 97.78 % against 96.11 % for PTQ, 1.67 points better ({tests}), "
        "0.22 points worse than float."
    )
    less = paired | {"gained": 8, "lost": 2, "p": 0.10938}
    assert verdict(summary | {"paired": {"ptq_qat": less}}) == (
        "QAT and PTQ cannot be told apart here: accuracy 97.78 % against 96.11 % for PTQ (of 400 test samples 8 gained "
        "and 2 lost, McNemar p = 0.11), 0.22 points worse than float."
    )
    beyond = {"ptq_qat": paired, "float_qat": paired | {"p": 1e-9}}
    longer = verdict(set_accuracy(summary, 0.96, 0.99) | {"paired": beyond})
    assert longer.endswith("1.00 points better than float, so a part of it is the longer training.")
