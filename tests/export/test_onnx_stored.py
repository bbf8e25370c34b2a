"""Stored weights and simulated activations in ONNX files: ONNX Runtime computes what the integer network does."""

import re
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

import qat
from qat.export.onnx import save_onnx
from qat.export.onnx_stored import check_onnx
from qat.export.onnxruntime import OnnxNetwork, kernels
from qat.numerics.formats import FORMATS
from qat.ptq import round_biases
from qat.runtime import IntegerNetwork
from qat.runtime.layers import FloatConv
from qat.runtime.network import Node
from qat.runtime.stored import ProductConv, Simulate, StoredConv, TableConv

INT8 = {"activation": {"bits": 8}, "input": {"bits": 8}}
FLOAT: dict[str, Any] = {}
GROUP = {"granularity": "group", "allow_padding": True}
AFFINE = {"symmetric": False, "narrow_range": False}
LEARNED = {"range": "learned"}


def images() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(96, 5),
    ), torch.randn(32, 4, 6, 6)  # fmt: skip


def sequences() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)), torch.randn(32, 7, 16)


def signals() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Conv1d(8, 6, 3, stride=2), nn.MaxPool1d(2), nn.ReLU(),
        nn.Conv1d(6, 4, 1),
    ), torch.randn(32, 4, 19)  # fmt: skip


def lowered(made: tuple[nn.Module, Tensor], config: dict[str, Any]) -> tuple[IntegerNetwork, Tensor]:
    """The integer network of a calibrated one, and its inputs; BatchNorm has lived in, negative gains among it."""
    net, x = made
    for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]:
        nn.init.uniform_(norm.weight, -0.3, 1.5), nn.init.normal_(norm.bias, std=0.3)
    for _ in range(3):
        net(x)
    prepared = qat.prepare(net.eval(), qat.QuantConfig.from_dict(config), x[:2])
    qat.calibrate(prepared, [x])
    qat.set_mode(prepared, "frozen")
    round_biases(prepared)
    return qat.lower(prepared.eval()), x * 1.3  # beyond the calibrated ranges, too


def test_float_weights_stay_such_behind_a_padding_by_nothing(tmp_path: Path) -> None:
    """ONNX Runtime would round them to 8 bits between a DequantizeLinear and a QuantizeLinear."""
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding_mode="circular"), nn.Conv2d(4, 3, 1))
    weight = {"weight": {"bits": 4, "granularity": "block", "block_size": [4, 4], "allow_padding": True}}
    network, x = lowered((net, torch.randn(32, 4, 6, 6)), {**weight, **INT8})
    path = tmp_path / "model.onnx"
    save_onnx(network, path, (x[:2],))
    counts = kernels(path).counts
    assert counts["Conv"] == 3
    assert "QLinearConv" not in counts


def by_reference(path: Path, x: Tensor) -> Tensor:
    model = onnx.load(path)
    return torch.from_numpy(ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x.numpy()})[0])


@torch.no_grad()
def assert_equal(network: IntegerNetwork, x: Tensor, path: Path, reference: bool = False) -> None:
    """The file gives what `network` does, to float32's rounding.

    A value at a tie that falls to the other side is a step of one activation, and reaches all outputs of its sample.
    """
    save_onnx(network, path, (x[:2],))
    onnx.checker.check_model(onnx.load(path), full_check=True)
    expected = network(x)
    results = [OnnxNetwork(path)(x)] + ([by_reference(path, x)] if reference else [])
    for got in results:
        assert got.shape == expected.shape
        far = (got - expected).abs() / (expected.max() - expected.min())
        assert (far <= 1e-5).double().mean() >= 0.9, f"{float(far.max()):.1e}, {float(far.median()):.1e} on the median"
        assert far.max() <= 0.05


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ---- weights ---------------------------------------------------------------------------------------------------------

# scheme of the weight, the layer that holds it, and the type of its codes
WEIGHTS: dict[str, tuple[dict[str, Any], type, str]] = {
    "e4m3fn": ({"format": "e4m3fn", "bits": 8}, TableConv, "FLOAT8E4M3FN"),
    "e5m2_tensor": ({"format": "e5m2", "bits": 8, "granularity": "tensor"}, TableConv, "FLOAT8E5M2"),
    "e3m2": ({"format": "e3m2", "bits": 6}, TableConv, "FLOAT8E4M3FN"),
    "e2m1": ({"format": "e2m1", "bits": 4}, TableConv, "UINT4"),
    "bf16": ({"format": "bf16", "bits": 16}, TableConv, "BFLOAT16"),
    "fp16": ({"format": "fp16", "bits": 16}, TableConv, "FLOAT16"),
    "mxfp4": ({"format": "mxfp4", "bits": 4, "group_size": 32} | GROUP, TableConv, "UINT4"),
    "mxint8": ({"format": "mxint8", "bits": 8, "group_size": 32} | GROUP, TableConv, "UINT8"),
    "nvfp4": ({"format": "nvfp4", "bits": 4, "group_size": 16} | GROUP, TableConv, "UINT4"),
    "pow2": ({"format": "pow2", "bits": 4}, TableConv, "UINT4"),
    "apot": ({"format": "apot", "bits": 5}, TableConv, "UINT8"),
    "codebook": ({"format": "codebook", "bits": 4, "granularity": "tensor"} | LEARNED, TableConv, "UINT4"),
    "codebook_channel": ({"format": "codebook", "bits": 3} | LEARNED, TableConv, "UINT4"),
    "codebook_block": (
        {"format": "codebook", "bits": 5, "granularity": "block", "block_size": [3, -1]} | LEARNED, TableConv, "UINT8"
    ),
    "product": ({"format": "product", "bits": 4, "group_size": 4} | GROUP | LEARNED, ProductConv, "UINT4"),
    "product_parts": (
        {"format": "product", "bits": 5, "group_size": 3, "subspaces": 2} | GROUP | LEARNED, ProductConv, "UINT8"
    ),
    "block": ({"bits": 4, "granularity": "block", "block_size": [5, 7]}, TableConv, "INT4"),
    "block_affine": ({"bits": 8, "granularity": "block", "block_size": [-1, 3]} | AFFINE, TableConv, "UINT8"),
    "block_wide": ({"bits": 12, "granularity": "block", "block_size": [4, 4]}, TableConv, "INT16"),
    "axis": ({"bits": 4, "axis": 1}, TableConv, "INT4"),
    "axis_affine": ({"bits": 4, "axis": 1} | AFFINE, TableConv, "UINT4"),
    "axis_wide": ({"bits": 16, "axis": 1} | AFFINE, TableConv, "UINT16"),
    "axis_binary": ({"format": "binary", "bits": 1, "axis": 1}, TableConv, "INT4"),
    "axis_dorefa": ({"bits": 4, "axis": 1, "range": "dorefa"}, TableConv, "INT8"),
    "int12": ({"bits": 12}, FloatConv, "INT16"),
    "int16_affine": ({"bits": 16} | AFFINE, FloatConv, "UINT16"),
    "int10_group": ({"bits": 10, "group_size": 8} | GROUP | AFFINE, FloatConv, "UINT16"),
}  # fmt: skip


def fitting(weight: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The images' network; for parts of the inputs, one whose inputs divide into them."""
    if weight.get("subspaces", 1) == 1:
        return images()
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)), torch.randn(32, 4, 6, 6)


def code_types(path: Path) -> set[str]:
    tensors = onnx.load(path).graph.initializer
    return {TensorProto.DataType.Name(t.data_type) for t in tensors if t.name.endswith(".weight")}


@pytest.mark.parametrize("activations", [INT8, FLOAT], ids=["int8", "float"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str, activations: dict[str, Any], tmp_path: Path) -> None:
    weight, kind, codes = WEIGHTS[name]
    network, x = lowered(fitting(weight), {"weight": weight} | activations)
    layers = [layer for layer in network.layers.values() if isinstance(layer, FloatConv | StoredConv)]
    assert {type(layer) for layer in layers} == {kind}
    assert_equal(network, x, tmp_path / "m.onnx", reference=name in ("codebook_channel", "product_parts", "axis_wide"))
    assert code_types(tmp_path / "m.onnx") == {codes}


SEQUENCES = ("e2m1", "bf16", "mxfp4", "codebook", "product", "block", "axis_affine", "int12")


@pytest.mark.parametrize("activations", [INT8, FLOAT], ids=["int8", "float"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_weights_of_linear_layers_on_sequences(name: str, activations: dict[str, Any], tmp_path: Path) -> None:
    network, x = lowered(sequences(), {"weight": WEIGHTS[name][0]} | activations)
    assert_equal(network, x, tmp_path / "m.onnx", reference=name == "block")


@pytest.mark.parametrize("name", ["e4m3fn", "nvfp4", "codebook_block", "axis"])
def test_weights_of_convolutions_in_one_dimension(name: str, tmp_path: Path) -> None:
    network, x = lowered(signals(), {"weight": WEIGHTS[name][0]} | INT8)
    assert_equal(network, x, tmp_path / "m.onnx")


@pytest.mark.parametrize("name", ["e2m1", "mxfp4", "codebook_channel", "product", "block_affine", "axis", "bf16"])
def test_engines_multiply_weights_out_once(name: str, tmp_path: Path) -> None:
    """All operations on initializers are gone from the graph that runs."""
    network, x = lowered(images(), {"weight": WEIGHTS[name][0]})
    save_onnx(network, tmp_path / "m.onnx", (x[:2],))
    gone = {"Cast", "Gather", "GatherElements", "Sub", "Mul", "Add", "Transpose", "Slice"}
    assert not gone & set(kernels(tmp_path / "m.onnx").counts)


def test_zero_points_are_written_where_there_are_any(tmp_path: Path) -> None:
    for name, there in (("block", False), ("block_affine", True), ("e2m1", False)):
        network, x = lowered(images(), {"weight": WEIGHTS[name][0]})
        save_onnx(network, tmp_path / "m.onnx", (x[:2],))
        names = [t.name for t in onnx.load(tmp_path / "m.onnx").graph.initializer]
        assert any(n.endswith("weight_zero_point") for n in names) == there


@pytest.mark.parametrize("name", ["e2m1", "product"])
def test_engines_leave_weights_between_integer_activations_alone(name: str, tmp_path: Path) -> None:
    """ONNX Runtime rounds float weights between DequantizeLinear and QuantizeLinear to 8 bits: there must be none."""
    network, x = lowered(images(), {"weight": WEIGHTS[name][0]} | INT8)
    save_onnx(network, tmp_path / "m.onnx", (x[:2],))
    assert not {"QLinearConv", "QGemm"} & set(kernels(tmp_path / "m.onnx").counts)


def test_engines_leave_float_layers_between_integer_activations_alone(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.stays, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 3)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            return self.last(torch.relu(self.stays(y))) + self.other(y).mean((2, 3), keepdim=True)

    config = {"weight": {"bits": 8}, "rules": [{"match": "stays", "weight": {"bits": None}}]} | INT8
    network, x = lowered((Shared(), torch.randn(32, 3, 8, 8)), config)
    assert isinstance(network.layer("stays"), FloatConv)
    assert_equal(network, x, tmp_path / "m.onnx")


def test_reloaded_checkpoint_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("mxfp4", "product", "axis_wide", "bf16"):
        weight, simulated = WEIGHTS[name][0], {"bits": 8, "range": "dynamic", "granularity": "token"}
        network, x = lowered(images(), {"weight": weight, "activation": simulated, "input": INT8["input"]})
        paths = qat.export(network, tmp_path, x[:2])
        save_onnx(qat.load(paths["int8"]), tmp_path / "again.onnx", (x[:3],))
        assert (tmp_path / "again.onnx").read_bytes() == paths["onnx"].read_bytes()


# ---- activations -----------------------------------------------------------------------------------------------------

DYNAMIC = {"range": "dynamic"}
TOKEN = {"range": "dynamic", "granularity": "token"}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "channel": {"bits": 8, "granularity": "channel"},
    "channel_affine": {"bits": 8, "granularity": "channel", "symmetric": False},
    "channel_affine_signed": {"bits": 4, "granularity": "channel", "symmetric": False, "signed": True},
    "channel_wide": {"bits": 16, "granularity": "channel"},
    "channel_lsq": {"bits": 4, "granularity": "channel", "range": "lsq"},
    "channel_last": {"bits": 8, "granularity": "channel", "axis": -1, "symmetric": False},
    "channel_dynamic": {"bits": 8, "granularity": "channel", "range": "dynamic"},
    "dynamic": {"bits": 8} | DYNAMIC,
    "dynamic_affine": {"bits": 8, "symmetric": False} | DYNAMIC,
    "dynamic_affine_absmax": {"bits": 4, "symmetric": False, "observer": "absmax"} | DYNAMIC,
    "token": {"bits": 8} | TOKEN,
    "token_affine": {"bits": 8, "symmetric": False} | TOKEN,
    "token_absmax": {"bits": 4, "observer": "absmax"} | TOKEN,
    "token_one_bit": {"bits": 1, "signed": False} | TOKEN,
    "e4m3fn": {"format": "e4m3fn", "bits": 8},
    "e4m3fn_percentile": {"format": "e4m3fn", "bits": 8, "observer": "percentile", "percentiles": [1.0, 99.0]},
    "e4m3fn_lsq": {"format": "e4m3fn", "bits": 8, "range": "lsq"},
    "e4m3fn_channel": {"format": "e4m3fn", "bits": 8, "granularity": "channel"},
    "e4m3fn_token": {"format": "e4m3fn", "bits": 8} | TOKEN,
    "e5m2": {"format": "e5m2", "bits": 8},
    "e5m2_dynamic": {"format": "e5m2", "bits": 8} | DYNAMIC,
    "bf16": {"format": "bf16", "bits": 16},
    "bf16_channel": {"format": "bf16", "bits": 16, "granularity": "channel"},
    "fp16": {"format": "fp16", "bits": 16},
    "fp16_dynamic": {"format": "fp16", "bits": 16} | DYNAMIC,
}
REFERENCE = ("channel_affine", "dynamic_affine", "token", "e4m3fn_token", "bf16")


@pytest.mark.parametrize("make", [images, sequences, signals], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, make: Any, tmp_path: Path) -> None:
    scheme = ACTIVATIONS[name]
    network, x = lowered(make(), {"weight": {"bits": 8}, "activation": scheme, "input": scheme})
    assert any(isinstance(layer, Simulate) for layer in network.layers.values())
    assert_equal(network, x, tmp_path / "m.onnx", reference=name in REFERENCE and make is images)


def test_simulated_and_integer_activations_in_one_network(tmp_path: Path) -> None:
    config = {"weight": WEIGHTS["e2m1"][0], "rules": [{"match": "3", "activation": ACTIVATIONS["e4m3fn"]}]} | INT8
    network, x = lowered(images(), config)
    assert_equal(network, x, tmp_path / "m.onnx", reference=True)


def simulated(scheme: dict[str, Any], signed: bool, relu: bool) -> IntegerNetwork:
    """A network that is one Simulate."""
    layer = Simulate(scheme, signed, relu)
    if not layer.quantizer.dynamic:
        layer.quantizer.range.set(torch.tensor(1.0), torch.tensor(0.0))
    return IntegerNetwork(["x"], [Node("y", ("x",))], {"y": layer}, ["y"]).eval()


def assert_identical(network: IntegerNetwork, x: Tensor, path: Path) -> None:
    save_onnx(network, path, (x[:1],))
    expected = network(x)
    for got in (OnnxNetwork(path)(x), by_reference(path, x)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("format", ["e4m3fn", "e5m2", "bf16", "fp16"])
@pytest.mark.parametrize("range", ["fixed", "dynamic"])
def test_casts_are_the_grid_to_the_bit(format: str, range: str, tmp_path: Path) -> None:
    """All values, the middles between them and their neighbours, and what lies beyond the largest."""
    bits = FORMATS[format].bits[0]
    values = FORMATS[format].grid(bits, True, False).values()
    middles = ((values[1:].double() + values[:-1].double()) / 2).float()
    largest = torch.finfo(torch.float32).max
    beyond = torch.tensor([largest, -largest, 1e-40, -1e-45] + ([torch.inf, -torch.inf] if range == "fixed" else []))
    around = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (torch.inf, -torch.inf)]
    x = torch.cat([values, middles, *around, beyond, torch.randn(999) * 10]).unsqueeze(0)
    assert_identical(simulated({"format": format, "bits": bits, "range": range}, True, False), x, tmp_path / "m.onnx")


@pytest.mark.parametrize("granularity", ["tensor", "token", "channel"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "affine"])
def test_dynamic_ranges_are_the_observers_to_the_bit(granularity: str, symmetric: bool, tmp_path: Path) -> None:
    """Samples of zeros, of one sign, and from the smallest to the largest numbers; of all ranks."""
    size = torch.tensor([0, 1e-42, 1e-38, 1e-3, 1.0, 1e30]).reshape(6, 1, 1, 1)
    x = torch.randn(6, 3, 4, 5) * size
    for observer in ("minmax", "absmax"):
        scheme = {"bits": 8, "granularity": granularity, "observer": observer, "symmetric": symmetric} | DYNAMIC
        for relu in (False, True):
            for case in (x, x.abs(), -x.abs(), x[:, 0], x[:, 0, 0]):
                assert_identical(simulated(scheme, symmetric and not relu, relu), case, tmp_path / "m.onnx")


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "e2m1": (
        {"format": "e2m1", "bits": 4},
        "quant.activation.format=e2m1: ONNX Runtime has no kernels for it; use export=int8 (no ONNX file), or "
        "quant.activation.format=e4m3fn quant.activation.bits=8",
    ),
    "mxfp4": (
        {"format": "mxfp4", "bits": 4, "group_size": 32} | GROUP | DYNAMIC,
        "quant.activation.format=mxfp4: ONNX Runtime has no kernels for it; use export=int8 (no ONNX file), or "
        "quant.activation.format=e4m3fn quant.activation.bits=8 quant.activation.granularity=token "
        "quant.activation.group_size=null",
    ),
    "group": (
        {"bits": 8, "group_size": 4, "axis": -1} | GROUP | DYNAMIC,
        "quant.activation.granularity=group: ONNX Runtime has no kernels for activations in groups; use export=int8 "
        "(no ONNX file), or quant.activation.granularity=token quant.activation.group_size=null "
        "quant.activation.axis=null",
    ),
    "observer": (
        {"bits": 8, "observer": "mse"} | DYNAMIC,
        "quant.activation.observer=mse: a dynamic range is measured in the file, and ONNX measures minmax and absmax; "
        "use export=int8 (no ONNX file), or quant.activation.observer=minmax",
    ),
    "apot": (
        {"format": "apot", "bits": 4},
        "quant.activation.format=apot: ONNX Runtime has no kernels for it; use export=int8 (no ONNX file), or "
        "quant.activation.format=int",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_field_and_a_valid_neighbour(name: str) -> None:
    scheme, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_onnx(qat.QuantConfig.from_dict({"activation": scheme}))
    with pytest.raises(ValueError, match=f"^{re.escape(message.replace('quant.activation', 'quant.input'))}$"):
        check_onnx(qat.QuantConfig.from_dict({"input": scheme}))
    message = message.replace("quant.activation", "quant.rules[0].activation")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_onnx(qat.QuantConfig.from_dict({"rules": [{"match": "fc", "activation": scheme}]}))


def neighbour(message: str) -> dict[str, Any]:
    """The fields that a refusal tells to write."""
    advice = message.partition(", or ")[2]
    fields = dict(re.findall(r"quant\.activation\.(\w+)=(\S+)", advice))
    return {k: None if v == "null" else int(v) if v.isdigit() else v for k, v in fields.items()}


@pytest.mark.parametrize("format", [name for name, kind in FORMATS.items() if not kind.fitted])
def test_every_format_is_written_or_has_a_neighbour_that_is(format: str, tmp_path: Path) -> None:
    kind = FORMATS[format]
    scheme: dict[str, Any] = {"format": format, "bits": kind.bits[-1]}
    if kind.block:
        scheme |= {"granularity": "group", "group_size": kind.block, "range": "dynamic", "allow_padding": True}
    try:
        check_onnx(qat.QuantConfig.from_dict({"activation": scheme}))
    except ValueError as error:
        network, x = lowered(sequences(), {"weight": {"bits": 8}, "activation": scheme})
        with pytest.raises(ValueError, match=rf"^tensor '0' \((\d+-bit )?{format}.*no kernels .*; use export=int8"):
            save_onnx(network, tmp_path / "m.onnx", (x[:2],))
        assert not (tmp_path / "m.onnx").exists()
        scheme |= neighbour(str(error))
        check_onnx(qat.QuantConfig.from_dict({"activation": scheme}))
    network, x = lowered(sequences(), {"weight": {"bits": 8}, "activation": scheme})
    assert_equal(network, x, tmp_path / "m.onnx")


def test_what_stays_float_is_not_refused() -> None:
    """Neither tensors without bits nor observers of ranges that are not measured in the file."""
    check_onnx(qat.QuantConfig.from_dict({"activation": {"bits": None, "observer": "mse", "range": "dynamic"}}))
    check_onnx(qat.QuantConfig.from_dict({"activation": {"bits": 8, "observer": "mse"}}))
    check_onnx(qat.QuantConfig.from_dict({"activation": {"format": "bf16", "bits": 16, "range": "dynamic"}}))
    check_onnx(qat.QuantConfig.from_dict({"weight": {"format": "e2m1", "bits": 4}}))
