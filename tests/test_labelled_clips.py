"""Which labelled clips an epoch hears, held in memory or streamed, and what becomes of those that cannot be read."""

import io
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import noise

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio.decode import load_waveform
from transformers_sslam.audio.labels import LabelledRows, LabelReader, Waveforms, fold_values, keep_rows, read_rows, select_folds
from transformers_sslam.errors import UserError
from transformers_sslam.training.augmentation import AugmentationSettings
from transformers_sslam.training.labelled_clips import (
    ClipDataset,
    EpochRows,
    LabelledClips,
    StreamedClips,
    balanced_weights,
    keep_clips_per_class,
)


EXTRACTOR = SSLAMFeatureExtractor(max_length=32)
CLASSES = ["a", "b", "c"]


def rows(*labels: str | list[str], multi_label: bool = False) -> LabelledRows:
    names = [label if isinstance(label, list) else [label] for label in labels]
    return LabelledRows([{"path": f"{i}"} for i in range(len(labels))], names, multi_label, declared_classes=None)


# --- which clips an epoch hears


def test_a_clip_weighs_the_sum_over_its_classes_of_one_over_their_clips():
    """Three clips of the first class, two of the second: 1/3, 1/3, 1/3 + 1/2 and 1/2, over 2."""
    targets = torch.tensor([[1.0, 0], [1, 0], [1, 1], [0, 1], [0, 0]])
    np.testing.assert_allclose(balanced_weights(targets), [1 / 6, 1 / 6, 5 / 12, 1 / 4, 0], rtol=1e-12)


def test_a_class_without_clips_weighs_nothing():
    np.testing.assert_allclose(balanced_weights(torch.tensor([[1.0, 0], [1, 0]])), [0.5, 0.5])


def test_rare_classes_are_drawn_as_often_as_common_ones():
    targets = torch.nn.functional.one_hot(torch.tensor([0] * 90 + [1] * 9 + [2])).float()
    drawn = EpochRows(targets, class_balanced=True, clips_per_epoch=60_000)(0)
    shares = targets[drawn].mean(0)
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), rtol=0, atol=0.01)
    within = np.bincount(drawn, minlength=100)[90:99] / 60_000
    np.testing.assert_allclose(within, 1 / 27, atol=0.005)


def test_draws_follow_from_seed_and_epoch_alone():
    targets = torch.eye(3).repeat(10, 1)
    one, other = (EpochRows(targets, class_balanced=True, seed=3) for _ in range(2))
    other(5)
    np.testing.assert_array_equal(one(1), other(1))
    assert len(one) == len(one(1)) == 30
    assert not np.array_equal(one(1), one(2))
    assert not np.array_equal(one(1), EpochRows(targets, class_balanced=True, seed=4)(1))


def test_without_a_wish_an_epoch_is_every_clip_in_order():
    epoch_rows = EpochRows(torch.eye(5))
    assert epoch_rows(0).tolist() == epoch_rows(7).tolist() == [0, 1, 2, 3, 4]


def test_a_short_epoch_hears_other_clips_each_time_and_none_twice():
    epoch_rows = EpochRows(torch.zeros(20, 2), clips_per_epoch=8)
    epochs = [epoch_rows(epoch).tolist() for epoch in range(20)]
    assert all(len(set(heard)) == len(heard) == 8 for heard in epochs)
    assert set().union(*epochs) == set(range(20))
    assert len({tuple(heard) for heard in epochs}) == 20


def test_a_long_epoch_hears_each_clip_as_often_as_another_or_once_more():
    counts = Counter(EpochRows(torch.zeros(5, 2), clips_per_epoch=13)(0).tolist())
    assert sorted(counts.values()) == [2, 2, 3, 3, 3]


def test_items_are_the_rows_of_the_epoch():
    clips = LabelledClips(rows("a", "a", "a", "b"), [noise(0.3, seed=i) for i in range(4)])  # type: ignore[arg-type]
    dataset = ClipDataset(clips, ["a", "b"], EXTRACTOR)
    dataset.epoch_rows = EpochRows(dataset.targets, class_balanced=True, clips_per_epoch=12)
    assert len(dataset) == 12
    for epoch in (0, 1):
        dataset.epoch.fill_(epoch)
        for place, row in enumerate(dataset.epoch_rows(epoch)):
            item = dataset[place]
            expected = EXTRACTOR(noise(0.3, seed=int(row)), sampling_rate=16_000, return_tensors="pt").input_values[0]
            assert torch.equal(item["input_values"], expected)
            assert item["labels"].tolist() == ([0, 1] if row == 3 else [1, 0])


def test_so_many_clips_of_each_class_are_kept_by_the_seed():
    many = rows(*"abacabacab" * 4)  # 20 of a, 12 of b, 8 of c
    kept = keep_clips_per_class(many, 5, seed=0)
    assert kept == sorted(kept) == keep_clips_per_class(many, 5, seed=0)
    assert Counter(many.labels[i][0] for i in kept) == {"a": 5, "b": 5, "c": 5}
    assert kept != keep_clips_per_class(many, 5, seed=1)


@pytest.mark.parametrize(
    ("labelled", "message"),
    [
        (rows("a", "a", "b"), "clips_per_class is 2, but the class b has 1 training clips"),
        (rows(["a", "b"], ["a"], multi_label=True), "clips_per_class is 2, but these clips may have several classes"),
    ],
)
def test_clips_per_class_that_cannot_be_had_are_an_error(labelled, message):
    with pytest.raises(UserError, match=message):
        keep_clips_per_class(labelled, 2, seed=0)


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
    """48 kHz: the same hum lasts as long, and is heard as it is at 16 kHz."""

    def hum(rate: int) -> np.ndarray:
        return 0.2 * np.sin(2 * np.pi * 440 * np.arange(int(0.6 * rate)) / rate)

    soundfile.write(tmp_path / "hum.wav", hum(48_000), 48_000, subtype="FLOAT")
    (waveform,) = Waveforms([{"path": str(tmp_path / "hum.wav"), "bytes": None}], 16_000)
    assert waveform.shape == hum(16_000).shape
    np.testing.assert_allclose(waveform[500:-500], hum(16_000)[500:-500], atol=1e-3)


def labelled_noise(augmentation=None, seed=0) -> ClipDataset:
    rows = LabelledRows([{"path": "a"}, {"path": "b"}], [["x"], ["y"]], multi_label=False, declared_classes=None)
    waveforms = [noise(0.6, seed=i) for i in range(2)]
    return ClipDataset(LabelledClips(rows, waveforms), ["x", "y"], SSLAMFeatureExtractor(max_length=64), augmentation, seed=seed)


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    one, other = labelled_noise(AugmentationSettings()), labelled_noise(AugmentationSettings())
    one[0]  # an order of its own
    assert torch.equal(one[1]["input_values"], other[1]["input_values"])
    before = other[1]["input_values"]
    other.epoch.fill_(1)
    assert not torch.equal(other[1]["input_values"], before)
    assert not torch.equal(labelled_noise(AugmentationSettings(), seed=1)[1]["input_values"], before)


def test_the_epoch_reaches_worker_processes_that_stay():
    dataset = labelled_noise(AugmentationSettings())
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, persistent_workers=True)
    first = next(iter(loader))["input_values"]
    dataset.epoch.fill_(1)
    second = next(iter(loader))["input_values"]
    assert not torch.equal(first, second)
    assert torch.equal(second[0], dataset[0]["input_values"])


def test_evaluation_clips_are_not_augmented():
    dataset = labelled_noise()
    expected = dataset.extractor(noise(0.6, seed=1), sampling_rate=16_000, return_tensors="pt").input_values[0]
    assert torch.equal(dataset[1]["input_values"], expected)
    assert dataset[1]["labels"].tolist() == [0, 1]


# --- streams


def sound_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, noise(0.3, seed=seed), 16_000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def stream(clips: int = 12, shards: int = 4, broken: tuple[int, ...] = ()) -> datasets.IterableDataset:
    """Clip `i` is noise of the seed `i`, of class `i % 3`."""
    features = datasets.Features({"audio": datasets.Audio(decode=False), "label": datasets.ClassLabel(names=CLASSES)})
    audio = [{"path": f"{i}.wav", "bytes": b"no audio" if i in broken else sound_bytes(i)} for i in range(clips)]
    table = datasets.Dataset.from_dict({"audio": audio, "label": [i % 3 for i in range(clips)]}, features=features)
    return table.to_iterable_dataset(shards)


def streamed(data: datasets.IterableDataset, *args, **kwargs) -> StreamedClips:
    return StreamedClips(data, LabelReader.of(data, "label"), CLASSES, EXTRACTOR, *args, **kwargs)


@pytest.fixture(scope="module")
def log_mels() -> list[torch.Tensor]:
    clips = [noise(0.3, seed=i) for i in range(12)]
    return [EXTRACTOR(clip, sampling_rate=16_000, return_tensors="pt").input_values[0] for clip in clips]


def heard(items, log_mels) -> list[int]:
    """Which clips, and that each has its label."""
    numbers = []
    for item in items:
        (number,) = (i for i, expected in enumerate(log_mels) if torch.equal(expected, item["input_values"]))
        assert item["labels"].tolist() == torch.eye(3)[number % 3].tolist()
        numbers.append(number)
    return numbers


def test_a_stream_keeps_its_order_unless_it_is_shuffled(log_mels):
    assert heard(streamed(stream()), log_mels) == list(range(12))
    shuffled = streamed(stream(), shuffle_buffer=12)
    orders = []
    for epoch in (0, 1):
        shuffled.epoch.fill_(epoch)
        orders.append(heard(shuffled, log_mels))
        assert sorted(orders[-1]) == list(range(12)) != orders[-1]
    assert orders[0] != orders[1]


def test_the_same_seed_streams_the_same_items():
    def items(seed: int, epoch: int = 0) -> list[dict]:
        clips = streamed(stream(), AugmentationSettings(), seed=seed, shuffle_buffer=12)
        clips.epoch.fill_(epoch)
        return list(clips)

    first, again = items(5), items(5)
    assert all(torch.equal(a["input_values"], b["input_values"]) and a["key"] == b["key"] for a, b in zip(first, again))
    for others in (items(6), items(5, epoch=1)):
        assert not any(torch.equal(a["input_values"], b["input_values"]) for a, b in zip(first, others))


def test_augmentation_of_a_stream_has_a_key_of_its_own_for_each_clip():
    keys = [item["key"] for item in streamed(stream(), AugmentationSettings(), seed=5)]
    assert len(set(keys)) == 12
    assert {key[:2] for key in keys} == {(5, 0)}


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_clips_of_a_stream_are_left_out_and_counted(log_mels, workers):
    clips = streamed(stream(broken=(2, 7)), max_unreadable=0.5)
    items = list(torch.utils.data.DataLoader(clips, batch_size=None, num_workers=workers))
    assert sorted(heard(items, log_mels)) == [i for i in range(12) if i not in (2, 7)]
    assert clips.unreadable == {"unreadable": 2}


def test_too_many_unreadable_clips_stop_a_stream_at_the_end_of_a_pass(log_mels):
    clips = iter(streamed(stream(broken=(0, 7)), max_unreadable=0.1))
    assert heard([next(clips) for _ in range(10)], log_mels) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    with pytest.raises(UserError, match=r"2 of 12 streamed clips cannot be used \({'unreadable': 2}\), more than the share of 0.1"):
        next(clips)


def test_too_many_unreadable_clips_stop_a_long_stream_before_its_end():
    clips, read = streamed(stream(150, broken=tuple(range(0, 150, 5))), max_unreadable=0.1), []
    with pytest.raises(UserError, match="21 of 101 streamed clips"):  # looked at where one cannot be read
        read.extend(clips)
    assert len(read) == 80


@pytest.mark.parametrize("shards", [4, 1])
def test_workers_share_a_stream_and_hear_of_each_epoch(log_mels, shards):
    """Workers that outlive an epoch; with one shard, there is none for the second."""
    clips = streamed(stream(shards=shards), shuffle_buffer=12)
    loader = torch.utils.data.DataLoader(clips, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1):
        clips.epoch.fill_(epoch)
        orders.append(heard(loader, log_mels))
        assert sorted(orders[-1]) == list(range(12))
    assert orders[0] != orders[1]


def test_an_empty_stream_is_an_error():
    with pytest.raises(UserError, match="the stream has no clip"):
        list(streamed(stream().take(0)))


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
    assert read_rows(labelled("dog", "dog ", " cat"), "label").labels == [["dog"], ["dog"], ["cat"]]


def test_a_separator_that_divides_nothing_is_told(caplog):
    assert read_rows(labelled("dog#cat"), "label", "#").labels == [["dog", "cat"]]
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


def test_chosen_rows_read_their_sources_when_they_are_asked_for():
    """Rows of a parquet hold whole files: to choose among them must not bring them all into memory."""
    read = []

    class Sources(list):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    rows = LabelledRows(Sources([{"path": str(i)} for i in range(5)]), [["a"], ["b"], ["c"], ["d"], ["e"]], False, None)
    kept = keep_rows(keep_rows(rows, [4, 2, 0]), [0, 2])
    assert (len(kept), kept.labels, read) == (2, [["e"], ["a"]], [])
    assert kept.sources[1] == {"path": "0"}
    assert read == [0]
