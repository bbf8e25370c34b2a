"""Run batches with observers on, then take ranges from what they saw."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qat.fake_quant import Mode, quantizers, set_mode
from qat.layers import QuantizedLayer
from qat.scheme import RangeMode


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Set every range from data and leave the network in mode `quantize`.

    Args:
        net: a prepared network. It runs in eval mode (BatchNorm statistics do not move).
        batches: inputs, each a tensor or a tuple of the network's arguments. Training data without augmentation;
            a few hundred samples do.

    Raises:
        ValueError: no batches, or a batch with NaN or infinity (names the batch).
        RuntimeError: a quantizer saw no data (its branch never ran).
    """
    weights = {module.weight_quantizer for module in net.modules() if isinstance(module, QuantizedLayer)}
    for _, quantizer in quantizers(net):
        quantizer.observer.reset()
        quantizer.mode = Mode.float if quantizer in weights else Mode.observe
    training = {module: module.training for module in net.modules()}
    net.eval()
    count = 0
    try:
        for batch in batches:
            inputs = batch if isinstance(batch, tuple) else (batch,)
            for x in inputs:
                if not bool(torch.isfinite(x).all()):
                    raise ValueError(
                        f"calibration batch {count} holds {int((~torch.isfinite(x)).sum())} non-finite values"
                    )
            net(*inputs)
            count += 1
    finally:
        for module, mode in training.items():
            module.training = mode
    if count == 0:
        raise ValueError("calibration needs at least one batch of inputs, got none")
    for module in net.modules():
        if isinstance(module, QuantizedLayer) and module.weight_quantizer.scheme.range is not RangeMode.dynamic:
            module.weight_quantizer.observe(module.weight)
    for name, quantizer in quantizers(net):
        try:
            quantizer.set_range_from_observer()
        except RuntimeError as error:
            raise RuntimeError(f"quantizer '{name}': {error}") from None
    set_mode(net, Mode.quantize)
