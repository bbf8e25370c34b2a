"""TARGETS: the engines that configurations choose from, one entry each."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qat.numerics.formats import FORMATS
from qat.targets.limits import ELEMENTWISE, FLOAT, IN_FLOAT, NORMS, Kernel, Limits, Target
from qat.targets.vllm import FLOAT8, VLLM

_UP_TO_8 = tuple(range(1, 9))  # fewer bits are integers of 8 bits, too

# ---- generic: everything that the project computes -------------------------------------------------------------------


class _EveryFormat(Mapping[str, tuple[int, ...]]):
    """Format -> bits, of FORMATS as it is when asked: an entry may be added to it later."""

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return FORMATS[name].bits

    def __iter__(self) -> Iterator[str]:
        return iter(FORMATS)

    def __len__(self) -> int:
        return len(FORMATS)


_ANYTHING = Limits(
    formats=_EveryFormat(),
    granularities=("channel", "tensor", "group", "block", "token"),
)
_GENERIC = Target(
    description="Any engine with exact int8 products (ONNX Runtime is run in its exact mode).",
    layers={"default": (Kernel(name="any", weight=_ANYTHING, activation=None), IN_FLOAT)},
    keeps_float=(*sorted(ELEMENTWISE), *NORMS),
    source="ONNX QuantizeLinear and DequantizeLinear, opset 21: onnx.ai/onnx/operators",
)

# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------

_WEIGHTS = {"int": _UP_TO_8, "binary": (1,), "ternary": (2,)}
_STATIC = Limits(formats={"int": _UP_TO_8}, ranges="static", why="its kernels take scales that are known beforehand")
_PER_CHANNEL = Limits(
    formats=_WEIGHTS, granularities=("channel", "tensor"),
    why="its kernels have one scale a tensor or output channel",
)  # fmt: skip
_DEQUANTIZED = Limits(formats=_WEIGHTS, granularities=("group", "channel", "tensor"))


def _onnxruntime(description: str, weight: Limits, **settings: Any) -> Target:
    """What the kernels of ONNX Runtime's CPU provider have in common; they differ by instruction set."""
    weight_only = Kernel(name="DequantizeLinear, in float", weight=_DEQUANTIZED, activation=FLOAT, integers=False)
    mixed = Kernel(name="DequantizeLinear, in float", weight=_DEQUANTIZED, activation=_STATIC, integers=False)
    integer = Kernel(name="QLinearConv, QGemm, QLinearMatMul", weight=weight, activation=_STATIC)
    rows = Limits(formats=_WEIGHTS, granularities=("channel", "tensor"), why="rows are looked up one by one")
    return Target(
        description=description,
        layers={
            "default": (integer, weight_only, replace(mixed, weight=_GROUPS), IN_FLOAT),
            **dict.fromkeys(("transposed convolution", "bilinear"), (mixed, weight_only, IN_FLOAT)),
            "embedding": (Kernel(name="Gather", weight=rows, activation=None), IN_FLOAT),
            "lstm": (IN_FLOAT,),
            "recurrent": (IN_FLOAT,),
        },
        function_inputs=ELEMENTWISE,
        keeps_float=(*sorted(ELEMENTWISE), *NORMS),
        source="onnxruntime.ai/docs/performance/model-optimizations/quantization.html",
        **settings,
    )


_GROUPS = Limits(formats=_WEIGHTS, granularities=("group",))
_SEVEN_BITS = replace(
    _PER_CHANNEL, formats={**_WEIGHTS, "int": tuple(range(1, 8))},
    why="its uint8 x int8 kernels add pairs of products in int16, which saturates with 8-bit weights",
)  # fmt: skip

# ---- OpenVINO --------------------------------------------------------------------------------------------------------

_DECOMPRESSED = Kernel(name="decompression, in float", weight=_DEQUANTIZED, activation=FLOAT, integers=False)
_OPENVINO = Target(
    description="OpenVINO on CPU: int8 by its low-precision transformations.",
    layers={
        "default": (
            Kernel(name="oneDNN u8s8", weight=replace(_PER_CHANNEL, symmetric=True), activation=_STATIC),
            _DECOMPRESSED,
            IN_FLOAT,
        ),
        "bilinear": (replace(_DECOMPRESSED, activation=_STATIC), _DECOMPRESSED, IN_FLOAT),
        "embedding": (
            Kernel(name="Gather", weight=replace(_DEQUANTIZED, granularities=("channel", "tensor")), activation=None),
            IN_FLOAT,
        ),
        "lstm": (IN_FLOAT,),
        "recurrent": (IN_FLOAT,),
    },
    prefers={"weight": {"bits": 7}},  # without VNNI, oneDNN adds pairs of products in int16, too
    keeps_float=(*sorted(ELEMENTWISE), *NORMS),
    source="docs.openvino.ai: Low Precision Transformations; NNCF's overflow_fix for CPUs without VNNI",
)

# ---- TensorRT --------------------------------------------------------------------------------------------------------

_RT = "TensorRT's integers are signed and symmetric"
_RT_INT8 = Kernel(  # -128 would be 128 where a BatchNorm turns the sign of a channel; activations are clamped at -128
    name="INT8",
    weight=Limits(formats=_WEIGHTS, symmetric=True, narrow=True, granularities=("channel", "tensor"), why=_RT),
    activation=Limits(formats={"int": (8,)}, symmetric=True, signed=True, narrow=False, ranges="static", why=_RT),
)
_RT_FP8 = Kernel(
    name="FP8",
    weight=Limits(formats=FLOAT8, granularities=("channel", "tensor")),
    activation=Limits(formats=FLOAT8, ranges="static"),
)
_TENSORRT = Target(
    description="TensorRT: symmetric int8, one scale a tensor of activations, one an output channel of weights.",
    layers={
        "default": (_RT_INT8, _RT_FP8, IN_FLOAT),
        "linear": (
            _RT_INT8, _RT_FP8,
            Kernel(name="INT4 weight-only", integers=False, activation=FLOAT, weight=Limits(
                formats={"int": (4,)}, symmetric=True, granularities=("group",), group_sizes=(64, 128), why=_RT)),
            IN_FLOAT,
        ),
        "bilinear": (*(replace(kernel, name="dequantized, in float", integers=False) for kernel in (_RT_INT8, _RT_FP8)),
                     IN_FLOAT),
        "embedding": (IN_FLOAT,),
        "lstm": (IN_FLOAT,),
        "recurrent": (IN_FLOAT,),
    },
    prefers={"activation": {"symmetric": True, "signed": True}, "weight": {"narrow_range": True}},
    keeps_float=(*sorted(ELEMENTWISE), *NORMS),
    pairs=True,
    onnxruntime_options={  # it stands in, and runs the pairs as they are written
        "session.disable_quant_qdq": "1",
        "optimization.disable_specified_optimizers": "ReluQuantRewrite",  # takes float8's zero for the least of uint8
    },
    source="docs.nvidia.com/deeplearning/tensorrt: Working with Quantized Types, Explicit Quantization",
)  # fmt: skip

# ---- ExecuTorch with XNNPACK -----------------------------------------------------------------------------------------

_NARROW = Limits(
    formats={"int": _UP_TO_8, "ternary": (2,), "binary": (1,)}, symmetric=True, narrow=True,
    granularities=("channel", "tensor"), why="its weights are int8 from -127 to 127 with zero point 0",
)  # fmt: skip
_INT8 = Limits(formats={"int": (8,)}, signed=True, ranges="static", why="its activations are int8 with a zero point")
_QS8 = Kernel(name="qs8_qc8w", weight=_NARROW, activation=_INT8)
_QS8_IN_FLOAT = replace(_QS8, name="dequantized, in float", integers=False)
_XNNPACK = Target(
    description="ExecuTorch with XNNPACK: int8 activations with a zero point, symmetric int8 weights.",
    layers={
        "default": (_QS8, IN_FLOAT),
        **dict.fromkeys(("transposed convolution", "bilinear"), (_QS8_IN_FLOAT, IN_FLOAT)),
        "embedding": (IN_FLOAT,),
        "lstm": (IN_FLOAT,),
        "recurrent": (IN_FLOAT,),
    },
    prefers={"activation": {"symmetric": False, "signed": True}, "weight": {"narrow_range": True}},
    operations=frozenset({"add", "mul", "average"}),
    function_inputs=ELEMENTWISE,
    keeps_float=("matmul", "sub", "div", *sorted(ELEMENTWISE), *NORMS),
    formats=("int8", "onnx", "executorch"),
    source="docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html",
)  # fmt: skip

# ---- integers from end to end ----------------------------------------------------------------------------------------

_TFLITE_BOUNDS = {
    "softmax": (0.0, 255 / 256),  # scale 1 / 256, zero point -128
    "sigmoid": (0.0, 255 / 256),
    "tanh": (-1.0, 127 / 128),  # scale 1 / 128, zero point 0
    "log_softmax": (-255 / 16, 0.0),  # scale 16 / 256, zero point 127
}
_S8 = Limits(  # narrower ones by the kernels' own ends; unsigned ones are moved by 128, and so is the zero point
    formats={"int": _UP_TO_8}, ranges="static", why="its activations are int8 with a zero point"
)
_CMSIS = Target(
    description="CMSIS-NN on Cortex-M: int8, requantized by an int32 multiplier and a shift.",
    layers={
        "default": (Kernel(name="arm_convolve_s8, arm_fully_connected_s8", weight=_NARROW, activation=_S8),),
        "embedding": (Kernel(name="GATHER", weight=replace(_NARROW, granularities=("tensor",)), activation=None),),
        **dict.fromkeys(("bilinear", "lstm", "recurrent"), ()),
    },
    prefers={"activation": {"symmetric": False, "signed": True}, "weight": {"narrow_range": True}},
    bounds=_TFLITE_BOUNDS,
    requantize="fixed_point",
    functions="integer",
    formats=("int8", "c_header"),
    source="ai.google.dev/edge/litert: 8-bit quantization specification; github.com/ARM-software/CMSIS-NN",
)
_INTEGER_ONLY = Target(
    description="No float between input and output: multipliers and shifts, functions in integers after I-BERT.",
    layers={
        "default": (
            Kernel(
                name="int8 reference", weight=replace(_PER_CHANNEL, why="it multiplies integers"),
                activation=replace(_STATIC, why="it multiplies integers"),
            ),
        ),
        "embedding": (Kernel(name="int8 rows", weight=_PER_CHANNEL, activation=None),),
        **dict.fromkeys(("bilinear", "lstm", "recurrent"), ()),
    },
    requantize="fixed_point",
    functions="integer",
    formats=("int8", "c_header"),
    source="Jacob et al. 2018, section 2.2; Kim et al. 2021 (I-BERT), algorithms 1 to 4",
)  # fmt: skip

TARGETS: dict[str, Target] = {
    "generic": _GENERIC,
    "onnxruntime_x86": _onnxruntime(
        "ONNX Runtime on x86 with AVX2 and no VNNI, at full speed: 7-bit weights.", _SEVEN_BITS, onnxruntime_options={}
    ),
    "onnxruntime_x86_vnni": _onnxruntime(
        "ONNX Runtime on x86 with AVX-VNNI or AVX512-VNNI.", _PER_CHANNEL, exact_with_vnni=True
    ),
    "onnxruntime_arm": _onnxruntime(
        "ONNX Runtime on 64-bit ARM: int8 activations with a zero point.", _PER_CHANNEL,
        prefers={"activation": {"symmetric": False, "signed": True}},
    ),
    "openvino": _OPENVINO,
    "tensorrt": _TENSORRT,
    "executorch_xnnpack": _XNNPACK,
    "cmsis_nn": _CMSIS,
    "integer_only": _INTEGER_ONLY,
    "vllm": VLLM,
}  # fmt: skip
"""Name -> what it can run."""
