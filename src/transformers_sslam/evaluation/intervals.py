"""Confidence intervals: over runs, which vary with the training, and by the bootstrap over clips, for one trained model."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


try:
    from scipy.special import expit, logit, ndtri, stdtrit
    from scipy.stats import binomtest
except ImportError as error:
    raise ImportError('intervals need scipy: pip install "transformers-sslam[train]"') from error


@dataclass(frozen=True)
class Summary:
    """Several runs in five numbers, in the unit of their values.

    Attributes:
        mean: over the runs.
        std: standard deviation over the runs (divided by `count - 1`); NaN for one run.
        low, high: confidence interval of the mean by Student's t, for independent normal runs; NaN for one run. Folds of a cross-validation
            share training clips, which makes it rather too narrow.
        count: number of runs.
    """

    mean: float
    std: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)


def summarize(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, standard deviation and interval of `values: (runs,)`.

    Raises:
        ValueError: if there is no value, one is not finite, or `confidence` is not between 0 and 1.
    """
    check_confidence(confidence)
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim != 1 or len(runs) == 0:
        raise ValueError(f"values have shape {runs.shape}, but one number for each run is expected, and at least one run")
    if not np.isfinite(runs).all():
        raise ValueError(f"the value of run {np.flatnonzero(~np.isfinite(runs))[0]} is {runs[~np.isfinite(runs)][0]}: leave that run out")
    count, mean = len(runs), float(runs.mean())
    if count == 1:
        return Summary(mean, float("nan"), float("nan"), float("nan"), count)
    std = float(runs.std(ddof=1))
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * std / count**0.5
    return Summary(mean, std, mean - half, mean + half, count)


def summarize_difference(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Summary:
    """Summary of `values - others`, both `(runs,)`, the same folds or seeds in the same order: the interval of a paired t-test.

    Raises:
        ValueError: as [`summarize`], and if the two differ in length.
    """
    if len(values) != len(others):
        raise ValueError(f"there are {len(values)} values and {len(others)} others: give pairs of the same fold or seed")
    return summarize(np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64), confidence)  # type: ignore[arg-type]


def widen_by_clips(summary: Summary, values: Sequence[float], intervals: Sequence[tuple[float, float]], folds: Sequence[Any]) -> Summary:
    """A summary of a metric in [0, 1] whose interval is at least as wide as that over clips, and stays between 0 and 1.

    Student's t knows only how much folds differ: where they happen to agree, as in four folds of 20 correct clips of 20, its interval would
    have no width. Intervals of the folds combine to one of their mean by "square and add" (MOVER; Zou and Donner, Statistics in Medicine
    27, 2008): the distances of its ends from the mean are the roots of the sums of squares, divided by the number of folds. Of one run, it
    is the run's own.

    Args:
        summary: of the values, by Student's t.
        values: `(runs,)`, in [0, 1].
        intervals: `(runs, 2)`, over the clips of each.
        folds: what each was tested on, as of [`independent_values`]. Seeds of one fold share its clips: their distances are averaged.
    """
    below, above = (
        independent_values([abs(value - interval[end]) for value, interval in zip(values, intervals, strict=True)], folds) for end in (0, 1)
    )
    if len(set(folds)) == 1:  # all values are on the same clips
        low, high = summary.mean - sum(below) / len(below), summary.mean + sum(above) / len(above)
    else:
        low, high = (summary.mean + sign * sum(side**2 for side in sides) ** 0.5 / len(sides) for sign, sides in ((-1, below), (1, above)))
    return replace(summary, low=max(0.0, float(np.fmin(summary.low, low))), high=min(1.0, float(np.fmax(summary.high, high))))


def format_summary(summary: Summary, scale: float = 100, decimals: int = 1) -> str:
    """Mean ± standard deviation [confidence interval], such as "84.2 ± 1.3 [82.9, 85.5]", times `scale`; of one run the mean alone."""
    mean, std, low, high = (f"{scale * value:.{decimals}f}" for value in (summary.mean, summary.std, summary.low, summary.high))
    return mean if summary.count == 1 else f"{mean} ± {std} [{low}, {high}]"


def independent_values(values: Sequence[float], folds: Sequence[Any]) -> list[float]:
    """Of values and the `folds` that they were tested on, `(runs,)` each, those that count as independent: each fold's mean, because its
    seeds share test clips; of a single fold, all values.
    """
    by_fold: dict[Any, list[float]] = {}
    for fold, value in zip(folds, values, strict=True):
        by_fold.setdefault(fold, []).append(value)
    return [sum(found) / len(found) for found in by_fold.values()] if len(by_fold) > 1 else list(values)


def proportion_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927), without continuity correction, of a proportion such as accuracy.

    Unlike a bootstrap's, it has a width where all trials agree: 20 of 20 give [0.839, 1].

    Raises:
        ValueError: if there is no trial, or `successes` or `confidence` is out of range.
    """
    check_confidence(confidence)
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"successes are {successes} of {trials} trials, but must lie between 0 and a positive number of trials")
    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def resampled_rows(num_samples: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """The bootstrap's draws with replacement: `resamples` times `(num_samples,)` indices.

    Raises:
        ValueError: if either number is not positive.
    """
    if num_samples < 1 or resamples < 1:
        raise ValueError(f"num_samples is {num_samples} and resamples {resamples}, but both must be positive")
    generator = np.random.default_rng(seed)
    return (generator.integers(num_samples, size=num_samples) for _ in range(resamples))


def percentile_interval(replicates: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Percentile bootstrap (Efron, 1979): the middle `confidence` of each statistic's replicates.

    Args:
        replicates: `(resamples, ...)`; NaN where a statistic is undefined in a resample.
        confidence: fraction of the replicates between the bounds.

    Returns:
        `low`, `high` and the number of NaN left out, each `(...)`; the bounds are NaN where none is left.

    Raises:
        ValueError: if a replicate is infinite, or `confidence` is not between 0 and 1.
    """
    check_confidence(confidence)
    if np.isinf(replicates).any():
        raise ValueError("a resample has an infinite value, but percentiles need finite ones: give those, and convert the bounds")
    undefined = np.isnan(replicates)
    bounds = np.full((2, *replicates.shape[1:]), np.nan)
    some = ~undefined.all(axis=0)
    bounds[:, some] = np.nanquantile(replicates[:, some], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return bounds[0], bounds[1], undefined.sum(axis=0)


def logit_interval(values: np.ndarray, replicates: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal interval around a value in [0, 1], on the logit scale: `logit(value) ± z * error / (value * (1 - value))`, transformed back.

    The logit interval of Boyd, Eng and Page (ECML PKDD 2013) for areas under precision-recall curves, with the standard deviation of the
    replicates as `error`. So it contains the value even where all replicates lie on one side of it, and stays between 0 and 1.

    Args:
        values: `(...)`, each statistic of the clips themselves.
        replicates: `(resamples, ...)`; NaN where a statistic is undefined in a resample.
        confidence: of the interval.

    Returns:
        `low`, `high` and the number of NaN left out, each `(...)`; the bounds are NaN where fewer than two are left.

    Raises:
        ValueError: if a value is outside [0, 1], or 0 or 1 although replicates differ, or `confidence` is not between 0 and 1.
    """
    check_confidence(confidence)
    defined = ~np.isnan(replicates)
    errors, some = np.full(replicates.shape[1:], np.nan), defined.sum(axis=0) > 1
    errors[some] = np.nanstd(replicates[:, some], axis=0, ddof=1)
    if not ((values >= 0) & (values <= 1)).all() or (np.isin(values, (0, 1)) & (errors > 0)).any():
        raise ValueError(f"the values are {values}, but must lie in [0, 1], and inside if replicates differ: use percentile_interval")
    # Without spread the bounds are the value, also at 0 and 1.
    half = np.divide(ndtri((1 + confidence) / 2) * errors, values * (1 - values), out=np.zeros_like(errors), where=errors != 0)
    return expit(logit(values) - half), expit(logit(values) + half), (~defined).sum(axis=0)


def check_confidence(confidence: float) -> None:
    """`ValueError` unless between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie between 0 and 1, for example 0.95")
