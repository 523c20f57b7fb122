"""What pre-training gains for a small model on a small data set: cross-validated, over seeds, against a from-scratch baseline.

python scripts/studies/small_model.py --data_dir PATH/TO/esc10
python scripts/studies/small_model.py --data_dir PATH/TO/esc10 --folds 1 2  # and, at the same time, the others: --folds 3 4
python scripts/studies/small_model.py --data_dir PATH/TO/esc10 --ship       # also trains the model to ship, on every fold

For each fold held out and each seed: SSLAM pre-training on the other folds without their labels, in both stages; then fine-tuning of
that and of the same network from scratch. "Equal compute": the baseline trains for as many CPU seconds as pre-training and fine-tuning took
together. Finished steps are found again, so that the study can be interrupted, and split over processes by fold; each prints what is there.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from steps import copy_clips, epochs_of_equal_cost, pretrain_on_folds, read_records

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel
from transformers_sslam.audio.layouts import open_splits
from transformers_sslam.audio.rows import fold_values
from transformers_sslam.errors import UserError
from transformers_sslam.evaluation.features import encode_clips
from transformers_sslam.evaluation.frozen import FrozenSettings, read_task
from transformers_sslam.evaluation.intervals import format_summary, independent_values, summarize, summarize_difference
from transformers_sslam.evaluation.probing import run_probe
from transformers_sslam.files import write_json
from transformers_sslam.finetuning.repeats import fine_tune_once
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.reports import markdown_table
from transformers_sslam.settings import parse_settings, read_settings, setting


# What the network from scratch shares with the pre-trained one.
SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_length"),
    *("patch_embedding_gain", "position_embedding_scale"),
)
TITLES = {
    "full": "pre-trained, all clips",
    "scratch": "from scratch, equal compute",
    "short": "pre-trained, {short} epochs",
    "scratch_short": "from scratch, {short} epochs",
    "few": "pre-trained, {short} epochs, {few} clips a class",
    "scratch_few": "from scratch, {short} epochs, {few} clips a class",
    "probe": "frozen student, linear probe on the mean of its patches",
    "probe_mean_and_deviation": "frozen student, linear probe on their mean and standard deviation",
    "statistics": "log-mel statistics (mean and standard deviation), logistic regression",
}
PAIRS = (
    ("full", "scratch"),
    ("short", "scratch_short"),
    ("few", "scratch_few"),
    ("probe", "statistics"),
    ("probe_mean_and_deviation", "statistics"),
)


@dataclass
class StudySettings:
    data_dir: str = setting("folder of the clips, an 'audiofolder' with a column `fold`")
    output_dir: str = setting("folder for all models and results", "runs/small_model")
    folds: list[int | str] = setting("folds to hold out in turn; empty: all", [])
    repetitions: int = setting("runs for each fold, every one with a seed of its own", 2)
    stage1: str = setting("recipe of the first stage", "pretrain_tiny_stage1")
    stage2: str = setting("recipe of the second stage", "pretrain_tiny_stage2")
    finetuning_recipe: str = setting("recipe of the fine-tuning", "finetune_tiny")
    pretraining: dict[str, Any] = setting("changes to both recipes of pre-training, by name", {})
    finetuning: dict[str, Any] = setting("changes to the recipe of fine-tuning, by name", {})
    short_epochs: int = setting("epochs of the short runs", 20)
    clips_per_class: int = setting("clips of each class in the short runs on few clips", 10)
    scratch_epochs: int | None = setting(
        "epochs of the from-scratch baseline of equal compute; null: as many as take the CPU seconds of pre-training and fine-tuning, "
        "which other work on the machine distorts",
        None,
    )
    ship: bool = setting("whether to train on every fold as well, for a model to ship", False)


def pretrain(settings: StudySettings, clips: Path, folds: Sequence[int | str], output: Path, seed: int) -> tuple[Path, float]:
    """Both stages on these folds: the model's folder, and the CPU seconds of both, NaN if they are not known."""
    shared = {"seed": seed, **settings.pretraining}
    origin, cost = pretrain_on_folds(settings.stage1, clips, folds, output / "stage1", shared)
    model, more = pretrain_on_folds(settings.stage2, clips, folds, output / "stage2", {**shared, "model": str(origin)})
    return model, cost + more


def fine_tuning(settings: StudySettings, clips: Path, output: Path, seed: int, **changes: Any) -> FineTuningSettings:
    fixed = {"data_dir": str(clips), "fold_column": "fold", "seed": seed, "output_dir": str(output)}
    return read_settings(FineTuningSettings, settings.finetuning_recipe, {**settings.finetuning, **fixed, **changes})


def from_scratch(model: Path, recipe: FineTuningSettings) -> dict[str, Any]:
    """The setting that makes the from-scratch baseline: the pre-trained model's sizes and initialisation, none of its weights."""
    config = SSLAMConfig.from_pretrained(model)
    return {"model_config": {**recipe.model_config, **{name: getattr(config, name) for name in SIZES}}}


def run(settings: StudySettings, clips: Path, every: Sequence[int | str], fold: int | str, seed: int) -> dict[str, Any]:
    """All conditions for one fold and seed: accuracies by condition, epochs and CPU seconds."""
    output = Path(settings.output_dir) / f"fold-{fold}-seed-{seed}"
    others = [other for other in every if other != fold]
    model, pretraining_cost = pretrain(settings, clips, others, output, seed)
    if settings.scratch_epochs is None and math.isnan(pretraining_cost):
        raise UserError(
            f"pre-training in {output} was interrupted, so nobody knows its CPU seconds: set scratch_epochs, or delete that folder"
        )
    parts: dict[str, Any] = {"train_folds": others, "test_folds": [fold]}

    def tune(name: str, **changes: Any) -> dict[str, Any]:
        return fine_tune_once(fine_tuning(settings, clips, output / name, seed, **parts, **changes))

    recipe = fine_tuning(settings, clips, output, seed, **parts)
    start, scratch = {"model": str(model)}, from_scratch(model, recipe)
    short = {"num_train_epochs": settings.short_epochs}
    few = {**short, "clips_per_class": settings.clips_per_class}
    results = {"full": tune("full", **start)}
    epochs = settings.scratch_epochs
    if epochs is None:
        cost = results["full"]["seconds"]["training_cpu"]
        epochs = epochs_of_equal_cost(recipe.num_train_epochs, cost, cost + pretraining_cost)
    results |= {
        "short": tune("short", **start, **short),
        "scratch_short": tune("scratch_short", **scratch, **short),
        "few": tune("few", **start, **few),
        "scratch_few": tune("scratch_few", **scratch, **few),
        "scratch": tune("scratch", **scratch, num_train_epochs=epochs),
    }
    record = {
        "settings": comparable(settings),
        "accuracy": {**{name: result["metrics"]["accuracy"] for name, result in results.items()}, **probe(clips, model, fold)},
        "epochs": {"full": recipe.num_train_epochs, "scratch": epochs},
        "cpu_seconds": {
            "pretraining": pretraining_cost,
            **{name: result["seconds"]["training_cpu"] for name, result in results.items()},
        },
        "parameters": results["full"]["parameters"],
    }
    write_json(output / "results.json", record)
    return record


def probe(clips: Path, model: Path, fold: int | str) -> dict[str, float]:
    """Accuracy of logistic regressions on the held-out fold: on the frozen student's patches, and on log-mel statistics."""
    extractor = SSLAMFeatureExtractor.from_pretrained(model)
    task = read_task(FrozenSettings(model=str(model), data_dir=str(clips)), extractor.sampling_rate)
    partitions = [partition for partition in task.partitions if partition.name == str(fold)]
    features = encode_clips(SSLAMModel.from_pretrained(model, dtype=torch.float32), extractor, task.waveforms, keep_patches=False)
    probes = {"probe": "linear_mean", "probe_mean_and_deviation": "linear_mean_and_std", "statistics": "log_mel_statistics"}
    return {key: float(run_probe(name, features, task.targets, partitions)[0, 0]) for key, name in probes.items()}


def ship(settings: StudySettings, clips: Path, every: Sequence[int | str]) -> Path:
    """Pre-train and fine-tune on every fold, by the recipe whose accuracy the cross-validation tells."""
    output, seed = Path(settings.output_dir) / "ship", 0
    model, _ = pretrain(settings, clips, every, output, seed)
    changes = {"model": str(model), "train_folds": list(every), "do_eval": False}
    fine_tune_once(fine_tuning(settings, clips, output / "model", seed, **changes))
    return output / "model"


def comparable(settings: StudySettings) -> dict[str, Any]:
    """What all runs of a table must have in common."""
    own = ("data_dir", "output_dir", "folds", "repetitions", "ship")
    return {name: value for name, value in asdict(settings).items() if name not in own}


def report(settings: StudySettings) -> str:
    """Tables of all runs that are finished by these settings, and `results.json` of what they hold."""
    records, others = read_records(Path(settings.output_dir).glob("fold-*/results.json"), comparable(settings))
    if others:
        print(f"left out, for they are of other settings: {', '.join(others)}", file=sys.stderr)
    if not records:
        return "no run is finished yet"
    folds = [name.split("-seed-")[0] for name in records]
    values = {name: independent_values([record["accuracy"][name] for record in records.values()], folds) for name in TITLES}
    titles = {name: title.format(short=settings.short_epochs, few=settings.clips_per_class) for name, title in TITLES.items()}
    summaries = {name: summarize(accuracies) for name, accuracies in values.items()}
    gains = {f"{a} - {b}": summarize_difference(values[a], values[b]) for a, b in PAIRS}
    write_json(
        Path(settings.output_dir) / "results.json",
        {
            "runs": records,
            "accuracy": {name: summary.to_dict() for name, summary in summaries.items()},
            "gains": {name: gain.to_dict() for name, gain in gains.items()},
        },
    )
    accuracy = markdown_table(
        [f"accuracy, %, mean ± standard deviation [95 %] over {len(set(folds))} folds, {len(records)} runs", ""],
        [[titles[name], format_summary(summary)] for name, summary in summaries.items()],
    )
    paired = markdown_table(
        ["points gained, fold by fold", ""], [[f"{titles[a]} over {titles[b]}", format_summary(gains[f"{a} - {b}"])] for a, b in PAIRS]
    )
    return f"{accuracy}\n\n{paired}"


def main() -> None:
    transformers.logging.disable_progress_bar()
    try:
        settings = parse_settings(StudySettings, sys.argv[1:], prog="small_model.py", description=__doc__)
        every = fold_values(open_splits(settings.data_dir), "fold")
        if absent := [fold for fold in settings.folds if fold not in every]:
            raise UserError(f"folds has {absent[0]!r}, but the column 'fold' holds {every}")
        clips = copy_clips(settings.data_dir, Path(settings.output_dir) / "clips")
        for repetition in range(settings.repetitions):
            for fold in settings.folds or every:
                seed = repetition * len(every) + every.index(fold)
                print(f"fold {fold}, seed {seed}: {run(settings, clips, every, fold, seed)['accuracy']}", flush=True)
        if settings.ship:
            print(f"the model to ship lies in {ship(settings, clips, every)}")
    except UserError as error:
        sys.exit(f"error: {error}")
    print(report(settings))


if __name__ == "__main__":
    main()
