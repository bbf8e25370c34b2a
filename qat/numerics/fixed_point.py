"""Fixed point: multiplication of integers by a real number without any float, as microcontrollers do it.

    real number  =  multiplier * 2^(shift - 31)          multiplier: an int32 in [2^30, 2^31), shift: a small integer
    x * real     =  floor((x * multiplier + 2^(30 - shift)) / 2^(31 - shift))          halves go up, towards +infinity

This is the single-rounding form of CMSIS-NN (`arm_nn_requantize` under CMSIS_NN_USE_SINGLE_ROUNDING) and of TensorFlow
Lite (`MultiplyByQuantizedMultiplier` under TFLITE_SINGLE_ROUNDING), with their convention for `shift`. The older form
(gemmlowp's SaturatingRoundingDoublingHighMul, then a rounding division by a power of two) rounds twice: with a shift
of -3, one product in sixteen comes out a step away from the nearest integer, so it is no use where what trains is to
be what runs.

Source: Jacob et al. 2018, section 2.2 (the normalised multiplier).
"""

import torch
from torch import Tensor

SHIFTS = (-31, 30)
"""The shifts of `multiplier_and_shift`: the product is moved right by 31 - shift, from 1 to 62 places."""

LARGEST = 2**62
"""Sums stay below this."""


def multiplier_and_shift(real: Tensor) -> tuple[Tensor, Tensor]:
    """A positive real number as an int32 multiplier of 31 significant bits and a shift.

    Args:
        real: >= 0, any shape, taken as float64.

    Returns:
        multiplier (int32) and shift (int32), of the shape of `real`. The relative error is at most 2^-31. A number
        below 2^-32, by which every int32 becomes 0, gives (0, 0).

    Raises:
        ValueError: a number that is negative, not finite or 2^30 and above.

    >>> [t.item() for t in multiplier_and_shift(torch.tensor(0.375))]  # 0.75 * 2^31 = 1610612736, times 2^(-1 - 31)
    [1610612736, -1]
    """
    real = real.detach().double()
    if not bool((torch.isfinite(real) & (real >= 0) & (real < 2.0**30)).all()):
        raise ValueError(f"a fixed-point multiplier is in [0, 2^30); got {real.min():g} to {real.max():g}")
    mantissa, exponent = torch.frexp(real)  # real = mantissa * 2^exponent, mantissa in [0.5, 1)
    multiplier = torch.round(mantissa * 2.0**31).long()
    full = multiplier == 2**31  # 0.99999999999 is rounded up to 1
    multiplier, shift = torch.where(full, 2**30, multiplier), exponent.long() + full
    tiny = shift < SHIFTS[0]
    zero = torch.zeros_like(shift)
    return torch.where(tiny, zero, multiplier).int(), torch.where(tiny, zero, shift).int()


def multiply(x: Tensor, multiplier: Tensor, shift: Tensor) -> Tensor:
    """`round(x * multiplier * 2^(shift - 31))`, halves up, in integers alone.

    A sum of 32 bits times a multiplier fits 64 bits. A wider one is multiplied in two parts, x = high * 2^31 + low, so
    that nothing overflows; both give the same integers.

    Args:
        x: int32, or int64 below LARGEST in magnitude; any shape. The result fits 64 bits.
        multiplier, shift: from `multiplier_and_shift`, broadcast against `x`.

    Returns:
        int64.

    >>> m, s = multiplier_and_shift(torch.tensor(0.375))
    >>> multiply(torch.tensor([-4, -3, 3, 4, 100]), m, s).tolist()  # -1.5, -1.125, 1.125, 1.5, 37.5
    [-1, -1, 1, 2, 38]
    """
    places, m = 31 - shift.long(), multiplier.long()
    half = torch.ones_like(places) << (places - 1)
    if x.dtype != torch.int64:
        return (x.long() * m + half) >> places
    high, low = x >> 31, (x & (2**31 - 1)) * m
    high, low = high * m + (low >> 31), low & (2**31 - 1)  # x * m = high * 2^31 + low
    more, fewer = (places - 31).clamp(min=0), (31 - places).clamp(min=0)
    far = (high + (half >> 31)) >> more  # 32 places and more: `low` is below the rounding's last bit
    near = (high << fewer) + ((low + half) >> places.clamp(max=31))
    return torch.where(places > 31, far, near)


def requantize(
    x: Tensor, multiplier: Tensor, shift: Tensor, zero_point: Tensor | int, quant_min: int, quant_max: int
) -> Tensor:
    """`clamp(multiply(x, multiplier, shift) + zero_point, quant_min, quant_max)`, int64."""
    return (multiply(x, multiplier, shift) + zero_point).clamp(quant_min, quant_max)


def integer_sqrt(n: Tensor) -> Tensor:
    """The largest integer whose square is not above `n`, by Newton's method from above, in integers alone.

    Args:
        n: int64 >= 0, below LARGEST.

    Source: Kim et al. 2021, "I-BERT", algorithm 4 (Crandall & Pomerance, algorithm 9.2.11).

    >>> integer_sqrt(torch.tensor([0, 1, 15, 16, 17, 2**40])).tolist()
    [0, 1, 3, 4, 4, 1048576]
    """
    bits = sum((n >> i > 0).long() for i in range(62))  # of n: its root is at most 2^ceil(bits / 2)
    root = torch.ones_like(n) << ((bits + 1) >> 1)
    for _ in range(7):  # from at most twice the root, the error squares itself with each step
        root = torch.minimum(root, (root + n.div(root.clamp(min=1), rounding_mode="floor")) >> 1)
    return root
