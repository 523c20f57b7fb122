"""The pre-training step written plainly, as one would first write it: what the fast one is measured against, and has to agree with.

The same weights, masks, mixtures and random numbers; eager attention with its scores in memory, every activation kept for the backward
pass, a decoder over grids in PyTorch's usual layout that also projects what is visible, targets repeated for every view and then picked by
their masks, all of the teacher's blocks kept until they are averaged, a moving average and an optimiser that go from tensor to tensor.
"""

import torch
from torch import nn

from transformers_sslam.decoder_sslam import SSLAMDecoder
from transformers_sslam.modeling_sslam_pretraining import SSLAMForPreTraining
from transformers_sslam.objective_sslam import SSLAMForPreTrainingOutput, ema_decay
from transformers_sslam.teacher_sslam import SSLAMTeacher


class PlainDecoder(SSLAMDecoder):
    def forward(self, grid: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, None]:
        features = grid.permute(0, 3, 1, 2).contiguous()
        for convolution in self.layers:
            before = features
            features = convolution(features).permute(0, 2, 3, 1)
            features = nn.functional.layer_norm(features, features.shape[-1:]).permute(0, 3, 1, 2).contiguous()
            features = nn.functional.gelu(features)
            if features.shape == before.shape:
                features = before + features
        everywhere = self.projection(features.flatten(2).transpose(1, 2))
        return everywhere[_as_mask(masked, everywhere.shape[1])].view(*masked.shape, -1), None


class PlainTeacher(SSLAMTeacher):
    @torch.no_grad()
    def targets(self, tokens: torch.Tensor, *num_layers: int, positions=None, update_norm=False) -> list[torch.Tensor]:
        outputs = []  # normalised over each clip, as published: positions play no part
        for layer in self.layers:
            tokens, mlp_output = layer(tokens, return_mlp_output=True)
            outputs.append(nn.functional.instance_norm(mlp_output[:, 1:].float().transpose(1, 2)).transpose(1, 2))
        return [nn.functional.layer_norm(torch.stack(outputs[-n:]).mean(0), tokens.shape[-1:]) for n in num_layers]


class PlainForPreTraining(SSLAMForPreTraining):
    """Takes the weights of a [`SSLAMForPreTraining`] of the same configuration, in eager attention."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder.__class__, self.teacher.__class__ = PlainDecoder, PlainTeacher

    def _score(self, cls, predictions, latent, targets, masked, output_targets) -> SSLAMForPreTrainingOutput:
        config = self.config
        views = len(cls) // len(targets.local)
        mask = _as_mask(masked, targets.local.shape[1])

        def error(outputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return ((outputs.float() - wanted) ** 2).sum() / outputs.shape[-1] ** 0.5

        local_targets = targets.local.repeat_interleave(views, dim=0)[mask].view_as(predictions)
        local_loss = error(predictions, local_targets) / mask.sum()
        global_loss = error(cls, targets.overall.repeat_interleave(views, dim=0)) * config.global_loss_weight
        global_loss = global_loss / len(cls) if config.global_loss_reduction == "mean" else global_loss
        retention_loss = torch.zeros_like(local_loss)
        if targets.retained is not None:
            mixed, half = predictions[len(predictions) // 2 :], mask[len(mask) // 2 :]
            retained = targets.retained.repeat_interleave(views, dim=0)[half].view_as(mixed)
            retention_loss = config.source_retention_loss_weight * error(mixed, retained) / mask.sum()
        unmixed = targets.local[: len(targets.local) // 2] if config.use_mixtures else targets.local
        return SSLAMForPreTrainingOutput(
            loss=local_loss + global_loss + retention_loss,
            local_loss=local_loss,
            global_loss=global_loss,
            source_retention_loss=retention_loss,
            sample_size=masked.new_full((), masked.numel()),
            target_std=(local_targets.flatten(0, 1).var(0) + 1e-6).sqrt().mean(),
            prediction_std=(predictions.detach().float().flatten(0, 1).var(0) + 1e-6).sqrt().mean(),
            content_share=unmixed.var(0).mean() / unmixed.flatten(0, 1).var(0).mean(),
        )

    @torch.no_grad()
    def update_teacher(self, step: int, skipped: torch.Tensor | None = None) -> None:
        if skipped is not None and skipped:  # plainly: by asking the device
            return
        config = self.config
        decay = ema_decay(step, config.ema_decay, config.ema_end_decay, config.ema_anneal_end_step)
        for average, weight in zip(self.teacher.parameters(), self.sslam.parameters()):
            average.mul_(decay).add_(weight.to(average.dtype), alpha=1 - decay)


def _as_mask(index: torch.Tensor, patches: int) -> torch.Tensor:
    """(rows, n) patches in ascending order -> (rows, patches), boolean."""
    return torch.zeros(len(index), patches, dtype=torch.bool, device=index.device).scatter_(1, index, True)
