"""Decoded clips: how many are held while one of them is slow."""

import math
import threading

import numpy as np
import pytest

from transformers_sslam.audio import ahead, cache
from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.errors import AudioDecodingError, UserError
from transformers_sslam.evaluation.frozen import FrozenSettings
from transformers_sslam.evaluation.settings import EvaluationSettings
from transformers_sslam.finetuning.mixtures import MixingSettings
from transformers_sslam.finetuning.settings import FineTuningSettings


def test_a_slow_clip_does_not_let_the_others_pile_up(monkeypatch):
    decoded, progress = [], threading.Event()
    monkeypatch.setattr(ahead.os, "cpu_count", lambda: 3)  # 4 threads

    def decode(source: dict, sampling_rate: int) -> np.ndarray:
        if source["path"] == "0":
            progress.wait(timeout=1.0)  # all others could be decoded in this time
            held.append(len(decoded))
        decoded.append(source["path"])
        return np.full(10, int(source["path"]), dtype=np.float32)

    held: list[int] = []
    monkeypatch.setattr(cache, "decode_clip", decode)
    waveforms = Waveforms([{"path": str(i)} for i in range(500)], 16_000)
    assert held[0] < ahead.TASKS_AHEAD * 4
    assert [int(waveform[0]) for waveform in waveforms] == list(range(500))


@pytest.mark.parametrize("memory_gb", [-1.0, math.nan, math.inf])
def test_memory_is_a_number_of_at_least_0(memory_gb):
    for settings in (EvaluationSettings, FineTuningSettings, FrozenSettings):
        with pytest.raises(UserError, match=f"^memory_gb is {memory_gb:g}, but a number of at least 0 is expected"):
            settings(data_dir="clips", model="x", memory_gb=memory_gb)
    with pytest.raises(UserError, match=f"^mixing.memory_gb is {memory_gb:g}, but a number of at least 0 is expected"):
        MixingSettings(memory_gb=memory_gb)


@pytest.mark.parametrize("memory_gb", [1e9, 1e12])
def test_more_memory_than_there_is_is_named(memory_gb):
    with pytest.raises(UserError, match=r"GB for decoded clips cannot be reserved \(.+\): set a smaller memory_gb"):
        Waveforms([], 16_000, memory_gb)


def test_clips_that_do_not_fit_are_not_held(monkeypatch):
    calls = []

    def decode(source: dict, sampling_rate: int) -> np.ndarray:
        calls.append(source["path"])
        if source["path"] == "3":
            raise AudioDecodingError("damaged", "3")
        return np.zeros(250, dtype=np.float32)  # 1,000 bytes

    monkeypatch.setattr(cache, "decode_clip", decode)
    waveforms = Waveforms([{"path": str(i)} for i in range(10)], 16_000, memory_gb=2.5e-6)
    assert (waveforms.kept, waveforms.unreadable) == ([0, 1, 2, 4, 5, 6, 7, 8, 9], {"damaged": ["3"]})
    calls.clear()
    assert [len(waveform) for waveform in waveforms] == [250] * 9
    assert calls == ["2", "4", "5", "6", "7", "8", "9"]  # two were held
    with pytest.raises(UserError, match=r"1 of 10 training clips cannot be used \(1 damaged\)"):
        waveforms.check_unreadable(0.05, "training")
