"""What the target or a file cannot hold is said before training, all of it; and nothing else happens."""

import copy
import dataclasses
import logging
import random
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.calibrate import log as calibration_log
from qat.export import EXPORTERS
from qat.training.rehearsal import rehearse
from qat.zoo.models import SmallCNN
from tests.networks.blocks import Net


class Case(NamedTuple):
    """A network, its inputs, target and formats, and what is said of it, a line each."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    target: str
    formats: Sequence[str]
    says: list[str]
    preset: str = "int8"
    settings: dict[str, Any] = {}  # noqa: RUF012


def no_floats() -> nn.Module:
    """Four operations that no integers compute."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(F.interpolate(s.slopes(s.a(x)), scale_factor=2.0, mode="bilinear"), 3)
        return F.log_softmax(s.head(F.relu(s.b(y)).flatten(1)), -1)

    return Net(forward, a=nn.Conv2d(1, 4, 3), slopes=nn.PReLU(4), b=nn.Conv2d(4, 4, 1), head=nn.Linear(36, 5))


def no_runner() -> nn.Module:
    """What has integers, and no step in the C program: a transposed convolution, a norm, attention."""

    def forward(s: Any, x: Tensor) -> Tensor:
        y = s.norm(s.up(s.a(x)).flatten(2).transpose(1, 2))
        scores = torch.softmax(s.q(y) @ s.k(y).transpose(1, 2), -1)
        return s.head((scores @ y).mean(1))

    return Net(forward, a=nn.Conv2d(1, 4, 3), up=nn.ConvTranspose2d(4, 4, 2), norm=nn.LayerNorm(4), q=nn.Linear(4, 4),
               k=nn.Linear(4, 4), head=nn.Linear(4, 3))  # fmt: skip


def gates() -> nn.Module:
    return Net(lambda s, x: s.head(s.gru(s.first(x))[0][:, -1]), first=nn.Linear(3, 4),
               gru=nn.GRU(4, 4, batch_first=True), head=nn.Linear(4, 2))  # fmt: skip


IMAGE = (1, 6, 6)
NO_FLOATS = [r"'slopes' \(prelu\)", r"'interpolate' \(interpolate\) .* no integer form",
             r"'adaptive_avg_pool.*windows of different sizes",
             r"'log_softmax' \(log_softmax\) .*target=generic"]  # fmt: skip
NO_RUNNER = [r"c_header: 'up' .*transposed convolution", r"c_header: 'norm' \(FixedNorm\)",
             r"c_header: 'softmax.*\(FixedSoftmax\)", r"c_header: 'matmul.*\(FixedMatmul\)"]  # fmt: skip
CASES = {
    "integer_only": Case(no_floats, IMAGE, "integer_only", ["int8"], NO_FLOATS),
    "cmsis_nn": Case(no_floats, IMAGE, "cmsis_nn", ["int8", "c_header"], NO_FLOATS),
    "c_header": Case(no_runner, IMAGE, "integer_only", ["int8", "c_header"], NO_RUNNER),
    "onnx_gru": Case(gates, (5, 3), "generic", ["onnx", "int8"], [r"export\.formats=onnx: layer 'gru' \(GRU\) cannot"]),
    "onnx_blocks": Case(lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), (32,), "generic",
                        ["onnx"], [r"export\.formats=onnx: tensor 'input' .*format=e4m3fn", r"tensor '0' .*e4m3fn"],
                        "mxfp8"),
    "executorch": Case(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (8,), "generic",
                       ["executorch", "pt2"], [r"formats=executorch: layer '.*' \(Simulate\)", r"formats=pt2: layer"],
                       "w8a8_dynamic"),
    "tensorrt": Case(lambda: nn.Sequential(nn.Linear(100, 8)), (100,), "tensorrt", ["onnx", "int8"],
                     [r"export\.formats=onnx: layer '0': .*no matrix of whole groups of 64"], "w4g32",
                     {"weight": {"group_size": 64}}),
}  # fmt: skip


def prepared(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, *case.shape)
    return qat.prepare(case.make().eval(), qat.preset(case.preset, target=case.target, **case.settings), x), x


@pytest.mark.parametrize("name", CASES)
def test_every_refusal_is_told_before_training(name: str) -> None:
    case = CASES[name]
    net, x = prepared(case)
    with pytest.raises(ValueError, match=case.says[0]) as refused:
        rehearse(net, x, case.formats, skip_impossible=False)
    lines = str(refused.value).split("\n")
    for says in case.says:
        assert any(re.search(says, line) for line in lines), (says, lines)


@pytest.mark.parametrize(("layer", "kind"), [(nn.LSTM(4, 4), "LSTM"), (nn.GRU(4, 4), "GRU"),
                                            (nn.Bilinear(4, 4, 2), "Bilinear")])  # fmt: skip
@pytest.mark.parametrize("target", ["cmsis_nn", "integer_only"])
def test_layers_without_a_kernel_are_refused_when_they_are_prepared(layer: nn.Module, kind: str, target: str) -> None:
    net = Net(lambda s, x: s.layer(x, x) if kind == "Bilinear" else s.layer(x)[0], layer=layer)
    with pytest.raises(ValueError, match=rf"target={target} has no kernel for 'layer' \({kind}\)"):
        qat.prepare(net, qat.preset("int8", target=target), torch.randn(3, 2, 4))


def test_a_file_that_may_be_left_out_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    case = CASES["onnx_gru"]
    net, x = prepared(case)
    with caplog.at_level(logging.INFO):
        rehearse(net, x, case.formats, skip_impossible=True)
    [record] = [record for record in caplog.records if record.name.startswith("qat")]  # nothing of the calibration
    assert record.message.startswith("No ONNX file will be written. layer 'gru' (GRU) cannot be written to ONNX")
    net, x = prepared(CASES["integer_only"])
    with pytest.raises(ValueError, match="log_softmax"):  # without an integer network there is nothing to run
        rehearse(net, x, ["int8"], skip_impossible=True)


def test_it_leaves_no_trace(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = SmallCNN(1, 10, 4), torch.randn(2, 1, 8, 8)
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    own = qat.prepare(copy.deepcopy(net), qat.preset("int8"), x)
    written: list[str] = []
    for name in ("int8", "onnx"):
        monkeypatch.setitem(EXPORTERS, name, _noting(EXPORTERS[name], written))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]

    before, level = states(), logging.getLogger("qat").level
    rehearse(own, x, ["int8", "onnx"], skip_impossible=False)
    assert written == ["model.safetensors", "model.onnx"]
    assert states() == before
    assert not any(tmp_path.iterdir())
    assert (logging.getLogger("qat").level, calibration_log.disabled) == (level, False)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def _noting(exporter: Any, written: list[str]) -> Any:
    def write(network: Any, path: Any, inputs: Any) -> None:
        torch.rand(3), random.random(), np.random.rand()
        exporter.write(network, path, inputs)
        written.append(path.name)

    return dataclasses.replace(exporter, write=write)
