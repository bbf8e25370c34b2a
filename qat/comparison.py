"""Compare two forms of one network: a training checkpoint, or exported files of any format.

Layer by layer, given the same integers, where both sides have layers of the same names; and from end to end.

  python -m qat compare RUN/export/model.safetensors RUN/export/model.onnx --data digits
  python -m qat compare RUN/checkpoints/qat/last.ckpt RUN/export/model.onnx --data data=cifar10 data.path=DIR
  python -m qat compare a.safetensors onnx:b.onnx --data inputs.npz --json

A training checkpoint is taken as export takes it: evaluated, with every bias on its integer grid. The exit code is 1
where a limit is broken.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.analysis.console import layer_parity_table, parity_table
from qat.export.agreement import Parity, ParityError, ParityLimits, compare
from qat.export.formats import EXPORTERS
from qat.export.given import Inputs, Made
from qat.export.parity import ask, looked_at, split
from qat.export.reloaded import joined
from qat.inspection import configuration
from qat.runtime.grid import Quantize
from qat.scheme import choice
from qat.sides import Side, open_side
from qat.targets import TARGETS

BATCH = 128


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    forms = ", ".join(f"{name}:" for name in EXPORTERS)
    parser.add_argument("a", metavar="A", help="a .ckpt of a run's qat phase, or an exported file")
    parser.add_argument("b", metavar="B", help=f"the same; a format may be said in front ({forms})")
    parser.add_argument("--data", nargs="+", required=True, metavar="DATA",
                        help="a data configuration and settings of it (digits data.path=DIR), or a .npz, .npy or "
                        ".safetensors file, or a folder of them, with inputs, samples first")  # fmt: skip
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help="the folder with config.yaml (default: conf)")
    parser.add_argument("--target", help="how files are run, a key of TARGETS (default: that of A's or B's training)")
    parser.add_argument("--samples", type=int, metavar="N", help="compare the first N samples only")
    parser.add_argument("--layer-samples", type=int, default=256, metavar="N", help="of them, layer by layer (256)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for limit in fields(ParityLimits):
        kind = int if limit.name == "max_steps" else float
        parser.add_argument(f"--{limit.name.replace('_', '-')}", type=kind, default=limit.default, metavar="LIMIT",
                            help=f"limit, as export.parity.{limit.name} ({limit.default})")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print the comparison; returns 1 where a limit is broken.

    Raises:
        ValueError: files or data that do not go together.
        OSError: files that are not there.
    """
    if args.samples is not None and args.samples < 1:
        raise ValueError(f"--samples {args.samples}: give at least 1")
    if args.target is not None:
        choice("--target", args.target, TARGETS)
    a, b = open_side(args.a, args.target), open_side(args.b, args.target)
    if args.target is None and a.target != b.target:  # a file that does not say how it is run takes the other's
        args.target = a.target if a.says_target else b.target
        a, b = open_side(args.a, args.target), open_side(args.b, args.target)
    data = given_data(args.data, args.config_dir, args.samples)
    limits = ParityLimits(**{limit.name: getattr(args, limit.name) for limit in fields(ParityLimits)})
    parity = compared(a, b, data, args.layer_samples)
    try:
        parity.check(f"{a.label} / {b.label}", limits)
        breach = ""
    except ParityError as error:
        breach = str(error)
    if args.json:
        print(json.dumps({"a": args.a, "b": args.b, "samples": len(data.inputs[0]), **parity.to_dict(layers=True),
                          "breach": breach or None}, indent=2))  # fmt: skip
        return int(bool(breach))
    from rich.console import Console

    console = Console()
    summary = {"parity": {"pair": parity.to_dict()}}
    if parity.layers:
        console.print(layer_parity_table(parity.to_dict(layers=True)["layers"]))
        console.print()
    console.print(parity_table(summary, {"pair": f"{a.label} / {b.label}"}))
    for note in parity.notes:
        console.print(note, style="yellow", markup=False)
    console.print(f"\n{breach}" if breach else "\nWithin the limits.", style="red" if breach else "green", markup=False)
    return int(bool(breach))


@dataclass
class Data:
    """What both are run on.

    Attributes:
        inputs: a tensor an argument, samples first.
        class_dim: the dimension of outputs along which classes lie.
        metrics: outputs -> metrics, where targets are known.
    """

    inputs: Inputs
    class_dim: int = 1
    metrics: Callable[[Tensor], dict[str, float]] = lambda outputs: {}


def given_data(words: list[str], folder: Path | None, samples: int | None) -> Data:
    """What `--data` says: a data configuration's test set, or files of inputs.

    Raises:
        ValueError: a setting or file that is not valid.
        OSError: nothing is there.
    """
    if len(words) == 1 and "=" not in words[0] and Path(words[0]).exists():
        return Data(tuple(x[:samples] for x in inputs_in(Path(words[0]))))
    if "=" not in words[0] and (Path(words[0]).suffix or "/" in words[0]):
        raise FileNotFoundError(f"there is no '{words[0]}'")
    from qat import hydra_schema  # not above: `python -m qat` starts without hydra and lightning
    from qat.training.module import build
    from qat.training.stages import task_metrics

    settings = [f"data={words[0]}" if "=" not in words[0] else words[0], *words[1:]]
    cfg = hydra_schema.composed(settings, configuration(folder))
    inputs, targets = hydra_schema.test_tensors(cfg)
    task = build(hydra_schema.plain(cfg.task))
    inputs, targets = inputs[:samples], targets[:samples]

    def metrics(outputs: Tensor) -> dict[str, float]:
        return task_metrics(task, zip(outputs.split(BATCH), targets.split(BATCH), strict=True))

    return Data((inputs,), getattr(task, "class_dim", 1), metrics)


def inputs_in(path: Path) -> Inputs:
    """Inputs from a .npy, .npz or .safetensors file, an array an argument; of a folder, one file after the other.

    Raises:
        ValueError: nothing that can be read; inputs that do not fit together.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if not files:
            raise ValueError(f"the folder '{path}' holds no file that ends in {', '.join(READERS)}")
        parts = [inputs_in(file) for file in files]
        if len({tuple((x.dtype, x.shape[1:]) for x in part) for part in parts}) > 1:
            raise ValueError(f"the files in '{path}' hold inputs of different names, shapes or types")
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))
    if path.suffix not in READERS:
        raise ValueError(f"'{path}' is no file of inputs: give {', '.join(READERS)}, or a folder of them")
    try:
        found = READERS[path.suffix](path)
    except Exception as error:  # a damaged file raises many types
        raise ValueError(f"'{path}' cannot be read: {error}") from error
    tensors = tuple(x.float() if x.is_floating_point() else x.long() for x in found)
    if not tensors or any(x.dim() == 0 or len(x) == 0 for x in tensors):
        raise ValueError(f"'{path}' holds no samples")
    return tensors


def _npz(path: Path) -> list[Tensor]:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        return [torch.from_numpy(arrays[name]) for name in arrays.files]


def _npy(path: Path) -> list[Tensor]:
    import numpy as np

    return [torch.from_numpy(np.load(path, allow_pickle=False))]


def _safetensors(path: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    return list(load_file(path).values())


READERS: dict[str, Callable[[Path], list[Tensor]]] = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors}


@torch.no_grad()
def compared(a: Side, b: Side, data: Data, layer_samples: int) -> Parity:
    """How far both are apart on the same data."""
    batches = split(data.inputs, BATCH)
    outputs = joined([a(x) for x in batches]), joined([b(x) for x in batches])
    names = (a.label, b.label) if a.label != b.label else (f"{a.label} A", f"{b.label} B")
    whole: dict[str, Any] = {"class_dim": data.class_dim, "names": names}
    first, second = (next(iter(tensors.values())) for tensors in outputs)
    if first.shape == second.shape:  # else compare says so
        whole["metrics"] = data.metrics(first), data.metrics(second)
    asks, answers = (a, b) if a.made is not None and b.given is not None and not b.trains else (b, a)
    if asks.made is None or asks.network is None or answers.given is None:
        return compare(outputs, [], notes=[_why_whole(asks, answers)], **whole)
    found = {"a": outputs[0], "b": outputs[1]}
    samples = looked_at(found, [("a", "b")], data.inputs, layer_samples, data.class_dim)
    chosen = batches if samples is None else split(tuple(x[samples] for x in data.inputs), BATCH)
    own, grids = [asks.made(x) for x in chosen], asks.network.grids()
    made = [_asked(answers, grids, x, one) for x, one in zip(chosen, own, strict=True)]
    pairs = list(zip(own, made, strict=True) if asks is a else zip(made, own, strict=True))
    asked = ask(asks.network, data.inputs, chosen, [one.integers for one in own], samples)
    return compare(outputs, pairs, asked=asked, **whole)


def _asked(side: Side, grids: Mapping[str, Quantize], inputs: Inputs, own: Made) -> Made:
    assert side.given is not None
    try:
        return side.given(grids, inputs, own.integers)
    except Exception as error:  # as for its outputs
        raise ValueError(f"{side.label} cannot be given the integers of the other, layer by layer: {error}") from error


def _why_whole(asks: Side, answers: Side) -> str:
    reasons = [f"{side.label}: {side.whole}" for side in (asks, answers) if side.whole]
    reasons = reasons or ["layer by layer, one of the two has to be a checkpoint, of training or int8"]
    return f"Compared from end to end only: {'; '.join(reasons)}."
