"""What users of Transformers expect of its `TrainingArguments`: the best model, early stopping, the Hub, trackers, memory and speed."""

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import soundfile
import torch
import transformers
from conftest import noise
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm
from transformers import TrainingArguments

from transformers_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from transformers_sslam.attention_sslam import CPU_HALF_PRECISION_ATTENTION
from transformers_sslam.checkpoints import checkpoints
from transformers_sslam.errors import UserError
from transformers_sslam.finetuning import progress, training
from transformers_sslam.finetuning.progress import ProgressTable
from transformers_sslam.finetuning.settings import DEFAULTS, MACHINE_SETTINGS, UNSUPPORTED, FineTuningSettings
from transformers_sslam.finetuning.trainer import StreamTrainer, _RunState
from transformers_sslam.finetuning.training import fine_tune
from transformers_sslam.settings import parse_settings, read_settings, write_settings


pytestmark = pytest.mark.usefixtures("without_drawing")


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def settings(tmp_path) -> FineTuningSettings:
    """Clips of two classes: 16 to train on, 6 to validate and 4 to test on; evaluated and saved after each of eight steps."""
    for split, count in (("train", 16), ("validation", 6), ("test", 4)):
        for i in range(count):
            path = tmp_path / "clips" / split / "ab"[i % 2] / f"{i:02}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, (1 + i % 2) * noise(0.3, seed=100 * count + i), 16_000)
    return FineTuningSettings(
        data_dir=str(tmp_path / "clips"),
        output_dir=str(tmp_path / "run"),
        validation_split="validation",
        max_length=32,
        model_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 32},
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_steps=8,
        disable_tqdm=True,
        use_cpu=True,
        logging_strategy="steps",
        logging_steps=1,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )


@pytest.fixture
def worst(settings) -> FineTuningSettings:
    """The best model is the one with the greatest loss on the validation clips: an early one."""
    return replace(settings, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, save_total_limit=1)


@pytest.fixture
def trainers(monkeypatch) -> list[StreamTrainer]:
    """The trainers of the runs of a test, as they are when their training has ended."""
    found: list[StreamTrainer] = []
    check = training._check_weights
    monkeypatch.setattr(training, "_check_weights", lambda trainer: found.append(trainer) or check(trainer))
    return found


def weights(folder: str | Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}


# --- the best model


def test_the_best_model_of_the_validation_part_is_kept_and_outlives_later_checkpoints(worst, monkeypatch):
    monkeypatch.setattr(training, "checkpoints", lambda folder: [])  # those of a finished run stay, to be compared with
    results = fine_tune(worst)
    losses = {entry["step"]: entry["eval_loss"] for entry in results["validation"]}
    assert list(losses) == list(range(1, 9))
    best = max(losses, key=losses.__getitem__)
    assert results["best_step"] == best < 7
    left = checkpoints(Path(worst.output_dir))
    assert [folder.name for folder in left] == [f"checkpoint-{best}", "checkpoint-8"]
    assert weights(worst.output_dir) == weights(left[0]) != weights(left[1])
    assert f"the weights after step {best}, the best on the validation clips" in (Path(worst.output_dir) / "README.md").read_text()


def test_the_test_part_is_evaluated_once_at_the_end(settings, monkeypatch):
    opened: list[int] = []
    open_part = training._Streams.evaluation
    monkeypatch.setattr(training._Streams, "evaluation", lambda self, part: opened.append(len(part.labels)) or open_part(self, part))
    results = fine_tune(settings)
    assert opened == [6] * 8 + [4]
    assert results["clips"] == {"training": 16, "validation": 6, "test": 4}
    assert results["best_step"] is None  # without load_best_model_at_end


def test_without_a_validation_part_the_test_part_is_reported_on_the_way(settings):
    results = fine_tune(replace(settings, validation_split=None))
    assert results["validation"] == []
    assert results["clips"] == {"training": 16, "test": 4}


def test_validation_needs_no_test_part(settings):
    shutil.rmtree(Path(settings.data_dir) / "test")
    results = fine_tune(replace(settings, do_eval=False))
    assert (len(results["validation"]), results["metrics"]) == (8, {})


def test_early_stopping_ends_the_run_after_so_many_evaluations_without_a_better_one(worst, caplog):
    caplog.set_level("INFO")
    results = fine_tune(replace(worst, early_stopping_patience=2))
    assert results["steps"] == results["best_step"] + 2 < 8
    epoch = results["best_step"] / 2
    assert (
        f"stopped early after epoch {epoch + 1:.4g}; the weights are those after epoch {epoch:.4g}, with the best loss" in caplog.messages
    )


class Killed(BaseException):
    """Stands for the end of a process: nothing in the program handles it."""


@pytest.mark.parametrize("stop", ["before the patience has ended", "after"])
def test_a_run_with_early_stopping_resumes_exactly(worst, tmp_path, monkeypatch, stop):
    early = replace(worst, early_stopping_patience=3)
    whole = fine_tune(replace(early, output_dir=str(tmp_path / "whole")))
    on_step_end = _RunState.on_step_end

    def end(*_):
        raise Killed

    def end_behind_a_step(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == whole["best_step"] + 2:
            raise Killed

    with monkeypatch.context() as patch:
        if stop == "after":
            patch.setattr(training, "_check_weights", end)
        else:
            patch.setattr(_RunState, "on_step_end", end_behind_a_step)
        with pytest.raises(Killed):
            fine_tune(early)
    resumed = fine_tune(early)
    assert resumed["resumed"]
    for name in ("steps", "best_step", "metrics", "training_loss"):
        assert resumed[name] == whole[name], name
    assert weights(early.output_dir) == weights(tmp_path / "whole")


def test_a_best_checkpoint_that_is_damaged_is_an_error(worst, monkeypatch):
    train = StreamTrainer.train

    def train_and_damage(self, *args, **kwargs):
        train(self, *args, **kwargs)
        (Path(self.state.best_model_checkpoint) / "model.safetensors").write_bytes(b"")

    monkeypatch.setattr(StreamTrainer, "train", train_and_damage)
    with pytest.raises(UserError, match=r"checkpoint-\d+ is damaged: model.safetensors has 0 bytes"):
        fine_tune(worst)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric_for_best_model": "f1"}, "metric_for_best_model is 'f1', but the evaluation has accuracy, loss"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "a validation part is chosen, but eval_strategy is 'no'"),
        ({"eval_strategy": "no"}, "a validation part is chosen, but eval_strategy is 'no', so that nothing would use it"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end requires the save and eval strategy to match"),
        ({"load_best_model_at_end": True, "validation_split": None}, "True, but there is no validation part to decide by"),
        ({"load_best_model_at_end": True, "eval_delay": 99}, "no checkpoint was evaluated: change eval_steps or eval_delay"),
        ({"save_strategy": "best", "validation_split": None}, "save_strategy is 'best', but there is no validation part"),
        ({"lr_scheduler_type": "greedy", "validation_split": None}, "lr_scheduler_type is 'greedy', but there is no validation part"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 1e-5}}, "lr_scheduler_type is 'linear', which cannot be used"),
        ({"early_stopping_patience": 2}, "early_stopping_patience is 2, but load_best_model_at_end is false"),
        ({"validation_split": "test"}, "'test' is both in the validation and in the test part"),
        ({"validation_split": "train"}, "'train' is both in the training and in the validation part"),
        ({"fold_column": "fold"}, "validation_split and fold_column are both set"),
        ({"do_train": False}, "do_train is false, but this command trains: .*sslam evaluate"),
    ],
)
def test_what_cannot_choose_a_model_is_rejected(settings, changes, message):
    with pytest.raises(UserError, match=message):
        fine_tune(replace(settings, **changes))


# --- checkpoints


def test_a_run_resumes_from_the_checkpoint_that_is_named(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "checkpoints", lambda folder: [])
    whole = fine_tune(replace(settings, output_dir=str(tmp_path / "whole"), save_total_limit=None))
    other = replace(settings, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    resumed = fine_tune(other)
    assert (resumed["resumed"], resumed["training_loss"]) == (True, whole["training_loss"])
    assert weights(other.output_dir) == weights(tmp_path / "whole")
    (tmp_path / "whole" / "checkpoint-3" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="which is not a whole checkpoint: model.safetensors has 0 bytes"):
        fine_tune(replace(other, output_dir=str(tmp_path / "third")))
    (tmp_path / "run" / "config.json").unlink()
    with pytest.raises(UserError, match="resume_from_checkpoint is false, but .*run holds checkpoint-"):
        fine_tune(replace(settings, resume_from_checkpoint=False))


def test_a_checkpoint_is_a_model_for_use(settings, monkeypatch):
    monkeypatch.setattr(training, "checkpoints", lambda folder: [])
    fine_tune(settings)
    folder = Path(settings.output_dir) / "checkpoint-7"
    classify = transformers.pipeline("audio-classification", model=str(folder))
    assert {found["label"] for found in classify(noise(0.3))} == {"a", "b"}
    assert (folder / "modeling_sslam.py").is_file()


# --- the Hub


def test_a_model_is_pushed_with_its_card_and_code_and_no_file_holds_the_token(settings, monkeypatch):
    pushed: list[tuple[dict, set[str], str]] = []

    def upload_folder(folder_path, **options):
        names = {path.name for path in Path(folder_path).iterdir()}
        pushed.append((options, names, (Path(folder_path) / "README.md").read_text()))

    def init_hf_repo(trainer, **_):
        trainer.hub_model_id = trainer.args.hub_model_id

    monkeypatch.setattr("transformers.trainer.Trainer.init_hf_repo", init_hf_repo)
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    monkeypatch.setattr(training, "checkpoints", lambda folder: [])
    asked = replace(settings, push_to_hub=True, hub_model_id="me/tuned", hub_token="hf_secret", hub_revision="trial")
    fine_tune(asked)
    ((options, names, card),) = pushed
    assert (options["repo_id"], options["token"], options["revision"]) == ("me/tuned", "hf_secret", "trial")
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_sslam.py", "results.json", "settings.yaml"} <= names
    assert "training_args.bin" not in names
    assert "A SSLAM audio classifier, trained from scratch on 16 clips" in card
    assert "auto_map" in json.loads((Path(settings.output_dir) / "config.json").read_text())
    files = [path for path in Path(settings.output_dir).rglob("*") if path.is_file()]
    assert any("checkpoint-8" in str(path) for path in files)
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]
    assert "hf_secret" not in repr(asked) + str(asked)


# --- trackers, memory, speed


def test_trackers_receive_the_metrics(settings, trainers):
    pytest.importorskip("tensorboard")
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(settings.output_dir) / "logs")
    try:
        fine_tune(replace(settings, report_to="tensorboard"))
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    assert list((Path(settings.output_dir) / "logs").rglob("events.out.tfevents*"))


def test_gradient_checkpointing_changes_no_number(settings, trainers, tmp_path):
    found = {}
    for on in (False, True):
        found[on] = fine_tune(replace(settings, gradient_checkpointing=on, output_dir=str(tmp_path / str(on))))
        assert trainers[-1].model.is_gradient_checkpointing == on
    assert found[True]["training_loss"] == pytest.approx(found[False]["training_loss"], rel=1e-6)
    assert found[True]["metrics"]["loss"] == pytest.approx(found[False]["metrics"]["loss"], rel=1e-4)


def test_a_compiled_model_learns_the_same_and_is_saved_as_it_was(settings, trainers, tmp_path):
    plain = fine_tune(settings)
    compiled = fine_tune(replace(settings, torch_compile=True, torch_compile_backend="eager", output_dir=str(tmp_path / "compiled")))
    assert isinstance(trainers[-1].model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert not isinstance(trainers[0].model_wrapped, torch._dynamo.eval_frame.OptimizedModule)
    assert compiled["training_loss"] == pytest.approx(plain["training_loss"], rel=1e-5)
    assert weights(tmp_path / "compiled").keys() == weights(settings.output_dir).keys()
    assert SSLAMForAudioClassification.from_pretrained(tmp_path / "compiled").config.id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, "sdpa"), ({"bf16": True}, CPU_HALF_PRECISION_ATTENTION), ({"bf16": True, "attn_implementation": "eager"}, "eager")],
)
def test_attention_is_chosen_for_processor_and_precision(settings, trainers, changes, expected):
    fine_tune(replace(settings, max_steps=1, **changes))
    assert trainers[0].model.config._attn_implementation == expected
    assert replace(settings, bf16=True).to_save()["attn_implementation"] is None


def test_another_optimizer_has_the_same_groups(settings, trainers):
    fine_tune(replace(settings, optim="sgd", weight_decay=0.02))
    optimizer = trainers[0].optimizer.optimizer
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.02}
    assert {group["layer"] for group in optimizer.param_groups} == {0, 1, 2, 3}


# --- what a run shows


def test_the_learning_rate_shown_is_that_of_the_head(settings, trainers):
    """5e-5 is logged as 5e-5 at its peak, though the embeddings learn at 0.65 ** 3 of it."""
    fine_tune(replace(settings, learning_rate=5e-5, layer_decay=0.65, model=str(saved(settings)), model_config={}, warmup_steps=4))
    history = trainers[0].state.log_history
    assert [entry["learning_rate"] for entry in history if "loss" in entry][:5] == pytest.approx([0, 1.25e-5, 2.5e-5, 3.75e-5, 5e-5])
    assert trainers[0].optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.65**3 * 5e-5)


def test_tensorboard_shows_the_learning_rate_of_the_head_and_a_line_says_where(settings, caplog):
    caplog.set_level("INFO")
    fine_tune(replace(settings, report_to="tensorboard", max_steps=2, warmup_steps=0, lr_scheduler_type="constant"))
    assert f"curves of losses, metrics and learning rate: tensorboard --logdir {settings.output_dir}" in caplog.messages
    (folder,) = {file.parent for file in Path(settings.output_dir).glob("runs/*/events*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("train/learning_rate")] == pytest.approx([1e-2, 1e-2])
    assert {"train/loss", "eval/loss", "eval/accuracy"} <= set(events.Tags()["scalars"])


def test_a_validation_part_is_evaluated_each_epoch_by_default(settings, capsys):
    defaults = {"eval_strategy": None, "eval_steps": None, "logging_strategy": "epoch", "save_steps": 0.05}
    results = fine_tune(replace(settings, **defaults, max_steps=4))
    assert [entry["epoch"] for entry in results["validation"]] == [1, 2]  # 16 clips in batches of 8
    titles, *rows = (line for line in capsys.readouterr().out.splitlines() if line)
    assert titles.split() == ["epoch", "step", *["training", "loss", "validation", "loss", "accuracy", "learning", "rate", "time", "left"]]
    for row, entry, loss in zip(rows, results["validation"], results["training_loss"], strict=True):
        epoch, _, *numbers = row.split()
        assert epoch == f"{entry['epoch']:g}/2"
        assert numbers[:3] == [f"{loss:.4f}", f"{entry['eval_loss']:.4f}", f"{entry['eval_accuracy']:.4f}"]


def test_the_best_model_of_each_epoch_needs_no_other_setting(settings, trainers):
    defaults = {"eval_strategy": None, "eval_steps": None, "save_steps": 0.05}
    results = fine_tune(replace(settings, **defaults, load_best_model_at_end=True))
    best = min(results["validation"], key=lambda entry: entry["eval_loss"])
    assert results["best_step"] == best["step"]
    assert len(results["validation"]) == 4


def test_a_split_called_validation_that_is_not_used_is_told(settings, caplog):
    caplog.set_level("INFO")
    fine_tune(replace(settings, validation_split=None, eval_strategy=None, eval_steps=None, max_steps=1))
    assert sum("the split 'validation' is not used: with --validation_split validation" in message for message in caplog.messages) == 1


def test_a_resumed_bar_starts_where_the_run_is(settings, monkeypatch):
    bars = []
    monkeypatch.setattr(progress, "tqdm", lambda **options: bars.append(options) or tqdm(**options))
    state = SimpleNamespace(global_step=6, max_steps=8, is_world_process_zero=True)
    ProgressTable("validation", "accuracy").on_train_begin(settings.training_arguments(), state, None)
    assert (bars[0]["initial"], bars[0]["total"], bars[0]["disable"]) == (6, 8, True)


def saved(settings: FineTuningSettings) -> Path:
    """An encoder with its feature extractor, of the sizes that the settings have."""
    folder = Path(settings.output_dir).parent / "checkpoint"
    SSLAMModel(SSLAMConfig(**settings.model_config)).save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=settings.max_length).save_pretrained(folder)
    return folder


# --- arguments


def test_every_training_argument_is_a_setting_with_a_flag():
    words = ["--data_dir", "x", "--lr_scheduler_kwargs.min_lr", "1e-7", "--max_grad_norm", "2", "--bf16"]
    settings = parse_settings(FineTuningSettings, words)
    assert isinstance(settings, TrainingArguments)
    assert {f.name for f in fields(TrainingArguments) if f.init} <= {f.name for f in fields(settings)}
    assert (settings.lr_scheduler_kwargs, settings.max_grad_norm, settings.bf16) == ({"min_lr": 1e-7}, 2.0, True)


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine_with_min_lr"])
def test_any_schedule_can_be_chosen_by_its_name(settings, trainers, schedule):
    fine_tune(replace(settings, lr_scheduler_type=schedule, warmup_steps=0, do_eval=False, eval_strategy="no", validation_split=None))
    head = trainers[0].optimizer.param_groups[-1]["lr"]
    assert head == pytest.approx({"linear": 0.0, "constant": 1e-2, "cosine_with_min_lr": 1e-6}[schedule], abs=1e-12)


def test_settings_stay_as_they_were_given(settings, tmp_path):
    """`TrainingArguments` makes enumerations of text, and fills in what depends on others and on the machine."""
    arguments = settings.training_arguments()
    assert (arguments.do_eval, arguments.disable_tqdm, arguments.bf16) == (True, True, False)
    assert (type(settings.eval_strategy), settings.bf16, settings.report_to) == (str, None, "none")
    assert replace(settings, seed=3).to_save() == {**settings.to_save(), "seed": 3}
    write_settings(settings, tmp_path / "settings.yaml")
    assert read_settings(FineTuningSettings, tmp_path / "settings.yaml") == settings


def test_what_is_saved_names_no_machine_and_no_account(settings):
    given = replace(settings, hub_token="hf_secret", hub_model_id="me/x", report_to="wandb", ddp_backend="gloo", adam_beta1=0.8)
    saved = given.to_save()
    assert saved == {**settings.to_save(), "adam_beta1": 0.8}
    assert not saved.keys() & MACHINE_SETTINGS
    assert "adam_beta1" not in settings.to_save()  # of TrainingArguments only what is not its default, or has another here


OTHER_VALUES = {bool: True, int: 3, float: 3.0, str: "epoch", list: ["x"], type(None): "x"}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED.keys() & DEFAULTS.keys()))
def test_an_argument_that_would_be_ignored_is_rejected(settings, name):
    default = DEFAULTS[name]
    value = not default if isinstance(default, bool) else OTHER_VALUES[type(default)]
    with pytest.raises(UserError, match=rf"{name} is .*, but cannot be set here: \w+"):
        replace(settings, **{name: value})
