"""Which presets each target runs, by hand: what the engines' documents say."""

from qat.presets import PRESETS

_INTEGERS = {"off", "int8", "w8a8_asymmetric", "w4a8", "w4a4", "w4a4_lsq", "w2a2_lsq", "binary", "ternary"}
_GROUPS = {"w4g32", "w4g128", "w2g32"}
_GROUPS_OF_TOKENS = {"w4g32a8_dynamic", "w4g128a8_dynamic"}
_INT8 = {"off", "int8", "w4a8", "binary", "ternary"}

RUNS: dict[str, set[str]] = {
    "generic": set(PRESETS),
    "onnxruntime_x86": _INTEGERS | _GROUPS,
    "onnxruntime_x86_vnni": _INTEGERS | _GROUPS,
    "onnxruntime_arm": _INTEGERS | _GROUPS,
    "openvino": (_INTEGERS - {"w8a8_asymmetric"}) | _GROUPS,
    "tensorrt": _INT8 | {"w4g128", "fp8"},
    "executorch_xnnpack": _INT8,
    "cmsis_nn": _INTEGERS - {"w8a8_asymmetric"},
    "integer_only": _INTEGERS,
    "vllm": {"off", "int8", "w4g32", "w4g128", "w8a8_dynamic", "fp8"} | _GROUPS_OF_TOKENS,
}

_MIXED = "int 1-8, binary, ternary"
_ORT = (
    ("DequantizeLinear, in float", f"{_MIXED}; group, channel, tensor", "float", "floats"),
    ("DequantizeLinear, in float", f"{_MIXED}; group", "int 1-8; tensor; static", "floats"),
)
_FLOAT = ("in float", "float", "any", "floats")
_ORT_OTHERS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("transposed convolution", "bilinear"), (
        ("DequantizeLinear, in float", f"{_MIXED}; group, channel, tensor", "int 1-8; tensor; static", "floats"),
        _ORT[0], _FLOAT,
    )),
    "embedding": (("Gather", f"{_MIXED}; channel, tensor", "any", "integers"), _FLOAT),
    "lstm": (_FLOAT,), "recurrent": (_FLOAT,),
}  # fmt: skip


def _ort(weights: str) -> dict[str, tuple[tuple[str, ...], ...]]:
    names = "QLinearConv, QGemm, QLinearMatMul"
    integer = (names, f"{weights}; channel, tensor", "int 1-8; tensor; static", "integers")
    return {"default": (integer, *_ORT, _FLOAT), **_ORT_OTHERS}


_RT = (
    ("INT8", f"{_MIXED}; symmetric; without -128; channel, tensor", "int 8; symmetric; signed; tensor; static",
     "integers"),
    ("FP8", "e4m3fn; channel, tensor", "e4m3fn; tensor; static", "integers"),
)  # fmt: skip
_NARROW = "int 1-8, ternary, binary; symmetric; without -128"

KERNELS: dict[str, dict[str, tuple[tuple[str, ...], ...]]] = {
    "onnxruntime_x86": _ort("int 1-7, binary, ternary"),
    "onnxruntime_x86_vnni": _ort(_MIXED),
    "onnxruntime_arm": _ort(_MIXED),
    "openvino": {
        "default": (
            ("oneDNN u8s8", f"{_MIXED}; symmetric; channel, tensor", "int 1-8; tensor; static", "integers"),
            ("decompression, in float", f"{_MIXED}; group, channel, tensor", "float", "floats"), _FLOAT,
        ),
        "bilinear": (
            ("decompression, in float", f"{_MIXED}; group, channel, tensor", "int 1-8; tensor; static", "floats"),
            ("decompression, in float", f"{_MIXED}; group, channel, tensor", "float", "floats"), _FLOAT,
        ),
        "embedding": (("Gather", f"{_MIXED}; channel, tensor", "any", "integers"), _FLOAT),
        "lstm": (_FLOAT,), "recurrent": (_FLOAT,),
    },
    "tensorrt": {
        "default": (*_RT, _FLOAT),
        "bilinear": (*(("dequantized, in float", *limits, "floats") for _, *limits, _ in _RT), _FLOAT),
        "linear": (*_RT, ("INT4 weight-only", "int 4; symmetric; group of 64, 128", "float", "floats"), _FLOAT),
        "embedding": (_FLOAT,), "lstm": (_FLOAT,), "recurrent": (_FLOAT,),
    },
    "executorch_xnnpack": {
        "default": (("qs8_qc8w", f"{_NARROW}; channel, tensor", "int 8; signed; tensor; static", "integers"), _FLOAT),
        **dict.fromkeys(("transposed convolution", "bilinear"), (
            ("dequantized, in float", f"{_NARROW}; channel, tensor", "int 8; signed; tensor; static", "floats"), _FLOAT
        )),
        "embedding": (_FLOAT,), "lstm": (_FLOAT,), "recurrent": (_FLOAT,),
    },
    "cmsis_nn": {
        "default": (("arm_convolve_s8, arm_fully_connected_s8", f"{_NARROW}; channel, tensor",
                     "int 1-8; tensor; static", "integers"),),
        "embedding": (("GATHER", f"{_NARROW}; tensor", "any", "integers"),),
        "bilinear": (), "lstm": (), "recurrent": (),
    },
    "integer_only": {
        "default": (("int8 reference", f"{_MIXED}; channel, tensor", "int 1-8; tensor; static", "integers"),),
        "embedding": (("int8 rows", f"{_MIXED}; channel, tensor", "any", "integers"),),
        "bilinear": (), "lstm": (), "recurrent": (),
    },
}  # fmt: skip
"""Target -> kind of layer -> kernel: its name, weights, inputs, and what it multiplies. `generic` takes anything, and
vLLM's table is held to compressed-tensors' own in tests/export/test_compressed_tensors.py."""

FUNCTIONS = {"elu", "gelu", "hardsigmoid", "hardswish", "leaky_relu", "mish", "prelu", "sigmoid", "silu", "softplus",
             "celu", "glu", "logsigmoid", "selu", "softsign", "tanh", "softmax", "log_softmax", "layer_norm",
             "rms_norm", "group_norm", "instance_norm"}  # fmt: skip
_ARITHMETIC = {"add", "average", "sub", "mul", "div", "matmul", "einsum"}

AROUND: dict[str, tuple[set[str], set[str], str, tuple[str, ...]]] = {
    **dict.fromkeys(("generic", "onnxruntime_x86", "onnxruntime_x86_vnni", "onnxruntime_arm", "openvino", "tensorrt"),
                    (FUNCTIONS, _ARITHMETIC, "halves to even", ("int8", "onnx"))),
    "executorch_xnnpack": (FUNCTIONS | {"matmul", "sub", "div"}, {"add", "mul", "average"}, "halves to even",
                           ("int8", "onnx", "executorch")),
    "cmsis_nn": (set(), _ARITHMETIC, "halves up", ("int8", "c_header")),
    "integer_only": (set(), _ARITHMETIC, "halves up", ("int8", "c_header")),
    "vllm": (FUNCTIONS | {"add", "mul", "matmul", "attention"}, set(), "halves to even", ("compressed_tensors",)),
}  # fmt: skip
"""Target -> what it computes in float, what reads integers beside layers, how it rounds ties, its files."""
