"""LoRA: what is trained, saved and merged, and that a run with adapters resumes bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, tiny_config
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioFrameClassification, pipeline

from transformers_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForAudioFrameClassification, SSLAMModel
from transformers_sslam.checkpoints import checkpoints
from transformers_sslam.errors import UserError
from transformers_sslam.finetuning import lora, training
from transformers_sslam.finetuning import trainer as stream_trainer
from transformers_sslam.finetuning.lora import LoraSettings, add_adapters, count_parameters
from transformers_sslam.finetuning.optimization import layer_decay_groups
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.training import fine_tune
from transformers_sslam.settings import parse_settings


peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("without_drawing")

DROPS = {"drop_path_rate": 0.2, "hidden_dropout_prob": 0.1}  # so that torch's random state counts too
TARGETS = {f"sslam.layers.{i}.attention.{name}_proj.weight" for i in (0, 1) for name in "qv"}
HEADS = {
    "classification": {"classifier.weight", "classifier.bias"},
    "events": {f"{name}.{kind}" for name in ("frame_classifier", "time_attention") for kind in ("weight", "bias")},
}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """An encoder, and clips of two classes: 24 to train on, 8 to validate on and 7 to test on."""
    root = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    SSLAMModel(tiny_config(max_length=32, **DROPS)).save_pretrained(root / "encoder")
    SSLAMFeatureExtractor(max_length=32).save_pretrained(root / "encoder")
    for split, count in (("train", 24), ("validation", 8), ("test", 7)):
        for i in range(count):
            path = root / "clips" / split / ("rare" if i % 4 == 0 else "common") / f"{i:02}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, noise(0.3, seed=1000 * count + i), 16_000)
    return root


def settings_for(root: Path, output: Path, **changes) -> FineTuningSettings:
    values = {
        **{"data_dir": str(root / "clips"), "output_dir": str(output), "model": str(root / "encoder"), "lora": LoraSettings(r=4)},
        **{"per_device_train_batch_size": 8, "learning_rate": 1e-2, "layer_decay": 1.0, "max_steps": 6, "save_steps": 2},
        **{"disable_tqdm": True, "use_cpu": True, "logging_strategy": "steps", "logging_steps": 1},
    }
    return FineTuningSettings(**{**values, **changes})


@pytest.fixture(scope="module", params=["classification", "events"])
def finished(request, root, tmp_path_factory) -> tuple[str, Path]:
    output = tmp_path_factory.mktemp("finished") / request.param
    fine_tune(settings_for(root, output, task=request.param))
    return request.param, output


def load(task: str, folder: Path, **options) -> SSLAMForAudioClassification | SSLAMForAudioFrameClassification:
    cls = SSLAMForAudioClassification if task == "classification" else SSLAMForAudioFrameClassification
    return cls.from_pretrained(folder, **options)


# --- what is trained


def test_the_weights_of_blocks_are_part_of_the_head():
    model = add_adapters(SSLAMForAudioClassification(tiny_config(layer_pooling="gated")), LoraSettings(r=4), "none")
    trained = {name.removeprefix("base_model.model.") for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {f"layer_pooling.modules_to_save.default.{name}" for name in ("scores", "gates")} < trained
    assert not any("layernorm" in name for name in trained)


@pytest.mark.parametrize("cls", [SSLAMForAudioClassification, SSLAMForAudioFrameClassification])
def test_adapters_and_the_linear_layers_of_the_head_are_trained(cls):
    model = add_adapters(cls(tiny_config(num_labels=3)), LoraSettings(r=4, target_modules=["k_proj", "fc1"]), "none")
    task = "events" if cls is SSLAMForAudioFrameClassification else "classification"
    trained = {name.removeprefix("base_model.model.") for name, parameter in model.named_parameters() if parameter.requires_grad}
    layers = {f"sslam.layers.{i}.{name}" for i in (0, 1) for name in ("attention.k_proj", "mlp.fc1")}
    head = {name.replace(".", ".modules_to_save.default.") for name in HEADS[task]}
    assert trained == {f"{layer}.lora_{side}.default.weight" for layer in layers for side in "AB"} | head
    linear = 2 if task == "events" else 1
    assert count_parameters(model) == (2 * 4 * (32 + 32 + 32 + 64) + linear * 3 * 33, cls(tiny_config(num_labels=3)).num_parameters())


def test_new_adapters_change_nothing():
    plain = SSLAMForAudioClassification(tiny_config(num_labels=3)).eval()
    values = torch.randn(2, 32, 128)
    with torch.inference_mode():
        expected = plain(values).logits
        assert torch.equal(add_adapters(plain, LoraSettings(r=4), "none").eval()(input_values=values).logits, expected)


@pytest.mark.parametrize(("adapters", "rates"), [(None, [0.2, 0.4, 0.8]), (0.08, [0.02, 0.04, 0.8])])
def test_adapters_have_the_rate_of_their_block_and_the_head_its_own(adapters, rates):
    model = add_adapters(SSLAMForAudioClassification(tiny_config()), LoraSettings(r=4), "none")
    groups = layer_decay_groups(model, 0.8, weight_decay=0.05, layer_decay=0.5, encoder_learning_rate=adapters)
    by_layer = {group["layer"]: group["lr"] for group in groups}
    assert list(by_layer) == [1, 2, 3]
    assert list(by_layer.values()) == pytest.approx(rates, rel=1e-12)
    assert sum(len(group["params"]) for group in groups) == 2 * 2 * 2 + 2


def test_checkpointed_activations_give_the_same_weights(root, tmp_path):
    """Though the input of the blocks needs no gradient."""
    plain, checkpointed = (settings_for(root, tmp_path / str(on), max_steps=2, gradient_checkpointing=on) for on in (False, True))
    fine_tune(plain), fine_tune(checkpointed)
    for name, weights in load_file(Path(plain.output_dir) / "model.safetensors").items():
        torch.testing.assert_close(load_file(Path(checkpointed.output_dir) / "model.safetensors")[name], weights, msg=name)


# --- what is saved


def test_the_saved_model_has_other_weights_in_targets_and_head_alone(root, finished):
    task, output = finished
    before, after = load_file(root / "encoder" / "model.safetensors"), load_file(output / "model.safetensors")
    assert after.keys() == load(task, output).state_dict().keys()
    changed = {name for name, weights in after.items() if not torch.equal(weights, before.get(name.removeprefix("sslam."), weights))}
    assert changed == TARGETS
    norm = torch.ones(32), torch.zeros(32)
    assert all(torch.equal(after[f"layernorm.{kind}"], value) for kind, value in zip(("weight", "bias"), norm))


def test_the_saved_model_equals_encoder_and_adapter(root, finished):
    """Seen: 2e-7."""
    task, output = finished
    torch.manual_seed(1)
    base = load(task, root / "encoder", config=AutoConfig.from_pretrained(output))
    adapted = peft.PeftModel.from_pretrained(base, output / "adapter").eval()
    values = torch.randn(3, 32, 128)
    with torch.inference_mode():
        torch.testing.assert_close(load(task, output).eval()(values).logits, adapted(input_values=values).logits, rtol=0, atol=1e-5)
        with adapted.disable_adapter():
            assert (adapted(input_values=values).logits - load(task, output).eval()(values).logits).abs().max() > 1e-2


def test_what_was_evaluated_is_what_is_saved(root, finished):
    task, output = finished
    scores = np.load(output / "scores.npz")
    waveforms = [soundfile.read(root / "clips" / "test" / name, dtype="float32")[0] for name in map(clip_name, scores["names"])]
    inputs = AutoFeatureExtractor.from_pretrained(output)(waveforms, sampling_rate=16_000, return_tensors="pt")
    with torch.inference_mode():
        outputs = load(task, output).eval()(**inputs)
    logits = outputs.logits if task == "classification" else outputs.clip_logits  # labels without times are those of clips
    np.testing.assert_allclose(logits.numpy(), scores["logits"], atol=1e-5)


def test_the_saved_model_loads_as_any_other(finished):
    task, output = finished
    assert isinstance(AutoModel.from_pretrained(output), SSLAMModel)
    if task == "classification":
        classify = pipeline("audio-classification", model=str(output))
        assert {score["label"] for score in classify(noise(0.3))} == {"common", "rare"}
    else:
        model = AutoModelForAudioFrameClassification.from_pretrained(output)
        assert list(model.config.id2label.values()) == ["common", "rare"]


def clip_name(name: str) -> str:
    return "/".join(Path(name).parts[-2:])


def test_results_and_card_count_what_was_trained(root, finished):
    task, output = finished
    results = json.loads((output / "results.json").read_text())
    head = 2 * 33 * (2 if task == "events" else 1)
    assert results["trained_parameters"] == 2 * 2 * 2 * 4 * 32 + head
    assert results["parameters"] == load(task, output).num_parameters()
    counts = f"{results['trained_parameters']:,} of {results['parameters']:,} parameters"
    assert f"fine-tuned from `encoder` by LoRA (rank 4, {counts})" in (output / "README.md").read_text()
    assert sorted(path.name for path in (output / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert {"adapter/adapter_model.safetensors", "model.safetensors"} <= results["files"].keys()
    assert json.loads((output / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(root / "encoder")


def test_the_adapter_alone_is_saved_without_merge(root, tmp_path):
    settings = settings_for(root, tmp_path / "run", lora=LoraSettings(r=4, merge=False))
    results = fine_tune(settings)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter", "config.json", "preprocessor_config.json", "results.json"} <= files
    assert not {"model.safetensors", "README.md"} & files
    with pytest.raises(UserError, match=r"holds a model already, of a run with other lora"):
        fine_tune(replace(settings, lora=LoraSettings(r=2, merge=False)))
    assert results["metrics"] == fine_tune(settings_for(root, tmp_path / "merged"))["metrics"]


# --- resume


class Killed(BaseException):
    """Stands for the end of a process: nothing in the program handles it."""


@pytest.mark.parametrize(("task", "ema_decay"), [("classification", None), ("events", None), ("classification", 0.5)])
def test_a_run_with_adapters_resumes_bit_for_bit(root, tmp_path, monkeypatch, task, ema_decay):
    """Killed behind the third of six updates, it resumes from its second."""
    whole, resumed = (settings_for(root, tmp_path / name, task=task, ema_decay=ema_decay) for name in ("whole", "resumed"))
    fine_tune(whole)
    on_step_end = stream_trainer._RunState.on_step_end

    def end_behind_the_third(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(stream_trainer._RunState, "on_step_end", end_behind_the_third)
        with pytest.raises(Killed):
            fine_tune(resumed)
    (checkpoint,) = checkpoints(tmp_path / "resumed")
    assert checkpoint.name == "checkpoint-2"
    adapter = load_file(checkpoint / "adapter_model.safetensors")
    assert len(adapter) == 2 * len(TARGETS) + len(HEADS[task])
    assert not (checkpoint / "model.safetensors").exists()
    results = fine_tune(resumed)
    assert results["resumed"]
    assert results["training_loss"] == json.loads((tmp_path / "whole" / "results.json").read_text())["training_loss"]
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "resumed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert len(set(results["training_loss"])) == 6


def test_the_best_adapter_is_the_one_that_is_merged(root, tmp_path, monkeypatch):
    """With rates this low the accuracy stays the same, so that the first evaluation is the best."""
    settings = settings_for(root, tmp_path, learning_rate=1e-5, validation_split="validation", eval_strategy="steps", eval_steps=2)
    monkeypatch.setattr(training, "shutil", None)  # checkpoints are not deleted
    monkeypatch.setattr(training, "checkpoints", lambda output: [])
    results = fine_tune(replace(settings, load_best_model_at_end=True, metric_for_best_model="accuracy", save_total_limit=None))
    assert results["best_step"] == 2
    saved, best, last = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "checkpoint-2", "checkpoint-6"))
    assert all(torch.equal(saved[name], weights) for name, weights in best.items())
    assert not any(torch.equal(saved[name], weights) for name, weights in last.items())


# --- what is rejected


def test_the_command_reads_names_as_peft_has_them():
    words = ["--data_dir", "x", "--model", "y", "--lora.r", "8", "--lora.lora_alpha", "32", "--lora.target_modules", "q_proj", "fc1"]
    settings = parse_settings(FineTuningSettings, words)
    assert settings.lora == LoraSettings(r=8, lora_alpha=32, target_modules=["q_proj", "fc1"])
    assert parse_settings(FineTuningSettings, words[:4]).lora.r == 0
    known = peft.LoraConfig.__dataclass_fields__.keys()
    assert {"r", "lora_alpha", "lora_dropout", "target_modules"} == LoraSettings.__dataclass_fields__.keys() & known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": -1}, "lora.r is -1, but must be positive, or 0"),
        ({"r": 4, "lora_alpha": 0}, "lora.lora_alpha is 0, but must be positive"),
        ({"r": 4, "lora_dropout": 1.0}, r"lora.lora_dropout is 1, but a fraction in \[0, 1\)"),
        ({"r": 4, "target_modules": []}, "lora.target_modules is empty"),
        ({"r": 4, "learning_rate": 0.0}, "lora.learning_rate is 0, but must be positive"),
    ],
)
def test_values_out_of_range_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        LoraSettings(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoraSettings(lora_alpha=8)}, "lora is set, but lora.r is 0"),
        ({"model": None}, "lora.r is 4, but model is null"),
        ({"freeze_encoder": True}, "freeze_encoder is true, but lora.r is 4"),
        ({"push_to_hub": True, "lora": LoraSettings(r=4, merge=False)}, "push_to_hub is true, but lora.merge is false"),
    ],
)
def test_settings_that_contradict_adapters_are_rejected(root, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        settings_for(root, tmp_path, **changes)


def test_a_target_that_blocks_do_not_have_is_named():
    with pytest.raises(UserError, match="has 'query', but the linear layers of a block are fc1, fc2, k_proj, o_proj, q_proj, v_proj"):
        add_adapters(SSLAMForAudioClassification(tiny_config()), LoraSettings(r=4, target_modules=["q_proj", "query"]), "none")


def test_a_missing_package_is_one_sentence_before_any_data_is_read(root, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"peft is not installed, which LoRA needs: pip install 'transformers-sslam\[lora\]'"):
        fine_tune(settings_for(root, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
