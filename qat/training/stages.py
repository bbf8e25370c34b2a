"""What a run measures of each stage, and the files in which it says so."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from qat.export.files import write_atomically
from qat.export.reloaded import median_ms

Network = Callable[[Tensor], Tensor]
BATCH = 256
"""How many samples are evaluated at a time."""
LATENCY_BATCHES = (1, 64)


@torch.no_grad()
def measure_stage(
    network: Network, task: Any, inputs: Tensor, targets: Tensor, file: Path | None = None,
    look: Callable[[Tensor, Tensor], None] = lambda outputs, targets: None,
) -> dict[str, Any]:  # fmt: skip
    """Metrics, size and latency of one stage, as in `summary.json`.

    Args:
        network: a callable on float32 inputs: a module in eval mode, or a reloaded export.
        task: has `metrics()`.
        inputs, targets: the whole test set.
        file: the stage's file, if it has one.
        look: sees the outputs and targets of each batch.
    """

    def seen(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = network(x)
        look(outputs, y)
        return outputs, y

    if isinstance(network, nn.Module):
        network.eval()
    batches = zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    sizes = [n for n in LATENCY_BATCHES if len(inputs) >= n]
    return {
        "metrics": task_metrics(task, (seen(x, y) for x, y in batches)),
        "bytes": None if file is None else size_of(file),
        "latency_ms": {str(n): median_ms(network, inputs[:n]) for n in sizes},
    }


def task_metrics(task: Any, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The task's metrics over batches of (outputs, targets)."""
    metrics = task.metrics()
    for metric in metrics.values():  # of a distributed run, one process measures: nothing to gather
        metric.distributed_available_fn = lambda: False
    for outputs, targets in batches:
        metrics.update(outputs, targets)
    return {name: float(value) for name, value in metrics.compute().items()}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def save_weights(net: nn.Module, path: Path) -> Path:
    """Write a float network's parameters and buffers as safetensors; the size that exports are compared with."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    write_atomically(path, save(tensors))
    return path


def write_json(content: Mapping[str, Any], path: Path, indent: int | None = 2) -> None:
    """Write a file of plain data, such as `summary.json`."""
    write_atomically(path, (json.dumps(content, indent=indent) + "\n").encode())
