"""How large an int8 checkpoint is: the bits that the scheme claims and at most 5 %; of a tiny one, `FIXED` bytes more.

The latter are safetensors' header (350 to 900 bytes: a name, a type, a shape and two offsets a tensor) and the
compressed description (20 to 30 bytes a layer, 360 the configuration), which are more than 5 % of what is below `TINY`.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.analysis.layers import layer_table
from qat.export.checkpoint import save_checkpoint
from qat.presets import PRESETS
from qat.runtime.fixed import Table
from qat.runtime.grid import Requantize
from qat.runtime.operations import Constant, Function
from qat.zoo.gpt import CharGPT
from qat.zoo.models import ResNet, SmallCNN
from tests.networks.recurrent import Forecaster

FIXED, TINY = 1024, 24 * 1024
IMAGES, SERIES, TEXT = (4, 1, 8, 8), (4, 6, 3), (4, 64)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits small_cnn": (lambda: SmallCNN(1, 10, width=16), IMAGES),
    "resnet20": (lambda: ResNet(depth=20, in_channels=1, num_classes=10), IMAGES),
    "lstm": (lambda: Forecaster(3, 64, 4), SERIES),
    "gpt": (lambda: CharGPT(num_classes=65, context=64, n_layer=2, n_head=4, width=64), TEXT),
}


def inputs(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(65, shape, generator=generator) if shape == TEXT else torch.randn(shape, generator=generator)


def sizes(preset: str, network: str, folder: Path, target: str = "generic") -> tuple[int, int, int]:
    """(bytes claimed, bytes of the file, bytes of the float weights).

    Claimed are the weights at their bits with their scales and tables (`qat.report` says these), int32 biases of output
    channels, what is no weight (positions, norms) as it is, and for targets in fixed point a multiplier and a shift for
    each number that is scaled, and tables of functions.
    """
    torch.manual_seed(0)
    make, shape = NETWORKS[network]
    net, x = make().eval(), inputs(shape)
    kept = sum(t.numel() for t in net.state_dict().values() if t.is_floating_point()) * 4
    scheme = qat.preset(preset, target=target)
    prepared = qat.prepare(net, scheme, x)
    qat.calibrate(prepared, [x])
    path = folder / "size.safetensors"
    integer = qat.lower(prepared)
    save_checkpoint(integer, path)
    claimed = sum(row["bytes"] for row in layer_table(prepared) if row["kind"] != "edge")
    for layer in net.modules():
        weights = [w for name, w in layer.named_parameters(recurse=False) if name.startswith("weight") and w.dim() > 1]
        claimed += 0 if isinstance(layer, nn.Embedding) else 4 * sum(weight.shape[0] for weight in weights)
    kinds = set[tuple[torch.dtype, bytes]]()  # of two that are equal, one is stored
    for part in integer.modules():
        if isinstance(part, Constant | Function | Table):
            kinds |= {(t.dtype, t.numpy().tobytes()) for t in part.buffers(recurse=False)}
        elif isinstance(part, Requantize):
            claimed += 5 * part.multiplier.numel()
    claimed += sum(len(content) // (8 if dtype == torch.bool else 1) for dtype, content in kinds)
    return claimed, path.stat().st_size, kept


def check(rows: list[tuple[str, ...]], folder: Path) -> None:
    """At most 5 % above what is claimed, and FIXED bytes where that is less than TINY; the message has the table."""
    table, over = ["", f"{'preset':16} {'network':16} {'claimed':>8} {'file':>8} {'more':>7} {'of float':>8}"], []
    for preset, network, *target in rows:
        claimed, size, kept = sizes(preset, network, folder, *target)
        table.append(f"{preset:16} {network:16} {claimed:8} {size:8} {size / claimed - 1:7.1%} {size / kept:8.1%}")
        if size > 1.05 * claimed + (FIXED if claimed < TINY else 0):
            over.append(f"{preset} {network}")
    print("\n".join(table))
    assert not over, "\n".join([f"too large: {', '.join(over)}", *table])


def test_the_digits_network_takes_the_bits_that_it_claims(tmp_path: Path) -> None:
    check([(preset, "digits small_cnn") for preset in PRESETS], tmp_path)


def test_resnet20_takes_the_bits_that_it_claims(tmp_path: Path) -> None:
    check([(preset, "resnet20") for preset in ("int8", "w2a2_lsq", "nvfp4")], tmp_path)


OTHERS = [("w4a8", "lstm"), ("w2a2_lsq", "gpt"), ("int8", "digits small_cnn", "cmsis_nn")]
"""Recurrent, transformer with look-ups, fixed point."""


def test_other_networks_take_the_bits_that_they_claim(tmp_path: Path) -> None:
    check(OTHERS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["lstm", "gpt"])
def test_other_networks_take_the_bits_that_every_preset_claims(network: str, tmp_path: Path) -> None:
    fixed = [("int8", network, "integer_only")] if network == "gpt" else []  # recurrent layers have none
    check([*((preset, network) for preset in PRESETS), *fixed], tmp_path)


@pytest.mark.slow
def test_resnet20_takes_the_bits_that_every_preset_claims(tmp_path: Path) -> None:
    check([(preset, "resnet20") for preset in PRESETS], tmp_path)
