"""Which presets each target runs, by hand: what the engines' documents say."""

from qat.presets import PRESETS

_INTEGERS = {"off", "int8", "w8a8_asymmetric", "w4a8", "w4a4", "w4a4_lsq", "w2a2_lsq", "binary", "ternary"}
_INT8 = {"off", "int8", "w4a8", "binary", "ternary"}

RUNS: dict[str, set[str]] = {
    "generic": set(PRESETS),
    "onnxruntime_x86": _INTEGERS | {"w4g32"},
    "onnxruntime_x86_vnni": _INTEGERS | {"w4g32"},
    "onnxruntime_arm": _INTEGERS | {"w4g32"},
    "openvino": (_INTEGERS - {"w8a8_asymmetric"}) | {"w4g32"},
    "tensorrt": _INT8 | {"fp8"},
    "executorch_xnnpack": _INT8,
    "cmsis_nn": _INTEGERS - {"w8a8_asymmetric"},
    "integer_only": _INTEGERS,
    "vllm": {"off", "int8", "w4g32", "w8a8_dynamic", "fp8"},
}
