"""From recordings to clips: what is cut, what is left out, and that every one of them is counted."""

import io

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise

from transformers_sslam.audio.clips import ReadStatistics, Windows, read_clips
from transformers_sslam.audio.sources import Row
from transformers_sslam.fbank import log_mel


FRAMES, SHIFT, FRAME_LENGTH = 32, 160, 400
WINDOWS = Windows(16_000, (FRAMES - 1) * SHIFT + FRAME_LENGTH, FRAMES * SHIFT, "every", 3200)


def encoded(samples: np.ndarray, kind: str = "WAV", subtype: str | None = None, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def read(audio, windows: Windows = WINDOWS, seed: int = 0):
    statistics = ReadStatistics()
    return read_clips(Row("clip", "source", 7, audio, {"label": "a"}), windows, (seed, 3), statistics), statistics


def test_every_window_together_holds_each_frame_once():
    samples = (noise(2.5) * 32768).round() / 32768
    clips, statistics = read(encoded(samples))
    assert [clip.start for clip in clips] == [0.32 * n for n in range(8)]
    assert statistics == ReadStatistics(recordings=1)  # nothing is left out; clips are counted when they are given out
    frames = torch.cat([log_mel(torch.from_numpy(clip.waveform.copy())) for clip in clips])
    torch.testing.assert_close(frames, log_mel(torch.from_numpy(samples.astype(np.float32))), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("samples", "starts"),
    [(5360, [0]), (5361, [0, 5120]), (10_480, [0, 5120]), (10_481, [0, 5120, 10_240]), (5360 + 3 * 5120, [0, 5120, 10_240, 15_360])],
)
def test_a_further_window_begins_only_where_something_is_left(samples: int, starts: list[int]):
    assert WINDOWS.starts(samples, np.random.default_rng(0)) == starts


def test_short_recordings_and_short_ends_are_left_out_and_counted():
    clips, statistics = read(encoded(noise(0.1)))
    assert (clips, statistics) == ([], ReadStatistics(recordings=1, too_short=1))
    clips, statistics = read(encoded(noise(0.4)))  # 6400 samples: one window, and 1280 samples from the second one's start on
    assert len(clips) == 1
    assert statistics == ReadStatistics(recordings=1, short_ends=1)
    assert len(read(encoded(noise(0.2)))[0]) == 1


def test_a_clip_knows_where_it_is_from_and_has_a_key_of_its_own():
    clips, _ = read(encoded(noise(1.0)), seed=5)
    assert [(clip.name, clip.source, clip.row, clip.columns) for clip in clips] == [("clip", "source", 7, {"label": "a"})] * 3
    assert [clip.key for clip in clips] == [(5, 3, 0), (5, 3, 1), (5, 3, 2)]


def test_rolled_windows_are_rotations_that_their_key_decides():
    windows = Windows(16_000, 5360, 5120, "every", 3200, roll=True)
    plain, rolled, again = (read(encoded(noise(1.0)), chosen, seed)[0] for chosen, seed in ((WINDOWS, 1), (windows, 1), (windows, 1)))
    for one, other, third in zip(plain, rolled, again):
        np.testing.assert_array_equal(other.waveform, third.waveform)
        assert (other.waveform != one.waveform).any()
        np.testing.assert_array_equal(np.sort(other.waveform), np.sort(one.waveform))


def test_a_random_window_is_whole_seeded_and_anywhere():
    samples, windows = noise(1.0), Windows(16_000, 5360, 5120, "random", 3200)
    starts = [read(encoded(samples), windows, seed)[0][0].start for seed in range(200)]
    assert starts[:5] == [read(encoded(samples), windows, seed)[0][0].start for seed in range(5)]
    assert min(starts) < 0.05
    assert 0.615 < max(starts) <= 1 - 0.335
    assert {len(read(encoded(samples), windows, seed)[0][0].waveform) for seed in range(20)} == {5360}


@pytest.mark.parametrize(
    ("audio", "cause"),
    [
        (b"", "empty"),
        (encoded(np.zeros(0, dtype=np.float32)), "empty"),
        (b"this is no audio\n" * 99, "unreadable"),
        (b"RIFX" + encoded(noise(0.5))[4:40] + b"\0" * 99, "unreadable"),
        (encoded(np.full(8000, np.nan, dtype=np.float32), "WAV", "FLOAT"), "not finite"),
        (encoded(np.full(8000, 1000.0, dtype=np.float32), "WAV", "FLOAT"), "out of scale"),
        ("nowhere/at/all.wav", "missing"),
        ({"bytes": None, "path": None}, "missing"),
    ],
    ids=["zero bytes", "zero samples", "text", "wrong header", "NaN", "unscaled", "no file", "no entry"],
)
def test_what_cannot_be_used_is_counted_by_its_cause_and_named(audio, cause: str):
    clips, statistics = read(audio)
    assert clips == []
    assert statistics.unreadable == {cause: 1}
    assert (statistics.recordings, statistics.num_unreadable, statistics.too_short, statistics.short_ends) == (1, 1, 0, 0)
    assert "clip" in statistics.examples[0] or "nowhere/at/all.wav" in statistics.examples[0]


def test_statistics_add_up_and_keep_the_first_ten_names():
    statistics = ReadStatistics()
    for number in range(7):
        read_clips(Row(f"a{number}", "source", number, b"", {}), WINDOWS, (0,), statistics)
    other = ReadStatistics.from_dict(statistics.as_dict())
    other.examples = [text.replace("a", "b", 1) for text in other.examples]
    both = statistics + other
    assert (both.recordings, both.unreadable, len(both.examples)) == (14, {"empty": 14}, 10)
    assert both.examples[:7] == statistics.examples
    assert both.examples[7].startswith("b0")
    assert "14 empty" in str(both)
    assert statistics.recordings == 7
    taken = statistics.take()
    assert (taken.recordings, taken.unreadable, statistics) == (7, {"empty": 7}, ReadStatistics())
