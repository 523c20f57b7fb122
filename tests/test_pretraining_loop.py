"""The pre-training loop: the same run however it is interrupted, a guard against collapse, and nothing lost after a failure."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForPreTraining

from transformers_sslam import SSLAMForPreTraining, SSLAMModel


soundfile = pytest.importorskip("soundfile")
from processes import Fork, kill_with_all_it_started, run_on_two  # noqa: E402
from test_conversion import cache, save_pretrained_fairseq  # noqa: E402, F401  # the first is a fixture

from transformers_sslam.attention_sslam import CPU_HALF_PRECISION_ATTENTION  # noqa: E402
from transformers_sslam.audio import clips as clips_module  # noqa: E402
from transformers_sslam.audio.batches import DataSettings  # noqa: E402
from transformers_sslam.checkpoints import checkpoints, finish_checkpoint  # noqa: E402
from transformers_sslam.cli import main  # noqa: E402
from transformers_sslam.errors import UserError  # noqa: E402
from transformers_sslam.files import verify  # noqa: E402
from transformers_sslam.pretraining import loop as loop_module  # noqa: E402
from transformers_sslam.pretraining.loop import PreTrainer  # noqa: E402
from transformers_sslam.pretraining.monitoring import CollapseError, NonFiniteError, training_flops_per_clip  # noqa: E402
from transformers_sslam.pretraining.settings import PreTrainingSettings  # noqa: E402
from transformers_sslam.settings import parse_settings, read_settings, write_settings  # noqa: E402


SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrain.py"
COMMAND = ["-m", "transformers_sslam", "pretrain"]  # does the same
ON_CPU = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
MODEL = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_length": 64},
    **{"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_groups": 8, "num_views": 2, "unmixed_span_length": 16},
    **{"ema_decay": 0.9, "ema_end_decay": 0.99, "ema_anneal_end_step": 50, "hidden_dropout_prob": 0.1},
}


@pytest.fixture(scope="module")
def sounds(tmp_path_factory) -> Path:
    """Twelve tones of their own pitch and length."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(12):
        t = np.arange(8_000 + 200 * i) / 16_000
        soundfile.write(folder / f"{i:02d}.wav", 0.3 * np.sin(2 * np.pi * (200 + 150 * i) * t) * np.exp(-3 * t), 16_000)
    return folder


def recipe(sounds: Path, output_dir: Path, **changes) -> dict:
    settings = {
        **{"output_dir": str(output_dir), "data": {"sources": [{"kind": "folder", "path": str(sounds)}]}, "model_config": MODEL},
        **{"feature_extractor": {"max_length": 64}, "max_steps": 8, "warmup_steps": 2, "learning_rate": 1e-3},
        **{"per_device_train_batch_size": 4, "dataloader_num_workers": 0, "save_steps": 3, "logging_steps": 2, "eval_steps": 100},
        **{"report_to": "none"},
    }
    return settings | changes


def trainer(sounds: Path, output_dir: Path, **changes) -> PreTrainer:
    values = recipe(sounds, output_dir, **changes)
    for name in ("data", "validation"):
        if values.get(name) is not None:
            values[name] = DataSettings(**values[name])
    return PreTrainer(PreTrainingSettings(**values))


def metrics(output_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- a whole run


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_ends_with_a_model_that_loads(sounds, tmp_path, stage):
    folder = trainer(sounds, tmp_path, stage=stage).run()
    assert folder == tmp_path / "checkpoint-00000008"
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))
    assert all((line["source_retention_loss"] > 0) == (stage == 2) for line in metrics(tmp_path))
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path / "model")) is SSLAMForPreTraining
    assert type(AutoModel.from_pretrained(folder)) is SSLAMModel  # every checkpoint is a model as well
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000006", "checkpoint-00000008"]


@pytest.fixture
def _another_precision():
    """Accelerate holds to the first precision that a process asks for."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.usefixtures("_another_precision", "without_code_generation")
@pytest.mark.parametrize("bf16", [False, True])
def test_a_compiled_run_resumes_as_if_it_had_not_been_interrupted(sounds, tmp_path, bf16):
    changes = {"torch_compile": True, "bf16": bf16, "save_steps": 2, "max_steps": 4}
    changes |= {"per_device_train_batch_size": 5, "model_config": {**MODEL, "num_hidden_layers": 1}}
    trainer(sounds, tmp_path / "whole", **changes).run()
    first = trainer(sounds, tmp_path / "halves", **changes)
    assert first.model._compiled_call_impl is not None
    interrupted_after(first, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    first.run()
    assert first.step == 2
    trainer(sounds, tmp_path / "halves", **changes).run()
    assert same_weights(tmp_path / "whole" / "model", tmp_path / "halves" / "model")


@pytest.mark.slow  # a minute of compiling
def test_a_compiled_run_is_the_same_run(sounds, tmp_path):
    """It draws the same masks, mixtures and noise, so its losses are those of a run that is not compiled."""
    torch._dynamo.reset()
    losses = []
    for compile in (False, True):
        changes = {"torch_compile": compile, "max_steps": 4, "per_device_train_batch_size": 6}
        run = trainer(sounds, tmp_path / str(compile), **changes, model_config={**MODEL, "num_hidden_layers": 1})
        run.run()
        losses.append([json.loads(line)["loss"] for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("features", ["worker", "device"])
def test_the_model_receives_the_mask_of_padding_only_where_mask_padding_is_set(sounds, tmp_path, features):
    data = {"sources": [{"kind": "folder", "path": str(sounds)}], "features": features}
    for masks in (False, True):
        run = trainer(sounds, tmp_path / str(masks), data=data, validation=data, max_steps=1, warmup_steps=0, mask_padding=masks)
        seen, forward = [], run.model.forward
        run.model.forward = lambda input_values, attention_mask=None, **rest: (
            seen.append((input_values, attention_mask)) or forward(input_values, attention_mask=attention_mask, **rest)  # noqa: B023
        )
        run.run()
        assert len(seen) > 1  # a step, and the validation
        for values, mask in seen:
            assert (mask is not None) == masks
            if masks:
                padding = (values == values[:, -1:]).all(2)  # tones of half a second and more: 48 to 62 of 64 frames
                assert 0 < padding.sum() < padding.numel() / 3
                assert torch.equal(mask == 0, padding)


def test_the_first_step_of_a_warm_up_changes_no_weight(sounds, tmp_path):
    run = trainer(sounds, tmp_path, max_steps=3, warmup_steps=1)
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    changed = []
    real = run.model.update_teacher
    run.model.update_teacher = lambda step, skipped: (
        real(step, skipped),
        changed.append(any(not torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())),
    )
    run.run()
    assert changed == [False, True, True]


def test_a_fixed_validation_set_sees_the_loss_fall(sounds, tmp_path):
    data = recipe(sounds, tmp_path)["data"]
    changes = {"validation": data, "validation_clips": 6, "eval_steps": 20, "logging_steps": 20, "save_steps": 100, "max_steps": 60}
    trainer(sounds, tmp_path, learning_rate=5e-3, warmup_steps=5, **changes).run()
    losses = [line["validation_loss"] for line in metrics(tmp_path) if "validation_loss" in line]
    assert len(losses) == 3
    assert losses[2] < losses[0]


def test_stage_2_starts_from_stage_1_with_decoder_and_teacher(sounds, tmp_path):
    trainer(sounds, tmp_path / "1", stage=1).run()
    second = trainer(
        sounds, tmp_path / "2", stage=2, model=str(tmp_path / "1" / "model"), model_config={"num_views": 3, "unmixed_span_length": 16}
    )
    first = load_file(tmp_path / "1" / "model" / "model.safetensors")
    assert second.model.config.use_mixtures
    assert second.model.config.num_views == 3
    assert all(torch.equal(tensor, first[name]) for name, tensor in second.model.state_dict().items())
    second.run()
    card = (tmp_path / "2" / "model" / "README.md").read_text()
    assert "Pre-trained from `model` on" in card
    assert "hours of audio seen" in card
    assert (ModelCard(card).data.base_model, ModelCard(card).data.datasets) == (["model"], [sounds.name])
    assert str(tmp_path) not in card


def test_stage_2_takes_over_the_feature_extractor_but_not_the_weights_of_losses(sounds, tmp_path):
    first = {"stage": 1, "feature_extractor": {"max_length": 64, "mean": -6.0, "std": 5.0}}
    trainer(sounds, tmp_path / "1", **first, max_steps=3, model_config={**MODEL, "global_loss_weight": 2.0}).run()
    second = {"model": str(tmp_path / "1" / "model"), "feature_extractor": {"std": 4.0}, "model_config": {"unmixed_span_length": 16}}
    run = trainer(sounds, tmp_path / "2", **second)
    assert (run.extractor.max_length, run.extractor.mean, run.extractor.std) == (64, -6.0, 4.0)
    assert run.model.config.global_loss_weight == 1.0
    for field, value in (("num_hidden_layers", 1), ("hidden_size", 64), ("max_length", 128)):
        with pytest.raises(UserError, match=f"model_config.{field} is {value}, but .* has .*: leave the sizes out"):
            trainer(sounds, tmp_path / "2", **{**second, "model_config": {field: value}})
    with pytest.raises(UserError, match="the weights of .* do not fit the sizes in model_config"):
        trainer(sounds, tmp_path / "2", **{**second, "model_config": {"decoder_hidden_size": 64}})


@pytest.mark.usefixtures("cache")
def test_a_run_starts_from_an_official_checkpoint_with_its_decoder_and_teacher(sounds, tmp_path):
    file = save_pretrained_fairseq(tmp_path / "official.pt")
    run = trainer(sounds, tmp_path / "run", model=str(file), model_config={"unmixed_span_length": 16})
    state, official = run.model.state_dict(), torch.load(file, weights_only=False)["model"]
    assert torch.equal(state["sslam.layers.0.mlp.fc1.bias"], official["blocks.0.mlp.fc1.bias"])
    assert torch.equal(state["teacher.layers.0.mlp.fc1.bias"], official["_ema"]["blocks.0.mlp.fc1.bias"])
    assert torch.equal(state["decoder.projection.bias"], official["modality_encoders.IMAGE.decoder.proj.bias"])
    run.run()
    assert "from `official.pt`" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_weight_decay_falls_on_every_trained_tensor_unless_told_otherwise(sounds, tmp_path):
    everything = trainer(sounds, tmp_path).optimizer.param_groups
    assert [group["weight_decay"] for group in everything] == [0.05]
    no_decay = trainer(sounds, tmp_path, decay_all_weights=False).optimizer.param_groups
    assert [group["weight_decay"] for group in no_decay] == [0.05, 0.0]
    assert all(parameter.dim() == 1 or parameter.shape == (1, 1, 32) for parameter in no_decay[1]["params"])
    assert sum(len(group["params"]) for group in no_decay) == len(everything[0]["params"])
    teacher = {id(parameter) for parameter in trainer(sounds, tmp_path).model.teacher.parameters()}
    assert not teacher & {id(parameter) for parameter in everything[0]["params"]}


def local_gradients(sounds, tmp_path, accumulation: int) -> list[torch.Tensor]:
    """Gradients of the local loss of four clips under fixed masks, in so many forward passes."""
    model = {**MODEL, "global_loss_weight": 0.0, "num_views": 1, "mask_noise_std": 0.0, "hidden_dropout_prob": 0.0}
    size = 4 // accumulation
    changes = {"stage": 1, "model_config": model, "per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    run = trainer(sounds, tmp_path / str(accumulation), **changes)
    masks = iter(torch.stack([torch.arange(32) % 8 != i for i in range(4)]).split(size))
    forward, gradients = run.wrapped.forward, []
    run.wrapped.forward = lambda input_values, **kwargs: forward(input_values, bool_masked_pos=next(masks), **kwargs)
    run.optimizer.step = lambda: gradients.extend(p.grad.clone() for p in run.model.parameters() if p.grad is not None)
    values = torch.randn(4, 64, 128, generator=torch.Generator().manual_seed(0))
    run._train([{"input_values": part} for part in values.split(size)])
    return gradients


def test_accumulated_gradients_are_those_of_the_whole(sounds, tmp_path):
    whole, halves = (local_gradients(sounds, tmp_path, accumulation) for accumulation in (1, 2))
    assert len(whole) > 20
    for a, b in zip(whole, halves):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# --- interruptions


def interrupted_after(run: PreTrainer, steps: int, how) -> None:
    """Let `how` happen after so many steps."""
    real = run.model.update_teacher

    def update_teacher(step: int, skipped: torch.Tensor) -> None:
        real(step, skipped)
        if step == steps:
            how()

    run.model.update_teacher = update_teacher


@pytest.mark.parametrize(("stop_at", "number"), [(1, signal.SIGTERM), (4, signal.SIGINT), (6, signal.SIGTERM)])
def test_a_signal_ends_the_run_cleanly_and_it_resumes_as_if_nothing_had_happened(sounds, tmp_path, stop_at, number):
    trainer(sounds, tmp_path / "whole").run()
    run, before = trainer(sounds, tmp_path / "stopped"), signal.getsignal(number)
    times = 2 if number == signal.SIGTERM else 1  # a scheduler's to all processes, and the launcher's to its own
    interrupted_after(run, stop_at, lambda: [os.kill(os.getpid(), number) for _ in range(times)])
    assert run.run().name == f"checkpoint-{stop_at:08d}"
    assert signal.getsignal(number) is before
    trainer(sounds, tmp_path / "stopped").run()
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert same_weights(tmp_path / "stopped" / "model", tmp_path / "whole" / "model")


def test_a_damaged_checkpoint_is_passed_over(sounds, tmp_path, caplog):
    trainer(sounds, tmp_path).run()
    final = metrics(tmp_path)
    weights = tmp_path / "checkpoint-00000008" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    again = trainer(sounds, tmp_path)
    again._resume()
    assert again.step == 6
    assert "checkpoint-00000008 is damaged" in caplog.text
    again.run()
    assert metrics(tmp_path) == final
    assert verify(tmp_path / "checkpoint-00000008") is None


def test_a_folder_of_another_run_is_rejected_where_nothing_is_to_be_resumed(sounds, tmp_path):
    trainer(sounds, tmp_path, max_steps=3).run()
    with pytest.raises(UserError, match="resume_from_checkpoint is false.*checkpoint-00000003"):
        trainer(sounds, tmp_path, resume_from_checkpoint=False)
    shutil.rmtree(tmp_path / "checkpoint-00000003")
    with pytest.raises(UserError, match="holds a finished model, and no checkpoint of its run any more: choose another folder"):
        trainer(sounds, tmp_path, model=str(tmp_path / "model"))


def test_a_run_resumes_from_the_checkpoint_that_is_named(sounds, tmp_path):
    trainer(sounds, tmp_path / "whole").run()
    other = trainer(sounds, tmp_path / "other", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-00000006"))
    other.run()
    assert metrics(tmp_path / "other") == metrics(tmp_path / "whole")[6:]
    assert same_weights(tmp_path / "other" / "model", tmp_path / "whole" / "model")
    with pytest.raises(UserError, match="resume_from_checkpoint is .*absent, which is not a whole checkpoint"):
        trainer(sounds, tmp_path / "third", resume_from_checkpoint=str(tmp_path / "absent")).run()


def test_changed_settings_are_named_when_a_run_resumes(sounds, tmp_path, caplog):
    trainer(sounds, tmp_path, max_steps=4).run()
    trainer(sounds, tmp_path, max_steps=5, learning_rate=2e-3).run()
    assert "learning_rate (0.001 then, 0.002 now)" in caplog.text
    assert len(metrics(tmp_path)) == 5


def rewrite(folder: Path, run: dict) -> None:
    """Give a checkpoint this `run.json`."""
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "manifest.json").unlink()
    finish_checkpoint(folder.rename(folder.with_suffix(".unfinished")))


def test_a_run_of_an_earlier_version_resumes_and_only_real_changes_are_reported(sounds, tmp_path, caplog):
    """Then settings and counters had other names; see a `run.json` and a line of `metrics.jsonl` as they were written."""
    trainer(sounds, tmp_path / "whole").run()
    trainer(sounds, tmp_path / "old", max_steps=6, lr_scheduler_kwargs={"min_lr": 1e-5}).run()
    folder = tmp_path / "old" / "checkpoint-00000006"
    run = json.loads((folder / "run.json").read_text())
    data = {**run["settings"]["data"], "a_setting_that_went": 1}
    settings = {
        **{"output_dir": "elsewhere", "data": data, "validation": None, "validation_clips": 96, "stage": 2, "init_from": None},
        **{"preset": "base", "model": MODEL, "features": {"max_length": 64}, "normalization": "model", "mask_padding": False},
        **{"total_updates": 8, "warmup_updates": 2, "learning_rate": 1e-3, "final_learning_rate": 0.0, "batch_size": 4},
        **{"gradient_accumulation_steps": 1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.05},
        **{"decay_all_weights": True, "max_grad_norm": 4.0, "compile": False, "mixed_precision": "no", "seed": 0, "num_workers": 0},
        **{"save_every": 3, "keep_last": 2, "keep_every": None, "resume": True, "log_every": 2, "validate_every": 100, "trackers": []},
        **{"guard_after_updates": 5000, "min_target_std": 0.1, "min_prediction_std": 0.01, "min_content_share": 0.1},
        **{"max_skipped_in_a_row": 10},
    }
    counters = {"update": 6, "skipped": 0, "skipped_in_a_row": 0, "clips_seen": 24, "world_size": 1}
    state = torch.load(folder / "optimizer.pt")  # the patch projection was a convolution
    moments = [moment for values in state["optimizer"]["state"].values() for moment in values.values() if moment.shape[1:] == (256,)]
    assert len(moments) == 2
    for moment in moments:
        moment.data = moment.view(-1, 1, 16, 16)
    torch.save(state, folder / "optimizer.pt")
    rewrite(folder, {**counters, "settings": settings})
    lines = [{"update": line.pop("step"), **line} for line in metrics(tmp_path / "whole")[:6]]
    (tmp_path / "old" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    resumed = trainer(sounds, tmp_path / "old", eval_steps=50)
    resumed.run()
    assert all(state["exp_avg"].shape == weight.shape for weight, state in resumed.optimizer.state.items())
    (report,) = (record.getMessage() for record in caplog.records if "Settings have changed" in record.getMessage())
    changes = report.removeprefix("Settings have changed since that checkpoint: ").split("; ")
    assert changes == ["eval_steps (100 then, 50 now)", f"output_dir (elsewhere then, {tmp_path / 'old'} now)"]
    assert (resumed.step, resumed.clips_seen) == (8, 32)
    assert [line["step"] for line in metrics(tmp_path / "old")] == list(range(1, 9))
    assert metrics(tmp_path / "old")[:6] == metrics(tmp_path / "whole")[:6]


def test_settings_of_the_optimiser_are_those_of_now(sounds, tmp_path):
    trainer(sounds, tmp_path, max_steps=3).run()
    run = trainer(sounds, tmp_path, weight_decay=0.5, adam_beta1=0.5)
    run._resume()
    assert [(group["weight_decay"], group["betas"]) for group in run.optimizer.param_groups] == [(0.5, (0.5, 0.95))]
    assert all(state["step"] == 3 for state in run.optimizer.state.values())
    with pytest.raises(UserError, match="decay_all_weights is not what it was when the run began"):
        trainer(sounds, tmp_path, decay_all_weights=False).run()


def test_gradient_checkpointing_changes_no_loss_and_no_weight(sounds, tmp_path):
    for on in (False, True):
        run, calls = trainer(sounds, tmp_path / str(on), gradient_checkpointing=on), []
        norm = next(module for module in run.model.sslam.layers[0].modules() if isinstance(module, nn.LayerNorm))
        norm.register_forward_pre_hook(lambda *_: calls.append(1))  # noqa: B023
        run.run()
        assert len(calls) == 8 * (1 + on)  # computed again in the backward pass
    assert metrics(tmp_path / "True") == metrics(tmp_path / "False")
    assert same_weights(tmp_path / "True" / "model", tmp_path / "False" / "model")


@pytest.mark.usefixtures("_another_precision")
def test_attention_in_half_precision_on_a_cpu_is_the_registered_one_unless_another_is_named(sounds, tmp_path):
    found = [trainer(sounds, tmp_path / "float32")]
    AcceleratorState._reset_state(True)
    found += [
        trainer(sounds, tmp_path / str(i), bf16=True, model_config={**MODEL, **config})
        for i, config in enumerate(({}, {"attn_implementation": "eager"}))
    ]
    assert [run.model.config._attn_implementation for run in found] == ["sdpa", CPU_HALF_PRECISION_ATTENTION, "eager"]


def test_data_dir_stands_for_a_source_and_replaces_those_of_a_recipe(sounds, tmp_path):
    values = recipe(sounds, tmp_path / "run", data={"sources": [{"kind": "parquet", "path": "absent"}], "roll": True})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    words = ["--data_dir", str(sounds), "--model_config.num_views", "3", "--resume-from-checkpoint", "false", "--no_mask_padding"]
    settings = parse_settings(PreTrainingSettings, ["--config", str(tmp_path / "recipe.yaml"), *words])
    assert [(source.kind, source.path) for source in settings.data.sources] == [("folder", str(sounds))]
    assert settings.data.roll
    assert settings.model_config == {**MODEL, "num_views": 3}
    assert settings.resume_from_checkpoint is False
    write_settings(settings, tmp_path / "settings.yaml")
    assert read_settings(PreTrainingSettings, tmp_path / "settings.yaml") == settings
    with pytest.raises(UserError, match="there is nothing to train on: give a folder of recordings as data_dir"):
        PreTrainingSettings(output_dir="somewhere")


@pytest.mark.parametrize(
    ("name", "proposed"),
    [
        ("batch_size", "per_device_train_batch_size"),
        ("lr", "learning_rate"),
        ("min_lr", "lr_scheduler_kwargs.min_lr"),
        ("mixed_precision", "bf16 or fp16"),
        ("num_train_epochs", "max_steps"),
        ("init_from", "model"),
        ("output_folder", "output_dir"),
    ],
)
def test_names_of_other_programs_are_answered_with_those_of_this_one(name, proposed):
    with pytest.raises(UserError, match=rf"there is no setting {name}: did you mean {proposed}"):
        parse_settings(PreTrainingSettings, ["--output_dir", "runs", "--data_dir", "sounds", f"--{name}", "1"])


def test_help_has_a_group_for_each_question(capsys):
    with pytest.raises(SystemExit):
        parse_settings(PreTrainingSettings, ["--help"])
    text = capsys.readouterr().out
    groups = ["Data and output:", "What is trained:", "Optimisation:", "Speed and memory:", "Checkpoints and logs:", "Collapse guard:"]
    places = [text.index(group) for group in groups]
    assert places == sorted(places)
    assert places[2] < text.index("--learning_rate") < places[3]


def test_a_launcher_does_not_divide_the_gradients(sounds, tmp_path, monkeypatch):
    norms = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        run = trainer(sounds, tmp_path / steps, max_steps=1, warmup_steps=0, max_grad_norm=1e9)
        run.run()
        norms.append(sum(state["exp_avg"].norm().item() for state in run.optimizer.state.values()))
    assert norms[0] == pytest.approx(norms[1])


def test_a_folder_whose_run_is_further_or_of_another_stage_is_rejected(sounds, tmp_path):
    trainer(sounds, tmp_path, max_steps=4).run()
    for changes in ({"max_steps": 3}, {"stage": 1}):
        with pytest.raises(UserError, match="checkpoint-00000004 is of stage 2 and step 4, but .*choose another output_dir"):
            trainer(sounds, tmp_path, **changes).run()


def test_a_signal_in_the_last_step_stops_nothing(sounds, tmp_path):
    source = {"sources": [{"kind": "folder", "path": str(sounds)}]}
    run = trainer(sounds, tmp_path, validation=source, max_steps=3)
    interrupted_after(run, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run.run()
    assert "validation_loss" in metrics(tmp_path)[-1]


def test_a_run_whose_model_or_clips_have_changed_is_rejected(sounds, tmp_path):
    trainer(sounds, tmp_path, max_steps=3).run()
    with pytest.raises(UserError, match="00000003 holds a model of other sizes than preset and model_config ask for: leave them"):
        trainer(sounds, tmp_path, model_config={**MODEL, "hidden_size": 64}).run()
    with pytest.raises(UserError, match=r"another stream: seed \(\d+ then, 9 now\)\. Restore that, or begin another run in another folder"):
        trainer(sounds, tmp_path, seed=9).run()


def test_changed_recordings_are_counted_in_the_message(sounds, tmp_path):
    clips = shutil.copytree(sounds, tmp_path / "clips")
    trainer(clips, tmp_path / "run", max_steps=3).run()
    (clips / "00.wav").unlink()
    with pytest.raises(UserError, match=r"another stream: the recordings of clips have changed \(12 files then, 11 now\)\. Restore that"):
        trainer(clips, tmp_path / "run").run()


def test_a_loss_far_above_the_first_is_warned_about(sounds, tmp_path, caplog):
    run = trainer(sounds, tmp_path, max_steps=6, save_steps=100)
    write, losses = run.log.write, iter([5.0, 49.0, 51.0])
    run.log.write = lambda *args: ({**(found := write(*args))[0], "loss": next(losses)}, found[1])
    with caplog.at_level("WARNING"):
        run.run()
    warnings = [record.getMessage() for record in caplog.records if "diverged" in record.getMessage()]
    assert len(warnings) == 1
    assert warnings[0].startswith("The mean loss since the last line is 51, more than 10 times that of the first line, 5: ")


@pytest.mark.parametrize(("end", "logged"), [(8, False), (9, True)])
def test_a_run_that_ends_before_the_decay_of_the_teacher_does_says_so(sounds, tmp_path, caplog, end, logged):
    with caplog.at_level("INFO"):
        trainer(sounds, tmp_path, model_config={**MODEL, "ema_anneal_end_step": end})
    assert ("max_steps is 8, but the teacher's decay rises until step 9" in caplog.text) == logged


def test_computing_the_normalization_is_announced(sounds, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run = trainer(sounds, tmp_path, normalization="computed")
    before, after = [record.getMessage() for record in caplog.records if record.name.endswith("pretraining.data")]
    assert before == "Computing mean and standard deviation of the log-mels, of at most 10000 clips"
    assert after == f"Their mean is {run.extractor.mean:.3f}, and their standard deviation {run.extractor.std:.3f}"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (None, 0)])
def test_a_run_that_a_signal_stopped_does_not_end_like_a_finished_one(sounds, tmp_path, number, status, monkeypatch):
    """`stage 1 && stage 2` must not start from half of a stage 1."""
    settings = recipe(sounds, tmp_path / "run", max_steps=5)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))

    class Stopped(PreTrainer):
        def __init__(self, settings):
            super().__init__(settings)
            if number is not None:
                interrupted_after(self, 2, lambda: os.kill(os.getpid(), number))

    monkeypatch.setattr(loop_module, "PreTrainer", Stopped)
    calls = []
    monkeypatch.setattr(loop_module, "keep_freed_memory", lambda: calls.append(1))  # of this process, which has other tests to run
    with pytest.raises(SystemExit) if status else contextlib.nullcontext() as stopped:
        assert main(["pretrain", "--config", str(tmp_path / "recipe.yaml")]) == 0
    assert calls == [1]  # by the command alone, not by the class
    if status:
        assert stopped.value.code == status


@pytest.mark.parametrize("floor", ["min_target_std", "max_skipped_steps"])
def test_a_run_that_is_stopped_for_a_reason_ends_with_that_reason(sounds, tmp_path, floor, monkeypatch, capsys):
    """One sentence and status 1, no traceback."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(sounds, tmp_path / "run", guard_after_steps=1, min_prediction_std=0.0)))

    class Infinite(PreTrainer):
        def __init__(self, settings):
            super().__init__(settings)
            infinite_at(self, *range(1, 9))

    if floor == "max_skipped_steps":
        monkeypatch.setattr(loop_module, "PreTrainer", Infinite)
    monkeypatch.setattr(loop_module, "keep_freed_memory", lambda: None)
    assert main(["pretrain", "--config", str(tmp_path / "recipe.yaml"), f"--{floor}", "2"]) == 1
    error = capsys.readouterr().err
    what = "at step 2 target_std is .* below its floor of 2" if floor == "min_target_std" else "not finite 2 times in a row at step 2"
    assert re.search(f"sslam pretrain: error: .*{what}", error)
    assert "Traceback" not in error


# --- what stops a run, or does not


def infinite_at(run: PreTrainer, *steps: int) -> None:
    """Let the losses of these steps be infinite."""
    forward = run.model.forward

    def sometimes_infinite(*args, **kwargs):
        output = forward(*args, **kwargs)
        if run.step + 1 in steps:
            output.loss = output.loss * torch.inf
        return output

    run.model.forward = sometimes_infinite


def test_a_step_whose_gradients_are_not_finite_counts_and_changes_nothing(sounds, tmp_path, caplog):
    run, states = trainer(sounds, tmp_path), []
    infinite_at(run, 3, 4, 7)
    train = run._train

    def note(batches):
        train(batches)
        moments = [value.clone() for state in run.optimizer.state.values() for value in state.values()]
        states.append([tensor.clone() for tensor in run.model.state_dict().values()] + moments)

    run._train = note
    run.run()
    unchanged = [all(map(torch.equal, before, after)) for before, after in pairwise(states)]
    assert unchanged == [False, True, True, False, False, True, False]  # steps 2 to 8
    assert (run.step, run.skipped, run.skipped_in_a_row) == (8, 3, 0)
    found = re.findall(r"Gradients of (\d) of the last (\d) steps were not finite.*\((\d) since", caplog.text)
    assert found == [("1", "1", "1"), ("1", "1", "2"), ("1", "2", "3")]  # in the lines of steps 3, 4 and 8
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line["step"] for line in lines if line["loss"] is None] == [3, 4, 7]
    assert all(np.isfinite(line["loss"]) for line in lines if line["loss"] is not None)


def test_a_teacher_moves_unless_the_step_was_skipped(sounds, tmp_path):
    teachers = []
    for skipped in (None, torch.tensor(False), torch.tensor(True)):
        model = trainer(sounds, tmp_path).model
        with torch.no_grad():
            for parameter in model.sslam.parameters():
                parameter.add_(1.0)
        model.update_teacher(1, skipped)
        teachers.append([parameter - student for parameter, student in zip(model.teacher.parameters(), model.sslam.parameters())])
    assert all(map(torch.equal, teachers[0], teachers[1]))
    assert all(torch.allclose(difference, torch.tensor(-1.0), atol=1e-5) for difference in teachers[2])
    assert all(torch.allclose(difference, torch.tensor(-0.9), atol=2e-2) for difference in teachers[0])


def test_the_log_tells_the_time_left_the_hours_seen_and_where_the_curves_are(sounds, tmp_path, caplog):
    caplog.set_level("INFO")
    run = trainer(sounds, tmp_path, max_steps=4, save_steps=100, report_to="tensorboard")
    laps = iter([(7.0, 0.0), (3.0, 0.0)])  # seconds of two steps each
    run.log.lap = lambda: next(laps, (1.0, 0.0))
    run.run()
    curves = f"curves of loss, speed and hours of audio seen: tensorboard --logdir {tmp_path}"
    assert f"Each step is logged in {tmp_path / 'metrics.jsonl'}; {curves}" in caplog.messages
    assert list(tmp_path.glob("sslam/events*"))
    lines = [message for message in caplog.messages if message.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == ["step 2/4, 00:07 left", "step 4/4, 00:00 left"]
    assert all(", 0.00 h of audio seen, " in line for line in lines)


def test_skipped_steps_are_left_out_of_means_and_counted_over_a_resumption(sounds, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step: logged.append((step, values)))
    first = trainer(sounds, tmp_path, max_steps=8, save_steps=4, logging_steps=4)
    infinite_at(first, 4, 5)
    interrupted_after(first, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    first.run()
    assert (first.step, first.skipped, first.skipped_in_a_row) == (5, 2, 2)
    assert [(step, values["progress/skipped_steps"]) for step, values in logged] == [(4, 1), (5, 2)]
    assert logged[1][1]["progress/hours_of_audio_seen"] == pytest.approx(5 * 4 * 64 / 360_000)  # frames of 10 ms
    assert logged[0][1]["loss/loss"] == pytest.approx(np.mean([line["loss"] for line in metrics(tmp_path)[:3]]))
    second = trainer(sounds, tmp_path, max_steps=8, save_steps=4, logging_steps=4)
    second.run()
    assert second.skipped == 2


def test_a_run_of_skipped_steps_is_counted_over_lines_of_the_log_and_a_resumption(sounds, tmp_path):
    changes = {"max_skipped_steps": 4, "logging_steps": 1, "save_steps": 3}
    first = trainer(sounds, tmp_path, **changes, max_steps=3)
    infinite_at(first, 2, 3)
    first.run()
    second = trainer(sounds, tmp_path, **changes)
    infinite_at(second, 4, 5, 6)
    with pytest.raises(NonFiniteError, match="not finite 4 times in a row at step 5"):
        second.run()


def test_checkpoints_that_counted_attempts_resume(sounds, tmp_path):
    """Until a step that was skipped counted as one, a checkpoint counted attempts beside steps."""
    trainer(sounds, tmp_path, max_steps=3).run()
    folder = tmp_path / "checkpoint-00000003"
    place = json.loads((folder / "run.json").read_text())
    assert "attempt" not in place
    rewrite(folder, {**place, "attempt": 5, "skipped": 2})
    run = trainer(sounds, tmp_path, max_steps=5)
    run.run()
    assert (run.step, run.skipped) == (5, 2)
    assert len(metrics(tmp_path)) == 5


def test_a_scaler_of_losses_lowers_its_scale_until_gradients_are_finite(sounds, tmp_path):
    """As in float16, whose scaler Accelerate makes on GPUs alone."""
    run = trainer(sounds, tmp_path, logging_steps=8)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
    before = [parameter.clone() for parameter in run.model.parameters()]
    run.run()
    skipped = [line["step"] for line in metrics(tmp_path) if line["loss"] is None]
    assert skipped[:3] == [1, 2, 3]
    assert len(skipped) == run.skipped < 8
    assert run.accelerator.scaler.get_scale() == 2.0 ** (127 - run.skipped)
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
    # A scale is a power of two, so nothing else depends on it.
    other = trainer(sounds, tmp_path / "without a scaler", logging_steps=8)
    infinite_at(other, *skipped)
    other.run()
    assert metrics(tmp_path / "without a scaler") == metrics(tmp_path)


def test_too_many_in_a_row_stop_the_run_when_a_line_is_logged(sounds, tmp_path):
    run = trainer(sounds, tmp_path, max_skipped_steps=3, logging_steps=4, save_steps=100)
    with torch.no_grad():
        run.model.decoder.projection.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="3 times in a row at step 3"):
        run.run()
    assert run.step == 4


@pytest.mark.parametrize("floor", ["min_target_std", "min_prediction_std", "min_content_share"])
def test_the_guard_stops_a_run_under_a_floor_but_not_before_its_time(sounds, tmp_path, floor):
    run = trainer(sounds, tmp_path, guard_after_steps=4, **{"min_prediction_std": 0.0, floor: 100.0})
    with pytest.raises(CollapseError, match=f"at step 4 {floor.removeprefix('min_')} is .*below its floor of 100"):
        run.run()
    assert len(metrics(tmp_path)) == 4


def test_no_batch_is_smaller_than_the_others(sounds, tmp_path):
    """Of twelve clips in batches of eleven the last one begins the next batch: alone, its content_share would be unknown."""
    trainer(sounds, tmp_path, per_device_train_batch_size=11, logging_steps=4, save_steps=100).run()
    assert all(0 < line["content_share"] < 1 for line in metrics(tmp_path))
    assert json.loads((tmp_path / "checkpoint-00000008" / "run.json").read_text())["clips_seen"] == 8 * 11


@pytest.mark.parametrize("writer", ["weights", "optimiser"])
def test_a_full_disk_is_told_and_former_checkpoints_stay(sounds, tmp_path, monkeypatch, writer):
    owner, name = (SSLAMForPreTraining, "save_pretrained") if writer == "weights" else (torch, "save")
    real, error = getattr(owner, name), SafetensorError if writer == "weights" else OSError

    def save(value, path, **kwargs):
        if "00000006" in str(path):
            raise error("No space left on device")
        real(value, path, **kwargs)

    monkeypatch.setattr(owner, name, save)
    with pytest.raises(OSError, match="step 6 could not be written .*No space left"):
        trainer(sounds, tmp_path).run()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-00000003"]
    monkeypatch.undo()
    trainer(sounds, tmp_path).run()
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_steps": 8}, "warmup_steps is 8.*max_steps, 8"),
        ({"warmup_steps": 0.95, "max_steps": 10}, "warmup_steps is 0.95.*max_steps, 10: set it too, for example --warmup_steps 0.1"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
        ({"lr_scheduler_kwargs": {"min_rl": 0.0}}, "no setting lr_scheduler_kwargs.min_rl: did you mean lr_scheduler_kwargs.min_lr"),
        ({"lr_scheduler_kwargs": {"min_lr": 1.0}}, "min_lr is 1.0, but must lie between 0 and learning_rate, 0.001"),
        ({"save_total_limit": 0}, "save_total_limit is 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0"),
        ({"model_config": {**MODEL, "hiden_size": 32}}, "no setting model_config.hiden_size: did you mean model_config.hidden_size"),
        ({"model_config": {**MODEL, "hidden_size": 30}}, "model_config: hidden_size is 30"),
        ({"feature_extractor": {"max_length": 128}}, "128 frames of 128 mel bins, but the model takes up to 64"),
        ({"feature_extractor": {"std": 0.0}}, "feature_extractor: .*std is 0"),
        ({"model": "absent/folder"}, "^there is no folder or file absent/folder here, and no model of this name"),
        ({"feature_extractor": {"max_lenght": 32}}, "no setting feature_extractor.max_lenght: did you mean feature_extractor.max_length"),
        ({"model_config": {**MODEL, "mask_ratio": 0.999}}, "model_config, with feature_extractor.max_length: .*mask_ratio"),
        ({"model_config": {**MODEL, "unmixed_span_length": 64}}, "model_config, with feature_extractor.max_length: .*unmixed_span_length"),
        ({"report_to": ["foo"]}, "report_to, bf16 or fp16: .*foo"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, but a finite number above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0, but a finite number above 0"),
        ({"adam_beta2": 1.0}, "adam_beta2 is 1.0, but must be at least 0 and less than 1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_settings_that_contradict_each_other_are_rejected(sounds, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        trainer(sounds, tmp_path, **changes)


@pytest.mark.usefixtures("_another_precision")
def test_float16_on_a_cpu_is_rejected(sounds, tmp_path):
    """Accelerate would train in float32 without a word."""
    with pytest.raises(UserError, match="fp16 is set, which needs a GPU"):
        trainer(sounds, tmp_path, fp16=True)


def test_an_output_folder_that_cannot_be_written_is_rejected(sounds, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to"):
        trainer(sounds, tmp_path / "file" / "runs")


def test_a_batch_of_one_clip_is_warned_about(sounds, tmp_path, caplog):
    trainer(sounds, tmp_path, per_device_train_batch_size=1, max_steps=3).run()
    assert "content_share cannot be measured" in caplog.text
    assert "each clip is mixed with itself" in caplog.text


def test_operations_of_a_clip_are_those_of_the_published_model():
    from transformers_sslam import SSLAMConfig
    from transformers_sslam.configuration_sslam import PRETRAINING_STAGES

    counts = [training_flops_per_clip(SSLAMConfig.base(**PRETRAINING_STAGES[stage]), 1024) for stage in (1, 2)]
    assert counts == pytest.approx([1.08e12, 1.23e12], rel=0.01)


# --- processes: killed, and several of them


SLOWED_DOWN = f"""
import runpy, time
from transformers_sslam.pretraining.loop import PreTrainer
train = PreTrainer._train
PreTrainer._train = lambda run, batches: (train(run, batches), time.sleep(0.04))
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def launch(folder: Path, settings: dict, processes: int, program: list, fork: dict | None = None) -> subprocess.Popen | Fork:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    words = [*program, "--config", folder / "recipe.yaml"]
    if fork is not None:
        return Fork(words, folder / "log", ON_CPU, **fork)
    log = open(folder / "log", "a")  # noqa: SIM115  # the process keeps it
    command = [*on_processes(processes), *words]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=ON_CPU)


def on_processes(count: int) -> list[str]:
    """What starts a Python program on so many processes of a CPU (for more than one `accelerate launch` itself wants MPI)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [sys.executable, *(torchrun if count > 1 else [])]


def finish(folder: Path, settings: dict, processes: int, fork: dict | None = None, program: list | None = None) -> None:
    code = launch(folder, settings, processes, program or [SCRIPT], fork).wait(timeout=500)
    assert code == 0, (folder / "log").read_text()[-3000:]


def kill_at_random_moments(sounds, tmp_path, processes: int, workers: int, kills: int, steps: int, forked: bool = False, **changes) -> None:
    """However often a run is killed, its losses are those of an uninterrupted run, to the last bit, and each checkpoint is whole.

    What is killed waits after each step: on a fast machine it would end before.
    """
    changes |= {
        "dataloader_num_workers": workers,
        "per_device_train_batch_size": 3,
        "max_steps": steps,
        "save_steps": 2,
        "logging_steps": 1,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fork, other_fork = ({}, {"other_hashes": True}) if forked else (None, None)
    finish(whole, recipe(sounds, whole, **changes), processes, other_fork, COMMAND if processes == 1 else [SCRIPT])
    chance = random.Random(processes * 10 + workers)
    settings = recipe(sounds, killed, **changes)
    deaths, slow = 0, tmp_path / "slow.py"
    slow.write_text(SLOWED_DOWN)
    while deaths < kills:
        process = launch(killed, settings, processes, [slow], fork)
        seen = _progress(killed)
        while process.poll() is None and _progress(killed) == seen:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.5))  # somewhere in the updates and checkpoints that follow
        if process.poll() is not None:
            break
        kill_with_all_it_started(process)
        deaths += 1
        for folder in checkpoints(killed):
            assert verify(folder) is None
            SSLAMForPreTraining.from_pretrained(folder)
    assert deaths == kills, (killed / "log").read_text()[-3000:]
    finish(killed, settings, processes, fork)
    assert metrics(killed) == metrics(whole)
    assert same_weights(killed / "model", whole / "model")


def _progress(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def test_a_killed_run_resumes_bit_for_bit(sounds, tmp_path):
    kill_at_random_moments(sounds, tmp_path, processes=1, workers=0, kills=2, steps=40, forked=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_twenty_kills_change_nothing(sounds, tmp_path, processes, workers):
    kill_at_random_moments(sounds, tmp_path, processes, workers, kills=20, steps=400)


def test_two_processes_hold_the_same_model_and_share_the_clips(sounds, tmp_path):
    """After 50 steps: parameters, teacher and optimiser equal on both; of 25 epochs each clip came 25 times, in either process."""
    program = tmp_path / "two.py"
    settings = recipe(sounds, tmp_path / "run", max_steps=50, per_device_train_batch_size=3, save_steps=100)
    program.write_text(
        "import json, sys, hashlib\n"
        "from transformers_sslam.audio.batches import DataSettings\n"
        "from transformers_sslam.pretraining.loop import PreTrainer\n"
        "from transformers_sslam.pretraining.settings import PreTrainingSettings\n"
        "settings = json.loads(sys.argv[1]); settings['data'] = DataSettings(**settings['data'])\n"
        "run, names = PreTrainer(PreTrainingSettings(**settings)), []\n"
        "train = run._train\n"
        "def note_and_train(batches):\n"
        "    names.extend(name for batch in batches for name in batch['names'])\n"
        "    train(batches)\n"
        "run._train = note_and_train; run.run()\n"
        "state = hashlib.sha256(b''.join(t.numpy().tobytes() for t in run.model.state_dict().values())).hexdigest()\n"
        "open(f'{sys.argv[2]}/{run.accelerator.process_index}.json', 'w').write(json.dumps([state, names]))\n"
    )
    run_on_two([program, json.dumps(settings), tmp_path], tmp_path / "log", ON_CPU)
    (first, names), (second, other_names) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    counts = Counter(Path(name).name for name in names + other_names)
    assert counts.keys() == {path.name for path in sounds.iterdir()}
    assert sum(counts.values()) == 25 * 12
    assert max(counts.values()) - min(counts.values()) <= 2  # either may be in the midst of an epoch


def test_a_signal_to_one_process_stops_all_after_the_same_step(sounds, tmp_path):
    program = tmp_path / "two.py"
    program.write_text(
        "import json, os, signal, sys\n"
        "from transformers_sslam.audio.batches import DataSettings\n"
        "from transformers_sslam.pretraining.loop import PreTrainer\n"
        "from transformers_sslam.pretraining.settings import PreTrainingSettings\n"
        "settings = json.loads(sys.argv[1]); settings['data'] = DataSettings(**settings['data'])\n"
        "run = PreTrainer(PreTrainingSettings(**settings))\n"
        "train = run._train\n"
        "def train_and_stop(batches):\n"
        "    train(batches)\n"
        "    if run.step == 2 and run.accelerator.process_index == 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "run._train = train_and_stop; run.run()\n"
        "open(f'{sys.argv[2]}/{run.accelerator.process_index}.json', 'w').write(json.dumps(run.step))\n"
    )
    settings = recipe(sounds, tmp_path / "run", per_device_train_batch_size=3, save_steps=100, max_steps=50)
    run_on_two([program, json.dumps(settings), tmp_path], tmp_path / "log", ON_CPU)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)] == [2, 2]
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-00000002"]


def test_processes_that_do_not_know_of_each_other_are_rejected(sounds, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, but Accelerate sees 1"):
        trainer(sounds, tmp_path)


@pytest.mark.parametrize(("normalized", "padding"), [(True, 4.268 / (2 * 4.569)), (False, 0.0)])
def test_the_model_takes_for_padding_what_the_extractor_pads_with(sounds, tmp_path, normalized, padding):
    run = trainer(sounds, tmp_path, feature_extractor={"max_length": 64, "do_normalize": normalized})
    assert run.model.config.padding_value == pytest.approx(padding, rel=1e-6)


def test_a_name_that_is_not_a_field_of_the_configuration_is_rejected(sounds, tmp_path):
    with pytest.raises(UserError, match="there is no setting model_config.base: "):
        trainer(sounds, tmp_path, model_config={**MODEL, "base": 1})


def test_sharded_models_are_rejected(sounds, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(UserError, match="Accelerate was set to FSDP.*data-parallel"):
        trainer(sounds, tmp_path)


@pytest.mark.slow
def test_another_number_of_processes_resumes_and_reports_what_changes(sounds, tmp_path):
    finish(tmp_path, recipe(sounds, tmp_path, max_steps=6), processes=1)
    finish(tmp_path, recipe(sounds, tmp_path, max_steps=10), processes=2)
    log = (tmp_path / "log").read_text()
    assert "The run had 1 processes and now has 2" in log
    assert "begins again" not in log  # each clip of the epoch still comes once
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, 11))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_read_that_hangs_does_not_keep_a_run_from_ending(sounds, tmp_path, monkeypatch, num_workers):
    """As on a mount whose server is gone: the run stops after the last step that had its clips, and resumes there."""
    trainer(sounds, tmp_path / "whole", dataloader_num_workers=num_workers).run()
    real, this_process, timers = clips_module.load_waveform, os.getpid(), []

    def hangs(audio, sampling_rate):
        if "07" in str(audio["path"]):  # in a second, the run has used up all batches before, and waits
            timers.append(threading.Timer(1, os.kill, (this_process, signal.SIGTERM)))
            timers[-1].start()
            time.sleep(600)
        return real(audio, sampling_rate)

    monkeypatch.setattr(clips_module, "load_waveform", hangs)
    run = trainer(sounds, tmp_path / "hung", dataloader_num_workers=num_workers)
    start = time.monotonic()
    try:
        run.run()
    finally:  # behind the run, the signal would end the tests; a worker's timer has ended with it
        for timer in timers:
            timer.cancel()
    assert time.monotonic() - start < 20
    assert run.step < 8
    monkeypatch.undo()
    trainer(sounds, tmp_path / "hung", dataloader_num_workers=num_workers).run()
    assert metrics(tmp_path / "hung") == metrics(tmp_path / "whole")
    assert same_weights(tmp_path / "hung" / "model", tmp_path / "whole" / "model")
