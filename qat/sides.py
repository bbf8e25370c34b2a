"""The two sides of a comparison: a training checkpoint, or an exported file of any format."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qat.export.checkpoint import read_description
from qat.export.formats import EXPORTERS
from qat.export.given import Inputs, Integers, Made, network_given, tensors_of
from qat.export.reloaded import Outputs
from qat.export.simulated import own_made, training_made
from qat.lower import lower
from qat.modes import set_mode
from qat.ptq.bias import round_biases
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork

FOLDERS = {"model.xml": "openvino", "model.h": "c_header", "config.json": "compressed_tensors"}
"""The file that tells a folder's format -> key of EXPORTERS."""


@dataclass
class Side:
    """One of the two.

    Attributes:
        label: its format.
        outputs: what it makes of a batch.
        target: key of TARGETS.
        says_target: whether the file says so itself.
        network: where it is, or was lowered to, an IntegerNetwork.
        made: (batch) -> its own integers, and its outputs; None where it shows none.
        given: (grids, batch, integers) -> what each layer makes of these integers; None where it cannot be asked.
        whole: why it cannot be asked.
        trains: it is what training simulates, whose tensors every file has.
    """

    label: str
    outputs: Callable[..., Any]
    target: str = "generic"
    says_target: bool = False
    network: IntegerNetwork | None = None
    made: Callable[[Inputs], Made] | None = None
    given: Callable[[Mapping[str, Quantize], Inputs, Integers], Made] | None = None
    whole: str = ""
    trains: bool = False

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Outputs:
        """Its outputs.

        Raises:
            ValueError: these inputs are not what it takes.
        """
        try:
            return tensors_of(self.outputs(*inputs))
        except Exception as error:  # each engine has exceptions of its own for what it does not take
            shapes = ", ".join(f"{x.dtype} {list(x.shape)}" for x in inputs)
            raise ValueError(f"{self.label} cannot be run on the data ({shapes}): {error}") from error


def open_side(text: str, target: str | None = None) -> Side:
    """Open `PATH` or `FORMAT:PATH`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a format that is not known, or a file that is damaged.
    """
    name, colon, rest = text.partition(":")
    if not (colon and name in EXPORTERS):
        name, rest = "", text
    path = Path(rest)
    if not path.exists():
        raise FileNotFoundError(f"there is no '{rest}'")
    path = path.parent if path.name in FOLDERS else path
    if not name and path.suffix == ".ckpt":
        return _training(path)
    name = name or format_of(path)
    exporter = EXPORTERS[name]
    exporter.require()
    says = name == "int8"
    if says:
        target = target or str(read_description(path)["network"]["info"].get("quant", {}).get("target", "generic"))
    chosen = target or "generic"
    try:
        opened = exporter.open(path, chosen)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # each engine has an exception of its own for a file that it cannot read
        raise ValueError(f"'{path}' cannot be opened as {exporter.label}: {error}") from error
    side = Side(exporter.label, opened, chosen, says, whole=exporter.whole)
    if exporter.given is not None:
        of_file = exporter.given
        side.given = lambda grids, x, given: of_file(path, chosen, grids, x, given)
    if isinstance(opened, IntegerNetwork):
        side.network = opened
        side.made = lambda x: own_made(opened, x)
        side.given = lambda grids, x, given: network_given(opened, grids, x, given)
    return side


def format_of(path: Path) -> str:
    """The key of EXPORTERS whose file has this name, or else this suffix (a file that failed keeps its own).

    A folder is told by what is in it, whatever its name.
    """
    plain = path.with_suffix("") if path.suffix == ".failed" else path
    same = [name for name, e in EXPORTERS.items() if e.file == plain.name]
    same += [name for name, e in EXPORTERS.items() if plain.suffix and Path(e.file).suffix == plain.suffix]
    same += [name for file, name in FOLDERS.items() if (path / file).is_file()]
    if not same:
        known = ", ".join(f"{name} ({e.file})" for name, e in EXPORTERS.items())
        raise ValueError(
            f"'{path}': its name says no format; write FORMAT:{path}, with one of {known}, or give a .ckpt of training"
        )
    return same[0]


def _training(path: Path) -> Side:
    """A checkpoint of a run's qat phase, as export takes it."""
    from qat.training.module import QATModule  # not above: lightning takes seconds to import

    try:
        module = QATModule.load_from_checkpoint(path, map_location="cpu")
    except (KeyError, TypeError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as e:
        raise ValueError(f"'{path}' is not a checkpoint of a training run ({type(e).__name__}: {e})") from e
    if module.hparams["quant"] is None:
        raise ValueError(
            f"'{path}' is of the float phase: there are no integers to compare; give one of checkpoints/qat"
        )
    prepared = module.prepared
    set_mode(prepared, "frozen")
    round_biases(prepared.eval())
    target = vars(prepared)["meta"]["qat"]["config"].target
    side = Side(label="QAT", outputs=prepared, target=target, says_target=True)
    if isinstance(prepared, fx.GraphModule):
        recorded, network = prepared, lower(prepared)
        side.network, side.trains = network, True
        side.made = lambda x: training_made(recorded, network, *x)
        side.given = lambda grids, x, given: training_made(recorded, network, *x, given=given)
    return side
