"""Probes: small classifiers on frozen features, and their evaluation over folds and seeds.

```python
features = encode_clips(model, extractor, waveforms, "runs/features")  # features.py
probe = build_probe("attentive").fit(features.select(train), labels[train], seed=0)
scores = probe.scores(features.select(test))  # (clips, classes)
```
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..audio.events import UNKNOWN
from ..configuration_sslam import ClipPooling
from ..errors import UserError
from ..settings import setting
from .features import TITLES, Features
from .intervals import Summary, proportion_interval, summarize, summarize_difference, widen_by_clips
from .loading import best_device
from .metrics import mean_over_classes
from .pooling import AttentivePooling, HeadSettings, LayerCombination, PrototypePooling, TrainedHead


try:
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsRegressor
    from sklearn.preprocessing import StandardScaler
except ImportError as error:
    raise ImportError('probes need scikit-learn: pip install "transformers-sslam[train]"') from error


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class ProbeSettings:
    """Classifiers on frozen features"""

    inverse_regularization: float = setting("inverse of the L2 regularization of logistic regressions (C of scikit-learn)", 1.0)
    neighbors: int = setting("nearest training clips that k-NN takes", 10)
    heads: HeadSettings = setting("probes trained by gradient descent", HeadSettings())
    device: str | None = setting("cpu, cuda, cuda:1 ... for the encoder and the heads; null: an accelerator if there is one", None)

    def __post_init__(self):
        if not self.inverse_regularization > 0 or self.neighbors < 1:
            raise UserError(
                f"inverse_regularization is {self.inverse_regularization:g} and neighbors {self.neighbors}, but both must be positive"
            )


class Probe(ABC):
    """A classifier on frozen features.

    Targets of exclusive classes are `(clips,)`, indices; of tags `(clips, classes)`, 0, 1, or -100 where unknown: a clip has no part in
    what is learnt of a class that is unknown of it.

    Args:
        settings: of all probes.
        block: which one it reads, if it reads one; by default the last that was encoded.
    """

    seeded = False  # whether the seed changes the result
    needs_patches = False
    needs_model = True  # whether another network changes the result
    reads: Literal["block", "blocks"] = "block"  # one of them, or all but 0
    pooling: ClipPooling | None = None  # of the vectors that it reads

    def __init__(self, settings: ProbeSettings, block: int | None = None):
        self.settings, self.block = settings, block

    def fit(self, features: Features, targets: np.ndarray, seed: int = 0) -> Self:
        """Train on these clips. The largest index gives the number of exclusive classes.

        Raises:
            UserError: if features and targets do not fit, features are not finite, or all or no clips have a class.
        """
        if len(features) != len(targets):
            raise UserError(f"there are {len(features)} clips with features, but {len(targets)} targets: give one target each")
        one_hot = as_one_hot(targets)
        check_classes_are_learnable(targets, [str(i) for i in range(one_hot.shape[1])])
        self._fit(features, targets, one_hot, seed)
        return self

    @abstractmethod
    def _fit(self, features: Features, targets: np.ndarray, one_hot: np.ndarray, seed: int) -> None: ...

    @abstractmethod
    def scores(self, features: Features) -> np.ndarray:
        """`(clips, classes)`: of exclusive classes the highest is the prediction; of tags, higher is likelier."""


class LogisticRegressions:
    """Logistic regression on standardised features: one for exclusive classes; for each tag one, on the clips of which it is known.

    Args:
        values: `(clips, width)`, finite.
        targets: as of [`Probe`].
        inverse_regularization: `C` of scikit-learn.
    """

    def __init__(self, values: np.ndarray, targets: np.ndarray, inverse_regularization: float):
        self._scaler, self._exclusive = StandardScaler().fit(values), targets.ndim == 1
        scaled, columns = self._scaler.transform(values), [targets] if self._exclusive else targets.T
        self._regressions = []
        for column in columns:
            known = column != UNKNOWN
            self._regressions.append(LogisticRegression(C=inverse_regularization, max_iter=5000).fit(scaled[known], column[known]))

    def scores(self, values: np.ndarray) -> np.ndarray:
        """Logits, `(clips, classes)`, of `values: (clips, width)`."""
        scaled = self._scaler.transform(values)
        logits = [regression.decision_function(scaled) for regression in self._regressions]
        if not self._exclusive:
            return np.stack(logits, axis=1)
        # Of two classes scikit-learn gives one logit, that of the second.
        return logits[0] if logits[0].ndim == 2 else np.stack((-logits[0], logits[0]), axis=1)


class LinearProbe(Probe):
    """Logistic regression on standardised features; of tags, one for each."""

    pooling: ClipPooling

    def __init__(self, settings: ProbeSettings, block: int | None = None, *, pooling: ClipPooling, log_mel: bool = False):
        super().__init__(settings, block)
        self.pooling, self.needs_model = pooling, not log_mel

    def _vectors(self, features: Features) -> np.ndarray:
        return _finite(features.pooled(self.pooling, self.block) if self.needs_model else features.log_mel.pooled(self.pooling))

    def _fit(self, features: Features, targets: np.ndarray, one_hot: np.ndarray, seed: int) -> None:
        self.regressions = LogisticRegressions(self._vectors(features), targets, self.settings.inverse_regularization)

    def scores(self, features: Features) -> np.ndarray:
        return self.regressions.scores(self._vectors(features))


class NearestNeighbors(Probe):
    """Labels of the nearest training clips by the cosine of mean patch tokens, weighted by the inverse of their distance.

    Features are standardised, because what all clips have in common would make every cosine large.
    """

    pooling = "mean"

    def _fit(self, features: Features, targets: np.ndarray, one_hot: np.ndarray, seed: int) -> None:
        neighbors, values = self.settings.neighbors, _finite(features.pooled(self.pooling, self.block))
        self.scaler, self.classes = StandardScaler().fit(values), one_hot.shape[1]
        scaled = self.scaler.transform(values)
        # For each group of classes that are known of the same clips, which are all clips unless these are partly labelled.
        groups, group = np.unique(one_hot != UNKNOWN, axis=1, return_inverse=True)
        self.regressors = []
        for number, known in enumerate(groups.T):
            if neighbors > known.sum():
                raise UserError(f"neighbors is {neighbors}, but there are {known.sum()} training clips of known label: set it lower")
            # A regression of 0 and 1 is the weighted fraction of neighbors.
            columns = np.flatnonzero(group.ravel() == number)
            regressor = KNeighborsRegressor(neighbors, weights="distance", metric="cosine")
            self.regressors.append((columns, regressor.fit(scaled[known], one_hot[known][:, columns])))

    def scores(self, features: Features) -> np.ndarray:
        scaled = self.scaler.transform(_finite(features.pooled(self.pooling, self.block)))
        scores = np.empty((len(features), self.classes))
        for columns, regressor in self.regressors:
            scores[:, columns] = regressor.predict(scaled)
        return scores


class TrainedProbe(Probe):
    """A head that is trained by gradient descent."""

    seeded = True
    build: Callable[..., nn.Module]

    @abstractmethod
    def read(self, features: Features, clips: np.ndarray) -> tuple[torch.Tensor, ...]:
        """What the head takes of the clips with these indices."""

    def _fit(self, features: Features, targets: np.ndarray, one_hot: np.ndarray, seed: int) -> None:
        device = self.settings.device or best_device()
        self.head = TrainedHead(self.build, self.read, features, targets, one_hot.shape[1], self.settings.heads, seed, device)

    def scores(self, features: Features) -> np.ndarray:
        return _finite(self.head.scores(features))


class PatchProbe(TrainedProbe):
    """A head on the patch tokens that were kept, which are of one block."""

    needs_patches = True

    def __init__(self, settings: ProbeSettings, block: int | None = None, *, build: Callable[..., nn.Module]):
        super().__init__(settings, block)
        self.build = build

    def read(self, features: Features, clips: np.ndarray) -> tuple[torch.Tensor, ...]:
        return features.patch_tokens(clips)


class BlocksProbe(TrainedProbe):
    """A linear layer on a learned combination of all blocks' pooled outputs."""

    reads = "blocks"
    pooling: ClipPooling

    def __init__(self, settings: ProbeSettings, block: int | None = None, *, pooling: ClipPooling, gated: bool):
        super().__init__(settings, block)
        self.pooling, self.build = pooling, partial(LayerCombination, gated=gated)

    def read(self, features: Features, clips: np.ndarray) -> tuple[torch.Tensor, ...]:
        return (torch.from_numpy(features.pooled_blocks(self.pooling, clips)),)


# By name: the title in a table, and the class.
PROBES: dict[str, tuple[str, Callable[..., Probe]]] = {
    **{f"linear_{name}": (f"linear, {title}", partial(LinearProbe, pooling=name)) for name, title in TITLES.items()},
    "attentive": ("attentive pooling of patches", partial(PatchProbe, build=AttentivePooling)),
    "prototype": ("prototypes against patches", partial(PatchProbe, build=PrototypePooling)),
    "knn": ("k-NN, mean of patches", NearestNeighbors),
    **{
        f"weighted_sum_{name}": (f"weighted sum of blocks, {title}", partial(BlocksProbe, pooling=name, gated=False))
        for name, title in TITLES.items()
    },
    **{f"gated_{name}": (f"gates over blocks, {title}", partial(BlocksProbe, pooling=name, gated=True)) for name, title in TITLES.items()},
    "log_mel_statistics": (
        "linear, mean and standard deviation of log-mel bins",
        partial(LinearProbe, pooling="mean_and_std", log_mel=True),
    ),
}


def build_probe(name: str, settings: ProbeSettings | None = None, block: int | None = None) -> Probe:
    """A probe of `PROBES`, on a block of those that were encoded. `UserError` if there is none of that name."""
    if name not in PROBES:
        raise UserError(f"there is no probe {name!r}, only {', '.join(PROBES)}")
    return PROBES[name][1](settings or ProbeSettings(), block)


@dataclass(frozen=True)
class Partition:
    """Which clips train and which evaluate, by their indices; `name` is the fold or split held out."""

    name: str
    train: np.ndarray
    evaluation: np.ndarray


def hold_out_each(folds: Sequence[str]) -> list[Partition]:
    """For each of the `folds: (clips,)` a partition that trains on all others. `UserError` if there are not two folds."""
    values = np.asarray(folds)
    names = sorted(set(folds))
    if len(names) < 2:
        raise UserError(f"all clips are in the fold {', '.join(names)}, but each fold is held out in turn: give at least two")
    return [Partition(name, np.flatnonzero(values != name), np.flatnonzero(values == name)) for name in names]


def run_probe(
    name: str,
    features: Features,
    targets: np.ndarray,
    partitions: Sequence[Partition],
    seeds: Sequence[int] = (0,),
    settings: ProbeSettings | None = None,
    network: str = "",
    block: int | None = None,
) -> np.ndarray:
    """`score` of the probe `name`, trained and evaluated on each partition of the clips; errors are those of `Probe.fit`.

    Args:
        targets: `(clips,)` or `(clips, classes)`, as of `Probe`.
        seeds: random seeds for the probe's weights and order of clips.
        network: whose features they are, for the progress bar.
        block: as of `Probe`.

    Returns:
        `(partitions, seeds)`, or `(partitions, 1)` where the seed does not matter.
    """
    seeds = seeds if build_probe(name, settings).seeded else seeds[:1]
    values = np.empty((len(partitions), len(seeds)))
    where = ("" if block is None else f", block {block}") + (network and f", {network}")
    with tqdm(total=values.size, desc=f"probe {name}{where}", unit="fit") as bar:
        for row, partition in enumerate(partitions):
            train, evaluation = features.select(partition.train), features.select(partition.evaluation)
            for column, seed in enumerate(seeds):
                probe = build_probe(name, settings, block).fit(train, targets[partition.train], seed)
                values[row, column] = score(probe.scores(evaluation), targets[partition.evaluation])
                bar.update()
    return values


def score(scores: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy where targets are class indices, `(clips,)`; mean average precision where they are tags, `(clips, classes)`."""
    if targets.ndim == 1:
        return float((scores.argmax(1) == targets).mean())
    return mean_over_classes("average_precision", scores, targets, confidence=None)["mean_average_precision"]


def summarize_runs(values: np.ndarray, clips: Sequence[int] | None = None) -> Summary:
    """Of `values: (partitions, seeds)`, over independent runs: partitions (means over seeds), or the seeds of a single one.

    Of accuracies, with the number of evaluated `clips` of each partition, the interval is at least that over clips, see
    [`widen_by_clips`].
    """
    summary = summarize(_runs(values))
    if clips is None:
        return summary
    found = [(value, count, fold) for fold, (row, count) in enumerate(zip(values.tolist(), clips, strict=True)) for value in row]
    intervals = [proportion_interval(round(value * count), count) for value, count, _ in found]
    return widen_by_clips(summary, [value for value, _, _ in found], intervals, [fold for _, _, fold in found])


def summarize_gain(values: np.ndarray, others: np.ndarray) -> Summary:
    """Of `values - others`, both `(partitions, seeds)`, by partition; of a single one, whose seeds are not paired, of the means."""
    if len(values) > 1:
        return summarize_difference(_runs(values), _runs(others))
    return summarize([float(values.mean() - others.mean())])


def _runs(values: np.ndarray) -> list[float]:
    return (values.mean(1) if len(values) > 1 else values[0]).tolist()


def check_partitions(partitions: Sequence[Partition], targets: np.ndarray, classes: Sequence[str]) -> None:
    """`UserError` if a partition cannot train a class of the `targets` (as of `Probe`), or evaluate any; a warning if it cannot evaluate
    one."""
    for partition in partitions:
        check_classes_are_learnable(targets[partition.train], classes, f" with {partition.name} held out")
        evaluated = as_one_hot(targets[partition.evaluation], len(classes))
        if not (evaluated == 1).any():
            raise UserError(
                f"no clip of {partition.name} has a label, so nothing can be measured there: leave it out of test_folds, or label its clips"
            )
        if absent := [name for name, column in zip(classes, evaluated.T) if not (column == 1).any()]:
            logger.warning(f"In {partition.name} no clip has the class {', '.join(absent)}: the result there does not include it.")


def check_classes_are_learnable(targets: np.ndarray, classes: Sequence[str], when: str = "") -> None:
    """`UserError` if all or no training clips have a class, of those of which that is known."""
    one_hot = as_one_hot(targets, len(classes))
    if without := [name for name, column in zip(classes, one_hot.T) if not (column == 1).any()]:
        raise UserError(f"no training clip{when} has the class {', '.join(without)}: add some, or choose other rows")
    if everywhere := [name for name, column in zip(classes, one_hot.T) if not (column == 0).any()]:
        raise UserError(f"every training clip{when} has the class {', '.join(everywhere)}: add clips without it, or remove the class")


def as_one_hot(targets: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Tags or class indices as `(clips, classes)`, float32, as of [`Probe`]. `UserError` if they are neither, or do not fit `classes`."""
    if targets.ndim not in (1, 2) or len(targets) == 0:
        raise UserError(f"targets have shape {targets.shape}, but (clips,) or (clips, classes) is expected, and at least one clip")
    if targets.ndim == 2:
        if not np.isin(targets, (0, 1, UNKNOWN)).all() or classes not in (None, targets.shape[1]):
            raise UserError(f"targets of shape {targets.shape} must hold 0 and 1, or -100 where unknown, for {classes or 'all'} classes")
        return targets.astype(np.float32)
    if classes is None:
        classes = int(targets.max()) + 1
    if not np.issubdtype(targets.dtype, np.integer) or targets.min() < 0 or targets.max() >= classes:
        raise UserError(f"targets lie between {targets.min()} and {targets.max()}, but whole numbers from 0 to {classes - 1} are expected")
    return np.eye(classes, dtype=np.float32)[targets]


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise UserError("features or scores are NaN or infinite: check the model's weights, or lower heads.learning_rate")
    return values
