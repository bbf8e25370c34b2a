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
    "tensorrt": _INT8 | {"w4g128", "fp8", "mxfp8", "nvfp4"},
    "executorch_xnnpack": _INT8 | {"w8a8_dynamic"} | _GROUPS_OF_TOKENS,
    "cmsis_nn": _INTEGERS - {"w8a8_asymmetric"},
    "integer_only": _INTEGERS,
    "vllm": {"off", "int8", "w4g32", "w4g128", "w8a8_dynamic", "fp8"} | _GROUPS_OF_TOKENS,
}
