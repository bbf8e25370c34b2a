"""Sensitivity against quantization of one layer in plain torch; times of steps."""

import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.analysis.latency import step_times
from qat.analysis.sensitivity import FEWEST, sensitivity, units
from qat.mode import Mode
from qat.modes import quantizers
from qat.ptq import PTQConfig, finalize
from qat.training.evidence import look_inside
from qat.zoo.tasks import Classification

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(96) % 3
CONFIG = qat.QuantConfig.from_dict(
    {"weight": {"bits": 3, "granularity": "tensor"}, "activation": {"bits": 3}, "input": {"bits": 3}}
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    prepared = qat.prepare(Net(), CONFIG, X[:2])
    finalize(prepared, [X], PTQConfig(), trained=False)
    return prepared


def measure(net: nn.Module, samples: int) -> dict[str, float]:
    with torch.no_grad():
        return {"loss": float(F.cross_entropy(net(X[:samples]), TARGETS[:samples]))}


def by_hand(net: nn.Module, quantized: set[str]) -> float:
    """The loss with only these quantizers, everything else in float, by torch's own fake quantization."""

    def grid(name: str, x: Tensor) -> Tensor:
        quantizer = dict(quantizers(net))[name]
        if name not in quantized:
            return x
        scale, zero_point = quantizer.qparams(x)
        ends = int(quantizer.quant_min), int(quantizer.quant_max)
        return torch.fake_quantize_per_tensor_affine(x, float(scale), int(zero_point), *ends)

    h = torch.relu(F.linear(grid("quantizers.x", X), grid("first.weight_quantizer", net.first.weight), net.first.bias))
    y = F.linear(grid("quantizers.first", h), grid("second.weight_quantizer", net.second.weight), net.second.bias)
    return float(F.cross_entropy(y, TARGETS).detach())


def test_one_layer_by_itself_and_left_out(net: nn.Module) -> None:
    before = {name: quantizer.mode for name, quantizer in quantizers(net)}
    found = sensitivity(net, measure, 96, 60.0)
    every = {name for name, _ in quantizers(net)}
    assert (found["samples"], found["left_out"]) == (96, [])
    assert found["float"]["loss"] == pytest.approx(by_hand(net, set()), abs=1e-5)
    assert found["quantized"]["loss"] == pytest.approx(by_hand(net, every), abs=1e-5)
    parts = {
        "first": {"first.weight_quantizer", "quantizers.x"},
        "second": {"second.weight_quantizer", "quantizers.first"},
    }
    assert [unit["name"] for unit in found["units"]] == list(parts)
    for unit in found["units"]:
        assert unit["only"]["loss"] == pytest.approx(by_hand(net, parts[unit["name"]]), abs=1e-5)
        assert unit["all_but"]["loss"] == pytest.approx(by_hand(net, every - parts[unit["name"]]), abs=1e-5)
        assert unit["only"]["loss"] != found["float"]["loss"] != unit["all_but"]["loss"]
    assert {name: quantizer.mode for name, quantizer in quantizers(net)} == before
    assert set(before.values()) == {Mode.frozen}


def test_a_tensor_that_no_layer_reads_stands_by_itself() -> None:
    class Adds(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.first(x))
            return (h + torch.relu(x @ torch.ones(6, 8))).sum(1)

    prepared = qat.prepare(Adds(), CONFIG, X[:2])
    found = units(prepared)
    assert found[0].name == "first"
    covered = [quantizer for unit in found for quantizer in unit.quantizers]
    assert set(covered) == {quantizer for _, quantizer in quantizers(prepared)}
    assert all(len(unit.quantizers) == 1 for unit in found[1:])


def test_the_time_is_kept(net: nn.Module) -> None:
    def slow(net: nn.Module, samples: int) -> dict[str, float]:
        time.sleep(0.002 * samples)
        return measure(net, samples)

    found = sensitivity(net, slow, 96, 0.5)  # 64 samples take 0.128 s
    assert found["samples"] == FEWEST
    assert found["left_out"][-1] == "second"
    assert found["seconds"] < 1.5
    nothing = sensitivity(net, slow, 96, 0.0)
    assert (nothing["units"], nothing["left_out"]) == ([], ["first", "second"])


def test_steps_of_a_lowered_network_take_time(net: nn.Module) -> None:
    lowered = qat.lower(net)
    times = step_times(lowered, X)
    assert list(times) == [node.name for node in lowered.nodes]
    assert {"first", "second"} <= set(times)
    assert all(ms > 0 for ms in times.values())
    assert step_times(net, X) == {}


def test_steps_of_a_network_in_parts_take_time() -> None:
    class Code(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.scale = Net(), 1.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return y if float(y.sum()) > 1e9 else self.body(x * self.scale)

    prepared = qat.prepare(Code(), CONFIG, X[:2])
    finalize(prepared, [X], PTQConfig(), trained=False)
    times = step_times(qat.lower(prepared), X)
    assert {"body.first", "body.second"} <= set(times)


def test_what_a_report_holds_of_each_layer(net: nn.Module) -> None:
    settings = {"samples": 50, "sensitivity": {"samples": 70, "max_seconds": 60.0}}
    found = look_inside(net, qat.lower(net), Classification(3), X, TARGETS, settings)
    rows = {row["name"]: row for row in found["layers"]}
    assert set(rows) == {"first", "second", "quantizers.x", "quantizers.first"}
    assert (found["samples"], found["sensitivity"]["samples"]) == (50, 70)
    assert rows["first"]["bit_operations"] == 6 * 8 * 3 * 3
    assert all(row["seen"]["histogram"]["values"] for row in rows.values())
    assert rows["quantizers.x"]["seen"]["histogram"]["values"] == 50 * 6
    shares = [rows[name]["latency_share"] for name in ("first", "second")]
    assert sum(shares) + found["latency"]["other_share"] == pytest.approx(1)
    assert set(rows["first"]["sensitivity"]["only"]) == {"loss", "accuracy"}
    code = look_inside(net, net, Classification(3), X, TARGETS, settings)  # its own code runs: no steps to time
    assert not code["latency"]["measured"]
    shares = [row.get("latency_share") for row in code["layers"][:2]]
    assert shares == [48 / 72, 24 / 72]
