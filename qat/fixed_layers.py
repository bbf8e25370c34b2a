"""Layers that scale in float -> layers of integers (`qat.runtime.fixed`), with the unit that their sums count."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qat.numerics.fixed_point import multiplier_and_shift
from qat.runtime import fixed
from qat.runtime import operations as ops
from qat.runtime.grid import Quantize
from qat.runtime.layers import IntegerConv, RuntimeLayer

LARGEST_TABLE = 2**16
"""Entries that a table of a function may have: grids of up to 16 bits."""

ADVICE = {
    "other": "it has no integer form; take it out of the network, or use target=generic, which keeps it in float",
    "wide": "its input is on no grid of up to 16 bits; give it a quantizer (quant.activation.bits), so that it becomes "
            "a table",
    "Constant": "a tensor of real numbers that nothing quantizes; use it in an operation of two tensors, or "
                "target=generic",
    "FloatConv": "its weight or its input is not quantized to integers with one scale a tensor or output channel; give "
                 "both weight and activation bits there (a rule with bits=null or group scales keeps a layer in float)",
    "Simulate": "an activation with a dynamic range, scales per channel or a float format; use range=running or "
                "learned, granularity=tensor, format=int",
    "Recurrent": "recurrent layers compute their gates in float; use target=generic",
    "mask": "a mask of real numbers; give a boolean one, or one of zeros and minus infinity that the network holds",
    "input": "it reaches an operation without a quantizer; set quant.input.bits",
}  # fmt: skip
ADVICE |= dict.fromkeys(("TableConv", "ProductConv"), ADVICE["FloatConv"]) | {"Take": ADVICE["Recurrent"]}


@dataclass(frozen=True)
class Total:
    """What a sum of integers counts.

    Attributes:
        unit: real number for 1, float64, broadcast against the sum.
        largest: of the sum's magnitude, float64, broadcast against it.
    """

    unit: Tensor
    largest: Tensor

    def times(self, factor: float) -> "Total":
        """The same integers, standing for `factor` times as much."""
        return dataclasses.replace(self, unit=self.unit * factor)


Made = tuple[RuntimeLayer, Total]


def signed(grid: Quantize) -> Quantize:
    """The same real numbers as integers around 0: [0, 255] becomes [-128, 127], and int8 holds it."""
    offset = 2 ** (grid.quant_max.bit_length() - 1) if grid.quant_min >= 0 < grid.quant_max else 0
    low, high = grid.quant_min - offset, grid.quant_max - offset
    return Quantize(low, high, grid.relu, float(grid.scale), int(grid.zero_point) - offset, grid.rounding)


def fine(largest: float) -> Quantize:
    """A grid of 31 bits for values up to `largest`: what nothing quantizes in training, in integers."""
    return Quantize(-(2**31), 2**31 - 1, scale=max(largest, 2.0**-90) / 2**30)


def width(grid: Quantize) -> float:
    """The largest distance of an integer from the zero point."""
    zero = int(grid.zero_point)
    return float(max(grid.quant_max - zero, zero - grid.quant_min))


def number(layer: RuntimeLayer) -> float | None:
    """The number by which a layer multiplies its one tensor; None for any other layer."""
    if not isinstance(layer, ops.Function) or len(layer.inputs) != 1 or layer.constants:
        return None
    others = [v for k, v in layer.settings.items() if k in ("input", "other")]
    if len(others) != 1 or not isinstance(others[0], int | float):
        return None
    if layer.name == "mul":
        return float(others[0])
    return 1 / others[0] if layer.name == "div" and layer.inputs == ["input"] and others[0] else None


def scalars(layer: RuntimeLayer) -> bool:
    """Whether every tensor of the layer is one number."""
    return not isinstance(layer, ops.Function) or all(math.prod(shape) == 1 for shape in layer.constants.values())


def _total(unit: float | Tensor, largest: float | Tensor) -> Total:
    return Total(torch.as_tensor(unit, dtype=torch.float64), torch.as_tensor(largest, dtype=torch.float64))


def conv(layer: IntegerConv, grid: Quantize) -> Made:
    """A convolution or linear layer, its weight as int8."""
    low, high = layer.weight_bounds
    offset = 128 if high > 127 else 0
    settings = layer.spec() | {"output": None, "weight_bounds": [low - offset, high - offset],
                               "input_bounds": [grid.quant_min, grid.quant_max]}  # fmt: skip
    if offset == 0 and low >= 0:
        settings["weight_bounds"] = [-1 if low == 0 else low, high]  # int8, not uint8
    step = fixed.FixedConv(fixed.FRACTION, **settings)
    step.weight.copy_(layer.weight.int() - offset)
    step.weight_scale.copy_(layer.weight_scale)
    step.weight_zero_point.copy_(layer.weight_zero_point - offset)
    step.bias.copy_(layer.bias)
    step.input_scale.copy_(layer.input_scale)
    step.input_zero_point.copy_(grid.zero_point)
    unit = layer.input_scale.double() * layer.weight_scale.double()
    rows = layer.weight.flatten(1).double() - layer.weight_zero_point.double().unsqueeze(1)
    largest = rows.abs().sum(1) * width(grid) + layer.bias.double().abs()
    if layer.remainder is not None:
        assert step.remainder is not None
        step.remainder.copy_(torch.round(layer.remainder.double() / unit * 2**step.fraction))
        unit, largest = unit / 2**step.fraction, largest * 2**step.fraction
    shape = (-1, *[1] * (layer.weight.dim() - 2)) if layer.weight.dim() > 2 else (-1,)
    return step, _total(unit.reshape(shape), largest.reshape(shape))


def matmul(left: Quantize, right: Quantize, products: int) -> Made:
    """A product of two tensors, with so many products a sum."""
    step = fixed.FixedMatmul.of(left, right, None)
    unit = left.scale.double() * right.scale.double()
    return step, _total(unit, products * width(left) * width(right))


def addition(layer: RuntimeLayer, grids: list[Quantize]) -> Made:
    """Sum (difference) of two tensors; `alpha` is part of the second one's scale."""
    subtracts = isinstance(layer, ops.Function) and layer.name == "sub"
    alpha = layer.settings.get("alpha", 1) if isinstance(layer, ops.Function) else 1
    signs = [1, (-1 if subtracts else 1) * (1 if alpha >= 0 else -1)]
    return _sum(grids, [1.0, abs(alpha)], signs)


def rescaling(grid: Quantize) -> Made:
    """Another grid for the same tensor."""
    return _sum([grid], [1.0], [1])


def _sum(grids: list[Quantize], factors: list[float], signs: list[int]) -> Made:
    bits = max(g.quant_max - g.quant_min for g in grids).bit_length()
    step = fixed.FixedSum(signs, left=20 if bits <= 8 else 15)
    scales = torch.stack([g.scale.double() for g in grids]) * torch.tensor(factors, dtype=torch.float64)
    common = 2 * scales.max()  # so that no term outgrows an int32
    multiplier, shift = multiplier_and_shift(scales / common)
    step.multiplier.copy_(multiplier)
    step.shift.copy_(shift)
    step.zero_point.copy_(torch.stack([g.zero_point for g in grids]))
    unit = common / 2**step.left
    return step, _total(unit, sum(width(g) * float(s) for g, s in zip(grids, scales, strict=True)) / float(unit))


def product(a: Quantize, b: Quantize) -> Made:
    """Product of two tensors, value by value."""
    step = fixed.FixedProduct()
    step.zero_point.copy_(torch.stack([a.zero_point, b.zero_point]))
    return step, _total(a.scale.double() * b.scale.double(), width(a) * width(b))


def _average(layer: Any, grid: Quantize, shape: list[int]) -> Made:
    s = dict(layer.settings)
    size = math.prod(s["kernel"])
    uneven = s["ceil_mode"] or (any(s["padding"]) and not s["count_include_pad"])
    common = math.prod(math.lcm(*range(1, k + 1)) for k in s["kernel"]) if uneven else None
    if common is not None and common > 2**20:
        raise ValueError(f"windows of different sizes up to {s['kernel']} have no small common multiple; use "
                         f"count_include_pad=True and ceil_mode=False")  # fmt: skip
    step = fixed.FixedAverage(**s, common=common)
    step.zero_point.copy_(grid.zero_point)
    return step, _total(grid.scale.double() / (common or size), width(grid) * (common or size))


def _adaptive(layer: Any, grid: Quantize, shape: list[int]) -> Made:
    """Windows of one size: the input's, divided by the output's."""
    wanted = layer.settings["output_size"]
    sizes = shape[-len(wanted) :]
    if any(size % (n or size) for size, n in zip(sizes, wanted, strict=True)):
        raise ValueError(
            f"windows of different sizes: {sizes} values become {wanted}; give an output size that divides"
        )
    kernel = [size // (n or size) for size, n in zip(sizes, wanted, strict=True)]
    pooling = ops.Average(
        kernel=kernel, stride=kernel, padding=[0] * len(kernel), ceil_mode=False, count_include_pad=True
    )  # fmt: skip
    return _average(pooling, grid, shape)


def _mean(layer: Any, grid: Quantize, shape: list[int]) -> Made:
    adds = isinstance(layer, ops.Function)
    dims = layer.settings["dim"] if adds else layer.settings["dims"]
    dims = [dims] if isinstance(dims, int) else list(dims)
    count = math.prod(shape[d] for d in dims)
    step = fixed.FixedMean(dims, bool(layer.settings.get("keepdim", False)), None if adds else count)
    step.zero_point.copy_(grid.zero_point)
    return step, _total(grid.scale.double() / (1 if adds else count), width(grid) * count)


def _affine(layer: Any, grid: Quantize, shape: list[int]) -> Made:
    """Factors of 20 bits; fewer where an offset is so far away that the sum would have no room."""
    factor, offset = layer.factor.double(), layer.offset.double()
    step = fixed.FixedAffine(factor.numel())
    scale = grid.scale.double()
    bits = 20 - math.ceil(math.log2(max(float(factor.abs().max()), 2.0**-60)))
    bits = min(bits, 40 - math.ceil(math.log2(max(float((offset.abs() / scale).max()), 2.0**-60))))
    step.factor.copy_(torch.round(factor * 2.0**bits))
    step.offset.copy_(torch.round(offset / scale * 2.0**bits))
    step.zero_point.copy_(grid.zero_point)
    largest = step.factor.abs().double() * width(grid) + step.offset.abs().double()
    return step, _total(scale * 2.0**-bits, largest.max())


def _softmax(layer: Any, grid: Quantize, shape: list[int]) -> Made:
    entries = grid.quant_max - grid.quant_min + 1
    if entries > LARGEST_TABLE:
        raise ValueError(ADVICE["wide"])
    step = fixed.FixedSoftmax(layer.settings["dim"], entries)
    distance = grid.scale.double() * torch.arange(entries, dtype=torch.float64, device=grid.scale.device)
    step.powers.copy_(torch.round(torch.exp(-distance) * 2**30))
    return step, _total(2.0**-fixed.FixedSoftmax.BITS, 2.0**fixed.FixedSoftmax.BITS)


def _norm(layer: Any, grid: Quantize, shape: list[int]) -> Made:
    """Factor and offset have 20 bits behind the point, the root as many as an int64 has room for."""
    settings, name, device = layer.settings, layer.name, grid.scale.device
    groups = None
    if name in ("group_norm", "instance_norm"):
        groups = settings["num_groups"] if name == "group_norm" else shape[1]
    if name == "instance_norm" and not settings.get("use_input_stats", True):
        raise ValueError("an instance_norm with running statistics; use BatchNorm, which becomes part of a layer")
    inside = [shape[1]] if groups else list(settings["normalized_shape"])
    n = math.prod(shape[1:]) // groups if groups else math.prod(inside)
    scale, eps = float(grid.scale), settings.get("eps")
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    centred, variance = name != "rms_norm", n * n * eps / scale**2
    largest = (n * width(grid) * (2 if centred else 1)) ** 2 + variance
    left = (61 - math.ceil(math.log2(largest))) // 2
    left = min(left, 61 - fixed.FixedNorm.BITS - math.ceil(math.log2(largest) / 2))
    if left < 0:
        raise ValueError(f"{n} values of {grid.quant_max - grid.quant_min + 1} levels: their variance outgrows 64 bits")
    step = fixed.FixedNorm(groups, inside, centred, left)
    for key, default in (("weight", 1.0), ("bias", 0.0)):
        given = layer.constant(key).double() if key in layer.constants else None
        value = torch.full(inside, default, dtype=torch.float64, device=device) if given is None else given
        bits, buffer = (20, step.factor) if key == "weight" else (20 + fixed.FixedNorm.BITS, step.offset)
        buffer.copy_(torch.round(value.reshape(inside) * 2.0**bits))
    step.epsilon.copy_(torch.tensor(round(variance * 4**left)))
    step.zero_point.copy_(grid.zero_point)
    bound = math.sqrt(n) * step.factor.abs().max().double() + step.offset.abs().max().double() / 2**fixed.FixedNorm.BITS
    return step, _total(2.0**-20, bound)


OF_ONE: dict[str, Callable[[Any, Quantize, list[int]], Made]] = {
    "Average": _average, "adaptive_avg_pool": _adaptive, "Mean": _mean, "sum": _mean, "Affine": _affine,
    "softmax": _softmax,
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm"), _norm),
}  # fmt: skip
"""Operations of one tensor that are no function value by value: name -> layer for a grid and a shape."""
