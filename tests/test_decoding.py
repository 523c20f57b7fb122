"""Sound files of every kind come out whole, or as an error with its cause; in blocks as in one piece."""

import base64
import csv
import io
import os
import re
import runpy
import socket
import struct
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import noise
from processes import Fork


av = pytest.importorskip("av")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("torchaudio")
from transformers_sslam.audio import AudioDecodingError, load_waveform, read_blocks  # noqa: E402
from transformers_sslam.audio.decode import check_scale  # noqa: E402
from transformers_sslam.audio.paths import stat_files  # noqa: E402


RATE = 16_000
FUZZ = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "fuzz_decoding.py"))
FORMATS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", "MPEG_LAYER_III"),
    ("AIFF", "PCM_16"),
]


def encoded(samples: np.ndarray, kind: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def tone(seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def by_ffmpeg(
    seconds: float, codec: str, container_format: str, rate: int = RATE, channels: int = 1, piped=False, second=0.0, **options
) -> bytes:
    """A tone; `piped` as to a file in which nothing can be written again; `second`: the seconds of another stream, if any."""
    layout, file = "mono" if channels == 1 else "stereo", io.BytesIO()
    if codec == "wmav2":
        options["b"] = "128k"  # it has no default
    target = SimpleNamespace(write=file.write) if piped else file
    with av.open(target, "w", format=container_format, options=options.pop("muxer", {})) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout, options=options)
        other = container.add_stream(codec, rate=rate, layout="mono", options=options) if second else None
        samples = np.tile(tone(seconds, rate), (channels, 1))
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), "fltp", layout)
        frame.sample_rate, frame.pts = rate, 0
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
        if other is not None:
            frame = av.AudioFrame.from_ndarray(tone(second, rate)[None], "fltp", "mono")
            frame.sample_rate, frame.pts = rate, 0
            for packet in (*other.encode(frame), *other.encode(None)):
                container.mux(packet)
    return file.getvalue()


def both(source, seconds: float = 0.3) -> np.ndarray:
    """The whole waveform, after it was compared with the concatenated blocks."""
    whole, blocks = load_waveform(source), list(read_blocks(source, RATE, seconds))
    np.testing.assert_allclose(np.concatenate(blocks), whole, rtol=0, atol=1e-6)
    return whole


def cause(source) -> str:
    """Of the error that both ways of reading raise."""
    causes = []
    for read in (load_waveform, lambda source: list(read_blocks(source, RATE, 0.3))):
        with pytest.raises(AudioDecodingError) as error:
            read(source)
        causes.append(error.value.cause)
    assert causes[0] == causes[1]
    return causes[0]


def seconds_of(source) -> float:
    return len(both(source)) / RATE


# --- blocks


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("seconds", [0.0001, 0.013, 0.5, 100.0])
def test_blocks_together_are_the_whole_waveform(tmp_path, rate, seconds):
    samples = noise(0.1 if seconds < 0.01 else 1.7, sampling_rate=rate)
    soundfile.write(tmp_path / "a.wav", np.stack((samples, samples[::-1]), axis=1), rate, subtype="FLOAT")
    blocks = list(read_blocks(tmp_path / "a.wav", RATE, seconds))
    whole = load_waveform(tmp_path / "a.wav", RATE)
    assert {(block.dtype, block.ndim) for block in blocks} == {(np.dtype("float32"), 1)}
    assert min(map(len, blocks)) > 0
    np.testing.assert_allclose(np.concatenate(blocks), whole, rtol=0, atol=0 if rate == RATE else 1e-6)
    assert len(whole) == -(-len(samples) * RATE // rate)


@pytest.mark.parametrize("samples", [1, 2, 3, 440, 441, 442, 883])
def test_recordings_of_a_few_samples_are_whole_too(samples):
    data = encoded(noise(1.0)[:samples], subtype="FLOAT", rate=44_100)
    np.testing.assert_allclose(np.concatenate(list(read_blocks(data, RATE, 0.001))), load_waveform(data), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("kind", "subtype"), FORMATS[2:])
def test_compressed_files_are_decoded_in_blocks_as_whole(tmp_path, kind, subtype):
    (tmp_path / "audio").write_bytes(encoded(noise(2.0), kind, subtype))
    blocks = list(read_blocks(tmp_path / "audio", RATE, 0.3))
    assert {len(block) for block in blocks[:-1]} == {4800}
    np.testing.assert_array_equal(np.concatenate(blocks), load_waveform(tmp_path / "audio"))


def test_blocks_of_an_mp3_join_without_a_click():
    for data in (encoded(tone(5.0), "MP3", "MPEG_LAYER_III"), by_ffmpeg(5.0, "libmp3lame", "mp3", muxer={"write_xing": "0"})):
        waveform = both(data, 0.31)[RATE // 2 : -RATE // 2]
        time = np.arange(len(waveform)) / RATE
        parts = np.stack((np.sin(2 * np.pi * 440 * time), np.cos(2 * np.pi * 440 * time)), axis=1)
        fit, *_ = np.linalg.lstsq(parts, waveform, rcond=None)
        assert abs(np.linalg.norm(fit) - 0.5) < 0.03  # LAME scales by 0.95
        np.testing.assert_allclose(waveform, parts @ fit, rtol=0, atol=0.02)


def test_no_more_than_a_block_is_decoded_before_it_is_asked_for(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(encoded(noise(10.0)))
    read, decode = [], soundfile.SoundFile.read

    def counted(self, frames, **options):
        read.append(frames)
        return decode(self, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    blocks = read_blocks(tmp_path / "a.wav", RATE, 0.5)
    next(blocks)
    assert read == [8000]
    next(blocks)
    assert read == [8000, 8000]


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_block_has_some_length(seconds):
    with pytest.raises(ValueError, match=f"seconds is {seconds}: give a positive number"):
        next(read_blocks(encoded(noise(1.0)), RATE, seconds))


@pytest.mark.parametrize("rate", [0, -RATE, 16_000.0])
def test_a_sampling_rate_is_a_positive_whole_number(rate):
    for read in (load_waveform, lambda *arguments: next(read_blocks(*arguments))):
        with pytest.raises(ValueError, match=f"sampling_rate is {rate}: give a positive whole number, in Hz"):
            read(encoded(noise(0.1)), rate)


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_what_holds_bytes_is_read_as_bytes_are(kind):
    data = encoded(noise(0.1))
    np.testing.assert_array_equal(both(kind(data)), load_waveform(data))
    with pytest.raises(AudioDecodingError, match="a file of 3 bytes cannot be read as audio"):
        load_waveform(kind(b"abc"))


# --- formats


@pytest.mark.parametrize(
    ("codec", "form", "rate", "channels"),
    [
        ("aac", "mp4", 44_100, 2),
        ("aac", "mp4", 16_000, 1),
        ("alac", "mp4", 44_100, 2),
        ("aac", "adts", 44_100, 2),
        ("libopus", "webm", 48_000, 2),
        ("libopus", "ogg", 48_000, 2),
        ("flac", "ogg", 44_100, 2),
        ("wmav2", "asf", 44_100, 2),
        ("ac3", "ac3", 48_000, 2),
        ("eac3", "eac3", 48_000, 2),
        ("mp2", "mp2", 44_100, 2),
        ("libmp3lame", "mp3", 44_100, 2),
        ("libmp3lame", "mp3", 16_000, 1),
        ("pcm_s16be", "caf", 44_100, 2),
        ("pcm_s16le", "w64", 44_100, 2),
        ("pcm_s16be", "au", 44_100, 2),
        ("adpcm_ima_wav", "wav", 22_050, 1),
        ("tta", "tta", 44_100, 2),
        ("wavpack", "wv", 44_100, 2),
        ("flac", "matroska", 44_100, 2),
    ],
)
def test_every_format_is_whole(codec, form, rate, channels):
    waveform = both(by_ffmpeg(2.0, codec, form, rate, channels))
    assert abs(len(waveform) / RATE - 2) < 0.1
    middle = waveform[RATE // 2 : 3 * RATE // 2]
    assert abs(np.sqrt(np.mean(middle**2)) - 0.5 / np.sqrt(2)) < 0.02
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        ("AIFF", "PCM_24"),
        ("AIFF", "FLOAT"),
        ("AU", "ULAW"),
        ("CAF", "PCM_24"),
        ("W64", "FLOAT"),
        ("RF64", "PCM_16"),
        ("WAVEX", "PCM_24"),
        ("WAV", "PCM_U8"),
        ("WAV", "ALAW"),
        ("WAV", "MS_ADPCM"),
    ],
)
def test_uncompressed_formats_and_their_like_are_whole(kind, subtype):
    samples = tone(1.0)
    waveform = both(encoded(samples, kind, subtype))
    assert abs(len(waveform) - RATE) < 600
    assert np.abs(waveform[:RATE] - samples[: len(waveform)]).max() < 0.1


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_wav_of_big_endian_numbers_is_whole_or_counted(subtype):
    file = io.BytesIO()
    soundfile.write(file, tone(1.0), RATE, format="WAV", subtype=subtype, endian="BIG")
    whole = file.getvalue()
    assert whole[:4] == b"RIFX"
    np.testing.assert_allclose(both(whole), tone(1.0), atol=1e-4)
    for data, cause in ((whole[: len(whole) // 2], "truncated"), (whole + whole, "damaged")):
        with pytest.raises(AudioDecodingError) as error:
            load_waveform(data)
        assert error.value.cause == cause


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("options", [{"q": "4"}, {"b": "128k"}], ids=["variable", "constant"])
def test_an_mp3_without_its_header_is_whole(rate, options):
    mp3 = by_ffmpeg(4.0, "libmp3lame", "mp3", rate, muxer={"write_xing": "0"}, **options)
    assert b"Xing" not in mp3
    assert b"Info" not in mp3
    tagged = mp3 + b"APETAGEX" + (2000).to_bytes(4, "little") + (32).to_bytes(4, "little") + bytes(16) + b"TAG" + bytes(125)
    for data in (mp3, b"ID3\4\0\0\0\0\1\0" + bytes(128) + tagged):
        assert abs(seconds_of(data) - 4) < 0.13  # nothing tells how much the encoder added


def test_joined_mp3s_are_read_to_the_end():
    first, second = by_ffmpeg(2.0, "libmp3lame", "mp3", 44_100), by_ffmpeg(3.0, "libmp3lame", "mp3", 44_100)
    other_rate = by_ffmpeg(1.5, "libmp3lame", "mp3", 22_050)
    assert abs(seconds_of(first + second) - 5) < 0.15
    assert abs(seconds_of(first + other_rate + second) - 6.5) < 0.2


@pytest.mark.parametrize(("codec", "form"), [("aac", "mp4"), ("pcm_s16le", "mov"), ("libopus", "webm"), ("flac", "matroska")])
def test_another_track_may_be_longer(codec, form):
    data = by_ffmpeg(2.0, codec, form, 48_000, second=4.0)
    assert abs(seconds_of(data) - 2) < 0.1
    for fraction in (0.9, 0.5):
        assert cause(data[: int(len(data) * fraction)]) == "truncated"


def test_links_of_ogg_vorbis_have_their_exact_lengths():
    """FFmpeg gives up to a block more than the granule positions say."""
    assert len(both(encoded(tone(0.1), "OGG", "VORBIS") * 20)) == 2 * RATE


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_streams_are_read_to_the_end(subtype):
    links = [encoded(tone(1.0, rate), "OGG", subtype, rate) for rate in (16_000, 48_000)]
    links.append(encoded(np.stack((tone(1.5), tone(1.5)), axis=1), "OGG", subtype))
    waveform = both(b"".join(links))
    assert abs(len(waveform) / RATE - 3.5) < 0.05
    for start in (0, 1, 2):
        assert abs(np.sqrt(np.mean(waveform[start * RATE + 4000 : start * RATE + 12_000] ** 2)) - 0.5 / np.sqrt(2)) < 0.02


def test_what_ffmpeg_writes_to_a_pipe_is_whole():
    for codec, form in (("pcm_s16le", "wav"), ("flac", "flac"), ("libmp3lame", "mp3"), ("aac", "adts"), ("flac", "matroska")):
        assert abs(seconds_of(by_ffmpeg(2.0, codec, form, 44_100, piped=True)) - 2) < 0.1


# --- as real files are


def chunk(identity: bytes, content: bytes, padding: bool = True) -> bytes:
    return identity + struct.pack("<I", len(content)) + content + (b"\0" if padding and len(content) % 2 else b"")


def wav(*chunks: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", 4 + sum(map(len, chunks))) + b"WAVE" + b"".join(chunks)


def wav_format(byte_rate: int = 32_000, bits: int = 16) -> bytes:
    return chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, RATE, byte_rate, bits // 8, bits))


def id3(content: bytes) -> bytes:
    size = bytes(len(content) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + content


PCM = (tone(2.0) * 32_767).astype("<i2").tobytes()
COVER = id3(b"APIC" + struct.pack(">I", 400_014) + b"\0\0\0image/jpeg\0\3\0" + np.random.default_rng(0).bytes(400_000))
APE = b"APETAGEX" + struct.pack("<4I", 2000, 3046, 1, 0xA0000000) + bytes(8)
APE += struct.pack("<II", 3000, 0) + b"Cover\0" + b"x" * 3000 + APE[:20] + struct.pack("<I", 0x80000000) + bytes(8)
ID3V1 = b"TAG" + bytes(125)


@pytest.mark.parametrize(
    "data",
    [
        wav(chunk(b"junk", b"abc"), chunk(b"bext", bytes(603)), wav_format(), chunk(b"data", PCM), chunk(b"iXML", b"<x/>" * 2000)),
        wav(wav_format(), chunk(b"data", PCM), chunk(b"LIST", b"INFO" + b"x" * 5001), chunk(b"id3 ", COVER)),
        wav(wav_format(), chunk(b"data", PCM)) + COVER,
        wav(wav_format(), chunk(b"data", PCM)) + APE + ID3V1,
        wav(wav_format(), chunk(b"data", PCM)) + bytes(300_000),
        wav(wav_format(16_000, 8), chunk(b"data", b"\x90\x70" * RATE + b"\x90", padding=False), chunk(b"LIST", b"INFO" + b"x" * 5000)),
        COVER + wav(wav_format(), chunk(b"data", PCM)),
        wav(wav_format(byte_rate=0), chunk(b"data", PCM)),
        wav(wav_format(byte_rate=12_345), chunk(b"data", PCM)),
    ],
    ids=["bext", "LIST and id3 chunks", "ID3v2 behind", "APE and ID3v1", "zeros", "no padding", "ID3v2 before", "byte rate 0", "byte rate"],
)
def test_a_wav_with_more_than_sound_is_whole(data, tmp_path):
    (tmp_path / "a.wav").write_bytes(data)
    waveform = both(data)
    np.testing.assert_array_equal(load_waveform(tmp_path / "a.wav"), waveform)
    assert len(waveform) - 2 * RATE in (0, 1)


def test_a_sampling_rate_that_the_byte_rate_contradicts_is_damaged():
    whole = wav(wav_format(), chunk(b"data", PCM))
    for rate in (8000, 16_001, 48_000):
        assert cause(with_size(whole, 24, 4, rate)) == "damaged"
    assert cause(with_size(whole, 28, 4, 88_200)) == "damaged"  # of 44.1 kHz: either may be wrong
    assert cause(with_size(with_size(whole, 28, 4, 12_345), 32, 2, 4)) == "damaged"


@pytest.mark.parametrize("rate", [8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_tags_and_broken_ends_of_mp3s_cost_no_more_than_the_broken_frames(rate):
    frames = by_ffmpeg(2.0, "libmp3lame", "mp3", rate, muxer={"write_xing": "0", "id3v2_version": "0"})
    expected = seconds_of(frames)
    assert 2 <= expected < 2.2
    broken = [COVER + frames + APE + ID3V1, id3(b"") + COVER + bytes(20) + frames, frames[60:], frames[:-60]]
    for data in broken:
        assert -0.15 < seconds_of(data) - expected <= 0
    with_header = by_ffmpeg(2.0, "libmp3lame", "mp3", rate)
    assert seconds_of(with_header) == 2
    assert abs(seconds_of(COVER + with_header + APE + ID3V1) - 2) < 0.05  # FFmpeg leaves padding before tags at the end


def test_an_mp3_with_a_vbri_header_is_whole():
    frames = by_ffmpeg(2.0, "libmp3lame", "mp3", 44_100, muxer={"write_xing": "0", "id3v2_version": "0"})
    header = (frames[:4] + bytes(32) + b"VBRI" + struct.pack(">3H2I4H", 1, 1153, 75, len(frames), 78, 10, 1, 2, 1)).ljust(417, b"\0")
    assert abs(seconds_of(header + frames) - seconds_of(frames)) < 0.03


def test_bytes_that_a_xing_header_lost_or_gained_are_found():
    """Without its tag the encoder's padding, up to 0.2 s, would be taken for sound."""
    data = by_ffmpeg(2.0, "libmp3lame", "mp3", 16_000)
    at = data.index(b"Info") + 60
    for damaged in (data[:at] + b"\1" + data[at:], data[:at] + data[at + 1 :], data[:at] + bytes(40) + data[at:]):
        assert cause(damaged) == "damaged"


def test_a_tag_that_reaches_into_the_sound_is_found():
    """Without the first frames, and their header that tells how many there are, the rest is an MP3 like any other."""
    data = id3(b"TSSE" + (15).to_bytes(4, "big") + bytes(2) + b"\3Lavf60.16.100\0") + by_ffmpeg(2.0, "libmp3lame", "mp3", 48_000)
    assert seconds_of(data) == 2
    assert cause(with_size(data, 8, 1, data[8] + 16)) == "damaged"


@pytest.mark.parametrize("data", [encoded(tone(0.5)), encoded(tone(0.5), "FLAC"), encoded(tone(0.5), "MP3")], ids=["WAV", "FLAC", "MP3"])
def test_thousands_of_tags_before_a_file_are_skipped(data):
    assert seconds_of(id3(b"") * 3000 + data) == 0.5


@pytest.mark.parametrize(
    "tags", [COVER, APE + ID3V1, APE[-5072:], bytes(500_000)], ids=["ID3v2", "APE, ID3v1", "APE without header", "zeros"]
)
def test_tags_behind_a_flac_do_not_matter(tags):
    assert seconds_of(encoded(tone(1.0), "FLAC", "PCM_16") + tags) == 1


def test_tags_before_other_formats_are_skipped_and_their_cuts_are_found():
    for data in (encoded(tone(2.0), "FLAC", "PCM_16"), by_ffmpeg(2.0, "aac", "adts", 44_100), encoded(tone(2.0), "OGG", "VORBIS")):
        assert seconds_of(COVER + data) == seconds_of(data)
    for kind, subtype in (("FLAC", "PCM_16"), ("WAV", "PCM_16"), ("OGG", "VORBIS")):
        data = COVER + encoded(tone(2.0), kind, subtype)
        assert cause(data[: -len(data[len(COVER) :]) // 3]) in ("truncated", "damaged")


@pytest.mark.parametrize(
    ("codec", "form", "rate"),
    [
        ("pcm_s16le", "aiff", 44_100),  # sowt
        ("pcm_s24le", "wav", 44_100),
        ("pcm_f64le", "wav", 44_100),
        ("adpcm_ms", "wav", 8000),
        ("libmp3lame", "wav", 44_100),
        ("libopencore_amrnb", "amr", 8000),
        ("libopencore_amrnb", "3gp", 8000),
        ("aac", "ipod", 44_100),
        ("alac", "mov", 44_100),
        ("libopus", "mp4", 48_000),
        ("libmp3lame", "matroska", 44_100),
    ],
)
def test_less_common_pairs_of_codec_and_container_are_whole(codec, form, rate):
    try:
        data = by_ffmpeg(2.0, codec, form, rate)
    except av.error.FFmpegError as error:
        pytest.skip(f"this build of FFmpeg has no such encoder: {error}")
    assert abs(seconds_of(data) - 2) < 0.1


def test_a_cover_in_the_comments_of_opus_and_chapters_of_an_m4a_do_not_matter():
    picture = struct.pack(">II", 3, 10) + b"image/jpeg" + bytes(20) + struct.pack(">I", 300_000) + np.random.default_rng(0).bytes(300_000)
    for codec, form, rate in (("libopus", "ogg", 48_000), ("aac", "ipod", 44_100)):
        file = io.BytesIO()
        with av.open(file, "w", format=form) as container:
            stream = container.add_stream(codec, rate=rate, layout="mono")
            if form == "ogg":
                stream.metadata["METADATA_BLOCK_PICTURE"] = base64.b64encode(picture).decode()
            else:
                halves = [{"id": n, "start": n, "end": n + 1, "time_base": Fraction(1), "metadata": {"title": "a"}} for n in (0, 1)]
                container.set_chapters(halves)
            frame = av.AudioFrame.from_ndarray(tone(2.0, rate)[None], "fltp", "mono")
            frame.sample_rate, frame.pts = rate, 0
            for packet in (*stream.encode(frame), *stream.encode(None)):
                container.mux(packet)
        assert abs(seconds_of(file.getvalue()) - 2) < 0.1


# --- headers


def with_size(data: bytes, at: int, length: int, value: int, order: str = "little") -> bytes:
    return data[:at] + value.to_bytes(length, order) + data[at + length :]


@pytest.mark.parametrize("claim", [10**5, 2**31 - 10**6, 2**32 - 10**6])
def test_a_header_that_claims_more_than_there_is_is_a_cut(claim):
    for kind, marker, width, order in (("WAV", b"data", 4, "little"), ("AIFF", b"SSND", 4, "big"), ("CAF", b"data", 8, "big")):
        data = encoded(tone(1.0), kind, "PCM_16")
        assert cause(with_size(data, data.index(marker) + 4, width, claim, order)) == "truncated"
    assert cause(with_size(encoded(tone(1.0), "AU", "PCM_16"), 8, 4, claim, "big")) == "truncated"
    data = encoded(tone(1.0), "W64", "PCM_16")
    assert cause(with_size(data, data.index(b"data\xf3") + 16, 8, claim)) == "truncated"
    data = encoded(tone(1.0), "RF64", "PCM_16")
    assert cause(with_size(data, data.index(b"ds64") + 16, 8, claim)) == "truncated"


def test_a_header_that_claims_less_than_there_is_or_contradicts_itself_is_damaged():
    wav, aiff, flac = (encoded(tone(1.0), kind, "PCM_16") for kind in ("WAV", "AIFF", "FLAC"))
    assert cause(with_size(wav, 40, 4, 16_000)) == "damaged"
    assert cause(with_size(wav, 24, 4, 8000)) == "damaged"
    assert cause(with_size(aiff, aiff.index(b"COMM") + 10, 4, 8000, "big")) == "damaged"
    assert cause(flac[:22] + (4096).to_bytes(4, "big") + flac[26:]) == "damaged"


@pytest.mark.parametrize(
    ("kind", "subtype", "marker", "width"),
    [("AU", "PCM_16", b"\0\0\0\x18", 4), ("CAF", "FLOAT", b"data", 8), ("AIFF", "FLOAT", b"SSND", 4)],
)
def test_a_size_that_leaves_out_half_of_the_sound_is_damaged(kind, subtype, marker, width):
    data = encoded(tone(1.0), kind, subtype)
    at = data.index(marker) + 4
    half = int.from_bytes(data[at : at + width], "big") // 8 * 4
    assert cause(with_size(data, at, width, half, "big")) == "damaged"


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "ULAW"])
@pytest.mark.parametrize("frames", [RATE // 2, 2 * RATE])
def test_an_aiff_whose_number_of_frames_contradicts_its_sound_is_damaged(subtype, frames):
    data = encoded(tone(1.0), "AIFF", subtype)
    assert cause(with_size(data, data.index(b"COMM") + 10, 4, frames, "big")) == "damaged"


def test_two_chunks_of_sound_are_damaged():
    for between in (b"", chunk(b"LIST", b"INFO")):
        assert cause(wav(wav_format(), chunk(b"data", PCM), between, chunk(b"data", PCM))) == "damaged"


def test_sound_behind_that_looks_like_a_chunk_is_found():
    """But it does not end within the file."""
    data = wav(wav_format(), chunk(b"data", PCM[:32_000] + b"abcd\xff\xff\xff\x7f" + PCM[32_000:]))
    assert cause(with_size(data, 40, 4, 32_000)) == "damaged"
    unclosed = wav(wav_format(), chunk(b"data", b"abcd\xff\xff\xff\x7f" + PCM))
    assert abs(seconds_of(with_size(unclosed, 40, 4, 0)) - 2) < 0.01


@pytest.mark.parametrize("claim", [0, 2**63, 2**64 - 1])
@pytest.mark.parametrize("short", [0, 2**32 - 1])
def test_an_rf64_that_was_not_closed_has_left_its_sound(claim, short):
    data = encoded(tone(1.0), "RF64", "PCM_16")
    at = data.index(b"ds64") + 8
    data = data[:at] + 3 * claim.to_bytes(8, "little") + data[at + 24 :]
    np.testing.assert_array_equal(both(with_size(data, data.index(b"data") + 4, 4, short)), load_waveform(encoded(tone(1.0))))


def test_a_recorder_that_was_not_closed_has_left_its_sound_and_an_empty_file_has_none():
    wav = encoded(tone(1.0))
    np.testing.assert_array_equal(load_waveform(with_size(wav, 40, 4, 0)), load_waveform(wav))
    assert cause(with_size(wav[:44], 40, 4, 0)) == "empty"
    assert cause(with_size(wav[:44], 40, 4, 0) + b"LIST" + (4).to_bytes(4, "little") + b"INFO") == "empty"


@pytest.mark.parametrize("declared", [2**32 - 1, 2**31 - 1 - 36])
def test_a_header_that_was_written_to_a_pipe_is_not_taken_for_a_cut(declared):
    assert len(both(with_size(encoded(noise(0.5)), 40, 4, declared))) == 8000


def test_a_flac_that_was_written_to_a_pipe_is_whole_and_its_cut_is_not():
    """Its header holds 0 for a length that is not known, and libsndfile says 2**63 - 1."""
    whole = encoded(noise(2.5), "FLAC", "PCM_16")
    piped = bytearray(whole)
    piped[21] &= 0xF0  # the total of samples: 4 bits here, and 32 behind
    piped[22:26] = bytes(4)
    np.testing.assert_array_equal(both(bytes(piped)), load_waveform(whole))
    assert cause(bytes(piped[: len(piped) // 3] + piped[len(piped) // 2 :])) in ("truncated", "damaged")


def test_a_forged_length_is_a_cut_and_needs_no_memory():
    """2**36 - 1 samples, of which an array would take 256 GiB."""
    flac = bytearray(encoded(noise(1.0), "FLAC", "PCM_16"))
    flac[21], flac[22:26] = flac[21] | 0x0F, b"\xff" * 4
    assert cause(bytes(flac)) == "truncated"


# --- damage


@pytest.mark.parametrize(("kind", "subtype"), FORMATS)
@pytest.mark.parametrize("fraction", [0.999, 0.5, 0.05])
def test_a_file_that_was_cut_off_is_not_read(kind, subtype, fraction):
    whole = encoded(noise(1.0), kind, subtype)
    assert len(load_waveform(whole)) == RATE
    # The last frame of a FLAC declares its end before it is complete.
    expected = {"damaged"} if (kind, fraction) == ("FLAC", 0.999) else {"truncated", "unreadable"}
    assert cause(whole[: int(len(whole) * fraction)]) in expected


@pytest.mark.parametrize(
    ("codec", "form", "muxer"),
    [
        ("aac", "mp4", {}),
        ("libopus", "webm", {}),
        ("wmav2", "asf", {}),
        ("aac", "mp4", {"movflags": "frag_keyframe+empty_moov+delay_moov"}),
        ("libopus", "webm", {"live": "1"}),
    ],
)
@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.2])
def test_a_container_that_was_cut_off_is_not_read(codec, form, muxer, fraction):
    data = by_ffmpeg(3.0, codec, form, 48_000, muxer=muxer)
    assert cause(data[: int(len(data) * fraction)]) in ("truncated", "unreadable", "damaged")


def with_cover(asf: bytes) -> bytes:
    """With a picture, which FFmpeg gives as a stream of video, among the objects of the header."""
    name, text = "WM/Picture\0".encode("utf-16-le"), "image/png\0\0".encode("utf-16-le")
    picture = b"\x89PNG\r\n\x1a\n" + bytes(200)
    value = b"\3" + struct.pack("<I", len(picture)) + text + picture
    content = struct.pack("<HH", 1, len(name)) + name + struct.pack("<HH", 1, len(value)) + value
    guid = uuid.UUID("D2D0A440-E307-11D2-97F0-00A0C95EA850").bytes_le
    item = guid + struct.pack("<Q", 24 + len(content)) + content
    size, count = struct.unpack("<QI", asf[16:28])
    return asf[:16] + struct.pack("<QI", size + len(item), count + 1) + asf[28:size] + item + asf[size:]


@pytest.mark.parametrize("change", [bytes, with_cover], ids=["plain", "cover"])
@pytest.mark.parametrize(("codec", "rate"), [("wmav2", 44_100), ("pcm_s16le", 8000)])
def test_every_cut_of_windows_media_is_found(change, codec, rate):
    """FFmpeg replaces the duration of a cut file by an estimate."""
    data = change(by_ffmpeg(3.0, codec, "asf", rate))
    with av.open(io.BytesIO(data)) as container:
        assert len(container.streams.video) == (change is with_cover)
    assert abs(seconds_of(data) - 3) < 0.1
    for fraction in (0.98, 0.7, 0.2, 0.1):
        assert cause(data[: int(len(data) * fraction)]) == "truncated"


def with_large_tag(asf: bytes) -> bytes:
    """As a tagger leaves it: the header grows, and the size of the file in it stays as it was."""
    size, count = struct.unpack("<QI", asf[16:28])
    tag = bytes.fromhex("74d40618dfca0945a4ba9aabcb96aae8") + struct.pack("<Q", 24 + len(asf)) + bytes(len(asf))  # padding
    return asf[:16] + struct.pack("<QI", size + len(tag), count + 1) + asf[28:size] + tag + asf[size:]


def test_a_large_tag_in_windows_media_does_not_matter():
    data = with_large_tag(by_ffmpeg(3.0, "wmav2", "asf", 44_100))
    assert abs(seconds_of(data) - 3) < 0.1
    assert cause(data[: int(0.98 * len(data))]) == "truncated"
    assert cause(data + data) == "damaged"


def test_windows_media_from_a_pipe_is_whole():
    assert abs(seconds_of(by_ffmpeg(3.0, "wmav2", "asf", 44_100, piped=True)) - 3) < 0.1


@pytest.mark.parametrize("name", [b"LIST", b"iXML"])
def test_a_chunk_of_metadata_whose_size_is_mistaken_does_not_matter(name):
    wav = encoded(tone(2.0)) + name + struct.pack("<I", 30_008) + b"INFO" + b"a" * 30_000
    assert seconds_of(wav[:4] + struct.pack("<I", len(wav) - 8) + wav[8:]) == 2


@pytest.mark.parametrize("zeros", [1, 15, 16])
def test_zeros_behind_the_largest_frame_of_a_flac_do_not_matter(zeros):
    assert seconds_of(encoded(tone(0.09, 44_100), "FLAC", rate=44_100) + bytes(zeros)) == pytest.approx(0.09, abs=1e-3)


def test_a_flac_that_holds_another_one_as_metadata_is_whole():
    flac = encoded(tone(1.0), "FLAC")
    end = 8 + int.from_bytes(flac[5:8], "big")  # of the first block
    block = b"\2" + len(flac).to_bytes(3, "big") + flac  # of an application
    data = flac[:4] + bytes([flac[4] & 0x7F]) + flac[5:end] + block + flac[end:]
    assert seconds_of(data) == 1
    assert cause(data + data) == "damaged"


@pytest.mark.parametrize("zeros", [100, 4096, 500_000])
def test_zeros_behind_an_amr_are_not_sound(zeros):
    data = by_ffmpeg(2.0, "libopencore_amrnb", "amr", 8000)
    assert abs(seconds_of(data + bytes(zeros)) - seconds_of(data)) < 0.1


def test_sound_that_cannot_be_decoded_at_the_end_of_a_film_is_counted():
    """The last packet of this one, nearly a second, is too much for FFmpeg's decoder; the other stream says nothing of its length."""
    assert cause(by_ffmpeg(3.0, "tta", "matroska", 44_100, second=4.0)) == "damaged"


@pytest.mark.parametrize(
    ("codec", "form", "rate"),
    [
        ("aac", "mp4", 44_100),
        ("alac", "mov", 44_100),
        ("aac", "3gp", 44_100),
        ("alac", "caf", 44_100),
        ("tta", "tta", 44_100),
        ("libmp3lame", "wav", 44_100),
        ("adpcm_ms", "wav", 22_050),
        ("wmav2", "asf", 44_100),
        ("libopus", "webm", 48_000),
        ("libopencore_amrnb", "amr", 8000),
        ("PCM_16", "WAV", RATE),
        ("PCM_16", "FLAC", RATE),
        ("PCM_16", "AU", RATE),
        ("FLOAT", "CAF", RATE),
        ("ALAC_16", "CAF", RATE),
        ("FLOAT", "AIFF", RATE),
        ("PCM_16", "W64", RATE),
    ],
)
def test_joined_files_are_not_taken_for_their_first_part(codec, form, rate):
    if form.isupper():
        data, short = (encoded(tone(seconds), form, codec) for seconds in (1.0, 0.5))
    elif codec not in av.codecs_available:
        pytest.skip("this build of FFmpeg has no such encoder")
    else:
        data, short = (by_ffmpeg(seconds, codec, form, rate) for seconds in (1.0, 0.5))
    assert abs(seconds_of(data) - 1) < 0.1
    for joined in (data + data, data + short, short + data, data + ID3V1 + data, data + COVER + short):
        assert cause(joined) in ("damaged", "truncated")
    assert cause(data + data) == "damaged"


def test_an_mp4_whose_last_box_has_no_size_hides_what_is_joined_to_it():
    data = by_ffmpeg(1.0, "aac", "mp4", 44_100)
    sound, header = data.index(b"mdat") - 4, data.index(b"moov") - 4
    first = data[:sound] + data[header:] + bytes(4) + data[sound + 4 : header]
    with pytest.raises(AudioDecodingError, match="is made of files joined together, of which the first alone would be read: split it"):
        load_waveform(first + data)


@pytest.mark.parametrize(("codec", "form"), [("aac", "mp4"), ("flac", "matroska"), ("wmav2", "asf")])
def test_tags_behind_other_containers_do_not_matter(codec, form):
    data = by_ffmpeg(1.0, codec, form, 44_100)
    for tag in (b"TAG" + b"a title".ljust(125), APE):
        np.testing.assert_array_equal(both(data + tag), load_waveform(data))


@pytest.mark.parametrize("kind", ["FLAC", "AU", "CAF", "WAV"])
def test_a_file_of_another_format_behind_is_found(kind):
    others = (encoded(tone(1.0)), by_ffmpeg(1.0, "libmp3lame", "mp3", 44_100) + ID3V1, by_ffmpeg(1.0, "wavpack", "wv", 44_100))
    for other in others:
        assert cause(encoded(tone(1.0), kind) + other) == "damaged"


def test_a_damaged_or_missing_ogg_page_is_found():
    data = encoded(noise(3.0), "OGG", "VORBIS")
    pages = [at for at in range(len(data)) if data.startswith(b"OggS", at)]
    middle, after = pages[len(pages) // 2 : len(pages) // 2 + 2]
    assert cause(data[: middle + 60] + bytes([data[middle + 60] ^ 1]) + data[middle + 61 :]) == "damaged"
    assert cause(data[:middle] + data[after:]) == "damaged"


@pytest.mark.parametrize(("codec", "form"), [("libmp3lame", "mp3"), ("aac", "adts"), ("ac3", "ac3")])
def test_garbage_in_the_middle_of_frames_is_found(codec, form):
    data = by_ffmpeg(3.0, codec, form, 48_000)
    middle = len(data) // 2
    garbage = np.random.default_rng(0).integers(0, 256, len(data) // 4, dtype=np.uint8).tobytes()
    assert cause(data[:middle] + garbage + data[middle + len(garbage) :]) in ("damaged", "truncated")


# --- what is not sound


def video() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10, width=64, height=64, pix_fmt="yuv420p")
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: b"", "empty"),
        (lambda: encoded(np.zeros(0, dtype=np.float32)), "empty"),
        (lambda: b"this is no audio\n" * 99, "unreadable"),
        (lambda: b"RIFX" + encoded(noise(0.5))[4:40] + b"\0" * 99, "unreadable"),
        (lambda: b"\x89PNG\r\n\x1a\n" + bytes(200), "unreadable"),
        (lambda: b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "unreadable"),
        (video, "unreadable"),
        (lambda: encoded(np.append(noise(1.0), np.float32("nan")), subtype="FLOAT"), "not finite"),
        (lambda: encoded(np.append(noise(1.0), np.float32("inf")), subtype="FLOAT"), "not finite"),
        (lambda: None, "missing"),
    ],
    ids=["zero bytes", "zero samples", "text", "wrong header", "picture", "playlist", "video", "NaN", "infinity", "no file"],
)
def test_what_cannot_be_read_has_its_cause(tmp_path, content, expected):
    path, data = tmp_path / "a.raw", content()
    if data is not None:
        path.write_bytes(data)
        assert cause(data) == expected
    assert cause(path) == expected
    assert cause({"bytes": data, "path": None}) == expected


@pytest.mark.parametrize("rate", [44_099, 22_254, 999, 2**31 - 1])
def test_rates_from_which_nothing_can_be_resampled_are_told_like_other_broken_files(tmp_path, rate):
    wav = with_size(with_size(encoded(noise(0.1)), 24, 4, rate), 28, 4, rate * 2 % 2**32)
    (tmp_path / "odd.wav").write_bytes(wav)
    assert cause(tmp_path / "odd.wav") in ("unreadable", "damaged")


def test_many_channels_are_mixed_down():
    samples = np.stack([noise(0.5, seed) for seed in range(24)], axis=1)
    waveform = both(encoded(samples, subtype="FLOAT"))
    np.testing.assert_allclose(waveform, samples.mean(axis=1), rtol=0, atol=1e-7)
    assert cause(with_size(encoded(noise(0.5)), 22, 2, 65_535)) in ("damaged", "unreadable", "truncated")


@pytest.mark.parametrize(
    ("codec", "form"), [("libmp3lame", "mp3"), ("flac", "matroska"), ("alac", "mp4"), ("aac", "adts"), ("pcm_s16le", "matroska")]
)
def test_ffmpeg_s_channels_are_mixed_down(codec, form):
    """Planes of floats, of integers, and interleaved integers: a tone in one channel and three times as much in the other."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=RATE, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack((0.5 * tone(2.0), 1.5 * tone(2.0))), "fltp", "stereo")
        frame.sample_rate, frame.pts = RATE, 0
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    waveform = both(file.getvalue())[RATE // 2 : RATE]
    assert abs(np.sqrt(np.mean(waveform**2)) - 0.5 / np.sqrt(2)) < 0.02
    assert np.argmax(np.abs(np.fft.rfft(waveform))) == 220


def test_samples_that_were_never_scaled_are_found():
    check_scale(noise(0.1), "a.wav")
    with pytest.raises(AudioDecodingError, match="a.wav has a peak of 1000") as error:
        check_scale(np.full(9, 1000.0, np.float32), "a.wav")
    assert error.value.cause == "out of scale"


def test_what_is_not_a_regular_file_is_rejected_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.wav")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the address of a socket has 107 bytes at most, which a whole path may exceed
        server.bind("socket.wav")
        begin = time.monotonic()
        for path in (tmp_path / "fifo.wav", tmp_path / "socket.wav", "/dev/zero", tmp_path):
            assert cause(path) == "unreadable"
        assert time.monotonic() - begin < 30  # to wait for a writer, or to read what has no end, takes for ever


def test_a_folder_and_a_file_behind_a_url_are_read_or_rejected(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(noise(0.5)))
    np.testing.assert_array_equal(load_waveform(f"file://{path}"), load_waveform(path))
    assert cause(tmp_path) == cause(f"file://{tmp_path}") == "unreadable"
    assert cause(f"file://{tmp_path}/b.wav") == cause(path / "c.wav") == cause({"bytes": None, "path": None}) == "missing"
    assert cause(f"{tmp_path}/a\0b.wav") == "missing"
    assert stat_files([f"{tmp_path}/a\0b.wav"]) == [None]


SAID = {"200": "Response payload is not completed", "403": "403, message=", "500": "500, message=", "503": "503, message="}


class WebServer(BaseHTTPRequestHandler):
    """Answers `/404.wav` with the status 404, and `/200.wav` with less than it announces."""

    def do_GET(self):
        status = int(self.path[1:4])
        self.send_response(status)
        self.send_header("Content-Length", "1000" if status == 200 else "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_behind_a_url_only_what_the_server_says_is_gone_is_missing():
    with ThreadingHTTPServer(("127.0.0.1", 0), WebServer) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert [cause(f"{address}/{name}") for name in ("404.wav", "410.wav", "404.wav?x=1")] == ["missing"] * 3
        for name in ("200.wav", "403.wav", "500.wav", "503.wav", "503.wav?x=1"):
            with pytest.raises(
                OSError, match=rf"^{address}/{re.escape(name)} cannot be read \({SAID[name[:3]]}.*\): check the address, the net"
            ):
                load_waveform(f"{address}/{name}")
        server.shutdown()
    with pytest.raises(OSError, match=rf"^{address}/a\.wav cannot be read \(Cannot connect to host .+\): check the address"):
        next(read_blocks(f"{address}/a.wav"))


def test_a_name_that_is_not_utf_8_is_read_and_named_in_errors(tmp_path):
    for data, expected in ((encoded(tone(0.5)), None), (b"text" * 99, "unreadable")):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.wav")
        Path(path).write_bytes(data)
        if expected is None:
            assert len(both(path)) == 8000
        else:
            with pytest.raises(AudioDecodingError) as error:
                load_waveform(path)
            assert error.value.cause == expected
            assert "caf" in str(error.value).encode().decode()  # can be written anywhere


# --- all together


def test_threads_decode_as_one_does():
    files = [encoded(tone(1.0), *kind) for kind in FORMATS] + [by_ffmpeg(1.0, "aac", "mp4"), by_ffmpeg(1.0, "libopus", "webm", 48_000)]
    alone = [load_waveform(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for expected, waveform in zip(alone * 2, pool.map(load_waveform, files * 2)):
                np.testing.assert_array_equal(waveform, expected)


def test_decoders_print_nothing(tmp_path):
    """Not even from C, which writes to the descriptor."""
    for number in range(12):
        generator = np.random.default_rng(number)
        if number == 0:
            data = bytearray(by_ffmpeg(1.0, "libmp3lame", "wav", 44_100))
        else:
            data = bytearray(by_ffmpeg(1.0, *(("libmp3lame", "mp3") if number % 3 else ("aac", "adts")), 44_100))
        for place in generator.integers(1000, len(data), 20):
            data[place] ^= 1 << int(generator.integers(8))
        (tmp_path / f"{number}.audio").write_bytes(data)
    (tmp_path / "text").write_bytes(b"text" * 99)
    (tmp_path / "read.py").write_text(
        "import sys; from transformers_sslam.audio import AudioDecodingError, load_waveform\n"
        "for path in sys.argv[1:]:\n"
        "    try: load_waveform(path)\n"
        "    except AudioDecodingError: pass\n"
        "print('read')"
    )
    files = sorted(path for path in tmp_path.iterdir() if path.suffix != ".py")
    assert Fork([tmp_path / "read.py", *files], tmp_path / "log").wait() == 0
    assert (tmp_path / "log").read_bytes() == b"read\n"


def test_mutated_files_are_right_or_counted():
    """A few of what scripts/fuzz_decoding.py tries."""
    for number in range(152):
        generator = np.random.default_rng((99, number))
        kind = [*FUZZ["SOUNDFILE"], *FUZZ["PYAV"]][number % 8]
        original = FUZZ["encoded"](kind, 1.5, 48_000, 1 + number % 2, generator)
        action, damaged = FUZZ["mutated"](original, generator)
        outcome, detail = FUZZ["decode"](damaged)
        assert outcome in ("counted", "length"), (number, kind, action, detail)
        if outcome == "length" and abs(detail - 1.5) > 0.1:
            assert FUZZ["undetectable"](kind, original, damaged, detail, 1.5, 48_000), (number, kind, action, detail)


def test_the_cases_come_out_as_expected(shared: Path):
    folder = shared / "cases" / "audio"
    if not folder.is_dir():
        pytest.skip("needs ../shared/cases")
    for row in csv.DictReader((folder / "expected.csv").open()):
        path = folder / row["file"]
        try:
            seconds = float(row["expected"])
        except ValueError:
            if path.name == "data_size_0.wav":
                assert len(both(path)) == 80_000 * RATE // 44_100 + 1
            else:
                assert cause(path) in row["expected"]
        else:
            assert abs(seconds_of(path) - seconds) <= 0.1


def test_real_recordings_are_whole(shared: Path):
    files = sorted((shared / "data" / "esc10").glob("*.ogg"))[::16]
    assert files
    assert all(len(load_waveform(file)) >= RATE for file in files)
