"""`torch.einsum` of two tensors that is a product of matrices, as that product: it has an integer form, einsum none."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from qat.attention import matmul


class Product(NamedTuple):
    """What stands for an equation: batches of rows times columns. Labels, in the order that the result has them.

    Attributes:
        left, right, result: of each dimension of the two tensors and of the result.
        batch: in both tensors and the result.
        summed: in both tensors, not in the result; at least one.
        rows, columns: in one tensor and the result. All but the last of each are batches of one tensor alone.
    """

    left: list[str]
    right: list[str]
    result: list[str]
    batch: list[str]
    summed: list[str]
    rows: list[str]
    columns: list[str]


def read(equation: str, shapes: Sequence[Sequence[int]]) -> Product | None:
    """The product that an equation asks for; None where it is none.

    None are an equation of one tensor or more than two, one that sums along a dimension of a single tensor, that takes
    a diagonal, or that sums nothing. An ellipsis stands for as many labels as the tensors have dimensions, counted from
    the last, as in broadcasting.

    Args:
        equation: of `torch.einsum`.
        shapes: of its tensors.

    >>> read("bij,bkj->bik", [(2, 3, 4), (2, 5, 4)]).summed
    ['j']
    >>> read("...i,...i", [(2, 4), (2, 4)]).result
    ['.0']
    >>> read("ij,jk->k", [(2, 3), (3, 4)]) is None  # along i it sums one tensor
    True
    """
    terms, arrow, result = equation.replace(" ", "").partition("->")
    if len(shapes) != 2 or terms.count(",") != 1:
        return None
    pairs = list(zip(terms.split(","), shapes, strict=True))
    dots = max(len(shape) - len(term.replace("...", "")) if "..." in term else 0 for term, shape in pairs)
    left, right = (_labels(term, len(shape) - len(term.replace("...", ""))) for term, shape in pairs)
    if not arrow:  # labels that occur once, in the order of the alphabet
        once = sorted(label for label in {*left, *right} if (left + right).count(label) == 1 and label[0] != ".")
        result = "..." * bool(dots) + "".join(once)
    made = _labels(result, dots)
    both, known = set(left) & set(right), set(left) | set(right)
    if any(len(set(labels)) < len(labels) for labels in (left, right, made)) or not set(made) <= known:
        return None
    summed = [label for label in left if label in both and label not in made]
    sizes = [dict(zip(labels, shape, strict=True)) for labels, shape in zip((left, right), shapes, strict=True)]
    if not summed or known - both - set(made) or any(sizes[0][label] != sizes[1][label] for label in summed):
        return None
    parts = ([label for label in made if label in one] for one in (both, set(left) - both, set(right) - both))
    batch, rows, columns = parts
    return Product(left, right, made, batch, summed, rows, columns)


def _labels(term: str, dots: int) -> list[str]:
    before, ellipsis, behind = term.partition("...")
    return [*before, *(f".{i}" for i in reversed(range(dots if ellipsis else 0))), *behind]


def decompose_einsum(prepared: fx.GraphModule, shapes: dict[fx.Node, torch.Size]) -> bool:
    """Replace calls of `torch.einsum` that are products of matrices by moves, `matmul` and moves.

    Args:
        prepared: a traced network; it is changed.
        shapes: of its tensors; those of the results are added.

    Returns:
        Whether there was one.
    """
    found = False
    for node in [node for node in prepared.graph.nodes if node.target is torch.einsum]:
        equation, operands = node.args[0], node.args[1:]
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        if not isinstance(equation, str) or any(operand not in shapes for operand in operands):
            continue
        product = read(equation, [shapes[operand] for operand in operands])
        if product is None:
            continue
        with prepared.graph.inserting_before(node):
            steps = _Steps(prepared.graph, dict(node.meta))
            result = _product(steps, product, *operands)
        shapes[result] = shapes[node]
        node.replace_all_uses_with(result)
        prepared.graph.erase_node(node)
        found = True
    if found:
        prepared.recompile()
    return found


class _Steps(NamedTuple):
    """Appends calls to a graph, each with the same meta data."""

    graph: fx.Graph
    meta: dict[str, Any]

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        node = (self.graph.call_method if isinstance(target, str) else self.graph.call_function)(target, args)
        node.meta = dict(self.meta)
        return node

    def ordered(self, x: fx.Node, labels: list[str], order: list[str]) -> fx.Node:
        """A tensor with its dimensions in another order."""
        return x if labels == order else self("permute", x, *(labels.index(label) for label in order))


def _product(steps: _Steps, p: Product, left: fx.Node, right: fx.Node) -> fx.Node:
    """[batch, rows' batches, 1.., row, summed] times [batch, 1.., columns' batches, summed, column]."""
    ahead, behind = p.rows[:-1], p.columns[:-1]
    a = steps.ordered(left, p.left, [*p.batch, *p.rows, *p.summed])
    b = steps.ordered(right, p.right, [*p.batch, *behind, *p.summed, *p.columns[-1:]])
    if not p.rows:
        a = steps("unsqueeze", a, len(p.batch))
    if not p.columns:
        b = steps("unsqueeze", b, -1)
    if len(p.summed) > 1:
        a = steps("flatten", a, len(p.batch) + max(len(p.rows), 1))
        b = steps("flatten", b, len(p.batch) + len(behind), -2)
    for _ in behind:
        a = steps("unsqueeze", a, len(p.batch) + len(ahead))
    for _ in ahead if p.batch or behind else ():
        b = steps("unsqueeze", b, len(p.batch))
    y = steps(matmul, a, b)
    if not p.columns:
        y = steps("squeeze", y, -1)
    if not p.rows:
        y = steps("squeeze", y, -1 if not p.columns else -2)
    return steps.ordered(y, [*p.batch, *ahead, *behind, *p.rows[-1:], *p.columns[-1:]], p.result)
