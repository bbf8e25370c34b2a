"""LoRA on quantized weights, by peft: merged on the way to every file, and said so."""

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.adapters import merge_adapters
from qat.export.compressed_run import open_compressed_tensors
from qat.ptq import PTQConfig, finalize
from tests.whole_way import config

peft = pytest.importorskip("peft", reason="pip install 'qat[hf]'")
SETTINGS = PTQConfig(bias_correction=False)


class Small(nn.Module):
    """Recorded as a whole, so that an int8 checkpoint can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def adapted(prepared: nn.Module, layers: str) -> Any:
    """With adapters that do something, around the layers whose paths fit a pattern (`quantizers.a` is none)."""
    torch.manual_seed(4)
    net = peft.get_peft_model(prepared, peft.LoraConfig(r=2, lora_alpha=4, target_modules=layers))
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.3)
    return net


@torch.no_grad()
def merged_by_hand(net: nn.Module) -> dict[str, Tensor]:
    """W + 2 B A of every adapted layer, from the parameters."""
    state = {name: p.clone() for name, p in net.named_parameters()}
    found = {}
    for name in [n.removesuffix(".lora_A.default.weight") for n in state if n.endswith("lora_A.default.weight")]:
        a, b = state[f"{name}.lora_A.default.weight"], state[f"{name}.lora_B.default.weight"]
        found[name.removeprefix("base_model.model.") + ".weight"] = state[f"{name}.base_layer.weight"] + 2 * b @ a
    return found


@torch.no_grad()
def test_an_int8_checkpoint_holds_the_merged_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net, x = Small(), torch.randn(32, 12)
    oracle = copy.deepcopy(net)
    prepared = qat.prepare(net, config(8), x)
    finalize(prepared, [x], SETTINGS, trained=False)
    tuned = adapted(prepared, "a|b")
    weights = merged_by_hand(tuned)
    assert "2 layers have adapters in float" in qat.report(tuned)
    with caplog.at_level(logging.WARNING, "qat.adapters"):
        finalize(tuned, [x], PTQConfig(reestimate_ranges=True), trained=True)
    said = "adapters of 2 layers were merged into their weights, which are quantized again: the outputs moved by "
    assert said in caplog.text
    assert said in " ".join(qat.report(tuned).split())
    oracle.load_state_dict(oracle.state_dict() | weights)
    expected = qat.prepare(oracle, config(8), x)
    finalize(expected, [x], SETTINGS, trained=False)
    lowered = qat.lower(tuned)
    qat.export(lowered, tmp_path, x, formats=["int8"])
    loaded = qat.load(tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(x), tuned.eval()(x), rtol=1e-4, atol=1e-4)
    step = expected.quantizers.a.qparams()[0] * weights["b.weight"].abs().max()
    assert (loaded(x) - expected(x)).abs().max() < step  # biases were rounded before the adapters, too
    assert all("lora" not in name for name, _ in loaded.named_modules())


@torch.no_grad()
def test_what_finalize_did_not_see_is_merged_when_it_is_lowered(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net, x = Small(), torch.randn(32, 12)
    prepared = qat.prepare(net, qat.preset("w8a8_dynamic"), x)
    qat.calibrate(prepared, [x])
    tuned = adapted(prepared, "a").eval()
    before = tuned(x)
    with caplog.at_level(logging.WARNING, "qat.adapters"):
        lowered = qat.lower(tuned)
    assert "was not measured" in caplog.text
    assert torch.equal(tuned(x), before)  # lowering leaves the network alone
    change = merge_adapters(tuned, [x])
    assert merge_adapters(tuned, [x]) is None
    assert change == pytest.approx(float((tuned(x) - before).norm() / before.norm()))
    torch.testing.assert_close(lowered(x), tuned(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(lowered(x), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("preset", ["w4g32", "w4g32a8_dynamic"])
def test_a_llama_with_adapters_is_exported_for_vllm(preset: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pip install 'qat[hf]'")
    pytest.importorskip("compressed_tensors", reason="pip install 'qat[hf]'")
    from tests.networks import huggingface

    torch.manual_seed(0)
    ids = torch.randint(huggingface.VOCABULARY, (4, 16))
    llama = huggingface.llama()
    prepared = qat.prepare(llama, qat.preset(preset, target="vllm"), {"input_ids": ids})
    finalize(prepared, [{"input_ids": ids}], SETTINGS, trained=False)
    tuned = adapted(prepared, r".*\.(q_proj|v_proj|down_proj)")
    huggingface.train(tuned, ids.flatten(), False, 3)
    with torch.no_grad():
        learned = tuned(input_ids=ids).logits
        qat.export(tuned, tmp_path, ids, formats=["compressed_tensors"])
        assert torch.equal(tuned(input_ids=ids).logits, learned)
        loaded = open_compressed_tensors(next(tmp_path.iterdir()))
        change = merge_adapters(tuned, [{"input_ids": ids}])
        merged = tuned(input_ids=ids).logits
    assert change is not None
    assert change > 1e-3
    result = loaded(ids)
    result = getattr(result, "logits", result)
    torch.testing.assert_close(result, merged, rtol=1e-4, atol=1e-4)
    assert (result - learned).norm() > 10 * (result - merged).norm()
