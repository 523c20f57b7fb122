"""Labels of recordings: what is written of each, in every format, and what is rejected."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, speech_like, tiny_config
from filelock import FileLock
from processes import Fork

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification, SSLAMModel


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
import pyarrow.parquet as pq  # noqa: E402

from transformers_sslam.audio.decode import load_waveform  # noqa: E402
from transformers_sslam.cli import main  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.recordings import inputs  # noqa: E402
from transformers_sslam.recordings.segments import join_windows  # noqa: E402
from transformers_sslam.recordings.tag import TagSettings, tag_files  # noqa: E402
from transformers_sslam.tasks_sslam import Scoring  # noqa: E402


ROOT = Path(__file__).parents[1]
SMALL_MODEL = ROOT / "model_cards" / "sslam-tiny-esc10"
RATE = 16_000
CLASSES = ["dog, big", "rain", "sea"]
SUFFIXES = (".jsonl", ".csv", ".parquet")


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    config = tiny_config(**names, initializer_range=0.3, classifier_pooling="mean", problem_type="multi_label_classification")
    SSLAMForAudioClassification(config).save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def recordings(tmp_path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.wav").write_bytes(encoded(noise(2.0)))
    (folder / "b.flac").write_bytes(encoded(np.stack([speech_like(1.5, 44_100)] * 2, axis=1), 44_100, "FLAC"))
    (folder / "broken.wav").write_text("no audio")
    (folder / "deep" / "c.ogg").write_bytes(encoded(speech_like(0.4), RATE, "OGG"))
    (folder / "notes.txt").write_text("none either")
    (folder / "short.wav").write_bytes(encoded(noise(0.02)))
    return folder


@pytest.fixture
def without_model(monkeypatch):
    """From when it is called on, the model must not run."""

    def compute(self, model, inputs):
        raise AssertionError("the model runs")

    return lambda: monkeypatch.setattr(Scoring, "compute", compute)


def settings(model, recordings, output, **changes) -> TagSettings:
    return TagSettings(**{"model": str(model), "inputs": str(recordings), "output": str(output), "hop": 0.5, "device": "cpu", **changes})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rows(path: Path) -> list[dict]:
    """Of a .csv or .parquet, as text, as a .csv has it."""
    if path.suffix == ".csv":
        return list(csv.DictReader(path.open(newline="")))
    table = pq.read_table(path).to_pylist()
    return [
        {name: "" if value is None else str(round(value, 4) if name == "score" else value) for name, value in row.items()} for row in table
    ]


def expected(model: Path, path: Path):
    classifier, extractor = SSLAMForAudioClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    return classifier.score_over_time(load_waveform(path), extractor, hop=0.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is written


def test_each_recording_has_a_line_with_the_likeliest_labels_or_its_error(model, recordings, tmp_path):
    output = tmp_path / "new" / "tags.jsonl"
    summary = tag_files(settings(model, recordings, output, top_k=2, per="window", threshold=0.0))
    a, b, broken, c, short = lines(output)
    assert [record["path"] for record in (a, b, broken, c, short)] == [
        str(recordings / name) for name in ("a.wav", "b.flac", "broken.wav", "deep/c.ogg", "short.wav")
    ]
    scored = expected(model, recordings / "a.wav")
    highest = scored.scores.max(0)
    order = highest.argsort()[::-1][:2]
    assert [tag["label"] for tag in a["tags"]] == [CLASSES[i] for i in order]
    assert [tag["score"] for tag in a["tags"]] == pytest.approx(highest[order].tolist(), abs=6e-5)
    assert [(window["start"], window["end"]) for window in a["windows"]] == [(0, 0.655), (0.5, 1.155), (1, 1.655), (1.345, 2)]
    assert [len(window["tags"]) for window in a["windows"]] == [2] * 4
    assert a["windows"][2]["tags"][0]["score"] == pytest.approx(scored.scores[2].max(), abs=6e-5)
    assert (a["duration"], b["duration"], c["duration"]) == (2, 1.5, 0.4)
    assert [(w["start"], w["end"]) for w in c["windows"]] == [(0, 0.4)]
    assert all("segments" not in record for record in (a, b, c))
    assert (broken["cause"], short["cause"]) == ("unreadable", "too short")
    assert "320 samples" in short["error"]
    assert (summary.finished, summary.skipped, summary.unusable) == (3, 0, {"unreadable": 1, "too short": 1})
    assert summary.audio_seconds == pytest.approx(3.9)
    assert summary.is_complete


def test_by_default_windows_are_joined_into_segments(model, recordings, tmp_path):
    output = tmp_path / "tags.jsonl"
    tag_files(settings(model, recordings / "a.wav", output, threshold=0.21, top_k=2))
    [record] = lines(output)
    scored = expected(model, recordings / "a.wav")
    segments = join_windows(scored.starts, scored.starts + scored.window, scored.scores, CLASSES, 2, 0.21)
    assert 1 < len(segments) < 8
    assert [(one["start"], one["end"], one["label"]) for one in record["segments"]] == [
        (round(one.start, 3), round(one.end, 3), one.label) for one in segments
    ]
    assert [one["score"] for one in record["segments"]] == pytest.approx([one.score for one in segments], abs=6e-5)
    assert "windows" not in record
    for suffix in (".csv", ".parquet"):
        tag_files(settings(model, recordings / "a.wav", output.with_suffix(suffix), threshold=0.21, top_k=2))
        for row, segment in zip(rows(output.with_suffix(suffix)), record["segments"], strict=True):
            assert row == {"path": str(recordings / "a.wav"), "error": "", **{name: str(value) for name, value in segment.items()}}


def test_labels_below_one_tenth_are_left_out_unless_asked_for(model, recordings, tmp_path):
    """The mean over windows can be asked for, too."""
    assert TagSettings(model="", inputs="", output="tags.csv").threshold == 0.1
    classifier = SSLAMForAudioClassification.from_pretrained(model)
    classifier.classifier.bias.data[1] -= 5
    classifier.save_pretrained(model)
    mean = expected(model, recordings / "a.wav").scores.mean(0)
    assert mean[1] < 0.1 < min(mean[0], mean[2])
    for threshold, count in ((None, 2), (0.0, 3), (float(mean.max()) - 0.001, 1)):
        changes = {} if threshold is None else {"threshold": threshold}
        tag_files(settings(model, recordings / "a.wav", tmp_path / "tags.jsonl", pool="mean", **changes))
        tags = lines(tmp_path / "tags.jsonl")[0]["tags"]
        assert [tag["score"] for tag in tags] == pytest.approx(sorted(mean.tolist(), reverse=True)[:count], abs=6e-5)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_has_a_row_for_each_window_and_label(model, recordings, tmp_path, suffix):
    output = tmp_path / f"tags{suffix}"
    tag_files(settings(model, recordings, output, top_k=2, per="window", threshold=0.0))
    table = rows(output)
    names = ("a.wav", "b.flac", "broken.wav", "c.ogg", "short.wav")
    assert [len([row for row in table if row["path"].endswith(name)]) for name in names] == [4 * 2, 3 * 2, 1, 2, 1]
    assert [row["path"] for row in table] == sorted(row["path"] for row in table)
    scored = expected(model, recordings / "a.wav")
    assert (table[2]["start"], table[2]["end"]) == ("0.5", "1.155")
    assert float(table[2]["score"]) == pytest.approx(scored.scores[1].max(), abs=6e-5)
    assert table[2]["label"] == CLASSES[scored.scores[1].argmax()]
    [error] = [row["error"] for row in table if row["path"].endswith("broken.wav")]
    assert "cannot be read as audio (Invalid data found when processing input)" in error


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_has_a_row_for_a_recording_without_labels(model, recordings, tmp_path, suffix):
    folder, output = recordings / "deep", tmp_path / f"tags{suffix}"
    (folder / "later.wav").write_bytes(b"")
    found = []
    for _ in range(2):
        tag_files(settings(model, folder, output, threshold=1.0))
        found += [row for row in rows(output) if row["path"].endswith("later.wav")]
        (folder / "later.wav").write_bytes(encoded(noise(1.0)))
    assert [(row["start"], row["end"], row["label"], row["score"]) for row in found] == [("", "", "", ""), ("0.0", "1.0", "", "")]
    assert [bool(row["error"]) for row in found] == [True, False]


def test_a_csv_has_no_cell_that_a_spreadsheet_would_compute(model, recordings, tmp_path, monkeypatch):
    config = SSLAMForAudioClassification.from_pretrained(model).config
    config.id2label = {0: '=HYPERLINK("http://example.org")', 1: "@SUM(1)", 2: "-1+2"}
    SSLAMForAudioClassification(config).save_pretrained(model)
    (tmp_path / "formulas").mkdir()
    monkeypatch.chdir(tmp_path / "formulas")
    Path("=cmd.wav").write_bytes(encoded(noise(1.0)))
    Path("+broken.wav").write_bytes(b"no audio")
    for suffix in SUFFIXES:
        listed = ["=cmd.wav", "+broken.wav"]
        tag_files(settings(model, listed, tmp_path / f"tags{suffix}", inputs=listed, threshold=0.0))
    cells = [cell for row in list(csv.reader((tmp_path / "tags.csv").open()))[1:] for cell in row]
    assert {cell for cell in cells if cell.startswith("'")} >= {
        "'=cmd.wav",
        "'+broken.wav",
        '\'=HYPERLINK("http://example.org")',
        "'@SUM(1)",
        "'-1+2",
    }
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    cmd, broken = lines(tmp_path / "tags.jsonl")  # JSON and Parquet are not computed, and have names as they are
    assert (cmd["path"], broken["path"]) == ("=cmd.wav", "+broken.wav")
    assert {tag["label"] for tag in cmd["tags"]} == set(config.id2label.values())
    table = rows(tmp_path / "tags.parquet")
    assert {row["path"] for row in table} == {"=cmd.wav", "+broken.wav"}
    assert {row["label"] for row in table} == {*config.id2label.values(), ""}


def test_a_name_that_is_not_utf_8_is_written_and_known_again(model, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.wav")).write_bytes(encoded(noise(1.0)))
    Path(os.fsdecode(os.fsencode(folder) + b"/broken \xe9.wav")).write_bytes(b"no audio")
    for suffix in SUFFIXES:
        output = tmp_path / suffix[1:] / f"tags{suffix}"
        assert tag_files(settings(model, folder, output)).finished == 1
        assert tag_files(settings(model, folder, output)).skipped == 1
        names = [row["path"] for row in (lines(output) if suffix == ".jsonl" else rows(output))]
        of_json = [os.fsdecode(os.fsencode(folder) + name) for name in (b"/broken \xe9.wav", b"/caf\xe9.wav")]
        escaped = [f"{folder}/broken \\udce9.wav", f"{folder}/caf\\udce9.wav"]
        assert list(dict.fromkeys(names)) == (of_json if suffix == ".jsonl" else escaped)


def test_a_phone_recording_that_is_cut_off_is_named(model, recordings, tmp_path):
    folder = tmp_path / "phone"
    folder.mkdir()
    for name in ("call.m4a", "._a.wav", "notes.txt"):
        (folder / name).write_bytes(b"\0\0\0\x1cftypM4A ")
    summary = tag_files(settings(model, folder, tmp_path / "tags.jsonl"))
    assert summary.unusable == {"truncated": 1}
    assert [(Path(line["path"]).name, line["cause"]) for line in lines(tmp_path / "tags.jsonl")] == [("call.m4a", "truncated")]


# --- runs after the first


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_run_that_is_stopped_is_resumed_and_writes_what_one_run_writes(model, recordings, tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(inputs, "PORTION_FILES", 1)
    whole, stopped = tmp_path / f"whole{suffix}", tmp_path / f"stopped{suffix}"
    tag_files(settings(model, recordings, whole))
    computed, compute = [], Scoring.compute

    def interrupted(self, model, inputs):
        computed.append(len(inputs["input_values"]))
        if len(computed) == 3:
            raise KeyboardInterrupt
        return compute(self, model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Scoring, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tag_files(settings(model, recordings, stopped))
    assert not stopped.exists()
    summary = tag_files(settings(model, recordings, stopped))
    assert stopped.read_bytes() == whole.read_bytes()
    assert (summary.skipped, summary.finished) == (2, 1)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_finished_run_does_nothing_more_and_new_recordings_are_added_in_their_order(model, recordings, tmp_path, monkeypatch):
    output = tmp_path / "tags.jsonl"
    for unusable in ("broken.wav", "short.wav"):
        (recordings / unusable).unlink()
    tag_files(settings(model, recordings, output))
    before = output.read_bytes()
    (recordings / "another.wav").write_bytes(encoded(noise(1.0)))
    assert tag_files(settings(model, recordings, output)).finished == 1
    first, another, *others = output.read_bytes().splitlines(keepends=True)
    assert b"another.wav" in another
    assert b"".join([first, *others]) == before
    monkeypatch.setattr(inputs, "read_blocks", None)  # nothing is decoded again
    summary = tag_files(settings(model, recordings, output))
    assert (summary.finished, summary.skipped, summary.unusable) == (0, 4, {})
    (recordings / "another.wav").unlink()
    assert tag_files(settings(model, recordings, output)).skipped == 3
    assert output.read_bytes() == before


CHANGES = [{"threshold": 0.2}, {"top_k": 1}, {"pool": "mean"}, {"per": "window"}, {"threshold": 0.0, "top_k": 2, "per": "window"}, {}]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_threshold_or_format_needs_no_model(model, recordings, tmp_path, monkeypatch, without_model, suffix):
    """And what is written is what a run of its own writes."""
    for unusable in ("broken.wav", "short.wav"):
        (recordings / unusable).unlink()
    fresh = []
    for number, changes in enumerate(CHANGES):
        output = tmp_path / str(number) / f"tags{suffix}"
        tag_files(settings(model, recordings, output, **changes))
        fresh.append(output.read_bytes())
    assert len(set(fresh)) == len(CHANGES) - (suffix != ".jsonl")  # a table has no pooled scores
    tag_files(settings(model, recordings, tmp_path / "tags.jsonl", pool="mean"))
    without_model()
    monkeypatch.setattr(inputs, "read_blocks", None)
    for changes, content in zip(CHANGES, fresh):
        output = tmp_path / f"tags{suffix}"
        assert tag_files(settings(model, recordings, output, per_device_eval_batch_size=1, **changes)).skipped == 3
        assert output.read_bytes() == content


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_output_that_was_changed_is_rejected_and_left_as_it_is(model, recordings, tmp_path, without_model, suffix):
    for unusable in ("broken.wav", "short.wav"):
        (recordings / unusable).unlink()
    output = tmp_path / f"tags{suffix}"
    tag_files(settings(model, recordings, output))
    without_model()
    whole = output.read_bytes()
    parts = whole.splitlines(keepends=True)
    changed = [whole.replace(b"\n", b"\r\n") + b"\r", b"\xef\xbb\xbf" + whole, whole + b"a comment", whole + b"\n", whole[:-10], b""]
    for place in (0, len(parts) // 2, len(parts)):
        changed.append(b"".join([*parts[:place], b"a line\n", *parts[place:]]))
    changed += [b"".join(parts[1:]), b"".join(parts[:-1]), whole[:-10] + b"mine\n"]
    for content in changed:
        output.write_bytes(content)
        with pytest.raises(UserError, match=r"was changed since it was written .* move it away .* or give another output"):
            tag_files(settings(model, recordings, output))
        assert output.read_bytes() == content
    output.unlink()
    assert tag_files(settings(model, recordings, output)).skipped == 3
    assert output.read_bytes() == whole
    output.unlink()
    output.mkdir()
    with pytest.raises(UserError, match="exists, and was not written from"):
        tag_files(settings(model, recordings, output))
    assert output.is_dir()


def test_a_file_that_is_not_ours_is_not_touched(model, recordings, tmp_path):
    output = tmp_path / "tags.jsonl"
    output.write_text("precious\n")
    with pytest.raises(UserError, match=r"tags.jsonl exists, and was not written from .*tags.parts: move it away, or give another output"):
        tag_files(settings(model, recordings, output))
    assert output.read_text() == "precious\n"


@pytest.mark.parametrize(("name", "changes"), [("hop", {"hop": 0.25}), ("window", {"window": 0.32}), ("dtype", {"dtype": "bfloat16"})])
def test_results_of_other_settings_are_rejected(model, recordings, tmp_path, name, changes):
    output = tmp_path / "tags.jsonl"
    tag_files(settings(model, recordings, output))
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=f"tags.parts was made with other settings: .*{name} was .* and is .* now.* Give the same to resume"
    ):
        tag_files(settings(model, recordings, output, **changes))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("what", ["weights", "configuration", "extractor"])
def test_results_of_another_model_are_rejected(model, recordings, tmp_path, what):
    output = tmp_path / "tags.jsonl"
    tag_files(settings(model, recordings, output))
    before = output.read_bytes()
    other = SSLAMForAudioClassification.from_pretrained(model)
    if what == "weights":
        other.classifier.bias.data += 1
    elif what == "configuration":
        other.config.problem_type = "single_label_classification"
    else:
        SSLAMFeatureExtractor(max_length=64, mean=-4.0).save_pretrained(model)
    other.save_pretrained(model)
    with pytest.raises(UserError, match=f"weights, configuration or feature extractor of {model} were others"):
        tag_files(settings(model, recordings, output))
    assert output.read_bytes() == before


def test_a_part_with_a_changed_bit_is_made_again(model, recordings, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(inputs, "PORTION_FILES", 2)
    output = tmp_path / "tags.jsonl"
    tag_files(settings(model, recordings, output))
    whole = output.read_bytes()
    parts = sorted((tmp_path / "tags.parts").glob("*.parquet"))
    assert len(parts) == 3
    before = {part.name: part.read_bytes() for part in parts}
    for part in parts[:2]:
        content = bytearray(part.read_bytes())
        content[len(content) // 3] ^= 16
        part.write_bytes(content)
    summary = tag_files(settings(model, recordings, output))
    assert caplog.text.count("is damaged: its recordings are processed again") == 2
    assert summary.finished + summary.skipped == 3
    assert summary.finished > 0
    assert output.read_bytes() == whole
    rebuilt = {part.name[5:]: part.read_bytes() for part in (tmp_path / "tags.parts").glob("*.parquet")}
    assert rebuilt == {name[5:]: content for name, content in before.items()}


@pytest.mark.parametrize(
    ("name", "away"), [("settings.json", ["tags.parts", "tags.jsonl"]), ("outputs.json", ["tags.parts/outputs.json", "tags.jsonl"])]
)
def test_damaged_files_beside_the_parts_are_an_error_with_a_remedy(model, recordings, tmp_path, name, away):
    output = tmp_path / "tags.jsonl"
    tag_files(settings(model, recordings, output))
    file = tmp_path / "tags.parts" / name
    file.write_bytes(file.read_bytes().replace(b'"', b"'", 1))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{name} is damaged: restore it, or .*move .*away to") as raised:
        tag_files(settings(model, recordings, output))
    assert contents(tmp_path) == before
    assert all(str(tmp_path / named) in str(raised.value) for named in away[:1])
    for named in away:
        (tmp_path / named).rename(tmp_path / f"away-{Path(named).name}")
    tag_files(settings(model, recordings, output))
    assert output.read_bytes() == before["tags.jsonl"]


def test_an_output_that_another_process_writes_is_left_alone(model, recordings, tmp_path):
    output = tmp_path / "tags.jsonl"
    with FileLock(tmp_path / ".tags.parts.lock"), pytest.raises(UserError, match="another process writes to .*tags.parts"):
        tag_files(settings(model, recordings, output))
    assert not output.exists()
    assert not (tmp_path / "tags.parts").exists()


def test_a_recording_is_known_by_its_place_and_not_by_its_name(model, recordings, tmp_path, monkeypatch):
    output = tmp_path / "tags.jsonl"
    for folder in ("one", "two"):
        (tmp_path / folder / "rec").mkdir(parents=True)
        (tmp_path / folder / "rec" / "a.wav").write_bytes((recordings / "a.wav").read_bytes())
        monkeypatch.chdir(tmp_path / folder)
        assert tag_files(settings(model, "rec", output)).finished == 1
    assert tag_files(settings(model, str(tmp_path / "two" / "rec" / "a.wav"), output)).skipped == 1
    (tmp_path / "two" / "rec" / "a.wav").write_bytes(encoded(noise(1.0)))  # another recording in its place
    assert tag_files(settings(model, "rec", output)).finished == 1
    assert [(record["path"], record["duration"]) for record in lines(output)] == [("rec/a.wav", 1)]


def test_a_recording_that_was_missing_is_tried_again(model, recordings, tmp_path):
    listed, output = recordings / "list.txt", tmp_path / "tags.jsonl"
    listed.write_text("later.wav\na.wav\n")
    assert tag_files(settings(model, listed, output)).unusable == {"missing": 1}
    assert [record.get("cause") for record in lines(output)] == ["missing", None]
    (recordings / "later.wav").write_bytes(encoded(noise(1.0)))
    summary = tag_files(settings(model, listed, output))
    assert (summary.finished, summary.skipped) == (1, 1)
    assert [(record.get("cause"), record["duration"]) for record in lines(output)] == [(None, 1), (None, 2)]


def test_a_failure_is_tried_again_and_the_latest_cause_is_written(model, recordings, tmp_path):
    output, broken = tmp_path / "tags.jsonl", recordings / "broken.wav"

    def run() -> tuple[list, int]:
        summary = tag_files(settings(model, broken, output))
        assert sum(summary.unusable.values()) + summary.finished + summary.skipped == 1
        return [record.get("cause") for record in lines(output)], len(list((tmp_path / "tags.parts").glob("*.parquet")))

    assert run() == (["unreadable"], 1)
    assert run() == (["unreadable"], 1)  # known
    broken.write_bytes(b"")
    assert run() == (["empty"], 2)
    broken.write_bytes(encoded(noise(1.0)))
    assert run() == ([None], 3)
    assert run() == ([None], 3)
    broken.unlink()
    listed = tmp_path / "list.txt"
    listed.write_text(str(broken))
    tag_files(settings(model, listed, output))
    assert [record.get("cause") for record in lines(output)] == ["missing"]


@pytest.mark.parametrize("how", ["replaced", "replaced by one of its size and time", "written to", "deleted"])
def test_a_recording_that_changes_while_it_is_read_is_tried_again(model, recordings, tmp_path, monkeypatch, how):
    output, path, read = tmp_path / "tags.jsonl", recordings / "a.wav", inputs.read_blocks
    final = encoded(noise(2.0 if "size" in how else 3.0, seed=1))
    time = os.stat(path).st_mtime_ns

    def meanwhile(source, *args):
        yield from read(source, *args)
        if how == "deleted":
            path.unlink()
        elif how == "written to":
            path.write_bytes(path.read_bytes() + b"more")
        else:
            (tmp_path / "new.wav").write_bytes(final)
            os.utime(tmp_path / "new.wav", ns=(time, time))
            (tmp_path / "new.wav").replace(path)

    with monkeypatch.context() as patch:
        patch.setattr(inputs, "read_blocks", meanwhile)
        assert tag_files(settings(model, [str(path)], output, inputs=[str(path)])).unusable == {"changed": 1}
    [record] = lines(output)
    assert record["error"] == f"{path} was changed while it was read: it is tried again by the next run"
    path.write_bytes(final)
    os.utime(path, ns=(time, time))
    summary = tag_files(settings(model, path, output))
    assert (summary.finished, summary.skipped) == (1, 0)
    [record] = lines(output)
    assert record["duration"] == len(soundfile.read(path)[0]) / RATE
    assert record["tags"][0]["score"] == pytest.approx(expected(model, path).scores.max(), abs=6e-5)
    assert tag_files(settings(model, path, output)).skipped == 1


def test_a_recording_that_is_damaged_far_behind_its_begin_is_never_taken_for_whole(model, recordings, tmp_path):
    samples = noise(3.0)
    samples[-100:] = np.nan
    path, output = recordings / "late.wav", tmp_path / "tags.jsonl"
    path.write_bytes(encoded(samples, subtype="FLOAT"))
    for _ in range(3):
        summary = tag_files(settings(model, path, output))
        assert (summary.unusable, summary.skipped) == ({"not finite": 1}, 0)
        assert [record.get("cause") for record in lines(output)] == ["not finite"]


# --- what is rejected


def test_an_output_that_cannot_be_written_is_rejected(model, recordings, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "tags.parts").write_text("mine")
    for output in (tmp_path / "file" / "tags.jsonl", tmp_path / "tags.jsonl"):
        with pytest.raises(UserError, match=f"{output} cannot be written"):
            tag_files(settings(model, recordings, output))
    assert (tmp_path / "tags.parts").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "tags.txt"}, "ends in .jsonl or .csv or .parquet"),
        ({"top_k": 0}, "top_k is 0"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"hop": 0.0}, "these settings do not fit the model: hop is 0.0 s"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
        ({"ray_workers": 0}, "ray_workers is 0"),
        ({"window": 10.24}, "a window of 10.24 s gives 1024 frames"),
        ({"model": "nowhere/at/all"}, "there is no folder or file nowhere/at/all"),
        ({"device": "abacus"}, "device is 'abacus', which cannot be used"),
    ],
)
def test_settings_that_do_not_fit_are_rejected_before_anything_is_written(model, recordings, tmp_path, changes, message):
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        tag_files(settings(**{"model": model, "recordings": recordings, "output": tmp_path / "tags.jsonl", **changes}))
    assert contents(tmp_path) == before


def test_an_encoder_without_a_classifier_is_rejected(model, recordings, tmp_path):
    SSLAMModel(tiny_config()).save_pretrained(model)
    with pytest.raises(UserError, match="is an encoder without a trained head, but a classifier of clips is needed"):
        tag_files(settings(model, recordings, tmp_path / "tags.jsonl"))


def test_recordings_are_processed_without_what_only_training_and_evaluation_need():
    absent = dict.fromkeys(("datasets", "evaluate", "sklearn", "scipy", "accelerate", "ray", "matplotlib"))
    code = f"import sys; sys.modules.update({absent}); from transformers_sslam.recordings import detect, embed, tag"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the command


def test_the_command_tags_a_folder_and_survives_a_kill(recordings, tmp_path, capsys):
    arguments = ["tag", "--model", str(SMALL_MODEL), "--inputs", str(recordings), "--output", str(tmp_path / "tags.jsonl")]
    arguments += ["--device", "cpu"]
    dies_at_the_second_part = f"""
import os
from transformers_sslam import cli
from transformers_sslam.recordings import inputs, parts
inputs.PORTION_FILES, flush, calls = 1, parts.flush, []
def dying(path):
    calls.append(path)
    if len(calls) == 3:  # the first part was flushed, and its folder; this one is not renamed
        os._exit(9)
    flush(path)
parts.flush = dying
cli.main({arguments})
"""
    (tmp_path / "dies.py").write_text(dies_at_the_second_part)
    assert Fork([tmp_path / "dies.py"], tmp_path / "log").wait() == 9, (tmp_path / "log").read_text()
    assert not (tmp_path / "tags.jsonl").exists()
    assert len(list((tmp_path / "tags.parts").glob("*.parquet"))) == len(list((tmp_path / "tags.parts").glob(".*.unfinished"))) == 1

    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 recordings processed (0.00 h, ")
    assert printed.endswith(" x real time), 1 finished before, 2 not usable (1 too short, 1 unreadable)\n")
    assert len(lines(tmp_path / "tags.jsonl")) == 5
    assert not list(tmp_path.rglob("*.unfinished"))

    assert main([*arguments, "--hop", "2"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sslam tag: error: ")
    assert "tags.parts was made with other settings: hop was 2.56 and is 2.0 now. Give the same to resume, or another output" in said


def test_a_run_that_computes_nothing_says_what_the_output_is_written_from(recordings, tmp_path, capsys):
    for unusable in ("broken.wav", "short.wav"):
        (recordings / unusable).unlink()
    arguments = ["tag", "--model", str(SMALL_MODEL), "--inputs", str(recordings), "--output", str(tmp_path / "tags.csv"), "--device", "cpu"]
    assert main(arguments) == 0
    assert "is written from" not in capsys.readouterr().out
    assert main([*arguments, "--threshold", "0.5"]) == 0
    assert capsys.readouterr().out == (
        "0 recordings processed, 3 finished before, 0 not usable\n"
        f"{tmp_path / 'tags.csv'} is written from the results in {tmp_path / 'tags.parts'}; nothing was computed\n"
    )


def test_a_run_without_a_usable_recording_writes_the_causes_and_fails(tmp_path, capsys):
    (tmp_path / "broken.wav").write_text("no audio")
    arguments = ["tag", "--model", str(SMALL_MODEL), "--inputs", str(tmp_path / "broken.wav"), "--output", str(tmp_path / "tags.jsonl")]
    arguments += ["--device", "cpu"]
    for _ in range(2):
        assert main(arguments) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith("sslam tag: error: no recording can be used: ")
        assert [line["cause"] for line in lines(tmp_path / "tags.jsonl")] == ["unreadable"]
    (tmp_path / "broken.wav").write_bytes(encoded(noise(2.0)))
    assert main(arguments) == 0


def test_a_detector_of_events_gives_the_labels_of_whole_windows(recordings, tmp_path):
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    detector = SSLAMForAudioFrameClassification(tiny_config(**names, initializer_range=0.3)).eval()
    detector.save_pretrained(tmp_path / "detector")
    extractor = SSLAMFeatureExtractor(max_length=64)
    extractor.save_pretrained(tmp_path / "detector")
    tag_files(settings(tmp_path / "detector", recordings, tmp_path / "tags.jsonl", per="window", top_k=3, threshold=0.0, hop=0.48))
    found = {Path(line["path"]).name: line for line in lines(tmp_path / "tags.jsonl")}
    for name, waveform in (("a.wav", noise(2.0)), ("c.ogg", load_waveform(recordings / "deep" / "c.ogg"))):
        for window in found[name]["windows"]:
            start = round(window["start"] * RATE)
            clip = waveform[start : start + 63 * 160 + 400]
            with torch.inference_mode():
                inputs = extractor(clip, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
                expected = detector(**inputs).clip_logits[0].sigmoid()
            scores = {tag["label"]: tag["score"] for tag in window["tags"]}
            assert [scores[label] for label in CLASSES] == pytest.approx(expected.tolist(), abs=2e-3 if name == "a.wav" else 1e-4)
    assert found["c.ogg"]["windows"][0]["end"] == pytest.approx(0.4)  # shorter than a window: its padding is masked


def test_recordings_of_earlier_runs_that_an_output_no_longer_holds_are_counted(model, recordings, tmp_path, capsys):
    """The inputs decide what an output holds: a second run with others must not lose the first ones' rows without a word."""
    words = ["tag", "--model", str(model), "--output", str(tmp_path / "tags.jsonl"), "--device", "cpu", "--inputs"]
    a, b = (str(recordings / name) for name in ("a.wav", "b.flac"))
    for given, held, left_out in (([a], [a], 0), ([b], [b], 1), ([a, b], [a, b], 0)):
        assert main([*words, *given]) == 0
        printed = capsys.readouterr().out
        assert [line["path"] for line in lines(tmp_path / "tags.jsonl")] == held
        assert (f"{left_out} recordings of earlier runs are not among these inputs" in printed) == bool(left_out)
        assert ("are not among these inputs" in printed) == bool(left_out)
    assert "nothing was computed" in printed
