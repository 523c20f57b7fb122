"""What the input path costs: clips a second of one core, from the source to the log-mel batch (read, decode, mix down, resample, cut,
filter bank, scale, stack), the time that the main process itself spends on a batch made by workers, and the seconds from nothing to the
first batch of a stream that resumes far into its data, which must not grow."""

import io
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Audio, Features
from timing import spread

from transformers_sslam.audio.batches import ClipStream, DataSettings
from transformers_sslam.audio.readers import Position
from transformers_sslam.audio.shards import ShardSettings, prepare
from transformers_sslam.audio.sources import SourceSettings
from transformers_sslam.feature_extraction_sslam import SSLAMFeatureExtractor


ROWS_PER_GROUP = 64
RECORDING_SECONDS = 10.0
CHECKED_UP_TO = 100  # clips that are really read to check a computed position
WORKERS = 2


def synthetic_sources(folder: Path, recordings: int) -> list[dict]:
    """Stereo at 44.1 kHz in three formats, and the last of them as prepared shards."""
    generator = np.random.default_rng(0)
    sources = []
    for kind in ("wav", "flac", "ogg"):
        (folder / kind).mkdir()
        for number in range(recordings):
            samples = generator.standard_normal((round(RECORDING_SECONDS * 44_100), 2)).cumsum(axis=0)
            soundfile.write(folder / kind / f"{number:04d}.{kind}", samples / np.abs(samples).max(), 44_100)
        sources.append({"kind": "folder", "path": str(folder / kind)})
    prepare(ShardSettings(str(folder / "shards"), data_dir=sources[-1]["path"]))
    return [*sources, {"kind": "parquet", "path": str(folder / "shards")}]


def cost(source: dict, extractor: SSLAMFeatureExtractor, batch_size: int, batches: int) -> dict[str, float]:
    """Of this process, reading alone and taking what workers read."""

    def timed(num_workers: int) -> tuple[float, float]:
        stream = ClipStream(DataSettings([SourceSettings.of(source)]), extractor, batch_size=batch_size, num_workers=num_workers)
        ready = iter(stream)
        for _ in range(max(1, 2 * num_workers)):
            next(ready)  # whatever is set up once
        clock, processor = time.perf_counter(), time.process_time()
        for _ in islice(ready, batches):
            pass
        return time.perf_counter() - clock, time.process_time() - processor

    clock, processor = timed(0)
    _, beside_workers = timed(WORKERS)
    return {
        "clips a second by the clock": batches * batch_size / clock,
        "clips a second by processor time": batches * batch_size / processor,
        f"ms of the main process a batch beside {WORKERS} workers": 1000 * beside_workers / batches,
    }


def many_rows(folder: Path, rows: int) -> list[dict]:
    """A manifest and parquet shards of so many rows, all of them the same second of near silence."""
    file = io.BytesIO()
    soundfile.write(file, np.full(16_000, 0.001, dtype=np.float32), 16_000, format="FLAC")
    (folder / "one.flac").write_bytes(file.getvalue())
    (folder / "many.tsv").write_text(".\n" + "one.flac\t16000\n" * rows)
    (folder / "many").mkdir()
    schema = Features({"audio": Audio(sampling_rate=16_000)}).arrow_schema
    per_file = 1024 * ROWS_PER_GROUP
    for part, start in enumerate(range(0, rows, per_file)):
        audio = [{"bytes": file.getvalue(), "path": f"{number}.flac"} for number in range(start, min(rows, start + per_file))]
        table = pa.table({"audio": pa.array(audio, type=schema.field("audio").type)}, schema=schema)
        pq.write_table(table, folder / "many" / f"{part:03d}.parquet", row_group_size=ROWS_PER_GROUP)
    return [{"kind": "manifest", "path": str(folder / "many.tsv")}, {"kind": "parquet", "path": str(folder / "many")}]


def state_after(stream: ClipStream, clips: int, rows_per_shard: int) -> dict:
    """The state of a stream that has given so many clips, where each row is one clip and every shard has as many rows."""
    state, block, left = stream.state_dict(), stream.readers.shuffle_rows, clips
    for reader, visits in stream.readers.deal(0, range(stream.readers.count)).items():
        if left == 0:
            break
        rows = rows_per_shard * len(visits)
        start, taken = divmod(left - 1, block)
        last = start * block - 1  # row of the reader; a block begins behind the last row of the one before
        position = Position(0, last // rows_per_shard, last % rows_per_shard + 1) if start else Position()
        # The last clip's recording counts as finished when the next one is begun.
        state["positions"][str(reader)] = list(Position(1) if left > rows else position._replace(taken=taken, window=1))
        left -= min(left, rows)
    return state


def seconds_to_resume(source: dict, extractor: SSLAMFeatureExtractor, batch_size: int, clips: int) -> dict[str, float]:
    """From nothing to the first batch: open the source, go to the place, read."""

    def fresh() -> ClipStream:
        return ClipStream(DataSettings([SourceSettings.of(source)]), extractor, batch_size=batch_size)

    state = state_after(fresh(), clips, ROWS_PER_GROUP if source["kind"] == "parquet" else 1)
    if clips <= CHECKED_UP_TO:
        check_state(fresh, state, clips)
    begin = time.perf_counter()
    stream = fresh()
    opened = time.perf_counter()
    stream.load_state_dict([state])
    next(iter(stream))
    return {"seconds to open": opened - begin, "seconds to resume": time.perf_counter() - opened}


def check_state(fresh: Callable[[], ClipStream], state: dict, clips: int) -> None:
    """A stream that really read so many clips stands there."""
    stream = fresh()
    stream.batch_size = 1
    for _ in islice(stream, clips):
        pass
    if stream.state_dict()["positions"] != state["positions"]:
        raise RuntimeError(f"the position computed for {clips} clips is not where reading {clips} clips leads")


def measure_data(
    sources: Sequence[dict[str, Any]] | None = None,
    *,
    max_length: int = 1024,
    batch_size: int = 12,
    batches: int = 10,
    recordings: int = 48,
    resume_after: Sequence[int] = (10, 10_000, 1_000_000),
    repeats: int = 5,
) -> list[dict[str, Any]]:
    """Each source read, by the clock and by the processor's own time, which other programs do not disturb; then streams resumed.

    Args:
        sources: as under `data.sources` of a recipe; by default stereo at 44.1 kHz, made up, in three formats and as prepared shards.
        max_length: frames of the model's input.
        batch_size: clips of a batch.
        batches: of each run.
        recordings: made-up ones of each format.
        resume_after: clips, of a manifest and of shards of more rows than that.
        repeats: runs.
    """
    extractor, results = SSLAMFeatureExtractor(max_length=max_length), []

    def measure(what: str, run: Callable[[], dict[str, float]]) -> None:
        runs = [run() for _ in range(repeats)]
        results.append({"what": what, **{name: spread([values[name] for values in runs]) for name in runs[0]}})

    with tempfile.TemporaryDirectory() as folder:
        for source in sources or synthetic_sources(Path(folder), recordings):
            measure(f"{source['kind']} {Path(source['path']).name}", partial(cost, source, extractor, batch_size, batches))
        for source in many_rows(Path(folder), max(resume_after, default=0) + 1024 * ROWS_PER_GROUP) if resume_after else []:
            for clips in resume_after:
                measure(f"{source['kind']}, after {clips:,} clips", partial(seconds_to_resume, source, extractor, batch_size, clips))
    return results
