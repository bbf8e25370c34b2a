"""Draw quantization schemes: transfer curve, error and gradient of one, or the levels of many side by side.

Settings are written as for train.py, `quant.weight.X=Y`, `quant.activation.X=Y` and `quant.input.X=Y`. The weight is
that of a convolution of 256 output channels with 576 values each, the activation comes in 64 batches of 4 tokens of 576
channels; both are drawn from a standard Gaussian.

  python -m qat show quant.weight.bits=3 quant.weight.rounding=floor
  python -m qat show --preset w4a4_lsq --out schemes.png
  python -m qat show 'quant.weight.block_size=[16,16]' quant.weight.granularity=block quant.weight.bits=4

With --gallery, weights in many schemes on one page, sorted by bits: the usual formats, or those that you name (presets,
formats, or formats with bits: mxfp4, int4, apot3). Settings describe one more.

  python -m qat show --gallery
  python -m qat show --gallery int4 mxfp4 nvfp4 codebook4 quant.weight.bits=4 quant.weight.observer=lp
"""

import argparse
import json
import math
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, equal, exp

from qat.analysis import gallery
from qat.analysis.curves import REACH, Curve, measure, sqnr_db
from qat.analysis.plots import COLORS, INK, new_figure, save, style
from qat.presets import PRESETS, fields
from qat.scheme import Granularity, LayerRule, QuantConfig, TensorScheme, choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Curve", "configure", "figure", "measure", "sqnr_db"]

PARTS = ("weight", "activation", "input")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `show` takes on the command line."""
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="quant.PART.FIELD=VALUE",
        help="a field of the scheme of a PART, weight, activation or input: bits, format, rounding, observer, ...",
    )
    parser.add_argument("--preset", metavar="NAME", default="off", help=f"start from a preset: {', '.join(PRESETS)}")
    parser.add_argument("--gallery", metavar="NAME", nargs="*",
                        help="many schemes of weights on one page; without names, the usual formats")  # fmt: skip
    parser.add_argument("--out", metavar="FILE", type=Path,
                        help="the picture, .svg or .png (default: scheme.svg, or formats.svg)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Draw, write, and say what was written.

    Raises:
        ValueError: a setting, the preset or the file's suffix is not valid, or nothing is quantized.
        OSError: the file cannot be written.
    """
    if args.gallery is not None:
        _run_gallery(args)
        return
    config = configure(args.settings, args.preset)
    parts = [part for part in PARTS if getattr(config, part).quantized]
    if not parts:
        raise ValueError(
            "nothing is quantized; give a number of bits, for example quant.weight.bits=4, or --preset int8"
        )
    curves = {f"quant.{part}": measure(getattr(config, part), part) for part in parts}
    if len(parts) > 1 and parts[-1] == "input" and config.input == config.activation:
        del curves["quant.input"]
        print("quant.input is as quant.activation")
    path = save(figure(curves), args.out or "scheme.svg")
    for name, curve in curves.items():
        print(f"{name}: {curve.text}, SQNR {curve.sqnr_db:.2f} dB")
        for note in curve.notes:
            print(f"  {note}")
    if config.rules:
        print(f"rules are not drawn: {'; '.join(_rule(rule) for rule in config.rules)}")
    print(f"wrote {path}")


def _run_gallery(args: argparse.Namespace) -> None:
    """Names and settings may come in any order: argparse gives those behind --gallery to it."""
    names = [name for name in args.gallery if "=" not in name]
    settings = [*args.settings, *(name for name in args.gallery if "=" in name)]
    schemes = gallery.schemes(names)
    if settings or args.preset != "off":
        schemes["yours"] = configure(settings, args.preset).weight
        if not schemes["yours"].quantized:
            raise ValueError("the gallery shows weights, and yours stay float; give quant.weight.bits=4, for example")
    rows = gallery.measured(schemes)
    path = save(gallery.figure(rows), args.out or "formats.svg")
    for name, curve in rows.items():
        print(f"{name:24} {curve.bits:6.2f} bits  {curve.sqnr_db:6.2f} dB  {curve.text}")
    print(f"wrote {path}")


def _rule(rule: LayerRule) -> str:
    changes = [f"{part}.{k}={v}" for part in ("weight", "activation") for k, v in getattr(rule, part).items()]
    return f"{rule.match} ({', '.join(changes)})"


def configure(settings: Sequence[str], preset: str = "off") -> QuantConfig:
    """A preset with changes as on Hydra's command line: `quant.weight.bits=3`.

    Raises:
        ValueError: names the setting and what would be valid.

    >>> configure(["quant.weight.bits=3", "quant.weight.rounding=floor"]).weight.describe()
    'int3 symmetric channel, dynamic (minmax)'
    """
    choice("preset", preset, PRESETS)
    data: dict[str, Any] = fields(preset, "generic")
    kinds = typing.get_type_hints(TensorScheme)
    for setting in settings:
        path, equals, text = setting.partition("=")
        names = path.split(".")
        if equals and names[:2] == ["quant", "rules"]:
            raise ValueError("quant.rules: rules are not drawn; describe a layer's scheme by quant.weight.bits=8")
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
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if (value is None and type(None) in options) or any(_fits(value, option) for option in options):
        return value
    words = [_WORDS[typing.get_origin(option) or option, *typing.get_args(option)] for option in options]
    raise ValueError(f"{where}={text} is not valid: give {', or '.join(words)}")


_WORDS: Mapping[tuple[Any, ...], str] = {
    (bool,): "true or false",
    (int,): "an integer",
    (float,): "a number",
    (list, int): "a list, [16,16]",
    (list, float): "a list, [0.1,99.9]",
    (types.NoneType,): "null",
}


def _fits(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(v, typing.get_args(kind)[0]) for v in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def figure(curves: dict[str, Curve]) -> "Figure":
    """A row of three panels a scheme: output, error and gradient against the input; clipped inputs are shaded."""
    with style():
        heights = [2.9 + 0.16 * len(_notes(curve)) for curve in curves.values()]
        fig = new_figure(9, sum(heights))
        rows = fig.subfigures(len(curves), 1, squeeze=False, height_ratios=heights)[:, 0]
        for row, (name, curve) in zip(rows, curves.items(), strict=True):
            title = [f"{name}: {curve.text}.  SQNR {curve.sqnr_db:.2f} dB", *_notes(curve)]
            row.suptitle("\n".join(title), fontsize=10, x=0.01, ha="left")
            output, error, slope = row.subplots(1, 3, sharex=True)
            _output(output, curve)
            _error(error, curve)
            _gradients(slope, curve)
    return fig


def _notes(curve: Curve) -> list[str]:
    return textwrap.wrap("; ".join(curve.notes), 115)


def _output(axes: "Axes", curve: Curve) -> None:
    density = exp(-curve.x.square() / 2)
    axes.fill_between(curve.x, -REACH, density * REACH * 0.75 - REACH, color=INK, alpha=0.15, linewidth=0)
    axes.plot(curve.x, curve.ideal, color=INK, linewidth=0.8, linestyle=":")
    _line(axes, curve, curve.y, COLORS[0])
    _frame(axes, curve, "output")
    axes.set_ylim(-REACH, REACH)
    axes.annotate(
        "density of the input", (0, -REACH), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7
    )


def _error(axes: "Axes", curve: Curve) -> None:
    """The axis ends a little beyond the error of what is not clipped."""
    error = curve.y - curve.ideal
    _line(axes, curve, error, COLORS[1])
    _frame(axes, curve, "error (output \N{MINUS SIGN} input)" if equal(curve.ideal, curve.x) else "error")
    inside = error[(curve.x >= curve.clip[0]) & (curve.x <= curve.clip[1])].abs()
    reach = 1.6 * float(inside.max() if inside.numel() else 1.0)
    axes.set_ylim(-reach, reach)


def _gradients(axes: "Axes", curve: Curve) -> None:
    for i, (label, gradient) in enumerate(curve.gradients.items()):
        _line(axes, curve, gradient, COLORS[2 + i], label=label)
    _frame(axes, curve, "gradient")
    values = [g[(curve.x > curve.clip[0]) & (curve.x < curve.clip[1])] for g in curve.gradients.values()]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    if 0.8 < low < high < 1.2:  # a gradient that differs a little from 1, which is all there is to see
        reach = max(1 - low, high - 1)
        axes.set_ylim(1 - 1.4 * reach, 1 + 2.2 * reach)
        if min(math.fabs(c) for c in curve.clip) < REACH:
            axes.annotate("0 where clipped", (0.5, 0), xycoords="axes fraction", xytext=(0, 3),
                          textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
    else:
        axes.set_ylim(-0.1, (1.3 if len(values) == 1 else 1.5) * max(1.0, high))
    if len(values) > 1 or "" not in curve.gradients:
        axes.legend(loc="upper center", ncols=1, fontsize=7)


def _line(axes: "Axes", curve: Curve, values: Tensor, color: str, label: str = "") -> None:
    if curve.random:  # a line through random values would be a solid block
        look: dict[str, Any] = {"linestyle": "none", "marker": ".", "markersize": 1.5, "markeredgewidth": 0}
    else:
        look = {"linewidth": 1.3}
    axes.plot(curve.x, values, color=color, label=label, **look)


def _frame(axes: "Axes", curve: Curve, title: str) -> None:
    low, high = curve.clip
    for start, end in ((-REACH, low), (high, REACH)):
        if start < end:
            axes.axvspan(start, end, color=INK, alpha=0.10, linewidth=0)
    axes.set_xlim(-REACH, REACH)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("input")
    axes.grid()
