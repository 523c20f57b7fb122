"""Frozen evaluation of one checkpoint on one labelled data set: all probes, folds and seeds, in one table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import datasets
import numpy as np
import torch

from ..audio.cache import Waveforms
from ..audio.layouts import open_splits
from ..audio.rows import all_rows, check_apart, choose_classes, fold_values, read_rows, row_folds, select_split
from ..errors import UserError
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMModel
from ..reports import format_summary, markdown_table
from ..settings import setting
from .features import Precision, ProbeError, encode_clips, hash_waveforms
from .intervals import Summary
from .pooling import best_device
from .probing import (
    PROBES,
    TITLES,
    Partition,
    ProbeSettings,
    build_probe,
    check_partitions,
    hold_out_each,
    run_probe,
    summarize_gain,
    summarize_runs,
)


PUBLISHED_LINEAR = "published_linear"  # beside PROBES, for it is no classifier on features but a training run
Values = dict[str, np.ndarray]  # (partitions, seeds), of the "trained" network and of "untrained" ones


@dataclass(kw_only=True)
class FrozenSettings(ProbeSettings):
    """Everything a frozen evaluation depends on."""

    model: str = setting("checkpoint of the encoder, a folder or Hub id")
    data_dir: str = setting("folder of the clips, or, with layout=hub, id of a data set")
    layout: str = setting("how the clips are laid out, see transformers_sslam.audio.layouts", "audiofolder")
    subset: str | None = setting("part of a data set that has several", None)
    label_column: str = setting("column of the labels; a column of lists makes the task multi-label", "label")
    label_separator: str | None = setting("between the labels of a clip that has several; makes the task multi-label too", None)
    fold_column: str | None = setting("column whose values are held out in turn; null: train_split against eval_split", "fold")
    train_split: str = setting("split to train on, if fold_column is null", "train")
    eval_split: str = setting("split to evaluate on, if fold_column is null", "test")
    max_unreadable: float = setting("share of unreadable files above which the run stops; fewer are left out and reported", 0.01)
    max_length: int | None = setting("frames (10 ms) that a clip is padded or cut to; null: the feature extractor's", None)

    probes: list[str] = setting(f"which to run, of {', '.join(PROBES)}, {PUBLISHED_LINEAR} (a training run each)", list(PROBES))
    untrained: bool = setting("probe networks of the same configuration with random weights too, one a seed", True)
    seeds: list[int] = setting(f"of attentive and prototype probes, untrained networks and {PUBLISHED_LINEAR}", [0, 1, 2])

    output_dir: str = setting("folder for results.json, which holds every number", "runs/probe")
    cache_dir: str = setting(
        "folder for frozen features, which are kept from run to run: empty it when you need the space", "runs/features"
    )
    precision: Precision = setting("of the patch tokens there", "float16")
    batch_size: int = setting("clips that are encoded at a time", 16)
    memory_gb: float = setting("memory for decoded clips; what does not fit is decoded each time", 4.0)

    def __post_init__(self):
        super().__post_init__()
        if unknown := [name for name in self.probes if name not in (*PROBES, PUBLISHED_LINEAR)]:
            raise ProbeError(f"there is no probe {unknown[0]!r}, only {', '.join(PROBES)}, {PUBLISHED_LINEAR}")
        if not self.probes or not self.seeds or self.batch_size < 1:
            raise ProbeError(
                f"probes are {self.probes}, seeds {self.seeds} and batch_size is {self.batch_size}, but of each there must be at least one"
            )
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ProbeError(f"seeds are {self.seeds}, but must be 0 or more, each given once: the same twice is one run")


@dataclass
class Task:
    """Clips and what is to be told of them: `targets` are `(clips,)`, indices of `classes`, or `(clips, classes)`, 0 or 1."""

    waveforms: Waveforms
    targets: np.ndarray
    classes: list[str]
    partitions: list[Partition]


def read_task(settings: FrozenSettings, sampling_rate: int) -> Task:
    """Decode all clips that can be read, and share them out to training and evaluation.

    Raises:
        UserError, ProbeError: (both are `ValueError`s) if the data do not hold what the settings ask for, or a class cannot be learnt.
    """
    rows, training_rows, groups = _choose_rows(settings)
    classes = choose_classes(read_rows(training_rows, settings.label_column, settings.label_separator).labels)
    labelled = read_rows(rows, settings.label_column, settings.label_separator)
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    check_apart({group: labelled.sources.select(chosen) for group, chosen in members.items()})
    labels = labelled.encode(classes)
    targets = labels.one_hot(range(len(labels))) if labels.multi_label else labels.indices()
    waveforms = Waveforms(labelled.sources, sampling_rate, settings.memory_gb)
    waveforms.check_unreadable(settings.max_unreadable, "probed")
    partitions = hold_out_each([groups[i] for i in waveforms.kept])
    if settings.fold_column is None:
        partitions = [partition for partition in partitions if partition.name == settings.eval_split]
    task = Task(waveforms, targets[waveforms.kept], classes, partitions)
    check_partitions(task.partitions, task.targets, task.classes)
    return task


def _choose_rows(settings: FrozenSettings) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """All rows, those that define the classes, and the fold or split of each row."""
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset)
    if settings.fold_column is None:
        if settings.train_split == settings.eval_split:
            raise ProbeError(f"train_split and eval_split are both {settings.eval_split!r}: evaluate on clips that were not trained on")
        chosen = {name: select_split(splits, name) for name in (settings.train_split, settings.eval_split)}
        rows = all_rows(chosen)
        return rows, chosen[settings.train_split], [name for name, part in chosen.items() for _ in range(len(part))]
    rows = all_rows(splits)
    if settings.fold_column not in rows.column_names:
        raise UserError(
            f"there is no column {settings.fold_column!r}, only {', '.join(rows.column_names)}: name another as fold_column, or set it to "
            "null to use splits"
        )
    fold_values(splits, settings.fold_column)  # refuses clips without a fold
    return rows, rows, [str(fold) for fold in row_folds(rows, settings.fold_column)]


def evaluate_frozen(
    settings: FrozenSettings, published_protocol: Callable[[FrozenSettings, Sequence[Partition]], np.ndarray] | None = None
) -> dict[str, Any]:
    """Run all probes that the settings ask for.

    Args:
        settings: what to probe, and how.
        published_protocol: runs the published linear protocol, which takes a training loop, and returns its results,
            `(partitions, seeds)`. Needed only for the probe of that name.

    Returns:
        Settings, metric, class names, numbers of clips and, for each probe, the values, `(partitions, seeds)`, and summaries of the trained
        network and of untrained ones, and the gain of the one over the others.

    Raises:
        UserError, ProbeError: (both are `ValueError`s) if the model, the data or the settings will not do.
    """
    if PUBLISHED_LINEAR in settings.probes and published_protocol is None:
        raise ProbeError(f"{PUBLISHED_LINEAR} is a training run, and nothing was given that could run it: use scripts/probe.py")
    try:
        extractor = SSLAMFeatureExtractor.from_pretrained(settings.model)
        loaded: Any = SSLAMModel.from_pretrained(settings.model, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise ProbeError(f"the model {settings.model} cannot be loaded: {error}") from error
    model, loading = loaded
    if missing := loading["missing_keys"]:
        raise ProbeError(f"{settings.model} does not fill the encoder ({min(missing)} is missing, and {len(missing) - 1} more)")
    if settings.max_length is not None:
        extractor.max_length = settings.max_length
    task = read_task(settings, extractor.sampling_rate)
    names = [name for name in settings.probes if name in PROBES]
    values = _probe_features(settings, task, model, extractor, names) if names else {}
    if PUBLISHED_LINEAR in settings.probes and published_protocol is not None:
        values[PUBLISHED_LINEAR] = {"trained": published_protocol(settings, task.partitions)}
    return {
        "settings": asdict(settings),
        "metric": "accuracy" if task.targets.ndim == 1 else "mean_average_precision",
        "classes": task.classes,
        "clips": {part.name: {"training": len(part.train), "evaluation": len(part.evaluation)} for part in task.partitions},
        "unreadable": task.waveforms.unreadable,
        "probes": {name: _describe(values[name]) for name in settings.probes},
    }


def _probe_features(
    settings: FrozenSettings, task: Task, model: SSLAMModel, extractor: SSLAMFeatureExtractor, names: list[str]
) -> dict[str, Values]:
    data_key, device = hash_waveforms(task.waveforms), best_device()

    def run(network: SSLAMModel, names: list[str], seeds: list[int]) -> Values:
        features = encode_clips(
            network.to(device),  # type: ignore[arg-type]  # a wrapper of transformers hides the signature
            extractor,
            task.waveforms,
            settings.cache_dir,
            data_key=data_key,
            keep_patches=any(build_probe(name).needs_patches for name in names),
            precision=settings.precision,
            batch_size=settings.batch_size,
        )
        return {name: run_probe(name, features, task.targets, task.partitions, seeds, settings) for name in names}

    results = {name: {"trained": values} for name, values in run(model, names, settings.seeds).items()}
    compared = [name for name in names if build_probe(name).needs_model]
    if settings.untrained and compared:
        by_seed = []
        for seed in settings.seeds:
            torch.manual_seed(seed)
            by_seed.append(run(SSLAMModel(model.config), compared, [seed]))
        for name in compared:
            results[name]["untrained"] = np.concatenate([values[name] for values in by_seed], axis=1)
    return results


def _describe(values: Values) -> dict[str, Any]:
    described: dict[str, Any] = {who: {"values": v.tolist(), "summary": summarize_runs(v).to_dict()} for who, v in values.items()}
    if "untrained" in values:
        described["gain"] = {"summary": summarize_gain(values["trained"], values["untrained"]).to_dict()}
    return described


def results_table(results: dict[str, Any]) -> str:
    """What `evaluate_frozen` returned as a Markdown table, a row a probe, in per cent."""
    compared = any("untrained" in found for found in results["probes"].values())
    columns = ["trained", "untrained", "gain"] if compared else ["trained"]
    titles = {**TITLES, PUBLISHED_LINEAR: "published linear protocol"}
    rows = []
    for name, found in results["probes"].items():
        cells = [format_summary(Summary(**found[column]["summary"])) if column in found else "-" for column in columns]
        rows.append([titles[name], *cells])
    return markdown_table([f"{results['metric'].replace('_', ' ')}, %", *columns], rows)


__all__ = ["PUBLISHED_LINEAR", "FrozenSettings", "Task", "evaluate_frozen", "read_task", "results_table"]
