"""Binary and ternary weights: signs, with one scale a row that fits them to the weights."""

from functools import partial

import torch
from torch import Tensor

from qat.numerics.formats.base import Grid, Round
from qat.numerics.formats.integer import integers_between

THRESHOLD = 0.7
"""Ternary weights are 0 up to this fraction of the mean magnitude."""


def binary(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`w ~ scale * q`, q = -1 or 1: `q = sign(w)` (1 for 0), `scale = mean |w|`, which minimise the squared error.

    Args:
        rows: floating point, shape [rows, values].

    Returns:
        q, shape [rows, values], and scale, shape [rows], float32. A row of zeros has scale 0: no other gives zeros.

    Source: Rastegari et al. 2016, "XNOR-Net", equation 6.

    >>> binary(torch.tensor([[0.5, -1.0, 0.0]]))
    (tensor([[ 1., -1.,  1.]]), tensor([0.5000]))
    """
    rows = rows.float()
    return snap_sign(rows, torch.round), rows.abs().sum(1) / max(rows.shape[1], 1)


def ternary(rows: Tensor) -> tuple[Tensor, Tensor]:
    """`w ~ scale * q`, q = -1, 0 or 1: q is `sign(w)` where `|w| > 0.7 mean |w|`; scale is the mean of those |w|.

    Args:
        rows: floating point, shape [rows, values].

    Returns:
        q, shape [rows, values], and scale, shape [rows], float32. A row of zeros has q = 0 and scale 1.

    Source: Li, Zhang, Liu 2016, "Ternary Weight Networks".

    >>> ternary(torch.tensor([[0.5, -1.0, 0.1, 0.0]]))
    (tensor([[ 1., -1.,  0.,  0.]]), tensor([0.7500]))
    """
    rows = rows.float()
    size = rows.abs()
    threshold = THRESHOLD * size.sum(1, keepdim=True) / max(rows.shape[1], 1)
    kept = (size > threshold).float()
    count = kept.sum(1)
    scale = torch.where(count > 0, (size * kept).sum(1) / count, 1.0)
    return rows.sign() * kept, scale


def signs(bits: int, signed: bool, narrow: bool) -> Grid:
    """{-1, 1}; 0 becomes 1, and the rounding has no say.

    >>> signs(1, signed=True, narrow=False).values()
    tensor([-1.,  1.])
    """
    if bits != 1:
        raise ValueError(f"binary has 1 bit, not {bits}")
    return Grid(low=-1.0, high=1.0, snap=snap_sign, levels=partial(torch.tensor, [-1.0, 1.0]), bits=bits)


def snap_sign(v: Tensor, round: Round) -> Tensor:
    """-1 below 0, else 1."""
    return torch.where(v.isnan(), v, torch.where(v < 0, -1.0, 1.0))


def trits(bits: int, signed: bool, narrow: bool) -> Grid:
    """{-1, 0, 1}."""
    if bits != 2:
        raise ValueError(f"ternary has 2 bits, not {bits}")
    return integers_between(-1, 1, bits)
