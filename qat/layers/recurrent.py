"""LSTM, GRU and RNN: stacked, bidirectional, projected; and single cells.

Each weight has its quantizer (a channel is a row: one unit of one gate), and so has what a cell computes: gates,
candidate, cell state, hidden state (`qat.cells.GRIDS`). The hidden state is the layer's output, so that is on a grid
already when something else reads it. Both directions of a layer share the grid of their hidden states: side by side
they are one tensor, which the next layer multiplies as integers of one scale. Other grids are each direction's own, and
each layer's, so that a range fits what it is for.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from qat.cells import GRIDS, STATES, STEPS, Form, State, recur, repacked
from qat.fake_quant import FakeQuantize
from qat.layers.base import Quantized, Weight, check_fits
from qat.layers.exact import EXACT_FLOAT32, simulates
from qat.mode import Mode
from qat.numerics.rounding import straight_through
from qat.recompute import recomputing
from qat.scheme import Granularity, TensorScheme

KINDS: dict[type[nn.Module], str] = {nn.LSTMCell: "LSTM", nn.GRUCell: "GRU"}
"""Types whose kind does not depend on their settings."""


class QuantizedRecurrent(Quantized):
    """Mixin of LSTM, GRU, RNN and their cells.

    Attributes:
        sources: the quantizers whose grid the input may lie on, set by `qat.prepare`. Not submodules: they are others'.
        used: scale and zero point that the last forward computed with, of the quantizers whose range it moved.
    """

    biased = False
    sources: tuple[FakeQuantize, ...] = ()
    used: Mapping[FakeQuantize, tuple[Tensor, Tensor]] = MappingProxyType({})

    @property
    def form(self) -> Form:
        """What the layer is made of."""
        layer: Any = self
        hidden = getattr(self, "proj_size", 0) or layer.hidden_size
        return Form(
            kind=kind_of(self),
            layers=getattr(self, "num_layers", 1),
            directions=2 if getattr(self, "bidirectional", False) else 1,
            batch_first=getattr(self, "batch_first", False),
            sizes=(hidden, layer.hidden_size)[: len(STATES[kind_of(self)])],
        )

    def suffix(self, cell: int) -> str:
        """What the names of a cell's parameters end with: of the layers forward and backward in turn."""
        if isinstance(self, nn.RNNCellBase):
            return ""
        layer, direction = divmod(cell, self.form.directions)
        return f"_l{layer}" + ("_reverse" if direction else "")

    def quantizer(self, name: str, cell: int) -> FakeQuantize | None:
        """The quantizer of what a cell computes (a key of GRIDS); None where activations stay float."""
        if name == "hidden":
            cell -= cell % self.form.directions  # both directions share one
        return self._modules.get(f"{name}{self.suffix(cell)}_quantizer")  # type: ignore[return-value]

    def activation_quantizers(self) -> Iterator[FakeQuantize]:
        """The quantizers of what the layer computes inside."""
        own = {weight.weight_quantizer for weight in self.weights()}
        return (m for m in self._modules.values() if isinstance(m, FakeQuantize) and m not in own)

    def _add_quantizers(self, scheme: TensorScheme, name: str, activation: TensorScheme | None) -> None:
        form = self.form
        for cell in range(form.layers * form.directions):
            for key in self.weight_names(cell):
                weight = getattr(self, key)
                check_fits(scheme, weight, f"layer '{name}' ({key} {list(weight.shape)})")
                self._add(key, FakeQuantize(scheme, weight.shape), name)
        if activation is None or not activation.quantized:
            return
        if activation.granularity in (Granularity.channel, Granularity.group):
            activation = dataclasses.replace(activation, axis=-1)  # a step is [batch, features], whatever the input is
        names = GRIDS[form.kind] + (("unprojected",) if getattr(self, "proj_size", 0) else ())
        for cell in range(form.layers * form.directions):
            for key in names:
                if key == "hidden" and cell % form.directions:
                    continue
                size = form.sizes[0] if key == "hidden" else form.sizes[-1]
                size = size * len("ifo" if form.kind == "LSTM" else "rz") if key == "gates" else size
                quantizer = FakeQuantize(
                    activation,
                    nonnegative=key == "gates" or (key == "hidden" and form.kind == "RNN_RELU"),
                    sites=form.directions if key == "hidden" else 1,
                    activation=(1, size),
                )
                self._add(key + self.suffix(cell), quantizer, name)

    def quantize_input(self, scheme: TensorScheme, example: Tensor, name: str, sites: int = 1) -> None:  # noqa: D102
        super().quantize_input(scheme, example, name, sites)
        self.sources = (self.input_quantizer,)

    def _add(self, key: str, quantizer: FakeQuantize, name: str) -> None:
        quantizer.name = f"{name}.{key}"
        self.add_module(f"{key}_quantizer", quantizer)

    def weight_names(self, cell: int) -> list[str]:
        """Names of its weights: W_ih, W_hh, and W_hr where there is a projection."""
        keys = ["weight_ih", "weight_hh", *(["weight_hr"] if getattr(self, "proj_size", 0) else [])]
        return [key + self.suffix(cell) for key in keys]

    def weights_of_cell(self, cell: int) -> list[Weight]:
        """W_ih, W_hh, and W_hr where there is a projection."""
        return [
            Weight(key, getattr(self, key), getattr(self, f"{key}_quantizer"),
                   getattr(self, key.replace("weight", "bias"), None) if "_hr" not in key else None)
            for key in self.weight_names(cell)
        ]  # fmt: skip

    def weights(self) -> Iterator[Weight]:  # noqa: D102
        for cell in range(self.form.layers * self.form.directions):
            yield from self.weights_of_cell(cell)

    def inputs_of_cell(self, cell: int) -> list[Sequence[FakeQuantize | None]]:
        """The quantizers whose grids the cell's weights (in the order of `weights_of_cell`) multiply."""
        layer = cell // self.form.directions
        below = (self.quantizer("hidden", (layer - 1) * self.form.directions),) if layer else self.sources
        return [below, (self.quantizer("hidden", cell),), (self.quantizer("unprojected", cell),)]

    def grid(self, path: Sequence[int]) -> FakeQuantize | None:
        """The quantizer on whose grid a part of the result lies: `result[path[0]][path[1]]`...; None if on no one grid.

        States of several layers are one tensor with several grids; the part that one cell made has one.
        """
        states, cells = STATES[self.form.kind], self.form.layers * self.form.directions
        if isinstance(self, nn.GRUCell | nn.RNNCell):
            return self.quantizer("hidden", 0)
        if not path:
            return None
        if isinstance(self, nn.LSTMCell):
            return self.quantizer(states[path[0]], 0)
        if path[0] == 0:
            return self.quantizer("hidden", cells - 1)
        rest = path[1:] if len(states) > 1 else (0, *path[1:])
        if not rest:
            return None
        name, cell = states[rest[0]], rest[1:2]
        if cell:
            return self.quantizer(name, cell[0] % cells)
        return self.quantizer(name, 0) if (self.form.layers if name == "hidden" else cells) == 1 else None

    @contextmanager
    def _ranges_used(self) -> Iterator[None]:
        """Inside, ranges are those of the last forward, which moved them at its end: to repeat it."""
        now = {quantizer.range: (quantizer.scale, quantizer.zero_point) for quantizer in self.used}
        for quantizer, (scale, zero_point) in self.used.items():
            quantizer.range.scale, quantizer.range.zero_point = scale, zero_point
        try:
            yield
        finally:
            for moved, (scale, zero_point) in now.items():
                moved.scale, moved.zero_point = scale, zero_point

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As of torch's layer; what activation checkpointing repeats, with the ranges of the first time."""
        if torch.compiler.is_compiling() and isinstance(input, PackedSequence):
            return _in_python(self, input, hx)
        if recomputing():
            with self._ranges_used():
                return self._compute(input, hx)
        if not torch.compiler.is_compiling():
            self.used = {}
        return self._compute(input, hx)

    def _compute(self, input: Any, hx: Any) -> Any:
        raise NotImplementedError

    def _cells(self) -> list["_Cell"]:
        return [_Cell(self, cell) for cell in range(self.form.layers * self.form.directions)]


@torch.compiler.disable(reason="how many sequences are left at each step is known to Python only")
def _in_python(layer: QuantizedRecurrent, input: PackedSequence, hx: Any) -> Any:
    return layer.forward(input, hx)


class _Cell:
    """The weights of a cell, quantized once a pass, and its grids (`qat.cells.Cell`)."""

    def __init__(self, layer: QuantizedRecurrent, cell: int) -> None:
        self.layer, self.cell = layer, cell
        self.site = cell % layer.form.directions
        self.seen: dict[FakeQuantize, list[Tensor]] = {}
        self.products = [
            _Product(weight, sources, layer.training)
            for weight, sources in zip(layer.weights_of_cell(cell), layer.inputs_of_cell(cell), strict=False)
        ]

    def read(self, x: Tensor) -> Tensor:
        return self.products[0](x)

    def recall(self, h: Tensor) -> Tensor:
        return self.products[1](h)

    def project(self, h: Tensor) -> Tensor:
        return self.products[2](self.place("unprojected", h)) if len(self.products) > 2 else h

    def place(self, name: str, value: Tensor) -> Tensor:
        quantizer = self.layer.quantizer(name, self.cell)
        if quantizer is None:
            return value
        if quantizer.mode is Mode.observe or quantizer.follows:
            self.seen.setdefault(quantizer, []).append(value.detach())
        result: Tensor = quantizer(value, looks=False)
        return result

    def observe(self) -> None:
        """Let quantizers see a whole sequence as one tensor: a moving average would be of steps, not of batches."""
        hidden = self.layer.quantizer("hidden", self.cell)
        for quantizer, values in self.seen.items():
            quantizer.observe(torch.cat(values), self.site if quantizer is hidden else 0)
            if quantizer.follows:
                if not torch.compiler.is_compiling() and quantizer not in self.layer.used:
                    was = quantizer.scale.clone(), quantizer.zero_point.clone()
                    self.layer.used = {**self.layer.used, quantizer: was}
                quantizer.set_range_from_observer()


class _Product:
    """`W x + b` by a quantized weight; evaluated on a grid of integers, the sum is exact, as in the integer network.

    In the float sum of a float32 product the last bits are arbitrary. Behind a convolution that moves one value in
    thousands by a step; in a loop each such value moves the next ones.
    """

    def __init__(self, weight: Weight, sources: Sequence[FakeQuantize | None], training: bool) -> None:
        quantizer = weight.weight_quantizer
        self.bias, self.weight = weight.bias, quantizer(weight.tensor)
        known = not training and quantizer.integer and simulates(quantizer)
        self.sources = [s for s in sources if known and s is not None and s.integer and simulates(s)]
        if self.sources:
            with torch.no_grad():
                self.scale = quantizer.scales(weight.tensor).float().reshape(-1, 1).expand(len(weight.tensor), 1)
                self.integers = torch.round(self.weight / self.scale)
                self.largest = float(self.integers.abs().sum(dim=1).max()) if self.integers.numel() else 0.0

    def __call__(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            exact = self._exact(x.detach())
        differentiable = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if exact is not None and not differentiable:
            return exact
        y = F.linear(x, self.weight, self.bias)
        return y if exact is None else straight_through(y, exact)

    def _exact(self, x: Tensor) -> Tensor | None:
        """The sum in integers, bias included, times its scale; None if `x` lies on no known grid."""
        for source in self.sources:
            scale = source.qparams()[0].detach()
            centred = torch.round(x.float() / scale)
            if not torch.equal(centred * scale, x):
                continue
            bound = self.largest * (source.quant_max - source.quant_min)
            dtype = torch.float32 if bound < EXACT_FLOAT32 else torch.float64
            total = F.linear(centred.to(dtype), self.integers.to(dtype)).double()
            if self.bias is not None:
                total += torch.round(self.bias.double() / (self.scale[:, 0].double() * scale.double()))
            return total.float() * (scale * self.scale[:, 0])
        return None


def kind_of(layer: nn.Module) -> str:
    """Key of STEPS for a recurrent layer or cell, quantized or float."""
    for kind, name in KINDS.items():
        if isinstance(layer, kind):
            return name
    if isinstance(layer, nn.RNNCell):
        return f"RNN_{layer.nonlinearity.upper()}"
    mode = str(layer.mode)
    assert mode in STEPS
    return mode


class _Sequences(QuantizedRecurrent):
    """LSTM, GRU, RNN."""

    def _compute(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Tensor | PackedSequence, Any]:
        layer: Any = self
        pair = len(STATES[self.form.kind]) > 1
        initial: State = () if hx is None else tuple(hx) if pair else (hx,)
        _check(layer, input, initial)
        cells = self._cells()
        output, last = recur(self.form, cells, self._read(input), initial, self._between)
        for cell in cells:
            cell.observe()
        return output, last if pair else last[0]

    def _read(self, input: Tensor | PackedSequence) -> Tensor | PackedSequence:
        return repacked(input, self.read(input.data)) if isinstance(input, PackedSequence) else self.read(input)

    def _between(self, x: Tensor) -> Tensor:
        return F.dropout(x, float(self.dropout), self.training)  # type: ignore[arg-type]


def _check(layer: Any, x: Tensor | PackedSequence, initial: State) -> None:
    """What torch checks, with its messages."""
    packed = isinstance(x, PackedSequence)
    data, sizes = (x.data, x.batch_sizes) if isinstance(x, PackedSequence) else (x, None)
    if not packed and data.dim() not in (2, 3):
        raise ValueError(f"{type(layer).__name__}: expected an input of 2 or 3 dimensions, got {data.dim()}")
    if not packed and data.dim() == 2:
        data = data.unsqueeze(0 if layer.batch_first else 1)
        initial = tuple(state.unsqueeze(1) for state in initial)
    layer.check_input(data, sizes)
    if initial:
        batch = int(sizes[0]) if sizes is not None else data.shape[0 if layer.batch_first else 1]
        cells = layer.num_layers * layer.form.directions
        for state, size in zip(initial, layer.form.sizes, strict=True):
            layer.check_hidden_size(state, (cells, batch, size))


class _OneStep(QuantizedRecurrent):
    """LSTMCell, GRUCell, RNNCell."""

    def _compute(self, input: Tensor, hx: Any) -> Any:
        pair = len(STATES[self.form.kind]) > 1
        initial: State = () if hx is None else tuple(hx) if pair else (hx,)
        alone = input.dim() == 1
        steps = self.read(input).reshape(1, -1, input.shape[-1])
        initial = tuple(state.reshape(1, -1, state.shape[-1]) for state in initial)
        cells = self._cells()
        _, last = recur(self.form, cells, steps, initial)
        cells[0].observe()
        last = tuple(state[0, 0] if alone else state[0] for state in last)
        return last if pair else last[0]


class QuantLSTM(_Sequences, nn.LSTM):
    """`nn.LSTM` with fake-quantized weights, gates, cell and hidden state."""


class QuantGRU(_Sequences, nn.GRU):
    """`nn.GRU` with fake-quantized weights, gates and hidden state."""


class QuantRNN(_Sequences, nn.RNN):
    """`nn.RNN` with fake-quantized weights and hidden state."""


class QuantLSTMCell(_OneStep, nn.LSTMCell):
    """`nn.LSTMCell` with fake-quantized weights, gates, cell and hidden state."""


class QuantGRUCell(_OneStep, nn.GRUCell):
    """`nn.GRUCell` with fake-quantized weights, gates and hidden state."""


class QuantRNNCell(_OneStep, nn.RNNCell):
    """`nn.RNNCell` with fake-quantized weights and hidden state."""
