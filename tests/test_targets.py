"""What each target runs, what it refuses and what it advises, and that what it runs is what trains."""

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from torch import Tensor, fx, nn

import qat
from qat import hydra_schema
from qat.__main__ import main
from qat.analysis.islands import float_islands
from qat.analysis.targets import kernels, summary
from qat.export.firmware import run
from qat.export.formats import integers_given
from qat.export.parity import ties_given, training_integers
from qat.fake_quant import FakeQuantize
from qat.numerics import affine, fixed_point
from qat.numerics.formats import FORMATS
from qat.ptq import PTQConfig, finalize
from qat.ranges import RANGES
from qat.scheme import QuantConfig
from qat.targets import FAMILIES, TARGETS, Kernel, check_target
from qat.zoo.models import SmallCNN
from tests import target_table
from tests.test_config import CONF

FITS: dict[str, Any] = {"weight": {"bits": 7}, "activation": {"bits": 8}, "input": {"bits": 8}}
NAMES = [
    "generic", "onnxruntime_x86", "onnxruntime_x86_vnni", "onnxruntime_arm", "openvino", "tensorrt",
    "executorch_xnnpack", "cmsis_nn", "integer_only", "vllm",
]  # fmt: skip


def check(data: dict[str, Any], target: str = "onnxruntime_x86") -> None:
    check_target(QuantConfig.from_dict({**data, "target": target}))


def test_the_targets_of_the_issue() -> None:
    assert list(TARGETS) == NAMES
    for name, target in TARGETS.items():
        assert set(target.layers) <= {"default", *FAMILIES}, name
        assert target.description.endswith(".")
        assert target.source, name


@pytest.mark.parametrize("name", NAMES)
def test_a_target_says_what_it_does(name: str) -> None:
    target = TARGETS[name]
    floats, operations, rounding, formats = target_table.AROUND[name]
    assert (set(target.keeps_float), target.operations, target.formats) == (floats, operations, formats)
    assert target.rounding == rounding
    if name in target_table.KERNELS:
        assert {family: tuple(described(kernel) for kernel in kernels) for family, kernels in target.layers.items()} \
            == target_table.KERNELS[name]  # fmt: skip
    assert target.pairs == (name == "tensorrt")
    weight = {"bits": 4, "granularity": "channel", "axis": 1}
    if name != "generic":  # a scale a channel is one an output channel
        with pytest.raises(ValueError, match=r"quant\.weight\."):
            check({"weight": weight, "activation": {"bits": 8}, "input": {"bits": 8}}, name)


def described(kernel: Kernel) -> tuple[str, ...]:
    inputs = "any" if kernel.activation is None else kernel.activation.describe()
    return kernel.name, kernel.weight.describe(), inputs, "integers" if kernel.integers else "floats"


def test_ties_are_rounded_as_a_target_says(capsys: pytest.CaptureFixture[str]) -> None:
    halves = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    even = affine.quantize(halves, torch.ones(()), torch.zeros(()), -128, 127).tolist()
    up = fixed_point.multiply((2 * halves).int(), *fixed_point.multiplier_and_shift(torch.tensor(0.5))).tolist()
    runner = run.scaled((2 * halves).int().numpy(), 1 << 30, 0).tolist()
    assert (even, up, runner) == ([-2, 0, 0, 2], [-1, 0, 1, 2], [-1, 0, 1, 2])
    for name, words in (("tensorrt", "in float32, halves to even"), ("cmsis_nn", "a shift, halves up")):
        main(["targets", name])
        assert words in capsys.readouterr().out


# ---- refusals at composition -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "field", "nearest"),
    [
        ({"weight": {"bits": 8}}, r"quant\.weight\.bits=8", r"quant\.weight\.bits=7"),
        ({"activation": {"bits": 16}}, r"quant\.activation\.bits=16", r"quant\.activation\.bits=8"),
        ({"input": {"bits": 16}}, r"quant\.input\.bits=16", r"quant\.input\.bits=8"),
        (
            {"rules": [{"match": "a"}, {"match": "b", "weight": {"bits": 8}}]},
            r"quant\.rules\[1\]\.weight\.bits=8",
            r"quant\.rules\.1\.weight\.bits=7",
        ),
        (
            {"rules": [{"match": "a", "activation": {"bits": 16}}]},
            r"quant\.rules\[0\]\.activation\.bits=16",
            r"quant\.rules\.0\.activation\.bits=8",
        ),
    ],
)
def test_too_wide_names_the_field_the_limit_and_the_nearest(data: dict[str, Any], field: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}: target=onnxruntime_x86 takes at most .*use {nearest}, or target="):
        check({**FITS, **data})
    check({**FITS, **data}, "generic")  # what the message offers


def test_weight_limit_gives_its_reason() -> None:
    with pytest.raises(ValueError, match="int16, which saturates with 8-bit weights"):
        check({**FITS, "weight": {"bits": 8}})
    check({"weight": {"bits": 8}})  # weight-only: multiplied in float, nothing saturates
    with pytest.raises(ValueError, match=r"quant\.weight\.bits=7: .*quant\.weight\.bits=6"):
        check({**FITS, "weight": {"bits": 7, "range": "dorefa"}})  # its levels are odd integers up to 127


def test_what_fits_passes() -> None:
    check(FITS)
    check({})  # float
    check({**FITS, "weight": {"bits": 4}, "rules": [{"match": "a", "weight": {"bits": None}}]})
    check({"weight": {"bits": 8}, "activation": {"bits": 16}}, "generic")


def test_unknown_target() -> None:
    with pytest.raises(
        ValueError, match=r"quant\.target='onnxruntime_x68' is not known; did you mean 'onnxruntime_x86'"
    ):
        check({}, "onnxruntime_x68")


def test_generic_runs_onnx_runtime_in_its_exact_mode() -> None:
    assert TARGETS["generic"].onnxruntime_options == {"session.x64quantprecision": "1"}
    assert TARGETS["onnxruntime_x86"].onnxruntime_options == {}


@pytest.mark.parametrize(
    ("target", "rule", "message"),
    [
        ("tensorrt", {"match": "type:Embedding", "weight": {"bits": 8}},
         r"quant\.rules\[0\]\.weight\.bits=8: target=tensorrt takes weights in float in embedding layers .*"
         r"use quant\.rules\.0\.weight\.bits=null, or"),
        ("onnxruntime_arm", {"match": "type:LSTM", "weight": {"bits": 8}}, r"in float in lstm layers"),
        ("cmsis_nn", {"match": "type:GRU", "weight": {"bits": 4}}, r"has no kernel for recurrent layers"),
        ("vllm", {"match": "type:Conv2d", "weight": {"bits": 8}}, r"in float in convolution layers"),
        ("integer_only", {"match": "head", "weight": {"bits": None}}, r"not take weights in float .*weight\.bits=8"),
        ("cmsis_nn", {"match": "type:Embedding", "weight": {"granularity": "channel"}},
         r"takes weights with a scale a tensor in embedding layers"),
    ],
)  # fmt: skip
def test_rules_are_held_to_what_they_can_match(target: str, rule: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_target(qat.preset("int8", target=target, rules=[rule]))


def test_an_embedding_may_be_wider_where_nothing_is_multiplied() -> None:
    check({**FITS, "rules": [{"match": "type:Embedding", "weight": {"bits": 8}}]})
    with pytest.raises(ValueError, match=r"rules\[0\]\.weight\.bits=8"):
        check({**FITS, "rules": [{"match": "type:Linear", "weight": {"bits": 8}}]})


def settings(text: str) -> Iterator[tuple[list[str], Any]]:
    """`quant.rules[0].weight.bits=7` ... -> (["rules", "0", "weight", "bits"], 7), as YAML reads values."""
    for change in text.split(" "):
        path, _, value = change.removeprefix("quant.").partition("=")
        yield path.replace("[", ".").replace("]", "").split("."), yaml.safe_load(value)


def follow(data: dict[str, Any], message: str) -> None:
    """Write what a refusal advises into plain data."""
    advice = re.search(r"use (quant\..*?)(?:, or .*)?$", message)
    assert advice, message
    for path, value in settings(advice[1]):
        part: Any = data
        for key in path[:-1]:
            part = part[int(key)] if isinstance(part, list) else part.setdefault(key, {})
        part[path[-1]] = value


def drawn(rng: random.Random, role: str) -> dict[str, Any]:
    """A scheme that is valid in itself."""
    while True:
        name = rng.choice(["int"] * 6 + list(FORMATS))
        granularity = rng.choice(("tensor", "channel", "group") + (("block",) if role == "weight" else ("token",)))
        scheme: dict[str, Any] = {
            "format": name, "bits": rng.choice([None, *FORMATS[name].bits]), "symmetric": rng.choice((True, False)),
            "narrow_range": rng.choice((True, False)), "range": rng.choice(list(RANGES)), "granularity": granularity,
            "signed": rng.choice((None, None, True)), "axis": rng.choice((None, None, 0, 1)),
            "group_size": FORMATS[name].block or (rng.choice((4, 32, 48)) if granularity == "group" else None),
            "block_size": [16, 16] if granularity == "block" else None,
        }  # fmt: skip
        try:
            QuantConfig.from_dict({role: scheme})
        except ValueError:
            continue
        return scheme


@pytest.mark.parametrize("target", NAMES)
def test_advice_leads_from_any_configuration_to_one_that_runs(target: str) -> None:
    rng = random.Random(target)
    refused = 0
    for _ in range(60):
        schemes = {
            "weight": drawn(rng, "weight"),
            "activation": drawn(rng, "activation"),
            "input": drawn(rng, "activation"),
        }
        match = rng.choice(("first", "layer.*", "type:Linear", "type:Conv*", "type:Embedding"))
        data: dict[str, Any] = {**schemes, "target": target}
        if rng.random() < 0.4:
            data["rules"] = [{"match": match, "weight": {"bits": None if rng.random() < 0.3 else 4}}]
        for _ in range(12):
            try:
                check_target(QuantConfig.from_dict(data))
                break
            except ValueError as error:
                refused += 1
                follow(data, str(error))
        else:
            raise AssertionError(f"no end: {data}")
    assert refused > 20 or target == "generic"


# ---- defaults --------------------------------------------------------------------------------------------------------


def test_what_a_preset_leaves_open_is_the_targets() -> None:
    def of(target: str, name: str = "int8") -> tuple[Any, ...]:
        config = qat.preset(name, target=target)
        activation = config.activation
        return config.weight.bits, config.weight.symmetric, activation.symmetric, activation.signed, config.input.signed

    assert of("generic") == (8, True, True, None, None)
    assert of("onnxruntime_x86") == (7, True, True, None, None)
    assert of("onnxruntime_x86_vnni") == (8, True, True, None, None)
    assert of("onnxruntime_arm") == (8, True, False, True, True)
    assert of("openvino") == (7, True, True, None, None)
    assert of("tensorrt") == (8, True, True, True, True)
    assert of("executorch_xnnpack") == (8, True, False, True, True)
    assert of("cmsis_nn") == (8, True, False, True, True)
    assert of("onnxruntime_x86", "w4a4_lsq")[0] == 4
    assert qat.preset("w4a4_lsq", target="openvino").rules[0].weight["bits"] == 7
    assert qat.preset("fp8", target="vllm") == qat.preset("fp8").from_dict(
        {**qat.preset("fp8").to_dict(), "target": "vllm", "graph": "layers"}
    )


def test_what_is_said_is_kept_or_refused_and_never_changed() -> None:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):

        def quant(*overrides: str) -> QuantConfig:
            return hydra_schema.quant_config(compose("config", list(overrides)))

        assert quant("target=tensorrt").activation.signed is True
        assert quant("target=openvino", "quant.weight.bits=8").weight.bits == 8  # preferred, not needed: 7
        assert quant("target=cmsis_nn", "quant.activation.symmetric=true").activation.symmetric is True
        with pytest.raises(
            ValueError, match=r"quant\.activation\.symmetric=false: .*use quant\.activation\.symmetric=true"
        ):
            quant("target=tensorrt", "quant.activation.symmetric=false")
        with pytest.raises(ValueError, match=r"quant\.weight\.bits=8: .*use quant\.weight\.bits=7"):
            quant("target=onnxruntime_x86", "quant.weight.bits=8")
        rules = "quant.rules=[{match: 'type:Linear', weight: {bits: 8}}]"
        with pytest.raises(ValueError, match=r"quant\.rules\[0\]\.weight\.bits=8") as refused:
            quant("target=onnxruntime_x86", rules)
        advice = re.search(r"use (.*), or target=generic", str(refused.value))
        assert advice
        assert quant("target=onnxruntime_x86", rules, *advice[1].split(" ")).rules[0].weight["bits"] == 7
        ends = quant("target=cmsis_nn", "quant=w4a4_lsq", "quant.rules.0.weight.bits=6").rules
        assert [rule.weight for rule in ends] == [{"bits": 6, "narrow_range": True}, {"bits": 8, "narrow_range": True}]


# ---- a network's own layers ------------------------------------------------------------------------------------------


class Words(nn.Module):
    """Embedding, LSTM, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(10, 8), nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


@pytest.mark.parametrize("target", ["tensorrt", "openvino", "executorch_xnnpack", "vllm"])
def test_a_network_is_refused_with_the_rules_to_write(target: str) -> None:
    x = torch.randint(0, 10, (2, 5))
    with pytest.raises(ValueError, match=rf"target={target} cannot run what is configured.*'lstm' \(LSTM\)") as refused:
        qat.prepare(Words(), qat.preset("int8", target=target), x)
    written = re.search(r"'quant\.rules=(.*)', or target=generic", str(refused.value))
    assert written
    rules = yaml.safe_load(written[1])
    prepared = qat.prepare(Words(), qat.preset("int8", target=target, rules=rules), x)
    assert type(prepared.get_submodule("lstm")) is nn.LSTM
    assert type(prepared.get_submodule("head")).__name__ == "QuantLinear"
    qat.prepare(Words(), qat.preset("int8"), x)  # generic runs all of it


def test_a_kind_of_layer_without_any_kernel() -> None:
    net = nn.Sequential(nn.GRUCell(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"target=cmsis_nn has no kernel for '0' \(GRUCell\)"):
        qat.prepare(net, qat.preset("int8", target="cmsis_nn"), torch.randn(2, 4))


def test_groups_fit_linear_layers_and_not_convolutions() -> None:
    config = qat.preset("w4g32", target="tensorrt", weight={"group_size": 64})
    qat.prepare(nn.Sequential(nn.Linear(64, 4)), config, torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"'0' \(Conv2d\): weight\.granularity=group, it takes"):
        qat.prepare(nn.Sequential(nn.Conv2d(64, 4, 1)), config, torch.randn(2, 64, 2, 2))


# ---- training simulates the target -----------------------------------------------------------------------------------


class Gated(nn.Module):
    """A SiLU between a convolution and a linear layer, a product of two tensors, a softmax read by one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(2, 4, 3), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(torch.softmax(y @ y.transpose(1, 2), -1) @ self.mix(y))


def quantizers(net: nn.Module) -> dict[str, FakeQuantize]:
    return {m.name: m for _, m in net.named_modules() if isinstance(m, FakeQuantize) and m.shape is None}


def prepared_for(target: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return qat.prepare(Gated(), qat.preset("int8", target=target, **changes), torch.randn(2, 2, 6, 6))


def test_functions_get_quantizers_where_the_layer_before_would_run_in_float() -> None:
    asked = {target for target in NAMES if target != "vllm" and "conv" in quantizers(prepared_for(target))}
    assert asked == {"onnxruntime_x86", "onnxruntime_x86_vnni", "onnxruntime_arm", "executorch_xnnpack", "cmsis_nn",
                     "integer_only"}  # fmt: skip


def test_what_the_engine_computes_in_float_gets_no_quantizer() -> None:
    assert {"softmax", "mix"} <= quantizers(prepared_for("generic")).keys()
    assert not {"softmax", "mix"} & quantizers(prepared_for("executorch_xnnpack")).keys()
    vllm = prepared_for("vllm", rules=[{"match": "type:Conv2d", "weight": {"bits": None}}])
    assert len(quantizers(vllm)) == 2  # the inputs of the two linear layers


def test_softmax_and_sigmoid_have_the_scales_of_the_engine() -> None:
    class Functions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(torch.softmax(self.a(x), -1))
            return self.head(torch.tanh(self.c(torch.sigmoid(y))))

    torch.manual_seed(0)
    x = torch.randn(64, 6)
    net = qat.prepare(Functions(), qat.preset("int8", target="cmsis_nn"), x)
    qat.calibrate(net, [x])
    found = {name: q.qparams() for name, q in quantizers(net).items()}
    table = {"softmax": (1 / 256, -128), "sigmoid": (1 / 256, -128), "tanh": (1 / 128, 0)}  # LiteRT's specification
    for name, (scale, zero_point) in table.items():
        assert found[name][0].item() == pytest.approx(scale, rel=1e-6), name
        assert found[name][1].item() == zero_point, name
    usual = qat.prepare(Functions(), qat.preset("int8"), x)
    qat.calibrate(usual, [x])
    assert quantizers(usual)["sigmoid"].qparams()[0].item() == pytest.approx(1 / 255, rel=1e-6)


@pytest.mark.parametrize("target", NAMES)
def test_the_digits_network_trains_and_lowers_as_simulated(target: str) -> None:
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)[:128] / 8 - 1
    y = torch.tensor(labels[:128])
    vllm = {"rules": [{"match": "type:Conv2d", "weight": {"bits": None}}], "graph": "auto"}
    config = qat.preset("int8", target=target, **(vllm if target == "vllm" else {}))
    net = qat.prepare(SmallCNN(1, 10, 8), config, x[:2])
    qat.calibrate(net, [x])
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    qat.set_mode(net, "quantize")
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(net.train()(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    finalize(net, [x], PTQConfig(), trained=True)
    assert isinstance(net, fx.GraphModule)
    network = qat.lower(net.eval())
    with torch.no_grad():
        given = training_integers(net, network, x)
        made, ties = integers_given(network, (x,), given), ties_given(network, x, given)
        assert bool(given) or target == "vllm"  # whose layers hand out floats
        assert made.keys() <= given.keys()
        for name in made:
            steps = (made[name].int() - given[name].int()).abs()
            assert steps.max() <= 1, name
            assert (steps == 0).float().mean() >= 0.999, name
        same = network(x).argmax(1) == net(x).argmax(1)
    tied = torch.zeros(len(x), dtype=torch.bool)
    for name in ties.keys() & made.keys():
        tied |= (ties[name] & (made[name].int() != given[name].int())).flatten(1).any(1)
    assert bool((same | tied).all())


# ---- what people see -------------------------------------------------------------------------------------------------


def test_the_report_names_what_the_target_computes_in_float() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3))
    x = torch.randn(2, 2, 6, 6)

    def reasons(target: str) -> list[str]:
        return [row["reason"] for row in float_islands(qat.prepare(net, qat.preset("int8", target=target), x))]

    assert reasons("generic") == []
    assert reasons("onnxruntime_arm") == [
        "target=onnxruntime_arm multiplies ConvTranspose2d in float (DequantizeLinear, in float)"
    ]
    gated = {row["name"]: row["reason"] for row in float_islands(prepared_for("executorch_xnnpack"))}
    assert gated["matmul"] == "target=executorch_xnnpack computes matmul in float"
    assert float_islands(prepared_for("integer_only")) == []


def test_the_command_prints_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NAMES)
    assert main(["targets", "tensorrt"]) == 0
    text = capsys.readouterr().out
    for word in ("INT4 weight-only", "group of 64, 128", "signed=true", "docs.nvidia.com", "halves to even"):
        assert word in text
    with pytest.raises(SystemExit):
        main(["targets", "tensort"])
    assert "did you mean 'tensorrt'" in capsys.readouterr().err
    for target in TARGETS.values():
        assert kernels(target).row_count >= 2
    assert summary().row_count == len(NAMES)
