"""The int8 checkpoint: one safetensors file with integers, scales and a plain-data description of the network.

    metadata   "qat": JSON {format_version, sha256}
    tensors    "description": JSON {network (IntegerNetwork.spec), tensors (see `storage`)}, compressed by zlib;
               the network's tensors in the smallest form that gives back the same bits (`storage`)

Nothing in it is code and nothing is unpickled. The checksum covers every tensor and the description, so that an edited
or damaged file is refused; `description` judges what a file with a good checksum asks for.

Version 1 had the description in the metadata and every tensor under its name, packed or as it is in memory.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from qat.export.description import build, try_out
from qat.export.files import write_atomically
from qat.export.storage import read_tensors, stored_bytes, write_tensors
from qat.numerics.packing import unpack_bits
from qat.runtime.network import IntegerNetwork

FORMAT_VERSION = 2
DESCRIPTION = "description"
LONGEST_DESCRIPTION = 64 * 2**20
_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def save_checkpoint(network: IntegerNetwork, path: Path) -> None:
    """Write `network` to `path`; an earlier file there survives if writing fails.

    The same network gives the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    spec = json.loads(json.dumps(network.spec()))  # as it will be read
    content = _content(network, spec, IntegerNetwork.from_spec(spec))
    if sum(t.nbytes for t in network.state_dict().values()) > _memory_limit(len(content)) // 2:
        content = _content(network, spec, None)  # so much was left out that a reader would not believe it
    write_atomically(path, content)


def load_checkpoint(path: str | Path) -> IntegerNetwork:
    """Read an int8 checkpoint. The network it returns needs no training code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, edited, not an int8 checkpoint, absurd, or of a newer format version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no int8 checkpoint at '{path}'")
    content = path.read_bytes()
    try:
        description, tensors = _read(content)
        network = build(description["network"], _memory_limit(len(content)))
        with torch.no_grad():
            if "packed" in description:
                _fill_version_1(network, tensors, description["packed"])
            else:
                read_tensors(network, tensors, description["tensors"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"'{path}': the description in it does not fit its tensors ({error!r})") from error
    except ValueError as error:
        raise ValueError(f"'{path}' {error}") from error
    network.trial = try_out
    return network.eval()


def read_description(path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of itself, without building the network: `network` (with `info`), `tensors`.

    Raises:
        ValueError: as `load_checkpoint`.
    """
    try:
        return _read(Path(path).read_bytes())[0]
    except ValueError as error:
        raise ValueError(f"'{path}' {error}") from error


def sizes_in(path: str | Path, network: IntegerNetwork) -> dict[str, int]:
    """Tensor of `network`, which was loaded from `path` -> bytes that it takes in the file."""
    description, tensors = _read(Path(path).read_bytes())
    if "tensors" in description:
        return stored_bytes(network, description["tensors"])
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def _content(network: IntegerNetwork, spec: dict[str, Any], empty: IntegerNetwork | None) -> bytes:
    tensors, table = write_tensors(network, empty)
    text = json.dumps({"network": spec, "tensors": table}, sort_keys=True, separators=(",", ":"))
    tensors[DESCRIPTION] = torch.frombuffer(bytearray(zlib.compress(text.encode(), 9)), dtype=torch.uint8)
    stated: dict[str, Any] = {"format_version": FORMAT_VERSION}
    stated["sha256"] = sign(tensors, stated)
    return save(tensors, {"qat": json.dumps(stated, sort_keys=True, separators=(",", ":"))})


def _memory_limit(size: int) -> int:
    """Bytes that the network of a file of `size` bytes may take: a bit becomes a byte, zero points are left out."""
    return 64 * size + 2**20


def _read(content: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file whose checksum is right."""
    try:
        parts = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise ValueError(f"is truncated or not a safetensors file ({error}){_instead(content)}") from error
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    if "qat" not in metadata:
        raise ValueError("is a safetensors file, but not an int8 checkpoint of qat: its metadata has no 'qat' entry")
    try:
        stated = json.loads(metadata["qat"])
        version, checksum = stated["format_version"], stated.pop("sha256")
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is damaged: the description in its metadata cannot be read ({error!r})") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(f"has format version {version}, this qat reads up to {FORMAT_VERSION}; upgrade qat to load it")
    tensors = {name: _tensor(name, part) for name, part in parts}
    if sign(tensors, stated) != checksum:
        raise ValueError("was edited or damaged: its content does not match its sha256")
    if version < 2:
        return stated, tensors
    return stated | _unzipped(tensors), {name: t for name, t in tensors.items() if name != DESCRIPTION}


def _instead(content: bytes) -> str:
    """What a file is that people take for a checkpoint, and what reads it."""
    if content.startswith((b"PK\x03\x04", b"\x80\x02")):
        return (
            ". It looks like a file of torch.save, which is never unpickled here: of a training run, load it with "
            "qat.training.QATModule.load_from_checkpoint, then lower and export"
        )
    if b"ai.onnx" in content[:200] or b"QuantizeLinear" in content or content[:1] == b"\x08":
        return ". It looks like an ONNX file, which qat.export.onnxruntime.OnnxNetwork and ONNX Runtime run"
    return ""


def _tensor(name: str, part: dict[str, Any]) -> Tensor:
    if part["dtype"] not in _DTYPES:
        raise ValueError(f"has the tensor '{name}' of {part['dtype']}; an int8 checkpoint has {', '.join(_DTYPES)}")
    dtype = _DTYPES[part["dtype"]]
    data = bytearray(part["data"])
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.reshape(part["shape"])


def _unzipped(tensors: dict[str, Tensor]) -> dict[str, Any]:
    if DESCRIPTION not in tensors:
        raise ValueError(f"has no tensor '{DESCRIPTION}'")
    unzip = zlib.decompressobj()
    try:
        text = unzip.decompress(tensors[DESCRIPTION].numpy().tobytes(), LONGEST_DESCRIPTION)
        if not unzip.eof:
            raise ValueError(f"has a description that is cut short or longer than {LONGEST_DESCRIPTION} bytes")
        found = json.loads(text)
    except (zlib.error, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"has a description that cannot be read ({error!r})") from error
    if not isinstance(found, dict) or not {"network", "tensors"} <= found.keys():
        raise ValueError("has a description without 'network' and 'tensors'")
    return found


def _fill_version_1(network: IntegerNetwork, tensors: dict[str, Tensor], packed: dict[str, Any]) -> None:
    for key, entry in packed.items():
        shape = torch.Size(entry["shape"])
        values = unpack_bits(tensors[key], entry["bits"], shape.numel()).int() * entry["step"] + entry["low"]
        tensors[key] = values.to(torch.int8 if entry["low"] < 0 else torch.uint8).reshape(shape)
    network.load_state_dict(tensors)


def sign(tensors: dict[str, Tensor], stated: dict[str, Any]) -> str:
    """SHA-256 of every tensor's name, dtype, shape and bytes, and of the metadata but for the checksum itself."""
    digest = hashlib.sha256(json.dumps(stated, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
