import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from qat.analysis import plots

FLOAT_CSV = "epoch,step,train_loss,val_accuracy,val_loss\n0,9,2.0,,\n0,9,,0.5,1.5\n"
QAT_CSV = "epoch,step,train_loss,val_loss\n0,4,0.75,\n"


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_history_joins_the_phases(tmp_path: Path) -> None:
    for phase, text in (("float", FLOAT_CSV), ("qat", QAT_CSV)):
        (tmp_path / "csv" / phase).mkdir(parents=True)
        (tmp_path / "csv" / phase / "metrics.csv").write_text(text)
    assert plots.read_history(tmp_path) == [
        {"phase": "float", "epoch": 0, "step": 9, "train_loss": 2.0},
        {"phase": "float", "epoch": 0, "step": 9, "val_accuracy": 0.5, "val_loss": 1.5},
        {"phase": "qat", "epoch": 0, "step": 4, "train_loss": 0.75},
    ]
    assert plots.read_history(tmp_path / "nowhere") == []


def test_stages_figure_has_the_numbers(summary: dict[str, Any]) -> None:
    fig = plots.stages_figure(summary)
    metric, size = fig.axes
    assert [bar.get_width() for bar in metric.patches] == [0.98, 0.9611, 0.9778, 0.9777, 0.9776]
    assert [bar.get_width() for bar in size.patches] == [41234, 0, 0, 9120, 14321]
    shown = texts(plots.svg(fig))
    assert {"Float", "PTQ", "QAT", "int8 checkpoint", "ONNX", "98.00 %", "41.2 KB", "9.1 KB"} <= set(shown)
    assert any("97.78 %" in text and "\N{MINUS SIGN}0.22" in text for text in shown)


def test_float_alone_and_nothing_are_drawn(summary: dict[str, Any]) -> None:
    summary["stages"] = {"float": {"metrics": {"loss": 0.5}}}
    fig = plots.stages_figure(summary)
    assert len(fig.axes) == 1
    assert "lower is better" in fig.axes[0].get_title(loc="left")
    assert plots.svg(plots.stages_figure({})).startswith("<?xml")


def test_same_input_same_bytes(summary: dict[str, Any], tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        for suffix in ("svg", "png"):
            paths.append(plots.save(plots.stages_figure(summary), tmp_path / f"{name}.{suffix}"))
    assert paths[0].read_bytes() == paths[2].read_bytes()
    assert paths[1].read_bytes() == paths[3].read_bytes()
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_figures_leave_matplotlib_as_it_was(summary: dict[str, Any]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.svg(plots.stages_figure(summary))
    assert dict(matplotlib.rcParams) == before


def test_background_is_transparent(summary: dict[str, Any]) -> None:
    svg = plots.svg(plots.stages_figure(summary))
    assert not re.search(r"fill: (#ffffff|#000000|white|black)", svg)
    assert plots.INK in svg


def test_text_is_never_read_as_formulas_or_markup() -> None:
    name = "a$b$<script>"
    svg = plots.svg(plots.stages_figure({"stages": {"float": {"metrics": {name: 0.5}}}}))
    assert any(name in text for text in texts(svg))
    assert "<script" not in svg


def test_only_svg_and_png(summary: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'plot.pdf'; the suffix must be .svg or .png"):
        plots.save(plots.stages_figure(summary), tmp_path / "plot.pdf")
