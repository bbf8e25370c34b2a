"""BatchNorm statistics measured anew on the quantized network."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat.modes import eval_mode


@torch.no_grad()
def reestimate_batch_norm(net: nn.Module, batches: Iterable[Tensor | tuple[Tensor, ...]]) -> None:
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
                net(*batch) if isinstance(batch, tuple) else net(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
