"""The decoder of pre-training, which predicts what is masked."""

from collections.abc import Callable

import torch
from torch import nn

from .configuration_sslam import SSLAMConfig
from .modeling_sslam import gather_patches


class SSLAMDecoder(nn.Module):
    """Predicts the masked patches from the visible ones around them: grouped convolutions over the grid of patches, and a projection."""

    gradient_checkpointing = False  # `gradient_checkpointing_enable` sets it, and beside it the function
    _gradient_checkpointing_func: Callable[..., torch.Tensor]

    def __init__(self, config: SSLAMConfig):
        super().__init__()
        if config.hidden_size % config.decoder_num_groups:
            raise ValueError(
                f"hidden_size is {config.hidden_size} and decoder_num_groups is {config.decoder_num_groups}, but the decoder needs a width "
                "that is a multiple of its groups: change one of them"
            )
        width, kernel = config.decoder_hidden_size, config.decoder_kernel_size
        inputs = [config.hidden_size] + [width] * (config.decoder_num_hidden_layers - 1)
        self.layers = nn.ModuleList(
            nn.Conv2d(channels, width, kernel, padding=kernel // 2, groups=config.decoder_num_groups) for channels in inputs
        )
        self.projection = nn.Linear(width, config.hidden_size)
        self.source_projection = None
        if config.objective == "mixture_invariant":
            self.source_projection = nn.Linear(width, config.num_latent_sources * config.hidden_size)

    def forward(self, grid: torch.Tensor, masked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(views, time, frequency, hidden_size) and indices (views, n) of masked patches -> (views, n, hidden_size); and, in the
        mixture-invariant baseline, of the second half of the views, which are of mixtures: (views / 2, n, latent sources, hidden_size)."""
        for convolution in self.layers:
            if self.gradient_checkpointing and self.training:
                grid = self._gradient_checkpointing_func(self._convolve, convolution, grid)
            else:
                grid = self._convolve(convolution, grid)
        features = gather_patches(grid.flatten(1, 2), masked)
        if self.source_projection is None:
            return self.projection(features), None
        latent = self.source_projection(features[len(features) // 2 :])
        return self.projection(features), latent.unflatten(2, (-1, self.projection.out_features))

    @staticmethod
    def _convolve(convolution: nn.Module, grid: torch.Tensor) -> torch.Tensor:
        # Seen as (views, hidden_size, time, frequency), a grid with its channels last in memory is just what is fastest here.
        features = convolution(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        features = nn.functional.gelu(nn.functional.layer_norm(features, features.shape[-1:]))
        # In place, because no backward pass needs the activation's output, and in its type: under autocast what the norm returns, which
        # is float32 on a GPU and half precision on a CPU.
        return features.add_(grid) if grid.shape == features.shape else features
