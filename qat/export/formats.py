"""EXPORTERS, the table of file formats that configurations choose from: a new one is an entry here.

An entry knows how its file is written, how it is opened again and what it cannot hold. The main job, parity, the
reports and `python -m qat compare` read the table, and know no format by name.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.export.c_header import check_c_header, open_c_header, save_c_header
from qat.export.checkpoint import load_checkpoint, save_checkpoint
from qat.export.onnx import save_onnx
from qat.export.onnx_stored import check_onnx
from qat.export.onnxruntime import OnnxNetwork, onnx_integers_given
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork
from qat.scheme import QuantConfig

Inputs = tuple[Tensor, ...]
Integers = dict[str, Tensor]
"""Name of a tensor -> its integers, as the runtime's grids number them."""

Given = Callable[[Path, str, Mapping[str, Quantize], Inputs, Integers], Integers]


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """One file format.

    Attributes:
        label: what people read.
        file: name of the file, or folder, in a run's `export/`.
        write: (network, path, example inputs) -> None. Written whole or not at all.
        open: (path, key of TARGETS) -> a callable on tensors that returns a float tensor or a tuple of
            them, as its target runs the file.
        given: (path, key of TARGETS, grids, inputs, integers) -> what each layer of the file makes of these integers,
            by name of tensor; None where a file can be run from end to end only.
        check: refuses a configuration that no file of this format can hold, with a ValueError: which field, why, what
            to write instead; None where it holds everything.
        packages: what has to be installed, as imported.
        extra: of pyproject.toml, that installs them.
    """

    label: str
    file: str
    write: Callable[[IntegerNetwork, Path, Inputs], None]
    open: Callable[[Path, str], Callable[..., Any]]
    given: Given | None = None
    check: Callable[[QuantConfig], None] | None = None
    packages: tuple[str, ...] = ()
    extra: str = ""

    def require(self) -> None:
        """Raise ImportError, with what to install, if a package is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(
                f"{self.label} needs the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}: "
                f"pip install 'qat[{self.extra}]', or leave it out of export.formats"
            )


@torch.no_grad()
def integers_given(network: IntegerNetwork, inputs: Inputs, given: Integers) -> Integers:
    """What each layer of `network` makes of `given` integers, by name of tensor."""
    made: Integers = {}

    def watch(name: str, tensor: Tensor) -> Tensor:
        if name in given:
            made[name] = tensor
        return given.get(name, tensor)

    network.run(*inputs, watch=watch)
    return made


def _of_checkpoint(path: Path, target: str, grids: Mapping[str, Quantize], inputs: Inputs, given: Integers) -> Integers:
    return integers_given(load_checkpoint(path), inputs, given)


EXPORTERS: dict[str, Exporter] = {
    "int8": Exporter(
        label="int8 checkpoint",
        file="model.safetensors",
        write=lambda network, path, inputs: save_checkpoint(network, path),
        open=lambda path, target: load_checkpoint(path),
        given=_of_checkpoint,
    ),
    "onnx": Exporter(
        label="ONNX",
        file="model.onnx",
        write=save_onnx,
        open=OnnxNetwork,
        given=onnx_integers_given,
        check=check_onnx,
        packages=("onnx", "onnxruntime"),
        extra="export",
    ),
    "c_header": Exporter(
        label="C header",
        file="c_header",
        write=save_c_header,
        open=open_c_header,
        check=check_c_header,
        packages=("numpy",),
    ),
}
