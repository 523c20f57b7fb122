"""The best of several probes, chosen on the training clips of each fold: the clips that its result is on have no part in the choice.

Whoever runs many probes and reports the best one reports too much. Here an inner cross-validation over the training clips chooses, and
only the choice is scored on the fold held out.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from ..errors import UserError
from .features import Features
from .probing import Partition, ProbeSettings, as_one_hot, build_probe, check_classes_are_learnable, score


PIECES = 5  # of the training clips, where these have no folds of their own


class ProbedBlock(NamedTuple):
    """A probe by its name in `PROBES`, and the number of the block that it reads, if it reads one."""

    probe: str
    block: int | None


@dataclass(frozen=True)
class InnerFold:
    """What trains a probe for the choice, and what scores it: by name of the partition whose choice it serves, some of its training clips.

    Of clips with folds, one that is trained without the folds a and b is scored on b for the choice of a, and on a for that of b.
    """

    train: np.ndarray
    scored: dict[str, np.ndarray]
    held_out: str  # in words


def inner_folds(folds: Sequence[str], partitions: Sequence[Partition], targets: np.ndarray) -> list[InnerFold]:
    """For each partition a cross-validation over the folds that it trains on; if that is one, over fifths of it, alike in classes.

    Args:
        folds: `(clips,)`, the fold or split of each clip, by which `partitions` are named.
        targets: as of `Probe`.
    """
    groups, names, held_out = np.asarray(folds), sorted(set(folds)), {partition.name for partition in partitions}
    if len(names) > 2:
        return [
            InnerFold(
                np.flatnonzero((groups != a) & (groups != b)),
                {one: np.flatnonzero(groups == other) for one, other in ((a, b), (b, a)) if one in held_out},
                f"{a} and {b}",
            )
            for a, b in combinations(names, 2)
            if held_out & {a, b}
        ]
    return [
        InnerFold(np.setdiff1d(partition.train, piece), {partition.name: piece}, f"{partition.name} and a fifth of the others")
        for partition in partitions
        for piece in _pieces(partition.train, targets)
    ]


def _pieces(clips: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    order = np.random.default_rng(0).permutation(clips)
    if targets.ndim == 1:
        order = order[np.argsort(targets[order], kind="stable")]
    return [order[i::PIECES] for i in range(PIECES)]


def check_inner_folds(inner: Sequence[InnerFold], targets: np.ndarray, classes: Sequence[str]) -> None:
    """`UserError` if one of them cannot train a class, or score any."""
    for fold in inner:
        check_classes_are_learnable(targets[fold.train], classes, f" with {fold.held_out} held out, as best_linear does,")
        if not all((as_one_hot(targets[clips], len(classes)) == 1).any() for clips in fold.scored.values()):
            raise UserError(
                f"no clip that best_linear scores with {fold.held_out} held out has a label: leave best_linear out of probes, or label the "
                "clips"
            )


def choose_best(
    candidates: Mapping[ProbedBlock, np.ndarray],
    features: Features,
    targets: np.ndarray,
    partitions: Sequence[Partition],
    inner: Sequence[InnerFold],
    settings: ProbeSettings | None = None,
    network: str = "",
) -> tuple[np.ndarray, list[ProbedBlock]]:
    """The candidate of the highest mean score over each partition's inner folds; of equal ones, the first.

    Args:
        candidates: with the scores on what the partitions hold out, `(partitions, 1)`; the seed has no influence on such probes.
        network: whose features they are, for the progress bar.

    Returns:
        Scores of the chosen on what the partitions hold out, `(partitions, 1)`, and the chosen.
    """
    scores: dict[tuple[str, ProbedBlock], list[float]] = defaultdict(list)
    with tqdm(total=len(candidates) * len(inner), desc=f"choosing the best{network and f', {network}'}", unit="fit") as bar:
        for candidate in candidates:
            for fold in inner:
                probe = build_probe(candidate.probe, settings, candidate.block).fit(features.select(fold.train), targets[fold.train])
                for name, clips in fold.scored.items():
                    scores[name, candidate].append(score(probe.scores(features.select(clips)), targets[clips]))
                bar.update()
    chosen = [max(candidates, key=lambda candidate: np.mean(scores[part.name, candidate])) for part in partitions]
    return np.stack([candidates[candidate][row] for row, candidate in enumerate(chosen)]), chosen
