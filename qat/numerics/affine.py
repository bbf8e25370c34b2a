"""Affine (uniform) quantization: the one definition that training, the integer runtime and every export share.

    x_q  = clamp(round(x / scale) + zero_point, quant_min, quant_max)      ONNX QuantizeLinear
    x_dq = scale * (x_q - zero_point)                                      ONNX DequantizeLinear

The division is a true division: multiplying by the reciprocal (as ATen's kernels do) differs by a step at some ties.
Integers are carried in float32 tensors here (exact up to 2^24); `qat.runtime` stores them in integer dtypes.
Scales and zero points broadcast against `x`.
"""

import torch
from torch import Tensor

from qat.numerics.rounding import ROUNDING

SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A scale below the smallest normal float32 would make x / scale overflow; such tensors are zero for every purpose."""


def int_range(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Smallest and largest integer of a format.

    | bits | signed | narrow | range        |
    |------|--------|--------|--------------|
    | 8    | yes    | no     | [-128, 127]  |
    | 8    | yes    | yes    | [-127, 127]  |
    | 8    | no     | -      | [0, 255]     |
    | 2    | yes    | no     | [-2, 1]      |

    >>> int_range(4, signed=True, narrow=True)
    (-7, 7)
    """
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1


def choose_qparams(
    low: Tensor, high: Tensor, quant_min: int | Tensor, quant_max: int | Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Turn an observed range into a scale and a zero point.

    Zero is always inside the range and exactly representable, so that zero padding and ReLU are exact.

    * symmetric: `a = max(|low|, |high|)`, `scale = a / quant_max`, `zero_point = 0`;
    * affine: `scale = (high - low) / (quant_max - quant_min)`, `zero_point = round(quant_min - low / scale)`.

    Args:
        low, high: observed bounds, one entry per scale, any (equal) shape.
        quant_min, quant_max: the integer range; numbers, or float32 tensors of one.
        symmetric: whether the zero point is 0.

    Returns:
        scale (float32, > 0) and zero_point (float32 holding integers), both of the shape of `low`. A range of zero
        width gives scale 1: every value in it quantizes to zero exactly.

    Source: Jacob et al. 2018, section 2.1; Krishnamoorthi 2018, section 2.
    """
    low = low.float().clamp(max=0.0)
    high = high.float().clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-low, high) / quant_max
        zero_point = torch.zeros_like(scale)
    else:
        steps = quant_max - quant_min
        scale = high / steps - low / steps  # not (high - low) / steps, which overflows near the largest float
        scale_or_one = torch.where(scale > SMALLEST_SCALE, scale, 1.0)
        zero_point = torch.clamp(quant_min - torch.round(low / scale_or_one), quant_min, quant_max)  # type: ignore[arg-type]
    scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))
    return scale, zero_point


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, rounding: str = "nearest"
) -> Tensor:
    """`clamp(round(x / scale) + zero_point, quant_min, quant_max)`, integers in a float32 tensor.

    Args:
        x: floating point, any shape.
        scale, zero_point: broadcast against `x`.
        quant_min, quant_max: the integer range.
        rounding: key of `ROUNDING`.

    >>> x = torch.tensor([1.6, -0.7, -3.4, 1.7, -2.9, 0.5, 2.3, 6.2])
    >>> quantize(x, torch.tensor(6.2 / 127), torch.tensor(0.0), -127, 127).int().tolist()
    [33, -14, -70, 35, -59, 10, 47, 127]
    """
    return torch.clamp(ROUNDING[rounding](x.float() / scale) + zero_point, quant_min, quant_max)


def dequantize(x_q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """`scale * (x_q - zero_point)`, float32.

    >>> dequantize(torch.tensor([0, 128, 255]), torch.tensor(0.5), torch.tensor(128.0))
    tensor([-64.0000,   0.0000,  63.5000])
    """
    return (x_q.float() - zero_point) * scale
