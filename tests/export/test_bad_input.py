"""Bad input gets a clear error, and nothing is lost. Damaged int8 checkpoints are in `test_checkpoint_safety`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qat
from qat.export.formats import EXPORTERS
from qat.export.reloaded import Reloaded
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerNetwork

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


def lowered(net: nn.Module, x: torch.Tensor = X) -> IntegerNetwork:
    prepared = qat.prepare(net.eval(), qat.preset("int8"), x[:2])
    finalize(prepared, [x], PTQConfig(), trained=False)
    return qat.lower(prepared)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    return qat.export(lowered(net), tmp_path_factory.mktemp("files"), X[:2])


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch, qat
from torch import nn
from qat.ptq import PTQConfig, finalize

folder, x = Path(sys.argv[1]), torch.randn(32, 64)
def network(width):
    prepared = qat.prepare(nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 3)), qat.preset("int8"), x)
    finalize(prepared, [x], PTQConfig(), trained=False)
    return qat.lower(prepared)

small, large = network(8), network(512)
def content(path):
    return {p.name: p.read_bytes() for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()}
qat.export(small, folder, x[:2], ["int8", "onnx"])
before = content(folder)
resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))  # a file of more bytes than this cannot be written
for name in ("int8", "onnx"):
    try:
        qat.export(large, folder, x[:2], [name])
    except OSError as error:
        assert content(folder) == before
        print(name, "refused:", error)
"""


def test_a_full_disk_keeps_the_earlier_export(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("int8", "onnx"):
        assert f"{name} refused: [Errno 27] File too large" in done.stdout


@pytest.mark.parametrize("name", ["int8", "onnx"])
def test_a_folder_that_cannot_be_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "export").write_text("a file where the folder should be")
    net = lowered(nn.Sequential(nn.Linear(6, 3)))
    with pytest.raises(OSError, match="export"):
        qat.export(net, tmp_path / "export", X[:2], [name])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


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
        assert torch.equal(reloaded.outputs("int8", [(X[:20],), (X[20:],)]), expected)  # it goes on
        assert reloaded._process is not None
        reloaded._process.kill()
        with pytest.raises(RuntimeError, match=r"model\.safetensors' was ended by SIGKILL. It said: nothing"):
            reloaded.outputs("int8", [(X,)])
        assert torch.equal(reloaded.outputs("int8", [(X,)]), expected)  # by a new one
