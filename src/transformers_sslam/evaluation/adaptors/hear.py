"""The API of HEAR (Holistic Evaluation of Audio Representations, Turian et al., 2022), for any SSLAM or EAT checkpoint.

Its evaluation kit takes this module by its name, `transformers_sslam.evaluation.adaptors.hear`, and the path of a model. It resamples the
audio to the model's `sample_rate`.
"""

from typing import Any

import torch

from ...errors import UserError
from .embedder import DEFAULT_MODEL, Embedder, check_batch


SAMPLE_RATES = (16_000, 22_050, 44_100, 48_000)  # in which HEAR's tasks come, Hz


class HearModel(Embedder):
    """What `load_model` returns. Arguments are those of [`Embedder`], which also lists errors."""

    @property
    def sample_rate(self) -> int:
        """Of the audio, in Hz."""
        return self.sampling_rate

    @property
    def scene_embedding_size(self) -> int:
        """Width of a clip's embedding."""
        return self.width

    @property
    def timestamp_embedding_size(self) -> int:
        """Width of a time step's embedding."""
        return len(self.layers) * self.encoder.config.hidden_size


def load_model(model_file_path: str = "", **options: Any) -> HearModel:
    """A model of `model_file_path`: a folder, a Hub id, or an official checkpoint; by default the official SSLAM encoder.

    Args:
        options: of [`Embedder`], such as `pooling="mean_and_std"`, of scenes, and `layers=(4, 6)`, of both embeddings.

    Raises:
        UserError: if it cannot be loaded, or HEAR has no audio at its rate.
    """
    model = HearModel(model_file_path or DEFAULT_MODEL, **options)
    if model.sample_rate not in SAMPLE_RATES:
        rates = ", ".join(map(str, SAMPLE_RATES))
        raise UserError(f"{model_file_path} takes {model.sample_rate} Hz, but the audio of HEAR has {rates} Hz: choose another model")
    return model


def get_scene_embeddings(audio: torch.Tensor, model: HearModel) -> torch.Tensor:
    """Audio `(sounds, samples)` at the model's rate -> `(sounds, scene_embedding_size)`, float32.

    Raises:
        ValueError: if the audio has another shape, or is not finite.
    """
    check_batch(audio)
    return model.embed_clips(list(audio))


def get_timestamp_embeddings(audio: torch.Tensor, model: HearModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of each time step (160 ms), and the steps' centres.

    Args:
        audio: `(sounds, samples)` at the model's rate.
        model: of `load_model`.

    Returns:
        `(sounds, steps, timestamp_embedding_size)`, and the times `(sounds, steps)` in milliseconds, 80, 240, ..., both float32. A last
        step of which the audio holds less than half is centred behind the audio's end, because HEAR asks for regular intervals.

    Raises:
        ValueError: if the audio has another shape, or is not finite.
    """
    embeddings = model.embed_steps(audio)
    sounds, steps, _ = embeddings.shape
    centres = (torch.arange(steps, dtype=torch.float32) + 0.5) * model.step_ms
    return embeddings, centres.expand(sounds, -1)
