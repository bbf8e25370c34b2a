"""Powers of two and sums of them: multiplying by a weight becomes a shift, or a few."""

import math
from functools import cache, partial
from itertools import pairwise, product

import torch
from torch import Tensor

from qat.numerics.formats.base import Grid, Round
from qat.numerics.formats.minifloat import float_grid
from qat.numerics.rounding import Rounding

BITS = tuple(range(2, 9))
"""Widths of both formats."""

_LEAST = -126  # exponent of the smallest normal float32


def pow2(bits: int, signed: bool, narrow: bool) -> Grid:
    """0 and the powers of two from 1 downwards: `2**-k`, `k = 0 .. 2 ** (bits - 1) - 2`, of both signs.

    Unsigned: `k = 0 .. 2**bits - 2`, at 8 bits 126 at most: smaller powers are no normal float32. The format is a float
    without fraction, so `nearest` is nearest on the real line and rounds a tie (three halves of a power) up, but half
    of the smallest power to 0; `logarithmic` is nearest in the log domain, where the smallest power ends at its
    `2 ** -0.5`.

    Sources: Miyashita, Lee, Murmann 2016, "Convolutional Neural Networks using Logarithmic Data Representation",
    equation 3; Zhou et al. 2017, "Incremental Network Quantization" (INQ), section 2.1, which rounds ties between
    powers up, too.

    >>> pow2(3, signed=True, narrow=False).values().tolist()
    [-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0]
    """
    _check("pow2", bits)
    powers = 2 ** (bits - int(signed)) - 1
    return float_grid(mantissa=0, least=max(1 - powers, _LEAST), high=1.0, signed=signed, bits=bits)


def apot(bits: int, signed: bool, narrow: bool) -> Grid:
    """Additive powers of two: `apot_magnitudes` of `bits`, or of both signs and `bits - 1`.

    `logarithmic` gives the nearest level in the log domain, and 0 below `2 ** -0.5` of the smallest.
    """
    _check("apot", bits)
    magnitudes = apot_magnitudes(bits - int(signed))
    low = -1.0 if signed else 0.0
    return Grid(
        low=low,
        high=1.0,
        snap=partial(snap_table, magnitudes=magnitudes, low=low),
        levels=partial(_table_levels, magnitudes, signed),
        bits=bits,
    )


@cache
def apot_magnitudes(bits: int) -> tuple[float, ...]:
    """The `2**bits` magnitudes of additive powers of two, ascending, divided by the largest; float32 values.

    A magnitude is a sum with one addend from each term. A term has 2 bits (the k of the paper): 0 or one of three
    powers of two, dealt to the `n = bits // 2` terms in turn, so that no two addends are equal:

        p_i in {0, 2**-i, 2**-(i + n), 2**-(i + 2n)},  i = 0 .. n - 1                       (equation 5)

    An odd number of bits adds a term of 1 bit. The published code deals it the power after the second round:
    `{0, 2**-2n}`; the third powers of the other terms move down by one.

    | bits | terms                                  | magnitudes                                                     |
    |------|----------------------------------------|----------------------------------------------------------------|
    | 1    | {0, 1}                                 | 0, 1                                                           |
    | 2    | {0, 1, 1/2, 1/4}                       | 0, 1, 2, 4 quarters                                            |
    | 3    | {0, 1, 1/2, 1/8} + {0, 1/4}            | 0, 1, 2, 3, 4, 6, 8, 10 eighths, / 10/8                        |
    | 4    | {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}| 0 1 2 3 4 6 8 9 12 16 18 24 32 33 36 48 of 32, / 48/32         |

    Sources: Li, Dong, Wang 2020, "Additive Powers-of-Two Quantization", ICLR, equations 5 and 6; `build_power_value` in
    https://github.com/yhhhli/APoT_Quantization, which stops at 6 bits: 7 and 8 follow the same rule.

    >>> [round(m, 6) for m in apot_magnitudes(3)]
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0]
    """
    n, odd = divmod(bits, 2)
    terms = [[0.0, 2.0**-i, 2.0 ** -(i + n), 2.0 ** -(i + 2 * n + odd)] for i in range(n)]
    if odd:
        terms.append([0.0, 2.0 ** (-2 * n)])
    sums = sorted(sum(addends) for addends in product(*terms))
    return tuple(torch.tensor([s / sums[-1] for s in sums], dtype=torch.float32).tolist())


def snap_table(v: Tensor, round: Round, *, magnitudes: tuple[float, ...], low: float) -> Tensor:
    """Round to a table of magnitudes, with the sign of `v`.

    Args:
        v: float32, any shape.
        round: entry of `ROUNDING`, applied to the signed index in the table; ties go to the even index.
        magnitudes: ascending from 0, float32 values.
        low: smallest value: minus the last magnitude, or 0.
    """
    table = torch.tensor(magnitudes, dtype=torch.float32, device=v.device)
    clipped = torch.nan_to_num(v, nan=0.0).clamp_(low, magnitudes[-1])
    size = clipped.abs().contiguous()  # bucketize warns of other layouts
    if isinstance(round, Rounding) and round.powers:
        middles = [math.sqrt(a * b) if a else b * 0.5**0.5 for a, b in pairwise(magnitudes)]
        index = torch.bucketize(size, torch.tensor(middles, dtype=torch.float32, device=v.device), right=True)
    else:
        below = torch.bucketize(size, table, right=True).sub_(1).clamp_(max=len(magnitudes) - 2)
        # float64: in float32, an index of 100 leaves the fraction 17 bits, and misses which side of a half it is
        levels = table.double()
        fraction = (size - levels[below]) / levels.diff()[below]
        index = round(torch.copysign(below + fraction, clipped)).abs().long()
    return torch.where(v.isnan(), v, torch.copysign(table[index], clipped))


def _table_levels(magnitudes: tuple[float, ...], signed: bool) -> Tensor:
    table = torch.tensor(magnitudes, dtype=torch.float32)
    return torch.cat([-table[1:].flip(0), table]) if signed else table


def _check(name: str, bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"{name} has {BITS[0]} to {BITS[-1]} bits, not {bits}")
