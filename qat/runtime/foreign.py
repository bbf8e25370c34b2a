"""A module in Python code, between integer layers: where a network has a part that could not be recorded."""

from typing import Any

from torch import Tensor, nn

from qat.runtime.grid import Quantize
from qat.runtime.layers import RuntimeLayer


class Foreign(RuntimeLayer):
    """Runs a module, which may hold integer networks of its own, on real numbers. No file can hold it.

    Args:
        module: takes and returns tensors.
        output: grid of the result.
    """

    def __init__(self, module: nn.Module, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.module = module

    def spec(self) -> dict[str, Any]:
        """Raises a ValueError: code is no data."""
        raise ValueError(
            f"{type(self.module).__name__} was not recorded and runs as Python code: no file can hold it. qat.report "
            f"gives the line that stops the recording; quant.graph=required refuses such a network"
        )

    def forward(self, *x: Tensor) -> Tensor:  # noqa: D102
        result: Tensor = self.module(*x)
        return self.emit(result)
