"""Data sets whose labels have times, each built in miniature as its authors distribute it, and folders with a column of events."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from pyarrow.parquet import write_table

from transformers_sslam.audio.annotations import read_texts
from transformers_sslam.audio.labels import Event
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import read_rows
from transformers_sslam.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def write_clips(folder: Path, *names: str, samples: int = 160) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        soundfile.write(folder / f"{name}.wav", np.zeros(samples), 16_000)


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), errors="surrogateescape")


def read(rows) -> dict[str, list[Event] | list[str]]:
    """The events of each clip, or, where they have no times, its classes; and a check that `labels` says the same classes."""
    events, tags = read_rows(rows, "events"), read_rows(rows, "labels").labels
    found = {}
    for i in range(len(events)):
        assert sorted(events.labels[i]) == sorted(tags[i])
        found[events.name(i).split("/")[-1]] = events.labels.events(i) if events.labels.has_times(i) else events.labels[i]
    return found


STRONG = "filename\tonset\toffset\tevent_label"


# --- DESED and DCASE 2024 task 4


@pytest.fixture
def desed(tmp_path) -> Path:
    audio, metadata = tmp_path / "audio", tmp_path / "metadata"
    write_clips(audio / "train" / "weak", "Y--a_30.000_40.000", "Y--b_0.000_10.000")
    write_text(
        metadata / "train" / "weak.tsv",
        *("filename\tevent_labels", "Y--a_30.000_40.000.wav\tSpeech,Dog", "Y--gone_0.000_10.000.wav\tCat", "Y--b_0.000_10.000.wav\t"),
    )
    write_clips(audio / "train" / "strong_label_real", "Y--c_1.000_11.000")
    write_text(metadata / "train" / "audioset_strong.tsv", STRONG, "Y--c_1.000_11.000.wav\t0.0\t2.5\tSpeech")
    for part, offset in (("train", 1), ("validation", 2)):
        write_clips(audio / "train" / f"synthetic21_{part}" / "soundscapes_16k", "0", "1")
        write_text(metadata / "train" / f"synthetic21_{part}" / "soundscapes.tsv", STRONG, f"0.wav\t0.5\t{offset}\tCat", "1.wav\t\t\t")
    write_clips(audio / "train" / "unlabel_in_domain", "Y--d_0.000_10.000")
    write_clips(audio / "validation" / "validation", "Y--e_0.000_10.000")
    write_text(metadata / "validation" / "validation.tsv", STRONG, "Y--e_0.000_10.000.wav\t1\t2\tDog", "Y--e_0.000_10.000.wav\t2\t3\tDog")
    write_text(metadata / "validation" / "validation_durations.tsv", "filename\tduration", "Y--e_0.000_10.000.wav\t10")
    write_clips(audio / "eval" / "public", "Y--f_0.000_10.000")
    write_text(metadata / "eval" / "public.tsv", STRONG, "Y--f_0.000_10.000.wav\t0\t10\tVacuum_cleaner")
    cafe = "cafe_restaurant_00-000-010"
    write_clips(audio / "maestro_real_train", cafe)
    write_text(
        metadata / "maestro_real_train.tsv",
        *(
            f"{STRONG}\tconfidence",
            "cafe_restaurant_00-000-010.wav\t0\t1\tcutlery\t0.25",
            "cafe_restaurant_00-000-010.wav\t1\t2\tcutlery\t0.75",
        ),
    )
    return tmp_path


def test_desed_has_weak_and_strong_labels(desed, caplog):
    splits = open_splits(desed, "desed")
    assert set(splits) == {"train", "validation", "test", "validation_synthetic"}
    assert splits["train"].features["labels"].feature.names[:2] == ["Alarm_bell_ringing", "Blender"]
    assert read(splits["train"]) == {
        "Y--a_30.000_40.000.wav": ["Speech", "Dog"],
        "Y--b_0.000_10.000.wav": [],
        "Y--c_1.000_11.000.wav": [Event("Speech", 0.0, 2.5)],
        "0.wav": [Event("Cat", 0.5, 1.0)],
        "1.wav": [],
    }
    assert read(splits["validation_synthetic"])["0.wav"] == [Event("Cat", 0.5, 2.0)]
    assert read(splits["validation"]) == {"Y--e_0.000_10.000.wav": [Event("Dog", 1.0, 3.0)]}
    assert read(splits["test"]) == {"Y--f_0.000_10.000.wav": [Event("Vacuum_cleaner", 0.0, 10.0)]}
    assert "weak.tsv: 1 of 3 clips (33.3%) are not below" in caplog.text
    assert "Y--gone_0.000_10.000" in caplog.text


@pytest.mark.parametrize(("layout", "subset"), [("desed", "strong"), ("dcase2024_task4", "strong")])
def test_desed_without_weak_labels(desed, layout, subset):
    splits = open_splits(desed, layout, subset=subset)
    assert sorted(read(splits["train"])) == ["0.wav", "1.wav", "Y--c_1.000_11.000.wav"]


def test_only_the_weak_labels_of_desed(desed):
    splits = open_splits(desed, "desed", subset="weak")
    assert {name: list(read(rows)) for name, rows in splits.items()} == {"train": ["Y--a_30.000_40.000.wav", "Y--b_0.000_10.000.wav"]}
    labels = read_rows(splits["train"], "events").labels
    np.testing.assert_array_equal(labels.step_targets(0, 1.0, 2), np.full((2, 2), -100))
    np.testing.assert_array_equal(labels.one_hot(0), [1, 1])


def test_soft_labels_of_task_4_are_apart(desed):
    splits = open_splits(desed, "dcase2024_task4", subset="maestro")
    assert {name: read(rows) for name, rows in splits.items()} == {
        "train": {"cafe_restaurant_00-000-010.wav": [Event("cutlery", 1.0, 2.0)]}
    }
    np.testing.assert_allclose(read_rows(splits["train"], "events").labels.step_targets(0, 1.0, 3), [[0.25], [0.75], [0]])
    assert read(open_splits(desed, "dcase2024_task4", subset="desed")["train"]) == read(open_splits(desed, "desed")["train"])


def test_what_of_desed_is_not_there_or_not_listed_is_said(desed, caplog):
    (desed / "audio" / "train" / "strong_label_real" / "Y--c_1.000_11.000.wav").unlink()
    write_clips(desed / "audio" / "eval" / "public", "Y--more")
    assert "Y--c_1.000_11.000.wav" not in read(open_splits(desed, "desed")["train"])
    assert "audioset_strong.tsv: none of its 1 clips is in" in caplog.text
    assert "does not list, which are left out: 1 (Y--more)" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "metadata").rename(root / "meta"), r"holds audio/, meta/, but expected is DESED"),
        (lambda root: (root / "metadata" / "train").rename(root / "train"), "nothing of the subset weak: there is no table for it in"),
        (
            lambda root: (root / "audio" / "train").rename(root / "train"),
            "subset weak: none of the clips of its 1 tables is",
        ),
        (
            lambda root: write_text(root / "metadata" / "train" / "weak.tsv", "filename\tevent_labels", "Y--a_30.000_40.000.wav\tDog,Cow"),
            "line 2 of .*weak.tsv has the label 'Cow', which is none of the 10 classes",
        ),
    ],
)
def test_damage_to_desed_is_named(desed, damage, message):
    damage(desed)
    with pytest.raises(UserError, match=message):
        open_splits(desed, "desed", subset="weak")


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "", "loud"])
def test_a_soft_label_out_of_range_is_named(desed, value):
    name = "cafe_restaurant_00-000-010.wav"
    write_text(desed / "metadata" / "maestro_real_train.tsv", f"{STRONG}\tconfidence", f"{name}\t0\t1\tcutlery\t{value}")
    with pytest.raises(UserError, match=f"line 2 of .* has the value '{value}', but a soft label is a number from 0 to 1"):
        open_splits(desed, "dcase2024_task4", subset="maestro")


def test_events_of_no_length_are_left_out_and_counted(desed, caplog):
    write_text(desed / "metadata" / "eval" / "public.tsv", STRONG, "Y--f_0.000_10.000.wav\t3\t3\tDog", "Y--f_0.000_10.000.wav\t4\t5\tCat")
    assert read(open_splits(desed, "desed")["test"]) == {"Y--f_0.000_10.000.wav": [Event("Cat", 4.0, 5.0)]}
    assert "clips with events of no length, which are left out: 1 (Y--f_0.000_10.000.wav)" in caplog.text


# --- AudioSet with strong labels


@pytest.fixture
def audioset_strong(tmp_path) -> Path:
    header = "segment_id\tstart_time_seconds\tend_time_seconds\tlabel"
    write_text(
        tmp_path / "audioset_train_strong.tsv",
        *(header, "b0RFKhbpFJA_30000\t0.000\t10.000\t/m/03m9d0z", "b0RFKhbpFJA_30000\t4.753\t5.720\t/m/05zppz"),
        "---1_cCGK4M_0\t0.000\t1.000\t/m/05zppz",
    )
    write_text(tmp_path / "audioset_eval_strong.tsv", header, "s9d-2nhuJCQ_30000\t2.627\t7.237\t/t/dd00138")
    write_text(tmp_path / "mid_to_display_name.tsv", "/m/03m9d0z\tWind", "/m/05zppz\tMale speech, man speaking", "/t/dd00138\tBrief tone")
    write_clips(tmp_path / "train", "Yb0RFKhbpFJA", "---1_cCGK4M_0_10000")
    write_clips(tmp_path / "eval", "s9d-2nhuJCQ_30000")
    return tmp_path


def test_audioset_strong_has_events_by_display_name(audioset_strong):
    splits = open_splits(audioset_strong, "audioset_strong")
    assert {name: read(rows) for name, rows in splits.items()} == {
        "train": {
            "Yb0RFKhbpFJA.wav": [Event("Wind", 0.0, 10.0), Event("Male speech, man speaking", 4.753, 5.72)],
            "---1_cCGK4M_0_10000.wav": [Event("Male speech, man speaking", 0.0, 1.0)],
        },
        "test": {"s9d-2nhuJCQ_30000.wav": [Event("Brief tone", 2.627, 7.237)]},
    }
    assert set(open_splits(audioset_strong, "audioset_strong", subset="eval")) == {"test"}


def test_audioset_strong_without_names_or_with_equal_ones_keeps_classes_apart(audioset_strong):
    write_text(audioset_strong / "mid_to_display_name.tsv", "/m/03m9d0z\tWind", "/m/05zppz\tSpeech", "/t/dd00138\tWind")
    splits = open_splits(audioset_strong, "audioset_strong")
    assert splits["train"].features["labels"].feature.names == ["Speech", "Wind (/m/03m9d0z)", "Wind (/t/dd00138)"]
    (audioset_strong / "mid_to_display_name.tsv").unlink()
    splits = open_splits(audioset_strong, "audioset_strong")
    assert splits["train"].features["labels"].feature.names == ["/m/03m9d0z", "/m/05zppz", "/t/dd00138"]


def test_missing_clips_of_audioset_strong_are_counted(audioset_strong, caplog):
    (audioset_strong / "train" / "Yb0RFKhbpFJA.wav").unlink()
    splits = open_splits(audioset_strong, "audioset_strong")
    assert len(splits["train"]) == 1
    assert "AudioSet, strong, train: 1 of 2 clips (50.0%) are not below" in caplog.text
    assert splits["train"].features["labels"].feature.names == ["Brief tone", "Male speech, man speaking", "Wind"]
    (audioset_strong / "eval" / "s9d-2nhuJCQ_30000.wav").unlink()
    with pytest.raises(UserError, match="AudioSet, strong, test: none of the 1 clips is below .*, such as s9d-2nhuJCQ"):
        open_splits(audioset_strong, "audioset_strong")


@pytest.mark.parametrize(
    ("file", "lines", "message"),
    [
        ("mid_to_display_name.tsv", ["/m/03m9d0z\tWind"], "line 3 of .*train_strong.tsv has the label '/m/05zppz', which is not in"),
        ("mid_to_display_name.tsv", ["/m/03m9d0z Wind"], "line 1 of .*name.tsv is '/m/03m9d0z Wind', but must be id<TAB>name"),
        (
            "audioset_eval_strong.tsv",
            [
                "segment_id\tstart_time_seconds\tend_time_seconds\tlabel",
                "s9d-2nhuJCQ_0\t0\t1\t/t/dd00138",
                "s9d-2nhuJCQ_9\t0\t1\t/t/dd00138",
            ],
            "line 3 of .* is of a second segment of the video s9d-2nhuJCQ, beside s9d-2nhuJCQ_0: keep one",
        ),
        ("mid_to_display_name.tsv", ["/m/03m9d0z\tW\udce9nd"], r"mid_to_display_name.tsv cannot be read \(.*\): it must be text in UTF-8"),
        ("audioset_eval_strong.tsv", ["segment_id\tlabel", "a\tb"], "has the columns segment_id, label, but needs segment_id, start_time"),
    ],
)
def test_damage_to_audioset_strong_is_named(audioset_strong, file, lines, message):
    write_text(audioset_strong / file, *lines)
    with pytest.raises(UserError, match=message):
        open_splits(audioset_strong, "audioset_strong")


# --- MAESTRO


@pytest.fixture
def maestro(tmp_path) -> Path:
    write_clips(tmp_path / "development_audio" / "city_center", "city_center_00")
    write_clips(tmp_path / "development_audio" / "grocery_store", "grocery_store_00")
    soft = tmp_path / "development_annotation" / "soft_labels"
    write_text(soft / "city_center" / "city_center_00.txt", "0\t1\tcar\t0.2", "1\t2\tcar\t0.6", "2\t3\tcar\t1.0", "0\t1\tbrakes\t0.4")
    write_text(soft / "grocery_store" / "grocery_store_00.txt", "onset\toffset\tevent_label\tsoft_label", "0\t1\tpeople talking\t0.9")
    write_text(tmp_path / "development_annotation" / "hard_labels" / "city_center_00.txt", "1\t3\tcar")
    write_text(tmp_path / "README.txt", "about")
    return tmp_path


def test_maestro_has_soft_labels_and_scenes(maestro):
    (rows,) = open_splits(maestro, "maestro").values()
    assert read(rows) == {"city_center_00.wav": [Event("car", 1.0, 3.0)], "grocery_store_00.wav": [Event("people talking", 0.0, 1.0)]}
    assert rows["scene"][:] == ["city_center", "grocery_store"]
    labels = read_rows(rows, "events").labels
    assert labels.names == ["car", "brakes", "people talking"]
    np.testing.assert_allclose(labels.step_targets(0, 0.5, 5), [[0.2, 0.4, 0], [0.2, 0.4, 0], [0.6, 0, 0], [0.6, 0, 0], [1, 0, 0]])
    with pytest.raises(UserError, match="'people talking', which is none of the 2 classes"):
        labels.encode(["car", "brakes"])
    assert labels.encode(["car", "people talking"]).step_targets(0, 1.0, 1).tolist() == [[pytest.approx(0.2), 0.0]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: write_clips(root / "more", "a"), r"recordings without soft labels: 1 \(a\), and annotations without a recording: 0"),
        (lambda root: write_clips(root / "more", "city_center_00"), "3 recordings and 2 annotations, some with the same name"),
        (
            lambda root: write_text(root / "development_annotation" / "soft_labels" / "city_center" / "city_center_00.txt", "0\t1\tcar"),
            r"line 1 of .*city_center_00.txt is '0\\t1\\tcar', but must be onset<TAB>offset<TAB>label<TAB>value",
        ),
    ],
)
def test_damage_to_maestro_is_named(maestro, damage, message):
    damage(maestro)
    with pytest.raises(UserError, match=message):
        open_splits(maestro, "maestro")


# --- DCASE 2016 task 2


@pytest.fixture
def dcase2016(tmp_path) -> Path:
    root = tmp_path / "dcase2016_task2_train_dev"
    write_clips(root / "dcase2016_task2_train", "cough001", "cough020", "doorslam003", samples=8_000)
    write_clips(root / "dcase2016_task2_dev" / "sound", "dev_1_ebr_6_nec_1_poly_0")
    write_text(
        root / "dcase2016_task2_dev" / "annotation" / "dev_1_ebr_6_nec_1_poly_0.txt",
        "1.5\t2.25\tcough",
        "2.0\t3.0\tdoorslam",
        "2.25\t4\tcough",
    )
    write_clips(tmp_path / "dcase2016_task2_test_public" / "sound", "test_1")
    write_text(tmp_path / "dcase2016_task2_test_public" / "annotation" / "test_1.txt")
    return tmp_path


def test_dcase_2016_trains_on_isolated_sounds(dcase2016):
    splits = open_splits(dcase2016, "dcase2016_task2")
    assert {name: read(rows) for name, rows in splits.items()} == {
        "train": {
            "cough001.wav": [Event("cough", 0.0, 0.5)],
            "cough020.wav": [Event("cough", 0.0, 0.5)],
            "doorslam003.wav": [Event("doorslam", 0.0, 0.5)],
        },
        "validation": {"dev_1_ebr_6_nec_1_poly_0.wav": [Event("cough", 1.5, 4.0), Event("doorslam", 2.0, 3.0)]},
        "test": {"test_1.wav": []},
    }
    assert set(open_splits(dcase2016 / "dcase2016_task2_test_public", "dcase2016_task2")) == {"test"}


def test_damage_to_dcase_2016_is_named(dcase2016):
    dev = dcase2016 / "dcase2016_task2_train_dev" / "dcase2016_task2_dev"
    (dev / "annotation").rename(dev / "labels")
    with pytest.raises(UserError, match="dcase2016_task2_dev holds labels/, sound/, but expected are sound/ and annotation/"):
        open_splits(dcase2016, "dcase2016_task2")
    (dcase2016 / "dcase2016_task2_train_dev" / "dcase2016_task2_train" / "cough001.wav").write_bytes(b"no sound")
    with pytest.raises(UserError, match="cough001.wav cannot be read"):
        open_splits(dcase2016, "dcase2016_task2")
    with pytest.raises(UserError, match="holds labels/, sound/, but expected is dcase2016_task2_train"):
        open_splits(dev.rename(dev.with_name("other")), "dcase2016_task2")


# --- Scaper's JAMS


def observation(onset: float, duration: float, label: str, role: str = "foreground") -> dict:
    return {"time": onset, "duration": duration, "value": {"label": label, "role": role}, "confidence": 1.0}


@pytest.mark.parametrize("columns", [False, True])
def test_scapers_jams_are_read_where_there_is_no_text(tmp_path, columns):
    write_clips(tmp_path / "audio" / "train", "a", "b")
    data = [observation(0.0, 10.0, "park", "background"), observation(1.5, 2.0, "siren"), observation(0.25, 0.5, "dog_bark")]
    for name, found in (("a", data), ("b", data[:1])):
        stored = {key: [one[key] for one in found] for key in found[0]} if columns else found
        content = {"annotations": [{"namespace": "tag_open", "data": []}, {"namespace": "scaper", "data": stored}]}
        write_text(tmp_path / "annotations" / "train" / f"{name}.jams", json.dumps(content))
    splits = open_splits(tmp_path, "urban_sed")
    assert read(splits["train"]) == {"a.wav": [Event("siren", 1.5, 3.5), Event("dog_bark", 0.25, 0.75)], "b.wav": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "a.jams is not a JAMS file with one annotation of Scaper"),
        ('{"annotations": []}', "a.jams is not a JAMS file with one annotation of Scaper"),
        (
            json.dumps({"annotations": [{"namespace": "scaper", "data": [{"time": 0, "duration": 1}]}]}),
            r"a.jams is not a JAMS file with one annotation of Scaper \(it lacks 'value'\)",
        ),
        (
            json.dumps({"annotations": [{"namespace": "scaper", "data": [observation(0, 1, "cow")]}]}),
            "observation 1 of .*a.jams has the label 'cow', which is none of the 10 classes",
        ),
        (
            json.dumps({"annotations": [{"namespace": "scaper", "data": [observation(-1, 2, "siren")]}]}),
            "observation 1 of .*a.jams goes from '-1.0' to '1.0'",
        ),
    ],
)
def test_damage_to_jams_is_named(tmp_path, content, message):
    write_clips(tmp_path / "audio" / "train", "a")
    write_text(tmp_path / "annotations" / "train" / "a.jams", content)
    with pytest.raises(UserError, match=message):
        open_splits(tmp_path, "urban_sed")


# --- audio folders with a column of events


CELLS = [
    [{"label": "dog", "onset": 0, "offset": 1}, {"label": "cat", "onset": 0.5, "offset": 2.25}],
    [],
    [{"label": "dog", "onset": None, "offset": None}],
]
FOUND = {"0.wav": [Event("dog", 0.0, 1.0), Event("cat", 0.5, 2.25)], "1.wav": [], "2.wav": ["dog"]}


def write_metadata(root: Path, suffix: str, cells: list) -> None:
    names = [f"{i}.wav" for i in range(len(cells))]
    write_clips(root, *(name.removesuffix(".wav") for name in names))
    if suffix == "csv":
        quoted = ['"' + json.dumps(cell).replace('"', '""') + '"' for cell in cells]
        write_text(root / "metadata.csv", "file_name,events", *(f"{name},{cell}" for name, cell in zip(names, quoted)))
    elif suffix == "jsonl":
        write_text(root / "metadata.jsonl", *(json.dumps({"file_name": name, "events": cell}) for name, cell in zip(names, cells)))
    else:
        values = cells if suffix == "parquet" else [json.dumps(cell) for cell in cells]
        write_table(pa.table({"file_name": names, "events": values}), root / "metadata.parquet")


def events_of(rows) -> dict[str, list]:
    table = read_rows(rows, "events")
    return {
        table.name(i).split("/")[-1]: table.labels.events(i) if table.labels.has_times(i) else table.labels[i] for i in range(len(table))
    }


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "text in parquet"])
def test_a_folder_with_a_column_of_events(tmp_path, suffix):
    write_metadata(tmp_path, suffix, CELLS)
    (rows,) = open_splits(tmp_path).values()
    assert events_of(rows) == FOUND


NOTHING = {"label": None, "onset": None, "offset": None}  # a row without times and label


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet", "text in parquet"])
def test_a_row_without_times_and_label_is_a_clip_without_events(tmp_path, suffix):
    write_metadata(tmp_path / "some", suffix, [CELLS[0], [NOTHING], [NOTHING, *CELLS[2]], None if "parquet" in suffix else []])
    (rows,) = open_splits(tmp_path / "some").values()
    assert events_of(rows) == {**FOUND, "3.wav": []}
    labels = read_rows(rows, "events").labels
    assert labels.has_times(1)
    np.testing.assert_array_equal(labels.step_targets(1, 0.5, 3), np.zeros((3, 2)))  # a negative of every class
    assert sorted(labels.names) == ["cat", "dog"]


@pytest.mark.parametrize(
    "lines", [["file_name,events", "0.wav,", "1.wav,"], ['{"file_name": "0.wav", "events": null}', '{"file_name": "1.wav"}']]
)
def test_a_folder_in_which_no_clip_has_events(tmp_path, lines):
    write_clips(tmp_path, "0", "1")
    write_text(tmp_path / f"metadata.{'csv' if ',' in lines[0][:10] else 'jsonl'}", *lines)
    (rows,) = open_splits(tmp_path).values()
    assert events_of(rows) == {"0.wav": [], "1.wav": []}


def test_strong_labels_say_that_a_clip_has_no_events(tmp_path):
    for layout, folder, lines in (
        ("idmt_desed", "metadata", [STRONG, "a.wav\t0\t1\tCat", "b.wav\t\t\t", "c.wav\t \t \t ", "d.wav"]),
        ("urban_sed", "annotations", ["0\t1\tsiren"]),
    ):
        root = tmp_path / layout
        write_clips(root / "audio" / "train", *"abcd")
        if folder == "metadata":
            write_text(root / "metadata" / "train.tsv", *lines)
        else:
            for name, text in zip("abcd", (lines, [], [""], ["\t\t"])):
                write_text(root / "annotations" / "train" / f"{name}.txt", *text)
        (rows,) = open_splits(root, layout).values()
        found = read(rows)
        assert found.pop("a.wav") == [Event("Cat" if layout == "idmt_desed" else "siren", 0.0, 1.0)]
        assert found == {"b.wav": [], "c.wav": [], "d.wav": []}


def test_a_label_may_hold_characters_at_which_python_splits_lines(tmp_path):
    write_text(tmp_path / "a.txt", "0\t1\tsi\u2028ren", "1\t2\tsi\x85ren")
    found = read_texts([tmp_path / "a.txt"])
    assert found == {"a": [{"label": "si\u2028ren", "onset": 0.0, "offset": 1.0}, {"label": "si\x85ren", "onset": 1.0, "offset": 2.0}]}


def test_audioset_says_that_a_clip_has_no_events(audioset_strong):
    table = audioset_strong / "audioset_eval_strong.tsv"
    write_text(table, *table.read_text().splitlines(), "abcdefghijk_30000\t\t\t")
    write_clips(audioset_strong / "eval", "abcdefghijk_30000")
    assert read(open_splits(audioset_strong, "audioset_strong")["test"])["abcdefghijk_30000.wav"] == []


def test_maestro_says_that_a_clip_has_no_events(maestro):
    text = next((maestro / "development_annotation" / "soft_labels" / "grocery_store").iterdir())
    write_text(text, "onset\toffset\tevent_label\tsoft_label", "\t\t\t")
    assert read(open_splits(maestro, "maestro")["train"])["grocery_store_00.wav"] == []


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_type_of_events_does_not_depend_on_which_occur(tmp_path, suffix):
    write_metadata(tmp_path / "train", suffix, CELLS)
    write_metadata(tmp_path / "test", suffix, [[], [{"label": "cat", "onset": 1, "offset": 2}]])
    write_metadata(tmp_path / "validation", suffix, [[], []])
    splits = open_splits(tmp_path)
    assert splits["train"].features == splits["test"].features == splits["validation"].features
    assert events_of(splits["validation"]) == {"0.wav": [], "1.wav": []}


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_cell_has_no_events_and_other_text_stays_text(tmp_path, empty):
    write_clips(tmp_path / "a", "0", "1")
    write_text(
        tmp_path / "a" / "metadata.csv", "file_name,events", f"0.wav,{empty}", '1.wav,"[{""label"": ""x"", ""onset"": 0, ""offset"": 1}]"'
    )
    assert events_of(open_splits(tmp_path / "a")["train"]) == {"0.wav": [], "1.wav": [Event("x", 0.0, 1.0)]}
    write_clips(tmp_path / "b", "0", "1")
    write_text(tmp_path / "b" / "metadata.csv", "file_name,events", "0.wav,dog;cat", "1.wav,dog")
    assert list(read_rows(open_splits(tmp_path / "b")["train"], "events", ";").labels) == [["dog", "cat"], ["dog"]]


@pytest.mark.parametrize(
    "cell",
    [
        '[{"label": "x"}]',
        "[1]",
        '[{"label": 1, "onset": 0, "offset": 1}]',
        '[{"label": "x", "onset": "0", "offset": 1}]',
        "[{",
        "x",
        '{"a": 1}',
        '[{"label": "x", "onset": 0, "offset": 1' + 400 * "0" + "}]",
        "[" * 100_000,
    ],
)
def test_what_is_not_a_list_of_events_is_named_by_its_line(tmp_path, cell):
    write_clips(tmp_path, "0", "1")
    quoted = '"' + cell.replace('"', '""') + '"'
    write_text(tmp_path / "metadata.csv", "file_name,events", "0.wav,[]", f"1.wav,{quoted}")
    with pytest.raises(UserError, match="line 3 of .*metadata.csv has .* in the column events, but needs a list"):
        open_splits(tmp_path)


def test_a_cell_may_hold_the_events_of_a_long_recording(tmp_path):
    """By default `csv` reads no more than 131,072 characters, about 2,600 of them."""
    write_metadata(tmp_path, "csv", [[{"label": "dog", "onset": float(i), "offset": i + 0.5} for i in range(4000)]])
    assert len(events_of(open_splits(tmp_path)["train"])["0.wav"]) == 4000


def test_impossible_times_of_a_folder_are_named_by_the_clip(tmp_path):
    write_metadata(tmp_path, "csv", [[], [{"label": "x", "onset": 2, "offset": 1}]])
    with pytest.raises(UserError, match="1.wav has an event from 2 to 1 s in the column 'events'"):
        read_rows(open_splits(tmp_path)["train"], "events")
