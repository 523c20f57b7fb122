"""Accuracy, mean average precision, ROC AUC and d-prime, with intervals over clips.

```python
mean_over_classes("average_precision", scores, targets, names)
# {"mean_average_precision": 0.42, "mean_average_precision_interval": [0.4, 0.44], "average_precision": {"dog": 0.6, ..}, ..}
```

Beside a value `x` stands its interval over clips, `x_interval`: `[low, high]` at `confidence` (`None` for none). It describes other test
clips, as many, for the same trained model, and not another training.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ..audio.events import UNKNOWN
from .intervals import check_confidence, logit_interval, percentile_interval, proportion_interval, resampled_rows


try:
    from scipy.special import ndtri
except ImportError as error:
    raise ImportError('metrics need scipy: pip install "transformers-sslam[train]"') from error


ClassMetric = Literal["average_precision", "roc_auc"]
WEIGHTS_AT_ONCE = 200_000  # resamples times clips: few enough for the processor's caches


def accuracy(predictions: np.ndarray, references: np.ndarray, confidence: float | None = 0.95) -> dict[str, Any]:
    """`accuracy`, the fraction of correct `predictions: (clips,)` of class indices, and `accuracy_interval`, Wilson's score interval.

    Raises:
        ValueError: if there is no clip, the two differ in shape or are not class indices, or `confidence` does not lie between 0 and 1.
    """
    predictions, references = plain_array(predictions, "predictions"), plain_array(references, "references")
    if predictions.shape != references.shape or predictions.ndim != 1 or len(predictions) == 0:
        raise ValueError(
            f"predictions have shape {predictions.shape} and references {references.shape}, but both must be (clips,), with at least one"
        )
    for name, array in (("predictions", predictions), ("references", references)):
        if array.dtype.kind == "f":  # NaN, or scores, of which none would be correct
            raise ValueError(f"{name} are of type {array.dtype}, but class indices are expected: of scores, give their argmax over classes")
    correct = predictions == references
    result: dict[str, Any] = {"accuracy": float(correct.mean())}
    if confidence is not None:
        result["accuracy_interval"] = list(proportion_interval(int(correct.sum()), len(correct), confidence))
    return result


def mean_over_classes(
    metric: ClassMetric,
    scores: np.ndarray,
    targets: np.ndarray,
    class_names: Sequence[str] | None = None,
    *,
    confidence: float | None = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Average precision or the area under the ROC curve of each class, and their mean over classes (macro mAP, macro AUC).

    Intervals of ROC AUC are percentiles, of average precision those of `logit_interval`: its percentiles lie too high where classes have
    few positives, because a positive clip drawn twice supports itself. In simulations with 50 classes of 8 positives, 95 % intervals of the
    mean contained the expected value in 96 % (logit) and 76 % (percentile) of the cases, with 100 positives in 93 % and 92 %. Average
    precision itself rises as positives become fewer (0.419 at 8, 0.375 in the limit): compare models on the same clips.

    Where a class is ranked without an error, every resample has the same value. The interval is then Wilson's, as for a proportion of as
    many trials as there are positives (of ROC AUC: positives or negatives, whichever are fewer); of the mean, as many as all classes have
    together, at most one for each clip.

    Args:
        scores: `(clips, classes)`, of which only the order within a class matters.
        targets: `(clips, classes)`, 0, 1, or -100 where unknown: a clip has no part in the metric of a class that is unknown of it.
        class_names: by default indices.
        resamples: of the bootstrap over clips.
        seed: random seed for it, which gives every model the same resamples.

    Returns:
        `mean_average_precision` and `average_precision` by class, or `mean_roc_auc` and `roc_auc`, and

        - `classes_without_positives` (of ROC AUC also `classes_without_negatives`): names of the classes for which the metric is undefined.
          They are in no mean, and in no dictionary by class.
        - with intervals, `undefined_resamples_by_class`: how many miss all positives (or negatives) of a class, which is then left out of
          that resample's mean, and the resample out of the class's interval. `undefined_resamples` are those without any class.

    Raises:
        ValueError: if the metric is unknown, there is no clip or class for which it is defined, a score is NaN, a target neither 0, 1 nor
            -100, a name stands twice, shapes differ, or `confidence` or `resamples` is out of range.
    """
    if metric not in get_args(ClassMetric):
        raise ValueError(f"metric is {metric!r}, but one of {', '.join(get_args(ClassMetric))} is expected")
    statistic, kinds = (Ranking.roc_auc, ("positives", "negatives")) if metric == "roc_auc" else (Ranking.average_precision, ("positives",))
    every, clips = rank_classes(scores, targets), len(scores)
    names = _check_names(class_names, len(every))
    missing = {f"classes_without_{kind}": [n for n, ranking in zip(names, every) if not len(getattr(ranking, kind))] for kind in kinds}
    rankings = {name: ranking for name, ranking in zip(names, every) if not any(name in left_out for left_out in missing.values())}
    if not rankings:
        wanted = " and ".join(f"a {kind[:-1]}" for kind in kinds)
        raise ValueError(f"no class has {wanted} clip, so mean_{metric} is undefined: check the targets")
    values = np.array([statistic(ranking, np.ones((1, clips), np.int64))[0] for ranking in rankings.values()])
    result = {f"mean_{metric}": float(values.mean()), metric: dict(zip(rankings, values.tolist())), **missing}
    if confidence is None:
        return result
    check_confidence(confidence)
    blocks = resampled_weights(clips, resamples, seed)
    replicates = np.concatenate([np.stack([statistic(r, weights) for r in rankings.values()], axis=1) for weights in blocks])
    defined = ~np.isnan(replicates)
    with np.errstate(invalid="ignore"):  # a resample without any class has no mean
        means = np.where(defined, replicates, 0).sum(1) / defined.sum(1)

    def interval(values: np.ndarray, replicates: np.ndarray, counts: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if metric == "roc_auc":
            low, high, undefined = percentile_interval(replicates, confidence)
        else:
            low, high, undefined = logit_interval(values, replicates, confidence)
        for i in np.flatnonzero(np.isin(values, (0, 1)) & (low == high)):
            low[i], high[i] = proportion_interval(round(values[i] * counts[i]), counts[i], confidence)
        return low, high, undefined

    counts = [min(len(getattr(ranking, kind)) for kind in kinds) for ranking in rankings.values()]
    (low,), (high,), (undefined,) = interval(values.mean(keepdims=True), means[:, None], [min(sum(counts), clips)])
    lows, highs, undefined_by_class = interval(values, replicates, counts)
    return result | {
        f"mean_{metric}_interval": [float(low), float(high)],
        f"{metric}_interval": dict(zip(rankings, np.stack((lows, highs), axis=1).tolist())),
        "undefined_resamples": int(undefined),
        "undefined_resamples_by_class": {name: int(count) for name, count in zip(rankings, undefined_by_class) if count},
    }


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean, over a class's positive clips, of the precision among all clips that score at least as high (as scikit-learn).

    `scores` and `targets` (0, 1, or -100 where unknown: left out) are `(clips, classes)`, the result `(classes,)`, float64, NaN for a class
    without positives.

    Raises:
        ValueError: if there is no clip, the shapes differ, a score is NaN, or a target is neither 0, 1 nor -100.
    """
    once = np.ones((1, len(scores)), np.int64)
    return np.array([ranking.average_precision(once)[0] for ranking in rank_classes(scores, targets)])


def d_prime(auc: np.ndarray) -> np.ndarray:
    """`sqrt(2) * Phi^-1(auc)`, elementwise: 0 at 0.5, and infinite at 0 and 1.

    The distance of two normal distributions of unit variance that would give this ROC AUC. For AudioSet, that of the mean AUC over classes
    is published, since Hershey et al. (ICASSP 2017, arXiv 1609.09430).
    """
    return np.sqrt(2) * ndtri(auc)


class Ranking(NamedTuple):
    """One class's clips by falling score, sorted once for all resamples (scikit-learn would sort each). Those of which the class is unknown
    are in none of the arrays.

    Attributes:
        positives, negatives: rows of clips, the highest score first.
        positives_reached, negatives_reached: `(positives,)`; how many of them score at least as high as each positive.
        negatives_above: `(positives,)`; how many negatives score higher.
    """

    positives: np.ndarray
    negatives: np.ndarray
    positives_reached: np.ndarray
    negatives_reached: np.ndarray
    negatives_above: np.ndarray

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """`(resamples,)`, with each clip repeated by `weights: (resamples, clips)`; NaN without positives."""
        own = weights[:, self.positives]
        true, false = _running_sum(own)[:, self.positives_reached], _running_sum(weights[:, self.negatives])[:, self.negatives_reached]
        with np.errstate(invalid="ignore"):
            return (own * true / np.maximum(true + false, 1)).sum(1) / own.sum(1)  # 0 of 0 clips: they have no weight either

    def roc_auc(self, weights: np.ndarray) -> np.ndarray:
        """`(resamples,)`, ties counting half, each clip repeated by `weights: (resamples, clips)`; NaN without positives or negatives."""
        own, negatives = weights[:, self.positives], _running_sum(weights[:, self.negatives])
        lost_twice = (own * (negatives[:, self.negatives_above] + negatives[:, self.negatives_reached])).sum(1)
        with np.errstate(invalid="ignore"):
            return 1 - lost_twice / (2 * own.sum(1) * negatives[:, -1])


def rank_classes(scores: np.ndarray, targets: np.ndarray) -> list[Ranking]:
    """A ranking of each class. Arguments and errors as of `average_precision`."""
    scores, targets = plain_array(scores, "scores"), plain_array(targets, "targets")
    if len(scores) == 0:
        raise ValueError("there is no clip to evaluate: give at least one")
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(f"scores have shape {scores.shape} and targets {targets.shape}, but both must be (clips, classes)")
    if np.isnan(scores).any():
        row, column = np.argwhere(np.isnan(scores))[0]
        raise ValueError(f"the score of clip {row} for class {column} is NaN: has the training diverged?")
    if not np.isin(targets, (0, 1, UNKNOWN)).all():
        raise ValueError(f"targets hold {targets[~np.isin(targets, (0, 1, UNKNOWN))][0]}, but must be 0 or 1, or -100 where unknown")
    return [_rank(-column, target) for column, target in zip(scores.T.astype(np.float64), targets.T)]


def resampled_weights(clips: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each resample of `resampled_rows` holds each clip, in blocks `(resamples, clips)`."""
    rows = resampled_rows(clips, resamples, seed)
    while block := [np.bincount(row, minlength=clips) for row in islice(rows, max(1, WEIGHTS_AT_ONCE // clips))]:
        yield np.stack(block)


def plain_array(values: Any, name: str) -> np.ndarray:
    """Real numbers as an array. `ValueError` for a masked array, complex numbers, text, and anything else."""
    if np.ma.isMaskedArray(values):
        raise ValueError(f"{name} are a masked array, but a plain one is expected: leave out what is masked")
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} are of type {array.dtype}, but real numbers are expected: give an array of them")
    return array


def _rank(falling: np.ndarray, target: np.ndarray) -> Ranking:
    order = np.argsort(falling, kind="stable")
    positives, negatives = (order[target[order] == value] for value in (1, 0))
    own, others = falling[positives], falling[negatives]
    return Ranking(
        positives, negatives, own.searchsorted(own, "right"), others.searchsorted(own, "right"), others.searchsorted(own, "left")
    )


def _running_sum(weights: np.ndarray) -> np.ndarray:
    """`(resamples, n)` -> `(resamples, n + 1)`: sums of the first 0 to n."""
    return np.pad(np.cumsum(weights, axis=1), ((0, 0), (1, 0)))


def _check_names(names: Sequence[str] | None, classes: int) -> list[str]:
    names = [str(i) for i in range(classes)] if names is None else list(names)
    if len(names) != classes:
        raise ValueError(f"there are {len(names)} class names, but {classes} classes: give one name for each")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"the class name {twice[0]!r} stands twice: make names differ")
    return names
