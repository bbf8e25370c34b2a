"""How many bits do weights and activations need, and when does training with quantization pay?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.results import NAMES, Row, distinct, each_data, markdown, mean, text, where
from experiments.study import Case, Study, main
from qat.analysis import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BITS = (2, 3, 4, 6, 8)


def matrix(rows: Sequence[Row]) -> str:
    """Bits of weights downwards, of activations across; PTQ / QAT."""
    across = distinct(rows, "activations")
    lines = []
    for stage in ("ptq", "qat"):
        for weights in distinct(rows, "weights"):
            cells = [text(where(rows, weights=weights, activations=a), stage) for a in across]
            lines.append([stage.upper(), f"W{weights}", *cells])
    return markdown(["", "", *(f"A{a}" for a in across)], lines)


def plot(rows: Sequence[Row]) -> "Figure":
    """Points below float of each pair of widths: PTQ on the left, QAT on the right."""
    from matplotlib.colors import LinearSegmentedColormap, SymLogNorm

    data = distinct(rows, "data")
    weights, across = distinct(rows, "weights"), distinct(rows, "activations")
    colors = LinearSegmentedColormap.from_list("loss", ["#2f9e77", "#e9e4d0", "#d9822b", "#9b2c36"])
    norm = SymLogNorm(linthresh=1, vmin=0, vmax=90)
    with plots.style():
        fig = plots.new_figure(7.6, 3.5 * len(data))
        grid = fig.subplots(len(data), 2, squeeze=False)
        for name, line in zip(data, grid, strict=True):
            for axes, stage in zip(line, ("ptq", "qat"), strict=True):
                cells = [[where(rows, data=name, weights=w, activations=a) for a in across] for w in weights]
                loss = [[mean(cell, "float") - mean(cell, stage) for cell in row] for row in cells]
                axes.imshow([[max(v, 0) for v in row] for row in loss], cmap=colors, norm=norm)
                for i, row in enumerate(loss):
                    for j, value in enumerate(row):
                        words = f"{-value:+.1f}".replace("-", "\N{MINUS SIGN}") if abs(value) >= 0.05 else "0"
                        axes.text(j, i, words, ha="center", va="center",
                                  fontsize=8, color="white" if value > 12 or value < 0.6 else "#333333")  # fmt: skip
                axes.set_xticks(range(len(across)), [f"A{a}" for a in across])
                axes.set_yticks(range(len(weights)), [f"W{w}" for w in weights])
                axes.tick_params(length=0)
                axes.spines[:].set_visible(False)
                axes.set_title(f"{NAMES[name]}: {stage.upper()}, points from float")
    return fig


STUDY = Study(
    name="bit_widths",
    data=("digits", "fashion"),
    common=("quant=w4a4_lsq", "quant.rules=[]"),
    cases=[
        Case({"weights": w, "activations": a}, (f"quant.weight.bits={w}", f"quant.activation.bits={a}"))
        for w in BITS
        for a in BITS
    ],
    tables=lambda rows: each_data(rows, matrix),
    plot=plot,
)

if __name__ == "__main__":
    main(STUDY)
