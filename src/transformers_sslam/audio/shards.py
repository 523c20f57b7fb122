"""The command `prepare`: sources of audio as shuffled Parquet shards of mono FLAC, which later runs read at the speed of the disk.

Each row is a recording, or a window of it: `audio` as `datasets` knows it, then the other columns of the sources. Events are those of
the window, timed from its start; other labels are those of the whole recording. `index.json` beside the shards tells what was written, and
what was left out and why. The same command resumes an interrupted one after the last whole shard, and ends with the same files.
"""

import io
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features, Value
from tqdm import tqdm

from ..errors import UserError
from ..files import DamagedFileError, hash_file, lock, plain_paths, write_atomically, write_json
from ..settings import setting
from .clips import Clip, ReadStatistics, Windows
from .decode import LOWEST_RATE
from .labels import event_columns
from .readers import StreamSettings
from .shard_index import SHARD_INDEX, check_shards, read_index
from .sources import Source, SourceSettings
from .stream import BatchStream


HIGHEST_RATE, HIGHEST_ODD_RATE = 655_350, 65_535  # Hz, that FLAC holds; between them only multiples of 10


@dataclass
class ShardSettings:
    """Everything that determines what the shards hold."""

    output_dir: str = setting("folder of the shards and their index")
    data_dir: str | None = setting("folder of audio files; short for one source of the kind folder", None)
    sources: list[SourceSettings] = setting("sources to read, each recording once, as [{kind: folder, path: recordings}]", [])
    seed: int = setting("random seed of the order", 0)
    sampling_rate: int = setting("sampling rate of the shards in Hz", 16_000)
    window_seconds: float | None = setting("length of windows that longer recordings are cut into; default: they stay whole", None)
    min_seconds: float = setting("shorter recordings, and shorter ends of cut ones, are left out and counted", 0.2)
    clips_per_shard: int = setting("rows of a file; a multiple of clips_per_group", 2048)
    clips_per_group: int = setting("rows that are read at once, and divided among processes and workers", 64)
    shuffle_rows: int = setting("recordings that a worker shuffles together", 1024)
    max_unreadable: float = setting("fraction of unreadable recordings above which the command stops", 0.2)
    dataloader_num_workers: int = setting("worker processes that decode; the order of the rows depends on it", 0)

    def __post_init__(self):
        if (self.data_dir is None) == (not self.sources):
            raise UserError("exactly one of data_dir and sources is expected: the folder to read, or a list of sources")
        self.sources = [SourceSettings.of(source) for source in self.sources or [SourceSettings("folder", str(self.data_dir))]]
        self.data_dir = None
        if weighted := [source.path for source in self.sources if source.weight != 1]:
            raise UserError(f"{', '.join(weighted)} has a weight, but shards hold each recording once: set it to train")
        if self.clips_per_group < 1 or self.clips_per_shard < 1 or self.clips_per_shard % self.clips_per_group:
            raise UserError(
                f"clips_per_shard is {self.clips_per_shard}, but must be a positive multiple of clips_per_group, {self.clips_per_group}"
            )
        if not LOWEST_RATE <= self.sampling_rate <= HIGHEST_RATE or (self.sampling_rate > HIGHEST_ODD_RATE and self.sampling_rate % 10):
            raise UserError(
                f"sampling_rate is {self.sampling_rate}, but {LOWEST_RATE} to {HIGHEST_RATE} Hz are expected, above {HIGHEST_ODD_RATE} in "
                "tens: others cannot be written as FLAC and read back"
            )
        if not 0 <= self.min_seconds < math.inf:
            raise UserError(f"min_seconds is {self.min_seconds:g}, but must be 0 or more")
        if self.window_seconds is not None:
            if not self.min_seconds <= self.window_seconds < math.inf:
                raise UserError(f"window_seconds is {self.window_seconds:g}, but must be at least min_seconds, {self.min_seconds:g}")
            if round(self.window_seconds * self.sampling_rate) < 1:
                raise UserError(
                    f"window_seconds is {self.window_seconds:g}, shorter than a sample at {self.sampling_rate} Hz: give more, or null"
                )


def run(settings: ShardSettings) -> None:
    """Write the shards and print a summary. After Ctrl-C the process exits with status 130, as a shell expects."""
    try:
        index = prepare(settings)
    except KeyboardInterrupt:
        print("stopped: the same command resumes after the last whole shard", file=sys.stderr)
        raise SystemExit(130) from None
    clipped = sum(shard["clipped"] for shard in index["shards"])
    print(
        f"{len(index['shards'])} shards, {index['clips']} clips, {index['hours']:.2f} hours in {settings.output_dir}, "
        f"{clipped} clips beyond full scale"
    )
    print(ReadStatistics.from_dict(index["report"]))


def prepare(settings: ShardSettings) -> dict[str, Any]:
    """Verify the shards that are there, write those that are missing, and return the index.

    Raises:
        UserError: if the folder was begun with other settings or by an older version, another process writes to it, a shard or the index is
            damaged, a source cannot be opened or has changed, or too many recordings are unreadable.
    """
    with lock(folder := Path(settings.output_dir)):
        folder.mkdir(parents=True, exist_ok=True)
        index = _begun_index(folder, settings)
        if not index["complete"]:
            _write_shards(folder, index, settings)
        for source, signature in zip(settings.sources, index.get("sources", [])):  # those of earlier versions are not known
            if Path(source.path).exists() and Source.open(source).signature != signature:
                raise UserError(
                    f"{folder} is finished, but the recordings of {source.name} have changed since, by their names or sizes: choose "
                    "another folder to write them"
                )
        return index


def _begun_index(folder: Path, settings: ShardSettings) -> dict[str, Any]:
    """The index of a folder that was begun, or a new one."""
    path = folder / SHARD_INDEX
    wanted = {name: value for name, value in asdict(settings).items() if name not in ("output_dir", "data_dir")}
    if not path.exists():
        if any(folder.glob("*.parquet")):
            raise UserError(f"{folder} holds parquet files of another origin: choose an empty folder")
        return {"settings": wanted, "complete": False, "shards": [], "position": None}
    index = read_index(path)
    then = index["settings"]
    for new, old in {"max_unreadable": "max_broken_share", "dataloader_num_workers": "num_workers"}.items():
        if old in then:  # of an older version
            then[new] = then.pop(old)
    different = [
        f"{name} ({then.get(name)} then, {wanted[name]} now)" for name in wanted if plain_paths(then.get(name)) != plain_paths(wanted[name])
    ]
    if different:
        raise UserError(f"{folder} was begun with other settings: {'; '.join(different)}. Choose another folder, or the same settings")
    check_shards(folder, index, hashes=True)
    if not index["complete"] and "position" not in index:
        raise UserError(
            f"{folder} was begun by an older version, which writes rows in another order: finish it with that version, or choose another "
            "folder"
        )
    return index


def _write_shards(folder: Path, index: dict[str, Any], settings: ShardSettings) -> None:
    path = folder / SHARD_INDEX
    write_json(path, index, indent=1, sealed=True)  # fails before hours of decoding if the folder cannot be written
    rate, window = settings.sampling_rate, settings.window_seconds
    length = None if window is None else round(window * rate)
    sources = [Source.open(source) for source in settings.sources]
    stream = BatchStream(
        sources,
        Windows(rate, length, length or 0, "every", round(settings.min_seconds * rate)),
        _Encode(rate, _columns_to_cut(sources) if length else []),
        batch_size=settings.clips_per_group,
        settings=StreamSettings(shuffle_rows=settings.shuffle_rows, last_batch="keep", max_unreadable=settings.max_unreadable),
        epochs=1,
        seed=settings.seed,
        num_workers=settings.dataloader_num_workers,
    )
    if index["position"] is not None:
        try:
            stream.load_state_dict([index["position"]])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedFileError(f"{path} is damaged: its position cannot be read ({error})") from error
    schema = shared_features(stream.sources, rate).arrow_schema
    total = sum(source.num_rows or 0 for source in stream.sources) if all(source.num_rows for source in stream.sources) else None
    with tqdm(total=total, initial=stream.statistics.recordings, unit=" recordings", desc=str(folder)) as progress:
        groups = _watched(stream, progress)
        while group := next(groups, None):
            shard = write_shard(folder / f"shard-{len(index['shards']):05d}.parquet", group, groups, settings, schema)
            index["shards"].append(shard)
            index["position"] = stream.state_dict()  # after the last row that is written
            write_json(path, index, indent=1, sealed=True)
    # Complete only now: recordings after the last row may have been left out.
    report = stream.statistics
    hours = report.samples / rate / 3600
    index |= {"complete": True, "position": None, "clips": report.num_clips, "hours": hours, "report": report.as_dict()}
    index["sources"] = [source.signature for source in stream.sources]
    write_json(path, index, indent=1, sealed=True)


def _watched(stream: BatchStream, progress: tqdm) -> Iterator[list]:
    for group in stream:
        progress.update(stream.statistics.recordings - progress.n)
        yield group


def write_shard(path: Path, first: list, groups: Iterator[list], settings: ShardSettings, schema: pa.Schema) -> dict[str, Any]:
    """Write one shard, and describe it for the index."""
    rows, clipped = 0, 0
    try:
        with write_atomically(path, "wb") as file, pq.ParquetWriter(file, schema) as writer:
            for group in chain([first], islice(groups, settings.clips_per_shard // settings.clips_per_group - 1)):
                values = [{**dict.fromkeys(schema.names), **row} for row, _ in group]
                writer.write_table(pa.Table.from_pylist(values, schema=schema))
                rows, clipped = rows + len(group), clipped + sum(is_clipped for _, is_clipped in group)
    except OSError as error:
        raise OSError(f"{path} could not be finished ({error}); the same command resumes after the last whole shard") from error
    return {"file": path.name, "clips": rows, "clipped": clipped, "bytes": path.stat().st_size, "sha256": hash_file(path)}


@dataclass(frozen=True)
class _Encode:  # a function that can be sent to worker processes
    sampling_rate: int
    events: list[str]  # columns of events, which are cut as the recordings are

    def __call__(self, clips: list[Clip]) -> list[tuple[dict[str, Any], bool]]:
        return [encode_flac(clip._replace(columns={**clip.columns, **self._cut(clip)}), self.sampling_rate) for clip in clips]

    def _cut(self, clip: Clip) -> dict[str, Any]:
        """The events of a window. Those without times are of each window."""
        end, cut = len(clip.waveform) / self.sampling_rate, {}
        for column in self.events:
            if clip.columns.get(column):
                events = [_from_start(event, clip.start, end) for event in clip.columns[column]]
                cut[column] = [event for event in events if event["onset"] is None or event["offset"] != event["onset"]]
        return cut


def _from_start(event: dict[str, Any], start: float, end: float) -> dict[str, Any]:
    """An event whose times are counted from `start`, and end at `end`; of no length if it lies outside."""
    if None in (event["onset"], event["offset"]):
        return event
    return {**event, **{name: round(min(max(event[name] - start, 0.0), end), 6) for name in ("onset", "offset")}}


def _columns_to_cut(sources: list[Source]) -> list[str]:
    columns = [(column, source) for source in sources for column in event_columns(source)]
    for column, source in columns:
        item = getattr(source.features[column], "feature", None)
        if not isinstance(item, dict) or [item["onset"], item["offset"]] != [Value("float64")] * 2:
            raise UserError(
                f"window_seconds is set, but the column {column!r} of {source.name} has events whose times are not float64, so that they "
                "cannot be cut: convert them, or leave window_seconds out"
            )
    return list(dict.fromkeys(column for column, _ in columns))


def encode_flac(clip: Clip, sampling_rate: int) -> tuple[dict[str, Any], bool]:
    """The values of a row, and whether samples beyond full scale were clipped."""
    file = io.BytesIO()
    soundfile.write(file, clip.waveform, sampling_rate, format="FLAC", subtype="PCM_16")
    name = Path(clip.name).stem + (f"_{clip.start:.3f}s" if clip.start else "")
    return {**clip.columns, "audio": {"bytes": file.getvalue(), "path": f"{name}.flac"}}, bool(np.abs(clip.waveform).max() > 1)


def shared_features(sources: list[Source], sampling_rate: int) -> Features:
    """The columns of all sources together. `UserError` if two have columns of one name and different types."""
    features = Features({"audio": Audio(sampling_rate=sampling_rate)})
    for source in sources:
        for column, feature in source.features.items():
            if column == "audio" or features.setdefault(column, feature) != feature:
                raise UserError(f"the column {column!r} of {source.name} is another source's too, of another type: write them apart")
    return features
