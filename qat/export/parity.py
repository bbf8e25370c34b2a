"""Agreement, measured: what training simulated, the integer network, the int8 checkpoint and the ONNX file.

Two measurements. Layer by layer, each layer of each implementation is given the same integers (those of training) and
its integers are compared in steps; an error cannot hide behind, or be blamed on, an earlier layer. End to end, the
logits and the decisions of whole networks are compared.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.export.formats import EXPORTERS, Integers, integers_given
from qat.runtime.grid import Quantize
from qat.runtime.network import IntegerNetwork

Batch = Tensor | tuple[Tensor, ...]


class ParityError(RuntimeError):
    """Two implementations of one network disagree by more than is allowed."""


@dataclass(kw_only=True)
class ParityLimits:
    """What is allowed.

    Attributes:
        agreement: smallest share of equal top-1 decisions.
        max_steps: largest difference of an integer, given equal inputs.
        equal_share: smallest share of integers that are equal, given equal inputs, ties apart; asked of grids of up to
            8 bits (a step of a 16-bit grid is as small as the rounding of a float32 convolution).
    """

    agreement: float = 0.999
    max_steps: int = 1
    equal_share: float = 0.999


TIE = 1e-4
"""A value this close to the middle between two integers, in steps, is a tie: engines sum in other orders, and with
other offsets. With grids of few bits the same pair of integers makes the same tie again and again."""


@dataclass(kw_only=True)
class LayerParity:
    """One tensor, given equal inputs.

    Attributes:
        name: of the tensor.
        max_steps: worst difference.
        equal_share: share of equal integers, those at ties apart.
        bits: of the grid's integers.
        ties: integers that differ by a step at a tie.
        first: the first other difference, to be shown.
    """

    name: str
    max_steps: int
    equal_share: float
    bits: int
    ties: int = 0
    first: str = ""


@dataclass(kw_only=True)
class Parity:
    """One pair of implementations.

    Attributes:
        max_abs: worst difference of an output (logit), end to end.
        max_steps: worst difference of an integer activation, given equal inputs.
        agreement: share of equal top-1 decisions (of equal signs for a single output), end to end.
        equal_share: share of equal integers over all layers.
        layers: the same, layer by layer.
    """

    max_abs: float
    max_steps: int
    agreement: float
    equal_share: float
    layers: list[LayerParity] = field(default_factory=list)

    def to_dict(self, layers: bool = False) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        return data if layers else {k: v for k, v in data.items() if k != "layers"}

    def check(self, pair: str, limits: ParityLimits) -> None:
        """Raise ParityError, naming the first layer that departs, if a limit is broken."""
        for layer in self.layers:
            too_few = layer.bits <= 8 and layer.equal_share < limits.equal_share
            if layer.max_steps > limits.max_steps or too_few:
                raise ParityError(
                    f"{pair}: layer '{layer.name}' departs given equal inputs: worst {layer.max_steps} steps (allowed "
                    f"{limits.max_steps}), equal {layer.equal_share:.4%} (at least {limits.equal_share:.2%}). "
                    f"{layer.first}"
                )
        if not math.isfinite(self.max_abs):
            raise ParityError(f"{pair}: an output is not finite in one of the two (worst difference {self.max_abs})")
        if self.agreement < limits.agreement:
            worst = min(self.layers, key=lambda layer: layer.equal_share, default=None)
            hint = f"; least equal layer: '{worst.name}' ({worst.equal_share:.4%})" if worst else ""
            raise ParityError(
                f"{pair}: top-1 agreement {self.agreement:.4%} is below {limits.agreement:.2%}, although every layer "
                f"agrees given equal inputs{hint}"
            )


class _Recorder(fx.Interpreter):
    """Runs a prepared network and keeps what its quantizers make."""

    def __init__(self, prepared: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(prepared)
        self.wanted, self.kept = wanted, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted:
            self.kept[n.name] = result
        return result


@torch.no_grad()
def training_integers(prepared: fx.GraphModule, network: IntegerNetwork, *inputs: Tensor) -> dict[str, Tensor]:
    """The integers behind every fake-quantized activation of `prepared`, by name of `network`'s tensor.

    Args:
        prepared: the network that `network` was lowered from, in eval mode.
        network: from `qat.lower`.
        inputs: the network's arguments, batch dimension first.
    """
    recorder = _Recorder(prepared, set(network.edges.values()))
    recorder.run(*inputs)
    integers = {}
    for name, node in network.edges.items():
        grid = network.grid(name)
        assert grid is not None
        if not isinstance(recorder.kept[node], Tensor):  # a packed sequence, which is compared once padded
            continue
        integers[name] = (torch.round(recorder.kept[node] / grid.scale) + grid.zero_point).to(grid.dtype)
    return integers


@torch.no_grad()
def ties_given(network: IntegerNetwork, inputs: Batch, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where a layer of `network`, given equal inputs, rounds a value next to a tie (TIE), by name of tensor."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def note(grid: nn.Module, values: tuple[Tensor, ...]) -> None:
            assert isinstance(grid, Quantize)
            v = grid.steps(values[0])
            found[name] = (v - torch.floor(v) - 0.5).abs() < TIE

        return note

    layers = ((node.name, network.layer(node.name)) for node in network.nodes if node.name in given)
    handles = [layer.output.register_forward_pre_hook(hook(name)) for name, layer in layers if layer.output is not None]
    try:
        integers_given(network, _arguments(inputs), given)
    finally:
        for handle in handles:
            handle.remove()
    return found


def compare(
    outputs: tuple[Tensor, Tensor],
    integers: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]],
    class_dim: int = 1,
    ties: Sequence[dict[str, Tensor]] = (),
) -> Parity:
    """Compare two implementations.

    Args:
        outputs: end-to-end results of both, shape [samples, ...].
        integers: per batch, the integers of both given equal inputs.
        class_dim: the dimension of the outputs along which the classes lie.
        ties: per batch, where a difference of one step means nothing (`ties_given`).
    """
    a, b = outputs
    layers: dict[str, tuple[int, int, int, str]] = {}
    bits: dict[str, int] = {}
    tied: Counter[str] = Counter()
    for batch, (first, second) in enumerate(integers):
        for name in first:
            if name not in second:
                continue
            bits[name] = 8 * min(first[name].element_size(), second[name].element_size())
            steps = (first[name].int() - second[name].int()).abs()
            worst, unequal, total, shown = layers.get(name, (0, 0, 0, ""))
            known = ties[batch].get(name) if ties else None
            excused = (steps == 1) & known if known is not None else torch.zeros_like(steps, dtype=torch.bool)
            tied[name] += int(excused.sum())
            differs = torch.nonzero(((steps > 0) & ~excused).flatten())
            if not shown and differs.numel():
                i = int(differs[0])
                pair = (int(first[name].flatten()[i]), int(second[name].flatten()[i]))
                shown = f"First difference at flat index {i}: {pair[0]} against {pair[1]}."
            largest = int(steps.max()) if steps.numel() else 0
            layers[name] = (max(worst, largest), unequal + differs.numel(), total + steps.numel(), shown)
    rows = [
        LayerParity(
            name=name,
            max_steps=worst,
            equal_share=1 - unequal / max(total, 1),
            bits=bits[name],
            ties=tied[name],
            first=shown,
        )
        for name, (worst, unequal, total, shown) in layers.items()
    ]
    unequal, total = sum(v[1] for v in layers.values()), sum(v[2] for v in layers.values())
    return Parity(
        max_abs=float((a - b).abs().max()),
        max_steps=max((row.max_steps for row in rows), default=0),
        agreement=float((decisions(a, class_dim) == decisions(b, class_dim)).float().mean()),
        equal_share=1 - unequal / max(total, 1),
        layers=rows,
    )


def decisions(outputs: Tensor, class_dim: int = 1) -> Tensor:
    """Top-1 class along a dimension; the sign where there is only one output."""
    if outputs.dim() < 2 or outputs.shape[class_dim] == 1:
        return outputs > 0
    return outputs.argmax(dim=class_dim)


@torch.no_grad()
def measure(
    prepared: fx.GraphModule,
    network: IntegerNetwork,
    files: Mapping[str, Path],
    inputs: Batch,
    *,
    target: str = "generic",
    layer_samples: int = 256,
    batch_size: int = 128,
    class_dim: int = 1,
) -> dict[str, Parity]:
    """Compare training's network with the files exported from it.

    Args:
        prepared: what training simulated, in eval mode.
        network: lowered from `prepared`.
        files: key of EXPORTERS -> path of its file, as `export` returns it.
        inputs: real test inputs, shape [samples, ...]; a tuple for a network of several arguments (where their numbers
            of samples differ, as of indices and offsets, they stay one batch).
        target: key of TARGETS, how files are run.
        layer_samples: how many samples are compared layer by layer.
        batch_size: samples at a time.
        class_dim: the dimension of the outputs along which the classes lie.

    Returns:
        `qat_FORMAT` for every file, and `int8_FORMAT` for every other file where there is an int8 checkpoint.
    """
    prepared.eval()
    batches = _split(_arguments(inputs), batch_size)
    outputs = {"qat": torch.cat([_first(prepared(*x)) for x in batches])}
    for name, path in files.items():
        run = EXPORTERS[name].open(path, target)
        outputs[name] = torch.cat([_first(run(*x)) for x in batches])
    grids = network.grids()
    integers: dict[str, list[Integers]] = {name: [] for name in outputs}
    ties: list[dict[str, Tensor]] = []
    for x in _split(_arguments(inputs), batch_size, layer_samples):
        given = training_integers(prepared, network, *x)
        integers["qat"].append(given)
        ties.append(ties_given(network, x, given))
        for name, path in files.items():
            of_file = EXPORTERS[name].given
            integers[name].append({} if of_file is None else of_file(path, target, grids, x, given))
    return {
        f"{a}_{b}": compare((outputs[a], outputs[b]), list(zip(integers[a], integers[b], strict=True)), class_dim, ties)
        for a, b in pairs_of(files)
    }


def pairs_of(files: Iterable[str]) -> list[tuple[str, str]]:
    """Who is compared: training with every file, and the int8 checkpoint with every other.

    >>> pairs_of(["int8", "onnx"])
    [('qat', 'int8'), ('qat', 'onnx'), ('int8', 'onnx')]
    """
    names = list(files)
    others = [name for name in names if name != "int8"]
    return [("qat", name) for name in names] + [("int8", name) for name in others if "int8" in names]


def _arguments(inputs: Batch) -> tuple[Tensor, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _split(inputs: tuple[Tensor, ...], size: int, samples: int | None = None) -> list[tuple[Tensor, ...]]:
    """Batches of the first `samples` samples."""
    if len({len(x) for x in inputs}) > 1:
        return [inputs]
    return list(zip(*(x[:samples].split(size) for x in inputs), strict=True))


def _first(y: Tensor | tuple[Tensor, ...]) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]
