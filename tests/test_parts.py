"""Parts: results of recordings are found again, those of a damaged part are lost, and no file of others is touched."""

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from transformers_sslam.errors import AudioDecodingError, UserError
from transformers_sslam.recordings import parts as module
from transformers_sslam.recordings.inputs import Recording
from transformers_sslam.recordings.parts import Parts
from transformers_sslam.tasks_sslam import Row


IDENTITY = {"task": "Scoring", "hop": 0.5, "layers": (1, 2), "model": "sha256:a", "model_name": "runs/a"}
A, B, C = (Recording(f"/recordings/{name}", size, 10 + size) for size, name in enumerate(("a.wav", "b.wav", "caf\udce9.wav"), 1))
BROKEN = AudioDecodingError("truncated", "it ends too early")


def rows(*values: float) -> list[Row]:
    """A row for each second, of two values."""
    return [Row(float(second), second + 1.0, torch.tensor([value, -value])) for second, value in enumerate(values)]


def opened(tmp_path: Path, **identity) -> Parts:
    return Parts(tmp_path / "x.parts", {**IDENTITY, **identity}, 2)


def read(parts: Parts, *recordings: Recording) -> dict[str, list[tuple]]:
    """Start and first value of each row of each recording."""
    found = {}
    for path, _, tables in parts.read([recording.path for recording in recordings]):
        table = [row for table in tables for row in table.to_pylist()]
        found[path] = [(row["start"], row["values"] and row["values"][0]) for row in table]
    return found


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "x.parts").glob("*.parquet"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_was_written_is_found_again(tmp_path):
    parts = opened(tmp_path)
    parts.write([(A, rows(1, 2, 3)), (C, rows(4))])
    parts.write([(B, rows(5, 6))])
    expected = {A.path: [(0, 1), (1, 2), (2, 3)], B.path: [(0, 5), (1, 6)], C.path: [(0, 4)]}
    assert not parts.entries  # before a refresh
    parts.refresh()
    for reopened in (parts, opened(tmp_path)):
        assert read(reopened, A, B, C) == expected
        assert read(reopened, C, A) == {C.path: expected[C.path], A.path: expected[A.path]}
        assert all(reopened.holds(recording) for recording in (A, B, C))
    assert {path.name[:5] for path in files(tmp_path)} == {"0001-"}


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 4, 100])
def test_recordings_of_any_length_are_read_in_tables_of_limited_size(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 8 * rows_at_once)
    parts = opened(tmp_path)
    lengths = {A: 7, B: 1, C: 4}
    parts.write([(recording, rows(*range(length))) for recording, length in lengths.items()])
    parts.refresh()
    [file] = files(tmp_path)
    assert pq.ParquetFile(file).num_row_groups == -(-12 // rows_at_once)
    assert read(parts, *lengths) == {recording.path: [(i, i) for i in range(length)] for recording, length in lengths.items()}
    assert max(len(table) for _, _, tables in parts.read([A.path]) for table in tables) == min(7, rows_at_once)


@pytest.mark.parametrize("changed", [{"size": 9}, {"modified": 9}, {"size": None, "modified": None}])
def test_another_file_in_its_place_is_not_held(tmp_path, changed):
    parts = opened(tmp_path)
    parts.write([(A, rows(1))])
    parts.refresh()
    assert parts.holds(A)
    assert not parts.holds(A._replace(**changed))
    assert not parts.holds(B)


def test_of_several_results_the_last_ones_count(tmp_path):
    for value in (3.0, 1.0, 2.0):  # hashes in any order
        parts = opened(tmp_path)
        parts.write([(A, rows(value))])
    assert read(opened(tmp_path), A) == {A.path: [(0, 2)]}
    assert [path.name[:4] for path in files(tmp_path)] == ["0001", "0002", "0003"]


def test_an_error_is_written_once_and_never_held(tmp_path):
    opened(tmp_path).write([(A, [BROKEN]), (B, rows(1))])
    parts = opened(tmp_path)
    assert parts.entries[A.path][3:] == (1, 11, "truncated", "it ends too early")
    assert not parts.holds(A)
    parts.write([(A, [BROKEN])])
    assert len(files(tmp_path)) == 1  # nothing new
    parts.write([(A, [ValueError("too short")])])
    parts.write([(C, [])])
    parts.refresh()
    assert (parts.entries[A.path].cause, len(files(tmp_path))) == ("rejected", 2)
    opened(tmp_path).write([(A, rows(7))])
    assert read(opened(tmp_path), A) == {A.path: [(0, 7)]}


def test_results_before_a_known_error_are_not_taken_for_the_whole(tmp_path):
    """Rows are written as they come, before it is known that a recording ends in an error, and that it is the same as before."""
    for _ in range(3):
        parts = opened(tmp_path)
        parts.write([(A, [*rows(1, 2), BROKEN])])
        parts.refresh()
        assert (parts.entries[A.path].cause, parts.holds(A)) == ("truncated", False)
        assert len(files(tmp_path)) == 1
    opened(tmp_path).write([(A, rows(1, 2))])
    opened(tmp_path).write([(A, [*rows(1, 2), BROKEN])])  # as of the first part, but since then there was another result
    assert opened(tmp_path).entries[A.path].cause == "truncated"
    assert len(files(tmp_path)) == 3


def test_after_an_exception_there_is_no_part(tmp_path):
    def interrupted():
        yield from rows(1, 2)
        raise KeyboardInterrupt

    parts = opened(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        parts.write([(A, rows(1)), (B, interrupted())])
    assert list(contents(tmp_path / "x.parts")) == ["settings.json"]


def test_a_part_with_one_changed_bit_is_dropped(tmp_path, caplog):
    parts = opened(tmp_path)
    parts.write([(A, rows(1))])
    parts.write([(B, rows(2))])
    parts.refresh()
    part = tmp_path / "x.parts" / parts.entries[A.path].part
    whole = part.read_bytes()
    for place in range(0, len(whole), 41):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with caplog.at_level(logging.WARNING):
            reopened = opened(tmp_path)
        assert (reopened.holds(A), reopened.holds(B)) == (False, True)
        assert not part.exists()
        assert f"{part} is damaged: its recordings are processed again" in caplog.text
        caplog.clear()
    part.write_bytes(whole[:-1])
    assert not opened(tmp_path).holds(A)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        ({"hop": 0.25}, "hop was 0.5 and is 0.25 now"),
        ({"hop": 0.25, "layers": (2, 1)}, r"hop was 0.5 and is 0.25 now; layers was \[1, 2\] and is \[2, 1\] now"),
        (
            {"hop": 0.25, "model": "sha256:b", "model_name": "runs/b"},
            "the model was runs/a and is runs/b now; hop was 0.5 and is 0.25 now",
        ),
        ({"model": "sha256:b"}, "weights, configuration or feature extractor of runs/a were others"),
        ({"model": "sha256:b", "dtype": "float16"}, "dtype was None and is 'float16' now"),
    ],
)
def test_results_of_other_settings_are_rejected(tmp_path, identity, message):
    opened(tmp_path).write([(A, rows(1))])
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=rf"x.parts was made with other settings: {message}\. Give the same to resume, or another output; or"
    ):
        opened(tmp_path, **identity)
    assert contents(tmp_path) == before


def test_a_model_may_be_moved(tmp_path):
    opened(tmp_path).write([(A, rows(1))])
    assert opened(tmp_path, model_name="elsewhere/a").holds(A)


def test_a_folder_of_others_is_left_alone(tmp_path):
    (tmp_path / "x.parts").mkdir()
    (tmp_path / "x.parts" / "part.parquet").write_text("precious")
    with pytest.raises(UserError, match="x.parts is not a folder of results that this program wrote: give another output"):
        opened(tmp_path)
    assert contents(tmp_path) == {"x.parts/part.parquet": b"precious"}


def test_parquet_files_of_others_among_the_parts_are_left_alone(tmp_path):
    opened(tmp_path).write([(A, rows(1)), (B, rows(2))])
    (part,) = files(tmp_path)
    part.rename(part.with_name(part.name.replace("0001", "kept")))
    (tmp_path / "x.parts" / "mine.parquet").write_text("precious")
    before = contents(tmp_path)
    assert not opened(tmp_path).entries
    assert contents(tmp_path) == before


def test_of_ten_thousand_runs_the_last_one_counts(tmp_path):
    for run in (9_999, 10_000):
        parts = opened(tmp_path)
        parts.run = run
        parts.write([(A, rows(run))])
    assert (read(opened(tmp_path), A), opened(tmp_path).run) == ({A.path: [(0, 10_000)]}, 10_001)


def test_two_processes_may_begin_at_once(tmp_path, monkeypatch):
    """The other one writes the settings and a part as soon as this one has looked whether there are any."""
    exists = Path.exists

    def looks(self, **options) -> bool:
        found = exists(self, **options)
        if self.name == "settings.json" and not found:
            monkeypatch.undo()
            opened(tmp_path).write([(A, rows(1))])
        return found

    monkeypatch.setattr(Path, "exists", looks)
    parts = opened(tmp_path)
    assert read(parts, A) == {A.path: [(0, 1)]}


@pytest.mark.parametrize("name", ["settings.json", "outputs.json"])
def test_damaged_files_are_one_clear_error_or_change_nothing(tmp_path, name):
    output, file = tmp_path / "x.csv", tmp_path / "x.parts" / name
    parts = opened(tmp_path)
    parts.write([(A, rows(1))])
    with parts.replace(output) as temporary:
        temporary.write_text("one")
    whole = file.read_bytes()
    damaged = [whole[:length] for length in range(0, len(whole) - 1, 7)]  # the last byte ends a line
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(len(whole))]
    damaged += [b"[]", b"{}", b"1", b'"x"', b"null", b'{"x.csv": null}', b'{"x.csv": []}', b"[" * 100_000]
    rejected = 0
    for content in damaged:
        file.write_bytes(content)
        before = contents(tmp_path)
        try:
            opened(tmp_path).check_output(output)
        except UserError:
            rejected += 1
        assert contents(tmp_path) == before
    assert rejected > 0.8 * len(damaged)


def test_an_output_is_replaced_only_as_it_was_written(tmp_path):
    output, parts = tmp_path / "x.csv", opened(tmp_path)
    for text in ("one", "one", "two"):
        with parts.replace(output) as temporary:
            temporary.write_text(text)
        assert output.read_text() == text
    for changed in ("one", "twO", "two\n", ""):
        output.write_text(changed)
        if changed == "one":  # the one before
            parts.check_output(output)
            continue
        with pytest.raises(UserError, match=r"x.csv was changed since it was written \(line ends\?\): move it away"), parts.replace(output):
            pass
        assert output.read_text() == changed
    output.unlink()
    with parts.replace(output) as temporary:
        temporary.write_text("three")
    assert output.read_text() == "three"
    assert [path.name for path in tmp_path.rglob("*.unfinished")] == []


@pytest.mark.parametrize("how", ["a file", "a folder"])
def test_an_output_of_others_is_left_alone(tmp_path, how):
    output, parts = tmp_path / "x.csv", opened(tmp_path)
    output.mkdir() if how == "a folder" else output.write_text("precious")
    with (
        pytest.raises(UserError, match=r"x.csv exists, and was not written from .*x.parts: move it away, or give another output"),
        parts.replace(output),
    ):
        pass
    assert output.is_dir() if how == "a folder" else output.read_text() == "precious"


def test_an_exception_leaves_the_output_as_it_was(tmp_path):
    output, parts = tmp_path / "x.csv", opened(tmp_path)
    with parts.replace(output) as temporary:
        temporary.write_text("one")
    before = contents(tmp_path)

    def interrupted():
        with parts.replace(output) as temporary:
            temporary.write_text("tw")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert contents(tmp_path) == before


def test_killed_twice_before_the_output_takes_its_name_it_is_known_still(tmp_path, monkeypatch):
    """Its hash stands in outputs.json however many others were about to replace it."""
    output, parts, replace = tmp_path / "x.csv", opened(tmp_path), Path.replace
    with parts.replace(output) as temporary:
        temporary.write_text("one")

    def killed(self, target):
        if Path(target) == output:
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    for text in ("two", "three", "four"):
        with pytest.raises(KeyboardInterrupt), parts.replace(output) as temporary:
            temporary.write_text(text)
    monkeypatch.undo()
    assert output.read_text() == "one"
    with opened(tmp_path).replace(output) as temporary:
        temporary.write_text("five")
    assert output.read_text() == "five"
    assert len(json.loads((tmp_path / "x.parts" / "outputs.json").read_text())["x.csv"]) == 2
