"""Exact ties: training rounds them as its target does, where scales are such that they are common."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.export.c_header import open_c_header
from qat.export.formats import integers_given
from qat.export.parity import measure, ties_given, training_integers
from qat.fake_quant import FakeQuantize
from qat.numerics.rounding import ROUNDING
from qat.ptq import PTQConfig, finalize
from qat.ranges import RANGES
from qat.targets import ties

FIXED_POINT = ("cmsis_nn", "integer_only")


class Residual(nn.Module):
    """An addition of two tensors on grids of their own, a function of one, and a mean of four values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(4 * 9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = self.conv(y) + y
        return self.head(self.pool(F.leaky_relu(y, 0.25)).flatten(1))


def prepared(target: str, activation: dict[str, object], x: Tensor) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    net = qat.prepare(Residual(), qat.preset("int8", target=target, activation=activation), x)
    qat.calibrate(net, [x])
    finalize(net, [x], PTQConfig(bias_correction=False), trained=False)
    return net.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", FIXED_POINT)
def test_scales_of_powers_of_two_train_with_the_targets_ties(target: str, x: Tensor, tmp_path: Path) -> None:
    net = prepared(target, {"range": "tqt", "symmetric": True}, x)
    network = qat.lower(net)
    mine = training_integers(net, network, x)
    theirs, tied = integers_given(network, (x,), mine), ties_given(network, x, mine)
    assert max(float(t.float().mean()) for t in tied.values()) > 0.1
    for name, integers in mine.items():
        differs = integers != theirs[name]
        assert not bool((differs & tied[name]).any()) if name in tied else not bool(differs.any()), name
    qat.export(network, tmp_path, x, formats=["c_header"])
    assert torch.equal(open_c_header(tmp_path / "c_header")(x), network(x))
    assert [q.scheme.rounding for q in net.modules() if isinstance(q, FakeQuantize)].count("half_up") >= 4


def test_ties_that_are_rounded_differently_are_told(x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RANGES["tqt"], "ratios", False)
    net = prepared("cmsis_nn", {"range": "tqt", "symmetric": True}, x)
    network = qat.lower(net)
    files = qat.export(network, tmp_path, x, formats=["int8"])
    parity = measure(net, network, files, x, target="cmsis_nn")["qat_int8"]
    assert parity.max_steps == 1
    assert any("lie on ties that the two round in different ways" in note for note in parity.notes)


def test_other_ranges_keep_the_fast_kernels_and_may_ask(x: Tensor) -> None:
    def roundings(**activation: object) -> set[str]:
        net = prepared("cmsis_nn", activation, x)
        return {q.scheme.rounding for n, q in net.named_modules() if isinstance(q, FakeQuantize) and "weight" not in n}

    assert roundings() == {"nearest"}
    assert roundings(rounding="half_up") == {"half_up", "nearest"}  # the network's own input is rounded in float
    powers = {"range": "tqt", "symmetric": True}
    config = qat.preset("int8", target="cmsis_nn", rules=[{"match": "head", "activation": powers}])
    assert ties.with_ties_of_target(config).rules[0].activation == {**powers, "rounding": "half_up"}
    assert ties.with_ties_of_target(config).activation.rounding == "nearest"


@pytest.mark.parametrize("range", ["tqt", "lsq"])
def test_noise_in_the_place_of_rounding_goes_with_the_targets_ties(range: str, x: Tensor) -> None:
    net = prepared("cmsis_nn", {"range": range, "symmetric": True, "gradient": "noise"}, x)
    network = qat.lower(net)
    mine = training_integers(net, network, x)
    theirs, tied = integers_given(network, (x,), mine), ties_given(network, x, mine)
    for name, integers in mine.items():
        assert not bool(((integers != theirs[name]) & ~tied.get(name, torch.tensor(False))).any()), name


@pytest.mark.parametrize("target", ["generic", "onnxruntime_x86_vnni", "tensorrt"])
def test_ties_of_another_target_are_refused(target: str) -> None:
    config = qat.preset("int8", target=target, activation={"rounding": "half_up"})
    with pytest.raises(
        ValueError, match=rf"quant\.activation\.rounding=half_up: target={target} rounds halves to even; use .*=nearest"
    ):
        qat.prepare(Residual(), config, torch.randn(2, 1, 6, 6))
    config = qat.preset("int8", target="cmsis_nn", input={"rounding": "half_up"})
    with pytest.raises(ValueError, match=r"quant\.input\.rounding=half_up: inputs are put on their grid with halves"):
        qat.prepare(Residual(), config, torch.randn(2, 1, 6, 6))


def test_half_up_is_the_floor_of_half_more() -> None:
    x = torch.cat([torch.arange(-20, 21) / 4, torch.tensor([0.49999997, -0.49999997, 8388607.5, 16777216.0, -0.5])])
    exact = np.floor(x.double().numpy() + 0.5)
    assert np.array_equal(ROUNDING["half_up"](x).double().numpy(), exact)
