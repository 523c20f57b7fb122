"""Files of text that list clips and annotate them, with or without a byte-order mark."""

import csv
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError


LONGEST_CELL = 2**30  # characters; by default `csv` reads 2**17, which the events of a long recording exceed
INVISIBLE = str.maketrans("", "", "\u00ad\u200b\u200e\u200f\u2060\ufeff")


def appearance(text: str) -> str:
    """What a reader sees of it: one form of Unicode, one kind of blank, and no characters without width."""
    return unicodedata.normalize("NFC", " ".join(text.translate(INVISIBLE).split()))


def read_text(path: Path) -> str:
    """The content of a file. `UserError` if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from error


def read_cells(table: Path, delimiter: str = ",", skip_blanks: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The number of the line, and the cells, of each row of a table, the header among them; none of an empty line.

    Raises:
        UserError: if it is not UTF-8, or a quotation mark does not belong to a pair, which could make one cell of many rows.
    """
    csv.field_size_limit(max(LONGEST_CELL, csv.field_size_limit()))  # of this process
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=skip_blanks, strict=True)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise UserError(
                f"line {reader.line_num} of {table} cannot be read ({error}): a cell with quotation marks must begin and end with one, and "
                "have each of its own twice"
            ) from error
        except UnicodeDecodeError as error:
            raise _not_utf8(table, error) from error


def _not_utf8(path: Path, error: UnicodeDecodeError) -> UserError:
    return UserError(f"{path} cannot be read ({error}): it must be text in UTF-8")
