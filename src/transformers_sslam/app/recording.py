"""What is kept of a recording, and what follows from it with certain positions of the sliders."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..events_sslam import Event


SOUND, PICTURE = "sound.flac", "log_mel.png"
TABLE, LABELS, EMBEDDINGS = ".csv", ".labels.txt", ".parquet"  # behind the name of a recording


class Slider(NamedTuple):
    """A setting that acts on kept scores; `name` is unique on the page."""

    name: str
    label: str
    info: str
    least: float
    largest: float
    step: float
    value: float


@dataclass(frozen=True)
class Recording:
    """What is kept of a recording.

    Attributes:
        name: as its owner called it.
        folder: of its files.
        duration: in seconds.
        edges: `(n + 1,)`, in seconds: row `i` of the scores is drawn between `edges[i]` and `edges[i + 1]`.
        scores: `(n, classes)`, of time steps or windows.
        starts, ends: `(n,)`, in seconds: what each row covers. Windows overlap.
    """

    name: str
    folder: Path
    duration: float
    edges: np.ndarray
    scores: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def file(self, ending: str) -> Path:
        """For download: browsers save it under this name, which has nothing but letters, digits, hyphens and underscores."""
        return self.folder / (re.sub(r"[^\w-]+", "_", Path(self.name).stem)[:80] + ending)


class Found(NamedTuple):
    """What a model finds in a recording with certain positions of the sliders.

    Attributes:
        events: as they are written.
        scores: `(n, classes)`, which are compared with the thresholds: after the median filter, if there is one.
        thresholds, onsets: `(classes,)`: an event extends over scores above the first, and needs one above the second.
    """

    events: list[Event]
    scores: np.ndarray
    thresholds: np.ndarray
    onsets: np.ndarray
