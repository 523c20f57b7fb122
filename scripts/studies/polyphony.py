"""Results of mixtures and source retention, by how many sounds overlap: the four variants of SSLAM's ablation at equal compute, and others.

python scripts/studies/polyphony.py --data_dir PATH/TO/esc10
python scripts/studies/polyphony.py --data_dir PATH/TO/esc10 --seeds 0 2 4  # and, at the same time, the others: --seeds 1 3
python scripts/studies/polyphony.py --data_dir PATH/TO/esc10 --methods linear attentive \
  --variants unmixed mixed both retention three_sources mixture_invariant

Each seed holds out a fold. On the others, stage 1 is pre-trained once, and stage 2 continues from it in four ways (section 5 of SSLAM,
ICLR 2025, arXiv 2506.12222): unmixed clips only (MB-UA), mixtures only (MB-PMA), both (MB-UA-PMA), both and source retention (SSLAM), with
the same number of views a clip and as many updates as the same floating-point operations allow. `variants` may add retention of three
sources with gains, and the mixture-invariant baseline in its place. Then each is probed, frozen, and fine-tuned
on mixtures of k events made from the same folds, and tested on mixtures of the fold held out: mean average precision by k.
Stage 1 is shared with scripts/study_small_model.py where `stage1_dir` and the changes are the same. Finished steps are found again.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from steps import copy_clips, pretrain_on_folds, read_records

from transformers_sslam import PRETRAINING_STAGES, SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import fold_values
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.features import encode_clips
from transformers_sslam.evaluation.frozen import FrozenSettings, read_task
from transformers_sslam.evaluation.intervals import format_summary, independent_values, summarize, summarize_difference
from transformers_sslam.evaluation.metrics import average_precision
from transformers_sslam.evaluation.probing import build_probe
from transformers_sslam.files import write_json
from transformers_sslam.finetuning.repeats import fine_tune_once
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.polyphony.benchmark import BenchmarkSettings, make_benchmark
from transformers_sslam.polyphony.render import MixtureSettings
from transformers_sslam.pretraining.monitoring import training_flops_per_clip
from transformers_sslam.pretraining.settings import PreTrainingSettings
from transformers_sslam.reports import markdown_table
from transformers_sslam.settings import parse_settings, read_settings, setting


# Fields of the model, over those of the recipe; one half has twice the views, so that a clip is seen as often.
VARIANTS: dict[str, dict[str, Any]] = {
    "unmixed": {"use_mixtures": False},
    "mixed": {"use_unmixed": False, "source_retention_loss_weight": 0},
    "both": {"source_retention_loss_weight": 0},
    "retention": {},
    "three_sources": {"num_sources": 3, "gain_db": [-10, 10], "mixing_partners": "batch"},
    "mixture_invariant": {"objective": "mixture_invariant"},
}
PUBLISHED = ["unmixed", "mixed", "both", "retention"]
TITLES = {
    "unmixed": "unmixed only (MB-UA)",
    "mixed": "mixed only (MB-PMA)",
    "both": "both (MB-UA-PMA)",
    "retention": "both + retention (SSLAM)",
    "three_sources": "both + retention, 3 sources with gains",
    "mixture_invariant": "both + mixture-invariant loss",
}
METHODS = {"linear": "frozen, linear on mean patches", "attentive": "frozen, attentive probe", "fine-tuned": "fine-tuned"}
PROBES = {"linear": "linear_mean", "attentive": "attentive"}
ALL = "all"  # beside the numbers of events


@dataclass
class StudySettings:
    data_dir: str = setting("folder of single sounds, an 'audiofolder' with the columns `label`, `fold` and `source`")
    output_dir: str = setting("folder for all models and results", "runs/polyphony")
    stage1_dir: str = setting("folder for the runs of stage 1", "runs/small_model")
    seeds: list[int] = setting("one repetition each; seed s holds out fold number s modulo the number of folds", [0, 1, 2, 3, 4])
    stage1: str = setting("recipe of the first stage", "pretrain_tiny_stage1")
    stage2: str = setting("recipe of the second stage; its number of steps is that of `retention`", "pretrain_tiny_stage2")
    finetuning_recipe: str = setting("recipe of the fine-tuning", "finetune_tiny_polyphonic")
    pretraining: dict[str, Any] = setting("changes to both recipes of pre-training, by name", {})
    pretraining_stage2: dict[str, Any] = setting("changes to the recipe of the second stage alone, by name", {})
    finetuning: dict[str, Any] = setting("changes to the recipe of fine-tuning, by name", {})
    num_events: list[int] = setting("numbers of events of a mixture", [1, 2, 3, 4, 6, 8, 10, 14])
    train_clips: int = setting("training mixtures for each number of events", 40)
    test_clips: int = setting("test mixtures for each number of events", 60)
    variants: list[str] = setting(f"what is compared, unmixed among it: some of {', '.join(VARIANTS)}", PUBLISHED)
    methods: list[str] = setting(f"how it is compared: some of {', '.join(METHODS)}", list(METHODS))

    def __post_init__(self):
        for name, known in (("variants", VARIANTS), ("methods", METHODS)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise UserError(f"{name} names {', '.join(unknown)}, but some of {', '.join(known)} are expected")
        if "unmixed" not in self.variants or not self.methods:
            raise UserError("variants must have unmixed, with which the others are compared, and methods one at least")


def variant_settings(stage2: str, changes: dict[str, Any], variant: str, stage1: Path) -> dict[str, Any]:
    """Of a variant's stage 2: steps, as many as cost what those of the recipe cost with retention; and its fields, views among them.

    Args:
        stage2: recipe of `sslam pretrain`.
        changes: to that recipe, by name.
        variant: of `VARIANTS`.
        stage1: the model to start from.
    """
    # Which the recipe need not say, and nothing here follows.
    elsewhere: dict[str, Any] = {"data.sources": [{"kind": "folder", "path": "none"}], "output_dir": "none"}
    recipe = read_settings(PreTrainingSettings, stage2, {**changes, **elsewhere})
    frames = SSLAMFeatureExtractor(**recipe.feature_extractor).max_length

    def fields(name: str) -> dict[str, Any]:
        halves = 1 if name in ("unmixed", "mixed") else 2
        views = recipe.model_config.get("num_views", PRETRAINING_STAGES[2]["num_views"]) * 2 // halves
        return {**VARIANTS[name], "num_views": views}

    def cost(name: str) -> float:
        model: dict[str, Any] = {**PRETRAINING_STAGES[2], **recipe.model_config, **fields(name)}
        return training_flops_per_clip(SSLAMConfig.from_pretrained(stage1, **model), frames)

    steps = round(recipe.max_steps * cost("retention") / cost(variant))
    return {"max_steps": steps, **{f"model_config.{name}": value for name, value in fields(variant).items()}}


def make_mixtures(settings: StudySettings, clips: Path, others: Sequence[int | str], fold: int | str, seed: int, seconds: float) -> Path:
    """Mixtures of the folds to train on and of the one held out, as long as the model's input."""
    output = Path(settings.output_dir) / f"seed-{seed}" / "mixtures"
    mixtures = BenchmarkSettings(
        data_dir=str(clips),
        output_dir=str(output),
        group_column="source",
        fold_column="fold",
        train_folds=list(others),
        test_folds=[fold],
        num_events=settings.num_events,
        train_clips=settings.train_clips,
        test_clips=settings.test_clips,
        mixing=MixtureSettings(clip_seconds=seconds, event_seconds=seconds / 2),
        seed=seed,
    )
    made, wanted = output.with_suffix(".json"), json.loads(json.dumps(asdict(mixtures)))
    if not output.exists():
        make_benchmark(mixtures)
        write_json(made, wanted)
    elif not made.is_file() or json.loads(made.read_text()) != wanted:
        raise UserError(f"{output} holds mixtures of other settings: delete it, or give another output_dir")
    return output


def by_events(scores: np.ndarray, targets: np.ndarray, num_events: np.ndarray) -> dict[str, float]:
    """Mean average precision over the classes that have positives: of the clips of each number of events, and of all."""

    def mean(rows: np.ndarray) -> float:
        return float(np.nanmean(average_precision(scores[rows], targets[rows])))

    found = {str(k): mean(num_events == k) for k in sorted(set(num_events.tolist()))}
    return {**found, ALL: mean(np.ones(len(scores), bool))}


def probe(model: Path, mixtures: Path, num_events: np.ndarray, methods: Sequence[str]) -> dict[str, dict[str, float]]:
    """Frozen student: probes trained on the training mixtures, on the test mixtures."""
    if not methods:
        return {}
    extractor = SSLAMFeatureExtractor.from_pretrained(model)
    task = read_task(
        FrozenSettings(model=str(model), data_dir=str(mixtures), layout="parquet", label_column="labels", fold_column=None),
        extractor.sampling_rate,
    )
    (partition,) = task.partitions
    features = encode_clips(SSLAMModel.from_pretrained(model, dtype=torch.float32), extractor, task.waveforms)
    train, test = features.select(partition.train), features.select(partition.evaluation)
    found = {}
    for name in methods:
        scores = build_probe(PROBES[name]).fit(train, task.targets[partition.train], seed=0).scores(test)
        found[name] = by_events(scores, task.targets[partition.evaluation], num_events)
    return found


def run(settings: StudySettings, clips: Path, every: Sequence[int | str], seed: int) -> dict:
    """All variants of one seed: mean average precision by variant, method and number of events."""
    fold = every[seed % len(every)]
    others = [other for other in every if other != fold]
    output = Path(settings.output_dir) / f"seed-{seed}"
    shared = {"seed": seed, **settings.pretraining}
    stage1, _ = pretrain_on_folds(settings.stage1, clips, others, Path(settings.stage1_dir) / f"fold-{fold}-seed-{seed}" / "stage1", shared)
    seconds = SSLAMFeatureExtractor.from_pretrained(stage1).max_length / 100
    mixtures = make_mixtures(settings, clips, others, fold, seed, seconds)
    num_events = np.array(open_splits(str(mixtures), "parquet")["test"]["num_events"])
    record: dict = {"settings": comparable(settings), "fold": fold, "precision": {}, "steps": {}, "cpu_seconds": {}}
    for variant in settings.variants:
        changes = {**shared, **settings.pretraining_stage2}
        own = variant_settings(settings.stage2, changes, variant, stage1)
        record["steps"][variant] = own["max_steps"]
        changes |= {"model": str(stage1), **own}
        model, record["cpu_seconds"][variant] = pretrain_on_folds(settings.stage2, clips, others, output / variant, changes)
        found = probe(model, mixtures, num_events, [method for method in PROBES if method in settings.methods])
        if "fine-tuned" in settings.methods:
            tuned = output / f"{variant}-fine-tuned"
            fixed = {"data_dir": str(mixtures), "model": str(model), "output_dir": str(tuned), "seed": seed}
            fine_tune_once(read_settings(FineTuningSettings, settings.finetuning_recipe, {**settings.finetuning, **fixed}))
            scores = np.load(tuned / "scores.npz")
            found["fine-tuned"] = by_events(scores["logits"], scores["targets"], num_events)
        record["precision"][variant] = found
    write_json(output / "results.json", record)
    return record


def comparable(settings: StudySettings) -> dict[str, Any]:
    """What all runs of a table must have in common."""
    return {name: value for name, value in asdict(settings).items() if name not in ("data_dir", "output_dir", "stage1_dir", "seeds")}


def report(settings: StudySettings) -> str:
    """Tables by method of all seeds that are finished by these settings, `results.json` of what they hold, and the plot. Seeds that are
    tested on the same fold count once, by their mean."""
    records, others = read_records(Path(settings.output_dir).glob("seed-*/results.json"), comparable(settings))
    if others:
        print(f"left out, for they are of other settings: {', '.join(others)}", file=sys.stderr)
    if not records:
        return "no run is finished yet"
    columns = [*map(str, settings.num_events), ALL]
    folds = [record["fold"] for record in records.values()]
    precision = {
        method: {
            variant: {
                k: independent_values([record["precision"][variant][method][k] for record in records.values()], folds) for k in columns
            }
            for variant in settings.variants
        }
        for method in settings.methods
    }
    write_json(Path(settings.output_dir) / "results.json", {"runs": records, "precision": precision})
    tables = []
    for method in settings.methods:
        rows = []
        for variant, values in precision[method].items():
            gain = summarize_difference(values[ALL], precision[method]["unmixed"][ALL])
            cells = [f"{100 * np.mean(values[k]):.1f}" for k in columns[:-1]]
            overall = format_summary(summarize(values[ALL]))
            rows.append([TITLES[variant], *cells, overall, "-" if variant == "unmixed" else format_summary(gain)])
        header = [
            f"{METHODS[method]}: mAP, % by k",
            *columns[:-1],
            f"all, mean ± standard deviation [95 %] of {len(set(folds))} folds, {len(records)} seeds",
            "over unmixed only, paired",
        ]
        tables.append(markdown_table(header, rows))
    plot(settings, precision)
    return "\n\n".join(tables)


def plot(settings: StudySettings, precision: dict) -> Path:
    """Mean average precision against the number of events, with 95 % intervals over folds: `precision.png`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    width = 4.2 * len(settings.methods)
    figure, axes = pyplot.subplots(1, len(settings.methods), figsize=(width, 3.6), sharex=True, constrained_layout=True, squeeze=False)
    for axis, method in zip(axes[0], settings.methods):
        for offset, (variant, values) in enumerate(precision[method].items()):
            summaries = [summarize(values[str(k)]) for k in settings.num_events]
            means = np.array([summary.mean for summary in summaries])
            bounds = np.abs(np.array([[summary.low, summary.high] for summary in summaries]).T - means)
            places = np.array(settings.num_events) + 0.12 * (
                offset - (len(settings.variants) - 1) / 2
            )  # side by side, so that no interval hides another
            axis.errorbar(places, 100 * means, 100 * bounds, label=TITLES[variant], capsize=2, marker="o", markersize=3, linewidth=1)
        axis.set(title=METHODS[method], xlabel="events that sound at once (k)", ylabel="mAP, %", xticks=settings.num_events)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize="small")
    path = Path(settings.output_dir) / "precision.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main() -> None:
    transformers.logging.disable_progress_bar()
    try:
        settings = parse_settings(StudySettings, sys.argv[1:], prog="polyphony.py", description=__doc__)
        every = fold_values(open_splits(settings.data_dir), "fold")
        clips = copy_clips(settings.data_dir, Path(settings.stage1_dir) / "clips")
        for seed in settings.seeds:
            precision = run(settings, clips, every, seed)["precision"]
            print(
                f"seed {seed}: " + json.dumps({v: {m: round(p[ALL], 3) for m, p in found.items()} for v, found in precision.items()}),
                flush=True,
            )
    except UserError as error:
        sys.exit(f"error: {error}")
    print(report(settings))


if __name__ == "__main__":
    main()
