"""What an exported int8 checkpoint holds, as text: layers, bits, shapes, ranges, bytes."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.analysis.preparation import count_text, table
from qat.analysis.summary import bytes_text, percent_text
from qat.export.checkpoint import load_checkpoint, sizes_in
from qat.export.storage import codes_of
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv, IntegerConv
from qat.runtime.lookup import LooksUp, LookUp
from qat.runtime.network import NAMES, IntegerNetwork
from qat.runtime.stored import StoredConv

WEIGHTED = IntegerConv | FloatConv | LooksUp | StoredConv


def describe(path: str | Path) -> str:
    """Layers and grids of an int8 checkpoint.

    Args:
        path: a .safetensors file that `qat.export` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated, edited, or no int8 checkpoint; says which.
    """
    network = load_checkpoint(path)
    sizes = sizes_in(path, network)
    total, file_bytes = sum(sizes.values()), Path(path).stat().st_size
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, WEIGHTED)]
    rows = [_layer(network, name, layer, sizes) for name, layer in layers]
    weights = sum(row["weights"] for row in rows)
    integers = sum(isinstance(layer, IntegerConv) for _, layer in layers)
    steps_of = (network.layer(node.name) for node in network.nodes)
    others = Counter(NAMES[type(layer)] for layer in steps_of if not isinstance(layer, WEIGHTED))
    steps = ", ".join(f"{n} {name}" for name, n in others.most_common())
    ratio = percent_text(total / (4 * weights)) if weights else "-"
    text = [
        f"{path}: int8 checkpoint, {bytes_text(file_bytes)} (tensors {bytes_text(total)}, description and header "
        f"{bytes_text(file_bytes - total)})",
        f"{len(layers)} layers with {count_text(weights)} weights, tensors take {ratio} of their float32; {integers} "
        f"computed in integers; inputs: {', '.join(network.inputs)}; outputs: {', '.join(network.outputs)}",
    ]
    if steps:
        text.append(f"other steps: {steps}")
    lines = [
        [row["name"], row["kind"], row["bits"], row["shape"], row["range"], row["scale"], row["output"],
         f"{row['bytes']:,}"]
        for row in rows
    ]  # fmt: skip
    header = ["layer", "kind", "bits", "shape", "weights from .. to", "scales", "output", "bytes"]
    return "\n".join([*text, "", *table(header, lines, right=("bits", "bytes")), *_grids(network)]) + "\n"


def _layer(network: IntegerNetwork, name: str, layer: nn.Module, sizes: dict[str, int]) -> dict[str, Any]:
    real, stored = _weight(layer), codes_of(layer)
    if stored is None:
        bits = str(8 * next(layer.buffers()).element_size()) if layer.state_dict() else "-"
    else:
        low, high = stored[2]
        bits = str(((high - low) // stored[3]).bit_length())
    scale = getattr(layer, "weight_scale", getattr(layer, "scale", None))
    return {
        "name": _name(name),
        "kind": next(key for kind, key in _KINDS.items() if isinstance(layer, kind)),
        "bits": bits,
        "shape": "x".join(map(str, real.shape)),
        "weights": real.numel(),
        "range": f"{_number(real.min())} .. {_number(real.max())}" if real.numel() else "",
        "scale": "" if scale is None else _span(scale),
        "output": _grid_text(getattr(layer, "output", None)),
        "bytes": sum(size for key, size in sizes.items() if key.startswith(f"{name}.")),
    }


_KINDS: dict[type[nn.Module], str] = {
    IntegerConv: "integers", LookUp: "look-up", LooksUp: "look-up, levels", FloatConv: "float", StoredConv: "levels",
}  # fmt: skip
"""What computes with the weight."""


def _weight(layer: nn.Module) -> Tensor:
    """The weight as real numbers."""
    if isinstance(layer, IntegerConv):
        column = (-1, *[1] * (layer.weight.dim() - 1))
        return (layer.weight.float() - layer.weight_zero_point.reshape(column)) * layer.weight_scale.reshape(column)
    if isinstance(layer, LookUp):
        return layer.rows(torch.arange(len(layer.weight)))
    assert isinstance(layer, FloatConv | StoredConv)
    return layer.float_weight()


def _grids(network: IntegerNetwork) -> list[str]:
    """Every grid that a tensor is put on."""
    lines = [
        [_name(name).removesuffix(".output"), _bounds(grid), _number(grid.scale), str(int(grid.zero_point)),
         _real(grid)]
        for name, grid in network.named_modules()
        if isinstance(grid, Quantize) and not name.endswith(".grid")  # that of a step back to real numbers
    ]  # fmt: skip
    header = ["tensor", "integers", "scale", "zero point", "from .. to"]
    return ["", *table(header, lines, right=("scale", "zero point"))] if lines else []


def _grid_text(grid: Quantize | None) -> str:
    return "float" if grid is None else _real(grid)


def _bounds(grid: Quantize) -> str:
    return f"[{grid.quant_min}, {grid.quant_max}]"


def _real(grid: Quantize) -> str:
    low, high = ((end - int(grid.zero_point)) * float(grid.scale) for end in (grid.quant_min, grid.quant_max))
    return f"{_number(low)} .. {_number(high)}"


def _span(values: Tensor) -> str:
    low, high = _number(values.min()), _number(values.max())
    return low if low == high else f"{low} .. {high}"


def _number(value: float | Tensor) -> str:
    return f"{float(value):.3g}"


def _name(path: str) -> str:
    """The tensor or weight; of a cell of a recurrent layer `LAYER.cells.I.PART`."""
    name = path.removeprefix("layers.").replace("/", ".")
    return name.replace(".parts.", ".").removesuffix("_part")
