"""Integers, and integers times a fixed power of two."""

from functools import partial

import torch
from torch import Tensor

from qat.numerics.affine import int_range
from qat.numerics.formats.base import Grid, Round

BITS = tuple(range(1, 17))
"""Widths of `int`."""


def snap_integer(v: Tensor, round: Round, *, low: float, high: float) -> Tensor:
    """`clamp(round(v), low, high)`."""
    return torch.clamp(round(v), low, high)


def integers(bits: int, signed: bool, narrow: bool) -> Grid:
    """The integers of `int_range`.

    >>> integers(3, signed=True, narrow=True).values()
    tensor([-3., -2., -1.,  0.,  1.,  2.,  3.])
    """
    if bits not in BITS:
        raise ValueError(f"integers have {BITS[0]} to {BITS[-1]} bits, not {bits}")
    low, high = int_range(bits, signed, narrow)
    if low == high:
        raise ValueError("narrow_range leaves a signed integer of 1 bit nothing but 0: use 2 bits, or format=binary")
    return integers_between(low, high, bits)


def integers_between(low: int, high: int, bits: int) -> Grid:
    """The integers from `low` to `high`, stored in `bits` bits."""
    return Grid(
        low=float(low),
        high=float(high),
        snap=partial(snap_integer, low=low, high=high),
        levels=partial(torch.arange, low, high + 1, dtype=torch.float32),
        bits=bits,
    )


UNIT = 2.0**-6
"""The step of MXINT8's elements."""


def mxint8(bits: int, signed: bool, narrow: bool) -> Grid:
    """Multiples of 2**-6 from -2 to 127/64: an int8 with an implied scale.

    MX v1.0 allows to leave -2 unused, so that both ends are equally far from 0; `narrow` does, as Microsoft's
    `microxcaling` always does.

    >>> grid = mxint8(8, signed=True, narrow=False)
    >>> grid.low, grid.high
    (-2.0, 1.984375)
    """
    if bits != 8:
        raise ValueError(f"mxint8 has 8 bits, not {bits}")
    low = int_range(bits, True, narrow)[0] if signed else 0
    high = int_range(bits, True)[1]
    return Grid(
        low=low * UNIT,
        high=high * UNIT,
        snap=partial(snap_fixed_point, low=low, high=high),
        levels=partial(_fixed_point_levels, low, high),
        bits=bits,
    )


def snap_fixed_point(v: Tensor, round: Round, *, low: int, high: int) -> Tensor:
    """The multiple of `UNIT` that `round` chooses, from `low` to `high` of them."""
    return torch.clamp(round(v / UNIT), low, high) * UNIT


def _fixed_point_levels(low: int, high: int) -> Tensor:
    return torch.arange(low, high + 1, dtype=torch.float32) * UNIT
