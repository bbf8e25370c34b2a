"""Weights whose levels are fitted to them, rather than laid out in advance. FITTED is the table.

Each takes a weight as rows, [rows, values], and gives it back on its levels; gradients pass straight through. What is
stored is indices and a table (`codes`), or integers and a scale.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from qat.numerics.codebook import assign, codebook_ste, fit_codebook
from qat.numerics.formats import binary, ternary
from qat.numerics.product import ProductCodebook, encode, fit_product, part_means, product_ste
from qat.numerics.rounding import straight_through
from qat.recompute import recomputing

REFITS = 100
"""Most steps of k-means in which short vectors take part; ten are many."""


class Fitted(nn.Module):
    """Base.

    Args:
        shape: [rows, values] of the weight.
        groups: rows that belong to one output channel.
        bits: of an index.
        learned: the table is a parameter of the optimizer's.
        refresh: training steps between assignments of weights to entries.
        parts: into how many parts the inputs are divided, each with a table of its own (`product`).
    """

    def __init__(self, shape: tuple[int, int], groups: int, bits: int, learned: bool, refresh: int, parts: int) -> None:
        super().__init__()
        self.groups, self.bits, self.learned, self.refresh, self.parts = groups, bits, learned, refresh, parts

    @property
    def calibrated(self) -> bool:
        """Whether the levels are known."""
        return True

    def fit(self, rows: Tensor, real: Tensor | None = None) -> None:
        """Fit the levels to a weight; where it is `real`, if zeros fill short rows (`Layout.real`)."""

    def values(self) -> Tensor:
        """The entries of the table, [tables, entries, ...]."""
        raise NotImplementedError

    def forward(self, rows: Tensor, moves: bool, real: Tensor | None = None) -> Tensor:
        """The weight on its levels; `moves`: this is a training step, and tables may learn. `real` as of `fit`."""
        raise NotImplementedError


class Mean(Fitted):
    """Signs or signs and zeros, times a mean of magnitudes: `binary` and `ternary`.

    Attributes:
        levels: the integers, ascending, at equal distances.
    """

    levels: ClassVar[tuple[int, ...]] = (-1, 0, 1)

    def integers(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(-1, 0 or 1, shape of `rows`; scale, shape [rows])."""
        raise NotImplementedError

    def forward(self, rows: Tensor, moves: bool, real: Tensor | None = None) -> Tensor:  # noqa: D102
        q, scale = self.integers(rows)
        return straight_through(rows, (q * scale.unsqueeze(1)).to(rows.dtype))


class Binary(Mean):
    """`sign(w) mean |w|`. Source: Rastegari et al. 2016, "XNOR-Net", equation 6."""

    levels = (-1, 1)

    def integers(self, rows: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return binary(rows.detach().float())


class Ternary(Mean):
    """-1, 0 or 1 times a scale. Source: Li, Liu 2016, "Ternary Weight Networks", equations 3, 5 and 6."""

    def integers(self, rows: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        return ternary(rows.detach().float())


class Table(Fitted):
    """A table of entries and an index for each value (or vector): what `codebook` and `product` have in common.

    Between refreshes indices stay, so that entries can learn; each refresh assigns every weight to its nearest entry.
    """

    entries: Tensor
    indices: Tensor
    steps: Tensor

    def register(self, entries: tuple[int, ...], indices: tuple[int, ...]) -> None:
        """Make room for both."""
        table = torch.full(entries, torch.nan, dtype=torch.float32)
        if self.learned:
            self.entries = nn.Parameter(table)
        else:
            self.register_buffer("entries", table)
        self.register_buffer("indices", torch.zeros(indices, dtype=torch.uint8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def calibrated(self) -> bool:  # noqa: D102
        return not bool(self.entries.isnan().any())

    def forward(self, rows: Tensor, moves: bool, real: Tensor | None = None) -> Tensor:  # noqa: D102
        if moves and not recomputing():
            self.steps += 1
            self._refresh(rows.detach(), real)
        # backward reads them after another call of the layer has assigned them anew
        indices = self.indices.clone() if moves and torch.is_grad_enabled() else self.indices
        return self.look_up(rows, self.entries if moves and self.learned else self.entries.detach(), indices)

    @torch.no_grad()
    def _refresh(self, rows: Tensor, real: Tensor | None) -> None:
        """Assign anew if it is time to."""
        due = self.steps % self.refresh == 0
        if torch.compiler.is_compiling():  # one graph for all steps, in which the branch is taken on the device
            now, before = lambda rows, _: self.assign(rows, real), lambda _, indices: indices.clone()
            self.indices.copy_(torch.cond(due, now, before, (rows, self.indices.clone())))
        elif bool(due):
            self.indices.copy_(self.assign(rows, real))

    def values(self) -> Tensor:  # noqa: D102
        return self.entries.detach()

    def assign(self, rows: Tensor, real: Tensor | None = None) -> Tensor:
        """Index of the nearest entry. `real` as of `fit`."""
        raise NotImplementedError

    def look_up(self, rows: Tensor, entries: Tensor, indices: Tensor) -> Tensor:
        """The entries in the places of the weights, with gradients to both."""
        raise NotImplementedError


class Codebook(Table):
    """k-means entries for each row. Source: Han et al. 2016, "Deep Compression", section 3."""

    def __init__(self, shape: tuple[int, int], *args: Any) -> None:
        super().__init__(shape, *args)
        self.register((shape[0], 2**self.bits), shape)

    @torch.no_grad()
    def fit(self, rows: Tensor, real: Tensor | None = None) -> None:  # noqa: D102
        # the linear start of the paper leaves many entries in the empty tails: 1 dB at 4 bits, 4 dB at 8
        start: Literal["linear", "k-means++"] = "linear" if self.bits < 3 else "k-means++"
        self.entries.copy_(fit_codebook(rows, 2**self.bits, start=start, real=real))
        self.indices.copy_(assign(rows, self.entries))

    def assign(self, rows: Tensor, real: Tensor | None = None) -> Tensor:  # noqa: D102
        return assign(rows, self.entries)

    def look_up(self, rows: Tensor, entries: Tensor, indices: Tensor) -> Tensor:  # noqa: D102
        return codebook_ste(rows, entries, indices)


class Product(Table):
    """Every vector of weights is one of `2 ** bits` prototypes of its part of the inputs.

    Source: Jegou, Douze, Schmid 2011, "Product Quantization for Nearest Neighbor Search", section 2; Stock et al. 2020,
    "And the Bit Goes Down", section 3.
    """

    def __init__(self, shape: tuple[int, int], *args: Any) -> None:
        super().__init__(shape, *args)
        self.register((self.parts, 2**self.bits, shape[1]), (shape[0] // self.parts, self.parts))

    def vectors(self, rows: Tensor) -> Tensor:
        """Rows [out * groups, width] -> one vector of every part side by side, [vectors, parts * width]."""
        width = rows.shape[1]
        cut = rows.reshape(-1, self.parts, self.groups // self.parts, width)
        return cut.transpose(1, 2).reshape(-1, self.parts * width)

    def rows(self, vectors: Tensor) -> Tensor:
        """Inverse of `vectors`."""
        width = vectors.shape[1] // self.parts
        cut = vectors.reshape(-1, self.groups // self.parts, self.parts, width)
        return cut.transpose(1, 2).reshape(-1, width)

    @torch.no_grad()
    def fit(self, rows: Tensor, real: Tensor | None = None) -> None:  # noqa: D102
        x, counted = self.vectors(rows), None if real is None else self.vectors(real)
        whole = slice(None) if counted is None or self.groups == self.parts else counted.all(dim=1)
        self.entries.copy_(fit_product(x[whole], self.parts, 2**self.bits).prototypes)
        self.indices.copy_(self.assign(rows, real))
        if counted is None:
            return
        for _ in range(REFITS):  # k-means goes on with the short vectors, without what fills them
            self.entries.copy_(part_means(x, counted, self.indices, self.codebook).prototypes)
            if torch.equal(indices := self.assign(rows, real), self.indices):
                break
            self.indices.copy_(indices)

    @property
    def codebook(self) -> ProductCodebook:
        """The entries."""
        return ProductCodebook(self.entries.detach())

    def assign(self, rows: Tensor, real: Tensor | None = None) -> Tensor:  # noqa: D102
        x = self.vectors(rows)
        codes = encode(x, self.codebook)
        if real is not None:  # the last vector of an output channel is short: what fills it makes no distance
            last = slice(self.groups // self.parts - 1, None, self.groups // self.parts)
            real = self.vectors(real)[last][0].reshape(self.parts, 1, -1)
            codes[last] = encode(x[last], ProductCodebook(self.entries.detach() * real))
        return codes

    def look_up(self, rows: Tensor, entries: Tensor, indices: Tensor) -> Tensor:  # noqa: D102
        return self.rows(product_ste(self.vectors(rows), entries, indices))


FITTED: dict[str, Callable[..., Fitted]] = {
    "binary": Binary,
    "ternary": Ternary,
    "codebook": Codebook,
    "product": Product,
}
