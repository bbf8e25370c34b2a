"""A module in Python code, between integer layers: where a network has a part that could not be recorded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qat.runtime.grid import Quantize
from qat.runtime.layers import RuntimeLayer


@dataclass(frozen=True)
class Slot:
    """Stands for an input of a step among the arguments of a call."""

    index: int


class Foreign(RuntimeLayer):
    """Runs a module, which may hold integer networks of its own, on real numbers. No file can hold it.

    Args:
        module: takes and returns tensors.
        args, kwargs: of its call, with a Slot for each tensor.
        output: grid of the result.
    """

    def __init__(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Quantize | None = None
    ) -> None:
        super().__init__(output)
        self.module, self.args, self.kwargs = module, tuple(args), dict(kwargs)

    def spec(self) -> dict[str, Any]:
        """Raises a ValueError: code is no data."""
        raise ValueError(
            f"{type(self.module).__name__} was not recorded and runs as Python code: no file can hold it. qat.report "
            f"gives the line that stops the recording; quant.graph=required refuses such a network"
        )

    def forward(self, *x: Tensor) -> Tensor:  # noqa: D102
        result: Tensor = self.module(*_filled(self.args, x), **_filled(self.kwargs, x))
        return self.emit(result)


class Part(RuntimeLayer):
    """One of several tensors that a foreign module returns.

    Args:
        index: which one.
        output: grid of the result.
    """

    def __init__(self, index: int, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.index = index

    def forward(self, x: Sequence[Tensor]) -> Tensor:  # noqa: D102
        return self.emit(x[self.index])


def _filled(value: Any, x: Sequence[Tensor]) -> Any:
    """Arguments with tensors in place of slots."""
    if isinstance(value, Slot):
        return x[value.index]
    if isinstance(value, list | tuple):
        return type(value)(_filled(part, x) for part in value)
    return {key: _filled(part, x) for key, part in value.items()} if isinstance(value, dict) else value
