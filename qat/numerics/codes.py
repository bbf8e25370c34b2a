"""What backward needs of a tensor on a grid: its integers, a byte each, in place of its real numbers.

A layer keeps its input and its weight for the gradients of each other. Where a kernel has written their integers beside
them (`forward_ste_codes` and its like), these are kept, and multiplied by the scale again when backward asks: the same
numbers to the bit, in a quarter of the memory. Whatever has no integers at hand is kept as it is.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.numerics import kernels, native

LEVELS = 256
"""The most integers of a grid that a byte holds."""


@dataclass(frozen=True, slots=True)
class Codes:
    """The integers of a tensor that a kernel has made, and what turns them back.

    Attributes:
        values: int8, in the order of memory (see `kernels.decode`).
        numbers: scale and bottom, as the kernel was given them; of the form `native`, its params.
        form: of the kernel.
        dtype: of the tensor.
        inner: how many neighbours in memory have one scale, for the form `native`.
    """

    values: Tensor
    numbers: tuple[Tensor, ...]
    form: str
    dtype: torch.dtype
    inner: int = 0

    @property
    def single(self) -> bool:
        """Whether all have one scale."""
        return self.form == "flat" or (self.form == "native" and self.numbers[0].shape[1] == 1)

    def decode(self, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
        """The tensor again, in any shape and order of memory that a view of it had."""
        if self.form == "native":
            return native.decode(self.values, self.numbers[0], self.inner, shape, stride, self.dtype)
        with torch.no_grad():
            (y,) = kernels.run("decode", self.form, self.values, *self.numbers)
            return y.to(self.dtype).as_strided(shape, stride)


def attach(y: Tensor, codes: Codes) -> None:
    """Let a tensor know its integers; they live as long as it does, or as a graph that keeps them."""
    if y.is_inference():  # no graph keeps it, and nobody counts who writes to it
        return
    for tensor in (y, y._base):  # views of `y` are views of its base
        if tensor is not None:
            tensor.codes, tensor.coded_version = codes, tensor._version  # type: ignore[attr-defined]


def _codes_of(x: Tensor) -> Codes | None:
    """The integers of a tensor, or of the one that it is a view of; None once that was written to."""
    for tensor in (x, x._base):
        codes: Codes | None = getattr(tensor, "codes", None)
        if codes is not None:
            return codes if tensor.coded_version == tensor._version else None  # type: ignore[union-attr]
    return None


def _applies() -> bool:
    """Whether to keep integers: not under a compiler, which chooses itself what to keep.

    Nor where someone else takes what is kept (activation checkpointing, offloading).
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def kept_as_integers(*tensors: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it, what autograd keeps of these tensors is their integers, where they have some."""
    if not _applies():
        return contextlib.nullcontext()
    known = {x.data_ptr(): codes for x in tensors if (codes := _codes_of(x)) is not None}
    return torch.autograd.graph.saved_tensors_hooks(_pack(known), _unpack) if known else contextlib.nullcontext()


def keeping(multiply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`multiply(x, weight, bias)` within `kept_as_integers`."""

    def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with kept_as_integers(x, weight):
            return multiply(x, weight, bias)

    return call


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, which keeps integers as within `kept_as_integers`; on CPUs, one call of C++ (`native.linear`)."""
    if x.dim() > 1 and x.is_contiguous() and _applies() and ordinary(x, weight, *(() if bias is None else (bias,))):
        of_x, of_weight = _known(x), _known(weight)
        if of_x is not None or of_weight is not None:
            return native.linear(x, weight, bias, of_x, of_weight)
    with kept_as_integers(x, weight):
        return F.linear(x, weight, bias)


def matmul(left: Tensor, right: Tensor) -> Tensor:
    """`torch.matmul`, which keeps integers; of views that have gaps, too, as attention multiplies."""
    if left.dim() > 2 and left.shape[:-2] == right.shape[:-2] and _applies() and ordinary(left, right):
        of_left, of_right = _known(left, part=True), _known(right, part=True)
        if of_left is not None or of_right is not None:
            return native.matmul(left, right, of_left, of_right)
    left, right = _gathered(left), _gathered(right)
    with kept_as_integers(left, right):
        return torch.matmul(left, right)


def ordinary(x: Tensor, *others: Tensor) -> bool:
    """Whether C++ takes these tensors: not empty, of one dtype, no subclass, on a CPU, and nobody casts them."""
    return (
        x.device.type == "cpu"
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and all(type(t) in (Tensor, nn.Parameter) and t.dtype == x.dtype for t in (x, *others))
    )


def _known(x: Tensor, part: bool = False) -> native.Known:
    """A tensor's integers as C++ takes them; of a `part`, those of the whole, which have one scale."""
    codes = _codes_of(x)
    if codes is None or codes.form != "native":
        return None
    if not _is_all_of(x, codes) and not (part and codes.single and x.dtype == codes.dtype):
        return None
    return codes.values, codes.numbers[0], codes.inner


def _is_all_of(x: Tensor, codes: Codes) -> bool:
    """Whether the integers are those of `x`, one by one in the order of memory: a view may show a part, or a cast."""
    return x.numel() == codes.values.numel() and x.dtype == codes.dtype and dense(x)


def _gathered(x: Tensor) -> Tensor:
    """A copy without gaps of a view that has some, as C++ makes it; it knows its integers, if they have one scale.

    The rows of a matrix, or its columns, stay in the order of memory. What has no gaps is returned.
    """
    if torch.compiler.is_compiling() or x.dim() < 2 or dense(x):
        return x
    turned = x.stride(-1) != 1
    view = x.mT if turned else x
    copied = view.contiguous()
    codes = _codes_of(x) if _applies() else None
    if codes is not None and codes.single and x._base is not None:
        place = view.storage_offset() - x._base.storage_offset()
        values = codes.values.as_strided(view.shape, view.stride(), place).flatten()
        attach(copied, replace(codes, values=values))
    return copied.mT if turned else copied


def dense(x: Tensor) -> bool:
    """Whether a tensor has no gaps, in whichever order of dimensions."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def _pack(known: dict[int, Codes]) -> Callable[[Tensor], Any]:
    def pack(x: Tensor) -> Any:
        codes = known.get(x.data_ptr())
        return x if codes is None or not _is_all_of(x, codes) else (codes, x.shape, x.stride())

    return pack


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    codes, shape, stride = kept
    result: Tensor = codes.decode(shape, stride)
    return result
