"""Data sets as their authors distribute them, each built in miniature: what is read, and how each kind of damage is refused."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from transformers_sslam.audio import published
from transformers_sslam.audio.layouts import LAYOUTS, open_splits
from transformers_sslam.audio.published import KEYWORDS, WORDS_V1, WORDS_V2
from transformers_sslam.audio.rows import read_rows
from transformers_sslam.audio.sources import Source, SourceSettings
from transformers_sslam.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def write_clip(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(160), 16_000)


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def table(rows, column: str = "label") -> dict[str, object]:
    """Labels by name of the clip, through the same reader as the programs use."""
    read = read_rows(rows, column)
    names = [Path(source["path"]).name for source in read.sources]
    return {name: labels if read.labels.multi_label else labels[0] for name, labels in zip(names, read.labels)}


def test_every_layout_says_what_it_expects_in_one_line():
    stored = {"folder", "audiofolder", "manifest", "parquet", "webdataset", "hub"}
    with_times = {"spass", "urban_sed", "idmt_desed", "desed", "dcase2024_task4", "audioset_strong", "maestro", "dcase2016_task2"}
    music = {"nsynth", "irmas", "openmic"}
    assert set(LAYOUTS) == stored | with_times | {"esc50", "speech_commands", "fsdd", "audioset", *music}
    assert all(expects and "\n" not in expects for expects in LAYOUTS.values())


@pytest.mark.parametrize(
    ("layout", "subset", "message"),
    [
        ("esc_50", None, "layout is 'esc_50', but one of audiofolder, .*esc50.* is expected"),
        ("esc50", "esc20", "subset is 'esc20', but the layout esc50 has null, esc10"),
        ("spass", None, "subset is null, but the layout spass has Square, Park, Waterfront, Street, Market"),
        ("audiofolder", "train", "subset is 'train', but the layout audiofolder has null"),
        ("parquet", None, "there is no folder .*nowhere: check the path$"),
    ],
)
def test_what_does_not_exist_is_refused(tmp_path, layout, subset, message):
    with pytest.raises(UserError, match=message):
        open_splits(str(tmp_path / "nowhere"), layout, subset=subset)


def test_audio_folder(tmp_path):
    for name in ("train/hum/1.wav", "train/hiss/2.wav", "test/hum/3.wav"):
        write_clip(tmp_path / name)
    splits = open_splits(str(tmp_path), "audiofolder")
    assert {name: table(rows) for name, rows in splits.items()} == {"train": {"1.wav": "hum", "2.wav": "hiss"}, "test": {"3.wav": "hum"}}


def test_names_that_look_like_splits_are_classes_and_clips(tmp_path):
    names = ("train/0.wav", "dog/train.wav", "dog/a test.wav", "dog/dev-1.wav", "dog/0.wav")
    for name in names:
        write_clip(tmp_path / name)
    (rows,) = open_splits(str(tmp_path), "audiofolder").values()
    assert sorted(zip((Path(audio["path"]).name for audio in rows["audio"]), rows["label"])) == [
        ("0.wav", 0),
        ("0.wav", 1),
        ("a test.wav", 0),
        ("dev-1.wav", 0),
        ("train.wav", 0),
    ]
    assert rows.features["label"].names == ["dog", "train"]


def test_a_class_of_the_name_of_a_split_is_in_one_split(tmp_path):
    for name in ("train/dog/0.wav", "train/train/1.wav", "test/dog/2.wav", "test/train/3.wav"):
        write_clip(tmp_path / name)
    splits = open_splits(str(tmp_path), "audiofolder")
    assert {name: table(rows) for name, rows in splits.items()} == {
        "train": {"0.wav": "dog", "1.wav": "train"},
        "test": {"2.wav": "dog", "3.wav": "train"},
    }


@pytest.mark.parametrize("beside", ["other/3.wav", "3.wav", "metadata.csv"])
def test_what_lies_beside_splits_is_not_left_out_silently(beside, tmp_path):
    for name in ("train/dog/0.wav", "train/cat/1.wav", "Test/dog/2.wav", beside):
        write_clip(tmp_path / name) if name.endswith("wav") else write_text(tmp_path / name, "file_name,label")
    with pytest.raises(UserError, match=f"Test, train, which are splits, and beside them {beside.split('/')[0]}: move"):
        open_splits(str(tmp_path), "audiofolder")


def test_a_manifest_has_a_name_on_each_line_whatever_characters_are_in_it(tmp_path):
    names = ["a\u2028b.wav", "c\x85d.wav"]  # at which Python splits lines too
    (tmp_path / "all.tsv").write_bytes(("clips\r\n" + "".join(f"{name}\t160\r\n" for name in names)).encode())
    paths = [audio["path"] for audio in open_splits(tmp_path / "all.tsv", "manifest")["train"]["audio"]]
    assert paths == [str(tmp_path / "clips" / name) for name in names]


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path):
    write_clip(tmp_path / "clips" / "a.wav")
    (tmp_path / "all.tsv").write_text("clips\na.wav\t160\n", encoding="utf-8-sig")
    assert open_splits(tmp_path / "all.tsv", "manifest")["train"]["audio"][0]["path"] == str(tmp_path / "clips" / "a.wav")


def test_clips_that_the_metadata_do_not_list_are_counted(tmp_path, caplog):
    for name in ("0.wav", "1.wav", "2.wav"):
        write_clip(tmp_path / name)
    write_text(tmp_path / "metadata.csv", "file_name,label", "0.wav,dog")
    (rows,) = open_splits(str(tmp_path), "audiofolder").values()
    assert len(rows) == 1
    assert "2 of 3 audio files" in caplog.text


# Parquet and the Hub


def encoded_clip() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.zeros(160), 16_000, format="WAV")
    return file.getvalue()


def write_parquet(path: Path, *names: str, column: str = "audio", audio: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    soundfile.write(encoded, np.zeros(160), 16_000, format="FLAC")
    features = datasets.Features({"labels": datasets.List(datasets.ClassLabel(names=["hum", "hiss"]))})
    columns = {"labels": [[0, 1] for _ in names]}
    if audio:
        features[column] = datasets.Audio(sampling_rate=16_000, decode=False)
        columns[column] = [{"bytes": encoded.getvalue(), "path": name} for name in names]
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_are_sorted_into_splits_by_their_names(tmp_path, streaming):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", "a")
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", "b")
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", "c")
    write_parquet(tmp_path / "validate" / "shard-00000.parquet", "d")  # a folder that `datasets` alone would pass over
    write_text(tmp_path / "README.md", "not a table")
    splits = open_splits(str(tmp_path), "parquet", streaming=streaming)
    found = {name: [row["audio"]["path"] for row in rows] for name, rows in splits.items()}
    assert found == {"train": ["a", "b"], "test": ["c"], "validate": ["d"]}
    first = next(iter(splits["test"]))
    assert first["labels"] == [0, 1]
    assert soundfile.info(io.BytesIO(first["audio"]["bytes"])).frames == 160
    assert isinstance(splits, datasets.IterableDatasetDict) == streaming


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_in_archives_are_text(tmp_path, streaming):
    labels = [b"001", b"1\n", b"dog", "Büro".encode()]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, label in enumerate(labels):
            for suffix, content in (("wav", encoded_clip()), ("cls", label), ("id", label)):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    splits = open_splits(str(tmp_path), "webdataset", streaming=streaming)
    if streaming:
        splits = pickle.loads(pickle.dumps(splits))  # as worker processes may receive it
    assert [(row["cls"], row["id"], row["audio"]["path"]) for row in splits["train"]] == [
        ("001", "001", "0.wav"),
        ("1", "1", "1.wav"),
        ("dog", "dog", "2.wav"),
        ("Büro", "Büro", "3.wav"),
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_archive_is_named(tmp_path, streaming):
    (tmp_path / "a.tar").write_bytes(b"no archive" * 200)
    with pytest.raises(UserError, match=r"the data set .*a.tar cannot be opened \(invalid header\)"):
        open_splits(str(tmp_path / "a.tar"), "webdataset", streaming=streaming)


def read_all(settings: SourceSettings) -> list:
    source = Source.open(settings)
    return [row for shard in range(source.num_shards) for row in source.rows(shard)]


def write_archive(path: Path, clips: int) -> bytes:
    with tarfile.open(path, "w") as archive:
        for number in range(clips):
            for suffix, content in (("wav", encoded_clip()), ("cls", b"dog")):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


@pytest.mark.parametrize("cut", ["5.wav", "5.cls", None])
def test_an_archive_without_its_end_is_named(tmp_path, caplog, cut):
    content = write_archive(tmp_path / "a.tar", 8)
    write_archive(tmp_path / "b.tar", 8)
    write_archive(tmp_path / "c.tar", 8)
    (tmp_path / "c.tar").write_bytes(gzip.compress(content))
    (tmp_path / "b.tar").write_bytes(content if cut is None else content[: content.index(cut.encode())])
    open_splits(str(tmp_path), "webdataset", streaming=True)
    assert (f"1 archives below {tmp_path} have no end mark, as if they were cut off, such as {tmp_path / 'b.tar'}" in caplog.text) == bool(
        cut
    )


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_the_cause_is_said_of_a_damaged_file_among_others(tmp_path, layout):
    suffix = {"webdataset": "tar", "parquet": "parquet"}[layout]
    files = [tmp_path / f"{split}-{number}.{suffix}" for split in ("a", "b") for number in range(2)]
    for file in files:
        if layout == "parquet":
            write_parquet(file, "x")
        else:
            content = write_archive(file, 20)
    said = "Parquet magic bytes not found"
    if layout == "parquet":
        files[2].write_bytes(files[2].read_bytes()[:-9])
    else:
        files[2].write_bytes(content[: content.index(b"12.wav") + 700])
        said = "unexpected end of data"
    with pytest.raises(UserError, match=rf"the data set .* cannot be opened \(.*{said}"):
        open_splits(str(tmp_path), layout)
    with pytest.raises(UserError, match=rf"^b-0.{suffix} of the source mine cannot be read \(.*{said}.*\): restore it"):
        read_all(SourceSettings(layout, str(tmp_path), name="mine"))


def test_a_parquet_file_without_rows_among_others_is_passed_over(tmp_path):
    write_parquet(tmp_path / "train-0.parquet")
    write_parquet(tmp_path / "train-1.parquet", "a", "b")
    assert [audio["path"] for audio in open_splits(str(tmp_path), "parquet")["train"]["audio"]] == ["a", "b"]
    assert len(read_all(SourceSettings("parquet", str(tmp_path)))) == 2
    (tmp_path / "train-1.parquet").unlink()
    with pytest.raises(UserError, match="no parquet file in .* has a row: there is nothing to read"):
        open_splits(str(tmp_path), "parquet")


def test_shards_beside_their_index_are_a_training_split(tmp_path):
    write_parquet(tmp_path / "shard-00000.parquet", "a")
    write_parquet(tmp_path / "shard-00001.parquet", "b")
    write_text(tmp_path / "index.json", "{}")
    splits = open_splits(str(tmp_path), "parquet")
    assert {name: [audio["path"] for audio in rows["audio"]] for name, rows in splits.items()} == {"train": ["a", "b"]}


def test_another_name_of_the_audio_column_is_found(tmp_path):
    write_parquet(tmp_path / "train.parquet", "a", column="recording")
    assert open_splits(str(tmp_path), "parquet")["train"][0]["audio"]["path"] == "a"


def test_audio_of_another_writer_is_found(tmp_path):
    columns = {"sound": [{"bytes": b"RIFF", "path": "a"}], "label": ["dog"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
    (rows,) = open_splits(str(tmp_path), "parquet").values()
    assert rows[0] == {"audio": {"bytes": b"RIFF", "path": "a"}, "label": "dog"}


def test_parquet_without_audio_without_a_split_or_without_files_is_refused(tmp_path):
    write_text(tmp_path / "empty" / "notes.txt", "")
    with pytest.raises(UserError, match="holds notes.txt, but the layout parquet expects"):
        open_splits(str(tmp_path / "empty"), "parquet")
    write_parquet(tmp_path / "silent" / "train.parquet", "a", audio=False)
    with pytest.raises(UserError, match=r"has 0 columns of type Audio \(columns labels\), but must have one"):
        open_splits(str(tmp_path / "silent"), "parquet")
    write_parquet(tmp_path / "nameless" / "-0.parquet", "a")
    with pytest.raises(UserError, match="does not tell its split: name it train-00000.parquet"):
        open_splits(str(tmp_path / "nameless"), "parquet")
    write_text(tmp_path / "broken" / "train.parquet", "no table")
    with pytest.raises(UserError, match="broken cannot be opened"):
        open_splits(str(tmp_path / "broken"), "parquet")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_as_a_local_folder_with_configurations(tmp_path, streaming):
    write_parquet(tmp_path / "balanced" / "train-00000.parquet", "a")
    write_parquet(tmp_path / "full" / "train-00000.parquet", "b", "c")
    card = ["---", "configs:"]
    for name in ("balanced", "full"):
        card += [f"- config_name: {name}", "  data_files:", "  - split: train", f"    path: {name}/*.parquet"]
    write_text(tmp_path / "README.md", *card, "---")
    splits = open_splits(str(tmp_path), "hub", subset="full", streaming=streaming)
    assert [row["audio"]["path"] for row in splits["train"]] == ["b", "c"]
    with pytest.raises(UserError, match="cannot be opened .*half"):
        open_splits(str(tmp_path), "hub", subset="half")


def test_local_folders_of_one_name_and_one_that_changed_are_told_apart(tmp_path):
    card = ["---", "configs:", "- config_name: default", "  data_files: data/*.parquet", "---"]
    for place, names in (("first", ["a"]), ("second", ["b", "c"]), ("first", ["d", "e", "f"])):
        write_parquet(tmp_path / place / "set" / "data" / "train.parquet", *names)
        write_text(tmp_path / place / "set" / "README.md", *card)
        rows = open_splits(str(tmp_path / place / "set"), "hub")["train"]
        assert [audio["path"] for audio in rows["audio"]] == names


def test_what_is_not_on_the_hub_is_refused(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("no such host")))
    with pytest.raises(UserError, match=r"the data set someone/sounds cannot be opened \(no such host\): check path"):
        open_splits("someone/sounds", "hub")


# ESC-50


ESC50 = [
    ("1-100032-A-0.wav", 1, 0, "dog", True),
    ("1-100038-A-14.wav", 1, 14, "chirping_birds", False),
    ("2-100210-B-36.wav", 2, 36, "vacuum_cleaner", False),
    ("2-101296-A-19.wav", 2, 19, "thunderstorm", False),
    ("5-9032-A-0.wav", 5, 0, "dog", True),
    ("5-203128-A-1.wav", 5, 1, "rooster", True),
]


@pytest.fixture
def esc50(tmp_path) -> Path:
    lines = ["filename,fold,target,category,esc10,src_file,take"]
    for name, fold, target, category, esc10 in ESC50:
        write_clip(tmp_path / "audio" / name)
        lines.append(f"{name},{fold},{target},{category},{esc10},{name.split('-')[1]},A")
    write_text(tmp_path / "meta" / "esc50.csv", *lines)
    return tmp_path


def test_esc50_has_labels_and_folds(esc50):
    (rows,) = open_splits(str(esc50), "esc50").values()
    assert rows.features["label"].names == ["dog", "rooster", "chirping_birds", "thunderstorm", "vacuum_cleaner"]
    assert table(rows) == {name: category for name, _, _, category, _ in ESC50}
    assert rows["fold"][:] == [1, 1, 2, 2, 5, 5]
    assert rows[0]["audio"] == {"bytes": None, "path": str(esc50 / "audio" / "1-100032-A-0.wav")}


def test_esc10_is_what_the_table_marks(esc50):
    (rows,) = open_splits(str(esc50), "esc50", subset="esc10").values()
    assert rows.features["label"].names == ["dog", "rooster"]
    assert rows["fold"][:] == [1, 5, 5]


def test_a_table_of_files_is_in_memory_whether_streamed_or_not(esc50):
    splits = open_splits(str(esc50), "esc50", streaming=True)
    assert isinstance(splits["train"], datasets.Dataset)
    assert [Path(audio["path"]).name for audio in splits["train"]["audio"]] == [name for name, *_ in ESC50]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "audio" / ESC50[3][0]).unlink(), r"clips of .*esc50.csv that are not in .*audio: 1 \(2-101296-A-19.wav\)"),
        (lambda root: write_clip(root / "audio" / "9-1-A-0.wav"), r"that .*esc50.csv does not label: 1 \(9-1-A-0.wav\)"),
        (lambda root: (root / "meta" / "esc50.csv").unlink(), "there is no .*esc50.csv"),
        (
            lambda root: write_text(root / "meta" / "esc50.csv", "filename,fold,target"),
            "has the columns filename, fold, target, but needs filename, fold, target, category, esc10",
        ),
        (lambda root: write_text(root / "meta" / "esc50.csv", "filename,fold,target,category,esc10"), "has no rows"),
        (
            lambda root: edit(root / "meta" / "esc50.csv", "B-36.wav,2,36", "B-36.wav,two,36"),
            "a target that is not a whole number",
        ),
        (
            lambda root: edit(root / "meta" / "esc50.csv", "5-9032-A-0.wav,5,0,dog", "5-9032-A-0.wav,5,0,cat"),
            "calls target 0 both dog and cat",
        ),
        (lambda root: edit(root / "meta" / "esc50.csv", ",thunderstorm,", ',"thunder"storm,'), "line 5 of .*esc50.csv cannot be read"),
        (lambda root: edit(root / "meta" / "esc50.csv", "19,thunderstorm,", "19,,"), "line 5 of .*esc50.csv has nothing in category"),
    ],
)
def test_damage_to_esc50_is_named(esc50, damage, message):
    damage(esc50)
    with pytest.raises(UserError, match=message):
        open_splits(str(esc50), "esc50")


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, f"{before!r} is in {path} {text.count(before)} times"
    path.write_text(text.replace(before, after))


# Speech Commands


def write_speech_commands(root: Path, words: tuple[str, ...]) -> Path:
    """Three clips a word, the second for validation and the third for testing, and two recordings of background."""
    for word in words:
        for speaker in "abc":
            write_clip(root / word / f"{speaker}_nohash_0.wav")
    for noise in ("pink_noise", "running_tap"):
        write_clip(root / "_background_noise_" / f"{noise}.wav")
    write_text(root / "_background_noise_" / "README.md")
    write_text(root / "validation_list.txt", *(f"{word}/b_nohash_0.wav" for word in words))
    write_text(root / "testing_list.txt", *(f"{word}/c_nohash_0.wav" for word in (*words, words[0])))  # a line twice is one clip
    return root


@pytest.mark.parametrize(("subset", "words", "number"), [("v1", WORDS_V1, 30), ("v2", WORDS_V2, 35)])
def test_speech_commands_is_split_by_its_lists(tmp_path, subset, words, number):
    splits = open_splits(str(write_speech_commands(tmp_path, words)), "speech_commands", subset=subset)
    assert len(words) == len(set(words)) == number
    assert {name: len(rows) for name, rows in splits.items()} == {"train": number, "validation": number, "test": number}
    for name, speaker in (("train", "a"), ("validation", "b"), ("test", "c")):
        rows = splits[name]
        assert rows.features["label"].names == sorted(words)
        for row in rows:
            path = Path(row["audio"]["path"])
            assert (path.parent.name, path.name) == (rows.features["label"].names[row["label"]], f"{speaker}_nohash_0.wav")


def test_twelve_classes_take_unknown_words_and_background_in_and_the_test_archive(tmp_path):
    write_speech_commands(tmp_path / "speech_commands_v0.01", WORDS_V1)
    for name in (*KEYWORDS, "_unknown_", "_silence_"):
        write_clip(tmp_path / "speech_commands_test_set_v0.01" / name / "t.wav")
    splits = open_splits(str(tmp_path), "speech_commands", subset="v1_12")
    labels = {name: list(read_rows(rows, "label").labels) for name, rows in splits.items()}
    count = {name: {word: found.count([word]) for word in ("yes", "_unknown_", "_silence_")} for name, found in labels.items()}
    assert count == {
        "train": {"yes": 1, "_unknown_": 20, "_silence_": 2},
        "validation": {"yes": 1, "_unknown_": 20, "_silence_": 0},
        "test": {"yes": 1, "_unknown_": 1, "_silence_": 1},
    }
    assert {name: len(found) for name, found in labels.items()} == {"train": 32, "validation": 30, "test": 12}
    assert all("test_set" in audio["path"] for audio in splits["test"]["audio"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "testing_list.txt").unlink(), "has no testing_list.txt"),
        (lambda root: (root / "bed" / "b_nohash_0.wav").unlink(), r"validation_list.txt that are not there, .*: 1 \(bed/b_nohash_0.wav\)"),
        (lambda root: (root / "testing_list.txt").write_bytes(b"\xe9"), "testing_list.txt cannot be read .* it must be text in UTF-8"),
        (lambda root: write_text(root / "testing_list.txt", "bed/b_nohash_0.wav"), r"or in both lists: 1 \(bed/b_nohash_0.wav\)"),
        (lambda root: write_clip(root / "visual" / "a.wav"), "are not the 30 expected: 1 differ, visual among"),
        (lambda root: [path.unlink() for path in (root / "zero").iterdir()], r"without a clip: 1 \(zero\)"),
    ],
)
def test_damage_to_speech_commands_is_named(tmp_path, damage, message):
    damage(write_speech_commands(tmp_path, WORDS_V1))
    with pytest.raises(UserError, match=message):
        open_splits(str(tmp_path), "speech_commands", subset="v1")


def test_twelve_classes_need_both_archives(tmp_path):
    write_speech_commands(tmp_path / "speech_commands_v0.01", WORDS_V1)
    with pytest.raises(UserError, match="there is no folder .*speech_commands_test_set_v0.01"):
        open_splits(str(tmp_path), "speech_commands", subset="v1_12")


# AudioSet


HEADER = (
    "# Segments csv created Sun Mar  5 10:54:31 2017",
    "# num_ytids=3, num_segs=3",
    "# YTID, start_seconds, end_seconds, positive_labels",
)


@pytest.fixture
def audioset(tmp_path) -> Path:
    write_text(
        tmp_path / "class_labels_indices.csv",
        "index,mid,display_name",
        '0,/m/09x0r,"Speech"',
        '1,/m/05zppz,"Male speech, man speaking"',
        '2,/t/dd00088,"Gush"',
    )
    write_text(
        tmp_path / "eval_segments.csv", *HEADER, '--4gqARaEJE, 0.000, 10.000, "/m/09x0r"', 'Y_abcdefghi, 30.000, 40.000, "/t/dd00088"'
    )
    write_text(
        tmp_path / "balanced_train_segments.csv",
        *HEADER,
        '--PJHxphWEs, 30.000, 40.000, "/m/05zppz,/t/dd00088"',
        '--ZhevVpy1s, 50.000, 60.000, "/m/09x0r"',
    )
    write_text(tmp_path / "unbalanced_train_segments.csv", *HEADER, '---1_cCGK4M, 0.000, 10.000, "/m/09x0r"')
    for name in ("eval/--4gqARaEJE.wav", "eval/YY_abcdefghi.flac", "train/Y--PJHxphWEs.wav", "train/more/--ZhevVpy1s_50.000.wav"):
        write_clip(tmp_path / name)
    write_clip(tmp_path / "train" / "---1_cCGK4M_0_10000.wav")
    return tmp_path


def test_audioset_20k_is_balanced_and_evaluation_segments(audioset):
    splits = open_splits(str(audioset), "audioset", subset="20k")
    assert splits["train"].features["labels"].feature.names == ["Speech", "Male speech, man speaking", "Gush"]
    assert {name: table(rows, "labels") for name, rows in splits.items()} == {
        "train": {"Y--PJHxphWEs.wav": ["Male speech, man speaking", "Gush"], "--ZhevVpy1s_50.000.wav": ["Speech"]},
        "test": {"--4gqARaEJE.wav": ["Speech"], "YY_abcdefghi.flac": ["Gush"]},
    }


def test_audioset_2m_trains_on_both_tables(audioset):
    splits = open_splits(str(audioset), "audioset", subset="2m")
    assert [len(splits["train"]), len(splits["test"])] == [3, 2]
    assert "---1_cCGK4M_0_10000.wav" in table(splits["train"], "labels")


def test_audioset_is_evaluated_on_without_its_training_part(audioset):
    for file in [*audioset.glob("*train_segments.csv"), *(audioset / "train").rglob("*.wav")]:
        file.unlink()
    splits = open_splits(str(audioset), "audioset", subset="eval")
    assert {name: table(rows, "labels") for name, rows in splits.items()} == {
        "test": {"--4gqARaEJE.wav": ["Speech"], "YY_abcdefghi.flac": ["Gush"]}
    }


def test_missing_clips_of_audioset_are_counted(audioset, monkeypatch):
    warnings: list[str] = []
    monkeypatch.setattr(published.logger, "warning", warnings.append)
    (audioset / "train" / "Y--PJHxphWEs.wav").unlink()
    splits = open_splits(str(audioset), "audioset", subset="20k")
    assert len(splits["train"]) == 1
    (warning,) = warnings
    assert "split train: 1 of 2 clips (50.0%) are not below" in warning
    assert "--PJHxphWEs" in warning


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: [clip.unlink() for clip in (root / "eval").iterdir()], "AudioSet, split test: none of the 2 clips is below"),
        (lambda root: write_clip(root / "again" / "--4gqARaEJE.flac"), "are the same clip of AudioSet: keep one of them"),
        (lambda root: (root / "eval_segments.csv").unlink(), "there is no .*eval_segments.csv: expected is"),
        (
            lambda root: edit(root / "eval_segments.csv", '"/m/09x0r"', '"/m/0"'),
            "line 4 of .*eval_segments.csv has the label '/m/0', which is none",
        ),
        (lambda root: edit(root / "eval_segments.csv", "30.000, 40.000", "40.000, 30.000"), "line 5 .* goes from 40.000 s to 30.000 s"),
        (lambda root: edit(root / "eval_segments.csv", "30.000, 40.000, ", "30.000, "), "line 5 .*, but must be YTID, start_seconds"),
        (lambda root: (root / "class_labels_indices.csv").unlink(), "there is no .*class_labels_indices.csv"),
        (
            lambda root: edit(root / "class_labels_indices.csv", '"Gush"', "Speech"),
            "class_labels_indices.csv gives several ids the name 'Speech'",
        ),
        (lambda root: edit(root / "eval_segments.csv", '"/m/09x0r"', '"/m/09x0r'), "line 5 of .*eval_segments.csv cannot be read"),
        (
            lambda root: (root / "eval_segments.csv").write_bytes(b"\xe9"),
            r"eval_segments.csv cannot be read \(.*\): it must be text in UTF-8",
        ),
    ],
)
def test_damage_to_audioset_is_named(audioset, damage, message):
    damage(audioset)
    with pytest.raises(UserError, match=message):
        open_splits(str(audioset), "audioset", subset="20k")


# Strong labels


@pytest.fixture
def urban_sed(tmp_path) -> Path:
    events = {
        "train": ["0.5\t4.25\tsiren", "1.0\t2.0\tair_conditioner", "7.0\t9.5\tsiren"],
        "validate": ["0.0\t10.0\tdrilling"],
        "test": [],
    }
    for split, lines in events.items():
        write_clip(tmp_path / "audio" / split / f"soundscape_{split}_0.wav")
        write_text(tmp_path / "annotations" / split / f"soundscape_{split}_0.txt", *lines)
        write_text(tmp_path / "annotations" / split / f"soundscape_{split}_0.jams", "{}")
    return tmp_path


def test_urban_sed_has_events_and_their_labels_once_each(urban_sed):
    splits = open_splits(str(urban_sed), "urban_sed")
    assert set(splits) == {"train", "validation", "test"}
    assert table(splits["train"], "labels") == {"soundscape_train_0.wav": ["air_conditioner", "siren"]}
    assert splits["train"][0]["events"] == [
        {"label": "siren", "onset": 0.5, "offset": 4.25},
        {"label": "air_conditioner", "onset": 1.0, "offset": 2.0},
        {"label": "siren", "onset": 7.0, "offset": 9.5},
    ]
    assert table(splits["test"], "labels") == {"soundscape_test_0.wav": []}
    assert len(splits["test"].features["labels"].feature.names) == 10


def test_a_table_of_all_events_of_a_split_is_read_too(tmp_path):
    for name in ("1", "2", "3"):
        write_clip(tmp_path / "audio" / "train" / f"{name}.wav")
    write_text(
        tmp_path / "metadata" / "train.tsv",
        *("filename\tonset\toffset\tevent_label", "2.wav\t1.5\t2\tDog", "1.wav\t0\t10\tVacuum_cleaner"),
        *("2.wav\t0\t0.5\tCat", "3.wav\t\t\t"),
    )
    (rows,) = open_splits(str(tmp_path), "idmt_desed").values()
    assert table(rows, "labels") == {"1.wav": ["Vacuum_cleaner"], "2.wav": ["Cat", "Dog"], "3.wav": []}
    assert rows[1]["events"][0] == {"label": "Dog", "onset": 1.5, "offset": 2.0}


def test_a_scene_of_spass_has_the_classes_that_occur_in_it(urban_sed, tmp_path_factory):
    root = tmp_path_factory.mktemp("spass")
    urban_sed.rename(root / "Park")
    splits = open_splits(str(root), "spass", subset="Park")
    assert splits["train"].features["labels"].feature.names == ["air_conditioner", "drilling", "siren"]
    assert table(splits["train"], "labels") == {"soundscape_train_0.wav": ["air_conditioner", "siren"]}
    with pytest.raises(UserError, match="holds Park/, but a folder Street was expected"):
        open_splits(str(root), "spass", subset="Street")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0.5\t4.25\tsirens", "has the label 'sirens', which is none of the 10 classes: air_conditioner"),
        ("4.25\t0.5\tsiren", "goes from '4.25' to '0.5', but an event has an onset, in seconds, and an offset not before it"),
        ("-1\t0.5\tsiren", "goes from '-1' to '0.5'"),
        ("0\tnan\tsiren", "goes from '0' to 'nan'"),
        ("onset\toffset\tsiren", "goes from 'onset' to 'offset'"),
        ("0.5 4.25 siren", "is '0.5 4.25 siren', but must be onset<TAB>offset<TAB>label"),
        ("0.5\t4.25\t", "has no label"),
    ],
)
def test_an_impossible_event_is_named_by_its_line(urban_sed, line, message):
    path = urban_sed / "annotations" / "validate" / "soundscape_validate_0.txt"
    write_text(path, "0.0\t1.0\tdrilling", line)
    with pytest.raises(UserError, match=f"line 2 of {path} {message}"):
        open_splits(str(urban_sed), "urban_sed")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: write_clip(root / "audio" / "train" / "more.wav"), r"audio/train without annotation: 1 \(more\)"),
        (lambda root: write_text(root / "annotations" / "test" / "more.txt"), r"annotations without a clip in .*audio/test: 1 \(more\)"),
        (lambda root: (root / "audio" / "test" / "soundscape_test_0.wav").unlink(), "audio/test has no audio file directly in it"),
        (lambda root: write_clip(root / "audio" / "test" / "soundscape_test_0.flac"), "are one clip twice"),
        (lambda root: write_clip(root / "audio" / "validation" / "a.wav"), "has both validate/ and validation/"),
        (lambda root: write_clip(root / "audio" / "more" / "a.wav"), "annotations/more is missing, though there is audio/more"),
        (
            lambda root: (root / "annotations" / "test" / "soundscape_test_0.txt").write_bytes("0\t1\tVögel".encode("latin-1")),
            r"soundscape_test_0.txt cannot be read \(.*\): it must be text in UTF-8",
        ),
        (lambda root: (root / "metadata").mkdir(), "holds annotations/, audio/, metadata/, but expected is either"),
        (lambda root: (root / "annotations").rename(root / "labels"), "holds audio/, labels/, but expected is either"),
    ],
)
def test_damage_to_a_set_of_strong_labels_is_named(urban_sed, damage, message):
    damage(urban_sed)
    with pytest.raises(UserError, match=message):
        open_splits(str(urban_sed), "urban_sed")


def test_a_table_without_its_columns_or_with_half_an_event_is_refused(tmp_path):
    write_clip(tmp_path / "audio" / "train" / "1.wav")
    write_text(tmp_path / "metadata" / "train.tsv", "filename\tlabel", "1.wav\tDog")
    with pytest.raises(UserError, match="train.tsv has the columns filename, label, but needs filename, onset, offset, event_label"):
        open_splits(str(tmp_path), "idmt_desed")
    write_text(tmp_path / "metadata" / "train.tsv", "filename\tonset\toffset\tevent_label", "1.wav\t\t\tDog")
    with pytest.raises(UserError, match="line 2 of .*train.tsv goes from '' to ''"):
        open_splits(str(tmp_path), "idmt_desed")
    lines = ["filename\tonset\toffset\tevent_label", '1.wav\t0\t1\t"Dog', *20 * ["1.wav\t0\t1\tCat"], '1.wav\t0\t1\t"Dog"']
    write_text(tmp_path / "metadata" / "train.tsv", *lines)
    with pytest.raises(UserError, match="line 23 of .*train.tsv cannot be read .*a cell with quotation marks must begin and end with one"):
        open_splits(str(tmp_path), "idmt_desed")
    (tmp_path / "metadata" / "train.tsv").unlink()
    with pytest.raises(UserError, match="there is no .*train.tsv"):
        open_splits(str(tmp_path), "idmt_desed")
