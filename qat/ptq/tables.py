"""Linear layers replaced by table look-ups, with the error that this makes."""

import copy
import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qat.modes import eval_mode
from qat.numerics.product import SAMPLE, fit_product
from qat.runtime.tables import TableLinear

Batch = Tensor | tuple[Tensor, ...]


@dataclass(kw_only=True)
class TableError:
    """What replacing one linear layer costs and saves.

    The error is that of the layer's output on data that prototypes were not learned from, given the same inputs (those
    that arrive with earlier layers replaced): `||tables - linear|| / ||linear||` over all elements.

    Attributes:
        layer: module path.
        relative_error: Frobenius norm of the error over that of the float layer's output.
        sqnr_db: the same as signal to noise, decibels.
        multiply_adds: of the float layer, an input vector.
        look_ups: of one number in a table, an input vector; each is an addition.
        encoding_multiply_adds: to find the nearest prototypes, an input vector. Above `multiply_adds` where entries
            outnumber outputs: such a layer gets dearer.
    """

    layer: str
    relative_error: float
    sqnr_db: float
    multiply_adds: int
    look_ups: int
    encoding_multiply_adds: int

    def __str__(self) -> str:
        return (
            f"{self.layer}: error {100 * self.relative_error:.1f} % of the output ({self.sqnr_db:.1f} dB); "
            f"{self.multiply_adds:,} multiply-adds a vector become {self.look_ups:,} look-ups "
            f"and {self.encoding_multiply_adds:,} multiply-adds"
        )


@torch.no_grad()
def tabulate(
    net: nn.Module,
    batches: Iterable[Batch],
    *,
    match: str = "*",
    subspace_width: int = 4,
    entries: int = 16,
    holdout: Batch | None = None,
    seed: int = 0,
) -> tuple[nn.Module, list[TableError]]:
    """A copy of a network with linear layers as table look-ups.

    An approximate matrix product: vectors of inputs are looked up among prototypes, whose products with the weights are
    known. (`format=product` is about storage: there vectors of *weights* are prototypes, and products are exact.)
    Layers are replaced in order of execution. Each learns its prototypes from inputs as they arrive through the layers
    replaced before it, and so adapts to their errors. Runs all batches once for each layer.

    Args:
        net: any network; it stays as it is. Only modules of type `nn.Linear` itself are replaced: a subclass may use
            its weight in another way (attention does). So does `nn.TransformerEncoderLayer` with torch's fused path:
            switch that off (`torch.backends.mha.set_fastpath_enabled(False)`) to run its copy.
        batches: inputs, each a tensor or a tuple of the network's arguments; a few thousand vectors a layer do.
        match: glob on module paths.
        subspace_width: inputs a code.
        entries: prototypes a code, 1 to 256.
        holdout: the batch that errors are measured on. None takes the last of `batches`, or the second half of a
            single one, and does not learn from it.
        seed: of k-means and its sample.

    Returns:
        The copy, and the error of each layer in order of execution. A layer that never ran stays as it is.

    Raises:
        ValueError: `match` fits no linear layer (names the nearest paths), a layer's inputs do not divide by
            `subspace_width` (names it), or there is nothing to hold out.
    """
    net = copy.deepcopy(net)
    paths = _choose(net, match, subspace_width)
    learn, test = _split(list(batches), holdout)
    errors, tables = [], {}
    with eval_mode(net):
        for layer, vectors in _in_order(net, list(paths), learn).items():
            x = _inputs(net, layer, learn, share=min(1.0, SAMPLE / vectors), seed=seed)
            codebook = fit_product(x, layer.in_features // subspace_width, entries, seed=seed)
            tables[layer] = TableLinear.from_linear(layer, codebook)
            errors.append(_error(paths[layer][0], layer, tables[layer], _inputs(net, layer, [test])))
            for path in paths[layer]:
                net.set_submodule(path, tables[layer])
    for layer, table in tables.items():  # eval_mode has given the layers their own mode back
        table.train(layer.training)
    return net, errors


def _choose(net: nn.Module, match: str, width: int) -> dict[nn.Linear, list[str]]:
    """The layers to replace, each with all its paths (a shared layer has several)."""
    paths: dict[nn.Linear, list[str]] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        if path and type(module) is nn.Linear:
            paths.setdefault(module, []).append(path)
    chosen = {layer: own for layer, own in paths.items() if any(fnmatch.fnmatchcase(path, match) for path in own)}
    if not chosen:
        every = [path for own in paths.values() for path in own]
        close = difflib.get_close_matches(match, every, n=3, cutoff=0.3) or every[:5]
        raise ValueError(
            f"match='{match}' matches no nn.Linear. Nearest module paths: "
            f"{', '.join(close) or 'none, the network holds no nn.Linear'}"
        )
    for layer, own in chosen.items():
        if width < 1 or layer.in_features % width:
            raise ValueError(
                f"'{own[0]}' has {layer.in_features} inputs, which do not divide into subspaces of "
                f"subspace_width={width}; choose a width that divides them, or leave the layer out by `match`"
            )
    return chosen


def _split(batches: list[Batch], holdout: Batch | None) -> tuple[list[Batch], Batch]:
    """Batches to learn from, and the one to measure on."""
    if not batches:
        raise ValueError("tabulate needs at least one batch of inputs, got none")
    if holdout is not None:
        return batches, holdout
    if len(batches) > 1:
        return batches[:-1], batches[-1]
    tensors = _arguments(batches[0])
    half = len(tensors[0]) // 2
    if half == 0:
        raise ValueError("tabulate needs a second sample to measure its error on: pass more data, or `holdout`")
    return [tuple(t[:half] for t in tensors)], tuple(t[half:] for t in tensors)


def _arguments(batch: Batch) -> tuple[Tensor, ...]:
    return batch if isinstance(batch, tuple) else (batch,)


def _in_order(net: nn.Module, layers: list[nn.Linear], batches: list[Batch]) -> dict[nn.Linear, int]:
    """Layers in order of first use, and how many input vectors each sees in all batches. Unused ones are left out."""
    vectors: dict[nn.Linear, int] = {}

    def count(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        vectors[layer] = vectors.get(layer, 0) + inputs[0].numel() // layer.in_features

    _run(net, batches, layers, count)
    return {layer: number for layer, number in vectors.items() if number}


def _inputs(net: nn.Module, layer: nn.Linear, batches: list[Batch], share: float = 1.0, seed: int = 0) -> Tensor:
    """Input vectors of a layer, shape [vectors, in]: a random `share` of those of each call, so that memory is bounded.

    At random because a regular choice could fall on one position of every sequence.
    """
    rows: list[Tensor] = []
    generator = torch.Generator().manual_seed(seed)

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].reshape(-1, layer.in_features)
        if share < 1:
            x = x[torch.randperm(len(x), generator=generator)[: math.ceil(share * len(x))].to(x.device)]
        rows.append(x.float().clone())  # what follows may work in place

    _run(net, batches, [layer], record)
    return torch.cat(rows) if rows else torch.empty(0, layer.in_features)


def _run(
    net: nn.Module,
    batches: list[Batch],
    layers: list[nn.Linear],
    hook: Callable[[nn.Module, tuple[Tensor, ...]], None],
) -> None:
    """Run the network on all batches, with `hook` in front of the layers."""
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        for batch in batches:
            net(*_arguments(batch))
    finally:
        for handle in handles:
            handle.remove()


def _error(path: str, layer: nn.Linear, table: TableLinear, x: Tensor) -> TableError:
    exact = layer(x.to(layer.weight.dtype)).double()
    error, signal = float((table(x).double() - exact).norm()), float(exact.norm())
    relative = error / signal if signal else math.inf if error else 0.0
    subspaces, entries, _ = table.prototypes.shape
    return TableError(
        layer=path,
        relative_error=relative,
        sqnr_db=-20 * math.log10(relative) if relative else math.inf,
        multiply_adds=layer.in_features * layer.out_features,
        look_ups=subspaces * layer.out_features,
        encoding_multiply_adds=entries * layer.in_features,
    )
