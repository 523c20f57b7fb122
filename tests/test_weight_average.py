"""The average of the weights in fine-tuning: what it is, that it is what is evaluated and saved, and that it resumes bit for bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_fine_tuning_resume import _own_cache, changed, clips, interrupt, outcome, own_clips, settings, weights_of  # noqa: F401  # fixtures too
from torch import nn

from transformers_sslam import SSLAMForAudioClassification
from transformers_sslam.errors import UserError
from transformers_sslam.files import write_manifest
from transformers_sslam.finetuning import trainer as stream_trainer
from transformers_sslam.finetuning.averaging import WeightAverage
from transformers_sslam.finetuning.settings import FineTuningSettings
from transformers_sslam.finetuning.training import fine_tune


pytestmark = pytest.mark.usefixtures("without_drawing")


def test_an_average_of_known_weights():
    """Of weights 0, 1, 2, 3 with a decay of 0.3: the warm-up gives 2/11 and 3/12, and then 4/13 is above it."""
    layer = nn.Linear(1, 1)
    layer.bias.requires_grad_(False)
    layer.weight.data.zero_()
    average, expected = WeightAverage(layer, 0.3), 0.0
    assert list(average.averages) == ["weight"]
    for step, decay in ((1, 2 / 11), (2, 3 / 12), (3, 0.3)):
        layer.weight.data.fill_(step)
        average.update(step)
        expected = decay * expected + (1 - decay) * step
        assert average.averages["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert layer.weight.item() == 3
    before, bias, pointer = average.averages["weight"].clone(), layer.bias.clone(), layer.weight.data_ptr()
    with average.applied():
        assert torch.equal(layer.weight, before)
        assert layer.weight.data_ptr() == pointer  # the optimiser's tensor
    assert layer.weight.item() == 3
    assert torch.equal(average.averages["weight"], before)
    assert torch.equal(layer.bias, bias)


@pytest.fixture
def validated(settings, own_clips) -> FineTuningSettings:  # noqa: F811
    """A run that is evaluated on other clips, every three updates."""
    shutil.copytree(own_clips / "test", own_clips / "validation")
    return replace(settings, data_dir=str(own_clips), validation_split="validation", eval_strategy="steps", eval_steps=3)


def recorded(run: FineTuningSettings, monkeypatch) -> tuple[dict, list[dict[str, torch.Tensor]]]:
    """Results, and the weights in training after each update."""
    found: list[dict[str, torch.Tensor]] = []
    original = stream_trainer._RunState.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        found.append({name: w.detach().clone() for name, w in self.trainer.model.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(stream_trainer._RunState, "on_step_end", on_step_end)
        return fine_tune(run), found


def test_the_average_is_saved_and_evaluated_and_does_not_change_the_training(validated, tmp_path, monkeypatch):
    plain = fine_tune(changed(validated, tmp_path / "plain"))
    results, weights = recorded(changed(validated, tmp_path / "averaged", ema_decay=0.6), monkeypatch)
    assert results["training_loss"] == plain["training_loss"]
    last = weights_of(tmp_path / "plain")
    assert all(torch.equal(tensor, last[name]) for name, tensor in weights[-1].items())
    saved = weights_of(tmp_path / "averaged")
    average = None
    for step, now in enumerate(weights, 1):
        decay = min(0.6, (1 + step) / (10 + step))
        # The weights at the start count less than 1e-4 after twelve updates: those after the first stand for them.
        average = now if average is None else {name: decay * average[name] + (1 - decay) * now[name] for name in now}
    for name, tensor in saved.items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-4, atol=1e-6)
    assert not torch.equal(saved["classifier.weight"], last["classifier.weight"])
    assert results["validation"][-1]["eval_loss"] != plain["validation"][-1]["eval_loss"]
    assert results["validation"][-1]["eval_loss"] == pytest.approx(results["metrics"]["loss"], abs=1e-6)  # the same clips, the same weights
    logits = np.load(tmp_path / "averaged" / "scores.npz")["logits"]
    assert np.abs(logits - np.load(tmp_path / "plain" / "scores.npz")["logits"]).max() > 1e-4
    assert "exponential moving average (decay 0.6) of the weights after its last step" in (tmp_path / "averaged" / "README.md").read_text()


@pytest.mark.parametrize("best", [False, True])
def test_a_run_with_an_average_resumes_bit_for_bit(validated, tmp_path, monkeypatch, best):
    averaged = replace(validated, ema_decay=0.8, load_best_model_at_end=best, save_total_limit=None)
    whole, stopped = (changed(averaged, tmp_path / name) for name in ("whole", "stopped"))
    expected = fine_tune(whole)
    for update in (4, 8):
        interrupt(stopped, monkeypatch, update)
    checkpoint = tmp_path / "stopped" / "checkpoint-6"
    averaged, own = load_file(checkpoint / "model.safetensors"), load_file(checkpoint / WeightAverage.FILE)
    assert own.keys() == averaged.keys() - {"sslam.embeddings.position_embeddings"}  # the one tensor that is not trained
    assert not torch.equal(averaged["classifier.weight"], own["classifier.weight"])
    model = SSLAMForAudioClassification.from_pretrained(checkpoint)  # a checkpoint is a model for use
    assert torch.equal(model.classifier.weight, averaged["classifier.weight"])
    found = fine_tune(stopped)
    assert found["resumed"]
    assert outcome(stopped.output_dir) == outcome(whole.output_dir)
    assert found["best_step"] == expected["best_step"]
    losses = [[entry["eval_loss"] for entry in results["validation"]] for results in (found, expected)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_an_average_of_a_frozen_encoder_is_of_the_head_alone(settings, tmp_path):  # noqa: F811
    fine_tune(changed(settings, tmp_path / "first"))
    frozen = changed(settings, tmp_path / "frozen", model=str(tmp_path / "first"), model_config={}, freeze_encoder=True, ema_decay=0.5)
    fine_tune(replace(frozen, max_steps=2))
    before, after = weights_of(tmp_path / "first"), weights_of(tmp_path / "frozen")
    assert {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])} == {"classifier", "layernorm"}


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_is_not_a_fraction_is_rejected(settings, decay):  # noqa: F811
    with pytest.raises(UserError, match=f"ema_decay is {decay:g}, but a fraction in"):
        replace(settings, ema_decay=decay)


def test_a_checkpoint_of_a_version_without_the_setting_resumes(settings, monkeypatch):  # noqa: F811
    interrupt(settings, monkeypatch, 4)
    checkpoint = Path(settings.output_dir) / "checkpoint-3"
    about = json.loads((checkpoint / "run.json").read_text())
    del about["settings"]["ema_decay"]
    (checkpoint / "run.json").write_text(json.dumps(about))
    write_manifest(checkpoint)
    assert fine_tune(settings)["resumed"]
