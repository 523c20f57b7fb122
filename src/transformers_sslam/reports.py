"""Results as Markdown tables, and cells of spreadsheets."""

from collections.abc import Sequence
from typing import Any


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


def spreadsheet_cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe in front; anything else stays."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
