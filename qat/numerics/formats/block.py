"""Scales of the block formats: few elements share one scale, which has a small format of its own.

The rules take the largest magnitudes of the blocks of one tensor, float32, shape [rows, blocks], and give scales of
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
_E4M3_OF_SMALL_BLOCKS = 2.0**-3
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
    tensor_scale = nvfp4_tensor_scale(amax.amax(), grid)
    return _float8(amax / grid.high / tensor_scale).clamp_(min=_E4M3_SMALLEST), tensor_scale


def nvfp4_tensor_scale(largest: Tensor, grid: Grid) -> Tensor:
    """`largest / (6 * 448)`, so that the scale of the largest block is the largest float8; at least 2**-117; 1 for 0.

    Args:
        largest: magnitude of a tensor, float32, any shape.
        grid: of the elements.
    """
    scale = (largest / (grid.high * E4M3FN.high)).clamp(min=_TENSOR_SCALE_SMALLEST)
    return torch.where(largest > 0, scale, 1.0)


def nvfp4_block_scales(amax: Tensor, tensor_scale: Tensor, grid: Grid) -> Tensor:
    """Scales of blocks with a tensor's scale that was known before: inputs of a layer, whose file keeps one float32.

        global_scale = 1 / tensor_scale
        block_scale  = e4m3fn(global_scale * (amax / 6))
        scale        = block_scale / global_scale

    What lies beyond the tensor's range, `6 * 448 * tensor_scale`, saturates. A block scale that would round to 0 is
    2**-3, by which every element of so small a block rounds to 0, as where 0 itself is stored.

    Args:
        amax: of each block, in the dtype of the tensor, in which it is divided; shape [rows, blocks].
        tensor_scale: float32, shape [].
        grid: of the elements.

    Source: compressed-tensors 0.20, `compute_dynamic_scales_and_zp` and `_quantize_dequantize` (`dynamic: local`).
    """
    global_scale = 1 / tensor_scale
    block = _float8(global_scale * (torch.nan_to_num(amax, nan=0.0) / grid.high).float())
    return torch.where(block > 0, block, _E4M3_OF_SMALL_BLOCKS) / global_scale


def _float8(x: Tensor) -> Tensor:
    """The nearest magnitude of e4m3fn, at most 448."""
    return E4M3FN.grid(8, False, False).snap(x, torch.round)
