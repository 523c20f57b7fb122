"""Probes: each finds what only it can find, seeds are reproducible, invalid data are rejected. And the command."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, tiny_config
from safetensors.torch import load_file, save_file
from scipy.stats import t
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation import probing
from transformers_sslam.evaluation.features import Features
from transformers_sslam.evaluation.frozen import FrozenSettings, evaluate_frozen
from transformers_sslam.evaluation.pooling import HeadSettings, PrototypePooling
from transformers_sslam.evaluation.probing import (
    PROBES,
    Partition,
    ProbeSettings,
    build_probe,
    check_partitions,
    hold_out_each,
    run_probe,
    score,
    summarize_gain,
    summarize_runs,
)


FAST = ProbeSettings(heads=HeadSettings(queries=4, prototypes=8, num_train_epochs=80))
TRAIN, TEST = np.arange(240), np.arange(240, 400)


def features_of(vectors: np.ndarray, patches: np.ndarray | None = None, length: int | None = None) -> Features:
    """Every view holds the same vectors."""
    vectors = vectors.astype(np.float32)
    count = 0 if patches is None else patches.shape[1]
    numbers = np.full(len(vectors), count if length is None else length)
    return Features(vectors, vectors, vectors, vectors, numbers, patches, np.arange(len(vectors)))


def one_patch_decides(tags: np.ndarray, length: int = 20, seed: int = 0) -> Features:
    """Noise of 24 patches, the last 4 of them padding, in which one patch for each tag stands out; their mean is zero in every clip.
    The padding has the mark of any class, louder."""
    generator = np.random.default_rng(seed)
    clips, classes = tags.shape
    marks = np.linalg.qr(generator.standard_normal((16, 16)))[0][:classes]
    patches = generator.standard_normal((clips, 24, 16))
    for clip, row in enumerate(tags):
        places = generator.permutation(length)
        for place, tag in zip(places, np.flatnonzero(row)):
            patches[clip, place] += 9 * marks[tag]
        patches[clip, :length] -= patches[clip, :length].mean(0)
        patches[clip, length:] = 20 * marks[clip % classes]
    return features_of(patches[:, :length].mean(1), patches.astype(np.float32), length)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.random.default_rng(1).permutation(np.arange(400) % 4)


@pytest.fixture(scope="module")
def marked(labels) -> Features:
    return one_patch_decides(np.eye(4)[labels])


def result(name: str, features: Features, targets: np.ndarray, seed: int = 0) -> float:
    probe = build_probe(name, FAST).fit(features.select(TRAIN), targets[TRAIN], seed)
    return score(probe.scores(features.select(TEST)), targets[TEST])


def test_a_linear_probe_finds_what_is_linear_and_only_that():
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 3
    vectors = generator.standard_normal((400, 8))
    assert result("linear_mean", features_of(vectors), labels) < 0.5
    vectors[:, 0] += 1e3 * labels  # on its own scale, which standardising takes away
    assert result("linear_mean", features_of(vectors), labels) > 0.95


def test_standard_deviations_distinguish_what_means_do_not():
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 2
    features = features_of(generator.standard_normal((400, 4)))
    features = replace(features, std=features.std + 4 * labels[:, None].astype(np.float32))
    assert result("linear_mean", features, labels) < 0.6
    assert result("linear_mean_and_std", features, labels) > 0.95


@pytest.mark.parametrize("name", ["attentive", "prototype"])
def test_what_one_patch_says_is_found_by_probes_that_choose_patches(name, marked, labels):
    assert result(name, marked, labels) > 0.95
    assert result("linear_mean", marked, labels) < 0.45
    assert result("knn", marked, labels) < 0.45


@pytest.mark.parametrize("name", ["attentive", "prototype"])
def test_several_tags_in_one_clip_are_found(name):
    tags = (np.random.default_rng(2).random((400, 4)) < 0.4).astype(np.int64)
    assert result(name, one_patch_decides(tags), tags) > 0.9


@pytest.mark.parametrize("name", ["attentive", "prototype"])
def test_padding_has_no_influence(name, marked, labels):
    probe = build_probe(name, FAST).fit(marked.select(TRAIN), labels[TRAIN])
    louder = features_of(marked.mean, np.array(marked.patches), length=20)
    louder.patches[:, 20:] = 1e3
    np.testing.assert_array_equal(probe.scores(louder), probe.scores(marked))
    retrained = build_probe(name, FAST).fit(louder.select(TRAIN), labels[TRAIN])
    np.testing.assert_array_equal(retrained.scores(marked), probe.scores(marked))


@pytest.mark.parametrize("name", ["attentive", "prototype"])
def test_a_seed_decides_a_head_and_nothing_else_does(name, marked, labels):
    def scores(seed: int) -> np.ndarray:
        return build_probe(name, FAST).fit(marked.select(TRAIN[:64]), labels[TRAIN[:64]], seed).scores(marked)

    torch.manual_seed(5)
    expected, state = scores(3), torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(torch.get_rng_state(), state)  # of which nothing was used
    torch.manual_seed(6)
    np.testing.assert_array_equal(scores(3), expected)
    assert np.abs(scores(4) - expected).max() > 1e-3


@pytest.mark.parametrize("name", list(PROBES))
@pytest.mark.parametrize("classes", [2, 3])
def test_scores_have_one_column_a_class(name, classes):
    generator = np.random.default_rng(0)
    tags = (generator.random((60, classes)) < 0.5).astype(np.int64)
    for targets in (np.arange(60) % classes, tags, tags[:, :1]):
        vectors = generator.standard_normal((60, 8))
        vectors[:, :classes] += 4 * (
            np.eye(classes)[targets] if targets.ndim == 1 else np.pad(targets, ((0, 0), (0, classes - targets.shape[1])))
        )
        features = features_of(vectors, np.repeat(vectors[:, None], 3, axis=1).astype(np.float16))
        scores = build_probe(name, FAST).fit(features, targets).scores(features)
        assert scores.shape == (60, classes if targets.ndim == 1 else targets.shape[1])
        assert score(scores, targets) > 0.9


def test_tags_have_a_logistic_regression_each():
    generator = np.random.default_rng(0)
    vectors, tags = generator.standard_normal((80, 5)).astype(np.float32), generator.integers(0, 2, (80, 3))
    scores = (
        build_probe("linear_cls", ProbeSettings(inverse_regularization=0.3)).fit(features_of(vectors), tags).scores(features_of(vectors))
    )
    scaled = StandardScaler().fit_transform(vectors)
    for column in range(3):
        expected = LogisticRegression(C=0.3, max_iter=5000).fit(scaled, tags[:, column]).decision_function(scaled)
        np.testing.assert_allclose(scores[:, column], expected, rtol=1e-6)


@pytest.mark.parametrize("multi_label", [False, True])
def test_nearest_neighbors_are_those_that_brute_force_finds(multi_label):
    generator = np.random.default_rng(0)
    train, test = (generator.standard_normal((count, 6)).astype(np.float32) for count in (50, 9))
    targets = generator.integers(0, 2, (50, 3)) if multi_label else np.arange(50) % 3
    scores = build_probe("knn", ProbeSettings(neighbors=4)).fit(features_of(train), targets).scores(features_of(test))
    mean, std = train.mean(0), train.std(0)
    train, test = (train - mean) / std, (test - mean) / std
    one_hot = targets if multi_label else np.eye(3)[targets]
    for row, clip in zip(scores, test):
        distance = 1 - train @ clip / np.linalg.norm(train, axis=1) / np.linalg.norm(clip)
        nearest = np.argsort(distance)[:4]
        weights = 1 / distance[nearest]
        np.testing.assert_allclose(row, (weights[:, None] * one_hot[nearest]).sum(0) / weights.sum(), rtol=1e-4)


def test_a_prototype_is_compared_with_the_patch_most_like_it():
    head = PrototypePooling(2, 2, HeadSettings(prototypes=1))
    with torch.no_grad():
        head.prototypes.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
    tokens = torch.tensor([[[0.6, 0.8], [0.0, -2.0], [5.0, 0.0]]])
    logits = head(tokens, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(logits, torch.tensor([[6.0, 8.0]]))  # ten times the cosines with the first patch


def test_each_fold_is_held_out_once():
    first, second, third = hold_out_each(["b", "a", "b", "c"])
    assert [p.name for p in (first, second, third)] == ["a", "b", "c"]
    assert (second.train.tolist(), second.evaluation.tolist()) == ([1, 3], [0, 2])
    with pytest.raises(UserError, match="at least two"):
        hold_out_each(["a", "a"])


def test_a_run_holds_each_partition_and_each_seed_that_matters(marked, labels):
    partitions = hold_out_each([str(i % 2) for i in range(400)])
    settings = ProbeSettings(heads=HeadSettings(num_train_epochs=2))
    values = run_probe("attentive", marked, labels, partitions, [0, 1, 2], settings)
    assert values.shape == (2, 3)
    train, evaluation = partitions[1].train, partitions[1].evaluation
    probe = build_probe("attentive", settings).fit(marked.select(train), labels[train], seed=2)
    assert values[1, 2] == (probe.scores(marked.select(evaluation)).argmax(1) == labels[evaluation]).mean()
    assert run_probe("linear_mean", marked, labels, partitions, [0, 1, 2]).shape == (2, 1)


def test_a_bar_names_the_probe_and_the_network(marked, labels, capsys):
    run_probe("linear_mean", marked, labels, hold_out_each(["a", "b"] * (len(labels) // 2)), network="untrained network 2")
    assert "probe linear_mean, untrained network 2: 100%" in capsys.readouterr().err


def test_the_score_is_accuracy_or_mean_average_precision():
    generator = np.random.default_rng(0)
    scores, tags = generator.random((40, 3)), generator.integers(0, 2, (40, 3))
    assert score(scores, np.arange(40) % 3) == (scores.argmax(1) == np.arange(40) % 3).mean()
    assert score(scores, tags) == pytest.approx(average_precision_score(tags, scores, average="macro"))


def test_folds_count_as_runs_and_seeds_only_where_there_is_one_partition():
    values, others = np.array([[0.5, 0.7], [0.8, 0.8]]), np.array([[0.1], [0.4]])
    summary = summarize_runs(values)  # of 0.6 and 0.8
    assert (summary.count, summary.mean, summary.std) == pytest.approx((2, 0.7, 0.02**0.5))
    assert summary.high == pytest.approx(0.7 + t.ppf(0.975, 1) * 0.1)
    gain = summarize_gain(values, others)  # of 0.5 and 0.4
    assert (gain.count, gain.mean, gain.std) == pytest.approx((2, 0.45, 0.005**0.5))
    assert summarize_runs(values[:1]).to_dict() == pytest.approx(
        {"mean": 0.6, "std": 0.02**0.5, "low": 0.6 - t.ppf(0.975, 1) * 0.1, "high": 0.6 + t.ppf(0.975, 1) * 0.1, "count": 2}
    )
    assert (summarize_gain(values[:1], others[:1]).count, summarize_gain(values[:1], others[:1]).mean) == (1, pytest.approx(0.5))


def test_folds_without_an_error_have_an_interval_over_clips():
    summary = summarize_runs(np.ones((4, 3)), [20] * 4)  # each fold: Wilson's [0.8389, 1]
    assert (summary.mean, summary.high) == (1, 1)
    assert summary.low == pytest.approx(1 - (4 * 0.16113**2) ** 0.5 / 4, abs=1e-4)
    assert summarize_runs(np.array([[0.2], [0.8]]), [1000] * 2) == replace(
        summarize_runs(np.array([[0.2], [0.8]])), low=0.0, high=1.0
    )  # t's interval is wider, and leaves [0, 1]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.array([0, 1, 3, 1]), "no training clip has the class 2"),
        (np.array([0, 0, 0, 0]), "every training clip has the class 0"),
        (np.array([[0, 1], [0, 0], [0, 1], [0, 0]]), "no training clip has the class 0"),
        (np.array([[0, 1], [1, 1], [0, 1], [1, 1]]), "every training clip has the class 1"),
        (np.array([0, 1, -1, 1]), "between -1 and 1"),
        (np.array([0.0, 1.0, 0.5, 1.0]), "whole numbers"),
        (np.array([[0, 1], [2, 1], [0, 0], [1, 1]]), "0 and 1"),
        (np.array([0, 1, 1]), "4 clips.*3 targets"),
    ],
)
def test_targets_that_cannot_be_learned_are_rejected(targets, message):
    with pytest.raises(UserError, match=message):
        build_probe("linear_cls").fit(features_of(np.eye(4)), targets)


def test_partitions_are_checked_by_the_names_of_classes(monkeypatch):
    warnings = []
    monkeypatch.setattr(probing.logger, "warning", warnings.append)
    targets = np.array([0, 1, 2, 0, 1])
    with pytest.raises(UserError, match="fold 7 held out has the class rain"):
        check_partitions([Partition("fold 7", np.array([0, 1]), np.array([2, 3, 4]))], targets, ["dog", "cat", "rain"])
    check_partitions([Partition("fold 7", np.array([0, 1, 2]), np.array([3, 4]))], targets, ["dog", "cat", "rain"])
    assert len(warnings) == 1
    assert "rain" in warnings[0]
    with pytest.raises(UserError, match="0 to 1"):
        check_partitions([Partition("fold 7", np.array([0, 1, 2]), np.array([3, 4]))], targets, ["dog", "cat"])


@pytest.mark.parametrize("name", ["linear_cls", "linear_mean", "linear_mean_and_std", "knn", "log_mel_statistics"])
def test_features_that_are_not_finite_are_rejected(name):
    with pytest.raises(UserError, match="NaN"):
        build_probe(name, ProbeSettings(neighbors=1)).fit(features_of(np.full((4, 2), np.nan)), np.arange(4))


def test_invalid_settings_are_rejected():
    with pytest.raises(UserError, match="there is no probe 'linear', only linear_cls"):
        build_probe("linear")
    with pytest.raises(UserError, match="neighbors is 10.*4 training clips"):
        build_probe("knn").fit(features_of(np.eye(4)), np.array([0, 1, 0, 1]))
    for wrong in ({"inverse_regularization": 0.0}, {"neighbors": 0}):
        with pytest.raises(UserError, match="must be positive"):
            ProbeSettings(**wrong)
    for wrong in ({"num_train_epochs": 0}, {"learning_rate": -1.0}):
        with pytest.raises(UserError, match="must be"):
            HeadSettings(**wrong)


@pytest.fixture
def run(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """Run the command on a small model and two folds of hums and hisses: its table and its results.json, or its error."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")
    clips = tmp_path / "clips"
    for split in ("train", "test"):
        (clips / split).mkdir(parents=True)
    for i in range(16):
        hum = 0.3 * np.sin(2 * np.pi * (150 + 9 * i) * np.arange(9600) / 16_000)
        soundfile.write(clips / ("train" if i < 10 else "test") / f"{i:02}.wav", hum if i % 2 else noise(0.6, seed=i), 16_000)
    for split, numbers in (("train", range(10)), ("test", range(10, 16))):
        rows = [f"{i:02}.wav,{('hiss', 'hum')[i % 2]},{'' if i % 2 else 'broad'};{'x' if i % 4 < 2 else ''},{i // 2 % 2}" for i in numbers]
        (clips / split / "metadata.csv").write_text("\n".join(["file_name,label,tags,fold", *rows]))
    torch.manual_seed(100)  # differs from every untrained network
    SSLAMModel(tiny_config(max_length=64)).save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / "model")

    def run(*arguments: str) -> tuple[str, dict]:
        own = ["--model", str(tmp_path / "model"), "--data_dir", str(clips), "--output_dir", str(tmp_path / "out")]
        own += ["--cache_dir", str(tmp_path / "cache"), "--neighbors", "3", "--heads.num_train_epochs", "3", "--seeds", "0", "1"]
        if main(["probe", *own, *arguments]):
            raise UserError(capsys.readouterr().err.splitlines()[-1])
        return capsys.readouterr().out, json.loads((tmp_path / "out" / "results.json").read_text())

    return run


def test_the_command_makes_one_table_of_all_probes_against_untrained_networks(run, tmp_path):
    text, results = run()
    lines = text.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:9]] == [title for title, _ in PROBES.values()]
    assert lines[0] == "| accuracy, % | trained | untrained | gain |"
    assert lines[8].endswith("| - | - |")  # no network is in the statistics
    assert {name: np.shape(found["trained"]["values"]) for name, found in results["probes"].items()} == {
        **dict.fromkeys(["linear_cls", "linear_mean", "linear_mean_and_std", "knn", "log_mel_statistics"], (2, 1)),
        **dict.fromkeys(["attentive", "prototype"], (2, 2)),
    }
    assert np.shape(results["probes"]["knn"]["untrained"]["values"]) == (2, 2)
    assert results["probes"]["log_mel_statistics"]["trained"]["summary"]["mean"] == 1  # hum and hiss: a mean is enough
    assert results["clips"] == {fold: {"training": 8, "evaluation": 8} for fold in ("0", "1")}
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 3  # the network and two untrained ones


def test_the_command_takes_splits_and_several_labels(run):
    text, results = run(
        *("--fold_column", "null", "--label_column", "tags", "--label_separator", ";", "--no_untrained"),
        *("--probes", "attentive", "linear_cls"),
    )
    assert text.startswith("| mean average precision, % | trained |")
    assert results["classes"] == ["broad", "x"]
    assert results["clips"] == {"test": {"training": 10, "evaluation": 6}}
    assert np.shape(results["probes"]["attentive"]["trained"]["values"]) == (1, 2)
    assert results["probes"]["linear_cls"]["trained"]["summary"]["std"] is None


def test_some_folds_can_be_held_out(run):
    _, results = run("--probes", "linear_cls", "--no_untrained", "--test_folds", "01")
    assert results["clips"] == {"1": {"training": 8, "evaluation": 8}}


def test_the_published_protocol_is_fine_tuning_of_a_frozen_encoder(run, tmp_path):
    changes = ["--published.num_train_epochs", "1", "--published.augmentation", "{roll: false}"]
    _, results = run("--probes", "published_linear", "--seeds", "3", *changes)
    assert np.shape(results["probes"]["published_linear"]["trained"]["values"]) == (2, 1)
    settings = (tmp_path / "out" / "published" / "fold-1-seed-3" / "settings.yaml").read_text()
    for line in (
        *("freeze_encoder: true", "learning_rate: 0.001", "num_train_epochs: 1", "per_device_train_batch_size: 48"),
        *("warmup_steps: 0", "seed: 3", "roll: false", "mixup_alpha: 0.8", "drop_path_rate: 0.1"),
    ):
        assert line in settings
    before, after = (
        SSLAMModel.from_pretrained(folder) for folder in (tmp_path / "model", tmp_path / "out" / "published" / "fold-1-seed-3")
    )
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--fold_column room", "no column 'room'"),
        ("--probes linear", "there is no probe .linear., only linear_cls"),
        ("--neighbors 9 --probes knn", "neighbors is 9.*8 training clips"),
        ("--fold_column null --train_split test --test_split test", "both 'test'"),
        ("--fold_column null --train_split valid", "no split 'valid'"),
        ("--inverse_regularization 0", "must be positive"),
        ("--max_length 128", "128 frames.*64"),
        ("--seeds 1 1", r"seeds are \[1, 1\], but must be 0 or more, each given once"),
        ("--seeds=[-1]", r"seeds are \[-1\]"),
        ("--test_folds 1 7", "the column 'fold' has no fold 7, only 0, 1"),
        ("--fold_column null --test_folds 1", "test_folds are set, but fold_column"),
        ("--device abacus", "device is 'abacus', which cannot be used"),
    ],
)
def test_mistakes_end_the_command_with_one_sentence(arguments, message, run):
    with pytest.raises(UserError, match=f"^sslam probe: error: .*{message}"):
        run(*arguments.split())


def test_a_clip_listed_in_two_folds_is_an_error(run, tmp_path):
    with (tmp_path / "clips" / "train" / "metadata.csv").open("a") as table:
        table.write("\n00.wav,hiss,x,1")
    with pytest.raises(UserError, match="00.wav is both in 0 and in 1"):
        run()


def test_a_checkpoint_that_does_not_fill_the_encoder_is_rejected(run, tmp_path):
    file = tmp_path / "model" / "model.safetensors"
    weights = {name.replace("layers.1.", "blocks.1."): tensor for name, tensor in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fill the encoder \(layers.1.attention.k_proj.bias is missing, and 15 more\)"):
        run("--probes", "knn")


def test_without_a_function_that_trains_the_published_protocol_is_an_error():
    settings = FrozenSettings(model="none", data_dir="none", probes=["published_linear"])
    with pytest.raises(UserError, match="published_linear is a training run: use `sslam probe`"):
        evaluate_frozen(settings)
