"""Learning rates by layer, their schedule in the Trainer, and the loss against soft targets, all worked out a second time."""

import math
from dataclasses import replace
from itertools import cycle

import datasets
import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, tiny_config
from transformers import TrainerCallback

from transformers_sslam import SSLAMForAudioClassification
from transformers_sslam.audio.clips import ReadStatistics
from transformers_sslam.errors import UserError, as_user_error
from transformers_sslam.finetuning.optimization import classification_loss, layer_decay_groups
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.stream import LabelledPart
from transformers_sslam.finetuning.trainer import EpochBatches, StreamTrainer
from transformers_sslam.finetuning.training import fine_tune


pytestmark = pytest.mark.usefixtures("without_drawing")


def classifier(**changes) -> SSLAMForAudioClassification:
    torch.manual_seed(0)
    return SSLAMForAudioClassification(tiny_config(num_labels=3, max_length=32, **changes))


def names_by_group(model, groups: list[dict]) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in groups]


# --- groups


def test_every_parameter_is_in_one_group_with_the_rate_of_its_layer():
    """Two blocks, rates halved from each to the one below."""
    model = classifier()
    groups = layer_decay_groups(model, learning_rate=0.8, weight_decay=0.05, layer_decay=0.5)
    by_name = {name: group for names, group in zip(names_by_group(model, groups), groups) for name in names}
    assert sum(len(group["params"]) for group in groups) == len(by_name) == len(list(model.parameters()))
    rates = {"sslam.embeddings.": 0.1, "sslam.layers.0.": 0.2, "sslam.layers.1.": 0.4, "layernorm.": 0.8, "classifier.": 0.8}
    for name, group in by_name.items():
        (rate,) = (rate for prefix, rate in rates.items() if name.startswith(prefix))
        assert group["lr"] == pytest.approx(rate, rel=1e-12), name
        assert group["weight_decay"] == (0.0 if name.endswith("bias") or "layernorm" in name else 0.05), name
    assert [group["layer"] for group in groups] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_the_input_of_twelve_blocks_learns_thirteen_steps_slower():
    groups = layer_decay_groups(classifier(num_hidden_layers=12), learning_rate=1.0, weight_decay=0.05, layer_decay=0.65)
    assert min(group["lr"] for group in groups) == pytest.approx(0.65**13, rel=1e-12)
    assert len({group["lr"] for group in groups}) == 14


def test_frozen_parameters_are_in_no_group():
    model = classifier()
    model.sslam.requires_grad_(False)
    groups = layer_decay_groups(model, learning_rate=1.0, weight_decay=0.05, layer_decay=0.5)
    head = {"layernorm.weight", "layernorm.bias", "classifier.weight", "classifier.bias"}
    assert set.union(*names_by_group(model, groups)) == head
    assert {group["lr"] for group in groups} == {1.0}


# --- in the Trainer


class Recorder(TrainerCallback):
    """Learning rates of all groups and gradients, as each update finds them."""

    def __init__(self):
        self.rates, self.gradients = [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])
        self.gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def settings(tmp_path) -> FineTuningSettings:
    return FineTuningSettings(
        data_dir="none",
        output_dir=str(tmp_path),
        max_steps=12,
        warmup_steps=1 / 3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_kwargs={"min_lr": 1e-5},
        disable_tqdm=True,
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        per_device_eval_batch_size=4,
    )


class Items:
    """Items in their order, over and over, in place of a stream of clips."""

    def __init__(self, items: list[dict], batch_size: int):
        self.items, self.batch_size, self.statistics, self.part = items, batch_size, ReadStatistics(), LabelledPart(None, None)

    def __iter__(self):
        items = cycle(self.items)
        while True:
            batch = [next(items) for _ in range(self.batch_size)]
            yield {name: torch.stack([item[name] for item in batch]) for name in batch[0]}


def train(settings: FineTuningSettings, items: list[dict], loss: str = "cross_entropy") -> tuple[list[dict], Recorder]:
    """The groups as they were made, and what the updates saw."""
    model, recorder, batch_size = classifier(), Recorder(), settings.per_device_train_batch_size
    groups = layer_decay_groups(model, settings.learning_rate, settings.weight_decay, 0.5)
    rates = [group["lr"] for group in groups]
    trainer = StreamTrainer(
        model=model,
        args=settings.training_arguments(),
        loss=loss,
        train_batches=EpochBatches(Items(items, batch_size), len(items) // batch_size),
        open_stream=lambda part: Items(items, batch_size),
        about={},
        callbacks=[recorder],
        optimizers=(torch.optim.AdamW(groups, lr=settings.learning_rate), None),
    )
    trainer.train()
    return rates, recorder


def clips(number: int) -> list[dict]:
    draws = torch.Generator().manual_seed(0)
    targets = torch.rand(number, 3, generator=draws).softmax(1)
    return [{"input_values": torch.randn(32, 128, generator=draws), "labels": target} for target in targets]


def test_the_schedule_keeps_the_ratios_between_groups_down_to_the_floor(settings):
    """Four updates of warm-up from 0, then eight of a cosine towards a hundredth of each group's rate."""
    rates, recorder = train(settings, clips(8))
    floor = 1e-5 / 1e-3
    factors = [step / 4 for step in range(4)]
    factors += [floor + (1 - floor) * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert len(set(rates)) == 4
    np.testing.assert_allclose(recorder.rates, np.outer(factors, rates), rtol=1e-9, atol=1e-18)


def test_accumulated_steps_have_the_gradient_of_one_large_batch(settings):
    items = clips(8)
    _, large = train(replace(settings, max_steps=1, per_device_train_batch_size=8), items)
    _, small = train(replace(settings, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4), items)
    assert len(small.gradients) == 1
    for name, gradient in large.gradients[0].items():
        torch.testing.assert_close(small.gradients[0][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_the_trainer_does_not_smooth_targets_a_second_time(settings):
    """The stream has smoothed them."""
    one = replace(settings, max_steps=1)
    (_, plain), (_, smoothed) = train(one, clips(8)), train(replace(one, label_smoothing_factor=0.3), clips(8))
    for name, gradient in plain.gradients[0].items():
        assert torch.equal(smoothed.gradients[0][name], gradient), name


# --- the loss

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
TARGETS = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0]])


def test_cross_entropy_of_soft_targets_by_hand():
    rows = [[float(x) for x in row] for row in LOGITS]
    expected = 0.0
    for logits, targets in zip(rows, TARGETS.tolist()):
        total = math.log(sum(math.exp(x) for x in logits))
        expected += sum(target * (total - x) for target, x in zip(targets, logits)) / len(rows)
    assert classification_loss(LOGITS, TARGETS, "cross_entropy").item() == pytest.approx(expected, rel=1e-6)


def test_binary_cross_entropy_of_soft_targets_by_hand():
    """The mean over classes as well as clips."""
    expected = 0.0
    for x, target in zip(LOGITS.flatten().tolist(), TARGETS.flatten().tolist()):
        score = 1 / (1 + math.exp(-x))
        expected -= (target * math.log(score) + (1 - target) * math.log(1 - score)) / 6
    assert classification_loss(LOGITS, TARGETS, "binary_cross_entropy").item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["cross_entropy", "binary_cross_entropy"])
def test_the_loss_is_in_float32_whatever_the_logits_are(kind):
    loss = classification_loss(LOGITS.bfloat16(), TARGETS, kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, classification_loss(LOGITS, TARGETS, kind))  # these logits are exact in bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 2**32}, r"is 4294967296, but a number from 0 to 2\*\*32 - 1"),
        ({"seeds": [0, -1]}, r"is -1, but a number from 0 to 2\*\*32 - 1"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1, but a number from 0"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules is 'all-linear', but cannot be set here"),
    ],
)
def test_numbers_that_cannot_work_are_rejected(settings, changes, message):
    with pytest.raises(UserError, match=message):
        replace(settings, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"report_to": "banana"}, "report_to is 'banana', which cannot be used: banana is not supported, only .*tensorboard"),
        (
            {"torch_compile": True, "torch_compile_backend": "banana"},
            "Trainer rejects these settings: 'BANANA' is not a valid DynamoBackend",
        ),
    ],
)
def test_what_trainer_cannot_use_is_one_sentence(settings, tmp_path, changes, message):
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / "clips" / part / label).mkdir(parents=True)
            soundfile.write(tmp_path / "clips" / part / label / "0.wav", noise(0.3), 16_000)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_length": 32}
    with pytest.raises(UserError, match=message):
        fine_tune(
            replace(settings, data_dir=str(tmp_path / "clips"), model_config=small, max_length=32, output_dir=str(tmp_path), **changes)
        )


def test_a_package_that_is_not_installed_is_one_sentence():
    with pytest.raises(UserError, match="optim is 'x': you need to install y"), as_user_error("optim is 'x'"):
        raise ImportError("you need to install y")
