"""This package's metrics for the library `evaluate`; nothing is downloaded.

```python
MeanAveragePrecision().compute(predictions=scores, references=targets, class_names=names)
```
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from .events import EventMetric, collar_f1, psds, segment_f1
from .metrics import accuracy, mean_over_classes


# Floats also where whole numbers are expected: as integers, what is not whole would be cut off before the metric can reject it.
SCORES = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.List(datasets.Value("float64"))))
INDICES = datasets.Features(dict.fromkeys(("predictions", "references"), datasets.Value("float64")))

EVENTS = datasets.Features(
    {
        "predictions": datasets.List(datasets.List(datasets.Value("float64"))),
        "references": datasets.List(
            {"onset": datasets.Value("float64"), "offset": datasets.Value("float64"), "label": datasets.Value("string")}
        ),
    }
)


class PackagedMetric(evaluate.Metric):
    """A metric of this package. Predictions stay in memory unless several processes share them (`num_process`)."""

    inputs: ClassVar[datasets.Features]
    function: ClassVar[Callable[..., dict[str, Any]]]

    def __init__(self, config_name: str | None = None, num_process: int = 1, **kwargs):
        super().__init__(config_name, num_process=num_process, **{"keep_in_memory": num_process == 1, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        text = type(self).__doc__ or ""
        return evaluate.MetricInfo(description=text, citation="", inputs_description=text, features=self.inputs)

    def _compute(self, predictions, references, **options) -> dict[str, Any]:
        return type(self).function(predictions, references, **options)


def _accuracy(predictions, references, **options) -> dict[str, Any]:
    return accuracy(_as_indices(predictions), _as_indices(references), **options)


def _as_indices(values: list[float]) -> np.ndarray:
    """Whole numbers as integers; others as they are, which the metric rejects."""
    array = np.asarray(values)
    return array.astype(np.int64) if (array % 1 == 0).all() else array


class Accuracy(PackagedMetric):
    """Fraction of clips whose predicted class is correct; arguments and result of [`metrics.accuracy`]."""

    inputs = INDICES
    function = staticmethod(_accuracy)


class MeanAveragePrecision(PackagedMetric):
    """Mean average precision over classes; arguments and result of [`metrics.mean_over_classes`]."""

    inputs = SCORES
    function = staticmethod(partial(mean_over_classes, "average_precision"))


class MeanRocAuc(PackagedMetric):
    """Mean area under the ROC curve over classes; arguments and result of [`metrics.mean_over_classes`]."""

    inputs = SCORES
    function = staticmethod(partial(mean_over_classes, "roc_auc"))


def _over_recordings(metric: Callable[..., EventMetric], predictions, references, durations, **options) -> dict[str, Any]:
    scores = {f"{i}": recording for i, recording in enumerate(predictions)}
    truth = {f"{i}": [(event["onset"], event["offset"], event["label"]) for event in events] for i, events in enumerate(references)}
    return metric(
        scores=scores, ground_truth=truth, durations={f"{i}": seconds for i, seconds in enumerate(durations)}, **options
    ).to_dict()


class PolyphonicSoundDetectionScore(PackagedMetric):
    """PSDS of scores `(steps, classes)` a recording, and its events `{"onset", "offset", "label"}`; `durations` in the same order, other
    arguments and the result as of [`events.psds`].
    """

    inputs = EVENTS
    function = staticmethod(partial(_over_recordings, psds))


class CollarF1(PackagedMetric):
    """Collar-based F1; inputs as of [`PolyphonicSoundDetectionScore`], other arguments and the result as of [`events.collar_f1`]."""

    inputs = EVENTS
    function = staticmethod(partial(_over_recordings, collar_f1))


class SegmentF1(PackagedMetric):
    """Segment-based F1; inputs as of [`PolyphonicSoundDetectionScore`], other arguments and the result as of [`events.segment_f1`]."""

    inputs = EVENTS
    function = staticmethod(partial(_over_recordings, segment_f1))
