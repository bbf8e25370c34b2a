"""Hugging Face's transformers prepared as they come: schemes of language models, rules, tied weights, LoRA."""

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.layers import QuantizedLayer
from qat.ptq import PTQConfig, finalize, smooth
from qat.runtime import FloatConv, IntegerConv

pytest.importorskip("transformers", reason="pip install 'qat[hf]'")
from tests.networks import huggingface

BUILD = {"llama": huggingface.llama, "bert": huggingface.bert}
SIXTEEN = {"bits": 16, "range": "fixed"}
TOKEN = {"bits": 8, "granularity": "token", "range": "dynamic"}


def group(bits: int, size: int = 32) -> dict[str, Any]:
    return {"bits": bits, "granularity": "group", "group_size": size, "range": "dynamic"}


SCHEMES: dict[str, qat.QuantConfig] = {
    "w4g32a8": qat.QuantConfig.from_dict({"weight": group(4), "activation": TOKEN, "input": TOKEN}),
    "w4": qat.QuantConfig.from_dict({"weight": group(4)}),
    "w2": qat.QuantConfig.from_dict({"weight": group(2)}),
    "nvfp4": qat.preset("nvfp4"),
    "mxfp4": qat.preset("mxfp4"),
}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, "qat.prepare"):
        yield


@pytest.fixture(scope="module")
def text() -> Tensor:
    if huggingface.FILE.is_file():
        return huggingface.characters()
    prose = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()
    return torch.tensor([ord(character) % huggingface.VOCABULARY for character in prose])


@pytest.fixture(scope="module")
def trained(text: Tensor) -> dict[str, nn.Module]:
    nets = {}
    for name, build in BUILD.items():
        torch.manual_seed(0)
        nets[name] = build()
        huggingface.train(nets[name], text, name == "bert", 60)
    return nets


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@torch.no_grad()
def logits(net: nn.Module, ids: Tensor) -> Tensor:
    return net(input_ids=ids).logits


@torch.no_grad()
def loss_on(net: nn.Module, batch: dict[str, Tensor]) -> float:
    return net(**batch).loss.item()


def prepared(net: nn.Module, config: qat.QuantConfig, ids: Tensor) -> nn.Module:
    result = qat.prepare(net, config, {"input_ids": ids})
    qat.calibrate(result, [{"input_ids": ids}])
    assert isinstance(result, type(net))
    return result.eval()


@pytest.mark.parametrize("name", BUILD)
def test_at_16_bits_it_computes_what_the_float_model_computes(
    trained: dict[str, nn.Module], text: Tensor, name: str
) -> None:
    net, ids = trained[name], text[:256].view(8, 32)
    weight = {"bits": 16, "granularity": "channel", "range": "dynamic"}
    config = qat.QuantConfig.from_dict({"weight": weight, "activation": SIXTEEN, "input": SIXTEEN})
    result = prepared(net, config, ids)
    linears = [m for m in result.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    assert len(linears) == len([m for m in net.modules() if isinstance(m, nn.Linear | nn.Embedding)])
    assert all(isinstance(m, QuantizedLayer) for m in linears)
    assert 0 < relative(logits(result, ids), logits(net, ids)) < 1e-3


@pytest.mark.sampled(6)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", BUILD)
def test_training_with_a_scheme_lowers_the_loss(
    trained: dict[str, nn.Module], text: Tensor, name: str, scheme: str
) -> None:
    net, ids = copy.deepcopy(trained[name]), text[:256].view(8, 32)
    result = prepared(net, SCHEMES[scheme], ids)
    error = relative(logits(result, ids), logits(net, ids))
    assert error < {"w4g32a8": 0.1, "w4": 0.1, "w2": 0.6, "nvfp4": 0.2, "mxfp4": 0.2}[scheme]
    few = text[:48]  # so little that it is soon known by heart: random windows of a whole text hide what was learned
    held = huggingface.batch(few, name == "bert", 64)
    before = loss_on(result, held)
    huggingface.train(result, few, name == "bert", 40, 1e-3)
    assert loss_on(result, held) < before - 0.2


def test_the_head_by_rule_and_the_others_in_groups_of_128(text: Tensor) -> None:
    net = huggingface.llama(head_dim=32).eval()
    wide = copy.deepcopy(net.config)
    wide.hidden_size, wide.intermediate_size = 128, 256
    net, ids = type(net)(wide).eval(), text[:256].view(8, 32)
    rules = [{"match": "lm_head", "weight": {"bits": 8}}, {"match": "type:Embedding", "weight": {"bits": None}}]
    config = qat.QuantConfig.from_dict(
        {"weight": group(4, 128), "activation": TOKEN, "input": TOKEN, "rules": rules}
    )  # fmt: skip
    result = prepared(net, config, ids)
    schemes = {name: m.weight_quantizer.scheme for name, m in result.named_modules() if isinstance(m, QuantizedLayer)}
    assert schemes.pop("lm_head").bits == 8
    assert len(schemes) == 14
    assert {(s.bits, s.group_size) for s in schemes.values()} == {(4, 128)}
    assert type(result.model.embed_tokens) is nn.Embedding


def test_tied_weights_are_quantized_once(trained: dict[str, nn.Module], text: Tensor) -> None:
    net, ids = huggingface.llama(tie_word_embeddings=True).eval(), text[:256].view(8, 32)
    for tied, head, table in (
        (net, "lm_head", "model.embed_tokens"),
        (trained["bert"], "cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ):
        result = prepared(tied, SCHEMES["w4g32a8"], ids)
        layers = result.get_submodule(head), result.get_submodule(table)
        assert layers[0].weight is layers[1].weight is tied.get_submodule(table).weight
        assert layers[0].weight_quantizer is layers[1].weight_quantizer
        assert torch.equal(layers[0].quantized_weight(), layers[1].quantized_weight())


def test_lora_learns_on_frozen_quantized_weights_and_is_merged(trained: dict[str, nn.Module], text: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="pip install 'qat[hf]'")
    net, ids = copy.deepcopy(trained["llama"]), text[:256].view(8, 32)
    result = prepared(net, SCHEMES["w4"], ids)
    before = {name: p.clone() for name, p in result.named_parameters()}
    start = logits(result, ids)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    adapted = peft.get_peft_model(result, config)
    assert relative(logits(adapted, ids), start) < 1e-5  # adapters begin with nought
    learning = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(learning) == 2 * 3 * 2
    assert all("lora_" in name for name in learning)
    held = huggingface.batch(text, False, 128)
    losses = [loss_on(adapted, held)]
    huggingface.train(adapted, text, False, 100, 3e-3)
    losses.append(loss_on(adapted, held))
    assert losses[1] < losses[0] - 0.02
    learned = logits(adapted, ids)
    merged = adapted.merge_and_unload().eval()
    after = dict(merged.named_parameters())
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("q_proj.weight", "v_proj.weight", "down_proj.weight"))}
    # the merged weight is quantized as a whole: nearer to what was learned than to what was before
    assert relative(logits(merged, ids), learned) < relative(start, learned)
    assert all(isinstance(m, QuantizedLayer) for m in merged.modules() if isinstance(m, nn.Linear))
    lowered = qat.lower(merged)
    assert sum(isinstance(m, FloatConv) for m in lowered.modules()) == 15
    torch.testing.assert_close(logits(lowered, ids), logits(merged, ids), rtol=1e-5, atol=1e-5)


def test_a_smoothed_model_is_prepared_like_any_other(trained: dict[str, nn.Module], text: Tensor) -> None:
    net, ids = copy.deepcopy(trained["llama"]), text[:256].view(8, 32)
    channels = torch.tensor([5, 40])
    with torch.no_grad():
        for block in net.model.layers:
            block.input_layernorm.weight[channels] *= 50
            block.post_attention_layernorm.weight[channels] *= 50
            for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj,
                          block.mlp.gate_proj, block.mlp.up_proj):  # fmt: skip
                layer.weight[:, channels] /= 50
    expected, errors = logits(net, ids), []
    for smoothed in (False, True):
        if smoothed:
            smooth(net, [{"input_ids": ids}])
        errors.append(relative(logits(prepared(net, qat.preset("int8"), ids), ids), expected))
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("preset", ["int8", "w4g32"])
def test_lowered_it_computes_what_was_simulated(
    name: str, preset: str, trained: dict[str, nn.Module], text: Tensor
) -> None:
    """The class and its code stay; every linear layer is an integer network, or one of stored integers."""
    ids = text[: 4 * 16].reshape(4, 16)
    prepared = qat.prepare(copy.deepcopy(trained[name]), qat.preset(preset), {"input_ids": ids})
    batches = [{"input_ids": ids}]
    finalize(prepared, batches, PTQConfig(), trained=False)
    lowered = qat.lower(prepared)
    assert type(lowered) is type(prepared)
    kind = IntegerConv if preset == "int8" else FloatConv
    layers = [m for m in prepared.modules() if isinstance(m, nn.Linear)]
    assert sum(isinstance(m, kind) for m in lowered.modules()) == len(layers) >= 14
    with torch.no_grad():
        simulated, integer = prepared(**batches[0]).logits, lowered(**batches[0]).logits
    assert_equal_but_for_a_tie(integer, simulated, tokens=int(preset == "int8"))


def assert_equal_but_for_a_tie(integer: Tensor, simulated: Tensor, tokens: int) -> None:
    """Logits of so many tokens may differ: an integer on the way to them lay on a tie, among a hundred thousand."""
    apart = (integer - simulated).abs().flatten(0, -2).amax(1)
    assert (apart > 2e-5 * (1 + simulated.abs().max())).sum() <= tokens
    assert apart.max() <= 0.05 * simulated.std()


LOWERED: dict[str, qat.QuantConfig] = {
    "int8": qat.preset("int8"),
    "w4g32": qat.preset("w4g32"),
    "w4g32a8_dynamic": qat.preset("w4g32a8_dynamic"),
    "w2g32": qat.preset("w2g32"),
    "nvfp4": qat.preset("nvfp4"),
    "mxfp4": qat.preset("mxfp4"),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("scheme", LOWERED)
@pytest.mark.parametrize("name", BUILD)
def test_trained_and_lowered_it_computes_what_was_simulated(
    name: str, scheme: str, trained: dict[str, nn.Module], text: Tensor
) -> None:
    ids = text[: 4 * 16].reshape(4, 16)
    result = prepared(copy.deepcopy(trained[name]), LOWERED[scheme], ids)
    before = logits(result, ids)
    huggingface.train(result, text, name == "bert", 4, 1e-3)
    finalize(result, [{"input_ids": ids}], PTQConfig(), trained=True)
    simulated = logits(result, ids)
    assert relative(simulated, before) > 1e-3  # it has learned
    assert_equal_but_for_a_tie(logits(qat.lower(result), ids), simulated, tokens=int(scheme == "int8"))


@pytest.mark.parametrize("name", BUILD)
def test_trained_and_lowered_at_16_bits_it_is_the_float_model(
    name: str, trained: dict[str, nn.Module], text: Tensor
) -> None:
    ids = text[: 4 * 16].reshape(4, 16)
    weight = {"bits": 16, "granularity": "channel", "range": "dynamic"}
    config = qat.QuantConfig.from_dict({"weight": weight, "activation": SIXTEEN, "input": SIXTEEN})
    net = copy.deepcopy(trained[name])
    result = prepared(net, config, ids)
    huggingface.train(result, text, name == "bert", 2, 1e-3)  # the float model has the same parameters
    finalize(result, [{"input_ids": ids}], PTQConfig(reestimate_ranges=True), trained=True)
    assert relative(logits(qat.lower(result), ids), logits(net.eval(), ids)) < 1e-3
