"""Networks that cannot be recorded as a whole: parts that can, single layers, what goes in and out."""

import copy
import dataclasses
import io
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.modes import quantizers
from qat.parts import graphs
from qat.ptq import PTQConfig, finalize
from qat.record import arguments, run
from qat.runtime import IntegerNetwork
from qat.structures import tensors


def config(bits: int = 8, **changes: Any) -> qat.QuantConfig:
    scheme = {"bits": bits}
    return qat.QuantConfig.from_dict({"weight": scheme, "activation": scheme, "input": scheme, **changes})


class Block(nn.Module):
    """Recorded as one part."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.width = nn.Linear(16, 32), nn.LayerNorm(16), nn.Linear(32, 16), 16

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.relu(self.a(self.norm(x))))


class Branches(nn.Module):
    """Not recorded: it looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.inner = nn.Linear(16, 16), Block()

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 1e9 else self.inner(self.f(x))


class Decoder(nn.Module):
    """An argument that may be a tensor or not, as language models have it; the head is the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList([Block(), Branches()])
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        x = self.emb(tokens)
        for block in self.blocks:
            x = block(x) * (block.width / 16 if isinstance(block, Block) else 1.0)
        y = self.head(x)
        return y if targets is None else (y, F.cross_entropy(y.flatten(0, 1), targets.flatten()))


class Holder(nn.Module):
    """Recorded, but for one submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.odd, self.d = nn.Linear(8, 16), Branches(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(F.relu(self.odd(F.relu(self.c(x)))))


class Alone(nn.Module):
    """Single layers of every family, in code that cannot be recorded."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Tensor) -> Any:
        if float(inputs[0].sum()) > 1e9:
            return inputs[0]
        (layer,) = self.children()
        return layer(*inputs)


class Attends(nn.Module):
    """Calls a module with settings that its recording has built in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            return x
        mixed, none = self.attention(x, x, x, None, False, attn_mask=None)
        assert none is None
        return mixed


@dataclasses.dataclass
class Pair:
    a: Tensor
    b: Tensor


class Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.g, self.h = nn.Linear(8, 16), nn.Linear(4, 16), nn.Linear(16, 3)

    def compute(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.f(a) + self.g(b))
        return self.h(y), y


class OfDict(Core):
    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        logits, hidden = self.compute(batch["a"], batch["b"])
        return {"logits": logits, "more": [hidden, (logits, None)]}


class OfDataclass(Core):
    def forward(self, batch: Pair) -> Pair:
        return Pair(*self.compute(batch.a, batch.b))


class OfPair(Core):
    def forward(self, pair: tuple[Tensor, Tensor], *, scale: Tensor) -> tuple[Tensor, Tensor]:
        a, b = pair
        logits, hidden = self.compute(a, b)
        return logits * scale, hidden


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


A, B = rows(24, 8), rows(24, 4)
TOKENS = torch.randint(0, 20, (6, 7), generator=torch.Generator().manual_seed(0))

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "optional argument": (Decoder, TOKENS),
    "opaque submodule": (Holder, A),
    "values looked at": (Branches, rows(24, 16)),
    "dict": (OfDict, ({"a": A, "b": B},)),
    "dataclass": (OfDataclass, (Pair(A, B),)),
    "tuple and keyword": (OfPair, {"pair": (A, B), "scale": torch.tensor([2.0])}),
    "Linear": (lambda: Alone(x=nn.Linear(8, 5)), A),
    "Bilinear": (lambda: Alone(x=nn.Bilinear(8, 4, 5)), (A, B)),
    "Conv1d": (lambda: Alone(x=nn.Conv1d(4, 6, 3, padding=1)), rows(5, 4, 9)),
    "Conv2d": (lambda: Alone(x=nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode="reflect")), rows(5, 4, 9, 9)),
    "Conv3d": (lambda: Alone(x=nn.Conv3d(2, 4, 3)), rows(5, 2, 5, 5, 5)),
    "ConvTranspose1d": (lambda: Alone(x=nn.ConvTranspose1d(4, 6, 3, stride=2)), rows(5, 4, 9)),
    "ConvTranspose2d": (lambda: Alone(x=nn.ConvTranspose2d(4, 6, 3, stride=2)), rows(5, 4, 5, 5)),
    "ConvTranspose3d": (lambda: Alone(x=nn.ConvTranspose3d(2, 4, 3)), rows(5, 2, 4, 4, 4)),
    "Embedding": (lambda: Alone(x=nn.Embedding(20, 6)), TOKENS),
    "EmbeddingBag": (lambda: Alone(x=nn.EmbeddingBag(20, 6, mode="mean")), TOKENS),
    "LSTM": (lambda: Alone(x=nn.LSTM(8, 8, batch_first=True)), rows(6, 5, 8)),
    "LSTM with states": (lambda: Alone(x=nn.LSTM(8, 8)), (rows(5, 6, 8), (rows(1, 6, 8), rows(1, 6, 8)))),
    "GRU": (lambda: Alone(x=nn.GRU(8, 8, num_layers=2, bidirectional=True)), rows(5, 6, 8)),
    "RNN": (lambda: Alone(x=nn.RNN(8, 8)), rows(5, 6, 8)),
    "LSTMCell": (lambda: Alone(x=nn.LSTMCell(8, 8)), A),
    "GRUCell": (lambda: Alone(x=nn.GRUCell(8, 8)), A),
    "settings built in": (Attends, rows(6, 5, 8)),
    "a layer itself": (lambda: nn.Linear(8, 4), A),
    "a recurrent layer itself": (lambda: nn.LSTM(8, 6, num_layers=2), rows(5, 6, 8)),
    "attention itself": (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (rows(6, 5, 8),) * 3),
    "a transformer layer itself": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), rows(6, 5, 8)),
}


def build(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    net, inputs = NETWORKS[name]
    return net().eval(), inputs


def relative(got: Any, expected: Any) -> float:
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    assert pairs
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-9)) for a, b in pairs)


@pytest.mark.parametrize("name", NETWORKS)
def test_16_bits_are_float(name: str) -> None:
    net, inputs = build(name)
    prepared = qat.prepare(net, config(16), inputs)
    qat.calibrate(prepared, [inputs])
    with torch.no_grad():
        assert relative(run(prepared.eval(), inputs), run(net, inputs)) < 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_8_bits_the_whole_way(name: str, tmp_path: Path) -> None:
    """Trained a step, saved and loaded, copied, lowered; the file too, of what a file can hold."""
    net, inputs = build(name)
    prepared = qat.prepare(net, config(), inputs)
    qat.calibrate(prepared, [inputs])
    prepared.train()
    loss = sum(t.square().mean() for t in tensors(run(prepared, inputs)) if t.is_floating_point())
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {k: p.grad for k, p in prepared.named_parameters()}
    assert all(g is not None and torch.isfinite(g).all() for g in grads.values()), grads.keys()
    with torch.no_grad():
        for p in prepared.parameters():
            p -= 0.1 * p.grad  # type: ignore[operator]
    finalize(prepared, [inputs], PTQConfig(), trained=True)
    with torch.no_grad():
        simulated = run(prepared, inputs)

    file = io.BytesIO()
    torch.save(prepared.state_dict(), file)
    file.seek(0)
    again = qat.prepare(build(name)[0], config(), inputs)
    again.load_state_dict(torch.load(file, weights_only=True))
    qat.set_mode(again, "frozen")
    for copied in (again.eval(), copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(tensors(run(copied, inputs)), tensors(simulated), strict=True))

    lowered = qat.lower(prepared)
    with torch.no_grad():
        integer = run(lowered, inputs)
        assert relative(integer, simulated) < 1e-5
    assert not any(True for _ in quantizers(lowered))
    kept = {id(t.untyped_storage()) for t in (*prepared.parameters(), *prepared.buffers())}
    assert not any(id(t.untyped_storage()) in kept for t in (*lowered.parameters(), *lowered.buffers()))
    if isinstance(lowered, IntegerNetwork) and lowered.signature is not None:
        flat = lowered.flat(*arguments(net, inputs))
        loaded = qat.load(qat.export(lowered, tmp_path, flat, ["int8"])["int8"])
        assert all(torch.equal(a, b) for a, b in zip(tensors(run(loaded, inputs)), tensors(integer), strict=True))


def test_what_is_recorded_and_what_is_not(caplog: pytest.LogCaptureFixture) -> None:
    net, tokens = build("optional argument")
    with caplog.at_level(logging.WARNING):
        prepared = qat.prepare(net, config(), tokens)
    assert isinstance(prepared, Decoder)
    assert list(graphs(prepared)) == ["emb", "blocks.0", "blocks.1.f", "blocks.1.inner", "head"]
    assert isinstance(prepared.blocks[0], fx.GraphModule)
    assert prepared.blocks[0].width == 16  # other code may read it
    assert len(caplog.records) == 1
    assert "the code of 2 of its modules cannot be recorded" in caplog.text
    text = qat.report(prepared)
    assert "Decoder: its code is not recorded: Decoder.forward takes 'targets', which the example" in text
    assert "blocks.1: its code is not recorded: qat cannot trace Branches at" in text
    y, loss = prepared(tokens, targets=tokens)  # what the example left out still works
    assert loss.requires_grad
    assert y.shape == (6, 7, 20)


def test_tied_weights_are_quantized_once_across_parts() -> None:
    net, tokens = build("optional argument")
    prepared = qat.prepare(net, config(rules=[{"match": "head", "weight": {"bits": 6}}]), tokens)
    assert prepared.head.weight is prepared.emb.weight is net.emb.weight
    assert prepared.head.weight_quantizer is prepared.emb.weight_quantizer
    assert prepared.emb.weight_quantizer.scheme.bits == 8  # the wider one
    assert prepared.meta["qat"]["reasons"]["head"] == "rule 'head', tied with emb in the scheme of emb"


def test_rules_see_the_whole_network() -> None:
    net, tokens = build("optional argument")
    rules = [
        {"match": "first", "weight": {"bits": 7}},
        {"match": "blocks.*.a", "weight": {"bits": 6}},
        {"match": "type:Linear", "weight": {"bits": None}, "activation": {"bits": None}},
    ]
    prepared = qat.prepare(net, config(rules=rules), tokens)
    bits = {name: q.scheme.bits for name, q in quantizers(prepared) if name.endswith("weight_quantizer")}
    assert bits == {"emb.weight_quantizer": 7, "blocks.0.a.weight_quantizer": 6, "blocks.1.inner.a.weight_quantizer": 6}
    with pytest.raises(ValueError, match=r"rules\[0\].match='block.0' matches no layer.*blocks\.0\.a"):
        qat.prepare(net, config(rules=[{"match": "block.0"}]), tokens)


def test_a_graph_may_be_required_or_done_without() -> None:
    net, x = build("opaque submodule")
    with pytest.raises(ValueError, match=r"cannot trace Holder at .*test_parts\.py:\d+: .*into a submodule of its own"):
        qat.prepare(net, config(graph="required"), x)
    decoder, tokens = build("optional argument")
    decoder.blocks[1] = Block()
    required = qat.prepare(decoder, config(graph="required"), tokens)  # with targets fixed at None
    assert isinstance(required, fx.GraphModule)
    with pytest.raises(TypeError, match="targets"):
        required(tokens, targets=tokens)
    layers = qat.prepare(Block(), config(graph="layers"), rows(4, 16))
    assert isinstance(layers, Block)
    assert list(graphs(layers)) == ["a", "b"]
    with pytest.raises(ValueError, match=r"quant\.graph='trees' is not known \(valid: auto, required, layers\)"):
        config(graph="trees")


def test_what_the_example_does_not_run_is_named() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor, spare: bool = False) -> Tensor:
            return self.spare(x) if spare else self.used(x)

    prepared = qat.prepare(Half(), config(), A)
    assert "float: spare: the example inputs do not run it" in qat.report(prepared)
    with pytest.raises(ValueError, match=r"nothing in Sequential can be quantized: it has no quantizable layer"):
        qat.prepare(nn.Sequential(nn.ReLU()), config(), A)
    with pytest.raises(ValueError, match=r"nothing in Alone can be quantized: qat cannot trace Alone at"):
        qat.prepare(Alone(x=nn.ReLU()), config(), A)


def test_other_settings_than_those_built_in_are_refused() -> None:
    net, x = build("settings built in")
    prepared = qat.prepare(net, config(), x)
    for network in (prepared, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        with pytest.raises(ValueError, match="need_weights=True: the recording has need_weights=False built in"):
            network.attention(x, x, x, need_weights=True)
    qat.calibrate(prepared, [x])
    with pytest.raises(ValueError, match="need_weights=True: the network has need_weights=False built in"):
        qat.lower(prepared).attention(x, x, x, None, True)


def test_a_float_checkpoint_loads_and_training_is_shared() -> None:
    net, tokens = build("optional argument")
    prepared = qat.prepare(net, config(), tokens)
    assert {k: id(p) for k, p in net.named_parameters()} == {k: id(p) for k, p in prepared.named_parameters()}
    missing, unexpected = prepared.load_state_dict(net.state_dict(), strict=False)
    assert not unexpected
    assert all("quantizer" in key for key in missing)
    assert type(net.blocks[0]) is Block  # the float network is as it was
    assert not any(True for _ in quantizers(net))


def test_the_example_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"qat\.prepare needs example_inputs to run Block once"):
        qat.prepare(Block(), config())


def test_no_file_holds_python_code(tmp_path: Path) -> None:
    net, x = build("opaque submodule")
    prepared = qat.prepare(net, config(), x)
    qat.calibrate(prepared, [x])
    lowered = qat.lower(prepared)
    assert isinstance(lowered, IntegerNetwork)
    with pytest.raises(ValueError, match="Branches was not recorded and runs as Python code: no file can hold it"):
        qat.export(lowered, tmp_path, x, ["int8"])
    alone = qat.prepare(Alone(x=nn.Linear(8, 4)), config(), x)
    qat.calibrate(alone, [x])
    with pytest.raises(ValueError, match=r"Alone was lowered in parts, .*one by one \(lowered\.x\)"):
        qat.export(qat.lower(alone), tmp_path, x, ["int8"])  # type: ignore[call-overload]
