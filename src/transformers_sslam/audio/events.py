"""Events of labelled clips: which sounds, from when to when, as one table, and the targets of time steps that follow from it."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import UserError


if TYPE_CHECKING:
    import pyarrow as pa

ClipName = Callable[[int], str]

UNKNOWN = -100.0  # target of a step whose sounds are not known, which losses ignore
PRESENT = 0.5  # a soft label above it says that the sound is there


class Event(NamedTuple):
    """One sound. `onset` and `offset` in seconds from the start of the clip."""

    label: str
    onset: float
    offset: float


class EventTable(NamedTuple):
    """The events of a table of clips, each array `(events,)`; those of clip `i` are `starts[i]` to `starts[i + 1]`.

    Events of one class of a clip do not overlap, see [`join_events`].

    Attributes:
        codes: classes, int32.
        onsets, offsets: seconds, float64; both NaN where a clip has the class at times that are not known (a weak label).
        values: float64, in [0, 1]: the fraction of listeners, or how sure they are, for soft labels; otherwise 1.
        starts: `(clips + 1,)`, int64.
    """

    codes: np.ndarray
    onsets: np.ndarray
    offsets: np.ndarray
    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def read(cls, cells: "pa.StructArray", codes: np.ndarray, starts: np.ndarray, column: str, named: ClipName) -> "EventTable":
        """From `{onset, offset}`, or `{onset, offset, value}`, of each event; `named` gives the name of an event's clip for messages.

        Raises:
            UserError: if an event has no valid times or value, or events of one class overlap with different values.
        """
        import pyarrow.compute as pc

        def numbers(name: str, missing: float) -> np.ndarray:
            return pc.struct_field(cells, name).cast("float64").fill_null(missing).to_numpy(zero_copy_only=False)

        onsets, offsets = numbers("onset", -1.0), numbers("offset", -1.0)
        valid = (onsets >= 0) & (np.rint(onsets * 1e6) < np.rint(offsets * 1e6)) & np.isfinite(offsets)  # metrics count microseconds
        weak = np.array(pc.is_null(pc.struct_field(cells, "onset"))) & np.array(pc.is_null(pc.struct_field(cells, "offset")))
        if len(wrong := np.flatnonzero(~(valid | weak))):
            place = int(wrong[0])
            onset, offset = (pc.struct_field(cells, name)[place].as_py() for name in ("onset", "offset"))
            raise UserError(
                f"{named(place)} has an event from {_seconds(onset)} to {_seconds(offset)} s in the column {column!r}, but an event has an "
                "onset and a later offset, or neither where they are not known"
            )
        onsets, offsets = np.where(weak, np.nan, onsets), np.where(weak, np.nan, offsets)
        soft = cells.type.get_field_index("value") >= 0
        values = numbers("value", 1.0) if soft else np.ones(len(codes))
        if len(wrong := np.flatnonzero(~((values >= 0) & (values <= 1)))):
            place = int(wrong[0])
            raise UserError(f"{named(place)} has an event of value {values[place]:g} in the column {column!r}, but a value is from 0 to 1")
        table, joined = join_events(cls(codes, onsets, offsets, values, starts))
        if soft and (clash := _overlap(table)) is not None:
            raise UserError(
                f"{named(int(joined[clash]))} has events of one class in the column {column!r} that overlap, with different values, at "
                f"{table.onsets[clash]:g} s: give each time one value"
            )
        return table

    @classmethod
    def of_clip(cls, events: Sequence[Event], classes: Sequence[str]) -> "EventTable":
        """The events of one clip that are of these classes."""
        known = [event for event in events if event.label in classes]
        codes = np.array([classes.index(event.label) for event in known], dtype=np.int32)
        onsets, offsets = (np.array([event[i] for event in known], dtype=np.float64) for i in (1, 2))
        return join_events(cls(codes, onsets, offsets, np.ones(len(known)), np.array([0, len(known)])))[0]

    def select(self, chosen: np.ndarray) -> "EventTable":
        """The events of these clips."""
        within, starts = gather(self.starts, chosen)
        return EventTable(self.codes[within], self.onsets[within], self.offsets[within], self.values[within], starts)

    def keep(self, kept: np.ndarray) -> "EventTable":
        """The events at which the mask `kept` is true."""
        codes, onsets, offsets, values = (column[kept] for column in (self.codes, self.onsets, self.offsets, self.values))
        return EventTable(codes, onsets, offsets, values, offsets_of(kept)[self.starts])

    def present(self) -> "EventTable":
        """The events whose value is above `PRESENT`, with touching ones joined: what soft labels say, as hard ones."""
        if (self.values == 1).all():
            return self
        hard = self.keep(self.values > PRESENT)
        return join_events(hard._replace(values=np.ones(len(hard.codes))))[0]

    def clips(self) -> np.ndarray:
        """The clip of each event."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    def step_targets(
        self, step: float, steps: int, classes: int, *, start: float = 0.0, shift: float = 0.0, duration: float | None = None
    ) -> np.ndarray:
        """All events as one clip's, see [`Labels.step_targets`]."""
        if np.isnan(self.onsets).any():
            return np.full((steps, classes), UNKNOWN, dtype=np.float32)
        onsets, offsets, codes, values = self.onsets - start, self.offsets - start, self.codes, self.values
        if duration is not None:
            onsets, offsets = np.clip(onsets, 0, duration), np.clip(offsets, 0, duration)
            shift %= duration
        onsets, offsets = onsets + shift, offsets + shift
        if duration is not None:  # what passes the end comes back at the beginning
            back = np.maximum(onsets - duration, 0), np.maximum(offsets - duration, 0)
            onsets, offsets = (
                np.concatenate([np.minimum(ahead, duration), behind]) for ahead, behind in zip((onsets, offsets), back, strict=True)
            )
            codes, values = np.tile(codes, 2), np.tile(values, 2)
        inside = (offsets > 0) & (onsets < steps * step) & (onsets < offsets)
        edges = np.arange(steps + 1) * step
        covered = np.minimum(offsets[inside, None], edges[1:]) - np.maximum(onsets[inside, None], edges[:-1])
        targets = np.zeros((classes, steps))
        np.add.at(targets, codes[inside], np.maximum(covered, 0) / step * values[inside, None])
        return np.minimum(targets.T, 1).astype(np.float32)


def join_events(table: EventTable) -> tuple[EventTable, np.ndarray]:
    """Events of one class and value that overlap or touch, joined; each at the place of the first of them in the annotation.

    Returns:
        The table, and the place of each event in the given one.
    """
    timed = np.flatnonzero(~np.isnan(table.onsets))
    group = _groups(table.clips()[timed], table.codes[timed], table.values[timed])
    order, begins, latest = _runs(group, table.onsets[timed], table.offsets[timed])
    firsts = np.flatnonzero(begins)
    if len(firsts) == len(timed):
        return table, np.arange(len(table.codes))
    places = np.minimum.reduceat(timed[order], firsts)
    onsets, offsets = table.onsets.copy(), table.offsets.copy()
    onsets[places] = table.onsets[timed][order][firsts]
    offsets[places] = latest[np.append(firsts[1:], len(order)) - 1]
    kept = np.isnan(table.onsets)
    kept[places] = True
    return table._replace(onsets=onsets, offsets=offsets).keep(kept), np.flatnonzero(kept)


def _overlap(table: EventTable) -> int | None:
    """An event that begins before another of its class in its clip has ended."""
    timed = np.flatnonzero(~np.isnan(table.onsets))
    group, onsets = _groups(table.clips()[timed], table.codes[timed]), table.onsets[timed]
    order, _, latest = _runs(group, onsets, table.offsets[timed])
    clash = (group[order][1:] == group[order][:-1]) & (onsets[order][1:] < latest[:-1])
    return int(timed[order][1:][clash][0]) if clash.any() else None


def _groups(*keys: np.ndarray) -> np.ndarray:
    """A number for each combination of the keys, from 0."""
    group = np.zeros(len(keys[0]), dtype=np.int64)
    for key in keys:
        unique, index = np.unique(key, return_inverse=True)
        group = np.unique(group * max(len(unique), 1) + index, return_inverse=True)[1]
    return group


def _runs(group: np.ndarray, onsets: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The order by group and onset; in this order, where an event begins after all earlier ones of its group have ended, and the latest
    offset in the group so far."""
    order = np.lexsort((onsets, group))
    group, onsets, offsets = group[order], onsets[order], offsets[order]
    by_offset = np.argsort(offsets, kind="stable")
    rank = np.empty(len(order), dtype=np.int64)
    rank[by_offset] = np.arange(len(order))
    # The maximum within groups, of all groups at once: in whole numbers, which a greater group always raises.
    latest = offsets[by_offset[np.maximum.accumulate(group * len(order) + rank) % max(len(order), 1)]]
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (group[1:] != group[:-1]) | (onsets[1:] > latest[:-1])
    return order, begins, latest


def offsets_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Where each of consecutive pieces of these lengths begins, and where the last ends, int64."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def gather(offsets: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the values of the chosen rows, and the offsets of the rows among them."""
    lengths = offsets[chosen + 1] - offsets[chosen]
    new = offsets_of(lengths)
    return np.repeat(offsets[chosen] - new[:-1], lengths) + np.arange(new[-1]), new


def _seconds(value: float | None) -> str:
    return "no time" if value is None else f"{value:g}"
