"""What the operations of the runtime compute, by name. FUNCTIONS make real numbers, MOVES keep integers as they are.

Parameters have torch's names: settings are plain data, tensors are inputs or constants of the layer.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from qat.attention import add_mask, causal, mask_out
from qat.places import max_places


def _adaptive(kind: str) -> Callable[..., Tensor]:
    pools: list[Any] = [getattr(F, f"adaptive_{kind}_pool{dims}d") for dims in (1, 2, 3)]

    def pool(input: Tensor, output_size: list[int | None]) -> Tensor:
        size = output_size[0] if len(output_size) == 1 else output_size
        return pools[len(output_size) - 1](input, size)

    return pool


def _max_places(input: Tensor, ceil_mode: bool = False, **window: Any) -> Tensor:
    """Places of maxima; of integers, which torch pools in two or three dimensions, a signal is an image of one row."""
    if input.is_floating_point():
        return max_places(input, **window, ceil_mode=ceil_mode)
    if len(window["kernel_size"]) > 1:
        return max_places(input.long(), **window, ceil_mode=ceil_mode)
    given = {name: value[0] if isinstance(value, list | tuple) else value for name, value in window.items()}
    row = {name: (int(name != "padding"), value) for name, value in given.items()}
    return max_places(input.long().unsqueeze(-2), **row, ceil_mode=ceil_mode).squeeze(-2)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda input, other, alpha=1: input + alpha * other,
    "sub": lambda input, other, alpha=1: input - alpha * other,
    "rsub": lambda input, other, alpha=1: other - alpha * input,
    "mul": lambda input, other: input * other,
    "div": lambda input, other: input / other,
    "matmul": lambda input, other: input @ other,
    "einsum": lambda equation, **operands: torch.einsum(equation, *operands.values()),
    "pow": lambda input, exponent: input**exponent,
    "where": lambda condition, input, other: torch.where(condition.bool(), input, other),
    "masked_fill": lambda input, mask, value: input.masked_fill(mask.bool(), value),
    "pad": F.pad,
    "add_mask": add_mask,
    "mask_out": mask_out,
    "causal": causal,
    "relu6": F.relu6, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu, "mish": F.mish,
    "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "hardtanh": F.hardtanh, "leaky_relu": F.leaky_relu,
    "elu": F.elu, "selu": F.selu, "celu": F.celu, "logsigmoid": F.logsigmoid, "softsign": F.softsign, "glu": F.glu,
    "sin": torch.sin, "cos": torch.cos, "maximum": torch.maximum, "minimum": torch.minimum,
    "prelu": torch.prelu, "softplus": F.softplus, "softmax": F.softmax, "log_softmax": F.log_softmax,
    "clamp": torch.clamp, "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "square": torch.square, "sum": torch.sum,
    "argmax": torch.argmax, "argmin": torch.argmin,
    "max_places": _max_places,
    "layer_norm": F.layer_norm, "rms_norm": F.rms_norm, "group_norm": F.group_norm, "instance_norm": F.instance_norm,
    "batch_norm": F.batch_norm, "normalize": F.normalize,
    "lp_pool1d": F.lp_pool1d, "lp_pool2d": F.lp_pool2d, "lp_pool3d": F.lp_pool3d, "adaptive_avg_pool": _adaptive("avg"),
    "interpolate": F.interpolate,
    "gt": torch.gt, "ge": torch.ge, "lt": torch.lt, "le": torch.le, "eq": torch.eq, "ne": torch.ne,
    "logical_not": torch.logical_not,
}  # fmt: skip


def decode(index: Sequence[Any]) -> tuple[Any, ...]:
    """An index as it is stored -> as torch takes it: `[start, stop, step]` is a slice, `"new"` None, `"..."` the rest.

    >>> decode([[None, 3, None], "new", "...", 0])
    (slice(None, 3, None), None, Ellipsis, 0)
    """
    words = {"new": None, "...": Ellipsis}
    return tuple(slice(*i) if isinstance(i, list | tuple) else words[i] if isinstance(i, str) else i for i in index)


def encode(index: Any) -> list[Any] | None:
    """The inverse of `decode`; None for an index that is not made of numbers, slices, None and an ellipsis."""
    parts = index if isinstance(index, tuple) else (index,)
    stored: list[Any] = []
    for part in parts:
        if isinstance(part, slice) and all(isinstance(v, int | None) for v in (part.start, part.stop, part.step)):
            stored.append([part.start, part.stop, part.step])
        elif part is None or part is Ellipsis:
            stored.append("new" if part is None else "...")
        elif isinstance(part, int) and not isinstance(part, bool):
            stored.append(part)
        else:
            return None
    return stored


def _sizes(sizes: Sequence[int | None], like: Sequence[Tensor]) -> list[int]:
    """Sizes, where None is the batch size: that of the tensor beside."""
    return [like[0].shape[0] if size is None else size for size in sizes]


def _part(x: Tensor, of: str, size: Any, dim: int, index: int) -> Tensor:
    parts = {"chunk": torch.chunk, "split": torch.split}
    return torch.unbind(x, dim)[index] if of == "unbind" else parts[of](x, size, dim)[index]


def _pack(x: Tensor, *lengths: Tensor, batch_first: bool, enforce_sorted: bool, given: Any = None) -> Any:
    """A packed sequence; lengths are an input, or `given`."""
    return pack_padded_sequence(x, lengths[0].cpu() if lengths else given, batch_first, enforce_sorted)


def windows(size: int, output: int) -> list[tuple[int, int]]:
    """First and one behind the last input of each output of an adaptive pooling."""
    return [(i * size // output, -(-(i + 1) * size // output)) for i in range(output)]


def _adaptive_max(x: Tensor, output_size: list[int | None]) -> Tensor:
    """Adaptive max pooling; of integers, which torch has no kernel for, one dimension at a time."""
    if x.is_floating_point():
        return _adaptive("max")(x, output_size)
    for dim, size in enumerate(output_size, start=x.dim() - len(output_size)):
        if size is not None:
            cuts = [x.narrow(dim, start, stop - start) for start, stop in windows(x.shape[dim], size)]
            x = torch.cat([cut.amax(dim, keepdim=True) for cut in cuts], dim)
    return x


def nearest_places(sizes: Sequence[int], **settings: Any) -> list[list[int]]:
    """Which value of a dimension each result of nearest interpolation is, for each of the dimensions of those sizes.

    Torch computes places in float32: asked of it, they are the same where its arithmetic rounds.
    """
    found = []
    for dim, n in enumerate(sizes):
        column = [-1 if i == dim else 1 for i in range(len(sizes))]
        places = F.interpolate(torch.arange(float(n)).reshape(column).expand(1, 1, *sizes), **settings)[0, 0]
        found.append(places.movedim(dim, -1).reshape(-1, places.shape[dim])[0].long().tolist())
    return found


def _take(x: Tensor, places: Sequence[Sequence[int]]) -> Tensor:
    """Values of the last dimensions by their places."""
    for dim, index in enumerate(places, start=x.dim() - len(places)):
        x = x.index_select(dim, torch.tensor(index, device=x.device))
    return x


def _max_unpool(x: Tensor, places: Tensor, size: Sequence[int], value: float) -> Tensor:
    """Values of the last dimensions at their places in dimensions of `size`, which hold `value` elsewhere."""
    flat = x.new_full((*x.shape[: -len(size)], math.prod(size)), value)
    return flat.scatter(-1, places.flatten(-len(size)), x.flatten(-len(size))).unflatten(-1, size)


def _in_float(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For what torch has on floats alone; integers of up to 16 bits are exact in float32."""
    return lambda x, **settings: function(x.float(), **settings).to(x.dtype)


MOVES: dict[str, Callable[..., Any]] = {
    "transpose": lambda x, dim0, dim1: x.transpose(dim0, dim1),
    "movedim": lambda x, source, destination: x.movedim(source, destination),
    "squeeze": lambda x, dim: x.squeeze() if dim is None else x.squeeze(dim),
    "unsqueeze": lambda x, dim: x.unsqueeze(dim),
    "flatten": lambda x, start_dim, end_dim: x.flatten(start_dim, end_dim),
    "unflatten": lambda x, dim, sizes: x.unflatten(dim, sizes),
    "expand": lambda x, *like, sizes: x.expand(_sizes(sizes, like)),
    "repeat": lambda x, *like, sizes: x.repeat(_sizes(sizes, like)),
    "select": lambda x, dim, index: x.select(dim, index),
    "narrow": lambda x, dim, start, length: x.narrow(dim, start, length),
    "flip": lambda x, dims: x.flip(dims),
    "roll": lambda x, shifts, dims: x.roll(shifts, dims),
    "index": lambda x, index: x[decode(index)],
    "part": _part,
    "amax": lambda x, dim, keepdim: x.amax(dim, keepdim),
    "amin": lambda x, dim, keepdim: x.amin(dim, keepdim),
    "pixel_shuffle": lambda x, upscale_factor: F.pixel_shuffle(x, upscale_factor),
    "pixel_unshuffle": lambda x, downscale_factor: F.pixel_unshuffle(x, downscale_factor),
    "adaptive_max_pool": _adaptive_max,
    "interpolate": _in_float(F.interpolate),
    "take": _take,
    "max_unpool": _max_unpool,
    "masked_fill": lambda x, mask, value: x.masked_fill(mask.bool(), value),
    "pack": _pack,
    "pack_sequence": lambda *tensors, enforce_sorted: pack_sequence(list(tensors), enforce_sorted),
    "pad_packed": lambda x, batch_first, **filling: pad_packed_sequence(x, batch_first, **filling)[0],
    "packed_lengths": lambda x: pad_packed_sequence(x)[1],
    "stack": lambda *tensors, dim: torch.stack(tensors, dim),
    "where": lambda x, other, mask: torch.where(mask.bool(), x, other),
}
