"""Methods that models of sound events inherit: scores of every class over time, and events, of a recording or of a live source."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from torch import nn

from .batching_sslam import check_batch_size
from .configuration_sslam import SSLAMConfig
from .events_sslam import Event, EventDecoder, EventOptions, EventSettings, in_order
from .fbank import frame_geometry
from .feature_extraction_sslam import SSLAMFeatureExtractor
from .inference_sslam import CountedBlocks, by_recording, check_sampling_rate
from .tasks_sslam import Detection, Steps
from .windows_sslam import Audio, Windowing


@dataclass(frozen=True)
class StepScores:
    """Scores of a recording over time.

    Attributes:
        scores: `(steps, classes)`, float32, in [0, 1]. Step `j` covers the seconds from `j * step` to `(j + 1) * step`.
        step: length of a time step in seconds.
        duration: of the recording in seconds.
        classes: their names.
    """

    scores: np.ndarray
    step: float
    duration: float
    classes: list[str]


class SSLAMDetectionMixin(nn.Module):
    """`score_steps`, `detect` and `detect_stream`, for a model that scores time steps."""

    config: SSLAMConfig

    def score_steps(
        self,
        audio: Audio,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        batch_size: int = 8,
        sampling_rate: int | None = None,
    ) -> StepScores:
        """Scores of every class in each time step of a recording, from which `events_sslam.find_events` makes events.

        Windows overlap; where they do, scores are their mean, weighted by sin^2 over each window, so that no window's edge is seen.
        Padding is masked. Of the audio, memory holds one batch and the samples that its windows span.

        Args:
            audio: `(samples,)`, floats in [-1, 1], mono, at the extractor's rate; or an iterable of successive blocks of one, of any
                lengths, such as `audio.read_blocks` gives. A list is rejected, because it might be several recordings.
            feature_extractor: the model's.
            hop: seconds from one window's start to the next one's, a multiple of 0.16; by default half a window.
            window: seconds, a multiple of 0.16; by default as many frames as the extractor gives.
            batch_size: windows at a time.
            sampling_rate: of the audio in Hz, if it shall be checked.

        Raises:
            ValueError: if an argument is out of range, or the audio is empty, not a finite mono waveform, too short or out of scale.
            FloatingPointError: if scores are not finite.
        """
        task = self._detection(feature_extractor, hop, window, batch_size, sampling_rate)
        blocks = CountedBlocks(audio, feature_extractor.sampling_rate)
        scores = torch.cat([steps.values for steps in self._steps(task, blocks, batch_size)]).numpy()
        return StepScores(scores, self._step, blocks.samples / blocks.sampling_rate, self.config.class_names)

    def detect(
        self,
        audio: Audio,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        batch_size: int = 8,
        sampling_rate: int | None = None,
        **settings: Unpack[EventOptions],
    ) -> list[Event]:
        """Which sounds are in a recording, from when to when: events by their starts, then in the order of the classes.

        Args:
            audio, feature_extractor, hop, window, batch_size, sampling_rate: see [`score_steps`], as for errors.
            settings: `threshold`, `onset_threshold`, `median_filter`, `change_filter`, `max_gap`, `min_duration`: fields of
                `events_sslam.EventSettings`. Those that are left out or `None` are as in `config.event_detection`.
        """
        events = self.detect_stream(
            audio, feature_extractor, hop=hop, window=window, batch_size=batch_size, sampling_rate=sampling_rate, **settings
        )
        return in_order(events, self.config.class_names)

    def detect_stream(
        self,
        audio: Audio,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        batch_size: int = 1,
        sampling_rate: int | None = None,
        **settings: Unpack[EventOptions],
    ) -> Iterator[Event]:
        """The events that [`detect`] finds, of a live source, each as soon as it is final.

        The scores of a step are final when no later window holds it: at most a window and a hop after it. Half the median filter and the
        longest gap that is closed are added. So with windows of 10 s and hops of 5 s an event comes at most 15 s after its end. A `window`
        of 1.92 s with a `hop` of 0.16 s makes it 2 s, at the cost of context and of more computation. A change filter adds minutes: if the
        model has one, give `change_filter=0`. [`detection_delay`] has the figure for any settings. Events come in the order in which they
        become final, not in that of their starts.

        Args:
            audio: an iterable of successive blocks, such as a generator that reads a microphone. The length of a block adds to the delay.
            batch_size: windows at a time: the first one of a batch waits for the last one.
            feature_extractor, hop, window, sampling_rate, settings: see [`detect`]. They are checked before any audio is read.
        """
        task = self._detection(feature_extractor, hop, window, batch_size, sampling_rate)
        decoder = EventDecoder(self.config.class_names, self._step, EventSettings.of(self.config, **settings))
        return self._events(task, audio, batch_size, decoder)

    def detection_delay(
        self,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        batch_size: int = 1,
        **settings: Unpack[EventOptions],
    ) -> float:
        """Seconds of audio after the end of an event until [`detect_stream`] yields it, at most.

        The length of a block and the time for computing are to be added. With both `onset_threshold` and `max_gap` it may be longer: see
        `events_sslam.EventDecoder`.
        """
        windowing = self._detection(feature_extractor, hop, window, batch_size, None).windowing
        rate = windowing.sampling_rate
        # A window is cut when one more frame has arrived: before, it might be the last one. A step may have begun just after a window, and
        # so wait for the next one, and that for all of its batch.
        waiting = (batch_size * windowing.hop + windowing.length + frame_geometry(rate)[1]) / rate
        return EventDecoder(self.config.class_names, self._step, EventSettings.of(self.config, **settings)).delay + waiting - 2 * self._step

    @property
    def _step(self) -> float:
        return self.config.frames_per_step / 100

    def _detection(
        self, feature_extractor: SSLAMFeatureExtractor, hop: float | None, window: float | None, batch_size: int, sampling_rate: int | None
    ) -> Detection:
        check_batch_size(batch_size)
        check_sampling_rate(feature_extractor, sampling_rate)
        windowing = Windowing.of_model(self.config, feature_extractor, hop=hop, window=window, per="step")
        return Detection(self.config, feature_extractor, windowing)

    def _steps(self, task: Detection, audio: Audio, batch_size: int) -> Iterator[Steps]:
        for _, results in by_recording(task, self, task.windows("the audio", audio), batch_size):
            yield from task.steps(results)

    def _events(self, task: Detection, audio: Audio, batch_size: int, decoder: EventDecoder) -> Iterator[Event]:
        blocks = CountedBlocks(audio, task.windowing.sampling_rate)
        for steps in self._steps(task, blocks, batch_size):
            yield from decoder.push(steps.values)
        yield from decoder.finish(blocks.samples / blocks.sampling_rate)
