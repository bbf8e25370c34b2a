"""Queries, keys, values, scores and probabilities of attention: each on a grid of its own, or in float, by a rule."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat
from qat.export.onnxruntime import OnnxNetwork
from qat.scheme.config import ATTENTION
from tests.whole_way import assert_files_agree, config, trained

BATCH, STEPS, WIDTH, HEADS = 6, 5, 8, 2
LATER = torch.ones(STEPS, STEPS).triu(1).bool()
FLOAT: dict[str, Any] = {"bits": None}


class Self(nn.Module):
    """torch's attention of a sequence to itself: one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.register_buffer("mask", LATER)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, attn_mask=self.mask, need_weights=False)[0]


class Called(nn.Module):
    """The function of torch, called by a module of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


class Model(nn.Module):
    """Attention that has a path."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


NETS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "MultiheadAttention": (Self, "block.attn.sdpa"),
    "scaled_dot_product_attention": (Called, "block.sdpa"),
}


def on_grid(bits: int, *observed: Tensor) -> Callable[[Tensor], Tensor]:
    """Affine quantization to the range of what was observed, zero included, written out."""
    low = min(0.0, *(float(x.min()) for x in observed))
    high = max(0.0, *(float(x.max()) for x in observed))
    scale = torch.tensor((high - low) / (2**bits - 1))
    zero = torch.round(-low / scale)
    return lambda x: (torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


Place = Callable[[str, Tensor], Tensor]


@torch.no_grad()
def attend(net: nn.Module, x: Tensor, place: Place) -> Tensor:
    """Attention written out, with something done to each of its five tensors."""
    block = net.block
    if isinstance(block, Self):
        projected = F.linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    else:
        projected = (block.query(x), block.key(x), block.value(x))
    q, k, v = (place(name, value) for name, value in zip(ATTENTION, projected, strict=False))
    q, k, v = (value.unflatten(-1, (HEADS, -1)).transpose(1, 2) for value in (q, k, v))
    scores = place("scores", q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5)
    shares = place("probabilities", scores.masked_fill(LATER, -torch.inf).softmax(-1))
    y = (shares @ v).transpose(1, 2).flatten(-2)
    return block.attn.out_proj(y) if isinstance(block, Self) else y


def composed(net: nn.Module, x: Tensor, bits: dict[str, int | None]) -> Tensor:
    """Attention with a fake-quantize at each place that has bits, whose range is that of the float network."""
    seen: dict[str, list[Tensor]] = {}
    attend(net, x, lambda name, value: seen.setdefault(name, [value])[0])
    if isinstance(net.block, Self) and bits["query"] == bits["key"] == bits["value"]:  # one tensor, one grid
        seen |= {name: [*seen["query"], *seen["key"], *seen["value"]] for name in ("query", "key", "value")}
    grids = {name: (lambda x: x) if n is None else on_grid(n, *seen[name]) for name, n in bits.items()}
    return attend(net, x, lambda name, value: grids[name](value))


def prepared_for(name: str, bits: dict[str, int | None]) -> tuple[nn.Module, nn.Module, Tensor]:
    """Float layers, and 8 bits for what attention reads but scores; rules for what differs."""
    make, path = NETS[name]
    torch.manual_seed(0)
    net, x = Model(make()).eval(), torch.randn(BATCH, STEPS, WIDTH)
    rules = [
        {"match": f"{path}.{part}", "activation": {"bits": n}}
        for part, n in bits.items()
        if n != (None if part == "scores" else 8)
    ]
    settings = config(8, weight=FLOAT, rules=rules)
    prepared = qat.prepare(net, settings, x)
    qat.calibrate(prepared, [x])
    return net, prepared.eval(), x


USUAL: dict[str, int | None] = {**dict.fromkeys(ATTENTION, 8), "scores": None}
CASES = [USUAL, dict.fromkeys(ATTENTION, None), dict.fromkeys(ATTENTION, 4)] + [
    USUAL | {part: bits}
    for part, bits in itertools.product(ATTENTION, (None, 4, 8))
    if bits != USUAL[part]
]  # fmt: skip


@pytest.mark.parametrize("bits", CASES, ids=lambda bits: "-".join(map(str, bits.values())))
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_each_is_switched_alone(name: str, bits: dict[str, int | None]) -> None:
    net, prepared, x = prepared_for(name, bits)
    result = prepared(x)
    torch.testing.assert_close(result, composed(net, x, bits), rtol=1e-5, atol=1e-5)
    assert torch.allclose(result, net(x), rtol=1e-4, atol=1e-4) == (set(bits.values()) == {None})
    torch.testing.assert_close(qat.lower(prepared)(x), result, rtol=1e-5, atol=1e-5)


MIXED: list[dict[str, Any]] = [
    {"match": "*.sdpa.query", "activation": {"bits": 4}},
    {"match": "*.sdpa.scores", "activation": {"bits": 8}},
    {"match": "*.sdpa.probabilities", "activation": {"bits": 6}},
]


@pytest.mark.parametrize("name", NETS)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net, x = Model(NETS[name][0]()), torch.randn(24, STEPS, WIDTH)
    prepared = trained(net, (x,), config(8, rules=MIXED))
    network = assert_files_agree(prepared, (x,), tmp_path)
    float_values = qat.lower(trained(net, (x,), config(8, rules=[{"match": "*.value", "activation": FLOAT}])))
    path = qat.export(float_values, tmp_path / "float", x[:3], formats=["onnx"])["onnx"]
    torch.testing.assert_close(OnnxNetwork(path)(x), float_values(x), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(network(x), float_values(x), atol=1e-3)


class Alone(nn.Module):
    """Attention without projections: the input is all that it reads, and something else reads it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + F.scaled_dot_product_attention(x, x, x))


def test_others_who_read_the_tensor_do_not_read_what_was_made_for_one() -> None:
    torch.manual_seed(0)
    net, x = Alone().eval(), torch.randn(3, 2, STEPS, 4)
    rules = [{"match": "sdpa.query", "activation": {"bits": 3}}, {"match": "sdpa.value", "activation": FLOAT}]
    prepared = qat.prepare(net, config(8, rules=rules), x)
    qat.calibrate(prepared, [x])
    prepared.eval()
    q3, q8 = on_grid(3, x)(x), on_grid(8, x)(x)
    scores = q3 @ q8.transpose(-2, -1) / 2
    shares = (x @ x.transpose(-2, -1) / 2).softmax(-1)
    shares = on_grid(8, shares)(scores.softmax(-1))
    seen: list[Tensor] = []
    prepared.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        prepared(x)
        y = F.scaled_dot_product_attention(x, x, x)
        expected = on_grid(8, x + y)(q8 + on_grid(8, y)(shares @ x))
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


def test_a_projection_that_is_cached_too_keeps_its_own_grid() -> None:
    """Per token, a key's grid is that of its features, not of the transposed matrix that is multiplied."""
    torch.manual_seed(0)
    net, x = Model(Self()).eval(), torch.randn(2, STEPS, WIDTH)
    token = {"bits": 4, "granularity": "token", "range": "dynamic"}
    prepared = qat.prepare(net, config(8, rules=[{"match": "*.key", "activation": token}]), x)
    made: list[Tensor] = []
    prepared.quantizers.block_attn_sdpa_key.register_forward_hook(lambda _, args, y: made.append(args[0]))
    prepared(x)
    assert made[0].shape == (2, STEPS, WIDTH)


def report_rows(text: str, title: str) -> dict[str, list[str]]:
    """First column -> the others, of a table of the report."""
    lines = text[text.index(f"\n{title}") + 1 :].splitlines()[3:]
    return {cells[0]: cells[1:] for line in itertools.takewhile(bool, lines) for cells in [_cells(line)]}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_report_says_what_may_be_named_and_what_chose_it() -> None:
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True), torch.randn(2, STEPS, WIDTH)
    rules = [*MIXED, {"match": "linear2", "activation": {"bits": 5}}, {"match": "add", "activation": {"bits": 10}}]
    text = qat.report(qat.prepare(layer, config(8, rules=rules), x))
    assert report_rows(text, "Attention")["self_attn.sdpa"] == ["uint4", "uint8", "uint8", "uint8", "uint6"]
    why = {name: (cells[1], cells[3]) for name, cells in report_rows(text, "Edges").items()}
    assert why["self_attn.sdpa.query"] == ("rule '*.sdpa.query'", "self_attn.sdpa.query")
    assert why["self_attn.sdpa.key"] == ("default", "self_attn.sdpa.key")
    assert why["self_attn.mul"] == ("rule '*.sdpa.scores'", "self_attn.sdpa.scores")
    assert why["linear1"] == ("rule 'linear2'", "linear2")
    assert why["self_attn.out_proj"] == ("rule 'add'", "add")
    assert why["norm1"] == ("default", "linear1, add_2")


@pytest.mark.parametrize(("target", "ends"), [("cmsis_nn", ", range of target=cmsis_nn"), ("integer_only", "")])
def test_the_report_says_where_the_target_asks_for_a_grid(target: str, ends: str) -> None:
    layer, x = nn.TransformerEncoderLayer(WIDTH, HEADS, 12, batch_first=True), torch.randn(2, STEPS, WIDTH)
    text = qat.report(qat.prepare(layer, qat.preset("int8", target=target), x))
    why = {name: (cells[1], cells[3]) for name, cells in report_rows(text, "Edges").items()}
    assert why["self_attn.mul"] == (f"target={target}: softmax reads integers", "self_attn.sdpa.scores")
    assert why["self_attn.softmax"] == (f"default{ends}", "self_attn.sdpa.probabilities")
    assert why["add"] == (f"target={target}: layer_norm reads integers", "norm1")


def test_rules_that_fit_nothing() -> None:
    net, x = Model(Self()), torch.randn(2, STEPS, WIDTH)
    with pytest.raises(ValueError, match=r"rules\[0\].match='block.attn.sdpa.keys' matches no.*block.attn.sdpa.key"):
        qat.prepare(net, config(8, rules=[{"match": "block.attn.sdpa.keys", "activation": {"bits": 4}}]), x)
    with pytest.raises(ValueError, match=r"rules\[0\].weight=.*'\*.sdpa.key' matches no layer, only operations"):
        qat.prepare(net, config(8, rules=[{"match": "*.sdpa.key", "weight": {"bits": 4}}]), x)
    with pytest.raises(ValueError, match=r"rules\[0\].activation.bits=4: target=tensorrt .*activation.bits=8"):
        qat.prepare(net, qat.preset("int8", "tensorrt", rules=[{"match": "*.key", "activation": {"bits": 4}}]), x)
    off = [{"match": f"*.sdpa.{part}", "activation": FLOAT} for part in ATTENTION]
    text = qat.report(qat.prepare(net, qat.preset("int8", "tensorrt", rules=off), x))
    assert report_rows(text, "Attention")["block.attn.sdpa"] == ["float"] * 5


def test_broad_rules_leave_scores_alone() -> None:
    net, x = Model(Self()), torch.randn(2, STEPS, WIDTH)
    text = qat.report(qat.prepare(net, config(8, rules=[{"match": "block.*", "activation": {"bits": 5}}]), x))
    assert report_rows(text, "Attention")["block.attn.sdpa"] == ["uint5", "uint5", "uint5", "float", "uint5"]
