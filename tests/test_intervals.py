"""Intervals: equal to scipy's, and open about what is not defined."""

import logging
import math

import numpy as np
import pytest
from scipy import stats

from transformers_sslam.evaluation.intervals import (
    Summary,
    bootstrap_interval,
    logit_interval,
    percentile_interval,
    resampled_rows,
    summarize,
    summarize_difference,
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


def test_one_run_has_no_deviation_and_no_interval():
    summary = summarize([0.5])
    assert (summary.mean, summary.count) == (0.5, 1)
    assert np.isnan([summary.std, summary.low, summary.high]).all()


def test_summary_as_a_dictionary():
    assert Summary(0.5, 0.1, 0.4, 0.6, 3).to_dict() == {"mean": 0.5, "std": 0.1, "low": 0.4, "high": 0.6, "count": 3}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summarize([]), r"values have shape \(0,\)"),
        (lambda: summarize([[1.0, 2.0]]), r"values have shape \(1, 2\), but one number a run"),
        (lambda: summarize([1.0, float("nan")]), "the value of run 1 is nan"),
        (lambda: summarize(RUNS, confidence=95), "confidence is 95, but must lie between 0 and 1"),
        (lambda: summarize_difference(RUNS, OTHER_RUNS[:-1]), "there are 5 values and 4 others"),
        (lambda: bootstrap_interval(np.mean, 0), "num_samples is 0"),
        (lambda: bootstrap_interval(np.mean, 3, resamples=0), "resamples 0"),
        (lambda: bootstrap_interval(np.mean, 3, confidence=1.0), "confidence is 1.0"),
        (lambda: bootstrap_interval(lambda rows: np.inf, 3), "a resample gives an infinite value"),
    ],
)
def test_what_has_no_interval_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bootstrap_is_scipys_on_equal_draws():
    values = np.random.default_rng(1).exponential(size=50)
    low, high = bootstrap_interval(lambda rows: values[rows].std(), 50, confidence=0.9, resamples=400, seed=7)
    expected = stats.bootstrap(
        (values,), np.std, confidence_level=0.9, n_resamples=400, method="percentile", rng=np.random.default_rng(7)
    ).confidence_interval
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert isinstance(low, float)


def test_bootstrap_of_several_statistics_and_of_every_seed():
    values = np.random.default_rng(1).exponential(size=50)

    def both(rows):
        return values[rows].mean(), np.median(values[rows])

    low, high = bootstrap_interval(both, 50, resamples=200, seed=3)
    for i, statistic in enumerate((np.mean, np.median)):
        assert (low[i], high[i]) == bootstrap_interval(lambda rows, f=statistic: f(values[rows]), 50, resamples=200, seed=3)
    assert not np.array_equal(low, bootstrap_interval(both, 50, resamples=200, seed=4)[0])


def test_resamples_are_drawn_with_replacement_from_all_rows():
    rows = np.stack(list(resampled_rows(6, 2000, seed=0)))
    assert rows.shape == (2000, 6)
    np.testing.assert_allclose(np.bincount(rows.ravel()) / rows.size, 1 / 6, atol=0.01)
    distinct = np.mean([len(set(row)) for row in rows])
    assert distinct == pytest.approx(6 * (1 - (5 / 6) ** 6), abs=0.05)


def test_resamples_without_a_value_are_left_out_and_counted(caplog):
    replicates = np.array([[1.0, np.nan], [np.nan, np.nan], [3.0, np.nan], [2.0, np.nan]])
    low, high, undefined = percentile_interval(replicates, 0.5)
    np.testing.assert_allclose(low, [1.5, np.nan])  # the middle half of 1, 2, 3
    np.testing.assert_allclose(high, [2.5, np.nan])
    assert undefined.tolist() == [1, 4]

    expected = sum(0 not in rows for rows in resampled_rows(4, 100, seed=0))
    with caplog.at_level(logging.WARNING, "transformers_sslam"):
        assert bootstrap_interval(lambda rows: 1.0 if 0 in rows else np.nan, 4, resamples=100) == (1.0, 1.0)
    assert f"not defined in up to {expected} of 100 resamples" in caplog.text


def resampled_means(shares: np.ndarray, resamples: int) -> np.ndarray:
    return np.array([shares[rows].mean() for rows in resampled_rows(len(shares), resamples, seed=7)])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_logit_interval_is_that_of_scipys_standard_error_on_equal_draws(confidence):
    shares = np.random.default_rng(1).beta(2, 1, size=30)
    low, high, undefined = logit_interval(shares.mean(), resampled_means(shares, 400), confidence)
    error = stats.bootstrap((shares,), np.mean, n_resamples=400, method="percentile", rng=np.random.default_rng(7)).standard_error
    value = shares.mean()
    factor = math.exp(stats.norm.ppf((1 + confidence) / 2) * error / (value * (1 - value)))  # of the odds
    odds = value / (1 - value)
    assert (low, high) == pytest.approx((odds / factor / (1 + odds / factor), odds * factor / (1 + odds * factor)), abs=1e-12)
    assert undefined == 0


def test_logit_interval_of_a_share_near_one_stays_inside():
    shares = np.repeat([1.0, 0.7], [29, 1])
    value, replicates = shares.mean(), resampled_means(shares, 400)
    assert value + stats.norm.ppf(0.975) * replicates.std() > 1  # on the scale of shares it would not
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
def test_logit_interval_of_what_has_no_logit_is_an_error(value):
    with pytest.raises(ValueError, match=f"the values are {value}, but must be shares"):
        logit_interval(np.array(value), np.array([0.9, 1.0]), 0.95)
    with pytest.raises(ValueError, match="confidence is 95"):
        logit_interval(np.array(0.5), np.array([0.9, 1.0]), 95)
