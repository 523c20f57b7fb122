"""An encoder for mteb (Massive Text Embedding Benchmark), whose audio part is MAEB.

```python
results = mteb.evaluate(SSLAMEncoder("runs/mine", pooling="mean_and_std"), mteb.get_tasks(["ESC50"]))
```
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.modality_collators import AudioCollator
from mteb.models.model_meta import ModelMeta
from tqdm.auto import tqdm

from ... import __version__
from ...configuration_sslam import ClipPooling, SSLAMConfig
from ...fbank import frame_geometry
from ...modeling_sslam import SSLAMModel
from ...publishing.cards import CITATIONS
from ..loading import hash_model
from .embedder import BATCH_SIZE, Embedder, LogMelStatistics


# Fields of a `ModelMeta` that are unknown for a local model.
UNKNOWN: dict[str, Any] = dict.fromkeys(
    ("loader", "license", "open_weights", "public_training_code", "public_training_data", "training_datasets")
)


class ClipEncoder(AbsEncoder):
    """Clips to embeddings, each as if it had been encoded alone. mteb's collator resamples them.

    Args:
        model: embeds the clips.
        meta: what mteb shall know of it.
    """

    mteb_model_meta: ModelMeta

    def __init__(self, model: Embedder | LogMelStatistics, meta: ModelMeta):
        self.model: Any = model
        self.mteb_model_meta = meta

    def encode(self, inputs: Any, *, batch_size: int = BATCH_SIZE, show_progress_bar: bool = True, **kwargs: Any) -> np.ndarray:
        """Embeddings `(clips, width)`, float32.

        Args:
            inputs: mteb's `DataLoader` of a data set with the column `audio`.
            batch_size: windows in a forward pass.
            show_progress_bar: show the progress over batches.
            kwargs: what mteb knows of the task, ignored.

        Raises:
            ValueError: if there is no such column, or a clip is not finite.
        """
        if "audio" not in (columns := inputs.dataset.column_names):
            raise ValueError(f"the task has the columns {', '.join(columns)}, but this model encodes audio alone: choose another task")
        rate = self.model.sampling_rate
        inputs.collate_fn = AudioCollator(target_sampling_rate=rate, min_samples=frame_geometry(rate)[0])
        batches = tqdm(inputs, desc="encoding clips", unit="batch", disable=not show_progress_bar)
        waveforms = ([_mono(item["array"]) for item in batch["audio"]] for batch in batches)
        return torch.cat([self.model.embed_clips(clips, batch_size) for clips in waveforms]).numpy()


class SSLAMEncoder(ClipEncoder):
    """An SSLAM or EAT encoder.

    Args:
        model_name: folder, Hub id, or an official checkpoint.
        revision: commit on the Hub; by default the newest.
        device, pooling, layers, dtype, untrained: of [`Embedder`].

    Raises:
        UserError: as [`Embedder`].
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        pooling: ClipPooling = "mean",
        layers: Sequence[int] = (-1,),
        dtype: str = "float32",
        untrained: int | None = None,
    ):
        source = model_name if revision is None else snapshot_download(model_name, revision=revision)
        model = Embedder(source, pooling=pooling, layers=layers, device=device, dtype=dtype, untrained=untrained)
        super().__init__(model, _describe(model_name, model))


class LogMelEncoder(ClipEncoder):
    """The baseline without a network, see [`LogMelStatistics`]."""

    def __init__(self) -> None:
        model = LogMelStatistics()
        super().__init__(model, ModelMeta(name="local/log_mel", revision=__version__, **UNKNOWN, **_sizes(None, model.width)))


def _mono(samples: np.ndarray) -> np.ndarray:
    """mteb's collator mixes channels down, but keeps the axis of an only channel."""
    return samples[0] if samples.ndim == 2 and len(samples) == 1 else samples


def _describe(name: str, model: Embedder) -> ModelMeta:
    """Of any model. Its revision is a hash of the weights, so that mteb never takes results of others for those of this one."""
    return ModelMeta(
        name=f"local/{Path(name).resolve().name}" if Path(name).exists() else name,
        revision=hash_model(model.encoder, model.extractor),
        experiment_kwargs={
            "pooling": model.pooling,
            "layers": " ".join(map(str, model.layers)),
            "dtype": str(model.encoder.dtype).removeprefix("torch."),
            **({} if model.untrained is None else {"untrained": model.untrained}),
        },
        **UNKNOWN,
        **_sizes(model.encoder, model.width),
    )


def _official(name: str, config: SSLAMConfig, citation: str, code: str, adapted_from: str | None = None) -> ModelMeta:
    with torch.device("meta"):
        encoder = SSLAMModel(config)
    return ModelMeta(
        loader=SSLAMEncoder,
        name=name,
        revision=None,
        license=f"https://huggingface.co/{name}",
        open_weights=True,
        reference=f"https://huggingface.co/{name}",
        public_training_code=code,
        public_training_data="https://research.google.com/audioset/",
        training_datasets={"AudioSet", "AudioSetMini", "AudioSetStrongA2TRetrieval", "AudioSetStrongT2ARetrieval"},
        citation=CITATIONS[citation],
        adapted_from=adapted_from,
        **_sizes(encoder, config.hidden_size),
    )


def _sizes(encoder: SSLAMModel | None, width: int) -> dict[str, Any]:
    """Fields of a `ModelMeta` that follow from the encoder, if there is one, and those that all of them share."""
    return {
        "n_parameters": encoder.num_parameters() if encoder else 0,
        "n_embedding_parameters": 0,
        "memory_usage_mb": round(encoder.num_parameters() * encoder.dtype.itemsize / 2**20) if encoder else 0,
        "embed_dim": width,
        "max_tokens": float("inf"),  # longer clips are cut into windows
        "similarity_fn_name": "cosine",
        "use_instructions": False,
        "framework": ["PyTorch", "Transformers", "safetensors"],
        "modalities": ["audio"],
        "languages": ["eng-Latn"],  # as of all sound models in mteb
        "release_date": None,
    }


def official_models() -> list[ModelMeta]:
    """Entries for mteb's own list, of the published checkpoints. Their revisions and dates are to be filled in from the Hub."""
    sslam, eat = "https://github.com/ta012/SSLAM", "https://github.com/cwx-worst-one/EAT"
    base, large = SSLAMConfig.base(), SSLAMConfig.large()
    return [
        _official("ta012/SSLAM_pretrain", base, "sslam", sslam),
        _official("ta012/SSLAM_AS2M_Finetuned", base, "sslam", sslam, "ta012/SSLAM_pretrain"),
        _official("worstchan/EAT-base_epoch30_pretrain", base, "eat", eat),
        _official("worstchan/EAT-base_epoch30_finetune_AS2M", base, "eat", eat, "worstchan/EAT-base_epoch30_pretrain"),
        _official("worstchan/EAT-large_epoch20_pretrain", large, "eat", eat),
    ]
