"""The SSLAM encoder and its classifier.

A ViT over 16 x 16 patches of a log-mel with fixed positions, a CLS token, a norm before the first block and post-norm blocks (SSLAM,
arXiv 2506.12222, which keeps the encoder of EAT, arXiv 2401.03497).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention_sslam import as_boolean, eager_attention_forward, without_autocast
from .configuration_sslam import SSLAMConfig
from .inference_sslam import SSLAMEncodingMixin, SSLAMScoringMixin
from .loading_sslam import SSLAMLoadingMixin, flatten_patch_projection
from .losses_sslam import labelled_loss
from .pooling_sslam import SSLAMLayerPooling, pool_tokens, pooled_width, sounding_tokens


@dataclass
class SSLAMModelOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state: `(batch, 1 + patches, hidden_size)`, output of the last block, CLS first; there is no final norm.
        pooler_output: `(batch, pooled width)`, the CLS token or the pooled patch tokens, see `SSLAMConfig.classifier_pooling`.
        layer_pooler_outputs: with `config.layer_pooling`, `(batch, blocks, pooled width)`, the same of each block.
        hidden_states: with `output_hidden_states=True`, the first block's input and each block's output.
        attentions: with `output_attentions=True`, `(batch, heads, tokens, tokens)` for each block (eager attention only).
        mlp_outputs: with `output_mlp_outputs=True`, each block's MLP output before its residual, `(batch, 1 + patches, hidden_size)`: the
            layers' targets in pre-training, and the representation that the objective shapes most directly.
    """

    layer_pooler_outputs: torch.Tensor | None = None
    mlp_outputs: tuple[torch.FloatTensor, ...] | None = None


def sincos_position_table(config: SSLAMConfig) -> torch.Tensor:
    """Fixed 2-D positions of every patch up to `config.max_length` frames: `(1, patches, hidden_size)`, float32, patch `8 t + f`.

    The first half of the channels encodes the frequency index `f`, the second the time index `t`, each as `[sin(p w), cos(p w)]` with
    `w_i = 10000 ** (-i / (hidden_size / 4))`, all times `config.position_embedding_scale`. Computed in float64 on the CPU.
    """
    quarter = config.hidden_size // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)

    def encode(positions: int) -> torch.Tensor:
        angles = torch.arange(positions, dtype=torch.float64, device="cpu").outer(omega)
        return torch.cat((angles.sin(), angles.cos()), dim=1).float()

    time, frequency = encode(config.max_length // config.patch_size), encode(config.num_frequency_patches)
    grid = torch.cat((frequency.expand(len(time), -1, -1), time[:, None].expand(-1, len(frequency), -1)), dim=-1)
    return grid.flatten(0, 1)[None] * config.position_embedding_scale


def gather_patches(patches: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take patches `index`, (views, n), of each view's clip: (clips, patches, width) -> (views, n, width). Nothing is repeated per view."""
    clips, num_patches, width = patches.shape
    first = torch.arange(len(index), device=index.device) // (len(index) // clips) * num_patches
    flat = (index + first.unsqueeze(1)).flatten()
    return patches.reshape(-1, width).index_select(0, flat).view(*index.shape, width)


class SSLAMPatchEmbeddings(nn.Module):
    """Cuts a log-mel into patches and projects them: (batch, frames, mel bins) -> (batch, patches, hidden_size), patch `8 t + f`."""

    def __init__(self, config: SSLAMConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.projection = nn.Linear(config.patch_size**2, config.hidden_size)
        self.register_load_state_dict_pre_hook(flatten_patch_projection)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        size = self.patch_size
        return self.projection(input_values.unflatten(2, (-1, size)).unflatten(1, (-1, size)).transpose(2, 3).flatten(3).flatten(1, 2))


class SSLAMEmbeddings(nn.Module):
    """Tokens for the first block: patches with their positions, behind a CLS token that has none, all normalised."""

    position_embeddings: torch.Tensor

    def __init__(self, config: SSLAMConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = SSLAMPatchEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        # A buffer in the checkpoint and not recomputed: a published table may have been rounded by its half-precision run.
        self.register_buffer("position_embeddings", sincos_position_table(config).to(self.cls_token))  # its device and dtype
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def check_input(self, input_values: torch.Tensor | None) -> torch.Tensor:
        """`input_values`, unless they are not what the model takes: then a ValueError says what is expected."""
        if not isinstance(input_values, torch.Tensor):
            kind = "None" if input_values is None else f"of type {type(input_values).__name__}"
            raise ValueError(f'input_values is {kind}: give the log-mels that SSLAMFeatureExtractor makes with return_tensors="pt"')
        bins, size, longest = self.config.num_mel_bins, self.config.patch_size, self.config.max_length
        if input_values.dim() != 3 or input_values.shape[2] != bins or not input_values.is_floating_point():
            raise ValueError(
                f"input_values has shape {tuple(input_values.shape)} and type {input_values.dtype}, but floats (batch, frames, {bins} mel "
                "bins) are expected: make them with the model's feature extractor"
            )
        batch, frames = input_values.shape[:2]
        if batch == 0:
            raise ValueError("input_values holds no clip: give at least one")
        if frames == 0 or frames % size:
            raise ValueError(
                f"input_values has {frames} frames, but a positive multiple of {size} (the patch size) is expected: pad it, as "
                "SSLAMFeatureExtractor does"
            )
        if frames > longest:
            raise ValueError(
                f"input_values has {frames} frames, but the position table ends at {longest} ({longest / 100:g} s): cut the audio into "
                "windows"
            )
        return input_values

    def forward(self, input_values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, frames, mel bins) -> (batch, 1 + patches, hidden_size), or of the patches `visible`, indices (views, n), alone:
        (views, 1 + n, hidden_size). They are selected here because only a module that is called as a whole can be offloaded or sharded."""
        patches = self.patch_embeddings(input_values.to(self.cls_token.dtype))
        patches = patches + self.position_embeddings[:, : patches.shape[1]]
        if visible is not None:
            patches = gather_patches(patches, visible)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        return self.dropout(self.layernorm(torch.cat((cls_token, patches), dim=1)))


class SSLAMAttention(nn.Module):
    def __init__(self, config: SSLAMConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=config.qkv_bias) for _ in range(3))
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        by_head = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(by_head).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        context, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(context.reshape(hidden_states.shape)), weights


class SSLAMMLP(nn.Module):
    """Its output, before the block's residual, is the block's target in pre-training."""

    def __init__(self, config: SSLAMConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class SSLAMDropPath(nn.Module):
    """Stochastic depth: in training, zeroes a residual branch for a random proportion `rate` of the clips and scales up the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * kept.to(branch.dtype) / (1 - self.rate)


class SSLAMLayer(GradientCheckpointingLayer):
    """A post-norm block: `x = norm1(x + attention(x)); x = norm2(x + mlp(x))`. On request, `mlp(x)` is returned beside its output."""

    def __init__(self, config: SSLAMConfig, drop_path_rate: float):
        super().__init__()
        self.attention = SSLAMAttention(config)
        self.layernorm_after_attention = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SSLAMMLP(config)
        self.layernorm_after_mlp = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = SSLAMDropPath(drop_path_rate)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        return_mlp_output: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = self.layernorm_after_attention(hidden_states + self.drop_path(self.dropout(attended)))
        mlp_output = self.mlp(hidden_states)
        hidden_states = self.layernorm_after_mlp(hidden_states + self.drop_path(self.dropout(mlp_output)))
        return (hidden_states, mlp_output) if return_mlp_output else hidden_states


class SSLAMPreTrainedModel(SSLAMLoadingMixin):
    """Weights, initialisation and capabilities that all SSLAM models share."""

    config: SSLAMConfig
    base_model_prefix = "sslam"
    main_input_name = "input_values"
    input_modalities = "audio"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SSLAMEmbeddings", "SSLAMLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": SSLAMLayer,
        "attentions": SSLAMAttention,
        "mlp_outputs": OutputRecorder(SSLAMMLP, index=0),
    }
    _input_embed_layer = "patch_embeddings"
    # An encoder or classifier takes what it needs from a pre-training checkpoint, and does not report the rest.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^teacher\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module is self.get_input_embeddings().projection:
            init.xavier_uniform_(module.weight, gain=self.config.patch_embedding_gain)
            init.zeros_(module.bias)
        elif isinstance(module, SSLAMEmbeddings):
            init.normal_(module.cls_token)
            init.copy_(module.position_embeddings, sincos_position_table(module.config))
        elif isinstance(module, SSLAMLayerPooling):
            for parameter in module.parameters():
                init.zeros_(parameter)
        else:
            super()._init_weights(module)  # linear layers N(0, initializer_range), biases 0, norms 1 and 0


class SSLAMModel(SSLAMPreTrainedModel, SSLAMEncodingMixin):
    """The SSLAM encoder: a log-mel in, a clip embedding and frame embeddings out."""

    # Nor a classifier's head.
    _keys_to_ignore_on_load_unexpected = [r"^(decoder|teacher|(frame_)?classifier|layernorm|layer_pooling|\w+_attention)\."]

    def __init__(self, config: SSLAMConfig):
        super().__init__(config)
        self.embeddings = SSLAMEmbeddings(config)
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(SSLAMLayer(config, config.drop_path_rate * i / max(1, depth - 1)) for i in range(depth))
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SSLAMModelOutput:
        r"""
        Args:
            input_values: `(batch, frames, num_mel_bins)`, scaled log-mels from [`SSLAMFeatureExtractor`]; `frames` is a multiple of 16, up
                to `config.max_length`.
            attention_mask: `(batch, frames)` as the feature extractor returns it, or `(batch, 1 + patches)` over tokens, CLS first; 1 or
                `True` where there is sound. With a mask over frames, the content of masked frames has no influence: patches
                without sound are not attended to, and in a patch that is partly sound the rest is replaced by `config.padding_value`.
            output_hidden_states, output_attentions, output_mlp_outputs: see [`SSLAMModelOutput`].

        In training with `config.patch_drop_rate` the output holds the tokens that are left.

        Raises:
            ValueError: if the input does not fit the model, or the mask is neither over frames nor over tokens.
        """
        input_values, token_mask = self.embeddings.check_input(input_values), None
        if attention_mask is not None:
            input_values, token_mask = self._apply_mask(input_values, attention_mask)
        hidden_states = self.embeddings(input_values)
        if self.training and self.config.patch_drop_rate:
            hidden_states, token_mask = self._drop_patches(hidden_states, token_mask)
        bias = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask)
        pooling, frequencies, pooled = self.config.classifier_pooling, self.config.num_frequency_patches, []
        for layer in self.layers:
            hidden_states = layer(hidden_states, bias, **kwargs)
            if self.config.layer_pooling is not None:  # copied, as a view would keep all of the block's tokens
                pooled.append(pool_tokens(hidden_states, token_mask, pooling, frequencies).clone())
        last, layers = pool_tokens(hidden_states, token_mask, pooling, frequencies), torch.stack(pooled, dim=1) if pooled else None
        return SSLAMModelOutput(last_hidden_state=hidden_states, pooler_output=last, layer_pooler_outputs=layers)

    def frame_embeddings(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """Patch tokens on their grid: a view `(batch, time, frequency, hidden_size)` of `last_hidden_state`.

        A step is 160 ms in time and 16 mel bins in frequency, from low to high. `.mean(2)` gives one embedding every 160 ms. For a
        padded batch, `attention_mask.unflatten(1, (-1, config.patch_size)).any(-1)`, `(batch, time)`, says which steps hold sound.
        """
        return last_hidden_state[:, 1:].unflatten(1, (-1, self.config.num_frequency_patches))

    def _apply_mask(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The input with masked frames blanked, and the mask over tokens, (batch, 1 + patches), boolean."""
        batch, frames = input_values.shape[:2]
        size, patches_per_step = self.config.patch_size, self.config.num_frequency_patches
        tokens = 1 + frames // size * patches_per_step
        mask = as_boolean(attention_mask)
        if mask.shape == (batch, frames):
            input_values = input_values.masked_fill(~mask.unsqueeze(-1), self.config.padding_value)
            mask = sounding_tokens(mask, size, patches_per_step)
        elif mask.shape != (batch, tokens):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, but must be over frames, {(batch, frames)}, or over tokens (CLS "
                f"and patches), {(batch, tokens)}"
            )
        return input_values, mask

    def _drop_patches(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """CLS and a random choice of each clip's patches, in their order, and the mask over these."""
        batch, patches = hidden_states.shape[0], hidden_states.shape[1] - 1
        kept = patches - int(patches * self.config.patch_drop_rate)
        chosen = torch.rand(batch, patches, device=hidden_states.device).topk(kept, dim=1).indices.sort(dim=1).values
        tokens = nn.functional.pad(chosen + 1, (1, 0))
        token_mask = None if token_mask is None else token_mask.gather(1, tokens)
        return hidden_states.gather(1, tokens.unsqueeze(-1).expand(-1, -1, hidden_states.shape[2])), token_mask


class SSLAMForAudioClassification(SSLAMPreTrainedModel, SSLAMScoringMixin):
    """The encoder with a layer norm and a linear layer on its pooled output, for tags (multi-label) or classes.

    Their width depends on `config.classifier_pooling`. With `config.layer_pooling` the layer norm is applied to the pooled output of each
    block, and the linear layer reads their combination.
    """

    # Its loss is the mean over a batch: where gradients are accumulated, `Trainer` has to divide by their number.
    accepts_loss_kwargs = False

    def __init__(self, config: SSLAMConfig):
        super().__init__(config)
        config.normalize_labels()
        self.num_labels = config.num_labels
        self.sslam = SSLAMModel(config)
        width = pooled_width(config.classifier_pooling, config)
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layer_pooling: nn.Module = nn.Identity()  # without parameters: a checkpoint has the same ones as before there was a choice
        if config.layer_pooling is not None:
            self.layer_pooling = SSLAMLayerPooling(config.num_hidden_layers, width, gated=config.layer_pooling == "gated")
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(width, config.num_labels)  # type: ignore[arg-type]  # set in every config
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_values: `(batch, frames, num_mel_bins)`, see [`SSLAMModel`].
            labels: `(batch,)`, class indices: cross-entropy; `(batch, num_labels)`, in [0, 1] or -100 where unknown: binary cross-entropy
                for tags that overlap; `(batch,)` with one label: squared error. `config.problem_type` decides where it is set.
            attention_mask: see [`SSLAMModel`].

        Returns:
            `logits: (batch, num_labels)` before softmax or sigmoid, `loss` if there are labels, hidden states and attentions on request.
            (MLP outputs are the encoder's alone: ask `model.sslam`.)
        """
        outputs: SSLAMModelOutput = self.sslam(input_values, attention_mask=attention_mask, **{**kwargs, "return_dict": True})
        pooled = outputs.pooler_output if self.config.layer_pooling is None else outputs.layer_pooler_outputs
        logits = self._classify(pooled)  # type: ignore[arg-type]  # an encoder always gives one
        loss = None if labels is None else labelled_loss(self.loss_function, labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    @without_autocast
    def _classify(self, pooled: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.layer_pooling(self.layernorm(pooled))))


__all__ = ["SSLAMForAudioClassification", "SSLAMModel", "SSLAMModelOutput", "SSLAMPreTrainedModel"]
