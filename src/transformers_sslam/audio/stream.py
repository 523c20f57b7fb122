"""Batches of clips from any position, for any number of processes.

The shard readers of an epoch (`audio.readers`) are divided among the processes of a run and their workers. A run that is resumed with
other numbers of them gives the same readers to others, each at its position.
"""

import logging
import multiprocessing.util
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import UserError
from .cache import WaveformCache
from .clips import Clip, ReadStatistics, Windows
from .readers import Message, Position, Readers, StreamSettings, Worker
from .shared import SharedTensors
from .sources import EpochOrder, Source


logger = logging.getLogger(__name__)


class BatchStream:
    """Batches of one process of a run, from any position.

    Iterating continues after the last batch, for ever or to the end of the last epoch; no clip is repeated or left out. Unusable
    recordings make the epochs of the processes differ in length by some batches: never wait for other processes at their ends.

    Args:
        sources, windows, settings: what is read, and how.
        collate: makes a batch of a list of clips, in the worker.
        batch_size: clips of a batch.
        order: gives the shards of an epoch in their order, `(shards, 2)`; by default [`EpochOrder`].
        epochs: their number; `None` for no end.
        seed: of the run, the same in every process.
        rank: of this process.
        world_size: number of processes.
        num_workers: worker processes that read ahead; with 0 this process reads.
        pin_memory: copy the workers' batches to pinned memory, for a GPU.
        cache: see [`Readers`].

    Attributes:
        statistics: what this process has read and left out, over all epochs.

    Raises:
        UserError: if a setting is out of range, or there are fewer shards or readers than processes.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        windows: Windows,
        collate: Callable[[list[Clip]], Any],
        *,
        batch_size: int,
        settings: StreamSettings | None = None,
        order: Callable[[int], np.ndarray] | None = None,
        epochs: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        cache: WaveformCache | None = None,
    ):
        limits = {"batch_size": (batch_size, 1), "seed": (seed, 0), "rank": (rank, 0), "num_workers": (num_workers, 0)}
        for name, (value, least) in {**limits, "world_size": (world_size, rank + 1)}.items():
            if value < least:
                raise UserError(f"{name} is {value}, but must be at least {least}")
        self.sources, self.collate, self.batch_size, self.epochs = list(sources), collate, batch_size, epochs
        self.settings = settings or StreamSettings()
        self.rank, self.world_size, self.num_workers, self.pin_memory = rank, world_size, num_workers, pin_memory
        order = order or EpochOrder([source.num_shards for source in sources], [source.weight for source in sources], seed)
        self.readers = Readers(self.sources, order, self.settings.shard_readers, windows, self.settings.shuffle_rows, seed, cache)
        if cache is not None and self.sources[0].num_rows is None:
            raise ValueError(f"the source {self.sources[0].name} is a stream, but only recordings of a table can be kept in a cache")
        self.statistics = ReadStatistics()
        self._positions = dict.fromkeys(range(rank, self.settings.shard_readers, world_size), Position())
        self._turn = 0  # the next one of the workers'
        self._check_enough_shards(len(order(0)))

    @property
    def epoch(self) -> int:
        """The earliest epoch that one of this process's readers is in."""
        return min(position.epoch for position in self._positions.values())

    def __iter__(self) -> Iterator[Any]:
        epoch, warned_of = self.epoch, self.statistics
        behind = {reader for reader, position in self._positions.items() if position.epoch == epoch}
        for message in self._messages():
            if isinstance(message, UserError):
                raise message
            self._positions.update(message.positions)
            self.statistics = self.statistics + message.statistics
            self._turn = message.turn + 1
            self.settings.check(self.statistics)
            behind.difference_update(reader for reader, position in message.positions.items() if position.epoch > epoch)
            if not behind:
                epoch = self.epoch
                behind = {reader for reader, position in self._positions.items() if position.epoch == epoch}
                if _left_out(self.statistics) != _left_out(warned_of):  # otherwise the same files again
                    warned_of = self.statistics
                    process = f"Process {self.rank}: " if self.world_size > 1 else ""
                    filled = ", and the start of the next, which fills the last batch" if self.settings.last_batch == "fill" else ""
                    logger.warning("%sUp to the end of epoch %d%s: %s", process, epoch - 1, filled, self.statistics)
            if message.batch is not None:
                yield message.batch
        if self.statistics.num_clips == 0:
            raise UserError(f"process {self.rank} found no clip at all: {self.statistics}")

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, for JSON."""
        return {
            "data": self._identity(),
            "recordings": self._recordings(),
            "layout": self._layout(),
            "turn": self._turn,
            "positions": {str(reader): list(position) for reader, position in self._positions.items()},
            "statistics": self.statistics.as_dict(),
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Set the position that all processes of a run had together.

        With as many processes and workers as then, exactly the batches that would have followed come. With others, the clips of an epoch
        are divided into other batches, but each still comes exactly once.

        Args:
            states: `state_dict` of each process, by rank.

        Raises:
            UserError: if they belong to other data, another seed or other settings of how it is read.
        """
        mine, older = self._identity(), "positions" not in states[0]
        if older:  # kept positions for each worker, and knew sources by the names of their files alone
            del mine["sources"]
        then = {name: value for state in states for name, value in state["data"].items() if name in mine and value != mine[name]}
        if then:
            different = "; ".join(f"{name} ({value} then, {mine[name]} now)" for name, value in then.items() if name != "sources")
            if "sources" in then:
                different = "; ".join(filter(None, [self._what_changed(then["sources"], states[0].get("recordings")), different]))
            raise UserError(
                f"this position belongs to another stream: {different}. Restore that, or begin another run in another folder (its `model` "
                "may be a checkpoint of this one)"
            )
        if older:
            epoch = min(state["epoch"] for state in states)
            logger.warning("The position in the data was kept in an older form: epoch %d begins again", epoch)
            self._positions, self._turn = dict.fromkeys(self._positions, Position(epoch)), 0
            return
        positions = {int(reader): Position(*values) for state in states for reader, values in state["positions"].items()}
        if missing := [reader for reader in self._positions if reader not in positions]:
            raise UserError(f"the positions of the shard readers {missing} are missing: give the states of all processes")
        self._positions = {reader: positions[reader] for reader in self._positions}
        if [state["layout"] for state in states] == [self._layout() | {"rank": rank} for rank in range(self.world_size)]:
            self._turn = states[self.rank]["turn"]
            self.statistics = ReadStatistics.from_dict(states[self.rank]["statistics"])
        else:  # what other processes have read is counted by the first
            totals = [ReadStatistics.from_dict(state["statistics"]) for state in states]
            self._turn, self.statistics = 0, sum(totals if self.rank == 0 else [], ReadStatistics())

    def _messages(self) -> Iterator[Message | UserError]:
        """What the workers send, in turns, whichever is faster."""
        readers, workers = sorted(self._positions), max(1, self.num_workers)
        given = [readers[worker::workers] for worker in range(workers)]
        shared = SharedTensors(self.num_workers)
        worker = Worker(
            *(self.readers, self._positions, given, self._turn, self.statistics, shared),
            *(self.batch_size, self.collate, self.epochs, self.settings),
        )
        if self.num_workers == 0:
            yield from worker
            return
        loader = DataLoader(
            worker,
            batch_size=None,
            num_workers=workers,
            pin_memory=self.pin_memory,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # of the workers' seeds, so that the run's random state stays as it is
        )
        others = set(multiprocessing.active_children())
        with _signals_blocked():
            batches = iter(loader)
        started = set(multiprocessing.active_children()) - others
        # If this process ends by an exception, Python sends its children SIGTERM, which these block, and waits for them.
        kill = multiprocessing.util.Finalize(None, _kill, (started,), exitpriority=100)
        try:
            yield from batches
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # which hold the iterator too
            if isinstance(error, (ConnectionError, EOFError)):
                raise RuntimeError("a worker was killed while it sent a batch, perhaps for lack of memory") from error
            raise
        finally:
            del batches  # the last reference: PyTorch ends the workers
            kill()  # those that did not end: a read may hang

    def _check_enough_shards(self, shards: int) -> None:
        readers, processes, workers = self.settings.shard_readers, self.world_size, self.world_size * max(1, self.num_workers)
        all_workers, advice = f"{processes} processes with {self.num_workers} workers each", "write smaller shards with `sslam prepare`"
        if shards < processes:
            raise UserError(f"an epoch has {shards} shards for {processes} processes, too few: {advice}")
        if readers < workers:
            raise UserError(f"shard_readers is {readers}, but {all_workers} need {workers} at least")
        if self.rank == 0 and readers % processes:
            logger.warning(
                f"shard_readers is {readers}, which cannot be divided evenly among {processes} processes, so some get ahead of others: "
                "choose a multiple"
            )
        if self.rank == 0 and shards < workers:
            logger.warning(
                f"An epoch has {shards} shards for {all_workers}, so in each epoch {workers - shards} workers have nothing to do: use "
                f"fewer, or {advice}"
            )

    def _identity(self) -> dict[str, Any]:
        """What decides which clips come in which order: a position is valid only for the same."""
        return {
            "seed": self.readers.seed,
            "sources": [[source.signature, source.weight] for source in self.sources],
            "windows": asdict(self.readers.windows),
            "shuffle_rows": self.readers.shuffle_rows,
            "shard_readers": self.readers.count,
        }

    def _recordings(self) -> list[list[Any]]:
        """Name of each source, and how many recordings it has, or shards of a stream: only to say what has changed."""
        return [[source.name, *self._size(source)] for source in self.sources]

    @staticmethod
    def _size(source: Source) -> tuple[int, str]:
        return (source.num_shards, "shards") if source.num_rows is None else (source.num_rows, "files")

    def _what_changed(self, identities: list, recordings: list | None) -> str:
        """In words, how the sources differ from those with these identities."""
        if len(identities) != len(self.sources):
            return f"there were {len(identities)} sources then, and there are {len(self.sources)} now"
        changes = []
        for i, (source, (signature, weight)) in enumerate(zip(self.sources, identities)):
            if signature != source.signature:
                count, unit = self._size(source)
                then = recordings[i][1] if recordings else None
                counts = f" ({then} {unit} then, {count} now)" if then not in (None, count) else ", by their names or sizes"
                changes.append(f"the recordings of {source.name} have changed{counts}")
            elif weight != source.weight:
                changes.append(f"the weight of {source.name} ({weight:g} then, {source.weight:g} now)")
        return "; ".join(changes)

    def _layout(self) -> dict[str, int]:
        return {"rank": self.rank, "world_size": self.world_size, "num_workers": self.num_workers}


def _left_out(statistics: ReadStatistics) -> tuple:
    """Changes when a warning has something new to say."""
    return statistics.examples, statistics.rows, bool(statistics.too_short), bool(statistics.short_ends)


def _unchanged(message: Any) -> Any:
    """Instead of PyTorch's own collation, which would take messages apart."""
    return message


def _start_worker(_: int) -> None:
    import fsspec.asyn

    fsspec.asyn.reset_lock()  # a lock that another thread held at the moment of the fork would never be released


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started in here never receive SIGINT and SIGTERM, since they inherit the mask.

    Both are often sent to a whole group of processes, but the run decides what to do, and its workers end with it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(workers: Iterable[multiprocessing.process.BaseProcess]) -> None:
    if multiprocessing.util.is_exiting():  # PyTorch would report each worker that ends
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
