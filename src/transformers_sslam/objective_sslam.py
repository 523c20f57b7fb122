"""Parts of the pre-training objective that are not trained: output, norm of the targets, errors, statistics, decay of the teacher."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import ModelOutput


@dataclass
class SSLAMForPreTrainingOutput(ModelOutput):
    """
    Clips are the batch and, with mixtures, the mixed batch behind it; views are `num_views` for each clip, one clip after the other.

    Args:
        loss: to minimise: `local_loss + global_loss + source_retention_loss`.
        local_loss: squared errors of the decoder's outputs, over `sqrt(hidden_size)`, summed over masked patches and channels of all views,
            divided by `sample_size`.
        global_loss: squared errors of CLS, over `sqrt(hidden_size)`, summed over channels and over views (or their mean, see
            `config.global_loss_reduction`), times `config.global_loss_weight`.
        source_retention_loss: as `local_loss`, but over the views of the mixed half, and also divided by the `sample_size` of both halves;
            times `config.source_retention_loss_weight`, 2. `None` without mixtures or with a weight of 0. With `config.objective`
            "mixture_invariant" it is that loss instead, likewise divided and weighed.
        loss_sum: `loss * sample_size`, with its gradient. To divide by the samples of all devices together, as the published runs did, take
            the sum of `loss_sum` over devices, divided by the sum of `sample_size`.
        sample_size: number of masked patches in all views of both halves, int64.
        target_std: standard deviation of the local targets over the masked patches of all views, the mean over channels. It falls towards
            0 when the teacher's outputs collapse to a constant.
        prediction_std: the same of the decoder's outputs.
        content_share: variance of the unmixed clips' local targets over clips at a fixed patch position, divided by their total variance.
            Towards 0 the targets have collapsed to codes of their positions, which `target_std` cannot see. Mixed clips are left out where
            they repeat unmixed ones. NaN for a batch of one clip.
        predictions: (this and all below with `output_targets=True`) `(views, masked patches, hidden_size)`, the decoder's outputs.
        cls_predictions: `(views, hidden_size)`, the student's CLS.
        local_targets: `(views, masked patches, hidden_size)`.
        global_targets: `(clips, hidden_size)`.
        source_retention_targets: `(views of the mixed half, masked patches, hidden_size)`, or `None`.
        latent_predictions: `(views of the mixed half, masked patches, num_latent_sources, hidden_size)` of the mixture-invariant baseline.
        assignments: `(views of the mixed half, num_latent_sources)`, boolean, the best one: True for the first mixture.
        bool_masked_pos: `(batch * num_views, patches)`, the masks, as given or as drawn.
        unmixed_span_starts: the spans, as given or as drawn, or `None`.
        mixed_input_values: `(batch, frames, num_mel_bins)`, the mixtures, or `None`.
        partners: `(num_sources - 1, batch)`, numbers of the clips that are mixed into each, or `None`.
        gain_db: `(num_sources - 1, batch)`, their gains, or `None`.
        present: `(num_sources - 1, batch)`, boolean, False where a mixture has fewer sources, or `None` where all are there.
    """

    loss: torch.Tensor | None = None
    local_loss: torch.Tensor | None = None
    global_loss: torch.Tensor | None = None
    source_retention_loss: torch.Tensor | None = None
    loss_sum: torch.Tensor | None = None
    sample_size: torch.Tensor | None = None
    target_std: torch.Tensor | None = None
    prediction_std: torch.Tensor | None = None
    content_share: torch.Tensor | None = None
    predictions: torch.Tensor | None = None
    cls_predictions: torch.Tensor | None = None
    local_targets: torch.Tensor | None = None
    global_targets: torch.Tensor | None = None
    source_retention_targets: torch.Tensor | None = None
    latent_predictions: torch.Tensor | None = None
    assignments: torch.Tensor | None = None
    bool_masked_pos: torch.Tensor | None = None
    unmixed_span_starts: torch.Tensor | None = None
    mixed_input_values: torch.Tensor | None = None
    partners: torch.Tensor | None = None
    gain_db: torch.Tensor | None = None
    present: torch.Tensor | None = None


class Targets(NamedTuple):
    """The teacher's targets: for all clips, and for the mixed ones the average of their sources' local targets."""

    local: torch.Tensor  # (clips, patches, hidden_size)
    overall: torch.Tensor  # (clips, hidden_size)
    retained: torch.Tensor | None = None  # (mixed clips, patches, hidden_size), not normalised again
    two_mixtures: "TwoMixtures | None" = None  # in the mixture-invariant baseline


class TwoMixtures(NamedTuple):
    """The local targets of the two mixtures of which a mixture consists."""

    first: torch.Tensor  # (mixed clips, patches, hidden_size)
    second: torch.Tensor  # likewise, 0 where it is not mixed in
    mixed_in: torch.Tensor  # (mixed clips or 1, patches), boolean: where it is


class RunningNorm(nn.Module):
    """Centres each channel of a block's outputs by its running mean at a patch's position, and scales it by its running variance.

    What follows from the position alone is so taken away, and what clips differ in is kept. Statistics are means of values and of their
    squares: both are linear in what they average, so that the mean over processes is that of all their clips.
    """

    means: torch.Tensor
    mean_squares: torch.Tensor
    num_batches: torch.Tensor
    smallest_weight = 0.005  # of a new batch: from the two hundredth on, the statistics are those of the last two hundred or so

    def __init__(self, num_layers: int, num_patches: int, width: int):
        super().__init__()
        self.register_buffer("means", torch.empty(num_layers, num_patches, width))
        self.register_buffer("mean_squares", torch.empty(num_layers, width))
        self.register_buffer("num_batches", torch.empty(num_layers, num_patches, dtype=torch.int64))  # that had a patch there

    def forward(self, patches: torch.Tensor, block: int, positions: torch.Tensor | None = None, update: bool = False) -> torch.Tensor:
        """Outputs of a block, normalised.

        Args:
            patches: `(clips, n, width)`.
            block: which one.
            positions: `(clips, n)`, of the patches; `None`: the first `n`, as of whole clips.
            update: whether to take the outputs, which are of whole clips, into the statistics before.
        """
        if update:
            self._update(patches, block)
        means = self.means[block].to(patches.dtype)
        seen = (self.num_batches[block] > 0).sum().clamp(min=1)
        variance = (self.mean_squares[block] - means.square().sum(0) / seen).clamp(min=0).to(patches.dtype)
        return (patches - (means[: patches.shape[1]] if positions is None else means[positions])) * (variance + 1e-5).rsqrt()

    def _update(self, patches: torch.Tensor, block: int) -> None:
        length = patches.shape[1]
        means, mean_squares = (values.to(self.means.dtype) for values in (patches.mean(0), patches.square().mean((0, 1))))
        usable = mean_squares.isfinite().all()  # as all are, but where half precision overflows: then the step is skipped
        self.num_batches[block, :length] += usable
        weights = (1 / self.num_batches[block, :length]).clamp(self.smallest_weight, 1).unsqueeze(1) * usable
        for statistics, batch, weight in (
            (self.means[block, :length], means, weights),
            (self.mean_squares[block], mean_squares, weights[0]),
        ):
            statistics.lerp_(batch.nan_to_num(0, 0, 0).to(statistics.dtype), weight.to(statistics.dtype))

    def average_over_processes(self) -> None:
        """Make the statistics those of all processes, where there are several. Each has to call it, after as many batches."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for statistics in (self.means, self.mean_squares):
                torch.distributed.all_reduce(statistics)
                statistics /= torch.distributed.get_world_size()


def ema_decay(step: int, start: float, end: float, anneal_end_step: int) -> float:
    """Decay of the teacher's moving average at update `step`, which counts from 1: linear from `start` to `end`, then constant."""
    return start + (end - start) * min(step, anneal_end_step) / anneal_end_step


def squared_error(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared error times `1 / sqrt(width)`, summed over everything, in float32."""
    return nn.functional.mse_loss(predictions.float(), targets, reduction="sum") * predictions.shape[-1] ** -0.5


def mixture_invariant_loss(
    latent: torch.Tensor, first: torch.Tensor, second: torch.Tensor, mixed_in: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """MixIT (Wisdom et al., NeurIPS 2020, arXiv 2006.12701, equation 4) on the teacher's features of masked patches.

    Each view is of a mixture of two mixtures. Every latent source goes to one of the two, and each mixture's sources are summed: of all
    assignments of a view the one with the smallest squared error counts, and has the gradient. As there, all are tried, one assignment
    serves a whole example, and no source is known by itself. Other than there, targets are features, which do not add up as waveforms do:
    so the sources are not projected to sum to the input, and the error is the squared one of the other losses, not an SNR.

    Args:
        latent: `(views, n, latent sources, width)`.
        first, second: `(views, n, width)`, the teacher's targets of the two mixtures.
        mixed_in: `(views, n)`, boolean: where the second mixture is there. Elsewhere it has no error.

    Returns:
        Half the sum of both mixtures' squared errors over everything, times `1 / sqrt(width)`, in float32; and the best assignments,
        `(views, latent sources)`, boolean, True for the first mixture.
    """
    with torch.autocast(latent.device.type, enabled=False):
        latent, there = latent.float(), mixed_in.unsqueeze(-1).to(first.dtype)
        number = torch.arange(latent.shape[2], device=latent.device)
        candidates = (torch.arange(2 ** len(number), device=latent.device).unsqueeze(1) >> number) % 2  # (assignments, latent sources)
        candidates = candidates.to(latent.dtype)
        with torch.no_grad():
            errors = _errors(latent, first, candidates) + _errors(latent * there.unsqueeze(-1), second * there, 1 - candidates)
            best = candidates[errors.argmin(1)]
        errors = squared_error(torch.einsum("vm,vnmd->vnd", best, latent), first)
        errors = errors + squared_error(torch.einsum("vm,vnmd->vnd", 1 - best, latent) * there, second * there)
        return errors / 2, best.bool()


def _errors(latent: torch.Tensor, target: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """Squared error of each candidate's sum of sources, less the square of the target, which all have: (views, candidates). Through
    products of sources with each other and with the target: no sum over a candidate's sources is made."""
    products = torch.einsum("vnmd,vnkd->vmk", latent, latent)
    return ((candidates @ products) * candidates).sum(-1) - 2 * torch.einsum("vnmd,vnd->vm", latent, target) @ candidates.T


@torch.no_grad()
def channel_std(values: torch.Tensor) -> torch.Tensor:
    """Standard deviation over all vectors of (..., width): unbiased for each channel, `sqrt(var + 1e-6)`, their mean."""
    return (variance_over_rows(values.float().flatten(0, -2)) + 1e-6).sqrt().mean()


@torch.no_grad()
def content_share(targets: torch.Tensor) -> torch.Tensor:
    """Variance over clips at a fixed patch position, divided by the total variance, of (clips, patches, width). NaN for one clip."""
    if len(targets) == 1:
        return targets.new_full((), torch.nan)
    return variance_over_rows(targets).mean() / variance_over_rows(targets.flatten(0, 1)).mean()


def variance_over_rows(values: torch.Tensor) -> torch.Tensor:
    """Unbiased variance over the first axis, in two passes: `Tensor.var` takes three times as long there on a CPU. Equal rows have exactly
    0."""
    centred = values - values[:1]
    centred -= centred.mean(0)
    return centred.square_().sum(0) / (len(values) - 1)
