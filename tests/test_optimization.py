"""Learning rates by layer, their schedule in the Trainer, and the loss against soft targets, all worked out a second time."""

import math
from dataclasses import replace
from itertools import cycle

import numpy as np
import pytest
import torch
from conftest import tiny_config
from transformers import TrainerCallback

from transformers_sslam import SSLAMForAudioClassification
from transformers_sslam.audio.clips import ReadStatistics
from transformers_sslam.training.fine_tuning_settings import FineTuningSettings
from transformers_sslam.training.labelled_stream import LabelledPart
from transformers_sslam.training.optimization import classification_loss, layer_decay_groups
from transformers_sslam.training.stream_trainer import EpochBatches, StreamTrainer


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


@pytest.fixture
def settings(tmp_path) -> FineTuningSettings:
    return FineTuningSettings(
        data_dir="none",
        output_dir=str(tmp_path),
        total_updates=12,
        warmup_share=1 / 3,
        batch_size=4,
        learning_rate=1e-3,
        min_learning_rate=1e-5,
        trainer={"disable_tqdm": True, "max_grad_norm": 0.0, "use_cpu": True, "save_strategy": "no"},
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
    model, recorder = classifier(), Recorder()
    groups = layer_decay_groups(model, settings.learning_rate, settings.weight_decay, 0.5)
    rates = [group["lr"] for group in groups]
    trainer = StreamTrainer(
        model=model,
        args=settings.training_arguments(),
        loss=loss,
        train_batches=EpochBatches(Items(items, settings.batch_size), len(items) // settings.batch_size),
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
    _, large = train(replace(settings, total_updates=1, batch_size=8), items)
    _, small = train(
        replace(settings, total_updates=1, batch_size=2, trainer={**settings.trainer, "gradient_accumulation_steps": 4}), items
    )
    assert len(small.gradients) == 1
    for name, gradient in large.gradients[0].items():
        torch.testing.assert_close(small.gradients[0][name], gradient, rtol=1e-4, atol=1e-7, msg=name)


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
