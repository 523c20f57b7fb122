"""Write sources of audio once as shuffled parquet shards of 16 kHz mono FLAC, which every later run reads at the speed of the disk.

    python scripts/prepare_shards.py /data/shards --source "{kind: folder, path: /data/fsd50k}" --source "{kind: manifest, path: train.tsv}"

Each row is one recording (or, with --window-seconds, one window): `audio` as `datasets` knows it, then the sources' other columns. The
shards, `shard-00000.parquet` and so on, lie beside `index.json`, which says what was written, and what was left out and why. Interrupted,
the same command goes on after the last shard that is whole, and ends with the same files; a folder begun with other settings is refused.
"""

import argparse
from pathlib import Path

import yaml

from transformers_sslam.data.clips import Tally
from transformers_sslam.data.shards import ShardSettings, prepare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the shards go")
    parser.add_argument("--source", action="append", type=yaml.safe_load, required=True, help="in YAML, as under data.sources of a recipe")
    for name, kind in (("seed", int), ("sampling-rate", int), ("window-seconds", float), ("min-seconds", float), ("clips-per-shard", int)):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    for name, kind in (("clips-per-group", int), ("shuffle-rows", int), ("max-broken-share", float), ("num-workers", int)):
        parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    values = vars(parser.parse_args())
    folder, sources = values.pop("folder"), values.pop("source")
    index = prepare(folder, ShardSettings(sources, **values))
    clipped = sum(shard["clipped"] for shard in index["shards"])
    print(
        f"{len(index['shards'])} shards, {index['clips']} clips, {index['hours']:.2f} hours in {folder}, {clipped} clips beyond full scale"
    )
    print(Tally.from_dict(index["report"]))


if __name__ == "__main__":
    main()
