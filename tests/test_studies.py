"""The studies of experiments/: each runs, resumes, shows its rows; every case is a scheme that is accepted."""

import csv
import importlib
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from experiments import results, study
from qat.presets import preset
from qat.scheme import QuantConfig

NAMES = ("bit_widths", "methods", "granularity", "rounding", "nonuniform", "char_gpt")
OTHERS = ("granularity", "rounding", "nonuniform")
"""Studies that only `-m slow` runs; all are checked for what they would run."""
STUDIES = {name: importlib.import_module(f"experiments.{name}.__main__").STUDY for name in NAMES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pictures and text in place of Fashion-MNIST and Tiny Shakespeare, as small as their settings allow."""
    datasets = pytest.importorskip("datasets", reason="pip install qat[data]")
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for key, count in (("train", 1100), ("test", 70)):
        images = [Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)) for _ in range(count)]
        columns = {"image": images, "label": [i % 10 for i in range(count)]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{key}.parquet")
    alphabet = "".join(map(chr, range(33, 33 + 65)))
    (folder / "input.txt").write_text("".join(rng.choice(list(alphabet), 12000)) + alphabet)
    return {"fashion": str(folder), "text": str(folder / "input.txt")}


def run(*commands: tuple[str, list[str]]) -> subprocess.CompletedProcess[str]:
    """Studies with their arguments, one after the other, in a process of their own: they set up Hydra and logging."""
    code = ("import importlib, json, sys; from experiments import study; [study.main(importlib.import_module("
            "f'experiments.{name}.__main__').STUDY, given) for name, given in json.loads(sys.argv[1])]")  # fmt: skip
    return subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True,
                          timeout=500, check=False, cwd=Path(study.__file__).parents[1])  # fmt: skip


def arguments(name: str, data: dict[str, str], out: Path) -> list[str]:
    paths = [f"data.path={data[key]}" for key in STUDIES[name].data if key in data]
    return ["size=dev", "jobs=0", f"out={out}", *paths]


def shown_by(names: Sequence[str], data: dict[str, str], out: Path) -> Path:
    """The folder in which studies have run, two steps a job."""
    done = run(*[(name, arguments(name, data, out)) for name in names])
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "dev"


@pytest.fixture(scope="module")
def shown(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shown_by([name for name in NAMES if name not in OTHERS], data, tmp_path_factory.mktemp("studies"))


@pytest.fixture(scope="module")
def others_shown(data: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shown_by(OTHERS, data, tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize("name", [n if n not in OTHERS else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_study_runs_and_shows_what_it_measured(name: str, request: pytest.FixtureRequest) -> None:
    shown: Path = request.getfixturevalue("others_shown" if name in OTHERS else "shown")
    with (shown / "shown" / name / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["data"] for row in rows] == [*STUDIES[name].data]
    for row in rows:
        for stage in ("float", "ptq", "qat", "int8"):
            assert 0 <= float(row[stage]) < 20, stage
        assert 0 < int(row["int8_bytes"]) < int(row["float_bytes"])
    assert "<svg" in (shown / "shown" / name / "plot.svg").read_text()
    table = STUDIES[name].tables(rows)
    assert all(results.text([row], "qat") in table for row in rows)
    assert "error.txt" not in {path.name for path in (shown / name).rglob("*")}


def test_float_networks_are_shared_and_nothing_runs_twice(
    data: dict[str, str], shown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(str(path.parent.relative_to(shown)) for path in shown.rglob("float/**/job.json")) == [
        "float/digits/seed0", "float/fashion/seed0", "float/text/seed0"
    ]  # fmt: skip
    ran: list[Any] = []
    monkeypatch.setattr(study, "run_job", ran.append)
    study.main(STUDIES["bit_widths"], arguments("bit_widths", data, shown.parent))
    assert ran == []
    floats, jobs = study.jobs_of(STUDIES["methods"], "dev", shown, ["seed=7"])
    assert not any(job.finished() for job in [*floats, *jobs])  # of other overrides


@pytest.mark.parametrize("name", NAMES)
def test_every_case_is_a_scheme_that_is_accepted(name: str) -> None:
    """Hydra's own parser reads the overrides; the preset takes them."""
    for case in STUDIES[name].cases:
        found = OverridesParser.create().parse_overrides([*STUDIES[name].common, *case.overrides])
        values = {override.key_or_group: override.value() for override in found}
        fields = preset(str(values.pop("quant"))).to_dict()
        for key, value in values.items():
            top, *path = key.split(".")
            if top == "quant":
                inner: Any = fields
                for part in path[:-1]:
                    inner = inner[part]
                assert path[-1] in inner, key
                inner[path[-1]] = value
        assert QuantConfig.from_dict(fields).enabled


def test_a_run_that_fails_is_told_and_costs_no_other(tmp_path: Path) -> None:
    done = run(("char_gpt", ["size=dev", "jobs=0", f"out={tmp_path}", "data.path=nowhere"]))
    assert done.returncode == 1
    assert "1 runs failed; see error" in done.stderr
    assert "there is no file" in done.stderr
    assert "nowhere" in (tmp_path / "dev" / "float" / "text" / "seed0" / "error.txt").read_text()


@pytest.mark.parametrize(("given", "said"), [("full", "'full': give KEY=VALUE"), ("size=tiny", "valid: small, full")])
def test_a_wrong_argument_is_refused(given: str, said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        study.main(STUDIES["methods"], [given])


def test_tables_have_means_and_deviations() -> None:
    rows = [{"case": case, "metric": "accuracy", "qat": f"{value}", "int8_bytes": 2500, "float": 0.9}
            for case, value in (("a", 0.9), ("a", 0.94), ("a", 0.95), ("b", 0.5))]  # fmt: skip
    spread = statistics.stdev([90, 94, 95])
    assert results.by_case(rows, {"case": "case"}, {"qat": "QAT", "int8_bytes": "KB"}).splitlines() == [
        "| case | QAT | KB |", "| --- | --- | --- |", f"| a | 93.0 ± {spread:.1f} | 2.5 |", "| b | 50.0 | 2.5 |"
    ]  # fmt: skip
    bits = [{"case": "a", "metric": "bits_per_character", "qat": value} for value in (2.5, 2.7)]
    assert results.text(bits, "qat") == "2.600 ± 0.141"


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = f"# Title\n\n{results.START}\nold\n{results.END}\n\nConclusion\n"
    new = results.with_block(page, "| new |")
    assert new == f"# Title\n\n{results.START}\n\n| new |\n\n{results.END}\n\nConclusion\n"
    assert results.with_block(new, "| new |") == new
    with pytest.raises(ValueError, match="needs one line"):
        results.with_block("# Title\n", "| new |")


@pytest.mark.parametrize("name", NAMES)
def test_a_readme_shows_the_results_beside_it(name: str) -> None:
    """The table is that of results.csv, so neither can be edited alone."""
    folder = Path(study.__file__).parent / name
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    page = (folder / "README.md").read_text()
    assert STUDIES[name].tables(rows) in page
    assert f"python -m experiments.{name}" in page


@pytest.mark.parametrize("name", sorted(path.stem for path in (study.ROOT / "conf/experiment/study").glob("*.yaml")))
def test_every_size_of_every_study_composes(name: str) -> None:
    from hydra import compose, initialize_config_dir

    from qat import hydra_schema

    hydra_schema.register()

    with initialize_config_dir(str(study.ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [f"experiment=study/{name}"])
    assert list(cfg.export.formats) == ["int8"]
    assert cfg.callbacks.checkpoint is None
