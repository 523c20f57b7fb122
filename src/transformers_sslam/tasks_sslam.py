"""What is computed of recordings: scores, or embeddings. Windows, their log-mels, the model's part, and what follows for a recording."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import nn

from .batching_sslam import Span, Windows
from .configuration_sslam import ClipPooling, SSLAMConfig
from .fbank import check_frame_shift, frame_geometry, num_frames
from .feature_extraction_sslam import SSLAMFeatureExtractor
from .pooling_sslam import merge_pooled, pool_tokens, pooled_width, sounding_tokens
from .windows_sslam import Audio, MergedSteps, Windowing, checked_blocks, cut_into_windows


Per = Literal["clip", "window", "step"]
Pooling = Literal[ClipPooling, "patches"]
Inputs = dict[str, torch.Tensor]


class Row(NamedTuple):
    """A result for a part of a recording: from `start` to `end`, in seconds, `values (width,)`, float32."""

    start: float
    end: float
    values: torch.Tensor


@dataclass(frozen=True)
class Task:
    """What is computed of recordings.

    Attributes:
        config, extractor: of the model.
        windowing: how recordings are cut.
    """

    config: SSLAMConfig
    extractor: SSLAMFeatureExtractor
    windowing: Windowing

    masks_padding: ClassVar[bool] = False

    @property
    def sorted_batches(self) -> int:
        """See [`prepare_batches`]."""
        return 1

    @property
    def width(self) -> int:
        """Of a row's values: by default a score for each class."""
        return len(self.config.class_names)

    def windows(self, recording: Any, audio: Audio) -> Windows:
        """The windows of a recording `(samples,)`, or of its blocks. `ValueError` as soon as it is not a finite mono waveform."""
        for start, samples in cut_into_windows(checked_blocks(audio, self.windowing.sampling_rate), self.windowing):
            yield Span(recording, start, len(samples)), samples

    def features(self, samples: list[torch.Tensor], device: torch.device | str = "cpu") -> Inputs:
        """A model's inputs on its device, of a batch of windows."""
        options: dict[str, Any] = {"sampling_rate": self.windowing.sampling_rate, "return_tensors": "pt", "device": device}
        inputs = self.extractor(samples, padding=self._frames(samples), return_attention_mask=self.masks_padding, **options)
        if self.masks_padding and inputs["attention_mask"].all():
            del inputs["attention_mask"]  # attention is faster without
        return dict(inputs)

    def compute(self, model: Any, inputs: Inputs) -> torch.Tensor:
        """The results of a batch of windows, float32, on the CPU."""
        raise TypeError(f"{type(self).__name__} computes nothing by itself: use Scoring, Embedding or Detection")

    def rows(self, results: Iterable[tuple[Span, torch.Tensor]]) -> Iterator[Row]:
        """What follows of the results of all windows of one recording; by default each window's own."""
        rate = self.windowing.sampling_rate
        for span, values in results:
            yield Row(span.start / rate, (span.start + span.length) / rate, values)

    def _frames(self, samples: list[torch.Tensor]) -> int:
        return self.windowing.frames


@dataclass(frozen=True)
class Scoring(Task):
    """Scores `(classes,)` of each window in [0, 1]: sigmoid of tags, otherwise softmax over classes."""

    def __post_init__(self):
        kind, labels = self.config.problem_type, self.config.num_labels
        if kind == "regression" or (labels == 1 and kind != "multi_label_classification"):  # one label means regression, as in training
            raise ValueError(
                f"config.problem_type is {kind!r} with {labels} labels, which is not a choice between classes: scores are of "
                "'single_label_classification' with two classes or more, or of 'multi_label_classification'"
            )

    def compute(self, model: Any, inputs: Inputs) -> torch.Tensor:
        with inference(model):
            logits = model(**inputs, return_dict=True).logits.float()
            is_tags = self.config.problem_type == "multi_label_classification"
            return (logits.sigmoid() if is_tags else logits.softmax(1)).cpu()


@dataclass(frozen=True)
class ClipScoring(Scoring):
    """Scores `(classes,)` of each window in [0, 1] by a detector of events: of the window as a clip."""

    masks_padding: ClassVar[bool] = True

    def __post_init__(self):
        pass  # each class has a sigmoid of its own, one class too

    def compute(self, model: Any, inputs: Inputs) -> torch.Tensor:
        with inference(model):
            return model(**inputs, return_dict=True).clip_logits.float().sigmoid().cpu()


@dataclass(frozen=True)
class Embedding(Task):
    """Vectors of each clip, window, or time step of 160 ms.

    Attributes:
        per: which of these.
        layers: whose outputs are taken, and concatenated: -1 for the last one, 0 for the input of the first.
        pooling: of a clip or window, as `config.classifier_pooling`; of a time step, the mean of its patches, or all `"patches"`,
            concatenated. `None`: as the model pools, and of a time step the mean.
    """

    per: Per = "clip"
    layers: Sequence[int] = (-1,)
    pooling: Pooling | None = None

    masks_padding: ClassVar[bool] = True

    def __post_init__(self):
        depth = self.config.num_hidden_layers
        for name, value, kinds in (("per", self.per, get_args(Per)), ("pooling", self.pooling, (None, *get_args(Pooling)))):
            if value not in kinds:
                raise ValueError(f"{name} is {value!r}, but one of {', '.join(map(repr, kinds))} is expected")
        is_list = isinstance(self.layers, Iterable) and not isinstance(self.layers, str)
        layers = list(self.layers) if is_list else []
        if not layers or any(isinstance(one, bool) or not isinstance(one, Integral) or not -depth - 1 <= one <= depth for one in layers):
            raise ValueError(
                f"layers is {layers if is_list else self.layers!r}, but numbers from {-depth - 1} to {depth} are expected, in a list: "
                "0 for the input of the first layer, -1 for the output of the last one"
            )
        if self.pooling == "patches" and self.per != "step":
            what = "all patches are kept of a time step only"
        elif self.per == "step" and self.pooling not in (None, "mean", "patches"):
            what = "a time step has the 'mean' of its patches, or all 'patches'"
        else:
            return
        raise ValueError(f"pooling is {self.pooling!r} and per is {self.per!r}, but {what}: set one of them to another value")

    @property
    def sorted_batches(self) -> int:
        return 16 if self.per == "clip" else 1

    @property
    def width(self) -> int:
        if self.per == "step":
            patches = self.config.num_frequency_patches if self.pooling == "patches" else 1
            return len(self.layers) * patches * self.config.hidden_size
        return len(self.layers) * pooled_width(self._clip_pooling, self.config)

    @property
    def _clip_pooling(self) -> ClipPooling:
        """Of a clip or window."""
        return self.pooling or self.config.classifier_pooling  # type: ignore[return-value]  # not 'patches', which is of steps

    def _frames(self, samples: list[torch.Tensor]) -> int:
        if self.per != "clip":
            return self.windowing.frames
        frames = [num_frames(len(window), self.windowing.sampling_rate) for window in samples]
        unit = math.lcm(self.config.patch_size, self.extractor.pad_to_multiple_of)
        return _padded_frames(min(frames), max(frames), unit, self.windowing.frames)

    def compute(self, model: Any, inputs: Inputs) -> torch.Tensor:
        with inference(model):
            inner = any(layer not in (-1, self.config.num_hidden_layers) for layer in self.layers)
            outputs = model(**inputs, output_hidden_states=inner, return_dict=True)
            tokens = [outputs.hidden_states[layer] if inner else outputs.last_hidden_state for layer in self.layers]
            mask = inputs.get("attention_mask")
            return torch.cat([self._pool(model, one.float(), mask) for one in tokens], dim=-1).cpu()

    def _pool(self, model: Any, tokens: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`(batch, 1 + patches, hidden_size)` -> `(batch, width)`, or `(batch, steps, width)`."""
        if self.per == "step":
            patches = model.frame_embeddings(tokens)  # (batch, time, frequency, hidden_size)
            return patches.flatten(2) if self.pooling == "patches" else patches.mean(2)
        frequencies = self.config.num_frequency_patches
        token_mask = None if mask is None else sounding_tokens(mask.bool(), self.config.patch_size, frequencies)
        return pool_tokens(tokens, token_mask, self._clip_pooling, frequencies)

    def rows(self, results: Iterable[tuple[Span, torch.Tensor]]) -> Iterator[Row]:
        if self.per == "window":
            return super().rows(results)
        return self._merged(results) if self.per == "clip" else self._steps(results)

    def _merged(self, results: Iterable[tuple[Span, torch.Tensor]]) -> Iterator[Row]:
        """A clip's windows together, weighted by their frames; in float64, as there may be many."""
        rate, count, samples = self.windowing.sampling_rate, 0, 0
        merged: torch.Tensor | None = None
        for span, values in results:
            frames, vectors = num_frames(span.length, rate), values.double().unflatten(0, (len(self.layers), -1))
            count, samples = count + frames, span.start + span.length
            merged = vectors if merged is None else merge_pooled(merged, vectors, frames / count, self._clip_pooling, self.config)
        if merged is not None:
            yield Row(0.0, samples / rate, merged.flatten().float())

    def _steps(self, results: Iterable[tuple[Span, torch.Tensor]]) -> Iterator[Row]:
        return rows_of_steps(merged_steps(results, self.windowing, self.config.patch_size), self.windowing.sampling_rate)


@dataclass(frozen=True)
class Detection(Task):
    """Scores `(classes,)` in [0, 1] of each time step of `config.frames_per_step` frames, independent of each other: sigmoid.

    Where windows overlap there is their mean, weighted by sin^2 over each window (a Hann window without its zeros), so that the scores of
    a window's edges, where the model knows one side only, count little, and fade in and out.
    """

    masks_padding: ClassVar[bool] = True

    def __post_init__(self):
        if self.windowing.grid is None:
            raise ValueError("windows of time steps begin on the model's grid: make them by Windowing.of_model(..., per='step')")
        check_frame_shift(self.windowing.sampling_rate)

    def compute(self, model: Any, inputs: Inputs) -> torch.Tensor:
        with inference(model):
            return model(**inputs, return_dict=True).logits.float().sigmoid().cpu()

    def steps(self, results: Iterable[tuple[Span, torch.Tensor]]) -> "Iterator[Steps]":
        """The scores of a recording, as soon as no later window adds to them."""
        count = self.windowing.frames // self.config.frames_per_step
        weights = torch.sin(math.pi * (torch.arange(count, dtype=torch.float32, device="cpu") + 0.5) / count) ** 2
        return merged_steps(results, self.windowing, self.config.frames_per_step, weights)

    def rows(self, results: Iterable[tuple[Span, torch.Tensor]]) -> Iterator[Row]:
        return rows_of_steps(self.steps(results), self.windowing.sampling_rate)


class Steps(NamedTuple):
    """Successive time steps of a recording.

    Attributes:
        first: the number of the first one.
        values: `(steps, width)`.
        length: of a step, in samples.
        known: how many samples of the recording the windows so far cover: at last all.
    """

    first: int
    values: torch.Tensor
    length: int
    known: int


def merged_steps(
    results: Iterable[tuple[Span, torch.Tensor]], windowing: Windowing, frames_per_step: int, weights: torch.Tensor | None = None
) -> Iterator[Steps]:
    """The mean of each time step of a recording over the windows that hold it, as soon as no later window adds to it.

    Args:
        results: of all windows of one recording, `(steps, width)` each.
        windowing: how it was cut.
        frames_per_step: frames (10 ms) of a time step.
        weights: of each step of a window; equal by default.
    """
    rate, merged, known = windowing.sampling_rate, MergedSteps(), 0
    step = frames_per_step * frame_geometry(rate)[1]

    def final(all_of_them: bool = False) -> Steps:
        first = merged.first
        return Steps(first, merged.take(all_of_them), step, known)

    for span, steps in results:
        known = span.start + span.length
        sounding = -(-num_frames(span.length, rate) // frames_per_step)
        merged.add(span.start // step, steps[:sounding], None if weights is None else weights[:sounding])
        yield final()
    yield final(all_of_them=True)


def rows_of_steps(results: Iterable[Steps], sampling_rate: int) -> Iterator[Row]:
    """A row for each time step."""
    for first, steps, length, known in results:
        for i, values in enumerate(steps, first):
            yield Row(i * length / sampling_rate, min((i + 1) * length, known) / sampling_rate, values)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def first_device(model: nn.Module) -> torch.device:
    """Of the first weights that lie on one: offloaded weights do not."""
    return next((weights.device for weights in model.parameters() if weights.device.type != "meta"), torch.device("cpu"))


def _padded_frames(shortest: int, longest: int, unit: int, most: int) -> int:
    """Frames that a batch is padded to, a multiple of `unit`: four lengths an octave, so that a compiled model meets few shapes.

    A batch whose clips all fill the same number of time steps is padded to that number: it needs no mask over tokens, and data of one
    length have one shape anyway.
    """
    if -(-shortest // unit) == -(-longest // unit):
        return -(-longest // unit) * unit
    bucket = unit * max(1, 2 ** max(0, (longest - 1).bit_length() - 3) // unit)
    return min(most, -(-longest // bucket) * bucket)
