"""Mixtures of single sounds: what is planned is what sounds, and what is written can be summed again by anyone."""

import csv
import hashlib
import io
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from conftest import noise

from transformers_sslam.audio.decode import load_waveform
from transformers_sslam.audio.rows import choose_classes, read_rows
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.polyphony import benchmark as polyphonic_benchmark
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.polyphony.render import (
    FULL_SCALE,
    Mixture,
    MixtureSettings,
    find_sound,
    plan_background,
    plan_mixture,
    plan_mixtures,
    render,
)
from transformers_sslam.settings import read_settings


RATE, FRAME = 16_000, 160
CLASSES = ("beep", "click", "hiss")
SHORT = MixtureSettings(clip_seconds=2.0, event_seconds=0.8)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def single_sound(label: str, seed: int, rate: int = RATE) -> np.ndarray:
    """0.4 to 1.2 s of a class, with pauses in it, within up to 0.3 s of digital silence at both ends."""
    generator = np.random.default_rng(seed)
    time = np.arange(round(generator.uniform(0.4, 1.2) * rate)) / rate
    body = {
        "beep": np.sin(2 * np.pi * generator.uniform(300, 900) * time) * (np.sin(2 * np.pi * 4 * time) > -0.5),
        "click": generator.standard_normal(len(time)) * np.exp(-80 * (time % 0.2)),
        "hiss": generator.standard_normal(len(time)) / 3,
    }[label]
    silence = [np.zeros(round(generator.uniform(0, 0.3) * rate)) for _ in range(2)]
    return (generator.uniform(0.02, 0.3) * np.concatenate([silence[0], body, silence[1]])).astype(np.float32)


@pytest.fixture(scope="module")
def waveforms() -> list[np.ndarray]:
    return [single_sound(CLASSES[i % 3], seed=i) for i in range(24)]


@pytest.fixture(scope="module")
def sounds(waveforms):
    return [find_sound(waveform, i, CLASSES[i % 3], SHORT) for i, waveform in enumerate(waveforms)]


def frame_power(samples: np.ndarray) -> np.ndarray:
    return np.array([np.mean(samples[i : i + FRAME].astype(np.float64) ** 2) for i in range(0, len(samples) - FRAME + 1, FRAME)])


def stretch(waveforms, event) -> np.ndarray:
    return event.gain * waveforms[event.source][event.source_start : event.source_start + event.num_samples].astype(np.float64)


def sum_of(waveforms, mixture: Mixture) -> np.ndarray:
    total = np.zeros(mixture.num_samples)
    for event in mixture.events:
        for i, sample in enumerate(stretch(waveforms, event)):
            total[event.onset + i] += sample
    return total


def test_a_sound_reaches_from_its_first_to_its_last_sounding_frame():
    levels = [0, 0, 0.009, 0.011, 0, 1.0, 0.5, 0.02, 0.0099, 0]  # 40 dB below the loudest is 0.01
    waveform = np.concatenate([np.repeat(np.float32(levels), FRAME), np.ones(FRAME - 1, dtype=np.float32)])  # and no whole frame
    sound = find_sound(waveform, 7, "step", MixtureSettings())
    assert (sound.source, sound.label, sound.start) == (7, "step", 3 * FRAME)
    assert sound.sounding.tolist() == [True, False, True, True, True]
    np.testing.assert_allclose(np.sqrt(sound.power), [0.011, 0, 1, 0.5, 0.02], rtol=1e-6)
    assert len(find_sound(waveform, 7, "step", MixtureSettings(sounding_db=41)).sounding) == 7  # from 0.009 to 0.0099


@pytest.mark.parametrize("waveform", [np.zeros(8000), np.full(8000, 0.00099), np.ones(FRAME - 1)])
def test_silence_is_not_a_sound(waveform):
    assert find_sound(waveform.astype(np.float32), 0, "nothing", MixtureSettings()) is None
    assert find_sound(np.full(8000, 0.0011, dtype=np.float32), 0, "faint", MixtureSettings()) is not None


@pytest.mark.parametrize("num_events", [1, 2, 5, 14, 24])
def test_at_one_instant_every_event_sounds(waveforms, sounds, num_events: int):
    for mixture in plan_mixtures(sounds, SHORT, [num_events], clips=20, seed=3, split="train"):
        assert len(mixture.events) == mixture.max_overlap == num_events
        assert len({event.source for event in mixture.events}) == num_events
        assert [event.onset for event in mixture.events] == sorted(event.onset for event in mixture.events)
        for event in mixture.events:
            assert 0 <= event.onset < event.offset <= mixture.num_samples == 32_000
            within = mixture.instant - event.onset
            loudest = frame_power(waveforms[event.source]).max() * event.gain**2
            assert np.mean(stretch(waveforms, event)[within : within + FRAME] ** 2) >= loudest * 1e-4 * (1 - 1e-9)


def test_an_event_is_trimmed_and_no_longer_than_asked_for(waveforms, sounds):
    lengths = []
    for mixture in plan_mixtures(sounds, SHORT, [3], clips=60, seed=0, split="train"):
        for event in mixture.events:
            power = frame_power(stretch(waveforms, event))
            threshold = frame_power(waveforms[event.source]).max() * event.gain**2 * 1e-4 * (1 - 1e-9)
            assert min(power[0], power[-1]) >= threshold
            whole = len(sounds[event.source].sounding) * FRAME
            assert event.num_samples == whole if whole <= 12_800 else 6_400 < event.num_samples <= 12_800
            lengths.append((whole, event.num_samples, event.source_start))
    assert any(whole > length for whole, length, _ in lengths)
    assert any(whole == length for whole, length, _ in lengths)


def test_levels_are_those_of_the_loudest_100_ms_and_uniform(waveforms, sounds):
    levels = []
    for mixture in plan_mixtures(sounds, SHORT, [4], clips=200, seed=1, split="train"):
        for event in mixture.events:
            squares = stretch(waveforms, event) ** 2
            loudest = max(np.mean(squares[start : start + 1600]) for start in range(0, len(squares) - 1599, FRAME))
            assert 10 * np.log10(loudest) == pytest.approx(event.level_db, abs=1e-6)
            levels.append(event.level_db)
    assert -35 <= min(levels) < -34.9
    assert -25.1 < max(levels) <= -25
    assert np.mean(levels) == pytest.approx(-30, abs=0.3)  # standard error of a mean of 800: 0.1
    assert np.std(levels) == pytest.approx(10 / 12**0.5, abs=0.2)


def test_classes_and_their_sounds_are_equally_frequent_and_may_repeat_or_not(sounds):
    few = [*sounds[:6], *(sound for sound in sounds[6:] if sound.label == "hiss")]  # 2 beeps, 2 clicks, 8 hisses
    first = Counter(plan_mixtures(few, SHORT, [1], clips=1, seed=i, split="train")[0].labels[0] for i in range(600))
    assert all(160 < count < 240 for count in first.values())
    repeated = [len(mixture.labels) for mixture in plan_mixtures(sounds, SHORT, [3], 300, seed=0, split="train")]
    assert Counter(repeated)[3] == pytest.approx(300 * 6 / 27, abs=25)  # 3! / 3^3, roughly: no sound comes twice
    distinct = plan_mixtures(sounds, replace(SHORT, repeat_classes=False), [3], 50, seed=0, split="train")
    assert all(mixture.labels == ["beep", "click", "hiss"] for mixture in distinct)
    everything = plan_mixtures(few, SHORT, [12], 3, seed=0, split="train")
    assert all(Counter(e.label for e in m.events) == {"beep": 2, "click": 2, "hiss": 8} for m in everything)


def test_without_a_common_instant_the_largest_overlap_is_counted(sounds):
    plans = plan_mixtures(sounds, replace(SHORT, overlap="anywhere"), [1, 3, 6], clips=20, seed=0, split="train")
    for mixture in plans:
        under_way = np.zeros(mixture.num_samples, dtype=int)
        for event in mixture.events:
            assert 0 <= event.onset < event.offset <= mixture.num_samples
            under_way[event.onset : event.offset] += 1
        assert mixture.max_overlap == under_way.max()
        assert mixture.instant is None
    assert {mixture.max_overlap for mixture in plans} > {1, 2, 3}


def test_events_that_touch_do_not_overlap(sounds):
    event = plan_mixture(sounds, SHORT, 1, np.random.default_rng(0)).events[0]
    assert Mixture(32_000, (replace(event, onset=0), replace(event, onset=event.num_samples)), None).max_overlap == 1
    assert Mixture(32_000, (replace(event, onset=0), replace(event, onset=event.num_samples - 1)), None).max_overlap == 2


def test_a_mixture_depends_on_its_seed_split_and_number_alone(sounds):
    plan = plan_mixtures(sounds, SHORT, [2, 5], clips=4, seed=7, split="train")
    assert [len(mixture.events) for mixture in plan] == [2, 5] * 4
    assert plan == plan_mixtures(sounds, SHORT, [2, 5], clips=4, seed=7, split="train")
    assert plan[1::2] == plan_mixtures(sounds, SHORT, [5, 9], clips=9, seed=7, split="train")[0:8:2]
    for seed, split in ((8, "train"), (7, "test")):
        others = plan_mixtures(sounds, SHORT, [2, 5], clips=4, seed=seed, split=split)
        assert not any(a == b for a in plan for b in others)
    assert len({mixture.instant for mixture in plan}) == 8


def test_a_mixture_is_the_sum_of_its_events(waveforms, sounds):
    for planned in plan_mixtures(sounds, SHORT, [1, 14], clips=2, seed=0, split="train"):
        waveform, mixture = render(planned, dict(enumerate(waveforms)))
        assert mixture == planned
        assert (waveform.dtype, waveform.shape) == (np.float32, (32_000,))
        np.testing.assert_allclose(waveform, sum_of(waveforms, mixture), rtol=0, atol=1e-7)


def test_beyond_full_scale_gains_and_levels_are_those_of_the_scaled_mixture(waveforms, sounds):
    planned = plan_mixture(sounds, replace(SHORT, level_db=[-1.0, 0.0]), 14, np.random.default_rng(0))
    peak = np.abs(sum_of(waveforms, planned)).max()
    assert peak > 1
    waveform, mixture = render(planned, waveforms)
    assert np.abs(waveform).max() == pytest.approx(FULL_SCALE, abs=1e-6)
    np.testing.assert_allclose(waveform, sum_of(waveforms, mixture), rtol=0, atol=1e-6)
    for before, after in zip(planned.events, mixture.events):
        assert after.gain / before.gain == pytest.approx(FULL_SCALE / peak)
        assert after.level_db - before.level_db == pytest.approx(20 * np.log10(FULL_SCALE / peak))
        assert replace(after, gain=0, level_db=0) == replace(before, gain=0, level_db=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"event_seconds": 5.1}, r"event_seconds is 5.1, but must lie between 0.01 and half of clip_seconds, 5"),
        ({"sounding_db": 0.0}, "sounding_db is 0.0"),
        ({"level_db": [-20.0, -30.0]}, r"level_db is \[-20.0, -30.0\], but must be \[lowest, highest\]"),
        ({"level_db": [-20.0, 1.0]}, "level_db"),
        ({"overlap": "sometimes"}, "overlap is 'sometimes', but must be one of together, anywhere"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
        ({"sampling_rate": 10**9}, "sampling_rate is 1000000000, but must be 1000 to 655350 Hz"),
        ({"clip_seconds": 1e12}, r"clip_seconds is 1e\+12, but must be at most 3600"),
    ],
)
def test_rules_that_cannot_be_are_rejected(values: dict, message: str):
    with pytest.raises(UserError, match=message):
        MixtureSettings(**values)


def test_more_events_than_sounds_or_classes_are_rejected(sounds):
    with pytest.raises(UserError, match="a mixture of 25 events needs as many different sounds, but there are 24"):
        plan_mixtures(sounds, SHORT, [25], 1, 0, "train")
    with pytest.raises(UserError, match="4 events of different classes needs as many classes, but there are 3"):
        plan_mixtures(sounds, replace(SHORT, repeat_classes=False), [4], 1, 0, "train")
    with pytest.raises(UserError, match="a mixture of -1 events is not possible"):
        plan_mixture(sounds, SHORT, -1, np.random.default_rng(0))
    assert plan_mixture(sounds, SHORT, 0, np.random.default_rng(0)).events == ()


# The benchmark


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """12 recordings in each of two folds, 4 a class, at two rates, some in stereo; two files of the first recording in fold 1."""
    root = tmp_path_factory.mktemp("singles")
    lines = ["file_name,label,fold,recording,license"]
    for i in range(25):
        rate = 22_050 if i % 4 == 0 else RATE
        sound = single_sound(CLASSES[i % 3], 100 + i, rate)
        soundfile.write(root / f"{i:02}.wav", np.stack([sound, sound / 2], axis=1) if i % 5 == 0 else sound, rate, subtype="FLOAT")
        lines.append(f"{i:02}.wav,{CLASSES[i % 3]},{1 if i < 12 or i == 24 else 2},r{0 if i == 24 else i},{'CC0' if i % 2 else 'CC-BY'}")
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


def benchmark_settings(folder: Path, output: Path, **values) -> BenchmarkSettings:
    defaults = {"fold_column": "fold", "train_folds": [1], "test_folds": [2], "group_column": "recording", "mixing": SHORT}
    sizes = {"num_events": [1, 3, 12], "train_clips": 3, "test_clips": 2, "clips_per_shard": 4}
    return BenchmarkSettings(data_dir=str(folder), output_dir=str(output), **{**defaults, **sizes, **values})


@pytest.fixture(scope="module")
def benchmark(folder: Path, tmp_path_factory) -> tuple[Path, dict]:
    output = tmp_path_factory.mktemp("benchmark") / "mixed"
    return output, make_benchmark(benchmark_settings(folder, output))


def parquet_files(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((output / "data").iterdir())}


def test_a_benchmark_is_a_data_set_of_two_splits(benchmark):
    output, report = benchmark
    assert sorted(path.name for path in output.iterdir()) == ["README.md", "data", "sources.csv"]
    assert list(output.parent.iterdir()) == [output]
    splits = datasets.load_dataset(str(output))
    assert {name: rows.num_rows for name, rows in splits.items()} == report["clips"] == {"train": 9, "test": 6}
    assert list(parquet_files(output)) == [
        *(f"test-0000{i}-of-00002.parquet" for i in range(2)),
        *(f"train-0000{i}-of-00003.parquet" for i in range(3)),
    ]
    assert splits["train"].features["audio"] == datasets.Audio(sampling_rate=RATE)
    assert splits["train"].features["labels"] == datasets.List(datasets.ClassLabel(names=list(CLASSES)))
    assert splits["train"]["num_events"] == [1, 3, 12] * 3


def test_sources_may_lie_in_any_layout(folder: Path, tmp_path: Path):
    """ESC-50's own: the same sounds, so the same mixtures."""
    (tmp_path / "esc50" / "meta").mkdir(parents=True)
    (tmp_path / "esc50" / "audio").symlink_to(folder)
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    lines = [f"{row['file_name']},{row['fold']},{sorted(CLASSES).index(row['label'])},{row['label']},False" for row in rows]
    (tmp_path / "esc50" / "meta" / "esc50.csv").write_text("\n".join(["filename,fold,target,category,esc10", *lines]))
    settings = {"num_events": [2], "group_column": None}
    make_benchmark(benchmark_settings(folder, tmp_path / "a", **settings))
    make_benchmark(benchmark_settings(tmp_path / "esc50", tmp_path / "b", layout="esc50", **settings))
    a, b = (datasets.load_dataset(str(tmp_path / name), split="train").cast_column("audio", datasets.Audio(decode=False)) for name in "ab")
    assert [row["bytes"] for row in a["audio"]] == [row["bytes"] for row in b["audio"]]


def test_a_benchmark_is_not_taken_for_another_in_a_folder_of_the_same_name(folder: Path, benchmark, tmp_path: Path):
    """`datasets` does that, in its cache, to folders whose card lists `configs`."""
    output = tmp_path / "elsewhere" / benchmark[0].name
    output.parent.mkdir()
    make_benchmark(benchmark_settings(folder, output, num_events=[2]))
    assert set(datasets.load_dataset(str(benchmark[0]), split="test")["num_events"]) != {2}
    assert set(datasets.load_dataset(str(output), split="test")["num_events"]) == {2}


def test_labels_are_those_of_what_was_mixed_and_the_mixture_is_the_sum_of_its_sources(folder: Path, benchmark):
    splits = datasets.load_dataset(str(benchmark[0])).cast_column("audio", datasets.Audio(decode=False))
    with (folder / "metadata.csv").open() as stream:
        metadata = {row["file_name"]: row for row in csv.DictReader(stream)}
    for split, fold in (("train", "1"), ("test", "2")):
        for row in splits[split]:
            info = soundfile.info(io.BytesIO(row["audio"]["bytes"]))
            assert (info.format, info.subtype, info.samplerate, info.channels, info.frames) == ("FLAC", "PCM_16", RATE, 1, 32_000)
            assert row["audio"]["path"].startswith(f"{split}_{row['num_events']:02}_events_")
            total, under_way = np.zeros(32_000), np.zeros(32_000)
            for event in row["events"]:
                source = load_waveform(folder / event["source"], RATE)
                start, onset, length = event["source_start_sample"], event["onset_sample"], event["num_samples"]
                total[onset : onset + length] += event["gain"] * source[start : start + length]
                under_way[onset : onset + length] += 1
                assert (event["onset"], event["offset"]) == (onset / RATE, (onset + length) / RATE)
                assert metadata[event["source"]]["fold"] == fold
                assert metadata[event["source"]]["label"] == CLASSES[event["label"]]
            np.testing.assert_allclose(load_waveform(row["audio"], RATE), total, rtol=0, atol=1.6e-5)
            assert row["labels"] == sorted({CLASSES.index(metadata[event["source"]]["label"]) for event in row["events"]})
            assert row["num_events"] == len(row["events"]) == len({event["source"] for event in row["events"]})
            assert row["max_overlap"] == under_way.max() == under_way[round(row["instant"] * RATE)] == row["num_events"]


@pytest.fixture(scope="module")
def below(tmp_path_factory) -> Path:
    """Backgrounds of each fold: one that is longer than a mixture, one that is shorter."""
    root = tmp_path_factory.mktemp("below")
    for fold in (1, 2):
        (root / f"{fold}").mkdir()
        for i, seconds in enumerate((3.0, 0.7)):
            soundfile.write(root / f"{fold}" / f"{i}.wav", 0.1 * noise(seconds, seed=10 * fold + i), RATE, subtype="FLOAT")
    return root


def backgrounds(below: Path, test: int = 2) -> dict[str, list]:
    return {f"{split}_backgrounds": [{"kind": "folder", "path": str(below / f"{i}")}] for split, i in (("train", 1), ("test", test))}


def test_backgrounds_lie_below_the_events_at_the_level_that_is_written_down(folder: Path, below: Path, tmp_path: Path):
    rules = replace(SHORT, background_db=[-50.0, -40.0], level_db=[-30.0, -30.0])
    settings = benchmark_settings(folder, tmp_path / "mixed", mixing=rules, num_events=[1, 2], train_clips=8, **backgrounds(below))
    make_benchmark(settings)
    splits = datasets.load_dataset(str(tmp_path / "mixed")).cast_column("audio", datasets.Audio(decode=False))
    starts = set()
    for split, fold in (("train", "1"), ("test", "2")):
        for row in splits[split]:
            waveform = load_waveform(row["audio"], RATE).astype(np.float64)
            for event in row["events"]:
                source = load_waveform(folder / event["source"], RATE)
                start, onset, length = event["source_start_sample"], event["onset_sample"], event["num_samples"]
                waveform[onset : onset + length] -= event["gain"] * source[start : start + length]
            name, first = row["background"], row["background_start_sample"]
            assert name.startswith(f"{fold}/")
            recording = load_waveform(below / name, RATE)
            expected = row["background_gain"] * np.resize(recording[first : first + 32_000], 32_000)
            np.testing.assert_allclose(waveform, expected, rtol=0, atol=3.2e-5)
            assert 10 * np.log10(np.mean(expected**2)) == pytest.approx(row["background_db"], abs=1e-3)
            assert -50 <= row["background_db"] <= -40
            starts.add((name, first))
    assert len(starts) > 10
    with (tmp_path / "mixed" / "sources.csv").open() as stream:
        below_events = [row for row in csv.DictReader(stream) if row["file"].startswith("1/")]
    assert sum(int(row["backgrounds"]) for row in below_events) == 16
    card = (tmp_path / "mixed" / "README.md").read_text()
    assert "uniform in -50 to -40 dB" in card
    assert str(below) not in card


def test_backgrounds_in_larger_files_have_their_names_there(folder: Path, below: Path, tmp_path: Path):
    features = datasets.Features({"audio": datasets.Audio(decode=False)})
    for fold in ("1", "2"):
        (tmp_path / "larger" / fold).mkdir(parents=True)
        audio = [{"bytes": file.read_bytes(), "path": f"{fold}-{file.name}"} for file in sorted((below / fold).iterdir())]
        rows = datasets.Dataset.from_dict({"audio": [*audio[:1], {**audio[1], "path": None}]}, features=features)
        rows.to_parquet(tmp_path / "larger" / fold / "train.parquet")
    sources = {
        f"{split}_backgrounds": [{"kind": "parquet", "path": str(tmp_path / "larger" / fold)}]
        for split, fold in (("train", "1"), ("test", "2"))
    }
    make_benchmark(benchmark_settings(folder, tmp_path / "mixed", num_events=[1], **sources))
    with (tmp_path / "mixed" / "sources.csv").open() as stream:
        names = {row["file"] for row in csv.DictReader(stream)}
    digest = hashlib.sha256((below / "1" / "1.wav").read_bytes()).hexdigest()
    assert {"1/1-0.wav", "2/2-0.wav", f"1/{digest}"} <= names


def test_backgrounds_of_both_splits_are_kept_apart(folder: Path, below: Path, tmp_path: Path):
    with pytest.raises(UserError, match="train and test share 2 file"):
        make_benchmark(benchmark_settings(folder, tmp_path / "mixed", **backgrounds(below, test=1)))
    with pytest.raises(UserError, match="train_backgrounds or test_backgrounds is empty"):
        benchmark_settings(folder, tmp_path / "mixed", train_backgrounds=backgrounds(below)["train_backgrounds"])


def test_a_silent_background_is_not_raised_to_the_level():
    silence = plan_background([np.zeros(40_000, np.float32)], SHORT, np.random.default_rng(0))
    assert (silence.gain, silence.level_db) == (1.0, -np.inf)


def test_classes_choose_the_sounds(folder: Path, tmp_path: Path):
    chosen = sorted(CLASSES)[:2]
    report = make_benchmark(benchmark_settings(folder, tmp_path / "mixed", classes=chosen, num_events=[2]))
    assert report["classes"] == chosen
    rows = list(csv.DictReader((folder / "metadata.csv").open()))
    for split, fold in (("train", "1"), ("test", "2")):
        assert report["sources"][split] == sum(row["label"] in chosen and row["fold"] == fold for row in rows)
    with pytest.raises(UserError, match="classes has wolf, but no train source has such a label"):
        make_benchmark(benchmark_settings(folder, tmp_path / "none", classes=["wolf"]))


def test_the_same_seed_gives_the_same_bytes_in_another_process_and_another_seed_others(folder: Path, benchmark, tmp_path: Path):
    recipe = yaml.safe_load((benchmark[0] / "README.md").read_text().split("```yaml\n")[1].split("```")[0])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))  # the card's own settings
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "2"}
    words = ["--config", tmp_path / "recipe.yaml", "--data_dir", folder, "--output_dir", tmp_path / "again"]
    command = [sys.executable, "-m", "transformers_sslam", "mix", *words]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert f"9 train, 6 test mixtures of 3 classes, 0 MB, in {tmp_path / 'again'}" in process.stdout
    assert parquet_files(tmp_path / "again") == parquet_files(benchmark[0])
    make_benchmark(benchmark_settings(folder, tmp_path / "other", seed=1))
    other = parquet_files(tmp_path / "other")
    assert not any(other[name] == content for name, content in parquet_files(benchmark[0]).items())


def test_the_card_and_the_table_of_sources_say_what_was_made_of_what(benchmark):
    output, _ = benchmark
    card = (output / "README.md").read_text()
    for path in (*(output / "data").iterdir(), output / "sources.csv"):
        assert f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(output)}\n" in card
    assert "9 train and 6 test mixtures of 2 s" in card
    assert "CC-BY (13 sources), CC0 (12 sources)" in card
    assert "| 12 | 3 | 3.0 | 12.0 | 2 | 3.0 | 12.0 |" in card
    assert "13 sounds of 12 recordings in train, 12 sounds of 12 recordings in test" in card
    assert "Left out" not in card
    assert str(output.parent) not in card
    with (output / "sources.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert sum(int(row["events"]) for row in rows) == 3 * (1 + 3 + 12) + 2 * (1 + 3 + 12)
    events = Counter(e["source"] for f in (output / "data").iterdir() for row in pq.read_table(f)["events"].to_pylist() for e in row)
    assert {row["file"]: int(row["events"]) for row in rows if int(row["events"])} == dict(events)
    assert [row["split"] for row in rows] == ["train"] * 13 + ["test"] * 12
    assert {(row["file"], row["recording"], row["license"]) for row in rows} >= {("24.wav", "r0", "CC-BY"), ("01.wav", "r1", "CC0")}


def test_it_is_training_data_with_several_labels(benchmark):
    rows = datasets.load_dataset(str(benchmark[0]), split="train").cast_column("audio", datasets.Audio(decode=False))
    labelled = read_rows(rows, "labels")
    assert labelled.labels.multi_label
    assert choose_classes(labelled.labels) == list(CLASSES)
    assert labelled.encode(CLASSES).one_hot(range(len(labelled))).sum(axis=1).tolist() == [len(labels) for labels in rows["labels"]]


def test_a_recording_or_a_copied_file_in_both_splits_is_rejected(folder: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in folder.glob("*.wav"):
        (moved / path.name).write_bytes(path.read_bytes())
    table = (folder / "metadata.csv").read_text()
    (moved / "metadata.csv").write_text(table.replace("24.wav,beep,1", "24.wav,beep,2"))
    with pytest.raises(UserError, match=r"train and test share 1 recording: r0: choose folds or splits"):
        make_benchmark(benchmark_settings(moved, tmp_path / "out"))
    make_benchmark(benchmark_settings(moved, tmp_path / "blind", group_column=None))  # of other bytes, nothing shows it
    (moved / "24.wav").write_bytes((moved / "00.wav").read_bytes())
    with pytest.raises(UserError, match=r"train and test share 1 file \(by its SHA-256\)"):
        make_benchmark(benchmark_settings(moved, tmp_path / "out", group_column=None))
    assert not (tmp_path / "out").exists()


def test_a_fraction_of_the_recordings_can_be_held_out(folder: Path, tmp_path: Path):
    by_fraction = {"fold_column": None, "train_folds": [], "test_folds": [], "test_fraction": 0.4, "num_events": [4]}
    report = make_benchmark(benchmark_settings(folder, tmp_path / "out", **by_fraction))
    assert report["recordings"] == {"train": 14, "test": 10}  # of 24
    assert sum(report["sources"].values()) == 25
    with (tmp_path / "out" / "sources.csv").open() as stream:
        split = {(row["split"], row["recording"]) for row in csv.DictReader(stream)}
    assert len(split) == 24


def test_a_label_of_two_lines_is_rejected_before_anything_is_decoded(folder: Path, tmp_path: Path, monkeypatch):
    for path in folder.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = (folder / "metadata.csv").read_text()
    (tmp_path / "metadata.csv").write_text(table.replace("24.wav,beep,1", '24.wav,"be\nep",1'))
    monkeypatch.setattr("transformers_sslam.polyphony.sounds.Waveforms", None)
    with pytest.raises(UserError, match=r"has the label 'be\\nep', but a label is one line"):
        make_benchmark(benchmark_settings(tmp_path, tmp_path / "out"))


def test_sources_that_cannot_be_used_are_named_or_stop_the_program(folder: Path, tmp_path: Path):
    for path in folder.glob("*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "03.wav").write_bytes(b"no audio")
    soundfile.write(tmp_path / "13.wav", np.zeros(RATE), RATE)
    with pytest.raises(UserError, match=r"1 of 13 train clips cannot be used \(1 unreadable\).*03.wav"):
        make_benchmark(benchmark_settings(tmp_path, tmp_path / "out"))
    with pytest.raises(UserError, match=r"1 of 12 test clips cannot be used \(1 silent\).*13.wav"):
        make_benchmark(benchmark_settings(tmp_path, tmp_path / "out", max_unreadable=0.08))
    report = make_benchmark(benchmark_settings(tmp_path, tmp_path / "out", max_unreadable=0.1, num_events=[11]))
    assert report["left_out"]["test"] == {"silent": ["13.wav"]}
    assert report["sources"] == {"train": 12, "test": 11}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- test, silent: 13.wav" in card
    assert "- train, unreadable: 03.wav" in card  # seen from the folder: the card would otherwise differ with its place


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_events": [13]}, "test: a mixture of 13 events needs as many different sounds, but there are 12"),
        ({"num_events": [1, 1]}, r"num_events is \[1, 1\], but must be different numbers"),
        ({"train_clips": 0}, "train_clips is 0, but must be at least 1"),
        ({"test_fraction": 0.5}, "give one of the two"),
        ({"max_unreadable": 2.0}, r"max_unreadable is 2, but a fraction in \[0, 1\) is expected"),
        ({"memory_gb": -1.0}, "memory_gb is -1, but a number of at least 0"),
        ({"fold_column": None}, "no fold_column that they are values of"),
        ({"test_folds": [3]}, "the column 'fold' has no fold 3"),
        ({"group_column": "artist"}, "there is no column 'artist'"),
        ({"label_column": "class"}, "there is no column 'class'"),
        (
            {"fold_column": None, "train_folds": [], "test_folds": [], "test_fraction": 0.01},
            "leaves one of the splits without any of 24 recordings",
        ),
        ({"fold_column": "label", "train_folds": ["beep"], "test_folds": ["hiss"]}, "no train source has the class hiss"),
        ({"fold_column": None, "train_folds": [], "test_folds": []}, "there is no split 'test'"),
    ],
)
def test_what_cannot_be_made_is_rejected_in_one_sentence_and_leaves_nothing(folder: Path, tmp_path: Path, values: dict, message: str):
    with pytest.raises(UserError, match=message):
        make_benchmark(benchmark_settings(folder, tmp_path / "out", **values))
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_several_sounds_is_rejected(tmp_path: Path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        soundfile.write(tmp_path / split / "a.wav", noise(0.5), RATE)
        (tmp_path / split / "metadata.jsonl").write_text('{"file_name": "a.wav", "label": ["hum", "hiss"]}\n')
    with pytest.raises(UserError, match=r"train.a.wav has 2 labels, but a single sound has one"):
        make_benchmark(BenchmarkSettings(data_dir=str(tmp_path), output_dir=str(tmp_path / "out")))


def test_neither_an_interruption_nor_what_is_there_already_does_harm(folder: Path, benchmark, tmp_path: Path, monkeypatch):
    with pytest.raises(UserError, match="exists and is not an empty folder: choose another place"):
        make_benchmark(benchmark_settings(folder, benchmark[0]))
    encode, calls = polyphonic_benchmark.encode_row, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(polyphonic_benchmark, "encode_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_benchmark(benchmark_settings(folder, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_names_from_data_have_no_markup_and_no_formula(tmp_path: Path):
    """In the card and in the table of sources; the data themselves keep them."""
    classes = {"<b>![x](http://a)": "hum", "=HYPERLINK(1)": "-1+2"}
    for split in ("train", "test"):
        for label, name in classes.items():
            (tmp_path / "sounds" / split / label.replace("/", "-")).mkdir(parents=True)
            sound = noise(0.5, seed=len(label + split + name))
            soundfile.write(tmp_path / "sounds" / split / label.replace("/", "-") / f"{name}.wav", sound, RATE)
    settings = {"num_events": [1], "train_clips": 1, "test_clips": 1, "mixing": SHORT}
    report = make_benchmark(BenchmarkSettings(data_dir=str(tmp_path / "sounds"), output_dir=str(tmp_path / "out"), **settings))
    assert report["classes"] == ["<b>![x](http:--a)", "=HYPERLINK(1)"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert r"Classes (2): &lt;b&gt;\!\[x\](http:--a), =HYPERLINK(1)." in card
    assert "<b>" not in card
    with (tmp_path / "out" / "sources.csv").open(newline="") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert "'=HYPERLINK(1)" in cells
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]


def test_a_mistake_on_the_command_line_gets_one_line(tmp_path: Path, capsys):
    words = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main(["mix", *words, "--mixing.event_seconds", "9"]) == 2
    assert "event_seconds is 9, but must lie between" in capsys.readouterr().err.splitlines()[-1]
    assert main(["mix", *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("sslam mix: error: ")


def test_esc10_mixed_as_the_recipe_says(shared: Path, tmp_path: Path):
    changes = {"data_dir": str(shared / "data" / "esc10"), "output_dir": str(tmp_path / "out"), "train_clips": 1, "test_clips": 1}
    report = make_benchmark(read_settings(BenchmarkSettings, "polyphonic_esc10", changes))
    assert report["clips"] == {"train": 14, "test": 14}
    assert report["recordings"]["train"] + report["recordings"]["test"] == 247
    assert len(report["classes"]) == 10
    rows = datasets.load_dataset(str(tmp_path / "out"), split="test")
    assert rows["num_events"] == rows["max_overlap"] == list(range(1, 15))
