"""What the adaptors share: a frozen encoder, and which embedding of it is evaluated."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import nn

from ...batching_sslam import check_batch_size
from ...configuration_sslam import ClipPooling
from ...errors import UserError, as_user_error
from ...fbank import frame_geometry, num_frames
from ...feature_extraction_sslam import SSLAMFeatureExtractor
from ...inference_sslam import by_recording
from ...modeling_sslam import SSLAMModel
from ...tasks_sslam import Embedding
from ...windows_sslam import Windowing
from ..features import pool_log_mel
from ..loading import Clips, load_model


DEFAULT_MODEL = "ta012/SSLAM_pretrain"  # of suites that build an encoder without arguments
BATCH_SIZE = 16  # windows in a forward pass
StepPooling = Literal["mean", "patches"]


class Embedder(nn.Module):
    """A frozen encoder with one kind of embedding of clips.

    The embedding of a clip is that of the clip alone, whatever it is batched with. Clips longer than the feature extractor's `max_length`
    are cut into windows, see [`SSLAMModel.encode`]. What is shorter than one frame (25 ms) is padded with zeros to one.

    Args:
        model: folder, Hub id, or an official checkpoint.
        pooling: of a clip, as `SSLAMConfig.classifier_pooling`.
        layers: whose outputs are taken, and concatenated: -1 for the last one, 0 for the input of the first.
        device: by default an accelerator, if there is one.
        dtype: of the weights.
        untrained: seed of random weights in place of the model's, as the untrained networks of `sslam probe` have; `None`: its own.

    Raises:
        UserError: if the model cannot be loaded, or an argument is out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        pooling: ClipPooling = "mean",
        layers: Sequence[int] = (-1,),
        device: str | None = None,
        dtype: str = "float32",
        untrained: int | None = None,
    ):
        super().__init__()
        self.encoder, self.extractor = load_model(SSLAMModel, model, dtype, device)
        if untrained is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(untrained)
                network: Any = SSLAMModel(self.encoder.config)
            self.encoder = network.to(self.encoder.device, self.encoder.dtype)
        self.untrained = untrained
        self.encoder.eval().requires_grad_(False)
        self.pooling = pooling
        self.layers: Sequence[int] = list(layers)
        if pooling not in get_args(ClipPooling):
            raise UserError(f"pooling is {pooling!r}, but one of {', '.join(get_args(ClipPooling))} is expected")
        with as_user_error(f"{model} cannot be embedded this way"):
            windowing = Windowing.of_model(self.encoder.config, self.extractor, per="clip")
            self.task = Embedding(self.encoder.config, self.extractor, windowing, "clip", self.layers, pooling)

    @property
    def sampling_rate(self) -> int:
        """Of the waveforms, in Hz."""
        return self.extractor.sampling_rate

    @property
    def width(self) -> int:
        """Of a clip's embedding."""
        return self.task.width

    @property
    def step_ms(self) -> int:
        """Length of a time step in milliseconds."""
        return self.encoder.config.patch_size * frame_geometry(1000)[1]

    def embed_clips(self, clips: Clips, batch_size: int = BATCH_SIZE) -> torch.Tensor:
        """Waveforms `(samples,)` of any lengths, at the encoder's rate -> `(clips, width)`, float32, on the CPU.

        Raises:
            ValueError: if a clip is not a finite mono waveform.
        """
        check_batch_size(batch_size)
        waveforms = (_at_least_a_frame(torch.as_tensor(clips[i]), self.sampling_rate) for i in range(len(clips)))
        windows = chain.from_iterable(self.task.windows(f"clip {i}", waveform) for i, waveform in enumerate(waveforms))
        found = [row.values for _, results in by_recording(self.task, self.encoder, windows, batch_size) for row in self.task.rows(results)]
        return torch.stack(found) if found else torch.zeros(0, self.width)

    def embed_steps(self, waveforms: torch.Tensor, pooling: StepPooling = "mean") -> torch.Tensor:
        """Waveforms of one length, `(clips, samples)` -> `(clips, steps, width)`, float32, on the CPU.

        Args:
            waveforms: at the encoder's rate.
            pooling: of the patches of a step: their mean, or all of them, concatenated.

        Raises:
            ValueError: if they have another shape, or a clip is not finite.
        """
        check_batch(waveforms)
        waveforms = _at_least_a_frame(waveforms, self.sampling_rate)
        patch_size = self.encoder.config.patch_size
        frames = -(-num_frames(waveforms.shape[1], self.sampling_rate) // patch_size) * patch_size
        frames = min(frames, self.extractor.max_length)  # a window of a whole clip has no padding to compute
        steps: Any = self.encoder.encode(
            list(waveforms),
            self.extractor,
            per="step",
            layers=self.layers,
            pooling=pooling,
            window=frames * frame_geometry(self.sampling_rate)[1] / self.sampling_rate,
            batch_size=BATCH_SIZE,
        )
        return torch.stack([vectors for vectors, _, _ in steps])


class LogMelStatistics:
    """Mean and standard deviation over time of each log-mel bin, in place of a network: `log_mel_statistics` of `sslam probe`.

    A clip is pooled over its own frames, however many there are.
    """

    def __init__(self) -> None:
        self.extractor = SSLAMFeatureExtractor()
        self.sampling_rate: int = self.extractor.sampling_rate  # of the waveforms, in Hz
        self.width: int = 2 * self.extractor.num_mel_bins

    def embed_clips(self, clips: Clips, batch_size: int = BATCH_SIZE) -> torch.Tensor:
        """As [`Embedder.embed_clips`], one clip at a time."""
        options: dict[str, Any] = {"sampling_rate": self.sampling_rate, "padding": "longest", "return_attention_mask": True}
        vectors = [torch.zeros(0, self.width)]
        for i in range(len(clips)):
            inputs = self.extractor(_at_least_a_frame(torch.as_tensor(clips[i]), self.sampling_rate), return_tensors="pt", **options)
            pooled = pool_log_mel(inputs["input_values"], inputs["attention_mask"].bool())
            vectors.append(torch.cat([pooled["mean"], pooled["std"]], dim=1))
        return torch.cat(vectors)


def _at_least_a_frame(waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    missing = frame_geometry(sampling_rate)[0] - waveform.shape[-1]
    return nn.functional.pad(waveform, (0, missing)) if missing > 0 else waveform


def check_batch(waveforms: torch.Tensor) -> None:
    """Raise a ValueError unless it is `(clips, samples)`, with at least one clip."""
    if not isinstance(waveforms, torch.Tensor) or waveforms.ndim != 2 or not len(waveforms):
        shape = f"of shape {tuple(waveforms.shape)}" if isinstance(waveforms, torch.Tensor) else f"a {type(waveforms).__name__}"
        raise ValueError(f"the audio is {shape}, but a tensor (clips, samples) with at least one clip is expected: stack waveforms first")
