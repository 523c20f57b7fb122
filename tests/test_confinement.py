"""Rows of a data set that name files instead of holding audio: below the data set they are read, elsewhere never."""

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio.batches import ClipStream, DataSettings
from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.paths import confined_path
from transformers_sslam.audio.rows import read_rows
from transformers_sslam.audio.shards import ShardSettings, prepare


SOUND = np.full(8000, 0.1)
ELSEWHERE = [
    "../private.wav",
    "file://{private}",
    "{private}",
    "link.wav",
    "http://127.0.0.1:9/x.wav",
    "ssh://host/x.wav",
    "hf://datasets/somebody/else@main/x.wav",
    "zip://x.wav::{private}",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Parquet with one clip held in it, two named below it, some named elsewhere, and one that is not there at all."""
    private, folder = tmp_path / "private.wav", tmp_path / "data"
    (folder / "clips").mkdir(parents=True)
    soundfile.write(private, SOUND, 16_000)
    soundfile.write(folder / "clips" / "below.wav", SOUND, 16_000)
    (folder / "link.wav").symlink_to(private)
    held = io.BytesIO()
    soundfile.write(held, SOUND, 16_000, format="WAV")
    paths = ["clips/below.wav", str(folder / "clips" / "below.wav"), *(path.format(private=private) for path in ELSEWHERE), None]
    audio = [{"bytes": held.getvalue(), "path": str(private)}, *({"bytes": None, "path": path} for path in paths)]
    rows = Dataset.from_dict({"audio": audio, "label": ["a"] * len(audio)}).cast_column("audio", Audio(decode=False))
    # Not `to_parquet`, which would open what the paths name.
    pq.write_table(rows.data.table.replace_schema_metadata(rows.features.arrow_schema.metadata), folder / "train-0.parquet")
    return folder


def sources(folder: Path) -> list[dict]:
    return [{"kind": "parquet", "path": str(folder)}]


def test_a_stream_opens_nothing_outside_of_its_data_set(folder):
    settings = DataSettings(sources=sources(folder), last_batch="keep", max_unreadable=1.0)
    stream = ClipStream(settings, SSLAMFeatureExtractor(max_length=64), batch_size=4, epochs=1)
    names = sorted(Path(name).name for batch in stream for name in batch["names"])
    assert names == ["below.wav", "below.wav", "private.wav"]  # the last is held in the parquet, under that name
    assert stream.statistics.unreadable == {"unreadable": len(ELSEWHERE), "missing": 1}
    assert all("lies outside of" in example or "neither bytes nor a path" in example for example in stream.statistics.examples)


def test_shards_hold_nothing_from_outside(folder, tmp_path):
    index = prepare(ShardSettings(str(tmp_path / "shards"), sources=sources(folder), max_unreadable=1.0))
    assert index["clips"] == 3
    assert index["report"]["unreadable"] == {"unreadable": len(ELSEWHERE), "missing": 1}


def test_a_table_opens_nothing_outside_of_its_data_set(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = read_rows(open_splits(folder, "parquet")["train"], "label")
    waveforms = Waveforms(rows.sources, 16_000)
    assert waveforms.kept == [0, 1, 2]
    assert {cause: len(names) for cause, names in waveforms.unreadable.items()} == {"missing": len(ELSEWHERE) + 1}
    assert f"{len(ELSEWHERE)} rows of {folder} name files outside of it, which are not opened, such as ../private.wav" in caplog.text


@pytest.mark.parametrize(
    ("path", "root", "found"),
    [
        ("hf://datasets/me/sounds@main/a.wav", "me/sounds", "hf://datasets/me/sounds@main/a.wav"),
        ("zip://a.wav::hf://datasets/me/sounds/b.zip", "me/sounds", "zip://a.wav::hf://datasets/me/sounds/b.zip"),
        ("hf://datasets/me/sounds@main/../../other/a.wav", "me/sounds", None),
        ("hf://datasets/me/sounds2/a.wav", "me/sounds", None),
        ("https://example.org/a.wav", "me/sounds", None),
        ("http://127.0.0.1/a.zip::x.wav", "me/sounds", None),
        ("a\0.wav", ".", None),
    ],
)
def test_a_path_is_below_its_data_set_or_not(path, root, found):
    assert confined_path(path, root) == found
