"""Exported files: EXPORTERS in `formats` is the table that configurations choose from."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from qat.export.checkpoint import load_checkpoint, save_checkpoint
from qat.export.formats import EXPORTERS, Exporter
from qat.export.onnx import save_onnx
from qat.runtime.network import IntegerNetwork
from qat.scheme import choice


def export(
    network: IntegerNetwork,
    folder: str | Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    formats: Sequence[str] = ("int8", "onnx"),
) -> dict[str, Path]:
    """Write an integer network in each of `formats`. The names and types of its inputs go into `info`.

    Args:
        network: from `qat.lower`.
        folder: made if it is not there. Files are written whole or not at all.
        example_inputs: float32 (indices: integers), batch dimension first.
        formats: keys of `EXPORTERS`.

    Returns:
        Format -> path of its file.

    Raises:
        ValueError: an unknown format, or a network that is not of integer layers alone.
        ImportError: a format needs a package that is not installed.
        OSError: the folder or disk refuses.
    """
    for name in formats:
        choice("export.formats", name, EXPORTERS).require()
    if not isinstance(network, IntegerNetwork):
        inside = [f"lowered.{name}" for name, module in network.named_modules() if isinstance(module, IntegerNetwork)]
        raise ValueError(
            f"{type(network).__name__} was lowered in parts, between which its own code runs: no file can hold that. "
            f"Its parts can be exported one by one ({', '.join(inside[:4])}{', ...' if len(inside) > 4 else ''}). "
            f"qat.report names what was not recorded; quant.graph=required refuses such a network"
        )
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if len(inputs) == len(network.inputs) and all(isinstance(x, Tensor) for x in inputs):
        network.info["inputs"] = [
            {"name": name, "shape": [None, *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")}
            for name, x in zip(network.inputs, inputs, strict=True)
        ]
    paths = {name: Path(folder) / EXPORTERS[name].file for name in formats}
    for name, path in paths.items():
        EXPORTERS[name].write(network, path, inputs)
    return paths


load = load_checkpoint

__all__ = ["EXPORTERS", "Exporter", "export", "load", "load_checkpoint", "save_checkpoint", "save_onnx"]
