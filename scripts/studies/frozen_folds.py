"""Frozen encoders by fold: a network that was pre-trained without the fold, an untrained one, and log-mel statistics.

python scripts/studies/frozen_folds.py --data_dir PATH/TO/esc --clips_of_a_class 32 --architecture model_cards/sslam-small-everyday
python scripts/studies/frozen_folds.py --data_dir PATH/TO/esc --clips_of_a_class 32 --model runs/everyday/without-{fold}-seed-0/stage2/model
python scripts/studies/frozen_folds.py --data_dir PATH/TO/us8k --model runs/everyday/without-4-seed-0/stage2/model

Each fold is held out in turn. Ridge regression on standardised features of the other folds tells its clips; which block and pooling it
reads, and how strong its penalty is, is chosen by leaving each of these folds out in turn. The untrained network has another seed for each
fold. Of log-mel bins it reads mean and standard deviation over time. Beside what was chosen, `results.json` has the first and the last
block with the same pooling and penalty, and every combination, which is for looking at alone: the best of them was chosen by the clips that
it is reported on.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from transformers_sslam import SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.audio.cache import Waveforms
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import LabelledRows, all_rows, read_rows, row_folds
from transformers_sslam.configuration_sslam import ClipPooling
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.features import Features, encode_clips, hash_waveforms
from transformers_sslam.evaluation.intervals import format_summary, summarize, summarize_difference
from transformers_sslam.evaluation.loading import load_model
from transformers_sslam.evaluation.probing import hold_out_each
from transformers_sslam.files import write_json
from transformers_sslam.reports import markdown_table
from transformers_sslam.settings import parse_settings, setting, settings_dict


Candidate = tuple[int, ClipPooling, float]  # block, pooling, and strength of the L2 penalty
TITLES = {
    "trained": "frozen encoder",
    "untrained": "untrained network, another seed for each fold",
    "log_mel": "log-mel bins, mean and standard deviation",
}


@dataclass
class StudySettings:
    """Frozen encoders by fold"""

    data_dir: str = setting("audio folder of labelled clips, with a column of folds")
    label_column: str = setting("column of their classes", "label")
    fold_column: str = setting("column whose values are held out in turn", "fold")
    clips_of_a_class: int | None = setting("only classes of so many clips; null: all", None)
    model: str | None = setting("pre-trained encoder; {fold} in it stands for the fold that it was not trained on; null: none", None)
    architecture: str | None = setting("model whose configuration and input the untrained networks have; null: as model", None)
    poolings: list[ClipPooling] = setting("poolings to choose among", ["mean", "mean_and_std", "max_by_frequency"])
    ridge: list[float] = setting("strengths of the L2 penalty of the regression to choose among", [30.0, 100.0, 300.0, 1000.0, 3000.0])
    output_dir: str = setting("folder for results.json", "runs/frozen_folds")
    cache_dir: str = setting("folder for frozen features, which are kept", "runs/features")

    def __post_init__(self):
        if self.model is None and self.architecture is None:
            raise UserError("neither model nor architecture is set: give a model to probe, or one whose untrained network is probed")
        if not self.poolings or not self.ridge or not min(self.ridge) > 0:
            raise UserError(f"poolings are {self.poolings} and ridge {self.ridge}, but one pooling and one positive number are needed")


def select_clips(settings: StudySettings) -> tuple[LabelledRows, list[str]]:
    """The clips of the classes that are large enough, and their folds."""
    rows = all_rows(open_splits(settings.data_dir))
    labelled = read_rows(rows, settings.label_column)
    names = np.array([labelled.labels.names[code] for code in labelled.labels.indices()])
    sizes = Counter(names.tolist())
    chosen = np.array([settings.clips_of_a_class in (None, sizes[name]) for name in names.tolist()])
    if not chosen.any():
        raise UserError(f"no class has {settings.clips_of_a_class} clips, only {sorted(set(sizes.values()))}: set clips_of_a_class to one")
    kept, folds = np.flatnonzero(chosen), list(map(str, row_folds(rows, settings.fold_column)))
    return labelled.select(kept), [folds[i] for i in kept]


def accuracy(vectors: np.ndarray, targets: np.ndarray, train: np.ndarray, test: np.ndarray, ridge: float) -> float:
    """Of ridge regression on standardised `vectors (clips, width)`."""
    regression = make_pipeline(StandardScaler(), RidgeClassifier(alpha=ridge)).fit(vectors[train], targets[train])
    return float(np.mean(regression.predict(vectors[test]) == targets[test]))


def probe(features: Features, targets: np.ndarray, folds: Sequence[str], fold: str, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Accuracy on a fold of the candidate that is best on the other folds, each left out in turn; of equally good ones the first."""
    groups = np.asarray(folds)
    others, test = np.flatnonzero(groups != fold), np.flatnonzero(groups == fold)
    parts = hold_out_each(groups[others].tolist()) if len(candidates) > 1 else []
    inner: dict[Candidate, float] = {}
    found: dict[Candidate, float] = {}
    for block, pooling, ridge in candidates:
        vectors = np.asarray(features.pooled(pooling, block))
        found[block, pooling, ridge] = accuracy(vectors, targets, others, test, ridge)
        scores = [accuracy(vectors, targets, others[part.train], others[part.evaluation], ridge) for part in parts]
        inner[block, pooling, ridge] = float(np.mean(scores)) if scores else 0.0
    block, pooling, ridge = max(inner, key=lambda candidate: inner[candidate])
    blocks = sorted({block for block, *_ in candidates})
    return {
        "accuracy": found[block, pooling, ridge],
        "block": block,
        "pooling": pooling,
        "ridge": ridge,
        "first_block": found[blocks[0], pooling, ridge],
        "last_block": found[blocks[-1], pooling, ridge],
        "all": {f"{name}, block {number}, ridge {strength:g}": value for (number, name, strength), value in found.items()},
    }


def run(settings: StudySettings) -> dict[str, Any]:
    """All networks on all folds."""
    rows, folds = select_clips(settings)
    names, targets = sorted(set(folds)), rows.labels.indices()
    if len(names) < 3:
        raise UserError(f"the folds are {', '.join(names)}, but at least three are needed: one is held out, and among the others is chosen")
    template = settings.model or ""
    waveforms: Waveforms | None = None

    def encode(network: SSLAMModel, extractor: SSLAMFeatureExtractor, title: str) -> Features:
        nonlocal waveforms
        if waveforms is None:
            waveforms = Waveforms(rows.sources, extractor.sampling_rate)
            waveforms.check_unreadable(0.0, "probed")
        options: dict[str, Any] = {"layers": ["all"], "keep_patches": False, "data_key": hash_waveforms(waveforms)}
        return encode_clips(network, extractor, waveforms, settings.cache_dir, description=f"encoding clips, {title}", **options)

    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in TITLES if name != "trained" or template}
    for seed, fold in enumerate(names):
        described, extractor = load_model(SSLAMModel, settings.architecture or template.replace("{fold}", fold))
        torch.manual_seed(seed)
        networks: dict[str, Any] = {"untrained": SSLAMModel(described.config)}
        if template:
            networks["trained"] = load_model(SSLAMModel, template.replace("{fold}", fold))[0]
        for name, network in networks.items():
            features = encode(network.to(described.device), extractor, f"{name}, fold {fold}")
            candidates = list(product(features.blocks, settings.poolings, settings.ridge))
            results[name][fold] = probe(features, targets, folds, fold, candidates)
        statistics: list[Candidate] = [(0, "mean_and_std", ridge) for ridge in settings.ridge]
        results["log_mel"][fold] = probe(features.log_mel, targets, folds, fold, statistics)
        shown = {name: f"{100 * found[fold]['accuracy']:.1f}" for name, found in results.items()}
        print(f"fold {fold}: {shown}", flush=True)
    return {"settings": settings_dict(settings), "clips": dict(sorted(Counter(folds).items())), "folds": results}


def table(results: dict[str, Any]) -> str:
    """Accuracy in %, by fold, and its mean; paired gains of the encoder over the others; the last block against the first."""
    folds = results["folds"]
    names = list(results["clips"])

    def values(name: str, key: str = "accuracy") -> list[float]:
        return [folds[name][fold][key] for fold in names]

    rows = [[title, *(f"{100 * value:.1f}" for value in values(name)), format_summary(summarize(values(name)))]
            for name, title in TITLES.items() if name in folds]  # fmt: skip
    for name, title in TITLES.items():
        if name in folds and name != "log_mel":
            gain = summarize_difference(values(name, "last_block"), values(name, "first_block"))
            rows.append([f"{title}: last block over the first, same pooling", *[""] * len(names), format_summary(gain)])
        if name != "trained" and "trained" in folds:
            gain = summarize_difference(values("trained"), values(name))
            rows.append([f"frozen encoder over {title}", *[""] * len(names), format_summary(gain)])
    return markdown_table(["right, %, on the fold held out", *names, "mean ± standard deviation [95 % over folds]"], rows)


def main() -> None:
    transformers.logging.disable_progress_bar()
    try:
        settings = parse_settings(StudySettings, sys.argv[1:], prog="frozen_folds.py", description=__doc__)
        results = run(settings)
    except UserError as error:
        sys.exit(f"error: {error}")
    Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
    write_json(Path(settings.output_dir) / "results.json", results)
    print(table(results))


if __name__ == "__main__":
    main()
