"""Official SSLAM and EAT checkpoints to this package's models, tensor for tensor."""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants
from transformers import AutoFeatureExtractor, AutoModel, PreTrainedModel
from transformers.utils import cached_file

from .. import __version__
from ..configuration_sslam import PRETRAINING_STAGES, SSLAMConfig
from ..errors import UserError, as_user_error, missing_model
from ..feature_extraction_sslam import NORMALIZATION_PRESETS, SSLAMFeatureExtractor
from ..files import check_free, hash_file, lock, read_json, verify, write_folder_atomically
from ..loading_sslam import PATCH_PROJECTION
from ..names import listed
from ..settings import setting
from .cards import public_name, write_model_card
from .hub import MODEL_CLASSES, add_remote_code
from .official import HUB_FILES, ConversionError, OfficialCheckpoint, locate_checkpoint, read_official_checkpoint


ProblemType = Literal["multi_label_classification", "single_label_classification"]
AUDIOSET_LABELS = Path(__file__).parent / "audioset_labels.txt"  # one a line, in the order of class_labels_indices.csv

# Official settings of the pre-training to ours, for those who continue it.
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
RENAMED_IN_DECODER = (("blocks.", "layers."), (".0.weight", ".weight"), (".0.bias", ".bias"), ("proj.", "projection."))
RENAMED_IN_HEAD = (("fc_norm.", "layernorm."), ("head.", "classifier."))


@dataclass(kw_only=True)
class ConversionSettings:
    """Conversion"""

    model: str = setting("official checkpoint: a fairseq .pt file, a folder with config.json and model.safetensors, or a Hub id")
    output_dir: str = setting("folder to write the model to, new or empty")
    labels: str | None = setting("CSV file of class names, columns index and display_name; by default AudioSet's for 527 classes", None)
    preset: str | None = setting(f"normalization: {', '.join(NORMALIZATION_PRESETS)}; by default that of the training", None)
    problem_type: ProblemType | None = setting("kind of classification; by default multi_label_classification for 527 classes only", None)


def run(settings: ConversionSettings) -> None:
    """Convert, and print what was written."""
    model = convert_checkpoint(settings.model, settings.output_dir, settings.labels, settings.preset, settings.problem_type)
    size = f"{type(model).__name__}, {model.num_parameters() / 1e6:.1f} M parameters"
    print(f"{settings.output_dir}: {size}, every tensor verified by loading it again")


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    labels: str | Path | None = None,
    preset: str | None = None,
    problem_type: ProblemType | None = None,
) -> PreTrainedModel:
    """Convert an official checkpoint and verify the result by loading it again.

    A pre-training file becomes a [`SSLAMForPreTraining`] with its decoder and teacher, a Hub pre-training repository (which has neither) a
    [`SSLAMModel`], a fine-tuned one a [`SSLAMForAudioClassification`]. A temporary folder beside `output_dir` is moved into place once its
    tensors, loaded again, are those of the source.

    Args:
        source: a fairseq `.pt` file, a folder with `config.json` and `model.safetensors`, or a Hub id such as `ta012/SSLAM_pretrain`.
        output_dir: new or empty.
        labels: CSV with the columns `index` and `display_name`, `label` or `name`; by default, for 527 classes, AudioSet's names.
        preset: normalization, a key of `NORMALIZATION_PRESETS`; by default that of the training.
        problem_type: by default `"multi_label_classification"` for 527 classes, else `"single_label_classification"`.

    Returns:
        The model, as loaded again from `output_dir`.

    Raises:
        UserError: if `output_dir` is not free.
        ConversionError: if the checkpoint is damaged, of another model, or lacks or has too many tensors. Nothing is
            written then.
    """
    output_dir = check_free(output_dir)
    if preset not in (None, *NORMALIZATION_PRESETS):
        raise ConversionError(f"preset is {preset!r}, but must be one of {', '.join(NORMALIZATION_PRESETS)}")
    official = read_official_checkpoint(locate_checkpoint(source), str(source))
    return _convert(official, output_dir, labels, preset, problem_type).from_pretrained(output_dir)


def convert_to_cache(checkpoint: str | Path) -> Path:
    """A folder below `HF_HOME` with the converted checkpoint, from an earlier call unless that is damaged.

    It is named after the commit of a Hub id, or the content of a file or folder, and locked meanwhile. Argument and errors are those of
    [`convert_checkpoint`]'s `source`.
    """
    path = locate_checkpoint(checkpoint)
    if path != Path(checkpoint):
        identity = f"{checkpoint}@{path.name}"  # the folder of a download is named after its commit
    else:
        files = [path] if path.is_file() else [file for name in HUB_FILES if (file := path / name).is_file()]
        identity = " ".join(map(hash_file, files))
    digest = hashlib.sha256(f"{__version__} {identity}".encode()).hexdigest()[:16]
    folder = Path(constants.HF_HOME) / "transformers_sslam" / f"{Path(checkpoint).resolve().stem}-{digest}"
    with lock(folder, wait=True):
        if verify(folder) is not None:  # not there, or damaged
            _convert(read_official_checkpoint(path, str(checkpoint)), folder, manifest=True)
    return folder


def resolve_model(model: str) -> str:
    """What `from_pretrained` loads: `model` itself or, of an official checkpoint (fairseq file, or `model_type` "eat"), the folder in the
    cache.

    Raises:
        UserError: if there is no such model, or it cannot be converted.
    """
    if Path(model).is_file():
        return str(convert_to_cache(model))
    try:
        config = cached_file(model, "config.json", _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise missing_model(model) from error
    if config is None and not Path(model).is_dir():
        raise missing_model(model)
    if config is None:
        raise UserError(f"model {model} holds no config.json: give a folder, or a name on the Hub, in which a model was saved")
    with as_user_error(f"model {model} cannot be read"):
        official = read_json(config).get("model_type") == "eat"
    return str(convert_to_cache(model)) if official else model


def _convert(
    official: OfficialCheckpoint,
    output_dir: Path,
    labels: str | Path | None = None,
    preset: str | None = None,
    problem_type: str | None = None,
    manifest: bool = False,
) -> type[PreTrainedModel]:
    """Write the model, and return its class."""
    if labels is not None and not official.head:
        raise ConversionError(f"{official.source} has no classifier to name classes of: leave the labels out")
    if problem_type is not None and not official.head:
        raise ConversionError(f"problem_type is {problem_type!r}, but {official.source} has no classifier: leave it out")
    try:
        config = _config(official, labels, problem_type)
        extractor = _extractor(official, config, preset)
        model_class, tensors = _rename(official)
        tensors = _fit(official.source, model_class, config, tensors)
    except ConversionError:
        raise
    except Exception as error:  # a damaged file may lead to any
        raise ConversionError(f"{official.source}: what it says does not make a model ({error})") from error
    config.padding_value = extractor.scaled_padding_value
    try:
        _write(output_dir, model_class(config), tensors, extractor, official, manifest)
    except OSError as error:
        raise ConversionError(f"{output_dir} cannot be written ({error}): choose another place") from error
    return model_class


def _write(
    output_dir: Path,
    model: PreTrainedModel,
    tensors: dict[str, torch.Tensor],
    extractor: SSLAMFeatureExtractor,
    official: OfficialCheckpoint,
    manifest: bool,
) -> None:
    model.load_state_dict(tensors)
    with write_folder_atomically(output_dir, manifest) as folder:
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        kept = [name for name in ("encoder", "decoder", "teacher", "classifier") if name == "encoder" or hasattr(model, name)]
        write_model_card(
            folder,
            f"Converted from `{public_name(official.source)}` ({', '.join(kept)}: tensor for tensor, float32). The weights are their "
            "authors' work and keep their licence.",
            place=output_dir,
        )
        add_remote_code(folder)
        _verify(folder, type(model), tensors)


# --- the configuration


def _config(official: OfficialCheckpoint, labels: str | Path | None, problem_type: str | None) -> SSLAMConfig:
    """Sizes from the tensors, checked against the settings, which tell the rest (heads, grid of the position table)."""
    source, settings = official.source, official.settings
    shapes = {_renamed(str(name), RENAMED): tensor.shape for name, tensor in official.student.items()}
    try:
        hidden_size, _, patch_size, _ = shapes["embeddings.patch_embeddings.projection.weight"]
        rows = shapes["embeddings.position_embeddings"][1]
        intermediate_size = shapes["layers.0.mlp.fc1.weight"][0]
        depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
    except (KeyError, IndexError, ValueError) as error:
        raise ConversionError(
            f"{source} is not a SSLAM or EAT model: it lacks patch embedding, position table or blocks ({error}), but holds "
            f"{listed(official.student)}"
        ) from error
    time_patches = official.time_patches or rows // 8  # by default 128 mel bins in patches of 16
    if rows % time_patches:
        raise ConversionError(f"{source}: its position table has {rows} rows, but its settings say max_length {time_patches}")
    frequency_patches = rows // time_patches
    classes = len(official.head["head.weight"]) if "head.weight" in official.head else None
    qkv_bias = "layers.0.attn.qkv.bias" in shapes
    for name, found in {
        **{"embed_dim": hidden_size, "depth": depth, "mlp_ratio": intermediate_size / hidden_size, "qkv_bias": qkv_bias},
        **{"patch_size": patch_size, "stride": patch_size, "mel_bins": frequency_patches * patch_size, "num_classes": classes},
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
        **(_label_settings(classes, labels, problem_type) if classes else {}),
    )


def _decoder_settings(official: OfficialCheckpoint, hidden_size: int) -> dict[str, Any]:
    settings = official.settings
    if "blocks.0.0.weight" not in official.decoder:
        raise ConversionError(f"{official.source} has a decoder without its first convolution: it holds {listed(official.decoder)}")
    width, group_width, kernel, _ = official.decoder["blocks.0.0.weight"].shape
    top_layers = settings.get("average_top_k_layers")
    # Nothing but the number of views tells the stage.
    stage = 1 if settings.get("clone_batch") == PRETRAINING_STAGES[1]["num_views"] else 2
    return {
        **PRETRAINING_STAGES[stage],
        "decoder_hidden_size": width,
        "decoder_num_groups": hidden_size // group_width,
        "decoder_kernel_size": kernel,
        "decoder_num_hidden_layers": len({name.split(".")[1] for name in official.decoder if name.startswith("blocks.")}),
        "local_target_layers": None if top_layers is None else min(top_layers, settings.get("depth") or top_layers),
        **{ours: settings[theirs] for theirs, ours in TRAINING_SETTINGS.items() if settings.get(theirs) is not None},
    }


def _extractor(official: OfficialCheckpoint, config: SSLAMConfig, preset: str | None) -> SSLAMFeatureExtractor:
    """The log-mels of the training, never longer than the position table."""
    length = min(official.target_length, config.max_length)
    return SSLAMFeatureExtractor.from_preset(
        preset or official.preset, max_length=length, num_mel_bins=config.num_mel_bins, pad_to_multiple_of=config.patch_size
    )


def _label_settings(count: int, labels: str | Path | None, problem_type: str | None) -> dict[str, Any]:
    audioset = AUDIOSET_LABELS.read_text(encoding="utf-8").splitlines()
    if labels is not None:
        names = _read_labels(labels, count)
    else:
        names = audioset if count == len(audioset) else [f"LABEL_{i}" for i in range(count)]
    default = "multi_label_classification" if count == len(audioset) else "single_label_classification"
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": problem_type or default,
    }


def _read_labels(path: str | Path, count: int) -> list[str]:
    """Names in the order of their index."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ConversionError(f"the labels in {path} cannot be read as CSV in UTF-8: {error}") from error
    columns = list(rows[0]) if rows else []
    column = next((name for name in ("display_name", "label", "name") if name in columns), None)
    if "index" not in columns or column is None:
        raise ConversionError(f"{path} has the columns {columns}, but needs index and one of display_name, label, name")
    names = {row["index"]: row[column] for row in rows}
    indices = [str(i) for i in range(count)]
    if len(rows) != count or set(names) != set(indices) or None in names.values() or len(set(names.values())) != count:
        raise ConversionError(
            f"{path} has {len(rows)} rows with {len(set(names.values()))} different names, but {count} classes need each index from 0 to "
            f"{count - 1} once, with a name of its own"
        )
    return [names[i] for i in indices]


# --- the tensors


def _renamed(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for theirs, ours in pairs:
        name = name.replace(theirs, ours)
    return name


def _rename(official: OfficialCheckpoint) -> tuple[type[PreTrainedModel], dict[str, torch.Tensor]]:
    """The class that fits, and the tensors under our names, in float32."""
    student = _rename_encoder(official.student)
    if not official.head and not official.decoder:
        return MODEL_CLASSES["SSLAMModel"], student
    tensors = {f"sslam.{name}": tensor for name, tensor in student.items()}
    if official.head:
        head = {_renamed(name, RENAMED_IN_HEAD): tensor.float() for name, tensor in official.head.items()}
        return MODEL_CLASSES["SSLAMForAudioClassification"], tensors | head
    teacher = _rename_encoder(official.teacher or official.student)
    decoder = {_renamed(name, RENAMED_IN_DECODER): tensor.float() for name, tensor in official.decoder.items()}
    tensors |= {f"decoder.{name}": tensor for name, tensor in decoder.items()}
    return MODEL_CLASSES["SSLAMForPreTraining"], tensors | {f"teacher.{name}": tensor.clone() for name, tensor in teacher.items()}


def _rename_encoder(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        name, tensor = _renamed(name, RENAMED), tensor.float()
        if ".attn.qkv." in name:  # rows: all of q, then k, then v
            for part, rows in zip("qkv", tensor.chunk(3)):
                renamed[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows.clone()
        else:
            renamed[name] = tensor
    return renamed


def _fit(source: str, model_class: type[PreTrainedModel], config: SSLAMConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the model's shapes: all, finite, and no others."""
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    fitted = {name: tensor for name, tensor in tensors.items() if name in expected}
    for name, tensor in fitted.items():
        if name.endswith(PATCH_PROJECTION) and tensor.numel() == expected[name].numel():
            fitted[name] = tensor.reshape(expected[name].shape)
    problems = []
    if missing := [name for name in expected if name not in tensors]:
        problems.append(f"it lacks {listed(missing)}")
    if surplus := [name for name in tensors if name not in expected]:
        problems.append(f"it has, beyond them, {listed(surplus)}")
    if wrong := [name for name, tensor in fitted.items() if tensor.shape != expected[name].shape]:
        problems.append("shapes differ: " + listed([f"{n} {tuple(fitted[n].shape)} for {tuple(expected[n].shape)}" for n in wrong]))
    if bad := [name for name, tensor in fitted.items() if not wrong and not torch.isfinite(tensor).all()]:
        problems.append(f"NaN or infinity in {listed(bad)}")
    if problems:
        raise ConversionError(f"{source} does not hold a whole {model_class.__name__} (names are ours): " + "; ".join(problems))
    return fitted


def _verify(folder: Path, model_class: type[PreTrainedModel], tensors: dict[str, torch.Tensor]) -> None:
    """Load what was written, and compare every tensor with the source's."""
    loaded = model_class.from_pretrained(folder).state_dict()
    changed = [name for name, tensor in tensors.items() if not torch.equal(loaded[name], tensor)]
    extractor, encoder = AutoFeatureExtractor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    noise = torch.randn(extractor.sampling_rate, generator=torch.Generator().manual_seed(0)) * 0.1
    with torch.inference_mode():
        hidden = encoder(**extractor(noise, sampling_rate=extractor.sampling_rate, return_tensors="pt")).last_hidden_state
    if changed or not torch.isfinite(hidden).all():
        raise ConversionError(f"what was written differs from the source when loaded again: {listed(changed) or 'features are not finite'}")
