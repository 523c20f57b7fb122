"""Do mixtures in pre-training help where sounds overlap? Everyday sounds, speakers and instruments, six ways to pre-train, frozen encoders.

python scripts/studies/polyphony.py --sources '[{kind: audiofolder, path: PATH/TO/esc, keep: {fold: [1, 2, 3]}}]' \
    --tasks '{sounds: runs/polyphonic_sounds, speakers: runs/polyphonic_speakers, instruments: runs/polyphonic_instruments}'

For each seed stage 1 is pre-trained once, and stage 2 continues from it in several ways: on unmixed clips only (MB-UA of SSLAM, ICLR 2025,
arXiv 2506.12222, section 5), mixtures only (MB-PMA), both (MB-UA-PMA), both with source retention (SSLAM), with retention of three sources
with gains, and with the mixture-invariant loss in its place; with the same number of views a clip, and as many updates as the same
floating-point operations allow. Then each student is probed, frozen, on every task: mixtures made by `sslam mix`, of which probes are
trained on the training split and tested on the other. Beside them stand the student of stage 1, and untrained networks. Seeds differ in
weights, masks, mixtures and the order of clips; the tasks are the same for all. Finished steps are found again: seeds can be added later.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from scipy.optimize import brentq
from scipy.stats import nct, t
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from steps import pretrain_once, read_or_none

from transformers_sslam import PRETRAINING_STAGES, SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import all_rows
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.features import Features, encode_clips, hash_waveforms
from transformers_sslam.evaluation.frozen import FrozenSettings, Task, read_task
from transformers_sslam.evaluation.intervals import Summary, format_summary, summarize_difference
from transformers_sslam.evaluation.loading import hash_model
from transformers_sslam.evaluation.metrics import average_precision
from transformers_sslam.evaluation.probing import build_probe
from transformers_sslam.fbank import num_frames
from transformers_sslam.files import write_json
from transformers_sslam.pretraining.monitoring import training_flops_per_clip
from transformers_sslam.pretraining.settings import PreTrainingSettings
from transformers_sslam.reports import markdown_table
from transformers_sslam.settings import parse_settings, read_settings, setting


# Fields of the model, over those of the recipe. Variants with one half have twice the views, so that each clip has the same number of them.
VARIANTS: dict[str, dict[str, Any]] = {
    "unmixed": {"use_mixtures": False},
    "mixed": {"use_unmixed": False, "source_retention_loss_weight": 0},
    "both": {"source_retention_loss_weight": 0},
    "retention": {},
    "three_sources": {"num_sources": 3, "gain_db": [-10, 10], "mixing_partners": "batch"},
    "mixture_invariant": {"objective": "mixture_invariant"},
}
TITLES = {
    "unmixed": "unmixed only (MB-UA)",
    "mixed": "mixed only (MB-PMA)",
    "both": "both (MB-UA-PMA)",
    "retention": "both + retention (SSLAM)",
    "three_sources": "both + retention, 3 sources with gains",
    "mixture_invariant": "both + mixture-invariant loss",
}
BASELINES = {"untrained": "untrained", "stage1": "stage 1 (EAT) alone"}
PROBES = {"mean": "linear_mean", "maximum": "linear_max_by_frequency"}
STEPS = "steps"  # beside them: which sounds at which time
ALL = "all"  # beside the numbers of events
METHODS = {
    "mean": "clips, linear on mean patches",
    "maximum": "clips, linear on the maximum over time by frequency",
    STEPS: "steps of 160 ms, linear on their patches",
}
PENALTY = 1e3  # of the squared weights, chosen with the student of stage 1 of one seed
VERSION = 1  # of `probe`, to be raised when its results change
POWER = 0.8
Records = dict[int, dict[str, Any]]  # of each seed, what `run` returns


@dataclass
class StudySettings:
    sources: list[dict[str, Any]] = setting("recordings to pre-train on, none of those that test mixtures are made of")
    tasks: dict[str, str] = setting("folders of mixtures, as `sslam mix` writes them, by name")
    output_dir: str = setting("folder for all models and results", "runs/polyphony")
    seeds: list[int] = setting("one repetition each", [0, 1, 2])
    variants: list[str] = setting(f"what is compared, unmixed among it: some of {', '.join(VARIANTS)}", list(VARIANTS))
    stage1: str = setting("recipe of the first stage", "pretrain_tiny_stage1")
    stage2: str = setting("recipe of the second stage; its number of steps is that of `retention`", "pretrain_tiny_stage2")
    pretraining: dict[str, Any] = setting("changes to both recipes, by name", {})
    pretraining_stage1: dict[str, Any] = setting("changes to the recipe of the first stage alone, by name", {})
    pretraining_stage2: dict[str, Any] = setting("changes to the recipe of the second stage alone, by name", {})

    def __post_init__(self):
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise UserError(f"variants names {', '.join(unknown)}, but some of {', '.join(VARIANTS)} are expected")
        if "unmixed" not in self.variants or len(set(self.variants)) < len(self.variants):
            raise UserError(f"variants are {', '.join(self.variants)}, but must be different ones with unmixed, to which they are compared")
        if not self.tasks or not self.seeds:
            raise UserError("tasks or seeds are empty, but at least one of each is needed")


def variant_settings(stage2: str, changes: dict[str, Any], variant: str, stage1: Path) -> dict[str, Any]:
    """Settings of a variant's stage 2: its fields of the model, and the number of steps that costs as much as the recipe's with retention.

    Args:
        stage2: recipe of `sslam pretrain`.
        changes: to that recipe, by name.
        variant: of `VARIANTS`.
        stage1: the model to start from.
    """
    # Placeholders: required settings that do not change the cost.
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


@dataclass(frozen=True)
class Mixtures:
    """A task: clips with their labels, and what sounds when.

    Attributes:
        task: clips, targets and the two splits.
        num_events: `(clips,)`, events of each.
        spans: events of each clip, as class, onset and offset in seconds.
        key: a hash of the waveforms.
    """

    task: Task
    num_events: np.ndarray
    spans: list[list[tuple[int, float, float]]]
    key: str

    @property
    def train(self) -> np.ndarray:
        return self.task.partitions[0].train

    @property
    def test(self) -> np.ndarray:
        return self.task.partitions[0].evaluation

    def step_targets(self, clips: np.ndarray, steps: int, seconds: float) -> np.ndarray:
        """`(clips * steps, classes)`: whether the class sounds in the middle of each step of so many seconds."""
        middles = (np.arange(steps) + 0.5) * seconds
        targets = np.zeros((len(clips), steps, len(self.task.classes)), np.int64)
        for row, clip in enumerate(clips):
            for label, onset, offset in self.spans[clip]:
                targets[row, (onset <= middles) & (middles < offset), label] = 1
        return targets.reshape(-1, targets.shape[-1])


@cache
def read_mixtures(data_dir: str, sampling_rate: int) -> Mixtures:
    """All clips of a task, decoded.

    Raises:
        UserError: if the folder is not one of `sslam mix`.
    """
    about = FrozenSettings(model="", data_dir=data_dir, layout="parquet", label_column="labels", fold_column=None)
    task = read_task(about, sampling_rate)
    splits = open_splits(data_dir, "parquet")
    rows = all_rows({name: splits[name] for name in (about.train_split, about.test_split)}).remove_columns("audio")
    if missing := {"events", "num_events"} - set(rows.column_names):
        raise UserError(f"{data_dir} has no column {min(missing)}: give a folder that `sslam mix` wrote")
    rows = rows.select(task.waveforms.kept)
    names = rows.features["events"].feature["label"].names
    spans = [[(task.classes.index(names[e["label"]]), e["onset"], e["offset"]) for e in found] for found in rows["events"]]
    return Mixtures(task, np.array(rows["num_events"]), spans, hash_waveforms(task.waveforms))


def step_vectors(features: Features, steps: int, frequencies: int) -> np.ndarray:
    """All patches of a time step one after the other, of the first steps: `(clips * steps, frequencies * hidden_size)`."""
    tokens, _ = features.patch_tokens(np.arange(len(features)))
    return tokens[:, : steps * frequencies].reshape(len(features) * steps, -1).numpy()


def by_events(scores: np.ndarray, targets: np.ndarray, num_events: np.ndarray) -> dict[str, float]:
    """Mean average precision over the classes that have positives: of the clips of each number of events, and of all."""

    def mean(rows: np.ndarray) -> float:
        return float(np.nanmean(average_precision(scores[rows], targets[rows])))

    found = {str(k): mean(num_events == k) for k in sorted(set(num_events.tolist()))}
    return {**found, ALL: mean(np.ones(len(scores), bool))}


def probe(model: SSLAMModel, extractor: SSLAMFeatureExtractor, mixtures: Mixtures) -> dict[str, dict[str, float]]:
    """Mean average precision on the test mixtures, by method and number of events.

    Raises:
        UserError: if the model takes shorter clips only.
    """
    task, config = mixtures.task, model.config
    frames = [num_frames(len(waveform), extractor.sampling_rate) for waveform in task.waveforms]
    if max(frames) > config.max_length:
        raise UserError(
            f"a mixture has {max(frames)} frames (10 ms), but the model takes {config.max_length}: mix shorter clips, or pre-train with a "
            "larger max_length"
        )
    extractor.max_length = -(-max(frames) // config.patch_size) * config.patch_size  # no longer than the clips, for time
    features = encode_clips(model, extractor, task.waveforms)
    train, test = features.select(mixtures.train), features.select(mixtures.test)
    targets, num_events = task.targets[mixtures.test], mixtures.num_events[mixtures.test]
    found = {}
    for method, name in PROBES.items():
        scores = build_probe(name).fit(train, task.targets[mixtures.train], seed=0).scores(test)
        found[method] = by_events(scores, targets, num_events)
    steps, seconds = min(frames) // config.patch_size, config.patch_size / 100  # whole ones, which all clips have
    known, wanted = (mixtures.step_targets(clips, steps, seconds) for clips in (mixtures.train, mixtures.test))
    regression = make_pipeline(StandardScaler(), Ridge(PENALTY)).fit(step_vectors(train, steps, config.num_frequency_patches), known)
    scores = regression.predict(step_vectors(test, steps, config.num_frequency_patches))
    found[STEPS] = by_events(scores, wanted, np.repeat(num_events, steps))
    return found


def probe_once(model: SSLAMModel, extractor: SSLAMFeatureExtractor, data_dir: str, file: Path) -> dict[str, dict[str, float]]:
    """[`probe`], unless `file` holds its result for the very same network, mixtures and methods."""
    mixtures = read_mixtures(data_dir, extractor.sampling_rate)
    labels = {"targets": mixtures.task.targets.tolist(), "spans": mixtures.spans, "test": mixtures.test.tolist()}
    key = hash_model(model, extractor, data=mixtures.key, methods=[PROBES, PENALTY, VERSION], **labels)
    saved = read_or_none(file)
    if saved is None or saved.get("key") != key:
        saved = {"key": key, "precision": probe(model, extractor, mixtures)}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, saved, sealed=True)
    return saved["precision"]


def pretrain(settings: StudySettings, seed: int) -> tuple[dict[str, Path], dict[str, int]]:
    """The models of one seed by variant, with the one that they all started from as `stage1`, and the number of steps of each."""
    output = Path(settings.output_dir) / f"seed-{seed}"
    shared = {**settings.pretraining, "data.sources": settings.sources, "seed": seed}
    models, steps = {}, {}

    def train(recipe: str, name: str, changes: dict[str, Any]) -> None:
        run = read_settings(PreTrainingSettings, recipe, {**shared, **changes, "output_dir": str(output / name)})
        models[name], steps[name] = pretrain_once(run)[0], run.max_steps

    train(settings.stage1, "stage1", settings.pretraining_stage1)
    for variant in settings.variants:
        own = variant_settings(settings.stage2, {**shared, **settings.pretraining_stage2}, variant, models["stage1"])
        train(settings.stage2, variant, {**settings.pretraining_stage2, "model": str(models["stage1"]), **own})
    return models, steps


def run(settings: StudySettings, seed: int) -> dict[str, Any]:
    """Everything of one seed: steps by network, and mean average precision by network, task, method and number of events."""
    output = Path(settings.output_dir) / f"seed-{seed}"
    models, steps = pretrain(settings, seed)
    precision: dict[str, Any] = {}
    for name in (*BASELINES, *settings.variants):
        folder = models.get(name, models["stage1"])
        if name == "untrained":
            torch.manual_seed(seed)
            network = SSLAMModel(SSLAMConfig.from_pretrained(folder))
        else:
            network = SSLAMModel.from_pretrained(folder, dtype=torch.float32)
        precision[name] = {
            task: probe_once(network, SSLAMFeatureExtractor.from_pretrained(folder), data_dir, output / "probes" / f"{name}-{task}.json")
            for task, data_dir in settings.tasks.items()
        }
    return {"steps": steps, "precision": precision}


def detectable_difference(std: float, count: int, power: float = POWER) -> float:
    """The smallest true difference that a paired, two-sided t-test at 5 % finds with this probability.

    Args:
        std: standard deviation of the differences of single pairs.
        count: of pairs, two at least.
        power: that probability.
    """
    limit = t.ppf(0.975, count - 1)
    effect = brentq(lambda effect: nct.sf(limit, count - 1, effect) - power, 0.0, 100.0)  # in standard errors
    return float(effect * std / np.sqrt(count))


def gain_of(records: Records, variant: str, task: str, method: str, k: str = ALL) -> Summary | None:
    """Of a network over the one of unmixed clips, paired by seed; `None` where the task has no mixtures of k events."""
    pairs = [[record["precision"][name][task][method].get(k) for name in (variant, "unmixed")] for record in records.values()]
    values, others = zip(*pairs)
    return None if None in values else summarize_difference(values, others)


def report(settings: StudySettings, records: Records) -> str:
    """Tables of each task: mean average precision and paired gains by network; the smallest gain that could be found; gains by number of
    events."""
    tables = []
    others = [name for name in settings.variants if name != "unmixed"]
    for task in settings.tasks:
        rows = []
        for name, title in {**BASELINES, **{name: TITLES[name] for name in settings.variants}}.items():
            row = [title]
            for method in METHODS:
                mean = np.mean([record["precision"][name][task][method][ALL] for record in records.values()])
                gain = gain_of(records, name, task, method)
                row += [f"{100 * mean:.1f}", "-" if name == "unmixed" or gain is None else format_summary(gain, decimals=2)]
            rows.append(row)
        if others and len(records) > 1:
            row = [f"gain that {len(records)} seeds find with probability {POWER:g}"]
            for method in METHODS:
                stds = [gain.std for name in others if (gain := gain_of(records, name, task, method))]
                row += ["", f"{100 * detectable_difference(float(np.sqrt(np.mean(np.square(stds)))), len(records)):.2f}"]
            rows.append(row)
        header = [f"{task}: mAP, %", *(cell for title in METHODS.values() for cell in (title, "over unmixed only, paired"))]
        tables.append(markdown_table(header, rows))
    for method, title in METHODS.items():
        numbers = {k for record in records.values() for by_k in record["precision"]["unmixed"].values() for k in by_k[method]} - {ALL}
        columns = sorted(numbers, key=int)
        rows = [
            [
                task,
                TITLES[name],
                *("" if (gain := gain_of(records, name, task, method, k)) is None else format_summary(gain) for k in columns),
            ]
            for task in settings.tasks
            for name in others
        ]
        tables.append(markdown_table([f"{title}: gain by number of events", "pre-trained on", *columns], rows))
    return "\n\n".join(tables)


def plot(settings: StudySettings, records: Records) -> Path:
    """Gains over unmixed clips with their 95 % intervals over seeds, by task and method: `gains.png`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    others = [name for name in settings.variants if name != "unmixed"]
    places = np.arange(len(others), 0, -1)
    figure, axes = pyplot.subplots(1, len(settings.tasks), figsize=(4.2 * len(settings.tasks), 3.4), constrained_layout=True, squeeze=False)
    for axis, task in zip(axes[0], settings.tasks):
        for offset, (method, title) in enumerate(METHODS.items()):
            found = [gain_of(records, name, task, method) for name in others]
            means, lows, highs = (100 * np.array([getattr(gain, name) for gain in found]) for name in ("mean", "low", "high"))
            width = None if len(records) == 1 else [means - lows, highs - means]
            axis.errorbar(means, places - 0.2 * offset, xerr=width, fmt="o", label=title, capsize=2, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=task, xlabel="mAP over unmixed only, points", yticks=places - 0.2)
        axis.set_yticklabels([TITLES[name] for name in others] if axis is axes[0, 0] else [])
        axis.grid(alpha=0.3, axis="x")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS), fontsize="small")
    path = Path(settings.output_dir) / "gains.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    transformers.logging.disable_progress_bar()
    records = {}
    try:
        settings = parse_settings(StudySettings, sys.argv[1:] if arguments is None else arguments, prog="polyphony.py", description=__doc__)
        for seed in settings.seeds:
            records[seed] = run(settings, seed)
            found = records[seed]["precision"].items()
            totals = {name: {task: round(by_method["maximum"][ALL], 3) for task, by_method in tasks.items()} for name, tasks in found}
            print(f"seed {seed}: {json.dumps(totals)}", file=sys.stderr, flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    write_json(Path(settings.output_dir) / "results.json", {str(seed): record for seed, record in records.items()})
    plot(settings, records)
    print(report(settings, records))


if __name__ == "__main__":
    main()
