"""Layers without floats -> steps of `model.h`: an operation of the runners, its parameters and its arrays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat.runtime import fixed
from qat.runtime import operations as ops
from qat.runtime.grid import Requantize
from qat.runtime.layers import RuntimeLayer

MOVES = {
    "transpose", "movedim", "squeeze", "unsqueeze", "flatten", "unflatten", "expand", "repeat", "select", "narrow",
    "flip", "index", "part", "stack", "take",
}  # fmt: skip


@dataclass
class Step:
    """One step.

    Attributes:
        kind: name of the operation, without `MODEL_`.
        makes, reads: numbers of tensors.
        parameters: integers, in the order in which the runners read them.
        weight, bias, multiplier, shift: arrays.
    """

    kind: str
    makes: int
    reads: list[int]
    parameters: list[int]
    weight: Tensor | None = None
    bias: Tensor | None = None
    multiplier: Tensor | None = None
    shift: Tensor | None = field(default=None)


Tensors = dict[str, Tensor]
Steps = Iterator[Step]


def refused(name: str, layer: RuntimeLayer, why: str = "") -> ValueError:
    """The error for a layer that the runners do not have."""
    kind = layer.settings["name"] if isinstance(layer, ops.Move) else type(layer).__name__
    why = (
        why
        or "the runners have convolutions of up to two dimensions, linear layers, sums and products of tensors, \
average and max pooling, means, tables, and what moves values"
    )
    return ValueError(f"c_header: '{name}' ({kind}): {why}; export it as int8, or take it out of the network")


def _grid(layer: RuntimeLayer) -> tuple[list[int], dict[str, Tensor]]:
    """(Zero point, smallest and largest integer; multiplier and shift) of the output."""
    grid = layer.output
    assert isinstance(grid, Requantize)
    zero = int(grid.zero_point)
    low = max(grid.quant_min, zero) if grid.relu else grid.quant_min
    return [zero, low, grid.quant_max], {"multiplier": grid.multiplier, "shift": grid.shift}


def _two(values: list[int], filling: int) -> list[int]:
    """Settings of one or two dimensions as those of two."""
    return [filling, *values] if len(values) == 1 else values


def _image(x: Tensor) -> list[int]:
    """Channels, height, width of one sample."""
    return [x.shape[1], *_two(list(x.shape[2:]), 1)]


def _conv(header: Any, name: str, layer: fixed.FixedConv, inputs: list[str], tensors: Tensors) -> Steps:
    x, y = tensors[inputs[0]], tensors[name]
    if layer.remainder is not None or layer.output_padding is not None or layer.weight.dim() > 4:
        what = "a transposed convolution" if layer.output_padding is not None else "three dimensions"
        raise refused(name, layer, what if layer.remainder is None else "a layer that is called on two scales")
    if bool(layer.weight_zero_point.any()):
        raise refused(name, layer, "a weight with a zero point; use quant.weight.symmetric=true")
    (zero, low, high), arrays = _grid(layer)
    source, out = header.ids[inputs[0]], header.tensor(name, y)
    head = [source, out, int(layer.input_zero_point), zero, low, high]
    if layer.weight.dim() == 2:
        outputs, features = layer.weight.shape
        parameters, kind = [*head, x.numel() // features, features, outputs], "LINEAR"
    else:
        before = [pair[0] for pair in layer.padding]
        parameters, kind = [
            *head, *_image(x), *_image(y), *_two(list(layer.weight.shape[2:]), 1), *_two(layer.stride, 1),
            *_two(before, 0), *_two(layer.dilation, 1), layer.groups,
        ], "CONV"  # fmt: skip
    yield Step(kind, out, [source], parameters, layer.weight, layer.bias, **arrays)


def strides_of(x: Tensor, dims: list[int]) -> list[int]:
    """Strides with which a tensor of one sample is read as one of the shape `dims`."""
    shape = [1] * (len(dims) - x.dim()) + list(x.shape)
    strides, step = list[int](), 1
    for size in reversed(shape):
        strides.insert(0, 0 if size == 1 else step)
        step *= size
    return strides


def _sum(header: Any, name: str, layer: fixed.FixedSum, inputs: list[str], tensors: Tensors) -> Steps:
    (zero, low, high), arrays = _grid(layer)
    reads, dims = [header.ids[i] for i in inputs], list(tensors[name].shape)
    if any(tensors[i].dtype != torch.int8 for i in inputs):
        raise refused(name, layer, "a tensor that nothing has put on an 8-bit grid")
    out = header.tensor(name, tensors[name])
    parameters = [out, zero, low, high, layer.left, len(dims), len(inputs), *dims]
    for i, (key, source) in enumerate(zip(inputs, reads, strict=True)):
        numbers = [int(t[i]) for t in (layer.multiplier, layer.shift)]
        parameters += [source, int(layer.zero_point[i]), layer.signs[i], *numbers, *strides_of(tensors[key], dims)]
    yield Step("ADD", out, reads, parameters, **arrays)


def _product(header: Any, name: str, layer: fixed.FixedProduct, inputs: list[str], tensors: Tensors) -> Steps:
    (zero, low, high), arrays = _grid(layer)
    reads, dims = [header.ids[i] for i in inputs], list(tensors[name].shape)
    if any(tensors[i].dtype != torch.int8 for i in inputs):
        raise refused(name, layer, "a tensor that nothing has put on an 8-bit grid")
    out = header.tensor(name, tensors[name])
    parameters = [out, zero, low, high, len(dims), *dims]
    for i, key in enumerate(inputs):
        parameters += [reads[i], int(layer.zero_point[i]), *strides_of(tensors[key], dims)]
    yield Step("MULTIPLY", out, reads, parameters, **arrays)


def _mean(header: Any, name: str, layer: fixed.FixedMean, inputs: list[str], tensors: Tensors) -> Steps:
    (zero, low, high), arrays = _grid(layer)
    x, source = tensors[inputs[0]], header.ids[inputs[0]]
    out = header.tensor(name, tensors[name])
    summed = sorted(d % x.dim() for d in layer.dims)
    kept, strides = [d for d in range(x.dim()) if d not in summed], strides_of(x, list(x.shape))
    parameters = [source, out, int(layer.zero_point), zero, low, high, len(kept), len(summed)]
    for dims in (kept, summed):
        parameters += [*(x.shape[d] for d in dims), *(strides[d] for d in dims)]
    yield Step("MEAN", out, [source], parameters, **arrays)


def _average(header: Any, name: str, layer: fixed.FixedAverage, inputs: list[str], tensors: Tensors) -> Steps:
    if len(layer.kernel) > 2:
        raise refused(name, layer)
    (zero, low, high), arrays = _grid(layer)
    source, out = header.ids[inputs[0]], header.tensor(name, tensors[name])
    parameters = [source, out, int(layer.zero_point), zero, low, high, *_image(tensors[inputs[0]]),
                  *_image(tensors[name])[1:], *_two(layer.kernel, 1), *_two(layer.stride, 1), *_two(layer.padding, 0),
                  int(layer.count_include_pad), layer.common or 0]  # fmt: skip
    yield Step("AVERAGE", out, [source], parameters, **arrays)


def _max_pool(header: Any, name: str, layer: ops.MaxPool, inputs: list[str], tensors: Tensors) -> Steps:
    s, x = layer.settings, tensors[inputs[0]]
    if len(s["kernel"]) > 2 or x.dtype != torch.int8:
        raise refused(name, layer)
    source, out = header.ids[inputs[0]], header.tensor(name, tensors[name])
    parameters = [source, out, *_image(x), *_image(tensors[name])[1:], *_two(s["kernel"], 1), *_two(s["stride"], 1),
                  *_two(s["padding"], 0), *_two(s["dilation"], 1)]  # fmt: skip
    yield Step("MAX", out, [source], parameters)


def _relu(header: Any, name: str, layer: ops.Relu, inputs: list[str], tensors: Tensors) -> Steps:
    source, out = header.ids[inputs[0]], header.tensor(name, tensors[name])
    yield Step("CLAMP", out, [source], [source, out, int(layer.settings["zero"])])


def _table(header: Any, name: str, layer: fixed.Table, inputs: list[str], tensors: Tensors) -> Steps:
    if inputs[0] not in header.ids or layer.table.dim() > 1:
        raise refused(name, layer, "rows that are looked up by an index")
    source, out = header.ids[inputs[0]], header.tensor(name, tensors[name])
    array = {"weight" if layer.table.dtype == torch.int8 else "bias": layer.table}
    yield Step("TABLE", out, [source], [source, out, layer.low], **array)


def _constant(header: Any, name: str, layer: ops.Constant, inputs: list[str], tensors: Tensors) -> Steps:
    out = header.tensor(name, tensors[name])
    yield Step("CONSTANT", out, [], [out], layer.value)


def _move(header: Any, name: str, layer: RuntimeLayer, inputs: list[str], tensors: Tensors) -> Steps:
    """A move is followed on the places of values: what is read from where, with which strides."""
    if isinstance(layer, ops.Move) and layer.settings["name"] not in MOVES:
        raise refused(name, layer)
    joins = isinstance(layer, ops.Concat) or (isinstance(layer, ops.Move) and layer.settings["name"] == "stack")
    moved, others = (inputs, []) if joins else (inputs[:1], inputs[1:])
    filling = int(layer.settings.get("value", 0)) if isinstance(layer, ops.Pad) else 0
    follower = type(layer)(**(layer.settings | {"value": -1})) if isinstance(layer, ops.Pad) else layer
    starts, maps, total = list[int](), list[Tensor](), 0
    for key in moved:
        n = tensors[key].numel()
        starts.append(total)
        maps.append(torch.arange(total, total + n).reshape(tensors[key].shape))
        total += n
    found: Tensor = follower(*maps, *(tensors[key] for key in others))
    if torch.equal(found.flatten(), torch.arange(total)) and len(moved) == 1:  # nothing moves in memory
        header.ids[name] = header.ids[moved[0]]
        return
    out, fills = header.tensor(name, tensors[name]), True
    for key, start, places in zip(moved, starts, maps, strict=True):
        box = _box((found >= start) & (found < start + places.numel()))
        part = found[box] - start
        strides, to_strides = _strides(part), strides_of(found, list(found.shape))
        if part.numel() == 0 or not torch.equal(part, _view(part, strides)):
            raise refused(name, layer, "it moves values in a way that is no copy with strides")
        to = sum(b.start * stride for b, stride in zip(box, to_strides, strict=True))
        source, dims = header.ids[key], list(part.shape)
        offset = int(part.flatten()[0])
        yield Step("COPY", out, [source],
                   [source, out, int(fills), filling, len(dims), offset, to, *dims, *strides, *to_strides])  # fmt: skip
        fills = False


def _box(inside: Tensor) -> tuple[slice, ...]:
    """The smallest box that holds everything that is true."""
    where = inside.nonzero()
    if not len(where):
        return tuple(slice(0, 0) for _ in inside.shape)
    return tuple(slice(int(a), int(b) + 1) for a, b in zip(where.amin(0), where.amax(0), strict=True))


def _strides(places: Tensor) -> list[int]:
    """The step of a map of places along each dimension."""
    if not places.numel():
        return [0] * places.dim()
    first = places.flatten()[0]
    ends = [places.select(d, 1).flatten()[0] if size > 1 else first for d, size in enumerate(places.shape)]
    return [int(end - first) for end in ends]


def _view(places: Tensor, strides: list[int]) -> Tensor:
    """The map of places that these strides make."""
    made = places.flatten()[:1].reshape([1] * places.dim())
    for d, (size, stride) in enumerate(zip(places.shape, strides, strict=True)):
        made = made + (torch.arange(size) * stride).reshape([-1 if i == d else 1 for i in range(places.dim())])
    return made


Maker = Callable[..., Steps]
STEPS: dict[type[RuntimeLayer], Maker] = {
    fixed.FixedConv: _conv, fixed.FixedSum: _sum, fixed.FixedProduct: _product, fixed.FixedMean: _mean,
    fixed.FixedAverage: _average, fixed.Table: _table, ops.MaxPool: _max_pool, ops.Relu: _relu,
    ops.Constant: _constant,
    **dict.fromkeys((ops.Reshape, ops.Permute, ops.Slice, ops.Pad, ops.Concat, ops.Move), _move),
}  # fmt: skip
"""Layer -> the steps that it becomes."""
