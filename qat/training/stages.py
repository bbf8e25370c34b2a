"""What a run measures of each stage, and the files in which it says so."""

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from qat.export.files import write_atomically

Network = Callable[[Tensor], Tensor]


@torch.no_grad()
def measure_stage(
    network: Network, task: Any, inputs: Tensor, targets: Tensor, file: Path | None = None, batch_size: int = 256
) -> dict[str, Any]:
    """Metrics, size and latency of one stage, as in `summary.json`.

    Args:
        network: a callable on float32 inputs: a module in eval mode, or a reloaded export.
        task: has `metrics()`.
        inputs, targets: the whole test set.
        file: the stage's file, if it has one.
        batch_size: samples at a time.
    """
    if isinstance(network, nn.Module):
        network.eval()
    metrics = task.metrics()
    for metric in metrics.values():  # of a distributed run, one process measures: nothing to gather
        metric.distributed_available_fn = lambda: False
    for x, y in zip(inputs.split(batch_size), targets.split(batch_size), strict=True):
        metrics.update(network(x), y)
    return {
        "metrics": {name: float(value) for name, value in metrics.compute().items()},
        "bytes": None if file is None else size_of(file),
        "latency_ms": {str(n): latency_ms(network, inputs[:n]) for n in (1, 64) if len(inputs) >= n},
    }


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


@torch.no_grad()
def latency_ms(network: Network, inputs: Tensor, seconds: float = 0.3) -> float:
    """Median time of a call in milliseconds, after a warm-up, over at least 5 calls and `seconds`."""
    network(inputs)
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        start = time.perf_counter()
        network(inputs)
        times.append(time.perf_counter() - start)
        if len(times) >= 500:
            break
    return round(1000 * statistics.median(times), 4)


def save_weights(net: nn.Module, path: Path) -> Path:
    """Write a float network's parameters and buffers as safetensors; the size that exports are compared with."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    write_atomically(path, save(tensors))
    return path


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Write `summary.json`."""
    write_atomically(path, (json.dumps(summary, indent=2) + "\n").encode())
