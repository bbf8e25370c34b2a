"""A recording run on the example: the shapes of its tensors, which of them share memory, what writes into them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from qat.modes import eval_mode
from qat.record import Call, without_fast_path
from qat.structures import map_tensors, tensors
from qat.tracing import is_constant


class Trial(fx.Interpreter):
    """One run in eval mode.

    Args:
        traced: a recording.
        call: the example.
        keep: keep every tensor, for `values`.

    Attributes:
        returned: what the network returned.
        shapes: of every tensor of real numbers.
        values: node -> the tensors that it made, if they are kept: memory that two of them share is theirs then, and
            not a second tensor's. What they hold at the end is not what they held when they were made.
        written: node -> those of its inputs that it wrote into.
    """

    @torch.no_grad()
    def __init__(self, traced: fx.GraphModule, call: Call, keep: bool = False) -> None:
        super().__init__(traced)
        self.keep = keep
        self.shapes: dict[fx.Node, torch.Size] = {}
        self.values: dict[fx.Node, list[Tensor]] = {}
        self.written: dict[fx.Node, list[fx.Node]] = {}
        self._constants: dict[str, Any] = {}
        given = map_tensors(torch.clone, call.bound(traced))  # operations in place must not change the example
        names = [(str(node.target), node.args) for node in traced.graph.nodes if node.op == "placeholder"]
        with eval_mode(traced), _same_draws(call):
            self.returned = self.run(*(given.get(name, *default) for name, default in names))

    def run_node(self, n: fx.Node) -> Any:
        """Run one operation."""
        before = {arg: self._versions(arg) for arg in n.all_input_nodes}
        result = super().run_node(n)
        if self.keep:
            self.values[n] = list(tensors(result))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.shapes[n] = result.shape
        if found := [arg for arg, versions in before.items() if self._versions(arg) != versions]:
            self.written[n] = found
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A tensor of the network; of a constant that forward makes anew each time, a copy."""
        value = super().get_attr(target, args, kwargs)
        if is_constant(target):
            return self._constants.setdefault(str(target), value.clone())
        return value

    def _versions(self, node: fx.Node) -> list[int]:
        """How often each tensor was written into; what shares memory shares the count."""
        return [t._version for t in tensors(self.env[node]) if not t.is_inference()]


@contextmanager
def _same_draws(call: Call) -> Iterator[None]:
    """The same random numbers in every run: some poolings draw in evaluation, too. The user's generators are kept."""
    devices = sorted({t.device.index for t in tensors((call.args, call.kwargs)) if t.is_cuda})
    with torch.random.fork_rng(devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)):
            generator.manual_seed(0)
        yield


@torch.no_grad()
def float_output(net: nn.Module, call: Call, fixed: Mapping[str, Any]) -> list[Tensor]:
    """What a float network returns for the example."""
    args, kwargs = map_tensors(torch.clone, (call.args, call.kwargs))
    with eval_mode(net), without_fast_path(), _same_draws(call):
        return list(tensors(net(*args, **kwargs, **fixed)))


def check_same(net: nn.Module, trial: Trial, expected: list[Tensor], tolerance: float) -> None:
    """Compare a recording's output with the network's.

    Raises:
        ValueError: they differ by more than `tolerance`, relative to a value or to the largest one.
    """
    finite = [t[t.isfinite()] for t in expected if t.is_floating_point() and not t.is_meta]
    largest = max((float(t.abs().max()) for t in finite if t.numel()), default=1.0)
    try:
        torch.testing.assert_close(
            list(tensors(trial.returned)), expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True
        )
    except AssertionError as error:
        raise ValueError(
            f"the traced {type(net).__name__} does not compute what the network computes: {error}"
        ) from None
