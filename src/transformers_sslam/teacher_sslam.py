"""The teacher of pre-training, which receives all patches and makes the targets."""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_sslam import SSLAMConfig
from .mixing import Sources, partial_mixture
from .modeling_sslam import SSLAMModel, gather_patches
from .objective_sslam import RunningNorm, TwoMixtures


class SSLAMTeacher(SSLAMModel):
    """A moving average of the student that makes the targets: never trained, always in eval mode, never narrower than float32."""

    def __init__(self, config: SSLAMConfig):
        super().__init__(config)
        num_patches = config.max_length // config.patch_size * config.num_frequency_patches
        self.target_norm = None
        if config.target_normalization == "running":
            self.target_norm = RunningNorm(config.num_hidden_layers, num_patches, config.hidden_size)
        self.float()
        self.train(False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RunningNorm):
            for buffer in module.buffers():
                init.zeros_(buffer)
        else:
            super()._init_weights(module)

    def train(self, mode: bool = True) -> "SSLAMTeacher":
        return super().train(False)

    def _apply(self, fn, recurse: bool = True):
        # Behind `.to()`, `.half()`, `.cuda()` and the like. An update of 2e-4 does not move a bfloat16 weight at all, so devices change,
        # but the type is never narrower than float32.
        def keep_wide(tensor: torch.Tensor) -> torch.Tensor:
            probe = fn(tensor.new_empty(0))
            return tensor.to(probe.device, torch.float32) if probe.element_size() < 4 else fn(tensor)

        return super()._apply(keep_wide, recurse)

    @torch.no_grad()
    def targets(
        self, tokens: torch.Tensor, *num_layers: int, positions: torch.Tensor | None = None, update_norm: bool = False
    ) -> list[torch.Tensor]:
        """For each number of top blocks, their target: (clips, 1 + n, hidden_size) -> (clips, n, hidden_size), float32.

        Each block's MLP output, before its residual and without CLS, is normalised as `config.target_normalization` says: over the patches
        of the clip that are there, or by running statistics at their `positions`, (clips, n), into which `update_norm` takes this batch
        first. The blocks are averaged, and the average layer-normalised.
        """
        sums = {n: torch.zeros((), device=tokens.device) for n in num_layers}
        for from_top, layer in zip(range(len(self.layers), 0, -1), self.layers):
            tokens, mlp_output = layer(tokens, return_mlp_output=True)
            if from_top > max(num_layers):
                continue
            patches = mlp_output[:, 1:].float()
            if self.target_norm is not None:
                normalised = self.target_norm(patches, len(self.layers) - from_top, positions, update_norm)
            else:
                # Over the second axis a mean of squares takes a quarter of the time of `torch.var_mean`, on a CPU.
                patches = patches - patches.mean(1, keepdim=True)
                normalised = patches * (patches.square().mean(1, keepdim=True) + 1e-5).rsqrt()
            sums = {n: total + normalised if from_top <= n else total for n, total in sums.items()}
        return [nn.functional.layer_norm(sums[n] / n, tokens.shape[-1:]) for n in num_layers]

    @torch.no_grad()
    def mean_of_sources(self, tokens: torch.Tensor, local: torch.Tensor, sources: Sources, mixed_patches: torch.Tensor) -> torch.Tensor:
        """The mean of the local targets of each mixture's sources, not normalised again: (batch, patches, hidden_size), float32.

        The teacher receives a source as the mixture has it: with its gain, and without the unmixed spans, where the clip's own target is
        used.

        Args:
            tokens: (batch or more, 1 + patches, hidden_size), embeddings of the clips, and perhaps of others behind them.
            local: (batch or more, patches, hidden_size), their local targets.
            sources: of the mixtures.
            mixed_patches: (batch or 1, n), where they are mixed in, in patch order.
        """
        drawn, batch = sources.drawn, sources.log_mels.shape[1]
        own, others = local[:batch], drawn.partners.flatten()
        if drawn.gain_db is not None:
            foreign = self._local_of_mixed(self.embeddings(sources.log_mels[1:].flatten(0, 1)), mixed_patches)
        elif len(mixed_patches) == 1:  # a clip is the same in every mixture: one pass each, in the order of the published code
            foreign = self._local_of_mixed(tokens[:batch].roll(1, dims=0), mixed_patches)[(others + 1) % batch]
        else:
            foreign = self._local_of_mixed(tokens[others], mixed_patches)
        index = mixed_patches.unsqueeze(-1).expand(batch, -1, own.shape[-1])
        total = own
        for i, source in enumerate(foreign.unflatten(0, (-1, batch))):
            target = own.scatter(1, index, source)
            total = total + (target if drawn.present is None else target * drawn.present[i, :, None, None])
        counts = drawn.counts()
        return total / (counts if isinstance(counts, int) else counts[:, None, None])

    @torch.no_grad()
    def two_mixtures(self, tokens: torch.Tensor, local: torch.Tensor, sources: Sources, mixed_patches: torch.Tensor) -> TwoMixtures:
        """The targets of the two mixtures that each mixture consists of. Its sources belong to them in turns: to the first, which has the
        clip itself, the first source, the third and so on, to the second, which is not in the unmixed spans, the others.

        For the arguments see `mean_of_sources`.
        """
        batch, count = sources.log_mels.shape[1], len(sources.log_mels)
        mixed_in = torch.zeros(len(mixed_patches), local.shape[1], dtype=torch.bool, device=local.device).scatter_(1, mixed_patches, True)
        first = local[:batch]
        if count > 2:
            mixed_time = mixed_in[:, :: self.config.num_frequency_patches]
            mixture = partial_mixture(sources, mixed_time, self.config.patch_size, slice(0, None, 2))
            (first,) = self.targets(self.embeddings(mixture), self.config.local_target_layers or self.config.num_hidden_layers)
        if count > 2 or sources.drawn.gain_db is not None:
            foreign = self.embeddings(sources.mix(slice(1, None, 2)))
        else:
            foreign = tokens[sources.drawn.partners[0]]
        index = mixed_patches.unsqueeze(-1).expand(batch, -1, local.shape[-1])
        second = torch.zeros_like(first).scatter(1, index, self._local_of_mixed(foreign, mixed_patches))
        return TwoMixtures(first, second, mixed_in)

    def _local_of_mixed(self, tokens: torch.Tensor, mixed_patches: torch.Tensor) -> torch.Tensor:
        """Local targets where the teacher receives the mixed patches alone: (clips, 1 + patches, hidden_size) -> (clips, n, hidden_size).
        The rows of `mixed_patches` are those of the first clips, and of as many after these."""
        patches = mixed_patches.repeat(len(tokens) // len(mixed_patches), 1)
        mixed_in = torch.cat((tokens[:, :1], gather_patches(tokens[:, 1:], patches)), dim=1)
        (local,) = self.targets(mixed_in, self.config.local_target_layers or self.config.num_hidden_layers, positions=patches)
        return local
