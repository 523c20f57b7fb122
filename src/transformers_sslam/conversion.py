"""Official SSLAM and EAT checkpoints to this package's models, exactly."""

import csv
from pathlib import Path
from typing import Any

import torch
from transformers import AutoFeatureExtractor, PreTrainedModel

from .configuration_sslam import PRETRAINING_STAGES, SSLAMConfig
from .feature_extraction_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from .files import write_folder_atomically
from .hub import add_remote_code
from .model_cards import write_model_card
from .modeling_sslam import SSLAMForAudioClassification, SSLAMModel
from .modeling_sslam_pretraining import SSLAMForPreTraining
from .official import ConversionError, OfficialCheckpoint, listed, read_official_checkpoint


NUM_AUDIOSET_CLASSES = 527
PROBLEM_TYPES = (None, "multi_label_classification", "single_label_classification")

# Official settings of the pre-training to ours, for those who go on with it.
TRAINING_SETTINGS = {
    "clone_batch": "num_views",
    "mask_prob": "mask_ratio",
    "mask_prob_adjust": "mask_ratio_adjust",
    "mask_length": "mask_block_size",
    "mask_noise_std": "mask_noise_std",
    "cls_loss": "global_loss_weight",
    "ema_decay": "ema_decay",
    "ema_end_decay": "ema_end_decay",
    "ema_anneal_end_step": "ema_anneal_end_step",
}

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
    output_dir = Path(output_dir).resolve()
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConversionError(f"{output_dir} exists and is not an empty folder: choose another place, nothing is overwritten")
    if preset is not None and preset not in NORMALIZATION_PRESETS:
        raise ConversionError(f"there is no preset {preset!r}: choose one of {', '.join(NORMALIZATION_PRESETS)}")
    if problem_type not in PROBLEM_TYPES:
        raise ConversionError(f"there is no problem_type {problem_type!r}: choose one of {', '.join(PROBLEM_TYPES[1:])}")
    official = read_official_checkpoint(source)
    if labels is not None and not official.head:
        raise ConversionError(f"{official.source} has no classifier to name the classes of: leave the labels out")
    try:
        config = _config(official, labels, problem_type)
        extractor = _extractor(official, config, preset)
        model_class, tensors = _rename(official)
        _check_tensors(official.source, model_class, config, tensors)
    except ConversionError:
        raise
    except Exception as error:  # what a damaged file says may lead to an error of any class
        raise ConversionError(f"{official.source}: what it says does not make a model ({error})") from error
    config.padding_value = extractor.scaled_padding_value
    try:
        _write(output_dir, model_class(config), tensors, extractor, official)
    except OSError as error:
        raise ConversionError(f"{output_dir} cannot be written ({error}): choose another place") from error
    return model_class.from_pretrained(output_dir)


def _write(
    output_dir: Path,
    model: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    extractor: SSLAMFeatureExtractor,
    official: OfficialCheckpoint,
) -> None:
    """Write all files to a folder beside `output_dir`, verify them, and only then give them their place."""
    model.load_state_dict(tensors)
    with write_folder_atomically(output_dir) as folder:
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        write_model_card(folder, _card_text(official, model))
        add_remote_code(folder)
        _verify(folder, type(model), tensors)


# --- renaming


def _config(official: OfficialCheckpoint, labels: str | Path | None, problem_type: str | None) -> SSLAMConfig:
    """Sizes from the tensors, checked against the settings; what tensors cannot tell (heads, table's grid) from the settings."""
    source, settings = official.source, official.settings
    shapes = {_rename_encoder_tensor(str(name)): tensor.shape for name, tensor in official.student.items()}
    try:
        hidden_size, _, patch_size, _ = shapes["embeddings.patch_embeddings.projection.weight"]
        rows = shapes["embeddings.position_embeddings"][1]
        intermediate_size = shapes["layers.0.mlp.fc1.weight"][0]
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
    except (KeyError, IndexError, ValueError) as error:
        raise ConversionError(
            f"{source} is no SSLAM or EAT model: it lacks the patch embedding, the position table or the blocks ({error}). It holds "
            f"{listed(official.student)}"
        ) from error
    time_patches = official.time_patches or rows // 8  # 128 mel bins in patches of 16, where the settings do not say
    if rows % time_patches:
        raise ConversionError(f"{source}: its position table has {rows} rows, but its settings say max_length {time_patches}")
    frequency_patches = rows // time_patches
    qkv_bias = "layers.0.attn.qkv.bias" in shapes
    for name, found in {
        **{"embed_dim": hidden_size, "depth": depth, "mlp_ratio": intermediate_size / hidden_size, "qkv_bias": qkv_bias},
        **{"patch_size": patch_size, "stride": patch_size, "mel_bins": frequency_patches * patch_size},
    }.items():
        if settings.get(name, found) not in (found, None):
            raise ConversionError(f"{source}: its settings say {name} {settings[name]}, but its tensors {found}: missing tensors?")
    return SSLAMConfig(
        hidden_size=hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=settings["num_heads"],
        intermediate_size=intermediate_size,
        layer_norm_eps=settings.get("norm_eps") or 1e-6,
        qkv_bias=qkv_bias,
        patch_size=patch_size,
        num_mel_bins=frequency_patches * patch_size,
        max_length=time_patches * patch_size,
        **(_decoder_settings(official, hidden_size) if official.decoder else {}),
        **(_label_settings(official, labels, problem_type) if official.head else {}),
    )


def _decoder_settings(official: OfficialCheckpoint, hidden_size: int) -> dict[str, Any]:
    """The decoder's sizes, and how the pre-training was set."""
    if "blocks.0.0.weight" not in official.decoder:
        raise ConversionError(f"{official.source} has a decoder without its first convolution: it holds {listed(official.decoder)}")
    width, group_width, kernel, _ = official.decoder["blocks.0.0.weight"].shape
    top_layers = official.settings.get("average_top_k_layers")
    # Which stage a file is of it says by nothing but the number of views.
    stage = 1 if official.settings.get("clone_batch") == PRETRAINING_STAGES[1]["num_views"] else 2
    return {
        **PRETRAINING_STAGES[stage],
        "decoder_hidden_size": width,
        "decoder_num_groups": hidden_size // group_width,
        "decoder_kernel_size": kernel,
        "decoder_num_hidden_layers": len({name.split(".")[1] for name in official.decoder if name.startswith("blocks.")}),
        "local_target_layers": None if top_layers is None else min(top_layers, official.settings.get("depth") or top_layers),
        **{ours: official.settings[theirs] for theirs, ours in TRAINING_SETTINGS.items() if official.settings.get(theirs) is not None},
    }


def _extractor(official: OfficialCheckpoint, config: SSLAMConfig, preset: str | None) -> SSLAMFeatureExtractor:
    """What the model was trained to hear; never more than its position table covers."""
    length = min(official.target_length, config.max_length)
    return SSLAMFeatureExtractor.from_preset(
        preset or official.preset, max_length=length, num_mel_bins=config.num_mel_bins, pad_to_multiple_of=config.patch_size
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
    if official.settings.get("num_classes", count) not in (count, None):
        raise ConversionError(
            f"{official.source}: its settings say num_classes {official.settings['num_classes']}, but its head has {count}"
        )
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
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ConversionError(f"the labels in {path} cannot be read as CSV in UTF-8: {error}") from error
    columns = list(rows[0]) if rows else []
    name_column = next((column for column in ("display_name", "label", "name") if column in columns), None)
    if "index" not in columns or name_column is None:
        raise ConversionError(f"{path} has the columns {columns}, but needs index and one of display_name, label, name")
    try:
        names = {int(row["index"]): row[name_column] for row in rows}
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{path} has an index that is no whole number ({error})") from error
    if None in names.values() or sorted(names) != list(range(count)) or len(rows) != count or len(set(names.values())) != count:
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
        problems.append(f"it lacks {listed(missing)}")
    if surplus := [name for name in tensors if name not in expected]:
        problems.append(f"it has, beyond what belongs there, {listed(surplus)}")
    if wrong := [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]:
        problems.append("shapes differ: " + listed([f"{n} {tuple(tensors[n].shape)} for {tuple(expected[n].shape)}" for n in wrong]))
    if bad := [name for name in expected if not wrong and name in tensors and not torch.isfinite(tensors[name]).all()]:
        problems.append(f"NaN or infinity in {listed(bad)}")
    if problems:
        raise ConversionError(f"{source} does not hold a whole {model_class.__name__} (names are ours): " + "; ".join(problems))


def _verify(folder: Path, model_class: type[PreTrainedModel], tensors: dict[str, torch.Tensor]) -> None:
    """Load what was written as a user would, and compare every tensor with the source's."""
    reloaded = model_class.from_pretrained(folder)
    loaded = reloaded.state_dict()
    changed = [name for name, tensor in tensors.items() if not torch.equal(loaded[name], tensor)]
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    encoder = SSLAMModel.from_pretrained(folder).eval()
    noise = torch.randn(extractor.sampling_rate, generator=torch.Generator().manual_seed(0)) * 0.1
    inputs = extractor(noise, sampling_rate=extractor.sampling_rate, return_tensors="pt")
    with torch.inference_mode():
        finite = bool(torch.isfinite(encoder(**inputs).last_hidden_state).all())
    if changed or not finite:
        raise ConversionError(
            f"what was written differs from the source when loaded again ({listed(changed) or 'features are not finite'})"
        )


def _card_text(official: OfficialCheckpoint, model: PreTrainedModel) -> str:
    kept = "encoder, decoder and teacher" if isinstance(model, SSLAMForPreTraining) else "encoder"
    if official.head:
        kept += " and classifier"
    return (
        f"Converted from `{Path(official.source).name if Path(official.source).exists() else official.source}` ({kept}, tensor for tensor, "
        "float32). The weights are their authors' work and keep their licence."
    )


__all__ = ["ConversionError", "convert_checkpoint"]
