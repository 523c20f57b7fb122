"""Clips of which some labels are unknown: these have no part in losses, metrics and probes, and never count as negative."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import named_labels
from datasets import ClassLabel, Dataset, Features, List, Value
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler
from test_music_layouts import openmic  # noqa: F401  # a fixture
from test_probing import FAST, features_of

from transformers_sslam import SSLAMFeatureExtractor
from transformers_sslam.audio.clips import Clip
from transformers_sslam.audio.labels import LabelReader
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import choose_classes, read_rows
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.calibration import fit_temperature, measure_calibration
from transformers_sslam.evaluation.classifier import evaluate_classifier
from transformers_sslam.evaluation.metrics import average_precision, mean_over_classes
from transformers_sslam.evaluation.probing import Partition, build_probe, check_classes_are_learnable, run_probe
from transformers_sslam.evaluation.scores import evaluate_tags
from transformers_sslam.evaluation.settings import EvaluationSettings
from transformers_sslam.finetuning.augmentation import mixup, smooth_targets
from transformers_sslam.finetuning.optimization import classification_loss
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.stream import ColumnTargets, EventTargets
from transformers_sslam.finetuning.training import fine_tune
from transformers_sslam.losses_sslam import known_binary_cross_entropy
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.pretraining.probe import StudentProbe
from transformers_sslam.pretraining.settings import StudentProbeSettings


UNKNOWN = -100.0
NAMES = ClassLabel(names=["hum", "hiss", "click"])
TARGETS = [[1, UNKNOWN, 0], [0, 0, UNKNOWN], [UNKNOWN, UNKNOWN, 1]]  # hum, hiss, click of the clips below
TINY = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 64}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def table(labels: list, unknown: list, feature=None, unknown_feature=None, column: str = "labels") -> Dataset:
    """Clips `0.wav`, `1.wav` and so on, with these two columns."""
    columns = {"audio": [{"path": f"{i}.wav", "bytes": None} for i in range(len(labels))], column: labels, "unknown_labels": unknown}
    audio = {"path": Value("string"), "bytes": Value("binary")}
    features = {"audio": audio, column: feature, "unknown_labels": unknown_feature or feature}
    return Dataset.from_dict(columns, features=None if feature is None else Features(features))


KINDS = {
    "lists of classes": (table([[0], [], [2]], [[1], [2], [0, 1]], List(NAMES)), None),
    "lists of text": (table([["hum"], [], ["click"]], [["hiss"], ["click"], ["hum", "hiss"]], List(Value("string"))), None),
    "joined text": (table(["hum", None, "click"], [" hiss", "click", "hum;hiss"], Value("string")), ";"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_unknown_labels_are_minus_100(kind):
    rows, separator = KINDS[kind]
    labels = read_rows(rows, "labels", separator).labels
    assert labels.encode(NAMES.names).one_hot(range(3)).tolist() == TARGETS
    assert labels.encode(NAMES.names).one_hot(1).tolist() == TARGETS[1]
    assert labels.encode(["click", "hum", "hiss"]).select([2, 0]).one_hot([0, 1]).tolist() == [[1, UNKNOWN, UNKNOWN], [0, 1, UNKNOWN]]
    assert labels.num_partly_labelled == 3
    assert labels.counts().sum() == 2  # what is unknown is no label


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_the_same_targets(kind):
    rows, separator = KINDS[kind]
    stream = rows.to_iterable_dataset()
    targets = ColumnTargets(LabelReader.of(stream, "labels", separator), NAMES.names)
    columns = [{name: row[name] for name in ("labels", "unknown_labels")} for row in stream]
    clips = [
        Clip(name=f"{i}.wav", source="x", waveform=np.zeros(1), start=0, key=(0,), columns=values, row=i)
        for i, values in enumerate(columns)
    ]
    assert targets(clips).tolist() == TARGETS


def test_clips_that_are_known_whole_have_no_unknown_target_though_there_is_the_column():
    labels = read_rows(table([[0], []], [[], []], List(NAMES)), "labels").labels
    assert labels.num_partly_labelled == 0
    assert labels.one_hot(range(2)).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_data_whose_unknown_labels_differ_have_another_hash():
    known, other = (read_rows(table([[0], []], unknown, List(NAMES)), "labels").labels for unknown in ([[], [1]], [[], [2]]))
    assert len({known.digest(), other.digest(), named_labels([["hum"], []], True, NAMES.names).digest()}) == 3


def test_a_metadata_csv_can_have_unknown_labels(tmp_path):
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(160), 16_000)
    (tmp_path / "metadata.csv").write_text("file_name,labels,unknown_labels\na.wav,hum;hiss,\nb.wav,,hiss\n")
    labels = read_rows(open_splits(tmp_path)["train"], "labels", ";").labels
    assert choose_classes(labels) == ["hiss", "hum"]
    assert labels.encode(["hiss", "hum"]).one_hot(range(2)).tolist() == [[1, 1], [UNKNOWN, 0]]


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        (table([[0], [1]], [[1], [1, 2]], List(NAMES)), "labels", r"1.wav is labelled 'hiss', which is also in its unknown_labels"),
        (
            table([[0]], [["hizz"]], List(NAMES), List(Value("string"))),
            "labels",
            "0.wav has in unknown_labels 'hizz', which is none of the 3 classes: hum, hiss, click",
        ),
        (table([0], [[1]], NAMES, List(NAMES), "label"), "label", "there is a column unknown_labels, so 'label' must hold lists"),
        (table([[0]], ["hiss"], List(NAMES), Value("string")), "labels", "so 'unknown_labels' must hold lists of labels"),
        (
            table(
                [[{"label": "hum", "onset": 0.0, "offset": 1.0}]],
                [["hiss"]],
                List({"label": Value("string"), "onset": Value("float64"), "offset": Value("float64")}),
                List(Value("string")),
                "events",
            ),
            "events",
            "so 'events' must hold lists of labels, .* not one class or events",
        ),
    ],
)
def test_what_contradicts_unknown_labels_is_rejected(rows, column, message):
    with pytest.raises(UserError, match=message):
        read_rows(rows, column)
    stream = rows.to_iterable_dataset()
    with pytest.raises(UserError, match=message):
        [LabelReader.of(stream, column).read_row(row) for row in stream]


def test_a_class_that_is_only_ever_unknown_is_named():
    labels = read_rows(table([["a"], ["b"]], [["b"], ["rare"]], List(Value("string"))), "labels").labels
    assert choose_classes(labels) == ["a", "b"]
    with pytest.raises(UserError, match="clip 1 has in unknown_labels 'rare', which is none of the 2 classes: a, b"):
        labels.encode(["a", "b"])


# Losses


LOGITS = torch.tensor([[0.0, 3.0, np.log(3.0)], [np.log(3.0), 0.0, -7.0]])
# -log sigmoid(0) = log 2; of a negative at logit log 3: log(1 + 3) = log 4; at 0: log 2
MASKED = torch.tensor([[1.0, UNKNOWN, 0.0], [0.0, 0.0, UNKNOWN]])
BY_HAND = (np.log(2) + np.log(4) + np.log(4) + np.log(2)) / 4


def test_the_loss_is_the_mean_over_known_labels_and_has_no_gradient_elsewhere():
    logits = LOGITS.clone().requires_grad_()
    loss = classification_loss(logits, MASKED, "binary_cross_entropy")
    assert loss.item() == pytest.approx(BY_HAND, rel=1e-6)
    loss.backward()
    expected = [[(0.5 - 1) / 4, 0, 0.75 / 4], [0.75 / 4, 0.5 / 4, 0]]
    np.testing.assert_allclose(logits.grad, expected, rtol=1e-6)


def test_a_batch_of_which_nothing_is_known_has_no_loss():
    logits = LOGITS.clone().requires_grad_()
    loss = known_binary_cross_entropy(logits, torch.full_like(LOGITS, UNKNOWN))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_neither_mixup_nor_smoothing_makes_an_unknown_label_known():
    batch = {"input_values": torch.zeros(2, 4, 4), "labels": MASKED}
    mixed = mixup(batch, torch.tensor([0.75, 1.0]), torch.tensor([1, 0]))["labels"]
    assert mixed.tolist() == [[0.75, UNKNOWN, UNKNOWN], [0.0, 0.0, UNKNOWN]]
    np.testing.assert_allclose(smooth_targets(MASKED, 0.3), [[0.8, UNKNOWN, 0.1], [0.1, 0.1, UNKNOWN]], rtol=1e-6)


# Metrics


SCORES = np.array([[0.9, 0.1], [0.8, 0.7], [0.7, 0.4], [0.6, 0.9], [0.5, 0.2]])
TAGS = np.array([[1, 0], [UNKNOWN, 1], [0, UNKNOWN], [1, UNKNOWN], [UNKNOWN, 0]])


def test_average_precision_is_over_the_known_clips_of_each_class():
    # Known of the first class by falling score: 1 0 1, so (1/1 + 2/3) / 2. With the unknown ones as negatives: (1 + 2/4) / 2.
    # Of the second: 1 0 0, so 1. With the unknown ones as negatives: 1/2.
    np.testing.assert_allclose(average_precision(SCORES, TAGS), [5 / 6, 1.0], rtol=1e-12)
    found = mean_over_classes("average_precision", SCORES, TAGS, ["a", "b"])
    assert found["mean_average_precision"] == pytest.approx((5 / 6 + 1) / 2, rel=1e-12)
    assert found["average_precision"] == pytest.approx({"a": 5 / 6, "b": 1.0})


def test_roc_auc_is_over_the_known_clips_of_each_class():
    found = evaluate_tags(SCORES, TAGS, ["a", "b"])
    assert found["roc_auc"] == {"a": 0.5, "b": 1.0}  # of the two positives of a, one is above the one negative
    assert found["mean_roc_auc"] == 0.75


def test_random_metrics_are_those_of_scikit_learn_on_the_known_clips_and_the_intervals_those_of_all_resamples():
    generator = np.random.default_rng(0)
    scores, targets = generator.random((80, 3)), (generator.random((80, 3)) < 0.4).astype(float)
    targets[generator.random((80, 3)) < 0.5] = UNKNOWN
    known = targets != UNKNOWN
    for metric, reference in (("average_precision", average_precision_score), ("roc_auc", roc_auc_score)):
        expected = [reference(targets[known[:, i], i], scores[known[:, i], i]) for i in range(3)]
        found = mean_over_classes(metric, scores, targets, resamples=20, seed=1)
        np.testing.assert_allclose(list(found[metric].values()), expected, rtol=1e-12)
    rows = np.random.default_rng(1).integers(80, size=(20, 80))  # of ROC AUC the interval is that of percentiles
    resampled = [[roc_auc_score(*(v[row][known[row, i], i] for v in (targets, scores))) for row in rows] for i in range(3)]
    low, high = np.quantile(np.mean(resampled, axis=0), [0.025, 0.975])
    assert found["mean_roc_auc_interval"] == pytest.approx([low, high])


def test_a_class_of_which_nothing_is_known_is_in_no_mean():
    found = mean_over_classes("average_precision", SCORES, np.stack([TAGS[:, 0], np.full(5, UNKNOWN)], axis=1), ["a", "b"], confidence=None)
    assert (found["mean_average_precision"], found["classes_without_positives"]) == (pytest.approx(5 / 6), ["b"])
    with pytest.raises(ValueError, match="targets hold -1.0, but must be 0 or 1, or -100 where unknown"):
        average_precision(SCORES, np.where(TAGS == UNKNOWN, -1, TAGS))


def test_calibration_is_of_known_scores():
    logits, targets = LOGITS.numpy(), MASKED.numpy()
    measured = measure_calibration(logits, targets, exclusive=False)
    assert measured["log_loss"] == pytest.approx(BY_HAND, rel=1e-6)
    assert measured["brier_score"] == pytest.approx((0.25 + 0.5625 + 0.5625 + 0.25) / 4, rel=1e-6)
    assert sum(one["count"] for one in measured["reliability"]) == 4
    generator = np.random.default_rng(0)
    logits = 3 * generator.standard_normal((200, 2))
    targets = (generator.random((200, 2)) < 1 / (1 + np.exp(-logits / 2))).astype(float)
    halves = np.where(np.arange(200)[:, None] < 100, [0, UNKNOWN], [UNKNOWN, 0])
    known = np.concatenate([logits[:100, 0], logits[100:, 1]]), np.concatenate([targets[:100, 0], targets[100:, 1]])
    partly = fit_temperature(logits, np.where(halves == UNKNOWN, UNKNOWN, targets), exclusive=False)
    assert partly == pytest.approx(fit_temperature(*(values[:, None] for values in known), exclusive=False), rel=1e-9)


# Probes


@pytest.fixture(scope="module")
def probed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors, targets of three classes, and the same targets partly unknown: of the first class those of every second clip."""
    generator = np.random.default_rng(2)
    vectors = generator.standard_normal((120, 6)).astype(np.float32)
    targets = (vectors[:, :3] + generator.standard_normal((120, 3)) > 0.5).astype(np.float32)
    partly = targets.copy()
    partly[::2, 0] = UNKNOWN
    partly[:30, 2] = UNKNOWN
    return vectors, targets, partly


def test_logistic_regressions_are_of_the_known_clips_of_each_class(probed):
    vectors, _, partly = probed
    probe = build_probe("linear_mean", FAST).fit(features_of(vectors), partly)
    scaled = StandardScaler().fit_transform(vectors)
    for i, rows in enumerate((partly != UNKNOWN).T):
        expected = LogisticRegression(C=1.0, max_iter=5000).fit(scaled[rows], partly[rows, i]).decision_function(scaled)
        np.testing.assert_allclose(probe.scores(features_of(vectors))[:, i], expected, rtol=1e-5, atol=1e-6)


def test_nearest_neighbors_are_the_known_clips_of_each_class(probed):
    vectors, _, partly = probed
    probe = build_probe("knn", FAST).fit(features_of(vectors), partly)
    scaled = StandardScaler().fit_transform(vectors)
    for i, rows in enumerate((partly != UNKNOWN).T):
        regressor = KNeighborsRegressor(FAST.neighbors, weights="distance", metric="cosine").fit(scaled[rows], partly[rows, i])
        np.testing.assert_allclose(probe.scores(features_of(vectors))[:, i], regressor.predict(scaled), rtol=1e-5, atol=1e-6)
    few = partly.copy()
    few[9:, 0] = UNKNOWN
    with pytest.raises(UserError, match="neighbors is 10, but there are 4 training clips of known label"):
        build_probe("knn", FAST).fit(features_of(vectors), few)


def test_a_trained_head_does_not_take_what_is_unknown_for_absent(probed):
    vectors, targets, _ = probed
    partly = np.where((targets == 0) & (np.arange(120) % 10 > 0)[:, None], UNKNOWN, targets)  # most of what is known is present
    blocks = features_of(np.stack([vectors, vectors], axis=1))
    probe = build_probe("weighted_sum_mean", FAST)
    partly_scores = probe.fit(blocks, partly).scores(blocks).mean()
    negative = build_probe("weighted_sum_mean", FAST).fit(blocks, np.where(partly == UNKNOWN, 0, partly)).scores(blocks).mean()
    assert partly_scores > 0 > negative


def test_a_probe_is_scored_on_known_clips(probed):
    vectors, _, partly = probed
    train, test = np.arange(80), np.arange(80, 120)
    value = run_probe("linear_mean", features_of(vectors), partly, [Partition("test", train, test)], settings=FAST)
    scores = build_probe("linear_mean", FAST).fit(features_of(vectors[:80]), partly[:80]).scores(features_of(vectors[80:]))
    known = partly[80:] != UNKNOWN
    expected = np.mean([average_precision_score(partly[80:][known[:, i], i], scores[known[:, i], i]) for i in range(3)])
    assert value == pytest.approx(expected, rel=1e-9)


def test_a_class_without_known_positives_or_negatives_cannot_be_learnt():
    targets = np.array([[1, UNKNOWN], [0, 0], [UNKNOWN, 0]])
    with pytest.raises(UserError, match="no training clip has the class b"):
        check_classes_are_learnable(targets, ["a", "b"])
    with pytest.raises(UserError, match="every training clip has the class a"):
        check_classes_are_learnable(np.array([[1.0], [UNKNOWN]]), ["a"])


# Whole runs, on OpenMIC in miniature


def test_openmic_is_trained_on_and_evaluated_with_its_unknown_labels_left_out(
    openmic,  # noqa: F811
    tmp_path,
    capsys,
):
    run = {"data_dir": str(openmic), "layout": "openmic", "label_column": "labels", "model_config": TINY, "max_length": 64}
    run |= {"normalization": "computed", "max_steps": 3, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "model")}
    results = fine_tune(FineTuningSettings(**run, disable_tqdm=True))
    assert results["classes"] == ["banjo", "flute", "voice"]
    scores = np.load(tmp_path / "model" / "scores.npz")
    targets = [[0, 1, UNKNOWN], [UNKNOWN, 1, 1], [0, UNKNOWN, 0], [1, 1, UNKNOWN]]
    assert scores["targets"].tolist() == targets
    values = [
        average_precision_score(column[column >= 0], logits[column >= 0]) for column, logits in zip(scores["targets"].T, scores["logits"].T)
    ]
    assert results["metrics"]["mean_average_precision"] == pytest.approx(np.mean(values), rel=1e-9)
    known = scores["targets"] != UNKNOWN
    losses = np.logaddexp(0, scores["logits"]) - scores["targets"] * scores["logits"]
    assert results["metrics"]["loss"] == pytest.approx(losses[known].mean(), rel=1e-5)

    settings = {"data_dir": str(openmic), "layout": "openmic", "label_column": "labels", "model": str(tmp_path / "model")}
    found = evaluate_classifier(EvaluationSettings(**settings, output_dir=str(tmp_path / "evaluation")))
    assert found["unknown_labels"] == 4
    assert found["metrics"]["mean_average_precision"] == pytest.approx(np.mean(values), rel=1e-6)
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    assert main(["evaluate", *words, "--output_dir", str(tmp_path / "evaluation")]) == 0
    assert "left out, because they are unknown: 4 of 12 labels" in capsys.readouterr().out

    with pytest.raises(UserError, match="loss is 'cross_entropy', which needs every label of a clip, but clips have unknown ones"):
        fine_tune(FineTuningSettings(**{**run, "output_dir": str(tmp_path / "other")}, loss="cross_entropy"))


def test_weak_labels_of_events_can_be_unknown_too(openmic, tmp_path):  # noqa: F811
    labels = read_rows(open_splits(openmic, "openmic")["test"], "labels").labels
    clips = [Clip(waveform=np.zeros(1), name=f"{i}", source="x", row=i, start=0, columns={}, key=(0,)) for i in range(2)]
    targets = EventTargets(labels, frames_per_step=16, steps=4, sampling_rate=16_000)(clips, [None, None], [0, 0], [9600, 9600])
    assert targets["clip_labels"].tolist() == [[0, 1, UNKNOWN], [UNKNOWN, 1, 1]]
    assert (targets["labels"] == UNKNOWN).all()  # nobody knows when
    run = {
        "data_dir": str(openmic),
        "layout": "openmic",
        "label_column": "labels",
        "model_config": TINY,
        "max_length": 64,
        "task": "events",
    }
    results = fine_tune(FineTuningSettings(**run, max_steps=2, output_dir=str(tmp_path / "model"), disable_tqdm=True))
    scores = np.load(tmp_path / "model" / "scores.npz")
    assert scores["targets"][:2].tolist() == targets["clip_labels"].tolist()
    values = [average_precision_score(y[y >= 0], x[y >= 0]) for y, x in zip(scores["targets"].T, scores["logits"].T)]
    assert results["metrics"]["mean_average_precision"] == pytest.approx(np.mean(values), rel=1e-6)


def test_a_stream_of_partly_labelled_clips_is_trained_on(openmic, tmp_path):  # noqa: F811
    splits = open_splits(openmic, "openmic")
    for name, rows in splits.items():
        audio = [{"path": None, "bytes": Path(entry["path"]).read_bytes()} for entry in rows["audio"]]
        rows.remove_columns("audio").add_column("audio", audio).to_parquet(tmp_path / "shards" / f"{name}.parquet")
    run = {"data_dir": str(tmp_path / "shards"), "layout": "parquet", "label_column": "labels", "model_config": TINY, "max_length": 64}
    run |= {"streaming": True, "max_steps": 2, "output_dir": str(tmp_path / "model"), "per_device_train_batch_size": 4}
    fine_tune(FineTuningSettings(**run, disable_tqdm=True))
    assert (np.load(tmp_path / "model" / "scores.npz")["targets"] == UNKNOWN).sum() == 4
    with pytest.raises(UserError, match="loss is 'cross_entropy', which needs every label of a clip"):
        fine_tune(FineTuningSettings(**{**run, "output_dir": str(tmp_path / "other")}, loss="cross_entropy"))


def test_a_partly_labelled_clip_is_not_a_single_sound(openmic, tmp_path):  # noqa: F811
    settings = BenchmarkSettings(data_dir=str(openmic), layout="openmic", label_column="labels", output_dir=str(tmp_path / "mixed"))
    labels = openmic / "openmic-2018-aggregated-labels.csv"
    rows = [line.split(",") for line in labels.read_text().splitlines()]
    for number, row in enumerate(rows[1:]):
        row[2] = "1.0" if number % 2 else "0.0"  # so that each clip has one known label
    labels.write_text("\n".join(map(",".join, rows)) + "\n")
    with pytest.raises(UserError, match=r"6 of 6 sounds are labelled in part \(column unknown_labels\), but of a single sound every"):
        make_benchmark(settings)


def test_the_probe_in_pre_training_learns_from_what_is_known(openmic):  # noqa: F811
    settings = StudentProbeSettings(data_dir=str(openmic), layout="openmic", label_column="labels", fold_column=None)
    probe = StudentProbe(settings, SSLAMFeatureExtractor(max_length=64))
    targets, (part,) = probe.task.targets, probe.task.partitions
    assert (targets == UNKNOWN).sum() > 4
    mels = [
        SSLAMFeatureExtractor(max_length=64)(w, sampling_rate=16_000, padding="longest")["input_values"][0] for w in probe.task.waveforms
    ]
    features = np.stack([np.concatenate([np.mean(mel, axis=0), np.std(mel, axis=0)]) for mel in mels])
    scaler, values = StandardScaler().fit(features[part.train]), []
    for column in targets.T:
        train, test = (rows[column[rows] != UNKNOWN] for rows in (part.train, part.evaluation))
        logits = LogisticRegression(max_iter=5000).fit(scaler.transform(features[train]), column[train])
        values.append(average_precision_score(column[test], logits.decision_function(scaler.transform(features[test]))))
    assert probe.metric == "mean average precision"
    assert probe.log_mel == pytest.approx(np.mean(values), abs=1e-6)
