"""Which way of choosing and learning ranges is best at 4 and at 2 bits?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.pictures import dots
from experiments.results import Row, by_case, distinct, each_data, where
from experiments.study import Case, Study, main
from qat.analysis import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDS = ",".join(
    f"{{match: {end}, weight: {{bits: 8, range: dynamic, observer: minmax, gradient: clipped_ste}}, "
    "activation: {bits: 8, range: running, observer: ema, symmetric: true, gradient: clipped_ste}}"
    for end in ("first", "last")
)
"""The first and the last layer are the same for all methods: 8 bits, ranges of the extremes."""

LEARNED = ("quant.weight.range=lsq", "quant.activation.range=lsq", "quant.weight.observer=mse",
           "quant.activation.observer=mse")  # fmt: skip
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "minmax": ("minmax", ("quant.activation.range=fixed", "quant.activation.observer=minmax")),
    "ema": ("EMA", ("quant.activation.range=running", "quant.activation.observer=ema")),
    "mse": ("MSE", ("quant.weight.observer=mse", "quant.activation.range=fixed", "quant.activation.observer=mse")),
    "pact": ("PACT", ("quant.activation.range=pact",)),
    "dorefa": ("DoReFa", ("quant.weight.range=dorefa", "quant.activation.range=dorefa")),
    "lsq": ("LSQ", LEARNED),
    "lsq_plus": ("LSQ+", (*LEARNED, "quant.activation.range=lsq_plus", "quant.activation.symmetric=false")),
    "tqt": ("TQT", (*LEARNED, "quant.weight.range=tqt", "quant.activation.range=tqt")),
    "ewgs": ("EWGS", (*LEARNED, "quant.weight.gradient=ewgs", "quant.activation.gradient=ewgs")),
}
"""Name -> label, overrides. Where a method says nothing of weights, theirs are those of their largest magnitude."""


def table(rows: Sequence[Row]) -> str:
    """A line a width and method."""
    return by_case(rows, {"bits": "bits", "method": "method"}, {"ptq": "PTQ", "qat": "QAT"})


def plot(rows: Sequence[Row]) -> "Figure":
    """A panel a width, a line a method."""
    with plots.style():
        fig = plots.new_figure(8.6, 3.6)
        panels = distinct(rows, "bits")
        for axes, bits in zip(fig.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
            dots(axes, where(rows, bits=bits), "method", {name: label for name, (label, _) in METHODS.items()})
            axes.set_title(f"W{bits}A{bits}")
        axes.legend(loc="lower left")
    return fig


STUDY = Study(
    name="methods",
    data=("digits",),
    common=("quant=w4a4", "quant.weight.narrow_range=false", f"quant.rules=[{ENDS}]"),
    cases=[
        Case({"method": name, "bits": bits}, (*overrides, f"quant.weight.bits={bits}", f"quant.activation.bits={bits}"))
        for bits in (4, 2)
        for name, (_, overrides) in METHODS.items()
    ],
    tables=lambda rows: each_data([{**row, "method": METHODS[row["method"]][0]} for row in rows], table),
    plot=plot,
)

if __name__ == "__main__":
    main(STUDY)
