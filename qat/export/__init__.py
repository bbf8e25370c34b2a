"""Exported files: EXPORTERS in `formats` is the table that configurations choose from."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, fx, nn

from qat.export.checkpoint import load_checkpoint, save_checkpoint
from qat.export.formats import EXPORTERS, Exporter
from qat.export.onnx import save_onnx
from qat.runtime.network import IntegerNetwork
from qat.scheme import choice


def check_network(prepared: nn.Module, formats: Sequence[str]) -> None:
    """Refuse, before it is trained, a network that a file format cannot hold.

    Raises:
        ValueError: names the format, the reason and what to do.
    """
    for name in formats:
        exporter: Exporter = choice("export.formats", name, EXPORTERS)
        if exporter.check_network is not None:
            exporter.check_network(prepared)
        elif not isinstance(prepared, fx.GraphModule) or prepared.meta.get("opaque"):
            raise ValueError(
                f"export.formats: {exporter.label} holds networks that are recorded as a whole, and "
                f"{type(prepared).__name__} is quantized in parts, between which its own code runs. Leave it out "
                f"(a language model of transformers: export.formats=[compressed_tensors])"
            )


def export(
    network: nn.Module,
    folder: str | Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    formats: Sequence[str] = ("int8", "onnx"),
) -> dict[str, Path]:
    """Write an integer network in each of `formats`. The names and types of its inputs go into `info`.

    Args:
        network: from `qat.lower`; for formats that hold a network's own code (`compressed_tensors`) the prepared one.
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
    paths = {name: Path(folder) / EXPORTERS[name].file for name in formats}
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    of_prepared = [name for name in formats if EXPORTERS[name].of_prepared]
    if of_prepared and isinstance(network, IntegerNetwork):
        raise ValueError(
            f"formats={of_prepared}: written of a prepared language model of transformers, which vLLM runs by its own "
            f"code: qat.export(prepared, ...). For an IntegerNetwork use int8 or onnx"
        )
    if not isinstance(network, IntegerNetwork) and len(of_prepared) < len(formats):
        inside = [f"lowered.{name}" for name, module in network.named_modules() if isinstance(module, IntegerNetwork)]
        raise ValueError(
            f"{type(network).__name__} was lowered in parts, between which its own code runs: no file can hold that. "
            f"Its parts can be exported one by one ({', '.join(inside[:4])}{', ...' if len(inside) > 4 else ''}). "
            f"qat.report names what was not recorded; quant.graph=required refuses such a network"
        )
    if isinstance(network, IntegerNetwork):
        _describe_inputs(network, inputs)
    for name, path in paths.items():
        EXPORTERS[name].write(network, path, inputs)
    return paths


def _describe_inputs(network: IntegerNetwork, inputs: tuple[Tensor, ...]) -> None:
    if len(inputs) == len(network.inputs) and all(isinstance(x, Tensor) for x in inputs):
        network.info["inputs"] = [
            {"name": name, "shape": [None, *x.shape[1:]], "dtype": str(x.dtype).removeprefix("torch.")}
            for name, x in zip(network.inputs, inputs, strict=True)
        ]


load = load_checkpoint

__all__ = [
    "EXPORTERS",
    "Exporter",
    "check_network",
    "export",
    "load",
    "load_checkpoint",
    "save_checkpoint",
    "save_onnx",
]
