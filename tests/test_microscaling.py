"""MX and NVFP4 in FakeQuantize, bit for bit against the rules of the specification in numpy and ml_dtypes.

Elements and scales are cast by ml_dtypes; the block scale is section 6.3 of OCP Microscaling Formats v1.0 in float64.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from qat.fake_quant import FakeQuantize
from qat.mode import Mode
from qat.modes import quantizers
from qat.numerics.formats import FORMATS
from qat.runtime.stored import Simulate
from qat.scheme import Granularity, TensorScheme
from qat.zoo.gpt import CharGPT

ELEMENTS = {
    "mxfp8_e4m3": ml_dtypes.float8_e4m3fn,
    "mxfp8_e5m2": ml_dtypes.float8_e5m2,
    "mxfp6_e3m2": ml_dtypes.float6_e3m2fn,
    "mxfp6_e2m3": ml_dtypes.float6_e2m3fn,
    "mxfp4": ml_dtypes.float4_e2m1fn,
    "nvfp4": ml_dtypes.float4_e2m1fn,
}
SHAPES = {"weight": [(6, 70), (5, 3, 3, 3), (4, 64)], "activation": [(3, 70), (2, 40, 2, 3), (2, 5, 64)]}
"""70 = 32 + 32 + 6, 27 and 40 do not divide by 32 or 16: the last block of a row is short."""


def element_cast(name: str) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Real numbers -> the nearest elements, saturating, float32; and the exponent of the largest element."""
    if name == "mxint8":  # section 5.3.4: two's complement with an implied scale of 2 ** -6
        return lambda v: np.clip(np.rint(v * 64.0), -128, 127).astype(np.int8).astype(np.float32) / 64, 0
    dtype = ELEMENTS[name]
    largest = float(ml_dtypes.finfo(dtype).max)
    return (
        lambda v: np.clip(v, -largest, largest).astype(np.float32).astype(dtype).astype(np.float32),
        int(np.floor(np.log2(largest))),
    )


def mx(blocks: np.ndarray, name: str) -> np.ndarray:
    """Section 6.3: X = 2 ** (floor(log2 max |V|) - emax) in E8M0, P = V / X in the element's format, X P."""
    cast, emax = element_cast(name)
    amax = np.abs(blocks).max(axis=-1, keepdims=True).astype(np.float64)
    exponent = np.frexp(np.where(amax > 0, amax, 1.0))[1] - 1
    exponent = np.where(amax > 0, np.clip(exponent - emax, -127, 127), 0)
    scale = np.ldexp(1.0, exponent).astype(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.array_equal(np.log2(scale), exponent)
    return (cast(blocks.astype(np.float64) / scale) * scale).astype(np.float32)


def nvfp4(blocks: np.ndarray, name: str) -> np.ndarray:
    """NVIDIA 2025: a float32 a tensor, an e4m3 a block (of a block of zeros the smallest one), elements e2m1."""
    cast, _ = element_cast(name)
    amax = np.abs(blocks).max(axis=-1, keepdims=True)
    of_tensor = np.float32(amax.max() / np.float32(6 * 448)) if amax.max() > 0 else np.float32(1)
    of_block = (amax / np.float32(6) / of_tensor).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    scale = np.maximum(of_block, np.float32(2.0**-9)) * of_tensor
    return cast(blocks / scale) * scale


def reference(x: np.ndarray, name: str, role: str) -> np.ndarray:
    """Blocks along a weight's inputs, or an activation's channels; short ones are filled with zeros."""
    size = FORMATS[name].block
    assert size is not None
    images = role == "activation" and x.ndim == 4
    rows = np.moveaxis(x, 1, -1) if images else x
    shape = rows.shape
    rows = rows.reshape(len(x), -1) if role == "weight" else rows.reshape(-1, shape[-1])
    width = rows.shape[1]
    padded = np.pad(rows, ((0, 0), (0, -width % size)))
    y = (nvfp4 if name == "nvfp4" else mx)(padded.reshape(len(rows), -1, size), name)
    y = y.reshape(len(rows), -1)[:, :width].reshape(shape)
    return np.moveaxis(y, -1, 1) if images else y


def values(shape: tuple[int, ...], spread: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape)
    if spread == "wide":  # from where scales end to where they end, elements of one block far apart
        x *= 2.0 ** rng.integers(-135, 120, size=(*shape[:1], *[1] * (len(shape) - 1)))
        x *= 2.0 ** rng.integers(-12, 3, size=shape)
    if spread == "ties":  # multiples of a sixteenth: ties of every element, and zeros
        x = rng.integers(-2000, 2001, size=shape) / 16.0
        x[0] = 0
    return x.astype(np.float32)


def quantized(x: Tensor, name: str, role: str) -> Tensor:
    kind = FORMATS[name]
    scheme = TensorScheme(
        format=name, bits=kind.bits[0], granularity=Granularity.group, group_size=kind.block, allow_padding=True,
        range="dynamic", axis=-1 if role == "activation" and x.dim() == 3 else None,
    )  # fmt: skip
    quantizer = FakeQuantize(scheme, x.shape if role == "weight" else None, activation=x.shape)
    quantizer.mode = Mode.quantize
    return quantizer(x)


@pytest.mark.parametrize("role", ["weight", "activation"])
@pytest.mark.parametrize("name", [*ELEMENTS, "mxint8"])
def test_blocks_are_the_specifications(name: str, role: str) -> None:
    for shape in SHAPES[role]:
        for spread in ("normal", "wide", "ties"):
            if (name, spread) == ("nvfp4", "wide"):
                continue  # one float32 serves the tensor: the next test
            x = values(shape, spread)
            got, expected = quantized(torch.from_numpy(x), name, role).numpy(), reference(x, name, role)
            assert np.array_equal(got, expected), (shape, spread, np.argwhere(got != expected)[:3].tolist())
            assert (got != x).mean() > 0.1, (shape, spread)
            if name != "mxint8":  # integers have one zero, floats two
                assert np.array_equal(got.view(np.int32), expected.view(np.int32)), (shape, spread)


@pytest.mark.parametrize("role", ["weight", "activation"])
def test_nvfp4_of_any_size(role: str) -> None:
    for exponent in (-80, -20, 0, 40, 100):
        x = np.ldexp(values((6, 70), "normal"), exponent) * np.geomspace(1e-4, 1, 6, dtype=np.float32)[:, None]
        assert np.array_equal(quantized(torch.from_numpy(x), "nvfp4", role).numpy(), reference(x, "nvfp4", role))


@pytest.mark.parametrize("relu", [False, True])
def test_a_kept_tensor_scale_is_kept_while_those_of_blocks_are_computed(relu: bool) -> None:
    scheme = TensorScheme(format="nvfp4", bits=4, granularity=Granularity.group, group_size=16, axis=-1,
                          range="running", allow_padding=True)  # fmt: skip
    quantizer = FakeQuantize(scheme, activation=[4, 40], relu=relu)
    assert not quantizer.calibrated
    x = torch.from_numpy(values((64, 40), "normal"))
    quantizer.observe(x)
    quantizer.set_range_from_observer()
    largest = (x.relu() if relu else x.abs()).max()
    torch.testing.assert_close(quantizer.qparams()[0], largest / (6 * 448))
    assert quantizer.qparams(x)[0].shape == (64, 3)
    quantizer.mode = Mode.quantize
    expected = reference((x.relu() if relu else x).numpy(), "nvfp4", "activation")
    y = quantizer.eval()(x)
    differs = (y - torch.from_numpy(expected)).abs() > 1e-6  # 1 / s and s are rounded apart: blocks next to a tie
    assert differs.float().mean() < 0.005
    stored = Simulate.of(quantizer)
    assert torch.equal(stored(x), y)
    assert torch.equal(stored(8 * x), quantizer(8 * x))
    torch.testing.assert_close(stored(8 * x).abs().max(), largest)  # what is beyond the kept range saturates
    quantizer.train()(8 * x)  # and a running range follows
    torch.testing.assert_close(quantizer.qparams()[0], 8 * largest / (6 * 448))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_blocks_lie_along_what_is_summed(name: str) -> None:
    """Of a GPT along features, not along tokens, wherever a product of matrices reads; of images along channels."""
    ids = torch.randint(0, 60, (2, 32))
    net = qat.prepare(CharGPT(64, context=64, n_layer=1, n_head=4, width=64), qat.preset(name), ids)
    axes = {quantizer.name: quantizer.layout.axis for _, quantizer in quantizers(net) if quantizer.shape is None}
    read = [name for name in axes if name.endswith(("norm1", "norm2", "qkv", "softmax", "matmul", "mlp.1"))]
    assert len(read) == 6
    assert {axes[name] for name in read} == {-1}
    images = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3))
    net = qat.prepare(images, qat.preset(name), torch.randn(2, 3, 12, 12))
    assert {quantizer.layout.axis for _, quantizer in quantizers(net) if quantizer.shape is None} == {1}
    given = qat.preset(name, activation={"axis": 1})
    net = qat.prepare(CharGPT(64, context=64, n_layer=1, n_head=4, width=64), given, ids)
    assert {quantizer.layout.axis for _, quantizer in quantizers(net) if quantizer.shape is None} == {1}
