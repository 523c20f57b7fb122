"""Official SSLAM and EAT checkpoints, fairseq `.pt` files and Hub models (`model_type` "eat"), read without running what they hold."""

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError, missing_model
from ..files import read_json
from ..names import listed


HUB_FILES = ["config.json", "model.safetensors"]
# Settings that this package does not have, with the values of the published models.
SUPPORTED_SETTINGS = {
    **dict.fromkeys(("norm_affine", "instance_norm_target_layer", "layer_norm_targets"), True),
    **dict.fromkeys(("inverse_mask", "fixed_positions", "decoder_residual"), True),
    **dict.fromkeys(("layer_norm_first", "layer_norm_target_layer", "batch_norm_target_layer", "instance_norm_targets"), False),
    **dict.fromkeys(("end_of_block_targets", "use_alibi_encoder", "transformer_decoder", "enc_dec_transformer"), False),
    **dict.fromkeys(("add_positions_masked", "add_positions_all"), False),
    **{"num_extra_tokens": 1, "prenet_depth": 0, "in_chans": 1, "projection_layers": 1, "prediction_mode": "CLS_TOKEN"},
}
IMAGE = "modality_encoders.IMAGE."


class ConversionError(UserError):
    """A checkpoint cannot be converted."""


@dataclass
class OfficialCheckpoint:
    """Content of a checkpoint under the official names.

    Attributes:
        source: its name in messages.
        student, decoder, teacher, head: tensors by name; all but the first may be absent.
        settings: of encoder, masks and moving average, flat: `embed_dim`, `depth`, `num_heads`, `mask_prob`, ...
        time_patches: length of the position table in patches, if the settings have it.
        target_length: frames of the training clips.
        preset: normalization of the training, a key of `NORMALIZATION_PRESETS`.
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


def locate_checkpoint(source: str | Path) -> Path:
    """The `.pt` file or folder that `source` names; of a Hub id such as `ta012/SSLAM_pretrain` the download.

    Raises:
        UserError: if it does not exist, or cannot be downloaded.
    """
    path = Path(source)
    if path.exists():
        return path
    if str(source).count("/") != 1 or path.suffix in (".pt", ".pth", ".ckpt", ".bin", ".safetensors"):
        raise missing_model(source)
    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise missing_model(source) from error


def read_official_checkpoint(path: Path, source: str | None = None) -> OfficialCheckpoint:
    """Read a `.pt` file, or a folder with `config.json` and `model.safetensors`.

    Args:
        path: from [`locate_checkpoint`].
        source: its name in messages; by default its path.

    Raises:
        ConversionError: if it is damaged, or not an official checkpoint.
    """
    source = source or str(path)
    checkpoint = _read_hub_folder(path, source) if path.is_dir() else _read_fairseq(path, source)
    _check_settings(checkpoint)
    return checkpoint


def _read_hub_folder(folder: Path, source: str) -> OfficialCheckpoint:
    if missing := [name for name in HUB_FILES if not (folder / name).is_file()]:
        raise ConversionError(f"{source} has no {missing[0]}: an official Hub model has {' and '.join(HUB_FILES)}")
    try:
        settings = read_json(folder / "config.json")
        tensors = load_file(folder / "model.safetensors")
    except (ValueError, OSError, SafetensorError) as error:
        raise ConversionError(f"{source} cannot be read ({error}): is the download complete?") from error
    if settings.get("model_type") != "eat":
        raise ConversionError(f'{source} has model_type {settings.get("model_type")!r}, but the official SSLAM and EAT models have "eat"')
    student, head = _take_head(tensors)
    variant = settings.get("model_variant", "finetune" if head else "pretrain")
    if (variant == "finetune") != bool(head):
        raise ConversionError(f"{source} says model_variant {variant}, but {'has' if head else 'lacks'} a head: missing tensors?")
    size = settings.get("img_size", 1024)  # [frames, mel bins], or the frames alone
    return OfficialCheckpoint(
        source=source,
        student=student,
        head=head,
        settings={**settings, "num_classes": settings.get("num_classes") if head else None},
        time_patches=settings.get("max_length"),
        target_length=size[0] if isinstance(size, list) and size else size,
    )


def _read_fairseq(path: Path, source: str) -> OfficialCheckpoint:
    content = _load_inert(path)
    model, cfg = (content.get(key) if isinstance(content, Mapping) else None for key in ("model", "cfg"))
    if not isinstance(model, Mapping) or not isinstance(cfg, Mapping):
        raise ConversionError(f'{source} is not a fairseq checkpoint: expected a dict with "model" and "cfg"')
    tensors = dict(model)
    teacher = tensors.pop("_ema", None)
    if not isinstance(teacher, Mapping | None):
        raise ConversionError(f'{source}: "_ema" in "model" is a {type(teacher).__name__}, but the teacher is a dict of tensors')
    teacher = dict(teacher or {})
    every = [*tensors.items(), *teacher.items()]
    if strange := [name for name, value in every if not isinstance(name, str) or not isinstance(value, torch.Tensor)]:
        raise ConversionError(f'{source} has entries in "model" that are not tensors: {listed(strange)}')
    if sum(tensor.numel() * tensor.itemsize for _, tensor in every) > path.stat().st_size:
        raise ConversionError(f"{source} holds tensors larger than the file: it is not a published checkpoint")
    inner = ("model", "pretrained_model_args", "model") if "head.weight" in tensors else ("model",)
    outer, settings = _settings(source, cfg, "model"), _settings(source, cfg, *inner)
    if not settings:
        raise ConversionError(f"{source} has no cfg.{'.'.join(inner)}, without which the number of attention heads is unknown")
    image = _settings(source, cfg, *inner, "modalities", "image")
    decoder_settings = _settings(source, cfg, *inner, "modalities", "image", "decoder")
    tensors, head = _take_head(tensors)
    prefix = f"{IMAGE}decoder."
    decoder = {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
    of_the_head = {name: outer.get(name) if head else None for name in ("num_classes", "prediction_mode")}
    return OfficialCheckpoint(
        source=source,
        student=tensors,
        decoder=decoder,
        teacher=teacher,
        head=head,
        settings={**settings, **image, **decoder_settings, **of_the_head},
        time_patches=image.get("max_length"),
        target_length=outer.get("target_length") or image.get("target_length") or 1024,
        preset="speech_commands" if outer.get("spcv2_eval") else "esc50" if outer.get("esc50_eval") else "audioset",
    )


def _take_head(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors without, and those of, the classifier."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    head = {name: tensor for name, tensor in tensors.items() if name.startswith(("fc_norm.", "head."))}
    return {name: tensor for name, tensor in tensors.items() if name not in head}, head


def _settings(source: str, cfg: Mapping, *keys: str) -> dict[str, Any]:
    """A group of the settings, which may be missing; what is neither plain nor a group (a tensor, a class of fairseq) as text."""
    group: Any = cfg
    for key in keys:
        group = group.get(key) if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping | None):
        raise ConversionError(f"{source}: cfg.{'.'.join(keys)} is a {type(group).__name__}, but a group of settings is expected")
    return {
        str(name): value if isinstance(value, str | int | float | list | Mapping | None) else f"a {type(value).__name__}"
        for name, value in (group or {}).items()
    }


def _load_inert(path: Path) -> Any:
    """`torch.load` with `weights_only=True`, and inert stubs for classes that it does not know."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            damaged = None
            # torch.save compresses nothing: a file that unpacks to more than itself may be a zip bomb.
            packed = any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > path.stat().st_size
            if not packed:
                damaged = archive.testzip()  # torch does not check the checksums
    except Exception as error:  # of a damaged directory zipfile raises whatever its bytes lead to
        raise ConversionError(
            f"{path} cannot be read: it is not a whole file of torch.save in the format of torch 1.6 and newer ({error}): download it again"
        ) from error
    if packed:
        raise ConversionError(f"{path} cannot be read: it is compressed, but torch.save compresses nothing")
    if damaged is not None:
        raise ConversionError(f"{path} cannot be read: its part {damaged} is damaged. Download it again")
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stubs: list = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} cannot be read without running code in it, which is never done: it is hostile, or not a fairseq checkpoint"
        ) from error
    except Exception as error:  # what a damaged pickle leads to has no common class
        raise ConversionError(
            f"{path} cannot be read as a checkpoint of torch.save ({' '.join(str(error).split())[:200] or 'it is damaged'})"
        ) from error


class _Inert:
    """Any class or function that a pickle names: takes every argument and state, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _check_settings(checkpoint: OfficialCheckpoint) -> None:
    """Reject what would convert into a model that computes something else."""
    source, settings = checkpoint.source, checkpoint.settings
    heads = settings.get("num_heads")
    if type(heads) is not int or heads < 1:
        raise ConversionError(f"{source} has num_heads {heads!r}, but must have a positive whole number")
    for name, value in SUPPORTED_SETTINGS.items():
        if settings.get(name, value) not in (value, None):
            raise ConversionError(f"{source} has {name} {settings[name]!r}, but only models with {value!r} were published and are read")
    for name, value in (("max_length", checkpoint.time_patches), ("target_length", checkpoint.target_length)):
        if value is not None and (type(value) is not int or value < 1):
            raise ConversionError(f"{source}: {name} is {value!r}, but must be a positive whole number")
    parts = (checkpoint.student, checkpoint.decoder, checkpoint.teacher, checkpoint.head)
    for tensor in (tensor for part in parts for tensor in part.values()):
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize > 4 or tensor.layout != torch.strided:
            raise ConversionError(f"{source} holds sparse tensors, or others wider than float32 or not floating-point: none was published")
