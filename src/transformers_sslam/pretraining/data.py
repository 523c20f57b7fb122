"""The clips of a run: those it trains on, those of its validation loss and of its probe, and the scale of their log-mels."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator

from ..audio.batches import ClipStream, DataSettings
from ..audio.normalization import CLIPS_FOR_NORMALIZATION, compute_normalization
from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor
from .checkpoints import find_checkpoint
from .settings import PreTrainingSettings


if TYPE_CHECKING:
    from .probe import StudentProbe

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


def open_stream(
    settings: PreTrainingSettings,
    data: DataSettings,
    extractor: SSLAMFeatureExtractor,
    accelerator: Accelerator,
    num_workers: int = 0,
    epochs: int | None = None,
) -> ClipStream:
    """This process's part of the batches."""
    return ClipStream(
        data,
        extractor,
        device=accelerator.device,
        batch_size=settings.per_device_train_batch_size,
        seed=settings.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=num_workers,
        pin_memory=accelerator.device.type == "cuda" and num_workers > 0,
        epochs=epochs,
    )


def open_training_clips(settings: PreTrainingSettings, extractor: SSLAMFeatureExtractor, accelerator: Accelerator) -> ClipStream:
    """Batches without end. With `normalization` "computed", the extractor takes mean and standard deviation of the recordings: those that
    the checkpoint to resume from has, or else computed here."""
    with as_user_error("data"):
        clips = open_stream(settings, settings.data, extractor, accelerator, settings.dataloader_num_workers)
        if settings.normalization != "computed":
            return clips
        if (checkpoint := find_checkpoint(settings, accelerator)) is not None:
            saved = SSLAMFeatureExtractor.from_pretrained(checkpoint)
            extractor.mean, extractor.std = saved.mean, saved.std
        else:
            logger.info("Computing mean and standard deviation of the log-mels, of at most %d clips", CLIPS_FOR_NORMALIZATION)
            extractor.mean, extractor.std = compute_normalization(
                clips.sources,
                clips.readers.windows,
                extractor,
                settings=settings.data,
                seed=settings.seed,
                num_workers=settings.dataloader_num_workers,
            )
            logger.info("Their mean is %.3f, and their standard deviation %.3f", extractor.mean, extractor.std)
        return clips


def read_validation_clips(
    settings: PreTrainingSettings, extractor: SSLAMFeatureExtractor, accelerator: Accelerator, inputs: Sequence[str]
) -> list[Batch]:
    """`inputs` of the first clips of an epoch, an equal number for each process; empty without `validation`."""
    if settings.validation is None:
        return []
    batches: list[Batch] = []
    missing = -(-settings.validation_clips // accelerator.num_processes)
    with as_user_error("validation"):
        stream = open_stream(settings, settings.validation, extractor, accelerator, epochs=1)
        stream.waveforms = "waveforms" in inputs
        for batch in stream:
            batches.append({name: batch[name][:missing] for name in inputs})
            missing -= len(batches[-1]["input_values"])
            if not missing:
                break
    if not batches:
        raise UserError(f"validation: there is no clip for process {accelerator.process_index}: give more, or use fewer devices")
    return batches


def check_validation_batches(batches: Sequence[Batch], config: SSLAMConfig) -> None:
    """Raise a `UserError` if one has too few clips for a mixture, as the last one may."""
    fewest = min((len(batch["input_values"]) for batch in batches), default=config.most_sources)
    if config.use_mixtures and fewest < config.most_sources > 2:
        raise UserError(
            f"a validation batch has {fewest} clips of {config.most_sources} that num_sources needs: set validation_clips to a multiple of "
            "per_device_train_batch_size times the number of processes"
        )


def open_probe(settings: PreTrainingSettings, extractor: SSLAMFeatureExtractor, accelerator: Accelerator) -> "StudentProbe | None":
    """The probe, in the main process, if there is one."""
    if settings.probe is None or settings.probe_every is None or not accelerator.is_main_process:
        return None
    from .probe import StudentProbe  # which alone needs scikit-learn

    return StudentProbe(settings.probe, extractor)
