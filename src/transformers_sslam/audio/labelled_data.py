"""The settings of labelled clips that fine-tuning, evaluation and probes have in common."""

import math
from dataclasses import dataclass

from ..errors import UserError
from ..settings import setting


@dataclass(kw_only=True)
class LabelledDataSettings:
    """Labelled clips"""

    data_dir: str = setting("folder of the clips, or, with layout hub, id of a data set")
    layout: str = setting("how the clips are laid out, see transformers_sslam.audio.layouts", "audiofolder")
    subset: str | None = setting("part of a data set that has several: configuration on the Hub, scene of SPASS, eval of AudioSet", None)
    label_column: str = setting("column of the labels (of AudioSet: labels); a column of lists makes the task multi-label", "label")
    label_separator: str | None = setting("between the labels of a clip that has several; makes the task multi-label too", None)
    test_split: str = setting("split to evaluate on, unless fold_column is set", "test")
    fold_column: str | None = setting("column to choose clips by, whatever their split", None)
    test_folds: list[int | str] = setting("values of fold_column to evaluate on", [])
    max_unreadable: float = setting("fraction of unreadable files, in any part, above which the run stops; fewer are left out", 0.01)
    memory_gb: float = setting("memory for decoded clips; the others are decoded each time", 4.0)

    def __post_init__(self):
        if not 0 <= self.max_unreadable < 1:
            raise UserError(f"max_unreadable is {self.max_unreadable:g}, but a fraction in [0, 1) is expected")
        check_memory(self.memory_gb)
        if self.test_folds and self.fold_column is None:
            raise UserError("test_folds are set, but fold_column, which they choose from, is not")


def check_memory(memory_gb: float, name: str = "memory_gb") -> None:
    """Raise a `UserError` unless this is a limit of memory."""
    if not 0 <= memory_gb < math.inf:
        raise UserError(f"{name} is {memory_gb:g}, but a number of at least 0 is expected")
