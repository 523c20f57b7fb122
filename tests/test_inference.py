"""Windows over long recordings, frame embeddings over time, and many clips: each as if alone, in memory that does not grow."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import noise, speech_like, tiny_config
from transformers import ASTFeatureExtractor

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification, SSLAMModel
from transformers_sslam.batching_sslam import compute_batches, prepare_batches
from transformers_sslam.pooling_sslam import POOLINGS, pooled_width
from transformers_sslam.tasks_sslam import Embedding
from transformers_sslam.windows_sslam import Windowing


RATE, STEP = 16_000, 2560  # samples in a second, and in a time step of 160 ms
FRAMES = 64
WINDOW = 63 * 160 + 400  # samples of 64 frames
EXTRACTOR = SSLAMFeatureExtractor(max_length=FRAMES)
SENSITIVE = {"initializer_range": 0.3, "classifier_pooling": "mean"}  # so random a network tells sounds apart


def classifier(**config) -> SSLAMForAudioClassification:
    torch.manual_seed(0)
    return SSLAMForAudioClassification(tiny_config(**{"num_labels": 3, **SENSITIVE, **config})).eval()


def recording(seconds: float) -> np.ndarray:
    return np.concatenate((noise(seconds / 2), speech_like(seconds / 2)))


def in_blocks(waveform: np.ndarray, size: int):
    return (waveform[i : i + size] for i in range(0, len(waveform), size))


@torch.inference_mode()
def alone(model, waveform, **options) -> tuple[np.ndarray, np.ndarray]:
    """Logits and the mean over frequency of the last hidden state of one clip, `(steps, hidden_size)`."""
    inputs = EXTRACTOR(waveform, sampling_rate=RATE, return_tensors="pt", **options)
    outputs = model(**inputs, output_hidden_states=True)
    return outputs.logits[0].numpy(), outputs.hidden_states[-1][0, 1:].unflatten(0, (-1, 8)).mean(1).numpy()


@pytest.mark.parametrize("part", ["sslam.embeddings", "sslam.layers", "classifier"])
def test_parts_may_be_offloaded(part, tmp_path):
    model, waveform = classifier(), recording(2.0)
    model.save_pretrained(tmp_path / "model")
    places = {name: "disk" if name == part else "cpu" for name in ("sslam.embeddings", "sslam.layers", "layernorm", "classifier")}
    offloaded = SSLAMForAudioClassification.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights")
    assert any(parameter.device.type == "meta" for parameter in offloaded.parameters())
    scores = offloaded.score_over_time(waveform, EXTRACTOR).scores
    np.testing.assert_array_equal(scores, model.score_over_time(waveform, EXTRACTOR).scores)
    assert torch.equal(offloaded.sslam.encode([waveform], EXTRACTOR), model.sslam.encode([waveform], EXTRACTOR))


# --- where windows lie


@pytest.mark.parametrize(
    ("samples", "starts"),
    [(50, [0]), (100, [0]), (101, [0, 1]), (140, [0, 40]), (180, [0, 40, 80]), (190, [0, 40, 80, 90])],
)
def test_windows_cover_a_recording_and_the_last_ends_with_it(samples, starts):
    assert Windowing(length=100, hop=40, frames=1, grid=None, sampling_rate=RATE).starts(samples) == starts


@pytest.mark.parametrize(
    ("frames", "starts"), [(1, [0]), (64, [0]), (65, [0, 1]), (80, [0, 1]), (81, [0, 2]), (96, [0, 2]), (97, [0, 2, 3]), (113, [0, 2, 4])]
)
def test_on_the_grid_of_frame_embeddings_the_last_window_holds_the_last_frame(frames, starts):
    windowing = Windowing(length=WINDOW, hop=2 * STEP, frames=64, grid=STEP, sampling_rate=RATE)
    assert [start / STEP for start in windowing.starts((frames - 1) * 160 + 400)] == starts


# --- scores


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_window_is_scored_as_a_clip_of_its_own(batch_size):
    waveform, model = recording(3.1), classifier()
    batches = list(model.score_windows(waveform, EXTRACTOR, hop=0.25, batch_size=batch_size))
    assert all(len(batch.scores) == batch_size for batch in batches[:-1])
    starts = [*range(0, len(waveform) - WINDOW, 4000), len(waveform) - WINDOW]
    assert np.concatenate([batch.starts for batch in batches]).tolist() == pytest.approx([start / RATE for start in starts])
    expected = torch.tensor(np.array([alone(model, waveform[start : start + WINDOW])[0] for start in starts])).softmax(1)
    scores = np.concatenate([batch.scores for batch in batches])
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert scores.std(0).max() > 0.01


@pytest.mark.parametrize("size", [7, 159, 1000, WINDOW, WINDOW + 1, 10**6])
@pytest.mark.parametrize("hop", [0.16, 0.64, 1.5])  # overlapping, side by side, with gaps
@pytest.mark.parametrize("seconds", [0.3, WINDOW / RATE, 2.0])
def test_blocks_of_any_size_give_what_the_whole_gives(size, hop, seconds):
    waveform, model = recording(seconds), classifier()
    options = {"hop": hop, "batch_size": 3}
    whole = model.score_over_time(waveform, EXTRACTOR, **options)
    blocks = model.score_over_time(in_blocks(waveform, size), EXTRACTOR, **options)
    np.testing.assert_array_equal(blocks.scores, whole.scores)
    np.testing.assert_array_equal(blocks.starts, whole.starts)
    assert blocks.duration == whole.duration == len(waveform) / RATE
    for per in ("clip", "window", *(("step",) if hop < 1 else ())):
        options = {"per": per, "hop": None if per == "clip" else hop, "batch_size": 3}
        whole, blocks = (model.sslam.encode([audio], EXTRACTOR, **options)[0] for audio in (waveform, in_blocks(waveform, size)))
        for one, other in zip(whole, blocks):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_producer_may_use_its_buffer_again(kind):
    waveform, model, buffer = recording(2.0), classifier(), np.empty(500, dtype=np.float32)

    def blocks():
        for block in in_blocks(waveform, len(buffer)):
            buffer[: len(block)] = block
            yield kind(buffer[: len(block)])

    expected = model.score_over_time(waveform, EXTRACTOR)
    np.testing.assert_array_equal(model.score_over_time(blocks(), EXTRACTOR).scores, expected.scores)


@pytest.mark.parametrize("convert", [np.float64, torch.tensor, lambda x: np.frombuffer(x.tobytes(), dtype=np.float32)])
def test_arrays_of_other_kinds_are_read_too(convert):
    waveform, model = recording(1.5), classifier()
    expected = model.score_over_time(waveform, EXTRACTOR).scores
    np.testing.assert_array_equal(model.score_over_time(convert(waveform), EXTRACTOR).scores, expected)


def test_windows_may_have_another_length():
    waveform, model = recording(3.0), classifier()
    heard = model.score_over_time(waveform, EXTRACTOR, window=1.28, hop=0.5)
    assert heard.window == (127 * 160 + 400) / RATE
    expected = alone(model, waveform[8000 : 8000 + 127 * 160 + 400], padding="longest")[0]
    np.testing.assert_allclose(heard.scores[1], torch.tensor(expected).softmax(0), atol=1e-6)


def test_windows_may_be_longer_in_frames_than_a_second_in_samples():
    model = classifier(max_length=16_000).eval()
    assert model.score_over_time(noise(0.5), EXTRACTOR, window=160.0).scores.shape == (1, 3)


def test_tags_have_sigmoids():
    waveform, model = recording(1.0), classifier(problem_type="multi_label_classification", num_labels=1)
    heard = model.score_over_time(waveform[:WINDOW], EXTRACTOR)
    np.testing.assert_allclose(heard.scores[0], 1 / (1 + np.exp(-alone(model, waveform[:WINDOW])[0])), atol=1e-6)


def test_names_given_as_text_stay_with_their_scores(tmp_path):
    """As they come from JSON: sorted as text, "10" would stand before "2"."""
    names = {i: f"class {i}" for i in range(12)}
    classifier(num_labels=3).save_pretrained(tmp_path)
    named = {"id2label": {str(i): name for i, name in names.items()}, "label2id": {name: str(i) for i, name in names.items()}}
    model = SSLAMForAudioClassification.from_pretrained(tmp_path, num_labels=12, ignore_mismatched_sizes=True, **named)
    assert model.config.id2label == names
    model.config.id2label = named["id2label"]  # and by hand, afterwards
    assert model.score_over_time(noise(1.0), EXTRACTOR).classes == list(names.values())


def test_a_configuration_for_tuples_does_not_matter():
    model = classifier()
    waveform = noise(1.0)
    expected, vector = model.score_over_time(waveform, EXTRACTOR).scores, model.sslam.encode([waveform], EXTRACTOR)
    model.config.return_dict = False
    assert isinstance(model(**EXTRACTOR(waveform, sampling_rate=RATE, return_tensors="pt")), tuple)
    np.testing.assert_array_equal(model.score_over_time(waveform, EXTRACTOR).scores, expected)
    assert torch.equal(model.sslam.encode([waveform], EXTRACTOR), vector)


@pytest.mark.parametrize(("setting", "value", "usual"), [("device", "meta", None), ("dtype", torch.bfloat16, torch.float32)])
def test_results_do_not_depend_on_torchs_defaults(setting, value, usual):
    model, detector = classifier(), SSLAMForAudioFrameClassification(tiny_config(**SENSITIVE)).eval()
    clips, log_mels = [recording(1.5), recording(0.3)], [{"input_values": np.zeros((frames, 128), np.float32)} for frames in (20, 40)]

    def results() -> list[torch.Tensor]:
        rows = [vectors for vectors, _, _ in model.sslam.encode(clips, EXTRACTOR, per="step")]
        scores = [model.score_over_time(clips[0], EXTRACTOR).scores, detector.score_steps(clips[0], EXTRACTOR).scores]
        scores.extend(EXTRACTOR.pad(log_mels, padding="longest")["input_values"])
        rows += [model.sslam.encode(some, EXTRACTOR, pooling="mean_and_std") for some in (clips, [])]
        return rows + list(map(torch.from_numpy, scores))

    expected, change = results(), getattr(torch, f"set_default_{setting}")
    change(value)
    try:
        found = results()
    finally:
        change(usual)
    for actual, other in zip(found, expected, strict=True):
        assert actual.device.type == "cpu"
        assert actual.dtype == other.dtype
        assert torch.equal(actual, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_results_close_to_the_full_ones(dtype):
    waveform, model = recording(2.0), classifier(initializer_range=0.1)
    full, vectors = model.score_over_time(waveform, EXTRACTOR, hop=0.64), model.sslam.encode([waveform], EXTRACTOR)
    half = model.to(dtype).score_over_time(waveform, EXTRACTOR, hop=0.64)
    assert half.scores.dtype == np.float32
    np.testing.assert_allclose(half.scores, full.scores, atol=0.02)
    half = model.sslam.encode([waveform], EXTRACTOR)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, vectors, atol=0.05, rtol=0.05)


def test_the_training_flags_are_as_they_were_between_batches_and_afterwards():
    model = classifier(classifier_dropout=0.9, drop_path_rate=0.5).train()
    model.sslam.layers[0].eval()  # frozen by its owner
    before = [module.training for module in model.modules()]
    for _ in range(2):
        for _ in model.score_windows(recording(2.0), EXTRACTOR, batch_size=1):
            assert [module.training for module in model.modules()] == before
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
    model.sslam.encode([noise(0.3)], EXTRACTOR)
    assert [module.training for module in model.modules()] == before
    expected = classifier(classifier_dropout=0.9, drop_path_rate=0.5).score_over_time(recording(2.0), EXTRACTOR)
    np.testing.assert_array_equal(model.score_over_time(recording(2.0), EXTRACTOR).scores, expected.scores)
    assert not model.sslam._forward_hooks


# --- embeddings over time


def over_time(model, waveform, **options):
    return model.sslam.encode([waveform], EXTRACTOR, **options)[0]


def test_time_steps_are_means_over_the_windows_that_hold_them():
    waveform, model = recording(3.0), classifier()
    steps = over_time(model, waveform, per="step", hop=0.32, batch_size=2)
    assert steps.vectors.shape == (19, 32)  # 298 frames
    assert steps.starts.tolist() == pytest.approx([i * 0.16 for i in range(19)])
    assert steps.ends.tolist() == pytest.approx([*((i + 1) * 0.16 for i in range(18)), 3.0])
    sums, counts = np.zeros((40, 32)), np.zeros((40, 1))
    for start in (0, 2, 4, 6, 8, 10, 12, 14, 15):  # steps; 298 frames end within the last window, 240 + 58
        window = waveform[start * STEP : start * STEP + WINDOW]
        found = alone(model, window, padding="longest", return_attention_mask=True)[1]
        sums[start : start + 4] += found
        counts[start : start + 4] += 1
    np.testing.assert_allclose(steps.vectors, (sums / np.maximum(counts, 1))[:19], atol=1e-5)
    assert steps.vectors.std(0).max() > 0.1


def test_windows_side_by_side_have_the_embeddings_of_each_alone():
    waveform, model = recording(2.0), classifier()
    steps = over_time(model, waveform, per="step", hop=0.64)
    np.testing.assert_allclose(steps.vectors[4:8], alone(model, waveform[4 * STEP : 4 * STEP + WINDOW])[1], atol=1e-5)


def test_of_a_short_recording_only_what_sounds_has_embeddings_and_padding_is_masked():
    waveform, model = noise(0.3), classifier()  # 28 frames: two steps
    steps = over_time(model, waveform, per="step", hop=0.64)
    expected = alone(model, waveform, padding="longest", return_attention_mask=True)[1]
    np.testing.assert_allclose(steps.vectors, expected[:2], atol=1e-5)
    assert (steps.starts.tolist(), steps.ends.tolist()) == ([0.0, 0.16], [0.16, 0.3])


def test_time_steps_come_as_soon_as_no_later_window_adds_to_them():
    model, extractor = classifier().sslam, EXTRACTOR
    task = Embedding(model.config, extractor, Windowing.of_model(model.config, extractor, hop=0.32, per="step"), per="step")
    read = []

    def results():
        for batch in prepare_batches(task.windows("a", recording(4.0)), task.features, 1):
            read.append(batch)
            yield from compute_batches([batch], lambda inputs: task.compute(model, inputs))

    counts = {}
    for _ in task.rows(results()):
        counts[len(read)] = counts.get(len(read), 0) + 1
    assert list(counts.values()) == [1, *[2] * 10, 4]  # up to where the latest window begins; of the last window all


def test_windows_have_their_times_and_the_vectors_of_clips_of_their_own():
    waveform, model = recording(1.6), classifier()
    windows = over_time(model, waveform, per="window", hop=0.5, batch_size=2)
    assert windows.starts.tolist() == pytest.approx([0, 0.5, (len(waveform) - WINDOW) / RATE])
    assert (windows.ends - windows.starts).tolist() == pytest.approx([WINDOW / RATE] * 3)
    torch.testing.assert_close(
        windows.vectors, model.sslam.encode([waveform[s : s + WINDOW] for s in (0, 8000, len(waveform) - WINDOW)], EXTRACTOR)
    )


@pytest.mark.parametrize("per", ["clip", "step"])
def test_any_layers_may_be_taken_and_are_concatenated(per):
    waveform, model = noise(0.655), classifier()
    with torch.inference_mode():
        hidden = model.sslam(**EXTRACTOR(waveform, sampling_rate=RATE, return_tensors="pt"), output_hidden_states=True).hidden_states
    grids = [hidden[layer][0, 1:].unflatten(0, (4, 8)) for layer in (0, 1, 2)]
    expected = torch.cat([grid.mean((0, 1)) if per == "clip" else grid.mean(1) for grid in grids], dim=-1)
    options = {"per": per, "pooling": "mean", "layers": [0, 1, -1], **({"hop": 0.64} if per == "step" else {})}
    found = over_time(model, waveform, **options)
    torch.testing.assert_close(found if per == "clip" else found.vectors, expected, atol=1e-5, rtol=1e-5)


def test_the_cls_token_and_all_patches_of_a_step_may_be_taken():
    waveform, model = noise(0.655), classifier()
    with torch.inference_mode():
        tokens = model.sslam(**EXTRACTOR(waveform, sampling_rate=RATE, return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(over_time(model, waveform, pooling="cls"), tokens[0], atol=1e-5, rtol=1e-5)
    found = over_time(model, waveform, per="step", pooling="patches", hop=0.64).vectors
    torch.testing.assert_close(found, tokens[1:].reshape(4, 8 * 32), atol=1e-5, rtol=1e-5)


# --- memory


def test_memory_is_flat_in_the_length_of_a_recording(monkeypatch):
    """Half an hour in blocks of a second: of the blocks one is alive, and of samples never more than a batch of windows spans."""
    hop, batch_size = 8.0, 4
    alive, most, held, join = weakref.WeakSet(), 0, [], torch.cat

    class Samples(np.ndarray):
        __hash__ = object.__hash__

    def blocks():
        nonlocal most
        for i in range(1800):
            block = noise(1.0, seed=i).view(Samples)
            alive.add(block)
            most = max(most, len(alive))
            yield block

    def counted(tensors, *args, **kwargs):
        if tensors[0].dim() == 1:
            held.append(sum(map(len, tensors)))
        return join(tensors, *args, **kwargs)

    monkeypatch.setattr("transformers_sslam.windows_sslam.torch.cat", counted)
    windows = sum(len(batch.starts) for batch in classifier().score_windows(blocks(), EXTRACTOR, hop=hop, batch_size=batch_size))
    assert windows == 1 + 225  # those that begin each 8 s and end before the end, and the last one
    assert most <= 2
    assert max(held) <= batch_size * hop * RATE + WINDOW + RATE


# --- clips


@pytest.mark.parametrize("pooling", list(POOLINGS))
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_each_clip_is_encoded_as_if_alone_and_in_its_place(pooling, batch_size):
    model = SSLAMModel(tiny_config(**SENSITIVE | {"classifier_pooling": pooling, "padding_value": 0.46706})).eval()
    extractor = SSLAMFeatureExtractor(max_length=256)
    clips = [noise(seconds, seed=i) for i, seconds in enumerate((2.5, 0.1, 1.0, 0.03, 1.7, 1.0, 0.5, 2.56))]
    vectors = model.encode(clips, extractor, batch_size=batch_size)
    assert (vectors.shape, vectors.dtype, vectors.device.type) == ((8, pooled_width(pooling, model.config)), torch.float32, "cpu")
    for clip, vector in zip(clips, vectors):
        inputs = extractor(clip, sampling_rate=RATE, padding="longest", return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            expected = model(**inputs).pooler_output[0]
        torch.testing.assert_close(vector, expected, atol=1e-5, rtol=1e-5)


def test_batches_hold_similar_lengths_in_few_shapes_and_a_mask_only_with_padding(monkeypatch):
    seen, forward = [], SSLAMModel.forward

    def recorded(self, input_values, attention_mask=None, **kwargs):
        seen.append((*input_values.shape[:2], attention_mask is not None))
        return forward(self, input_values, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(SSLAMModel, "forward", recorded)

    def clip(frames):
        return noise(((frames - 1) * 160 + 400) / RATE)

    extractor = SSLAMFeatureExtractor(max_length=240)
    clips = [clip(frames) for frames in (200, 32, 150, 64, 130, 32, 20, 225)]
    SSLAMModel(tiny_config()).eval().encode(clips, extractor, batch_size=2)
    # sorted 20 32 | 32 64 | 130 150 | 200 225: two steps; 64 = 4 * 16; 150 up to 160 = 5 * 32; 225 up to 256, but at most 240
    assert seen == [(2, 32, True), (2, 64, True), (2, 160, True), (2, 240, True)]
    seen.clear()
    SSLAMModel(tiny_config()).eval().encode([clip(208), clip(208), clip(200)], extractor, batch_size=2)
    assert seen == [(2, 208, True), (1, 208, False)]


def test_a_lazy_sequence_is_read_once_and_never_held_whole():
    reads, alive, most = [], weakref.WeakSet(), 0

    class Lazy:
        def __len__(self):
            return 100

        def __getitem__(self, i):
            nonlocal most
            reads.append(i)
            clip = torch.from_numpy(noise(0.1, seed=i))
            alive.add(clip)
            most = max(most, len(alive))
            return clip

    model = SSLAMModel(tiny_config()).eval()
    vectors = model.encode(Lazy(), EXTRACTOR, batch_size=1)
    assert reads == list(range(100))
    assert most <= 2
    torch.testing.assert_close(vectors[77], model.encode([noise(0.1, seed=77)], EXTRACTOR)[0], atol=1e-5, rtol=0)


def test_a_clip_that_is_too_long_is_the_mean_of_its_pieces_by_their_frames():
    model, clip = SSLAMModel(tiny_config(**SENSITIVE)).eval(), recording(1.6)  # 158 frames: 64, 64 and 30
    pieces = [clip[start : start + WINDOW] for start in (0, 64 * 160, 128 * 160)]
    first, second, rest = model.encode(pieces, EXTRACTOR)
    torch.testing.assert_close(model.encode([clip], EXTRACTOR)[0], (64 * first + 64 * second + 30 * rest) / 158, atol=1e-5, rtol=1e-5)


def test_the_maximum_of_a_clip_that_is_too_long_is_over_all_its_pieces():
    model, clip = SSLAMModel(tiny_config(**SENSITIVE)).eval(), recording(1.6)
    pieces = [clip[start : start + WINDOW] for start in (0, 64 * 160, 128 * 160)]
    options = {"layers": [1, 2], "pooling": "mean_and_max_by_frequency"}
    parts, whole = (model.encode(clips, EXTRACTOR, **options).unflatten(1, (2, 2, 8 * 32)) for clips in (pieces, [clip]))
    weights = torch.tensor([64, 64, 30])[:, None, None] / 158
    torch.testing.assert_close(whole[0, :, 0], (weights * parts[:, :, 0]).sum(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[0, :, 1], parts[:, :, 1].amax(0), atol=1e-5, rtol=1e-5)
    assert len(parts[:, :, 1].argmax(0).unique()) == 3  # each piece has some of the maxima


def test_no_clip_has_no_vector():
    assert SSLAMModel(tiny_config()).encode([], EXTRACTOR).shape == (0, 32)


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hop": 0.0}, "hop is 0.0 s"),
        ({"hop": float("nan")}, "hop is nan s"),
        ({"hop": -1.0}, "hop is -1.0 s"),
        ({"window": 1.0}, "window is 1.0 s, but must be a positive multiple of 0.16 s"),
        ({"window": 0.0}, "window is 0.0 s"),
        ({"window": 3.2}, "a window of 3.2 s gives 320 frames .* up to 256, 2.56 s, is expected"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": float("nan")}, "batch_size is nan, but must be a whole number"),
        ({"batch_size": "8"}, "batch_size is '8'"),
        ({"hop": "1"}, "hop is '1' s, but must be a number"),
        ({"hop": True}, "hop is True s, but must be a number"),
        ({"window": "1"}, "window is '1' s, but must be a number"),
        ({"sampling_rate": 44_100}, "sampling_rate is 44100 Hz, but the model takes 16000 Hz"),
    ],
)
def test_arguments_out_of_range_are_refused_before_any_audio_is_read(options, message):
    with pytest.raises(ValueError, match=message):
        classifier().score_windows(iter(()), EXTRACTOR, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "step", "hop": 1.0}, "hop is 1.0 s, but for time steps it must be a multiple of 0.16 s"),
        ({"per": "step", "hop": 0.8}, "no longer than a window, 0.64 s"),
        ({"hop": 0.64}, "hop is 0.64 s, but windows of a whole clip do not overlap"),
        ({"per": "second"}, "per is 'second', but one of 'clip', 'window', 'step' is expected"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"pooling": "patches"}, "all patches are kept of a time step only"),
        ({"per": "step", "pooling": "cls"}, "pooling is 'cls' and per is 'step', but a time step has the 'mean' of its patches"),
        ({"layers": []}, r"layers is \[\], but numbers from -3 to 2"),
        ({"layers": [3]}, r"layers is \[3\]"),
        ({"layers": -1}, "layers is -1, but numbers from -3 to 2 are expected, in a list"),
        ({"layers": "all"}, "layers is 'all'"),
        ({"layers": [1.0]}, r"layers is \[1.0\]"),
        ({"layers": [-4]}, r"layers is \[-4\]"),
        ({"sampling_rate": 44_100}, "sampling_rate is 44100 Hz, but the model takes 16000 Hz"),
    ],
)
def test_embeddings_that_cannot_be_made_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SSLAMModel(tiny_config()).encode([noise(1.0)], EXTRACTOR, **options)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, dtype=np.float32), "the audio has 0 samples"),
        (iter([]), "the audio has 0 samples"),
        ([noise(1.0), noise(1.0)], "the audio is a list of 2, but one recording is expected: call this for each waveform"),
        ((noise(1.0),), "the audio is a tuple of 1"),
        ("a.wav", "the audio is the path 'a.wav', not a waveform"),
        (Path("a.wav"), "the audio is the path 'a.wav', not a waveform"),
        (None, "the audio is a NoneType, but a 1-D array of samples, or an iterable of such arrays, is expected$"),
        (np.float32(0), "the audio is a float32, but"),
        ({"array": noise(1.0), "sampling_rate": 16_000}, 'the audio is a dict, but .* of an example of a data set give its "array"'),
        (noise(0.02), "320 samples"),
        (np.zeros((2, 16_000), dtype=np.float32), r"shape \(2, 16000\)"),
        (iter([0.1, 0.2]), "is a float"),
        (np.zeros(16_000, dtype=np.int16), "dtype int16"),
        (np.zeros(16_000, dtype=np.complex64), "dtype complex64"),
        (np.ma.masked_less(noise(1.0), 0), "is a masked array"),
        (noise(1.0) * 1e4, "has a peak of"),
        (iter([noise(1.0), np.full(8000, np.nan, dtype=np.float32)]), "the audio between 1.00 and 1.50 s holds NaN"),
    ],
)
def test_audio_that_cannot_be_scored_is_refused(audio, message):
    with pytest.raises(ValueError, match=message):
        list(classifier().score_windows(audio, EXTRACTOR))


@pytest.mark.parametrize("config", [{"problem_type": "regression"}, {"num_labels": 1}])
def test_regression_has_no_scores(config):
    with pytest.raises(ValueError, match="is not a choice between classes"):
        classifier(**config).score_windows(noise(1.0), EXTRACTOR)


def test_scores_that_are_not_finite_are_an_error():
    model = classifier()
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the audio, from sample 0 on, is not finite"):
        list(model.score_windows(noise(1.0), EXTRACTOR))


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        ([noise(1.0), noise(0.02)], "clip 1 has 320 samples"),
        (noise(1.0), r"clips is an array of shape \(16000,\): give a list of 1-D arrays, also for one clip"),
        (np.zeros(0), r"clips is an array of shape \(0,\)"),
        (np.stack([noise(1.0)] * 2), r"an array of shape \(2, 16000\) may be two clips or the two channels of one"),
        (list(noise(1.0)), "clip 0 is a single number"),
        ([None], "clip 0 is a NoneType: give a list of 1-D arrays"),
        ([noise(1.0) > 0], "clip 0 has dtype bool"),
        ({"array": noise(1.0)}, "clips is a dict, but a list of waveforms is expected"),
        ([{"array": noise(1.0)}], "clip 0 is a dict: give a list of 1-D arrays"),
        ("rain.wav", "clips is a str, but a list of waveforms is expected.*load_waveform"),
        (Path("rain.wav"), "clips is a PosixPath, but a list"),
        ((noise(1.0) for _ in range(2)), "clips is a generator, but a list .* make a list of what a generator yields"),
        ([noise(1.0), "rain.wav"], "clip 1 is the path 'rain.wav', not a waveform: read it with transformers_sslam.audio.load_waveform"),
        ([noise(1.0), np.full(8000, np.nan, dtype=np.float32)], "clip 1 holds NaN"),
        ([noise(1.0), np.ma.masked_less(noise(1.0), 0)], "clip 1 is a masked array"),
    ],
)
def test_clips_that_cannot_be_encoded_are_named(clips, message):
    with pytest.raises(ValueError, match=message):
        SSLAMModel(tiny_config()).encode(clips, EXTRACTOR, batch_size=1)


@pytest.mark.parametrize("extractor", ["model", None, ASTFeatureExtractor()], ids=lambda value: type(value).__name__)
def test_another_extractor_is_refused(extractor):
    message = f"feature_extractor is a {type(extractor).__name__}, but the model's SSLAMFeatureExtractor is expected"
    for method in (classifier().score_over_time, classifier().score_windows, SSLAMModel(tiny_config()).encode):
        with pytest.raises(ValueError, match=message):
            method(noise(1.0), extractor)


@pytest.mark.parametrize("batch_size", [0, 1.5, float("nan"), "8", None, True])
def test_batches_of_clips_are_whole_numbers(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size!r}, but must be a whole number"):
        SSLAMModel(tiny_config()).encode([noise(1.0)], EXTRACTOR, batch_size=batch_size)


def test_an_extractor_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="max_length gives 512 frames .* up to 256"):
        SSLAMModel(tiny_config()).encode([noise(1.0)], SSLAMFeatureExtractor(max_length=512))


@pytest.mark.parametrize(("frames", "seconds"), [(1024, 5.12), (128, 0.64), (48, 0.16), (16, 0.16)])
def test_windows_overlap_by_half_unless_told_otherwise(frames, seconds):
    extractor = SSLAMFeatureExtractor(max_length=frames)
    model = SSLAMForAudioClassification(tiny_config(num_labels=3, max_length=1024)).eval()
    for starts in (
        np.concatenate([batch.starts for batch in model.score_windows(recording(4 * frames / 100), extractor)]),
        model.sslam.encode([recording(4 * frames / 100)], extractor, per="window")[0].starts,
    ):
        assert np.diff(starts)[:-1] == pytest.approx(seconds)


def test_batches_are_padded_to_whole_patches_of_any_size():
    model = SSLAMModel(tiny_config(patch_size=12, num_mel_bins=96, max_length=240)).eval()
    extractor = SSLAMFeatureExtractor(num_mel_bins=96, max_length=240, pad_to_multiple_of=12)
    clips = [noise(0.6), noise(1.0, seed=1), noise(2.3, seed=2)]
    vectors = model.encode(clips, extractor)
    for clip, vector in zip(clips, vectors):
        torch.testing.assert_close(model.encode([clip], extractor)[0], vector, rtol=1e-4, atol=1e-5)


def test_vectors_that_are_not_finite_are_refused():
    model = SSLAMModel(tiny_config()).eval()
    model.layers[1].mlp.fc2.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="clip 0, from sample 0 on, is not finite"):
        model.encode([noise(0.5)], EXTRACTOR)
