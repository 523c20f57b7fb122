"""Metrics: equal to scikit-learn's, with undefined classes named."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, average_precision_score, roc_auc_score

from transformers_sslam.evaluation import metrics
from transformers_sslam.evaluation.intervals import percentile_interval, resampled_rows
from transformers_sslam.evaluation.metrics import accuracy, average_precision, d_prime, mean_over_classes


def random_tags(decimals: int, clips: int = 200, classes: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal((clips, classes)).round(decimals)
    return scores, (generator.random((clips, classes)) < generator.uniform(0.05, 0.6, classes)).astype(np.int64)


@pytest.mark.parametrize("decimals", [12, 1, 0])  # 0: a handful of distinct scores, so nearly all are ties
def test_average_precision_equals_scikit_learns(decimals):
    scores, targets = random_tags(decimals)
    expected = [average_precision_score(targets[:, i], scores[:, i]) for i in range(targets.shape[1])]
    np.testing.assert_allclose(average_precision(scores, targets), expected, rtol=0, atol=1e-12)
    result = mean_over_classes("average_precision", scores, targets)
    assert result["mean_average_precision"] == pytest.approx(average_precision_score(targets, scores, average="macro"), abs=1e-12)
    assert result["classes_without_positives"] == []


def test_average_precision_of_a_ranking_worked_out_by_hand():
    # Right ones at ranks 1, 3 and 4: (1/1 + 2/3 + 3/4) / 3. In the second class all tie: every clip comes in at 2/4.
    scores = np.array([[0.9, 0], [0.8, 0], [0.7, 0], [0.6, 0]])
    targets = np.array([[1, 1], [0, 0], [1, 1], [1, 0]])
    np.testing.assert_allclose(average_precision(scores, targets), [29 / 36, 0.5], atol=1e-15)


def test_classes_without_positives_are_named_and_left_out_of_the_mean():
    scores, targets = random_tags(12, classes=3)
    targets[:, 1] = 0
    result = mean_over_classes("average_precision", scores, targets, ["dog", "cat", "rain"])
    assert result["classes_without_positives"] == ["cat"]
    assert set(result["average_precision"]) == {"dog", "rain"}
    expected = np.mean([average_precision_score(targets[:, i], scores[:, i]) for i in (0, 2)])
    assert result["mean_average_precision"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("decimals", [12, 1, 0])
def test_roc_auc_equals_scikit_learns(decimals):
    scores, targets = random_tags(decimals)
    expected = [roc_auc_score(targets[:, i], scores[:, i]) for i in range(targets.shape[1])]
    result = mean_over_classes("roc_auc", scores, targets, confidence=None)
    np.testing.assert_allclose(list(result["roc_auc"].values()), expected, rtol=0, atol=1e-12)
    assert result["mean_roc_auc"] == pytest.approx(roc_auc_score(targets, scores, average="macro"), abs=1e-12)
    assert (result["classes_without_positives"], result["classes_without_negatives"]) == ([], [])


def test_roc_auc_worked_out_by_hand():
    # Positives 0.9 and 0.6 against negatives 0.8 and 0.6: won, won, lost, tied.
    result = mean_over_classes("roc_auc", [[0.9], [0.6], [0.8], [0.6]], [[1], [1], [0], [0]], confidence=None)
    assert result["mean_roc_auc"] == 2.5 / 4


def test_d_prime_of_two_normal_distributions_is_their_distance():
    generator = np.random.default_rng(0)
    targets = (generator.random((40_000, 1)) < 0.5).astype(np.int64)
    scores = generator.standard_normal(targets.shape) + 1.5 * targets
    auc = mean_over_classes("roc_auc", scores, targets, confidence=None)["mean_roc_auc"]
    assert d_prime(np.array(auc)) == pytest.approx(2**0.5 * stats.norm.ppf(auc), abs=1e-12) == pytest.approx(1.5, abs=0.05)
    assert d_prime(np.array([0.5, 1.0])).tolist() == [0, np.inf]


def test_classes_of_one_kind_are_named_and_left_out_of_the_auc():
    scores, targets = random_tags(12, classes=4)
    targets[:, 1], targets[:, 2] = 0, 1
    result = mean_over_classes("roc_auc", scores, targets, ["dog", "cat", "rain", "wind"])
    assert (result["classes_without_positives"], result["classes_without_negatives"]) == (["cat"], ["rain"])
    assert set(result["roc_auc"]) == set(result["roc_auc_interval"]) == {"dog", "wind"}
    expected = np.mean([roc_auc_score(targets[:, i], scores[:, i]) for i in (0, 3)])
    assert result["mean_roc_auc"] == pytest.approx(expected, abs=1e-12)


def brute_force(score, scores, targets):
    """Each class's value by scikit-learn, for given rows; NaN where it is not defined."""

    def by_class(rows):
        positives = targets[rows].sum(0)
        return np.array(
            [score(targets[rows, i], scores[rows, i]) if 0 < positives[i] < len(rows) else np.nan for i in range(targets.shape[1])]
        )

    return by_class


def percentiles(value, replicates):
    return np.nanquantile(replicates, [0.05, 0.95])


def around_the_value(value, replicates):
    """The 90 % interval: normal on the logit scale, by the bootstrap's standard error."""
    half = stats.norm.ppf(0.95) * np.nanstd(replicates, ddof=1) / (value * (1 - value))
    return 1 / (1 + (1 - value) / value * np.exp([half, -half]))


@pytest.mark.parametrize(
    ("metric", "score", "interval"),
    [("average_precision", average_precision_score, around_the_value), ("roc_auc", roc_auc_score, percentiles)],
)
def test_intervals_equal_a_loop_over_the_same_resamples(metric, score, interval, monkeypatch):
    monkeypatch.setattr(metrics, "WEIGHTS_AT_ONCE", 7 * 40)  # several blocks, the last one smaller
    scores, targets = random_tags(1, clips=40, classes=3)
    targets[:, 0] = np.arange(40) < 2  # rare: some resamples miss it
    result = mean_over_classes(metric, scores, targets, confidence=0.9, resamples=60, seed=5)

    by_class = brute_force(score, scores, targets)
    values, replicates = by_class(np.arange(40)), np.array([by_class(rows) for rows in resampled_rows(40, 60, seed=5)])
    for i in range(3):
        assert result[f"{metric}_interval"][str(i)] == pytest.approx(interval(values[i], replicates[:, i]), abs=1e-12)
    expected = interval(values.mean(), np.nanmean(replicates, axis=1))
    assert result[f"mean_{metric}_interval"] == pytest.approx(expected, abs=1e-12)
    missed = int(np.isnan(replicates)[:, 0].sum())
    assert missed > 0
    assert (result["undefined_resamples"], result["undefined_resamples_by_class"]) == (0, {"0": missed})


def test_resamples_without_any_class_are_left_out_and_counted():
    scores, targets = random_tags(12, clips=10, classes=1)
    targets[:] = np.arange(10)[:, None] == 3
    result = mean_over_classes("average_precision", scores, targets)
    assert result["undefined_resamples"] == result["undefined_resamples_by_class"]["0"]
    assert result["undefined_resamples"] / 1000 == pytest.approx(0.9**10, abs=0.05)
    assert np.isfinite(result["mean_average_precision_interval"]).all()


def test_accuracy_interval_is_wilsons():
    correct = np.arange(1000) < 700
    result = accuracy(correct, np.ones(1000, int))
    assert result["accuracy_interval"] == pytest.approx([0.670876, 0.727593], abs=1e-6)
    narrower = accuracy(correct, np.ones(1000, int), confidence=0.5)["accuracy_interval"]
    assert np.diff(narrower) < np.diff(result["accuracy_interval"]) / 2
    every = accuracy(np.arange(20), np.arange(20))
    assert (every["accuracy"], every["accuracy_interval"]) == (1.0, pytest.approx([0.838875, 1.0], abs=1e-6))


def test_auc_intervals_hold_the_truth_as_often_as_they_say():
    generator, covered = np.random.default_rng(0), 0
    truth = stats.norm.cdf(1.0 / np.sqrt(2))  # the AUC of normal distributions a unit apart
    for _ in range(100):
        targets = (generator.random((150, 2)) < 0.4).astype(np.int64)
        scores = generator.standard_normal(targets.shape) + targets
        low, high = mean_over_classes("roc_auc", scores, targets, confidence=0.8, resamples=200)["mean_roc_auc_interval"]
        covered += low <= truth <= high
    assert 70 <= covered <= 90  # 80 +- 2.5 standard deviations


def exclusive_classes(generator, classes: int, positives: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips of `positives` times `classes`, each of one class, with normal scores that are two standard deviations higher for it."""
    targets = np.eye(classes, dtype=np.int64)[np.arange(classes * positives) % classes]
    return generator.standard_normal(targets.shape) + 2 * targets, targets


def test_average_precision_of_rare_classes_lies_in_its_interval_and_not_among_its_resamples():
    scores, targets = exclusive_classes(np.random.default_rng(0), classes=200, positives=3)
    replicates = [np.nanmean(average_precision(scores[rows], targets[rows])) for rows in resampled_rows(600, 50, seed=0)]
    result = mean_over_classes("average_precision", scores, targets, resamples=50)
    value, (low, high) = result["mean_average_precision"], result["mean_average_precision_interval"]
    assert percentile_interval(np.array(replicates), 0.95)[0] > value  # a positive drawn twice supports itself
    assert low < value < high
    assert high - value == pytest.approx(1.96 * np.std(replicates), rel=0.05)


def test_average_precision_intervals_hold_what_other_clips_give_as_often_as_they_say():
    generator = np.random.default_rng(0)
    expected = np.mean([average_precision(*exclusive_classes(generator, 30, 6)).mean() for _ in range(200)])
    covered = 0
    for seed in range(100):
        scores, targets = exclusive_classes(generator, 30, 6)
        result = mean_over_classes("average_precision", scores, targets, confidence=0.8, resamples=100, seed=seed)
        low, high = result["mean_average_precision_interval"]
        covered += low <= expected <= high
    assert 70 <= covered <= 90  # 80 +- 2.5 standard deviations


def test_same_seed_gives_the_same_interval_and_none_gives_none():
    scores, targets = random_tags(1, clips=50, classes=2)
    values = [mean_over_classes("roc_auc", scores, targets, resamples=50, seed=seed) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    without = mean_over_classes("roc_auc", scores, targets, confidence=None)
    assert set(without) == {"mean_roc_auc", "roc_auc", "classes_without_positives", "classes_without_negatives"}
    assert set(accuracy([0, 1], [0, 1], confidence=None)) == {"accuracy"}


def test_accuracy_equals_scikit_learns():
    predictions, references = np.random.default_rng(0).integers(0, 5, (2, 101))
    assert accuracy(predictions, references)["accuracy"] == pytest.approx(accuracy_score(references, predictions), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        ([[0.1, np.nan]], [[0, 1]], "the score of clip 0 for class 1 is NaN"),
        ([[0.1, 0.2]], [[0, 2]], "targets hold 2, but must be 0 or 1"),
        ([[0.1, 0.2]], [[0, 0]], "no class has a positive clip"),
        ([[0.1, 0.2]], [[1]], r"scores have shape \(1, 2\) and targets \(1, 1\)"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "no clip to evaluate"),
    ],
)
def test_undefined_average_precision_is_an_error(scores, targets, message):
    with pytest.raises(ValueError, match=message):
        mean_over_classes("average_precision", scores, targets)


def test_accuracy_of_nothing_or_of_scores_and_names_that_do_not_fit_are_errors():
    for predictions, references in (([], []), ([1], [1, 1])):
        with pytest.raises(ValueError, match=r"both must be \(clips,\), with at least one"):
            accuracy(predictions, references)
    for predictions, references, name in (([np.nan], [0], "predictions"), ([1], [0.7], "references")):
        with pytest.raises(ValueError, match=f"{name} are of type float64, but class indices are expected: of scores, give their argmax"):
            accuracy(predictions, references)
    assert accuracy([True, False], [True, True], confidence=None) == {"accuracy": 0.5}
    with pytest.raises(ValueError, match="metric is 'rocauc', but one of average_precision, roc_auc is expected"):
        mean_over_classes("rocauc", [[0.1], [0.2]], [[0], [1]])
    with pytest.raises(ValueError, match="there are 1 class names, but 2 classes"):
        mean_over_classes("average_precision", [[0.1, 0.2]], [[0, 1]], ["dog"])
    with pytest.raises(ValueError, match="the class name 'dog' stands twice"):
        mean_over_classes("average_precision", [[0.1, 0.2]], [[0, 1]], ["dog", "dog"])


@pytest.mark.parametrize(
    ("arguments", "message"), [({"confidence": 95}, "confidence is 95"), ({"resamples": 0}, "resamples 0, but both must be positive")]
)
def test_invalid_intervals_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        mean_over_classes("roc_auc", [[0.1], [0.2]], [[0], [1]], **arguments)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (np.ma.masked_array([[0.1], [0.2]], [[0], [1]]), "a masked array"),
        (np.array([[1j], [2j]]), "of type complex128, but real numbers are expected"),
        (np.array([["1"], ["2"]]), "of type <U1"),
        (np.array([[None], [1.0]]), "of type object"),
    ],
)
def test_masked_arrays_and_what_is_not_a_real_number_are_errors(wrong, message):
    for scores, targets, name in ((wrong, [[0], [1]], "scores"), ([[0.1], [0.2]], wrong, "targets")):
        with pytest.raises(ValueError, match=f"{name} are {message}"):
            mean_over_classes("roc_auc", scores, targets)
    with pytest.raises(ValueError, match=f"references are {message}"):
        accuracy([0, 1], wrong[:, 0])


def test_auc_of_classes_of_one_kind_alone_is_an_error():
    with pytest.raises(ValueError, match="no class has a positive and a negative clip, so mean_roc_auc is undefined"):
        mean_over_classes("roc_auc", [[0.1, 0.2]], [[0, 1]])


@pytest.mark.parametrize(("metric", "trials"), [("average_precision", (20, 5)), ("roc_auc", (5, 5))])
def test_a_ranking_without_an_error_is_not_certain(metric, trials):
    """20 clips have the first class, 5 the second: Wilson's intervals of so many trials."""
    targets = np.repeat([[1, 0], [0, 1]], [20, 5], axis=0)
    found = mean_over_classes(metric, targets + 0.0, targets, ["a", "b"], resamples=50)
    assert found[metric] == {"a": 1.0, "b": 1.0}
    lows = [stats.binomtest(n, n).proportion_ci(method="wilson").low for n in (*trials, sum(trials))]
    assert found[f"{metric}_interval"]["a"] == pytest.approx([lows[0], 1.0])
    assert found[f"{metric}_interval"]["b"] == pytest.approx([lows[1], 1.0])
    assert found[f"mean_{metric}_interval"] == pytest.approx([lows[2], 1.0])
    assert lows[1] == pytest.approx(0.5655, abs=1e-4)


@pytest.mark.parametrize("metric", ["average_precision", "roc_auc"])
def test_metrics_of_the_library_evaluate_equal_the_functions_also_in_batches(metric):
    from transformers_sslam.evaluation.evaluate_metrics import MeanAveragePrecision, MeanRocAuc

    generator = np.random.default_rng(3)
    scores, targets = generator.random((60, 3)), generator.integers(0, 2, (60, 3))
    names = ["dog", "rain", "bell"]
    packaged = MeanRocAuc() if metric == "roc_auc" else MeanAveragePrecision()
    for rows in np.array_split(np.arange(60), 7):
        packaged.add_batch(predictions=scores[rows], references=targets[rows])
    found = packaged.compute(class_names=names, resamples=50)
    assert found == mean_over_classes(metric, scores, targets, names, resamples=50)
    assert found[metric].keys() == set(names)


def test_accuracy_of_the_library_evaluate_equals_the_function():
    from transformers_sslam.evaluation.evaluate_metrics import Accuracy

    predictions, references = [0, 1, 2, 2], [0, 1, 1, 2]
    assert Accuracy().compute(predictions=predictions, references=references) == accuracy(np.array(predictions), np.array(references))


def test_metrics_of_the_library_evaluate_round_nothing():
    from transformers_sslam.evaluation.evaluate_metrics import Accuracy, MeanAveragePrecision

    assert Accuracy().compute(predictions=np.array([1.0, 0.0]), references=[1, 1])["accuracy"] == 0.5
    with pytest.raises(ValueError, match="class indices are expected"):
        Accuracy().compute(predictions=np.array([1.7, 0.2]), references=np.array([1, 0]))
    with pytest.raises(ValueError, match=r"targets hold 0\.9"):
        MeanAveragePrecision().compute(predictions=[[0.9, 0.1], [0.2, 0.8]], references=[[1.0, 0.0], [0.9, 1.0]])
