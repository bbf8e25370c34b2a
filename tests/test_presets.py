import copy

import pytest

import qat
from qat.presets import DESCRIPTIONS, PRESETS, fields
from qat.scheme import Granularity
from qat.targets import TARGETS, check_target
from tests.target_table import RUNS


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_on_every_target_that_runs_it(name: str, target: str) -> None:
    config = qat.preset(name, target=target)
    if name not in RUNS[target]:
        with pytest.raises(ValueError, match=rf"quant\.\w+\.\w+=\w+: target={target} .*; use .*, or target=generic"):
            check_target(config)
        return
    check_target(config)
    assert config.target == target
    assert config.enabled == (name != "off")


def test_every_preset_is_described() -> None:
    assert DESCRIPTIONS.keys() == PRESETS.keys()


def test_names_say_the_bits() -> None:
    bits = {name: (c.weight.bits, c.activation.bits) for name in PRESETS for c in [qat.preset(name)]}
    assert bits == {
        "off": (None, None), "int8": (8, 8), "w8a8_asymmetric": (8, 8), "w4a8": (4, 8), "w4a4": (4, 4),
        "w4a4_lsq": (4, 4), "w2a2_lsq": (2, 2), "w4g32": (4, None), "w4g128": (4, None), "w2g32": (2, None),
        "w4g32a8_dynamic": (4, 8), "w4g128a8_dynamic": (4, 8), "w8a8_dynamic": (8, 8), "fp8": (8, 8),
        "mxfp8": (8, 8), "mxfp6": (6, 6), "mxfp4": (4, 4), "mxint8": (8, 8), "nvfp4": (4, 4), "apot4": (4, 4),
        "binary": (1, 8), "ternary": (2, 8), "codebook4": (4, None),
    }  # fmt: skip
    assert {name for name in PRESETS if not qat.preset(name).weight.symmetric} == {"w8a8_asymmetric"}
    learned = {name for name in PRESETS if qat.preset(name).weight.range == "learned"}
    assert learned == {"w4a4_lsq", "w2a2_lsq", "apot4", "codebook4"}
    groups = {name: c.weight.group_size for name in PRESETS for c in [qat.preset(name)]
              if c.weight.granularity is Granularity.group and c.weight.format == "int"}  # fmt: skip
    assert groups == {"w4g32": 32, "w4g128": 128, "w2g32": 32, "w4g32a8_dynamic": 32, "w4g128a8_dynamic": 128}
    for name in PRESETS:
        inputs = qat.preset(name).activation
        assert (inputs.granularity is Granularity.token) == name.endswith("_dynamic"), name


def test_changes_to_a_scheme_are_merged_and_rules_are_replaced() -> None:
    config = qat.preset("w4a4_lsq", weight={"bits": 6}, rules=[{"match": "first", "weight": {"bits": None}}])
    expected = qat.preset("w4a4_lsq")
    expected.weight.bits = 6
    assert config.weight == expected.weight
    assert (config.activation, config.input) == (expected.activation, expected.input)
    assert [rule.match for rule in config.rules] == ["first"]


def test_bad_names_and_changes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"preset='w4a4_lqs' is not known; did you mean 'w4a4_lsq'\? \(valid: off, "):
        qat.preset("w4a4_lqs")
    with pytest.raises(ValueError, match=r"target='x86' is not known"):
        qat.preset("int8", target="x86")
    with pytest.raises(ValueError, match=r"quant\.weight\.bits=33"):
        qat.preset("int8", weight={"bits": 33})
    with pytest.raises(ValueError, match=r"'wieght' is not known; did you mean 'weight'"):
        qat.preset("int8", wieght={"bits": 4})


def test_presets_share_nothing_with_their_table() -> None:
    before = copy.deepcopy(PRESETS)
    config = qat.preset("w4a4")
    config.weight.bits = 2
    config.rules[0].weight["bits"] = 3
    fields("w4a4", "onnxruntime_x86")["rules"].clear()
    assert before == PRESETS
    assert qat.preset("w4a4").rules[0].weight == {"bits": 8}
