"""What every quantizer promises, whatever its scheme: properties over hypothesis-drawn tensors, and edge values."""

import dataclasses
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
    "dynamic": {"bits": 8, "range": "dynamic"},
    "token": {"bits": 8, "range": "dynamic", "granularity": "token"},
    "groups": {"bits": 4, "range": "dynamic", "granularity": "group", "group_size": 2, "allow_padding": True},
    "channel": {"bits": 4, "granularity": "channel"},
    "running": {"bits": 8, "range": "running", "observer": "ema"},
    "learned": {"bits": 4, "range": "lsq"}, "lsq_plus": {"bits": 4, "range": "lsq_plus", "symmetric": False},
    "pact": {"bits": 4, "range": "pact"}, "tqt": {"bits": 4, "range": "tqt"}, "dorefa": {"bits": 4, "range": "dorefa"},
    "e4m3fn": {"bits": 8, "format": "e4m3fn"}, "bf16": {"bits": 16, "format": "bf16"},
    "mxfp4": {"bits": 4, "format": "mxfp4", "granularity": "group", "group_size": 32, "range": "dynamic",
              "allow_padding": True},
    "apot": {"bits": 4, "format": "apot"},
}  # fmt: skip
FITTED = ("binary", "ternary", "codebook3", "product4")


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
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=7), elements=FLOATS)


@pytest.mark.parametrize("name", WEIGHTS)
@given(x=MATRICES)
@settings(max_examples=25, deadline=None)
def test_weights(name: str, x: np.ndarray) -> None:
    weight = torch.from_numpy(x)
    quantizer = of_weight(name, weight)
    y = quantizer(weight).detach()
    assert y.shape == weight.shape
    assert y.isfinite().all()
    # what is stored is what was computed
    if name != "product4":
        encoded = encode(quantizer, weight)
        assert torch.equal(quantizer.layout.restore(encoded.dequantize(), weight.shape), y)
        if encoded.levels is None and quantizer.scheme.format == "int":
            assert encoded.low <= encoded.codes.min()
            assert encoded.codes.max() <= encoded.high
    # no more levels a scale than bits allow
    bits = quantizer.scheme.bits
    assert bits is not None
    if bits <= 8 and name != "product4":
        assert max(len(row.unique()) for row in quantizer.rows(y)) <= 2**bits
    # zero stays zero wherever there is a zero
    if name not in ("binary", "dorefa3", *FITTED):
        assert (y[weight == 0] == 0).all()
    # idempotent, with the ranges that it has
    if name not in FITTED and name not in ("dorefa3", "adaptive"):
        fixed = pinned(quantizer, weight)
        assert torch.equal(fixed(y), y)


def pinned(quantizer: FakeQuantize, x: Tensor) -> FakeQuantize:
    """The same levels and scales, whatever it is given."""
    result = FakeQuantize(dataclasses.replace(quantizer.scheme, range="fixed", observer="minmax"), x.shape)
    result.range.set(*(t.detach() for t in quantizer.qparams(x)))
    result.mode = Mode.frozen
    return result


MONOTONE = [name for name in WEIGHTS if name not in ("product4", "codebook3", "dorefa3", *BLOCKS)]


@pytest.mark.parametrize("name", MONOTONE)
@given(values=hnp.arrays(np.float32, st.integers(2, 40), elements=FLOATS))
@settings(max_examples=20, deadline=None)
def test_weights_of_one_row_are_monotone_and_odd(name: str, values: np.ndarray) -> None:
    row = torch.from_numpy(np.sort(values)).unsqueeze(0)
    data = {k: v for k, v in WEIGHTS[name].items() if k not in ("granularity", "axis", "group_size", "block_size")}
    quantizer = FakeQuantize(scheme(data | {"allow_padding": False}, "weight"), row.shape)
    quantizer.set_range_from(row)
    quantizer.mode = Mode.frozen
    y = quantizer(row).detach()
    assert (y.diff() >= 0).all()
    symmetric = WEIGHTS[name].get("narrow_range") or FORMATS[quantizer.scheme.format].bits != FORMATS["int"].bits
    if symmetric and name not in FITTED:
        twin = FakeQuantize(quantizer.scheme, row.shape)
        twin.set_range_from(-row)
        twin.mode = Mode.frozen
        assert torch.equal(twin(-row).detach(), -y)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12])
@pytest.mark.parametrize("symmetric", [True, False])
@given(x=MATRICES)
@settings(max_examples=25, deadline=None)
def test_integers_are_off_by_half_a_step_inside_the_range(bits: int, symmetric: bool, x: np.ndarray) -> None:
    weight = torch.from_numpy(x)
    data = {
        "bits": bits,
        "symmetric": symmetric,
        "narrow_range": symmetric,
        "granularity": "channel",
        "range": "dynamic",
    }
    quantizer = FakeQuantize(scheme(data, "weight"), weight.shape)
    quantizer.mode = Mode.frozen
    scale, _ = quantizer.qparams(weight)
    error = (quantizer.rows(quantizer(weight)) - quantizer.rows(weight)).abs()
    steps = 0.5 if symmetric else 1.0  # an affine zero point is rounded too, which moves the ends by up to half a step
    assert (error <= (steps + 1e-4) * scale.unsqueeze(1)).all()


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
    assert not y.isnan().any()
    y.sum().backward()
    assert not x.grad.isnan().any()
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


def strided(kind: str) -> Tensor:
    x = torch.randn(4, 6, 5, 3)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3).contiguous().transpose(0, 3),
        "sliced": torch.randn(8, 6, 5, 6)[::2, :, :, ::2],
    }[kind]


@pytest.mark.parametrize("kind", ["channels_last", "transposed", "sliced"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_same_element_gets_the_same_result_in_any_memory_order(name: str, kind: str) -> None:
    x = strided(kind)
    quantizer = of_activation(name, x)
    y = quantizer(x)
    assert torch.equal(y, quantizer(x.contiguous()))
    if kind == "channels_last" and not quantizer.layout.by_rows:
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_half_precision_in_half_precision_out(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 6, 5, 3).to(dtype)
    quantizer = of_activation(name, x)
    leaf = x.clone().requires_grad_()
    quantizer.mode = Mode.quantize
    y = quantizer(leaf)
    y.sum().backward()
    assert y.dtype == leaf.grad.dtype == dtype
    quantizer.mode = Mode.frozen
    expected = quantizer(x.float()).to(dtype)  # the arithmetic is float32, then rounded once
    assert torch.equal(quantizer(x), expected)


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
