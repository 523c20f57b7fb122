"""Sources of audio written once as shuffled parquet shards of mono FLAC, which every later run reads at the speed of the disk.

Each row is one recording, or one window of it: `audio` as `datasets` knows it, then the sources' other columns. The shards,
`shard-00000.parquet` and so on, lie beside `index.json`, which says what was written, and what was left out and why. Interrupted, the same
call goes on after the last shard that is whole, and ends with the same files; a folder begun with other settings is refused.
"""

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features
from tqdm import tqdm

from ..errors import UserError
from ..files import DamagedFileError, hash_file, lock, write_atomically, write_json
from .clips import Clip, Windows
from .readers import StreamSettings
from .shard_index import SHARD_INDEX, check_shards, read_index
from .sources import Source, SourceSettings
from .stream import BatchStream


@dataclass
class ShardSettings:
    """Everything that decides what the shards hold.

    Args:
        sources: what to read, each recording once.
        seed: of the order.
        sampling_rate: in Hz.
        window_seconds: cut longer recordings into windows of this length; `None` writes them whole.
        min_seconds: shorter recordings, and ends of cut ones, are left out and counted.
        clips_per_shard: rows of a file; a multiple of `clips_per_group`.
        clips_per_group: rows of a row group, the smallest piece that is read at once and that ranks and workers share out.
        shuffle_rows: recordings that a worker shuffles together, besides the order of the sources' own shards.
        max_unreadable: a larger fraction of recordings that cannot be decoded stops the writing.
        num_workers: processes that decode. Part of the settings, because the order of the rows depends on it.
    """

    sources: list[dict]
    seed: int = 0
    sampling_rate: int = 16_000
    window_seconds: float | None = None
    min_seconds: float = 0.2
    clips_per_shard: int = 2048
    clips_per_group: int = 64
    shuffle_rows: int = 1024
    max_unreadable: float = 0.2
    num_workers: int = 0

    def __post_init__(self):
        self.sources = [asdict(SourceSettings.from_dict(source)) for source in self.sources]
        weighted = [source["path"] for source in self.sources if source["weight"] != 1]
        if weighted:
            raise UserError(f"{', '.join(weighted)} has a weight, but shards hold each recording once: weigh them when you train")
        if self.clips_per_group < 1 or self.clips_per_shard < 1 or self.clips_per_shard % self.clips_per_group:
            raise UserError(
                f"clips_per_shard is {self.clips_per_shard}, but must be a positive multiple of clips_per_group, {self.clips_per_group}"
            )
        if self.window_seconds is not None and self.window_seconds < self.min_seconds:
            raise UserError(f"window_seconds is {self.window_seconds}, but must be at least min_seconds, {self.min_seconds}")


def encode_flac(clip: Clip, sampling_rate: int) -> tuple[dict[str, Any], bool]:
    """A row's values, and whether samples beyond full scale had to be clipped."""
    file = io.BytesIO()
    soundfile.write(file, clip.waveform, sampling_rate, format="FLAC", subtype="PCM_16")
    name = Path(clip.name).stem + (f"_{clip.start:.3f}s" if clip.start else "")
    return {**clip.columns, "audio": {"bytes": file.getvalue(), "path": f"{name}.flac"}}, bool(np.abs(clip.waveform).max() > 1)


@dataclass(frozen=True)
class _Encode:  # a function that worker processes can be sent
    sampling_rate: int

    def __call__(self, clips: list[Clip]) -> list[tuple[dict[str, Any], bool]]:
        return [encode_flac(clip, self.sampling_rate) for clip in clips]


def shared_features(sources: list[Source], sampling_rate: int) -> Features:
    """The columns of all sources together; a source without one of them has nulls there.

    Raises:
        ValueError: if two sources mean different things by one name.
    """
    features = Features({"audio": Audio(sampling_rate=sampling_rate)})
    for source in sources:
        for column, feature in source.features.items():
            if column == "audio" or features.setdefault(column, feature) != feature:
                raise ValueError(f"the column {column!r} of {source.name} is another source's too, of another type: write them apart")
    return features


def prepare(folder: Path, settings: ShardSettings) -> dict[str, Any]:
    """Write all shards that are missing, after verifying those that are there. Returns the index.

    Raises:
        UserError: if the folder was begun with other settings or by an older version, another process writes to it, a shard or the index is
            damaged, a source cannot be opened, or too many recordings are unreadable.
    """
    with lock(folder):
        return _prepare(folder, settings)


def _prepare(folder: Path, settings: ShardSettings) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    index = _begun_index(folder, settings)
    if index["complete"]:
        return index
    if "position" not in index:
        raise UserError(
            f"{folder} was begun by an older version, which writes rows in another order: finish it with that version, or begin again in "
            "an empty folder"
        )
    # Now, so that a folder that cannot be written is noticed before hours of decoding.
    write_json(folder / SHARD_INDEX, index, indent=1, sealed=True)
    rate, window = settings.sampling_rate, settings.window_seconds
    length = None if window is None else round(window * rate)
    stream = BatchStream(
        [Source.open(SourceSettings(**source)) for source in settings.sources],
        Windows(rate, length, length or 0, "every", round(settings.min_seconds * rate)),
        _Encode(rate),
        batch_size=settings.clips_per_group,
        settings=StreamSettings(shuffle_rows=settings.shuffle_rows, last_batch="keep", max_unreadable=settings.max_unreadable),
        epochs=1,
        seed=settings.seed,
        num_workers=settings.num_workers,
    )
    if index["position"] is not None:
        try:
            stream.load_state_dict([index["position"]])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedFileError(f"{folder / SHARD_INDEX} is damaged: its position is not one of this program ({error!r})") from error
    schema = shared_features(stream.sources, rate).arrow_schema
    total = sum(source.num_rows or 0 for source in stream.sources) if all(source.num_rows for source in stream.sources) else None
    with tqdm(total=total, initial=stream.statistics.recordings, unit=" recordings", desc=str(folder)) as progress:
        groups = _watched(stream, progress)
        while group := next(groups, None):
            shard = write_shard(folder / f"shard-{len(index['shards']):05d}.parquet", group, groups, settings, schema)
            index["shards"].append(shard)
            # The position is the one behind the last row written: should the next shard not be finished, it is written again from here.
            index["position"] = stream.state_dict()
            write_json(folder / SHARD_INDEX, index, indent=1, sealed=True)
    # The last recordings may all have been left out, after the last row: only at the end of the epoch everything is counted.
    report = stream.statistics
    hours = report.samples / rate / 3600
    index |= {"complete": True, "position": None, "clips": report.num_clips, "hours": hours, "report": report.as_dict()}
    write_json(folder / SHARD_INDEX, index, indent=1, sealed=True)
    return index


def _watched(stream: BatchStream, progress: tqdm) -> Iterator[list]:
    for group in stream:
        progress.update(stream.statistics.recordings - progress.n)
        yield group


def write_shard(path: Path, first: list, groups: Iterator[list], settings: ShardSettings, schema: pa.Schema) -> dict[str, Any]:
    """Write one shard under another name, see it safely on the disk, and only then call it by its own."""
    rows, clipped = 0, 0
    try:
        with write_atomically(path, "wb") as file, pq.ParquetWriter(file, schema) as writer:
            for group in chain([first], islice(groups, settings.clips_per_shard // settings.clips_per_group - 1)):
                values = [{**dict.fromkeys(schema.names), **row} for row, _ in group]
                writer.write_table(pa.Table.from_pylist(values, schema=schema))
                rows, clipped = rows + len(group), clipped + sum(loud for _, loud in group)
    except OSError as error:
        raise OSError(f"{path} could not be finished ({error}); the same command goes on after the shards that are whole") from error
    return {"file": path.name, "clips": rows, "clipped": clipped, "bytes": path.stat().st_size, "sha256": hash_file(path)}


def _begun_index(folder: Path, settings: ShardSettings) -> dict[str, Any]:
    """The index of a folder that was begun, or a new one.

    Raises:
        UserError: if the index is damaged, the folder was begun with other settings, naming them, or holds shards that no index knows.
    """
    path = folder / SHARD_INDEX
    wanted = asdict(settings)
    if not path.exists():
        if any(folder.glob("*.parquet")):
            raise UserError(f"{folder} holds parquet files of another origin (it has no {SHARD_INDEX}): choose an empty folder")
        return {"settings": wanted, "complete": False, "shards": [], "position": None}
    index = read_index(path)
    then = index["settings"]
    if "max_broken_share" in then:  # its name in older versions
        then["max_unreadable"] = then.pop("max_broken_share")
    different = [f"{name} ({then.get(name)} then, {wanted[name]} now)" for name in wanted if then.get(name) != wanted[name]]
    if different:
        raise UserError(f"{folder} was begun with other settings: {'; '.join(different)}. Choose another folder, or the same settings")
    check_shards(folder, index, hashes=True)
    return index


__all__ = ["ShardSettings", "prepare"]
