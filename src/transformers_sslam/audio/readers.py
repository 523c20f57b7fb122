"""Which clips come, and in which order: shard readers, and the worker that makes batches of their clips.

An epoch's order of shards follows from its number and the seed alone. It is dealt to a fixed number of *shard readers*. A reader reads its
shards one after the other and shuffles their rows in blocks of `shuffle_rows`, so its position is five numbers, and resuming reads one
block again. A worker takes its readers one after the other, so it holds one block in memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import UserError
from ..settings import setting
from .cache import WaveformCache
from .clips import Clip, ReadStatistics, Windows, read_clips
from .shared import SharedTensors
from .sources import Row, Source, random_generator


# The run ends after so many recordings without a clip: the other processes would wait for this one for ever.
MOST_UNUSABLE_IN_A_ROW = 1000


class Position(NamedTuple):
    """The position of a shard reader, all that resuming needs."""

    epoch: int = 0
    shard: int = 0  # where the block begins: which of the reader's shards of this epoch,
    row: int = 0  # and which row of it
    taken: int = 0  # recordings of the block that are finished, in its shuffled order
    window: int = 0  # clips that the next recording has given already


@dataclass(frozen=True)
class Readers:
    """The shard readers of a stream."""

    sources: Sequence[Source]
    order: Callable[[int], np.ndarray]  # the shards of an epoch in their order, `(shards, 2)`: source and shard
    count: int  # of readers
    windows: Windows
    shuffle_rows: int  # recordings in a block
    seed: int  # of the run
    cache: WaveformCache | None = None  # of decoded recordings of the first source, a table

    def deal(self, epoch: int, readers: Iterable[int]) -> dict[int, np.ndarray]:
        """The shards of each of these readers in an epoch, `(shards, 3)`: number in the epoch's order, source, shard.

        Dealing begins with another reader each epoch, so that none always has the longer part.
        """
        order = self.order(epoch)
        parts = {reader: np.arange((reader - epoch) % self.count, len(order), self.count) for reader in readers}
        return {reader: np.column_stack((part, order[part])) for reader, part in parts.items()}

    def read(self, position: Position, shards: np.ndarray, statistics: ReadStatistics) -> Iterator[tuple[Position, Clip | None]]:
        """To the end of the epoch: each clip with the position after it, and the position alone after each recording."""
        rows = self._rows(shards, position)
        while block := list(islice(rows, self.shuffle_rows)):
            first_place, first_number, _ = block[0]
            generator = random_generator("block", self.seed, position.epoch, first_place, first_number)
            for index in generator.permutation(len(block))[position.taken :]:
                place, number, row = block[index]
                # Counted when it is begun, and not when a resumed run reads it again.
                counted = statistics if position.window == 0 else ReadStatistics()
                cache = self.cache if row.source == self.sources[0].name else None
                clips = read_clips(row, self.windows, (self.seed, position.epoch, place, number), counted, cache)
                for clip in clips[position.window :]:
                    position = position._replace(window=position.window + 1)
                    statistics.count(clip)
                    yield position, clip
                position = position._replace(taken=position.taken + 1, window=0)
                yield position, None
            place, number, _ = block[-1]
            position = Position(position.epoch, int(np.searchsorted(shards[:, 0], place)), number + 1)
            block.clear()  # before the next one is read: only one is in memory
        yield Position(position.epoch + 1), None

    def _rows(self, shards: np.ndarray, position: Position) -> Iterator[tuple[int, int, Row]]:
        """Rows from the start of a block on: number of their shard in the epoch's order, number in the shard, row."""
        for index in range(position.shard, len(shards)):
            place, source, shard = (int(value) for value in shards[index])
            start = position.row if index == position.shard else 0
            for number, row in enumerate(self.sources[source].rows(shard, start), start):
                yield place, number, row


@dataclass(kw_only=True)
class StreamSettings:
    """How clips are read. Raises `UserError` if a value is out of range."""

    shuffle_rows: int = setting("recordings that are shuffled together; each worker holds their undecoded bytes", 256)
    shard_readers: int = setting(
        "parts of an epoch, divided among processes and workers: the largest number of workers with which the run can be resumed",
        64,
    )
    last_batch: Literal["fill", "drop", "keep"] = setting(
        "clips left at the end of an epoch: fill their batch from the next epoch, drop them, or keep a smaller batch", "fill"
    )
    max_unreadable: float = setting("largest fraction of recordings that cannot be decoded; more stop the run", 0.2)
    min_recordings: int = setting("recordings that a process reads before it checks that fraction", 200)

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
                f"{unreadable} of {recordings} recordings are unreadable, more than max_unreadable = {self.max_unreadable:g}: repair "
                f"them, or raise it. A file counts as often as it was read. {statistics}"
            )


class Message(NamedTuple):
    """What a worker sends in its turn."""

    turn: int
    batch: Any  # `None` after its last epoch and in turns that it skips
    positions: dict[int, Position]  # of those of its readers that have moved
    statistics: ReadStatistics  # since its last message


@dataclass(frozen=True)
class Worker(IterableDataset):
    """The batches of the readers that each worker process has been given.

    Workers take turns. One that has fewer readers than another skips turns in proportion: otherwise it would get ahead.
    """

    readers: Readers
    positions: Mapping[int, Position]  # of each reader
    given: Sequence[Sequence[int]]  # the readers of each worker
    turn: int  # the next one, counted over all workers; the first process of `DataLoader` takes it
    statistics: ReadStatistics  # of what was read before
    shared: SharedTensors  # in which worker processes send tensors
    batch_size: int  # this and the rest: see `BatchStream`
    collate: Callable[[list[Clip]], Any]
    epochs: int | None
    settings: StreamSettings

    def __iter__(self) -> Iterator[Message | UserError]:
        worker, workers = get_worker_info(), len(self.given)
        turn = self.turn + (worker.id if worker else 0)
        mine, most = len(self.given[turn % workers]), max(map(len, self.given))
        try:
            for message in self._messages(self.given[turn % workers]):
                while (turn // workers + 1) * mine // most == turn // workers * mine // most:
                    yield Message(turn, None, {}, ReadStatistics())
                    turn += workers
                yield message._replace(turn=turn, batch=self.shared.pack(message.batch, worker.id) if worker else message.batch)
                turn += workers
        except UserError as error:  # sent, because `DataLoader` would add the text of a traceback
            yield error

    def _messages(self, readers: Iterable[int]) -> Iterator[Message]:
        """Their turns are not set yet."""
        positions = {reader: self.positions[reader] for reader in readers}
        sent, read, new = dict(positions), self.statistics, ReadStatistics()  # `new`: since the last message

        def message(clips: list[Clip]) -> Message:
            nonlocal sent, read
            moved = {reader: position for reader, position in positions.items() if position != sent[reader]}
            sent, statistics = dict(positions), new.take()
            read = read + statistics
            return Message(0, self.collate(clips) if clips else None, moved, statistics)

        clips: list[Clip] = []
        unusable = dropped = 0  # recordings without a clip since the last clip, clips dropped since the last batch
        while positions and (epoch := min(position.epoch for position in positions.values())) != self.epochs:
            present = [reader for reader, position in positions.items() if position.epoch == epoch]
            present.sort(key=lambda reader: (positions[reader] == Position(epoch), reader))  # those that were begun come first
            for reader, shards in self.readers.deal(epoch, present).items():
                left, rows = len(shards) - positions[reader].shard, 0
                for position, clip in self.readers.read(positions[reader], shards, new):
                    positions[reader] = position
                    if clip is not None:
                        unusable = 0
                        clips.append(clip)
                        if len(clips) == self.batch_size:
                            yield message(clips)
                            clips, dropped = [], 0
                        continue
                    if position.epoch == epoch:  # after a recording
                        unusable, rows = unusable + 1, rows + 1
                    elif rows == 0:  # after shards without a row that is kept
                        unusable += left
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
                        f"batch_size = {self.batch_size} an epoch ({len(clips)}): use fewer workers, smaller batches, or 'fill'"
                    )
            if self.settings.last_batch != "fill":
                clips = []
        yield message(clips)
