"""How far float32 rounding may move a network's outputs where its last layers are given equal integers.

The last layers end in real numbers, on no grid: there are no steps to count. What two implementations of them may
differ by is what sums in another order differ by, a share of the magnitude of their terms: `sum |w| |x| + |b|` for a
layer with weights. Where several layers compute in float before the output, the same is done to each of them, with
random signs, and what reaches the output is measured (Parker 1997, Monte Carlo arithmetic).
"""

from typing import Any

import torch
from torch import Tensor

from qat.export.given import Inputs, Integers
from qat.runtime import fixed
from qat.runtime import operations as ops
from qat.runtime.layers import FloatConv, IntegerConv, RuntimeLayer, convolve
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.network import IntegerNetwork, Node
from qat.runtime.outer import IntegerBilinear
from qat.runtime.recurrent import Recurrent
from qat.runtime.stored import Simulate, StoredConv

SHARE = 2.0**-20
"""What rounding may do to a sum, as a share of the magnitude of its terms: 16 roundings of float32 in a row. Terms are
rounded by 2 or 3 (scale times integer, on both sides); sums of thousands, which engines split, by a few more."""

TRIALS, NOISE = 8, 2.0**-12
MOVES = (ops.Reshape, ops.Permute, ops.Slice, ops.Concat, ops.Pad, ops.Move, ops.Relu, ops.MaxPool)
JUMPS = {"argmax", "argmin", "gt", "ge", "lt", "le", "eq", "ne", "logical_not"}
"""Functions that no small change of their inputs changes a little."""


@torch.no_grad()
def output_rounding(network: IntegerNetwork, inputs: Inputs, given: Integers) -> list[Tensor | str]:
    """How far rounding may move each value of each output, in the output's unit; or why that cannot be said.

    Args:
        network: its own layers are asked.
        inputs: of the network.
        given: name of a tensor -> integers, which its readers get.
    """
    known = dict(zip(network.inputs, inputs, strict=True)) | given
    tails = [_tail(network, name, set(known)) for name in network.outputs]
    whys = [_why_not(network, tail) for tail in tails]
    nodes = [n for n in network.nodes if any(n in tail for tail, why in zip(tails, whys, strict=True) if not why)]
    tensors, magnitudes = _run(network, nodes, known)
    inner = _read_by_computations(network, nodes)
    moved: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for trial in range(TRIALS if inner else 0):
        noise = {name: magnitudes[name] for name in inner}
        noisy, _ = _run(network, nodes, known, noise, generator, shared=trial % 2 == 1)
        for name in set(network.outputs) & magnitudes.keys():
            square = ((noisy[name] - tensors[name]) / NOISE).square()
            moved[name] = moved.get(name, 0) + square / TRIALS
    found: list[Tensor | str] = []
    for name, why in zip(network.outputs, whys, strict=True):
        if why or name not in magnitudes:
            found.append(why or "it holds no real numbers")
            continue
        beyond = moved[name].sqrt() if name in moved else torch.zeros_like(magnitudes[name])
        most = beyond.flatten(1).amax(1).reshape(-1, *[1] * (beyond.dim() - 1)) if beyond.dim() > 1 else beyond
        found.append(SHARE * (magnitudes[name] + most).nan_to_num(nan=0.0, posinf=0.0))
    return found


@torch.no_grad()
def rounding_steps(network: IntegerNetwork, inputs: Inputs, given: Integers, name: str) -> float:
    """How many steps float32's rounding may move integers of the tensor `name`, at most, given equal integers.

    Next to none, unless what is computed on the way cancels (the mean of what was normalized), or is divided by what
    hardly differs from nought: then engines that compute in another order make other integers of the same file.

    Args:
        network: its own layers are asked.
        inputs: of the network.
        given: name of a tensor -> integers, which its readers get.
        name: of a tensor on a grid, which a layer of its own puts there.
    """
    known = dict(zip(network.inputs, inputs, strict=True)) | {k: q for k, q in given.items() if k != name}
    nodes, grid = _tail(network, name, set(known)), network.layer(name).output
    assert grid is not None
    seen: list[Tensor] = []
    handle = grid.register_forward_pre_hook(lambda grid, values: seen.append(grid.steps(values[0])))
    try:
        _, magnitudes = _run(network, nodes, known)
        inner = [key for key in _read_by_computations(network, nodes) if key in magnitudes]
        noise = {key: magnitudes[key] * (SHARE / NOISE) for key in inner}
        generator = torch.Generator().manual_seed(0)
        for trial in range(TRIALS if inner else 0):
            _run(network, nodes, known, noise, generator, shared=trial % 2 == 1)
    finally:
        handle.remove()
    moved = [float((v - seen[0]).abs().nan_to_num(nan=0.0, posinf=0.0).max()) for v in seen[1:] if v.numel()]
    return max(moved, default=0.0)


def last_layers(network: IntegerNetwork, known: set[str]) -> list[str]:
    """Of each output, in words: the layers that compute it from tensors in `known` or from inputs."""
    found = []
    for output in network.outputs:
        nodes = [n.name for n in _tail(network, output, known) if not isinstance(network.layer(n.name), MOVES)]
        names = [n for n in nodes if not isinstance(network.layer(n), ops.Dequantize)] or nodes[-1:] or [output]
        found.append(", ".join(f"'{name}'" for name in names[-3:]))
    return found


def _tail(network: IntegerNetwork, output: str, known: set[str]) -> list[Node]:
    """The steps that make an output from tensors that are known, in order."""
    wanted, nodes = {output}, list[Node]()
    for node in reversed(network.nodes):
        if node.name in wanted and node.name not in known:
            nodes.insert(0, node)
            wanted |= set(node.inputs)
    return nodes


def _why_not(network: IntegerNetwork, tail: list[Node]) -> str:
    """Why rounding may move what comes out of a tail by more than can be said; empty if it does not."""
    for i, (name, layer) in enumerate((node.name, network.layer(node.name)) for node in tail):
        behind = [network.layer(node.name) for node in tail[i + 1 :]]
        if isinstance(layer, Simulate | Recurrent):
            return f"'{name}' rounds real numbers on the way to it, and may round one next to a tie the other way"
        if isinstance(layer, fixed.FixedSoftmax | fixed.FixedNorm):
            return f"'{name}' computes a function of real numbers in integers, which it does not round to float32's"
        if _rounds(layer) and not all(isinstance(step, (*MOVES, ops.Dequantize)) for step in behind):
            return f"'{name}' lies on a grid that training does not have, and is computed with"
        if isinstance(layer, ops.Function) and layer.name in JUMPS:
            return f"'{name}' ({layer.name}) decides on the way to it, and may decide otherwise at a tie"
    return ""


def _rounds(layer: RuntimeLayer) -> bool:
    return layer.output is not None and not isinstance(layer, ops.Constant)


def _read_by_computations(network: IntegerNetwork, nodes: list[Node]) -> list[str]:
    """The tensors that are computed, and that others are computed of."""
    computed = {n.name for n in nodes if not isinstance(network.layer(n.name), MOVES)}
    read = {name: n.inputs for n in nodes for name in [n.name]}
    waiting, found, seen = [name for key in computed for name in read[key]], set[str](), set[str]()
    while waiting:
        name = waiting.pop()
        if name in computed:
            found.add(name)
        elif name not in seen:
            waiting += read.get(name, ())
        seen.add(name)
    return [n.name for n in nodes if n.name in found]


def _run(
    network: IntegerNetwork, nodes: list[Node], known: Integers, noise: Integers | None = None,
    generator: torch.Generator | None = None, shared: bool = False,
) -> tuple[Integers, Integers]:  # fmt: skip
    """Every tensor, and the magnitude of each that is real.

    `noise` is the magnitude of what is added to tensors, with random signs: of each value, or `shared` by a channel, as
    the rounding of a bias or a mean is, which no average takes out.
    """
    tensors, magnitudes = dict(known), dict[str, Tensor]()
    for node in nodes:
        layer, read = network.layer(node.name), [tensors[name] for name in node.inputs]
        y = layer(*read)
        if noise is None and isinstance(y, Tensor) and (y.is_floating_point() or _rounds(layer)):
            carried = [magnitudes.get(name) for name in node.inputs]
            if isinstance(layer, ops.Relu | ops.Dequantize) and carried[0] is not None:
                size = carried[0]
            elif isinstance(layer, MOVES) and carried[0] is not None:
                size = layer(*(read[i] if size is None else size for i, size in enumerate(carried)))
            else:
                size = magnitude(layer, read, y)
            magnitudes[node.name] = size.abs().nan_to_num(nan=0.0, posinf=0.0)
        elif noise is not None and node.name in noise:
            shape = (*y.shape[:2], *[1] * (y.dim() - 2)) if shared else y.shape
            signs = 1 - 2 * torch.randint(0, 2, shape, generator=generator).to(y)
            y = y + NOISE * signs * noise[node.name]
        tensors[node.name] = y
    return tensors, magnitudes


def magnitude(layer: RuntimeLayer, inputs: list[Tensor], y: Tensor) -> Tensor:
    """The sum of the magnitudes of the terms that a layer adds up; where it adds none, the magnitude of its result.

    Of a layer that ends on a grid (of 31 bits, behind the last layer of a network without floats) a step counts, too.
    """
    if layer.output is not None:
        terms = layer.output.dequantize(y).abs()
        if isinstance(layer, IntegerConv):
            terms = terms.maximum(_conv_magnitude(layer, inputs))
        if isinstance(layer, fixed.FixedAffine):
            terms = terms.maximum(layer.output.dequantize(layer.magnitude(inputs[0])).abs())
        return terms + layer.output.scale / SHARE
    if isinstance(layer, IntegerConv):
        return _conv_magnitude(layer, inputs)
    if isinstance(layer, FloatConv):
        return _sums(layer, inputs[0].abs(), layer.float_weight(), layer.bias.abs())
    if isinstance(layer, StoredConv) and len(inputs) == 1 and inputs[0].is_floating_point():
        weight = layer.float_weight()
        gain = layer.gain.reshape(-1, *[1] * (weight.dim() - 1))
        return _sums(layer, inputs[0].abs(), weight * gain, layer.bias.abs())
    if isinstance(layer, IntegerMatmul):
        a, b = inputs[0].float() - layer.left_zero_point, inputs[1].float() - layer.right_zero_point
        return (a.abs() @ b.abs()) * (layer.left_scale * layer.right_scale)
    if isinstance(layer, ops.Affine):
        column = (-1, *[1] * (inputs[0].dim() - 2))
        return (inputs[0] * layer.factor.reshape(column)).abs() + layer.offset.abs().reshape(column)
    if isinstance(layer, ops.Function) and layer.name in ("sub", "rsub") and len(inputs) == 2:
        return inputs[0].abs() + inputs[1].abs() * max(1.0, abs(layer.settings.get("alpha", 1)))
    if isinstance(layer, ops.Add | ops.Mean | ops.Average) or (isinstance(layer, ops.Function) and layer.name in SUMS):
        return torch.maximum(y.abs(), layer(*(x.abs() for x in inputs)))
    if isinstance(layer, ops.Function) and layer.name in CENTRED:
        return y.abs() + _taken_off(layer, inputs[0])
    return y


CENTRED = {"layer_norm": -1, "group_norm": 1, "instance_norm": 1}
"""Functions that take the mean off what they read -> the dimension of their weight."""


def _taken_off(layer: ops.Function, x: Tensor) -> Tensor:
    """The means that a norm takes off, in the unit of its result: of values far from 0 they leave little."""
    s = layer.settings
    lead = {"layer_norm": x.shape[: x.dim() - len(s.get("normalized_shape", ()))],
            "group_norm": (x.shape[0], s.get("num_groups", 1)), "instance_norm": x.shape[:2]}[layer.name]  # fmt: skip
    rows = x.reshape(*lead, -1)
    deviation = (rows.var(-1, correction=0, keepdim=True) + s.get("eps", 1e-5)).sqrt()
    taken = (rows.mean(-1, keepdim=True).abs() / deviation).expand_as(rows).reshape(x.shape)
    if "weight" not in layer.constants:
        return taken
    weight = layer.constant("weight").abs()
    return taken * (weight if CENTRED[layer.name] < 0 else weight.reshape(-1, *[1] * (x.dim() - 2)))


def _conv_magnitude(layer: IntegerConv, inputs: list[Tensor]) -> Tensor:
    x_q = layer.multiplied(*inputs) if isinstance(layer, IntegerBilinear) else inputs[0]
    column = (-1, *[1] * (layer.weight.dim() - 1))
    unit = layer.input_scale * layer.weight_scale
    weight = (layer.weight.float() - layer.weight_zero_point.reshape(column)) * unit.reshape(column)
    # kernels on integers from 0 on take what their zero point adds to a sum off again, as a float32
    zero = (int(layer.input_zero_point) - layer.input_bounds[0]) * weight.flatten(1).sum(1)
    bias = layer.bias.float().abs() * unit + 2 * zero.abs()
    if layer.remainder is not None:
        bias = bias + layer.remainder.abs() * (unit / 2**layer.fraction if isinstance(layer, fixed.FixedConv) else 1)
    return _sums(layer, (x_q.float() - layer.input_zero_point).abs(), weight, bias)


SUMS = {"add", "matmul", "einsum", "sum", "adaptive_avg_pool"}
"""Functions that add terms up."""


def _sums(layer: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.output_padding)
    return convolve(x, weight.abs(), bias, *geometry)
