"""What a frozen encoder knows: small classifiers on its features, which learn nothing but what the features already tell.

```python
features = encode_clips(model, extractor, waveforms, "runs/features")  # features.py
probe = build_probe("attentive").fit(features.select(train), labels[train], seed=0)
scores = probe.scores(features.select(test))  # (clips, classes)
```
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import torch

from ..settings import setting
from .features import Features, ProbeError
from .intervals import Summary, summarize, summarize_difference
from .metrics import Accuracy, MeanAveragePrecision
from .pooling import AttentivePooling, HeadSettings, PrototypePooling, best_device, train_head


try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise ImportError('probes need scikit-learn: pip install "transformers-sslam[train]"') from error


logger = logging.getLogger(__name__)

View = Literal["cls", "mean", "mean_and_deviation", "statistics"]


@dataclass
class ProbeSettings:
    """Of all probes. Each takes from it what concerns it."""

    strength: float = setting("inverse of the L2 regularisation of logistic regressions", 1.0)
    neighbors: int = setting("training clips that k-NN looks at", 10)
    heads: HeadSettings = field(default_factory=HeadSettings)

    def __post_init__(self):
        if not self.strength > 0 or self.neighbors < 1:
            raise ProbeError(f"strength is {self.strength:g} and neighbors {self.neighbors}, but both must be positive")


class Probe(ABC):
    """A classifier of clips on frozen features. Exclusive classes have targets `(clips,)`, indices; tags `(clips, classes)`, 0 or 1."""

    seeded = False  # whether another seed gives another result
    needs_patches = False
    needs_model = True  # whether another network gives another result

    def __init__(self, settings: ProbeSettings):
        self.settings = settings

    def fit(self, features: Features, targets: np.ndarray, seed: int = 0) -> Self:
        """Learn from these clips; of exclusive classes there are as many as the largest index says.

        Raises:
            ProbeError: if features and targets differ in number, features are not finite, or a class has no training clip (of tags: or no
                clip without it).
        """
        if len(features) != len(targets):
            raise ProbeError(f"there are {len(features)} clips with features, but {len(targets)} targets: give one target each")
        one_hot = as_one_hot(targets)
        check_classes_are_learnable(targets, [str(i) for i in range(one_hot.shape[1])])
        self._fit(features, targets, one_hot, seed)
        return self

    @abstractmethod
    def _fit(self, features: Features, targets: np.ndarray, one_hot: np.ndarray, seed: int) -> None: ...

    @abstractmethod
    def scores(self, features: Features) -> np.ndarray:
        """`(clips, classes)`: the greatest is the class; of tags, the greater the likelier."""


class LinearProbe(Probe):
    """Logistic regression on standardised features; of tags, one a tag."""

    def __init__(self, settings: ProbeSettings, view: View):
        super().__init__(settings)
        self.view, self.needs_model = view, view != "statistics"

    def _fit(self, features: Features, targets: np.ndarray, one_hot: np.ndarray, seed: int) -> None:
        values = _finite(getattr(features, self.view))
        self.scaler = StandardScaler().fit(values)
        scaled = self.scaler.transform(values)
        columns = [targets] if targets.ndim == 1 else list(targets.T)
        self.regressions = [LogisticRegression(C=self.settings.strength, max_iter=5000).fit(scaled, column) for column in columns]
        self.exclusive = targets.ndim == 1

    def scores(self, features: Features) -> np.ndarray:
        scaled = self.scaler.transform(_finite(getattr(features, self.view)))
        logits = [regression.decision_function(scaled) for regression in self.regressions]
        if not self.exclusive:
            return np.stack(logits, axis=1)
        # Of two classes scikit-learn gives one logit, that of the second.
        return logits[0] if logits[0].ndim == 2 else np.stack((-logits[0], logits[0]), axis=1)


class NearestNeighbors(Probe):
    """Labels of the nearest training clips, by the cosine of standardised mean patch tokens and weighted by the inverse of their distance.

    Standardised, because what all clips have in common would make every cosine large.
    """

    regressor: Pipeline

    def _fit(self, features: Features, targets: np.ndarray, one_hot: np.ndarray, seed: int) -> None:
        if self.settings.neighbors > len(features):
            raise ProbeError(f"neighbors is {self.settings.neighbors}, but there are {len(features)} training clips: set it lower")
        # A regression of 0 and 1 is the weighted share of neighbours, for classes and for tags alike.
        neighbors = KNeighborsRegressor(self.settings.neighbors, weights="distance", metric="cosine")
        self.regressor = make_pipeline(StandardScaler(), neighbors).fit(_finite(features.mean), one_hot)

    def scores(self, features: Features) -> np.ndarray:
        return self.regressor.predict(_finite(features.mean))


class PatchProbe(Probe):
    """A head on patch tokens, trained by gradient descent, where an accelerator is available there."""

    seeded = needs_patches = True

    def __init__(self, settings: ProbeSettings, build: Callable[[int, int, HeadSettings], torch.nn.Module]):
        super().__init__(settings)
        self.build = build

    def _fit(self, features: Features, targets: np.ndarray, one_hot: np.ndarray, seed: int) -> None:
        width, classes, heads = features.cls.shape[1], one_hot.shape[1], self.settings.heads
        self.trained = train_head(lambda: self.build(width, classes, heads), features, targets, heads, seed, best_device())

    def scores(self, features: Features) -> np.ndarray:
        return _finite(self.trained.scores(features))


PROBES: dict[str, Callable[[ProbeSettings], Probe]] = {
    "linear_cls": lambda settings: LinearProbe(settings, "cls"),
    "linear_mean": lambda settings: LinearProbe(settings, "mean"),
    "linear_mean_and_deviation": lambda settings: LinearProbe(settings, "mean_and_deviation"),
    "attentive": lambda settings: PatchProbe(settings, lambda width, classes, heads: AttentivePooling(width, classes, heads.queries)),
    "prototype": lambda settings: PatchProbe(settings, lambda width, classes, heads: PrototypePooling(width, classes, heads.prototypes)),
    "knn": NearestNeighbors,
    "log_mel_statistics": lambda settings: LinearProbe(settings, "statistics"),
}
TITLES = {
    "linear_cls": "linear, CLS token",
    "linear_mean": "linear, mean patch token",
    "linear_mean_and_deviation": "linear, mean and deviation of patch tokens",
    "attentive": "attentive pooling of patches",
    "prototype": "prototypes against patches",
    "knn": "k-NN, mean patch token",
    "log_mel_statistics": "linear, mean and deviation of log-mel bins",
}


def build_probe(name: str, settings: ProbeSettings | None = None) -> Probe:
    """A probe of `PROBES`, by name. `ProbeError` if there is none of that name."""
    if name not in PROBES:
        raise ProbeError(f"there is no probe {name!r}, only {', '.join(PROBES)}")
    return PROBES[name](settings or ProbeSettings())


@dataclass(frozen=True)
class Partition:
    """Which clips train and which evaluate, by their indices; `name` is what is held out."""

    name: str
    train: np.ndarray
    evaluation: np.ndarray


def hold_out_each(folds: Sequence[str]) -> list[Partition]:
    """One partition a fold, which evaluates on it and trains on all others.

    Args:
        folds: `(clips,)`, the fold of each.

    Raises:
        ProbeError: if there are not two folds.
    """
    values = np.asarray(folds)
    names = sorted(set(folds))
    if len(names) < 2:
        raise ProbeError(f"all clips are in the fold {', '.join(names)}, but each fold is held out in turn, so there must be two")
    return [Partition(name, np.flatnonzero(values != name), np.flatnonzero(values == name)) for name in names]


def run_probe(
    name: str,
    features: Features,
    targets: np.ndarray,
    partitions: Sequence[Partition],
    seeds: Sequence[int] = (0,),
    settings: ProbeSettings | None = None,
) -> np.ndarray:
    """Accuracy, or mean average precision of tags, `(partitions, seeds)`; `(partitions, 1)` where the seed does not matter.

    Args:
        name: of `PROBES`.
        features: of all clips.
        targets: of all clips, `(clips,)` or `(clips, classes)`.
        partitions: which of them train, and which evaluate.
        seeds: of the probe's weights and order of clips.
        settings: of the probes.

    Raises:
        ProbeError: as `Probe.fit`.
    """
    seeds = seeds if build_probe(name, settings).seeded else seeds[:1]
    values = np.empty((len(partitions), len(seeds)))
    for row, partition in enumerate(partitions):
        train, evaluation = features.select(partition.train), features.select(partition.evaluation)
        for column, seed in enumerate(seeds):
            probe = build_probe(name, settings).fit(train, targets[partition.train], seed)
            values[row, column] = score(probe.scores(evaluation), targets[partition.evaluation])
    return values


def score(scores: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy where targets are class indices, `(clips,)`; mean average precision where they are tags, `(clips, classes)`."""
    if targets.ndim == 1:
        return Accuracy().compute(predictions=scores.argmax(1), references=targets, confidence=None)["accuracy"]
    metric = MeanAveragePrecision().compute(predictions=scores, references=targets.astype(np.int64), confidence=None)
    return metric["mean_average_precision"]


def runs(values: np.ndarray) -> np.ndarray:
    """The runs that count as independent: with several partitions, each one's mean over seeds; with a single one, its seeds.

    Args:
        values: `(partitions, seeds)`.
    """
    return values.mean(1) if len(values) > 1 else values[0]


def summarize_runs(values: np.ndarray) -> Summary:
    """Mean, deviation and interval over `runs`."""
    return summarize(runs(values).tolist())


def summarize_gain(values: np.ndarray, others: np.ndarray) -> Summary:
    """By how much `values` exceed `others`, both `(partitions, seeds)`: fold by fold, or, with one partition, from the mean of the others,
    whose seeds are not the same networks."""
    if len(values) > 1:
        return summarize_difference(runs(values).tolist(), runs(others).tolist())
    return summarize([float(values.mean() - others.mean())])


def check_partitions(partitions: Sequence[Partition], targets: np.ndarray, classes: Sequence[str]) -> None:
    """Refuse, before anything is encoded, what some partition could not learn; warn of classes that it cannot evaluate.

    Args:
        partitions: all there are.
        targets: `(clips,)`, indices of `classes`; or `(clips, classes)`, 0 or 1.
        classes: their names.

    Raises:
        ProbeError: if a class has no training clip, or a tag is on every one.
    """
    for partition in partitions:
        check_classes_are_learnable(targets[partition.train], classes, f" with {partition.name} held out")
        evaluated = as_one_hot(targets[partition.evaluation], len(classes))
        if absent := [name for name, column in zip(classes, evaluated.T) if not column.any()]:
            logger.warning(f"In {partition.name} no clip has the class {', '.join(absent)}, so the result there says nothing of it.")


def check_classes_are_learnable(targets: np.ndarray, classes: Sequence[str], when: str = "") -> None:
    """`ProbeError` unless every class has a training clip and, of tags, every tag a clip without it."""
    one_hot = as_one_hot(targets, len(classes))
    if without := [name for name, column in zip(classes, one_hot.T) if not column.any()]:
        raise ProbeError(f"no training clip{when} has the class {', '.join(without)}: add some, or choose other rows")
    if everywhere := [name for name, column in zip(classes, one_hot.T) if column.all()]:
        raise ProbeError(f"every training clip{when} has the class {', '.join(everywhere)}, so there is nothing to tell apart")


def as_one_hot(targets: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Tags as they are, class indices as tags: `(clips, classes)`, 0 or 1, float32.

    Raises:
        ProbeError: if targets have another shape, an index lies outside the classes, or a tag is neither 0 nor 1.
    """
    if targets.ndim not in (1, 2) or len(targets) == 0:
        raise ProbeError(f"targets have shape {targets.shape}, but (clips,) or (clips, classes) is expected, and at least one clip")
    if targets.ndim == 2:
        if not np.isin(targets, (0, 1)).all() or classes not in (None, targets.shape[1]):
            raise ProbeError(f"targets of shape {targets.shape} must hold 0 and 1, for {classes or 'all'} classes")
        return targets.astype(np.float32)
    if classes is None:
        classes = int(targets.max()) + 1
    if not np.issubdtype(targets.dtype, np.integer) or targets.min() < 0 or targets.max() >= classes:
        raise ProbeError(f"targets lie between {targets.min()} and {targets.max()}, but whole numbers from 0 to {classes - 1} are expected")
    return np.eye(classes, dtype=np.float32)[targets]


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ProbeError("features or scores are NaN or infinite: is the model whole, or a head's learning_rate too high?")
    return values


__all__ = [
    "PROBES",
    "TITLES",
    "Partition",
    "Probe",
    "ProbeSettings",
    "build_probe",
    "check_partitions",
    "hold_out_each",
    "run_probe",
    "score",
    "summarize_gain",
    "summarize_runs",
]
