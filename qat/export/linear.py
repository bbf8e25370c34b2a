"""Linear layers of a language model, one by one: a file's, given what the same layers read in training.

Files that hold a network's own code (`Exporter.of_prepared`) have no integers between layers to be given. Their
quantized layers can be called one at a time: each is given the real numbers that it reads in training, and shows what
it makes of them on its way: the input on its levels, the weight that it multiplies that by, and the product.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.export.rounding import SHARE
from qat.export.rows import SHOWN, ParityLimits

TOKENS = 128
"""Vectors that each layer is given."""

Tensors = dict[str, Tensor]


@dataclass(kw_only=True)
class LinearParity:
    """One linear layer, given what it reads in training.

    Attributes:
        name: its module path.
        weights: how many weights it has.
        unequal_weights: how many of them, multiplied out, are not equal to the bit.
        equal_inputs: share of its inputs that come to lie on the same levels; 1 where they stay float.
        rounding: worst difference of an output, of its own inputs and training's weights, in what rounding may make of
            it: 2^-20 of the magnitude of what is added up, and the result's own in the dtype that it is computed in.
        differences: the first that count: (what and where, training's, the file's).
    """

    name: str
    weights: int
    unequal_weights: int
    equal_inputs: float
    rounding: float
    differences: list[tuple[str, float, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `summary.json`."""
        kept = ("name", "weights", "unequal_weights", "equal_inputs", "rounding")
        return {key: getattr(self, key) for key in kept}

    def breach(self, limits: ParityLimits) -> str:
        """Which limit is broken, in words; empty if none."""
        if self.unequal_weights:
            return f"{self.unequal_weights} of its {self.weights} weights are not equal to the bit"
        if self.equal_inputs < limits.equal_share:
            return f"{self.equal_inputs:.4%} of its inputs lie on the same levels (at least {limits.equal_share:.2%})"
        if limits.rounding is not None and not self.rounding <= limits.rounding:
            return (
                f"an output differs by {self.rounding:.3g} times what rounding may make of it (allowed "
                f"{limits.rounding:g}), although inputs and weights agree"
            )
        return ""

    def shown(self, names: tuple[str, str]) -> str:
        """Its first differing values."""
        return "".join(f"\n  {what}: {names[0]} {a:.9g} against {names[1]} {b:.9g}" for what, a, b in self.differences)


@torch.no_grad()
def read_by_layers(net: nn.Module, layers: Mapping[str, Any], batch: tuple[Tensor, ...]) -> Tensors:
    """What each layer reads in a run of `net`, before it is quantized: TOKENS vectors of it, spread over the batch.

    Args:
        net: that holds them.
        layers: module path, as the file has it -> the layer.
        batch: the network's arguments.

    Returns:
        Path -> shape [tokens, features], of the layers that ran.
    """
    read: Tensors = {}

    def keep(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            tokens = args[0].reshape(-1, args[0].shape[-1])
            read[name] = tokens[:: -(-len(tokens) // TOKENS)].clone()

        return hook

    handles = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        net(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return read


def digest(weight: Tensor) -> Tensor:
    """SHA-256 of a weight's bits, uint8, shape [32]; both zeros count as one."""
    data = (weight.detach() + 0.0).cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(hashlib.sha256(data).digest()), dtype=torch.uint8)


class _Products(torch.overrides.TorchFunctionMode):
    """What `linear` is called with, and what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self.seen.append((args[0], args[1], result))
        return result


@torch.no_grad()
def made_by_layers(net: nn.Module, asked: Mapping[str, Tensor]) -> Tensors:
    """What linear layers of a file make of what they are given.

    Args:
        net: that the file was loaded as.
        asked: `NAME/read`, what each is given, and `NAME/digest` of the weight that it should have.

    Returns:
        `NAME/read` on its levels, `NAME/output`, and `NAME/weight` where it has another digest.

    Raises:
        ValueError: there is no such layer, or it multiplies nothing.
    """
    made: Tensors = {}
    for name in [key.removesuffix("/read") for key in asked if key.endswith("/read")]:
        try:
            layer = net.get_submodule(name)
        except AttributeError:
            raise ValueError(f"the file has no layer '{name}'") from None
        with _Products() as products:
            layer(asked[f"{name}/read"])
        if len(products.seen) != 1:
            raise ValueError(f"layer '{name}' of the file calls torch's linear {len(products.seen)} times, not once")
        made[f"{name}/read"], weight, made[f"{name}/output"] = products.seen[0]
        if not torch.equal(digest(weight), asked[f"{name}/digest"]):
            made[f"{name}/weight"] = weight
    return made


@torch.no_grad()
def compare_layers(layers: Mapping[str, Any], read: Tensors, made: Tensors) -> list[LinearParity]:
    """One row a layer.

    Args:
        layers: module path, as the file has it -> training's layer.
        read: of `read_by_layers`.
        made: of `made_by_layers`, given `read`.
    """
    return [_row(name, layers[name], x, made) for name, x in read.items()]


def asked_of(layers: Mapping[str, Any], read: Tensors) -> Tensors:
    """What `made_by_layers` is asked."""
    digests = {f"{name}/digest": digest(weight_of(layers[name], x)) for name, x in read.items()}
    return {f"{name}/read": x for name, x in read.items()} | digests


def weight_of(layer: Any, like: Tensor) -> Tensor:
    """A layer's weight on its levels, in the dtype that it is multiplied in."""
    weight: Tensor = layer.quantized_weight()
    return weight.to(like.dtype)


def _row(name: str, layer: Any, x: Tensor, made: Tensors) -> LinearParity:
    weight, own = weight_of(layer, x), layer.read(x)
    theirs, output = made[f"{name}/read"], made[f"{name}/output"]
    row = LinearParity(name=name, weights=weight.numel(), unequal_weights=0, equal_inputs=1.0, rounding=0.0)
    if (other := made.get(f"{name}/weight")) is not None:
        if other.shape != weight.shape or other.dtype != weight.dtype:
            row.unequal_weights = weight.numel()
        else:
            row.unequal_weights = _unequal(row, "weight", weight, other)
    row.equal_inputs = 1 - _unequal(row, "input", own, theirs) / max(own.numel(), 1)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    expected = F.linear(theirs, weight, bias).float()
    terms = F.linear(theirs.abs().float(), weight.abs().float(), None if bias is None else bias.abs().float())
    most = SHARE * terms + torch.finfo(x.dtype).eps * expected.abs()
    share = (output.float() - expected).abs() / most.clamp(min=torch.finfo(torch.float32).tiny)
    row.rounding = float(share.nan_to_num(nan=torch.inf).max()) if share.numel() else 0.0
    if row.rounding > 1:
        _unequal(row, "output", expected, output.float())
    return row


def _unequal(row: LinearParity, what: str, a: Tensor, b: Tensor) -> int:
    """How many values differ; the first are kept."""
    differs = torch.nonzero(a != b)
    for index in differs[: max(SHOWN - len(row.differences), 0)].tolist():
        row.differences.append((f"{what} {index}", float(a[tuple(index)]), float(b[tuple(index)])))
    return len(differs)
