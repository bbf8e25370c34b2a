"""Every combination of a scheme's fields trains, or is refused with a valid neighbour.

Three circles: combinations are checked as data (`tests.combinations`); valid ones are run forward and backward on a
small tensor; and some train the digits network by Hydra override and are lowered. By default the last two take samples
in which any two values that can meet do meet.
"""

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

import qat
from qat import hydra_schema
from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.numerics.rounding import ROUNDING
from qat.observers import OBSERVERS
from qat.ptq import PTQConfig, finalize
from qat.scheme import TensorScheme, check_scheme, override
from qat.scheme.checks import shown
from qat.training import parameter_groups
from qat.zoo.models import SmallCNN
from tests.combinations import DRAWN, NAMES, ROLES, Data, combined, covering, varied

CONF = str(Path(__file__).parents[1] / "conf")


def refusal(role: str, data: Data) -> str | None:
    try:
        check_scheme(override(TensorScheme(), data, f"quant.{role}"), f"quant.{role}", role)
    except ValueError as error:
        return str(error)
    return None


def read(text: str) -> Any:
    """A value as Hydra reads it from the command line."""
    if text.startswith("["):
        return [int(part) for part in text[1:-1].split(",")]
    return {"null": None, "true": True, "false": False}.get(text, int(text) if text.lstrip("-").isdigit() else text)


def follow(role: str, start: Data) -> Data:
    """What one arrives at by writing what each message says to write, as often as there is one."""
    data, messages = dict(start), []
    while (message := refusal(role, data)) is not None:
        messages.append(message)
        assert len(messages) < 12, (start, messages)
        assert message.startswith(f"quant.{role}."), message
        advice = message.partition(": ")[2]
        first = re.split(r", or |\(", advice[advice.rindex("use ") if "use " in advice else 0 :])[0]
        changes = re.findall(rf"'?(?:quant\.{role}\.)?(\w+)=(\[[^\]]*\]|[\w.+-]+)", first)
        assert changes, (message, first)
        data |= {name: read(value) for name, value in changes}
    assert messages, start
    return data


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("count", [1500, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_refusal_leads_to_a_valid_neighbour(role: str, count: int | None) -> None:
    refused = combined(role)[1] + varied(role)[1]
    assert len(refused) > 50_000
    for start in refused if count is None else random.Random(role).sample(refused, count):
        follow(role, start)


@pytest.mark.parametrize("role", ROLES)
def test_every_name_is_valid_somewhere(role: str) -> None:
    for name, names in NAMES.items():
        used = {data[name] for data in combined(role)[0]}
        cannot = {
            ("activation", "format"): {"binary", "ternary", "codebook", "product"},
            ("activation", "granularity"): {"block"},
            ("activation", "rounding"): set(ROUNDING) - {"nearest", "half_up"},
            ("weight", "granularity"): {"token"},
            ("weight", "range"): {"pact"},
        }.get((role, name), set())
        assert used == set(names) - cannot, name


def runs(role: str, data: Data, relu: bool = False) -> None:
    """In every mode: finite, of the input's shape, and with a gradient for whatever learns."""
    weight, batch = torch.randn(8, 8, 3, 3) / 3, torch.randn(4, 8, 3, 3)
    config = override(TensorScheme(), data, "")
    if role == "weight":
        x, quantizer = weight, FakeQuantize(config, weight.shape)
        quantizer.set_range_from(x)
    else:
        x, quantizer = batch, FakeQuantize(config, activation=batch.shape, relu=relu)
        quantizer.mode = Mode.observe
        quantizer(x)
        quantizer.set_range_from_observer()
    assert quantizer.calibrated
    quantizer.mode = Mode.quantize
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    (y * torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape)).sum().backward()
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().sum() > 0
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    quantizer.mode = Mode.frozen
    with torch.no_grad():
        frozen = quantizer(x)
    assert frozen.isfinite().all()
    assert torch.equal(quantizer.eval()(x), frozen)  # what is evaluated is what is frozen
    exact = x.relu() if relu else x
    if config.bits > 2:  # floor and ceil of two bits move values by more
        assert float((frozen - exact).norm() / exact.norm()) < 1.2


def check_all(role: str, schemes: list[Data]) -> None:
    for data in schemes:
        for relu in (False, True) if role == "activation" else (False,):
            torch.manual_seed(0)
            try:
                runs(role, data, relu)
            except Exception as error:
                error.add_note(f"{role}, relu={relu}: {data}")
                raise


@pytest.mark.parametrize("role", ROLES)
def test_a_covering_sample_runs_forward_and_backward(role: str) -> None:
    check_all(role, covering(combined(role)[0] + varied(role)[0], [*NAMES, *DRAWN]))


@pytest.mark.slow
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("part", range(6))
def test_every_valid_combination_runs_forward_and_backward(role: str, part: int) -> None:
    check_all(role, (combined(role)[0] + varied(role)[0])[part::6])


COVERING = [(role, data) for role in ROLES for data in covering(combined(role)[0], NAMES)]
OBSERVED = [
    ("activation", {"format": f, "bits": b, "observer": observer})
    for f, b in (("int", 8), ("e4m3fn", 8))
    for observer in OBSERVERS
    if not (observer == "entropy" and f != "int")
]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[:64] / 8 - 1, torch.tensor(targets[:64])


@pytest.fixture(scope="module")
def trained(digits: tuple[Tensor, Tensor]) -> SmallCNN:
    torch.manual_seed(0)
    net = SmallCNN(1, 10, width=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(25):
        F.cross_entropy(net(digits[0]), digits[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def overrides(role: str, data: dict[str, Any]) -> list[str]:
    """As on the command line: one tensor by this scheme, the others at 8 bits."""
    words = ["quant=int8", "export=int8", "quant.weight.narrow_range=false"]
    parts = [role, "input"] if role == "activation" else [role]
    if role == "activation" and data.get("rounding") == "half_up":  # of targets in fixed point, behind the input
        words.append("target=integer_only")
        parts = [role]
    if data.get("group_size") == 8:  # the first layer has 9 inputs
        words.append("quant.rules=[{match: first, weight: {granularity: channel, group_size: null}}]")
    return words + [
        f"quant.{part}.{name}={shown(value)}".replace(" ", "") for part in parts for name, value in data.items()
    ]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    ("role", "data"),
    COVERING + OBSERVED,
    ids=[
        f"{role}-" + "-".join(str(d[f]) for f in ("format", *NAMES, "observer") if f in d)
        for role, d in COVERING + OBSERVED
    ],
)
def test_trains_on_digits_by_hydra_override_and_is_lowered(
    role: str, data: dict[str, Any], digits: tuple[Tensor, Tensor], trained: SmallCNN
) -> None:
    if role == "weight" and data["format"] == "int" and data["rounding"] == "logarithmic":
        data = data | {"bits": 8}  # 4 bits hold too few powers of two to train on
    with initialize_config_dir(CONF, version_base="1.3"):
        config = hydra_schema.quant_config(compose("config", overrides=overrides(role, data)))
    assert getattr(config, role).format == data["format"]
    torch.manual_seed(1)
    net = SmallCNN(1, 10, width=8)
    net.load_state_dict(trained.state_dict())
    prepared = qat.prepare(net, config, digits[0][:2]).train()
    qat.calibrate(prepared, [digits[0]])
    groups = parameter_groups(prepared, 1e-4, scale_lr=1e-3)
    optimizer = torch.optim.Adam(groups, lr=2e-3)
    losses, before = [], {name: p.detach().clone() for name, p in prepared.named_parameters()}
    learns: set[str] = set()
    for _ in range(12):
        loss = F.cross_entropy(prepared(digits[0]), digits[1])
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in prepared.parameters())
        learns |= {name for name, p in prepared.named_parameters() if p.grad.any()}
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in prepared.parameters())
    moved = {name for name, p in prepared.named_parameters() if not torch.equal(p.detach(), before[name])}
    assert moved >= learns
    assert all(name.endswith("offset") for name in set(before) - moved), moved  # learns only from clipped values
    assert sum(losses[-4:]) / 4 < 0.95 * losses[0], losses
    finalize(prepared, [digits[0]], PTQConfig(), trained=True)
    integer = qat.lower(prepared.eval())
    with torch.no_grad():
        simulated, lowered = prepared(digits[0]), integer(digits[0])
    assert (simulated.argmax(1) == lowered.argmax(1)).float().mean() >= 0.95
    assert (simulated - lowered).abs().mean() <= 0.02 * simulated.std()


GROUPS = {"granularity": "group", "group_size": 2}  # of which scales have two dimensions, as weights do
LEARNED: dict[str, dict[str, dict[str, Any]]] = {
    "weight_quantizer.range.scale": {"weight": {"range": "lsq", **GROUPS}},
    "input.range.scale": {"input": {"range": "lsq"}},
    "input.range.offset": {"input": {"range": "lsq_plus", "symmetric": False}},
    "input.range.alpha": {"input": {"range": "pact"}},
    "weight_quantizer.range.log2_threshold": {"weight": {"range": "tqt", **GROUPS}},
    "weight_quantizer.fitted.entries": {"weight": {"format": "codebook", "range": "learned"}},
    "fitted.entries": {"weight": {"format": "product", "range": "learned", **GROUPS}},
    "weight_quantizer.logits": {"weight": {"rounding": "adaptive", "range": "fixed"}},
}


@pytest.mark.parametrize("learned", LEARNED)
def test_weight_decay_is_of_weights_alone(learned: str) -> None:
    parts = {part: {"bits": 4, **LEARNED[learned].get(part, {})} for part in ("weight", "activation", "input")}
    net = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    prepared = qat.prepare(net, qat.QuantConfig.from_dict(parts), torch.randn(2, 6))
    names = {parameter: name for name, parameter in prepared.named_parameters()}
    assert any(name.endswith(learned) for name in names.values())
    groups = parameter_groups(prepared, weight_decay=0.1)
    assert {names[p] for group in groups for p in group["params"]} == set(names.values())
    assert {names[p] for group in groups if group["weight_decay"] for p in group["params"]} == {"0.weight", "2.weight"}


class Twice(nn.Module):
    """A layer that is called twice: its table is assigned anew between the first call and its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(torch.tanh(self.first(x))))


@pytest.mark.parametrize("range", ["learned", "fixed"])
@pytest.mark.parametrize("format", ["codebook", "product"])
def test_a_layer_with_a_table_is_called_twice(format: str, range: str) -> None:
    weight: dict[str, Any] = {"format": format, "bits": 2, "range": range, "granularity": "channel"}
    weight |= {"granularity": "group", "group_size": 2} if format == "product" else {}
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    net = qat.prepare(Twice(), qat.QuantConfig.from_dict({"weight": weight, "activation": {"bits": None}}), x)
    qat.calibrate(net, [x])
    net.train()
    layer = net.get_submodule("first")
    quantized = layer.weight_quantizer(layer.weight).detach().requires_grad_()
    y = net.last(F.linear(torch.tanh(F.linear(x, quantized, layer.bias)), quantized, layer.bias))
    (expected,) = torch.autograd.grad(y.square().sum(), quantized)
    net(x).square().sum().backward()
    assert torch.allclose(layer.weight.grad, expected, rtol=1e-4, atol=1e-5)  # straight through
