"""Sources of audio written once as shuffled parquet shards of mono FLAC, which every later run reads at the speed of the disk.

Each row is one recording, or one window of it: `audio` as `datasets` knows it, then the sources' other columns. The shards,
`shard-00000.parquet` and so on, lie beside `index.json`, which says what was written, and what was left out and why. Interrupted, the same
call goes on after the last shard that is whole, and ends with the same files; a folder begun with other settings is refused.
"""

import io
import json
import os
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

from .clips import Clip, Windows
from .sources import SHARD_INDEX, Source, SourceSettings
from .stream import BatchStream, DataSettings


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
        max_broken_share: more than this share of recordings that cannot be decoded stops the writing.
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
    max_broken_share: float = 0.2
    num_workers: int = 0

    def __post_init__(self):
        self.sources = [asdict(SourceSettings.from_dict(source)) for source in self.sources]
        weighted = [source["path"] for source in self.sources if source["weight"] != 1]
        if weighted:
            raise ValueError(f"{', '.join(weighted)} has a weight, but shards hold each recording once: weigh them when you train")
        if self.clips_per_group < 1 or self.clips_per_shard < 1 or self.clips_per_shard % self.clips_per_group:
            raise ValueError(
                f"clips_per_shard is {self.clips_per_shard}, but must be a positive multiple of clips_per_group, {self.clips_per_group}"
            )
        if self.window_seconds is not None and self.window_seconds < self.min_seconds:
            raise ValueError(f"window_seconds is {self.window_seconds}, but must be at least min_seconds, {self.min_seconds}")


def encode_flac(clip: Clip, sampling_rate: int) -> tuple[dict[str, Any], bool]:
    """A row's values, and whether samples beyond full scale had to be clipped."""
    file = io.BytesIO()
    soundfile.write(file, clip.waveform, sampling_rate, format="FLAC", subtype="PCM_16")
    name = Path(clip.name).stem + (f"_{clip.start:.3f}s" if clip.start else "")
    return {**clip.columns, "audio": {"bytes": file.getvalue(), "path": f"{name}.flac"}}, bool(np.abs(clip.waveform).max() > 1)


@dataclass(frozen=True)
class _Encode:  # a function that worker processes can be sent
    sampling_rate: int

    def __call__(self, clip: Clip) -> tuple[dict[str, Any], bool]:
        return encode_flac(clip, self.sampling_rate)


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
    """Write all shards that are missing. Returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    index = read_index(folder, settings)
    if index["complete"]:
        return index
    write_index(folder, index)  # now, so that a folder that cannot be written is noticed before hours of decoding
    rate, window = settings.sampling_rate, settings.window_seconds
    length = None if window is None else round(window * rate)
    stream = BatchStream(
        DataSettings(
            [SourceSettings(**source) for source in settings.sources],
            shuffle_rows=settings.shuffle_rows,
            max_broken_share=settings.max_broken_share,
        ),
        Windows(rate, length, length or 0, "every", round(settings.min_seconds * rate)),
        _Encode(rate),
        list,
        batch_size=settings.clips_per_group,
        seed=settings.seed,
        num_workers=settings.num_workers,
    )
    if index["place"] is not None:
        stream.load_state_dict(index["place"])
    schema = shared_features(stream.sources, rate).arrow_schema
    total = sum(source.num_rows or 0 for source in stream.sources) if all(source.num_rows for source in stream.sources) else None
    with tqdm(total=total, initial=stream.report().recordings, unit=" recordings", desc=str(folder)) as progress:
        groups = _watched(stream, progress)
        while group := next(groups, None):
            shard = write_shard(folder / f"shard-{len(index['shards']):05d}.parquet", group, groups, settings, schema)
            index["shards"].append(shard)
            # The place is the one behind the last row written: should the next shard not be finished, it is written again from here.
            index["place"] = stream.state_dict()
            write_index(folder, index)
    # The last recordings may all have been left out, after the last row: only at the end of the epoch everything is counted.
    report = stream.report()
    hours = report.samples / rate / 3600
    index |= {"complete": True, "place": None, "clips": report.num_clips, "hours": hours, "report": report.as_dict()}
    write_index(folder, index)
    return index


def _watched(stream: BatchStream, progress: tqdm) -> Iterator[list]:
    for group in stream:
        progress.update(stream.report().recordings - progress.n)
        yield group


def write_shard(path: Path, first: list, groups: Iterator[list], settings: ShardSettings, schema: pa.Schema) -> dict[str, Any]:
    """Write one shard under another name, see it safely on the disk, and only then call it by its own."""
    unfinished = path.with_suffix(".unfinished")
    rows, clipped = 0, 0
    try:
        with unfinished.open("wb") as file:
            with pq.ParquetWriter(file, schema) as writer:
                for group in chain([first], islice(groups, settings.clips_per_shard // settings.clips_per_group - 1)):
                    values = [{**dict.fromkeys(schema.names), **row} for row, _ in group]
                    writer.write_table(pa.Table.from_pylist(values, schema=schema))
                    rows, clipped = rows + len(group), clipped + sum(loud for _, loud in group)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} could not be finished ({error}); the same command goes on after the shards that are whole") from error
    return {"file": path.name, "clips": rows, "clipped": clipped}


def read_index(folder: Path, settings: ShardSettings) -> dict[str, Any]:
    """The index of a folder that was begun, or a new one.

    Raises:
        ValueError: if the folder was begun with other settings, naming them, or holds shards that no index knows.
    """
    path = folder / SHARD_INDEX
    wanted = asdict(settings)
    if not path.exists():
        if any(folder.glob("*.parquet")):
            raise ValueError(f"{folder} holds parquet files of another origin (it has no {SHARD_INDEX}): choose an empty folder")
        return {"settings": wanted, "complete": False, "shards": [], "place": None}
    index = json.loads(path.read_text())
    then = index["settings"]
    different = [f"{name} ({then.get(name)} then, {wanted[name]} now)" for name in wanted if then.get(name) != wanted[name]]
    if different:
        raise ValueError(f"{folder} was begun with other settings: {'; '.join(different)}. Choose another folder, or the same settings")
    missing = [shard["file"] for shard in index["shards"] if not (folder / shard["file"]).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing)}, which its {SHARD_INDEX} names: put them back, or begin anew in an empty folder"
        )
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    unfinished = folder / f"{SHARD_INDEX}.unfinished"
    with unfinished.open("w") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / SHARD_INDEX)


__all__ = ["ShardSettings", "prepare"]
