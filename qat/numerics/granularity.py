"""Views of a tensor in which every row has one scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


def rows_of(x: Tensor, group_size: int | None) -> Tensor:
    """View a weight as rows that share a scale: output channels, or groups of inputs of an output channel.

    Args:
        x: shape [out, ...].
        group_size: None for one row an output channel; else the number of consecutive inputs (of the flattened rest)
            in a row. A last group that is shorter is filled with zeros, which every grid holds exactly.

    Returns:
        shape [out, inputs], or [out * groups, group_size].

    >>> rows_of(torch.ones(2, 5), 4).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    """
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    if group_size is None:
        return flat
    return pad(flat, (0, -flat.shape[1] % group_size)).reshape(-1, group_size)


def from_rows(rows: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Inverse of `rows_of`: back to a weight of shape `shape`, padding dropped."""
    flat = rows.reshape(shape[0], -1) if rows.numel() else rows.reshape(shape[0], 0)
    return flat[:, : math.prod(shape[1:])].reshape(shape)


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight with output channels first, as a convolution's has them; its own inverse.

    Output channel `g * (out / groups) + j` of the layer is column `j` of the rows of group `g`.

    Args:
        weight: shape [in, out / groups, *kernel], or [out, in / groups, *kernel].
        groups: of the convolution.

    Returns:
        shape [out, in / groups, *kernel], or [in, out / groups, *kernel].

    >>> swap_channels(torch.tensor([[1, 2], [3, 4]]), 1).tolist(), swap_channels(torch.tensor([[1, 2], [3, 4]]), 2).tolist()
    ([[1, 3], [2, 4]], [[1], [2], [3], [4]])
    """  # noqa: E501
    rows, columns, *kernel = weight.shape
    grouped = weight.reshape(groups, rows // groups, columns, *kernel)
    return grouped.transpose(1, 2).reshape(groups * columns, rows // groups, *kernel)


def in_order_of(x: Tensor, y: Tensor) -> Tensor:
    """`y` in the memory format of `x`, where that is channels last: going through rows loses it."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if order is None or x.is_contiguous() or not x.is_contiguous(memory_format=order):
        return y
    return y.contiguous(memory_format=order)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor is cut into rows that share a scale.

    | kind    | weight [out, in, *kernel]                          | activation                                     | scale      |
    |---------|----------------------------------------------------|------------------------------------------------|------------|
    | tensor  | all                                                | all                                            | []         |
    | channel | one index along `axis`                             | one index along `axis`                         | [channels] |
    | group   | `group_size` consecutive inputs of an output channel | `group_size` consecutive entries along `axis`  | [n, groups] |
    | block   | `block_size` rows by columns of the matrix [out, inputs] | -                                        | [r, c]     |
    | token   | -                                                  | the last dimension; of images, the whole sample | [n]        |

    Attributes:
        kind: a row of the table.
        weight: which column.
        axis: the channel axis; for groups of activations, the axis that groups lie along.
        group_size: with `group`.
        block_size: with `block`; -1 takes all rows or columns.
    """  # noqa: E501

    kind: str = "tensor"
    weight: bool = True
    axis: int = 0
    group_size: int | None = None
    block_size: tuple[int, int] | None = None

    def rows(self, x: Tensor) -> Tensor:
        """`x` with one row a scale, shape [rows, values]; short groups and blocks are filled with zeros."""
        if self.kind == "channel":
            x = x.movedim(self.axis, 0)
            return x.reshape(x.shape[0], math.prod(x.shape[1:]))
        if self.kind == "group":
            return rows_of(x if self.weight else self._along_axis(x), self._group())
        if self.kind == "block":
            matrix = rows_of(x, None)
            r, c = self._block(matrix.shape)
            matrix = pad(matrix, (0, -matrix.shape[1] % c, 0, -matrix.shape[0] % r))
            grid = matrix.reshape(matrix.shape[0] // r, r, matrix.shape[1] // c, c)
            return grid.transpose(1, 2).reshape(-1, r * c)
        if self.kind == "token":
            return x.reshape(x.shape[0], math.prod(x.shape[1:])) if x.dim() >= 4 else x.reshape(-1, x.shape[-1])
        return x.reshape(1, x.numel())

    def real(self, x: Tensor) -> Tensor | None:
        """Where `rows(x)` holds values of `x`, bool; None where it holds nothing else.

        Zeros that fill a row are no values: whoever counts, sorts or averages a row has to leave them out.

        >>> Layout(kind="group", group_size=2).real(torch.ones(1, 3)).tolist()
        [[True, True], [True, False]]
        """
        values = math.prod(x.shape)
        if self.kind == "group":
            across = x.shape[self.axis] if not self.weight else values // max(x.shape[0], 1)
            filled = across % self._group() > 0
        elif self.kind == "block":
            matrix = x.shape[0], math.prod(x.shape[1:])
            filled = any(n % size for n, size in zip(matrix, self._block(matrix), strict=True))
        else:
            filled = False
        return self.rows(torch.ones(x.shape, dtype=torch.bool, device=x.device)) if filled else None

    def restore(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `rows`: values in the shape `shape`, padding dropped."""
        if self.kind == "channel":
            moved = [shape[self.axis], *(n for i, n in enumerate(shape) if i != self.axis % len(shape))]
            return rows.reshape(moved).movedim(0, self.axis)
        if self.kind == "group" and self.weight:
            return from_rows(rows, shape)
        if self.kind == "group":
            moved = [*(n for i, n in enumerate(shape) if i != self.axis % len(shape)), shape[self.axis]]
            flat = from_rows(rows, (math.prod(moved[:-1]), moved[-1]))
            return flat.reshape(moved).movedim(-1, self.axis)
        if self.kind == "block":
            out, inputs = shape[0], math.prod(shape[1:])
            r, c = self._block((out, inputs))
            grid = rows.reshape(-(-out // r), -(-inputs // c), r, c).transpose(1, 2)
            return grid.reshape(-(-out // r) * r, -(-inputs // c) * c)[:out, :inputs].reshape(shape)
        return rows.reshape(shape)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the scale of a tensor of shape `shape`."""
        if self.kind == "channel":
            return (shape[self.axis],)
        if self.kind == "group" and self.weight:
            return (shape[0], -(-math.prod(shape[1:]) // self._group()))
        if self.kind == "group":
            return (math.prod(shape) // max(shape[self.axis], 1), -(-shape[self.axis] // self._group()))
        if self.kind == "block":
            out, inputs = shape[0], math.prod(shape[1:])
            r, c = self._block((out, inputs))
            return (-(-out // r), -(-inputs // c))
        if self.kind == "token":
            return (shape[0],) if len(shape) >= 4 else (math.prod(shape[:-1]),)
        return ()

    def places(self, indices: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Where some rows of a weight's matrix lie in what `rows` makes of it.

        Args:
            indices: of rows of the matrix, shape [n], int64.
            shape: of the matrix, [out, inputs].

        Returns:
            Row and column of each of their values, shapes that broadcast to [n, inputs].

        >>> Layout(kind="group", group_size=2).places(torch.tensor([1]), (2, 3))
        (tensor([[2, 2, 3]]), tensor([[0, 1, 0]]))
        """
        r, c = indices.reshape(-1, 1), torch.arange(shape[1], device=indices.device).unsqueeze(0)
        if self.kind == "channel":
            return (r, c) if self.axis % 2 == 0 else (c, r)
        if self.kind == "group":
            size = self._group()
            return r * -(-shape[1] // size) + c // size, c % size
        if self.kind == "block":
            rows, columns = self._block(shape)
            return r // rows * -(-shape[1] // columns) + c // columns, r % rows * columns + c % columns
        return torch.zeros_like(r), r * shape[1] + c

    def broadcast(self, scale: Tensor, x: Tensor) -> Tensor:
        """A scale of `scale_shape` against `x` itself, where it broadcasts (`tensor`, `channel`), else against rows."""
        if self.kind == "tensor":
            return scale.reshape(())
        if self.kind == "channel":
            return scale.reshape([-1 if i == self.axis % x.dim() else 1 for i in range(x.dim())])
        return scale.reshape(-1, 1)

    @property
    def by_rows(self) -> bool:
        """Whether scales broadcast against `rows(x)` only."""
        return self.kind not in ("tensor", "channel")

    def _along_axis(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def _group(self) -> int:
        assert self.group_size is not None
        return self.group_size

    def _block(self, matrix: Sequence[int]) -> tuple[int, int]:
        assert self.block_size is not None
        r, c = (n if size == -1 else size for size, n in zip(self.block_size, matrix, strict=True))
        return max(min(r, matrix[0]), 1), max(min(c, matrix[1]), 1)
