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
from qat.scheme import TensorScheme


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_a_uniform_signal_has_six_decibels_a_bit(bits: int) -> None:
    """6.02 b dB: uniform noise of a step against a uniform signal over all 2^b steps (Bennett 1948)."""
    x = torch.linspace(-1, 1, 2**18 + 1)[:-1] + 2**-18
    steps = 2**bits
    y = (torch.floor((x + 1) / 2 * steps).clamp(0, steps - 1) + 0.5) / steps * 2 - 1
    assert sqnr_db(x, y) == pytest.approx(20 * math.log10(2) * bits, abs=0.1)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_gaussian_at_its_best_clip(bits: int) -> None:
    """The `mse` observer's SQNR is that of the best step, found by brute force on the same kind of grid, in float64."""
    curve = measure(TensorScheme(bits=bits, observer="mse"), "activation")
    x = np.random.default_rng(0).standard_normal(200_000)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    best = max(
        10 * math.log10((x**2).sum() / ((np.clip(np.rint(x / s), low, high) * s - x) ** 2).sum())
        for s in np.linspace(0.5, 6, 300) / high
    )
    assert curve.sqnr_db == pytest.approx(best, abs=0.15)


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
