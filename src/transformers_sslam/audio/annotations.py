"""Formats of annotation files: tables of text, and events of clips as Scaper and DCASE write them."""

import json
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from .folders import AUDIO_SUFFIXES
from .text import read_cells, read_text


Event = dict[str, Any]  # label, onset and offset in seconds, or `None` for weak labels, and value, for soft ones
Events = dict[str, list[Event]]  # by name of the clip


def read_table(table: Path, columns: Sequence[str], delimiter: str = ",") -> list[tuple[str, list[str]]]:
    """Place of each row, for messages, and its text in these columns."""
    if not table.is_file():
        raise UserError(f"there is no {table}: extract the data set again")
    cells = read_cells(table, delimiter)
    _, header = next(cells, (0, []))
    if not set(columns) <= set(header):
        raise UserError(f"{table} has the columns {', '.join(header) or 'none'}, but needs {', '.join(columns)}")
    places = [header.index(column) for column in columns]
    rows = [(f"line {line} of {table}", [row[i] if i < len(row) else "" for i in places]) for line, row in cells if row]
    if not rows:
        raise UserError(f"{table} has no rows")
    return rows


def read_texts(paths: Iterable[Path], classes: Collection[str] | None = None, soft: bool = False) -> Events:
    """Files of `onset<TAB>offset<TAB>label`, with soft labels followed by `<TAB>value`; by name without suffix. A file without events is
    empty, or has lines of blanks."""
    form = ("onset", "offset", "label", *(("value",) if soft else ()))
    annotations: Events = {}
    for path in sorted(paths):
        annotations[path.stem] = []
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            place, values = f"line {number} of {path}", line.split("\t")
            if soft and number == 1 and values[:2] == ["onset", "offset"]:
                continue
            if not line.strip():
                continue
            if len(values) != len(form):
                raise UserError(f"{place} is {line!r}, but must be {'<TAB>'.join(form)}")
            annotations[path.stem].append(make_event(place, classes, *values))
    return annotations


def read_jams(paths: Iterable[Path], classes: Collection[str] | None) -> Events:
    """Scaper's JAMS files: the sounds of the foreground, from its observations `{time, duration, value: {label, role}}`."""
    annotations: Events = {}
    for path in sorted(paths):
        annotations[path.stem] = []
        try:
            (data,) = (part["data"] for part in json.loads(read_text(path))["annotations"] if part["namespace"] == "scaper")
            if isinstance(data, dict):  # columns, as older versions write them
                data = [dict(zip(data, values, strict=True)) for values in zip(*data.values(), strict=True)]
            sounds = [(float(one["time"]), float(one["duration"]), one["value"]["label"], one["value"]["role"]) for one in data]
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path} is not a JAMS file with one annotation of Scaper ({reason})") from error
        for number, (onset, duration, label, role) in enumerate(sounds, start=1):
            if role == "foreground":
                place = f"observation {number} of {path}"
                annotations[path.stem].append(make_event(place, classes, str(onset), str(onset + duration), label))
    return annotations


def read_dcase(table: Path, classes: Collection[str] | None) -> Events:
    """A TSV, by name of the clip without suffix: `filename onset offset event_label`, for soft labels with `confidence`; or of weak labels
    `filename event_labels`, joined by commas. A row of a name alone is a clip without events."""
    header = read_header(table)
    weak = "event_labels" in header and "event_label" not in header
    soft = "confidence" in header
    columns = ("filename", "event_labels") if weak else ("filename", "onset", "offset", "event_label", *(("confidence",) if soft else ()))
    annotations: Events = defaultdict(list)
    for place, (name, *values) in read_table(table, columns, "\t"):
        path = Path(name)
        events = annotations[path.stem if path.suffix.lower() in AUDIO_SUFFIXES else path.name]
        if not weak and any(map(str.strip, values)):
            events.append(make_event(place, classes, *values))
        elif weak:
            labels = [label.strip() for label in values[0].split(",")] if values[0] else []
            events += [{"label": _label(place, classes, label), "onset": None, "offset": None} for label in labels]
    return annotations


def read_header(table: Path) -> list[str]:
    """The columns of a TSV; none if it is missing, which [`read_table`] reports."""
    if not table.is_file():
        return []
    return next(read_cells(table, "\t"), (0, []))[1]


def make_event(place: str, classes: Collection[str] | None, onset: str, offset: str, label: str, value: str | None = None) -> Event:
    label = _label(place, classes, label)
    try:
        start, end = float(onset), float(offset)
    except ValueError:
        start = end = math.nan
    if not 0 <= start <= end < math.inf:
        raise UserError(f"{place} goes from {onset!r} to {offset!r}, but an event has an onset, in seconds, and an offset not before it")
    event = {"label": label, "onset": start, "offset": end}
    if value is None:
        return event
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise UserError(f"{place} has the value {value!r}, but a soft label is a number from 0 to 1")
    return {**event, "value": number}


def _label(place: str, classes: Collection[str] | None, label: str) -> str:
    if not label.strip():
        raise UserError(f"{place} has no label: name the sound")
    if classes is not None and label not in classes:
        raise UserError(f"{place} has the label {label!r}, which is none of the {len(classes)} classes: {', '.join(classes)}")
    return label
