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

from .metrics import accuracy, mean_over_classes


SCORES = datasets.Features({"predictions": datasets.List(datasets.Value("float64")), "references": datasets.List(datasets.Value("int64"))})
INDICES = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})


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


class Accuracy(PackagedMetric):
    """Fraction of clips whose predicted class is correct; arguments and result of [`metrics.accuracy`]."""

    inputs = INDICES
    function = staticmethod(accuracy)


class MeanAveragePrecision(PackagedMetric):
    """Mean average precision over classes; arguments and result of [`metrics.mean_over_classes`]."""

    inputs = SCORES
    function = staticmethod(partial(mean_over_classes, "average_precision"))


class MeanRocAuc(PackagedMetric):
    """Mean area under the ROC curve over classes; arguments and result of [`metrics.mean_over_classes`]."""

    inputs = SCORES
    function = staticmethod(partial(mean_over_classes, "roc_auc"))
