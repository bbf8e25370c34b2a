"""Exported files, opened and run, by a process that has never seen what was trained.

`Reloaded` asks; `answer` is what both this process and the fresh one do. Between the two travels plain data: a line of
JSON, and tensors in safetensors files. Nothing is pickled.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.export.formats import EXPORTERS
from qat.export.given import Inputs, Integers, Made, tensors_of
from qat.runtime.grid import Quantize

Tensors = dict[str, Tensor]
Outputs = Tensors
"""What a network returns, all of it, in order: where it stands -> tensor [samples, ...]."""

PACKAGE = Path(__file__).parents[2]
"""The folder from which `qat` is imported."""


class Reloaded:
    """Exported files as they run after being read from disk. A context manager; one process serves all files.

    Args:
        files: key of EXPORTERS -> path.
        target: key of TARGETS, how files are run.
        fresh: in a process of their own; else here.
    """

    def __init__(self, files: Mapping[str, Path], target: str = "generic", fresh: bool = True) -> None:
        self.files, self.target, self.fresh = dict(files), target, fresh
        self._process: subprocess.Popen[str] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Reloaded":
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()  # it ends with its input
            self._process.wait()
            self._process = None
        self._stack.close()

    def outputs(self, name: str, batches: Sequence[Inputs]) -> Outputs:
        """The outputs of the file `name`, of all batches."""
        found = self._ask({"do": "outputs", "format": name}, _numbered(batches))
        return {key.partition("/")[2]: found[key] for key in sorted(found, key=lambda key: int(key.partition("/")[0]))}

    def given(
        self, name: str, grids: Mapping[str, Quantize], batches: Sequence[Inputs], given: Sequence[Integers]
    ) -> list[Made]:
        """What each layer of the file, whose format has `given`, makes of these integers; one a batch."""
        wanted = {key: grid_spec(grids[key]) for key in {key for integers in given for key in integers}}
        tensors = _numbered(batches) | {f"{i}/given/{key}": q for i, of in enumerate(given) for key, q in of.items()}
        made = self._ask({"do": "given", "format": name, "grids": wanted}, tensors)
        return [_unpacked(_below(f"{i}/", made)) for i in range(len(batches))]

    def layers(self, name: str, asked: Tensors) -> Tensors:
        """What single layers of the file, whose format has `layers`, make of what they are given."""
        return self._ask({"do": "layers", "format": name}, asked)

    def latency_ms(self, name: str, inputs: Inputs) -> float:
        """Median time of a call in milliseconds."""
        return float(self._ask({"do": "latency", "format": name}, _numbered([inputs]))["ms"])

    def _ask(self, request: dict[str, Any], tensors: Tensors) -> Tensors:
        path = self.files[request["format"]]
        request |= {"path": str(Path(path).resolve()), "target": self.target}
        if not self.fresh:
            try:
                return answer(request, tensors)
            except Exception as error:  # each engine has exceptions of its own
                raise RuntimeError(f"'{path}' cannot be run: {type(error).__name__}: {error}") from error
        if self._process is None:
            self._start()
        folder = self._folder
        _save(tensors, folder / "asked")
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died before: its silence says so
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code, self._process = self._process.wait(), None
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            said = (folder / "errors").read_text(errors="replace").strip()[-2000:]
            raise RuntimeError(f"the fresh process that ran '{path}' {how}. It said: {said or 'nothing'}")
        if (problem := json.loads(line)["error"]) is not None:
            raise RuntimeError(f"'{path}' cannot be run in a fresh process: {problem}")
        return load_file(folder / "answer")

    def _start(self) -> None:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="qat-parity-")))
        errors = self._stack.enter_context((self._folder / "errors").open("w"))
        path = os.pathsep.join([str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from qat.export.reloaded import serve; serve()"], cwd=self._folder, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip


def serve() -> None:
    """Answer requests until there are no more: the fresh process. Tensors lie in `asked` and `answer`."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print is no answer
    for line in sys.stdin:
        try:
            _save(answer(json.loads(line), load_file("asked")), Path("answer"))
            error = None
        except Exception as problem:  # whatever it is, the other process raises it
            error = f"{type(problem).__name__}: {problem}"
        channel.write(json.dumps({"error": error}) + "\n")
        channel.flush()


@torch.no_grad()
def answer(request: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """Open a file and run it: `outputs`, `given`, `layers` or `latency`."""
    exporter, path, target = EXPORTERS[request["format"]], Path(request["path"]), request["target"]
    if request["do"] == "layers":
        assert exporter.layers is not None
        return exporter.layers(path, target, tensors)
    batches = _batches(tensors)
    if request["do"] == "given":
        assert exporter.given is not None
        grids = {name: grid_from(spec) for name, spec in request["grids"].items()}
        made: Tensors = {}
        for i, x in enumerate(batches):
            found = exporter.given(path, target, grids, x, _below(f"{i}/given/", tensors))
            made |= {f"{i}/{key}": tensor for key, tensor in _packed(found).items()}
        return made
    run = exporter.open(path, target)
    if request["do"] == "latency":
        return {"ms": torch.tensor(median_ms(run, *batches[0]), dtype=torch.float64)}
    outputs = joined([tensors_of(run(*x)) for x in batches])
    return {f"{i}/{key}": y for i, (key, y) in enumerate(outputs.items())}  # safetensors keep no order


def median_ms(call: Callable[..., Any], *inputs: Tensor, seconds: float = 0.3) -> float:
    """Median time of a call in milliseconds, after a warm-up, over at least 5 calls and `seconds`."""
    call(*inputs)
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        call(*inputs)
        times.append(time.perf_counter() - start)
        if len(times) >= 500:
            break
    return round(1000 * statistics.median(times), 4)


def joined(batches: Sequence[Outputs]) -> Outputs:
    """The outputs of all batches."""
    return {name: torch.cat([outputs[name] for outputs in batches]) for name in batches[0]}


def grid_spec(grid: Quantize) -> dict[str, Any]:
    """A grid as plain data: what its integers stand for, whatever the step to them is."""
    ends = {"quant_min": grid.quant_min, "quant_max": grid.quant_max}
    return {**ends, "scale": float(grid.scale), "zero_point": int(grid.zero_point)}


def grid_from(spec: Mapping[str, Any]) -> Quantize:
    """The grid of which `grid_spec` is the plain data."""
    return Quantize(**spec)


def _save(tensors: Tensors, path: Path) -> None:
    """Write tensors, of which several may be views of one memory."""
    whole = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    save_file(whole, path)


def _packed(made: Made) -> Tensors:
    """As tensors with names."""
    levels = {f"levels/{name}": torch.tensor(said, dtype=torch.float64) for name, said in made.levels.items()}
    outputs = {f"outputs/{i}": y for i, y in enumerate(made.outputs)}
    return {**{f"integers/{name}": q for name, q in made.integers.items()}, **outputs, **levels}


def _unpacked(tensors: Tensors) -> Made:
    outputs, said = _below("outputs/", tensors), _below("levels/", tensors)
    levels = {name: (float(pair[0]), int(pair[1])) for name, pair in said.items()}
    return Made(_below("integers/", tensors), tuple(outputs[str(i)] for i in range(len(outputs))), levels)


def _below(start: str, tensors: Tensors) -> Tensors:
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def _numbered(batches: Sequence[Inputs]) -> Tensors:
    return {f"{i}/inputs/{j}": x for i, inputs in enumerate(batches) for j, x in enumerate(inputs)}


def _batches(tensors: Tensors) -> list[Inputs]:
    found: list[list[Tensor]] = []
    while f"{len(found)}/inputs/0" in tensors:
        start = f"{len(found)}/inputs/"
        count = sum(key.startswith(start) for key in tensors)
        found.append([tensors[f"{start}{j}"] for j in range(count)])
    return [tuple(inputs) for inputs in found]
