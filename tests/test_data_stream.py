"""Streams of clips: each clip exactly once an epoch, the same order each time, and never a lost place."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from datasets import Audio, Dataset

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio import stream as stream_module
from transformers_sslam.audio.sources import Source, SourceSettings, epoch_order
from transformers_sslam.audio.stream import ClipStream, DataSettings


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


def heard(batches) -> list[tuple[str, float]]:
    """Which clips, by the name of the recording's file and where in it they begin."""
    return [(Path(name).stem, start) for batch in batches for name, start in zip(batch["names"], batch["starts"])]


def all_clips() -> list[tuple[str, float]]:
    return sorted((f"{number:02d}", 0.32 * window) for number in range(CLIPS) for window in range(4 if number in LONG else 1))


def assert_same(actual: list[dict], expected: list[dict]) -> None:
    assert [list(zip(batch["names"], batch["starts"])) for batch in actual] == [list(zip(b["names"], b["starts"])) for b in expected]
    assert all(torch.equal(a["input_values"], b["input_values"]) for a, b in zip(actual, expected))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_the_ranks_together_hear_each_clip_exactly_once_an_epoch(kinds, kind: str, world_size: int, num_workers: int):
    ranks = [open_stream(kinds[kind], rank=rank, world_size=world_size, num_workers=num_workers) for rank in range(world_size)]
    for _ in range(2):
        epochs = [list(rank) for rank in ranks]
        assert sorted(clip for batches in epochs for clip in heard(batches)) == all_clips()
        for batches in epochs:
            sizes = [len(batch["input_values"]) for batch in batches]
            assert set(sizes[:-1]) <= {4}
            assert 1 <= sizes[-1] <= 4
            assert all(batch["input_values"].shape[1:] == (32, 128) for batch in batches)
    assert sum(rank.report().num_clips for rank in ranks) == 2 * len(all_clips())


@pytest.mark.parametrize("kind", ["manifest", "audiofolder", "webdataset", "hub"])
def test_every_kind_of_source_gives_the_same_clips(kinds, kind: str):
    one, other = list(open_stream(kinds["folder"])), list(open_stream(kinds[kind], num_workers=2))
    assert sorted(heard(other)) == sorted(heard(one))
    values = {clip: row for batches in (one,) for clip, row in zip(heard(batches), torch.cat([b["input_values"] for b in batches]))}
    for clip, row in zip(heard(other), torch.cat([b["input_values"] for b in other])):
        assert torch.equal(values[clip], row)


@pytest.mark.parametrize("ending", ["raise ValueError('in the middle')", "raise KeyboardInterrupt", "pass"])
def test_a_process_whose_workers_still_read_ends_all_the_same(kinds, tmp_path, ending):
    """Workers do not hear the SIGTERM by which Python ends its children."""
    script = tmp_path / "reads.py"
    script.write_text(
        "from transformers_sslam import SSLAMFeatureExtractor\n"
        "from transformers_sslam.audio.stream import ClipStream, DataSettings\n"
        f"stream = ClipStream(DataSettings([{kinds['folder']!r}]), SSLAMFeatureExtractor(max_length=32), batch_size=1, num_workers=2)\n"
        f"batches = iter(stream)\nnext(batches)\n{ending}\n"
    )
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode == 0) == (ending == "pass"), ended.stderr


def test_shards_that_are_not_finished_are_warned_about(kinds, tmp_path, caplog):
    shutil.copytree(kinds["parquet"]["path"], tmp_path / "shards")
    for complete in (True, False):
        (tmp_path / "shards" / "index.json").write_text(json.dumps({"complete": complete}))
        open_stream({"kind": "parquet", "path": str(tmp_path / "shards")})
        assert ("is not finished" in caplog.text) != complete


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_behind_any_batch_gives_the_rest_bit_for_bit(kinds, num_workers: int):
    def fresh() -> ClipStream:
        sources = ({**kinds["folder"], "weight": 0.5}, kinds["parquet"], kinds["webdataset"])
        return open_stream(*sources, batch_size=3, num_workers=num_workers, seed=5)

    stream, batches, states, reports = fresh(), [], [], []
    for _ in range(2):
        for batch in stream:
            batches.append(batch)
            states.append(json.dumps(stream.state_dict()))
            reports.append(stream.report())
    in_first_epoch = sum(json.loads(state)["epoch"] == 0 for state in states)
    assert 20 < in_first_epoch < len(batches) - 20
    for number in range(0, len(batches), 2 if num_workers == 0 else 7):
        resumed = fresh()
        resumed.load_state_dict(json.loads(states[number]))
        assert resumed.report() == reports[number]
        rest = list(resumed)
        if resumed.epoch < 2:
            rest += list(resumed)
        assert_same(rest, batches[number + 1 :])
        assert resumed.report() == stream.report()


def test_leaving_in_the_middle_and_coming_back_loses_nothing(kinds):
    stream, clips = open_stream(kinds["folder"], num_workers=2), []
    for _ in range(3):
        for number, batch in enumerate(stream):
            clips += heard([batch])
            if number == 2:
                break
    while stream.epoch == 0:
        clips += heard(stream)
    assert sorted(clips) == all_clips()


def test_the_order_follows_from_seed_and_epoch_alone(kinds):
    def order(seed: int, epoch: int, kind: str = "parquet") -> list:
        stream = open_stream(kinds[kind], seed=seed)
        stream.set_epoch(epoch)
        return heard(stream)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    running = open_stream(kinds["parquet"], seed=1)
    assert [heard(running) for _ in range(3)] == [order(1, epoch) for epoch in range(3)]


def test_neighbours_in_a_shard_are_not_neighbours_in_every_epoch(folder: Path, tmp_path: Path):
    """One clip is mixed into the next, so who follows whom must change, even where a whole file is one shard."""
    write_parquet(folder, tmp_path / "parquet", rows_per_group=100)
    stream, pairs = open_stream({"kind": "parquet", "path": str(tmp_path / "parquet")}, settings={"shuffle_rows": 16}), []
    for _ in range(4):
        names = [name for name, start in heard(stream) if start == 0]
        pairs.append(set(pairwise(names)))
    assert max(len(one & other) for one in pairs for other in pairs if one is not other) <= 10  # of 36


def test_going_to_the_epoch_under_way_changes_nothing(kinds):
    stream = open_stream(kinds["folder"])
    first = next(iter(stream))
    stream.set_epoch(0)
    assert sorted(heard([first]) + heard(stream)) == all_clips()
    next(iter(stream))
    stream.set_epoch(7)
    assert stream.epoch == 7
    assert stream.report().num_clips == len(all_clips()) + 4  # what was heard stays counted
    with pytest.raises(ValueError, match="epoch is -1"):
        stream.set_epoch(-1)


def test_weights_say_how_often_an_epoch_hears_each_clip(kinds):
    stream = open_stream({**kinds["folder"], "weight": 2, "name": "twice"}, {**kinds["manifest"], "weight": 0.5, "name": "half"})
    expected = Counter(clip for clip in all_clips() for _ in range(2))
    halves: Counter = Counter()
    for _ in range(2):
        halves += Counter(heard(stream)) - expected
    assert sorted(halves.elements()) == all_clips()
    assert stream.report().clips == {"twice": 4 * len(all_clips()), "half": len(all_clips())}


@pytest.mark.parametrize("weight", [0.1, 1 / 3, 1, 2.5])
def test_over_the_epochs_every_shard_comes_equally_often(weight: float):
    epochs = round(30 / weight)
    visits = np.concatenate([epoch_order([7, 3], [weight, 1], seed=3, epoch=epoch) for epoch in range(epochs)])
    for source, shards, passes in ((0, 7, 30), (1, 3, epochs)):
        counts = np.bincount(visits[visits[:, 0] == source, 2], minlength=shards)
        assert counts.tolist() == [passes] * shards


def test_random_windows_are_drawn_anew_each_epoch_and_alike_each_run(kinds):
    def starts() -> list[set]:
        stream = open_stream(kinds["folder"], settings={"windows": "random"}, seed=2)
        return [{clip for clip in heard(stream) if int(clip[0]) in LONG} for _ in range(3)]

    first = starts()
    assert first == starts()
    assert [len(clips) for clips in first] == [2, 2, 2]
    assert len(set.union(*first)) == 6


def test_log_mels_on_the_device_equal_those_of_the_worker(kinds):
    one = list(open_stream(kinds["folder"], settings={"features": "worker"}))
    other = list(open_stream(kinds["folder"], settings={"features": "device"}, device="cpu", num_workers=0))
    assert_same(other, one)


def test_columns_travel_with_their_clips(kinds):
    for batch in open_stream(kinds["parquet"], settings={"columns": ["number"]}, num_workers=2):
        assert [int(Path(name).stem) for name in batch["names"]] == batch["number"]


def test_an_audiofolder_can_be_heard_in_part(kinds):
    """By values of its metadata, of whatever type; the rest is neither heard nor counted."""
    chosen = open_stream({**kinds["audiofolder"], "keep": {"number": [5, "12", 30]}})
    assert sorted(heard(chosen)) == [("05", 0.0), ("12", 0.0), ("30", 0.0)]
    source = Source(SourceSettings(**kinds["audiofolder"], keep={"number": [5, 12]}))
    assert (source.num_rows, source.num_shards) == (2, 2)
    assert source.signature != Source(SourceSettings(**kinds["audiofolder"], keep={"number": [5, 13]})).signature


def test_folds_of_a_table_with_gaps_can_be_kept(tmp_path):
    for number in range(3):
        soundfile.write(tmp_path / f"{number}.wav", noise(0.3, seed=number), 16_000)
    (tmp_path / "metadata.csv").write_text("file_name,fold\n0.wav,1\n1.wav,\n2.wav,2\n")
    source = Source(SourceSettings(kind="audiofolder", path=str(tmp_path), keep={"fold": [2]}))
    assert source.num_rows == 1


@pytest.mark.parametrize(
    ("keep", "message"),
    [({"number": [5, 99, 100]}, "keep asks for number 100, 99, but .* has 0, 1, 10"), ({"fold": [1]}, "keep names the column 'fold', but")],
)
def test_a_part_that_is_not_there_is_refused(kinds, keep: dict, message: str):
    with pytest.raises(ValueError, match=message):
        open_stream({**kinds["audiofolder"], "keep": keep})


def damage(folder: Path) -> dict[str, int]:
    """One file in twenty of a hundred is damaged, each in another way."""
    folder.mkdir()
    for number in range(100):
        soundfile.write(folder / f"{number:03d}.wav", noise(0.3, seed=number), 16_000, subtype="FLOAT")
    whole = (folder / "020.wav").read_bytes()
    (folder / "020.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "040.wav").write_bytes(b"")
    (folder / "060.wav").write_text("this is no audio\n" * 99)
    (folder / "080.wav").write_bytes(b"RIFX" + whole[4:])
    soundfile.write(folder / "099.wav", np.full(5000, np.nan), 16_000, subtype="FLOAT")
    return {"truncated": 1, "empty": 1, "unreadable": 2, "not finite": 1}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_five_percent_of_damaged_files_are_skipped_counted_and_named(tmp_path: Path, num_workers: int, caplog):
    broken = damage(tmp_path / "damaged")
    stream = open_stream({"kind": "folder", "path": str(tmp_path / "damaged")}, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        for epoch in (1, 2):
            assert len(heard(stream)) == 95
            report = stream.report()
            assert (report.recordings, report.num_clips) == (100 * epoch, 95 * epoch)
            assert report.samples == 95 * epoch * 4800
            assert report.broken == {cause: count * epoch for cause, count in broken.items()}
    assert {Path(text.split(".wav")[0]).name for text in report.examples} == {"020", "040", "060", "080", "099"}
    assert "2 unreadable" in caplog.text
    assert "080.wav" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_the_set_share_of_broken_files_stops_the_run_with_ten_names(tmp_path: Path, num_workers: int):
    for number in range(300):
        (tmp_path / f"{number:03d}.wav").write_bytes(b"no audio")
    stream = open_stream({"kind": "folder", "path": str(tmp_path)}, num_workers=num_workers, settings={"min_recordings": 100})
    with pytest.raises(ValueError, match=r"(\d+) of (\d+) recordings are broken, more than max_broken_share = 0.2") as error:
        list(stream)
    assert str(error.value).count(".wav cannot be read") == 10
    assert int(str(error.value).split()[0]) < 300  # long before the end


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_among_others_stop_the_run_as_soon_as_enough_were_seen(tmp_path: Path, num_workers: int):
    for number in range(0, 300, 2):
        soundfile.write(tmp_path / f"{number:03d}.wav", noise(0.3), 16_000)
        (tmp_path / f"{number + 1:03d}.wav").write_bytes(b"no audio")
    stream = open_stream({"kind": "folder", "path": str(tmp_path)}, num_workers=num_workers, settings={"min_recordings": 100})
    with pytest.raises(ValueError, match=r"of 1[0-3]\d recordings are broken"):
        list(stream)


def test_the_share_is_judged_over_epochs_once_enough_recordings_were_seen(tmp_path: Path):
    for number in range(6):
        soundfile.write(tmp_path / f"{number}.wav", noise(0.3), 16_000)
    (tmp_path / "0.wav").write_bytes(b"")
    (tmp_path / "1.wav").write_bytes(b"")
    stream = open_stream({"kind": "folder", "path": str(tmp_path)}, settings={"min_recordings": 18})
    assert [len(heard(stream)), len(heard(stream))] == [4, 4]
    with pytest.raises(ValueError, match="6 of 18 recordings are broken"):
        list(stream)


def test_an_epoch_without_a_single_clip_is_an_error_and_no_endless_loop(tmp_path: Path):
    soundfile.write(tmp_path / "short.wav", noise(0.05), 16_000)
    with pytest.raises(ValueError, match=r"no clip at all: 1 recordings gave 0 clips; left out: 1 too short"):
        list(open_stream({"kind": "folder", "path": str(tmp_path)}))


def test_resuming_reads_no_more_late_in_the_epoch_than_early(tmp_path: Path, monkeypatch):
    soundfile.write(tmp_path / "one.wav", noise(0.3), 16_000)
    (tmp_path / "many.tsv").write_text(".\n" + "one.wav\t4800\n" * 1500)
    source = {"kind": "manifest", "path": str(tmp_path / "many.tsv")}
    stream, states = open_stream(source, batch_size=100), []
    for _ in stream:
        states.append(stream.state_dict())
    rows, decoded = [], []
    reading, decoding = Source.rows, stream_module.read_clips
    monkeypatch.setattr(Source, "rows", lambda *args: [rows.append(1), reading(*args)][1])
    monkeypatch.setattr(stream_module, "read_clips", lambda *args: [decoded.append(1), decoding(*args)][1])
    for number in (0, 7, 13):
        rows.clear(), decoded.clear()
        stream.load_state_dict(states[number])
        next(iter(stream))
        assert len(rows) <= 100 + 2 * 8 + 1  # what is handed out, the blocks at both ends, and the row before
        assert len(decoded) <= 101


def test_fewer_shards_than_ranks_are_refused_and_fewer_than_workers_warned_of(kinds, caplog):
    with pytest.raises(ValueError, match="an epoch has 3 shards for 4 ranks"):
        open_stream(kinds["webdataset"], world_size=4)
    with caplog.at_level(logging.WARNING):
        ranks = [open_stream(kinds["webdataset"], rank=rank, world_size=2, num_workers=2) for rank in range(2)]
    assert caplog.text.count("3 shards for 2 ranks with 2 workers each, so 1 workers have nothing to do") == 1
    assert sorted(clip for rank in ranks for clip in heard(rank)) == all_clips()


def test_another_number_of_ranks_begins_the_epoch_again_and_says_so(kinds, caplog):
    stream = open_stream(kinds["folder"], rank=1, world_size=2)
    for _ in range(2):
        next(iter(stream))
    state = stream.state_dict()
    others = [open_stream(kinds["folder"], rank=rank, world_size=3) for rank in range(3)]
    for other in others:
        with caplog.at_level(logging.WARNING):
            other.load_state_dict(state)
    assert "kept by 2 ranks with 0 workers each, and now there are 3 with 0: epoch 0 begins again" in caplog.text
    assert sorted(clip for other in others for clip in heard(other)) == all_clips()


def test_another_batch_size_goes_on_from_the_same_clip(kinds):
    stream = open_stream(kinds["folder"], batch_size=4)
    first = [next(iter(stream)) for _ in range(3)]
    other = open_stream(kinds["folder"], batch_size=7)
    other.load_state_dict(stream.state_dict())
    assert heard(first) + heard(other) == heard(open_stream(kinds["folder"]))


def test_a_place_of_another_stream_is_refused(kinds, folder: Path, tmp_path: Path):
    state = open_stream(kinds["folder"], world_size=2).state_dict()
    with pytest.raises(ValueError, match=r"another stream: seed \(0 then, 1 now\)"):
        open_stream(kinds["folder"], world_size=2, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="this place is rank 0's, but this is rank 1"):
        open_stream(kinds["folder"], world_size=2, rank=1).load_state_dict(state)
    shutil.copytree(folder, tmp_path / "moved")
    moved = {"kind": "folder", "path": str(tmp_path / "moved")}
    open_stream(moved, world_size=2).load_state_dict(state)  # the same files elsewhere are the same
    (tmp_path / "moved" / "part0" / "00.wav").rename(tmp_path / "moved" / "part0" / "99.wav")
    with pytest.raises(ValueError, match="another stream: sources"):
        open_stream(moved, world_size=2).load_state_dict(state)


def test_workers_leave_signals_to_the_run(kinds):
    stream = iter(open_stream(kinds["folder"], batch_size=1, num_workers=2))
    clips = heard([next(stream)])
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert sorted(clips + heard(stream)) == all_clips()


def test_links_to_folders_are_followed_once(folder: Path, tmp_path: Path):
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "ring").symlink_to(tmp_path)
    assert sorted(heard(open_stream({"kind": "folder", "path": str(tmp_path)}))) == all_clips()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "cassette", "path": "x"}, "kind is 'cassette'"),
        ({"kind": "folder", "path": ""}, "path is ''"),
        ({"kind": "folder", "path": "x", "weight": 0}, "weight of x is 0"),
        ({"kind": "folder", "path": "x", "weight": "1"}, "weight of x is '1'"),
        ({"kind": "folder", "path": "x", "subset": "big"}, "only hub sources have one"),
        ({"kind": "folder", "path": "x", "keep": {"fold": [1]}}, "keep is .*, but only audiofolder sources can be chosen from"),
        ({"kind": "audiofolder", "path": "x", "keep": {"fold": 1}}, "must give a list for each column"),
    ],
)
def test_settings_of_a_source_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SourceSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "sources is empty"),
        ({"sources": ["/data"]}, "a source is '/data', but must be a mapping with kind and path"),
        ({"sources": [{"kind": "folder"}]}, "must be a mapping with kind and path"),
        ({"sources": [{"kind": "folder", "path": "x", "wait": 2}]}, "the source x has wait, but a source has only kind, path, weight"),
        ({"windows": "some"}, "windows is 'some'"),
        ({"features": "cloud"}, "features is 'cloud'"),
        ({"min_seconds": 0.01}, "min_seconds is 0.01"),
        ({"shuffle_rows": 0}, "shuffle_rows is 0"),
        ({"max_broken_share": 1.5}, "max_broken_share is 1.5"),
        ({"sources": [{"kind": "folder", "path": "a/x"}, {"kind": "folder", "path": "b/x"}]}, "named x, x"),
    ],
)
def test_settings_of_the_data_that_cannot_be_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        DataSettings(**{"sources": [{"kind": "folder", "path": "x"}], **settings})


def test_sources_with_nothing_to_hear_are_refused_by_name(kinds, tmp_path: Path):
    def refused(kind: str, path: Path, message: str, **kwargs) -> None:
        with pytest.raises(ValueError, match=message) as error:
            open_stream({"kind": kind, "path": str(path), **kwargs})
        assert str(path) in str(error.value)

    empty = tmp_path / "empty"
    empty.mkdir()
    for kind in ("folder", "parquet", "webdataset"):
        refused(kind, empty, "empty")
    refused("audiofolder", empty, "cannot be opened")
    for kind in ("folder", "audiofolder", "manifest", "parquet", "webdataset"):
        refused(kind, tmp_path / "nowhere", "is no f")
    (tmp_path / "root.tsv").write_text("/data\n")
    refused("manifest", tmp_path / "root.tsv", "empty")
    (tmp_path / "bad.tsv").write_text("/data\na.wav\t100\nb.wav 100\n")
    refused("manifest", tmp_path / "bad.tsv", r"line 3 of the manifest .* is 'b.wav 100'")
    Dataset.from_dict({"text": ["a"], "number": [1]}).to_parquet(tmp_path / "text.parquet")
    refused("parquet", tmp_path / "text.parquet", "has no column of audio, only text, number")
    refused("parquet", tmp_path / "text.parquet", "has no column 'sound', only text, number", audio_column="sound")
    Dataset.from_dict({"audio": []}).cast_column("audio", Audio()).to_parquet(tmp_path / "none.parquet")
    refused("parquet", tmp_path / "none.parquet", "empty")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    refused("parquet", tmp_path / "torn.parquet", "cannot be opened")
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    refused("webdataset", tmp_path / "none.tar", "cannot be opened")
    with pytest.raises(ValueError, match="has no column label, only number"):
        open_stream(kinds["parquet"], settings={"columns": ["label"]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 2, "world_size": 2}, "world_size is 2, but must be at least 3"),
    ],
)
def test_values_of_a_stream_that_cannot_be_are_refused(kinds, values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        open_stream(kinds["folder"], **values)
