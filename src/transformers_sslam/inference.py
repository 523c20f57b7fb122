"""Inference on recordings of any length and on many clips, in memory that does not grow with either.

A recording is cut into windows that slide over it, and arrives as one array or in blocks, of which only what the next windows need is
held. Clips of any lengths are encoded in batches of similar lengths. The models' methods of the same names call these functions.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .fbank import frame_geometry, num_frames


if TYPE_CHECKING:
    from .feature_extraction_sslam import SSLAMFeatureExtractor
    from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel

Block = np.ndarray | torch.Tensor
Audio = Block | Iterable[Block]
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


@dataclass(frozen=True)
class Windowing:
    """How windows lie over a recording, in samples.

    Attributes:
        length: of a window.
        hop: from one window's start to the next one's.
        frames: of a window's log-mel.
        step: of the grid of frame embeddings (160 ms), on which all windows then begin; `None`: the last one begins anywhere.
        sampling_rate: in Hz.
    """

    length: int
    hop: int
    frames: int
    step: int | None
    sampling_rate: int

    def last_start(self, samples: int) -> int:
        """Where the last window begins: so that it ends where the recording does, or, on the grid, so that it holds the last frame."""
        if self.step is None:
            return max(0, samples - self.length)
        shift = frame_geometry(self.sampling_rate)[1]
        left = num_frames(samples, self.sampling_rate) - self.frames
        return max(0, -(-left * shift // self.step) * self.step)

    def starts(self, samples: int, first: int = 0) -> list[int]:
        """Where the windows of a recording of so many samples begin, from the one at `first` on: every `hop`, and the last one."""
        last = self.last_start(samples)
        return [*range(first, last, self.hop), last]


def score_windows(
    model: "SSLAMForAudioClassification",
    audio: Audio,
    feature_extractor: "SSLAMFeatureExtractor",
    *,
    hop: float | None = None,
    window: float | None = None,
    batch_size: int = 8,
    embeddings: bool = False,
    sampling_rate: int | None = None,
) -> Iterator[WindowScores]:
    """Score windows that slide over a recording, each as if it were a clip of its own, a batch at a time.

    Windows begin every `hop`, and the last one ends where the recording does. A recording shorter than a window is one, padded, as the
    pipeline pads a clip. Memory holds one batch and the samples that its windows span, however long the recording is, if it comes in
    blocks and what is yielded is not kept. While a batch is computed the model is in eval mode, and as it was between batches: threads may
    share one that is in eval mode already.

    Frame embeddings are the mean over the frequency patches of the last hidden state. Where windows overlap they are averaged; steps that
    hold no sound are left out. For their sake all windows begin on their grid, so the last one ends up to 160 ms after the recording and
    is padded.

    Args:
        model: the classifier.
        audio: `(samples,)`, floats in [-1, 1], mono, at the extractor's rate; or an iterable of successive blocks of one, of any lengths,
            such as `audio.decode.read_blocks` gives.
        feature_extractor: the model's.
        hop: seconds from one window's start to the next one's; by default half a window, so that each moment is heard in two. With
            `embeddings` a multiple of 0.16 s, and no longer than a window.
        window: seconds, a multiple of 0.16; by default as many frames as the extractor gives. Its last frame needs 15 ms more.
        batch_size: windows at a time.
        embeddings: whether to give frame embeddings too.
        sampling_rate: of the audio in Hz, if it shall be checked.

    Raises:
        ValueError: if an argument is out of range, the model gives no scores of classes (regression), the audio is empty, no mono
            waveform or not finite, or the extractor refuses a window (too short, out of scale).
        FloatingPointError: if scores are not finite.
    """
    _check_batch_size(batch_size)
    to_scores = _to_scores(model)
    if sampling_rate not in (None, feature_extractor.sampling_rate):
        raise ValueError(
            f"sampling_rate is {sampling_rate} Hz, but the model hears {feature_extractor.sampling_rate} Hz: resample the audio first, for "
            "example by reading it with transformers_sslam.audio.decode.read_blocks"
        )
    windowing = _windowing(model, feature_extractor, hop, window, embeddings)
    return _score_windows(model, audio, feature_extractor, windowing, batch_size, to_scores)


def score_over_time(
    model: "SSLAMForAudioClassification",
    audio: Audio,
    feature_extractor: "SSLAMFeatureExtractor",
    *,
    hop: float | None = None,
    window: float | None = None,
    batch_size: int = 8,
    embeddings: bool = False,
    sampling_rate: int | None = None,
) -> ScoresOverTime:
    """All that `score_windows` yields for a recording, which takes the same arguments, in one piece."""
    rate, samples = feature_extractor.sampling_rate, 0

    def counted() -> Iterator[Block]:
        nonlocal samples
        for block in _blocks(audio):
            samples += len(block)
            yield block

    options: dict[str, Any] = {"hop": hop, "window": window, "batch_size": batch_size, "embeddings": embeddings}
    batches = list(score_windows(model, counted(), feature_extractor, sampling_rate=sampling_rate, **options))
    starts, scores = (np.concatenate([getattr(batch, name) for batch in batches]) for name in ("starts", "scores"))
    merged = np.concatenate([batch.embeddings for batch in batches if batch.embeddings is not None]) if embeddings else None
    length = _windowing(model, feature_extractor, hop, window, embeddings).length
    return ScoresOverTime(scores, starts, length / rate, samples / rate, rate, class_names(model), merged)


def encode(
    model: "SSLAMModel", clips: Sequence[Block], feature_extractor: "SSLAMFeatureExtractor", *, batch_size: int = 16
) -> torch.Tensor:
    """One vector a clip, as the model pools, each as if the clip had been encoded alone.

    Clips are read once, in their order, and sorted by length within each 16 batches, so that a sequence that decodes them when asked
    stays lazy. A batch is padded to its longest clip, or a little more so that few shapes arise, and what is padded is masked. A clip
    longer than the extractor's `max_length` is cut into pieces of that length without overlap, the last one shorter: its vector is their
    mean, weighted by their frames.

    Args:
        model: the encoder, which is in eval mode meanwhile and as it was afterwards.
        clips: waveforms `(samples,)` of any lengths, floats in [-1, 1], at the extractor's rate: a list, or anything that has a length
            and gives them by number.
        feature_extractor: the model's.
        batch_size: clips at a time.

    Returns:
        `(clips, hidden_size)`, float32, on the CPU.

    Raises:
        ValueError: if `batch_size` is below 1, the extractor's length does not fit the model, or the extractor refuses a clip; the message
            has the clip's number.
        FloatingPointError: if a vector is not finite.
    """
    _check_batch_size(batch_size)
    _check_frames(model, feature_extractor, feature_extractor.max_length, "the feature extractor's max_length")
    total = torch.zeros(len(clips), model.config.hidden_size)
    weights = torch.zeros(len(clips), 1)

    def flush(pieces: list[_Piece]) -> None:
        pieces.sort(key=lambda piece: piece.frames)
        for first in range(0, len(pieces), batch_size):
            batch = pieces[first : first + batch_size]
            pooled = _encode_batch(model, feature_extractor, batch)
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
        raise FloatingPointError(
            f"the vector of clip {int((~total.isfinite()).any(1).nonzero()[0])} is not finite: the model is damaged, or its dtype "
            f"{model.dtype} is too narrow for it; try float32"
        )
    return total / weights


def class_names(model: "SSLAMForAudioClassification") -> list[str]:
    """Names of a classifier's classes, in the order of its scores."""
    names = {int(index): str(name) for index, name in (model.config.id2label or {}).items()}  # given as text, as JSON has them: "10" < "2"
    return [names[index] for index in sorted(names)]


# --- windows


def _score_windows(
    model: "SSLAMForAudioClassification",
    audio: Audio,
    feature_extractor: "SSLAMFeatureExtractor",
    windowing: Windowing,
    batch_size: int,
    to_scores: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[WindowScores]:
    rate = windowing.sampling_rate
    merged = None if windowing.step is None else _MergedSteps(model.config.hidden_size)
    for starts, windows, is_last in _cut(_checked(_blocks(audio), windowing), windowing, batch_size):
        with _inference(model):
            inputs = feature_extractor(
                windows, sampling_rate=rate, max_length=windowing.frames, return_tensors="pt", device=_input_device(model)
            )
            outputs = model(**inputs, output_hidden_states=merged is not None, return_dict=True)
            scores = to_scores(outputs.logits.float()).cpu().numpy()
            if not np.isfinite(scores).all():
                raise FloatingPointError(
                    f"scores of the windows that begin between {starts[0] / rate:.2f} and {starts[-1] / rate:.2f} s are NaN: the model is "
                    f"damaged, or its dtype {model.dtype} is too narrow for it; try float32"
                )
            finished = None
            if merged is not None and windowing.step is not None:
                grid = model.sslam.frame_embeddings(outputs.hidden_states[-1]).float().mean(2).cpu().numpy()
                for start, window, steps in zip(starts, windows, grid):
                    heard = -(-num_frames(len(window), rate) // model.config.patch_size)
                    merged.add(start // windowing.step, steps[:heard])
                finished = merged.take(all_of_them=is_last)
        yield WindowScores(np.array(starts) / rate, scores, finished)


def _cut(blocks: Iterable[torch.Tensor], windowing: Windowing, batch_size: int) -> Iterator[tuple[list[int], list[torch.Tensor], bool]]:
    """Batches of windows and where they begin, and whether a batch is the last, as soon as the samples of a whole batch are there.

    Held are the samples from the earliest window that may still come to the end of the last block.
    """
    held: list[torch.Tensor] = []
    first = samples = start = 0  # of what is held; of the recording so far; of the next window
    span = batch_size * windowing.hop

    def batch(starts: list[int]) -> tuple[list[int], list[torch.Tensor]]:
        held[:] = [torch.cat(held)]
        return starts, [held[0][s - first : s - first + windowing.length] for s in starts]

    for block in blocks:
        held.append(block)
        samples += len(block)
        while start + span - windowing.hop < windowing.last_start(samples):
            yield *batch([*range(start, start + span, windowing.hop)]), False
            start += span
            # The last window may begin before the next regular one, wherever the recording ends.
            kept = min(start, windowing.last_start(samples))
            held, first = [held[0][kept - first :]], kept
    if samples == 0:
        raise ValueError("the audio is empty: give at least one frame, 25 ms")
    yield *batch(windowing.starts(samples, start)), True


class _MergedSteps:
    """Means of frame embeddings over all windows that hold them, from the first step that a later window may still add to."""

    def __init__(self, hidden_size: int):
        self.first = 0  # step of the first row
        self.latest = 0  # step at which the latest window begins
        self.sums, self.counts = np.zeros((0, hidden_size), dtype=np.float32), np.zeros((0, 1), dtype=np.float32)

    def add(self, start: int, steps: np.ndarray) -> None:
        """A window's `(steps, hidden_size)`, the first of which is the recording's step `start`."""
        missing = max(0, start + len(steps) - self.first - len(self.sums))
        self.sums, self.counts = (np.pad(array, ((0, missing), (0, 0))) for array in (self.sums, self.counts))
        rows = slice(start - self.first, start - self.first + len(steps))
        self.sums[rows] += steps
        self.counts[rows] += 1
        self.latest = start

    def take(self, all_of_them: bool) -> np.ndarray:
        """`(steps, hidden_size)`, the means that are final, which are then no longer held."""
        final = len(self.sums) if all_of_them else self.latest + 1 - self.first  # windows begin in order, each at least a step later
        means = self.sums[:final] / self.counts[:final]
        self.sums, self.counts, self.first = self.sums[final:], self.counts[final:], self.first + final
        return means


def _windowing(
    model: "SSLAMForAudioClassification",
    feature_extractor: "SSLAMFeatureExtractor",
    hop: float | None,
    window: float | None,
    embeddings: bool,
) -> Windowing:
    rate, size = feature_extractor.sampling_rate, model.config.patch_size
    frame, shift = frame_geometry(rate)
    step = size * shift
    frames = feature_extractor.max_length
    if window is not None:
        frames = round(window * rate / step) * size if np.isfinite(window) else 0
        if frames < size or abs(frames * shift - window * rate) > 1:
            raise ValueError(f"window is {window} s, but must be a positive multiple of {step / rate:g} s, the model's time step")
    _check_frames(model, feature_extractor, frames, "the feature extractor's max_length" if window is None else f"a window of {window:g} s")
    if hop is None:
        hop = max(1, frames // size // 2) * step / rate
    if not (np.isfinite(hop) and round(hop * rate) >= 1):
        raise ValueError(f"hop is {hop} s, but must be at least one sample, {1 / rate:.2g} s")
    if embeddings and (round(hop * rate) % step or round(hop * rate) > frames * shift):
        raise ValueError(
            f"hop is {hop} s, but with frame embeddings it must be a multiple of {step / rate:g} s, the time from one to the next, and no "
            f"longer than a window, {frames * shift / rate:g} s"
        )
    return Windowing((frames - 1) * shift + frame, round(hop * rate), frames, step if embeddings else None, rate)


def _to_scores(model: "SSLAMForAudioClassification") -> Callable[[torch.Tensor], torch.Tensor]:
    kind = model.config.problem_type
    if kind == "multi_label_classification":
        return torch.sigmoid
    if kind == "regression" or model.config.num_labels == 1:  # which is regression where the configuration says nothing, as in training
        raise ValueError(
            f"config.problem_type is {kind!r} with {model.config.num_labels} labels, which is no choice between classes: scores are of "
            "'single_label_classification' with two classes or more, or of 'multi_label_classification'"
        )
    return lambda logits: logits.softmax(1)


# --- clips


class _Piece(NamedTuple):
    """A clip, or a part of one that is too long: its samples, the frames they hold, and the number of the clip."""

    samples: torch.Tensor
    frames: int
    clip: int


def _pieces(feature_extractor: "SSLAMFeatureExtractor", clip: Block, index: int) -> Iterator[_Piece]:
    """Each frame of the clip is in one piece."""
    rate, most = feature_extractor.sampling_rate, feature_extractor.max_length
    if np.ndim(clip) == 0:
        what = "single number" if isinstance(clip, Number | np.ndarray | torch.Tensor) else type(clip).__name__
        raise ValueError(f"clip {index} is a {what}: give a list of 1-D arrays, also where there is one clip only")
    samples = feature_extractor._check_clip(clip, index, None)  # here, where its number among all clips is known
    frame, shift = frame_geometry(rate)
    for first in range(0, num_frames(len(samples), rate), most):
        piece = samples[first * shift : (first + most - 1) * shift + frame]
        yield _Piece(piece, num_frames(len(piece), rate), index)


def _encode_batch(model: "SSLAMModel", feature_extractor: "SSLAMFeatureExtractor", batch: list[_Piece]) -> torch.Tensor:
    """`(pieces, hidden_size)`, float32, on the CPU."""
    with _inference(model):
        inputs = feature_extractor(
            [piece.samples for piece in batch],
            sampling_rate=feature_extractor.sampling_rate,
            max_length=_padded_frames(
                batch[0].frames,
                batch[-1].frames,
                math.lcm(model.config.patch_size, feature_extractor.pad_to_multiple_of),
                feature_extractor.max_length,
            ),
            return_attention_mask=True,
            return_tensors="pt",
            device=_input_device(model),
        )
        mask = inputs.pop("attention_mask")
        # Attention is faster without a mask.
        return model(**inputs, attention_mask=None if mask.all() else mask, return_dict=True).pooler_output.float().cpu()


def _padded_frames(shortest: int, longest: int, unit: int, most: int) -> int:
    """Frames that a batch is padded to, a multiple of `unit`: four lengths an octave, so that a compiled model meets few shapes.

    A batch whose clips all fill the same number of time steps gets just these: it needs no mask over tokens, and data of one length have
    one shape anyway.
    """
    if -(-shortest // unit) == -(-longest // unit):
        return -(-longest // unit) * unit
    bucket = unit * max(1, 2 ** max(0, (longest - 1).bit_length() - 3) // unit)
    return min(most, -(-longest // bucket) * bucket)


# --- both


def _blocks(audio: Audio) -> Iterator[Block]:
    """The blocks of a recording; an array is one, and what is longer than some seconds is handed on in parts, so that checks and copies
    take little memory."""
    most = 2**18
    for block in (audio,) if isinstance(audio, (np.ndarray, torch.Tensor)) else audio:
        if not isinstance(block, (np.ndarray, torch.Tensor)) or block.ndim != 1:
            shape = f"an array of shape {tuple(block.shape)}" if hasattr(block, "shape") else f"a {type(block).__name__}"
            raise ValueError(
                f"the audio, or a block of it, is {shape}, but a 1-D array of samples or an iterable of such arrays is expected: mix "
                "several channels down to one first"
            )
        for first in range(0, len(block), most):
            yield block[first : first + most]


def _checked(blocks: Iterable[Block], windowing: Windowing) -> Iterator[torch.Tensor]:
    """Blocks as float32 tensors of their own, because a producer may use its buffer again."""
    begin = 0
    for block in blocks:
        if isinstance(block, torch.Tensor):
            is_float, samples = block.is_floating_point(), block.detach().to(torch.float32, copy=True)
        else:
            is_float, samples = block.dtype.kind == "f", torch.from_numpy(np.array(block, dtype=np.float32))
        end, rate = begin + len(samples), windowing.sampling_rate
        if not is_float:
            raise ValueError(f"the audio has dtype {block.dtype}, but floats in [-1, 1] are expected: divide 16-bit integers by 32768")
        if not samples.isfinite().all():
            raise ValueError(
                f"the audio holds NaN or infinite samples between {begin / rate:.2f} and {end / rate:.2f} s: repair it or leave it out"
            )
        yield samples
        begin = end


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1")


def _check_frames(
    model: "SSLAMModel | SSLAMForAudioClassification", feature_extractor: "SSLAMFeatureExtractor", frames: int, name: str
) -> None:
    size, most = model.config.patch_size, model.config.max_length
    if not 0 < frames <= most or frames % size or frames % feature_extractor.pad_to_multiple_of:
        raise ValueError(
            f"{name} gives {frames} frames (10 ms each), but a positive multiple of {size} up to {most} is expected by this model: set the "
            "extractor's max_length, or give windows another length"
        )


def _input_device(model: torch.nn.Module) -> torch.device:
    """Where inputs go: to the first weights that lie on a device. Offloaded ones lie on none, and are fetched when they are needed."""
    return next((weights.device for weights in model.parameters() if weights.device.type != "meta"), torch.device("cpu"))


@contextmanager
def _inference(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


__all__ = ["ScoresOverTime", "WindowScores", "class_names", "encode", "score_over_time", "score_windows"]
