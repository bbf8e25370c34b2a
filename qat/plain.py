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
from qat.numerics import fast
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
    if node.scale_shape:
        axis = node.layout.axis % x.dim()
        shape = (1,) * axis + node.scale_shape + (1,) * (x.dim() - axis - 1)
    taken = fast.plan(x, shape, learns)
    return taken if fast.pays(x, taken) else None


def quantize(node: FakeQuantize, x: Tensor, taken: fast.Plan, site: int, looks: bool) -> Tensor:
    """What `FakeQuantize.forward` returns of a plain node that quantizes."""
    symmetric, codes = node.scheme.symmetric, node.kept and node.quant_max - node.quant_min < LEVELS
    if node.dynamic:
        low, high = node.measure(x)
        scale, _, bottom, top = fast.choose(low, high, _constants(node, x), symmetric)
        both_ways = symmetric and node.quant_min <= -node.quant_max  # an unsigned grid clips what is negative
        whole = both_ways and not node.relu and isinstance(node.observer, Extremes)
        return fast.take(x, taken, scale, bottom, top, node.relu, whole=whole, codes=codes)
    if looks and node.follows:
        if isinstance(node.observer, Ema) and node.observer.simple and not processes.several():
            return fast.take(x, taken, *_follow(node, node.observer, x), node.relu, codes=codes)
        node.observe(x, site)
        node.set_range_from_observer()
    scale = node.scale if taken.lsq else node.qparams()[0].detach().clone()  # of one that was learned the magnitude
    return fast.fake_quantize(
        x, scale, None if symmetric else node.zero_point, int(node.quant_min), int(node.quant_max), relu=node.relu,
        grad_scale=node.grad_scale(x, node.scale) if taken.lsq else None, taken=taken, codes=codes,
    )  # fmt: skip


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
