"""What a recurrent layer returns: several tensors, some of which lie on grids of its own; and packed sequences."""

import operator
from collections.abc import Mapping

from torch import fx, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from qat.fake_quant import FakeQuantize
from qat.layers import QuantizedRecurrent

PACKING = (pack_padded_sequence, pad_packed_sequence, pack_sequence)
"""Functions that look at lengths, which a trace cannot; so each is one operation."""

RECURRENT = nn.RNNBase | nn.RNNCellBase
"""Layers that return several tensors, quantized or float."""

Modules = Mapping[str, nn.Module]
Result = tuple[fx.Node, tuple[int, ...]]
"""A call of a recurrent layer, and a path into what it returns: `layer(x)[path[0]][path[1]]`..."""


def result_of(modules: Modules, node: fx.Node) -> Result | None:
    """Of which call a node is (a part of) the result; None if of none."""
    path: list[int] = []
    while node.target is operator.getitem and isinstance(node.args[1], int):
        path.insert(0, node.args[1])
        node = node.all_input_nodes[0]
    called = modules[str(node.target)] if node.op == "call_module" else None
    return (node, tuple(path)) if isinstance(called, RECURRENT) else None


def given_grid(modules: Modules, node: fx.Node) -> FakeQuantize | None:
    """The grid on which a recurrent layer has put a part of its result; None for anything else."""
    found = result_of(modules, node)
    layer = modules[str(found[0].target)] if found else None
    return layer.grid(found[1]) if found and isinstance(layer, QuantizedRecurrent) else None


def takes_result(modules: Modules, node: fx.Node) -> bool:
    """Whether a node takes a whole tensor out of a result, or of states with several grids the part that has one."""
    found = result_of(modules, node) if node.target is operator.getitem else None
    layer = modules[str(found[0].target)] if found else None
    if found is None or isinstance(layer, nn.GRUCell | nn.RNNCell):
        return False
    path = found[1]
    depth = 2 if isinstance(layer, nn.LSTM) and path[0] == 1 else 1
    if len(path) <= depth:
        return True
    several = given_grid(modules, node.all_input_nodes[0]) is None
    return several and given_grid(modules, node) is not None


def is_padded(node: fx.Node) -> bool:
    """Whether a node is the tensor, or the lengths, of a packed sequence that was padded again."""
    return node.target is operator.getitem and node.all_input_nodes[0].target is pad_packed_sequence
