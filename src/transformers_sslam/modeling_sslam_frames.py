"""Sound event detection: scores of every class in each time step, and of the whole clip."""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import nn
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .attention_sslam import as_boolean, without_autocast
from .configuration_sslam import SSLAMConfig
from .detection_sslam import SSLAMDetectionMixin
from .inference_sslam import SSLAMScoringMixin
from .losses_sslam import UNKNOWN, known_binary_cross_entropy
from .modeling_sslam import SSLAMModel, SSLAMModelOutput, SSLAMPreTrainedModel
from .tasks_sslam import ClipScoring


@dataclass
class SSLAMFrameClassifierOutput(TokenClassifierOutput):
    """
    Args:
        loss: if there are labels, float32.
        logits: `(batch, steps, num_labels)`, before the sigmoid. Those of steps without sound have no meaning.
        clip_logits: `(batch, num_labels)`, before the sigmoid, of the whole clip.
        hidden_states, attentions: on request.
    """

    clip_logits: torch.FloatTensor | None = None


class SSLAMForAudioFrameClassification(SSLAMPreTrainedModel, SSLAMDetectionMixin, SSLAMScoringMixin):
    """The encoder with a layer norm and a linear layer on each time step, and attention over time for the labels of a clip.

    Step `j` covers the seconds from `j / steps_per_second` to `(j + 1) / steps_per_second`. Patches of one time are pooled over frequency
    (`config.frame_pooling`). With more steps than patches in time, the vectors between them are interpolated linearly. The scores of a
    clip are those of its steps, weighted by a softmax over time (as in PretrainedSED, Schmid et al., ICASSP 2025, arXiv 2409.09546). With
    `config.clip_weighting` the score of a step is the geometric mean of its own and that of the clip, so that there are fewer events of a
    class that the clip as a whole speaks against. The loss is that of both scores, whether or not they are combined.
    """

    scoring = ClipScoring
    # Nor a classifier's head, which is on the pooled output.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^teacher\.", r"^classifier\."]
    # Its loss is the mean over a batch: where gradients are accumulated, `Trainer` has to divide by their number.
    accepts_loss_kwargs = False

    def __init__(self, config: SSLAMConfig):
        super().__init__(config)
        config.normalize_labels()
        if config.patch_size % config.frames_per_step:
            raise ValueError(
                f"steps_per_second is {config.steps_per_second:g} and patch_size {config.patch_size}, but a patch must have a whole number "
                f"of steps: set steps_per_second to a multiple of {100 / config.patch_size:g}"
            )
        if config.layer_pooling is not None:
            raise ValueError(
                f"layer_pooling is {config.layer_pooling!r}, but a detector of events reads the last block: set layer_pooling to None"
            )
        self.num_labels = config.num_labels
        self.steps_per_patch = config.patch_size // config.frames_per_step
        self.sslam = SSLAMModel(config)
        self.frequency_attention = nn.Linear(config.hidden_size, 1) if config.frame_pooling == "attention" else None
        width = config.hidden_size * (config.num_frequency_patches if config.frame_pooling == "patches" else 1)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.frame_classifier = nn.Linear(width, config.num_labels)  # type: ignore[arg-type]  # set in every config
        self.time_attention = nn.Linear(width, config.num_labels)  # type: ignore[arg-type]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        clip_labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SSLAMFrameClassifierOutput:
        r"""
        Args:
            input_values: `(batch, frames, num_mel_bins)`, see [`SSLAMModel`].
            labels: `(batch, steps, num_labels)`, floats in [0, 1]: the fraction of each step that an event of the class covers. Entries
                of -100 are unknown and have no part in the loss; neither have steps without sound.
            clip_labels: `(batch, num_labels)`, floats in [0, 1], or -100 where unknown: whether the class is in the clip at all. Where only
                one of both is given, `Trainer` needs `label_names=["labels"]`, or `["clip_labels"]`: otherwise its evaluation has no loss.
            attention_mask: see [`SSLAMModel`]. What lies where there is no sound changes no step that has sound.

        Returns:
            `logits (batch, steps, num_labels)` and `clip_logits (batch, num_labels)` before the sigmoid; the `loss`, if there are labels:
            the mean binary cross-entropy of steps, plus `config.clip_loss_weight` times that of clips.

        Raises:
            ValueError: if the input does not fit the model, labels have another shape, or `config.patch_drop_rate` is set in training.
        """
        if self.training and self.config.patch_drop_rate:
            raise ValueError(
                f"patch_drop_rate is {self.config.patch_drop_rate}, but every time step needs its patches: set it to 0 for event detection"
            )
        mask = None if attention_mask is None else as_boolean(attention_mask)
        outputs: SSLAMModelOutput = self.sslam(input_values, attention_mask=mask, **{**kwargs, "return_dict": True})
        patches = self.sslam.frame_embeddings(outputs.last_hidden_state)  # type: ignore[arg-type]  # an encoder always gives one
        sounding_patches, sounding_steps = (None, None) if mask is None else self._sounding(mask, patches.shape[1])
        logits, clip_logits = self._classify(patches, sounding_patches, sounding_steps)
        loss = None
        if labels is not None or clip_labels is not None:
            # Both, as labels that are absent are unknown: every parameter then has a gradient, as DistributedDataParallel needs it.
            labels = torch.full_like(logits, UNKNOWN) if labels is None else labels
            clip_labels = torch.full_like(clip_logits, UNKNOWN) if clip_labels is None else clip_labels
            sounding = None if sounding_steps is None else sounding_steps.unsqueeze(-1)
            clip_loss = known_binary_cross_entropy(clip_logits, clip_labels, name="clip_labels")
            loss = known_binary_cross_entropy(logits, labels, sounding) + self.config.clip_loss_weight * clip_loss
        if self.config.clip_weighting:
            logits = _geometric_mean(logits, clip_logits.unsqueeze(1))
        return SSLAMFrameClassifierOutput(
            loss=loss, logits=logits, clip_logits=clip_logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def _sounding(self, mask: torch.Tensor, time: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which patches hold sound, `(batch, time, frequency or 1)`, and which steps, `(batch, steps)`: of a mask over frames or tokens."""
        if mask.shape[1] == time * self.config.patch_size:
            steps = mask.unflatten(1, (-1, self.config.frames_per_step)).any(-1)
            return steps.unflatten(1, (time, -1)).any(-1, keepdim=True), steps
        patches = mask[:, 1:].unflatten(1, (time, -1))
        return patches, patches.any(-1).repeat_interleave(self.steps_per_patch, dim=1)

    @without_autocast
    def _classify(
        self, patches: torch.Tensor, sounding_patches: torch.Tensor | None, sounding_steps: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of steps and of clips, in the weights' own dtype, from patches `(batch, time, frequency, hidden_size)`."""
        steps = self.layernorm(self._pool_frequencies(patches, sounding_patches))
        features = self.dropout(self._interpolate(steps, sounding_patches))
        logits, attention = self.frame_classifier(features), self.time_attention(features)
        if sounding_steps is not None:
            attention = attention.masked_fill(~sounding_steps.unsqueeze(-1), torch.finfo(attention.dtype).min)
        # Of the clip's score, p = sum_t softmax_t(attention) sigmoid(logits), the logit: log(p) - log(1 - p), which does not overflow.
        weights = attention.log_softmax(1, dtype=torch.float32)
        present, absent = (weights + nn.functional.logsigmoid(sign * logits.float()) for sign in (1, -1))
        return logits, (present.logsumexp(1) - absent.logsumexp(1)).to(logits.dtype)

    def _pool_frequencies(self, patches: torch.Tensor, sounding: torch.Tensor | None) -> torch.Tensor:
        """`(batch, time, frequency, hidden_size)` -> `(batch, time, width)`: the mean, weighted, or all frequencies one after the other."""
        if self.config.frame_pooling == "patches":
            return (patches if sounding is None else patches.masked_fill(~sounding.unsqueeze(-1), 0)).flatten(2)
        attend = self.frequency_attention
        scores = patches.new_zeros(patches.shape[:3]) if attend is None else attend(patches).squeeze(-1)
        if sounding is not None:
            scores = scores.masked_fill(~sounding, torch.finfo(scores.dtype).min)
        return (scores.softmax(2).unsqueeze(2) @ patches).squeeze(2)

    def _interpolate(self, steps: torch.Tensor, sounding: torch.Tensor | None) -> torch.Tensor:
        """Vectors of patches to those of steps: linear between the centres of patches that hold sound, constant beyond the last one."""
        if self.steps_per_patch == 1:
            return steps
        if sounding is None:
            return _upsample(steps, self.steps_per_patch)
        weights = sounding.any(-1, keepdim=True).to(steps.dtype)
        total = _upsample(weights, self.steps_per_patch)
        return _upsample(steps * weights, self.steps_per_patch) / total.clamp_min(torch.finfo(total.dtype).tiny)


def _geometric_mean(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The logit of `sqrt(sigmoid(logits) * sigmoid(others))`, at most 16, where float32 scores end: beyond, `exp(x) - 1` would be 0."""
    log_score = (nn.functional.logsigmoid(logits.float()) + nn.functional.logsigmoid(others.float())) / 2
    log_score = log_score.clamp(max=-(2.0**-23))
    return (log_score - torch.log(-torch.expm1(log_score))).to(logits.dtype)


def _upsample(steps: torch.Tensor, factor: int) -> torch.Tensor:
    """`(batch, steps, width)` -> `(batch, steps * factor, width)`."""
    return nn.functional.interpolate(steps.transpose(1, 2), scale_factor=factor, mode="linear", align_corners=False).transpose(1, 2)


__all__ = ["SSLAMForAudioFrameClassification", "SSLAMFrameClassifierOutput"]
