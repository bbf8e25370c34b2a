"""The report of a network of 200 layers, opened and used in a browser: headless Chromium, driven by playwright."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qat.analysis import seen
from qat.analysis.report import write_report
from qat.fake_quant import FakeQuantize
from qat.scheme import TensorScheme

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright, and a Chromium")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
]  # fmt: skip
LAYERS = 200


def described(seed: int) -> dict[str, Any]:
    """What a quantizer of 8 bits sees of a Gaussian."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(seed))
    quantizer = FakeQuantize(TensorScheme(bits=8, symmetric=True))
    quantizer.observe(x)
    quantizer.set_range_from_observer()
    sample = seen.Seen(quantizer)
    stored = (x / quantizer.scale).round().clamp(-128, 127) * quantizer.scale
    sample.add(x, stored, len(x), torch.Generator())
    return seen.describe(sample)


@pytest.fixture
def page_file(tmp_path: Path, summary: dict[str, Any], evidence: dict[str, Any], history: list[dict[str, Any]],
              paired: dict[str, Any]) -> Path:  # fmt: skip
    """The report of 200 layers, each with a weight and an activation."""
    told = [described(seed) for seed in range(4)]
    weight, edge, _ = evidence["layers"]
    evidence["layers"] = []
    for i in range(LAYERS):
        name, read = f"stages.{i // 20}.block{i % 20}.conv", f"quantizers.layer{i}"
        only, rest = {"loss": 0.08 + i / 1e4, "accuracy": 0.98 - i / 1e4}, {"loss": 0.08, "accuracy": 0.96}
        costs = {"only": only, "all_but": rest}
        evidence["layers"] += [
            weight | {"name": name, "layer": name, "quantizer": f"{name}.weight_quantizer", "reads": [read],
                      "seen": told[i % 4], "sensitivity": costs, "bytes": 1000 + 37 * ((i * 71) % LAYERS)},
            edge | {"name": read, "tensor": f"{name} output", "quantizer": read, "seen": told[(i + 1) % 4],
                    "readers": [name]},
        ]  # fmt: skip
    evidence["sensitivity"]["left_out"] = []
    summary["paired"] = {"ptq_qat": paired}
    return write_report(tmp_path / "report.html", summary, evidence, history, "seed: 1\n")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)} (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, args=ARGUMENTS)
        yield opened
        opened.close()


def test_a_reader_uses_the_report_of_200_layers(browser: Any, page_file: Path, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    assert page_file.stat().st_size < 5e6
    opened = []
    for _ in range(3):  # others may have the processor
        page.goto(page_file.as_uri())
        opened.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(opened) < 2000  # milliseconds
    assert page.locator("#curves svg").count() == 3
    assert page.locator("tr.detail").count() == 0  # layers are drawn when they are opened

    # Sorting: by size, up and down; what is opened stays below its layer.
    table = page.get_by_role("region", name=f"{LAYERS} weights")
    size = table.get_by_role("button", name="Size")
    opener = table.locator("button.opens").nth(3)
    name = opener.inner_text()
    opener.click()
    detail = table.locator("tr.detail")
    assert detail.count() == 1
    assert detail.locator("svg").count() == 4  # histogram and error curve, of weights and input
    assert "SQNR" in detail.inner_text()
    assert "Scheme" in detail.inner_text()
    log = detail.get_by_role("button", name="log").first
    log.click()
    assert log.get_attribute("aria-pressed") == "true"
    size.click()
    assert table.locator("th", has_text="Size").get_attribute("aria-sort") == "ascending"
    sizes = table.locator("tbody tr:not(.detail)").evaluate_all("rows => rows.map(row => +row.cells[3].dataset.value)")
    assert sizes == sorted(sizes)
    assert detail.evaluate("row => row.previousElementSibling.cells[0].innerText") == name
    size.click()
    assert table.locator("tbody tr:not(.detail)").first.locator("td").nth(2).inner_text() == "8.4 KB"

    # Reading values, zooming, by pointer and by keys.
    chart = page.locator("#curves figure").first
    svg, tip = chart.locator("svg"), chart.locator(".tip")
    svg.scroll_into_view_if_needed()
    box = svg.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert re.match(r"step \d+\s+train", tip.inner_text())
    assert tip.is_visible()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.8, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    assert chart.get_by_role("button", name="Show all").is_visible()
    chart.get_by_role("button", name="Show all").click()
    assert chart.get_by_role("button", name="Show all").is_hidden()
    svg.focus()
    page.keyboard.press("ArrowRight")
    before = tip.inner_text()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() != before
    page.keyboard.press("+")
    assert chart.get_by_role("button", name="Show all").is_visible()
    page.keyboard.press("0")
    assert chart.get_by_role("button", name="Show all").is_hidden()

    # Sensitivity: another metric; a layer is opened from its dot, by keys.
    page.get_by_role("group", name="Metric").get_by_role("button", name="accuracy").click()
    assert "accuracy in points" in page.locator("#sensitivity-chart").inner_text()
    page.locator("#sensitivity-chart svg").focus()
    page.keyboard.press("ArrowLeft")
    assert "block19" in page.locator("#sensitivity-chart .tip").inner_text()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    assert page.evaluate("document.activeElement.innerText") == "stages.9.block19.conv"
    page.keyboard.press("Enter")  # and closed
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "false"

    # Colours: as the system has them, light, dark; kept for the next page.
    shots = {"light": page.screenshot(path=tmp_path / "light.png", full_page=True)}
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    theme = page.locator("#theme")
    theme.click()
    theme.click()
    assert theme.inner_text() == "Colours: dark"
    assert page.evaluate(background) != light
    shots["dark"] = page.screenshot(path=tmp_path / "dark.png", full_page=True)
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "theme"
    assert theme.inner_text() == "Colours: dark"
    theme.click()
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(background) != light  # the system's

    # Nothing is wider than the window, on a telephone neither: tables scroll in themselves.
    for width in (1280, 400):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        shots[str(width)] = page.screenshot(path=tmp_path / f"{width}.png")

    # Paper: unfolded, without buttons, and as it was afterwards.
    pdf = page.pdf(format="A4")
    assert pdf.startswith(b"%PDF")
    assert page.locator("details[open]").count() == 0
    assert len({len(shot) for shot in shots.values()}) == len(shots)
    assert all(shot.startswith(b"\x89PNG") for shot in shots.values())
    assert said == []
    assert {url for url in asked if not url.startswith("data:")} == {page_file.as_uri()}
    page.close()


@pytest.mark.parametrize("kept", [[], ["float"]])
def test_a_report_of_little_opens_too(browser: Any, tmp_path: Path, summary: dict[str, Any], kept: list[str]) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    less = {"name": "x", "stages": {key: summary["stages"][key] for key in kept}}
    page.goto(write_report(tmp_path / "r.html", less).as_uri())
    page.locator("#theme").click()
    assert said == []
    page.close()
