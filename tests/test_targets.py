from typing import Any

import pytest

from qat.scheme import QuantConfig
from qat.targets import TARGETS, check_target

FITS: dict[str, Any] = {"weight": {"bits": 7}, "activation": {"bits": 8}, "input": {"bits": 8}}


def check(data: dict[str, Any], target: str = "onnxruntime_x86") -> None:
    check_target(QuantConfig.from_dict({**data, "target": target}))


@pytest.mark.parametrize(
    ("data", "field", "nearest"),
    [
        ({"weight": {"bits": 8}}, r"quant\.weight\.bits=8", r"quant\.weight\.bits=7"),
        ({"activation": {"bits": 16}}, r"quant\.activation\.bits=16", r"quant\.activation\.bits=8"),
        ({"input": {"bits": 16}}, r"quant\.input\.bits=16", r"quant\.input\.bits=8"),
        (
            {"rules": [{"match": "a"}, {"match": "b", "weight": {"bits": 8}}]},
            r"quant\.rules\[1\]\.weight\.bits=8",
            r"quant\.rules\[1\]\.weight\.bits=7",
        ),
        (
            {"rules": [{"match": "a", "activation": {"bits": 16}}]},
            r"quant\.rules\[0\]\.activation\.bits=16",
            r"quant\.rules\[0\]\.activation\.bits=8",
        ),
    ],
)
def test_too_wide_names_the_field_the_limit_and_the_nearest(data: dict[str, Any], field: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"{field}: target=onnxruntime_x86 takes at most .*use {nearest}, or target="):
        check({**FITS, **data})
    check({**FITS, **data}, "generic")  # what the message offers


def test_weight_limit_gives_its_reason() -> None:
    with pytest.raises(ValueError, match="int16, which saturates with 8-bit weights"):
        check({**FITS, "weight": {"bits": 8}})
    check({"weight": {"bits": 8}})  # weight-only: multiplied in float, nothing saturates


def test_what_fits_passes() -> None:
    check(FITS)
    check({})  # float
    check({**FITS, "weight": {"bits": 4}, "rules": [{"match": "a", "weight": {"bits": None}}]})
    check({"weight": {"bits": 8}, "activation": {"bits": 16}}, "generic")


def test_unknown_target() -> None:
    with pytest.raises(
        ValueError, match=r"quant\.target='onnxruntime_x68' is not known; did you mean 'onnxruntime_x86'"
    ):
        check({}, "onnxruntime_x68")


def test_generic_runs_onnx_runtime_in_its_exact_mode() -> None:
    assert TARGETS["generic"].onnxruntime_options == {"session.x64quantprecision": "1"}
    assert TARGETS["onnxruntime_x86"].onnxruntime_options == {}
