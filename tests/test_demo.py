"""The demonstration: made-up sounds, scores of windows that slide over a recording, their picture, and the whole program."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, speech_like, tiny_config
from transformers import pipeline

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification


soundfile = pytest.importorskip("soundfile")
matplotlib_image = pytest.importorskip("matplotlib.image")
from transformers_sslam.audio.labels import Event  # noqa: E402
from transformers_sslam.recordings.plot import plot_scores  # noqa: E402


SCRIPT = Path(__file__).parents[1] / "scripts" / "demo.py"
RATE = 16_000
FRAMES = 64
WINDOW = 63 * 160 + 400  # samples of 64 frames


@pytest.fixture(scope="module")
def demo():
    specification = importlib.util.spec_from_file_location("demo", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def classifier(classes=("dog", "rain", "sea"), **config) -> SSLAMForAudioClassification:
    """Random, with scores that differ from clip to clip."""
    torch.manual_seed(0)
    labels = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    # Larger weights than usual, and the mean of all patches: so random a network tells clips apart.
    sensitive = {"initializer_range": 0.3, "classifier_pooling": "mean"}
    return SSLAMForAudioClassification(tiny_config(**labels, **sensitive, **config)).eval()


def save(model: SSLAMForAudioClassification | SSLAMForAudioFrameClassification, folder: Path, frames: int) -> Path:
    model.save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=frames).save_pretrained(folder)
    return folder


def detector(**config) -> SSLAMForAudioFrameClassification:
    """Random, of three classes, one of which the threshold always finds and one never."""
    torch.manual_seed(0)
    names = {"id2label": {0: "dog", 1: "rain", 2: "sea"}, "label2id": {"dog": 0, "rain": 1, "sea": 2}}
    thresholds = {"event_detection": {"threshold": {"dog": 0.0, "rain": 1.0, "sea": 0.5}}}
    return SSLAMForAudioFrameClassification(tiny_config(**names, **thresholds, initializer_range=0.3, **config)).eval()


def score(waveform, hop=0.25, batch_size=8, **config):
    return classifier(**config).score_over_time(waveform, SSLAMFeatureExtractor(max_length=FRAMES), hop=hop, batch_size=batch_size)


# --- sounds


def test_every_sound_is_whole_in_range_and_the_same_for_the_same_seed(demo):
    for name in demo.SOUNDS:
        sound = demo.make_sound(name, 3)
        assert sound.shape == (5 * RATE,)
        assert np.isfinite(sound).all()
        assert 0.3 * 0.98 <= np.abs(sound).max() <= 0.7  # the fade may take a little of a peak at the end
        assert np.array_equal(sound, demo.make_sound(name, 3))
        assert not np.array_equal(sound, demo.make_sound(name, 4))


def test_the_recording_holds_each_sound_where_it_says(demo):
    scene, events = demo.make_scene()
    assert np.abs(scene).max() <= 1
    assert len(scene) == RATE * max(event.offset for event in events)
    assert any(a.onset < b.onset < a.offset for a in events for b in events), "nothing overlaps"
    alone = demo.make_sound(events[0].label, 1, 0)
    part = scene[: round(RATE * min(event.onset for event in events[1:]))]
    assert np.corrcoef(part, alone[: len(part)])[0, 1] > 0.999999


# --- scores over time


def test_each_window_has_the_scores_it_would_have_as_a_clip():
    waveform = np.concatenate((noise(1.0), speech_like(1.0)))
    heard = score(waveform, batch_size=3)
    starts = [0, 4_000, 8_000, 12_000, 16_000, 20_000, len(waveform) - WINDOW]
    assert np.array_equal(heard.starts * RATE, starts)
    assert (heard.window, heard.duration, heard.classes) == (WINDOW / RATE, 2.0, ["dog", "rain", "sea"])
    classify = pipeline(
        "audio-classification", model=classifier(), feature_extractor=SSLAMFeatureExtractor(max_length=FRAMES), device="cpu"
    )
    for start, row in zip(starts, heard.scores):
        single = {guess["label"]: guess["score"] for guess in classify(waveform[start : start + WINDOW])}
        assert row == pytest.approx([single[name] for name in heard.classes], abs=1e-6)
    assert heard.scores.std(0).max() > 0.01, "scores that do not change show nothing"


def test_scores_of_tags_are_sigmoids_and_of_classes_softmaxes():
    waveform = speech_like(1.5)
    tags, classes = (score(waveform, problem_type=f"{kind}_label_classification") for kind in ("multi", "single"))
    logits = np.log(tags.scores / (1 - tags.scores))
    assert classes.scores == pytest.approx(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), abs=1e-5)


def test_a_moment_belongs_to_the_window_whose_centre_is_nearest():
    heard = score(noise(2.0), hop=0.5)
    centres = heard.starts + WINDOW / RATE / 2
    for moment in np.linspace(0, 2, 37)[1:-1]:
        assert np.searchsorted(heard.edges, moment) - 1 == np.abs(centres - moment).argmin()
    assert (heard.edges[0], heard.edges[-1]) == (0, 2)


def test_a_recording_shorter_than_a_window_has_one():
    heard = score(noise(0.3))
    assert heard.scores.shape == (1, 3)
    assert heard.edges.tolist() == [0, 0.3]


@pytest.mark.parametrize(("waveform", "hop", "message"), [(noise(0.02), 1.0, "320 samples"), (noise(1.0), 0.0, "hop is 0.0 s")])
def test_what_cannot_be_scored_is_an_error(waveform, hop, message):
    with pytest.raises(ValueError, match=message):
        score(waveform, hop)


# --- the picture


def test_the_picture_shows_log_mel_scores_and_outlines(tmp_path):
    waveform = speech_like(2.0)
    heard = score(waveform)
    plot_scores(heard, waveform, tmp_path / "plain.png", "A title")
    plot_scores(heard, waveform, tmp_path / "outlined.png", "A title", [Event("rain", 0.5, 1.5)])
    plain, outlined = (matplotlib_image.imread(tmp_path / f"{name}.png")[..., :3] for name in ("plain", "outlined"))
    assert plain.shape == (round(150 * (3.2 + 3 * 0.28)), 1500, 3)  # 10 inches at 150 dots an inch

    def vermilion(image):
        return (np.abs(image - np.array([0xD5, 0x5E, 0x00]) / 255).max(-1) < 0.02).sum()

    assert vermilion(plain) < 50 < vermilion(outlined) - 500


def test_of_many_classes_the_likeliest_and_the_true_ones_are_drawn(tmp_path, monkeypatch):
    heard = score(speech_like(2.0), classes=[f"class {i}" for i in range(30)])
    ranked = heard.scores.max(0).argsort()[::-1]
    drawn = []
    monkeypatch.setattr("transformers_sslam.recordings.plot._draw_scores", lambda axes, heard, shown, truth: drawn.extend(shown))
    least = int(ranked[-1])
    plot_scores(heard, speech_like(2.0), tmp_path / "many.png", truth=[Event(f"class {least}", 0, 1)], most_classes=4)
    assert drawn == sorted([least, *ranked[:3].tolist()])


# --- the program


def test_events_of_a_stereo_file_of_another_rate_are_those_of_its_mono_mix(demo, tmp_path, capsys):
    t = np.arange(3 * 44_100) / 44_100
    left, right = 0.3 * np.sin(2 * np.pi * 440 * t), 0.1 * np.sin(2 * np.pi * 1500 * t)
    soundfile.write(tmp_path / "stereo.wav", np.stack((left, right), axis=1), 44_100, subtype="FLOAT")
    extractor = SSLAMFeatureExtractor(max_length=FRAMES)
    waveform = demo.load_waveform(tmp_path / "stereo.wav")
    demo.detect_events(detector(), extractor, waveform, tmp_path / "new" / "events.png", "stereo.wav")

    t = np.arange(3 * RATE) / RATE
    mono = (0.15 * np.sin(2 * np.pi * 440 * t) + 0.05 * np.sin(2 * np.pi * 1500 * t)).astype(np.float32)
    said = capsys.readouterr().out
    found = detector().detect(mono, extractor)
    assert [event.label for event in found if event.label != "sea"] == ["dog"]
    for event in found:
        assert f"   {event.start:6.2f} to {event.end:6.2f} s  {event.label:<15} {event.score:.2f}\n" in said
    assert matplotlib_image.imread(tmp_path / "new" / "events.png").shape[1] == 1500


def test_where_nothing_is_found_the_program_says_so(demo, tmp_path, capsys):
    model = detector()
    model.config.event_detection = {"threshold": 1.0}
    demo.detect_events(model, SSLAMFeatureExtractor(max_length=FRAMES), noise(2.0), tmp_path / "events.png", "noise")
    assert "   none of the 3 kinds of sounds\n" in capsys.readouterr().out


def test_tags_of_the_made_up_sounds_are_the_scores_of_whole_clips(demo, tmp_path, capsys):
    model, extractor = detector(max_length=512), SSLAMFeatureExtractor(max_length=512)
    demo.tag_sounds(model, extractor, tmp_path / "sounds")
    said = capsys.readouterr().out
    scores = model.score_over_time(demo.load_waveform(tmp_path / "sounds" / "rain.wav"), extractor).scores
    assert len(scores) == 1
    best = scores[0].argmax()
    verdict = "right" if model.config.class_names[best] == "rain" else "wrong"
    assert f"   {verdict}: made-up {'rain':<14} taken for {model.config.class_names[best]} {scores[0, best]:.2f}, " in said
    assert f" of {len(demo.SOUNDS)} right." in said


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("text.wav", "text.wav cannot be read as audio"),
        ("nowhere.wav", "nowhere.wav is not there"),
        ("short.wav", "short.wav cannot be used: the audio has 320 samples, but one frame takes 400"),
    ],
)
def test_a_file_that_cannot_be_used_is_rejected_in_one_sentence(demo, tmp_path, monkeypatch, file, reason):
    save(detector(), tmp_path / "model", FRAMES)
    (tmp_path / "text.wav").write_text("no audio")
    soundfile.write(tmp_path / "short.wav", noise(0.02), RATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo.py", "--model", "model", "--file", file])
    with pytest.raises(SystemExit, match=f"^error: {reason}"):
        demo.main()


def test_with_a_file_nothing_but_this_file_is_used_and_drawn(demo, tmp_path, monkeypatch, capsys):
    save(detector(), tmp_path / "model", FRAMES)
    soundfile.write(tmp_path / "own.wav", np.stack([noise(3.0)] * 2, axis=1), RATE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["demo.py", "out", "--model", "model", "--file", "own.wav"])
    demo.main()
    assert [str(path.relative_to("out")) for path in Path("out").rglob("*")] == ["file_events.png"]
    assert capsys.readouterr().out.endswith("log-mel, events and their scores: out/file_events.png\n")


def test_a_missing_model_is_named(demo, monkeypatch):
    monkeypatch.setattr("sys.argv", ["demo.py", "--model", "nowhere"])
    with pytest.raises(SystemExit, match="^error: there is no model in nowhere: give the folder of a SSLAM event detector with --model$"):
        demo.main()


@pytest.mark.slow
def test_the_whole_demonstration_runs_and_its_losses_fall(demo, tmp_path):
    save(detector(max_length=512), tmp_path / "model", 512)
    command = [sys.executable, SCRIPT, tmp_path / "demo", "--model", tmp_path / "model"]
    for _ in range(2):  # a second time, it begins anew in the same folder
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert process.returncode == 0, process.stderr
    for name in ("events.png", "scene.wav", "sounds/rain.wav", "pretraining/model/config.json"):
        assert (tmp_path / "demo" / name).is_file(), name
    losses = [json.loads(line)["loss"] for line in (tmp_path / "demo" / "pretraining" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 60
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])
    assert last < first
    assert f"   {'loss':<22}{first:8.3f} -> {last:.3f}\n" in process.stdout
    assert [line[0] for line in process.stdout.splitlines() if line[1:3] == ". "] == list("123")
