"""Where the time of a lowered network goes, step by step."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from qat.runtime.network import IntegerNetwork
from qat.split import join


@torch.no_grad()
def step_times(lowered: nn.Module, inputs: Tensor, repeats: int = 5, max_seconds: float = 2.0) -> dict[str, float]:
    """Milliseconds of every step of the integer networks in a lowered network, by name.

    Of some runs the fastest counts, as what else the machine does only adds.

    Args:
        lowered: from `qat.lower`: an IntegerNetwork, or code with such parts.
        inputs: one batch.
        repeats: runs, after one that is not counted; fewer where they take longer than `max_seconds`.
        max_seconds: see there.

    Returns:
        Empty for a network without integer parts.
    """
    calls = _calls(lowered, inputs)
    times: dict[str, list[float]] = {}
    start = time.perf_counter()
    for run in range(1 + repeats):
        if run > 1 and time.perf_counter() - start > max_seconds:
            break
        for path, network, tensors in calls:
            for name, ms in _steps(network, tensors).items():
                times.setdefault(join(path, name), []).append(ms)
    return {name: min(found[1:] or found) for name, found in times.items()}


def _calls(lowered: nn.Module, inputs: Tensor) -> list[tuple[str, IntegerNetwork, tuple[Tensor, ...]]]:
    """Every integer network in a lowered one with the tensors that it is given, a call each."""
    if isinstance(lowered, IntegerNetwork):
        return [("", lowered, lowered.flat((inputs,), {}))]
    calls: list[tuple[str, IntegerNetwork, tuple[Tensor, ...]]] = []
    handles = []
    for path, module in lowered.named_modules():
        if isinstance(module, IntegerNetwork):

            def keep(network: nn.Module, args: tuple[Any, ...], named: dict[str, Any], path: str = path) -> None:
                assert isinstance(network, IntegerNetwork)
                calls.append((path, network, network.flat(args, named)))

            handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        if handles:
            lowered(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _steps(network: IntegerNetwork, tensors: tuple[Tensor, ...]) -> dict[str, float]:
    found: dict[str, float] = {}
    last = time.perf_counter()

    def clock(name: str, y: Tensor) -> Tensor:
        nonlocal last
        now = time.perf_counter()
        found[name], last = 1e3 * (now - last), now
        return y

    network.run(*tensors, watch=clock, kernels=network.fast_path().layers)
    return found
