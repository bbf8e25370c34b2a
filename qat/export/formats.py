"""EXPORTERS, the table of file formats that configurations choose from: a new one is an entry here.

An entry knows how its file is written, how it is opened again and what it cannot hold. The main job, parity, the
reports and `python -m qat compare` read the table, and know no format by name.
"""

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from qat.export.c_header import check_c_header, open_c_header, save_c_header
from qat.export.checkpoint import load_checkpoint, save_checkpoint
from qat.export.compressed_run import compressed_layers, open_compressed_tensors
from qat.export.executorch import PteNetwork, save_pte
from qat.export.given import Given, Inputs, Integers, Made, integers_given, network_given, network_levels
from qat.export.header_given import c_header_given
from qat.export.onnx import save_onnx
from qat.export.onnx_stored import check_onnx
from qat.export.onnxruntime import Kernels, OnnxNetwork, kernels, onnx_given
from qat.export.openvino import OpenVinoNetwork, openvino_given, openvino_kernels, save_openvino
from qat.export.pt2 import check_reference, open_pt2, pt2_given, save_pt2
from qat.export.reference import Reference
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork
from qat.scheme import QuantConfig
from qat.targets import TARGETS
from qat.targets.compressed import check_compressed

LOG = logging.getLogger(__name__)

__all__ = ["EXPORTERS", "Exporter", "Inputs", "Integers", "integers_given"]


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """One file format.

    Attributes:
        label: what people read.
        file: name of the file, or folder, in a run's `export/`.
        write: (network, path, example inputs) -> None. Written whole or not at all.
        open: (path, key of TARGETS) -> a callable on tensors that returns a float tensor or a tuple of
            them, as its target runs the file.
        kernels: (path, key of TARGETS) -> what its engine runs of the file; None where that cannot be asked.
        given: (path, key of TARGETS, grids, inputs, integers) -> what each layer of the file makes of these integers;
            None where a file can be run from end to end only.
        whole: why it can be run from end to end only.
        layers: (path, key of TARGETS, what each is asked) -> what single linear layers of the file make of it
            (`qat.export.linear`); None where it has none.
        layers_of: prepared network -> path of such a layer, as the file has it, and training's.
        check: refuses a configuration that no file of this format can hold, with a ValueError: which field, why, what
            to write instead; None where it holds everything.
        reference: (prepared network, path) -> what training simulated in the arithmetic of the file, where that is not
            float32; None where it is.
        refuse: (network, example inputs) -> None: refuses what `write` does, without the work; None where `write` is
            quick.
        of_prepared: `write` takes a prepared network whose own code an engine runs, in place of an integer network.
        check_network: refuses a prepared network that no file of this format can hold, with a ValueError, before it is
            trained; None where every recorded network goes.
        packages: what has to be installed, as imported.
        reader: what has to be installed to open the file again, but not to write it.
        extra: of pyproject.toml, that installs them.
    """

    label: str
    file: str
    write: Callable[[Any, Path, Inputs], None]
    open: Callable[[Path, str], Callable[..., Any]]
    kernels: Callable[[Path, str], Kernels] | None = None
    given: Given | None = None
    whole: str = ""
    layers: Callable[[Path, str, Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    layers_of: Callable[[nn.Module], Mapping[str, Any]] | None = None
    check: Callable[[QuantConfig], None] | None = None
    reference: Callable[[nn.Module, Path], nn.Module] | None = None
    refuse: Callable[[Any, Inputs], None] | None = None
    of_prepared: bool = False
    check_network: Callable[[nn.Module], None] | None = None
    packages: tuple[str, ...] = ()
    reader: tuple[str, ...] = ()
    extra: str = ""

    def require(self) -> None:
        """Raise ImportError, with what to install, if a package is missing."""
        if names := _missing(self.packages):
            raise ImportError(
                f"{self.label} needs {names}: pip install 'qat[{self.extra}]', or leave it out of export.formats"
            )

    def why_unread(self) -> str:
        """Why the file cannot be opened here, with what to install; empty where it can."""
        names = _missing(self.reader)
        return f"opening it needs {names}: pip install 'qat[{self.extra}]'" if names else ""


def _missing(packages: tuple[str, ...]) -> str:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}" if missing else ""


def _of_checkpoint(path: Path, target: str, grids: Mapping[str, Quantize], inputs: Inputs, given: Integers) -> Made:
    network = load_checkpoint(path)
    plan = network.fast_path().plan  # what the reloaded network runs, where it has kernels
    if plan is None:
        return network_given(network, grids, inputs, given)
    return Made(*plan.given(given, *inputs), network_levels(network, grids))


def _write_compressed_tensors(network: nn.Module, path: Path, inputs: Inputs) -> None:
    from qat.export.compressed_tensors import save_compressed_tensors  # a reloaded checkpoint needs no layers

    save_compressed_tensors(network, path)


def _reference_of_compressed_tensors(prepared: nn.Module, path: Path) -> nn.Module:
    from qat.export.compressed_tensors import simulated_as

    return simulated_as(prepared, path)


def _layers_of_compressed_tensors(prepared: nn.Module) -> Mapping[str, Any]:
    from qat.export.compressed_tensors import stored_layers

    return stored_layers(prepared)


def _check_compressed_tensors(prepared: nn.Module) -> None:
    from qat.export.compressed_tensors import check_network

    check_network(prepared)


def _check_openvino(config: QuantConfig) -> None:
    if TARGETS[config.target].pairs:
        raise ValueError(
            f"export.formats=openvino: target={config.target} has int8 in pairs around real numbers, which another "
            f"engine fuses; use target=openvino, or export.formats=[int8,onnx]"
        )
    check_onnx(config)


def _refuse_reference(network: IntegerNetwork, inputs: Inputs) -> None:
    Reference(network)


def _refuse_onnx(network: IntegerNetwork, inputs: Inputs) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(network, Path(folder) / "model.onnx", inputs)


class Engine(NamedTuple):
    """What runs ONNX files, as the fields of an Exporter."""

    open: Callable[[Path, str], Callable[..., Any]]
    kernels: Callable[[Path, str], Kernels]
    given: Given


ONNXRUNTIME = Engine(OnnxNetwork, kernels, onnx_given)
OPENVINO = Engine(
    lambda path, target: OpenVinoNetwork(path), lambda path, target: openvino_kernels(path), openvino_given
)


def _onnx_engine(target: str) -> Engine:
    """OpenVINO for what is made for it, if it is installed; else ONNX Runtime."""
    if target != "openvino":
        return ONNXRUNTIME
    if importlib.util.find_spec("openvino") is None:
        LOG.warning("target=openvino: the ONNX file is checked with ONNX Runtime, since OpenVINO is not installed; "
                    "pip install 'qat[openvino]'")  # fmt: skip
        return ONNXRUNTIME
    return OPENVINO


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
        open=lambda path, target: _onnx_engine(target).open(path, target),
        kernels=lambda path, target: _onnx_engine(target).kernels(path, target),
        given=lambda path, target, *others: _onnx_engine(target).given(path, target, *others),
        check=check_onnx,
        packages=("onnx", "onnxruntime"),
        extra="export",
    ),
    "c_header": Exporter(
        label="C header",
        file="c_header",
        write=save_c_header,
        open=open_c_header,
        given=c_header_given,
        check=check_c_header,
        packages=("numpy",),
    ),
    "compressed_tensors": Exporter(
        label="compressed-tensors",
        file="compressed_tensors",
        write=_write_compressed_tensors,
        open=open_compressed_tensors,
        check=check_compressed,
        reference=_reference_of_compressed_tensors,
        whole="what lies between its linear layers is code of transformers, which is run as a whole",
        layers=compressed_layers,
        layers_of=_layers_of_compressed_tensors,
        of_prepared=True,
        check_network=_check_compressed_tensors,
        packages=("transformers",),
        reader=("compressed_tensors",),
        extra="hf",
    ),
    "pt2": Exporter(
        label="torch.export program",
        file="model.pt2",
        write=save_pt2,
        open=open_pt2,
        refuse=_refuse_reference,
        given=pt2_given,
        check=check_reference,
    ),
    "executorch": Exporter(
        label="ExecuTorch program (XNNPACK)",
        file="model.pte",
        write=save_pte,
        open=PteNetwork,
        whole="ExecuTorch hands a program's layers to a delegate, which shows nothing in between",
        refuse=_refuse_reference,
        check=check_reference,
        packages=("executorch",),
        extra="executorch",
    ),
    "openvino": Exporter(
        label="OpenVINO",
        file="openvino",
        write=save_openvino,
        open=OPENVINO.open,
        refuse=_refuse_onnx,
        kernels=OPENVINO.kernels,
        given=OPENVINO.given,
        check=_check_openvino,
        packages=("onnx", "openvino"),
        extra="openvino",
    ),
}
