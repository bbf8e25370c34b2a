"""Bad input gets a clear error, and nothing is lost. Damaged int8 checkpoints are in `test_checkpoint_safety`."""

import os
import re
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.export.formats import EXPORTERS
from qat.export.reloaded import Reloaded
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerNetwork

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def lowered(net: nn.Module, x: torch.Tensor = X, target: str = "generic") -> IntegerNetwork:
    prepared = qat.prepare(net.eval(), qat.preset("int8", target=target), x[:2])
    finalize(prepared, [x], PTQConfig(), trained=False)
    return qat.lower(prepared)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return qat.export(lowered(net), tmp_path_factory.mktemp("files"), X[:2])


FORMATS = {"int8": "generic", "onnx": "generic", "openvino": "generic", "pt2": "generic", "c_header": "cmsis_nn"}
"""Format -> target. compressed-tensors is in `test_compressed_tensors`."""


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of more than `size` bytes can be written: what a disk does that is full after so many."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def linear(width: int, target: str = "generic") -> IntegerNetwork:
    return lowered(nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)), target=target)


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_keeps_the_earlier_export(name: str, tmp_path: Path) -> None:
    qat.export(linear(8, FORMATS[name]), tmp_path, X[:2], [name])
    before, large = content(tmp_path), linear(4000, FORMATS[name])
    with full_disk(16384), pytest.raises(OSError, match="File too large"):
        qat.export(large, tmp_path, X[:2], [name])
    assert content(tmp_path) == before
    EXPORTERS[name].open(tmp_path / EXPORTERS[name].file, FORMATS[name])


def test_a_disk_that_is_full_when_openvino_writes(files: dict[str, Path], tmp_path: Path) -> None:
    """OpenVINO's text is longer than the ONNX file that it is made of."""
    qat.export(linear(8), tmp_path, X[:2], ["openvino"])
    before = content(tmp_path)
    with (
        full_disk(files["onnx"].stat().st_size + 1024),
        pytest.raises(OSError, match=r"OpenVINO cannot write '.*openvino'"),
    ):
        qat.export(linear(8), tmp_path, X[:2], ["openvino"])
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_where_the_folder_should_be(name: str, tmp_path: Path) -> None:
    (tmp_path / "export").write_text("a file where the folder should be")
    with pytest.raises(OSError, match="export"):
        qat.export(linear(8, FORMATS[name]), tmp_path / "export", X[:2], [name])
    assert content(tmp_path) == {"export": b"a file where the folder should be"}


@pytest.fixture
def read_only(files: dict[str, Path]) -> Iterator[Path]:
    """A folder that may not be written; root, who may write everything, is somebody else meanwhile."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own are closed to others
        folder = Path(place) / "export"
        folder.mkdir()
        shutil.copy(files["int8"], folder)
        (folder / "SHA256SUMS").write_text("")
        for path, mode in ((Path(place), 0o755), (folder, 0o555)):
            path.chmod(mode)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


@pytest.mark.parametrize("name", FORMATS)
def test_a_folder_that_may_not_be_written(name: str, read_only: Path) -> None:
    before = content(read_only)
    with pytest.raises(PermissionError, match="export"):
        qat.export(linear(8, FORMATS[name]), read_only, X[:2], [name])
    assert content(read_only) == before


def test_an_onnx_file_is_no_checkpoint(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"not a safetensors file .* looks like an ONNX file, which .*OnnxNetwork"):
        qat.load(files["onnx"])


def test_a_pickled_network_is_not_unpickled(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"looks like a file of torch\.save, which is never unpickled here"):
        qat.load(tmp_path / "model.pt")


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign operation"])
def test_damaged_onnx_files(damage: str, files: dict[str, Path], tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    path, content = tmp_path / "model.onnx", files["onnx"].read_bytes()
    if damage == "foreign operation":
        model = onnx.load_from_string(content)
        model.graph.node[1].op_type = "Quantise"
        content = model.SerializeToString()
    path.write_bytes({"cut": content[: len(content) // 2], "text": b"text " * 99, "empty": b""}.get(damage, content))
    with pytest.raises(
        ValueError, match=r"ONNX Runtime [\d.]+ cannot open '.*model\.onnx': it is damaged, or"
    ) as error:
        EXPORTERS["onnx"].open(path, "generic")
    assert damage != "foreign operation" or "Quantise" in str(error.value)


def test_an_onnx_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no ONNX file at"):
        EXPORTERS["onnx"].open(tmp_path / "model.onnx", "generic")


def test_an_uncalibrated_network_names_its_quantizers() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    prepared = qat.prepare(net.eval(), qat.preset("int8"), X[:2])
    with pytest.raises(RuntimeError, match=r"2 quantizers have no range yet \('.*input', '.*'\); run qat\.calibrate"):
        qat.lower(prepared)


class Reader(nn.Module):
    """A recurrent layer, which ONNX has no quantized form of."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.gru(x)[0][:, -1])


def test_a_network_that_a_format_cannot_hold(tmp_path: Path) -> None:
    x = torch.randn(16, 5, 6)
    network = lowered(Reader(), x)
    with pytest.raises(ValueError, match=r"layer 'gru.*' .* cannot be written to ONNX: .* formats=\['int8'\]"):
        qat.export(network, tmp_path, x[:2], ["int8", "onnx"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_that_a_fresh_process_cannot_run(files: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "model.onnx"
    damaged.write_bytes(files["onnx"].read_bytes()[:300])
    with Reloaded({"onnx": damaged, "int8": files["int8"]}) as reloaded:
        with pytest.raises(RuntimeError, match=r"cannot be run in a fresh process: ValueError: ONNX Runtime"):
            reloaded.outputs("onnx", [(X,)])
        expected = qat.load(files["int8"])(X)
        (made,) = reloaded.outputs("int8", [(X[:20],), (X[20:],)]).values()
        assert torch.equal(made, expected)  # it goes on
        assert reloaded._process is not None
        reloaded._process.kill()
        with pytest.raises(RuntimeError, match=r"model\.safetensors' was ended by SIGKILL. It said: nothing"):
            reloaded.outputs("int8", [(X,)])
        (made,) = reloaded.outputs("int8", [(X,)]).values()
        assert torch.equal(made, expected)  # by a new one


@pytest.mark.parametrize("rule", [None, {"match": "2"}])
def test_a_codebook_for_tensorrt_is_refused_with_what_to_do(rule: dict[str, Any] | None) -> None:
    """Before anything is trained; the message names the setting, or the rule of the layer."""
    codebook = {"bits": 4, "format": "codebook", "granularity": "tensor", "range": "learned"}
    changes: dict[str, Any] = {"weight": codebook} if rule is None else {"rules": [{**rule, "weight": codebook}]}
    config = qat.QuantConfig.from_dict(qat.preset("int8", target="tensorrt").to_dict() | changes)
    where, written = (
        ("quant.weight", "quant.weight") if rule is None else ("quant.rules[0].weight", "quant.rules.0.weight")
    )
    said = rf"{re.escape(where)}\.format=codebook: target=tensorrt takes weights as int.*; use {written}\.format=int"
    with pytest.raises(ValueError, match=rf"{said}.*, or target=generic"):
        qat.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), config, X[:2])
