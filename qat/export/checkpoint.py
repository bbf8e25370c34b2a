"""The int8 checkpoint: one safetensors file with integers, scales and a plain-data description of the network.

    tensors    LAYER.weight (bits packed below 8), .weight_scale, .weight_zero_point, .bias (int32), grids' scale and
               zero_point
    metadata   "qat": JSON {format_version, network (IntegerNetwork.spec), packed, sha256}

Nothing in it is code and nothing is unpickled. The checksum covers every tensor and the description, so that an edited
or damaged file is refused.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from qat.export.files import write_atomically
from qat.numerics.packing import pack_bits, unpack_bits
from qat.runtime.layers import FloatConv, IntegerConv
from qat.runtime.lookup import LookUp
from qat.runtime.network import IntegerNetwork
from qat.runtime.stored import ProductConv, TableConv

FORMAT_VERSION = 1


def save_checkpoint(network: IntegerNetwork, path: Path) -> None:
    """Write `network` to `path`; an earlier file there survives if writing fails.

    The same network gives the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in sorted(network.state_dict().items())}
    packed: dict[str, Any] = {}
    for name, layer in network.named_modules():
        stored = codes_of(layer)
        if stored is None:
            continue
        attribute, codes, (low, high), step = stored
        bits = ((high - low) // step).bit_length()
        if bits < 8:
            key = f"{name}.{attribute}"
            packed[key] = {"bits": bits, "low": low, "step": step, "shape": list(codes.shape)}
            tensors[key] = pack_bits((codes.int() - low) // step, bits)
    description = {"format_version": FORMAT_VERSION, "network": network.spec(), "packed": packed}
    description["sha256"] = _checksum(tensors, description)
    metadata = {"qat": json.dumps(description, sort_keys=True, separators=(",", ":"))}
    write_atomically(path, save(tensors, metadata))


def load_checkpoint(path: str | Path) -> IntegerNetwork:
    """Read an int8 checkpoint. The network it returns needs no training code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, edited, not an int8 checkpoint, or of a newer format version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no int8 checkpoint at '{path}'")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is truncated or not a safetensors file ({error})") from error
    if "qat" not in metadata:
        raise ValueError(
            f"'{path}' is a safetensors file, but not an int8 checkpoint of qat: its metadata has no 'qat' entry"
        )
    try:
        description = json.loads(metadata["qat"])
        version, stated = description["format_version"], description.pop("sha256")
    except (json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"'{path}': the description in its metadata is damaged ({error!r})") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has format version {version}, this qat reads up to {FORMAT_VERSION}; upgrade qat to load it"
        )
    if _checksum(tensors, description) != stated:
        raise ValueError(f"'{path}' was edited or damaged: its content does not match its sha256")
    for key, entry in description["packed"].items():
        shape = torch.Size(entry["shape"])
        values = unpack_bits(tensors[key], entry["bits"], shape.numel()).int() * entry["step"] + entry["low"]
        tensors[key] = values.to(torch.int8 if entry["low"] < 0 else torch.uint8).reshape(shape)
    network = IntegerNetwork.from_spec(description["network"])
    network.load_state_dict(tensors)
    return network.eval()


def codes_of(layer: nn.Module) -> tuple[str, Tensor, list[int], int] | None:
    """What a layer stores in few bits: attribute, integers, smallest and largest, and their distance."""
    if isinstance(layer, IntegerConv | FloatConv | LookUp) and layer.weight_bounds is not None:
        return "weight", layer.weight, layer.weight_bounds, layer.weight_step
    if isinstance(layer, TableConv | ProductConv) and layer.bounds is not None:
        return "codes", layer.codes, layer.bounds, 1
    return None


def _checksum(tensors: dict[str, Tensor], description: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
