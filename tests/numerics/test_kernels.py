"""The compiled kernels against the composed form, which is their reference."""

import pytest
import torch
from torch import Tensor

from qat.numerics import fake_quantize as composed
from qat.numerics import kernels

N = kernels.SMALLEST
GRIDS = [(-8, 7, 0.0), (0, 15, 0.0), (0, 255, 113.0), (-127, 127, 0.0)]


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> None:
    if not kernels._check():
        pytest.skip("no compiler at hand")


def tensor(shape: tuple[int, ...], channels_last: bool = False, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    x.view(-1)[:9] = torch.tensor([0.0, 0.05, -0.05, 0.15, 1e30, -1e30, 1e-40, 0.25, -0.25])
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def both(monkeypatch: pytest.MonkeyPatch, x: Tensor, **kwargs: object) -> list[tuple[Tensor, ...]]:
    """(result, gradient of x, gradient of the scale) by the compiled and by the composed form."""
    results = []
    for fast in (True, False):
        monkeypatch.setattr(kernels, "_works", fast)
        leaf, scale = x.clone().requires_grad_(), torch.tensor(0.1, requires_grad=True)
        assert kernels.usable(leaf, scale, "nearest") is fast
        y = composed.fake_quantize(leaf, scale, **kwargs)  # type: ignore[arg-type]
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        y.backward(grad)
        results.append((y.detach(), leaf.grad, scale.grad if kwargs.get("grad_scale") else torch.zeros(())))
    return results


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("grad_scale", [None, 0.5])
@pytest.mark.parametrize(("shape", "channels_last"), [((N,), False), ((2, 16, 64, 65), False), ((2, 16, 64, 65), True)])
def test_both_forms_agree(
    monkeypatch: pytest.MonkeyPatch,
    grid: tuple[int, int, float],
    relu: bool,
    grad_scale: float | None,
    shape: tuple[int, ...],
    channels_last: bool,
) -> None:
    """Forward and gradient of the input to the bit; the scale's gradient to 1e-6 of its terms' magnitudes."""
    x = tensor(shape, channels_last)
    low, high, zero = grid
    fast, plain = both(monkeypatch, x, zero_point=torch.tensor(zero), quant_min=low, quant_max=high, relu=relu,
                       grad_scale=grad_scale)  # fmt: skip
    assert torch.equal(fast[0], plain[0])
    assert fast[0].stride() == x.stride() == fast[1].stride()
    assert torch.equal(fast[1], plain[1])
    terms = x.numel() * max(abs(low), high)
    assert abs(float(fast[2] - plain[2])) <= 1e-6 * terms * (grad_scale or 1)


@pytest.mark.parametrize("grad_scale", [None, 1.0])
def test_one_byte_an_element_is_kept(grad_scale: float | None) -> None:
    kept: list[int] = []
    x, scale = tensor((N,)).requires_grad_(), torch.tensor(0.1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        composed.fake_quantize(x, scale, torch.tensor(0.0), -8, 7, grad_scale=grad_scale)
    assert N <= sum(kept) <= N + 64


def test_every_length_takes_one_compilation() -> None:
    compiled = kernels.compiled(kernels.forward_ste)
    bounds = torch.tensor([-8.0, 7.0, -torch.inf])
    compiled(torch.randn(N), torch.tensor(0.1), torch.tensor(0.0), bounds)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (N + 1, N + 160, 2 * N):
            compiled(torch.randn(n), torch.tensor(0.3), torch.tensor(1.0), bounds)


def test_a_gradient_in_another_memory_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_works", True)
    x = tensor((2, 16, 64, 65)).requires_grad_()
    grad = tensor((2, 16, 64, 65), channels_last=True, seed=3)
    composed.fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), -8, 7).backward(grad)
    inside = (x.detach() / 0.1).round().clamp(-8, 7) == (x.detach() / 0.1).round()
    assert torch.equal(x.grad, grad * inside)


@pytest.mark.parametrize(
    ("x", "rounding"),
    [
        (torch.zeros(N - 1), "nearest"),
        (torch.zeros(N, dtype=torch.bfloat16), "nearest"),
        (torch.zeros(2 * N)[::2], "nearest"),
        (torch.zeros(N), "floor"),
    ],
)
def test_the_composed_form_takes_the_rest(x: Tensor, rounding: str) -> None:
    assert not kernels.usable(x, torch.tensor(0.1), rounding)
    assert not kernels.usable(torch.zeros(N), torch.ones(4), "nearest")


def test_without_a_compiler_training_goes_on(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(kernels, "_works", None)
    monkeypatch.setattr(kernels, "compiled", broken)
    x = tensor((N,)).requires_grad_()
    composed.fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), -8, 7).sum().backward()
    assert "no C++ compiler" in caplog.text
    assert x.grad is not None
    monkeypatch.setattr(kernels, "_works", None)
    monkeypatch.setenv("QAT_KERNELS", "off")
    assert not kernels.usable(x, torch.tensor(0.1), "nearest")
