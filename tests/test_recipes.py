"""The recipes against the published settings, written out here a second time."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from transformers_sslam import SSLAMConfig
from transformers_sslam.audio.layouts import LAYOUTS
from transformers_sslam.audio.published_events import SPASS_SCENES
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.pretraining.settings import PreTrainingSettings
from transformers_sslam.settings import parse_settings, read_settings, recipe_names


RECIPES = Path(__file__).parents[1] / "src" / "transformers_sslam" / "recipes"
FINE_TUNING = sorted(path.stem for pattern in ("finetune_*.yaml", "linear_*.yaml") for path in RECIPES.glob(pattern))

# Length of the schedule and of its warm-up, in steps, or in epochs and a fraction of them.
SCHEDULES = {
    "finetune_audioset_2m": (400_000, 40_000),
    "finetune_audioset_20k": (40_000, 4_000),
    "finetune_esc50": (4_000, 400),
    "finetune_speech_commands_v1": (40_000, 4_000),
    "finetune_speech_commands_v2": (40_000, 4_000),
}
FIFTY_EPOCHS = {"finetune_spass": 0.1, "finetune_urban_sed": 0.1, "finetune_idmt_desed": 0.1, "linear_spass": 0.0}
PUBLISHED = [*SCHEDULES, *FIFTY_EPOCHS]
EVENTS = ["finetune_audioset_strong", "finetune_desed", "finetune_urban_sed_events"]

SHARED = {"lr_scheduler_kwargs": {"min_lr": 1e-6}, "weight_decay": 0.05, "layer_decay": 0.65, "model_config": {"drop_path_rate": 0.1}}
SHARED_AUGMENTATION = {
    **{"roll": True, "gain": 10, "noise": 0},
    **{"mixup_alpha": 0.8, "mixup_probability": 0.9, "time_mask": 0.2, "frequency_mask": 0.2},
}
AUGMENTATION = {
    "finetune_esc50": {"mixup_probability": 0, "time_mask": 0.4, "frequency_mask": 0.4},
    "finetune_speech_commands_v1": {"noise": 0.1},
    "finetune_speech_commands_v2": {"noise": 0.1},
}
# learning rate, batch, statistics (with their frames), loss, label smoothing
OPTIMISATION = {
    "finetune_audioset_2m": (5e-5, 96, "audioset", "binary_cross_entropy", 0),
    "finetune_audioset_20k": (5e-5, 48, "audioset", "binary_cross_entropy", 0),
    "finetune_esc50": (5e-5, 48, "esc50", "cross_entropy", 0.1),
    "finetune_speech_commands_v1": (2e-4, 256, "speech_commands", "binary_cross_entropy", 0.1),
    "finetune_speech_commands_v2": (2e-4, 256, "speech_commands", "binary_cross_entropy", 0.1),
    "finetune_spass": (5e-5, 48, "audioset", "binary_cross_entropy", 0),
    "finetune_urban_sed": (5e-5, 48, "audioset", "binary_cross_entropy", 0),
    "finetune_idmt_desed": (5e-5, 48, "audioset", "binary_cross_entropy", 0),
    "linear_spass": (1e-3, 48, "audioset", "binary_cross_entropy", 0),
}


def recipe(name: str, **changes: str) -> FineTuningSettings:
    return read_settings(FineTuningSettings, name, {"data_dir": "somewhere", **changes})


@pytest.mark.parametrize("name", FINE_TUNING)
def test_every_recipe_is_accepted_and_names_a_layout(name):
    assert recipe(name).layout in LAYOUTS


def test_every_recipe_of_a_published_data_set_is_checked_here():
    layouts = {name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text()).get("layout", "audiofolder") for name in FINE_TUNING}
    assert {name for name, layout in layouts.items() if layout not in ("audiofolder", "parquet", "hub")} == {*PUBLISHED, *EVENTS}


@pytest.mark.parametrize("name", EVENTS)
def test_recipes_of_events_have_steps_of_40_ms_and_little_mixup(name):
    settings = recipe(name)
    assert (settings.task, settings.label_column, settings.model_config["steps_per_second"]) == ("events", "events", 25)
    augmentation = settings.augmentation
    assert (augmentation.mixup_probability, augmentation.time_mask, augmentation.frequency_mask) == (0.3, 0, 0)
    assert SSLAMConfig(**settings.model_config).frames_per_step == 4


def test_audioset_strong_is_trained_as_pretrained_sed_is():
    """30 epochs of 100,000 clips, batches of 256, 5,000 steps of warm-up, 7e-5 to 2e-7, balanced (Schmid et al., arXiv 2409.09546)."""
    settings = recipe("finetune_audioset_strong")
    assert (settings.num_train_epochs, settings.clips_per_epoch, settings.per_device_train_batch_size) == (30, 100_000, 256)
    assert (settings.learning_rate, settings.warmup_steps, settings.class_balanced) == (7e-5, 5000, True)
    assert (settings.lr_scheduler_type, settings.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr": 2e-7})


@pytest.mark.parametrize("name", PUBLISHED)
def test_optimisation_is_the_published_one(name):
    settings = recipe(name)
    found = (settings.learning_rate, settings.per_device_train_batch_size, settings.normalization, settings.loss)
    assert (*found, settings.label_smoothing_factor) == OPTIMISATION[name]
    assert {key: getattr(settings, key) for key in SHARED} == SHARED
    assert (settings.adam_beta1, settings.adam_beta2, settings.lr_scheduler_type) == (0.9, 0.95, "cosine_with_min_lr")


@pytest.mark.parametrize("name", PUBLISHED)
def test_augmentation_is_the_published_one(name):
    assert asdict(recipe(name).augmentation) == {**SHARED_AUGMENTATION, **AUGMENTATION.get(name, {})}


@pytest.mark.parametrize("name", SCHEDULES)
def test_updates_and_warm_up_are_the_published_ones(name):
    settings = recipe(name)
    assert (settings.max_steps, settings.max_steps * settings.warmup_steps) == SCHEDULES[name]


@pytest.mark.parametrize("name", FIFTY_EPOCHS)
def test_epochs_and_warm_up_are_the_published_ones(name):
    settings = recipe(name)
    assert (settings.num_train_epochs, settings.max_steps, settings.warmup_steps) == (50, -1, FIFTY_EPOCHS[name])


@pytest.mark.parametrize("name", PUBLISHED)
def test_only_what_is_published_is_balanced_frozen_or_cross_validated(name):
    settings = recipe(name)
    assert settings.class_balanced == (name in ("finetune_audioset_2m", "finetune_speech_commands_v1"))
    assert settings.clips_per_epoch == (200_000 if name == "finetune_audioset_2m" else None)
    assert settings.freeze_encoder == (name == "linear_spass")
    assert (settings.cross_validate, settings.fold_column) == ((True, "fold") if name == "finetune_esc50" else (False, None))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_starts_from_a_checkpoint_and_reads_the_column_its_layout_gives(name):
    settings = recipe(name)
    assert settings.model is not None, "from scratch by mistake"
    assert settings.label_column == ("label" if settings.layout in ("esc50", "speech_commands") else "labels")


def test_every_scene_of_spass_can_be_asked_for():
    assert [recipe("finetune_spass", subset=scene).subset for scene in SPASS_SCENES] == list(SPASS_SCENES)


def pretraining_recipe(name: str, *words: str) -> PreTrainingSettings:
    return parse_settings(PreTrainingSettings, ["--config", name, "--output_dir", "somewhere", *words])


@pytest.mark.parametrize("name", [name for name in recipe_names() if "pretrain" in name])
def test_every_recipe_of_pre_training_is_accepted(name):
    settings = pretraining_recipe(name)
    assert settings.stage == (1 if name.endswith("stage1") else 2)
    assert (settings.model is None) == (settings.stage == 1)


@pytest.mark.parametrize(
    ("name", "steps", "warmup", "rate"),
    [
        ("pretrain_base_stage1", 400_000, 53_333, 5e-4),
        ("pretrain_base_stage2", 200_000, 25_000, 5e-5),
        ("pretrain_large_stage1", 400_000, 53_333, 4e-4),
    ],
)
def test_pre_training_is_the_published_one(name, steps, warmup, rate):
    settings = pretraining_recipe(name)
    assert (settings.max_steps, settings.num_warmup_steps, settings.learning_rate, settings.min_lr) == (steps, warmup, rate, 0.0)
    assert (settings.per_device_train_batch_size, settings.max_grad_norm, settings.weight_decay) == (12, 4.0, 0.05)
    assert (settings.adam_beta1, settings.adam_beta2, settings.preset) == (0.9, 0.95, name.split("_")[1])
    assert settings.bf16


def test_the_command_in_the_recipe_for_eight_devices_is_accepted():
    words = ["--per_device_train_batch_size", "6", "--model_config.global_loss_weight", "2"]
    settings = pretraining_recipe("pretrain_base_stage1", *words)
    assert (settings.per_device_train_batch_size, settings.model_config) == (6, {"global_loss_weight": 2})


def test_the_small_recipe_takes_statistics_of_ones_own_recordings_by_one_flag():
    """Its stage 2 takes those of stage 1, whatever they are."""
    first = read_settings(PreTrainingSettings, "pretrain_tiny_stage1")
    assert (first.normalization, first.feature_extractor) == ("esc50", {"max_length": 512})
    second = read_settings(PreTrainingSettings, "pretrain_tiny_stage2")
    assert (second.normalization, second.feature_extractor) == ("model", {"max_length": 512})
    for name in ("pretrain_tiny_stage1", "pretrain_tiny_stage2"):
        words = ["--config", name, "--data_dir", "somewhere", "--normalization", "computed"]
        assert parse_settings(PreTrainingSettings, words).normalization == "computed"
