"""Weights that several layers read: quantized once."""

from collections.abc import Hashable, Iterable

from torch import Tensor

from qat.layers.base import QuantizedLayer


def share_weight_quantizers(layers: Iterable[tuple[str, QuantizedLayer]]) -> dict[str, str]:
    """Let layers that read the same values of the same parameter share one weight quantizer.

    It is that of the scheme with the most bits, the first one of those.

    Args:
        layers: path and layer; the same layer may come several times.

    Returns:
        Path -> "tied with PATH, ...", for layers that share.
    """
    views: dict[Hashable, dict[QuantizedLayer, str]] = {}
    alive = []  # what is computed anew for each layer must not lie where another's was
    for path, layer in layers:
        weight = layer.weight
        alive.append(weight)
        views.setdefault(_view(layer, weight), {}).setdefault(layer, path)
    reasons: dict[str, str] = {}
    for members in views.values():
        if len(members) < 2:
            continue
        widest = max(members, key=lambda layer: layer.weight_quantizer.scheme.bits or 0)
        quantizer, scheme = widest.weight_quantizer, widest.weight_quantizer.scheme
        for layer, path in members.items():
            others = ", ".join(other for other in members.values() if other != path)
            wider = "" if layer.weight_quantizer.scheme == scheme else f" in the scheme of {members[widest]}"
            layer.weight_quantizer = quantizer
            reasons[path] = f"tied with {others}{wider}"
    return reasons


def _view(layer: QuantizedLayer, weight: Tensor) -> Hashable:
    """What two layers have in common that read the same values: where they lie in memory, and how they are arranged."""
    shape = layer.arranged(weight).shape
    storage = weight.untyped_storage()._cdata  # one for each storage, on the meta device, too
    return storage, weight.storage_offset(), weight.shape, weight.stride(), shape, layer.arrangement
