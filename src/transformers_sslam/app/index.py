"""What sounds like a span of a recording: the nearest spans among those that `sslam embed` has indexed.

The index is read from the folder of results beside the output of `sslam embed`, which says where each recording was, and of which model and
windows the vectors are. All vectors are in memory, and all are compared: of a million windows in 768 dimensions that is 3 GB.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from ..audio.decode import read_blocks
from ..audio.paths import printable_path
from ..errors import UserError, as_user_error
from ..evaluation.loading import hash_model
from ..fbank import frame_geometry
from ..files import read_json
from ..pooling_sslam import pooled_width
from ..recordings.formats import names_within
from ..recordings.inputs import Recording, current_state
from ..recordings.parts import IDENTITY, Parts, values_of
from ..tasks_sslam import Embedding
from .listening import Listener


MATCHES = 10  # that are shown
PARTS = ".parts"  # how a folder of results ends


class Match(NamedTuple):
    """An indexed span.

    Attributes:
        row: its number in the index.
        recording: its name below the folder that holds all.
        start, end: in seconds.
        similarity: cosine of its vector and that of the chosen span.
        is_there: whether its recording is where it was when it was indexed, unchanged.
    """

    row: int
    recording: str
    start: float
    end: float
    similarity: float
    is_there: bool


class SoundIndex:
    """Vectors of recordings, to search.

    Args:
        source: output of `sslam embed`, its folder of results, or a folder that holds one such.
        listener: has the model, which must be that of the index.

    Attributes:
        about: what is searched, for people.
        window: length of a window in seconds.

    Raises:
        UserError: if it is not an index, or of another model or precision.
    """

    def __init__(self, source: str, listener: Listener):
        folder = _find_parts(source, listener.settings.model)
        self._listener, self._encoder = listener, listener.model.base_model
        with as_user_error(f"index {folder} cannot be read"):
            identity = read_json(folder / IDENTITY)
        self._check(folder, identity)
        self.window = float(identity["window"])
        self._options: dict[str, Any] = {name: identity[name] for name in ("layers", "pooling", "window")}
        config = self._encoder.config
        width = len(identity["layers"]) * pooled_width(identity["pooling"] or config.classifier_pooling, config)
        with as_user_error(f"index {folder} cannot be read"):
            self._read(Parts(folder, identity, width))
        if not len(self._starts):
            raise UserError(f"index {folder} holds no vectors: give one of recordings that can be used")
        spans = f"in {len(self._starts):,} spans of {self.window:g} s, one every {identity['hop']:g} s"
        spans = "each as a whole" if identity["per"] == "clip" else spans
        self.about = f"{len(self._recordings):,} recordings, {spans} (index {printable_path(folder.name)})"

    def find(self, sound: Path, start: float, end: float) -> list[Match]:
        """The nearest spans to a span of a sound at the model's rate, the nearest first. Of spans that overlap only the nearest is there.

        The span is encoded as if it were a clip of its own, with the windows, layers and pooling of the index: a span longer than a window
        has the mean of several.

        Raises:
            UserError: if the span is not one.
        """
        vector = self._encode(sound, start, end)
        similarities = self._vectors @ (vector / np.linalg.norm(vector))
        found: list[int] = []
        for row in np.argsort(-similarities, kind="stable"):
            if not any(self._overlap(int(row), other) for other in found):
                found.append(int(row))
            if len(found) == MATCHES:
                break
        before = [self._recordings[self._owners[row]] for row in found]
        now = current_state([recording.path for recording in before])
        return [
            Match(row, self._names[self._owners[row]], *self._span(row), float(similarities[row]), recording == state)
            for row, recording, state in zip(found, before, now)
        ]

    def cut(self, row: int, folder: Path) -> tuple[Path, str]:
        """A file in `folder` with the sound of an indexed span, as the model receives it, of at most the seconds that the page allows; and
        what it is. Nothing but what is indexed can be asked for.

        Raises:
            UserError: if there is no such row, or its recording can no longer be read; the message is meant for the visitor.
        """
        if not isinstance(row, int) or row not in range(len(self._starts)):
            raise UserError(f"{row!r} is not a row of the index: search again")
        recording, name = self._recordings[self._owners[row]], self._names[self._owners[row]]
        start, end = self._span(row)
        end, rate = min(end, start + self._listener.settings.max_seconds), self._listener.rate
        if current_state([recording.path]) != [recording]:
            raise UserError(f"{name} was moved or has changed: run sslam embed again")
        file = folder / f"found-{row}.flac"
        first, last, position = round(start * rate), round(end * rate), 0
        unfinished = file.with_suffix(".unfinished")
        try:
            with soundfile.SoundFile(unfinished, "w", rate, 1, subtype="PCM_24", format="FLAC") as output:
                for block in read_blocks(recording.path, rate):
                    output.write(block[max(0, first - position) : max(0, last - position)].clip(-1, 1))
                    position += len(block)
                    if position >= last:
                        break
        except (ValueError, OSError) as error:  # it may name a file of this machine
            raise UserError(str(error).replace(printable_path(recording.path), name)) from error
        os.replace(unfinished, file)
        return file, f"{name}, {start:.2f} to {end:.2f} s"

    def _check(self, folder: Path, identity: dict[str, Any]) -> None:
        """Raise a `UserError` unless the index is of vectors that this model gives of a span."""
        listener, again = self._listener, "run sslam embed again, with another --output"
        if identity.get("task") != Embedding.__name__:
            raise UserError(f"index {folder} holds no embeddings: give what sslam embed wrote, not sslam tag or sslam detect")
        if identity.get("per") not in ("clip", "window"):
            raise UserError(f"index {folder} has a vector for each time step, but spans are compared: {again} and --per window")
        if identity.get("dtype") != listener.settings.dtype:
            raise UserError(f"index {folder} is in {identity.get('dtype')}, but dtype is {listener.settings.dtype}: give the same")
        model = hash_model(self._encoder, listener.extractor, problem_type=listener.model.config.problem_type)
        if identity.get("model") != f"sha256:{model}":
            raise UserError(
                f"index {folder} was made with another model than {listener.settings.model}, so that vectors cannot be compared: give the "
                f"--model that sslam embed was given, or {again} and this model"
            )

    def _read(self, parts: Parts) -> None:
        usable = sorted((entry.part, entry.first, path) for path, entry in parts.entries.items() if entry.error is None)
        paths = [path for _, _, path in usable]
        self._recordings = [Recording(path, *parts.entries[path][3:5]) for path in paths]
        self._names = [printable_path(name) for name in names_within(paths)] if paths else []
        owners, starts, ends, vectors = [], [], [], []
        for owner, (_, _, tables) in enumerate(parts.read(paths)):
            for table in tables:
                values = values_of(table)
                owners.append(np.full(len(values), owner))
                starts.append(table["start"].to_numpy())
                ends.append(table["end"].to_numpy())
                vectors.append(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny))
        empty = np.zeros(0)
        self._owners = np.concatenate(owners or [empty.astype(int)])
        self._starts, self._ends, self._vectors = (np.concatenate(columns or [empty]) for columns in (starts, ends, vectors))

    def _encode(self, sound: Path, start: float, end: float) -> np.ndarray:
        rate = self._listener.rate
        first, last = round(start * rate), round(end * rate)
        with soundfile.SoundFile(sound) as file:
            if not 0 <= first < last <= file.frames + rate / 100:  # what is typed is rounded
                length = f"{file.frames / rate:.2f} s"
                raise UserError(f"from {start:g} to {end:g} s is not a span of this recording of {length}: choose another")
            if last - first < (least := frame_geometry(rate)[0]):
                raise UserError(f"a span of {end - start:g} s is too short: choose at least {least / rate:g} s")
            file.seek(first)
            samples = file.read(last - first, dtype="float32")
        options = {"batch_size": self._listener.settings.per_device_eval_batch_size, **self._options}
        return self._encoder.encode([samples], self._listener.extractor, **options)[0].numpy()

    def _span(self, row: int) -> tuple[float, float]:
        return float(self._starts[row]), float(self._ends[row])

    def _overlap(self, row: int, other: int) -> bool:
        apart = self._ends[row] <= self._starts[other] or self._ends[other] <= self._starts[row]
        return bool(self._owners[row] == self._owners[other]) and not apart


def _find_parts(source: str, model: str) -> Path:
    """The folder of results that is meant."""
    path = Path(source)
    candidates = [path, path.with_suffix(PARTS)] if (path / IDENTITY).is_file() or path.is_file() else sorted(path.glob(f"*{PARTS}"))
    found = [folder for folder in candidates if (folder / IDENTITY).is_file()]
    if not found:
        example = f"sslam embed --model {model} --inputs RECORDINGS --output embeddings.parquet --per window"
        raise UserError(f"index is {source!r}, but what sslam embed wrote is expected, with its folder of results, *{PARTS}: {example}")
    if path.is_dir() and path not in found and len(found) > 1:
        raise UserError(f"index {source} holds {', '.join(folder.name for folder in found)}: give one of them")
    return found[0]
