"""Run batches with observers on, then take ranges from what they saw."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qat.fake_quant import Mode
from qat.layers import weights_of
from qat.modes import eval_mode, quantizers, set_mode, watch


@torch.no_grad()
def calibrate(net: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
    """Set every range from data and leave the network in mode `quantize`.

    Args:
        net: a prepared network. It runs in eval mode (BatchNorm statistics do not move).
        batches: inputs, each a tensor or a tuple of the network's arguments. Training data without augmentation;
            a few hundred samples do.

    Raises:
        ValueError: no batches, or NaN or infinity in a batch (names the batch), a weight or an activation (names the
            tensor).
        RuntimeError: a quantizer saw no data (its branch never ran).
    """
    weights = weights_of(net)
    modes = {quantizer: quantizer.mode for _, quantizer in quantizers(net)}
    for _, quantizer in quantizers(net):
        quantizer.observer.reset()
        quantizer.mode = Mode.float if quantizer in weights else Mode.observe
    count = 0
    try:
        with eval_mode(net):
            for batch in batches:
                inputs = batch if isinstance(batch, tuple) else (batch,)
                _check_finite(inputs, count)
                watch(net)
                net(*inputs)
                count += 1
        if count == 0:
            raise ValueError("calibration needs at least one batch of inputs, got none")
        for name, quantizer in quantizers(net):
            try:
                if quantizer in weights:
                    quantizer.set_range_from(weights[quantizer])
                else:
                    quantizer.set_range_from_observer()
            except RuntimeError as error:
                raise RuntimeError(f"quantizer '{name}': {error}") from None
    except BaseException:
        for quantizer, mode in modes.items():
            quantizer.mode = mode
        raise
    set_mode(net, Mode.quantize)


def _check_finite(inputs: tuple[Tensor, ...], count: int) -> None:
    for x in inputs:
        bad = int((~torch.isfinite(x)).sum())
        if bad:
            raise ValueError(f"calibration batch {count} holds {bad} non-finite values")
