"""Fine-tuning: the real program on made-up sounds, what it saves, and how it refuses what cannot work."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import noise
from safetensors.torch import load_file, save_file
from transformers import pipeline

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from transformers_sslam.data.decoding import load_waveform
from transformers_sslam.data.labelled import DatasetError, LabelledRows, Waveforms
from transformers_sslam.training.augmentation import AugmentationSettings, augment_waveform
from transformers_sslam.training.fine_tuning import (
    ClipDataset,
    FineTuningSettings,
    LabelledClips,
    build_extractor,
    build_model,
    fine_tune,
)
from transformers_sslam.training.settings import SettingsError


SCRIPT = Path(__file__).parents[1] / "scripts" / "finetune.py"
RATE = 16_000
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 64}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def sound(label: str, seed: int) -> np.ndarray:
    """0.6 s of hum or hiss, or of both (`hum;hiss`), at a random level."""
    time = np.arange(int(0.6 * RATE)) / RATE
    generator = np.random.default_rng(seed)
    parts = {
        "hum": np.sin(2 * np.pi * generator.uniform(100, 300) * time),
        "hiss": generator.standard_normal(len(time)) / 3,
    }
    return generator.uniform(0.1, 0.3) * sum((parts[name] for name in label.split(";") if name in parts), 0 * time)


def write_folder(folder: Path, rows: list[tuple[str, int]], columns: str = "label,fold") -> Path:
    """An audiofolder of one clip for each (label, fold), with its metadata.csv."""
    folder.mkdir()
    lines = [f"file_name,{columns}"]
    for i, (label, fold) in enumerate(rows):
        soundfile.write(folder / f"{i:03}.wav", sound(label, seed=i), RATE)
        lines.append(f"{i:03}.wav,{label},{fold}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six clips of two classes in each of two folds."""
    return write_folder(tmp_path / "clips", [(label, fold) for fold in (1, 2) for label in ("hum", "hiss") * 3])


@pytest.fixture
def settings(folder, tmp_path) -> FineTuningSettings:
    return FineTuningSettings(
        data_dir=str(folder),
        output_dir=str(tmp_path / "model"),
        fold_column="fold",
        train_folds=[1],
        eval_folds=[2],
        max_length=64,
        model_config=TINY,
        batch_size=4,
        trainer={"max_steps": 2, "disable_tqdm": True},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """What the program leaves after eight epochs over train/ with class folders, one file of which is no audio."""
    root = tmp_path_factory.mktemp("finished")
    for split, clips in (("train", 16), ("test", 5)):
        for offset, label in enumerate(("hiss", "hum")):
            (root / "clips" / split / label).mkdir(parents=True)
            for i in range(clips):
                soundfile.write(root / "clips" / split / label / f"{i}.wav", sound(label, seed=100 * clips + 2 * i + offset), RATE)
    (root / "clips" / "train" / "hum" / "broken.wav").write_bytes(b"RIFF and nothing more")
    recipe = {"model_config": TINY, "max_length": 64, "normalization": "computed", "epochs": 8, "batch_size": 8, "learning_rate": 2e-3}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    overrides = [f"data_dir={root / 'clips'}", f"output_dir={root / 'model'}", "max_unreadable=0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    command = [sys.executable, SCRIPT, root / "recipe.yaml", *overrides]
    return root / "model", subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_program_learns_and_reports(finished):
    output, process = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((output / "results.json").read_text())
    assert len(results["training_loss"]) == 8
    assert results["training_loss"][-1] < 0.7 * results["training_loss"][0]
    assert results["metrics"]["accuracy"] == 1.0
    assert f"accuracy: {results['metrics']['accuracy']:.4f}" in process.stdout
    assert results["clips"] == {"training": 32, "evaluation": 10}
    assert results["classes"] == ["hiss", "hum"]
    assert results["steps"] == 32
    assert results["seconds"]["total"] >= results["seconds"]["training"] > 0


def test_an_unreadable_file_is_left_out_by_name(finished):
    output, process = finished
    unreadable = json.loads((output / "results.json").read_text())["unreadable"]
    assert [Path(name).name for name in unreadable["training"].pop("unreadable")] == ["broken.wav"]
    assert unreadable == {"training": {}, "evaluation": {}}
    assert "1 of 33 training clips are left out (unreadable)" in process.stderr


def test_the_saved_folder_classifies_through_a_pipeline(finished):
    output, _ = finished
    classify = pipeline("audio-classification", model=str(output))
    for label in ("hum", "hiss"):
        best = classify(sound(label, seed=9999).astype(np.float32))[0]
        assert best["label"] == label
        assert best["score"] > 0.6


def test_the_saved_folder_holds_settings_card_and_code(finished):
    output, _ = finished
    settings = yaml.safe_load((output / "settings.yaml").read_text())
    assert set(settings) == set(FineTuningSettings.__dataclass_fields__)
    assert (settings["learning_rate"], settings["min_learning_rate"]) == (2e-3, 1e-6)
    assert "trained from scratch on 32 clips" in (output / "README.md").read_text()
    assert (output / "modeling_sslam.py").is_file()


def test_computed_statistics_are_the_training_clips_and_padding_follows(finished):
    output, _ = finished
    extractor = SSLAMFeatureExtractor.from_pretrained(output)
    clips = [load_waveform(path) for path in sorted((output.parent / "clips" / "train").glob("*/[0-9]*.wav"))]
    assert len(clips) == 32
    assert (extractor.mean, extractor.std) == pytest.approx(SSLAMFeatureExtractor().compute_normalization(clips), abs=1e-6)
    padding = SSLAMConfig.from_pretrained(output).padding_value
    assert padding == pytest.approx(-extractor.mean / (2 * extractor.std), abs=1e-12)
    assert extractor(noise(0.3), sampling_rate=RATE, return_tensors="pt").input_values[0, -1, 0].item() == pytest.approx(padding, abs=1e-6)


def test_an_output_folder_is_not_replaced_unasked(finished, settings):
    output, _ = finished
    with pytest.raises(SettingsError, match="holds a model already"):
        fine_tune(replace(settings, output_dir=str(output)))


def test_same_seed_same_weights(settings, tmp_path):
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fine_tune(replace(settings, output_dir=str(tmp_path / name), seed=seed))
        weights[name] = load_file(tmp_path / name / "model.safetensors")["classifier.weight"]
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])


def test_folds_choose_rows_whatever_their_type(settings):
    assert fine_tune(replace(settings, train_folds=["1"]))["clips"] == {"training": 6, "evaluation": 6}


def test_several_labels_a_clip_give_average_precision(settings, tmp_path):
    rows = [(label, fold) for fold in (1, 2) for label in ("hum", "hiss", "hum; hiss", "")]
    folder = write_folder(tmp_path / "tags", [*rows, ("drum", 1)])
    results = fine_tune(replace(settings, data_dir=str(folder), label_separator=";"))
    assert results["classes"] == ["drum", "hiss", "hum"]
    assert results["clips"] == {"training": 5, "evaluation": 4}
    assert results["metrics"]["classes_without_positives"] == ["drum"]
    assert set(results["metrics"]["average_precision"]) == {"hiss", "hum"}
    config = SSLAMConfig.from_pretrained(settings.output_dir)
    assert config.problem_type == "multi_label_classification"


def test_label_smoothing_of_several_labels_is_refused(settings):
    with pytest.raises(SettingsError, match="label_smoothing_factor is set, but Trainer smooths single labels only"):
        fine_tune(replace(settings, label_separator=";", trainer={"label_smoothing_factor": 0.1}))


def test_lists_of_labels_are_several_labels_too(settings, tmp_path):
    folder = write_folder(tmp_path / "tags", [("hum", 1)] * 4)
    (folder / "metadata.csv").unlink()
    rows = [(["hum"], 1), (["hum", "hiss"], 1), (["hiss"], 2), ([], 2)]
    lines = (json.dumps({"file_name": f"{i:03}.wav", "tags": tags, "fold": fold}) for i, (tags, fold) in enumerate(rows))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    metrics = fine_tune(replace(settings, data_dir=str(folder), label_column="tags"))["metrics"]
    assert metrics["classes_without_positives"] == ["hum"]
    assert metrics["average_precision"]["hiss"] in (0.5, 1.0)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A pre-trained encoder with the feature extractor of other data."""
    path = tmp_path / "checkpoint"
    SSLAMModel(SSLAMConfig(**TINY)).save_pretrained(path)
    SSLAMFeatureExtractor.from_preset("speech_commands").save_pretrained(path)
    return path


def test_a_checkpoint_gives_encoder_and_feature_extractor(settings, checkpoint):
    settings = replace(settings, model=str(checkpoint), model_config={"drop_path_rate": 0.1}, max_length=None)
    extractor = build_extractor(settings)
    model = build_model(settings, extractor, ["a", "b", "c"], multi_label=False)
    assert (extractor.mean, extractor.std, extractor.max_length) == (-6.846, 5.565, 128)
    assert model.config.padding_value == pytest.approx(6.846 / (2 * 5.565), abs=1e-12)
    assert model.config.drop_path_rate == 0.1
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    for name, weight in SSLAMModel.from_pretrained(checkpoint).state_dict().items():
        assert torch.equal(model.sslam.state_dict()[name], weight), name


def test_a_classifier_of_other_classes_gives_its_encoder(settings, tmp_path):
    first = SSLAMForAudioClassification(SSLAMConfig(**TINY, num_labels=7))
    first.save_pretrained(tmp_path / "first")
    SSLAMFeatureExtractor().save_pretrained(tmp_path / "first")
    settings = replace(settings, model=str(tmp_path / "first"), model_config={})
    second = build_model(settings, build_extractor(settings), ["a", "b"], multi_label=False)
    assert second.classifier.weight.shape == (2, 32)
    assert torch.equal(second.sslam.layers[1].mlp.fc1.weight, first.sslam.layers[1].mlp.fc1.weight)


@pytest.mark.parametrize(("name", "value"), [("intermediate_size", 128), ("num_attention_heads", 1), ("num_hidden_layers", 1)])
def test_sizes_that_contradict_a_checkpoint_are_refused(settings, checkpoint, name, value):
    """Other heads or fewer layers would load without a word, as another network."""
    settings = replace(settings, model=str(checkpoint), model_config={name: value})
    with pytest.raises(SettingsError, match=rf"model_config\.{name} is {value}, but .*leave the sizes out"):
        build_model(settings, build_extractor(settings), ["a", "b"], multi_label=False)


def test_a_checkpoint_that_lacks_a_part_of_the_encoder_is_refused(settings, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["layers.1.mlp.fc1.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    settings = replace(settings, model=str(checkpoint), model_config={})
    with pytest.raises(SettingsError, match="does not fill the encoder"):
        build_model(settings, build_extractor(settings), ["a", "b"], multi_label=False)


@pytest.mark.parametrize(
    ("normalization", "expected"), [("model", (-4.268, 4.569)), ("esc50", (-6.627, 5.359)), ([-5.0, 4.0], (-5.0, 4.0))]
)
def test_statistics_can_be_preset_or_given(settings, normalization, expected):
    extractor = build_extractor(replace(settings, normalization=normalization))
    assert (extractor.mean, extractor.std, extractor.max_length) == (*expected, 64)


def labelled_noise(augmentation=None, seed=0) -> ClipDataset:
    rows = LabelledRows([{"path": "a"}, {"path": "b"}], [["x"], ["y"]], multi_label=False, declared_classes=None)
    waveforms = [noise(0.6, seed=i) for i in range(2)]
    return ClipDataset(LabelledClips(rows, waveforms), ["x", "y"], SSLAMFeatureExtractor(max_length=64), augmentation, seed)


def test_augmentation_depends_on_seed_epoch_and_row_alone():
    one, other = labelled_noise(AugmentationSettings()), labelled_noise(AugmentationSettings())
    one[0]  # an order of its own
    assert torch.equal(one[1]["input_values"], other[1]["input_values"])
    before = other[1]["input_values"]
    other.epoch.fill_(1)
    assert not torch.equal(other[1]["input_values"], before)
    assert not torch.equal(labelled_noise(AugmentationSettings(), seed=1)[1]["input_values"], before)


def test_each_clip_is_augmented_once_an_epoch_with_a_seed_of_its_own(settings, monkeypatch):
    seeds = []

    def record(waveform, settings, generator):
        seeds.append(tuple(generator.bit_generator.seed_seq.entropy))
        return waveform

    monkeypatch.setattr("transformers_sslam.training.fine_tuning.augment_waveform", record)
    fine_tune(replace(settings, epochs=3.0, seed=5, trainer={"disable_tqdm": True}))
    assert sorted(seeds) == [(5, epoch, row) for epoch in range(3) for row in range(6)]


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
    expected = dataset.extractor(noise(0.6, seed=1), sampling_rate=RATE, return_tensors="pt").input_values[0]
    assert torch.equal(dataset[1]["input_values"], expected)
    assert dataset[1]["labels"] == 1


def test_roll_keeps_every_sample_and_gain_stays_near_one():
    clip = noise(0.1)
    rolled = augment_waveform(clip, AugmentationSettings(roll=True, gain=0), np.random.default_rng(3))
    shift = int(np.flatnonzero(rolled == clip[0])[0])
    assert shift > 0
    np.testing.assert_array_equal(np.roll(clip, shift), rolled)
    generator = np.random.default_rng(0)
    gains = [augment_waveform(clip, AugmentationSettings(roll=False), generator)[5] / clip[5] for _ in range(2000)]
    assert np.mean(gains) == pytest.approx(1, abs=0.01)
    assert np.std(gains) == pytest.approx((1 / 84) ** 0.5, abs=0.005)  # Beta(10, 10) has variance 1 / (4 * 21)


def test_waveforms_stay_with_their_rows_when_a_file_is_left_out(folder):
    sources = [{"path": str(path), "bytes": None} for path in sorted(folder.glob("*.wav"))]
    expected = [load_waveform(source) for source in sources]
    (folder / "001.wav").unlink()
    waveforms = Waveforms(sources, RATE)
    assert waveforms.kept == [0, *range(2, 12)]
    assert waveforms.unreadable == {"missing": [str(folder / "001.wav")]}
    for i, row in enumerate(waveforms.kept):
        np.testing.assert_array_equal(waveforms[i], expected[row])


def test_clips_beyond_the_memory_limit_are_decoded_again(folder):
    sources = [{"path": str(path), "bytes": None} for path in sorted(folder.glob("*.wav"))]
    one_clip = 0.6 * RATE * 4 / 1e9
    kept, decoded_again = Waveforms(sources, RATE), Waveforms(sources, RATE, memory_gb=1.5 * one_clip)
    np.testing.assert_array_equal(decoded_again[3], kept[3])
    (folder / "003.wav").unlink()
    assert len(kept[3]) == len(decoded_again[0]) == 0.6 * RATE  # in memory
    with pytest.raises(ValueError, match=r"003.wav is not there"):
        decoded_again[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "nowhere"}, "data_dir is nowhere, but there is no such folder"),
        ({"fold_column": "part"}, "there is no column 'part', only audio, label, fold"),
        ({"train_folds": []}, "no fold of the column 'fold' was chosen, so there is no clip: give some of 1, 2"),
        ({"eval_folds": [2, 7]}, "the column 'fold' has no fold 7, only 1, 2"),
        ({"fold_column": None, "train_folds": [], "eval_folds": []}, "there is no split 'test', only train"),
        ({"label_column": "class"}, "there is no column 'class', only audio, label, fold"),
    ],
)
def test_rows_that_cannot_be_chosen_are_an_error(settings, changes, message):
    with pytest.raises(DatasetError, match=message):
        fine_tune(replace(settings, **changes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("hum", 1), ("hiss", 1), ("drum", 2)], "002.wav is labelled 'drum', which is none of the 2 classes: hiss, hum"),
        ([("hum", 1), ("hum", 1), ("hum", 2)], r"the training clips have 1 class \(hum\), but there must be two"),
        ([("hum", 1), ("", 1), ("hum", 2)], "001.wav has no label in the column 'label'"),
    ],
)
def test_labels_that_cannot_be_learnt_are_an_error(settings, tmp_path, rows, message):
    folder = write_folder(tmp_path / "rows", rows)
    with pytest.raises(DatasetError, match=message):
        fine_tune(replace(settings, data_dir=str(folder)))


def test_a_declared_class_without_training_clip_is_an_error(settings, tmp_path):
    for path in ("train/hum", "train/hiss", "test/drum"):
        (tmp_path / "splits" / path).mkdir(parents=True)
        soundfile.write(tmp_path / "splits" / path / "0.wav", sound("hum", 0), RATE)
    splits = {"fold_column": None, "train_folds": [], "eval_folds": []}
    with pytest.raises(DatasetError, match="no training clip has the class drum"):
        fine_tune(replace(settings, data_dir=str(tmp_path / "splits"), **splits))


def test_a_folder_without_audio_is_an_error(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty cannot be read as an audio folder"):
        fine_tune(replace(settings, data_dir=str(tmp_path / "empty")))
    (tmp_path / "empty" / "metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DatasetError, match="empty"):
        fine_tune(replace(settings, data_dir=str(tmp_path / "empty")))


def test_too_many_unusable_files_stop_the_run_and_are_counted_by_cause(settings, folder):
    (folder / "000.wav").unlink()
    (folder / "001.wav").write_bytes(b"no audio")
    soundfile.write(folder / "002.wav", noise(0.02), RATE)
    soundfile.write(folder / "003.wav", 1000 * noise(0.6), RATE, subtype="FLOAT")
    counts = r"4 of 6 training clips cannot be used \(1 missing, 1 unreadable, 1 too short, 1 out of scale\), .* allowed: .*000.wav"
    with pytest.raises(DatasetError, match=counts):
        fine_tune(replace(settings, max_unreadable=0.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": {"hiden_size": 64}}, "no setting model_config.hiden_size: did you mean model_config.hidden_size"),
        ({"model_config": {"hidden_size": 30}}, "hidden_size is 30"),
        ({"trainer": {"max_step": 1}}, "no setting trainer.max_step: did you mean trainer.max_steps"),
        ({"trainer": {"learning_rate": 1.0}}, "trainer.learning_rate cannot be set there"),
        ({"trainer": {"num_train_epochs": 1.0}}, "trainer.num_train_epochs cannot be set there"),
        ({"normalization": "esc5"}, "normalization is 'esc5', but one of model, computed, audioset"),
        ({"normalization": [1.0]}, r"normalization is \[1.0\], but a list must be \[mean, std\]"),
        ({"normalization": [1.0, 0.0]}, "std is 0.0"),
        ({"max_length": 100}, "max_length is 100 frames, but must be a positive multiple of 16"),
        ({"fold_column": None}, "fold_column, which they choose from, is not"),
        ({"eval_folds": ["1"]}, "fold 1 is both in train_folds and in eval_folds"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_unreadable": 2.0}, "max_unreadable is 2"),
        ({"warmup_share": 1.0}, "warmup_share is 1"),
        ({"model": "nowhere"}, "nowhere"),
    ],
)
def test_settings_that_contradict_are_an_error(settings, changes, message):
    with pytest.raises(SettingsError, match=message):
        fine_tune(replace(settings, **changes))


def test_a_negative_gain_is_an_error():
    with pytest.raises(SettingsError, match="augmentation.gain is -1"):
        AugmentationSettings(gain=-1.0)


def test_the_program_prints_an_error_without_traceback(tmp_path):
    process = subprocess.run([sys.executable, SCRIPT, f"data_dir={tmp_path / 'nowhere'}"], capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1] == f"error: data_dir is {tmp_path / 'nowhere'}, but there is no such folder"
    assert "Traceback" not in process.stderr


@pytest.mark.slow
def test_the_demonstration_recognises_a_sound_in_a_fresh_process(tmp_path):
    command = [sys.executable, SCRIPT.with_name("demo.py"), tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "model" / "results.json").read_text())["metrics"]["accuracy"] > 0.9
    assert "is really: pluck. The model says:\n  pluck " in process.stdout
