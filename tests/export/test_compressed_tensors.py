"""Folders of compressed-tensors, read back by transformers and the package of that name, which did not write them."""

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

import qat
from qat.export import compressed_tensors, sums
from qat.export.agreement import ParityError, ParityLimits
from qat.export.compressed_run import open_compressed_tensors
from qat.export.compressed_tensors import save_compressed_tensors, simulated_as
from qat.export.parity import measure
from qat.fake_quant import FakeQuantize
from qat.layers import QuantizedLayer
from qat.mode import Mode
from qat.ptq import PTQConfig, finalize
from qat.scheme import Granularity, TensorScheme
from qat.targets.compressed import check_compressed

transformers = pytest.importorskip("transformers", reason="pip install 'qat[hf]'")
from tests.export.test_bad_input import full_disk  # noqa: E402
from tests.networks import huggingface  # noqa: E402

CHANNEL = {"bits": 8, "granularity": "channel", "range": "dynamic"}
KEPT = {"bits": 8, "range": "fixed"}
TOKEN = {"bits": 8, "granularity": "token", "range": "dynamic"}
FLOAT_ENDS = [{"match": "lm_head", "weight": {"bits": None}}, {"match": "type:Embedding", "weight": {"bits": None}}]


def group(bits: int, **changes: Any) -> dict[str, Any]:
    return {"bits": bits, "granularity": "group", "group_size": 32, "range": "dynamic", **changes}


E4M3 = {**CHANNEL, "format": "e4m3fn"}
NVFP4 = group(4, format="nvfp4", group_size=16)
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "w8a8_dynamic": ("int-quantized", {"weight": {**CHANNEL, "narrow_range": True}, "activation": TOKEN}),
    "w8a8": ("int-quantized", {"weight": CHANNEL, "activation": KEPT}),
    "w8a8_asymmetric": ("int-quantized", {"weight": CHANNEL, "activation": {**KEPT, "symmetric": False}}),
    "w8a8_learned": ("int-quantized", {"weight": {**CHANNEL, "range": "lsq"}, "activation": {**KEPT, "range": "lsq"}}),
    "w8a16": ("pack-quantized", {"weight": CHANNEL}),
    "w8a16_tensor": ("pack-quantized", {"weight": {"bits": 8, "range": "dynamic"}}),
    "w4a8_dynamic": ("int-quantized", {"weight": group(4), "activation": TOKEN}),
    "w4g32": ("pack-quantized", {"weight": group(4)}),
    "w4_dorefa": ("pack-quantized", {"weight": {**CHANNEL, "bits": 3, "range": "dorefa"}}),
    "w4g32_asymmetric": ("pack-quantized", {"weight": group(4, symmetric=False)}),
    "w4_asymmetric": ("pack-quantized", {"weight": {**CHANNEL, "bits": 4, "symmetric": False}}),
    "w8g32_asymmetric": ("pack-quantized", {"weight": group(8, symmetric=False)}),
    "fp8": ("float-quantized", {"weight": E4M3, "activation": {**KEPT, "format": "e4m3fn"}}),
    "fp8_dynamic": ("float-quantized", {"weight": E4M3, "activation": {**TOKEN, "format": "e4m3fn"}}),
    "fp8_weights": ("float-quantized", {"weight": E4M3}),
    "nvfp4": ("nvfp4-pack-quantized", {"weight": NVFP4}),
    "nvfp4_a4": ("nvfp4-pack-quantized", {"weight": NVFP4, "activation": {**NVFP4, "range": "fixed"}}),
    "mxfp4": ("mxfp4-pack-quantized", {"weight": group(4, format="mxfp4")}),
}  # fmt: skip
WEIGHTS_ONLY = [name for name, (_, scheme) in SCHEMES.items() if "activation" not in scheme]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    with caplog.at_level(logging.ERROR, "qat.prepare"):
        yield


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(huggingface.VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def float_net(ids: Tensor) -> nn.Module:
    """A Llama after a few steps: logits of some size, scales that differ."""
    torch.manual_seed(0)
    net = huggingface.llama()
    huggingface.train(net, ids.flatten(), False, 10)
    return net


def prepared(net: nn.Module, scheme: dict[str, Any], ids: Tensor, **changes: Any) -> Any:
    data = {"graph": "layers", "rules": FLOAT_ENDS, **scheme, **changes}
    result = qat.prepare(copy.deepcopy(net), qat.QuantConfig.from_dict(data), {"input_ids": ids})
    finalize(result, [{"input_ids": ids}], PTQConfig(bias_correction=False), trained=False)
    return result


def loaded(folder: Path, unpacked: bool = False) -> Any:
    pytest.importorskip("compressed_tensors", reason="pip install 'qat[hf]'")
    settings = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if unpacked else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


@torch.no_grad()
def logits(net: nn.Module, ids: Tensor) -> Tensor:
    return net(input_ids=ids).logits.float()


def quantized(net: nn.Module) -> dict[str, Any]:
    return {name: m for name, m in net.named_modules() if isinstance(m, QuantizedLayer)}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@torch.no_grad()
def with_rounded_weights(net: nn.Module, simulated: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The float model, its weights replaced by what training simulated, in a dtype."""
    state = net.state_dict() | {f"{name}.weight": m.quantized_weight() for name, m in quantized(simulated).items()}
    result = type(net)._from_config(copy.deepcopy(net.config), dtype=dtype)
    result.load_state_dict({name: t.to(dtype) for name, t in state.items()})
    return result.eval()


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_reads_it_and_gives_the_same_logits(
    name: str, float_net: nn.Module, ids: Tensor, tmp_path: Path
) -> None:
    form, scheme = SCHEMES[name]
    simulated = prepared(float_net, scheme, ids)
    save_compressed_tensors(simulated, tmp_path / "out")
    about = config_of(tmp_path / "out")
    assert about["format"] == about["config_groups"]["group_0"]["format"] == form
    assert about["ignore"] == ["lm_head"]
    # compressed-tensors 0.20 gives packed zero points no room of their shape when it loads them packed
    net = loaded(tmp_path / "out", unpacked=name in WEIGHTS_ONLY and "asymmetric" in name)
    expected, got = logits(simulated, ids), logits(net, ids)
    for path, layer in quantized(simulated).items():
        weight = net.get_submodule(path).weight
        assert torch.equal(weight, layer.quantized_weight().to(weight.dtype)), path
    run = open_compressed_tensors(tmp_path / "out")
    ours = logits(simulated_as(simulated, tmp_path / "out"), ids)
    torch.testing.assert_close(run(ids), ours, atol=0.01 if name == "w8a8_asymmetric" else 0, rtol=0)
    if "fp4" in name:  # the package unpacks them to bfloat16, and computes in that
        expected = ours
    if name in ("nvfp4", "mxfp4"):
        assert torch.equal(ours, logits(with_rounded_weights(float_net, simulated, torch.bfloat16), ids))
    if name in ("w8a8_dynamic", "w4a8_dynamic"):  # the package divides by 127.5, vLLM's kernel (and training) by 127
        assert (got - expected).abs().max() < 0.02 * expected.abs().max()
        got = logits(dynamic_as_vllm(net), ids)
    if name == "w8a8_asymmetric":  # the package rounds x / s + z, others x / s: a step apart where that makes a tie
        assert_inputs_within_a_step(simulated, net, ids)
    else:
        assert torch.equal(got, expected)
    assert (expected - logits(float_net, ids)).abs().max() > 0


def dynamic_as_vllm(net: Any) -> Any:
    """Inputs of linear layers as vLLM's kernel makes them: int8 by the largest magnitude of a token over 127."""

    def by_token(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        scale = args[0].abs().amax(-1, keepdim=True) / 127
        return (torch.round(args[0] / scale) * scale,)

    for module in net.modules():
        if isinstance(module, nn.Linear) and hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
            module.register_forward_pre_hook(by_token)
    return net


@torch.no_grad()
def assert_inputs_within_a_step(simulated: nn.Module, net: Any, ids: Tensor) -> None:
    """Every layer of `net`, given what the same layer reads in training, quantizes it as training does."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    steps: list[Tensor] = []

    def compare(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor]) -> None:
            other = net.get_submodule(name)
            theirs = forward_quantize(other, args[0], "input", other.quantization_scheme.input_activations)
            steps.append(((theirs - module.read(args[0])) / module.input_quantizer.qparams()[0]).abs().flatten())

        return hook

    handles = [m.register_forward_pre_hook(compare(name)) for name, m in quantized(simulated).items()]
    logits(simulated, ids)
    for handle in handles:
        handle.remove()
    apart = torch.cat(steps)
    assert len(steps) == 14
    assert apart.max() < 1.01
    assert (apart > 0.5).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_inputs_are_the_packages(dtype: torch.dtype) -> None:
    """NVFP4 inputs in training, against what the package computes by the preset of that name."""
    pytest.importorskip("compressed_tensors", reason="pip install 'qat[hf]'")
    from compressed_tensors.quantization import QuantizationStatus, quant_scheme
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize
    from compressed_tensors.quantization.utils import generate_gparam

    args = quant_scheme.NVFP4["input_activations"]
    scheme = TensorScheme(format="nvfp4", bits=4, granularity=Granularity.group, group_size=16, axis=-1, range="fixed")
    quantizer = FakeQuantize(scheme, activation=[4, 5, 64])
    generator = torch.Generator().manual_seed(0)
    seen = torch.randn(4, 5, 64, generator=generator).to(dtype)
    quantizer.observe(seen)
    quantizer.set_range_from_observer()
    quantizer.mode = Mode.quantize
    layer = nn.Linear(64, 1)
    layer.quantization_status = QuantizationStatus.FROZEN
    layer.input_global_scale = 1 / quantizer.range.scale.reshape(1)
    torch.testing.assert_close(layer.input_global_scale, generate_gparam(seen.float().min(), seen.float().max()))
    sizes = torch.tensor([1e-7, 4e-6, 1e-2, 1.0, 3.0]).reshape(5, 1)
    x = (torch.randn(300, 5, 64, generator=generator) * sizes).to(dtype)
    x[:, 0, :16] = 0
    y = quantizer(x)
    assert y.dtype == dtype
    assert torch.equal(y, forward_quantize(layer, x, "input", args))
    blocks = y.float().reshape(300, 5, 4, 16).abs().amax(-1)
    assert (blocks[:, 1] == 0).any()  # where a block's scale rounds to 0
    assert (blocks[:, 1] > 0).any()
    assert blocks[:, 4].max() == seen.abs().max()  # what is beyond the range saturates


def test_rules_become_groups(float_net: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    rules = [
        {"match": "*.mlp.down_proj", "weight": {"bits": 8, "granularity": "channel", "group_size": None}},
        {"match": "*.layers.0.self_attn.o_proj", "weight": {"bits": None}},
        *FLOAT_ENDS,
    ]
    simulated = prepared(float_net, {"weight": group(4)}, ids, rules=rules)
    save_compressed_tensors(simulated, tmp_path)
    about = config_of(tmp_path)
    assert about["format"] == "pack-quantized"
    assert about["ignore"] == ["model.layers.0.self_attn.o_proj", "lm_head"]
    downs = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert [g["targets"] for g in about["config_groups"].values()][1] == downs
    assert [(g["weights"]["num_bits"], g["weights"]["group_size"]) for g in about["config_groups"].values()] == [
        (4, 32), (8, None)
    ]  # fmt: skip
    assert torch.equal(logits(loaded(tmp_path), ids), logits(simulated, ids))


def test_formats_are_mixed(float_net: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    rules = [
        {"match": "*.mlp.*", "weight": {"format": "e4m3fn"}, "activation": {"format": "e4m3fn"}},
        {"match": "*.v_proj", "activation": {"bits": None}},
        *FLOAT_ENDS,
    ]
    simulated = prepared(float_net, {"weight": CHANNEL, "activation": KEPT}, ids, rules=rules)
    save_compressed_tensors(simulated, tmp_path)
    about = config_of(tmp_path)
    assert about["format"] == "mixed-precision"
    formats = {group["format"]: len(group["targets"]) for group in about["config_groups"].values()}
    assert formats == {"int-quantized": 6, "pack-quantized": 2, "float-quantized": 6}
    assert torch.equal(logits(loaded(tmp_path), ids), logits(simulated, ids))


@pytest.mark.parametrize("head", ["float", "quantized"])
def test_tied_embeddings(head: str, ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = huggingface.llama(tie_word_embeddings=True).eval()
    simulated = prepared(net, {"weight": group(4)}, ids, rules=FLOAT_ENDS if head == "float" else FLOAT_ENDS[1:])
    save_compressed_tensors(simulated, tmp_path)
    names = set(tensors_of(tmp_path))
    assert "model.embed_tokens.weight" in names
    assert {n for n in names if "lm_head" in n} == (
        set() if head == "float" else {f"lm_head.weight_{n}" for n in ("packed", "scale", "shape")}
    )
    assert torch.equal(logits(loaded(tmp_path), ids), logits(simulated, ids))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_trained_model_in_bfloat16_and_its_size(float_net: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    net = copy.deepcopy(float_net).bfloat16()
    save_compressed_tensors(prepared(net, {"weight": group(4)}, ids), tmp_path)
    packed = [t for name, t in tensors_of(tmp_path).items() if name.endswith("weight_packed")]
    weights = sum(m.weight.numel() for m in float_net.modules() if isinstance(m, nn.Linear)) - 66 * 64
    assert sum(t.nbytes for t in packed) == weights // 2
    assert tensors_of(tmp_path)["model.norm.weight"].dtype == torch.bfloat16
    assert loaded(tmp_path).dtype == torch.bfloat16


def test_training_goes_into_the_file(ids: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = qat.QuantConfig.from_dict({"graph": "layers", "rules": FLOAT_ENDS, "weight": group(4)})
    trained = qat.prepare(huggingface.llama(), config, {"input_ids": ids})
    qat.calibrate(trained, [{"input_ids": ids}])
    huggingface.train(trained, ids.flatten(), False, 5)
    finalize(trained, [{"input_ids": ids}], PTQConfig(), trained=True)
    save_compressed_tensors(trained, tmp_path)
    assert torch.equal(logits(loaded(tmp_path), ids), logits(trained, ids))


@pytest.mark.parametrize("name", ["nvfp4_a4", "w8a8_asymmetric"])
def test_parity_asks_each_layer_of_the_folder(name: str, float_net: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="pip install 'qat[hf]'")
    simulated = prepared(float_net, SCHEMES[name][1], ids)
    save_compressed_tensors(simulated, tmp_path / "out")
    files = {"compressed_tensors": tmp_path / "out"}
    parity = measure(simulated, simulated, files, ids, class_dim=2)["qat_compressed_tensors"]
    assert [row.name for row in parity.linear] == list(quantized(simulated))
    assert {row.unequal_weights for row in parity.linear} == {0}
    assert min(row.equal_inputs for row in parity.linear) >= (0.999 if name == "w8a8_asymmetric" else 1)
    assert max(row.rounding for row in parity.linear) <= 1
    assert "14 linear layers one by one" in parity.notes[0]
    assert len(parity.to_dict(layers=True)["linear"]) == 14
    parity.check("qat_compressed_tensors", ParityLimits(agreement=0.99))

    folder, path = tmp_path / "out", "model.layers.1.mlp.up_proj"
    for key, change, breach in (
        ("weight_packed" if "nvfp4" in name else "weight", lambda t: t.view(torch.uint8).bitwise_xor_(16), "weights"),
        ("input_global_scale", lambda t: t.mul_(1.4), "inputs"), ("input_scale", lambda t: t.mul_(1.4), "inputs"),
    ):  # fmt: skip
        tensors = tensors_of(folder)
        if f"{path}.{key}" not in tensors:
            continue
        change(tensors[f"{path}.{key}"].view(-1)[:1])
        (folder / "model.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        (folder / sums.NAME).unlink()
        with pytest.raises(ParityError, match=rf"layer '{path}' departs given equal inputs: .* {breach} ") as error:
            measure(simulated, simulated, files, ids, class_dim=2)["qat_compressed_tensors"].check("", ParityLimits())
        assert "\n  " in str(error.value)
        save_compressed_tensors(simulated, folder)


def test_two_exports_are_the_same_bytes(float_net: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    files = ["SHA256SUMS", "config.json", "generation_config.json", "model.safetensors"]
    for folder in ("a", "b"):
        save_compressed_tensors(prepared(float_net, {"weight": group(4)}, ids), tmp_path / folder)
        assert sorted(file.name for file in (tmp_path / folder).iterdir()) == files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    for file in files[1:]:
        content = (tmp_path / "b" / file).read_bytes()
        (tmp_path / "b" / file).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(ValueError, match=rf"{file}' was edited or damaged"):
            open_compressed_tensors(tmp_path / "b")
        (tmp_path / "b" / file).write_bytes(content)
    (tmp_path / "b" / "tokenizer.json").write_text("{}")  # what is added later is nobody's damage
    assert torch.equal(open_compressed_tensors(tmp_path / "b")(ids), open_compressed_tensors(tmp_path / "a")(ids))


BUILD = """
import sys
from pathlib import Path
import torch
from qat.export import sums
from qat.export.compressed_tensors import save_compressed_tensors
from tests.export.test_compressed_tensors import group, prepared
from tests.networks import huggingface
torch.manual_seed(0)
ids = torch.randint(huggingface.VOCABULARY, (2, 8))
save_compressed_tensors(prepared(huggingface.llama(), {"weight": group(4)}, ids), sys.argv[1])
print(sums.text(sums.of_folder(Path(sys.argv[1]))))
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    done = [
        subprocess.run(
            [sys.executable, "-c", BUILD, str(tmp_path / seed)], cwd=Path(__file__).parents[2], check=True,
            env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, text=True,
        ) for seed in ("1", "2")
    ]  # fmt: skip
    assert done[0].stdout == done[1].stdout
    assert done[0].stdout.count("\n") >= 3


def test_the_earlier_folder_survives_a_failure_and_keeps_what_is_not_written(
    float_net: nn.Module, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulated, folder = prepared(float_net, {"weight": group(4)}, ids), tmp_path / "out"
    save_compressed_tensors(simulated, folder)
    (folder / "tokenizer.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args: Any) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(compressed_tensors, "save", full)
        with pytest.raises(OSError, match="No space left"):
            save_compressed_tensors(simulated, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with full_disk(16384), pytest.raises(OSError, match="File too large"):
        save_compressed_tensors(simulated, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    save_compressed_tensors(prepared(float_net, {"weight": group(8)}, ids), folder)
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert after.keys() == before.keys()
    assert after["tokenizer.json"] == b"{}"
    assert after["model.safetensors"] != before["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_something_else_is_left_alone(float_net: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is there, and is no earlier export: name a new or an empty folder"):
        save_compressed_tensors(prepared(float_net, {"weight": group(4)}, ids), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "3 bits": ({"weight": group(3)}, r"quant\.weight\.bits=3: .*vLLM has kernels", "bits=4"),
    "6 bits": ({"weight": {**CHANNEL, "bits": 6}}, r"quant\.weight\.bits=6", "bits=4"),
    "groups of 48": ({"weight": group(4, group_size=48)}, r"quant\.weight\.group_size=48", "group_size=32"),
    "k-means": (
        {"weight": {"bits": 4, "format": "codebook", "range": "learned"}},
        r"quant\.weight\.format=codebook",
        "format=int",
    ),
    "e5m2": ({"weight": {**CHANNEL, "format": "e5m2"}}, r"quant\.weight\.format=e5m2", "format=e4m3fn"),
    "fp8 in groups": ({"weight": group(8, format="e4m3fn")}, r"granularity=group: .*e4m3fn", "granularity=channel"),
    "blocks": (
        {"weight": {"bits": 8, "granularity": "block", "block_size": [16, 16], "range": "dynamic"}},
        r"quant\.weight\.granularity=block",
        "granularity=channel",
    ),
    "DoReFa": ({"weight": {**CHANNEL, "bits": 4, "range": "dorefa"}}, r"quant\.weight\.bits=4: .*3, 7", "bits=3"),
    "w4a8, kept": ({"weight": group(4), "activation": KEPT}, r"quant\.activation\.granularity=tensor", "=token"),
    "groups and activations": ({"weight": group(8), "activation": TOKEN}, r"quant\.weight\.bits=8: .*W4A8", "bits=4"),
    "narrow activations": (
        {"weight": CHANNEL, "activation": {**KEPT, "narrow_range": True}},
        r"quant\.activation\.narrow_range=true: .*all 256",
        "narrow_range=false",
    ),
    "asymmetric weights and activations": (
        {"weight": {**CHANNEL, "symmetric": False}, "activation": KEPT},
        r"quant\.weight\.symmetric=false",
        "symmetric=true",
    ),
    "activations of 6 bits": (
        {"weight": CHANNEL, "activation": {"bits": 6}}, r"quant\.activation\.bits=6", "bits=8"
    ),
    "another format": (
        {"weight": CHANNEL, "activation": {**KEPT, "format": "e4m3fn"}},
        r"quant\.activation\.format=e4m3fn: .*takes activations as int",
        "format=int",
    ),
    "asymmetric dynamic": (
        {"weight": CHANNEL, "activation": {**TOKEN, "symmetric": False}},
        r"quant\.activation\.symmetric=false",
        "symmetric=true",
    ),
    "channels of activations": (
        {"weight": CHANNEL, "activation": {**KEPT, "granularity": "channel"}},
        r"quant\.activation\.granularity=channel",
        "granularity=tensor",
    ),
    "mxfp4 activations": (
        {"weight": group(4, format="mxfp4"), "activation": group(4, format="mxfp4")},
        r"quant\.activation\.bits=4: .*engines round",
        "bits=null",
    ),
    "nvfp4 activations whose scales are all computed": (
        {"weight": NVFP4, "activation": {**NVFP4}}, r"quant\.activation\.range=dynamic: .*one float32", "range=running"
    ),
    "of a rule": (
        {"weight": CHANNEL, "rules": [{"match": "*", "weight": {"bits": 2}}]},
        r"quant\.rules\[0\]\.weight\.bits=2",
        "bits=4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_field_and_the_nearest_scheme_which_is_accepted(name: str) -> None:
    data, field, nearest = REFUSED[name]
    for _ in range(4):  # a scheme may be wrong in several ways: each refusal leads on
        try:
            check_compressed(qat.QuantConfig.from_dict(data))
            break
        except ValueError as error:
            message = str(error)
        if field:
            with pytest.raises(ValueError, match=field):
                check_compressed(qat.QuantConfig.from_dict(data))
            assert nearest in message
            field = ""
        data = followed(data, message)
    else:
        pytest.fail(f"still refused: {message}")
    assert not field


def followed(data: dict[str, Any], message: str) -> dict[str, Any]:
    """The configuration with what a refusal says to write."""
    changed = copy.deepcopy(data)
    for change in message.rpartition("; use ")[2].partition(", or ")[0].split(" "):
        path, _, value = change.partition("=")
        *where, role, name = path.split(".")
        part = changed["rules"][0] if len(where) > 1 else changed
        plain = {"null": None, "true": True, "false": False}
        part.setdefault(role, {})[name] = plain[value] if value in plain else int(value) if value.isdigit() else value
    return changed


def test_what_the_file_cannot_hold_is_named_with_what_to_do(float_net: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    def refused(match: str, scheme: dict[str, Any], **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            save_compressed_tensors(prepared(float_net, scheme, ids, **changes), tmp_path)

    int8 = {"weight": CHANNEL, "activation": KEPT, "input": KEPT}
    refused(r"'model\.embed_tokens' \(QuantEmbedding\).*leave it float: quant\.rules=\[\{match: 'type:Embedding'",
            {"weight": group(4)}, rules=[])  # fmt: skip
    refused(r"layer 'model\.layers\.0\.self_attn\.q_proj': quant\.weight\.bits=3", {"weight": group(3)})
    refused(r"its 64 inputs are no multiple of quant\.weight\.group_size=128",
            {"weight": group(4, group_size=128, allow_padding=True)})  # fmt: skip
    refused(r"stand between layers .*Prepare with quant\.graph=layers", int8, graph="auto")
    with pytest.raises(ValueError, match="no linear layer of LlamaForCausalLM is quantized"):
        save_compressed_tensors(float_net, tmp_path)
    uncalibrated = qat.prepare(
        copy.deepcopy(float_net), qat.QuantConfig.from_dict({**int8, "graph": "layers", "rules": FLOAT_ENDS}), ids
    )
    with pytest.raises(RuntimeError, match=r"ha(s|ve) no range yet"):
        save_compressed_tensors(uncalibrated, tmp_path)
    with pytest.raises(
        ValueError, match=r"one model of transformers; Linear has none in it\. Prepare one with quant\.graph=layers"
    ):
        save_compressed_tensors(nn.Linear(2, 2), tmp_path)
    assert not list(tmp_path.iterdir())


def test_biases_that_the_class_would_drop_are_refused(float_net: nn.Module, ids: Tensor, tmp_path: Path) -> None:
    config = qat.QuantConfig.from_dict({"graph": "layers", "rules": FLOAT_ENDS, "weight": group(4)})
    simulated = qat.prepare(copy.deepcopy(float_net), config, {"input_ids": ids})
    finalize(simulated, [{"input_ids": ids}], PTQConfig(), trained=False)
    with pytest.raises(ValueError, match=r"has no .*\.bias.* and 11 more.*PTQConfig\(bias_correction=False\)"):
        save_compressed_tensors(simulated, tmp_path / "out")
