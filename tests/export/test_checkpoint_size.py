"""How large an int8 checkpoint is: the bits that the scheme claims, and at most 5 % more."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.analysis.layers import layer_table
from qat.export.checkpoint import save_checkpoint
from qat.presets import PRESETS
from qat.zoo.models import ResNet, SmallCNN

NETWORKS = {
    "digits small_cnn": lambda: SmallCNN(1, 10, width=16),
    "resnet20": lambda: ResNet(depth=20, in_channels=1, num_classes=10),
}
SCALE_BYTES = {"mxfp8": 1, "mxfp6": 1, "mxfp4": 1, "mxint8": 1, "nvfp4": 1}
"""Of a block's scale: OCP MX v1.0 has E8M0, NVFP4 e4m3. Every other scale is a float32."""


def inputs() -> Tensor:
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def sizes(preset: str, network: str, folder: Path) -> tuple[int, int, int]:
    """(bytes claimed, bytes of the file, bytes of the float weights).

    Claimed are the weights at their bits (`qat.report` says these), and what goes with them: float32 scales or gains
    and biases of output channels, scales of blocks and groups at their bits.
    """
    torch.manual_seed(0)
    net = NETWORKS[network]().eval()
    kept = sum(t.numel() for t in net.state_dict().values() if t.is_floating_point()) * 4
    scheme = qat.preset(preset)
    prepared = qat.prepare(net, scheme, inputs())
    qat.calibrate(prepared, [inputs()])
    path = folder / "size.safetensors"
    save_checkpoint(qat.lower(prepared), path)
    claimed = sum(row["bytes"] for row in layer_table(prepared) if row["kind"] != "edge")
    for layer in (m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)):
        claimed += 2 * 4 * layer.weight.shape[0]
        size = scheme.weight.group_size
        if size is not None and scheme.enabled:
            claimed += layer.weight.shape[0] * -(-layer.weight[0].numel() // size) * SCALE_BYTES.get(preset, 4)
    return claimed, path.stat().st_size, kept


def check(rows: list[tuple[str, str]], folder: Path, constant: int) -> None:
    """At most 5 % above what is claimed, and `constant` bytes for names and settings; the message has the table."""
    table, over = ["", f"{'preset':16} {'network':16} {'claimed':>8} {'file':>8} {'more':>7} {'of float':>8}"], []
    for preset, network in rows:
        claimed, size, kept = sizes(preset, network, folder)
        table.append(f"{preset:16} {network:16} {claimed:8} {size:8} {size / claimed - 1:7.1%} {size / kept:8.1%}")
        if size > 1.05 * claimed + constant:
            over.append(f"{preset} {network}")
    print("\n".join(table))
    assert not over, "\n".join([f"too large: {', '.join(over)}", *table])


def test_the_digits_network_takes_the_bits_that_it_claims(tmp_path: Path) -> None:
    check([(preset, "digits small_cnn") for preset in PRESETS], tmp_path, constant=2048)


def test_resnet20_takes_the_bits_that_it_claims(tmp_path: Path) -> None:
    check([(preset, "resnet20") for preset in ("int8", "w2a2_lsq", "nvfp4")], tmp_path, constant=0)


@pytest.mark.slow
def test_resnet20_takes_the_bits_that_every_preset_claims(tmp_path: Path) -> None:
    check([(preset, "resnet20") for preset in PRESETS], tmp_path, constant=0)
