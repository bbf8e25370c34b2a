"""Models of transformers in the main job: trained, exported as compressed-tensors, read back."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.export import check_network
from qat.zoo.language_models import CausalLM
from tests import zygote

pytest.importorskip("transformers", reason="pip install 'qat[hf]'")

TEXT = "".join(f"{n} and {n + 1} are {2 * n + 1}. " for n in range(1000))
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 1}  # fmt: skip
FLOAT_ENDS = [{"match": "type:Embedding", "weight": {"bits": None}}, {"match": "*.lm_head", "weight": {"bits": None}}]


def train(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    (folder / "input.txt").write_text(TEXT)
    return zygote.run(
        ["train.py", "data=tiny_shakespeare", "model=llama", "callbacks=quiet", f"data.path={folder}",
         f"data.num_classes={len(set(TEXT))}", "data.context=16", "trainer.max_epochs=1",
         *(f"model.settings.{name}={value}" for name, value in SMALL.items()), f"hydra.run.dir={folder / 'run'}",
         *settings],
        folder, {**os.environ, "COLUMNS": "200"},
    )  # fmt: skip


@pytest.mark.slow
def test_the_main_job_trains_a_llama_and_exports_it(tmp_path: Path) -> None:
    done = train(tmp_path, "target=vllm", "quant=w4g32")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    folder = tmp_path / "run" / summary["files"]["compressed_tensors"]
    about = json.loads((folder / "config.json").read_text())
    assert about["architectures"] == ["LlamaForCausalLM"]
    assert about["quantization_config"]["format"] == "pack-quantized"
    assert about["quantization_config"]["ignore"] == ["lm_head"]
    if importlib.util.find_spec("compressed_tensors") is None:  # the file is there, and the run says what is missing
        assert (
            "its parity is not measured: opening it needs the package compressed_tensors" in done.stderr + done.stdout
        )
        assert "pip install 'qat[hf]'" in summary["unread"]["compressed_tensors"]
        assert summary["parity"] == {}
        return
    stages = {name: stage["metrics"]["bits_per_character"] for name, stage in summary["stages"].items()}
    assert set(stages) == {"float", "ptq", "qat", "compressed_tensors"}
    assert stages["compressed_tensors"] == stages["qat"] < stages["float"]
    assert (
        summary["parity"]["qat_compressed_tensors"] | {"max_abs": 0, "agreement": 1}
        == (summary["parity"]["qat_compressed_tensors"])
    )
    assert "QAT / compressed-tensors" in done.stdout


def test_what_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    done = train(tmp_path, "export=compressed_tensors", "quant=w4g32", "quant.graph=layers")
    assert done.returncode == 1
    assert "leave it float: quant.rules=[{match: 'type:Embedding'" in done.stdout + done.stderr
    assert not (tmp_path / "run" / "float.safetensors").exists()
    config = qat.QuantConfig.from_dict({"weight": {"bits": 8}, "graph": "layers", "rules": FLOAT_ENDS})
    prepared = qat.prepare(small(), config, torch.zeros(2, 8, dtype=torch.int64))
    check_network(prepared, ["compressed_tensors"])
    with pytest.raises(ValueError, match=r"CausalLM is quantized in parts.*export\.formats=\[compressed_tensors\]"):
        check_network(prepared, ["compressed_tensors", "int8"])


def small(**changes: Any) -> CausalLM:
    return CausalLM(num_classes=12, context=16, settings=SMALL, **changes)


def test_a_new_model_and_one_from_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, ids = small().eval(), torch.arange(12).reshape(1, 12)
    assert type(net.model).__name__ == "LlamaForCausalLM"
    assert net.model.config.vocab_size == 12
    net.model.save_pretrained(tmp_path)
    again = CausalLM(num_classes=10, context=16, path=str(tmp_path)).eval()
    with torch.no_grad():
        assert net(ids).shape == (1, 12, 12)
        assert torch.equal(again(ids), net(ids))
    assert type(small(model_type="qwen3").model).__name__ == "Qwen3ForCausalLM"
    with pytest.raises(ValueError, match="knows 12 tokens, the data have 65"):
        CausalLM(num_classes=65, context=16, path=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"model\.path='nowhere'"):
        CausalLM(num_classes=65, context=16, path="nowhere")


def test_the_exporter_takes_the_prepared_model_only() -> None:
    net, ids = small(), torch.zeros(2, 8, dtype=torch.int64)
    scheme = {"bits": 8, "granularity": "channel", "range": "dynamic"}
    config = qat.QuantConfig.from_dict({"weight": scheme, "graph": "layers", "rules": FLOAT_ENDS})
    prepared = qat.prepare(net, config, ids)
    with pytest.raises(ValueError, match="lowered in parts"):
        qat.export(prepared, "unused", ids, formats=["int8", "compressed_tensors"])
    linear = qat.prepare(torch.nn.Linear(4, 4), qat.preset("w4g32"), torch.zeros(2, 4))
    qat.calibrate(linear, [torch.zeros(2, 4)])
    qat.set_mode(linear, "quantize")
    with pytest.raises(ValueError, match=r"qat\.export\(prepared, \.\.\.\)\. For an IntegerNetwork use int8 or onnx"):
        qat.export(qat.lower(linear), "unused", torch.zeros(2, 4), formats=["compressed_tensors"])
