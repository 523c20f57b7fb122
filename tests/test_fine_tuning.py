"""Fine-tuning: the real program on made-up sounds, what it saves, and how it refuses what cannot work."""

import json
import logging
import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import FIXTURES, noise
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled
from processes import Fork
from safetensors.torch import load_file, save_file
from transformers import pipeline

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from transformers_sslam.attention_sslam import CPU_HALF_PRECISION_ATTENTION
from transformers_sslam.audio.decode import load_waveform
from transformers_sslam.errors import UserError
from transformers_sslam.files import read_json
from transformers_sslam.finetuning import training
from transformers_sslam.finetuning.model import build_extractor, build_model
from transformers_sslam.finetuning.run import run
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.training import describe_results, fine_tune, reported_results
from transformers_sslam.publishing.conversion import convert_checkpoint
from transformers_sslam.settings import read_settings


pytestmark = pytest.mark.usefixtures("without_drawing")
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
        test_folds=[2],
        max_length=64,
        model_config=TINY,
        per_device_train_batch_size=4,
        max_steps=2,
        disable_tqdm=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, SimpleNamespace]:
    """What the program leaves after eight epochs over train/ with class folders, one file of which is no audio."""
    root = tmp_path_factory.mktemp("finished")
    for split, clips in (("train", 16), ("test", 5)):
        for offset, label in enumerate(("hiss", "hum")):
            (root / "clips" / split / label).mkdir(parents=True)
            for i in range(clips):
                soundfile.write(root / "clips" / split / label / f"{i}.wav", sound(label, seed=100 * clips + 2 * i + offset), RATE)
    (root / "clips" / "train" / "hum" / "broken.wav").write_bytes(b"RIFF and nothing more")
    recipe = {
        **{"model_config": TINY, "max_length": 64, "normalization": "computed"},
        **{"num_train_epochs": 8, "per_device_train_batch_size": 8, "learning_rate": 2e-3, "augmentation": {"mixup_alpha": 0.0}},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--data_dir", root / "clips", "--output_dir", root / "model", "--max_unreadable", "0.1"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(root / "cache")}
    out, err = root / "out", root / "err"
    code = Fork([SCRIPT, "--config", root / "recipe.yaml", *flags], out, environment, errors=err).wait()
    return root / "model", SimpleNamespace(returncode=code, stdout=out.read_text(), stderr=err.read_text())


def test_the_program_learns_and_reports(finished):
    output, process = finished
    assert process.returncode == 0, process.stderr
    results = json.loads((output / "results.json").read_text())
    assert len(results["training_loss"]) == 8
    assert results["training_loss"][-1] < 0.7 * results["training_loss"][0]
    assert results["metrics"]["accuracy"] == 1.0
    assert "| accuracy [95 % over clips] | loss |" in process.stdout
    assert "| 1.0000 [0.7225, 1.0000] | " in process.stdout  # Wilson's interval of 10 of 10
    assert results["clips"] == {"training": 32, "test": 10}
    assert results["classes"] == ["hiss", "hum"]
    assert results["steps"] == 32
    assert results["seconds"]["total"] >= results["seconds"]["training"] > 0


def test_the_program_shows_progress_as_a_table(finished):
    """No bar where the output is a file, but the time left. The learning rate is the head's."""
    _, process = finished
    lines = process.stdout.splitlines()
    titles = next(i for i, line in enumerate(lines) if "training loss" in line)
    assert lines[titles].split() == ["epoch", "step", "training", "loss", "learning", "rate", "time", "left"]
    rows = [line.split() for line in lines[titles + 1 : titles + 9]]
    assert [row[:2] for row in rows] == [[f"{epoch}/8", f"{4 * epoch}/32"] for epoch in range(1, 9)]
    assert rows[0][3] == "1.50e-03"  # the fourth of 4 steps of warm-up, which begins at 0
    assert rows[-1][4] == "00:00"
    assert "step/s" not in process.stdout + process.stderr
    assert "a classifier of 2 classes, from random weights, on cpu: 33 training clips, 10 test clips" in process.stderr


def test_each_class_has_its_results_and_errors_are_drawn(finished):
    output, process = finished
    results = json.loads((output / "results.json").read_text())
    assert results["confusion_matrix"] == [[5, 0], [0, 5]]
    assert results["per_class"]["hum"]["clips"] == 5
    assert results["per_class"]["hum"]["recall_interval"] == pytest.approx([0.5655, 1.0], abs=1e-4)
    assert "| hum | 5 | 1.00 [0.57, 1.00] | 1.00 [0.57, 1.00] |" in process.stdout
    assert f"confusion matrix: {output / 'confusion_matrix.png'}" in process.stdout
    assert (output / "confusion_matrix.png").stat().st_size > 5000


def test_the_card_names_data_results_and_that_there_is_no_licence(finished):
    output, _ = finished
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.base_model, card.data.datasets) == (None, None, ["clips"])
    (result,) = card.data.eval_results
    assert (result.dataset_name, result.dataset_type, result.dataset_split) == ("clips", "audiofolder", "test")
    assert (result.metric_type, result.metric_value) == ("accuracy", 1.0)
    assert result.metric_name == "accuracy, 95 % interval [0.7225, 1] (one run, 10 clips)"
    assert "## Licence\n\nNo licence was chosen for these weights." in card.text


def test_an_interval_that_is_undefined_does_not_cost_the_card(settings):
    results = {"clips": {"test": 1}, "metrics": {"mean_average_precision": 0.5, "mean_average_precision_interval": [np.nan, np.nan]}}
    (reported,) = reported_results(settings, results)
    assert (reported.metric_value, reported.interval, reported.note) == (0.5, None, "one run, 1 clips")
    assert reported_results(settings, {"metrics": {}}) == []


def test_an_unreadable_file_is_left_out_by_name(finished):
    output, process = finished
    unreadable = json.loads((output / "results.json").read_text())["unreadable"]
    assert [Path(name).name for name in unreadable["training"].pop("unreadable")] == ["broken.wav"]
    assert unreadable == {"training": {}, "test": {}}
    assert process.stderr.count("left out: 1 unreadable. The first 1 that cannot be used:") == 1  # not again in each epoch
    assert "1 files could not be read and were left out" in (output / "README.md").read_text()


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
    assert {"data_dir", "augmentation", "model_config", "seed", "weight_decay", "adam_beta2"} <= settings.keys()
    assert not settings.keys() & {"hub_token", "use_cpu", "dataloader_pin_memory", "disable_tqdm", "report_to", "local_rank", "adam_beta1"}
    assert read_settings(FineTuningSettings, output / "settings.yaml").to_save() == settings
    assert (settings["learning_rate"], settings["lr_scheduler_kwargs"]) == (2e-3, {"min_lr": 1e-6})
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
    with pytest.raises(UserError, match="holds a model already"):
        fine_tune(replace(settings, output_dir=str(output)))


def test_same_seed_same_weights(settings, tmp_path):
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fine_tune(replace(settings, output_dir=str(tmp_path / name), seed=seed))
        weights[name] = load_file(tmp_path / name / "model.safetensors")["classifier.weight"]
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.equal(weights["a"], weights["c"])


def test_folds_choose_rows_whatever_their_type(settings):
    assert fine_tune(replace(settings, train_folds=["1"]))["clips"] == {"training": 6, "test": 6}


def test_several_labels_a_clip_give_average_precision(settings, tmp_path):
    rows = [(label, fold) for fold in (1, 2) for label in ("hum", "hiss", "hum; hiss", "")]
    folder = write_folder(tmp_path / "tags", [*rows, ("drum", 1)])
    results = fine_tune(replace(settings, data_dir=str(folder), label_separator=";"))
    assert results["classes"] == ["drum", "hiss", "hum"]
    assert results["clips"] == {"training": 5, "test": 4}
    assert results["metrics"]["classes_without_positives"] == ["drum"]
    assert set(results["metrics"]["average_precision"]) == {"hiss", "hum"}
    assert [result["clips"] for result in results["per_class"].values()] == [0, 2, 2]
    assert results["per_class"]["hum"]["average_precision"] == results["metrics"]["average_precision"]["hum"]
    assert not (Path(settings.output_dir) / "confusion_matrix.png").exists()
    (reported,) = ModelCard.load(Path(settings.output_dir) / "README.md").data.eval_results
    assert (reported.metric_type, reported.dataset_split) == ("mAP", "fold 2")
    config = SSLAMConfig.from_pretrained(settings.output_dir)
    assert config.problem_type == "multi_label_classification"


def test_label_smoothing_of_several_labels_is_refused(settings):
    with pytest.raises(UserError, match="label_smoothing_factor is set, but it spreads one label"):
        fine_tune(replace(settings, label_separator=";", label_smoothing_factor=0.1))


def test_lists_of_labels_are_several_labels_too(settings, tmp_path):
    folder = write_folder(tmp_path / "tags", [("hum", 1)] * 4)
    (folder / "metadata.csv").unlink()
    rows = [(["hum"], 1), (["hum", "hiss"], 1), (["hiss"], 2), ([], 2)]
    lines = (json.dumps({"file_name": f"{i:03}.wav", "tags": tags, "fold": fold}) for i, (tags, fold) in enumerate(rows))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    metrics = fine_tune(replace(settings, data_dir=str(folder), label_column="tags"))["metrics"]
    assert metrics["classes_without_positives"] == ["hum"]
    assert metrics["average_precision"]["hiss"] in (0.5, 1.0)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_the_scores_that_are_kept_give_the_results(settings, loss):
    results = fine_tune(replace(settings, loss=loss, max_steps=3))
    assert results["steps"] == 3
    assert read_json(Path(settings.output_dir) / "results.json") == results
    scores = np.load(Path(settings.output_dir) / "scores.npz")
    logits, targets = scores["logits"].astype(np.float64), scores["targets"]
    assert targets.tolist() == [[0, 1], [1, 0]] * 3  # hum, hiss, ... in the order of the table; classes are sorted
    assert results["metrics"]["accuracy"] == (logits.argmax(1) == targets.argmax(1)).mean()
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) if loss == "cross_entropy" else 1 / (1 + np.exp(-logits))
    terms = -np.log(shares[targets == 1]) if loss == "cross_entropy" else -np.log(np.where(targets == 1, shares, 1 - shares))
    assert results["metrics"]["loss"] == pytest.approx(terms.mean(), rel=1e-5)


def test_without_evaluation_training_clips_are_all_that_is_needed(settings):
    results = fine_tune(replace(settings, do_eval=False, test_folds=[]))
    assert results["metrics"] == {}
    assert results["clips"] == {"training": 6}
    assert not (Path(settings.output_dir) / "scores.npz").exists()
    assert "on 6 clips of `clips`, and not tested; 0 files" in (Path(settings.output_dir) / "README.md").read_text()


def test_results_of_another_run_do_not_stay_beside_a_new_model(settings, monkeypatch):
    fine_tune(settings)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_sslam.finetuning.training._evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(replace(settings, seed=1, overwrite_output_dir=True))
    left = {path.name for path in Path(settings.output_dir).iterdir()}
    assert "model.safetensors" in left
    assert not left & {"results.json", "scores.npz", "README.md", "confusion_matrix.png"}
    with pytest.raises(UserError, match="holds a model already"):
        fine_tune(settings)


@pytest.fixture
def shards(folder, tmp_path, monkeypatch) -> Path:
    """The clips with their bytes in parquet files, the first fold as train, with declared classes; one is no audio."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1)  # 5 s after every shuffled pass
    features = datasets.Features({"audio": datasets.Audio(decode=False), "label": datasets.ClassLabel(names=["hiss", "hum"])})
    files = sorted(folder.glob("*.wav"))
    audio = [{"path": path.name, "bytes": b"no audio" if i == 4 else path.read_bytes()} for i, path in enumerate(files)]
    (tmp_path / "shards").mkdir()
    for split, part in (("train", slice(0, 6)), ("test", slice(6, 12))):
        table = datasets.Dataset.from_dict({"audio": audio[part], "label": [1, 0] * 3}, features=features)
        table.to_parquet(tmp_path / "shards" / f"{split}-00000.parquet")
    return tmp_path / "shards"


@pytest.mark.parametrize("workers", [0, 1])
def test_parquet_files_can_be_streamed(settings, shards, workers):
    changes = {"data_dir": str(shards), "layout": "parquet", "streaming": True, "max_unreadable": 0.2}
    splits = {"fold_column": None, "train_folds": [], "test_folds": []}
    results = fine_tune(replace(settings, **changes, **splits, dataloader_num_workers=workers, max_steps=5))
    assert results["steps"] == 5  # of two batches an epoch
    assert results["classes"] == ["hiss", "hum"]
    assert results["clips"] == {"training": None, "test": None}
    assert results["unreadable"]["training"]["unreadable"] >= 2  # counted in every pass
    assert results["unreadable"]["test"] == {}
    assert np.load(Path(settings.output_dir) / "scores.npz")["targets"].tolist() == [[0, 1], [1, 0]] * 3
    assert "on streamed clips of `shards`" in (Path(settings.output_dir) / "README.md").read_text()


def augmentation_seeds(monkeypatch) -> list[tuple[int, ...]]:
    """What the augmentation of each clip draws from: seed of the run, epoch, place in its order and the like."""
    seeds: list[tuple[int, ...]] = []

    def record(waveform, settings, generator):
        seeds.append(tuple(generator.bit_generator.seed_seq.entropy)[2:])  # behind what tells this use from others
        return waveform, 0

    monkeypatch.setattr("transformers_sslam.finetuning.stream.augment_waveform", record)
    return seeds


def test_a_stream_is_augmented_anew_in_every_epoch(settings, shards, monkeypatch):
    seeds = augmentation_seeds(monkeypatch)
    changes = {"data_dir": str(shards), "layout": "parquet", "streaming": True, "max_unreadable": 0.2, "do_eval": False}
    fine_tune(replace(settings, **changes, fold_column=None, train_folds=[], test_folds=[], max_steps=4, seed=5))
    assert len(set(seeds)) == len(seeds) == 16  # four updates of four clips
    assert {seed[:2] for seed in seeds} == {(5, epoch) for epoch in range(4)}  # of five clips that can be read


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A pre-trained encoder with the feature extractor of other data."""
    path = tmp_path / "checkpoint"
    SSLAMModel(SSLAMConfig(**{**TINY, "max_length": 128})).save_pretrained(path)
    SSLAMFeatureExtractor.from_preset("speech_commands").save_pretrained(path)
    return path


def test_a_checkpoint_gives_encoder_and_feature_extractor(settings, checkpoint):
    settings = replace(settings, model=str(checkpoint), model_config={"drop_path_rate": 0.1}, max_length=None)
    extractor = build_extractor(settings, settings.model)
    model = build_model(settings, extractor, ["a", "b", "c"], multi_label=False, origin=settings.model)
    assert (extractor.mean, extractor.std, extractor.max_length) == (-6.846, 5.565, 128)
    assert model.config.padding_value == pytest.approx(6.846 / (2 * 5.565), abs=1e-12)
    assert model.config.drop_path_rate == 0.1
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    for name, weight in SSLAMModel.from_pretrained(checkpoint).state_dict().items():
        assert torch.equal(model.sslam.state_dict()[name], weight), name


def test_a_head_that_is_replaced_by_design_looks_like_no_error(settings, tmp_path, caplog):
    ten = SSLAMConfig(**TINY, id2label={i: f"class {i}" for i in range(10)})
    SSLAMForAudioClassification(ten).save_pretrained(tmp_path / "ten")
    caplog.set_level("INFO")
    logging.getLogger("transformers").addHandler(caplog.handler)  # it does not propagate
    try:
        build_model(
            replace(settings, model=str(tmp_path / "ten"), model_config={}), SSLAMFeatureExtractor(), ["a"], False, str(tmp_path / "ten")
        )
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == ["the head is new: 1 classes, other than the checkpoint's; the encoder is the checkpoint's"]


def test_a_classifier_of_other_classes_gives_its_encoder(settings, tmp_path):
    first = SSLAMForAudioClassification(SSLAMConfig(**TINY, num_labels=7))
    first.save_pretrained(tmp_path / "first")
    SSLAMFeatureExtractor().save_pretrained(tmp_path / "first")
    settings = replace(settings, model=str(tmp_path / "first"), model_config={})
    second = build_model(settings, build_extractor(settings, settings.model), ["a", "b"], multi_label=False, origin=settings.model)
    assert second.classifier.weight.shape == (2, 32)
    assert torch.equal(second.sslam.layers[1].mlp.fc1.weight, first.sslam.layers[1].mlp.fc1.weight)


def encoder_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return SSLAMModel.from_pretrained(folder).state_dict()


def test_a_frozen_encoder_keeps_every_bit_and_the_head_learns(settings, checkpoint):
    fine_tune(replace(settings, model=str(checkpoint), model_config={"drop_path_rate": 0.5}, freeze_encoder=True, learning_rate=1e-2))
    before, after = encoder_of(checkpoint), encoder_of(settings.output_dir)
    assert all(torch.equal(after[name], before[name]) for name in before)
    trained = load_file(Path(settings.output_dir) / "model.safetensors")
    assert (trained["layernorm.weight"] != 1).all()
    assert (trained["classifier.bias"] != 0).all()
    assert SSLAMConfig.from_pretrained(settings.output_dir).drop_path_rate == 0.5  # as the published protocol asks for

    fine_tune(replace(settings, model=str(checkpoint), model_config={}, learning_rate=1e-2, overwrite_output_dir=True))
    assert not torch.equal(encoder_of(settings.output_dir)["layers.0.mlp.fc1.weight"], before["layers.0.mlp.fc1.weight"])


def test_a_frozen_encoder_drops_nothing_that_the_settings_do_not_name(settings, tmp_path):
    drops = ("drop_path_rate", "patch_drop_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")
    SSLAMModel(SSLAMConfig(**TINY, **dict.fromkeys(drops, 0.2))).save_pretrained(tmp_path / "dropping")
    for frozen, expected in ((True, {"drop_path_rate": 0.1}), (False, {**dict.fromkeys(drops, 0.2), "drop_path_rate": 0.1})):
        asked = replace(settings, model=str(tmp_path / "dropping"), model_config={"drop_path_rate": 0.1}, freeze_encoder=frozen)
        config = build_model(asked, SSLAMFeatureExtractor(), ["a", "b"], multi_label=False, origin=asked.model).config
        assert {name: getattr(config, name) for name in drops} == {**dict.fromkeys(drops, 0.0), **expected}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "sdpa"), ({"bf16": True}, CPU_HALF_PRECISION_ATTENTION), ({"bf16": True, "attn_implementation": "eager"}, "eager")],
    ids=str,
)
def test_bfloat16_on_a_cpu_takes_the_attention_that_is_made_for_it(settings, monkeypatch, changes, expected):
    build, found = training._build_trainer, []
    monkeypatch.setattr(training, "_build_trainer", lambda *given: found.append(given[4].config._attn_implementation) or build(*given))
    fine_tune(replace(settings, use_cpu=True, **changes))
    assert found == [expected]


def test_an_official_checkpoint_is_a_model_to_start_from(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    official = FIXTURES / "small_hub_model"
    settings = replace(settings, model=str(official), model_config={}, freeze_encoder=True)
    fine_tune(settings)
    expected = convert_checkpoint(official, tmp_path / "converted").state_dict()
    after = encoder_of(settings.output_dir)
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    assert f"fine-tuned from `{official.name}`" in (Path(settings.output_dir) / "README.md").read_text()
    assert yaml.safe_load((Path(settings.output_dir) / "settings.yaml").read_text())["model"] == str(official)


def test_an_official_checkpoint_that_is_damaged_is_an_error(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="broken.pt"):
        fine_tune(replace(settings, model=str(tmp_path / "broken.pt")))


def test_a_head_is_kept_for_the_same_classes_alone(settings, tmp_path):
    first = SSLAMForAudioClassification(SSLAMConfig(**TINY, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}))
    first.save_pretrained(tmp_path / "first")
    SSLAMFeatureExtractor().save_pretrained(tmp_path / "first")
    settings = replace(settings, model=str(tmp_path / "first"), model_config={})
    same, other = (
        build_model(settings, build_extractor(settings, settings.model), classes, multi_label=False, origin=settings.model)
        for classes in (["a", "b"], ["b", "c"])
    )
    assert torch.equal(same.classifier.weight, first.classifier.weight)
    assert not torch.equal(other.classifier.weight, first.classifier.weight)
    assert other.classifier.weight.std().item() == pytest.approx(0.02, rel=0.3)


@pytest.mark.parametrize(("name", "value"), [("intermediate_size", 128), ("num_attention_heads", 1), ("num_hidden_layers", 1)])
def test_sizes_that_contradict_a_checkpoint_are_refused(settings, checkpoint, name, value):
    """Other heads or fewer layers would load without a word, as another network."""
    settings = replace(settings, model=str(checkpoint), model_config={name: value})
    with pytest.raises(UserError, match=rf"model_config\.{name} is {value}, but .*leave the sizes out"):
        build_model(settings, build_extractor(settings, settings.model), ["a", "b"], multi_label=False, origin=settings.model)


def test_a_checkpoint_that_lacks_a_part_of_the_encoder_is_refused(settings, checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["layers.1.mlp.fc1.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    settings = replace(settings, model=str(checkpoint), model_config={})
    with pytest.raises(UserError, match="does not fill the encoder"):
        build_model(settings, build_extractor(settings, settings.model), ["a", "b"], multi_label=False, origin=settings.model)


@pytest.mark.parametrize("model", ["nothing", "./nothing"])
def test_of_a_model_that_is_not_there_that_is_said_first(settings, model):
    with pytest.raises(UserError, match=f"^there is no folder or file {model}"):
        fine_tune(replace(settings, model=model))


@pytest.mark.parametrize(
    ("normalization", "expected"), [("model", (-4.268, 4.569)), ("esc50", (-6.627, 5.359)), ([-5.0, 4.0], (-5.0, 4.0))]
)
def test_statistics_can_be_preset_or_given(settings, normalization, expected):
    extractor = build_extractor(replace(settings, normalization=normalization))
    assert (extractor.mean, extractor.std, extractor.max_length) == (*expected, 64)


def test_each_clip_is_augmented_once_an_epoch_with_a_seed_of_its_own(settings, monkeypatch):
    seeds = augmentation_seeds(monkeypatch)
    fine_tune(replace(settings, per_device_train_batch_size=3, num_train_epochs=3.0, max_steps=-1, seed=5))
    # Each of the six places in the order of an epoch once; a table has one recording a place, and it is one clip.
    assert sorted(seeds) == [(5, epoch, place, 0, 0) for epoch in range(3) for place in range(6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": "nowhere"}, "there is no folder nowhere: check the path"),
        ({"fold_column": "part"}, "there is no column 'part', only audio, label, fold"),
        ({"train_folds": []}, "no fold of the column 'fold' was chosen, so there is no clip: give some of 1, 2"),
        ({"test_folds": [2, 7]}, "the column 'fold' has no fold 7, only 1, 2"),
        ({"fold_column": None, "train_folds": [], "test_folds": []}, "there is no split 'test', only train"),
        ({"label_column": "class"}, "there is no column 'class', only audio, label, fold"),
    ],
)
def test_rows_that_cannot_be_chosen_are_an_error(settings, changes, message):
    with pytest.raises(UserError, match=message):
        fine_tune(replace(settings, **changes))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("hum", 1), ("hiss", 1), ("drum", 2)], "002.wav is labelled 'drum', which is none of the 2 classes: hiss, hum"),
        ([("hum", 1), ("hum", 1), ("hum", 2)], r"the training clips have 1 class \(hum\), but a classifier needs two"),
        ([("hum", 1), ("", 1), ("hum", 2)], "001.wav has no label in the column 'label'"),
    ],
)
def test_labels_that_cannot_be_learnt_are_an_error(settings, tmp_path, rows, message):
    folder = write_folder(tmp_path / "rows", rows)
    with pytest.raises(UserError, match=message):
        fine_tune(replace(settings, data_dir=str(folder)))


def test_a_clip_listed_under_two_names_is_an_error(settings, folder):
    (folder / "again.wav").hardlink_to(folder / "000.wav")
    with (folder / "metadata.csv").open("a") as table:
        table.write("\nagain.wav,hum,2")
    with pytest.raises(UserError, match="again.wav, which is .*000.wav, is both in the training part and in the test part"):
        fine_tune(settings)


def test_an_evaluation_without_labels_is_an_error(settings, tmp_path):
    folder = write_folder(tmp_path / "rows", [("hum;hiss", 1), ("hiss", 1), ("", 2)])
    with pytest.raises(UserError, match="no clip of the evaluation has a label"):
        fine_tune(replace(settings, data_dir=str(folder), label_separator=";"))


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_run_that_diverged_is_no_success(settings, evaluate):
    folds = {} if evaluate else {"test_folds": []}
    with pytest.raises(UserError, match="diverged.*lower learning_rate"):
        fine_tune(replace(settings, do_eval=evaluate, learning_rate=1e30, warmup_steps=0.0, max_steps=4, **folds))
    assert not (Path(settings.output_dir) / "model.safetensors").exists()


def test_a_schedule_without_a_warm_up_needs_no_longer_run(settings):
    assert fine_tune(replace(settings, max_steps=2, warmup_steps=5, lr_scheduler_type="constant", lr_scheduler_kwargs={}))["steps"] == 2


def test_few_updates_and_few_clips_of_a_class_are_warned_about(settings, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [("hum", 1)] * 5 + [("hiss", 1)] * 4 + [("hum", 2), ("hiss", 2)]
    fine_tune(replace(settings, data_dir=str(write_folder(tmp_path / "rows", rows)), max_steps=-1, num_train_epochs=2.0))
    few = "the run has only 4 updates, 2 an epoch: for more, lower per_device_train_batch_size (4), or raise num_train_epochs (2)"
    assert few in caplog.messages
    assert "these classes have fewer than 5 training clips, and will hardly be learnt: hiss" in caplog.messages
    assert "evaluating 2 test clips" in caplog.messages


@pytest.mark.parametrize("error", [OfflineModeIsEnabled("offline"), HTTPError("no route")])
def test_a_hub_that_cannot_be_reached_is_one_sentence_before_the_training(settings, monkeypatch, error):
    def unreachable(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", unreachable)
    with pytest.raises(UserError, match=r"^push_to_hub is true, but the Hub cannot be used \((offline|no route)\): train without it, then"):
        fine_tune(replace(settings, push_to_hub=True))


def test_a_class_without_evaluation_clip_is_told(settings, tmp_path, caplog):
    folder = write_folder(tmp_path / "rows", [("hum;hiss", 1), ("hiss", 1), ("hiss", 2)])
    results = fine_tune(replace(settings, data_dir=str(folder), label_separator=";"))
    assert results["metrics"]["classes_without_positives"] == ["hum"]
    assert "no test clip has hum" in caplog.text


def test_a_declared_class_without_training_clip_is_an_error(settings, tmp_path):
    for path in ("train/hum", "train/hiss", "test/drum"):
        (tmp_path / "splits" / path).mkdir(parents=True)
        soundfile.write(tmp_path / "splits" / path / "0.wav", sound("hum", 0), RATE)
    splits = {"fold_column": None, "train_folds": [], "test_folds": []}
    with pytest.raises(UserError, match="no training clip has the class drum"):
        fine_tune(replace(settings, data_dir=str(tmp_path / "splits"), **splits))


def test_a_folder_without_audio_is_an_error(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty cannot be read as an audio folder"):
        fine_tune(replace(settings, data_dir=str(tmp_path / "empty")))
    (tmp_path / "empty" / "metadata.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="empty"):
        fine_tune(replace(settings, data_dir=str(tmp_path / "empty")))


def test_too_many_unusable_files_stop_the_run_and_are_counted_by_cause(settings, folder):
    (folder / "000.wav").unlink()
    (folder / "001.wav").write_bytes(b"no audio")
    soundfile.write(folder / "002.wav", noise(0.02), RATE)
    soundfile.write(folder / "003.wav", 1000 * noise(0.6), RATE, subtype="FLOAT")
    causes = "left out: 1 missing, 1 out of scale, 1 too short, 1 unreadable"
    counts = rf"(?s)3 of 6 recordings are unreadable, more than max_unreadable = 0.4: .*{causes}.*000.wav is not there"
    with pytest.raises(UserError, match=counts):
        fine_tune(replace(settings, max_unreadable=0.4))


def test_a_class_none_of_whose_clips_can_be_read_ends_the_run_after_an_epoch(settings, folder):
    for i in (0, 2, 4):  # every hum of the first fold
        (folder / f"{i:03}.wav").write_bytes(b"no audio")
    with pytest.raises(UserError, match=r"(?s)no training clip of the class hum can be read: repair one.*000.wav cannot be read"):
        fine_tune(replace(settings, max_unreadable=0.9, max_steps=100))
    assert not (Path(settings.output_dir) / "model.safetensors").exists()
    soundfile.write(folder / "002.wav", sound("hum", 0), RATE)
    results = fine_tune(replace(settings, max_unreadable=0.9, max_steps=4, overwrite_output_dir=True))
    assert {cause: [Path(name).name for name in names] for cause, names in results["unreadable"]["training"].items()} == {
        "unreadable": ["000.wav", "004.wav"]
    }
    assert results["clips"] == {"training": 4, "test": 6}


def test_half_precision_of_either_kind_can_be_asked_for(settings, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)  # which asks the GPU
    monkeypatch.setattr("transformers.TrainingArguments.device", torch.device("cuda"))
    asked = ({}, {"fp16": True}, {"bf16": False}, {"use_cpu": True})
    found = [replace(settings, **changes).training_arguments() for changes in asked]
    assert [(arguments.bf16, arguments.fp16) for arguments in found] == [(True, False), (False, True), (False, False), (False, False)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_config": {"hiden_size": 64}}, "no setting model_config.hiden_size: did you mean model_config.hidden_size"),
        ({"model_config": {"hidden_size": 30}}, "hidden_size is 30"),
        ({"lr_scheduler_type": "kosine"}, "TrainingArguments rejects .*'?kosine'? is not a valid SchedulerType"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0, but must be positive"),
        ({"normalization": "esc5"}, "normalization is 'esc5', but one of model, computed, audioset"),
        ({"normalization": [1.0]}, r"normalization is \[1.0\], but a list must be \[mean, std\]"),
        ({"normalization": [1.0, 0.0]}, "std is 0.0"),
        ({"max_length": 100}, "max_length is 100 frames, but must be a positive multiple of 16"),
        ({"fold_column": None}, "folds or cross_validate are set, but fold_column"),
        ({"test_folds": ["1"]}, "'1' is both in the training and in the test part"),
        ({"test_folds": ["01"]}, "'1' is both in the training and in the test part"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
        ({"max_unreadable": 2.0}, "max_unreadable is 2"),
        ({"warmup_steps": -1.0}, "TrainingArguments rejects these settings: .*warmup_steps"),
        ({"model": "nowhere"}, "there is no folder or file nowhere here"),
        ({"optim": "adamw"}, "adamw is not a valid OptimizerNames"),
        ({"eval_strategy": "epoch", "do_eval": False, "test_folds": []}, "do_eval is false, but eval_strategy is 'epoch'"),
        ({"learning_rate": 0.0}, "learning_rate is 0 and lr_scheduler_kwargs.min_lr 1e-06, but the schedule falls"),
        ({"learning_rate": 1e-7}, "learning_rate is 1e-07 and lr_scheduler_kwargs.min_lr 1e-06"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"layer_decay": 0.0}, "layer_decay is 0"),
        ({"seed": -1}, "seed or one of seeds is -1"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"freeze_encoder": True}, "freeze_encoder is true, but model is null"),
        ({"max_length": 128}, "max_length is 128, but the model's positions end at 64"),
        ({"fp16": True, "use_cpu": True}, "fp16 is true, which needs a GPU"),
        ({"do_eval": False}, "do_eval is false, but test_folds or cross_validate are set"),
        ({"cross_validate": True}, "train_folds and cross_validate are both set"),
        ({"streaming": True}, "fold_column is 'fold', but the clips of a stream are not known"),
        ({"streaming": True, "fold_column": None, "train_folds": [], "test_folds": []}, "'label' .* does not declare its classes"),
        ({"lr_scheduler_kwargs": {"min_lr": "abc"}}, "lr_scheduler_kwargs.min_lr is 'abc', but a number"),
        ({"save_steps": 0}, "save_steps is 0, but must be positive"),
        ({"eval_steps": -3}, "eval_steps is -3"),
        ({"logging_steps": -1}, "logging_steps is -1"),
        ({"optim_args": "foo=1"}, "optim_args is 'foo=1', but cannot be set here"),
        ({"gradient_checkpointing_kwargs": {"foo": 1}}, "there is no setting gradient_checkpointing_kwargs.foo"),
        ({"torch_compile_mode": "fast"}, "torch_compile_mode is 'fast', but one of None, default, reduce-overhead"),
        ({"warmup_steps": 1000}, "warmup_steps is 1000, but the run has only .* updates: give fewer, or a fraction of all below 1"),
        ({"model_config": {"event_detection": {"threshold": 0.3}}}, "there is no setting model_config.event_detection"),
        ({"streaming": True, "max_steps": -1}, "max_steps is -1, but a stream, .* needs a positive number"),
    ],
)
def test_settings_that_contradict_are_an_error(settings, changes, message):
    with pytest.raises(UserError, match=message):
        fine_tune(replace(settings, **changes))


def test_the_program_prints_an_error_without_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--data_dir", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(f"sslam finetune: error: there is no folder {tmp_path / 'nowhere'}: check the path")


def test_the_program_says_how_to_resume_when_it_is_stopped(settings, monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers_sslam.finetuning.run.repeat_fine_tuning", stop)
    with pytest.raises(SystemExit) as stopped:
        run(settings)
    assert stopped.value.code == 130
    assert "the same command resumes this run from its last checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"fold_column": None, "train_folds": [], "test_folds": [], "test_split": "train"},
            "'train' is both in the training and in the test part",
        ),
        ({"load_best_model_at_end": True}, "load_best_model_at_end is True, but there is no validation part"),
    ],
)
def test_what_would_flatter_a_result_is_refused(settings, changes, message):
    with pytest.raises(UserError, match=message):
        replace(settings, **changes)


def test_scores_of_a_run_in_half_precision_are_not_rounded_to_it(settings):
    fine_tune(replace(settings, bf16=True, use_cpu=True))
    logits = torch.from_numpy(np.load(Path(settings.output_dir) / "scores.npz")["logits"])
    assert (logits.bfloat16().float() != logits).float().mean() > 0.9


def test_a_card_names_where_a_model_came_from_without_the_folders_of_this_machine(settings, checkpoint):
    results = fine_tune(replace(settings, model=str(checkpoint), model_config={}))
    assert ModelCard.load(Path(settings.output_dir) / "README.md").data.base_model == [checkpoint.name]
    card = describe_results(replace(settings, model=str(checkpoint)), results)
    assert f"fine-tuned from `{checkpoint.name}`" in card
    assert "fine-tuned from `someone/sslam`" in describe_results(replace(settings, model="someone/sslam"), results)
