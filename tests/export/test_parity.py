"""Parity: zero for equal implementations; a corrupted layer is found, named, and shown."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import qat
from qat.export.checkpoint import save_checkpoint
from qat.export.formats import integers_given
from qat.export.given import Made
from qat.export.onnx import save_onnx
from qat.export.onnxruntime import onnx_given
from qat.export.parity import (
    Asked,
    LayerParity,
    Parity,
    ParityError,
    ParityLimits,
    compare,
    decisions,
    measure,
    ties_given,
    training_integers,
)
from qat.export.reloaded import Reloaded
from qat.export.rounding import output_rounding
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerConv, IntegerNetwork
from qat.zoo.models import SmallCNN


def images(samples: int) -> Tensor:
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(5)) + 0.2


def handed(integers: dict[str, Tensor], output: Tensor | None = None) -> Made:
    """What a network would hand out: these integers, and one output."""
    return Made(integers, (torch.zeros(1, 2) if output is None else output,), {})


class Exported:
    """A prepared network, what it was lowered to, and both files; corrupted copies of them."""

    def __init__(self, folder: Path, config: qat.QuantConfig) -> None:
        torch.manual_seed(0)
        net = SmallCNN(1, 10, width=4)
        for norm in [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]:
            nn.init.uniform_(norm.weight, -0.5, 1.5), nn.init.normal_(norm.bias, std=0.3)
        for _ in range(5):
            net(images(64))
        self.x = images(300)
        self.prepared: fx.GraphModule = qat.prepare(net.eval(), config, self.x[:2])
        finalize(self.prepared, [self.x[:64], self.x[64:128]], PTQConfig(), trained=False)
        self.network = qat.lower(self.prepared)
        self.folder = folder
        self.paths = qat.export(self.network, folder, self.x[:2])

    def reloaded(self) -> IntegerNetwork:
        return qat.load(self.paths["int8"])

    def file_of(self, network: IntegerNetwork, kind: str) -> Path:
        path = self.folder / f"corrupted.{kind}"
        save_onnx(network, path, (self.x[:2],)) if kind == "onnx" else save_checkpoint(network, path)
        return path

    def measure(self, **files: Path | IntegerNetwork) -> dict[str, Parity]:
        paths = {k: self.file_of(v, k) if isinstance(v, IntegerNetwork) else v for k, v in files.items()}
        return measure(self.prepared, self.network, paths, self.x)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("parity"), qat.preset("int8"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    config = {"weight": {"bits": 8}, "activation": {"bits": 16}, "input": {"bits": 16}}
    return Exported(tmp_path_factory.mktemp("wide"), qat.QuantConfig.from_dict(config))


LAYERS = ["x.quantized", "stem.0", "block.conv1", "block.conv2", "block.add", "conv1.0", "conv2.0", "pool"]


def test_faithful_files_agree(exported: Exported) -> None:
    pairs = exported.measure(**exported.paths)
    assert list(pairs) == ["qat_int8", "qat_onnx", "int8_onnx"]
    for pair, parity in pairs.items():
        assert [layer.name for layer in parity.layers] == LAYERS
        assert parity.max_steps <= 1
        assert parity.equal_share >= 0.999
        assert parity.agreement >= 0.99
        assert all(layer.bits == 8 for layer in parity.layers)
        parity.check(pair, ParityLimits(agreement=0.99))
    logits = exported.prepared(exported.x).detach()
    expected = (logits - exported.reloaded()(exported.x)).abs().max()
    assert pairs["qat_int8"].max_abs == pytest.approx(float(expected), rel=1e-5)


def test_equal_implementations_give_zeros(exported: Exported) -> None:
    given = training_integers(exported.prepared, exported.network, exported.x)
    y = exported.prepared(exported.x).detach()
    parity = compare((y, y), [(handed(given), handed(given))])
    assert (parity.max_abs, parity.max_steps, parity.agreement, parity.equal_share) == (0, 0, 1, 1)
    assert [layer.max_steps for layer in parity.layers] == [0] * len(LAYERS)
    assert all(layer.differences == [] for layer in parity.layers)
    parity.check("same_same", ParityLimits(agreement=1, max_steps=0, equal_share=1))


def test_training_integers_are_those_of_the_quantizers(exported: Exported) -> None:
    given = training_integers(exported.prepared, exported.network, exported.x)
    assert list(given) == LAYERS
    quantizer = exported.prepared.get_submodule("quantizers.x")
    expected = (exported.x.double() / quantizer.scale.double()).round().clamp(quantizer.quant_min, quantizer.quant_max)
    assert torch.equal(given["x.quantized"].double(), expected)
    assert all(not tensor.is_floating_point() for tensor in given.values())


def corrupt_bias(network: IntegerNetwork, name: str) -> IntegerNetwork:
    layer = network.layer(name)
    assert isinstance(layer, IntegerConv)
    output = layer.output
    step = output.scale / (layer.input_scale * layer.weight_scale[1])
    layer.bias[1] += int(3 * step)  # three steps of the output
    return network


def corrupt_weight(network: IntegerNetwork, name: str) -> IntegerNetwork:
    layer = network.layer(name)
    channel = layer.weight[int(layer.weight_scale.argmax())].view(-1)
    channel[4] += -100 if channel[4] > 0 else 100
    return network


@pytest.mark.parametrize("file", ["int8", "onnx"])
@pytest.mark.parametrize("corrupt", [corrupt_bias, corrupt_weight])
@pytest.mark.parametrize("name", ["stem.0", "block.conv1", "conv2.0"])
def test_corrupted_layer_is_named(
    exported: Exported, name: str, corrupt: Callable[[IntegerNetwork, str], IntegerNetwork], file: str
) -> None:
    damaged = corrupt(exported.reloaded(), name)
    parity = exported.measure(**{file: damaged})[f"qat_{file}"]
    departing = [layer.name for layer in parity.layers if layer.max_steps > 1]
    assert departing == [name]  # layers behind it are given equal inputs, and are not blamed
    with pytest.raises(ParityError, match=rf"qat_{file}: layer '{name}' departs given equal inputs") as error:
        parity.check(f"qat_{file}", ParityLimits())
    given = training_integers(exported.prepared, exported.network, exported.x[:128])
    made = integers_given(damaged, (exported.x[:128],), given)[name].flatten()
    index = int(torch.nonzero(made != given[name].flatten())[0])
    place = [int(i) for i in torch.unravel_index(torch.tensor(index), given[name].shape)]
    was, grid = int(given[name].flatten()[index]), exported.network.grid(name)
    values = [(q - int(grid.zero_point)) * float(grid.scale) for q in (was, int(made[index]))]
    if file == "int8":
        real = f"({values[0]:.6g} against {values[1]:.6g})"
        assert f"at {place}: qat {was} against int8 {int(made[index])} {real}" in str(error.value)
    else:
        assert f"at {place}: qat {was} against onnx " in str(error.value)
    assert f"its grid: scale {float(grid.scale):.9g}, zero point 0" in str(error.value)
    assert str(error.value).count("\n  at [") == 5
    reads = {"stem.0": "x.quantized", "block.conv1": "stem.0", "conv2.0": "conv1.0"}[name]
    read = training_integers(exported.prepared, exported.network, exported.x[:256])[reads]
    assert f"it was given '{reads}' ({int(read.min())} to {int(read.max())})" in str(error.value)
    assert f"In order of execution it is number {LAYERS.index(name) + 1} of 8, and the first of 1 " in str(error.value)


def test_first_of_two_corrupted_layers_is_named(exported: Exported) -> None:
    damaged = corrupt_bias(corrupt_weight(exported.reloaded(), "conv2.0"), "block.conv2")
    parity = exported.measure(int8=damaged)["qat_int8"]
    assert {layer.name for layer in parity.layers if layer.max_steps > 1} >= {"conv2.0"}
    with pytest.raises(ParityError, match=r"layer 'block\.conv2'"):
        parity.check("pair", ParityLimits())


def test_int8_against_onnx_is_measured_too(exported: Exported) -> None:
    damaged = corrupt_bias(exported.reloaded(), "conv1.0")
    pairs = exported.measure(int8=damaged, onnx=exported.paths["onnx"])
    pairs["qat_onnx"].check("qat_onnx", ParityLimits(agreement=0.99))
    for pair in ("qat_int8", "int8_onnx"):
        with pytest.raises(ParityError, match=rf"{pair}: layer 'conv1.0'"):
            pairs[pair].check(pair, ParityLimits())


def damage_int8(file: Path, network: IntegerNetwork, name: str, kind: str) -> None:
    """A number of one layer in an int8 checkpoint, a little off; of the last layer by the least there is."""
    layer = network.layer(name)
    assert isinstance(layer, IntegerConv)
    last = layer.output is None
    if kind == "bias":
        step = 1 if last else int(3 * layer.output.scale / (layer.input_scale * layer.weight_scale[1]))
        layer.bias[1] += step
    elif kind == "weight":
        corrupt_weight(network, name)
    elif kind == "scale":
        (layer.weight_scale[1:2] if last else layer.output.scale).mul_(1 + 2.0**-15 if last else 1.02)
    else:
        (layer.input_zero_point if last else layer.output.zero_point).add_(1)
    save_checkpoint(network, file)


def damage_onnx(file: Path, network: IntegerNetwork, name: str, kind: str) -> None:
    """The same number in an ONNX file."""
    model = onnx.load(file)
    last = network.layer(name).output is None
    numbers = {tensor.name: tensor for tensor in model.graph.initializer}

    def change(number: str, by: Callable[[np.ndarray], Any]) -> None:
        array = onnx.numpy_helper.to_array(numbers[number]).copy()
        array[...] = by(array)
        numbers[number].CopyFrom(onnx.numpy_helper.from_array(array, number))

    def replace(output: str, place: int, by: Callable[[np.ndarray], Any]) -> None:
        (node,) = [node for node in model.graph.node if output in node.output]
        array = np.asarray(by(onnx.numpy_helper.to_array(numbers[node.input[place]])))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, "damaged"))
        node.input[place] = "damaged"

    if kind == "bias":
        layer = network.layer(name)
        step = 1 if last else int(3 * layer.output.scale / (layer.input_scale * layer.weight_scale[1]))
        change(f"{name}.bias", lambda bias: bias + step * (np.arange(len(bias)) == 1).astype(bias.dtype))
    elif kind == "weight":
        damaged = corrupt_weight(network, name).layer(name)
        change(f"{name}.weight", lambda weight: damaged.weight.numpy().reshape(weight.shape))
    elif kind == "scale" and last:
        change(f"{name}.weight_scale", lambda scale: scale * np.float32(1 + 2.0**-15))
    elif kind == "scale":
        replace(name, 1, lambda scale: scale * np.float32(1.02))
    else:
        replace(f"{name}.input" if last else name, 2, lambda zero: zero + np.uint8(1))
    onnx.save(model, file)


@pytest.mark.parametrize("name", ["stem.0", "block.conv2", "linear"])
@pytest.mark.parametrize("kind", ["bias", "weight", "scale", "zero point"])
@pytest.mark.parametrize("file", ["int8", "onnx"])
def test_any_wrong_number_in_a_file_is_found(
    exported: Exported, tmp_path: Path, file: str, kind: str, name: str
) -> None:
    damaged = Path(shutil.copy(exported.paths[file], tmp_path))
    {"int8": damage_int8, "onnx": damage_onnx}[file](damaged, exported.reloaded(), name, kind)
    parity = measure(exported.prepared, exported.network, {file: damaged}, exported.x[:64])[f"qat_{file}"]
    with pytest.raises(ParityError) as error:
        parity.check("pair", ParityLimits())
    said = str(error.value)
    assert f"pair: layer '{name}' " in said
    assert parity.agreement == 1.0 or name != "linear" or kind in ("weight", "zero point")  # nothing else would tell
    if name == "linear":
        assert "output 'output' differs by " in said
        assert f"against {file}" in said
    elif kind in ("scale", "zero point"):
        grid = exported.network.grid(name)
        scale = float(grid.scale) * (1.02 if kind == "scale" else 1)
        zero = int(grid.zero_point) + (kind == "zero point")
        assert f"its grid in qat: scale {float(grid.scale):.9g}, zero point {int(grid.zero_point)}" in said
        assert f"its grid in {file}: scale {scale:.6g}"[:-1] in said
        assert f"zero point {zero}\n" in said
        index, a, b = next(row for row in parity.layers if row.name == name).differences[0]
        real = (a - int(grid.zero_point)) * float(grid.scale), (b - zero) * scale
        assert f"at {index}: qat {a} against {file} {b} ({real[0]:.6g} against {real[1]:.6g})" in said


def test_a_grid_that_differs_by_less_than_a_step_is_found(exported: Exported) -> None:
    damaged = exported.reloaded()
    damaged.layer("conv1.0").output.scale.mul_(1 + 1e-6)
    parity = exported.measure(int8=damaged)["qat_int8"]
    assert parity.equal_share == 1.0
    with pytest.raises(ParityError, match=r"layer 'conv1\.0' is on another grid(.|\n)*its grid in int8: scale "):
        parity.check("pair", ParityLimits())


def test_a_tensor_that_a_file_does_not_hand_out_is_named(exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported.paths["onnx"])
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["renamed" if name == "block.conv2" else name for name in names]
    onnx.save(model, tmp_path / "model.onnx")
    files = {"onnx": tmp_path / "model.onnx"}
    parity = measure(exported.prepared, exported.network, files, exported.x[:32])["qat_onnx"]
    assert parity.missing == ["block.conv2"]
    with pytest.raises(ParityError, match=r"'block\.conv2': one of the two does not hand out this tensor"):
        parity.check("pair", ParityLimits())


def test_onnx_layers_are_fed_the_given_integers(exported: Exported) -> None:
    x = exported.x[:16]
    given = training_integers(exported.prepared, exported.network, x)
    shuffled = {name: tensor.flip(0) for name, tensor in given.items()}
    runtime = integers_given(exported.network, (x,), shuffled)
    engine = onnx_given(exported.paths["onnx"], "generic", exported.network.grids(), (x,), shuffled).integers
    assert set(engine) == set(LAYERS)
    for name in LAYERS:
        assert (engine[name] - runtime[name].int()).abs().max() <= 1
        assert torch.equal(engine[name].flip(0), given[name].int()) == (name != "x.quantized") or (
            (engine[name].flip(0) - given[name].int()).abs().max() <= 1
        )
    assert torch.equal(engine["x.quantized"], given["x.quantized"].int())  # made from the real input


def test_sixteen_bit_grids_are_judged_by_steps_only(wide: Exported) -> None:
    for pair, parity in wide.measure(**wide.paths).items():
        assert all(layer.bits >= 16 for layer in parity.layers)
        assert parity.max_steps <= 1
        parity.check(pair, ParityLimits(equal_share=2.0, agreement=0.99))  # a share that nothing reaches is not asked
    row = LayerParity(name="a", max_steps=1, equal_share=0.5, bits=16)
    Parity(max_abs=0, max_steps=1, agreement=1, equal_share=0.5, layers=[row]).check("pair", ParityLimits())
    row.bits = 8
    with pytest.raises(ParityError, match="layer 'a'"):
        Parity(max_abs=0, max_steps=1, agreement=1, equal_share=0.5, layers=[row]).check("pair", ParityLimits())
    row.bits, row.max_steps = 16, 2
    with pytest.raises(ParityError, match="layer 'a'"):
        Parity(max_abs=0, max_steps=2, agreement=1, equal_share=0.5, layers=[row]).check("pair", ParityLimits())


@pytest.mark.parametrize(
    ("changed", "limits", "passes"),
    [
        ({"agreement": 0.998}, {}, False),
        ({"agreement": 0.998}, {"agreement": 0.99}, True),
        ({"max_steps": 2}, {}, False),
        ({"max_steps": 2}, {"max_steps": 2}, True),
        ({"max_steps": 1}, {"max_steps": 0}, False),
        ({"equal_share": 0.998}, {}, False),
        ({"equal_share": 0.998}, {"equal_share": 0.9}, True),
        ({}, {}, True),
    ],
)
def test_limits(changed: dict[str, float], limits: dict[str, float], passes: bool) -> None:
    numbers = {"max_abs": 0.1, "max_steps": 0, "agreement": 1.0, "equal_share": 1.0} | changed
    row = LayerParity(name="fc", max_steps=numbers["max_steps"], equal_share=numbers["equal_share"], bits=8)
    parity = Parity(**numbers, layers=[row])
    if passes:
        parity.check("qat_int8", ParityLimits(**limits))
    else:
        with pytest.raises(ParityError, match="fc"):
            parity.check("qat_int8", ParityLimits(**limits))


def test_compare_by_hand() -> None:
    a = {"u": torch.tensor([[1, 2], [3, 251]], dtype=torch.uint8), "v": torch.tensor([[5]], dtype=torch.int8)}
    b = {"u": torch.tensor([[1, 4], [3, 250]], dtype=torch.uint8), "v": torch.tensor([[5]], dtype=torch.int8)}
    c = {"u": torch.tensor([[9, 0]], dtype=torch.uint8)}
    d = {"u": torch.tensor([[9, 255]], dtype=torch.uint8)}  # 255 steps, which wrap to 1 in uint8
    logits = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[1.0, 2.5], [0.0, 1.0]])
    parity = compare(logits, [(handed(a), handed(b)), (handed(c), handed(d))])
    assert (parity.max_abs, parity.max_steps, parity.agreement) == (3.0, 255, 0.5)
    assert parity.equal_share == pytest.approx(1 - 3 / 7)
    u, v = parity.layers
    assert (u.name, u.max_steps, u.equal_share, u.bits) == ("u", 255, 0.5, 8)
    assert u.differences == [([0, 1], 2, 4), ([1, 1], 251, 250), ([0, 1], 0, 255)]
    assert u.mean_steps == pytest.approx((2 + 1 + 255) / 6)
    assert (v.max_steps, v.mean_steps, v.equal_share, v.differences) == (0, 0.0, 1.0, [])
    assert parity.mean_steps == pytest.approx(258 / 7)
    numbers = {"max_abs", "max_steps", "mean_steps", "agreement", "agreement_outside_ties", "equal_share", "metrics",
               "outputs", "missing", "notes"}  # fmt: skip
    assert set(parity.to_dict()) == numbers
    assert set(parity.to_dict(layers=True)) == numbers | {"layers"}
    assert [row["name"] for row in parity.to_dict(layers=True)["layers"]] == ["u", "v"]


def test_a_step_at_a_tie_is_no_difference() -> None:
    a, b = {"u": torch.tensor([1, 2, 3, 4])}, {"u": torch.tensor([2, 3, 5, 4])}
    ties = [{"u": torch.tensor([True, False, True, True])}]
    y = torch.zeros(1, 2)
    made = [(handed(a), handed(b))]
    (row,) = compare((y, y), made, asked=Asked(ties=ties)).layers
    assert (row.max_steps, row.equal_share, row.ties) == (2, 0.5, 1)  # two steps are a difference, tie or not
    assert row.differences == [([1], 2, 3), ([2], 3, 5)]
    assert compare((y, y), made).layers[0].equal_share == 0.25


def test_decisions_at_ties_are_counted_apart() -> None:
    """Of six samples three are decided otherwise: one with two equal classes, one behind a tie, one for no reason."""
    a = torch.tensor([[2.0, 1.0], [1.0, 1.0], [2.0, 1.0], [2.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    b = a.clone()
    b[1, 1], b[2], b[3] = 1.5, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])
    samples = torch.tensor([2, 3, 5])
    first = {"u": torch.tensor([[7, 8], [7, 8], [7, 8]])}
    second = {"u": torch.tensor([[7, 9], [7, 8], [6, 8]])}
    ties = [{"u": torch.tensor([[False, True], [False, True], [True, False]])}]
    made = [(handed(first, torch.zeros(3)), handed(second, torch.zeros(3)))]
    parity = compare((a, b), made, asked=Asked(ties=ties, samples=samples, rounding=[[torch.ones(3)]]))
    assert parity.agreement == pytest.approx(3 / 6)
    assert parity.agreement_outside_ties == pytest.approx(5 / 6)  # all but sample 3
    with pytest.raises(ParityError, match=r"top-1 agreement 83\.3333% is below 100"):
        parity.check("pair", ParityLimits())
    parity.check("pair", ParityLimits(agreement=0.8))
    parity.agreement_outside_ties = 0.9995
    with pytest.raises(ParityError, match=r"is below 100\.00%"):
        parity.check("pair", ParityLimits())
    parity.outputs[0].rounding = None  # ties are not known
    parity.check("pair", ParityLimits())
    no_ties = [{"u": torch.zeros(3, 2, dtype=torch.bool)}]
    untied = compare((a, b), made, asked=Asked(ties=no_ties, samples=samples))
    assert untied.agreement_outside_ties == pytest.approx(4 / 6)
    assert untied.layers[0].differences == [([2, 1], 8, 9), ([5, 0], 7, 6)]  # samples by their number


def test_where_ties_are() -> None:
    """Sums of two grids whose steps are 1 and 1/2, on a grid of whole steps: every other one is a tie."""

    class Sum(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.flatten(x + y, 1) @ torch.eye(4)

    scheme = {"bits": 8, "range": "fixed"}
    config = qat.QuantConfig.from_dict({"weight": scheme, "activation": scheme, "input": scheme})
    x, y = torch.tensor([[-127.0, 127.0, 3.0, 4.0]]), torch.tensor([[-63.5, 63.5, 0.5, 1.0]])
    prepared = qat.prepare(Sum(), config, (x, y))
    qat.calibrate(prepared, [(x, y)])
    prepared.get_submodule("quantizers.add").range.scale.fill_(1.0)
    for name, scale in (("x", 1.0), ("y", 0.5)):
        prepared.get_submodule(f"quantizers.{name}").range.scale.fill_(scale)
    network = qat.lower(prepared)
    given = training_integers(prepared, network, x, y)
    ties = ties_given(network, (x, y), given)
    assert ties["add"].tolist() == [[True, True, True, False]]
    assert not ties["x.quantized"].any()


def test_nan_never_agrees() -> None:
    good, bad = torch.randn(8, 3), torch.full((8, 3), torch.nan)
    with pytest.raises(ParityError):
        compare((good, bad), []).check("pair", ParityLimits())
    with pytest.raises(ParityError, match="not finite"):  # a single output: neither is above zero
        compare((-good[:, :1].abs(), bad[:, :1]), []).check("pair", ParityLimits())


def test_decisions() -> None:
    assert decisions(torch.tensor([[0.0, 2.0, 1.0]])).tolist() == [1]
    assert decisions(torch.tensor([[0.5], [-0.5]])).tolist() == [[True], [False]]
    assert decisions(torch.tensor([0.5, -0.5])).tolist() == [True, False]


class Three(nn.Module):
    """Three outputs, of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Any]:
        y = torch.relu(self.a(x) + shift)
        return {"logits": self.b(y), "more": [torch.sigmoid(self.c(y)), y]}


class Backwards(Reloaded):
    """What comes from another process has no order of its own."""

    def _ask(self, request: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(reversed(super()._ask(request, tensors).items()))


def test_every_output_is_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 4), torch.randn(64, 5)
    prepared = qat.prepare(Three().eval(), qat.preset("int8"), inputs)
    finalize(prepared, [inputs], PTQConfig(), trained=False)
    network = qat.lower(prepared)
    paths = qat.export(network, tmp_path, inputs)
    for pair, parity in measure(prepared, network, Backwards(paths, fresh=False), inputs).items():
        assert [row.name for row in parity.outputs] == ["logits", "more.0", "more.1"]
        assert [row.layers for row in parity.outputs] == ["'b'", "'c', 'sigmoid'", "'add.real'"]
        assert all(row.rounding is not None and row.rounding <= 1 for row in parity.outputs)
        parity.check(pair, ParityLimits())
    reference = prepared(*inputs)
    for name, row, layers in (("b", "logits", "'b'"), ("c", "more.0", "'c', 'sigmoid'")):
        damaged = qat.load(paths["int8"])
        damaged.layer(name).bias[0] += 100
        save_checkpoint(damaged, tmp_path / "damaged.safetensors")
        parity = measure(prepared, network, {"int8": tmp_path / "damaged.safetensors"}, inputs)["qat_int8"]
        message = f"layer {layers} departs given equal inputs: output '{row}' differs by"
        with pytest.raises(ParityError, match=message):
            parity.check("pair", ParityLimits())
        with pytest.raises(ParityError, match="an output differs by"):
            parity.check("pair", ParityLimits(rounding=None, agreement=0, max_abs=1e-4))
        made = damaged(*inputs)
        worst = {"logits": made["logits"] - reference["logits"], "more.0": made["more"][0] - reference["more"][0]}[row]
        assert parity.max_abs == pytest.approx(float(worst.abs().max()), rel=1e-4)


class Again(nn.Module):
    """Layers called several times, with inputs of several scales."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.last = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.relu(self.conv(x)) * 2.5
        x = x.mean((2, 3))
        for _ in range(2):
            x = torch.tanh(self.linear(x)) * 3
        return self.last(x)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_layers_called_several_times(bits: int, tmp_path: Path) -> None:
    """Their bias lies on the grid of none of the calls; at 2 bits its rounding would be a good part of a step."""
    torch.manual_seed(0)
    scheme = {"bits": bits, "symmetric": False}
    config = {"weight": {"bits": bits, "granularity": "channel"}, "activation": scheme, "input": {"bits": 8}}
    x = torch.randn(32, 4, 8, 8)
    prepared = qat.prepare(Again(), qat.QuantConfig.from_dict(config), x)
    finalize(prepared, [x], PTQConfig(), trained=False)
    network = qat.lower(prepared)
    paths = qat.export(network, tmp_path, x)
    pairs = measure(prepared, network, paths, x)
    assert all(parity.equal_share == parity.agreement == 1.0 for parity in pairs.values())
    assert all(parity.max_abs < 1e-5 for parity in pairs.values())


class Normed(nn.Module):
    """A layer without bias that is called twice, once in front of a BatchNorm, which is folded into that call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = (
            nn.Conv2d(4, 4, 1, bias=False),
            nn.BatchNorm2d(4, affine=False),
            nn.Conv2d(4, 2, 1),
        )
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(torch.tanh(self.conv(x)))))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_batch_norm_behind_a_layer_that_is_called_twice(bits: int, tmp_path: Path) -> None:
    """Its bias lies on no grid: rounded to one, it would be off by up to half of what one product counts."""
    torch.manual_seed(0)
    config = {"weight": {"bits": bits, "granularity": "channel"}, "activation": {"bits": 8}, "input": {"bits": bits}}
    x = torch.randn(32, 4, 8, 8)
    prepared = qat.prepare(Normed().eval(), qat.QuantConfig.from_dict(config), x)
    finalize(prepared, [x], PTQConfig(bias_correction=False), trained=False)
    network = qat.lower(prepared)
    paths = qat.export(network, tmp_path, x)
    for pair, parity in measure(prepared, network, paths, x).items():
        parity.check(pair, ParityLimits())
        assert parity.equal_share == 1.0


def test_a_tie_is_as_wide_as_it_is_said_to_be() -> None:
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    prepared = qat.prepare(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), qat.preset("int8"), x)
    finalize(prepared, [x], PTQConfig(), trained=False)
    network = qat.lower(prepared)
    given = training_integers(prepared, network, x)
    grid = network.grid("0")
    assert grid is not None
    with torch.no_grad():
        v = prepared.get_submodule("0")(prepared.get_submodule("quantizers.input")(x)) / grid.scale + grid.zero_point
    to_the_middle = (v - v.floor() - 0.5).abs()
    for width in (0.1, 0.3):
        tied = ties_given(network, x, given, {"0": width})["0"]
        assert (tied == (to_the_middle < width))[(to_the_middle - width).abs() > 1e-3].all()
        assert 0.1 < tied.float().mean() < 0.7
    assert ties_given(network, x, given)["0"].float().mean() < 0.01


@pytest.mark.parametrize("far", [0.0, 100.0])
def test_a_mean_that_a_norm_takes_off_is_rounded_with(far: float) -> None:
    """Of values far from 0 a norm leaves digits that float32 has rounded; what float64 makes is the oracle."""

    class Far(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.instance_norm(0.01 * x + far)
            return self.linear((y - 0.1 * x).mean((2, 3)))

    torch.manual_seed(0)
    x = torch.randn(16, 2, 6, 6)
    net = Far().eval()
    config = {"weight": {"bits": 8}, "activation": {"bits": None}, "input": {"bits": None}}
    prepared = qat.prepare(net, qat.QuantConfig.from_dict(config), x)
    finalize(prepared, [x], PTQConfig(), trained=False)
    network = qat.lower(prepared)
    (allowed,) = output_rounding(network, (x,), {})
    assert isinstance(allowed, Tensor)
    exact = copy.deepcopy(network).double()(x.double())
    error = (network(x) - exact).abs().max()
    assert error <= allowed.max() <= max(1e4 * error, 1e-5)
