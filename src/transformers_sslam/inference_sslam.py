"""Methods that models inherit: embeddings of many clips of any lengths, and scores of windows that slide over a recording.

Memory grows with neither. A model is in eval mode while it computes, and as it was afterwards.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, islice
from numbers import Number
from os import PathLike
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn

from .batching_sslam import Windows, check_batch_size, compute_batches, prepare_batches
from .configuration_sslam import SSLAMConfig
from .feature_extraction_sslam import SSLAMFeatureExtractor, reject_two_rows
from .tasks_sslam import Embedding, Per, Pooling, Scoring, Task, first_device
from .windows_sslam import Audio, Samples, Windowing, checked_blocks


class WindowScores(NamedTuple):
    """A batch of the windows that slide over a recording.

    Attributes:
        starts: `(windows,)`, where each begins, in seconds.
        scores: `(windows, classes)`, float32, in [0, 1]: sigmoid of tags, otherwise softmax over classes.
    """

    starts: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class ScoresOverTime:
    """Scores of windows that slide over a recording.

    Attributes:
        scores: `(windows, classes)` in [0, 1]: sigmoid of tags, otherwise softmax over classes.
        starts: `(windows,)`, where each begins, in seconds.
        window: length of a window in seconds. A recording that is shorter has one, padded.
        duration: of the recording in seconds.
        sampling_rate: of the recording in Hz.
        classes: their names.
    """

    scores: np.ndarray
    starts: np.ndarray
    window: float
    duration: float
    sampling_rate: int
    classes: list[str]

    @property
    def edges(self) -> np.ndarray:
        """`(windows + 1,)`, in seconds: between `edges[i]` and `edges[i + 1]` the centre of window `i` is the nearest one."""
        centres = self.starts + self.window / 2
        return np.concatenate(([0.0], (centres[1:] + centres[:-1]) / 2, [self.duration]))


class EmbeddingsOverTime(NamedTuple):
    """Vectors of a clip's windows or time steps.

    Attributes:
        vectors: `(n, width)`, float32.
        starts, ends: `(n,)`, in seconds.
    """

    vectors: torch.Tensor
    starts: np.ndarray
    ends: np.ndarray


class SSLAMEncodingMixin(nn.Module):
    """`encode`, for an encoder."""

    config: SSLAMConfig

    def encode(
        self,
        clips: Sequence[Audio],
        feature_extractor: SSLAMFeatureExtractor,
        *,
        per: Per = "clip",
        layers: Sequence[int] = (-1,),
        pooling: Pooling | None = None,
        window: float | None = None,
        hop: float | None = None,
        batch_size: int = 16,
        sampling_rate: int | None = None,
    ) -> torch.Tensor | list[EmbeddingsOverTime]:
        """Embeddings of clips, or of their windows or time steps, each as if the clip had been encoded alone.

        Clips are read once, in their order, and a sequence that decodes them when asked stays lazy. Padding is masked. A clip longer
        than a window is cut into windows that do not overlap; the last one is shorter. Its mean is that of the windows, weighted by their
        frames (also of the CLS token); standard deviation and maximum are those of all its patches. Of a time step there is the mean over
        the windows that hold it.

        Args:
            clips: waveforms `(samples,)` of any lengths, floats in [-1, 1], at the extractor's rate, or iterables of a long recording's
                successive blocks: a list, or anything that has a length and returns them by number. An array of two rows is rejected,
                because it might be stereo.
            feature_extractor: the model's.
            per: a vector for each `"clip"`, for each `"window"`, or for each time `"step"` of 160 ms.
            layers: whose outputs are taken, and concatenated: -1 for the last one, 0 for the input of the first.
            pooling: of clips and windows `"cls"`, `"mean"`, `"mean_and_std"`, `"max_by_frequency"` or `"mean_and_max_by_frequency"`, see
                [`SSLAMConfig`], by default the model's `config.classifier_pooling`; of a time step the `"mean"` of its patches, by default,
                or all its `"patches"`, from low to high frequencies, concatenated.
            window: length of a window in seconds, a multiple of 0.16; by default the extractor's `max_length`.
            hop: seconds from one window's start to the next one's; by default half a window. The last window ends where the clip does
                or, for time steps, holds its last frame.
            batch_size: windows at a time.
            sampling_rate: of the clips in Hz, if it shall be checked.

        Returns:
            `(clips, width)`, float32, on the CPU; for windows and time steps a list with vectors and their times for each clip. `width` is
            `hidden_size` times the number of layers, twice that with `"mean_and_std"`, and 8 times with `"max_by_frequency"` and
            `"patches"`.

        Raises:
            ValueError: if an argument is out of range, or a clip is not a finite mono waveform; the message has its number.
            FloatingPointError: if a vector is not finite.
        """
        check_batch_size(batch_size)
        check_sampling_rate(feature_extractor, sampling_rate)
        if isinstance(clips, Samples):
            if clips.ndim < 2:
                raise ValueError(f"clips is an array of shape {tuple(clips.shape)}: give a list of 1-D arrays, also for one clip")
            reject_two_rows(clips)
        if isinstance(clips, str | bytes | PathLike | Mapping) or not (hasattr(clips, "__len__") and hasattr(clips, "__getitem__")):
            raise ValueError(
                f"clips is a {type(clips).__name__}, but a list of waveforms is expected, or what has a length and returns them by number: "
                "read a file with transformers_sslam.audio.load_waveform, and make a list of what a generator yields"
            )
        windowing = Windowing.of_model(self.config, feature_extractor, hop=hop, window=window, per=per)
        task = Embedding(self.config, feature_extractor, windowing, per, layers, pooling)
        windows = chain.from_iterable(task.windows(f"clip {i}", _checked_clip(feature_extractor, clips[i], i)) for i in range(len(clips)))
        found = [list(task.rows(results)) for _, results in by_recording(task, self, windows, batch_size)]
        if per == "clip":
            none = torch.zeros(0, task.width, dtype=torch.float32, device="cpu")
            return torch.stack([values for [(_, _, values)] in found]) if found else none
        over_time = []
        for rows in found:
            starts, ends, vectors = zip(*rows)
            over_time.append(EmbeddingsOverTime(torch.stack(vectors), np.array(starts), np.array(ends)))
        return over_time


class SSLAMScoringMixin(nn.Module):
    """`score_windows` and `score_over_time`, for a model that scores clips."""

    config: SSLAMConfig
    scoring: ClassVar[type[Scoring]] = Scoring

    def score_windows(
        self,
        audio: Audio,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        batch_size: int = 8,
        sampling_rate: int | None = None,
    ) -> Iterator[WindowScores]:
        """Score windows that slide over a recording, each as if it were a clip of its own, a batch at a time.

        Windows begin every `hop`, and the last one ends where the recording does. A recording shorter than a window is one, padded. Memory
        holds one batch and the samples that its windows span, if the recording comes in blocks and what is yielded is not kept. Between
        batches the model is as it was: threads may share one in eval mode.

        Compile a model for this by `model.compile()`: these methods do not use the forward pass of what `torch.compile(model)` returns.

        Args:
            audio: `(samples,)`, floats in [-1, 1], mono, at the extractor's rate; or an iterable of successive blocks of one, of any
                lengths, such as `audio.read_blocks` gives. A list is rejected, because it might be several recordings.
            feature_extractor: the model's.
            hop: seconds from one window's start to the next one's; by default half a window, so that each moment is in two.
            window: seconds, a multiple of 0.16; by default as many frames as the extractor gives. Its last frame needs 15 ms more.
            batch_size: windows at a time.
            sampling_rate: of the audio in Hz, if it shall be checked.

        Raises:
            ValueError: if an argument is out of range, the model is a regression, or the audio is empty, not a finite mono waveform, too
                short or out of scale.
            FloatingPointError: if scores are not finite.
        """
        check_batch_size(batch_size)
        check_sampling_rate(feature_extractor, sampling_rate)
        windowing = Windowing.of_model(self.config, feature_extractor, hop=hop, window=window)
        task = self.scoring(self.config, feature_extractor, windowing)
        return self._score_windows(task, audio, batch_size)

    def _score_windows(self, task: Scoring, audio: Audio, batch_size: int) -> Iterator[WindowScores]:
        for _, results in by_recording(task, self, task.windows("the audio", audio), batch_size):
            rows = task.rows(results)
            while batch := list(islice(rows, batch_size)):
                yield WindowScores(np.array([row.start for row in batch]), torch.stack([row.values for row in batch]).numpy())

    def score_over_time(
        self,
        audio: Audio,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        batch_size: int = 8,
        sampling_rate: int | None = None,
    ) -> ScoresOverTime:
        """All that [`score_windows`] yields for a recording, in one piece; arguments and errors are the same."""
        check_sampling_rate(feature_extractor, sampling_rate)
        rate = feature_extractor.sampling_rate
        blocks = CountedBlocks(audio, rate)
        options: dict[str, Any] = {"hop": hop, "window": window, "batch_size": batch_size}
        batches = list(self.score_windows(blocks, feature_extractor, sampling_rate=sampling_rate, **options))
        starts, scores = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("starts", "scores"))
        length = Windowing.of_model(self.config, feature_extractor, hop=hop, window=window).length
        return ScoresOverTime(scores, starts, length / rate, blocks.samples / rate, rate, self.config.class_names)


def by_recording(task: Task, model: nn.Module, windows: Windows, batch_size: int) -> Iterator[tuple[Any, Iterator[Any]]]:
    """Each recording, with the results of its windows as they are computed."""
    features = partial(task.features, device=first_device(model))
    batches = prepare_batches(windows, features, batch_size, task.sorted_batches)
    results: Iterator[Any] = compute_batches(batches, partial(task.compute, model))
    yield from groupby(results, key=lambda result: result[0].recording)


def check_sampling_rate(feature_extractor: SSLAMFeatureExtractor, sampling_rate: int | None) -> None:
    """Raise a ValueError unless the extractor is one of this model's kind, and the rate its own, or `None`."""
    if not hasattr(feature_extractor, "scaled_padding_value"):  # not by its class: code beside a model has a class of the same name
        raise ValueError(
            f"feature_extractor is a {type(feature_extractor).__name__}, but the model's SSLAMFeatureExtractor is expected: load it with "
            "AutoFeatureExtractor.from_pretrained(...)"
        )
    if sampling_rate not in (None, feature_extractor.sampling_rate):
        raise ValueError(
            f"sampling_rate is {sampling_rate} Hz, but the model takes {feature_extractor.sampling_rate} Hz: resample the audio first, "
            "for example by reading it with transformers_sslam.audio.read_blocks"
        )


class CountedBlocks:
    """The blocks of a recording, checked, and how many samples have been read."""

    def __init__(self, audio: Audio, sampling_rate: int):
        self.audio, self.sampling_rate = audio, sampling_rate
        self.samples = 0

    def __iter__(self) -> Iterator[Samples]:
        for block in checked_blocks(self.audio, self.sampling_rate):
            self.samples += len(block)
            yield block


def _checked_clip(feature_extractor: SSLAMFeatureExtractor, clip: Audio, index: int) -> Audio:
    """A clip, or the blocks of one. A ValueError about an array has its number among the clips."""
    if isinstance(clip, str | bytes | PathLike):
        raise ValueError(f"clip {index} is the path {str(clip)!r}, not a waveform: read it with transformers_sslam.audio.load_waveform")
    if (isinstance(clip, Samples) and clip.ndim) or isinstance(clip, Sequence):
        return feature_extractor._check_clip(clip, index, None)
    if isinstance(clip, Samples | Mapping) or not isinstance(clip, Iterable):
        what = "single number" if isinstance(clip, Number | Samples | np.generic) else type(clip).__name__
        raise ValueError(f"clip {index} is a {what}: give a list of 1-D arrays, also for one clip")
    return clip
