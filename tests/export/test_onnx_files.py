"""What ONNX files of whole networks cost, say and run as: in ONNX Runtime, in OpenVINO, in ONNX's own evaluator."""

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, fx, nn

import qat
from qat.export.agreement import Parity, ParityLimits
from qat.export.formats import EXPORTERS, OPENVINO
from qat.export.onnx import save_onnx
from qat.export.onnxruntime import OnnxNetwork, kernels
from qat.export.openvino import OpenVinoNetwork, openvino_kernels
from qat.export.parity import measure
from qat.export.reloaded import Reloaded
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerNetwork
from qat.zoo.models import SmallCNN
from tests.networks.mobilenet import MobileNetV2
from tests.networks.resnet import ResNet20

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small_cnn": (lambda: SmallCNN(1, 10, 16), (1, 8, 8)),
    "resnet20": (ResNet20, (3, 32, 32)),
    "mobilenetv2": (lambda: MobileNetV2(10, 0.5), (3, 32, 32)),
}


class Exported(NamedTuple):
    prepared: fx.GraphModule
    network: IntegerNetwork
    path: Path
    x: Tensor


def exported(make: Callable[[], nn.Module], shape: tuple[int, ...], path: Path, **settings: Any) -> Exported:
    torch.manual_seed(0)
    net, x = make(), torch.randn(24, *shape)
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, std=0.3)
    with torch.no_grad():
        net.train()(x), net(x)
    prepared = qat.prepare(net.eval(), qat.preset("int8", **settings), x[:2])
    finalize(prepared, [x], PTQConfig(adaptive_rounding_steps=0), trained=False)
    network = qat.lower(prepared)
    save_onnx(network, path, (x[:2],))
    return Exported(prepared, network, path, x)


@pytest.fixture(scope="module", params=NETWORKS)
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    make, shape = NETWORKS[request.param]
    return exported(make, shape, tmp_path_factory.mktemp(request.param) / "model.onnx")


def overhead(path: Path) -> float:
    """The share of a file that is not the numbers of the network."""
    size = path.stat().st_size
    return 1 - sum(len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer) / size


def assert_agrees(file: Exported, name: str, path: Path) -> Parity:
    reloaded = Reloaded({name: path}, fresh=False)
    parity = measure(file.prepared, file.network, reloaded, file.x)[f"qat_{name}"]
    parity.check("training / file", ParityLimits(agreement=1.0))
    assert parity.layers
    return parity


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_graph_of_resnet20_is_less_than_a_tenth_of_its_file(tmp_path: Path) -> None:
    file = exported(*NETWORKS["resnet20"], tmp_path / "model.onnx")
    weights = sum(p.numel() for p in ResNet20().parameters() if p.dim() > 1)
    assert weights < file.path.stat().st_size < 1.15 * weights
    assert overhead(file.path) < 0.1


def test_the_file_says_what_it_is(file: Exported) -> None:
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21}
    assert {p.key: json.loads(p.value) for p in model.metadata_props} == json.loads(json.dumps(file.network.info))
    shapes = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert shapes == [["batch", *file.x.shape[1:]]]
    steps = {node.name for node in file.network.nodes}
    made = {name for node in model.graph.node for name in node.output}
    assert steps <= made  # each tensor of the network has its name
    for tensor in model.graph.initializer:
        owner = tensor.name.rsplit(".", 1)[0]
        assert owner in steps or tensor.data_type == TensorProto.UINT8, tensor.name


@pytest.mark.parametrize(("settings", "kind"), [
    ({"weight": {"bits": 4}}, "INT4"), ({"weight": {"bits": 4, "symmetric": False, "narrow_range": False}}, "UINT4"),
    ({"weight": {"bits": 2}}, "INT4"),
])  # fmt: skip
def test_four_bits_take_four_bits_and_run_in_integers(settings: dict[str, Any], kind: str, tmp_path: Path) -> None:
    file = exported(*NETWORKS["small_cnn"], tmp_path / "model.onnx", **settings)
    weights = [t for t in onnx.load(file.path).graph.initializer if t.name.endswith(".weight")]
    assert {TensorProto.DataType.Name(t.data_type) for t in weights} <= {kind, "INT4"}
    assert kind in {TensorProto.DataType.Name(t.data_type) for t in weights}
    assert all(len(t.raw_data) == -(-np.prod(t.dims) // 2) for t in weights)
    ran = kernels(file.path)
    assert (ran.counts["QLinearConv"], ran.counts["QGemm"], ran.floating) == (5, 1, [])
    expected = file.network(file.x)
    assert torch.allclose(OnnxNetwork(file.path)(file.x), expected, atol=1e-5)
    (got,) = ReferenceEvaluator(onnx.load(file.path)).run(None, {"x": file.x[:4].numpy()})
    assert np.allclose(got, expected[:4], atol=1e-5)


# ---- engines ---------------------------------------------------------------------------------------------------------


def layers_of(network: IntegerNetwork, *kinds: str) -> int:
    return sum(type(network.layer(node.name)).__name__ in kinds for node in network.nodes)


@pytest.mark.parametrize("target", ["generic", "onnxruntime_x86"])
def test_onnxruntime_runs_every_layer_in_integers(file: Exported, target: str) -> None:
    ran = kernels(file.path, target)
    assert ran.floating == []
    assert ran.engine.startswith("ONNX Runtime 1.")
    assert ran.counts["QLinearConv"] + ran.counts["QGemm"] == layers_of(file.network, "IntegerConv")
    assert ran.counts["QLinearAdd"] == layers_of(file.network, "Add") > 0
    assert "Expand" not in ran.counts  # which is there for OpenVINO


def test_layers_that_stay_float_are_named(tmp_path: Path) -> None:
    rule = {"match": "conv1.*", "weight": {"bits": None}, "activation": {"bits": None}}
    file = exported(*NETWORKS["small_cnn"], tmp_path / "model.onnx", rules=[rule])
    floating = kernels(file.path).floating
    assert any(name.startswith("conv1.0") and name.endswith("(Conv)") for name in floating), floating
    assert not any(name.startswith(("stem", "block.conv", "conv2", "linear")) for name in floating), floating


def test_onnxruntime_agrees(file: Exported) -> None:
    assert_agrees(file, "onnx", file.path)


def test_reference_evaluator_agrees(file: Exported) -> None:
    x = file.x[:2]
    (got,) = ReferenceEvaluator(onnx.load(file.path)).run(None, {"x": x.numpy()})
    expected = file.network(x)
    assert (torch.from_numpy(got) - expected).abs().max() <= 0.02 * expected.std()
    assert torch.equal(torch.from_numpy(got).argmax(1), expected.argmax(1))


def test_openvino_runs_the_same_file(file: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    ran = openvino_kernels(file.path)
    assert ran.floating == []
    convolutions = [node for node in file.network.nodes if getattr(file.network.layer(node.name), "stride", None)]
    assert ran.counts["Convolution (u8)"] == len(convolutions)
    for field in ("open", "given", "kernels"):  # a target's file is measured on its engine
        monkeypatch.setitem(EXPORTERS["onnx"].__dict__, field, getattr(OPENVINO, field))
    parity = assert_agrees(file, "onnx", file.path)
    outputs = file.network(file.x)
    assert parity.max_abs <= 0.02 * outputs.std()  # sums are rounded: without, differences are everywhere
    assert (OpenVinoNetwork(file.path)(file.x) - outputs).abs().mean() <= 1e-2 * outputs.std()


def test_openvinos_own_files(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    file = exported(*NETWORKS["small_cnn"], tmp_path / "model.onnx")
    paths = qat.export(file.network, tmp_path, file.x[:2], formats=["openvino"])
    assert sorted(p.name for p in paths["openvino"].iterdir()) == ["SHA256SUMS", "model.bin", "model.xml"]
    assert_agrees(file, "openvino", paths["openvino"])
    assert openvino_kernels(paths["openvino"]).floating == []
    assert torch.allclose(OpenVinoNetwork(paths["openvino"])(file.x[:5]), file.network(file.x[:5]), atol=1e-5)


def test_openvino_rounds_no_activations_of_its_own(tmp_path: Path) -> None:
    """In front of 8-bit weights it would: the files' options keep it from that, also for those who give none."""
    openvino = pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)), torch.randn(256, 64)
    weights_alone = qat.QuantConfig.from_dict({"weight": {"bits": 8, "granularity": "channel"}, "target": "openvino"})
    prepared = qat.prepare(net, weights_alone, x[:2])
    qat.calibrate(prepared, [x])
    network = qat.lower(prepared.eval())
    paths = qat.export(network, tmp_path, x[:2], formats=["onnx", "openvino"])
    assert torch.allclose(OpenVinoNetwork(paths["onnx"])(x), network(x), atol=1e-6)
    given = {"INFERENCE_PRECISION_HINT": "f32"}  # it would take bfloat16 where the processor has it
    compiled = openvino.Core().compile_model(str(paths["openvino"] / "model.xml"), "CPU", given)
    assert torch.allclose(torch.from_numpy(compiled([x.numpy()])[0]), network(x), atol=1e-6)


# ---- what does not work ----------------------------------------------------------------------------------------------


def foreign(path: Path) -> Path:
    """A model with an operation that nobody has."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Transmogrify", ["x"], ["y"], domain="example")], "g", *[[v] for v in value]
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def test_operations_that_onnxruntime_lacks_are_named(tmp_path: Path) -> None:
    path = foreign(tmp_path / "foreign.onnx")
    for use in (OnnxNetwork, kernels):
        with pytest.raises(ValueError, match=r"ONNX Runtime .* cannot open .*foreign\.onnx.*Transmogrify"):
            use(path)


def test_openvino_has_no_integers_of_a_network_that_has_none(tmp_path: Path) -> None:
    """Quantized weights alone: nothing to be given, and so nothing made."""
    pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    net, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(6, 8)
    prepared = qat.prepare(net, qat.preset("w4g32", target="openvino"), x)
    finalize(prepared, [x], PTQConfig(), trained=False)
    network = qat.lower(prepared)
    path = qat.export(network, tmp_path, x, formats=["onnx"])["onnx"]
    assert OPENVINO.given(path, "openvino", network.grids(), (x,), {}).integers == {}


def test_operations_that_openvino_lacks_are_named(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    with pytest.raises(ValueError, match=r"(?s)OpenVINO .* cannot open .*foreign\.onnx.*Transmogrify"):
        OpenVinoNetwork(foreign(tmp_path / "foreign.onnx"))


@pytest.mark.parametrize("engine", [OnnxNetwork, OpenVinoNetwork])
def test_what_is_no_model_is_refused(engine: Callable[[Path], Any], tmp_path: Path) -> None:
    if engine is OpenVinoNetwork:
        pytest.importorskip("openvino", reason="pip install 'qat[openvino]'")
    (tmp_path / "broken.onnx").write_bytes(b"\x08\x0a nonsense" * 20)
    with pytest.raises(ValueError, match=r"cannot open .*broken\.onnx"):
        engine(tmp_path / "broken.onnx")


def test_missing_openvino_says_how_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = exported(*NETWORKS["small_cnn"], tmp_path / "model.onnx")
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> ModuleType:
        if name == "openvino":
            raise ImportError("No module named 'openvino'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'qat\[openvino\]'"):
        OpenVinoNetwork(file.path)
    with pytest.raises(ImportError, match=r"pip install 'qat\[openvino\]'"):
        EXPORTERS["openvino"].write(file.network, tmp_path / "openvino", (file.x[:2],))
    assert not (tmp_path / "openvino").exists()
