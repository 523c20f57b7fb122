"""Training clips that are mixed when they are needed: single sounds, whose times are known exactly, over recordings of other things."""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..audio.cache import Waveforms
from ..audio.events import Event
from ..audio.labelled_data import check_memory
from ..audio.rows import AudioColumn, LabelledRows, check_single, hash_audio, read_rows
from ..audio.sources import SourceSettings
from ..errors import UserError, as_user_error
from ..fbank import frame_geometry
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..polyphony.render import MixingRules, MixtureSettings, Overlap, Sound, find_sound, plan_background, plan_mixture, render
from ..polyphony.sounds import open_backgrounds, open_table
from ..settings import setting


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MixingSettings(MixingRules):
    """Training clips that are mixed anew in each epoch

    Raises:
        UserError: if a value is out of range.
    """

    sounds: list[SourceSettings] = setting(
        "single sounds with one label each, as [{kind: audiofolder, path: sounds, keep: {fold: [1, 2]}}]; empty: no mixtures", []
    )
    label_column: str = setting("column of their labels; a label that the task does not have is mixed in without one", "label")
    backgrounds: list[SourceSettings] = setting("recordings without such sounds, to lay below them; empty: silence", [])
    clip_seconds: list[float] | None = setting(
        "range of a mixture's length in seconds, within which it is uniform; null: from half of the model's input to all of it", None
    )
    fraction: float = setting("fraction of the training clips that such mixtures replace", 1.0)
    num_events: list[int] = setting("numbers of events of a mixture, equally frequent; 0 is a background alone", [0, 1, 2, 3, 4])
    overlap: Overlap = setting("together: at one instant all events sound; anywhere: their onsets are independent", "anywhere")
    speeds: list[float] = setting(
        "speeds at which the sounds of a mixture are played, equally frequent: 1.1 shortens and raises them by a tenth", [1.0]
    )
    memory_gb: float = setting("memory for decoded sounds and backgrounds; others are decoded again each time", 2.0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("sounds", "backgrounds"):
            object.__setattr__(self, name, [SourceSettings.of(source) for source in getattr(self, name)])
        if not 0 < self.fraction <= 1:
            raise UserError(f"mixing.fraction is {self.fraction:g}, but a fraction in (0, 1] is expected: for none leave sounds out")
        if not self.num_events or min(self.num_events) < 0 or len(set(self.num_events)) < len(self.num_events):
            raise UserError(f"mixing.num_events is {self.num_events}, but different numbers of at least 0 are expected")
        if (span := self.clip_seconds) is not None and not (len(span) == 2 and 0 < span[0] <= span[1] < math.inf):
            raise UserError(f"mixing.clip_seconds is {span}, but [shortest, longest] in seconds are expected")
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise UserError(f"mixing.speeds is {self.speeds}, but numbers from 0.5 to 2 are expected, and [1.0] for none")
        check_memory(self.memory_gb, "mixing.memory_gb")
        if self.backgrounds and not self.sounds:
            raise UserError("mixing.backgrounds is set, but mixing.sounds is empty: give sounds to mix")


class Mixer:
    """Makes mixtures: sounds and backgrounds are decoded once, and kept where they fit into memory.

    Args:
        settings: what is mixed, and how.
        extractor: of the model: a mixture is at most as long as its input, and mostly shorter, so that padding is learnt too.
        max_unreadable: largest fraction of unreadable files, above which a `UserError` is raised.
        classes: of the task. Those that no mixture can have, and labels of sounds that are none of them, are named in the log.
    """

    def __init__(self, settings: MixingSettings, extractor: SSLAMFeatureExtractor, max_unreadable: float, classes: Sequence[str] = ()):
        rules: dict[str, Any] = {rule.name: getattr(settings, rule.name) for rule in fields(MixingRules)}
        self.settings = settings
        length, shift = frame_geometry(extractor.sampling_rate)
        longest = ((extractor.max_length - 1) * shift + length) / extractor.sampling_rate  # fills the model's input
        self.shortest, self.longest = settings.clip_seconds or (longest / 2, longest)
        if self.longest > longest:
            raise UserError(
                f"mixing.clip_seconds is {settings.clip_seconds}, but the model's input holds {longest:g} s: lower it, or raise max_length"
            )
        with as_user_error("the settings of mixing do not fit the model"):
            self.rules = MixtureSettings(**rules, sampling_rate=extractor.sampling_rate, clip_seconds=self.shortest)
        labelled = open_sounds(settings)
        sources = [source for rows in labelled for source in rows.sources]
        labels = [names for rows in labelled for names in rows.labels]
        memory = settings.memory_gb / 2
        self.backgrounds = open_backgrounds(settings.backgrounds, extractor.sampling_rate, memory, max_unreadable)
        self.sounds: list[tuple[list[Sound], Waveforms]] = []  # at each speed
        for speed in settings.speeds:
            # What is decoded at another rate and taken for the model's has another speed (Ko et al., Interspeech 2015).
            # In steps of 100 Hz: a filter for resampling is as long as the ratio of two rates has terms.
            rate = 100 * round(extractor.sampling_rate / speed / 100)
            waveforms = Waveforms(sources, rate, memory / len(settings.speeds), "decoding sounds")
            waveforms.check_unreadable(max_unreadable, "sound")
            found = (find_sound(waveforms[i], i, labels[row][0], self.rules) for i, row in enumerate(waveforms.kept))
            self.sounds.append(([sound for sound in found if sound is not None], waveforms))
        for count in settings.num_events:
            plan_mixture(self.sounds[0][0], self.rules, count, np.random.default_rng(0))  # an error comes now, and not in an epoch
        present = {sound.label for sound in self.sounds[0][0]}
        if classes and (others := present.difference(classes)):
            logger.info(f"sounds that are mixed in without a label, as the task has no such class: {', '.join(sorted(others))}")
        if settings.fraction == 1 and (silent := [name for name in classes if name not in present]):
            logger.warning(f"no sound to mix has the class {', '.join(silent)}, so that it is learnt to be absent: add some, or remove it")

    def __call__(self, generator: np.random.Generator) -> tuple[np.ndarray, list[Event]]:
        """A mixture `(samples,)`, float32, and its events in seconds."""
        count, rate = int(generator.choice(self.settings.num_events)), self.rules.sampling_rate
        rules = replace(self.rules, clip_seconds=float(generator.uniform(self.shortest, self.longest)))
        sounds, waveforms = self.sounds[generator.integers(len(self.sounds))]
        mixture = plan_mixture(sounds, rules, count, generator)
        if len(self.backgrounds):
            mixture = replace(mixture, background=plan_background(self.backgrounds, rules, generator))
        waveform, _ = render(mixture, waveforms, self.backgrounds)
        return waveform, [Event(event.label, event.onset / rate, event.offset / rate) for event in mixture.events]


def open_sounds(settings: MixingSettings) -> list[LabelledRows]:
    """The sounds of each source, not decoded. Raises `UserError` if one has not exactly one label."""
    labelled = [read_rows(open_table(source), settings.label_column) for source in settings.sounds]
    for rows in labelled:
        check_single(rows)
    return labelled


def mixed_audio(settings: MixingSettings) -> Iterator[tuple[str, AudioColumn]]:
    """The setting and the audio of each source of sounds and of backgrounds."""
    for name in ("sounds", "backgrounds"):
        for source in getattr(settings, name):
            yield f"mixing.{name}", AudioColumn(open_table(source))


def hash_mixing(settings: MixingSettings) -> str:
    """A hash of all sounds, their labels, and all backgrounds."""
    digest = hashlib.sha256()
    for rows in open_sounds(settings):
        digest.update(f"{rows.labels.digest()} {hash_audio(rows.sources)}\n".encode())
    for source in settings.backgrounds:
        digest.update(f"{hash_audio(AudioColumn(open_table(source)))}\n".encode())
    return digest.hexdigest()[:16]
