"""CharGPT, its task, and the main job on text."""

import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.analysis.summary import lower_is_better, pick_metric
from qat.export.parity import decisions
from qat.ptq import PTQConfig, finalize
from qat.zoo.gpt import CharGPT, SelfAttention
from qat.zoo.tasks import BitsPerCharacter, LanguageModel
from tests import zygote

SIZES = {"num_classes": 11, "context": 12, "n_layer": 2, "n_head": 2, "width": 16}


def gpt(**changes: int | float | bool) -> CharGPT:
    return CharGPT(**(SIZES | changes))  # type: ignore[arg-type]


def tokens(n: int = 3, length: int = 12) -> Tensor:
    return torch.randint(11, (n, length))


# --------------------------------------------------------------------------------------------------- the model


def test_a_position_depends_on_itself_and_on_those_before() -> None:
    net, x = gpt().eval(), tokens()
    changed = x.clone()
    changed[:, 7] = (x[:, 7] + 1) % 11
    difference = (net(x) - net(changed)).abs().amax((0, 2))
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0


def test_shorter_texts_are_read_as_the_beginning_of_longer_ones() -> None:
    net, x = gpt().eval(), tokens()
    assert torch.allclose(net(x[:, :5]), net(x)[:, :5], atol=1e-5)


def test_attention_equals_torchs_own() -> None:
    ours, theirs = SelfAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.load_state_dict({
        "in_proj_weight": ours.qkv.weight, "in_proj_bias": ours.qkv.bias,
        "out_proj.weight": ours.out.weight, "out_proj.bias": ours.out.bias,
    })  # fmt: skip
    x = torch.randn(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert torch.allclose(ours(x), expected, atol=1e-6)


def test_every_parameter_learns_and_dropout_is_for_training() -> None:
    net, x = gpt(dropout=0.5), tokens()
    loss = LanguageModel(11).loss(net(x), x)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = gpt(tied_head=True), gpt()
    assert tied.head.weight is tied.embedding.weight
    count = {net: sum(p.numel() for p in net.parameters()) for net in (tied, untied)}
    assert count[untied] - count[tied] == 11 * 16 + 11  # a weight and a bias


def test_a_fresh_model_predicts_all_characters_alike() -> None:
    x = tokens(64)
    loss = LanguageModel(11).loss(gpt()(x), torch.randint(11, x.shape))
    assert loss.item() == pytest.approx(math.log(11), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, r"n_head=3 .* divide width=16"),
        ({"dropout": 1.0}, r"dropout=1\.0 .* \[0, 1\)"),
        ({"n_layer": 0}, r"n_layer=0 .* at least 1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt(**change)


# ---------------------------------------------------------------------------------------------------- the task


def test_bits_per_character_by_hand() -> None:
    # p = 1/2, 1/4, 1/4 gives 1, 2 and 2 bits
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]]))
    metric = BitsPerCharacter()
    metric.update(logits, torch.tensor([[0, 1]]))
    assert float(metric.compute()) == pytest.approx(1.5)
    metric.update(logits[:, :1], torch.tensor([[2]]))  # every character counts the same, whatever batch it is in
    assert float(metric.compute()) == pytest.approx(5 / 3)
    assert float(LanguageModel(3).loss(logits, torch.tensor([[0, 1]]))) == pytest.approx(1.5 * math.log(2))


def test_fewer_bits_are_better_and_decisions_are_characters() -> None:
    assert lower_is_better("bits_per_character")
    assert pick_metric(LanguageModel(3).metrics()) == "bits_per_character"
    logits = torch.randn(2, 5, 3)
    assert torch.equal(decisions(logits, LanguageModel.class_dim), logits.argmax(2))
    with pytest.raises(ValueError, match=r"task\.num_classes=1"):
        LanguageModel(1)


# ------------------------------------------------------------------------------------------------- quantization


@pytest.mark.parametrize("tied", [False, True])
def test_at_16_bits_it_computes_what_the_float_model_computes(tied: bool) -> None:
    net, x = gpt(tied_head=tied).eval(), tokens()
    scheme = {"bits": 16, "granularity": "tensor"}
    config = qat.QuantConfig.from_dict({"weight": {**scheme, "range": "dynamic"}, "activation": scheme})
    prepared = qat.prepare(net, config, x)
    qat.calibrate(prepared, [x])
    expected, got = net(x), prepared(x)
    assert ((got - expected).norm() / expected.norm()).item() < 1e-3


@pytest.mark.parametrize("preset", ["int8", "w4a4_lsq"])
@pytest.mark.parametrize("tied", [False, True])
def test_training_lowers_the_loss_and_the_integers_are_those_of_training(tied: bool, preset: str) -> None:
    net, x = gpt(tied_head=tied, dropout=0.1), (torch.arange(12) % 11).expand(4, 12).contiguous()
    x = (x + torch.arange(4)[:, None]) % 11  # each character follows from the one before
    prepared = qat.prepare(net, qat.preset(preset), x)
    qat.calibrate(prepared, [x])
    optimizer = torch.optim.AdamW(prepared.parameters(), 3e-3)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(prepared(x).flatten(0, 1), ((x + 1) % 11).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    finalize(prepared, [x], PTQConfig(), trained=True)
    integer = qat.lower(prepared)
    with torch.no_grad():
        assert (prepared(x).argmax(2) == integer(x).argmax(2)).float().mean() >= 0.95


TEXT = "".join(f"{n} and {n + 1} are {2 * n + 1}. " for n in range(1500))


def test_the_main_job_on_text(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(TEXT)
    done = zygote.run(
        ["train.py", "experiment=char_gpt", "callbacks=quiet", f"data.path={tmp_path}",
         f"data.num_classes={len(set(TEXT))}", "data.context=16", "model.n_layer=1", "model.width=32",
         "trainer.max_epochs=2", f"hydra.run.dir={tmp_path / 'run'}"],
        tmp_path, {**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    bits = {stage: found["metrics"]["bits_per_character"] for stage, found in summary["stages"].items()}
    assert set(bits) == {"float", "ptq", "qat", "int8", "onnx"}
    assert bits["float"] < 0.7 * math.log2(len(set(TEXT)))  # it has learned something
    assert bits["qat"] < bits["float"]  # it goes on training
    assert bits["int8"] == pytest.approx(bits["qat"], abs=2e-3)
    assert bits["onnx"] == pytest.approx(bits["qat"], abs=2e-3)
    for pair in summary["parity"].values():
        assert pair["max_steps"] <= 1
        assert pair["equal_share"] >= 0.999
    reloaded = qat.load(tmp_path / "run" / "export" / "model.safetensors")
    assert reloaded.info["data"]["classes"] == sorted(set(TEXT))
    assert reloaded(torch.zeros(1, 16, dtype=torch.int64)).shape == (1, 16, len(set(TEXT)))
    report = (tmp_path / "run" / "report.html").read_text()
    assert "bits_per_character" in report
    assert "lower is better" in report


@pytest.mark.parametrize("mask", [False, True])
def test_an_unpickled_network_has_the_same_graph(mask: bool) -> None:
    """Attention is in steps there, each one operation that a new trace must not look into."""
    net: nn.Module = gpt().eval()
    inputs: tuple[Tensor, ...] = (tokens(),)
    if mask:
        net, inputs = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), (torch.randn(2, 5, 8),)
        inputs += (torch.ones(5, 5, dtype=torch.bool).triu(1),)
    prepared = qat.prepare(net, qat.preset("int8"), inputs)
    again = pickle.loads(pickle.dumps(prepared))
    assert sorted(str(n.target) for n in again.graph.nodes) == sorted(str(n.target) for n in prepared.graph.nodes)
    assert torch.equal(again(*inputs), prepared(*inputs))
