"""The preparation report: numbers against torch's own counter and the exported bytes; its text; what is refused."""

import copy
import io
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

import qat
from qat.__main__ import main
from qat.analysis.checkpoint import describe
from qat.analysis.layers import layer_table, operation_table
from qat.analysis.preparation import Totals, count_text, totals
from qat.export.checkpoint import DESCRIPTION
from qat.inspection import prepared_report
from qat.ptq import PTQConfig, finalize
from qat.runtime.fixed import FixedConv
from qat.zoo.gpt import CharGPT
from qat.zoo.models import SmallCNN
from tests import zygote
from tests.networks.mobilenet import MobileNetV2
from tests.networks.vit import ViT

INT8 = qat.preset("int8")


class Forecaster(nn.Module):
    """A stacked bidirectional LSTM in front of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


class Branches(nn.Module):
    """Cannot be traced as a whole; its body can. One layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.last = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        if y.sum() > 0:  # the line that stops the trace
            y = self.body(y)
        y = self.last(self.last(y))
        return y @ y.transpose(-1, -2)


class Calls(nn.Module):
    """Functions with weights of the network, products of activations, transposed, grouped and bilinear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(12, 6))
        self.grouped = nn.Conv1d(6, 8, 3, groups=2, padding=1, dilation=1)
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2, groups=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.grouped(x))  # [N, 6, 2 L]
        y = F.linear(y.transpose(1, 2), self.w)
        scores = torch.einsum("nld,nmd->nlm", y, y)
        return torch.bmm(torch.softmax(scores, -1), y)


def images(size: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "small_cnn": (lambda: SmallCNN(1, 10), images(8, 1)),
    "mobilenet_v2": (lambda: MobileNetV2(classes=10, width=0.25), images(32)),
    "vit": (ViT, images(16)),
    "char_gpt": (lambda: CharGPT(20, 16, 2, 2, 16), torch.randint(0, 20, (2, 16))),
    "branches": (Branches, torch.rand(2, 4, 8)),
    "calls": (Calls, torch.randn(2, 6, 10)),
}


def counted_by_torch(net: nn.Module, x: Tensor) -> float:
    """Multiply-accumulates a sample of the float network; fused attention is unfused so that it is counted."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net.eval()(x)
    return counter.get_total_flops() / 2 / len(x)


@pytest.mark.parametrize("graph", ["auto", "layers"])
@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_accumulates_are_those_that_torch_counts(name: str, graph: str) -> None:
    build, x = NETWORKS[name]
    net = build()
    prepared = qat.prepare(net, qat.QuantConfig.from_dict(INT8.to_dict() | {"graph": graph}), x)
    sums = totals(prepared)
    assert sum(sums.macs.values()) == counted_by_torch(net, x)
    assert sums.bit_operations_float == 1024 * sum(sums.macs.values())


def test_multiply_accumulates_do_not_depend_on_the_batch() -> None:
    build, x = NETWORKS["vit"]
    one, two = (totals(qat.prepare(build(), INT8, x[:n])) for n in (1, 2))
    assert one.macs == two.macs


def test_recurrent_layers_count_each_gate_of_each_step() -> None:
    x = torch.randn(3, 7, 6)
    rows = {row["name"]: row for row in layer_table(qat.prepare(Forecaster(), INT8, x))}
    for direction in ("", "_reverse"):
        assert rows[f"lstm.weight_ih_l0{direction}"]["macs"] == 7 * 4 * 8 * 6
        assert rows[f"lstm.weight_hh_l0{direction}"]["macs"] == 7 * 4 * 8 * 8
        assert rows[f"lstm.weight_ih_l1{direction}"]["macs"] == 7 * 4 * 8 * 16
    assert rows["head"]["macs"] == 16 * 3
    rules = [{"match": "lstm", "weight": {"bits": 4}, "activation": {"bits": 6}}]
    sums = totals(qat.prepare(Forecaster(), qat.QuantConfig.from_dict(INT8.to_dict() | {"rules": rules}), x))
    assert sums.macs == {
        "w4a8": 2 * 7 * 4 * 8 * 6,  # the network's input has 8 bits
        "w4a6": 2 * 7 * 4 * 8 * (8 + 16 + 8),  # hidden states have the layer's 6,
        "w8a6": 48,  # whoever reads them
    }


def test_bilinear_and_embedding_layers_by_hand() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.pair = nn.Embedding(9, 4), nn.Bilinear(4, 4, 5)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            out: Tensor = self.pair(self.table(a), self.table(b))
            return out

    prepared = qat.prepare(Pairs(), INT8, (torch.randint(0, 9, (3,)), torch.randint(0, 9, (3,))))
    rows = {row["name"]: row for row in layer_table(prepared)}
    assert rows["pair"]["macs"] == 5 * 4 * 4
    assert (rows["table"]["macs"], rows["table"]["calls"]) == (0, 2)


def test_macs_are_told_apart_by_the_bits_of_both_factors() -> None:
    x = torch.randn(2, 8)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    rules = [
        {"match": "2", "weight": {"bits": 4}, "activation": {"bits": 6}},
        {"match": "last", "weight": {"bits": None}},
    ]
    sums = totals(qat.prepare(net, qat.QuantConfig.from_dict(INT8.to_dict() | {"rules": rules}), x))
    assert sums.macs == {"w8a8": 128, "w4a6": 512, "float": 128}
    assert sums.bit_operations == 128 * 64 + 512 * 24 + 128 * 1024
    assert sums.weights == {8: 128, 4: 512, 32: 128}
    assert (sums.layers, sums.quantized) == (3, 2)


def test_products_of_activations_and_of_code_have_rows_of_their_own() -> None:
    build, x = NETWORKS["char_gpt"]
    rows = operation_table(qat.prepare(build(), INT8, x))
    assert [(row["name"], row["macs"], row["input_bits"]) for row in rows[:2]] == [
        ("blocks.0.attention.matmul", 16 * 16 * 16, 8),
        ("blocks.0.attention.matmul_2", 16 * 16 * 16, 8),
    ]
    build, x = NETWORKS["branches"]
    assert operation_table(qat.prepare(build(), INT8, x)) == [
        {"name": "Branches", "kind": "code", "macs": 4 * 4 * 16, "input": "float", "input_bits": 32}
    ]


def test_pruned_layers_count_as_they_are() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    for layer in (net[0], net[2]):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    rules = [{"match": "last", "weight": {"bits": None}}]
    sums = totals(qat.prepare(net, qat.QuantConfig.from_dict(INT8.to_dict() | {"rules": rules}), torch.randn(2, 8)))
    assert sums.macs == {"w8a8": 128, "float": 64}
    assert sums.weights == {8: 128, 32: 64}


# ---- size ------------------------------------------------------------------------------------------------------------

SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {},
    "w4a8": {},
    "w2a2_lsq": {},
    "w4g32": {"weight": {"allow_padding": True}},
    "w8a8_asymmetric": {},
    "fp8": {},
    "mxfp4": {},
    "nvfp4": {},
    "apot4": {},
    "ternary": {},
    "binary": {},
    "codebook4": {},
    "product": {"weight": {"bits": 4, "format": "product", "granularity": "group", "group_size": 4,
                           "range": "learned", "allow_padding": True}},
    "sixteen": {"weight": {"bits": 16}},
    "blocks": {"weight": {"bits": 4, "granularity": "block", "block_size": [8, 8], "range": "dynamic"}},
    "dorefa": {"weight": {"bits": 3, "range": "dorefa"}},
}  # fmt: skip


def scheme(name: str) -> qat.QuantConfig:
    config = (qat.preset(name) if name in qat.presets.PRESETS else INT8).to_dict()
    for part, changes in SCHEMES.get(name, {}).items():
        config[part] |= changes
    return qat.QuantConfig.from_dict(config)


def exported_bytes(prepared: nn.Module, x: Tensor, folder: Path) -> int:
    qat.calibrate(prepared, [x])
    finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=0), trained=True)
    path = qat.export(qat.lower(prepared.eval()), folder, x, formats=["int8"])["int8"]
    return sum(t.nbytes for name, t in load_file(path).items() if name != DESCRIPTION)


@pytest.mark.parametrize("name", SCHEMES)
def test_the_estimated_size_is_that_of_the_exported_tensors(name: str, tmp_path: Path) -> None:
    x = images(8)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, groups=4), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 3), nn.GroupNorm(4, 16), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip
    prepared = qat.prepare(net, scheme(name), x)
    before = sum(totals(prepared).bytes.values())
    actual = exported_bytes(prepared, x, tmp_path)
    assert before == pytest.approx(actual, rel=0.05, abs=400)
    assert sum(totals(prepared).bytes.values()) == before


@pytest.mark.parametrize("name", ["small_cnn", "char_gpt", "forecaster", "tied"])
def test_the_estimated_size_of_whole_networks(name: str, tmp_path: Path) -> None:
    if name == "forecaster":
        net, x = Forecaster(), torch.randn(4, 5, 6)
    elif name == "tied":
        net, x = CharGPT(40, 16, 1, 2, 32, tied_head=True), torch.randint(0, 40, (4, 16))
    else:
        net, x = NETWORKS[name][0](), NETWORKS[name][1]
    for parameter in net.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 1, 0.1)  # the file leaves out biases that are 0
    prepared = qat.prepare(net, INT8, x)
    estimated = sum(totals(prepared).bytes.values())
    if name == "tied":
        estimated -= 40 * 32  # is counted for each of its layers; the file has the same codes once
    # every grid of a tensor is a scale and a zero point; a few numbers of 4 bytes each step are not counted
    assert estimated == pytest.approx(exported_bytes(prepared, x, tmp_path), rel=0.05, abs=1000)


# ---- text ------------------------------------------------------------------------------------------------------------


def test_the_report_reads_from_totals_to_reasons() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    rules = [{"match": "first", "weight": {"bits": 4}}, {"match": "4", "weight": {"bits": None}}]
    text = qat.report(qat.prepare(net, qat.QuantConfig.from_dict(INT8.to_dict() | {"rules": rules}), torch.randn(2, 8)))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "Sequential: 2 of 3 layers have quantized weights, 2 edges are quantized"
    assert lines[1] == "weights 128 in 4 bits (29 %), 256 in 8 bits (57 %), 64 in float32 (14 %)"
    assert lines[2] == "multiply-accumulates 448 a sample: 256 w8a8 (57 %), 128 w4a8 (29 %), 64 float (14 %)"
    assert lines[3] == f"bit operations {count_text(256 * 64 + 128 * 32 + 64 * 1024)} a sample, 19 % of float32's"
    assert lines[4].startswith("estimated size 976 B without a header, 47 % of 2.1 KB: 320 B codes, ")
    assert lines[4].endswith("128 B scales and tables, 144 B biases, 384 B float32 (LayerNorm)")
    assert "0 QuantLinear int4 symmetric channel, dynamic (minmax) int8 rule 'first' 16x8 128 128 128" in lines
    assert "2 QuantLinear int8 symmetric channel, dynamic (minmax) uint8 default 16x16 256 256 320" in lines
    assert "4 Linear float float stays float: rule '4' 4x16 64 64 256" in lines
    assert "0 int8 symmetric tensor, running (ema) default [0, 255] 2 absorbs ReLU" in lines
    assert lines[-2:] == [
        "float: 3: no integer form: layer_norm is computed in float",
        "float: 4: stays float: rule '4'",
    ]
    assert max(map(len, text.splitlines())) <= 160


def test_the_report_says_which_line_stopped_the_trace_and_what_to_do() -> None:
    build, x = NETWORKS["branches"]
    text = " ".join(qat.report(qat.prepare(build(), INT8, x)).split())
    line = next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "stops the trace" in line)
    assert f"float: Branches: its code is not recorded: qat cannot trace Branches at {__file__}:{line}" in text
    assert "move it out of forward, into a submodule of its own" in text


def test_the_report_names_ties_targets_and_shared_grids() -> None:
    net = CharGPT(20, 16, 1, 2, 16, tied_head=True)
    config = qat.QuantConfig.from_dict({**INT8.to_dict(), "target": "onnxruntime_x86", "weight": {"bits": 7}})
    text = qat.report(qat.prepare(net, config, torch.randint(0, 20, (2, 16))))
    assert "default, tied with head" in text
    assert "(onnxruntime_x86 takes 7 bits)" in text

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.c(torch.cat([self.a(x), self.b(x)], 1))
            return out

    assert "shared by 2 tensors" in qat.report(qat.prepare(Dense(), INT8, images(4)))


def test_copies_and_pickles_report_the_same() -> None:
    build, x = NETWORKS["small_cnn"]
    prepared = qat.prepare(build(), INT8, x)
    file = io.BytesIO()
    torch.save(prepared, file)
    file.seek(0)
    assert qat.report(copy.deepcopy(prepared)) == qat.report(prepared)
    again: Totals = totals(torch.load(file, weights_only=False))
    assert again == totals(prepared)


def test_counting_leaves_the_network_as_it_was() -> None:
    build, x = NETWORKS["branches"]
    net = build().train()
    prepared = qat.prepare(net, INT8, x)
    assert all(module.training for module in prepared.modules())
    for module in prepared.modules():
        assert "forward" not in vars(module)
        kept = {hook.__module__ for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())}
        assert kept == ({"qat.turns"} if module is prepared else set())
    assert torch.equal(prepared(x), net(x))


# ---- what is refused -------------------------------------------------------------------------------------------------

CNN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
TABLE = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6))
IDS = torch.randint(0, 10, (4, 5))
PRODUCT = {"bits": 4, "format": "product", "granularity": "group", "range": "learned"}

REFUSED: dict[str, tuple[nn.Module, Tensor, dict[str, Any], str]] = {
    "rule": (CNN, images(8), {"rules": [{"match": "conv*"}]},
             r"quant.rules\[0\].match='conv\*' matches no layer. Nearest module paths: .*0.*; types: type:Conv2d, "
             r"type:Linear; 'first' and 'last' are valid too"),
    "group": (CNN, images(8), {"weight": {"bits": 4, "granularity": "group", "group_size": 5}},
              r"quant.weight.group_size=5 does not divide the 27 inputs of layer '0' \(weight \[4, 3, 3, 3\]\); give a "
              r"divisor of 27, exempt the layer by a rule, or set quant.weight.allow_padding=true"),
    "axis": (CNN, images(8), {"weight": {"bits": 8, "granularity": "channel", "axis": 3}},
             r"quant.weight.axis=3: the weight of layer '2' \(weight \[5, 144\]\) has 2 dimensions .* give an axis in "
             r"\[-2, 1\], or another for the layer by a rule"),
    "negative axis": (TABLE, IDS, {"weight": {"bits": 8, "granularity": "channel", "axis": -3}},
                      r"quant.weight.axis=-3: the weight of layer '0' \(weight \[10, 8\]\) has 2 dimensions"),
    "activation axis": (CNN, images(8), {"activation": {"bits": 8, "granularity": "channel", "axis": 4}},
                        r"quant.activation.axis=4: the tensor '0' has 4 dimensions \[2, 4, 6, 6\]"),
    "product": (TABLE, IDS, {"weight": {**PRODUCT, "group_size": 3}},
                r"quant.weight.group_size=3 does not divide the 8 inputs of layer '0' \(weight \[10, 8\]\)"),
    "subspaces": (TABLE, IDS, {"weight": {**PRODUCT, "group_size": 4, "subspaces": 4}},
                  r"quant.weight.subspaces=4 does not divide the 2 groups of inputs of layer '0' .* divisor of 2"),
    "codebook": (TABLE, IDS, {"weight": {**PRODUCT, "format": "codebook", "group_size": 4}},
                 r"quant.weight.granularity=group: a table a group would be larger than its weights"),
    "graph": (CNN, images(8), {"graph": "traced"},
              r"quant.graph='traced' is not known \(valid: auto, required, layers\)"),
    "required": (Branches(), torch.rand(2, 4, 8), {"graph": "required"},
                 r"qat cannot trace Branches at .*test_inspect.py:\d+: .* move it out of forward, into a submodule"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layer_or_a_network_cannot_have_is_refused_by_name(case: str) -> None:
    net, x, changes, said = REFUSED[case]
    with pytest.raises(ValueError, match=said):
        qat.prepare(net, qat.QuantConfig.from_dict({"weight": {"bits": 8}, "activation": {"bits": 8}} | changes), x)


# ---- command ---------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_report_of_a_composed_configuration(tmp_path: Path) -> None:
    command = ["qat", "inspect", "quant=w4a8", "model.width=8", "quant.graph=required"]
    done = zygote.run([*command, 'quant.rules=[{match: "block.*", weight: {bits: 2}}]'], tmp_path, os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("SmallCNN: 6 of 6 layers have quantized weights")
    assert "w2a8" in done.stdout
    assert "rule 'block.*'" in done.stdout
    assert not list(tmp_path.iterdir())  # nothing is trained or written


def test_graph_is_a_setting() -> None:
    assert "quant.graph=layers records nothing" in prepared_report(["quant.graph=layers"])
    with pytest.raises(ValueError, match=r"quant.graph='all' is not known \(valid: auto, required, layers\)"):
        prepared_report(["quant.graph=all"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quant=int9"], "Could not find 'quant/int9'"),
        (["quant.weight.bitz=3"], "bitz"),
        (["nothing.safetensors"], "no int8 checkpoint at 'nothing.safetensors'"),
        (["a.safetensors", "quant=int8"], "'a.safetensors' is not a setting (PATH=VALUE); a file is inspected alone"),
        (["--config-dir", "nowhere", "quant=int8"], "no config.yaml in 'nowhere'"),
    ],
)
def test_the_command_refuses_with_one_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", *arguments])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert "Config search path" not in err


def test_the_command_shows_what_a_checkpoint_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, x = NETWORKS["small_cnn"]
    prepared = qat.prepare(build(), scheme("w4a8"), x)
    size = exported_bytes(prepared, x, tmp_path)
    path = tmp_path / "model.safetensors"
    assert main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"{path}: int8 checkpoint, {path.stat().st_size / 1e3:.1f} KB (tensors {size / 1e3:.1f} KB"
    )
    assert "6 layers with" in lines[1]
    assert "6 computed in integers" in lines[1]
    row = next(line.split() for line in lines if line.startswith("block.conv1 "))
    assert row[1:4] == ["integers", "4", "16x16x3x3"]
    integer = qat.load(path)
    layer = integer.layer("block.conv1")
    real = (layer.weight - layer.weight_zero_point.reshape(-1, 1, 1, 1)) * layer.weight_scale.reshape(-1, 1, 1, 1)
    assert [float(row[4]), float(row[6])] == pytest.approx([float(real.min()), float(real.max())], rel=5e-3)
    assert int(row[-1].replace(",", "")) >= 16 * 16 * 9 // 2 + 4 * 16  # fresh biases are 0, and left out
    scale = float(integer.layer("x.quantized").output.scale)
    grid = next(line.split() for line in lines if line.startswith("x.quantized "))
    assert grid[1:3] == ["[-128,", "127]"]
    assert float(grid[3]) == pytest.approx(scale, rel=5e-3)


HELD: dict[str, tuple[Callable[[], nn.Module], Tensor, str, list[str]]] = {
    "recurrent": (Forecaster, torch.randn(4, 5, 6), "int8", ["lstm.cells.3.recall integers 8 32x8 "]),
    "look-up": (*NETWORKS["char_gpt"], "int8", ["embedding look-up 8 20x16 ", "4 integer_matmul"]),
    "levels": (*NETWORKS["small_cnn"], "codebook4", ["block.conv1 levels 4 16x16x3x3 ", "0 computed in integers"]),
    "groups": (*NETWORKS["small_cnn"], "w4g32", ["block.conv1 float 4 16x16x3x3 "]),
}


@pytest.mark.parametrize("kind", HELD)
def test_every_kind_of_layer_of_a_checkpoint_is_shown(kind: str, tmp_path: Path) -> None:
    build, x, preset, said = HELD[kind]
    exported_bytes(qat.prepare(build(), scheme(preset), x), x, tmp_path)
    text = " ".join(describe(tmp_path / "model.safetensors").split())
    for words in said:
        assert words in text


def test_inspect_shows_a_network_in_fixed_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, on a file for a target without floats: every layer and grid, with its own numbers."""
    build, x = NETWORKS["small_cnn"]
    config = qat.preset("int8", target="cmsis_nn")
    exported_bytes(qat.prepare(build(), config, x), x, tmp_path)
    network = qat.load(tmp_path / "model.safetensors")
    assert main(["inspect", str(tmp_path / "model.safetensors")]) == 0
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    convolutions = [node.name for node in network.nodes if isinstance(network.layer(node.name), FixedConv)]
    assert convolutions == ["stem.0", "block.conv1", "block.conv2", "conv1.0", "conv2.0", "linear.integers"]
    for name in convolutions:
        shape = "x".join(map(str, network.layer(name).weight.shape))
        assert any(line.startswith(f"{name} integers 8 {shape} ") for line in said), name
    rounded = {name: grid for name, grid in network.grids().items() if network.layer(name).output is not None}
    assert len(rounded) == 9
    for name, grid in rounded.items():
        zero = int(grid.zero_point)
        ends = [f"{(end - zero) * float(grid.scale):.3g}" for end in (grid.quant_min, grid.quant_max)]
        words = f"{name} [{grid.quant_min}, {grid.quant_max}] {float(grid.scale):.3g} {zero} {ends[0]} .. {ends[1]}"
        assert words in said, name
    assert "6 computed in integers" in " ".join(said)
    assert any("1 fixed_sum" in line and "1 fixed_mean" in line and "1 dequantize" in line for line in said)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, x = NETWORKS["small_cnn"]
    exported_bytes(qat.prepare(build(), INT8, x), x, tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    torch.save(build(), tmp_path / "pickle.safetensors")
    for name, said in (
        ("short", "is truncated or not a safetensors file"),
        ("foreign", "is a safetensors file, but not an int8 checkpoint of qat"),
        ("pickle", "is truncated or not a safetensors file"),
    ):
        with pytest.raises(SystemExit):
            main(["inspect", str(tmp_path / f"{name}.safetensors")])
        assert said in capsys.readouterr().err


def test_an_onnx_file_is_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'qat[export]'")
    x = torch.randn(8, 1, 8, 8)
    prepared = qat.prepare(SmallCNN(1, 10, 8).eval(), INT8, x[:2])
    finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=0), trained=False)
    path = qat.export(qat.lower(prepared), tmp_path, x[:2], formats=["onnx"])["onnx"]
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "opset ai.onnx 21" in text
    assert "x [batch, 1, 8, 8]" in text
    assert "5 QLinearConv" in text
    assert "nothing is computed in float" in text
    assert re.search(r"block\.conv1\.weight +int8 +8x8x3x3 +576 +576", text), text
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SystemExit):
        main(["inspect", str(damaged)])
    assert "damaged.onnx" in capsys.readouterr().err
