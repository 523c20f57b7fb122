"""Recordings in bulk: found, put into batches together, shared out among processes, and resumed wherever a run was killed."""

import contextlib
import io
import json
import os
import pickle
import sys
import tempfile
import threading
import time
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, tiny_config
from processes import Fork

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
import pyarrow.parquet as pq  # noqa: E402

from transformers_sslam.audio import ahead  # noqa: E402
from transformers_sslam.audio.decode import load_waveform  # noqa: E402
from transformers_sslam.batching_sslam import compute_batches  # noqa: E402
from transformers_sslam.cli import main  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.evaluation.loading import load_model  # noqa: E402
from transformers_sslam.files import lock  # noqa: E402
from transformers_sslam.recordings import inputs  # noqa: E402
from transformers_sslam.recordings.embed import EmbedSettings, embed_files  # noqa: E402
from transformers_sslam.recordings.inputs import Recording, current_state, cut_into_portions, find_recordings, lists_among  # noqa: E402
from transformers_sslam.recordings.processing import Summary, compute_here  # noqa: E402
from transformers_sslam.recordings.ray_engine import _Compute, _Prepare  # noqa: E402
from transformers_sslam.recordings.tag import TagSettings, tag_files  # noqa: E402
from transformers_sslam.tasks_sslam import Scoring  # noqa: E402


RATE = 16_000


@pytest.fixture
def model(tmp_path) -> Path:
    config = tiny_config(num_labels=3, initializer_range=0.3, classifier_pooling="mean", problem_type="multi_label_classification")
    SSLAMForAudioClassification(config).save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def recordings(tmp_path) -> Path:
    """Two usable recordings, between them one that is not: of 3, 0 and 4 windows."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    soundfile.write(folder / "a.wav", noise(1.0), RATE)
    (folder / "b.wav").write_bytes(b"no audio")
    soundfile.write(folder / "c.wav", noise(1.3, seed=1), RATE)
    return folder


@pytest.fixture
def windows(monkeypatch) -> list[int]:
    """How many windows each forward pass had."""
    counts, compute = [], Scoring.compute

    def counted(self, model, inputs):
        counts.append(len(inputs["input_values"]))
        return compute(self, model, inputs)

    monkeypatch.setattr(Scoring, "compute", counted)
    return counts


def settings(model: Path, recordings: Path, output: Path, **changes) -> TagSettings:
    options = {"per": "window", "threshold": 0.0, "device": "cpu", **changes}
    return TagSettings(model=str(model), inputs=str(recordings), output=str(output), **options)


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.unfinished")]


# --- which recordings


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def test_folders_files_and_lists_are_searched_each_recording_once(tmp_path):
    write(tmp_path, "a.wav", "deep/c.ogg", "deep/B.WAV", "deep/._b.wav", "deep/notes.txt", "short.wav")
    (tmp_path / "list.txt").write_text("short.wav\n\ndeep/c.ogg\ns3://bucket/far.wav\n")
    found = find_recordings([tmp_path / "deep", str(tmp_path / "list.txt"), str(tmp_path / "a.wav")])
    assert found == [
        *(str(tmp_path / name) for name in ("deep/B.WAV", "deep/c.ogg", "short.wav")),
        "s3://bucket/far.wav",
        str(tmp_path / "a.wav"),
    ]


def test_a_list_may_come_from_windows_and_names_a_file_once(tmp_path):
    write(tmp_path, "a.wav", "deep/c.ogg", " b.wav ")
    (tmp_path / "list.txt").write_bytes("\ufeffa.wav\r\ndeep/c.ogg \r\ndeep/../a.wav\r\n b.wav \r\n".encode())
    found = find_recordings([str(tmp_path / "list.txt"), str(tmp_path / "a.wav")])
    assert found == [str(tmp_path / name) for name in ("a.wav", "deep/c.ogg", " b.wav ")]


def test_a_list_may_hold_any_name_that_a_file_may_have(tmp_path):
    write(tmp_path, "two\u2028lines.wav", "form\ffeed.wav", "caf\udce9.wav")
    names = ["two\u2028lines.wav", "form\ffeed.wav", "caf\udce9.wav", "x" * 300 + ".wav"]
    (tmp_path / "list.txt").write_bytes("\n".join(names).encode(errors="surrogateescape"))
    assert find_recordings(str(tmp_path / "list.txt")) == [str(tmp_path / name) for name in names]


def test_a_list_of_another_program_names_files_from_the_working_folder(tmp_path, monkeypatch):
    """As the shell gives it: `--inputs <(find . -name '*.wav')`."""
    write(tmp_path, "a.wav", "deep/b.wav")
    monkeypatch.chdir(tmp_path)
    reading, writing = os.pipe()
    os.write(writing, b"./deep/b.wav\na.wav\n")
    os.close(writing)
    assert find_recordings(f"/dev/fd/{reading}") == ["deep/b.wav", "a.wav"]
    os.close(reading)


def test_a_url_is_a_recording(tmp_path):
    assert find_recordings("http://host/a.wav?x=1") == ["http://host/a.wav?x=1"]
    assert find_recordings(["s3://bucket/far"]) == ["s3://bucket/far"]


def test_what_a_list_names_in_vain_is_counted_by_cause(model, recordings, tmp_path):
    soundfile.write(recordings / "loud.wav", 1e4 * noise(1.0), RATE, subtype="FLOAT")
    (tmp_path / "list.txt").write_text(
        f"recordings/a.wav\n{'x' * 300}.wav\nfoo://bar/x.wav\nrecordings\nrecordings/loud.wav\nlist.txt\nfile://{recordings}\n"
    )
    summary = tag_files(settings(model, tmp_path / "list.txt", tmp_path / "tags.jsonl"))
    assert (summary.finished, summary.unusable) == (1, {"unreadable": 4, "rejected": 1, "out of scale": 1})


def test_a_file_system_that_is_not_installed_is_an_error(model, tmp_path, monkeypatch):
    def open_url(*_):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.open", open_url)
    (tmp_path / "list.txt").write_text("s3://bucket/a.wav\n")
    with pytest.raises(UserError, match="s3://bucket/a.wav cannot be opened: Install s3fs"):
        tag_files(settings(model, tmp_path / "list.txt", tmp_path / "tags.jsonl"))


def test_a_network_that_fails_ends_the_run_in_one_line_and_what_is_finished_is_kept(model, recordings, tmp_path, monkeypatch, capsys):
    def open_url(*_):
        raise FileNotFoundError("http://host/b.wav") from ConnectionError("no route to host")

    monkeypatch.setattr("fsspec.open", open_url)
    monkeypatch.setattr(inputs, "PORTION_FILES", 1)
    (tmp_path / "list.txt").write_text("recordings/a.wav\nrecordings/c.wav\nmodel/d.wav\nhttp://host/b.wav\n")
    soundfile.write(model / "d.wav", noise(0.5), RATE)
    output = tmp_path / "tags.jsonl"
    arguments = ["tag", "--model", str(model), "--inputs", str(tmp_path / "list.txt"), "--output", str(output), "--device", "cpu"]
    assert main(arguments) == 1
    message = "http://host/b.wav cannot be read (no route to host): check the address, the network and the login, then try again"
    assert capsys.readouterr().err.splitlines()[-1] == f"sslam tag: error: {message}"
    assert not output.exists()
    monkeypatch.setattr("fsspec.open", lambda *_: (recordings / "c.wav").open("rb"))
    summary = tag_files(settings(model, tmp_path / "list.txt", output))
    assert (summary.finished, summary.skipped) == (2, 2)  # those of the last two portions are processed again


def test_the_name_of_a_list_is_printed_as_utf_8_and_that_of_an_output_is_utf_8(model, recordings, tmp_path, monkeypatch):
    listed = Path(f"{tmp_path}/caf\udce9.txt")
    listed.write_text(str(recordings / "a.wav"))
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8", "strict", write_through=True)
    monkeypatch.setattr(sys, "stdout", printed)
    arguments = ["tag", "--model", str(model), "--device", "cpu", "--inputs", str(listed), "--output", str(tmp_path / "a.csv")]
    assert main(arguments) == 0
    first, *_ = printed.buffer.getvalue().decode().splitlines()
    assert first == f"{tmp_path}/caf\\xe9.txt is read as a list: each line is the path of a recording"
    with pytest.raises(UserError, match=r"output is caf\\xe9/tags.csv, but a name in UTF-8 is expected: give another place"):
        settings(model, recordings, "caf\udce9/tags.csv")


def test_recordings_behind_links_are_found(tmp_path):
    write(tmp_path, "deep/c.ogg")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "elsewhere").symlink_to(tmp_path / "deep")
    assert find_recordings(str(tmp_path / "linked")) == [str(tmp_path / "linked" / "elsewhere" / "c.ogg")]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_other_names_of_a_file_are_left_out_and_counted(tmp_path, caplog, link):
    write(tmp_path, "a/x.wav", "c/z.wav")
    (tmp_path / "b").mkdir()
    link(tmp_path / "a" / "x.wav", tmp_path / "b" / "y.wav")
    assert find_recordings([str(tmp_path), str(tmp_path / "c" / ".." / "a" / "x.wav")]) == [
        str(tmp_path / "a/x.wav"),
        str(tmp_path / "c/z.wav"),
    ]
    assert caplog.messages == [f"1 files among the inputs are other names (links) and left out: {tmp_path}/b/y.wav is {tmp_path}/a/x.wav"]


def test_files_of_a_folder_that_are_not_read_are_counted_by_suffix(tmp_path, caplog):
    write(tmp_path, "a.wav", "b.mkv", "c.MOV", "d.avi", "deep/e.AVI", "f.zip", "g", "tags.csv", "README", "cover.jpg", ".cache/x.voc", ".y")
    assert [Path(found).name for found in find_recordings(str(tmp_path))] == ["a.wav", "b.mkv", "c.MOV"]
    message = "not read, as their suffix is not one of audio (2 .avi, 1 .zip, 1 without a suffix), such as d.avi: rename or convert"
    assert f"4 files below {tmp_path} are {message}" in caplog.text
    caplog.clear()
    find_recordings(str(tmp_path), warn=False)
    assert not caplog.messages


@pytest.mark.parametrize("name", ["film.mov", "film.mkv", "sound.dat", "sound"])
def test_a_file_given_by_name_is_a_recording_unless_it_is_text(model, tmp_path, name):
    import av

    sound = av.AudioFrame.from_ndarray(noise(1.0, seed=3)[None], format="fltp", layout="mono")
    sound.sample_rate = RATE
    with av.open(tmp_path / name, "w", format="mov" if name == "film.mov" else "matroska") as file:
        picture, stream = file.add_stream("mpeg4", rate=25), file.add_stream("aac", rate=RATE)
        picture.width = picture.height = 32
        stream.layout = "mono"
        file.mux(picture.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))) + picture.encode(None))
        file.mux(stream.encode(sound) + stream.encode(None))
    assert lists_among(str(tmp_path / name)) == []
    assert tag_files(settings(model, tmp_path / name, tmp_path / "tags.jsonl")).finished == 1


def test_inputs_that_hold_nothing_are_rejected(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "utf-16.txt").write_text("a.wav\n", encoding="utf-16")
    (tmp_path / "blank.txt").write_text("\n \n")
    for name, message in [
        ("empty", "holds no recording"),
        ("blank.txt", "holds no recording"),
        ("nowhere", "not a folder, audio file or list"),
        ("nowhere.wav", "not a folder, audio file or list of paths: there is no such file"),
        ("binary.bin", "not a folder"),
        ("utf-16.txt", "not a folder, audio file or list of paths: it is binary, or text that is not UTF-8"),
    ]:
        with pytest.raises(UserError, match=message):
            find_recordings(str(tmp_path / name))
    for nothing in ([], ""):
        with pytest.raises(UserError, match="inputs is empty: give a folder, an audio file, or a list of paths"):
            find_recordings(nothing)


def test_a_recording_is_its_path_size_and_time(tmp_path):
    write(tmp_path, "a.wav")
    os.utime(tmp_path / "a.wav", ns=(5, 7))
    paths = [str(tmp_path / "a.wav"), "s3://bucket/far.wav", str(tmp_path / "missing.wav")]
    assert [tuple(recording[1:]) for recording in current_state(paths)] == [(0, 7), (None, None), (None, None)]
    assert str(Recording("caf\udce9.wav", 1, 1)) == "caf\\xe9.wav"


# --- portions


def sizes(*megabytes: float) -> list[Recording]:
    return [Recording(f"{number}.wav", round(size * 2**20), 0) for number, size in enumerate(megabytes)]


@pytest.mark.parametrize(
    ("megabytes", "lengths"),
    [
        ([], []),
        ([0] * 200, [64, 64, 64, 8]),
        ([1] * 40, [16, 16, 8]),
        ([100, 1, 100, 0.5, 20, 1], [1, 2, 2, 1]),  # a portion ends with the file that fills it
        ([15.9, 0.2, 1], [2, 1]),
    ],
)
def test_portions_are_a_few_files_or_megabytes(megabytes, lengths):
    recordings = sizes(*megabytes)
    portions = cut_into_portions(recordings)
    assert [len(portion) for portion in portions] == lengths
    assert [recording for portion in portions for recording in portion] == recordings


def test_there_are_not_too_many_portions(monkeypatch):
    monkeypatch.setattr(inputs, "MOST_PORTIONS", 10)
    assert [len(portion) for portion in cut_into_portions(sizes(*[0.001] * 2000))] == [200] * 10
    assert [len(portion) for portion in cut_into_portions(sizes(*[50] * 40))] == [4] * 10
    assert [len(portion) for portion in cut_into_portions([Recording("s3://far.wav", None, None)] * 65)] == [64, 1]


# --- batches


def test_short_files_share_forward_passes_and_each_has_its_own_scores(model, tmp_path, windows):
    """33 files of a window: 16 + 16 + 1, whatever cannot be used lies between them."""
    folder, output = tmp_path / "clips", tmp_path / "tags.jsonl"
    folder.mkdir()
    for number in range(33):
        soundfile.write(folder / f"{number:02}.wav", noise(0.3 + 0.01 * number, seed=number), RATE, subtype="FLOAT")
    (folder / "04 broken.wav").write_bytes(b"no audio")
    soundfile.write(folder / "20 loud.wav", np.array([0.0, 1e4] * 3000, dtype=np.float32), RATE, subtype="FLOAT")
    classifier, extractor = (cls.from_pretrained(model) for cls in (SSLAMForAudioClassification, SSLAMFeatureExtractor))
    expected = {f"{i:02}.wav": classifier.score_over_time(load_waveform(folder / f"{i:02}.wav"), extractor).scores for i in range(33)}
    windows.clear()

    summary = tag_files(settings(model, folder, output, per_device_eval_batch_size=16))
    assert windows == [16, 16, 1]
    assert (summary.finished, summary.unusable) == (33, {"unreadable": 1, "out of scale": 1})
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [Path(record["path"]).name for record in records] == sorted([*expected, "04 broken.wav", "20 loud.wav"])
    assert "peak of 10000" in records[21]["error"]
    [part] = (tmp_path / "tags.parts").glob("*.parquet")
    found = {Path(row["path"]).name: row["values"] for row in pq.read_table(part).to_pylist() if row["error"] is None}
    assert found.keys() == expected.keys()
    for name, scores in expected.items():
        np.testing.assert_allclose([found[name]], scores, atol=1e-5)


def test_a_long_recording_between_short_ones_is_decoded_ahead_in_part(model, tmp_path, monkeypatch):
    folder = tmp_path / "clips"
    folder.mkdir()
    for name, seconds in (("a", 0.5), ("b", 35.0), ("c", 0.5)):
        soundfile.write(folder / f"{name}.wav", noise(seconds), RATE)
    contents = []
    for number, seconds in enumerate((60.0, 15.0, 0.0)):
        monkeypatch.setattr(inputs, "SECONDS_AHEAD", seconds)
        tag_files(settings(model, folder, tmp_path / f"{number}.jsonl"))
        contents.append((tmp_path / f"{number}.jsonl").read_text())
    assert len(contents[0].splitlines()) == 3
    assert contents[0] == contents[1] == contents[2]


def test_scores_that_are_not_finite_name_the_recording(model, recordings, tmp_path):
    classifier = SSLAMForAudioClassification.from_pretrained(model)
    classifier.classifier.bias.data[0] = float("nan")
    classifier.save_pretrained(model)
    with pytest.raises(FloatingPointError, match=rf"for {recordings}/a.wav, from sample 0 on, is not finite"):
        tag_files(settings(model, recordings, tmp_path / "tags.jsonl"))
    assert not (tmp_path / "tags.jsonl").exists()
    assert not unfinished(tmp_path)


def test_work_is_done_ahead_in_order_and_not_too_far():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.01 * (item % 3))
        if item == 5:
            raise ValueError("five")
        return 10 * item

    results = ahead.map_ahead(work, iter(range(1000)))
    assert [next(results).result() for _ in range(5)] == [0, 10, 20, 30, 40]
    with pytest.raises(ValueError, match="five"):
        next(results).result()
    assert next(results).result() == 60
    assert len(begun) < 7 + 3 * (os.cpu_count() + 1)
    results.close()


def test_items_are_made_in_another_thread_one_ahead():
    threads = set()

    def made():
        for item in range(4):
            threads.add(threading.get_ident())
            yield item
        raise ValueError("the end")

    items = ahead.in_background(made())
    assert [next(items) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="the end"):
        next(items)
    assert threading.get_ident() not in threads


def test_a_summary_counts_hours_and_causes():
    summary = Summary(finished=2, skipped=3, audio_seconds=7200.0, run_seconds=60.0)
    summary.unusable.update(["truncated", "empty", "empty"])
    assert str(summary) == "2 recordings processed (2.00 h, 120 x real time), 3 finished before, 3 not usable (2 empty, 1 truncated)"
    assert str(Summary(skipped=2)) == "0 recordings processed, 2 finished before, 0 not usable"  # no speed of nothing


# --- killed and resumed


class Killed(BaseException):
    pass


class FileOperations:
    """Counts what changes files or folders. From the operation number `last` on each fails, those that clean up, too: as if the process
    had been killed before it."""

    def __init__(self, patch: pytest.MonkeyPatch, last: int | None = None):
        self.count, self.last = 0, last
        for holder, name in [(Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "fsync"), (os, "chmod"), (tempfile, "mkstemp")]:
            patch.setattr(holder, name, self._counted(getattr(holder, name)))

    def _counted(self, function):
        def operation(*args, **options):
            self.count += 1
            if self.last is not None and self.count >= self.last:
                raise Killed
            return function(*args, **options)

        return operation


def count_operations(monkeypatch, run) -> int:
    with monkeypatch.context() as patch:
        operations = FileOperations(patch)
        run()
    return operations.count


def kill(monkeypatch, number: int, run) -> None:
    with monkeypatch.context() as patch:
        FileOperations(patch, number)
        with pytest.raises(Killed):
            run()


def windows_in_parts(folder: Path) -> int:
    return sum(pq.read_table(part)["error"].null_count for part in folder.glob("*.parquet"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_killed_before_any_operation_on_files_a_run_is_completed(model, recordings, tmp_path, monkeypatch, windows, suffix):
    monkeypatch.setattr(inputs, "PORTION_FILES", 1)
    name = f"tags{suffix}"
    operations = count_operations(monkeypatch, lambda: tag_files(settings(model, recordings, tmp_path / "whole" / name)))
    whole = (tmp_path / "whole" / name).read_bytes()
    assert operations > 20
    assert windows == [3, 4]
    kept = set()
    for number in range(1, operations + 1):
        folder = tmp_path / str(number)
        kill(monkeypatch, number, lambda folder=folder: tag_files(settings(model, recordings, folder / name)))
        assert not (folder / name).exists() or (folder / name).read_bytes() == whole
        finished = windows_in_parts(folder / "tags.parts")
        kept.add(finished)
        windows.clear()
        summary = tag_files(settings(model, recordings, folder / name))
        assert (folder / name).read_bytes() == whole
        assert finished + sum(windows) == 7
        assert (summary.finished + summary.skipped, summary.unusable) == (2, {"unreadable": 1})
        assert unfinished(folder) == []
    assert kept == {0, 3, 7}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_killed_at_any_moment_while_an_output_is_written_again_it_is_ours_still(model, recordings, tmp_path, monkeypatch, suffix):
    """Twice, each time with another threshold; then it is written with a third one."""
    output, final = tmp_path / f"tags{suffix}", tmp_path / f"final{suffix}"
    tag_files(settings(model, recordings, final, threshold=0.4))

    def run(threshold: float) -> None:
        tag_files(settings(model, recordings, output, threshold=threshold))

    run(0.0)
    operations = count_operations(monkeypatch, lambda: run(0.1))
    for number in range(1, operations + 1):
        for threshold in (0.2, 0.3):
            kill(monkeypatch, number, lambda threshold=threshold: run(threshold))
        run(0.4)
        assert output.read_bytes() == final.read_bytes()
        assert unfinished(tmp_path) == []
        run(0.0)


def test_outputs_of_the_same_results_are_written_one_after_the_other(model, recordings, tmp_path):
    """Their hashes lie in one file."""
    tag_files(settings(model, recordings, tmp_path / "tags.jsonl"))
    with lock(tmp_path / "tags.parts" / "outputs.json"):
        waiting = threading.Thread(target=lambda: tag_files(settings(model, recordings, tmp_path / "tags.csv")))
        waiting.start()
        waiting.join(1)
        assert (waiting.is_alive(), (tmp_path / "tags.csv").exists()) == (True, False)
    waiting.join(60)
    assert (tmp_path / "tags.csv").exists()


# --- several processes


def as_process(monkeypatch, rank: int, of: int) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", of), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def clips(tmp_path, monkeypatch) -> Path:
    """Seven portions of a clip."""
    monkeypatch.setattr(inputs, "PORTION_FILES", 1)
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(7):
        soundfile.write(folder / f"{number}.wav", noise(0.5 + 0.2 * number, seed=number), RATE)
    (folder / "3.wav").write_bytes(b"no audio")
    return folder


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (0, 1, 2)])
def test_processes_write_together_what_one_writes(model, clips, tmp_path, monkeypatch, windows, order):
    """The last one to finish writes the output."""
    output = tmp_path / "together" / "tags.jsonl"
    tag_files(settings(model, clips, tmp_path / "tags.jsonl"))
    alone = sum(windows)
    windows.clear()
    finished = 0
    for rank in order:
        assert not output.exists()
        as_process(monkeypatch, rank, len(order))
        summary = tag_files(settings(model, clips, output))
        assert summary.is_complete == output.exists()
        finished += summary.finished
    assert output.read_bytes() == (tmp_path / "tags.jsonl").read_bytes()
    assert (finished, sum(windows)) == (6, alone)
    parts = [{path.name[5:] for path in folder.glob("*.parquet")} for folder in (output.parent / "tags.parts", tmp_path / "tags.parts")]
    assert parts[0] == parts[1]
    assert len(parts[0]) == 7


def test_the_number_of_processes_may_change_after_a_kill(model, clips, tmp_path, monkeypatch, windows):
    output = tmp_path / "together" / "tags.jsonl"
    tag_files(settings(model, clips, tmp_path / "tags.jsonl"))
    alone = sum(windows)
    windows.clear()
    as_process(monkeypatch, 1, 3)
    tag_files(settings(model, clips, output))  # and processes 0 and 2 were killed
    for rank in (1, 0):
        as_process(monkeypatch, rank, 2)
        tag_files(settings(model, clips, output))
    assert output.read_bytes() == (tmp_path / "tags.jsonl").read_bytes()
    assert sum(windows) == alone


def test_processes_that_run_at_once_write_what_one_writes(model, clips, tmp_path):
    output = tmp_path / "together" / "tags.csv"
    program = tmp_path / "tag.py"
    program.write_text(f"""
from transformers_sslam.recordings import inputs, tag
inputs.PORTION_FILES = 1
print(tag.tag_files(tag.{settings(model, clips, output)!r}).is_complete)
""")
    logs, started = [tmp_path / f"{rank}.log" for rank in (0, 1)], []
    for rank, log in enumerate(logs):
        environment = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        started.append(Fork([program], log, environment, errors=log.with_suffix(".errors"), other_hashes=rank == 1))
    assert [process.wait() for process in started] == [0, 0], [log.with_suffix(".errors").read_text() for log in logs]
    assert "True\n" in [log.read_text() for log in logs]
    tag_files(settings(model, clips, tmp_path / "tags.csv"))
    assert output.read_bytes() == (tmp_path / "tags.csv").read_bytes()
    assert unfinished(output.parent) == []


@pytest.mark.parametrize("names", [("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")])
def test_processes_that_mpi_starts_divide_the_recordings(model, clips, tmp_path, monkeypatch, names):
    for name, value in zip(names, ("1", "4")):
        monkeypatch.setenv(name, value)
    summary = tag_files(settings(model, clips, tmp_path / "tags.jsonl"))
    assert (summary.finished, summary.is_complete) == (2, False)  # 1 and 5


@pytest.mark.parametrize(
    ("rank", "size"), [("1", None), ("1", "1"), ("5", "2"), ("2", "2"), ("-1", "2"), ("0", "0"), ("one", "2"), ("0", "1.0"), ("", "2")]
)
def test_numbers_of_processes_that_do_not_fit_together_are_rejected(model, clips, tmp_path, monkeypatch, rank, size):
    monkeypatch.setenv("RANK", rank)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"RANK is {rank!r}, WORLD_SIZE is {size or '1'!r}, .*: unset them to start one process"):
        tag_files(settings(model, clips, tmp_path / "tags.jsonl"))
    assert not list(tmp_path.glob("tags*"))


# --- Ray


def test_the_stages_of_ray_compute_what_this_process_computes(model, clips, tmp_path):
    options = settings(model, clips, tmp_path / "tags.jsonl", per_device_eval_batch_size=2)
    network, extractor = load_model(options.model_class, options.model, device="cpu")
    task = options.task(network.config, extractor)
    found = current_state(find_recordings(str(clips)))
    portions = [found[:3], found[3:]]
    prepare, compute = pickle.loads(pickle.dumps(_Prepare(task, 2))), _Compute(options, task, "cpu")
    rows = (compute(row) for portion in portions for row in prepare({"portion": pickle.dumps(portion)}))
    results = list(compute_batches((pickle.loads(row["batch"]) for row in rows), itemgetter("results")))
    expected = list(compute_here(options, task, network, portions))
    assert [span for span, _ in results] == [span for span, _ in expected]
    for (_, result), (_, other) in zip(results, expected):
        assert torch.equal(result, other) if isinstance(result, torch.Tensor) else str(result) == str(other)


def test_without_ray_its_engine_is_an_error_that_names_the_extra(model, recordings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"engine is ray, which is not installed: pip install .*transformers-sslam\[ray\]"):
        tag_files(settings(model, recordings, tmp_path / "tags.jsonl", engine="ray"))


@pytest.fixture
def ray():
    """Shut down behind the test, as are its processes."""
    module = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    yield module
    module.shutdown()


@pytest.mark.slow
def test_ray_writes_what_one_process_writes_also_if_workers_are_killed(model, tmp_path, monkeypatch, ray):
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(inputs, "PORTION_FILES", 4)
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(60):
        soundfile.write(folder / f"{number:02}.wav", noise(1.0 + 0.1 * (number % 7), seed=number), RATE)
    (folder / "07.wav").write_bytes(b"no audio")
    common = {"model": str(model), "inputs": str(folder), "device": "cpu", "per": "window"}
    for name, process_all, cls in [("tags.jsonl", tag_files, TagSettings), ("vectors.parquet", embed_files, EmbedSettings)]:
        process_all(cls(**common, output=str(tmp_path / name)))
        for parts in (None, 1, 8):  # so many are written when a worker is killed
            output, killed = tmp_path / f"{parts}" / name, []
            watcher = threading.Thread(target=kill_worker, args=(psutil, output.with_suffix(".parts"), parts, killed))
            if parts:
                watcher.start()
            summary = process_all(cls(**common, output=str(output), engine="ray", ray_workers=2))
            if parts:
                watcher.join()
                assert killed, "no worker was found"
            assert (summary.finished, summary.unusable) == (59, {"unreadable": 1})
            assert output.read_bytes() == (tmp_path / name).read_bytes()
            assert len(list(output.with_suffix(".parts").glob("*.parquet"))) == 15


def kill_worker(psutil, folder: Path, parts: int, killed: list[int]) -> None:
    """Kill -9 a worker of the pipeline, once there are so many parts."""
    until = time.monotonic() + 300
    while time.monotonic() < until and not killed:
        time.sleep(0.01)
        if len(list(folder.glob("*.parquet"))) < parts:
            continue
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command = " ".join(process.cmdline())
                if command.startswith("ray::") and ("_Prepare" in command or "_Compute" in command):
                    process.kill()
                    killed.append(process.pid)
                    return


def test_a_file_under_two_names_is_one_recording_and_a_looping_link_is_counted(tmp_path):
    (tmp_path / "a").mkdir()
    soundfile.write(tmp_path / "a" / "one.wav", noise(0.5), 16_000)
    (tmp_path / "a" / "two.wav").symlink_to("one.wav")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    found = find_recordings([str(tmp_path), str(tmp_path / "b" / "two.wav")])
    assert found == [str(tmp_path / "a" / "one.wav"), str(tmp_path / "loop.wav")]


def test_a_process_without_work_does_not_take_the_old_result_of_a_changed_file_for_all(tmp_path, monkeypatch):
    model, folder, output = tmp_path / "model", tmp_path / "sounds", tmp_path / "tags.jsonl"
    torch.manual_seed(0)
    SSLAMForAudioClassification(tiny_config(num_labels=3, problem_type="multi_label_classification")).save_pretrained(model)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(model)
    folder.mkdir()
    soundfile.write(folder / "a.wav", noise(0.5), 16_000)
    settings = TagSettings(model=str(model), inputs=str(folder), output=str(output), device="cpu")
    assert tag_files(settings).is_complete
    before = output.read_bytes()
    soundfile.write(folder / "a.wav", noise(0.8, seed=1), 16_000)
    for rank, is_complete in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert tag_files(settings).is_complete == is_complete
        assert (output.read_bytes() != before) == is_complete
    assert json.loads(output.read_text())["duration"] == 0.8
