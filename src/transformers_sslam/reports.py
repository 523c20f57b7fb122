"""Results as people read them: Markdown tables, and numbers with their spread."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .files import write_json


if TYPE_CHECKING:  # it needs scipy, and a table does not
    from .evaluation.intervals import Summary


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, without a line break at its end. A `|` in a cell is escaped.

    Args:
        header: titles of the columns.
        rows: as many cells each as there are columns.

    Raises:
        ValueError: if there is no column, a row has another number of cells, or a cell has a line break, which no table can show.
    """
    if len(header) == 0:
        raise ValueError("the header is empty, but a table needs at least one column")
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {i} has {len(row)} cells, but there are {len(header)} columns ({', '.join(header)})")
    for cell in (cell for row in [header, *rows] for cell in row):
        if "\n" in cell:
            raise ValueError(f"the cell {cell!r} has a line break, which a Markdown table cannot show: put it on one line")
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "-|" * len(header), *lines[1:]])


def format_summary(summary: "Summary", scale: float = 100, decimals: int = 1) -> str:
    """Mean ± standard deviation and, in brackets, the confidence interval: "84.2 ± 1.3 [82.9, 85.5]"; of one run, the value alone.

    Args:
        summary: what `summarize` returns.
        scale: factor of all numbers: 100 for per cent.
        decimals: digits after the point.
    """
    mean, std, low, high = (f"{scale * value:.{decimals}f}" for value in (summary.mean, summary.std, summary.low, summary.high))
    return mean if summary.count == 1 else f"{mean} ± {std} [{low}, {high}]"


__all__ = ["format_summary", "markdown_table", "write_json"]
