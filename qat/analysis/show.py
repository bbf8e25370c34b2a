"""Draw a quantization scheme: its transfer curve, its error and its gradient, with the noise that it adds.

Settings are written as for train.py, `quant.weight.X=Y` and `quant.activation.X=Y`. The weight stands for 256 output
channels of 576 values, the activation for 64 batches of 2,304 values; both are drawn from a standard Gaussian.

  python -m qat show quant.weight.bits=3 quant.weight.rounding=floor
  python -m qat show --preset w4a4_lsq --out schemes.png
"""

import argparse
import dataclasses
import json
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qat.analysis.plots import COLORS, INK, new_figure, save, style
from qat.fake_quant import FakeQuantize, Mode
from qat.numerics.rounding import SETTLED
from qat.presets import PRESETS, fields
from qat.scheme import Granularity, QuantConfig, TensorScheme, choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PARTS = ("weight", "activation")
WEIGHT = (256, 576)
BATCHES = 64
REACH = 4.0
"""Curves are drawn over so many standard deviations to either side."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `show` takes on the command line."""
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="quant.PART.FIELD=VALUE",
        help="a field of the scheme of a PART, weight or activation: bits, rounding, observer, symmetric, ...",
    )
    parser.add_argument("--preset", metavar="NAME", default="off", help=f"start from a preset: {', '.join(PRESETS)}")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("scheme.svg"),
                        help="the picture, .svg or .png (default: %(default)s)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Draw, write, and say what was written.

    Raises:
        ValueError: a setting, the preset or the file's suffix is not valid, or nothing is quantized.
        OSError: the file cannot be written.
    """
    config = configure(args.settings, args.preset)
    parts = [part for part in PARTS if getattr(config, part).quantized]
    if not parts:
        raise ValueError(
            "nothing is quantized; give a number of bits, for example quant.weight.bits=4, or --preset int8"
        )
    curves = {f"quant.{part}": measure(getattr(config, part), part) for part in parts}
    path = save(figure(curves), args.out)
    for name, curve in curves.items():
        print(f"{name}: {curve.text}, SQNR {curve.sqnr_db:.2f} dB")
    print(f"wrote {path}")


def configure(settings: Sequence[str], preset: str = "off") -> QuantConfig:
    """A preset with changes as on Hydra's command line: `quant.weight.bits=3`.

    Raises:
        ValueError: names the setting and what would be valid.

    >>> configure(["quant.weight.bits=3", "quant.weight.rounding=floor"]).weight.describe()
    'int3 symmetric channel, dynamic (minmax)'
    """
    choice("preset", preset, PRESETS)
    data = {key: value for key, value in fields(preset, "generic").items() if key != "rules"}
    kinds = typing.get_type_hints(TensorScheme)
    for setting in settings:
        path, equals, text = setting.partition("=")
        names = path.split(".")
        if not equals or len(names) != 3 or names[0] != "quant":
            raise ValueError(f"'{setting}' is not a setting of a scheme; write it as quant.weight.bits=4")
        _, part, name = names
        choice("quant: part", part, PARTS)
        choice(f"quant.{part}: field", name, kinds)
        data[part] = {**data.get(part, {}), name: _value(path, text, kinds[name])}
    return QuantConfig.from_dict(data)


def _value(where: str, text: str, kind: Any) -> Any:
    """`text` as a value of a field's type; names of enums stay text, which `from_dict` resolves."""
    if kind is str or kind is Granularity:
        return text
    try:
        value = json.loads(text.lower())
    except json.JSONDecodeError:
        value = text
    number = isinstance(value, int | float) and not isinstance(value, bool)
    options = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is list:
        valid, words = isinstance(value, list) and all(isinstance(v, int | float) for v in value), "a list, [0.1,99.9]"
    elif kind is float:
        valid, words = number, "a number"
    elif int in options:
        valid, words = (number and isinstance(value, int)) or value is None, "an integer, or null"
    else:
        valid = isinstance(value, bool) or (value is None and type(None) in options)
        words = "true, false or null" if type(None) in options else "true or false"
    if not valid:
        raise ValueError(f"{where}={text} is not valid: give {words}")
    return value


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A scheme on a standard Gaussian.

    Attributes:
        text: the scheme in words.
        sqnr_db: signal to quantization noise, with every scale that the scheme has.
        x: inputs, ascending.
        y: dequantized outputs, by the median of the scales.
        gradient: d y / d x that training sees.
        clip: smallest and largest value of the grid.
        random: whether equal inputs can give different outputs.
    """

    text: str
    sqnr_db: float
    x: Tensor
    y: Tensor
    gradient: Tensor
    clip: tuple[float, float]
    random: bool = False


def sqnr_db(x: Tensor, x_dq: Tensor) -> float:
    """Signal to quantization noise, `10 log10(sum x^2 / sum (x_dq - x)^2)`; infinite where there is no noise."""
    noise = float((x_dq - x).double().square().sum())
    return 10 * math.log10(float(x.double().square().sum()) / noise) if noise else math.inf


def measure(scheme: TensorScheme, part: str, points: int = 4001, seed: int = 0) -> Curve:
    """Quantize a standard Gaussian by a scheme, as training does, after calibration.

    Args:
        scheme: quantized.
        part: `weight` or `activation`.
        points: inputs of the curves.
        seed: of the sample, and of random rounding (torch's generators are left as they were).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _measure(scheme, part, points)


def _measure(scheme: TensorScheme, part: str, points: int) -> Curve:
    sample = torch.randn(WEIGHT)
    if part == "weight":
        quantizer = FakeQuantize(scheme, sample.shape)
        quantizer.set_range_from(sample)
    else:
        quantizer = FakeQuantize(dataclasses.replace(scheme, range="fixed"))  # not moved by what is measured
        for batch in sample.chunk(BATCHES):
            quantizer.observe(batch)
        quantizer.set_range_from_observer()
    quantizer.mode = Mode.quantize
    with torch.no_grad():
        ratio = sqnr_db(sample, quantizer(sample))
        scale, zero_point = quantizer.qparams(sample)
    middle = scale.flatten().sort().indices[scale.numel() // 2]
    one = dataclasses.replace(scheme, range="fixed", granularity=Granularity.tensor, group_size=None)
    drawn = FakeQuantize(one)
    drawn.scale.copy_(scale.flatten()[middle])
    drawn.zero_point.copy_(zero_point.flatten()[middle])
    drawn.mode = Mode.quantize
    x = torch.linspace(-REACH, REACH, points, requires_grad=True)
    y = drawn(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    grid = torch.tensor([drawn.quant_min, drawn.quant_max])
    low, high = ((grid - drawn.zero_point) * drawn.scale).tolist()
    random = scheme.rounding in SETTLED
    text = scheme.describe()
    if scheme.rounding != "nearest":
        text += f", {scheme.rounding}{' (as in training)' if random else ''}"
    return Curve(
        text=text, sqnr_db=ratio, x=x.detach(), y=y.detach(), gradient=gradient, clip=(low, high), random=random
    )


def figure(curves: dict[str, Curve]) -> "Figure":
    """A row of three panels a scheme: output, error and gradient against the input; clipped inputs are shaded."""
    with style():
        fig = new_figure(9, 3.1 * len(curves))
        rows = fig.subfigures(len(curves), 1, squeeze=False)[:, 0]
        for row, (name, curve) in zip(rows, curves.items(), strict=True):
            row.suptitle(f"{name}: {curve.text}.  SQNR {curve.sqnr_db:.2f} dB", fontsize=11, x=0.01, ha="left")
            output, error, slope = row.subplots(1, 3, sharex=True)
            _output(output, curve)
            _line(error, curve, curve.y - curve.x, "error (output \N{MINUS SIGN} input)", COLORS[1])
            inside = (curve.y - curve.x)[(curve.x >= curve.clip[0]) & (curve.x <= curve.clip[1])].abs()
            reach = 1.6 * float(inside.max() if inside.numel() else 1.0)
            error.set_ylim(-reach, reach)
            _line(slope, curve, curve.gradient, "gradient", COLORS[2])
            slope.set_ylim(-0.1, 1.3 * max(1.0, float(curve.gradient.max())))
    return fig


def _output(axes: "Axes", curve: Curve) -> None:
    density = torch.exp(-curve.x.square() / 2)
    axes.fill_between(curve.x, -REACH, density * REACH * 0.75 - REACH, color=INK, alpha=0.15, linewidth=0)
    axes.plot(curve.x, curve.x, color=INK, linewidth=0.8, linestyle=":")
    _line(axes, curve, curve.y, "output", COLORS[0])
    axes.set_ylim(-REACH, REACH)
    axes.annotate(
        "density of the input", (0, -REACH), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7
    )


def _line(axes: "Axes", curve: Curve, values: Tensor, title: str, color: str) -> None:
    if curve.random:  # a line through random values would be a solid block
        axes.plot(curve.x, values, color=color, linestyle="none", marker=".", markersize=1.5, markeredgewidth=0)
    else:
        axes.plot(curve.x, values, color=color, linewidth=1.3)
    low, high = curve.clip
    for start, end in ((-REACH, low), (high, REACH)):
        if start < end:
            axes.axvspan(start, end, color=INK, alpha=0.10, linewidth=0)
    axes.set_xlim(-REACH, REACH)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("input")
    axes.grid()
