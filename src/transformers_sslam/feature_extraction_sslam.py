"""SSLAMFeatureExtractor: waveforms in, log-mels of the model's length and scale out, with a mask over frames."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, TensorType, logging

from .fbank import frame_geometry, log_mel, num_frames


logger = logging.get_logger(__name__)

# Mean and standard deviation of the log-mels of a data set, and the length that its recipe uses (10 ms frames).
NORMALIZATION_PRESETS = {
    "audioset": {"mean": -4.268, "std": 4.569, "max_length": 1024},
    "esc50": {"mean": -6.627, "std": 5.359, "max_length": 512},
    "speech_commands": {"mean": -6.846, "std": 5.565, "max_length": 128},
}
# Resampling overshoots full scale a little; nothing that is scaled to [-1, 1] reaches this. Unscaled 8- or 16-bit audio does.
LARGEST_PLAUSIBLE_AMPLITUDE = 32.0
# Frames, 40 s: nobody pads a clip so far that has no more than twice as many samples (half a second).
LONGEST_PLAUSIBLE_PADDING = 4000
# Smallest and largest values. Below 1 kHz a mel scale is impossible; the largest are far above every use, and would fill the memory.
LIMITS = {
    **{"sampling_rate": (1000, 768_000), "num_mel_bins": (1, 1024)},
    **{"max_length": (1, 1_048_576), "pad_to_multiple_of": (1, math.inf)},
}


class SSLAMFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns mono waveforms into the log-mels that SSLAM reads: the clip's mean is subtracted, a Kaldi filter bank applied (25 ms Hann
    windows every 10 ms), the log-mel padded with zeros or cut, and *then* scaled to `(x - mean) / (2 * std)`, so that padding becomes
    `(0 - mean) / (2 * std)`, as in the published training.

    Args:
        feature_size (`int`, defaults to 1): Values per time step of the raw input; always 1, mono.
        sampling_rate (`int`, defaults to 16000): Rate of the waveforms in Hz.
        num_mel_bins (`int`, defaults to 128): Mel bins.
        max_length (`int`, defaults to 1024): Frames that `padding="max_length"` gives; a multiple of `pad_to_multiple_of`.
        padding_value (`float`, defaults to 0.0): Padding, as a log-mel before scaling.
        do_normalize (`bool`, defaults to `True`): Whether to scale by `mean` and `std`.
        mean (`float`, defaults to -4.268): Mean of the log-mels of the data set, AudioSet's by default.
        std (`float`, defaults to 4.569): Their standard deviation; the scale is twice as much.
        return_attention_mask (`bool`, defaults to `False`): Whether to return a mask over frames when a call does not say.
        pad_to_multiple_of (`int`, defaults to 16): The model's patch size; every length but those of `padding=False` is a multiple.

    Raises:
        ValueError: if one of these is out of range.
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        mean: float = NORMALIZATION_PRESETS["audioset"]["mean"],
        std: float = NORMALIZATION_PRESETS["audioset"]["std"],
        return_attention_mask: bool = False,
        pad_to_multiple_of: int = 16,
        **kwargs,
    ):
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        self.sampling_rate = _whole_number("sampling_rate", sampling_rate)
        self.num_mel_bins = _whole_number("num_mel_bins", num_mel_bins)
        self.max_length = _whole_number("max_length", max_length)
        self.pad_to_multiple_of = _whole_number("pad_to_multiple_of", pad_to_multiple_of)
        for name, value in (("mean", mean), ("std", std), ("padding_value", padding_value)):
            if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or (name == "std" and value <= 0):
                raise ValueError(f"{name} is {value!r}, but a finite number{' above 0' if name == 'std' else ''} is expected")
        for name, value in (("do_normalize", do_normalize), ("return_attention_mask", return_attention_mask)):
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"{name} is {value!r}, but True or False is expected")
        if feature_size != 1 or self.padding_side != "right":
            raise ValueError(
                f"feature_size is {feature_size} and padding_side {self.padding_side!r}, but only mono waveforms (1), padded on the right, "
                "are supported"
            )
        self.do_normalize, self.return_attention_mask = bool(do_normalize), bool(return_attention_mask)
        self.mean, self.std, self.padding_value = float(mean), float(std), float(padding_value)
        self._check_length(self.max_length)

    @classmethod
    def from_preset(cls, name: str, **kwargs) -> "SSLAMFeatureExtractor":
        """With mean, standard deviation and length of a published recipe: `"audioset"`, `"esc50"` or `"speech_commands"`."""
        if name not in NORMALIZATION_PRESETS:
            raise ValueError(
                f"preset is {name!r}, which does not exist: choose one of {', '.join(NORMALIZATION_PRESETS)}, or give mean and std"
            )
        return cls(**{**NORMALIZATION_PRESETS[name], **kwargs})

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | list,
        sampling_rate: int | None = None,
        padding: bool | str | int | PaddingStrategy = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        device: str | torch.device | None = None,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: One mono clip (1-D array, tensor or list of floats), or several: a list of such clips of any lengths, each
                `(samples,)` or `(1, samples)`, or a 2-D array `(clips, samples)`. Floats in [-1, 1]. Two rows are rejected, because they
                may also be stereo: give two clips as a list.
            sampling_rate: Rate of `raw_speech` in Hz; it must equal the extractor's. Leaving it out is warned about.
            padding: `"max_length"` (1024 frames by default, as published); a number of frames, which is the same with that `max_length`;
                `"longest"` or `True`, the longest clip of the batch, rounded up to a multiple of 16; `False`, none.
            max_length: Frames to pad or cut to, in place of the extractor's; a multiple of 16. With other paddings, only cuts.
            truncation: Whether to cut clips that are too long (a warning says so); otherwise they are an error.
            return_attention_mask: Whether to return which frames are sound (1) and which padding (0).
            return_tensors: `"pt"`, `"np"`, or `None` for a list of numpy arrays.
            device: Where to compute (`"cuda"`, ...); by default where a tensor lies, and on the CPU for anything else. With
                `return_tensors="pt"` the result stays there.

        Returns:
            `input_values: (batch, frames, num_mel_bins)`, float32; on request `attention_mask: (batch, frames)`, int32.

        Raises:
            ValueError: if a clip is empty or shorter than 25 ms, holds NaN or infinity, integers or values out of scale, or more than one
                channel; if the sampling rate differs, or the length asked for is not a multiple of 16 or looks like a number of samples.
        """
        kind = None if return_tensors is None else TensorType(return_tensors)
        if kind not in (None, TensorType.PYTORCH, TensorType.NUMPY):
            raise ValueError(f'return_tensors is {return_tensors!r}, but must be "pt", "np" or None')
        self._check_sampling_rate(sampling_rate)
        clips = [self._check_clip(clip, i, device) for i, clip in enumerate(_as_clips(raw_speech, frame_geometry(self.sampling_rate)[0]))]
        target, kept = self._target_lengths([len(clip) for clip in clips], padding, max_length, truncation)

        values = [self._fit(frames, target or k) for frames, k in zip(self._log_mels(clips, kept), kept)]
        features = {"input_values": values}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            features["attention_mask"] = [(torch.arange(len(v), device=v.device) < k).to(torch.int32) for v, k in zip(values, kept)]
        return self._as_batch_feature(features, kind)

    def _pad(  # type: ignore[override]  # the base class passes all by name
        self, processed_features: dict, max_length: int, padding_strategy=PaddingStrategy.DO_NOT_PAD, **kwargs
    ) -> dict:
        """One example of `pad`, as data collators call it: log-mels `(frames, mel bins)` that `__call__(..., padding=False)` left as they
        are get the padding it would have given them; waveforms, that of the base class."""
        values = np.asarray(processed_features["input_values"])
        if values.ndim != 2 or padding_strategy == PaddingStrategy.DO_NOT_PAD:
            return super()._pad(processed_features, max_length=max_length, padding_strategy=padding_strategy, **kwargs)
        multiple = math.lcm(self.pad_to_multiple_of, kwargs.get("pad_to_multiple_of") or 1)
        missing = max(0, _round_up(max_length, multiple) - len(values))  # what is longer stays as it is, as in the base class
        if "attention_mask" in processed_features or kwargs.get("return_attention_mask"):
            mask = processed_features.get("attention_mask", np.ones(len(values), dtype=np.int32))
            processed_features["attention_mask"] = np.pad(mask, (0, missing))
        # In float32, to the last bit what `__call__` gives.
        silence = self._scaled(torch.tensor(self.padding_value, dtype=torch.float32, device="cpu")).item()
        processed_features["input_values"] = np.pad(values, ((0, missing), (0, 0)), constant_values=silence).astype(values.dtype)
        return processed_features

    def to_dict(self) -> dict:
        """As saved; see `SSLAMConfig.to_dict` for what is left out."""
        values = super().to_dict()
        if self._auto_class is None:
            values.pop("auto_map", None)
        return values

    def compute_normalization(self, clips: Iterable) -> tuple[float, float]:
        """Mean and standard deviation of the log-mels of a data set, before scaling and without padding.

        Args:
            clips: any iterable of waveforms as `__call__` takes one of them; read once, one clip at a time.

        Returns:
            `(mean, std)` over all frames and mel bins (population standard deviation), to build an extractor with.

        Raises:
            ValueError: if there is no clip, or one that `__call__` would reject.
        """
        count, mean, squares = 0, 0.0, 0.0
        for i, clip in enumerate(clips):
            clip = self._check_clip(clip, i, None)
            values = self._log_mels([clip], [num_frames(len(clip), self.sampling_rate)])[0].double()
            # Merge the clip's moments into the running ones (Chan, Golub and LeVeque 1979): stable for any number of clips.
            delta, total = values.mean().item() - mean, count + values.numel()
            squares += values.var(correction=0).item() * values.numel() + delta**2 * count * values.numel() / total
            mean += delta * values.numel() / total
            count = total
        if count == 0:
            raise ValueError("clips holds no clip to compute mean and std from: give at least one waveform")
        return mean, (squares / count) ** 0.5

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
        if sampling_rate is None:
            logger.warning_once(f"No sampling_rate was given; {self.sampling_rate} Hz is assumed. Pass `sampling_rate` to have it checked.")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate is {sampling_rate!r}, but the model takes {self.sampling_rate} Hz: resample the audio first, for example "
                f"with torchaudio.functional.resample(waveform, {sampling_rate}, {self.sampling_rate})"
            )

    def _check_clip(self, clip, index: int, device: str | torch.device | None) -> torch.Tensor:
        """A clip as a 1-D float32 tensor on `device`; whatever could not be a mono waveform in [-1, 1] is rejected."""
        name = f"clip {index}"
        clip = as_float_samples(clip, name)
        if clip.dim() == 2 and len(clip) == 1:  # one channel, as audio libraries give it
            clip = clip[0]
        if clip.dim() != 1:
            raise ValueError(
                f"{name} has shape {tuple(clip.shape)}, but a clip is 1-D (samples,): mix several channels down to one first, "
                "for example with waveform.mean(axis of the channels)"
            )
        if len(clip) == 0:
            raise ValueError(f"{name} is empty: leave it out")
        check_peak(clip, name)
        least = frame_geometry(self.sampling_rate)[0]
        if len(clip) < least:
            raise ValueError(
                f"{name} has {len(clip)} samples, but one frame takes {least} (25 ms at {self.sampling_rate} Hz): leave it out or pad it "
                "with zeros"
            )
        return clip.to(device=device)

    def _check_length(self, length: int) -> None:
        if not isinstance(length, Integral) or length < 1 or length % self.pad_to_multiple_of:
            raise ValueError(
                f"max_length is {length!r} frames, but must be a positive multiple of {self.pad_to_multiple_of} (the model's patch size)"
            )

    def _target_lengths(self, samples: list[int], padding, max_length: int | None, truncation: bool) -> tuple[int | None, list[int]]:
        """The length to pad to (`None`: no padding) and the number of frames that are kept of each clip of so many samples."""
        frames = [num_frames(number, self.sampling_rate) for number in samples]
        is_length = isinstance(padding, Integral) and not isinstance(padding, bool)
        if is_length:
            if max_length not in (None, padding):
                raise ValueError(f"padding is {padding} frames and max_length {max_length}: give one of them")
            padding, max_length = "max_length", int(padding)
        strategy = self._get_padding_strategies(padding, max_length or self.max_length)
        pads_to_length = strategy == PaddingStrategy.MAX_LENGTH
        limit = self.max_length if pads_to_length and max_length is None else max_length
        if limit is not None:
            self._check_length(limit)
            longest = max(frames)
            # As in Transformers' guide to audio classification: `max_length=16000, truncation=True`.
            is_many = limit >= self.sampling_rate or (limit >= LONGEST_PLAUSIBLE_PADDING and 2 * limit >= max(samples))
            if pads_to_length and not is_length and max_length is not None and is_many and limit > longest:
                raise ValueError(
                    f"max_length is {limit} frames of 10 ms ({limit / 100:g} s), but the longest clip has {longest}: were samples meant? "
                    f"{limit} samples are {num_frames(limit, self.sampling_rate)} frames. Give frames, a multiple of "
                    f"{self.pad_to_multiple_of}; to pad as far as that, give padding={limit} in place of max_length"
                )
            if longest > limit and not truncation:
                raise ValueError(
                    f"a clip has {longest} frames (10 ms each), more than max_length={limit}, and truncation is off: raise max_length, "
                    'cut the audio into windows, or use padding="longest"'
                )
            if longest > limit:
                logger.warning_once(
                    f"Clips of more than {limit} frames (10 ms each) are cut to the first {limit / 100:g} s, as in the published recipes. "
                    'To keep them whole, pass padding="longest" or a larger max_length. Recordings of any length: `score_over_time` of a '
                    "classifier or `sslam tag`, `encode` of an encoder or `sslam embed`."
                )
            frames = [min(n, limit) for n in frames]
        if strategy == PaddingStrategy.DO_NOT_PAD:
            return None, frames
        return limit if pads_to_length else _round_up(max(frames), self.pad_to_multiple_of), frames

    def _log_mels(self, clips: list[torch.Tensor], frames: list[int]) -> list[torch.Tensor]:
        """The first `frames` frames of each clip's log-mel, `(frames, num_mel_bins)`."""
        length, shift = frame_geometry(self.sampling_rate)
        # The mean is the whole clip's; of the rest, only what the frames that are kept will read.
        clips = [(clip - clip.mean())[: (n - 1) * shift + length] for clip, n in zip(clips, frames)]
        if all(clip.device.type == "cpu" for clip in clips):  # nothing is gained there by a batch, and padding would cost
            return [log_mel(clip, self.sampling_rate, self.num_mel_bins) for clip in clips]
        batch = torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)
        return [row[:n] for row, n in zip(log_mel(batch, self.sampling_rate, self.num_mel_bins), frames)]

    def _fit(self, frames: torch.Tensor, length: int) -> torch.Tensor:
        """Pad to `length` frames, then scale: in the published training padding is scaled too."""
        frames = torch.nn.functional.pad(frames, (0, 0, 0, length - len(frames)), value=self.padding_value)
        return self._scaled(frames)

    @property
    def scaled_padding_value(self) -> float:
        """What padding becomes by scaling, which a model's `config.padding_value` must equal."""
        return self._scaled(self.padding_value)

    def _scaled(self, values):
        return (values - self.mean) / (2 * self.std) if self.do_normalize else values

    @staticmethod
    def _as_batch_feature(features: dict[str, list[torch.Tensor]], kind: TensorType | None) -> BatchFeature:
        lengths = {len(value) for value in features["input_values"]}
        if kind is not None and len(lengths) > 1:
            raise ValueError(
                f'clips of {sorted(lengths)} frames do not make one tensor: use padding="longest" or "max_length", or leave out '
                "return_tensors"
            )
        if kind == TensorType.PYTORCH:
            return BatchFeature({name: torch.stack(rows) for name, rows in features.items()})
        return BatchFeature({name: [row.cpu().numpy() for row in rows] for name, rows in features.items()}, tensor_type=kind)


def as_float_samples(samples, name: str) -> torch.Tensor:
    """Samples as a float32 tensor of their shape; what is not finite floats is rejected, with `name` in the message."""
    if isinstance(samples, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array, but a plain one is expected: replace what is masked, for example with .filled(0)")
    if isinstance(samples, torch.Tensor) and samples.layout != torch.strided:
        raise ValueError(f"{name} is a sparse tensor, but a dense one is expected: give its .to_dense()")
    if not isinstance(samples, torch.Tensor):
        try:
            array = np.asarray(samples)
            # A copy of what torch cannot take over as it lies there: read-only, strided backwards, other byte orders, long doubles.
            samples = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else array.dtype, order="C"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} is not an array of numbers ({error}): give a 1-D array of floats") from error
    if not samples.is_floating_point():
        is_integer = not samples.is_complex() and samples.dtype != torch.bool
        raise ValueError(
            f"{name} has dtype {str(samples.dtype).removeprefix('torch.')}, but floats in [-1, 1] are expected"
            + (": divide 16-bit integers by 32768" if is_integer else "")
        )
    samples = samples.detach().to(dtype=torch.float32)
    if not samples.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite samples: repair it or leave it out")
    return samples


def check_peak(samples: torch.Tensor, name: str) -> None:
    """Raise a ValueError, with `name`, if samples were never scaled to [-1, 1]."""
    # Read where they lie, before they are sent to a device that would be waited for.
    if len(samples) and (peak := samples.abs().max().item()) > LARGEST_PLAUSIBLE_AMPLITUDE:
        raise ValueError(
            f"{name} has a peak of {peak:g}, but samples lie in [-1, 1]: integers stored as floats must be divided by their full scale "
            "(32768 for 16 bits)"
        )


def reject_two_rows(clips: np.ndarray | torch.Tensor) -> None:
    """Raise a ValueError if an array of clips might be a stereo recording."""
    if clips.ndim == 2 and len(clips) == 2:
        raise ValueError(
            f"an array of shape {tuple(clips.shape)} may be two clips or the two channels of one: give two clips as a list of 1-D arrays, "
            "and mix stereo down to mono, for example with waveform.mean(0)"
        )


def _whole_number(name: str, value: int) -> int:
    """Python's own, because NumPy's cannot be saved."""
    least, most = LIMITS[name]
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, but a whole number of at least {least} is expected")
    if value > most:
        raise ValueError(f"{name} is {value!r}, but must be at most {most}")
    return int(value)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _as_clips(raw_speech, least: int) -> list:
    """One clip or several, as a list of clips. Rows of an array need at least `least` samples, those of one frame."""
    if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
        if raw_speech.ndim == 2:
            if len(raw_speech) == 0:
                raise ValueError(f"raw_speech has shape {tuple(raw_speech.shape)}, which holds no clip: give at least one")
            reject_two_rows(raw_speech)
            if raw_speech.shape[1] < least:
                raise ValueError(
                    f"an array of shape {tuple(raw_speech.shape)} holds {len(raw_speech)} clips of {raw_speech.shape[1]} samples, but one "
                    f"frame takes {least}: were the axes swapped, that is (samples, channels)? Give one clip as a 1-D array, for example "
                    "waveform.mean(1)"
                )
            return list(raw_speech)
        return [raw_speech]
    if not isinstance(raw_speech, (list, tuple)):
        raise ValueError(f"raw_speech is a {type(raw_speech).__name__}, but must be a 1-D array of floats or a list of such arrays")
    if len(raw_speech) == 0:
        raise ValueError("raw_speech is empty: give at least one clip")
    return list(raw_speech) if np.ndim(raw_speech[0]) > 0 else [raw_speech]


__all__ = ["NORMALIZATION_PRESETS", "SSLAMFeatureExtractor"]
