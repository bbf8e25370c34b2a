"""What does a number format cost a small language model, in bits per character?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.pictures import sizes
from experiments.results import Row, by_case, each_data
from experiments.study import Case, Study, main
from qat.analysis import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {"int8": "int8", "int4 group": "w4g32", "fp8": "fp8", "NVFP4": "nvfp4", "ternary": "ternary"}
"""Name -> preset."""


def plot(rows: Sequence[Row]) -> "Figure":
    """Size against bits per character."""
    families = {name: (color, [name]) for name, color in zip(FORMATS, plots.COLORS, strict=False)}
    with plots.style():
        fig = plots.new_figure(6.6, 4.0)
        axes = fig.subplots()
        sizes(axes, rows, "format", families, {name: name for name in FORMATS})
        axes.set_title("After training (hollow: before); dashed: float, fewer bits are better")
        axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    return fig


STUDY = Study(
    name="char_gpt",
    data=("text",),
    cases=[Case({"format": name, "preset": preset}, (f"quant={preset}",)) for name, preset in FORMATS.items()],
    tables=lambda rows: each_data(
        rows,
        lambda own: by_case(
            own,
            {"format": "format", "preset": "`quant=`"},
            {"ptq": "PTQ", "qat": "QAT", "int8_bytes": "file, KB", "float_bytes": "float file, KB"},
        ),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(STUDY)
