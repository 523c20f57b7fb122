"""Folders of audio: what is a clip, what is its label, and what is said of all that is neither."""

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import soundfile
from conftest import noise
from pyarrow.parquet import write_table

from transformers_sslam.audio.decode import load_waveform
from transformers_sslam.audio.folders import audio_folder_splits, table_of_files
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.paths import decode_path, encode_path, files_below, find_files
from transformers_sslam.audio.rows import AudioColumn, check_apart, hash_audio, read_rows, select_folds
from transformers_sslam.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def write(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, noise(0.1, seed=number), 16_000, format="WAV")


def write_metadata(root: Path, *lines: str, encoding: str = "utf-8") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding=encoding)
    return root


def labels(root: Path, column: str = "label", split: str = "train", separator: str | None = None) -> dict[str, list[str]]:
    rows = read_rows(open_splits(root)[split], column, separator)
    return dict(zip((Path(source["path"]).name for source in rows.sources), rows.labels))


# --- labels are text


def test_labels_that_look_like_numbers_stay_apart(tmp_path):
    names = ("001", "007", "1e3", "1.0", "1", "None", "NA", "null", "nan", "True")
    write(tmp_path, *(f"{number}.wav" for number in range(len(names))))
    write_metadata(tmp_path, "file_name,label", *(f"{number}.wav,{name}" for number, name in enumerate(names)))
    assert labels(tmp_path) == {f"{number}.wav": [name] for number, name in enumerate(names)}


def test_class_folders_are_called_exactly_as_they_are(tmp_path):
    names = ("001", "1", "1.0", "None", "Ärger", "a b")
    write(tmp_path, *(f"{name}/{number}.wav" for number, name in enumerate(names)))
    (rows,) = open_splits(tmp_path).values()
    assert rows.features["label"].names == sorted(names)
    assert labels(tmp_path) == {f"{number}.wav": [name] for number, name in enumerate(names)}


def test_a_table_of_a_spreadsheet_is_read(tmp_path):
    """A byte order mark, Windows line ends, quoted cells, spaces around names, an empty line at the end."""
    write(tmp_path, "a.wav", "b.wav")
    text = 'file_name,label,note\r\na.wav," dog ","two\nlines, quoted"\r\nb.wav,cat,\r\n\r\n'
    (tmp_path / "metadata.csv").write_bytes(text.encode("utf-8-sig"))
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.wav": ["cat"]}
    assert open_splits(tmp_path)["train"]["note"][:] == ["two\nlines, quoted", None]


@pytest.mark.parametrize("values", [[1, 2], ["1", "2"], [1.0, "02"]])
def test_folds_are_the_same_in_any_notation(tmp_path, values: Sequence):
    write(tmp_path, *(f"{number}.wav" for number in range(4)))
    write_metadata(tmp_path, "file_name,label,fold", "0.wav,a,1", "1.wav,b,02", "2.wav,a,3.0", "3.wav,b,")
    chosen = select_folds(open_splits(tmp_path), "fold", values)
    assert [Path(audio["path"]).name for audio in chosen["audio"]] == ["0.wav", "1.wav"]


def test_folds_have_one_value_a_row(tmp_path):
    write(tmp_path, "0.wav")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.wav", "fold": [1, 2]}\n')
    with pytest.raises(UserError, match="the column 'fold' holds .*, but rows are chosen by one value each: name another column"):
        select_folds(open_splits(tmp_path), "fold", [1])


def test_jsonl_and_parquet_keep_their_types(tmp_path):
    write(tmp_path, "one/0.wav", "two/1.wav")
    (tmp_path / "one" / "metadata.jsonl").write_text(
        '{"file_name": "0.wav", "tags": ["x", "y"], "day": "2020-01-01", "events": [{"label": "x", "onset": 0, "offset": 0.5}]}\n'
    )
    assert labels(tmp_path / "one", "tags") == {"0.wav": ["x", "y"]}
    (row,) = open_splits(tmp_path / "one")["train"]
    assert row["day"] == "2020-01-01"
    assert read_rows(open_splits(tmp_path / "one")["train"], "events").labels.events(0) == [("x", 0.0, 0.5)]
    tags = datasets.List(datasets.ClassLabel(names=["hum", "hiss"]))
    table = datasets.Dataset.from_dict(
        {"file_name": ["1.wav"], "tags": [[1]]}, features=datasets.Features({"file_name": datasets.Value("string"), "tags": tags})
    )
    table.to_parquet(tmp_path / "two" / "metadata.parquet")
    (rows,) = open_splits(tmp_path / "two").values()
    assert rows.features["tags"].feature.names == ["hum", "hiss"]
    assert labels(tmp_path / "two", "tags") == {"1.wav": ["hiss"]}


# --- rows of metadata that are not right


def test_rows_that_name_no_file_are_left_out_and_counted(tmp_path, caplog):
    write(tmp_path, "a.wav", "b.wav")
    write_metadata(tmp_path, "file_name,label", "a.wav,dog", ",", ",cat", "b.wav,cat")
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.wav": ["cat"]}
    assert f"2 rows without a file name are left out, such as line 3 of {tmp_path / 'metadata.csv'}" in caplog.text


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet", "numbers.jsonl"])
def test_a_table_in_which_no_row_names_a_file_is_an_error(tmp_path, name):
    write(tmp_path, "a.wav")
    file, cell, place = tmp_path / f"metadata.{name.split('.')[1]}", "None", "line 1"
    if name == "metadata.csv":
        file.write_text("file_name,label\n,x\n,y\n")
        place = "line 2"
    elif name == "metadata.jsonl":
        file.write_text('{"file_name": null, "label": "x"}\n' * 2)
    elif name == "numbers.jsonl":
        file.write_text('{"file_name": 1, "label": "x"}\n')
        cell = "1"
    else:
        write_table(pa.table({"file_name": [b"a.wav"], "label": ["x"]}), file)
        cell, place = "b'a.wav'", "row 1"
    with pytest.raises(
        UserError, match=f"^{place} of .*{file.name} has ['\"]{cell}['\"] in the column file_name, and no other row has a name"
    ):
        open_splits(tmp_path)


def test_a_clip_comes_as_often_as_it_is_listed(tmp_path, caplog):
    write(tmp_path, "a.wav", "b.wav")
    write_metadata(tmp_path, "file_name,label", "a.wav,dog", "b.wav,cat", "./a.wav,dog")
    assert len(open_splits(tmp_path)["train"]) == 3
    table = tmp_path / "metadata.csv"
    assert f"1 rows list a clip again, such as line 4 of {table} that of line 2 of {table}: it comes as often" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a.wav,dog", "/etc/x.wav,cat"], r"line 3 of .*metadata.csv names '/etc/x.wav', an absolute path"),
        (["../x.wav,dog"], r"line 2 of .*metadata.csv names '../x.wav', a file outside of .*clips"),
        (["sub/../../x.wav,dog"], r"line 2 of .*metadata.csv names .* a file outside of"),
        (["a.wav,dog,1"], r"line 2 of .*metadata.csv has 3 cells, but there are 2 columns"),
        (["a.wav,dog", "b\0.wav,cat"], r"line 3 of .*metadata.csv names 'b\\x00.wav', but no name of a file holds NUL"),
        (["x.wav,dog", "y.wav,dog"], r"2 of 2 clips that are listed are not there, such as .*x.wav \(line 2 of"),
    ],
)
def test_rows_that_cannot_be_right_are_named(tmp_path, rows: list[str], message: str):
    write(tmp_path / "clips", "a.wav", "b.wav")
    write_metadata(tmp_path / "clips", "file_name,label", *rows)
    with pytest.raises(UserError, match=message):
        open_splits(tmp_path / "clips")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'file_name': 'a.wav'}", "Expecting property name enclosed in double quotes, character 2"),
        ('{"file_name": "a.wav"', "Expecting ',' delimiter, character 22"),
        ('{"file_name": "a.wav", "label": "a", "label": "b"}', "'label' stands twice"),
    ],
)
def test_a_line_that_is_not_json_is_named(tmp_path, line: str, message: str):
    write(tmp_path, "a.wav")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.wav"}}\n\n{line}\n')
    with pytest.raises(UserError, match=rf"^line 3 of .*metadata.jsonl is .*, which is not an object in JSON \({message}\)$"):
        open_splits(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,label\na.wav,x\n", "has the columns name, label, but must have one called file_name"),
        (b"file_name;label\na.wav;x\n", "has the columns file_name;label, but must"),
        (b"file_name,label,label\na.wav,x,y\n", "two of which have the same name"),
        ("file_name,label\na.wav,Ärger\n".encode("latin-1"), "cannot be read .* it must be text in UTF-8"),
        (b"", "has the columns , but must have one called file_name"),
        (
            b'file_name,label\na.wav,"x\nb.wav,y\n',
            r"line 3 of .*metadata.csv cannot be read \(unexpected end of data\): a cell with quotation",
        ),
        (b'file_name,label\na.wav,"x\nb.wav,"y"\n', r"line 3 of .*metadata.csv cannot be read \(',' expected after '\"'\)"),
    ],
)
def test_a_table_that_cannot_be_read_is_an_error(tmp_path, content: bytes, message: str):
    write(tmp_path, "a.wav")
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_splits(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"id": 10**25},
            r"the column 'id' of .*metadata.jsonl cannot be read \(.*\): give all its values one type, and whole numbers fewer",
        ),
        ({"id": [1, "x"]}, r"the column 'id' of .*metadata.jsonl cannot be read"),
        ({"events": [{"label": "x", "onset": 0, "offset": 10**400}]}, r"the column 'events' of .*metadata.jsonl cannot be read"),
    ],
)
def test_numbers_of_too_many_digits_and_mixed_values_are_named(tmp_path, row: dict, message: str):
    write(tmp_path, "a.wav")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.wav", **row}))
    with pytest.raises(UserError, match=message):
        open_splits(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.wav", "x": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(UserError, match="metadata.jsonl cannot be read .*recursion"):
        open_splits(tmp_path)


@pytest.mark.parametrize("name", ["Metadata.csv", "METADATA.CSV", "metadata.JSONL", "Metadata.Parquet"])
def test_metadata_are_found_in_capitals_too(tmp_path, name):
    write(tmp_path, "train/dog/a.wav", "train/cat/b.wav")
    file = tmp_path / "train" / name
    if name.endswith("Parquet"):
        write_table(pa.table({"file_name": ["dog/a.wav", "cat/b.wav"], "label": ["1", "2"]}), file)
    elif name.endswith("JSONL"):
        file.write_text('{"file_name": "dog/a.wav", "label": "1"}\n{"file_name": "cat/b.wav", "label": "2"}\n')
    else:
        file.write_text("file_name,label\ndog/a.wav,1\ncat/b.wav,2\n")
    assert labels(tmp_path) == {"a.wav": ["1"], "b.wav": ["2"]}
    write(tmp_path, "test/c.wav")
    file.rename(tmp_path / name)
    with pytest.raises(UserError, match=f"which are splits, and beside them {name}: move"):
        open_splits(tmp_path)


def test_a_path_that_stays_in_the_folder_is_right(tmp_path):
    write(tmp_path, "clips/a.wav", "clips/b.wav")
    write_metadata(tmp_path / "tables", "file_name,label", "../clips/a.wav,dog", "../tables/../clips/b.wav,cat")
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.wav": ["cat"]}


def test_clips_that_are_listed_but_not_there_are_counted(tmp_path, caplog):
    write(tmp_path, "a.wav")
    write_metadata(tmp_path, "file_name,label", "a.wav,dog", "b.wav,cat")
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.wav": ["cat"]}
    assert "1 of 2 clips that are listed are not there" in caplog.text


def test_splits_have_tables_of_their_own(tmp_path):
    write(tmp_path, "train/a.wav", "test/b.wav")
    write_metadata(tmp_path / "train", "file_name,label", "a.wav,1.0")
    with pytest.raises(UserError, match="has a file of metadata, but .*test has none"):
        open_splits(tmp_path)
    write_metadata(tmp_path / "test", "file_name,label", "b.wav,1")
    assert (labels(tmp_path), labels(tmp_path, split="test")) == ({"a.wav": ["1.0"]}, {"b.wav": ["1"]})


def test_columns_of_whole_numbers_and_of_fractions_are_one_column(tmp_path):
    for folder, seconds in (("train/a", 5), ("train/b", 4.5), ("test", 3)):
        write(tmp_path, f"{folder}/0.wav")
        row = {"file_name": "0.wav", "label": folder[:5], "fold": folder[-1], "seconds": seconds}
        (tmp_path / folder / "metadata.jsonl").write_text(json.dumps(row))
    assert select_folds(open_splits(tmp_path), "fold", ["a", "b", "t"])["seconds"][:] == [5.0, 4.5, 3.0]
    (tmp_path / "test" / "metadata.jsonl").write_text(json.dumps(row | {"seconds": "3"}))
    with pytest.raises(UserError, match="the splits train, test are not one table .*: give each column one type in all of them"):
        select_folds(open_splits(tmp_path), "fold", ["t"])


def test_a_table_that_changed_under_its_time_stamp_is_read_again(tmp_path):
    write(tmp_path, "a.wav")
    write_metadata(tmp_path, "file_name,label", "a.wav,dog")
    state = os.stat(tmp_path / "metadata.csv")
    assert labels(tmp_path) == {"a.wav": ["dog"]}
    write_metadata(tmp_path, "file_name,label", "a.wav,cat")
    os.utime(tmp_path / "metadata.csv", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert labels(tmp_path) == {"a.wav": ["cat"]}


def test_parquet_that_changed_under_its_time_stamp_is_read_again(tmp_path):
    def write_label(label: str) -> None:
        columns = {"audio": [{"bytes": b"RIFF", "path": "a"}], "label": [label]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
        os.utime(tmp_path / "train.parquet", (1, 1))

    for label in ("dog", "cat"):  # of one size
        write_label(label)
        assert open_splits(tmp_path, "parquet")["train"]["label"][:] == [label]


# --- classes that would vanish


def test_a_class_folder_without_audio_is_named(tmp_path, caplog):
    write(tmp_path, "dog/a.wav", "cat/b.wav")
    (tmp_path / "owl").mkdir()
    (tmp_path / "owl" / "c.txt").write_text("no sound")
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.wav": ["cat"]}
    assert "without any audio file, which are not classes: owl (1 .txt)" in caplog.text


def test_the_sound_of_video_is_read_and_files_that_are_not_read_are_counted(tmp_path, caplog):
    write(tmp_path, "train/dog/a.wav", "train/dog/b.mkv", "train/cat/c.mpga", "train/cat/d.voc", "test/dog/e.mov", "test/cat/f.wav")
    write(tmp_path, "train/cat/labels.txt", "train/cat/.hidden", "extra/g.avi", "h.avi", "train/owl/i.voc")
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.mkv": ["dog"], "c.mpga": ["cat"]}
    for message in (
        f"1 files below {tmp_path}/train are not read, as their suffix is not one of audio (1 .voc), such as cat/d.voc",
        f"2 files below {tmp_path} are not read, as their suffix is not one of audio (2 .avi), such as extra/g.avi",
        "which are not classes: owl (1 .voc)",
    ):
        assert caplog.text.count(message) == 1
    assert len(caplog.messages) == 3
    caplog.clear()
    assert len(open_splits(tmp_path, "folder")["train"]) == 5
    assert "4 files below" in caplog.text
    assert "(2 .avi, 2 .voc), such as extra/g.avi" in caplog.text


def test_files_that_neither_the_metadata_nor_a_suffix_of_audio_name_are_counted(tmp_path, caplog):
    write(tmp_path, "a.wav", "b.voc", "c.voc")
    write_metadata(tmp_path, "file_name,label", "a.wav,dog", "b.voc,cat")
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.voc": ["cat"]}
    assert "1 files below" in caplog.text
    assert "(1 .voc), such as c.voc" in caplog.text


def test_folders_of_different_depth_are_no_classes_and_that_is_said(tmp_path, caplog):
    write(tmp_path, "dog/a.wav", "cat/young/b.wav")
    (rows,) = open_splits(tmp_path).values()
    assert rows.column_names == ["audio"]
    assert "lie at different depths" in caplog.text


# --- one file by several names


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_one_file_are_one_clip(tmp_path, caplog, link):
    write(tmp_path, "dog/a.wav", "cat/b.wav")
    link(tmp_path / "dog" / "a.wav", tmp_path / "dog" / "z.wav")
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.wav": ["cat"]}
    assert len(open_splits(tmp_path, "folder")["train"]) == 2
    assert "1 files below" in caplog.text
    assert "dog/z.wav is dog/a.wav" in caplog.text


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_one_file_in_two_classes_is_an_error(tmp_path, link):
    write(tmp_path, "dog/a.wav", "cat/b.wav")
    link(tmp_path / "dog" / "a.wav", tmp_path / "cat" / "c.wav")
    with pytest.raises(UserError, match="dog/a.wav and cat/c.wav below .* are one file in two folders"):
        open_splits(tmp_path)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_links_to_one_file_in_two_splits_are_found(tmp_path, link):
    write(tmp_path, "train/dog/a.wav", "train/cat/b.wav", "test/cat/c.wav")
    splits = open_splits(tmp_path)
    check_apart({name: AudioColumn(rows) for name, rows in splits.items()})
    link(tmp_path / "train" / "dog" / "a.wav", tmp_path / "test" / "cat" / "d.wav")
    splits = open_splits(tmp_path)
    with pytest.raises(UserError, match="d.wav, which is .*a.wav, is both in train and in test"):
        check_apart({name: AudioColumn(rows) for name, rows in splits.items()})


def test_copies_of_files_in_two_splits_are_named(tmp_path, caplog):
    write(tmp_path, "train/dog/a.wav", "train/cat/b.wav", "test/cat/c.wav")
    check_apart({name: AudioColumn(rows) for name, rows in open_splits(tmp_path).items()})
    assert not caplog.records
    shutil.copy(tmp_path / "train" / "dog" / "a.wav", tmp_path / "test" / "cat" / "d.wav")
    shutil.copy(tmp_path / "train" / "cat" / "b.wav", tmp_path / "train" / "cat" / "e.wav")
    check_apart({name: AudioColumn(rows) for name, rows in open_splits(tmp_path).items()})
    (said,) = caplog.messages
    assert said.startswith("1 files have the content of a file in another part of the data, such as ")
    assert f"{tmp_path / 'train/dog/a.wav'} in train" in said
    assert f"{tmp_path / 'test/cat/d.wav'} in test" in said


def test_a_linked_split_is_the_same_clips(tmp_path):
    write(tmp_path, "train/dog/a.wav", "train/cat/b.wav")
    (tmp_path / "test").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match="is both in train and in test"):
        check_apart({name: AudioColumn(rows) for name, rows in open_splits(tmp_path).items()})


# --- names


def test_a_file_name_that_is_not_utf_8_can_be_opened(tmp_path):
    write(tmp_path, "dog/a.wav", "cat/b.wav")
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/cat/caf\xe9.wav")
    os.rename(tmp_path / "cat" / "b.wav", odd)
    for layout in ("folder", "audiofolder"):
        rows = open_splits(tmp_path, layout)["train"]
        assert [decode_path(audio["path"]) for audio in rows["audio"]] == [odd, str(tmp_path / "dog" / "a.wav")]
        np.testing.assert_array_equal(load_waveform(rows[0]["audio"]), load_waveform(odd))
    assert AudioColumn(rows).select([0]).paths == [encode_path(odd)]


@pytest.mark.parametrize("name", [b"plain", "Ärger/ß".encode(), b"\xff\xfe", b"caf\xe9/\xe9", b"back\\xe9", b"%e9"])
def test_any_path_can_be_encoded_and_back(name: bytes):
    path = os.fsdecode(name)
    assert decode_path(encode_path(path)) == path
    encode_path(path).encode()


def test_rings_of_links_and_mac_files_are_no_clips(tmp_path):
    write(tmp_path, "a/1.wav", "a/._1.wav", "b/2.WAV")
    (tmp_path / "b" / "ring").symlink_to(tmp_path)
    assert list(files_below(tmp_path, (".wav",))) == ["a/1.wav", "b/2.WAV"]
    assert find_files(tmp_path, (".wav",)) == (["a/1.wav", "b/2.WAV"], {})


# --- archives, splits, tables


def test_archives_are_splits_or_parts_of_one(tmp_path):
    write(tmp_path / "made", "dog/a.wav", "cat/b.wav")
    for name in ("train.zip", "test.zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(tmp_path / "made/dog/a.wav", "dog/a.wav")
            archive.write(tmp_path / "made/cat/b.wav", "cat/b.wav" if name == "train.zip" else "cat/c.wav")
    for path in (tmp_path / "made").rglob("*.wav"):
        path.unlink()
    assert audio_folder_splits(tmp_path) == {"train": [tmp_path / "train.zip"], "test": [tmp_path / "test.zip"]}
    assert labels(tmp_path) == {"a.wav": ["dog"], "b.wav": ["cat"]}
    assert labels(tmp_path, split="test") == {"a.wav": ["dog"], "c.wav": ["cat"]}
    (tmp_path / "train.zip").write_bytes(b"no archive")
    with pytest.raises(UserError, match="train.zip cannot be extracted"):
        open_splits(tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_archive_is_named(tmp_path, method):
    write(tmp_path / "made", "a.wav")
    path = tmp_path / "clips" / "clips.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.write(tmp_path / "made" / "a.wav", "fée/a.wav")
    whole = path.read_bytes()
    damages = [(place, bytes(byte ^ 255 for byte in whole[place : place + 40])) for place in range(60, len(whole) - 150, len(whole) // 7)]
    damages += [(29, b"\x02"), (whole.rindex("é".encode()), b"\xff")]  # the clip begins behind the end; its name is not UTF-8
    for place, damage in damages:
        path.write_bytes(whole[:place] + damage + whole[place + len(damage) :])
        with pytest.raises(UserError, match="clips.zip cannot be extracted"):
            open_splits(path.parent)


def test_what_was_extracted_is_extracted_again_where_a_part_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write(tmp_path / "made", "dog/a.wav", "dog/b.wav")
    (tmp_path / "clips").mkdir()
    with zipfile.ZipFile(tmp_path / "clips" / "clips.zip", "w") as archive:
        for name in ("dog/a.wav", "dog/b.wav"):
            archive.write(tmp_path / "made" / name, f"./{name}")
    first, second = sorted(source["path"] for source in open_splits(tmp_path / "clips")["train"]["audio"])
    written = Path(first).stat().st_ino
    open_splits(tmp_path / "clips")
    assert Path(first).stat().st_ino == written
    for damage in (Path.unlink, lambda path: path.write_bytes(b"RIFF")):
        damage(Path(second))
        assert labels(tmp_path / "clips") == {"a.wav": ["dog"], "b.wav": ["dog"]}
        assert Path(second).read_bytes() == (tmp_path / "made" / "dog" / "b.wav").read_bytes()


def test_a_table_of_files_is_in_memory_and_costs_seconds(tmp_path):
    import time

    paths = [f"/data/clips/{number:07d}.wav" for number in range(200_000)]
    start = time.process_time()  # other programs take time by the clock
    rows = table_of_files(paths, {"label": ["a", "b"] * 100_000}, {"label": datasets.ClassLabel(names=["a", "b"])})
    assert time.process_time() - start < 5
    assert (len(rows), rows.cache_files) == (200_000, [])
    assert rows[199_999] == {"audio": {"bytes": None, "path": paths[-1]}, "label": 1}


def test_the_hash_of_audio_is_of_its_content(tmp_path, monkeypatch):
    write(tmp_path, "a.wav", "b.wav")

    def digest() -> str:
        return hash_audio(AudioColumn(open_splits(tmp_path, "folder")["train"]))

    first, state = digest(), os.stat(tmp_path / "b.wav")
    assert digest() == first
    content = bytearray((tmp_path / "b.wav").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "b.wav").write_bytes(content)  # of the same size
    os.utime(tmp_path / "b.wav", ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    assert digest() != first
    monkeypatch.setattr("transformers_sslam.audio.rows.HASHED_BYTES", 1)  # more than is hashed whole
    ends = digest()
    assert digest() == ends
    (tmp_path / "b.wav").write_bytes(content[:-2] + b"\1\1")
    assert digest() != ends
