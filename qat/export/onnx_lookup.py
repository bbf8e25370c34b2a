"""Look-ups in ONNX: Gather by integer indices, of codes where the table is integers."""

from typing import Any

import numpy as np

from qat.export.onnx_model import Model
from qat.export.onnx_stored import product_weight, table_weight
from qat.numerics.granularity import rows_of
from qat.runtime.layers import RuntimeLayer
from qat.runtime.lookup import LookUp, ProductLookUp, TableLookUp
from qat.runtime.network import Node

LEAST = float(np.finfo(np.float32).min)


def look_up(model: Model, node: Node, layer: RuntimeLayer) -> None:
    """Gather rows and, for bags, reduce them."""
    assert isinstance(layer, LookUp | TableLookUp | ProductLookUp)
    pooling = layer.pooling
    if pooling is None:
        model.finish(layer, node.name, lambda out: _rows(model, node, layer, out))
        return
    rows = _rows(model, node, layer, f"{node.name}.rows")
    model.finish(layer, node.name, lambda out: _Bags(model, node, pooling).reduce(rows, out))


def _rows(model: Model, node: Node, layer: LookUp | TableLookUp | ProductLookUp, output: str) -> str:
    """Real rows of the table; of an integer table the codes are looked up, and only they are dequantized."""
    name, indices = node.name, node.inputs[0]
    if not isinstance(layer, LookUp):
        make: Any = table_weight if isinstance(layer, TableLookUp) else product_weight
        return model.op("Gather", [make(model, name, layer), indices], output)
    if layer.weight_bounds is None:
        return model.op("Gather", [model.constant(f"{name}.weight", layer.weight), indices], output)
    rows, values = layer.weight.shape
    codes, scale, zero = layer.weight, layer.weight_scale.unsqueeze(-1), layer.weight_zero_point.unsqueeze(-1)
    if layer.group_size is not None:
        codes = rows_of(codes, layer.group_size).reshape(rows, -1, layer.group_size)
    dtype = "uint16" if codes.element_size() > 2 else None
    found = model.op("Gather", [model.constant(f"{name}.weight", codes, dtype), indices], f"{name}.codes")
    real = model.cast(found, "FLOAT", f"{name}.levels")
    if bool((zero != 0).any()):
        zeros = model.constant(f"{name}.weight_zero_point", zero, np.float32)
        zeros = model.op("Gather", [zeros, indices], f"{name}.zero_points")
        real = model.op("Sub", [real, zeros], f"{name}.centred")
    scales = model.op("Gather", [model.constant(f"{name}.weight_scale", scale), indices], f"{name}.scales")
    if layer.group_size is None:
        return model.op("Mul", [real, scales], output)
    rank = len(model.shapes[indices])
    real = model.op("Mul", [real, scales], f"{name}.groups")
    if codes[0].numel() == values:
        return model.reshape(real, [0] * rank + [values], output)
    filled = model.reshape(real, [0] * rank + [-1], f"{name}.filled")
    return model.head(filled, [values], [rank], output)


class _Bags:
    """The rows of each bag, reduced to one: `qat.runtime.lookup.pool` in operations."""

    def __init__(self, model: Model, node: Node, pooling: dict[str, Any]) -> None:
        self.model, self.name, self.pooling = model, node.name, pooling
        self.indices, *others = node.inputs
        self.given = dict(zip([k for k in ("offsets", "weighted") if pooling[k]], others, strict=True))
        self.by_offsets = "offsets" in self.given
        if self.by_offsets:
            self.places, self.bags = self._segments()

    def reduce(self, rows: str, output: str) -> str:
        """Rows [bags, size, values], or [samples, values] with offsets -> [bags, values]."""
        model, mode, padding = self.model, self.pooling["mode"], self.pooling["padding_idx"]
        axis = 1 if self.by_offsets else 2
        if "weighted" in self.given:
            weights = _unsqueeze(model, self.given["weighted"], axis, f"{self.name}.weights")
            rows = model.op("Mul", [rows, weights], f"{self.name}.weighted")
        if padding is None and not self.by_offsets:
            kind = {"sum": "ReduceSum", "mean": "ReduceMean", "max": "ReduceMax"}[mode]
            return model.op(kind, [rows, self._ints("axis", [1])], output, keepdims=0)
        counted = self._counted(axis)
        total = self._sum(counted, f"{self.name}.count")
        zero = self._float("zero", 0)
        if mode == "max":
            counts = model.op("Greater", [counted, zero], f"{self.name}.counts")
            rows = model.op("Where", [counts, rows, self._float("least", LEAST)], f"{self.name}.of_bags")
            largest = self._max(rows, f"{self.name}.largest")
            filled = model.op("Greater", [total, zero], f"{self.name}.not_empty")
            return model.op("Where", [filled, largest, zero], output)
        rows = rows if padding is None else model.op("Mul", [rows, counted], f"{self.name}.of_bags")
        if mode == "sum":
            return self._sum(rows, output)
        summed = self._sum(rows, f"{self.name}.sum")
        at_least_one = model.op("Max", [total, self._float("one", 1)], f"{self.name}.divisor")
        return model.op("Div", [summed, at_least_one], output)

    def _counted(self, axis: int) -> str:
        """1 where a sample counts, 0 where it is padding; one column."""
        model, padding = self.model, self.pooling["padding_idx"]
        index = model.cast(self.indices, "INT64", f"{self.name}.index")
        absent = model.op("Equal", [index, self._ints("padding", -1 if padding is None else padding)],
                          f"{self.name}.is_padding")  # fmt: skip
        present = model.op("Not", [absent], f"{self.name}.is_sample")
        return _unsqueeze(model, model.cast(present, "FLOAT", f"{self.name}.present"), axis, f"{self.name}.counted")

    def _segments(self) -> tuple[str, str]:
        """The bag of every sample, [samples, 1], and the number of bags, [1]: int64."""
        model, name = self.model, self.name
        starts = model.cast(self.given["offsets"], "INT64", f"{name}.offsets")
        if self.pooling["include_last_offset"]:
            ends = [self._ints(k, v) for k, v in (("first", [0]), ("last", [-1]), ("along", [0]))]
            starts = model.op("Slice", [starts, *ends], f"{name}.starts")
        count = model.op("Size", [self.indices], f"{name}.samples")
        places = model.op("Range", [self._ints("from", 0), count, self._ints("by", 1)], f"{name}.places")
        column = _unsqueeze(model, places, 1, f"{name}.place")
        row = _unsqueeze(model, starts, 0, f"{name}.start")
        begun = model.op("GreaterOrEqual", [column, row], f"{name}.begun")
        begun = model.cast(begun, "INT64", f"{name}.begun_bags")
        number = model.op("ReduceSum", [begun, self._ints("axis", [1])], f"{name}.number", keepdims=1)
        return (
            model.op("Sub", [number, self._ints("one_bag", 1)], f"{name}.bag"),
            model.op("Shape", [starts], f"{name}.bags"),
        )

    def _sum(self, x: str, output: str) -> str:
        if not self.by_offsets:
            return self.model.op("ReduceSum", [x, self._ints("axis", [1])], output, keepdims=0)
        return self._scatter(x, 0.0, "add", output)

    def _max(self, x: str, output: str) -> str:
        if not self.by_offsets:
            return self.model.op("ReduceMax", [x, self._ints("axis", [1])], output, keepdims=0)
        return self._scatter(x, LEAST, "max", output)

    def _scatter(self, x: str, start: float, reduction: str, output: str) -> str:
        """Rows into their bags, which begin as `start`."""
        model = self.model
        shape = model.op("Shape", [x], f"{output}.shape")
        width = model.op("Slice", [shape, self._ints("second", [1]), self._ints("third", [2])], f"{output}.width")
        size = model.op("Concat", [self.bags, width], f"{output}.size", axis=0)
        value = model.onnx.helper.make_tensor("value", model.onnx.TensorProto.FLOAT, [1], [start])
        empty = model.op("ConstantOfShape", [size], f"{output}.empty", value=value)
        return model.op("ScatterND", [empty, self.places, x], output, reduction=reduction)

    def _ints(self, name: str, value: Any) -> str:
        return self.model.constant(f"{self.name}.{name}", value, np.int64)

    def _float(self, name: str, value: float) -> str:
        return self.model.constant(f"{self.name}.{name}", value, np.float32)


def _unsqueeze(model: Model, x: str, axis: int, output: str) -> str:
    return model.op("Unsqueeze", [x, model.constant(f"{output}.axis", [axis], np.int64)], output)
