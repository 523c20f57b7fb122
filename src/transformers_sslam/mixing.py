"""Partial mixtures: every clip with the one before it mixed in, except in a few unmixed spans (SSLAM, arXiv 2506.12222)."""

from typing import Literal

import torch
from transformers.utils import logging


logger = logging.get_logger(__name__)


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


def partial_mixture(
    input_values: torch.Tensor, mixed_time: torch.Tensor, patch_size: int, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Mix each clip with the one before it in the batch, the first with the last: the elementwise maximum outside the unmixed spans.

    The maximum of two log-mels approximates the log-mel of the sum. A clip's zero padding, +0.467 after scaling, exceeds quiet sound and
    so replaces it, in the published runs too. With an `attention_mask` padding counts as silence: it is never mixed in, and yields to the
    sound of the other clip.

    Args:
        input_values: `(batch, frames, mel bins)`, scaled log-mels.
        mixed_time: `(batch or 1, time patches)`, see [`mixed_time_patches`].
        attention_mask: `(batch, frames)`, 1 or `True` where there is sound; `None`, the published behaviour, takes padding for sound.

    Returns:
        `(batch, frames, mel bins)`. A batch of one clip mixes with itself, so not at all, as in the published runs; a warning is logged.

    Raises:
        ValueError: if `attention_mask` has another shape.
    """
    if len(input_values) == 1 and not torch.compiler.is_compiling():
        logger.warning_once(
            "A batch of one clip is mixed with itself, so the clip stays as it is and its mixture is of no use. Use at least two clips per "
            "device, and drop an incomplete last batch."
        )
    own, foreign = input_values, input_values.roll(1, dims=0)
    if attention_mask is not None:
        if attention_mask.shape != input_values.shape[:2]:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but mixing needs a mask over frames, "
                f"{tuple(input_values.shape[:2])}"
            )
        own_sound = attention_mask.bool().unsqueeze(-1)
        foreign_sound = own_sound.roll(1, dims=0)
        own = own.masked_fill(foreign_sound & ~own_sound, -torch.inf)
        foreign = foreign.masked_fill(~foreign_sound, -torch.inf)
    mixed_frames = mixed_time.repeat_interleave(patch_size, dim=1).unsqueeze(-1)
    return torch.where(mixed_frames, torch.maximum(own, foreign), input_values)


__all__ = ["check_unmixed_spans", "draw_unmixed_spans", "mixed_time_patches", "partial_mixture"]
