"""Gradients: against ATen's learnable kernels, and Esser et al. 2020 (equations 1 to 3) in float64.

Tolerance of the scale's gradient: one byte an element codes `round(v) - v` in 253 steps over [-1/2, 1/2], so it is off
by at most half of one, 1/506; in a sum weighted by `grad`, by at most `sum |grad| / 506`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qat.numerics import native
from qat.numerics.fake_quantize import fake_quantize

CODING = 1 / 506 + 1e-5  # and float32's own rounding of v
GRIDS = [(-2, 1), (-7, 7), (-8, 7), (0, 15), (-128, 127), (0, 255)]


def gradients(x: Tensor, scale: Tensor, zero_point: Tensor, grad: Tensor, grid: tuple[int, int], **options):  # type: ignore[no-untyped-def]
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    y = fake_quantize(x, scale, zero_point, *grid, **options)
    y.backward(grad)
    return y.detach(), x.grad, scale.grad


def case(grid: tuple[int, int], shape: tuple[int, ...] = (20_000,)) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values on and beyond the grid, away from ties."""
    generator = torch.Generator().manual_seed(sum(grid) + 1000)
    scale, zero_point = torch.tensor(0.137), torch.tensor(float((grid[0] + 2 * grid[1]) // 3))
    span = grid[1] - grid[0]
    v = (torch.rand(shape, generator=generator) * 2 - 0.5) * span + grid[0] - zero_point
    v = torch.where((v - v.floor() - 0.5).abs() < 1e-3, v + 0.01, v)
    # a positive gradient on positive v, negative on negative: the scale's gradients add up instead of cancelling
    return v * scale, scale, zero_point, torch.rand(shape, generator=generator) * v.sign()


@pytest.mark.parametrize("grid", GRIDS)
def test_clipped_ste_equals_aten(grid: tuple[int, int]) -> None:
    x, scale, zero_point, grad = case(grid)
    y, x_grad, scale_grad = gradients(x, scale, zero_point, grad, grid)
    expected_x = x.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(expected_x, scale.item(), int(zero_point), *grid)
    expected.backward(grad)
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.equal(x_grad, expected_x.grad)
    assert 0.05 < (x_grad == 0).float().mean() < 0.7  # some were clipped, some were not
    assert scale_grad is None


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", [1.0, 0.01])
def test_lsq_equals_aten_per_tensor(grid: tuple[int, int], factor: float) -> None:
    x, scale, zero_point, grad = case(grid)
    y, x_grad, scale_grad = gradients(x, scale, zero_point, grad, grid, grad_scale=factor)
    aten_x, aten_scale = x.clone().requires_grad_(), scale.reshape(1).clone().requires_grad_()
    expected = torch._fake_quantize_learnable_per_tensor_affine(
        aten_x, aten_scale, zero_point.reshape(1), *grid, factor
    )
    expected.backward(grad)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.equal(x_grad, aten_x.grad)
    assert scale_grad.shape == ()
    bound = float(grad.abs().sum()) * CODING * factor
    assert aten_scale.grad.item() > 20 * bound  # the tolerance is a small part of the gradient
    assert abs(scale_grad.item() - aten_scale.grad.item()) <= bound


@pytest.mark.parametrize("grid", [(-8, 7), (0, 15), (-127, 127)])
def test_lsq_equals_aten_per_channel(grid: tuple[int, int]) -> None:
    x, _, zero_point, grad = case(grid, (4, 3, 500))
    gain = torch.tensor([0.5, 1.0, 1.7, 4.0]).reshape(-1, 1, 1)
    scale, x = gain * 0.137, x * gain
    zero_point = (zero_point + torch.tensor([-1.0, 0.0, 1.0, 2.0])).clamp(*grid).reshape(-1, 1, 1)
    y, x_grad, scale_grad = gradients(x, scale, zero_point, grad, grid, grad_scale=0.5)
    aten_x, aten_scale = x.clone().requires_grad_(), scale.flatten().clone().requires_grad_()
    expected = torch._fake_quantize_learnable_per_channel_affine(
        aten_x, aten_scale, zero_point.flatten(), 0, *grid, 0.5
    )
    expected.backward(grad)
    assert torch.allclose(y, expected, atol=1e-4)
    assert torch.equal(x_grad, aten_x.grad)
    assert scale_grad.shape == scale.shape
    bound = grad.abs().sum(dim=(1, 2)) * CODING * 0.5
    assert ((scale_grad.flatten() - aten_scale.grad).abs() <= bound).all()


def esser(x: Tensor, scale: Tensor, zero_point: Tensor, grad: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Equations 2, 3 and 5 as printed, in float64; `-Q_N` and `Q_P` are the grid's ends seen from the zero point."""
    v = x.double() / scale.double()
    lowest, highest = (bound - zero_point.double() for bound in grid)
    inside = (v > lowest) & (v < highest)
    slope = torch.where(inside, torch.round(v) - v, torch.where(v <= lowest, lowest, highest))
    return grad.double() * inside, (grad.double() * slope).sum()


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(GRIDS),
    st.floats(2**-10, 2**10, width=32),
    st.integers(0, 2**30),
    st.sampled_from([1.0, 0.125]),
)
def test_lsq_equals_the_paper_in_float64(grid: tuple[int, int], scale: float, seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    zero_point = torch.randint(grid[0], grid[1] + 1, (), generator=generator).float()
    span = grid[1] - grid[0]
    v = (torch.rand(300, generator=generator) * 1.6 - 0.3) * span + grid[0] - zero_point
    ends = torch.tensor([bound - zero_point for bound in grid])
    # Up to half a step beyond an end the paper clips, while this code (as ATen) clips where the *rounded* value leaves
    # the grid; those values, and ties, are left to the comparison with ATen.
    margin = ((v - ends[0] <= 0.01) & (v - ends[0] >= -0.51)) | ((v - ends[1] >= -0.01) & (v - ends[1] <= 0.51))
    v = v[~margin & ((v - v.floor() - 0.5).abs() > 1e-3)]
    x, s = v * scale, torch.tensor(scale)
    grad = torch.randn(v.shape, generator=generator)
    _, x_grad, scale_grad = gradients(x, s, zero_point, grad, grid, grad_scale=factor)
    expected_x, expected_scale = esser(x, s, zero_point, grad, grid)
    assert torch.equal(x_grad.double(), expected_x)
    bound = grad.abs().sum().item() * factor * CODING + 1e-5 * abs(expected_scale.item())
    assert abs(scale_grad.item() - factor * expected_scale.item()) <= bound + 1e-5 * span * factor


def test_scale_slope_of_single_elements() -> None:
    # v: below, at the low end, a quarter above a level, three quarters above, zero, above
    v = [-5.0, -4.0, 1.25, 1.75, 0.0, 3.5001]
    expected = [-4.0, 0.0, -0.25, 0.25, 0.0, 3.0]
    for value, slope in zip(v, expected, strict=True):
        _, _, scale_grad = gradients(
            torch.tensor([value]) * 2, torch.tensor(2.0), torch.tensor(0.0), torch.ones(1), (-4, 3), grad_scale=1.0
        )
        assert scale_grad.item() == pytest.approx(slope, abs=CODING)


@pytest.mark.parametrize("rounding", ["floor", "ceil", "truncate"])
def test_other_roundings_have_residuals_up_to_one(rounding: str) -> None:
    torch.manual_seed(0)
    v = torch.rand(3000) * 14 - 7
    function = {"floor": torch.floor, "ceil": torch.ceil, "truncate": torch.trunc}[rounding]
    grad = torch.randn(3000)
    _, x_grad, scale_grad = gradients(
        v * 0.5, torch.tensor(0.5), torch.tensor(0.0), grad, (-8, 7), rounding=rounding, grad_scale=1.0
    )
    expected = (grad.double() * (function(v) - v).double()).sum().item()
    assert abs(scale_grad.item() - expected) <= grad.abs().sum().item() * 2 * CODING
    assert torch.equal(x_grad, grad)


@pytest.mark.parametrize("zero_point", [0.0, 3.0])
@pytest.mark.parametrize("grad_scale", [None, 0.3])
def test_absorbed_relu_is_relu_then_unsigned_quantization(zero_point: float, grad_scale: float | None) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(5000), torch.tensor([0.0, -0.0, -1e-9, 1e-9, -100.0, 100.0])])
    grad = torch.randn_like(x)
    scale = torch.tensor(0.11)
    z = torch.tensor(zero_point)
    y, x_grad, scale_grad = gradients(x, scale, z, grad, (0, 15), relu=True, grad_scale=grad_scale)

    plain, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
    composed = fake_quantize(torch.relu(plain), s, z, 0, 15, grad_scale=grad_scale)
    composed.backward(grad)
    assert torch.equal(y, composed)
    assert torch.equal(x_grad, plain.grad)
    assert (x_grad[x <= 0] == 0).all()
    if grad_scale is not None:
        bound = 2 * CODING * grad.abs().sum().item() * grad_scale
        assert abs(scale_grad.item() - s.grad.item()) <= bound
        v = torch.relu(x).double() / 0.11  # and against the formula
        slope = torch.where(v.round() > 15 - zero_point, 15 - zero_point, v.round() - v)
        assert abs(scale_grad.item() - grad_scale * (grad.double() * slope).sum().item()) <= bound


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("grad_scale", [None, 1.0])
def test_backward_keeps_a_byte_an_element_or_a_bit(relu: bool, grad_scale: float | None) -> None:
    kept: list[Tensor] = []
    x = torch.randn(64, 33, requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(x, scale, torch.tensor(0.0), 0, 15, relu=relu, grad_scale=grad_scale)
    bits = grad_scale is None and native.module() is not None
    assert sum(t.numel() * t.element_size() for t in kept if t.numel() > 1) == x.numel() // (8 if bits else 1)
    assert all(t.numel() == 1 or t.element_size() == 1 for t in kept)


def test_scale_gradient_of_groups_is_summed_in_its_own_row() -> None:
    torch.manual_seed(0)
    x, scale = torch.randn(6, 10), torch.rand(6, 1) + 0.1
    grad = torch.randn(6, 10)
    _, _, together = gradients(x, scale, torch.zeros(6, 1), grad, (-4, 3), grad_scale=1.0)
    for row in range(6):
        _, _, alone = gradients(x[row], scale[row, 0], torch.tensor(0.0), grad[row], (-4, 3), grad_scale=1.0)
        assert together[row, 0].item() == pytest.approx(alone.item(), abs=1e-5)
