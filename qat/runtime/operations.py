"""Operations without weights. Those that move or select values work on integers; the others on real numbers.

Each is built from plain data (`spec`). On integers, `Pad` and `Relu` are given the zero point, which stands for 0.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from qat.cells import repacked
from qat.runtime.functions import FUNCTIONS, MOVES
from qat.runtime.grid import Quantize
from qat.runtime.layers import RuntimeLayer


class QuantizeInput(RuntimeLayer):
    """Real numbers to the output's grid."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.emit(x)


class Dequantize(RuntimeLayer):
    """Integers to real numbers: `scale * (x_q - zero_point)`."""

    def __init__(self, grid: Quantize) -> None:
        super().__init__()
        self.grid = grid

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return {"grid": self.grid.spec()}

    def forward(self, x_q: Tensor | PackedSequence) -> Tensor | PackedSequence:  # noqa: D102
        if isinstance(x_q, PackedSequence):
            return repacked(x_q, self.grid.dequantize(x_q.data))
        return self.grid.dequantize(x_q)


class Add(RuntimeLayer):
    """Sum of two tensors of real numbers."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # noqa: D102
        return self.emit(a + b)


class Affine(RuntimeLayer):
    """`x * factor + offset` per channel (dimension 1): a BatchNorm that no layer could take in."""

    factor: Tensor
    offset: Tensor

    def __init__(self, channels: int, output: Quantize | None = None) -> None:
        super().__init__(output)
        self.register_buffer("factor", torch.ones(channels))
        self.register_buffer("offset", torch.zeros(channels))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"channels": self.factor.numel()}

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        shape = (-1, *[1] * (x.dim() - 2))
        return self.emit(x * self.factor.reshape(shape) + self.offset.reshape(shape))


class _Configured(RuntimeLayer):
    """An operation whose settings are plain data, kept as given."""

    def __init__(self, output: Quantize | None = None, **settings: Any) -> None:
        super().__init__(output)
        self.settings = settings

    def spec(self) -> dict[str, Any]:
        return super().spec() | self.settings

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.settings.items())


class Relu(_Configured):
    """`max(x, zero)`; on integers `zero` is the zero point."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.emit(x.clamp(min=self.settings["zero"]))


class Average(_Configured):
    """Average pooling of real numbers: `kernel`, `stride`, `padding` per dimension, `count_include_pad`."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        s = self.settings
        pool: Any = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(s["kernel"])]
        return self.emit(pool(x, s["kernel"], s["stride"], s["padding"], s["ceil_mode"], s["count_include_pad"]))


class Mean(_Configured):
    """Mean over the dimensions `dims` (counted from the end), kept as size 1 if `keepdim`."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.emit(x.mean(dim=self.settings["dims"], keepdim=self.settings["keepdim"]))


class MaxPool(_Configured):
    """Max pooling of integers or real numbers: `kernel`, `stride`, `padding`, `dilation` per dimension, `ceil_mode`."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        s = self.settings
        one = len(s["kernel"]) == 1 and not x.is_floating_point()  # integers are pooled in two and three dimensions
        if one:
            x, s = x.unsqueeze(-2), {k: v if k == "ceil_mode" else [int(k != "padding"), *v] for k, v in s.items()}
        pool: Any = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(s["kernel"])]
        wide = x if x.is_floating_point() else x.int()  # torch counts places in the type of the values
        y = pool(wide, s["kernel"], s["stride"], s["padding"], s["dilation"], s["ceil_mode"]).to(x.dtype)
        return y.squeeze(-2) if one else y


class Reshape(_Configured):
    """New shape; 0 copies the input's size in that place, -1 is inferred (as in ONNX)."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(self.settings["shape"])]
        if shape == [*x.shape[: len(shape) - 1], -1]:  # reshape cannot infer the size of an empty batch
            return x.flatten(len(shape) - 1)
        return x.reshape(shape)


class Permute(_Configured):
    """Reorder dimensions."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x.permute(self.settings["dims"])


class Slice(_Configured):
    """`x[..., start:stop:step, ...]`: one `[dim, start, stop, step]` each; `stop` None is the end."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for dim, start, stop, step in self.settings["slices"]:
            index = [slice(None)] * x.dim()
            index[dim] = slice(start, stop, step)
            x = x[tuple(index)]
        return x


_PLACES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "reflect": lambda i, size: size - 1 - (size - 1 - i.abs()).abs(),
    "replicate": lambda i, size: i.clamp(0, size - 1),
    "circular": lambda i, size: i % size,
}
"""Which value stands at a position beyond the ends."""


class Pad(_Configured):
    """Padding; `pads` is (before, after) for the last dimensions, `value` the zero point on integers.

    With a `mode` other than `constant` (`reflect`, `replicate`, `circular`) values are repeated.
    """

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        flat = [p for pair in reversed(self.settings["pads"]) for p in pair]
        mode = self.settings.get("mode", "constant")
        if mode == "constant":
            return F.pad(x, flat, value=self.settings["value"])
        for i, (before, after) in enumerate(reversed(self.settings["pads"]), 1):
            places = _PLACES[mode](torch.arange(-before, x.shape[-i] + after, device=x.device), x.shape[-i])
            x = x.index_select(-i, places)
        return x


class Concat(_Configured):
    """Join tensors that lie on one grid along `dim`."""

    def forward(self, *tensors: Tensor) -> Tensor:  # noqa: D102
        return torch.cat(tensors, dim=self.settings["dim"])


class Constant(RuntimeLayer):
    """A parameter or buffer that the network reads: real numbers, a mask, or integers of the output's grid.

    Args:
        shape: of the tensor.
        dtype: name of torch's type.
        output: its grid.
    """

    value: Tensor

    def __init__(self, shape: list[int], dtype: str = "float32", output: Quantize | None = None) -> None:
        super().__init__(output)
        self.register_buffer("value", torch.zeros(shape, dtype=getattr(torch, dtype)))

    @classmethod
    def of(cls, value: Tensor, output: Quantize | None = None) -> "Constant":
        """A layer that holds `value`, on the grid `output` if there is one."""
        value = value.detach() if output is None else output(value.detach())
        layer = cls(list(value.shape), str(value.dtype).removeprefix("torch."), output)
        layer.value.copy_(value)
        return layer

    def spec(self) -> dict[str, Any]:  # noqa: D102
        dtype = str(self.value.dtype).removeprefix("torch.")
        return super().spec() | {"shape": list(self.value.shape), "dtype": dtype}

    def forward(self) -> Tensor:  # noqa: D102
        return self.value


class Function(RuntimeLayer):
    """A function of real numbers by `name`, key of FUNCTIONS: a float island in the integer network.

    Args:
        name: key of FUNCTIONS.
        inputs: the function's parameters that are the layer's inputs, in order.
        constants: those that are tensors of the layer (a norm's weight), with their shapes.
        output: grid of the result.
        settings: its other arguments.
    """

    def __init__(
        self, name: str, inputs: Sequence[str] = ("input",), constants: dict[str, list[int]] | None = None,
        output: Quantize | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__(output)
        self.name, self.inputs, self.constants, self.settings = name, list(inputs), constants or {}, settings
        for key, shape in self.constants.items():
            self.register_buffer(f"constant_{key}", torch.zeros(shape))

    def constant(self, name: str) -> Tensor:
        """A tensor of the layer."""
        return self.get_buffer(f"constant_{name}")

    def spec(self) -> dict[str, Any]:  # noqa: D102
        parts = {"name": self.name, "inputs": self.inputs, "constants": self.constants}
        return super().spec() | parts | self.settings

    def extra_repr(self) -> str:  # noqa: D102
        return ", ".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])

    def forward(self, *tensors: Tensor) -> Tensor:  # noqa: D102
        given = dict(zip(self.inputs, tensors, strict=True)) | {k: self.constant(k) for k in self.constants}
        return self.emit(FUNCTIONS[self.name](**given, **self.settings))


class Move(_Configured):
    """Moves or selects values, on integers or real numbers: `name`, key of MOVES, and its settings.

    The first input is the tensor; a mask, or a tensor that has the batch size, may follow.
    """

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:  # noqa: D102
        settings = {k: v for k, v in self.settings.items() if k != "name"}
        return self.emit(MOVES[self.settings["name"]](x, *others, **settings))
