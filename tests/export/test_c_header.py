"""The C header: NumPy and C compute the integers of the reference, exactly; what they lack is refused by name."""

import copy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.export.c_header import open_c_header
from qat.export.firmware.run import Model
from qat.export.formats import EXPORTERS
from qat.runtime import IntegerNetwork
from tests.test_fixed_point_networks import NETWORKS, OPERATIONS, build, config, finalized

HELD = ["ds_cnn", "small_cnn", "resnet20", "mobilenet_v2", "mobilenet_v3"]
OPERATIONS_HELD = [
    "adaptive_max_even", "nearest_smaller",
    "average", "average_uneven", "average_ceil", "average_1d", "mean", "sum", "max", "max_1d", "sub", "mul", "gate",
    "parameter", "concat", "hardswish_by_hand", "clamp", "pad", "two_readers", "gelu", "a_chain", "function_at_the_end",
    "sum_at_the_end",
]  # fmt: skip
COMPILED = ["average_uneven", "average_1d", "mean", "max_1d", "mul", "gate", "sub", "pad", "function_at_the_end"]
MAIN = """
#include <stdio.h>
#include "model.h"
int main(void) {
  while (fread(model_input(), 1, INPUT_SIZE, stdin) == INPUT_SIZE) {
    model_run();
    fwrite(model_output(), sizeof(MODEL_OUTPUT_TYPE), OUTPUT_SIZE, stdout);
  }
  return 0;
}
"""


def integers_of(network: IntegerNetwork, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the integer reference takes and returns as integers."""
    network.set_reference()
    tensors = network.run(x)
    (last,) = [node for node in network.nodes if node.name == network.outputs[0]]
    return tensors[network.nodes[0].name], tensors[last.inputs[0]]


def run_in_c(folder: Path, given: np.ndarray, expected: Tensor, checked: bool) -> np.ndarray:
    """What the compiled program makes of integers; warnings are errors, and so are reads out of bounds if `checked`."""
    gcc = shutil.which("gcc")
    if gcc is None:
        pytest.skip("gcc is not installed: apt-get install gcc")
    (folder / "main.c").write_text(MAIN)
    sizes = [f"-DINPUT_SIZE={given[0].size}", f"-DOUTPUT_SIZE={expected[0].numel()}"]
    flags = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-const-variable"]
    flags += ["-fsanitize=undefined,address", "-fno-sanitize-recover=all"] if checked else []
    subprocess.run([gcc, *flags, *sizes, "main.c", "model.c", "-o", "model"], cwd=folder, check=True)
    result = subprocess.run([folder / "model"], input=given.tobytes(), capture_output=True, check=True)
    dtype = np.int8 if expected.dtype == torch.int8 else np.int32
    return np.frombuffer(result.stdout, dtype).reshape(expected.shape)


@torch.no_grad()
def assert_equal_everywhere(
    network: IntegerNetwork, x: Tensor, folder: Path, in_c: bool = True, checked: bool = False
) -> None:
    given, expected = integers_of(network, x)
    qat.export(network, folder, x[:2], formats=["c_header"])
    model = Model(folder / "c_header" / "model.h")
    q = model.quantize(x.numpy())
    np.testing.assert_array_equal(q, given.flatten(1).numpy())
    np.testing.assert_array_equal(model.run(q), expected.numpy())
    assert torch.equal(open_c_header(folder / "c_header")(x), network(x))
    if in_c:
        np.testing.assert_array_equal(run_in_c(folder / "c_header", q, expected, checked), expected.numpy())


@pytest.mark.parametrize("name", HELD)
def test_networks_in_numpy_and_c_equal_the_reference(name: str, tmp_path: Path) -> None:
    net, x = build(NETWORKS[name], 8)
    assert_equal_everywhere(qat.lower(finalized(net, x, config("cmsis_nn"))), x, tmp_path, checked=name == "small_cnn")


@pytest.mark.parametrize("name", OPERATIONS_HELD)
def test_operations_in_numpy_and_c_equal_the_reference(name: str, tmp_path: Path) -> None:
    net, x = build(OPERATIONS[name], 8)
    assert_equal_everywhere(qat.lower(finalized(net, x, config())), x, tmp_path, in_c=name in COMPILED)


class Moves(nn.Module):
    """Everything that moves values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding="same", dilation=(1, 2)), nn.Linear(60, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)[:, :, 1:-1:2]
        y = torch.cat([y.transpose(1, 2), y.permute(0, 2, 1, 3).flip(3)], 1)
        y = nn.functional.pad(y, (1, -2, 1, 1))
        first, second = y.chunk(2, dim=2)
        y = torch.stack([first, second], 1).flatten(1, 2)[..., 1:].unsqueeze(1).squeeze(1)
        return self.head(y.reshape(y.shape[0], -1)[:, :60])


def test_moves_are_copies_with_strides(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 3, 8, 7)
    assert_equal_everywhere(qat.lower(finalized(Moves(), x, config())), x, tmp_path, checked=True)


def test_a_step_of_sequences_and_a_table_of_wide_results(tmp_path: Path) -> None:
    """Linear layers on positions, a convolution of one dimension, logits on positions."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(3, 6, 3, 2, 1, groups=3), nn.SiLU(), nn.Flatten(2), nn.Linear(6, 4))
    x = torch.randn(6, 3, 12)
    assert_equal_everywhere(qat.lower(finalized(net, x, config())), x, tmp_path, checked=True)


def test_the_exported_runner_needs_numpy_alone(tmp_path: Path) -> None:
    """In a fresh process without torch and without qat."""
    net, x = build(NETWORKS["ds_cnn"], 4)
    network = qat.lower(finalized(net, x, config("cmsis_nn")))
    qat.export(network, tmp_path, x, formats=["c_header"])
    folder = tmp_path / "c_header"
    assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "model.c", "model.h", "run.py"]
    assert len((folder / "run.py").read_text().splitlines()) <= 220
    np.save(tmp_path / "x.npy", x.numpy())
    blocked = "import sys; sys.modules |= {'torch': None, 'qat': None}; import runpy; sys.argv = sys.argv[1:]; "
    command = [sys.executable, "-I", "-c", blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    subprocess.run([*command, "run.py", "model.h", tmp_path / "x.npy", tmp_path / "y.npy"], cwd=folder, check=True)
    with torch.no_grad():
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), network(x).numpy())


def test_two_exports_are_the_same_bytes(tmp_path: Path) -> None:
    net, x = build(NETWORKS["small_cnn"], 4)
    network = qat.lower(finalized(net, x, config("cmsis_nn")))
    for name in ("a", "b"):
        qat.export(copy.deepcopy(network), tmp_path / name, x, formats=["c_header"])
    first, second = (tmp_path / name / "c_header" / "model.h" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()


def test_what_the_runners_lack_is_refused_by_name(tmp_path: Path) -> None:
    for name, message in (
        ("attention", r"'mul' \(FixedMatmul\)"),
        ("transposed", r"'t' \(FixedConv\): a transposed convolution"),
        ("group_norm", r"'n' \(FixedNorm\): the runners have"),
        ("reflect", r"'pad' \(Pad\): it moves values in a way"),
        ("nearest", r"'interpolate' \(take\): it moves values in a way"),
        ("adaptive_max", r"'adaptive_max_pool2d' \(adaptive_max_pool\): the runners have"),
    ):
        net, x = build(OPERATIONS[name], 8)
        network = qat.lower(finalized(net, x, config()))
        with pytest.raises(ValueError, match=f"c_header: .*{message}"):
            qat.export(network, tmp_path, x[:2], formats=["c_header"])
    assert not (tmp_path / "c_header").exists()


def test_weights_with_zero_points_and_float_targets_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(8, 4), torch.randn(16, 8)
    weight = {"bits": 8, "symmetric": False}
    network = qat.lower(finalized(net, x, config(weight=weight)))
    with pytest.raises(ValueError, match=r"a weight with a zero point; use quant.weight.symmetric=true"):
        qat.export(network, tmp_path, x, formats=["c_header"])
    check = EXPORTERS["c_header"].check
    assert check is not None
    check(config("cmsis_nn"))
    with pytest.raises(ValueError, match=r"target=generic scales in float.*use target=cmsis_nn or integer_only"):
        check(config("generic"))
    with pytest.raises(ValueError, match=r"this one does not; lower it with target=cmsis_nn"):
        qat.export(qat.lower(finalized(net, x, config("generic"))), tmp_path, x, formats=["c_header"])
