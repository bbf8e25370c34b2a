"""Early stopping that looks at the quantized network only."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping

from qat.mode import Mode
from qat.modes import quantizers
from qat.widths import configured


def fully_quantized(module: Any) -> bool:
    """Whether everything is quantized as configured: no quantizer passes floats, observes, or has more bits for now."""
    own = [quantizer for _, quantizer in quantizers(module)]
    return bool(own) and all(
        quantizer.mode in (Mode.quantize, Mode.frozen) and quantizer.scheme.bits == configured(quantizer).bits
        for quantizer in own
    )


class QuantizedEarlyStopping(EarlyStopping):
    """Stop when the metric of the *quantized* network no longer improves.

    A validation counts only where the network is quantized as configured: not in float mode, nor while ranges are
    observed, activations still pass as floats or bits are still being lowered. A float network is better than what it
    becomes, so that its metric would be the best one for good.

    Args:
        monitor, mode, patience, min_delta: as Lightning's `EarlyStopping` takes them; others by keyword, too.

    Source: Prechelt 1998, "Early Stopping - But When?".
    """

    def __init__(
        self, monitor: str = "val_loss", mode: str = "min", patience: int = 3, min_delta: float = 0.0, **options: Any
    ) -> None:
        super().__init__(monitor=monitor, mode=mode, patience=patience, min_delta=min_delta, **options)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, if this was the quantized network."""
        if fully_quantized(pl_module):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look, if this was the quantized network."""
        if fully_quantized(pl_module):
            super().on_validation_end(trainer, pl_module)
