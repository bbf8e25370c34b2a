"""At equal bits, do weights on levels of their own (k-means, product codes) beat evenly spaced ones?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.pictures import sizes
from experiments.results import Row, by_case, each_data
from experiments.study import Case, Study, main
from qat.analysis import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def uniform(bits: int) -> tuple[str, ...]:
    """Integers with a learned scale a channel."""
    return ("quant=w4a4_lsq", "quant.rules=[]", f"quant.weight.bits={bits}", "quant.activation.bits=null",
            "quant.input.bits=null")  # fmt: skip


def k_means(bits: int) -> tuple[str, ...]:
    """A learned table of 2 ** bits values a layer."""
    return ("quant=codebook4", f"quant.weight.bits={bits}")


def product(width: int, bits: int) -> tuple[str, ...]:
    """A learned table of 2 ** bits vectors of `width` weights: bits / width a weight."""
    return ("quant=codebook4", "quant.weight.format=product", f"quant.weight.bits={bits}",
            "quant.weight.granularity=group", f"quant.weight.group_size={width}")  # fmt: skip


FORMS: dict[str, tuple[float, str, tuple[str, ...]]] = {
    "uniform 2": (2, "uniform", uniform(2)),
    "uniform 3": (3, "uniform", uniform(3)),
    "uniform 4": (4, "uniform", uniform(4)),
    "k-means 1": (1, "k-means", k_means(1)),
    "k-means 2": (2, "k-means", k_means(2)),
    "k-means 3": (3, "k-means", k_means(3)),
    "k-means 4": (4, "k-means", k_means(4)),
    "product 8x8": (1, "product", product(8, 8)),
    "product 4x8": (2, "product", product(4, 8)),
    "product 2x6": (3, "product", product(2, 6)),
    "product 2x8": (4, "product", product(2, 8)),
}
"""Name -> bits a weight, family, overrides. `product 4x8`: vectors of 4 weights, one of 2 ** 8."""
COLORS = dict(zip(("uniform", "k-means", "product"), plots.COLORS, strict=False))


def plot(rows: Sequence[Row]) -> "Figure":
    """Size against accuracy, a line a family."""
    families = {
        family: (color, [name for name, (_, of, _) in FORMS.items() if of == family])
        for family, color in COLORS.items()
    }
    with plots.style():
        fig = plots.new_figure(6.6, 4.0)
        axes = fig.subplots()
        sizes(axes, rows, "form", families, {name: f"{bits:g}" for name, (bits, _, _) in FORMS.items()})
        axes.set_title("After training (hollow: before), at the bits a weight beside each point")
        axes.legend(loc="lower right")
    return fig


STUDY = Study(
    name="nonuniform",
    data=("fashion",),
    cases=[Case({"form": name, "bits": bits}, overrides) for name, (bits, _, overrides) in FORMS.items()],
    tables=lambda rows: each_data(
        rows,
        lambda own: by_case(
            own, {"bits": "bits a weight", "form": "form"}, {"ptq": "PTQ", "qat": "QAT", "int8_bytes": "file, KB"}
        ),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(STUDY)
