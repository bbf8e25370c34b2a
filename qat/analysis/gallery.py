"""Many schemes of weights on one page: where each puts its levels, and how much of a Gaussian survives."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from qat.analysis.curves import REACH, Curve, measure
from qat.analysis.plots import COLORS, INK, new_figure, style
from qat.numerics.formats import FORMATS
from qat.presets import PRESETS, preset
from qat.scheme import QuantConfig, TensorScheme, choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CHANNEL = {"granularity": "channel", "range": "dynamic"}
_TABLE = {"format": "codebook", "granularity": "tensor", "range": "learned", "narrow_range": False}


def _blocks(format: str, size: int = 32) -> dict[str, Any]:
    bits = FORMATS[format].bits[0]
    return {"format": format, "bits": bits, "granularity": "group", "group_size": size, "range": "dynamic"}


USUAL: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, **_CHANNEL},
    "e4m3fn": {"format": "e4m3fn", "bits": 8, **_CHANNEL},
    "mxfp8 (e4m3)": _blocks("mxfp8_e4m3"),
    "mxint8": _blocks("mxint8"),
    "mxfp6 (e2m3)": _blocks("mxfp6_e2m3"),
    "int4": {"bits": 4, **_CHANNEL},
    "int4 (mse)": {"bits": 4, "observer": "mse", **_CHANNEL},
    "int4 (groups of 32)": {"bits": 4, "granularity": "group", "group_size": 32, "range": "dynamic"},
    "e2m1 (mse)": {"format": "e2m1", "bits": 4, "observer": "mse", **_CHANNEL},
    "mxfp4": _blocks("mxfp4"),
    "nvfp4": _blocks("nvfp4", 16),
    "pow2 (mse)": {"format": "pow2", "bits": 4, "observer": "mse", **_CHANNEL},
    "apot (mse)": {"format": "apot", "bits": 4, "observer": "mse", **_CHANNEL},
    "codebook (16 values)": {"bits": 4, **_TABLE},
    "codebook (8 values)": {"bits": 3, **_TABLE},
    "int2 (mse)": {"bits": 2, "observer": "mse", **_CHANNEL},
    "ternary": {"format": "ternary", "bits": 2, **_CHANNEL},
    "binary": {"format": "binary", "bits": 1, **_CHANNEL},
}
"""What the gallery shows unless told otherwise: name -> fields of the weight's scheme."""


def schemes(names: Iterable[str] = ()) -> dict[str, TensorScheme]:
    """Schemes of weights by name; the usual ones without names.

    Args:
        names: presets, formats that have one width, or formats with bits (`int4`, `apot3`).

    Raises:
        ValueError: a name that is none of these.

    >>> [scheme.describe() for scheme in schemes(["int3", "w4g32"]).values()]
    ['int3 symmetric channel, dynamic (minmax)', 'int4 symmetric group 32, dynamic (minmax)']
    """
    names = list(names)
    if not names:
        return {name: _scheme(fields) for name, fields in USUAL.items()}
    valid = {name: preset(name).weight for name in PRESETS if preset(name).weight.quantized}
    for name, kind in FORMATS.items():
        for bits in kind.bits:
            key = name if len(kind.bits) == 1 else f"{name}{bits}"
            if key not in ("int1", *valid):
                valid[key] = _scheme(_usual(name, bits))
    return {name: choice("--gallery", name, valid) for name in names}


def _usual(name: str, bits: int) -> dict[str, Any]:
    """The fields of a format's most common scheme."""
    kind = FORMATS[name]
    if kind.block:
        return _blocks(name, kind.block)
    if kind.vectors:
        return {"format": name, "bits": bits, "granularity": "group", "group_size": 4, "range": "learned"}
    if kind.fitted and kind.grid is None:
        return {**_TABLE, "format": name, "bits": bits}
    if kind.unit_scale:
        return {"format": name, "bits": bits, "granularity": "tensor", "range": "fixed"}
    return {"format": name, "bits": bits, **_CHANNEL}


def _scheme(fields: Mapping[str, Any]) -> TensorScheme:
    return QuantConfig.from_dict({"weight": fields}).weight


def measured(named: Mapping[str, TensorScheme]) -> dict[str, Curve]:
    """The curves of the schemes, most bits first, then the best."""
    curves = {name: measure(scheme, "weight") for name, scheme in named.items()}
    return dict(sorted(curves.items(), key=lambda item: (-item[1].width, -item[1].sqnr_db)))


def figure(curves: Mapping[str, Curve]) -> "Figure":
    """A row a scheme: its levels on the density of the weights, bits a weight, and SQNR beside Shannon's limit."""
    rows = list(curves.values())
    widths = sorted({curve.width for curve in rows}, reverse=True)
    colors = [COLORS[widths.index(curve.width) % len(COLORS)] for curve in rows]
    with style():
        fig = new_figure(9, 1.0 + 0.31 * len(rows))
        levels, bars = fig.subplots(1, 2, width_ratios=[5, 4])
        for i, (curve, color) in enumerate(zip(rows, colors, strict=True)):
            _levels(levels, curve, i, color)
        levels.set_xlim(-REACH, REACH)
        levels.set_xlabel("weight, in standard deviations")
        levels.set_title("levels, on the density of the weights", fontsize=9)
        levels.set_yticks(range(len(rows)), list(curves))
        _bars(bars, rows, colors)
        for axes in (levels, bars):
            axes.set_ylim(len(rows) - 0.45, -0.55)
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            for i in range(1, len(rows)):
                if rows[i].width != rows[i - 1].width:
                    axes.axhline(i - 0.5, color=INK, linewidth=0.5, alpha=0.5)
    return fig


def _levels(axes: "Axes", curve: Curve, row: int, color: str) -> None:
    """Ticks in one path: a level each would be a hundred times the file."""
    x = np.linspace(-3.6, 3.6, 37)
    axes.fill_between(x, row + 0.42 - 0.84 * np.exp(-(x**2) / 2), row + 0.42, color=INK, alpha=0.16, linewidth=0)
    levels = curve.levels[curve.levels.abs() <= REACH].numpy().astype(float)
    levels = np.unique(levels.round(3))  # finer is no picture
    up, down, gap = np.full_like(levels, row - 0.22), np.full_like(levels, row + 0.42), np.full_like(levels, np.nan)
    axes.plot(
        np.stack([levels, levels, gap], 1).ravel(), np.stack([up, down, gap], 1).ravel(), color=color,
        linewidth=min(max(30 / len(levels), 0.35), 1.6), solid_capstyle="butt",
    )  # fmt: skip


def _bars(axes: "Axes", rows: Sequence[Curve], colors: Sequence[str]) -> None:
    ratios = [curve.sqnr_db for curve in rows]
    limits = [20 * math.log10(2) * curve.bits for curve in rows]
    axes.barh(range(len(rows)), ratios, color=colors, height=0.6)
    for i, (ratio, limit) in enumerate(zip(ratios, limits, strict=True)):
        inside = ratio > 0.07 * max(limits)  # where there is room
        axes.annotate(
            f"{ratio:.1f}", (ratio if inside else max(ratio, limit), i), xytext=(-3 if inside else 5, 0),
            textcoords="offset points", ha="right" if inside else "left", va="center_baseline", fontsize=8,
            color="white" if inside else INK,
        )  # fmt: skip
    axes.plot(limits, range(len(rows)), color=INK, linestyle="none", marker="|", markersize=9, markeredgewidth=1.4)
    axes.set_yticks(range(len(rows)), [f"{curve.bits:.2f}" for curve in rows])
    axes.set_xlim(0, 1.08 * max(limits))
    axes.set_title("SQNR (dB)", fontsize=9)
    axes.set_xlabel("| Shannon's limit for so many bits")
    axes.annotate("bits a\nweight", (0, 1), xycoords="axes fraction", xytext=(-4, 4), textcoords="offset points",
                  ha="right", fontsize=8)  # fmt: skip
