"""The feature extractor: definition of the input, lengths, masks, and a plain word about whatever is not a clip."""

import numpy as np
import pytest
import torch
from conftest import noise, speech_like
from transformers.utils import logging

from transformers_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from transformers_sslam.fbank import log_mel


PADDING = (0 + 4.268) / (2 * 4.569)


@pytest.fixture
def extractor() -> SSLAMFeatureExtractor:
    return SSLAMFeatureExtractor()


def test_the_published_definition(extractor):
    """Minus the clip's mean, log-mel, zero-padded to 1024 frames, and only then scaled."""
    clip = noise(10.0) + 0.25
    values = extractor(clip, sampling_rate=16_000, return_tensors="pt")["input_values"]
    tensor = torch.from_numpy(clip)
    expected = (log_mel(tensor - tensor.mean()) + 4.268) / (2 * 4.569)
    assert values.shape == (1, 1024, 128)
    assert values.dtype == torch.float32
    assert torch.equal(values[0, :998], expected)
    torch.testing.assert_close(values[0, 998:], torch.full((26, 128), PADDING))


def test_clips_are_cut_to_the_length_and_centred_as_a_whole(extractor, caplog):
    clip = np.concatenate([noise(11.0), noise(11.0) + 0.5]).astype(np.float32)
    values = extractor(clip, sampling_rate=16_000, return_tensors="pt")["input_values"][0]
    tensor = torch.from_numpy(clip)
    expected = (log_mel(tensor - tensor.mean())[:1024] + 4.268) / (2 * 4.569)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=0)


def test_cutting_is_warned_about_once_whatever_the_lengths(caplog):
    logging.warning_once.cache_clear()  # another test may have had this warning
    extractor = SSLAMFeatureExtractor(max_length=48)
    for seconds in (0.6, 0.7, 0.8):
        extractor(noise(seconds), sampling_rate=16_000)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "more than 48 frames (10 ms each) are cut to the first 0.48 s" in caplog.text
    assert "`score_over_time` of a classifier or `sslam tag`" in caplog.text


@pytest.mark.parametrize(
    ("padding", "max_length", "frames"),
    [
        ("max_length", None, 1024),
        ("longest", None, 208),
        (True, None, 208),
        (512, None, 512),
        ("max_length", 256, 256),
        ("longest", 128, 128),
    ],
)
def test_lengths(extractor, padding, max_length, frames):
    clips = [noise(0.5), noise(2.0)]  # 48 and 198 frames
    out = extractor(clips, sampling_rate=16_000, padding=padding, max_length=max_length, return_attention_mask=True, return_tensors="np")
    assert out["input_values"].shape == (2, frames, 128)
    assert out["attention_mask"].shape == (2, frames)
    assert out["attention_mask"].sum(1).tolist() == [48, min(198, frames)]
    assert (np.diff(out["attention_mask"], axis=1) <= 0).all()


def test_no_padding_keeps_every_clip_as_long_as_it_is(extractor):
    out = extractor([noise(0.5), noise(2.0)], sampling_rate=16_000, padding=False)
    assert [value.shape for value in out["input_values"]] == [(48, 128), (198, 128)]
    with pytest.raises(ValueError, match=r"\[48, 198\].*padding"):
        extractor([noise(0.5), noise(2.0)], sampling_rate=16_000, padding=False, return_tensors="pt")


@pytest.mark.parametrize("signal", [noise, speech_like])
def test_a_batch_equals_its_clips(extractor, signal):
    clips = [signal(seconds) for seconds in (0.1, 1.0, 3.3, 10.0, 30.0)]
    batch = extractor(clips, sampling_rate=16_000, padding="longest", return_tensors="pt")["input_values"]
    for row, clip in zip(batch, clips):
        one = extractor(clip, sampling_rate=16_000, padding="longest", return_tensors="pt")["input_values"][0]
        assert torch.equal(row[: len(one)], one)
        torch.testing.assert_close(row[len(one) :], torch.full_like(row[len(one) :], PADDING))


def test_batched_as_on_an_accelerator_equals_clip_by_clip(extractor, monkeypatch):
    """The one path that a CPU does not take by itself: clips of unequal length, padded into one batch of waveforms."""
    clips = [torch.from_numpy(noise(seconds, seed=3)) for seconds in (0.1, 1.0, 3.3)]
    expected = extractor._log_mels(clips, [8, 98, 50])

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    from transformers_sslam import feature_extraction_sslam as module

    monkeypatch.setattr(module, "log_mel", lambda batch, *sizes: log_mel(batch.as_subclass(torch.Tensor), *sizes))
    actual = extractor._log_mels([clip.as_subclass(Elsewhere) for clip in clips], [8, 98, 50])
    assert [len(frames) for frames in actual] == [8, 98, 50]
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a.as_subclass(torch.Tensor), e, atol=1e-5, rtol=0)


def test_arrays_tensors_and_lists_are_the_same_clip(extractor):
    clip = noise(0.2)
    readonly = clip.copy()
    readonly.flags.writeable = False
    kinds = [
        clip,
        torch.from_numpy(clip),
        clip.tolist(),
        readonly,
        [clip],
        clip[None],
        np.repeat(clip, 2)[::2],
        torch.from_numpy(clip)[None],
        [torch.from_numpy(clip)[None]],  # of `torchaudio.load`
        clip[::-1].copy()[::-1],
        clip.astype(">f4"),
        clip.astype(np.longdouble),
    ]
    values = [extractor(kind, sampling_rate=16_000, padding="longest", return_tensors="np")["input_values"] for kind in kinds]
    assert all(np.array_equal(value, values[0]) for value in values)
    assert values[0].shape == (1, 32, 128)
    double = extractor(clip.astype(np.float64), sampling_rate=16_000, padding="longest", return_tensors="np")["input_values"]
    assert double.dtype == np.float32
    np.testing.assert_array_equal(double, values[0])


def test_without_return_tensors_numpy_arrays_come_back(extractor):
    out = extractor([noise(0.2)], sampling_rate=16_000, return_attention_mask=True)
    assert isinstance(out["input_values"], list)
    assert isinstance(out["input_values"][0], np.ndarray)
    assert out["attention_mask"][0].dtype == np.int32


def test_a_data_collator_pads_log_mels_as_the_extractor_does(extractor):
    """`pad` on log-mels that were left unpadded, as a Trainer's collator does it for each batch."""
    clips = [noise(0.5), noise(2.0)]
    unpadded = [extractor(clip, sampling_rate=16_000, padding=False, return_attention_mask=True) for clip in clips]
    examples = [{name: values[0] for name, values in example.items()} for example in unpadded]
    padded = extractor.pad(examples, padding="longest", return_tensors="pt", return_attention_mask=True)
    expected = extractor(clips, sampling_rate=16_000, padding="longest", return_attention_mask=True, return_tensors="pt")
    assert torch.equal(padded["input_values"], expected["input_values"])
    assert torch.equal(padded["attention_mask"], expected["attention_mask"])


def test_a_data_collator_leaves_what_is_longer_and_pads_to_its_own_multiple(extractor):
    examples = [
        {"input_values": extractor(noise(seconds), sampling_rate=16_000, padding=False)["input_values"][0]} for seconds in (0.5, 1.1)
    ]
    assert [len(values) for values in extractor.pad(examples[1:], padding="max_length", max_length=64)["input_values"]] == [108]
    padded = extractor.pad(examples, padding="longest", pad_to_multiple_of=64, return_tensors="np")
    assert padded["input_values"].shape == (2, 128, 128)


def test_a_length_in_frames_may_be_as_large_as_a_length_in_samples():
    """Where clips are cut to it, where nothing is padded to it, as a number to pad to, and where the extractor was built with it."""
    long = noise(170.0)
    cut = SSLAMFeatureExtractor()(long, sampling_rate=16_000, max_length=16_000, return_tensors="np")
    assert cut["input_values"].shape == (1, 16_000, 128)
    longest = SSLAMFeatureExtractor()(noise(0.5), sampling_rate=16_000, padding="longest", max_length=16_000, return_tensors="np")
    assert longest["input_values"].shape == (1, 48, 128)
    padded = SSLAMFeatureExtractor()(noise(0.5), sampling_rate=16_000, padding=16_000, return_tensors="np")
    assert padded["input_values"].shape == (1, 16_000, 128)
    built = SSLAMFeatureExtractor(max_length=16_000)(noise(0.5), sampling_rate=16_000, return_tensors="np")
    assert built["input_values"].shape == (1, 16_000, 128)


def test_presets_hold_the_published_numbers():
    assert set(NORMALIZATION_PRESETS) == {"audioset", "esc50", "speech_commands"}
    esc50 = SSLAMFeatureExtractor.from_preset("esc50")
    assert (esc50.mean, esc50.std, esc50.max_length) == (-6.627, 5.359, 512)
    speech = SSLAMFeatureExtractor.from_preset("speech_commands", max_length=256)
    assert (speech.mean, speech.std, speech.max_length) == (-6.846, 5.565, 256)
    with pytest.raises(ValueError, match="'esc10'.*audioset"):
        SSLAMFeatureExtractor.from_preset("esc10")


def test_mean_and_deviation_of_a_data_set(extractor):
    clips = [noise(0.5), noise(2.0, seed=1) * 5, speech_like(1.0)]
    mean, std = extractor.compute_normalization(iter(clips))
    everything = np.concatenate(
        [SSLAMFeatureExtractor(do_normalize=False)(c, sampling_rate=16_000, padding=False)["input_values"][0].ravel() for c in clips]
    ).astype(np.float64)
    assert mean == pytest.approx(everything.mean(), abs=1e-9)
    assert std == pytest.approx(everything.std(), abs=1e-9)
    with pytest.raises(ValueError, match="no clip"):
        extractor.compute_normalization([])


def test_numbers_of_numpy_can_be_saved(tmp_path):
    whole = {"sampling_rate": np.int64(16_000), "max_length": np.int32(512), "pad_to_multiple_of": np.int64(16)}
    SSLAMFeatureExtractor(**whole, mean=np.float32(-4), do_normalize=np.bool_(True)).save_pretrained(tmp_path)
    assert SSLAMFeatureExtractor.from_pretrained(tmp_path).max_length == 512


def test_save_and_load(extractor, tmp_path):
    SSLAMFeatureExtractor.from_preset("esc50", return_attention_mask=True).save_pretrained(tmp_path)
    loaded = SSLAMFeatureExtractor.from_pretrained(tmp_path)
    assert (loaded.mean, loaded.std, loaded.max_length, loaded.return_attention_mask) == (-6.627, 5.359, 512, True)
    assert "attention_mask" in loaded(noise(0.2), sampling_rate=16_000)


def spoilt(value: float) -> np.ndarray:
    clip = noise(0.5)
    clip[1234] = value
    return clip


@pytest.mark.parametrize(
    ("raw_speech", "message"),
    [
        (np.zeros(0, np.float32), "clip 0 is empty"),
        ([], "raw_speech is empty"),
        ([noise(0.5), np.zeros(399, np.float32)], "clip 1 has 399 samples.*400"),
        (np.zeros((16_000, 2), np.float32), r"16000 clips of 2 samples.*\(samples, channels\)"),
        (noise(0.01), r"clip 0 has 160 samples, but one frame takes 400 \(25 ms at 16000 Hz\): leave it out or pad it with zeros$"),
        (np.zeros((2, 16_000), np.float32), r"\(2, 16000\).*two channels"),
        ([np.zeros((2, 16_000), np.float32)], r"clip 0 has shape \(2, 16000\).*mix several channels down"),
        (np.zeros((0, 16_000), np.float32), r"shape \(0, 16000\), which holds no clip"),
        (np.zeros((1, 2, 16_000), np.float32), r"clip 0 has shape \(1, 2, 16000\)"),
        (spoilt(np.nan), "clip 0 holds NaN"),
        ([noise(0.5), spoilt(np.inf)], "clip 1 holds NaN or infinite"),
        (np.zeros(16_000, np.int16), "clip 0 has dtype int16.*32768"),
        ([1] * 16_000, "clip 0 has dtype int64"),
        (noise(0.5) * 32768, "clip 0 has a peak of"),
        (np.float32(0.1), "raw_speech is a float32"),
        (np.array(0.1, np.float32), r"clip 0 has shape \(\)"),
        (np.zeros(16_000, np.complex64), "clip 0 has dtype complex64, but floats in .* are expected$"),
        ("sound.wav", "raw_speech is a str"),
        (["sound.wav"], "clip 0 is not an array of numbers"),
        ({"array": noise(0.5), "sampling_rate": 16_000}, "raw_speech is a dict"),
        ([None], "clip 0 is not an array of numbers"),
        (np.ma.masked_less(noise(0.5), 0), r"clip 0 is a masked array.*filled"),
        (np.ma.masked_less(np.stack([noise(0.5)] * 3), 0), "clip 0 is a masked array"),
        (torch.zeros(16_000, dtype=torch.complex64), "clip 0 has dtype complex64"),
        (torch.zeros(16_000).to_sparse(), "clip 0 is a sparse tensor, but a dense one is expected"),
    ],
)
def test_what_is_no_clip_is_refused(extractor, raw_speech, message):
    with pytest.raises(ValueError, match=message):
        extractor(raw_speech, sampling_rate=16_000, return_tensors="pt")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sampling_rate": 44_100}, "44100, but the model takes 16000 Hz.*resample"),
        ({"padding": 100}, "100 frames.*multiple of 16"),
        ({"max_length": 0}, "0 frames.*multiple of 16"),
        ({"padding": 512, "max_length": 256}, "512 frames and max_length 256"),
        ({"max_length": 16, "truncation": False}, "48 frames.*max_length=16"),
        ({"max_length": 16.0}, "max_length is 16.0 frames, but must be a positive multiple of 16"),
        ({"max_length": "16"}, "max_length is '16' frames, but must be"),
        ({"padding": "shortest"}, "shortest"),
        ({"return_tensors": "jax"}, "jax"),
        ({"return_tensors": "mlx"}, "return_tensors is 'mlx'"),
        ({"sampling_rate": "16000"}, "sampling_rate is '16000', but"),
        ({"max_length": 16_000, "truncation": True}, r"16000 frames of 10 ms \(160 s\).*were samples meant\? 16000 samples are 98 frames"),
        ({"max_length": 8000}, r"8000 frames of 10 ms \(80 s\), but the longest clip has 48: were samples meant\?"),
        ({"max_length": 15_984}, "were samples meant"),
    ],
)
def test_unusable_arguments_are_refused(extractor, kwargs, message):
    with pytest.raises(ValueError, match=message):
        extractor(noise(0.5), **{"sampling_rate": 16_000, **kwargs})


@pytest.mark.parametrize(
    ("seconds", "frames"), [(0.05, 1024), (0.1, 2048), (0.1, 3008), (0.3, 3008), (0.6, 4096), (5.0, 8000), (30.0, 12_288)]
)
def test_clips_may_be_padded_to_a_long_input(extractor, seconds, frames):
    """Whatever looks like a number of samples."""
    assert extractor(noise(seconds), sampling_rate=16_000, max_length=frames)["input_values"][0].shape == (frames, 128)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"std": 0.0}, "std is 0"),
        ({"max_length": 1000}, "1000 frames"),
        ({"num_mel_bins": 0}, "num_mel_bins is 0"),
        ({"num_mel_bins": 1e6}, "num_mel_bins is 1000000.0, but a whole number"),
        ({"num_mel_bins": 10**6}, "num_mel_bins is 1000000, but must be at most 1024"),
        ({"max_length": 10**9}, "max_length is 1000000000, but must be at most"),
        ({"max_length": -16}, "max_length is -16"),
        ({"max_length": True}, "max_length is True"),
        ({"max_length": float("nan")}, "max_length is nan"),
        ({"sampling_rate": 10**9}, "sampling_rate is 1000000000, but must be at most"),
        ({"pad_to_multiple_of": 10**9}, "max_length"),
        ({"max_length": 512.0}, "max_length is 512.0, but a whole number"),
        ({"sampling_rate": 0}, "sampling_rate is 0, but"),
        ({"sampling_rate": "16000"}, "sampling_rate is '16000', but"),
        ({"sampling_rate": 30}, "sampling_rate is 30, but a whole number of at least 1000"),
        ({"pad_to_multiple_of": 16.0}, "pad_to_multiple_of is 16.0"),
        ({"pad_to_multiple_of": None}, "pad_to_multiple_of is None"),
        ({"mean": None}, "mean is None, but a finite number"),
        ({"do_normalize": "no"}, "do_normalize is 'no'"),
        ({"return_attention_mask": "yes"}, "return_attention_mask is 'yes', but True or False is expected"),
    ],
)
def test_unusable_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SSLAMFeatureExtractor(**kwargs)
