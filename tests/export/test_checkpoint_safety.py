"""Damaged, foreign, edited and absurd checkpoints: a ValueError that names file and reason, never a wrong answer."""

import copy
import json
import random
import resource
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qat
from qat.export.checkpoint import DESCRIPTION, FORMAT_VERSION, load_checkpoint, read_description, save_checkpoint, sign


def inputs(samples: int = 4) -> Tensor:
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of packed and plain weights, in all 4 KB."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    prepared = qat.prepare(net.eval(), qat.preset("w4a8"), inputs())
    qat.calibrate(prepared, [inputs()])
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_checkpoint(qat.lower(prepared), path)
    return path


def outcome(path: Path) -> Tensor | None:
    """The loaded network's result, or None if the file was refused as it should be."""
    try:
        network = load_checkpoint(path)
    except ValueError:
        return None
    return network(inputs())


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# ---- mutations -------------------------------------------------------------------------------------------------------


def _flip(content: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice([1, 1, 2, 8])):
        content[draw.randrange(len(content))] ^= draw.randrange(1, 256)


def _flip_header(content: bytearray, draw: random.Random) -> None:
    content[draw.randrange(8 + struct.unpack("<Q", content[:8])[0])] ^= 1 << draw.randrange(8)


def _truncate(content: bytearray, draw: random.Random) -> None:
    del content[draw.randrange(len(content)) :]


def _insert(content: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(content) + 1)
    content[place:place] = draw.randbytes(draw.choice([1, 8, 100]))


def _remove(content: bytearray, draw: random.Random) -> None:
    place = draw.randrange(len(content))
    del content[place : place + draw.choice([1, 8, 100])]


def _length(content: bytearray, draw: random.Random) -> None:
    content[:8] = struct.pack("<Q", draw.choice([0, 1, len(content), 2**31, 2**63, 2**64 - 1, draw.randrange(5000)]))


ABSURD = [-1, 0, 1, 7, 2**31, 2**60, 2**64, -(2**60), 1.5, None, "x", [], {}, [2**60, 2**60], True]


def _edit_header(content: bytearray, draw: random.Random) -> None:
    header, data = header_of(bytes(content))
    entry = header[draw.choice(list(header))]
    key = draw.choice(list(entry))
    value = entry[key]
    if isinstance(value, list) and value and draw.random() < 0.7:
        value[draw.randrange(len(value))] = draw.choice(ABSURD)
    else:
        entry[key] = draw.choice([*ABSURD, "F64", "I8", "U8", "F4", "BOOL"])
    content[:] = with_header(header, data)


def _edit_metadata(content: bytearray, draw: random.Random) -> None:
    header, data = header_of(bytes(content))
    stated = json.loads(header["__metadata__"]["qat"])
    stated[draw.choice(["format_version", "sha256", "packed", "network"])] = draw.choice(ABSURD)
    header["__metadata__"]["qat"] = json.dumps(stated)
    content[:] = with_header(header, data)


def _swap_data(content: bytearray, draw: random.Random) -> None:
    header, data = header_of(bytes(content))
    first, second = draw.sample([name for name in header if name != "__metadata__"], 2)
    header[first], header[second] = header[second], header[first]
    content[:] = with_header(header, data)


MUTATIONS = [
    _flip, _flip_header, _truncate, _insert, _remove, _length, _edit_header, _edit_metadata, _swap_data,
]  # fmt: skip


def fuzz(small: Path, folder: Path, count: int, seed: int) -> int:
    """The number of mutated files that were refused; every other one must give exactly the original outputs."""
    content, path, draw = small.read_bytes(), folder / "mutated.safetensors", random.Random(seed)
    expected = load_checkpoint(small)(inputs())
    refused = 0
    for number in range(count):
        mutation = draw.choice(MUTATIONS)
        mutated = bytearray(content)
        mutation(mutated, draw)
        path.write_bytes(mutated)
        start = time.perf_counter()
        result = outcome(path)
        assert time.perf_counter() - start < 5, (number, mutation.__name__)
        refused += result is None
        assert result is None or torch.equal(result, expected), (number, mutation.__name__)
    return refused


def test_mutated_files_are_refused_or_give_the_same(small: Path, tmp_path: Path) -> None:
    assert fuzz(small, tmp_path, 1000, seed=0) > 950


@pytest.mark.slow
def test_ten_thousand_mutated_files(small: Path, tmp_path: Path) -> None:
    assert fuzz(small, tmp_path, 10_000, seed=1) > 9500


def test_truncated_files_are_refused(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "cut.safetensors"
    (header,) = struct.unpack("<Q", content[:8])
    for length in [0, 1, 7, 8, 9, header // 2, header + 7, header + 8, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            load_checkpoint(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_checkpoint(path)


def entry(**changes: Any) -> Callable[[dict[str, Any], int], None]:
    return lambda header, size: header["small.float32"].update(changes)


HEADERS: dict[str, Callable[[dict[str, Any], int], Any]] = {
    "a huge shape": entry(shape=[2**60]),
    "a shape whose product overflows": entry(shape=[2**40, 2**40]),
    "a negative size": entry(shape=[-1]),
    "a size that is no integer": entry(shape=[1.5]),
    "a size of 70 bits": entry(shape=[2**70]),
    "as many dimensions as bytes": entry(shape=[1] * 4000),
    "a type that is none": entry(dtype="F1024"),
    "a wider type": entry(dtype="F64"),
    "offsets past the end": entry(data_offsets=[0, 2**50]),
    "offsets of 70 bits": entry(data_offsets=[2**70, 2**71]),
    "offsets that go back": entry(data_offsets=[8, 0]),
    "negative offsets": entry(data_offsets=[-8, 0]),
    "a part of an entry": lambda header, size: header["small.float32"].pop("shape"),
    "a tensor over another": lambda header, size: header.update(more=dict(header["small.float32"])),
    "empty tensors without end": lambda header, size: header.update(
        {f"t{i}": {"dtype": "F32", "shape": [0, 2**40], "data_offsets": [size, size]} for i in range(2_000)}
    ),
}


@pytest.mark.parametrize("what", HEADERS)
def test_an_absurd_header_is_refused_and_costs_nothing(what: str, small: Path, tmp_path: Path) -> None:
    """safetensors' own header, which no checksum covers before it is read."""
    header, data = header_of(small.read_bytes())
    HEADERS[what](header, len(data))
    refused_at_no_cost(with_header(header, data), tmp_path)


@pytest.mark.parametrize("claimed", [0, 2**31, 2**63, 2**64 - 1])
def test_a_header_of_an_absurd_length_is_refused(claimed: int, small: Path, tmp_path: Path) -> None:
    refused_at_no_cost(struct.pack("<Q", claimed) + small.read_bytes()[8:], tmp_path)


def refused_at_no_cost(content: bytes, folder: Path) -> None:
    path = folder / "absurd.safetensors"
    path.write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=r"truncated or not a safetensors file|edited or damaged") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert time.perf_counter() - start < 5


def test_no_byte_of_the_tensors_is_unprotected(small: Path, tmp_path: Path) -> None:
    content, path = small.read_bytes(), tmp_path / "flipped.safetensors"
    start = 8 + struct.unpack("<Q", content[:8])[0]
    for position in range(start, len(content), 7):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="does not match its sha256"):
            load_checkpoint(path)


# ---- what others wrote -----------------------------------------------------------------------------------------------


def restated(source: Path, path: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of a checkpoint whose metadata went through `change`."""
    with safe_open(source, framework="pt") as file:
        stated = json.loads(file.metadata()["qat"])
    save_file(load_file(source), path, {"qat": json.dumps(change(stated))})
    return path


def test_a_copy_by_another_writer_loads(small: Path, tmp_path: Path) -> None:
    copied = restated(small, tmp_path / "copy.safetensors", lambda stated: stated)
    assert torch.equal(load_checkpoint(copied)(inputs()), load_checkpoint(small)(inputs()))


def _pop(key: str) -> Any:
    return lambda d: {k: v for k, v in d.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"packed": {}}, "edited or damaged"),
        (lambda d: d | {"sha256": "0" * 64}, "edited or damaged"),
        (lambda d: d | {"format_version": 1}, "edited or damaged"),
        (lambda d: d | {"format_version": FORMAT_VERSION + 1}, rf"format version {FORMAT_VERSION + 1}.*upgrade"),
        (lambda d: {"format_version": 99, "sha256": "", "blocks": [1]}, "version 99, this qat reads"),
        (lambda d: d | {"format_version": "1"}, "format version"),
        (lambda d: d | {"format_version": None}, "format version"),
        (_pop("sha256"), "damaged.*sha256"),
        (_pop("format_version"), "damaged.*format_version"),
        (lambda d: [d], "damaged"),
        (lambda d: 7, "damaged"),
        (lambda d: None, "damaged"),
    ],
)
def test_edited_metadata_is_refused(small: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = restated(small, tmp_path / "edited.safetensors", change)
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "\u0000", "[" * 100_000])
def test_metadata_that_is_not_json(small: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "edited.safetensors"
    save_file(load_file(small), path, {"qat": text})
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("what", ["value", "missing", "extra", "renamed", "dtype", "shape"])
def test_edited_tensors_are_refused(small: Path, tmp_path: Path, what: str) -> None:
    tensors = load_file(small)
    name = "small.int32"
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
    with safe_open(small, framework="pt") as file:
        metadata = file.metadata()
    path = tmp_path / "edited.safetensors"
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="edited or damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_foreign_safetensors_file(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match="not an int8 checkpoint of qat"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"text\n" * 100, b"\x00" * 1000, b"\xff" * 1000, b"PK\x03\x04" + b"z" * 500])
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_training_checkpoint_is_not_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_checkpoint(path)


# ---- absurd, with a checksum that is right ---------------------------------------------------------------------------


def forged(source: Path, path: Path, change: Callable[[dict[str, Any]], Any], text: bytes | None = None) -> Path:
    """A copy whose description went through `change`, signed with a good checksum."""
    description = copy.deepcopy({k: v for k, v in read_description(source).items() if k in ("network", "tensors")})
    description = change(description) or description
    tensors, stated = load_file(source), {"format_version": FORMAT_VERSION}
    packed = zlib.compress(json.dumps(description).encode() if text is None else text)
    tensors[DESCRIPTION] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
    save_file(tensors, path, {"qat": json.dumps(stated | {"sha256": sign(tensors, stated)})})
    return path


def conv(description: dict[str, Any]) -> dict[str, Any]:
    nodes = description["network"]["nodes"]
    settings: dict[str, Any] = next(node["settings"] for node in nodes if node["layer"] == "integer_conv")
    return settings


def setting(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: conv(d).update(changes)


def deep(description: dict[str, Any], levels: int = 500) -> None:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    conv(description)["stride"] = value


def node(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda d: d["network"]["nodes"][1].update(changes)


CASES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (setting(weight_shape=[2**60, 1, 3, 3]), r"weight_shape.0 is 1152921504606846976, not 0 to"),
    (setting(weight_shape=[2**30, 2**30, 3, 3]), "larger than anything in a file of this size"),
    (setting(weight_shape=[2**20, 4, 3, 3]), "larger than anything in a file of this size"),
    (setting(weight_shape=[-4, 1, 3, 3]), r"weight_shape.0 is -4"),
    (setting(weight_shape=[4, 1, 3, 4]), "fit|takes"),
    (setting(weight_shape=[]), "no network can be built"),
    (setting(weight_shape="wide"), "no network can be built|fit"),
    (setting(stride=[0, 1]), r"stride.0 is 0, not 1 to"),
    (setting(dilation=[-1, 1]), r"dilation.0 is -1"),
    (setting(padding=[[-5, 0], [0, 0]]), r"padding.0.0 is -5"),
    (setting(groups=0), "groups is 0, not 1 to"),
    (setting(groups=2**70), "groups is"),
    (setting(weight_bounds=[0, 2**40]), "takes|fit|packed"),
    (setting(weight_step=0), "weight_step is 0"),
    (setting(surprise=1), "no network can be built.*surprise"),
    (deep, "deeper than"),
    (node(layer="os.system"), "layer is 'os.system', not one of integer_conv"),
    (node(layer=["add"]), "layer is"),
    (node(inputs=["nowhere"]), "inputs is .*nowhere.*, not names of what comes before it"),
    (node(settings=None), "settings is None, not a table"),
    (node(name=7), "a table with a name"),
    (lambda d: d["network"].update(outputs=["nowhere"]), "outputs is .*nowhere"),
    (lambda d: d["network"].update(outputs=[]), "outputs"),
    (lambda d: d["network"].update(nodes={}), "nodes is .*, not a list"),
    (lambda d: d["network"]["nodes"].append(d["network"]["nodes"][0]), "not a name of its own"),
    (lambda d: d.update(network=3), "the network is 3, not a table"),
    (lambda d: d["tensors"].__delitem__(-1), "tensors of no layer"),
    (lambda d: d["tensors"].append(d["tensors"][0]), "there twice"),
    (lambda d: d["tensors"].append(["layers.none.weight", "plain", None]), "of no layer"),
    (lambda d: d["tensors"][0].__setitem__(1, "pickle"), "stored as 'pickle'"),
    (lambda d: d["tensors"][1].__setitem__(1, "same"), "which does not come before it|fit"),
    (lambda d: d.update(tensors=5), "fit"),
    (lambda d: {"network": {}}, "without 'network' and 'tensors'"),
    (lambda d: [1, 2], "without 'network' and 'tensors'"),
]


@pytest.mark.parametrize(("change", "message"), CASES)
def test_an_absurd_description_is_refused(small: Path, tmp_path: Path, change: Any, message: str) -> None:
    path = forged(small, tmp_path / "forged.safetensors", change)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert time.perf_counter() - start < 5


def test_an_unchanged_description_is_not_refused(small: Path, tmp_path: Path) -> None:
    path = forged(small, tmp_path / "forged.safetensors", lambda d: None)
    assert torch.equal(load_checkpoint(path)(inputs()), load_checkpoint(small)(inputs()))


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{", "cannot be read"), (b"[" * 1_000_000, "cannot be read"), (b"\xff", "cannot be read"), (b"3", "without"),
     (b" " * (65 * 2**20), "cut short or longer")],
)  # fmt: skip
def test_a_description_that_is_not_one(small: Path, tmp_path: Path, text: bytes, message: str) -> None:
    path = forged(small, tmp_path / "forged.safetensors", lambda d: None, text)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("function", {"name": "system", "output": None}), ("move", {"name": "system", "output": None})],
)
def test_functions_are_of_the_table(small: Path, tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    path = forged(small, tmp_path / "forged.safetensors", node(layer=name, settings=settings))
    with pytest.raises(ValueError, match="name is 'system', not one of"):
        load_checkpoint(path)


class Larger(nn.Module):
    """Every way to make much of little."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.embed = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(self.conv(self.embed(x)), (1, 1, 0, 1)).repeat(1, 1, 2, 1)
        return nn.functional.adaptive_avg_pool2d(nn.functional.interpolate(x, scale_factor=2), 4).flatten(1)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    prepared = qat.prepare(Larger().eval(), qat.preset("int8"), inputs())
    qat.calibrate(prepared, [inputs()])
    path = tmp_path_factory.mktemp("larger") / "model.safetensors"
    save_checkpoint(qat.lower(prepared), path)
    return path


@pytest.mark.parametrize(
    ("where", "setting", "value"),
    [("pad", "pads", [[0, 2**20], [2**20, 0]]), ("repeat", "sizes", [1, 1, 2**16, 2**16]),
     ("interpolate", "scale_factor", 2.0**20), ("conv", "padding", [[2**20, 2**20]] * 2),
     ("adaptive", "output_size", [2**20, 2**20])],
)  # fmt: skip
def test_a_setting_that_makes_much_of_little_is_refused_at_the_first_call(
    larger: Path, tmp_path: Path, where: str, setting: str, value: Any
) -> None:
    changed: list[str] = []

    def change(description: dict[str, Any]) -> None:
        for node in description["network"]["nodes"]:
            if where in node["name"] and setting in node["settings"]:
                node["settings"][setting] = value
                changed.append(node["name"])

    network = load_checkpoint(forged(larger, tmp_path / "forged.safetensors", change))
    assert len(changed) == 1
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for _ in range(2):  # nor at the second
        with pytest.raises(
            ValueError, match=rf"node '{changed[0]}' makes a tensor of the shape .* settings are absurd"
        ):
            network(inputs())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB
    assert time.perf_counter() - start < 5


def test_what_is_not_absurd_is_tried_once(larger: Path, small: Path) -> None:
    for path in (larger, small):
        network = load_checkpoint(path)
        first = network(inputs())
        assert network.trial is None
        assert torch.equal(network(inputs()), first)
        assert torch.equal(copy.deepcopy(load_checkpoint(path))(inputs()), first)
