"""`python -m qat compare`: what agrees, what departs, what cannot be compared, and what is no input."""

import json
import shutil
from itertools import permutations
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qat
from qat.__main__ import main
from qat.export.checkpoint import save_checkpoint
from qat.export.onnxruntime import OnnxNetwork
from qat.ptq import PTQConfig, finalize
from qat.training import QATModule


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of one network, one of them damaged, one of other scales; and inputs in every form."""
    path = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(90, 6)
    for name, inputs in (("good", x), ("other", 2 * x)):
        prepared = qat.prepare(net, qat.preset("int8"), x[:2])
        finalize(prepared, [inputs], PTQConfig(), trained=False)
        qat.export(qat.lower(prepared), path / name, x[:2])
    damaged = qat.load(path / "good" / "model.safetensors")
    layer = damaged.layer("2")
    layer.bias[3] += int(5 * layer.output.scale / (layer.input_scale * layer.weight_scale[3]))
    save_checkpoint(damaged, path / "damaged.safetensors")
    np.save(path / "x.npy", x.numpy())
    np.savez(path / "x.npz", x=x.numpy().astype(np.float64))
    save_file({"x": x}, path / "x.safetensors")
    (path / "parts").mkdir()
    np.save(path / "parts" / "0.npy", x[:50].numpy())
    np.save(path / "parts" / "1.npy", x[50:].numpy())
    np.save(path / "wide.npy", torch.randn(4, 7).numpy())
    np.save(path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(path / "empty.npy", np.zeros((0, 6), np.float32))
    (path / "text.txt").write_text("no inputs")
    (path / "nothing").mkdir()
    (path / "cut.onnx").write_bytes((path / "good" / "model.onnx").read_bytes()[:500])
    (path / "foreign.ckpt").write_bytes(b"no checkpoint")
    torch.save({"state_dict": {}}, path / "other.ckpt")
    return path


def compare(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code = main(["compare", *(word.replace("@", f"{folder}/") for word in words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("data", ["x.npy", "x.npz", "x.safetensors", "parts"])
def test_equal_files_agree_on_inputs_in_any_form(folder: Path, capsys: Any, data: str) -> None:
    code, found = compare(capsys, folder, "@good/model.safetensors", "@good/model.onnx", "--data", f"@{data}")
    assert code == 0
    assert found["samples"] == 90
    assert [layer["name"] for layer in found["layers"]] == ["input.quantized", "0", "2"]
    assert (found["max_steps"], found["agreement"], found["breach"]) == (0, 1.0, None)
    with torch.no_grad():
        x = torch.from_numpy(np.load(folder / "x.npy"))
        outputs = [qat.load(folder / "good" / "model.safetensors")(x)]
    assert found["max_abs"] <= 1e-5 * float(outputs[0].abs().max())


@pytest.mark.parametrize("swapped", [False, True])
def test_a_damaged_layer_is_named(folder: Path, capsys: Any, swapped: bool) -> None:
    files = ["@damaged.safetensors", "@good/model.onnx"][:: -1 if swapped else 1]
    code, found = compare(capsys, folder, *files, "--data", "@x.npy", "--layer-samples", "20")
    assert code == 1
    assert "layer '2' departs given equal inputs: worst 5 steps" in found["breach"]
    assert found["breach"].index("ONNX") < found["breach"].index("int8") or not swapped
    assert [layer["max_steps"] > 1 for layer in found["layers"]] == [False, False, True]
    code, found = compare(capsys, folder, *files, "--data", "@x.npy", "--max-steps", "9", "--equal-share", "0",
                          "--agreement", "0")  # fmt: skip
    assert (code, found["breach"]) == (0, None)


def test_layers_of_other_scales_depart(folder: Path, capsys: Any) -> None:
    files = ["@good/model.safetensors", "@other/model.safetensors"]
    code, found = compare(capsys, folder, *files, "--data", "@x.npy")
    assert code == 1
    loaded = [qat.load(folder / name / "model.safetensors") for name in ("good", "other")]
    scales = [float(network.grid("input.quantized").scale) for network in loaded]
    assert "layer 'input.quantized' departs" in found["breach"]
    for side, scale in zip("AB", scales, strict=True):
        assert f"its grid in int8 checkpoint {side}: scale {scale:.9g}" in found["breach"]


def test_two_files_without_a_checkpoint_are_compared_from_end_to_end(folder: Path, capsys: Any) -> None:
    _, found = compare(
        capsys, folder, "@good/model.onnx", "onnx:@other/model.onnx", "--data", "@x.npy", "--samples", "7"
    )
    assert found["layers"] == []
    assert "Compared from end to end only: layer by layer, one of the two has to be" in found["notes"][0]
    assert found["samples"] == 7
    assert found["max_abs"] > 0


def test_the_tables_fit_a_terminal(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    arguments = [str(folder / "good" / "model.safetensors"), str(folder / "damaged.safetensors")]
    assert main(["compare", *arguments, "--data", str(folder / "x.npy")]) == 1
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "layer '2' departs" in said
    assert "int8 checkpoint A" in said
    assert "its grid: scale " in said


# --------------------------------------------------------------------------------------------- any two of the forms

RECORDED = ["x.quantized", "stem.0", "block.conv1", "block.conv2", "block.add", "conv1.0", "conv2.0", "pool"]
FORMS = {
    "training": "@generic/last.ckpt", "training again": "@generic/last.ckpt", "int8": "@generic/model.safetensors",
    "onnx": "@generic/model.onnx", "onnx by openvino": "openvino:@generic/model.onnx", "pt2": "@generic/model.pt2",
    "openvino": "@generic/openvino", "renamed openvino": "@generic/ir/model.xml",
}  # fmt: skip
FIXED = {
    "fixed training": "@cmsis_nn/last.ckpt", "fixed int8": "@cmsis_nn/model.safetensors",
    "header": "@cmsis_nn/c_header/model.h",
}  # fmt: skip


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network as a checkpoint of training, and in every format; for floats, and for a target without them."""
    path = tmp_path_factory.mktemp("forms")
    x = torch.randn(40, 1, 8, 8)
    np.save(path / "x.npy", x.numpy())
    for target, formats in (("generic", ["int8", "onnx", "openvino", "pt2"]), ("cmsis_nn", ["int8", "c_header"])):
        module = QATModule(
            model={"_target_": "qat.zoo.models.SmallCNN", "in_channels": 1, "num_classes": 10, "width": 4},
            task={"_target_": "qat.zoo.tasks.Classification", "num_classes": 10},
            optimizer={"_target_": "torch.optim.SGD", "lr": 0.1},
            quant=qat.preset("int8", target=target).to_dict(), input_shape=[1, 8, 8],
        )  # fmt: skip
        finalize(module.prepared, [x], PTQConfig(), trained=False)
        checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        module.on_save_checkpoint(checkpoint)
        qat.export(qat.lower(module.prepared), path / target, x[:2], formats=formats)
        torch.save(checkpoint | {"pytorch-lightning_version": lightning.__version__}, path / target / "last.ckpt")
    shutil.copytree(path / "generic" / "openvino", path / "generic" / "ir")
    return path


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    ("first", "second"),
    [*permutations(FORMS, 2), *permutations(FIXED, 2)],
)
def test_any_two_forms_agree(forms: Path, capsys: Any, first: str, second: str) -> None:
    pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    paths = FORMS | FIXED
    code, found = compare(capsys, forms, paths[first], paths[second], "--data", "@x.npy")
    assert (code, found["breach"], found["missing"]) == (0, None, [])
    assert (found["agreement"], found["samples"]) == (1.0, 40)
    if any(paths[form].endswith((".ckpt", ".safetensors")) for form in (first, second)):
        own = [] if "fixed training" in (first, second) or first in FORMS else ["linear.integers"]  # of 31 bits
        assert [layer["name"] for layer in found["layers"]] == RECORDED + own
        assert found["outputs"][0]["rounding"] <= 1
        assert found["notes"] == []
    else:
        assert found["layers"] == []
        assert found["outputs"][0]["rounding"] is None
        assert "Compared from end to end only" in found["notes"][0]


def test_an_onnx_file_is_run_by_the_engine_of_its_target(forms: Path, capsys: Any) -> None:
    pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnnxNetwork, "__init__", None)  # ONNX Runtime is not called
        files = ("@generic/model.safetensors", "@generic/model.onnx")
        code, found = compare(capsys, forms, *files, "--data", "@x.npy", "--target", "openvino")
    assert (code, [layer["name"] for layer in found["layers"]]) == (0, RECORDED)


GOOD = ("@good/model.safetensors", "@good/model.onnx", "--data")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["@good/model.safetensors", "@nothing.onnx", "--data", "@x.npy"], "there is no '"),
        (["@good/model.safetensors", "@x.npy", "--data", "@x.npy"], "its name says no format; write FORMAT:"),
        (["@x.safetensors", "@good/model.onnx", "--data", "@x.npy"], "not an int8 checkpoint of qat"),
        (["@good/model.safetensors", "@cut.onnx", "--data", "@x.npy"], "cannot open"),
        (["@foreign.ckpt", "@good/model.onnx", "--data", "@x.npy"], "is not a checkpoint of a training run"),
        (["@other.ckpt", "@good/model.onnx", "--data", "@x.npy"], "is not a checkpoint of a training run"),
        ([*GOOD, "@gone.npy"], "there is no '"),
        ([*GOOD, "@text.txt"], "is no file of inputs: give .npy"),
        ([*GOOD, "@nothing"], "holds no file that ends in"),
        ([*GOOD, "@empty.npy"], "holds no samples"),
        ([*GOOD, "@objects.npy"], "cannot be read: Object arrays"),
        ([*GOOD, "@wide.npy"], "cannot be run on the data (torch.float32 "),
        ([*GOOD, "@x.npy", "--samples", "0"], "give at least 1"),
        ([*GOOD, "digitz"], "Could not find 'data/digitz'"),
        ([*GOOD, "@x.npy", "--target", "toaster"], "--target='toaster' is not known (valid: generic"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(folder: Path, capsys: Any, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *(word.replace("@", f"{folder}/") for word in words)])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
