"""The log-mel equals torchaudio's Kaldi one, whatever the signal, the length and the batch."""

import math

import pytest
import torch
from conftest import noise, speech_like

from transformers_sslam import fbank
from transformers_sslam.fbank import log_mel, mel_filters, num_frames


SIGNALS = {
    "noise": noise,
    "speech-like": speech_like,
    "silence": lambda seconds: torch.zeros(round(seconds * 16_000)).numpy(),
    "full-scale square": lambda seconds: torch.tensor(noise(seconds)).sign().numpy(),
    "very quiet": lambda seconds: noise(seconds) * 1e-5,
}


def kaldi(waveform: torch.Tensor, **kwargs) -> torch.Tensor:
    fbank = pytest.importorskip("torchaudio.compliance.kaldi").fbank
    settings = {"window_type": "hanning", "num_mel_bins": 128, "htk_compat": True, "use_energy": False, "dither": 0.0}
    return fbank(waveform[None], **{**settings, "sample_frequency": 16_000.0, **kwargs})


@pytest.mark.parametrize("seconds", [0.025, 0.1, 0.5, 1.0, 10.0, 30.0])
@pytest.mark.parametrize("signal", SIGNALS)
def test_equals_torchaudio_bit_for_bit(signal, seconds):
    waveform = torch.from_numpy(SIGNALS[signal](seconds))
    assert torch.equal(log_mel(waveform), kaldi(waveform))


@pytest.mark.parametrize(("rate", "bins"), [(8_000, 64), (22_050, 80), (44_100, 128)])
def test_equals_torchaudio_at_other_rates_and_widths(rate, bins):
    waveform = torch.from_numpy(noise(1.0, sampling_rate=rate))
    expected = kaldi(waveform, sample_frequency=float(rate), num_mel_bins=bins)
    torch.testing.assert_close(log_mel(waveform, rate, bins), expected, atol=1e-5, rtol=0)


def test_a_batch_equals_its_clips():
    waveforms = torch.stack([torch.from_numpy(noise(2.0, seed)) for seed in range(5)])
    batch = log_mel(waveforms.view(5, 1, -1))
    assert batch.shape == (5, 1, 198, 128)
    for row, waveform in zip(batch, waveforms):
        torch.testing.assert_close(row[0], log_mel(waveform), atol=1e-5, rtol=0)


def test_chunks_of_frames_do_not_show(monkeypatch):
    waveform = torch.from_numpy(speech_like(3.0))
    whole = log_mel(waveform)
    monkeypatch.setattr(fbank, "FRAMES_AT_ONCE_ON_CPU", 7)
    torch.testing.assert_close(log_mel(waveform), whole, atol=1e-5, rtol=0)


def test_known_values():
    assert [num_frames(n) for n in (0, 399, 400, 559, 560, 160_000)] == [0, 0, 1, 1, 2, 998]
    silence = log_mel(torch.zeros(16_000))
    assert silence.shape == (98, 128)
    assert silence.unique().item() == pytest.approx(math.log(2**-23)) == pytest.approx(-15.9424, abs=1e-4)
    filters = mel_filters(128, 512, 16_000)
    assert filters.shape == (257, 128)
    assert (filters.sum(0) == 0).sum() == 1  # one low filter falls between two FFT bins
    assert filters[256].abs().max() == 0  # and the Nyquist bin belongs to none


def test_half_precision_and_autocast_compute_in_float32():
    waveform = torch.from_numpy(noise(0.5))
    assert log_mel(waveform.to(torch.bfloat16)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(log_mel(waveform), log_mel(waveform.clone()))
        inside = log_mel(waveform)
    assert torch.equal(inside, log_mel(waveform))


def test_the_filters_serve_autograd_after_inference_mode():
    mel_filters.cache_clear()
    with torch.inference_mode():
        log_mel(torch.from_numpy(noise(0.1)))
    waveform = torch.from_numpy(noise(0.1)).requires_grad_()
    log_mel(waveform).sum().backward()
    assert waveform.grad.abs().sum() > 0


def test_the_filters_do_not_depend_on_torchs_default_dtype():
    mel_filters.cache_clear()
    fbank._hann_window.cache_clear()
    expected = log_mel(torch.from_numpy(noise(0.1)))
    mel_filters.cache_clear()
    fbank._hann_window.cache_clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(log_mel(torch.from_numpy(noise(0.1))), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_too_short_a_waveform_is_refused():
    with pytest.raises(ValueError, match="399 samples.*400"):
        log_mel(torch.zeros(2, 399))


def test_no_waveform_has_no_log_mel():
    assert log_mel(torch.zeros(0, 16_000)).shape == (0, 98, 128)


def test_too_low_a_rate_is_refused():
    with pytest.raises(ValueError, match="sampling_rate is 40 Hz"):
        log_mel(torch.zeros(16_000), sampling_rate=40)
