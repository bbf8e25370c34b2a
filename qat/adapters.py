"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on quantized weights, as the package peft puts them there.

While they train, a layer computes `quantized(W) x + B A x`. No integer kernel does: what is exported is one weight, so
`W + B A` is quantized again, which moves the outputs. Nothing here imports peft: its layers are known by their methods.
"""

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qat.layers import Quantized
from qat.modes import eval_mode
from qat.record import run
from qat.structures import tensors

log = logging.getLogger(__name__)


def adapters(net: nn.Module) -> dict[str, Any]:
    """Path -> adapter around a quantized layer."""
    return {
        name: module
        for name, module in net.named_modules()
        if all(hasattr(module, method) for method in ("get_base_layer", "get_delta_weight", "merge"))
        and isinstance(module.get_base_layer(), Quantized)
    }


@torch.no_grad()
def merge_adapters(net: nn.Module, batches: Sequence[Any] = ()) -> float | None:
    """Add every active adapter to the weight that it adapts, in place: the network then computes what is exported.

    The merged weight is quantized as one. A weight whose range is computed from it (`range=dynamic`) takes its new
    range; one that is learned or fixed keeps its own, and what leaves it is clipped. The log and `qat.report` say what
    was merged, and how far the outputs moved.

    Args:
        net: a prepared network with adapters of peft (`peft.get_peft_model(prepared, ...)`), or one without.
        batches: inputs as `qat.calibrate` takes them; on the first, outputs are compared before and after.

    Returns:
        Norm of the change of the outputs over their norm; None without adapters, or without a batch.

    Raises:
        ValueError: an adapter holds values that are not finite.
    """
    found = {name: module for name, module in adapters(net).items() if not module.merged}
    if not found:
        return None
    before = _outputs(net, batches)
    for module in found.values():
        module.merge(safe_merge=True)
    after = _outputs(net, batches)
    moved = torch.stack([(x - y).norm() for x, y in zip(before, after, strict=True)]).norm() if before else None
    change = None if moved is None else float(moved / torch.stack([x.norm() for x in before]).norm())
    kept = (vars(module).get("meta", {}) for module in net.modules())
    about: dict[str, Any] = next((meta["qat"] for meta in kept if "qat" in meta), {})
    about["merged"] = {"layers": len(found), "change": change}
    log.warning(merged_text(**about["merged"]))
    return change


def merged_text(layers: int, change: float | None) -> str:
    """One sentence for logs and reports."""
    how_far = (
        "how far the outputs moved was not measured (qat.ptq.finalize measures it)"
        if change is None
        else f"the outputs moved by {100 * change:.2g} % of their norm"
    )
    return f"adapters of {layers} layers were merged into their weights, which are quantized again: {how_far}"


@torch.no_grad()
def without_adapters(net: nn.Module, merge: bool = True) -> nn.Module:
    """The network as it was prepared: a copy where there are adapters, else `net` itself.

    Args:
        net: a prepared network.
        merge: whether its weights are to be the merged ones.
    """
    if not adapters(net):
        return net
    net = copy.deepcopy(net)
    if merge:
        merge_adapters(net)
    for name, module in adapters(net).items():
        net.set_submodule(name, module.get_base_layer())
    for name, module in list(net.named_modules()):
        if hasattr(module, "get_base_model") and hasattr(module, "peft_config"):
            inner: nn.Module = module.get_base_model()
            if not name:
                return inner
            net.set_submodule(name, inner)
    return net


def _outputs(net: nn.Module, batches: Sequence[Any]) -> list[Tensor]:
    if not batches:
        return []
    with eval_mode(net):
        return [x.double() for x in tensors(run(net, batches[0])) if x.is_floating_point()]
