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
    assert torch.equal(codes._gathered(q), q)


@pytest.mark.parametrize("rows", [slice(0, 2), slice(2, 4)])
def test_parts_without_gaps_have_their_own_integers(rows: slice) -> None:
    """Queries, keys and values may also lie one behind the other."""
    x = torch.randn(6, 3, 16, 24, requires_grad=True)
    results = []
    for multiply in (codes.matmul, torch.matmul):
        grid = quantized(x)
        left, right = grid[rows], grid[4:].mT
        assert left.is_contiguous()
        assert left._base is not None
        y = multiply(left, right)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


def test_products_of_nothing_and_of_vectors() -> None:
    x = quantized(torch.randn(4, 16, 24, requires_grad=True))
    assert codes.matmul(x[:, :0], x.mT).shape == (4, 0, 16)
    assert codes.linear(x[:0], x[0], None).shape == (0, 16, 16)
    column = torch.randn(24, 2)[:, 0]
    assert torch.equal(codes.matmul(x, column), torch.matmul(x, column))


def test_nobody_keeps_integers_of_inference() -> None:
    with torch.inference_mode(), torch.enable_grad():
        y = quantized(torch.randn(64, 40))
        assert codes._codes_of(y) is None
        assert codes.linear(y, y, None).shape == (64, 64)


def test_integers_of_another_tensor_are_refused() -> None:
    values, params = torch.zeros(8, dtype=torch.int8), torch.ones(3, 1)
    with pytest.raises(RuntimeError, match="8 integers for a tensor of 4 values"):
        native.decode(values, params, 8, torch.Size([4]), (1,), torch.float32)


FACTORS = {  # of which a product is made: shape of the input and of the other factor
    "rows": ((64, 40), (30, 40)),
    "sequences": ((8, 16, 40), (30, 40)),
    "images": ((2, 4, 8, 40), (30, 40)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("known", ["input", "weight", "both"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", FACTORS)
def test_linear_is_that_of_torch(
    shape: str, biased: bool, known: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result, gradients and second derivatives, equal to the bit."""
    called = []
    monkeypatch.setattr(native, "linear", lambda *args: (called.append(args), native._loaded().linear(*args))[1])
    x, w = (torch.randn(size).to(dtype).requires_grad_() for size in FACTORS[shape])
    bias = torch.randn(30).to(dtype).requires_grad_() if biased else None
    leaves = [x, w] if bias is None else [x, w, bias]
    results = []
    for multiply in (codes.linear, F.linear):

        def run(multiply: Any = multiply) -> Tensor:
            a = quantized(x) if known != "weight" else x * 1
            b = quantized(w) if known != "input" else w * 1
            result: Tensor = multiply(a, b, bias)
            return result

        y = run()
        assert multiply is F.linear or y._base is None  # it may be written to
        grads = torch.autograd.grad(y.float().square().mean(), leaves)
        (first,) = torch.autograd.grad(run().float().square().mean(), x, create_graph=True)
        second = torch.autograd.grad(first.float().square().sum(), [x, w])
        results.append((y.detach(), *grads, *second))
    assert len(called) == 2
    assert [t is None for t in called[0][3:]] == [known == "weight", known == "input"]
    for ours, torchs in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert torch.equal(ours, torchs)


@pytest.mark.parametrize("frozen", ["input", "weight", "bias"])
def test_only_gradients_that_are_asked_for(frozen: str) -> None:
    tensors = {"input": torch.randn(64, 40), "weight": torch.randn(30, 40), "bias": torch.randn(30)}
    leaves = [t.requires_grad_() for name, t in tensors.items() if name != frozen]
    results = []
    for multiply in (codes.linear, F.linear):
        y = multiply(quantized(tensors["input"]), quantized(tensors["weight"]), tensors["bias"])
        results.append(torch.autograd.grad(y.square().sum(), leaves))
    for ours, torchs in zip(*results, strict=True):
        assert torch.equal(ours, torchs)


def test_a_product_is_an_operation_of_autograd() -> None:
    x, w = torch.randn(64, 40, requires_grad=True), torch.randn(30, 40, requires_grad=True)
    y = codes.linear(quantized(x), quantized(w), None)
    y.square().sum().backward(retain_graph=True)
    once = x.grad.clone()  # type: ignore[union-attr]
    y.square().sum().backward()
    assert torch.equal(x.grad, 2 * once)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="second time"):
        y.square().sum().backward()
    z = codes.linear(quantized(x), quantized(w), None).relu_()
    assert torch.equal(z, F.linear(quantized(x), quantized(w)).relu())
    real = w * 1
    y = codes.linear(quantized(x), real, None)
    real.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("case", ["autocast", "gaps", "subclass", "no integers", "evaluation"])
def test_what_cpp_does_not_take_is_torchs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "linear", lambda *args: pytest.fail("called"))
    x, w = torch.randn(64, 40, requires_grad=True), torch.randn(30, 40, requires_grad=True)
    a, b = quantized(x), quantized(w)
    if case == "gaps":
        a = quantized(torch.randn(64, 80, requires_grad=True))[:, :40]
    elif case == "subclass":
        b = b.as_subclass(Subclass)
    elif case == "no integers":
        a, b = x * 1, w * 1
    with torch.autocast("cpu", enabled=case == "autocast"), torch.set_grad_enabled(case != "evaluation"):
        assert torch.equal(codes.linear(a, b, None), F.linear(a, b))


def test_integers_of_what_was_written_to_are_forgotten() -> None:
    x, w = torch.randn(64, 40, requires_grad=True), torch.randn(30, 40, requires_grad=True)
    results = []
    for multiply in (codes.linear, F.linear):
        a = quantized(x)
        a[:, :7].mul_(0.5)
        results.append(torch.autograd.grad(multiply(a, w, None).square().sum(), w)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("known", ["left", "right", "both"])
@pytest.mark.parametrize("turned", [False, True])
def test_products_of_batches_are_those_of_torch(known: str, turned: bool) -> None:
    """Of whole tensors and of views with gaps; gradients, second derivatives."""
    x = torch.randn(4, 6, 16, 2 * 24, requires_grad=True)
    results = []
    for multiply in (codes.matmul, torch.matmul):
        for part in (True, False):
            grid = quantized(x)
            left, right = (grid if known in (side, "both") else x * 1 for side in ("left", "right"))
            left = left[..., 24:] if part else left
            right = right[..., :24].mT if turned and part else right.mT if turned else right[:, :, :, :24]
            left = left if turned else left.mT
            y = multiply(left, right)
            (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), x)
            results.append((y.detach(), grad.detach(), second))
    for ours, torchs in zip(results[:2], results[2:], strict=True):
        for a, b in zip(ours, torchs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))  # sums in another order


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
