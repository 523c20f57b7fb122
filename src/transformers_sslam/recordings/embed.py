"""Embeddings of every recording of a folder or a list, for search, clustering or a classifier. Started again, a run is resumed.

```bash
sslam embed --model model_cards/sslam-tiny-esc10 --inputs recordings --output embeddings.parquet              # a vector for each file
sslam embed --model MODEL --inputs archive --output embeddings.parquet --per window --window 10.24 --hop 5.12
sslam embed --model MODEL --inputs archive --output embeddings.parquet --per step --layers 6 12 --pooling patches
```

The output has the columns path, start and end (seconds) and vector; `load_dataset("parquet", data_files="embeddings.parquet")` reads it.
What each vector is, and how to get the same ones in Python, is said at `SSLAMModel.encode`. Recordings that cannot be used are listed in
`embeddings.unusable.csv`, and tried again by the next run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa

from ..configuration_sslam import SSLAMConfig
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMModel
from ..settings import setting
from ..tasks_sslam import Embedding, Pooling
from ..windows_sslam import Windowing
from .formats import utf8, write_tables, write_unusable
from .parts import Parts
from .processing import RecordingsSettings, Summary, process, report


@dataclass(kw_only=True)
class EmbedSettings(RecordingsSettings):
    """Embeddings of recordings"""

    per: Literal["clip", "window", "step"] = setting("a vector for each file, each window, or each time step of 160 ms", "clip")
    layers: list[int] = setting("layers whose outputs are taken, and concatenated; -1: the last, 0: the input of the first", [-1])
    pooling: Pooling | None = setting(
        "how the CLS token or the patches become a vector; of a time step mean, or patches (all, concatenated); null: as the model pools, "
        "and the mean of a step",
        None,
    )

    model_class: ClassVar = SSLAMModel
    suffixes: ClassVar = (".parquet",)

    def task(self, config: SSLAMConfig, extractor: SSLAMFeatureExtractor) -> Embedding:
        """Vectors of each file, window or time step."""
        windowing = Windowing.of_model(config, extractor, hop=self.hop, window=self.window, per=self.per)
        return Embedding(config, extractor, windowing, self.per, tuple(self.layers), self.pooling)


def run(settings: EmbedSettings) -> None:
    """Embed, and print the counts."""
    report(embed_files, settings)


def embed_files(settings: EmbedSettings) -> Summary:
    """Embeddings of all recordings of `settings.inputs`. See [`process`] for what is raised."""
    return process(settings, _write)


def _write(parts: Parts, paths: list[str], output: Path, task: Embedding) -> None:
    """The output, and a list of the recordings that it lacks."""
    vectors = parts.schema.field("values").type
    schema = pa.schema([("path", pa.string()), ("start", pa.float64()), ("end", pa.float64()), ("vector", vectors)])

    def vectors_of_usable() -> Iterator[pa.Table]:
        for path, entry, tables in parts.read(paths):
            for table in tables if entry.error is None else ():
                names = pa.repeat(pa.scalar(utf8(path)), len(table))
                yield pa.Table.from_arrays([names, table["start"], table["end"], table["values"]], schema=schema)

    with parts.replace(output) as file:
        write_tables(file, schema, vectors_of_usable(), parts.rows_at_once)
    write_unusable(parts, output, paths)
