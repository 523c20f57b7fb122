"""Evaluation of an existing classifier: equal to fine-tuning's own, and for tags to scikit-learn's."""

import json
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
from conftest import noise
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.classifier import EvaluationSettings, evaluate_classifier, results_table
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.training import fine_tune
from transformers_sslam.publishing.conversion import convert_checkpoint


CLASSES = ["cat", "dog", "owl"]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 64}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def write_clips(folder: Path, labels: list[str]) -> Path:
    """An audio folder of half seconds of noise, each with its labels."""
    folder.mkdir(exist_ok=True)
    for i in range(len(labels)):
        soundfile.write(folder / f"{i:02}.wav", noise(0.5 + 0.02 * i, seed=i), 16_000)
    rows = "\n".join(f"{i:02}.wav,{label},{i % 2}" for i, label in enumerate(labels))
    (folder / "metadata.csv").write_text(f"file_name,label,fold\n{rows}\n")
    return folder


def write_model(folder: Path, problem_type: str | None, id2label: dict[int, str] | None = None) -> Path:
    if id2label is None:
        id2label = dict(enumerate(CLASSES))
    config = SSLAMConfig(**TINY, id2label=id2label, problem_type=problem_type)
    model = SSLAMForAudioClassification(config)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(folder)
    return folder


def evaluation(model: Path, clips: Path, output: Path, /, **changes) -> EvaluationSettings:
    return EvaluationSettings(
        **{
            "model": str(model),
            "data_dir": str(clips),
            "output_dir": str(output),
            "test_split": "train",
            "per_device_eval_batch_size": 4,
            **changes,
        }
    )


def expected_logits(model: Path, clips: Path) -> np.ndarray:
    """Clip by clip, by hand."""
    network, extractor = SSLAMForAudioClassification.from_pretrained(model), SSLAMFeatureExtractor.from_pretrained(model)
    waveforms = [soundfile.read(file, dtype="float32")[0] for file in sorted(clips.glob("*.wav"))]
    with torch.inference_mode():
        return np.concatenate([network(**extractor(w, sampling_rate=16_000, return_tensors="pt")).logits.numpy() for w in waveforms])


def test_a_fine_tuned_model_has_the_metrics_of_its_own_run(tmp_path):
    clips = write_clips(tmp_path / "clips", ["cat", "cat", "dog", "dog"] * 3)
    settings = FineTuningSettings(
        data_dir=str(clips),
        output_dir=str(tmp_path / "model"),
        fold_column="fold",
        train_folds=[0],
        test_folds=[1],
        max_length=64,
        model_config=TINY,
        max_steps=2,
        disable_tqdm=True,
    )
    tuned = fine_tune(settings)
    results = evaluate_classifier(
        evaluation(tmp_path / "model", clips, tmp_path / "evaluation", fold_column="fold", test_folds=[1], per_device_eval_batch_size=5)
    )
    assert results["metrics"] == {name: value for name, value in tuned["metrics"].items() if name != "loss"}
    assert (results["classes"], results["clips"]) == (["cat", "dog"], 6)
    assert {name: results[name] for name in ("per_class", "confusion_matrix")} == {
        name: tuned[name] for name in ("per_class", "confusion_matrix")
    }
    assert np.sum(results["confusion_matrix"], axis=1).tolist() == [3, 3]
    assert all((tmp_path / folder / "confusion_matrix.png").stat().st_size > 5000 for folder in ("model", "evaluation"))
    own, again = (np.load(tmp_path / folder / "scores.npz") for folder in ("model", "evaluation"))
    np.testing.assert_allclose(again["logits"], own["logits"], atol=1e-6)
    for name in ("targets", "classes", "names"):
        np.testing.assert_array_equal(again[name], own[name])


def test_tags_are_ranked_as_scikit_learn_ranks_them(tmp_path):
    labels = ["cat;dog", "dog", "", "owl;cat", "owl", "dog;owl", "cat", ""]
    clips, model = write_clips(tmp_path / "clips", labels), write_model(tmp_path / "model", "multi_label_classification")
    results = evaluate_classifier(evaluation(model, clips, tmp_path / "out", label_separator=";"))
    targets, logits = np.array([[name in label for name in CLASSES] for label in labels]), expected_logits(model, clips)
    scores = np.load(tmp_path / "out" / "scores.npz")
    np.testing.assert_allclose(scores["logits"], logits, atol=1e-5)
    np.testing.assert_array_equal(scores["targets"], targets)
    metrics = results["metrics"]
    assert metrics["roc_auc"]["dog"] == pytest.approx(roc_auc_score(targets[:, 1], logits[:, 1]), abs=1e-9)
    assert metrics["d_prime"] == pytest.approx(2**0.5 * norm.ppf(metrics["mean_roc_auc"]), abs=1e-9)
    assert metrics["mean_average_precision"] == pytest.approx(average_precision_score(targets, logits, average="macro"), abs=1e-9)
    assert metrics["mean_roc_auc"] == pytest.approx(roc_auc_score(targets, logits, average="macro"), abs=1e-9)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]["d_prime"] == metrics["d_prime"]
    low, high = metrics["mean_roc_auc_interval"]
    assert f"| mean roc auc | {metrics['mean_roc_auc']:.4f} [{low:.4f}, {high:.4f}] |" in results_table(results)


@pytest.mark.parametrize("problem_type", ["single_label_classification", None])  # None is what SSLAM's own scores take for the former
def test_a_classifier_of_exclusive_classes_is_ranked_by_its_probabilities_on_overlapping_sounds(tmp_path, problem_type):
    labels = ["cat;dog", "dog", "owl", "owl;cat", "owl", "dog;owl", "cat", "dog"]
    clips, model = write_clips(tmp_path / "clips", labels), write_model(tmp_path / "model", problem_type)
    found = evaluate_classifier(evaluation(model, clips, tmp_path / "out", label_separator=";"))["metrics"]["mean_average_precision"]
    targets, logits = np.array([[name in label for name in CLASSES] for label in labels]), expected_logits(model, clips)
    of_probabilities, of_logits = (
        average_precision_score(targets, scores, average="macro") for scores in (torch.tensor(logits).softmax(-1).numpy(), logits)
    )
    assert of_probabilities != pytest.approx(of_logits)  # so that the two can be told apart here
    assert found == pytest.approx(of_probabilities, abs=1e-9)


def test_classes_that_are_everywhere_have_no_roc_auc(tmp_path, caplog):
    model = write_model(tmp_path / "model", "multi_label_classification")
    clips = write_clips(tmp_path / "clips", ["cat;dog", "cat;owl", "cat"])
    results = evaluate_classifier(evaluation(model, clips, tmp_path / "out", label_separator=";"))
    assert results["metrics"]["classes_without_negatives"] == ["cat"]
    assert set(results["metrics"]["roc_auc"]) == {"dog", "owl"}
    clips = write_clips(tmp_path / "all", ["cat;dog", "cat;dog"])
    metrics = evaluate_classifier(evaluation(model, clips, tmp_path / "out", label_separator=";"))["metrics"]
    assert metrics["mean_average_precision"] == 1.0
    assert metrics["classes_without_positives"] == ["owl"]
    assert "mean_roc_auc" not in metrics
    assert "ROC AUC and d-prime are undefined" in caplog.text


def test_half_precision_does_not_round_logits(tmp_path):
    clips, model = write_clips(tmp_path / "clips", ["cat", "dog", "owl"]), write_model(tmp_path / "model", "single_label_classification")
    evaluate_classifier(evaluation(model, clips, tmp_path / "out", dtype="bfloat16"))
    logits = torch.from_numpy(np.load(tmp_path / "out" / "scores.npz")["logits"])
    assert not torch.equal(logits, logits.bfloat16().float())
    expected = expected_logits(model, clips)
    assert 1e-5 < np.abs(logits.numpy() - expected).max() < 0.05 * np.abs(expected).max()  # and the encoder did compute in it


def test_unreadable_clips_are_left_out_and_named(tmp_path, caplog):
    clips = write_clips(tmp_path / "clips", ["cat", "dog", "owl", "cat"])
    (clips / "02.wav").write_bytes(b"RIFF and nothing more")
    model = write_model(tmp_path / "model", "single_label_classification")
    results = evaluate_classifier(evaluation(model, clips, tmp_path / "out", max_unreadable=0.3))
    assert results["clips"] == 3
    assert [Path(name).name for name in results["unreadable"]["unreadable"]] == ["02.wav"]
    assert [Path(name).name for name in np.load(tmp_path / "out" / "scores.npz")["names"]] == ["00.wav", "01.wav", "03.wav"]
    assert "1 of 4 evaluated clips are left out (unreadable)" in caplog.text
    with pytest.raises(UserError, match="1 of 4 evaluated clips cannot be used"):
        evaluate_classifier(evaluation(model, clips, tmp_path / "out"))
    (clips / "metadata.csv").write_text("file_name,label\n00.wav,\n01.wav,\n02.wav,cat;dog\n03.wav,\n")
    with pytest.raises(UserError, match="no clip of the evaluation has a label"):  # that can be read
        evaluate_classifier(evaluation(model, clips, tmp_path / "out", max_unreadable=0.3, label_separator=";"))


def test_what_cannot_be_evaluated_is_rejected_before_anything_is_decoded(tmp_path, monkeypatch):
    clips, model = write_clips(tmp_path / "clips", ["cat", "wolf"]), write_model(tmp_path / "model", "single_label_classification")
    SSLAMModel(SSLAMConfig(**TINY)).save_pretrained(tmp_path / "encoder")
    SSLAMFeatureExtractor().save_pretrained(tmp_path / "encoder")
    for name, changes in (("long", {"max_length": 1024}), ("narrow", {"max_length": 64, "num_mel_bins": 64})):
        shutil.copytree(model, tmp_path / name)
        SSLAMFeatureExtractor(**changes).save_pretrained(tmp_path / name)
    for name, changes in (("regression", {"problem_type": "regression"}), ("namesakes", {"id2label": {0: "cat", 1: "cat", 2: "owl"}})):
        write_model(tmp_path / name, **{"problem_type": "single_label_classification", **changes})
    shutil.copytree(model, tmp_path / "wide")
    SSLAMConfig(**TINY | {"hidden_size": 64}, id2label={0: "cat", 1: "dog", 2: "owl"}).save_pretrained(tmp_path / "wide")
    monkeypatch.setattr("transformers_sslam.evaluation.settings.Waveforms", None)
    for changes, error, message in (
        ({}, UserError, "01.wav is labelled 'wolf', which is none of the 3 classes: cat, dog, owl"),
        ({"test_split": "test"}, UserError, "there is no split 'test'"),
        ({"fold_column": "fold"}, UserError, "no fold of the column 'fold' was chosen"),
        ({"model": str(tmp_path / "encoder")}, UserError, "is an encoder without a trained head, but a classifier of clips is needed"),
        ({"model": str(tmp_path)}, UserError, "holds no config.json: give a folder, or a name on the Hub, in which a model was saved"),
        ({"model": str(tmp_path / "wide")}, UserError, "cannot be loaded as a SSLAMForAudioClassification"),
        ({"model": str(tmp_path / "long")}, UserError, "the model cannot be evaluated: the feature extractor's max_length"),
        ({"model": str(tmp_path / "narrow")}, UserError, "the model cannot be evaluated: .*128 mel bins"),
        ({"model": str(tmp_path / "regression")}, UserError, "'regression' with 3 labels, which is not a choice between classes"),
        ({"model": str(tmp_path / "namesakes")}, UserError, "has two classes called 'cat'"),
        ({"device": "abacus"}, UserError, "device is 'abacus', which cannot be used"),
        ({"output_dir": str(clips / "00.wav")}, UserError, "00.wav cannot be written to"),
        ({"output_dir": str(model)}, UserError, "holds a model or its run"),
    ):
        with pytest.raises(error, match=message):
            evaluate_classifier(evaluation(model, clips, tmp_path / "out", **changes))
    assert not any((tmp_path / "out").iterdir())
    for changes, message in (
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0"),
        ({"max_unreadable": 1.0}, "max_unreadable is 1"),
        ({"test_folds": [1]}, "test_folds are set, but fold_column"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation(model, clips, tmp_path / "out", **changes)


def test_a_damaged_model_has_no_result(tmp_path):
    clips, model = write_clips(tmp_path / "clips", ["cat", "dog"]), write_model(tmp_path / "model", "single_label_classification")
    damaged = SSLAMForAudioClassification.from_pretrained(model)
    torch.nn.init.constant_(damaged.classifier.bias, float("nan"))
    damaged.save_pretrained(model)
    with pytest.raises(FloatingPointError, match="not finite: the model is damaged"):
        evaluate_classifier(evaluation(model, clips, tmp_path / "out"))
    assert not any((tmp_path / "out").iterdir())


def test_a_run_that_fails_after_scoring_leaves_no_earlier_results(tmp_path, monkeypatch):
    clips, model = write_clips(tmp_path / "clips", ["cat", "dog"]), write_model(tmp_path / "model", "single_label_classification")
    evaluate_classifier(evaluation(model, clips, tmp_path / "out"))
    assert (tmp_path / "out" / "results.json").exists()
    monkeypatch.setattr("transformers_sslam.evaluation.classifier.evaluate_predictions", None)
    with pytest.raises(TypeError):
        evaluate_classifier(evaluation(model, clips, tmp_path / "out"))
    assert (tmp_path / "out" / "scores.npz").exists()
    assert not (tmp_path / "out" / "results.json").exists()


def test_an_official_checkpoint_is_converted_and_evaluated(reference, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    official, clips = reference / "finetuned_fairseq.pt", write_clips(tmp_path / "clips", ["LABEL_3", "LABEL_9"])
    convert_checkpoint(official, tmp_path / "converted")
    results = [evaluate_classifier(evaluation(model, clips, tmp_path / "out" / model.stem)) for model in (official, tmp_path / "converted")]
    assert results[0]["metrics"] == results[1]["metrics"]
    own, converted = (np.load(tmp_path / "out" / name / "scores.npz")["logits"] for name in ("finetuned_fairseq", "converted"))
    np.testing.assert_array_equal(own, converted)
    assert own.shape == (2, 10)


def test_the_command(tmp_path, capsys):
    clips, model = write_clips(tmp_path / "clips", ["cat", "dog", "owl"]), write_model(tmp_path / "model", "single_label_classification")
    arguments = ["evaluate", "--model", str(model), "--data_dir", str(clips), "--output_dir", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("sslam evaluate: error: there is no split 'test', only train")
    assert main([*arguments, "--test-split", "train"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    printed = capsys.readouterr().out
    assert f"| accuracy | {results['metrics']['accuracy']:.4f} [" in printed
    assert "| class | clips | recall | precision |" in printed
    assert f"| owl | 1 | {results['per_class']['owl']['recall']:.2f} [" in printed
    assert f"confusion matrix: {tmp_path / 'out' / 'confusion_matrix.png'}" in printed
