"""Embeddings of recordings: the vectors and times of `SSLAMModel.encode`, in files that others read."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, speech_like, tiny_config

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from transformers_sslam.audio.decode import load_waveform  # noqa: E402
from transformers_sslam.cli import main  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.recordings import inputs, parts  # noqa: E402
from transformers_sslam.recordings.embed import EmbedSettings, embed_files  # noqa: E402
from transformers_sslam.tasks_sslam import Embedding  # noqa: E402


ROOT = Path(__file__).parents[1]
SMALL_MODEL = ROOT / "model_cards" / "sslam-tiny-esc10"
RATE = 16_000
# Seconds: shorter than a time step, a window, and longer than some, at several rates.
LENGTHS = {"a.wav": 0.1, "b.flac": 0.64, "deep/c.wav": 1.7, "d.wav": 0.3, "e.ogg": 2.3}


@pytest.fixture
def model(tmp_path) -> Path:
    SSLAMModel(tiny_config(initializer_range=0.3, classifier_pooling="mean")).save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def recordings(tmp_path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "deep").mkdir(parents=True)
    for number, (name, seconds) in enumerate(LENGTHS.items()):
        rate = 44_100 if name.endswith(".flac") else RATE
        samples = speech_like(seconds, rate) if number % 2 else noise(seconds, number, rate)
        soundfile.write(folder / name, samples, rate)
    return folder


def settings(model: Path, recordings: Path, output: Path, **changes) -> EmbedSettings:
    return EmbedSettings(**{"model": str(model), "inputs": str(recordings), "output": str(output), "device": "cpu", **changes})


def encoded(model: Path, paths: list[Path], **options) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Vectors, starts and ends of each file, which is encoded alone."""
    encoder, extractor = SSLAMModel.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    found = []
    for path in paths:
        waveform = load_waveform(path)
        result = encoder.encode([waveform], extractor, **options)
        if options.get("per", "clip") == "clip":
            found.append((result.numpy(), np.zeros(1), np.array([len(waveform) / RATE])))
        else:
            [(vectors, starts, ends)] = result
            found.append((vectors.numpy(), starts, ends))
    return found


def vectors_of(table: pa.Table) -> np.ndarray:
    return np.array(table["vector"].to_pylist(), dtype=np.float32)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": [0, 1, -1], "pooling": "cls"},
        {"window": 0.32},
        {"layers": [0, 2], "pooling": "mean_and_std", "window": 0.32},
        {"pooling": "max_by_frequency"},
        {"per": "window", "layers": [1], "pooling": "mean_and_max_by_frequency"},
        {"per": "window", "layers": [1], "pooling": "mean"},
        {"per": "window", "pooling": "cls", "window": 0.48, "hop": 0.2},
        {"per": "step", "layers": [2, 0]},
        {"per": "step", "pooling": "patches", "hop": 0.16},
    ],
)
def test_vectors_and_times_are_those_of_encode_whatever_shares_a_batch(model, recordings, tmp_path, options, batch_size):
    output = tmp_path / "new" / "embeddings.parquet"
    summary = embed_files(settings(model, recordings, output, per_device_eval_batch_size=batch_size, **options))
    assert (summary.finished, summary.unusable, summary.is_complete) == (len(LENGTHS), {}, True)
    assert summary.audio_seconds == pytest.approx(sum(LENGTHS.values()), abs=1e-3)
    table = pq.read_table(output)
    assert table.column_names == ["path", "start", "end", "vector"]
    paths = sorted(recordings / name for name in LENGTHS)
    expected = encoded(model, paths, **options)
    assert table["path"].to_pylist() == [str(path) for path, (vectors, _, _) in zip(paths, expected) for _ in vectors]
    vectors, starts, ends = (np.concatenate(arrays) for arrays in zip(*expected))
    np.testing.assert_allclose(vectors_of(table), vectors, atol=1e-5)
    np.testing.assert_allclose(table["start"].to_numpy(), starts, atol=1e-9)
    np.testing.assert_allclose(table["end"].to_numpy(), ends, atol=1e-9)
    assert np.abs(vectors[0] - vectors[-1]).max() > 0.1  # the model tells recordings apart


@pytest.mark.parametrize("samples", [10_479, 10_480, 10_481, 10_639, 10_640])
def test_a_clip_ends_with_its_last_sample_also_if_it_fills_no_frame(model, tmp_path, samples):
    soundfile.write(tmp_path / "a.wav", noise(1.0)[:samples], RATE)  # a window has 10,480 samples, 63 * 160 + 400
    embed_files(settings(model, tmp_path / "a.wav", tmp_path / "embeddings.parquet"))
    assert pq.read_table(tmp_path / "embeddings.parquet")["end"].to_pylist() == [samples / RATE]


def test_other_programs_read_the_output(model, recordings, tmp_path):
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    output = tmp_path / "embeddings.parquet"
    embed_files(settings(model, recordings, output, per="window"))
    expected = pq.read_table(output).to_pylist()
    assert len(expected) > len(LENGTHS)
    loaded = datasets.load_dataset("parquet", data_files=str(output), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[:] == {name: [row[name] for row in expected] for name in ("path", "start", "end", "vector")}
    frame = pandas.read_parquet(output)
    assert list(frame.columns) == ["path", "start", "end", "vector"]
    np.testing.assert_array_equal(np.stack(frame["vector"]), np.array([row["vector"] for row in expected], dtype=np.float32))


def test_recordings_that_cannot_be_used_are_listed_until_there_are_none(model, recordings, tmp_path):
    output, listed = tmp_path / "embeddings.parquet", tmp_path / "embeddings.unusable.csv"
    broken = Path(os.fsdecode(os.fsencode(recordings) + b"/broken \xe9.wav"))
    broken.write_bytes(b"no audio")
    soundfile.write(recordings / "short.wav", noise(0.02), RATE)
    assert embed_files(settings(model, recordings, output)).unusable == {"unreadable": 1, "too short": 1}
    header, *rows = csv.reader(listed.read_text().splitlines())
    assert header == ["path", "cause", "error"]
    assert [row[:2] for row in rows] == [[f"{recordings}/broken \\udce9.wav", "unreadable"], [f"{recordings}/short.wav", "too short"]]
    assert "320 samples" in rows[1][2]
    assert len(pq.read_table(output)) == len(LENGTHS)
    soundfile.write(recordings / "short.wav", noise(0.5), RATE)
    assert embed_files(settings(model, recordings, output)).finished == 1
    assert [row[1] for row in csv.reader(listed.read_text().splitlines())] == ["cause", "unreadable"]
    broken.unlink()
    assert embed_files(settings(model, recordings, output)).skipped == len(LENGTHS) + 1
    assert not listed.exists()
    assert pq.read_table(output)["path"].to_pylist() == sorted(str(recordings / name) for name in (*LENGTHS, "short.wav"))


def test_a_list_of_unusable_recordings_has_no_cell_that_a_spreadsheet_would_compute(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("=cmd.wav").write_bytes(b"no audio")
    embed_files(settings(model, Path("=cmd.wav"), Path("embeddings.parquet")))
    [_, [path, cause, _]] = csv.reader(Path("embeddings.unusable.csv").read_text().splitlines())
    assert (path, cause) == ("'=cmd.wav", "unreadable")
    table = pq.read_table("embeddings.parquet")
    assert (len(table), table.schema.field("vector").type) == (0, pa.list_(pa.float32(), 32))


def test_names_that_are_not_utf_8_are_written_with_escapes(model, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    soundfile.write(os.fsencode(folder) + b"/caf\xe9.wav", noise(0.5), RATE)
    for _ in range(2):
        embed_files(settings(model, folder, tmp_path / "embeddings.parquet"))
        assert pq.read_table(tmp_path / "embeddings.parquet")["path"].to_pylist() == [f"{folder}/caf\\udce9.wav"]


def test_a_long_recording_is_written_in_row_groups_of_limited_size(model, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "ROW_GROUP_BYTES", 10 * 4 * 32)  # ten vectors
    folder, output = tmp_path / "long", tmp_path / "embeddings.parquet"
    folder.mkdir()
    for name, seconds in (("a.wav", 0.5), ("b.wav", 8.0), ("c.wav", 0.5)):
        soundfile.write(folder / name, noise(seconds), RATE)
    embed_files(settings(model, folder, output, per="step"))
    expected = encoded(model, sorted(folder.iterdir()), per="step")
    [part] = output.with_suffix(".parts").glob("*.parquet")
    for file in (part, output):
        groups = pq.ParquetFile(file).metadata
        sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        assert sum(sizes) == sum(len(vectors) for vectors, _, _ in expected) == 3 + 50 + 3
        assert len(sizes) >= 4
        assert max(sizes) <= 20
    table = pq.read_table(output)
    np.testing.assert_allclose(vectors_of(table), np.concatenate([vectors for vectors, _, _ in expected]), atol=1e-5)
    np.testing.assert_allclose(table["start"].to_numpy(), np.concatenate([starts for _, starts, _ in expected]), atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"per": "step"}])
def test_a_run_that_is_stopped_is_resumed_and_writes_what_one_run_writes(model, recordings, tmp_path, monkeypatch, options):
    monkeypatch.setattr(inputs, "PORTION_FILES", 1)
    whole, stopped = tmp_path / "whole.parquet", tmp_path / "stopped.parquet"
    embed_files(settings(model, recordings, whole, **options))
    computed, compute = [], Embedding.compute

    def interrupted(self, model, inputs):
        computed.append(1)
        if len(computed) == 4:
            raise KeyboardInterrupt
        return compute(self, model, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Embedding, "compute", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed_files(settings(model, recordings, stopped, **options))
    assert not stopped.exists()
    summary = embed_files(settings(model, recordings, stopped, **options))
    assert summary.skipped > 0
    assert summary.skipped + summary.finished == len(LENGTHS)
    assert stopped.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per": "window", "hop": 0.32}, "per was 'clip' and is 'window' now"),
        ({"layers": [1]}, r"layers was \[-1\] and is \[1\] now"),
        ({"pooling": "cls"}, "pooling was None and is 'cls' now"),
        ({"window": 0.32}, "window was 0.64 and is 0.32 now"),
        ({"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16' now"),
    ],
)
def test_vectors_of_other_settings_are_rejected(model, recordings, tmp_path, changes, message):
    output = tmp_path / "embeddings.parquet"
    embed_files(settings(model, recordings, output))
    before = output.read_bytes()
    with pytest.raises(UserError, match=f"embeddings.parts was made with other settings: {message}"):
        embed_files(settings(model, recordings, output, **changes))
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "embeddings.csv"}, "ends in .parquet"),
        ({"layers": [3]}, r"these settings do not fit the model: layers is \[3\], but numbers from -3 to 2"),
        ({"layers": []}, r"layers is \[\]"),
        ({"per": "step", "pooling": "cls"}, "pooling is 'cls' and per is 'step', but a time step has the 'mean' of its patches"),
        ({"pooling": "patches"}, "all patches are kept of a time step only"),
        ({"hop": 0.32}, "hop is 0.32 s, but windows of a whole clip do not overlap"),
        ({"per": "step", "hop": 0.2}, "hop is 0.2 s, but for time steps it must be a multiple of 0.16 s"),
    ],
)
def test_settings_that_do_not_fit_are_rejected_before_anything_is_written(model, recordings, tmp_path, changes, message):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        embed_files(settings(**{"model": model, "recordings": recordings, "output": tmp_path / "embeddings.parquet", **changes}))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_text_file_is_read_as_a_list_and_the_output_says_so(recordings, tmp_path, capsys):
    listed, output = tmp_path / "list.txt", tmp_path / "embeddings.parquet"
    listed.write_text(f"{recordings / 'd.wav'}\n{recordings / 'a.wav'}\n")
    main(["embed", "--model", str(SMALL_MODEL), "--inputs", str(listed), str(recordings / "b.flac"), "--output", str(output)])
    assert capsys.readouterr().out.splitlines()[0] == f"{listed} is read as a list: each line is the path of a recording"
    assert pq.read_table(output)["path"].to_pylist() == [str(recordings / name) for name in ("d.wav", "a.wav", "b.flac")]


def test_the_command_embeds_a_folder(recordings, tmp_path, capsys):
    output = tmp_path / "embeddings.parquet"
    arguments = ["embed", "--model", str(SMALL_MODEL), "--inputs", str(recordings), "--output", str(output), "--device", "cpu"]
    arguments += ["--per", "step", "--layers", "1", "-1", "--pooling", "patches"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{len(LENGTHS)} recordings processed (0.00 h, ")
    encoder = SSLAMModel.from_pretrained(SMALL_MODEL)
    table = pq.read_table(output)
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 2 * 8 * encoder.config.hidden_size)
    [(vectors, _, _)] = encoded(SMALL_MODEL, [recordings / "e.ogg"], per="step", layers=[1, -1], pooling="patches")
    chosen = table.filter(pa.compute.equal(table["path"], str(recordings / "e.ogg")))
    np.testing.assert_allclose(vectors_of(chosen), vectors, atol=1e-5)
    assert main([*arguments[:-1], "mean"]) == 1
    assert "embeddings.parts was made with other settings: pooling was 'patches' and is 'mean' now" in capsys.readouterr().err
