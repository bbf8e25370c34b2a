"""Integer network -> ONNX, with QuantizeLinear and DequantizeLinear around integer initializers.

Every layer is written by one function of EMIT. BatchNorm is folded already, so engines find `DequantizeLinear ->
Conv -> QuantizeLinear` and run it in integers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.export.files import write_export
from qat.export.onnx_bilinear import integer_bilinear, outer
from qat.export.onnx_conv import float_conv, integer_conv
from qat.export.onnx_functions import function
from qat.export.onnx_lookup import look_up
from qat.export.onnx_model import Model, storage
from qat.export.onnx_moves import constant, integer_matmul, move
from qat.export.onnx_stored import product_conv, simulate, table_conv
from qat.export.rounding import MOVES
from qat.refusals import Refusals
from qat.runtime import operations as ops
from qat.runtime import stored
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv, IntegerConv, RuntimeLayer
from qat.runtime.lookup import LooksUp, LookUp, ProductLookUp, TableLookUp
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.network import IntegerNetwork, Node
from qat.runtime.outer import IntegerBilinear, Outer
from qat.runtime.recurrent import Recurrent

OPSET = 21


def _quantize_input(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert layer.output is not None
    model.quantize(node.inputs[0], layer.output, node.name)


def _dequantize(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """Integers to real numbers.

    In front of a layer that is computed in float it is no DequantizeLinear: between that and a QuantizeLinear behind,
    ONNX Runtime rounds float weights to 8 bits (WeightBiasQuantization) and fuses an integer layer. It moves a
    DequantizeLinear behind what moves values.
    """
    if model.pairs:
        model.same(node.name, node.inputs[0])
        return
    readers = _readers(model.network, node.name)
    if not _reaches(model.network, node.name, (FloatConv, stored.StoredConv)):
        model.real(node.inputs[0], node.name, _rounded(model, node.inputs[0], readers))
        return
    grid = model.network.grid(node.inputs[0])
    assert grid is not None
    q = model.cast(node.inputs[0], "FLOAT", f"{node.name}.q")
    zero = model.constant(f"{node.name}.zero_point", grid.zero_point + storage(grid)[1], np.float32)
    centred = model.op("Sub", [q, zero], f"{node.name}.centred")
    model.op("Mul", [centred, model.constant(f"{node.name}.scale", grid.scale)], node.name)


def _readers(network: IntegerNetwork, name: str) -> list[RuntimeLayer]:
    return [network.layer(node.name) for node in network.nodes if name in node.inputs]


def _reaches(network: IntegerNetwork, name: str, kinds: tuple[type[RuntimeLayer], ...]) -> bool:
    """Whether a layer of one of these kinds reads a tensor, moved or not."""
    readers = [(node, network.layer(node.name)) for node in network.nodes if name in node.inputs]
    return any(
        isinstance(layer, kinds) or (isinstance(layer, MOVES) and _reaches(network, node.name, kinds))
        for node, layer in readers
    )


def _rounded(model: Model, name: str, readers: list[RuntimeLayer]) -> str:
    """The integer tensor `name`; where OpenVINO would leave it unrounded, behind an Expand to the size that it has.

    OpenVINO runs a convolution and the addition of what another layer made as one kernel, and does not round in
    between ("drop rounding one special residual pattern" in its source): a quarter of the sums are then off by a step.
    It keeps the Expand, which stands in the way, as long as the batch is dynamic. ONNX Runtime drops it.
    """
    network, made_by = model.network, name
    nodes = {node.name: node for node in network.nodes}
    adds = any(isinstance(r, ops.Add) or (isinstance(r, ops.Function) and r.name == "add") for r in readers)
    while made_by in nodes and isinstance(network.layer(made_by), ops.Relu):
        made_by = nodes[made_by].inputs[0]
    convolves = made_by in nodes and isinstance(network.layer(made_by), IntegerConv | FloatConv | stored.StoredConv)
    sizes = model.symbolic[name]
    if not adds or not convolves or len(sizes) < 3 or len(_readers(network, name)) > 1 or None in sizes[1:]:
        return name
    shape = model.constant(f"{name}.shape", [1, *sizes[1:]], np.int64)
    return model.op("Expand", [name, shape], f"{name}.rounded")


def _simple(kind: str) -> Callable[[Model, Node, RuntimeLayer], None]:
    def emit(model: Model, node: Node, layer: RuntimeLayer) -> None:
        model.finish(layer, node.name, lambda out: model.op(kind, list(node.inputs), out))

    return emit


def _affine(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Affine)
    shape = [1, -1, *[1] * (len(model.shapes[node.inputs[0]]) - 2)]
    factor = model.constant(f"{node.name}.factor", layer.factor.reshape(shape))
    offset = model.constant(f"{node.name}.offset", layer.offset.reshape(shape))
    product = model.op("Mul", [node.inputs[0], factor], f"{node.name}.product")
    model.finish(layer, node.name, lambda out: model.op("Add", [product, offset], out))


def _relu(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Relu)
    grid = model.grid(node.inputs[0])
    if grid is None:
        _simple("Relu")(model, node, layer)
        return
    dtype, offset = storage(grid)
    if dtype.itemsize > 1:
        zero = model.constant(f"{node.name}.zero", layer.settings["zero"], np.float32)
        model.as_float(node, lambda x, out: model.op("Max", [x, zero], out))
    else:
        zero = model.constant(f"{node.name}.zero", layer.settings["zero"] + offset, dtype)
        model.op("Clip", [node.inputs[0], zero], node.name)


def _mean(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Mean)
    x, keepdim = node.inputs[0], layer.settings["keepdim"]
    rank = len(model.shapes[x])
    dims = {d % rank for d in layer.settings["dims"]}
    pooled = rank > 2 and dims == set(range(2, rank)) and _pools(model, x, layer.output)  # in integers by engines
    image = rank == 3
    if image:  # as an image one pixel high: OpenVINO's mean of bytes in three dimensions reads beyond them
        x = model.op("Unsqueeze", [x, model.constant(f"{node.name}.height", [2], np.int64)], f"{node.name}.image")
        dims = {d for d in dims if d < 2} | {2} | ({3} if 2 in dims else set())

    def emit(out: str) -> str:
        if pooled:
            return model.op("GlobalAveragePool", [x], out)
        axes = model.constant(f"{node.name}.axes", sorted(dims), np.int64)
        return model.op("ReduceMean", [x, axes], out, keepdims=int(keepdim))

    if pooled and not keepdim:
        model.finish(layer, f"{node.name}.pooled", emit)
        model.reshape(f"{node.name}.pooled", [0, -1], node.name)
    elif image and keepdim:
        model.finish(layer, f"{node.name}.mean", emit)
        height = model.constant(f"{node.name}.height", [2], np.int64)
        model.op("Squeeze", [f"{node.name}.mean", height], node.name)
    else:
        model.finish(layer, node.name, emit)


def _pools(model: Model, x: str, output: Quantize | None) -> bool:
    """Whether ONNX Runtime's integer mean takes these scales: of others it says `out of computation range` as it runs.

    The mean of what was normalized is next to nought, and so is its scale.
    """
    made = None if x in model.network.inputs else model.network.layer(x)
    grid = made.grid if isinstance(made, ops.Dequantize) else model.grid(x)
    if grid is None or output is None:
        return True
    return 2.0**-32 <= float(grid.scale) / (float(output.scale) * model.shapes[x][2:].numel()) < 256


def _window(layer: ops.Average | ops.MaxPool) -> dict[str, Any]:
    s = layer.settings
    return {"kernel_shape": s["kernel"], "strides": s["stride"], "pads": s["padding"] * 2,
            "ceil_mode": int(s["ceil_mode"])}  # fmt: skip


def _max_pool(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.MaxPool)
    attributes = _window(layer) | {"dilations": layer.settings["dilation"]}
    grid = model.grid(node.inputs[0])
    if grid is not None and storage(grid)[0].itemsize > 1:
        model.as_float(node, lambda x, out: model.op("MaxPool", [x], out, **attributes))
    else:
        model.op("MaxPool", list(node.inputs), node.name, **attributes)


def _average_pool(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Average)
    s, x = layer.settings, node.inputs[0]
    attributes = _window(layer) | {"count_include_pad": int(s["count_include_pad"])}
    counted = s["count_include_pad"] and any(s["padding"])
    if counted and layer.output is not None and not s["ceil_mode"]:
        x, attributes["pads"] = _padded(model, node, s["padding"])
    if layer.output is None or (counted and x == node.inputs[0]):
        x = model.in_float(x, f"{node.name}.in")
    model.finish(layer, node.name, lambda out: model.op("AveragePool", [x], out, **attributes))


def _padded(model: Model, node: Node, padding: list[int]) -> tuple[str, list[int]]:
    """What an average pooling reads, and how that is still to be padded.

    Integers are padded by an operation of their own: OpenVINO pads bytes with 0, whatever their zero point is.
    """
    x = node.inputs[0]
    made = next((made for made in model.network.nodes if made.name == x), None)
    grid = None
    if made is not None and isinstance(model.network.layer(x), ops.Dequantize):
        source = made.inputs[0]
        grid = model.grid(source)
    if grid is None or storage(grid)[0].itemsize > 1:
        return x, padding * 2
    zero, dtype = model.number(source, int(grid.zero_point))
    pads = model.constant(f"{node.name}.pads", [0, 0, *padding] * 2, np.int64)
    filled = [source, pads, model.constant(f"{node.name}.zero", zero, dtype)]
    wide = model.op("Pad", filled, f"{node.name}.padded")
    return model.real(source, f"{node.name}.padded_real", wide), [0] * 2 * len(padding)


def _reshape(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Reshape)
    model.reshape(node.inputs[0], layer.settings["shape"], node.name)


def _permute(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Permute)
    rank = len(layer.settings["dims"])
    model.op("Transpose", [node.inputs[0]], node.name, perm=[d % rank for d in layer.settings["dims"]])


def _slice(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Slice)
    slices = layer.settings["slices"]
    largest = np.iinfo(np.int64).max
    columns = {
        "starts": [start for _, start, _, _ in slices],
        "ends": [largest if stop is None else stop for _, _, stop, _ in slices],
        "axes": [dim for dim, _, _, _ in slices],
        "steps": [step for _, _, _, step in slices],
    }
    bounds = [model.constant(f"{node.name}.{k}", v, np.int64) for k, v in columns.items()]
    model.op("Slice", [node.inputs[0], *bounds], node.name)


def _pad(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Pad)
    rank, pads = len(model.shapes[node.inputs[0]]), layer.settings["pads"]
    pads = [[0, 0]] * (rank - len(pads)) + pads
    flat = [before for before, _ in pads] + [after for _, after in pads]
    grid = model.grid(node.inputs[0])
    wide = grid is not None and storage(grid)[0].itemsize > 1
    mode = layer.settings.get("mode", "constant")
    if mode == "circular":  # slices, as OpenVINO has no Pad that wraps
        if wide:
            model.as_float(node, lambda x, out: _wrap(model, node.name, x, pads, out))
        else:
            _wrap(model, node.name, node.inputs[0], pads, node.name)
        return
    shape = model.constant(f"{node.name}.pads", flat, np.int64)
    if mode != "constant":
        onnx_mode = {"reflect": "reflect", "replicate": "edge"}[mode]
        if wide:
            model.as_float(node, lambda x, out: model.op("Pad", [x, shape], out, mode=onnx_mode))
        else:
            model.op("Pad", [node.inputs[0], shape], node.name, mode=onnx_mode)
        return
    filling, dtype = model.number(node.inputs[0], layer.settings["value"])
    value = model.constant(f"{node.name}.value", filling, np.float32 if wide else dtype)
    if wide:
        model.as_float(node, lambda x, out: model.op("Pad", [x, shape, value], out))
    else:
        model.op("Pad", [node.inputs[0], shape, value], node.name)


def _wrap(model: Model, name: str, x: str, pads: list[list[int]], output: str) -> str:
    """`x` with its far end in front of it and its near end behind, along each axis."""
    axes = [axis for axis, (before, after) in enumerate(pads) if before or after]
    if not axes:
        return model.op("Identity", [x], output)

    def part(x: str, axis: int, start: int, end: int, label: str) -> str:
        bounds = [model.constant(f"{label}.{i}", [v], np.int64) for i, v in enumerate((start, end, axis))]
        return model.op("Slice", [x, *bounds], label)

    for axis in axes:
        before, after = pads[axis]
        parts = [part(x, axis, -before, np.iinfo(np.int64).max, f"{name}.before{axis}")] if before else []
        parts += [x] + ([part(x, axis, 0, after, f"{name}.after{axis}")] if after else [])
        x = model.op("Concat", parts, output if axis == axes[-1] else f"{name}.wrapped{axis}", axis=axis)
    return x


def _concat(model: Model, node: Node, layer: RuntimeLayer) -> None:
    assert isinstance(layer, ops.Concat)
    model.op("Concat", list(node.inputs), node.name, axis=layer.settings["dim"])


EMIT: dict[type[RuntimeLayer], Callable[[Model, Node, Any], None]] = {
    IntegerConv: integer_conv,
    FloatConv: float_conv,
    stored.TableConv: table_conv,
    stored.ProductConv: product_conv,
    stored.Simulate: simulate,
    LookUp: look_up,
    TableLookUp: look_up,
    ProductLookUp: look_up,
    Outer: outer,
    IntegerBilinear: integer_bilinear,
    ops.QuantizeInput: _quantize_input,
    ops.Dequantize: _dequantize,
    ops.Add: _simple("Add"),
    ops.Affine: _affine,
    ops.Relu: _relu,
    ops.Average: _average_pool,
    ops.Mean: _mean,
    ops.MaxPool: _max_pool,
    ops.Reshape: _reshape,
    ops.Permute: _permute,
    ops.Slice: _slice,
    ops.Pad: _pad,
    ops.Concat: _concat,
    ops.Function: function,
    ops.Move: move,
    ops.Constant: constant,
    IntegerMatmul: integer_matmul,
}


@torch.no_grad()
def save_onnx(network: IntegerNetwork, path: Path, example_inputs: tuple[Tensor, ...]) -> None:
    """Write `network` to `path` as an ONNX model with a dynamic batch dimension.

    Args:
        network: from `qat.lower` or `qat.load`.
        path: where; an earlier file there survives if writing fails.
        example_inputs: float32 (indices: integers), with a batch dimension first; other dimensions are fixed to
            theirs.

    Raises:
        ImportError: the `onnx` package is missing.
        OSError: the file cannot be written.
        ValueError: layers have no form in ONNX; names each.
    """
    refuse_loops(network)
    tensors = network.run(*example_inputs)
    symbolic = _symbolic(network, tensors, example_inputs)
    model = Model(network, tensors, symbolic)
    onnx = model.onnx
    refusals = Refusals()
    for node in network.nodes:
        with refusals.noted():
            EMIT[type(network.layer(node.name))](model, node, network.layer(node.name))
    refusals.raise_any()
    model.leave_out_unread()

    # bags and their samples differ in number, also where the example has as many of both
    ragged = any(isinstance(layer, LooksUp) and layer.ragged for layer in network.layers.values())

    def value(name: str) -> Any:
        grid = model.grid(name)
        dtype = storage(grid)[0] if grid is not None else np.dtype(str(tensors[name].dtype).removeprefix("torch."))
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        batch = None if ragged else next((t.shape[0] for t in example_inputs), None)
        sizes = zip(tensors[name].shape, symbolic[name], strict=True)
        return onnx.helper.make_tensor_value_info(
            name, kind, ["batch" if fixed is None and n == batch else fixed for n, fixed in sizes]
        )

    graph = onnx.helper.make_graph(
        model.nodes,
        "qat",
        [value(name) for name in network.inputs],
        [value(name) for name in network.outputs],
        list(model.initializers.values()),
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], producer_name="qat")
    proto.ir_version = 10
    onnx.helper.set_model_props(proto, {k: json.dumps(v, sort_keys=True) for k, v in sorted(network.info.items())})
    onnx.checker.check_model(proto, full_check=True)
    write_export(path, proto.SerializeToString(deterministic=True))


def refuse_loops(network: IntegerNetwork) -> None:
    """Refuse recurrent layers, with a ValueError that names them all."""
    layers = ((node.name, network.layer(node.name)) for node in network.nodes)
    found = [f"'{name}' ({layer.form.kind})" for name, layer in layers if isinstance(layer, Recurrent)]
    if found:
        raise ValueError(
            f"layer{'s' * (len(found) > 1)} {', '.join(found)} cannot be written to ONNX: its recurrent operators have "
            f"no quantized states, so the file would not compute what was trained; give export formats=['int8']"
        )


def _symbolic(
    network: IntegerNetwork, tensors: dict[str, Tensor], inputs: tuple[Tensor, ...]
) -> dict[str, list[int | None]]:
    """Every tensor's shape, None for sizes that depend on the batch, as twice the batch shows."""
    try:
        twice = network.run(*(torch.cat([x, x]) for x in inputs))
    except RuntimeError:  # some size is written into the network: take the first dimension for the batch
        return {name: [None, *tensor.shape[1:]][: tensor.dim()] for name, tensor in tensors.items()}
    return {
        name: [a if a == b else None for a, b in zip(tensor.shape, twice[name].shape, strict=True)]
        for name, tensor in tensors.items()
    }
