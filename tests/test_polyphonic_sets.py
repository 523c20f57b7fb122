"""Polyphonic sets of speakers and of instruments, by their recipes, of miniature data sets, and a training on each."""

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import read_rows
from transformers_sslam.errors import UserError
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.training import fine_tune
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.settings import read_settings


SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
FAMILIES = ("bass", "brass", "flute", "guitar", "keyboard", "mallet", "organ", "reed", "string", "vocal")
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def write_tone(path: Path, pitch: float, seconds: float, rate: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.2 * np.sin(2 * np.pi * pitch * time) * np.exp(-time), rate)


@pytest.fixture
def fsdd(tmp_path) -> Path:
    """Two training recordings and one test recording of two digits of each speaker."""
    for number, speaker in enumerate(SPEAKERS):
        for digit in (0, 7):
            for index in (0, 5, 6):
                write_tone(
                    tmp_path / "fsdd" / "recordings" / f"{digit}_{speaker}_{index}.wav", 200 + 30 * number + digit + index, 0.4, 8000
                )
    return tmp_path / "fsdd"


@pytest.fixture
def nsynth(tmp_path) -> Path:
    """Two instruments of each family, one a split, and synth_lead in training alone."""
    for split in ("train", "test"):
        examples = {}
        for number, family in enumerate([*FAMILIES, *(["synth_lead"] if split == "train" else [])]):
            for pitch in (60, 64):
                instrument = f"{family}_acoustic_{0 if split == 'train' else 1:03d}"
                name = f"{instrument}-{pitch:03d}-100"
                examples[name] = {
                    **{"instrument_str": instrument, "instrument_family_str": family, "instrument_source_str": "acoustic"},
                    **{"pitch": pitch, "velocity": 100},
                }
                file = tmp_path / "nsynth" / f"nsynth-{split}" / "audio" / f"{name}.wav"
                write_tone(file, 100 + 40 * number + pitch + (split == "test"), 4.0, 16_000)
        (tmp_path / "nsynth" / f"nsynth-{split}" / "examples.json").write_text(json.dumps(examples))
    return tmp_path / "nsynth"


def mixed(recipe: str, folder: Path, **changes) -> tuple[dict, datasets.DatasetDict]:
    values = {"data_dir": str(folder), "output_dir": str(folder.parent / "mixed"), "train_clips": 4, "test_clips": 2, **changes}
    settings = read_settings(BenchmarkSettings, recipe, values)
    return make_benchmark(settings), open_splits(settings.output_dir, "parquet")


def files_of(rows) -> set[str]:
    return {event["source"] for events in rows["events"] for event in events}


def test_mixtures_of_speakers_have_as_many_speakers_as_digits_and_no_recording_twice(fsdd):
    report, splits = mixed("polyphonic_speakers", fsdd)
    assert report["classes"] == list(SPEAKERS)
    assert report["clips"] == {"train": 16, "test": 8}
    assert report["sources"] == {"train": 24, "test": 12}
    for split, rows in splits.items():
        labelled = read_rows(rows, "labels").labels
        assert Counter(map(len, labelled)) == dict.fromkeys((1, 2, 3, 4), 4 if split == "train" else 2)
        assert rows["num_events"] == rows["max_overlap"] == list(map(len, labelled))
        for row, labels in zip(rows, labelled):
            assert sorted(labels) == sorted(Path(event["source"]).stem.split("_")[1] for event in row["events"])
    assert {Path(file).stem.split("_")[2] for file in files_of(splits["test"])} == {"0"}
    assert {Path(file).stem.split("_")[2] for file in files_of(splits["train"])} == {"5", "6"}


def test_mixtures_can_be_of_digits_instead(fsdd):
    report, splits = mixed("polyphonic_speakers", fsdd, label_column="label", num_events=[2])
    assert report["classes"] == ["0", "7"]
    assert all(labels == ["0", "7"] for labels in map(sorted, read_rows(splits["train"], "labels").labels))


def test_mixtures_of_instruments_have_other_instruments_in_the_test_and_the_same_families(nsynth):
    report, splits = mixed("polyphonic_instruments", nsynth)
    assert report["classes"] == list(FAMILIES)  # not synth_lead, which the test lacks
    assert report["clips"] == {"train": 24, "test": 12}
    assert report["recordings"] == {"train": 10, "test": 10}
    for rows in splits.values():
        for row, labels in zip(rows, read_rows(rows, "labels").labels):
            assert sorted(labels) == sorted(Path(event["source"]).stem.split("_")[0] for event in row["events"])
            assert len(labels) == row["num_events"] == row["max_overlap"]
    assert not {file.split("-")[1] for file in files_of(splits["train"])} & {file.split("-")[1] for file in files_of(splits["test"])}


def test_an_instrument_in_two_splits_is_rejected(nsynth):
    table = nsynth / "nsynth-train" / "examples.json"
    table.write_text(table.read_text().replace('"flute_acoustic_000"', '"flute_acoustic_001"'))
    with pytest.raises(UserError, match="train and test share 1 recording: flute_acoustic_001: choose folds or splits"):
        mixed("polyphonic_instruments", nsynth)


def test_a_part_of_the_instruments_can_be_held_out_where_the_training_notes_are_not_there(nsynth):
    (nsynth / "nsynth-train").rename(nsynth / "nsynth-valid")
    with pytest.raises(UserError, match="there is no split 'train', only validation, test"):
        mixed("polyphonic_instruments", nsynth)
    report, _ = mixed("polyphonic_instruments", nsynth, test_fraction=0.5, classes=["bass", "guitar"], num_events=[2], seed=7)
    assert report["recordings"] == {"train": 2, "test": 2}


@pytest.mark.parametrize(("recipe", "changes"), [("polyphonic_speakers", {}), ("polyphonic_instruments", {"num_events": [1, 2]})])
def test_a_model_can_be_trained_on_them(fsdd, nsynth, tmp_path, recipe, changes):
    folder = fsdd if recipe == "polyphonic_speakers" else nsynth
    report, _ = mixed(recipe, folder, train_clips=20, test_clips=8, **changes)
    words = {
        "data_dir": str(tmp_path / "mixed"),
        "output_dir": str(tmp_path / "model"),
        "max_steps": 3,
        "model_config": TINY,
        "normalization": "computed",
    }
    results = fine_tune(read_settings(FineTuningSettings, "finetune_tiny_polyphonic", words))
    assert results["classes"] == report["classes"]
    assert 0 < results["metrics"]["mean_average_precision"] < 1
    scores = np.load(tmp_path / "model" / "scores.npz")
    assert scores["targets"].sum(1).tolist() == open_splits(tmp_path / "mixed", "parquet")["test"]["num_events"][:]
