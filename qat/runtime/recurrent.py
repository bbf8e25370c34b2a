"""Recurrent layers: integer products by stored weights, gates in float32, states on their grids.

The equations are `qat.cells`', those of training. A cell's weights are layers of the runtime: `IntegerConv` where the
weight and what it multiplies are integers, else one that multiplies in float from what is stored.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from qat.cells import Form, recur, repacked
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv, IntegerConv, RuntimeLayer
from qat.runtime.stored import ProductConv, Simulate, TableConv

PARTS: dict[str, Callable[..., nn.Module]] = {
    "integer_conv": IntegerConv,
    "float_conv": FloatConv,
    "table_conv": TableConv,
    "product_conv": ProductConv,
    "simulate": Simulate,
    "grid": Quantize,
}
"""What a cell may be made of."""

NAMES = {kind: name for name, kind in PARTS.items()}


class RuntimeCell(nn.Module):
    """The weights and grids of one layer in one direction (`qat.cells.Cell`).

    Args:
        parts: `read`, `recall` and `project` (where there is one): weights; keys of GRIDS: what values are put on; and
            `below`: the grid of what is read, if that arrives as real numbers.
    """

    def __init__(self, parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"{name}_part": part for name, part in parts.items()})  # "project" is taken

    def part(self, name: str) -> nn.Module | None:
        """A part by its name."""
        key = f"{name}_part"
        return dict(self.parts.items()).get(key)

    def spec(self) -> dict[str, Any]:
        """Part -> its kind (key of PARTS) and its settings."""
        return {
            key.removesuffix("_part"): {"layer": NAMES[type(part)], "settings": part.spec()}  # type: ignore[operator]
            for key, part in self.parts.items()
        }

    def _multiply(self, name: str, x: Tensor, grid: str) -> Tensor:
        weight, below = self.part(name), self.part(grid)
        assert weight is not None
        if isinstance(weight, IntegerConv) and x.is_floating_point():
            assert below is not None
            x = below(x)  # it is on this grid: its integers, exactly
        y: Tensor = weight(x)
        return y

    def read(self, x: Tensor) -> Tensor:  # noqa: D102
        return self._multiply("read", x, "below")

    def recall(self, h: Tensor) -> Tensor:  # noqa: D102
        return self._multiply("recall", h, "hidden")

    def project(self, h: Tensor) -> Tensor:  # noqa: D102
        if self.part("project") is None:
            return h
        return self._multiply("project", self.place("unprojected", h), "unprojected")

    def place(self, name: str, value: Tensor) -> Tensor:  # noqa: D102
        grid = self.part(name)
        if grid is None:
            return value
        y: Tensor = grid.dequantize(grid(value)) if isinstance(grid, Quantize) else grid(value)
        return y


class Recurrent(RuntimeLayer):
    """LSTM, GRU or RNN, of any number of layers and directions; or a single cell.

    Args:
        form: fields of `Form`.
        cells: specs of the cells, of each layer forward and backward.
        one_step: a cell: inputs [batch, features], states [batch, hidden].
        output: grid of the hidden states of the last layer.
    """

    def __init__(
        self, form: dict[str, Any], cells: list[dict[str, Any]], one_step: bool = False, output: Quantize | None = None
    ) -> None:
        super().__init__(output)
        self.form = Form(**{**form, "sizes": tuple(form["sizes"])})
        self.one_step = one_step
        self.cells = nn.ModuleList(
            RuntimeCell({name: _build(part["layer"], part["settings"]) for name, part in cell.items()})
            for cell in cells
        )

    @classmethod
    def of(cls, form: Form, cells: list[RuntimeCell], one_step: bool, output: Quantize | None) -> "Recurrent":
        """The layer of these cells."""
        layer = cls(_plain(form), [], one_step, output)
        layer.cells.extend(cells)
        return layer

    def spec(self) -> dict[str, Any]:  # noqa: D102
        cells = [cell.spec() for cell in self.cells]  # type: ignore[operator]
        return super().spec() | {"form": _plain(self.form), "cells": cells, "one_step": self.one_step}

    def forward(self, x: Tensor | PackedSequence, *initial: Tensor) -> tuple[Tensor | PackedSequence, ...]:
        """Integers or real numbers, and real states -> output (integers of its grid, or real) and last states, real.

        A state is real because those of several layers lie on several grids; `Take` puts one back on its own, exactly.
        """
        if self.one_step:
            assert isinstance(x, Tensor)
            x, initial = x.unsqueeze(0), tuple(state.unsqueeze(0) for state in initial)
        made, last = recur(self.form, list(self.cells), x, initial)  # type: ignore[arg-type]
        output = repacked(made, self.emit(made.data)) if isinstance(made, PackedSequence) else self.emit(made)
        if self.one_step:
            return output[0], *(state[0] for state in last)
        return output, *last


class Take(RuntimeLayer):
    """A part of what a recurrent layer returns.

    Args:
        part: 0 for its output, 1 for the hidden states, 2 for the cell states.
        cell: of the states, that of one cell; None for all.
        output: the grid that the part lies on; None where it is real.
    """

    def __init__(self, part: int, cell: int | None = None, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.part, self.cell = part, cell

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"part": self.part, "cell": self.cell}

    def forward(self, result: tuple[Any, ...]) -> Any:
        """The tensor (or packed sequence) as integers of its grid, or float32."""
        if self.part == 0:
            return result[0]
        state = result[self.part] if self.cell is None else result[self.part][self.cell]
        return self.emit(state)


def _build(kind: str, settings: dict[str, Any]) -> nn.Module:
    make = PARTS[kind]
    return make.from_spec(settings) if issubclass(make, RuntimeLayer) else make(**settings)  # type: ignore


def _plain(form: Form) -> dict[str, Any]:
    return {
        "kind": form.kind, "layers": form.layers, "directions": form.directions, "batch_first": form.batch_first,
        "sizes": list(form.sizes),
    }  # fmt: skip
