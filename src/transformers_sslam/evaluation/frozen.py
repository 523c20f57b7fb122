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
from ..pooling_sslam import POOLINGS
from ..reports import markdown_table
from ..settings import setting, settings_dict
from .best_probe import InnerFold, ProbedBlock, check_inner_folds, choose_best, inner_folds
from .features import Features, PatchDtype, block_numbers, encode_clips, hash_waveforms
from .intervals import Summary, format_summary
from .loading import load_model
from .probing import (
    PROBES,
    LinearProbe,
    Partition,
    ProbeSettings,
    build_probe,
    check_partitions,
    hold_out_each,
    run_probe,
    summarize_gain,
    summarize_runs,
)


# Beside PROBES: a training run and not a classifier on features, and a choice among several.
PUBLISHED_LINEAR, BEST_LINEAR = "published_linear", "best_linear"
DEFAULT_PROBES = ["linear_cls", "linear_mean", "linear_mean_and_std", "linear_max_by_frequency", "attentive", "prototype", "knn"]
BEST = ProbedBlock(BEST_LINEAR, None)
# Of the "trained" network, of "untrained" ones, and of the "log_mel" without one.
Values = dict[str, np.ndarray]  # (partitions, seeds)
Choices = dict[str, list[list[ProbedBlock]]]  # for each network, what BEST has chosen for each partition


@dataclass(kw_only=True)
class FrozenSettings(LabelledDataSettings, ProbeSettings):
    """Evaluation of a frozen encoder"""

    model: str = setting("encoder: a folder, a Hub id, or an official checkpoint")
    max_length: int | None = setting("frames (10 ms) that a clip is padded or cut to; null: the feature extractor's", None)
    fold_column: str | None = setting("column whose values are held out in turn; null: train_split against test_split", "fold")
    test_folds: list[int | str] = setting("values of fold_column to hold out in turn; empty: each", [])
    train_split: str = setting("split to train on, unless fold_column is set", "train")
    probes: list[str] = setting(
        "which to run: linear (on each of layers), weighted_sum or gated (over all blocks), each followed by one of "
        f"{', '.join(f'_{name}' for name in POOLINGS)}; attentive, prototype, knn; {BEST_LINEAR} (the best of these linear probes and "
        f"layers, chosen on other folds); {PUBLISHED_LINEAR} (a training run each)",
        DEFAULT_PROBES,
    )
    layers: list[int | str] = setting(
        "blocks that linear probes and k-NN read: all, or numbers, -1 for the last, 0 for the first's input", [-1]
    )
    patch_layer: int = setting("block whose patches attentive and prototype probes read", -1)
    untrained: bool = setting("probe networks of the same configuration with random weights too, one for each seed", True)
    seeds: list[int] = setting(f"random seeds of probes that are trained, untrained networks and {PUBLISHED_LINEAR}", [0, 1, 2])
    output_dir: str = setting("folder for results.json, which holds every number, and accuracy_by_block.png", "runs/probe")
    cache_dir: str = setting("folder for frozen features, which are kept from run to run and never deleted", "runs/features")
    dtype: Literal["float32", "float16", "bfloat16"] = setting("precision of the encoder", "float32")
    patch_dtype: PatchDtype = setting("precision of the patch tokens in cache_dir", "float16")
    per_device_eval_batch_size: int = setting("clips in a forward pass", 16)

    def __post_init__(self):
        super().__post_init__()
        ProbeSettings.__post_init__(self)
        known = (*PROBES, BEST_LINEAR, PUBLISHED_LINEAR)
        if unknown := [name for name in self.probes if name not in known]:
            raise UserError(f"there is no probe {unknown[0]!r}, only {', '.join(known)}")
        if not self.probes or not self.seeds or self.per_device_eval_batch_size < 1:
            raise UserError(
                f"probes are {self.probes}, seeds {self.seeds} and per_device_eval_batch_size {self.per_device_eval_batch_size}, but at "
                "least one of each is needed"
            )
        if min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds are {self.seeds}, but must be 0 or more, each given once")


@dataclass
class Task:
    """Clips, the `targets`, as of [`Probe`], whose classes have the names `classes`, and `folds`: `(clips,)`, or splits."""

    waveforms: Waveforms
    targets: np.ndarray
    classes: list[str]
    partitions: list[Partition]
    folds: list[str]


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
    folds = [groups[i] for i in waveforms.kept]
    partitions = [part for part in hold_out_each(folds) if part.name in evaluated]
    task = Task(waveforms, targets[waveforms.kept], classes, partitions, folds)
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
        Settings, metric, class names, numbers of clips and, as `probes`, a row for each probe and block: values, `(partitions, seeds)`, and
        summaries of the trained and the untrained networks and of the log-mel under the same pooling, and the gain.

    Raises:
        UserError: if the model, the data or the settings do not fit each other.
    """
    if PUBLISHED_LINEAR in settings.probes and published_linear is None:
        raise UserError(f"{PUBLISHED_LINEAR} is a training run: use `sslam probe`, or give evaluate_frozen a function that runs it")
    model, extractor = load_model(SSLAMModel, settings.model, settings.dtype, settings.device)
    if settings.max_length is not None:
        extractor.max_length = settings.max_length
    rows = _rows(settings, model.config.num_hidden_layers)
    task = read_task(settings, extractor.sampling_rate)
    inner = inner_folds(task.folds, task.partitions, task.targets) if BEST in rows else []
    check_inner_folds(inner, task.targets, task.classes)
    values, choices = _probe_features(settings, task, model, extractor, rows, inner)
    if PUBLISHED_LINEAR in settings.probes and published_linear is not None:
        values[ProbedBlock(PUBLISHED_LINEAR, None)] = {"trained": published_linear(task.partitions)}
    clips = [len(part.evaluation) for part in task.partitions] if task.targets.ndim == 1 else None
    described = [{**row._asdict(), **_describe(values[row], clips)} for row in rows]
    for who, networks in choices.items():
        described[rows.index(BEST)][who]["chosen"] = [[choice._asdict() for choice in by_fold] for by_fold in networks]
    return {
        "settings": settings_dict(settings),
        "metric": "accuracy" if task.targets.ndim == 1 else "mean_average_precision",
        "classes": task.classes,
        "clips": {part.name: {"training": len(part.train), "evaluation": len(part.evaluation)} for part in task.partitions},
        "unreadable": task.waveforms.unreadable,
        "probes": described,
    }


def _rows(settings: FrozenSettings, depth: int) -> list[ProbedBlock]:
    """Each probe on each block that it shall read."""
    blocks, patch_block = block_numbers(settings.layers, depth), block_numbers([settings.patch_layer], depth)[0]
    rows = []
    for name in settings.probes:
        probe = build_probe(name) if name in PROBES else None
        if probe is None or probe.reads == "blocks" or not probe.needs_model:
            rows.append(ProbedBlock(name, None))
        else:
            rows += [ProbedBlock(name, block) for block in ([patch_block] if probe.needs_patches else blocks)]
    if BEST in rows and len(_candidates(rows)) < 2:
        raise UserError(
            f"{BEST_LINEAR} chooses among linear probes and layers, but probes are {', '.join(settings.probes)} and layers "
            f"{settings.layers}: give several of either"
        )
    return rows


def _candidates(rows: Sequence[ProbedBlock]) -> list[ProbedBlock]:
    """Those that BEST chooses among."""
    return [row for row in rows if row.block is not None and isinstance(build_probe(row.probe), LinearProbe)]


def _on_log_mel(row: ProbedBlock) -> ProbedBlock | None:
    """The same pooling of the log-mel, as a baseline without a network; it has neither a CLS token nor several blocks."""
    probe = build_probe(row.probe)
    if probe.pooling in (None, "cls") or not probe.needs_model:
        return None
    return ProbedBlock(row.probe if probe.reads == "block" else f"linear_{probe.pooling}", 0)


def _probe_features(
    settings: FrozenSettings,
    task: Task,
    model: SSLAMModel,
    extractor: SSLAMFeatureExtractor,
    rows: Sequence[ProbedBlock],
    inner: Sequence[InnerFold],
) -> tuple[dict[ProbedBlock, Values], Choices]:
    """Values of all rows but the published protocol's."""
    rows = [row for row in rows if row.probe != PUBLISHED_LINEAR]
    probes = {row: build_probe(row.probe) for row in rows if row != BEST}
    if not probes:
        return {}, {}
    layers = {row.block for row, probe in probes.items() if row.block is not None and not probe.needs_patches}
    if any(probe.reads == "blocks" for probe in probes.values()):
        layers |= set(range(1, model.config.num_hidden_layers + 1))
    options: dict[str, Any] = {
        **{"data_key": hash_waveforms(task.waveforms), "layers": sorted(layers) or [-1], "patch_layer": settings.patch_layer},
        **{"keep_patches": any(probe.needs_patches for probe in probes.values()), "patch_dtype": settings.patch_dtype},
        "batch_size": settings.per_device_eval_batch_size,
    }

    def encode(network: SSLAMModel, title: str) -> Features:
        return encode_clips(network, extractor, task.waveforms, settings.cache_dir, description=f"encoding clips, {title}", **options)

    def run(features: Features, rows: Sequence[ProbedBlock], seeds: list[int], title: str) -> tuple[dict[ProbedBlock, np.ndarray], Any]:
        clips, chosen = (features, task.targets, task.partitions), None
        found = {row: run_probe(row.probe, *clips, seeds, settings, title, row.block) for row in rows if row != BEST}
        if BEST in rows:
            found[BEST], chosen = choose_best({row: found[row] for row in _candidates(rows)}, *clips, inner, settings, title)
        return found, chosen

    features = encode(model, "trained network")
    found, chosen = run(features, rows, settings.seeds, "trained network")
    values: dict[ProbedBlock, Values] = {row: {"trained": scores} for row, scores in found.items()}
    choices = {"trained": [chosen]}

    compared = [row for row in rows if row == BEST or probes[row].needs_model] if settings.untrained else []
    if compared:
        networks = []
        for seed in settings.seeds:
            torch.manual_seed(seed)
            untrained: Any = SSLAMModel(model.config)
            title = f"untrained network {seed}"
            networks.append(run(encode(untrained.to(model.device, model.dtype), title), compared, [seed], title))
        for row in compared:
            values[row]["untrained"] = np.concatenate([found[row] for found, _ in networks], axis=1)
        choices["untrained"] = [chosen for _, chosen in networks]

    baselines = {row: baseline for row in probes if (baseline := _on_log_mel(row))}
    if BEST in rows and _candidates(list(baselines.values())):
        baselines[BEST] = BEST
    if baselines:
        found, chosen = run(features.log_mel, list(dict.fromkeys(baselines.values())), settings.seeds, "log-mel")
        for row, baseline in baselines.items():
            values[row]["log_mel"] = found[baseline]
        if BEST in baselines:
            choices["log_mel"] = [chosen]
    return values, choices if BEST in rows else {}


def _describe(values: Values, clips: Sequence[int] | None) -> dict[str, Any]:
    described: dict[str, Any] = {who: {"values": v.tolist(), "summary": summarize_runs(v, clips).to_dict()} for who, v in values.items()}
    if "untrained" in values:
        described["gain"] = {"summary": summarize_gain(values["trained"], values["untrained"]).to_dict()}
    return described


def results_table(results: dict[str, Any]) -> str:
    """What `evaluate_frozen` returned as a Markdown table, in per cent."""
    columns = [name for name in ("trained", "untrained", "gain", "log_mel") if any(name in row for row in results["probes"])]
    titles = {name: title for name, (title, _) in PROBES.items()}
    titles |= {PUBLISHED_LINEAR: "published linear protocol", BEST_LINEAR: "best block and pooling, chosen on other folds"}
    rows = []
    for row in results["probes"]:
        cells = [format_summary(Summary(**row[column]["summary"])) if column in row else "-" for column in columns]
        rows.append([titles[row["probe"]], "-" if row["block"] is None else str(row["block"]), *cells])
    header = [f"{results['metric'].replace('_', ' ')}, %", "block", *columns]
    return markdown_table([name.replace("log_mel", "log-mel") for name in header], rows)
