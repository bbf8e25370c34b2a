"""Runs a network from its C header (model.h) with NumPy alone, in integers: what the C code beside it computes.

    python run.py model.h inputs.npy outputs.npy

`inputs.npy` holds real numbers, [samples, ...]. In Python:

    model = Model("model.h")
    logits = model(x)                                # float32 [samples, ...] -> float32
    integers = model.run(model.quantize(x))          # what a microcontroller sees

Every sum is a 32-bit integer; `scaled` brings it to the grid of the next layer by a multiplier and a shift. A tensor
of one sample lies flat in memory, channels first, so here it has the shape [samples, size].
"""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

Array = Any  # of NumPy
INTEGERS = {"int8_t": np.int8, "int32_t": np.int32}


class Model:
    """A network as model.h describes it: arrays of numbers, tensors in memory, steps in order."""

    def __init__(self, path: str | Path) -> None:
        text = re.sub(r"/\*.*?\*/", "", Path(path).read_text(encoding="ascii"), flags=re.DOTALL)
        arrays = re.findall(r"static const (\w+) (\w+)\[\d*\] = \{([^}]*)\};", text)
        self.arrays = {
            name: np.array([int(v) for v in values.split(",") if v.strip()], INTEGERS[kind])
            for kind, name, values in arrays
        }
        body = text.partition("MODEL_STEPS[] = {")[2].partition("\n};")[0]
        self.steps = [[part.strip() for part in row.split(",")] for row in re.findall(r"\{([^{}]*)\}", body)]
        defined = dict(re.findall(r"#define (\w+) (\S+)", text))
        self.input_scale, self.output_scale = (np.float32(defined[f"MODEL_{k}_SCALE"]) for k in ("INPUT", "OUTPUT"))
        self.input, self.input_zero, self.input_min, self.input_max, self.output, self.output_zero = (
            int(defined[f"MODEL_{k}"])
            for k in ("INPUT", "INPUT_ZERO", "INPUT_MIN", "INPUT_MAX", "OUTPUT", "OUTPUT_ZERO")
        )
        self.output_shape = [int(n) for n in self.arrays["MODEL_OUTPUT_SHAPE"]]
        self.sizes = self.arrays["MODEL_TENSORS"].reshape(-1, 3)  # offset in the arena, values, bytes of a value

    def quantize(self, x: Array) -> Array:
        """Real numbers [samples, ...] -> integers of the input, [samples, size]."""
        steps = np.rint(np.asarray(x, np.float32) / self.input_scale) + np.float32(self.input_zero)
        return np.clip(steps, self.input_min, self.input_max).astype(np.int8).reshape(len(x), -1)

    def run(self, integers: Array) -> Array:
        """Integers of the input [samples, size] -> integers of the output [samples, *shape]."""
        self.tensors = {self.input: integers}
        for kind, parameters, *numbers in self.steps:
            numbers = [None if name == "NULL" else self.arrays[name] for name in numbers]
            OPERATIONS[kind](self, [int(p) for p in self.arrays[parameters]], *numbers)
        return self.tensors[self.output].reshape(-1, *self.output_shape)

    def __call__(self, x: Array) -> Array:
        """Real numbers [samples, ...] -> real numbers."""
        integers = self.run(self.quantize(x))
        return (integers.astype(np.float32) - np.float32(self.output_zero)) * self.output_scale

    def emit(self, out: int, values: Array) -> None:
        """Keep a tensor as the integers that it is stored in."""
        self.tensors[out] = values.astype({1: np.int8, 4: np.int32}[int(self.sizes[out][2])]).reshape(len(values), -1)

    def view(self, tensor: int, offset: int, dims: list[int], strides: list[int]) -> Array:
        """Values `tensor[offset + sum_i index_i * strides_i]`: int64 [samples, *dims]."""
        return self.tensors[tensor][:, places(offset, dims, strides)].astype(np.int64)


def places(offset: int, dims: list[int], strides: list[int]) -> Array:
    """Where in a flat tensor the values of a view lie, [*dims]."""
    index = np.full([1] * len(dims), offset)
    for axis, (size, stride) in enumerate(zip(dims, strides, strict=True)):
        index = index + (np.arange(size) * stride).reshape([-1 if i == axis else 1 for i in range(len(dims))])
    return index


def scaled(x: Array, multiplier: Array, shift: Array) -> Array:
    """`round(x * multiplier * 2^(shift - 31))`, halves up (CMSIS-NN's arm_nn_requantize, single rounding)."""
    right = 31 - np.asarray(shift, np.int64)
    return (x.astype(np.int64) * np.asarray(multiplier, np.int64) + (np.int64(1) << (right - 1))) >> right


def to_grid(x: Array, multiplier: Array, shift: Array, zero: int, low: int, high: int) -> Array:
    """Sums -> integers of a grid."""
    return np.clip(scaled(x, multiplier, shift) + zero, low, high)


def windows(x: Array, kernel: Any, stride: Any, dilation: Any) -> Array:
    """[samples, channels, height, width] -> [samples, channels, rows, columns, *kernel]."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    found = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))
    return found[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def padded(x: Array, size: Any, kernel: Any, stride: Any, before: Any, dilation: Any, value: int) -> Array:
    """As much of `value` around an image as the windows need for an output of `size`."""
    need = [(n - 1) * s + d * (k - 1) + 1 for n, s, d, k in zip(size, stride, dilation, kernel, strict=True)]
    after = [max(n - b - have, 0) for n, b, have in zip(need, before, x.shape[2:], strict=True)]
    x = np.pad(x, ((0, 0), (0, 0), (before[0], after[0]), (before[1], after[1])), constant_values=value)
    return x[:, :, : need[0], : need[1]]


def product(a: Array, b: Array) -> Array:
    """A product of matrices of integers; real numbers of 64 bits hold its sums exactly, and are much faster."""
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)


def conv(model: Model, p: list[int], weight: Array, bias: Array, multiplier: Array, shift: Array) -> None:
    """Convolution, depthwise too: sum (x - zero) w + bias for each output channel."""
    source, out, zero, to_zero, low, high, c, h, w, o, rows, columns = p[:12]
    kernel, stride, before, dilation, groups = p[12:14], p[14:16], p[16:18], p[18:20], p[20]
    x = model.tensors[source].astype(np.float64).reshape(-1, c, h, w) - zero
    x = windows(padded(x, (rows, columns), kernel, stride, before, dilation, 0), kernel, stride, dilation)
    x = x.transpose(0, 2, 3, 1, 4, 5).reshape(len(x), rows * columns, groups, -1).swapaxes(1, 2)
    by = weight.reshape(groups, o // groups, -1)
    total = product(x, by.swapaxes(1, 2)).swapaxes(2, 3).reshape(len(x), o, -1) + bias[:, None]
    model.emit(out, to_grid(total, multiplier[:, None], shift[:, None], to_zero, low, high))


def linear(model: Model, p: list[int], weight: Array, bias: Array, multiplier: Array, shift: Array) -> None:
    """A product with a weight for each position."""
    source, out, zero, to_zero, low, high, positions, inputs, outputs = p
    x = model.tensors[source].astype(np.int64).reshape(-1, positions, inputs) - zero
    total = product(x, weight.reshape(outputs, inputs).T) + bias
    model.emit(out, to_grid(total, multiplier, shift, to_zero, low, high))


def add(model: Model, p: list[int], _weight: Array, _bias: Array, multiplier: Array, shift: Array) -> None:
    """Sum of tensors, each scaled to a common unit first."""
    out, zero, low, high, left, rank, count = p[:7]
    dims, rest, total = p[7 : 7 + rank], p[7 + rank :], 0
    for i in range(count):
        source, its_zero, sign, m, s, *strides = rest[i * (5 + rank) : (i + 1) * (5 + rank)]
        total = total + sign * scaled((model.view(source, 0, dims, strides) - its_zero) << left, m, s)
    model.emit(out, to_grid(total, multiplier, shift, zero, low, high))


def multiply(model: Model, p: list[int], _weight: Array, _bias: Array, multiplier: Array, shift: Array) -> None:
    """Product of two tensors, value by value."""
    out, zero, low, high, rank = p[:5]
    dims, a, b = p[5 : 5 + rank], p[5 + rank : 7 + 2 * rank], p[7 + 2 * rank :]
    total = (model.view(a[0], 0, dims, a[2:]) - a[1]) * (model.view(b[0], 0, dims, b[2:]) - b[1])
    model.emit(out, to_grid(total, multiplier, shift, zero, low, high))


def mean(model: Model, p: list[int], _weight: Array, _bias: Array, multiplier: Array, shift: Array) -> None:
    """Mean (or sum) over some dimensions."""
    source, out, zero, to_zero, low, high, kept, summed, *rest = p
    dims, strides = rest[:kept] + rest[2 * kept : 2 * kept + summed], rest[kept : 2 * kept] + rest[2 * kept + summed :]
    x = model.view(source, 0, dims, strides) - zero
    total = x.sum(axis=tuple(range(1 + kept, 1 + kept + summed)))
    model.emit(out, to_grid(total, multiplier, shift, to_zero, low, high))


def average(model: Model, p: list[int], _weight: Array, _bias: Array, multiplier: Array, shift: Array) -> None:
    """Average pooling; windows of different sizes count for `common / size`."""
    source, out, zero, to_zero, low, high, c, h, w, rows, columns = p[:11]
    kernel, stride, before, counts_padding, common = p[11:13], p[13:15], p[15:17], p[17], p[18]
    x = model.tensors[source].astype(np.int64).reshape(-1, c, h, w) - zero

    def sums(x: Array) -> Array:
        x = padded(x, (rows, columns), kernel, stride, before, (1, 1), 0)
        return windows(x, kernel, stride, (1, 1)).sum((4, 5))

    total = sums(x)
    if common:
        ones = np.ones((1, 1, h + 2 * before[0], w + 2 * before[1]), np.int64)
        if not counts_padding:
            ones[:, :, : before[0]] = ones[:, :, before[0] + h :] = 0
            ones[:, :, :, : before[1]] = ones[:, :, :, before[1] + w :] = 0
        need = padded(ones, (rows, columns), kernel, stride, (0, 0), (1, 1), 0)
        total = total * (common // windows(need, kernel, stride, (1, 1)).sum((4, 5)))
    model.emit(out, to_grid(total, multiplier, shift, to_zero, low, high))


def largest(model: Model, p: list[int], *_: Array) -> None:
    """Max pooling."""
    source, out, c, h, w, rows, columns = p[:7]
    kernel, stride, before, dilation = p[7:9], p[9:11], p[11:13], p[13:15]
    x = padded(model.tensors[source].reshape(-1, c, h, w), (rows, columns), kernel, stride, before, dilation, -128)
    model.emit(out, windows(x, kernel, stride, dilation).max((4, 5)))


def clamp(model: Model, p: list[int], *_: Array) -> None:
    """ReLU: nothing below zero."""
    model.emit(p[1], np.maximum(model.tensors[p[0]], p[2]))


def table(model: Model, p: list[int], narrow: Array, wide: Array, *_: Array) -> None:
    """Any function of one value."""
    model.emit(p[1], (wide if narrow is None else narrow)[model.tensors[p[0]].astype(np.int64) - p[2]])


def constant(model: Model, p: list[int], values: Array, *_: Array) -> None:
    """Numbers of the network itself."""
    model.emit(p[0], np.broadcast_to(values, (len(model.tensors[model.input]), len(values))))


def copy(model: Model, p: list[int], *_: Array) -> None:
    """Values to other places: reshapes, permutations, slices, padding, parts of a concatenation."""
    source, out, fills, value, rank, start, to = p[:7]
    dims, strides, to_strides = (p[7 + i * rank : 7 + (i + 1) * rank] for i in range(3))
    if fills:
        model.emit(out, np.full((len(model.tensors[source]), model.sizes[out][1]), value))
    model.tensors[out][:, places(to, dims, to_strides)] = model.view(source, start, dims, strides)


OPERATIONS = {
    "MODEL_CONV": conv, "MODEL_LINEAR": linear, "MODEL_ADD": add, "MODEL_MULTIPLY": multiply, "MODEL_MEAN": mean,
    "MODEL_AVERAGE": average, "MODEL_MAX": largest, "MODEL_CLAMP": clamp, "MODEL_TABLE": table,
    "MODEL_CONSTANT": constant, "MODEL_COPY": copy,
}  # fmt: skip

if __name__ == "__main__":
    np.save(sys.argv[3], Model(sys.argv[1])(np.load(sys.argv[2])))
