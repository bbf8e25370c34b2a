"""What quantizers see, against numpy and against quantization in plain torch."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.analysis import seen
from qat.analysis.layers import layer_table
from qat.analysis.seen import MULTIPLES, Seen
from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.modes import quantizers
from qat.ptq import PTQConfig, finalize

NET = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
    nn.Linear(16 * 36, 10),
)  # fmt: skip
AFFINE = {
    "weight": {"bits": 8, "symmetric": False, "granularity": "channel"},
    "activation": {"bits": 4, "symmetric": False},
    "input": {"bits": 8, "symmetric": False},
}


def prepared(config: qat.QuantConfig) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(40, 3, 8, 8)
    net = qat.prepare(copy.deepcopy(NET).eval(), config, x[:2])
    finalize(net, [x], PTQConfig(adaptive_rounding_steps=2), trained=False)
    return net, x


@pytest.fixture(scope="module")
def affine() -> tuple[nn.Module, Tensor, dict[str, Seen]]:
    net, x = prepared(qat.QuantConfig.from_dict(AFFINE))
    return net, x, seen.see(net, x.split(16))


def inputs_of(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What each quantizer of an activation is called with, in one batch."""
    found: dict[str, Tensor] = {}
    handles = [
        quantizer.register_forward_pre_hook(lambda _, args, name=name: found.__setitem__(name, args[0]))
        for name, quantizer in quantizers(net)
        if quantizer.shape is None
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return found


def test_noise_is_that_of_all_values(affine: tuple[nn.Module, Tensor, dict[str, Seen]]) -> None:
    net, x, found = affine
    given = inputs_of(net, x)
    assert set(found) == {name for name, _ in quantizers(net)}
    for name, quantizer in quantizers(net):
        if quantizer.shape is not None:
            continue
        value = given[name].relu() if quantizer.relu else given[name]
        scale, zero_point = (float(t) for t in quantizer.qparams())
        q = (value / scale).round().add(zero_point).clamp(quantizer.quant_min, quantizer.quant_max)
        noise = ((q - zero_point) * scale - value).double().square().sum()
        expected = 10 * math.log10(float(value.double().square().sum() / noise))
        assert found[name].sqnr_db == pytest.approx(expected, abs=1e-3), name
        assert found[name].count == value.numel()
    for row in layer_table(net):
        if row["kind"] != "edge":
            assert found[row["quantizer"]].sqnr_db == pytest.approx(row["sqnr_db"], abs=1e-3)


def test_histograms_are_those_of_numpy(affine: tuple[nn.Module, Tensor, dict[str, Seen]]) -> None:
    net, x, found = affine
    name = next(name for name, q in quantizers(net) if q.shape is None and not q.relu)  # the network's input
    shown = seen.histogram(found[name])
    values = inputs_of(net, x)[name].flatten().numpy()
    assert shown["values"] == len(values)  # fewer than are kept: all of them
    counts, edges = np.histogram(values, len(shown["counts"]), (shown["low"], shown["high"]))
    assert np.abs(counts - shown["counts"]).sum() <= 4  # values at the edge of a bin, in float32
    assert sum(shown["counts"]) + shown["below"] + shown["above"] == len(values)
    assert (shown["unit"], edges[0]) == ("value", pytest.approx(min(values.min(), shown["clip"][0])))
    quantizer = dict(quantizers(net))[name]
    scale, zero_point = (float(t) for t in quantizer.qparams())
    ends = [(end - zero_point) * scale for end in (quantizer.quant_min, quantizer.quant_max)]
    assert shown["clip"] == pytest.approx(ends)


def test_weights_with_several_scales_are_shown_in_levels(affine: tuple[nn.Module, Tensor, dict[str, Seen]]) -> None:
    net, _, found = affine
    layer = net.get_submodule("0")
    shown = seen.histogram(found["0.weight_quantizer"])
    scale, zero_point = (t.reshape(-1, 1, 1, 1) for t in layer.weight_quantizer.qparams(layer.weight))
    levels = (layer.weight / scale + zero_point).detach()
    assert shown["unit"] == "level"
    assert shown["clip"] == [0.0, 255.0]
    assert sum(shown["counts"]) == levels.numel()
    assert shown["low"] == pytest.approx(min(0.0, float(levels.min())))
    counts, _ = np.histogram(levels.numpy(), len(shown["counts"]), (shown["low"], shown["high"]))
    assert np.abs(counts - shown["counts"]).sum() <= 4


def test_clipping_against_rounding(affine: tuple[nn.Module, Tensor, dict[str, Seen]]) -> None:
    net, _, found = affine
    for name in found:
        curve = seen.error_curve(found[name])
        assert curve is not None
        clipping, rounding = np.array(curve["clipping"]), np.array(curve["rounding"])
        assert (np.diff(clipping) <= 1e-12).all(), name  # a wider range clips less
        assert curve["chosen"] == pytest.approx(clipping[32] + rounding[32])
        assert curve["best"] == pytest.approx((clipping + rounding).min())
        if len(found[name].values) <= seen.CURVE_VALUES:
            noise = 10 ** (-found[name].sqnr_db / 10)
            assert curve["chosen"] == pytest.approx(noise, rel=1e-3), name
    name = next(name for name, q in quantizers(net) if q.shape is None and q.relu)  # 4 bits, one scale
    quantizer, sample = dict(quantizers(net))[name], found[name]
    scale, zero_point = (float(t) for t in quantizer.qparams())
    picked = torch.linspace(0, len(sample.values) - 1, min(len(sample.values), seen.CURVE_VALUES)).long()
    values = sample.values[picked].double()
    for i in (8, 24, 40):  # half a step narrower, wider: quantized with another scale
        step = scale * MULTIPLES[i]
        stored = torch.fake_quantize_per_tensor_affine(
            values.float(), step, int(zero_point), int(quantizer.quant_min), int(quantizer.quant_max)
        )
        error = (stored - values).square().sum() / values.square().sum()
        curve = seen.error_curve(sample)
        assert curve["clipping"][i] + curve["rounding"][i] == pytest.approx(float(error), rel=1e-3)
        beyond = values > (quantizer.quant_max - zero_point) * step
        part = (stored - values)[beyond].square().sum() / values.square().sum()
        assert curve["clipping"][i] == pytest.approx(float(part), rel=1e-3, abs=1e-9)


def test_levels_and_clipped_values_are_counted() -> None:
    quantizer = FakeQuantize(qat.TensorScheme(bits=4, symmetric=True))
    quantizer.range.set(torch.tensor(0.5), torch.tensor(0.0))
    quantizer.mode = Mode.frozen
    x = torch.tensor([0.0, 0.5, 0.6, -1.0, 3.7, 3.76, 100.0, -4.2])  # the grid is -4 to 3.5
    sample = Seen(quantizer)
    sample.add(x, quantizer(x), 100, torch.Generator())
    assert seen.levels_used(sample) == (5, 16)  # 0, 0.5, -1, 3.5, -4
    assert seen.clipped_share(sample) == 2 / 8  # 3.7 and -4.2 would go to the ends anyway
    shown = seen.histogram(sample, bins=10)
    assert (shown["low"], shown["high"]) == pytest.approx((-4.2, 11.0))
    assert shown["above"] == 1  # 100 is out of the picture
    assert shown["levels"] == [q / 2 for q in range(-8, 8)]


OTHERS: dict[str, dict[str, Any]] = {
    "groups": {"weight": {"bits": 4, "granularity": "group", "group_size": 9}, "activation": {"bits": 8}},
    "dorefa": {"weight": {"bits": 3, "range": "dorefa"}, "activation": {"bits": 3, "range": "dorefa"}},
    "adaptive": {"weight": {"bits": 4, "rounding": "adaptive", "range": "fixed"}, "activation": {"bits": 8}},
    "16 bits": {"weight": {"bits": 16}, "activation": {"bits": 16}},
}
PRESETS = ("int8", "w8a8_dynamic", "fp8", "mxfp4", "nvfp4", "apot4", "binary", "ternary", "codebook4")


@pytest.mark.parametrize("name", [*PRESETS, *OTHERS])
def test_every_kind_of_quantizer_is_described(name: str) -> None:
    net, x = prepared(qat.QuantConfig.from_dict(OTHERS[name]) if name in OTHERS else qat.preset(name))
    found = seen.see(net, [x])
    assert set(found) == {name for name, _ in quantizers(net)}
    for name, sample in found.items():
        told: dict[str, Any] = seen.describe(sample)
        quantizer = sample.quantizer
        assert sum(told["histogram"]["counts"]) > 0.9 * told["histogram"]["values"], name
        stored = sample.stored.double()
        noise = float((stored - sample.values).square().sum() / sample.values.double().square().sum())
        if len(sample.values) == sample.count:
            assert told["sqnr_db"] == pytest.approx(-10 * math.log10(noise), abs=1e-3), name
        if quantizer.fitted is not None:
            assert (told["error_curve"], told["clipped"], told["histogram"]["clip"]) == (None, None, None)
        elif len(sample.values) <= seen.CURVE_VALUES and not quantizer.adapts:
            assert told["error_curve"]["chosen"] == pytest.approx(noise, rel=2e-3), name
        if told["levels_used"] is not None:
            assert 1 < told["levels_used"] <= told["levels_total"] <= 2 ** (quantizer.scheme.bits or 0), name
