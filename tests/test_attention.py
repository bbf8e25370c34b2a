"""Torch's attention modules: recorded in steps that compute the same, quantized inside, and lowered to integers."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.export.onnxruntime import OnnxNetwork
from qat.modes import eval_mode
from qat.runtime.matmul import IntegerMatmul
from tests.networks.vit import Translator, ViT
from tests.whole_way import assert_files_agree, assert_sixteen_bits_are_float, config, trained

SAMPLES, STEPS, KEYS, WIDTH, HEADS = 24, 5, 7, 8, 2
LATER = torch.ones(STEPS, STEPS).triu(1).bool()


class Net(nn.Module):
    """One module, and buffers for masks, with a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Any], module: nn.Module, **buffers: Tensor) -> None:
        super().__init__()
        self.compute, self.m = forward, module
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


class One(Net):
    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


class Two(Net):
    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.compute(self, x, y)


class Case(NamedTuple):
    """A module, how it is called, its inputs, masks, and the products of activations inside."""

    make: Callable[[], nn.Module]
    forward: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    masks: Mapping[str, Tensor] = MappingProxyType({})
    products: int = 2

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        torch.manual_seed(3)
        module = self.make()
        for name, parameter in module.named_parameters():  # biases and norms that are not nought and one
            if "bias" in name or "norm" in name:
                nn.init.normal_(parameter, float("norm" in name and "bias" not in name), 0.3)
        inputs = self.inputs()
        net = (One if len(inputs) == 1 else Two)(self.forward, module, **self.masks)
        return net, inputs


def attention(**settings: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True} | settings)


def one() -> tuple[Tensor, ...]:
    return (torch.randn(SAMPLES, STEPS, WIDTH),)


def two(width: int = WIDTH) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(SAMPLES, STEPS, WIDTH), torch.randn(SAMPLES, KEYS, width))


def padded(as_float: bool = False) -> tuple[Tensor, ...]:
    """A sequence, and what of it is padding."""
    padding = torch.arange(STEPS) >= torch.randint(2, STEPS + 1, (SAMPLES, 1))
    added = torch.zeros(padding.shape).masked_fill(padding, -20.0)
    return torch.randn(SAMPLES, STEPS, WIDTH), added if as_float else padding


def itself(**settings: Any) -> Callable[..., Any]:
    return lambda s, x: s.m(x, x, x, **settings)[0]


def masked(s: Any, x: Tensor) -> Tensor:
    return s.m(x, x, x, attn_mask=s.mask, need_weights=False)[0]


def weights_of_heads(s: Any, x: Tensor) -> Tensor:
    y, weights = s.m(x, x, x, average_attn_weights=False)
    return torch.cat([y, weights.transpose(1, 2).flatten(2)], -1)


ATTENTION: dict[str, Case] = {
    "self": Case(attention(), itself(need_weights=False), one),
    "self, weights unread": Case(attention(), itself(), one),
    "self, dropout": Case(attention(dropout=0.2), itself(), one),
    "self, no bias": Case(attention(bias=False), itself(), one),
    "self, steps first": Case(attention(batch_first=False), itself(), one),
    "weights": Case(attention(), lambda s, x: torch.cat(s.m(x, x, x), -1), one),
    "weights of each head": Case(attention(), weights_of_heads, one),
    "cross": Case(attention(), lambda s, x, y: s.m(x, y, y)[0], two()),
    "cross, three inputs": Case(attention(), lambda s, x, y: s.m(x, y, F.relu(y), need_weights=False)[0], two()),
    "cross, kdim": Case(attention(kdim=6, vdim=6), lambda s, x, y: s.m(x, y, y)[0], two(6)),
    "cross, kdim, no bias": Case(attention(kdim=6, vdim=6, bias=False), lambda s, x, y: s.m(x, y, y)[0], two(6)),
    "boolean mask": Case(attention(), masked, one, {"mask": LATER}),
    "float mask": Case(attention(), masked, one, {"mask": torch.randn(STEPS, STEPS)}),
    "causal": Case(attention(), lambda s, x: s.m(x, x, x, attn_mask=s.mask, is_causal=True, need_weights=False)[0],
                   one, {"mask": LATER}),
    "padding": Case(attention(), lambda s, x, p: s.m(x, x, x, key_padding_mask=p)[0], padded),
    "float padding": Case(attention(), lambda s, x, p: s.m(x, x, x, key_padding_mask=p)[0], lambda: padded(True)),
    "padding and mask": Case(attention(), lambda s, x, p: s.m(x, x, x, key_padding_mask=p, attn_mask=s.mask)[0],
                             padded, {"mask": LATER}),
}  # fmt: skip


def layer(decoder: bool = False, **settings: Any) -> nn.Module:
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    return kind(WIDTH, HEADS, 12, **{"dropout": 0.0, "batch_first": True} | settings)


LAYERS: dict[str, Case] = {
    "encoder layer": Case(layer, lambda s, x: s.m(x), one),
    "encoder layer, dropout": Case(lambda: layer(dropout=0.1), lambda s, x: s.m(x), one),
    "encoder layer, steps first": Case(lambda: layer(batch_first=False), lambda s, x: s.m(x), one),
    "encoder layer, norm first": Case(lambda: layer(norm_first=True, activation="gelu"), lambda s, x: s.m(x), one),
    "encoder layer, own activation": Case(lambda: layer(activation=nn.SiLU(), bias=False), lambda s, x: s.m(x), one),
    "encoder layer, causal": Case(layer, lambda s, x: s.m(x, src_mask=s.mask, is_causal=True), one, {"mask": LATER}),
    "encoder layer, padding": Case(layer, lambda s, x, p: s.m(x, src_key_padding_mask=p), padded),
    "decoder layer": Case(lambda: layer(True), lambda s, x, y: s.m(x, y, tgt_mask=s.mask), two(), {"mask": LATER}, 4),
    "decoder layer, norm first": Case(lambda: layer(True, norm_first=True, activation=F.silu),
                                      lambda s, x, y: s.m(x, y, tgt_mask=s.mask, tgt_is_causal=True), two(),
                                      {"mask": LATER}, 4),
    "encoder": Case(lambda: nn.TransformerEncoder(layer(), 2, nn.LayerNorm(WIDTH)),
                    lambda s, x, p: s.m(x, s.mask, p), padded, {"mask": LATER}, 4),
    "decoder": Case(lambda: nn.TransformerDecoder(layer(True), 2), lambda s, x, y: s.m(x, y), two(), {}, 8),
    "transformer": Case(lambda: nn.Transformer(WIDTH, HEADS, 1, 1, 12, 0.0, batch_first=True),
                        lambda s, x, y: s.m(y, x, tgt_mask=s.mask, tgt_is_causal=True), two(), {"mask": LATER}, 6),
}  # fmt: skip
CASES = ATTENTION | LAYERS


@pytest.fixture(autouse=True)
def _as_written() -> Any:
    """Torch's fast path makes zeros of padding."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("name", CASES)
def test_recorded_in_steps_it_computes_the_same(name: str) -> None:
    net, inputs = CASES[name].build()
    prepared = qat.prepare(net, config(8), tuple(x[:4] for x in inputs))
    assert dict(prepared.named_parameters()).keys() >= dict(net.named_parameters()).keys()
    for training in (False, True):
        if training and "dropout" in name:
            continue
        got, expected = (module.train(training)(*inputs) for module in (prepared, net))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_sixteen_bits_are_float(name: str) -> None:
    net, inputs = CASES[name].build()
    assert_sixteen_bits_are_float(net, inputs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    net, inputs = CASES[name].build()
    prepared = trained(net, inputs)
    network = assert_files_agree(prepared, inputs, tmp_path)
    assert sum(isinstance(step, IntegerMatmul) for step in network.layers.values()) == CASES[name].products


@pytest.mark.parametrize("boolean", [False, True])
@torch.no_grad()
def test_a_mask_for_each_head(boolean: bool, tmp_path: Path) -> None:
    mask = torch.randn(3 * HEADS, STEPS, STEPS)
    net = One(masked, attention()(), mask=(mask > 1) if boolean else mask)
    x = torch.randn(3, STEPS, WIDTH)
    prepared = qat.prepare(net, config(8), x)
    torch.testing.assert_close(prepared(x), net(x), rtol=1e-5, atol=1e-5)
    qat.calibrate(prepared, [x])
    network = qat.lower(prepared)
    close = 0.02 * net(x).std()
    assert (network(x) - prepared(x)).abs().mean() < close
    path = qat.export(network, tmp_path, x, formats=["onnx"])["onnx"]
    assert (OnnxNetwork(path)(x) - network(x)).abs().mean() < close


def test_inputs_without_a_batch() -> None:
    for batch_first in (False, True):
        net, x = One(itself(), attention(batch_first=batch_first)()), torch.randn(STEPS, WIDTH)
        torch.testing.assert_close(qat.prepare(net, config(8), x)(x), net(x), rtol=1e-5, atol=1e-5)


def test_quantizers_stand_on_projections_and_probabilities() -> None:
    net, inputs = CASES["cross"].build()
    prepared = qat.prepare(net, config(8), inputs)
    edges = {name.removeprefix("quantizers.") for name, _ in qat.modes.quantizers(prepared) if name.startswith("quant")}
    assert edges == {
        "x", "y", "functional_m_in_proj_weight", "functional_m_in_proj_weight_2", "functional_m_in_proj_weight_3",
        "m_softmax", "m_matmul",
    }  # fmt: skip
    kinds = {"functional.m.in_proj_weight": 4, "m.out_proj": 3}
    rules = [{"match": "m.in_proj_weight", "weight": {"bits": 4}}, {"match": "type:Linear", "weight": {"bits": 3}}]
    prepared = qat.prepare(net, config(8, rules=rules), inputs)
    for path, bits in kinds.items():
        assert prepared.get_submodule(path).weight_quantizer.scheme.bits == bits


def test_attention_drops_in_training_only() -> None:
    net, (x,) = CASES["self, dropout"].build()
    prepared = qat.prepare(net, config(8), x)
    prepared.train()
    assert not torch.equal(prepared(x), prepared(x))
    with eval_mode(prepared):
        assert torch.equal(prepared(x), prepared(x))


class Between(nn.Module):
    """Attention that cannot be recorded between layers that can."""

    def __init__(self, **settings: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **settings)  # type: ignore[arg-type]
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        z, shares = self.attention(y, y[:, 1:], y[:, 1:], average_attn_weights=False)  # attends
        return self.b(z), shares


@pytest.mark.parametrize("setting", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_no_input_has_leave_attention_float(setting: str) -> None:
    torch.manual_seed(0)
    net, x = Between(**{setting: True}).eval(), torch.randn(SAMPLES, STEPS, WIDTH)
    prepared = qat.prepare(net, config(8), x)
    assert all(torch.equal(a, b) for a, b in zip(prepared(x), net(x), strict=True))
    graph: Any = prepared.graph
    read = {str(node.target): str(node.args[0]) for node in graph.nodes if node.target in ("a", "b")}
    assert read == {"a": "quantizers_x", "b": "quantizers_attention"}  # what attention makes is quantized again
    text = " ".join(qat.report(prepared).split())
    assert f"qat cannot trace MultiheadAttention: nn.MultiheadAttention with {setting}=True cannot be recorded" in text
    assert "float: attention.out_proj: its forward is not what uses its weight" in text
    qat.calibrate(prepared, [x])
    prepared.train()(x)[0].square().mean().backward()
    assert net.attention.in_proj_weight.grad is not None
    with torch.no_grad():
        for got, expected in zip(qat.lower(prepared.eval())(x), prepared(x), strict=True):
            assert (got - expected).abs().mean() <= 0.02 * expected.std()


@pytest.mark.parametrize("setting", ["add_bias_kv", "add_zero_attn"])
def test_keys_that_no_input_has_are_refused_where_all_is_to_be_recorded(setting: str) -> None:
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if text.endswith("# attends"))
    net, x = Between(**{setting: True}), torch.randn(2, STEPS, WIDTH)
    with pytest.raises(ValueError, match=rf"{setting}=True cannot be recorded.*{setting}=False") as error:
        qat.prepare(net, dataclasses.replace(config(8), graph="required"), x)
    assert f" at {__file__}:{line}: nn.MultiheadAttention" in str(error.value)
    alone = One(itself(), nn.MultiheadAttention(WIDTH, HEADS, **{setting: True}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"nothing in One can be quantized: .*{setting}=True cannot be recorded"):
        qat.prepare(alone, config(8), one())


def test_a_hint_without_its_mask_is_refused() -> None:
    net = One(itself(is_causal=True), attention()())
    with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):  # torch's own
        qat.prepare(net, config(8), one())


# ---- networks --------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], int]] = {
    "ViT": (ViT, lambda: (torch.randn(24, 3, 16, 16),), 4),
    "ViT, own blocks": (lambda: ViT(own_blocks=True), lambda: (torch.randn(24, 3, 16, 16),), 4),
    "encoder-decoder": (Translator, lambda: (torch.randint(17, (24, 6)), torch.randint(17, (24, 6))), 10),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, tmp_path: Path) -> None:
    make, inputs, products = NETWORKS[name]
    torch.manual_seed(0)
    net, x = make(), inputs()
    assert_sixteen_bits_are_float(copy.deepcopy(net), x)
    network = assert_files_agree(trained(net, x), x, tmp_path)
    assert sum(isinstance(step, IntegerMatmul) for step in network.layers.values()) == products
