"""Probes: each finds what only it can find, seeds are reproducible, invalid data are rejected. And the command."""

import json
import sys
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
from transformers_sslam.evaluation.best_probe import ProbedBlock, check_inner_folds, choose_best, inner_folds
from transformers_sslam.evaluation.block_plot import replace_block_plot
from transformers_sslam.evaluation.features import Features
from transformers_sslam.evaluation.frozen import DEFAULT_PROBES, FrozenSettings, evaluate_frozen
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
    """Every pooling holds the same vectors: of one block, `(clips, width)`, or of several, `(clips, blocks, width)`."""
    vectors = vectors.astype(np.float32)
    vectors = vectors[:, None] if vectors.ndim == 2 else vectors
    count = 0 if patches is None else patches.shape[1]
    parts = ("cls", "mean", "std", "mean_by_frequency", "max_by_frequency")
    arrays = dict.fromkeys([*parts, "log_mel_mean", "log_mel_std", "log_mel_max_by_frequency"], vectors)
    arrays["lengths"] = np.full(len(vectors), count if length is None else length)
    arrays |= {} if patches is None else {"patches": patches}
    return Features(arrays, np.arange(len(vectors)), tuple(range(1, vectors.shape[1] + 1)))


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
    features.arrays["std"] = features.arrays["std"] + 4 * labels[:, None, None].astype(np.float32)
    assert result("linear_mean", features, labels) < 0.6
    assert result("linear_mean_and_std", features, labels) > 0.95


@pytest.mark.parametrize("name", ["weighted_sum_mean", "gated_mean"])
def test_a_combination_of_blocks_finds_the_one_that_holds_the_classes(name):
    generator = np.random.default_rng(0)
    labels = np.arange(400) % 4
    vectors = generator.standard_normal((400, 3, 8))
    vectors[:, 1, :4] += 4 * np.eye(4)[labels]
    features = features_of(vectors)
    assert result("linear_mean", features, labels) < 0.4  # of the last block
    probe = build_probe(name, FAST).fit(features.select(TRAIN), labels[TRAIN], 0)
    assert score(probe.scores(features.select(TEST)), labels[TEST]) > 0.95
    standardised = torch.from_numpy(((vectors - vectors[TRAIN].mean(0)) / vectors[TRAIN].std(0)).astype(np.float32))
    assert probe.head.head.layer_pooling.weights(standardised[TEST]).mean(0).argmax() == 1


def test_gates_choose_a_block_for_each_clip():
    """In every other clip the class is in the first block, else in the second, and the other one holds a wrong class. The last channel says
    which."""
    generator = np.random.default_rng(0)
    labels, wrong, first = np.arange(400) % 4, generator.integers(0, 4, 400), generator.random(400) < 0.5
    vectors = 0.1 * generator.standard_normal((400, 2, 5))
    vectors[:, :, :4] += np.eye(4)[np.stack((np.where(first, labels, wrong), np.where(first, wrong, labels)), axis=1)]
    vectors[:, :, 4] += np.stack((first, ~first), axis=1)
    features = features_of(vectors)
    assert result("gated_mean", features, labels) > 0.95
    assert result("weighted_sum_mean", features, labels) < 0.75


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
    louder = features_of(marked.pooled("mean"), np.array(marked.arrays["patches"]), length=20)
    louder.arrays["patches"][:, 20:] = 1e3
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


@pytest.mark.parametrize("name", ["linear_cls", "attentive", "prototype", "knn", "weighted_sum_mean", "gated_mean_and_std"])
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


def test_the_choice_for_a_fold_never_meets_its_clips():
    folds = [str(i % 4) for i in range(40)]
    targets = np.arange(40) % 2
    partitions = [part for part in hold_out_each(folds) if part.name != "3"]
    inner = inner_folds(folds, partitions, targets)
    assert len(inner) == 6  # pairs of folds, each trained on once
    for part in partitions:
        serving = [fold for fold in inner if part.name in fold.scored]
        assert len(serving) == 3
        for fold in serving:
            assert not set(part.evaluation) & {*fold.train, *fold.scored[part.name]}
            assert not set(fold.train) & set(fold.scored[part.name])
        assert sorted(np.concatenate([fold.scored[part.name] for fold in serving])) == part.train.tolist()
    assert all("3" not in fold.scored for fold in inner)  # which is not held out


def test_training_clips_without_folds_are_cut_into_fifths_for_the_choice():
    folds = ["train"] * 30 + ["test"] * 10
    targets = np.arange(40) % 3
    test = next(part for part in hold_out_each(folds) if part.name == "test")
    inner = inner_folds(folds, [test], targets)
    assert len(inner) == 5
    assert sorted(np.concatenate([fold.scored["test"] for fold in inner])) == list(range(30))
    for fold in inner:
        assert sorted([*fold.train, *fold.scored["test"]]) == list(range(30))
        assert np.bincount(targets[fold.scored["test"]]).tolist() == [2, 2, 2]
    with pytest.raises(
        UserError, match="no training clip with test and a fifth of the others held out, as best_linear does, has the class b"
    ):
        check_inner_folds(inner, np.array([1] + [0] * 39), ["a", "b"])
    tags = np.zeros((40, 1))
    tags[inner[0].scored["test"]] = 1
    with pytest.raises(UserError, match="no clip that best_linear scores with test and a fifth of the others held out has a label"):
        check_inner_folds(inner[1:], tags, ["a"])


def test_the_best_is_chosen_by_other_folds_and_may_be_the_worse_one():
    """The first block holds the classes but in fold 3; the second holds them, less clearly, everywhere."""
    generator = np.random.default_rng(0)
    folds, labels = np.repeat(np.arange(4), 100), np.arange(400) % 2
    vectors = generator.standard_normal((400, 2, 4))
    vectors[:, 0, 0] += 6 * labels * (folds != 3)
    vectors[:, 1, 0] += 2 * labels
    features, partitions = features_of(vectors), hold_out_each([str(fold) for fold in folds])
    rows = [ProbedBlock("linear_mean", block) for block in (1, 2)]
    candidates = {row: run_probe(row.probe, features, labels, partitions, block=row.block) for row in rows}
    inner = inner_folds([str(fold) for fold in folds], partitions, labels)
    values, chosen = choose_best(candidates, features, labels, partitions, inner)
    assert chosen[3] == rows[0]
    assert values[3] == candidates[rows[0]][3] < 0.7 < candidates[rows[1]][3]  # the other block would have been better
    assert values.shape == (4, 1)
    for row, partition in enumerate(partitions):  # by brute force
        means = []
        for candidate in rows:
            others = hold_out_each([str(fold) for fold in folds[partition.train]])
            within = features.select(partition.train)
            means.append(run_probe(candidate.probe, within, labels[partition.train], others, block=candidate.block).mean())
        assert chosen[row] == rows[int(np.argmax(means))]


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
    tags = np.array([[1, 0], [0, 1], [0, 0], [0, -100]])
    with pytest.raises(UserError, match="no clip of fold 7 has a label, so nothing can be measured there: leave it out of test_folds"):
        check_partitions([Partition("fold 7", np.array([0, 1]), np.array([2, 3]))], tags, ["dog", "cat"])


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


def cells(text: str) -> list[list[str]]:
    """Of the table that the command prints."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_command_makes_one_table_of_all_probes_against_untrained_networks_and_the_log_mel(run, tmp_path):
    text, results = run()
    header, *lines = cells(text)
    assert header == ["accuracy, %", "block", "trained", "untrained", "gain", "log-mel"]
    assert [line[0] for line in lines] == [PROBES[name][0] for name in DEFAULT_PROBES]
    assert {line[1] for line in lines} == {"2"}  # the last block
    assert [line[5] == "-" for line in lines] == [True, False, False, False, True, True, False]  # it has no CLS token, and no patches
    rows = {row["probe"]: row for row in results["probes"]}
    assert {name: np.shape(row["trained"]["values"]) for name, row in rows.items()} == {
        **dict.fromkeys(["linear_cls", "linear_mean", "linear_mean_and_std", "linear_max_by_frequency", "knn"], (2, 1)),
        **dict.fromkeys(["attentive", "prototype"], (2, 2)),
    }
    assert np.shape(rows["knn"]["untrained"]["values"]) == (2, 2)
    assert rows["linear_mean"]["log_mel"]["summary"]["mean"] == 1  # hum and hiss: a mean is enough
    assert results["clips"] == {fold: {"training": 8, "evaluation": 8} for fold in ("0", "1")}
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 3  # the network and two untrained ones
    assert not (tmp_path / "out" / "accuracy_by_block.png").exists()  # of one block


def test_the_log_mel_alone_is_a_probe_too(run):
    text, results = run("--probes", "log_mel_statistics", "linear_mean_and_std")
    assert [cells(text)[1][column] for column in (1, 3, 4, 5)] == ["-"] * 4
    assert results["probes"][0]["trained"]["values"] == results["probes"][1]["log_mel"]["values"]


def test_the_command_probes_every_block_chooses_the_best_and_draws_a_picture(run, tmp_path):
    names = ["linear_mean", "linear_max_by_frequency", "best_linear", "weighted_sum_mean", "gated_max_by_frequency"]
    text, results = run("--layers", "all", "--probes", *names)
    rows = {(row["probe"], row["block"]): row for row in results["probes"]}
    assert list(rows) == [
        *(("linear_mean", 1), ("linear_mean", 2), ("linear_max_by_frequency", 1), ("linear_max_by_frequency", 2)),
        *(("best_linear", None), ("weighted_sum_mean", None), ("gated_max_by_frequency", None)),
    ]
    assert all(row.keys() == {"probe", "block", "trained", "untrained", "gain", "log_mel"} for row in rows.values())
    for who, networks in (("trained", 1), ("untrained", 2), ("log_mel", 1)):
        best = rows["best_linear", None][who]
        assert np.shape(best["values"]) == (2, networks)
        for network, by_fold in enumerate(best["chosen"]):
            for fold, chosen in enumerate(by_fold):
                where = rows[chosen["probe"], chosen["block"] or 1][who]["values"][fold]  # the log-mel, block 0, is beside each block
                assert best["values"][fold][network] == where[network]
    assert rows["weighted_sum_mean", None]["log_mel"] == rows["linear_mean", 1]["log_mel"]
    picture = tmp_path / "out" / "accuracy_by_block.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"results by block are drawn in {picture}" in text
    run("--layers", "2", "--probes", "linear_mean", "--no_untrained")
    assert not picture.exists()  # it would be of other results


def row(probe: str, block: int | None, **means: float) -> dict:
    summaries = {who: {"summary": {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}} for who, mean in means.items()}
    return {"probe": probe, "block": block, **summaries}


def test_the_picture_shows_what_the_table_says(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn, save = [], figure.savefig
    monkeypatch.setattr(figure, "savefig", lambda self, *given, **options: drawn.append(self) or save(self, *given, **options))
    rows = [row("linear_mean", block, trained=0.5 + block / 100, untrained=0.4, log_mel=0.3) for block in (1, 2, 6)]
    rows += [row("linear_cls", 6, trained=0.9), row("gated_mean", None, trained=0.7), row("gated_cls", None, trained=0.8)]
    assert replace_block_plot({"metric": "mean_average_precision", "probes": rows}, tmp_path)
    [axes] = drawn[0].axes  # of the CLS token there is one block, and so no curve
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("block", "mean average precision, %, with 95 % interval")
    assert axes.get_title() == "mean of patches"
    lines = {line.get_label(): (list(line.get_xdata()), pytest.approx(line.get_ydata())) for line in axes.get_lines()}
    assert lines == {
        "trained network": ([1, 2, 6], [51, 52, 56]),
        "untrained network": ([1, 2, 6], [40, 40, 40]),
        "gates over all blocks": ([0, 1], [70, 70]),  # from edge to edge
        "log-mel, no network": ([0, 1], [30, 30]),
    }


def test_without_matplotlib_there_is_a_warning_and_no_picture(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "accuracy_by_block.png").write_bytes(b"of an earlier run")
    results = {"metric": "accuracy", "probes": [row("linear_mean", block, trained=0.5) for block in (1, 2)]}
    assert not replace_block_plot(results, tmp_path)
    assert "plots need matplotlib" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_a_block_and_the_patches_of_another_one_can_be_chosen(run):
    _, results = run("--layers", "0", "1", "--patch_layer", "1", "--probes", "linear_cls", "attentive", "--no_untrained")
    assert [(row["probe"], row["block"]) for row in results["probes"]] == [("linear_cls", 0), ("linear_cls", 1), ("attentive", 1)]
    # The CLS token is the same at the input of the first block, whatever the clip.
    assert results["probes"][0]["trained"]["summary"]["mean"] == 0.5


def test_the_command_takes_splits_and_several_labels(run):
    splits = ("--fold_column", "null", "--label_column", "tags", "--label_separator", ";", "--no_untrained")
    text, results = run(*splits, "--probes", "attentive", "linear_cls", "linear_mean", "best_linear")
    assert cells(text)[0] == ["mean average precision, %", "block", "trained", "log-mel"]
    assert results["classes"] == ["broad", "x"]
    assert results["clips"] == {"test": {"training": 10, "evaluation": 6}}
    assert np.shape(results["probes"][0]["trained"]["values"]) == (1, 2)
    assert results["probes"][1]["trained"]["summary"]["std"] is None


def test_some_folds_can_be_held_out(run):
    _, results = run("--probes", "linear_cls", "--no_untrained", "--test_folds", "01")
    assert results["clips"] == {"1": {"training": 8, "evaluation": 8}}


def test_the_published_protocol_is_fine_tuning_of_a_frozen_encoder(run, tmp_path):
    changes = ["--published.num_train_epochs", "1", "--published.augmentation", "{roll: false}"]
    _, results = run("--probes", "published_linear", "--seeds", "3", *changes)
    assert np.shape(results["probes"][0]["trained"]["values"]) == (2, 1)
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
        ("--layers 3", r"layers is \[3\], but all, or numbers from -2 to 2"),
        ("--patch_layer 5", r"layers is \[5\]"),
        ("--probes linear_mean best_linear", "chooses among linear probes and layers.*give several of either"),
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
