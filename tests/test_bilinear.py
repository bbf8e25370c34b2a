"""Bilinear layers on integers: the sums of three factors, biases, what is left in float, the files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.analysis.islands import float_islands
from qat.export.onnxruntime import OnnxNetwork
from qat.export.parity import measure
from qat.export.pt2 import open_pt2
from qat.ptq import PTQConfig, finalize
from qat.runtime.grid import Quantize
from qat.runtime.layers import FloatConv
from qat.runtime.outer import IntegerBilinear, Outer
from tests.networks.blocks import Net

INT8: dict[str, Any] = {
    "weight": {"bits": 8, "granularity": "channel"}, "activation": {"bits": 8, "symmetric": False},
    "input": {"bits": 8, "symmetric": False},
}  # fmt: skip


class Pair(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.compute(self, x, y)


def ready(run: Callable[..., Tensor], config: dict[str, Any], sizes: tuple[int, int] = (6, 5), **parts: Any) -> Any:
    """(prepared network, through the PTQ step; inputs)."""
    torch.manual_seed(0)
    net, x = Pair(run, **parts), (torch.randn(256, sizes[0]), torch.randn(256, sizes[1]) + 0.3)
    prepared = qat.prepare(net.eval(), qat.QuantConfig.from_dict(config), tuple(t[:2] for t in x))
    finalize(prepared, [x], PTQConfig(), trained=False)
    return prepared, x


def filled(bits: int, pairs: tuple[int, int], extreme: bool) -> tuple[IntegerBilinear, Tensor, Tensor]:
    """A layer with zero points everywhere, and integers of its grids; `extreme`: each product is the largest."""
    generator = torch.Generator().manual_seed(bits)
    top = 2**bits - 1
    grids = [Quantize(0, top, scale=0.02, zero_point=0 if extreme else top // 3), Quantize(0, top, scale=0.5)]
    products = IntegerBilinear.products(*grids)
    layer = IntegerBilinear([7, pairs[0] * pairs[1]], [-128, 127], [products.quant_min, products.quant_max])
    layer.weight.copy_(torch.full_like(layer.weight, 127) if extreme
                       else torch.randint(-128, 128, layer.weight.shape, generator=generator))  # fmt: skip
    layer.weight_zero_point.copy_(torch.randint(-9, 0, (7,), generator=generator))
    layer.bias.copy_(torch.randint(-(2**40), 2**40, (7,), generator=generator))
    layer.left_zero_point.copy_(grids[0].zero_point)
    a, b = (torch.randint(0, top + 1, (3, n), generator=generator).to(grids[0].dtype) for n in pairs)
    return (layer, torch.full_like(a, top), torch.full_like(b, top)) if extreme else (layer, a, b)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize(("bits", "pairs"), [(8, (5, 4)), (8, (96, 80)), (16, (20, 20)), (2, (3, 3))])
def test_sums_are_those_of_numpy(bits: int, pairs: tuple[int, int], extreme: bool) -> None:
    """By Python's integers; at 8 bits and 7,680 pairs they reach 2^37."""
    layer, a, b = filled(bits, pairs, extreme)
    left = (a.numpy().astype(object) - int(layer.left_zero_point))[:, :, None]
    products = (left * b.numpy().astype(object)[:, None, :]).reshape(len(a), -1)
    weight = layer.weight.numpy().astype(object) - layer.weight_zero_point.numpy().astype(object)[:, None]
    expected = products @ weight.T + layer.bias.numpy().astype(object)
    if extreme:
        beyond = np.abs(expected - layer.bias.numpy().astype(object)).max() > 2**31
        assert beyond == (bits > 2 and pairs != (5, 4))
    made = layer.multiplied(a, b)
    assert made.min() >= layer.input_bounds[0]
    assert made.max() <= layer.input_bounds[1]
    for reference in (True, False):
        layer.reference = reference
        sums = layer.accumulate(made)
        assert sums.dtype == torch.int64
        assert (sums.numpy() == expected).all()


def test_a_sum_that_float64_does_not_hold_is_not_taken() -> None:
    wide = IntegerBilinear.products(Quantize(0, 2**16 - 1), Quantize(-(2**15), 2**15 - 1))
    assert (wide.quant_min, wide.quant_max) == (-(2**16 - 1) * 2**15, (2**16 - 1) * (2**15 - 1))
    assert IntegerBilinear.fits(wide, 2**14)
    assert not IntegerBilinear.fits(wide, 2**15)


FORMS: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Any]]]] = {
    "layer": (lambda s, x, y: s.both(x, y), lambda: {"both": nn.Bilinear(6, 5, 7)}),
    "keywords": (lambda s, x, y: s.both(input2=y, input1=x), lambda: {"both": nn.Bilinear(6, 5, 7)}),
    "function": (lambda s, x, y: F.bilinear(x, y, s.w, s.b),
                 lambda: {"w": nn.Parameter(torch.randn(7, 6, 5) / 5), "b": nn.Parameter(torch.randn(7))}),
    "one tensor": (lambda s, x, y: s.both(x, x), lambda: {"both": nn.Bilinear(6, 6, 7)}),
    "norm": (lambda s, x, y: s.norm(s.both(x, y)), lambda: {"both": nn.Bilinear(6, 5, 7), "norm": lived(7)}),
    "twice": (lambda s, x, y: s.both(torch.relu(s.both(x, y)), y), lambda: {"both": nn.Bilinear(6, 5, 6)}),
}  # fmt: skip


def lived(channels: int) -> nn.Module:
    norm = nn.BatchNorm1d(channels)
    nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias)
    norm.running_mean, norm.running_var = torch.randn(channels), torch.rand(channels) + 0.5
    norm.weight.data[::3] *= -1
    return norm


@pytest.mark.parametrize("activation", [8, 16])
@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_training_and_integers_add_the_same(name: str, activation: int) -> None:
    run, parts = FORMS[name]
    read = {"bits": activation, "symmetric": False}
    prepared, x = ready(run, INT8 | {"activation": read, "input": read}, **parts())
    network = qat.lower(prepared)
    layers = [layer for layer in network.layers.values() if isinstance(layer, IntegerBilinear)]
    assert len(layers) == 1 + (name == "twice")
    assert not any(isinstance(layer, Outer | FloatConv) for layer in network.layers.values())
    expected, got = prepared(*x), network(*x)
    assert (got - expected).abs().max() <= 2e-6 * expected.abs().max() + 0.02 * (name == "twice")
    for layer in layers:  # training's bias is a multiple of the unit; of a layer called twice, the rest is kept
        real = layer.bias.double() * layer.input_scale.double() * layer.weight_scale.double()
        real = real if layer.remainder is None else real + layer.remainder.double()
        assert (layer.remainder is not None) == (name == "twice")
        owner = next((m for m in prepared.modules() if isinstance(m, nn.Bilinear)), None)
        if owner is not None and name != "norm":
            torch.testing.assert_close(owner.bias.double(), real, atol=1e-7, rtol=1e-6)


@torch.no_grad()
def test_against_float64_by_hand() -> None:
    """The whole layer: integers of both inputs and of the weight, times their scales."""
    prepared, (x, y) = ready(*FORMS["layer"][:1], INT8, **FORMS["layer"][1]())
    layer = prepared.get_submodule("both")
    scale = layer.weight.detach().double().flatten(1).abs().amax(1) / 127
    w = torch.round(layer.weight.detach().double() / scale[:, None, None]) * scale[:, None, None]

    def on_grid(t: Tensor) -> np.ndarray[Any, Any]:
        low, high = min(float(t.min()), 0.0), max(float(t.max()), 0.0)
        step = np.float64(np.float32((high - low) / 255))
        zero = np.round(-low / step)
        return (np.clip(np.round(t.double().numpy() / step) + zero, 0, 255) - zero) * step

    expected = np.einsum("ni,oij,nj->no", on_grid(x), w.numpy(), on_grid(y)) + layer.bias.double().numpy()
    assert np.abs(qat.lower(prepared)(x, y).double().numpy() - expected).max() <= 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize(
    "config",
    [
        INT8 | {"activation": {"bits": 8, "range": "dynamic"}, "input": {"bits": 8, "range": "dynamic"}},
        INT8 | {"weight": {"bits": 4, "granularity": "group", "group_size": 5}},
        INT8 | {"input": {"bits": None}, "activation": {"bits": None}},
        INT8 | {"activation": {"bits": 8, "format": "e4m3fn"}, "input": {"bits": 8, "format": "e4m3fn"}},
    ],
    ids=["dynamic", "groups", "weights alone", "float8"],
)
@torch.no_grad()
def test_what_has_no_integers_stays_a_product_of_real_numbers(config: dict[str, Any]) -> None:
    prepared, x = ready(*FORMS["layer"][:1], config, **FORMS["layer"][1]())
    network = qat.lower(prepared)
    assert type(network.layer("both.outer")) is Outer
    torch.testing.assert_close(network(*x), prepared(*x), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_files(tmp_path: Path) -> None:
    """Each layer's integers given training's: in the checkpoint, by ONNX Runtime, as a program of torch."""
    prepared, x = ready(
        lambda s, x, y: s.fc(torch.relu(s.norm(s.both(s.a(x), y)))), INT8, (24, 30), a=nn.Linear(24, 20),
        both=nn.Bilinear(20, 30, 24), norm=lived(24), fc=nn.Linear(24, 8),
    )  # fmt: skip
    network = qat.lower(prepared)
    paths = qat.export(network, tmp_path, tuple(t[:3] for t in x), formats=["int8", "onnx", "pt2"])
    for pair, parity in measure(prepared, network, paths, x, batch_size=100).items():
        layers = {layer.name: layer for layer in parity.layers}
        assert layers["both"].equal_share >= 0.999, pair
        assert layers["both"].max_steps <= 1
    loaded = qat.load(paths["int8"])
    assert isinstance(loaded.layer("both"), IntegerBilinear)
    made = network.run(*x)
    assert all(torch.equal(made[name], tensor) for name, tensor in loaded.run(*x).items())
    for run in (OnnxNetwork(paths["onnx"]), open_pt2(paths["pt2"], "generic")):
        assert (run(*x) - network(*x)).abs().mean() <= 1e-4
    program = torch.export.export(network, x, dynamic_shapes=(({0: torch.export.Dim.AUTO},) * 2,))
    torch.testing.assert_close(program.module()(*(t[:9] for t in x)), network(*(t[:9] for t in x)))


def test_a_target_that_multiplies_it_in_float_says_so() -> None:
    run, parts = FORMS["layer"]
    for target, reasons in (("generic", []), ("onnxruntime_x86", ["both"]), ("openvino", ["both"])):
        weight = {"bits": 7, "granularity": "channel"}
        prepared, _ = ready(run, INT8 | {"weight": weight, "target": target}, **parts())
        assert [row["name"] for row in float_islands(prepared)] == reasons
