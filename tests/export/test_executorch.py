"""`.pte` files, run by ExecuTorch, against the integer network."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.export import EXPORTERS
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerNetwork
from tests.export.test_pt2 import NETWORKS

MISSING = importlib.util.find_spec("executorch") is None
needs_executorch = pytest.mark.skipif(MISSING, reason="pip install 'qat[executorch]'")


def lowered(net: nn.Module, x: Tensor, preset: str, **settings: Any) -> IntegerNetwork:
    prepared = qat.prepare(net.eval(), qat.preset(preset, **settings), x[:2])
    finalize(prepared, [x], PTQConfig(bias_correction=False), trained=False)
    network = qat.lower(prepared)
    assert isinstance(network, IntegerNetwork)
    return network


@needs_executorch
@pytest.mark.parametrize(
    ("name", "preset", "target"),
    [
        ("mixed", "int8", "generic"), ("mixed", "w4a4", "generic"), ("small_cnn", "w8a8_asymmetric", "generic"),
        ("small_cnn", "int8", "executorch_xnnpack"),
    ],
)  # fmt: skip
@torch.no_grad()
def test_a_reloaded_program_equals_the_network(name: str, preset: str, target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    x = torch.randn(shape)
    network = lowered(build(), x, preset, target=target)
    path = qat.export(network, tmp_path, x[:1], formats=["executorch"])["executorch"]
    program = EXPORTERS["executorch"].open(path, target)
    for inputs in (x, x[:1], torch.cat([x] * 3)):
        expected, made = network(inputs), program(inputs)
        assert made.shape == expected.shape
        assert (made - expected).abs().max() <= 0.05 * expected.abs().max()
    for damaged in (b"", path.read_bytes()[:1000]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="ExecuTorch cannot read it"):
            EXPORTERS["executorch"].open(path, target)


@needs_executorch
@torch.no_grad()
def test_bounds_that_are_a_relu_or_few_bits_are_kept(tmp_path: Path) -> None:
    """XNNPACK reads no bounds of a quantize operation: what is beyond them came through."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU6())
    for preset in ("int8", "w4a4"):
        network = lowered(net, x, preset)
        path = qat.export(network, tmp_path, x[:1], formats=["executorch"])["executorch"]
        made = EXPORTERS["executorch"].open(path, "generic")(x)
        assert made.min() >= 0
        assert (made - network(x)).abs().max() <= 0.02 * network(x).abs().max()


@pytest.mark.skipif(not MISSING, reason="the package is there")
def test_without_executorch_the_hint_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"pip install 'qat\[executorch\]'"):
        EXPORTERS["executorch"].require()


def test_a_target_of_fixed_point_is_refused() -> None:
    check = EXPORTERS["executorch"].check
    assert check is not None
    with pytest.raises(ValueError, match=r"executorch: target=cmsis_nn scales by an int32 multiplier"):
        check(qat.preset("int8", target="cmsis_nn"))
