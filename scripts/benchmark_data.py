"""How fast is the input path, and how long does resuming take?

    python scripts/benchmark_data.py                                        # synthetic recordings
    python scripts/benchmark_data.py --source "{kind: folder, path: /data/fsd50k}" --json speed.json

Clips a second of one core, from the source to the log-mel batch (read, decode, mix down, resample, cut, filter bank, scale, stack), once by
the clock and once by the processor's own time, which other programs do not disturb. Then the seconds from nothing to the first batch of a
stream that resumes after 10, 10,000 and 1,000,000 clips, for a manifest and for parquet shards of more rows than that; they must not grow.
Medians of several runs, with the fastest and the slowest.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import yaml
from datasets import Audio, Features, disable_progress_bars
from prepare_shards import ShardSettings, prepare

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.data.clips import Tally
from transformers_sslam.data.sources import SourceSettings
from transformers_sslam.data.stream import ClipStream, DataSettings, Place


ROWS_PER_GROUP = 64
RECORDING_SECONDS = 10.0
CHECKED_UP_TO = 100  # clips that are really read to check a computed place


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


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
    prepare(folder / "shards", ShardSettings([sources[-1]]))
    return [*sources, {"kind": "parquet", "path": str(folder / "shards")}]


def clips_per_second(source: dict, extractor: SSLAMFeatureExtractor, batch_size: int, batches: int) -> dict[str, float]:
    """Of this process, reading alone."""
    stream = ClipStream(DataSettings([SourceSettings.from_dict(source)]), extractor, batch_size=batch_size)
    next(iter(stream))  # whatever is set up once
    clock, processor, clips = time.perf_counter(), time.process_time(), 0
    while clips < batches * batch_size:
        for batch in islice(stream, batches - clips // batch_size):
            clips += len(batch["input_values"])
    return {"by the clock": clips / (time.perf_counter() - clock), "by processor time": clips / (time.process_time() - processor)}


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


def place_after(stream: ClipStream, clips: int, rows_per_shard: int) -> dict:
    """The state of a stream that has given so many clips, where each row is one clip and every shard has as many rows."""
    state, block = stream.state_dict(), stream.settings.shuffle_rows
    start = clips - clips % block
    place = Place(
        start // rows_per_shard, start % rows_per_shard, clips % block, tally=Tally(clips, {stream.sources[0].name: clips}, clips * 16_000)
    )
    return {**state, "places": [asdict(place)]}


def seconds_to_resume(source: dict, extractor: SSLAMFeatureExtractor, batch_size: int, clips: int) -> dict[str, float]:
    """From nothing to the first batch: open the source, go to the place, read."""

    def fresh() -> ClipStream:
        return ClipStream(DataSettings([SourceSettings.from_dict(source)]), extractor, batch_size=batch_size)

    state = place_after(fresh(), clips, ROWS_PER_GROUP if source["kind"] == "parquet" else 1)
    if clips <= CHECKED_UP_TO:
        check_place(fresh, state, clips)
    begin = time.perf_counter()
    stream = fresh()
    opened = time.perf_counter()
    stream.load_state_dict(state)
    next(iter(stream))
    return {"to open": opened - begin, "to resume": time.perf_counter() - opened}


def check_place(fresh: Callable[[], ClipStream], state: dict, clips: int) -> None:
    """A stream that really went there goes on with the same clips."""
    walked, jumped = fresh(), fresh()
    walked.batch_size = 1
    for _ in islice(walked, clips):
        pass
    jumped.load_state_dict(state)
    walked.batch_size = jumped.batch_size
    if next(iter(walked))["names"] != next(iter(jumped))["names"]:
        raise RuntimeError(f"the place computed for {clips} clips is not where reading {clips} clips leads")


def measure(what: str, repeats: int, run: Callable[[], dict[str, float]]) -> dict:
    runs = [run() for _ in range(repeats)]
    spreads = {name: spread([values[name] for values in runs]) for name in runs[0]}
    cells = [f"{name} {value['median']:9.3f} ({value['min']:.3f} - {value['max']:.3f})" for name, value in spreads.items()]
    print(f"{what:52}" + "".join(f"{cell:>50}" for cell in cells), flush=True)
    return {"what": what, **spreads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", action="append", type=yaml.safe_load, help="in YAML, as under data.sources of a recipe")
    parser.add_argument("--max-length", type=int, default=1024, help="frames of the model's input")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--batches", type=int, default=10, help="measured in each run")
    parser.add_argument("--recordings", type=int, default=48, help="synthetic ones of each format")
    parser.add_argument("--resume-after", type=int, nargs="+", default=[10, 10_000, 1_000_000], help="clips")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    extractor = SSLAMFeatureExtractor(max_length=args.max_length)
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, list[dict]] = {"clips a second of one core": [], "seconds from nothing to the first batch": []}
        print("Clips a second of one core: median (slowest - fastest)")
        for source in args.source or synthetic_sources(Path(folder), args.recordings):
            what = f"{source['kind']} {source['path']}"
            run = partial(clips_per_second, source, extractor, args.batch_size, args.batches)
            results["clips a second of one core"].append(measure(what, args.repeats, run))
        rows = max(args.resume_after) + 1024 * ROWS_PER_GROUP
        print(f"Seconds from nothing to the first batch, in {rows} rows: median (fastest - slowest)")
        for source in many_rows(Path(folder), rows):
            for clips in args.resume_after:
                run = partial(seconds_to_resume, source, extractor, args.batch_size, clips)
                what = f"{source['kind']}, after {clips} clips"
                results["seconds from nothing to the first batch"].append(measure(what, args.repeats, run))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
