import json
from typing import Any

import pytest

from qat.observers import OBSERVERS
from qat.scheme import Granularity, LayerRule, QuantConfig, TensorScheme, override

W8 = {"bits": 8, "granularity": "channel"}


def config(**data: Any) -> QuantConfig:
    return QuantConfig.from_dict(data)


@pytest.mark.parametrize("bits", [0, 17, 33, -4, 1.5, 8.0, True, "8", "many", float("nan")])
@pytest.mark.parametrize("field", ["weight", "activation", "input"])
def test_bits_of_integers(bits: Any, field: str) -> None:
    role, value = ("weight" if field == "weight" else "activation"), {True: "true"}.get(bits, bits)
    with pytest.raises(
        ValueError,
        match=rf"^quant\.{field}\.bits={value}: int {role}s have 1 to 16 bits, null leaves them float; use quant\.",
    ):
        config(**{field: {"bits": bits}})


@pytest.mark.parametrize(
    ("format", "bits", "has"),
    [("e4m3fn", 4, "8"), ("e2m1", 8, "4"), ("tf32", 16, "19"), ("apot", 1, "2 to 8"), ("pow2", 9, "2 to 8"),
     ("binary", 2, "1"), ("ternary", 1, "2"), ("codebook", 9, "1 to 8"), ("mxint8", 4, "8")],
)  # fmt: skip
def test_bits_of_other_formats(format: str, bits: int, has: str) -> None:
    with pytest.raises(
        ValueError, match=rf"quant\.weight\.bits={bits}: {format} weights have {has} bits, .* use quant"
    ):
        config(weight={"format": format, "bits": bits})


def test_one_bit_integers() -> None:
    with pytest.raises(ValueError, match=r"quant\.weight\.bits=1: .*use quant\.weight\.format=binary"):
        config(weight={"bits": 1})
    with pytest.raises(ValueError, match=r"quant\.activation\.bits=1: .*use quant\.activation\.signed=false"):
        config(activation={"bits": 1})
    for part in ("weight", "activation", "input"):  # [-1, 0], or with the narrow range nothing but 0
        for narrow in (True, False):
            data = {"bits": 1, "symmetric": False, "signed": True, "narrow_range": narrow, "range": "lsq"}
            with pytest.raises(ValueError, match=rf"quant\.{part}\.bits=1: .*use quant\.{part}\.signed=false"):
                config(**{part: data})
            assert config(**{part: data | {"signed": False}})
    assert config(activation={"bits": 1, "signed": False}).activation.bounds() == (0, 1)
    assert config(weight={"bits": 1, "symmetric": False}).weight.bounds() == (0, 1)


def test_a_format_without_bits_is_a_mistake() -> None:
    with pytest.raises(ValueError, match=r"quant\.weight\.format=e2m1: with bits=null .*give quant\.weight\.bits=4"):
        config(weight={"format": "e2m1"})


def test_valid_bits() -> None:
    for bits in (None, *range(2, 17)):
        assert config(weight={"bits": bits}).weight.bits == bits
        assert config(activation={"bits": bits}).activation.bits == bits


UNKNOWN = [
    ({"weight": {"rounding": "neerest"}}, "quant.weight.rounding='neerest'", "nearest", "floor, ceil, truncate"),
    ({"weight": {"observer": "min_max"}}, "quant.weight.observer='min_max'", "minmax", ", ".join(OBSERVERS)),
    ({"activation": {"observer": "emma"}}, "quant.activation.observer='emma'", "ema", ", ".join(OBSERVERS)),
    (
        {"weight": {"granularity": "chanel"}},
        "quant.weight.granularity='chanel'",
        "channel",
        "tensor, channel, group, block, token",
    ),
    (
        {"weight": {"range": "learnt"}},
        "quant.weight.range='learnt'",
        "learned",
        "fixed, running, dynamic, learned, lsq",
    ),
    ({"input": {"format": "imt"}}, "quant.input.format='imt'", "int", "int, e4m3fn"),
    ({"weight": {"gradient": "stee"}}, "quant.weight.gradient='stee'", "ste", "clipped_ste, ste, lsq, ewgs, dsq"),
    ({"weight": {"bit": 8}}, "quant.weight: field='bit'", "bits", "granularity"),
    ({"weigth": {"bits": 8}}, "quant: field='weigth'", "weight", "activation, input, rules, target"),
    ({"rules": [{"macth": "first"}]}, "quant.rules[0]: field='macth'", "match", "match, weight, activation"),
    (
        {"rules": [{"match": "first"}, {"match": "last", "weight": {"bitz": 8}}]},
        "quant.rules[1].weight: field='bitz'",
        "bits",
        "rounding",
    ),
    (
        {"rules": [{"match": "last", "activation": {"observer": "ms"}}]},
        "quant.rules[0].activation.observer='ms'",
        "mse",
        "percentile",
    ),
]


@pytest.mark.parametrize(("data", "names", "close", "valid"), UNKNOWN)
def test_unknown_names_list_the_valid_ones_and_the_closest(
    data: dict[str, Any], names: str, close: str, valid: str
) -> None:
    with pytest.raises(ValueError, match="is not known") as error:
        QuantConfig.from_dict(data)
    message = str(error.value)
    assert message.startswith(f"{names} is not known; did you mean '{close}'? (valid: ")
    assert valid in message.split("(valid: ")[1]


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(ValueError, match=r"quant\.weight\.rounding='xyz' is not known \(valid: nearest"):
        config(weight={"rounding": "xyz"})


REFUSED = [
    ({"weight": {"granularity": "group"}}, r"quant\.weight\.group_size=null: .*group_size=32"),
    ({"weight": {"granularity": "group", "group_size": 0}}, r"quant\.weight\.group_size=0: .*positive"),
    (
        {"weight": {"granularity": "channel", "group_size": 4}},
        r"group_size=4: it has no effect with granularity=channel",
    ),
    ({"weight": {"percentiles": [99, 1]}}, r"quant\.weight\.percentiles=\[99, 1\]: .*give \[low, high\]"),
    ({"weight": {"percentiles": [1.0]}}, r"percentiles=\[1\.0\]"),
    ({"activation": {"percentiles": [-1, 99]}}, r"quant\.activation\.percentiles=\[-1, 99\]"),
    ({"activation": {"percentiles": [0, 100.5]}}, r"percentiles=\[0, 100\.5\]"),
    ({"activation": {"percentiles": [5, 5]}}, r"percentiles=\[5, 5\]"),
    ({"activation": {"momentum": 0}}, r"quant\.activation\.momentum=0: .*give a number in \(0, 1\]"),
    ({"input": {"momentum": 1.1}}, r"quant\.input\.momentum=1\.1"),
    ({"weight": {"momentum": float("nan")}}, r"quant\.weight\.momentum=nan"),
    ({"activation": {"sigmas": 0}}, r"quant\.activation\.sigmas=0: .*give a positive number, for example 3"),
    ({"weight": {"norm": -1.0}}, r"quant\.weight\.norm=-1\.0: .*give a positive number, for example 2\.4"),
    ({"input": {"norm": float("inf")}}, r"quant\.input\.norm=inf"),
    ({"weight": {"sigmas": float("nan")}}, r"quant\.weight\.sigmas=nan"),
    ({"activation": {"rounding": "floor"}}, r"quant\.activation\.rounding=floor: .*'nearest'.*quant\.weight\.round"),
    ({"weight": {"rounding_seed": 1}}, r"quant\.weight\.rounding_seed=1: rounding=nearest draws nothing; .*=null"),
    ({"weight": {"rounding": "stochastic", "rounding_seed": -1}}, r"rounding_seed=-1: .*give an integer from 0"),
    ({"activation": {"gradient": "noise", "rounding_seed": True}}, r"rounding_seed=true: .*give an integer from 0"),
    ({"weight": {"signed": False}}, r"quant\.weight\.signed=false: .*use quant\.weight\.symmetric=false"),
    ({"rules": [{}]}, r"quant\.rules\[0\]\.match is missing; .*'type:Conv2d', 'first' or 'last'"),
    ({"rules": [{"match": ""}]}, r"quant\.rules\[0\]\.match is missing"),
    ({"rules": [{"match": "a", "weight": {"bits": 33}}]}, r"quant\.rules\[0\]\.weight\.bits=33"),
    ({"rules": [{"match": "a"}, {"match": "b", "activation": {"bits": 0}}]}, r"quant\.rules\[1\]\.activation\.bits=0"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED)
def test_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantConfig.from_dict(data)


def test_dataclasses_are_checked_as_well_and_again_by_validate() -> None:
    with pytest.raises(ValueError, match=r"quant\.weight\.bits=33"):
        QuantConfig(weight=TensorScheme(bits=33))
    changed = QuantConfig()
    changed.weight.bits = 33
    with pytest.raises(ValueError, match=r"quant\.weight\.bits=33"):
        changed.validate()


FULL = {
    "weight": {
        "bits": 4,
        "symmetric": False,
        "granularity": "group",
        "group_size": 32,
        "allow_padding": True,
        "rounding": "floor",
        "observer": "percentile",
        "percentiles": [1.0, 98.5],
        "momentum": 0.5,
        "range": "learned",
        "signed": True,
    },
    "activation": {"bits": 16, "observer": "mse", "range": "running", "narrow_range": True},
    "input": {"bits": 7},
    "rules": [
        {"match": "first", "weight": {"bits": 8, "granularity": "channel", "group_size": None}},
        {"match": "type:Linear", "weight": {"bits": None}, "activation": {"bits": None}},
    ],
    "target": "onnxruntime_x86",
}


def test_round_trip_through_json() -> None:
    config = QuantConfig.from_dict(FULL)
    assert config.weight.granularity is Granularity.group
    assert config.weight.range == "learned"
    data = json.loads(json.dumps(config.to_dict()))
    assert QuantConfig.from_dict(data) == config
    for part in ("weight", "activation", "input"):
        for name, value in FULL[part].items():  # type: ignore[attr-defined]
            assert data[part][name] == value
    assert data["target"] == "onnxruntime_x86"
    assert [rule["match"] for rule in data["rules"]] == ["first", "type:Linear"]
    assert data["rules"][1]["weight"] == {"bits": None}


def test_enum_members_in_rules_become_names() -> None:
    rule = LayerRule(match="a", weight={"granularity": Granularity.tensor})
    config = QuantConfig(weight=TensorScheme(bits=8), rules=[rule])
    data = json.loads(json.dumps(config.to_dict()))
    assert data["rules"][0]["weight"] == {"granularity": "tensor"}


def test_to_dict_is_a_copy() -> None:
    config = QuantConfig.from_dict(FULL)
    config.to_dict()["weight"]["percentiles"].append(3)
    config.to_dict()["rules"][0]["weight"]["bits"] = 2
    assert config == QuantConfig.from_dict(FULL)


def test_what_is_missing_takes_the_default() -> None:
    config = QuantConfig.from_dict({"weight": {"bits": 8}})
    default = QuantConfig()
    assert config.weight == override(default.weight, {"bits": 8}, "")
    assert config.weight.granularity is Granularity.channel  # the weight's default, not TensorScheme's
    assert config.weight.range == "dynamic"
    assert config.weight.narrow_range
    assert config.activation == default.activation == TensorScheme()
    assert config.rules == []
    assert config.target == "generic"


def test_override_changes_a_copy() -> None:
    scheme = TensorScheme(bits=4, observer="mse")
    assert override(scheme, {"bits": None}, "") == TensorScheme(bits=None, observer="mse")
    assert override(scheme, {"granularity": "channel"}, "").granularity is Granularity.channel
    assert override(scheme, {"range": "running"}, "").range == "running"
    assert scheme == TensorScheme(bits=4, observer="mse")


def test_enabled() -> None:
    assert not QuantConfig().enabled
    assert config(weight={"bits": 8}).enabled
    assert config(activation={"bits": 8}).enabled
    assert config(rules=[{"match": "first", "weight": {"bits": 8}}]).enabled


@pytest.mark.parametrize(
    ("scheme", "nonnegative", "expected"),
    [
        ({"bits": 8}, False, (-128, 127)),
        ({"bits": 8}, True, (0, 255)),
        ({"bits": 8, "narrow_range": True}, False, (-127, 127)),
        ({"bits": 8, "symmetric": False}, False, (0, 255)),
        ({"bits": 8, "symmetric": False, "signed": True}, False, (-128, 127)),
        ({"bits": 4, "signed": True}, True, (-8, 7)),
        ({"bits": 4, "signed": False}, False, (0, 15)),
        ({"bits": 2, "narrow_range": True}, False, (-1, 1)),
        ({"bits": 16}, False, (-32768, 32767)),
    ],
)
def test_bounds(scheme: dict[str, Any], nonnegative: bool, expected: tuple[int, int]) -> None:
    assert TensorScheme(**scheme).bounds(nonnegative) == expected


def test_bounds_of_a_float_scheme() -> None:
    with pytest.raises(ValueError, match="bits=None"):
        TensorScheme().bounds()


def test_describe() -> None:
    assert TensorScheme().describe() == "float"
    scheme = TensorScheme(bits=4, granularity=Granularity.group, group_size=32, range="learned", observer="mse")
    assert scheme.describe() == "int4 symmetric group 32, learned (mse)"
    assert TensorScheme(bits=8, symmetric=False).describe() == "int8 affine tensor, fixed (minmax)"


@pytest.mark.parametrize("data", [{"weight": None}, {"rules": [{"match": "fc", "weight": None}]}, {"input": 8}])
def test_what_holds_no_fields_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"names no fields; give some, as \{bits: 8\}; \{bits: null\} leaves it float"):
        QuantConfig.from_dict(data)
