"""BatchNorm statistics measured anew on the quantized network."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.modes import eval_mode
from qat.record import run


@torch.no_grad()
def reestimate_batch_norm(net: nn.Module, batches: Iterable[Any]) -> None:
    """Replace running means and variances by their plain averages over `batches`, everything else in eval mode.

    Training leaves a moving average of statistics that weights have since moved away from, most at few bits.

    Source: Sun et al. 2019 ("Hybrid 8-bit Floating Point"), section 4; Nagel et al. 2022, section 5.
    """
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    try:
        with eval_mode(net):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.train()
            for batch in batches:
                run(net, batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
