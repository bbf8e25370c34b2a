"""Recurrent layers of a prepared network -> those of the runtime, numbers copied."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from qat import lower_calls
from qat.cells import Form
from qat.layers import SWAPS, QuantizedRecurrent
from qat.lower_layers import grid_of, integer_layer, real_layer
from qat.lowering import Lowering
from qat.results import is_padded
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv
from qat.runtime.recurrent import Recurrent, RuntimeCell, Take
from qat.runtime.stored import Simulate
from qat.sizes import Sizes
from qat.translate import unsupported


def recurrent_layer(layer: nn.Module, grid: Quantize | None) -> Recurrent:
    """The runtime's layer for a quantized recurrent layer, or a float one.

    Args:
        layer: LSTM, GRU, RNN, or a cell of them.
        grid: of its input; None for real numbers.
    """
    one_step = isinstance(layer, nn.RNNCellBase)
    if not isinstance(layer, QuantizedRecurrent):
        form, cells = _float_cells(layer)
        return Recurrent.of(form, cells, one_step, None)
    form = layer.form
    cells = [_cell(layer, i, grid) for i in range(form.layers * form.directions)]
    hidden = layer.quantizer("hidden", form.layers * form.directions - 1)
    return Recurrent.of(form, cells, one_step, grid_of(hidden) if hidden is not None and hidden.integer else None)


def reads_integers(layer: nn.Module, grid: Quantize | None) -> bool:
    """Whether the layer multiplies its input, on `grid`, as integers."""
    if grid is None or not isinstance(layer, QuantizedRecurrent):
        return False
    directions = range(layer.form.directions)
    return all(layer.weights_of_cell(i)[0].weight_quantizer.integer for i in directions)


def _cell(layer: QuantizedRecurrent, i: int, grid: Quantize | None) -> RuntimeCell:
    parts: dict[str, nn.Module] = {}
    names = ("read", "recall", "project")
    for name, weight, sources in zip(names, layer.weights_of_cell(i), layer.inputs_of_cell(i), strict=False):
        read = name == "read" and i < layer.form.directions
        own = next((s for s in sources if s is not None and s.integer), None)
        x = grid if read else None if own is None else grid_of(own)
        if x is not None and weight.weight_quantizer.integer:
            parts[name] = integer_layer(weight, None, [x], {})
            if name == "read" and not read:
                parts["below"] = x
        else:
            parts[name] = real_layer(weight, None, {})
    for name in ("gates", "candidate", "cell", "activated", "unprojected", "hidden"):
        quantizer = layer.quantizer(name, i)
        if quantizer is not None:
            parts[name] = grid_of(quantizer) if quantizer.integer else Simulate.of(quantizer)
    return RuntimeCell(parts)


def _float_cells(layer: nn.Module) -> tuple[Form, list[RuntimeCell]]:
    """A layer that stays float, cell by cell: its quantized type knows which weights are whose."""
    twin: Any = SWAPS[type(layer)].__new__(SWAPS[type(layer)])
    twin.__dict__ = dict(layer.__dict__)
    form: Form = twin.form
    cells = []
    for i in range(form.layers * form.directions):
        parts: dict[str, nn.Module] = {}
        for name, key in zip(("read", "recall", "project"), twin.weight_names(i), strict=False):
            weight: Tensor = getattr(layer, key)
            bias: Tensor | None = getattr(layer, key.replace("weight", "bias"), None)
            parts[name] = _float_product(weight, bias if name != "project" else None)
        cells.append(RuntimeCell(parts))
    return form, cells


def _float_product(weight: Tensor, bias: Tensor | None) -> FloatConv:
    step = FloatConv(list(weight.shape))
    step.weight.copy_(weight.detach())
    if bias is not None:
        step.bias.copy_(bias.detach())
    return step


def call(lowering: Lowering, node: fx.Node) -> None:
    """Append a call of a recurrent layer."""
    layer, source = lowering.graph.submodule(node), lowering.graph.operands(node)[0]
    assert layer is not None
    grid = lowering.grids[lowering.made[source]]
    x = lowering.made[source] if reads_integers(layer, grid) else lowering.to_real(source)
    step = recurrent_layer(layer, grid)
    name = lowering.add(str(node.target), step, [x, *_initial_states(lowering, node, len(step.form.sizes))])
    lowering.grids[name] = None  # of several tensors
    lowering.results[node] = name
    if isinstance(layer, nn.GRUCell | nn.RNNCell):
        lowering.made[node] = _take(lowering, node, ())


def result(lowering: Lowering, node: fx.Node) -> None:
    """Append what takes a tensor out of what a recurrent layer returns."""
    found = lowering.graph.result(node)
    assert found is not None
    both = isinstance(lowering.graph.submodule(found[0]), nn.LSTM) and found[1] == (1,)
    if node.users and not both:
        lowering.made[node] = _take(lowering, *found)


def padded(lowering: Lowering, node: fx.Node) -> None:
    """Append what pads a packed sequence of real numbers, or takes its lengths."""
    source = node.all_input_nodes[0]
    if not is_padded(node):  # the pair of both
        lowering.made[node] = lowering.made[source]
    elif node.users:
        step, _ = lower_calls.move(lowering.graph, lowering.sizes, node, 0)
        x = lowering.made[source] if node.args[1] == 1 else lowering.to_real(source)
        lowering.add(lowering.graph.name(node), step, [x], node)


def _initial_states(lowering: Lowering, node: fx.Node, count: int) -> list[str]:
    """Names of the states that a recurrent layer starts from; none for zeros."""
    given: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("hx")
    if given is None:
        return []
    found = lowering.graph.result(given) if isinstance(given, fx.Node) else None
    if count > 1 and found is not None:  # both at once, as another layer returned them
        return [lowering.dequantized(_take(lowering, found[0], (*found[1], i))) for i in range(count)]
    if count > 1 and isinstance(given, fx.Node):
        raise unsupported(lowering.graph, node, f"its states are one value ({given}); give a pair of tensors")
    states = list(given) if isinstance(given, list | tuple) else [given]
    if all(lowering.graph.is_size(s) and _all_zero(lowering.sizes, s) for s in states):
        return []
    return [lowering.to_real(state) for state in states]


def _all_zero(sizes: Sizes, node: fx.Node) -> bool:
    return not any(torch.as_tensor(run[node]).any() for run in sizes.runs)


def _take(lowering: Lowering, call: fx.Node, path: tuple[int, ...]) -> str:
    """Name of a part of what a recurrent layer returns, made once."""
    layer = lowering.graph.submodule(call)
    assert layer is not None
    part, cell = _part_of(layer, path)
    if (call, part, cell) not in lowering.taken:
        quantizer = layer.grid(path) if isinstance(layer, QuantizedRecurrent) else None
        grid = grid_of(quantizer) if quantizer is not None and quantizer.integer else None
        name = f"{call.target}.{('output', 'hidden', 'cell')[part]}{'' if cell is None else f'_{cell}'}"
        lowering.taken[call, part, cell] = lowering.add(name, Take(part, cell, grid), [lowering.results[call]])
    return lowering.taken[call, part, cell]


def _part_of(layer: nn.Module, path: tuple[int, ...]) -> tuple[int, int | None]:
    """(Part of the runtime layer's result, cell or None) for a path into what torch's layer returns."""
    if isinstance(layer, nn.RNNCellBase):
        return 1 + (path[0] if path else 0), None
    if path[0] == 0:
        return 0, None
    rest = path[1:] if isinstance(layer, nn.LSTM) else (0, *path[1:])
    return 1 + rest[0], rest[1] if len(rest) > 1 else None
