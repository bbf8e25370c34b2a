"""Folding BatchNorm into a quantized layer: exact, because only scales, signs and biases change, never the rounding.

With integers `q`, `conv(x, s q)` followed by BatchNorm is a convolution by the same integers with scale `s |g|`,
`g = gamma / sqrt(var + eps)`, and bias `beta - mean g`; where `g < 0` the integers change sign.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.encoding import encode
from qat.layers import QuantizedLayer, Weight

LARGEST_BIAS = 2**30
"""int32 biases stay below this, so that a sum of products can be added without overflow."""

LARGEST_WIDE_BIAS = 2**52
"""Those of bilinear layers are int64, as the product of two scales is a small unit."""

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
"""The normalisations that fold."""


@dataclass
class FoldedWeight:
    """A layer's integers after folding the BatchNorm behind it.

    Attributes:
        q: integers (float tensor), shape of the weight with output channels first.
        scale, zero_point: shape [out], or [out, groups].
        bias: real-valued bias, float64, shape [out].
        bounds: smallest and largest integer.
        step: distance of neighbouring integers (2 for binary weights, which are -1 and 1).
    """

    q: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor
    bounds: tuple[int, int]
    step: int = 1


@torch.no_grad()
def fold(layer: QuantizedLayer | Weight, batch_norm: nn.Module | None) -> FoldedWeight:
    """Quantize a layer's weight and fold the BatchNorm behind it into scale, sign and bias. Exact, in float64.

    For weights that are integers with one scale a tensor, an output channel or a group of its inputs.

    Source: Jacob et al. 2018, section 3.2 (folding); the sign rule follows from it.
    """
    quantizer, weight = layer.weight_quantizer, layer.outputs_first().detach()
    out, encoded = weight.shape[0], encode(quantizer, weight)
    assert encoded.levels is None
    low, high = encoded.low, encoded.high
    q = quantizer.layout.restore(encoded.codes, weight.shape)
    shape = quantizer.scale_shape or (1,)
    scale, zero_point = (t.reshape(shape).expand(out, *shape[1:]) for t in (encoded.scale, encoded.zero_point))
    gain, shift = batch_norm_affine(batch_norm, out)
    bias = torch.zeros(out, dtype=torch.float64) if layer.bias is None else layer.bias.detach().double()
    column = (-1, *[1] * (scale.dim() - 1))
    negative = gain < 0
    flip = negative.reshape(-1, *[1] * (q.dim() - 1))
    # -(q - z) = q' - z' with q' = low + high - q and z' = low + high - z, which stays inside the grid
    return FoldedWeight(
        q=torch.where(flip, low + high - q, q),
        scale=scale.double() * gain.abs().reshape(column),
        zero_point=torch.where(negative.reshape(column), low + high - zero_point, zero_point),
        bias=bias * gain + shift,
        bounds=(low, high),
        step=encoded.step,
    )


def batch_norm_affine(batch_norm: nn.Module | None, channels: int) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as `gain * x + shift`, float64, shape [channels] each; (1, 0) for None."""
    if batch_norm is None:
        return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    assert isinstance(batch_norm, BatchNorm)
    mean, variance = batch_norm.running_mean, batch_norm.running_var
    if mean is None or variance is None:
        raise ValueError("a BatchNorm with track_running_stats=False has no fixed statistics and cannot be folded")
    gain = (variance.detach().double() + batch_norm.eps).rsqrt()
    if batch_norm.weight is not None:
        gain = gain * batch_norm.weight.detach().double()
    shift = -mean.detach().double() * gain
    if batch_norm.bias is not None:
        shift = shift + batch_norm.bias.detach().double()
    return gain, shift


def integer_bias(
    folded: FoldedWeight, input_scale: float, dims: int, largest: int = LARGEST_BIAS
) -> tuple[Tensor, Tensor, Tensor]:
    """The bias as integers at scale `input_scale * weight_scale`, at most `largest`.

    A channel whose BatchNorm gain is next to nothing has a scale so small that its bias does not fit an int32. Its
    scale is raised until it does, and its integers are divided to match: that loses less than a thousandth of the bias.

    Returns:
        weight scale (float64, [out]), weight integers and bias integers (float64, [out]).
    """
    smallest = torch.finfo(torch.float32).tiny / min(input_scale, 1.0)
    needed = (folded.bias.abs() / (largest * input_scale)).clamp(min=smallest)
    scale = torch.maximum(folded.scale, needed)
    shrink = (folded.scale / scale).reshape(-1, *[1] * (dims - 1))
    zero = folded.zero_point.double().reshape(-1, *[1] * (dims - 1))
    q = torch.where(shrink == 1, folded.q.double(), torch.round((folded.q.double() - zero) * shrink + zero))
    scale = scale.float().double()  # what the file holds
    return scale, q, torch.round(folded.bias / (scale * input_scale))
