"""What does a number format cost a small language model, in bits per character?"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from experiments.pictures import sizes
from experiments.results import Row, by_case, each_data
from experiments.study import Case, Study, main
from qat.analysis import plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = {
    "int8": ("int8", "W8A8"),
    "int4 group 32": ("w4g32", "weights alone"),
    "fp8": ("fp8", "e4m3 both"),
    "NVFP4": ("nvfp4", "blocks of 16, both"),
    "ternary": ("ternary", "ternary weights, A8"),
}
"""Name -> preset, what it quantizes."""


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
    cases=[Case({"format": name, "what": what}, (f"quant={preset}",)) for name, (preset, what) in FORMATS.items()],
    tables=lambda rows: each_data(
        rows,
        lambda own: by_case(
            own,
            {"format": "format", "what": "what"},
            {"ptq": "PTQ", "qat": "QAT", "int8_bytes": "file, KB", "float_bytes": "float file, KB"},
        ),
    ),
    plot=plot,
)

if __name__ == "__main__":
    main(STUDY)
