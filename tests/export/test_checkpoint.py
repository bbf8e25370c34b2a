"""The int8 checkpoint: exact, small, deterministic, readable without training code, and safe to open."""

import errno
import json
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qat
from qat.export.checkpoint import FORMAT_VERSION, load_checkpoint, read_description, save_checkpoint
from qat.export.files import write_atomically
from qat.export.formats import EXPORTERS
from qat.export.storage import FORMS, Codes, same_bits, smallest
from qat.presets import PRESETS
from qat.runtime import IntegerNetwork
from qat.zoo.models import SmallCNN

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def inputs(samples: int = 16) -> Tensor:
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def integer_network(preset: str = "int8", width: int = 4) -> IntegerNetwork:
    torch.manual_seed(0)
    net = SmallCNN(1, 10, width=width)
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    prepared = qat.prepare(net.eval(), qat.preset(preset), inputs())
    qat.calibrate(prepared, [inputs()])
    return qat.lower(prepared)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of packed weights."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(integer_network("w4a8", width=2), path)
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_is_exact(preset: str, tmp_path: Path) -> None:
    network, path = integer_network(preset), tmp_path / "model.safetensors"
    save_checkpoint(network, path)
    loaded = load_checkpoint(path)
    assert not loaded.training
    assert torch.equal(loaded(inputs()), network(inputs()))
    assert loaded.spec() == network.spec()
    before, after = network.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    save_checkpoint(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(("preset", "bits"), [("int8", 8), ("w4a8", 4), ("w4g32", 4), ("w2a2_lsq", 2)])
def test_weights_take_their_bits(preset: str, bits: int, tmp_path: Path) -> None:
    network, path = integer_network(preset, width=96), tmp_path / "model.safetensors"
    save_checkpoint(network, path)
    stored = load_file(path)["layers.block/conv2.weight"]  # large enough for a name of its own
    weight = network.layer("block.conv2").weight
    assert stored.element_size() == 1
    assert stored.nbytes == weight.numel() * bits // 8


def test_packed_weights_by_hand(tmp_path: Path) -> None:
    """4-bit integers from -7 to 7 are stored as nibbles q + 7, the first in the low half of a byte."""
    network, path = integer_network("w4a8", width=96), tmp_path / "model.safetensors"
    save_checkpoint(network, path)
    weight = network.layer("block.conv2").weight.flatten().tolist()
    stored = load_file(path)["layers.block/conv2.weight"]
    assert stored.tolist() == [a + 7 + 16 * (b + 7) for a, b in zip(weight[::2], weight[1::2], strict=True)]


def forms(path: Path, layer: str) -> dict[str, str]:
    """Tensor of a layer -> form that it is stored in."""
    table = read_description(path)["tensors"]
    return {name.removeprefix(f"layers.{layer}."): form for name, form, _ in table if f"layers.{layer}." in name}


def test_what_carries_nothing_is_left_out(small: Path) -> None:
    assert forms(small, "block/conv1") == {
        "weight": "packed", "weight_scale": "plain", "bias": "plain", "input_scale": "plain", "output.scale": "plain",
    }  # fmt: skip
    assert {name.split(".")[-1]: t.dtype for name, t in load_file(small).items() if "small" in name} == {
        "uint8": torch.uint8, "float32": torch.float32, "int32": torch.int32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "scale", "levels"),
    [("mxfp4", "e8m0", "e4m3fn"), ("mxint8", "e8m0", "bfloat16"), ("nvfp4", "scaled_e4m3fn", "e4m3fn")],
)
def test_block_scales_are_stored_in_their_own_format(preset: str, scale: str, levels: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_checkpoint(integer_network(preset, width=8), path)
    found = forms(path, "block/conv1")
    assert (found["scale"], found["levels"], "zero_point" in found) == (scale, levels, False)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ([2.0**-127, 1.0, 2.0**127] * 6, "e8m0"),
        ([0.75, 448.0, 2.0**-9] * 6, "e4m3fn"),
        ([0.0, -0.0, 257 / 256] * 6, "plain"),  # 9 significant bits
        ([-1.0, 129 / 128, 3.0e38] * 6, "plain"),
        ([-1.0, 129 / 128] * 6, "bfloat16"),
        ([float("nan"), 1.0, 0.1] * 6, "plain"),
        ([448 * 0.1, 0.1, 1.5 * 0.1] * 6, "scaled_e4m3fn"),
    ],
)
def test_a_form_is_used_only_where_it_is_exact(values: list[float], form: str) -> None:
    x = torch.tensor(values)
    if form == "scaled_e4m3fn":
        x = torch.tensor([448.0, 1.0, 1.5] * 6) * torch.tensor(0.1)
    chosen, stored, argument = smallest("layers.a.scale", x, None)
    assert chosen == form
    assert same_bits(FORMS[form].read(stored, argument, x.dtype, x.numel(), None), x)


@pytest.mark.parametrize("bits", range(1, 17))
def test_integers_of_any_width_are_packed(bits: int) -> None:
    x = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (1001,), dtype=torch.int32)
    known = Codes(-(2 ** (bits - 1)), 1, bits)
    stored, argument = FORMS["packed"].write(x, known) or pytest.fail("not packed")
    assert stored.nbytes == -(-1001 * bits // 8) == FORMS["packed"].length(1001, known)
    assert torch.equal(FORMS["packed"].read(stored, argument, x.dtype, 1001, known), x)


def test_metadata_is_plain_data(small: Path) -> None:
    with safe_open(small, framework="pt") as file:
        metadata = json.loads(file.metadata()["qat"])
    assert metadata.keys() == {"format_version", "sha256"}
    assert metadata["format_version"] == FORMAT_VERSION
    description = read_description(small)
    assert description["network"]["info"]["quant"] == qat.preset("w4a8").to_dict()
    assert {node["layer"] for node in description["network"]["nodes"]} >= {"integer_conv", "add", "max_pool"}


def test_files_of_version_1_still_load() -> None:
    expected = load_file(FIXTURES / "version1_expected.safetensors")
    network = load_checkpoint(FIXTURES / "version1.safetensors")
    assert torch.equal(network.run(expected["x"])[network.outputs[0]], expected["y"])
    quant = network.info["quant"]
    for tensor in ("weight", "activation", "input"):
        assert quant[tensor].pop("refresh") == 10  # the default of that time
        quant[tensor]["refresh"] = qat.TensorScheme().refresh
    assert qat.QuantConfig.from_dict(quant) == qat.preset("w4a8")  # fields that came later have their defaults


BUILD = """
import sys, torch, qat
from pathlib import Path
from torch import nn
from qat.export import sums
from qat.ptq import PTQConfig, finalize
from qat.zoo.models import SmallCNN
x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
for target, formats in (("generic", sys.argv[2].split(",")), ("cmsis_nn", ["c_header"])):
    torch.manual_seed(0)
    prepared = qat.prepare(SmallCNN(1, 10, width=4).eval(), qat.preset("int8", target=target), x)
    finalize(prepared, [x], PTQConfig(), trained=False)
    qat.export(qat.lower(prepared), sys.argv[1], x[:2], formats)
print(sums.text(sums.of_folder(Path(sys.argv[1]))))
"""
IN_A_PROCESS = ["int8", "onnx", "openvino", "pt2", *(["executorch"] if find_spec("executorch") else [])]


def python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_network_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    """In every format, in processes of their own."""
    first, second = (
        python(BUILD, str(tmp_path / seed), ",".join(IN_A_PROCESS), PYTHONHASHSEED=seed) for seed in ("1", "2")
    )
    assert first == second
    assert {line.split()[1].partition("/")[0] for line in first.splitlines() if line} == {
        "c_header", *(EXPORTERS[name].file for name in IN_A_PROCESS)
    }  # fmt: skip


def test_loads_without_training_code_and_model_class(tmp_path: Path) -> None:
    network, path = integer_network("w4a8"), tmp_path / "model.safetensors"
    save_checkpoint(network, path)
    save_file({"x": inputs(), "y": network(inputs())}, tmp_path / "expected.safetensors")
    python(
        """
import sys, torch, qat
from safetensors.torch import load_file
expected = load_file(sys.argv[2])
assert torch.equal(qat.load(sys.argv[1])(expected["x"]), expected["y"])
loaded = [name for name in sys.modules if name.startswith(("qat.training", "qat.zoo", "lightning", "hydra", "onnx"))]
assert not loaded, loaded
""",
        str(path), str(tmp_path / "expected.safetensors"),
    )  # fmt: skip


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no int8 checkpoint at"):
            load_checkpoint(path)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pickle was used")

    network, path = integer_network("w4a8"), tmp_path / "model.safetensors"
    unsafe = {pickle: ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"), torch: ("load", "save")}
    for module, names in unsafe.items():
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    save_checkpoint(network, path)
    assert torch.equal(load_checkpoint(path)(inputs()), network(inputs()))


# ---- write_atomically ------------------------------------------------------------------------------------------------


def test_writes_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, b"first")
    write_atomically(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("failing", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_earlier_file_survives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"earlier")

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        write_atomically(path, b"later" * 1000)
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"earlier")
    real = os.fdopen

    def full(descriptor: int, mode: str) -> Any:
        os.dup2(device := os.open("/dev/full", os.O_WRONLY), descriptor)
        os.close(device)
        return real(descriptor, mode)

    monkeypatch.setattr(os, "fdopen", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"later" * 1000)
    assert path.read_bytes() == b"earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


def test_failing_export_keeps_the_earlier_checkpoint(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(small.read_bytes())
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(PermissionError):
        save_checkpoint(integer_network(), path)
    assert path.read_bytes() == small.read_bytes()
    assert os.listdir(tmp_path) == ["model.safetensors"]
