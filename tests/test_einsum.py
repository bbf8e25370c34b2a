"""Which equations of einsum are products of matrices, and that the products are what einsum computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qat
from qat.analysis.islands import float_islands
from qat.attention import matmul
from qat.einsum import decompose_einsum, read
from qat.export.onnxruntime import OnnxNetwork
from qat.runtime.matmul import IntegerMatmul
from qat.runtime.operations import Function
from tests.whole_way import assert_files_agree, config, trained

SIZES = {"a": 2, "b": 3, "c": 4, "d": 5, "h": 2, "i": 6, "j": 5, "k": 7, "l": 3, "m": 2, "n": 3, "q": 4, "A": 2}
PRODUCTS = [
    "bij,bjk->bik", "bij,bkj->bik", "bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd", "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd",
    "bij,jk->bik", "ij,bjk->bik", "ij,jk", "ij,jk->ik", "ij,jk->ki", "ij,j->i", "j,jk->k", "i,i->", "bi,bi->b",
    "bchw,bchw->bc", "bij,bij->bi", "b i j , b j k -> b i k", "nctv,vw->nctw", "nctv,kvw->nkctw",
    "bijd,bkld->bijkl", "bijd,kld->bkijl", "bxyd,bd->bxy", "abij,cjk->abcik", "ja,jA", "bijkl,bjkm->bilm",
]  # fmt: skip
DOTS = [
    ("...ij,...jk->...ik", (2, 3, 4, 5), (2, 3, 5, 6)), ("...ij,...jk", (3, 4, 5), (5, 6)),
    ("...ij,...jk->...ik", (4, 5), (2, 3, 5, 6)), ("...i,...i->...", (2, 1, 5), (2, 3, 5)),
    ("...d,kd->...k", (2, 3, 5), (4, 5)), ("b...d,bd->b...", (2, 3, 4, 5), (2, 5)), ("i...,i...->...", (5, 3), (5, 3)),
    ("bij,bjk->bik", (1, 4, 5), (3, 5, 6)), ("...ij,...j->i...", (2, 3, 5), (2, 5)),
]  # fmt: skip
OTHERS = {
    "sums one tensor": ("bij,bjk->bk", (2, 3, 4), (2, 4, 5)),
    "sums one tensor by what it leaves out": ("...i,j->j", (2, 3), (4,)),
    "a diagonal": ("bii,bij->bj", (2, 3, 3), (2, 3, 4)),
    "value by value": ("bij,bij->bij", (2, 3, 4), (2, 3, 4)),
    "outer": ("bi,bj->bij", (2, 3), (2, 4)),
    "one tensor": ("bij->bji", (2, 3, 4)),
    "three tensors": ("ij,jk,kl->il", (2, 3), (3, 4), (4, 5)),
    "repeated": ("ij,kj->ik", (2, 1), (3, 4)),
}  # fmt: skip


def recorded(equation: str, count: int) -> fx.GraphModule:
    graph = fx.Graph()
    operands = [graph.placeholder(f"x{i}") for i in range(count)]
    graph.output(graph.call_function(torch.einsum, (equation, *operands)))
    return fx.GraphModule(nn.Module(), graph)


def shapes_of(equation: str) -> list[tuple[int, ...]]:
    sizes = SIZES | {label: 2 + i % 4 for i, label in enumerate("tvwxy")}
    return [tuple(sizes[label] for label in term) for term in equation.replace(" ", "").partition("->")[0].split(",")]


@pytest.mark.parametrize(
    ("equation", "shapes"), [*((e, shapes_of(e)) for e in PRODUCTS), *((e, list(s)) for e, *s in DOTS)]
)
def test_a_product_of_matrices_is_what_einsum_computes(equation: str, shapes: list[tuple[int, ...]]) -> None:
    """In float64, gradients too; of the operations that remain none is einsum."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    net = recorded(equation, 2)
    nodes = [node for node in net.graph.nodes if node.op == "placeholder"]
    known = dict(zip(nodes, map(torch.Size, shapes), strict=True)) | {
        node: torch.Size() for node in net.graph.nodes if node.target is torch.einsum
    }
    assert decompose_einsum(net, known)
    targets = [node.target for node in net.graph.nodes]
    assert torch.einsum not in targets
    assert targets.count(matmul) == 1
    expected, got = torch.einsum(equation, *operands), net(*operands)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    slopes = [torch.autograd.grad((y * weights).sum(), operands) for y in (expected, got)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_of_two_matrices_stays(name: str) -> None:
    equation, *shapes = OTHERS[name]
    assert read(equation, shapes) is None
    net = recorded(equation, len(shapes))
    known = {node: torch.Size(shape) for node, shape in zip(net.graph.nodes, shapes, strict=False)}
    assert not decompose_einsum(net, known)


class Scores(nn.Module):
    """Two projections of tokens, one of them by a matrix, and what `run` makes of both."""

    def __init__(self, run: Callable[..., Tensor], outputs: int) -> None:
        super().__init__()
        self.q, self.head, self.run = nn.Linear(8, 6), nn.Linear(outputs, 3), run
        self.w = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.run(self.q(x), torch.einsum("...i,ij->...j", x, self.w)).flatten(1))
        return result


def heads(q: Tensor, k: Tensor) -> Tensor:
    q, k = q.unflatten(-1, (2, 3)), k.unflatten(-1, (2, 3))
    p = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), -1)
    return torch.einsum("bhqk,bkhd->bqhd", [p, k])


NETWORKS: dict[str, tuple[Callable[..., Tensor], int, int]] = {
    "scores": (lambda q, k: torch.einsum("bid,bjd->bij", q, k), 25, 2),
    "heads": (heads, 30, 3),
    "a product of a product": (lambda q, k: torch.einsum("bij,bjd->bid", torch.einsum("bid,bjd->bij", q, k), k), 30, 3),
    "then attention": (lambda q, k: F.scaled_dot_product_attention(q, k, q), 30, 3),
    "two sums": (lambda q, k: torch.einsum("bsi,bsi->b", q, k)[:, None], 1, 2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_lowered_as_products_of_integers(name: str, tmp_path: Any) -> None:
    run, outputs, products = NETWORKS[name]
    torch.manual_seed(0)
    x = torch.randn(64, 5, 8)
    prepared = trained(Scores(run, outputs), (x,))
    assert not [row for row in float_islands(prepared) if row["operation"] == "einsum"]
    network = assert_files_agree(prepared, (x,), tmp_path)
    assert sum(isinstance(layer, IntegerMatmul) for layer in network.layers.values()) == products
    assert not any(isinstance(layer, Function) and layer.name == "einsum" for layer in network.layers.values())
    assert OnnxNetwork(tmp_path / "model.onnx")(x[:1]).shape == (1, 3)


def test_attention_by_einsum_is_attention_to_rules() -> None:
    torch.manual_seed(0)
    net, x = Scores(heads, 30), torch.randn(8, 5, 8)
    rule = [{"match": "*sdpa.probabilities", "activation": {"bits": 4}}]
    prepared = qat.prepare(net, config(8, rules=rule), x)
    assert {q.scheme.bits for name, q in prepared.named_modules() if "softmax" in name and hasattr(q, "scheme")} == {4}


def test_the_report_says_which_equations_stay_float() -> None:
    torch.manual_seed(0)
    net = Scores(lambda q, k: torch.einsum("bsi,bsi->bsi", q, k), 30)
    prepared = qat.prepare(net, config(8), torch.randn(8, 5, 8))
    assert "float: einsum: 'bsi,bsi->bsi' is no product of two matrices: computed in float" in qat.report(prepared)
