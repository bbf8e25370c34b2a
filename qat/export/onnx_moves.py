"""Operations that move or select values in ONNX, on the integers themselves; constants; products of integers."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qat.export.onnx_functions import Emit, Steps, finish_steps, interpolate
from qat.export.onnx_model import Model, storage
from qat.export.onnx_pairs import held_constant
from qat.runtime.functions import windows
from qat.runtime.layers import RuntimeLayer
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.network import Node
from qat.runtime.operations import Constant, Move

LAST = np.iinfo(np.int64).max


def move(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """Write a Move. Integers of 16 bits, which few of the kernels take, are moved as float32, which holds them."""
    assert isinstance(layer, Move)
    settings = dict(layer.settings)
    name = settings.pop("name")
    grid = model.grid(node.inputs[0])
    wide = grid is not None and storage(grid)[0].itemsize > 1
    count = len(node.inputs) if name == "stack" else 2 if name == "where" else 1
    tensors = list(node.inputs)
    if wide:
        tensors[:count] = [model.cast(x, "FLOAT", f"{node.name}.in{i}") for i, x in enumerate(tensors[:count])]
    steps = Steps(model, node, settings | {"input": tensors[0], "tensors": tensors})
    if name in ("masked_fill", "max_unpool"):
        filling, dtype = model.number(node.inputs[0], settings["value"])
        steps.given["filling"] = steps.number(filling, np.float32 if wide else dtype)

    def emit(s: Steps) -> str:
        y = MOVES[name](s)
        if not wide:
            return y
        assert grid is not None
        return s("Cast", y, to=model.onnx.helper.np_dtype_to_tensor_dtype(storage(grid)[0]))

    finish_steps(model, node, layer, steps, emit)


def constant(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """A tensor of the file."""
    assert isinstance(layer, Constant)
    value: Any = layer.value
    if layer.output is not None and model.pairs:
        held_constant(model, node.name, layer.value, layer.output)
        return
    if layer.output is not None:
        dtype, offset = storage(layer.output)
        value = (value.int() + offset).numpy().astype(dtype)
    model.op("Identity", [model.constant(f"{node.name}.value", value)], node.name)


def integer_matmul(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """DequantizeLinear of both operands, then the product: what engines run in integers."""
    assert isinstance(layer, IntegerMatmul)
    sides = zip(("left", "right"), node.inputs, strict=True)
    operands = [model.real(x, f"{node.name}.{side}") for side, x in sides]
    model.finish(layer, node.name, lambda out: model.op("MatMul", operands, out))


def _layout(s: Steps, x: str | None = None) -> str:
    """The same values in order, in the shape of the result."""
    source, shape = s.model.symbolic[s.source], []
    result = s.model.symbolic[s.name]
    for i, size in enumerate(result):
        same = i < len(source) and source[i] is None and s.shape[i] == s.result[i]
        shape.append(size if size is not None else 0 if same else -1)
    return s.reshape(x or s.get("input"), shape)


def _transpose(s: Steps) -> str:
    perm = list(range(s.rank))
    a, b = s.get("dim0"), s.get("dim1")
    perm[a], perm[b] = perm[b], perm[a]
    return s("Transpose", s.get("input"), perm=perm)


def _movedim(s: Steps) -> str:
    moved = torch.empty(list(range(1, s.rank + 1)), device="meta").movedim(s.get("source"), s.get("destination"))
    return s("Transpose", s.get("input"), perm=[size - 1 for size in moved.shape])


def _repetition(s: Steps, unit: int) -> tuple[str, list[int]]:
    """The sizes of an expansion or repetition as a tensor; the batch size is read off the second input."""
    sizes = [unit if size in (-1,) else size for size in s.get("sizes")]
    if None not in sizes:
        return s.ints(*sizes), sizes
    batch = s("Shape", s.get("tensors")[1], start=0, end=1)
    return s("Concat", *(batch if n is None else s.ints(n) for n in sizes), axis=0), sizes


def _expand(s: Steps) -> str:
    return s("Expand", s.get("input"), _repetition(s, 1)[0])


def _repeat(s: Steps) -> str:
    repeats, sizes = _repetition(s, 1)
    x = s.get("input")
    if len(sizes) > s.rank:
        x = s("Unsqueeze", x, s.ints(*range(len(sizes) - s.rank)))
    return s("Tile", x, repeats)


def _take(s: Steps, x: str, axis: int, index: int) -> str:
    """One entry along an axis, which goes."""
    return s("Gather", x, s.number(index, np.int64), axis=axis)


def _flip(s: Steps) -> str:
    dims = s.get("dims")
    columns = ([-1] * len(dims), [-LAST] * len(dims), dims, [-1] * len(dims))
    return s("Slice", s.get("input"), *(s.ints(*column) for column in columns))


def _roll(s: Steps) -> str:
    x, shifts, dims = s.get("input"), s.get("shifts"), s.get("dims")
    pairs = zip(*((v if isinstance(v, list) else [v]) for v in (shifts, dims)), strict=True)
    for shift, dim in pairs:
        cut = -shift % s.shape[dim]
        x = s("Concat", s.slice(x, dim, cut, LAST), s.slice(x, dim, 0, cut), axis=dim)
    return x


def _index(s: Steps) -> str:
    """Slices first, then the axes that go (from the last on), then those that come."""
    parts, x = list(s.get("index")), s.get("input")
    if "..." not in parts:
        parts.append("...")
    at, taken = parts.index("..."), sum(part != "new" for part in parts) - 1
    parts[at : at + 1] = [[None, None, None]] * (s.rank - taken)
    new = [i for i, part in enumerate([p for p in parts if not isinstance(p, int)]) if part == "new"]
    axes = [part for part in parts if part != "new"]
    for axis, part in enumerate(axes):
        if isinstance(part, list) and part != [None, None, None]:
            x = s.slice(x, axis, part[0] or 0, LAST if part[1] is None else part[1], part[2] or 1)
    for axis in reversed([i for i, part in enumerate(axes) if isinstance(part, int)]):
        x = _take(s, x, axis, axes[axis])
    if new:
        x = s("Unsqueeze", x, s.ints(*new))
    return x if x != s.get("input") else s("Identity", x)


def _part(s: Steps) -> str:
    dim, size, index, x = s.get("dim"), s.get("size"), s.get("index"), s.get("input")
    total = s.shape[dim]
    if s.get("of") == "unbind":
        return _take(s, x, dim, index)
    if s.get("of") == "chunk":
        size = -(-total // size)
    sizes = size if isinstance(size, list) else [min(size, total - start) for start in range(0, total, size)]
    index %= len(sizes)
    start = sum(sizes[:index])
    return s.slice(x, dim, start, start + sizes[index])


def _extreme(kind: str) -> Emit:
    def emit(s: Steps) -> str:
        dims = s.get("dim")
        dims = dims if isinstance(dims, list) else [dims]
        return s(kind, s.get("input"), s.ints(*(dims or range(s.rank))), keepdims=int(s.get("keepdim")))

    return emit


def _pixel_shuffle(s: Steps) -> str:
    r, (channels, height, width) = s.get("upscale_factor"), s.shape[1:]
    x = s.reshape(s.get("input"), [0, channels // r**2, r, r, height, width])
    return s.reshape(s("Transpose", x, perm=[0, 1, 4, 2, 5, 3]), [0, *s.result[1:]])


def _pixel_unshuffle(s: Steps) -> str:
    r, (channels, height, width) = s.get("downscale_factor"), s.shape[1:]
    x = s.reshape(s.get("input"), [0, channels, height // r, r, width // r, r])
    return s.reshape(s("Transpose", x, perm=[0, 1, 3, 5, 2, 4]), [0, *s.result[1:]])


def _adaptive_max(s: Steps) -> str:
    """Equal windows are a max pooling; others are cut out one by one."""
    x, outputs, spatial = s.get("input"), s.result[2:], s.shape[2:]
    if all(n % m == 0 for n, m in zip(spatial, outputs, strict=True)):
        kernel = [n // m for n, m in zip(spatial, outputs, strict=True)]
        return s("MaxPool", x, kernel_shape=kernel, strides=kernel)
    for axis, (size, output) in enumerate(zip(spatial, outputs, strict=True), start=2):
        cuts = [s.slice(x, axis, start, stop) for start, stop in windows(size, output)]
        x = s("Concat", *(s("ReduceMax", cut, s.ints(axis), keepdims=1) for cut in cuts), axis=axis)
    return x


def _stack(s: Steps) -> str:
    dim = s.get("dim")
    parts: Sequence[str] = [s("Unsqueeze", x, s.ints(dim)) for x in s.get("tensors")]
    return s("Concat", *parts, axis=dim)


def _max_unpool(s: Steps) -> str:
    """Values scattered by their places: ONNX's own MaxUnpool takes floats, and counts places in the whole batch."""
    size, places = s.get("size"), s.get("tensors")[1]
    ahead = s.rank - len(size)
    kept = s("Shape", s.get("input"), start=0, end=ahead)
    empty = s("Expand", s.get("filling"), s("Concat", kept, s.ints(math.prod(size)), axis=0))
    flat = [s.reshape(x, [0] * ahead + [-1]) for x in (places, s.get("input"))]
    return s.reshape(s("ScatterElements", empty, *flat, axis=ahead), [0] * ahead + size)


MOVES: dict[str, Emit] = {
    "transpose": _transpose, "movedim": _movedim, "squeeze": _layout, "unsqueeze": _layout, "flatten": _layout,
    "unflatten": _layout, "expand": _expand, "repeat": _repeat,
    "select": lambda s: _take(s, s.get("input"), s.get("dim"), s.get("index")),
    "narrow": lambda s: s.slice(s.get("input"), s.get("dim"), s.get("start"), s.get("start") + s.get("length")),
    "flip": _flip, "roll": _roll, "index": _index, "part": _part, "amax": _extreme("ReduceMax"),
    "amin": _extreme("ReduceMin"), "pixel_shuffle": _pixel_shuffle, "pixel_unshuffle": _pixel_unshuffle,
    "adaptive_max_pool": _adaptive_max, "interpolate": interpolate, "stack": _stack,
    "max_unpool": _max_unpool,
    "masked_fill": lambda s: s("Where", s.get("tensors")[1], s.get("filling"), s.get("input")),
    "where": lambda s: s("Where", s.get("tensors")[2], *s.get("tensors")[:2]),
}  # fmt: skip
"""Name of a move -> what writes it."""
