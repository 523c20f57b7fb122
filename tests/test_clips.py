"""From recordings to clips: what is cut, what is left out, and that every one of them is counted."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise

from transformers_sslam.audio.clips import Tally, Windows, read_clips
from transformers_sslam.audio.decode import load_waveform
from transformers_sslam.audio.sources import Row
from transformers_sslam.errors import AudioDecodingError
from transformers_sslam.fbank import log_mel


FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
]
FRAMES, SHIFT, FRAME_LENGTH = 32, 160, 400
WINDOWS = Windows(16_000, (FRAMES - 1) * SHIFT + FRAME_LENGTH, FRAMES * SHIFT, "every", 3200)


def encoded(samples: np.ndarray, kind: str = "WAV", subtype: str | None = None, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def read(audio, windows: Windows = WINDOWS, seed: int = 0):
    tally = Tally()
    return read_clips(Row("clip", audio, {}), windows, np.random.default_rng(seed), tally), tally


def test_every_window_together_holds_each_frame_once():
    samples = (noise(2.5) * 32768).round() / 32768
    clips, tally = read(encoded(samples))
    assert [clip.start for clip in clips] == [0.32 * n for n in range(8)]
    assert tally == Tally(recordings=1)  # nothing is left out; clips are counted when they are given out
    frames = torch.cat([log_mel(torch.from_numpy(clip.waveform.copy())) for clip in clips])
    torch.testing.assert_close(frames, log_mel(torch.from_numpy(samples.astype(np.float32))), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("samples", "starts"),
    [(5360, [0]), (5361, [0, 5120]), (10_480, [0, 5120]), (10_481, [0, 5120, 10_240]), (5360 + 3 * 5120, [0, 5120, 10_240, 15_360])],
)
def test_a_further_window_begins_only_where_something_is_left(samples: int, starts: list[int]):
    assert WINDOWS.starts(samples, np.random.default_rng(0)) == starts


def test_short_recordings_and_short_ends_are_left_out_and_counted():
    clips, tally = read(encoded(noise(0.1)))
    assert (clips, tally) == ([], Tally(recordings=1, too_short=1))
    clips, tally = read(encoded(noise(0.4)))  # 6400 samples: one window, and 1280 samples from the second one's start on
    assert len(clips) == 1
    assert tally == Tally(recordings=1, short_ends=1)
    assert len(read(encoded(noise(0.2)))[0]) == 1


def test_a_random_window_is_whole_seeded_and_anywhere():
    samples, windows = noise(1.0), Windows(16_000, 5360, 5120, "random", 3200)
    starts = [read(encoded(samples), windows, seed)[0][0].start for seed in range(200)]
    assert starts[:5] == [read(encoded(samples), windows, seed)[0][0].start for seed in range(5)]
    assert min(starts) < 0.05
    assert 0.615 < max(starts) <= 1 - 0.335
    assert {len(read(encoded(samples), windows, seed)[0][0].waveform) for seed in range(20)} == {5360}


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
@pytest.mark.parametrize("share", [0.999, 0.5, 0.05])
def test_a_file_that_was_cut_off_is_no_clip(kind: str, subtype: str, share: float):
    whole = encoded(noise(1.0), kind, subtype)
    assert len(load_waveform(whole)) == 16_000
    with pytest.raises(AudioDecodingError) as error:
        load_waveform(whole[: int(len(whole) * share)])
    assert error.value.cause in ("truncated", "unreadable")


def test_a_flac_that_was_written_to_a_pipe_is_unreadable():
    """Its header holds 0 for a length that is not known, and libsndfile says 2**63 - 1."""
    data = bytearray(encoded(noise(0.5), "FLAC", "PCM_16"))
    data[21] &= 0xF0  # the total of samples: 4 bits here, and 32 behind
    data[22:26] = bytes(4)
    with pytest.raises(AudioDecodingError, match="a file of .* bytes does not say how long it is") as caught:
        load_waveform(bytes(data))
    assert caught.value.cause == "unreadable"


@pytest.mark.parametrize("declared", [2**32 - 1, 2**31 - 1 - 36])
def test_a_header_that_was_written_to_a_pipe_is_not_taken_for_a_cut(declared: int):
    data = bytearray(encoded(noise(0.5)))
    data[40:44] = declared.to_bytes(4, "little")
    assert len(load_waveform(bytes(data))) == 8000


def test_real_recordings_are_whole(shared: Path):
    files = sorted((shared / "data" / "esc10").glob("*.ogg"))[::16]
    assert files
    assert all(len(load_waveform(file)) >= 16_000 for file in files)


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
    clips, tally = read(audio)
    assert clips == []
    assert tally.broken == {cause: 1}
    assert (tally.recordings, tally.num_broken) == (1, 1)
    assert "clip" in tally.examples[0] or "nowhere/at/all.wav" in tally.examples[0]


def test_a_folder_and_a_file_behind_a_url_are_read_or_refused(tmp_path: Path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(0.5)))
    np.testing.assert_array_equal(load_waveform(f"file://{path}"), load_waveform(path))
    for source, cause in ((tmp_path, "unreadable"), (f"file://{tmp_path}/b.wav", "missing"), (path / "c.wav", "missing")):
        with pytest.raises(AudioDecodingError) as error:
            load_waveform(source)
        assert error.value.cause == cause


def test_tallies_add_up_and_keep_the_first_ten_names():
    tally = Tally()
    for number in range(7):
        read_clips(Row(f"a{number}", b"", {}), WINDOWS, np.random.default_rng(0), tally)
    other = Tally.from_dict(tally.as_dict())
    other.examples = [text.replace("a", "b", 1) for text in other.examples]
    both = tally + other
    assert (both.recordings, both.broken, len(both.examples)) == (14, {"empty": 14}, 10)
    assert both.examples[:7] == tally.examples
    assert both.examples[7].startswith("b0")
    assert "14 empty" in str(both)
    assert tally.recordings == 7
