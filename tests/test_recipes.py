"""The recipes against the published settings, written out here a second time."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from transformers_sslam.audio.event_layouts import SPASS_SCENES
from transformers_sslam.audio.layouts import LAYOUTS
from transformers_sslam.settings import read_settings
from transformers_sslam.training.fine_tuning_settings import FineTuningSettings
from transformers_sslam.training.pretraining_settings import PreTrainingSettings


RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"
FINE_TUNING = sorted(path.stem for pattern in ("finetune_*.yaml", "linear_*.yaml") for path in RECIPES.glob(pattern))

# Length of the schedule and of its warm-up, in updates, or in epochs and a share of them.
SCHEDULES = {
    "finetune_audioset_2m": (400_000, 40_000),
    "finetune_audioset_20k": (40_000, 4_000),
    "finetune_esc50": (4_000, 400),
    "finetune_speech_commands_v1": (40_000, 4_000),
    "finetune_speech_commands_v2": (40_000, 4_000),
}
FIFTY_EPOCHS = {"finetune_spass": 0.1, "finetune_urban_sed": 0.1, "finetune_idmt_desed": 0.1, "linear_spass": 0.0}
PUBLISHED = [*SCHEDULES, *FIFTY_EPOCHS]

SHARED = {"min_learning_rate": 1e-6, "weight_decay": 0.05, "layer_decay": 0.65, "model_config": {"drop_path_rate": 0.1}}
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


def recipe(name: str, *overrides: str) -> FineTuningSettings:
    return read_settings(FineTuningSettings, RECIPES / f"{name}.yaml", ["data_dir=somewhere", *overrides])


@pytest.mark.parametrize("name", FINE_TUNING)
def test_every_recipe_is_accepted_and_names_a_layout(name):
    assert recipe(name).layout in LAYOUTS


def test_every_recipe_of_a_published_data_set_is_checked_here():
    layouts = {name: yaml.safe_load((RECIPES / f"{name}.yaml").read_text()).get("layout", "audiofolder") for name in FINE_TUNING}
    assert {name for name, layout in layouts.items() if layout not in ("audiofolder", "parquet", "hub")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_optimisation_is_the_published_one(name):
    settings = recipe(name)
    found = (settings.learning_rate, settings.batch_size, settings.normalization, settings.loss, settings.label_smoothing)
    assert found == OPTIMISATION[name]
    assert {key: getattr(settings, key) for key in SHARED} == SHARED
    arguments = settings.training_arguments()
    assert (arguments.adam_beta1, arguments.adam_beta2, arguments.lr_scheduler_type) == (0.9, 0.95, "cosine_with_min_lr")


@pytest.mark.parametrize("name", PUBLISHED)
def test_augmentation_is_the_published_one(name):
    assert asdict(recipe(name).augmentation) == {**SHARED_AUGMENTATION, **AUGMENTATION.get(name, {})}


@pytest.mark.parametrize("name", SCHEDULES)
def test_updates_and_warm_up_are_the_published_ones(name):
    settings = recipe(name)
    assert (settings.total_updates, settings.total_updates * settings.warmup_share) == SCHEDULES[name]


@pytest.mark.parametrize("name", FIFTY_EPOCHS)
def test_epochs_and_warm_up_are_the_published_ones(name):
    settings = recipe(name)
    assert (settings.epochs, settings.total_updates, settings.warmup_share) == (50, None, FIFTY_EPOCHS[name])


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
    assert [recipe("finetune_spass", f"subset={scene}").subset for scene in SPASS_SCENES] == list(SPASS_SCENES)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("pretrain_*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_pre_training_is_accepted(path):
    settings = read_settings(PreTrainingSettings, path, ["output_dir=somewhere"])
    assert settings.stage == int(path.stem[-1])


@pytest.mark.parametrize(
    ("name", "updates", "warmup", "rate"),
    [
        ("pretrain_base_stage1", 400_000, 53_333, 5e-4),
        ("pretrain_base_stage2", 200_000, 25_000, 5e-5),
        ("pretrain_large_stage1", 400_000, 53_333, 4e-4),
    ],
)
def test_pre_training_is_the_published_one(name, updates, warmup, rate):
    settings = read_settings(PreTrainingSettings, RECIPES / f"{name}.yaml", ["output_dir=somewhere"])
    assert (settings.total_updates, settings.warmup_updates, settings.learning_rate) == (updates, warmup, rate)
    assert (settings.batch_size, settings.max_grad_norm, settings.weight_decay) == (12, 4.0, 0.05)
    assert (settings.adam_beta1, settings.adam_beta2, settings.preset) == (0.9, 0.95, name.split("_")[1])
