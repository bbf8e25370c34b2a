"""What does the rounding of weights do, before and after training?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.pictures import dots
from experiments.results import NAMES, Row, by_case, distinct, each_data, where
from experiments.study import Case, Study, main
from qat.analysis import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODES = ("nearest", "stochastic", "adaptive", "truncate", "floor", "ceil", "logarithmic")
BITS = (4, 3)


def plot(rows: Sequence[Row]) -> "Figure":
    """A panel a width and set of data, a line a mode."""
    panels = [(data, bits) for data in distinct(rows, "data") for bits in distinct(rows, "bits")]
    with plots.style():
        fig = plots.new_figure(4.3 * len(panels), 3.2)
        for axes, (data, bits) in zip(fig.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True):
            dots(axes, where(rows, data=data, bits=bits), "rounding", {mode: mode for mode in MODES})
            axes.set_title(f"{NAMES[data]}, W{bits}A8")
        axes.legend(loc="lower left")
    return fig


STUDY = Study(
    name="rounding",
    data=("digits",),
    common=("quant=w4a8", "ptq.adaptive_rounding_steps=300"),
    cases=[
        Case({"bits": bits, "rounding": mode}, (f"quant.weight.bits={bits}", f"quant.weight.rounding={mode}"))
        for bits in BITS
        for mode in MODES
    ],
    seeds=(0, 1, 2, 3, 4),
    one_float=True,
    tables=lambda rows: each_data(
        rows, lambda own: by_case(own, {"bits": "bits", "rounding": "rounding"}, {"ptq": "PTQ", "qat": "QAT"})
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(STUDY)
