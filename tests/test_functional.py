"""Layers called as functions, with weights that the network holds: the whole way for each; what stays float."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.analysis.preparation import report
from qat.layers import QuantFunctional
from qat.layers.tied import share_weight_quantizers
from qat.ptq import PTQConfig, finalize, learn_rounding
from qat.runtime import IntegerConv
from qat.runtime.lookup import LookUp
from qat.runtime.matmul import IntegerMatmul
from tests.networks.blocks import Net
from tests.whole_way import assert_files_agree, assert_sixteen_bits_are_float, config, trained


class Case(NamedTuple):
    """A forward, the shapes of its parameters, the shape of its input, and modules that it has besides."""

    forward: Callable[..., Any]
    weights: dict[str, tuple[int, ...]]
    shape: tuple[int, ...]
    modules: Callable[[], dict[str, nn.Module]] = dict

    def build(self) -> tuple[Net, Tensor]:
        torch.manual_seed(2)
        parts = {name: nn.Parameter(torch.randn(shape) / max(sum(shape[1:]), 4) ** 0.5)
                 for name, shape in self.weights.items()}  # fmt: skip
        x = torch.randn(64, *self.shape) + 0.2
        indices = x.shape[-1] == 4 and len(self.shape) == 1
        return Net(self.forward, **parts, **self.modules()), (x.abs() * 5).long().clamp(max=10) if indices else x


def head(inputs: int) -> Callable[[], dict[str, nn.Module]]:
    return lambda: {"head": nn.Linear(inputs, 3)}


def norm(dims: int) -> Callable[[], dict[str, nn.Module]]:
    kinds = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    return lambda: {"bn": kinds[dims](4)}


CASES: dict[str, Case] = {
    "linear": Case(lambda s, x: s.head(F.relu(F.linear(x, s.w, s.b))), {"w": (6, 8), "b": (6,)}, (8,), head(6)),
    "linear, no bias": Case(lambda s, x: s.head(F.linear(input=x, weight=s.w)), {"w": (6, 8)}, (5, 8), head(6)),
    "linear, transposed": Case(lambda s, x: F.linear(x, s.w.t(), bias=s.b), {"w": (8, 6), "b": (6,)}, (8,)),
    "linear, reshaped": Case(lambda s, x: F.linear(x, s.w.reshape(6, 8)), {"w": (6, 2, 4)}, (8,)),
    "linear, parts": Case(
        lambda s, x: sum(F.linear(x, s.w.chunk(3)[i], s.b.chunk(3)[i]) for i in range(3)),
        {"w": (15, 8), "b": (15,)}, (8,)),
    "linear, slices": Case(lambda s, x: F.linear(F.relu(F.linear(x, s.w[:8], s.b[:8])), s.w[8:]),
                           {"w": (12, 8), "b": (12,)}, (8,)),
    "linear, BatchNorm": Case(lambda s, x: F.relu(s.bn(F.linear(x, s.w))), {"w": (4, 8)}, (8,), norm(1)),
    "bilinear": Case(lambda s, x: F.bilinear(x[:, :3], x[:, 3:], s.w, s.b), {"w": (4, 3, 5), "b": (4,)}, (8,)),
    "conv1d": Case(lambda s, x: F.conv1d(x, s.w, s.b, 2, 1), {"w": (4, 3, 3), "b": (4,)}, (3, 9)),
    "conv2d": Case(
        lambda s, x: F.conv2d(F.relu(s.bn(F.conv2d(x, s.w, s.b, padding=1))), s.v, stride=2, groups=2),
        {"w": (4, 3, 3, 3), "b": (4,), "v": (4, 2, 2, 2)}, (3, 6, 6), norm(2)),
    "torch.conv2d": Case(lambda s, x: torch.conv2d(x, s.w, s.b, dilation=2), {"w": (4, 3, 2, 2), "b": (4,)}, (3, 6, 6)),
    "conv2d, same": Case(lambda s, x: F.conv2d(x, s.w, padding="same"), {"w": (4, 3, 3, 3)}, (3, 6, 6)),
    "conv3d": Case(lambda s, x: s.bn(F.conv3d(x, s.w, s.b)), {"w": (4, 2, 2, 2, 1), "b": (4,)}, (2, 4, 4, 4), norm(3)),
    "conv_transpose1d": Case(lambda s, x: F.conv_transpose1d(x, s.w, s.b, 2, 1, 1), {"w": (3, 4, 3), "b": (4,)},
                             (3, 6)),
    "conv_transpose2d": Case(
        lambda s, x: F.relu(s.bn(F.conv_transpose2d(x, s.w, s.b, stride=2, groups=2))),
        {"w": (4, 2, 3, 3), "b": (4,)}, (4, 4, 4), norm(2)),
    "conv_transpose3d": Case(lambda s, x: F.conv_transpose3d(x, s.w), {"w": (2, 4, 2, 1, 2)}, (2, 3, 3, 3)),
    "embedding": Case(lambda s, x: s.head(F.embedding(x, s.w, 2)), {"w": (11, 6)}, (4,), head(6)),
    "torch.embedding": Case(lambda s, x: s.head(torch.embedding(s.w, x)), {"w": (11, 6)}, (4,), head(6)),
    "embedding_bag": Case(lambda s, x: s.head(F.embedding_bag(x, s.w, mode="sum")), {"w": (11, 6)}, (4,), head(6)),
    "embedding_bag, in order": Case(lambda s, x: s.head(F.embedding_bag(x, s.w, None, None, 2.0, False, "mean")),
                                    {"w": (11, 6)}, (4,), head(6)),
    "embedding_bag, weighted": Case(
        lambda s, x: s.head(F.embedding_bag(
            x, s.w, mode="sum", per_sample_weights=s.v.expand(x.shape[0], -1), padding_idx=3)),
        {"w": (11, 6), "v": (1, 4)}, (4,), head(6)),
    "standardized weight": Case(
        lambda s, x: F.conv2d(F.relu(F.conv2d(x, (s.w - s.w.mean((1, 2, 3), True)) / s.w.std((1, 2, 3), keepdim=True))),
                              s.g * F.normalize(s.v, dim=1)),
        {"w": (4, 3, 3, 3), "g": (4, 1, 1, 1), "v": (4, 4, 1, 1)}, (3, 6, 6)),
    "computed bias": Case(lambda s, x: s.head(F.linear(x, s.w, x.mean(1, keepdim=True) * s.b)),
                          {"w": (6, 8), "b": (6,)}, (8,), head(6)),
    "turned bias": Case(lambda s, x: F.linear(x, s.w, s.b.flip(0)), {"w": (6, 8), "b": (6,)}, (8,)),
    "copied weight": Case(lambda s, x: F.linear(F.linear(x, s.w.t().reshape(6, 8)), s.v.t().reshape(8, 6)),
                          {"w": (8, 6), "v": (6, 8)}, (8,)),
    "computed weight": Case(lambda s, x: F.linear(x, F.linear(x.mean(0), s.w).unflatten(0, (4, 8)), s.b),
                            {"w": (32, 8), "b": (4,)}, (8,)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_sixteen_bits_are_float(name: str) -> None:
    net, x = CASES[name].build()
    assert_sixteen_bits_are_float(net, (x,))


@pytest.mark.parametrize("name", [name for name in CASES if name != "computed weight"])
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    net, x = CASES[name].build()
    prepared = trained(net, (x,))
    functional = [module for module in prepared.modules() if isinstance(module, QuantFunctional)]
    assert functional
    network = assert_files_agree(prepared, (x,), tmp_path)
    integer = LookUp if "embedding" in name else IntegerConv
    if name != "bilinear":
        assert isinstance(network.layers[f"functional/{functional[0].path}"], integer)
    assert {name.split("/")[0] for name in network.state_dict()}.isdisjoint(net.state_dict())  # no float weight


def test_bags_of_a_function_have_offsets() -> None:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(11, 6)), nn.Linear(6, 3)

        def forward(self, x: Tensor, starts: Tensor) -> Tensor:
            y: Tensor = self.head(F.embedding_bag(x, self.w, starts, mode="max"))
            return y

    torch.manual_seed(0)
    net, inputs = Bags(), (torch.randint(11, (24,)), torch.tensor([0, 5, 6, 13]))
    prepared = qat.prepare(net, config(8), inputs)
    assert torch.equal(prepared(*inputs), net(*inputs))
    qat.calibrate(prepared, [inputs])
    prepared(*inputs).sum().backward()
    assert net.w.grad is not None
    network = qat.lower(prepared.eval())
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), prepared(*inputs), atol=1e-2, rtol=0)
    assert isinstance(network.layers["functional/w"], LookUp)


BIASES = ["linear", "linear, parts", "linear, no bias", "conv2d", "conv_transpose2d", "bilinear"]


@pytest.mark.parametrize("name", BIASES)
@torch.no_grad()
def test_float_weights_quantized_after_training(name: str) -> None:
    """Roundings are learned, and biases corrected; where there is none, one is added."""
    net, x = CASES[name].build()
    other = (0, 2, 3) if "conv" in name else 0  # a bias shifts a channel
    expected = net.eval()(x).mean(other)
    errors = {}
    for corrected in (False, True):
        weight = {"bits": 4, "granularity": "channel", "rounding": "adaptive", "range": "fixed"}
        prepared = qat.prepare(copy.deepcopy(net), config(8, weight=weight), x[:4])
        with torch.enable_grad():
            steps = PTQConfig(adaptive_rounding_steps=40, bias_correction=corrected)
            finalize(prepared, [x], steps, trained=False)
        assert (qat.lower(prepared)(x) - prepared(x)).abs().mean() <= 0.02 * prepared(x).std()
        errors[corrected] = float((prepared(x).mean(other) - expected).abs().mean())
    assert errors[True] < errors[False]


def test_learned_ranges_get_gradients() -> None:
    net, x = CASES["conv2d"].build()
    prepared = qat.prepare(net, config(4, weight={"bits": 4, "range": "learned", "gradient": "lsq"}), x[:4])
    qat.calibrate(prepared, [x])
    prepared.train()(x).square().mean().backward()
    scale = prepared.get_submodule("functional.w").weight_quantizer.scale
    assert scale.grad is not None
    assert scale.grad.abs().sum() > 0


# ---- rules, names, copies --------------------------------------------------------------------------------------------


def schemes(net: nn.Module, x: Tensor, *rules: dict[str, Any]) -> dict[str, int | None]:
    prepared = qat.prepare(net, config(8, rules=list(rules)), x[:4])
    return {name: module.weight_quantizer.scheme.bits for name, module in prepared.named_modules()
            if isinstance(module, QuantFunctional)}  # fmt: skip


def test_rules_match_the_parameters_path_and_the_layers_type() -> None:
    net, x = CASES["linear, parts"].build()
    parts = ("functional.w", "functional.w_2", "functional.w_3")
    assert schemes(net, x, {"match": "w", "weight": {"bits": 4}}) == dict.fromkeys(parts, 4)
    assert schemes(net, x, {"match": "type:Linear", "weight": {"bits": 3}}) == dict.fromkeys(parts, 3)
    assert schemes(net, x, {"match": "first", "weight": {"bits": 5}}) == dict(zip(parts, (5, 8, 8), strict=True))
    with pytest.raises(ValueError, match=r"'ww' matches no layer. Nearest module paths: w.*type:Linear"):
        schemes(net, x, {"match": "ww", "weight": {"bits": 5}})


def test_a_call_that_a_rule_leaves_float_is_lowered_in_float() -> None:
    net, x = CASES["conv2d"].build()
    prepared = qat.prepare(net, config(8, rules=[{"match": "v", "weight": {"bits": None}}]), x[:4])
    qat.calibrate(prepared, [x])
    text = report(prepared)
    assert "stays float: rule 'v'" in text
    assert "QuantConv2d" in text
    with torch.no_grad():
        assert torch.allclose(qat.lower(prepared)(x), prepared.eval()(x), atol=1e-3)  # but for rounded biases


def test_copies_and_pickles_find_their_own_weight() -> None:
    net, x = CASES["linear"].build()
    prepared = qat.prepare(net, config(8), x[:4])
    qat.calibrate(prepared, [x])
    stored = io.BytesIO()
    torch.save(prepared, stored)
    stored.seek(0)
    for other in (copy.deepcopy(prepared), torch.load(stored, weights_only=False)):
        layer = other.get_submodule("functional.w")
        assert layer.weight is other.w
        assert layer.weight is not net.w
        assert torch.equal(other(x), prepared(x))
        with torch.no_grad():
            assert torch.equal(qat.lower(other)(x), qat.lower(prepared)(x))
    alone = copy.deepcopy(prepared.get_submodule("functional.w"))
    with pytest.raises(RuntimeError, match="'w' is held by the prepared network"):
        _ = alone.weight


def test_a_convolution_by_a_computed_weight_stays_float_and_is_named() -> None:
    net = Net(lambda s, x: F.conv2d(x, s.fc(x.mean((0, 2, 3))).view(4, 3, 1, 1)), fc=nn.Linear(3, 12))
    x = torch.randn(8, 3, 5, 5)
    prepared = qat.prepare(net, config(8), x)
    qat.calibrate(prepared, [x])
    assert "the weight of this conv2d is computed from activations" in report(prepared)
    with pytest.raises(ValueError, match=r"'conv2d'.*cannot be lowered"):
        qat.lower(prepared)


def test_a_linear_function_of_a_computed_weight_is_a_product() -> None:
    net, x = CASES["computed weight"].build()
    prepared = qat.prepare(net, config(8), x)
    qat.calibrate(prepared, [x])
    assert any(isinstance(layer, IntegerMatmul) for layer in qat.lower(prepared).layers.values())


# ---- tied weights ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A table that is looked up, and read again to score every row."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.emb, self.mix, self.by = nn.Embedding(11, 8), nn.Linear(8, 8), by
        if by == "module":
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.emb.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.mix(self.emb(x)))
        return self.head(y) if self.by == "module" else F.linear(y, self.emb.weight)


@pytest.mark.parametrize("by", ["module", "function"])
def test_tied_weights_are_quantized_once(by: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Tied(by), torch.randint(11, (64, 5))
    assert_sixteen_bits_are_float(net, (x,))
    head = "head" if by == "module" else "functional.emb.weight"
    prepared = trained(net, (x,), config(8, rules=[{"match": "emb", "weight": {"bits": 4}}]))
    first, second = (prepared.get_submodule(path) for path in ("emb", head))
    assert first.weight_quantizer is second.weight_quantizer
    assert first.weight_quantizer.scheme.bits == 8  # the wider one
    assert first.weight is second.weight
    reasons = prepared.meta["qat"]["reasons"]
    assert reasons["emb"] == f"rule 'emb', tied with {head} in the scheme of {head}"
    assert reasons[head] == "default, tied with emb"
    again = copy.deepcopy(prepared)
    assert again.get_submodule("emb").weight_quantizer is again.get_submodule(head).weight_quantizer
    network = assert_files_agree(prepared, (x,), tmp_path)
    table, weight = network.layers["emb"], network.layers[head.replace(".", "/")]
    assert torch.equal(table.weight, weight.weight)


def test_adaptive_rounding_of_a_tied_weight_is_learned_by_the_layer_that_multiplies() -> None:
    torch.manual_seed(0)
    net, x = Tied("function"), torch.randint(11, (64, 5))
    weight = {"bits": 3, "granularity": "channel", "rounding": "adaptive", "range": "fixed"}
    prepared = qat.prepare(net, config(8, weight=weight), x[:4])
    qat.calibrate(prepared, [x])
    results = learn_rounding(prepared, [x], steps=20, progress=False)
    assert [result.layer for result in results] == ["mix", "functional.emb.weight"]


def test_copies_of_weights_are_not_taken_for_one_another() -> None:
    net, x = CASES["copied weight"].build()
    prepared = qat.prepare(net, config(8), x[:4])
    parts = [module for module in prepared.modules() if isinstance(module, QuantFunctional)]
    assert len({part.weight_quantizer for part in parts}) == 2


def test_only_equal_views_of_a_parameter_share() -> None:
    net, x = CASES["linear, parts"].build()
    prepared = qat.prepare(net, config(8), x[:4])
    parts = [module for module in prepared.modules() if isinstance(module, QuantFunctional)]
    assert len({part.weight_quantizer for part in parts}) == 3
    square = Net(lambda s, x: F.conv_transpose1d(F.conv1d(x, s.w), s.w), w=nn.Parameter(torch.randn(3, 3, 2)))
    other = qat.prepare(square, config(8), torch.randn(2, 3, 6))
    pair = [(name, m) for name, m in other.named_modules() if isinstance(m, QuantFunctional)]
    assert len(pair) == 2
    assert share_weight_quantizers(pair) == {}  # a channel of the one is no channel of the other


# ---- transposed convolutions to a size -------------------------------------------------------------------------------


def test_output_size_of_a_transposed_convolution(tmp_path: Path) -> None:
    layers = {"down": nn.Conv2d(3, 4, 3, 2, 1), "up": nn.ConvTranspose2d(4, 3, 3, 2, 1)}
    net, x = Net(lambda s, x: s.up(s.down(x), output_size=x.shape[2:]), **layers), torch.randn(16, 3, 6, 7)
    assert_sixteen_bits_are_float(net, (x,))
    network = assert_files_agree(trained(net, (x,)), (x,), tmp_path)
    assert network(x).shape == x.shape
