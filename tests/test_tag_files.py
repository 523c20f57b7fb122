"""A folder of recordings tagged: resumed where it was stopped, rejected where the result would not be the same."""

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

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
from transformers_sslam.audio.decode import load_waveform  # noqa: E402
from transformers_sslam.cli import main  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.recordings import tag as module  # noqa: E402
from transformers_sslam.recordings.tag import TagSettings, find_recordings, tag_files  # noqa: E402


ROOT = Path(__file__).parents[1]
SMALL_MODEL = ROOT / "model_cards" / "sslam-tiny-esc10"
RATE = 16_000


def encoded(samples: np.ndarray, rate: int = RATE, kind: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


@pytest.fixture
def model(tmp_path) -> Path:
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(["dog, big", "rain", "sea"])), "label2id": {"dog, big": 0, "rain": 1, "sea": 2}}
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


def settings(model, recordings, output, **changes) -> TagSettings:
    return TagSettings(**{"model": str(model), "inputs": str(recordings), "output": str(output), "hop": 0.5, "device": "cpu", **changes})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def identity_of(journal: bytes) -> dict:
    return {name: value for name, value in json.loads(journal.splitlines()[0]).items() if name != "sha256"}


def expected(model: Path, path: Path):
    classifier, extractor = SSLAMForAudioClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    return classifier.score_over_time(load_waveform(path), extractor, hop=0.5)


def test_each_recording_has_a_line_with_the_likeliest_labels_or_its_error(model, recordings, tmp_path):
    output = tmp_path / "new" / "tags.jsonl"
    summary = tag_files(settings(model, recordings, output, top_k=2, write_windows=True))
    a, b, broken, c, short = lines(output)
    assert [record["path"] for record in (a, b, broken, c, short)] == [
        str(recordings / name) for name in ("a.wav", "b.flac", "broken.wav", "deep/c.ogg", "short.wav")
    ]
    scored = expected(model, recordings / "a.wav")
    highest = scored.scores.max(0)
    order = highest.argsort()[::-1][:2]
    assert [tag["label"] for tag in a["tags"]] == [["dog, big", "rain", "sea"][i] for i in order]
    assert [tag["score"] for tag in a["tags"]] == pytest.approx(highest[order].tolist(), abs=5e-5)
    assert [(window["start"], window["end"]) for window in a["windows"]] == [(0, 0.655), (0.5, 1.155), (1, 1.655), (1.345, 2)]
    assert a["windows"][2]["tags"][0]["score"] == pytest.approx(scored.scores[2].max(), abs=5e-5)
    assert (a["duration"], b["duration"], c["duration"]) == (2, 1.5, 0.4)
    assert [(w["start"], w["end"]) for w in c["windows"]] == [(0, 0.4)]
    assert (broken["cause"], short["cause"]) == ("unreadable", "rejected")
    assert "320 samples" in short["error"]
    assert (summary.tagged, summary.skipped, summary.unusable) == (3, 0, {"unreadable": 1, "rejected": 1})
    assert summary.audio_seconds == pytest.approx(3.9)


def test_the_mean_over_windows_and_a_threshold_can_be_asked_for(model, recordings, tmp_path):
    tag_files(settings(model, recordings / "a.wav", tmp_path / "tags.jsonl", pool="mean", threshold=0.3))
    mean = expected(model, recordings / "a.wav").scores.mean(0)
    tags = lines(tmp_path / "tags.jsonl")[0]["tags"]
    assert [tag["score"] for tag in tags] == pytest.approx(
        sorted((score for score in mean.tolist() if score >= 0.3), reverse=True), abs=5e-5
    )
    assert 0 < len(tags) < 3


def test_a_csv_has_a_row_for_each_window_and_label(model, recordings, tmp_path):
    tag_files(settings(model, recordings, tmp_path / "tags.csv", top_k=2))
    rows = list(csv.DictReader((tmp_path / "tags.csv").open()))
    assert [len([row for row in rows if row["path"].endswith(name)]) for name in ("a.wav", "broken.wav", "c.ogg")] == [4 * 2, 1, 2]
    scored = expected(model, recordings / "a.wav")
    assert (rows[2]["start"], rows[2]["end"]) == ("0.5", "1.155")
    assert float(rows[2]["score"]) == pytest.approx(scored.scores[1].max(), abs=5e-5)
    assert rows[2]["label"] == scored.classes[scored.scores[1].argmax()]
    [error] = [row["error"] for row in rows if row["path"].endswith("broken.wav")]
    assert "cannot be read as audio" in error


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_run_that_is_stopped_is_resumed_and_writes_what_one_run_writes(model, recordings, tmp_path, monkeypatch, suffix):
    whole, stopped = tmp_path / f"whole{suffix}", tmp_path / f"stopped{suffix}"
    tag_files(settings(model, recordings, whole))
    scored, score = [], SSLAMForAudioClassification.score_over_time

    def interrupted(self, blocks, *args, **options):
        scored.append(1)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return score(self, blocks, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(SSLAMForAudioClassification, "score_over_time", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tag_files(settings(model, recordings, stopped))
    with Path(f"{stopped}.journal").open("a") as file:
        file.write('{"at": "')  # as of a process that was killed while it wrote
    summary = tag_files(settings(model, recordings, stopped, per_device_eval_batch_size=1))
    assert stopped.read_bytes() == whole.read_bytes()
    assert Path(f"{stopped}.journal").read_bytes() == Path(f"{whole}.journal").read_bytes()
    assert (summary.skipped, summary.tagged) == (2, 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_killed_behind_any_byte_a_run_is_completed(model, recordings, tmp_path, monkeypatch, suffix):
    """All writes are recorded, in their order, and repeated up to each byte: what kill -9 leaves."""
    output, operations = tmp_path / f"tags{suffix}", []
    append, truncate, read = module.JournaledOutput._append, io.BufferedWriter.truncate, Path.open

    class Recorded(io.BufferedWriter):
        def truncate(self, size=None):
            operations.append((self.raw.name, size))
            return truncate(self, size)

    def recorded(file, content):
        operations.extend((file.raw.name, bytes([byte])) for byte in content)
        append(file, content)

    monkeypatch.setattr(Path, "open", lambda self, mode="r", **rest: Recorded(io.FileIO(str(self), mode)) if mode == "ab" else read(self))
    monkeypatch.setattr(module.JournaledOutput, "_append", staticmethod(recorded))
    tag_files(settings(model, recordings, output))
    monkeypatch.undo()
    journal = Path(f"{output}.journal")
    whole, whole_journal = output.read_bytes(), journal.read_bytes()
    identity = identity_of(whole_journal)

    state, counts = {str(output): b"", str(journal): b""}, set()
    for number, (name, operation) in enumerate(operations):
        state[name] = state[name][:operation] if isinstance(operation, int) else state[name] + operation
        for path, content in state.items():
            Path(path).write_bytes(content)
        with module.JournaledOutput(output, identity) as reopened:
            counts.add(len(reopened._finished))
        assert whole.startswith(output.read_bytes())
        assert len(output.read_bytes()) >= len(state[str(output)])
        if number % (len(operations) // 12) == 0:
            tag_files(settings(model, recordings, output))
            assert (output.read_bytes(), journal.read_bytes()) == (whole, whole_journal)
    assert counts == {0, 1, 2, 3}
    assert state == {str(output): whole, str(journal): whole_journal}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_an_output_that_was_changed_by_hand_is_rejected_and_left_as_it_is(model, recordings, tmp_path, suffix):
    output = tmp_path / f"tags{suffix}"
    tag_files(settings(model, recordings, output))
    whole = output.read_bytes()
    parts = whole.splitlines(keepends=True)
    changed = [whole.replace(b"\n", b"\r\n"), whole.replace(b"\n", b"\r"), b"\xef\xbb\xbf" + whole, whole + b"a comment", whole + b"\n"]
    for place in range(len(parts) + 1):
        changed.append(b"".join([*parts[:place], b"a line\n", *parts[place:]]))
        if place < len(parts) - 1:
            changed.append(b"".join(parts[:place] + parts[place + 1 :]))
    changed.append(b"".join(parts[:-1]) + b"mine\n")  # shorter than what stood there
    changed.append(whole[:-10] + b"mine\n")
    for content in changed:
        output.write_bytes(content)
        with pytest.raises(UserError, match=r"was changed since it was written .* behind byte \d+ .* Restore it, or give another output"):
            tag_files(settings(model, recordings, output))
        assert output.read_bytes() == content
    for missing in range(1, len(parts) + 1):  # lines at the end are missing: their text is in the journal
        output.write_bytes(b"".join(parts[:-missing]))
        assert tag_files(settings(model, recordings, output)).skipped == 3
        assert output.read_bytes() == whole


def test_a_damaged_journal_is_one_clear_error_or_changes_nothing(model, recordings, tmp_path):
    output, journal = tmp_path / "tags.jsonl", tmp_path / "tags.jsonl.journal"
    tag_files(settings(model, recordings, output))
    content, whole = output.read_bytes(), journal.read_bytes()
    identity = identity_of(whole)
    entry = json.loads(whole.splitlines()[1])
    with module.JournaledOutput(output, identity) as reopened:
        finished = reopened._finished
    wrong = [[], None, 1, {}, *({**entry, name: value} for name in entry for value in (None, [], {}, True, "x", 1.5, -1, 10**30))]
    damaged = [whole[:length] for length in range(0, len(whole), 3)]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 2)]
    damaged += [whole.replace(whole.splitlines()[1], json.dumps(other).encode()) for other in wrong] + [b"[" * 100_000 + b"\n"]
    rejected = 0
    for journaled in damaged:
        journal.write_bytes(journaled)
        output.write_bytes(content)
        try:
            with module.JournaledOutput(output, identity) as reopened:
                assert reopened._finished == finished  # a torn line at its end
        except UserError:
            rejected += 1
        assert output.read_bytes() == content
    assert rejected > 0.8 * len(damaged)


@pytest.mark.parametrize("how", ["replaced", "replaced by one of its size and time", "written to", "deleted"])
def test_a_recording_that_changes_while_it_is_tagged_is_tagged_again(model, recordings, tmp_path, monkeypatch, how):
    output, path, score = tmp_path / "tags.jsonl", recordings / "a.wav", SSLAMForAudioClassification.score_over_time
    final = encoded(noise(2.0 if "size" in how else 3.0, seed=1))

    def meanwhile(self, blocks, *args, **options):
        scores = score(self, blocks, *args, **options)
        time = os.stat(path).st_mtime_ns
        if how == "deleted":
            path.unlink()
        elif how == "written to":
            path.write_bytes(path.read_bytes() + b"more")
        else:
            (tmp_path / "new.wav").write_bytes(final)
            os.utime(tmp_path / "new.wav", ns=(time, time))
            (tmp_path / "new.wav").replace(path)
        return scores

    with monkeypatch.context() as patch:
        patch.setattr(SSLAMForAudioClassification, "score_over_time", meanwhile)
        tag_files(settings(model, path, output))
    path.write_bytes(final)
    if "size" in how:
        os.utime(path, ns=(1, 1))
        os.utime(path, ns=(json.loads(Path(f"{output}.journal").read_text().splitlines()[1])["modified"],) * 2)
    summary = tag_files(settings(model, path, output))
    assert (summary.tagged, summary.skipped) == (1, 0)
    assert lines(output)[-1]["duration"] == len(soundfile.read(path)[0]) / RATE
    best = expected(model, path).scores.max()
    assert lines(output)[-1]["tags"][0]["score"] == pytest.approx(best, abs=5e-5)
    assert tag_files(settings(model, path, output)).skipped == 1


def test_a_finished_run_does_nothing_more_and_new_recordings_are_added(model, recordings, tmp_path, monkeypatch):
    output = tmp_path / "tags.jsonl"
    for unusable in ("broken.wav", "short.wav"):
        (recordings / unusable).unlink()
    tag_files(settings(model, recordings, output))
    before = output.read_bytes()
    (recordings / "another.wav").write_bytes(encoded(noise(1.0)))
    assert tag_files(settings(model, recordings, output)).tagged == 1
    assert output.read_bytes().startswith(before)
    monkeypatch.setattr(module, "read_blocks", None)  # nothing is decoded again
    summary = tag_files(settings(model, recordings, output))
    assert (summary.tagged, summary.skipped, summary.unusable) == (0, 4, {})


def test_records_that_were_lost_are_written_again(model, recordings, tmp_path):
    output = tmp_path / "tags.jsonl"
    tag_files(settings(model, recordings, output))
    before = output.read_bytes()
    output.write_bytes(before[:-10])
    assert tag_files(settings(model, recordings, output)).skipped == 3  # of five two are not usable, and tried again
    assert output.read_bytes() == before


def test_an_output_of_other_settings_or_another_model_is_rejected(model, recordings, tmp_path):
    output = tmp_path / "tags.jsonl"
    tag_files(settings(model, recordings, output))
    before = output.read_bytes()
    with pytest.raises(UserError, match="was written with hop=0.5, but hop is 0.25 now"):
        tag_files(settings(model, recordings, output, hop=0.25))
    other = SSLAMForAudioClassification.from_pretrained(model)
    other.classifier.bias.data += 1
    other.save_pretrained(model)
    with pytest.raises(UserError, match="was written with model='sha256:"):
        tag_files(settings(model, recordings, output))
    assert output.read_bytes() == before


def test_an_output_that_another_process_writes_is_left_alone(model, recordings, tmp_path):
    output = tmp_path / "tags.jsonl"
    with FileLock(tmp_path / ".tags.jsonl.lock"), pytest.raises(UserError, match="another process writes to .*tags.jsonl"):
        tag_files(settings(model, recordings, output))
    assert not output.exists()


def test_a_file_that_is_not_ours_is_not_touched(model, recordings, tmp_path):
    (tmp_path / "tags.jsonl").write_text("precious\n")
    with pytest.raises(UserError, match="exists without its journal tags.jsonl.journal"):
        tag_files(settings(model, recordings, tmp_path / "tags.jsonl"))
    assert (tmp_path / "tags.jsonl").read_text() == "precious\n"


def test_folders_files_and_lists_are_searched_each_recording_once(recordings, tmp_path):
    (recordings / "list.txt").write_text("short.wav\n\ndeep/c.ogg\ns3://bucket/far.wav\n")
    found = find_recordings([str(recordings / "deep"), str(recordings / "list.txt"), str(recordings / "a.wav")])
    assert found == [str(recordings / "deep/c.ogg"), str(recordings / "short.wav"), "s3://bucket/far.wav", str(recordings / "a.wav")]


def test_a_recording_is_known_by_its_place_and_not_by_its_name(model, recordings, tmp_path, monkeypatch):
    output = tmp_path / "tags.jsonl"
    for folder in ("one", "two"):
        (tmp_path / folder / "rec").mkdir(parents=True)
        (tmp_path / folder / "rec" / "a.wav").write_bytes((recordings / "a.wav").read_bytes())
        monkeypatch.chdir(tmp_path / folder)
        assert tag_files(settings(model, "rec", output)).tagged == 1
    assert tag_files(settings(model, str(tmp_path / "two" / "rec" / "a.wav"), output)).skipped == 1
    (tmp_path / "two" / "rec" / "a.wav").write_bytes(encoded(noise(1.0)))  # another recording in its place
    assert tag_files(settings(model, "rec", output)).tagged == 1


def test_a_list_may_come_from_windows_and_names_a_file_once(recordings):
    (recordings / "list.txt").write_bytes("\ufeffa.wav\r\ndeep/c.ogg \r\ndeep/../a.wav\r\n".encode())
    assert find_recordings([str(recordings / "list.txt"), str(recordings / "a.wav")]) == [
        str(recordings / "a.wav"),
        str(recordings / "deep/c.ogg"),
    ]


def test_a_phone_recording_that_is_cut_off_is_named(model, recordings, tmp_path):
    folder = tmp_path / "phone"
    folder.mkdir()
    for name in ("call.m4a", "._a.wav", "notes.txt"):
        (folder / name).write_bytes(b"\0\0\0\x1cftypM4A ")
    summary = tag_files(settings(model, folder, tmp_path / "tags.jsonl"))
    assert summary.unusable == {"truncated": 1}
    assert [(Path(line["path"]).name, line["cause"]) for line in lines(tmp_path / "tags.jsonl")] == [("call.m4a", "truncated")]


def test_a_csv_has_a_row_for_a_recording_without_labels(model, recordings, tmp_path):
    folder, output = recordings / "deep", tmp_path / "tags.csv"
    (folder / "later.wav").write_bytes(b"")
    tag_files(settings(model, folder, output, threshold=1.0))
    (folder / "later.wav").write_bytes(encoded(noise(1.0)))
    tag_files(settings(model, folder, output, threshold=1.0))
    rows = [row for row in csv.DictReader(output.open()) if row["path"].endswith("later.wav")]
    assert [(row["start"], row["end"], row["label"]) for row in rows] == [("", "", ""), ("0.0", "1.0", "")]
    assert [bool(row["error"]) for row in rows] == [True, False]


def test_recordings_behind_links_are_found(recordings, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "elsewhere").symlink_to(recordings / "deep")
    assert find_recordings(str(tmp_path / "linked")) == [str(tmp_path / "linked" / "elsewhere" / "c.ogg")]


def test_a_name_that_is_not_utf_8_is_written_and_known_again(model, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.wav")).write_bytes(encoded(noise(1.0)))
    for output in ("tags.jsonl", "tags.csv"):
        assert tag_files(settings(model, folder, tmp_path / output)).tagged == 1
        assert tag_files(settings(model, folder, tmp_path / output)).skipped == 1
        assert "caf\\udce9.wav" in (tmp_path / output).read_text()


def test_a_recording_that_was_missing_is_tried_again(model, recordings, tmp_path):
    listed, output = recordings / "list.txt", tmp_path / "tags.jsonl"
    listed.write_text("a.wav\nlater.wav\n")
    assert tag_files(settings(model, listed, output)).unusable == {"missing": 1}
    (recordings / "later.wav").write_bytes(encoded(noise(1.0)))
    summary = tag_files(settings(model, listed, output))
    assert (summary.tagged, summary.skipped) == (1, 1)
    assert [record.get("cause") for record in lines(output)] == [None, "missing", None]


def test_a_failure_is_tried_again_and_written_again_only_if_it_is_another(model, recordings, tmp_path):
    output, broken = tmp_path / "tags.jsonl", recordings / "broken.wav"
    tag_files(settings(model, broken, output))
    assert tag_files(settings(model, broken, output)).unusable == {"unreadable": 1}
    assert [record["cause"] for record in lines(output)] == ["unreadable"]
    broken.write_bytes(b"")
    assert tag_files(settings(model, broken, output)).unusable == {"empty": 1}
    broken.write_bytes(encoded(noise(1.0)))
    assert tag_files(settings(model, broken, output)).tagged == 1
    assert tag_files(settings(model, broken, output)).skipped == 1
    assert [record.get("cause") for record in lines(output)] == ["unreadable", "empty", None]


def test_an_output_that_cannot_be_written_is_rejected(model, recordings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        tag_files(settings(model, recordings, tmp_path / "file" / "tags.jsonl"))
    for content in ("no journal\n", "[1]\n", '{}\n{"path": "x"}\n'):
        (tmp_path / "tags.jsonl.journal").write_text(content)
        with pytest.raises(UserError, match="or its journal tags.jsonl.journal be read"):
            tag_files(settings(model, recordings, tmp_path / "tags.jsonl"))


def test_inputs_that_hold_nothing_are_rejected(recordings, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    for name, message in [
        ("empty", "holds no recording"),
        ("nowhere", "not a folder, audio file or list"),
        ("binary.bin", "not a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            find_recordings(str(tmp_path / name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "tags.txt"}, "ends in .jsonl or .csv"),
        ({"output": "tags.csv", "write_windows": True}, "a .csv always has every window"),
        ({"top_k": 0}, "top_k is 0"),
        ({"threshold": 1.5}, "threshold 1.5"),
        ({"hop": 0.0}, "these settings do not fit the model: hop is 0.0 s"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
        ({"window": 10.24}, "a window of 10.24 s gives 1024 frames"),
        ({"model": "nowhere/at/all"}, "model nowhere/at/all cannot be read"),
        ({"device": "abacus"}, "device is 'abacus', which cannot be used"),
    ],
)
def test_settings_that_do_not_fit_are_rejected_before_anything_is_written(model, recordings, tmp_path, changes, message):
    output = changes.get("output", tmp_path / "tags.jsonl")
    with pytest.raises(UserError, match=message):
        tag_files(settings(**{"model": model, "recordings": recordings, **changes, "output": output}))
    assert not Path(output).exists()


def test_tagging_needs_nothing_that_only_training_and_evaluation_do():
    absent = dict.fromkeys(("datasets", "evaluate", "sklearn", "scipy", "accelerate"))
    code = f"import sys; sys.modules.update({absent}); import transformers_sslam.recordings.tag"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_encoder_without_a_classifier_is_rejected(model, recordings, tmp_path):
    SSLAMModel(tiny_config()).save_pretrained(model)
    with pytest.raises(UserError, match="has no trained classifier"):
        tag_files(settings(model, recordings, tmp_path / "tags.jsonl"))


def test_the_command_tags_a_folder_and_survives_a_kill(recordings, tmp_path, capsys):
    arguments = ["tag", "--model", str(SMALL_MODEL), "--inputs", str(recordings), "--output", str(tmp_path / "tags.jsonl")]
    arguments += ["--device", "cpu"]
    dies_at_the_second_recording = f"""
import os
from transformers_sslam import cli
from transformers_sslam.recordings import tag
append = tag.JournaledOutput._append
def dying(file, content):
    if b"b.flac" in content and file.name.endswith(".jsonl"):
        append(file, content[:20])
        os._exit(9)
    append(file, content)
tag.JournaledOutput._append = staticmethod(dying)
cli.main({arguments})
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    killed = subprocess.run([sys.executable, "-c", dies_at_the_second_recording], env=environment, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    assert len((tmp_path / "tags.jsonl").read_text().splitlines()[1]) == 20

    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("1 recordings tagged (0.00 h, ")  # what was half written is completed from the journal
    assert printed.endswith(" x real time), 2 finished before, 2 not usable (1 rejected, 1 unreadable)\n")
    assert len(lines(tmp_path / "tags.jsonl")) == 5

    assert main([*arguments, "--hop", "2"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sslam tag: error: ")
    assert "tags.jsonl was written with hop=None, but hop is 2.0 now" in said


def test_a_csv_has_no_cell_that_a_spreadsheet_would_compute(model, recordings, tmp_path, monkeypatch):
    config = SSLAMForAudioClassification.from_pretrained(model).config
    config.id2label = {0: '=HYPERLINK("http://example.org")', 1: "@SUM(1)", 2: "-1+2"}
    SSLAMForAudioClassification(config).save_pretrained(model)
    (tmp_path / "formulas").mkdir()
    monkeypatch.chdir(tmp_path / "formulas")
    Path("=cmd.wav").write_bytes(encoded(noise(1.0)))
    Path("+broken.wav").write_bytes(b"no audio")
    for output in ("tags.csv", "tags.jsonl"):
        tag_files(settings(model, ["=cmd.wav", "+broken.wav"], tmp_path / output, inputs=["=cmd.wav", "+broken.wav"], top_k=3))
    cells = [cell for row in list(csv.reader((tmp_path / "tags.csv").open()))[1:] for cell in row]
    assert {cell for cell in cells if cell.startswith("'")} >= {
        "'=cmd.wav",
        "'+broken.wav",
        '\'=HYPERLINK("http://example.org")',
        "'@SUM(1)",
        "'-1+2",
    }
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    cmd, broken = lines(tmp_path / "tags.jsonl")  # JSON is not computed, and has names as they are
    assert (cmd["path"], broken["path"]) == ("=cmd.wav", "+broken.wav")
    assert {tag["label"] for tag in cmd["tags"]} == set(config.id2label.values())
