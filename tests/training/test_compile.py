"""torch.compile: one graph in every mode, no compilation a step, and what eager training computes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import qat
from qat.modes import set_mode, set_progress
from qat.scheme import Granularity, QuantConfig, TensorScheme

CHANNEL, GROUP, TOKEN = Granularity.channel, Granularity.group, Granularity.token
SCHEMES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fixed": ({"range": "fixed"}, {"observer": "percentile"}),
    "running": ({}, {"range": "running", "observer": "ema"}),
    "learned": ({"range": "learned", "granularity": CHANNEL}, {"range": "learned"}),
    "dynamic": (
        {"granularity": GROUP, "group_size": 3, "allow_padding": True}, {"range": "dynamic", "granularity": TOKEN}
    ),
    "running minmax": ({}, {"range": "running"}),
    "running percentile": ({}, {"range": "running", "observer": "percentile"}),
    "running sigma": ({}, {"range": "running", "observer": "sigma"}),
    "lsq_plus": ({"range": "lsq_plus", "symmetric": False}, {"range": "lsq_plus", "symmetric": False}),
    "pact, tqt": ({"range": "tqt"}, {"range": "pact"}),
    "dorefa": ({"range": "dorefa"}, {"range": "dorefa"}),
    "dsq": ({"gradient": "dsq"}, {"gradient": "dsq"}),
    "adaptive": ({"rounding": "adaptive", "range": "fixed"}, {}),
    "stochastic": ({"rounding": "stochastic"}, {}),
    "seeded": ({"rounding": "stochastic", "rounding_seed": 3}, {"gradient": "noise", "rounding_seed": 3}),
    "float8": ({"format": "e4m3fn", "bits": 8}, {"format": "e4m3fn"}),
    "codebook": ({"format": "codebook", "range": "learned", "granularity": CHANNEL, "refresh": 2}, {}),
    "product": (
        {"format": "product", "bits": 2, "range": "learned", "granularity": GROUP, "group_size": 1, "refresh": 2}, {}
    ),
}  # fmt: skip
QUICK = ("fixed", "running", "learned", "dynamic")
"""The kinds of range, in every mode; the rest in training alone."""
CASES = [(name, mode) for name in QUICK for mode in ("float", "observe", "quantize", "frozen")]
CASES += [(name, "quantize") for name in ("adaptive", "codebook")]
SLOW = [(name, mode) for name in SCHEMES for mode in ("observe", "quantize", "frozen") if (name, mode) not in CASES]


def prepared(name: str) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    weight, activation = SCHEMES[name]
    config = QuantConfig(
        weight=TensorScheme(**{"bits": 4, "range": "dynamic", **weight}),
        activation=TensorScheme(**{"bits": 8, "range": "fixed", **activation}),
    )
    result = qat.prepare(net, config, torch.randn(2, 2, 6, 6))
    qat.calibrate(result, [torch.randn(4, 2, 6, 6)])
    return result.train()


def check(name: str, mode: str, backend: str) -> None:
    net = prepared(name)
    twin = copy.deepcopy(net)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(twin, backend=counter, fullgraph=True)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.01) for n in (net, twin)]
    for n in (net, twin):
        set_mode(n, mode)
    for step in range(5):
        x, losses = torch.randn(4, 2, 6, 6), []
        for n, call, optimizer in zip((net, twin), (net, compiled), optimizers, strict=True):
            set_progress(n, step / 4)
            torch.manual_seed(step)
            optimizer.zero_grad()
            losses.append(call(x).square().mean())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1
    for key, value in net.state_dict().items():
        assert torch.allclose(twin.state_dict()[key].double(), value.double(), rtol=1e-5, atol=1e-5, equal_nan=True), (
            key
        )


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("name", "mode"), CASES)
def test_a_step_is_one_graph_that_is_compiled_once(name: str, mode: str) -> None:
    check(name, mode, "eager")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), SLOW)
def test_every_entry_is_one_graph_too(name: str, mode: str) -> None:
    check(name, mode, "aot_eager")


def test_inductor_gives_the_eager_result() -> None:
    check("learned", "quantize", "inductor")


def test_a_change_of_mode_compiles_anew_and_no_more() -> None:
    net = prepared("fixed")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for mode in ("observe", "quantize", "frozen", "quantize", "frozen"):
        set_mode(net, mode)
        compiled(torch.randn(4, 2, 6, 6))
    assert counter.frame_count == 3


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUICK)
def test_a_step_fits_a_cuda_graph(name: str) -> None:
    """Capture refuses whatever waits for the device."""
    net = prepared(name).cuda()
    set_mode(net, "quantize")
    x = torch.randn(4, 2, 6, 6, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            net.zero_grad(set_to_none=True)
            net(x).square().mean().backward()
    torch.cuda.current_stream().wait_stream(stream)
    twin = copy.deepcopy(net)
    net.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        net(x).square().mean().backward()
    x.normal_()
    graph.replay()
    twin.zero_grad(set_to_none=True)
    twin(x).square().mean().backward()
    for got, expected in zip(net.parameters(), twin.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(got.grad, expected.grad)
