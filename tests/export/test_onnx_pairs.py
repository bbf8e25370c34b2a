"""Files of pairs, as TensorRT reads them: int8, float8 or int4 with zero point 0, and nothing inside of a pair."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import qat
from qat.export.formats import EXPORTERS
from qat.export.parity import ParityLimits, measure
from qat.ptq import PTQConfig, finalize
from qat.targets import check_target
from qat.zoo.gpt import CharGPT
from qat.zoo.models import ResNet, SmallCNN
from tests.networks.vit import ViT

MOVES = {"MaxPool", "Reshape", "Transpose", "Slice", "Pad", "Concat", "Relu", "Identity", "Squeeze", "Unsqueeze",
         "Split", "Gather", "Flatten"}  # fmt: skip


class Shapes(nn.Module):
    """What is moved, clamped and joined between layers; a parameter that is added; groups and a transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.up = nn.Conv2d(8, 8, 3, groups=4), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.p = nn.Parameter(torch.randn(4, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.pad(nn.functional.relu6(3 * self.norm(self.a(x))), (1, 0, 1, 0))
        y = self.up(nn.functional.hardtanh(self.b(y), -0.5, 1.0)) + self.p
        y = torch.cat([torch.relu(y), -y.abs().transpose(2, 3)], 1)
        return self.head(nn.functional.max_pool2d(y, 2).mean((2, 3)))


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    settings: dict[str, Any]
    types: set[str]
    class_dim: int = 1


def images(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def matrices() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def clamped() -> nn.Module:
    """A Clip and a Relu in front of a QuantizeLinear to float8, whose zero point two optimizers take for an integer."""
    return nn.Sequential(nn.Linear(16, 16), nn.Hardtanh(-0.2, 0.6), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))


DIGITS = (lambda: SmallCNN(1, 10, 8), images(24, 1, 8, 8))
CASES = {
    "small_cnn": Case(*DIGITS, {}, {"INT8"}),
    "small_cnn_w4a8": Case(*DIGITS, {"name": "w4a8"}, {"INT8"}),
    "small_cnn_binary": Case(*DIGITS, {"name": "binary"}, {"INT8"}),
    "small_cnn_fp8": Case(*DIGITS, {"name": "fp8"}, {"FLOAT8E4M3FN"}),
    "shapes": Case(Shapes, images(12, 3, 8, 8), {}, {"INT8"}),
    "shapes_fp8": Case(Shapes, images(12, 3, 8, 8), {"name": "fp8"}, {"FLOAT8E4M3FN"}),
    "clamped_fp8": Case(clamped, images(24, 16), {"name": "fp8"}, {"FLOAT8E4M3FN"}),
    "groups": Case(matrices, images(24, 128), {"name": "w4g32", "weight": {"group_size": 64}}, {"INT4"}),
    "char_gpt": Case(lambda: CharGPT(11, context=12, n_layer=1, n_head=2, width=16),
                     lambda: torch.randint(11, (16, 12)),
                     {"rules": [{"match": "type:Embedding", "weight": {"bits": None}}]}, {"INT8"}, -1),
    "resnet20": Case(lambda: ResNet(20, "A"), images(8, 3, 16, 16), {}, {"INT8"}),
    "vit_fp8": Case(ViT, images(8, 3, 16, 16), {"name": "fp8"}, {"FLOAT8E4M3FN"}),
}  # fmt: skip


def simulating(case: Case) -> tuple[Any, Tensor]:
    """Prepared, calibrated, with final biases; BatchNorm has lived in, negative gains among it."""
    torch.manual_seed(0)
    net, x = case.make(), case.inputs()
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, -0.5, 1.5), nn.init.normal_(norm.bias, std=0.3)
    with torch.no_grad():
        net.train()(x), net(x)
    settings = {"name": "int8", **case.settings}
    config = qat.preset(settings.pop("name"), target="tensorrt", **settings)
    prepared: Any = qat.prepare(net.eval(), config, x[:2])
    finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=0), trained=False)
    return prepared.eval(), x


def assert_of_pairs(model: onnx.ModelProto, types: set[str]) -> None:
    """What NVIDIA's documentation asks for, and what onnx-tensorrt's `QuantDequantLinearHelper` checks."""
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    readers = {name: [n for n in graph.node if name in n.input] for name in made}
    found = set()
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        x, scale, zero = node.input
        kind = TensorProto.DataType.Name(held[zero].data_type)
        assert kind in {"INT8", "FLOAT8E4M3FN", "INT4"}, node.name
        found.add(kind)
        assert not np.any(numpy_helper.to_array(held[zero]).astype(np.float32)), node.name
        assert (numpy_helper.to_array(held[scale]) > 0).all(), node.name
        if node.op_type == "QuantizeLinear":
            assert kind != "INT4"
            [reader] = readers[node.output[0]]
            assert reader.op_type == "DequantizeLinear"
            assert list(reader.input[1:]) == [scale, zero]
        elif x in held:
            assert held[x].data_type == held[zero].data_type
        else:
            assert made[x].op_type == "QuantizeLinear"
    assert found == types
    assert not {node.op_type for node in graph.node} & {"Cast", "Round", "QLinearConv"}
    assert {tensor.data_type for tensor in graph.initializer} <= {
        TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, *(getattr(TensorProto, kind) for kind in types)
    }  # fmt: skip
    for node in graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            x = node.input[0]
            while types != {"INT4"} and made[x].op_type in MOVES:  # weights alone: the input is a real number
                x = made[x].input[0]
            assert types == {"INT4"} or made[x].op_type == "DequantizeLinear", node.name
            assert made[node.input[1]].op_type == "DequantizeLinear", node.name
            assert held[node.input[2]].data_type == TensorProto.FLOAT  # no engine of pairs takes int32


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_file_of_pairs_computes_what_was_simulated(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    prepared, x = simulating(case)
    network = qat.lower(prepared)
    paths = qat.export(network, tmp_path, x[:2], ["int8", "onnx"])
    model = onnx.load(paths["onnx"])
    assert_of_pairs(model, case.types)
    for pair, parity in measure(prepared, network, paths, x, target="tensorrt", class_dim=case.class_dim).items():
        assert parity.layers or case.types != {"INT8"}
        parity.check(pair, ParityLimits(agreement=1.0))
    (got,) = ReferenceEvaluator(model).run(None, {network.inputs[0]: x[:4].numpy()})
    expected = prepared(x[:4])
    assert (torch.from_numpy(got) - expected).abs().max() <= 0.02 * expected.std()  # a tie, at most


def test_the_ends_of_a_grid_stand_in_front_of_the_pair(tmp_path: Path) -> None:
    """A ReLU's integers are 0 to 127 of int8, those of a hardtanh from -0.5 to 1 end at -64: Relu, Clip."""
    prepared, x = simulating(CASES["shapes"])
    network = qat.lower(prepared)
    qat.export(network, tmp_path, x[:2], ["onnx"])
    kinds = {node.name: node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    seen = network.run(x)
    ends = {name: (int(seen[name].min()), int(seen[name].max())) for name in network.grids()}
    assert kinds["mul.relu"] == "Relu"
    assert ends["mul"] == (0, 127)
    assert kinds["b.clipped"] == "Clip"
    assert ends["b"] == (-64, 127)
    assert {int(grid.zero_point) for grid in network.grids().values()} == {0}


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    prepared, x = simulating(CASES["groups"]._replace(make=lambda: nn.Sequential(nn.Linear(100, 4)),
                                                      inputs=images(4, 100)))  # fmt: skip
    with pytest.raises(ValueError, match=r"layer '0': .* \[4, 100\], is no matrix of whole groups of 64"):
        qat.export(qat.lower(prepared), tmp_path, x[:2], ["onnx"])


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4", "mxfp4"])
def test_presets_that_no_file_holds_are_refused_at_composition(name: str) -> None:
    config = qat.preset(name, target="tensorrt")
    with pytest.raises(ValueError, match=r"quant\.weight\.\w+=.*target=tensorrt takes .*use quant\.") as refused:
        check_target(config)
    assert re.search(r"format=e4m3fn|format=int", str(refused.value))


def test_openvinos_files_are_not_made_of_pairs() -> None:
    check = EXPORTERS["openvino"].check
    assert check is not None
    with pytest.raises(ValueError, match=r"export\.formats=openvino: target=tensorrt .*use target=openvino"):
        check(qat.preset("int8", target="tensorrt"))
    check(qat.preset("int8", target="openvino"))
