"""The SSLAM encoder and its classifier.

A ViT over 16 x 16 patches of a log-mel with fixed positions, a CLS token, a norm before the first block and post-norm blocks (SSLAM,
arXiv 2506.12222, which keeps the encoder of EAT, arXiv 2401.03497).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_sslam import SSLAMConfig
from .feature_extraction_sslam import SSLAMFeatureExtractor
from .inference import Audio, Block, ScoresOverTime, WindowScores, encode, score_over_time, score_windows


# Measured with 52, 103, 129 and 513 tokens on a processor with bfloat16 matrix instructions.
MAX_TOKENS_WRITTEN_OUT = 256


@dataclass
class SSLAMModelOutput(BaseModelOutputWithPooling):
    """
    Args:
        last_hidden_state: `(batch, 1 + patches, hidden_size)`, output of the last block, CLS first; there is no final norm.
        pooler_output: `(batch, hidden_size)`, the CLS token or the mean of the patch tokens, see `SSLAMConfig.classifier_pooling`.
        hidden_states: with `output_hidden_states=True`, the first block's input and each block's output.
        attentions: with `output_attentions=True`, `(batch, heads, tokens, tokens)` for each block (eager attention only).
        mlp_outputs: with `output_mlp_outputs=True`, each block's MLP output before its residual, `(batch, 1 + patches, hidden_size)`: the
            layers' targets in pre-training, and the representation that the objective shapes most directly.
    """

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


class SSLAMPatchProjection(nn.Conv2d):
    """A convolution whose windows do not overlap, computed as a linear layer of flattened patches: the same numbers, without a layout that
    makes the backward pass of a convolution with one channel slow (20 times, in bfloat16 on a CPU). The weights keep a convolution's shape,
    as in every published checkpoint; the input does not."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(batch, patches, pixels) -> (batch, patches, hidden_size)"""
        return nn.functional.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class SSLAMPatchEmbeddings(nn.Module):
    """Cuts a log-mel into patches and projects them: (batch, frames, mel bins) -> (batch, patches, hidden_size), patch `8 t + f`."""

    def __init__(self, config: SSLAMConfig):
        super().__init__()
        self.patch_size, self.num_mel_bins = config.patch_size, config.num_mel_bins
        self.projection = SSLAMPatchProjection(1, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def check(self, input_values: torch.Tensor) -> None:
        """Raise a ValueError unless `input_values` is (batch, frames, mel bins), frames a positive multiple of the patch size."""
        if input_values.dim() != 3 or input_values.shape[2] != self.num_mel_bins:
            raise ValueError(
                f"input_values has shape {tuple(input_values.shape)}, but (batch, frames, {self.num_mel_bins} mel bins) is expected: make "
                "it with the model's feature extractor"
            )
        frames = input_values.shape[1]
        if frames == 0 or frames % self.patch_size:
            raise ValueError(
                f"input_values has {frames} frames, but a positive multiple of {self.patch_size} (the patch size) is expected: pad it, as "
                "SSLAMFeatureExtractor does"
            )

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        self.check(input_values)
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

    def forward(self, input_values: torch.Tensor, visible: torch.Tensor | None = None) -> torch.Tensor:
        """(batch, frames, mel bins) -> (batch, 1 + patches, hidden_size), or with `visible`, indices (views, n) of the patches that are
        seen, (views, 1 + n, hidden_size).

        The student's selection is made in here, for only a module that is called as a whole can be offloaded or sharded.
        """
        patches = self.patch_embeddings(input_values)
        if patches.shape[1] > self.position_embeddings.shape[1]:
            raise ValueError(
                f"input_values has {input_values.shape[1]} frames, but the position table ends at {self.config.max_length} "
                f"({self.config.max_length / 100:g} s): cut the audio into windows"
            )
        patches = patches + self.position_embeddings[:, : patches.shape[1]]
        if visible is not None:
            patches = gather_patches(patches, visible)
        cls_token = self.cls_token.expand(patches.shape[0], -1, -1)
        return self.dropout(self.layernorm(torch.cat((cls_token, patches), dim=1)))


def as_boolean(attention_mask: torch.Tensor) -> torch.Tensor:
    """The mask with `True` where there is sound.

    Raises:
        ValueError: if it is a mask that is added to attention scores, whose zeros say the opposite.
    """
    if attention_mask.is_floating_point() and not torch.compiler.is_compiling() and (attention_mask < 0).any():
        raise ValueError(
            "attention_mask holds negative values, as masks that are added to attention scores do, but 1 (sound) and 0 (padding) are "
            "expected: give the mask that the feature extractor returns"
        )
    return attention_mask.to(torch.bool)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, for its weights: (batch, heads, tokens, head size) -> (batch, tokens, heads, head size)."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class SSLAMAttention(nn.Module):
    def __init__(self, config: SSLAMConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        by_head = (*hidden_states.shape[:-1], self.config.num_attention_heads, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(by_head).transpose(1, 2) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropout = self.attention_dropout if self.training else 0.0
        arguments = (self, query, key, value, attention_mask)
        if attention_mask is None and self._is_faster_written_out(query):
            context, weights = eager_attention_forward(*arguments, scaling=self.scaling, dropout=dropout)[0], None
        else:
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            context, weights = attend(*arguments, scaling=self.scaling, dropout=dropout, **kwargs)
        return self.o_proj(context.reshape(hidden_states.shape)), weights

    def _is_faster_written_out(self, query: torch.Tensor) -> bool:
        """Whether SDPA was asked for, but is slow here: in half precision on a CPU its backward pass takes three to five times as long as
        that of attention written out, for as few tokens as a pre-training student sees. At 513 tokens it is ahead."""
        trains_in_half = query.requires_grad and query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
        return trains_in_half and self.config._attn_implementation == "sdpa" and query.shape[2] <= MAX_TOKENS_WRITTEN_OUT


class SSLAMMLP(nn.Module):
    """Its output, before the block's residual, is the block's target in pre-training."""

    def __init__(self, config: SSLAMConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, recompute_activation: bool = False) -> torch.Tensor:
        """`recompute_activation`: the backward pass computes the activation again, whose output is a block's widest tensor, and the forward
        pass does not keep it. (Checkpointing stops before the linear layer: behind the activation nothing is missing.)"""
        hidden_states = self.fc1(hidden_states)
        if recompute_activation:
            return checkpoint(self._contract, hidden_states, use_reentrant=False)
        return self._contract(hidden_states)

    def _contract(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(hidden_states))


class SSLAMDropPath(nn.Module):
    """Stochastic depth: in training, zeroes a residual branch for a random share `rate` of the clips and scales up the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * kept.to(branch.dtype) / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


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
        recompute_activation: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        hidden_states = self.layernorm_after_attention(hidden_states + self.drop_path(self.dropout(attended)))
        mlp_output = self.mlp(hidden_states, recompute_activation)
        hidden_states = self.layernorm_after_mlp(hidden_states + self.drop_path(self.dropout(mlp_output)))
        return (hidden_states, mlp_output) if return_mlp_output else hidden_states


class SSLAMPreTrainedModel(PreTrainedModel):
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
    # An encoder or classifier takes what it needs from a pre-training checkpoint, and says nothing of the rest.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^teacher\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):  # the patch projection: Xavier-uniform as a linear layer of (hidden_size, 256)
            bound = self.config.patch_embedding_gain * (6 / (module.weight[0].numel() + module.out_channels)) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SSLAMEmbeddings):
            init.normal_(module.cls_token)
            init.copy_(module.position_embeddings, sincos_position_table(module.config))
        else:
            super()._init_weights(module)  # linear layers N(0, initializer_range), biases 0, norms 1 and 0


class SSLAMModel(SSLAMPreTrainedModel):
    """The SSLAM encoder: a log-mel in, a clip embedding and frame embeddings out."""

    # Nor of a classifier's head.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^teacher\.", r"^classifier\.", r"^layernorm\."]

    def __init__(self, config: SSLAMConfig):
        super().__init__(config)
        self.embeddings = SSLAMEmbeddings(config)
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
        self.layers = nn.ModuleList(SSLAMLayer(config, rate) for rate in rates)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

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
                `True` where there is sound. With a mask over frames, nothing that stands in masked frames has any influence: patches
                without sound are not attended to, and in a patch that is partly sound the rest is replaced by `config.padding_value`.
            output_hidden_states, output_attentions, output_mlp_outputs: see [`SSLAMModelOutput`].

        In training with `config.patch_drop_rate` the output holds the tokens that are left.

        Raises:
            ValueError: if the number of mel bins or frames does not fit the model, or the mask neither frames nor tokens.
        """
        if input_values is None:
            raise ValueError("input_values is None: give the log-mels that SSLAMFeatureExtractor makes")
        token_mask = None
        if attention_mask is not None:
            input_values, token_mask = self._apply_mask(input_values, attention_mask)
        hidden_states = self.embeddings(input_values)
        if self.training and self.config.patch_drop_rate:
            hidden_states, token_mask = self._drop_patches(hidden_states, token_mask)
        bias = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=token_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, bias, **kwargs)
        return SSLAMModelOutput(last_hidden_state=hidden_states, pooler_output=self._pool(hidden_states, token_mask))

    def frame_embeddings(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """Patch tokens on their grid: a view `(batch, time, frequency, hidden_size)` of `last_hidden_state`.

        One step is 160 ms in time and 16 mel bins in frequency, both from low to high. `.mean(2)` gives one embedding every 160 ms.
        Of a padded batch, `attention_mask.unflatten(1, (-1, config.patch_size)).any(-1)`, `(batch, time)`, says which steps hold sound.
        """
        return last_hidden_state[:, 1:].unflatten(1, (-1, self.config.num_frequency_patches))

    def encode(self, clips: Sequence[Block], feature_extractor: SSLAMFeatureExtractor, *, batch_size: int = 16) -> torch.Tensor:
        """One vector a clip, `(clips, hidden_size)`, float32, on the CPU, for clips of any lengths: see [`inference.encode`]."""
        return encode(self, clips, feature_extractor, batch_size=batch_size)

    def _apply_mask(self, input_values: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The input with masked frames blanked, and the mask over tokens, (batch, 1 + patches), boolean."""
        batch, frames = input_values.shape[:2]
        size, patches_per_step = self.config.patch_size, self.config.num_frequency_patches
        tokens = 1 + frames // size * patches_per_step
        mask = as_boolean(attention_mask)
        if mask.shape == (batch, frames):
            input_values = input_values.masked_fill(~mask.unsqueeze(-1), self.config.padding_value)
            if frames % size == 0:  # otherwise the patch embedding says what is wrong
                sounding = mask.unflatten(1, (-1, size)).any(-1).repeat_interleave(patches_per_step, dim=1)
                mask = nn.functional.pad(sounding, (1, 0), value=True)
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

    def _pool(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        if self.config.classifier_pooling == "cls":
            return hidden_states[:, 0]
        patches = hidden_states[:, 1:]
        if token_mask is None:
            return patches.mean(1)
        weights = token_mask[:, 1:, None].to(patches.dtype)
        return (patches * weights).sum(1) / weights.sum(1).clamp_min(1)


def _class_names(id2label: Mapping[int, str] | Mapping[str, str]) -> dict[int, str]:
    """Names of classes by whole numbers: `from_pretrained(..., id2label=...)` leaves keys as they are given, often as text."""
    try:
        names = {int(index): name for index, name in id2label.items()}
    except ValueError:
        names = {}
    if sorted(names) != list(range(len(id2label))):
        keys = ", ".join(map(repr, list(id2label)[:5])) + (" ..." if len(id2label) > 5 else "")
        raise ValueError(
            f"id2label has the keys {keys}, but the classes' numbers are expected, 0 to {len(id2label) - 1}, each with its name"
        )
    return names


class SSLAMForAudioClassification(SSLAMPreTrainedModel):
    """The encoder with a layer norm and a linear layer on its pooled output, for tags (multi-label) or classes."""

    # Its loss is the mean over a batch: where gradients are accumulated, `Trainer` has to divide by their number.
    accepts_loss_kwargs = False

    def __init__(self, config: SSLAMConfig):
        super().__init__(config)
        if config.id2label:
            config.id2label = _class_names(config.id2label)
            config.label2id = {name: index for index, name in config.id2label.items()}
        self.num_labels = config.num_labels
        self.sslam = SSLAMModel(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)  # type: ignore[arg-type]  # set in every config
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.sslam.get_input_embeddings()

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
            labels: `(batch,)`, class indices: cross-entropy; `(batch, num_labels)`, floats in [0, 1]: binary cross-entropy for tags that
                overlap; `(batch,)` with one label: squared error. `config.problem_type` decides where it is set.
            attention_mask: see [`SSLAMModel`].

        Returns:
            `logits: (batch, num_labels)` before softmax or sigmoid, `loss` if there are labels, hidden states and attentions on request.
            (MLP outputs are the encoder's alone: ask `model.sslam`.)
        """
        outputs: SSLAMModelOutput = self.sslam(input_values, attention_mask=attention_mask, **{**kwargs, "return_dict": True})
        logits = self._classify(outputs.pooler_output)  # type: ignore[arg-type]  # an encoder always gives one
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def _classify(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits in the weights' own dtype, under autocast too: bfloat16 keeps 8 significant bits, and the ties distort rankings."""
        device_type = pooled.device.type
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return self._classify(pooled.to(self.classifier.weight.dtype))
        return self.classifier(self.dropout(self.layernorm(pooled)))

    def score_windows(self, audio: Audio, feature_extractor: SSLAMFeatureExtractor, **options: Any) -> Iterator[WindowScores]:
        """Batches of scores of windows that slide over a recording, in memory that does not grow with it: see
        [`inference.score_windows`], also for `hop`, `window`, `batch_size`, `embeddings` and `sampling_rate`. Compile a model for this by
        `model.compile()`: `torch.compile(model)` returns another one with a fast forward pass, of which these methods know nothing."""
        return score_windows(self, audio, feature_extractor, **options)

    def score_over_time(self, audio: Audio, feature_extractor: SSLAMFeatureExtractor, **options: Any) -> ScoresOverTime:
        """All scores of windows that slide over a recording: see [`inference.score_over_time`], also for the options."""
        return score_over_time(self, audio, feature_extractor, **options)


__all__ = ["SSLAMForAudioClassification", "SSLAMModel", "SSLAMModelOutput", "SSLAMPreTrainedModel"]
