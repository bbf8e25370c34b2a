"""Sharding a prepared network over processes with FSDP2."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from qat.fake_quant import FakeQuantize
from qat.modes import quantizers


def shard(net: nn.Module, **options: Any) -> nn.Module:
    """Shard a prepared, calibrated network: every layer for itself, what is left with the network.

    A prepared network calls its layers itself, and not the blocks that they were written in: a block that is sharded
    as one would never be gathered. A layer is gathered when it runs, its quantizer with it, so that ranges are those of
    the whole weight.

    FSDP2 shards no scalars, so learned scales of one number become one-dimensional; a checkpoint of a sharded network
    loads into one that is not.

    Args:
        net: a prepared network; it is changed.
        options: of `torch.distributed.fsdp.fully_shard` (`mesh`, `reshard_after_forward`, ...). In Lightning, call
            `shard(self.net, mesh=self.device_mesh["data_parallel"])` in `configure_model`, with ModelParallelStrategy.

    Returns:
        `net`.

    Raises:
        ValueError: a learned quantizer has no range yet: one process cannot set what is spread over all.
    """
    for name, quantizer in quantizers(net):
        if any(True for _ in quantizer.parameters()) and not quantizer.calibrated:
            raise ValueError(f"quantizer '{name}' has no range yet; run qat.calibrate(net, batches) before shard(net)")
    for module in list(net.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.dim() == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))
    inside = {module for _, quantizer in quantizers(net) for module in quantizer.modules()}
    layers = [module for module in net.modules() if module is not net and module not in inside]
    for module in layers:
        own = any(True for _ in module.parameters(recurse=False))
        if own or any(isinstance(child, FakeQuantize) for child in module.children()) and _is_layer(module):
            fully_shard(module, **options)
    fully_shard(net, **options)
    return net


def _is_layer(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight_quantizer", None), FakeQuantize)


def whole(t: torch.Tensor) -> torch.Tensor:
    """A tensor that may be sharded, as one."""
    return t.full_tensor() if isinstance(t, torch.distributed.tensor.DTensor) else t
