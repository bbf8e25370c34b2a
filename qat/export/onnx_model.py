"""An ONNX model under construction: operations, initializers, and tensors on the grids of an integer network.

A grid narrower than its type (4 bits in uint8) is a Clip on the integers after QuantizeLinear, which leaves the pattern
that engines fuse whole. Signed activations are stored higher in uint8, from 0 on, zero point and all: the same real
numbers, but engines have integer kernels only where a layer's input and output share a type.

Equal numbers are one initializer (tensors are not: ONNX Runtime rewrites a layer's weights and zero points in place,
and fails on those of two), attributes with their default value and types of inner tensors are left out: in a
small network they are as many bytes as a tenth of the weights.

For a target of `pairs` (TensorRT) a tensor on a grid is a pair instead, QuantizeLinear to int8 with zero point 0 and
DequantizeLinear, and every operation takes and returns real numbers: such an engine refuses other types, zero points
and whatever stands inside of a pair.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qat.numerics.packing import pack_bits
from qat.runtime.grid import Quantize
from qat.runtime.layers import RuntimeLayer
from qat.runtime.network import IntegerNetwork, Node
from qat.runtime.operations import Dequantize
from qat.targets import TARGETS


def require_onnx() -> Any:
    """The `onnx` package; an ImportError says how to install it."""
    try:
        import onnx
    except ImportError as error:
        raise ImportError("exporting ONNX needs the packages of qat[export]: pip install 'qat[export]'") from error
    return onnx


class Model:
    """A model under construction.

    Args:
        network: what is written.
        tensors: every tensor of it, for the example.
        symbolic: every tensor's shape, None for sizes that depend on the batch.
    """

    def __init__(
        self, network: IntegerNetwork, tensors: dict[str, Tensor], symbolic: dict[str, list[int | None]]
    ) -> None:
        self.onnx = require_onnx()
        self.network, self.symbolic, self.pairs = network, symbolic, written_in_pairs(network.info)
        self.shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self._names: dict[tuple[int, tuple[int, ...], bytes], str] = {}
        self._same: dict[str, str] = {}

    def op(self, kind: str, inputs: list[str], output: str, unread: int = 0, **attributes: Any) -> str:
        """Append an operation, which is called as its result is; returns that name. `unread` results stand in front."""
        inputs = [self._same.get(name, name) for name in inputs]
        outputs = [*(f"{output}.unread{i}" for i in range(unread)), output]
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, name=output, **attributes))
        return output

    def leave_out_unread(self) -> None:
        """Take away operations and numbers that nothing reads: what stands in the place of another leaves some."""
        wanted, nodes = set(self.network.outputs), list[Any]()
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                nodes.insert(0, node)
                wanted |= set(node.input)
        self.nodes = nodes
        self.initializers = {name: tensor for name, tensor in self.initializers.items() if name in wanted}

    def same(self, name: str, source: str) -> None:
        """Let `name` stand for `source`, without an operation where nobody outside asks for it."""
        if name in self.network.outputs:
            self.op("Identity", [source], name)
        else:
            self._same[name] = self._same.get(source, source)

    def grid(self, name: str) -> Quantize | None:
        """The grid of a tensor that the file holds as integers; None where it holds real numbers."""
        return None if self.pairs else self.network.grid(name)

    def number(self, name: str, value: float) -> tuple[float, Any]:
        """An integer of the tensor `name`'s grid, as the file has it, and its type; without a grid a real number."""
        grid = self.network.grid(name)
        if grid is None:
            return value, np.float32
        if self.pairs:
            return float(grid.dequantize(torch.tensor(value))), np.float32
        dtype, offset = storage(grid)
        return value + offset, dtype

    def constant(self, name: str, value: Any, dtype: Any = None) -> str:
        """Add an initializer; returns its name. Of equal numbers, or lists of sizes, there is one."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        array = array if dtype is None else array.astype(dtype)
        tensor = self.onnx.numpy_helper.from_array(array.copy(order="C"), name)
        if array.size == 1 or array.dtype == np.int64:
            name = self._names.setdefault((tensor.data_type, tuple(tensor.dims), tensor.raw_data), name)
        self.initializers.setdefault(name, tensor)
        return name

    def typed(self, name: str, value: Tensor, kind: str) -> str:
        """Add an initializer of the ONNX type `kind`, which numpy may not have; returns its name."""
        value = value.detach().cpu().contiguous()
        if kind in ("UINT4", "INT4"):
            data = pack_bits(value.int() & 15, 4).numpy()
        elif kind == "BFLOAT16":
            data = value.view(torch.int16).numpy()
        elif kind.startswith("FLOAT8"):
            data = value.view(torch.uint8).numpy()
        else:
            data = value.numpy().astype({"FLOAT": "float32"}.get(kind, kind.lower()))
        tensor = self.onnx.helper.make_tensor(
            name, getattr(self.onnx.TensorProto, kind), list(value.shape), data.tobytes(), raw=True
        )
        self.initializers[name] = tensor
        return name

    def integers(self, name: str, value: Tensor, low: int, high: int) -> str:
        """Add integers between `low` and `high` in the smallest type that holds them; returns the name of the tensor.

        Four bits are unpacked to eight by a Cast of the initializer, which engines do as they load the file: their
        kernels take whole bytes.
        """
        sign = "UINT" if low >= 0 else "INT"
        if not fits_four_bits(low, high):
            return self.typed(name, value, f"{sign}{8 if high - low < 256 else 16}")
        return self.cast(self.typed(name, value, f"{sign}4"), f"{sign}8", f"{name}_bytes")

    def cast(self, x: str, kind: str, output: str, **attributes: Any) -> str:
        """`x` as the ONNX type `kind`."""
        return self.op("Cast", [x], output, to=getattr(self.onnx.TensorProto, kind), **attributes)

    def reshape(self, x: str, shape: list[int], output: str) -> str:
        """`x` in another shape."""
        return self.op("Reshape", [x, self.constant(f"{output}.shape", shape, np.int64)], output)

    def head(self, x: str, sizes: list[int], axes: list[int], output: str) -> str:
        """The first `sizes` entries of `x` along `axes`."""
        columns = {"starts": [0] * len(sizes), "ends": sizes, "axes": axes}
        return self.op("Slice", [x, *(self.constant(f"{output}.{k}", v, np.int64) for k, v in columns.items())], output)

    def in_float(self, x: str, output: str) -> str:
        """`x`; if it is dequantized, `held`, where engines would compute with its integers, and not as the file says.

        OpenVINO rounds averages and what is clamped to bytes, also where no QuantizeLinear does, pads with bytes of 0,
        and takes a zero point off a sum once. ONNX Runtime makes a softmax of bytes that rounds down, and a quarter of
        its integers wrong.
        """
        return x if self.pairs or not self._dequantized(x) else self.held(x, output)

    def held(self, x: str, output: str) -> str:
        """`x` behind a Max that changes nothing, and behind which no engine moves scales and zero points."""
        return self.op("Max", [x, self.constant(f"{output}.lowest", np.finfo(np.float32).min)], output)

    def _dequantized(self, name: str) -> bool:
        """Whether a tensor is one of integers, dequantized."""
        layers = {node.name: self.network.layer(node.name) for node in self.network.nodes}
        return isinstance(layers.get(name), Dequantize)

    def quantize(self, x: str, grid: Quantize, output: str) -> str:
        """Real numbers to integers of `grid`; to real numbers on it, where the file is one of pairs."""
        if self.pairs:
            return self._pair(x, grid, output)
        dtype, offset = storage(grid)
        low, high = grid.quant_min + offset, grid.quant_max + offset
        info = np.iinfo(dtype)
        if info.bits > 8:  # engines have no Clip on 16-bit integers: real numbers are clipped instead
            ends = (int(grid.zero_point) if grid.relu else grid.quant_min, grid.quant_max)
            if ends != (info.min, info.max):
                limits = [grid.scale * (end - grid.zero_point) for end in ends]
                bounds = [self.constant(f"{output}.real_{k}", v) for k, v in zip(("min", "max"), limits, strict=True)]
                x = self.op("Clip", [x, *bounds], f"{output}.clipped")
        elif grid.relu:
            low = int(grid.zero_point) + offset
        inputs = [x, *self.grid_constants(grid, output)]
        if (low, high) == (info.min, info.max) or info.bits > 8:
            return self.op("QuantizeLinear", inputs, output)
        wide = self.op("QuantizeLinear", inputs, f"{output}.wide")
        bounds = [self.constant(f"{output}.{k}", v, dtype) for k, v in (("min", low), ("max", high))]
        return self.op("Clip", [wide, *bounds], output)

    def _pair(self, x: str, grid: Quantize, output: str) -> str:
        """Real numbers on `grid`; its ends, where they are not those of int8, in front of the pair."""
        zero, high = int(grid.zero_point), grid.quant_max
        low = max(grid.quant_min, zero) if grid.relu else grid.quant_min
        if zero or low < -128 or high > 127:
            raise ValueError(
                f"tensor '{output}' lies on integers from {low} to {high} with zero point {zero}, and the target takes "
                f"int8 with zero point 0; give it bits=8 symmetric=true signed=true, or leave out export.formats=onnx"
            )
        if (low, high) == (0, 127):
            x = self.op("Relu", [x], f"{output}.relu")
        elif (low, high) != (-128, 127):
            ends = [self.constant(f"{output}.{k}", grid.scale * v) for k, v in (("min", low), ("max", high))]
            x = self.op("Clip", [x, *ends], f"{output}.clipped")
        zeros = self.typed(f"{output}.zero_point", torch.zeros((), dtype=torch.int8), "INT8")
        constants = [self.constant(f"{output}.scale", grid.scale), zeros]
        quantized = self.op("QuantizeLinear", [x, *constants], f"{output}.q")
        return self.op("DequantizeLinear", [quantized, *constants], output)

    def grid_constants(self, grid: Quantize, name: str) -> list[str]:
        """Scale and zero point of the tensor `name` as initializers."""
        dtype, offset = storage(grid)
        zero = int(grid.zero_point) + offset
        return [self.constant(f"{name}.scale", grid.scale), self.constant(f"{dtype}_{zero}", zero, dtype)]

    def real(self, name: str, output: str, source: str | None = None) -> str:
        """Real numbers of the integer tensor `name`, read from `source` if that is given; returns their name."""
        if self.pairs:
            return name
        grid = self.network.grid(name)
        assert grid is not None
        return self.op("DequantizeLinear", [source or name, *self.grid_constants(grid, name)], output)

    def as_float(self, node: Node, emit: Callable[[str, str], str]) -> None:
        """Write `emit(input, output)`, which keeps integers as they are, in float32.

        For 16-bit integers, which no engine takes there and float32 holds exactly.
        """
        grid = self.network.grid(node.inputs[0])
        assert grid is not None
        x = self.op("Cast", [node.inputs[0]], f"{node.name}.in", to=self.onnx.TensorProto.FLOAT)
        y = emit(x, f"{node.name}.out")
        self.op("Cast", [y], node.name, to=self.onnx.helper.np_dtype_to_tensor_dtype(storage(grid)[0]))

    def finish(self, layer: RuntimeLayer, name: str, emit: Callable[[str], str]) -> None:
        """Let `emit(output name)` write the operation, then put it on the layer's output grid."""
        if layer.output is None:
            emit(name)
        else:
            self.quantize(emit(f"{name}.float"), layer.output, name)


def written_in_pairs(info: Mapping[str, Any]) -> bool:
    """Whether the file of a network with such an `info` is one of pairs: its target says so."""
    return TARGETS[info.get("quant", {}).get("target", "generic")].pairs


def fits_four_bits(low: int, high: int) -> bool:
    """Whether one of ONNX's 4-bit types holds all integers from `low` to `high`."""
    return low >= -8 and high <= (15 if low >= 0 else 7)


def storage(grid: Quantize) -> tuple[np.dtype[Any], int]:
    """The integer type of a grid in ONNX, and what is added to its integers there."""
    if grid.dtype == torch.int8:
        return np.dtype(np.uint8), -grid.quant_min  # no more than that: engines add it up in float32, and round
    if grid.dtype == torch.int32:
        return np.dtype(np.uint16), 0
    return torch.zeros(0, dtype=grid.dtype).numpy().dtype, 0
