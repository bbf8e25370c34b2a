"""An integer network in torch's reference quantized operations, for engines that read those: Inductor, ExecuTorch.

Every tensor on a grid is what `quantized_decomposed.quantize_per_tensor` made, and every reader dequantizes it for
itself, around operations on real numbers: the form that engines match and turn into integer kernels. Torch's quantize
operation multiplies by `1 / scale`, where the definition divides: next to a tie an integer may be one step off.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from qat.refusals import Refusals
from qat.runtime import operations as ops
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv, IntegerConv, RuntimeLayer, convolve
from qat.runtime.lookup import LookUp
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.network import IntegerNetwork
from qat.runtime.outer import IntegerBilinear, Outer, pairs

QUANTIZE = torch.ops.quantized_decomposed.quantize_per_tensor.default
DEQUANTIZE = torch.ops.quantized_decomposed.dequantize_per_tensor.default
REAL = (ops.QuantizeInput, ops.Add, ops.Affine, ops.Average, ops.Mean, ops.Function, FloatConv, LookUp, Outer)
"""Layers that compute on real numbers."""

MOVES = (ops.MaxPool, ops.Reshape, ops.Permute, ops.Slice, ops.Pad, ops.Concat, ops.Relu)
"""Layers that take integers as they are, and real numbers as well."""


class Grid:
    """A grid in the integer type of an engine's activations.

    Args:
        grid: of the integer network.
        dtype: of tensors of up to 8 bits; others keep theirs.
        moved: of a tensor whose values are on the grid already, from several tensors perhaps: nothing is clamped.
    """

    def __init__(self, grid: Quantize, dtype: torch.dtype, moved: bool = False) -> None:
        self.scale, self.own = float(grid.scale), grid.dtype
        small = grid.dtype in (torch.uint8, torch.int8)
        self.dtype = dtype if small else grid.dtype
        self.offset = torch.iinfo(self.dtype).min - torch.iinfo(grid.dtype).min if small else 0
        zero = int(grid.zero_point)
        low = max(grid.quant_min, zero) if grid.relu else grid.quant_min
        info = torch.iinfo(self.dtype)
        self.zero_point = zero + self.offset
        self.bounds = (info.min, info.max) if moved else (low + self.offset, grid.quant_max + self.offset)

    def quantize(self, x: Tensor) -> Tensor:
        """Real numbers -> integers."""
        info = torch.iinfo(self.dtype)
        if self.dtype is torch.int8 and self.bounds != (info.min, info.max):  # XNNPACK reads no bounds of an operation
            low, high = ((bound - self.zero_point) * self.scale for bound in self.bounds)
            above = self.bounds[1] == info.max
            x = torch.relu(x) if low == 0 and above else torch.nn.functional.hardtanh(x, low, high)
        return QUANTIZE(x, self.scale, self.zero_point, *self.bounds, self.dtype)

    def dequantize(self, x_q: Tensor) -> Tensor:
        """Integers -> real numbers."""
        return DEQUANTIZE(x_q, self.scale, self.zero_point, *self.bounds, self.dtype)

    def plain(self, x_q: Tensor) -> Tensor:
        """Integers -> those of the integer network."""
        return (x_q.int() - self.offset).to(self.own)

    def of(self, x_q: Tensor) -> Tensor:
        """Integers of the integer network -> integers."""
        return (x_q.int() + self.offset).to(self.dtype)


class Convolution(nn.Module):
    """A convolution or linear layer on real numbers, by int8 weights that are dequantized where they are read.

    Args:
        layer: on integers.
        multiplied_out: hold the weight as real numbers, for an engine without kernels for integers to real numbers.
    """

    weight: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor

    def __init__(self, layer: IntegerConv, multiplied_out: bool = False) -> None:
        super().__init__()
        self.geometry = (layer.stride, layer.padding, layer.dilation, layer.groups, layer.output_padding)
        info = torch.iinfo(layer.weight.dtype)
        self.bounds = (info.min, info.max)
        unit = layer.weight_scale.double() * layer.input_scale.double()
        bias = (layer.bias.double() * unit).float()
        for name, x in (
            ("weight", layer.weight), ("scale", layer.weight_scale), ("zero_point", layer.weight_zero_point.long()),
            ("bias", bias if layer.remainder is None else bias + layer.remainder),
        ):  # fmt: skip
            self.register_buffer(name, x.clone())
        if multiplied_out:
            self.register_buffer("weight", self.real_weight())

    def forward(self, x: Tensor) -> Tensor:
        """Real numbers -> real numbers."""
        weight = self.weight if self.weight.is_floating_point() else self.real_weight()
        return convolve(x, weight, self.bias, *self.geometry)

    def real_weight(self) -> Tensor:
        """The weight as real numbers."""
        return torch.ops.quantized_decomposed.dequantize_per_channel.default(
            self.weight, self.scale, self.zero_point, 0, *self.bounds, self.weight.dtype
        )


class Bilinear(Convolution):
    """A bilinear layer on real numbers: a linear one on the products of all pairs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        """Real numbers -> real numbers."""
        return super().forward(pairs(a, b))


class Product(nn.Module):
    """The product of two tensors of real numbers."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """As `torch.matmul`."""
        return a @ b


class Reference(nn.Module):
    """The network in reference operations.

    Args:
        network: an integer network.
        dtype: integer type of activations: uint8 for x86, int8 for XNNPACK.

    Raises:
        ValueError: layers that have no such form; names each.
    """

    def __init__(self, network: IntegerNetwork, dtype: torch.dtype = torch.uint8) -> None:
        super().__init__()
        self.inputs, self.outputs, self.nodes = network.inputs, network.outputs, network.nodes
        grids = network.grids()
        self.grids = {name: Grid(grid, dtype, network.layer(name).output is None) for name, grid in grids.items()}
        layers = {node.name: network.layer(node.name) for node in network.nodes}
        real = [name for name, layer in layers.items() if name not in self.grids or not _in_xnnpack(layer)]
        without = real if dtype is torch.int8 else []  # XNNPACK multiplies integers to integers only
        self.steps, refusals = nn.ModuleList(), Refusals()
        for name, layer in layers.items():
            with refusals.noted():
                self.steps.append(real_form(layer, name, name in without, grids.get(name)))
        refusals.raise_any()

    @property
    def quantized(self) -> list[str]:
        """The tensors that a quantize operation makes, in the order of the graph."""
        return [node.name for node in self.nodes if node.name in self.grids]

    def forward(self, *inputs: Tensor) -> Any:
        """As the integer network: real numbers -> real numbers."""
        tensors = dict(zip(self.inputs, inputs, strict=True))
        for node, step in zip(self.nodes, self.steps, strict=True):
            y = step(*(self._real(tensors, name) for name in node.inputs))
            tensors[node.name] = self.grids[node.name].quantize(y) if node.name in self.grids else y
        results = tuple(self._real(tensors, name) for name in self.outputs)
        return results[0] if len(results) == 1 else results

    def _real(self, tensors: dict[str, Tensor], name: str) -> Tensor:
        return self.grids[name].dequantize(tensors[name]) if name in self.grids else tensors[name]


def real_form(layer: RuntimeLayer, name: str, multiplied_out: bool = False, grid: Quantize | None = None) -> nn.Module:
    """A layer as one that takes and returns real numbers.

    Args:
        layer: of the integer network.
        name: its name, for messages.
        multiplied_out: whether its weights are to be multiplied out.
        grid: of its result, if that has one.

    Raises:
        ValueError: there is no such form.
    """
    if type(layer) is IntegerConv:
        return Convolution(layer, multiplied_out)
    if type(layer) is IntegerBilinear:
        return Bilinear(layer, multiplied_out)
    if type(layer) is IntegerMatmul:
        return Product()
    if isinstance(layer, ops.Dequantize):
        return nn.Identity()
    if isinstance(layer, ops.Constant):
        return _Held(layer.value if layer.output is None else layer.output.dequantize(layer.value))
    if type(layer) in (*REAL, *MOVES) or isinstance(layer, ops.Move):
        layer = copy.deepcopy(layer)
        layer.output = None
        for key in ("zero", "value"):  # an integer of the grid
            if grid is not None and isinstance(layer, ops.Relu | ops.Pad | ops.Move) and key in layer.settings:
                layer.settings[key] = float(grid.dequantize(torch.tensor(layer.settings[key])))
        return layer
    raise ValueError(
        f"layer '{name}' ({type(layer).__name__}) has no form in torch's reference quantized operations: leave pt2 and "
        f"executorch out of export.formats, or give the layer a scheme of integers with scales per tensor or channel"
    )


def _in_xnnpack(layer: RuntimeLayer) -> bool:
    """Whether XNNPACK multiplies the layer's weights as integers: int8 without zero points, by one quantized tensor."""
    if not isinstance(layer, IntegerConv):
        return True
    if isinstance(layer, IntegerBilinear):
        return False
    symmetric = layer.weight.dtype is torch.int8 and not bool(layer.weight_zero_point.any())
    return symmetric and layer.output_padding is None


class _Held(nn.Module):
    """A tensor that the network reads."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.clone())

    def forward(self) -> Tensor:
        """The tensor."""
        return self.value


def program_of(
    network: IntegerNetwork, example_inputs: Sequence[Tensor], dtype: torch.dtype = torch.uint8, one: bool = False
) -> tuple[torch.export.ExportedProgram, Reference]:
    """The exported program of a network and the module that it was made of.

    Args:
        network: an integer network.
        example_inputs: batch dimension first.
        dtype: integer type of activations: uint8 for x86, int8 for XNNPACK.
        one: of batches of one sample; else the batch dimension is open.
    """
    reference = Reference(network, dtype).eval()
    batch = torch.export.Dim("batch", min=1, max=2**16)
    # an example of two samples: one of a single sample would fix the batch
    inputs = tuple(x[:1] if one else torch.cat([x, x])[:2] if len(x) < 2 else x for x in example_inputs)
    shapes = None if one else {"inputs": tuple({0: batch} for _ in inputs)}
    with torch.no_grad():
        program = torch.export.export(reference, inputs, dynamic_shapes=shapes)
    return program, reference
