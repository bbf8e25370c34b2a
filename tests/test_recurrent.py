"""Recurrent layers: equal to torch's in 16 bits, trained in 8, lowered to integer cells, saved and read back."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import qat
from qat.export.parity import training_integers
from qat.layers import SWAPS, QuantGRU, Quantized, QuantizedRecurrent, QuantLSTM
from qat.mode import Mode
from qat.modes import quantizers
from qat.ptq import PTQConfig, finalize
from qat.runtime import IntegerConv
from qat.runtime.recurrent import Recurrent
from qat.scheme import Granularity, TensorScheme
from tests.networks.recurrent import KeywordGRU
from tests.whole_way import assert_files_agree, assert_sixteen_bits_are_float, config, trained

W8 = TensorScheme(bits=8, granularity=Granularity.channel, range="dynamic")
A8 = TensorScheme(bits=8)
A: dict[str, Any] = {"activation": {"bits": 8}}
Inputs = tuple[Tensor, ...]


class Net(nn.Module):
    """A recurrent layer, what is done with it, and a linear layer."""

    def __init__(self, compute: Callable[..., Tensor], features: int, **layers: nn.Module) -> None:
        super().__init__()
        self.compute, self.fc = compute, nn.Linear(features, 3)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


class Pair(Net):
    """The same with two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.compute(self, x, y)


class Triple(Net):
    """The same with three inputs."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.compute(self, x, y, z)


class Case(NamedTuple):
    """How a network is made, and its inputs."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


def batch() -> Inputs:
    return (torch.randn(48, 7, 5),)


def with_lengths() -> Inputs:
    return torch.randn(48, 7, 5), torch.arange(48) % 7 + 1


def lengths_sorted() -> Inputs:
    return torch.randn(48, 7, 5), (torch.arange(48) % 7 + 1).sort(descending=True).values


def last(net: Any, x: Tensor) -> Tensor:
    output, _ = net.cell(x)
    return net.fc(output[:, -1])


def mean(net: Any, x: Tensor) -> Tensor:
    return net.fc(net.cell(x)[0].mean(1))


def states(net: Any, x: Tensor) -> Tensor:
    output, (h, c) = net.cell(x)
    return net.fc(h[-1]) + net.fc(c[-1]) + net.fc(h.mean(0)) + output.sum(dim=(1, 2)).unsqueeze(1)


def both_ends(net: Any, x: Tensor) -> Tensor:
    _, h = net.cell(x)
    return net.fc(torch.cat([h[-2], h[-1]], dim=1))


def time_first(net: Any, x: Tensor) -> Tensor:
    return net.fc(net.cell(x.transpose(0, 1))[0]).transpose(0, 1)


def packed(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    output, state = net.cell(packed)
    h = state[0] if isinstance(net.cell, nn.LSTM) else state
    output, n = rnn.pad_packed_sequence(output, batch_first=True)
    return net.fc(output).sum(1) / n.unsqueeze(1) + net.fc(torch.cat([h[0], h[1]], 1))


def packed_sorted(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    output, _ = net.cell(rnn.pack_padded_sequence(x.transpose(0, 1), lengths))
    return net.fc(rnn.pad_packed_sequence(output, total_length=7)[0]).amax(0)


def given_pair(net: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
    return net.fc(net.cell(x, (h.unsqueeze(0), c.unsqueeze(0)))[0])


def given_one(net: Any, x: Tensor, h: Tensor) -> Tensor:
    return net.fc(net.cell(x, hx=h.transpose(0, 1))[0])


def zeros(net: Any, x: Tensor) -> Tensor:
    start = torch.zeros(1, x.size(0), 8).to(x.device)
    output, (h, c) = net.cell(x, (start, x.new_zeros(1, x.shape[0], 8)))
    return net.fc(torch.relu(output[:, -1])) + net.fc(h.squeeze(0)) + net.fc(c[0])


def encode_decode(net: Any, x: Tensor) -> Tensor:
    _, state = net.encoder(x)
    return net.fc(net.decoder(x.flip(1), state)[0])


def steps(net: Any, x: Tensor) -> Tensor:
    state = None
    for t in range(5):
        state = net.cell(x[:, t], state)
    return net.fc(state[0] if isinstance(net.cell, nn.LSTMCell) else state)


def beside(net: Any, x: Tensor) -> Tensor:
    return net.fc(torch.cat([x, net.cell(x)[0]], dim=-1)) + net.fc(torch.cat([x, x + x, net.cell(x)[0][..., :3]], -1))


def make(
    kind: Any, compute: Callable[..., Tensor], features: int = 8, net: type[Net] = Net, **options: Any
) -> Callable[[], nn.Module]:
    return lambda: net(compute, features, cell=kind(5, 8, batch_first=compute is not time_first, **options))


CASES: dict[str, Case] = {
    **{f"{kind.__name__}_last": Case(make(kind, last), batch) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    **{
        f"{kind.__name__}_stacked_both_ways": Case(
            make(kind, mean, 16, num_layers=2, bidirectional=True, dropout=0.2), batch
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "RNN_relu": Case(make(nn.RNN, last, nonlinearity="relu", num_layers=2), batch),
    "LSTM_states": Case(make(nn.LSTM, states, num_layers=2), batch),
    "LSTM_states_of_one_layer": Case(make(nn.LSTM, states), batch),
    "LSTM_projected": Case(make(nn.LSTM, mean, 6, num_layers=2, bidirectional=True, proj_size=3), batch),
    "LSTM_no_bias": Case(make(nn.LSTM, last, bias=False), batch),
    "GRU_no_bias": Case(make(nn.GRU, last, bias=False), batch),
    "GRU_time_first": Case(make(nn.GRU, time_first), batch),
    "GRU_both_ends": Case(make(nn.GRU, both_ends, 16, num_layers=2, bidirectional=True), batch),
    "LSTM_packed": Case(make(nn.LSTM, packed, 16, Pair, bidirectional=True), with_lengths),
    "GRU_packed": Case(make(nn.GRU, packed, 16, Pair, bidirectional=True, num_layers=2), with_lengths),
    "RNN_packed_sorted": Case(
        lambda: Pair(packed_sorted, 16, cell=nn.RNN(5, 8, bidirectional=True)), lengths_sorted
    ),
    "LSTM_given_state": Case(
        make(nn.LSTM, given_pair, net=Triple), lambda: (*batch(), torch.rand(48, 8), torch.randn(48, 8))
    ),
    "GRU_given_state": Case(
        make(nn.GRU, given_one, 16, Pair, bidirectional=True), lambda: (*batch(), torch.rand(48, 2, 8))
    ),
    "LSTM_zeros": Case(make(nn.LSTM, zeros), batch),
    **{
        f"{kind.__name__}_encoder_decoder": Case(
            lambda kind=kind: Net(encode_decode, 8, encoder=kind(5, 8, batch_first=True),
                                  decoder=kind(5, 8, batch_first=True)), batch,
        )
        for kind in (nn.LSTM, nn.GRU)
    },
    **{f"{kind.__name__}": Case(lambda kind=kind: Net(steps, 8, cell=kind(5, 8)), batch)
       for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell)},
    "GRU_beside_others": Case(make(nn.GRU, beside, 13), batch),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(1)
    net = CASES[name].make()
    for layer in net.modules():
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):  # torch starts them with next to no memory
            for key, parameter in layer.named_parameters():
                nn.init.normal_(parameter, std=0.5 if "weight" in key else 0.2)
    return net, CASES[name].inputs()


@pytest.mark.parametrize("name", CASES)
def test_sixteen_bits_are_nearly_float(name: str) -> None:
    net, inputs = build(name)
    assert_sixteen_bits_are_float(net, inputs)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    net, inputs = build(name)
    prepared = trained(net, inputs)
    layers = [m for m in prepared.modules() if isinstance(m, QuantizedRecurrent)]
    assert layers
    assert all(layer.sources for layer in layers)  # the grid of every input is known
    network = assert_files_agree(prepared, inputs, tmp_path, onnx=False)
    lowered = [layer for layer in network.layers.values() if isinstance(layer, Recurrent)]
    assert lowered
    weights = [m for layer in lowered for m in layer.modules() if hasattr(m, "weight_scale")]
    assert weights
    assert all(isinstance(m, IntegerConv) and m.weight.dtype == torch.int8 for m in weights)
    # what goes round the loop is equal to the bit, on every path and after every step
    for integers, simulated in _recurrent_integers(prepared, network, inputs):
        assert torch.equal(integers, simulated)
    assert torch.equal(network(*inputs), (network.set_reference(), network(*inputs))[1])


@torch.no_grad()
def _recurrent_integers(prepared: Any, network: Any, inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    tensors, given = network.run(*inputs), training_integers(prepared, network, *inputs)
    first = next(node.name for node in network.nodes if isinstance(network.layer(node.name), Recurrent))
    parts = [n.name for n in network.nodes if n.inputs[:1] == (first,)]
    return [(tensors[name], given[name]) for name in parts if name in given and isinstance(tensors[name], Tensor)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["LSTM_last", "GRU_both_ends", "LSTM_projected", "RNN_packed_sorted"])
@pytest.mark.parametrize(
    "scheme",
    [
        {"weight": {"bits": 4, "granularity": "channel"}},
        A | {"weight": {"bits": 4, "granularity": "group", "group_size": 3, "allow_padding": True}},
        A | {"weight": {"bits": 4, "format": "codebook", "granularity": "channel", "range": "fixed"}},
        {"weight": {"bits": 8}, "activation": {"bits": 8, "granularity": "token", "range": "dynamic"}},
        {"weight": {"bits": 8, "format": "e4m3fn"}, "activation": {"bits": 8, "format": "e4m3fn"}},
        A | {"weight": {"bits": None}},
        {"weight": {"bits": 2, "range": "learned"}, "activation": {"bits": 4, "range": "learned", "symmetric": False}},
        {"weight": {"bits": 8}, "activation": {"bits": 8, "range": "running", "observer": "ema"}},
        A | {"weight": {"bits": 4, "rounding": "adaptive", "range": "fixed"}},
    ],
    ids=["weight_only", "group", "codebook", "token", "float8", "float", "learned", "running", "adaptive"],
)  # fmt: skip
def test_other_schemes(name: str, scheme: dict[str, Any], tmp_path: Path) -> None:
    """What no integer cell runs is stored and multiplied out; either way the files compute what was trained."""
    net, inputs = build(name)
    prepared = qat.prepare(net, qat.QuantConfig.from_dict(scheme), tuple(x[:4] for x in inputs))
    qat.calibrate(prepared, [inputs])
    prepared.train()
    prepared(*inputs).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    finalize(prepared, [inputs], PTQConfig(), trained=True)
    network = qat.lower(prepared)
    path = qat.export(network, tmp_path, inputs, ["int8"])["int8"]
    with torch.no_grad():
        expected, got = prepared(*inputs), network(*inputs)
        assert (got - expected).abs().mean() <= 1e-3 * expected.std()
        assert torch.equal(qat.load(path)(*inputs), got)


# ---- the layers themselves -------------------------------------------------------------------------------------------


def parts(result: Any) -> list[Tensor]:
    """All tensors in what a recurrent layer returns."""
    if isinstance(result, PackedSequence):
        return [result.data, result.batch_sizes]
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in parts(part)]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", ["batch", "alone", "packed", "packed_sorted"])
@pytest.mark.parametrize("given", [False, True])
def test_in_mode_float_a_layer_is_torchs(kind: Any, batch_first: bool, form: str, given: bool) -> None:
    layer = kind(5, 6, num_layers=2, bidirectional=True, batch_first=batch_first)
    quantized = SWAPS[kind].from_float(layer, W8, "layer", A8)
    x: Any = torch.randn(4, 4, 5)
    if form == "alone":
        x = torch.randn(7, 5)
    elif form != "batch":
        lengths = [4, 3, 3, 1] if form == "packed_sorted" else [2, 4, 1, 3]
        x = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=form == "packed_sorted")
    state = [torch.randn(4, 6) if form == "alone" else torch.randn(4, 4, 6) for _ in range(2)]
    hx = (tuple(state) if kind is nn.LSTM else state[0]) if given else None
    for got, expected in zip(parts(quantized(x, hx)), parts(layer(x, hx)), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("shape", [(4, 5), (5,)])
def test_in_mode_float_a_cell_is_torchs(kind: Any, shape: tuple[int, ...]) -> None:
    cell = kind(5, 6)
    quantized, x = SWAPS[kind].from_float(cell, W8, "cell", A8), torch.randn(shape)
    torch.testing.assert_close(parts(quantized(x)), parts(cell(x)))
    torch.testing.assert_close(parts(quantized(x, cell(x))), parts(cell(x, cell(x))))
    assert type(quantized(x)) is type(cell(x))


def test_what_is_shared_and_what_is_added() -> None:
    layer = nn.LSTM(5, 6, num_layers=2, bidirectional=True, proj_size=3)
    keys = set(layer.state_dict())
    quantized = SWAPS[nn.LSTM].from_float(layer, W8, "layer", A8)
    assert isinstance(quantized, QuantLSTM)
    assert isinstance(quantized, nn.LSTM)
    own = dict(quantized.named_parameters())
    assert all(own[name] is parameter for name, parameter in layer.named_parameters())
    assert {key for key in quantized.state_dict() if "quantizer" not in key} == keys
    assert not any(isinstance(m, Quantized) or "quantizer" in name for name, m in layer.named_modules())
    names = {q.name.removeprefix("layer.") for q in quantized.activation_quantizers()}
    per_cell = {f"{g}_l{i}{r}" for g in ("gates", "candidate", "cell", "activated", "unprojected")
                for i in (0, 1) for r in ("", "_reverse")}  # fmt: skip
    assert names == per_cell | {"hidden_l0", "hidden_l1"}  # both directions share one
    assert len(list(quantized.weights())) == 12
    assert all(weight.weight_quantizer.scale_shape == (len(weight.tensor),) for weight in quantized.weights())
    layer.weight_ih_l0.data.fill_(7.0)
    assert quantized.weight_ih_l0[0, 0] == 7
    quantized.weight_ih_l0 = nn.Parameter(torch.zeros(24, 5))
    assert layer._flat_weights[0] is layer.weight_ih_l0  # torch's list of weights is the float layer's own


def test_hand_computed_steps_of_a_gru() -> None:
    """On grids given by hand, against the formulas written out."""
    layer = nn.GRU(2, 1, bias=True)
    for p in layer.parameters():
        nn.init.uniform_(p, -1.0, 1.0)
    quantized = SWAPS[nn.GRU].from_float(layer, W8, "layer", A8)
    scales = {"gates": 1 / 16, "candidate": 1 / 8, "hidden": 1 / 32}
    for name, scale in scales.items():
        quantized.quantizer(name, 0).range.set(torch.tensor(scale), torch.tensor(0.0))
    for _, quantizer in quantizers(quantized):
        quantizer.mode = Mode.quantize

    def put(value: Tensor, scale: float, low: int) -> Tensor:
        return torch.clamp(torch.round(value / scale), low, 127 if low else 255) * scale

    def weight(w: Tensor) -> Tensor:
        step = w.abs().amax(1, keepdim=True) / 127
        return torch.round(w / step) * step

    x, h = torch.randn(4, 3, 2), torch.zeros(3, 1)
    w, u = weight(layer.weight_ih_l0), weight(layer.weight_hh_l0)
    for t in range(4):
        a, b = x[t] @ w.T + layer.bias_ih_l0, h @ u.T + layer.bias_hh_l0
        r, z = put(torch.sigmoid(a[:, :1] + b[:, :1]), 1 / 16, 0), put(torch.sigmoid(a[:, 1:2] + b[:, 1:2]), 1 / 16, 0)
        n = put(torch.tanh(a[:, 2:] + r * b[:, 2:]), 1 / 8, -128)
        h = put((1 - z) * n + z * h, 1 / 32, -128)
    torch.testing.assert_close(quantized(x)[1][0], h)


def test_padding_is_never_observed() -> None:
    quantized = SWAPS[nn.GRU].from_float(nn.GRU(5, 6, batch_first=True), W8, "layer", A8)
    hidden = quantized.quantizer("hidden", 0)
    for quantizer in quantized.activation_quantizers():
        quantizer.mode = Mode.observe
    x, lengths = torch.randn(3, 9, 5), torch.tensor([2, 4, 3])
    clean = x * (torch.arange(9) < lengths.unsqueeze(1)).unsqueeze(2)
    dirty = torch.where(clean == 0, 1e6, clean)
    output, _ = quantized(pack_padded_sequence(dirty, lengths, batch_first=True, enforce_sorted=False))
    low, high = hidden.observer.range()
    assert (low.item(), high.item()) == (output.data.min().item(), output.data.max().item())


def test_calibrated_ranges_are_those_of_every_step() -> None:
    net, inputs = build("GRU_last")
    prepared = qat.prepare(net, config(8, activation={"bits": 8}), inputs[0][:2])
    qat.calibrate(prepared, [inputs])
    outputs = net.cell(inputs[0])[0]
    hidden = prepared.get_submodule("cell").quantizer("hidden", 0)
    torch.testing.assert_close(hidden.scale, outputs.abs().max() / 127)


def test_one_quantizer_an_edge() -> None:
    """Nothing that a recurrent layer made is put on a second grid."""
    edges = {name: set(qat.prepare(*_prepared(name)).get_submodule("quantizers")._modules) for name in CASES}
    assert edges["LSTM_last"] == {"x"}
    assert edges["GRU_both_ends"] == {"x"}
    assert edges["GRU_encoder_decoder"] == {"x"}
    assert "cell" in edges["LSTM_states"]  # the states of two layers, each on its own grid, averaged
    layer = prepared_layer("LSTM_states")
    assert layer.grid((1, 0, -1)) is layer.quantizer("hidden", 1)
    assert layer.grid((1, 0, 0)) is layer.quantizer("hidden", 0)
    assert layer.grid((1, 0)) is None
    assert layer.grid((1, 1, 1)) is layer.quantizer("cell", 1)
    assert prepared_layer("LSTM_states_of_one_layer").grid((1, 0)) is not None


def _prepared(name: str) -> tuple[nn.Module, qat.QuantConfig, Inputs]:
    net, inputs = build(name)
    return net, config(8), tuple(x[:4] for x in inputs)


def prepared_layer(name: str) -> QuantizedRecurrent:
    layer = qat.prepare(*_prepared(name)).get_submodule("cell")
    assert isinstance(layer, QuantizedRecurrent)
    return layer


def test_rules_and_the_report() -> None:
    net, inputs = build("LSTM_states")
    rules = [{"match": "type:LSTM", "weight": {"bits": 4}, "activation": {"bits": 6}}]
    prepared = qat.prepare(net, config(8, rules=rules), inputs[0][:4])
    layer = prepared.get_submodule("cell")
    assert {w.weight_quantizer.scheme.bits for w in layer.weights()} == {4}
    assert {q.scheme.bits for q in layer.activation_quantizers()} == {6}
    qat.calibrate(prepared, [inputs])
    lines = qat.report(prepared).splitlines()
    assert any(line.startswith("cell.weight_hh_l1 ") and "int4" in line for line in lines)
    assert any(line.startswith("cell.gates_l0_quantizer ") and "int6" in line for line in lines)
    float_rules = [{"match": "cell", "weight": {"bits": None}}]
    lines = qat.report(qat.prepare(net, config(8, rules=float_rules), inputs[0][:4])).splitlines()
    assert any(line.startswith("cell.weight_ih_l0 ") and "stays float" in line for line in lines)


def test_biases_are_rounded_each_to_its_own_unit() -> None:
    net, inputs = build("GRU_last")
    prepared = qat.prepare(net, config(8), inputs[0][:4])
    finalize(prepared, [inputs], PTQConfig(), trained=False)
    layer = prepared.get_submodule("cell")
    assert isinstance(layer, QuantGRU)
    for weight, sources in zip(layer.weights_of_cell(0), layer.inputs_of_cell(0), strict=False):
        unit = weight.weight_quantizer.qparams(weight.tensor)[0].double() * sources[0].qparams()[0].double()
        steps = weight.bias.double() / unit
        torch.testing.assert_close(steps, steps.round(), atol=1e-2, rtol=1e-6)


def test_onnx_is_refused_by_name(tmp_path: Path) -> None:
    net, inputs = build("LSTM_last")
    prepared = qat.prepare(net, config(8), inputs[0][:4])
    qat.calibrate(prepared, [inputs])
    with pytest.raises(ValueError, match=r"layer 'cell' \(LSTM\) cannot be written to ONNX: .*formats=\['int8'\]"):
        qat.export(qat.lower(prepared), tmp_path, inputs, ["onnx"])


def test_groups_that_do_not_divide_are_refused() -> None:
    net, inputs = build("LSTM_last")
    scheme = {"weight": {"bits": 4, "granularity": "group", "group_size": 4}}
    with pytest.raises(ValueError, match=r"group_size=4 does not divide the 5 inputs of layer 'cell' \(weight_ih_l0"):
        qat.prepare(net, qat.QuantConfig.from_dict(scheme), inputs[0][:4])


def test_packed_sequences_that_no_recording_shows_are_trained_and_not_lowered() -> None:
    inputs = torch.randn(4, 6, 5), torch.tensor([6, 3, 5, 1])
    settings = qat.QuantConfig.from_dict({"graph": "layers", "weight": {"bits": 8, "range": "dynamic"}, **A})
    net = qat.prepare(KeywordGRU(5, 8, 3), settings, inputs)
    qat.calibrate(net, [inputs])
    net.train()
    net(*inputs).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="layer 'gru' is given a packed sequence by code that was not recorded"):
        qat.lower(net.eval())
