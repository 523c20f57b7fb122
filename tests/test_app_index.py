"""The page's search: which spans of an index that `sslam embed` wrote sound like a chosen one. In a browser: `test_app_page`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, speech_like


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
pytest.importorskip("PIL.Image", reason="needs Pillow, which comes with the extra app")
from test_app import RATE, save_classifier, save_detector  # noqa: E402

from transformers_sslam import SSLAMModel  # noqa: E402
from transformers_sslam.app import drawing  # noqa: E402
from transformers_sslam.app.index import Match, SoundIndex  # noqa: E402
from transformers_sslam.app.listening import open_listener  # noqa: E402
from transformers_sslam.app.recording import SOUND  # noqa: E402
from transformers_sslam.app.settings import AppSettings  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.recordings.embed import EmbedSettings, embed_files  # noqa: E402
from transformers_sslam.recordings.tag import TagSettings, tag_files  # noqa: E402


LONG = 0.655  # seconds: windows of 0.64 s, with the rest of their last frame


def chirp(seconds: float, low: float, high: float) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return (0.4 * np.sin(2 * np.pi * (low * t + (high - low) / (2 * seconds) * t**2))).astype(np.float32)


@pytest.fixture
def archive(tmp_path) -> Path:
    """Recordings that all differ, one of them below a folder, and not at the model's rate."""
    folder = tmp_path / "archive"
    (folder / "deep").mkdir(parents=True)
    soundfile.write(folder / "chirp.wav", np.concatenate((chirp(1.28, 300, 3000), noise(1.28), chirp(1.28, 5000, 1000))), RATE)
    soundfile.write(folder / "deep" / "voice.flac", np.stack([speech_like(3.0, 44_100)] * 2, axis=1), 44_100)
    soundfile.write(folder / "noise.wav", noise(3.0, seed=3), RATE)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return save_detector(tmp_path / "detector")


def embed(model: Path, archive: Path, **settings) -> Path:
    output = archive.parent / "vectors.parquet"
    embed_files(
        EmbedSettings(**{"model": str(model), "inputs": str(archive), "output": str(output), "device": "cpu", "per": "window", **settings})
    )
    return output


def search(source: Path | str, model: Path, **settings) -> SoundIndex:
    return SoundIndex(str(source), open_listener(AppSettings(model=str(model), device="cpu", **settings)))


def sound(folder: Path, waveform: np.ndarray) -> Path:
    """As the page keeps it."""
    soundfile.write(folder / SOUND, waveform, RATE, subtype="PCM_24")
    return folder / SOUND


@pytest.mark.parametrize("save", [save_detector, save_classifier])
def test_the_nearest_to_a_copy_of_a_span_is_the_span(tmp_path, archive, save):
    model = save(tmp_path / "model")
    index = search(embed(model, archive), model)
    kept = sound(tmp_path, np.concatenate((noise(1.0, seed=9), soundfile.read(archive / "chirp.wav", dtype="float32")[0])))
    for start in (0.0, 0.64, 2.56):
        first, second, *_ = index.find(kept, 1 + start, 1 + start + LONG)
        assert (first.recording, first.start, first.is_there) == ("chirp.wav", start, True)
        assert first.end == pytest.approx(start + LONG)
        assert first.similarity == pytest.approx(1, abs=1e-5)
        assert second.similarity < first.similarity - 1e-4


def test_matches_are_cosines_with_what_encode_gives_and_do_not_overlap(tmp_path, archive, model):
    """Other windows, layers and pooling than the model's own."""
    options = {"layers": [1, 2], "pooling": "cls"}
    index = search(embed(model, archive, window=0.32, hop=0.16, **options), model)
    query = chirp(1.0, 400, 2500)
    matches = index.find(sound(tmp_path, query), 0.2, 0.9)  # longer than two windows
    encoder, extractor = index._encoder, index._listener.extractor
    (vector,) = encoder.encode([query[3200:14_400]], extractor, window=0.32, **options).numpy()
    files = {"chirp.wav": archive / "chirp.wav", "noise.wav": archive / "noise.wav"}
    checked = [match for match in matches if match.recording in files]
    assert len(matches) == 10
    assert len(checked) > 3
    for match in checked:
        samples, _ = soundfile.read(files[match.recording], dtype="float32")
        window = samples[round(match.start * RATE) : round(match.end * RATE)]
        (other,) = encoder.encode([window], extractor, window=0.32, **options).numpy()
        assert match.similarity == pytest.approx(vector @ other / np.linalg.norm(vector) / np.linalg.norm(other), abs=1e-4)
    assert [match.similarity for match in matches] == sorted((match.similarity for match in matches), reverse=True)
    for i, one in enumerate(matches):
        for other in matches[:i]:
            assert one.recording != other.recording or one.end <= other.start or other.end <= one.start


def test_an_index_of_whole_recordings_is_searched_too(tmp_path, archive, model):
    index = search(embed(model, archive, per="clip"), model)
    kept = sound(tmp_path, soundfile.read(archive / "noise.wav", dtype="float32")[0])
    matches = index.find(kept, 0, 3)
    assert matches[0].recording == "noise.wav"
    assert sorted(match.recording for match in matches) == ["chirp.wav", "deep/voice.flac", "noise.wav"]
    assert matches[0].similarity == pytest.approx(1, abs=1e-5)
    assert index.about == "3 recordings, each as a whole (index vectors.parts)"


def test_what_is_searched_is_told(archive, model):
    index = search(embed(model, archive), model)
    assert index.about == "3 recordings, in 29 spans of 0.64 s, one every 0.32 s (index vectors.parts)"


def test_an_index_is_found_by_its_output_by_its_results_and_by_the_folder_of_both(archive, model):
    output = embed(model, archive)
    for source in (output, output.with_suffix(".parts"), output.parent):
        assert len(search(source, model)._starts) == 29
    embed(model, archive, output=str(output.with_name("others.parquet")))
    with pytest.raises(UserError, match=r"holds others.parts, vectors.parts: give one of them$"):
        search(output.parent, model)


@pytest.mark.parametrize(
    ("start", "end", "message"),
    [
        (1.0, 1.0, "from 1 to 1 s is not a span of this recording of 2.00 s: choose another"),
        (1.5, 1.0, "from 1.5 to 1 s is not a span of this recording of 2.00 s: choose another"),
        (1.0, 2.5, "from 1 to 2.5 s is not a span of this recording of 2.00 s: choose another"),
        (-1.0, 1.0, "from -1 to 1 s is not a span of this recording of 2.00 s: choose another"),
        (1.0, 1.01, "a span of 0.01 s is too short: choose at least 0.025 s"),
    ],
)
def test_a_span_that_is_none_is_rejected(tmp_path, archive, model, start, end, message):
    index = search(embed(model, archive), model)
    with pytest.raises(UserError, match=f"^{message}$"):
        index.find(sound(tmp_path, noise(2.0)), start, end)


# --- what an index has to be


def test_an_index_of_another_model_is_rejected(tmp_path, archive, model):
    output = embed(model, archive)
    with pytest.raises(UserError, match=r"vectors.parts was made with another model than .*classifier, so that .*: give the --model that "):
        search(output, save_classifier(tmp_path / "classifier"))
    # The same weights behind another extractor give other vectors.
    listener = open_listener(AppSettings(model=str(model), device="cpu"))
    listener.extractor.mean += 1
    with pytest.raises(UserError, match="was made with another model"):
        SoundIndex(str(output), listener)


def test_an_index_of_another_precision_is_rejected(archive, model):
    with pytest.raises(UserError, match=r"vectors.parts is in float32, but dtype is bfloat16: give the same$"):
        search(embed(model, archive), model, dtype="bfloat16")


def test_an_index_of_the_encoder_alone_is_that_of_its_detector(tmp_path, archive, model):
    encoder = SSLAMModel.from_pretrained(model)
    encoder.save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").write_bytes((model / "preprocessor_config.json").read_bytes())
    assert len(search(embed(tmp_path / "encoder", archive), model)._starts) == 29


def test_what_is_no_index_of_spans_is_rejected(tmp_path, archive, model):
    with pytest.raises(UserError, match=r"vectors.parts has a vector for each time step, .* and --per window$"):
        search(embed(model, archive, per="step"), model)
    tags = tmp_path / "tags.csv"
    tag_files(TagSettings(model=str(save_classifier(tmp_path / "classifier")), inputs=str(archive), output=str(tags), device="cpu"))
    with pytest.raises(UserError, match=r"tags.parts holds no embeddings: give what sslam embed wrote"):
        search(tags, model)
    (tmp_path / "empty").mkdir()
    for source in ("empty", "nowhere", "archive/noise.wav"):
        with pytest.raises(UserError, match=rf"{source}', but what sslam embed wrote is expected, .*: sslam embed .* --per window$"):
            search(tmp_path / source, model)


def test_a_damaged_index_is_rejected(archive, model):
    settings = embed(model, archive).with_suffix(".parts") / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"window": 1.28}))
    with pytest.raises(UserError, match=r"settings.json is damaged: it was changed since it was written"):
        search(settings.parent, model)


# --- what is played


def test_a_span_that_was_found_is_played_as_the_model_receives_it(tmp_path, archive, model):
    index = search(embed(model, archive), model)
    kept = sound(tmp_path, soundfile.read(archive / "chirp.wav", dtype="float32")[0])
    match = next(match for match in index.find(kept, 2.56, 2.56 + LONG) if match.recording == "chirp.wav")
    file, caption = index.cut(match.row, tmp_path)
    assert file.parent == tmp_path
    assert caption == f"chirp.wav, {match.start:.2f} to {match.end:.2f} s"
    played, rate = soundfile.read(file, dtype="float32")
    assert rate == RATE
    expected = soundfile.read(kept, dtype="float32")[0][round(match.start * RATE) : round(match.end * RATE)]
    np.testing.assert_allclose(played, expected, rtol=0, atol=2**-22)


def test_a_whole_recording_is_played_up_to_the_limit(tmp_path, archive, model):
    index = search(embed(model, archive, per="clip"), model, max_seconds=2.0)
    row = next(match.row for match in index.find(sound(tmp_path, noise(1.0)), 0, 1) if match.recording == "deep/voice.flac")
    file, caption = index.cut(row, tmp_path)
    assert caption == "deep/voice.flac, 0.00 to 2.00 s"
    assert soundfile.info(file).frames == 2 * RATE


def test_recordings_that_moved_or_changed_are_told(tmp_path, archive, model):
    index = search(embed(model, archive), model)
    kept = sound(tmp_path, soundfile.read(archive / "noise.wav", dtype="float32")[0])
    row = index.find(kept, 0, LONG)[0].row
    (archive / "noise.wav").rename(archive / "moved.wav")
    os.utime(archive / "chirp.wav", (1, 1))
    states = {match.recording: match.is_there for match in index.find(kept, 0, LONG)}
    assert states == {"noise.wav": False, "chirp.wav": False, "deep/voice.flac": True}
    with pytest.raises(UserError, match=r"^noise.wav was moved or has changed: run sslam embed again$"):
        index.cut(row, tmp_path)


def test_nothing_but_what_is_indexed_can_be_asked_for(tmp_path, archive, model):
    index = search(embed(model, archive), model)
    for row in (-1, 29, "../../secret.wav", None, 0.5, 1.0):
        with pytest.raises(UserError, match="is not a row of the index: search again$"):
            index.cut(row, tmp_path)
    assert list(tmp_path.glob("found*")) == []


def test_a_recording_that_breaks_is_named_without_its_folder(tmp_path, archive, model, monkeypatch):
    index = search(embed(model, archive), model)
    file = archive / "noise.wav"
    row, state, size = index.find(sound(tmp_path, soundfile.read(file)[0]), 0, LONG)[0].row, file.stat(), file.stat().st_size
    file.write_bytes(b"x" * size)
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))  # so that it seems unchanged
    with pytest.raises(UserError, match="^noise.wav ") as caught:
        index.cut(row, tmp_path)
    assert str(archive) not in str(caught.value)

    def fail(path: str, rate: int) -> None:
        raise OSError(f"{path} cannot be read (no route to host)")

    monkeypatch.setattr("transformers_sslam.app.index.read_blocks", fail)  # as of a URL
    with pytest.raises(UserError, match=r"^noise.wav cannot be read \(no route to host\)$"):
        index.cut(row, tmp_path)


def test_names_of_recordings_are_escaped():
    evil = '"><img src=x onerror=alert(1)>.wav'
    drawn = [
        drawing.draw_matches([Match(3, evil, 0.0, 0.64, 0.9, True), Match(4, evil, 1.0, 1.64, 0.8, False)], 0.0, 0.64),
        drawing.draw_match(Path("kept/found-3.flac"), f"{evil}, 0.00 to 0.64 s"),
        drawing.draw_search(f"1 recording, in {evil}"),
    ]
    for html in drawn:
        assert "<img" not in html
        assert "&lt;img" in html
    assert drawn[0].count("data-row") == 1
    assert "moved or changed" in drawn[0]
