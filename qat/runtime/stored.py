"""Layers computed in float from weights stored in few bits (levels, tiles, vectors); and simulated activations.

Integer kernels have one scale a tensor or output channel. What does not fit them is stored as codes and multiplied out.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from qat.encoding import Encoded
from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.numerics.granularity import Layout
from qat.runtime.grid import Quantize, storage_dtype
from qat.runtime.layers import RuntimeLayer, convolve
from qat.scheme import TensorScheme, override


class StoredConv(RuntimeLayer):
    """Base: convolution or linear layer whose weight is multiplied out from what is stored.

        y = convolve(x, weight) * gain + bias

    Args:
        weight_shape, stride, padding, dilation, groups, output, output_padding: as in `IntegerConv`.

    Attributes:
        gain, bias: the BatchNorm behind the layer and its own bias, shape [out].
    """

    gain: Tensor
    bias: Tensor

    def __init__(
        self, weight_shape: list[int], stride: list[int] | None = None, padding: list[list[int]] | None = None,
        dilation: list[int] | None = None, groups: int = 1, output: Quantize | None = None,
        output_padding: list[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(output)
        dims = len(weight_shape) - 2
        self.weight_shape, self.groups = weight_shape, groups
        self.stride, self.dilation = stride or [1] * dims, dilation or [1] * dims
        self.padding, self.output_padding = padding or [[0, 0]] * dims, output_padding
        self.register_buffer("gain", torch.ones(weight_shape[0]))
        self.register_buffer("bias", torch.zeros(weight_shape[0]))

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {
            "weight_shape": self.weight_shape, "stride": self.stride, "padding": self.padding,
            "dilation": self.dilation, "groups": self.groups, "output_padding": self.output_padding,
        }  # fmt: skip

    def float_weight(self) -> Tensor:
        """The weight as float32."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """float32 -> float32, or integers of the output's grid."""
        geometry = (self.stride, self.padding, self.dilation, self.groups, self.output_padding)
        y = convolve(x, self.float_weight(), None, *geometry)
        column = (-1, *[1] * (len(self.weight_shape) - 2))
        return self.emit(y * self.gain.reshape(column) + self.bias.reshape(column))


class TableConv(StoredConv):
    """Each weight is a code: an integer, or an index into a table of levels; rows share a scale and a zero point.

    Args:
        layout: fields of `Layout`: how the weight is cut into rows.
        codes: shape of the codes, [rows, values].
        levels: shape of the table, [1 or rows, entries]; None where codes are values themselves.
        bounds: smallest and largest code; None for codes that are floats (bf16, fp16).
        dtype: of the codes.
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self, weight_shape: list[int], layout: dict[str, Any], codes: list[int], levels: list[int] | None,
        bounds: list[int] | None, dtype: str, **geometry: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight_shape, **geometry)
        block = layout.get("block_size")
        self.layout = Layout(**{**layout, "block_size": None if block is None else (block[0], block[1])})
        self.bounds = bounds
        self.register_buffer("codes", torch.zeros(codes, dtype=getattr(torch, dtype)))
        self.register_buffer("levels", None if levels is None else torch.zeros(levels))
        self.register_buffer("scale", torch.ones(codes[0]))
        self.register_buffer("zero_point", torch.zeros(codes[0], dtype=torch.int32))

    @classmethod
    def of(cls, weight_shape: list[int], layout: Layout, encoded: Encoded, **geometry: Any) -> "TableConv":
        """A layer that holds `encoded`."""
        floats = encoded.codes.dtype if encoded.low == encoded.high else None  # values that stand for themselves
        dtype = floats or storage_dtype(encoded.low, encoded.high)
        layer = cls(
            weight_shape, dataclasses.asdict(layout), list(encoded.codes.shape),
            None if encoded.levels is None else list(encoded.levels.shape),
            None if floats else [encoded.low, encoded.high], str(dtype).removeprefix("torch."), **geometry,
        )  # fmt: skip
        layer.codes.copy_(encoded.codes)
        if encoded.levels is not None:
            layer.levels.copy_(encoded.levels)
        layer.scale.copy_(encoded.scale)
        layer.zero_point.copy_(encoded.zero_point)
        return layer

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {
            "layout": dataclasses.asdict(self.layout), "codes": list(self.codes.shape),
            "levels": None if self.levels is None else list(self.levels.shape), "bounds": self.bounds,
            "dtype": str(self.codes.dtype).removeprefix("torch."),
        }  # fmt: skip

    def float_weight(self) -> Tensor:  # noqa: D102
        values = self.codes.float()
        if self.levels is not None:
            values = self.levels.expand(self.codes.shape[0], -1).gather(1, self.codes.long())
        rows = (values - self.zero_point.unsqueeze(1)) * self.scale.unsqueeze(1)
        return self.layout.restore(rows, torch.Size(self.weight_shape))

    def float_rows(self, indices: Tensor) -> Tensor:
        """The rows of a matrix that are asked for, as `float_weight` has them: [n] -> [n, inputs]."""
        row, column = self.layout.places(indices, self.weight_shape)
        values = self.codes[row, column].float()
        if self.levels is not None:
            values = self.levels[row if len(self.levels) > 1 else torch.zeros_like(row), values.long()]
        return (values - self.zero_point[row]) * self.scale[row]


class ProductConv(StoredConv):
    """Each vector of `width` weights is a code: the index of a prototype of its part of the inputs.

    Args:
        prototypes: shape [parts, entries, width].
        padded: number of inputs, filled up to whole vectors.
        bits: of a code.
    """

    codes: Tensor
    prototypes: Tensor

    def __init__(
        self, weight_shape: list[int], prototypes: list[int], padded: int, bits: int, **geometry: Any
    ) -> None:  # fmt: skip
        super().__init__(weight_shape, **geometry)
        parts, _, width = prototypes
        self.padded, self.bits = padded, bits
        vectors = weight_shape[0] * padded // width // parts
        self.register_buffer("codes", torch.zeros(vectors, parts, dtype=torch.uint8))
        self.register_buffer("prototypes", torch.zeros(prototypes))

    @property
    def bounds(self) -> list[int]:
        """Smallest and largest code."""
        return [0, 2**self.bits - 1]

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return super().spec() | {"prototypes": list(self.prototypes.shape), "padded": self.padded, "bits": self.bits}

    def float_weight(self) -> Tensor:  # noqa: D102
        parts, _, width = self.prototypes.shape
        out, inputs = self.weight_shape[0], math.prod(self.weight_shape[1:])
        vectors = self.prototypes[torch.arange(parts, device=self.codes.device), self.codes.long()]  # [n, parts, width]
        grid = vectors.reshape(out, -1, parts, width).transpose(1, 2)
        return grid.reshape(out, self.padded)[:, :inputs].reshape(self.weight_shape)

    def float_rows(self, indices: Tensor) -> Tensor:
        """The rows of a matrix that are asked for, as `float_weight` has them: [n] -> [n, inputs]."""
        parts = len(self.prototypes)
        codes = self.codes.reshape(self.weight_shape[0], -1, parts)[indices].long()  # [n, vectors of a part, parts]
        vectors = self.prototypes[torch.arange(parts, device=codes.device), codes].transpose(1, 2)
        return vectors.reshape(len(indices), self.padded)[:, : self.weight_shape[1]]


class Simulate(RuntimeLayer):
    """An activation that is put on its levels and stays a float: dynamic ranges, scales per channel, float formats.

    Args:
        scheme: fields of the TensorScheme that are not its defaults.
        signed: whether the levels have both signs.
        relu: whether a ReLU is absorbed.
        shape: of the activation, where scales are per channel.
    """

    def __init__(self, scheme: dict[str, Any], signed: bool, relu: bool, shape: list[int] | None = None) -> None:
        super().__init__()
        self.settings = {"scheme": scheme, "signed": signed, "relu": relu, "shape": shape}
        self.quantizer = FakeQuantize(
            override(TensorScheme(), scheme, "scheme"), nonnegative=not signed, relu=relu, activation=shape
        )
        self.quantizer.mode = Mode.frozen
        self.quantizer.eval()

    @classmethod
    def of(cls, quantizer: FakeQuantize) -> "Simulate":
        """What `quantizer` does once frozen: a range that was learned, or followed training, is fixed."""
        changes: dict[str, Any] = {"rounding": quantizer.rounding_in_use, "gradient": "clipped_ste",
                                   "gradient_strength": None, "signed": quantizer.signed}  # fmt: skip
        if not quantizer.dynamic:
            changes |= {"range": "fixed", "observer": "minmax"}
        scheme = dataclasses.replace(quantizer.scheme, **changes)
        usual = TensorScheme()
        fields = {
            f.name: getattr(scheme, f.name)
            for f in dataclasses.fields(scheme)
            if getattr(scheme, f.name) != getattr(usual, f.name)
        }
        fields = {name: getattr(value, "value", value) for name, value in fields.items()}
        layer = cls(fields, quantizer.signed, quantizer.relu, quantizer.activation)
        if not quantizer.dynamic:
            layer.quantizer.range.set(*(t.detach() for t in quantizer.qparams()))
        return layer

    def spec(self) -> dict[str, Any]:  # noqa: D102
        return dict(self.settings)

    def forward(self, x: Tensor) -> Tensor:
        """float32 -> float32."""
        return self.quantizer(x)
