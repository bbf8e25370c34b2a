"""How fine must scales be, and which half needs a zero point?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.pictures import dots
from experiments.results import NAMES, Row, by_case, distinct, each_data, where
from experiments.study import Case, Study, main
from qat.analysis import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = {
    "tensor": ("quant.weight.granularity=tensor",),
    "channel": ("quant.weight.granularity=channel",),
    **{
        f"group {size}": (
            "quant.weight.granularity=group", f"quant.weight.group_size={size}", "quant.weight.allow_padding=true"
        )
        for size in (128, 64, 32)
    },
}  # fmt: skip
ASYMMETRIC = {
    "activations": ("quant.activation.symmetric=false", "quant.input.symmetric=false"),
    "weights": ("quant.weight.symmetric=false", "quant.weight.narrow_range=false"),
}
"""Which half has zero points; the other is symmetric."""


def plot(rows: Sequence[Row]) -> "Figure":
    """A panel a set of data, a line a granularity; circles where activations have the zero point, squares weights."""
    data = distinct(rows, "data")
    with plots.style():
        fig = plots.new_figure(8.6, 3.2)
        for axes, name in zip(fig.subplots(1, len(data), sharey=True, squeeze=False)[0], data, strict=True):
            for zero_point, shift, marker in (("activations", -0.14, "o"), ("weights", 0.14, "s")):
                stages = {
                    "ptq": (plots.STAGE_COLORS["ptq"], f"PTQ, zero point of {zero_point}"),
                    "qat": (plots.STAGE_COLORS["qat"], f"QAT, zero point of {zero_point}"),
                }
                if own := where(rows, data=name, zero_point=zero_point):
                    dots(axes, own, "scales", {scale: scale for scale in SCALES}, shift, stages, marker)
            axes.set_title(NAMES[name])
        handles, labels = axes.get_legend_handles_labels()
        fig.legend(handles, labels, loc="outside lower center", ncols=4)
    return fig


STUDY = Study(
    name="granularity",
    data=("digits", "fashion"),
    common=("quant=w4a4", "quant.rules=[]", "quant.weight.bits=3", "quant.activation.bits=4"),
    cases=[
        Case({"scales": scale, "zero_point": half}, (*overrides, *asymmetric))
        for half, asymmetric in ASYMMETRIC.items()
        for scale, overrides in SCALES.items()
    ],
    tables=lambda rows: each_data(
        rows,
        lambda own: by_case(
            own,
            {"scales": "one scale a weight's", "zero_point": "zero points of"},
            {"ptq": "PTQ", "qat": "QAT", "int8_bytes": "file, KB"},
        ),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(STUDY)
