"""Files that results of recordings are written to: lines of JSON, tables, and label files that other programs open.

Names of files need not be UTF-8: what is not is written as an escape such as `\\udce9`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from ..events_sslam import Event
from ..fbank import LOWEST_FREQUENCY
from ..reports import write_csv
from .inputs import absolute_path
from .parts import Parts


DIGITS = 4  # of scores
LINE_ENDS = r"[\t-\r\x1c-\x1e\x85\u2028\u2029]"  # all at which `str.splitlines` splits, and the tab
COLUMNS = ("path", "start", "end", "label", "score", "error")
ROWS_AT_ONCE = 2**16
SCHEMA = pa.schema(zip(COLUMNS, (pa.string(), pa.float64(), pa.float64(), pa.string(), pa.float32(), pa.string())))
RAVEN_COLUMNS = ("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Annotation", "Score")


def seconds(value: float) -> float:
    """To milliseconds."""
    return round(float(value), 3)


def rounded(event: Event) -> Event:
    """As it is written."""
    return Event(seconds(event.start), seconds(event.end), event.label, round(event.score, DIGITS))


def utf8(text: str) -> str:
    """Text as UTF-8 has it: names of files may hold other bytes."""
    return text.encode(errors="backslashreplace").decode()


def names_within(paths: Sequence[str]) -> list[str]:
    """Names of recordings, by which other programs and files beside them know them: their paths below the folder that holds all.

    Raises:
        UserError: if two have one name, as the addresses `s3://a/b.wav` and `s3://a//b.wav`.
    """
    absolute = [PurePath(absolute_path(path)) for path in paths]
    folders = [path.parent.parts for path in absolute]
    common = next((depth for depth, parts in enumerate(zip(*folders)) if len(set(parts)) > 1), min(map(len, folders)))
    known: dict[str, str] = {}
    for path, whole in zip(paths, absolute):
        name = "/".join(part for part in whole.parts[common:] if part not in ("..", whole.anchor))  # so it leads nowhere else
        if name in known:
            raise UserError(f"the recordings {known[name]} and {path} would both be called {name}: leave one of them out")
        known[name] = path
    return list(known)


def write_lines(file: Path, records: Iterable[dict[str, Any]]) -> None:
    """JSON Lines. JSON escapes control characters; the other characters at which some readers end a line are escaped here."""
    with _text(file) as text:
        for record in records:
            text.write(re.sub(LINE_ENDS, lambda found: f"\\u{ord(found[0]):04x}", json.dumps(record, ensure_ascii=False)) + "\n")


def write_parquet(file: Path, rows: Iterator[Sequence[Any]]) -> None:
    """A table of `SCHEMA`."""
    with pq.ParquetWriter(file, SCHEMA) as writer:
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            columns = list(zip(*batch))
            columns[0] = tuple(utf8(path) for path in columns[0])
            writer.write_table(pa.table([pa.array(column, field.type) for column, field in zip(columns, SCHEMA)], schema=SCHEMA))


def write_tables(file: Path, schema: pa.Schema, tables: Iterable[pa.Table], rows_at_once: int) -> None:
    """Tables of a schema as one in Parquet, with row groups of at least so many rows: a recording of a few would make a poor one."""
    with pq.ParquetWriter(file, schema) as writer:
        held: list[pa.Table] = []
        for table in tables:
            held.append(table)
            if sum(map(len, held)) >= rows_at_once:
                writer.write_table(pa.concat_tables(held).combine_chunks())
                held = []
        writer.write_table(pa.concat_tables([*held, schema.empty_table()]).combine_chunks())


def write_rows(file: Path, suffix: str, rows: Iterator[Sequence[Any]]) -> None:
    """A table of `COLUMNS`, as `.csv` or `.parquet`."""
    if suffix == ".parquet":
        write_parquet(file, rows)
    else:
        write_csv(file, COLUMNS, rows)


def write_dcase(file: Path, recordings: Iterable[tuple[str, Sequence[Event]]]) -> None:
    """The table of DCASE's tasks: `filename`, `onset`, `offset`, `event_label`. A recording without events has a row of its name alone, so
    that false alarms per hour are counted over all recordings."""
    with _text(file) as text:
        text.write("filename\tonset\toffset\tevent_label\n")
        for name, events in recordings:
            for event in events:
                text.write(f"{_cell(name)}\t{event.start:.3f}\t{event.end:.3f}\t{_cell(event.label)}\n")
            if not events:
                text.write(f"{_cell(name)}\t\t\t\n")


def write_audacity(file: Path, events: Iterable[Event], highest_frequency: float) -> None:
    """A label track, which Audacity imports: start, end and label on each line. It has no place for a `highest_frequency`."""
    with _text(file) as text:
        text.writelines(f"{event.start:.6f}\t{event.end:.6f}\t{_cell(event.label)}\n" for event in events)


def write_raven(file: Path, events: Iterable[Event], highest_frequency: float) -> None:
    """A selection table, which Raven opens. Events have no frequencies of their own: every selection has the whole range of the model."""
    with _text(file) as text:
        text.write("\t".join(RAVEN_COLUMNS) + "\n")
        for number, event in enumerate(events, 1):
            cells = (number, "Spectrogram 1", 1, f"{event.start:.3f}", f"{event.end:.3f}", f"{LOWEST_FREQUENCY:.1f}")
            text.write("\t".join(map(str, (*cells, f"{highest_frequency:.1f}", _cell(event.label), event.score))) + "\n")


LABEL_FILES: dict[str, tuple[str, Callable[[Path, Iterable[Event], float], None]]] = {
    "audacity": (".txt", write_audacity),
    "raven": (".selections.txt", write_raven),
}


def write_unusable(parts: Parts, output: Path, paths: Sequence[str]) -> None:
    """A list of the recordings that an output lacks, with causes and errors, beside it; an older list is deleted if there are none."""
    listed = output.with_suffix(".unusable.csv")
    if unusable := [(path, entry.cause, entry.error) for path, entry, _ in parts.read(paths) if entry.error is not None]:
        with parts.replace(listed) as file:
            write_csv(file, ("path", "cause", "error"), unusable)
    elif listed.exists():
        parts.check_output(listed)
        listed.unlink()


def _text(file: Path) -> Any:
    return file.open("w", encoding="utf-8", newline="", errors="backslashreplace")


def _cell(text: str) -> str:
    """Of a table that has no quotes."""
    return re.sub(f"{LINE_ENDS}+", " ", text)
