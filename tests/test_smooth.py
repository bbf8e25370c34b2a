"""SmoothQuant: the float function stays, W8A8's error falls where channels stick out."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from safetensors.torch import load_file
from torch import Tensor, nn

import qat
from qat import hydra_schema
from qat.ptq import PTQConfig, finalize, smooth
from qat.zoo.gpt import CharGPT

WIDTH = 32


class OwnRMSNorm(nn.Module):
    """As Llama's: an ordinary module, not torch's class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class OffsetRMSNorm(OwnRMSNorm):
    """As Gemma's: the factor is 1 + weight, which dividing the weight does not divide."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * F.rms_norm(x, (WIDTH,))


class Net(nn.Module):
    """A norm that two layers read; what a third reads is computed by no module; a fourth reads a layer's output."""

    def __init__(self, norm: type[nn.Module] | None = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(WIDTH) if norm else nn.Identity()
        self.up, self.gate = nn.Linear(WIDTH, 48), nn.Linear(WIDTH, 48, bias=False)
        self.down = nn.Linear(48, WIDTH)
        self.last = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.last(self.down(self.up(y) * F.silu(self.gate(y))))


def planted(net: Net) -> Net:
    """Three channels behind the norm are 60 times as large as the others, and their weights as much smaller."""
    channels = torch.tensor([3, 17, 20])
    with torch.no_grad():
        for parameter in net.norm.parameters():
            parameter[channels] = 60 * (1 + parameter[channels])
        for layer in (net.up, net.gate):
            layer.weight[:, channels] /= 20
    return net


def batches(n: int = 3) -> list[Tensor]:
    return [torch.randn(8, 6, WIDTH) for _ in range(n)]


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def error_plainly(x: Tensor, weights: list[Tensor]) -> float:
    """Relative error of x @ W.T in 8 bits, one scale for x and one a row of W, by torch alone."""
    errors = []
    for weight in weights:
        s_x, s_w = x.abs().max() / 127, weight.abs().amax(1, keepdim=True) / 127
        y = (x / s_x).round() * s_x @ ((weight / s_w).round() * s_w).T
        errors.append(relative(y, x @ weight.T))
    return max(errors)


@torch.no_grad()
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, OwnRMSNorm])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_the_function_stays_and_the_factors_are_the_papers(norm: type[nn.Module], alpha: float) -> None:
    net, data = planted(Net(norm)).eval(), batches()
    before, x = copy.deepcopy(net), torch.randn(4, WIDTH)
    report = smooth(net, data, alpha)
    assert relative(net(x), before(x)) < 1e-5
    assert [entry.layers for entry in report] == [("up", "gate"), ("down",), ("last",)]
    assert [entry.place for entry in report] == ["norm", "multiplication", "down"]
    peak = torch.cat([before.norm(x) for x in data]).abs().amax((0, 1))
    columns = torch.cat([before.up.weight, before.gate.weight]).abs().amax(0)
    factors = peak**alpha / columns ** (1 - alpha)
    assert torch.allclose(report[0].factors, factors, rtol=1e-4)
    assert torch.allclose(net.norm.weight, before.norm.weight / factors, rtol=1e-4)
    assert torch.allclose(net.gate.weight, before.gate.weight * factors, rtol=1e-4)


@torch.no_grad()
def test_the_error_of_eight_bits_falls_by_a_multiple() -> None:
    net, data = planted(Net()).eval(), batches()
    x = torch.randn(64, WIDTH)
    before = error_plainly(net.norm(x), [net.up.weight, net.gate.weight])
    smooth(net, data)
    after = error_plainly(net.norm(x), [net.up.weight, net.gate.weight])
    assert after < before / 4


@torch.no_grad()
@pytest.mark.parametrize("multiply", [True, False])
def test_the_prepared_network_gains_and_its_integers_follow(multiply: bool) -> None:
    net, data, x = planted(Net()).eval(), batches(), torch.randn(64, WIDTH)
    errors, expected = [], net(x)
    for smoothed in (False, True):
        if smoothed:
            smooth(net, data, multiply=multiply)
        prepared = qat.prepare(net, qat.preset("int8"), x)
        finalize(prepared, [d.flatten(0, 1) for d in data], PTQConfig(bias_correction=False), trained=False)
        errors.append(relative(prepared(x), expected))
        assert relative(qat.lower(prepared)(x), prepared(x)) < 1e-2
    assert errors[1] < errors[0] / 3


@torch.no_grad()
def test_a_layer_of_the_network_that_makes_the_tensor_takes_the_division() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    before, x = copy.deepcopy(net), torch.randn(5, 8)
    report = smooth(net, [torch.randn(32, 8)])
    assert [entry.place for entry in report] == ["multiplication", "0", "multiplication"]
    assert relative(net(x), before(x)) < 1e-5


@torch.no_grad()
def test_where_no_module_can_be_divided_a_multiplication_stands_or_nothing_is_done() -> None:
    class ReadTwice(Net):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.last(self.down(self.up(y) * self.gate(y)) + y)

    for net in (planted(Net(OffsetRMSNorm)), Net(None), planted(ReadTwice())):
        net.eval()
        before, x = copy.deepcopy(net), torch.randn(4, WIDTH)
        untouched = copy.deepcopy(net)
        report = smooth(net, batches())
        assert report[0].layers == ("up", "gate")
        assert report[0].place == "multiplication"
        assert isinstance(net.up.layer, nn.Linear)
        assert relative(net(x), before(x)) < 1e-5
        report = smooth(untouched, batches(), multiply=False)
        assert not report[0].place
        assert "cannot be divided" in str(report[0])
        assert dict(untouched.named_parameters()).keys() == dict(before.named_parameters()).keys()
        assert torch.equal(untouched.up.weight, before.up.weight)
        assert relative(untouched(x), before(x)) < 1e-5


@torch.no_grad()
def test_shared_weights_and_layers_called_twice_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(self.norm(x)))

    gpt = CharGPT(11, 12, n_layer=1, n_head=2, width=16, tied_head=True)
    for net, x, reason in (
        (gpt, torch.randint(11, (2, 12)), "shared"),
        (Twice(), torch.randn(4, 8), "called more than once"),
    ):
        net.eval()
        before = copy.deepcopy(net)
        report = smooth(net, [x])
        assert reason in report[-1].reason
        assert relative(net(x), before(x)) < 1e-5
    assert gpt.head.weight is gpt.embedding.weight


@torch.no_grad()
def test_char_gpt_folds_into_its_norms() -> None:
    net = CharGPT(11, 12, n_layer=2, n_head=2, width=16).eval()
    before, x = copy.deepcopy(net), torch.randint(11, (4, 12))
    report = smooth(net, [x], multiply=False)
    places = {layer: entry.place for entry in report for layer in entry.layers}
    assert places["blocks.0.attention.qkv"] == "blocks.0.norm1"
    assert places["blocks.1.mlp.0"] == "blocks.1.norm2"
    assert places["head"] == "norm"
    assert not places["blocks.0.mlp.2"]  # behind GELU
    assert relative(net(x), before(x)) < 1e-5
    net.load_state_dict(before.state_dict())  # the names are those of before


@torch.no_grad()
def test_dead_channels_are_left_alone() -> None:
    net = Net().eval()
    net.norm.weight[2] = net.norm.bias[2] = 0
    net.up.weight[:, 5] = net.gate.weight[:, 5] = 0
    before, x = copy.deepcopy(net), torch.randn(4, WIDTH)
    report = smooth(net, batches())
    assert report[0].factors[[2, 5]].tolist() == [1, 1]
    assert relative(net(x), before(x)) < 1e-5


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"alpha=1\.5 .* 0 to 1"):
        smooth(Net(), batches(), 1.5)
    with pytest.raises(ValueError, match="at least one batch"):
        smooth(Net(), [])
    with pytest.raises(ValueError, match=re.escape("input of layer 'up' holds non-finite")):
        smooth(Net(), [torch.full((2, WIDTH), torch.nan)])


def test_a_run_takes_it_as_a_setting() -> None:
    for given, alpha in (([], None), (["ptq.smooth=0.25"], 0.25)):
        cfg = hydra_schema.composed(given, Path(__file__).parents[1] / "conf")
        assert instantiate(cfg.ptq).smooth == alpha


@pytest.mark.slow
def test_a_run_smooths_before_it_quantizes(tmp_path: Path) -> None:
    text, root = "".join(f"{n} and {n + 1} are {2 * n + 1}. " for n in range(300)), Path(__file__).parents[1]
    (tmp_path / "input.txt").write_text(text)
    command = [
        "experiment=char_gpt", f"data.path={tmp_path}", f"data.num_classes={len(set(text))}", "data.context=16",
        "model.n_layer=1", "model.width=16", "trainer.max_epochs=1", "callbacks=quiet", "ptq.smooth=0.5",
        "report.write=false", "export.formats=[int8]", "export.fresh_process=false",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, root / "train.py", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "run" / "smoothing.txt").read_text().splitlines()
    moved = [line.partition(":")[0] for line in lines if " in " in line and "left as they are" not in line]
    assert moved == ["blocks.0.attention.qkv", "blocks.0.mlp.0", "head"]
    kept = load_file(tmp_path / "run" / "float.safetensors")
    start = torch.load(tmp_path / "run" / "checkpoints" / "qat" / "last.ckpt", weights_only=False)["state_dict"]
    norms = [
        (start[key], kept[name]) for key in start for name in kept if key.endswith(name) and "norm1.weight" in name
    ]
    assert norms
    for trained, before in norms:  # the first norm was divided by more than a step of training makes up for
        assert float((trained / before).abs().mean()) < 0.5
