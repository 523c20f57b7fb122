"""Results as Markdown tables, CSV and pictures."""

import csv
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_atomically


if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without a line break at its end. A `|` in a cell is escaped.

    Raises:
        ValueError: if there is no column, a row has another number of cells, or a cell has a line break.
    """
    if len(header) == 0:
        raise ValueError("the header is empty, but a table needs at least one column")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {i} has {len(row)} cells, but there are {len(header)} columns ({', '.join(header)})")
    for cell in (cell for row in [header, *rows] for cell in row):
        if "\n" in cell:
            raise ValueError(f"the cell {cell!r} has a line break: put it on one line")
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "-|" * len(header), *lines[1:]])


def one_line(name: str) -> str:
    """A name from data without line breaks and characters that cannot be printed."""
    return " ".join("".join(character if character.isprintable() else " " for character in name).split())


def spreadsheet_cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front; anything else stays."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table in which no cell is one that a spreadsheet would compute. What is not UTF-8 is written as an escape such as `\\udce9`."""
    with file.open("w", encoding="utf-8", newline="", errors="backslashreplace") as text:
        plain = csv.writer(text, lineterminator="\n")
        quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in chain([header], rows):
            cells = [spreadsheet_cell(cell) for cell in row]
            # Before Python 3.13 `csv` does not quote a carriage return, at which readers begin a row.
            (quoted if any("\r" in cell for cell in cells if isinstance(cell, str)) else plain).writerow(cells)


def new_figure(**options: Any) -> "Figure":
    """An empty figure, with these options of matplotlib's.

    Raises:
        ImportError: if matplotlib is not installed, naming the extra that brings it.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "transformers-sslam[train]"') from error
    return Figure(layout="constrained", **options)


def replace_picture(path: Path, name: str, draw: Callable[[], "Figure"] | None) -> bool:
    """Delete the picture of earlier results, and draw that of these, if there is any. Returns whether there is one.

    Without matplotlib there is a warning and no picture: it must not cost the results of a training run.
    """
    path.unlink(missing_ok=True)
    if draw is None:
        return False
    try:
        figure = draw()
    except ImportError as error:
        logger.warning(f"there is no {name}: {error}")
        return False
    with write_atomically(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    return True
