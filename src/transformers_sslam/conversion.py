"""Official SSLAM and EAT checkpoints to this package's models, exactly and without running anything that a file holds.

Layouts read: fairseq pre-training and fine-tuned `.pt` files, and folders or repositories of the authors' Hub models (`model_type` "eat").
"""

import csv
import json
import pickle
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor, PreTrainedModel

from .configuration_sslam import SSLAMConfig
from .feature_extraction_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from .hub import add_remote_code, write_model_card
from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel
from .modeling_sslam_pretraining import SSLAMForPreTraining


NUM_AUDIOSET_CLASSES = 527

# Official module names to ours, tried in this order. `qkv` is split into three projections on the way.
RENAMED = (
    ("modality_encoders.IMAGE.", ""),
    ("local_encoder.proj.", "embeddings.patch_embeddings.projection."),
    ("fixed_positional_encoder.positions", "embeddings.position_embeddings"),
    ("context_encoder.norm.", "embeddings.layernorm."),
    ("pre_norm.", "embeddings.layernorm."),
    ("extra_tokens", "embeddings.cls_token"),
    ("blocks.", "layers."),
    (".attn.proj.", ".attention.o_proj."),
    (".norm1.", ".layernorm_after_attention."),
    (".norm2.", ".layernorm_after_mlp."),
)


class ConversionError(ValueError):
    """A checkpoint cannot be converted; the message says which file, what is wrong with it, and what was expected."""


@dataclass
class OfficialCheckpoint:
    """What a file says, in the official names: tensors of the encoder, and of whatever else it holds, and its settings."""

    source: str
    student: dict[str, torch.Tensor]
    decoder: dict[str, torch.Tensor] = field(default_factory=dict)
    teacher: dict[str, torch.Tensor] = field(default_factory=dict)
    head: dict[str, torch.Tensor] = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # embed_dim, depth, num_heads, norm_eps ... as the official code names them
    time_patches: int | None = None  # length of the position table
    target_length: int = 1024  # frames that the model was trained on
    preset: str = "audioset"


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    labels: str | Path | None = None,
    preset: str | None = None,
    problem_type: str | None = None,
) -> PreTrainedModel:
    """Convert an official checkpoint and verify the result by loading it again.

    A pre-training file becomes a [`SSLAMForPreTraining`] with its decoder and teacher, a Hub pre-training repository (which has neither) a
    [`SSLAMModel`], a fine-tuned one a [`SSLAMForAudioClassification`]. Config, safetensors, feature extractor, card and code are written
    to a temporary folder beside `output_dir`, loaded from there, compared tensor by tensor with the source, and only then moved into place.

    Args:
        source: a fairseq `.pt` file, a folder with `config.json` and `model.safetensors`, or a Hub id such as `ta012/SSLAM_pretrain`.
        output_dir: a folder that does not exist yet or is empty.
        labels: CSV with the columns `index` and `display_name` (AudioSet's `class_labels_indices.csv`), or `label` or `name`.
        preset: normalisation of the feature extractor, a key of `NORMALIZATION_PRESETS`; by default what the file says it was trained for.
        problem_type: `"multi_label_classification"` (the default for 527 classes) or `"single_label_classification"` (for any other).

    Returns:
        The model, as loaded again from `output_dir`.

    Raises:
        ConversionError: (a `ValueError`) if the file is damaged, belongs to another model, or lacks or has too many tensors. Nothing is
            written then.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConversionError(f"{output_dir} exists and is not an empty folder: choose another place, nothing is overwritten")
    if preset is not None and preset not in NORMALIZATION_PRESETS:
        raise ConversionError(f"there is no preset {preset!r}: choose one of {', '.join(NORMALIZATION_PRESETS)}")
    official = read_official_checkpoint(source)
    extractor = SSLAMFeatureExtractor.from_preset(preset or official.preset, max_length=official.target_length)
    config = _config(official, extractor, labels, problem_type)
    model_class, tensors = _rename(official)
    _check_tensors(official.source, model_class, config, tensors)

    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=output_dir.parent) as temporary:
        folder = Path(temporary) / "model"
        model = model_class(config)
        model.load_state_dict(tensors)
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        write_model_card(folder, _card_text(official, model))
        add_remote_code(folder)
        _verify(folder, model_class, tensors)
        if output_dir.exists():
            output_dir.rmdir()
        shutil.move(folder, output_dir)
    return model_class.from_pretrained(output_dir)


def read_official_checkpoint(source: str | Path) -> OfficialCheckpoint:
    """Recognise the layout of `source` and read it; see [`convert_checkpoint`]."""
    path = Path(source)
    if path.is_file():
        return _read_fairseq(path)
    if path.is_dir():
        return _read_hub_folder(path, str(source))
    if str(source).count("/") == 1 and not path.suffix:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(str(source), allow_patterns=["config.json", "model.safetensors"])
        return _read_hub_folder(Path(folder), str(source))
    raise ConversionError(f"{source} is neither a file, nor a folder, nor a Hub id (owner/name): check the path")


# --- reading


def _read_hub_folder(folder: Path, source: str) -> OfficialCheckpoint:
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ConversionError(f"{source} has no {name}: expected the files of an official Hub model, config.json and model.safetensors")
    try:
        settings = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ConversionError(f"{source} cannot be read ({error}): is the download complete?") from error
    if settings.get("model_type") != "eat":
        raise ConversionError(f'{source} has model_type {settings.get("model_type")!r}, but the official SSLAM and EAT models have "eat"')
    if not isinstance(settings.get("num_heads"), int):
        raise ConversionError(f"{source}/config.json has no num_heads: the number of attention heads cannot be told from the weights")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("fc_norm.", "head."))}
    return OfficialCheckpoint(
        source=source,
        student=tensors,
        head=head,
        settings=settings,
        time_patches=settings.get("max_length"),
        target_length=settings.get("img_size", [1024])[0],
    )


def _read_fairseq(path: Path) -> OfficialCheckpoint:
    content = _load_inert(path)
    model = content.get("model") if isinstance(content, Mapping) else None
    cfg = content.get("cfg") if isinstance(content, Mapping) else None
    if not isinstance(model, Mapping) or not isinstance(cfg, Mapping):
        raise ConversionError(f'{path} is no fairseq checkpoint: expected a dict with "model" and "cfg"')
    tensors = dict(model)
    teacher = tensors.pop("_ema", None) or {}
    if strange := [name for name, value in (*tensors.items(), *teacher.items()) if not isinstance(value, torch.Tensor)]:
        raise ConversionError(f'{path} has entries in "model" that are no tensors: {_listed(strange)}')
    outer = _get(cfg, "model") or {}
    fine_tuned = "head.weight" in tensors
    settings = (_get(cfg, "model", "pretrained_model_args", "model") if fine_tuned else outer) or {}
    if not isinstance(_get(settings, "num_heads"), int):
        where = "cfg.model.pretrained_model_args.model" if fine_tuned else "cfg.model"
        raise ConversionError(f"{path} has no {where}.num_heads: the number of attention heads cannot be told from the weights")
    if fine_tuned and outer.get("prediction_mode", "CLS_TOKEN") != "CLS_TOKEN":
        raise ConversionError(
            f"{path} predicts from {outer['prediction_mode']}, but only classifiers on CLS_TOKEN were published and are read"
        )

    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("fc_norm.", "head."))}
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    decoder_prefix = "modality_encoders.IMAGE.decoder."
    decoder = {name.removeprefix(decoder_prefix): tensors.pop(name) for name in list(tensors) if name.startswith(decoder_prefix)}
    image = _get(settings, "modalities", "image") or {}
    return OfficialCheckpoint(
        source=str(path),
        student=tensors,
        decoder=decoder,
        teacher=dict(teacher),
        head=head,
        settings={**settings, "decoder": image.get("decoder") or {}},
        time_patches=image.get("max_length"),
        target_length=outer.get("target_length") or image.get("target_length") or 1024,
        preset="speech_commands" if outer.get("spcv2_eval") else "esc50" if outer.get("esc50_eval") else "audioset",
    )


def _load_inert(path: Path) -> Any:
    """`torch.load` with `weights_only=True`; classes that it does not know become empty stubs, so that nothing in the file ever runs."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        stubs: list = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in unknown]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ConversionError(
            f"{path} cannot be read as a checkpoint of torch.save ({reason}): is it complete, and from a source you trust?"
        ) from error


class _Inert:
    """Stands for any class or function that a pickle names: takes every argument and state, and does nothing with them."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def _get(mapping: Any, *keys: str) -> Any:
    """`mapping[key][key]...`, or None where something on the way is missing or no mapping."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping


# --- renaming


def _config(
    official: OfficialCheckpoint, extractor: SSLAMFeatureExtractor, labels: str | Path | None, problem_type: str | None
) -> SSLAMConfig:
    """Sizes from the tensors, checked against the settings; what tensors cannot tell (heads, table's grid) from the settings."""
    names = {name: _rename_encoder_tensor(name) for name in official.student}
    shapes = {ours: official.student[name].shape for name, ours in names.items()}
    try:
        hidden_size, _, patch_size, _ = shapes["embeddings.patch_embeddings.projection.weight"]
        rows = shapes["embeddings.position_embeddings"][1]
        intermediate_size = shapes["layers.0.mlp.fc1.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise ConversionError(
            f"{official.source} is no SSLAM or EAT model: it lacks the patch embedding, the position table or the first block ({error}). "
            f"It holds {_listed(official.student)}"
        ) from error
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
    for name, found in (("embed_dim", hidden_size), ("depth", depth)):
        if official.settings.get(name, found) != found:
            raise ConversionError(
                f"{official.source}: its settings say {name} {official.settings[name]}, but its tensors {found}: missing tensors?"
            )
    if official.settings.get("layer_norm_first"):
        raise ConversionError(f"{official.source} is a pre-norm model (layer_norm_first): SSLAM and EAT are post-norm")

    time_patches = official.time_patches or rows // 8  # 128 mel bins in patches of 16, where the settings do not say
    if rows % time_patches:
        raise ConversionError(f"{official.source}: its position table has {rows} rows, but its settings say max_length {time_patches}")
    frequency_patches = rows // time_patches
    optional: dict = {}
    if official.decoder:
        widths = official.decoder["blocks.0.0.weight"].shape if "blocks.0.0.weight" in official.decoder else (768, 48, 3)
        optional |= {
            "decoder_hidden_size": widths[0],
            "decoder_num_groups": hidden_size // widths[1],
            "decoder_kernel_size": widths[2],
            "decoder_num_hidden_layers": len({name.split(".")[1] for name in official.decoder if name.startswith("blocks.")}),
        }
    if official.head:
        optional |= _label_settings(official, labels, problem_type)
    return SSLAMConfig(
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=official.settings["num_heads"],
        intermediate_size=intermediate_size,
        layer_norm_eps=official.settings.get("norm_eps") or 1e-6,
        qkv_bias="layers.0.attn.qkv.bias" in shapes,
        patch_size=patch_size,
        num_mel_bins=frequency_patches * patch_size,
        max_length=time_patches * patch_size,
        padding_value=(extractor.padding_value - extractor.mean) / (2 * extractor.std),
        **optional,
    )


def _rename_encoder_tensor(name: str) -> str:
    for theirs, ours in RENAMED:
        name = name.replace(theirs, ours)
    return name


def _rename(official: OfficialCheckpoint) -> tuple[type[PreTrainedModel], dict[str, torch.Tensor]]:
    """The class that fits what the checkpoint holds, and its tensors under our names, in float32."""
    student = _rename_encoder(official.student)
    if official.head:
        names = {"fc_norm.": "layernorm.", "head.": "classifier."}
        head = {name.replace(a, b): tensor for name, tensor in official.head.items() for a, b in names.items() if name.startswith(a)}
        return SSLAMForAudioClassification, {**_prefixed("sslam.", student), **_float32(head)}
    if not official.decoder:
        return SSLAMModel, student
    decoder = {
        name.replace("blocks.", "layers.")
        .replace(".0.weight", ".weight")
        .replace(".0.bias", ".bias")
        .replace("proj.", "projection."): tensor
        for name, tensor in official.decoder.items()
    }
    teacher = _rename_encoder(official.teacher) if official.teacher else student
    return SSLAMForPreTraining, {
        **_prefixed("sslam.", student),
        **_prefixed("decoder.", _float32(decoder)),
        **_prefixed("teacher.", {name: tensor.clone() for name, tensor in teacher.items()}),
    }


def _rename_encoder(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in _float32(tensors).items():
        name = _rename_encoder_tensor(name)
        if ".attn.qkv." in name:  # rows: all of q, then k, then v
            for part, rows in zip("qkv", tensor.chunk(3)):
                renamed[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows.clone()
        else:
            renamed[name] = tensor
    return renamed


def _float32(tensors: dict) -> dict[str, torch.Tensor]:
    """Half-precision weights are widened, which loses nothing."""
    return {name: tensor.float() for name, tensor in tensors.items()}


def _prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _label_settings(official: OfficialCheckpoint, labels: str | Path | None, problem_type: str | None) -> dict:
    if "head.weight" not in official.head:
        raise ConversionError(f"{official.source} has a fc_norm but no head.weight: the classifier's last layer is missing")
    count = len(official.head["head.weight"])
    names = [f"LABEL_{i}" for i in range(count)] if labels is None else _read_labels(labels, count)
    default = "multi_label_classification" if count == NUM_AUDIOSET_CLASSES else "single_label_classification"
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem_type or default,
    }


def _read_labels(path: str | Path, count: int) -> list[str]:
    """Names in the order of their index; every index from 0 to `count - 1` once, every name once."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ConversionError(f"the labels cannot be read: {error}") from error
    columns = list(rows[0]) if rows else []
    name_column = next((column for column in ("display_name", "label", "name") if column in columns), None)
    if "index" not in columns or name_column is None:
        raise ConversionError(f"{path} has the columns {columns}, but needs index and one of display_name, label, name")
    try:
        names = {int(row["index"]): row[name_column] for row in rows}
    except ValueError as error:
        raise ConversionError(f"{path} has an index that is no whole number ({error})") from error
    if sorted(names) != list(range(count)) or len(rows) != count or len(set(names.values())) != count:
        raise ConversionError(
            f"{path} has {len(rows)} rows with {len(set(names.values()))} different names, but the model's {count} classes need each index "
            f"from 0 to {count - 1} once, with a name of its own"
        )
    return [names[i] for i in range(count)]


# --- checking


def _check_tensors(source: str, model_class: type[PreTrainedModel], config: SSLAMConfig, tensors: dict[str, torch.Tensor]) -> None:
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"it lacks {_listed(missing)}")
    if surplus := [name for name in tensors if name not in expected]:
        problems.append(f"it has, beyond what belongs there, {_listed(surplus)}")
    if wrong := [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]:
        problems.append("shapes differ: " + _listed([f"{n} {tuple(tensors[n].shape)} for {tuple(expected[n].shape)}" for n in wrong]))
    if bad := [name for name in expected if not wrong and name in tensors and not torch.isfinite(tensors[name]).all()]:
        problems.append(f"NaN or infinity in {_listed(bad)}")
    if problems:
        raise ConversionError(f"{source} does not hold a whole {model_class.__name__} (names are ours): " + "; ".join(problems))


def _listed(names, most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _verify(folder: Path, model_class: type[PreTrainedModel], tensors: dict[str, torch.Tensor]) -> None:
    """Load what was written as a user would, and compare every tensor with the source's."""
    reloaded = model_class.from_pretrained(folder)
    loaded = reloaded.state_dict()
    changed = [name for name, tensor in tensors.items() if not torch.equal(loaded[name], tensor)]
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    encoder = SSLAMModel.from_pretrained(folder).eval()
    noise = torch.randn(extractor.sampling_rate, generator=torch.Generator().manual_seed(0)) * 0.1
    inputs = extractor(noise, sampling_rate=extractor.sampling_rate, padding="longest", return_tensors="pt")
    with torch.inference_mode():
        finite = bool(torch.isfinite(encoder(**inputs).last_hidden_state).all())
    if changed or not finite:
        raise ConversionError(
            f"what was written differs from the source when loaded again ({_listed(changed) or 'features are not finite'})"
        )


def _card_text(official: OfficialCheckpoint, model: PreTrainedModel) -> str:
    kept = "encoder, decoder and teacher" if isinstance(model, SSLAMForPreTraining) else "encoder"
    if official.head:
        kept += " and classifier"
    return (
        f"Converted from `{Path(official.source).name if Path(official.source).exists() else official.source}` ({kept}, tensor for tensor, "
        "float32). The weights are their authors' work and keep their licence."
    )


__all__ = ["ConversionError", "OfficialCheckpoint", "convert_checkpoint", "read_official_checkpoint"]
