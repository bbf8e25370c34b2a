"""The common case of a quantizer, in as few operations as can be.

That is integers with a scale a tensor or a channel, clipped STE or LSQ, rounded to nearest, of tensors that the kernels
of `qat.numerics.fast` take. `FakeQuantize` does the same for every scheme, in tensor operations; of a small tensor
their number is what it costs.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qat import processes
from qat.mode import Mode
from qat.numerics import fast, native
from qat.numerics.codes import LEVELS
from qat.numerics.gradients import GRADIENTS
from qat.observers import Ema, Extremes

FakeQuantize = Any
"""A node: its class stands below, as it calls these functions."""


def is_plain(node: FakeQuantize) -> bool:
    """Whether the kernels can do what the scheme asks for."""
    scheme = node.scheme
    return (
        scheme.format == "int" and node.grid is None and node.fitted is None and not node.adapts
        and not node.layout.by_rows and GRADIENTS[scheme.gradient].plain
        and (node.range.kept or node.range.dynamic)
    )  # fmt: skip


def plan(node: FakeQuantize, x: Tensor) -> fast.Plan | None:
    """How the kernels take `x`; None where they do not, or do not pay."""
    if node.rounding_in_use != "nearest":
        return None
    learns = node.range.learned and node.mode is not Mode.frozen and node.scale.requires_grad
    shape: tuple[int, ...] = ()
    if scales := node.layout.scale_shape(x.shape) if node.dynamic else node.scale_shape:
        axis = node.layout.axis % x.dim()
        shape = (1,) * axis + scales + (1,) * (x.dim() - axis - 1)
    taken = fast.plan(x, shape, learns)
    return taken if fast.pays(x, taken) else None


def quantize(node: FakeQuantize, x: Tensor, taken: fast.Plan, site: int, looks: bool) -> Tensor:
    """What `FakeQuantize.forward` returns of a plain node that quantizes."""
    symmetric, codes = node.scheme.symmetric, node.kept and node.quant_max - node.quant_min < LEVELS
    if taken.form == "native" and (y := _at_once(node, x, taken, looks, codes)) is not None:
        return y
    if node.dynamic:
        low, high = node.measure(x)
        scale, _, bottom, top = fast.choose(low, high, _constants(node, x), symmetric)
        return fast.take(x, taken, scale, bottom, top, node.relu, whole=_whole(node), codes=codes)
    if looks and node.follows:
        if type(node.observer) is Ema and node.observer.simple and not processes.several():
            return fast.take(x, taken, *_follow(node, node.observer, x), node.relu, codes=codes)
        node.observe(x, site)
        node.set_range_from_observer()
    # of one that was learned the magnitude
    scale = node.scale if taken.lsq or taken.form == "native" else node.qparams()[0].detach().clone()
    return fast.fake_quantize(
        x, scale, None if symmetric else node.zero_point, int(node.quant_min), int(node.quant_max), relu=node.relu,
        grad_scale=node.grad_scale(x, node.scale) if taken.lsq else None, taken=taken, codes=codes,
    )  # fmt: skip


def _at_once(node: FakeQuantize, x: Tensor, taken: fast.Plan, looks: bool, codes: bool) -> Tensor | None:
    """One call for the range and the values, where the range is that of `x` or a moving average; else None."""
    moves, observer = looks and node.follows, node.observer
    if not (node.dynamic or moves):
        return None
    grid = native.options(node.quant_min, node.quant_max, node.scheme.symmetric, node.relu, codes)
    if node.dynamic and type(observer).measure is Extremes.measure and taken.layout.outer == 1:
        return fast.known(native.measured(x, taken.layout.channels, _whole(node), grid), taken.inner)
    if moves and type(observer) is Ema and observer.simple and not processes.several():
        kept = observer.low, observer.high, node.scale, node.zero_point
        return fast.known(native.following(x, *kept, node.scheme.momentum, grid), taken.inner)
    return None


def _whole(node: FakeQuantize) -> bool:
    """Whether the range of a tensor itself clips nothing of it."""
    both_ways = node.scheme.symmetric and node.quant_min <= -node.quant_max  # an unsigned grid clips what is negative
    return both_ways and not node.relu and isinstance(node.observer, Extremes)


@torch.no_grad()
def _follow(node: FakeQuantize, observer: Ema, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the average and the range with `x`; scale and both ends of the grid."""
    kept = [t.view(1) for t in (observer.low, observer.high, node.scale, node.zero_point)]
    low, high = torch.aminmax(x)
    ends = low.view(1), high.view(1)
    *moved, bottom, top = fast.follow(*ends, kept[0], kept[1], _constants(node, x), node.scheme.symmetric)
    torch._foreach_copy_(kept, moved)
    return moved[2], bottom, top


def _constants(node: FakeQuantize, x: Tensor) -> Tensor:
    floor = 0.0 if node.relu else -math.inf
    return fast.constants(int(node.quant_min), int(node.quant_max), floor, node.scheme.momentum, x.device)
