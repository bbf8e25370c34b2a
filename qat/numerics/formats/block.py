"""Scales of the block formats: few elements share one scale, which has a small format of its own.

Both rules take the largest magnitudes of the blocks of one tensor, float32, shape [rows, blocks], and give scales of
the same shape. NaN counts as 0 and inf as the largest float32, so that every scale is finite and above 0; NaN elements
stay NaN on the grid.
"""

import math

import torch
from torch import Tensor

from qat.numerics.formats.base import Grid, binade
from qat.numerics.formats.minifloat import E4M3FN

MX_BLOCK = 32
NVFP4_BLOCK = 16

_E8M0 = (2.0**-127, 2.0**127)
_E4M3_SMALLEST = 2.0**-9
_TENSOR_SCALE_SMALLEST = 2.0**-117


def mx_scales(amax: Tensor, grid: Grid) -> Tensor:
    """`2 ** (floor(log2 amax) - emax)`, emax the exponent of the grid's largest value, within E8M0: 2**-127 .. 2**127.

    The largest element lands in the topmost binade of the grid, and saturates where it exceeds `grid.high` (6.9 in
    e2m1). A block of zeros takes 1, where any scale is right. 2**-127, a subnormal float32, serves blocks
    below `2 ** (emax - 126)`.

    Source: OCP Microscaling Formats (MX) Specification v1.0, section 6.3.

    >>> from qat.numerics.formats.minifloat import E2M1
    >>> mx_scales(torch.tensor([[6.9, 4.0, 3.9, 0.0]]), E2M1.grid(4, signed=True, narrow=False))
    tensor([[1.0000, 1.0000, 0.5000, 1.0000]])
    """
    amax = torch.nan_to_num(amax, nan=0.0)
    emax = math.frexp(grid.high)[1] - 1
    scale = (binade(amax) * 2.0**-emax).clamp_(*_E8M0)
    return torch.where(amax > 0, scale, 1.0)


def nvfp4_scales(amax: Tensor, grid: Grid) -> Tensor:
    """A float8 a block times a float32 a tensor, multiplied out.

        tensor_scale = max amax / (6 * 448)
        block_scale  = e4m3fn(amax / 6 / tensor_scale)
        scale        = block_scale * tensor_scale

    A block scale that would round to 0 is the smallest one, 2**-9: its elements are then small, or 0, without a
    division by zero. A tensor scale is at least 2**-117, which keeps every product a normal float32, and costs range
    only where the whole tensor is below 1e-32. For a tensor of zeros it is 1.

    Source: NVIDIA 2025, "Pretraining Large Language Models with NVFP4" (arXiv 2509.25149), the appendix on
    quantization (global and local scales); NVIDIA Model Optimizer's NVFP4QTensor.

    >>> from qat.numerics.formats.minifloat import E2M1
    >>> nvfp4_scales(torch.tensor([[2688.0, 6.0], [306.0, 0.0]]), E2M1.grid(4, signed=True, narrow=False)).tolist()
    [[448.0, 1.0], [52.0, 0.001953125]]
    """
    blocks, tensor_scale = nvfp4_parts(amax, grid)
    return blocks * tensor_scale


def nvfp4_parts(amax: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The two factors of `nvfp4_scales`: of each block, values of e4m3fn, shape [rows, blocks], and of the tensor."""
    if amax.numel() == 0:
        return torch.ones_like(amax), torch.ones((), device=amax.device)
    amax = torch.nan_to_num(amax, nan=0.0)
    largest = amax.amax()
    tensor_scale = (largest / (grid.high * E4M3FN.high)).clamp_(min=_TENSOR_SCALE_SMALLEST)
    tensor_scale = torch.where(largest > 0, tensor_scale, 1.0)
    float8 = E4M3FN.grid(8, False, False)
    return float8.snap(amax / grid.high / tensor_scale, torch.round).clamp_(min=_E4M3_SMALLEST), tensor_scale
