"""Layers of a prepared network -> layers of the runtime, their numbers copied."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.encoding import encode
from qat.fake_quant import FakeQuantize
from qat.fitted import Product
from qat.fold import LARGEST_BIAS, LARGEST_WIDE_BIAS, FoldedWeight, batch_norm_affine, fold, integer_bias
from qat.layers import QuantizedLayer, Weight
from qat.numerics.granularity import rows_of, swap_channels
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv, IntegerConv
from qat.runtime.lookup import LookUp, ProductLookUp, TableLookUp
from qat.runtime.outer import IntegerBilinear
from qat.runtime.stored import ProductConv, StoredConv, TableConv


def grid_of(quantizer: FakeQuantize) -> Quantize:
    """The grid of an integer quantizer, as the runtime's."""
    scale, zero_point = (t.detach() for t in quantizer.qparams())
    relu = quantizer.relu and int(zero_point) != quantizer.quant_min
    ends = int(quantizer.quant_min), int(quantizer.quant_max)
    return Quantize(*ends, relu, float(scale), int(zero_point), quantizer.rounding_in_use)


def integer_grids(layer: QuantizedLayer, grids: Sequence[Quantize | None]) -> list[Quantize] | None:
    """The grids of a layer's inputs, if the runtime multiplies their integers by the layer's; None if it does not."""
    known = [grid for grid in grids if grid is not None]
    if len(known) < len(grids) or not layer.weight_quantizer.integer or not layer.multiplies:
        return None
    if len(known) > 1 and not IntegerBilinear.fits(IntegerBilinear.products(*known), layer.outputs_first()[0].numel()):
        return None
    return known


def integer_layer(
    layer: QuantizedLayer | Weight,
    norm: nn.Module | None,
    grids: Sequence[Quantize],
    geometry: dict[str, Any],
    remainder: bool = False,
) -> IntegerConv:
    """A layer on integers.

    Args:
        layer: with an integer weight.
        norm: the BatchNorm behind it.
        grids: of its inputs: two of a bilinear layer.
        geometry: settings of a convolution, and the output's grid.
        remainder: its bias could not be rounded for these grids.
    """
    folded = fold(layer, norm)
    kind: type[IntegerConv] = IntegerConv
    grid, largest = grids[0], LARGEST_BIAS
    if len(grids) > 1:
        kind, grid, largest = IntegerBilinear, IntegerBilinear.products(*grids), LARGEST_WIDE_BIAS
    scale, q, bias = integer_bias(folded, float(grid.scale), folded.q.dim(), largest)
    between = bool(((q - folded.bounds[0]) % folded.step).any())  # a channel that was scaled down for its bias
    step = kind(
        list(folded.q.shape), list(folded.bounds), [grid.quant_min, grid.quant_max], **geometry,
        weight_step=1 if between else folded.step, remainder=remainder,
    )  # fmt: skip
    limit = torch.iinfo(torch.int32).max if step.bias.dtype == torch.int32 else 2**62
    step.weight.copy_(q)
    step.weight_scale.copy_(scale)
    step.weight_zero_point.copy_(folded.zero_point)
    step.bias.copy_(bias.clamp(-limit, limit))
    step.input_scale.copy_(grid.scale)
    step.input_zero_point.copy_(grid.zero_point)
    if step.remainder is not None:
        step.remainder.copy_(folded.bias - step.bias.double() * scale * float(grid.scale))
    if isinstance(step, IntegerBilinear):
        for zero, side in zip((step.left_zero_point, step.right_zero_point), grids, strict=True):
            zero.copy_(side.zero_point)
    return step


def real_layer(
    layer: QuantizedLayer | Weight, norm: nn.Module | None, geometry: dict[str, Any]
) -> FloatConv | StoredConv:
    """A layer that takes real numbers, its weight stored in few bits."""
    if layer.weight_quantizer.foldable:
        return _weight_only(layer, fold(layer, norm), geometry)
    return _stored(layer, norm, geometry)


def _weight_only(layer: QuantizedLayer | Weight, folded: FoldedWeight, geometry: dict[str, Any]) -> FloatConv:
    group_size = layer.weight_quantizer.layout.group_size
    step = FloatConv(
        list(folded.q.shape), list(folded.bounds), group_size, **geometry, weight_step=folded.step
    )  # fmt: skip
    step.weight.copy_(folded.q)
    step.weight_scale.copy_(folded.scale)
    step.weight_zero_point.copy_(folded.zero_point)
    step.bias.copy_(folded.bias)
    assert rows_of(step.weight, group_size).shape[0] == folded.scale.numel()
    return step


def _stored(layer: QuantizedLayer | Weight, norm: nn.Module | None, geometry: dict[str, Any]) -> StoredConv:
    step = _codes(layer, TableConv, ProductConv, geometry)
    gain, shift = batch_norm_affine(norm, step.weight_shape[0])
    step.gain.copy_(gain)
    step.bias.copy_(shift if layer.bias is None else layer.bias.detach().double() * gain + shift)
    return step


def _codes(
    layer: QuantizedLayer | Weight, table: type[TableConv], product: type[ProductConv], settings: dict[str, Any]
) -> TableConv | ProductConv:
    """A weight on levels that are not integers, or in rows that cross output channels."""
    quantizer, weight = layer.weight_quantizer, layer.outputs_first().detach()
    shape = list(weight.shape)
    if not isinstance(quantizer.fitted, Product):
        return table.of(shape, quantizer.layout, encode(quantizer, weight), **settings)
    padded = quantizer.rows(weight).numel() // shape[0]
    step = product(shape, list(quantizer.fitted.entries.shape), padded, quantizer.fitted.bits, **settings)
    step.codes.copy_(quantizer.fitted.indices)
    step.prototypes.copy_(quantizer.fitted.entries.detach())
    return step


def look_up(
    layer: nn.Module, pooling: dict[str, Any] | None, output: Quantize | None
) -> LookUp | TableLookUp | ProductLookUp:
    """An embedding, or a bag of them; quantized or float."""
    settings: dict[str, Any] = {"pooling": pooling, "output": output}
    if not isinstance(layer, QuantizedLayer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        step = LookUp(list(weight.shape), **settings)
        step.weight.copy_(weight.detach())
        return step
    quantizer = layer.weight_quantizer
    if not quantizer.foldable:
        stored = _codes(layer, TableLookUp, ProductLookUp, settings)
        assert isinstance(stored, TableLookUp | ProductLookUp)
        return stored
    folded = fold(layer, None)
    bounds, size = list(folded.bounds), quantizer.layout.group_size
    step = LookUp(list(folded.q.shape), bounds, size, weight_step=folded.step, **settings)
    step.weight.copy_(folded.q)
    step.weight_scale.copy_(folded.scale)
    step.weight_zero_point.copy_(folded.zero_point)
    return step


def float_layer(layer: nn.Module, geometry: dict[str, Any]) -> FloatConv:
    """A layer that stays float."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        weight = swap_channels(weight, layer.groups)
    elif isinstance(layer, nn.Bilinear):
        weight = weight.flatten(1)
    step = FloatConv(list(weight.shape), None, None, **geometry)
    step.weight.copy_(weight.detach())
    if bias is not None:
        assert isinstance(bias, Tensor)
        step.bias.copy_(bias.detach())
    return step
