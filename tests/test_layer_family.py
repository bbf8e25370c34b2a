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
from qat.encoding import encode
from qat.export.onnxruntime import OnnxNetwork
from qat.export.parity import ParityLimits, measure
from qat.fold import fold
from qat.layers import SWAPS, QuantizedLayer
from qat.mode import Mode
from qat.numerics.granularity import swap_channels
from qat.ptq import PTQConfig, finalize, learn_rounding
from qat.runtime import FloatConv, IntegerConv, IntegerNetwork
from qat.runtime import operations as ops
from qat.runtime.accumulate import reference_conv_transpose
from qat.runtime.lookup import LookUp, ProductLookUp, TableLookUp, pool
from qat.runtime.outer import IntegerBilinear
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
SCHEME = TensorScheme(bits=8, granularity=Granularity.channel, range="dynamic")
W16A16 = {"weight": {"bits": 16, "granularity": "channel"}, "activation": {"bits": 16}, "input": {"bits": 16}}


class Net(nn.Module):
    """Submodules by name and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.compute = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class Pair(Net):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.compute(self, x, y)


class Case(NamedTuple):
    """How a network is made, its inputs, and the type of layer that each of its layers becomes in integers."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    layers: dict[str, type]


def real(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda samples: (torch.randn(samples, *shape) + 0.2,)


def case(layers: list[nn.Module], shape: tuple[int, ...], kinds: dict[str, type]) -> Case:
    return Case(lambda: nn.Sequential(*copy.deepcopy(layers)), real(*shape), kinds)


def indices(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda samples: (torch.randint(11, (samples, *shape)),)


def ragged(last: bool) -> Callable[[int], tuple[Tensor, ...]]:
    """Bags of 0 to 4 indices, one behind the other, and where they start (and the last ends)."""

    def make(samples: int) -> tuple[Tensor, ...]:
        ends = (torch.arange(samples) * 3 % 5).cumsum(0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
        return torch.randint(11, (int(ends[-1]) + 1,)), offsets if last else offsets[:-1]

    return make


def bag(mode: str, inputs: Callable[[int], tuple[Tensor, ...]] | None = None, **options: Any) -> Case:
    """Bags, then a linear layer."""
    bags = nn.EmbeddingBag(11, 6, mode=mode, **options)
    layers, kinds = {"bag": bags, "fc": nn.Linear(6, 5)}, {"bag": LookUp, "fc": IntegerConv}
    if inputs is None:
        return Case(lambda: Net(lambda s, x: s.fc(s.bag(x)), **copy.deepcopy(layers)), indices(4), kinds)
    return Case(lambda: Pair(lambda s, x, y: s.fc(s.bag(x, offsets=y)), **copy.deepcopy(layers)), inputs, kinds)


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
LOOK_UPS: dict[str, Case] = {
    "embedding": Case(
        lambda: Net(lambda s, x: s.fc(s.rows(x[:, 1:])), rows=nn.Embedding(11, 6, padding_idx=-2), fc=nn.Linear(6, 4)),
        indices(5), {"rows": LookUp, "fc": IntegerConv},
    ),
    "embedding_alone": case([nn.Embedding(11, 6)], (), {"0": LookUp})._replace(inputs=indices(5)),
    "two_embeddings": Case(
        lambda: Pair(lambda s, x, y: s.fc(torch.relu(s.a(x) + s.b(y))), a=nn.Embedding(11, 6), b=nn.Embedding(7, 6),
                     fc=nn.Linear(6, 4)),
        lambda samples: (torch.randint(11, (samples, 3)), torch.randint(7, (samples, 3), dtype=torch.int32)),
        {"a": LookUp, "b": LookUp, "add": ops.Add, "fc": IntegerConv},
    ),
    "embedding_twice": Case(
        lambda: Net(lambda s, x: s.a(s.rows(x[:, :2])) + s.b(s.rows(x[:, 2:])), rows=nn.Embedding(11, 6),
                    a=nn.Linear(6, 4), b=nn.Linear(6, 4)), indices(4), {"rows": LookUp, "rows_2": LookUp},
    ),
    **{f"bag_{mode}": bag(mode) for mode in ("sum", "mean", "max")},
    **{f"bag_{mode}_padded": bag(mode, padding_idx=3) for mode in ("sum", "mean", "max")},
    **{f"bag_{mode}_offsets": bag(mode, ragged(last=False)) for mode in ("sum", "mean", "max")},
    **{f"bag_{mode}_offsets_padded": bag(mode, ragged(last=True), padding_idx=3, include_last_offset=True)
       for mode in ("sum", "mean", "max")},
    "bag_weighted": Case(
        lambda: Pair(lambda s, x, y: s.fc(s.bag(x, per_sample_weights=y)), bag=nn.EmbeddingBag(11, 6, mode="sum"),
                     fc=nn.Linear(6, 5)),
        lambda samples: (torch.randint(11, (samples, 4)), torch.rand(samples, 4)), {"bag": LookUp, "fc": IntegerConv},
    ),
    "bag_batch_norm": Case(
        lambda: Net(lambda s, x: s.fc(torch.relu(s.norm(s.bag(x)))), bag=nn.EmbeddingBag(11, 6), norm=nn.BatchNorm1d(6),
                    fc=nn.Linear(6, 5)), indices(4), {"bag": LookUp, "bag_2": ops.Affine, "fc": IntegerConv},
    ),
}  # fmt: skip
BILINEAR: dict[str, Case] = {
    "bilinear": Case(
        lambda: Pair(lambda s, x, y: s.fc(torch.relu(s.norm(s.both(s.a(x), y)))), a=nn.Linear(4, 5),
                     both=nn.Bilinear(5, 3, 6), norm=nn.BatchNorm1d(6), fc=nn.Linear(6, 4)),
        lambda samples: (torch.randn(samples, 4), torch.randn(samples, 3) + 0.3),
        {"both": IntegerBilinear, "fc": IntegerConv},
    ),
    "bilinear_sequence": Case(
        lambda: Pair(lambda s, x, y: s.fc(s.both(input2=y, input1=x)), both=nn.Bilinear(4, 3, 6, bias=False),
                     fc=nn.Linear(6, 4)),
        lambda samples: (torch.randn(samples, 5, 4), torch.randn(samples, 5, 3)),
        {"both": IntegerBilinear, "fc": IntegerConv},
    ),
    "bilinear_twice": Case(
        lambda: Pair(lambda s, x, y: s.both(torch.relu(s.both(x, y)), y), both=nn.Bilinear(4, 3, 4)),
        lambda samples: (torch.randn(samples, 4), torch.randn(samples, 3)),
        {"both": IntegerBilinear, "both_2": IntegerBilinear},
    ),
}  # fmt: skip
CASES = CONVOLUTIONS | LOOK_UPS | BILINEAR
SETTINGS = [
    *[(name, scheme) for name in CASES for scheme in ("int8", "affine")],
    *[(name, "w4a4_tensor") for name in ("conv3d", "transposed_2d", "circular_2d")],
    *[(name, scheme) for name in ("conv3d", "transposed_1d", "transposed_2d", "transposed_3d", "reflect_2d")
      for scheme in ("group", "weight_only")],
    *[(name, scheme) for name in ("transposed_2d", "embedding", "bilinear") for scheme in STORED],
    *[(name, scheme) for name in ("bag_sum", "bag_mean_offsets_padded") for scheme in ("group", "codebook")],
    *[(name, "w4a4_tensor") for name in ("embedding", "bag_max_padded", "bilinear")],
]  # fmt: skip
SETTINGS = list(dict.fromkeys(SETTINGS))


def build(name: str, config: dict[str, Any], steps: int = 10) -> tuple[nn.Module, fx.GraphModule, tuple[Tensor, ...]]:
    """(float network with lived-in BatchNorm, the same prepared and through the PTQ step, inputs)."""
    torch.manual_seed(1)
    net = CASES[name].make()
    x = CASES[name].inputs(96)
    for norm in [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.3, 1.5), nn.init.normal_(norm.bias, std=0.5)
            norm.weight.data[::3] *= -1
    for _ in range(20):
        net(*x)
    net = net.eval()
    prepared = qat.prepare(copy.deepcopy(net), qat.QuantConfig.from_dict(config), CASES[name].inputs(2))
    finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=steps), trained=False)
    return net, prepared, x


@torch.no_grad()
def exact(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got, expected)


@pytest.mark.sampled(4)
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
    paths = qat.export(network, tmp_path, CASES[name].inputs(3))
    checkpoint = qat.load(paths["int8"])
    expected_integers = network.run(*x)  # by its layers: the fast path scales real outputs in another order
    assert all(exact(made, expected_integers[key]) for key, made in checkpoint.run(*x).items())
    pairs = measure(prepared, network, paths, x, batch_size=40)
    for pair, parity in pairs.items():
        share = 0.995 if name == "twice" else 0.999  # a bias that is added at several scales is rounded to none
        parity.check(pair, ParityLimits(agreement=0.9, equal_share=share))
        assert "activation" not in (INTEGER | STORED)[scheme] or parity.layers or name == "embedding_alone"
    checkpoint.set_reference()
    if scheme in INTEGER:
        assert all(exact(made, expected_integers[key]) for key, made in checkpoint.run(*x).items())
    onnx = OnnxNetwork(paths["onnx"])
    assert (onnx(*x) - network(*x)).square().mean() <= 1e-2 * quantization.square().mean()
    assert onnx(*CASES[name].inputs(1)).shape == expected[:1].shape


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
    larger = copy.deepcopy(layer)
    rows = 4 // groups
    group, column = divmod(channel, per_group)
    larger.weight.data[group * rows : (group + 1) * rows, column] *= 100
    changed = (layer(x) != larger(x)).any(dim=3).any(dim=2).any(dim=0)
    assert changed.tolist() == [i == channel for i in range(8)]
    quantized = [SWAPS[nn.ConvTranspose2d].from_float(m, SCHEME, "up") for m in (layer, larger)]
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


@pytest.mark.parametrize("name", ["conv3d", "transposed_2d", "circular_2d", "embedding", "bag_mean_padded", "bilinear"])
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
    tables = ("block", "other_axis", "float8", "codebook")
    for scheme in ("group", *tables, "product"):
        kinds = (TableConv, TableLookUp) if scheme in tables else (FloatConv, LookUp)
        kinds = (ProductConv, ProductLookUp) if scheme == "product" else kinds
        for name, layer, kind in zip(("transposed_2d", "embedding"), ("3", "rows"), kinds, strict=True):
            network: IntegerNetwork = qat.lower(build(name, STORED[scheme])[1])
            assert type(network.layer(layer)) is kind, (scheme, name)


# ---- look-ups and bilinear layers ------------------------------------------------------------------------------------


def edges(name: str) -> set[str]:
    config = {"weight": {"bits": 8}, "activation": {"bits": 8}, "input": {"bits": 8}}
    prepared = build(name, config)[1]
    return set(prepared.get_submodule("quantizers")._modules) if hasattr(prepared, "quantizers") else set()


def test_indices_get_no_quantizer_and_real_inputs_do() -> None:
    assert edges("embedding") == {"rows"}
    assert edges("embedding_alone") == set()
    assert edges("two_embeddings") == {"a", "b", "add"}
    assert edges("bag_sum_offsets") == {"bag"}
    assert edges("bag_weighted") == {"y", "bag"}
    assert edges("bilinear_sequence") == {"x", "y", "both"}
    assert edges("bilinear") == {"x", "a", "y", "both"}


def test_a_channel_of_a_table_is_a_row() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(7, 4)
    layer.weight.data[3] *= 100
    quantized = SWAPS[nn.Embedding].from_float(layer, SCHEME, "rows")
    quantized.weight_quantizer.mode = Mode.quantize
    scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    index = torch.tensor([[3, 0], [6, 3]])
    torch.testing.assert_close(quantized(index), ((layer.weight / scale).round() * scale)[index])
    quantized(index).sum().backward()
    assert layer.weight.grad.sum(dim=1).tolist() == [4, 0, 0, 8, 0, 0, 4]


def test_only_what_is_looked_up_is_dequantized() -> None:
    """The table is stored in 4 bits, and in the file ONNX Runtime gathers codes by int64 indices."""
    network = qat.lower(build("embedding", STORED["group"])[1])
    layer = network.layer("rows")
    assert layer.weight.dtype == torch.int8
    assert layer.weight.abs().max() <= 8
    assert layer.weight_scale.shape == (11, 2)
    layer.weight_scale[4:], layer.output = torch.nan, None
    index = torch.tensor([0, 3, 1])
    assert layer(index).isfinite().all()
    assert layer(torch.tensor([4])).isnan().any()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_pooling_is_torchs(mode: str) -> None:
    """Against `embedding_bag`, with empty bags, bags of nothing but padding, and every bag of its own size."""
    torch.manual_seed(0)
    table, index = torch.randn(9, 4), torch.tensor([3, 1, 4, 1, 5, 3, 3, 2, 6])
    pooling = {"mode": mode, "include_last_offset": False, "padding_idx": None, "offsets": True, "weighted": False}
    starts = torch.tensor([0, 0, 2, 5, 7, 9])
    for padding in (None, 3):
        for last in (False, True):
            got = pool(table[index], index, (starts,), pooling | {"padding_idx": padding, "include_last_offset": last})
            expected = F.embedding_bag(
                index, table, starts, mode=mode, padding_idx=padding, include_last_offset=last
            )  # fmt: skip
            torch.testing.assert_close(got, expected)
    weights = torch.rand(9)
    if mode == "sum":
        got = pool(table[index], index, (starts, weights), pooling | {"weighted": True})
        torch.testing.assert_close(got, F.embedding_bag(index, table, starts, mode=mode, per_sample_weights=weights))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(4, 2, max_norm=1.0), r"layer '0': Embedding with max_norm=1\.0 .*weight\.bits=null"),
        (nn.EmbeddingBag(4, 2, sparse=True), r"layer '0': EmbeddingBag with sparse=True .*gradients are dense"),
    ],
)
def test_look_ups_that_cannot_be_quantized(layer: nn.Module, message: str) -> None:
    x = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        qat.prepare(nn.Sequential(layer), qat.preset("int8"), x)


def test_max_norm_of_a_float_table_cannot_be_lowered() -> None:
    x = torch.zeros(2, 3, dtype=torch.int64)
    config = qat.QuantConfig.from_dict(INTEGER["int8"] | {"rules": [{"match": "0", "weight": {"bits": None}}]})
    prepared = qat.prepare(nn.Sequential(nn.Embedding(4, 2, max_norm=1.0)), config, x)
    with pytest.raises(ValueError, match=r"layer '0' cannot be lowered: max_norm=1\.0"):
        qat.lower(prepared)


@pytest.mark.parametrize("kind", ["conv3d", "transposed_2d", "embedding", "bag_max", "bilinear", "bag_sum_offsets"])
def test_adaptive_rounding_learns_or_stays_at_nearest(kind: str) -> None:
    weight = {"bits": 4, "rounding": "adaptive", "range": "fixed", "granularity": "channel"}
    _, prepared, x = build(kind, INTEGER["int8"] | {"weight": weight}, steps=0)
    results = {result.layer: result for result in learn_rounding(prepared, [x], steps=150, progress=False)}
    layers = {name: m for name, m in prepared.named_modules() if isinstance(m, QuantizedLayer)}
    assert set(results) == {name for name, layer in layers.items() if layer.biased}
    assert all(result.learned <= result.nearest for result in results.values() if result.kept)
    if all(layer.biased for layer in layers.values()):
        assert any(result.kept for result in results.values())
    for name, layer in layers.items():
        scale, _ = layer.weight_quantizer.qparams()
        table = layer.outputs_first().detach()
        nearest = (table / scale.reshape(-1, *[1] * (table.dim() - 1))).round().clamp(-8, 7)
        moved = (encode(layer.weight_quantizer, table).codes != nearest.flatten(1)).double().mean()
        assert float(moved) == pytest.approx(results[name].changed if name in results and results[name].kept else 0)
    with torch.no_grad():
        expected, got = prepared(*x), qat.lower(prepared)(*x)
    assert (got - expected).square().mean() <= 1e-3 * expected.square().mean()
