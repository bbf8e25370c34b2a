"""FORMATS: the number formats that configurations choose from.

To add one: a line of FORMATS, and a function (bits, signed, narrow) -> Grid beside those below, or a `Minifloat`.
Functions here are `functools.partial` of module-level functions, never closures, so that what holds a Grid can be
pickled.
"""

from functools import partial

from qat.numerics.formats.base import Format, Grid, Round
from qat.numerics.formats.block import (
    MX_BLOCK,
    NVFP4_BLOCK,
    mx_scales,
    nvfp4_block_scales,
    nvfp4_scales,
    nvfp4_tensor_scale,
)
from qat.numerics.formats.fitted import binary, signs, ternary, trits
from qat.numerics.formats.integer import BITS, integers, mxint8
from qat.numerics.formats.minifloat import BF16, E2M1, E2M3, E3M2, E4M3FN, E5M2, FP16, TF32, Minifloat
from qat.numerics.formats.powers import BITS as POWER_BITS
from qat.numerics.formats.powers import apot, pow2

__all__ = ["FORMATS", "Format", "Grid", "Minifloat", "Round", "binary", "ternary"]

_fitted = partial(Format, bits=tuple(range(1, 9)), grid=None)
_mx = partial(Format, block=MX_BLOCK, scales=mx_scales)


def _float(element: Minifloat, description: str, unit_scale: bool = False) -> Format:
    return Format(description=description, bits=(element.bits,), grid=element.grid, unit_scale=unit_scale)


def _mx_float(element: Minifloat, description: str) -> Format:
    return _mx(description=description, bits=(element.bits,), grid=element.grid)


FORMATS: dict[str, Format] = {
    "int": Format(description="integers (ONNX QuantizeLinear)", bits=BITS, grid=integers, unsigned=True, powers=True),
    "e4m3fn": _float(E4M3FN, "float8, largest 448 (OCP OFP8)"),
    "e5m2": _float(E5M2, "float8, largest 57344 (OCP OFP8)"),
    "e3m2": _float(E3M2, "float6, largest 28 (OCP MX v1.0)"),
    "e2m3": _float(E2M3, "float6, largest 7.5 (OCP MX v1.0)"),
    "e2m1": _float(E2M1, "float4, largest 6 (OCP MX v1.0)"),
    "bf16": _float(BF16, "bfloat16 (Kalamkar et al. 2019)", unit_scale=True),
    "fp16": _float(FP16, "half precision (IEEE 754 binary16)", unit_scale=True),
    "tf32": _float(TF32, "TensorFloat-32: float32 with 10 bits of fraction (NVIDIA A100)", unit_scale=True),
    "mxfp8_e4m3": _mx_float(E4M3FN, "e4m3fn in blocks of 32 that share a power of two (OCP MX v1.0)"),
    "mxfp8_e5m2": _mx_float(E5M2, "e5m2 in blocks of 32 that share a power of two (OCP MX v1.0)"),
    "mxfp6_e3m2": _mx_float(E3M2, "e3m2 in blocks of 32 that share a power of two (OCP MX v1.0)"),
    "mxfp6_e2m3": _mx_float(E2M3, "e2m3 in blocks of 32 that share a power of two (OCP MX v1.0)"),
    "mxfp4": _mx_float(E2M1, "e2m1 in blocks of 32 that share a power of two (OCP MX v1.0)"),
    "mxint8": _mx(description="int8 in blocks of 32 that share a power of two (OCP MX v1.0)", bits=(8,), grid=mxint8),
    "nvfp4": Format(
        description="e2m1 in blocks of 16 that share a float8, and a float32 a tensor (NVIDIA Blackwell)",
        bits=(E2M1.bits,),
        grid=E2M1.grid,
        block=NVFP4_BLOCK,
        scales=nvfp4_scales,
        tensor_scale=nvfp4_tensor_scale,
        block_scales=nvfp4_block_scales,
    ),
    "pow2": Format(
        description="powers of two and 0 (Miyashita 2016)", bits=POWER_BITS, grid=pow2, unsigned=True, powers=True
    ),
    "apot": Format(description="sums of powers of two (Li et al. 2020)", bits=POWER_BITS, grid=apot, unsigned=True),
    "binary": Format(description="signs (XNOR-Net, Rastegari 2016)", bits=(1,), grid=signs, fitted="binary"),
    "ternary": Format(description="-1, 0, 1 (TWN, Li 2016)", bits=(2,), grid=trits, fitted="ternary"),
    "codebook": _fitted(description="levels by k-means on the tensor (Han 2016)", fitted="codebook"),
    "product": _fitted(description="vectors by k-means on pieces of rows (Stock 2020)", fitted="product", vectors=True),
}
