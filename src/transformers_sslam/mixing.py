"""Partial mixtures: every clip with others mixed in, except in a few unmixed spans (SSLAM, arXiv 2506.12222).

As published, the one other clip is the one before it in the batch, and a mixture the elementwise maximum of log-mels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from transformers.utils import logging

from .fbank import frame_geometry, log_mel, num_frames


logger = logging.get_logger(__name__)

ENERGY_FLOOR = torch.finfo(torch.float32).eps  # of mel energies, as `fbank.log_mel` has it


def draw_unmixed_spans(
    num_frames: int,
    num_spans: int = 2,
    span_length: int = 240,
    patch_size: int = 16,
    *,
    num_clips: int | None = None,
    placement: Literal["published", "uniform"] = "published",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Draw where the unmixed spans start, in frames: `(num_spans,)` for a whole batch, as published, or `(num_clips, num_spans)`.

    Published spans are drawn from first to last. Span `i` of `k` starts at a multiple of `patch_size`, uniform from the end of the one
    before it to before `i / k` of the clip, but early enough to leave room for itself, those after it, and at least one mixed patch at the
    end. With two spans of 240 frames in 1024 these are the published bounds: the first from 0 to 496, the second up to 768. So the middle
    is in a span more often than the ends, and the last patch never. With uniform placement all ways to place the spans are equally likely.

    Args:
        num_frames, span_length: multiples of `patch_size`.
        num_clips: draw for each of so many clips; by default one draw serves all.
        placement: how the spans are drawn.
        generator: source of the random numbers, which are then drawn on its device.
        device: of the result.

    Raises:
        ValueError: if the spans leave nothing of the clip to mix, or lengths are not multiples of `patch_size`.
    """
    _check_lengths(num_frames, num_spans, span_length, patch_size)
    frames, span = num_frames // patch_size, span_length // patch_size  # both in time patches from here on
    source = device if generator is None else generator.device
    clips = 1 if num_clips is None else num_clips
    if placement == "uniform":
        # Of a row of mixed patches and spans, the places that are spans. Each span before a place moves it by its length less one.
        places = torch.rand(clips, frames - num_spans * (span - 1), generator=generator, device=source)
        spans = places.topk(num_spans).indices.sort(dim=1).values
        starts = spans + (span - 1) * torch.arange(num_spans, device=source)
    else:
        uniform = torch.rand(clips, num_spans, generator=generator, device=source)
        starts = torch.zeros(clips, num_spans, dtype=torch.long, device=source)
        earliest = starts[:, 0]
        for index in range(num_spans):
            end = min(frames * (index + 1) // num_spans, frames - (num_spans - index) * span)
            starts[:, index] = earliest + (uniform[:, index] * (end - earliest)).long()
            earliest = starts[:, index] + span
    drawn = (starts * patch_size).to(device)
    return drawn[0] if num_clips is None else drawn


def check_unmixed_spans(starts: torch.Tensor, num_clips: int, num_frames: int, span_length: int, patch_size: int) -> None:
    """Raise a ValueError if `starts` is neither `(spans,)` nor `(num_clips, spans)`, or spans begin inside a patch, leave the clip,
    overlap, or leave nothing to mix."""
    shape = tuple(starts.shape)
    if starts.is_floating_point() or len(shape) not in (1, 2) or shape[-1] == 0 or (len(shape) == 2 and shape[0] != num_clips):
        raise ValueError(
            f"unmixed_span_starts has shape {shape} and type {starts.dtype}, but whole numbers of frames are expected, (spans,) for the "
            f"whole batch or ({num_clips}, spans) for each clip"
        )
    _check_lengths(num_frames, shape[-1], span_length, patch_size)
    in_order = starts.sort(dim=-1).values
    overlap = (in_order.diff(dim=-1) < span_length).any()
    if (starts % patch_size).any() or (starts < 0).any() or (starts > num_frames - span_length).any() or overlap:
        raise ValueError(
            f"unmixed_span_starts is {starts.tolist()}, but starts must be multiples of {patch_size} (the patch size) from 0 to "
            f"{num_frames - span_length}, so that spans of {span_length} frames lie within {num_frames} frames, and must not overlap"
        )


def _check_lengths(num_frames: int, num_spans: int, span_length: int, patch_size: int) -> None:
    if num_frames % patch_size or span_length % patch_size or num_spans < 1 or span_length < 1:
        raise ValueError(
            f"{num_spans} unmixed spans of {span_length} frames in {num_frames}, but at least one is expected, and lengths that are "
            f"positive multiples of {patch_size} (the patch size)"
        )
    if num_spans * span_length >= num_frames:
        raise ValueError(
            f"{num_spans} unmixed spans of {span_length} frames leave nothing to mix of {num_frames} frames: set unmixed_span_length to "
            f"less than {num_frames / num_spans:g}, or take longer inputs"
        )


def mixed_time_patches(starts: torch.Tensor, num_frames: int, span_length: int, patch_size: int) -> torch.Tensor:
    """Where foreign audio is mixed in: `(rows, time patches)`, boolean, True outside the spans; one row if `starts` is `(spans,)`."""
    first = torch.arange(0, num_frames, patch_size, device=starts.device)
    offset = first - torch.atleast_2d(starts).unsqueeze(-1)
    return ~((offset >= 0) & (offset < span_length)).any(1)


class DrawnSources(NamedTuple):
    """What is mixed into each clip of a batch, in this order."""

    partners: torch.Tensor  # (sources - 1, batch): numbers of the clips that are mixed in
    gain_db: torch.Tensor | None = None  # (sources - 1, batch): their gains; None: 0 dB
    present: torch.Tensor | None = None  # (sources - 1, batch), boolean: False where a mixture has fewer sources; None: all are there

    def counts(self) -> torch.Tensor | int:
        """Sources of each mixture, the clip itself among them: `(batch,)`, or one number for all."""
        return 1 + (len(self.partners) if self.present is None else self.present.sum(0))


def draw_sources(
    num_clips: int,
    num_sources: int | Sequence[int] = 2,
    partners: Literal["neighbour", "batch"] = "neighbour",
    gain_db: Sequence[float] | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> DrawnSources:
    """Draw what is mixed into each clip of a batch. With the default settings nothing is random.

    Args:
        num_sources: of each mixture, the clip itself among them; or `[least, most]`, drawn uniformly for each mixture.
        partners: the clips before each one in the batch (`"neighbour"`; with two sources as published), the first one's being the last; or
            others of the batch, drawn for each mixture without replacement.
        gain_db: `[lowest, highest]`, drawn uniformly for each source that is mixed in; the clip itself keeps its level. `None`: 0 dB.
        generator: source of the random numbers, which are then drawn on its device: in this order partners, numbers and gains.
        device: of the result.

    Raises:
        ValueError: if there are fewer clips than sources. A single clip with two sources mixes with itself, so not at all, as in the
            published runs; a warning is logged.
    """
    least, most = (num_sources, num_sources) if isinstance(num_sources, int) else num_sources
    if num_clips < most and (num_clips, most) != (1, 2):
        raise ValueError(
            f"num_sources is {num_sources}, but the batch has {num_clips} clips, and no mixture takes a clip twice: give at least {most} "
            "clips per device, or lower num_sources"
        )
    if num_clips == 1 and not torch.compiler.is_compiling():
        logger.warning_once(
            "A batch of one clip is mixed with itself, so that its mixture equals the clip. Use at least two clips per "
            "device, and drop an incomplete last batch."
        )
    source = device if generator is None else generator.device
    if partners == "batch":
        rank = torch.rand(num_clips, num_clips, generator=generator, device=source)
        chosen = rank.fill_diagonal_(2.0).argsort(dim=1)[:, : most - 1].T  # a clip itself ranks last
    else:
        before = torch.arange(1, most, device=source).unsqueeze(1)
        chosen = (torch.arange(num_clips, device=source) - before) % num_clips
    present = gains = None
    if least < most:
        counts = torch.randint(least, most + 1, (num_clips,), generator=generator, device=source)
        present = (torch.arange(2, most + 1, device=source).unsqueeze(1) <= counts).to(device)
    if gain_db is not None:
        low, high = gain_db
        gains = (low + (high - low) * torch.rand(chosen.shape, generator=generator, device=source)).to(device)
    return DrawnSources(chosen.to(device), gains, present)


class LogMelScale(NamedTuple):
    """How a feature extractor makes log-mels, `(x - mean) / (2 * std)`: what energies, gains and waveforms need."""

    mean: float = -4.268
    std: float = 4.569
    sampling_rate: int = 16_000  # Hz

    def energies(self, log_mels: torch.Tensor) -> torch.Tensor:
        """Mel energies of scaled log-mels, in float32; 0 where a log-mel is at its floor, as digital silence is."""
        energies = (log_mels.float() * (2 * self.std) + self.mean).exp()
        return energies.masked_fill(energies < 1.001 * ENERGY_FLOOR, 0.0)

    def log_mels(self, energies: torch.Tensor) -> torch.Tensor:
        """Scaled log-mels of mel energies."""
        return self.scaled(energies.clamp_min(ENERGY_FLOOR).log())

    def scaled(self, log_mels: torch.Tensor) -> torch.Tensor:
        return (log_mels - self.mean) / (2 * self.std)

    def amplified(self, log_mels: torch.Tensor, gain_db: torch.Tensor) -> torch.Tensor:
        """Scaled log-mels `(..., frames, mel bins)` of the sounds with gains `(...)` in dB: silence stays silent."""
        factor = 10 ** (gain_db.float() / 10)
        return self.log_mels(self.energies(log_mels) * factor[..., None, None]).to(log_mels.dtype)


AUDIOSET_SCALE = LogMelScale()


@dataclass(frozen=True)
class Sources:
    """The sources of a batch's mixtures, with their gains: the clips themselves first, then those that are mixed in.

    Attributes:
        drawn: which clips they are, and their gains.
        log_mels: `(sources, batch, frames, mel bins)`, scaled.
        sound: `(sources, batch, frames or 1)`, boolean: where a source is there, and not padding.
        domain: how they are mixed: by the elementwise maximum of log-mels (`"log_mel"`), which is the published approximation of the
            log-mel of a sum; by the sum of mel energies (`"mel"`), which leaves out how the phases of the sources add up; or as
            `"waveform"`, exactly.
        scale: of the log-mels.
        waveforms: `(sources, batch, samples)`, zero where a source is not there. Only for that last domain.
    """

    drawn: DrawnSources
    log_mels: torch.Tensor
    sound: torch.Tensor
    domain: Literal["log_mel", "mel", "waveform"] = "log_mel"
    scale: LogMelScale = AUDIOSET_SCALE
    waveforms: torch.Tensor | None = None

    def mix(self, which: slice = slice(None)) -> torch.Tensor:
        """Some of the sources, at least one, mixed: `(batch, frames, mel bins)`, the first one's padding where none sounds."""
        log_mels, sound = self.log_mels[which], self.sound[which].unsqueeze(-1)
        if len(log_mels) == 1:
            return log_mels[0]
        if self.domain == "log_mel":
            mixed = log_mels.masked_fill(~sound, -torch.inf).amax(0)
        elif self.domain == "mel" or self.waveforms is None:
            mixed = self.scale.log_mels(self.scale.energies(log_mels).masked_fill(~sound, 0.0).sum(0))
        else:
            mixed = self.scale.scaled(log_mel(self.waveforms[which].sum(0), self.scale.sampling_rate, log_mels.shape[-1]))
        return torch.where(sound.any(0), mixed.to(log_mels.dtype), log_mels[0])


def gather_sources(
    input_values: torch.Tensor,
    drawn: DrawnSources,
    attention_mask: torch.Tensor | None = None,
    waveforms: torch.Tensor | None = None,
    domain: Literal["log_mel", "mel", "waveform"] = "log_mel",
    scale: LogMelScale = AUDIOSET_SCALE,
) -> Sources:
    """The sources of a batch's mixtures.

    A clip's zero padding, +0.467 after scaling, exceeds quiet sound and so replaces it in a mixture, in the published runs too. With an
    `attention_mask` padding counts as silence: it is never mixed in, and yields to the sound of other sources.

    Args:
        input_values: `(batch, frames, mel bins)`, scaled log-mels.
        drawn: what is mixed into each clip.
        attention_mask: `(batch, frames)`, 1 or `True` where there is sound; `None`, the published behaviour, takes padding for sound.
        waveforms: `(batch, samples)`, of which `input_values` are the log-mels, zeros after the end of a clip.
        domain, scale: see [`Sources`].

    Raises:
        ValueError: if `attention_mask` or `waveforms` have another shape, or either is missing where waveforms are mixed.
    """
    _check_sources(input_values, attention_mask, waveforms, domain, scale)
    log_mels = input_values[drawn.partners]
    there = input_values.new_ones(input_values.shape[0], 1, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    sound = there[drawn.partners]
    if drawn.gain_db is not None:
        log_mels = torch.where(sound.unsqueeze(-1), scale.amplified(log_mels, drawn.gain_db), log_mels)
    if drawn.present is not None:
        sound = sound & drawn.present.unsqueeze(-1)
    samples = None
    if domain == "waveform" and waveforms is not None:
        others = waveforms[drawn.partners]
        if drawn.gain_db is not None:
            others = others * (10 ** (drawn.gain_db / 20)).unsqueeze(-1)
        if drawn.present is not None:
            others = others * drawn.present.unsqueeze(-1)
        samples = torch.cat((waveforms.unsqueeze(0), others))
    sources = torch.cat((input_values.unsqueeze(0), log_mels)), torch.cat((there.unsqueeze(0), sound))
    return Sources(drawn, *sources, domain, scale, samples)


def _check_sources(
    input_values: torch.Tensor, attention_mask: torch.Tensor | None, waveforms: torch.Tensor | None, domain: str, scale: LogMelScale
) -> None:
    clips, frames = input_values.shape[:2]
    if attention_mask is not None and attention_mask.shape != (clips, frames):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but mixing needs a mask over frames, {tuple(input_values.shape[:2])}"
        )
    if domain != "waveform":
        return
    if waveforms is None or attention_mask is None:
        missing = "waveforms" if waveforms is None else "attention_mask"
        raise ValueError(f"mixing_domain is 'waveform', but {missing} is None: give the clips' waveforms and their mask, or mix log-mels")
    if waveforms.dim() != 2 or len(waveforms) != clips or num_frames(waveforms.shape[1], scale.sampling_rate) != frames:
        length, shift = frame_geometry(scale.sampling_rate)
        raise ValueError(
            f"waveforms has shape {tuple(waveforms.shape)}, but for {clips} clips of {frames} frames at {scale.sampling_rate} Hz "
            f"({clips}, {(frames - 1) * shift + length}) is expected: pad each clip with zeros to that length"
        )


def partial_mixture(sources: Sources, mixed_time: torch.Tensor, patch_size: int, which: slice = slice(None)) -> torch.Tensor:
    """Mix sources into each clip, except in its unmixed spans: `(batch, frames, mel bins)`, scaled log-mels.

    Args:
        sources: of which the first is the clip itself.
        mixed_time: `(batch or 1, time patches)`, see [`mixed_time_patches`].
        which: sources to mix, the first among them; all by default.
    """
    mixed_frames = mixed_time.repeat_interleave(patch_size, dim=1).unsqueeze(-1)
    return torch.where(mixed_frames, sources.mix(which), sources.log_mels[0])
