"""One linear layer in compressed-tensors: its tensors, and what the configuration says of it."""

from typing import Any

import torch
from torch import Tensor, nn

from qat.encoding import encode
from qat.fake_quant import FakeQuantize
from qat.numerics.formats.block import nvfp4_parts
from qat.numerics.formats.minifloat import E2M1
from qat.numerics.packing import pack_bits
from qat.ranges import RANGES
from qat.scheme import Granularity, TensorScheme

FP4 = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
"""Formats whose weights the package unpacks to bfloat16, whatever the model's dtype."""


def stored(layer: Any, form: str) -> dict[str, Tensor]:
    """A linear layer's tensors in a format, by the name that follows the layer's (its bias is with the float ones)."""
    quantizer: FakeQuantize = layer.weight_quantizer
    matrix = layer.outputs_first()
    shape, encoded = matrix.shape, encode(quantizer, matrix)
    whole = quantizer.scheme.granularity is Granularity.tensor
    scale, zero_point = (
        t.expand(shape[0]).reshape(-1, 1) if whole else t.reshape(shape[0], -1)
        for t in (encoded.scale, encoded.zero_point)
    )  # fmt: skip
    codes = encoded.codes.reshape(shape)
    if form == "pack-quantized":
        bits = _bits(quantizer.scheme)
        start = 0 if encoded.low >= 0 else 2 ** (bits - 1)  # packed codes have no sign
        result = {"weight_packed": pack_columns(codes.long() + start, bits), "weight_scale": scale}
        result["weight_shape"] = torch.tensor(shape)
        if not quantizer.scheme.symmetric:
            result["weight_zero_point"] = pack_columns(zero_point.long().T + start, bits).T
    elif form == "int-quantized":
        result = {"weight": codes.to(torch.int8), "weight_scale": scale}
    else:
        assert encoded.levels is not None
        values = encoded.levels.reshape(-1)[codes.long()]
        if form == "float-quantized":
            result = {"weight": values.to(torch.float8_e4m3fn), "weight_scale": scale}
        elif form == "mxfp4-pack-quantized":
            exponents = scale.to(torch.float8_e8m0fnu).view(torch.uint8)
            result = {"weight_packed": pack_e2m1(values), "weight_scale": exponents}
        else:
            result = {"weight_packed": pack_e2m1(values)} | _nvfp4_scales(quantizer, matrix, scale)
    return result | _input_tensors(layer)


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Codes without sign, `bits` bits each, side by side in int32 words, the first in the lowest bits; rows start anew.

    Args:
        codes: integers in [0, 2^bits), shape [rows, columns].
        bits: 1 to 8.

    Returns:
        int32, shape [rows, ceil(columns * bits / 32)].

    >>> [hex(word) for word in pack_columns(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 9]]), 4)[0].tolist()]
    ['0x7654321', '0x9']
    """
    rows, columns = codes.shape
    padded = nn.functional.pad(codes, (0, -columns % 32))
    words = pack_bits(padded, bits).view(torch.int32).reshape(rows, -1)
    return words[:, : -(-columns * bits // 32)]


def pack_e2m1(values: Tensor) -> Tensor:
    """Values of e2m1, two a byte, the first in the lower half: three bits of magnitude below one of sign.

    Args:
        values: shape [rows, columns], an even number of columns.

    Returns:
        uint8, shape [rows, columns / 2].

    >>> pack_e2m1(torch.tensor([[0.5, -6.0, 1.0, 0.0]])).tolist()
    [[241, 2]]
    """
    magnitudes = E2M1.grid(4, signed=False, narrow=False).values().to(values.device)
    codes = torch.searchsorted(magnitudes, values.abs()) + 8 * (values < 0)
    return pack_bits(codes, 4).reshape(values.shape[0], -1)


def _nvfp4_scales(quantizer: FakeQuantize, matrix: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The float8 of each block, and what they are divided by."""
    low, high = quantizer.measure(matrix)
    assert quantizer.grid is not None
    blocks, tensor_scale = nvfp4_parts(torch.maximum(-low, high).clamp(min=0).reshape(scale.shape), quantizer.grid)
    assert torch.equal(blocks * tensor_scale, scale)
    return {"weight_scale": blocks.to(torch.float8_e4m3fn), "weight_global_scale": (1 / tensor_scale).reshape(1)}


def _input_tensors(layer: Any) -> dict[str, Tensor]:
    """What is kept of an input's range: scale and zero point, or what its blocks' scales are divided by."""
    quantizer = layer._modules.get("input_quantizer")
    if quantizer is None or quantizer.dynamic:
        return {}
    scale, zero_point = quantizer.qparams()
    if quantizer.local:
        return {"input_global_scale": (1 / scale).reshape(1)}
    tensors = {"input_scale": scale.reshape(1)}
    if not _is_symmetric(quantizer):
        tensors["input_zero_point"] = (zero_point - quantizer.quant_min - 128).to(torch.int8).reshape(1)
    return tensors


def _is_symmetric(quantizer: FakeQuantize) -> bool:
    """Whether zero is in the middle of the runtime's int8, too."""
    return quantizer.scheme.symmetric and quantizer.signed


def _bits(weight: TensorScheme) -> int:
    """Width of the codes: DoReFa's are odd integers of one bit more."""
    return (weight.bits or 0) + RANGES[weight.range].odd


def settings_of(layer: Any, form: str) -> dict[str, Any]:
    """A group's settings but for its targets."""
    weight, reads = layer.weight_quantizer.scheme, layer._modules.get("input_quantizer")
    weights: dict[str, Any] = {
        "num_bits": _bits(weight),
        "type": "int" if weight.format == "int" else "float",
        "symmetric": weight.symmetric,
        "strategy": "group" if weight.granularity is Granularity.group else "channel",
        "group_size": weight.group_size,
        "dynamic": False,
    }
    if form in FP4:
        dtype = "torch.float8_e4m3fn" if weight.format == "nvfp4" else "torch.uint8"
        weights |= {"strategy": "tensor_group" if weight.format == "nvfp4" else "group", "scale_dtype": dtype}
    settings = {"format": form, "weights": weights, "input_activations": None, "output_activations": None}
    if reads is not None:
        inputs: dict[str, Any] = {
            "num_bits": reads.scheme.bits,
            "type": "int" if reads.scheme.format == "int" else "float",
            "symmetric": _is_symmetric(reads),
            "strategy": "token" if reads.dynamic else "tensor",
            "dynamic": reads.dynamic,
        }
        if reads.local:
            inputs |= {
                "strategy": "tensor_group", "group_size": reads.scheme.group_size, "dynamic": "local",
                "scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn",
            }  # fmt: skip
        settings["input_activations"] = inputs
    return settings
