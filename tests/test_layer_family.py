"""Convolutions of three dimensions, transposed ones, padding modes, look-ups, bilinear layers: from float to the files.

Every network goes the whole way: prepared, calibrated, biases corrected and rounded, lowered, written as an int8
checkpoint and as ONNX, and read back. What each integer layer makes of training's integers is compared to training's.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.export.onnxruntime import OnnxNetwork
from qat.export.parity import ParityLimits, measure
from qat.fake_quant import Mode
from qat.fold import fold
from qat.layers import SWAPS, QuantizedLayer
from qat.numerics.granularity import swap_channels
from qat.ptq import PTQConfig, finalize
from qat.runtime import FloatConv, IntegerConv, IntegerNetwork
from qat.runtime import operations as ops
from qat.runtime.accumulate import reference_conv_transpose
from qat.runtime.stored import ProductConv, TableConv
from qat.scheme import Granularity, TensorScheme

INTEGER: dict[str, dict[str, Any]] = {
    "int8": {"weight": {"bits": 8, "granularity": "channel"}, "activation": {"bits": 8}, "input": {"bits": 8}},
    "affine": {
        "weight": {"bits": 8, "symmetric": False, "granularity": "channel"},
        "activation": {"bits": 8, "symmetric": False},
        "input": {"bits": 8, "symmetric": False},
    },
    "w4a4_tensor": {
        "weight": {"bits": 4},
        "activation": {"bits": 4, "symmetric": False},
        "input": {"bits": 8, "symmetric": False},
    },
}
A8: dict[str, Any] = {"activation": {"bits": 8}, "input": {"bits": 8}}
STORED: dict[str, dict[str, Any]] = {  # weights that no integer kernel has
    "group": A8 | {"weight": {"bits": 4, "granularity": "group", "group_size": 4, "allow_padding": True}},
    "group_affine": {
        "weight": {"bits": 4, "granularity": "group", "group_size": 4, "allow_padding": True, "symmetric": False}
    },
    "weight_only": {"weight": {"bits": 4, "symmetric": False, "granularity": "channel"}},
    "block": A8 | {"weight": {"bits": 6, "granularity": "block", "block_size": [2, 3]}},
    "other_axis": A8 | {"weight": {"bits": 8, "granularity": "channel", "axis": 1}},
    "float8": A8 | {"weight": {"bits": 8, "format": "e4m3fn", "granularity": "channel"}},
    "codebook": A8 | {"weight": {"bits": 4, "format": "codebook", "granularity": "channel", "range": "fixed"}},
    "product": A8 | {
        "weight": {"bits": 5, "format": "product", "granularity": "group", "group_size": 2, "allow_padding": True,
                   "gradient": "ste", "range": "fixed"}
    },
}  # fmt: skip
W16A16 = {"weight": {"bits": 16, "granularity": "channel"}, "activation": {"bits": 16}, "input": {"bits": 16}}


class Net(nn.Module):
    """Submodules by name and a forward given as a function of them; `y` is a second input."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.compute = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class Case(NamedTuple):
    """How a network is made, its inputs, and the type of layer that each of its layers becomes in integers."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    layers: dict[str, type]


def real(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda samples: (torch.randn(samples, *shape) + 0.2,)


def case(layers: list[nn.Module], shape: tuple[int, ...], kinds: dict[str, type]) -> Case:
    return Case(lambda: nn.Sequential(*copy.deepcopy(layers)), real(*shape), kinds)


CONVOLUTIONS: dict[str, Case] = {
    "conv3d": case(
        [nn.Conv3d(2, 6, (3, 2, 1), stride=(2, 1, 1), padding=(1, 0, 2), dilation=(1, 2, 1), groups=2, bias=False),
         nn.BatchNorm3d(6), nn.ReLU(), nn.Conv3d(6, 4, 3, padding="same", groups=2), nn.ReLU(), nn.Conv3d(4, 3, 1)],
        (2, 5, 5, 4), {"0": IntegerConv, "3": IntegerConv, "5": IntegerConv},
    ),
    "conv3d_affine_false": case(
        [nn.Conv3d(2, 4, 2, padding="valid"), nn.BatchNorm3d(4, affine=False), nn.ReLU(),
         nn.Conv3d(4, 3, 2, padding=1)], (2, 4, 4, 4), {"0": IntegerConv, "3": IntegerConv},
    ),
    "transposed_1d": case(
        [nn.ConvTranspose1d(4, 6, 4, stride=3, padding=2, output_padding=1, groups=2), nn.BatchNorm1d(6), nn.ReLU(),
         nn.ConvTranspose1d(6, 4, 3, dilation=2, bias=False)], (4, 7), {"0": IntegerConv, "3": IntegerConv},
    ),
    "transposed_2d": case(
        [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
         nn.ConvTranspose2d(4, 6, (3, 4), stride=(2, 1), padding=(1, 1), output_padding=(1, 0), bias=False),
         nn.BatchNorm2d(6, affine=False), nn.ReLU(),
         nn.ConvTranspose2d(6, 3, 3, stride=2, padding=1, output_padding=1, dilation=(1, 2), groups=3)],
        (2, 6, 6), {"0": IntegerConv, "3": IntegerConv, "6": IntegerConv},
    ),
    "transposed_2d_depthwise": case(
        [nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 1, padding=0)],
        (4, 3, 3), {"0": IntegerConv, "2": IntegerConv},
    ),
    "transposed_2d_cropped": case(  # padding beyond the kernel's reach cuts the input
        [nn.ConvTranspose2d(3, 4, 2, stride=2, padding=2), nn.ReLU(), nn.Conv2d(4, 2, 1)], (3, 4, 4),
        {"0": IntegerConv, "2": IntegerConv},
    ),
    "transposed_3d": case(
        [nn.ConvTranspose3d(4, 4, (2, 3, 1), stride=(2, 1, 2), padding=(0, 1, 0), output_padding=(1, 0, 1), groups=2),
         nn.BatchNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 3, 2)], (4, 3, 3, 2), {"0": IntegerConv, "3": IntegerConv},
    ),
    "twice": Case(
        lambda: Net(lambda s, x: s.up(torch.relu(s.up(x))), up=nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1)),
        real(3, 3, 3), {"up": IntegerConv, "up_2": IntegerConv},
    ),
    **{
        f"{mode}_{dims}d": case(
            [(conv := [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1])(2, 4, 3, padding=2, padding_mode=mode), nn.ReLU(),
             conv(4, 4, 2, padding="same", padding_mode=mode, groups=2), nn.ReLU(),
             conv(4, 3, 3, padding=[*[0] * (dims - 1), 1], stride=2, padding_mode=mode), nn.ReLU(),
             conv(3, 2, 1, padding="valid", padding_mode=mode)], (2, *[5] * dims),
            {"0.padded": ops.Pad, "0": IntegerConv, "2.padded": ops.Pad, "2": IntegerConv, "4.padded": ops.Pad},
        )
        for mode in ("reflect", "replicate", "circular") for dims in (1, 2, 3)
    },
    "pad_functions": Case(
        lambda: Net(
            lambda s, x: s.c(F.pad(F.pad(F.pad(s.a(x), (1, 2, 0, 1), "reflect"), (1, 0, 0, 2), mode="replicate"),
                                   (0, 2, 1, 0), mode="circular")), a=nn.Conv2d(2, 4, 3), c=nn.Conv2d(4, 2, 2),
        ), real(2, 5, 5), {"a": IntegerConv, "pad": ops.Pad, "pad_2": ops.Pad, "pad_3": ops.Pad, "c": IntegerConv},
    ),
}  # fmt: skip
CASES = CONVOLUTIONS
SETTINGS = [
    *[(name, scheme) for name in CASES for scheme in ("int8", "affine")],
    *[(name, "w4a4_tensor") for name in ("conv3d", "transposed_2d", "circular_2d")],
    *[(name, scheme) for name in ("conv3d", "transposed_1d", "transposed_2d", "transposed_3d", "reflect_2d")
      for scheme in ("group", "weight_only")],
    *[("transposed_2d", scheme) for scheme in STORED],
]  # fmt: skip
SETTINGS = list(dict.fromkeys(SETTINGS))


def build(name: str, config: dict[str, Any], samples: int = 96) -> tuple[nn.Module, fx.GraphModule, tuple[Tensor, ...]]:
    """(float network with lived-in BatchNorm, the same prepared and through the PTQ step, inputs)."""
    torch.manual_seed(1)
    net = CASES[name].make()
    x = CASES[name].inputs(samples)
    for norm in [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.3, 1.5), nn.init.normal_(norm.bias, std=0.5)
            norm.weight.data[::3] *= -1
    for _ in range(20):
        net(*x)
    net = net.eval()
    prepared = qat.prepare(copy.deepcopy(net), qat.QuantConfig.from_dict(config), tuple(t[:2] for t in x))
    finalize(prepared, [x], PTQConfig(bias_correction=True), trained=False)
    return net, prepared, x


@torch.no_grad()
def exact(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.parametrize(("name", "scheme"), SETTINGS, ids=lambda value: value)
def test_what_trains_is_what_runs(name: str, scheme: str, tmp_path: Path) -> None:
    net, prepared, x = build(name, (INTEGER | STORED)[scheme])
    network = qat.lower(prepared)
    if scheme in INTEGER:
        for layer, kind in CASES[name].layers.items():
            assert type(network.layer(layer)) is kind
    with torch.no_grad():
        expected, float_output = prepared(*x), net(*x)
        error, quantization = network(*x) - expected, expected - float_output
    assert expected.std() > 1e-3
    assert 0 < quantization.square().mean() < 0.5 * float_output.square().mean()
    assert error.square().mean() <= 1e-2 * quantization.square().mean()  # a step near a tie
    paths = qat.export(network, tmp_path, tuple(t[:3] for t in x))
    checkpoint = qat.load(paths["int8"])
    assert exact(checkpoint(*x), network(*x))
    pairs = measure(prepared, network, checkpoint, paths["onnx"], x, batch_size=40)
    for pair, parity in pairs.items():
        share = 0.995 if name == "twice" else 0.999  # a bias that is added at several scales is rounded to none
        parity.check(pair, ParityLimits(agreement=0.98, equal_share=share))
        assert "activation" not in (INTEGER | STORED)[scheme] or parity.layers
    checkpoint.set_reference()
    if scheme in INTEGER:
        assert exact(checkpoint(*x), network(*x))
    onnx = OnnxNetwork(paths["onnx"])
    assert (onnx(*x) - network(*x)).square().mean() <= 1e-2 * quantization.square().mean()
    assert onnx(*(t[:1] for t in x)).shape == expected[:1].shape


@pytest.mark.parametrize("name", CASES)
def test_sixteen_bits_are_nearly_float(name: str) -> None:
    net, prepared, x = build(name, W16A16)
    with torch.no_grad():
        expected = net(*x)
        for got in (prepared(*x), qat.lower(prepared)(*x)):
            assert 0 < (got - expected).norm() <= 1e-3 * expected.norm()


# ---- what a channel of a transposed convolution is -------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_scale_per_channel_is_one_per_output_of_a_transposed_convolution(groups: int) -> None:
    """Making one output channel a hundred times larger changes its scale, and no other's."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 8, 3, groups=groups, bias=False)
    x, channel, per_group = torch.randn(2, 4, 5, 5), 5, 8 // groups
    scheme = TensorScheme(bits=8, granularity=Granularity.channel, range="dynamic")
    larger = copy.deepcopy(layer)
    rows = 4 // groups
    group, column = divmod(channel, per_group)
    larger.weight.data[group * rows : (group + 1) * rows, column] *= 100
    changed = (layer(x) != larger(x)).any(dim=3).any(dim=2).any(dim=0)
    assert changed.tolist() == [i == channel for i in range(8)]
    quantized = [SWAPS[nn.ConvTranspose2d].from_float(m, scheme, "up") for m in (layer, larger)]
    scales = [q.weight_quantizer.scales(q.outputs_first()) for q in quantized]
    assert scales[0].shape == (8,)
    ratio = scales[1] / scales[0]
    torch.testing.assert_close(ratio, torch.where(changed, 100.0, 1.0))
    for q in quantized:
        q.weight_quantizer.mode = Mode.frozen
    torch.testing.assert_close(quantized[1](x)[:, ~changed], quantized[0](x)[:, ~changed])


@pytest.mark.parametrize(("kind", "shape"), [(nn.ConvTranspose1d, (4, 5)), (nn.ConvTranspose3d, (4, 3, 3, 2))])
def test_a_transposed_convolution_is_torchs_by_its_quantized_weight(kind: type, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = kind(4, 6, 3, stride=2, padding=1, groups=2)
    quantized = SWAPS[kind].from_float(
        layer, TensorScheme(bits=4, granularity=Granularity.channel, range="dynamic"), ""
    )
    x, size = torch.randn(2, *shape), [2 * n for n in shape[1:]]
    assert exact(quantized(x, output_size=size), layer(x, output_size=size))
    quantized.weight_quantizer.mode = Mode.quantize
    plain = copy.deepcopy(layer)
    weights = []
    for group in layer.weight.detach().chunk(2):  # [in / groups, out / groups, *kernel]
        scale = group.abs().amax(dim=[0, *range(2, group.dim())], keepdim=True) / 7
        weights.append((group / scale).round() * scale)
    plain.weight = nn.Parameter(torch.cat(weights))
    torch.testing.assert_close(quantized(x, output_size=size), plain(x, output_size=size))
    quantized(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)  # nothing is clipped: straight through


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_reference_of_a_transposed_convolution(dims: int) -> None:
    """Against torch's own in float64, with every option, zero points on both sides and uneven sizes."""
    generator = torch.Generator().manual_seed(dims)
    x = torch.randint(0, 256, (2, 4, *range(3, 3 + dims)), generator=generator).to(torch.uint8)
    w = torch.randint(-128, 128, (6, 2, *range(2, 2 + dims)), generator=generator).to(torch.int8)
    zero = torch.randint(-20, 20, (6,), generator=generator, dtype=torch.int32)
    options = {"stride": [2, 3, 1][:dims], "dilation": [1, 2, 2][:dims], "groups": 2}
    padding, extra = [1, 2, 0][:dims], [1, 2, 1][:dims]
    got = reference_conv_transpose(
        x, w, 37, zero, options["stride"], [[p, p] for p in padding], options["dilation"], 2, extra
    )
    centred = swap_channels(w.double() - zero.double().reshape(-1, *[1] * (dims + 1)), 2)
    torchs = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d][dims - 1]
    expected = torchs(x.double() - 37, centred, padding=padding, output_padding=extra, **options)
    assert got.dtype == torch.int32
    assert torch.equal(got.double(), expected)


def test_batch_norm_folds_along_the_outputs_of_a_transposed_convolution() -> None:
    net, prepared, _ = build("transposed_1d", INTEGER["int8"])
    layer, norm = prepared.get_submodule("0"), prepared.get_submodule("1")
    assert isinstance(layer, QuantizedLayer)
    folded, plain = fold(layer, norm), fold(layer, None)
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(folded.scale, plain.scale * gain.double().abs())
    assert torch.equal(folded.q[0], -plain.q[0])  # the gain of channel 0 is negative
    assert torch.equal(folded.q[1], plain.q[1])
    assert net[0].weight.shape == (4, 3, 4)
    assert folded.q.shape == (6, 2, 4)


def test_output_size_cannot_be_lowered() -> None:
    net = Net(lambda s, x: s.up(x, output_size=[8, 8]), up=nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1))
    x = torch.randn(4, 2, 4, 4)
    prepared = qat.prepare(net.eval(), qat.preset("int8"), x)
    qat.calibrate(prepared, [x])
    assert prepared(x).shape == (4, 2, 8, 8)
    with pytest.raises(ValueError, match=r"layer 'up' cannot be lowered: .*output_size.*output_padding="):
        qat.lower(prepared)


@pytest.mark.parametrize("name", ["conv3d", "transposed_2d", "circular_2d"])
def test_layers_that_stay_float(name: str, tmp_path: Path) -> None:
    net, prepared, x = build(name, {"weight": {"bits": None}})
    network = qat.lower(prepared)
    kinds = {type(layer) for layer in network.layers.values()}
    assert FloatConv in kinds
    assert IntegerConv not in kinds
    with torch.no_grad():
        torch.testing.assert_close(network(*x), net(*x), atol=1e-5, rtol=1e-4)
    path = qat.export(network, tmp_path, x, ["onnx"])["onnx"]
    torch.testing.assert_close(OnnxNetwork(path)(*x), network(*x), atol=1e-5, rtol=1e-4)


def test_the_stored_forms_are_the_expected_ones() -> None:
    kinds = {"group": FloatConv, "block": TableConv, "other_axis": TableConv, "float8": TableConv,
             "codebook": TableConv, "product": ProductConv}  # fmt: skip
    for scheme, kind in kinds.items():
        network: IntegerNetwork = qat.lower(build("transposed_2d", STORED[scheme])[1])
        assert type(network.layer("3")) is kind, scheme
