"""Methods that models inherit: vectors of many clips of any lengths, and scores of windows that slide over a recording of any length.

Memory grows with neither. A model is in eval mode while it computes, and as it was afterwards.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Number
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .configuration_sslam import SSLAMConfig
from .fbank import frame_geometry, num_frames
from .feature_extraction_sslam import SSLAMFeatureExtractor
from .windows_sslam import Audio, MergedSteps, Samples, Windowing, check_frames, checked_blocks, cut_into_windows


BATCHES_SORTED_TOGETHER = 16  # of clips to encode; all that a lazy sequence of clips has in memory at a time


class WindowScores(NamedTuple):
    """A batch of the windows that slide over a recording.

    Attributes:
        starts: `(windows,)`, where each begins, in seconds.
        scores: `(windows, classes)`, float32, in [0, 1]: sigmoid of tags, otherwise softmax over classes.
        embeddings: on request `(steps, hidden_size)`, float32, one every 160 ms: those that no later window adds to. All batches'
            together, in their order, are the recording's.
    """

    starts: np.ndarray
    scores: np.ndarray
    embeddings: np.ndarray | None


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
        embeddings: on request `(steps, hidden_size)`, one every 160 ms from the recording's start.
    """

    scores: np.ndarray
    starts: np.ndarray
    window: float
    duration: float
    sampling_rate: int
    classes: list[str]
    embeddings: np.ndarray | None = None

    @property
    def edges(self) -> np.ndarray:
        """`(windows + 1,)`, in seconds: between `edges[i]` and `edges[i + 1]` the centre of window `i` is the nearest one."""
        centres = self.starts + self.window / 2
        return np.concatenate(([0.0], (centres[1:] + centres[:-1]) / 2, [self.duration]))


class _Piece(NamedTuple):
    """A clip, or a part of one that is too long: its samples, the frames they hold, and the number of the clip."""

    samples: torch.Tensor
    frames: int
    clip: int


class SSLAMInferenceMixin(nn.Module):
    """What the mixins share."""

    config: SSLAMConfig

    def _features(self, feature_extractor: SSLAMFeatureExtractor, clips: list[torch.Tensor], frames: int, **options: Any) -> Any:
        """Log-mels of so many frames on the device of the first weights that lie on one: offloaded weights do not."""
        device = next((weights.device for weights in self.parameters() if weights.device.type != "meta"), torch.device("cpu"))
        rate = feature_extractor.sampling_rate
        return feature_extractor(clips, sampling_rate=rate, padding=frames, return_tensors="pt", device=device, **options)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Eval mode without gradients; afterwards every module is in the mode in which it was."""
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            for module in training:
                module.training = True

    def _not_finite(self, what: str) -> FloatingPointError:
        dtype = next(self.parameters()).dtype
        return FloatingPointError(f"{what} not finite: the model is damaged, or its dtype {dtype} is too narrow for it; try float32")


class SSLAMEncodingMixin(SSLAMInferenceMixin):
    """`encode`, for an encoder."""

    def encode(self, clips: Sequence[Samples], feature_extractor: SSLAMFeatureExtractor, *, batch_size: int = 16) -> torch.Tensor:
        """One vector a clip, as the model pools, each as if the clip had been encoded alone.

        Clips are read once, in their order, and sorted by length within each 16 batches, so that a sequence that decodes them when asked
        stays lazy. Padding is masked. A clip longer than the extractor's `max_length` is cut into pieces of that length without overlap,
        the last one shorter: its vector is their mean, weighted by their frames.

        Args:
            clips: waveforms `(samples,)` of any lengths, floats in [-1, 1], at the extractor's rate: a list, or anything that has a
                length and returns them by number.
            feature_extractor: the model's.
            batch_size: clips at a time.

        Returns:
            `(clips, hidden_size)`, float32, on the CPU.

        Raises:
            ValueError: if the extractor's length does not fit the model, or it rejects a clip, whose number the message has.
            FloatingPointError: if a vector is not finite.
        """
        _check_batch_size(batch_size)
        check_frames(self.config, feature_extractor, feature_extractor.max_length, "the feature extractor's max_length")
        total = torch.zeros(len(clips), self.config.hidden_size)
        weights = torch.zeros(len(clips), 1)

        def flush(pieces: list[_Piece]) -> None:
            pieces.sort(key=lambda piece: piece.frames)
            for first in range(0, len(pieces), batch_size):
                batch = pieces[first : first + batch_size]
                pooled = self._encode_batch(batch, feature_extractor)
                rows, frames = torch.tensor([piece.clip for piece in batch]), torch.tensor([[float(piece.frames)] for piece in batch])
                total.index_add_(0, rows, pooled * frames)
                weights.index_add_(0, rows, frames)

        pending: list[_Piece] = []
        for i in range(len(clips)):
            for piece in _pieces(feature_extractor, clips[i], i):
                pending.append(piece)
                if len(pending) == batch_size * BATCHES_SORTED_TOGETHER:
                    flush(pending)
                    pending = []
        flush(pending)
        if not total.isfinite().all():
            raise self._not_finite(f"the vector of clip {int((~total.isfinite()).any(1).nonzero()[0])} is")
        return total / weights

    def _encode_batch(self, batch: list[_Piece], feature_extractor: SSLAMFeatureExtractor) -> torch.Tensor:
        """`(pieces, hidden_size)`, float32, on the CPU, of pieces sorted by their frames."""
        unit = math.lcm(self.config.patch_size, feature_extractor.pad_to_multiple_of)
        frames = _padded_frames(batch[0].frames, batch[-1].frames, unit, feature_extractor.max_length)
        with self._inference():
            inputs = self._features(feature_extractor, [piece.samples for piece in batch], frames, return_attention_mask=True)
            mask = inputs.pop("attention_mask")
            # Attention is faster without a mask.
            outputs = self(**inputs, attention_mask=None if mask.all() else mask, return_dict=True)
            return outputs.pooler_output.float().cpu()


class SSLAMScoringMixin(SSLAMInferenceMixin):
    """`score_windows` and `score_over_time`, for a classifier."""

    sslam: Any

    def score_windows(
        self,
        audio: Audio,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        batch_size: int = 8,
        embeddings: bool = False,
        sampling_rate: int | None = None,
    ) -> Iterator[WindowScores]:
        """Score windows that slide over a recording, each as if it were a clip of its own, a batch at a time.

        Windows begin every `hop`, and the last one ends where the recording does. A recording shorter than a window is one, padded. Memory
        holds one batch and the samples that its windows span, if the recording comes in blocks and what is yielded is not kept. Between
        batches the model is as it was: threads may share one in eval mode.

        Frame embeddings are the mean over the frequency patches of the last hidden state. Where windows overlap they are averaged; steps
        without sound are left out. All windows then begin on their grid, so the last one ends up to 160 ms after the recording, padded.

        Compile a model for this by `model.compile()`: these methods do not use the forward pass of what `torch.compile(model)` returns.

        Args:
            audio: `(samples,)`, floats in [-1, 1], mono, at the extractor's rate; or an iterable of successive blocks of one, of any
                lengths, such as `audio.decode.read_blocks` gives.
            feature_extractor: the model's.
            hop: seconds from one window's start to the next one's; by default half a window, so that each moment is in two. With
                `embeddings` a multiple of 0.16 s, and no longer than a window.
            window: seconds, a multiple of 0.16; by default as many frames as the extractor gives. Its last frame needs 15 ms more.
            batch_size: windows at a time.
            embeddings: whether to give frame embeddings too.
            sampling_rate: of the audio in Hz, if it shall be checked.

        Raises:
            ValueError: if an argument is out of range, the model is a regression, or the audio is empty, not a finite mono waveform, too
                short or out of scale.
            FloatingPointError: if scores are not finite.
        """
        _check_batch_size(batch_size)
        kind, labels = self.config.problem_type, self.config.num_labels
        if kind == "regression" or (
            labels == 1 and kind != "multi_label_classification"
        ):  # one label alone means regression, as in training
            raise ValueError(
                f"config.problem_type is {kind!r} with {labels} labels, which is not a choice between classes: scores are of "
                "'single_label_classification' with two classes or more, or of 'multi_label_classification'"
            )
        if sampling_rate not in (None, feature_extractor.sampling_rate):
            raise ValueError(
                f"sampling_rate is {sampling_rate} Hz, but the model takes {feature_extractor.sampling_rate} Hz: resample the audio first, "
                "for example by reading it with transformers_sslam.audio.decode.read_blocks"
            )
        windowing = Windowing.of_model(self.config, feature_extractor, hop, window, embeddings)
        return self._score_windows(audio, feature_extractor, windowing, batch_size)

    def score_over_time(
        self,
        audio: Audio,
        feature_extractor: SSLAMFeatureExtractor,
        *,
        hop: float | None = None,
        window: float | None = None,
        batch_size: int = 8,
        embeddings: bool = False,
        sampling_rate: int | None = None,
    ) -> ScoresOverTime:
        """All that [`score_windows`] yields for a recording, in one piece; arguments and errors are the same."""
        rate, samples = feature_extractor.sampling_rate, 0

        def counted() -> Iterator[Samples]:
            nonlocal samples
            for block in checked_blocks(audio, rate):
                samples += len(block)
                yield block

        options: dict[str, Any] = {"hop": hop, "window": window, "batch_size": batch_size, "embeddings": embeddings}
        batches = list(self.score_windows(counted(), feature_extractor, sampling_rate=sampling_rate, **options))
        starts, scores = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("starts", "scores"))
        merged = np.concatenate([batch.embeddings for batch in batches if batch.embeddings is not None]) if embeddings else None
        length = Windowing.of_model(self.config, feature_extractor, hop, window, embeddings).length
        return ScoresOverTime(scores, starts, length / rate, samples / rate, rate, self.config.class_names, merged)

    def _score_windows(
        self, audio: Audio, feature_extractor: SSLAMFeatureExtractor, windowing: Windowing, batch_size: int
    ) -> Iterator[WindowScores]:
        rate = windowing.sampling_rate
        merged = None if windowing.step is None else MergedSteps(self.config.hidden_size)
        for starts, windows, is_last in cut_into_windows(checked_blocks(audio, rate), windowing, batch_size):
            with self._inference():
                inputs = self._features(feature_extractor, windows, windowing.frames)
                outputs = self(**inputs, output_hidden_states=merged is not None, return_dict=True)
                logits = outputs.logits.float()
                is_tags = self.config.problem_type == "multi_label_classification"
                scores = (logits.sigmoid() if is_tags else logits.softmax(1)).cpu().numpy()
                if not np.isfinite(scores).all():
                    raise self._not_finite(f"scores of windows that begin between {starts[0] / rate:.2f} and {starts[-1] / rate:.2f} s are")
                finished = None
                if merged is not None and windowing.step is not None:
                    grid = self.sslam.frame_embeddings(outputs.hidden_states[-1]).float().mean(2).cpu().numpy()
                    for start, window, steps in zip(starts, windows, grid):
                        sounding = -(-num_frames(len(window), rate) // self.config.patch_size)
                        merged.add(start // windowing.step, steps[:sounding])
                    finished = merged.take(all_of_them=is_last)
            yield WindowScores(np.array(starts) / rate, scores, finished)


def _pieces(feature_extractor: SSLAMFeatureExtractor, clip: Samples, index: int) -> Iterator[_Piece]:
    """Each frame of the clip is in one piece."""
    rate, most = feature_extractor.sampling_rate, feature_extractor.max_length
    if np.ndim(clip) == 0:
        what = "single number" if isinstance(clip, Number | Samples) else type(clip).__name__
        raise ValueError(f"clip {index} is a {what}: give a list of 1-D arrays, also for one clip")
    samples = feature_extractor._check_clip(clip, index, None)  # here, where its number among all clips is known
    frame, shift = frame_geometry(rate)
    for first in range(0, num_frames(len(samples), rate), most):
        piece = samples[first * shift : (first + most - 1) * shift + frame]
        yield _Piece(piece, num_frames(len(piece), rate), index)


def _padded_frames(shortest: int, longest: int, unit: int, most: int) -> int:
    """Frames that a batch is padded to, a multiple of `unit`: four lengths an octave, so that a compiled model meets few shapes.

    A batch whose clips all fill the same number of time steps is padded to that number: it needs no mask over tokens, and data of one
    length have one shape anyway.
    """
    if -(-shortest // unit) == -(-longest // unit):
        return -(-longest // unit) * unit
    bucket = unit * max(1, 2 ** max(0, (longest - 1).bit_length() - 3) // unit)
    return min(most, -(-longest // bucket) * bucket)


def _check_batch_size(batch_size: int) -> None:
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size is {batch_size!r}, but must be a whole number of at least 1")


__all__ = ["SSLAMEncodingMixin", "SSLAMScoringMixin", "ScoresOverTime", "WindowScores"]
