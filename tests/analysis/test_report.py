import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

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
def text(tmp_path: Path, summary: dict[str, Any], layers: Rows, history: Rows) -> str:
    return write_report(tmp_path / "report.html", summary, layers, history, "seed: 1\n").read_text(encoding="utf-8")


def test_sections_and_numbers(text: str, summary: dict[str, Any]) -> None:
    page = Page(text)
    assert page.open == []
    assert verdict(summary) in text
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", text) == [
        "Training",
        "Parity",
        "Layers",
        "Configuration",
        "Files and time",
    ]
    stages, parity, parity_layers, layers, files, seconds = page.tables
    minus, dash, times = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"
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
    shape = times.join(("16", "3", "3", "3"))
    assert layers[1] == [
        "stem.conv", "QuantConv2d", "int8 symmetric channel", "8", shape, "1,432", "1.4 KB", "0.001 to 0.02", "36.3",
        "rule first",
    ]  # fmt: skip
    assert layers[2] == ["stem.conv.output", "edge", "uint4 affine tensor", "4", *[dash] * 6]
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
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    for tag, attributes in Page(text).elements:
        assert "src" not in attributes, tag
        for name in ("href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    assert all(target.startswith("#") for target in re.findall(r"url\((.*?)\)", text))


def test_everything_is_escaped(tmp_path: Path, summary: dict[str, Any], layers: Rows, history: Rows) -> None:
    evil = "</pre></td><script>alert('x')</script>\"onclick=\""
    summary |= {"name": evil, "files": {evil: evil}, "seconds": {evil: 1.0}}
    for stage in summary["stages"].values():
        stage["metrics"] = {evil + "accuracy": 0.5}
    layers[0] |= dict.fromkeys(("name", "kind", "scheme", "reason"), evil)
    history[0][f"val_{evil}"] = 1.0
    page = Page(write_report(tmp_path / "r.html", summary, layers, history, evil).read_text(encoding="utf-8"))
    assert Counter(tag for tag, _ in page.elements)["script"] == 2
    assert all("onclick" not in attributes for _, attributes in page.elements)
    assert page.tables[3][1][0] == evil


def test_ids_are_unique_and_references_resolve(text: str) -> None:
    elements = Page(text).elements
    ids = Counter(attributes["id"] for _, attributes in elements if "id" in attributes)
    assert max(ids.values()) == 1
    used = set(re.findall(r"url\(#(.*?)\)", text)) | set(re.findall(r'xlink:href="#(.*?)"', text))
    assert used
    assert used <= set(ids)
    assert {a["aria-labelledby"] for _, a in elements if "aria-labelledby" in a} <= set(ids)


def test_layers_sort_by_button_and_hold_numbers(text: str) -> None:
    page = Page(text)
    assert len([1 for tag, _ in page.elements if tag == "button"]) == 7 + 10 + 1  # of the theme
    assert (
        len([1 for tag, attributes in page.elements if tag == "th" and attributes.get("aria-sort") == "none"]) == 7 + 10
    )
    assert '<td class="number" data-value="36.28">36.3</td>' in text
    assert text.count("<caption>") == len(page.tables) == 6


def test_plots_take_the_colour_of_the_page(text: str) -> None:
    assert text.count("<svg") == 3
    assert "currentColor" in text
    assert "light-dark(" in text
    assert "@media print" in text


def test_same_input_same_bytes(text: str, tmp_path: Path, summary: dict[str, Any], layers: Rows, history: Rows) -> None:
    again = write_report(tmp_path / "again.html", summary, layers, history, "seed: 1\n")
    assert again.read_bytes() == text.encode()


@pytest.mark.parametrize("kept", [[], ["float"], ["float", "qat", "onnx"]])
def test_what_is_missing_is_said(tmp_path: Path, summary: dict[str, Any], kept: list[str]) -> None:
    less = {"name": "x", "stages": {key: summary["stages"][key] for key in kept}}
    text = write_report(tmp_path / "deep" / "r.html", less).read_text(encoding="utf-8")
    assert Page(text).open == []
    for sentence in ("No training curves", "Nothing was exported", "No layer was quantized", "No configuration"):
        assert sentence in text
    assert len(Page(text).tables[0]) == 1 + len(kept)
