"""Agreement, measured: what training simulated, and every exported file as it runs after being read from disk.

Two measurements. Layer by layer, each layer of each implementation is given the same integers (those of training) and
its integers are compared in steps; an error cannot hide behind, or be blamed on, an earlier layer. End to end, the
logits, the decisions and the metrics of whole networks are compared.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from qat.export.agreement import LayerParity, Parity, ParityError, ParityLimits, compare, decisions
from qat.export.formats import EXPORTERS, Inputs, Integers
from qat.export.reloaded import Reloaded, first
from qat.export.simulated import TIE, sources, ties_given, training_integers
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork

__all__ = [
    "TIE",
    "LayerParity",
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
    outputs: Mapping[str, Tensor] | None = None,
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
        metrics: outputs -> metrics, whose differences are measured too.

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
        known = {"qat": torch.cat([first(prepared(*x)) for x in batches]), **(outputs or {})}
        known |= {name: reloaded.outputs(name, batches) for name in names if name not in known}
        own = {}  # what training simulated, in the arithmetic of a file
        for name, path in reloaded.files.items():
            if (reference := EXPORTERS[name].reference) is not None:
                ours = reference(prepared, path)
                own[name] = torch.cat([first(ours(*x)).float() for x in batches])
        samples, ties, grids, reads = None, list[dict[str, Tensor]](), dict[str, Quantize](), dict[str, str]()
        integers: dict[str, list[Integers]] = {name: [] for name in ("qat", *names)}
        if isinstance(network, IntegerNetwork) and isinstance(prepared, fx.GraphModule):
            samples = looked_at(known, pairs_of(names), arguments, layer_samples, class_dim)
            chosen = batches if samples is None else split(tuple(x[samples] for x in arguments), batch_size)
            given = [training_integers(prepared, network, *x) for x in chosen]
            ties = [ties_given(network, x, integers) for x, integers in zip(chosen, given, strict=True)]
            grids, reads = network.grids(), reads_of(network, arguments, given)
            integers = {"qat": given} | {name: reloaded.integers(name, grids, chosen, given) for name in names}
    found = {name: metrics(y) for name, y in known.items()} if metrics is not None else {}
    return {
        f"{a}_{b}": compare(
            (own.get(b, known[a]) if a == "qat" else known[a], known[b]),
            list(zip(integers[a], integers[b], strict=True)), class_dim, ties, samples=samples, names=(a, b),
            grids=grids, reads=reads, metrics=(found.get(a, {}), found.get(b, {})),
        )
        for a, b in pairs_of(names)
    }  # fmt: skip


def pairs_of(files: Iterable[str]) -> list[tuple[str, str]]:
    """Who is compared: training with every file, and the int8 checkpoint with every other.

    >>> pairs_of(["int8", "onnx"])
    [('qat', 'int8'), ('qat', 'onnx'), ('int8', 'onnx')]
    """
    names = list(files)
    others = [name for name in names if name != "int8"]
    return [("qat", name) for name in names] + [("int8", name) for name in others if "int8" in names]


def looked_at(
    outputs: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]], inputs: Inputs, count: int, class_dim: int
) -> Tensor | None:
    """Which samples are compared layer by layer: the first `count`, and those for which a pair decides differently.

    Returns:
        Their indices; None where inputs and outputs do not have one entry a sample: all are looked at, in one batch.
    """
    lengths = {len(x) for x in inputs} | {len(y) for y in outputs.values()}
    if len(lengths) > 1:
        return None
    differ = torch.zeros(lengths.pop(), dtype=torch.bool)
    for a, b in pairs:
        unequal = decisions(outputs[a], class_dim) != decisions(outputs[b], class_dim)
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
