"""What a trained classifier is worth on labelled clips: its logits, and accuracy, or mean average precision, ROC AUC and d-prime.

Nothing is trained: for the published figure of a converted checkpoint, or for a model of one's own on clips from elsewhere.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm.auto import tqdm

from ..audio.cache import Waveforms
from ..audio.layouts import open_splits
from ..audio.rows import LabelledRows, check_has_labels, read_rows, select_folds, select_split
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..inference import class_names
from ..modeling_sslam import SSLAMForAudioClassification
from ..reports import markdown_table, write_json
from ..settings import setting
from .loading import load_classifier
from .scores import evaluate_predictions, evaluate_tags, save_scores


@dataclass(kw_only=True)
class EvaluationSettings:
    """Settings of `scripts/evaluate_classifier.py`. Those of the data are called as in fine-tuning."""

    model: str = setting("folder or Hub id of a SSLAM classifier")
    data_dir: str = setting("folder of the clips, or, with layout=hub, id of a data set")
    layout: str = setting("how the clips are laid out, see transformers_sslam.audio.layouts", "audiofolder")
    subset: str | None = setting("part of a data set that has several: configuration on the Hub, scene of SPASS, eval of AudioSet", None)
    label_column: str = setting("column of the labels (of AudioSet: labels); a column of lists makes the task multi-label", "label")
    label_separator: str | None = setting("between the labels of a clip that has several; makes the task multi-label too", None)
    eval_split: str = setting("split to evaluate on, unless fold_column is set", "test")
    fold_column: str | None = setting("column to choose rows by, whatever their split", None)
    eval_folds: list[int | str] = setting("its values to evaluate on", [])
    max_unreadable: float = setting("share of unreadable files above which the run stops; fewer are left out and reported", 0.01)
    memory_gb: float = setting("memory for decoded clips; what does not fit is decoded each time", 4.0)
    batch_size: int = setting("clips at a time", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: the accelerator of this machine, or else its CPU", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting(
        "computed in; the weights, and all of the classifier behind the encoder, stay in float32, for rounded logits tie", "float32"
    )
    output_dir: str = setting("folder for results.json and scores.npz of one evaluation, whose next run replaces them", "runs/evaluation")

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}, but must be positive")
        if not 0 <= self.max_unreadable < 1:
            raise UserError(f"max_unreadable is {self.max_unreadable:g}, but a share lies in [0, 1)")
        if self.eval_folds and self.fold_column is None:
            raise UserError("eval_folds are set, but fold_column, which they choose from, is not")


def evaluate_classifier(settings: EvaluationSettings) -> dict[str, Any]:
    """Score all clips that can be read, padded or cut to the feature extractor's length as in fine-tuning, and compare with their labels.

    Returns:
        What `results.json` holds: settings, metrics, class names, number of clips, unreadable files by cause. Beside it, `scores.npz` has
        `logits` and `targets`, `(clips, classes)`, the `classes`, and the clips' `names`. Where clips have several labels and the model's
        classes are exclusive, clips are ranked by its probabilities, the softmax of these logits.

    Raises:
        UserError: (a `ValueError`) if the model cannot be used, the folder holds another run, or the clips do not
            hold what was asked for or have labels that are none of the model's classes.
        FloatingPointError: if logits are not finite.
    """
    output = _make_folder(settings)
    model, extractor, classes = _load(settings)
    rows = _select(settings)
    rows.encode(classes)  # tells what does not fit before hours of decoding
    waveforms = Waveforms(rows.sources, extractor.sampling_rate, settings.memory_gb)
    waveforms.check_unreadable(settings.max_unreadable, "evaluated")
    rows = rows.select(waveforms.kept)
    targets = rows.encode(classes).one_hot(range(len(rows)))
    with torch.autocast(model.device.type, dtype=getattr(torch, settings.dtype), enabled=settings.dtype != "float32"):
        logits = _logits(model, extractor, waveforms, settings.batch_size)
    save_scores(output, logits, targets, classes, [rows.name(i) for i in range(len(rows))])
    results = {
        "settings": asdict(settings),
        "metrics": _metrics(model, logits, targets, classes, rows.labels.multi_label),
        "classes": classes,
        "clips": len(rows),
        "unreadable": dict(waveforms.unreadable),
    }
    write_json(output / "results.json", results)
    return results


def _metrics(
    model: SSLAMForAudioClassification, logits: np.ndarray, targets: np.ndarray, classes: list[str], multi_label: bool
) -> dict[str, Any]:
    if not np.isfinite(logits).all():
        raise FloatingPointError(f"{(~np.isfinite(logits)).any(1).sum()} clips have logits that are NaN or infinite: try dtype=float32")
    if not multi_label:
        return evaluate_predictions(logits, targets, classes, multi_label=False)
    if model.config.problem_type != "multi_label_classification":  # of exclusive classes only probabilities compare between clips
        logits = torch.from_numpy(logits).log_softmax(-1).numpy()
    return evaluate_tags(logits, targets, classes)


def results_table(results: dict[str, Any]) -> str:
    """What `evaluate_classifier` returned, as a Markdown table: each metric with its interval over clips."""
    rows = []
    for name, value in results["metrics"].items():
        if isinstance(value, float):
            low, high = results["metrics"][f"{name}_interval"]
            rows.append([name.replace("_", " "), f"{value:.4f} [{low:.4f}, {high:.4f}]"])
    return markdown_table([f"{results['clips']} clips", "value [95 % interval over clips]"], rows)


def _make_folder(settings: EvaluationSettings) -> Path:
    output = Path(settings.output_dir)
    if any((output / name).exists() for name in ("config.json", "settings.yaml")):
        raise UserError(f"output_dir {output} holds a model or its run, whose results would be replaced: choose another folder")
    with as_user_error(f"output_dir {output} cannot be written to"):
        output.mkdir(parents=True, exist_ok=True)
    return output


def _load(settings: EvaluationSettings) -> tuple[SSLAMForAudioClassification, SSLAMFeatureExtractor, list[str]]:
    """The classifier, which has proved that it can score what the feature extractor makes, and its classes."""
    model, extractor = load_classifier(settings.model, device=settings.device)
    with as_user_error("the model cannot be evaluated"):
        next(model.score_windows(np.zeros(extractor.sampling_rate, dtype=np.float32), extractor))
    classes = class_names(model)
    if len(set(classes)) < len(classes):
        twice = next(name for name in classes if classes.count(name) > 1)
        raise UserError(f"{settings.model} has two classes called {twice!r}: give each a name of its own in its config.json")
    return model, extractor, classes


def _select(settings: EvaluationSettings) -> LabelledRows:
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset)
    if settings.fold_column is None:
        chosen = select_split(splits, settings.eval_split)
    else:
        chosen = select_folds(splits, settings.fold_column, settings.eval_folds)
    rows = read_rows(chosen, settings.label_column, settings.label_separator)
    check_has_labels(rows.labels)
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


__all__ = ["EvaluationSettings", "evaluate_classifier", "results_table"]
