"""Which clips come, and in which order: shard readers, and the worker that makes batches of theirs.

An epoch's order of shards follows from its number and the seed alone. It is dealt to a fixed number of *shard readers*. A reader reads its
shards one after the other and shuffles their rows in blocks of `shuffle_rows`, not in a buffer that runs on from block to block. So its
position is five numbers, however far the epoch has gone, and resuming reads one block again.

A worker reads its readers one after the other, so it holds one block in memory, however many readers there are.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import UserError
from .cache import WaveformCache
from .clips import Clip, ReadStatistics, Windows, read_clips
from .sources import Row, Source, random_generator


# So many recordings in a row without a usable clip end a run: the other processes would wait for this one for ever.
MOST_UNUSABLE_IN_A_ROW = 1000
# By a worker, of those that it has sent: the one that is being used, and those read ahead.
BATCHES_KEPT = 3


class Position(NamedTuple):
    """Where a shard reader stands: all that resuming needs.

    Attributes:
        epoch: from 0.
        visit, row: where the present block begins: which of the reader's shards of this epoch, and which row of it.
        taken: recordings of the block that are finished, in its shuffled order.
        window: clips that the next recording has given already.
    """

    epoch: int = 0
    visit: int = 0
    row: int = 0
    taken: int = 0
    window: int = 0


@dataclass(frozen=True)
class Readers:
    """The shard readers of a stream: everything that decides which clips come, and in which order.

    Args:
        sources: what is read.
        order: gives the shards of an epoch in their order, `(visits, 2)`: source and shard (see `EpochOrder`).
        count: number of readers.
        windows: how recordings are cut.
        shuffle_rows: recordings in a block.
        seed: of the run.
        cache: keeps decoded recordings, those of the first source, a table of files; `None` decodes each of them every time.
    """

    sources: Sequence[Source]
    order: Callable[[int], np.ndarray]
    count: int
    windows: Windows
    shuffle_rows: int
    seed: int
    cache: WaveformCache | None = None

    def visits(self, epoch: int, readers: Iterable[int]) -> dict[int, np.ndarray]:
        """The shards that each of these readers reads in an epoch, `(visits, 3)`: their place in the epoch's order, source, shard.

        The dealing begins with another reader each epoch, so that none has the longer part each time.
        """
        order = self.order(epoch)
        parts = {reader: np.arange((reader - epoch) % self.count, len(order), self.count) for reader in readers}
        return {reader: np.column_stack((part, order[part])) for reader, part in parts.items()}

    def read(self, position: Position, visits: np.ndarray, statistics: ReadStatistics) -> Iterator[tuple[Position, Clip | None]]:
        """From a position to the end of its epoch: each clip with the position behind it, and the position alone behind each recording."""
        rows = self._rows(visits, position)
        while block := list(islice(rows, self.shuffle_rows)):
            first_place, first_number, _ = block[0]
            generator = random_generator("block", self.seed, position.epoch, first_place, first_number)
            for index in generator.permutation(len(block))[position.taken :]:
                place, number, row = block[index]
                key = (self.seed, position.epoch, place, number)
                # A recording is counted when it is begun, and not again when a resumed run comes back to it.
                counted = statistics if position.window == 0 else ReadStatistics()
                cache = self.cache if row.source == self.sources[0].name else None
                for clip in read_clips(row, self.windows, key, counted, cache)[position.window :]:
                    position = position._replace(window=position.window + 1)
                    statistics.count(clip)
                    yield position, clip
                position = position._replace(taken=position.taken + 1, window=0)
                yield position, None
            place, number, _ = block[-1]
            position = Position(position.epoch, int(np.searchsorted(visits[:, 0], place)), number + 1)
            block.clear()  # before the next one is read: only one is ever in memory
        yield Position(position.epoch + 1), None

    def _rows(self, visits: np.ndarray, position: Position) -> Iterator[tuple[int, int, Row]]:
        """Undecoded rows from the beginning of a block on: place of their shard in the epoch's order, number in the shard, row."""
        for visit in range(position.visit, len(visits)):
            place, source, shard = (int(value) for value in visits[visit])
            start = position.row if visit == position.visit else 0
            for number, row in enumerate(self.sources[source].rows(shard, start), start):
                yield place, number, row


@dataclass(kw_only=True)
class StreamSettings:
    """How clips are read, whatever becomes of them.

    Args:
        shuffle_rows: recordings that are shuffled together, undecoded; each worker holds the bytes of so many.
        shard_readers: into how many parts an epoch is divided, which processes and their workers share out. A run can be resumed with any
            number of processes and workers up to it, but not with another number of readers.
        last_batch: what becomes of the clips left at the end of an epoch: `"fill"` the batch from the next epoch, `"drop"` them, or
            `"keep"` a smaller batch.
        max_unreadable: a larger fraction of recordings that cannot be decoded stops the run.
        min_recordings: number that a process must have read before the fraction is checked.

    Raises:
        UserError: if a value is out of range.
    """

    shuffle_rows: int = 256
    shard_readers: int = 64
    last_batch: Literal["fill", "drop", "keep"] = "fill"
    max_unreadable: float = 0.2
    min_recordings: int = 200

    def __post_init__(self):
        for name in ("shuffle_rows", "shard_readers", "min_recordings"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.last_batch not in ("fill", "drop", "keep"):
            raise UserError(f"last_batch is {self.last_batch!r}, but must be one of fill, drop, keep")
        if not 0 <= self.max_unreadable <= 1:
            raise UserError(f"max_unreadable is {self.max_unreadable}, but a fraction lies in [0, 1]")

    def check(self, statistics: ReadStatistics) -> None:
        """Raise a `UserError` if too large a fraction of enough recordings is unreadable."""
        unreadable, recordings = statistics.num_unreadable, statistics.recordings
        if recordings >= self.min_recordings and unreadable > self.max_unreadable * recordings:
            raise UserError(
                f"{unreadable} of {recordings} recordings are unreadable, more than max_unreadable = {self.max_unreadable:g}: repair them, "
                f"or raise it. {statistics}"
            )


class Message(NamedTuple):
    """What a worker sends in its turn: a batch, where its readers stand behind it as far as they have moved, and what was read since its
    last message. There may be no batch: behind its last epoch, and in turns that it sits out."""

    turn: int
    batch: Any
    positions: dict[int, Position]
    statistics: ReadStatistics


@dataclass(frozen=True)
class Worker(IterableDataset):
    """The batches of the readers that each worker process has been given; the worker whose turn it is comes first.

    Workers take turns. One that has fewer readers than another sits out turns in proportion: otherwise it would be further ahead with each
    epoch.

    Args:
        readers: all of them.
        positions: where each stands.
        given: the readers of each worker.
        turn: the next one, counted over all workers; the first process of `DataLoader` is the worker that takes it.
        statistics: what was read before.
        batch_size, collate, epochs, settings: see [`BatchStream`].
    """

    readers: Readers
    positions: Mapping[int, Position]
    given: Sequence[Sequence[int]]
    turn: int
    statistics: ReadStatistics
    batch_size: int
    collate: Callable[[list[Clip]], Any]
    epochs: int | None
    settings: StreamSettings

    def __iter__(self) -> Iterator[Message | UserError]:
        worker, workers = get_worker_info(), len(self.given)
        turn = self.turn + (worker.id if worker else 0)
        mine, most = len(self.given[turn % workers]), max(map(len, self.given))
        # Who lets go of a batch last frees its shared memory, and that takes longer than all else the main process does with it.
        kept: deque = deque(maxlen=BATCHES_KEPT if worker else 0)
        try:
            for batch, positions, statistics in self._batches(self.given[turn % workers]):
                while (turn // workers + 1) * mine // most == turn // workers * mine // most:
                    yield Message(turn, None, {}, ReadStatistics())
                    turn += workers
                kept.append(batch)
                yield Message(turn, batch, positions, statistics)
                turn += workers
        except UserError as error:  # sent, because `DataLoader` would add the text of a traceback
            yield error

    def _batches(self, readers: Iterable[int]) -> Iterator[tuple[Any, dict[int, Position], ReadStatistics]]:
        """All of a `Message` but its turn."""
        positions = {reader: self.positions[reader] for reader in readers}
        sent, read, new = dict(positions), self.statistics, ReadStatistics()  # `new`: since the last message

        def message(clips: list[Clip]) -> tuple[Any, dict[int, Position], ReadStatistics]:
            nonlocal sent, read
            moved = {reader: position for reader, position in positions.items() if position != sent[reader]}
            sent, statistics = dict(positions), new.take()
            read = read + statistics
            return self.collate(clips) if clips else None, moved, statistics

        clips: list[Clip] = []
        unusable = dropped = 0  # recordings without a clip, clips dropped, since the last clip and the last batch
        while positions and (epoch := min(position.epoch for position in positions.values())) != self.epochs:
            present = [reader for reader, position in positions.items() if position.epoch == epoch]
            present.sort(key=lambda reader: (positions[reader] == Position(epoch), reader))  # those that were begun come first
            for reader, visits in self.readers.visits(epoch, present).items():
                shards, rows = len(visits) - positions[reader].visit, 0
                for position, clip in self.readers.read(positions[reader], visits, new):
                    positions[reader] = position
                    if clip is not None:
                        unusable = 0
                        clips.append(clip)
                        if len(clips) == self.batch_size:
                            yield message(clips)
                            clips, dropped = [], 0
                        continue
                    if position.epoch == epoch:  # behind a recording
                        unusable, rows = unusable + 1, rows + 1
                    elif rows == 0:  # behind shards without a row that is kept
                        unusable += shards
                    if unusable > 1:
                        self.settings.check(read + new)
                        if unusable > MOST_UNUSABLE_IN_A_ROW:
                            raise UserError(f"more than {MOST_UNUSABLE_IN_A_ROW} recordings or shards in a row gave no clip: {read + new}")
            if self.settings.last_batch == "keep" and clips:
                yield message(clips)
            elif self.settings.last_batch == "drop":
                dropped += len(clips)
                if dropped > 2 * self.batch_size and self.epochs is None:
                    raise UserError(
                        f"last_batch is 'drop', and the last {dropped} clips of a worker were all dropped, since it has fewer than "
                        f"batch_size = {self.batch_size} an epoch ({len(clips)} in epoch {epoch}): use fewer workers, smaller batches, "
                        "or 'fill'"
                    )
            if self.settings.last_batch != "fill":
                clips = []
        yield message(clips)


__all__ = ["Message", "Position", "Readers", "StreamSettings", "Worker"]
