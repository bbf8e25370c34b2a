"""How much each layer's quantization costs: the metric when only it is quantized, and when all but it are.

Only modes of quantizers change; the network stays as it is.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from qat.analysis.layers import Reads
from qat.fake_quant import FakeQuantize
from qat.layers import Quantized
from qat.mode import Mode
from qat.modes import eval_mode, quantizers

Measure = Callable[[nn.Module, int], dict[str, float]]
"""`measure(net, samples)`: metrics of the network on so many samples of the test set."""
FEWEST = 64
"""Fewer samples than these say nothing, however little time there is."""


@dataclass(frozen=True)
class Unit:
    """What is quantized together: a layer's weights and what it reads, or a tensor that no layer reads."""

    name: str
    quantizers: tuple[FakeQuantize, ...]


def units(net: nn.Module) -> list[Unit]:
    """The layers of a prepared network in its order, then the tensors that none of them reads."""
    reads = Reads(net)
    found, covered = [], set[FakeQuantize]()
    for name, layer in net.named_modules():
        if isinstance(layer, Quantized):
            own = [module for module in layer.modules() if isinstance(module, FakeQuantize)]
            read = [grid for grid in reads.layers.get(name, []) if grid is not None]
            together = tuple(dict.fromkeys(own + read))
            if together:
                found.append(Unit(name, together))
                covered |= set(together)
    return found + [Unit(name, (quantizer,)) for name, quantizer in quantizers(net) if quantizer not in covered]


@contextmanager
def quantizing(net: nn.Module, chosen: Callable[[FakeQuantize], bool]) -> Iterator[None]:
    """Inside, only the chosen quantizers quantize; the others pass floats. Afterwards each has the mode it had."""
    modes = {quantizer: quantizer.mode for _, quantizer in quantizers(net)}
    try:
        for quantizer, mode in modes.items():
            quantizer.mode = mode if chosen(quantizer) else Mode.float
        yield
    finally:
        for quantizer, mode in modes.items():
            quantizer.mode = mode


def sensitivity(
    net: nn.Module, measure: Measure, samples: int, max_seconds: float,
    progress: Callable[[Sequence[Any]], Any] = iter,
) -> dict[str, Any]:  # fmt: skip
    """Measure every unit by itself and left out, as far as the time goes.

    Fewer samples are taken where a first evaluation shows that the time does not suffice, and layers at the end of the
    network are left out where 64 samples take too long.

    Args:
        net: a prepared network that simulates.
        measure: gives metrics of the network as it is.
        samples: of the test set, at most.
        max_seconds: for everything; 0 measures nothing.
        progress: wraps the sequence of units, to show how far it is.

    Returns:
        `samples`, `float` and `quantized` (metrics with no quantizer and with all), `units` (dicts with `name`,
        `quantizers`, how many there are, `only` and `all_but`: metrics), `left_out` (names), `seconds`.
    """
    every, start = units(net), time.perf_counter()
    if max_seconds <= 0 or not every:
        return {"samples": 0, "units": [], "left_out": [unit.name for unit in every], "seconds": 0.0}
    done: list[dict[str, Any]] = []
    with eval_mode(net):
        quantized = measure(net, min(samples, FEWEST))  # the first call compiles kernels and the like
        before = time.perf_counter()
        quantized = measure(net, min(samples, FEWEST))
        each = (time.perf_counter() - before) / min(samples, FEWEST)
        left = max_seconds - (time.perf_counter() - start)
        samples = min(samples, max(FEWEST, int(0.8 * left / max(each * (2 * len(every) + 2), 1e-9))))
        quantized = measure(net, samples)
        with quantizing(net, lambda quantizer: False):
            floating = measure(net, samples)
        for unit in progress(every):
            if time.perf_counter() - start > max_seconds:
                break
            inside = set(unit.quantizers)
            with quantizing(net, inside.__contains__):
                only = measure(net, samples)
            with quantizing(net, lambda quantizer, inside=inside: quantizer not in inside):  # type: ignore[misc]
                all_but = measure(net, samples)
            done.append({"name": unit.name, "quantizers": len(inside), "only": only, "all_but": all_but})
    return {
        "samples": samples, "float": floating, "quantized": quantized, "units": done,
        "left_out": [unit.name for unit in every[len(done) :]], "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip
