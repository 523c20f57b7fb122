"""How sure a number is: means over runs with Student's t, paired differences, and the bootstrap over clips.

The two answer different questions. A mean over seeds or folds says how much a result changes when training is repeated; a bootstrap over
the clips of one evaluation says how much it would change with other clips, for the same trained model.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


try:
    from scipy.special import expit, logit, ndtri, stdtrit
except ImportError as error:
    raise ImportError('intervals need scipy: pip install "transformers-sslam[train]"') from error


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What several runs say together, in the unit of their values.

    Attributes:
        mean: over the runs.
        std: standard deviation over the runs, unbiased (divided by `count - 1`); NaN for one run.
        low, high: confidence interval of the mean by Student's t, as if runs were independent and normal; NaN for one run. Folds of a
            cross-validation share training clips, so their interval is too narrow rather than too wide.
        count: number of runs.
    """

    mean: float
    std: float
    low: float
    high: float
    count: int

    def to_dict(self) -> dict[str, Any]:
        """The five fields by name."""
        return asdict(self)


def summarize(values: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, deviation and interval of one value a run.

    Args:
        values: `(runs,)`.
        confidence: of the interval, for example 0.95.

    Raises:
        ValueError: if there is no value, one is not finite, or `confidence` does not lie between 0 and 1.
    """
    check_confidence(confidence)
    runs = np.asarray(values, dtype=np.float64)
    if runs.ndim != 1 or len(runs) == 0:
        raise ValueError(f"values have shape {runs.shape}, but one number a run is expected, (runs,), and at least one run")
    if not np.isfinite(runs).all():
        raise ValueError(f"the value of run {np.flatnonzero(~np.isfinite(runs))[0]} is {runs[~np.isfinite(runs)][0]}: leave that run out")
    count, mean = len(runs), float(runs.mean())
    if count == 1:
        return Summary(mean, float("nan"), float("nan"), float("nan"), count)
    std = float(runs.std(ddof=1))
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * std / count**0.5
    return Summary(mean, std, mean - half, mean + half, count)


def independent_values(values: Sequence[float], folds: Sequence[Any]) -> list[float]:
    """Of runs over folds and seeds, what may count as independent: each fold's mean, for its seeds are tested on the same clips.

    Args:
        values: `(runs,)`.
        folds: `(runs,)`, which fold each run was tested on. Where that is the same for all, its seeds are what varies: all values count.
    """
    by_fold: dict[Any, list[float]] = {}
    for fold, value in zip(folds, values, strict=True):
        by_fold.setdefault(fold, []).append(value)
    return [sum(found) / len(found) for found in by_fold.values()] if len(by_fold) > 1 else list(values)


def summarize_difference(values: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Summary:
    """Mean, deviation and interval of `values - others`, run by run: the interval of a paired t-test.

    Args:
        values, others: `(runs,)` each, the same folds or seeds in the same order.
        confidence: of the interval.

    Raises:
        ValueError: as `summarize`, and if the two differ in length.
    """
    if len(values) != len(others):
        raise ValueError(f"there are {len(values)} values and {len(others)} others, but each run needs its partner (same fold, same seed)")
    return summarize(np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64), confidence)  # type: ignore[arg-type]


def bootstrap_interval(
    statistic: Callable[[np.ndarray], Any], num_samples: int, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[Any, Any]:
    """Percentile bootstrap (Efron 1979) of whatever can be computed from rows: clips drawn with replacement, as many as there are.

    Args:
        statistic: takes `(num_samples,)` indices of rows and returns a number or an array, NaN where it is not defined for them.
        num_samples: number of rows, of which each resample draws as many.
        confidence: of the interval.
        resamples: how many to draw.
        seed: of the draws; the same seed gives the same rows to every statistic, so that two models can be compared on equal resamples.

    Returns:
        `low` and `high`, floats or arrays of the statistic's shape. Resamples in which it is not defined are left out, and a warning says
        how many; `percentile_interval` counts them for each element.

    Raises:
        ValueError: if `num_samples`, `confidence` or `resamples` cannot be, or the statistic of a resample is infinite.
    """
    check_confidence(confidence)
    replicates = np.stack([statistic(rows) for rows in resampled_rows(num_samples, resamples, seed)])
    low, high, undefined = percentile_interval(replicates, confidence)
    if undefined.any():
        logger.warning(
            f"the statistic is not defined in up to {undefined.max()} of {resamples} resamples: its interval is that of the others"
        )
    return (low, high) if low.ndim else (float(low), float(high))


def resampled_rows(num_samples: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """`resamples` times `(num_samples,)` indices, drawn uniformly with replacement.

    Raises:
        ValueError: if either number is not positive.
    """
    if num_samples < 1 or resamples < 1:
        raise ValueError(f"num_samples is {num_samples} and resamples {resamples}, but both must be positive")
    generator = np.random.default_rng(seed)
    return (generator.integers(num_samples, size=num_samples) for _ in range(resamples))


def percentile_interval(replicates: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The middle `confidence` of each statistic's replicates.

    Args:
        replicates: `(resamples, ...)`; NaN where a statistic is not defined in a resample: it is left out there, and counted.
        confidence: share of the replicates between the bounds.

    Returns:
        `low`, `high` and the number of replicates left out, each of shape `(...)`; the bounds are NaN where none is left.

    Raises:
        ValueError: if a replicate is infinite, or `confidence` cannot be.
    """
    check_confidence(confidence)
    if np.isinf(replicates).any():
        raise ValueError("a resample gives an infinite value, between which there are no percentiles: bound a finite one, and convert that")
    undefined = np.isnan(replicates)
    bounds = np.full((2, *replicates.shape[1:]), np.nan)
    some = ~undefined.all(axis=0)
    bounds[:, some] = np.nanquantile(replicates[:, some], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return bounds[0], bounds[1], undefined.sum(axis=0)


def logit_interval(values: np.ndarray, replicates: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal interval around a share, on the logit scale: `logit(value) ± z * error / (value * (1 - value))`, and back.

    The logit interval of Boyd, Eng and Page (ECML PKDD 2013) for areas under precision-recall curves, with the standard deviation of the
    replicates as `error`. It takes from resamples their spread alone, so it holds the value also where all of them lie on one side of it,
    and it needs no cutting to stay between 0 and 1.

    Args:
        values: `(...)`, each statistic of the rows themselves, from 0 to 1.
        replicates: `(resamples, ...)`; NaN where a statistic is not defined in a resample: it is left out there, and counted.
        confidence: of the interval.

    Returns:
        `low`, `high` and the number of replicates left out, each of shape `(...)`; the bounds are NaN where fewer than two are left.

    Raises:
        ValueError: if a value does not lie in [0, 1], it is 0 or 1 and yet replicates differ, or `confidence` cannot be.
    """
    check_confidence(confidence)
    defined = ~np.isnan(replicates)
    errors, some = np.full(replicates.shape[1:], np.nan), defined.sum(axis=0) > 1
    errors[some] = np.nanstd(replicates[:, some], axis=0, ddof=1)
    if not ((values >= 0) & (values <= 1)).all() or (np.isin(values, (0, 1)) & (errors > 0)).any():
        raise ValueError(
            f"the values are {values}, but must be shares, from 0 to 1, and inside if replicates differ: use percentile_interval"
        )
    # Without spread the bounds are the value, also at 0 and 1, where the logit is infinite.
    half = np.divide(ndtri((1 + confidence) / 2) * errors, values * (1 - values), out=np.zeros_like(errors), where=errors != 0)
    return expit(logit(values) - half), expit(logit(values) + half), (~defined).sum(axis=0)


def check_confidence(confidence: float) -> None:
    """`ValueError` if it does not lie between 0 and 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}, but must lie between 0 and 1, for example 0.95")


__all__ = [
    "Summary",
    "bootstrap_interval",
    "check_confidence",
    "independent_values",
    "logit_interval",
    "percentile_interval",
    "resampled_rows",
    "summarize",
    "summarize_difference",
]
