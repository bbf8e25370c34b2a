"""The int8 checkpoint: exact, small, deterministic, readable without training code, and safe to open."""

import errno
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qat
from qat.export.checkpoint import FORMAT_VERSION, load_checkpoint, save_checkpoint
from qat.export.files import write_atomically
from qat.presets import PRESETS
from qat.runtime import IntegerNetwork
from qat.zoo.models import SmallCNN

ROOT = Path(__file__).parents[2]


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
    network, path = integer_network(preset), tmp_path / "model.safetensors"
    save_checkpoint(network, path)
    tensors = load_file(path)
    weight = network.layer("block.conv1").weight
    stored = next(t for name, t in tensors.items() if "block/conv1" in name and name.endswith(".weight"))
    assert stored.element_size() == 1
    assert stored.nbytes == weight.numel() * bits // 8 == 4 * 4 * 9 * bits // 8


def test_packed_weights_by_hand(small: Path) -> None:
    """4-bit integers from -7 to 7 are stored as nibbles q + 7, the first in the low half of a byte."""
    weight = integer_network("w4a8", width=2).layer("block.conv1").weight.flatten().tolist()
    stored = next(t for name, t in load_file(small).items() if "block/conv1.weight" in name and t.dim() == 1
                  and t.dtype == torch.uint8)  # fmt: skip
    assert stored.tolist() == [a + 7 + 16 * (b + 7) for a, b in zip(weight[::2], weight[1::2], strict=True)]


def test_types_in_the_file(small: Path) -> None:
    kinds = {name.split(".", 2)[2]: tensor.dtype for name, tensor in load_file(small).items()}
    assert kinds["bias"] == kinds["weight_zero_point"] == kinds["input_zero_point"] == torch.int32
    assert kinds["weight_scale"] == kinds["output.scale"] == torch.float32


def test_metadata_is_plain_data(small: Path) -> None:
    with safe_open(small, framework="pt") as file:
        metadata = file.metadata()
    description = json.loads(metadata["qat"])
    assert description["format_version"] == FORMAT_VERSION
    assert description["network"]["info"]["quant"] == qat.preset("w4a8").to_dict()
    assert {node["layer"] for node in description["network"]["nodes"]} >= {"integer_conv", "add", "max_pool"}


BUILD = """
import sys, torch, qat
from pathlib import Path
from qat.export.checkpoint import save_checkpoint
from qat.zoo.models import SmallCNN
torch.manual_seed(0)
x = torch.randn(16, 1, 8, 8)
prepared = qat.prepare(SmallCNN(1, 10, width=4).eval(), qat.preset("w4a4_lsq"), x)
qat.calibrate(prepared, [x])
save_checkpoint(qat.lower(prepared), Path(sys.argv[1]))
"""


def python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_network_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    digests = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        python(BUILD, str(path), PYTHONHASHSEED=seed)
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


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


# ---- damaged and foreign files ---------------------------------------------------------------------------------------


def outcome(path: Path) -> Tensor | None:
    """The loaded network's result, or None if the file was refused as it should be."""
    try:
        return load_checkpoint(path)(inputs())
    except ValueError:
        return None


def test_truncated_files_are_refused(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "cut.safetensors"
    (header,) = struct.unpack("<Q", content[:8])
    lengths = [0, 1, 7, 8, 9, header // 2, header + 7, header + 8, len(content) // 2, len(content) - 1]
    for length in lengths:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_checkpoint(path)


def test_flipped_bytes_are_refused_or_change_nothing(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "flipped.safetensors"
    expected = load_checkpoint(small)(inputs())
    (header,) = struct.unpack("<Q", content[:8])
    draw = random.Random(0)
    positions = [*range(8), *(draw.randrange(8, 8 + header) for _ in range(200)),
                 *(draw.randrange(8 + header, len(content)) for _ in range(200))]  # fmt: skip
    refused = 0
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= draw.choice([1, 2, 4, 8, 16, 32, 64, 128, draw.randrange(1, 256)])
        path.write_bytes(damaged)
        result = outcome(path)
        refused += result is None
        assert result is None or torch.equal(result, expected), position
        assert position < 8 + header or result is None  # no byte of the tensors is unprotected
    assert refused > 0.95 * len(positions)


def edited(source: Path, path: Path, change: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """A copy of a checkpoint whose description went through `change`."""
    with safe_open(source, framework="pt") as file:
        description = json.loads(file.metadata()["qat"])
    save_file(load_file(source) if tensors is None else tensors, path, {"qat": json.dumps(change(description))})
    return path


def test_unedited_copy_loads(small: Path, tmp_path: Path) -> None:
    copy = edited(small, tmp_path / "copy.safetensors", lambda description: description)
    assert torch.equal(load_checkpoint(copy)(inputs()), load_checkpoint(small)(inputs()))


def _pop(key: str) -> Any:
    return lambda d: {k: v for k, v in d.items() if k != key}


def _padding(description: dict[str, Any]) -> dict[str, Any]:
    node = next(n for n in description["network"]["nodes"] if n["layer"] == "integer_conv")
    node["settings"]["padding"] = [[0, 2], [1, 1]]
    return description


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_padding, "edited or damaged"),
        (lambda d: d | {"packed": {}}, "edited or damaged"),
        (lambda d: d | {"sha256": "0" * 64}, "edited or damaged"),
        (lambda d: d | {"format_version": 0}, "edited or damaged"),
        (lambda d: d | {"format_version": FORMAT_VERSION + 1}, rf"format version {FORMAT_VERSION + 1}.*upgrade"),
        (lambda d: d | {"format_version": "1"}, "format version"),
        (lambda d: d | {"format_version": None}, "format version"),
        (_pop("sha256"), "damaged.*sha256"),
        (_pop("format_version"), "damaged.*format_version"),
        (lambda d: [d], "damaged"),
        (lambda d: 7, "damaged"),
        (lambda d: None, "damaged"),
    ],
)
def test_edited_description_is_refused(small: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = edited(small, tmp_path / "edited.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_newer_version_is_named_before_its_content_is_read(small: Path, tmp_path: Path) -> None:
    newer = edited(
        small, tmp_path / "newer.safetensors", lambda d: {"format_version": 99, "sha256": "", "blocks": [1, 2]}
    )
    with pytest.raises(ValueError, match=rf"format version 99, this qat reads up to {FORMAT_VERSION}"):
        load_checkpoint(newer)


@pytest.mark.parametrize("text", ["", "{", "\u0000", "[" * 100_000])
def test_description_that_is_not_json(small: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "edited.safetensors"
    save_file(load_file(small), path, {"qat": text})
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("what", ["value", "missing", "extra", "renamed", "dtype", "shape"])
def test_edited_tensors_are_refused(small: Path, tmp_path: Path, what: str) -> None:
    tensors = load_file(small)
    name = next(n for n in tensors if n.endswith(".bias"))
    if what == "value":
        tensors[name][0] += 1
    elif what == "missing":
        del tensors[name]
    elif what == "extra":
        tensors["extra"] = torch.zeros(1)
    elif what == "renamed":
        tensors[name + "_"] = tensors.pop(name)
    elif what == "dtype":
        tensors[name] = tensors[name].view(torch.float32)
    else:
        tensors[name] = tensors[name].reshape(1, -1)
    path = edited(small, tmp_path / "edited.safetensors", lambda d: d, tensors)
    with pytest.raises(ValueError, match="edited or damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match="not an int8 checkpoint of qat"):
        load_checkpoint(path)


def test_files_that_are_not_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_checkpoint(path)


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
