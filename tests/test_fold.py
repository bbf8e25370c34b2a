"""Folding: integers, scales and biases against a float64 convolution and BatchNorm of the fake-quantized weight."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.fold import LARGEST_BIAS, FoldedWeight, batch_norm_affine, fold, integer_bias
from qat.layers import SWAPS
from qat.layers.base import QuantizedLayer
from qat.mode import Mode
from qat.scheme import TensorScheme, override

SCHEMES: dict[str, dict[str, Any]] = {
    "narrow": {"bits": 8, "narrow_range": True, "granularity": "channel", "range": "dynamic"},
    "full": {"bits": 4, "granularity": "channel", "range": "dynamic"},
    "two_bits": {"bits": 2, "granularity": "channel", "range": "dynamic"},
    "tensor": {"bits": 8, "granularity": "tensor", "range": "dynamic"},
    "affine": {"bits": 8, "symmetric": False, "granularity": "channel", "range": "dynamic"},
    "affine_tensor": {"bits": 3, "symmetric": False, "granularity": "tensor", "range": "dynamic"},
    "affine_signed": {"bits": 5, "symmetric": False, "signed": True, "granularity": "channel", "range": "dynamic"},
    "learned": {"bits": 4, "granularity": "channel", "range": "learned"},
    "floor": {"bits": 4, "granularity": "channel", "range": "dynamic", "rounding": "floor"},
    "group": {"bits": 4, "granularity": "group", "group_size": 6, "range": "dynamic"},
    "group_padded": {
        "bits": 4, "granularity": "group", "group_size": 5, "allow_padding": True, "symmetric": False,
        "range": "dynamic",
    },
}  # fmt: skip
KINDS = {
    "linear": lambda: nn.Linear(18, 8),
    "conv1d": lambda: nn.Conv1d(6, 8, 3, bias=False),
    "conv2d": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2),
}


def make_layer(kind: str, scheme: str) -> QuantizedLayer:
    float_layer = KINDS[kind]()
    float_layer.weight.data += 0.1  # skewed, so that affine zero points differ from the middle
    quantized = SWAPS[type(float_layer)].from_float(float_layer, override(TensorScheme(), SCHEMES[scheme], ""), "layer")
    quantizer = quantized.weight_quantizer
    if scheme == "learned":  # a learned scale may have become negative: its absolute value is used
        quantizer.scale.data.uniform_(0.01, 0.1)
        quantizer.scale.data[::2] *= -1
    quantizer.mode = Mode.frozen
    return quantized


def make_norm(kind: str) -> nn.Module:
    norm = nn.BatchNorm2d(8) if kind == "conv2d" else nn.BatchNorm1d(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.1, 3)
    assert norm.weight.min() < 0 < norm.weight.max()
    return norm.eval()


def apply(layer: QuantizedLayer, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    conv = F.conv1d if isinstance(layer, nn.Conv1d) else F.conv2d
    return conv(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def simulated(layer: QuantizedLayer, norm: nn.Module | None, x: Tensor) -> Tensor:
    """Layer with its fake-quantized weight, then torch's own BatchNorm, in float64."""
    bias = None if layer.bias is None else layer.bias.detach().double()
    y = apply(layer, layer.quantized_weight().detach().double(), bias, x)
    if norm is None:
        return y
    weight, shift = (None if t is None else t.detach().double() for t in (norm.weight, norm.bias))
    return F.batch_norm(y, norm.running_mean.double(), norm.running_var.double(), weight, shift, eps=norm.eps)


def real_weight(folded: FoldedWeight, group_size: int | None) -> Tensor:
    """`scale * (q - zero_point)` with every value's own scale, spelled out input by input."""
    out = folded.q.shape[0]
    flat = folded.q.double().reshape(out, -1)
    index = torch.arange(flat.shape[1]) // (group_size or flat.shape[1])
    scale, zero = (
        folded.scale.double().reshape(out, -1)[:, index],
        folded.zero_point.double().reshape(out, -1)[:, index],
    )
    return (scale * (flat - zero)).reshape(folded.q.shape)


def inputs(layer: QuantizedLayer) -> Tensor:
    shape = (64, 18) if isinstance(layer, nn.Linear) else (4, 6, 9) if isinstance(layer, nn.Conv1d) else (4, 4, 6, 6)
    return torch.randn(shape, dtype=torch.float64)


def assert_grid(folded: FoldedWeight) -> None:
    low, high = folded.bounds
    assert torch.equal(folded.q, folded.q.round())
    assert torch.equal(folded.zero_point, folded.zero_point.round())
    assert low <= folded.q.min()
    assert folded.q.max() <= high
    assert low <= folded.zero_point.min()
    assert folded.zero_point.max() <= high
    assert (folded.scale >= 0).all()


def assert_equal_real(got: Tensor, expected: Tensor) -> None:
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()  # the fake-quantized weight is float32


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_folded_layer_computes_what_training_simulated(kind: str, scheme: str, with_norm: bool) -> None:
    torch.manual_seed(3)
    layer = make_layer(kind, scheme)
    norm = make_norm(kind) if with_norm else None
    folded = fold(layer, norm)
    assert folded.bounds == (layer.weight_quantizer.quant_min, layer.weight_quantizer.quant_max)
    assert_grid(folded)
    group_size = layer.weight_quantizer.scheme.group_size
    assert folded.scale.shape == folded.zero_point.shape == ((8,) if group_size is None else (8, -(-18 // group_size)))
    x = inputs(layer)
    assert_equal_real(apply(layer, real_weight(folded, group_size), folded.bias, x), simulated(layer, norm, x))


def test_fold_changes_neither_layer_nor_norm() -> None:
    torch.manual_seed(0)
    layer, norm = make_layer("conv2d", "learned"), make_norm("conv2d")
    before = {k: v.clone() for module in (layer, norm) for k, v in module.state_dict().items()}
    folded = fold(layer, norm)
    for tensor in (folded.q, folded.scale, folded.zero_point, folded.bias):
        tensor.zero_()
    after = {k: v for module in (layer, norm) for k, v in module.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_negative_gamma_flips_inside_the_grid() -> None:
    layer = make_layer("linear", "full")  # the grid [-8, 7] has no 8 to flip -8 to
    layer.weight.data[0] = torch.linspace(-8, 7, 18).round() * 0.5
    layer.weight_quantizer._choose = lambda low, high, shape: (torch.full((8,), 0.5), torch.zeros(8))  # type: ignore[method-assign]
    norm = make_norm("linear")
    norm.weight.data[0] = -1.0
    folded = fold(layer, norm)
    assert folded.q[0].min() == -8
    assert folded.q[0].max() == 7
    assert folded.zero_point[0] == -1
    assert torch.equal(folded.q[0] - folded.zero_point[0], -(layer.weight[0] / 0.5))


@pytest.mark.parametrize("gamma", [0.0, 1e-12, -1e-12, 1e-30, 1e-42])
@pytest.mark.parametrize("beta", [0.0, 50.0, -1e6])
@pytest.mark.parametrize("scheme", ["narrow", "affine"])
def test_vanishing_gamma(gamma: float, beta: float, scheme: str) -> None:
    torch.manual_seed(0)
    layer, norm = make_layer("conv2d", scheme), make_norm("conv2d")
    norm.weight.data[2], norm.bias.data[2] = gamma, beta
    folded = fold(layer, norm)
    assert_grid(folded)
    input_scale = 0.02
    scale, q, bias = integer_bias(folded, input_scale, layer.weight.dim())
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert (scale.float() > 0).all()
    assert torch.equal(scale, scale.float().double())
    assert torch.equal(q, q.round())
    assert folded.bounds[0] <= q.min()
    assert q.max() <= folded.bounds[1]
    assert bias.abs().max() < 2**31
    x_q = torch.randint(0, 256, (4, 4, 6, 6)).double()
    sums = apply(layer, q - folded.zero_point.reshape(-1, 1, 1, 1), bias, x_q)
    assert sums.abs().max() < 2**31
    got, expected = sums * (scale * input_scale).reshape(-1, 1, 1), simulated(layer, norm, x_q * input_scale)
    assert (got[:, 2] - expected[:, 2]).abs().max() <= 1e-3 * expected[:, 2].abs().max() + 1e-9
    others = [0, 1, 3, 4, 5, 6, 7]
    unit = (scale * input_scale)[others].reshape(-1, 1, 1)
    error = (got[:, others] - expected[:, others]).abs()
    assert (error <= 0.5 * unit + 1e-6 * expected.abs().max()).all()  # the bias is rounded to the unit of the sums


def test_integer_bias_is_the_rounded_bias() -> None:
    torch.manual_seed(0)
    layer = make_layer("linear", "narrow")
    folded = fold(layer, make_norm("linear"))
    scale, q, bias = integer_bias(folded, 0.05, 2)
    assert torch.equal(q, folded.q.double())
    assert torch.equal(scale, folded.scale.float().double())
    assert torch.equal(bias, torch.round(folded.bias / (scale * 0.05)))
    assert bias.abs().min() > 0


def test_scale_is_raised_only_where_the_bias_needs_it() -> None:
    folded = FoldedWeight(
        q=torch.tensor([[100.0, -50.0], [100.0, -50.0], [100.0, -50.0]]),
        scale=torch.tensor([1.0, 1e-9, 1e-12], dtype=torch.float64),
        zero_point=torch.zeros(3),
        bias=torch.tensor([3.2, 3.2, -3.2], dtype=torch.float64),
        bounds=(-127, 127),
    )
    scale, q, bias = integer_bias(folded, 1.0, 2)
    # 3.2 / 2^30 = 2.98e-9: the scale of the last two rows, whose integers are divided by 2.98 and 2980
    assert scale.tolist() == pytest.approx([1.0, 3.2 / LARGEST_BIAS, 3.2 / LARGEST_BIAS], rel=1e-6)
    assert q.tolist() == [[100, -50], [34, -17], [0, 0]]
    assert bias.tolist() == pytest.approx([3, 2**30, -(2**30)], rel=1e-6)
    assert bias.abs().max() <= 2**30 * (1 + 1e-6)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_affine(affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5, eps=0.1, affine=affine)
    norm(torch.randn(8, 5, 3, 3) * 2 + 1)
    if affine:
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    gain, shift = batch_norm_affine(norm, 5)
    assert gain.dtype == shift.dtype == torch.float64
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    expected = norm.double().eval()(x)
    assert torch.allclose(x * gain.reshape(-1, 1, 1) + shift.reshape(-1, 1, 1), expected, rtol=1e-6, atol=1e-6)


def test_fold_without_affine_parameters() -> None:
    torch.manual_seed(0)
    layer, norm = make_layer("conv2d", "narrow"), nn.BatchNorm2d(8, affine=False)
    norm(torch.randn(16, 8, 3, 3) * 3 - 1)
    folded, x = fold(layer, norm.eval()), inputs(layer)
    assert_equal_real(apply(layer, real_weight(folded, None), folded.bias, x), simulated(layer, norm, x))


def test_no_norm_is_the_identity() -> None:
    gain, shift = batch_norm_affine(None, 3)
    assert gain.tolist() == [1, 1, 1]
    assert shift.tolist() == [0, 0, 0]


def test_batch_norm_without_statistics_is_refused() -> None:
    with pytest.raises(ValueError, match="track_running_stats=False"):
        fold(make_layer("conv2d", "narrow"), nn.BatchNorm2d(8, track_running_stats=False))
