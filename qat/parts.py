"""The recorded parts of a prepared network: what reads graphs (lowering, the PTQ step, reports) works on each."""

from typing import Any

from torch import fx, nn

from qat.fake_quant import FakeQuantize
from qat.graph import PreparedNetwork
from qat.layers import Quantized
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
    """A network of one layer, behind the quantizer that it has for its input."""
    name = path.rpartition(".")[2] or "layer"
    root, graph = nn.Module(), fx.Graph()
    root.add_module(name, layer)
    quantizer = layer._modules.get("input_quantizer")
    count = 2 if isinstance(layer, nn.Bilinear) else 1
    read = [graph.placeholder(f"input{i + 1}" if count > 1 else "input") for i in range(count)]
    if isinstance(quantizer, FakeQuantize):
        root.add_module("input_quantizer", quantizer)
        read = [graph.call_module("input_quantizer", (x, i) if count > 1 else (x,)) for i, x in enumerate(read)]
    graph.output(graph.call_module(name, tuple(read)))
    single = PreparedNetwork(root, graph, type(layer).__name__)
    single.meta["qat"] = about
    single.train(layer.training)
    return single
