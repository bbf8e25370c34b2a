"""The recorded parts of a prepared network: what reads graphs (lowering, the PTQ step, reports) works on each."""

import operator
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

from qat.fake_quant import FakeQuantize
from qat.layers import Quantized
from qat.prepared import PreparedNetwork
from qat.split import join
from qat.subclass import Prepared, as_graph


def graphs(prepared: nn.Module) -> dict[str, fx.GraphModule]:
    """Path -> recording of each part of a prepared network, in order of registration; "" is the whole network.

    A layer with a quantizer of its own is a part of one layer. The graphs share layers and quantizers with `prepared`.
    """
    found: dict[str, fx.GraphModule] = {}
    _collect(prepared, "", found, getattr(prepared, "meta", {}).get("qat", {}))
    return found


def _collect(module: nn.Module, path: str, found: dict[str, fx.GraphModule], about: dict[str, Any]) -> None:
    if isinstance(module, Prepared) and vars(module).get("recording") is not None:
        module = as_graph(module)
    if isinstance(module, fx.GraphModule):
        found[path] = module
        for name in module.meta.get("opaque", ()):
            _collect(module.get_submodule(name), join(path, name), found, about)
    elif isinstance(module, Quantized):
        found[path] = _single(module, path, about)
    else:
        for name, child in module.named_children():
            _collect(child, join(path, name), found, about)


def _single(layer: Quantized, path: str, about: dict[str, Any]) -> PreparedNetwork:
    """A network of one layer, behind the quantizer that it has for its input, called as in the example."""
    name = path.rpartition(".")[2] or "layer"
    root, graph = nn.Module(), fx.Graph()
    root.add_module(name, layer)
    given = {key: _taken(graph.placeholder(key), value) for key, value in layer.called_with.items()}
    quantizer = layer._modules.get("input_quantizer")
    if isinstance(quantizer, FakeQuantize):
        root.add_module("input_quantizer", quantizer)
        for site, key in enumerate(list(given)[: quantizer.sites]):
            given[key] = graph.call_module(
                "input_quantizer", (given[key], site) if quantizer.sites > 1 else (given[key],)
            )
    result = graph.call_module(name, tuple(given.values()))
    graph.output(_parts_of(result, layer))
    for node in graph.nodes:
        if node.op == "placeholder" and not node.users:  # a setting, not a tensor
            graph.erase_node(node)
    single = PreparedNetwork(root, graph, type(layer).__name__)
    single.meta["qat"] = about | {"inputs": layer.called_with}
    single.train(layer.training)
    return single


def _taken(node: fx.Node, value: Any) -> Any:
    """The tensors in an argument as nodes; what is no tensor as it is."""
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return tuple(_taken(node.graph.call_function(operator.getitem, (node, i)), v) for i, v in enumerate(value))
    return node if isinstance(value, Tensor | PackedSequence) else value


def _parts_of(result: fx.Node, layer: nn.Module) -> Any:
    """What a call of a layer returns: of a recurrent one several tensors."""

    def take(whole: fx.Node, i: int) -> fx.Node:
        return result.graph.call_function(operator.getitem, (whole, i))

    if isinstance(layer, nn.LSTM):
        output, states = take(result, 0), take(result, 1)
        return output, (take(states, 0), take(states, 1))
    if isinstance(layer, nn.RNNBase | nn.LSTMCell):
        return take(result, 0), take(result, 1)
    return result
