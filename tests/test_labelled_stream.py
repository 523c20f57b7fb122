"""Which labelled clips an epoch has, of a table or a stream, what a batch of them is, and what becomes of those that cannot be read."""

import io
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import named_labels, noise

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.audio.decode import load_waveform
from transformers_sslam.audio.labels import LabelReader, Labels
from transformers_sslam.audio.rows import AudioColumn, LabelledRows, fold_values, read_rows, select_folds
from transformers_sslam.audio.sources import Source, WeightedOrder
from transformers_sslam.errors import UserError
from transformers_sslam.finetuning.augmentation import AugmentationSettings
from transformers_sslam.finetuning.stream import ColumnTargets, LabelledPart, LabelledStream, TableTargets, keep_clips_per_class


EXTRACTOR = SSLAMFeatureExtractor(max_length=32)
CLASSES = ["a", "b", "c"]


def audio(*paths: str) -> AudioColumn:
    return AudioColumn(datasets.Dataset.from_dict({"audio": [{"path": path, "bytes": None} for path in paths]}))


def rows(*labels: str | list[str], multi_label: bool = False) -> LabelledRows:
    names = [label if isinstance(label, list) else [label] for label in labels]
    return LabelledRows(audio(*map(str, range(len(labels)))), named_labels(names, multi_label))


# --- which clips an epoch has


def labels_of(targets: list[list[int]]) -> Labels:
    names = [str(code) for code in range(len(targets[0]))]
    return named_labels([[names[i] for i, one in enumerate(row) if one] for row in targets], True, names)


def test_a_clip_weighs_the_sum_over_its_classes_of_one_over_their_clips():
    """Three clips of the first class, two of the second: 1/3, 1/3, 1/3 + 1/2 and 1/2, over 2."""
    labels = labels_of([[1, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    np.testing.assert_allclose(labels.balanced_weights(), [1 / 6, 1 / 6, 5 / 12, 1 / 4, 0], rtol=1e-12)


def test_a_class_without_clips_weighs_nothing():
    np.testing.assert_allclose(labels_of([[1, 0], [1, 0]]).balanced_weights(), [0.5, 0.5])


def test_rare_classes_are_drawn_as_often_as_common_ones():
    labels = named_labels([["a"]] * 90 + [["b"]] * 9 + [["c"]], False)
    drawn = WeightedOrder(labels.balanced_weights(), 60_000, seed=0)(0)[:, 1]
    np.testing.assert_allclose(labels.one_hot(drawn).mean(0), [1 / 3] * 3, atol=0.01)
    within = np.bincount(drawn, minlength=100)[90:99] / 60_000
    np.testing.assert_allclose(within, 1 / 27, atol=0.005)


def test_draws_follow_from_seed_and_epoch_alone():
    weights = np.full(30, 1 / 30)
    one, other = (WeightedOrder(weights, 30, seed=3) for _ in range(2))
    other(5)
    np.testing.assert_array_equal(one(1), other(1))
    assert len(one(1)) == 30
    assert not np.array_equal(one(1), one(2))
    assert not np.array_equal(one(1), WeightedOrder(weights, 30, seed=4)(1))


@pytest.fixture(scope="module")
def log_mels() -> list[torch.Tensor]:
    clips = [noise(0.3, seed=i) for i in range(12)]
    return [EXTRACTOR(clip, sampling_rate=16_000, return_tensors="pt").input_values[0] for clip in clips]


def sound_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(0.3, seed=seed), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def table(clips: int = 12, broken: tuple[int, ...] = ()) -> datasets.Dataset:
    """Clip `i` is noise of the seed `i`, of class `i % 3`."""
    features = datasets.Features({"audio": datasets.Audio(decode=False), "label": datasets.ClassLabel(names=CLASSES)})
    audio = [{"path": f"{i}.wav", "bytes": b"no audio" if i in broken else sound_bytes(i)} for i in range(clips)]
    return datasets.Dataset.from_dict({"audio": audio, "label": [i % 3 for i in range(clips)]}, features=features)


def in_table(data: datasets.Dataset, **kwargs) -> LabelledStream:
    labels = read_rows(data, "label").labels
    return LabelledStream(LabelledPart(Source(data, "clips"), TableTargets(labels), labels), EXTRACTOR, **{"batch_size": 4, **kwargs})


def streamed(data: datasets.IterableDataset, **kwargs) -> LabelledStream:
    targets = ColumnTargets(LabelReader.of(data, "label"), CLASSES)
    return LabelledStream(LabelledPart(Source(data, "clips"), targets), EXTRACTOR, **{"batch_size": 4, **kwargs})


def found(batches, log_mels) -> list[int]:
    """Which clips, and that each has its label."""
    numbers = []
    for batch in batches:
        for values, labels in zip(batch["input_values"], batch["labels"]):
            (number,) = (i for i, expected in enumerate(log_mels) if torch.allclose(expected, values, atol=1e-5))
            assert labels.tolist() == torch.eye(3)[number % 3].tolist()
            numbers.append(number)
    return numbers


def taken(stream: LabelledStream, batches: int) -> list[int]:
    iterator = iter(stream)
    return [row for _ in range(batches) for row in next(iterator)["rows"]]


def test_an_epoch_is_every_clip_once_in_another_order_each_time():
    numbers = taken(in_table(table()), 9)
    epochs = [numbers[start : start + 12] for start in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_short_epochs_have_other_clips_each_time_until_all_had_their_turn():
    numbers = taken(in_table(table(20), clips_per_epoch=8), 40)
    epochs = [numbers[start : start + 8] for start in range(0, 160, 8)]
    assert all(len(set(numbers[:16][start : start + 8])) == 8 for start in (0, 8))  # the third ends one pass and begins another
    assert set(Counter(numbers).values()) == {8}  # of 160 draws
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_a_long_epoch_has_each_clip_as_often_as_another_or_once_more():
    counts = Counter(taken(in_table(table(5), clips_per_epoch=13, batch_size=13), 1))
    assert sorted(counts.values()) == [2, 2, 3, 3, 3]


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_the_clips_of_their_rows(log_mels, workers):
    for batch in in_table(table(), epochs=2, last_batch="keep", num_workers=workers):
        assert found([batch], log_mels) == batch["rows"]


def test_so_many_clips_of_each_class_are_kept_by_the_seed():
    many = rows(*"abacabacab" * 4)  # 20 of a, 12 of b, 8 of c
    kept = keep_clips_per_class(many.labels, 5, seed=0).tolist()
    assert kept == sorted(kept) == keep_clips_per_class(many.labels, 5, seed=0).tolist()
    assert Counter(many.labels[i][0] for i in kept) == {"a": 5, "b": 5, "c": 5}
    assert kept != keep_clips_per_class(many.labels, 5, seed=1).tolist()


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        (rows("a", "a", "b"), "clips_per_class is 2, but the class b has only 1 of the training clips"),
        (rows(["a", "b"], ["a"], multi_label=True), "clips_per_class is 2, but these clips may have several classes"),
    ],
)
def test_clips_per_class_that_cannot_be_had_are_an_error(labelled, message):
    with pytest.raises(UserError, match=message):
        keep_clips_per_class(labelled.labels, 2, seed=0)


# --- clips in memory


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Twelve clips of 0.6 s."""
    paths = [tmp_path / f"{i:03}.wav" for i in range(12)]
    for i, path in enumerate(paths):
        soundfile.write(path, noise(0.6, seed=i), 16_000)
    return paths


def test_waveforms_stay_with_their_rows_when_a_file_is_left_out(files):
    sources = [{"path": str(path), "bytes": None} for path in files]
    expected = [load_waveform(source) for source in sources]
    files[1].unlink()
    waveforms = Waveforms(sources, 16_000)
    assert waveforms.kept == [0, *range(2, 12)]
    assert waveforms.unreadable == {"missing": [str(files[1])]}
    for i, row in enumerate(waveforms.kept):
        np.testing.assert_array_equal(waveforms[i], expected[row])


def test_clips_beyond_the_memory_limit_are_decoded_again(files):
    sources = [{"path": str(path), "bytes": None} for path in files]
    one_clip = 0.6 * 16_000 * 4 / 1e9
    kept, decoded_again = Waveforms(sources, 16_000), Waveforms(sources, 16_000, memory_gb=1.5 * one_clip)
    np.testing.assert_array_equal(decoded_again[3], kept[3])
    files[3].unlink()
    assert len(kept[3]) == len(decoded_again[0]) == 0.6 * 16_000  # in memory
    with pytest.raises(ValueError, match=r"003.wav is not there"):
        decoded_again[3]


def test_clips_at_another_rate_are_resampled(tmp_path):
    """48 kHz: the same hum lasts as long, and is what it is at 16 kHz."""

    def hum(rate: int) -> np.ndarray:
        return 0.2 * np.sin(2 * np.pi * 440 * np.arange(int(0.6 * rate)) / rate)

    soundfile.write(tmp_path / "hum.wav", hum(48_000), 48_000, subtype="FLOAT")
    (waveform,) = Waveforms([{"path": str(tmp_path / "hum.wav"), "bytes": None}], 16_000)
    assert waveform.shape == hum(16_000).shape
    np.testing.assert_allclose(waveform[500:-500], hum(16_000)[500:-500], atol=1e-3)


def augmented(**kwargs) -> dict[int, torch.Tensor]:
    """The log-mels of the first epoch, by row."""
    batches = in_table(table(), augmentation=AugmentationSettings(), epochs=1, last_batch="keep", **kwargs)
    return {row: values for batch in batches for row, values in zip(batch["rows"], batch["input_values"])}


def test_augmentation_follows_from_the_seed_whoever_reads():
    one, other = augmented(seed=5), augmented(seed=5)
    assert one.keys() == other.keys() == set(range(12))
    assert all(torch.equal(one[row], other[row]) for row in one)
    assert not any(torch.equal(one[row], augmented(seed=6)[row]) for row in one)


def test_each_epoch_is_augmented_in_another_way():
    stream = in_table(table(1), augmentation=AugmentationSettings(), batch_size=1, epochs=3)
    first, second, third = (batch["input_values"] for batch in stream)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_evaluation_clips_are_not_augmented(log_mels):
    (batch,) = in_table(table(2), epochs=1, last_batch="keep")
    for row, values, labels in zip(batch["rows"], batch["input_values"], batch["labels"]):
        torch.testing.assert_close(values, log_mels[row], rtol=0, atol=1e-5)
        assert labels.tolist() == np.eye(3)[row].tolist()


def test_targets_are_smoothed_and_mixed_with_their_clips():
    mixing = AugmentationSettings(roll=False, gain=0, mixup_probability=1.0, time_mask=0, frequency_mask=0)
    (batch,) = in_table(table(), augmentation=mixing, label_smoothing=0.3, epochs=1, last_batch="keep", batch_size=12)
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(12))
    assert batch["labels"].min() >= 0.1 - 1e-6
    assert (batch["labels"] > 0.1 + 1e-6).sum(1).max() == 2


# --- streams


def stream(clips: int = 12, shards: int = 4, broken: tuple[int, ...] = ()) -> datasets.IterableDataset:
    return table(clips, broken).to_iterable_dataset(shards)


def test_an_evaluation_keeps_the_order_of_each_shard(log_mels):
    numbers = found(streamed(stream(), shuffle_rows=1, epochs=1, last_batch="keep"), log_mels)
    assert sorted(numbers) == list(range(12)) != numbers
    assert {tuple(numbers[start : start + 3]) for start in range(0, 12, 3)} == {(i, i + 1, i + 2) for i in range(0, 12, 3)}


@pytest.mark.parametrize("shards", [4, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_of_a_stream_is_every_clip_in_another_order(log_mels, shards, workers):
    """With one shard, there is none for the second worker."""
    numbers = found(streamed(stream(shards=shards), epochs=2, last_batch="keep", num_workers=workers), log_mels)
    assert set(Counter(numbers).values()) == {2}
    assert len(numbers) == 24
    if workers == 0:
        assert sorted(numbers[:12]) == sorted(numbers[12:])
        assert numbers[:12] != numbers[12:]


def test_the_same_seed_streams_the_same_items():
    def items(seed: int) -> list[dict]:
        return list(streamed(stream(), augmentation=AugmentationSettings(), seed=seed, epochs=2))

    first, again, other = items(5), items(5), items(6)
    assert all(torch.equal(a["input_values"], b["input_values"]) and a["keys"] == b["keys"] for a, b in zip(first, again))
    assert not any(torch.equal(a["input_values"], b["input_values"]) for a, b in zip(first, other))
    keys = [tuple(batch["keys"][start : start + 5]) for batch in first for start in range(0, len(batch["keys"]), 5)]
    assert len(set(keys)) == len(keys) == 24
    assert {key[:2] for key in keys} == {(5, 0), (5, 1)}  # seed and epoch


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["table", "stream"])
def test_unreadable_clips_are_left_out_and_counted(log_mels, workers, kind):
    options = {"max_unreadable": 0.5, "epochs": 2, "last_batch": "keep", "num_workers": workers}
    clips = in_table(table(broken=(2, 7)), **options) if kind == "table" else streamed(stream(broken=(2, 7)), **options)
    assert Counter(found(clips, log_mels)) == {i: 2 for i in range(12) if i not in (2, 7)}
    assert clips.statistics.unreadable == {"unreadable": 4}  # each time that one was met
    expected = {"unreadable": ["2.wav", "7.wav"]} if kind == "table" else {"unreadable": 4}
    assert clips.part.unreadable(clips.statistics) == expected


def test_clips_without_a_whole_frame_are_left_out_by_name(tmp_path):
    soundfile.write(tmp_path / "short.wav", noise(0.02), 16_000)
    short = {"path": "short.wav", "bytes": (tmp_path / "short.wav").read_bytes()}
    data = datasets.concatenate_datasets([table(3), table(1).map(lambda _: {"audio": short})])
    clips = in_table(data, max_unreadable=0.5, epochs=1, last_batch="keep")
    assert sorted(row for batch in clips for row in batch["rows"]) == [0, 1, 2]
    assert clips.part.unreadable(clips.statistics) == {"too short": ["short.wav"]}
    assert "left out: 1 too short" in str(clips.statistics)


def test_a_state_remembers_the_files_that_could_not_be_read():
    clips = in_table(table(broken=(2, 7)), max_unreadable=0.5)
    taken(clips, 6)
    resumed = in_table(table(broken=(2, 7)), max_unreadable=0.5)
    resumed.load_state_dict([clips.state_dict()])
    assert resumed.statistics.rows == {2: "unreadable", 7: "unreadable"}


def test_too_many_unreadable_clips_of_a_small_table_stop_it_after_one_pass():
    with pytest.raises(UserError, match=r"2 of 1[2-6] recordings are unreadable, more than max_unreadable = 0.1"):
        taken(in_table(table(broken=(0, 7)), max_unreadable=0.1), 100)


def test_too_many_unreadable_clips_stop_a_long_stream_before_its_end():
    clips, read = streamed(stream(150, broken=tuple(range(0, 150, 5))), max_unreadable=0.1, batch_size=1), []
    with pytest.raises(UserError, match="19 of 100 recordings are unreadable"):
        read.extend(clips)
    assert len(read) == 80


@pytest.mark.parametrize(("broken", "lost"), [((1, 4), ["b"]), ((1,), []), ((), [])])
def test_a_class_is_lost_when_none_of_its_clips_can_be_read(broken, lost):
    clips = in_table(table(6, broken), max_unreadable=0.5, epochs=1, last_batch="keep")
    list(clips)
    assert clips.part.unreadable_classes(clips.statistics.rows) == lost


def test_an_empty_stream_is_an_error():
    with pytest.raises(UserError, match="found no clip at all|the source clips is empty"):
        list(streamed(stream().take(0), epochs=1))


# --- labels and folds


def test_a_clip_marked_as_unlabelled_is_an_error():
    """`datasets` writes -1, which as an index would be the last class."""
    features = datasets.Features({"audio": datasets.Audio(decode=False), "label": datasets.ClassLabel(names=CLASSES)})
    table = datasets.Dataset.from_dict({"audio": ["x.wav", "y.wav"], "label": [0, -1]}, features=features)
    with pytest.raises(UserError, match="y.wav has -1 in the column 'label', but the numbers of its classes are 0 to 2"):
        read_rows(table, "label")


def test_folds_are_those_of_all_splits_in_order():
    splits = {"train": [10, 2], "test": [2, 1]}
    table = datasets.DatasetDict({name: datasets.Dataset.from_dict({"fold": folds}) for name, folds in splits.items()})
    assert fold_values(table, "fold") == [1, 2, 10]


def test_folds_with_gaps_are_whole_numbers_still():
    rows = datasets.Dataset.from_dict({"x": ["a", "b", "c"], "fold": [1.0, None, 2.0]})
    splits = datasets.DatasetDict(train=rows)
    assert select_folds(splits, "fold", [2])["x"] == ["c"]
    with pytest.raises(UserError, match="no fold 3, only 1, 2"):
        select_folds(splits, "fold", [3])
    assert fold_values(datasets.DatasetDict(train=rows.select([0, 2])), "fold") == [1, 2]


def test_rows_are_chosen_by_the_names_of_their_classes():
    features = datasets.Features({"x": datasets.Value("string"), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = datasets.Dataset.from_dict({"x": ["a", "b", "c", "d"], "label": [1, 0, -1, 1]}, features=features)
    splits = datasets.DatasetDict(train=rows)
    assert select_folds(splits, "label", ["dog"])["x"] == ["a", "d"]
    with pytest.raises(UserError, match="no fold 1, only cat, dog"):
        select_folds(splits, "label", [1])


@pytest.mark.parametrize(
    ("folds", "message"),
    [([1, 1], r"holds \[1\], but to hold out each fold"), ([1, None], "has rows without a value"), (None, "no column 'fold', only x")],
)
def test_folds_that_cannot_be_held_out_are_an_error(folds, message):
    table = datasets.Dataset.from_dict({"x": [1]} if folds is None else {"fold": folds})
    with pytest.raises(UserError, match=message):
        fold_values(datasets.DatasetDict(train=table), "fold")


def labelled(*cells: str) -> datasets.Dataset:
    sources = [{"path": f"{i}.wav", "bytes": None} for i in range(len(cells))]
    return datasets.Dataset.from_dict({"audio": sources, "label": list(cells)})


def test_space_around_a_label_is_none_of_it():
    assert list(read_rows(labelled("dog", "dog ", " cat"), "label").labels) == [["dog"], ["dog"], ["cat"]]


def test_a_separator_that_divides_nothing_is_told(caplog):
    assert list(read_rows(labelled("dog#cat"), "label", "#").labels) == [["dog", "cat"]]
    assert not caplog.records
    read_rows(labelled("dog#cat"), "label", ";")
    assert "the separator ';' is in none of the 1 labels" in caplog.text
    rows = labelled("dog+cat", "dog").class_encode_column("label")
    with pytest.raises(UserError, match=r"label_separator is '\+', but the column 'label' holds classes"):
        read_rows(rows, "label", "+")


def test_an_empty_label_in_a_list_is_an_error():
    rows = datasets.Dataset.from_dict({"audio": [{"path": "a.wav"}, {"path": "b.wav"}], "label": [["x"], ["y", None]]})
    with pytest.raises(UserError, match="b.wav has an empty label in the column 'label'"):
        read_rows(rows, "label")


def test_chosen_rows_read_their_sources_when_they_are_asked_for(monkeypatch):
    """Rows of a parquet hold whole files: to choose among them must not bring them all into memory."""
    read: list[int] = []
    item = AudioColumn.__getitem__
    monkeypatch.setattr(AudioColumn, "__getitem__", lambda self, i: read.append(i) or item(self, i))
    kept = rows("a", "b", "c", "d", "e").select([4, 2, 0]).select([0, 2])
    assert (len(kept), list(kept.labels), read) == (2, [["e"], ["a"]], [])
    assert kept.sources[1] == {"path": "0", "bytes": None}
    assert read == [1]
