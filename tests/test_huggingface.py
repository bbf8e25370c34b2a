"""Hugging Face's transformers as they come: a small Llama and a small BERT."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qat.ptq import smooth

pytest.importorskip("transformers", reason="pip install 'qat[hf]'")
from tests.networks import huggingface

BUILD = {"llama": huggingface.llama, "bert": huggingface.bert}


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Tiny Shakespeare; where it is not at hand, another text in English."""
    if huggingface.FILE.is_file():
        return huggingface.characters()
    prose = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text()
    return torch.tensor([ord(character) % huggingface.VOCABULARY for character in prose])


@pytest.fixture(scope="module")
def trained(text: Tensor) -> dict[str, nn.Module]:
    """Both, after some steps on the text."""
    nets = {}
    for name, build in BUILD.items():
        torch.manual_seed(0)
        nets[name] = build()
        losses = huggingface.train(nets[name], text, name == "bert", 60)
        assert min(losses[-5:]) < 0.9 * losses[0]
    return nets


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@torch.no_grad()
def logits(net: nn.Module, ids: Tensor) -> Tensor:
    return net(input_ids=ids).logits


def quantized_plainly(net: nn.Module, ids: Tensor, alpha: float | None) -> float:
    """Error of the logits with weights in 8 bits a row and inputs of all linear layers in 8 bits a tensor, by hooks."""
    net, expected = copy.deepcopy(net), logits(net, ids)
    if alpha is not None:
        smooth(net, [{"input_ids": ids}], alpha)

    def rounded(x: Tensor, scale: Tensor) -> Tensor:
        return (x / scale).round() * scale

    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(rounded(layer.weight, layer.weight.abs().amax(1, keepdim=True) / 127))
                layer.register_forward_pre_hook(lambda _, args: (rounded(args[0], args[0].abs().max() / 127),))
    return relative(logits(net, ids), expected)


@pytest.mark.parametrize("multiply", [True, False])
@pytest.mark.parametrize("name", BUILD)
def test_smoothing_leaves_the_function(trained: dict[str, nn.Module], text: Tensor, name: str, multiply: bool) -> None:
    net, ids = copy.deepcopy(trained[name]), text[:256].view(8, 32)
    expected = logits(net, ids)
    report = smooth(net, [{"input_ids": ids}], multiply=multiply)
    assert relative(logits(net, ids), expected) < 1e-5
    places = {layer: entry.place for entry in report for layer in entry.layers}
    if name == "llama":
        assert len(places) == 2 * 7 + 1
        for i in range(2):
            for part in "qkv":
                assert places[f"model.layers.{i}.self_attn.{part}_proj"] == f"model.layers.{i}.input_layernorm"
            for part in ("gate", "up"):
                assert places[f"model.layers.{i}.mlp.{part}_proj"] == f"model.layers.{i}.post_attention_layernorm"
    else:  # norms stand behind the residual, which reads them, too
        assert places["bert.encoder.layer.0.intermediate.dense"] == ("multiplication" if multiply else "")
        [tied] = [entry for entry in report if entry.layers == ("cls.predictions.decoder",)]
        assert "shared" in tied.reason


def test_smoothing_helps_where_channels_stick_out(trained: dict[str, nn.Module], text: Tensor) -> None:
    net, ids = copy.deepcopy(trained["llama"]), text[:256].view(8, 32)
    channels = torch.tensor([5, 40])
    with torch.no_grad():  # as in large models: few channels of the norms' outputs, small weights behind them
        for block in net.model.layers:
            block.input_layernorm.weight[channels] *= 50
            block.post_attention_layernorm.weight[channels] *= 50
            for layer in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj,
                          block.mlp.gate_proj, block.mlp.up_proj):  # fmt: skip
                layer.weight[:, channels] /= 50
    assert quantized_plainly(net, ids, 0.5) < quantized_plainly(net, ids, None) / 4
