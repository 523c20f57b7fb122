"""Streams of clips: each clip exactly once an epoch, in an order that follows from the seed, from any position and for any processes."""

import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import tarfile
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from datasets import Audio, ClassLabel, Dataset, Features, List, Value
from processes import Fork

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio import clips as clips_module
from transformers_sslam.audio import readers as readers_module
from transformers_sslam.audio import shared as shared_module
from transformers_sslam.audio.batches import ClipStream, DataSettings
from transformers_sslam.audio.cache import WaveformCache
from transformers_sslam.audio.clips import ReadStatistics, Windows
from transformers_sslam.audio.sources import EpochOrder, Source, SourceSettings, WeightedOrder
from transformers_sslam.audio.stream import BatchStream
from transformers_sslam.errors import UserError


EXTRACTOR = SSLAMFeatureExtractor(max_length=32)  # windows of 5360 samples, 0.335 s
CLIPS = 37
LONG = {3, 17}  # recordings of four windows


@pytest.fixture(autouse=True)
def _one_thread_and_a_cache_of_its_own(tmp_path_factory, monkeypatch):
    """Sums over threads may differ in their last bit, and small work is fastest alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(number: int) -> float:
    return 4 * 0.32 if number in LONG else 0.22 + 0.003 * number


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("audio") / "clips"
    for number in range(CLIPS):
        file = root / f"part{number % 3}" / f"{number:02d}.wav"
        file.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(file, noise(seconds(number), seed=number), 16_000)
    return root


def write_parquet(folder: Path, target: Path, rows_per_group: int = 4) -> None:
    files = sorted(folder.rglob("*.wav"))
    rows = {"audio": [{"bytes": file.read_bytes(), "path": file.name} for file in files], "number": [int(file.stem) for file in files]}
    dataset = Dataset.from_dict(rows).cast_column("audio", Audio(decode=False))
    target.mkdir()
    for part, (start, stop) in enumerate(((0, 15), (15, CLIPS))):
        dataset.select(range(start, stop)).to_parquet(target / f"{part}.parquet", batch_size=rows_per_group)


@pytest.fixture(scope="module")
def kinds(folder: Path, tmp_path_factory) -> dict[str, dict]:
    """The same recordings as a source of each kind that needs no network."""
    root = tmp_path_factory.mktemp("kinds [1]")  # which `datasets` would take for a pattern
    files = sorted(folder.rglob("*.wav"))
    (root / "all.tsv").write_text(f"{folder}\n" + "".join(f"{file.relative_to(folder)}\t5360\n" for file in files))
    write_parquet(folder, root / "parquet")
    plain = tmp_path_factory.mktemp("hub")
    shutil.copytree(root / "parquet", plain, dirs_exist_ok=True)
    (root / "tars").mkdir()
    for part in range(3):
        with tarfile.open(root / "tars" / f"{part}.tar", "w") as archive:
            for file in files[part::3]:
                archive.add(file, arcname=file.name)
    shutil.copytree(folder, root / "audiofolder")
    names = [str(path.relative_to(root / "audiofolder")) for path in sorted((root / "audiofolder").rglob("*.wav"))]
    (root / "audiofolder" / "metadata.csv").write_text("file_name,number\n" + "".join(f"{name},{int(Path(name).stem)}\n" for name in names))
    return {
        "folder": {"kind": "folder", "path": str(folder)},
        "manifest": {"kind": "manifest", "path": str(root / "all.tsv")},
        "audiofolder": {"kind": "audiofolder", "path": str(root / "audiofolder")},
        "parquet": {"kind": "parquet", "path": str(root / "parquet")},
        "webdataset": {"kind": "webdataset", "path": str(root / "tars")},
        "hub": {"kind": "hub", "path": str(plain)},  # `datasets` takes a folder for an id
    }


def open_stream(*sources: dict, batch_size: int = 4, settings: dict | None = None, **kwargs) -> ClipStream:
    return ClipStream(DataSettings(list(sources), **{"shuffle_rows": 8, **(settings or {})}), EXTRACTOR, batch_size=batch_size, **kwargs)


def clips_of(batches) -> list[tuple[str, float]]:
    """Which clips, by the name of the recording's file and where in it they begin."""
    return [(Path(name).stem, start) for batch in batches for name, start in zip(batch["names"], batch["starts"])]


def all_clips(epochs: int = 1) -> list[tuple[str, float]]:
    once = [(f"{number:02d}", 0.32 * window) for number in range(CLIPS) for window in range(4 if number in LONG else 1)]
    return sorted(once * epochs)


def assert_same(actual: list[dict], expected: list[dict]) -> None:
    assert [list(zip(batch["names"], batch["starts"])) for batch in actual] == [list(zip(b["names"], b["starts"])) for b in expected]
    assert all(torch.equal(a["input_values"], b["input_values"]) for a, b in zip(actual, expected))


def total(streams: list[BatchStream]) -> dict[str, Any]:
    """Statistics of all processes together, in an order that does not depend on them."""
    values = sum((stream.statistics for stream in streams), ReadStatistics()).as_dict()
    return {**values, "examples": sorted(values["examples"])}


def write_clips(folder: Path, count: int, seconds: float = 0.3) -> dict:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        soundfile.write(folder / f"{number:03d}.wav", noise(seconds, seed=number), 16_000, subtype="FLOAT")
    return {"kind": "folder", "path": str(folder)}


# --- each clip once an epoch


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_the_processes_together_give_each_clip_exactly_once_an_epoch(kinds, kind: str, world_size: int, num_workers: int):
    streams = [open_stream(kinds[kind], rank=rank, world_size=world_size, num_workers=num_workers, epochs=2) for rank in range(world_size)]
    parts = [list(stream) for stream in streams]
    assert sorted(clip for batches in parts for clip in clips_of(batches)) == all_clips(2)
    for batches in parts:
        sizes = [len(batch["input_values"]) for batch in batches]
        assert sum(size < 4 for size in sizes) <= max(1, num_workers)  # each worker's very last one
        assert all(batch["input_values"].shape[1:] == (32, 128) for batch in batches)
    one = open_stream(kinds[kind], epochs=2)
    list(one)
    assert total(streams) == total([one])
    assert one.statistics.num_clips == 2 * len(all_clips())


@pytest.mark.parametrize("kind", ["manifest", "audiofolder", "webdataset", "hub"])
def test_every_kind_of_source_gives_the_same_clips(kinds, kind: str):
    one, other = list(open_stream(kinds["folder"], epochs=1)), list(open_stream(kinds[kind], epochs=1, num_workers=2))
    assert sorted(clips_of(other)) == sorted(clips_of(one))
    values = dict(zip(clips_of(one), torch.cat([batch["input_values"] for batch in one])))
    for clip, row in zip(clips_of(other), torch.cat([batch["input_values"] for batch in other])):
        assert torch.equal(values[clip], row)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_last_batch_is_filled_from_the_next_epoch(kinds, num_workers: int):
    stream = open_stream(kinds["folder"], batch_size=5, num_workers=num_workers)  # 43 clips: 8 batches and 3 clips
    batches = list(islice(stream, 86))
    assert {len(batch["names"]) for batch in batches} == {5}
    counts = Counter(clips_of(batches))
    assert counts.keys() == set(all_clips())
    if num_workers == 0:
        assert set(counts.values()) == {10}  # 86 * 5 / 43: ten whole epochs
        assert sorted(clips_of(batches)[: len(all_clips())]) == all_clips()


def test_the_last_batch_is_dropped_or_kept_where_that_is_asked_for(kinds):
    def sizes(last_batch: str, num_workers: int = 0) -> list[int]:
        stream = open_stream(kinds["folder"], batch_size=5, epochs=2, num_workers=num_workers, settings={"last_batch": last_batch})
        return [len(batch["names"]) for batch in stream]

    assert sizes("keep") == [*[5] * 8, 3] * 2
    assert sizes("drop") == [5] * 16
    assert sizes("fill") == [*[5] * 17, 1]
    assert sum(sizes("keep", num_workers=2)) == 86
    assert set(sizes("drop", num_workers=2)) == {5}


@pytest.mark.parametrize(("shard_readers", "num_workers"), [(4, 3), (64, 3), (7, 2)])
def test_workers_with_fewer_readers_do_not_run_ahead(kinds, shard_readers: int, num_workers: int):
    stream = open_stream(kinds["folder"], num_workers=num_workers, settings={"shard_readers": shard_readers})
    batches = list(islice(stream, round(20 * len(all_clips()) / 4)))
    epochs = [position[0] for position in stream.state_dict()["positions"].values()]
    assert 17 <= min(epochs) <= max(epochs) <= 23
    assert max(Counter(clips_of(batches)).values()) - min(Counter(clips_of(batches)).values()) <= 6


def test_processes_that_cannot_share_the_readers_evenly_are_told(kinds, caplog):
    open_stream(kinds["folder"], world_size=2)
    assert caplog.text == ""
    open_stream(kinds["folder"], world_size=3)
    assert "shard_readers is 64, which cannot be divided evenly among 3 processes" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_that_never_fill_are_an_error_and_not_a_hang(tmp_path: Path, num_workers: int):
    source = write_clips(tmp_path / "few", 5)
    with pytest.raises(UserError, match=r"last_batch is 'drop', and the last \d+ clips of a worker were all dropped"):
        list(open_stream(source, batch_size=8, num_workers=num_workers, settings={"last_batch": "drop"}))
    assert len(next(iter(open_stream(source, batch_size=8, num_workers=num_workers)))["names"]) == 8


@pytest.mark.parametrize("shard_readers", [1, 2, 2500])
def test_any_number_of_readers_gives_all_clips(kinds, shard_readers: int):
    stream = open_stream(kinds["parquet"], epochs=3, settings={"shard_readers": shard_readers})
    assert sorted(clips_of(stream)) == all_clips(3)


def test_fewer_shards_than_processes_are_rejected_and_fewer_than_workers_warned_of(kinds, caplog):
    with pytest.raises(UserError, match="an epoch has 3 shards for 4 processes"):
        open_stream(kinds["webdataset"], world_size=4)
    with pytest.raises(UserError, match="shard_readers is 3, but 2 processes with 2 workers each need 4"):
        open_stream(kinds["folder"], world_size=2, num_workers=2, settings={"shard_readers": 3})
    with caplog.at_level(logging.WARNING):
        streams = [open_stream(kinds["webdataset"], rank=rank, world_size=2, num_workers=2, epochs=4) for rank in range(2)]
    assert caplog.text.count("3 shards for 2 processes with 2 workers each, so in each epoch 1 workers have nothing to do") == 1
    assert sorted(clip for stream in streams for clip in clips_of(stream)) == all_clips(4)


# --- resuming


@pytest.mark.parametrize("last_batch", ["fill", "drop", "keep"])
@pytest.mark.parametrize("num_workers", [0, 3])
def test_resuming_behind_any_batch_gives_the_rest_bit_for_bit(kinds, num_workers: int, last_batch: str):
    def fresh() -> ClipStream:
        sources = ({**kinds["folder"], "weight": 0.5}, kinds["parquet"], kinds["webdataset"])
        settings = {"last_batch": last_batch, "roll": True, "windows": "random"}
        return open_stream(*sources, batch_size=3, num_workers=num_workers, seed=5, epochs=2, settings=settings)

    stream, batches, states, statistics = fresh(), [], [], []
    for batch in stream:
        batches.append(batch)
        states.append(json.dumps(stream.state_dict()))
        statistics.append(stream.statistics)
    in_first_epoch = sum(min(position[0] for position in json.loads(state)["positions"].values()) == 0 for state in states)
    assert 20 < in_first_epoch < len(batches) - 8
    for number in range(0, len(batches), 9 if num_workers == 0 else 17):
        resumed = fresh()
        resumed.load_state_dict([json.loads(states[number])])
        assert resumed.statistics == statistics[number]
        assert_same(list(resumed), batches[number + 1 :])
        assert resumed.statistics == stream.statistics


LAYOUTS = [((2, 0), (1, 0)), ((1, 0), (2, 0)), ((1, 0), (1, 2)), ((1, 2), (1, 0)), ((3, 2), (1, 1)), ((1, 3), (2, 2))]


@pytest.mark.parametrize(("before", "after"), LAYOUTS)
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_other_processes_and_workers_resume_in_the_same_epoch(kinds, kind: str, before: tuple[int, int], after: tuple[int, int]):
    """In the middle of an epoch and of recordings of several windows, each clip comes exactly once, wherever the first part ends."""

    def processes(world_size: int, num_workers: int) -> list[ClipStream]:
        settings = {"shard_readers": 6}  # few, so that several shards are begun
        return [
            open_stream(kinds[kind], batch_size=1, rank=rank, world_size=world_size, num_workers=num_workers, epochs=2, settings=settings)
            for rank in range(world_size)
        ]

    whole = processes(1, 0)
    list(whole[0])
    inside_recordings = 0
    for batches in (1, 8, 13) if before[1] + after[1] else (1, 7, 13, 19):
        first = processes(*before)
        clips = [clip for stream in first for clip in clips_of(islice(stream, batches))]
        states = json.loads(json.dumps([stream.state_dict() for stream in first]))
        inside_recordings += any(0 < position[4] < 4 for state in states for position in state["positions"].values())
        second = processes(*after)
        for stream in second:
            stream.load_state_dict(states)
        assert sum(stream.statistics.num_clips for stream in second) == len(clips) == batches * before[0]
        clips += [clip for stream in second for clip in clips_of(stream)]
        assert sorted(clips) == all_clips(2)
        assert total(second) == total(whole)
    assert inside_recordings


def test_the_clips_left_for_the_next_epoch_are_not_lost_when_the_layout_changes(kinds):
    first = open_stream(kinds["folder"], batch_size=5)
    clips = clips_of(islice(first, 9))  # two clips of the second epoch among them
    second = open_stream(kinds["folder"], batch_size=4, num_workers=2, epochs=3)
    second.load_state_dict([first.state_dict()])
    assert sorted(clips + clips_of(second)) == all_clips(3)


def test_leaving_in_the_middle_and_coming_back_loses_nothing(kinds):
    stream, clips = open_stream(kinds["folder"], num_workers=2, epochs=1), []
    for _ in range(3):
        clips += clips_of(islice(stream, 2))
    assert sorted(clips + clips_of(stream)) == all_clips()
    assert list(stream) == []


def test_another_batch_size_resumes_with_the_same_clip(kinds):
    stream = open_stream(kinds["folder"], batch_size=4, epochs=1)
    first = list(islice(stream, 3))
    other = open_stream(kinds["folder"], batch_size=7, epochs=1)
    other.load_state_dict([stream.state_dict()])
    assert clips_of(first) + clips_of(other) == clips_of(open_stream(kinds["folder"], epochs=1))


def test_a_state_is_plain_and_does_not_grow(kinds):
    stream, sizes = open_stream(kinds["folder"], settings={"shard_readers": 8}), []
    for _ in islice(stream, 400):
        text = json.dumps(stream.state_dict())
        assert json.loads(text) == stream.state_dict()
        sizes.append(len(text))
    assert stream.epoch == 37
    assert max(sizes) - min(sizes) < 60  # digits


def test_a_state_of_the_older_form_begins_its_epoch_again(kinds, caplog):
    stream = open_stream(kinds["folder"], epochs=5, seed=3)
    place = {"visit": 3, "row": 1, "taken": 2, "window": 0, "silent": 0, "tally": {}}
    data = {"seed": 3, "sources": [["0123456789abcdef", 1.0]], "windows": stream.state_dict()["data"]["windows"], "shuffle_rows": 8}
    layout = {"rank": 0, "world_size": 1, "num_workers": 0}
    older = {"data": data, "layout": layout, "epoch": 4, "next_lane": 0, "places": [place], "before": {}}
    with caplog.at_level(logging.WARNING):
        stream.load_state_dict([older])
    assert "kept in an older form: epoch 4 begins again" in caplog.text
    assert sorted(clips_of(stream)) == all_clips()
    with pytest.raises(UserError, match=r"another stream: seed \(3 then, 1 now\)"):
        open_stream(kinds["folder"], seed=1).load_state_dict([older])


def test_a_position_of_another_stream_is_rejected(kinds, folder: Path, tmp_path: Path):
    states = [open_stream(kinds["folder"], rank=rank, world_size=2).state_dict() for rank in range(2)]
    with pytest.raises(UserError, match=r"another stream: seed \(0 then, 1 now\)"):
        open_stream(kinds["folder"], seed=1).load_state_dict(states)
    with pytest.raises(UserError, match=r"another stream: the weight of .* \(1 then, 2 now\)"):
        open_stream({**kinds["folder"], "weight": 2}).load_state_dict(states)
    with pytest.raises(UserError, match="another stream: there were 1 sources then, and there are 2 now"):
        open_stream(kinds["folder"], {**kinds["parquet"], "name": "second"}).load_state_dict(states)
    with pytest.raises(UserError, match=r"shard_readers \(64 then, 32 now\)"):
        open_stream(kinds["folder"], settings={"shard_readers": 32}).load_state_dict(states)
    with pytest.raises(UserError, match=r"positions of the shard readers \[1, 3, .* are missing: give the states of all processes"):
        open_stream(kinds["folder"]).load_state_dict(states[:1])
    shutil.copytree(folder, tmp_path / "moved")
    moved = {"kind": "folder", "path": str(tmp_path / "moved")}
    open_stream(moved).load_state_dict(states)  # the same files elsewhere are the same
    file = tmp_path / "moved" / "part0" / "00.wav"
    data = file.read_bytes()
    file.write_bytes(data + b"\0")
    with pytest.raises(UserError, match="another stream: the recordings of .* have changed, by their names or sizes"):
        open_stream(moved).load_state_dict(states)
    file.write_bytes(data)
    open_stream(moved).load_state_dict(states)
    file.rename(file.with_stem("99"))
    with pytest.raises(UserError, match="another stream: the recordings of .* have changed, by their names or sizes"):
        open_stream(moved).load_state_dict(states)


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "manifest", "audiofolder"])
def test_audio_replaced_between_two_parts_of_a_run_is_noticed(kinds, folder: Path, tmp_path: Path, kind: str):
    shutil.copytree(folder, tmp_path / "audio")
    if kind == "manifest":
        text = Path(kinds[kind]["path"]).read_text().replace(str(folder), str(tmp_path / "audio"))
        (tmp_path / "all.tsv").write_text(text)
        source, replaced = tmp_path / "all.tsv", tmp_path / "audio" / "part1" / "01.wav"
    else:
        source = Path(shutil.copytree(kinds[kind]["path"], tmp_path / "copy"))
        replaced = sorted(file for file in source.rglob("*") if file.suffix in (".wav", ".parquet", ".tar"))[0]
    settings = {"kind": kind, "path": str(source)}
    state = open_stream(settings).state_dict()
    open_stream(settings).load_state_dict([state])
    with replaced.open("ab") as file:
        file.write(bytes(512))  # of an archive, one more empty block
    if kind == "parquet":
        write_parquet(folder, tmp_path / "other", rows_per_group=5)
        shutil.copy(tmp_path / "other" / "0.parquet", replaced)
    with pytest.raises(
        UserError, match="another stream: the recordings of .* have changed(, by their names or sizes| .10 shards then, 9 now.)"
    ):
        open_stream(settings).load_state_dict([state])


def test_resuming_reads_no_more_late_in_the_epoch_than_early(tmp_path: Path, monkeypatch):
    soundfile.write(tmp_path / "one.wav", noise(0.3), 16_000)
    (tmp_path / "many.tsv").write_text(".\n" + "one.wav\t4800\n" * 1500)
    source = {"kind": "manifest", "path": str(tmp_path / "many.tsv")}
    stream, states = open_stream(source, batch_size=100), []
    for _ in islice(stream, 15):
        states.append(stream.state_dict())
    rows, decoded = [], []
    reading, decoding = Source.rows, readers_module.read_clips
    monkeypatch.setattr(Source, "rows", lambda *args: [rows.append(1), reading(*args)][1])
    monkeypatch.setattr(readers_module, "read_clips", lambda *args: [decoded.append(1), decoding(*args)][1])
    for number in (0, 7, 13):
        rows.clear(), decoded.clear()
        stream.load_state_dict([states[number]])
        next(iter(stream))
        assert len(rows) <= 100 + 2 * 8 + 1 + 13  # what is given out, the blocks at both ends, and a row before each block
        assert len(decoded) <= 101


# --- order


def test_the_order_follows_from_seed_and_epoch_alone(kinds):
    def order(seed: int, first: int = 0, epochs: int = 1) -> list:
        stream = open_stream(kinds["parquet"], seed=seed, epochs=first + epochs)
        state = stream.state_dict()
        stream.load_state_dict([{**state, "positions": {reader: [first, 0, 0, 0, 0] for reader in state["positions"]}}])
        return clips_of(stream)

    assert order(1) == order(1)
    assert order(1) != order(1, first=1)
    assert order(1) != order(2)
    assert order(1, epochs=3) == order(1) + order(1, first=1) + order(1, first=2)


def test_neighbours_in_a_shard_are_not_neighbours_in_every_epoch(folder: Path, tmp_path: Path):
    """One clip is mixed into the next, so which follows which must change, even where a whole file is one shard."""
    write_parquet(folder, tmp_path / "parquet", rows_per_group=100)
    source, pairs = {"kind": "parquet", "path": str(tmp_path / "parquet")}, []
    stream = open_stream(source, settings={"shuffle_rows": 16}, epochs=4)
    names = [name for name, start in clips_of(stream) if start == 0]
    for epoch in range(4):
        pairs.append(set(pairwise(names[epoch * CLIPS : (epoch + 1) * CLIPS])))
    assert max(len(one & other) for one in pairs for other in pairs if one is not other) <= 10  # of 36


def test_weights_say_how_often_an_epoch_has_each_clip(kinds):
    stream = open_stream({**kinds["folder"], "weight": 2, "name": "twice"}, {**kinds["manifest"], "weight": 0.5, "name": "half"}, epochs=2)
    counts = Counter(clips_of(stream))
    assert counts == Counter(all_clips(5))
    assert stream.statistics.clips == {"twice": 4 * len(all_clips()), "half": len(all_clips())}
    order = EpochOrder([40, 10], [2, 0.5], seed=0)
    for epoch in range(2):
        assert np.bincount(order(epoch)[order(epoch)[:, 0] == 0, 1]).tolist() == [2] * 40
    assert sorted(np.concatenate([order(epoch)[order(epoch)[:, 0] == 1, 1] for epoch in range(2)])) == list(range(10))


@pytest.mark.parametrize("weight", [0.1, 1 / 3, 1, 2.5])
def test_over_the_epochs_every_shard_comes_equally_often(weight: float):
    epochs, order = round(30 / weight), EpochOrder([7, 3], [weight, 1], seed=3)
    visits = np.concatenate([order(epoch) for epoch in range(epochs)])
    assert visits.shape[1] == 2
    for source, shards, passes in ((0, 7, 30), (1, 3, epochs)):
        counts = np.bincount(visits[visits[:, 0] == source, 1], minlength=shards)
        assert counts.tolist() == [passes] * shards


def test_weighted_rows_are_drawn_as_often_as_their_weights_say():
    weights = np.array([0.0, 1, 2, 5], dtype=np.float32) / 8
    order = WeightedOrder(weights, 80_000, seed=4)
    drawn = order(0)
    assert drawn.shape == (80_000, 2)
    assert not drawn[:, 0].any()
    counts = np.bincount(drawn[:, 1], minlength=4)
    deviations = np.sqrt(80_000 * weights * (1 - weights))
    assert (abs(counts - 80_000 * weights) <= 4 * deviations).all()
    np.testing.assert_array_equal(drawn, WeightedOrder(weights, 80_000, seed=4)(0))
    assert (drawn != order(1)).any()
    assert (drawn != WeightedOrder(weights, 80_000, seed=5)(0)).any()
    many = np.random.default_rng(0).random(200_000).astype(np.float32)  # whose sum is not exact in float32
    assert len(WeightedOrder(many / many.sum(), 10, seed=0)(0)) == 10


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_order_of_draws_is_read_as_it_says(kinds, num_workers: int):
    source, weights = Source.open(SourceSettings(**kinds["folder"])), np.zeros(CLIPS)
    weights[[2, 9]] = 1, 3
    order = WeightedOrder(weights, 40, seed=1)
    windows = Windows(16_000, None, 0, "every", 400)
    stream = BatchStream([source], windows, rows_of, batch_size=4, order=order, epochs=2, num_workers=num_workers)
    rows = [row for batch in stream for row in batch]
    assert sorted(rows) == sorted([*order(0)[:, 1], *order(1)[:, 1]])
    assert set(rows) == {2, 9}


def rows_of(clips: list) -> list[int]:
    return [clip.row for clip in clips]


def test_random_windows_are_drawn_anew_each_epoch_and_alike_each_run(kinds):
    def starts(num_workers: int) -> set:
        stream = open_stream(kinds["folder"], settings={"windows": "random"}, seed=2, epochs=3, num_workers=num_workers)
        return {clip for clip in clips_of(stream) if int(clip[0]) in LONG}

    assert len(starts(0)) == 6
    assert starts(0) == starts(2)


# --- batches


def test_log_mels_on_the_device_equal_those_of_the_worker(kinds):
    one = list(open_stream(kinds["folder"], settings={"features": "worker"}, epochs=1))
    for num_workers in (0, 1):
        settings = {"features": "device"}
        other = list(open_stream(kinds["folder"], settings=settings, device="cpu", num_workers=num_workers, epochs=1))
        assert_same(other, one)
        assert other[0].keys() == one[0].keys()


def test_columns_travel_with_their_clips(kinds):
    for batch in open_stream(kinds["parquet"], settings={"columns": ["number"]}, num_workers=2, epochs=1):
        assert [int(Path(name).stem) for name in batch["names"]] == batch["number"]
    with pytest.raises(UserError, match="has no column label, only number"):
        open_stream(kinds["parquet"], settings={"columns": ["label"]})


@pytest.mark.parametrize("kind", ["audiofolder", "parquet"])
def test_a_source_can_be_read_in_part(kinds, kind: str):
    """By values of its columns, of whatever type; the rest is neither read nor counted."""
    stream = open_stream({**kinds[kind], "keep": {"number": [5, "12", 30]}}, epochs=1)
    assert sorted(clips_of(stream)) == [("05", 0.0), ("12", 0.0), ("30", 0.0)]
    assert stream.statistics.recordings == 3


def test_parts_of_a_table_are_told_apart(kinds):
    def source(*numbers: int) -> Source:
        return Source.open(SourceSettings(**kinds["audiofolder"], keep={"number": list(numbers)}))

    assert (source(5, 12).num_rows, source(5, 12).num_shards) == (2, 2)
    assert source(5, 12).signature == source(5, 12).signature != source(5, 13).signature


def test_folds_of_a_table_with_gaps_can_be_kept(tmp_path):
    write_clips(tmp_path / "audio", 3)
    (tmp_path / "audio" / "metadata.csv").write_text("file_name,fold\n000.wav,1\n001.wav,\n002.wav,2\n")
    source = Source.open(SourceSettings(kind="audiofolder", path=str(tmp_path / "audio"), keep={"fold": [2]}))
    assert source.num_rows == 1


@pytest.fixture
def shards(tmp_path) -> Path:
    """Parquet files of two splits, each with a clip of the class hum and one of hiss."""
    label, tags = ClassLabel(names=["hum", "hiss"]), List(Value("string"))
    features = Features({"audio": Audio(decode=False), "label": label, "tags": tags})
    for split in ("train", "test"):
        write_clips(tmp_path / split, 2)
        audio = [{"bytes": file.read_bytes(), "path": f"{split}-{file.name}"} for file in sorted((tmp_path / split).iterdir())]
        rows = Dataset.from_dict({"audio": audio, "label": [0, 1], "tags": [["a"], []]}, features=features)
        (tmp_path / "shards").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "shards" / f"{split}-00000.parquet")
    return tmp_path / "shards"


def names_of(path: Path, **options) -> list[str]:
    source = Source.open(SourceSettings(kind="parquet", path=str(path), **options))
    return [row.name for shard in range(source.num_shards) for row in source.rows(shard)]


def test_of_a_stream_one_split_is_read_so_that_no_test_clip_trains(shards):
    assert names_of(shards) == ["train-000.wav", "train-001.wav"]
    assert names_of(shards, split="test") == ["test-000.wav", "test-001.wav"]
    with pytest.raises(UserError, match="has no split 'dev', only test, train"):
        names_of(shards, split="dev")
    signature = Source.open(SourceSettings(kind="parquet", path=str(shards))).signature
    (shards / "test-00000.parquet").unlink()
    assert Source.open(SourceSettings(kind="parquet", path=str(shards))).signature == signature
    (shards / "train-00000.parquet").rename(shards / "a-00000.parquet")
    shutil.copy(shards / "a-00000.parquet", shards / "b-00000.parquet")  # no name says what is held out: all is read
    assert names_of(shards) == 2 * ["train-000.wav", "train-001.wav"]


def test_a_stream_is_read_in_part_by_the_names_of_classes(shards):
    assert names_of(shards, keep={"label": ["hiss"]}) == ["train-001.wav"]
    assert names_of(shards, keep={"label": [1]}) == []  # as of a table, whose classes have no fold 1
    with pytest.raises(UserError, match=r"the column 'tags' holds List\(Value\('string'\)\), but rows are chosen by one value each"):
        names_of(shards, keep={"tags": ["a"]})


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"number": [5, 99, 100]}, "the column 'number' has no fold 99, 100, only 0, 1, 2"),
        ({"fold": [1]}, "there is no column 'fold', only audio"),
    ],
)
def test_a_part_that_is_not_there_is_rejected(kinds, keep: dict, message: str):
    with pytest.raises(UserError, match=message):
        open_stream({**kinds["audiofolder"], "keep": keep})


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_without_a_row_that_is_kept_ends_the_run(kinds, num_workers: int):
    with pytest.raises(UserError, match="in a row gave no clip: 0 recordings gave 0 clips"):
        next(iter(open_stream({**kinds["parquet"], "keep": {"number": [99]}}, num_workers=num_workers)))


# --- recordings in memory


@pytest.mark.parametrize("memory_gb", [1e-3, 2e-4])  # all of the 0.7 MB, and a part
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.filterwarnings("error")
def test_a_cache_changes_nothing_but_how_often_files_are_read(kinds, monkeypatch, memory_gb: float, num_workers: int):
    def read(cache: WaveformCache | None) -> list[dict]:
        settings = {"roll": True, "windows": "random"}
        return list(open_stream(kinds["folder"], epochs=3, num_workers=num_workers, settings=settings, cache=cache))

    decoded = multiprocessing.Value("q", 0)
    decoding = clips_module.load_waveform

    def counting(*args):
        with decoded.get_lock():
            decoded.value += 1
        return decoding(*args)

    monkeypatch.setattr(clips_module, "load_waveform", counting)
    cache = WaveformCache(CLIPS, memory_gb)
    assert_same(read(cache), read(None))
    kept = [cache.get(row) for row in range(CLIPS) if cache.get(row) is not None]
    assert 4 * sum(map(len, kept)) <= memory_gb * 1e9
    in_workers = 2 * num_workers  # two may decode the same one at the same moment
    if memory_gb == 1e-3:
        assert len(kept) == CLIPS  # also those that workers have decoded
        assert decoded.value - 3 * CLIPS <= CLIPS + in_workers
    else:
        assert 0 < len(kept) < CLIPS / 2
        assert decoded.value - 3 * CLIPS <= 3 * CLIPS - 2 * len(kept) + in_workers


def test_a_cache_never_displaces_and_is_read_only():
    cache = WaveformCache(3, 4 * 10 / 1e9)
    cache.put(0, np.full(6, 1, dtype=np.float32))
    cache.put(1, np.full(6, 2, dtype=np.float32))  # does not fit
    cache.put(2, np.full(4, 3, dtype=np.float32))
    assert [None if (kept := cache.get(row)) is None else kept.tolist() for row in range(3)] == [[1] * 6, None, [3] * 4]
    with pytest.raises(ValueError, match="read-only"):
        cache.get(0)[0] = 5
    cache.put(0, np.full(1, 9, dtype=np.float32))
    assert cache.get(0).tolist() == [1] * 6


def test_only_recordings_of_the_first_table_are_cached(kinds, folder: Path, tmp_path: Path):
    shutil.copytree(folder, tmp_path / "other")
    for number in range(CLIPS):
        soundfile.write(tmp_path / "other" / f"part{number % 3}" / f"{number:02d}.wav", noise(0.25, seed=99), 16_000)
    other = {"kind": "folder", "path": str(tmp_path / "other")}
    cached, plain = ({"cache": WaveformCache(CLIPS, 1e-3)}, {})
    assert_same(*(list(open_stream(kinds["folder"], other, epochs=2, **options)) for options in (cached, plain)))
    with pytest.raises(ValueError, match="is a stream, but only recordings of a table can be kept"):
        open_stream(kinds["parquet"], cache=WaveformCache(CLIPS, 1e-3))


# --- recordings that cannot be used


def damage(folder: Path) -> dict[str, int]:
    """One file in twenty of a hundred is damaged, each in another way."""
    write_clips(folder, 100)
    whole = (folder / "020.wav").read_bytes()
    (folder / "020.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "040.wav").write_bytes(b"")
    (folder / "060.wav").write_text("this is no audio\n" * 99)
    (folder / "080.wav").write_bytes(b"RIFX" + whole[4:])
    soundfile.write(folder / "099.wav", np.full(5000, np.nan), 16_000, subtype="FLOAT")
    return {"truncated": 1, "empty": 1, "unreadable": 2, "not finite": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_five_percent_of_damaged_files_are_left_out_counted_and_named(tmp_path: Path, num_workers: int, caplog):
    unreadable = damage(tmp_path / "damaged")
    for epochs in (1, 2):
        source = {"kind": "folder", "path": str(tmp_path / "damaged")}
        stream = open_stream(source, num_workers=num_workers, epochs=epochs)
        with caplog.at_level(logging.WARNING):
            assert len(clips_of(stream)) == 95 * epochs
        statistics = stream.statistics
        assert (statistics.recordings, statistics.num_clips) == (100 * epochs, 95 * epochs)
        assert statistics.samples == 95 * epochs * 4800
        assert statistics.unreadable == {cause: count * epochs for cause, count in unreadable.items()}
        assert {Path(text.split(".wav")[0]).name for text in statistics.examples} == {"020", "040", "060", "080", "099"}
    assert re.search(r"(?<!: )Up to the end of epoch 0, and the start of the next, which fills the last batch: 100 recordings", caplog.text)
    assert "2 unreadable" in caplog.text
    assert "080.wav" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_statistics_are_complete_when_the_last_recordings_are_unreadable(tmp_path: Path, num_workers: int):
    source = write_clips(tmp_path / "audio", 12)
    order = EpochOrder([12], [1], seed=0)(0)[:, 1]
    for row in order[6:]:
        (tmp_path / "audio" / f"{row:03d}.wav").write_bytes(b"")
    # Six readers of two recordings each, of which the second is unreadable: every worker ends with one.
    settings = {"shuffle_rows": 1, "shard_readers": 6}
    stream = open_stream(source, batch_size=3, num_workers=num_workers, epochs=1, settings=settings)
    assert len(clips_of(stream)) == 6
    assert (stream.statistics.recordings, stream.statistics.unreadable) == (12, {"empty": 6})
    assert stream.epoch == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_large_a_fraction_of_unreadable_files_stops_the_run_with_ten_names(tmp_path: Path, num_workers: int):
    for number in range(300):
        (tmp_path / f"{number:03d}.wav").write_bytes(b"no audio")
    stream = open_stream({"kind": "folder", "path": str(tmp_path)}, num_workers=num_workers, settings={"min_recordings": 100})
    with pytest.raises(UserError, match=r"(\d+) of (\d+) recordings are unreadable, more than max_unreadable = 0.2") as error:
        list(stream)
    assert len([line for line in str(error.value).splitlines() if ".wav" in line]) == 10
    assert int(str(error.value).split()[0]) < 300  # long before the end


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unreadable_files_among_others_stop_the_run_as_soon_as_enough_were_read(tmp_path: Path, num_workers: int):
    source = write_clips(tmp_path / "audio", 300)
    for number in range(0, 300, 2):
        (tmp_path / "audio" / f"{number:03d}.wav").write_bytes(b"no audio")
    stream = open_stream(source, num_workers=num_workers, settings={"min_recordings": 100})
    with pytest.raises(UserError, match=r"of 1[0-3]\d recordings are unreadable"):
        list(stream)


def test_unreadable_files_that_all_are_one_workers_stop_the_run(tmp_path: Path):
    source = write_clips(tmp_path / "audio", 40)
    order = EpochOrder([40], [1], seed=0)(0)[:, 1]
    for row in order[1::2]:  # two readers deal them out in turns
        (tmp_path / "audio" / f"{row:03d}.wav").write_bytes(b"")
    settings = {"shard_readers": 2, "min_recordings": 10}
    with pytest.raises(UserError, match=r"10 of 10 recordings are unreadable"):
        list(open_stream(source, num_workers=2, settings=settings, epochs=1, batch_size=50))


def test_the_fraction_is_checked_over_epochs_once_enough_recordings_were_read(tmp_path: Path):
    source = write_clips(tmp_path / "audio", 6)
    for number in range(2):
        (tmp_path / "audio" / f"{number:03d}.wav").write_bytes(b"")
    first = open_stream(source, epochs=2, settings={"min_recordings": 18})
    assert len(clips_of(first)) == 8
    second = open_stream(source, settings={"min_recordings": 18}, num_workers=1)
    second.load_state_dict([first.state_dict()])
    with pytest.raises(UserError, match=r"[56] of 18 recordings are unreadable"):
        list(second)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("epochs", [1, None])
def test_recordings_that_all_are_too_short_end_the_run(tmp_path: Path, num_workers: int, epochs: int | None):
    source = write_clips(tmp_path / "short", 3, seconds=0.05)
    message = "process 0 found no clip at all: 3 recordings gave 0 clips; left out: 3 too short" if epochs else "in a row gave no clip"
    with pytest.raises(UserError, match=message):
        list(open_stream(source, num_workers=num_workers, epochs=epochs))


# --- processes


@pytest.mark.parametrize("ending", ["raise ValueError('in the middle')", "raise KeyboardInterrupt", "pass"])
def test_a_process_whose_workers_still_read_ends_all_the_same(kinds, tmp_path, ending):
    """Workers do not receive the SIGTERM by which Python ends its children."""
    script = tmp_path / "reads.py"
    script.write_text(
        "from transformers_sslam import SSLAMFeatureExtractor\n"
        "from transformers_sslam.audio.batches import ClipStream, DataSettings\n"
        f"stream = ClipStream(DataSettings([{kinds['folder']!r}]), SSLAMFeatureExtractor(max_length=32), batch_size=1, num_workers=2)\n"
        f"batches = iter(stream)\nnext(batches)\n{ending}\n"
    )
    code = Fork([script], tmp_path / "log").wait(timeout=60)
    assert (code == 0) == (ending == "pass"), (tmp_path / "log").read_text()


def test_workers_leave_signals_to_the_run(kinds):
    stream = iter(open_stream(kinds["folder"], batch_size=1, num_workers=2, epochs=1))
    clips = clips_of([next(stream)])
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert sorted(clips + clips_of(stream)) == all_clips()


def test_a_worker_that_is_killed_ends_the_run(kinds):
    others = multiprocessing.active_children()  # workers of an earlier test may not have ended yet
    stream = iter(open_stream(kinds["folder"], batch_size=1, num_workers=2))
    next(stream)
    worker, _ = (process for process in multiprocessing.active_children() if process not in others)
    # PyTorch's handler of SIGCHLD may raise at once, wherever this process is.
    with pytest.raises(RuntimeError, match="worker .* killed|exited unexpectedly"):  # noqa: PT012
        os.kill(worker.pid, signal.SIGKILL)
        list(stream)


@pytest.mark.parametrize(("raised", "text"), [(KeyError, "KeyError in DataLoader worker process 0"), (UserError, "^what a user did$")])
def test_an_error_in_a_worker_ends_the_run(kinds, raised: type[Exception], text: str):
    def collate(clips: list) -> list[int]:
        raise raised("what a user did")

    source = Source.open(SourceSettings(**kinds["folder"]))
    stream = BatchStream([source], Windows(16_000, None, 0, "every", 400), collate, batch_size=2, num_workers=2)
    with pytest.raises(raised, match=text):
        list(stream)
    assert stream.statistics == ReadStatistics()


def test_batches_that_are_kept_are_never_overwritten_and_the_memory_of_others_is_used_again(kinds):
    def run(keep: int) -> tuple[int, bool]:
        """Pieces of memory that were sent, and whether every batch that was kept still holds what it held."""
        stream, kept = open_stream(kinds["folder"], batch_size=1, num_workers=2, epochs=6), []
        batches = iter(stream)
        for batch in batches:
            assert {type(batch[name]) for name in ("input_values", "attention_mask")} == {torch.Tensor}
            kept.append((batch["input_values"][0], batch["input_values"].clone()))
            kept = kept[-keep:]
            pieces = len(next(iter(shared_module._channels.values())).received)
        return pieces, all(torch.equal(view[None], copy) for view, copy in kept)

    pieces, unchanged = run(keep=200)  # more than the pieces of both workers: the others come in PyTorch's way
    assert (pieces, unchanged) == (2 * shared_module.MOST, True)
    pieces, unchanged = run(keep=1)
    assert unchanged
    assert 4 <= pieces <= 20  # two tensors a batch


def test_workers_leave_the_random_state_of_the_run_alone(kinds):
    before = torch.get_rng_state()
    next(iter(open_stream(kinds["folder"], num_workers=1)))
    assert torch.equal(torch.get_rng_state(), before)


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cassette", "path": "x"}, "kind is 'cassette'"),
        ({"kind": "folder", "path": ""}, "path is ''"),
        ({"kind": "folder", "path": "x", "weight": 0}, "weight of x is 0"),
        ({"kind": "folder", "path": "x", "weight": "1"}, "weight of x is '1'"),
        ({"kind": "folder", "path": "x", "revision": "v1"}, "only hub sources have one"),
        ({"kind": "audiofolder", "path": "x", "keep": {"fold": 1}}, "must give a list for each column"),
    ],
)
def test_settings_of_a_source_that_cannot_be_are_rejected(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        SourceSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ["/data"]}, "a source is '/data', but must be a mapping with kind and path"),
        ({"sources": [{"kind": "folder"}]}, "must be a mapping with kind and path"),
        ({"sources": [{"kind": "folder", "path": "x", "wait": 2}]}, "the source x has wait, but a source has only kind, path, weight"),
        ({"windows": "some"}, "windows is 'some'"),
        ({"features": "cloud"}, "features is 'cloud'"),
        ({"min_seconds": 0.01}, "min_seconds is 0.01"),
        ({"shuffle_rows": 0}, "shuffle_rows is 0"),
        ({"shard_readers": 0}, "shard_readers is 0"),
        ({"last_batch": "wrap"}, "last_batch is 'wrap'"),
        ({"max_unreadable": 1.5}, "max_unreadable is 1.5"),
        ({"min_recordings": 0}, "min_recordings is 0"),
        ({"sources": [{"kind": "folder", "path": "a/x"}, {"kind": "folder", "path": "b/x"}]}, "named x, x"),
    ],
)
def test_settings_of_the_data_that_cannot_be_are_rejected(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        DataSettings(**{"sources": [{"kind": "folder", "path": "x"}], **settings})


def test_a_stream_without_sources_is_rejected():
    with pytest.raises(UserError, match="sources is empty"):
        ClipStream(DataSettings(), SSLAMFeatureExtractor(), batch_size=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 2, "world_size": 2}, "world_size is 2, but must be at least 3"),
    ],
)
def test_values_of_a_stream_that_cannot_be_are_rejected(kinds, values: dict, message: str):
    with pytest.raises(UserError, match=message):
        open_stream(kinds["folder"], **values)
