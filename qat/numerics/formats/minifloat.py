"""Binary floating point with few bits, simulated exactly in float32.

| name   | bits | largest  | smallest normal | smallest |
|--------|------|----------|-----------------|----------|
| e4m3fn | 8    | 448      | 2**-6           | 2**-9    |
| e5m2   | 8    | 57344    | 2**-14          | 2**-16   |
| e3m2   | 6    | 28       | 0.25            | 0.0625   |
| e2m3   | 6    | 7.5      | 1               | 0.125    |
| e2m1   | 4    | 6        | 1               | 0.5      |
| bf16   | 16   | 3.39e38  | 2**-126         | 2**-133  |
| fp16   | 16   | 65504    | 2**-14          | 2**-24   |
| tf32   | 19   | 3.40e38  | 2**-126         | 2**-136  |

Numbers that are too large become the largest, and infinities do too: training wants saturation.

Sources: OCP 8-bit Floating Point Specification (OFP8) v1.0; OCP Microscaling Formats (MX) Specification v1.0, section
5.3; IEEE 754-2019; Kalamkar et al. 2019 (bf16); NVIDIA A100 white paper 2020 (tf32).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qat.numerics.formats.base import Grid, Round, binade


def snap_float(v: Tensor, round: Round, *, mantissa: int, least: int, greatest: int, low: float, high: float) -> Tensor:
    """Round to `mantissa` bits behind the leading one; below `2 ** least` to multiples of its step (subnormals).

    All arithmetic is by powers of two and thus exact, so `round` alone decides; the sign of zero is as `round` leaves
    it. Not a cast to `torch.float8_e4m3fn` and the like: casts know one rounding, are slower on a CPU in 8 bits, and
    Inductor deletes a cast to bfloat16 and back.

    Args:
        v: float32, any shape.
        round: entry of `ROUNDING`.
        mantissa: bits of the fraction.
        least, greatest: smallest and largest exponent of the normal numbers.
        low, high: where to saturate, values of the format.
    """
    # The largest step serves what lies beyond, too: v / ulp stays above `high` there, or becomes inf, and saturates.
    ulp = binade(v).clamp_(2.0**least, 2.0**greatest).mul_(2.0**-mantissa)
    return round(v / ulp).mul(ulp).clamp_(low, high)


def float_levels(*, mantissa: int, least: int, greatest: int, low: float, high: float) -> Tensor:
    """All values of such a format, ascending, float32."""
    one = 2**mantissa
    subnormal = [math.ldexp(s, least - mantissa) for s in range(one)]
    normal = [math.ldexp(s, e - mantissa) for e in range(least, greatest + 1) for s in range(one, 2 * one)]
    magnitudes = [m for m in subnormal + normal if m <= high]
    negative = [-m for m in reversed(magnitudes[1:])] if low < 0 else []
    return torch.tensor(negative + magnitudes, dtype=torch.float32)


def float_grid(*, mantissa: int, least: int, high: float, signed: bool, bits: int) -> Grid:
    """Grid of a format from its bits of fraction, smallest exponent of a normal number, and largest value."""
    greatest = math.frexp(high)[1] - 1
    low = -high if signed else 0.0
    shape: dict[str, Any] = {"mantissa": mantissa, "least": least, "greatest": greatest, "low": low, "high": high}
    return Grid(low=low, high=high, snap=partial(snap_float, **shape), levels=partial(float_levels, **shape), bits=bits)


@dataclass(frozen=True)
class Minifloat:
    """A floating-point format with a sign, subnormal numbers, and IEEE's exponent bias.

    Attributes:
        exponent, mantissa: bits of each.
        high: largest finite value; formats differ in what they spend the topmost codes on.
    """

    exponent: int
    mantissa: int
    high: float

    @property
    def bits(self) -> int:
        """Width, sign included."""
        return 1 + self.exponent + self.mantissa

    def grid(self, bits: int, signed: bool, narrow: bool) -> Grid:
        """The grid, `narrow` or not: floats are symmetric.

        >>> E2M1.grid(4, signed=True, narrow=False).values().tolist()[7:]
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        """
        if bits != self.bits:
            raise ValueError(f"e{self.exponent}m{self.mantissa} has {self.bits} bits, not {bits}")
        least = 2 - 2 ** (self.exponent - 1)
        return float_grid(mantissa=self.mantissa, least=least, high=self.high, signed=signed, bits=bits)


E4M3FN = Minifloat(4, 3, high=448.0)  # no infinities: one code a sign is NaN, all others are finite
E5M2 = Minifloat(5, 2, high=57344.0)
E3M2 = Minifloat(3, 2, high=28.0)  # neither infinities nor NaN in 6 and 4 bits
E2M3 = Minifloat(2, 3, high=7.5)
E2M1 = Minifloat(2, 1, high=6.0)
BF16 = Minifloat(8, 7, high=(2 - 2**-7) * 2.0**127)
FP16 = Minifloat(5, 10, high=65504.0)
TF32 = Minifloat(8, 10, high=(2 - 2**-10) * 2.0**127)
