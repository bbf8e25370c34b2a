import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qat.analysis.chart_data import short, training, training_curves
from qat.analysis.console import verdict
from qat.analysis.report import PARITY_HELP, write_report

Rows = list[dict[str, Any]]
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use"}


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and the text of each cell by row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.open: list[str] = []
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.cell = True
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag in ("td", "th"):
            self.cell = False

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def text(
    tmp_path: Path, summary: dict[str, Any], evidence: dict[str, Any], history: Rows, paired: dict[str, Any]
) -> str:
    summary["paired"] = {"ptq_qat": paired}
    return write_report(tmp_path / "report.html", summary, evidence, history, "seed: 1\n").read_text(encoding="utf-8")


def test_sections_and_numbers(text: str, summary: dict[str, Any]) -> None:
    page = Page(text)
    assert page.open == []
    assert verdict(summary) in text
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == [
        "Result", "Training", "Sensitivity", "Layers", "Changed predictions", "Parity", "Configuration",
        "Files and time",
    ]  # fmt: skip
    stages, paired, layers, edges, parity, parity_layers, files, seconds = page.tables
    minus, dash = "\N{MINUS SIGN}", "\N{EN DASH}"
    assert stages[3][:5] == ["QAT", "97.78 %", f"{minus}0.22", "0.0901", "+0.0089"]
    assert stages[4][5:] == ["9.1 KB", "22 %", "1.20", "12.4"]
    between = ["0.0001", "1", "2e-05", "99.75 %", "100 %", "99.998 %", f"{minus}0.12", "0"]
    assert parity[1] == ["QAT / int8 checkpoint", *between]
    assert parity[0][1:] == [*PARITY_HELP, "accuracy, points", "loss"]
    assert parity_layers == [
        ["Layer", "int8 checkpoint: worst", "mean", "equal", "ONNX: worst", "mean", "equal"],
        ["stem", "0", "0", "100 %", dash, dash, dash],
        ["fc", "1", "4e-05", "99.996 %", "2", "0.5", "50 %"],
    ]
    assert paired[1] == ["PTQ \N{RIGHTWARDS ARROW} QAT", "+1.67", "+0.20 to +3.14", "9", "1", "0.021"]
    assert layers[1] == [
        "stem.conv", "int8 symmetric channel", "uint4", "1.4 KB", "1.23 M", "25 %", "36.3", "36.3", "97.00 %", "96.00 %"
    ]  # fmt: skip
    assert layers[2] == ["head", dash, dash, dash, dash, dash, "9.5", dash, dash, dash]
    assert edges[1] == ["stem.conv.output", "uint4 affine tensor", "stem.conv", dash, "36.3", "1.23 %", "200 of 256"]
    assert "Measured on 300 of all test samples: accuracy is 98.00 % with the trained weights in float" in text
    assert "1 were left out for lack of time (report.sensitivity.max_seconds): head." in text
    assert "2.00 ms at batch 64; 75 % goes into what has no weights." in text
    assert "Of 400 test samples, 30 were right in the float network" in text
    assert files[1] == ["int8 checkpoint", "export/model.safetensors", "9.1 KB"]
    assert seconds[-1] == ["Together", "24.5"]
    assert "<pre>seed: 1\n</pre>" in text


def test_a_file_that_failed_is_named(tmp_path: Path, summary: dict[str, Any]) -> None:
    summary["failed"] = {"onnx": "layer 'fc' departs <by> 2 steps"}
    text = write_report(tmp_path / "report.html", summary).read_text(encoding="utf-8")
    assert "<strong>ONNX is not for use:</strong>" in text
    assert "layer &#39;fc&#39; departs &lt;by&gt; 2 steps" in text
    assert "<details open>" in text


def test_nothing_is_loaded(text: str) -> None:
    assert not set(re.findall(r"https?://[^\"]*", text)) - {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "@import" not in text
    for _, attributes in Page(text).elements:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith(("#", "data:,"))
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))


def test_everything_is_escaped(
    tmp_path: Path, summary: dict[str, Any], evidence: dict[str, Any], history: Rows
) -> None:
    evil = "</pre></td></script><script>alert('x')</script>\"onclick=\""
    summary |= {"name": evil, "files": {evil: evil}, "seconds": {evil: 1.0}}
    for stage in summary["stages"].values():
        stage["metrics"] = {evil + "accuracy": 0.5}
    evidence["layers"][0] |= dict.fromkeys(("name", "kind", "scheme", "reason", "layer", "quantizer"), evil)
    evidence["predictions"]["worst"][0] |= dict.fromkeys(("label", "before", "after"), evil)
    history[0][f"val_{evil.replace('/', '')}"] = 1.0
    page = Page(write_report(tmp_path / "r.html", summary, evidence, history, evil).read_text(encoding="utf-8"))
    assert Counter(tag for tag, _ in page.elements)["script"] == 3
    assert all("onclick" not in attributes for _, attributes in page.elements)
    assert page.tables[1][1][0] == evil


def data_of(text: str) -> dict[str, Any]:
    """What the page's charts draw."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_charts_have_their_data(text: str, evidence: dict[str, Any]) -> None:
    data = data_of(text)
    training = data["training"]
    assert [panel["title"] for panel in training["panels"]] == ["loss", "accuracy", "learning rate"]  # no test_accuracy
    train, val = training["panels"][0]["lines"]
    assert (train["label"], train["x"], train["y"]) == ("train", [10, 20, 20, 25], [2.0, 1.0, None, 0.75])
    assert (val["x"], val["y"]) == ([10, 20, 20, 30], [1.5, 0.5, None, 0.625])  # it breaks between phases
    assert training["phases"] == [
        {"mode": "float", "start": 0, "end": 20}, {"mode": "quantize", "start": 20, "end": 28},
        {"mode": "frozen", "start": 28, "end": 30},
    ]  # fmt: skip
    seen = data["seen"]["stem.conv.weight_quantizer"]
    assert seen["histogram"] == evidence["layers"][0]["seen"]["histogram"]
    assert len(seen["error_curve"]["clipping"]) == len(data["multiples"]) == 49
    assert data["layers"]["row-0"]["tensors"] == [
        {"title": "Weights", "quantizer": "stem.conv.weight_quantizer"},
        {"title": "Reads stem.conv.output", "quantizer": "stem.conv.output"},
    ]
    assert ["Scale", "0.001 to 0.02"] in data["layers"]["row-0"]["facts"]
    assert data["sensitivity"]["only"] == {"loss": [0.1], "accuracy": [0.97]}
    assert (data["sensitivity"]["names"], data["sensitivity"]["keys"]) == (["stem.conv"], ["row-0"])


def test_what_is_logged_of_each_layer_is_no_panel(history: Rows) -> None:
    history.append({"phase": "qat", "step": 9, "stem/scale": 0.5, "train_stem/sqnr": 3.0})
    assert list(training_curves(history)[0]) == ["loss", "accuracy", "learning rate"]


def test_long_curves_are_thinned() -> None:
    rows = [{"phase": "float", "step": i, "train_loss": 1.0 / (i + 1)} for i in range(2500)]
    [panel] = training(rows, [])["panels"]
    [line] = panel["lines"]
    assert len(line["x"]) <= 1001
    assert (line["x"][0], line["x"][-1]) == (1, 2500)


def test_what_is_not_finite_is_left_out() -> None:
    assert short({"a": [math.inf, -math.nan, 1.23456], "b": "inf"}) == {"a": [None, None, 1.235], "b": "inf"}


def test_ids_are_unique_and_references_resolve(text: str) -> None:
    elements = Page(text).elements
    ids = Counter(attributes["id"] for _, attributes in elements if "id" in attributes)
    assert max(ids.values()) == 1
    assert {a["href"] for tag, a in elements if tag == "a"} <= {f"#{name}" for name in ids}
    assert {a["aria-labelledby"] for _, a in elements if "aria-labelledby" in a} <= set(ids)


def test_layers_sort_by_button_and_hold_numbers(text: str) -> None:
    page = Page(text)
    buttons = Counter(tag for tag, _ in page.elements)["button"]
    headings = len([1 for tag, a in page.elements if tag == "th" and a.get("aria-sort") == "none"])
    assert headings == 10 + 7 + 7
    assert buttons == headings + 3 + 1 + 2  # rows that open, colours, metrics of sensitivity
    assert '<td class="number" data-value="36.28">36.3</td>' in text
    assert text.count("<caption>") == len(page.tables) == 8


def test_light_dark_and_paper(text: str) -> None:
    assert "light-dark(" in text
    assert "@media print" in text


def test_same_input_same_bytes(
    text: str, tmp_path: Path, summary: dict[str, Any], evidence: dict[str, Any], history: Rows
) -> None:
    again = write_report(tmp_path / "again.html", summary, evidence, history, "seed: 1\n")
    assert again.read_bytes() == text.encode()


@pytest.mark.parametrize("kept", [[], ["float"], ["float", "qat", "onnx"]])
def test_what_is_missing_is_said(tmp_path: Path, summary: dict[str, Any], kept: list[str]) -> None:
    less = {"name": "x", "stages": {key: summary["stages"][key] for key in kept}}
    text = write_report(tmp_path / "deep" / "r.html", less).read_text(encoding="utf-8")
    assert Page(text).open == []
    for sentence in ("No training curves", "Nothing was exported", "No layer was quantized", "No configuration"):
        assert sentence in text
    assert len(Page(text).tables[0]) == 1 + len(kept)
