"""`python train.py` as a user runs it: in a process of its own, with an empty home, outside of the repository."""

import csv
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import qat
from qat.__main__ import main
from qat.numerics import native
from qat.presets import PRESETS
from qat.training import QATModule
from qat.zoo.data import Digits
from tests import zygote

TRAIN = Path(__file__).parents[1] / "train.py"
STAGES = ("float", "ptq", "qat", "int8", "onnx")
PAIRS = ("qat_int8", "qat_onnx", "int8_onnx")
QUICK = ("trainer.max_epochs=1", "callbacks=quiet", "export.fresh_process=false")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty home; a run's current directory is in it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "work").mkdir()
    return folder


def command(*overrides: str) -> list[str]:
    return [sys.executable, str(TRAIN), *overrides]


def surroundings(home: Path, **more: str) -> dict[str, Any]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HYDRA", "XDG"))}
    width = {"COLUMNS": "200", "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(native.folder())}
    return {"cwd": home / "work", "env": {**own, **width, "HOME": str(home), **more}, "text": True}


def train(home: Path, *overrides: str, **more: str) -> subprocess.CompletedProcess[str]:
    where = surroundings(home, **more)
    return zygote.run(["train.py", *overrides], where["cwd"], where["env"])


def said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, said(done)
    assert "Traceback" not in said(done)
    return said(done)


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def step_of(checkpoint: Path) -> int:
    return int(torch.load(checkpoint)["global_step"])


def check_parity(summary: dict[str, Any]) -> None:
    assert set(summary["parity"]) == {pair for pair in PAIRS if "onnx" in summary["stages"] or "onnx" not in pair}
    for pair, measured in summary["parity"].items():
        assert measured["agreement_outside_ties"] == 1, pair
        assert measured["max_steps"] <= 1, pair
        assert measured["equal_share"] >= 0.999, pair


# --------------------------------------------------------------------------------------------- one default run


@pytest.fixture(scope="session")
def default(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory of `python train.py`, of 3 epochs, and its console."""
    folder = tmp_path_factory.mktemp("default") / "run"
    done = subprocess.run(command(f"hydra.run.dir={folder}", "trainer.max_epochs=3"), capture_output=True, timeout=300,
                          check=False, **surroundings(home))  # fmt: skip
    return folder, succeeded(done)


def test_summary_has_the_structure_that_was_promised(default: tuple[Path, str]) -> None:
    folder, _ = default
    summary = summary_of(folder)
    assert tuple(summary["stages"]) == STAGES
    for stage, measured in summary["stages"].items():
        assert set(measured) == {"metrics", "bytes", "latency_ms"}, stage
        assert set(measured["metrics"]) == {"accuracy"}, stage
        assert 0.5 < measured["metrics"]["accuracy"] <= 1, stage
        assert set(measured["latency_ms"]) == {"1", "64"}, stage
        assert all(0 < ms < 10_000 for ms in measured["latency_ms"].values()), stage
    assert tuple(summary["parity"]) == PAIRS
    for pair, measured in summary["parity"].items():
        assert set(measured) == {
            "max_abs", "max_steps", "mean_steps", "agreement", "agreement_outside_ties", "equal_share", "metrics",
            "layers", "outputs", "missing", "notes",
        }, pair  # fmt: skip
        assert [row["name"] for row in measured["outputs"]] == ["output"], pair
        assert 0 <= measured["outputs"][0]["rounding"] <= 1, pair
        assert (measured["missing"], measured["notes"]) == ([], []), pair
        assert measured["metrics"] == {"accuracy": 0.0}, pair
        assert [layer["name"] for layer in measured["layers"]] == [
            "x.quantized", "stem.0", "block.conv1", "block.conv2", "block.add", "conv1.0", "conv2.0", "pool"
        ], pair  # fmt: skip
        assert 0 <= measured["max_abs"] < 0.1, pair
        assert isinstance(measured["max_steps"], int), pair
    assert set(summary["seconds"]) == {"float", "qat", "export", "report"}
    assert set(summary["paired"]) == {"float_ptq", "float_qat", "ptq_qat", "qat_int8", "qat_onnx"}
    assert all(seconds >= 0 for seconds in summary["seconds"].values())
    assert summary["files"] == {
        "float": "float.safetensors", "int8": "export/model.safetensors", "onnx": "export/model.onnx"
    }  # fmt: skip
    for stage, file in summary["files"].items():
        assert (folder / file).stat().st_size == summary["stages"][stage]["bytes"]
    assert summary["stages"]["ptq"]["bytes"] is summary["stages"]["qat"]["bytes"] is None


def test_the_default_run_has_parity(default: tuple[Path, str]) -> None:
    check_parity(summary_of(default[0]))


def test_accuracies_are_those_of_the_files_on_disk(default: tuple[Path, str]) -> None:
    from qat.export.onnxruntime import OnnxNetwork

    folder, _ = default
    summary = summary_of(folder)
    config = summary["config"]
    data = Digits(name="digits", channels=1, image_size=8, num_classes=10, mean=config["data.mean"],
                  std=config["data.std"])  # fmt: skip
    inputs, targets = data.test_tensors()
    assert summary["test_samples"] == len(targets) == 359
    assert summary["data_sha256"] == data.checksum()
    float_net = QATModule.load_from_checkpoint(folder / "checkpoints/float/last.ckpt").net.eval()
    float_net.load_state_dict(load_file(folder / summary["files"]["float"]))
    networks = {
        "float": float_net,
        "int8": qat.load(folder / summary["files"]["int8"]),
        "onnx": OnnxNetwork(folder / summary["files"]["onnx"], "generic"),
    }
    for stage, network in networks.items():
        with torch.no_grad():
            accuracy = float((network(inputs).argmax(1) == targets).float().mean())
        assert accuracy == pytest.approx(summary["stages"][stage]["metrics"]["accuracy"], abs=1e-6), stage


def test_a_checkpoint_of_training_compares_with_the_files(default: tuple[Path, str], capsys: Any) -> None:
    folder, _ = default
    module = str(folder / "checkpoints/qat/last.ckpt")
    for pair, file in (("qat_int8", "export/model.safetensors"), ("qat_onnx", "export/model.onnx")):
        assert main(["compare", module, str(folder / file), "--data", "digits", "--json"]) == 0
        found, measured = json.loads(capsys.readouterr().out), summary_of(folder)["parity"][pair]
        assert [row["name"] for row in found["layers"]] == [row["name"] for row in measured["layers"]]
        assert (found["agreement"], found["metrics"]) == (measured["agreement"], {"accuracy": 0.0})
        assert found["max_steps"] <= 1
        assert found["mean_steps"] == pytest.approx(measured["mean_steps"], abs=1e-5)  # ties, summed in another order
    assert main(["compare", module, str(folder / file), "--data", "digits", "--samples", "9"]) == 0
    assert "QAT / ONNX" in capsys.readouterr().out


def test_the_int8_file_is_small_and_says_what_it_is(default: tuple[Path, str]) -> None:
    folder, _ = default
    file = folder / "export/model.safetensors"
    [header] = struct.unpack("<Q", file.read_bytes()[:8])
    payload = file.stat().st_size - 8 - header
    weights = load_file(folder / "float.safetensors")
    assert payload < 0.3 * sum(t.numel() * t.element_size() for t in weights.values())
    with safe_open(file, "pt") as opened:
        description = json.loads(opened.metadata()["qat"])
        dtypes = {opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118
    assert description["format_version"] >= 1
    assert {torch.int8, torch.int32} <= dtypes
    info = qat.load(file).info
    assert info["data"]["name"] == "digits"
    assert info["data"]["classes"] == [str(i) for i in range(10)]
    summary = summary_of(folder)
    assert info["metrics"] == summary["stages"]["qat"]["metrics"]
    raw = Digits(name="digits", channels=1, image_size=8, num_classes=10, mean=[0.0], std=[1.0]).test_tensors()[0]
    seen = Digits(name="digits", channels=1, image_size=8, num_classes=10, mean=summary["config"]["data.mean"],
                  std=summary["config"]["data.std"]).test_tensors()[0]  # fmt: skip
    mean, std = (torch.tensor(info["data"][key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    assert torch.allclose((raw - mean) / std, seen, atol=1e-6)  # a deployed network normalises by what the file says
    assert (float(mean), float(std)) == pytest.approx((float(raw.mean()), float(raw.std())), rel=0.05)
    assert info["data"]["input_shape"] == [1, 8, 8]
    told = info["provenance"]
    assert told["data_sha256"] == summary["data_sha256"]
    assert re.fullmatch("[0-9a-f]{64}", told["config_sha256"])
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=TRAIN.parent, capture_output=True, text=True, check=False)
    assert (told["git"] or {}).get("commit") == (git.stdout.strip() or None if git.returncode == 0 else None)
    assert told["packages"]["torch"] == torch.__version__
    assert info["architecture"] == {
        "_target_": "qat.zoo.models.SmallCNN", "in_channels": 1, "num_classes": 10, "width": 16
    }  # fmt: skip
    assert info["inputs"] == [{"name": "x", "shape": [None, 1, 8, 8], "dtype": "float32"}]


def test_the_kernels_of_the_engine_are_shown(default: tuple[Path, str]) -> None:
    """All of the network runs in integers: five convolutions, the sum, both pools and the linear layer."""
    import onnxruntime

    folder, console = default
    (ran,) = summary_of(folder)["kernels"].items()
    assert ran[0] == "onnx"
    assert ran[1]["engine"] == f"ONNX Runtime {onnxruntime.__version__}"
    assert ran[1]["floating"] == []
    counts = ran[1]["counts"]
    assert {name: counts[name] for name in ("QLinearConv", "QLinearAdd", "QGemm")} == {
        "QLinearConv": 5, "QLinearAdd": 1, "QGemm": 1
    }  # fmt: skip
    assert not counts.keys() & {"Conv", "Gemm", "MatMul", "Add", "Relu"}
    for text in (" ".join(console.split()), (folder / "report.html").read_text()):
        assert f"ONNX in ONNX Runtime {onnxruntime.__version__}: 5 QLinearConv, " in text
        assert "nothing is computed in float." in text


def test_checkpoints_of_both_phases_are_kept(default: tuple[Path, str]) -> None:
    folder, _ = default
    for phase in ("float", "qat"):
        kept = folder / "checkpoints" / phase
        assert {path.name for path in kept.iterdir()} == {"best.ckpt", "last.ckpt"}
        with (folder / "csv" / phase / "metrics.csv").open() as file:
            losses = {int(row["epoch"]): float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"]}
        assert sorted(losses) == [0, 1, 2]
        assert step_of(kept / "last.ckpt") == 60  # 3 epochs of 20 steps, also when an earlier one was better
        assert torch.load(kept / "best.ckpt")["epoch"] == min(losses, key=losses.__getitem__)
        module = QATModule.load_from_checkpoint(kept / "last.ckpt")
        assert (module.hparams["quant"] is not None) == (phase == "qat")


def test_reports_and_logs_are_written(default: tuple[Path, str]) -> None:
    folder, console = default
    html = (folder / "report.html").read_text()
    for words in ("digits/small_cnn/int8", "int8", "onnx", "block.conv1", "quant:", "</html>"):
        assert words in html, words
    evidence = json.loads((folder / "report.json").read_text())
    costs, qat_accuracy = evidence["sensitivity"], summary_of(folder)["stages"]["qat"]["metrics"]["accuracy"]
    assert costs["samples"] < 359 or costs["quantized"]["accuracy"] == pytest.approx(qat_accuracy, abs=1e-6)
    assert evidence["phases"] == [
        {"mode": "quantize", "start": 0, "end": 54}, {"mode": "frozen", "start": 54, "end": 60}
    ]  # fmt: skip
    rows = {row["name"]: row for row in evidence["layers"]}
    for row in rows.values():
        assert row["seen"]["histogram"]["values"] > 0, row["name"]
        assert row["seen"]["error_curve"]["chosen"] < 0.01, row["name"]
    assert 0 < rows["block.conv1"]["latency_share"] < 1
    assert (rows["stem.0"]["reads"], rows["quantizers.x"]["readers"]) == (["quantizers.x"], ["stem.0"])
    report = (folder / "report.txt").read_text()
    for layer in ("stem.0", "block.conv1", "block.conv2"):
        assert layer in report
    assert "ranges and BatchNorm statistics frozen" in (folder / "train.log").read_text()
    assert (folder / ".hydra" / "config.yaml").is_file()
    assert f"Run directory: {folder}" in console
    assert "Parity" in console or "parity" in console
    assert not list(folder.rglob("*.tmp*"))
    assert not (folder / "error.txt").exists()


# --------------------------------------------------------------------------------------------- sweeps, presets


@pytest.fixture(scope="session")
def sweep(home: Path, default: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One job a preset of SWEPT, from the default run's float weights."""
    return swept(SWEPT, home, default, tmp_path_factory)


@pytest.fixture(scope="session")
def rest(home: Path, default: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same of all other presets."""
    return swept(REST, home, default, tmp_path_factory)


def swept(
    presets: tuple[str, ...], home: Path, default: tuple[Path, str], paths: pytest.TempPathFactory
) -> tuple[Path, str]:
    folder = paths.mktemp("sweep") / "presets"
    given = f"float_checkpoint={default[0] / 'float.safetensors'}"
    done = train(home, "-m", f"hydra.sweep.dir={folder}", f"quant={','.join(presets)}", given, *QUICK)
    return folder, succeeded(done)


SWEPT = ("off", "w2a2_lsq", "nvfp4")
REST = tuple(name for name in PRESETS if name not in SWEPT)

NO_ONNX = ("mxfp8", "mxfp6", "mxfp4", "mxint8", "nvfp4", "apot4")
"""Presets whose activations ONNX has no type for."""


@pytest.mark.parametrize("preset", [*SWEPT[1:], *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_every_shipped_preset_has_parity(request: pytest.FixtureRequest, preset: str) -> None:
    jobs = SWEPT if preset in SWEPT else REST
    sweep: tuple[Path, str] = request.getfixturevalue("sweep" if preset in SWEPT else "rest")
    summary = summary_of(sweep[0] / str(jobs.index(preset)))
    assert summary["name"] == f"digits/small_cnn/{preset}"
    if preset in NO_ONNX:
        assert tuple(summary["stages"]) == STAGES[:-1]
        assert "No ONNX file will be written. quant.activation.format=" in sweep[1]
    else:
        assert tuple(summary["stages"]) == STAGES
    check_parity(summary)


FILES = {
    "tensorrt": ("int8", "onnx"), "cmsis_nn": ("int8", "c_header"), "integer_only": ("int8", "c_header"),
    "openvino": ("int8", "onnx"), "executorch_xnnpack": ("int8", "onnx"),
}  # fmt: skip
"""Target -> the files that it writes where ExecuTorch is not installed."""


@pytest.mark.sampled(5)
@pytest.mark.parametrize("target", FILES)
def test_a_target_writes_its_own_files(
    home: Path, default: tuple[Path, str], tmp_path: Path, target: str
) -> None:  # fmt: skip
    given = f"float_checkpoint={default[0] / 'float.safetensors'}"
    console = succeeded(train(home, f"hydra.run.dir={tmp_path}", f"target={target}", given, *QUICK))
    summary = summary_of(tmp_path)
    assert set(summary["stages"]) - {"executorch"} == {"float", "ptq", "qat", *FILES[target]}
    assert {f"qat_{name}" for name in FILES[target]} <= set(summary["parity"])
    for pair, measured in summary["parity"].items():
        assert (measured["agreement_outside_ties"], measured["max_steps"] <= 1) == (1.0, True), pair
    missing = target == "executorch_xnnpack" and "executorch" not in summary["stages"]
    assert ("No ExecuTorch program (XNNPACK) file will be written" in console) == missing
    if target == "tensorrt":
        graph = onnx.load(tmp_path / "export/model.onnx").graph
        zeros = {node.input[2] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
        assert {t.data_type for t in graph.initializer if t.name in zeros} == {onnx.TensorProto.INT8}


@pytest.mark.slow
def test_a_run_is_the_same_to_the_byte_without_its_rehearsal(home: Path, tmp_path: Path) -> None:
    files = ("float.safetensors", "export/model.safetensors", "export/model.onnx", "csv/qat/metrics.csv")
    content = []
    for rehearse in ("true", "false"):
        folder = tmp_path / rehearse
        succeeded(train(home, f"hydra.run.dir={folder}", f"rehearse={rehearse}", *QUICK))
        content.append([(folder / file).read_bytes() for file in files])
    assert content[0] == content[1]


def test_given_float_weights_skip_the_float_phase(sweep: tuple[Path, str], default: tuple[Path, str]) -> None:
    expected = summary_of(default[0])["stages"]["float"]["metrics"]
    for job in range(len(SWEPT)):
        summary = summary_of(sweep[0] / str(job))
        assert summary["stages"]["float"]["metrics"] == expected
        assert "float" not in summary["seconds"]
        assert not (sweep[0] / str(job) / "checkpoints" / "float").exists()


def test_without_quantization_there_is_the_float_stage_only(sweep: tuple[Path, str]) -> None:
    folder = sweep[0] / str(SWEPT.index("off"))
    summary = summary_of(folder)
    assert tuple(summary["stages"]) == ("float",)
    assert summary["parity"] == {}
    assert summary["files"] == {"float": "float.safetensors"}
    assert (folder / "report.html").is_file()
    assert not (folder / "export").exists()


def test_a_sweep_ends_with_one_table_and_one_plot(sweep: tuple[Path, str]) -> None:
    folder, console = sweep
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["quant"] for row in rows] == list(SWEPT)
    for job, row in enumerate(rows):
        assert row["status"] == "finished"
        stages = summary_of(folder / str(job))["stages"]
        last = "float" if row["quant"] == "off" else "int8"
        assert float(row[f"{last}_accuracy"]) == pytest.approx(stages[last]["metrics"]["accuracy"])
        assert int(row[f"{last}_bytes"]) == stages[last]["bytes"]
    assert {row["quant"]: row["weight_bits"] for row in rows}["w2a2_lsq"] == "2"
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "results.csv" in console


@pytest.mark.slow  # test_sweeps.py does the same on Ray
def test_jobs_of_a_sweep_that_fail_do_not_lose_the_others(
    home: Path, default: tuple[Path, str], tmp_path: Path
) -> None:
    """Of 2 x 2 jobs three fail: two on their bits, two on an argument that the data module refuses."""
    given = f"float_checkpoint={default[0] / 'float.safetensors'}"
    done = train(home, "-m", f"hydra.sweep.dir={tmp_path}", "quant.weight.bits=33,4", "data.batch_size=0,128", given,
                 "export=int8", *QUICK)  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in said(done)
    assert "3 of 4 jobs failed" in said(done)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["quant.weight.bits"], row["data.batch_size"], row["status"]) for row in rows] == [
        ("33", "0", "failed"), ("33", "128", "failed"), ("4", "0", "failed"), ("4", "128", "finished")
    ]  # fmt: skip
    assert (tmp_path / "sweep.png").is_file()
    assert "quant.weight.bits=33" in (tmp_path / "1" / "error.txt").read_text()
    assert "data.batch_size=0" in (tmp_path / "2" / "error.txt").read_text()
    summary = summary_of(tmp_path / "3")
    assert tuple(summary["stages"]) == ("float", "ptq", "qat", "int8")
    assert tuple(summary["parity"]) == ("qat_int8",)
    assert "quant.weight.bits=33" in said(done)


# --------------------------------------------------------------------------------------- interrupted, resumed


def interrupt(home: Path, folder: Path, phase: str, *overrides: str) -> str:
    """Start a long run, press Ctrl-C once an epoch of `phase` has been kept, and return the console."""
    process = subprocess.Popen(command(f"hydra.run.dir={folder}", "callbacks=quiet", *overrides),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **surroundings(home))  # fmt: skip
    begun = folder / "checkpoints" / phase / "step.ckpt"
    deadline = time.monotonic() + 120
    while not begun.is_file():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    console, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in console
    return console


@pytest.mark.slow
def test_a_checkpoint_starts_another_run_in_the_phase_that_it_is_of(
    home: Path, default: tuple[Path, str], tmp_path: Path
) -> None:
    """Ctrl-C in the qat phase; from what it kept another run goes on, in a directory of its own, for longer."""
    given = f"float_checkpoint={default[0] / 'float.safetensors'}"
    settings = ("quant=w4a4_lsq", "callbacks=quiet", "export=int8")
    console = interrupt(home, tmp_path / "first", "qat", "trainer.max_epochs=500", *settings, given)
    assert f"Go on with: ckpt_path={tmp_path / 'first'}" in console
    assert "Stopping after this step" in console
    kept = tmp_path / "first/checkpoints/qat/step.ckpt"
    folder, step = tmp_path / "second", step_of(kept)
    epochs = torch.load(kept)["epoch"] + 2
    succeeded(train(home, f"hydra.run.dir={folder}", f"ckpt_path={kept}", *settings, f"qat.max_epochs={epochs}"))
    summary = summary_of(folder)
    assert "float" not in summary["seconds"]  # it is not trained again, but compared with
    assert summary["stages"]["float"]["metrics"] == summary_of(default[0])["stages"]["float"]["metrics"]
    assert not (folder / "checkpoints" / "float").exists()
    assert step_of(folder / "checkpoints/qat/last.ckpt") == 20 * epochs > step
    assert summary["parity"]["qat_int8"]["agreement"] >= 0.999

    other = train(home, f"ckpt_path={tmp_path / 'first'}", "quant.weight.bits=8", "seed=3")
    assert other.returncode == 1
    for words in ("is of another configuration", "quant.weight.bits was 4, is 8", "seed was 0, is 3"):
        assert words in said(other)
    missing = train(home, "ckpt_path=last", f"hydra.run.dir={tmp_path / 'nowhere'}")
    assert (missing.returncode, missing.stdout) == (1, "")
    assert "ckpt_path=last: there is no unfinished run to go on with in" in missing.stderr
    assert not (tmp_path / "nowhere").exists()
    done = train(home, f"ckpt_path={default[0]}")
    assert "is finished: there is nothing left to do" in succeeded(done)


# --------------------------------------------------------------------------------------------------- bad input

PLUGIN = """
import torch
from qat.zoo.data import Digits, Split
from qat.zoo.models import SmallCNN


class LogCNN(SmallCNN):
    def forward(self, x):
        x = torch.nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        return torch.log_softmax(super().forward(x), -1)


class NaNDigits(Digits):
    def load(self):
        splits = super().load()
        images = splits["train"].images.clone()
        images[700, 0, 3, 3] = torch.nan
        return {**splits, "train": Split(images, splits["train"].labels)}
"""

BAD: dict[str, tuple[list[str], list[str]]] = {
    "bits 33": (["quant.weight.bits=33"], ["quant.weight.bits=33", "1 to 16"]),
    "misspelt override": (["quant.weight.bit=4"], ["quant.weight.bit", "'bit' not in 'TensorScheme'"]),
    "no data directory": (["data=cifar10", "data.path=nowhere"], ["data.path='nowhere' is not a directory"]),
    "wrong columns": (
        ["data=cifar10", "data.path={tmp}/columns"],
        ["data.image_column='img'", "columns picture, label", "give data.image_column=NAME"],
    ),
    "no float checkpoint": (["float_checkpoint=nowhere.ckpt"], ["float_checkpoint=nowhere.ckpt: there is no such"]),
    "float checkpoint of another width": (
        ["float_checkpoint={default}/float.safetensors", "model.width=8"],
        ["float.safetensors does not fit SmallCNN", "of another shape", "[16, 1, 3, 3]", "[8, 1, 3, 3]"],
    ),
    "layers that no file holds": (
        ["target=integer_only", "model._target_=plugin.LogCNN", "export.skip_impossible=false"],
        ["'interpolate' (interpolate) cannot be computed without floats", "'log_softmax' (log_softmax) cannot be"],
    ),
    "no checkpoint": (["ckpt_path=nowhere.ckpt"], ["ckpt_path=nowhere.ckpt: there is no such file"]),
    "checkpoint of another width": (
        ["ckpt_path={default}/checkpoints/float/last.ckpt", "model.width=8", "trainer.max_epochs=9"],
        ["is of another configuration: model.width was 16, is 8", ".hydra/overrides.yaml"],
    ),
    "rule that matches nothing": (
        ["quant.rules=[{match: block.conv9, weight: {bits: 8}}]"],
        ["quant.rules[0].match='block.conv9' matches no layer", "block.conv1"],
    ),
    "group size that does not divide": (
        ["quant=w4g32", "quant.weight.allow_padding=false"],
        ["quant.weight.group_size=32 does not divide", "'stem.0'"],
    ),
    "argument of the data": (["data.batch_size=0"], ["data.batch_size=0 is not valid", "at least 1"]),
    "NaN in the data": (
        ["data._target_=plugin.NaNDigits"],
        ["the loss is nan at step", "the input batch itself holds 1 non-finite value"],
    ),
    "no parity": (
        ["float_checkpoint={default}/float.safetensors", "export.parity.equal_share=1.1"],
        [
            "ParityError: qat_int8: layer '",
            "departs given equal inputs",
            "Not for use, kept to be looked at: export/model.safetensors.failed, export/model.onnx.failed",
        ],
    ),
}
BEFORE_TRAINING = set(BAD) - {"NaN in the data", "no parity"}


@pytest.fixture(scope="module")
def refused(home: Path, default: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function: a bad input -> run directory and end."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    tmp = tmp_path_factory.mktemp("bad")
    (tmp / "plugin.py").write_text(PLUGIN)
    (tmp / "columns").mkdir()
    for key in ("train", "test"):
        table = pa.table({"picture": [{"bytes": b"", "path": None}], "label": [0]})
        parquet.write_table(table, tmp / "columns" / f"{key}.parquet")

    def run(case: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        folder, overrides = tmp / str(list(BAD).index(case)), BAD[case][0]
        filled = [text.replace("{tmp}", str(tmp)).replace("{default}", str(default[0])) for text in overrides]
        quick = [*QUICK[1:], *(QUICK[:1] if not any("max_epochs" in text for text in filled) else [])]
        return folder, train(home, f"hydra.run.dir={folder}", *quick, *filled, PYTHONPATH=str(tmp))

    return run


@pytest.mark.sampled(6)
@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_clear_message(refused: Any, case: str) -> None:
    folder, done = refused(case)
    assert done.returncode == 1, said(done)
    assert "Traceback" not in said(done)
    for words in BAD[case][1]:
        assert words in said(done)
    if case in BEFORE_TRAINING:
        assert not list(folder.glob("checkpoints/*/*"))  # nobody waits for the float phase to hear of it
    if (folder / ".hydra").exists():  # Hydra itself refuses before there is a run directory
        assert "Traceback" in (folder / "error.txt").read_text()
    if case == "no parity":
        assert summary_of(folder)["parity"]["qat_int8"]["max_steps"] <= 1  # the numbers are there to be read
        assert "int8 checkpoint is not for use" in (folder / "report.html").read_text()
        assert all(path.suffix == ".failed" or path.name == "SHA256SUMS" for path in (folder / "export").iterdir())


def test_help_reads_well(home: Path) -> None:
    text = succeeded(train(home, "--help"))
    for words in ("python train.py", "quant=", *PRESETS, "data: ", "ckpt_path", "float_checkpoint", "hydra.run.dir"):
        assert words in text, words
    assert re.search(r"quant: .*int8", text)


# ----------------------------------------------------------------------------------------------------- loggers


def test_wandb_runs_offline_without_an_account(home: Path, default: tuple[Path, str], tmp_path: Path) -> None:
    given = f"float_checkpoint={default[0] / 'float.safetensors'}"
    console = succeeded(train(home, f"hydra.run.dir={tmp_path}", "logger=wandb", given, *QUICK))
    assert tuple(summary_of(tmp_path)["stages"]) == STAGES
    [run] = (tmp_path / "wandb").glob("offline-run-*")
    [log] = run.glob("run-*.wandb")
    written = log.read_bytes()
    for words in (b"exported-", b"model.safetensors", b"model.onnx", b"val_accuracy", b"scale/", b"histogram",
                  b"quant", b"digits/small_cnn/int8"):  # fmt: skip
        assert words in written, words
    assert "Traceback" not in console
    assert (tmp_path / "csv" / "qat" / "metrics.csv").is_file()


@pytest.mark.slow
def test_tensorboard_gets_metrics_and_scales(home: Path, default: tuple[Path, str], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    given = f"float_checkpoint={default[0] / 'float.safetensors'}"
    overrides = ("quant=w4a4_lsq", "export=int8", "logger=tensorboard", given, *QUICK)
    succeeded(train(home, f"hydra.run.dir={tmp_path}", *overrides))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "qat"))
    events.Reload()
    assert {"val_loss", "val_accuracy"} <= set(events.Tags()["scalars"])
    histograms = events.Tags()["histograms"]
    assert any(name.startswith("scale/block.conv1") for name in histograms)
    assert any(not name.endswith(".weight") for name in histograms)  # of activations
    assert {"sqnr_db/block.conv1.weight", "clipped/block.conv1.weight"} <= set(events.Tags()["scalars"])
