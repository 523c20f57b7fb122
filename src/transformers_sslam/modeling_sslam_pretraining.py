"""Self-supervised pre-training: a student receives some patches, a decoder predicts the others, a teacher receives all of them.

Stage 1 (EAT, arXiv 2401.03497) and stage 2 (SSLAM, arXiv 2506.12222, with partial mixtures) are two settings of one class, see
`PRETRAINING_STAGES`.
"""

from typing import Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .attention_sslam import as_boolean
from .configuration_sslam import SSLAMConfig
from .decoder_sslam import SSLAMDecoder
from .masking import count_visible, inverse_block_masks, num_visible_patches
from .mixing import (
    LogMelScale,
    Sources,
    check_unmixed_spans,
    draw_sources,
    draw_unmixed_spans,
    gather_sources,
    mixed_time_patches,
    partial_mixture,
)
from .modeling_sslam import SSLAMModel, SSLAMPreTrainedModel, gather_patches
from .objective_sslam import (
    SSLAMForPreTrainingOutput,
    Targets,
    channel_std,
    content_share,
    ema_decay,
    mixture_invariant_loss,
    squared_error,
)
from .teacher_sslam import SSLAMTeacher


class SSLAMForPreTraining(SSLAMPreTrainedModel):
    """The SSLAM objective: local and global targets for unmixed and partially mixed audio, and source retention for the mixed.

    A checkpoint holds `sslam.*` (the student), `decoder.*` and `teacher.*`. Loaded from one that has no teacher, such as an encoder's, the
    teacher starts as a copy of the student; an absent decoder starts anew.

    Raises:
        ValueError: if the decoder or the numbers of target layers do not fit the encoder.
    """

    # Tells Transformers what `SSLAMTeacher` itself ensures.
    _keep_in_fp32_modules_strict = ["teacher"]

    def __init__(self, config: SSLAMConfig):
        super().__init__(config)
        depth = config.num_hidden_layers
        for name in ("local_target_layers", "global_target_layers"):
            if (getattr(config, name) or depth) > depth:
                raise ValueError(f"{name} is {getattr(config, name)}, but the encoder has {depth} layers (num_hidden_layers)")
        self.sslam = SSLAMModel(config)
        self.decoder = SSLAMDecoder(config)
        self.teacher = SSLAMTeacher(config)
        self.post_init()
        # An encoder ignores these parts of a checkpoint; here they belong to the model.
        self._keys_to_ignore_on_load_unexpected = []

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Called for the decoder's layers, for student and teacher have methods of their own: torch's defaults.
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            if module is self.decoder.source_projection:  # all sources alike at first: what differs would have to cancel out in their sums
                bound *= 0.01
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint held, at construction and after loading; the teacher as a copy of the student."""
        super().initialize_weights()
        teacher = self.teacher.state_dict(keep_vars=True)  # which may have statistics of targets beside the weights
        for name, student in self.sslam.state_dict().items():
            init.copy_(teacher[name], student)
        self.teacher.requires_grad_(False)  # again each time: loading replaces parameters by new ones

    def requires_grad_(self, requires_grad: bool = True) -> "SSLAMForPreTraining":
        super().requires_grad_(requires_grad)
        self.teacher.requires_grad_(False)  # whatever is thawed
        return self

    @torch.no_grad()
    def update_teacher(self, step: int, skipped: torch.Tensor | None = None) -> None:
        """Move the teacher towards the student: `teacher = d * teacher + (1 - d) * student` with `d` from [`ema_decay`].

        Positions are copied, and statistics of targets averaged over processes. Call it after each optimiser step, on the unwrapped model,
        in all processes.

        Args:
            step: which update it is, counting from 1.
            skipped: `()`, boolean, on the model's device: whether the optimiser skipped the step there, as a fused one does with a
                `found_inf`. The teacher then stays as it is (`d` is 1), and nothing waits for the device. `None`: it was taken.

        Raises:
            ValueError: if `step` is under 1.
        """
        if step < 1:
            raise ValueError(f"step is {step}, but updates count from 1, the first one after the first optimiser step")
        decay = ema_decay(step, self.config.ema_decay, self.config.ema_end_decay, self.config.ema_anneal_end_step)
        averages: list[torch.Tensor] = list(self.teacher.parameters())
        weights = [student.to(average.dtype) for average, student in zip(averages, self.sslam.parameters(), strict=True)]
        if skipped is None:
            torch._foreach_lerp_(averages, weights, 1 - decay)
        else:
            weight = (1 - decay) * (~skipped).to(averages[0].dtype)
            torch._foreach_lerp_(averages, weights, [weight] * len(averages))
        buffers = dict(self.teacher.named_buffers())
        for name, student in self.sslam.named_buffers():
            buffers[name].copy_(student)
        if self.teacher.target_norm is not None:
            self.teacher.target_norm.average_over_processes()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        unmixed_span_starts: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        output_targets: bool = False,
        waveforms: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SSLAMForPreTrainingOutput:
        r"""
        Args:
            input_values: `(batch, frames, num_mel_bins)`, scaled log-mels; `frames` is a multiple of 16.
            bool_masked_pos: `(batch * views, patches)`, boolean, True = masked, one row a view, the views of a clip one after the other,
                with the same number of visible patches in every row. Both halves use the same masks. When absent, `config.num_views` a
                clip are drawn.
            unmixed_span_starts: `(spans,)` or `(batch, spans)`, frames at which the unmixed spans of the mixtures start, multiples of 16.
                When absent they are drawn as the configuration says. Only with `config.use_mixtures`.
            attention_mask: `(batch, frames)`, 1 or `True` where there is sound. It concerns mixtures only: padding is then never mixed in,
                and yields to sound. The published runs had none: there, padding is as loud as any sound of its level.
            generator: source of all random numbers, best on the model's device: in this order masks, spans, sources, noise. By default
                torch's own. `torch.compile` takes no generators, and breaks its graph where given masks or spans are checked: for a single
                graph leave all three out, seed with `torch.manual_seed`, and compile with `dynamic=False`, as the number of masks' blocks
                follows from the shape, and with `options={"fallback_random": True}`, without which the compiler draws other numbers.
            output_targets: whether to return predictions, targets and what was drawn.
            waveforms: `(batch, samples)`, minus each clip's mean, zeros after its end, `samples` as many as `frames` need (164,080 for
                1024). Only with `config.mixing_domain` "waveform", which also needs `attention_mask`.

        Raises:
            ValueError: if the input does not fit the model, masks or spans do not fit the input, or spans are given without mixtures.
        """
        input_values = self.sslam.embeddings.check_input(input_values)
        given = {"bool_masked_pos": bool_masked_pos, "unmixed_span_starts": unmixed_span_starts, "waveforms": waveforms}
        for name, value in given.items():
            if value is not None and not isinstance(value, torch.Tensor):
                raise ValueError(f"{name} is of type {type(value).__name__}, but a tensor is expected")
        if attention_mask is not None:
            attention_mask = as_boolean(attention_mask)
            if attention_mask.shape != input_values.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, but pre-training needs a mask over frames, "
                    f"{tuple(input_values.shape[:2])}"
                )
        masks, visible, masked = self._masks(input_values, bool_masked_pos, generator)
        starts = self._spans(input_values, unmixed_span_starts, generator)
        clips, sources, mixed_patches = input_values, None, None
        if starts is not None:
            sources = self._sources(input_values, attention_mask, waveforms, generator)
            mixture, mixed_patches = self._mix(sources, starts)
            clips = mixture
            if self.config.use_unmixed:
                clips = torch.cat((input_values, mixture))
                visible, masked = visible.repeat(2, 1), masked.repeat(2, 1)

        targets = self._targets(clips, sources, mixed_patches)
        cls, predictions, latent = self._predict(clips, visible, masked, generator, **kwargs)
        output = self._score(cls, predictions, latent, targets, masked, output_targets)
        if output_targets:
            output.bool_masked_pos, output.unmixed_span_starts = masks, starts
            if sources is not None:
                output.mixed_input_values = clips[-len(input_values) :]
                output.partners, output.gain_db, output.present = sources.drawn
        return output

    def _masks(
        self, input_values: torch.Tensor, masks: torch.Tensor | None, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The masks, and for each view the indices of its visible and of its masked patches, in patch order."""
        config = self.config
        batch, time = len(input_values), input_values.shape[1] // config.patch_size
        num_patches = time * config.num_frequency_patches
        if masks is None:
            num_visible = num_visible_patches(num_patches, config.mask_ratio)
            masks = inverse_block_masks(
                batch * config.num_views,
                time,
                config.num_frequency_patches,
                mask_ratio=config.mask_ratio,
                mask_ratio_adjust=config.mask_ratio_adjust,
                block_size=config.mask_block_size,
                generator=generator,
                device=input_values.device,
            )
        else:
            num_visible = count_visible(masks, batch, num_patches)
        order = masks.to(input_values.device, torch.uint8).argsort(dim=1, stable=True)
        return masks, order[:, :num_visible], order[:, num_visible:]

    def _spans(self, input_values: torch.Tensor, starts: torch.Tensor | None, generator: torch.Generator | None) -> torch.Tensor | None:
        """Where the unmixed spans start, or `None` where nothing is mixed."""
        config = self.config
        batch, frames = input_values.shape[:2]
        if not config.use_mixtures:
            if starts is not None:
                raise ValueError("unmixed_span_starts is given, but config.use_mixtures is False: set it to True or leave the spans out")
            return None
        if starts is None:
            return draw_unmixed_spans(
                frames,
                config.num_unmixed_spans,
                config.unmixed_span_length,
                config.patch_size,
                num_clips=batch if config.unmixed_spans_per_clip else None,
                placement=config.unmixed_span_placement,
                generator=generator,
                device=input_values.device,
            )
        check_unmixed_spans(starts, batch, frames, config.unmixed_span_length, config.patch_size)
        return starts.to(input_values.device)

    def _sources(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        waveforms: torch.Tensor | None,
        generator: torch.Generator | None,
    ) -> Sources:
        """The sources of the mixtures."""
        config = self.config
        drawn = draw_sources(
            len(input_values),
            config.num_sources,
            config.mixing_partners,
            config.gain_db,
            generator=generator,
            device=input_values.device,
        )
        scale = LogMelScale(config.log_mel_mean, config.log_mel_std, config.sampling_rate)
        return gather_sources(input_values, drawn, attention_mask, waveforms, config.mixing_domain, scale)

    def _mix(self, sources: Sources, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixtures, (batch, frames, mel bins), and the indices of the patches in which they are mixed, in patch order: (batch, n), or
        (1, n) where all are mixed in the same ones."""
        config, frames = self.config, sources.log_mels.shape[2]
        mixed_time = mixed_time_patches(starts, frames, config.unmixed_span_length, config.patch_size)
        mixture = partial_mixture(sources, mixed_time, config.patch_size)
        # Counted from sizes, not from values: nothing waits for the device.
        num_mixed = (frames - starts.shape[-1] * config.unmixed_span_length) // config.patch_size
        time = mixed_time.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :num_mixed]
        patches = time.unsqueeze(2) * config.num_frequency_patches + torch.arange(config.num_frequency_patches, device=time.device)
        return mixture, patches.flatten(1)

    @torch.no_grad()
    def _targets(self, clips: torch.Tensor, sources: Sources | None, mixed_patches: torch.Tensor | None) -> Targets:
        """The teacher's targets for all clips, and for the sources of the mixtures."""
        depth = self.config.num_hidden_layers
        tokens = self.teacher.embeddings(clips)
        layers = self.config.local_target_layers or depth, self.config.global_target_layers or depth
        local, last = self.teacher.targets(tokens, *layers, update_norm=self.training)
        overall = last.mean(1)
        if sources is None or mixed_patches is None or not self.config.source_retention_loss_weight:
            return Targets(local, overall)
        if self.config.objective == "mixture_invariant":
            return Targets(local, overall, two_mixtures=self.teacher.two_mixtures(tokens, local, sources, mixed_patches))
        return Targets(local, overall, self.teacher.mean_of_sources(tokens, local, sources, mixed_patches))

    def _predict(
        self,
        clips: torch.Tensor,
        visible: torch.Tensor,
        masked: torch.Tensor,
        generator: torch.Generator | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """CLS (views, hidden_size) and the decoder's outputs at masked patches (views, masked, hidden_size), of what is visible; and latent
        sources, if it has any."""
        hidden_states = self.sslam.embeddings(clips, visible)
        for layer in self.sslam.layers:
            hidden_states = layer(hidden_states, **kwargs)
        cls, encoded = hidden_states[:, 0], hidden_states[:, 1:]
        shape = (len(visible), visible.shape[1] + masked.shape[1], encoded.shape[2])
        if self.config.mask_noise_std:
            source = encoded.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=source, dtype=encoded.dtype)
            grid = noise.to(encoded.device).mul_(self.config.mask_noise_std)
        else:
            grid = encoded.new_zeros(shape)
        grid.scatter_(1, visible.unsqueeze(-1).expand_as(encoded), encoded)
        return cls, *self.decoder(grid.unflatten(1, (-1, self.config.num_frequency_patches)), masked)

    def _score(
        self,
        cls: torch.Tensor,
        predictions: torch.Tensor,
        latent: torch.Tensor | None,
        targets: Targets,
        masked: torch.Tensor,
        output_targets: bool,
    ) -> SSLAMForPreTrainingOutput:
        """Losses and the collapse guard's statistics."""
        config = self.config
        num_clips, num_views, sample_size = len(targets.local), len(cls), masked.numel()
        predictions = predictions.float()  # once for all that follows
        local_targets = gather_patches(targets.local, masked)
        local_loss = squared_error(predictions, local_targets) / sample_size
        global_loss = squared_error(cls, targets.overall.repeat_interleave(num_views // num_clips, dim=0)) * config.global_loss_weight
        if config.global_loss_reduction == "mean":
            global_loss = global_loss / num_views
        loss = local_loss + global_loss
        retention_loss = retention_targets = assignments = None
        if targets.retained is not None:
            retention_targets = gather_patches(targets.retained, masked[num_views // 2 :])
            retention_loss = squared_error(predictions[num_views // 2 :], retention_targets) / sample_size
        elif targets.two_mixtures is not None and latent is not None:
            mixed = masked[num_views // 2 :]
            first, second, mixed_in = targets.two_mixtures
            there = gather_patches(mixed_in.unsqueeze(-1), mixed).squeeze(-1)
            latent_loss, assignments = mixture_invariant_loss(latent, gather_patches(first, mixed), gather_patches(second, mixed), there)
            retention_loss = latent_loss / sample_size
        if retention_loss is not None:
            retention_loss = retention_loss * config.source_retention_loss_weight
            loss = loss + retention_loss
        output = SSLAMForPreTrainingOutput(
            loss=loss,
            local_loss=local_loss,
            global_loss=global_loss,
            source_retention_loss=retention_loss,
            loss_sum=loss * sample_size,
            sample_size=masked.new_full((), sample_size),  # without waiting for the device
            target_std=channel_std(local_targets),
            prediction_std=channel_std(predictions),
            content_share=content_share(targets.local[: num_clips // 2 if config.use_mixtures and config.use_unmixed else num_clips]),
        )
        if output_targets:
            output.predictions, output.cls_predictions = predictions, cls
            output.local_targets, output.global_targets, output.source_retention_targets = local_targets, targets.overall, retention_targets
            output.latent_predictions, output.assignments = latent, assignments
        return output


__all__ = ["SSLAMForPreTraining", "SSLAMForPreTrainingOutput"]
