"""torch.export's `.pt2`: the network in reference quantized operations, which Inductor lowers to int8 on x86.

    import torch.ao.quantization.fx._decomposed     # registers the operations
    torch._inductor.config.freezing = True          # as an option of torch.compile it finds no weights to pack
    fast = torch.compile(torch.export.load("model.pt2").module())      # called under torch.no_grad()

`torch.export.load` unpickles what a file asks it to, and evaluates its symbolic sizes. `open_pt2` reads a file only if
it holds nothing of the kind: raw weights, a graph of known form, sizes that are symbols.
"""

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qat.export.files import write_export
from qat.export.given import Integers, Levels, Made, contradicted, tensors_of
from qat.export.reference import DEQUANTIZE, QUANTIZE, Grid, program_of
from qat.export.sums import verify
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork
from qat.scheme import QuantConfig
from qat.targets import TARGETS

TENSORS = "tensors.json"
"""The file in the archive that names the tensors which quantize operations make, in order."""

MEMBERS = re.compile(
    r"[^/]+/(data/weights/weight_\d+|data/weights/model_weights_config\.json|data/constants/model_constants_config\.json"
    r"|models/model\.json|data/sample_inputs/model\.pt|extra/tensors\.json|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|version)"
)
SIZES = re.compile(r"(Symbol\('[a-z]+\d+'(, (positive|integer|nonnegative)=True)*\)|[0-9+*/() -])+")


def save_pt2(network: IntegerNetwork, path: Path, example_inputs: tuple[Tensor, ...]) -> None:
    """Write a network as `.pt2`, whole or not at all. Of the example inputs only shapes and types are kept.

    Raises:
        ValueError: a layer that has no reference operations.
        OSError: the folder or disk refuses.
    """
    program, reference = program_of(network, tuple(torch.zeros_like(x) for x in example_inputs))
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={TENSORS: json.dumps(reference.quantized)})
    write_export(path, buffer.getvalue())


class Program:
    """A program, read back: called with tensors, it returns what the network returns."""

    def __init__(self, path: Path) -> None:
        verify(path)
        content = path.read_bytes()
        check_archive(path, content)
        found = {TENSORS: ""}
        self.graph = torch.export.load(io.BytesIO(content), extra_files=found).module()
        names = found[TENSORS]
        self.tensors: list[str] = json.loads(names)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Any:
        """As the network that was exported."""
        return self.graph(*inputs)


def open_pt2(path: Path, target: str) -> Program:
    """The program in a file.

    Raises:
        ValueError: no archive of the form that `save_pt2` writes, or a damaged one.
    """
    return Program(path)


class _Given(fx.Interpreter):
    """Runs a program's graph; readers of an integer tensor get the integers that are given."""

    def __init__(self, program: Program, grids: Mapping[str, Grid], given: Mapping[str, Tensor]) -> None:
        super().__init__(program.graph)
        self.program = program
        made = [node for node in program.graph.graph.nodes if node.target is QUANTIZE]
        self.names = dict(zip(made, program.tensors, strict=True))
        self.grids, self.given, self.made = grids, given, dict[str, Tensor]()

    def said(self) -> Iterator[tuple[str, Levels]]:
        """What operations say of the tensors that they make, then of those that they read."""
        readers = [(n, n.args[0]) for n in self.program.graph.graph.nodes if n.target is DEQUANTIZE]
        for node, tensor in [*((n, n) for n in self.names), *readers]:
            name = self.names.get(tensor, "")
            if name in self.grids:
                yield name, (float(node.args[1]), int(node.args[2]) - self.grids[name].offset)

    def run_node(self, n: fx.Node) -> Any:
        y = super().run_node(n)
        name = self.names.get(n, "")
        if name not in self.given:
            return y
        self.made[name] = self.grids[name].plain(y)
        return self.grids[name].of(self.given[name])


@torch.no_grad()
def pt2_given(
    path: Path, target: str, grids: Mapping[str, Quantize], inputs: tuple[Tensor, ...], given: Integers
) -> Made:
    """What each layer of the program makes of `given` integers."""
    run = _Given(Program(path), {name: Grid(grid, torch.uint8) for name, grid in grids.items()}, given)
    outputs = tensors_of(run.run(*inputs))
    return Made(run.made, tuple(outputs.values()), contradicted(run.said(), grids))


def check_archive(path: Path, content: bytes) -> None:
    """Refuse a file in which `torch.export.load` would find something to unpickle or to evaluate.

    Raises:
        ValueError: names the file and what is in it.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"{path}: {what}; export the network again (export.formats=[pt2])")

    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        files = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise refuse(f"no .pt2 archive, or a damaged one ({error})") from error
    for name in files:
        if not MEMBERS.fullmatch(name):
            raise refuse(f"holds '{name}', which no network of ours has")
    inside = {name.partition("/")[2]: data for name, data in files.items()}
    try:
        weights = json.loads(inside["data/weights/model_weights_config.json"])["config"].values()
        constants = json.loads(inside["data/constants/model_constants_config.json"])["config"]
        sizes = list(_values(json.loads(inside["models/model.json"]), "expr_str"))
        pickled = [w["path_name"] for w in weights if w["use_pickle"] is not False]
        tensors = json.loads(inside[f"extra/{TENSORS}"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse(f"its description is not that of a .pt2 archive ({type(error).__name__}: {error})") from error
    if pickled or constants:
        raise refuse(f"has pickled contents ({', '.join([*pickled, *constants])}), which are never read")
    for size in sizes:
        if not isinstance(size, str) or not SIZES.fullmatch(size):
            raise refuse(f"has the size {str(size)[:60]!r}, which is no sum of symbols")
    if not isinstance(tensors, list) or not all(isinstance(name, str) for name in tensors):
        raise refuse(f"its list of tensors ({TENSORS}) is none")
    try:
        torch.load(io.BytesIO(inside["data/sample_inputs/model.pt"]), weights_only=True)
    except Exception as error:  # of many kinds, for a damaged pickle
        raise refuse("its example inputs are not plain tensors") from error


def _values(data: Any, key: str) -> Any:
    """Everything under `key`, at any depth."""
    if isinstance(data, dict):
        for name, value in data.items():
            if name == key:
                yield value
            yield from _values(value, key)
    elif isinstance(data, list):
        for value in data:
            yield from _values(value, key)


def check_reference(config: QuantConfig) -> None:
    """Refuse what reference quantized operations cannot say: scaling in fixed point.

    Raises:
        ValueError: names the field and what to write instead.
    """
    if TARGETS[config.target].requantize == "fixed_point":
        raise ValueError(
            f"export.formats=pt2, executorch: target={config.target} scales by an int32 multiplier and a shift, which "
            f"torch's quantized operations do not; use export=int8 or export=c_header, or target=generic"
        )
