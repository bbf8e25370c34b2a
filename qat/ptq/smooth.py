"""SmoothQuant: what makes some channels of an activation large is moved into the weights that read them.

Source: Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
arXiv 2211.10438, section 4, equations 3 and 4.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qat.modes import eval_mode
from qat.smoothing import Smoothed

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """What was done for the linear layers that read one tensor.

    Attributes:
        layers: their module paths.
        place: where the tensor is divided: the path of the module that makes it, whose weight (and bias) were divided;
            "multiplication" in front of each layer; empty where nothing was done.
        reason: why nothing was done; else empty.
        factors: what each channel was divided by, and each column of the weights multiplied by.
        before, after: largest magnitude of the tensor, over all batches.
    """

    layers: tuple[str, ...]
    place: str
    reason: str
    factors: Tensor
    before: float
    after: float

    def __str__(self) -> str:
        layers = ", ".join(self.layers)
        if self.reason:
            return f"{layers}: left as they are: {self.reason}"
        low, high = float(self.factors.min()), float(self.factors.max())
        return (
            f"{layers}: largest input {self.before:.3g} -> {self.after:.3g}, divided by {low:.3g} to {high:.3g} "
            f"in {self.place}"
        )


@dataclass
class _Read:
    """One tensor that linear layers read, as the first batch shows it."""

    tensor: Tensor
    layers: list[str] = field(default_factory=list)
    others: int = 0


class _Readers(TorchFunctionMode):
    """Notes which linear layers read a tensor, and how often something else does."""

    def __init__(self, layers: dict[int, str]) -> None:
        super().__init__()
        self.layers = layers  # by id of the weight
        self.reads: dict[int, _Read] = {}  # by id of the tensor, which is kept: no other can have it

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        tensors = {id(t): t for t in given if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)}
        if not any(isinstance(r, Tensor) and id(r) not in tensors for r in pytree.tree_leaves(result)):
            return result  # a size, or the tensor itself: nothing was computed of it
        layer = self.layers.get(id(given[1])) if func is F.linear else None
        for key, tensor in tensors.items():
            read = self.reads.setdefault(key, _Read(tensor))
            if layer is None:
                read.others += 1
            else:
                read.layers.append(layer)
        return result


@torch.no_grad()
def smooth(net: nn.Module, batches: Iterable[Batch], alpha: float = 0.5, multiply: bool = True) -> list[Smoothing]:
    """Even out the channels that linear layers read, before `prepare`; the network computes what it did.

    Channel j is divided by `max |X_j|^alpha / max |W_j|^(1 - alpha)`, and column j of every linear layer that reads it
    is multiplied by that. The layers that read one tensor share its factors; their weights' maximum is taken over all.

    The division goes into the weight and bias of the module that makes the tensor (LayerNorm, an RMSNorm of any make,
    a linear layer) where nothing but linear layers reads it and dividing them divides the output, which is tried out.
    Elsewhere a multiplication is put in front of the layer, which moves from `PATH` to `PATH.layer`.

    Args:
        net: a float network; its weights are changed. It runs in eval mode.
        batches: inputs: a tensor, a tuple of arguments or a mapping of named ones. A few hundred samples do.
        alpha: how much goes from activations to weights, 0 to 1.
        multiply: whether to put multiplications; False leaves such layers as they are, and all names.

    Returns:
        One entry a tensor that linear layers read, in order of execution.

    Raises:
        ValueError: alpha out of range, no batches, or an activation that is not finite.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not valid: give a number from 0 to 1 (0.5 is usual)")
    linears = {name: m for name, m in net.named_modules() if type(m) is nn.Linear}
    shared = Counter(id(p) for _, p in net.named_parameters(remove_duplicate=False))
    batches = list(batches)
    if not batches:
        raise ValueError("smoothing needs at least one batch of inputs, got none")
    with eval_mode(net):
        reads, makers = _follow(net, linears, batches[0])
        largest = _largest(net, linears, batches)
    calls = Counter(name for read in reads for name in read.layers)
    report = []
    for read in reads:
        names = tuple(dict.fromkeys(read.layers))
        layers = [linears[name] for name in names]
        reason = ""
        if any(calls[name] > 1 for name in names):
            reason = "called more than once"
        elif any(shared[id(layer.weight)] > 1 for layer in layers):
            reason = "the weight is shared with another module"
        found = torch.stack([largest[name] for name in names]).amax(0)
        columns = torch.stack([layer.weight.detach().abs().amax(0) for layer in layers]).amax(0).float()
        factors = found.pow(alpha) / columns.pow(1 - alpha)
        # A channel or column of zeros says nothing of a scale.
        factors = torch.where((found > 0) & (columns > 0) & factors.isfinite(), factors, 1.0)
        place = "" if reason else _divide(makers.get(id(read.tensor)), read, factors, shared)
        if not reason and not place:
            place, reason = ("multiplication", "") if multiply else ("", "what makes their input cannot be divided")
        if place == "multiplication":
            for name, layer in zip(names, layers, strict=True):
                net.set_submodule(name, Smoothed(layer, (1 / factors).to(layer.weight.dtype)))
        if not reason:
            for layer in layers:
                layer.weight.mul_(factors.to(layer.weight.dtype))
        after = found if reason else found / factors
        report.append(
            Smoothing(
                layers=names, place=place, reason=reason, factors=found.new_empty(0) if reason else factors,
                before=float(found.max()), after=float(after.max()),
            )
        )  # fmt: skip
    return report


Maker = tuple[str, nn.Module, tuple[Any, ...], dict[str, Any], Tensor]
"""A module that made a tensor: its path, the module, the arguments of the call, and the tensor."""


def _follow(net: nn.Module, linears: Mapping[str, nn.Linear], batch: Batch) -> tuple[list[_Read], dict[int, Maker]]:
    """What linear layers read in one forward, in order, and by id of the tensor the module that made it, if one did."""
    makers: dict[int, Maker] = {}
    called: Counter[nn.Module] = Counter()

    def made(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            called[module] += 1
            if isinstance(output, Tensor) and not any(output is t for t in (*args, *kwargs.values())):
                makers[id(output)] = (name, module, args, kwargs, output)

        return hook

    leaves = {name: m for name, m in net.named_modules() if not any(m.children()) and isinstance(_weight(m), Tensor)}
    handles = [m.register_forward_hook(made(name), with_kwargs=True) for name, m in leaves.items()]
    readers = _Readers({id(layer.weight): name for name, layer in linears.items()})
    try:
        with readers:
            _call(net, batch)
    finally:
        for handle in handles:
            handle.remove()
    reads = [read for read in readers.reads.values() if read.layers]
    return reads, {key: maker for key, maker in makers.items() if called[maker[1]] == 1}


def _largest(net: nn.Module, linears: Mapping[str, nn.Linear], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The largest magnitude of every input channel of every linear layer that runs, float32."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            peak = args[0].detach().abs().flatten(0, -2).amax(0).float()
            if not bool(peak.isfinite().all()):
                raise ValueError(f"smoothing: the input of layer '{name}' holds non-finite values")
            found[name] = torch.maximum(found[name], peak) if name in found else peak

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears.items()]
    try:
        for batch in batches:
            _call(net, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _call(net: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Mapping):
        net(**batch)
    else:
        net(*(batch if isinstance(batch, tuple) else (batch,)))


def _weight(module: nn.Module) -> Any:
    return module._parameters.get("weight")


def _divide(maker: Maker | None, read: _Read, factors: Tensor, shared: Mapping[int, int]) -> str:
    """Divide weight and bias of the module that makes a tensor, if that divides the tensor; returns its path or ""."""
    if maker is None or read.others:
        return ""
    name, module, args, kwargs, _ = maker
    own = [p for p in module._parameters.values() if p is not None]
    rows = all(p.shape[:1] == factors.shape for p in own) and set(module._parameters) <= {"weight", "bias"}
    if not rows or any(shared[id(p)] > 1 for p in own):
        return ""
    kept = [p.clone() for p in own]
    before = module(*args, **kwargs)
    for p in own:
        p.div_(factors.to(p.dtype).view(-1, *[1] * (p.dim() - 1)))
    after = module(*args, **kwargs) * factors.to(before.dtype)
    if torch.allclose(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max())):
        return name
    for p, old in zip(own, kept, strict=True):
        p.copy_(old)
    return ""
