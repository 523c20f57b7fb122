"""Intervals: equal to scipy's and to textbooks', with undefined resamples counted."""

import math

import numpy as np
import pytest
from scipy import stats

from transformers_sslam.evaluation.intervals import (
    Summary,
    independent_values,
    logit_interval,
    percentile_interval,
    proportion_interval,
    resampled_rows,
    summarize,
    summarize_difference,
    widen_by_clips,
)


RUNS = [0.842, 0.858, 0.831, 0.847, 0.85]
OTHER_RUNS = [0.83, 0.84, 0.836, 0.829, 0.841]


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_of_a_mean_is_students(confidence):
    summary = summarize(RUNS, confidence)
    expected = stats.t.interval(confidence, len(RUNS) - 1, loc=np.mean(RUNS), scale=stats.sem(RUNS))
    assert (summary.low, summary.high) == pytest.approx(expected, abs=1e-12)
    assert (summary.mean, summary.std, summary.count) == (pytest.approx(np.mean(RUNS)), pytest.approx(stats.tstd(RUNS)), 5)


def test_interval_of_two_runs_worked_out_by_hand():
    # Two runs: half the distance times t(1 degree of freedom) = tan(pi / 2 * 0.95).
    summary = summarize([1.0, 3.0])
    half = math.tan(math.pi / 2 * 0.95)
    assert (summary.mean, summary.std) == (2, pytest.approx(math.sqrt(2)))
    assert (summary.low, summary.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)


def test_difference_is_that_of_a_paired_t_test():
    summary = summarize_difference(RUNS, OTHER_RUNS, confidence=0.9)
    expected = stats.ttest_rel(RUNS, OTHER_RUNS).confidence_interval(0.9)
    assert (summary.low, summary.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert summary.mean == pytest.approx(np.mean(RUNS) - np.mean(OTHER_RUNS), abs=1e-12)


def test_one_run_has_no_standard_deviation_and_no_interval():
    summary = summarize([0.5])
    assert (summary.mean, summary.count) == (0.5, 1)
    assert np.isnan([summary.std, summary.low, summary.high]).all()


def test_summary_as_a_dictionary():
    assert Summary(0.5, 0.1, 0.4, 0.6, 3).to_dict() == {"mean": 0.5, "std": 0.1, "low": 0.4, "high": 0.6, "count": 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarize([]), r"values have shape \(0,\)"),
        (lambda: summarize([[1.0, 2.0]]), r"values have shape \(1, 2\), but one number for each run"),
        (lambda: summarize([1.0, float("nan")]), "the value of run 1 is nan"),
        (lambda: summarize(RUNS, confidence=95), "confidence is 95, but must lie between 0 and 1"),
        (lambda: summarize_difference(RUNS, OTHER_RUNS[:-1]), "there are 5 values and 4 others"),
        (lambda: resampled_rows(0, 10, seed=0), "num_samples is 0"),
        (lambda: resampled_rows(3, 0, seed=0), "resamples 0"),
        (lambda: percentile_interval(np.zeros(3), 1.0), "confidence is 1.0"),
        (lambda: percentile_interval(np.array([0.0, np.inf]), 0.9), "a resample has an infinite value"),
        (lambda: proportion_interval(0, 0), "successes are 0 of 0 trials"),
        (lambda: proportion_interval(21, 20), "successes are 21 of 20 trials"),
        (lambda: proportion_interval(1, 2, 95), "confidence is 95"),
    ],
)
def test_an_undefined_interval_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ],
)
def test_interval_of_a_proportion_is_the_textbooks(successes, trials, low, high):
    found = proportion_interval(successes, trials)
    assert found == pytest.approx((low, high), abs=5e-5)
    z, p = stats.norm.ppf(0.975), successes / trials
    center, half = p + z**2 / (2 * trials), z * math.sqrt(p * (1 - p) / trials + z**2 / (4 * trials**2))
    assert found == pytest.approx(((center - half) / (1 + z**2 / trials), (center + half) / (1 + z**2 / trials)), abs=1e-12)


def test_percentile_interval_is_scipys_on_equal_draws():
    values = np.random.default_rng(1).exponential(size=50)
    replicates = np.array([values[rows].std() for rows in resampled_rows(50, 400, seed=7)])
    expected = stats.bootstrap(
        (values,), np.std, confidence_level=0.9, n_resamples=400, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    low, high, undefined = percentile_interval(replicates, 0.9)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert undefined == 0


def test_resamples_are_drawn_with_replacement_from_all_rows():
    rows = np.stack(list(resampled_rows(6, 2000, seed=0)))
    assert rows.shape == (2000, 6)
    np.testing.assert_allclose(np.bincount(rows.ravel()) / rows.size, 1 / 6, atol=0.01)
    distinct = np.mean([len(set(row)) for row in rows])
    assert distinct == pytest.approx(6 * (1 - (5 / 6) ** 6), abs=0.05)


def test_resamples_without_a_value_are_left_out_and_counted():
    replicates = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.nan], [2.0, np.nan]])
    low, high, undefined = percentile_interval(replicates, 0.5)
    np.testing.assert_allclose(low, [1.5, np.nan])  # the middle half of 1, 2, 3
    np.testing.assert_allclose(high, [2.5, np.nan])
    assert undefined.tolist() == [1, 4]


def resampled_means(fractions: np.ndarray, resamples: int) -> np.ndarray:
    return np.array([fractions[rows].mean() for rows in resampled_rows(len(fractions), resamples, seed=7)])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_logit_interval_is_that_of_scipys_standard_error_on_equal_draws(confidence):
    fractions = np.random.default_rng(1).beta(2, 1, size=30)
    low, high, undefined = logit_interval(fractions.mean(), resampled_means(fractions, 400), confidence)
    error = stats.bootstrap((fractions,), np.mean, n_resamples=400, method="percentile", rng=np.random.default_rng(7)).standard_error
    value = fractions.mean()
    factor = math.exp(stats.norm.ppf((1 + confidence) / 2) * error / (value * (1 - value)))  # of the odds
    odds = value / (1 - value)
    assert (low, high) == pytest.approx((odds / factor / (1 + odds / factor), odds * factor / (1 + odds * factor)), abs=1e-12)
    assert undefined == 0


def test_logit_interval_of_a_fraction_near_one_stays_inside():
    fractions = np.repeat([1.0, 0.7], [29, 1])
    value, replicates = fractions.mean(), resampled_means(fractions, 400)
    assert value + stats.norm.ppf(0.975) * replicates.std() > 1  # on the scale of fractions it would not
    low, high, _ = logit_interval(value, replicates, 0.95)
    assert 0 < low < value < high < 1
    np.testing.assert_array_equal(logit_interval(np.array([0.0, 1.0]), np.tile([0.0, 1.0], (9, 1)), 0.95)[:2], [[0, 1], [0, 1]])


def test_logit_interval_leaves_out_and_counts_resamples_without_a_value():
    replicates = np.array([[0.4, np.nan, np.nan], [np.nan, np.nan, np.nan], [0.6, np.nan, 0.5]])
    low, high, undefined = logit_interval(np.full(3, 0.5), replicates, 0.95)
    expected = logit_interval(np.array(0.5), np.array([0.4, 0.6]), 0.95)
    np.testing.assert_array_equal(low, [expected[0], np.nan, np.nan])  # one replicate has no spread
    np.testing.assert_array_equal(high, [expected[1], np.nan, np.nan])
    assert undefined.tolist() == [1, 3, 2]


@pytest.mark.parametrize("value", [-0.1, 1.1, 1.0, np.nan])
def test_logit_interval_of_a_value_without_logit_is_an_error(value):
    with pytest.raises(ValueError, match=f"the values are {value}, but must lie in"):
        logit_interval(np.array(value), np.array([0.9, 1.0]), 0.95)
    with pytest.raises(ValueError, match="confidence is 95"):
        logit_interval(np.array(0.5), np.array([0.9, 1.0]), 95)


def test_folds_that_agree_are_not_certain():
    """Four folds of 20 correct clips of 20: "square and add" of Wilson's [0.839, 1]."""
    wilson = proportion_interval(20, 20)
    summary = widen_by_clips(summarize([1.0] * 4), [1.0] * 4, [wilson] * 4, [1, 2, 3, 4])
    assert (summary.mean, summary.std, summary.count) == (1.0, 0.0, 4)
    assert (summary.low, summary.high) == pytest.approx((1 - (1 - 0.838875) / 2, 1.0), abs=1e-6)
    seeds = widen_by_clips(summarize([1.0] * 3), [1.0] * 3, [wilson] * 3, ["same clips"] * 3)
    assert (seeds.low, seeds.high) == pytest.approx((0.838875, 1.0), abs=1e-6)  # three seeds are no more clips
    one = widen_by_clips(summarize([1.0]), [1.0], [wilson], [1])
    assert (one.low, one.high) == pytest.approx((0.838875, 1.0), abs=1e-6)


def test_folds_that_differ_keep_their_own_interval_within_what_is_possible():
    values = [0.5, 0.9, 1.0]
    summary = summarize(values)
    assert summary.high > 1
    widened = widen_by_clips(summary, values, [proportion_interval(round(1000 * value), 1000) for value in values], [1, 2, 3])
    assert (widened.low, widened.high) == (summary.low, 1.0)
    seeds = [1.0, 0.9, 0.9, 0.8]  # two seeds of two folds
    widened = widen_by_clips(summarize([0.95, 0.85]), seeds, [(value - 0.1, value) for value in seeds], [1, 1, 2, 2])
    assert widened.low == pytest.approx(max(0.0, min(summarize([0.95, 0.85]).low, 0.9 - 0.1 / 2**0.5)))


def test_seeds_of_one_fold_count_once_and_of_a_single_fold_each():
    assert independent_values([0.5, 0.7, 0.8, 0.7], [1, 2, 3, 1]) == pytest.approx([0.6, 0.7, 0.8])
    assert independent_values([0.5, 0.7], [2, 2]) == [0.5, 0.7]
    with pytest.raises(ValueError, match="zip"):
        independent_values([0.5], [1, 2])
