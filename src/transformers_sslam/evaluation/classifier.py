"""What a trained classifier is worth on labelled clips: its logits, and accuracy, or mean average precision, ROC AUC and d-prime.

Nothing is trained: for the published figure of a converted checkpoint, or for a model of one's own on clips from elsewhere.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from ..allocator import keep_freed_memory
from ..data.labelled import (
    LabelledRows,
    Waveforms,
    check_has_labels,
    encode_labels,
    keep_rows,
    read_rows,
    select_folds,
    select_split,
    source_name,
)
from ..data.layouts import open_data_set
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..inference import class_names
from ..modeling_sslam import SSLAMForAudioClassification
from ..reports import markdown_table, write_json
from ..settings import SettingsError, refusals_as_settings_errors, setting
from .metrics import Accuracy, DPrime, MeanAveragePrecision, MeanRocAuc
from .pooling import best_device
from .probing import as_one_hot


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class EvaluationSettings:
    """Settings of `scripts/evaluate_classifier.py`. Those of the data are called as in fine-tuning."""

    model: str = setting("folder or Hub id of a SSLAM classifier")
    data_dir: str = setting("folder of the clips, or, with layout=hub, id of a data set")
    layout: str = setting("how the clips are laid out, see transformers_sslam.data.layouts", "audiofolder")
    subset: str | None = setting("part of a data set that has several: configuration on the Hub, scene of SPASS", None)
    label_column: str = setting("column of the labels; a column of lists makes the task multi-label", "label")
    label_separator: str | None = setting("between the labels of a clip that has several; makes the task multi-label too", None)
    eval_split: str = setting("split to evaluate on, unless fold_column is set", "test")
    fold_column: str | None = setting("column to choose rows by, whatever their split", None)
    eval_folds: list[int | str] = setting("its values to evaluate on", [])
    max_unreadable: float = setting("share of unreadable files above which the run stops; fewer are left out and reported", 0.01)
    memory_gb: float = setting("memory for decoded clips; what does not fit is decoded each time", 4.0)
    batch_size: int = setting("clips at a time", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: the accelerator of this machine, or else its CPU", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting("of the model", "float32")
    output_dir: str = setting("folder for results.json and scores.npz, which are replaced", "runs/evaluation")

    def __post_init__(self):
        if self.batch_size < 1 or not 0 <= self.max_unreadable < 1:
            raise SettingsError(
                f"batch_size is {self.batch_size} and max_unreadable {self.max_unreadable:g}, but at least 1 and a share in [0, 1) are "
                "expected"
            )
        if self.eval_folds and self.fold_column is None:
            raise SettingsError("eval_folds are set, but fold_column, which they choose from, is not")


def evaluate_classifier(settings: EvaluationSettings) -> dict[str, Any]:
    """Score all clips that can be read, padded or cut to the feature extractor's length as in fine-tuning, and compare with their labels.

    Returns:
        What `results.json` holds: settings, metrics, class names, number of clips, unreadable files by cause. Beside it, `scores.npz` has
        `logits` and `targets`, `(clips, classes)`, the `classes`, and the clips' `names`.

    Raises:
        SettingsError, DatasetError: (both are `ValueError`s) if the model cannot be loaded, its logits are not finite, or the clips do not
            hold what was asked for or have labels that are none of its classes.
    """
    model, extractor = load_classifier(settings.model, settings.dtype, settings.device)
    rows, classes = _select(settings), class_names(model)
    encode_labels(rows, classes)  # refuses before hours of decoding
    waveforms = Waveforms(rows.sources, extractor.sampling_rate, settings.memory_gb)
    waveforms.check_unreadable(settings.max_unreadable, "evaluated")
    for cause, names in waveforms.unreadable.items():
        logger.warning(f"{len(names)} of {len(rows)} clips are left out ({cause}): {', '.join(names)}")
    rows = keep_rows(rows, waveforms.kept)
    logits = _logits(model, extractor, waveforms, settings.batch_size)
    targets = as_one_hot(encode_labels(rows, classes).numpy(), len(classes))
    # Of exclusive classes only the probability can be compared between clips, which the order of tags is about.
    exclusive = rows.multi_label and model.config.problem_type == "single_label_classification"
    scores = torch.from_numpy(logits).log_softmax(-1).numpy() if exclusive else logits
    with refusals_as_settings_errors("these clips cannot be evaluated"):
        metrics = evaluate_predictions(scores, targets, classes, rows.multi_label)
        if rows.multi_label:
            for metric in (MeanRocAuc(), DPrime()):
                found = metric.compute(predictions=scores, references=targets.astype(np.int64), class_names=classes)
                metrics |= {name: found[name] for name in (metric.overall, f"{metric.overall}_interval")}
    results = {
        "settings": asdict(settings),
        "metrics": metrics,
        "classes": classes,
        "clips": len(rows),
        "unreadable": dict(waveforms.unreadable),
    }
    output = Path(settings.output_dir)
    with refusals_as_settings_errors(f"output_dir {output} cannot be written to"):
        output.mkdir(parents=True, exist_ok=True)
        save_scores(output, logits, targets, classes, [source_name(source) for source in rows.sources])
        write_json(output / "results.json", results)
    return results


def load_classifier(
    model: str, dtype: str = "float32", device: str | None = None
) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor]:
    """A classifier, on its device, and its feature extractor.

    Args:
        model: folder or Hub id.
        dtype: of the weights.
        device: the accelerator of this machine, or else its CPU, where freed memory is then kept (`allocator`), by default.

    Raises:
        SettingsError: (a `ValueError`) if they cannot be loaded, the classifier was never trained, or the device cannot be used.
    """
    with refusals_as_settings_errors(f"{model} cannot be loaded as a SSLAM classifier with its feature extractor"):
        extractor = SSLAMFeatureExtractor.from_pretrained(model)
        loaded: Any = SSLAMForAudioClassification.from_pretrained(model, dtype=getattr(torch, dtype), output_loading_info=True)
    classifier, loading = loaded
    if loading["missing_keys"]:
        raise SettingsError(f"{model} holds no classifier ({min(loading['missing_keys'])} is missing): give one that was fine-tuned")
    place = device or best_device()
    if str(place) == "cpu":
        keep_freed_memory()
    try:
        return classifier.to(place), extractor
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or torch was built without it
        raise SettingsError(f"device is {device!r}, which cannot be used: {error}") from error


def evaluate_predictions(
    logits: np.ndarray, targets: np.ndarray, classes: list[str], multi_label: bool, confidence: float | None = 0.95
) -> dict[str, Any]:
    """Accuracy, or mean average precision where a clip may have several classes.

    Args:
        logits: `(clips, classes)`.
        targets: `(clips, classes)`, 0 or 1.
        classes: their names.
        multi_label: whether a clip may have several.
        confidence: of the bootstrap interval over clips; `None` for none.

    Raises:
        SettingsError: (a `ValueError`) if the logits are not finite.
    """
    if not np.isfinite(logits).all():
        raise SettingsError(
            "the model's outputs are NaN or infinite: its training has diverged (lower learning_rate), or its dtype is too narrow for it"
        )
    if multi_label:
        return MeanAveragePrecision().compute(
            predictions=logits, references=targets.astype(np.int64), class_names=classes, confidence=confidence
        )
    return Accuracy().compute(predictions=logits.argmax(-1), references=targets.argmax(-1), confidence=confidence)


def save_scores(folder: Path, logits: np.ndarray, targets: np.ndarray, classes: list[str], names: list[str]) -> None:
    """Write `scores.npz`: `logits` and `targets`, `(clips, classes)`, the `classes`, and the clips' `names`, where they are known."""
    np.savez(folder / "scores.npz", logits=logits, targets=targets, classes=classes, names=names)


def results_table(results: dict[str, Any]) -> str:
    """What `evaluate_classifier` returned, as a Markdown table: each metric with its interval over clips."""
    metrics, rows = results["metrics"], []
    for name, value in metrics.items():
        if isinstance(value, float):
            low, high = metrics[f"{name}_interval"]
            rows.append([name.replace("_", " "), f"{value:.4f} [{low:.4f}, {high:.4f}]"])
    return markdown_table([f"{results['clips']} clips", "value [95 % interval over clips]"], rows)


def _select(settings: EvaluationSettings) -> LabelledRows:
    splits = open_data_set(settings.data_dir, settings.layout, subset=settings.subset)
    if settings.fold_column is None:
        chosen = select_split(splits, settings.eval_split)
    else:
        chosen = select_folds(splits, settings.fold_column, settings.eval_folds)
    rows = read_rows(chosen, settings.label_column, settings.label_separator)
    check_has_labels(rows)
    return rows


@torch.inference_mode()
def _logits(model: SSLAMForAudioClassification, extractor: SSLAMFeatureExtractor, waveforms: Waveforms, batch_size: int) -> np.ndarray:
    """`(clips, classes)`, float32."""
    batches = []
    for start in tqdm(range(0, len(waveforms), batch_size), desc="scoring", unit="batch"):
        clips = [waveforms[i] for i in range(start, min(start + batch_size, len(waveforms)))]
        inputs = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt", device=model.device)
        batches.append(model(**inputs).logits.float().cpu())
    return torch.cat(batches).numpy()


__all__ = ["EvaluationSettings", "evaluate_classifier", "evaluate_predictions", "load_classifier", "results_table", "save_scores"]
