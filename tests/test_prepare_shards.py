"""Shards written once: they hold what the sources held, and neither an interruption nor a full disk leaves half of one."""

import errno
import io
import json
import logging
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from conftest import noise
from datasets import Audio, load_dataset

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio import shards
from transformers_sslam.audio.batches import ClipStream, DataSettings
from transformers_sslam.audio.decode import load_waveform
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.shards import ShardSettings, prepare
from transformers_sslam.audio.sources import Source, SourceSettings
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.files import SEAL, read_json, write_json


RECORDINGS, DAMAGED = 23, (4, 11)


@pytest.fixture(autouse=True)
def _a_cache_of_its_own(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """An audiofolder: stereo at two rates, one recording of 2.5 s, one too short, two that are damaged."""
    root = tmp_path_factory.mktemp("recordings")
    lines = ["file_name,label,fold"]
    for number in range(RECORDINGS):
        length = 2.5 if number == 7 else 0.05 if number == 9 else 0.3 + 0.01 * number
        rate = 16_000 if number % 2 else 22_050
        soundfile.write(root / f"{number:02d}.wav", np.stack([noise(length, number, rate), noise(length, 99 - number, rate)], axis=1), rate)
        lines.append(f"{number:02d}.wav,kind{number % 3},{number % 5}")
    for number in DAMAGED:
        (root / f"{number:02d}.wav").write_bytes(b"no audio")
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


def settings(folder: Path, recordings: Path, **kwargs) -> ShardSettings:
    source = {"kind": "audiofolder", "path": str(recordings)}
    return ShardSettings(str(folder), sources=[source], **{"clips_per_shard": 6, "clips_per_group": 3, "shuffle_rows": 8, **kwargs})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.name != "index.json"}


def test_shards_hold_every_recording_once_with_its_columns_as_16_khz_mono_flac(recordings: Path, tmp_path: Path):
    index = prepare(settings(tmp_path / "shards", recordings))
    assert [shard["clips"] for shard in index["shards"]] == [6, 6, 6, 2]
    assert index["clips"] == RECORDINGS - 3
    assert index["report"]["too_short"] == 1
    assert index["report"]["unreadable"] == {"unreadable": 2}
    assert len(index["report"]["examples"]) == 2
    assert index == read_json(tmp_path / "shards" / "index.json")

    rows = load_dataset("parquet", data_files=str(tmp_path / "shards" / "*.parquet"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.features["audio"] == Audio(sampling_rate=16_000)
    rows = rows.cast_column("audio", Audio(decode=False))
    numbers = [int(Path(row["audio"]["path"]).stem) for row in rows]
    assert sorted(numbers) == [number for number in range(RECORDINGS) if number not in (*DAMAGED, 9)]
    assert numbers != sorted(numbers)
    total = 0
    for number, row in zip(numbers, rows):
        info = soundfile.info(io.BytesIO(row["audio"]["bytes"]))
        assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
        expected = load_waveform(recordings / f"{number:02d}.wav")
        np.testing.assert_allclose(load_waveform(row["audio"]["bytes"]), expected, rtol=0, atol=1.01 / 32768)
        assert (row["label"], row["fold"]) == (f"kind{number % 3}", str(number % 5))
        total += len(expected)
    assert index["hours"] == pytest.approx(total / 16_000 / 3600)
    assert pq.ParquetFile(tmp_path / "shards" / "shard-00000.parquet").num_row_groups == 2


def test_shards_are_a_source_like_any_other(recordings: Path, tmp_path: Path):
    prepare(settings(tmp_path / "shards", recordings))
    source = {"kind": "parquet", "path": str(tmp_path / "shards")}
    extractor = SSLAMFeatureExtractor(max_length=288)
    ranks = [
        ClipStream(DataSettings([source], columns=["label"]), extractor, batch_size=4, rank=rank, world_size=2, num_workers=2, epochs=1)
        for rank in range(2)
    ]
    labels = {name: label for rank in ranks for batch in rank for name, label in zip(batch["names"], batch["label"])}
    assert labels == {f"{number:02d}.flac": f"kind{number % 3}" for number in range(RECORDINGS) if number not in (*DAMAGED, 9)}


def test_long_recordings_can_be_cut_into_windows(recordings: Path, tmp_path: Path):
    index = prepare(settings(tmp_path / "shards", recordings, window_seconds=0.6))
    names = [
        row["path"]
        for file in sorted((tmp_path / "shards").glob("*.parquet"))
        for row in pq.read_table(file, columns=["audio"])["audio"].to_pylist()
    ]
    assert [name for name in sorted(names) if name.startswith("07")] == ["07.flac", "07_0.600s.flac", "07_1.200s.flac", "07_1.800s.flac"]
    assert index["report"]["short_ends"] == 1  # the last 0.1 s
    assert index["clips"] == len(names) == RECORDINGS - 3 + 3


def test_events_are_cut_as_their_recordings_are(tmp_path: Path):
    soundfile.write(tmp_path / "a.wav", noise(2.5), 16_000)
    (events := tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.wav", "events": [{"label": "dog", "onset": 0.5, "offset": 1.25}, {"label": "cat", "onset": 2.0, "offset": 9.0}, '
        '{"label": "rain", "onset": null, "offset": null}]}'
    )
    prepare(settings(tmp_path / "shards", tmp_path, window_seconds=1.0))
    found = {
        row["audio"]["path"]: [(event["label"], event["onset"], event["offset"]) for event in row["events"] if event["onset"] is not None]
        for row in pq.read_table(tmp_path / "shards" / "shard-00000.parquet").to_pylist()
        if row["events"][-1]["label"] == "rain"
    }
    assert found == {"a.flac": [("dog", 0.5, 1.0)], "a_1.000s.flac": [("dog", 0.0, 0.25)], "a_2.000s.flac": [("cat", 0.0, 0.5)]}
    events.write_text(
        events.read_text().replace("events", "sounds").replace("0.5", "0").replace("1.25", "1").replace("2.0", "2").replace("9.0", "3")
    )
    with pytest.raises(UserError, match="window_seconds is set, but the column 'sounds' of .* has events whose times are not float64"):
        prepare(settings(tmp_path / "others", tmp_path, window_seconds=1.0))


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("whole_shards", [0, 1, 3])
def test_interrupted_and_run_again_it_writes_the_same_files(
    recordings: Path, tmp_path: Path, monkeypatch, whole_shards: int, num_workers: int
):
    wanted = prepare(settings(tmp_path / "at once", recordings, dataloader_num_workers=num_workers))
    write, replace, calls = shards.write_shard, Path.replace, Counter()

    def interrupted(path: Path, target: Path):
        if target.suffix == ".parquet":
            calls["shards"] += 1
            if calls["shards"] > whole_shards:
                raise _Interrupted
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(_Interrupted):
        prepare(settings(tmp_path / "twice", recordings, dataloader_num_workers=num_workers))
    assert not list((tmp_path / "twice").glob("*.unfinished"))
    assert len(list((tmp_path / "twice").glob("*.parquet"))) == whole_shards
    monkeypatch.undo()

    written = []
    monkeypatch.setattr(shards, "write_shard", lambda path, *args: [written.append(path.name), write(path, *args)][1])
    index = prepare(settings(tmp_path / "twice", recordings, dataloader_num_workers=num_workers))
    assert written == [f"shard-{number:05d}.parquet" for number in range(whole_shards, 4)]
    assert index == wanted
    assert files(tmp_path / "twice") == files(tmp_path / "at once")


def test_a_folder_begun_by_an_older_version_is_rejected_until_it_is_complete(recordings: Path, tmp_path: Path):
    index = prepare(settings(tmp_path / "shards", recordings))
    del index["position"]  # and what was read has no hash of itself, which is left out
    index["settings"]["max_broken_share"] = index["settings"].pop("max_unreadable")
    (tmp_path / "shards" / "index.json").write_text(json.dumps({**index, "place": None}))
    assert prepare(settings(tmp_path / "shards", recordings))["clips"] == RECORDINGS - 3
    (tmp_path / "shards" / "index.json").write_text(json.dumps({**index, "complete": False, "place": {"epoch": 0}}))
    with pytest.raises(UserError, match="begun by an older version, which writes rows in another order: finish it with that version, or"):
        prepare(settings(tmp_path / "shards", recordings))


def reads(folder: Path) -> list:
    """What a run and an evaluation read of the shards."""
    source = Source.open(SourceSettings("parquet", str(folder)))
    return [source.num_shards, len(open_splits(folder, "parquet")["train"])]


SPOILED = {
    "truncated": (lambda shard, other: shard.write_bytes(shard.read_bytes()[:-7]), r"shard-00001.parquet with \d+ bytes instead of \d+"),
    "longer": (lambda shard, other: shard.write_bytes(shard.read_bytes() + b"x"), r"shard-00001.parquet with \d+ bytes instead of \d+"),
    "empty": (lambda shard, other: shard.write_bytes(b""), "shard-00001.parquet with 0 bytes instead of"),
    "missing": (lambda shard, other: shard.unlink(), "lacks shard-00001.parquet"),
    "zeros": (lambda shard, other: shard.write_bytes(bytes(shard.stat().st_size)), "shard-00001.parquet, not a whole parquet file"),
    "another's": (lambda shard, other: shard.write_bytes(other.read_bytes()), r"shard-00001.parquet with (\d+ bytes|2 rows) instead of"),
    "a folder": (lambda shard, other: (shard.unlink(), shard.mkdir()), "lacks shard-00001.parquet"),
}


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("complete", [True, False])
def test_a_shard_that_is_not_what_was_written_is_noticed_by_runs_and_when_it_is_resumed(
    recordings: Path, tmp_path: Path, spoiled: str, complete: bool, monkeypatch
):
    folder = tmp_path / "shards"
    prepare(settings(folder, recordings))
    if not complete:
        index = read_json(folder / "index.json")
        write_json(folder / "index.json", index | {"complete": False}, sealed=True)
    assert reads(folder) == [7, RECORDINGS - 3]
    spoil, message = SPOILED[spoiled]
    spoil(folder / "shard-00001.parquet", folder / "shard-00003.parquet")
    for read in (reads, lambda folder: prepare(settings(folder, recordings))):
        with pytest.raises(UserError, match=message):
            read(folder)


def test_a_bit_of_a_shard_is_noticed_when_it_is_resumed(recordings: Path, tmp_path: Path):
    prepare(settings(tmp_path / "shards", recordings))
    shard = tmp_path / "shards" / "shard-00002.parquet"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 4
    shard.write_bytes(content)
    with pytest.raises(UserError, match="has shard-00002.parquet, changed since it was written"):
        prepare(settings(tmp_path / "shards", recordings))


def test_a_damaged_index_is_one_clear_error(recordings: Path, tmp_path: Path, monkeypatch):
    path = tmp_path / "shards" / "index.json"
    path.parent.mkdir()
    states = []
    write = shards.write_json
    monkeypatch.setattr(shards, "write_json", lambda *args, **options: (write(*args, **options), states.append(path.read_bytes())))
    prepare(settings(path.parent, recordings))
    for shard in ("shard-00002.parquet", "shard-00003.parquet"):
        (path.parent / shard).rename(tmp_path / shard)
    whole = states[2]  # behind two shards of four
    monkeypatch.setattr(shards, "BatchStream", lambda *args, **options: pytest.fail("a damaged index was believed"))
    damaged = [whole[:length] for length in range(0, len(whole) - 1, 5)] + [b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000]
    damaged += [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 3)]
    for content in damaged:
        path.write_bytes(content)
        try:
            unchanged = json.loads(content) == json.loads(whole)
        except (ValueError, RecursionError):
            unchanged = False
        if not unchanged:
            with pytest.raises(UserError, match="index.json is damaged"):
                prepare(settings(path.parent, recordings))
            with pytest.raises(UserError, match="index.json is damaged"):
                reads(path.parent)
    monkeypatch.undo()
    index = json.loads(whole)
    del index[SEAL]  # of an earlier version, where each field must be looked at
    for name in ("settings", "shards", "complete", "position"):
        for value in (1, "x", None, [], {}, [1], [{}], [{"file": 1, "clips": 1}], [{"file": "../x", "clips": 1}], {"positions": {"a": 1}}):
            if value != index[name] and (name, value) not in (("shards", []), ("position", None)):
                path.write_text(json.dumps(index | {name: value}))
                with pytest.raises(UserError, match="index.json is damaged|begun with other settings"):
                    prepare(settings(path.parent, recordings))
    path.write_bytes(whole)
    assert prepare(settings(path.parent, recordings))["clips"] == RECORDINGS - 3


def test_an_index_of_another_origin_is_ignored(recordings: Path, tmp_path: Path):
    prepare(settings(tmp_path / "shards", recordings))
    (tmp_path / "shards" / "index.json").write_text('{"version": 2}')
    assert reads(tmp_path / "shards") == [7, RECORDINGS - 3]


def test_what_is_complete_is_left_alone(recordings: Path, tmp_path: Path):
    index = prepare(settings(tmp_path / "shards", recordings))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()}
    assert prepare(settings(tmp_path / "shards", recordings)) == index
    assert prepare(settings(tmp_path / "shards", f"{recordings}/")) == index
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shards").iterdir()} == times


def test_finished_shards_of_recordings_that_have_changed_are_not_taken_for_theirs(recordings: Path, tmp_path: Path):
    own = Path(shutil.copytree(recordings, tmp_path / "own"))
    index = prepare(settings(tmp_path / "shards", own))
    (own / "01.wav").write_bytes((own / "03.wav").read_bytes())
    with pytest.raises(UserError, match="shards is finished, but the recordings of own have changed since, by their names or sizes"):
        prepare(settings(tmp_path / "shards", own))
    shutil.rmtree(own)
    assert prepare(settings(tmp_path / "shards", own)) == index


def test_other_settings_than_the_first_time_are_refused(recordings: Path, tmp_path: Path):
    prepare(settings(tmp_path / "shards", recordings))
    with pytest.raises(ValueError, match=r"begun with other settings: seed \(0 then, 1 now\); min_seconds \(0.2 then, 0.3 now\)"):
        prepare(settings(tmp_path / "shards", recordings, seed=1, min_seconds=0.3))
    (tmp_path / "shards" / "shard-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"lacks shard-00001.parquet"):
        prepare(settings(tmp_path / "shards", recordings))
    (tmp_path / "shards" / "index.json").unlink()
    with pytest.raises(ValueError, match="parquet files of another origin"):
        prepare(settings(tmp_path / "shards", recordings))


def test_a_full_disk_leaves_whole_shards_only_and_says_which_could_not_be_finished(recordings: Path, tmp_path: Path, monkeypatch):
    write, calls = pq.ParquetWriter.write_table, Counter()

    def full(self, table):
        calls["groups"] += 1
        if calls["groups"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, table)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(OSError, match=r"shard-00001.parquet could not be finished \(.*No space left"):
        prepare(settings(tmp_path / "shards", recordings))
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["index.json", "shard-00000.parquet"]
    monkeypatch.undo()
    assert prepare(settings(tmp_path / "shards", recordings))["clips"] == RECORDINGS - 3


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_decoded(recordings: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        prepare(settings(tmp_path / "file" / "shards", recordings))
    monkeypatch.setattr(shards, "BatchStream", lambda *args, **kwargs: pytest.fail("began to decode"))
    monkeypatch.setattr(shards, "write_json", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError("read-only")))
    with pytest.raises(PermissionError):
        prepare(settings(tmp_path / "shards", recordings))


def test_samples_beyond_full_scale_are_clipped_and_counted(tmp_path: Path, caplog):
    (tmp_path / "in").mkdir()
    for number, peak in enumerate((0.5, 1.5, 0.9)):
        soundfile.write(tmp_path / "in" / f"{number}.wav", np.full(8000, peak), 16_000, subtype="FLOAT")
    with caplog.at_level(logging.WARNING):
        index = prepare(ShardSettings(str(tmp_path / "shards"), data_dir=str(tmp_path / "in"), max_unreadable=0))
    assert [(shard["file"], shard["clips"], shard["clipped"]) for shard in index["shards"]] == [("shard-00000.parquet", 3, 1)]


def test_sources_of_one_shape_are_written_together_and_others_refused(recordings: Path, tmp_path: Path):
    for name, table, text in (("same", "csv", "file_name,fold\na.wav,1\n"), ("other", "jsonl", '{"file_name": "a.wav", "fold": 1}')):
        (tmp_path / name).mkdir()
        soundfile.write(tmp_path / name / "a.wav", noise(0.5), 16_000)
        (tmp_path / name / f"metadata.{table}").write_text(text)
    first, same, other = ({"kind": "audiofolder", "path": str(path)} for path in (recordings, tmp_path / "same", tmp_path / "other"))
    index = prepare(ShardSettings(str(tmp_path / "both"), sources=[first, same]))
    assert index["clips"] == RECORDINGS - 3 + 1
    rows = pq.read_table(tmp_path / "both" / "shard-00000.parquet").to_pylist()
    assert [(row["label"], row["fold"]) for row in rows if row["audio"]["path"] == "a.flac"] == [(None, "1")]
    with pytest.raises(ValueError, match="'fold' of other is another source's too, of another type"):
        prepare(ShardSettings(str(tmp_path / "neither"), sources=[first, other]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clips_per_shard": 7}, "clips_per_shard is 7, but must be a positive multiple of clips_per_group, 3"),
        ({"window_seconds": 0.1}, "window_seconds is 0.1"),
        ({"window_seconds": math.inf}, "window_seconds is inf, but must be at least min_seconds, 0.2"),
        ({"window_seconds": 1e-5, "min_seconds": 0.0}, "window_seconds is 1e-05, shorter than a sample at 16000 Hz"),
        ({"min_seconds": -1.0}, "min_seconds is -1, but must be 0 or more"),
        ({"min_seconds": math.nan}, "min_seconds is nan, but must be 0 or more"),
        *(({"sampling_rate": rate}, f"sampling_rate is {rate}, but 1000 to 655350 Hz are") for rate in (0, -1, 7, 88_201, 700_000)),
        ({"sources": [{"kind": "folder", "path": "x", "weight": 2}]}, "x has a weight"),
        ({"sources": []}, "exactly one of data_dir and sources is expected"),
        ({"data_dir": "x"}, "exactly one of data_dir and sources is expected"),
    ],
)
def test_settings_that_cannot_be_are_refused(recordings: Path, values: dict, message: str):
    source = {"kind": "folder", "path": str(recordings)}
    with pytest.raises(ValueError, match=message):
        ShardSettings("x", **{"sources": [source], "clips_per_group": 3, "clips_per_shard": 6, **values})


def test_the_command_writes_prints_and_rejects(recordings: Path, tmp_path: Path, capsys):
    source = f"[{{kind: folder, path: {recordings}}}]"
    words = ["prepare", "--output_dir", str(tmp_path / "shards"), "--clips_per_shard", "8", "--clips_per_group", "4"]
    assert main([*words, "--sources", source]) == 0
    printed = capsys.readouterr()
    assert f"3 shards, {RECORDINGS - 3} clips" in printed.out
    assert "left out: 1 too short, 2 unreadable" in printed.out
    assert "/23" in printed.err  # the progress bar
    assert main([*words, "--data_dir", str(recordings)]) == 0  # the same source, already written
    assert f"3 shards, {RECORDINGS - 3} clips" in capsys.readouterr().out
    assert main([*words, "--data_dir", str(recordings), "--seed", "1"]) == 1
    assert "begun with other settings: seed (0 then, 1 now)" in capsys.readouterr().err
    assert main([*words, "--sources", "[{kind: folders, path: x}]"]) == 2
    assert "kind is 'folders', but a source is one of " in capsys.readouterr().err
    assert main(words) == 2
    assert "exactly one of data_dir and sources is expected" in capsys.readouterr().err


def test_ctrl_c_ends_in_one_line_and_the_same_command_resumes(recordings: Path, tmp_path: Path, capsys, monkeypatch):
    words = ["prepare", "--output_dir", str(tmp_path / "shards"), "--data_dir", str(recordings), "--clips_per_shard", "8"]
    words += ["--clips_per_group", "4"]
    write, written = shards.write_shard, []

    def interrupted(*args):
        if written:
            raise KeyboardInterrupt
        written.append(write(*args))
        return written[-1]

    monkeypatch.setattr(shards, "write_shard", interrupted)
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith("stopped: the same command resumes after the last whole shard\n")
    monkeypatch.setattr(shards, "write_shard", write)
    assert main(words) == 0
    assert f"3 shards, {RECORDINGS - 3} clips" in capsys.readouterr().out


def test_shards_that_prepare_has_not_finished_name_the_way_out(recordings: Path, tmp_path: Path, monkeypatch, caplog):
    write, allowed = shards.write_shard, []

    def dying(*args):
        if not allowed:
            raise OSError("full")
        return write(*allowed.pop(), *args[1:])

    monkeypatch.setattr(shards, "write_shard", dying)
    for count, warned in ((0, False), (1, True)):
        folder = tmp_path / str(count)
        allowed[:] = [(folder / "shard-00000.parquet",)] * count
        with pytest.raises(OSError, match="full"):
            prepare(settings(folder, recordings))
        if warned:
            Source.open(SourceSettings("parquet", str(folder)))
            assert (
                f"prepare has not finished {folder}: only its present shards are read. For all of them, give the same command again"
                in caplog.text
            )
        else:
            with pytest.raises(UserError, match="prepare has not finished a shard in .*0 yet: give the same command again"):
                Source.open(SourceSettings("parquet", str(folder)))
