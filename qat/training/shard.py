"""Sharding a prepared network over processes with FSDP2."""

from collections import Counter
from typing import Any

from torch import nn
from torch.distributed.fsdp import fully_shard

from qat.modes import quantizers


def shard(net: nn.Module, **options: Any) -> nn.Module:
    """Shard a prepared, calibrated network: every layer for itself, what is left with the network.

    A prepared network calls its layers itself, and not the blocks that they were written in: a block that is sharded
    as one would never be gathered. A layer is gathered when it runs, its weight's quantizer with it, so that ranges are
    those of the whole weight.

    FSDP2 shards no scalars, so learned scales of one number become one-dimensional; a checkpoint of the sharded network
    loads into one that is not.

    Args:
        net: a prepared network; it is changed.
        options: of `torch.distributed.fsdp.fully_shard` (`mesh`, `reshard_after_forward`, ...). In Lightning, call
            `shard(self.net, mesh=self.device_mesh["data_parallel"])` in `configure_model`, with
            `ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)`.
            A `MixedPrecisionPolicy(param_dtype=...)` casts learned scales too: prefer autocast (`bf16-mixed`).

    Returns:
        `net`.

    Raises:
        ValueError: a quantizer that learns has no range yet: calibration needs whole parameters.
    """
    inside: set[nn.Module] = set()
    for name, quantizer in quantizers(net):
        inside.update(quantizer.modules())
        if any(True for _ in quantizer.parameters()) and not quantizer.calibrated:
            raise ValueError(f"quantizer '{name}' has no range yet; run qat.calibrate(net, batches) before shard(net)")
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))
    owners = Counter(p for module in net.modules() for p in module._parameters.values() if p is not None)
    for module in list(net.modules()):
        own = list(module.parameters(recurse=False))
        if own and module is not net and module not in inside and all(owners[p] == 1 for p in own):
            fully_shard(module, **options)
    fully_shard(net, **options)
    return net
