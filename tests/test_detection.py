"""Scores of time steps over windows that overlap, and events: of recordings of any length, and as they arrive."""

import math
import weakref

import numpy as np
import pytest
import torch
from conftest import noise, speech_like, tiny_config
from torch import nn

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioFrameClassification
from transformers_sslam.batching_sslam import Span, compute_batches, prepare_batches
from transformers_sslam.detection_sslam import SSLAMDetectionMixin
from transformers_sslam.events_sslam import EventSettings, find_events, in_order
from transformers_sslam.modeling_sslam_frames import SSLAMFrameClassifierOutput
from transformers_sslam.tasks_sslam import Detection
from transformers_sslam.windows_sslam import Windowing


RATE, GRID = 16_000, 2560  # samples in a second, and in a time step of the encoder
WINDOW = 63 * 160 + 400  # samples of 64 frames
EXTRACTOR = SSLAMFeatureExtractor(max_length=64)
RATES = [6.25, 12.5, 25]


def detector(**config) -> SSLAMForAudioFrameClassification:
    torch.manual_seed(0)
    # Large weights, so that random a network tells sounds apart.
    return SSLAMForAudioFrameClassification(tiny_config(**{"num_labels": 3, "initializer_range": 0.3, **config})).eval()


class ToneDetector(SSLAMDetectionMixin):
    """Finds steps that are loud below 1 kHz and above 2 kHz, whatever is around them."""

    def __init__(self, steps_per_second: float = 6.25):
        super().__init__()
        self.config = tiny_config(id2label={0: "low", 1: "high"}, steps_per_second=steps_per_second)

    def forward(self, input_values, attention_mask=None, return_dict=True):
        steps = input_values.unflatten(1, (-1, self.config.frames_per_step))
        levels = torch.stack([steps[..., :45].amax(-1), steps[..., 75:].amax(-1)], dim=-1).mean(2)
        return SSLAMFrameClassifierOutput(logits=20 * (levels - levels.new_tensor(0.6)))


def recording(seconds: float) -> np.ndarray:
    return np.concatenate((noise(seconds / 2), speech_like(seconds / 2)))


def tones(duration: float, *events: tuple[float, float, str]) -> np.ndarray:
    """Tones over faint noise, sharply cut."""
    waveform, t = noise(duration) * 1e-3, np.arange(round(duration * RATE)) / RATE
    for start, end, label in events:
        tone = 0.3 * np.sin(2 * np.pi * {"low": 400, "high": 3000}[label] * t)
        waveform += np.where((t >= start) & (t < end), tone, 0).astype(np.float32)
    return waveform


def in_blocks(waveform: np.ndarray, size: int):
    return (waveform[i : i + size] for i in range(0, len(waveform), size))


def medians(model, waveform) -> dict[str, float]:
    """Thresholds at which every class has events."""
    scores = model.score_steps(waveform, EXTRACTOR)
    return dict(zip(scores.classes, np.median(scores.scores, axis=0).tolist()))


# --- events


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("hop", [0.16, 0.32, 0.64])
def test_sounds_are_found_where_they_are_also_where_they_overlap_and_across_windows(rate, hop):
    truth = [(0.32, 0.96, "low"), (0.64, 2.88, "high"), (1.28, 2.08, "low"), (3.52, 4.0, "high"), (3.84, 5.12, "low")]
    events = ToneDetector(rate).detect(tones(6.0, *truth), EXTRACTOR, hop=hop)
    # A frame of 25 ms reaches into the next step.
    assert [event.label for event in events] == [label for _, _, label in truth]
    for event, (start, end, _) in zip(events, truth):
        assert event.start == pytest.approx(start, abs=1 / rate * (rate > 6.25) + 1e-9)
        assert event.end == pytest.approx(end, abs=1 / rate * (rate > 6.25) + 1e-9)
        assert 0.5 < event.score <= 1


def test_settings_are_the_models_unless_overridden():
    waveform = tones(4.0, (0.32, 0.96, "low"), (1.28, 2.08, "low"), (2.56, 3.2, "high"))
    model = ToneDetector()
    assert len(model.detect(waveform, EXTRACTOR)) == 3
    model.config.event_detection = {"max_gap": 0.32}
    assert [event[:3] for event in model.detect(waveform, EXTRACTOR)] == [(0.32, 2.08, "low"), (2.56, 3.2, "high")]
    assert len(model.detect(waveform, EXTRACTOR, max_gap=0.0)) == 3
    assert [event.label for event in model.detect(waveform, EXTRACTOR, max_gap=0.0, min_duration={"low": 0.7})] == ["low", "high"]


@pytest.mark.parametrize("rate", RATES)
def test_detection_is_scores_and_then_events(rate):
    model, waveform = detector(steps_per_second=rate), recording(5.03)
    settings = {"threshold": medians(model, waveform), "median_filter": 0.3, "max_gap": 0.1, "min_duration": 0.2}
    events = model.detect(waveform, EXTRACTOR, **settings)
    scores = model.score_steps(waveform, EXTRACTOR)
    assert scores.duration == len(waveform) / RATE
    expected = find_events(scores.scores, scores.step, scores.classes, EventSettings.of(model.config, **settings), scores.duration)
    assert events == expected
    assert len(events) > 4
    streamed = list(model.detect_stream(in_blocks(waveform, 700), EXTRACTOR, batch_size=8, **settings))
    assert in_order(streamed, scores.classes) == events


# --- scores of steps


@pytest.mark.parametrize("rate", RATES)
def test_steps_are_means_over_windows_weighted_by_a_squared_sine(rate):
    waveform, model, finer = recording(3.0), detector(steps_per_second=rate), round(rate / 6.25)
    found = model.score_steps(waveform, EXTRACTOR, hop=0.32, batch_size=2)
    steps = math.ceil(298 * rate / 100)  # 298 frames
    assert found.scores.shape == (steps, 3)
    assert (found.step, found.duration, found.classes) == (1 / rate, 3.0, ["LABEL_0", "LABEL_1", "LABEL_2"])
    sums, weights = np.zeros((40 * finer, 3)), np.zeros((40 * finer, 1))
    fade = np.sin(np.pi * (np.arange(4 * finer) + 0.5) / (4 * finer))[:, None] ** 2
    for start in (0, 2, 4, 6, 8, 10, 12, 14, 15):
        window = waveform[start * GRID : start * GRID + WINDOW]
        inputs = EXTRACTOR(window, sampling_rate=RATE, padding="longest", return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            scores = model(**inputs).logits[0].sigmoid().numpy()
        rows = slice(start * finer, (start + 4) * finer)
        sums[rows] += fade * scores
        weights[rows] += fade
    np.testing.assert_allclose(found.scores, (sums / np.maximum(weights, 1e-9))[:steps], atol=1e-6)
    assert found.scores.std(0).max() > 0.05


def test_no_seam_is_seen_where_windows_meet():
    """The model sees nothing but the place in the window: with windows half over each other there is no jump."""

    class Place(ToneDetector):
        def forward(self, input_values, attention_mask=None, return_dict=True):
            place = torch.linspace(-4, 4, input_values.shape[1] // 16)
            return SSLAMFrameClassifierOutput(logits=place.expand(len(input_values), 2, -1).transpose(1, 2))

    extractor = SSLAMFeatureExtractor(max_length=256)  # 16 steps
    scores = Place().score_steps(noise(12.0), extractor).scores[8:-16, 0]
    assert np.abs(np.diff(scores)).max() < 0.2  # of a jump from 0.98 to 0.02 where windows are put side by side
    assert np.abs(np.diff(Place().score_steps(noise(12.0), extractor, hop=2.56).scores[:, 0])).max() > 0.9


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seconds", [0.03, 0.3, WINDOW / RATE, 0.7, 2.0])
@pytest.mark.parametrize("size", [7, 1000, WINDOW + 1])
def test_blocks_of_any_size_give_what_the_whole_gives(size, seconds, rate):
    waveform, model = recording(seconds), detector(steps_per_second=rate)
    whole = model.score_steps(waveform, EXTRACTOR, batch_size=3)
    blocks = model.score_steps(in_blocks(waveform, size), EXTRACTOR, batch_size=3)
    np.testing.assert_array_equal(blocks.scores, whole.scores)
    assert blocks.duration == whole.duration == len(waveform) / RATE
    frames = 1 + (len(waveform) - 400) // 160
    assert len(whole.scores) == math.ceil(frames / (100 / rate))


@pytest.mark.parametrize("rate", RATES)
def test_padding_changes_no_score(rate):
    """The same recording in windows that are ever longer than it, beside another one in a batch."""
    model, waveform = detector(steps_per_second=rate), recording(0.53)
    inputs = EXTRACTOR(waveform, sampling_rate=RATE, padding="longest", return_attention_mask=True, return_tensors="pt")
    with torch.inference_mode():
        scores = model(**inputs).logits[0].sigmoid().numpy()
    for window in (0.64, 1.28, 2.56):
        found = model.score_steps(waveform, EXTRACTOR, window=window).scores
        np.testing.assert_allclose(found, scores[: len(found)], atol=1e-5)
    task = Detection(model.config, EXTRACTOR, Windowing.of_model(model.config, EXTRACTOR, per="step"))
    inputs = task.features([torch.from_numpy(waveform), torch.from_numpy(noise(0.655))])
    assert inputs["attention_mask"].shape == (2, 64)
    loud = torch.where(inputs["attention_mask"][..., None].bool(), inputs["input_values"], 9.0)
    for values in (inputs["input_values"], loud):
        found = task.compute(model, {**inputs, "input_values": values})[0]
        np.testing.assert_allclose(found[: math.ceil(51 * rate / 100)], scores[: math.ceil(51 * rate / 100)], atol=1e-5)


def test_half_precision_gives_float32_scores_close_to_the_full_ones():
    waveform, model = recording(2.0), detector()
    full = model.score_steps(waveform, EXTRACTOR).scores
    half = model.to(torch.bfloat16).score_steps(waveform, EXTRACTOR).scores
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, full, atol=0.03)


def test_the_model_is_as_it_was_while_and_after_it_scores():
    model = detector(classifier_dropout=0.9).train()
    thresholds = medians(model, recording(2.0))
    for _ in model.detect_stream(recording(2.0), EXTRACTOR, threshold=thresholds):
        assert all(module.training for module in model.modules())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    expected = detector(classifier_dropout=0.9).score_steps(recording(2.0), EXTRACTOR)
    np.testing.assert_array_equal(model.score_steps(recording(2.0), EXTRACTOR).scores, expected.scores)


# --- as a task of the batch runner


@pytest.mark.parametrize("rate", RATES)
def test_there_is_a_row_for_each_step_as_soon_as_it_is_final(rate):
    model, waveform, finer = detector(steps_per_second=rate), recording(4.0), round(rate / 6.25)
    task = Detection(model.config, EXTRACTOR, Windowing.of_model(model.config, EXTRACTOR, hop=0.32, per="step"))
    assert task.width == 3
    read, counts, rows = [], {}, []

    def results():
        for batch in prepare_batches(task.windows("a", waveform), task.features, 1):
            read.append(batch)
            yield from compute_batches([batch], lambda inputs: task.compute(model, inputs))

    for row in task.rows(results()):
        rows.append(row)
        counts[len(read)] = counts.get(len(read), 0) + 1
    steps = math.ceil(398 * rate / 100)
    assert list(counts.values()) == [1, *[2 * finer] * 10, steps - 20 * finer - 1]
    assert [row.start for row in rows] == pytest.approx([i / rate for i in range(steps)])
    assert [row.end for row in rows] == pytest.approx([min((i + 1) / rate, 4.0) for i in range(steps)])
    scores = model.score_steps(waveform, EXTRACTOR, hop=0.32, batch_size=1).scores
    np.testing.assert_array_equal(torch.stack([row.values for row in rows]), scores)


def test_windows_off_the_grid_cannot_be_merged():
    model = detector()
    with pytest.raises(ValueError, match="begin on the model's grid: make them by Windowing.of_model"):
        Detection(model.config, EXTRACTOR, Windowing.of_model(model.config, EXTRACTOR))


# --- cut at another place


@pytest.mark.parametrize("rate", RATES)
def test_events_do_not_depend_on_where_a_recording_was_cut(rate):
    """Away from the cuts: exactly, where they are multiples of the hop."""
    model, waveform = detector(steps_per_second=rate), np.concatenate([recording(4.0), noise(8.0, seed=1), recording(4.0)])
    settings = {"threshold": medians(model, waveform), "median_filter": 0.4, "max_gap": 0.1, "batch_size": 1}
    whole = model.detect(waveform, EXTRACTOR, **settings)
    for first in (GRID * 2, GRID * 26):  # hops of 2 steps
        offset, end = first / RATE, len(waveform) / RATE - 3.17
        part = model.detect(waveform[first : round(end * RATE)], EXTRACTOR, **settings)
        shifted = [(event.start + offset, event.end + offset, event.label, event.score) for event in part]
        # A window, half the filter and a gap after the first cut and before the last.
        inside = [event for event in whole if event.start > offset + 1 and event.end < end - 1]
        moved = [event for event in shifted if event[0] > offset + 1 and event[1] < end - 1]
        assert [event[2:] for event in moved] == [event[2:] for event in inside]
        assert [event[:2] for event in moved] == [(pytest.approx(event.start), pytest.approx(event.end)) for event in inside]
        assert len(inside) > 5


# --- a live source


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(("hop", "window", "batch_size"), [(0.32, 0.64, 1), (0.16, 1.28, 1), (0.32, 0.96, 3), (0.64, 0.64, 2)])
def test_an_event_comes_within_the_stated_delay(rate, hop, window, batch_size):
    starts = np.arange(0, 30, 1.24)  # at many places of a hop
    waveform = tones(30.0, *((start, start + 0.6, "low") for start in starts))
    model, block, read = ToneDetector(rate), 160, 0
    options = {"hop": hop, "window": window, "batch_size": batch_size, "median_filter": 0.48, "max_gap": 0.16}

    def microphone():
        nonlocal read
        for part in in_blocks(waveform, block):
            read += len(part)
            yield part
        read = -1

    waited = []
    for event in model.detect_stream(microphone(), EXTRACTOR, **options):
        if read >= 0:
            waited.append(read / RATE - event.end)
    delay = model.detection_delay(EXTRACTOR, **options)
    assert len(waited) > 15
    assert delay - 2 / rate - 1e-6 <= max(waited) <= delay + block / RATE


def test_the_delay_is_a_window_a_hop_and_what_the_settings_need():
    model, extractor = ToneDetector(), SSLAMFeatureExtractor(max_length=256)
    # A window of 2.56 s and the 25 ms that its last frame and the next one need, a hop less a step.
    assert model.detection_delay(extractor, hop=0.16) == pytest.approx(2.585)
    assert model.detection_delay(extractor) == pytest.approx(2.585 + 1.28 - 0.16)
    assert model.detection_delay(extractor, batch_size=4) == pytest.approx(2.585 + 4 * 1.28 - 0.16)
    assert model.detection_delay(extractor, hop=0.16, median_filter=0.8, max_gap=0.64) == pytest.approx(2.585 + 2 * 0.16 + 4 * 0.16)


def test_memory_is_flat_in_the_length_of_a_recording(monkeypatch):
    """Ten minutes in blocks of a second: one block is alive, samples of a batch of windows are held, and steps of a window."""
    alive, most, held, steps, join = weakref.WeakSet(), 0, [], [], torch.cat

    class Samples(np.ndarray):
        __hash__ = object.__hash__

    def blocks():
        nonlocal most
        for i in range(600):
            block = tones(1.0, (0.2, 0.7, "low")) if i % 10 == 3 else noise(1.0) * 1e-3
            block = block.view(Samples)
            alive.add(block)
            most = max(most, len(alive))
            yield block

    def counted(tensors, *args, **kwargs):
        shape = tensors[0].shape[1:]
        if len(shape) == 0:  # samples
            held.append(sum(map(len, tensors)))
        elif shape == (2,):  # scores of two classes
            steps.append(sum(map(len, tensors)))
        return join(tensors, *args, **kwargs)

    monkeypatch.setattr("transformers_sslam.windows_sslam.torch.cat", counted)
    model, extractor = ToneDetector(25), SSLAMFeatureExtractor(max_length=256)
    events = model.detect_stream(blocks(), extractor, batch_size=4, min_duration=0.4)
    assert sum(event.label == "low" for event in events) == 60
    assert most <= 2
    assert max(held) <= (4 * 1.28 + 2.575 + 1) * RATE
    assert max(steps) <= 2 * 64


# --- what is rejected


@pytest.mark.parametrize("method", ["score_steps", "detect", "detect_stream", "detection_delay"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop": 0.5}, "hop is 0.5 s, but for time steps it must be a multiple of 0.16 s"),
        ({"hop": 0.8}, "no longer than a window, 0.64 s"),
        ({"window": 1.0}, "window is 1.0 s, but must be a positive multiple of 0.16 s"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"sampling_rate": 44_100}, "sampling_rate is 44100 Hz, but the model takes 16000 Hz"),
        ({"threshold": 2.0}, "threshold is 2.0"),
        ({"min_length": 2.0}, "cannot have 'min_length'"),
    ],
)
def test_arguments_out_of_range_are_rejected_before_any_audio_is_read(method, options, message):
    audio = () if method == "detection_delay" else (iter(()),)
    events_only, audio_only = {"threshold", "min_length"} & set(options), {"sampling_rate"} & set(options)
    if (method == "score_steps" and events_only) or (method == "detection_delay" and audio_only):
        return
    with pytest.raises(ValueError, match=message):
        getattr(detector(), method)(*audio, EXTRACTOR, **options)


@pytest.mark.parametrize("method", ["score_steps", "detect"])
@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (lambda: iter([]), "the audio has 0 samples"),
        ([noise(1.0), noise(1.0)], "the audio is a list of 2, but one recording is expected: call this for each waveform"),
        (noise(0.02), "320 samples"),
        (np.zeros((2, 16_000), dtype=np.float32), r"shape \(2, 16000\)"),
        (np.zeros(16_000, dtype=np.int16), "dtype int16"),
        (lambda: iter([noise(1.0), np.full(8000, np.nan, dtype=np.float32)]), "the audio between 1.00 and 1.50 s holds NaN"),
    ],
)
def test_audio_that_cannot_be_scored_is_rejected(method, audio, message):
    with pytest.raises(ValueError, match=message):
        getattr(detector(), method)(audio() if callable(audio) else audio, EXTRACTOR)


@pytest.mark.parametrize("method", ["score_steps", "detect", "detect_stream"])
def test_another_extractor_is_rejected(method):
    with pytest.raises(ValueError, match="feature_extractor is a str, but the model's SSLAMFeatureExtractor is expected"):
        getattr(detector(), method)(noise(1.0), "model")


def test_scores_that_are_not_finite_are_an_error():
    model = detector()
    nn.init.constant_(model.frame_classifier.weight, math.nan)
    with pytest.raises(FloatingPointError, match="the audio, from sample 0 on, is not finite"):
        model.detect(noise(1.0), EXTRACTOR)


def test_results_of_windows_keep_the_weights_of_their_steps():
    """By hand: two windows of 4 steps, 2 apart; weights .146, .854, .854, .146."""
    model = detector()
    task = Detection(model.config, EXTRACTOR, Windowing.of_model(model.config, EXTRACTOR, per="step"))
    spans = [Span("a", 0, WINDOW), Span("a", 2 * GRID, WINDOW)]
    rows = list(task.rows(zip(spans, [torch.zeros(4, 3), torch.ones(4, 3)])))
    outer = math.sin(math.pi / 8) ** 2
    expected = [0, 0, outer / (outer + 1 - outer), (1 - outer) / (outer + 1 - outer), 1, 1]
    assert [row.values[0].item() for row in rows] == pytest.approx(expected)
