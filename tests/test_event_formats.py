"""Files of events as other programs read them, and folders of them that are written whole or not at all."""

import csv
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from transformers_sslam import reports
from transformers_sslam.errors import UserError
from transformers_sslam.events_sslam import Event
from transformers_sslam.recordings import formats
from transformers_sslam.recordings.parts import Parts


EVENTS = [Event(0.48, 1.28, "dog, big", 0.8125), Event(1.2, 12.3456, "rain\tor\r\nhail", 0.5)]


# --- names of recordings


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b/c.wav"], ["c.wav"]),
        (["/a/b/c.wav", "/a/b/d.wav"], ["c.wav", "d.wav"]),
        (["/a/b/c.wav", "/a/b.wav", "/a/bb/c.wav", "/a/b/c.flac"], ["b/c.wav", "b.wav", "bb/c.wav", "b/c.flac"]),
        (["/a/c.wav", "/b/c.wav"], ["a/c.wav", "b/c.wav"]),
        (["s3://bucket/deep/c.wav", "s3://bucket/c.wav"], ["deep/c.wav", "c.wav"]),
        (["/a/c.wav", "s3://bucket/../../c.wav"], ["a/c.wav", "s3:/bucket/c.wav"]),  # below a folder whatever is in an address
        (["/a/caf\udce9.wav", "/a/$x$ y.wav"], ["caf\udce9.wav", "$x$ y.wav"]),
    ],
)
def test_recordings_are_called_by_their_paths_below_the_folder_that_holds_all(paths, names):
    assert formats.names_within(paths) == names


def test_names_do_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert formats.names_within(["rec/a.wav", str(tmp_path / "b.wav")]) == ["rec/a.wav", "b.wav"]


def test_addresses_that_would_have_one_name_are_rejected():
    with pytest.raises(UserError, match=r"s3://a/b\.wav and s3://a//b\.wav would both be called b\.wav: leave one of them out"):
        formats.names_within(["s3://a/b.wav", "s3://a//b.wav"])


# --- files


def test_the_table_of_dcase_has_each_event_and_each_recording_without_one(tmp_path):
    formats.write_dcase(tmp_path / "events.tsv", [("a.wav", EVENTS), ("deep/silent.wav", []), ("caf\udce9.wav", EVENTS[:1])])
    assert (tmp_path / "events.tsv").read_text() == (
        "filename\tonset\toffset\tevent_label\n"
        "a.wav\t0.480\t1.280\tdog, big\n"
        "a.wav\t1.200\t12.346\train or hail\n"
        "deep/silent.wav\t\t\t\n"
        "caf\\udce9.wav\t0.480\t1.280\tdog, big\n"
    )


def test_a_label_track_has_start_end_and_label(tmp_path):
    formats.write_audacity(tmp_path / "track.txt", EVENTS, 8000.0)
    assert (tmp_path / "track.txt").read_text() == "0.480000\t1.280000\tdog, big\n1.200000\t12.345600\train or hail\n"


def test_a_selection_table_has_the_columns_that_raven_needs_and_the_range_of_the_model(tmp_path):
    formats.write_raven(tmp_path / "table.txt", EVENTS, 8000.0)
    with (tmp_path / "table.txt").open(newline="") as file:
        first, second = csv.DictReader(file, delimiter="\t")
    assert first == {
        "Selection": "1",
        "View": "Spectrogram 1",
        "Channel": "1",
        "Begin Time (s)": "0.480",
        "End Time (s)": "1.280",
        "Low Freq (Hz)": "20.0",
        "High Freq (Hz)": "8000.0",
        "Annotation": "dog, big",
        "Score": "0.8125",
    }
    assert (second["Selection"], second["Begin Time (s)"], second["Annotation"]) == ("2", "1.200", "rain or hail")
    formats.write_raven(tmp_path / "table.txt", [], 8000.0)
    assert (tmp_path / "table.txt").read_text().count("\n") == 1  # the names of the columns


LINES = [f"a{end}b" for end in ("\r", "\n", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\x85\u2028")]


def test_text_with_line_ends_stays_one_cell_of_a_table(tmp_path):
    reports.write_csv(tmp_path / "a.csv", ["x", *LINES], ([number, *LINES, None] for number in range(2)))
    with (tmp_path / "a.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["x", *LINES], *([str(number), *LINES, ""] for number in range(2))]
    for line in LINES:  # each quoted for its own sake
        reports.write_csv(tmp_path / "a.csv", ["path", "label"], [["a.wav", line]])
        assert pd.read_csv(tmp_path / "a.csv")["label"].tolist() == [line]


def test_text_with_line_ends_is_on_one_line(tmp_path):
    formats.write_lines(tmp_path / "a.jsonl", ({"path": line, "ü": 1} for line in LINES))
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["path"] for line in lines] == LINES
    assert '"ü"' in lines[0]
    events = [Event(0.0, 1.0, line, 0.5) for line in LINES]
    formats.write_audacity(tmp_path / "track.txt", events, 8000.0)
    formats.write_raven(tmp_path / "table.txt", events, 8000.0)
    formats.write_dcase(tmp_path / "events.tsv", [(line, events) for line in LINES])
    for name, rows in (("track.txt", len(LINES)), ("table.txt", 1 + len(LINES)), ("events.tsv", 1 + len(LINES) ** 2)):
        assert len((tmp_path / name).read_text(encoding="utf-8").splitlines()) == rows


def test_small_tables_share_row_groups_and_no_table_is_a_table(tmp_path):
    schema = pa.schema([("x", pa.int64())])
    tables = [pa.table({"x": [3 * i, 3 * i + 1, 3 * i + 2]}, schema=schema) for i in range(5)]
    formats.write_tables(tmp_path / "x.parquet", schema, iter(tables), rows_at_once=6)
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [6, 6, 3]
    assert file.read()["x"].to_pylist() == list(range(15))
    formats.write_tables(tmp_path / "none.parquet", schema, iter([]), rows_at_once=6)
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0


# --- folders


@pytest.fixture
def parts(tmp_path) -> Parts:
    return Parts(tmp_path / "x.parts", {"task": "Detection"}, 2)


def write_folder(parts: Parts, folder: Path, **files: str) -> None:
    with parts.replace(folder) as temporary:
        temporary.mkdir()
        for name, text in files.items():
            (temporary / name).mkdir()
            (temporary / name / "track.txt").write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("place", ["x.audacity", "elsewhere/pictures"])
def test_a_folder_is_replaced_as_a_whole(parts, tmp_path, place):
    folder = tmp_path / place
    write_folder(parts, folder, a="1", b="2")
    assert contents(folder) == {"a/track.txt": "1", "b/track.txt": "2"}
    write_folder(parts, folder, b="3", c="4")
    assert contents(folder) == {"b/track.txt": "3", "c/track.txt": "4"}
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith((".unfinished", ".discarded"))]


def test_folders_of_one_name_in_two_places_are_kept_apart(parts, tmp_path):
    write_folder(parts, tmp_path / "one" / "pictures", a="1")
    (tmp_path / "two" / "pictures").mkdir(parents=True)
    with pytest.raises(UserError, match="two/pictures exists, and was not written from"):
        parts.check_output(tmp_path / "two" / "pictures")
    parts.check_output(tmp_path / "one" / "pictures")


@pytest.mark.parametrize("change", ["edited", "added", "renamed", "deleted"])
def test_a_folder_in_which_somebody_has_corrected_a_label_is_not_replaced(parts, tmp_path, change):
    folder = tmp_path / "x.audacity"
    write_folder(parts, folder, a="1", b="2")
    track = folder / "a" / "track.txt"
    if change == "edited":
        track.write_text("mine")
    elif change == "added":
        track.with_name("mine.txt").write_text("mine")
    elif change == "renamed":
        track.rename(track.with_name("mine.txt"))
    else:
        track.unlink()
    before = contents(folder)
    with pytest.raises(UserError, match=r"x\.audacity was changed since it was written .* move it away"):
        write_folder(parts, folder, a="3")
    assert contents(folder) == before
    folder.rename(tmp_path / "mine")
    write_folder(parts, folder, a="3")
    assert contents(folder) == {"a/track.txt": "3"}


def test_a_folder_is_not_taken_for_a_file_nor_a_file_for_a_folder(parts, tmp_path):
    folder = tmp_path / "x.audacity"
    write_folder(parts, folder, a="1")
    os.rename(folder, tmp_path / "away")
    folder.write_text("precious")
    with pytest.raises(UserError, match="exists, and was not written from"):
        write_folder(parts, folder, a="1")
    assert folder.read_text() == "precious"


def test_a_folder_that_is_not_finished_changes_nothing(parts, tmp_path):
    folder = tmp_path / "x.audacity"
    write_folder(parts, folder, a="1")
    with pytest.raises(FileExistsError):
        write_folder(parts, folder, **{"a": "2", "a/track.txt": "3"})
    assert contents(folder) == {"a/track.txt": "1"}
    assert not list(tmp_path.glob(".*.unfinished"))
    write_folder(parts, folder, a="2")
    assert contents(folder) == {"a/track.txt": "2"}


class Killed(BaseException):
    pass


def test_killed_before_any_operation_a_folder_is_ours_still_and_written_by_the_next_run(tmp_path, monkeypatch):
    """What cleans up fails, too, as after `kill -9`."""

    def run(place: Path, text: str, last: int | None = None) -> int:
        count = 0

        def counted(function):
            def operation(*args, **options):
                nonlocal count
                count += 1
                if last is not None and count >= last:
                    raise Killed
                return function(*args, **options)

            return operation

        with monkeypatch.context() as patch:
            for holder, name in [(os, "rename"), (os, "fsync"), (shutil, "rmtree"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")]:
                patch.setattr(holder, name, counted(getattr(holder, name)))
            try:
                write_folder(Parts(place / "x.parts", {"task": "Detection"}, 2), place / "x.audacity", a=text, b=text)
            except Killed:
                return count
            assert last is None
            return count

    run(tmp_path / "whole", "1")
    operations = run(tmp_path / "whole", "2")
    assert operations > 15
    for number in range(1, operations + 1):
        place = tmp_path / str(number)
        place.mkdir()
        run(place, "1")
        for text in ("2", "3"):
            run(place, text, number)
        folder = place / "x.audacity"
        assert not folder.exists() or set(contents(folder).values()) in ({"1"}, {"2"}, {"3"})
        run(place, "4")
        assert contents(folder) == {"a/track.txt": "4", "b/track.txt": "4"}
        assert not list(place.glob(".*.unfinished"))
