"""Training clips that are mixed when they are needed: single sounds, whose times are known exactly, over recordings of other things."""

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..audio.cache import Waveforms
from ..audio.events import Event
from ..audio.rows import AudioColumn, LabelledRows, hash_audio, read_rows
from ..audio.sources import SourceSettings
from ..errors import UserError, as_user_error
from ..fbank import frame_geometry
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from ..polyphony.render import MixingRules, MixtureSettings, Overlap, find_sound, plan_background, plan_mixture, render
from ..polyphony.sounds import open_backgrounds, open_table
from ..settings import setting


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
    fraction: float = setting("fraction of the training clips that such mixtures replace", 1.0)
    num_events: list[int] = setting("numbers of events of a mixture, equally frequent; 0 is a background alone", [0, 1, 2, 3, 4])
    overlap: Overlap = setting("together: at one instant all events sound; anywhere: their onsets are independent", "anywhere")
    memory_gb: float = setting("memory for decoded sounds and backgrounds; others are decoded again each time", 2.0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("sounds", "backgrounds"):
            object.__setattr__(self, name, [SourceSettings.of(source) for source in getattr(self, name)])
        if not 0 < self.fraction <= 1:
            raise UserError(f"mixing.fraction is {self.fraction:g}, but a fraction in (0, 1] is expected: for none leave sounds out")
        if not self.num_events or min(self.num_events) < 0 or len(set(self.num_events)) < len(self.num_events):
            raise UserError(f"mixing.num_events is {self.num_events}, but different numbers of at least 0 are expected")
        if self.backgrounds and not self.sounds:
            raise UserError("mixing.backgrounds is set, but mixing.sounds is empty: give sounds to mix")


class Mixer:
    """Makes mixtures: sounds and backgrounds are decoded once, and kept where they fit into memory.

    Args:
        settings: what is mixed, and how.
        extractor: of the model: a mixture is as long as its input.
        max_unreadable: largest fraction of unreadable files, above which a `UserError` is raised.
    """

    def __init__(self, settings: MixingSettings, extractor: SSLAMFeatureExtractor, max_unreadable: float):
        rules: dict[str, Any] = {rule.name: getattr(settings, rule.name) for rule in fields(MixingRules)}
        self.settings = settings
        length, shift = frame_geometry(extractor.sampling_rate)
        seconds = ((extractor.max_length - 1) * shift + length) / extractor.sampling_rate  # fills the model's input
        with as_user_error("the settings of mixing do not fit the model"):
            self.rules = MixtureSettings(**rules, sampling_rate=extractor.sampling_rate, clip_seconds=seconds)
        labelled = open_sounds(settings)
        sources = [source for rows in labelled for source in rows.sources]
        labels = [names for rows in labelled for names in rows.labels]
        self.waveforms = Waveforms(sources, extractor.sampling_rate, settings.memory_gb / 2, "decoding sounds")
        self.waveforms.check_unreadable(max_unreadable, "sound")
        self.backgrounds = open_backgrounds(settings.backgrounds, extractor.sampling_rate, settings.memory_gb / 2, max_unreadable)
        found = (find_sound(self.waveforms[i], i, labels[row][0], self.rules) for i, row in enumerate(self.waveforms.kept))
        self.sounds = [sound for sound in found if sound is not None]
        for count in settings.num_events:
            plan_mixture(self.sounds, self.rules, count, np.random.default_rng(0))  # an error comes now, and not in an epoch

    def __call__(self, generator: np.random.Generator) -> tuple[np.ndarray, list[Event]]:
        """A mixture `(samples,)`, float32, and its events in seconds."""
        count, rate = int(generator.choice(self.settings.num_events)), self.rules.sampling_rate
        mixture = plan_mixture(self.sounds, self.rules, count, generator)
        if len(self.backgrounds):
            mixture = replace(mixture, background=plan_background(self.backgrounds, self.rules, generator))
        waveform, _ = render(mixture, self.waveforms, self.backgrounds)
        return waveform, [Event(event.label, event.onset / rate, event.offset / rate) for event in mixture.events]


def open_sounds(settings: MixingSettings) -> list[LabelledRows]:
    """The sounds of each source, not decoded. Raises `UserError` if one has not exactly one label."""
    labelled = [read_rows(open_table(source), settings.label_column) for source in settings.sounds]
    for rows in labelled:
        for i, names in enumerate(rows.labels):
            if len(names) != 1:
                raise UserError(f"{rows.name(i)} has {len(names)} labels, but a single sound has one: leave it out of mixing.sounds")
    return labelled


def hash_mixing(settings: MixingSettings) -> str:
    """A hash of all sounds, their labels, and all backgrounds."""
    digest = hashlib.sha256()
    for rows in open_sounds(settings):
        digest.update(f"{rows.labels.digest()} {hash_audio(rows.sources)}\n".encode())
    for source in settings.backgrounds:
        digest.update(f"{hash_audio(AudioColumn(open_table(source)))}\n".encode())
    return digest.hexdigest()[:16]


__all__ = ["Mixer", "MixingSettings", "hash_mixing"]
