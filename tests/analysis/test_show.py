"""`python -m qat show`: the numbers it prints, the files it writes, what it refuses."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import qat
from qat.__main__ import main
from qat.analysis.show import configure, measure, sqnr_db
from qat.numerics.affine import int_range
from qat.numerics.fake_quantize import fake_quantize
from qat.scheme import TensorScheme


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_a_uniform_signal_has_six_decibels_a_bit(bits: int) -> None:
    """6.02 b dB (Bennett 1948): a uniform signal that fills the cells of all 2^b levels, its power about its mean."""
    low, high = int_range(bits, signed=True)
    x = torch.linspace(low - 0.5, high + 0.5, 2**18 + 1)[:-1] + (high - low + 1) / 2**19
    x_dq = fake_quantize(x * 0.125, torch.tensor(0.125), torch.tensor(0.0), low, high) * 8
    assert sqnr_db(x - x.mean(), x_dq - x.mean()) == pytest.approx(20 * math.log10(2) * bits, abs=0.01)


def best_uniform_gaussian(levels: np.ndarray) -> float:
    """SQNR in dB of N(0, 1) on `levels` times the best step: brute force over steps, integral over the density."""
    x = np.linspace(-8, 8, 40_001)
    density = np.exp(-(x**2) / 2) / np.exp(-(x**2) / 2).sum()
    middles = (levels[1:] + levels[:-1]) / 2
    noise = [
        float((density * (levels[np.searchsorted(middles * s, x)] * s - x) ** 2).sum())
        for s in np.linspace(0.2, 8, 600) / np.abs(levels).max()
    ]
    return -10 * math.log10(min(noise))


@pytest.mark.parametrize(("bits", "published"), [(2, 9.25), (3, 14.27), (4, 19.38)])
def test_a_gaussian_at_its_best_clip(bits: int, published: float) -> None:
    """The `mse` observer against the optimum, found by code that is held to the published values of Max 1960.

    The published grids have 2^b levels and none at zero. A grid here has one, so that zero is exact: the optimum on
    its own levels is what the observer must reach.
    """
    assert best_uniform_gaussian(np.arange(2**bits) - (2**bits - 1) / 2) == pytest.approx(published, abs=0.02)
    for narrow in (False, True):
        low, high = int_range(bits, signed=True, narrow=narrow)
        ours = best_uniform_gaussian(np.arange(low, high + 1))
        scheme = TensorScheme(bits=bits, observer="mse", narrow_range=narrow)
        assert measure(scheme, "activation").sqnr_db == pytest.approx(ours, abs=0.1)
        assert ours < published


def test_the_curve_is_the_grid() -> None:
    curve = measure(configure(["quant.weight.bits=3", "quant.weight.granularity=tensor"]).weight, "weight")
    levels = curve.y.unique()
    assert len(levels) <= 8
    steps = levels.diff()
    torch.testing.assert_close(steps, steps[:1].expand(len(steps)))
    inside = (curve.x > curve.clip[0] + float(steps[0])) & (curve.x < curve.clip[1] - float(steps[0]))
    assert (curve.gradient[inside] == 1).all()
    assert (curve.gradient[curve.x > curve.clip[1] + float(steps[0])] == 0).all()
    assert ((curve.y - curve.x).abs()[inside] <= steps[0] / 2 + 1e-6).all()


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_command_writes_a_picture_and_says_so(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"scheme.{suffix}"
    done = subprocess.run(
        [sys.executable, "-m", "qat", "show", "--preset", "w4a4_lsq", "quant.weight.bits=3", "--out", str(out)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "quant.weight: int3 symmetric channel, learned (mse), SQNR" in done.stdout
    assert "quant.activation: int4 symmetric tensor, learned (mse), SQNR" in done.stdout
    head = out.read_bytes()[:5]
    assert head == (b"<?xml" if suffix == "svg" else b"\x89PNG\r")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is quantized; give a number of bits"),
        (["quant.weight.bits=33"], "quant.weight.bits=33"),
        (["quant.weight.bits=many"], "quant.weight.bits=many is not valid: give an integer, or null"),
        (["quant.weight.bit=3"], "did you mean 'bits'?"),
        (["quant.weight.rounding=flor"], "did you mean 'floor'?"),
        (["bits=3"], "'bits=3' is not a setting of a scheme; write it as quant.weight.bits=4"),
        (["--preset", "int9"], "did you mean 'int8'?"),
        (["quant.weight.bits=4", "--out", "scheme.doc"], "scheme.doc"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["show", *arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_presets_are_configured_as_in_python() -> None:
    assert configure([], "w4a8").weight == qat.preset("w4a8").weight
    changed = configure(["quant.activation.percentiles=[1,99]", "quant.activation.symmetric=false"], "w4a8").activation
    assert changed.percentiles == [1, 99]
    assert changed.symmetric is False


def test_random_rounding_is_drawn_as_in_training_and_is_reproducible() -> None:
    scheme = configure(["quant.weight.bits=4", "quant.weight.rounding=stochastic"]).weight
    state = torch.get_rng_state()
    curve, again = measure(scheme, "weight"), measure(scheme, "weight")
    assert torch.equal(torch.get_rng_state(), state)
    assert curve.random
    assert curve.text.endswith("stochastic (as in training)")
    assert torch.equal(curve.y, again.y)
    assert (curve.y.diff() < 0).any()  # not monotonic
    assert curve.sqnr_db < measure(configure(["quant.weight.bits=4"]).weight, "weight").sqnr_db - 2
