"""Layers as products of 8-bit matrices, as a GPU runs them: here on the CPU, which has the operations, too."""

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.ptq.finalize import PTQConfig, finalize
from qat.runtime import IntegerNetwork, Quantize
from qat.runtime.float8 import multiplies_float8
from qat.runtime.int8_sums import Int8Sums, multiplies_int8
from qat.runtime.stored import TableConv
from qat.zoo.models import MLP, ResNet
from tests.test_fast_path import GEOMETRIES, layer_of, network_of

CPU = torch.device("cpu")


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("grid", [(0, 255, 0), (0, 255, 77), (-128, 127, 0), (-127, 127, -3), (0, 15, 3)])
@pytest.mark.parametrize("name", [name for name, (_, _, how) in GEOMETRIES.items() if "groups" not in how])
def test_sums_by_int8_matrices_equal_the_reference(name: str, grid: tuple[int, int, int], extreme: bool) -> None:
    shape, size, geometry = GEOMETRIES[name]
    low, high, zero = grid
    x_q = torch.full(size, high) if extreme else torch.randint(low, high + 1, size)
    x_q[0] = low if extreme else x_q[0]
    x_q = x_q.to(torch.uint8 if low >= 0 else torch.int8)
    layer = layer_of(shape, low, high, zero, Quantize(0, 255), extreme, **geometry)
    layer.reference = True
    sums = Int8Sums(layer.weight, zero, layer.stride, layer.padding, layer.dilation)(x_q)
    assert sums.dtype is torch.int32
    bias = layer.bias.reshape(-1, *[1] * (len(shape) - 2))
    assert torch.equal(sums + bias, layer.accumulate(x_q))
    assert sums[:0].shape == Int8Sums(layer.weight, zero, layer.stride, layer.padding, layer.dilation)(x_q[:0]).shape


def test_layers_that_are_no_such_product_keep_their_own_sums() -> None:
    def made(shape: list[int], low: int = 0, high: int = 255, **geometry: object) -> Int8Sums | None:
        return layer_of(shape, low, high, 0, None, False, **geometry).int8_sums()

    assert multiplies_int8(CPU)
    assert made([8, 20]) is not None
    assert made([8, 20, 1, 1]) is not None
    assert made([8, 128, 3, 3]) is not None  # 1152 products of 255 * 127: beyond float32's integers
    assert made([8, 8, 3, 3]) is None  # exact as a float32 convolution
    assert made([8, 1, 1, 1], groups=8) is None
    assert made([8, 20], -(2**15), 2**15 - 1) is None  # 16-bit inputs
    assert made([8, 70_000]) is None  # sums of 64 bits
    affine = layer_of([8, 20], 0, 255, 0, None, False)
    affine.weight_zero_point.fill_(3)
    assert affine.int8_sums() is None


def lowered(net: nn.Module, x: Tensor, preset: str) -> IntegerNetwork:
    prepared = qat.prepare(net.eval(), qat.preset(preset), x[:2])
    finalize(prepared, [x], PTQConfig(bias_correction=False), trained=False)
    network = qat.lower(prepared)
    assert isinstance(network, IntegerNetwork)
    return network


@torch.no_grad()
def test_float8_layers_equal_theirs_to_the_rounding_of_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 3, 4, 4)
    network = lowered(MLP(3, 4, 10, [40, 24]), x, "fp8")
    assert multiplies_float8(CPU)
    products = network.fast_path().products
    assert len(products) == sum(isinstance(layer, TableConv) for layer in network.layers.values()) == 3
    tensors = network.run(x)
    for node in network.nodes:
        if node.name in products:
            expected, given = tensors[node.name], tensors[node.inputs[0]]
            made = products[node.name](given)
            torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
            assert made.shape == products[node.name](given[:1]).shape[:0] + expected.shape
    whole = network.run(x, kernels=products)[network.outputs[0]]
    step = float(tensors[network.outputs[0]].abs().max()) / 16  # e4m3fn's steps are a sixteenth to an eighth of a value
    assert (whole - network(x)).abs().max() <= step


def test_float8_products_are_of_float8_layers_alone() -> None:
    x = torch.randn(8, 3, 4, 4)
    for preset in ("int8", "w4g32", "mxfp8"):
        assert lowered(MLP(3, 4, 10, [32]), x, preset).fast_path().products == {}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GEOMETRIES)
@torch.no_grad()
def test_integer_layers_on_a_gpu_equal_the_reference(name: str) -> None:
    shape, size, geometry = GEOMETRIES[name]
    network = network_of(layer_of(shape, -128, 127, 5, Quantize(-128, 127, scale=2.0), False, **geometry), -128, 127, 5)
    x = torch.randn(size)
    network.set_reference()
    expected = network(x)
    network.set_reference(False)
    steps = (network.cuda()(x.cuda()).cpu().int() - expected.int()).abs()
    assert steps.max() <= 1  # the sums are equal; what is left is float32's scaling, next to a tie
    assert (steps == 0).float().mean() >= 0.999


@pytest.mark.gpu
@torch.no_grad()
def test_a_network_on_a_gpu_gives_the_integers_of_the_reference() -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 32, 32)
    network = lowered(ResNet(20), x, "int8")
    network.set_reference()
    expected = network(x)
    network.set_reference(False)
    network.cuda()
    for size in (32, 1):
        got = network(x[:size].cuda()).cpu()
        assert (got - expected[:size]).abs().max() <= 0.05 * expected.abs().max()
    forms = [m._made["int8"][2] for m in network.modules() if "int8" in getattr(m, "_made", {})]
    assert any(form is not None for form in forms)
    if torch.cuda.get_device_capability() >= (8, 9):
        x = torch.randn(50, 3, 4, 4)
        network = lowered(MLP(3, 4, 10, [40, 24]), x, "fp8")
        expected = network(x)
        assert len(network.cuda().fast_path().products) == 3
        assert (network(x.cuda()).cpu() - expected).abs().max() <= float(expected.abs().max()) / 16
