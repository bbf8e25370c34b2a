"""What networks contain besides layers: each operation prepared, trained, lowered, saved and written to ONNX.

One small network an operation. `inside` says what the integer network must hold for it: the runtime layer, and, in
`integers`, whether it works on integers.
"""

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.export import load, save_checkpoint, save_onnx
from qat.export.formats import integers_given
from qat.export.onnxruntime import OnnxNetwork, onnx_given
from qat.export.parity import training_integers
from qat.graph import Graph
from qat.ptq import round_biases
from qat.runtime import IntegerNetwork
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.operations import Add, Average, Function, MaxPool, Mean, Move, Pad, Reshape, Slice
from tests.networks.blocks import Net

IMAGE, ODD, CLIP, SIGNAL, TOKENS = (3, 8, 8), (3, 7, 5), (2, 4, 6, 6), (3, 12), (6, 8)


class Case(NamedTuple):
    """`function(net, y)` between a first layer and a linear one; its inputs' shape; what it becomes; its parts."""

    function: Callable[..., Tensor]
    inside: type | None = None
    shape: tuple[int, ...] = IMAGE
    integers: bool = False  # keeps integers: reads and makes them
    parts: Callable[[], dict[str, Any]] = dict


def first_layer(shape: tuple[int, ...]) -> nn.Module:
    convolutions: dict[int, Callable[..., nn.Module]] = {3: nn.Conv2d, 4: nn.Conv3d}
    if shape == SIGNAL:
        return nn.Conv1d(3, 4, 3, padding=1)
    if shape == TOKENS:
        return nn.Linear(8, 8)
    return convolutions[len(shape)](shape[0], 4, 3, padding=1)


def build(case: Case) -> tuple[Net, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(48, *case.shape) + 0.2
    net = Net(
        lambda s, x: s.head(case.function(s, s.first(x)).flatten(1)),
        first=first_layer(case.shape), head=nn.LazyLinear(5), **case.parts(),
    )  # fmt: skip
    net(x[:2])
    return net, x


def other(channels: int = 4, kind: Any = nn.Conv2d) -> dict[str, Any]:
    """A second branch."""
    return {"b": kind(4, channels, 1)}


def gate() -> dict[str, Any]:
    return {"b": nn.Conv2d(4, 4, 1), "pool": nn.AdaptiveAvgPool2d(1)}


def parameter(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"w": nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2)))}


def buffer(*shape: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"w": torch.randn(shape, generator=torch.Generator().manual_seed(2))}


def part(make: Callable[[], nn.Module]) -> Callable[[], dict[str, Any]]:
    return lambda: {"op": make()}


def lived(norm: nn.Module) -> nn.Module:
    """A norm whose weights are not ones and zeros."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1)
    return norm


def isub(s: Any, y: Tensor) -> Tensor:
    z = s.b(y)
    z -= y
    return z


def imul(s: Any, y: Tensor) -> Tensor:
    z = s.b(y)
    z *= y
    return z


def two_matmuls(s: Any, y: Tensor) -> Tensor:
    scores = s.q(y) @ s.k(y).transpose(-2, -1)
    return torch.softmax(scores * 0.3, dim=-1) @ s.v(y)


def projections() -> dict[str, Any]:
    return {name: nn.Linear(8, 8) for name in ("q", "k", "v")}


def heads(s: Any, y: Tensor) -> Tensor:
    """Two heads, every size read from the tensor."""
    batch, steps, width = y.shape
    q, k, v = s.qkv(y).reshape(batch, steps, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
    p = torch.softmax(q @ k.mT * (width // 2) ** -0.5, dim=-1)
    return (p @ v).transpose(1, 2).reshape(batch, steps, width)


def class_token(s: Any, y: Tensor) -> Tensor:
    return s.op(torch.cat([s.w.expand(y.shape[0], -1, -1), y], dim=1))


def attention(**settings: Any) -> Callable[..., Tensor]:
    def run(s: Any, y: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (s.q(y), s.k(y), s.v(y)))
        mask = {"attn_mask": s.w} if hasattr(s, "w") else {}
        return F.scaled_dot_product_attention(q, k, v, **mask, **settings).transpose(1, 2).flatten(2)

    return run


def grouped_queries(s: Any, y: Tensor) -> Tensor:
    """Four heads of queries, two of keys and values."""
    q = s.q(y).unflatten(-1, (4, 2)).transpose(1, 2)
    k, v = (part[..., :4].unflatten(-1, (2, 2)).transpose(1, 2) for part in (s.k(y), s.v(y)))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)


def masked(mask: Tensor) -> Callable[[], dict[str, Any]]:
    return lambda: projections() | {"w": mask}


def _both(pooled: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    values, places = pooled
    return values, places


def unpooled(s: Any, y: Tensor) -> Tensor:
    """Values back at their places, what is between them as large as before."""
    values, places = s.op(y)
    return s.up(s.b(values), places, output_size=y.shape)


def unpooling(dims: int, *window: Any) -> Callable[[], dict[str, Any]]:
    """A pooling with places, its inverse, and a layer for what stands between them."""
    pool, up, conv = (getattr(nn, f"{name}{dims}d") for name in ("MaxPool", "MaxUnpool", "Conv"))
    return lambda: {"op": pool(*window, return_indices=True), "up": up(*window), "b": conv(4, 4, 1)}


ARITHMETIC: dict[str, Case] = {
    "sub": Case(lambda s, y: y - s.b(y), Function, parts=other),
    "torch.sub": Case(lambda s, y: torch.sub(y, s.b(y)), Function, parts=other),
    "method sub": Case(lambda s, y: s.b(y).sub(y), Function, parts=other),
    "isub": Case(isub, Function, parts=other),
    "sub_": Case(lambda s, y: s.b(y).sub_(y), Function, parts=other),
    "mul": Case(lambda s, y: y * s.b(y), Function, parts=other),
    "torch.mul": Case(lambda s, y: torch.mul(y, s.b(y)), Function, parts=other),
    "imul": Case(imul, Function, parts=other),
    "mul_": Case(lambda s, y: s.b(y).mul_(y), Function, parts=other),
    "squeeze-excite": Case(lambda s, y: y * torch.sigmoid(s.b(s.pool(y))), Function, parts=gate),
    "squeeze-excite on the left": Case(lambda s, y: F.hardsigmoid(s.b(s.pool(y))) * y, Function, parts=gate),
    "div": Case(lambda s, y: y / (torch.sigmoid(s.b(y)) + 0.5), Function, parts=other),
    "torch.div": Case(lambda s, y: torch.div(y, torch.exp(s.b(y)) + 1), Function, parts=other),
    "attention": Case(two_matmuls, IntegerMatmul, TOKENS, parts=projections),
    "heads": Case(heads, IntegerMatmul, TOKENS, parts=lambda: {"qkv": nn.Linear(8, 24)}),
    "sdpa": Case(attention(), IntegerMatmul, TOKENS, parts=projections),
    "sdpa, causal": Case(attention(is_causal=True, scale=0.7), IntegerMatmul, TOKENS, parts=projections),
    "sdpa, boolean mask": Case(attention(), IntegerMatmul, TOKENS, parts=masked(torch.ones(6, 6).tril(1).bool())),
    "sdpa, float mask": Case(attention(), IntegerMatmul, TOKENS, parts=masked(torch.randn(6, 6))),
    "sdpa, grouped queries": Case(grouped_queries, IntegerMatmul, TOKENS, parts=projections),
    "torch.matmul": Case(lambda s, y: torch.matmul(y, s.op(y).mT), IntegerMatmul, TOKENS,
                         parts=part(lambda: nn.Linear(8, 8))),
    "bmm": Case(lambda s, y: torch.bmm(y, s.op(y).transpose(1, 2)), IntegerMatmul, TOKENS,
                parts=part(lambda: nn.Linear(8, 8))),
    "matmul by a parameter": Case(lambda s, y: y @ s.w, IntegerMatmul, TOKENS, parts=parameter(8, 3)),
    "einsum": Case(lambda s, y: torch.einsum("b i d, b j d -> b i j", y, s.op(y)), IntegerMatmul, TOKENS,
                   parts=part(lambda: nn.Linear(8, 8))),
    "einsum of three": Case(lambda s, y: torch.einsum("bid,bjd,bjk->bik", y, s.op(y), y), Function, TOKENS,
                            parts=part(lambda: nn.Linear(8, 8))),
    "add with alpha": Case(lambda s, y: torch.add(y, s.b(y), alpha=0.5), Function, parts=other),
    "times a number": Case(lambda s, y: y * 0.5, Function),
    "number times": Case(lambda s, y: 2.0 * y, Function),
    "plus a number": Case(lambda s, y: y + 1, Function),
    "one minus": Case(lambda s, y: 1 - y, Function),
    "by a number": Case(lambda s, y: y / 8, Function),
    "power": Case(lambda s, y: y**2, Function),
    "negative": Case(lambda s, y: -y, Function),
    "plus a parameter": Case(lambda s, y: y + s.w, Add, parts=parameter(4, 1, 1)),
    "times a parameter": Case(lambda s, y: y * s.w, Function, parts=parameter(4, 1, 1)),
    "times a scalar parameter": Case(lambda s, y: y * s.w, Function, parts=parameter()),
    "positions": Case(lambda s, y: y + s.w, Add, TOKENS, parts=buffer(1, 6, 8)),
    "minus a buffer": Case(lambda s, y: s.w - y, Function, parts=buffer(1, 4, 1, 1)),
    "class token": Case(class_token, None, TOKENS,
                        parts=lambda: parameter(1, 1, 8)() | {"op": nn.Linear(8, 4)}),
    "sum": Case(lambda s, y: y.sum((2, 3)), Function),
    "clamp": Case(lambda s, y: y.clamp(-0.5, 0.7)),  # of the integers that the layer makes
    "clamp_": Case(lambda s, y: y.clamp_(min=0.1), Function),
    "abs, square, sqrt": Case(lambda s, y: torch.sqrt(y.abs() + y.square() + 0.1), Function),
    "exp, log, rsqrt": Case(lambda s, y: torch.log(y.exp() + 1) * torch.rsqrt(y**2 + 1), Function),
    "normalize": Case(lambda s, y: F.normalize(y, dim=1), Function),
    "pad for a function": Case(lambda s, y: F.gelu(F.pad(y, (1, 2), value=0.7)), Function),
}  # fmt: skip

MOVING: dict[str, Case] = {
    name: Case(function, inside, shape, True, parts)  # type: ignore[arg-type]
    for name, (function, inside, shape, parts) in {
        "transpose": (lambda s, y: y.transpose(1, 2), Move, IMAGE, dict),
        "torch.transpose": (lambda s, y: torch.transpose(y, -1, 1), Move, IMAGE, dict),
        "mT": (lambda s, y: y.mT, Move, IMAGE, dict),
        "movedim": (lambda s, y: y.movedim(1, -1), Move, IMAGE, dict),
        "unsqueeze, squeeze": (lambda s, y: y.unsqueeze(1).transpose(1, 2).squeeze(2), Move, IMAGE, dict),
        "flatten some": (lambda s, y: y.flatten(1, 2), Move, IMAGE, dict),
        "flatten the batch": (lambda s, y: y.flatten(0, 1).reshape(-1, 4, 8, 8), Move, IMAGE, dict),
        "unflatten": (lambda s, y: y.unflatten(1, (2, 2)), Move, IMAGE, dict),
        "nn.Unflatten": (lambda s, y: s.op(y), Move, IMAGE, part(lambda: nn.Unflatten(2, (2, 4)))),
        "sizes": (lambda s, y: y.view(y.size(0), y.size(1) // 2, 2, y.shape[2], y.size(-1)).transpose(1, 2), Reshape,
                  IMAGE, dict),
        "expand": (lambda s, y: y[:, :1].expand(-1, 3, -1, -1), Move, IMAGE, dict),
        "expand_as": (lambda s, y: y[:, :1].expand_as(y), Move, IMAGE, dict),
        "max": (lambda s, y: y.max(dim=2)[0], Move, IMAGE, dict),
        "min of torch, named": (lambda s, y: torch.min(y, -1, keepdim=True).values, Move, IMAGE, dict),
        "repeat": (lambda s, y: y.repeat(1, 2, 1, 1), Move, IMAGE, dict),
        "repeat with a new dimension": (lambda s, y: y.repeat(1, 1, 1, 2, 1).transpose(0, 1), Move, IMAGE, dict),
        "select": (lambda s, y: y.select(2, 3), Move, IMAGE, dict),
        "narrow": (lambda s, y: torch.narrow(y, 2, 1, 4), Move, IMAGE, dict),
        "flip": (lambda s, y: y.flip(-1, 2), Move, IMAGE, dict),
        "roll": (lambda s, y: torch.roll(y, (-3, 2), (2, 3)), Move, IMAGE, dict),
        "index": (lambda s, y: y[:, 0], Move, IMAGE, dict),
        "index with all": (lambda s, y: y[:, None, 1:, ..., -1], Move, IMAGE, dict),
        "index by a size": (lambda s, y: y[:, : y.shape[1] // 2, 1:], Slice, IMAGE, dict),
        "amax": (lambda s, y: y.amax((2, 3)), Move, IMAGE, dict),
        "amin": (lambda s, y: torch.amin(y, -1, keepdim=True), Move, IMAGE, dict),
        "pixel shuffle": (lambda s, y: s.op(y), Move, IMAGE, part(lambda: nn.PixelShuffle(2))),
        "pixel unshuffle": (lambda s, y: F.pixel_unshuffle(y, 2), Move, IMAGE, dict),
        "nn.MaxPool1d": (lambda s, y: s.op(y), MaxPool, SIGNAL, part(lambda: nn.MaxPool1d(3, 2, 1))),
        "nn.MaxPool3d": (lambda s, y: s.op(y), MaxPool, CLIP, part(lambda: nn.MaxPool3d(2))),
        "F.max_pool3d": (lambda s, y: F.max_pool3d(y, (1, 2, 2), 1, (0, 1, 0)), MaxPool, CLIP, dict),
        "nn.AdaptiveMaxPool1d": (lambda s, y: s.op(y), Move, SIGNAL, part(lambda: nn.AdaptiveMaxPool1d(5))),
        "nn.AdaptiveMaxPool2d": (lambda s, y: s.op(y), Move, IMAGE, part(lambda: nn.AdaptiveMaxPool2d(2))),
        "F.adaptive_max_pool2d, odd": (lambda s, y: F.adaptive_max_pool2d(y, (3, None)), Move, ODD, dict),
        "nn.AdaptiveMaxPool3d": (lambda s, y: s.op(y), Move, CLIP, part(lambda: nn.AdaptiveMaxPool3d(1))),
        "nearest": (lambda s, y: F.interpolate(y, scale_factor=2), Move, ODD, dict),
        "nearest to a size": (lambda s, y: F.interpolate(y, size=(5, 9)), Move, IMAGE, dict),
        "nearest-exact": (lambda s, y: F.interpolate(y, size=(5, 4), mode="nearest-exact"), Move, IMAGE, dict),
        "nn.Upsample": (lambda s, y: s.op(y), Move, IMAGE, part(lambda: nn.Upsample(scale_factor=2))),
        "nn.UpsamplingNearest2d": (
            lambda s, y: s.op(y), Move, IMAGE, part(lambda: nn.UpsamplingNearest2d(scale_factor=2))),
        "MaxPool2d, values": (
            lambda s, y: s.op(y)[0], MaxPool, IMAGE, part(lambda: nn.MaxPool2d(2, return_indices=True))),
        "F.max_pool1d, values": (
            lambda s, y: _values(F.max_pool1d(y, 3, 2, 1, return_indices=True)), MaxPool, SIGNAL, dict),
        "AdaptiveMaxPool3d, values": (
            lambda s, y: _values(s.op(y)), Move, CLIP, part(lambda: nn.AdaptiveMaxPool3d(2, return_indices=True))),
        "torch.adaptive_max_pool1d": (lambda s, y: torch.adaptive_max_pool1d(y, 5)[0], Move, SIGNAL, dict),
        **{f"MaxUnpool{i}d": (unpooled, Move, shape, unpooling(i, 2))
           for i, shape in ((1, SIGNAL), (2, ODD), (3, CLIP))},
        "MaxUnpool2d, overlapping": (lambda s, y: s.up(*_both(s.op(s.b(y))), y.shape), Move, IMAGE,
                                     unpooling(2, 3, 2, 1)),
        "F.max_unpool2d": (
            lambda s, y: F.max_unpool2d(*_both(F.max_pool2d(y, (2, 1), return_indices=True)), (2, 1)), Move, IMAGE,
            dict),
        "torch.max_pool2d": (lambda s, y: torch.max_pool2d(y, 3, 2, 1), MaxPool, IMAGE, dict),
        "masked_fill with zero": (lambda s, y: y.masked_fill(s.w > 0, 0.0), Move, IMAGE, buffer(8, 8)),
        "clone": (lambda s, y: y.clone().transpose(2, 3), Move, IMAGE, dict),
    }.items()
}  # fmt: skip


def _values(pooled: tuple[Tensor, Tensor]) -> Tensor:
    values, _ = pooled
    return values


JOINING: dict[str, Case] = {
    "stack": Case(lambda s, y: torch.stack([y, s.b(y)], dim=2), Move, integers=True, parts=other),
    "chunk": Case(lambda s, y: _swap(s.b(y).chunk(2, 1)), Move, integers=True, parts=other),
    "torch.chunk, uneven": Case(lambda s, y: torch.chunk(y, 3, dim=2)[-1], Move, integers=True),
    "split": Case(lambda s, y: y.split(3, dim=1)[1], Move, integers=True),
    "split by sizes": Case(lambda s, y: torch.split(y, [1, 3], dim=1)[1], Move, integers=True),
    "unbind": Case(lambda s, y: y.unbind(1)[2], Move, integers=True),
    "gated linear unit": Case(lambda s, y: _gated(s.b(y).chunk(2, dim=1)), Function, parts=lambda: other(6)),
    "nn.GLU": Case(lambda s, y: s.op(torch.cat([y, torch.tanh(y)], 1)), Function, parts=part(lambda: nn.GLU(1))),
    "maximum": Case(lambda s, y: torch.maximum(y, torch.tanh(y)), Function),
    "minimum": Case(lambda s, y: y.minimum(0.5 * y), Function),
    "where": Case(lambda s, y: torch.where(s.w > 0, y, s.b(y)), Move, integers=True,
                  parts=lambda: other() | buffer(8, 8)()),
    "where with a number": Case(lambda s, y: torch.where(y > 0, y, 0.0), Function),
    "masked_fill": Case(lambda s, y: y.masked_fill(y < -0.5, 1.5), Function),
    "masks": Case(lambda s, y: torch.where(~(y <= 0.1), y, -y).masked_fill(torch.eq(y, 0), 3.0), Function),
    "pad with a value": Case(lambda s, y: F.pad(y, (1, 2, 0, 1), value=0.7), Pad, integers=True),
    "pad what is not negative": Case(lambda s, y: F.pad(F.relu(y), (1, 2), "constant", 0.5), Pad, integers=True),
    "pad by sizes": Case(lambda s, y: F.pad(y, (0, y.shape[2] // 4), value=-9.0), Pad, integers=True),
    "nn.ConstantPad1d": Case(lambda s, y: s.op(y), Pad, SIGNAL, True, part(lambda: nn.ConstantPad1d(2, -1.5))),
    "nn.ConstantPad2d": Case(
        lambda s, y: s.op(y), Pad, IMAGE, True, part(lambda: nn.ConstantPad2d((1, 0, 2, 1), 0.3))),
    "nn.ConstantPad3d": Case(lambda s, y: s.op(y), Pad, CLIP, True, part(lambda: nn.ConstantPad3d(1, 2.5))),
}  # fmt: skip


def _swap(parts: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([parts[1], parts[0]], 1)


def _gated(parts: tuple[Tensor, Tensor]) -> Tensor:
    a, b = parts
    return a * torch.sigmoid(b)


ACTIVATIONS: dict[str, Any] = {
    "PReLU": lambda: lived(nn.PReLU(4)), "PReLU, one": nn.PReLU, "LeakyReLU": lambda: nn.LeakyReLU(0.2, inplace=True),
    "ELU": lambda: nn.ELU(0.7), "GELU": nn.GELU, "GELU, tanh": lambda: nn.GELU("tanh"), "SiLU": nn.SiLU,
    "Mish": nn.Mish, "Hardswish": nn.Hardswish, "Hardsigmoid": nn.Hardsigmoid,
    "Hardtanh": lambda: nn.Hardtanh(-0.3, 0.8), "ReLU6": nn.ReLU6, "Sigmoid": nn.Sigmoid, "Tanh": nn.Tanh,
    "Softmax": lambda: nn.Softmax(1), "SELU": nn.SELU, "CELU": lambda: nn.CELU(0.7), "Softsign": nn.Softsign,
    "LogSigmoid": nn.LogSigmoid,
    "LogSoftmax": lambda: nn.LogSoftmax(-1), "Softplus": lambda: nn.Softplus(2),
}  # fmt: skip
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.leaky_relu": lambda y: F.leaky_relu(y, 0.3), "F.leaky_relu in place": lambda y: F.leaky_relu(y, 0.3, True),
    "F.leaky_relu_": lambda y: F.leaky_relu_(y, 0.3), "F.elu": lambda y: F.elu(y, inplace=True), "F.mish": F.mish,
    "F.gelu, tanh": lambda y: F.gelu(y, approximate="tanh"), "F.silu": lambda y: F.silu(y, True), "F.relu6": F.relu6,
    "F.hardtanh": lambda y: F.hardtanh(y, -0.5, 0.5), "F.softmax": lambda y: F.softmax(y, dim=1),
    "torch.softmax": lambda y: torch.softmax(y, 1), "method softmax": lambda y: y.softmax(-1),
    "F.log_softmax": lambda y: F.log_softmax(y, 1), "F.softplus": F.softplus, "method sigmoid": lambda y: y.sigmoid(),
    "sigmoid_": lambda y: y.sigmoid_(), "method tanh": lambda y: y.tanh(), "torch.tanh_": lambda y: torch.tanh_(y),
    "F.hardswish": F.hardswish, "F.hardsigmoid": F.hardsigmoid, "torch.sigmoid": torch.sigmoid,
    "F.selu in place": lambda y: F.selu(y, True), "F.celu": lambda y: F.celu(y, 0.7), "torch.sin": torch.sin,
    "method cos": lambda y: y.cos(), "F.logsigmoid": F.logsigmoid, "F.softsign": F.softsign,
    "F.silu, not in place": lambda y: F.silu(y, False),
}  # fmt: skip
CLAMPS = ("Hardtanh", "ReLU6", "F.relu6", "F.hardtanh")  # clamps of the integers that the layer makes
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LayerNorm": (lambda: nn.LayerNorm(8), TOKENS), "LayerNorm of images": (lambda: nn.LayerNorm([4, 8, 8]), IMAGE),
    "LayerNorm, bare": (lambda: nn.LayerNorm(8, elementwise_affine=False), TOKENS),
    "RMSNorm": (lambda: nn.RMSNorm(8), TOKENS), "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "GroupNorm, bare": (lambda: nn.GroupNorm(2, 4, affine=False), SIGNAL),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4), SIGNAL),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "InstanceNorm2d, tracked": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), IMAGE),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4), CLIP),
}  # fmt: skip
POOLS: dict[str, tuple[Callable[..., Tensor], type, tuple[int, ...], Callable[[], dict[str, Any]]]] = {
    "nn.AvgPool3d": (lambda s, y: s.op(y), Average, CLIP, part(lambda: nn.AvgPool3d(2))),
    "F.avg_pool3d": (lambda s, y: F.avg_pool3d(y, (1, 2, 2), 1), Average, CLIP, dict),
    "nn.AdaptiveAvgPool3d": (lambda s, y: s.op(y), Mean, CLIP, part(lambda: nn.AdaptiveAvgPool3d(1))),
    "nn.AdaptiveAvgPool1d": (lambda s, y: s.op(y), Function, SIGNAL, part(lambda: nn.AdaptiveAvgPool1d(4))),
    "nn.AdaptiveAvgPool2d": (lambda s, y: s.op(y), Function, IMAGE, part(lambda: nn.AdaptiveAvgPool2d((2, 4)))),
    "F.adaptive_avg_pool2d, odd": (lambda s, y: F.adaptive_avg_pool2d(y, (3, None)), Function, ODD, dict),
    "nn.LPPool1d": (lambda s, y: s.op(y), Function, SIGNAL, part(lambda: nn.LPPool1d(2, 3))),
    "nn.LPPool3d": (lambda s, y: s.op(y), Function, CLIP, part(lambda: nn.LPPool3d(2, 2))),
    "F.lp_pool2d": (lambda s, y: F.lp_pool2d(y.abs(), 3, 2), Function, IMAGE, dict),
    "bilinear": (lambda s, y: F.interpolate(y, scale_factor=2, mode="bilinear"), Function, ODD, dict),
    "bilinear, corners": (
        lambda s, y: F.interpolate(y, size=(5, 9), mode="bilinear", align_corners=True), Function, IMAGE, dict),
    "bilinear to the size of": (
        lambda s, y: F.interpolate(s.op(y), size=y.shape[2:], mode="bilinear") + y, Function, IMAGE,
        part(lambda: nn.MaxPool2d(2))),
    "linear": (lambda s, y: F.interpolate(y, size=7, mode="linear"), Function, SIGNAL, dict),
    "trilinear": (lambda s, y: s.op(y), Function, CLIP, part(lambda: nn.Upsample(scale_factor=2, mode="trilinear"))),
    "nn.UpsamplingBilinear2d": (lambda s, y: s.op(y), Function, ODD, part(lambda: nn.UpsamplingBilinear2d((9, 6)))),
    "bicubic": (lambda s, y: F.interpolate(y, size=(11, 6), mode="bicubic"), Function, IMAGE, dict),
    "area": (lambda s, y: F.interpolate(y, size=(3, 5), mode="area"), Function, ODD, dict),
}  # fmt: skip

CASES: dict[str, Case] = {
    **ARITHMETIC, **MOVING, **JOINING,
    **{f"nn.{name}": Case(lambda s, y: s.op(y), None if name in CLAMPS else Function, parts=part(make))
       for name, make in ACTIVATIONS.items()},
    **{name: Case(lambda s, y, f=function: f(y), None if name in CLAMPS else Function)
       for name, function in FUNCTIONS.items()},
    "F.prelu": Case(lambda s, y: F.prelu(y, s.w), Function, parts=parameter(4)),
    **{f"nn.{name}": Case(lambda s, y: s.op(y), Function, shape, parts=part(lambda make=make: lived(make())))
       for name, (make, shape) in NORMS.items()},
    "F.layer_norm": Case(lambda s, y: F.layer_norm(y, (8,), s.w), Function, TOKENS, parts=parameter(8)),
    "F.rms_norm": Case(lambda s, y: F.rms_norm(y, (8,), s.w, 1e-5), Function, TOKENS, parts=parameter(8)),
    "F.group_norm": Case(lambda s, y: F.group_norm(y, 4, s.w), Function, parts=parameter(4)),
    "F.instance_norm": Case(lambda s, y: F.instance_norm(y, weight=s.w), Function, parts=parameter(4)),
    "nn.BatchNorm3d": Case(lambda s, y: torch.relu(s.op(y)), None, CLIP, parts=part(lambda: nn.BatchNorm3d(4))),
    **{name: Case(f, kind, shape, parts=parts) for name, (f, kind, shape, parts) in POOLS.items()},
}  # fmt: skip


def config(bits: int) -> qat.QuantConfig:
    activation = {"bits": bits, "symmetric": False}
    weight = {"bits": 8} if bits == 8 else {"bits": 16}
    return qat.QuantConfig.from_dict({"weight": weight, "activation": activation, "input": activation})


def ready(net: nn.Module, x: Tensor, bits: int, steps: int = 0) -> fx.GraphModule:
    """Prepared, calibrated, trained for some steps, and frozen with rounded biases."""
    prepared = qat.prepare(net, config(bits), x[:4])
    qat.calibrate(prepared, x.split(24))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-3)
    prepared.train()
    for _ in range(steps):
        before = copy.deepcopy(dict(prepared.named_parameters()))
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        optimizer.step()
        for name, parameter in prepared.named_parameters():  # some biases cancel: in front of a norm, of a softmax
            assert parameter.grad is not None, name
            assert parameter.isfinite().all(), name
            assert parameter.dim() < 2 or not torch.equal(parameter, before[name]), name
    qat.set_mode(prepared.eval(), "frozen")
    round_biases(prepared)
    return prepared


@torch.no_grad()
def assert_integers(prepared: fx.GraphModule, network: IntegerNetwork, x: Tensor, path: Path) -> None:
    """Each layer, given training's integers, makes training's: at most a step off, hardly ever; so does the file."""
    given = training_integers(prepared, network, x)
    assert given
    for made in (
        integers_given(network, (x,), given),
        onnx_given(path, "generic", network.grids(), (x,), given).integers,
    ):
        assert made.keys() == given.keys()
        for name, expected in given.items():
            steps = (made[name].int() - expected.int()).abs()
            assert steps.max() <= 1, name
            assert (steps == 0).float().mean() >= 0.995, name


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_trained_lowered_saved_and_written(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    net, x = build(case)
    with torch.enable_grad():
        prepared = ready(net, x, 8, steps=1)
    network = qat.lower(prepared)
    kinds = [type(layer) for layer in network.layers.values()]
    assert case.inside is None or case.inside in kinds
    if case.integers:
        tensors = network.run(x)
        for node in network.nodes:
            if isinstance(network.layer(node.name), Move | Reshape | Slice | MaxPool | Pad):
                assert not tensors[node.inputs[0]].is_floating_point()
                assert tensors[node.name].dtype == tensors[node.inputs[0]].dtype
    expected, simulated = network(x), prepared(x)
    close = 0.05 * simulated.std() + 1e-4
    assert (expected - simulated).abs().max() <= 4 * close
    assert (expected - simulated).abs().mean() <= 0.1 * close

    save_checkpoint(network, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path / "model.safetensors")(x), expected)

    save_onnx(network, tmp_path / "model.onnx", (x[:3],))
    got = OnnxNetwork(tmp_path / "model.onnx")
    assert (got(x) - expected).abs().mean() <= 0.1 * close
    assert got(x[:1]).shape == expected[:1].shape  # any batch size
    assert_integers(prepared, network, x, tmp_path / "model.onnx")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("name", ["clamp", "nn.Hardtanh", "F.relu6", "relu, clamped", "both ends"])
@torch.no_grad()
def test_clamps_are_clamps_of_integers(name: str, bits: int, tmp_path: Path) -> None:
    """Of the layer in front: nothing is computed on real numbers, and its largest integer is the clamped one."""
    more = {
        "relu, clamped": Case(lambda s, y: s.b(F.relu(y).clamp(max=0.1)), parts=other),
        "both ends": Case(lambda s, y: torch.cat([F.hardtanh(s.b(y), -0.1, 0.2), 2 * y], 1), parts=other),
    }
    net, x = build((CASES | more)[name])
    prepared = ready(net.eval(), x, bits)
    network = qat.lower(prepared)
    assert (network(x) - prepared(x)).abs().max() <= 0.02 * prepared(x).std()
    save_onnx(network, tmp_path / "model.onnx", (x[:3],))
    if bits == 8:
        assert_integers(prepared, network, x, tmp_path / "model.onnx")
    names = {getattr(layer, "name", "") for layer in network.layers.values()}
    assert not names & {"clamp", "hardtanh", "relu6"}
    if name == "both ends":  # one grid for both parts of the concatenation: half of it is out of reach
        tensor, grid = network.run(x)["b"], network.grid("b")
        assert grid is not None
        assert int(tensor.max()) == grid.quant_max < 2**bits - 1
        assert int(tensor.min()) == grid.quant_min > 0


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_sixteen_bits_are_float(name: str) -> None:
    case = CASES[name]
    net, x = build(case)
    net.eval()
    expected = net(x)
    prepared = ready(net, x, 16)
    for got in (prepared(x), qat.lower(prepared)(x)):
        far = ((got - expected).abs() > 1e-3 * expected.abs().max()).any(1)
        assert far.float().mean() <= (0.1 if "npool" in name else 0)  # rounded, two values may have another maximum


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_float_mode_computes_the_network_in_both_modes(name: str) -> None:
    net, x = build(CASES[name])
    prepared = qat.prepare(net, config(8), x[:2])
    for training in (True, False):
        state = copy.deepcopy(net.state_dict())
        expected = net.train(training)(x)
        net.load_state_dict(state)
        got = prepared.train(training)(x)
        if name.startswith("sdpa"):  # in steps
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got, expected)


@torch.no_grad()
def test_maxima_and_their_places(tmp_path: Path) -> None:
    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(36, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.first(x)
            values, places = y.max(dim=1)
            pooled = F.max_pool2d(y, (2, 3), (1, 2), (1, 0), return_indices=True)[1]
            return self.head(values.flatten(1)), places, torch.argmin(y, 2), pooled

    torch.manual_seed(0)
    net, x = Places(), torch.randn(8, 3, 8, 8)
    prepared = ready(net, x, 8)
    network = qat.lower(prepared)
    save_onnx(network, tmp_path / "model.onnx", (x[:3],))
    onnx = OnnxNetwork(tmp_path / "model.onnx")
    expected = prepared(x)
    for outputs in (network(x), [torch.from_numpy(y) for y in onnx.run({onnx.inputs[0]: x.numpy()}).values()]):
        assert (outputs[0] - expected[0]).abs().max() <= 0.05 * expected[0].std()
        for places, wanted in zip(outputs[1:], expected[1:], strict=True):
            assert places.dtype == torch.int64
            assert (places == wanted).float().mean() >= 0.99


# ---- what depends on the mode ----------------------------------------------------------------------------------------


class DropPath(nn.Module):
    """Stochastic depth with control flow."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], 1, 1, 1) < 0.7
        return x * keep / 0.7


class Modal(nn.Module):
    """A network that reads `self.training` in the way that `run` does."""

    def __init__(self, run: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)
        self.run = run
        self.path = DropPath()
        for name in ("mean", "var"):
            self.register_buffer(name, torch.full((4,), 0.5))
        self.weight = nn.Parameter(torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self, self.first(x)))


MODAL: dict[str, Callable[..., Tensor]] = {
    "F.dropout": lambda s, y: F.dropout(y, 0.3, training=s.training),
    "F.dropout, positional": lambda s, y: F.dropout(y, 0.3, s.training),
    "F.dropout, p by mode": lambda s, y: F.dropout(y, 0.3 if s.training else 0.0),
    "F.dropout in place": lambda s, y: F.dropout(y, 0.3, s.training, True),
    "torch.dropout": lambda s, y: torch.dropout(y, 0.3, s.training),
    "F.dropout2d": lambda s, y: F.dropout2d(y, 0.3, s.training),
    "F.batch_norm": lambda s, y: F.batch_norm(y, s.mean, s.var, s.weight, None, s.training),
    "F.batch_norm, keyword": lambda s, y: F.relu(F.batch_norm(y, s.mean, s.var, training=s.training, momentum=0.3)),
    "a factor": lambda s, y: y * (3.0 if s.training else 1.0),
    "drop path": lambda s, y: y + s.path(y),
}


@pytest.mark.parametrize("name", MODAL)
@pytest.mark.parametrize("traced_in_training", [True, False])
def test_what_depends_on_the_mode_is_right_in_both(name: str, traced_in_training: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Modal(MODAL[name]).train(traced_in_training), torch.randn(48, 3, 8, 8)
    before = copy.deepcopy(net.state_dict())
    prepared = qat.prepare(net, config(8), x[:2])
    assert net.training is prepared.training is traced_in_training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert set(net.state_dict()) <= set(prepared.state_dict())
    assert all("quantizer" in key for key in set(prepared.state_dict()) - set(net.state_dict()))
    results = {}
    for training in (True, False):
        net.load_state_dict(before)
        torch.manual_seed(5)
        expected = net.train(training)(x)
        moved = copy.deepcopy(net.state_dict())
        net.load_state_dict(before)
        torch.manual_seed(5)
        assert torch.equal(prepared.train(training)(x), expected)
        assert all(torch.equal(moved[k], v) for k, v in net.state_dict().items())  # running statistics, too
        results[training] = expected
    assert not torch.allclose(results[True], results[False])
    qat.calibrate(prepared, [x])
    prepared.eval()
    for simulating in (copy.deepcopy(prepared), prepared):
        with torch.no_grad():
            network = qat.lower(simulating)
            assert (network(x) - simulating(x)).abs().max() <= 0.2 * simulating(x).std()
    save_onnx(network, tmp_path / "model.onnx", (x[:2],))
    assert (OnnxNetwork(tmp_path / "model.onnx")(x) - network(x)).abs().mean() <= 1e-3


def test_attention_with_dropout_drops_in_training_only() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)

    torch.manual_seed(0)
    net, x = Attention(), torch.randn(16, 6, 8)
    prepared = qat.prepare(net, config(8), x)
    torch.testing.assert_close(prepared.eval()(x), net.eval()(x))
    prepared.train()
    assert not torch.equal(prepared(x), prepared(x))
    mean = torch.stack([prepared(x) for _ in range(400)]).mean(0)
    assert (mean - net(x)).abs().mean() < 0.1 * net(x).std()


def test_a_branch_on_the_mode_is_refused_with_its_line() -> None:
    def run(s: Any, y: Tensor) -> Tensor:
        return torch.tanh(y) if s.training else torch.sigmoid(y)

    with pytest.raises(
        ValueError, match=r"another path in training.*test_operations\.py:\d+.*an nn\.Module of its own"
    ):
        qat.prepare(Modal(run), dataclasses.replace(config(8), graph="required"), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_in_evaluation_is_refused(p: float) -> None:
    required = dataclasses.replace(config(8), graph="required")
    with pytest.raises(ValueError, match=r"in evaluation, too.*training=self\.training"):
        qat.prepare(Modal(lambda s, y: F.dropout(y, p)), required, torch.randn(2, 3, 8, 8))


# ---- what stays float ------------------------------------------------------------------------------------------------


def test_report_says_what_is_computed_in_float() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.MaxPool2d(2), nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1), Net(lambda s, y: torch.cumsum(y * torch.sigmoid(y), 1)), nn.AvgPool2d(2),
    )  # fmt: skip
    text = qat.report(qat.prepare(net.eval(), config(8), torch.randn(2, 3, 8, 8)))
    assert [line for line in text.splitlines() if line.startswith("float:")] == [
        "float: 3: no integer form: group_norm is computed in float",
        "float: 4: no layer in front of it takes it in: computed in float",
        "float: 7.sigmoid: no integer form: sigmoid is computed in float",
        "float: 7.cumsum: the runtime has no cumsum: it cannot be lowered",
    ]


def pooled(dims: int, **settings: Any) -> nn.Module:
    return getattr(nn, f"FractionalMaxPool{dims}d")(2, output_ratio=0.6, **settings)


ADAPTIVE, RANDOM = "the places of its maxima are read", "its regions are drawn at random with every call"
ISLANDS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], dict[str, nn.Module], str]] = {
    "places of an adaptive pooling": (lambda s, y: s.up(*_both(s.op(y)), output_size=y.shape), (3, 9), {
        "op": nn.AdaptiveMaxPool1d(4, return_indices=True), "up": nn.MaxUnpool1d(2)}, ADAPTIVE),
    "FractionalMaxPool2d": (lambda s, y: s.op(y), IMAGE, {"op": pooled(2)}, RANDOM),
    "FractionalMaxPool3d, values": (lambda s, y: s.op(y)[0], (3, 5, 6, 6), {"op": pooled(3, return_indices=True)},
                                    RANDOM),
    "F.fractional_max_pool2d": (lambda s, y: F.fractional_max_pool2d(y, 2, (3, 4)), IMAGE, {}, RANDOM),
}  # fmt: skip


@pytest.mark.parametrize("name", ISLANDS)
def test_poolings_that_stay_float_train_and_are_named(name: str) -> None:
    run, shape, parts, why = ISLANDS[name]
    torch.manual_seed(1)
    conv: Any = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    net, x = Net(lambda s, x: s.b(run(s, s.a(x))), a=conv(3, 4, 1), b=conv(4, 2, 1), **parts), torch.randn(4, *shape)
    prepared = qat.prepare(net, dataclasses.replace(config(8), graph="required"), x)
    results = []
    for each in (net.eval(), prepared.eval()):
        torch.manual_seed(5)
        results.append(each(x))
    assert torch.equal(*results)
    qat.calibrate(prepared, [x])
    prepared.train()(x).square().mean().backward()
    assert net.a.weight.grad.abs().sum() > 0  # type: ignore[union-attr]
    read = [node.args[0] for node in prepared.graph.nodes if node.target == "b"]
    assert all(Graph(prepared).quantizer_of(source) is not None for source in read)  # what the pooling makes
    assert f": {why}: it stays float, and cannot be lowered" in qat.report(prepared)
    with pytest.raises(ValueError, match=why):
        qat.lower(prepared.eval())


def test_report_of_layers_alone_has_no_float() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, 2))  # fmt: skip
    assert "float:" not in qat.report(qat.prepare(net, config(8), torch.randn(2, 3, 8, 8)))
