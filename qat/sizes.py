"""Sizes that a network computes (`x.shape[1] // 2`), as numbers: found by running it on two batch sizes.

What is the same in both runs is a constant of the network; what is not depends on the batch.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.rnn import pack_padded_sequence

from qat.graph import Graph
from qat.kinds import Kind
from qat.modes import eval_mode
from qat.structures import map_tensors, tensors


class Sizes:
    """Shapes of tensors and values of sizes in a prepared network, for inputs of the example's shapes.

    Runs the network (twice, on zeros) when something is first asked.
    """

    def __init__(self, prepared: fx.GraphModule) -> None:
        self.prepared = prepared
        self._runs: list[dict[fx.Node, Any]] = []

    def value(self, node: fx.Node) -> Any:
        """What a size, or something computed of sizes, is; None where it depends on the batch."""
        first, second = (run[node] for run in self.runs)
        return _common(first, second)

    def shape(self, node: fx.Node) -> list[int | None]:
        """A tensor's shape, with None for sizes that depend on the batch."""
        first, second = (run[node] for run in self.runs)
        return [a if a == b else None for a, b in zip(first, second, strict=True)]

    def is_batch(self, node: fx.Node) -> bool:
        """Whether a size is the batch size itself."""
        batch = next(tensors(self.prepared.meta["qat"]["inputs"])).shape[0]
        return [run[node] for run in self.runs] == [batch, 2 * batch]

    @property
    def runs(self) -> list[dict[fx.Node, Any]]:
        """Node -> value of a size, or shape of a tensor, for the example's batch size and twice that."""
        if not self._runs:
            with torch.no_grad(), eval_mode(self.prepared):
                self._runs = [self._run(factor) for factor in (1, 2)]
        return self._runs

    def example(self, factor: int = 1) -> list[Any]:
        """Zeros in the shapes of the example inputs, `factor` times as many samples."""
        device = next((t.device for t in self.prepared.state_dict().values()), torch.device("cpu"))

        def zeros(t: Tensor) -> Tensor:
            return torch.zeros(t.shape[0] * factor, *t.shape[1:], dtype=t.dtype, device=device)

        made: list[Any] = map_tensors(zeros, list(self.prepared.meta["qat"]["inputs"].values()))
        return made

    def _run(self, factor: int) -> dict[fx.Node, Any]:
        noter = _Noter(self.prepared)
        noter.run(*self.example(factor))
        return noter.noted


class _Noter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.graph_of, self.noted = Graph(module), dict[fx.Node, Any]()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is pack_padded_sequence:  # the example's lengths are not known: take whole sequences
            x, lengths = args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["lengths"]
            batch_first = args[2] if len(args) > 2 else kwargs.get("batch_first", False)
            steps = x.shape[1 if batch_first else 0]
            lengths = torch.full_like(lengths, steps) if isinstance(lengths, Tensor) else [steps] * len(lengths)
            args, kwargs = (x, lengths), {"batch_first": batch_first}
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.graph_of.kind(n) is Kind.size:
            self.noted[n] = result
        elif isinstance(result, Tensor):
            self.noted[n] = list(result.shape)
        return result


def _common(a: Any, b: Any) -> Any:
    if isinstance(a, list | tuple):
        parts = [_common(x, y) for x, y in zip(a, b, strict=True)]
        return None if isinstance(a, list | tuple) and any(p is None for p in parts) else parts
    if isinstance(a, Tensor):
        return a if a.shape == b.shape and torch.equal(a, b) else None
    return a if a == b else None
