"""Adaptive rounding of float weights: each goes up or down so that its layer's output stays what it was."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, fx, nn

from qat.encoding import encode
from qat.fake_quant import FakeQuantize
from qat.graph import Graph
from qat.kinds import Kind
from qat.layers import QuantizedLayer
from qat.mode import Mode
from qat.modes import eval_mode, quantizers, set_mode
from qat.parts import graphs
from qat.record import run

log = logging.getLogger(__name__)
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class RoundingResult:
    """What was learned for one layer.

    Attributes:
        layer: its module path.
        nearest: mean squared error of its output, behind BatchNorm and ReLU, when weights are rounded to nearest.
        learned: the same with the rounding that was learned.
        changed: share of weights whose integer is not the nearest one.
        kept: whether the learned rounding is in use; where it is no better, weights are rounded to nearest.
    """

    layer: str
    nearest: float
    learned: float
    changed: float
    kept: bool


def learn_rounding(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 1000,
    lr: float = 0.01,
    batch_size: int = 32,
    penalty: float | None = None,
    progress: bool = True,
) -> list[RoundingResult]:
    """Learn, layer by layer, which weights to round up, for every layer with `weight.rounding=adaptive`.

    For float weights that were not trained for quantization. A layer's inputs are those that it gets in the network as
    quantized so far; its output shall be that of the float network, so that it makes up for what is lost before it,
    too. Where only a ReLU reads the output, what it cuts off does not count, and BatchNorm in between is part of the
    layer, as it will be once folded. (A layer that is called several times has no single ReLU: its own outputs count.)
    Weights, biases and statistics stay as they are; afterwards every rounding is decided. A layer's inputs and outputs
    for all batches are kept at a time, on the device of the network. Recurrent layers round to nearest.

    Args:
        prepared: a calibrated network.
        batches: inputs, each a tensor or a tuple of the network's arguments; some hundred samples.
        steps: of Adam, a layer.
        lr: its learning rate.
        batch_size: samples a step.
        penalty: weight of the term that drives roundings to a decision; None for the scheme's `rounding_penalty`.
        progress: show a bar where there is a console.

    Returns:
        One result a layer, in order of execution.

    Raises:
        RuntimeError: a quantizer has no range yet.
        ValueError: no batches.

    Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3.3, equation 25.
    """
    inputs = list(batches)
    calls: dict[QuantizedLayer, tuple[Graph, list[fx.Node]]] = {}
    first: dict[FakeQuantize, QuantizedLayer] = {}  # of layers that share a weight, the first one learns
    for graph in map(Graph, graphs(prepared).values()):
        for node, layer in graph.layers():
            quantizer = layer.weight_quantizer
            if quantizer.adapts and layer.biased and first.setdefault(quantizer, layer) is layer:
                calls.setdefault(layer, (graph, []))[1].append(
                    node
                )  # of a table that is looked up, nearest is the best
    if not calls:
        return []
    if not inputs:
        raise ValueError("adaptive rounding is learned from batches of inputs, got none")
    main = not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())
    results = []
    with _modes_kept(prepared), _bar(len(calls) * steps, progress and main) as advance, eval_mode(prepared):
        for layer, (graph, nodes) in calls.items():
            task = _Reconstruction(prepared, graph, layer, nodes, inputs)
            results.append(task.learn(steps, lr, batch_size, penalty, advance))
    if main:
        _log(results)
    return results


class _Reconstruction:
    """One layer, its inputs in the quantized network and its outputs in the float network."""

    def __init__(
        self, net: nn.Module, graph: Graph, layer: QuantizedLayer, nodes: list[fx.Node], batches: list[Any]
    ) -> None:
        self.name, self.layer, self.quantizer = str(nodes[0].target), layer, layer.weight_quantizer
        self.norm, self.relu = _tail(graph, nodes[0]) if len(nodes) == 1 else (None, False)
        found: dict[Any, list[tuple[Inputs, Tensor]]] = {}  # calls may differ in the size of their images
        for batch in batches:
            set_mode(net, Mode.float)
            with torch.no_grad():
                targets = [self._output(*x) for x in _inputs(net, layer, len(nodes), batch)]
            set_mode(net, Mode.frozen)
            for x, target in zip(_inputs(net, layer, len(nodes), batch), targets, strict=True):
                found.setdefault(tuple(t.shape[1:] for t in x), []).append((x, target))
        self.data: list[tuple[Inputs, Tensor]] = [
            (tuple(torch.cat(ts) for ts in zip(*(x for x, _ in pairs), strict=True)), torch.cat([y for _, y in pairs]))
            for pairs in found.values()
        ]

    def learn(
        self, steps: int, lr: float, batch_size: int, penalty: float | None, advance: Callable[[], None]
    ) -> RoundingResult:
        """Minimise, decide, compare with nearest."""
        quantizer, weight = self.quantizer, self.layer.outputs_first().detach()
        quantizer.start_rounding(weight)
        quantizer.decide_rounding()
        decided, integers, nearest = quantizer.logits.detach().clone(), encode(quantizer, weight).codes, self.error()
        quantizer.start_rounding(weight)
        self._minimise(steps, lr, batch_size, penalty, advance)
        quantizer.decide_rounding()
        learned = self.error()
        kept = learned < nearest
        if not kept:
            quantizer.logits.data.copy_(decided)
        changed = int((encode(quantizer, weight).codes != integers).sum()) / max(weight.numel(), 1)
        return RoundingResult(layer=self.name, nearest=nearest, learned=learned, changed=changed, kept=kept)

    def _minimise(
        self, steps: int, lr: float, batch_size: int, penalty: float | None, advance: Callable[[], None]
    ) -> None:
        """Adam on the logits. Training mode makes the rounding soft and adds the penalty's gradient to the error's."""
        quantizer, logits = self.quantizer, self.quantizer.logits
        optimizer = torch.optim.Adam([logits], lr)
        generator = torch.Generator().manual_seed(0)  # of its own: the run's random numbers stay what they were
        sizes = torch.tensor([float(len(y)) for _, y in self.data])
        # The paper's error is summed over channels, of outputs whose variance BatchNorm made about 1. In units of the
        # variance, one weight of the penalty does for other layers too. Adam does not see a common factor of both.
        factor = self.layer.outputs_first().shape[0] / self._variance()
        factor *= 1.0 if penalty is None else quantizer.scheme.rounding_penalty / penalty
        quantizer.train()
        quantizer.mode = Mode.quantize
        for step in range(steps):
            quantizer.progress.fill_(step / steps)
            x, target = self.data[int(torch.multinomial(sizes, 1, generator=generator))]
            chosen = torch.randint(len(target), (min(batch_size, len(target)),), generator=generator).to(target.device)
            with torch.enable_grad():
                loss = (self._output(*(t[chosen] for t in x)) - target[chosen]).square().mean() * factor
                (logits.grad,) = torch.autograd.grad(loss, logits)
            optimizer.step()
            advance()
        logits.grad = None
        quantizer.eval()
        quantizer.mode = Mode.frozen

    @torch.no_grad()
    def error(self) -> float:
        """Mean squared error of the output as weights are rounded now."""
        total, count = 0.0, 0
        for inputs, targets in self.data:
            for *x, target in zip(*(t.split(256) for t in inputs), targets.split(256), strict=True):
                total += float((self._output(*x) - target).double().square().sum())
                count += target.numel()
        return total / max(count, 1)

    def _variance(self) -> float:
        variance = sum(float(y.var()) * len(y) for _, y in self.data) / sum(len(y) for _, y in self.data)
        return variance if variance > 0 else 1.0

    def _output(self, *x: Tensor) -> Tensor:
        y = self.layer.compute(*x)
        y = y if self.norm is None else self.norm(y)
        return torch.relu(y) if self.relu else y


def _tail(graph: Graph, node: fx.Node) -> tuple[nn.Module | None, bool]:
    """The BatchNorm right behind a layer, and whether a ReLU (an operation or a quantizer's) is all that follows."""
    norm = graph.batch_norm_after(node)

    def cuts(reader: fx.Node) -> bool:
        module = graph.submodule(reader)
        return module.relu if isinstance(module, FakeQuantize) else graph.kind(reader) is Kind.relu

    readers = list((norm or node).users)
    return graph.submodule(norm) if norm else None, bool(readers) and all(cuts(reader) for reader in readers)


class _Reached(Exception):  # noqa: N818
    """The pass has come to the layer; what follows need not run."""


@torch.no_grad()
def _inputs(net: nn.Module, layer: QuantizedLayer, calls: int, batch: Any) -> list[Inputs]:
    """A layer's inputs in one pass of the network, one tuple a call."""
    seen: list[Inputs] = []

    def record(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(layer.activations(*(x for x in (*args, *named.values()) if isinstance(x, Tensor))))
        if len(seen) == calls:
            raise _Reached

    handle = layer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        run(net, batch)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen


@contextmanager
def _modes_kept(net: nn.Module) -> Iterator[None]:
    """Afterwards every quantizer is in the mode, and as far in training, as it was."""
    before = [(quantizer, quantizer.mode, quantizer.progress.clone()) for _, quantizer in quantizers(net)]
    try:
        yield
    finally:
        for quantizer, mode, progress in before:
            quantizer.mode = mode
            quantizer.progress.copy_(progress)


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar; yields what to call at each step."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, transient=True, disable=not (shown and console.is_interactive)) as bar:
        task = bar.add_task("Adaptive rounding", total=total)
        yield lambda: bar.advance(task)


def _log(results: list[RoundingResult]) -> None:
    better = [result for result in results if result.kept]
    shares = sorted(result.learned / result.nearest for result in better)
    text = f", squared error {shares[len(shares) // 2]:.0%} of nearest's (median)" if shares else ""
    log.info("adaptive rounding: learned for %d of %d layers%s", len(better), len(results), text)
