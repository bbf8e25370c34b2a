"""Sums that functions read are exact in evaluation: where integers cancel, no function magnifies float32's rounding."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.export.parity import ParityError, ParityLimits, measure
from qat.layers import QuantConv2d, QuantLinear
from qat.ptq import PTQConfig, finalize


class Normalized(nn.Module):
    """Two sums of four products, divided by their norm."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 2, bias=bias), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.normalize(self.first(x), dim=-1))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x)))


def prepared(net: nn.Module, bits: int, x: Tensor) -> torch.fx.GraphModule:
    scheme = {"bits": bits, "granularity": "channel", "range": "dynamic"}
    config = qat.QuantConfig.from_dict({"weight": scheme, "activation": {"bits": 8}, "input": {"bits": bits}})
    result = qat.prepare(net, config, x)
    qat.calibrate(result, [x])
    finalize(result, [x], PTQConfig(bias_correction=False, adaptive_rounding_steps=0), trained=False)
    return result.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_integers_that_cancel_are_nothing_to_normalize(bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, 4)
    net = prepared(Normalized(bias), 3, x)
    network = qat.lower(net)
    with torch.no_grad():
        first = net.get_submodule("first")
        real = F.linear(net.get_submodule("quantizers.x")(x), first.quantized_weight(), first.bias)
        sums = first(net.get_submodule("quantizers.x")(x))
    torch.testing.assert_close(sums, real, rtol=0, atol=1e-6)
    nought = (sums == 0).all(1)
    assert nought.any()
    assert (real[nought] != 0).any()  # what float32 leaves, and normalize makes a vector of length 1
    paths = qat.export(network, tmp_path, x, formats=["int8", "onnx"])
    for pair, parity in measure(net, network, paths, x, layer_samples=2048).items():
        parity.check(pair, ParityLimits())
        assert parity.max_abs == 0, pair


def test_convolutions_too_and_gradients_and_copies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 1, 6, 6)
    net = prepared(Pictures(), 8, x)
    network = qat.lower(net)
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(expected, network(x))
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(other(x), expected)
    grad = net(x)
    assert torch.equal(grad, expected)  # with the gradient of the float sum
    grad.square().sum().backward()
    assert net.get_submodule("conv").weight.grad.abs().sum() > 0
    assert torch.equal(net.eval()(x).detach(), expected)
    layers = [m for m in net.modules() if isinstance(m, QuantConv2d | QuantLinear)]
    assert all(layer.sources for layer in layers)
    trains = copy.deepcopy(net).train()
    torch.testing.assert_close(trains(x).detach(), expected, rtol=1e-4, atol=1e-4)
    qat.set_mode(net, "float")
    with torch.no_grad():
        torch.testing.assert_close(net(x), net.train()(x))


class Mean(nn.Module):
    """The mean of normalized values, which is nought but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).mean(-1, keepdim=True))


def test_a_departure_that_rounding_explains_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5, 6)
    net = qat.prepare(Mean(), qat.preset("int8"), x)
    qat.calibrate(net, [x])
    finalize(net, [x], PTQConfig(bias_correction=False), trained=False)
    network = qat.lower(net.eval())
    paths = qat.export(network, tmp_path, x[:2], formats=["onnx"])  # ONNX Runtime has no integer mean of such scales
    with pytest.raises(ParityError, match=r"'mean' departs.*(?s:.*)float32's rounding alone may move it by \S+ steps"):
        measure(net, network, paths, x)["qat_onnx"].check("qat_onnx", ParityLimits())
