"""Reading weights and phases out of files."""

import difflib
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from qat.scheme import QuantConfig


def load_float_weights(net: nn.Module, path: str | Path) -> None:
    """Load trained float weights into a network that has not been prepared.

    Args:
        net: receives the weights.
        path: `.safetensors`, or a `.ckpt` / `.pt` / `.pth` that `torch.load(weights_only=True)` reads: a state dict, or
            a Lightning checkpoint. A common prefix (`net.`, `model.`, `module.`) is taken off.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of tensors, or it does not fit: lists missing and unexpected keys and differing shapes.
    """
    tensors = _strip_prefix(read_tensors(path), net)
    own = net.state_dict()
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    missing = [name for name in own if name not in tensors and name not in optional]
    unexpected = [name for name in tensors if name not in own]
    shapes = [
        f"{name}: file {list(tensors[name].shape)}, network {list(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if missing or unexpected or shapes:
        parts = [_listing("missing from the file", missing), _listing("unexpected in the file", unexpected),
                 _listing("of another shape", shapes)]  # fmt: skip
        close = difflib.get_close_matches(missing[0], unexpected, n=1) if missing else []
        hint = f". Is '{close[0]}' meant to be '{missing[0]}'?" if close else ""
        raise ValueError(
            f"float_checkpoint={path} does not fit {type(net).__name__}: {'; '.join(filter(None, parts))}{hint}"
        )
    net.load_state_dict(tensors, strict=False)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a state dict or a Lightning checkpoint."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"float_checkpoint={path}: there is no such file")
    try:
        data: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # broken files raise many types
        raise ValueError(f"float_checkpoint={path} cannot be read: {_why_unreadable(error)}") from error
    data = data.get("state_dict", data) if isinstance(data, dict) else data
    if not isinstance(data, dict) or not all(isinstance(value, Tensor) for value in data.values()):
        raise ValueError(f"float_checkpoint={path} holds no state dict (a mapping of names to tensors)")
    return data


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's own message recommends weights_only=False
        return "it is damaged, or holds Python objects; save tensors alone: torch.save(net.state_dict(), path)"
    return f"{error}; is it whole, and of the kind that its name says?"


def _strip_prefix(tensors: dict[str, Tensor], net: nn.Module) -> dict[str, Tensor]:
    own = set(net.state_dict())
    best = tensors
    for prefix in ("net.", "model.", "module."):
        stripped = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if len(own & set(stripped)) > len(own & set(best)):
            best = stripped
    return best


def _listing(label: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{len(names)} {label} ({', '.join(names[:4])}{more})"


def checkpoint_phase(path: str | Path | None, model: Mapping[str, Any], config: QuantConfig) -> str | None:
    """The phase (`float` or `qat`) in which a training checkpoint was written; None for no path.

    Args:
        path: the checkpoint to go on from.
        model, config: of the run that wants to; they must be those of the checkpoint.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint of QATModule, or one of another model or quantization: lists what differs.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(f"ckpt_path={path}: there is no such file")
    try:
        checkpoint = torch.load(path, "cpu", weights_only=False)
    except Exception as error:  # broken files raise many types
        raise ValueError(f"ckpt_path={path} cannot be read: {_why_unreadable(error)}") from error
    if not isinstance(checkpoint, dict) or "qat" not in checkpoint:
        raise ValueError(f"ckpt_path={path} is not a checkpoint of a training run; for weights use float_checkpoint=")
    quant = checkpoint["qat"]["quant"]
    was = {"model": checkpoint["hyper_parameters"]["model"], "quant": quant or {}}
    now = {"model": dict(model), "quant": config.to_dict() if quant else {}}
    if differ := differing(was, now):
        raise ValueError(
            f"ckpt_path={path} is of another configuration: {'; '.join(differ)}. Give the overrides of its run "
            f"(.hydra/overrides.yaml in its directory)"
        )
    return "float" if quant is None else "qat"


def differing(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, the fields of two configurations whose values differ."""
    before, after = dict(flatten(was)), dict(flatten(now))
    return [
        f"{name} was {before.get(name)}, is {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested plain data as (dotted name, value) pairs."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
