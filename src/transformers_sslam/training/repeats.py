"""The same fine-tuning over folds and seeds, and what the runs say together."""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..audio.layouts import open_splits
from ..audio.rows import fold_values
from ..errors import UserError
from ..evaluation.intervals import Summary, independent_values, summarize
from ..reports import format_summary, markdown_table, write_json
from ..settings import write_settings
from .fine_tuning_data import check_rows
from .fine_tuning_settings import FineTuningSettings
from .steps import fine_tune_once


logger = logging.getLogger(__name__)


def expand(settings: FineTuningSettings) -> dict[str, FineTuningSettings]:
    """One setting a run, by name: each fold held out where `cross_validate` asks for it, times each seed. A single run is named ""."""
    folds: Sequence[Any] = [None]
    if settings.cross_validate:
        assert settings.fold_column is not None  # the settings see to it
        splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset)
        every = fold_values(splits, settings.fold_column)
        folds = settings.eval_folds or every
        if absent := [fold for fold in folds if str(fold) not in map(str, every)]:  # said now, not after hours of other folds
            raise UserError(f"the column {settings.fold_column!r} has no fold {absent[0]}, only {', '.join(map(str, every))}")
    runs = {}
    for fold in folds:
        for seed in settings.seeds or [settings.seed]:
            parts = [f"fold-{fold}"] * settings.cross_validate + [f"seed-{seed}"] * bool(settings.seeds)
            changes: dict[str, Any] = {"cross_validate": False, "seeds": [], "seed": seed}
            if settings.cross_validate:
                changes |= {"eval_folds": [fold], "train_folds": [other for other in every if str(other) != str(fold)]}
            if name := "-".join(parts):
                changes["output_dir"] = str(Path(settings.output_dir) / name)
            runs[name] = replace(settings, **changes)
    return runs


def repeat_fine_tuning(settings: FineTuningSettings) -> dict[str, Any]:
    """Every run that `settings` ask for, one after the other, and their summary.

    A run that is finished, with the same settings, is not repeated, so that an interrupted series goes on where it was. With `overwrite`
    all are repeated; without, a run of other settings in the same folder is an error.

    Returns:
        What `summary.json` holds: for each metric the values by run, their mean, standard deviation and 95 % interval (Student's t over
        folds, each the mean of its seeds, which are tested on the same clips; over seeds, where there are no folds. Folds share training
        clips, so it is still somewhat too narrow), and the seconds of all runs.

    Raises:
        UserError: see [`fine_tune`].
    """
    results, runs = {}, expand(settings)
    if not settings.streaming:  # said now, not after hours of other folds
        for run in {str((run.train_folds, run.eval_folds)): run for run in runs.values()}.values():
            check_rows(run)
    for name, run in runs.items():
        logger.info(f"fine-tuning run {name or run.output_dir}")
        results[name] = fine_tune_once(run)
    metrics = {}
    for metric, value in next(iter(results.values()))["metrics"].items():
        if isinstance(value, float):
            values = {run: result["metrics"][metric] for run, result in results.items()}
            independent = independent_values(list(values.values()), [str(run.eval_folds) for run in runs.values()])
            metrics[metric] = {"runs": values, **summarize(independent).to_dict()}
    silent = {run: found for run, result in results.items() if (found := result["metrics"].get("classes_without_positives"))}
    summary = {
        "metrics": metrics,
        "classes_without_positives": silent,
        "seconds": sum(result["seconds"]["total"] for result in results.values()),
    }
    if PartialState().is_main_process:
        write_settings(settings, Path(settings.output_dir) / "series.yaml")
        write_json(Path(settings.output_dir) / "summary.json", summary)
    return summary


def format_runs(summary: dict[str, Any]) -> str:
    """A table of runs by metrics, with mean, standard deviation and 95 % interval in its last row; or that nothing was evaluated."""
    metrics = summary["metrics"]
    if not metrics:
        return "nothing was evaluated"
    runs = list(next(iter(metrics.values()))["runs"])
    rows = [[run, *(f"{values['runs'][run]:.4f}" for values in metrics.values())] for run in runs]
    names = [field.name for field in fields(Summary)]
    totals = [format_summary(Summary(**{name: values[name] for name in names}), scale=1, decimals=4) for values in metrics.values()]
    if len(runs) == 1:
        return markdown_table(list(metrics), [rows[0][1:]])
    table = markdown_table(["run", *metrics], [*rows, ["mean ± std [95 %]", *totals]])
    left_out = [
        f"{run} leaves out {', '.join(classes)}, of which it has no clip" for run, classes in summary["classes_without_positives"].items()
    ]
    return "\n".join([table, *left_out])


__all__ = ["expand", "format_runs", "repeat_fine_tuning"]
