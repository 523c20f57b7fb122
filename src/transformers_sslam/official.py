"""Official SSLAM and EAT checkpoints, read as they are and without running anything that a file holds.

Layouts: fairseq pre-training and fine-tuned `.pt` files, and folders or repositories of the authors' Hub models (`model_type` "eat").
"""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from .files import read_json


# What the authors' code can be set to, and this package cannot: settings that a file may have, with the values that were published.
SUPPORTED_SETTINGS = {
    **{"layer_norm_first": False, "norm_affine": True, "instance_norm_target_layer": True, "layer_norm_targets": True},
    **{"layer_norm_target_layer": False, "batch_norm_target_layer": False, "instance_norm_targets": False, "end_of_block_targets": False},
    **{"num_extra_tokens": 1, "prenet_depth": 0, "use_alibi_encoder": False, "inverse_mask": True, "fixed_positions": True, "in_chans": 1},
    **{"transformer_decoder": False, "enc_dec_transformer": False, "decoder_residual": True, "projection_layers": 1},
    **{"add_positions_masked": False, "add_positions_all": False},
}


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message says which file, what is wrong with it, and what was expected."""


@dataclass
class OfficialCheckpoint:
    """What a file says, in the official names: tensors of the encoder, and of whatever else it holds, and its settings.

    Attributes:
        source: where it came from, for messages.
        student, decoder, teacher, head: tensors by name; all but the first may be absent.
        settings: of the encoder, the masks and the moving average, flat: `embed_dim`, `depth`, `num_heads`, `mask_prob`, ...
        time_patches: length of the position table, where the settings tell.
        target_length: frames that the model was trained on.
        preset: the normalisation that it was trained with, a key of `NORMALIZATION_PRESETS`.
    """

    source: str
    student: dict[str, torch.Tensor]
    decoder: dict[str, torch.Tensor] = field(default_factory=dict)
    teacher: dict[str, torch.Tensor] = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    time_patches: int | None = None
    target_length: int = 1024
    preset: str = "audioset"


def read_official_checkpoint(source: str | Path) -> OfficialCheckpoint:
    """Recognise the layout of `source`, a `.pt` file, a folder or a Hub id, and read it.

    Raises:
        ConversionError: (a `ValueError`) if there is no such thing, it is damaged, or it is no official checkpoint.
    """
    path = Path(source)
    if path.is_file():
        checkpoint = _read_fairseq(path)
    elif path.is_dir():
        checkpoint = _read_hub_folder(path, str(source))
    elif str(source).count("/") == 1 and path.suffix not in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        checkpoint = _read_hub_folder(_download(str(source)), str(source))
    else:
        raise ConversionError(f"{source} is neither a file, nor a folder, nor a Hub id (owner/name): check the path")
    _check_settings(checkpoint)
    return checkpoint


def _download(name: str) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(f"{name} is no file or folder here, and as a Hub id it cannot be downloaded ({error})") from error


def _read_hub_folder(folder: Path, source: str) -> OfficialCheckpoint:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConversionError(f"{source} has no {name}: expected the files of an official Hub model, config.json and model.safetensors")
    try:
        settings = read_json(folder / "config.json", object)
        tensors = load_file(folder / "model.safetensors")
    except (ValueError, OSError, SafetensorError) as error:
        raise ConversionError(f"{source} cannot be read ({error}): is the download complete?") from error
    if not isinstance(settings, Mapping) or settings.get("model_type") != "eat":
        kind = settings.get("model_type") if isinstance(settings, Mapping) else None
        raise ConversionError(f'{source} has model_type {kind!r}, but the official SSLAM and EAT models have "eat"')
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("fc_norm.", "head."))}
    if (settings.get("model_variant", "finetune" if head else "pretrain") == "finetune") != bool(head):
        raise ConversionError(
            f"{source} says model_variant {settings['model_variant']}, but {'has' if head else 'lacks'} a head: missing tensors?"
        )
    size = settings.get("img_size", 1024)  # of a log-mel as an image: [frames, mel bins], or the frames alone
    return OfficialCheckpoint(
        source=source,
        student=tensors,
        head=head,
        settings={**settings, "num_classes": settings.get("num_classes") if head else None},
        time_patches=settings.get("max_length"),
        target_length=size[0] if isinstance(size, list) and size else size,
    )


def _read_fairseq(path: Path) -> OfficialCheckpoint:
    content = _load_inert(path)
    model, cfg = _get(content, "model"), _get(content, "cfg")
    if not isinstance(model, Mapping) or not isinstance(cfg, Mapping):
        raise ConversionError(f'{path} is no fairseq checkpoint: expected a dict with "model" and "cfg"')
    tensors = dict(model)
    teacher = tensors.pop("_ema", None)
    teacher = {} if teacher is None else teacher
    if not isinstance(teacher, Mapping):
        raise ConversionError(f'{path}: "_ema" in "model" is a {type(teacher).__name__}, but the teacher is a dict of tensors')
    every = [*tensors.items(), *teacher.items()]
    if strange := [name for name, value in every if not isinstance(name, str) or not isinstance(value, torch.Tensor)]:
        raise ConversionError(f'{path} has entries in "model" that are no tensors: {listed(strange)}')
    if sum(tensor.numel() * tensor.itemsize for _, tensor in every) > path.stat().st_size:
        raise ConversionError(f"{path} holds tensors that are larger than the file: so it is not a published checkpoint")
    fine_tuned = "head.weight" in tensors
    outer = _settings(path, cfg, "model")
    inner = ("model", "pretrained_model_args", "model") if fine_tuned else ("model",)
    settings = _settings(path, cfg, *inner)
    if not settings:
        raise ConversionError(
            f"{path} has no cfg.{'.'.join(inner)}, the settings of the encoder: the number of heads cannot be told from the weights"
        )
    if fine_tuned and outer.get("prediction_mode", "CLS_TOKEN") != "CLS_TOKEN":
        raise ConversionError(
            f"{path} predicts from {outer['prediction_mode']}, but only classifiers on CLS_TOKEN were published and are read"
        )
    image = _settings(path, cfg, *inner, "modalities", "image")
    decoder_settings = _settings(path, cfg, *inner, "modalities", "image", "decoder")
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("fc_norm.", "head."))}
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    prefix = "modality_encoders.IMAGE.decoder."
    decoder = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    return OfficialCheckpoint(
        source=str(path),
        student=tensors,
        decoder=decoder,
        teacher=dict(teacher),
        head=head,
        settings={**settings, **image, **decoder_settings, "num_classes": outer.get("num_classes")},
        time_patches=image.get("max_length"),
        target_length=outer.get("target_length") or image.get("target_length") or 1024,
        preset="speech_commands" if outer.get("spcv2_eval") else "esc50" if outer.get("esc50_eval") else "audioset",
    )


def _settings(path: Path, cfg: Mapping, *keys: str) -> dict[str, Any]:
    """A group of the settings; what is neither plain nor a group (a tensor, a class of fairseq) as text. A group may be missing."""
    group = _get(cfg, *keys)
    if not isinstance(group, Mapping | None):
        raise ConversionError(f"{path}: cfg.{'.'.join(keys)} is a {type(group).__name__}, but a group of settings is expected")
    return {
        str(name): value if isinstance(value, str | int | float | list | Mapping | None) else f"a {type(value).__name__}"
        for name, value in (group or {}).items()
    }


def _load_inert(path: Path) -> Any:
    """`torch.load` with `weights_only=True`; classes that it does not know become empty stubs, so that nothing in the file ever runs."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            # torch.save compresses nothing, so a file that unpacks to more than itself was not written by it, and may be a zip bomb.
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > path.stat().st_size:
                raise ConversionError(f"{path} cannot be read: it is compressed, but torch.save compresses nothing")
            damaged = archive.testzip()  # torch does not look at the checksums
    except ConversionError:
        raise
    except Exception as error:  # of a damaged directory zipfile raises whatever its bytes lead to
        raise ConversionError(
            f"{path} cannot be read: it is no whole file of torch.save in the format of torch 1.6 and newer ({error}). Is the download "
            "complete?"
        ) from error
    if damaged is not None:
        raise ConversionError(f"{path} cannot be read: its part {damaged} is damaged. Download it again")
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stubs: list = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} cannot be read without running code that it holds, which is never done: it is no checkpoint of fairseq, or a hostile "
            "one"
        ) from error
    except Exception as error:  # what a damaged pickle leads to has no common class
        raise ConversionError(f"{path} cannot be read as a checkpoint of torch.save ({repr(error)[:200]})") from error


class _Inert:
    """Stands for any class or function that a pickle names: takes every argument and state, and does nothing with them."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _check_settings(checkpoint: OfficialCheckpoint) -> None:
    """Refuse what would convert into a model that computes something else, or that the tensors contradict."""
    source, settings = checkpoint.source, checkpoint.settings
    heads = settings.get("num_heads")
    if type(heads) is not int or heads < 1:
        raise ConversionError(f"{source} has num_heads {heads!r}: the number of attention heads cannot be told from the weights")
    for name, value in SUPPORTED_SETTINGS.items():
        if settings.get(name, value) not in (value, None):
            raise ConversionError(f"{source} has {name} {settings[name]!r}, but only models with {value!r} were published and are read")
    for name in ("time_patches", "target_length"):
        value = getattr(checkpoint, name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConversionError(
                f"{source}: {name.replace('time_patches', 'max_length')} is {value!r}, but must be a positive whole number"
            )
    if any(
        not tensor.dtype.is_floating_point or tensor.dtype.itemsize > 4 or tensor.layout != torch.strided for tensor in _tensors(checkpoint)
    ):
        raise ConversionError(
            f"{source} holds tensors that are sparse, wider than float32 or not floating-point: so it is not a published checkpoint"
        )


def _tensors(checkpoint: OfficialCheckpoint) -> Iterable[torch.Tensor]:
    for part in (checkpoint.student, checkpoint.decoder, checkpoint.teacher, checkpoint.head):
        yield from part.values()


def _get(mapping: Any, *keys: str) -> Any:
    """`mapping[key][key]...`, or None where something on the way is missing or no mapping."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping


def listed(names: Iterable, most: int = 5) -> str:
    """Names in a message: the first few, and how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


__all__ = ["ConversionError", "OfficialCheckpoint", "listed", "read_official_checkpoint"]
