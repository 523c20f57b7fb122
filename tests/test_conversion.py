"""Official checkpoints: every layout, tensor by tensor; nothing in a file is ever run; what cannot be converted leaves nothing behind."""

import copy
import csv
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import FIXTURES
from hub_server import HubServer, Repository
from processes import Fork
from safetensors.torch import load_file, save_file
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, AutoModelForPreTraining

from transformers_sslam import PRETRAINING_STAGES, SSLAMForAudioClassification, SSLAMForPreTraining, SSLAMModel
from transformers_sslam.cli import main
from transformers_sslam.errors import UserError
from transformers_sslam.publishing import conversion
from transformers_sslam.publishing.conversion import ConversionError, convert_checkpoint, convert_to_cache, resolve_model
from transformers_sslam.publishing.official import read_official_checkpoint


WIDTH, DEPTH, HEADS, GROUPS, CLASSES = 32, 2, 4, 8, 5


# --- checkpoints as the authors' code writes them


def encoder_tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = "modality_encoders.IMAGE."
    shapes = {
        f"{image}extra_tokens": (1, 1, WIDTH),
        f"{image}local_encoder.proj.weight": (WIDTH, 1, 16, 16),
        f"{image}local_encoder.proj.bias": (WIDTH,),
        f"{image}fixed_positional_encoder.positions": (1, 16 * 8, WIDTH),
        f"{image}context_encoder.norm.weight": (WIDTH,),
        f"{image}context_encoder.norm.bias": (WIDTH,),
    }
    for i in range(DEPTH):
        linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH), "mlp.fc1": (64, WIDTH), "mlp.fc2": (WIDTH, 64)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.{norm}.{part}": (WIDTH,) for norm in ("norm1", "norm2") for part in ("weight", "bias")}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def decoder_tensors() -> dict[str, torch.Tensor]:
    shapes = {
        "blocks.0.0.weight": (WIDTH, WIDTH // GROUPS, 3, 3),
        "blocks.0.0.bias": (WIDTH,),
        "proj.weight": (WIDTH, WIDTH),
        "proj.bias": (WIDTH,),
    }
    return {f"modality_encoders.IMAGE.decoder.{name}": torch.randn(shape) for name, shape in shapes.items()}


def settings(**changes) -> dict:
    image = {"max_length": 16, "target_length": 256, "decoder": {"decoder_dim": WIDTH, "decoder_groups": GROUPS, "decoder_kernel": 3}}
    return {
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": 2.0,
        "norm_eps": 1e-6,
        "modalities": {"image": image},
        **changes,
    }


def save_pretrained_fairseq(path: Path, model: dict | None = None, **cfg) -> Path:
    tensors = {**encoder_tensors(), **decoder_tensors(), "_ema": encoder_tensors(seed=1)}
    torch.save({"cfg": {"model": settings(**cfg)}, "model": tensors if model is None else model, "optimizer_history": []}, path)
    return path


def save_fine_tuned_fairseq(path: Path, classes: int = CLASSES, **outer) -> Path:
    head = {"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,), "head.weight": (classes, WIDTH), "head.bias": (classes,)}
    model = {f"model.{name}": tensor for name, tensor in encoder_tensors().items()} | {n: torch.randn(s) for n, s in head.items()}
    cfg = {
        "num_classes": classes,
        "target_length": 128,
        "prediction_mode": "CLS_TOKEN",
        "pretrained_model_args": {"model": settings()},
        **outer,
    }
    torch.save({"cfg": {"model": cfg}, "model": model}, path)
    return path


def save_hub_folder(folder: Path, classes: int = 0, **changes) -> Path:
    folder.mkdir()
    tensors = {
        "model." + name.replace("modality_encoders.IMAGE.", "").replace("context_encoder.norm", "pre_norm"): tensor
        for name, tensor in encoder_tensors().items()
    }
    if classes:
        head = {"fc_norm.weight": (WIDTH,), "fc_norm.bias": (WIDTH,), "head.weight": (classes, WIDTH), "head.bias": (classes,)}
        tensors |= {f"model.{name}": torch.randn(shape) for name, shape in head.items()}
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "eat",
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "max_length": 16,
        "img_size": [256, 128],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- every layout


def test_a_pre_training_file_keeps_student_decoder_and_teacher(tmp_path):
    source = save_pretrained_fairseq(tmp_path / "model.pt")
    model = convert_checkpoint(source, tmp_path / "out")
    assert type(model) is type(AutoModelForPreTraining.from_pretrained(tmp_path / "out")) is SSLAMForPreTraining
    content = torch.load(source, weights_only=True)["model"]
    q, k, v = content["blocks.1.attn.qkv.weight"].chunk(3)
    teacher_q = content["_ema"]["blocks.1.attn.qkv.weight"].chunk(3)[0]
    state = model.state_dict()
    for name, expected in {
        "sslam.layers.1.attention.q_proj.weight": q,
        "sslam.layers.1.attention.k_proj.weight": k,
        "sslam.layers.1.attention.v_proj.weight": v,
        "sslam.layers.0.layernorm_after_attention.bias": content["blocks.0.norm1.bias"],
        "sslam.layers.0.layernorm_after_mlp.bias": content["blocks.0.norm2.bias"],
        "sslam.embeddings.position_embeddings": content["modality_encoders.IMAGE.fixed_positional_encoder.positions"],
        "teacher.layers.1.attention.q_proj.weight": teacher_q,
        "decoder.layers.0.weight": content["modality_encoders.IMAGE.decoder.blocks.0.0.weight"],
        "decoder.projection.bias": content["modality_encoders.IMAGE.decoder.proj.bias"],
    }.items():
        assert torch.equal(state[name], expected), name
    config = model.config
    assert (config.num_attention_heads, config.intermediate_size, config.max_length, config.num_mel_bins) == (HEADS, 64, 256, 128)
    assert (config.decoder_num_groups, config.decoder_num_hidden_layers, config.decoder_kernel_size) == (GROUPS, 1, 3)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").max_length == 256
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "out").layers[1].attention.q_proj.weight, q)


def test_settings_of_the_pre_training_go_along(tmp_path):
    image = {**settings()["modalities"]["image"], "mask_prob": 0.7, "mask_length": 3, "mask_noise_std": 0.5, "mask_prob_adjust": 0.05}
    changes = {"modalities": {"image": image}, "clone_batch": 5, "ema_decay": 0.9, "ema_end_decay": 0.99, "ema_anneal_end_step": 7}
    config = convert_checkpoint(save_pretrained_fairseq(tmp_path / "m.pt", average_top_k_layers=12, **changes), tmp_path / "out").config
    assert (config.mask_ratio, config.mask_block_size, config.mask_noise_std, config.mask_ratio_adjust) == (0.7, 3, 0.5, 0.05)
    assert (config.num_views, config.local_target_layers) == (5, 2)
    assert (config.ema_decay, config.ema_end_decay, config.ema_anneal_end_step) == (0.9, 0.99, 7)


@pytest.mark.parametrize(("views", "stage"), [(16, 1), (8, 2)])
def test_a_file_is_of_the_stage_with_its_number_of_views(views, stage, tmp_path):
    config = convert_checkpoint(save_pretrained_fairseq(tmp_path / "m.pt", clone_batch=views), tmp_path / "out").config
    assert {name: getattr(config, name) for name in PRETRAINING_STAGES[stage]} == PRETRAINING_STAGES[stage]


def test_a_short_position_table_limits_the_feature_extractor(tmp_path):
    convert_checkpoint(save_fine_tuned_fairseq(tmp_path / "m.pt", target_length=1024), tmp_path / "out")
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").max_length == 256


def test_labels_and_a_kind_of_classification_need_a_classifier(tmp_path):
    with pytest.raises(ConversionError, match="no classifier to name"):
        convert_checkpoint(save_pretrained_fairseq(tmp_path / "m.pt"), tmp_path / "out", labels=write_labels(tmp_path / "l.csv", ["a"]))
    with pytest.raises(ConversionError, match="problem_type is 'single_label_classification', but .*m.pt has no classifier: leave it out"):
        convert_checkpoint(tmp_path / "m.pt", tmp_path / "out", problem_type="single_label_classification")


def test_a_file_without_a_teacher_starts_one_from_the_student(tmp_path):
    model = convert_checkpoint(save_pretrained_fairseq(tmp_path / "m.pt", {**encoder_tensors(), **decoder_tensors()}), tmp_path / "out")
    assert all(torch.equal(tensor, model.teacher.state_dict()[name]) for name, tensor in model.sslam.state_dict().items())


def test_a_file_without_a_decoder_is_an_encoder(tmp_path):
    assert type(convert_checkpoint(save_pretrained_fairseq(tmp_path / "m.pt", encoder_tensors()), tmp_path / "out")) is SSLAMModel


def test_half_precision_weights_are_widened_exactly(tmp_path):
    half = encoder_tensors(dtype=torch.float16)
    model = convert_checkpoint(save_pretrained_fairseq(tmp_path / "m.pt", half), tmp_path / "out")
    weight = model.layers[0].mlp.fc1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, half["blocks.0.mlp.fc1.weight"].float())


@pytest.mark.parametrize(
    ("outer", "mean", "frames"),
    [({}, -4.268, 128), ({"spcv2_eval": True}, -6.846, 128), ({"esc50_eval": True, "target_length": 256}, -6.627, 256)],
)
def test_a_fine_tuned_file_becomes_a_classifier_with_its_own_scale(tmp_path, outer, mean, frames):
    model = convert_checkpoint(save_fine_tuned_fairseq(tmp_path / "m.pt", **outer), tmp_path / "out")
    assert type(model) is type(AutoModelForAudioClassification.from_pretrained(tmp_path / "out")) is SSLAMForAudioClassification
    assert model.config.num_labels == CLASSES
    assert model.config.problem_type == "single_label_classification"
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (extractor.mean, extractor.max_length) == (mean, frames)
    assert model.config.padding_value == pytest.approx(-extractor.mean / (2 * extractor.std))


@pytest.mark.parametrize(("classes", "kind"), [(0, SSLAMModel), (CLASSES, SSLAMForAudioClassification)])
def test_hub_folders(tmp_path, classes, kind):
    model = convert_checkpoint(save_hub_folder(tmp_path / "hub", classes), tmp_path / "out")
    assert type(model) is kind
    encoder = AutoModel.from_pretrained(tmp_path / "out")
    tensors = load_file(tmp_path / "hub" / "model.safetensors")
    assert torch.equal(encoder.layers[1].mlp.fc2.weight, tensors["model.blocks.1.mlp.fc2.weight"])
    assert torch.equal(encoder.embeddings.layernorm.bias, tensors["model.pre_norm.bias"])
    assert encoder.config.layer_norm_eps == 1e-6


def test_every_reference_checkpoint_converts(reference, tmp_path):
    kinds = {
        "pretrained_fairseq.pt": SSLAMForPreTraining,
        "small_variance_fairseq.pt": SSLAMForPreTraining,
        "finetuned_fairseq.pt": SSLAMForAudioClassification,
        "hub_pretrain": SSLAMModel,
        "hub_finetune": SSLAMForAudioClassification,
    }
    for name, kind in kinds.items():
        assert type(convert_checkpoint(reference / name, tmp_path / name)) is kind


# --- converted once, into the cache

HUB_ID = "ta012/SSLAM_pretrain"
IN_A_PROCESS = """
import os, sys, time
import huggingface_hub
from transformers_sslam.publishing import conversion
huggingface_hub.constants.HF_HOME = sys.argv[2]
write = conversion._write
def counted(*arguments):
    print("converting", flush=True)
    time.sleep(float(sys.argv[3]))
    write(*arguments)
conversion._write = counted
if sys.argv[4:]:
    conversion._verify = lambda *_: os.kill(os.getpid(), 9)
print(conversion.convert_to_cache(sys.argv[1]))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder that converted checkpoints go to."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "transformers_sslam"


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """The folders that were converted to."""
    write, folders = conversion._write, []
    monkeypatch.setattr(conversion, "_write", lambda folder, *rest: folders.append(folder) or write(folder, *rest))
    return folders


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, with an official model and one of this package."""
    folders = {HUB_ID: save_hub_folder(tmp_path / "official"), "me/mine": tmp_path / "mine"}
    convert_checkpoint(folders[HUB_ID], folders["me/mine"])
    with HubServer() as server:
        for name, folder in folders.items():
            server.repositories[name] = Repository(False, {"main": {path.name: path.read_bytes() for path in folder.iterdir()}})
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield server


def start_conversion(source: Path, home: Path, log: Path, *words: str) -> Fork:
    program = log.with_suffix(".py")
    program.write_text(IN_A_PROCESS)
    return Fork([program, source, home, *words], log, errors=log.with_suffix(".errors"))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_local_checkpoint_is_converted_once_and_again_when_its_content_changes(tmp_path, cache, conversions, kind):
    save = save_pretrained_fairseq if kind == "file" else save_hub_folder
    source, copied = save(tmp_path / "model.pt"), tmp_path / "copy" / "model.pt"
    folder = convert_to_cache(source)
    assert folder.parent == cache
    assert len(AutoModel.from_pretrained(folder).layers) == DEPTH
    copied.parent.mkdir()
    source.rename(copied)
    assert convert_to_cache(str(copied)) == folder
    assert conversions == [folder]
    if kind == "file":
        save_pretrained_fairseq(copied, encoder_tensors(seed=5))
    else:
        (copied / "config.json").write_text((copied / "config.json").read_text().replace("}", ', "norm_eps": 1e-5}', 1))
    other = convert_to_cache(copied)
    assert other != folder
    assert conversions == [folder, other]


def test_a_hub_id_is_downloaded_and_converted_once_a_commit(hub, cache, conversions):
    folder = convert_to_cache(HUB_ID)
    assert convert_to_cache(HUB_ID) == folder
    assert conversions == [folder]
    assert "Converted from `ta012/SSLAM_pretrain`" in (folder / "README.md").read_text()
    files = hub.repositories[HUB_ID].branches["main"]
    files["config.json"] = json.dumps({**json.loads(files["config.json"]), "norm_eps": 1e-5}).encode()
    other = convert_to_cache(HUB_ID)
    assert AutoModel.from_pretrained(other).config.layer_norm_eps == 1e-5
    assert conversions == [folder, other]


def test_commands_take_official_names_and_files_and_leave_others_as_they_are(hub, cache, conversions, tmp_path):
    mine = str(tmp_path / "mine")
    assert [resolve_model(name) for name in (mine, "me/mine")] == [mine, "me/mine"]
    with pytest.raises(UserError, match=f"^model {tmp_path} holds no config.json: give a folder"):
        resolve_model(str(tmp_path))
    assert conversions == []
    official = [resolve_model(name) for name in (HUB_ID, str(tmp_path / "official"), str(save_fine_tuned_fairseq(tmp_path / "m.pt")))]
    assert len(set(official)) == len(conversions) == 3
    assert all(Path(folder).parent == cache for folder in official)
    with pytest.raises(UserError, match="^there is no folder or file me/nothing here, and no model of this name"):
        resolve_model("me/nothing")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="config.json is damaged"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("damage", ["bit", "missing", "manifest"])
def test_a_damaged_copy_in_the_cache_is_converted_again(tmp_path, cache, conversions, damage):
    source = save_hub_folder(tmp_path / "hub")
    weights = convert_to_cache(source) / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "bit":
        weights.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    elif damage == "missing":
        weights.unlink()
    else:
        (weights.parent / "manifest.json").write_text("{")
    assert convert_to_cache(source) == weights.parent
    assert weights.read_bytes() == whole
    assert len(conversions) == 2


def test_a_killed_conversion_leaves_nothing_that_is_believed(tmp_path, cache):
    source = save_hub_folder(tmp_path / "hub")
    assert start_conversion(source, cache.parent, tmp_path / "log", "0", "kill").wait() == -9
    assert [path for path in cache.iterdir() if not path.name.startswith(".")] == []
    folder = convert_to_cache(source)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == [folder]


def test_of_two_processes_one_converts_and_the_other_waits(tmp_path):
    source = save_hub_folder(tmp_path / "hub")
    logs = [tmp_path / name for name in ("one", "other")]
    both = [start_conversion(source, tmp_path / "home", log, "1") for log in logs]
    assert [process.wait() for process in both] == [0, 0]
    lines = sorted(log.read_text().split() for log in logs)
    (folder,) = lines[0]
    assert lines[1] == ["converting", folder]


# --- names of classes


def write_labels(path: Path, names: list[str], column: str = "display_name") -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["index", "mid", column], *([i, f"/m/{i}", name] for i, name in enumerate(names))])
    return path


def test_audioset_classes_have_their_names_in_the_official_order(tmp_path):
    """Of class_labels_indices.csv, known by its hash."""
    config = convert_checkpoint(save_fine_tuned_fairseq(tmp_path / "m.pt", classes=527), tmp_path / "out").config
    names = [config.id2label[i] for i in range(527)]
    assert (names[0], names[1], names[137], names[526]) == ("Speech", "Male speech, man speaking", "Music", "Field recording")
    assert len(config.label2id) == 527
    assert sum(", " in name for name in names) == 75
    text = "".join(f"{name}\n" for name in names)
    assert hashlib.sha256(text.encode()).hexdigest() == "83e2e4fd16cbe86f94f3fe23954a4d302c013e20e7981b5ce7466e50126a1e3d"
    assert config.problem_type == "multi_label_classification"


def test_other_classes_are_numbered(tmp_path):
    config = convert_checkpoint(save_fine_tuned_fairseq(tmp_path / "m.pt"), tmp_path / "out").config
    assert config.label2id == {f"LABEL_{i}": i for i in range(5)}


def test_labels_of_ones_own_are_taken_and_their_problem_is_audiosets(tmp_path):
    names = [f'Sound {i}, "quoted"' for i in range(527)]
    labels = write_labels(tmp_path / "class_labels_indices.csv", names)
    labels.write_bytes(b"\xef\xbb\xbf" + labels.read_bytes())  # as spreadsheets write it
    model = convert_checkpoint(save_fine_tuned_fairseq(tmp_path / "m.pt", classes=527), tmp_path / "out", labels=labels)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id[names[7]] == 7
    assert model.config.problem_type == "multi_label_classification"


@pytest.mark.parametrize(
    ("names", "column", "message"),
    [
        (["a", "b"], "display_name", "2 rows.*5 classes"),
        (list("abcdd"), "display_name", "4 different names"),
        (list("abcde"), "words", "columns"),
    ],
)
def test_labels_that_do_not_fit_are_rejected(tmp_path, names, column, message):
    labels = write_labels(tmp_path / "labels.csv", names, column)
    with pytest.raises(ConversionError, match=message):
        convert_checkpoint(save_fine_tuned_fairseq(tmp_path / "m.pt"), tmp_path / "out", labels=labels)
    assert not (tmp_path / "out").exists()


# --- nothing in a file is run


class Attack:
    """Unpickled, this would create a file."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.mkdir, os.system, exec, eval, subprocess.Popen, shutil.rmtree, pickle.loads])
def test_a_hostile_pickle_runs_nothing(tmp_path, function):
    victim = tmp_path / "victim"
    argument = {exec: f"open({str(victim)!r}, 'w')", eval: f"open({str(victim)!r}, 'w')", os.system: f"touch {victim}"}.get(
        function, str(victim)
    )
    if function is shutil.rmtree:
        victim.mkdir()
    if function is subprocess.Popen:
        argument = ["touch", str(victim)]
    existed = victim.exists()
    source = tmp_path / "hostile.pt"
    content = torch.load(save_pretrained_fairseq(source), weights_only=True)
    torch.save({**content, "extra_state": Attack(function, argument)}, source)
    try:
        convert_checkpoint(source, tmp_path / "out")  # the rest of the file may well be good
    except ConversionError:
        assert not (tmp_path / "out").exists()
    assert victim.exists() == existed


class FairseqLeftover:
    """A class as real checkpoints hold it: known where it was written, not where it is read."""

    def __init__(self):
        self.value = 3


def test_unknown_classes_become_inert_stubs(tmp_path, monkeypatch):
    import argparse

    source = tmp_path / "m.pt"
    content = torch.load(save_pretrained_fairseq(source), weights_only=True)
    torch.save({**content, "args": argparse.Namespace(lr=[1e-3]), "task_state": FairseqLeftover(), "path": Path("x")}, source)
    monkeypatch.delattr(sys.modules[__name__], "FairseqLeftover")
    convert_checkpoint(source, tmp_path / "out")


# --- what cannot be converted


def flip_a_bit(path: Path) -> Path:
    """Damage one byte in the middle of a tensor: the file still has its length and its index."""
    content = bytearray(path.read_bytes())
    tensor = torch.load(path, weights_only=True)["model"]["blocks.1.mlp.fc1.weight"].numpy().tobytes()
    content[content.index(tensor) + 100] ^= 64
    path.write_bytes(content)
    return path


def with_config(folder: Path, text: str) -> Path:
    (folder / "config.json").write_text(text)
    return folder


def save_old_format(path: Path) -> Path:
    torch.save(torch.load(save_pretrained_fairseq(path), weights_only=True), path, _use_new_zipfile_serialization=False)
    return path


def damaged_sources(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    whole = save_pretrained_fairseq(tmp_path / "whole.pt").read_bytes()
    files = {"truncated.pt": whole[: len(whole) // 2], "empty.pt": b"", "text.pt": b"<!DOCTYPE html>" * 100}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"state_dict": encoder_tensors()}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    tensors = {**encoder_tensors(), **decoder_tensors()}
    missing = {n: t for n, t in tensors.items() if n not in ("blocks.1.mlp.fc2.bias", "blocks.0.norm1.weight")}
    surplus = {**tensors, "blocks.0.gate.weight": torch.zeros(3)}
    reshaped = {**tensors, "blocks.1.mlp.fc1.weight": torch.zeros(63, WIDTH)}
    infinite = {**tensors, "blocks.1.mlp.fc1.bias": torch.full((64,), torch.inf)}
    bert = {"embeddings.word_embeddings.weight": torch.zeros(10, WIDTH)}
    hub = save_hub_folder(tmp_path / "truncated_hub")
    (hub / "model.safetensors").write_bytes((hub / "model.safetensors").read_bytes()[:-100])
    no_weights = save_hub_folder(tmp_path / "no_weights")
    (no_weights / "model.safetensors").unlink()
    return {
        "truncated": (tmp_path / "truncated.pt", r"truncated\.pt cannot be read"),
        "empty": (tmp_path / "empty.pt", r"empty\.pt cannot be read"),
        "text": (tmp_path / "text.pt", r"text\.pt cannot be read"),
        "another layout": (tmp_path / "other.pt", 'expected a dict with "model" and "cfg"'),
        "no dict": (tmp_path / "list.pt", 'expected a dict with "model" and "cfg"'),
        "another model": (save_pretrained_fairseq(tmp_path / "bert.pt", bert), "not a SSLAM or EAT model.*word_embeddings"),
        "no heads": (save_pretrained_fairseq(tmp_path / "heads.pt", num_heads=None), "num_heads"),
        "missing": (save_pretrained_fairseq(tmp_path / "missing.pt", missing), r"lacks .*layers\.0\.layernorm_after_attention\.weight"),
        "surplus": (save_pretrained_fairseq(tmp_path / "surplus.pt", surplus), r"beyond.*layers\.0\.gate\.weight"),
        "reshaped": (save_pretrained_fairseq(tmp_path / "reshaped.pt", reshaped), r"fc1\.weight \(63, 32\) for \(64, 32\)"),
        "infinite": (save_pretrained_fairseq(tmp_path / "infinite.pt", infinite), r"NaN or infinity in sslam\.layers\.1\.mlp\.fc1\.bias"),
        "blocks missing": (save_pretrained_fairseq(tmp_path / "depth.pt", depth=3), "depth 3, but its tensors 2"),
        "no tensor": (save_pretrained_fairseq(tmp_path / "value.pt", {**tensors, "epoch": 3}), "not tensors: epoch"),
        "pre-norm": (save_pretrained_fairseq(tmp_path / "pre.pt", layer_norm_first=True), "layer_norm_first True.*False were published"),
        "mean pooling": (save_fine_tuned_fairseq(tmp_path / "mean.pt", prediction_mode="MEAN_POOLING"), "MEAN_POOLING"),
        "truncated hub": (hub, "truncated_hub cannot be read"),
        "hub without weights": (no_weights, r"has no model\.safetensors"),
        "another hub model": (save_hub_folder(tmp_path / "vit", model_type="vit"), "model_type 'vit'"),
        "table's grid": (save_hub_folder(tmp_path / "grid", max_length=7), "128 rows.*max_length 7"),
        "one bit": (flip_a_bit(save_pretrained_fairseq(tmp_path / "bit.pt")), r"its part .* is damaged"),
        "old format": (save_old_format(tmp_path / "old.pt"), "not a whole file of torch.save in the format of torch 1.6"),
        "odd heads": (save_pretrained_fairseq(tmp_path / "five.pt", num_heads=5), "hidden_size is 32 and num_attention_heads is 5"),
        "odd epsilon": (save_pretrained_fairseq(tmp_path / "eps.pt", norm_eps="small"), "what it says does not make a model"),
        "another decoder": (
            save_pretrained_fairseq(tmp_path / "alibi.pt", use_alibi_encoder=True),
            "use_alibi_encoder True.*False were published",
        ),
        "teacher is a list": (save_pretrained_fairseq(tmp_path / "ema.pt", {**tensors, "_ema": [1]}), '"_ema" in "model" is a list'),
        "float64": (save_pretrained_fairseq(tmp_path / "double.pt", encoder_tensors(dtype=torch.float64)), "wider than float32"),
        "classes": (save_fine_tuned_fairseq(tmp_path / "classes.pt", num_classes=9), "num_classes 9, but its tensors 5"),
        "overlapping patches": (save_hub_folder(tmp_path / "stride", stride=10), "stride 10, but its tensors 16"),
        "variant": (save_hub_folder(tmp_path / "variant", model_variant="finetune"), "model_variant finetune, but lacks a head"),
        "config is a list": (with_config(save_hub_folder(tmp_path / "list"), "[]"), "holds a list, but an object is expected"),
        "nothing there": (tmp_path / "absent.pt", "there is no folder or file .*absent.pt here"),
    }


CASES = [
    "truncated",
    "empty",
    "text",
    "another layout",
    "no dict",
    "another model",
    "no heads",
    "missing",
    "surplus",
    "reshaped",
    "infinite",
    "blocks missing",
    "no tensor",
    "pre-norm",
    "mean pooling",
    "truncated hub",
    "hub without weights",
    "another hub model",
    "table's grid",
    "one bit",
    "old format",
    "odd heads",
    "odd epsilon",
    "another decoder",
    "teacher is a list",
    "float64",
    "classes",
    "overlapping patches",
    "variant",
    "config is a list",
    "nothing there",
]


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_converted_is_named_and_leaves_nothing(tmp_path, case):
    source, message = damaged_sources(tmp_path)[case]
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(UserError if case == "nothing there" else ConversionError, match=message):
        convert_checkpoint(source, target / "out")
    assert list(target.iterdir()) == []


WRONG = [None, "text", [1], {1: 2}, torch.zeros(2), float("nan"), -1, 10**30, FairseqLeftover()]
PLACES = [
    *[("cfg",), ("cfg", "model"), ("cfg", "model", "modalities"), ("cfg", "model", "modalities", "image")],
    *[("cfg", "model", "modalities", "image", "decoder"), ("cfg", "model", "modalities", "image", "max_length"), ("model",)],
    *[("cfg", "model", name) for name in ("num_heads", "embed_dim", "depth", "mlp_ratio", "norm_eps", "layer_norm_first", "clone_batch")],
    *[("cfg", "model", "pretrained_model_args"), ("cfg", "model", "pretrained_model_args", "model")],
    *[("cfg", "model", name) for name in ("target_length", "num_classes", "prediction_mode", "esc50_eval", "mask_prob", "ema_decay")],
    *[("model", "_ema"), ("model", "head.weight"), ("model", "model.extra_tokens"), ("model", 7)],
]


@pytest.mark.parametrize("save", [save_pretrained_fairseq, save_fine_tuned_fairseq])
def test_a_wrong_type_anywhere_in_a_file_is_one_clear_error_or_ignored(tmp_path, monkeypatch, save):
    monkeypatch.setattr(conversion, "_write", lambda *_: None)  # what is read is checked before
    monkeypatch.setattr(SSLAMForPreTraining, "from_pretrained", lambda *_: None)
    monkeypatch.setattr(SSLAMForAudioClassification, "from_pretrained", lambda *_: None)
    content, rejected = torch.load(save(tmp_path / "m.pt"), weights_only=True), 0
    for place in PLACES:
        for value in WRONG:
            changed = copy.deepcopy(content)
            group = changed
            for name in place[:-1]:
                group = group.setdefault(name, {})
            group[place[-1]] = value
            torch.save(changed, tmp_path / "m.pt")
            try:
                convert_checkpoint(tmp_path / "m.pt", tmp_path / "out")
            except ConversionError:
                rejected += 1
    assert 0.4 * len(PLACES) * len(WRONG) < rejected < len(PLACES) * len(WRONG)
    for whole in WRONG:
        torch.save(whole, tmp_path / "m.pt")
        with pytest.raises(ConversionError):
            convert_checkpoint(tmp_path / "m.pt", tmp_path / "out")


def test_whatever_bytes_are_changed_nothing_but_a_clear_error_comes(tmp_path):
    """Half of the changes are made to the pickle within a whole archive, where no checksum catches them."""
    source = save_pretrained_fairseq(tmp_path / "m.pt")
    whole = source.read_bytes()
    with zipfile.ZipFile(source) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in parts if name.endswith("data.pkl"))
    generator, rejected = random.Random(0), 0
    for number in range(400):
        content = bytearray(whole if number % 2 else parts[pickled])
        for _ in range(generator.choice((1, 1, 2, 8))):
            place = generator.randrange(len(content))
            match generator.randrange(4):
                case 0:
                    content[place] ^= 1 << generator.randrange(8)
                case 1:
                    content[place] = generator.randrange(256)
                case 2:
                    del content[place : place + generator.choice((1, 7, 100))]
                case 3:
                    content[place:place] = content[place // 2 : place // 2 + generator.choice((1, 9))]
        if number % 2:
            source.write_bytes(content)
        else:
            with zipfile.ZipFile(source, "w") as archive:
                for name, data in parts.items():
                    archive.writestr(name, bytes(content) if name == pickled else data)
        try:
            read_official_checkpoint(source)
        except ConversionError:
            rejected += 1
    assert rejected > 200


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(300_000_000))


def repeated_bytes(path: Path) -> None:
    content = torch.load(save_pretrained_fairseq(path), weights_only=True)
    content["model"]["modality_encoders.IMAGE.fixed_positional_encoder.positions"] = torch.zeros(1, 1, 1).expand(1, 10**9, 10**3)
    torch.save(content, path)


def deep_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
        archive.writestr("archive/version", b"3")


@pytest.mark.parametrize("make", [zip_bomb, repeated_bytes, deep_pickle])
def test_a_small_file_that_would_fill_the_memory_is_rejected_at_once(tmp_path, make):
    make(tmp_path / "bomb.pt")
    start = time.process_time()
    with pytest.raises(ConversionError, match=r"bomb\.pt"):
        convert_checkpoint(tmp_path / "bomb.pt", tmp_path / "out")
    assert time.process_time() - start < 5


def test_a_full_output_folder_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        convert_checkpoint(FIXTURES / "small_hub_model", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_empty_output_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    convert_checkpoint(FIXTURES / "small_hub_model", tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "modeling_sslam.py", "fbank.py"} <= files


def test_a_written_file_that_differs_is_noticed(tmp_path, monkeypatch):
    original = SSLAMModel.save_pretrained

    def bad_disk(model, folder):
        with torch.no_grad():
            model.layers[1].mlp.fc1.weight[0, 0] += 1
        original(model, folder)

    monkeypatch.setattr(SSLAMModel, "save_pretrained", bad_disk)
    with pytest.raises(ConversionError, match=r"differs from the source.*layers\.1\.mlp\.fc1\.weight"):
        convert_checkpoint(FIXTURES / "small_hub_model", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_in_one_line_what_it_did_or_why_not(tmp_path, capsys):
    words = ["convert", "--model", str(FIXTURES / "small_hub_model"), "--output_dir", str(tmp_path / "out")]
    assert main(words) == 0
    assert "SSLAMModel, 0.0 M parameters, every tensor verified" in capsys.readouterr().out
    assert main(words) == 1
    assert re.match("sslam convert: error: .* is not an empty folder.*\n$", capsys.readouterr().err)
    labels = save_fine_tuned_fairseq(tmp_path / "m.pt"), write_labels(tmp_path / "labels.csv", list("abcde"))
    words = ["--model", str(labels[0]), "--labels", str(labels[1]), "--preset", "esc50", "--problem-type", "multi_label_classification"]
    assert main(["convert", *words, "--output_dir", str(tmp_path / "tagger")]) == 0
    config = AutoModelForAudioClassification.from_pretrained(tmp_path / "tagger").config
    assert (config.problem_type, list(config.label2id)) == ("multi_label_classification", list("abcde"))
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "tagger").mean == -6.627
