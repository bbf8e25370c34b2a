"""How the int8 checkpoint holds a network's tensors: each in the smallest form that gives back the same bits.

    [name, form, argument]     form: key of FORMS; argument: what else it takes to read it, or None

A tensor that equals what an empty network has (a zero point of zeros, no bias) is left out. One of `OWN_NAME` bytes or
more keeps its name in the file; smaller ones stand one after the other in a tensor for each dtype: safetensors spends
a hundred bytes on a name, and a layer has half a dozen scales and zero points.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.numerics.packing import pack_bits, unpack_bits
from qat.runtime.layers import FloatConv, IntegerConv
from qat.runtime.lookup import LookUp
from qat.runtime.network import IntegerNetwork
from qat.runtime.stored import ProductConv, TableConv

OWN_NAME = 16 * 1024
POOL = "small."
"""Before the name of the dtype whose small tensors follow."""


@dataclass(frozen=True)
class Codes:
    """Integers that take few bits: `low`, `low + step`, ... at `bits` each."""

    low: int
    step: int
    bits: int


def codes_of(layer: nn.Module) -> tuple[str, Tensor, list[int], int] | None:
    """What a layer stores in few bits: attribute, integers, smallest and largest, and their distance."""
    if isinstance(layer, IntegerConv | FloatConv | LookUp) and layer.weight_bounds is not None:
        return "weight", layer.weight, layer.weight_bounds, layer.weight_step
    if isinstance(layer, TableConv | ProductConv) and layer.bounds is not None:
        return "codes", layer.codes, layer.bounds, 1
    return None


def codes_in(network: nn.Module) -> dict[str, Codes]:
    """Name in the state dict -> what is known of its integers, for all that a network stores in few bits."""
    found = {name: Codes(0, 1, 1) for name, t in network.state_dict().items() if t.dtype == torch.bool}
    for name, layer in network.named_modules():
        if (stored := codes_of(layer)) is not None:
            attribute, _, (low, high), step = stored
            found[f"{name}.{attribute}"] = Codes(low, step, max(1, ((high - low) // step).bit_length()))
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype are equal to the bit (NaN equals NaN, 0 is not -0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))


@dataclass(frozen=True)
class Form:
    """A way to store a tensor.

    Attributes:
        dtype: of what is stored; None for that of the tensor.
        write: tensor, what is known of its integers -> what is stored, flat, and the argument; None if it cannot.
        read: what is stored, argument, dtype, number of elements, integers -> the tensor, flat.
        length: number of elements stored, for a number of elements and what is known of the integers.
    """

    dtype: torch.dtype | None
    write: Callable[[Tensor, Codes | None], tuple[Tensor, Any] | None]
    read: Callable[[Tensor, Any, torch.dtype, int, Codes | None], Tensor]
    length: Callable[[int, Codes | None], int] = lambda count, codes: count


def _pack(x: Tensor, codes: Codes | None) -> tuple[Tensor, Any] | None:
    if codes is None or codes.bits >= 8 * x.element_size():
        return None
    return pack_bits((x.int() - codes.low) // codes.step, codes.bits), None


def _unpack(x: Tensor, argument: Any, dtype: torch.dtype, count: int, codes: Codes | None) -> Tensor:
    assert codes is not None
    return (unpack_bits(x, codes.bits, count).int() * codes.step + codes.low).to(dtype)


def _cast(dtype: torch.dtype, wide: torch.dtype) -> Form:
    return Form(
        dtype,
        lambda x, codes: (x.to(dtype), None) if x.dtype == wide else None,
        lambda x, argument, into, count, codes: x.to(into),
    )


def _powers(x: Tensor, codes: Codes | None) -> tuple[Tensor, Any] | None:
    return (x.to(torch.float8_e8m0fnu).view(torch.uint8), None) if x.dtype == torch.float32 else None


def _scaled(x: Tensor, codes: Codes | None) -> tuple[Tensor, Any] | None:
    """Float8 times a float32 that all share, as NVFP4's scales are: the largest is 448 times it."""
    if x.dtype != torch.float32 or x.numel() < 16 or not bool(((x > 0) & x.isfinite()).all()):
        return None
    units = [x.max() / 448]
    for end in (torch.inf, -torch.inf):  # the division may have been rounded
        unit = units[0]
        for _ in range(2):
            unit = torch.nextafter(unit, torch.tensor(end))
            units.append(unit)
    for unit in units:
        stored = (x / unit).to(torch.float8_e4m3fn)
        if same_bits(stored.float() * unit, x):
            return stored, float(unit)
    return None


FORMS: dict[str, Form] = {
    "packed": Form(
        torch.uint8, _pack, _unpack, lambda count, codes: -(-count * (codes.bits if codes else 8) // 8)
    ),
    "e8m0": Form(
        torch.uint8, _powers, lambda x, argument, into, count, codes: x.view(torch.float8_e8m0fnu).to(into)
    ),
    "uint8": _cast(torch.uint8, torch.int32),
    "int8": _cast(torch.int8, torch.int32),
    "int16": _cast(torch.int16, torch.int32),
    "e4m3fn": _cast(torch.float8_e4m3fn, torch.float32),
    "scaled_e4m3fn": Form(
        torch.float8_e4m3fn, _scaled, lambda x, argument, into, count, codes: x.to(into) * float(argument)
    ),
    "bfloat16": _cast(torch.bfloat16, torch.float32),
    "plain": Form(None, lambda x, codes: (x, None), lambda x, argument, into, count, codes: x),
}  # fmt: skip
"""Smallest first. A form is used where reading gives back the same bits."""


def write_tensors(network: IntegerNetwork, empty: IntegerNetwork | None) -> tuple[dict[str, Tensor], list[list[Any]]]:
    """What to store for `network`, and the table of how.

    Args:
        network: what is stored.
        empty: the same network as built from its settings; what equals its tensors is left out. None: nothing is.
    """
    codes, table, tensors = codes_in(network), [], {}
    usual = {} if empty is None else empty.state_dict()
    pools: dict[torch.dtype, list[Tensor]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in sorted(network.state_dict().items()):
        x = tensor.detach().cpu().contiguous()
        if name in usual and same_bits(x, usual[name]):
            continue
        flat = x.reshape(-1)
        content = (str(x.dtype), x.shape, codes.get(name), hashlib.sha256(flat.view(torch.uint8).numpy()).digest())
        if x.nbytes >= 64 and (first := seen.setdefault(content, name)) != name:
            table.append([name, "same", first])
            continue
        form, stored, argument = smallest(name, flat, codes.get(name))
        table.append([name, form, argument])
        if stored.nbytes >= OWN_NAME:
            tensors[name] = stored.reshape(x.shape) if stored.numel() == x.numel() else stored
        else:
            pools.setdefault(stored.dtype, []).append(stored)
    return tensors | {POOL + _name(dtype): torch.cat(parts) for dtype, parts in pools.items()}, table


def smallest(name: str, x: Tensor, codes: Codes | None) -> tuple[str, Tensor, Any]:
    """The first form that holds `x`, shape [n], exactly; what is stored, and the argument to read it."""
    for form, how in FORMS.items():
        if form in ("uint8", "int8", "int16") and not name.endswith(("zero_point", "shift")):
            continue  # a bias is int32 whatever it happens to be
        written = how.write(x, codes)
        if written is not None and same_bits(how.read(*written, x.dtype, x.numel(), codes), x):
            return form, *written
    raise AssertionError(f"no form holds '{name}'")  # "plain" holds everything


def read_tensors(network: IntegerNetwork, stored: dict[str, Tensor], table: Iterable[Any]) -> None:
    """Fill an empty network with what `write_tensors` made.

    Raises:
        ValueError: the table and the tensors do not fit together, or not the network.
    """
    codes, wanted = codes_in(network), network.state_dict()
    rest, done = dict(stored), dict[str, Tensor]()
    for name, form, argument in table:
        if name not in wanted or name in done:
            raise ValueError(f"the tensor '{name}' is " + ("there twice" if name in done else "of no layer"))
        target = wanted[name]
        if form == "same":
            first = done.get(argument)
            if first is None or (first.dtype, first.numel()) != (target.dtype, target.numel()):
                raise ValueError(f"the tensor '{name}' is the same as '{argument}', which does not come before it")
            done[name] = first
        elif form in FORMS:
            how, known = FORMS[form], codes.get(name)
            if form == "packed" and known is None:
                raise ValueError(f"the tensor '{name}' is packed, but its layer has no such integers")
            x = _take(rest, name, how.dtype or target.dtype, how.length(target.numel(), known))
            done[name] = how.read(x, argument, target.dtype, target.numel(), known)
        else:
            raise ValueError(f"the tensor '{name}' is stored as '{form}'; this qat reads {', '.join(FORMS)}")
    left = [name for name, x in rest.items() if x.numel()]
    if left:
        raise ValueError(f"tensors of no layer: {', '.join(left)}")
    network.load_state_dict({name: done[name].reshape(t.shape) if name in done else t for name, t in wanted.items()})


def stored_bytes(network: IntegerNetwork, table: Iterable[Any]) -> dict[str, int]:
    """Tensor of the network -> bytes that it takes in the file; 0 for one that is the same as another."""
    codes, tensors = codes_in(network), network.state_dict()
    sizes = dict.fromkeys(tensors, 0)
    for name, form, _ in table:
        if form != "same":
            count = FORMS[form].length(tensors[name].numel(), codes.get(name))
            sizes[name] = count * (FORMS[form].dtype or tensors[name].dtype).itemsize
    return sizes


def _take(rest: dict[str, Tensor], name: str, dtype: torch.dtype, count: int) -> Tensor:
    """The next `count` numbers: a tensor of its own, or from the small ones of its dtype."""
    own = name in rest
    key = name if own else POOL + _name(dtype)
    x = rest.pop(key, torch.empty(0, dtype=dtype)).reshape(-1)
    if x.dtype != dtype or x.numel() < count or (own and x.numel() > count):
        raise ValueError(f"the tensor '{name}' takes {count} numbers of {_name(dtype)}, "
                         f"the file has {x.numel()} of {_name(x.dtype)}")  # fmt: skip
    if not own:
        rest[key] = x[count:]
    return x[:count]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
