"""Quantized layers against torch's own layers on a weight quantized by ATen."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat.layers import SWAPS, QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear
from qat.mode import Mode
from qat.scheme import Granularity, TensorScheme

SCHEME = TensorScheme(bits=4, narrow_range=True, granularity=Granularity.channel, range="dynamic")

CASES: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(5, 3), torch.randn(4, 5)),
    "linear, no bias, 3 dimensions": (nn.Linear(5, 3, bias=False), torch.randn(4, 2, 5)),
    "conv1d": (nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    "conv1d, all options": (
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, padding_mode="circular"),
        torch.randn(2, 4, 9),
    ),
    "conv2d": (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 7, 7)),
    "conv2d, stride, padding, dilation": (
        nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 0), dilation=(2, 1), bias=False),
        torch.randn(2, 3, 9, 8),
    ),
    "conv2d, depthwise, same": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), torch.randn(2, 4, 6, 6)),
    "conv2d, reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 3, 6, 6)),
    "conv2d, no batch": (nn.Conv2d(3, 4, 3), torch.randn(3, 7, 7)),
}


def quantized(module: nn.Module, scheme: TensorScheme = SCHEME) -> QuantizedLayer:
    return SWAPS[type(module)].from_float(module, scheme, "name")


def test_swaps() -> None:
    assert {nn.Linear: QuantLinear, nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d}.items() <= SWAPS.items()
    for float_type, quantized_type in SWAPS.items():
        linear = issubclass(float_type, nn.Linear)  # what nn.MultiheadAttention projects with is one in all but name
        assert issubclass(quantized_type, nn.Linear if linear else float_type)


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str) -> None:
    module, x = CASES[name]
    layer = quantized(module)
    assert isinstance(layer, type(module))
    assert torch.equal(layer(x), module(x))  # mode float
    layer.weight_quantizer.mode = Mode.quantize

    reference = copy.deepcopy(module)
    w = reference.weight.detach()
    scale = w.flatten(1).abs().amax(dim=1) / 7
    zeros = torch.zeros(len(w), dtype=torch.int32)
    w_dq = torch.fake_quantize_per_channel_affine(w, scale, zeros, 0, -7, 7)
    reference.weight = nn.Parameter(w_dq)
    assert not torch.equal(w_dq, w)
    y, expected = layer(x), reference(x)
    assert torch.allclose(y, expected, atol=1e-6)

    module.zero_grad()
    y.square().sum().backward()
    expected.square().sum().backward()
    for parameter, other in zip(module.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, atol=1e-4)  # nothing is clipped: straight through


@pytest.mark.parametrize("kind", [nn.Linear(4, 2), nn.Conv2d(2, 4, 3, groups=2)])
def test_shares_parameters_and_keeps_names_arguments_and_hooks(kind: nn.Module) -> None:
    module = copy.deepcopy(kind)
    calls: list[str] = []
    module.register_forward_hook(lambda *_: calls.append("hook"))
    module.eval()
    keys = list(module.state_dict())
    layer = quantized(module)
    assert layer.weight is module.weight
    assert layer.bias is module.bias
    assert [key for key in layer.state_dict() if not key.startswith("weight_quantizer.")] == keys
    assert not layer.training
    assert layer.extra_repr() == module.extra_repr()
    layer(torch.randn(2, 4) if isinstance(module, nn.Linear) else torch.randn(1, 2, 4, 4))
    assert calls == ["hook"]
    # and the float layer is left alone
    assert list(module.state_dict()) == keys
    assert "weight_quantizer" not in dict(module.named_children())
    layer.register_forward_hook(lambda *_: calls.append("new"))
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight))
    assert module.weight.abs().sum() > 0
    assert len(module._forward_hooks) == 1


def test_group_size_that_does_not_divide() -> None:
    options: dict[str, Any] = {"bits": 4, "granularity": Granularity.group, "group_size": 4}
    module = nn.Conv2d(3, 8, 3)
    with pytest.raises(
        ValueError, match=r"group_size=4 does not divide the 27 inputs of layer 'a\.b' .*\[8, 3, 3, 3\]"
    ):
        QuantConv2d.from_float(module, TensorScheme(**options), "a.b")
    padded = QuantConv2d.from_float(module, TensorScheme(**options, allow_padding=True), "a.b")
    assert padded.weight_quantizer.scale.shape == (8, 7)
    fits = QuantConv2d.from_float(nn.Conv2d(4, 8, 3), TensorScheme(**options), "a.b")
    assert fits.weight_quantizer.scale.shape == (8, 9)


def test_learned_weight_scale_is_a_parameter_of_the_layer() -> None:
    layer = quantized(nn.Linear(5, 3), TensorScheme(bits=4, granularity=Granularity.channel, range="learned"))
    assert sorted(name for name, _ in layer.named_parameters()) == ["bias", "weight", "weight_quantizer.range.scale"]
    assert layer.weight_quantizer.scale.shape == (3,)
