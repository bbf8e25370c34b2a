"""Integer dot products: a readable int32 reference and a fast path that gives the same integers.

Both compute `sum over inputs of (x_q - x_zero) * (w_q - w_zero)` for every output of a linear layer or a convolution.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT_FLOAT32 = 2**24
"""Every integer up to here is a float32, and so is every partial sum of products that stays below it."""


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Sliding windows of a padded image as a view: [n, c, *spatial] -> [n, c, *out, *kernel]."""
    for i, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
    return x


def reference_conv(
    x_q: Tensor, w_q: Tensor, x_zero: int, w_zero: Tensor, stride: Sequence[int], padding: Sequence[Sequence[int]],
    dilation: Sequence[int], groups: int, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolution in integers with the zero-point terms written out.

        sum (x - zx)(w - zw) = sum x w  -  zx sum w  -  zw sum x  +  K zx zw        (K products a sum)

    Only `sum x w` and `zw sum x` depend on the input. The input is padded with its zero point, which stands for 0.

    Args:
        x_q: integers, shape [n, c, *spatial].
        w_q: integers, shape [out, c / groups, *kernel].
        x_zero: zero point of the input.
        w_zero: zero points of the weight, int32, shape [out].
        stride, dilation, groups: as in torch.nn.functional.conv2d.
        padding: (before, after) per spatial dimension.
        bias: shape [out], from `folded_bias`, which holds everything that does not depend on the input; None for the
            bare sum, without a bias.

    Returns:
        int32 (int64 where inputs are wider than 8 bits, or the bias is int64), shape [n, out, *spatial].
    """
    beyond = x_q.dtype in (torch.int16, torch.int32) or (bias is not None and bias.dtype is torch.int64)
    wide = torch.int64 if beyond else torch.int32
    flat_padding = [p for pair in reversed(padding) for p in pair]
    x = F.pad(x_q.to(wide), flat_padding, value=x_zero)
    patches = windows(x, w_q.shape[2:], stride, dilation)
    n, out_spatial = x.shape[0], patches.shape[2 : 2 + len(stride)]
    patches = patches.reshape(n, groups, -1, *out_spatial, *w_q.shape[2:]).movedim(2, 1 + 1 + len(out_spatial))
    patches = patches.reshape(n, groups, out_spatial.numel(), -1)  # [n, groups, positions, K]
    w = w_q.to(wide).reshape(groups, -1, patches.shape[-1])  # [groups, out / groups, K]
    products = torch.matmul(patches, w.transpose(1, 2))  # [n, groups, positions, out / groups]
    zw = w_zero.to(wide).reshape(groups, 1, -1)
    input_sum = patches.sum(dim=-1, keepdim=True, dtype=wide)
    if bias is None:
        bias = folded_bias(torch.zeros(w_q.shape[0], dtype=wide), w_q, x_zero, w_zero)
    total = products - zw * input_sum + bias.to(wide).reshape(groups, 1, -1)
    return total.transpose(2, 3).reshape(n, w_q.shape[0], *out_spatial)


def reference_conv_transpose(
    x_q: Tensor, w_q: Tensor, x_zero: int, w_zero: Tensor, stride: Sequence[int], padding: Sequence[Sequence[int]],
    dilation: Sequence[int], groups: int, output_padding: Sequence[int], bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Transposed convolution in integers: a convolution of the input with zeros in between, by the weight turned round.

    Between values and around them stands the zero point, which stands for 0.

    Args:
        w_q: integers, output channels first: [out, c / groups, *kernel].
        stride, dilation, groups, output_padding: as in torch.nn.functional.conv_transpose2d.
        padding: (before, after) per spatial dimension, taken away from the full result.
        x_q, x_zero, w_zero, bias: as in `reference_conv`.

    Source: Dumoulin, Visin 2016, "A guide to convolution arithmetic for deep learning", section 4.6.
    """
    sizes = [step * (size - 1) + 1 for size, step in zip(x_q.shape[2:], stride, strict=True)]
    spread = torch.full((*x_q.shape[:2], *sizes), x_zero, dtype=x_q.dtype, device=x_q.device)
    places: tuple[Any, ...] = (..., *[slice(None, None, step) for step in stride])
    spread[places] = x_q
    reach = [gap * (size - 1) for gap, size in zip(dilation, w_q.shape[2:], strict=True)]
    around = [
        [far - before, far - after + extra]
        for far, (before, after), extra in zip(reach, padding, output_padding, strict=True)
    ]
    turned = w_q.flip(list(range(2, w_q.dim())))
    return reference_conv(spread, turned, x_zero, w_zero, [1] * len(sizes), around, dilation, groups, bias)


def folded_bias(bias: Tensor, w_q: Tensor, x_zero: int, w_zero: Tensor) -> Tensor:
    """The bias with the input-independent terms of the sum folded in: `bias - zx sum w + K zx zw`, shape [out].

    Args:
        bias: integers, shape [out].
        w_q: integers, shape [out, ...].
        x_zero: zero point of the input.
        w_zero: zero points of the weight, shape [out].

    >>> folded_bias(torch.tensor([7]), torch.tensor([[1, 2, 3]]), 10, torch.tensor([4])).item()  # 7 - 60 + 3 * 40
    67
    """
    w = w_q.reshape(w_q.shape[0], -1).long()
    terms = w.shape[1] * x_zero * w_zero.long() - x_zero * w.sum(dim=1)
    return (bias.long() + terms).to(bias.dtype)


def exact_dtype(w_q: Tensor, w_zero: Tensor, largest_input: int) -> torch.dtype:
    """The float dtype in which the fast path is exact for these weights, whatever the input.

    Every partial sum is at most `largest_input * sum |w_q - w_zero|`. Below 2^24 float32 holds them all exactly, in any
    order of summation; otherwise float64 does (to 2^53).

    Args:
        w_q: integers, shape [out, ...].
        w_zero: shape [out].
        largest_input: largest possible `|x_q - x_zero|`.
    """
    magnitudes = (w_q.reshape(w_q.shape[0], -1).double() - w_zero.double().unsqueeze(1)).abs().sum(dim=1)
    bound = float(magnitudes.max()) * largest_input if w_q.numel() else 0.0
    return torch.float32 if bound < EXACT_FLOAT32 else torch.float64


def centred(x_q: Tensor, zero: int | Tensor, dtype: torch.dtype) -> Tensor:
    """`x_q - zero` in a float dtype."""
    return x_q.to(dtype) if isinstance(zero, int) and zero == 0 else x_q.to(dtype) - zero
