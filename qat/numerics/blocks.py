"""Fake quantization in blocks that stay in cache, of ordinary tensor operations.

What the composed form does to a whole tensor, this does to one block after the other, in place: the values cross memory
once each way, as with the compiled kernels. It serves where no compiler is at hand. Same results to the bit, but
for the order in which a scale's gradient is summed.

Values have shape [rows, n] and are contiguous; scales and the like broadcast against them in two dimensions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qat.numerics.kernels import ABOVE, BELOW, RESIDUAL_STEPS

BLOCK = 2**15
"""Elements in a block, for each thread: four float32 blocks fit in an L2 cache."""


def _steps(rows: int, n: int) -> tuple[int, int]:
    """Extents of a block."""
    size = BLOCK * torch.get_num_threads()
    return max(1, size // n), min(n, size)


def _blocks(shape: torch.Size, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows, n = _steps(*shape)
    cut = ([b for r in t.expand(shape).split(rows) for b in r.split(n, dim=1)] for t in tensors)
    return zip(*cut, strict=True)


def _scratch(shape: torch.Size, like: Tensor, count: int) -> list[Tensor]:
    rows, n = _steps(*shape)
    return [torch.empty(min(rows, shape[0]) * n, dtype=torch.float32, device=like.device) for _ in range(count)]


def _as(scratch: Tensor, block: Tensor) -> Tensor:
    return scratch[: block.numel()].view(block.shape)


def forward(x: Tensor, scale: Tensor, bottom: Tensor, top: Tensor, *, relu: bool, lsq: bool) -> tuple[Tensor, Tensor]:
    """`kernels.forward_ste`, or `forward_lsq`."""
    y, code = torch.empty_like(x), torch.empty_like(x, dtype=torch.int8)
    scratch = _scratch(x.shape, x, 3)
    for x_, s, low, high, y_, code_ in _blocks(x.shape, x, scale, bottom, top, y, code):
        v, q, c = (_as(t, x_) for t in scratch)
        torch.div(v.copy_(x_) if x.dtype != torch.float32 else x_, s, out=v)
        torch.round(v, out=q)
        torch.minimum(torch.maximum(q, low, out=c), high, out=c)
        if lsq:
            _code_lsq(x_, v, q, c, low, high, relu, code_)
        else:
            inside = torch.eq(q, c, out=code_.view(torch.bool))
            if relu:
                inside &= x_ > 0
        torch.mul(c.add_(0.0), s, out=y_ if x.dtype == torch.float32 else c)  # 0.0: minus zero is none of the integers
        if x.dtype != torch.float32:
            y_.copy_(c)
    return y, code


def _code_lsq(x: Tensor, v: Tensor, q: Tensor, c: Tensor, low: Tensor, high: Tensor, relu: bool, code: Tensor) -> None:
    """Fill `code`, given `v = x / scale`, rounded and clamped; by arithmetic, as ATen vectorises no selection."""
    step = torch.sub(q, c, out=q).clamp_(-1.0, 1.0)  # how clipped: -1, 0 or 1
    # one step outside stands for all that lies beyond; infinities would have no residual
    torch.minimum(torch.maximum(v, low - 1.0, out=v), high + 1.0, out=v)
    byte = torch.round(v).sub_(v).mul_(RESIDUAL_STEPS).round_().add_(step, alpha=512.0).clamp_(BELOW, ABOVE)
    if relu:
        byte.sub_(BELOW).mul_(torch.sign(x).clamp_(min=0.0)).add_(BELOW)
    code.copy_(byte.nan_to_num_(BELOW).to(torch.int32))


def backward_ste(grad: Tensor, inside: Tensor) -> Tensor:
    """`kernels.backward_ste`; one operation, so no blocks. With bool for a factor it takes twice as long."""
    return grad * inside


def backward_lsq(grad: Tensor, code: Tensor, below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.backward_lsq_flat`; the gradient of the scale has the shape of `below`."""
    grad_x, total = torch.empty_like(grad), torch.zeros_like(below)
    scratch = _scratch(grad.shape, below, 4)
    home = tuple(slice(1) if extent == 1 else slice(None) for extent in below.shape)
    for g, code_, below_, above_, grad_, total_ in _blocks(grad.shape, grad, code, below, above, grad_x, total):
        slope, under, over, inside = (_as(t, g) for t in scratch)
        slope.copy_(code_)
        torch.sub(slope, ABOVE - 1.0, out=over).clamp_(min=0.0)
        torch.sub(BELOW + 1.0, slope, out=under).clamp_(min=0.0)
        torch.sub(1.0, under, out=inside).sub_(over)
        slope.mul_(1 / RESIDUAL_STEPS).mul_(inside).addcmul_(under, below_).addcmul_(over, above_)
        torch.mul(g, inside, out=grad_ if grad.dtype == torch.float32 else inside)
        if grad.dtype != torch.float32:
            grad_.copy_(inside)
        total_[home] += slope.mul_(g).sum_to_size(total_[home].shape)
    return grad_x, total
