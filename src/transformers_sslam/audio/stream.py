"""Per-rank, per-worker streams of batches that never lose their place.

An epoch's order of shards follows from (seed, epoch) alone (`epoch_order`). Rank r of R takes every R-th shard of it, worker w of W every
W-th of those: a *lane*. A lane reads its shards one after the other and shuffles their rows in blocks of `shuffle_rows`, not in a buffer
that runs on from block to block, so that its place is a handful of numbers, and to resume is to read one block again, however far the
epoch has gone. Each clip comes home with its lane's place behind it, and the stream keeps the places of what it has handed out, not of
what workers have read ahead.
"""

import logging
import math
import multiprocessing.util
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..fbank import frame_geometry
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from .clips import Clip, Tally, Windows, read_clips
from .sources import Row, Source, SourceSettings, epoch_order, random_generator


logger = logging.getLogger(__name__)

# A lane that finds nothing but broken or short recordings sends word after so many of them, so that the stream can stop the run.
SILENCE = 64


@dataclass
class DataSettings:
    """What is heard and how it is cut: the `data` section of a recipe.

    Args:
        sources: the mixture, such as `[{kind: folder, path: recordings}]`. Kinds are folder, audiofolder, manifest, parquet, webdataset and
            hub, further keys those of [`SourceSettings`] (weight, name, split, subset, keep ...). An epoch hears each clip of a source
            `weight` times; with weights of 1, each clip exactly once.
        windows: `"every"` window of a recording longer than the model's input, or one `"random"` window, another each time.
        roll: rotate each clip by a random number of samples, another each time it is heard: no epoch then cuts the same sound into the same
            patches, which keeps a small set of short clips fresh. Not part of the published pre-training.
        min_seconds: recordings, and ends of long ones, that are shorter are left out and counted.
        shuffle_rows: recordings that a worker shuffles together, undecoded; that many files' bytes are held in memory.
        max_broken_share: more than this share of recordings that cannot be decoded stops the run.
        min_recordings: of a rank, over all epochs, before the share is looked at.
        features: where log-mels are computed, `"worker"` or, a batch at a time, `"device"`.
        columns: further columns of the sources that batches carry, as lists.

    Raises:
        ValueError: if a value is out of range, or there is no source.
    """

    sources: list[SourceSettings] = field(default_factory=list)
    windows: Literal["every", "random"] = "every"
    roll: bool = False
    min_seconds: float = 0.2
    shuffle_rows: int = 256
    max_broken_share: float = 0.2
    min_recordings: int = 200
    features: Literal["worker", "device"] = "worker"
    columns: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.sources = [source if isinstance(source, SourceSettings) else SourceSettings.from_dict(source) for source in self.sources]
        if not self.sources:
            raise ValueError("sources is empty: name at least one, for example {kind: folder, path: /data/audio}")
        names = [source.name for source in self.sources]
        if len(set(names)) < len(names):
            raise ValueError(f"sources are named {', '.join(map(str, names))}, but clips are counted by name: give each a name of its own")
        for name, choices in (("windows", ("every", "random")), ("features", ("worker", "device"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be one of {', '.join(choices)}")
        for name, least in (("min_seconds", 0.025), ("shuffle_rows", 1), ("min_recordings", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least {least}")
        if not 0 <= self.max_broken_share <= 1:
            raise ValueError(f"max_broken_share is {self.max_broken_share}, but a share lies in [0, 1]")


@dataclass
class Place:
    """Where a lane stands in its epoch: everything that resuming needs.

    Attributes:
        visit, row: where the present block begins: which of the lane's shards, and which row of it.
        taken: recordings of the block that are finished, in its shuffled order.
        window: windows that the next recording has given already.
        silent: recordings since the lane last sent anything.
        tally: of this epoch so far.
    """

    visit: int = 0
    row: int = 0
    taken: int = 0
    window: int = 0
    silent: int = 0
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Place":
        return cls(**{**values, "tally": Tally.from_dict(values["tally"])})

    def copy(self) -> "Place":
        return replace(self, tally=Tally.from_dict(vars(self.tally)))


class News(NamedTuple):
    """What a lane sends: its place behind `item`, which is `None` when it has only its place to tell."""

    lane: int
    place: Place
    item: Any


class _Waiting(NamedTuple):
    """A row of a block, and where it comes from: which of the lane's shards, and which row of it."""

    row: Row
    visit: int
    number: int


@dataclass(frozen=True)
class Lane:
    """The part of an epoch that one worker of one rank reads.

    Args:
        sources: of the mixture.
        visits: `(visits, 3)`, the lane's own rows of `epoch_order`.
        windows: how recordings are cut.
        shuffle_rows: recordings in a block.
        seed: of the run, followed by what makes this lane's shuffling its own: epoch, rank, lane.
        make: what becomes of a clip, in the worker.
    """

    sources: Sequence[Source]
    visits: np.ndarray
    windows: Windows
    shuffle_rows: int
    seed: tuple[int, ...]
    make: Callable[[Clip], Any]

    def run(self, place: Place) -> Iterator[tuple[Place, Any]]:
        """From a place to the end of the epoch: a place behind each item, and places alone after a silence and at the end."""
        place = place.copy()
        rows = self._rows(place.visit, place.row)
        while block := list(islice(rows, self.shuffle_rows)):
            order = random_generator("block", *self.seed, place.visit, place.row).permutation(len(block))
            for index in order[place.taken :]:
                yield from self._play(block[index], place)
            place.visit, place.row, place.taken = block[-1].visit, block[-1].number + 1, 0
            block.clear()  # before the next one is read: only one is ever in memory
        yield place.copy(), None

    def _play(self, waiting: _Waiting, place: Place) -> Iterator[tuple[Place, Any]]:
        """All clips of a recording, or those that a resumed place has not given yet; `place` moves along."""
        source, lap, shard = self.visits[waiting.visit]
        generator = random_generator("window", self.seed[0], source, lap, shard, waiting.number)
        # A recording is counted when it is begun, so not again when it is gone on with.
        clips = read_clips(waiting.row, self.windows, generator, place.tally if place.window == 0 else Tally())
        for clip in clips[place.window :]:
            place.window += 1
            place.silent = 0
            place.tally.count(self.sources[source].name, clip)
            yield place.copy(), self.make(clip)
        place.taken, place.window, place.silent = place.taken + 1, 0, place.silent + 1
        if place.silent >= SILENCE:
            place.silent = 0
            yield place.copy(), None

    def _rows(self, visit: int, row: int) -> Iterator[_Waiting]:
        for index in range(visit, len(self.visits)):
            source, _, shard = self.visits[index]
            start = row if index == visit else 0
            for number, values in enumerate(self.sources[source].rows(int(shard), start), start):
                yield _Waiting(values, index, number)


class _Worker(IterableDataset):
    """One lane for each worker process, the one that is to speak next first: `DataLoader` begins with its first worker."""

    def __init__(self, lanes: Sequence[Lane], places: Sequence[Place], first: int):
        self.lanes, self.places, self.first = lanes, places, first

    def __iter__(self) -> Iterator[News]:
        worker = get_worker_info()
        lane = ((worker.id if worker else 0) + self.first) % len(self.lanes)
        return (News(lane, *news) for news in self.lanes[lane].run(self.places[lane]))


def _unchanged(news: Any) -> Any:
    """In place of PyTorch's own collation, which would take what lanes send apart and make tensors of what is none."""
    return news


def _start_worker(_: int) -> None:
    import fsspec.asyn

    fsspec.asyn.reset_lock()  # a lock that another thread held at the moment of the fork would never open


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started in here never hear SIGINT and SIGTERM.

    Both often go to a whole group of processes, but it is the run that decides what to do, and its workers end with it. The mask is
    inherited, so there is not even a first moment in which a worker could be hit.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(workers: Iterable[multiprocessing.process.BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


class BatchStream:
    """Batches of one rank, epoch after epoch, from any place.

    Iterating gives what is left of the present epoch and goes on to the next one, so `while True: for batch in stream` never repeats
    or skips a clip. All batches of an epoch are full but its last. Recordings that are left out make the ranks' epochs differ in length by
    some batches: never wait for other ranks at the end of an epoch.

    Args:
        settings: sources and how they are read.
        windows: how recordings are cut.
        make: what becomes of a clip, in the worker.
        collate: what becomes of a list of `batch_size` of those, in the process that iterates.
        batch_size: clips of a batch on this rank.
        seed: of the run, the same on every rank.
        rank: of this process.
        world_size: number of ranks.
        num_workers: processes that read ahead; with 0 this process reads.

    Raises:
        ValueError: if a setting is out of range, a source cannot be opened, or there are fewer shards than ranks.
    """

    def __init__(
        self,
        settings: DataSettings,
        windows: Windows,
        make: Callable[[Clip], Any],
        collate: Callable[[list], Any],
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("rank", rank, 0),
            ("num_workers", num_workers, 0),
            ("world_size", world_size, rank + 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}")
        self.settings, self.windows, self.make, self.collate = settings, windows, make, collate
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.sources = [Source(source) for source in settings.sources]
        self._before = Tally()  # of the epochs that are over
        self._begin(0)
        self._check_enough_shards()

    @property
    def epoch(self) -> int:
        """The epoch that the next batch comes from."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch. In the epoch that is under way already nothing changes, so that resumed runs stay in place."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, but epochs count from 0")
        if epoch != self._epoch:
            self._before = self.report()
            self._begin(epoch)

    def report(self) -> Tally:
        """What this rank has read and left out so far, over all epochs."""
        return sum((place.tally for place in self._places), self._before)

    def __iter__(self) -> Iterator[Any]:
        places, items = list(self._places), []
        for lane, place, item in self._news():
            places[lane] = place
            if item is None:
                self._check_share(places)
                continue
            items.append(item)
            if len(items) == self.batch_size:
                yield self._hand_out(items, places, (lane + 1) % len(places))
                items = []
        if items:
            yield self._hand_out(items, places, 0)
        self._finish_epoch(places)

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last batch that was handed out: plain numbers and strings."""
        return {
            "data": self._identity(),
            "layout": self._layout(),
            "epoch": self._epoch,
            "next_lane": self._next_lane,
            "places": [asdict(place) for place in self._places],
            "before": self._before.as_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that `state_dict` gave, on the same rank.

        With another number of ranks or workers the lanes are others: the epoch begins again, which hears some clips twice and counts anew,
        and a warning says so. Another batch size changes nothing but the size of the batches.

        Raises:
            ValueError: if the state belongs to other sources, another seed or other settings of what is heard; what differs is named.
        """
        mine = self._identity()
        different = [f"{name} ({state['data'].get(name)} then, {mine[name]} now)" for name in mine if state["data"].get(name) != mine[name]]
        if different:
            raise ValueError(
                f"this place belongs to another stream: {'; '.join(different)}. Begin another run, in another folder (its "
                "`init_from` may be this one's model or checkpoint), or restore what it was"
            )
        if state["layout"] == self._layout():
            self._before = Tally.from_dict(state["before"])
            self._begin(state["epoch"])
            self._places = [Place.from_dict(place) for place in state["places"]]
            self._next_lane = state["next_lane"]
            return
        then = state["layout"]
        if then["world_size"] == self.world_size and then["num_workers"] == self.num_workers:
            raise ValueError(f"this place is rank {then['rank']}'s, but this is rank {self.rank}: each rank keeps its own")
        logger.warning(
            "The place in the data was kept by %d ranks with %d workers each, and now there are %d with %d: epoch %d begins again, so the "
            "clips that it had given will be heard twice in it, and counting starts anew",
            *(then["world_size"], then["num_workers"], self.world_size, self.num_workers, state["epoch"]),
        )
        self._before = Tally()
        self._begin(state["epoch"])

    def _begin(self, epoch: int) -> None:
        self._epoch, self._next_lane = epoch, 0
        self._places = [Place() for _ in range(max(1, self.num_workers))]

    def _hand_out(self, items: list, places: list[Place], next_lane: int):
        self._check_share(places)
        self._places, self._next_lane = list(places), next_lane
        return self.collate(items)

    def _finish_epoch(self, places: list[Place]) -> None:
        tally = sum((place.tally for place in places), Tally())
        if tally.num_clips == 0:
            raise ValueError(f"epoch {self._epoch} gave rank {self.rank} no clip at all: {tally}")
        dropped = tally.num_broken or tally.too_short or tally.short_ends
        logger.log(logging.WARNING if dropped else logging.INFO, "Epoch %d, rank %d: %s", self._epoch, self.rank, tally)
        self._before = self._before + tally
        self._begin(self._epoch + 1)

    def _news(self) -> Iterator[News]:
        """What the lanes send, in turns, in an order that does not depend on who is faster."""
        worker = _Worker(self._lanes(), self._places, self._next_lane)
        if self.num_workers == 0:
            return iter(worker)
        loader = DataLoader(
            worker,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            worker_init_fn=_start_worker,
            prefetch_factor=max(2, math.ceil(2 * self.batch_size / self.num_workers)),  # two batches ahead
        )
        others = set(multiprocessing.active_children())
        with _signals_held_back():
            news = iter(loader)
        workers = set(multiprocessing.active_children()) - others
        # Where this process ends by an exception, Python sends SIGTERM to its children, which these do not hear, and waits for them.
        multiprocessing.util.Finalize(news, _kill, (workers,), exitpriority=100)
        return news

    def _lanes(self) -> list[Lane]:
        order = self._order()[self.rank :: self.world_size]
        count = max(1, self.num_workers)
        return [
            Lane(
                self.sources,
                np.ascontiguousarray(order[lane::count]),
                self.windows,
                self.settings.shuffle_rows,
                (self.seed, self._epoch, self.rank, lane),
                self.make,
            )
            for lane in range(count)
        ]

    def _order(self) -> np.ndarray:
        shards = [source.num_shards for source in self.sources]
        return epoch_order(shards, [source.settings.weight for source in self.sources], self.seed, self._epoch)

    def _check_enough_shards(self) -> None:
        shards, lanes = len(self._order()), self.world_size * max(1, self.num_workers)
        advice = "write the sources as more and smaller shards with scripts/prepare_shards.py"
        if shards < self.world_size:
            raise ValueError(f"an epoch has {shards} shards for {self.world_size} ranks, so some would have nothing to read: {advice}")
        if shards < lanes and self.rank == 0:
            logger.warning(
                "An epoch has %d shards for %d ranks with %d workers each, so %d workers have nothing to do (and no clip is lost): "
                "use fewer, or %s",
                *(shards, self.world_size, self.num_workers, lanes - shards, advice),
            )

    def _check_share(self, places: list[Place]) -> None:
        """Stop the run when too many recordings are broken, over this and all former epochs, once there are enough to tell."""
        tally = sum((place.tally for place in places), self._before)
        enough = tally.recordings >= self.settings.min_recordings
        if enough and tally.num_broken > self.settings.max_broken_share * tally.recordings:
            raise ValueError(
                f"{tally.num_broken} of {tally.recordings} recordings are broken, more than max_broken_share = "
                f"{self.settings.max_broken_share:g}: repair them, or raise it. {tally}"
            )

    def _identity(self) -> dict[str, Any]:
        """Whatever decides which clips come in which order. Its differences make a place meaningless."""
        return {
            "seed": self.seed,
            "sources": [[source.signature, source.settings.weight] for source in self.sources],
            "windows": asdict(self.windows),
            "shuffle_rows": self.settings.shuffle_rows,
        }

    def _layout(self) -> dict[str, int]:
        return {"rank": self.rank, "world_size": self.world_size, "num_workers": self.num_workers}


class ClipStream(BatchStream):
    """Log-mel batches for the model: `{"input_values": (batch, frames, mel bins) float32, "attention_mask": (batch, frames) int32, "names":
    [...], "starts": [...]}`.

    The mask is 1 where there is sound and 0 in padding. `names` and `starts` (seconds) say which clips they are; the columns that the
    settings ask for are lists beside them. A recording that is longer than `feature_extractor.max_length` frames is cut into windows that
    lie frame beside frame, none of them lost.

    Args:
        settings: sources and how they are read.
        feature_extractor: its sampling rate, length and scale.
        device: where log-mels are computed if `settings.features` is `"device"`; the batches then lie there.
        kwargs: `batch_size`, `seed`, `rank`, `world_size` and `num_workers` of `BatchStream`.
    """

    def __init__(
        self, settings: DataSettings, feature_extractor: SSLAMFeatureExtractor, *, device: str | torch.device | None = None, **kwargs
    ):
        rate = feature_extractor.sampling_rate
        length, shift = frame_geometry(rate)
        frames = feature_extractor.max_length
        shortest = max(length, round(settings.min_seconds * rate))
        windows = Windows(rate, (frames - 1) * shift + length, frames * shift, settings.windows, shortest, settings.roll)
        in_worker = settings.features == "worker"
        super().__init__(
            settings,
            windows,
            _Features(feature_extractor if in_worker else None, settings.columns),
            _Collate(None if in_worker else feature_extractor, settings.columns, device),
            **kwargs,
        )
        for source in self.sources:
            missing = ", ".join(column for column in settings.columns if column not in source.features)
            if missing:
                raise ValueError(f"the source {source.name} has no column {missing}, only {', '.join(source.features) or 'audio'}")


@dataclass(frozen=True)
class _Features:
    """A clip as the model wants it, `(frames, mel bins)`, with its mask, or still its samples where log-mels are computed later.

    In numpy: arrays travel from workers through a pipe, tensors in shared memory, which is small in many containers, a file handle each.
    """

    extractor: SSLAMFeatureExtractor | None
    columns: Sequence[str]

    def __call__(self, clip: Clip) -> tuple[tuple[np.ndarray, ...], str, float, list]:
        values: tuple[np.ndarray, ...] = (clip.waveform,)
        if self.extractor is not None:
            values = tuple(made[0] for made in _log_mels(self.extractor, clip.waveform, return_tensors="np"))
        return values, clip.name, clip.start, [clip.columns[column] for column in self.columns]


@dataclass(frozen=True)
class _Collate:
    extractor: SSLAMFeatureExtractor | None
    columns: Sequence[str]
    device: str | torch.device | None

    def __call__(self, items: list[tuple[tuple[np.ndarray, ...], str, float, list]]) -> dict[str, Any]:
        made, names, starts, columns = zip(*items)
        if self.extractor is None:
            values, mask = (torch.from_numpy(np.stack(rows)) for rows in zip(*made))
        else:
            values, mask = _log_mels(self.extractor, [waveform for (waveform,) in made], return_tensors="pt", device=self.device)
        about = {"names": list(names), "starts": list(starts), **dict(zip(self.columns, map(list, zip(*columns))))}
        return {"input_values": values, "attention_mask": mask, **about}


def _log_mels(extractor: SSLAMFeatureExtractor, waveforms: Any, **options: Any) -> tuple[Any, Any]:
    features = extractor(waveforms, sampling_rate=extractor.sampling_rate, return_attention_mask=True, **options)
    return features["input_values"], features["attention_mask"]
