"""Recurrent networks as equations, one step at a time. What trains and what runs share them, to the last bit.

A difference of one rounding would not stay one: it goes round the loop, and after a hundred steps two networks that
agree in every step are apart. So the same function makes a step of the fake-quantized layer and of the integer one;
they differ in a `Cell`, which multiplies by its weights and puts values on its grids.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]
"""Hidden state, and of an LSTM the cell state: [batch, features] each; real numbers on their grids."""


class Cell(Protocol):
    """The weights and grids of one layer in one direction."""

    def read(self, x: Tensor) -> Tensor:
        """`W_ih x + b_ih` for all steps at once, [rows, inputs] -> [rows, gates]."""

    def recall(self, h: Tensor) -> Tensor:
        """`W_hh h + b_hh`, [batch, hidden] -> [batch, gates]."""

    def project(self, h: Tensor) -> Tensor:
        """`W_hr h` where there is such a weight, else `h`."""

    def place(self, name: str, value: Tensor) -> Tensor:
        """The value on the grid of that name: a key of `GRIDS`."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a recurrent network is made of.

    Attributes:
        kind: key of STEPS.
        layers, directions: how many; each layer has a cell for each direction.
        batch_first: whether inputs are [batch, steps, features].
        sizes: features of the hidden state, and of an LSTM those of the cell state.
    """

    kind: str
    layers: int = 1
    directions: int = 1
    batch_first: bool = False
    sizes: tuple[int, ...] = (0,)


def _lstm(read: Tensor, recalled: Tensor, state: State, cell: Cell) -> State:
    # rows of the weights: input gate, forget gate, candidate, output gate
    i, f, g, o = (read + recalled).chunk(4, dim=1)
    i, f, o = cell.place("gates", torch.sigmoid(torch.cat([i, f, o], dim=1))).chunk(3, dim=1)
    c = cell.place("cell", f * state[1] + i * cell.place("candidate", torch.tanh(g)))
    h = o * cell.place("activated", torch.tanh(c))
    return cell.place("hidden", cell.project(h)), c


def _gru(read: Tensor, recalled: Tensor, state: State, cell: Cell) -> State:
    # rows of the weights: reset gate, update gate, candidate; the reset gate acts behind W_hn
    size = state[0].shape[1]
    r, z = cell.place("gates", torch.sigmoid(read[:, : 2 * size] + recalled[:, : 2 * size])).chunk(2, dim=1)
    n = cell.place("candidate", torch.tanh(read[:, 2 * size :] + r * recalled[:, 2 * size :]))
    return (cell.place("hidden", (1 - z) * n + z * state[0]),)


def _tanh(read: Tensor, recalled: Tensor, state: State, cell: Cell) -> State:
    return (cell.place("hidden", torch.tanh(read + recalled)),)


def _relu(read: Tensor, recalled: Tensor, state: State, cell: Cell) -> State:
    return (cell.place("hidden", torch.relu(read + recalled)),)


STEPS: dict[str, Callable[[Tensor, Tensor, State, Cell], State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
}
"""Kind (torch's name) -> one step: what was read, what was recalled, the last state and the cell -> the next state."""

GRIDS: dict[str, tuple[str, ...]] = {
    "LSTM": ("gates", "candidate", "cell", "activated", "hidden"),
    "GRU": ("gates", "candidate", "hidden"),
    "RNN_TANH": ("hidden",),
    "RNN_RELU": ("hidden",),
}
"""Kind -> what its cells put on grids; one with a projection also `unprojected`, what W_hr multiplies.

`gates` are those with a sigmoid, which have one range; `activated` is tanh of the cell state.
"""

STATES: dict[str, tuple[str, ...]] = {
    "LSTM": ("hidden", "cell"),
    "GRU": ("hidden",),
    "RNN_TANH": ("hidden",),
    "RNN_RELU": ("hidden",),
}
"""Kind -> the grids of its states."""


def repacked(packed: PackedSequence, data: Tensor) -> PackedSequence:
    """Sequences of the same lengths that hold other values: torch.compile makes nothing of `_replace`."""
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def recur(
    form: Form,
    cells: Sequence[Cell],
    x: Tensor | PackedSequence,
    initial: State = (),
    between: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor | PackedSequence, State]:
    """Run over a batch of sequences. Steps behind the end of a packed sequence are not computed, so nothing sees them.

    Args:
        form: what the network is made of.
        cells: of the first layer forward, backward, of the second forward, and so on.
        x: [steps, batch, inputs] ([batch, steps, inputs] with `batch_first`), [steps, inputs], or packed.
        initial: [cells, batch, features] ([cells, features] for one sequence) for each state; none are zeros.
        between: what is done to the output of a layer before the next one reads it (dropout).

    Returns:
        The last layer's hidden states, directions side by side, in the form of `x`; and each state after its last step,
        [cells, batch, features], in the order of `x`'s sequences.
    """
    packed = x if isinstance(x, PackedSequence) else None
    alone = not isinstance(x, PackedSequence) and x.dim() == 2
    if isinstance(x, PackedSequence):
        data, sizes = x.data, x.batch_sizes.tolist()
        if x.sorted_indices is not None:
            initial = tuple(state.index_select(1, x.sorted_indices) for state in initial)
    else:
        steps = x.unsqueeze(1) if alone else x.transpose(0, 1) if form.batch_first else x
        data, sizes = steps.flatten(0, 1), [steps.shape[1]] * steps.shape[0]
        initial = tuple(state.unsqueeze(1) for state in initial) if alone else initial
    batch = sizes[0]
    ends: list[State] = []
    for layer in range(form.layers):
        outputs = []
        for direction in range(form.directions):
            i = layer * form.directions + direction
            cell = cells[i]
            start = tuple(cell.place(name, s[i]) for name, s in zip(STATES[form.kind], initial, strict=False))
            read = cell.read(data)
            start = start or tuple(read.new_zeros(batch, size) for size in form.sizes)
            made, end = _run(form.kind, cell, read, sizes, start, backward=direction == 1)
            outputs.append(made)
            ends.append(end)
        data = torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]
        if between is not None and layer < form.layers - 1:
            data = between(data)
    last = tuple(torch.stack(states) for states in zip(*ends, strict=True))
    if packed is not None:
        if packed.unsorted_indices is not None:
            last = tuple(state.index_select(1, packed.unsorted_indices) for state in last)
        return repacked(packed, data), last
    output = data.unflatten(0, (len(sizes), batch))
    if alone:
        return output.squeeze(1), tuple(state.squeeze(1) for state in last)
    return output.transpose(0, 1) if form.batch_first else output, last


def _run(
    kind: str, cell: Cell, read: Tensor, sizes: list[int], state: State, backward: bool
) -> tuple[Tensor, State]:  # fmt: skip
    """All steps of one cell. Sequences are sorted by length, so the first `sizes[t]` are those that have a step `t`."""
    inputs = read.split(sizes)
    outputs: dict[int, Tensor] = {}
    for t in reversed(range(len(sizes))) if backward else range(len(sizes)):
        active = tuple(s[: sizes[t]] for s in state)
        new = STEPS[kind](inputs[t], cell.recall(active[0]), active, cell)
        outputs[t] = new[0]
        whole = sizes[t] == state[0].shape[0]  # not its len(), which fixes a batch that torch.export keeps open
        state = new if whole else tuple(torch.cat([n, s[sizes[t] :]]) for n, s in zip(new, state, strict=True))
    return torch.cat([outputs[t] for t in range(len(sizes))]), state
