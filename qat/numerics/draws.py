"""The random numbers of rounding and noise: torch's, differently in each process, or a function of a seed.

A process draws from torch's own generator of each device, which `torch.manual_seed` and Lightning's `seed_everything`
seed and checkpoints can restore. Processes that were given the same seed draw differently all the same: equal roundings
of equal weights would not average out. `seeded` gives draws that are equal in all processes, and on any device.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, distributed

_GOLDEN = 0.6180339887498949
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64  # 2 ** 64 / golden ratio, odd
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)

_generator: torch.Generator | None = None
_seeded: tuple[int, Tensor] | None = None


def use_generator(generator: torch.Generator | None) -> None:
    """Set what is drawn from, in this process.

    Args:
        generator: on the device of the tensors; every process that gives an equal one draws the same. None, the
            default, for torch's own generator of each device, shifted by the process's rank.
    """
    global _generator
    _generator = generator


@contextmanager
def seeded(seed: int, count: Tensor) -> Iterator[None]:
    """Draw, inside, what is a function of `seed`, `count` and the place in the tensor alone.

    Args:
        seed: any integer of 64 bits.
        count: int64, no dimensions: which draw it is. A tensor, so that a compiled or captured step reads it anew.
    """
    global _seeded
    before, _seeded = _seeded, (seed, count)
    try:
        yield
    finally:
        _seeded = before


def uniform(x: Tensor) -> Tensor:
    """Uniform random numbers in [0, 1), float32, of the shape of `x`."""
    if _seeded is not None:
        seed, count = _seeded
        start = splitmix(count + seed, 1)
        bits = splitmix(start, x.numel())
        return _shifted(bits, 40).float().mul_(2.0**-24).reshape(x.shape)
    u = torch.rand(x.shape, generator=_generator, device=x.device, dtype=torch.float32)
    rank = _rank() if _generator is None else 0
    if rank:  # equal seeds on all ranks: shifted copies of one uniform variable are uniform, and differ
        u = torch.frac(u + rank * _GOLDEN % 1)
    return u


def splitmix(seed: Tensor, n: int) -> Tensor:
    """The first `n` numbers of the SplitMix64 generator: int64, to be read as unsigned.

    Args:
        seed: int64, no dimensions or one element.

    Source: Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators", OOPSLA, figure 13 with the
    constants of java.util.SplittableRandom (Stafford's variant 13).
    """
    z = seed + torch.arange(1, n + 1, device=seed.device) * _INCREMENT  # products wrap around, as they should
    z = (z ^ _shifted(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shifted(z, 27)) * _MULTIPLIERS[1]
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, by: int) -> Tensor:
    """`z >> by` of the unsigned number."""
    return (z >> by) & ((1 << 64 - by) - 1)


def _rank() -> int:
    with suppress(ValueError, RuntimeError):
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank()
    return 0
