"""Labels of clips (one class, several tags, or events in time), read from a column of a data set into one table."""

import difflib
import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UserError
from .events import PRESENT, UNKNOWN, ClipName, Event, EventTable, gather, offsets_of
from .paths import source_name
from .text import appearance


if TYPE_CHECKING:
    import pyarrow as pa


UNKNOWN_LABELS = "unknown_labels"  # the column of classes of which it is unknown whether a clip has them


@dataclass(frozen=True)
class Labels(Sequence[list[str]]):
    """The labels of a table of clips: `labels[i]` are the names of clip `i`'s classes.

    Attributes:
        codes: `(labels of all clips,)`, int32, indices of `names`; each class at most once a clip.
        offsets: `(clips + 1,)`, int64: clip `i` has `codes[offsets[i] : offsets[i + 1]]`.
        names: of the classes.
        multi_label: whether a clip may have any number of classes; otherwise it has exactly one.
        declared: whether `names` are classes that the data set declares (a `ClassLabel`).
        unknown: of partly labelled clips, the classes of which it is not known whether a clip has them; the same `names`.
    """

    codes: np.ndarray
    offsets: np.ndarray
    names: list[str]
    multi_label: bool
    declared: bool = False
    _events: EventTable | None = field(default=None, repr=False)
    unknown: "Labels | None" = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"clip {i} of {len(self)}")
        return [self.names[code] for code in self.codes[self.offsets[i] : self.offsets[i + 1]]]

    def events(self, i: int) -> list[Event]:
        """The events of clip `i`, in the order of the annotation; of soft labels, those above one half, touching ones joined.

        Those of one class do not overlap. `ValueError` if the clip has no times, see [`has_times`].
        """
        if self._events is None or not self.has_times(i):
            raise ValueError(f"the labels of clip {i} have no times: read a column of events, and ask has_times")
        codes, onsets, offsets, *_ = self._events.select(np.array([i])).present()
        return [Event(self.names[code], float(onset), float(offset)) for code, onset, offset in zip(codes, onsets, offsets, strict=True)]

    @property
    def num_events(self) -> int:
        """Events of all clips, weak labels among them."""
        return 0 if self._events is None else len(self._events.codes)

    def has_times(self, i: int) -> bool:
        """Whether it is known when the sounds of clip `i` begin and end: not for weak labels (an event without times) and mere tags."""
        if self._events is None:
            return False
        return not np.isnan(self._events.onsets[self._events.starts[i] : self._events.starts[i + 1]]).any()

    def step_targets(
        self, i: int, step: float, steps: int, shift: float = 0.0, duration: float | None = None, start: float = 0.0
    ) -> np.ndarray:
        """Targets of the time steps of clip `i`, or of an excerpt, `(steps, classes)`, float32.

        That of step `j` is the fraction of `[j step, (j + 1) step)` in which the class sounds, times the value of soft labels. All are
        -100 where times are not known, see [`has_times`].

        Args:
            step: seconds.
            steps: their number.
            shift: seconds by which the excerpt is moved later; with `duration`, what leaves it at one end returns at the other (a roll).
            duration: of the excerpt, in seconds; nothing sounds after it.
            start: where the excerpt begins in the clip, in seconds.
        """
        if self._events is None:
            return np.full((steps, len(self.names)), UNKNOWN, dtype=np.float32)
        events = self._events.select(np.array([i]))
        return events.step_targets(step, steps, len(self.names), start=start, shift=shift, duration=duration)

    def with_unknown(self, unknown: "Labels", clip_name: ClipName = "clip {}".format) -> "Labels":
        """The same labels of clips of which it is not known whether they have the classes `unknown`.

        Raises:
            UserError: if a clip has such a class, or the data set declares its classes without it.
        """
        names = self.names if self.declared else list(dict.fromkeys([*self.names, *unknown.names]))
        unknown = unknown.encode(names, clip_name, f"has in {UNKNOWN_LABELS}")
        present, missing = (
            np.repeat(np.arange(len(labels)), np.diff(labels.offsets)) * max(len(names), 1) + labels.codes for labels in (self, unknown)
        )
        if len(both := np.intersect1d(present, missing)):
            clip, code = divmod(int(both[0]), len(names))
            raise UserError(f"{clip_name(clip)} is labelled {names[code]!r}, which is also in its {UNKNOWN_LABELS}: remove one of the two")
        return replace(self, names=names, unknown=unknown)

    @property
    def num_partly_labelled(self) -> int:
        """Clips of which a class is unknown."""
        return 0 if self.unknown is None else int((np.diff(self.unknown.offsets) > 0).sum())

    def select(self, indices: Sequence[int] | np.ndarray) -> "Labels":
        """The labels of these clips."""
        chosen = np.asarray(indices, dtype=np.int64)
        places, offsets = gather(self.offsets, chosen)
        events = self._events
        if events is not None:
            events = events.select(chosen)
        unknown = None if self.unknown is None else self.unknown.select(chosen)
        return Labels(self.codes[places], offsets, self.names, self.multi_label, self.declared, events, unknown)

    def counts(self) -> np.ndarray:
        """Clips of each class, `(classes,)`, int64, in the order of `names`."""
        return np.bincount(self.codes, minlength=len(self.names))

    def occurring(self) -> list[str]:
        """The classes with a clip, sorted."""
        return sorted(self.names[code] for code in np.flatnonzero(self.counts()))

    def encode(self, classes: Sequence[str], clip_name: ClipName = "clip {}".format, relation: str = "is labelled") -> "Labels":
        """The same labels with `classes` as their `names`. `UserError`, naming the clip by `clip_name`, if it has another (or does not know
        whether it has).

        Soft events of other classes, which are nowhere above one half, are left out: they are no labels.
        """
        index = {name: i for i, name in enumerate(classes)}
        new = np.array([index.get(name, -1) for name in self.names], dtype=np.int32)
        codes = new[self.codes] if len(self.names) else self.codes
        if len(other := np.flatnonzero(codes < 0)):
            label, clip = self.names[self.codes[other[0]]], int(np.searchsorted(self.offsets, other[0], side="right")) - 1
            if same := [name for name in classes if appearance(name) == appearance(label)]:
                forms = f"{label!a}, and a class is {same[0]!a}: they look the same, write both the same way"
                raise UserError(f"{clip_name(clip)} {relation} {forms}")
            shown = classes if len(classes) <= 20 else [*difflib.get_close_matches(label, classes, n=5), *classes[:5], "..."]
            raise UserError(f"{clip_name(clip)} {relation} {label!r}, which is none of the {len(classes)} classes: {', '.join(shown)}")
        events = self._events
        if events is not None:
            events = events._replace(codes=new[events.codes] if len(new) else events.codes)
            events = events.keep(events.codes >= 0)
        unknown = None if self.unknown is None else self.unknown.encode(classes, clip_name, f"has in {UNKNOWN_LABELS}")
        return Labels(codes, self.offsets, list(classes), self.multi_label, self.declared, events, unknown)

    def indices(self) -> np.ndarray:
        """The class of each clip, `(clips,)`, int64."""
        if self.multi_label:
            raise ValueError("these clips may have several classes: take one_hot")
        return self.codes.astype(np.int64)

    def one_hot(self, clips: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """Targets, float32: `(classes,)` of one clip, `(clips, classes)` of several. 0, 1, or -100 where unknown."""
        chosen = np.atleast_1d(np.asarray(clips, dtype=np.int64))
        places, offsets = gather(self.offsets, chosen)
        targets = np.zeros((len(chosen), len(self.names)), dtype=np.float32)
        targets[np.repeat(np.arange(len(chosen)), np.diff(offsets)), self.codes[places]] = 1
        if self.unknown is not None:
            targets[self.unknown.one_hot(chosen) == 1] = UNKNOWN
        return targets[0] if np.ndim(clips) == 0 else targets

    def balanced_weights(self) -> np.ndarray:
        """Probability of each clip in class-balanced sampling, `(clips,)`, float64: proportional to the sum over its classes of one over
        their clips (AST, Gong et al., Interspeech 2021, arXiv 2104.01778)."""
        rows = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        weights = np.bincount(rows, weights=1 / np.maximum(self.counts(), 1)[self.codes], minlength=len(self))
        return weights / weights.sum()

    def digest(self) -> str:
        """A hash of labels and events."""
        digest = hashlib.sha256(json.dumps([self.names, self.multi_label, self.declared]).encode())
        for values in (self.codes, self.offsets, *(self._events or ())):
            digest.update(np.ascontiguousarray(values).data)
        if self.unknown is not None:
            digest.update(self.unknown.digest().encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class LabelReader:
    """Reads the labels of rows, of a table or of a stream, from a column.

    Args:
        column: of `ClassLabel`s, text or numbers: one class a clip. Or of lists of these, of names joined by `separator`, or of lists of
            events `{label, onset, offset}`, in seconds: any number of classes. An event without both times is a weak label, and one
            without label too is none; `value`, from 0 to 1, makes it a soft one.
        separator: between the names in a column of text. Space around a name is dropped; an empty cell means no class.
        classes: all names, in order, if the data set declares them.
        kind: the column's type in Arrow.
        unknown: reader of the column `unknown_labels`, if there is one: as of `column`, classes that a clip may have or not.
    """

    column: str
    separator: str | None
    classes: list[str] | None
    kind: "pa.DataType"
    unknown: "LabelReader | None" = None

    @classmethod
    def of(cls, rows: Any, column: str, separator: str | None = None) -> "LabelReader":
        """For a column of a data set. `UserError` if it is missing or does not hold labels, or is not one for which some can be unknown,
        though there is a column `unknown_labels`."""
        import datasets
        import pyarrow as pa

        if column not in rows.column_names:
            if events := event_columns(rows):
                raise UserError(
                    f"there is no column {column!r}, only {', '.join(rows.column_names)}: set label_column to {' or '.join(events)}, which "
                    "holds events"
                )
            raise missing_column(rows, column)
        feature = rows.features[column]
        kind = datasets.Features({column: feature}).arrow_schema.field(column).type
        item = _item(feature)
        if isinstance(item, dict) and "label" in item:
            item = item["label"]
        classes = item.names if isinstance(item, datasets.ClassLabel) else None
        if separator == "":
            raise UserError("label_separator is empty: give a text, or leave it out")
        if separator is not None and (classes is not None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind))):
            what = "lists" if _is_list(kind) else "classes" if classes is not None else str(kind)
            raise UserError(f"label_separator is {separator!r}, but the column {column!r} holds {what}, not text to divide: leave it out")
        content = kind.value_type if _is_list(kind) else kind
        if _is_list(kind) and pa.types.is_struct(content):
            if not {"label", "onset", "offset"} <= {f.name for f in content}:
                raise UserError(f"the column {column!r} holds {content}, but an event needs label, onset and offset")
            content = content.field("label").type
        if pa.types.is_nested(content) or "binary" in str(content):
            raise UserError(f"the column {column!r} holds {kind}, but a label is text, a number or a class: convert it, or name another")
        if classes is not None:
            _check_names(classes, column)
        reader = cls(column, separator, classes, kind)
        if column == UNKNOWN_LABELS or UNKNOWN_LABELS not in rows.column_names:
            return reader
        unknown = cls.of(rows, UNKNOWN_LABELS, separator)
        for one in (reader, unknown):
            if not one.multi_label or one.column in event_columns(rows):
                raise UserError(
                    f"there is a column {UNKNOWN_LABELS}, so {one.column!r} must hold lists of labels, or names joined by label_separator, "
                    "not one class or events: name another label_column, or rename that column"
                )
        return replace(reader, unknown=unknown)

    @property
    def multi_label(self) -> bool:
        """See [`Labels`]."""
        return _is_list(self.kind) or self.separator is not None

    def read_row(self, row: dict) -> Labels:
        """The labels of one row, as a table of one clip. Raises as [`read`]."""
        import pyarrow as pa

        def name(_: int) -> str:
            return source_name(row["audio"])

        labels = self.read(pa.array([row[self.column]], self.kind), name)
        return labels if self.unknown is None else labels.with_unknown(self.unknown.read_row(row), name)

    def read(self, cells: "pa.Array", clip_name: ClipName) -> Labels:
        """The labels of all `cells` of the column; `clip_name` names a row's clip for messages.

        Raises:
            UserError: if a clip lacks a label that it must have, or has one that is not declared; a name is empty or holds control
                characters; or an event has no valid times.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.separator is not None:
            cells = pc.split_pattern(cells, self.separator)
            values = pc.utf8_trim_whitespace(cells.flatten())
        else:
            values = cells.flatten() if self.multi_label else cells
        starts = np.arange(len(cells) + 1)
        if self.multi_label:
            starts = offsets_of(pc.fill_null(pc.list_value_length(cells), 0).to_numpy(False))

        def named(place: int) -> str:
            return clip_name(int(np.searchsorted(starts, place, side="right")) - 1)

        records = values if pa.types.is_struct(values.type) else None
        if records is not None:
            given = ~np.array(pc.and_(*(pc.is_null(pc.struct_field(records, name)) for name in ("onset", "offset"))))
            given |= np.array(pc.is_valid(pc.struct_field(records, "label")))
            records, starts = records.filter(pa.array(given)), offsets_of(given)[starts]
            values = pc.struct_field(records, "label")
        codes, names = self._codes(values)
        if self.separator is not None:  # empty texts are not labels
            kept = codes >= 0
            codes, starts = codes[kept], offsets_of(kept)[starts]
        elif (codes < 0).any():
            what = "an empty label" if self.multi_label else "no label"
            raise UserError(f"{named(int(np.flatnonzero(codes < 0)[0]))} has {what} in the column {self.column!r}: name it or leave it out")
        if self.classes is not None and len(wrong := np.flatnonzero(codes >= len(names))):
            raise UserError(  # `datasets` marks clips without a label by -1
                f"{named(int(wrong[0]))} has {values[int(wrong[0])].as_py()} in the column {self.column!r}, but the numbers of its "
                f"classes are 0 to {len(names) - 1}: leave it out"
            )
        events = None
        if records is not None:
            events = EventTable.read(records, codes, starts, self.column, named)
            present = events.keep(events.values > PRESENT)
            codes, starts = present.codes, present.starts
        codes, starts = _without_repeats(codes, starts, len(names))
        return Labels(codes, starts, names, self.multi_label, self.classes is not None, events)

    def _codes(self, values: "pa.Array") -> tuple[np.ndarray, list[str]]:
        """A code for each value (-1: missing, `len(names)`: undeclared), and the names."""
        encoded = values.dictionary_encode()
        found = encoded.dictionary.to_pylist()
        if self.classes is not None:
            names = list(self.classes)
            new = [code if code is not None and 0 <= code < len(names) else len(names) for code in found]
        else:
            if infinite := [value for value in found if value in (math.inf, -math.inf)]:
                raise UserError(f"the column {self.column!r} has the label {infinite[0]}, which does not name a class: correct it")
            texts = ["" if value is None or value != value else _text(value) for value in found]  # a value that is not itself is NaN
            names = list(dict.fromkeys(text for text in texts if text))
            _check_names(names, self.column)
            index = {name: code for code, name in enumerate(names)}
            new = [index.get(text, -1) for text in texts]
        places = encoded.indices.fill_null(len(new)).to_numpy(zero_copy_only=False)
        return np.array([*new, -1], dtype=np.int32)[places], names


def event_columns(rows: Any) -> list[str]:
    """The columns of a data set that hold events: lists of label, onset and offset."""
    items = {name: _item(feature) for name, feature in (rows.features or {}).items()}  # of a stream they may not be known
    return [name for name, item in items.items() if isinstance(item, dict) and {"label", "onset", "offset"} <= item.keys()]


def _item(feature: Any) -> Any:
    """What a feature of `datasets` holds, in lists or not."""
    import datasets

    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return feature


def missing_column(rows: Any, column: str) -> UserError:
    """The error of a table without this column."""
    return UserError(
        f"there is no column {column!r}, only {', '.join(rows.column_names)}: name another, or add it to metadata.csv; without metadata, "
        "folders named after classes give labels; without fold_column, splits give the parts"
    )


def _is_list(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _text(value: Any) -> str:
    """A label as text. Missing values may have turned a column's whole numbers into floats."""
    return value.strip() if isinstance(value, str) else str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _check_names(names: Iterable[str], column: str) -> None:
    forms: dict[str, str] = {}
    for name in names:
        if any(unicodedata.category(char) in ("Cc", "Zl", "Zp") for char in name):
            raise UserError(f"the column {column!r} has the label {name!r}, but a label is one line without control characters: rename it")
        if (other := forms.setdefault(appearance(name), name)) != name:  # macOS writes names of folders in another form of Unicode
            raise UserError(f"the column {column!r} has the labels {other!a} and {name!a}, which look the same: write both the same way")


def _without_repeats(codes: np.ndarray, starts: np.ndarray, num_names: int) -> tuple[np.ndarray, np.ndarray]:
    """Each class once a row, in the order of its first occurrence."""
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    _, first = np.unique(rows * max(num_names, 1) + codes, return_index=True)
    if len(first) == len(codes):
        return codes, starts
    first.sort()
    return codes[first], offsets_of(np.bincount(rows[first], minlength=len(starts) - 1))
