"""Evaluation of a classifier on labelled clips: its logits, and accuracy, or mean average precision, ROC AUC and d-prime.

```bash
sslam evaluate --model runs/mine --data_dir PATH/TO/folder                                   # its split test/
sslam evaluate --model MODEL --data_dir audioset --layout audioset --subset eval --label_column labels
sslam evaluate --model runs/mine --data_dir esc10 --fold_column fold --test_folds 4
```

Labels must have the names of the model's classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers

from ..allocator import keep_freed_memory
from ..audio.cache import Waveforms
from ..audio.labelled_data import LabelledDataSettings
from ..audio.layouts import open_splits
from ..audio.rows import LabelledRows, check_has_labels, read_rows, select_folds, select_split
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..files import write_json
from ..modeling_sslam import SSLAMForAudioClassification
from ..reports import markdown_table
from ..settings import setting, settings_dict
from .loading import best_device, input_batches, load_model
from .per_class import PICTURE, class_table, results_by_class
from .scores import evaluate_predictions, evaluate_tags, save_scores


@dataclass(kw_only=True)
class EvaluationSettings(LabelledDataSettings):
    """Evaluation of a classifier"""

    model: str = setting("classifier: a folder, a Hub id, or an official fine-tuned checkpoint")
    per_device_eval_batch_size: int = setting("clips in a forward pass", 16)
    device: str | None = setting("cpu, cuda, cuda:1 ...; null: an accelerator if there is one", None)
    dtype: Literal["float32", "float16", "bfloat16"] = setting(
        "precision of the encoder; weights and the classifier's head stay in float32, because rounded logits tie", "float32"
    )
    output_dir: str = setting("folder for results.json, scores.npz and confusion_matrix.png, replaced by the next run", "runs/evaluation")

    def __post_init__(self):
        super().__post_init__()
        if self.per_device_eval_batch_size < 1:
            raise UserError(f"per_device_eval_batch_size is {self.per_device_eval_batch_size}, but must be positive")


def run(settings: EvaluationSettings) -> None:
    """Evaluate, and print a table."""
    transformers.logging.disable_progress_bar()
    if str(settings.device or best_device()) == "cpu":
        keep_freed_memory()
    results = evaluate_classifier(settings)
    print(results_table(results))
    for kind, which in (("positives", "no clip"), ("negatives", "every clip")):
        if left_out := results["metrics"].get(f"classes_without_{kind}"):
            print(f"\nleft out, because {which} has them: {', '.join(left_out)}")
    print("\n" + class_table(results["per_class"]))
    picture = Path(settings.output_dir) / PICTURE
    print(f"\nevery number is in {Path(settings.output_dir) / 'results.json'}, the logits in scores.npz there")
    if picture.exists():
        print(f"confusion matrix: {picture}")


def evaluate_classifier(settings: EvaluationSettings) -> dict[str, Any]:
    """Score all clips that can be read, padded or cut to the feature extractor's length, and write `results.json` and `scores.npz`.

    Clips of several labels are ranked by the softmax of the logits if the model's classes are exclusive.

    Returns:
        What `results.json` holds: settings, metrics, class names, number of clips, unreadable files by cause, results by class and, of
        exclusive classes, the confusion matrix, which is also drawn as `confusion_matrix.png`.

    Raises:
        UserError: if the model cannot be used, the folder holds another run, or the clips lack what was asked for or have other labels
            than the model's classes.
        FloatingPointError: if logits are not finite.
    """
    output = _make_folder(settings)
    model, extractor, classes = _load(settings)
    rows = _select(settings)
    rows.encode(classes)  # finds labels that do not fit before hours of decoding
    waveforms = Waveforms(rows.sources, extractor.sampling_rate, settings.memory_gb)
    waveforms.check_unreadable(settings.max_unreadable, "evaluated")
    rows = rows.select(waveforms.kept)
    targets = rows.encode(classes).one_hot(range(len(rows)))
    with torch.autocast(model.device.type, dtype=getattr(torch, settings.dtype), enabled=settings.dtype != "float32"):
        logits = _logits(model, extractor, waveforms, settings.per_device_eval_batch_size)
    save_scores(output, logits, targets, classes, [rows.name(i) for i in range(len(rows))])
    multi_label = rows.labels.multi_label
    metrics = _metrics(model, logits, targets, classes, multi_label)
    results = {
        "settings": settings_dict(settings),
        "metrics": metrics,
        "classes": classes,
        "clips": len(rows),
        "unreadable": dict(waveforms.unreadable),
        **results_by_class(logits, targets, classes, metrics, multi_label, output),
    }
    write_json(output / "results.json", results)
    return results


def results_table(results: dict[str, Any]) -> str:
    """What `evaluate_classifier` returned, as a Markdown table."""
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
    """Classifier (tried on a second of silence), feature extractor and classes."""
    model, extractor = load_model(SSLAMForAudioClassification, settings.model, device=settings.device)
    with as_user_error("the model cannot be evaluated"):
        next(model.score_windows(np.zeros(extractor.sampling_rate, dtype=np.float32), extractor))
    classes = model.config.class_names
    if twice := [name for name in classes if classes.count(name) > 1]:
        raise UserError(f"{settings.model} has two classes called {twice[0]!r}: give each a name of its own in its config.json")
    return model, extractor, classes


def _select(settings: EvaluationSettings) -> LabelledRows:
    splits = open_splits(settings.data_dir, settings.layout, subset=settings.subset)
    if settings.fold_column is None:
        chosen = select_split(splits, settings.test_split)
    else:
        chosen = select_folds(splits, settings.fold_column, settings.test_folds)
    rows = read_rows(chosen, settings.label_column, settings.label_separator)
    check_has_labels(rows.labels)
    return rows


@torch.inference_mode()
def _logits(model: SSLAMForAudioClassification, extractor: SSLAMFeatureExtractor, waveforms: Waveforms, batch_size: int) -> np.ndarray:
    """`(clips, classes)`, float32."""
    batches = input_batches(model, extractor, waveforms, batch_size, "scoring")
    return torch.cat([model(**inputs).logits.float().cpu() for _, inputs in batches]).numpy()


def _metrics(
    model: SSLAMForAudioClassification, logits: np.ndarray, targets: np.ndarray, classes: list[str], multi_label: bool
) -> dict[str, Any]:
    if not np.isfinite(logits).all():
        clips = (~np.isfinite(logits)).any(1).sum()
        raise FloatingPointError(f"{clips} clips have logits that are NaN or infinite: try --dtype float32")
    if not multi_label:
        return evaluate_predictions(logits, targets, classes, multi_label=False)
    if model.config.problem_type != "multi_label_classification":  # of exclusive classes only probabilities compare between clips
        logits = torch.from_numpy(logits).log_softmax(-1).numpy()
    return evaluate_tags(logits, targets, classes)
