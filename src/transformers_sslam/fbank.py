"""Batched Kaldi log-mel filter banks in plain torch, on any device.

The chain is Kaldi's `compute-fbank-feats` with a Hann window, no dither, no energy column and snip edges (the SSLAM front end): frames,
minus their mean, pre-emphasis, window, zero-padded FFT, power, mel triangles, floored logarithm. Each step is the batched form of the one
in `torchaudio.compliance.kaldi.fbank`, in the same order and precision.
"""

import math
from functools import lru_cache

import torch
from torch import nn


FRAME_LENGTH_MS, FRAME_SHIFT_MS = 25.0, 10.0
PREEMPHASIS = 0.97
LOWEST_FREQUENCY = 20.0  # Hz
# Bounds the working memory (about 6 kB a frame) for clips of any length and number. On a CPU the working set of 1,024 frames stays near the
# caches; an accelerator needs more work at a time.
FRAMES_AT_ONCE_ON_CPU, FRAMES_AT_ONCE_ON_ACCELERATOR = 1024, 131_072


def frame_geometry(sampling_rate: int) -> tuple[int, int]:
    """Window length and shift in samples: `(400, 160)` at 16 kHz."""
    return int(sampling_rate * FRAME_LENGTH_MS / 1000), int(sampling_rate * FRAME_SHIFT_MS / 1000)


def num_frames(num_samples: int, sampling_rate: int = 16_000) -> int:
    """Number of whole windows that fit into `num_samples` samples; 0 if not even one does (Kaldi's `snip_edges`)."""
    length, shift = frame_geometry(sampling_rate)
    return 0 if num_samples < length else 1 + (num_samples - length) // shift


def check_frame_shift(sampling_rate: int) -> None:
    """Raise a `ValueError` if frames are not exactly 10 ms apart, as time steps of events are: at 22,050 Hz they are 220 samples."""
    shift = sampling_rate * FRAME_SHIFT_MS / 1000
    if shift != int(shift):
        raise ValueError(
            f"sampling_rate is {sampling_rate}, of which 10 ms are {shift:g} samples, but events need frames of exactly 10 ms: resample to "
            "a multiple of 100 Hz, such as 16000"
        )


def log_mel(waveforms: torch.Tensor, sampling_rate: int = 16_000, num_mel_bins: int = 128) -> torch.Tensor:
    """Log-mel filter-bank energies of a batch of waveforms of equal length.

    Args:
        waveforms: `(..., samples)`, float, mono, in [-1, 1]. Computed in float32 whatever the dtype, autocast included.
        sampling_rate: in Hz.
        num_mel_bins: number of triangular filters between 20 Hz and half the sampling rate.

    Returns:
        `(..., frames, num_mel_bins)`, float32 natural logarithms of the energies on `waveforms`' device, one frame every
        10 ms. Digital silence is `log(2**-23) = -15.9424`. With 128 bins at 16 kHz one low filter lies between two
        FFT bins and is always silent, as in Kaldi.

    Raises:
        ValueError: if a waveform is shorter than one 25 ms window, or the rate too low for a frame every 10 ms.
    """
    length, shift = frame_geometry(sampling_rate)
    if shift < 1:
        raise ValueError(f"sampling_rate is {sampling_rate} Hz, but a frame each {FRAME_SHIFT_MS:g} ms needs at least 100")
    samples = waveforms.shape[-1]
    if samples < length:
        raise ValueError(
            f"a waveform has {samples} samples, but one frame needs {length} ({FRAME_LENGTH_MS:g} ms at {sampling_rate} Hz): "
            "leave out such clips or pad them with zeros"
        )
    with torch.autocast(waveforms.device.type, enabled=False):
        frames = waveforms.float().contiguous().unfold(-1, length, shift)  # (..., frames, length): a view, nothing is copied yet
        clips = math.prod(frames.shape[:-2])
        if clips == 0:
            return frames.new_empty(*frames.shape[:-1], num_mel_bins)
        at_once = FRAMES_AT_ONCE_ON_CPU if waveforms.device.type == "cpu" else FRAMES_AT_ONCE_ON_ACCELERATOR
        chunks = frames.split(max(1, at_once // clips), dim=-2)
        return torch.cat([_frames_to_log_mel(chunk, sampling_rate, num_mel_bins) for chunk in chunks], dim=-2)


def _frames_to_log_mel(frames: torch.Tensor, sampling_rate: int, num_mel_bins: int) -> torch.Tensor:
    """(..., frames, window length) -> (..., frames, num_mel_bins)"""
    length = frames.shape[-1]
    fft_length = 1 << (length - 1).bit_length()
    frames = frames - frames.mean(-1, keepdim=True)
    before = torch.cat((frames[..., :1], frames[..., :-1]), dim=-1)  # the first sample of a window is its own predecessor
    frames = (frames - PREEMPHASIS * before) * _hann_window(length, frames.device)
    power = torch.fft.rfft(frames, n=fft_length).abs().square()
    filters = mel_filters(num_mel_bins, fft_length, sampling_rate, frames.device)
    return torch.matmul(power, filters).clamp_min(torch.finfo(torch.float32).eps).log()


@lru_cache
@torch.inference_mode(False)  # a tensor cached under inference mode could not serve autograd later
def _hann_window(length: int, device: torch.device) -> torch.Tensor:
    return torch.hann_window(length, periodic=False, dtype=torch.float32, device="cpu").to(device)


@lru_cache
@torch.inference_mode(False)
def mel_filters(num_mel_bins: int, fft_length: int, sampling_rate: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Triangles of equal width on Kaldi's mel scale, `1127 ln(1 + f / 700)`: (fft_length // 2 + 1, num_mel_bins), float32.

    The filter of the Nyquist bin is zero. Computed once per size and device.
    """

    def mel(frequency: torch.Tensor) -> torch.Tensor:
        return 1127.0 * (1.0 + frequency / 700.0).log()

    lowest, highest = (1127.0 * math.log(1.0 + f / 700.0) for f in (LOWEST_FREQUENCY, sampling_rate / 2))
    width = (highest - lowest) / (num_mel_bins + 1)

    def count(end: int) -> torch.Tensor:
        return torch.arange(end, dtype=torch.float32, device="cpu")  # whatever the defaults are when this is first called

    bins = count(num_mel_bins).unsqueeze(1)
    left, centre, right = (lowest + (bins + offset) * width for offset in (0.0, 1.0, 2.0))
    frequencies = mel(sampling_rate / fft_length * count(fft_length // 2)).unsqueeze(0)
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    triangles = torch.minimum(rising, falling).clamp_min(0.0)
    return nn.functional.pad(triangles, (0, 1)).to(device).T  # this layout, because torchaudio's product has it: the same rounding
