"""What becomes of a run's files: those that agree with training take their place, the others are marked."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qat
from qat.export.agreement import ParityError, ParityLimits
from qat.export.checkpoint import save_checkpoint
from qat.export.formats import EXPORTERS
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerNetwork
from qat.training.run import Run
from qat.training.state import RunState
from qat.zoo.tasks import Classification


@dataclass
class Points:
    """Three classes of points."""

    inputs: Tensor = field(default_factory=lambda: torch.randn(80, 6, generator=torch.Generator().manual_seed(1)))

    def test_tensors(self) -> tuple[Tensor, Tensor]:
        return self.inputs, self.inputs[:, :3].argmax(1)

    def checksum(self) -> str:
        return "0" * 64


def lowered(target: str) -> tuple[fx.GraphModule, IntegerNetwork]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = Points().inputs
    prepared = qat.prepare(net, qat.preset("int8", target=target), x[:2])
    finalize(prepared, [x], PTQConfig(), trained=False)
    return prepared, qat.lower(prepared)


@pytest.fixture(scope="module")
def networks() -> tuple[fx.GraphModule, IntegerNetwork]:
    return lowered("generic")


def run_in(folder: Path, fresh: bool = False) -> Run:
    config = {"export": {"layer_samples": 16, "fresh_process": fresh, "skip_impossible": False}}
    state = RunState(folder, config, {}, None)
    run = Run(state, "points", config, Points(), Classification(3), Path(__file__).parent)
    state.save({}, finished=True)  # another may take the directory
    return run


def write_and_damage(network: IntegerNetwork, path: Path, inputs: Any) -> None:
    save_checkpoint(network, path)
    spoiled = qat.load(path)
    layer = spoiled.layer("2")
    layer.bias[:4] += int(100 * layer.output.scale / (layer.input_scale * layer.weight_scale[0]))  # some 100 steps
    save_checkpoint(spoiled, path)


@torch.no_grad()
def test_a_fresh_process_measures_what_this_one_does(
    networks: tuple[fx.GraphModule, IntegerNetwork], tmp_path: Path
) -> None:
    prepared, network = networks
    formats = ["int8", "onnx"]
    runs = [run_in(tmp_path, fresh) for fresh in (True, False)]
    for run in runs:
        paths = run.exports(prepared, network, Points().inputs[:2], formats)
        assert paths == {"int8": tmp_path / "export/model.safetensors", "onnx": tmp_path / "export/model.onnx"}
        run.check()
    fresh, here = (run.summary for run in runs)
    assert fresh["parity"] == here["parity"]
    assert fresh["parity"].keys() == {"qat_int8", "qat_onnx", "int8_onnx"}
    for name in formats:
        assert fresh["stages"][name]["metrics"] == here["stages"][name]["metrics"]
        assert fresh["stages"][name]["bytes"] == paths[name].stat().st_size
    assert not list(tmp_path.glob(".export-*"))
    outputs = network(Points().inputs)
    accuracy = float((outputs.argmax(1) == Points().test_tensors()[1]).float().mean())
    assert fresh["stages"]["int8"]["metrics"]["accuracy"] == pytest.approx(accuracy)


LAYERS = ["input.quantized", "0", "2"]


@pytest.mark.parametrize(("target", "name"), [("generic", "pt2"), ("generic", "openvino"), ("cmsis_nn", "c_header")])
@torch.no_grad()
def test_every_format_that_shows_its_layers_is_compared_layer_by_layer(tmp_path: Path, target: str, name: str) -> None:
    if name == "openvino":
        pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    prepared, network = lowered(target)
    run = run_in(tmp_path)
    run.exports(prepared, network, Points().inputs[:2], ["int8", name])
    run.check()
    for pair in (f"qat_{name}", f"int8_{name}"):
        measured = run.summary["parity"][pair]
        assert [row["name"] for row in measured["layers"]] == LAYERS
        assert measured["max_steps"] <= 1
        assert measured["outputs"][0]["rounding"] <= 1
        assert measured["notes"] == []


@pytest.mark.parametrize(("array", "layer"), [("n0_bias", "0"), ("n2_shift", "2"), ("n4_integers_bias", "4.integers")])
@torch.no_grad()
def test_a_wrong_number_in_a_c_header_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, array: str, layer: str
) -> None:
    def damage(network: IntegerNetwork, path: Path, inputs: Any) -> None:
        write(network, path, inputs)
        text = (path / "model.h").read_text()
        changed, count = re.subn(rf"( {array}\[\d+\] = {{)(-?\d+)", add, text)
        assert count == 1
        (path / "model.h").write_text(changed)
        (path / "SHA256SUMS").unlink()  # or it would be refused unread

    def add(found: re.Match[str]) -> str:
        return f"{found[1]}{int(found[2]) + (1 if 'shift' in array else 400)}"

    write = EXPORTERS["c_header"].write
    monkeypatch.setitem(EXPORTERS, "c_header", replace(EXPORTERS["c_header"], write=damage))
    prepared, network = lowered("cmsis_nn")
    run = run_in(tmp_path)
    assert run.exports(prepared, network, Points().inputs[:2], ["c_header"]) == {}
    with pytest.raises(ParityError, match=f"qat_c_header: layer '{layer}' departs given equal inputs"):
        run.check()


@torch.no_grad()
def test_a_file_that_departs_is_marked_and_the_earlier_one_stays(
    networks: tuple[fx.GraphModule, IntegerNetwork], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, network = networks
    first = run_in(tmp_path)
    earlier = first.exports(prepared, network, Points().inputs[:2], ["int8", "onnx"])["int8"].read_bytes()
    monkeypatch.setitem(EXPORTERS, "int8", replace(EXPORTERS["int8"], write=write_and_damage))
    second = run_in(tmp_path)
    assert list(second.exports(prepared, network, Points().inputs[:2], ["int8", "onnx"])) == ["onnx"]
    folder = tmp_path / "export"
    assert (folder / "model.safetensors").read_bytes() == earlier
    assert (folder / "model.safetensors.failed").read_bytes() != earlier
    assert second.summary["files"]["int8"] == "export/model.safetensors.failed"
    with pytest.raises(ParityError, match=r"qat_int8: layer '2' departs(.|\n)*export/model\.safetensors\.failed"):
        second.check()


@torch.no_grad()
@pytest.mark.parametrize(("limit", "message"), [("max_abs", "an output differs by"), ("metric", "accuracy differs by")])
def test_limits_of_outputs_and_metrics(
    networks: tuple[fx.GraphModule, IntegerNetwork], tmp_path: Path, limit: str, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prepared, network = networks
    monkeypatch.setitem(EXPORTERS, "int8", replace(EXPORTERS["int8"], write=write_and_damage))
    lenient = {"agreement": 0.0, "max_steps": 300, "equal_share": 0.0}
    for value, passes in ((1e6, True), (1e-4, False)):
        run = run_in(tmp_path)
        run.exports(prepared, network, Points().inputs[:2], ["int8"], ParityLimits(**lenient, **{limit: value}))
        if passes:
            run.check()
        else:
            with pytest.raises(ParityError, match=f"qat_int8: {message}"):
                run.check()


@torch.no_grad()
@pytest.mark.parametrize("skip", [True, False])
def test_what_one_format_cannot_hold_does_not_cost_the_others(
    networks: tuple[fx.GraphModule, IntegerNetwork], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skip: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def refuse(*args: Any) -> None:
        raise ValueError("layer '2' cannot be written; use another format")

    prepared, network = networks
    monkeypatch.setitem(EXPORTERS, "onnx", replace(EXPORTERS["onnx"], write=refuse))
    run = run_in(tmp_path)
    run.config["export"]["skip_impossible"] = skip
    assert list(run.exports(prepared, network, Points().inputs[:2], ["onnx", "int8"])) == ["int8"]
    assert (tmp_path / "export" / "model.safetensors").is_file()
    if skip:
        run.check()
        assert "No ONNX file is written. layer '2' cannot be written" in caplog.text
    else:
        with pytest.raises(ValueError, match="layer '2' cannot be written; use another format"):
            run.check()


@torch.no_grad()
def test_a_file_that_cannot_be_run_does_not_cost_the_others(
    networks: tuple[fx.GraphModule, IntegerNetwork], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, network = networks
    write = EXPORTERS["onnx"].write

    def cut(network: IntegerNetwork, path: Path, inputs: Any) -> None:
        write(network, path, inputs)
        path.write_bytes(path.read_bytes()[:200])

    monkeypatch.setitem(EXPORTERS, "onnx", replace(EXPORTERS["onnx"], write=cut))
    run = run_in(tmp_path)
    assert list(run.exports(prepared, network, Points().inputs[:2], ["int8", "onnx"])) == ["int8"]
    assert run.summary["parity"].keys() == {"qat_int8"}
    with pytest.raises(RuntimeError, match=r"was edited or damaged(.|\n)*kept .*: export/model\.onnx\.f"):
        run.check()
