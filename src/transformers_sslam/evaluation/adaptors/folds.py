"""Classification of a labelled audio folder as a task of mteb, with each fold held out in turn.

A whole file for `sslam benchmark --tasks FILE.py`:

```python
from transformers_sslam.evaluation.adaptors.folds import FoldClassification


class MySounds(FoldClassification):
    data_dir = "my_sounds"
```
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from mteb._create_dataloaders import create_dataloader
from mteb.abstasks import AbsTaskClassification
from mteb.abstasks.task_metadata import TaskMetadata
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ...audio.cache import Waveforms
from ...audio.layouts import open_splits
from ...audio.rows import all_rows, check_apart, check_single, fold_values, read_rows, row_folds, select_folds
from ..probing import check_partitions, hold_out_each, summarize_runs


class FoldClassification(AbsTaskClassification):
    """Accuracy of the linear probe of `sslam probe` on the embeddings of any encoder, each fold held out in turn.

    Each clip is encoded once. Of all clips of the other folds a logistic regression is fitted to the standardised embeddings. The main
    score is the mean over the folds; `scores_per_experiment` holds those of each fold, in the order of their names, and `low` and `high`
    are the 95 % interval over folds of [`summarize_runs`]. The name of the subclass is that of the task.

    Attributes:
        data_dir, layout, subset, label_column, fold_column, max_unreadable, memory_gb: as the settings of `sslam probe`.
        keep: which clips to use, by values of their columns, such as `{"fold": [1, 2, 3], "label": ["dog", "rain"]}`; empty: all.
        sampling_rate: at which clips are decoded, Hz. mteb resamples them for encoders of another rate.
    """

    metadata: TaskMetadata
    data_dir: str
    layout: str = "audiofolder"
    subset: str | None = None
    label_column: str = "label"
    fold_column: str = "fold"
    keep: Mapping[str, Sequence[Any]] = {}
    max_unreadable: float = 0.01
    memory_gb: float = 4.0
    sampling_rate: int = 16_000

    input_column_name = "audio"
    evaluator_model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=5000))
    folds: Sequence[str]  # of each clip

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.metadata = TaskMetadata(
            name=cls.__name__,
            description=cls.__doc__ or "classification with each fold held out in turn",
            dataset={"path": str(getattr(cls, "data_dir", cls.__name__)), "revision": "local"},
            type="AudioClassification",
            modalities=["audio"],
            eval_langs=["zxx-Zxxx"],  # no language
            main_score="accuracy",
        )

    def load_data(self, num_proc: int | None = None, *, timer: Any = None, **kwargs: Any) -> None:
        """Read labels and folds, and decode what can be read.

        Raises:
            UserError: if a column is missing, a clip has no fold or not one label, a file is in two folds, a class is in one fold only, or
                too many files cannot be read.
        """
        splits = open_splits(self.data_dir, self.layout, subset=self.subset)
        for column, values in self.keep.items():
            splits = DatasetDict(kept=select_folds(splits, column, values))
        fold_values(splits, self.fold_column)  # rejects clips without a fold
        rows = all_rows(splits)
        labelled, folds = read_rows(rows, self.label_column), np.array(row_folds(rows, self.fold_column))
        check_single(labelled)
        check_apart({fold: labelled.sources.select(np.flatnonzero(folds == fold)) for fold in sorted(set(folds))})
        waveforms = Waveforms(labelled.sources, self.sampling_rate, self.memory_gb)
        waveforms.check_unreadable(self.max_unreadable, self.metadata.name)
        classes, self.folds = labelled.labels.occurring(), folds[waveforms.kept].tolist()
        targets = labelled.encode(classes).codes[waveforms.kept].astype(np.int64)
        check_partitions(hold_out_each(self.folds), targets, classes)

        def decode(batch: dict[str, list]) -> dict[str, list]:
            audio = [{"array": waveforms[i].copy(), "sampling_rate": self.sampling_rate} for i in batch.get("audio", ())]
            return {**batch, "audio": audio} if "audio" in batch else batch

        clips = Dataset.from_dict({"audio": np.arange(len(targets)), "label": targets})
        self.dataset = DatasetDict(test=clips.with_transform(decode))
        self.data_loaded = True

    def _evaluate_subset(
        self,
        model: Any,
        data_split: Any,
        *,
        encode_kwargs: Any,
        hf_split: str,
        hf_subset: str,
        prediction_folder: Path | None = None,
        num_proc: int | None = None,
        timer: Any,
        **kwargs: Any,
    ) -> Any:
        clips, about = data_split[hf_split], self.metadata
        batches = create_dataloader(clips, task_metadata=about, input_column="audio", num_proc=num_proc, **encode_kwargs)
        vectors = np.asarray(model.encode(batches, task_metadata=about, hf_split=hf_split, hf_subset=hf_subset, **encode_kwargs))
        parts, scores, predictions = hold_out_each(self.folds), [], []
        for part in parts:
            rows = clips.select(part.train), clips.select(part.evaluation)
            found, predicted = self._run_experiment(*rows, vectors[part.train], vectors[part.evaluation], timer)
            scores.append(found)
            predictions.append(predicted)
        if prediction_folder:
            self._save_task_predictions(predictions, model, prediction_folder, hf_split, hf_subset)
        numbers = [len(part.evaluation) for part in parts]
        summary = summarize_runs(np.array([[found["accuracy"]] for found in scores]), numbers)
        by_fold = [{**found, "fold": part.name, "clips": number} for found, part, number in zip(scores, parts, numbers)]
        mean: Any = self._calculate_avg_scores(scores)
        return {**mean, "scores_per_experiment": by_fold, "low": summary.low, "high": summary.high}
