"""Files of metadata beside audio, `metadata.csv`, `.jsonl` or `.parquet`: which clips they list, and the columns of these."""

import csv
import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError


if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
ROWS_AT_ONCE = 100_000  # of text that becomes a piece of an Arrow table


class Metadata(NamedTuple):
    """A file of metadata: the names of the files that it lists, the line or row of each, and all its other columns."""

    file: Path
    names: list[str]
    lines: Sequence[int]
    columns: "pa.Table"

    def place(self, number: int) -> str:
        return f"{'row' if self.file.suffix == '.parquet' else 'line'} {self.lines[number]} of {self.file}"


def resolve(metadata: Metadata, boundary: Path) -> list[str]:
    """Paths of the listed files, none of which may lie outside of the audio folder."""
    folder, paths = os.path.join(metadata.file.parent, ""), []
    for number, name in enumerate(metadata.names):
        path = folder + name
        if ".." in name or name.startswith("./") or os.path.isabs(name):
            path = os.path.normpath(path)
            if os.path.isabs(name) or not Path(path).is_relative_to(boundary):
                kind = "an absolute path" if os.path.isabs(name) else f"a file outside of {boundary}"
                raise UserError(
                    f"{metadata.place(number)} names {name!r}, {kind}: name files below the folder, relative to {metadata.file.name}"
                )
        paths.append(path)
    return paths


def warn_of_repeats(paths: Sequence[str], files: Sequence[Metadata]) -> None:
    """Say which clips are listed more than once. They come as often as they are listed; that none is trained on and evaluated on is for
    `check_apart` to see."""
    repeats = len(paths) - len(set(paths))
    if repeats == 0:
        return
    first: dict[str, str] = {}
    places = (metadata.place(number) for metadata in files for number in range(len(metadata.names)))
    for path, place in zip(paths, places):
        if first.setdefault(path, place) != place:
            logger.warning(f"{repeats} rows list a clip again, such as {place} that of {first[path]}: it comes as often as it is listed")
            return


def read_metadata(file: Path) -> Metadata:
    """What a file lists. Rows that name no file are left out, with a warning.

    Raises:
        UserError: if it cannot be read, or has no column `file_name`.
    """
    import pyarrow as pa

    read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[file.suffix]
    try:
        table, lines = read(file)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be read ({error}): it must be text in UTF-8, or parquet") from error
    if "file_name" not in table.column_names or "audio" in table.column_names:
        raise UserError(
            f"{file} has the columns {', '.join(table.column_names)}, but must have one called file_name, and none called audio; commas "
            "separate those of a CSV file"
        )
    names = table["file_name"].to_pylist()
    if nameless := [i for i, name in enumerate(names) if not (isinstance(name, str) and name)]:
        metadata = Metadata(file, names, lines, table)
        logger.warning(f"{len(nameless)} rows that name no file are left out, such as {metadata.place(nameless[0])}")
        kept = sorted(set(range(len(names))).difference(nameless))
        table, names, lines = table.take(kept), [names[i] for i in kept], [lines[i] for i in kept]
    return Metadata(file, names, lines, table.drop_columns("file_name"))


def _read_csv(file: Path) -> tuple["pa.Table", Sequence[int]]:
    """All cells as text; empty ones are missing."""
    import pyarrow as pa

    lines, pieces = array("q"), []
    with file.open(encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{file} has the columns {', '.join(header)}, of which two are called alike: rename one")

        def rows() -> Iterator[list[str | None]]:
            for row in reader:
                if len(row) > len(header) and any(row[len(header) :]):
                    raise UserError(f"line {reader.line_num} of {file} has {len(row)} cells, but there are {len(header)} columns: {row}")
                if row:  # a line with nothing at all is none
                    lines.append(reader.line_num)
                    yield [cell or None for cell in row[: len(header)]] + [None] * (len(header) - len(row))

        remaining = rows()
        while piece := list(islice(remaining, ROWS_AT_ONCE)):
            pieces.append(pa.table([pa.array(column, pa.string()) for column in zip(*piece)], names=header))
    return pa.concat_tables(pieces) if pieces else pa.table([pa.array([], pa.string()) for _ in header], names=header), lines


def _read_jsonl(file: Path) -> tuple["pa.Table", Sequence[int]]:
    """Each column with the type of its values."""
    import pyarrow as pa

    lines, rows = array("q"), []
    with file.open(encoding="utf-8-sig") as text:
        for number, line in enumerate(text, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"line {number} of {file} is {line.strip()[:80]!r}, but must be an object with file_name")
                lines.append(number)
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names}), lines


def _read_parquet(file: Path) -> tuple["pa.Table", Sequence[int]]:
    from pyarrow.parquet import read_table

    table = read_table(file)
    return table, range(1, len(table) + 1)
