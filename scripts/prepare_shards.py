"""Write sources of audio once as shuffled parquet shards of 16 kHz mono FLAC, which every later run reads at the speed of the disk.

    python scripts/prepare_shards.py /data/shards --source "{kind: folder, path: /data/fsd50k}" --source "{kind: manifest, path: train.tsv}"

Each row is one recording (or, with --window-seconds, one window): `audio` as `datasets` knows it, then the sources' other columns. The
shards, `shard-00000.parquet` and so on, lie beside `index.json`, which says what was written, and what was left out and why. Interrupted,
the same command goes on after the last shard that is whole, and ends with the same files; a folder begun with other settings is refused.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from transformers_sslam.audio.clips import ReadStatistics
from transformers_sslam.audio.shards import ShardSettings, prepare
from transformers_sslam.audio.sources import parse_source


OPTIONS = {
    "seed": (int, "of the order"),
    "sampling_rate": (int, "in Hz"),
    "window_seconds": (float, "cut longer recordings into windows of this length"),
    "min_seconds": (float, "shorter recordings, and ends of cut ones, are left out and counted"),
    "clips_per_shard": (int, "rows of a file; a multiple of --clips-per-group"),
    "clips_per_group": (int, "rows that are read at once, and that ranks and workers share out"),
    "shuffle_rows": (int, "recordings that a worker shuffles together"),
    "max_unreadable": (float, "a larger fraction of recordings that cannot be decoded stops the writing, from the 200th recording on"),
    "num_workers": (int, "processes that decode; the order of the rows follows from it too"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--source", action="append", type=parse_source, required=True, help="in YAML, as under data.sources of a recipe")
    defaults = {field.name: field.default for field in fields(ShardSettings)}
    for name, (kind, help) in OPTIONS.items():
        default = defaults[name]
        text = f"{help} (by default {'they stay whole' if default is None else default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    values = vars(parser.parse_args())
    folder, sources = values.pop("folder"), values.pop("source")
    try:
        index = prepare(folder, ShardSettings(sources, **values))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    clipped = sum(shard["clipped"] for shard in index["shards"])
    print(
        f"{len(index['shards'])} shards, {index['clips']} clips, {index['hours']:.2f} hours in {folder}, {clipped} clips beyond full scale"
    )
    print(ReadStatistics.from_dict(index["report"]))


if __name__ == "__main__":
    main()
