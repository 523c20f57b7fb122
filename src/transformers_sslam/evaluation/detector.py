"""Evaluation of a model of event detection on clips with labelled events: PSDS, collar-based and segment-based F1.

```bash
sslam evaluate --task events --model runs/detector --data_dir PATH/TO/folder --label_column events
sslam evaluate --task events --model runs/detector --data_dir PATH/TO/folder --label_column events --test_split validation --tune
```

The second chooses median filters and thresholds on the validation part and writes them into the model's `config.json`, from where
`sslam detect` and the first take them. `--calibrate` fits its scores to frequencies there, before that.
"""

import logging
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..audio.events import Event, EventTable
from ..audio.rows import LabelledRows
from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..events_sslam import EventSettings, filter_scores
from ..files import read_json, write_json
from ..modeling_sslam_frames import SSLAMForAudioFrameClassification
from ..reports import markdown_table, one_line
from ..settings import settings_dict
from .calibration import Calibrator, as_logits, report_calibration, scale_head
from .event_results import EVENT_METRICS, F1, SCENARIOS, evaluate_events, event_activity
from .event_tuning import CHANGE_LENGTHS, tune_events
from .events import psds
from .loading import load_model
from .per_class import PICTURE, TABLE_METRICS, class_table
from .scored_events import ScoredEvents, score_events
from .settings import EvaluationSettings, class_names, make_folder, select_rows


logger = logging.getLogger(__name__)

HEAD = "frame_classifier"  # the layer that a calibration changes


def evaluate_detector(settings: EvaluationSettings) -> dict[str, Any]:
    """Score all clips that can be read, whole, and write `results.json` and `scores.npz`, which [`ScoredEvents.load`] reads.

    What is cut off or left out, see [`score_events`]. Clips whose events have no times are left out too (`clips_without_times`). With
    `calibrate`, everything is of the calibrated model, which then scores the clips again: where windows overlap, scores are means, whose
    change by a temperature no formula gives.

    Returns:
        What `results.json` holds: settings, those of the detection (`event_detection`), what [`event_results.evaluate_events`] returns
        (but `merged_events`), class names, numbers of clips, unreadable files by cause, what [`Calibrator.measure`] returns of all time
        steps (`calibration`; with `temperature` and the same `before` if the model was calibrated) and, with `tune`, F1 by class before
        and after (`tuning`).

    Raises:
        UserError: if the model cannot be used or changed, the folder holds another run, or the clips lack events, have other labels than
            the model's classes, or give no temperature.
        FloatingPointError: if scores are not finite.
    """
    output = make_folder(settings.output_dir)
    if settings.tune and not (Path(settings.model) / "config.json").is_file():
        raise UserError(f"tune is set, but model {settings.model} is not a folder whose config.json could be changed: save it in one first")
    calibrator = Calibrator(settings, HEAD)
    model, extractor = load_model(SSLAMForAudioFrameClassification, settings.model, device=settings.device)
    classes = class_names(model, settings.model)
    with as_user_error("the model cannot be evaluated"):
        found = EventSettings.of(model.config, **settings.event_options)
        model.score_steps(np.zeros(extractor.sampling_rate, dtype=np.float32), extractor)
    rows, without_times = _with_times(select_rows(settings, events=True), settings.label_column)
    score = partial(
        score_events,
        model,
        extractor,
        rows,
        batch_size=settings.per_device_eval_batch_size,
        memory_gb=settings.memory_gb,
        max_unreadable=settings.max_unreadable,
        dtype=settings.dtype,
    )
    scored, unreadable, cut_events = score()
    targets = step_targets(scored)
    if settings.calibrate:
        scale_head(model, HEAD, calibrator.fit(step_logits(scored), targets, exclusive=False))
        found = EventSettings.of(model.config, **settings.event_options)
        scored, unreadable, cut_events = score()
    for name in ("results.json", PICTURE):  # of an earlier evaluation; if this one ends early, they must not lie beside its scores
        (output / name).unlink(missing_ok=True)
    calibration = calibrator.measure(step_logits(scored), targets, exclusive=False)
    scored.save(output / "scores.npz")
    tuning = {}
    if settings.tune:
        before, found = found, _tuned(settings, scored, found)
        tuning = {"tuning": _compare(scored, before, found, settings.tune_for)}
    measured = evaluate_events(*scored, found)
    del measured["merged_events"]  # these are joined, and counted in a warning, when they are read
    results = {
        "settings": settings_dict(settings),
        "event_detection": {name: value for name, value in asdict(found).items() if value is not None},
        **measured,
        "classes": classes,
        "clips": len(scored.scores),
        "clips_without_times": without_times,
        "cut_events": cut_events,
        "unreadable": unreadable,
        "calibration": calibration,
        **tuning,
    }
    write_json(output / "results.json", results)
    calibrator.write(calibration, len(scored.scores))
    if settings.tune:
        write_event_detection(Path(settings.model), found)
    return results


def _tuned(settings: EvaluationSettings, scored: ScoredEvents, before: EventSettings) -> EventSettings:
    changes = CHANGE_LENGTHS if settings.tune_change_filter else ()
    limit = settings.max_false_alarms
    return tune_events(*scored, change_lengths=changes, metric=settings.tune_for, max_false_alarms=limit, before=before)


def step_targets(scored: ScoredEvents) -> np.ndarray:
    """`(steps of all clips, classes)`: the fraction of each step that an event of the class covers, as training has them."""
    targets = []
    for name, scores in scored.scores.items():
        events = [Event(label, onset, offset) for onset, offset, label in scored.ground_truth[name]]
        targets.append(EventTable.of_clip(events, scored.classes).step_targets(scored.step, *scores.shape))
    return np.concatenate(targets)


def step_logits(scored: ScoredEvents) -> np.ndarray:
    """`(steps of all clips, classes)`, beside [`step_targets`]."""
    return as_logits(np.concatenate(list(scored.scores.values())))


def write_event_detection(model: Path, settings: EventSettings) -> None:
    """Write thresholds and filters into a saved model's `config.json`, in place of its other settings of event detection."""
    config = read_json(model / "config.json")
    config["event_detection"] = {name: value for name, value in asdict(settings).items() if isinstance(value, dict)}  # what was tuned
    with as_user_error(f"{model / 'config.json'} cannot hold what was tuned"):
        EventSettings.of(SSLAMConfig.from_dict(config))
    write_json(model / "config.json", config, sort_keys=True)  # as Transformers writes it


def report_detector(settings: EvaluationSettings) -> None:
    """Evaluate, and print tables."""
    results = evaluate_detector(settings)
    print(detector_table(results))
    print("\n" + false_alarm_line(results["false_alarms"]))
    if without := results["metrics"]["classes_without_events"]:
        print(f"\nleft out, because no clip has events of them: {', '.join(map(one_line, without))}")
    for count, what in (
        (results["clips_without_times"], "clips are left out, because their events have no times"),
        (results["cut_events"], "events reach beyond the end of their clip, and were cut off there"),
    ):
        if count:
            print(f"\n{count} {what}")
    print("\n" + class_table(results["per_class"]))
    if results["by_overlap"]:
        print("\n" + overlap_table(results["by_overlap"]))
    report_calibration(results["calibration"], settings)
    if tuning := results.get("tuning"):
        print("\n" + tuning_table(tuning, results["event_detection"]))
        config = Path(settings.model) / "config.json"
        print(f"\nwritten into {config}. These clips chose them, so they are no longer a test: evaluate on others")
    print(f"\nevery number is in {Path(settings.output_dir) / 'results.json'}, the scores of all steps in scores.npz there")


def detector_table(results: dict[str, Any]) -> str:
    """The metrics of what `evaluate_detector` returned, as a Markdown table."""
    metrics, rows = results["metrics"], []
    for name, title in (
        *(("psds1", "PSDS1"), ("psds1_macro", "PSDS1 without variance penalty"), ("psds2", "PSDS2")),
        *(("segment_f1", "segment F1, macro"), ("segment_f1_micro", "segment F1, micro")),
        *(("collar_f1", "collar F1, macro"), ("collar_f1_micro", "collar F1, micro")),
    ):
        low, high = metrics[f"{name}_interval"]
        rows.append([title, f"{metrics[name]:.4f} [{low:.4f}, {high:.4f}]"])
    return markdown_table([f"{results['clips']} clips", "value [95 % interval over clips]"], rows)


def false_alarm_line(alarms: dict[str, Any]) -> str:
    """How many false alarms there are an hour, and of which five classes most."""
    by_class = sorted(((count, label) for label, count in alarms["by_class"].items() if count), reverse=True)
    some = ", ".join(f"{one_line(label)} {count}" for count, label in by_class[:5]) + (" ..." if len(by_class) > 5 else "")
    total = sum(count for count, _ in by_class)
    return f"false alarms: {alarms['per_hour']:.1f} an hour ({total} in {alarms['hours']:.3g} h{some and f': {some}'})"


def overlap_table(by_overlap: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of the metrics by number of simultaneous sounds."""

    def cell(result: dict[str, Any], name: str) -> str:
        low, high = result[f"{name}_interval"]
        return f"{result[name]:.2f} [{low:.2f}, {high:.2f}]"

    rows = [[number, str(one["recordings"]), *(cell(one, name) for name in EVENT_METRICS)] for number, one in by_overlap.items()]
    return markdown_table(["sounds at once, at most", "clips", *(TABLE_METRICS[name] for name in EVENT_METRICS)], rows)


def tuning_table(tuning: dict[str, Any], chosen: dict[str, Any]) -> str:
    """A Markdown table of F1, or PSDS, before and after tuning, and of what was chosen."""
    metric = "PSDS 1" if tuning["metric"] == "psds" else f"{tuning['metric']} F1"
    filters = {name: chosen[name] for name in ("median_filter", "change_filter") if isinstance(chosen.get(name), dict)}
    header = ["class", f"{metric} before", "after", "threshold", *(f"{name.replace('_', ' ')} (s)" for name in filters)]
    rows = []
    for label, before in tuning["before"].items():
        lengths = (f"{by_label[label]:g}" for by_label in filters.values())
        rows.append([one_line(label), f"{before:.3f}", f"{tuning['after'][label]:.3f}", f"{chosen['threshold'][label]:.6g}", *lengths])
    return markdown_table(header, rows)


def _with_times(rows: LabelledRows, column: str) -> tuple[LabelledRows, int]:
    """The clips of whose events the times are known, and the number of others."""
    known = [i for i in range(len(rows)) if rows.labels.has_times(i)]
    if not known:
        raise UserError(
            f"the column {column!r} has no events with onset and offset, which the task needs: set label_column to one that has"
        )
    if others := len(rows) - len(known):
        logger.warning(f"{others} of {len(rows)} clips are left out, because the times of their events are not known")
    return rows.select(known), others


def _compare(scored: ScoredEvents, before: EventSettings, after: EventSettings, metric: str) -> dict[str, Any]:
    """F1, or PSDS of scenario 1, of each class with events, with the settings before and after tuning."""

    def by_class(settings: EventSettings) -> dict[str, float]:
        if metric == "psds":
            filtered = {name: filter_scores(values, scored.step, scored.classes, settings) for name, values in scored.scores.items()}
            return psds(filtered, *scored[1:], **SCENARIOS["psds1_macro"], confidence=None).by_class
        activity = event_activity(scored.scores, scored.step, scored.classes, settings, scored.durations)
        return F1[f"{metric}_f1"](activity, *scored[1:], 0.5, confidence=None).by_class

    return {"metric": metric, "before": by_class(before), "after": by_class(after)}
