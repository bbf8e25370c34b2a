"""Files that were damaged after they were exported: an error that names the file, never another answer.

The int8 checkpoint is in `test_checkpoint_safety`, the folder of compressed-tensors in `test_compressed_tensors`.
"""

import hashlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qat
from qat.export.files import replace, replaced_folder, write_export
from qat.export.formats import EXPORTERS
from qat.export.reloaded import Reloaded
from qat.export.sums import NAME, verify
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerNetwork
from qat.sides import open_side

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
FLOAT = ["onnx", "openvino", "pt2", *(["executorch"] if importlib.util.find_spec("executorch") else [])]
NUMBERS = {"openvino": "model.bin", "c_header": "model.h"}
"""Format whose export is a folder -> the file in it that holds the weights."""


def lowered(target: str) -> IntegerNetwork:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3)).eval()
    network = qat.prepare(net, qat.preset("int8", target=target), X[:2])
    finalize(network, [X], PTQConfig(), trained=False)
    return qat.lower(network)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Format -> its file, all in one folder; ONNX's weights are those that the others have."""
    folder = tmp_path_factory.mktemp("exported")
    paths = qat.export(lowered("generic"), folder, X[:2], ["int8", *FLOAT])
    return paths | qat.export(lowered("cmsis_nn"), folder, X[:2], ["c_header"])


def flip(path: Path, damage: str) -> Path:
    """Damage the file that holds the weights, where it is surely one of them that changes."""
    file = path / NUMBERS[path.name] if path.is_dir() else path
    content = bytearray(file.read_bytes())
    place = len(content) // 2
    while damage == "flip" and file.suffix == ".h" and not chr(content[place]).isdigit():
        place += 1
    file.write_bytes(
        content[:place] if damage == "cut" else content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    )
    return file


@pytest.mark.parametrize("damage", ["flip", "cut"])
@pytest.mark.parametrize("name", ["onnx", "openvino", "pt2", "executorch", "c_header"])
def test_damage_is_found_by_all_that_opens_a_file(
    name: str, damage: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    if name not in exported:
        pytest.skip(f"{name} is not installed")
    shutil.copytree(exported[name].parent, tmp_path / "copy")
    path = tmp_path / "copy" / exported[name].name
    EXPORTERS[name].open(path, "generic")
    file = flip(path, damage)
    refused = rf"{file.name}' was edited or damaged: its content does not match its line in '.*SHA256SUMS'"
    opening: list[Callable[[], object]] = [
        lambda: EXPORTERS[name].open(path, "generic"),
        lambda: open_side(f"{name}:{path}"),
    ]
    if (kernels := EXPORTERS[name].kernels) is not None:
        opening.append(lambda: kernels(path, "generic"))
    if (given := EXPORTERS[name].given) is not None:
        opening.append(lambda: given(path, "generic", {}, (X,), {}))
    for attempt in opening:
        with pytest.raises(ValueError, match=refused):
            attempt()
    with Reloaded({name: path}, fresh=False) as reloaded, pytest.raises(RuntimeError, match=refused):
        reloaded.outputs(name, [(X,)])


def test_the_usual_program_reads_the_sums(exported: dict[str, Path], tmp_path: Path) -> None:
    """`sha256sum` of GNU coreutils finds every file that has no checksum of its own, and nothing else."""
    folder = tmp_path / "copy"
    shutil.copytree(exported["onnx"].parent, folder)
    folders = [folder, *(folder / name for name in NUMBERS)]
    for at in folders:
        done = subprocess.run(["sha256sum", "--check", "--strict", NAME], cwd=at, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        listed = {line.partition(":")[0] for line in done.stdout.splitlines()}
        assert listed == {p.name for p in at.iterdir() if p.is_file()} - {NAME, "model.safetensors"}
    (folder / "c_header" / "model.c").unlink()
    with pytest.raises(ValueError, match=r"is not complete: 'model\.c' is missing, which SHA256SUMS names"):
        EXPORTERS["c_header"].open(folder / "c_header", "cmsis_nn")


def test_sums_follow_their_files(tmp_path: Path) -> None:
    new, old = tmp_path / "new" / "a.onnx", tmp_path / "export" / "a.onnx"
    for path in (old, old.with_name("b.onnx"), new):
        write_export(path, path.name.encode() + bytes(len(path.parent.name)))
    replace(new, old)
    assert old.read_bytes() == b"a.onnx" + bytes(3)
    lines = (tmp_path / "export" / NAME).read_text().splitlines()
    assert lines == [
        f"{hashlib.sha256(old.with_name(name).read_bytes()).hexdigest()}  {name}" for name in ("a.onnx", "b.onnx")
    ]
    old.write_bytes(b"edited")
    with pytest.raises(ValueError, match="edited or damaged"):
        verify(old)
    verify(old.with_name("b.onnx"))
    replace(old, old.with_name("b.onnx"))  # damaged before it was moved: its line says so still
    with pytest.raises(ValueError, match="edited or damaged"):
        verify(old.with_name("b.onnx"))


def test_a_file_without_sums_is_not_verified(exported: dict[str, Path], tmp_path: Path) -> None:
    alone = shutil.copy(exported["onnx"], tmp_path / "model.onnx")
    assert torch.equal(
        EXPORTERS["onnx"].open(alone, "generic")(X), EXPORTERS["onnx"].open(exported["onnx"], "generic")(X)
    )


@pytest.mark.parametrize("content", [b"no sums\n", b"0" * 63 + b"  a\n", b"\xff\xfe"])
def test_sums_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(content)
    (tmp_path / "a.onnx").write_bytes(b"earlier")
    for attempt in (lambda: verify(tmp_path / "a.onnx"), lambda: write_export(tmp_path / "a.onnx", b"later")):
        with pytest.raises(ValueError, match="SHA256SUMS' is damaged"):
            attempt()
    assert (tmp_path / "a.onnx").read_bytes() == b"earlier"


def test_a_folder_lists_what_it_kept(tmp_path: Path) -> None:
    for names in (["a", "b"], ["a"]):
        with replaced_folder(tmp_path / "out", lambda path: True) as new:
            for name in names:
                (new / name).write_text("".join(names))
            (new / "sub").mkdir(exist_ok=True)
            (new / "sub" / "c").write_text("c")
    verify(tmp_path / "out")
    assert [line.split()[1] for line in (tmp_path / "out" / NAME).read_text().splitlines()] == ["a", "b", "sub/c"]


def header(exported: dict[str, Path], folder: Path) -> str:
    folder.mkdir()
    return (exported["c_header"] / "model.h").read_text()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_header(share: float, exported: dict[str, Path], tmp_path: Path) -> None:
    """Copied alone, so that no sum tells."""
    text = header(exported, tmp_path / "c")
    (tmp_path / "c" / "model.h").write_text(text[: int(share * len(text))])
    with pytest.raises(
        ValueError, match=r"model\.h' is no header of ours, or is damaged \(its last line is not #endif"
    ):
        EXPORTERS["c_header"].open(tmp_path / "c", "cmsis_nn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "#ifndef A\n#define A\nint main(void);\n#endif\n", "MODEL_INPUT_SCALE"),
        (lambda text: text.replace("MODEL_LINEAR, ", "MODEL_RNN, "), "its step MODEL_RNN of .* is none"),
        (lambda text: text.replace("int8_t n0_weight[", "int8_t weight["), "its step MODEL_LINEAR of .* is none"),
        (lambda text: text.replace("int8_t", "float"), "float"),
        (lambda text: "\xe9" + text, "ascii"),
    ],
)
def test_a_header_that_is_none(
    change: Callable[[str], str], message: str, exported: dict[str, Path], tmp_path: Path
) -> None:
    text = header(exported, tmp_path / "c")
    (tmp_path / "c" / "model.h").write_text(change(text), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"model\.h' is no header of ours, or is damaged \(.*{message}"):
        EXPORTERS["c_header"].open(tmp_path / "c", "cmsis_nn")


def test_a_header_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no C header at '.*model\.h'"):
        EXPORTERS["c_header"].open(tmp_path, "cmsis_nn")
