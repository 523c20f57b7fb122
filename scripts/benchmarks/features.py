"""Log-mels: milliseconds a clip, one at a time, in a batch and on the device, against torchaudio and Transformers'
`ASTFeatureExtractor`."""

from collections.abc import Callable
from typing import Any

import torch
from timing import interleave, ratio, spread

from transformers_sslam.feature_extraction_sslam import SSLAMFeatureExtractor


RATE = 16_000
TORCHAUDIO = "torchaudio, one at a time, cpu"


def measure_features(
    clips: int = 64, seconds: float = 10.0, *, device: str = "cpu", repeats: int = 5, warmup: int = 2
) -> list[dict[str, Any]]:
    """Milliseconds a clip of each way, in turns, and how many times as fast as torchaudio's filter bank alone, one clip at a time.

    Args:
        clips: in a batch.
        seconds: length of each.
        device: of the batched log-mel, besides the CPU. Its waveforms lie there already.
    """
    import torchaudio
    from transformers import ASTFeatureExtractor

    where = torch.device(device)
    generator = torch.Generator().manual_seed(0)
    waveforms = 0.1 * torch.randn(clips, round(seconds * RATE), generator=generator)
    arrays = list(waveforms.numpy())
    ours, ast = SSLAMFeatureExtractor(), ASTFeatureExtractor()
    options: dict[str, Any] = {"sampling_rate": RATE, "return_tensors": "pt"}
    kaldi = {
        "htk_compat": True,
        "sample_frequency": RATE,
        "use_energy": False,
        "window_type": "hanning",
        "num_mel_bins": 128,
        "dither": 0.0,
    }
    ways: dict[str, Callable[[], Any]] = {
        TORCHAUDIO: lambda: [torchaudio.compliance.kaldi.fbank(waveform[None], **kaldi) for waveform in waveforms],
        "ASTFeatureExtractor, cpu": lambda: ast(arrays, **options),
        "SSLAMFeatureExtractor, one at a time, cpu": lambda: [ours(array, **options) for array in arrays],
        "SSLAMFeatureExtractor, batch, cpu": lambda: ours(arrays, **options),
    }
    if where.type != "cpu":
        there = list(waveforms.to(where))
        ways[f"SSLAMFeatureExtractor, batch, {device}"] = lambda: ours(there, **options)
    taken = interleave(ways, repeats, warmup, where)
    return [
        {"way": way, "milliseconds": spread(values).scaled(1000 / clips), "speedup": ratio(taken[TORCHAUDIO], values)}
        for way, values in taken.items()
    ]
