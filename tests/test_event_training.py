"""Fine-tuning for event detection: targets that move with the sound, mixtures made on the fly, and the real program on made-up sounds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoModelForAudioClassification, AutoModelForAudioFrameClassification

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio import load_waveform
from transformers_sslam.audio.clips import Clip
from transformers_sslam.audio.events import Event
from transformers_sslam.audio.labels import LabelReader
from transformers_sslam.audio.rows import read_rows
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.scored_events import ScoredEvents
from transformers_sslam.finetuning import trainer as stream_trainer
from transformers_sslam.finetuning.augmentation import NO_AUGMENTATION, AugmentationSettings, augment_batch, mixup
from transformers_sslam.finetuning.data import select_rows
from transformers_sslam.finetuning.mixtures import Mixer, MixingSettings
from transformers_sslam.finetuning.repeats import fine_tune_once, format_runs, repeat_fine_tuning
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.stream import Collate, EventTargets, TableTargets
from transformers_sslam.finetuning.training import fine_tune


RATE = 16_000
EXTRACTOR = SSLAMFeatureExtractor(max_length=128)  # 1.28 s: eight steps of 160 ms
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 128}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def beep(frequency: float, seconds: float) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)


def scene(events: list[Event], seconds: float, seed: int) -> np.ndarray:
    """A high or low beep for each event, over faint noise."""
    samples = 0.003 * np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    for label, onset, offset in events:
        start, tone = round(onset * RATE), beep({"high": 3000, "low": 300}[label], offset - onset)
        samples[start : start + len(tone)] += tone
    return samples.astype(np.float32)


def random_events(seed: int, seconds: float) -> list[Event]:
    generator = np.random.default_rng(seed)
    events = []
    for label in ("high", "low"):
        if generator.random() < 0.7:
            length = generator.uniform(0.2, 0.5)
            onset = generator.uniform(0, seconds - length)
            events.append(Event(label, float(onset), float(onset + length)))
    return events


def write_scenes(folder: Path, split: str, count: int, first_seed: int) -> None:
    """An audio folder whose metadata.jsonl has a column of events."""
    (folder / split).mkdir(parents=True)
    lines = []
    for i in range(count):
        events = random_events(first_seed + i, 1.28)
        soundfile.write(folder / split / f"{i:03}.wav", scene(events, 1.28, i), RATE)
        lines.append(json.dumps({"file_name": f"{i:03}.wav", "events": [event._asdict() for event in events]}))
    (folder / split / "metadata.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(folder, "train", 48, 0)
    write_scenes(folder, "test", 24, 1000)
    return folder


@pytest.fixture
def settings(scenes, tmp_path) -> FineTuningSettings:
    return FineTuningSettings(
        data_dir=str(scenes),
        output_dir=str(tmp_path / "detector"),
        task="events",
        label_column="events",
        max_length=128,
        model_config=TINY,
        augmentation=AugmentationSettings(mixup_alpha=0, time_mask=0, frequency_mask=0),
        num_train_epochs=20,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        layer_decay=1.0,
        disable_tqdm=True,
        use_cpu=True,
        save_steps=1000,
    )


# --- targets


def targets(events: list[list[Event]], **options) -> EventTargets:
    table = datasets.Dataset.from_dict(
        {
            "audio": [{"path": f"{i}.wav", "bytes": None} for i in range(len(events))],
            "events": [[event._asdict() for event in one] for one in events],
        }
    )
    labels = read_rows(table, "events").labels.encode(["high", "low"])
    return EventTargets(labels, frames_per_step=16, steps=8, sampling_rate=RATE, **options)


def test_frames_that_are_not_10_ms_apart_have_no_time_steps():
    with pytest.raises(UserError, match=r"task is 'events': sampling_rate is 22050, of which 10 ms are 220.5 samples"):
        replace(targets([[]]), sampling_rate=22_050)


def clip(seconds: float, row: int = 0, key: int = 0) -> Clip:
    return Clip(np.ones(round(seconds * RATE), np.float32), "clip", "clips", row, 0.0, {}, (key,))


def labels_of(found: EventTargets, shift: float = 0.0, seconds: float = 1.28) -> dict[str, np.ndarray]:
    return found([clip(seconds)], [None], [round(shift * RATE)], [round(seconds * RATE)])


def test_a_target_is_the_fraction_of_a_step_that_an_event_covers():
    found = labels_of(targets([[Event("high", 0.24, 0.48), Event("low", 0.0, 0.04)]]))
    np.testing.assert_allclose(found["labels"][0].T, [[0, 0.5, 1, 0, 0, 0, 0, 0], [0.25, 0, 0, 0, 0, 0, 0, 0]], atol=1e-6)
    np.testing.assert_array_equal(found["clip_labels"], [[1, 1]])


def test_hard_targets_are_those_of_at_least_half_a_step():
    found = labels_of(targets([[Event("high", 0.24, 0.48), Event("low", 0.0, 0.04)]], hard=True))
    np.testing.assert_array_equal(found["labels"][0].T, [[0, 1, 1, 0, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(found["clip_labels"], [[1, 1]])  # the clip has it, however short


def test_events_move_with_the_roll_and_return_at_the_start():
    found = labels_of(targets([[Event("high", 0.96, 1.28)]]), shift=0.16)
    np.testing.assert_allclose(found["labels"][0, :, 0], [1, 0, 0, 0, 0, 0, 0, 1], atol=1e-6)


def test_what_lies_beyond_the_models_input_is_not_a_label_of_the_clip():
    found = labels_of(targets([[Event("high", 0.0, 0.16), Event("low", 1.5, 1.9)]]), seconds=2.0)
    np.testing.assert_array_equal(found["clip_labels"], [[1, 0]])
    rolled = labels_of(targets([[Event("high", 0.0, 0.16), Event("low", 1.5, 1.9)]]), seconds=2.0, shift=0.6)
    np.testing.assert_array_equal(rolled["clip_labels"], [[1, 1]])


def test_an_event_after_the_end_of_its_clip_is_reported_once(caplog):
    found = targets([[Event("high", 1.3, 1.5)], [Event("low", 2.0, 3.0)]])
    for row in (0, 1):
        labels = found([clip(1.28, row)], [None], [0], [round(1.28 * RATE)])
        assert not labels["labels"].any()
    assert [record.message for record in caplog.records] == [
        "clip has an event 'high' from 1.3 s on, but ends at 1.28 s: such events are left out, correct the table or restore the clip "
        "(others are not reported)"
    ]


def test_clips_without_times_have_labels_of_the_clip_alone():
    table = datasets.Dataset.from_dict({"audio": [{"path": "0.wav", "bytes": None}], "label": [["low"]]})
    labels = LabelReader.of(table, "label").read(table.data.column("label").combine_chunks(), "clip {}".format).encode(["high", "low"])
    found = labels_of(EventTargets(labels, 16, 8, RATE))
    assert (found["labels"] == -100).all()
    np.testing.assert_array_equal(found["clip_labels"], [[0, 1]])


def test_a_batch_has_the_labels_of_the_sound_where_the_roll_has_put_it():
    """The roll of each clip is found again in the log-mel: loud frames are those of the event."""
    events = [[Event("high", 0.2 + 0.1 * i, 0.6 + 0.1 * i)] for i in range(6)]
    found = targets(events)
    changes = AugmentationSettings(**{**vars(NO_AUGMENTATION), "roll": True})
    collate = Collate(TableTargets(found.labels), EXTRACTOR, changes, events=found)
    clips = [Clip(scene(one, 1.295, i), "clip", "clips", i, 0.0, {}, (i,)) for i, one in enumerate(events)]
    batch = collate(clips)
    loud = batch["input_values"].amax(2)
    covered = (loud > loud.amax(1, keepdim=True) - 0.5).float().unflatten(1, (8, -1)).mean(2).numpy()
    assert np.abs(covered - batch["labels"][:, :, 0]).max() < 0.25  # two frames at each end of the event
    assert len({tuple(row) for row in batch["labels"][:, :, 0].round(2).tolist()}) == 6
    assert "attention_mask" not in batch  # 128 frames
    assert collate([clips[0]._replace(waveform=clips[0].waveform[:8000])])["attention_mask"].sum() == 48


# --- augmentation


def test_time_masks_hide_the_labels_of_what_they_mask():
    batch = {"input_values": torch.rand(32, 128, 16) + 1, "labels": torch.ones(32, 8, 2)}
    batch["labels"][0, 3] = -100
    changes = AugmentationSettings(**{**vars(NO_AUGMENTATION), "time_mask": 0.5})
    found = augment_batch(batch, changes, np.random.default_rng(0))
    audible = (found["input_values"] != 0).any(2).float().unflatten(1, (8, -1)).mean(2)
    assert 0.6 < audible.mean() < 0.9
    torch.testing.assert_close(found["labels"][1:, :, 1], audible[1:])
    assert (found["labels"][0, 3] == -100).all()


def test_mixup_mixes_steps_clips_and_masks():
    batch = {
        "input_values": torch.tensor([[[1.0]], [[3.0]]]),
        "attention_mask": torch.tensor([[1, 0], [1, 1]]),
        "labels": torch.tensor([[[1.0, -100.0]], [[0.0, 1.0]]]),
        "clip_labels": torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    }
    mixed = mixup(batch, torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))
    assert mixed["input_values"].flatten().tolist() == [1.5, 3.0]
    assert mixed["attention_mask"].tolist() == [[1, 1], [1, 1]]
    assert mixed["labels"].tolist() == [[[0.75, -100.0]], [[0.0, 1.0]]]
    assert mixed["clip_labels"].tolist() == [[0.75, 0.25], [0.0, 1.0]]


# --- mixtures


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Single sounds: four high and four low beeps, each with silence around, and a third class."""
    folder = tmp_path_factory.mktemp("single") / "sounds"
    for i in range(4):
        for label, frequency in (("high", 3000), ("low", 300), ("other", 1000)):
            (folder / "train" / label).mkdir(parents=True, exist_ok=True)
            quiet = np.zeros(RATE // 4)
            samples = np.concatenate([quiet, beep(frequency + 20 * i, 0.3 + 0.05 * i), quiet])
            soundfile.write(folder / "train" / label / f"{i}.wav", samples, RATE)
    return folder


@pytest.fixture(scope="module")
def backgrounds(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("below") / "backgrounds"
    folder.mkdir()
    for i in range(2):
        soundfile.write(folder / f"{i}.wav", 0.1 * np.random.default_rng(i).standard_normal((i + 1) * RATE), RATE)
    return folder


def mixing(sounds: Path, backgrounds: Path, **changes) -> MixingSettings:
    return MixingSettings(
        sounds=[{"kind": "audiofolder", "path": str(sounds)}], backgrounds=[{"kind": "folder", "path": str(backgrounds)}], **changes
    )


def test_mixtures_are_of_any_length_that_the_models_input_holds_and_have_exact_events(sounds, backgrounds):
    make = Mixer(mixing(sounds, backgrounds, num_events=[1], level_db=[-20.0, -20.0], background_db=[-60.0, -60.0]), EXTRACTOR, 0.0)
    lengths = []
    for seed in range(20):
        waveform, [event] = make(np.random.default_rng(seed))
        lengths.append(len(waveform) / RATE)
        power = np.square(waveform[: len(waveform) // 160 * 160].reshape(-1, 160)).mean(1)
        loud = np.flatnonzero(power > 1e-4)
        np.testing.assert_allclose(np.sqrt(power[loud]).max(), 10 ** (-20 / 20), rtol=0.05)
        assert abs(loud[0] / 100 - event.onset) <= 0.01 + 1e-6
        assert abs((loud[-1] + 1) / 100 - event.offset) <= 0.01 + 1e-6
        quiet = np.delete(np.arange(len(power)), np.arange(max(0, loud[0] - 1), loud[-1] + 2))
        np.testing.assert_allclose(10 * np.log10(power[quiet].mean()), -60, atol=1.0)
    assert 1.295 / 2 <= min(lengths) < 0.8  # of 1.295 s, which are 128 frames
    assert 1.1 < max(lengths) <= 1.295


def test_the_range_of_their_lengths_is_a_setting(sounds, backgrounds):
    make = Mixer(mixing(sounds, backgrounds, clip_seconds=[1.0, 1.0]), EXTRACTOR, 0.0)
    assert {len(make(np.random.default_rng(seed))[0]) for seed in range(5)} == {RATE}
    with pytest.raises(UserError, match=r"mixing.clip_seconds is \[1.0, 1.3\], but the model's input holds 1.295 s"):
        Mixer(mixing(sounds, backgrounds, clip_seconds=[1.0, 1.3]), EXTRACTOR, 0.0)


def test_sounds_are_played_at_other_speeds(sounds, backgrounds):
    """A beep of 3,000 Hz and 0.3 s, at 1.25 times its speed and at half of it."""
    only = {"kind": "audiofolder", "path": str(sounds), "keep": {"label": ["high"]}}
    found = set()
    make = Mixer(MixingSettings(sounds=[only], speeds=[1.25, 0.5], num_events=[1], clip_seconds=[1.295, 1.295]), EXTRACTOR, 0.0)
    for seed in range(30):
        waveform, [event] = make(np.random.default_rng(seed))
        spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
        pitch, seconds = spectrum.argmax() / len(waveform) * RATE, event.offset - event.onset
        number = next(i for i in range(4) if min(abs(pitch / (3000 + 20 * i) - speed) for speed in (1.25, 0.5)) < 2e-3)
        speed = pitch / (3000 + 20 * number)
        assert seconds == pytest.approx((0.3 + 0.05 * number) / speed, abs=0.03) or seconds == pytest.approx(1.295 / 2, abs=0.03)
        found.add(round(speed, 2))
    assert found == {1.25, 0.5}


def test_mixtures_follow_from_the_generator_alone(sounds, backgrounds):
    one, other = (Mixer(mixing(sounds, backgrounds), EXTRACTOR, 0.0) for _ in range(2))
    first, second = one(np.random.default_rng(3)), one(np.random.default_rng(4))
    again = other(np.random.default_rng(3))
    np.testing.assert_array_equal(first[0], again[0])
    assert first[1] == again[1]
    assert not np.array_equal(first[0], second[0])


def test_numbers_of_events_are_equally_frequent_and_none_is_a_background(sounds, backgrounds):
    make = Mixer(mixing(sounds, backgrounds, num_events=[0, 2]), EXTRACTOR, 0.0)
    counts = np.bincount([len(make(np.random.default_rng(seed))[1]) for seed in range(200)], minlength=3)
    assert counts[1] == 0
    assert counts[0] == pytest.approx(100, abs=30)


def test_mixtures_replace_a_fraction_of_the_clips_and_other_classes_have_no_label(sounds, backgrounds):
    make = Mixer(mixing(sounds, backgrounds, fraction=0.5, num_events=[2]), EXTRACTOR, 0.0)
    found = targets([[Event("high", 0.0, 1.28), Event("low", 0.0, 1.28)]])
    one, other = (Collate(TableTargets(found.labels), EXTRACTOR, NO_AUGMENTATION, events=events, mixer=make) for events in (found, None))
    clips = [clip(1.295, key=key) for key in range(200)]
    batch = one(clips)
    replaced = (batch["labels"] < 1).any(axis=(1, 2))
    assert replaced.sum() == pytest.approx(100, abs=30)
    labels = batch["clip_labels"][replaced]
    assert {tuple(row) for row in labels.tolist()} == {(0, 0), (0, 1), (1, 0), (1, 1)}  # of two others, of one, of none
    np.testing.assert_array_equal(other(clips)["labels"], batch["clip_labels"])  # the same mixtures, of a classifier
    assert (batch["labels"].max(1) > 0).tolist() == (batch["clip_labels"] > 0).tolist()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fraction": 0.0}, "mixing.fraction is 0"),
        ({"num_events": []}, r"mixing.num_events is \[\]"),
        ({"num_events": [1, 1]}, "mixing.num_events is"),
        ({"clip_seconds": [5.0]}, r"mixing.clip_seconds is \[5.0\]"),
        ({"clip_seconds": [2.0, 1.0]}, r"mixing.clip_seconds is \[2.0, 1.0\]"),
        ({"speeds": [1.0, 3.0]}, r"mixing.speeds is \[1.0, 3.0\]"),
        ({"speeds": []}, r"mixing.speeds is \[\]"),
        ({"sounds": []}, "mixing.sounds is empty"),
        ({"level_db": [-20.0, -30.0]}, "level_db is"),
    ],
)
def test_wrong_rules_of_mixing_are_rejected(sounds, backgrounds, changes, message):
    source = {"sounds": [{"kind": "audiofolder", "path": str(sounds)}], "backgrounds": [{"kind": "folder", "path": str(backgrounds)}]}
    with pytest.raises(UserError, match=message):
        MixingSettings(**{**source, **changes})


def test_more_events_than_sounds_are_rejected_before_training(sounds, backgrounds):
    with pytest.raises(UserError, match="a mixture of 13 events needs as many different sounds"):
        Mixer(mixing(sounds, backgrounds, num_events=[1, 13]), EXTRACTOR, 0.0)


def test_classes_that_sounds_and_task_do_not_have_in_common_are_named(sounds, backgrounds, caplog):
    caplog.set_level("INFO")
    Mixer(mixing(sounds, backgrounds), EXTRACTOR, 0.0, ["High", "low"])
    assert "mixed in without a label, as the task has no such class: high, other" in caplog.text
    assert "no sound to mix has the class High, so that it is learnt to be absent" in caplog.text
    caplog.clear()
    Mixer(mixing(sounds, backgrounds, fraction=0.5), EXTRACTOR, 0.0, ["high", "low", "other", "rare"])
    assert not caplog.records


@pytest.mark.parametrize("name", ["sounds", "backgrounds"])
def test_clips_that_are_evaluated_are_not_mixed_into_training(settings, sounds, backgrounds, tmp_path, name):
    folder = tmp_path / name
    shutil.copytree({"sounds": sounds, "backgrounds": backgrounds}[name], folder)
    mixed = replace(settings, mixing=mixing(**{"sounds": sounds, "backgrounds": backgrounds, name: folder}))
    select_rows(mixed)
    clip = next(folder.rglob("*.wav"))
    clip.unlink()
    clip.hardlink_to(Path(settings.data_dir) / "test" / "003.wav")
    with pytest.raises(UserError, match=f"003.wav, which is .*{clip.name}, is both in mixing.{name} and in the test part"):
        select_rows(mixed)


# --- the program


def test_a_detector_learns_when_sounds_begin_and_end(settings):
    results = fine_tune(settings)
    assert results["metrics"]["segment_f1"] > 0.8
    model = AutoModelForAudioFrameClassification.from_pretrained(settings.output_dir)
    assert model.config.class_names == ["high", "low"]
    events = [Event("high", 0.3, 0.7)]
    found = model.detect(scene(events, 1.28, 7), SSLAMFeatureExtractor.from_pretrained(settings.output_dir))
    assert [event.label for event in found] == ["high"]
    assert abs(found[0].start - 0.3) < 0.17
    assert abs(found[0].end - 0.7) < 0.17
    saved = json.loads((Path(settings.output_dir) / "results.json").read_text())
    assert saved["metrics"]["segment_f1"] == results["metrics"]["segment_f1"]
    assert set(saved["per_class"]) == {"high", "low"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "classification", "hard_labels": True}, "hard_labels is set, but task is 'classification'"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, but task is 'events'"),
        ({"model_config": {**TINY, "patch_drop_rate": 0.5}}, "model_config.patch_drop_rate is set"),
        ({"loss": "cross_entropy"}, "loss is 'cross_entropy'"),
        ({"streaming": True, "max_steps": 3}, "streaming is true"),
    ],
)
def test_settings_that_do_not_fit_the_task_are_rejected(scenes, changes, message):
    with pytest.raises(UserError, match=message):
        FineTuningSettings(**{"data_dir": str(scenes), "task": "events", "label_column": "events", "model_config": TINY, **changes})


def mixed_settings(settings: FineTuningSettings, sounds: Path, backgrounds: Path, output: Path, **changes) -> FineTuningSettings:
    return replace(
        settings,
        output_dir=str(output),
        mixing=mixing(sounds, backgrounds, fraction=0.75, num_events=[0, 1, 2]),
        augmentation=AugmentationSettings(mixup_probability=0.5),
        max_steps=8,
        save_steps=3,
        **changes,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_mixtures_resumes_bit_for_bit(settings, sounds, backgrounds, tmp_path, monkeypatch, workers):
    whole, broken = (
        mixed_settings(settings, sounds, backgrounds, tmp_path / name, dataloader_num_workers=workers) for name in ("whole", "broken")
    )
    expected = fine_tune(whole)
    original = stream_trainer._RunState.on_step_end

    def end_behind_the_fifth(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stream_trainer._RunState, "on_step_end", end_behind_the_fifth)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(broken)
    found = fine_tune(broken)
    assert found["resumed"]
    assert found["training_loss"] == expected["training_loss"]
    assert found["metrics"] == expected["metrics"]
    one, other = (load_file(Path(run.output_dir) / "model.safetensors") for run in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_mixtures_are_others_in_each_epoch(settings, sounds, backgrounds, tmp_path, monkeypatch):
    seen: list[bytes] = []
    make = Mixer.__call__

    def record(self, generator):
        waveform, events = make(self, generator)
        seen.append(waveform.tobytes())
        return waveform, events

    monkeypatch.setattr(Mixer, "__call__", record)
    run = mixed_settings(settings, sounds, backgrounds, tmp_path / "run", do_eval=False)
    fine_tune(replace(run, max_steps=12))  # two epochs of six batches of eight
    assert len(seen) == pytest.approx(72, abs=20)
    assert len(set(seen)) == len(seen)


def test_changed_sounds_are_another_run(settings, sounds, backgrounds, tmp_path):
    own = tmp_path / "sounds"
    shutil.copytree(sounds, own)
    run = mixed_settings(settings, own, backgrounds, tmp_path / "run", do_eval=False)
    assert fine_tune_once(run)["steps"] == 8
    assert fine_tune_once(run)["steps"] == 8  # the same run, finished
    soundfile.write(own / "train" / "high" / "0.wav", beep(500, 0.5), RATE)
    with pytest.raises(UserError, match="of a run with other data"):
        fine_tune_once(run)


def test_a_classifier_is_trained_on_mixtures_too(settings, sounds, backgrounds, tmp_path):
    run = mixed_settings(settings, sounds, backgrounds, tmp_path / "tagger", task="classification")
    results = fine_tune(run)
    assert "mean_average_precision" in results["metrics"]
    assert AutoModelForAudioClassification.from_pretrained(run.output_dir).config.problem_type == "multi_label_classification"


def test_mixtures_need_a_task_of_several_labels(settings, sounds, backgrounds, tmp_path):
    run = mixed_settings(settings, sounds, backgrounds, tmp_path / "run", do_eval=False)
    with pytest.raises(UserError, match="gives a clip one label, and a mixture has several"):
        fine_tune(replace(run, task="classification", data_dir=str(sounds), label_column="label"))


def test_weak_labels_train_and_are_evaluated_by_clips(settings, scenes, tmp_path):
    folder = tmp_path / "weak"
    shutil.copytree(scenes, folder)
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (folder / split / "metadata.jsonl").read_text().splitlines()]
        for row in rows:
            row["events"] = [{"label": event["label"], "onset": None, "offset": None} for event in row["events"]]
        rows.append({**rows[0], "events": [{"label": "low", "onset": 0.0, "offset": 0.1}]})  # so that the column has a type
        shutil.copy(folder / split / rows[0]["file_name"], folder / split / "typed.wav")
        rows[-1]["file_name"] = "typed.wav"
        (folder / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    results = fine_tune(replace(settings, data_dir=str(folder), output_dir=str(tmp_path / "run"), num_train_epochs=2))
    assert "segment_f1" not in results["metrics"]
    assert 0 < results["metrics"]["mean_average_precision"] <= 1
    assert all(np.isfinite(results["training_loss"]))


def test_a_validation_part_of_events_is_measured_by_steps(settings, tmp_path):
    run = replace(settings, validation_split="test", do_eval=False, num_train_epochs=2, output_dir=str(tmp_path / "run"))
    history = fine_tune(run)["validation"]
    assert len(history) == 2
    assert all(0 < entry["eval_mean_average_precision"] <= 1 for entry in history)


def test_a_validation_part_without_half_a_step_of_an_event_is_one_clear_error(settings, tmp_path):
    folder = shutil.copytree(settings.data_dir, tmp_path / "short")
    lines = [{"file_name": f"{i:03}.wav", "events": [{"label": "high", "onset": 0.2, "offset": 0.22}]} for i in range(24)]
    (folder / "test" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        UserError, match=r"no event of the evaluation covers half of a time step, 0\.16 s.*: set model_config.steps_per_second"
    ):
        fine_tune(
            replace(settings, data_dir=str(folder), validation_split="test", do_eval=False, eval_strategy="epoch", num_train_epochs=1)
        )


def test_seeds_of_a_detector_are_summarized(settings, tmp_path):
    run = replace(settings, seeds=[0, 1], num_train_epochs=1, output_dir=str(tmp_path / "seeds"))
    summary = repeat_fine_tuning(run)
    values = summary["metrics"]["segment_f1"]["runs"]
    assert summary["metrics"]["segment_f1"]["mean"] == pytest.approx(np.mean(list(values.values())))
    assert summary["per_class"]["high"]["events"] > 0
    assert "segment_f1" in format_runs(summary)


def test_folds_that_would_have_other_metrics_are_rejected_before_the_first_run(settings, tmp_path):
    data = tmp_path / "folds"
    data.mkdir()
    rows = []
    for fold, onset, offset in (("a", 0.1, 0.5), ("b", 0.1, 0.5), ("weak", None, None)):
        for label in ("high", "low"):
            name = f"{fold}-{label}.wav"
            soundfile.write(data / name, scene([Event(label, 0.1, 0.5)], 1.28, 0), RATE)
            rows.append({"file_name": name, "fold": fold, "events": [{"label": label, "onset": onset, "offset": offset}]})
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"data_dir": str(data), "fold_column": "fold", "cross_validate": True, "max_steps": 1}
    run = replace(settings, output_dir=str(tmp_path / "run"), **changes)
    with pytest.raises(UserError, match="in fold weak clips have events without times, and in another fold none have"):
        repeat_fine_tuning(run)
    assert not (tmp_path / "run").exists()
    assert set(repeat_fine_tuning(replace(run, test_folds=["a", "b"]))["metrics"]["psds1"]["runs"]) == {"fold-a", "fold-b"}


def test_a_detector_is_tested_and_saved_with_the_average_of_its_weights(settings, tmp_path):
    short = replace(settings, max_steps=4)
    plain = fine_tune(replace(short, output_dir=str(tmp_path / "plain")))
    results = fine_tune(replace(short, output_dir=str(tmp_path / "averaged"), ema_decay=0.9))
    assert results["training_loss"] == plain["training_loss"]
    model, extractor = (
        kind.from_pretrained(tmp_path / "averaged") for kind in (AutoModelForAudioFrameClassification, SSLAMFeatureExtractor)
    )
    scored, last = (ScoredEvents.load(tmp_path / name / "scores.npz") for name in ("averaged", "plain"))
    name = next(iter(scored.scores))
    np.testing.assert_allclose(model.score_steps(load_waveform(name), extractor).scores, scored.scores[name], atol=1e-5)
    assert np.abs(scored.scores[name] - last.scores[name]).max() > 1e-4
