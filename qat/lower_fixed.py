"""Integer network -> one without any float between input and output: what targets with `requantize=fixed_point` run.

`lower` makes a network whose layers scale their integer sums in float. Here every such scale becomes a multiplier and a
shift, every function of one tensor a table, softmax and norms integer arithmetic; grids are moved to signed integers
(int8), in which nothing but the zero points changes. What is left over is refused by name.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat import fixed_layers as make
from qat.fixed_layers import Total, signed
from qat.function_inputs import MASKS
from qat.kinds import POINTWISE
from qat.refusals import Refusals
from qat.runtime import fixed
from qat.runtime import operations as ops
from qat.runtime.functions import nearest_places
from qat.runtime.grid import Quantize, Requantize
from qat.runtime.layers import IntegerConv, RuntimeLayer
from qat.runtime.lookup import LookUp
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.network import IntegerNetwork, Node
from qat.runtime.outer import IntegerBilinear

MOVES = (
    ops.Relu | ops.MaxPool | ops.Reshape | ops.Permute | ops.Slice | ops.Pad | ops.Concat | ops.Move
)  # fmt: skip


@dataclass(frozen=True)
class Real:
    """Real numbers that are a function of the integers `source`, value by value."""

    source: str
    compute: Callable[[Tensor], Tensor] | None = None  # of the dequantized integers; None for these themselves


@dataclass(frozen=True)
class Sums:
    """What a layer sums up, before it is put on a grid."""

    layer: RuntimeLayer
    inputs: list[str]
    total: Total
    relu: bool = False


@torch.no_grad()
def fixed_point(network: IntegerNetwork, inputs: Sequence[Any], target: str) -> IntegerNetwork:
    """The network in which no tensor between input and output is a float.

    Args:
        network: from lowering; its layers scale in float.
        inputs: an example: a mean divides by the number of values that it has there.
        target: its name, for messages.

    Raises:
        ValueError: layers that have no form without floats; names each and what to write instead.
    """
    tensors = network.run(*network.flat(inputs, {}))
    shapes = {name: list(t.shape) for name, t in tensors.items() if isinstance(t, Tensor)}
    return _Conversion(network, target, shapes).run()


@dataclass
class _Conversion:
    network: IntegerNetwork
    target: str
    shapes: dict[str, list[int]]
    nodes: list[Node] = field(default_factory=list)
    layers: dict[str, RuntimeLayer] = field(default_factory=dict)
    grids: dict[str, Quantize] = field(default_factory=dict)  # integer tensor -> its grid
    values: dict[str, Real | Sums] = field(default_factory=dict)  # tensor of real numbers -> what it is
    plain: set[str] = field(default_factory=set)  # inputs, masks, indices
    held: dict[str, Tensor] = field(default_factory=dict)  # numbers of the network that nothing has quantized
    masks: dict[str, tuple[str, list[str]]] = field(default_factory=dict)  # masked scores -> what hides them, how

    def run(self) -> IntegerNetwork:
        old = self.network
        self.plain |= set(old.inputs)
        self.readers = Counter(name for node in old.nodes for name in node.inputs) + Counter(old.outputs)
        refusals, lost = Refusals(), set[str]()  # what a refused layer would have made
        for node in old.nodes:
            layer, known = old.layer(node.name), len(refusals.messages)
            if not lost.intersection(node.inputs):
                with refusals.noted():
                    self._convert(node, layer)
            if lost.intersection(node.inputs) or len(refusals.messages) > known:
                if layer.output is None:
                    lost.add(node.name)
                else:  # what reads it is looked at, too
                    self.grids[node.name] = signed(layer.output)
        outputs = list[str]()
        for name in old.outputs:
            with refusals.noted():
                outputs += [] if name in lost else [self._output(name)]
        refusals.raise_any()
        new = IntegerNetwork(old.inputs, self.nodes, self.layers, outputs, old.info, old.signature)
        new.edges = {name: node for name, node in old.edges.items() if name in self.grids}
        return new.eval()

    def _convert(self, node: Node, layer: RuntimeLayer) -> None:
        name, inputs, output = node.name, list(node.inputs), layer.output
        if isinstance(layer, ops.Move):
            layer = _without_floats(layer, self.shapes[inputs[0]])
        if inputs and all(i in self.held for i in inputs):
            self._hold(name, layer(*(self.held[i] for i in inputs)), output)
        elif isinstance(layer, ops.Dequantize):
            self.values[name] = Real(inputs[0])
        elif isinstance(layer, ops.Constant):
            self._hold(name, layer.value, output)
        elif isinstance(layer, ops.QuantizeInput) and inputs[0] in self.plain:
            assert output is not None
            self._add(name, ops.QuantizeInput(signed(output)), inputs)
        elif isinstance(layer, ops.QuantizeInput):
            self._put(name, inputs[0], output)
        elif isinstance(layer, IntegerConv) and not isinstance(layer, IntegerBilinear):
            step, total = make.conv(layer, self.grids[inputs[0]])
            self._emit(name, Sums(step, inputs, total), output)
        elif isinstance(layer, IntegerMatmul):
            grids = [self.grids[i] for i in inputs]
            step, total = make.matmul(grids[0], grids[1], self.shapes[inputs[0]][-1])
            self._emit(name, Sums(step, inputs, total), output)
        elif isinstance(layer, LookUp) and layer.pooling is None:
            rows = layer.rows(torch.arange(layer.weight.shape[0], device=layer.weight.device))
            self._table(name, rows, 0, inputs[0], output)
        elif isinstance(layer, MOVES) and all(i in self.grids or i in self.plain for i in inputs):
            grid = self.network.grid(inputs[0])
            self._move(name, layer, inputs, 0 if grid is None else int(grid.zero_point))
        else:
            self._operation(node, layer)

    def _operation(self, node: Node, layer: RuntimeLayer) -> None:
        """An operation on real numbers."""
        name, inputs, output = node.name, list(node.inputs), layer.output
        kind = layer.name if isinstance(layer, ops.Function) else type(layer).__name__
        found = [self.values.get(i) for i in inputs]
        sums = found[0] if isinstance(found[0], Sums) and self.readers[inputs[0]] == 1 else None
        factor = make.number(layer)
        if sums is not None and kind == "Relu":
            self._emit(name, Sums(sums.layer, sums.inputs, sums.total, relu=True), output)
        elif sums is not None and factor is not None and factor > 0:
            self._emit(name, Sums(sums.layer, sums.inputs, sums.total.times(factor), sums.relu), output)
        elif kind in (*POINTWISE, "Relu", "Add") and make.scalars(layer) and self._one_source(inputs):
            self._pointwise(name, layer, inputs, output)
        elif kind in ("Add", "add", "sub") and len(inputs) == 2:
            names = [self._integers(i) for i in inputs]
            step, total = make.addition(layer, [self.grids[i] for i in names])
            self._emit(name, Sums(step, names, total), output)
        elif kind == "mul" and len(inputs) == 2:
            names = [self._integers(i) for i in inputs]
            step, total = make.product(*(self.grids[i] for i in names))
            self._emit(name, Sums(step, names, total), output)
        elif kind in MASKS and len(inputs) <= 2 and inputs[0] not in self.masks:
            self._mask(name, layer, kind, inputs)
        elif kind in make.OF_ONE and len(inputs) == 1:
            source = self._integers(inputs[0])
            try:
                step, total = make.OF_ONE[kind](layer, self.grids[source], self.shapes[inputs[0]])
            except ValueError as error:
                raise self._refused(name, layer, str(error)) from None
            hidden, mask = self.masks.get(inputs[0], (None, []))
            if hidden is not None:
                if not isinstance(step, fixed.FixedSoftmax):
                    raise self._refused(name, layer, "its input is masked with minus infinity")
                step.masked = hidden
            self._emit(name, Sums(step, [source, *mask], total), output)
        elif kind in ("argmax", "argmin", "max_places"):
            self._add(name, layer, [self._integers(inputs[0])])
        elif isinstance(layer, MOVES):
            value, joined = self.values.get(inputs[0]), [i for i in inputs if i not in self.plain]
            if len(joined) > 1:
                value, inputs = None, [*self._on_one_grid(joined), *inputs[len(joined) :]]
            source = value.source if isinstance(value, Real) else self._integers(inputs[0])
            compute = value.compute if isinstance(value, Real) else None
            moved = f"{name}.integers" if compute is None else f"{name}.moved"  # its integers are yet to be computed
            self._move(moved, layer, [source, *inputs[1:]])
            self.values[name] = Real(moved, compute)
        else:
            raise self._refused(name, layer, make.ADVICE.get(kind, make.ADVICE["other"]))

    def _refused(self, name: str, layer: RuntimeLayer, why: str) -> ValueError:
        kind = layer.name if isinstance(layer, ops.Function) else type(layer).__name__
        return ValueError(
            f"'{name}' ({kind}) cannot be computed without floats, which target={self.target} asks: {why}"
        )

    # ---- steps ------------------------------------------------------------------------------------------------------
    def _add(self, name: str, layer: RuntimeLayer, inputs: list[str]) -> str:
        self.nodes.append(Node(name, tuple(inputs)))
        self.layers[name] = layer
        if layer.output is None:
            self.plain.add(name)
        else:
            self.grids[name] = layer.output
        return name

    def _hold(self, name: str, value: Tensor, output: Quantize | None) -> None:
        """A tensor of the network: integers of a grid, a mask, or numbers that wait for an operation of such alone."""
        if output is None:
            self.held[name] = value
            return
        grid = signed(output)
        moved = value.int() + (grid.quant_min - output.quant_min)
        step = ops.Constant(list(moved.shape), str(grid.dtype).removeprefix("torch."), grid)
        step.value.copy_(moved)
        self._add(name, step, [])

    def _mask(self, name: str, layer: RuntimeLayer, kind: str, inputs: list[str]) -> None:
        """Scores of which some do not count: noted, for the softmax that reads them."""
        assert isinstance(layer, ops.Function)
        if layer.settings.get("value", -torch.inf) != -torch.inf:
            raise self._refused(name, layer, make.ADVICE["other"])
        self.values[name] = self.values[inputs[0]]
        if kind == "causal":
            self.masks[name] = ("causal", [])
            return
        mask, how = inputs[1], "false" if kind == "add_mask" else "true"
        if mask in self.held:
            value = self.held[mask]
            if value.is_floating_point():
                if not bool(((value == 0) | (value == -torch.inf)).all()):
                    raise self._refused(name, layer, make.ADVICE["mask"])
                value, how = value != 0, "true"
            mask = f"{name}.mask"
            step = ops.Constant(list(value.shape), str(value.dtype).removeprefix("torch."))
            step.value.copy_(value)
            self._add(mask, step, [])
        elif mask not in self.plain:
            raise self._refused(name, layer, make.ADVICE["mask"])
        self.masks[name] = (how, [mask])

    def _move(self, name: str, layer: RuntimeLayer, inputs: list[str], zero: int = 0) -> None:
        """Append a move of integers; `zero` stands for 0 among the numbers that the layer itself moves."""
        step = copy.deepcopy(layer)
        grid = self.grids.get(inputs[0])
        if grid is None:  # of masks
            self._add(name, step, inputs)
            return
        assert isinstance(step, MOVES)
        for key in ("zero", "value"):
            if key in step.settings:
                step.settings[key] += int(grid.zero_point) - zero
        step.output = None
        self.nodes.append(Node(name, tuple(inputs)))
        self.layers[name], self.grids[name] = step, grid

    def _emit(self, name: str, sums: Sums, output: Quantize | None) -> None:
        """Append what sums up, with its grid; without one it waits for the next step."""
        if output is None:
            self.values[name] = sums
            return
        grid = signed(output)
        grid.relu = grid.relu or (sums.relu and int(grid.zero_point) != grid.quant_min)
        sums.layer.output = step = Requantize.of(grid, sums.total.unit)
        reach = sums.total.largest * sums.total.unit / grid.scale.double()
        assert bool(((step.multiplier > 0) | (reach < 0.5)).all()), name  # nothing that counts is below 2^-32
        self._add(name, sums.layer, sums.inputs)

    def _put(self, name: str, of: str, output: Quantize | None) -> None:
        """Put real numbers on a grid."""
        assert output is not None
        value = self.values[of]
        if isinstance(value, Sums) and self.readers[of] == 1:
            self._emit(name, value, output)
            return
        source = value.source if isinstance(value, Real) else self._integers(of)
        grid = self.grids[source]
        if grid.quant_max - grid.quant_min >= make.LARGEST_TABLE:
            step, total = make.rescaling(grid)
            self._emit(name, Sums(step, [source], total), output)
        else:
            self._table(name, self._tabulated(value), grid.quant_min, source, output)

    # ---- functions of one tensor ------------------------------------------------------------------------------------
    def _one_source(self, inputs: list[str]) -> bool:
        found = [self.values.get(i) for i in inputs]
        sources = {value.source if isinstance(value, Real) else None for value in found}
        return len(sources) == 1 and None not in sources

    def _pointwise(self, name: str, layer: RuntimeLayer, inputs: list[str], output: Quantize | None) -> None:
        found = [value for value in (self.values[i] for i in inputs) if isinstance(value, Real)]
        function = copy.deepcopy(layer)
        function.output = None

        def compute(x: Tensor) -> Tensor:
            made: Tensor = function(*(x if value.compute is None else value.compute(x) for value in found))
            return made

        value = Real(found[0].source, compute)
        grid = self.grids[value.source]
        if grid.quant_max - grid.quant_min >= make.LARGEST_TABLE:
            raise self._refused(name, layer, make.ADVICE["wide"])
        made = self._tabulated(value)
        if made.dtype == torch.bool:
            self._add(name, fixed.Table.of(made, grid.quant_min, None), [value.source])
        elif output is None:
            self.values[name] = value
        else:
            self._table(name, made, grid.quant_min, value.source, output)

    def _tabulated(self, value: Real | Sums) -> Tensor:
        """The real numbers for every integer of the source."""
        assert isinstance(value, Real)
        grid = self.grids[value.source]
        x = grid.dequantize(torch.arange(grid.quant_min, grid.quant_max + 1, device=grid.scale.device))
        return x if value.compute is None else value.compute(x)

    def _table(self, name: str, values: Tensor, low: int, source: str, output: Quantize | None) -> None:
        """Append a look-up; without a grid on one that is fine enough for anything (31 bits)."""
        grid = make.fine(float(values.abs().max())) if output is None else signed(output)
        integers = grid(values) if output is not None else (values.double() / float(grid.scale)).round().int()
        self._add(name, fixed.Table.of(integers, low, grid), [source])
        if output is None:
            self.values[name] = Real(name)

    def _integers(self, name: str) -> str:
        """The integers that stand for a tensor of real numbers."""
        if name in self.grids:
            return name
        value = self.values.get(name)
        if value is None:
            raise ValueError(
                f"'{name}' cannot be computed without floats, which target={self.target} asks: {make.ADVICE['input']}"
            )
        made = f"{name}.integers"
        if isinstance(value, Real) and value.compute is None:
            return value.source
        if made not in self.grids and isinstance(value, Real):
            low = self.grids[value.source].quant_min
            self._table(made, self._tabulated(value), low, value.source, None)
        elif made not in self.grids:
            assert isinstance(value, Sums)
            largest = float((value.total.unit * value.total.largest).max())
            self._emit(made, Sums(copy.deepcopy(value.layer), value.inputs, value.total, value.relu),
                       make.fine(largest))  # fmt: skip
        return made

    def _on_one_grid(self, names: list[str]) -> list[str]:
        """Tensors that are joined, and that training has on grids of their own or on none, on one that is fine."""
        sources = [self._integers(name) for name in names]
        grid = make.fine(max(make.width(self.grids[s]) * float(self.grids[s].scale) for s in sources))
        for source, name in zip(sources, names, strict=True):
            if f"{name}.joined" not in self.grids:
                step, total = make.rescaling(self.grids[source])
                self._emit(f"{name}.joined", Sums(step, [source], total), grid)
        return [f"{name}.joined" for name in names]

    def _output(self, name: str) -> str:
        """Real numbers for the outside."""
        if name in self.plain:
            return name
        if name in self.masks:
            raise self._refused(name, ops.Move(), "minus infinity is returned, which no grid holds")
        source = self._integers(name)
        real = f"{name}.out" if name in self.layers else name
        grid = self.grids[source]
        out = Quantize(grid.quant_min, grid.quant_max, False, float(grid.scale), int(grid.zero_point))
        self.nodes.append(Node(real, (source,)))
        self.layers[real] = ops.Dequantize(out)
        return real


def _without_floats(layer: ops.Move, shape: list[int]) -> RuntimeLayer:
    """The same move for inputs of one size: places that are computed in floats are given, equal windows are a pooling.

    Other adaptive poolings compare integers as they are.
    """
    settings = {key: value for key, value in layer.settings.items() if key != "name"}
    if layer.settings["name"] == "interpolate":
        return ops.Move(name="take", places=nearest_places(shape[2:], **settings))
    if layer.settings["name"] != "adaptive_max_pool":
        return layer
    spatial = shape[-len(settings["output_size"]) :]
    sizes = [n if m is None else m for n, m in zip(spatial, settings["output_size"], strict=True)]
    if any(n % m for n, m in zip(spatial, sizes, strict=True)):
        return layer
    kernel, dims = [n // m for n, m in zip(spatial, sizes, strict=True)], len(sizes)
    return ops.MaxPool(kernel=kernel, stride=kernel, padding=[0] * dims, dilation=[1] * dims, ceil_mode=False)
