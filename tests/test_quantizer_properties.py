"""What every quantizer promises, whatever its scheme: properties over hypothesis-drawn tensors, and edge values."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qat
from qat.encoding import encode
from qat.fake_quant import FakeQuantize
from qat.fitted import Mean, Table
from qat.mode import Mode
from qat.modes import watch
from qat.numerics.formats import FORMATS
from qat.scheme import TensorScheme, check_scheme, override

CHANNEL = {"granularity": "channel", "range": "dynamic"}
BLOCKS = {name: {"granularity": "group", "group_size": kind.block} for name, kind in FORMATS.items() if kind.block}
WEIGHTS: dict[str, dict[str, Any]] = {
    **{f"int{b}": {"bits": b, **CHANNEL} for b in (2, 3, 4, 8, 12, 16)},
    **{f"narrow int{b}": {"bits": b, "narrow_range": True, **CHANNEL} for b in (2, 4, 8)},
    **{f"affine int{b}": {"bits": b, "symmetric": False, **CHANNEL} for b in (1, 2, 4, 8)},
    **{
        name: {"format": name, "bits": kind.bits[-1] if name != "tf32" else 19, "range": "dynamic",
               "allow_padding": True, **BLOCKS.get(name, {"granularity": "channel"})}
        for name, kind in FORMATS.items() if kind.grid and not kind.fitted and name not in ("int", "pow2", "apot")
    },
    **{f"{name}{b}": {"format": name, "bits": b, **CHANNEL} for name in ("pow2", "apot") for b in (2, 4, 6)},
    "binary": {"format": "binary", "bits": 1, **CHANNEL},
    "ternary": {"format": "ternary", "bits": 2, **CHANNEL},
    "codebook3": {"format": "codebook", "bits": 3, "range": "learned"},
    "product4": {"format": "product", "bits": 4, "range": "learned", "granularity": "group", "group_size": 3,
                 "allow_padding": True},
    "blocks": {"bits": 4, "granularity": "block", "block_size": [2, 3], "range": "dynamic"},
    "axis 1": {"bits": 4, "granularity": "channel", "axis": 1, "range": "dynamic"},
    "groups": {"bits": 4, "granularity": "group", "group_size": 4, "allow_padding": True, "range": "dynamic"},
    "learned": {"bits": 4, "granularity": "channel", "range": "lsq"},
    "lsq_plus": {"bits": 4, "symmetric": False, "range": "lsq_plus"},
    "tqt": {"bits": 4, "range": "tqt"},
    "dorefa3": {"bits": 3, "range": "dorefa"},
    "adaptive": {"bits": 4, "rounding": "adaptive", "range": "fixed"},
}  # fmt: skip
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8}, "affine int4": {"bits": 4, "symmetric": False}, "int16": {"bits": 16},
    "narrow int8": {"bits": 8, "narrow_range": True}, "unsigned int4": {"bits": 4, "signed": False},
    "affine int1": {"bits": 1, "symmetric": False},
    "affine signed int2": {"bits": 2, "symmetric": False, "signed": True},
    "dynamic": {"bits": 8, "range": "dynamic"},
    "token": {"bits": 8, "range": "dynamic", "granularity": "token"},
    "groups": {"bits": 4, "range": "dynamic", "granularity": "group", "group_size": 2, "allow_padding": True},
    "channel": {"bits": 4, "granularity": "channel"},
    "running": {"bits": 8, "range": "running", "observer": "ema"},
    "learned": {"bits": 4, "range": "lsq"}, "lsq_plus": {"bits": 4, "range": "lsq_plus", "symmetric": False},
    "pact": {"bits": 4, "range": "pact"}, "tqt": {"bits": 4, "range": "tqt"}, "dorefa": {"bits": 4, "range": "dorefa"},
    "e4m3fn": {"bits": 8, "format": "e4m3fn"}, "learned e4m3fn": {"bits": 8, "format": "e4m3fn", "range": "lsq"},
    "bf16": {"bits": 16, "format": "bf16"},
    "mxfp4": {"bits": 4, "format": "mxfp4", "granularity": "group", "group_size": 32, "range": "dynamic",
              "allow_padding": True},
    "apot": {"bits": 4, "format": "apot"}, "pow2": {"bits": 4, "format": "pow2", "signed": False},
}  # fmt: skip

VECTORS = "its entries are vectors, so that a value's result depends on its neighbours"
EXCEPTIONS: dict[str, dict[str, str]] = {
    "zero": {
        "binary": "its levels are -1 and 1",
        "dorefa3": "its levels are odd numbers",
        "codebook3": "entries lie where the weights are",
        "product4": "entries lie where the weights are",
    },
    "idempotent": {
        "dorefa3": "tanh squashes once more what it gives",
        "adaptive": "whether a weight goes up or down was decided for what it was",
    },
    "monotone": {"product4": VECTORS},
    "nearest": {
        "product4": VECTORS,
        "dorefa3": "values are squashed before they are rounded",
        "ternary": "its threshold is 0.7 of the mean magnitude, not half a step",
        "tf32": "has too many levels to list; test_formats compares them with ml_dtypes",
    },
    "levels": {"product4": VECTORS},
    "odd": {
        "binary": "0 becomes 1",
        "dorefa3": "0 becomes 1",
        "codebook3": "entries lie where the weights are",
        "product4": VECTORS,
        "adaptive": "whether a weight goes up or down was decided for what it was",
    },
}
"""Promise -> the schemes that do not make it, and why. All others do, with the scales and tables that they have."""


def scheme(data: dict[str, Any], role: str) -> TensorScheme:
    result = override(TensorScheme(), data, "")
    check_scheme(result, f"quant.{role}", role)
    return result


def of_weight(name: str, x: Tensor) -> FakeQuantize:
    quantizer = FakeQuantize(scheme(WEIGHTS[name], "weight"), x.shape)
    quantizer.set_range_from(x)
    quantizer.mode = Mode.frozen
    return quantizer


def of_activation(name: str, x: Tensor, relu: bool = False) -> FakeQuantize:
    quantizer = FakeQuantize(scheme(ACTIVATIONS[name], "activation"), activation=x.shape, relu=relu)
    quantizer.observe(x)
    if not quantizer.calibrated or quantizer.range.follows:
        quantizer.set_range_from_observer()
    quantizer.mode = Mode.frozen
    return quantizer


FLOATS = (
    st.floats(-100, 100, width=32)
    | st.floats(-(2.0**-10), 2.0**-10, width=32)
    | st.sampled_from([0.0, -0.0, 1.0, -1.0])
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any float type, dense or with gaps, in any order of memory."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=6))
    x = torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=FLOATS)))
    x = x.to(draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16])))
    order = draw(st.sampled_from(["contiguous", "transposed", "sliced", "channels_last"]))
    if order == "sliced":
        return torch.stack([x, -x], dim=-1)[..., 0]
    if order == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.transpose(0, -1).contiguous().transpose(0, -1) if order == "transposed" else x


def pinned(quantizer: FakeQuantize, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The quantizer with the scales that it has for `x`; tables stay, and each value takes its nearest entry."""
    if isinstance(quantizer.fitted, Table):

        def look_up(y: Tensor) -> Tensor:
            table = copy.deepcopy(quantizer)
            table.fitted.indices.copy_(table.fitted.assign(table.rows(y), table.layout.real(y)))
            return table(y).detach()

        return look_up
    if not quantizer.dynamic or quantizer.fitted is not None:
        return quantizer
    fixed = dataclasses.replace(quantizer.scheme, range="fixed", observer="minmax")
    result = FakeQuantize(fixed, quantizer.shape, activation=x.shape, relu=quantizer.relu)
    result.range.set(*(t.detach() for t in quantizer.qparams(x)))
    result.mode = Mode.frozen
    return result


def levels_of(quantizer: FakeQuantize, x: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of each row, shape [rows, 1], and its levels in units of it, ascending, [rows, levels]; float64."""
    one = torch.ones(len(quantizer.rows(x)), 1, dtype=torch.float64)
    if isinstance(quantizer.fitted, Table):
        return one, quantizer.fitted.values().double().sort(dim=1).values
    if quantizer.fitted is not None:
        scale, zero_point = quantizer.scales(x), torch.zeros(1)
        grid = quantizer.format.grid(quantizer.scheme.bits, True, False)
    else:
        (scale, zero_point), grid = quantizer.qparams(x), quantizer.grid
    scale, zero_point = (t.detach().double().reshape(-1, 1) * one for t in (scale, zero_point))
    levels = torch.arange(quantizer.quant_min, quantizer.quant_max + 1) if grid is None else grid.values()
    levels = levels.double() - zero_point
    return torch.where(scale > 0, scale, 1.0), levels


def to_nearest(v: Tensor, levels: Tensor) -> Tensor:
    """Distance of each value to the nearest level of its row."""
    after = torch.searchsorted(levels, v.contiguous()).clamp(max=levels.shape[1] - 1)
    return torch.minimum(*((v - levels.gather(1, i)).abs() for i in (after, (after - 1).clamp(min=0))))


def promises(name: str, quantizer: FakeQuantize, x: Tensor) -> None:
    """What must hold of a quantizer that is frozen."""
    given = quantizer(x).detach()
    assert given.shape == x.shape
    assert given.dtype == x.dtype
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
        assert given.is_contiguous(memory_format=torch.channels_last)
    x = x.float().contiguous()
    y = quantizer(x).detach()
    assert y.isfinite().all()
    summed = 2 * torch.finfo(given.dtype).eps if isinstance(quantizer.fitted, Mean) else 0.0  # in the order of memory
    torch.testing.assert_close(given, y.to(given.dtype), rtol=summed, atol=0)  # else float32, then rounded once
    if not x.numel():
        return
    again, of_x, of_y = pinned(quantizer, x), quantizer.rows(x.relu() if quantizer.relu else x), quantizer.rows(y)
    if quantizer.shape is not None and name != "product4":  # what is stored is what was computed
        encoded = encode(quantizer, x)
        assert torch.equal(quantizer.layout.restore(encoded.dequantize(), x.shape), y)
        if encoded.levels is None and quantizer.scheme.format == "int":
            assert encoded.low <= encoded.codes.min()
            assert encoded.codes.max() <= encoded.high
    if name not in EXCEPTIONS["levels"]:
        assert max(len(row.unique()) for row in of_y) <= 2 ** (quantizer.scheme.bits or 0)
    if name not in EXCEPTIONS["zero"]:
        assert (y[x == 0] == 0).all()
    if name not in EXCEPTIONS["idempotent"]:
        exact = quantizer.format.fitted not in ("binary", "ternary")  # a mean is rounded once more
        torch.testing.assert_close(again(y).detach(), y, rtol=0 if exact else 1e-6, atol=0)
    if name not in EXCEPTIONS["monotone"]:
        assert (of_y.gather(1, of_x.argsort(dim=1)).diff(dim=1) >= 0).all()
    if name not in EXCEPTIONS["nearest"]:
        scale, levels = levels_of(quantizer, x)
        v, q = of_x.double() / scale, of_y.double() / scale
        clamped = v.clamp(levels[:, :1], levels[:, -1:])
        slack = 1e-6 * (1 + clamped.abs())  # float32's own rounding
        assert ((q - clamped).abs() <= to_nearest(clamped, levels) + slack).all()
        if name not in EXCEPTIONS["odd"] and not quantizer.relu:
            bottom, top = -levels[:, :1], levels[:, -1:]
            unclipped = (v.abs() <= torch.minimum(bottom, top)) | (bottom == top)
            assert torch.equal(quantizer.rows(again(-x).detach())[unclipped], -of_y[unclipped])


@pytest.mark.parametrize("name", WEIGHTS)
@given(x=tensors())
@settings(max_examples=20, deadline=None)
def test_weights(name: str, x: Tensor) -> None:
    promises(name, of_weight(name, x), x)


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(x=tensors(), share=st.sampled_from([0.25, 1.0]), relu=st.booleans(), empty=st.sampled_from([False] * 7 + [True]))
@settings(max_examples=20, deadline=None)
def test_activations(name: str, x: Tensor, share: float, relu: bool, empty: bool) -> None:
    promises(name, of_activation(name, x * share, relu), x[:0] if empty else x)


def test_exceptions_are_of_schemes_that_are_here() -> None:
    assert {name for promise in EXCEPTIONS.values() for name in promise} <= {*WEIGHTS, *ACTIVATIONS}


# ------------------------------------------------------------------------------------------------------ edge values

EDGES = {
    "zeros": torch.zeros(4, 6),
    "constant": torch.full((4, 6), 0.3),
    "negative constant": torch.full((4, 6), -2.5),
    "denormals": torch.full((4, 6), 1e-42),
    "huge": torch.linspace(-1e30, 1e30, 24).reshape(4, 6),
    "one element": torch.tensor([[0.7]]),
    "tiny and huge": torch.tensor([[1e-30, 1.0, 1e30, -1e-30, -1.0, 0.0]] * 4),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_edge_values_of_weights(name: str, edge: str) -> None:
    x = EDGES[edge]
    y = of_weight(name, x)(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    if edge == "zeros" and name != "dorefa3":
        assert (y == 0).all()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_edge_values_of_activations(name: str, edge: str, relu: bool) -> None:
    x = EDGES[edge].clone().requires_grad_()
    quantizer = of_activation(name, x.detach(), relu)
    quantizer.mode = Mode.quantize
    y = quantizer(x)
    assert y.isfinite().all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    if edge == "zeros":
        assert (y == 0).all()


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "channel"])
def test_empty_batches(name: str) -> None:
    for shape in ((0, 6), (0, 6, 2, 2)):
        quantizer = of_activation(name, torch.randn(4, *shape[1:]))
        x = torch.zeros(shape, requires_grad=True)
        for mode in Mode:
            quantizer.mode = mode
            assert quantizer(x).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_in_half_precision(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 5, 3).to(dtype).requires_grad_()
    quantizer = of_activation(name, x.detach())
    quantizer.mode = Mode.quantize
    quantizer(x).sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------- what is reported


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_watched_quantizer_names_the_tensor(name: str, value: float) -> None:
    x = torch.randn(4, 6, 5, 3)
    quantizer = of_activation(name, x)
    quantizer.name = "block.conv2"
    x[1, 2, 3, 0] = value
    counts = r"1 NaN and 0 infinite" if value != value else r"0 NaN and 1 infinite"
    for mode in Mode:
        quantizer.mode = mode
        watch(quantizer)
        with pytest.raises(ValueError, match=rf"tensor 'block\.conv2' has {counts} of 360 .*first at \[1, 2, 3, 0\]"):
            quantizer(x)
    quantizer(x)  # once


def test_finite_values_whose_sum_is_not_are_let_through() -> None:
    x = torch.full((4, 6, 5, 3), 1e38)
    assert not x.sum().isfinite()
    quantizer = of_activation(next(iter(ACTIVATIONS)), torch.randn(4, 6, 5, 3))
    watch(quantizer)
    quantizer(x)


class Overflows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)
        nn.init.constant_(self.first.weight, 1e25)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_calibration_names_the_activation_that_overflows() -> None:
    net = Overflows()
    prepared = qat.prepare(net, qat.preset("int8"), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"tensor 'first' has 0 NaN and 8 infinite of 8 values"):
        qat.calibrate(prepared, [torch.full((2, 4), 1e25)])
    net.first.weight.data[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"tensor 'first\.weight' has 1 NaN"):
        qat.calibrate(prepared, [torch.zeros(2, 4)])
