"""Evaluation of a frozen encoder on labelled clips: all probes, folds and seeds, in one table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import torch

from ..audio.cache import Waveforms
from ..audio.labelled_data import LabelledDataSettings
from ..audio.layouts import open_splits
from ..audio.rows import all_rows, check_apart, choose_classes, fold_names, fold_values, read_rows, row_folds, select_split
from ..errors import UserError
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..modeling_sslam import SSLAMModel
from ..reports import markdown_table
from ..settings import setting, settings_dict
from .features import PatchDtype, encode_clips, hash_waveforms
from .intervals import Summary, format_summary
from .loading import load_model
from .probing import (
    PROBES,
    Partition,
    ProbeSettings,
    build_probe,
    check_partitions,
    hold_out_each,
    run_probe,
    summarize_gain,
    summarize_runs,
)


PUBLISHED_LINEAR = "published_linear"  # beside PROBES, because it is a training run and not a classifier on features
Values = dict[str, np.ndarray]  # (partitions, seeds), of the "trained" network and of "untrained" ones


@dataclass(kw_only=True)
class FrozenSettings(LabelledDataSettings, ProbeSettings):
    """Evaluation of a frozen encoder"""

    model: str = setting("encoder: a folder, a Hub id, or an official checkpoint")
    max_length: int | None = setting("frames (10 ms) that a clip is padded or cut to; null: the feature extractor's", None)
    fold_column: str | None = setting("column whose values are held out in turn; null: train_split against test_split", "fold")
    test_folds: list[int | str] = setting("values of fold_column to hold out in turn; empty: each", [])
    train_split: str = setting("split to train on, unless fold_column is set", "train")
    probes: list[str] = setting(f"which to run, of {', '.join(PROBES)}, {PUBLISHED_LINEAR} (a training run each)", list(PROBES))
    untrained: bool = setting("probe networks of the same configuration with random weights too, one for each seed", True)
    seeds: list[int] = setting(f"random seeds of attentive and prototype probes, untrained networks and {PUBLISHED_LINEAR}", [0, 1, 2])
    output_dir: str = setting("folder for results.json, which holds every number", "runs/probe")
    cache_dir: str = setting("folder for frozen features, which are kept from run to run and never deleted", "runs/features")
    dtype: Literal["float32", "float16", "bfloat16"] = setting("precision of the encoder", "float32")
    patch_dtype: PatchDtype = setting("precision of the patch tokens in cache_dir", "float16")
    per_device_eval_batch_size: int = setting("clips in a forward pass", 16)

    def __post_init__(self):
        super().__post_init__()
        ProbeSettings.__post_init__(self)
        if unknown := [name for name in self.probes if name not in (*PROBES, PUBLISHED_LINEAR)]:
            raise UserError(f"there is no probe {unknown[0]!r}, only {', '.join(PROBES)}, {PUBLISHED_LINEAR}")
        if not self.probes or not self.seeds or self.per_device_eval_batch_size < 1:
            raise UserError(
                f"probes are {self.probes}, seeds {self.seeds} and per_device_eval_batch_size {self.per_device_eval_batch_size}, but at "
                "least one of each is needed"
            )
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds are {self.seeds}, but must be 0 or more, each given once")


@dataclass
class Task:
    """Clips and their `targets`: `(clips,)`, indices of `classes`, or `(clips, classes)`, 0 or 1."""

    waveforms: Waveforms
    targets: np.ndarray
    classes: list[str]
    partitions: list[Partition]


def read_task(settings: FrozenSettings, sampling_rate: int) -> Task:
    """Decode all clips that can be read, and partition them.

    Raises:
        UserError: if the data lack what the settings ask for, a file is in two parts, or a class cannot be learned.
    """
    rows, training_rows, groups = _choose_rows(settings)
    classes = choose_classes(read_rows(training_rows, settings.label_column, settings.label_separator).labels)
    labelled = read_rows(rows, settings.label_column, settings.label_separator)
    members = {group: np.flatnonzero(np.array(groups) == group) for group in sorted(set(groups))}
    check_apart({group: labelled.sources.select(chosen) for group, chosen in members.items()})
    evaluated = [settings.test_split] if settings.fold_column is None else fold_names(settings.test_folds) or list(members)
    if absent := [name for name in evaluated if name not in members]:
        raise UserError(f"the column {settings.fold_column!r} has no fold {absent[0]}, only {', '.join(members)}")
    labels = labelled.encode(classes)
    targets = labels.one_hot(range(len(labels))) if labels.multi_label else labels.indices()
    waveforms = Waveforms(labelled.sources, sampling_rate, settings.memory_gb)
    waveforms.check_unreadable(settings.max_unreadable, "probed")
    partitions = [part for part in hold_out_each([groups[i] for i in waveforms.kept]) if part.name in evaluated]
    task = Task(waveforms, targets[waveforms.kept], classes, partitions)
    check_partitions(task.partitions, task.targets, task.classes)
    return task


def _choose_rows(settings: FrozenSettings) -> tuple[datasets.Dataset, datasets.Dataset, list[str]]:
    """All rows, those that define the classes, and each row's fold or split."""
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset)
    if settings.fold_column is None:
        if settings.train_split == settings.test_split:
            raise UserError(f"train_split and test_split are both {settings.test_split!r}: evaluate on clips that were not trained on")
        chosen = {name: select_split(splits, name) for name in (settings.train_split, settings.test_split)}
        rows = all_rows(chosen)
        return rows, chosen[settings.train_split], [name for name, part in chosen.items() for _ in range(len(part))]
    rows = all_rows(splits)
    fold_values(splits, settings.fold_column)  # rejects clips without a fold
    return rows, rows, [str(fold) for fold in row_folds(rows, settings.fold_column)]


def evaluate_frozen(
    settings: FrozenSettings, published_linear: Callable[[Sequence[Partition]], np.ndarray] | None = None
) -> dict[str, Any]:
    """Run all probes that the settings ask for.

    Args:
        settings: what to probe, and how.
        published_linear: runs the published linear protocol for the probe of that name; returns values, `(partitions, seeds)`.

    Returns:
        Settings, metric, class names, numbers of clips and, for each probe, values, `(partitions, seeds)`, and summaries of the trained and
        the untrained networks, and the gain.

    Raises:
        UserError: if the model, the data or the settings do not fit each other.
    """
    if PUBLISHED_LINEAR in settings.probes and published_linear is None:
        raise UserError(f"{PUBLISHED_LINEAR} is a training run: use `sslam probe`, or give evaluate_frozen a function that runs it")
    model, extractor = load_model(SSLAMModel, settings.model, settings.dtype, settings.device)
    if settings.max_length is not None:
        extractor.max_length = settings.max_length
    task = read_task(settings, extractor.sampling_rate)
    names = [name for name in settings.probes if name in PROBES]
    values = _probe_features(settings, task, model, extractor, names) if names else {}
    if PUBLISHED_LINEAR in settings.probes and published_linear is not None:
        values[PUBLISHED_LINEAR] = {"trained": published_linear(task.partitions)}
    clips = [len(part.evaluation) for part in task.partitions] if task.targets.ndim == 1 else None
    return {
        "settings": settings_dict(settings),
        "metric": "accuracy" if task.targets.ndim == 1 else "mean_average_precision",
        "classes": task.classes,
        "clips": {part.name: {"training": len(part.train), "evaluation": len(part.evaluation)} for part in task.partitions},
        "unreadable": task.waveforms.unreadable,
        "probes": {name: _describe(values[name], clips) for name in settings.probes},
    }


def _probe_features(
    settings: FrozenSettings, task: Task, model: SSLAMModel, extractor: SSLAMFeatureExtractor, names: list[str]
) -> dict[str, Values]:
    data_key = hash_waveforms(task.waveforms)

    def run(network: SSLAMModel, names: list[str], seeds: list[int], title: str) -> Values:
        features = encode_clips(
            network,
            extractor,
            task.waveforms,
            settings.cache_dir,
            data_key=data_key,
            keep_patches=any(build_probe(name).needs_patches for name in names),
            patch_dtype=settings.patch_dtype,
            batch_size=settings.per_device_eval_batch_size,
            description=f"encoding clips, {title}",
        )
        return {name: run_probe(name, features, task.targets, task.partitions, seeds, settings, title) for name in names}

    results = {name: {"trained": values} for name, values in run(model, names, settings.seeds, "trained network").items()}
    compared = [name for name in names if build_probe(name).needs_model]
    if settings.untrained and compared:
        by_seed = []
        for seed in settings.seeds:
            torch.manual_seed(seed)
            untrained: Any = SSLAMModel(model.config)
            by_seed.append(run(untrained.to(model.device, model.dtype), compared, [seed], f"untrained network {seed}"))
        for name in compared:
            results[name]["untrained"] = np.concatenate([values[name] for values in by_seed], axis=1)
    return results


def _describe(values: Values, clips: Sequence[int] | None) -> dict[str, Any]:
    described: dict[str, Any] = {who: {"values": v.tolist(), "summary": summarize_runs(v, clips).to_dict()} for who, v in values.items()}
    if "untrained" in values:
        described["gain"] = {"summary": summarize_gain(values["trained"], values["untrained"]).to_dict()}
    return described


def results_table(results: dict[str, Any]) -> str:
    """What `evaluate_frozen` returned as a Markdown table, in per cent."""
    compared = any("untrained" in found for found in results["probes"].values())
    columns = ["trained", "untrained", "gain"] if compared else ["trained"]
    titles = {name: title for name, (title, _) in PROBES.items()} | {PUBLISHED_LINEAR: "published linear protocol"}
    rows = []
    for name, found in results["probes"].items():
        cells = [format_summary(Summary(**found[column]["summary"])) if column in found else "-" for column in columns]
        rows.append([titles[name], *cells])
    return markdown_table([f"{results['metric'].replace('_', ' ')}, %", *columns], rows)
