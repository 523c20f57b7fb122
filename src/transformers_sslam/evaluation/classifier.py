"""Evaluation of a classifier on labelled clips: its logits, and accuracy, or mean average precision, ROC AUC and d-prime.

```bash
sslam evaluate --model runs/mine --data_dir PATH/TO/folder                                   # its split test/
sslam evaluate --model MODEL --data_dir audioset --layout audioset --subset eval --label_column labels
sslam evaluate --model runs/mine --data_dir esc10 --fold_column fold --test_folds 4
```

Labels must have the names of the model's classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..audio.cache import Waveforms
from ..audio.events import UNKNOWN
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import lock, write_json
from ..modeling_sslam import SSLAMForAudioClassification
from ..reports import markdown_table
from ..settings import settings_dict
from .calibration import Calibrator, replace_diagram, report_calibration
from .detector import report_detector
from .loading import input_batches, load_model, prepare_command
from .per_class import PICTURE, class_table, results_by_class
from .scores import evaluate_predictions, evaluate_tags, save_scores
from .settings import EvaluationSettings, class_names, make_folder, open_labelled, select_rows


HEAD = "classifier"  # the layer that a calibration changes


def run(settings: EvaluationSettings) -> None:
    """Evaluate a classifier, or a model of event detection, and print tables."""
    prepare_command(settings.device)
    report = report_detector if settings.task == "events" else report_classifier
    with lock(make_folder(settings.output_dir)):
        report(settings)


def report_classifier(settings: EvaluationSettings) -> None:
    """Evaluate, and print tables."""
    results = evaluate_classifier(settings)
    print(results_table(results))
    for kind, which in (("positives", "no clip"), ("negatives", "every clip")):
        if left_out := results["metrics"].get(f"classes_without_{kind}"):
            print(f"\nleft out, because {which} has them: {', '.join(left_out)}")
    if count := results["unknown_labels"]:
        print(f"\nleft out, because they are unknown: {count} of {results['clips'] * len(results['classes'])} labels")
    print("\n" + class_table(results["per_class"]))
    if results["calibration"]:
        report_calibration(results["calibration"], settings)
    picture = Path(settings.output_dir) / PICTURE
    print(f"\nevery number is in {Path(settings.output_dir) / 'results.json'}, the logits in scores.npz there")
    if picture.exists():
        print(f"confusion matrix: {picture}")


def evaluate_classifier(settings: EvaluationSettings) -> dict[str, Any]:
    """Score all clips that can be read, padded or cut to the feature extractor's length, and write `results.json` and `scores.npz`.

    Clips of several labels are ranked by the softmax of the logits if the model's classes are exclusive; there is then no `calibration`.
    With `calibrate`, everything is of the calibrated model.

    Returns:
        What `results.json` holds: settings, metrics, class names, number of clips, of labels that are unknown and therefore left out
        (`unknown_labels`), unreadable files by cause, results by class, what
        [`Calibrator.measure`] returns (`calibration`), with `temperature` and the same `before` if the model was calibrated, and, of
        exclusive classes, the confusion matrix, which is also drawn as `confusion_matrix.png`.

    Raises:
        UserError: if the model cannot be used or changed, the folder holds another run, or the clips lack what was asked for, have other
            labels than the model's classes, or give no temperature.
        FloatingPointError: if logits are not finite.
    """
    output = make_folder(settings.output_dir)
    calibrator = Calibrator(settings, HEAD)
    model, extractor, classes = _load(settings)
    rows = select_rows(settings)
    exclusive, multi_label = model.config.problem_type != "multi_label_classification", rows.labels.multi_label
    if settings.calibrate and exclusive and multi_label:
        raise UserError("calibrate is set, but clips have several labels, and the model's classes exclude each other: use clips with one")
    rows, waveforms, targets = open_labelled(rows, settings, classes, extractor.sampling_rate)
    with torch.autocast(model.device.type, dtype=getattr(torch, settings.dtype), enabled=settings.dtype != "float32"):
        logits = _logits(model, extractor, waveforms, settings.per_device_eval_batch_size)
    if settings.calibrate:
        logits /= calibrator.fit(logits, targets, exclusive)
    (output / "results.json").unlink(missing_ok=True)  # of an earlier evaluation; if this one ends early, it must not lie beside its scores
    if exclusive and multi_label:
        calibration: dict[str, Any] = {}
        replace_diagram(output, calibration)
    else:
        calibration = calibrator.measure(logits, targets, exclusive)
    save_scores(output, logits, targets, classes, [rows.name(i) for i in range(len(rows))])
    metrics = _metrics(model, logits, targets, classes, multi_label)
    results = {
        "settings": settings_dict(settings),
        "metrics": metrics,
        "classes": classes,
        "clips": len(rows),
        "unknown_labels": int((targets == UNKNOWN).sum()),
        "unreadable": dict(waveforms.unreadable),
        "calibration": calibration,
        **results_by_class(logits, targets, classes, metrics, multi_label, output),
    }
    write_json(output / "results.json", results)
    calibrator.write(calibration, len(rows))
    return results


def results_table(results: dict[str, Any]) -> str:
    """What `evaluate_classifier` returned, as a Markdown table."""
    rows = []
    for name, value in results["metrics"].items():
        if isinstance(value, float):
            low, high = results["metrics"][f"{name}_interval"]
            rows.append([name.replace("_", " "), f"{value:.4f} [{low:.4f}, {high:.4f}]"])
    return markdown_table([f"{results['clips']} clips", "value [95 % interval over clips]"], rows)


def _load(settings: EvaluationSettings) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor, list[str]]:
    """Classifier (tried on a second of silence), feature extractor and classes."""
    model, extractor = load_model(SSLAMForAudioClassification, settings.model, device=settings.device)
    with as_user_error("the model cannot be evaluated"):
        next(model.score_windows(np.zeros(extractor.sampling_rate, dtype=np.float32), extractor))
    return model, extractor, class_names(model, settings.model)


@torch.inference_mode()
def _logits(model: SSLAMForAudioClassification, extractor: SSLAMFeatureExtractor, waveforms: Waveforms, batch_size: int) -> np.ndarray:
    """`(clips, classes)`, float32."""
    batches = input_batches(model, extractor, waveforms, batch_size, "scoring")
    logits = torch.cat([model(**inputs).logits.float().cpu() for _, inputs in batches]).numpy()
    if not np.isfinite(logits).all():
        clips = (~np.isfinite(logits)).any(1).sum()
        raise FloatingPointError(f"{clips} clips have logits that are NaN or infinite: try --dtype float32")
    return logits


def _metrics(
    model: SSLAMForAudioClassification, logits: np.ndarray, targets: np.ndarray, classes: list[str], multi_label: bool
) -> dict[str, Any]:
    if not multi_label:
        return evaluate_predictions(logits, targets, classes, multi_label=False)
    if model.config.problem_type != "multi_label_classification":  # of exclusive classes only probabilities compare between clips
        logits = torch.from_numpy(logits).log_softmax(-1).numpy()
    return evaluate_tags(logits, targets, classes)
