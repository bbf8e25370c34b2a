"""Sub-byte storage: b-bit integers as a dense little-endian stream of bits."""

import torch
from torch import Tensor

_SHIFTS = torch.arange(8, dtype=torch.uint8)
_SHIFTS_16 = torch.arange(16, dtype=torch.int32)


def pack_bits(x: Tensor, bits: int) -> Tensor:
    """Pack unsigned integers below 2^bits, `bits` bits each, the first in the lowest bits of the first byte.

    Args:
        x: integers in [0, 2^bits), any shape.
        bits: 1 to 16.

    Returns:
        uint8, shape [ceil(numel * bits / 8)].

    Raises:
        ValueError: a value does not fit.

    >>> pack_bits(torch.tensor([1, 2, 3]), 4).tolist()
    [33, 3]
    """
    flat = x.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bits):
        raise ValueError(f"pack_bits: values {int(flat.min())} to {int(flat.max())} do not fit in {bits} bits")
    if bits > 8:
        stream = ((flat.int().unsqueeze(1) >> _SHIFTS_16[:bits]) & 1).to(torch.uint8)
    else:
        stream = (flat.to(torch.uint8).unsqueeze(1) >> _SHIFTS[:bits]) & 1
    stream = torch.nn.functional.pad(stream.reshape(-1), (0, -stream.numel() % 8))
    return (stream.reshape(-1, 8) << _SHIFTS).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        packed: uint8, shape [ceil(numel * bits / 8)].
        bits: 1 to 16.
        numel: how many integers.

    Returns:
        uint8, or int32 above 8 bits, shape [numel].

    Raises:
        ValueError: `packed` has another length than `numel` integers need.

    >>> unpack_bits(torch.tensor([33, 3], dtype=torch.uint8), 4, 3).tolist()
    [1, 2, 3]
    """
    if packed.numel() != -(-numel * bits // 8):
        raise ValueError(f"unpack_bits: {numel} integers of {bits} bits need {-(-numel * bits // 8)} bytes, "
                         f"got {packed.numel()}")  # fmt: skip
    stream = (packed.unsqueeze(1) >> _SHIFTS) & 1
    stream = stream.reshape(-1)[: numel * bits].reshape(numel, bits)
    if bits > 8:
        return (stream.int() << _SHIFTS_16[:bits]).sum(dim=1, dtype=torch.int32)
    return (stream << _SHIFTS[:bits]).sum(dim=1, dtype=torch.uint8)
