"""The page to listen with, without a browser: what it finds, keeps, draws and deletes. The page itself is tried in `test_app_page`."""

import csv
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, relative_error, speech_like, tiny_config

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification, SSLAMModel, cli
from transformers_sslam.events_sslam import Event


soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow, which comes with the extra app")
import pyarrow.parquet as pq  # noqa: E402

from transformers_sslam.app import about, drawing, picture, sessions, wording  # noqa: E402
from transformers_sslam.app.listening import StoppedError, open_listener  # noqa: E402
from transformers_sslam.app.page import _slider  # noqa: E402
from transformers_sslam.app.picture import LogMelPicture  # noqa: E402
from transformers_sslam.app.recording import EMBEDDINGS, LABELS, PICTURE, SOUND, TABLE, Found, Recording, Slider  # noqa: E402
from transformers_sslam.app.sessions import Sessions  # noqa: E402
from transformers_sslam.app.settings import AppSettings  # noqa: E402
from transformers_sslam.audio.decode import load_waveform  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.recordings import plot  # noqa: E402
from transformers_sslam.recordings.detect import DetectSettings, detect_files  # noqa: E402
from transformers_sslam.recordings.embed import EmbedSettings, embed_files  # noqa: E402
from transformers_sslam.recordings.tag import TagSettings, tag_files  # noqa: E402


RATE = 16_000
CLASSES = ["dog", "<b>rain</b>", "sea"]
NAMES = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}


def save_detector(folder: Path, **config) -> Path:
    """Untrained, with scores that are spread over [0, 1] in each class over `sound()`: so there are events at any threshold."""
    torch.manual_seed(0)
    detector = SSLAMForAudioFrameClassification(tiny_config(**NAMES, initializer_range=0.3, **config))
    extractor, head = SSLAMFeatureExtractor(max_length=64), detector.frame_classifier
    scores = detector.score_steps(sound(), extractor).scores.astype(np.float64)
    logits = torch.from_numpy(np.log(scores) - np.log1p(-scores)).float()
    scale = 2 / logits.std(0)
    head.weight.data *= scale[:, None]
    head.bias.data = (head.bias.data - logits.mean(0)) * scale
    detector.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def save_classifier(folder: Path) -> Path:
    torch.manual_seed(0)
    config = tiny_config(**NAMES, initializer_range=0.3, problem_type="multi_label_classification")
    SSLAMForAudioClassification(config).save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(folder)
    return folder


def sound() -> np.ndarray:
    return noise(6.0) + speech_like(6.0)


@pytest.fixture
def detector(tmp_path) -> Path:
    return save_detector(tmp_path / "detector")


@pytest.fixture
def file(tmp_path) -> Path:
    """Not at the model's rate, and stereo."""
    path = tmp_path / "street.flac"
    soundfile.write(path, np.stack([noise(5.0, sampling_rate=44_100) + speech_like(5.0, 44_100)] * 2, axis=1), 44_100)
    return path


def listen(model: Path, file: Path, folder: Path, **settings):
    """A listener, and what it keeps of a file."""
    listener = open_listener(AppSettings(model=str(model), device="cpu", **settings))
    folder.mkdir()
    return listener, listener.listen(file, file.name, folder, lambda done, what: None)


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as text:
        return [{name: cell for name, cell in row.items() if name != "path"} for row in csv.DictReader(text)]


def positions(listener, **moved: float) -> list[float]:
    """Of the sliders: where they start, but for some."""
    return [moved.get(slider.name, slider.value) for slider in listener.sliders]


# --- what is found


@pytest.mark.parametrize(
    ("own", "moved", "flags"),
    [
        (None, {}, {}),
        (None, {"threshold": 0.7, "median_filter": 0.48, "max_gap": 0.64}, {"threshold": 0.7, "median_filter": 0.48, "max_gap": 0.64}),
        ({"threshold": {"dog": 0.2, "sea": 0.9}, "median_filter": 0.48, "max_gap": 0.32}, {}, {}),
        ({"median_filter": 0.48}, {"median_filter": 0.0, "change_filter": 0.64}, {"median_filter": 0.0, "change_filter": 0.64}),
        ({"change_filter": {"dog": 0.64, "sea": 0.96}}, {}, {}),
        # Thresholds of their own are shifted together, and those of beginnings with them.
        (
            {"threshold": {"dog": 0.2, "sea": 0.9}, "min_duration": 0.3},
            {"threshold": -0.1},
            {"threshold": {"dog": 0.1, "<b>rain</b>": 0.4, "sea": 0.8}},
        ),
        (
            {"threshold": {"dog": 0.2}, "onset_threshold": {"dog": 0.9}},
            {"threshold": 0.2},
            {"threshold": {"dog": 0.4, "<b>rain</b>": 0.7, "sea": 0.7}, "onset_threshold": {"dog": 0.925, "<b>rain</b>": 0.7, "sea": 0.7}},
        ),
        # Onset thresholds move in proportion, up and down.
        ({"threshold": 0.2, "onset_threshold": {"dog": 0.8}}, {"threshold": 0.5}, {"threshold": 0.5, "onset_threshold": {"dog": 0.875}}),
        ({"threshold": 0.4, "onset_threshold": 0.8}, {"threshold": 0.3}, {"threshold": 0.3, "onset_threshold": 0.6}),
    ],
)
def test_events_are_those_of_the_command_detect(tmp_path, file, own, moved, flags):
    model = save_detector(tmp_path / "model", event_detection=own)
    listener, recording = listen(model, file, tmp_path / "kept")
    events = listener.find(recording, positions(listener, **moved)).events
    listener.write(recording, events)
    output = tmp_path / "events.csv"
    detect_files(DetectSettings(model=str(model), inputs=str(file), output=str(output), device="cpu", label_files="audacity", **flags))
    assert len(events) > 3
    assert table(recording.file(TABLE)) == table(output)
    assert (recording.file(LABELS)).read_bytes() == (tmp_path / "events.audacity" / f"{file.name}.txt").read_bytes()


def test_a_higher_threshold_needs_no_model_and_leaves_shorter_events(detector, file, tmp_path, monkeypatch):
    listener, recording = listen(detector, file, tmp_path / "kept")
    monkeypatch.setattr(listener, "model", type("NoModel", (), {"config": listener.model.config}))
    low, high = (
        sum(event.end - event.start for event in listener.find(recording, positions(listener, threshold=position)).events)
        for position in (0.3, 0.8)
    )
    assert low > high > 0


def test_thresholds_of_their_own_are_shifted_together_and_the_slider_says_so(tmp_path):
    own = {"threshold": {"dog": 0.2, "sea": 0.9}, "median_filter": {"dog": 0.48}}
    model = save_detector(tmp_path / "model", event_detection=own)
    listener = open_listener(AppSettings(model=str(model), device="cpu"))
    first, second, third, fourth = listener.sliders
    assert (first.label, first.value) == ("How sure must the model be? (added to all thresholds)", 0)
    assert "Each kind of sound has a threshold of its own, from 0.2 to 0.9; this is added to all." in first.info
    assert "Until it is moved, each kind of sound has its own, from 0 to 0.48." in second.info
    assert "Until" not in third.info + fourth.info
    for shift, expected in ((0.0, [0.2, 0.5, 0.9]), (0.05, [0.25, 0.55, 0.95]), (0.3, [0.5, 0.8, 1.0]), (-0.6, [0.0, 0.0, 0.3])):
        found = listener.find(kept(tmp_path, np.zeros((4, 3), np.float32)), positions(listener, threshold=shift))
        assert found.thresholds.tolist() == pytest.approx(expected, abs=1e-9)


def test_one_threshold_for_all_classes_is_set_as_it_is(listener, tmp_path):
    assert (listener.sliders[0].label, listener.sliders[0].value) == ("How sure must the model be? (threshold)", 0.5)
    found = listener.find(kept(tmp_path, np.zeros((4, 3), np.float32)), positions(listener, threshold=0.6))
    assert found.thresholds.tolist() == [0.6, 0.6, 0.6]


def test_a_lower_threshold_finds_what_the_onset_threshold_kept_away(tmp_path):
    """With hysteresis both lines are drawn, and at the lowest position every score above 0 is found."""
    own = {"threshold": 0.5, "onset_threshold": 0.9}
    listener = open_listener(AppSettings(model=str(save_detector(tmp_path / "model", event_detection=own)), device="cpu"))
    recording = kept(tmp_path, np.full((10, 3), 0.45, np.float32))
    for threshold, onset, events in ((0.5, 0.9, 0), (0.3, 0.54, 0), (0.2, 0.36, 3), (0.0, 0.0, 3)):
        found = listener.find(recording, positions(listener, threshold=threshold))
        assert (found.thresholds[0], found.onsets[0], len(found.events)) == (threshold, pytest.approx(onset), events)
        drawn = drawing.draw_lanes(listener, recording, found)
        assert drawn.count(f'class="sslam-limit" d="M0 {100 * (1 - threshold):.1f}H1000"') == 3
        assert drawn.count('class="sslam-onset"') == (3 if onset > threshold else 0)
        assert ("an event needs a score above this line" in drawn) == (onset > threshold)


@pytest.mark.parametrize("median", [0.0, 0.48, 1.44])
def test_a_curve_is_above_the_dashed_line_exactly_where_there_are_events(listener, tmp_path, median):
    """It is of the scores that thresholds are compared with: after the median filter."""
    scores = np.random.default_rng(0).random((200, 3)).astype(np.float32)
    recording = kept(tmp_path, scores)
    found = listener.find(recording, positions(listener, threshold=0.55, median_filter=median))
    assert len(found.events) > 10
    assert (len(found.events) < len(listener.find(recording, positions(listener, threshold=0.55)).events)) == (median > 0)
    drawn = drawing.draw_lanes(listener, recording, found)
    for label, curve in zip(CLASSES, re.findall(r'class="sslam-curve" d="([^"]*)"', drawn)):
        levels = np.array(re.findall(r"V([\d.]+)H", curve), dtype=float)
        covered = np.zeros(200, dtype=bool)
        for event in found.events:
            if event.label == label:
                covered[round(event.start / 0.16) : round(event.end / 0.16)] = True
        assert (levels < 45)[covered].all()
        assert (levels >= 45)[~covered].all()


def test_the_gap_between_events_that_is_closed_is_set(listener, tmp_path):
    scores = np.zeros((20, 3), np.float32)
    scores[[2, 3, 6, 7], 0] = 0.9
    recording = kept(tmp_path, scores)
    for gap, expected in ((0.0, [(0.32, 0.64), (0.96, 1.28)]), (0.32, [(0.32, 1.28)])):
        found = listener.find(recording, positions(listener, max_gap=gap))
        assert [(event.start, event.end) for event in found.events] == expected


@pytest.mark.parametrize(("moved", "flags"), [({}, {}), ({"threshold": 0.5, "top_k": 1.0}, {"threshold": 0.5, "top_k": 1})])
def test_segments_are_those_of_the_command_tag(tmp_path, file, moved, flags):
    model = save_classifier(tmp_path / "model")
    listener, recording = listen(model, file, tmp_path / "kept")
    listener.write(recording, listener.find(recording, positions(listener, **moved)).events)
    output = tmp_path / "tags.csv"
    tag_files(TagSettings(model=str(model), inputs=str(file), output=str(output), device="cpu", **flags))
    assert table(recording.file(TABLE)) == table(output)


def test_a_recording_without_events_has_one_row_as_in_the_command(detector, file, tmp_path):
    listener, recording = listen(detector, file, tmp_path / "kept")
    assert listener.find(recording, positions(listener, threshold=1.0)).events == []
    listener.write(recording, [])
    assert table(recording.file(TABLE)) == [{"start": "0.0", "end": "5.0", "label": "", "score": "", "error": ""}]


def test_embeddings_are_those_of_the_command_embed(detector, file, tmp_path):
    listener, recording = listen(detector, file, tmp_path / "kept")
    made = pq.read_table(listener.embed(recording))
    output = tmp_path / "vectors.parquet"
    embed_files(EmbedSettings(model=str(detector), inputs=str(file), output=str(output), per="window", device="cpu"))
    expected = pq.read_table(output)
    assert made.schema == expected.schema
    assert made["path"].to_pylist() == ["street.flac"] * len(expected)
    assert made["start"].to_pylist() == expected["start"].to_pylist()
    assert made["end"].to_pylist() == expected["end"].to_pylist()
    assert relative_error(made["vector"].to_pylist(), expected["vector"].to_pylist()) < 1e-4  # the sound is kept with 24 bits


def test_an_encoder_is_rejected(tmp_path):
    SSLAMModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / "encoder")
    with pytest.raises(UserError, match="encoder is an encoder without a trained head, but a classifier of clips is needed: give one that"):
        open_listener(AppSettings(model=str(tmp_path / "encoder"), device="cpu"))


# --- what is kept


def test_the_sound_that_plays_is_what_the_model_receives(detector, file, tmp_path):
    _, recording = listen(detector, file, tmp_path / "kept")
    expected = load_waveform(file, RATE)
    played, rate = soundfile.read(recording.folder / SOUND, dtype="float32")
    assert rate == RATE
    assert recording.duration == len(expected) / RATE
    np.testing.assert_allclose(played, expected, rtol=0, atol=2**-22)
    assert sorted(path.name for path in recording.folder.iterdir()) == sorted([SOUND, PICTURE])


def test_progress_is_told_by_the_seconds_that_the_model_has_received(detector, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, noise(45.0), RATE)
    listener = open_listener(AppSettings(model=str(detector), device="cpu"))
    (tmp_path / "kept").mkdir()
    told = []
    listener.listen(path, path.name, tmp_path / "kept", lambda done, what: told.append((done, what)))
    assert told == [(seconds / 45, f"{seconds} of 45 s") for seconds in (0, 10, 20, 30, 40)]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ({"max_seconds": 4.9}, "my holiday.flac is longer than 4.9 s, the limit of this page: give a part of it"),
        (
            {"max_compute_seconds": 1e-6},
            "my holiday.flac takes more than 0.0 s of computing, the limit of this page: give a part of it",
        ),
    ],
)
def test_a_recording_above_a_limit_is_rejected(detector, file, tmp_path, limit, message):
    listener = open_listener(AppSettings(model=str(detector), device="cpu", **limit))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        listener.listen(file, "my holiday.flac", tmp_path, lambda done, what: None)


def test_what_is_ended_stops_before_the_next_layer(detector, tmp_path):
    """A batch of windows may take long. Others may compute at the same time."""
    soundfile.write(tmp_path / "long.wav", noise(20.0), RATE)
    listener, ended, layers = open_listener(AppSettings(model=str(detector), device="cpu")), threading.Event(), []

    def count(module, *_):
        layers.append(module)
        if len(layers) == 3:
            ended.set()

    for module in listener.model.base_model.layers:
        module.register_forward_hook(count)
    with pytest.raises(StoppedError):
        listener.listen(tmp_path / "long.wav", "long.wav", tmp_path, lambda done, what: None, ended)
    assert len(layers) == 3
    listener.listen(tmp_path / "long.wav", "long.wav", tmp_path, lambda done, what: None)
    assert len(layers) > 6


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(32_000), "holds nothing but silence: choose another recording, or check the microphone that made it"),
        (np.zeros(0), "holds no samples: choose another file"),
        (np.ones(100), "lasts 0.006 s, but 0.025 s are needed: choose a longer recording"),
        (None, "holds no bytes: choose another file"),
    ],
)
def test_what_holds_no_sound_is_named_with_what_to_do(detector, tmp_path, samples, message):
    listener = open_listener(AppSettings(model=str(detector), device="cpu"))
    (tmp_path / "upload.wav").write_bytes(b"")
    if samples is not None:
        soundfile.write(tmp_path / "upload.wav", samples, RATE)
    with pytest.raises(ValueError, match=f"^my holiday.wav {re.escape(message)}$"):
        listener.listen(tmp_path / "upload.wav", "my holiday.wav", tmp_path, lambda done, what: None)


def test_a_broken_file_is_named_as_its_owner_called_it(detector, tmp_path):
    (tmp_path / "upload.wav").write_text("no audio")
    listener = open_listener(AppSettings(model=str(detector), device="cpu"))
    plain = "^my holiday.wav cannot be read as audio: choose a file that holds sound, and is whole$"
    with pytest.raises(ValueError, match=plain):  # neither a path of this machine, nor what a library said
        listener.listen(tmp_path / "upload.wav", "my holiday.wav", tmp_path, lambda done, what: None)


# --- the picture


def levels(path: Path) -> np.ndarray:
    image = Image.open(path)
    assert image.mode == "P"
    return np.array(image)


def test_a_tone_is_bright_where_its_frequency_is_written(tmp_path):
    tone = (0.5 * np.sin(2 * np.pi * 2000 * np.arange(2 * RATE) / RATE)).astype(np.float32)
    drawn = LogMelPicture(2.0, RATE)
    assert np.concatenate(list(drawn.watch([tone[:7001], tone[7001:]]))).tolist() == tone.tolist()
    drawn.save(tmp_path / "tone.png")
    brightest = levels(tmp_path / "tone.png").mean(1).argmax()
    place = float(re.search(r"([\d.]+)%,100% - 7px\)\">2,000 Hz", drawing._frequencies(RATE))[1])
    assert abs(100 * (1 - (brightest + 0.5) / 128) - place) < 1


def test_a_picture_does_not_depend_on_the_blocks(tmp_path):
    waveform = noise(3.0) * np.linspace(0, 1, 3 * RATE, dtype=np.float32)
    pictures = []
    for i, length in enumerate((len(waveform), 16_000, 777, 100)):
        drawn = LogMelPicture(3.0, RATE)
        for _ in drawn.watch(waveform[start : start + length] for start in range(0, len(waveform), length)):
            pass
        drawn.save(tmp_path / f"{i}.png")
        pictures.append(levels(tmp_path / f"{i}.png"))
    assert pictures[0].shape == (128, 298)
    for other in pictures[1:]:
        assert np.abs(pictures[0].astype(int) - other).max() <= 1  # rounding


def test_a_column_of_a_long_recording_is_the_loudest_of_its_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(picture, "MOST_COLUMNS", 50)
    click = np.zeros(3 * RATE, dtype=np.float32)
    click[RATE] = 1.0
    drawn = LogMelPicture(3.0, RATE)
    for _ in drawn.watch([click[:5000], click[5000:]]):
        pass
    drawn.save(tmp_path / "click.png")
    found = levels(tmp_path / "click.png")
    assert found.shape == (128, 50)  # 298 frames, 6 a column
    assert np.flatnonzero(found.max(0) > 200).tolist() == [16]  # frames 98 to 100


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_recording(detector, tmp_path):
    """Of 30 minutes, samples would take 115 MB and all log-mels 92 MB."""
    psutil = pytest.importorskip("psutil")
    listener = open_listener(AppSettings(model=str(detector), device="cpu"))

    def grown_over(minutes: int, name: str) -> int:
        path, folder = tmp_path / f"{name}.wav", tmp_path / name
        folder.mkdir()
        with soundfile.SoundFile(path, "w", RATE, 1) as output:
            for minute in range(minutes):
                output.write(noise(60.0, seed=minute))
        before = psutil.Process().memory_info().rss
        listener.listen(path, path.name, folder, lambda done, what: None)
        return psutil.Process().memory_info().rss - before

    grown_over(2, "warm")
    assert grown_over(30, "long") < 40 * 2**20


# --- what is drawn


@pytest.fixture
def listener(detector):
    return open_listener(AppSettings(model=str(detector), device="cpu"))


def found(recording: Recording, events: list[Event], threshold: float = 0.5) -> Found:
    limits = np.full(recording.scores.shape[1], threshold)
    return Found(events, recording.scores, limits, limits)


def kept(folder: Path, scores: np.ndarray, step: float = 0.16, name: str = "a.wav") -> Recording:
    edges = step * np.arange(len(scores) + 1)
    return Recording(name, folder, float(edges[-1]), edges, scores, edges[:-1], edges[1:])


def test_overlapping_events_are_bars_in_lanes_above_each_other(listener, tmp_path):
    recording = kept(tmp_path, np.full((50, 3), 0.1, np.float32))  # 8 s
    events = [Event(2.0, 4.0, "dog", 0.8), Event(3.0, 8.0, "sea", 0.7)]
    drawn = drawing.draw_lanes(listener, recording, found(recording, events))
    lanes = dict(re.findall(r'data-label="([^"]+)">(.*?)(?=<div class="sslam-lane"|<div class="sslam-axis")', drawn))
    assert list(lanes) == ["dog", "&lt;b&gt;rain&lt;/b&gt;", "sea"]
    assert re.findall(r"left:([\d.]+)%;width:([\d.]+)%", lanes["dog"]) == [("25.0000", "25.0000")]
    assert re.findall(r"left:([\d.]+)%;width:([\d.]+)%", lanes["sea"]) == [("37.5000", "62.5000")]
    assert "sslam-bar" not in lanes["&lt;b&gt;rain&lt;/b&gt;"]
    assert 'd="M0 50.0H1000"' in lanes["dog"]  # the threshold
    legend = "eventshow sure the model is (score): 0 at the foot of a row, 1 at its topthreshold"
    axis = "".join(f"{second}" for second in (0, 2, 4, 6)) + "s"
    frequencies = "".join(f"{frequency:,} Hz" for frequency in plot.MEL_TICKS)
    said, note = re.sub(r"<[^>]*>", "", drawn).split("At the top is the sound")
    assert "The page plays and analyses a mono mix of all channels at 16 kHz, whatever the file has." in note
    assert said == f"{frequencies}dog&lt;b&gt;rain&lt;/b&gt;sea{axis}{legend}"  # and no more


def test_short_events_of_a_long_recording_are_not_drawn_longer_than_they_are(listener, tmp_path, monkeypatch):
    recording = kept(tmp_path, np.full((12_500, 3), 0.1, np.float32))  # 2000 s
    events = [Event(100.0, 101.0, "dog", 0.8), Event(200.0, 300.0, "dog", 0.7)]
    for zoom, thin in ((1, 1), (20, 0)):
        drawn = drawing.draw_lanes(listener, recording, found(recording, events), zoom)
        assert drawn.count("sslam-thin") == thin
        assert drawn.count('class="sslam-bar') == 2
    monkeypatch.setattr(drawing, "MOST_BARS", 1)
    drawn = drawing.draw_lanes(listener, recording, found(recording, events))
    assert "The 1 shortest events are not drawn." in drawn
    assert re.findall(r'sslam-bar[^>]*data-start="([\d.]+)"', drawn) == ["200.0"]


def test_texts_of_files_and_models_are_escaped(listener, tmp_path):
    evil = '"><img src=x onerror=alert(1)>.wav'
    recording = kept(tmp_path, np.full((10, 3), 0.9, np.float32), name=evil)
    events = [Event(0.0, 1.0, CLASSES[1], 0.9)]
    drawn = [
        drawing.draw_player(recording),
        drawing.draw_lanes(listener, recording, found(recording, events)),
        drawing.draw_table(listener, recording, found(recording, events)),
        drawing.draw_table(listener, recording, found(recording, [])),
        drawing.draw_intro(listener),
        drawing.draw_computing(evil),
        drawing.draw_link(recording.file(EMBEDDINGS), "Embeddings"),
        drawing.draw_error(f"{evil} is broken"),
    ]
    for html in drawn:
        assert "<img src=x" not in html
        assert "<b>rain" not in html
    assert "&lt;b&gt;rain&lt;/b&gt;" in drawn[1]


def test_labels_are_shown_without_underscores_and_times_of_more_than_a_minute_with_minutes(listener, tmp_path, monkeypatch):
    monkeypatch.setattr(listener, "classes", ["car_horn", "rain", "sea"])
    events = [Event(1.28, 59.5, "car_horn", 0.6), Event(60.16, 61.0, "rain", 0.6)]
    short, long = (kept(tmp_path, np.full((rows, 3), 0.6, np.float32)) for rows in (375, 400))  # 60 and 64 s
    cells = re.compile(r"(?:</span> |<td>|row\">)([^<>]+)<")
    rows = cells.findall(drawing.draw_table(listener, short, found(short, events)))
    assert rows == ["1.28", "59.50", "car horn", "0.60", "60.16", "61.00", "rain", "0.60"]
    table = drawing.draw_table(listener, long, found(long, events))
    assert cells.findall(table) == ["0:01.28", "0:59.50", "car horn", "0.60", "1:00.16", "1:01.00", "rain", "0.60"]
    assert "start (min:s)" in table
    lanes = drawing.draw_lanes(listener, long, found(long, events))
    assert 'data-label="car_horn"><span class="sslam-name">car horn<' in lanes
    assert 'title="car horn: 0:01.28 to 0:59.50, score 0.60"' in lanes


def test_a_typed_number_out_of_range_is_the_nearest_and_none_the_slider_s_own():
    slider = _slider(Slider("threshold", "Threshold", "", 0, 1, 0.01, 0.4))
    assert [slider.preprocess(value) for value in (1.5, -1, 0.3, None)] == [1, 0, 0.3, 0.4]
    assert slider.get_block_name() == "slider"


def test_where_nothing_is_found_the_highest_score_is_told(listener, tmp_path):
    scores = np.full((400, 3), 0.001, np.float32)
    recording = kept(tmp_path, scores)
    empty = drawing.draw_table(listener, recording, found(recording, []))
    assert "<h2>No events found</h2>" in empty
    assert "The highest is that of dog: below 0.01, at 0:00.00. A lower threshold shows more." in empty
    scores[390, 2] = 0.31
    told = "No score is high enough. The highest is that of sea: 0.31, at 1:02.40. A lower threshold shows more."
    assert told in drawing.draw_table(listener, recording, found(recording, []))
    scores[40, 0] = 0.9  # for a step, which the median filter takes away
    kept_away = listener.find(recording, positions(listener, median_filter=0.48))
    assert kept_away.events == []
    assert "0.90" not in drawing.draw_table(listener, recording, kept_away)
    short = "Some scores are high enough, but not for long enough: this model leaves out short events (min_duration)."
    assert short in drawing.draw_table(listener, recording, found(recording, []))
    told = "No score is above the onset threshold. The highest is that of dog: 0.90, at 0:06.40. A lower threshold shows more."
    assert told in drawing.draw_table(listener, recording, found(recording, [])._replace(onsets=np.full(3, 0.95)))
    classifier = open_listener(AppSettings(model=str(save_classifier(tmp_path / "classifier")), device="cpu"))
    told = "Some scores of the kinds that you chose are high enough, but others are higher (top k)."
    assert told in drawing.draw_table(classifier, recording, found(recording, []), ["dog"])


def test_only_wanted_kinds_are_shown(listener, tmp_path):
    recording = kept(tmp_path, np.tile(np.array([0.6, 0.1, 0.9], np.float32), (10, 1)))
    everything = found(recording, [Event(0.0, 1.0, "dog", 0.6), Event(0.1, 1.0, "sea", 0.9), Event(1.1, 1.5, "sea", 0.9)])
    for only, lanes, title in (
        (["sea"], ["sea"], "2 of 3 events"),
        (["dog", "sea"], ["dog", "sea"], "3 of 3 events"),
        ([CLASSES[1]], ["&lt;b&gt;rain&lt;/b&gt;"], "0 of 3 events"),  # without events, and yet shown
    ):
        assert re.findall(r'data-label="([^"]+)"', drawing.draw_lanes(listener, recording, everything, 1, only)) == lanes
        table = drawing.draw_table(listener, recording, everything, only)
        assert f"<h2>{title}</h2>" in table
        assert table.count("<tr data-span") == int(title[0])
    assert "No score of the kinds that you chose is high enough. The highest is that of &lt;b&gt;rain&lt;/b&gt;: 0.10, at 0.00 s." in table


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("street.wav", "street.csv"),
        ("a/../b c.x.wav", "b_c_x.csv"),
        (".hidden.wav", "_hidden.csv"),
        ("Straße ♪.wav", "Straße_.csv"),
    ],
)
def test_downloads_have_the_name_of_the_recording(tmp_path, name, saved):
    file = kept(tmp_path, np.zeros((1, 3)), name=name).file(TABLE)
    assert file == tmp_path / saved


def test_a_curve_is_as_high_as_its_scores(listener, tmp_path):
    scores = np.array([[0.0], [1.0], [0.25]], np.float32)
    assert drawing._curve(np.array([0.0, 1.0, 2.0, 4.0]), scores[:, 0], 1) == "M0 100.0V100.0H250.0V0.0H500.0V75.0H1000.0"
    spike = np.zeros(20_000, np.float32)
    spike[12_345] = 1
    for zoom, points in ((1, 1000), (50, 5000)):
        curve = drawing._curve(np.arange(20_001.0), spike, zoom)
        assert curve.count("V") == points
        assert curve.count("V0.0") == 1


def test_of_many_events_and_classes_the_rest_is_counted(listener, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "MOST_LANES", 1)
    monkeypatch.setattr(drawing, "FEWEST_LANES", 1)
    monkeypatch.setattr(drawing, "MOST_ROWS", 2)
    scores = np.tile(np.array([0.6, 0.1, 0.9], np.float32), (10, 1))
    recording = kept(tmp_path, scores)
    events = [Event(0.0, 1.0, "dog", 0.6), Event(0.1, 1.0, "sea", 0.9), Event(1.1, 1.5, "sea", 0.9)]
    lanes = drawing.draw_lanes(listener, recording, found(recording, events))
    assert re.findall(r'data-label="([^"]+)"', lanes) == ["sea"]
    assert "1 more kinds have events: they are in the table." in lanes
    rows = drawing.draw_table(listener, recording, found(recording, events))
    assert rows.count("<tr data-span") == 2
    assert "1 more are in the table to download." in rows
    assert "3 events" in rows


@pytest.mark.parametrize(
    ("duration", "zoom", "ticks"),
    [
        (10.0, 1, ["0", "2", "4", "6", "8"]),
        (0.5, 1, ["0", "0.1", "0.2", "0.3", "0.4"]),
        (10.0, 5, [f"{i / 2:g}" for i in range(20)]),
        (1800.0, 1, ["0:00", "5:00", "10:00", "15:00", "20:00", "25:00"]),
        (150.0, 100, [f"{i * 0.5 // 60:.0f}:{i * 0.5 % 60:04.1f}" for i in range(300)]),
    ],
)
def test_times_are_round_and_closer_when_zoomed(duration, zoom, ticks):
    assert re.findall(r">([\d.:]+)</span>", drawing._axis(duration, zoom)) == ticks


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.26, "0.3 s"), (59.0, "59.0 s"), (59.97, "1 min"), (119.7, "2 min"), (1800.0, "30 min"), (61.0, "1 min 1 s")]
)
def test_lengths_of_time_are_readable(seconds, text):
    assert wording.clock(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "digits", "text"),
    [(4.0, 0, "0:04"), (59.6, 0, "1:00"), (65.26, 1, "1:05.3"), (3605.0, 0, "60:05"), (59.96, 1, "1:00.0"), (0.04, 2, "0:00.04")],
)
def test_times_are_written_as_players_show_them(seconds, digits, text):
    assert wording.minutes(seconds, digits) == text


def test_model_data_and_limits_are_told(detector):
    front = "license: cc-by-4.0\ndatasets:\n- <i>streets</i>\nbase_model: someone/model\n"
    (detector / "README.md").write_text(f"---\n{front}---\n\n# Title\n\nA **model** of\nstreets.\n\nMore.\n")
    text = about.draw_about(open_listener(AppSettings(model=str(detector), device="cpu", max_seconds=90, max_megabytes=7)))
    for part in (
        "&lt;i&gt;streets&lt;/i&gt;",
        "cc-by-4.0",
        "someone/model",
        "A model of streets.",
        "3 kinds of sounds",
        "up to 1 min 30 s and 7 MB",
    ):
        assert part in text
    assert "<i>" not in text
    assert "More." not in text


@pytest.mark.parametrize("card", [None, "no front matter", "---\n- a: [\n---\nText.\n", "---\njust text\n---\nText.\n"])
def test_a_missing_or_damaged_card_is_no_reason_to_stop(detector, card):
    (detector / "README.md").unlink(missing_ok=True)
    if card is not None:
        (detector / "README.md").write_text(card)
    text = about.draw_about(open_listener(AppSettings(model=str(detector), device="cpu")))
    assert "This page" in text
    assert f"<dt>Licence</dt><dd>{about.NO_LICENCE}</dd>" in text
    assert "<dt>Examples</dt>" not in text


def test_the_licence_of_the_model_and_the_rights_to_examples_are_told(detector, file):
    front = "license: other\nlicense_name: <b>mine\nlicense_link: https://example.org/l\n"
    (detector / "README.md").write_text(f"---\n{front}---\n\nText.\n")
    text = about.draw_about(open_listener(AppSettings(model=str(detector), device="cpu", examples=str(file))))
    assert "<dt>Licence</dt><dd>&lt;b&gt;mine https://example.org/l</dd>" in text
    assert f"<dt>Examples</dt><dd>{about.EXAMPLES_RIGHTS}</dd>" in text


# --- what is deleted


@pytest.fixture
def pages():
    with Sessions(3600) as open_pages:
        yield open_pages


def upload(pages: Sessions, name: str = "a.wav") -> Path:
    folder = pages.uploads / "hash"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"sound")
    return folder / name


def test_two_visitors_may_upload_the_same_file(pages):
    path = upload(pages)
    pages.claim("one", str(path))
    pages.claim("two", str(path))
    first, second = pages.take("one"), pages.take("two")
    assert first.name == second.name == "a.wav"
    assert first.folder != second.folder
    first.file.unlink()
    assert second.file.read_bytes() == b"sound"
    assert pages.take("one") is None  # used
    assert "one" in pages
    assert "three" not in pages


def test_a_turn_ends_when_it_is_replaced_and_when_its_page_is_closed(pages, tmp_path):
    (tmp_path / "example.wav").write_bytes(b"example")
    pages.claim("one", str(upload(pages)))
    pages.choose("two", tmp_path / "example.wav", "deep/example.wav")
    first, other = pages.take("one"), pages.take("two")
    assert (other.file, other.name) == (tmp_path / "example.wav", "deep/example.wav")
    pages.claim("one", str(upload(pages, "b.wav")))
    assert first.ended.is_set()
    second = pages.take("one")
    assert second.name == "b.wav"
    pages.end("one")
    assert second.ended.is_set()
    assert not other.ended.is_set()


def test_what_was_not_uploaded_is_not_taken(pages, tmp_path):
    (tmp_path / "private.wav").write_bytes(b"secret")
    (pages.uploads / "link.wav").symlink_to(tmp_path / "private.wav")
    for path in (tmp_path / "private.wav", pages.uploads / "link.wav", pages.uploads / ".." / "kept" / "x.wav"):
        with pytest.raises(UserError, match="was not uploaded to this page: choose it again"):
            pages.claim("one", str(path))


def test_a_page_that_is_closed_or_takes_another_recording_leaves_nothing(pages):
    first = pages.begin("one")
    pages.keep("one", kept(first, np.zeros((1, 3))))
    assert pages.recording("one").folder == first
    second = pages.begin("one")
    assert not first.exists()
    assert pages.recording("one") is None
    pages.end("one")
    assert not second.exists()
    pages.keep("one", kept(second, np.zeros((1, 3))))  # the model was not done when the page was closed
    assert pages.recording("one") is None


def test_a_page_sees_its_own_recording_only(pages):
    folders = [pages.begin(name) for name in ("one", "two")]
    for name, folder in zip(("one", "two"), folders):
        pages.keep(name, kept(folder, np.zeros((1, 3)), name=name))
    assert [pages.recording(name).name for name in ("one", "two")] == ["one", "two"]
    assert pages.recording("three") is None
    assert pages.recording(None) is None
    assert all(len(folder.name) >= 32 for folder in folders)  # cannot be guessed


def test_old_uploads_and_recordings_are_swept(monkeypatch):
    with Sessions(1800) as pages:
        path = upload(pages)
        folder = pages.begin("one")
        pages.sweep()
        assert path.exists()
        assert folder.exists()
        now, monotonic = time.time(), time.monotonic()
        monkeypatch.setattr(sessions.time, "time", lambda: now + sessions.GRACE + 1)
        pages.sweep()
        assert not path.exists()
        assert folder.exists()
        monkeypatch.setattr(sessions.time, "monotonic", lambda: monotonic + 1801)
        pages.sweep()
        assert not folder.exists()


def test_at_the_end_everything_is_deleted():
    with Sessions(1800) as pages:
        root = pages.kept.parent
        upload(pages)
        assert root.stat().st_mode & 0o077 == 0  # nobody else of this machine may look
    assert not root.exists()


# --- settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_seconds": 0}, "max_seconds is 0, but must be positive"),
        ({"max_waiting": -1}, "max_waiting is -1, but must be positive"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0, but must be positive"),
        ({"port": 70_000}, "port is 70000, but a number from 0 to 65535 is expected"),
    ],
)
def test_a_mistake_is_named(changes, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        AppSettings(model="model", **changes)


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("transformers_sslam.app.settings.find_spec", lambda name: None)
    assert cli.main(["app", "--model", "model"]) == 1
    expected = 'sslam app: error: the page needs gradio, which is not installed: pip install "transformers-sslam[app]"\n'
    assert capsys.readouterr().err == expected
