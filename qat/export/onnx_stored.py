"""Weights stored as codes, and simulated activations, in ONNX; and which activations a file can hold.

A weight is multiplied out from its codes by operations on initializers, which engines do once, as they load the file.
An activation is put on its levels by Div, Round, Clip and Mul, or by Cast to a float type and back: QuantizeLinear has
static ranges only, and engines fuse it into integer kernels that know one scale a tensor.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.export.onnx_conv import product, weight_as_kept
from qat.export.onnx_model import Model
from qat.export.onnx_pairs import FLOAT8, float8_pair, float8_weight
from qat.fake_quant import FakeQuantize
from qat.numerics.affine import SMALLEST_SCALE
from qat.numerics.formats import FORMATS
from qat.numerics.granularity import Layout
from qat.ranges import RANGES
from qat.runtime.layers import RuntimeLayer
from qat.runtime.network import Node
from qat.runtime.stored import ProductConv, Simulate, StoredConv, TableConv
from qat.scheme import Granularity, QuantConfig, TensorScheme, override
from qat.targets import TARGETS

CASTS = {"e4m3fn": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2", "bf16": "BFLOAT16", "fp16": "FLOAT16"}
"""Float format -> the ONNX type whose Cast rounds to it in ONNX Runtime."""

NEAREST: dict[str, dict[str, Any]] = {
    **{
        name: {"format": "e4m3fn", "bits": 8}
        for name in ("e3m2", "e2m3", "e2m1", "mxfp8_e4m3", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "nvfp4")
    },
    "mxfp8_e5m2": {"format": "e5m2", "bits": 8},
    "mxint8": {"format": "int", "bits": 8},
    "tf32": {"format": "bf16", "bits": 16},
    "pow2": {"format": "int"},
    "apot": {"format": "int"},
}
"""Format of activations that no ONNX file holds -> fields of one that it does."""

MEASURED = ("minmax", "absmax")
"""Observers that ONNX has operations for, where the file measures the range."""


class Refusal(NamedTuple):
    """A field of an activation's scheme that ONNX files cannot express, and what to change."""

    field: str
    why: str
    changes: dict[str, Any]


def refusals(scheme: TensorScheme) -> Iterator[Refusal]:
    """What keeps an activation out of an ONNX file: nothing, or fields in order of weight."""
    kind = FORMATS[scheme.format]
    if scheme.format != "int" and scheme.format not in CASTS:
        yield Refusal("format", "ONNX Runtime has no kernels for it", NEAREST.get(scheme.format, {"format": "int"}))
    if scheme.granularity is Granularity.group:
        changes = {"granularity": Granularity.token, "group_size": None, "axis": None}
        yield Refusal("granularity", "ONNX Runtime has no kernels for activations in groups", changes)
    if RANGES[scheme.range].dynamic and not kind.unit_scale and scheme.observer not in MEASURED:
        why = f"a dynamic range is measured in the file, and ONNX measures {' and '.join(MEASURED)}"
        yield Refusal("observer", why, {"observer": MEASURED[0]})


def check_onnx(config: QuantConfig) -> None:
    """Refuse activations that `save_onnx` would refuse, before anything is trained.

    Raises:
        ValueError: names the field and its value, the reason, and what to write instead.
    """
    if TARGETS[config.target].requantize == "fixed_point":
        raise ValueError(
            f"export.formats=onnx: target={config.target} scales by an int32 multiplier and a shift, which ONNX has "
            f"no operators for; use export=int8 (no ONNX file), or target=generic"
        )
    schemes = {"quant.activation": config.activation, "quant.input": config.input}
    for i, rule in enumerate(config.rules):
        where = f"quant.rules[{i}].activation"
        schemes[where] = override(config.activation, rule.activation, where)
    for where, scheme in schemes.items():
        first = next(refusals(scheme), None) if scheme.quantized else None
        if first is not None:
            value = _shown(getattr(scheme, first.field))
            raise ValueError(f"{where}.{first.field}={value}: {first.why}; {_advice(scheme, f'{where}.')}")


def _advice(scheme: TensorScheme, prefix: str) -> str:
    changes = {name: value for refusal in refusals(scheme) for name, value in refusal.changes.items()}
    shown = [f"{prefix}{name}={_shown(v)}" for name, v in changes.items() if getattr(scheme, name) != v]
    return f"use export=int8 (no ONNX file), or {' '.join(shown)}"


def _shown(value: Any) -> str:
    return "null" if value is None else str(value.value if isinstance(value, Granularity) else value)


# ---- weights ---------------------------------------------------------------------------------------------------------


def table_conv(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """The weight, multiplied out, then the layer."""
    assert isinstance(layer, TableConv)
    _stored(model, node, layer, table_weight(model, node.name, layer))


def table_weight(model: Model, name: str, layer: TableConv) -> str:
    """Codes, looked up in their table of levels, times scales."""
    kind, codes = _code_type(layer), layer.codes
    levels: Tensor | None = layer.levels
    if levels is not None and (narrow := _as_float8(layer)) is not None:
        (kind, codes), levels = narrow, None
        if model.pairs and kind == FLOAT8:
            return float8_weight(model, name, layer, codes)
    _refuse_in_pairs(model, name)
    values = model.typed(f"{name}.weight", codes, kind)
    if levels is not None:
        index = model.cast(values, "INT32", f"{name}.weight_index")
        if levels.shape[0] == 1:
            table = model.constant(f"{name}.weight_levels", levels[0])
            values = model.op("Gather", [table, index], f"{name}.weight_values")
        else:
            table = model.constant(f"{name}.weight_levels", levels)
            values = model.op("GatherElements", [table, index], f"{name}.weight_values", axis=1)
    elif kind != "FLOAT":
        values = model.cast(values, "FLOAT", f"{name}.weight_values")
    if bool((layer.zero_point != 0).any()):
        zero = model.constant(f"{name}.weight_zero_point", layer.zero_point.unsqueeze(1), np.float32)
        values = model.op("Sub", [values, zero], f"{name}.weight_centred")
    if bool((layer.scale != 1).any()):
        scale = model.constant(f"{name}.weight_scale", layer.scale.unsqueeze(1))
        values = model.op("Mul", [values, scale], f"{name}.weight_rows")
    return _restore(model, layer.layout, layer.weight_shape, values, f"{name}.weight_real")


def _refuse_in_pairs(model: Model, name: str) -> None:
    if model.pairs:
        raise ValueError(
            f"layer '{name}': the target takes no such weights; use weight.format=e4m3fn with a scale a channel, or "
            f"leave onnx out of export.formats"
        )


def product_conv(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """The weight, multiplied out, then the layer."""
    assert isinstance(layer, ProductConv)
    _stored(model, node, layer, product_weight(model, node.name, layer))


def product_weight(model: Model, name: str, layer: ProductConv) -> str:
    """Codes, looked up in the prototypes of their part of the inputs."""
    _refuse_in_pairs(model, name)
    out, *rest = layer.weight_shape
    parts, entries, width = layer.prototypes.shape
    index = model.cast(model.typed(f"{name}.weight", layer.codes, _code_type(layer)), "INT32", f"{name}.weight_code")
    if parts > 1:  # the tables lie one behind the other
        first = model.constant(f"{name}.weight_first", np.arange(parts) * entries, np.int32)
        index = model.op("Add", [index, first], f"{name}.weight_index")
    table = model.constant(f"{name}.weight_prototypes", layer.prototypes.reshape(parts * entries, width))
    w = model.op("Gather", [table, index], f"{name}.weight_vectors")
    if parts > 1:
        w = model.reshape(w, [out, -1, parts, width], f"{name}.weight_dealt")
        w = model.op("Transpose", [w], f"{name}.weight_parts", perm=[0, 2, 1, 3])
    w = model.reshape(w, [out, layer.padded], f"{name}.weight_matrix")
    inputs = int(np.prod(rest))
    if inputs != layer.padded:
        w = model.head(w, [inputs], [1], f"{name}.weight_cut")
    return model.reshape(w, layer.weight_shape, f"{name}.weight_real")


def _as_float8(layer: TableConv) -> tuple[str, Tensor] | None:
    """Codes of 8 bits as the floats of ONNX that they stand for, if they stand for such: a table less in the file."""
    values = layer.levels.expand(layer.codes.shape[0], -1).gather(1, layer.codes.long())
    for kind, dtype in (("FLOAT8E4M3FN", torch.float8_e4m3fn), ("FLOAT8E5M2", torch.float8_e5m2)):
        narrow = values.to(dtype)
        if layer.levels.shape[1] > 16 and torch.equal(narrow.float(), values):
            return kind, narrow
    return None


def _code_type(layer: TableConv | ProductConv) -> str:
    """The smallest ONNX type of a layer's codes."""
    if layer.bounds is None:
        return {torch.bfloat16: "BFLOAT16", torch.float16: "FLOAT16"}.get(layer.codes.dtype, "FLOAT")
    low, high = layer.bounds
    fits = (f"{sign}{bits}" for bits in (4, 8, 16) for sign, least, greatest in (
        ("UINT", 0, 2**bits - 1), ("INT", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    ) if least <= low and high <= greatest)  # fmt: skip
    return next(fits)


def _restore(model: Model, layout: Layout, shape: list[int], rows: str, output: str) -> str:
    """`Layout.restore` of a weight, in operations."""
    out, inputs = shape[0], int(np.prod(shape[1:]))
    if layout.kind == "channel" and layout.axis % len(shape) != 0:
        axis = layout.axis % len(shape)
        others = [i for i in range(len(shape)) if i != axis]
        moved = model.reshape(rows, [shape[axis], *(shape[i] for i in others)], f"{output}.moved")
        perm = [*range(1, axis + 1), 0, *range(axis + 1, len(shape))]
        return model.op("Transpose", [moved], output, perm=perm)
    if layout.kind == "group":
        assert layout.group_size is not None
        padded = -(-inputs // layout.group_size) * layout.group_size
        if padded != inputs:
            rows = model.head(model.reshape(rows, [out, padded], f"{output}.padded"), [inputs], [1], f"{output}.matrix")
    if layout.kind == "block":
        assert layout.block_size is not None
        r, c = (n if size == -1 else min(size, n) for size, n in zip(layout.block_size, (out, inputs), strict=True))
        down, across = -(-out // r), -(-inputs // c)
        tiles = model.reshape(rows, [down, across, r, c], f"{output}.tiles")
        grid = model.op("Transpose", [tiles], f"{output}.grid", perm=[0, 2, 1, 3])
        rows = model.reshape(grid, [down * r, across * c], f"{output}.padded")
        if (down * r, across * c) != (out, inputs):
            rows = model.head(rows, [out, inputs], [0, 1], f"{output}.matrix")
    return model.reshape(rows, shape, output)


def _stored(model: Model, node: Node, layer: StoredConv, w: str) -> None:
    """`product * gain + bias`, on the layer's output grid."""
    name, x = node.name, node.inputs[0]
    w = weight_as_kept(model, name, layer, w)
    if bool((layer.gain == 1).all()) or model.pairs:  # whose scales hold it
        b = model.constant(f"{name}.bias", layer.bias)
        model.finish(layer, name, lambda out: product(model, node, layer, [x, w, b], out))
        return
    column = [-1, *[1] * (len(layer.weight_shape) - 2)]
    gain = model.constant(f"{name}.gain", layer.gain.reshape(column))
    b = model.constant(f"{name}.bias", layer.bias.reshape(column))
    scaled = model.op("Mul", [product(model, node, layer, [x, w], f"{name}.product"), gain], f"{name}.scaled")
    model.finish(layer, name, lambda out: model.op("Add", [scaled, b], out))


# ---- activations -----------------------------------------------------------------------------------------------------


def simulate(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """An activation on its levels.

    Raises:
        ValueError: ONNX has no operations for them; names the tensor, its scheme, and what to change.
    """
    assert isinstance(layer, Simulate)
    quantizer, name, x = layer.quantizer, node.name, node.inputs[0]
    scheme = quantizer.scheme
    for refusal in refusals(scheme):
        raise ValueError(f"tensor '{x}' ({scheme.describe()}): {refusal.why}; {_advice(scheme, '')}")
    shape = model.shapes[x]
    if quantizer.relu:
        x = model.op("Relu", [x], f"{name}.relu")
    if model.pairs:
        if (scheme.format, scheme.granularity.value, quantizer.dynamic) != ("e4m3fn", "tensor", False):
            raise ValueError(
                f"tensor '{x}' ({scheme.describe()}): the target takes int8 and e4m3fn with one known scale a tensor; "
                f"use format=e4m3fn granularity=tensor range=running"
            )
        float8_pair(model, quantizer, x, name)
        return
    scale, zero = None, None
    if not quantizer.format.unit_scale:
        measure = _measured if quantizer.dynamic else _kept
        scale, zero = measure(model, quantizer, x, shape, name)
    v = x if scale is None else model.op("Div", [x, scale], f"{name}.in_steps")
    ends = [_number(model, f"{name}.{k}", v) for k, v in (("min", quantizer.quant_min), ("max", quantizer.quant_max))]
    output = name if scale is None else f"{name}.levels"
    if scheme.format == "int":
        v = model.op("Round", [v], f"{name}.rounded")
        if zero is not None:
            v = model.op("Add", [v, zero], f"{name}.shifted")
        v = model.op("Clip", [v, *ends], f"{name}.clipped" if zero is not None else output)
        if zero is not None:
            v = model.op("Sub", [v, zero], output)
    else:  # ONNX Runtime's casts saturate in 8 bits, and become infinite in 16
        v = model.op("Clip", [v, *ends], f"{name}.clipped")
        v = model.cast(model.cast(v, CASTS[scheme.format], f"{name}.narrow"), "FLOAT", output)
    if scale is not None:
        model.op("Mul", [v, scale], name)


def _kept(model: Model, quantizer: FakeQuantize, x: str, shape: torch.Size, name: str) -> tuple[str, str | None]:
    """Scale and zero point (None for zeros) that calibration or training fixed."""
    like = torch.empty(shape, device="meta")
    scale, zero = (quantizer.layout.broadcast(t, like) for t in quantizer.qparams())
    shifted = bool((zero != 0).any())
    return (
        model.constant(f"{name}.scale", scale),
        model.constant(f"{name}.zero_point", zero, np.float32) if shifted else None,
    )


def _measured(model: Model, quantizer: FakeQuantize, x: str, shape: torch.Size, name: str) -> tuple[str, str | None]:
    """Scale and zero point of the tensor at hand: the observer's `measure`, then `choose_qparams`, in operations."""
    axes = model.constant(f"{name}.axes", _axes(quantizer.layout, len(shape)), np.int64)
    low, high = quantizer.quant_min, quantizer.quant_max
    affine = not quantizer.scheme.symmetric
    if not affine or quantizer.scheme.observer == "absmax":
        size = model.op("Abs", [x], f"{name}.size")
        largest = model.op("ReduceMax", [size, axes], f"{name}.largest", keepdims=1)
        if not affine:
            scale = model.op("Div", [largest, _number(model, f"{name}.high", high)], f"{name}.scale_raw")
            return _scale_or_one(model, scale, name), None
        smallest = model.op("Neg", [largest], f"{name}.smallest")
    else:
        origin = _number(model, f"{name}.zero", 0)
        smallest = model.op("ReduceMin", [x, axes], f"{name}.min_of_x", keepdims=1)
        smallest = model.op("Min", [smallest, origin], f"{name}.smallest")
        largest = model.op("ReduceMax", [x, axes], f"{name}.max_of_x", keepdims=1)
        largest = model.op("Max", [largest, origin], f"{name}.largest")
    steps = _number(model, f"{name}.steps", high - low)
    parts = [model.op("Div", [end, steps], f"{end}_step") for end in (largest, smallest)]
    scale = _scale_or_one(model, model.op("Sub", parts, f"{name}.scale_raw"), name)
    below = model.op("Round", [model.op("Div", [smallest, scale], f"{name}.below")], f"{name}.below_rounded")
    ends = [_number(model, f"{name}.zero_{k}", v) for k, v in (("min", low), ("max", high))]
    zero = model.op("Sub", [ends[0], below], f"{name}.zero_raw")
    return scale, model.op("Clip", [zero, *ends], f"{name}.zero_point")


def _scale_or_one(model: Model, scale: str, name: str) -> str:
    least, one = _number(model, f"{name}.least", SMALLEST_SCALE), _number(model, f"{name}.one", 1)
    known = model.op("Greater", [scale, least], f"{name}.scale_known")
    return model.op("Where", [known, scale, one], f"{name}.scale")


def _axes(layout: Layout, rank: int) -> list[int]:
    """The axes that share a scale."""
    if layout.kind == "token":
        return [rank - 1] if rank < 4 else list(range(1, rank))
    return [i for i in range(rank) if layout.kind != "channel" or i != layout.axis % rank]


def _number(model: Model, name: str, value: float) -> str:
    return model.constant(name, value, np.float32)
