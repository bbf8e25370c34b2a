"""What HTML pages are made of: cells and tables, and a template that they share (`pages/base.html`).

A page is one file: its style and scripts stand in it, nothing is loaded, and it is readable in light and dark, on
paper, and by keyboard. A template extends `base.html` and fills its blocks `main`, `style`, `data`, `script`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from qat.analysis.summary import MISSING


class Column(NamedTuple):
    """A column's heading, whether its cells are numbers, and what hovering over the heading explains."""

    heading: str
    numeric: bool = False
    help: str = ""


class Cell(NamedTuple):
    """What is shown; what to sort by (None sorts last); the length of a bar behind a number, in [0, 1]."""

    text: str
    value: float | str | None = None
    share: float | None = None


@dataclass
class Table:
    """A table of a page.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: cells; the first of a row is its heading.
        sortable: whether headings are buttons that sort.
        opens: for each row a key of what a click on its heading unfolds (the page's script does), or empty.
    """

    caption: str
    columns: list[Column]
    rows: list[list[Cell]] = field(default_factory=list)
    sortable: bool = True
    opens: list[str] = field(default_factory=list)


def number_cell(value: float | None, text: Callable[[float | None], str], largest: float | None = None) -> Cell:
    """A number, and a bar where it is a part of the column's `largest`.

    >>> number_cell(3, str, 4), number_cell(3, str)
    (Cell(text='3', value=3, share=0.75), Cell(text='3', value=3, share=None))
    """
    share = None if value is None or not largest else min(max(value / largest, 0.0), 1.0)
    return Cell(text(value), value, share)


def words_cell(value: Any) -> Cell:
    """A text, or a dash for nothing."""
    return Cell(MISSING) if value in (None, "") else Cell(str(value), str(value))


def shape_cell(shape: Sequence[int] | None) -> Cell:
    """A shape, which sorts by the first dimension, then the next: as text of fixed width."""
    if shape is None:
        return Cell(MISSING)
    return Cell("\N{MULTIPLICATION SIGN}".join(map(str, shape)), " ".join(f"{size:09d}" for size in shape))


def render(template: str, path: Path | str, **values: Any) -> Path:
    """Fill a template of `pages/` and write the page.

    Args:
        template: its name.
        path: the HTML file.
        values: what it names; `name` is the page's title.

    Returns:
        The path.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(environment.get_template(template).render(**values), encoding="utf-8")
    return path
