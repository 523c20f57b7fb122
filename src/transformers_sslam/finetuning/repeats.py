"""The same fine-tuning over folds and seeds, and a summary of its runs."""

import logging
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from ..audio.layouts import open_splits
from ..audio.rows import fold_values
from ..errors import UserError
from ..evaluation.intervals import Summary, format_summary, independent_values, summarize, widen_by_clips
from ..evaluation.per_class import pool_results, replace_matrix
from ..files import write_json
from ..reports import markdown_table
from .data import check_rows
from .output import differences, read_results, save_settings
from .settings import FineTuningSettings
from .training import fine_tune


logger = logging.getLogger(__name__)


def expand(settings: FineTuningSettings) -> dict[str, FineTuningSettings]:
    """The settings of each run, by its name: each fold held out, with `cross_validate`, times each seed. A single run is named ""."""
    folds: list[dict[str, Any]] = [{}]
    if settings.cross_validate and settings.fold_column is not None:
        every = fold_values(open_splits(settings.data_dir, settings.layout, subset=settings.subset), settings.fold_column)
        if absent := [fold for fold in settings.test_folds if fold not in every]:  # before the first run
            raise UserError(f"the column {settings.fold_column!r} has no fold {absent[0]}, only {', '.join(map(str, every))}")
        free = [fold for fold in every if fold not in settings.validation_folds]
        folds = [
            {"test_folds": [held_out], "train_folds": [fold for fold in free if fold != held_out]}
            for held_out in settings.test_folds or free
        ]
    runs = {}
    for fold in folds:
        for seed in settings.seeds or [settings.seed]:
            name = "-".join([f"fold-{held_out}" for held_out in fold.get("test_folds", [])] + [f"seed-{seed}"] * bool(settings.seeds))
            output_dir = str(Path(settings.output_dir) / name) if name else settings.output_dir
            runs[name] = replace(settings, **fold, cross_validate=False, seeds=[], seed=seed, output_dir=output_dir)
    if len(runs) > 1 and (settings.push_to_hub or isinstance(settings.resume_from_checkpoint, str)):
        raise UserError(f"push_to_hub or resume_from_checkpoint is set, but there are {len(runs)} runs: choose one of them")
    return runs


def repeat_fine_tuning(settings: FineTuningSettings) -> dict[str, Any]:
    """Run all folds and seeds, one after the other, and summarize them.

    A run that is finished, with the same settings, is not repeated, so that an interrupted series resumes. With `overwrite_output_dir` all
    are repeated; without, a run of other settings in the same folder is an error.

    Returns:
        What `summary.json` holds: for each metric the values by run, their mean, standard deviation and 95 % interval (Student's t over
        folds, each the mean of its seeds, which are tested on the same clips; over seeds, where there are no folds. Folds share training
        clips, so the interval is somewhat too narrow; it is at least as wide as that over clips, see [`widen_by_clips`]), the results by
        class and the confusion matrix over all runs, see [`pool_results`], and the seconds of all runs.

    Raises:
        UserError: see [`fine_tune`].
    """
    results, runs = {}, expand(settings)
    if not settings.streaming:  # before the first run, not after hours of other folds
        has_times = [(run.test_folds, check_rows(run)) for run in {str(run.parts): run for run in runs.values()}.values()]
        if len({known for _, known in has_times}) > 1:
            weak = next(folds for folds, known in has_times if not known)
            raise UserError(
                f"in fold {weak[0]} clips have events without times, and in another fold none have, so their metrics are not the same: "
                "give such clips a fold of their own, and the others as test_folds"
            )
    for name, run in runs.items():
        logger.info(f"fine-tuning run {name or run.output_dir}")
        results[name] = fine_tune_once(run)
    metrics = {}
    for metric, value in next(iter(results.values()))["metrics"].items():
        if isinstance(value, float):
            values = {run: result["metrics"][metric] for run, result in results.items()}
            folds = [str(run.test_folds) for run in runs.values()]
            over_folds = summarize(independent_values(list(values.values()), folds))
            intervals = [result["metrics"].get(f"{metric}_interval") for result in results.values()]
            if all(interval and None not in interval for interval in intervals):  # the loss has none
                over_folds = widen_by_clips(over_folds, list(values.values()), intervals, folds)
            metrics[metric] = {"runs": values, **over_folds.to_dict()}
    pooled = pool_results(list(results.values()))
    silent = {run: found for run, result in results.items() if (found := result["metrics"].get("classes_without_positives"))}
    summary = {
        "metrics": metrics,
        "classes_without_positives": silent,
        "seconds": sum(result["seconds"]["total"] for result in results.values()),
        "per_class": pooled.get("per_class", {}),
        "confusion_matrix": pooled.get("confusion_matrix"),
    }
    if PartialState().is_main_process:
        save_settings(settings, Path(settings.output_dir) / "series.yaml")
        write_json(Path(settings.output_dir) / "summary.json", summary)
        if len(runs) > 1:  # a single run has drawn its own
            matrix = pooled.get("confusion_matrix")
            replace_matrix(Path(settings.output_dir), matrix and np.array(matrix), next(iter(results.values()))["classes"])
    return summary


def fine_tune_once(settings: FineTuningSettings) -> dict[str, Any]:
    """The results of [`fine_tune`] or, if the same run is finished, those that it wrote."""
    results = read_results(Path(settings.output_dir))
    if settings.overwrite_output_dir or results is None or differences(settings):
        return fine_tune(settings)
    logger.warning(f"{settings.output_dir} holds the same run, finished: it is not repeated (with --overwrite_output_dir it is)")
    return results


def format_runs(summary: dict[str, Any]) -> str:
    """A table of runs by metrics, with mean, standard deviation and 95 % interval in its last row; or that nothing was evaluated."""
    metrics = summary["metrics"]
    if not metrics:
        return "nothing was evaluated"
    runs = list(next(iter(metrics.values()))["runs"])
    rows = [[run, *(f"{values['runs'][run]:.4f}" for values in metrics.values())] for run in runs]
    names = [field.name for field in fields(Summary)]
    totals = [format_summary(Summary(**{name: values[name] for name in names}), scale=1, decimals=4) for values in metrics.values()]
    if len(runs) == 1:  # its interval is over clips
        cells = [
            f"{values['mean']:.4f}" + (f" [{values['low']:.4f}, {values['high']:.4f}]" if math.isfinite(values["low"]) else "")
            for values in metrics.values()
        ]
        titles = [f"{name} [95 % over clips]" if math.isfinite(values["low"]) else name for name, values in metrics.items()]
        return markdown_table(titles, [cells])
    table = markdown_table(["run", *metrics], [*rows, ["mean ± std [95 %]", *totals]])
    left_out = [
        f"{run} leaves out {', '.join(classes)}, of which it has no clip" for run, classes in summary["classes_without_positives"].items()
    ]
    return "\n".join([table, *left_out])
