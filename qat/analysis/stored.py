"""How many bytes a prepared network takes in the int8 checkpoint, before there is one."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from qat.fake_quant import FakeQuantize
from qat.fitted import Mean, Product
from qat.graph import Graph
from qat.kinds import Kind
from qat.modes import quantizers
from qat.numerics.granularity import rows_of
from qat.parts import graphs
from qat.runtime.grid import storage_dtype


@dataclass(frozen=True)
class Stored:
    """Bytes of one weight.

    Attributes:
        codes: the weight itself, packed below 8 bits.
        tables: scales, zero points, levels, prototypes.
    """

    codes: int
    tables: int = 0


def of_weight(quantizer: FakeQuantize, weight: Tensor) -> Stored:
    """A weight (as its quantizer sees it, [out, inputs...]) as `qat.encoding.encode` and the runtime keep it."""
    fitted, out = quantizer.fitted, weight.shape[0]
    if isinstance(fitted, Product):
        return Stored(_packed(fitted.indices.numel(), fitted.bits), 4 * (fitted.entries.numel() + out))
    if quantizer.foldable:
        rows = rows_of(weight, quantizer.layout.group_size).shape[0] if quantizer.layout.kind == "group" else out
        return Stored(_integers(quantizer, weight.numel()), _row_bytes(quantizer) * rows)
    rows, values = quantizer.rows(weight).shape  # short groups are filled up
    tables = _row_bytes(quantizer) * rows + 4 * out  # the gain of a BatchNorm
    if fitted is not None:
        entries = fitted.values().numel()
        return Stored(_packed(rows * values, fitted_bits(quantizer)), tables + 4 * entries)
    if quantizer.format.unit_scale:
        return Stored(rows * values * (quantizer.scheme.bits or 32) // 8, tables)
    if quantizer.grid is None or quantizer.scheme.format == "int":
        return Stored(_integers(quantizer, rows * values), tables)
    levels = len(quantizer.grid.values())  # those of a format are stored once, for all layers
    return Stored(_packed(rows * values, (levels - 1).bit_length()), tables)


def _row_bytes(quantizer: FakeQuantize) -> int:
    """Bytes of a row's scale and zero point: a block's scale is a float8, a zero point that is always 0 is left out."""
    scale = 4 if quantizer.format.scales is None else 1
    return scale if quantizer.scheme.symmetric else scale + _packed(1, quantizer.scheme.bits or 32)


def fitted_bits(quantizer: FakeQuantize) -> int:
    """Bits of a code for a fitted table of levels."""
    assert quantizer.fitted is not None
    return (quantizer.fitted.values().shape[1] - 1).bit_length()


def _integers(quantizer: FakeQuantize, count: int) -> int:
    """Bytes of integers."""
    low, high = int(quantizer.quant_min), int(quantizer.quant_max)
    step = quantizer.fitted.levels[1] - quantizer.fitted.levels[0] if isinstance(quantizer.fitted, Mean) else 1
    odd = not isinstance(quantizer.fitted, Mean) and quantizer.grid is not None  # DoReFa's integers are odd
    bits = quantizer.scheme.bits or 0 if odd else ((high - low) // step).bit_length()
    return _packed(count, bits) if bits <= 8 else count * storage_dtype(low, high).itemsize


def _packed(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def rest(prepared: nn.Module, layers: set[nn.Module]) -> dict[str, int]:
    """Bytes of the parameters that no layer with a row of its own has.

    Args:
        prepared: from `qat.prepare`.
        layers: those with a row of their own.

    Returns:
        Class name of the module that holds them (`parameters` for a network's own) -> bytes. A BatchNorm that is folded
        away is left out; a parameter that a quantizer reads is stored on its grid.
    """
    folded, on_grid, counted = _in_graphs(prepared)
    quantizing = {part for _, quantizer in quantizers(prepared) for part in quantizer.modules()}
    found: dict[str, int] = {}
    for module in prepared.modules():
        if module in layers | folded | quantizing:
            continue
        holder = type(module)
        named = holder is not nn.Module and not isinstance(module, fx.GraphModule) and module is not prepared
        kind = holder.__name__ if named else "parameters"
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                found[kind] = found.get(kind, 0) + parameter.numel() * on_grid.get(id(parameter), 4)
    return found


def _in_graphs(prepared: nn.Module) -> tuple[set[nn.Module], dict[int, int], set[int]]:
    """BatchNorms that fold; parameters on a grid -> bytes of a value; parameters that calls of layers are given."""
    folded: set[nn.Module] = set()
    on_grid: dict[int, int] = {}
    weights: set[int] = set()
    for recorded in graphs(prepared).values():
        graph = Graph(recorded)
        held = graph.held_for_layers()
        for node in graph.nodes:
            if graph.kind(node) is Kind.batch_norm and is_folded(graph, node):
                folded.add(graph.submodule(node) or recorded)
            elif node.op == "get_attr":
                tensor = _attribute(recorded, node)
                readers = [graph.submodule(user) for user in node.users]
                if node in held:
                    weights.add(id(tensor))
                elif readers and all(isinstance(reader, FakeQuantize) and reader.integer for reader in readers):
                    quantizer = readers[0]
                    assert isinstance(quantizer, FakeQuantize)
                    dtype = storage_dtype(int(quantizer.quant_min), int(quantizer.quant_max))
                    on_grid[id(tensor)] = torch.empty((), dtype=dtype).element_size()
    return folded, on_grid, weights


def _attribute(recorded: fx.GraphModule, node: fx.Node) -> object:
    path, _, name = str(node.target).rpartition(".")
    return getattr(recorded.get_submodule(path), name)


def is_folded(graph: Graph, node: fx.Node) -> bool:
    """Whether a BatchNorm is folded into the layer in front of it."""
    layer = node.all_input_nodes[0]
    return graph.kind(layer) is Kind.layer and graph.batch_norm_after(layer) is node
