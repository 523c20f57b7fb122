"""Accuracy, mean average precision, ROC AUC and d-prime as `evaluate` metrics that live here: instantiate the class, nothing is downloaded.

```python
MeanAveragePrecision().compute(predictions=scores, references=targets, class_names=names)
# {"mean_average_precision": 0.42, "mean_average_precision_interval": [0.4, 0.44], "average_precision": {"dog": 0.6, ..}, ..}
```

Each bootstraps over clips (see `intervals.py`) and takes `confidence` (0.95; `None` leaves intervals out), `resamples` (1000) and `seed`
(0). Beside a value `x`, of all classes or of each, stands its interval, `x_interval`: `[low, high]`, percentiles over resamples except for
average precision (see `MeanAveragePrecision`). It says what other clips, as many, would have changed for the same trained model, not what
another training would.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from .intervals import bootstrap_interval, check_confidence, logit_interval, percentile_interval, resampled_rows


try:
    import datasets
    import evaluate
    from scipy.special import ndtri
except ImportError as error:
    raise ImportError('metrics need evaluate, datasets and scipy: pip install "transformers-sslam[train]"') from error


WEIGHTS_AT_ONCE = 200_000  # resamples times clips: small enough for caches, large enough that a class costs few calls


class PackagedMetric(evaluate.Metric):
    """A metric that ships with this package. Predictions stay in memory unless several processes share them (`num_process`)."""

    inputs: datasets.Features
    description: str

    def __init__(self, config_name: str | None = None, num_process: int = 1, **kwargs):
        super().__init__(config_name, num_process=num_process, **{"keep_in_memory": num_process == 1, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.description, citation="", inputs_description=self.description, features=self.inputs)


class Accuracy(PackagedMetric):
    """Share of clips whose predicted class is the right one.

    `compute(predictions=, references=, confidence=0.95, resamples=1000, seed=0)`: both `(clips,)`, class indices. Returns `accuracy` and,
    unless `confidence` is `None`, `accuracy_interval`.

    Raises:
        ValueError: if there is no clip, the two differ in length, or `confidence` or `resamples` cannot be.
    """

    description = "Share of clips whose predicted class is the right one."
    inputs = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})

    def _compute(
        self, predictions, references, confidence: float | None = 0.95, resamples: int = 1000, seed: int = 0
    ) -> dict[str, float | list[float]]:
        _check_not_empty(predictions)
        right = np.asarray(predictions) == np.asarray(references)
        result: dict[str, float | list[float]] = {"accuracy": float(right.mean())}
        if confidence is not None:
            interval = bootstrap_interval(
                lambda rows: right[rows].mean(), len(right), confidence=confidence, resamples=resamples, seed=seed
            )
            result["accuracy_interval"] = list(interval)
        return result


class RankingMetric(PackagedMetric):
    """What the order of scores within each class says, by class and overall.

    `compute(predictions=, references=, class_names=None, confidence=0.95, resamples=1000, seed=0)`: predictions are `(clips, classes)`
    scores, of which only the order within a class matters; references `(clips, classes)` are 0 or 1. Returns, besides what each metric
    says of itself:

    - `classes_without_positives` (and, where they matter, `classes_without_negatives`): names or indices of the classes for which the
      metric is not defined. They are in no mean, and in no dictionary by class.
    - unless `confidence` is `None`, intervals. A resample may miss all positives (or negatives) of a rare class. That class is then left
      out of that resample's mean, and that resample out of that class's interval, which says less of a class the rarer it is:
      `undefined_resamples_by_class` counts them, for classes that have any. `undefined_resamples` are those without any class.

    Raises:
        ValueError: if there is no clip, no class for which the metric is defined, a score that is NaN, a reference other than 0 and 1,
            a name that stands twice, shapes that differ, or `confidence` or `resamples` cannot be.
    """

    inputs = datasets.Features(
        {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.List(datasets.Value("int64"))}
    )
    overall: str  # key of the one value
    by_class: str  # key of the values by class
    needs_negatives: bool

    @staticmethod
    def statistic(ranking: "Ranking", weights: np.ndarray) -> np.ndarray:
        """One class's value, `(resamples,)`, with clips repeated as `weights: (resamples, clips)` says; NaN where it is not defined."""
        raise NotImplementedError

    @staticmethod
    def interval(values: np.ndarray, replicates: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bounds of the statistic, or of its mean over classes, `values: (...)`, from resamples, `(resamples, ...)`, and how many of these
        are undefined."""
        return percentile_interval(replicates, confidence)

    @staticmethod
    def scale(values: np.ndarray) -> np.ndarray:
        """From the statistic, and its mean over classes, to what is reported: an increasing function."""
        return values

    def _compute(
        self,
        predictions,
        references,
        class_names: Sequence[str] | None = None,
        confidence: float | None = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> dict[str, Any]:
        _check_not_empty(predictions)
        rankings = rank_classes(np.asarray(predictions), np.asarray(references))
        names = _check_names(class_names, len(rankings))
        missing = {"classes_without_positives": [name for name, ranking in zip(names, rankings) if len(ranking.positives) == 0]}
        if self.needs_negatives:
            missing["classes_without_negatives"] = [name for name, ranking in zip(names, rankings) if len(ranking.negatives) == 0]
        defined = {name: ranking for name, ranking in zip(names, rankings) if not any(name in left_out for left_out in missing.values())}
        if not defined:
            both = "a positive and a negative clip" if self.needs_negatives else "a positive clip"
            raise ValueError(f"no class has {both}, so there is no {self.overall}: check the references")
        names, rankings = list(defined), list(defined.values())
        values = np.array([self.statistic(ranking, np.ones((1, len(predictions)), np.int64))[0] for ranking in rankings])
        result = {self.overall: float(self.scale(values.mean())), self.by_class: dict(zip(names, self.scale(values).tolist())), **missing}
        if confidence is not None:
            result |= self._intervals(names, rankings, values, confidence, resampled_weights(len(predictions), resamples, seed))
        return result

    def _intervals(
        self, names: list[str], rankings: list["Ranking"], values: np.ndarray, confidence: float, blocks: Iterator[np.ndarray]
    ) -> dict[str, Any]:
        check_confidence(confidence)
        by_class = np.concatenate([np.stack([self.statistic(ranking, weights) for ranking in rankings], axis=1) for weights in blocks])
        defined = ~np.isnan(by_class)
        with np.errstate(invalid="ignore"):  # a resample without any class has no mean
            overall = np.where(defined, by_class, 0).sum(1) / defined.sum(1)
        # `scale` increases, so it may be applied to the bounds; d-primes themselves can be infinite, and then have no percentiles.
        low, high, undefined = self.interval(values.mean(), overall, confidence)
        lows, highs, undefined_by_class = self.interval(values, by_class, confidence)
        return {
            f"{self.overall}_interval": self.scale(np.array([low, high])).tolist(),
            f"{self.by_class}_interval": dict(zip(names, self.scale(np.stack((lows, highs), axis=1)).tolist())),
            "undefined_resamples": int(undefined),
            "undefined_resamples_by_class": {name: int(count) for name, count in zip(names, undefined_by_class) if count},
        }


class MeanAveragePrecision(RankingMetric):
    """Average precision of each class, and their mean over the classes that have positives (macro mAP).

    Returns `mean_average_precision` and, by class, `average_precision`; arguments, the other keys and errors are `RankingMetric`'s.

    Its intervals are `logit_interval`'s: they say where it would lie with other clips, as many. Percentiles lie too high where classes have
    few positives, and may not even hold the value, since a positive clip drawn twice supports itself, as two clips would not; the basic
    interval, `2 * value - percentile`, holds the value only where percentiles do. In simulations with 50 classes (one a clip; normal
    scores, two deviations apart; 100 data sets of 200 resamples), 95 % intervals held the value expected of such data sets in

    | positives a class | mean: logit | percentile | basic | one class: logit | percentile | basic |
    |-|-|-|-|-|-|-|
    | 8 | 96 % | 76 % | 72 % | 94 % | 91 % | 78 % |
    | 20 | 93 % | 83 % | 78 % | 94 % | 93 % | 86 % |
    | 40 | 91 % | 87 % | 82 % | 94 % | 94 % | 89 % |
    | 100 | 93 % | 92 % | 89 % | 94 % | 93 % | 91 % |

    Average precision itself is the higher the fewer positives there are: 0.419, 0.398, 0.388 and 0.380 here, 0.375 with clips without end.
    No interval takes that away (those of the mean held 0.375 in 52, 63, 75 and 89 %), so compare models on the same clips.
    """

    description = "Average precision of each class, and their mean over the classes that have positives."
    overall, by_class, needs_negatives = "mean_average_precision", "average_precision", False
    interval = staticmethod(logit_interval)

    @staticmethod
    def statistic(ranking: "Ranking", weights: np.ndarray) -> np.ndarray:
        return ranking.average_precision(weights)


class MeanRocAuc(RankingMetric):
    """Area under each class's ROC curve, and their mean over the classes that have positives and negatives (macro AUC).

    Returns `mean_roc_auc` and, by class, `roc_auc`; arguments, the other keys and errors are `RankingMetric`'s.
    """

    description = "Area under each class's ROC curve, and their mean over the classes that have positives and negatives."
    overall, by_class, needs_negatives = "mean_roc_auc", "roc_auc", True

    @staticmethod
    def statistic(ranking: "Ranking", weights: np.ndarray) -> np.ndarray:
        return ranking.roc_auc(weights)


class DPrime(MeanRocAuc):
    """Separation of positives and negatives: `sqrt(2) * Phi^-1(AUC)`, the distance of two normal distributions of unit variance that
    would give this AUC.

    Returns `d_prime`, that of the *mean AUC*, as published for AudioSet since Hershey et al. (ICASSP 2017, arXiv 1609.09430), and not the
    mean of `d_prime_by_class`. It is infinite where the ranking is perfect. Bounds are d-primes of the AUC's bounds. Arguments, the other
    keys and errors are `RankingMetric`'s.
    """

    description = "d-prime of the mean ROC AUC over classes, and of each class's."
    overall, by_class = "d_prime", "d_prime_by_class"

    @staticmethod
    def scale(values: np.ndarray) -> np.ndarray:
        return d_prime(values)


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under each class's precision-recall steps, without interpolation, as in scikit-learn: the mean, over a class's positive clips,
    of the precision among all clips that score at least as high.

    Args:
        scores: `(clips, classes)`.
        targets: `(clips, classes)`, 0 or 1.

    Returns:
        `(classes,)`, float64, NaN for a class without positives.

    Raises:
        ValueError: if the shapes differ, a score is NaN, or a target is neither 0 nor 1.
    """
    once = np.ones((1, len(scores)), np.int64)
    return np.array([ranking.average_precision(once)[0] for ranking in rank_classes(scores, targets)])


def roc_auc(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under each class's ROC curve: the share of pairs of a positive and a negative clip in which the positive scores higher, ties
    counting half. Arguments and errors as `average_precision`.

    Returns:
        `(classes,)`, float64, NaN for a class without positives or without negatives.
    """
    once = np.ones((1, len(scores)), np.int64)
    return np.array([ranking.roc_auc(once)[0] for ranking in rank_classes(scores, targets)])


def d_prime(auc: np.ndarray) -> np.ndarray:
    """`sqrt(2) * Phi^-1(auc)`, elementwise: 0 at 0.5, and infinite at 0 and 1."""
    return np.sqrt(2) * ndtri(auc)


class Ranking(NamedTuple):
    """One class's clips by falling score, sorted once for any number of resamples.

    Attributes:
        positives, negatives: rows of clips, `(positives,)` and `(negatives,)`, the highest score first.
        positives_reached, negatives_reached: `(positives,)`; how many of them score at least as high as each positive.
        negatives_above: `(positives,)`; how many negatives score higher.
    """

    positives: np.ndarray
    negatives: np.ndarray
    positives_reached: np.ndarray
    negatives_reached: np.ndarray
    negatives_above: np.ndarray

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """`(resamples,)`, with each clip repeated as `weights: (resamples, clips)` says; NaN without positives."""
        own = weights[:, self.positives]
        true, false = _running_sum(own)[:, self.positives_reached], _running_sum(weights[:, self.negatives])[:, self.negatives_reached]
        with np.errstate(invalid="ignore"):
            return (own * true / np.maximum(true + false, 1)).sum(1) / own.sum(1)  # 0 of 0 clips: they have no weight either

    def roc_auc(self, weights: np.ndarray) -> np.ndarray:
        """`(resamples,)`, with each clip repeated as `weights: (resamples, clips)` says; NaN without positives or without negatives."""
        own, negatives = weights[:, self.positives], _running_sum(weights[:, self.negatives])
        lost_twice = (own * (negatives[:, self.negatives_above] + negatives[:, self.negatives_reached])).sum(1)
        with np.errstate(invalid="ignore"):
            return 1 - lost_twice / (2 * own.sum(1) * negatives[:, -1])


def rank_classes(scores: np.ndarray, targets: np.ndarray) -> list[Ranking]:
    """A ranking of each class. Arguments and errors as `average_precision`."""
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores have shape {scores.shape} and targets {targets.shape}, but both must be (clips, classes)")
    if np.isnan(scores).any():
        row, column = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"the score of clip {row} for class {column} is NaN: has the training diverged?")
    if not np.isin(targets, (0, 1)).all():
        raise ValueError(f"targets hold {targets[~np.isin(targets, (0, 1))][0]}, but must be 0 or 1")
    return [_rank(-column, target == 1) for column, target in zip(scores.T.astype(np.float64), targets.T)]


def resampled_weights(clips: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample of `resampled_rows` holds each clip, in blocks `(resamples, clips)`."""
    rows = resampled_rows(clips, resamples, seed)
    while block := [np.bincount(row, minlength=clips) for row in islice(rows, max(1, WEIGHTS_AT_ONCE // clips))]:
        yield np.stack(block)


def _rank(falling: np.ndarray, positive: np.ndarray) -> Ranking:
    order = np.argsort(falling, kind="stable")
    positives, negatives = order[positive[order]], order[~positive[order]]
    own, others = falling[positives], falling[negatives]
    return Ranking(
        positives, negatives, own.searchsorted(own, "right"), others.searchsorted(own, "right"), others.searchsorted(own, "left")
    )


def _running_sum(weights: np.ndarray) -> np.ndarray:
    """`(resamples, n)` -> `(resamples, n + 1)`: sums of the first 0 to n."""
    sums = np.zeros((len(weights), weights.shape[1] + 1), weights.dtype)
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def _check_not_empty(predictions) -> None:
    if len(predictions) == 0:
        raise ValueError("there is no prediction to evaluate: give at least one clip")


def _check_names(names: Sequence[str] | None, classes: int) -> list[str]:
    names = [str(i) for i in range(classes)] if names is None else list(names)
    if len(names) != classes:
        raise ValueError(f"there are {len(names)} class names, but {classes} classes: give one name each")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the class name {twice[0]!r} stands twice, but results are given by name: make names differ")
    return names


__all__ = [
    "Accuracy",
    "DPrime",
    "MeanAveragePrecision",
    "MeanRocAuc",
    "average_precision",
    "d_prime",
    "roc_auc",
]
