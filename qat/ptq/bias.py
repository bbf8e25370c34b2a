"""Biases: corrected for the mean error of quantized weights, and rounded to the integers that the runtime adds."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qat.fold import LARGEST_BIAS, LARGEST_WIDE_BIAS, BatchNorm, batch_norm_affine, fold, integer_bias
from qat.graph import Graph
from qat.kinds import Kind
from qat.layers import QuantizedLayer, QuantizedRecurrent
from qat.mode import Mode
from qat.modes import eval_mode
from qat.parts import graphs
from qat.record import run
from qat.translate import factors


@torch.no_grad()
def correct_bias(prepared: nn.Module, batches: Iterable[Any]) -> None:
    """Cancel the mean error that quantized weights add to each output channel, measured on `batches`.

    For float weights that were not trained for quantization. On QAT weights it would undo training, which has already
    compensated the error. Recurrent layers stay as they are: their error comes in front of a gate, and goes round.

    Source: Nagel et al. 2019, "Data-Free Quantization", section 4.2 (empirical form; errors of earlier layers are left
    to those layers).
    """
    layers: dict[QuantizedLayer, nn.Module | None] = {}
    for graph in map(Graph, graphs(prepared).values()):
        for node, layer in graph.layers():
            after = graph.batch_norm_after(node)
            if layer.biased:
                layers[layer] = graph.submodule(after) if after else None
    error: dict[QuantizedLayer, Tensor] = {}
    calls: dict[QuantizedLayer, int] = {}

    def record(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        assert isinstance(layer, QuantizedLayer)
        quantizer, mode = layer.weight_quantizer, layer.weight_quantizer.mode
        quantizer.mode = Mode.float
        exact = type(layer).forward(layer, *inputs, **named)
        quantizer.mode = mode
        channel = 1 if layer.outputs_first().dim() > 2 else output.dim() - 1
        other = [d for d in range(output.dim()) if d != channel]
        calls[layer] = calls.get(layer, 0) + 1
        error[layer] = error.get(layer, torch.zeros(())) + (exact - output).mean(dim=other)

    handles: list[RemovableHandle] = [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        with eval_mode(prepared):
            for batch in batches:
                run(prepared, batch)
    finally:
        for handle in handles:
            handle.remove()
    for layer, norm in layers.items():
        if layer in error:
            _add_to_output(layer, norm, error[layer] / calls[layer])


@torch.no_grad()
def round_biases(prepared: nn.Module) -> None:
    """Move every bias to the nearest multiple of `input_scale * weight_scale`, the unit in which integers are summed.

    The unit is far below a step at 8 bits, but a good part of one at 2. After this, the fake-quantized network and the
    integer network add the same number. The bias of a layer whose BatchNorm is folded is `beta - mean * gain`; the
    `input_scale` of a bilinear layer is the product of its inputs' scales.

    Source: Jacob et al. 2018, section 2.4 (int32 biases).
    """
    for recorded in graphs(prepared).values():
        _round_biases(Graph(recorded))


def _round_biases(graph: Graph) -> None:
    for node in graph.nodes:  # a ReLU behind a quantizer clamps integers and keeps their scale
        if graph.kind(node) is Kind.relu and graph.quantizer_of(node.all_input_nodes[0]) is not None:
            graph.passing_relus.add(node)
    calls = [layer for _, layer in graph.layers()]
    biases = [_place(layer.bias) for layer in set(calls) if layer.bias is not None]
    for node, layer in graph.layers():
        sources = [graph.quantizer_of(source) for source in factors(layer, node)]
        quantizers = [source for source in sources if source is not None and source.integer]
        integer = len(quantizers) == len(sources) and layer.weight_quantizer.integer and layer.multiplies
        shared = calls.count(layer) > 1 or (layer.bias is not None and biases.count(_place(layer.bias)) > 1)
        if not integer or shared:  # added in float, or at several scales
            continue
        norm_node = graph.batch_norm_after(node)
        norm = graph.submodule(norm_node) if norm_node else None
        folded = fold(layer, norm)
        unit = float(math.prod(quantizer.qparams()[0].detach() for quantizer in quantizers))
        largest = LARGEST_BIAS if len(quantizers) == 1 else LARGEST_WIDE_BIAS
        scale, _, bias = integer_bias(folded, unit, folded.q.dim(), largest)
        _add_to_folded_bias(layer, norm, bias * scale * unit - folded.bias)
    for recurrent in dict.fromkeys(layer for _, layer in graph.recurrent()):
        _round_recurrent(recurrent)


def _round_recurrent(layer: QuantizedRecurrent) -> None:
    """Round the two biases of every cell, each to the unit of its own sum: of inputs, and of hidden states."""
    for i in range(layer.form.layers * layer.form.directions):
        for weight, sources in zip(layer.weights_of_cell(i), layer.inputs_of_cell(i), strict=False):
            if weight.bias is None or not weight.weight_quantizer.integer or len(sources) != 1:
                continue
            source = sources[0]
            if source is None or not source.integer:
                continue
            folded, unit = fold(weight, None), float(source.qparams()[0].detach())
            scale, _, bias = integer_bias(folded, unit, folded.q.dim())
            weight.bias.data.copy_(bias * scale * unit)


def _add_to_output(layer: QuantizedLayer, norm: nn.Module | None, delta: Tensor) -> None:
    """Shift the layer's output by `delta` a channel."""
    if isinstance(norm, BatchNorm) and norm.running_mean is not None:
        norm.running_mean.sub_(delta)
    elif layer.bias is not None:
        layer.bias.data.add_(delta)
    else:
        layer.add_bias(delta.clone())


def _place(bias: Tensor) -> tuple[int, Any]:
    """Where a bias lies in memory: layers may share one."""
    return bias.untyped_storage()._cdata, bias.storage_offset()


def _add_to_folded_bias(layer: QuantizedLayer, norm: nn.Module | None, delta: Tensor) -> None:
    """Shift the output of the layer and its BatchNorm by `delta` a channel."""
    if isinstance(norm, BatchNorm):
        if norm.bias is not None:
            norm.bias.data.copy_(norm.bias.double() + delta)
        elif norm.running_mean is not None:  # affine=False: the mean is the only constant to move
            gain, _ = batch_norm_affine(norm, delta.numel())
            norm.running_mean.copy_(norm.running_mean.double() - delta / gain)
    elif layer.bias is not None:
        layer.bias.data.copy_(layer.bias.double() + delta)
