"""Models for inference: loading, device, batches of clips, and a hash."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoFeatureExtractor

from ..allocator import keep_freed_memory
from ..audio.ahead import in_background
from ..batching_sslam import Span, prepare_batches
from ..configuration_sslam import SSLAMConfig
from ..errors import UserError, as_user_error
from ..feature_extraction_sslam import SSLAMFeatureExtractor, as_float_samples
from ..modeling_sslam import SSLAMForAudioClassification, SSLAMPreTrainedModel
from ..modeling_sslam_frames import SSLAMForAudioFrameClassification
from ..publishing.conversion import resolve_model


# Of models with a head: what they are, the task that trains them, and the commands that take them.
KINDS = {
    SSLAMForAudioClassification.__name__: ("a classifier of clips", "classification", "sslam tag, or sslam evaluate --task classification"),
    SSLAMForAudioFrameClassification.__name__: ("a detector of events", "events", "sslam detect, or sslam evaluate --task events"),
}
ENCODER = ("an encoder without a trained head", "", "sslam embed, or sslam probe")

Model = TypeVar("Model", bound=SSLAMPreTrainedModel)
Clips = Sequence[np.ndarray]  # waveforms `(samples,)`: a list, or what decodes them when asked, as `audio.cache.Waveforms`


def load_model(cls: type[Model], model: str, dtype: str = "float32", device: str | None = None) -> tuple[Model, SSLAMFeatureExtractor]:
    """A model of class `cls`, on its device, and its feature extractor.

    Args:
        model: folder, Hub id, or an official checkpoint, which is converted into the cache first.
        dtype: of the weights.
        device: by default [`best_device`].

    Raises:
        UserError: if it is a model of another task, they cannot be loaded, weights are missing, or the device cannot be used.
    """
    failed = f"{model} cannot be loaded as a {cls.__name__} with its feature extractor"
    source = resolve_model(model)
    with as_user_error(failed):
        extractor = AutoFeatureExtractor.from_pretrained(source)
        if not isinstance(extractor, SSLAMFeatureExtractor):
            raise UserError(f"{failed}: it has a {type(extractor).__name__}")
        _check_kind(cls, model, SSLAMConfig.from_pretrained(source))
        try:
            loaded: Any = cls.from_pretrained(source, dtype=getattr(torch, dtype), return_dict=True, output_loading_info=True)
        except RuntimeError as error:  # weights of other sizes than the configuration's
            raise UserError(f"{failed}: {error}") from error
    network, loading = loaded
    if missing := loading["missing_keys"]:
        what = KINDS[cls.__name__][0].partition(" ")[2] if cls.__name__ in KINDS else "encoder"
        raise UserError(
            f"{model} does not fill the {what} ({min(missing)} is missing, and {len(missing) - 1} more): give a whole checkpoint"
        )
    try:
        return network.to(device or best_device()), extractor
    except (RuntimeError, AssertionError) as error:  # unknown, not there, or torch was built without it
        raise UserError(f"device is {device!r}, which cannot be used: {error}") from error


def _check_kind(cls: type[SSLAMPreTrainedModel], model: str, config: SSLAMConfig) -> None:
    """`UserError` if a model has another head than that of `cls`, or none."""
    kind = (config.architectures or [cls.__name__])[0]
    if cls.__name__ not in KINDS or kind == cls.__name__:
        return
    needed, task, _ = KINDS[cls.__name__]
    found, _, commands = KINDS.get(kind, ENCODER)
    raise UserError(f"model {model} is {found}, but {needed} is needed: give one that was fine-tuned with --task {task}, or use {commands}")


def tagger_class(model: str) -> type[SSLAMForAudioClassification] | type[SSLAMForAudioFrameClassification]:
    """The class of a model that gives clips labels: a detector's, if it is one, and otherwise a classifier's.

    Args:
        model: folder, Hub id, or an official checkpoint.

    Raises:
        UserError: if it cannot be read.
    """
    source = resolve_model(model)
    with as_user_error(f"{model} cannot be loaded"):
        config = SSLAMConfig.from_pretrained(source)
    detects = SSLAMForAudioFrameClassification.__name__ in (config.architectures or ())
    return SSLAMForAudioFrameClassification if detects else SSLAMForAudioClassification


def input_batches(
    model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, waveforms: Clips, batch_size: int, description: str, **options: Any
) -> Iterator[tuple[range, dict[str, torch.Tensor]]]:
    """Batches of `waveforms` at the extractor's rate, as the clips' numbers and the model's inputs on its device, which are made in the
    background while the model computes. `description` is of the progress bar; `options` are the extractor's."""
    options |= {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt", "device": model.device}
    clips = ((i, as_float_samples(waveforms[i], f"clip {i}")) for i in range(len(waveforms)))
    windows = ((Span(i, 0, len(clip)), clip) for i, clip in clips)
    batches = prepare_batches(windows, lambda samples: dict(extractor(samples, **options)), batch_size)
    for batch in tqdm(in_background(batches), total=-(-len(waveforms) // batch_size), desc=description, unit="batch"):
        yield range(batch.spans[0][1].recording, batch.spans[-1][1].recording + 1), batch.inputs


def best_device() -> torch.device:
    """The accelerator, or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def prepare_command(device: str | None) -> None:
    """What commands begin with: no progress bars of loading and, if they compute on the CPU, memory that this process keeps."""
    transformers.logging.disable_progress_bar()
    if str(device or best_device()) == "cpu":
        keep_freed_memory()


def hash_model(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, **more: Any) -> str:
    """Hash of all that decides a model's outputs for a clip: configuration, extractor, weights, and `more`."""
    # Not what is done with outputs, or was done to the head's weights; nor what every model has, as labels.
    fields = inspect.get_annotations(SSLAMConfig).keys() - {"event_detection", "calibration"}
    config = {name: getattr(model.config, name) for name in fields}
    about = {"config": config, "extractor": extractor.to_dict(), **more}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
