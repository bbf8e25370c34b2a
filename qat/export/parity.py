"""Agreement, measured: what training simulated, and every exported file as it runs after being read from disk.

Two measurements. Layer by layer, each layer of each implementation is given the same integers (those of training) and
its integers are compared in steps; an error cannot hide behind, or be blamed on, an earlier layer. End to end, the
logits, the decisions and the metrics of whole networks are compared.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qat.export.agreement import Asked, LayerParity, OutputParity, Parity, ParityError, ParityLimits, compare, decisions
from qat.export.formats import EXPORTERS
from qat.export.given import Inputs, Integers, Made, tensors_of
from qat.export.linear import LinearParity, asked_of, compare_layers, read_by_layers
from qat.export.reloaded import Outputs, Reloaded, joined
from qat.export.rounding import last_layers, output_rounding, rounding_steps
from qat.export.simulated import TIE, sources, ties_given, training_integers, training_made
from qat.runtime.network import IntegerNetwork

__all__ = [
    "TIE",
    "Asked",
    "LayerParity",
    "OutputParity",
    "Parity",
    "ParityError",
    "ParityLimits",
    "compare",
    "decisions",
    "measure",
    "pairs_of",
    "split",
    "ties_given",
    "training_integers",
]

WIDEST_TIE = 0.01
"""Steps by which float32's rounding may move a layer for what it moves across the middle to count as ties."""


@torch.no_grad()
def measure(
    prepared: nn.Module,
    network: nn.Module,
    files: Mapping[str, Path] | Reloaded,
    inputs: Tensor | Inputs,
    *,
    target: str = "generic",
    layer_samples: int = 256,
    batch_size: int = 128,
    class_dim: int = 1,
    fresh: bool = False,
    outputs: Mapping[str, Outputs] | None = None,
    metrics: Callable[[Tensor], Mapping[str, float]] | None = None,
) -> dict[str, Parity]:
    """Compare training's network with the files exported from it.

    Args:
        prepared: what training simulated, in eval mode.
        network: lowered from `prepared`; where files hold a network's own code (`Exporter.of_prepared`), `prepared`,
            and outputs alone are compared.
        files: key of EXPORTERS -> path of its file, as `export` returns it; or these, open.
        inputs: real test inputs, shape [samples, ...]; a tuple for a network of several arguments (where their numbers
            of samples differ, as of indices and offsets, they stay one batch).
        target: key of TARGETS, how files are run.
        layer_samples: how many samples are compared layer by layer; as many more, if predictions differ for them.
        batch_size: samples at a time.
        class_dim: the dimension of the outputs along which the classes lie.
        fresh: open the files in a process of their own.
        outputs: key of EXPORTERS -> what its file made of `inputs`, where that is known already.
        metrics: first output -> metrics, whose differences are measured too.

    Returns:
        `qat_FORMAT` for every file, and `int8_FORMAT` for every other file where there is an int8 checkpoint.

    Raises:
        RuntimeError: a file cannot be opened or run.
    """
    prepared.eval()
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    batches = split(arguments, batch_size)
    with files if isinstance(files, Reloaded) else Reloaded(files, target, fresh) as reloaded:
        names = list(reloaded.files)
        known = {"qat": joined([tensors_of(prepared(*x)) for x in batches]), **(outputs or {})}
        known |= {name: reloaded.outputs(name, batches) for name in names if name not in known}
        own: dict[str, Outputs] = {}  # what training simulated, in the arithmetic of a file
        linear: dict[str, list[LinearParity]] = {}
        for name, path in reloaded.files.items():
            if (reference := EXPORTERS[name].reference) is not None:
                ours = reference(prepared, path)
                own[name] = joined([{k: y.float() for k, y in tensors_of(ours(*x)).items()} for x in batches])
                if (layers_of := EXPORTERS[name].layers_of) is not None:
                    layers = layers_of(ours)
                    read = read_by_layers(ours, layers, batches[0])
                    linear[name] = compare_layers(layers, read, reloaded.layers(name, asked_of(layers, read)))
        asked, made = Asked(), dict[str, list[Made]]()
        if isinstance(network, IntegerNetwork) and isinstance(prepared, fx.GraphModule):
            samples = looked_at(known, pairs_of(names), arguments, layer_samples, class_dim)
            chosen = batches if samples is None else split(tuple(x[samples] for x in arguments), batch_size)
            made["qat"] = [training_made(prepared, network, *x) for x in chosen]
            given = [found.integers for found in made["qat"]]
            asked = ask(network, arguments, chosen, given, samples)
            grids = network.grids()
            made |= {name: reloaded.given(name, grids, chosen, given) for name in names if EXPORTERS[name].given}
    measured = {name: metrics(next(iter(y.values()))) for name, y in known.items()} if metrics is not None else {}

    def compared(asked: Asked) -> dict[str, Parity]:
        return {
            f"{a}_{b}": compare(
                (own.get(b, known[a]) if a == "qat" else known[a], known[b]),
                list(zip(made[a], made[b], strict=True)) if a in made and b in made else [], class_dim, asked,
                names=(a, b), metrics=(measured.get(a, {}), measured.get(b, {})),
                notes=[] if b in made else [_whole(b, len(linear.get(b, [])))],
            )
            for a, b in pairs_of(names)
        }  # fmt: skip

    pairs = compared(asked)
    if isinstance(network, IntegerNetwork) and (moved := _moved(network, pairs, chosen[0], given[0]) if made else {}):
        widths = {name: steps for name, steps in moved.items() if steps < WIDEST_TIE}
        ties = [ties_given(network, x, integers, widths) for x, integers in zip(chosen, given, strict=True)]
        pairs = compared(dataclasses.replace(asked, ties=ties))
        for row in [row for parity in pairs.values() for row in parity.layers if row.departs(ParityLimits())]:
            row.rounding = moved.get(row.name)
    for name, rows in linear.items():
        pairs[f"qat_{name}"].linear = rows
    return pairs


def _moved(network: IntegerNetwork, pairs: Mapping[str, Parity], inputs: Inputs, given: Integers) -> dict[str, float]:
    """Of layers that depart, by how many steps float32's rounding alone may move them."""
    departing = {row.name for parity in pairs.values() for row in parity.layers if row.departs(ParityLimits())}
    rounding = [name for name in network.grids() if name in departing and network.layer(name).output is not None]
    return {name: rounding_steps(network, inputs, given, name) for name in rounding}  # others move integers


def _whole(name: str, layers: int) -> str:
    why = EXPORTERS[name].whole or "its network is recorded in parts, or not at all"
    if layers:
        return (
            f"{EXPORTERS[name].label}: compared from end to end, and {layers} linear layers one by one, given what "
            f"each reads in training: {why}."
        )
    return f"{EXPORTERS[name].label}: compared from end to end only: {why}."


def ask(
    network: IntegerNetwork, inputs: Inputs, batches: Sequence[Inputs], given: Sequence[Integers],
    samples: Tensor | None,
) -> Asked:  # fmt: skip
    """What is known of comparing layers of `network` that are given equal integers.

    Args:
        network: what files were written from, or one of those that are compared.
        inputs: all.
        batches: of those that are looked at.
        given: the integers, a batch each.
        samples: which samples the batches are.
    """
    known = {name for integers in given for name in integers}
    return Asked(
        ties=[ties_given(network, x, integers) for x, integers in zip(batches, given, strict=True)],
        rounding=[output_rounding(network, x, integers) for x, integers in zip(batches, given, strict=True)],
        samples=samples,
        grids=network.grids(),
        reads=reads_of(network, inputs, given),
        last=last_layers(network, known),
    )


def pairs_of(files: Iterable[str]) -> list[tuple[str, str]]:
    """Who is compared: training with every file, and the int8 checkpoint with every other.

    >>> pairs_of(["int8", "onnx"])
    [('qat', 'int8'), ('qat', 'onnx'), ('int8', 'onnx')]
    """
    names = list(files)
    others = [name for name in names if name != "int8"]
    return [("qat", name) for name in names] + [("int8", name) for name in others if "int8" in names]


def looked_at(
    outputs: Mapping[str, Outputs], pairs: Sequence[tuple[str, str]], inputs: Inputs, count: int, class_dim: int
) -> Tensor | None:
    """Which samples are compared layer by layer: the first `count`, and those for which a pair decides differently.

    Returns:
        Their indices; None where inputs and outputs do not have one entry a sample: all are looked at, in one batch.
    """
    first = {name: next(iter(tensors.values())) for name, tensors in outputs.items()}
    lengths = {len(x) for x in inputs} | {len(y) for tensors in outputs.values() for y in tensors.values()}
    if len(lengths) > 1:
        return None
    differ = torch.zeros(lengths.pop(), dtype=torch.bool)
    for a, b in pairs:
        unequal = decisions(first[a], class_dim) != decisions(first[b], class_dim)
        differ |= unequal.reshape(len(differ), -1).any(1)
    differ[:count] = False
    return torch.cat([torch.arange(min(count, len(differ))), torch.nonzero(differ).flatten()[:count]])


def reads_of(network: IntegerNetwork, inputs: Inputs, given: Sequence[Integers]) -> dict[str, str]:
    """What each layer reads, with the range of its values, in words: name of tensor -> `'stem' (0 to 255)`."""
    known = {name for integers in given for name in integers}
    order = [name for name in network.grids() if name in known]
    own = dict(zip(network.inputs, inputs, strict=True))

    def words(name: str) -> str:
        values = [own[name]] if name in own else [integers[name] for integers in given if name in integers]
        low, high = min(v.min().item() for v in values), max(v.max().item() for v in values)
        return f"'{name}' ({low:.6g} to {high:.6g})"

    return {name: ", ".join(words(source) for source in sources(network, name, known)) for name in order}


def split(inputs: Inputs, size: int) -> list[Inputs]:
    """Batches of `size` samples; one, where arguments have several numbers of samples."""
    if len({len(x) for x in inputs}) > 1:
        return [inputs]
    return list(zip(*(x.split(size) for x in inputs), strict=True))
