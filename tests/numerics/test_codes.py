"""Integers in place of real numbers for backward: the same gradients to the bit, and what is kept is a byte each."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.attention import matmul
from qat.modes import set_mode
from qat.numerics import codes, fast, native
from qat.zoo.gpt import CharGPT

pytestmark = pytest.mark.skipif(native.module() is None, reason="no compiler at hand")


def quantized(x: Tensor, low: int = -128, high: int = 127, with_codes: bool = True, **settings: Any) -> Tensor:
    zero = torch.tensor(3.0 if low >= 0 else 0.0)
    return fast.fake_quantize(x, torch.tensor(0.03), zero, low, high, codes=with_codes, **settings)


@pytest.mark.parametrize("form", ["on", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("low", "high", "relu", "grad_scale"), [(-128, 127, False, None), (0, 255, True, 0.1)])
def test_integers_are_the_tensor_again(
    low: int, high: int, relu: bool, grad_scale: float | None, dtype: torch.dtype, form: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("QAT_KERNELS", form)
    x = (torch.randn(64, 33, 17) * 3).to(dtype).requires_grad_()
    y = quantized(x, low, high, relu=relu, grad_scale=grad_scale)
    again = y.codes.decode(y.shape, y.stride())  # type: ignore[attr-defined]
    assert again.dtype == dtype
    assert torch.equal(again, y)
    assert torch.equal(again.signbit(), y.signbit())


CONSUMERS: dict[str, tuple[tuple[int, ...], Any]] = {
    "linear": ((64, 16, 40), lambda x, w: F.linear(x, w[:30, :40])),
    "conv": ((4, 40, 16, 16), lambda x, w: F.conv2d(x, w.view(-1, 40, 3, 3)[:24])),
}


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CONSUMERS)
def test_same_gradients_and_integers_kept(
    name: str, memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, layer = CONSUMERS[name]
    if memory is torch.channels_last and len(shape) != 4:
        pytest.skip("of images alone")
    x = torch.randn(shape).contiguous(memory_format=memory).requires_grad_()
    w = torch.randn(90, 40 * 9, requires_grad=True)
    grads: list[tuple[Tensor, ...]] = []
    unpack = codes._unpack
    for keep in (True, False):
        y = quantized(x, with_codes=keep)
        kept: list[Tensor] = []
        monkeypatch.setattr(codes, "_unpack", lambda k, seen=kept: (seen.append(k), unpack(k))[1])
        with codes.kept_as_integers(y):
            loss = layer(y, w).square().sum()
        (first,) = torch.autograd.grad(loss, w, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), (x, w))  # a second derivative passes the integers, too
        assert any(isinstance(k, tuple) for k in kept) == keep
        grads.append((first.detach(), *second))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_views_with_gaps_are_gathered() -> None:
    """Queries, keys and values lie side by side in one tensor, as attention makes them."""
    x = torch.randn(4, 32, 3 * 4 * 32, requires_grad=True)
    results = []
    for keep in (True, False):
        q, k, v = quantized(x, with_codes=keep).unflatten(-1, (3, 4, 32)).transpose(1, 3).unbind(2)
        z = matmul(matmul(q, k.transpose(-2, -1)), v)
        results.append((z, *torch.autograd.grad(z.square().sum(), x)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)  # sums of rows in another order
    assert torch.equal(codes.gathered(q), q)


@pytest.mark.parametrize("outer", ["checkpoint", "hooks"])
def test_others_who_take_what_is_kept_get_real_numbers(outer: str) -> None:
    layer = nn.Linear(256, 8)
    x = torch.randn(256, 256, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        y = quantized(x)
        with codes.kept_as_integers(y):
            return F.linear(y, layer.weight)

    expected = torch.autograd.grad(run(x).square().sum(), (x, layer.weight))
    if outer == "checkpoint":
        loss = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False).square().sum()
    else:
        with torch.autograd.graph.save_on_cpu():
            loss = run(x).square().sum()
    for a, b in zip(torch.autograd.grad(loss, (x, layer.weight)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("preset", "mode"), [("int8", "frozen"), ("int8", "quantize"), ("w4a4_lsq", "quantize")])
def test_a_network_trains_the_same(preset: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of a GPT with integers kept and with real numbers kept: loss and every gradient."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (8, 65))
    net = CharGPT(64, context=64, n_layer=1, n_head=4, width=64)
    results = []
    for keep in (True, False):
        prepared = qat.prepare(net, qat.preset(preset), ids[:2, :-1])
        qat.calibrate(prepared, [ids[:, :-1]])
        set_mode(prepared, mode)
        prepared.train()
        with monkeypatch.context() as patch:
            if not keep:
                patch.setattr(codes, "_applies", lambda: False)
            loss = F.cross_entropy(prepared(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in prepared.parameters() if p.grad is not None)])
    assert len(results[0]) > 10
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)
